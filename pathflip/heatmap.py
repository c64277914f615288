"""Heatmaps of texts on slides: patch heat on its grid, a map over the thumbnail, boxes.

A model gives one number per patch slot (:meth:`pathflip.models.PathFLIP.ground`).
:func:`heatmap_grid` puts them on the slide's patch grid, :func:`smooth` and :func:`normalise` make
them a map in [0, 1], :func:`overlay` draws it, :func:`find_boxes` cuts out where it is hot, and
:func:`to_geojson` hands both to QuPath.

Grids are [rows, columns] of patches, aligned with the lines of :func:`pathflip.geometry.edge`;
everything that leaves this module is in level-0 px and µm.

Shapes: N regions, M patch slots of each, H rows and W columns of the grid.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pathflip.errors import ConfigError
from pathflip.files import write_file
from pathflip.geometry import Tiling, edge, patch_rects

SIGMA = 1.0
"""Width of the smoothing, patches."""
PERCENTILE = 99.0
"""Percentile of the tissue's heat; values above it are drawn as hottest."""
MIN_PATCHES = 4
MAX_BOXES = 5
_IDS = uuid.UUID("b7b0b1f4-1a50-5c0c-8a6b-0a9a4f5a6d11")


@dataclass(frozen=True, kw_only=True)
class HeatmapGrid:
    """Heat on the patch grid of a slide, cut to the regions that have any.

    Attributes:
        heat: [H, W], 0 off tissue.
        tissue: bool [H, W], True where a patch is.
        column0, row0: Grid lines at the left and top of the first cell.
        patch_um: Side of a cell, µm.
        mpp: The slide's level-0 µm/px.
    """

    heat: NDArray[np.float64]
    tissue: NDArray[np.bool_]
    column0: int
    row0: int
    patch_um: float
    mpp: float


@dataclass(frozen=True, kw_only=True)
class Box:
    """A hot part of a slide.

    Attributes:
        x0, y0, w0, h0: Level-0 px, on patch lines.
        mpp: Level-0 µm/px, for the same in µm.
        score: Heat of its patches, summed; for ``attn`` a share of the slide's.
        patches: Number of patches it is made of; the box may hold others.
    """

    x0: int
    y0: int
    w0: int
    h0: int
    mpp: float
    score: float
    patches: int

    def as_json(self) -> dict[str, Any]:
        """Return the box in px and µm."""
        um = {
            key.replace("0", "_um"): round(getattr(self, key) * self.mpp, 3)
            for key in ("x0", "y0", "w0", "h0")
        }
        return {
            "x0": self.x0,
            "y0": self.y0,
            "w0": self.w0,
            "h0": self.h0,
            "score": self.score,
            **um,
            "patches": self.patches,
        }


def slide_rects(region_xy: NDArray[np.int64], tiling: Tiling, *, mpp: float) -> NDArray[np.int64]:
    """Return (x0, y0, w0, h0) of all slots of regions at (rx, ry), level-0 px [N, M, 4]."""
    rects = [patch_rects(tiling, rx=int(x), ry=int(y), mpp=mpp) for x, y in region_xy]
    return np.stack(rects) if rects else np.zeros((0, tiling.slots, 4), np.int64)


def heatmap_grid(
    heat: ArrayLike,
    mask: ArrayLike,
    region_xy: NDArray[np.int64],
    tiling: Tiling,
    *,
    mpp: float,
) -> HeatmapGrid:
    """Put the heat of patch slots on the slide's grid.

    Args:
        heat: [N, M], any scale.
        mask: bool [N, M], True where a patch is.
        region_xy: Grid position (rx, ry) of the regions [N, 2].
        tiling: Tiling of the slide.
        mpp: The slide's level-0 µm/px.
    """
    heat, mask = np.asarray(heat, np.float64), np.asarray(mask, np.bool_)
    if not mask.any():
        raise ValueError("no patch to draw")
    rows, cols = _cells(region_xy, tiling)
    row0, column0 = int(rows[mask].min()), int(cols[mask].min())
    shape = (int(rows[mask].max()) - row0 + 1, int(cols[mask].max()) - column0 + 1)
    values, tissue = np.zeros(shape), np.zeros(shape, np.bool_)
    values[rows[mask] - row0, cols[mask] - column0] = heat[mask]
    tissue[rows[mask] - row0, cols[mask] - column0] = True
    return HeatmapGrid(
        heat=values,
        tissue=tissue,
        column0=column0,
        row0=row0,
        patch_um=tiling.patch_um,
        mpp=mpp,
    )


