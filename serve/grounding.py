"""Grounding of texts on slides, and zero-shot classification: the slide model over features."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pathflip.archive.snapshot import ArchiveSnapshot, ready_row
from pathflip.heatmap import encode_png

if TYPE_CHECKING:
    from pathflip.checkpoints import Run


class Grounding:
    """Service part that runs the slide model over the features of single slides.

    Args:
        archive: URI of the archive.
        run: Folder of the run.
        device: ``cpu``, ``cuda`` or ``auto``.
        refresh_s: Seconds until new commits are looked for.
    """

    def __init__(
        self, archive: str, run: str, *, device: str = "cpu", refresh_s: float = 30.0
    ) -> None:
        from pathflip.checkpoints import load_run
        from pathflip.compat import check_fits

        self.snapshot = ArchiveSnapshot(archive, refresh_s=refresh_s)
        self.run: Run = load_run(run, device=device)
        check_fits(self.snapshot.archive, self.run)
        # Serialised: the model fills its processor, and tokenizers are not thread-safe.
        self.lock = asyncio.Lock()

    async def describe(self) -> dict[str, Any]:
        """``id`` and ``fingerprint`` of the model."""
        return {"id": self.run.name, "fingerprint": self.run.fingerprint}

    async def ground(self, request: Mapping[str, Any]) -> dict[str, Any] | bytes:
        """Answer a :class:`serve.schemas.GroundRequest`.

        Returns:
            The JSON document, or a PNG.

        Raises:
            ArchiveError: ``unknown_slide``, or there is no thumbnail to draw over.
            ConfigError: The model has no regions, or the text is empty.
        """
        archive = await self.snapshot.newest_async()
        slide = request["slide_id"]
        ready_row(archive, slide)
        async with self.lock:
            return await asyncio.to_thread(self._ground, archive, slide, request)

    async def classify(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Answer a :class:`serve.schemas.ClassifyRequest`.

        Raises:
            ArchiveError: ``unknown_slide``.
        """
        archive = await self.snapshot.newest_async()
        slides = list(request["slide_ids"])
        for slide in slides:
            ready_row(archive, slide)
        async with self.lock:
            rows = await asyncio.to_thread(self._classify, archive, slides, request)
        return {"model": self.run.name, "results": rows}

    def _ground(
        self, archive: Any, slide: str, request: Mapping[str, Any]
    ) -> dict[str, Any] | bytes:
        from pathflip.evaluation.ground_slide import ground_slide

        found = ground_slide(
            archive, self.run, slide, request["text"],
            variant=request["variant"], contrast=request["contrast"], sigma=request["sigma"],
            min_patches=request["min_patches"],
        )  # fmt: skip
        if request["format"] == "png":
            return encode_png(found.picture())
        document = found.as_json() | {"model": self.run.name}
        if not request["patches"]:
            del document["patches"]
        return document

    def _classify(self, archive: Any, slides: list[str], request: Mapping[str, Any]) -> Any:
        from pathflip.evaluation.zeroshot import classify

        return classify(
            archive, self.run, request["classes"],
            templates=request["templates"], score=request["score"], slides=slides,
        )  # fmt: skip
