"""Labels of regions from what people drew: the share of a region's area under each class.

The share is of the whole region, on tissue or not; areas are counted in sixteenths of a patch. A
region is labelled by the class with the greatest share, if that is large enough. Regions of slides
on which nothing of the classes was drawn have no row: nobody said that it is not there.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pathflip.errors import ConfigError
from pathflip.files import write_file
from pathflip.geometry import Tiling, edge
from pathflip.interop.annotation_files import is_ignored, polygons_of
from pathflip.interop.annotations import Annotation
from pathflip.slides.tissue import TissueMask

if TYPE_CHECKING:
    from pathflip.archive import Archive
    from pathflip.slides.outlines import Polygon

MIN_SHARE = 0.5
"""Share of its area from which on a region has the label of a class."""
COLUMNS = ("region_id", "slide_id", "patient_id", "rx", "ry", "label", "share")

_FINENESS = 16  # pixels of the mask along a patch
_FORMULA = ("=", "+", "-", "@")


@dataclass(frozen=True, kw_only=True)
class RegionLabel:
    """A region and what was drawn on it.

    Attributes:
        region_id, slide_id, patient_id: The region, its slide and the slide's patient.
        rx, ry: Its place on the grid.
        label: Class with the greatest share, or "" if that is below the least.
        share: That greatest share.
        shares: {class: share of the region's area}, for all classes of the table.
    """

    region_id: str
    slide_id: str
    patient_id: str | None
    rx: int
    ry: int
    label: str
    share: float
    shares: dict[str, float]


def label_regions(
    archive: Archive,
    annotations: Iterable[Annotation],
    *,
    classes: Sequence[str] = (),
    min_share: float = MIN_SHARE,
) -> list[RegionLabel]:
    """Label the regions of the slides that annotations are on.

    Args:
        archive: Archive of the slides; those that are not ready have no regions.
        annotations: Annotations; only areas with a class count.
        classes: Classes to label by, in any case of letters; all that say no "ignore" by default.
        min_share: Least share of a label, above 0 and at most 1.

    Returns:
        A label for each region of a slide with an area of one of the classes, in order of ids.

    Raises:
        ConfigError: ``min_share`` is no such share, or nothing of the classes was drawn
            (``no_annotations``).
    """
    if not 0 < min_share <= 1:
        raise ConfigError("The least share of a label is above 0 and at most 1.", code="min_share")
    wanted = {name.casefold(): name for name in classes}
    drawn: dict[str, dict[str, list[Polygon]]] = {}
    there = set[str]()
    for one in annotations:
        polygons = polygons_of(one.shape.geometry)
        if not polygons or not one.classification:
            continue
        there.add(one.classification)
        name = wanted.get(one.classification.casefold()) if wanted else one.classification
        if name is None or (not wanted and is_ignored(name)):
            continue
        drawn.setdefault(one.slide_id, {}).setdefault(name, []).extend(polygons)
    if not drawn:
        raise ConfigError(
            "No area of these classes was drawn." if classes else "No area with a class was drawn.",
            hint=f"There are areas of: {', '.join(sorted(there))}." if there else "",
            code="no_annotations",
        )
    names = sorted({name for of_slide in drawn.values() for name in of_slide})
    columns = ["slide_id", "patient_id", "width", "height", "mpp"]
    slides = {row["slide_id"]: row for row in archive.slides("ready", columns).to_pylist()}
    tiling = Tiling(**archive.tiling())
    found = []
    for slide_id, of_slide in sorted(drawn.items()):
        if slide_id in slides:
            found += _of_slide(
                archive, slides[slide_id], of_slide, names=names, tiling=tiling, least=min_share
            )
    return found


def _of_slide(
    archive: Archive,
    slide: dict[str, Any],
    drawn: dict[str, list[Polygon]],
    *,
    names: Sequence[str],
    tiling: Tiling,
    least: float,
) -> list[RegionLabel]:
    slide_id, mpp = slide["slide_id"], slide["mpp"]
    regions = archive.regions(slide_id, columns=["region_id", "rx", "ry"]).to_pylist()
    if not regions:
        return []
    rx, ry = (np.array([row[key] for row in regions]) for key in ("rx", "ry"))
    lines = [
        edge(np.arange(at.max() + 2) * tiling.side, unit_um=tiling.patch_um, mpp=mpp)
        for at in (rx, ry)
    ]
    shares = {name: np.zeros(len(regions)) for name in names}
    for name, polygons in drawn.items():
        mask = TissueMask.from_polygons(
            polygons,
            width=slide["width"],
            height=slide["height"],
            slide_mpp=mpp,
            mpp=tiling.patch_um / _FINENESS,
        )
        shares[name] = mask.coverage(*(line.astype(np.float64) for line in lines))[ry, rx]
    found = []
    for number, row in enumerate(regions):
        own = {name: float(shares[name][number]) for name in names}
        best = max(names, key=lambda name: own[name])
        found.append(
            RegionLabel(
                region_id=row["region_id"],
                slide_id=slide_id,
                patient_id=slide["patient_id"],
                rx=row["rx"],
                ry=row["ry"],
                label=best if own[best] >= least else "",
                share=own[best],
                shares=own,
            )
        )
    return found


def write_labels(path: str | Path, labels: Sequence[RegionLabel]) -> None:
    """Write labels as a table, replaced as a whole or not at all: a column of shares a class.

    Raises:
        ConfigError: It cannot be written (``export``).
    """
    names = list(labels[0].shares) if labels else []
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*COLUMNS, *(f"share of {name}" for name in names)])
    for one in labels:
        cells = [getattr(one, key) for key in COLUMNS[:-1]]
        # A spreadsheet would compute what begins like a formula.
        cells = [f"'{c}" if isinstance(c, str) and c.startswith(_FORMULA) else c for c in cells]
        writer.writerow([*cells, *(f"{value:.4f}" for value in (one.share, *one.shares.values()))])
    try:
        write_file(path, out.getvalue())
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror or error}.",
            hint="Give a file in a folder that you may write to.",
            code="export",
        ) from error
