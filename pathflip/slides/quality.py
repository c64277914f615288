"""Scores of patches for focus and marker ink, stored beside each patch and filtered on at use."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BLACK = 50
"""Neutral pixels darker than this are scanner fill or black ink, not tissue."""
BLUR_SHARP, BLUR_LOST = 0.20, 0.08
"""Detail ratios scored 0 and 1; see :func:`patch_quality` for how they were found."""

_AT_ONCE_PX = 8 * 256 * 256
"""Pixels that are scored together: few enough to stay in the cache."""


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
    few = max(1, _AT_ONCE_PX // (patches.shape[1] * patches.shape[2]))
    for start in range(0, len(patches), few):
        block = patches[start : start + few]
        green = block[..., 1]
        rows = green[:, ::8].astype(np.float32)
        last = green.shape[1] - 8
        top, near, far = (green[:, k : last + k : 16, ::2].astype(np.float32) for k in (0, 2, 8))
        # Per-sample means, so that the two distances weigh the same whatever the patch size.
        fine = _mean_square(rows[:, :, 2:], rows[:, :, :-2]) + _mean_square(near, top)
        coarse = _mean_square(rows[:, :, 8:], rows[:, :, :-8]) + _mean_square(far, top)
        # The 10 keeps noise of one or two grey levels on nothing from passing for detail.
        ratio = fine / (coarse + 10)
        scores[start : start + few, 0] = (BLUR_SHARP - ratio) / (BLUR_SHARP - BLUR_LOST)
        sparse = block[:, 4::8, 4::8]
        ink = is_ink(sparse) | is_black(sparse)
        scores[start : start + few, 1] = ink.mean(axis=(1, 2))
    return np.clip(scores, 0, 1)


def _mean_square(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    difference = (a - b).reshape(len(a), -1)
    square: NDArray[np.float32] = np.einsum("ij,ij->i", difference, difference)
    return square / np.float32(difference.shape[1])


def is_ink(rgb: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Find pixels [...] of blue, cyan or green marker: red is absorbed most and by far.

    In H&E, haematoxylin and DAB green or blue is absorbed at least as much as red.
    """
    red, green, blue = (rgb[..., c].astype(np.int16) for c in range(3))
    clear = green - red >= 40
    deep_blue = (blue - red >= 90) & (green - red >= 12)
    ink: NDArray[np.bool_] = (clear | deep_blue) & (red <= 120)
    return ink


def is_black(rgb: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Find neutral, nearly black pixels [...]."""
    red, green, blue = (rgb[..., c] for c in range(3))
    high = np.maximum(np.maximum(red, green), blue)
    low = np.minimum(np.minimum(red, green), blue)
    black: NDArray[np.bool_] = (high < BLACK) & (high - low <= 15)
    return black
