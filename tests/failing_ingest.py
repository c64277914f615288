"""An ingest that is killed by its own reader.

Actors of Ray are other processes: they learn here that their readers may fail. This is a module,
not a fixture, because they import it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from jobs.ingest.embed import Embedder
from pathflip.slides.reader import SlideReader
from tests import failing_reader

FAILURES = "failures"
"""Folder beside the archive, for :mod:`tests.failing_reader`."""


class FailingEmbedder(Embedder):
    """Embedder whose readers fail on some slides."""

    def __init__(self, config: Any, archive: str, *arguments: Any) -> None:
        os.environ[failing_reader.FOLDER] = str(Path(archive).parent / FAILURES)
        SlideReader.program = failing_reader.__name__
        super().__init__(config, archive, *arguments)
