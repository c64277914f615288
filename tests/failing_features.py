"""The process that reads features, with HDF5 that fails on files whose names say how."""

from __future__ import annotations

import ctypes
import sys
import time
from pathlib import Path
from typing import Any

from pathflip.interop.features import apart_child, hdf5

_looked, _rows = hdf5.read_hdf5, hdf5.rows


def _fail(path: Path, when: str) -> None:
    if path.stem == f"crash_{when}":
        ctypes.string_at(0)  # SIGSEGV
    if path.stem == f"hang_{when}":
        time.sleep(3600)


def _look(path: Path, slide: str) -> Any:
    _fail(path, "looking")
    return _looked(path, slide)


def _read(path: Path, *arguments: Any) -> Any:
    _fail(path, "reading")
    return _rows(path, *arguments)


if __name__ == "__main__":
    hdf5.read_hdf5, hdf5.rows = _look, _read
    apart_child.main(sys.argv[1:])
