"""An ingest that is killed by its own reader.

Actors of Ray are other processes: they learn here that their readers may fail. This is a module,
not a fixture, because they import it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jobs.ingest.embed import Embedder
from pathflip.slides.reader import SlideReader
from tests import failing_reader, faults

FAILURES = "failures"
"""Folder beside the archive, for :mod:`tests.failing_reader`."""


class FailingEmbedder(Embedder):
    """Embedder whose readers fail on some slides."""

    def __init__(self, config: Any, archive: str, *arguments: Any) -> None:
        os.environ[failing_reader.FOLDER] = str(Path(archive).parent / FAILURES)
        SlideReader.program = failing_reader.__name__
        super().__init__(config, archive, *arguments)


def survives_a_kill_on_every_slide(
    run: Callable[[Path], Any], slides: Sequence[str], expected: dict[str, Any], folder: Path
) -> None:
    """Check an ingest whose one embedding worker is killed once on each slide, its reader at work.

    Args:
        run: Function that ingests the slides with :class:`FailingEmbedder` into an archive.
        slides: Names of the three slides.
        expected: Contents of the archive of a run to which nothing happened.
        folder: Folder for the archive and the failures.
    """
    from tests.conftest import content

    failures, archive = folder / FAILURES, folder / "archive"
    with failing_reader.failing(failures, dict.fromkeys(slides, ("read", "kill_actor")), times=1):
        result = run(archive)
    orphans = failing_reader.failed(failures)
    assert {name: len(pids) for name, pids in orphans.items()} == dict.fromkeys(slides, 1)
    assert result.slides == {"ready": 3, "quarantined": 0, "empty": 0, "skipped": 0}
    assert content(archive) == expected
    faults.until(
        lambda: not any(faults.alive(pid) for pids in orphans.values() for pid in pids),
        seconds=10,
        what="readers end",
    )
