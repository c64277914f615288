"""The process of one command: the memory and imports that a short answer can do without.

Nothing here changes what a command says. Only a process that is the command and nothing else is
touched (:func:`own_process`): a notebook or a test that calls :func:`pathflip.cli.main` is not.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from pathflip.imports import without_pandas

ALLOCATIONS = 100_000
"""Objects between two collections of garbage. Imports make a million and no garbage: Python's own
700 cost ``pathflip ask`` 0.5 of 6.0 CPU seconds (27 November 2026)."""

_own = _answers = False


@contextmanager
def own_process() -> Iterator[None]:
    """Treat the process as that of one command, which ends with it.

    A command that opened an archive to answer (:func:`open_archive`) leaves without Python taking
    every module apart first, which cost ``pathflip ask`` 1.1 of 6.0 CPU seconds. Functions that
    were registered for the end run, and output is written. Jobs end as any process does.
    """
    global _own
    _own = True
    gc.set_threshold(ALLOCATIONS, 10, 10)
    try:
        yield
    except SystemExit as end:
        others = (
            thread for thread in threading.enumerate() if thread is not threading.main_thread()
        )
        if _answers and isinstance(end.code, int) and all(thread.daemon for thread in others):
            atexit._run_exitfuncs()
            with suppress(OSError):  # a closed pipe: Python says so, and exits as it always does
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(end.code)
        raise


def open_archive(uri: str) -> Any:
    """Open an archive for a command that answers in this process, without Ray.

    No such command has any use for pandas (:func:`pathflip.imports.without_pandas`).
    """
    global _answers
    _answers = True
    import_arrow()
    from pathflip import Archive

    return Archive(uri)


def import_arrow() -> None:
    """Import Arrow, and no pandas, into the process of a command."""
    if _own and "pandas" not in sys.modules:
        with without_pandas():
            import pyarrow  # noqa: F401


@contextmanager
def absent(*packages: str) -> Iterator[None]:
    """Let ``transformers`` find packages absent that it would import and no command uses.

    It offers decoding methods that need scikit-learn and losses that need SciPy, and imports both
    wherever they are installed: 640 modules, 1.1 CPU seconds. accelerate imports
    boto3 for SageMaker, and PyTorch Triton to compile for a GPU: 240 modules, 0.25 CPU seconds.

    Args:
        packages: Packages; those imported already stay.
    """
    hidden = [name for name in packages if _own and name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # Python's own mark of an absent module
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
