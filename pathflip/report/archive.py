"""Reports of an archive: an overview of its slides, and the results of a search.

The overview has a page for every hundred slides, and their thumbnails in a folder beside it, so
that no page grows with the archive. All other pages are one file each.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from pathflip.archive import Archive
from pathflip.display import data_uri
from pathflip.errors import REASONS, ArchiveError, SlideError
from pathflip.files import write_file
from pathflip.geometry import Tiling, edge, patch_rects
from pathflip.report.page import reported, slide_view, write_page
from pathflip.slides.scale import SCALE_REASONS

if TYPE_CHECKING:
    import pyarrow as pa

    from pathflip.slides.reader import SlideReader

CARD_PX = 480
"""Longer side of the thumbnails in cards."""
PAGE_CARDS = 100
"""Slides of a page."""
LISTED = 200
"""Maximum number of empty or quarantined slides in the tables of the first page."""
REGION_PX = 320
PATCH_PX = 128
MAP_PX = 160


@dataclass(frozen=True, kw_only=True)
class SampleSearch:
    """A search to show in a report.

    Attributes:
        title: Heading of the search.
        results: Results of :func:`pathflip.archive.search.search`.
        picture: The query as JPEG or PNG.
    """

    title: str
    results: pa.Table
    picture: bytes | None = None


def write_report(
    archive: Archive | str,
    path: str | Path,
    *,
    searches: Sequence[SampleSearch] = (),
    title: str = "Slide archive",
    coming: Mapping[str, str] | None = None,
    max_slides: int = 1000,
) -> Path:
    """Write an overview of an archive: totals, failures, searches, a card per slide.

    A page shows ``PAGE_CARDS`` slides; the others follow in files beside it (``report-2.html``, …),
    thumbnails in a folder (``report-files``).

    Args:
        archive: The archive, or its URI.
        path: The first page; replaced whole, after what it shows.
        searches: Searches to show with their results.
        title: Heading of the page.
        coming: {file name: what it shows} of pages that are still to be written beside this one.
        max_slides: Maximum number of slides shown of each status, the newest; totals cover all,
            and ``LISTED`` is the maximum of the empty and of the quarantined.

    Returns:
        The path.

    Raises:
        ArchiveError: The archive cannot be read.
        ConfigError: A file cannot be written.
    """
    archive = Archive(archive) if isinstance(archive, str) else archive
    path = Path(path)
    rows = archive.slides().to_pylist()
    by_status = {
        status: _newest([row for row in rows if row["status"] == status], min(max_slides, most))
        for status, most in (("ready", max_slides), ("empty", LISTED), ("quarantined", LISTED))
    }
    stats = archive.stats()
    ready = by_status["ready"]
    parts = [ready[at : at + PAGE_CARDS] for at in range(0, len(ready), PAGE_CARDS)] or [[]]
    pages = [path.with_stem(f"{path.stem}-{n}" if n > 1 else path.stem)
             for n in range(1, len(parts) + 1)]  # fmt: skip
    of_all = {
        "archive": archive.uri,
        "title": title,
        "status": {status: stats["status"].get(status, 0) for status in by_status},
        "shown": len(ready),
        "pages": [quote(page.name) for page in pages],
    }
    pictures = path.with_name(f"{path.stem}-files")
    for number in range(len(parts), 1, -1):  # the first page comes when all it links to is there
        cards = _cards(archive, parts[number - 1], pictures, first=(number - 1) * PAGE_CARDS)
        write_page("slides.html", pages[number - 1], beside=True, number=number, cards=cards,
                   **of_all)  # fmt: skip
    return write_page(
        "report.html",
        path,
        beside=True,
        number=1,
        stats=stats,
        tiling=archive.tiling(),
        tissue_mm2=sum(row["tissue_mm2"] or 0.0 for row in rows if row["status"] == "ready"),
        source_bytes=sum(max(0, row["bytes"] or 0) for row in rows),
        seconds=sum(row["seconds"] or 0.0 for row in rows),
        bar=_bar([stats["status"].get(status, 0) for status in by_status]),
        last=max((row["ingested_at"] for row in rows if row["ingested_at"]), default=None),
        cards=_cards(archive, parts[0], pictures, first=0),
        empty=[{**row, "picture": _slide_map(archive, row)} for row in by_status["empty"]],
        quarantined=[{**row, **_mend(archive.uri, row)} for row in by_status["quarantined"]],
        searches=[
            {
                "title": search.title,
                "picture": data_uri(search.picture),
                "hits": hits(archive, search.results),
            }
            for search in searches
        ],
        coming={quote(name): shows for name, shows in (coming or {}).items()},
        **of_all,
    )


def write_results(
    archive: Archive | str,
    results: pa.Table,
    path: str | Path,
    *,
    query_picture: bytes | None = None,
    title: str = "Search results",
) -> Path:
    """Write the results of a search with pictures read from the slides.

    Args:
        archive: The archive searched, or its URI.
        results: Results of :func:`pathflip.archive.search.search`: rank, score, slide_id,
            region_id (null for whole slides), x0, y0, size0 (level-0 px), mpp (µm/px).
        path: The HTML file; replaced whole.
        query_picture: The query as JPEG or PNG.
        title: Heading of the page, such as the query.

    Returns:
        The path. A slide that cannot be read is named on the page and costs only its pictures.

    Raises:
        ArchiveError: The archive cannot be read.
        OSError: The file cannot be written.
    """
    archive = Archive(archive) if isinstance(archive, str) else archive
    return write_page(
        "results.html",
        Path(path),
        title=title,
        archive=archive.uri,
        picture=data_uri(query_picture),
        hits=hits(archive, results),
    )


# -- slides ---------------------------------------------------------------------------------------


def _newest(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Return the ``count`` rows ingested last, by name."""
    rows.sort(key=lambda row: (row["ingested_at"] is None, row["ingested_at"]), reverse=True)
    return sorted(rows[:count], key=lambda row: str(row["slide_id"]))


