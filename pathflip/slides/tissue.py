"""The tissue mask of a slide.

The mask is made once a slide from the slide resampled to 8 µm per pixel. It says which patches to
embed, so it leaves out glass, scanner fill and marker ink and keeps holes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from pathflip.errors import ConfigError
from pathflip.slides.outlines import Polygon, fill, trace
from pathflip.slides.quality import is_black, is_ink

OD_STEPS = 200.0
"""Optical density is held in bytes, this many to the unit: 0 to 1.275."""


@dataclass(frozen=True, kw_only=True)
class TissueConfig:
    """Settings of the tissue mask.

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
    """Tissue mask of one slide.

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
        """Compute the exact share of tissue in each cell of a grid.

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
        """Return the mask as a one-bit PNG."""
        ok, data = cv2.imencode(
            ".png", self.mask.view(np.uint8) * np.uint8(255), [cv2.IMWRITE_PNG_BILEVEL, 1]
        )
        if not ok:
            raise ValueError("mask cannot be written as PNG")
        return bytes(data.tobytes())

    @classmethod
    def from_png(cls, data: bytes, *, mpp: float, slide_mpp: float) -> TissueMask:
        """Return the mask of :meth:`to_png`. Raises ValueError if ``data`` is no image."""
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE) if data else None
        if image is None:
            raise ValueError("tissue mask is not a PNG")
        return cls(image > 127, mpp, slide_mpp)

    def polygons(self) -> list[Polygon]:
        """Trace outlines of the tissue, following pixel edges, in level-0 px.

        Each polygon is valid in the sense of OGC: simple rings, touching at points at most. Filling
        them gives back the mask exactly.

        Returns:
            (outer ring [k, 2], holes [[m, 2], ...]) of each piece joined along pixel sides.
        """
        return [
            (outer * (self.mpp / self.slide_mpp), [h * (self.mpp / self.slide_mpp) for h in holes])
            for outer, holes in trace(self.mask)
        ]

    @classmethod
    def from_polygons(
        cls,
        polygons: Sequence[Polygon],
        *,
        width: int,
        height: int,
        slide_mpp: float,
        mpp: float = TissueConfig.mpp,
    ) -> TissueMask:
        """Fill polygons: a pixel is tissue if its centre is inside one of them.

        Args:
            polygons: In level-0 px.
            width: Level-0 width of the slide, px.
            height: Level-0 height of the slide, px.
            slide_mpp: Level-0 µm/px.
            mpp: µm per pixel of the mask.
        """
        ratio = mpp / slide_mpp
        h, w = math.ceil(height / ratio), math.ceil(width / ratio)
        return cls(fill(polygons, scale=ratio, h=h, w=w), mpp, slide_mpp)


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

    black = _wide(is_black(rgb), width_um=40, mpp=mpp)
    ink = _wide(is_ink(rgb), width_um=80, mpp=mpp)
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
