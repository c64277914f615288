"""The default patch encoder: a fixed stain-and-texture descriptor, no weights to download.

What it measures on a patch of 256 x 256 px (other sizes are resampled first):

1. Optical density ``-log(v / 244)`` of red and green at half size, in steps of 1/90, split into
   haematoxylin ``H = R - 0.0707 G`` and eosin ``E = G - 1.077 R`` (the inverse of the stain
   vectors (.65, .70) and (.07, .99), each up to a factor), and halved by area three times: four
   octaves, 1 to 8 µm per pixel for a patch read at 0.5.
2. For each octave and stain the variance, the correlation of the two stains, and the energy of
   differences between pixels a lag apart in four directions: its mean over directions (how
   coarse), its spread (how fibrous) and diagonal against axial (lattices). The finest differences
   are taken on the colours at full size.
3. On haematoxylin: the density left after erosion by squares of growing side (size of nuclei, then
   of nests), dots and holes against their surroundings (nucleoli, lumina), and area, outline and
   Euler number above a threshold (how many nuclei, how round).
4. Histograms of both stains at 2 and 4 µm per pixel.

Each is a sum of integers over the patch, then a logarithm (``_describe``), then a fixed centre,
scale, clip and weight (``_standardise``). So a patch gets the same bits alone or in any batch, and
the same again when turned by 90° or mirrored; any pixels give finite values; and cosine similarity
means something without having seen the archive. Each of the ``BLOCKS`` weighs the same in it.

The constants are the mean and standard deviation of ``_describe`` over rendered tissue
(``tests/bench/texture_constants.py`` computes and prints them).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

PX = 256
CLIP = 4.0
_SIDES = (128, 64, 32, 16)
_STEPS_PER_DENSITY, _GLASS = 90.0, 244.0
_H_MINUS_G, _E_MINUS_R = -0.0707, -1.077
# Lags in pixels of octave 0..3: 1, 2, 4, 8 and 16 µm in H; 1, 2 and 4 µm in E.
_H_LAGS = ((0, 1), (1, 1), (1, 2), (2, 2), (3, 2))
_E_LAGS = ((0, 1), (1, 1), (2, 1))
# Sides of the eroding squares: 2 3 5 7 px at 1 µm, 2 4 6 9 12 px at 2 µm. A square of side k grows
# by at most k at a time, so each erosion is the minimum of two shifted copies of the one before.
_GROWTH = ((1, 1, 2, 2), (1, 2, 2, 3, 3))
_SURROUND_PX = 5
_NUCLEAR_LEVEL = 45
_HISTOGRAM = 32
_FINE_BINS = (*range(18), 18, 21, 25, 32)
_COARSE_BINS = (*range(10), 12, 16, 22, 32)

BLOCKS: dict[str, int] = {
    "finest differences": 2,
    "mean density": 3,
    "variance": 8,
    "stain correlation": 4,
    "differences H": 15,
    "differences E": 9,
    "erosion 1 µm": 7,
    "erosion 2 µm": 9,
    "dots and holes": 3,
    "nuclear shape": 3,
    "histogram H 2 µm": 21,
    "histogram E 2 µm": 21,
    "histogram H 4 µm": 13,
    "histogram E 4 µm": 13,
}
"""Blocks of the descriptor, in order, with the number of dimensions of each."""
DIM = sum(BLOCKS.values())


class TextureEncoder:
    """Deterministic stain-and-texture descriptor; see the module's docstring.

    About 0.2 ms of one CPU per patch; uint8 patches [n, px, px, 3] -> float32 [n, 131].
    """

    name = "texture"
    revision = "1"
    dim = DIM
    input_px = PX
    mpp: float | None = None
    licence = "Apache-2.0"

    def __call__(self, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Encode patches [n, px, px, 3] of any px; colours are RGB.

        Raises:
            ValueError: The array is not uint8 of that shape.
        """
        if patches.dtype != np.uint8 or patches.ndim != 4 or patches.shape[3] != 3:
            raise ValueError(
                f"patches must be uint8 [n, px, px, 3], not {patches.dtype} {patches.shape}"
            )
        if not len(patches):
            return np.zeros((0, DIM), np.float32)
        return _standardise(_describe([_measure(_at_native(patch)) for patch in patches]))


def _at_native(patch: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if patch.shape[:2] == (PX, PX):
        return patch
    how = cv2.INTER_AREA if min(patch.shape[:2]) > PX else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(patch, (PX, PX), interpolation=how), np.uint8)


@lru_cache(maxsize=1)
def _density() -> NDArray[np.uint8]:
    """Return the optical density of each grey level, in steps of 1/90."""
    density = -np.log(np.maximum(np.arange(256), 1) / _GLASS)
    steps: NDArray[np.float64] = np.clip(np.rint(_STEPS_PER_DENSITY * density), 0, 255)
    return steps.astype(np.uint8)


