"""Slides as files, for readers of tiles: where they lie, or copies of those in object stores.

A copy is held for a while after it was read, so that the next tile finds it. Copying takes threads
of its own, a few of one client's, and what is only held makes room for what is asked for.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pathflip.errors import SlideError
from pathflip.slides.objects import is_remote
from pathflip.slides.sources import Source, changed, stat_slide
from pathflip.slides.staging import Stage
from serve.limits import RequestError
from serve.slide_files import SlideFile

T = TypeVar("T")

COPIES = 4
"""Slides of object stores that are held as files after they were looked at."""
COPYING, COPYING_OF_CLIENT = 4, 2
"""Slides that are copied at a time, and those of them that one client may have asked for."""
WAITING = 32
"""Slides that may wait to be copied; more are refused."""
COPY_S = 15.0
"""Seconds that a request waits for a copy."""
CHECK_S = 30.0
"""Seconds after which an object is looked at again."""


@dataclass(eq=False)
class _Copy:
    """A copy of a slide, perhaps one that is still being made.

    Attributes:
        made: Its path, and what holds it.
        checked: Time at which its object was last seen to be the same.
        looking: Held by who looks at the object.
        users: Requests that read it or wait for it.
        last: Time at which it was last asked for.
    """

    made: asyncio.Task[tuple[str, ExitStack]]
    checked: float = field(default_factory=time.monotonic)
    looking: asyncio.Lock = field(default_factory=asyncio.Lock)
    users: int = 0
    last: float = field(default_factory=time.monotonic)

    @property
    def idle(self) -> bool:
        return self.made.done() and not self.users


class Copies:
    """Slides as files.

    Args:
        stage: Copies of this machine; by default those of the environment.
    """

    def __init__(self, stage: Stage | None = None) -> None:
        self._stage = stage
        self._held: dict[str, _Copy] = {}
        # A store that is slow must not take the threads of those who look whether a slide is known.
        self._copying = ThreadPoolExecutor(COPYING, thread_name_prefix="copying")
        self._looking = ThreadPoolExecutor(COPYING, thread_name_prefix="looking")
        self._turns: dict[str, asyncio.Semaphore] = {}
        self._short = 0  # copies that wait for room

    @asynccontextmanager
    async def open(self, file: SlideFile, *, client: str = "") -> AsyncIterator[str]:
        """Yield the path of a slide, which stays as long as the block lasts.

        Args:
            file: The slide.
            client: Name of the client who asks.

        Raises:
            SlideError: See :meth:`pathflip.slides.staging.Stage.open`.
            RequestError: ``unavailable``: it is still being copied; ``busy``: too many are.
        """
        if not is_remote(file.uri):
            yield file.uri
            return
        key = file.content
        copy = self._held.get(key)
        if copy is None:
            copy = self._held[key] = self._begin(file, client)
        copy.users += 1
        try:
            path = await self._ready(copy)
            await self._look(copy, file)
            yield path
        finally:
            copy.users -= 1
            copy.last = time.monotonic()
            if copy.idle and self._held.get(key) is not copy:
                await self._let_go(copy)
            await self._drop(0 if self._short else COPIES)

    async def close(self) -> None:
        """Let go of all copies; those that are being made are not waited for."""
        for copy in self._held.values():
            copy.made.cancel()
        await self._drop(0)
        for threads in (self._copying, self._looking):
            threads.shutdown(wait=False, cancel_futures=True)

    def _begin(self, file: SlideFile, client: str) -> _Copy:
        coming = [copy for copy in self._held.values() if not copy.made.done()]
        if len(coming) >= WAITING:
            raise RequestError("Too many slides are being copied; ask again.", code="busy")
        copy = _Copy(made=asyncio.create_task(self._make(file, client)))

        def done(made: asyncio.Task[tuple[str, ExitStack]]) -> None:
            if (made.cancelled() or made.exception()) and self._held.get(file.content) is copy:
                del self._held[file.content]

        copy.made.add_done_callback(done)
        return copy

    async def _ready(self, copy: _Copy) -> str:
        try:
            path, _ = await asyncio.wait_for(asyncio.shield(copy.made), COPY_S)
        except TimeoutError:
            raise RequestError(
                "The slide is being copied from its object store; ask again.", code="unavailable"
            ) from None
        return path

    async def _make(self, file: SlideFile, client: str) -> tuple[str, ExitStack]:
        def enter(wait_s: float) -> tuple[str, ExitStack]:
            stack, stage = ExitStack(), self._stage or Stage()
            opened = stage.open(_source(file), sha256=file.sha256, wait_s=wait_s)
            return str(stack.enter_context(opened).path), stack

        turn = self._turns.setdefault(client, asyncio.Semaphore(COPYING_OF_CLIENT))
        async with turn:
            try:
                return await self._enter(lambda: enter(0))
            except SlideError as error:
                if error.code != "stage_failed":
                    raise
            # What is only held here makes room, now and as soon as it is not read any more.
            self._short += 1
            try:
                await self._drop(0)
                return await self._enter(lambda: enter(COPY_S))
            finally:
                self._short -= 1

    async def _enter(self, enter: Callable[[], tuple[str, ExitStack]]) -> tuple[str, ExitStack]:
        job = self._copying.submit(enter)
        try:
            return await asyncio.wrap_future(job)
        except asyncio.CancelledError:
            job.add_done_callback(_let_go_of)
            raise

    async def _look(self, copy: _Copy, file: SlideFile) -> None:
        """Refuse a copy whose object is another one now, and forget it."""
        async with copy.looking:
            if time.monotonic() - copy.checked <= CHECK_S:
                return
            loop = asyncio.get_running_loop()
            try:
                found = await loop.run_in_executor(self._looking, stat_slide, file.uri)
            except SlideError as error:
                if error.code == "not_a_file":
                    self._forget(copy, file)
                raise
            if found != _source(file):
                self._forget(copy, file)
                raise changed(file.uri)
            copy.checked = time.monotonic()

    def _forget(self, copy: _Copy, file: SlideFile) -> None:
        if self._held.get(file.content) is copy:
            del self._held[file.content]

    async def _drop(self, most: int) -> None:
        """Let go of copies that nobody reads, those read longest ago first."""
        while len(self._held) > most:
            idle = [key for key, copy in self._held.items() if copy.idle]
            if not idle:
                return
            # Taken away before anything is awaited: nobody can begin to read it meanwhile.
            await self._let_go(self._held.pop(min(idle, key=lambda key: self._held[key].last)))

    @staticmethod
    async def _let_go(copy: _Copy) -> None:
        if not copy.made.cancelled() and copy.made.exception() is None:
            await asyncio.to_thread(copy.made.result()[1].close)


def _let_go_of(job: Any) -> None:
    """Let go of a copy for which nobody waits any more, once it is made."""
    with suppress(Exception):
        if not job.cancelled():
            job.result()[1].close()


def _source(file: SlideFile) -> Source:
    return Source(uri=file.uri, bytes=file.bytes, mtime_ns=file.mtime_ns)
