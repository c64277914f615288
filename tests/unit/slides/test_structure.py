"""Files whose structure misleads readers: refused with a reason, or read around it rightly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
import tifffile
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pathflip.errors import REASONS, SlideError
from pathflip.slides.reader import SlideReader
from pathflip.slides.slide import Slide
from tests.unit.slides import layouts
from tests.unit.slides.layouts import halved

Pixels = NDArray[np.uint8]


def picture(w: int = 1024, h: int = 512, *, seed: int = 0) -> Pixels:
    return layouts.picture(w, h, seed=seed)


def padded(pixels: Pixels, tile: int) -> Pixels:
    h, w = (-(-side // tile) * tile for side in pixels.shape[:2])
    out = np.full((h, w, 3), 255, np.uint8)
    out[: pixels.shape[0], : pixels.shape[1]] = pixels
    return out


def per_cm(mpp: float) -> dict[str, Any]:
    return {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}


def write(path: Path, data: NDArray[Any], **options: Any) -> Path:
    """Write one tiled image at 0.5 µm/px."""
    tifffile.imwrite(
        path,
        data,
        **{
            "tile": (128, 128), "photometric": "rgb", "compression": "deflate", "metadata": None,
            **per_cm(0.5), **options,
        },
    )  # fmt: skip
    return path


def write_pyramid(
    path: Path, levels: list[Pixels], mpps: list[float] | None, *, reduced: bool = True
) -> Path:
    """Write levels, each with its own resolution where ``mpps`` says one."""
    with tifffile.TiffWriter(path) as file:
        for index, pixels in enumerate(levels):
            file.write(
                pixels, tile=(256, 256), photometric="rgb", compression="deflate", metadata=None,
                subfiletype=1 if index and reduced else 0,
                **per_cm(mpps[index] if mpps else 0.5),
            )  # fmt: skip
    return path


def code_of(path: Path) -> str | None:
    try:
        Slide(path).close()
    except SlideError as error:
        return error.code if path.name in error.message and error.hint else "unclear"
    return None


# -- tags ------------------------------------------------------------------------------------------

RGB = picture()
GREY = RGB[..., 1]


def with_samples(*values: int) -> NDArray[np.uint8]:
    return np.dstack([RGB, *(np.full(GREY.shape, value, np.uint8) for value in values)])


@pytest.mark.parametrize(
    ("code", "data", "options"),
    [
        ("orientation", RGB, {"extratags": [(274, 3, 1, 3, True)]}),
        ("orientation", RGB, {"extratags": [(274, 3, 1, 6, True)]}),
        ("orientation", RGB, {"extratags": [(274, 3, 1, 2, True)], "compression": "jpeg"}),
        ("not_rgb", with_samples(0), {"photometric": "separated"}),
        ("not_rgb", RGB, {"photometric": "cielab"}),
        ("bit_depth", GREY.astype(np.uint16) << 4, {"photometric": "minisblack"}),
        ("unsupported", RGB.astype(np.float32) / 255, {}),
        ("unsupported", RGB.astype(np.int8), {}),
        ("unsupported", RGB.astype(np.uint32) << 24, {}),
        ("unsupported", GREY > 128, {"photometric": "minisblack"}),
        ("unsupported", GREY[:, :1000].astype(np.uint16) * 257, {"photometric": "minisblack"}),
        ("extra_samples", with_samples(0), {"extrasamples": ["unspecified"]}),
        ("extra_samples", with_samples(255), {"extrasamples": ["unspecified"]}),
        ("extra_samples", with_samples(128), {"extrasamples": ["assocalpha"]}),
        ("extra_samples", with_samples(1, 2), {"extrasamples": ["unspecified", "unspecified"]}),
        ("bit_depth", RGB.astype(np.uint16) << 4, {}),  # 12 bits in 16
        ("bit_depth", RGB.astype(np.uint16) << 2, {}),  # 10 bits in 16
        ("unsupported", RGB, {"byteorder": ">"}),
        ("unsupported", RGB, {"tile": None, "rowsperstrip": 64}),
        ("unsupported", RGB, {"compression": "webp"}),
        ("unsupported", RGB, {"compression": "jpeg2000"}),
        (None, RGB, {}),
        (None, RGB, {"extratags": [(274, 3, 1, 1, True)]}),
        (None, RGB.astype(np.uint16) * 257, {}),
        (None, with_samples(255), {"extrasamples": ["unassalpha"]}),
        (None, np.moveaxis(RGB, -1, 0).copy(), {"planarconfig": "separate"}),
    ],
)
def test_samples_that_a_reader_would_take_for_others(
    code: str | None, data: NDArray[Any], options: dict[str, Any], tmp_path: Path
) -> None:
    path = write(tmp_path / "a.tif", data, **options)
    assert code_of(path) == code
    assert code is None or code in REASONS
    if code is None:
        with Slide(path) as slide:
            assert np.abs(slide.read(0, 0, (1024, 512)).astype(int) - RGB).max() <= 1


def test_grey_and_palettes_are_the_rgb_that_is_meant(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)
    colours = np.stack([ramp, ramp[::-1], ramp])
    for data, options, expected in (
        (GREY, {"photometric": "minisblack"}, np.dstack([GREY] * 3)),
        (255 - GREY, {"photometric": "miniswhite"}, np.dstack([GREY] * 3)),
        (GREY, {"photometric": "palette", "colormap": colours}, np.dstack([GREY, ~GREY, GREY])),
    ):
        with Slide(write(tmp_path / "a.tif", data, **options)) as slide:
            assert np.abs(slide.read(0, 0, (1024, 512)).astype(int) - expected).max() <= 1


def test_what_is_unsupported_is_named(tmp_path: Path) -> None:
    for options, says in (
        ({"compression": "webp"}, "WebP"),
        ({"compression": "jpeg2000"}, "JPEG 2000"),
        ({"byteorder": ">"}, "most significant byte first"),
        ({"tile": None, "rowsperstrip": 64}, "strips"),
    ):
        with pytest.raises(SlideError, match=says):
            Slide(write(tmp_path / "a.tif", RGB, **options))


# -- several images --------------------------------------------------------------------------------


def write_pages(path: Path, pages: list[Pixels], *, ome: bool = False) -> Path:
    with tifffile.TiffWriter(path, ome=ome) as file:
        for pixels in pages:
            file.write(
                pixels, tile=(128, 128), photometric="rgb", compression="deflate",
                metadata={"axes": "YXS"} if ome else None, subfiletype=0, **per_cm(0.5),
            )  # fmt: skip
    return path


@pytest.mark.parametrize(
    ("pages", "ome"),
    [
        ([RGB, picture(seed=1)], True),  # two scenes of one size
        ([RGB, halved(picture(seed=1))], True),  # of two sizes, as a level would be
        ([halved(halved(RGB)), RGB], True),  # a macro image stored first
        ([halved(RGB), RGB], False),
        ([RGB, picture(512, 512, seed=1)], False),  # another shape
        ([RGB] + [picture(seed=n)[:256, :512] for n in (1, 2, 3)], False),  # planes
    ],
)
def test_an_image_that_nobody_would_read_refuses_the_slide(
    pages: list[Pixels], ome: bool, tmp_path: Path
) -> None:
    path = write_pages(tmp_path / "a.tif", pages, ome=ome)
    assert code_of(path) == "several_images"


def test_levels_that_are_not_marked_are_said_and_not_used(tmp_path: Path) -> None:
    levels = [RGB, halved(RGB), halved(halved(RGB))]
    with Slide(write_pyramid(tmp_path / "a.tif", levels, None, reduced=False)) as slide:
        assert slide.levels == 1
        assert "2 smaller pages" in slide.reader_note
        assert np.array_equal(slide.read(0, 0, (1024, 512)), RGB)


# -- levels ----------------------------------------------------------------------------------------


def pyramid(base: Pixels, count: int, change: Callable[[Pixels], Pixels]) -> list[Pixels]:
    levels, here = [base], base
    for _ in range(count):
        here = halved(here)
        levels.append(change(here))
    return levels


@pytest.mark.parametrize(
    ("size", "mpps"),
    [
        ((2600, 1400), None),  # sides that disagree
        ((2060, 2060), None),  # sides that agree: only the pixels tell
        ((2060, 2060), [0.25, 0.5, 1.0]),  # or what each level states
    ],
)
def test_levels_padded_to_whole_tiles_are_not_used(
    size: tuple[int, int], mpps: list[float] | None, tmp_path: Path
) -> None:
    base = picture(*size)
    path = write_pyramid(
        tmp_path / "a.tif", pyramid(base, 2, lambda level: padded(level, 256)), mpps
    )
    with Slide(path, mpp=0.25) as slide:
        assert slide.levels == 1
        assert "Level 1 of a.tif" in slide.reader_note
        # Far from the origin a padded level is off by dozens of pixels.
        x, y = size[0] - 512, size[1] - 512
        expected = halved(base[y : y + 512, x : x + 512])
        got = slide.read(x, y, 256, mpp=0.5)
        assert np.abs(got.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("mpps", [None, [0.25, 0.5, 1.0], [0.25, 0.25, 0.25]])
def test_levels_that_hold_what_they_say_are_used(mpps: list[float] | None, tmp_path: Path) -> None:
    base = picture(2061, 1403)
    path = write_pyramid(tmp_path / "a.tif", pyramid(base, 2, lambda level: level), mpps)
    with Slide(path, mpp=0.25) as slide:
        assert slide.levels == 3
        assert "Level" not in slide.reader_note


@pytest.mark.parametrize("good", [0, 1])
def test_levels_are_compared_when_they_are_about_to_be_used(
    good: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is read first: the levels after the first ``good`` are padded, and never used."""
    base = picture(4 * 520, 4 * 520)
    levels = pyramid(base, 3, lambda level: level)
    levels[1 + good :] = [padded(level, 256) for level in levels[1 + good :]]
    path = write_pyramid(tmp_path / "a.tif", levels, None)
    read: set[int] = set()
    plain = openslide.OpenSlide.read_region

    def counting(self: Any, place: Any, level: int, size: Any) -> Any:
        read.add(level)
        return plain(self, place, level, size)

    monkeypatch.setattr(openslide.OpenSlide, "read_region", counting)
    with Slide(path, mpp=0.25) as slide:
        slide.read(0, 0, 256)
        assert read == {0}  # nothing of the others was looked at
        small = slide.overview(2.0)
        assert slide.levels == 1 + good
        assert f"Level {1 + good} of a.tif" in slide.reader_note
    with Slide(path, mpp=0.25) as slide:
        assert slide.levels == 1 + good
        assert np.array_equal(slide.overview(2.0), small)
    expected = halved(halved(halved(base)))
    assert np.abs(small.astype(int) - expected).max() <= 2
    with Slide(path, mpp=0.25) as slide:
        out = np.zeros((1, 256, 256, 3), np.uint8)
        corner = 4 * 520 - 1024
        at = np.array([[corner, corner, 1024, 1024]])
        assert slide.read_patches(at, mpp=1.0, out=out).all()
    right = halved(halved(base[corner:, corner:]))
    assert np.abs(out[0].astype(int) - right).max() <= 2