def _cards(
    archive: Archive, rows: Sequence[dict[str, Any]], folder: Path, *, first: int
) -> list[dict[str, Any]]:
    """Return the contents of ready slides' cards; their thumbnails become files in ``folder``."""
    import pyarrow.compute as pc

    from pathflip.archive.schema import PICTURE_COLUMNS

    if not rows:
        return []
    ids = [row["slide_id"] for row in rows]
    pictures = archive.slides(slide_ids=ids, columns=["slide_id", *PICTURE_COLUMNS])
    regions = archive.dataset("regions").to_table(
        columns=["slide_id", *_REGION_COLUMNS], filter=pc.field("slide_id").isin(ids)
    )
    regions = regions.sort_by("region_id")
    return [
        _card(
            {**row, **images},
            regions.filter(pc.field("slide_id") == row["slide_id"]),
            folder / f"{number:04}.jpg",
            tiling=Tiling(**archive.tiling()),
        )
        for number, (row, images) in enumerate(
            zip(rows, pictures.to_pylist(), strict=True), start=first + 1
        )
    ]


_REGION_COLUMNS = (
    "region_id", "rx", "ry", "n_patches", "n_bad", "patch_mask", "patch_blur", "patch_pen",
)  # fmt: skip


def _card(
    row: dict[str, Any], regions: pa.Table, picture: Path, *, tiling: Tiling
) -> dict[str, Any]:
    kept = _matrix(regions["patch_mask"], tiling.slots) != 0
    blur = _matrix(regions["patch_blur"], tiling.slots)[kept]
    pen = _matrix(regions["patch_pen"], tiling.slots)[kept]
    view = slide_view(row, CARD_PX)
    if view is not None:
        with reported(picture):
            picture.parent.mkdir(parents=True, exist_ok=True)
            write_file(picture, view["jpeg"])
        view["uri"] = quote(f"{picture.parent.name}/{picture.name}")
    return {
        **row,
        "view": view,
        "outline": _outline(row, row["width"] / CARD_PX) if view else "",
        "rects": _region_rects(tiling, regions, mpp=row["mpp"]),
        "blur": float(np.median(blur)) if len(blur) else 0.0,
        "pen": float(pen.mean()) if len(pen) else 0.0,
        "penned": int((pen > 0.05).sum()),
    }


