"""Patch scores against planted blur and ink, and on a real slide."""

from __future__ import annotations

import itertools

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from pathflip.slides.quality import patch_quality

PINK = (215, 150, 190)
PURPLE = (120, 70, 150)
BLUE_INK = (40, 62, 165)
GREEN_INK = (45, 150, 95)
BLACK_INK = (28, 28, 32)


def cells(n: int, *, px: int = 256, seed: int = 0) -> NDArray[np.uint8]:
    """Dark 14 px nuclei with crisp edges on pink."""
    rng = np.random.default_rng(seed)
    out = np.empty((n, px, px, 3), np.uint8)
    for image in out:
        image[:] = PINK
        for x, y in rng.integers(0, px, (px * px // 600, 2)):
            cv2.circle(image, (int(x), int(y)), 7, PURPLE, -1, cv2.LINE_AA)
        image += rng.integers(0, 6, image.shape, np.uint8)
    return out


def blurred(patches: NDArray[np.uint8], sigma: float) -> NDArray[np.uint8]:
    return np.stack([cv2.GaussianBlur(patch, (0, 0), sigma) for patch in patches])


def test_blur_rises_with_defocus() -> None:
    sharp = cells(4)
    scores = [patch_quality(blurred(sharp, s))[:, 0] for s in (0.5, 1.5, 3.0, 6.0)]
    for less, more in itertools.pairwise(scores):
        assert (less <= more).all()
    assert (patch_quality(sharp)[:, 0] < 0.1).all()
    assert (scores[2] > 0.7).all()
    assert (scores[3] > 0.95).all()


@pytest.mark.parametrize("px", [64, 224, 256, 512])
def test_blur_does_not_hang_on_contrast_or_patch_size(px: int) -> None:
    sharp = cells(3, px=px)
    faint = (200 + (sharp.astype(np.int16) - 128) // 3).clip(0, 255).astype(np.uint8)
    assert (patch_quality(faint)[:, 0] < 0.2).all()
    assert (patch_quality(blurred(faint, 4.0))[:, 0] > 0.8).all()


def test_a_patch_of_nothing_is_out_of_focus_and_finite() -> None:
    patches = np.stack([np.full((256, 256, 3), v, np.uint8) for v in (0, 128, 255)])
    scores = patch_quality(patches)
    assert scores.dtype == np.float32
    assert scores[:, 0].tolist() == [1, 1, 1]
    assert scores[:, 1].tolist() == [1, 0, 0]  # neutral black counts as ink
    assert patch_quality(patches[:0]).shape == (0, 2)


@pytest.mark.parametrize("ink", [BLUE_INK, GREEN_INK, BLACK_INK])
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_pen_is_the_share_of_ink(ink: tuple[int, int, int], share: float) -> None:
    patches = cells(2)
    patches[1, :, : round(256 * share)] = ink
    pen = patch_quality(patches)[:, 1]
    assert pen[0] == 0
    assert pen[1] == pytest.approx(share, abs=0.03)


def test_scores_do_not_depend_on_the_batch() -> None:
    patches = np.concatenate([cells(7), blurred(cells(6, seed=1), 2.0)])
    together = patch_quality(patches)
    for patch, scores in zip(patches, together, strict=True):
        assert np.array_equal(patch_quality(patch[None])[0], scores)


def test_bad_patches_are_refused() -> None:
    with pytest.raises(ValueError, match="uint8"):
        patch_quality(np.zeros((2, 32, 32), np.uint8))
    with pytest.raises(ValueError, match="16 or more"):
        patch_quality(np.zeros((2, 8, 8, 3), np.uint8))


def test_real_patches(real: NDArray[np.uint8]) -> None:
    def tissue_patches(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return np.stack(
            [
                image[y : y + 256, x : x + 256]
                for y in range(0, image.shape[0] - 255, 256)
                for x in range(0, image.shape[1] - 255, 256)
                if (real[y : y + 256, x : x + 256].min(axis=-1) < 210).mean() >= 0.5
            ]
        )

    sharp = patch_quality(tissue_patches(real))
    soft, lost = (
        patch_quality(tissue_patches(cv2.GaussianBlur(real, (0, 0), s)))[:, 0] for s in (2.0, 4.0)
    )
    assert len(sharp) > 20
    assert sharp[:, 0].max() < 0.1
    assert soft.min() > 0.3
    assert lost.min() > 0.85
    assert sharp[:, 1].max() < 0.05  # a little green margin dye