def test_a_level_of_another_picture_is_not_used(tmp_path: Path) -> None:
    base = picture(2048, 1024)
    other = halved(picture(2048, 1024, seed=5))
    with Slide(write_pyramid(tmp_path / "a.tif", [base, other], [0.5, 1.0])) as slide:
        assert slide.levels == 1
        assert "another picture" in slide.reader_note


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda level: np.full_like(level, 255), "other colours"),  # a converter that broke off
        (lambda level: np.zeros_like(level), "other colours"),
        (lambda level: level // 2, "other colours"),
        (lambda level: level // [1, 1, 2], "other colours"),
    ],
)
def test_a_level_that_is_blank_or_recoloured_is_not_used(
    change: Callable[[Pixels], Any], says: str, tmp_path: Path
) -> None:
    base = np.full((1024, 2048, 3), 244, np.uint8)
    base[256:512, 512:1024] = picture(512, 256)
    levels = pyramid(base, 2, lambda level: level)
    levels[1:] = [change(level).astype(np.uint8) for level in levels[1:]]
    with Slide(write_pyramid(tmp_path / "a.tif", levels, [0.5, 1.0, 2.0])) as slide:
        small = slide.overview(2.0)
        assert slide.levels == 1
        assert says in slide.reader_note
    assert np.abs(small.astype(int) - halved(halved(base))).max() <= 2


