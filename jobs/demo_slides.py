"""Slides of the demo: the cohort with its faulty files, their archive, a search by image."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.demo_print import program, quoted, shown
from pathflip.errors import ArchiveError, ConfigError, SlideError
from pathflip.files import replacing
from pathflip.geometry import Tiling

if TYPE_CHECKING:
    from pathflip.archive import Archive
    from pathflip.report.archive import SampleSearch

TRUNCATED, WITHOUT_MPP, GLASS = "truncated.svs", "without-mpp.tif", "glass.svs"
PLANTED = (TRUNCATED, WITHOUT_MPP)
SIZE_UM = 1024.0
RESULTS = 6
QUERY_PX = 360


def make_slides(out: Path, *, cohort: int) -> None:
    """Make the missing ones of the demo's slides in ``out``/slides."""
    from pathflip.progress import Progress, show_progress
    from pathflip.synth import make_cohort, make_slide

    started = time.monotonic()
    with show_progress() as progress:
        make_cohort(
            out,
            slides=cohort,
            size_um=SIZE_UM,
            progress=lambda done, total: progress(
                Progress(what="drawing", done=done, total=total, seconds=time.monotonic() - started)
            ),
        )
    folder = out / "slides"
    made = sorted(path for path in folder.iterdir() if path.name[:1] == "s")
    px = round(SIZE_UM / 0.5)
    if not (folder / GLASS).exists():
        make_slide(folder / GLASS, width=px, height=px, mpp=0.5, layout="aperio", tissue="glass")
    for name, suffix, spoil in ((TRUNCATED, ".svs", _truncate), (WITHOUT_MPP, ".tif", _forget_mpp)):
        _plant(folder / name, next(path for path in made if path.suffix == suffix), spoil)


def _plant(path: Path, source: Path, spoil: Callable[[Path], None]) -> None:
    if path.exists():
        return
    with replacing(path) as copy:
        shutil.copyfile(source, copy)
        spoil(copy)


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 6 // 10)


def _forget_mpp(path: Path) -> None:
    import tifffile

    with tifffile.TiffFile(path, mode="r+") as tiff:
        for page in tiff.pages:
            if isinstance(page, tifffile.TiffPage) and "ResolutionUnit" in page.tags:
                page.tags["ResolutionUnit"].overwrite(1)  # 1: no unit, so a ratio only


def archive_for(out: Path, source: Path) -> Path:
    """Return the archive's path in ``out``; user slides and made ones have separate archives."""
    from pathflip.archive import Archive

    for number in count(1):
        path = out / ("archive" if number == 1 else f"archive-{number}")
        try:
            uris = Archive(path).slides(columns=["uri"])["uri"].to_pylist()
        except ArchiveError as error:
            if error.code == "missing_archive":
                return path
            raise
        if all(Path(uri).is_relative_to(source) for uri in uris):
            return path
    raise AssertionError("count() does not end")


def sample_search(archive: Archive) -> tuple[SampleSearch | None, str]:
    """Search with a picture of a region that stands out; None where that cannot be done.

    Returns:
        The search, and the command that does the same.
    """
    from pathflip.archive.search import search
    from pathflip.encoders import load_encoder
    from pathflip.image_query import ImageQuery, embed_image
    from pathflip.report.archive import SampleSearch
    from pathflip.slides.reader import SlideReader

    name, region = _unusual_region(archive)
    if region is None:
        return None, ""
    row = archive.slide(region["slide_id"])
    tiling = Tiling(**archive.tiling())
    x0, y0, size0 = _tissue_square(archive, region["id"], tiling, mpp=row["mpp"])
    override = row["mpp"] if row["mpp_source"] == "override" else None
    try:
        vector = embed_image(
            ImageQuery(path=Path(row["uri"]), box=(x0, y0, size0, size0)),
            encoder=load_encoder(name),
            tiling=tiling,
            mpp=override,
        )
        with SlideReader(patches=1, px=16) as reader:
            picture = reader.view(
                row["uri"], x0=x0, y0=y0, size0=size0, px=QUERY_PX, slide_mpp=override
            )
    except (ConfigError, SlideError) as error:  # its file is gone or changed since it was ingested
        print(f"No sample search: {error}", file=sys.stderr)
        return None, ""
    sample = SampleSearch(
        title=f"Regions that look like {size0 * row['mpp']:,.0f} µm of {Path(row['uri']).name}, "
        f"at x {x0:,} px, y {y0:,} px, by {name} features",
        results=search(archive, vector, encoder=name, k=RESULTS),
        picture=picture,
    )
    image = shlex.quote(f"{shown(row['uri'])}#{x0},{y0},{size0},{size0}")
    where = quoted(archive.uri)
    return sample, f"{program()} search --archive {where} --image {image} --out results.html"


def _unusual_region(archive: Archive) -> tuple[str, dict[str, Any] | None]:
    """Return an encoder, and of some thousand regions the one least like the rest of its slide."""
    import numpy as np
    import pyarrow.compute as pc

    from pathflip.archive import vectors

    name = next(iter(archive.encoders()))
    _, entry = archive.encoder(name)
    rows = archive.dataset(entry["embeddings_table"]).to_table(
        columns=["id", "slide_id", "n_patches", "vector"],
        filter=pc.field("kind") == "region",
        limit=4096,
    )
    ready = archive.ready_ids(name)
    rows = rows.filter([slide in ready for slide in rows["slide_id"].to_pylist()]).sort_by("id")
    if not len(rows):
        return name, None
    found = vectors(rows["vector"])
    slides = rows["slide_id"].to_numpy()
    distance = np.zeros(len(found))
    for slide in np.unique(slides):
        of_it = slides == slide
        distance[of_it] = np.linalg.norm(found[of_it] - found[of_it].mean(axis=0), axis=1)
    patches = rows["n_patches"].to_numpy()
    distance[patches < 0.75 * patches.max()] = -1  # a fragment differs for being one
    region: dict[str, Any] = rows.slice(int(distance.argmax()), 1).to_pylist()[0]
    return name, region


def _tissue_square(
    archive: Archive, region_id: str, tiling: Tiling, *, mpp: float
) -> tuple[int, int, int]:
    """Return (x0, y0, size0) of a region's largest all-tissue square of patches, level-0 px."""
    import numpy as np
    from numpy.lib.stride_tricks import sliding_window_view

    from pathflip.geometry import patch_rects

    slide_id, _, place = region_id.rpartition("/")
    regions = archive.regions(slide_id, columns=["region_id", "patch_mask"]).to_pylist()
    mask = next(row["patch_mask"] for row in regions if row["region_id"] == region_id)
    kept = np.reshape(mask, (tiling.side, tiling.side)) != 0
    for side in range(tiling.side, 0, -1):
        whole = sliding_window_view(kept, (side, side)).all(axis=(2, 3))
        if whole.any():
            break
    row, col = np.argwhere(whole)[0]
    rx, ry = map(int, place.split("_"))
    rects = patch_rects(tiling, rx=rx, ry=ry, mpp=mpp).reshape(tiling.side, tiling.side, 4)
    x0, y0 = rects[row, col, :2].tolist()
    last_x, last_y, w0, h0 = rects[row + side - 1, col + side - 1].tolist()
    return x0, y0, min(last_x + w0 - x0, last_y + h0 - y0)
