"""Reading at exact scale: the direct path against OpenSlide, and both against slow references."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import openslide
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from pathflip.errors import SlideError
from pathflip.geometry import Tiling, patch_rects
from pathflip.slides import slide as slide_module
from pathflip.slides.direct import Tiles
from pathflip.slides.slide import Slide
from pathflip.synth.large import make_slide
from tests.unit.slides.area import averages, by_area

REAL = Path(__file__).resolve().parents[4] / "shared" / "slides" / "CMU-1-Small-Region.svs"
TILING = Tiling(region_um=512.0, min_region_patches=0.0)
PX = TILING.patch_px
KINDS = {
    "tile is patch": {"mpp": 0.5, "tile_px": 256},
    "240 px tiles": {"mpp": 0.5, "tile_px": 240},
    "240 px RGB tiles": {"mpp": 0.5, "tile_px": 240, "layout": "aperio", "components": "rgb"},
    "40x": {"mpp": 0.25, "layout": "aperio"},
    "40x, stored at 20x too": {"mpp": 0.25},
    "0.2738": {"mpp": 0.2738, "layout": "aperio"},
    "0.2": {"mpp": 0.2, "layout": "aperio"},  # 640 px: even, but a pixel is 2.5
}


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("slides")
    found = {}
    for index, (name, kind) in enumerate(KINDS.items()):
        side = round(1200 / kind["mpp"]) + 7  # no multiple of any tile
        suffix = ".svs" if kind.get("layout") == "aperio" else ".tif"
        found[name] = make_slide(folder / f"{index}{suffix}", width=side, height=side, **kind)
    return found


def rects_of(opened: Slide) -> NDArray[np.int64]:
    """Patches of four regions around the middle of the slide."""
    regions = [patch_rects(TILING, rx=rx, ry=ry, mpp=opened.mpp) for ry in (0, 1) for rx in (0, 1)]
    return np.concatenate(regions)


def read(opened: Slide, rects: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    out = np.full((len(rects), PX, PX, 3), 99, np.uint8)
    return out, opened.read_patches(rects, mpp=TILING.mpp, out=out)


def stored(path: Path, x: int, y: int, w: int, h: int) -> NDArray[np.uint8]:
    """Level-0 pixels by OpenSlide itself."""
    with openslide.OpenSlide(path) as handle:
        return np.asarray(handle.read_region((x, y), 0, (w, h)).convert("RGB"))


def gap(a: NDArray[np.uint8], b: NDArray[np.uint8] | NDArray[np.float64]) -> NDArray[np.float64]:
    return np.abs(a.astype(np.float64) - b)


# -- both paths, and the truth ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_direct_patches_are_openslides(slides: dict[str, Path], kind: str) -> None:
    with Slide(slides[kind]) as opened:
        assert opened.reader == "direct", opened.reader_note
        rects = rects_of(opened)
        direct, direct_ok = read(opened, rects)
        opened._direct = {}
        through, through_ok = read(opened, rects)
    assert direct_ok.all()
    assert through_ok.all()
    assert direct.std() > 10
    # An odd corner has no place on a level of half size: there OpenSlide interpolates.
    tolerance = 2.0 if kind == "40x, stored at 20x too" else 0.0
    assert gap(direct, through).mean() <= tolerance


@pytest.mark.parametrize("kind", ["tile is patch", "240 px tiles", "240 px RGB tiles"])
def test_native_patches_are_the_stored_pixels(slides: dict[str, Path], kind: str) -> None:
    with Slide(slides[kind]) as opened:
        rects = rects_of(opened)[5:40:7]
        patches, _ = read(opened, rects)
    for patch, rect in zip(patches, rects.tolist(), strict=True):
        assert np.array_equal(patch, stored(slides[kind], *rect))


@pytest.mark.parametrize("kind", ["40x", "0.2738", "0.2"])
def test_exact_patches_are_area_averages(slides: dict[str, Path], kind: str) -> None:
    with Slide(slides[kind]) as opened:
        rects = rects_of(opened)[5:40:7]
        assert (rects[:, 2:] > 1.7 * PX).all()
        patches, _ = read(opened, rects)
    for patch, rect in zip(patches, rects.tolist(), strict=True):
        difference = gap(patch, by_area(stored(slides[kind], *rect), PX))
        assert difference.mean() < 0.4  # rounding to whole grey levels alone is 0.25
        assert difference.max() < 2


def test_halving_of_odd_corners_is_exact(slides: dict[str, Path]) -> None:
    with Slide(slides["40x"]) as opened:
        rects = rects_of(opened)[5:40:7] + np.array([1, 3, 0, 0])
        patches, _ = read(opened, rects)
    for patch, rect in zip(patches, rects.tolist(), strict=True):
        assert gap(patch, by_area(stored(slides["40x"], *rect), PX)).max() <= 1.0


def test_dct_halving_is_near_the_area_average(slides: dict[str, Path]) -> None:
    with Slide(slides["40x"]) as opened:
        rects = rects_of(opened)
        exact, _ = read(opened, rects)
    with Slide(slides["40x"], halving="dct") as opened:
        halved, ok = read(opened, rects)
    assert ok.all()
    difference = gap(halved, exact)
    assert 0 < difference.mean() < 3
    assert 10 * np.log10(255**2 / np.mean(difference**2)) > 40


@pytest.mark.parametrize("halving", ["exact", "dct"])
def test_read_at_half_scale_is_near_area_averaged_truth(
    slides: dict[str, Path], halving: str
) -> None:
    with Slide(slides["40x"], halving=halving) as opened:  # type: ignore[arg-type]
        view = opened.read(612, 1030, 300, mpp=0.5)
    truth = by_area(stored(slides["40x"], 612, 1030, 600, 600), 300)
    assert gap(view, truth).mean() < 3
    if halving == "exact":
        assert gap(view, truth).max() <= 1


def test_overview_covers_the_slide_at_its_scale(slides: dict[str, Path]) -> None:
    path = slides["0.2738"]
    with Slide(path) as opened:
        view = opened.overview(8.0)
        side = opened.width
        cell = 8.0 / opened.mpp
    assert view.shape == (int(np.ceil(side / cell)),) * 2 + (3,)
    inside = slice(side // 3, side // 3 + 900)  # level-0 pixels of tissue
    first, last = int(np.ceil(inside.start / cell)), int(inside.stop / cell)
    lines = np.arange(first, last + 1) * cell - inside.start
    truth = averages(stored(path, inside.start, inside.start, 900, 900), lines, lines)
    assert gap(view[first:last, first:last], truth).mean() < 3


# -- read() at stored levels -----------------------------------------------------------------------


def test_read_equals_openslide_on_a_real_slide() -> None:
    if not REAL.exists():
        pytest.skip(f"{REAL.name} is not in shared/slides")
    rng = np.random.default_rng(3)
    with Slide(REAL) as opened:
        assert opened.reader == "direct"
        for _ in range(8):
            x, y = (int(rng.integers(0, side - 400)) for side in (opened.width, opened.height))
            w, h = (int(n) for n in rng.integers(1, 400, 2))
            assert np.array_equal(opened.read(x, y, (w, h)), stored(REAL, x, y, w, h))
            native = opened.read(x, y, (w, h), mpp=opened.mpp)
            assert np.array_equal(native, stored(REAL, x, y, w, h))


@pytest.mark.parametrize("direct", [True, False])
def test_outside_is_white(slides: dict[str, Path], direct: bool) -> None:
    with Slide(slides["240 px tiles"]) as opened:
        if not direct:
            opened._direct = {}
        side = opened.width
        corner = opened.read(-30, -20, 64)
        assert (corner[:20] == 255).all()
        assert (corner[:, :30] == 255).all()
        assert np.array_equal(corner[20:, 30:], stored(slides["240 px tiles"], 0, 0, 34, 44))
        last = opened.read(side - 10, side - 12, 64)
        assert (last[12:] == 255).all()
        assert (last[:, 10:] == 255).all()
        assert (opened.read(side + 500, 0, 8) == 255).all()


def test_alpha_is_composited_on_white(slides: dict[str, Path]) -> None:
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = (200, 100, 0, 255)
    rgba[0, 1] = (200, 100, 0, 128)
    rgba[1, 0] = (0, 0, 0, 0)
    rgba[1, 1] = (10, 20, 30, 51)
    with Slide(slides["tile is patch"]) as opened:
        opened._direct = {}
        handle = opened._handle
        opened._handle = SimpleNamespace(read_region=lambda *_: Image.fromarray(rgba, "RGBA"))
        seen = opened.read(0, 0, 2)
        opened._handle = handle
    assert seen[0, 0].tolist() == [200, 100, 0]
    assert seen[0, 1].tolist() == [227, 177, 127]  # 200 * 128/255 + 255 * 127/255, …
    assert seen[1, 0].tolist() == [255, 255, 255]
    assert seen[1, 1].tolist() == [206, 208, 210]


# -- damage ----------------------------------------------------------------------------------------


def touched(rects: NDArray[np.int64], column: int, row: int, side: int) -> NDArray[np.bool_]:
    x, y, w, h = rects.T
    return np.asarray(
        (x < (column + 1) * side)
        & (x + w > column * side)
        & (y < (row + 1) * side)
        & (y + h > row * side)
    )


@pytest.mark.parametrize("kind", ["tile is patch", "240 px tiles", "40x", "0.2738"])
@pytest.mark.parametrize("direct", [True, False])
def test_a_damaged_tile_costs_the_patches_it_touches(
    slides: dict[str, Path], kind: str, direct: bool, tmp_path: Path
) -> None:
    path = Path(shutil.copy(slides[kind], tmp_path))
    with Slide(path) as opened:
        layout = opened._direct[0]
        rects = rects_of(opened)
        clean, _ = read(opened, rects)
        column = row = layout.across // 2 - 1
        tile = row * layout.across + column
    with open(path, "r+b") as file:
        file.seek(int(layout.offsets[tile]))
        file.write(b"\0" * int(layout.counts[tile]))
    with Slide(path) as opened:
        assert opened.reader == "direct"
        if not direct:
            opened._direct = {}
        for _ in range(2):  # OpenSlide's handle is dead after an error: it must be another now
            patches, ok = read(opened, rects)
            hit = touched(rects, column, row, layout.tile_w)
            assert 0 < hit.sum() < 20
            assert np.array_equal(ok, ~hit)
            assert np.array_equal(patches[ok], clean[ok])
        with pytest.raises(SlideError) as caught:
            opened.read(column * layout.tile_w, row * layout.tile_h, 16)
        assert caught.value.code == "bad_tile"


def test_pixels_unlike_openslides_end_the_direct_path(
    slides: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(Tiles):
        def decode(self, tile: int, out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
            pixels = super().decode(tile, out)
            pixels[...] = pixels[..., ::-1].copy()
            return pixels

    monkeypatch.setattr(slide_module, "Tiles", Wrong)
    path = slides["240 px RGB tiles"]
    with Slide(path) as opened:
        assert opened.reader == "openslide"
        assert "differ from OpenSlide" in opened.reader_note
        rects = rects_of(opened)[5:40:7]
        patches, ok = read(opened, rects)
    assert ok.all()
    for patch, rect in zip(patches, rects.tolist(), strict=True):
        assert np.array_equal(patch, stored(path, *rect))


def test_no_patches_is_no_error(slides: dict[str, Path]) -> None:
    with Slide(slides["240 px tiles"]) as opened:
        _, ok = read(opened, np.empty((0, 4), np.int64))
    assert ok.shape == (0,)


def test_patches_may_overlap_and_repeat(slides: dict[str, Path]) -> None:
    with Slide(slides["tile is patch"]) as opened:
        one = np.array([512, 512, PX, PX])
        rects = np.stack([one, one, one + np.array([100, 30, 0, 0]), one])
        patches, ok = read(opened, rects)
    assert ok.all()
    for patch, rect in zip(patches, rects.tolist(), strict=True):
        assert np.array_equal(patch, stored(slides["tile is patch"], *rect))


def test_a_file_is_parsed_once(slides: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """One parse of the TIFF serves the limits and the direct path."""
    parsed = []

    class Counted(tifffile.TiffFile):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            parsed.append(arguments)
            super().__init__(*arguments, **options)

    monkeypatch.setattr(tifffile, "TiffFile", Counted)
    with Slide(slides["40x"]) as opened:
        assert opened.reader == "direct"
    assert len(parsed) == 1


# -- what is refused -------------------------------------------------------------------------------


def test_what_is_no_slide_has_its_reason(tmp_path: Path) -> None:
    empty = tmp_path / "empty.svs"
    empty.touch()
    text = tmp_path / "text.svs"
    text.write_text("not a slide")
    folder = tmp_path / "folder"
    folder.mkdir()
    reasons = {tmp_path / "missing.svs": "not_a_file", empty: "not_a_file", folder: "not_a_file"}
    for path, code in (reasons | {text: "unreadable"}).items():
        with pytest.raises(SlideError) as caught:
            Slide(path)
        assert caught.value.code == code


def _area_reference(pixels, scale, size):
    """Area average from the corner on, one output pixel after the other."""
    rows = np.zeros((size, len(pixels)))
    for i in range(size):
        for j in range(int(i * scale), min(len(pixels), int(np.ceil((i + 1) * scale)))):
            rows[i, j] = min((i + 1) * scale, j + 1) - max(i * scale, j)
    rows /= rows.sum(axis=1, keepdims=True)
    return np.einsum("ik,jl,klc->ijc", rows, rows, pixels.astype(float), optimize=True)


@pytest.mark.parametrize("scale", [1.23, 1.8262, 3.17])
def test_read_keeps_its_scale_to_the_far_corner(tmp_path, scale):
    path = tmp_path / "one.svs"
    make_slide(path, width=2048, height=2048, mpp=0.5, layout="aperio", seed=9)
    slide = Slide(path)
    slide.level_for = lambda ratio: 0  # the levels of synthetic slides are not equal pixels
    size = int(1400 / scale)
    read = slide.read(300, 200, size, mpp=0.5 * scale).astype(float)
    expected = _area_reference(slide.read(300, 200, 1410), scale, size)
    gap = np.abs(read - expected)
    assert gap.mean() < 0.6
    assert gap[-100:, -100:].mean() < 0.6


@pytest.mark.parametrize("mpp", [0.4955, 0.504])
def test_a_patch_is_the_same_whatever_is_read_with_it(tmp_path, mpp):
    path = tmp_path / "one.svs"
    make_slide(path, width=2048, height=2048, mpp=mpp, layout="aperio", seed=9)
    slide = Slide(path)
    rects = patch_rects(Tiling(region_um=1024.0), rx=0, ry=0, mpp=mpp)
    rects = rects[((rects[:, :2] + rects[:, 2:]) <= 2048).all(axis=1)]
    together = np.empty((len(rects), 256, 256, 3), np.uint8)
    alone = np.empty((1, 256, 256, 3), np.uint8)
    assert slide.read_patches(rects, mpp=0.5, out=together).all()
    for i in range(len(rects)):
        slide.read_patches(rects[i : i + 1], mpp=0.5, out=alone)
        assert (alone[0] == together[i]).all()
    slide._direct = {}
    through_openslide = np.empty_like(together)
    assert slide.read_patches(rects, mpp=0.5, out=through_openslide).all()
    assert (through_openslide == together).all()


def test_a_damaged_tile_does_not_cost_the_overview(tmp_path):
    path = tmp_path / "one.svs"
    make_slide(path, width=2048, height=2048, mpp=0.5, layout="aperio", seed=9)
    level = Slide(path)._direct[Slide(path).level_for(16.0)]
    with open(path, "r+b") as file:
        file.seek(int(level.offsets[0]) + int(level.counts[0]) // 2)
        file.write(b"\0" * 40)
    slide = Slide(path)
    assert slide.overview(8.0).shape == (128, 128, 3)
    slide._direct = {}
    assert slide.overview(8.0).shape == (128, 128, 3)
