"""Zero-shot segmentation of slides: windows in steps, class scores averaged on a 4 µm grid.

At each level a window is a node, moved in steps of a quarter of it. A window's class scores
(softmax of its cosines over τ) are added to every cell it covers and divided by the number of
windows there; the maps of the levels are averaged where they cover the tissue, and a cell is of the
class with the highest score.

Slides are read by rows of square steps, each pixel once a level: windows are put together from the
steps of the last few rows. Only steps that a window with tissue needs are read.

Shapes: C classes, [ny, nx] steps of a level, [H, W] cells of the common grid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pathflip.errors import ConfigError, SlideError
from pathflip.evaluation.patch_text import ENLARGED, PatchReader, softmax
from pathflip.geometry import edge
from pathflip.heatmap import HeatmapGrid, overlay, write_png
from pathflip.slides.reader import SlideReader
from pathflip.slides.tissue import TissueMask

GRID_UM = 4.0
"""Side of a cell of the common grid, µm."""
STEPS = 4
"""Steps a window's side is made of: windows overlap by three quarters."""
MIN_TISSUE = 0.05
"""Smallest share of tissue in a window that is looked at; as for the nodes of trees."""
NONE = 255
"""Value of cells without a class in label maps."""
BATCH_BYTES = 64 << 20
_CELLS = 256
_MIN_PX = 16
"""Smallest side that slides are read in, px."""
_TIMEOUT_S = 120.0
COLOURS = (
    (214, 69, 65), (65, 131, 215), (38, 166, 91), (244, 179, 80), (142, 68, 173), (54, 215, 183),
    (108, 122, 137), (219, 10, 91),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LevelMap:
    """Class scores of a slide at one level, on the grid of its steps.

    Attributes:
        level: The level.
        step_um: Side of a step, µm.
        scores: Mean over the windows there, float32 [C, ny, nx]; 0 where there was none.
        covered: bool [ny, nx], True where a window was.
        windows: Number of windows.
        bad: Number of windows that were left out for damaged pixels.
    """

    level: int
    step_um: float
    scores: NDArray[np.float32]
    covered: NDArray[np.bool_]
    windows: int
    bad: int


@dataclass(frozen=True, kw_only=True)
class Segmentation:
    """Class scores of a slide at all levels.

    Attributes:
        maps: One for each level, coarsest first.
        tissue: Tissue on the common grid, bool [H, W].
        mpp: The slide's level-0 µm/px.
    """

    maps: list[LevelMap]
    tissue: NDArray[np.bool_]
    mpp: float

    def scores(self, index: int) -> NDArray[np.float32]:
        """Return the scores of a class on the common grid [H, W]: the mean over levels there."""
        total = np.zeros(self.tissue.shape, np.float32)
        count = np.zeros(self.tissue.shape, np.float32)
        for one in self.maps:
            # What is left of a slide beyond its last whole step has no score at this level.
            rows, columns = (
                np.floor((np.arange(n) + 0.5) * GRID_UM / one.step_um).astype(np.int64)
                for n in self.tissue.shape
            )
            rows, columns = (
                at[at < n] for at, n in zip((rows, columns), one.covered.shape, strict=True)
            )
            steps, cells = np.ix_(rows, columns), (slice(len(rows)), slice(len(columns)))
            total[cells] += one.scores[index][steps]
            count[cells] += one.covered[steps]
        return np.asarray(total / np.maximum(count, 1), np.float32)

    def labels(self) -> NDArray[np.uint8]:
        """Return the class of each cell [H, W]; :data:`NONE` off tissue and where no window was.

        Among equal scores the first class wins.
        """
        best = np.zeros(self.tissue.shape, np.float32)
        label = np.full(self.tissue.shape, NONE, np.uint8)
        for index in range(len(self.maps[0].scores)):
            scores = self.scores(index)
            better = (scores > best) & self.tissue
            best[better] = scores[better]
            label[better] = index
        return label

    def heat(self, index: int) -> HeatmapGrid:
        """Return the scores of a class as a heatmap, for drawing."""
        scores = self.scores(index).astype(np.float64)
        return HeatmapGrid(
            heat=np.where(self.tissue, scores, 0.0), tissue=self.tissue, column0=0, row0=0,
            patch_um=GRID_UM, mpp=self.mpp,
        )  # fmt: skip

    def only(self, level: int) -> Segmentation:
        """Return the segmentation by one level alone."""
        maps = [one for one in self.maps if one.level == level]
        return Segmentation(maps=maps, tissue=self.tissue, mpp=self.mpp)


def segment_slide(
    path: str,
    reader: PatchReader,
    weights: NDArray[np.float32],
    *,
    tissue: TissueMask,
    width: int,
    height: int,
    slides: SlideReader,
    steps: int = STEPS,
) -> Segmentation:
    """Segment a slide by the words of classes.

    Args:
        path: The slide's file.
        reader: The model.
        weights: Unit class vectors [C, d].
        tissue: The slide's tissue mask, with its level-0 mpp.
        width: Level-0 width, px.
        height: Level-0 height, px.
        slides: Reader of slides, with room for 256 steps; see :func:`slide_reader`.
        steps: Steps a window's side is made of: 4 for windows that overlap by three quarters, 1
            for windows side by side.

    Raises:
        SlideError: It cannot be read, or is too small or too coarse for a window of any level.
    """
    mpp = tissue.slide_mpp
    maps = []
    for level in reader.levels:
        if mpp > ENLARGED * reader.level_mpp[level]:
            continue
        found = _level_map(
            path, reader, weights, level=level, tissue=tissue, width=width, height=height,
            slides=slides, steps=steps,
        )  # fmt: skip
        if found is not None:
            maps.append(found)
    if not maps:
        raise SlideError(
            f"{Path(path).name} has no window of tissue at any level of the model.", code="empty"
        )
    shape = [max(1, int(side * mpp / GRID_UM)) for side in (height, width)]
    lines = [np.arange(n + 1, dtype=np.float64) * (GRID_UM / mpp) for n in shape]
    on = tissue.coverage(lines[1], lines[0]) >= 0.5
    return Segmentation(maps=maps, tissue=on, mpp=mpp)


def slide_reader(reader: PatchReader, *, steps: int = STEPS) -> SlideReader:
    """Return a reader of slides with room for the steps of :func:`segment_slide`.

    Raises:
        ConfigError: A node's side is no whole number of steps of 16 px or more.
    """
    if steps < 1 or reader.node_px % steps or reader.node_px // steps < _MIN_PX:
        raise ConfigError(
            f"A window of {reader.node_px} px cannot be made of {steps} steps.",
            hint="Use 1, 2 or 4.",
        )
    return SlideReader(patches=_CELLS, px=reader.node_px // steps)


def _level_map(
    path: str,
    reader: PatchReader,
    weights: NDArray[np.float32],
    *,
    level: int,
    tissue: TissueMask,
    width: int,
    height: int,
    slides: SlideReader,
    steps: int,
) -> LevelMap | None:
    mpp, step_um = tissue.slide_mpp, reader.field_um(level) / steps
    nx, ny = (int(side * mpp / step_um + 1e-9) for side in (width, height))
    if min(nx, ny) < steps:
        return None
    x, y = (edge(np.arange(n + 1), unit_um=step_um, mpp=mpp) for n in (nx, ny))
    share = tissue.coverage(x.astype(np.float64), y.astype(np.float64))
    kept = _box_sums(share, steps) >= MIN_TISSUE * steps**2  # [ny - steps + 1, nx - steps + 1]
    if not kept.any():
        return None
    total = np.zeros((len(weights), ny, nx), np.float32)
    count = np.zeros((ny, nx), np.float32)
    px, bad = reader.node_px // steps, 0
    held: dict[int, tuple[NDArray[np.uint8], NDArray[np.uint8]]] = {}
    for row in np.flatnonzero(kept.any(axis=1)).tolist():
        wanted = np.flatnonzero(kept[row])
        columns = np.unique((wanted[:, None] + np.arange(steps)).ravel())
        for old in [one for one in held if one < row]:
            del held[old]
        for step in range(row, row + steps):
            # A row that is held may lack steps that only the windows of this row need.
            pixels, ok = held.setdefault(
                step, (np.zeros((nx, px, px, 3), np.uint8), np.full(nx, 2, np.uint8))
            )
            missing = columns[ok[columns] == 2]
            rects = np.stack(
                [x[missing], np.full(len(missing), y[step]), x[missing + 1] - x[missing],
                 np.full(len(missing), y[step + 1] - y[step])], axis=1,
            )  # fmt: skip
            for start in range(0, len(missing), _CELLS):
                part = missing[start : start + _CELLS]
                slides.start_read(
                    path, rects[start : start + _CELLS], mpp=reader.level_mpp[level], px=px,
                    slide_mpp=mpp, timeout_s=_TIMEOUT_S,
                )  # fmt: skip
                read = slides.finish_read(px=px)
                pixels[part], ok[part] = read.pixels, read.ok
        band = [held[step] for step in range(row, row + steps)]
        usable = np.all([ok == 1 for _, ok in band], axis=0)
        whole = np.array([usable[at : at + steps].all() for at in wanted])
        bad += int((~whole).sum())
        for at, scores in _window_scores(wanted[whole], band, reader, weights, level, steps):
            for down in range(steps):
                for right in range(steps):
                    total[:, row + down, at + right] += scores.T
                    count[row + down, at + right] += 1
    return LevelMap(
        level=level,
        step_um=step_um,
        scores=total / np.maximum(count, 1),
        covered=count > 0,
        windows=int(kept.sum()) - bad,
        bad=bad,
    )


def _window_scores(
    wanted: NDArray[np.int64],
    band: Sequence[tuple[NDArray[np.uint8], NDArray[np.uint8]]],
    reader: PatchReader,
    weights: NDArray[np.float32],
    level: int,
    steps: int,
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Yield (first step, class scores [k, C]) of the windows of a row, some at a time."""
    size = max(1, BATCH_BYTES // (reader.node_px**2 * 3))
    for start in range(0, len(wanted), size):
        at = wanted[start : start + size]
        windows = np.stack(
            [
                np.concatenate(
                    [np.concatenate(pixels[one : one + steps], axis=1) for pixels, _ in band]
                )
                for one in at.tolist()
            ]
        )
        vectors = reader.vectors(windows, np.full(len(at), level))
        yield at, softmax(vectors @ weights.T, tau=reader.tau).astype(np.float32)


def _box_sums(values: NDArray[np.float32], side: int) -> NDArray[np.float64]:
    """Return sums over every square of side x side cells."""
    table = np.zeros((values.shape[0] + 1, values.shape[1] + 1))
    table[1:, 1:] = values.astype(np.float64).cumsum(axis=0).cumsum(axis=1)
    return np.asarray(
        table[side:, side:] - table[:-side, side:] - table[side:, :-side] + table[:-side, :-side]
    )


def draw(
    path: str | Path,
    found: Segmentation,
    names: Sequence[str],
    *,
    thumbnail: bytes,
    truth: NDArray[np.uint8] | None = None,
    px: int = 384,
) -> Path:
    """Draw a slide: its thumbnail, the heat of each class, the segmentation, and the truth."""
    import cv2

    decoded = cv2.imdecode(np.frombuffer(thumbnail, np.uint8), cv2.IMREAD_COLOR)
    if decoded is None:
        decoded = np.full((px, px, 3), 255, np.uint8)
    h, w = found.tissue.shape
    scale = px / max(h, w)
    size = (max(1, round(w * scale)), max(1, round(h * scale)))
    picture = np.asarray(
        cv2.cvtColor(cv2.resize(decoded, size, interpolation=cv2.INTER_AREA), cv2.COLOR_BGR2RGB),
        np.uint8,
    )
    panels = [("slide", picture)]
    for index, name in enumerate(names):
        heat = overlay(picture, found.heat(index), mpp=GRID_UM / scale)
        panels.append((name, heat))
    maps = [("segmented", found.labels()), *([("outlined", truth)] if truth is not None else [])]
    for title, labels in maps:
        colours = np.full((*labels.shape, 3), 255, np.uint8)
        for index in range(len(names)):
            colours[labels == index] = COLOURS[index % len(COLOURS)]
        small = cv2.resize(colours, size, interpolation=cv2.INTER_NEAREST)
        panels.append((title, np.asarray(small, np.uint8)))
    titled = []
    for title, panel in panels:
        head = np.full((24, size[0], 3), 255, np.uint8)
        if title in names:
            head[20:] = COLOURS[names.index(title) % len(COLOURS)]  # its colour in the maps
        cv2.putText(head, title[: size[0] // 9], (4, 17), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0),
                    1, cv2.LINE_AA)  # fmt: skip
        titled.append(np.pad(np.concatenate([head, panel]), ((0, 0), (0, 6), (0, 0)),
                             constant_values=255))  # fmt: skip
    return write_png(path, np.concatenate(titled, axis=1))
