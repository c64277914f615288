"""Where a slide has tissue, and how good its patches look.

The mask is made once a slide from the slide resampled to 8 µm per pixel. It says which patches to
embed, so it leaves out glass, scanner fill and marker ink and keeps holes. The scores of
:func:`patch_quality` are stored beside every patch and filtered on at use; nothing is deleted
because of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from pathflip.errors import ConfigError
from pathflip.interop.qupath import Polygon, read_geojson

OD_STEPS = 200.0
"""Optical density is held in bytes, this many to the unit: 0 to 1.275."""
BLACK = 50
"""Neutral pixels darker than this are scanner fill or black ink, not tissue."""
BLUR_SHARP, BLUR_LOST = 0.20, 0.08
"""Detail ratios scored 0 and 1; see :func:`patch_quality` for how they were found."""


@dataclass(frozen=True, kw_only=True)
class TissueConfig:
    """How tissue is found.

    Attributes:
        mpp: Resolution of the mask, µm/px.
        smoothing_um: Sigma of the Gaussian put on optical density before thresholding, µm.
        min_area_um2: Smaller pieces of tissue are dropped, µm².
        min_hole_um2: Smaller holes are filled, µm².
        min_od: Lowest threshold Otsu's method may choose, so that glass alone has no tissue.
            Natural-log optical density of the darkest channel above the slide's own glass.
        max_od: Highest threshold, so that pale tissue beside dark is kept.
        max_ink_share: If more than this share of what is not glass looks like ink, it is taken
            for a blue or green stain and kept.

    Raises:
        ConfigError: A field is out of range.
    """

    mpp: float = 8.0
    smoothing_um: float = 8.0
    min_area_um2: float = 10_000.0
    min_hole_um2: float = 10_000.0
    min_od: float = 0.07
    max_od: float = 0.10
    max_ink_share: float = 0.5

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mpp) and self.mpp > 0):
            raise ConfigError(
                f"tissue mpp is {self.mpp}.", hint="Give a positive number of µm.", code="tissue"
            )
        for name in ("smoothing_um", "min_area_um2", "min_hole_um2", "max_ink_share"):
            if not getattr(self, name) >= 0:
                raise ConfigError(
                    f"tissue {name} is {getattr(self, name)}.",
                    hint="Give 0 or more.",
                    code="tissue",
                )
        if not 0 < self.min_od <= self.max_od < 255 / OD_STEPS:
            raise ConfigError(
                f"tissue thresholds are {self.min_od} to {self.max_od}.",
                hint=f"Give 0 < min_od <= max_od < {255 / OD_STEPS}.",
                code="tissue",
            )


@dataclass(frozen=True)
class TissueMask:
    """Tissue of one slide.

    Pixel (row i, column j) is the square that begins ``j * mpp`` µm right of and ``i * mpp`` µm
    below level-0 (0, 0), so frames convert by a factor alone.

    Attributes:
        mask: True on tissue [h, w].
        mpp: µm per pixel of the mask.
        slide_mpp: The slide's level-0 µm/px.
    """

    mask: NDArray[np.bool_]
    mpp: float
    slide_mpp: float

    def __post_init__(self) -> None:
        if self.mask.ndim != 2 or self.mask.dtype != np.bool_ or not self.mask.size:
            raise ValueError(f"mask is {self.mask.dtype} {self.mask.shape}, must be bool [h, w]")
        if not (self.mpp > 0 and self.slide_mpp > 0):
            raise ValueError(f"mpp {self.mpp} and slide_mpp {self.slide_mpp} must be positive")

    @property
    def area_mm2(self) -> float:
        """Tissue area, mm²."""
        return int(np.count_nonzero(self.mask)) * self.mpp**2 / 1e6

    def coverage(
        self, x_edges0: NDArray[np.float64], y_edges0: NDArray[np.float64]
    ) -> NDArray[np.float32]:
        """Exact share of tissue in each cell of a grid.

        Args:
            x_edges0: Ascending vertical lines, level-0 px, fractions allowed [nx + 1].
            y_edges0: Ascending horizontal lines likewise [ny + 1].

        Returns:
            Tissue area over cell area, 0 to 1 [ny, nx]; beyond the mask there is none.

        Raises:
            ValueError: Lines do not ascend.
        """
        h, w = self.mask.shape
        x = np.asarray(x_edges0, np.float64) * (self.slide_mpp / self.mpp)
        y = np.asarray(y_edges0, np.float64) * (self.slide_mpp / self.mpp)
        if (np.diff(x) <= 0).any() or (np.diff(y) <= 0).any():
            raise ValueError("grid lines must ascend")
        # Sum down each column between two lines, then along the few rows that leaves: a table of
        # sums over the whole mask would be eight times its size.
        bands = _sums_between_rows(self.mask, np.clip(y, 0, h))
        table = np.zeros((len(bands), w + 1))
        np.cumsum(bands, axis=1, out=table[:, 1:])
        at = np.clip(x, 0, w)
        whole = np.minimum(at.astype(np.int64), w - 1)
        sums = table[:, whole] + (at - whole) * bands[:, whole]
        area = np.diff(y)[:, None] * np.diff(x)[None, :]
        share: NDArray[np.float32] = np.clip(np.diff(sums, axis=1) / area, 0, 1).astype(np.float32)
        return share

    def to_png(self) -> bytes:
        """The mask as a one-bit PNG."""
        ok, data = cv2.imencode(
            ".png", self.mask.view(np.uint8) * np.uint8(255), [cv2.IMWRITE_PNG_BILEVEL, 1]
        )
        if not ok:
            raise ValueError("mask cannot be written as PNG")
        return bytes(data.tobytes())

    @classmethod
    def from_png(cls, data: bytes, *, mpp: float, slide_mpp: float) -> TissueMask:
        """The inverse of :meth:`to_png`. Raises ValueError if ``data`` is no image."""
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE) if data else None
        if image is None:
            raise ValueError("tissue mask is not a PNG")
        return cls(image > 127, mpp, slide_mpp)

    def polygons(self) -> list[Polygon]:
        """Outlines of the tissue, following pixel edges, in level-0 px.

        Each polygon is valid in the sense of OGC: simple rings, touching at points at most. Filling
        them gives back the mask exactly.

        Returns:
            (outer ring [k, 2], holes [[m, 2], ...]) of each piece joined along pixel sides.
        """
        return [
            (outer * (self.mpp / self.slide_mpp), [h * (self.mpp / self.slide_mpp) for h in holes])
            for outer, holes in _outlines(self.mask)
        ]

    @classmethod
    def from_geojson(
        cls,
        path: str | Path,
        *,
        width: int,
        height: int,
        slide_mpp: float,
        mpp: float = TissueConfig.mpp,
        bounds_x0: int = 0,
        bounds_y0: int = 0,
    ) -> TissueMask:
        """The user's own annotation as tissue.

        All polygons of annotations together; if the file has none, all polygons. A pixel is
        tissue if its centre is inside.

        Args:
            path: GeoJSON, see ``pathflip.interop.qupath.read_geojson``.
            width: Level-0 width, px.
            height: Level-0 height, px.
            slide_mpp: Level-0 µm/px.
            mpp: µm per pixel of the mask.
            bounds_x0: Left of the slide's bounds, level-0 px; see ``pathflip.interop.qupath``.
            bounds_y0: Top likewise.

        Raises:
            ConfigError: Not GeoJSON, no polygon in it, or none on the slide.
        """
        objects = read_geojson(path, bounds_x0=bounds_x0, bounds_y0=bounds_y0)
        objects = [one for one in objects if one.polygons]
        annotations = [one for one in objects if one.object_type == "annotation"]
        polygons = [polygon for one in annotations or objects for polygon in one.polygons]
        if not polygons:
            raise ConfigError(
                f"{path} holds no polygon.",
                hint="Export annotations that are areas, not points or lines.",
                code="geojson",
            )
        if all(
            (outer.max(axis=0) <= 0).any() or (outer.min(axis=0) >= (width, height)).any()
            for outer, _ in polygons
        ):
            raise ConfigError(
                f"No polygon of {path} lies on the slide of {width} x {height} px.",
                hint="Check that it belongs to this slide and is in full-resolution pixels.",
                code="geojson",
            )
        ratio = mpp / slide_mpp
        mask = _fill(polygons, scale=ratio, h=math.ceil(height / ratio), w=math.ceil(width / ratio))
        return cls(mask, mpp, slide_mpp)


def find_tissue(
    rgb: NDArray[np.uint8],
    *,
    mpp: float,
    slide_mpp: float,
    config: TissueConfig = TissueConfig(),
) -> TissueMask:
    """Find tissue on an overview of a slide.

    A pixel is tissue if its darkest channel is clearly denser than the slide's own glass: colour
    and greyness both count, so H&E, IHC with a pale counterstain and grey tissue all do. The
    threshold is Otsu's, held between ``min_od`` and ``max_od``. Neutral black wider than 40 µm and
    blue, green or black ink wider than 80 µm are not tissue. Purple and red ink cannot be told
    from stain and stay.

    Args:
        rgb: The slide resampled by area to ``mpp`` [h, w, 3].
        mpp: µm per pixel of ``rgb``.
        slide_mpp: Level-0 µm/px.
        config: Thresholds.

    Returns:
        The mask, the size of ``rgb``.
    """
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8:
        raise ValueError(f"rgb is {rgb.dtype} {rgb.shape}, must be uint8 [h, w, 3]")
    density = _density(rgb)

    black = _wide(_is_black(rgb), width_um=40, mpp=mpp)
    ink = _wide(_is_ink(rgb), width_um=80, mpp=mpp)
    if ink is not None:
        foreground = np.count_nonzero(density > config.max_od * OD_STEPS)
        if np.count_nonzero(ink) > config.max_ink_share * foreground:
            ink = None
    known = np.ones(density.shape, np.uint8)
    for other in (black, ink):
        if other is not None:
            known[other] = 0
    density[known == 0] = 0

    if config.smoothing_um > 0:
        cv2.GaussianBlur(density, (0, 0), config.smoothing_um / mpp, dst=density)
    threshold = _otsu(np.bincount(density[known > 0], minlength=256))
    threshold = min(max(threshold, config.min_od * OD_STEPS), config.max_od * OD_STEPS)
    mask = ((density > threshold) & (known > 0)).view(np.uint8)

    mask = 1 - _without_small(1 - mask, below_px=config.min_hole_um2 / mpp**2, holes=True)
    mask = _without_small(mask, below_px=config.min_area_um2 / mpp**2, holes=False)
    return TissueMask(mask.view(np.bool_), mpp, slide_mpp)


def patch_quality(patches: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Score patches read at about 0.5 µm/px for focus and marker ink.

    Blur compares the green channel's mean squared change over 2 px (1 µm) with that over 8 px
    (4 µm). The ratio does not depend on stain or contrast and falls to 1/16 as focus is lost. On a
    real 20x H&E slide sharp patches have 0.23 to 0.46, blurred by a Gaussian of sigma 1 px 0.15 to
    0.25, 2 px 0.10 to 0.15, 4 px below 0.10; it is mapped linearly from 0.20 (score 0) to 0.08
    (score 1). At another mpp the score keeps its order but not its scale. A patch with no texture
    at all scores 1.

    Pen is the share of pixels that are blue, cyan, green or neutral black beyond what stains
    reach, estimated on every eighth pixel each way.

    Args:
        patches: RGB [n, px, px, 3], px at least 16.

    Returns:
        (blur, pen) of each patch, 0 to 1 [n, 2].
    """
    if patches.ndim != 4 or patches.shape[3] != 3 or patches.dtype != np.uint8:
        raise ValueError(
            f"patches are {patches.dtype} {patches.shape}, must be uint8 [n, px, px, 3]"
        )
    if min(patches.shape[1:3]) < 16:
        raise ValueError(
            f"patches are {patches.shape[2]} x {patches.shape[1]} px, must be 16 or more"
        )
    scores = np.empty((len(patches), 2), np.float32)
    for start in range(0, len(patches), 8):  # few enough to stay in the cache
        block = patches[start : start + 8]
        green = block[..., 1]
        rows = green[:, ::8].astype(np.float32)
        last = green.shape[1] - 8
        top, near, far = (green[:, k : last + k : 16, ::2].astype(np.float32) for k in (0, 2, 8))
        # Per-sample means, so that the two distances weigh the same whatever the patch size.
        fine = _mean_square(rows[:, :, 2:], rows[:, :, :-2]) + _mean_square(near, top)
        coarse = _mean_square(rows[:, :, 8:], rows[:, :, :-8]) + _mean_square(far, top)
        # The 10 keeps noise of one or two grey levels on nothing from passing for detail.
        ratio = fine / (coarse + 10)
        scores[start : start + 8, 0] = (BLUR_SHARP - ratio) / (BLUR_SHARP - BLUR_LOST)
        few = block[:, 4::8, 4::8]
        scores[start : start + 8, 1] = (_is_ink(few) | _is_black(few)).mean(axis=(1, 2))
    return np.clip(scores, 0, 1)


