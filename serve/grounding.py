"""Where on a slide a text is true, and which class a slide is: what needs a slide's features."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pathflip.archive.snapshot import ArchiveSnapshot, ready_row

if TYPE_CHECKING:
    from pathflip.checkpoints import Run
    from pathflip.evaluation.ground_slide import Located


class Grounding:
    """Runs the model over the features of single slides.

    Args:
        archive: Where the slides are.
        run: The trained model.
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
        # One at a time: the model fills its processor, and a tokenizer is no thread's friend.
        self.turn = asyncio.Lock()

    async def describe(self) -> dict[str, Any]:
        """The model: ``id`` and ``fingerprint``."""
        return {"id": self.run.name, "fingerprint": self.run.fingerprint}

    async def ground(self, asked: Mapping[str, Any]) -> dict[str, Any] | bytes:
        """Answers a :class:`serve.schemas.GroundRequest`.

        Returns:
            The JSON document, or a PNG.

        Raises:
            RequestError: ``unknown_slide``, or ``no_thumbnail`` to draw over.
            ConfigError: The model has no regions, or the text is empty.
        """
        archive = await self.snapshot.newest_async()
        slide = asked["slide_id"]
        ready_row(archive, slide)
        async with self.turn:
            return await asyncio.to_thread(self._ground, archive, slide, asked)

    async def classify(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Answers a :class:`serve.schemas.ClassifyRequest`.

        Raises:
            RequestError: ``unknown_slide``.
        """
        archive = await self.snapshot.newest_async()
        slides = list(asked["slide_ids"])
        for slide in slides:
            ready_row(archive, slide)
        async with self.turn:
            rows = await asyncio.to_thread(self._classify, archive, slides, asked)
        return {"model": self.run.name, "results": rows}

    def _ground(self, archive: Any, slide: str, asked: Mapping[str, Any]) -> dict[str, Any] | bytes:
        from pathflip.evaluation.ground_slide import locate

        found = locate(
            archive, self.run, slide, asked["text"],
            variant=asked["variant"], contrast=asked["contrast"], sigma=asked["sigma"],
            min_patches=asked["min_patches"],
        )  # fmt: skip
        if asked["format"] == "png":
            return _png(found)
        document = found.as_json() | {"model": self.run.name}
        if not asked["patches"]:
            del document["patches"]
        return document

    def _classify(self, archive: Any, slides: list[str], asked: Mapping[str, Any]) -> Any:
        from pathflip.evaluation.zeroshot import classify

        return classify(
            archive, self.run, asked["classes"],
            templates=asked["templates"], score=asked["score"], slides=slides,
        )  # fmt: skip


def _png(found: Located) -> bytes:
    import cv2

    picture = np.ascontiguousarray(found.picture()[..., ::-1])
    ok, data = cv2.imencode(".png", picture)
    if not ok:
        raise ValueError(f"a picture of {picture.shape} cannot be written as PNG")
    return data.tobytes()
