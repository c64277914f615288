"""Jobs whose actors are threads of this process: quick, and what is patched here holds for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock


@contextmanager
def in_threads() -> Iterator[None]:
    """Have jobs run on this machine, one actor of each kind, none in a process of its own."""
    with (
        mock.patch("jobs.cluster.connect", return_value="local"),
        mock.patch("jobs.cluster.cpus_here", return_value=1),
        mock.patch("jobs.stages.cpus_here", return_value=1),
        mock.patch("jobs.local._in_thread", return_value=True),
    ):
        yield
