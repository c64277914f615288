"""Makes files for the importers of data sets whose own files they do not read.

Each reader of a set returns :class:`pathflip.datasets.prepared.Prepared`, and :func:`prepare`
writes it. The set itself is never changed; preparing again replaces what was prepared before, but
for slides, which stay.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml

from pathflip.datasets import label_sets, picture_sets, text_sets
from pathflip.datasets.cards import Card
from pathflip.datasets.check import root_of
from pathflip.datasets.prepared import Options, Prepared
from pathflip.errors import ConfigError
from pathflip.files import write_file
from pathflip.progress import Progress, Report
from pathflip.synth.output import write_csv
from pathflip.synth.tiff import write_slide

READERS: dict[str, Callable[[Path, Options], Prepared]] = {
    "bcnb": label_sets.bcnb,
    "cptac": label_sets.cptac,
    "histai-instruct": text_sets.histai_instruct,
    "multipathqa": text_sets.multipathqa,
    "patho-bench": label_sets.patho_bench,
    "quilt-1m": text_sets.quilt_1m,
    "refpath": picture_sets.refpath,
    "slidechat": text_sets.slidechat,
}


def prepare(
    card: Card,
    folder: str | Path,
    out: str | Path,
    *,
    options: Options | None = None,
    dry_run: bool = False,
    progress: Report | None = None,
) -> dict[str, Any]:
    """Write a set as files that importers read.

    Args:
        card: Card of the set.
        folder: The copy.
        out: Folder to write into; made where it is not there.
        options: Choices that the set leaves open.
        dry_run: Only say what would be written.
        progress: Called after each slide.

    Returns:
        {"dataset", "out", "files": {name: rows, tasks, outlines or slides}, "passed": {reason:
        number of rows that are not in the files}}.

    Raises:
        ConfigError: The set is read as it is (``no_prepare``), a file of it is missing or wrong, or
            the folder is one of the set's own.
    """
    options = options or Options()
    source, target = Path(folder).expanduser(), Path(out).expanduser()
    if card.name not in READERS:
        raise ConfigError(
            f"The files of {card.name} are imported as they are.",
            hint=f"See: pathflip datasets show {card.name}",
            code="no_prepare",
        )
    if not source.is_dir():
        raise ConfigError(f"There is no folder {folder}.", hint="Give the folder of the copy.")
    if target.resolve() == source.resolve():
        raise ConfigError(
            f"{out} is the copy itself.", hint="Give a folder of its own with --out."
        )  # fmt: skip
    try:
        made = READERS[card.name](root_of(card, source), options)
    except (OSError, KeyError, ValueError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{folder} cannot be read as {card.name}: {_why(error)}.",
            hint=f"Run pathflip datasets check {card.name} {folder}.",
        ) from error
    if not any(table.rows for table in made.tables.values()):
        passed = ", ".join(f"{reason}: {number}" for reason, number in made.passed.items())
        raise ConfigError(
            f"{folder} has nothing that {card.name} is made of{f' ({passed})' if passed else ''}.",
            hint=f"Run pathflip datasets check {card.name} {folder}.",
        )
    wanted = made.pictures if options.mpp is not None else {}
    files: dict[str, int] = {name: len(table.rows) for name, table in made.tables.items()}
    if made.tasks:
        files["tasks.yaml"] = len(made.tasks)
    if made.outlines:
        files["outlines"] = len(made.outlines)
    if wanted:
        files["slides"] = len(wanted)
    if not dry_run:
        _write(made, target)
        _slides(wanted, target / "slides", mpp=options.mpp or 0.0, progress=progress)
    return {
        "dataset": card.name,
        "out": str(target),
        "files": files,
        "passed": dict(made.passed),
    }


def _why(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"there is no {error.args[0]!r}"
    return (getattr(error, "strerror", None) or str(error)).rstrip(".") + (
        f": {error.filename}" if isinstance(error, OSError) and error.filename else ""
    )


def _write(made: Prepared, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name, table in made.tables.items():
        write_csv(target / name, table.columns, table.rows)
    if made.tasks:
        text = yaml.safe_dump(
            {"templates": "ensemble", "tasks": [dict(task) for task in made.tasks]},
            sort_keys=False, allow_unicode=True, width=10_000,
        )  # fmt: skip
        write_file(target / "tasks.yaml", text)
    if made.outlines:
        (target / "outlines").mkdir(exist_ok=True)
    for stem, polygons in made.outlines.items():
        features = [
            {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": rings},
                "properties": {"objectType": "annotation", "classification": {"name": name}},
            }
            for name, rings in polygons
        ]
        document = {"type": "FeatureCollection", "features": features}
        write_file(target / "outlines" / f"{stem}.geojson", json.dumps(document))


def _slides(
    pictures: dict[str, Path] | Any, target: Path, *, mpp: float, progress: Report | None
) -> None:
    """Write pictures as tiled pyramids of a stated scale; those that are there stay."""
    import time

    start = time.monotonic()
    if pictures:
        target.mkdir(parents=True, exist_ok=True)
    for done, (stem, picture) in enumerate(pictures.items(), start=1):
        path = target / f"{stem}.tif"
        if not path.exists():
            content = np.fromfile(picture, np.uint8)
            pixels = cv2.imdecode(content, cv2.IMREAD_COLOR) if content.size else None
            if pixels is None:
                raise ConfigError(
                    f"{picture} is no picture, or is damaged.", hint="Download it again."
                )  # fmt: skip
            rgbx = np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGBA), np.uint8)
            write_slide(path, rgbx, mpp=mpp, aperio=False)
        if progress is not None:
            progress(
                Progress(
                    what="slides", done=done, total=len(pictures),
                    seconds=time.monotonic() - start,
                )
            )  # fmt: skip
