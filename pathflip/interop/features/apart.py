"""Reads files of features in a process of their own, one for each thread that reads.

HDF5, and whatever else takes such files apart, can abort, hang or allocate without bound on a
damaged or hostile one, and no Python exception catches that. So the process has a limit to its
memory and a deadline for each answer, is replaced when it breaks one, and what it was asked of is
the one file that is refused. Answers are JSON and plain numbers, features lie in memory shared with
it: nothing is pickled.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pathflip.errors import ConfigError, SlideError
from pathflip.interop.features.record import FeatureFile, SlideVector
from pathflip.progress import Progress, Report
from pathflip.slides.reader_process import ReaderProcess

T = TypeVar("T")

PROGRAM = "pathflip.interop.features.apart_child"
"""Module that the process runs."""
MEMORY_BYTES = 256 << 20
"""Shared memory of a process, which holds the features of one reading."""
TIMEOUT_S = 120.0
"""Time for one answer: at 1 MB/s, the slowest storage that still is one, most readings take 64."""
TABLES = ("coordinates", "quality", "regions")
_WIDEST = 16  # bytes of a number


class _Reader:
    """The process of a thread, which ends with it."""

    def __init__(self) -> None:
        self.process = ReaderProcess(PROGRAM, memory_bytes=MEMORY_BYTES)
        weakref.finalize(self, self.process.close)


_here = threading.local()


def read_features(path: Path, slide: str) -> list[FeatureFile]:
    """Return the records of a file (see ``find.read_file``), whose numbers are read apart as well.

    Raises:
        SlideError: The file cannot be used, or broke the process (``reader_crash``, ``timeout``).
    """
    about = {"path": str(path), "slide": slide}
    answer, _ = _process().ask({"op": "features", **about}, TIMEOUT_S)
    return [_record(about | {"record": at}, one) for at, one in enumerate(answer["records"])]


def read_vectors(path: Path, slide: str) -> list[SlideVector]:
    """Return the vectors of a file (see ``slide_files.read_file``).

    Raises:
        SlideError: The file cannot be used, or broke the process (``reader_crash``, ``timeout``).
        ConfigError: Its vectors are of patients.
    """
    asked = {"op": "vectors", "path": str(path), "slide": slide}
    answer, blobs = _process().ask(asked, TIMEOUT_S)
    if (wrong := answer.get("wrong")) is not None:
        raise ConfigError(wrong["message"], hint=wrong["hint"], code=wrong["code"])
    return [
        SlideVector(path=path, vector=np.frombuffer(blob, dtype), **facts)
        for (facts, dtype), blob in zip(answer["vectors"], blobs, strict=True)
    ]


def read_each(
    paths: Sequence[Path],
    read: Callable[[Path], list[T]],
    *,
    what: str,
    problems: dict[str, SlideError],
    progress: Report | None,
) -> Iterator[tuple[Path, list[T]]]:
    """Yield files with what is read of each; those that cannot be used go to ``problems``.

    Args:
        paths: The files.
        read: :func:`read_features` or :func:`read_vectors`, of a path.
        what: Name of the work, for its progress.
        problems: Takes {path: reason}.
        progress: Progress callback.
    """
    started = time.monotonic()
    for number, path in enumerate(paths):
        try:
            made = read(path)
        except SlideError as error:
            problems[str(path)] = error
            continue
        yield path, made
        if progress is not None:
            progress(
                Progress(
                    what=what,
                    done=number + 1,
                    total=len(paths),
                    seconds=time.monotonic() - started,
                    unit="files",
                )
            )


def close() -> None:
    """End the process of this thread, if it has one."""
    if (reader := getattr(_here, "reader", None)) is not None:
        del _here.reader
        reader.process.close()


def _process() -> ReaderProcess:
    if getattr(_here, "reader", None) is None:
        _here.reader = _Reader()
    process: ReaderProcess = _here.reader.process
    return process


def _record(about: Mapping[str, Any], answer: dict[str, Any]) -> FeatureFile:
    facts: dict[str, Any] = answer["facts"]
    if facts["extent"] is not None:
        facts["extent"] = tuple(facts["extent"])
    asked = {**about, "n": facts["n"], "dim": facts["dim"]}
    tables: dict[str, Any] = {what: partial(_table, asked, what) for what in answer["tables"]}
    return FeatureFile(path=Path(about["path"]), **facts, **tables, read=partial(_rows, asked))


def _rows(asked: Mapping[str, Any], start: int, stop: int) -> NDArray[Any]:
    """Read rows; those of one reading lie in the shared memory, more are copied from it."""
    most = max(1, MEMORY_BYTES // (_WIDEST * max(1, asked["dim"])))
    if stop - start > most:
        parts = [_rows(asked, at, min(at + most, stop)).copy() for at in range(start, stop, most)]
        return np.concatenate(parts)
    process = _process()
    request = {"op": "rows", **asked, "start": start, "stop": stop}
    answer, _ = process.ask(request, TIMEOUT_S)
    shape = tuple(answer["shape"])
    count = int(np.prod(shape, dtype=object))
    return np.frombuffer(process.memory, answer["dtype"], count).reshape(shape)


def _table(asked: Mapping[str, Any], what: str) -> NDArray[np.float64] | None:
    answer, blobs = _process().ask({"op": "table", **asked, "what": what}, TIMEOUT_S)
    if answer["shape"] is None:
        return None
    return np.frombuffer(blobs[0], np.float64).reshape(answer["shape"])