def _measure(patch: NDArray[np.uint8]) -> list[float]:
    """Return sums over one patch, exact integers as floats, in the order of ``_describe``.

    Calls here cost about as much as their arithmetic, so there are few of them.
    """
    norm, smaller, resize, table = cv2.norm, cv2.min, cv2.resize, _density()
    l1, l2, area = cv2.NORM_L1, cv2.NORM_L2SQR, cv2.INTER_AREA
    row = [norm(patch[:, 1:], patch[:, :-1], l2), norm(patch[1:], patch[:-1], l2)]
    add = row.append

    red, green, blue = cv2.split(resize(patch, (128, 128), interpolation=area))
    red, green = cv2.LUT(red, table), cv2.LUT(green, table)
    h = [cv2.addWeighted(red, 1.0, green, _H_MINUS_G, 0.0)]
    e = [cv2.addWeighted(green, 1.0, red, _E_MINUS_R, 0.0)]
    for side in _SIDES[1:]:
        h.append(resize(h[-1], (side, side), interpolation=area))
        e.append(resize(e[-1], (side, side), interpolation=area))

    row += [norm(h[0], l1), norm(e[0], l1), norm(blue, l1)]
    for a, b in zip(h, e, strict=True):
        row += [norm(a, l2), norm(b, l2), norm(a, b, l2)]

    for maps, lags in ((h, _H_LAGS), (e, _E_LAGS)):
        for octave, k in lags:
            m = maps[octave]
            low, high = m[k:], m[:-k]
            row += [
                norm(m[:, k:], m[:, :-k], l2),
                norm(low, high, l2),
                norm(low[:, k:], high[:, :-k], l2),
                norm(low[:, :-k], high[:, k:], l2),
            ]

    for octave, growth in enumerate(_GROWTH):
        m = h[octave]
        for k in growth:
            m = smaller(m[k:], m[:-k])
            m = smaller(m[:, k:], m[:, :-k])
            add(norm(m, l1))

    m = h[1]
    around = cv2.blur(m, (_SURROUND_PX, _SURROUND_PX))
    dots, holes = cv2.subtract(m, around), cv2.subtract(around, m)
    row += [norm(dots, l1), norm(dots, l2), norm(holes, l2)]

    m = cv2.threshold(h[0], _NUCLEAR_LEVEL, 1, cv2.THRESH_BINARY)[1]
    pairs = smaller(m[1:], m[:-1])
    row += [norm(m, l1), norm(pairs, l1)]
    row += [norm(smaller(m[:, 1:], m[:, :-1]), l1), norm(smaller(pairs[:, 1:], pairs[:, :-1]), l1)]

    for m in (h[1], e[1], h[2], e[2]):
        row += cv2.calcHist([m], [0], None, [_HISTOGRAM], [0.0, 256.0]).ravel().tolist()
    return row