def _region_rects(
    cut: Tiling, regions: pa.Table, *, mpp: float
) -> list[tuple[int, int, int, int, str]]:
    """Return (x0, y0, w0, h0, name) of each region, level-0 px, on the grid's own lines."""
    rx, ry = regions["rx"].to_numpy(), regions["ry"].to_numpy()

    def line(index: NDArray[Any]) -> NDArray[np.int64]:
        return edge(index.astype(np.int64) * cut.side, unit_um=cut.patch_um, mpp=mpp)

    x0, y0 = line(rx), line(ry)
    w0, h0 = line(rx + 1) - x0, line(ry + 1) - y0
    names = [
        f"Region {x}_{y}: {count} patches" + (f", {bad} unreadable" if bad else "")
        for x, y, count, bad in zip(
            rx, ry, regions["n_patches"].to_pylist(), regions["n_bad"].to_pylist(), strict=True
        )
    ]
    boxes = np.stack([x0, y0, w0, h0], axis=1).tolist()
    return [(*box, name) for box, name in zip(boxes, names, strict=True)]


def _outline(row: dict[str, Any], tolerance0: float) -> str:
    """Return an SVG path of the tissue in level-0 px, true to ``tolerance0`` px."""
    import cv2

    from pathflip.slides.tissue import TissueMask

    if not row["tissue_png"]:
        return ""
    try:
        mask = TissueMask.from_png(row["tissue_png"], mpp=row["tissue_mpp"], slide_mpp=row["mpp"])
    except ValueError:
        return ""
    parts = []
    for outer, holes in mask.polygons():
        for ring in (outer, *holes):
            points = cv2.approxPolyDP(ring.astype(np.float32)[:, None], max(1.0, tolerance0), True)
            if len(points) > 2:
                flat = np.rint(points[:, 0]).astype(np.int64).tolist()
                parts.append("M" + "L".join(f"{x} {y}" for x, y in flat) + "Z")
    return "".join(parts)


def _slide_map(archive: Archive, row: dict[str, Any]) -> dict[str, Any] | None:
    return slide_view(archive.slide(row["slide_id"]), MAP_PX)


_BY_MPP = "Write its µm per pixel into a CSV with the columns slide,mpp and ingest it again:"
_AGAIN = "then try it again:"
_STEPS = {
    **dict.fromkeys(SCALE_REASONS, _BY_MPP),
    "unreadable": f"Copy the file again from where it was made, {_AGAIN}",
    "too_many_bad_tiles": f"Copy the file again from where it was made, {_AGAIN}",
    "reader_limits": f"Check that it is a slide; convert it if it is one, {_AGAIN}",
    "reader_crash": f"Copy the file again or convert it to a tiled TIFF, {_AGAIN}",
    "worker_crash": f"Use a machine with more memory or a smaller encoder, {_AGAIN}",
    "not_a_file": f"Check the path, the link and the permissions, {_AGAIN}",
    "timeout": f"Check the storage it lies on, {_AGAIN}",
    "out_of_memory": f"Use a machine with more memory or a smaller encoder, {_AGAIN}",
    "bad_features": f"Check the encoder's weights, {_AGAIN}",
    "source_changed": "Wait until the file is at rest and ingest it again:",
    "unsupported": "Convert it to a tiled TIFF and ingest that.",
    "mpp_too_coarse": "Ingest it into an archive that is cut at a coarser tiling.mpp.",
}


def _mend(archive: str, row: dict[str, Any]) -> dict[str, str]:
    """Return the meaning of a quarantined slide's reason, the step that fixes it, its command."""
    reason = row["reason"] or ""
    step = _STEPS.get(reason, f"Mend what the message says, {_AGAIN}")
    target = f"--archive {shlex.quote(archive)}"
    if step == _BY_MPP:
        command = f"pathflip ingest {shlex.quote(row['uri'] or '')} {target} --mpp-csv mpp.csv"
    elif reason == "source_changed":
        command = f"pathflip ingest {shlex.quote(row['uri'] or '')} {target}"
    elif step.endswith(_AGAIN):
        command = f"pathflip slides retry {shlex.quote(row['slide_id'])} {target}"
    else:
        command = ""
    return {"meaning": REASONS.get(reason, ""), "step": step, "command": command}


# -- search results -------------------------------------------------------------------------------


