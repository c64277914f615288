"""An ingest that is killed by its own reader, and one whose driver waits to be killed.

Actors of Ray are other processes: they learn here that their readers may fail. This is a module,
not a fixture, because they import it.
"""

from __future__ import annotations

import os
import subprocess
import sys
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


_WAITING = """
import os, signal, sys
from pathflip.archive.commit import Committer
from pathflip.cli import main

said = os.fdopen(os.dup(1), "w")  # with --json all else goes to stderr
before, upsert = int(sys.argv.pop(1)), Committer.upsert
done = []

def waiting(self, table, rows):
    if table == "slides":
        done.append(rows)
        if len(done) > before:
            print("waiting", file=said, flush=True)
            os.kill(os.getpid(), signal.SIGSTOP)
    return upsert(self, table, rows)

Committer.upsert = waiting
main()
"""


def waiting_ingest(*words: str, commits: int) -> subprocess.Popen[str]:
    """Start ``pathflip ingest`` that makes some commits and stops in the next, all but done.

    It prints a line before: the rows of the slides are all that is missing. All of its threads
    stand still then, so its actors have work left and stay.
    """
    return subprocess.Popen(
        [sys.executable, "-c", _WAITING, str(commits), "ingest", *words],
        cwd=faults.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