def _describe(sums: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    """Convert sums [n, k] to an unstandardised description [n, DIM]: logs of means per pixel."""
    x, at = np.asarray(sums, np.float64), 0
    out: list[NDArray[np.float64]] = []

    def take(count: int) -> NDArray[np.float64]:
        nonlocal at
        at += count
        return x[:, at - count : at]

    across, down = np.log(1 + take(2) / (3 * PX * (PX - 1))).T
    out += [(across + down) / 2, np.abs(across - down)]

    mean_h, mean_e, blue = take(3).T / _SIDES[0] ** 2
    out += [np.log(2 + mean_h), np.log(2 + mean_e), np.log(2 + blue)]
    variance, correlation = [], []
    for side in _SIDES:
        square_h, square_e, square_difference = take(3).T / side**2
        var_h = np.maximum(0, square_h - mean_h**2)
        var_e = np.maximum(0, square_e - mean_e**2)
        covariance = (square_h + square_e - square_difference) / 2 - mean_h * mean_e
        variance += [np.log(1 + var_h), np.log(1 + var_e)]
        correlation += [np.clip(covariance / np.sqrt((2 + var_h) * (2 + var_e)), -1, 1)]
    out += variance + correlation

    for lags in (_H_LAGS, _E_LAGS):
        for octave, k in lags:
            side = _SIDES[octave]
            axial, diagonal = side * (side - k), (side - k) ** 2
            energy = np.log(0.5 + take(4) / np.array([axial, axial, diagonal, diagonal]))
            e0, e90, e45, e135 = energy.T
            spread = np.hypot(e0 - e90, e45 - e135)
            # Sums of pairs first: turning the patch swaps within a pair, which must not round.
            out += [((e0 + e90) + (e45 + e135)) / 4, spread, (e45 + e135) - (e0 + e90)]

    for octave, growth in enumerate(_GROWTH):
        sides = _SIDES[octave] - np.cumsum(growth)
        left = take(len(growth)) / sides**2
        lost = np.maximum(0, left[:, :-1] - left[:, 1:])
        out += [*np.log(0.1 + left).T, *np.log(0.1 + lost).T]

    out += [*np.log(0.3 + take(3) / _SIDES[1] ** 2).T]

    area, below, beside, blocks = take(4).T
    outline = np.maximum(0, 2 * area - (below + beside)) / _SIDES[0] ** 2
    euler = (area - (below + beside) + blocks) / 16
    out += [np.log(0.01 + area / _SIDES[0] ** 2), np.log(0.003 + outline)]
    out += [np.sign(euler) * np.sqrt(np.abs(euler))]

    for octave, edges in ((1, _FINE_BINS), (1, _FINE_BINS), (2, _COARSE_BINS), (2, _COARSE_BINS)):
        counts = np.add.reduceat(take(_HISTOGRAM), edges[:-1], axis=1)
        out += [*np.log(0.005 + counts / _SIDES[octave] ** 2).T]
    return np.stack(out, 1)


@lru_cache(maxsize=1)
def _weights() -> NDArray[np.float64]:
    """Return weights that give every block the same share of a squared distance, mean square 1."""
    return np.concatenate(
        [np.full(count, (DIM / len(BLOCKS) / count) ** 0.5) for count in BLOCKS.values()]
    )


def _standardise(description: NDArray[np.float64]) -> NDArray[np.float32]:
    centred = (description - np.array(_CENTRE)) / np.array(_SCALE)
    weighted: NDArray[np.float64] = np.clip(centred, -CLIP, CLIP) * _weights()
    return weighted.astype(np.float32)


# fmt: off
_CENTRE = (
    5.17, 0.38, 2.75, 3.32, 5.29, 6.19, 5.28, 6.03, 5.19, 5.76, 5.04, 5.36,
    4.82, 0.191, 0.242, 0.292, 0.374, 5.25, 0.402, 0.918, 5.57, 0.366, 0.798, 6.14,
    0.24, 0.394, 6, 0.242, 0.233, 5.62, 0.396, 0.255, 4.39, 0.463, 0.743, 4.54,
    0.597, 0.78, 4.56, 0.613, 0.618, 1.94, 1.45, 0.647, 0.00851, 0.962, 0.885, 0.0413,
    1.76, 0.649, -0.0543, -0.672, -1.01, 1.31, 0.0874, -0.501, -1.11, 1.34, 4.74, 3.93,
    -2.19, -3.05, 1.79, -0.781, -3.04, -3.2, -3.48, -3.65, -3.73, -3.75, -3.8, -3.92,
    -4.11, -4.3, -4.47, -4.6, -4.72, -4.79, -4.87, -4.94, -4.98, -4.83, -5, -5.17,
    -2.89, -3.99, -3.59, -3.07, -2.51, -2.52, -2.98, -3.47, -3.88, -4.15, -4.36, -4.59,
    -4.79, -4.96, -5.04, -5.11, -5.16, -5.19, -5.2, -5.27, -5.3, -0.987, -2.78, -2.92,
    -3.34, -3.53, -3.61, -3.67, -3.73, -3.89, -3.62, -4.25, -4.81, -5.22, -3.05, -4.04,
    -3.72, -3.15, -2.5, -2.51, -3.05, -3.59, -3.97, -3.96, -4.78, -5.15, -5.29,
)
_SCALE = (
    1.01, 0.419, 0.91, 0.847, 0.172, 1.56, 1.57, 1.56, 1.47, 1.58, 1.35, 1.62,
    1.23, 0.237, 0.255, 0.27, 0.295, 1.5, 0.389, 0.226, 1.5, 0.334, 0.236, 1.58,
    0.219, 0.247, 1.61, 0.23, 0.232, 1.67, 0.395, 0.395, 1.46, 0.622, 0.416, 1.51,
    0.764, 0.552, 1.62, 0.732, 0.607, 1.46, 1.62, 1.71, 1.74, 1.1, 1.32, 1.29,
    1.55, 1.79, 1.82, 1.8, 1.7, 1.31, 1.36, 1.4, 1.31, 0.808, 1.42, 1.56,
    1.15, 1.04, 1.42, 0.857, 1.09, 1.03, 0.884, 0.858, 0.89, 0.941, 0.945, 0.908,
    0.859, 0.816, 0.771, 0.731, 0.675, 0.636, 0.585, 0.49, 0.469, 0.645, 0.418, 0.3,
    2.17, 1.15, 1.14, 1.25, 1.38, 1.27, 1.18, 1.16, 1.14, 1.12, 1.05, 0.957,
    0.845, 0.748, 0.68, 0.609, 0.554, 0.505, 0.567, 0.3, 0.3, 1.1, 1.06, 0.993,
    0.835, 0.874, 0.938, 0.991, 0.998, 0.975, 1.22, 1.12, 0.766, 0.3, 2.18, 1.18,
    1.23, 1.32, 1.47, 1.35, 1.27, 1.21, 1.19, 1.47, 1.12, 0.695, 0.3,
)
# fmt: on