def patch_heat(
    grid: HeatmapGrid, mask: ArrayLike, region_xy: NDArray[np.int64], tiling: Tiling
) -> NDArray[np.float64]:
    """Return heat of the kept patches of a grid [P], in the order of ``heat[mask]``."""
    mask = np.asarray(mask, np.bool_)
    rows, cols = _cells(region_xy, tiling)
    found: NDArray[np.float64] = grid.heat[rows[mask] - grid.row0, cols[mask] - grid.column0]
    return found


def smooth(grid: HeatmapGrid, *, sigma: float = SIGMA) -> HeatmapGrid:
    """Blur heat inside the tissue only: a Gaussian mean over the patches that are there.

    Args:
        grid: The heat.
        sigma: Standard deviation, patches; 0 for none.
    """
    if sigma <= 0:
        return grid
    import cv2

    def blur(values: NDArray[np.float64]) -> NDArray[np.float64]:
        size = 2 * max(1, round(4 * sigma)) + 1
        blurred = cv2.GaussianBlur(
            values, (size, size), sigma, sigmaY=sigma, borderType=cv2.BORDER_CONSTANT
        )
        return np.asarray(blurred, np.float64)

    weight = blur(grid.tissue.astype(np.float64))
    heat = np.where(grid.tissue, blur(grid.heat * grid.tissue) / np.maximum(weight, 1e-12), 0.0)
    return replace(grid, heat=heat)


def normalise(grid: HeatmapGrid, *, percentile: float = PERCENTILE) -> HeatmapGrid:
    """Divide heat by a high percentile of the tissue's and clip it to [0, 1].

    A map without heat above zero there (a contrast may subtract it all) becomes 0 everywhere.
    """
    top = float(np.percentile(grid.heat[grid.tissue], percentile))
    if not top > 0:
        top = max(float(grid.heat[grid.tissue].max()), 0.0)
    scaled = np.clip(grid.heat / top, 0, 1) if top > 0 else np.zeros_like(grid.heat)
    return replace(grid, heat=np.where(grid.tissue, scaled, 0.0))


def heat_map(
    grid: HeatmapGrid, *, sigma: float = SIGMA, percentile: float = PERCENTILE
) -> HeatmapGrid:
    """Smooth and normalise heat to [0, 1], for drawing and for boxes."""
    return normalise(smooth(grid, sigma=sigma), percentile=percentile)


