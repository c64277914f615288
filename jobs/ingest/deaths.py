"""Counts the workers that a slide kills, so that it is left out in the end.

Ray starts an actor that died again and gives it the same chunk, for ever: a slide on which an
encoder takes more memory than there is, or aborts, would hold up the whole job. The process that
dies cannot count; one small actor does.
"""

from __future__ import annotations

import os
import uuid
from collections import Counter
from collections.abc import Callable
from typing import Any

from pathflip.errors import SlideError


class Deaths:
    """Workers that died, by slide; one for the whole job, shared by its workers.

    A chunk that begins again though its end was never told was being worked on by one that died.
    Deaths on other chunks of the slide are seen when those begin again.
    """

    def __init__(self) -> None:
        self._running: dict[tuple[str, int], str] = {}
        self._deaths: Counter[str] = Counter()

    def begin(self, slide_id: str, chunk: int, worker: str) -> int:
        """Note that a worker begins on a chunk; return how many died on its slide."""
        before = self._running.get((slide_id, chunk), worker)
        self._deaths[slide_id] += before != worker
        self._running[slide_id, chunk] = worker
        return self._deaths[slide_id]

    def end(self, slide_id: str, chunk: int) -> None:
        """Note that a chunk is done, or was given up."""
        self._running.pop((slide_id, chunk), None)


class DeathCount:
    """A worker's side of :class:`Deaths`.

    Args:
        deaths: Calls a method of the job's :class:`Deaths`; None where nothing is counted.
        limit: Deaths after which a slide is left out.
    """

    def __init__(self, deaths: Callable[..., Any] | None, *, limit: int) -> None:
        self._deaths, self._limit = deaths, limit
        self._worker = f"{os.getpid()}-{uuid.uuid4().hex}"

    def begin(self, slide_id: str, chunk: int, *, name: str) -> None:
        """Begin on a chunk.

        Raises:
            SlideError: Too many workers died on its slide (``worker_crash``).
        """
        if self._deaths is None:
            return
        died = self._deaths("begin", slide_id, chunk, self._worker)
        if died >= self._limit:
            self.end(slide_id, chunk)
            raise SlideError(
                f"{died} worker processes died while they worked on {name}: killed, or out of "
                "memory.",
                hint="See the memory of the machine and the encoder's; then pathflip slides retry.",
                code="worker_crash",
            )

    def end(self, slide_id: str, chunk: int) -> None:
        """End work on a chunk."""
        if self._deaths is not None:
            self._deaths("end", slide_id, chunk)
