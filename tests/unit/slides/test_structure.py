"""Files whose structure misleads readers: refused with a reason, or read around it rightly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pathflip.errors import REASONS, SlideError
from pathflip.slides.reader import SlideReader
from pathflip.slides.slide import Slide

Pixels = NDArray[np.uint8]


def picture(w: int = 1024, h: int = 512, *, seed: int = 0) -> Pixels:
    """Tissue-like pixels [h, w, 3] without a repeat, smooth enough to be seen at a quarter."""
    rng = np.random.default_rng(seed)
    out = np.full((h, w, 3), 244, np.float32)
    for cell, depth in ((16, 90), (48, 60)):
        coarse = rng.random((h // cell + 2, w // cell + 2, 3)).astype(np.float32)
        out -= depth * np.kron(coarse, np.ones((cell, cell, 1), np.float32))[:h, :w]
    return np.clip(out, 5, 255).astype(np.uint8)


def halved(pixels: Pixels) -> Pixels:
    h, w = (side // 2 * 2 for side in pixels.shape[:2])
    blocks = pixels[:h, :w].reshape(h // 2, 2, w // 2, 2, 3)
    return blocks.mean((1, 3)).round().astype(np.uint8)


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


def test_a_level_of_another_picture_is_not_used(tmp_path: Path) -> None:
    base = picture(2048, 1024)
    other = halved(picture(2048, 1024, seed=5))
    with Slide(write_pyramid(tmp_path / "a.tif", [base, other], [0.5, 1.0])) as slide:
        assert slide.levels == 1
        assert "another picture" in slide.reader_note


def test_flat_levels_have_nothing_to_compare(tmp_path: Path) -> None:
    base = np.full((1024, 2048, 3), 244, np.uint8)
    with Slide(write_pyramid(tmp_path / "a.tif", [base, halved(base)], [0.5, 1.0])) as slide:
        assert slide.levels == 2


# -- against an independent reader -----------------------------------------------------------------


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    width=st.integers(260, 900),
    height=st.integers(260, 700),
    tile=st.sampled_from([(128, 128), (256, 256), (240, 240), (144, 272)]),
    compression=st.sampled_from(
        [None, "deflate", "lzw", "zstd", "jpeg", "jpeg-420", "jpeg-422", "jpeg-ycbcr"]
    ),
    predictor=st.booleans(),
    planar=st.booleans(),
    deep=st.booleans(),
    big=st.booleans(),
    levels=st.integers(1, 3),
    seed=st.integers(0, 9),
)
def test_pixels_are_those_of_an_independent_reader(
    tmp_path: Path,
    width: int,
    height: int,
    tile: tuple[int, int],
    compression: str | None,
    predictor: bool,
    planar: bool,
    deep: bool,
    big: bool,
    levels: int,
    seed: int,
) -> None:
    """Level 0 of any layout that is not refused is what tifffile and imagecodecs read."""
    # Uncompressed tiles are padded to 512 bytes by this writer, which libtiff refuses to read.
    assume(compression or tile[0] * tile[1] % 512 == 0)
    jpeg = compression is not None and compression.startswith("jpeg")
    options: dict[str, Any] = {"tile": tile, "metadata": None, "photometric": "rgb"}
    if jpeg:
        options |= {"compression": "jpeg", "compressionargs": {"level": 92}}
        if compression != "jpeg":
            options["photometric"] = "ycbcr"
            options["subsampling"] = {"jpeg-420": (2, 2), "jpeg-422": (2, 1)}.get(
                compression or "", (1, 1)
            )
    else:
        options |= {"compression": compression}
        options |= {"predictor": predictor} if compression else {}
        options |= {"planarconfig": "separate"} if planar else {}
    base = picture(width, height, seed=seed)
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path, bigtiff=big) as file:
        here, mpp = base, 0.25
        for level in range(levels):
            data: NDArray[Any] = here
            if deep and not jpeg:
                data = here.astype(np.uint16) * 257
            if options.get("planarconfig"):
                data = np.moveaxis(data, -1, 0).copy()
            file.write(data, subfiletype=1 if level else 0, **options, **per_cm(mpp))
            here, mpp = halved(here), 2 * mpp
    theirs = tifffile.imread(path, key=0)
    if options.get("planarconfig"):
        theirs = np.moveaxis(theirs, 0, -1)
    if theirs.dtype == np.uint16:
        theirs = (theirs >> 8).astype(np.uint8)
    with Slide(path) as slide:
        assert (slide.width, slide.height, slide.levels) == (width, height, levels)
        ours = slide.read(0, 0, (width, height))
    gap = np.abs(ours.astype(int) - theirs)
    # Decoders of JPEG differ in rounding, and in how they enlarge subsampled colour.
    subsampled = jpeg and compression in ("jpeg-420", "jpeg-422")
    assert gap.mean() < (1.5 if subsampled else 0.7 if jpeg else 1e-9)


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
