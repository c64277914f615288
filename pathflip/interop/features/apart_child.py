"""The process of :mod:`pathflip.interop.features.apart`, which starts it."""

from __future__ import annotations

import mmap
import socket
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from pathflip.errors import ConfigError
from pathflip.interop.features import find, slide_files
from pathflip.interop.features.apart import TABLES
from pathflip.interop.features.record import FeatureFile, unusable
from pathflip.slides.reader_child import Answer, Operations, confine, serve

MEMORY_LIMIT_BYTES = 6 << 30
"""Address space beside the shared memory. A table of SlideChat's, which is read at once, takes
twice the 2 GB that its numbers may have."""
_FACTS = tuple(one.name for one in fields(FeatureFile) if one.name not in ("path", "read", *TABLES))


class FeatureChild:
    """Answers requests one by one, keeping what the last file holds.

    Args:
        memory: Memory shared with the owner, for features.
    """

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self._key: tuple[Any, ...] = ()
        self._records: list[FeatureFile] = []

    def features(self, request: dict[str, Any], _: list[bytes]) -> Answer:
        """Answer ``apart.read_features``."""
        records = []
        for one in self._all(request):
            facts = {name: getattr(one, name) for name in _FACTS}
            facts["notes"] = {name: _plain(value) for name, value in one.notes.items()}
            held = [what for what in TABLES if getattr(one, what) is not None]
            records.append({"facts": facts, "tables": held})
        return {"records": records}, []

    def rows(self, request: dict[str, Any], _: list[bytes]) -> Answer:
        """Answer ``FeatureFile.read``: rows into the shared memory."""
        record = self._one(request)
        values = np.asarray(record.read(request["start"], request["stop"]))
        if values.dtype.kind not in "fiu" or values.nbytes >= len(self._memory):
            raise unusable(record.path, f"gave {values.shape} numbers of the kind {values.dtype}")
        out = np.frombuffer(self._memory, values.dtype, values.size)
        out.reshape(values.shape)[...] = values
        return {"dtype": values.dtype.str, "shape": values.shape}, []

    def table(self, request: dict[str, Any], _: list[bytes]) -> Answer:
        """Answer one of a record's small tables."""
        read = getattr(self._one(request), request["what"]) if request["what"] in TABLES else None
        values = None if read is None else read()
        if values is None:
            return {"shape": None}, []
        return {"shape": values.shape}, [np.ascontiguousarray(values, np.float64).tobytes()]

    def vectors(self, request: dict[str, Any], _: list[bytes]) -> Answer:
        """Answer ``apart.read_vectors``."""
        try:
            found = slide_files.read_file(Path(request["path"]), request["slide"])
        except ConfigError as error:
            wrong = {"message": error.message, "hint": error.hint, "code": error.code}
            return {"wrong": wrong}, []
        facts = [
            ({"slide": one.slide, "encoder": one.encoder, "one_row": one.one_row}, dtype)
            for one in found
            if (dtype := one.vector.dtype.str)
        ]
        return {"vectors": facts}, [np.ascontiguousarray(one.vector).tobytes() for one in found]

    def _all(self, request: dict[str, Any]) -> list[FeatureFile]:
        """Return the records of a request's file, from the last one if it is the same still."""
        path = Path(request["path"])
        key: tuple[Any, ...] = ()
        try:
            found = path.stat()
            key = (path, request["slide"], found.st_size, found.st_mtime_ns, found.st_ino)
        except OSError:
            pass
        if not key or key != self._key:
            self._key, self._records = (), []
            self._records, self._key = find.read_file(path, request["slide"]), key
        return self._records

    def _one(self, request: dict[str, Any]) -> FeatureFile:
        records, at = self._all(request), int(request["record"])
        if at < len(records) and (records[at].n, records[at].dim) == (request["n"], request["dim"]):
            return records[at]
        raise unusable(Path(request["path"]), "has changed since it was looked at")


def _plain(value: Any) -> Any:
    """Return a fact as JSON can say it."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def main(arguments: list[str]) -> None:
    """Run the child: arguments are the socket, the shared memory and its size."""
    connection, memory, size = (int(argument) for argument in arguments)
    confine(MEMORY_LIMIT_BYTES + size)
    shared = memoryview(mmap.mmap(memory, size))
    child = FeatureChild(shared)
    operations: Operations = {
        "features": child.features,
        "rows": child.rows,
        "table": child.table,
        "vectors": child.vectors,
    }
    serve(socket.socket(fileno=connection), shared, operations)


if __name__ == "__main__":
    main(sys.argv[1:])
