"""Tissue masks against planted truth, supersampling and a real slide."""

from __future__ import annotations

import itertools
import math
import struct

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from pathflip.errors import ConfigError
from pathflip.slides.tissue import TissueConfig, TissueMask, find_tissue

GLASS = (243, 243, 242)
PINK = (215, 150, 190)
PURPLE = (120, 70, 150)
PALE = (236, 216, 230)
GREY = (150, 150, 150)
BROWN = (150, 105, 70)
COUNTERSTAIN = (190, 200, 222)
BLUE_INK = (40, 62, 165)
GREEN_INK = (45, 150, 95)
BLACK_INK = (28, 28, 32)

masks = arrays(np.bool_, st.tuples(st.integers(1, 12), st.integers(1, 12)))


def overview(
    color: tuple[int, int, int] = GLASS, *, h: int = 200, w: int = 240, seed: int = 0
) -> NDArray[np.uint8]:
    noise = np.random.default_rng(seed).integers(-3, 4, (h, w, 1))
    return np.clip(np.array(color) + noise, 0, 255).astype(np.uint8)


def disc(
    image: NDArray[np.uint8], color: tuple[int, int, int], *, x: int, y: int, r: int
) -> NDArray[np.bool_]:
    yy, xx = np.mgrid[: image.shape[0], : image.shape[1]]
    inside = (xx - x) ** 2 + (yy - y) ** 2 <= r**2
    image[inside] = overview(color, h=image.shape[0], w=image.shape[1], seed=r)[inside]
    return inside


def overlap(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    return np.count_nonzero(a & b) / np.count_nonzero(a | b)


def found(image: NDArray[np.uint8], **config: float) -> NDArray[np.bool_]:
    return find_tissue(image, mpp=8.0, slide_mpp=0.5, config=TissueConfig(**config)).mask


# -- Coverage ------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    mask=masks,
    mpp=st.sampled_from([8.0, 7.3, 1.0]),
    slide_mpp=st.sampled_from([0.25, 0.2738, 0.499, 0.5]),
    data=st.data(),
)
def test_coverage_is_the_exact_area(
    mask: NDArray[np.bool_], mpp: float, slide_mpp: float, data: st.DataObject
) -> None:
    tissue = TissueMask(mask, mpp, slide_mpp)
    lines = st.lists(st.integers(0, 18 * 8), min_size=2, max_size=5, unique=True).map(sorted)
    # Lines in eighths of a mask pixel, so that eight samples a pixel are no estimate but exact.
    x8, y8 = data.draw(lines), data.draw(lines)
    got = tissue.coverage(np.array(x8) / 8 * mpp / slide_mpp, np.array(y8) / 8 * mpp / slide_mpp)
    fine = np.zeros((18 * 8, 18 * 8))
    sampled = np.kron(mask, np.ones((8, 8)))
    fine[: sampled.shape[0], : sampled.shape[1]] = sampled
    for i, (top, bottom) in enumerate(itertools.pairwise(y8)):
        for j, (left, right) in enumerate(itertools.pairwise(x8)):
            assert got[i, j] == pytest.approx(fine[top:bottom, left:right].mean(), abs=1e-6)


def test_coverage_at_arbitrary_positions_agrees_with_supersampling() -> None:
    rng = np.random.default_rng(3)
    tissue = TissueMask(rng.random((40, 50)) < 0.4, 8.0, 0.2738)
    x, y = np.sort(rng.uniform(-50, 1700, 9)), np.sort(rng.uniform(-50, 1400, 8))
    got = tissue.coverage(x, y)
    for i in range(7):
        for j in range(8):
            ys = y[i] + (np.arange(600) + 0.5) / 600 * (y[i + 1] - y[i])
            xs = x[j] + (np.arange(600) + 0.5) / 600 * (x[j + 1] - x[j])
            r = np.floor(ys * 0.2738 / 8).astype(int)
            c = np.floor(xs * 0.2738 / 8).astype(int)
            rows, cols = (r >= 0) & (r < 40), (c >= 0) & (c < 50)
            inside = np.zeros((600, 600))
            inside[np.ix_(rows, cols)] = tissue.mask[np.ix_(r[rows], c[cols])]
            assert got[i, j] == pytest.approx(inside.mean(), abs=5e-3)