def test_a_level_that_is_blank_in_one_part_is_not_used(tmp_path: Path) -> None:
    base = picture(4096, 2048)
    whole = pyramid(base, 2, lambda level: level)
    for x, y in ((0, 0), (768, 256), (1792, 768)):  # one tile, wherever it lies
        holed = [level.copy() for level in whole]
        holed[1][y : y + 256, x : x + 256] = 255
        holed[2] = halved(holed[1])
        path = write_pyramid(tmp_path / f"{x}.tif", holed, [0.5, 1.0, 2.0])
        with Slide(path) as slide:
            assert slide.levels == 1
            assert "other colours" in slide.reader_note
    with Slide(write_pyramid(tmp_path / "whole.tif", whole, [0.5, 1.0, 2.0])) as slide:
        assert slide.levels == 3


def test_a_level_as_large_as_the_slide_is_another_image(tmp_path: Path) -> None:
    flat = np.full_like(RGB, 244)
    with Slide(write_pyramid(tmp_path / "a.tif", [RGB, flat], None)) as slide:
        assert slide.levels == 1
        assert "as large as level 0" in slide.reader_note
        out = np.zeros((1, 256, 256, 3), np.uint8)
        assert slide.read_patches(np.array([[256, 128, 256, 256]]), mpp=0.5, out=out).all()
    assert np.array_equal(out[0], RGB[128:384, 256:512])


