"""CSV tables of SlideChat: one line a patch, its features in the first columns.

The first line names the columns. SlideChat reads the first 512, which are CONCH's, and nothing
else of a line; so the place of a patch can stand behind them (``x0``, ``y0``, ``size0``, ``mpp``),
and is found here again.
"""

from __future__ import annotations

from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathflip.files import replacing
from pathflip.interop.features.record import FeatureFile, check_shape, reading, unusable

PLACE_COLUMNS = ("x0", "y0", "size0", "mpp")
WIDTH = 512
MAX_NUMBERS = 1 << 28
"""Numbers of a table, 8 bytes each: 400,000 patches of CONCH take 1.6 GB."""
_HEAD = 1 << 20  # bytes of a first line


def read_slidechat(path: Path, slide: str) -> list[FeatureFile]:
    """Return the features in a CSV table of numbers.

    Raises:
        SlideError: It is none (``unsupported``), or damaged (``unreadable``).
    """
    with reading(path), path.open("rb") as file:
        header = file.readline(_HEAD).decode("utf-8-sig").rstrip("\r\n").split(",")
        names = [name.strip().strip('"') for name in header]
        first = file.readline(_HEAD).decode().rstrip("\r\n").split(",")
        n, last = int(first != [""]), b"\n"
        while block := file.read(1 << 20):
            n, last = n + block.count(b"\n"), block[-1:]
        n += last != b"\n"
    width = next((at for at, name in enumerate(names) if name in PLACE_COLUMNS), len(names))
    numeric = all(_is_number(cell) for cell in first[: min(width, WIDTH)])
    numeric = numeric and len(first) == len(names)
    if width < 2 or not (numeric or n == 0):
        raise unusable(path, "is no table of features", code="unsupported")
    check_shape(path, n=n, dim=width)
    if n * len(names) > MAX_NUMBERS:
        raise unusable(
            path,
            f"holds {n:,} lines of {len(names):,} numbers",
            hint=f"A table is read at once: {MAX_NUMBERS:,} numbers at most.",
            code="too_large",
        )
    placed = names[width:] == list(PLACE_COLUMNS)
    width = width if placed else min(width, WIDTH)
    numbers = len(names) if placed else width  # what stands behind may be text
    extra = dict(zip(names[width:], first[width:], strict=True)) if placed and n else {}
    return [
        FeatureFile(
            path=path,
            format="slidechat",
            slide=slide,
            n=n,
            dim=width,
            read=partial(_rows, path, width, numbers, n),
            coordinates=partial(_places, path, width, n) if placed else None,
            size=float(extra["size0"]) if extra else None,
            mpp=float(extra["mpp"]) if extra else None,
            encoder="conch" if width == WIDTH else None,
        )
    ]


def write_slidechat(folder: Path, record: FeatureFile) -> Path:
    """Write ``S.csv``: features, then place and scale of each patch."""
    import pyarrow as pa
    from pyarrow import csv

    target = folder / f"{record.slide}.csv"
    target.parent.mkdir(parents=True, exist_ok=True)
    features = record.read(0, record.n).astype(np.float32)
    places = record.coordinates() if record.coordinates is not None else None
    columns: dict[str, Any] = {str(at): features[:, at] for at in range(record.dim)}
    if places is not None:
        columns |= {
            "x0": places[:, 0].astype(np.int64),
            "y0": places[:, 1].astype(np.int64),
            "size0": np.full(record.n, round(record.size or 0), np.int64),
            "mpp": np.full(record.n, record.mpp or np.nan),
        }
    with replacing(target, one_writer=True) as part:
        options = csv.WriteOptions(quoting_style="none")
        csv.write_csv(pa.table(columns), str(part), write_options=options)
    return target


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


@lru_cache(maxsize=2)
def _table(path: Path, columns: int, numbers: int, stamp: tuple[int, int]) -> NDArray[np.float64]:
    """Read the first columns of a table, which are numbers, once: their text is a multiple."""
    import pyarrow as pa
    from pyarrow import csv

    names = [str(at) for at in range(columns)]
    with reading(path):
        table = csv.read_csv(
            str(path),
            read_options=csv.ReadOptions(column_names=names, skip_rows=1, use_threads=False),
            convert_options=csv.ConvertOptions(
                column_types={name: pa.float64() for name in names[:numbers]},
                include_columns=names[:numbers],
                null_values=["nan", "NaN"],
            ),
        )
        return np.stack([table[name].to_numpy() for name in names[:numbers]], axis=1)


def _all(path: Path, columns: int, numbers: int, n: int) -> NDArray[np.float64]:
    with reading(path):
        about = path.stat()
    found = _table(path, columns, numbers, (about.st_size, about.st_mtime_ns))
    if len(found) != n:
        raise unusable(path, f"has {len(found):,} lines and not {n:,}")
    return found


def _rows(path: Path, width: int, numbers: int, n: int, start: int, stop: int) -> NDArray[Any]:
    with path.open("rb") as file:
        columns = file.readline(_HEAD).count(b",") + 1
    return _all(path, columns, numbers, n)[start:stop, :width]


def _places(path: Path, width: int, n: int) -> NDArray[np.float64]:
    columns = width + len(PLACE_COLUMNS)
    return _all(path, columns, columns, n)[:, width : width + 2]
