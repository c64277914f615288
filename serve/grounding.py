"""Grounding of texts on slides, and zero-shot classification: the slide model over features.

Questions that arrive while others are answered wait and are answered together: their texts go
through the text tower in one pass, and a slide that several ask about is read and encoded once
(:class:`pathflip.evaluation.encoding_cache.EncodingCache`). Nobody waits for a batch to fill.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pathflip import tracing
from pathflip.archive.snapshot import ArchiveSnapshot, ready_row
from pathflip.heatmap import encode_png

if TYPE_CHECKING:
    from pathflip.archive import Archive
    from pathflip.checkpoints import Run
    from pathflip.evaluation.encoding_cache import EncodingCache

MAX_BATCH = 64
"""Questions that are answered together; those that come meanwhile are next."""
SHARED_TEXTS = 200
"""A question of more texts encodes them by itself, after the others were answered."""
TEXTS_OF_A_SLIDE = 100
"""Reading and encoding a slide takes as long as so many texts (19 ms and 0.15 ms, one thread)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Question:
    """One request on its way through the model.

    Attributes:
        archive: State of the archive it began with.
        slides: Slides it is about.
        texts: Texts it needs.
        work: Computes its answer, in the model's thread.
        answer: Future of the answer.
    """

    archive: Archive
    slides: Sequence[str]
    texts: Sequence[str]
    work: Callable[[], Any]
    answer: asyncio.Future[Any]


class Grounding:
    """Service part that runs the slide model over the features of single slides.

    Args:
        archive: URI of the archive.
        run: Folder of the run; or the run, where another part has loaded it.
        device: ``cpu``, ``cuda`` or ``auto``.
        refresh_s: Seconds until new commits are looked for.
        computing: Lock of the run, where another part has it, too.
    """

    def __init__(
        self,
        archive: str,
        run: str | Run,
        *,
        device: str = "cpu",
        refresh_s: float = 30.0,
        computing: threading.Lock | None = None,
    ) -> None:
        from pathflip.checkpoints import Run, load_run
        from pathflip.compat import check_fits
        from pathflip.evaluation.encoding_cache import EncodingCache

        self.snapshot = ArchiveSnapshot(
            archive, refresh_s=refresh_s, warm=lambda newer: self.cache.look_up(newer)
        )
        self.run: Run = run if isinstance(run, Run) else load_run(run, device=device)
        self._computing = computing or threading.Lock()
        check_fits(self.snapshot.archive, self.run)
        self.cache: EncodingCache = EncodingCache(self.run)
        # One batch at a time: the model fills its processor, and tokenizers are not thread-safe.
        self._waiting: list[_Question] = []
        self._worker: asyncio.Task[None] | None = None

    async def describe(self) -> dict[str, Any]:
        """``id`` and ``fingerprint`` of the model."""
        return {"id": self.run.name, "fingerprint": self.run.fingerprint}

    async def ground(self, request: Mapping[str, Any]) -> dict[str, Any] | bytes:
        """Answer a :class:`serve.schemas.GroundRequest`.

        Returns:
            The JSON document, objects for QuPath, or a PNG.

        Raises:
            ArchiveError: ``unknown_slide``, or there is no thumbnail to draw over.
            ConfigError: The model has no regions, or the text is empty.
        """
        archive = await self.snapshot.newest_async()
        slide = request["slide_id"]
        ready_row(archive, slide)
        texts = [text for text in (request["text"], request["contrast"]) if text is not None]
        found: dict[str, Any] | bytes = await self._ask(
            archive, [slide], texts, lambda: self._ground(archive, request)
        )
        return found

    async def classify(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Answer a :class:`serve.schemas.ClassifyRequest`.

        Raises:
            ArchiveError: ``unknown_slide``; ``unknown_encoder``: a slide lacks the features.
        """
        from pathflip.evaluation.classify import class_task, class_texts, classify_slides

        archive = await self.snapshot.newest_async()
        slides = list(dict.fromkeys(request["slide_ids"]))
        for slide in slides:
            ready_row(archive, slide)
        task = class_task(
            request["classes"], templates=request["templates"], score=request["score"]
        )
        rows = await self._ask(
            archive, slides, class_texts(task),
            lambda: classify_slides(archive, self.cache, task, slides=slides),
        )  # fmt: skip
        return {"model": self.run.name, "results": rows}

    def _ground(self, archive: Archive, request: Mapping[str, Any]) -> dict[str, Any] | bytes:
        from pathflip.evaluation.ground_slide import ground_slide

        wanted = request["format"]
        found = ground_slide(
            archive, self.cache, request["slide_id"], request["text"],
            variant=request["variant"], contrast=request["contrast"], sigma=request["sigma"],
            min_patches=request["min_patches"], images=wanted != "json",
        )  # fmt: skip
        if wanted == "png":
            return encode_png(found.picture())
        if wanted == "geojson":
            return found.geojson(patches=request["patches"])
        return found.as_json(patches=request["patches"]) | {"model": self.run.name}

    # -- batches ----------------------------------------------------------------------------------

    async def _ask(
        self,
        archive: Archive,
        slides: Sequence[str],
        texts: Sequence[str],
        work: Callable[[], Any],
    ) -> Any:
        """Answer one question together with those that wait."""
        loop = asyncio.get_running_loop()
        question = _Question(
            archive=archive, slides=slides, texts=texts, work=work, answer=loop.create_future()
        )
        self._waiting.append(question)
        if self._worker is None or self._worker.done():
            self._worker = loop.create_task(self._answer_all(loop))
        with tracing.span("slide model", slides=len(slides), texts=len(texts)):
            return await question.answer

    async def _answer_all(self, loop: asyncio.AbstractEventLoop) -> None:
        """Answer whatever waits, a batch at a time, until nobody does."""
        while self._waiting:
            batch, self._waiting = self._waiting[:MAX_BATCH], self._waiting[MAX_BATCH:]
            await asyncio.to_thread(self._answer, batch, loop)

    def _answer(self, batch: Sequence[_Question], loop: asyncio.AbstractEventLoop) -> None:
        """Answer a batch; each answer leaves at once, the cheapest first."""
        wanted = [question for question in batch if not question.answer.cancelled()]
        shared = [text for one in wanted if len(one.texts) <= SHARED_TEXTS for text in one.texts]
        # A text that cannot be encoded must not fail the others: its own question meets it again.
        if shared:
            with suppress(Exception), self._computing:
                self.cache.texts(shared)
        for question in sorted(wanted, key=self._cost):
            if question.answer.cancelled():
                continue
            try:
                with self._computing:
                    done = question.answer.set_result, question.work()
            except Exception as error:  # the requester's, not the worker's
                done = question.answer.set_exception, error
            loop.call_soon_threadsafe(_tell, question.answer, *done)

    def _cost(self, question: _Question) -> int:
        """Return the texts a question has to encode, or slides in their place."""
        try:
            slides = sum(not self.cache.holds(question.archive, slide) for slide in question.slides)
        except Exception:  # its own answer meets it again, and must not fail the others
            slides = 0
        return TEXTS_OF_A_SLIDE * slides + self.cache.missing(question.texts)


def _tell(answer: asyncio.Future[Any], tell: Callable[[Any], None], what: Any) -> None:
    if not answer.cancelled():  # its client has left
        tell(what)