def test_flat_levels_have_nothing_to_compare(tmp_path: Path) -> None:
    base = np.full((1024, 2048, 3), 244, np.uint8)
    with Slide(write_pyramid(tmp_path / "a.tif", [base, halved(base)], [0.5, 1.0])) as slide:
        assert slide.levels == 2


# -- against an independent reader -----------------------------------------------------------------


NIGHTLY = settings.get_current_profile_name() == "nightly"


@settings(
    max_examples=settings().max_examples if NIGHTLY else 60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)
@given(
    width=st.integers(260, 900),
    height=st.integers(260, 700),
    tile=st.sampled_from([(128, 128), (256, 256), (240, 240), (144, 272)]),
    compression=st.sampled_from(
        [None, "deflate", "lzw", "zstd", "jpeg", "jpeg-420", "jpeg-422", "jpeg-411", "jpeg-ycbcr"]
    ),
    channels=st.sampled_from([3, 3, 3, 1, 4, 5]),
    predictor=st.booleans(),
    planar=st.booleans(),
    deep=st.booleans(),
    big=st.booleans(),
    endian=st.sampled_from("<<<>"),
    orientation=st.sampled_from([1, 1, 1, 1, 2, 3, 6, 8]),
    levels=st.integers(1, 4),
    seed=st.integers(0, 9),
)
def test_pixels_are_those_of_an_independent_reader(
    tmp_path: Path,
    width: int,
    height: int,
    tile: tuple[int, int],
    compression: str | None,
    channels: int,
    predictor: bool,
    planar: bool,
    deep: bool,
    big: bool,
    endian: str,
    orientation: int,
    levels: int,
    seed: int,
) -> None:
    """Every layout is refused for the reason it has, or read as tifffile and imagecodecs read it.

    All levels are compared: each at its own resolution, where it must be what is stored.
    """
    if seed % 2:  # half of the files have levels of exactly half, quarter and eighth
        width, height = (side // 2 ** (levels - 1) * 2 ** (levels - 1) for side in (width, height))
    # Uncompressed tiles are padded to 512 bytes by this writer, which libtiff refuses to read.
    assume(compression or tile[0] * tile[1] % 512 == 0)
    jpeg = compression is not None and compression.startswith("jpeg")
    assume(channels <= 3 or not jpeg)
    assume(compression != "jpeg-411" or all(side % 32 == 0 for side in tile))
    planar &= channels > 1 and not jpeg
    options: dict[str, Any] = {"tile": tile, "metadata": None}
    options["photometric"] = "minisblack" if channels == 1 else "rgb"
    options["extratags"] = [(274, 3, 1, orientation, True)]
    subsampling = {"jpeg-420": (2, 2), "jpeg-422": (2, 1), "jpeg-411": (4, 1)}
    if channels > 3:
        options["extrasamples"] = ["unassalpha", "unspecified"][: channels - 3]
    if jpeg:
        options |= {"compression": "jpeg", "compressionargs": {"level": 92}}
        if compression != "jpeg" and channels == 3:
            options["photometric"] = "ycbcr"
            options["subsampling"] = subsampling.get(compression or "", (1, 1))
    else:
        options |= {"compression": compression}
        options |= {"predictor": predictor} if compression else {}
        options |= {"planarconfig": "separate"} if planar else {}
    base = picture(width, height, seed=seed)
    if channels == 1:
        base = base[..., :1]
    elif channels > 3:
        base = np.dstack([base, *(np.full(base.shape[:2], 255, np.uint8),) * (channels - 3)])
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path, bigtiff=big, byteorder=endian) as file:
        here, mpp = base, 0.25
        for level in range(levels):
            data: NDArray[Any] = here
            if deep and not jpeg:
                data = here.astype(np.uint16) * 257
            data = data[..., 0] if channels == 1 else data
            if planar:
                data = np.moveaxis(data, -1, 0).copy()
            file.write(data, subfiletype=1 if level else 0, **options, **per_cm(mpp))
            here, mpp = halved(here), 2 * mpp
    if endian == ">" and not big:  # OpenSlide reads BigTIFF of either kind
        expected = "unsupported"
    elif orientation != 1:
        expected = "orientation"
    else:
        expected = "extra_samples" if channels == 5 else None
        skewed = any((width // 2**level) % tile[1] for level in range(levels))
        if channels == 1 and deep and not jpeg and skewed:
            expected = "unsupported"  # libtiff reads its rows from the wrong places
    assert code_of(path) == expected
    if expected is not None:
        return
    # Decoders of JPEG differ in rounding, and in how they enlarge subsampled colour.
    subsampled = "subsampling" in options and options["subsampling"] != (1, 1)
    most = 1.5 if subsampled else 0.7 if jpeg else 1e-9
    with Slide(path) as slide:
        assert (slide.width, slide.height, slide.levels) == (width, height, levels)
        for level in range(levels):
            if (width | height) % 2**level:
                break  # the level is no whole number of times coarser, and is not read as it is
            theirs = tifffile.imread(path, key=level)
            theirs = np.moveaxis(theirs, 0, -1) if planar else theirs
            if theirs.dtype.itemsize == 2:
                theirs = (theirs >> 8).astype(np.uint8)
            theirs = np.dstack([theirs] * 3) if channels == 1 else theirs[..., :3]
            h, w = theirs.shape[:2]
            ours = slide.read(0, 0, (w, h), mpp=0.25 * 2**level)
            assert np.abs(ours.astype(int) - theirs).mean() < most


# -- what is not tissue ----------------------------------------------------------------------------


@pytest.mark.parametrize(("level", "says"), [(12, "nearly black"), (250, "nearly white")])
def test_an_empty_slide_says_why(level: int, says: str, tmp_path: Path) -> None:
    from pathflip.geometry import Tiling

    path = write(tmp_path / "a.tif", np.full((1024, 1024, 3), level, np.uint8))
    with SlideReader(patches=1, px=16) as reader:
        plan = reader.plan(str(path), tiling=Tiling(), timeout_s=60)
    assert not len(plan.regions)
    assert says in plan.info["message"]


def test_check_tells_what_would_be_used(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", RGB)
    with SlideReader(patches=1, px=16) as reader:
        about = reader.check(str(path), timeout_s=60)
        assert (about["width"], about["levels"], about["mpp"]) == (1024, 1, 0.5)
        write(path, RGB, photometric="cielab")
        with pytest.raises(SlideError, match="CIE Lab") as caught:
            reader.check(str(path), timeout_s=60)
    assert caught.value.code == "not_rgb"


def test_a_picture_that_is_too_coarse_to_be_compared_is_no_level(tmp_path):
    """Such as one of the label, which has the slide's proportions by chance."""
    whole = picture(5120, 2560)
    label = np.full((64, 128, 3), 255, np.uint8)
    label[::4] = 0
    path = write_pyramid(tmp_path / "a.tif", [whole, label], None)
    assert openslide.OpenSlide(path).level_count == 2
    with Slide(path) as slide:
        shown = slide.shrunk(0, 0, (128, 64), factor=40)
        assert slide.level_dimensions == ((5120, 2560),)
        assert "40 times coarser than level 0" in slide.reader_note
    truth = whole.reshape(64, 40, 128, 40, 3).mean((1, 3))
    assert np.abs(shown - truth).mean() < 2