def hits(
    archive: Archive, results: pa.Table, *, px: int = REGION_PX, patches: bool = True
) -> list[dict[str, Any]]:
    """Return results with pictures of them, of their slides and of a patch, as data URIs.

    Args:
        archive: The archive searched.
        results: Results of :func:`pathflip.archive.search.search`.
        px: Side of the pictures of regions.
        patches: Whether to read a patch of each region, too.
    """
    from pathflip.slides.reader import SlideReader

    slides: dict[str, dict[str, Any]] = {}
    regions: dict[str, dict[str, dict[str, Any]]] = {}
    found = []
    with SlideReader(patches=1, px=16) as reader:
        for hit in results.to_pylist():
            slide_id = hit["slide_id"]
            if slide_id not in slides:
                slides[slide_id] = _slide_of(archive, slide_id)
                regions[slide_id] = {}
            row = slides[slide_id]
            hit = {**hit, "name": Path(row["uri"] or slide_id).name, "uri": row["uri"]}
            hit |= {"map": row["map"], "picture": "", "patch": None, "fault": ""}
            if hit.get("region_id"):
                if patches and not regions[slide_id] and not row["fault"]:
                    regions[slide_id] = _regions_of(archive, slide_id)
                patch = _clearest_patch(archive, regions[slide_id].get(hit["region_id"]))
                _read_pictures(reader, row, hit, patch, px=px)
            found.append(hit)
    return found


def _slide_of(archive: Archive, slide_id: str) -> dict[str, Any]:
    """Return a slide's row with its small map and, if its file is faulty, ``fault``."""
    from pathflip.slides.sources import check_ingested

    try:
        row = archive.slide(slide_id)
    except ArchiveError as error:
        return {"uri": "", "map": None, "fault": error.message}
    fault = ""
    try:
        check_ingested(row)
    except SlideError as error:
        fault = error.message
    return {**row, "map": slide_view(row, MAP_PX), "fault": fault}


def _regions_of(archive: Archive, slide_id: str) -> dict[str, dict[str, Any]]:
    columns = ["region_id", "rx", "ry", "mpp", "patch_mask", "patch_tissue", "patch_blur"]
    rows = archive.regions(slide_id, columns=columns).to_pylist()
    return {row["region_id"]: row for row in rows}


def _clearest_patch(archive: Archive, region: dict[str, Any] | None) -> tuple[int, int, int] | None:
    """Return (x0, y0, size0), level-0 px, of a region's patch with most tissue in best focus."""
    if region is None:
        return None
    kept = np.asarray(region["patch_mask"]) != 0
    if not kept.any():
        return None
    score = np.asarray(region["patch_tissue"]) - np.asarray(region["patch_blur"])
    slot = int(np.argmax(np.where(kept, score, -np.inf)))
    tiling = Tiling(**archive.tiling())
    rects = patch_rects(tiling, rx=region["rx"], ry=region["ry"], mpp=region["mpp"])
    x0, y0, w0, h0 = rects[slot].tolist()
    return x0, y0, max(w0, h0)


def _read_pictures(
    reader: SlideReader,
    row: dict[str, Any],
    hit: dict[str, Any],
    patch: tuple[int, int, int] | None,
    *,
    px: int,
) -> None:
    """Fill a hit's pictures; a slide that failed once is not read again."""
    from pathflip.slides.staging import opened

    if not row["fault"]:
        override = row["mpp"] if row["mpp_source"] == "override" else None
        try:
            with opened(row) as path:
                data = reader.view(
                    str(path), x0=hit["x0"], y0=hit["y0"], size0=hit["size0"], px=px,
                    slide_mpp=override,
                )  # fmt: skip
                hit["picture"] = data_uri(data)
                if patch is not None:
                    x0, y0, size0 = patch
                    data = reader.view(
                        str(path), x0=x0, y0=y0, size0=size0, px=PATCH_PX, slide_mpp=override
                    )
                    hit["patch"] = {"uri": data_uri(data), "um": size0 * hit["mpp"]}
        except SlideError as error:
            row["fault"] = error.message
    hit["fault"] = row["fault"]


# -- numbers -------------------------------------------------------------------------------------


def _matrix(column: pa.ChunkedArray, width: int) -> NDArray[Any]:
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return np.asarray(flat).reshape(-1, width)


def _bar(counts: Sequence[int]) -> list[tuple[float, float]]:
    """Return (start, length) of each count in a bar of length 100."""
    total = max(1, sum(counts))
    starts = np.cumsum([0, *counts[:-1]])
    return [(100 * int(a) / total, 100 * n / total) for a, n in zip(starts, counts, strict=True)]