def _mean_square(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    difference = (a - b).reshape(len(a), -1)
    square: NDArray[np.float32] = np.einsum("ij,ij->i", difference, difference)
    return square / np.float32(difference.shape[1])


def _is_ink(rgb: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Pixels [...] of blue, cyan or green marker: red is absorbed most and by far.

    In H&E, haematoxylin and DAB green or blue is absorbed at least as much as red.
    """
    red, green, blue = (rgb[..., c].astype(np.int16) for c in range(3))
    clear = green - red >= 40
    deep_blue = (blue - red >= 90) & (green - red >= 12)
    ink: NDArray[np.bool_] = (clear | deep_blue) & (red <= 120)
    return ink


def _is_black(rgb: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Neutral, nearly black pixels [...]."""
    red, green, blue = (rgb[..., c] for c in range(3))
    high = np.maximum(np.maximum(red, green), blue)
    low = np.minimum(np.minimum(red, green), blue)
    black: NDArray[np.bool_] = (high < BLACK) & (high - low <= 15)
    return black


def _wide(
    candidates: NDArray[np.bool_], *, width_um: float, mpp: float
) -> NDArray[np.bool_] | None:
    """Candidates in patches at least ``width_um`` wide, with the blended pixels around them."""
    if not candidates.any():
        return None
    px = max(1, round(width_um / mpp))
    # Opened with a border of ones: what runs off the image is wide enough.
    image = cv2.copyMakeBorder(candidates.view(np.uint8), px, px, px, px, cv2.BORDER_REPLICATE)
    image = cv2.morphologyEx(image, cv2.MORPH_OPEN, np.ones((px, px), np.uint8))
    image = cv2.dilate(image, np.ones((5, 5), np.uint8))[px:-px, px:-px]
    return np.ascontiguousarray(image).view(np.bool_) if image.any() else None


def _density(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Optical density of the densest channel above glass, in steps of 1/200 [h, w]."""
    red, green, blue = cv2.split(rgb)
    high, low = cv2.max(cv2.max(red, green), blue), cv2.min(cv2.min(red, green), blue)
    # Glass: bright, nearly neutral, not the pure white of fill or of overexposure.
    glass = ((low >= 180) & (low < 253) & (high - low <= 20)).view(np.uint8)
    enough = np.count_nonzero(glass) >= max(1, 0.002 * glass.size)
    density = np.zeros(low.shape, np.uint8)
    for channel in (red, green, blue):
        white = 247.0
        if enough:
            counts = cv2.calcHist([channel], [0], glass, [256], [0, 256]).ravel().cumsum()
            # Above the median, as pale tissue may pass for glass.
            white = float(np.searchsorted(counts, 0.9 * counts[-1]))
        od = np.log(white / np.maximum(np.arange(256), 1))
        table = np.clip(np.rint(od * OD_STEPS), 0, 255).astype(np.uint8)
        cv2.max(density, cv2.LUT(channel, table), dst=density)
    return density


def _otsu(counts: NDArray[np.int64]) -> float:
    """Otsu's threshold of a histogram: values above it are foreground."""
    weights = counts.astype(np.float64)
    below, total = np.cumsum(weights), weights.sum()
    moment = np.cumsum(weights * np.arange(len(weights)))
    product = below * (total - below)
    between = np.divide(
        (moment[-1] * below - moment * total) ** 2,
        product,
        out=np.zeros_like(product),
        where=product > 0,
    )
    return float(np.argmax(between))


def _without_small(mask: NDArray[np.uint8], *, below_px: float, holes: bool) -> NDArray[np.uint8]:
    """Drop components under ``below_px`` pixels; with ``holes`` only those off the border.

    Tissue joins at corners, so holes do not.
    """
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=4 if holes else 8)
    keep = stats[:, cv2.CC_STAT_AREA] >= below_px
    keep[0] = False
    if holes:
        left, top = stats[:, cv2.CC_STAT_LEFT], stats[:, cv2.CC_STAT_TOP]
        right, bottom = left + stats[:, cv2.CC_STAT_WIDTH], top + stats[:, cv2.CC_STAT_HEIGHT]
        h, w = mask.shape
        keep[1:] |= ((left == 0) | (top == 0) | (right == w) | (bottom == h))[1:]
    kept: NDArray[np.uint8] = keep.astype(np.uint8)[np.asarray(labels)]
    return kept


def _sums_between_rows(mask: NDArray[np.bool_], lines: NDArray[np.float64]) -> NDArray[np.float64]:
    """Column sums of the mask between fractional row positions in [0, h] -> [n - 1, w]."""
    image = mask.view(np.uint8)
    h, w = mask.shape
    whole = np.minimum(lines.astype(np.int64), h - 1)
    part = lines - whole
    sums = np.zeros((len(lines) - 1, w))
    for i in range(len(sums)):
        first, last = int(whole[i]), int(whole[i + 1])
        if last > first:
            sums[i] = cv2.reduce(image[first:last], 0, cv2.REDUCE_SUM, dtype=cv2.CV_32S)[0]
        sums[i] += part[i + 1] * image[last] - part[i] * image[first]
    return sums


def _fill(polygons: Iterable[Polygon], *, scale: float, h: int, w: int) -> NDArray[np.bool_]:
    """Union of polygons, even-odd within each; a pixel is in if its centre is [h, w].

    Args:
        polygons: In level-0 px.
        scale: Level-0 px per pixel of the result.
        h: Rows.
        w: Columns.
    """
    mask = np.zeros((h, w), np.bool_)
    for outer, holes in polygons:
        starts = [ring / scale for ring in (outer, *holes)]
        a = np.concatenate(starts)
        b = np.concatenate([np.roll(ring, -1, axis=0) for ring in starts])
        upper = np.clip(np.ceil(np.minimum(a[:, 1], b[:, 1]) - 0.5), 0, h).astype(np.int64)
        lower = np.clip(np.ceil(np.maximum(a[:, 1], b[:, 1]) - 0.5), 0, h).astype(np.int64)
        crossed = lower - upper
        if not crossed.any():
            continue
        # One entry for each pixel row whose centre line an edge crosses.
        which = np.repeat(np.arange(len(a)), crossed)
        row = np.arange(len(which)) - np.repeat(np.cumsum(crossed) - crossed, crossed)
        row += upper[which]
        slope = (b[which, 0] - a[which, 0]) / (b[which, 1] - a[which, 1])
        x = a[which, 0] + (row + 0.5 - a[which, 1]) * slope
        col = np.clip(np.ceil(x - 0.5), 0, w).astype(np.int64)
        top, left, right = row.min(), col.min(), col.max()
        inside = np.zeros((row.max() + 1 - top, right - left + 1), np.uint8)
        np.add.at(inside, (row - top, col - left), np.uint8(1))
        inside &= 1
        np.bitwise_xor.accumulate(inside, axis=1, out=inside)
        mask[top : row.max() + 1, left:right] |= inside[:, :-1].view(np.bool_)
    return mask


def _outlines(mask: NDArray[np.bool_]) -> list[Polygon]:
    """Rings along the pixel edges of each 4-connected piece, in pixels of the mask.

    Every straight run of boundary is one arrow with tissue on its right. Where two pieces meet at
    a corner each arrow turns back along its own pixel, so a ring belongs to one piece only.
    """
    w = mask.shape[1]
    padded = np.pad(mask, 1).view(np.int8)
    _, labels = cv2.connectedComponents(np.ascontiguousarray(mask).view(np.uint8), connectivity=4)
    down, across = np.diff(padded, axis=0)[:, 1:-1], np.diff(padded, axis=1)[1:-1]

    # Kinds in the order an arrow turns round a single pixel: top, right, bottom, left.
    runs = []
    for kind, steps in enumerate((down == 1, across.T == -1, down == -1, across.T == 1)):
        line, first, last = _runs(steps)
        if kind == 0:
            start, end, pixel = (first, line), (last, line), (line, first)
        elif kind == 1:
            start, end, pixel = (line, first), (line, last), (first, line - 1)
        elif kind == 2:
            start, end, pixel = (last, line), (first, line), (line - 1, first)
        else:
            start, end, pixel = (line, last), (line, first), (first, line)
        runs.append(np.stack([*start, *end, labels[pixel], np.full(len(line), kind)], axis=1))
    arrows = np.concatenate(runs).astype(np.int64)
    if not len(arrows):
        return []
    point, kind = arrows[:, :2], arrows[:, 5]
    key = (point[:, 1] * (w + 1) + point[:, 0]) * 4 + kind
    order = np.argsort(key)
    end = (arrows[:, 3] * (w + 1) + arrows[:, 2]) * 4
    following = np.zeros(len(arrows), np.int64)
    for turn in (3, 1):  # a right turn, where there is one, is the arrow's own pixel
        wanted = end + (kind + turn) % 4
        at = np.minimum(np.searchsorted(key[order], wanted), len(order) - 1)
        found = key[order[at]] == wanted
        following[found] = order[at][found]

    outer: dict[int, NDArray[np.float64]] = {}
    holes: dict[int, list[NDArray[np.float64]]] = {}
    successor, corners = following.tolist(), [tuple(xy) for xy in point.tolist()]
    piece = arrows[:, 4].tolist()
    seen = bytearray(len(successor))
    for begin in range(len(successor)):
        if seen[begin]:
            continue
        ring, current = [], begin
        while not seen[current]:
            seen[current] = 1
            ring.append(corners[current])
            current = successor[current]
        for simple in _split(ring):
            xy = np.array(simple, np.float64)
            x, y = (xy - xy[0]).T
            if x @ np.roll(y, -1) - y @ np.roll(x, -1) > 0:
                outer[piece[begin]] = xy
            else:
                holes.setdefault(piece[begin], []).append(xy)
    return [(outer[label], holes.get(label, [])) for label in sorted(outer)]


def _runs(
    steps: NDArray[np.bool_],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Stretches of True along axis 1: (row, first column, column after the last)."""
    change = np.diff(np.pad(steps, ((0, 0), (1, 1))).view(np.int8), axis=1)
    row, first = np.nonzero(change == 1)
    _, last = np.nonzero(change == -1)
    return row, first, last


def _split(ring: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Cut a ring that meets itself at points into rings that do not."""
    if len(set(ring)) == len(ring):
        return [ring]
    rings: list[list[tuple[int, int]]] = []
    path: list[tuple[int, int]] = []
    place: dict[tuple[int, int], int] = {}
    for corner in ring:
        if corner in place:
            cut = place[corner]
            rings.append(path[cut:])
            for left in path[cut + 1 :]:
                del place[left]
            del path[cut:]
        place[corner] = len(path)
        path.append(corner)
    return [*rings, path]