def test_coverage_refuses_lines_that_do_not_ascend() -> None:
    tissue = TissueMask(np.ones((2, 2), np.bool_), 8.0, 0.5)
    with pytest.raises(ValueError, match="ascend"):
        tissue.coverage(np.array([0.0, 5.0, 5.0]), np.array([0.0, 1.0]))


@pytest.mark.parametrize("slide_mpp", [0.25, 0.2738, 0.499, 0.5, 1.7])
def test_the_mask_has_no_offset_at_any_downsample(slide_mpp: float) -> None:
    # A disc drawn in level-0 px and area-averaged at a non-integer ratio: centroid must agree.
    ratio = 8.0 / slide_mpp
    cx, cy, r = 700.3 / slide_mpp, 500.9 / slide_mpp, 300 / slide_mpp
    h, w = 140, 180
    sub = (np.arange(8) + 0.5) / 8
    xs = ((np.arange(w)[:, None] + sub) * ratio).ravel()
    ys = ((np.arange(h)[:, None] + sub) * ratio).ravel()
    inside = (xs - cx) ** 2 + (ys[:, None] - cy) ** 2 <= r**2
    share = inside.reshape(h, 8, w, 8).mean(axis=(1, 3))[..., None]
    rgb = np.rint(share * np.array(PINK) + (1 - share) * np.array(GLASS)).astype(np.uint8)
    tissue = find_tissue(rgb, mpp=8.0, slide_mpp=slide_mpp)

    corners = np.concatenate([outer for outer, _ in tissue.polygons()])
    centre = (corners.min(axis=0) + corners.max(axis=0)) / 2
    assert np.abs(centre - (cx, cy)).max() <= 0.6 * ratio
    rows, cols = np.nonzero(tissue.mask)
    assert (cols.mean() + 0.5) * ratio == pytest.approx(cx, abs=0.25 * ratio)
    assert (rows.mean() + 0.5) * ratio == pytest.approx(cy, abs=0.25 * ratio)
    assert tissue.area_mm2 == pytest.approx(math.pi * 0.3**2, rel=0.1)


# -- Files ---------------------------------------------------------------------------------------


@given(mask=masks)
def test_png_round_trip_in_one_bit(mask: NDArray[np.bool_]) -> None:
    data = TissueMask(mask, 8.0, 0.25).to_png()
    width, height, depth, color = struct.unpack(">IIBB", data[16:26])
    assert (height, width) == mask.shape
    assert (depth, color) == (1, 0)
    assert np.array_equal(TissueMask.from_png(data, mpp=8.0, slide_mpp=0.25).mask, mask)


def test_from_png_refuses_what_is_no_png() -> None:
    for data in (b"", b"not a png"):
        with pytest.raises(ValueError, match="not a PNG"):
            TissueMask.from_png(data, mpp=8.0, slide_mpp=0.5)


# -- Finding tissue ------------------------------------------------------------------------------


@pytest.mark.parametrize("glass", [GLASS, (228, 226, 214), (205, 204, 203), (255, 255, 255)])
def test_glass_alone_has_no_tissue(glass: tuple[int, int, int]) -> None:
    assert not found(overview(glass)).any()


@pytest.mark.parametrize("color", [PINK, PURPLE, BROWN, GREY, (200, 170, 200)])
def test_a_slide_full_of_tissue_is_full(color: tuple[int, int, int]) -> None:
    assert found(overview(color)).all()


@pytest.mark.parametrize("color", [PINK, PURPLE, PALE, GREY, BROWN, COUNTERSTAIN])
@pytest.mark.parametrize("glass", [GLASS, (228, 226, 220)])
def test_each_stain_is_found_on_glass(
    color: tuple[int, int, int], glass: tuple[int, int, int]
) -> None:
    image = overview(glass)
    if min(glass) < 225:
        color = tuple(round(c * g / 243) for c, g in zip(color, glass, strict=True))  # type: ignore[assignment]
    truth = disc(image, color, x=110, y=90, r=60)
    assert overlap(found(image), truth) > 0.94


def test_pale_tissue_beside_dark_is_found() -> None:
    image = overview()
    truth = disc(image, PURPLE, x=60, y=90, r=50) | disc(image, PALE, x=180, y=100, r=40)
    assert overlap(found(image), truth) > 0.93


