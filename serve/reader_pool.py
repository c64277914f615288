"""Reader processes that requests for pixels take turns at.

A few :class:`pathflip.slides.reader.SlideReader` work beside each other, each in a thread of its
own. A request goes to a free one that has its slide open, else to the one idle longest. A process
that dies or hangs costs the request it was at work on, and is replaced. A slide on which several
died is refused for a while, so that one hostile file does not keep the readers from all others.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from pathflip.cpus import cpus_here
from pathflip.errors import SlideError
from pathflip.slides.reader import SlideReader
from serve.limits import RequestError

T = TypeVar("T")

DEATHS = 3
"""Requests on which a reader may die or hang before their slide is refused; as of ingest."""
REFUSED_S = 60.0
"""Seconds for which it is refused; another death refuses it again."""
_MOST_PASSED = 8  # requests that may overtake one that waits
_MOST_KNOWN = 1024  # slides whose deaths are remembered


@dataclass(frozen=True, kw_only=True)
class ReadingConfig:
    """Settings of the readers behind the viewer, ``reading.*`` in a configuration file.

    Args:
        readers: Reader processes of a replica; 0 for as many as there are processors, at most 4.
        slides: Slides that each keeps open.
        timeout_s: Seconds that a reader has for a request.
        queued: Most requests that wait for a reader; more are refused with 429.
        cache_mb: Memory for tiles that were made.
    """

    readers: int = 0
    slides: int = 8
    timeout_s: float = 20.0
    queued: int = 512
    cache_mb: int = 128


class _Worker:
    """A reader and its thread."""

    def __init__(self, number: int, slides: int) -> None:
        self.reader = SlideReader(patches=1, px=16, slides=slides)
        self.thread = ThreadPoolExecutor(1, thread_name_prefix=f"reader-{number}")
        self._slides = slides
        self.recent: OrderedDict[str, None] = OrderedDict()

    def note(self, slide: str) -> None:
        """Remember that the reader has a slide open."""
        self.recent[slide] = None
        self.recent.move_to_end(slide)
        while len(self.recent) > self._slides:
            self.recent.popitem(last=False)


@dataclass
class _Waiting:
    """A request that waits for a reader, and the number of those that overtook it."""

    slide: str
    place: asyncio.Future[_Worker]
    passed: int = 0


@dataclass
class _Deaths:
    """Deaths of readers on a slide, the last of them, and the time until it is refused."""

    count: int = 0
    until: float = field(default=0.0)
    error: SlideError | None = None


class ReaderPool:
    """Reader processes for requests of one event loop; each starts when it is first needed.

    Args:
        config: Settings.
    """

    def __init__(self, config: ReadingConfig) -> None:
        self.config = config
        count = config.readers or min(4, cpus_here())
        self._workers = [_Worker(number, config.slides) for number in range(count)]
        self._free: deque[_Worker] = deque(self._workers)
        self._waiting: deque[_Waiting] = deque()
        self._deaths: OrderedDict[str, _Deaths] = OrderedDict()

    async def run(self, slide: str, work: Callable[[SlideReader], T]) -> T:
        """Return ``work`` of a reader.

        Args:
            slide: Path of the slide, by which a reader is chosen.
            work: Call of one method of the reader; it runs in a thread.

        Raises:
            SlideError: Whatever the reader raises; the last death's error where there were several.
            RequestError: ``busy``: too many requests wait.
        """
        self._refuse(slide)
        worker = await self._take(slide)
        try:
            self._refuse(slide)  # those that waited meet what happened meanwhile
        except SlideError:
            self._release(worker)
            raise
        loop = asyncio.get_running_loop()
        asked = loop.run_in_executor(worker.thread, work, worker.reader)
        # The reader is free when it has answered, even where nobody waits for that any more.
        asked.add_done_callback(lambda done: self._done(worker, slide, done))
        return await asyncio.shield(asked)

    def close(self) -> None:
        """End all readers, once they have answered."""
        for worker in self._workers:
            worker.thread.shutdown(wait=True, cancel_futures=True)
            worker.reader.close()

    async def _take(self, slide: str) -> _Worker:
        if self._free:
            worker = next((one for one in self._free if slide in one.recent), self._free[0])
            self._free.remove(worker)
            return worker
        if len(self._waiting) >= self.config.queued:
            raise RequestError("Too many concurrent requests.", code="busy")
        waiting = _Waiting(slide, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        try:
            return await waiting.place
        except asyncio.CancelledError:
            if waiting.place.done() and not waiting.place.cancelled():
                self._release(waiting.place.result())
            raise

    def _done(self, worker: _Worker, slide: str, asked: asyncio.Future[T]) -> None:
        if asked.cancelled():  # the loop ends
            return
        error = asked.exception()
        if isinstance(error, SlideError) and error.code in ("reader_crash", "timeout"):
            worker.recent.clear()  # its process is another now
            self._count(slide, error)
        elif error is None:
            self._deaths.pop(slide, None)
            worker.note(slide)
        self._release(worker)

    def _release(self, worker: _Worker) -> None:
        while self._waiting and self._waiting[0].place.done():  # nobody waits for it any more
            self._waiting.popleft()
        if not self._waiting:
            self._free.append(worker)
            return
        chosen = 0
        if self._waiting[0].passed < _MOST_PASSED:
            near = list(self._waiting)[:_MOST_PASSED]
            chosen = next(
                (n for n, one in enumerate(near)
                 if one.slide in worker.recent and not one.place.done()),
                0,
            )  # fmt: skip
        for one in list(self._waiting)[:chosen]:
            one.passed += 1
        waiting = self._waiting[chosen]
        del self._waiting[chosen]
        waiting.place.set_result(worker)

    def _count(self, slide: str, error: SlideError) -> None:
        deaths = self._deaths.setdefault(slide, _Deaths())
        self._deaths.move_to_end(slide)
        while len(self._deaths) > _MOST_KNOWN:
            self._deaths.popitem(last=False)
        deaths.count, deaths.error = deaths.count + 1, error
        if deaths.count >= DEATHS:
            deaths.until = time.monotonic() + REFUSED_S

    def _refuse(self, slide: str) -> None:
        deaths = self._deaths.get(slide)
        if deaths is not None and deaths.error is not None and time.monotonic() < deaths.until:
            error = deaths.error
            raise SlideError(error.message, hint=error.hint, code=error.code)
