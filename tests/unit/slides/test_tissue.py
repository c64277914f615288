"""Tissue masks and patch scores against planted truth, supersampling and a real slide."""

from __future__ import annotations

import itertools
import json
import math
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from pathflip.errors import ConfigError
from pathflip.slides.tissue import TissueConfig, TissueMask, find_tissue, patch_quality

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
SLIDE = Path(__file__).parents[4] / "shared" / "slides" / "CMU-1-Small-Region.svs"

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


# -- Files and outlines --------------------------------------------------------------------------


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


def collection(tissue: TissueMask) -> dict[str, object]:
    return {
        "type": "MultiPolygon",
        "coordinates": [
            [[*ring.tolist(), ring[0].tolist()] for ring in (outer, *holes)]
            for outer, holes in tissue.polygons()
        ],
    }


@settings(max_examples=300, deadline=None)
@given(mask=masks, slide_mpp=st.sampled_from([0.25, 0.2738, 0.499]))
def test_polygons_filled_again_are_the_mask(
    tmp_path_factory: pytest.TempPathFactory, mask: NDArray[np.bool_], slide_mpp: float
) -> None:
    tissue = TissueMask(mask, 8.0, slide_mpp)
    polygons = tissue.polygons()
    pieces, _ = cv2.connectedComponents(mask.view(np.uint8), connectivity=4)
    assert len(polygons) == pieces - 1
    area = 0.0
    for outer, holes in polygons:
        for ring, sign in ((outer, 1), *((hole, -1) for hole in holes)):
            assert len(np.unique(ring, axis=0)) == len(ring), "a ring meets itself"
            x, y = ring.T
            signed = (x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2 * (slide_mpp / 8) ** 2
            assert signed * sign > 0
            area += signed
    assert area == pytest.approx(np.count_nonzero(mask))
    if not polygons:
        return
    path = tmp_path_factory.getbasetemp() / "mask.geojson"
    path.write_text(json.dumps(collection(tissue)))
    # The largest whole slide that needs this many mask pixels.
    h, w = (math.floor(n * 8 / slide_mpp) for n in mask.shape)
    back = TissueMask.from_geojson(path, width=w, height=h, slide_mpp=slide_mpp)
    assert np.array_equal(back.mask, mask)


def test_polygons_agree_with_opencv_on_a_ring_with_an_island() -> None:
    mask = np.zeros((30, 30), np.bool_)
    mask[2:28, 2:28] = True
    mask[8:22, 8:22] = False
    mask[12:18, 12:18] = True
    polygons = TissueMask(mask, 8.0, 8.0).polygons()
    _, tree = cv2.findContours(mask.view(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    assert len(polygons) == np.count_nonzero(tree[0, :, 3] < 0) == 2
    assert sum(len(holes) for _, holes in polygons) == np.count_nonzero(tree[0, :, 3] >= 0) == 1
    ring, island = polygons
    assert sorted(map(tuple, ring[0])) == [(2, 2), (2, 28), (28, 2), (28, 28)]
    assert sorted(map(tuple, ring[1][0])) == [(8, 8), (8, 22), (22, 8), (22, 22)]
    assert sorted(map(tuple, island[0])) == [(12, 12), (12, 18), (18, 12), (18, 18)]


def test_annotation_is_filled_where_pixel_centres_are_inside(tmp_path: Path) -> None:
    path = tmp_path / "a.geojson"
    triangle = [[100.0, 40.0], [1900.5, 300.0], [700.0, 1500.0]]
    hole = [[600.0, 400.0], [900.0, 400.0], [900.0, 700.0], [600.0, 700.0]]
    geometry = {"type": "Polygon", "coordinates": [[*r, r[0]] for r in (triangle, hole)]}
    path.write_text(json.dumps({"type": "Feature", "geometry": geometry, "properties": {}}))
    tissue = TissueMask.from_geojson(path, width=2000, height=1600, slide_mpp=0.499)
    assert tissue.mask.shape == (100, 125)
    yy, xx = (np.mgrid[:100, :125] + 0.5) * 8 / 0.499
    expected = np.ones((100, 125), np.bool_)
    for a, b in zip(triangle, triangle[1:] + triangle[:1], strict=True):
        expected &= (b[0] - a[0]) * (yy - a[1]) - (b[1] - a[1]) * (xx - a[0]) > 0
    expected &= ~((xx > 600) & (xx < 900) & (yy > 400) & (yy < 700))
    assert np.array_equal(tissue.mask, expected)

    shifted = TissueMask.from_geojson(
        path, width=2000, height=1600, slide_mpp=0.499, bounds_x0=160, bounds_y0=320
    )
    assert np.count_nonzero(shifted.mask) != np.count_nonzero(tissue.mask)
    assert np.array_equal(
        shifted.mask,
        TissueMask.from_geojson(
            _moved(path, tmp_path / "b.geojson", dx=160, dy=320),
            width=2000,
            height=1600,
            slide_mpp=0.499,
        ).mask,
    )


@settings(max_examples=100, deadline=None)
@given(
    corners=st.lists(
        st.tuples(st.floats(-300, 1300), st.floats(-300, 1300)), min_size=3, max_size=7
    )
)
def test_any_polygon_is_filled_by_the_even_odd_rule_at_centres(
    tmp_path_factory: pytest.TempPathFactory, corners: list[tuple[float, float]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.geojson"
    box = [[-9, -9], [-9, 0.1], [0.1, 0.1], [0.1, -9]]  # keeps the file on the slide
    path.write_text(
        json.dumps({"type": "MultiPolygon", "coordinates": [[[*corners, corners[0]]], [box]]})
    )
    mask = TissueMask.from_geojson(path, width=1000, height=800, slide_mpp=0.2738).mask
    for i, j in np.ndindex(mask.shape):
        x, y, crossings = (j + 0.5) * 8 / 0.2738, (i + 0.5) * 8 / 0.2738, 0
        margin = math.inf
        for (x1, y1), (x2, y2) in zip(corners, corners[1:] + corners[:1], strict=True):
            margin = min(margin, abs(y1 - y))
            if (y1 > y) != (y2 > y):
                at = x1 + (y - y1) * (x2 - x1) / (y2 - y1)
                crossings += at > x
                margin = min(margin, abs(at - x))
        if margin > 1e-6:  # on the line either answer is right
            assert mask[i, j] == crossings % 2


def _moved(source: Path, target: Path, *, dx: float, dy: float) -> Path:
    feature = json.loads(source.read_text())
    rings = feature["geometry"]["coordinates"]
    feature["geometry"]["coordinates"] = [[[x + dx, y + dy] for x, y in r] for r in rings]
    target.write_text(json.dumps(feature))
    return target


def test_overlapping_annotations_add_up_and_reach_beyond_the_slide(tmp_path: Path) -> None:
    path = tmp_path / "a.geojson"
    boxes = [(-500, -500, 400, 400), (160, 160, 9000, 9000)]
    path.write_text(
        json.dumps(
            [
                {"type": "Polygon", "coordinates": [[[a, b], [c, b], [c, d], [a, d], [a, b]]]}
                for a, b, c, d in boxes
            ]
        )
    )
    mask = TissueMask.from_geojson(path, width=800, height=640, slide_mpp=0.5).mask
    expected = np.zeros((40, 50), np.bool_)
    expected[:25, :25] = True
    expected[10:, 10:] = True
    assert np.array_equal(mask, expected)


def test_annotation_elsewhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.geojson"
    far = [[5000, 0], [6000, 0], [6000, 900], [5000, 0]]
    path.write_text(json.dumps({"type": "Polygon", "coordinates": [far]}))
    with pytest.raises(ConfigError, match=r"other\.geojson"):
        TissueMask.from_geojson(path, width=800, height=640, slide_mpp=0.5)


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


# -- Patch quality -------------------------------------------------------------------------------


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


# -- A real slide --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real() -> NDArray[np.uint8]:
    if not SLIDE.exists():
        pytest.skip(f"{SLIDE.name} is not here")
    import openslide

    slide = openslide.OpenSlide(SLIDE)
    return np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))


def test_real_tissue(real: NDArray[np.uint8]) -> None:
    h, w = (math.ceil(n * 0.499 / 8) for n in real.shape[:2])
    tissue = find_tissue(
        cv2.resize(real, (w, h), interpolation=cv2.INTER_AREA), mpp=8.0, slide_mpp=0.499
    )
    assert 0.55 < tissue.area_mm2 < 0.8
    assert tissue.mask[120, 70]  # epithelium
    assert not tissue.mask[:, :3].any()  # glass at the left
    assert not tissue.mask[30:60, 115:].any()


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
