"""Recovers intact rows of a damaged fragment, in a child process.

Damaged lengths and offsets can make native decoding panic, abort, hang or ask for all memory, so
bytes that failed their digest are never decoded in the caller's process.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from pathflip.archive.schema import intact_rows
from pathflip.archive.storage import is_failure, open_table, rows_per_batch
from pathflip.archive.tables import key_of

_SECONDS = 300
_MEMORY = 16 << 30
_FAILED_READS = 500  # give up the rest of the fragment after so many


def salvage(
    uri: str, table: str, fragment: int
) -> tuple[pa.Table | None, list[tuple[str, str | None]]]:
    """Read a fragment that may be damaged.

    Returns:
        Its rows whose checksum is right (None when nothing could be read), and (key, slide_id) of
        the rows that could be read but whose checksum is wrong.
    """
    with tempfile.TemporaryDirectory(prefix="pathflip-salvage-") as folder:
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
        try:
            subprocess.run(
                [sys.executable, "-m", __name__, uri, table, key_of(table), str(fragment), folder],
                env={**os.environ, "PYTHONPATH": path, "RUST_BACKTRACE": "0"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=_SECONDS,
                check=True,
            )
            bad = json.loads(Path(folder, "bad.json").read_text())
            with pa.OSFile(str(Path(folder, "good.arrow"))) as source:
                good = pa.ipc.open_file(source).read_all()
        except (subprocess.SubprocessError, OSError, ValueError):
            return None, []
    return good, [(str(key), slide) for key, slide in bad]


def _main(uri: str, table: str, key: str, number: int, folder: str) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    dataset = open_table(uri, table)
    fragment = dataset.get_fragment(number)
    step, count = rows_per_batch(dataset.schema), fragment.count_rows()
    bad: list[tuple[Any, Any]] = []
    with (
        pa.OSFile(str(Path(folder, "good.arrow")), "wb") as sink,
        pa.ipc.new_file(sink, dataset.schema) as writer,
    ):
        failed = [0]
        for start in range(0, count, step):
            for rows in _readable(fragment, start, min(start + step, count), failed):
                ok = intact_rows(rows)
                writer.write_table(rows.filter(pa.array(ok)))
                wrong = rows.filter(pa.array(~ok))
                owners = (
                    wrong["slide_id"].to_pylist()
                    if "slide_id" in wrong.column_names
                    else [None] * wrong.num_rows
                )
                bad += zip(wrong[key].to_pylist(), owners, strict=True)
    Path(folder, "bad.json").write_text(json.dumps(bad))


def _readable(fragment: Any, start: int, stop: int, failed: list[int]) -> Iterator[pa.Table]:
    """Yield the rows [start, stop) that can be read, halving ranges that cannot."""
    if failed[0] > _FAILED_READS:
        return
    try:
        rows = fragment.to_table(offset=start, limit=stop - start)
        rows.validate(full=True)
    except BaseException as error:
        if not is_failure(error):
            raise
        failed[0] += 1
        if stop - start > 1:
            middle = (start + stop) // 2
            yield from _readable(fragment, start, middle, failed)
            yield from _readable(fragment, middle, stop, failed)
        return
    yield rows


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5])