def test_black_scanner_background_is_not_tissue() -> None:
    image = overview()
    truth = disc(image, PINK, x=130, y=110, r=50)
    image[:30] = 0
    image[:, :25] = (4, 2, 3)
    image[:, 236:] = 0  # narrower than 40 µm at the border of the image, still fill
    mask = found(image)
    assert not mask[:30].any()
    assert not mask[:, :25].any()
    assert not mask[:, 236:].any()
    assert overlap(mask, truth) > 0.93


def test_white_fill_beside_darker_glass_is_not_tissue_nor_is_the_glass() -> None:
    image = overview((228, 227, 226))
    image[:, :100] = 255
    truth = disc(image, PINK, x=170, y=110, r=40)
    assert overlap(found(image), truth) > 0.93


@pytest.mark.parametrize("ink", [BLUE_INK, GREEN_INK, BLACK_INK])
def test_marker_is_not_tissue(ink: tuple[int, int, int]) -> None:
    image = overview()
    truth = disc(image, PINK, x=90, y=100, r=70)
    stroke = np.zeros(truth.shape, np.uint8)
    cv2.line(stroke, (120, 10), (225, 190), 1, 14)
    image[stroke > 0] = overview(ink, seed=9)[stroke > 0]
    assert overlap(found(image), truth & (stroke == 0)) > 0.9
    assert np.count_nonzero(found(image)[stroke > 0]) <= 0.02 * np.count_nonzero(stroke)


def test_specks_of_dye_and_of_pigment_stay_in_the_tissue() -> None:
    image = overview()
    truth = disc(image, PINK, x=110, y=100, r=70)
    for k, color in enumerate((GREEN_INK, BLACK_INK, BLUE_INK)):
        image[60 + 20 * k : 63 + 20 * k, 80:140] = color
    assert overlap(found(image), truth) > 0.94


def test_a_blue_stain_is_not_taken_for_ink() -> None:
    image = overview()
    truth = disc(image, (60, 120, 190), x=110, y=100, r=70)  # trichrome, all of it
    assert overlap(found(image), truth) > 0.94


def test_small_pieces_and_small_holes_go_and_large_ones_stay() -> None:
    image = overview()
    truth = disc(image, PINK, x=110, y=100, r=80)
    large = disc(image, GLASS, x=80, y=100, r=15)  # 45,000 µm²
    disc(image, GLASS, x=140, y=100, r=4)  # 3,200 µm²
    disc(image, PURPLE, x=15, y=15, r=3)  # 1,800 µm²
    mask = found(image)
    assert not mask[100, 80]
    assert mask[100, 140]
    assert not mask[15, 15]
    assert overlap(mask, truth & ~large) > 0.94
    assert [len(h) for _, h in TissueMask(mask, 8.0, 0.5).polygons()] == [1]

    keep = {"min_area_um2": 0, "min_hole_um2": 0}
    assert not found(image, **keep)[100, 140]
    assert found(image, **keep)[15, 15]


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 2)])
@pytest.mark.parametrize("color", [GLASS, PINK, BLACK_INK, BLUE_INK])
def test_overviews_of_a_few_pixels(shape: tuple[int, int], color: tuple[int, int, int]) -> None:
    image = np.full((*shape, 3), color, np.uint8)
    tissue = find_tissue(image, mpp=8.0, slide_mpp=0.5)
    assert tissue.mask.shape == shape
    assert not tissue.mask.any()  # below the smallest area kept


def test_bad_settings_are_refused() -> None:
    for fields in ({"mpp": 0.0}, {"min_area_um2": -1.0}, {"min_od": 0.5}, {"max_od": 2.0}):
        with pytest.raises(ConfigError):
            TissueConfig(**fields)
    with pytest.raises(ValueError, match="uint8"):
        find_tissue(np.zeros((4, 4, 3), np.float32), mpp=8.0, slide_mpp=0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bool"):
        TissueMask(np.zeros((4, 4), np.uint8), 8.0, 0.5)  # type: ignore[arg-type]


# -- A real slide --------------------------------------------------------------------------------


def test_real_tissue(real: NDArray[np.uint8]) -> None:
    h, w = (math.ceil(n * 0.499 / 8) for n in real.shape[:2])
    tissue = find_tissue(
        cv2.resize(real, (w, h), interpolation=cv2.INTER_AREA), mpp=8.0, slide_mpp=0.499
    )
    assert 0.55 < tissue.area_mm2 < 0.8
    assert tissue.mask[120, 70]  # epithelium
    assert not tissue.mask[:, :3].any()  # glass at the left
    assert not tissue.mask[30:60, 115:].any()
