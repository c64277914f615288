"""Zero-shot segmentation of a slide from stored features: no slide is opened.

Each patch of an archive's patch model (``mrplip:RUN``) is of the class with the highest score,
softmax of its cosines over τ. Patches of a class that touch by a side are an area, with a box and
an outline on the lines of the patch grid.

Shapes: N regions, M patch slots, P patches, C classes, [H, W] cells of the patch grid.
"""

from __future__ import annotations

import colorsys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pathflip.errors import ConfigError
from pathflip.evaluation.patch_text import softmax
from pathflip.evaluation.sliding import COLOURS, NONE
from pathflip.geometry import Tiling, edge
from pathflip.heatmap import MIN_PATCHES, Box, heatmap_grid

if TYPE_CHECKING:
    from pathflip.archive import Archive

OPACITY = 0.55
_IDS = uuid.UUID("3f0e4d56-8d0c-5d5e-9d0a-6a4c0c5a2a77")
_Ring = list[tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class Area:
    """Patches of one class that touch by a side.

    Attributes:
        label: The class.
        box: Its bounds; the score is the mean of its patches'.
        rings: Its outline and those of its holes, closed, level-0 px.
    """

    label: str
    box: Box
    rings: list[_Ring]


@dataclass(frozen=True, kw_only=True)
class StoredSegmentation:
    """Classes of a slide's patches.

    Attributes:
        slide: The slide's row in the archive.
        names: The classes.
        labels: Class of each cell of the patch grid [H, W]; 255 where no patch is.
        column0, row0: Grid lines at the left and top of the first cell.
        patch_um: Side of a cell, µm.
        areas: By class, then from top to bottom.
    """

    slide: dict[str, Any]
    names: list[str]
    labels: NDArray[np.uint8]
    column0: int
    row0: int
    patch_um: float
    areas: list[Area]

    def as_json(self) -> dict[str, Any]:
        """Return areas, and each class's share of the patches."""
        counts = np.bincount(self.labels[self.labels != NONE], minlength=len(self.names))
        shares = (counts / max(1, counts.sum())).tolist()
        return {
            "slide_id": self.slide["slide_id"],
            "mpp": self.slide["mpp"],
            "patch_um": self.patch_um,
            "shares": dict(zip(self.names, shares, strict=True)),
            "areas": [{"label": area.label} | area.box.as_json() for area in self.areas],
        }

    def geojson(self) -> dict[str, Any]:
        """Return the areas as annotations for QuPath, which crops to the slide's bounds."""
        x, y = (self.slide[f"bounds_{axis}0"] or 0 for axis in "xy")
        slide_id = self.slide["slide_id"]
        return {
            "type": "FeatureCollection",
            "features": [
                {
                    "type": "Feature",
                    "id": str(uuid.uuid5(_IDS, f"{slide_id}/{area.label}/{area.rings[0]}")),
                    "geometry": {
                        "type": "Polygon",
                        "coordinates": [[[a - x, b - y] for a, b in ring] for ring in area.rings],
                    },
                    "properties": {
                        "objectType": "annotation",
                        "name": area.label,
                        "classification": {
                            "name": area.label,
                            "color": list(_colour(self.names.index(area.label))),
                        },
                        "isLocked": True,
                        "measurements": {"score": area.box.score, "patches": area.box.patches},
                    },
                }
                for area in self.areas
            ],
        }

    def picture(self) -> NDArray[np.uint8]:
        """Draw classes over the thumbnail, with their names below, RGB [h, w, 3].

        Raises:
            ConfigError: The archive has no thumbnail of the slide (``no_thumbnail``).
        """
        import cv2
        import simplejpeg

        data, mpp = self.slide["thumbnail"], self.slide["thumbnail_mpp"]
        if not data or not mpp:
            raise ConfigError(
                f"The archive has no thumbnail of {self.slide['slide_id']}.", code="no_thumbnail"
            )
        picture = np.asarray(simplejpeg.decode_jpeg(data, fastdct=False), np.uint8)
        h, w = self.labels.shape
        row, column = (
            np.floor((np.arange(n) + 0.5) * mpp / self.patch_um).astype(np.int64) - first
            for n, first in zip(picture.shape[:2], (self.row0, self.column0), strict=True)
        )
        inside = ((row >= 0) & (row < h))[:, None] & ((column >= 0) & (column < w))[None]
        label = np.where(
            inside, self.labels[np.ix_(row.clip(0, h - 1), column.clip(0, w - 1))], NONE
        )
        colours = np.array([_colour(i) for i in range(len(self.names))], np.float64)
        on = label != NONE
        drawn = picture.astype(np.float64)
        drawn[on] += OPACITY * (colours[label[on]] - drawn[on])
        legend = np.full((20 * len(self.names) + 4, max(160, picture.shape[1]), 3), 255, np.uint8)
        for i, name in enumerate(self.names):
            legend[4 + 20 * i : 18 + 20 * i, 4:18] = _colour(i)
            cv2.putText(legend, name.encode("ascii", "replace").decode()[:60], (24, 16 + 20 * i),
                        cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA)  # fmt: skip
        wide = np.full((len(picture), legend.shape[1], 3), 255, np.uint8)
        wide[:, : picture.shape[1]] = np.rint(drawn)
        return np.concatenate([wide, legend])


def segment_stored(
    archive: Archive,
    slide: str,
    names: Sequence[str],
    weights: NDArray[np.float32],
    *,
    tau: float,
    encoder: str,
    min_patches: int = MIN_PATCHES,
) -> StoredSegmentation:
    """Segment a slide by the words of classes.

    Args:
        archive: Archive with features of a patch model.
        slide: A ``slide_id`` or unique file name.
        names: The classes.
        weights: Their unit vectors [C, d], see
            :func:`pathflip.evaluation.patch_text.class_weights`.
        tau: Temperature of the scores.
        encoder: The patch model's name in the archive.
        min_patches: Minimum number of patches of an area.

    Raises:
        ArchiveError: The slide is unknown, not ready, or has no features of the model.
    """
    row = archive.slide(slide)
    features, mask, _ = archive.features_array(row["slide_id"], encoder)
    regions = archive.regions(row["slide_id"], columns=["region_id", "rx", "ry"])
    xy = np.stack([regions["rx"].to_numpy(), regions["ry"].to_numpy()], axis=1).astype(np.int64)
    vectors = features[mask].astype(np.float64)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    scores = softmax(vectors @ np.asarray(weights, np.float64).T, tau=tau)
    tiling = Tiling(**archive.tiling())
    heat = np.zeros((2, *mask.shape))
    heat[:, mask] = scores.argmax(axis=1), scores.max(axis=1)
    grids = [heatmap_grid(one, mask, xy, tiling, mpp=row["mpp"]) for one in heat]
    grid = grids[0]
    labels = np.where(grid.tissue, grid.heat, NONE).astype(np.uint8)
    found = StoredSegmentation(
        slide=row, names=list(names), labels=labels, column0=grid.column0, row0=grid.row0,
        patch_um=grid.patch_um, areas=[],
    )  # fmt: skip
    found.areas.extend(_areas(found, grids[1].heat, min_patches=min_patches))
    return found


def _areas(
    found: StoredSegmentation, scores: NDArray[np.float64], *, min_patches: int
) -> list[Area]:
    import cv2

    mpp, areas = found.slide["mpp"], []
    for index, name in enumerate(found.names):
        on = (found.labels == index).astype(np.uint8)
        count, parts, stats, _ = cv2.connectedComponentsWithStats(on, connectivity=4)
        for part in range(1, count):
            left, top, width, height, patches = stats[part].tolist()
            if patches < min_patches:
                continue
            cells = parts[top : top + height, left : left + width] == part
            score = float(scores[top : top + height, left : left + width][cells].mean())
            x = _lines(found.column0 + left, width, found.patch_um, mpp)
            y = _lines(found.row0 + top, height, found.patch_um, mpp)
            box = Box(
                x0=x[0], y0=y[0], w0=x[-1] - x[0], h0=y[-1] - y[0], mpp=mpp, score=score,
                patches=patches,
            )  # fmt: skip
            rings = [[(x[a], y[b]) for a, b in ring] for ring in outline(cells)]
            areas.append(Area(label=name, box=box, rings=rings))
    return areas


def outline(cells: NDArray[np.bool_]) -> list[_Ring]:
    """Trace cells that touch by sides, along grid lines [H, W] -> rings of (column, row) lines.

    The outer ring comes first, then those of holes; each is closed and has only its corners. Rings
    may touch themselves and each other at corners of cells.
    """
    padded = np.pad(cells, 1)
    # Sides of cells, each with the area on its right as y points down: {start: ends}.
    follow: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for (down, right), step in _SIDES.items():
        beside = padded[1 + down :, 1 + right :][: cells.shape[0], : cells.shape[1]]
        for row, column in np.argwhere(cells & ~beside).tolist():
            (a, b), (c, d) = step
            follow.setdefault((column + a, row + b), []).append((column + c, row + d))
    rings = []
    while follow:
        start = min(follow, key=lambda at: (at[1], at[0]))
        ring, at, heading = [start], start, (1, 0)
        while True:
            ends = follow[at]
            # Where four sides meet, turning right stays with the same cell.
            turns = [_turn(heading, (x - at[0], y - at[1])) for x, y in ends]
            end = ends.pop(int(np.argmax(turns)))
            if not ends:
                del follow[at]
            way = (end[0] - at[0], end[1] - at[1])
            if way == heading and len(ring) > 1:
                ring[-1] = end
            else:
                ring.append(end)
            at, heading = end, way
            if at == start:
                break
        rings.append(ring)
    return rings


_SIDES = {
    (-1, 0): ((0, 0), (1, 0)),
    (0, 1): ((1, 0), (1, 1)),
    (1, 0): ((1, 1), (0, 1)),
    (0, -1): ((0, 1), (0, 0)),
}
"""{(down, right) of a neighbour: start and end of the side to it, from the cell's corner}."""


def _turn(heading: tuple[int, int], way: tuple[int, int]) -> int:
    """Return 1 for a turn to the right (y points down), -1 to the left, 0 for straight on."""
    return heading[0] * way[1] - heading[1] * way[0]


def _lines(first: int, count: int, patch_um: float, mpp: float) -> list[int]:
    lines: list[int] = edge(first + np.arange(count + 1), unit_um=patch_um, mpp=mpp).tolist()
    return lines


def _colour(index: int) -> tuple[int, int, int]:
    if index < len(COLOURS):
        return COLOURS[index]
    red, green, blue = colorsys.hsv_to_rgb(index * 0.618 % 1, 0.8, 0.8)
    return round(255 * red), round(255 * green), round(255 * blue)
