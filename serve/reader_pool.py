"""Reader processes that requests for pixels take turns at.

A few :class:`pathflip.slides.reader.SlideReader` work beside each other, each in a thread of its
own. A request goes to a free one that has its slide open, else to the one idle longest. A process
that dies or hangs costs the request it was at work on, and is replaced. A slide on which several
died is refused for a while, so that one hostile file does not keep the readers from all others.

Nor does one hostile client. Clients that wait take turns, so whoever asks more waits longer, and
what takes a reader long (:data:`LONG_PX`) has at most half of them, one for each client.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
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
LONG_PX = 32_000_000
"""Pixels from which on decoding them for one picture is long: 0.2 s of JPEG at full size."""
PX_PER_S = 100_000_000
"""Pixels that a reader decodes in a second; of JPEG it has 170 million on one idle core."""
LONG_WAITING = 32
"""Long requests of one client that may wait or run; more are refused."""
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

    @property
    def most_px(self) -> int:
        """Most pixels that are decoded for one picture: more could not be done in time."""
        return int(self.timeout_s * PX_PER_S)


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


@dataclass(eq=False)
class _Waiting:
    """A request that waits for a reader, and the number of its client's that overtook it."""

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
        self._waiting: OrderedDict[str, deque[_Waiting]] = OrderedDict()  # by client
        self._deaths: OrderedDict[tuple[str, bool], _Deaths] = OrderedDict()
        self._long = asyncio.Semaphore(max(1, count // 2))
        self._long_of = Counter[str]()  # long requests, by client
        self._turns: dict[str, asyncio.Lock] = {}

    async def run(
        self, slide: str, work: Callable[[SlideReader], T], *, client: str = "", long: bool = False
    ) -> T:
        """Return ``work`` of a reader.

        Args:
            slide: Path of the slide, by which a reader is chosen.
            work: Call of one method of the reader; it runs in a thread.
            client: Name of the client who asks.
            long: Whether it may decode more than :data:`LONG_PX`. A reader that dies or hangs on
                that counts apart: such requests of the slide are refused for a while, no others.

        Raises:
            SlideError: Whatever the reader raises; the last death's error where there were several.
            RequestError: ``busy``: too many requests wait.
        """
        self._refuse(slide, long)
        if not long:
            return await self._run(slide, work, client, None)
        if self._long_of[client] >= LONG_WAITING:
            raise RequestError(
                "Too many pictures of large parts of slides at once; ask again.", code="busy"
            )
        with ExitStack() as turn:
            await self._take_turn(turn, client)
            return await self._run(slide, work, client, turn)

    async def _take_turn(self, turn: ExitStack, client: str) -> None:
        """Wait until a client may ask for something long; its turn ends with the stack."""
        self._long_of[client] += 1
        turn.callback(self._leave, client)
        own = self._turns.setdefault(client, asyncio.Lock())
        for wait in (own, self._long):
            await wait.acquire()
            turn.callback(wait.release)

    def _leave(self, client: str) -> None:
        self._long_of[client] -= 1
        if not self._long_of[client]:
            del self._long_of[client], self._turns[client]

    async def _run(
        self, slide: str, work: Callable[[SlideReader], T], client: str, turn: ExitStack | None
    ) -> T:
        long = turn is not None
        worker = await self._take(slide, client)
        try:
            self._refuse(slide, long)  # those that waited meet what happened meanwhile
        except SlideError:
            self._release(worker)
            raise
        loop = asyncio.get_running_loop()
        asked = loop.run_in_executor(worker.thread, work, worker.reader)
        held = ExitStack() if turn is None else turn.pop_all()

        def done(asked: asyncio.Future[T]) -> None:
            # The reader is free when it has answered, even where nobody waits for that any more.
            self._done(worker, slide, long, asked)
            held.close()

        asked.add_done_callback(done)
        return await asyncio.shield(asked)

    def close(self) -> None:
        """End all readers, once they have answered."""
        for worker in self._workers:
            worker.thread.shutdown(wait=True, cancel_futures=True)
            worker.reader.close()

    async def _take(self, slide: str, client: str) -> _Worker:
        if self._free:
            worker = next((one for one in self._free if slide in one.recent), self._free[0])
            self._free.remove(worker)
            return worker
        if sum(map(len, self._waiting.values())) >= self.config.queued:
            self._make_room(client)
        waiting = _Waiting(slide, asyncio.get_running_loop().create_future())
        self._waiting.setdefault(client, deque()).append(waiting)
        try:
            return await waiting.place
        except asyncio.CancelledError:
            place = waiting.place
            if place.done() and not place.cancelled() and place.exception() is None:
                self._release(place.result())
            self._forget(client, waiting)
            raise

    def _make_room(self, client: str) -> None:
        """Refuse the latest request of the client with most that wait: that of who asks, or this.

        Raises:
            RequestError: ``busy``.
        """
        busy = RequestError("Too many concurrent requests.", code="busy")
        greediest = max(self._waiting, key=lambda one: len(self._waiting[one]), default=client)
        if len(self._waiting.get(greediest, ())) <= len(self._waiting.get(client, ())) + 1:
            raise busy
        latest = self._waiting[greediest][-1]
        self._forget(greediest, latest)
        if not latest.place.done():
            latest.place.set_exception(busy)

    def _forget(self, client: str, waiting: _Waiting) -> None:
        own = self._waiting.get(client, deque())
        if waiting in own:
            own.remove(waiting)
        if not own:
            self._waiting.pop(client, None)

    def _done(self, worker: _Worker, slide: str, long: bool, asked: asyncio.Future[T]) -> None:
        if asked.cancelled():  # the loop ends
            return
        error = asked.exception()
        if isinstance(error, SlideError) and error.code in ("reader_crash", "timeout"):
            worker.recent.clear()  # its process is another now
            self._count(slide, long, error)
        elif error is None:
            self._deaths.pop((slide, long), None)
            worker.note(slide)
        elif isinstance(error, SlideError) and error.code == "too_many_pixels":
            worker.note(slide)
        self._release(worker)

    def _release(self, worker: _Worker) -> None:
        """Give a reader to the client whose turn it is, or keep it for whoever comes."""
        while self._waiting:
            client, own = next(iter(self._waiting.items()))
            while own and own[0].place.done():  # nobody waits for it any more
                own.popleft()
            if own:
                break
            del self._waiting[client]
        else:
            self._free.append(worker)
            return
        self._waiting.move_to_end(client)
        chosen = own[0]
        if chosen.passed < _MOST_PASSED:
            near = (one for one, _ in zip(own, range(_MOST_PASSED), strict=False))
            found = (one for one in near if one.slide in worker.recent and not one.place.done())
            chosen = next(found, chosen)
        for one in own:
            if one is chosen:
                break
            one.passed += 1
        self._forget(client, chosen)
        chosen.place.set_result(worker)

    def _count(self, slide: str, long: bool, error: SlideError) -> None:
        deaths = self._deaths.setdefault((slide, long), _Deaths())
        self._deaths.move_to_end((slide, long))
        while len(self._deaths) > _MOST_KNOWN:
            self._deaths.popitem(last=False)
        deaths.count, deaths.error = deaths.count + 1, error
        if long or deaths.count >= DEATHS:
            deaths.until = time.monotonic() + REFUSED_S

    def _refuse(self, slide: str, long: bool) -> None:
        deaths = self._deaths.get((slide, long))
        if deaths is not None and deaths.error is not None and time.monotonic() < deaths.until:
            error = deaths.error
            raise SlideError(error.message, hint=error.hint, code=error.code)