def resample(
    grid: HeatmapGrid, *, width: int, height: int, mpp: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Resample heat and tissue to the pixels of a picture of the whole slide, bilinearly.

    Args:
        grid: Heat in [0, 1].
        width: Width of the picture, px.
        height: Height of the picture, px.
        mpp: Resolution of the picture, µm/px; its corner is the slide's.

    Returns:
        heat [height, width] interpolated among patches of tissue only, and the cover of tissue:
        1 where the patch under the pixel is tissue, else 0.
    """
    import cv2

    x = ((np.arange(width) + 0.5) * mpp / grid.patch_um) - grid.column0  # in cells
    y = ((np.arange(height) + 0.5) * mpp / grid.patch_um) - grid.row0
    column, row = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
    rows, columns = grid.tissue.shape
    inside = ((row >= 0) & (row < rows))[:, None] & ((column >= 0) & (column < columns))[None, :]
    cover = grid.tissue[np.clip(row, 0, rows - 1)[:, None], np.clip(column, 0, columns - 1)]
    cover = cover & inside
    at_x = np.broadcast_to(x[None, :] - 0.5, (height, width)).astype(np.float32)
    at_y = np.broadcast_to(y[:, None] - 0.5, (height, width)).astype(np.float32)

    def between(values: NDArray[Any]) -> NDArray[np.float64]:
        pixels = cv2.remap(
            values.astype(np.float32), at_x, at_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT
        )
        return np.asarray(pixels, np.float64)

    weight = between(grid.tissue)
    heat = between(grid.heat * grid.tissue) / np.maximum(weight, 1e-6)
    return np.where(cover, heat, 0.0), cover.astype(np.float64)


def overlay(
    picture: NDArray[np.uint8],
    grid: HeatmapGrid,
    *,
    mpp: float,
    opacity: float = 0.75,
    boxes: Sequence[Box] = (),
) -> NDArray[np.uint8]:
    """Draw heat over a picture of the whole slide; off tissue the picture stays as it is.

    Args:
        picture: RGB [h, w, 3], such as the thumbnail.
        grid: Heat in [0, 1].
        mpp: Resolution of the picture, µm/px.
        opacity: Opacity of the hottest; cold parts are transparent.
        boxes: Boxes to draw as outlines.
    """
    import cv2

    height, width = picture.shape[:2]
    heat, cover = resample(grid, width=width, height=height, mpp=mpp)
    levels = np.rint(heat * 255).astype(np.uint8)
    colours = np.asarray(cv2.applyColorMap(levels, cv2.COLORMAP_TURBO))[..., ::-1]
    alpha = (opacity * heat * cover)[..., None]
    drawn = np.rint(picture * (1 - alpha) + colours * alpha).astype(np.uint8)
    line = max(1, round(max(height, width) / 400))
    for box in boxes:
        scale = box.mpp / mpp
        corner = (round(box.x0 * scale), round(box.y0 * scale))
        other = (round((box.x0 + box.w0) * scale) - 1, round((box.y0 + box.h0) * scale) - 1)
        cv2.rectangle(drawn, corner, other, (255, 255, 255), 2 * line + 1)
        cv2.rectangle(drawn, corner, other, (20, 20, 20), line)
    return drawn


def find_boxes(
    grid: HeatmapGrid,
    *,
    heat: HeatmapGrid | None = None,
    min_patches: int = MIN_PATCHES,
    max_boxes: int = MAX_BOXES,
    share: float = 0.5,
) -> list[Box]:
    """Cut out where heat is above both Otsu's threshold and a share of its maximum.

    Args:
        grid: Heat in [0, 1], see :func:`heat_map`.
        heat: Unsmoothed heat, summed to a box's score; ``grid`` itself by default.
        min_patches: Minimum number of patches, touching by side or corner, of a box.
        max_boxes: Maximum number of boxes, those with the most heat.
        share: Share of the maximum that heat must reach.

    Returns:
        Boxes by falling score.
    """
    import cv2

    values = grid.heat[grid.tissue]
    if not len(values) or not values.max() > 0:
        return []
    threshold = max(otsu(values), share * float(values.max()))
    hot = (grid.tissue & (grid.heat >= threshold)).astype(np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(hot, connectivity=8)
    summed = grid.heat if heat is None else heat.heat
    boxes = []
    for label in range(1, count):
        left, top, width, height, patches = stats[label].tolist()
        if patches < min_patches:
            continue
        x = _lines(grid, grid.column0 + np.array([left, left + width]))
        y = _lines(grid, grid.row0 + np.array([top, top + height]))
        boxes.append(
            Box(
                x0=x[0],
                y0=y[0],
                w0=x[1] - x[0],
                h0=y[1] - y[0],
                mpp=grid.mpp,
                score=float(summed[labels == label].sum()),
                patches=patches,
            )
        )
    boxes.sort(key=lambda box: (-box.score, box.y0, box.x0))
    return boxes[:max_boxes]


def otsu(values: ArrayLike, *, bins: int = 256) -> float:
    """Return the threshold that splits values into two classes of least variance within.

    Args:
        values: In [0, 1], any shape.
        bins: Number of bins of the histogram.

    Returns:
        Middle of the gap's lower bin edge and above: values >= it are the upper class.
    """
    counts, edges = np.histogram(np.asarray(values), bins=bins, range=(0.0, 1.0))
    middle = (edges[1:] + edges[:-1]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    sums = np.cumsum(counts * middle)
    with np.errstate(invalid="ignore", divide="ignore"):
        gap = sums / below - (sums[-1] - sums) / above
        between = np.where((below > 0) & (above > 0), below * above * gap**2, -1.0)
    best = np.flatnonzero(between >= between.max() * (1 - 1e-12))
    return float(edges[1:][int(best[len(best) // 2])]) if between.max() > 0 else 0.0


def patch_list(
    heat: ArrayLike, mask: ArrayLike, rects: NDArray[np.int64]
) -> list[dict[str, float | int]]:
    """Return kept patches as {"x0", "y0", "size0", "heat"}, level-0 px.

    Args:
        heat: [N, M].
        mask: bool [N, M].
        rects: [N, M, 4], see :func:`slide_rects`.
    """
    heat, mask = np.asarray(heat, np.float64), np.asarray(mask, np.bool_)
    return [
        {"x0": x, "y0": y, "size0": max(w, h), "heat": value}
        for (x, y, w, h), value in zip(rects[mask].tolist(), heat[mask].tolist(), strict=True)
    ]


def encode_png(picture: NDArray[np.uint8]) -> bytes:
    """Return an RGB picture as a PNG file."""
    import cv2

    ok, data = cv2.imencode(".png", np.ascontiguousarray(picture[..., ::-1]))
    if not ok:
        raise ValueError(f"a picture of {picture.shape} cannot be written as PNG")
    encoded: bytes = data.tobytes()
    return encoded


def write_png(path: str | Path, picture: NDArray[np.uint8]) -> Path:
    """Write an RGB picture, whole or not at all."""
    return _write(Path(path), encode_png(picture))


def to_geojson(
    *,
    slide_id: str,
    text: str,
    boxes: Sequence[Box],
    rects: NDArray[np.int64] | None = None,
    heat: NDArray[np.float64] | None = None,
    bounds_x0: int = 0,
    bounds_y0: int = 0,
) -> dict[str, Any]:
    """Return boxes (annotations) and patches (tiles with their heat) as QuPath reads them.

    Args:
        slide_id: Goes into ids and metadata; equal input gives an equal document.
        text: Text that was looked for; the class of the boxes.
        boxes: Level-0 px.
        rects: Patches (x0, y0, w0, h0) to return too, level-0 px [k, 4].
        heat: Their heat [k].
        bounds_x0: Left of the slide's bounds, which QuPath crops to; level-0 px.
        bounds_y0: Top likewise.
    """
    shared = {"slide_id": slide_id, "text": text}

    def feature(
        key: str, area: tuple[float, float, float, float], kind: str, **numbers: float
    ) -> dict[str, Any]:
        x, y, w, h = area
        x, y = x - bounds_x0, y - bounds_y0
        ring = [[x, y], [x + w, y], [x + w, y + h], [x, y + h], [x, y]]
        return {
            "type": "Feature",
            "id": str(uuid.uuid5(_IDS, f"{slide_id}/{text}/{key}")),
            "geometry": {"type": "Polygon", "coordinates": [ring]},
            "properties": {
                "objectType": kind,
                "name": text if kind == "annotation" else key,
                "classification": {"name": text, "color": [214, 69, 65]},
                "isLocked": True,
                "measurements": numbers,
                "metadata": shared,
            },
        }

    features = [
        feature(
            f"box {i + 1}",
            (box.x0, box.y0, box.w0, box.h0),
            "annotation",
            score=box.score,
            patches=box.patches,
            area_mm2=box.w0 * box.h0 * box.mpp**2 / 1e6,
        )
        for i, box in enumerate(boxes)
    ]
    if rects is not None and heat is not None:
        features += [
            feature(f"patch {x} {y}", (x, y, w, h), "tile", heat=value)
            for (x, y, w, h), value in zip(rects.tolist(), heat.tolist(), strict=True)
        ]
    return {"type": "FeatureCollection", "features": features}


def write_geojson(path: str | Path, document: dict[str, Any]) -> Path:
    """Write objects for QuPath (:func:`to_geojson`), whole or not at all."""
    data = json.dumps(document, allow_nan=False, separators=(",", ":"))
    return _write(Path(path), data.encode())


def _cells(
    region_xy: NDArray[np.int64], tiling: Tiling
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return row and column of every slot on the slide's patch grid, [N, M] each."""
    row, col = np.divmod(np.arange(tiling.slots), tiling.side)
    return region_xy[:, 1, None] * tiling.side + row, region_xy[:, 0, None] * tiling.side + col


def _lines(grid: HeatmapGrid, index: NDArray[Any]) -> list[int]:
    lines: list[int] = edge(index, unit_um=grid.patch_um, mpp=grid.mpp).tolist()
    return lines


def _write(path: Path, data: bytes) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, data)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror or error}.",
            hint="Give a file in a folder with room that you may write to.",
            code="out",
        ) from error
    return path
