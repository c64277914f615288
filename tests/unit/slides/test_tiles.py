"""Every codec and layout that is read without OpenSlide, against other readers; and what is not."""

from __future__ import annotations

import resource
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import openslide
import pytest
import simplejpeg
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pathflip.errors import SlideError
from pathflip.slides import direct, tiles
from pathflip.slides.dicom import dicom_levels
from pathflip.slides.slide import Slide
from pathflip.slides.tiff import read_layout, tiled_levels
from tests.faults import tile_spans
from tests.unit.slides import layouts
from tests.unit.slides.dicom_files import SERIES, corrected, jpeg_frames, write_level
from tests.unit.slides.layouts import halved, picture

Pixels = NDArray[np.uint8]

WIDTH, HEIGHT = 700, 530
PX = 128
LOSSLESS = [None, "packbits", "lzw", "deflate", "zstd"]


def write(path: Path, base: Pixels, *, levels: int = 2, **options: Any) -> Path:
    """Write a pyramid at 0.5 µm/px."""
    with tifffile.TiffWriter(path) as file:
        here, scale = base, 2e4
        for level in range(levels):
            file.write(
                here, photometric="rgb", metadata=None, subfiletype=1 if level else 0,
                resolution=(scale, scale), resolutionunit="CENTIMETER", **options,
            )  # fmt: skip
            here, scale = halved(here), scale / 2
    return path


def patches(slide: Slide, at: list[tuple[int, int]]) -> tuple[Pixels, NDArray[np.bool_]]:
    rects = np.array([(x, y, PX, PX) for x, y in at], np.int64)
    out = np.full((len(at), PX, PX, 3), 7, np.uint8)
    return out, slide.read_patches(rects, mpp=0.5, out=out)


def check(path: Path, base: Pixels, *, codec: str) -> None:
    """The slide is read directly, each pixel is that of ``base``, and OpenSlide sees the same."""
    h, w = base.shape[:2]
    at = [(0, 0), (w - PX, h - PX), (w // 2 - 31, h // 2 - 77), (1, h - PX - 3)]
    with Slide(path, mpp=0.5) as slide:
        assert slide.reader == "direct", slide.reader_note
        assert {level.codec.name for level in slide._direct.values()} == {codec}
        assert np.array_equal(slide.read(0, 0, (w, h)), base)
        seen, ok = patches(slide, at)
        assert ok.all()
        for patch, (x, y) in zip(seen, at, strict=True):
            assert np.array_equal(patch, base[y : y + PX, x : x + PX])
        for number, level in slide._direct.items():
            ours = direct.read_rect(
                direct.Tiles(slide._files[level.file], level), 0, 0, level.width, level.height
            )
            with openslide.OpenSlide(slide._source) as handle:
                theirs = handle.read_region((0, 0), number, (level.width, level.height))
            assert np.array_equal(ours, np.asarray(theirs.convert("RGB")))


# -- every codec -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [(128, 128), (240, 240), (256, 128)])
@pytest.mark.parametrize("predictor", [False, True])
@pytest.mark.parametrize("compression", LOSSLESS)
def test_lossless_tiff_is_the_stored_pixels(
    compression: str | None, predictor: bool, tile: tuple[int, int], tmp_path: Path
) -> None:
    if predictor and compression in (None, "packbits"):
        pytest.skip("a predictor goes with deflate, LZW and zstd")
    if compression is None and tile == (240, 240):
        pytest.skip("this writer pads such tiles, which libtiff refuses")
    base = picture(WIDTH, HEIGHT)
    options = {"predictor": True} if predictor else {}
    path = write(tmp_path / "a.tif", base, tile=tile, compression=compression, **options)
    check(path, base, codec={None: "none", "packbits": "PackBits", "lzw": "LZW"}.get(
        compression, compression or ""
    ))  # fmt: skip
    assert np.array_equal(tifffile.imread(path, key=0), base)  # by another reader


@settings(
    max_examples=25 if settings.get_current_profile_name() != "nightly" else 600,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    width=st.integers(100, 600),
    height=st.integers(100, 600),
    tile=st.tuples(st.sampled_from([64, 112, 256]), st.sampled_from([64, 112, 256])),
    compression=st.sampled_from(["lzw", "deflate", "zstd", "packbits"]),
    predictor=st.booleans(),
    noise=st.booleans(),
    seed=st.integers(0, 99),
)
def test_tiles_of_any_shape_are_those_of_another_decoder(
    tmp_path: Path, width: int, height: int, tile: tuple[int, int], compression: str,
    predictor: bool, noise: bool, seed: int,
) -> None:  # fmt: skip
    """Tile by tile, of pictures that compress well and of noise that does not."""
    base = picture(width, height, seed=seed)
    if noise:
        base = np.random.default_rng(seed).integers(0, 256, base.shape, np.uint8)
    options = {"predictor": True} if predictor and compression != "packbits" else {}
    path = write(tmp_path / "a.tif", base, tile=tile, compression=compression, levels=1, **options)
    (level,) = tiled_levels(read_layout(path), path)
    with open(path, "rb") as file, tifffile.TiffFile(path) as tif:
        reader = direct.Tiles(file.fileno(), level)
        theirs = tif.pages[0].segments()
        for number, (segment, _, _) in enumerate(theirs):
            ours = reader.decode(number)
            h, w = segment.shape[1:3]
            assert np.array_equal(ours[:h, :w], segment[0])


def test_jpeg_2000_of_aperio_is_openjpegs(tmp_path: Path) -> None:
    """R, G, B as decoded; of Y, Cb, Cr the colours OpenSlide makes of them, to the bit."""
    base = picture(WIDTH, HEIGHT)
    for index, (compression, args) in enumerate(
        (("APERIO_JP2000_RGB", {"level": 0}), ("APERIO_JP2000_RGB", {"level": 38}),
         ("APERIO_JP2000_YCBC", {"level": 40}))
    ):  # fmt: skip
        path = tmp_path / f"{index}.svs"
        tifffile.imwrite(
            path, base, tile=(240, 240), photometric="rgb", metadata=None, compression=compression,
            compressionargs=args, description=f"Aperio x\n{WIDTH}x{HEIGHT} |AppMag = 20|MPP = 0.5",
        )  # fmt: skip
        with openslide.OpenSlide(path) as handle:
            expected = np.asarray(handle.read_region((0, 0), 0, (WIDTH, HEIGHT)).convert("RGB"))
        check(path, expected, codec="JPEG 2000")
        if index == 0:
            assert np.array_equal(expected, base)
        else:
            assert np.abs(expected.astype(int) - base).mean() > 0.1


def test_colours_of_y_cb_cr_are_near_their_definition() -> None:
    rng = np.random.default_rng(0)
    stored = rng.integers(0, 256, (64, 64, 3), np.uint8)
    y, cb, cr = (stored[..., c].astype(float) for c in range(3))
    cb, cr = cb - 128, cr - 128
    exact = np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], axis=-1)
    tiles._ycbcr_to_rgb(stored)
    assert np.abs(stored - np.clip(exact, 0, 255)).max() <= 0.51


@pytest.mark.parametrize(
    "options",
    [
        {}, {"rgb": True}, {"table": "long"}, {"table": "none"}, {"undefined": False},
        {"tile": 240}, {"tile": 512}, {"pieces": 3},
    ],
)  # fmt: skip
def test_dicom_frames_are_what_another_decoder_makes_of_them(
    options: dict[str, Any], tmp_path: Path
) -> None:
    base, tile = picture(WIDTH, HEIGHT), options.pop("tile", 128)
    folder = tmp_path / "series"
    folder.mkdir()
    for number, pixels in enumerate((base, halved(base))):
        path = folder / f"{number}.dcm"
        write_level(
            path, pixels, tile=tile, mpp=0.5 * 2**number, number=number, **options
        )  # fmt: skip
    expected = np.empty_like(base)
    frames = iter(jpeg_frames(base, tile, rgb=options.get("rgb", False)))
    for y in range(0, HEIGHT, tile):
        for x in range(0, WIDTH, tile):
            frame = imagecodecs.jpeg8_decode(
                next(frames), colorspace="RGB" if options.get("rgb") else None, outcolorspace="RGB"
            )
            part = expected[y : y + tile, x : x + tile]
            part[...] = frame[: part.shape[0], : part.shape[1]]
    check(folder, expected, codec="JPEG")
    with Slide(folder) as slide:
        assert list(slide._direct) == [0, 1]


def test_only_files_of_the_series_are_levels(tmp_path: Path) -> None:
    base = picture()
    write_level(tmp_path / "0.dcm", base, tile=128, mpp=0.5)
    write_level(tmp_path / "1.dcm", halved(base), tile=128, mpp=1.0, number=1, series="9.9")
    (tmp_path / "2.dcm").write_bytes(b"no DICOM")
    found, why = dicom_levels(sorted(tmp_path.iterdir()), series=SERIES)
    assert [(level.width, level.file.name) for level in found] == [(base.shape[1], "0.dcm")]
    assert "no DICOM header" in why


def test_a_real_dicom_slide_is_read_directly(tmp_path: Path) -> None:
    series = Path(__file__).parents[4] / "shared" / "slides" / "dicom-CMU-1-small"
    if not series.exists():
        pytest.skip(f"{series.name} is not here")
    with Slide(corrected(series, tmp_path / "series")) as slide:
        assert slide.reader == "direct", slide.reader_note
        assert list(slide._direct) == [0, 1, 2]
        view = slide.read(300, 400, 900)
        with openslide.OpenSlide(slide._source) as handle:
            theirs = np.asarray(handle.read_region((300, 400), 0, (900, 900)).convert("RGB"))
    assert np.array_equal(view, theirs)


# -- damage ----------------------------------------------------------------------------------------


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes(len(data) - len(data) // 2)


def early_end(data: bytes) -> bytes:
    """A whole stream of half of the pixels."""
    half = picture(PX, PX)[: PX // 2].tobytes()
    for encode in (zlib.compress, imagecodecs.lzw_encode, imagecodecs.zstd_encode):
        made: bytes = encode(half)
        if made[:2] == data[:2] and len(made) <= len(data):
            return made + bytes(len(data) - len(made))
    return cut(data)


DAMAGED = {
    name: layouts.FORMATS[name]
    for name in (
        "jpeg.tif", "deflate.tif", "predictor.tif", "lzw.tif", "zstd.tif", "aperio-jpeg2000.svs"
    )
}  # fmt: skip


@pytest.mark.parametrize("damage", [lambda data: bytes(len(data)), cut, early_end])
@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_tile_costs_its_own_patches_alone(
    name: str, damage: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    path = tmp_path / name
    DAMAGED[name](path)
    at = [(x, y) for y in range(0, 512, PX) for x in range(0, 640, PX)]
    with Slide(path) as slide:
        clean, ok = patches(slide, at)
        assert ok.all()
    across, spans = tile_spans(path)
    tile = across + 2
    offset, count = spans[tile]
    data = bytearray(path.read_bytes())
    data[offset : offset + count] = damage(bytes(data[offset : offset + count]))
    path.write_bytes(data)
    with Slide(path) as slide:
        assert slide.reader == "direct", slide.reader_note
        seen, ok = patches(slide, at)
        if name == "aperio-jpeg2000.svs" and ok.all():
            pytest.skip("its decoder takes zeroes at the end for picture, as OpenSlide's does")
        assert np.flatnonzero(~ok).tolist() == [tile]
        assert np.array_equal(seen[ok], clean[ok])
        with pytest.raises(SlideError) as caught:
            slide.read(2 * PX, PX, 16)
        assert caught.value.code == "bad_tile"


def test_a_damaged_frame_of_dicom_costs_its_own_patches_alone(tmp_path: Path) -> None:
    base = picture()
    frames = jpeg_frames(base, PX, rgb=False)
    folder = tmp_path / "series"
    folder.mkdir()
    path = write_level(folder / "0.dcm", base, tile=PX, mpp=0.5, frames=frames)
    data = path.read_bytes()
    at = [(x, y) for y in range(0, 512, PX) for x in range(0, 640, PX)]
    for spoiled in (data.replace(frames[7], bytes(len(frames[7]))), data[: data.index(frames[18])]):
        path.write_bytes(spoiled)
        with Slide(folder) as slide:
            assert slide.reader == "direct", slide.reader_note
            _, ok = patches(slide, at)
        gone = [7] if len(spoiled) == len(data) else [18, 19]
        assert np.flatnonzero(~ok).tolist() == gone


# -- crafted tiles: nothing is allocated or shown but what a tile of this level has ----------------


def claims(data: bytes, kind: str, width: int, height: int) -> bytes:
    """The same stream, which says that its picture is of another size."""
    made = bytearray(data)
    if kind == "jpeg":
        at = data.index(b"\xff\xc0") + 5
        made[at : at + 4] = struct.pack(">HH", height, width)
    else:
        made[8:16] = made[24:32] = struct.pack(">II", width, height)
    return bytes(made)


@pytest.mark.parametrize("kind", ["jpeg", "jpeg2000"])
def test_a_tile_that_claims_a_huge_picture_is_refused_before_it_is_allocated(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JPEG by its buffer; JPEG 2000, whose decoder allocates first, by its own header."""
    base, out = picture(64, 64), np.empty((64, 64, 3), np.uint8)
    codec: tiles.Codec = tiles.jpeg_codec(rgb=False)
    data = simplejpeg.encode_jpeg(base)
    if kind == "jpeg2000":
        codec, data = tiles.Jpeg2000Codec(ycbcr=False), imagecodecs.jpeg2k_encode(
            base, level=0, codecformat="j2k"
        )  # fmt: skip
    codec.decode(data, shrink=1, out=out)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"size|too small"):
        codec.decode(claims(data, kind, 16000, 15000), shrink=1, out=out)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # not 700 MB


def test_a_jpeg_twice_the_size_is_not_shrunk_twice() -> None:
    data = simplejpeg.encode_jpeg(picture(256, 256))
    codec = tiles.jpeg_codec(rgb=False)
    codec.decode(data, shrink=2, out=np.empty((128, 128, 3), np.uint8))
    with pytest.raises(ValueError, match="size"):
        codec.decode(data, shrink=2, out=np.empty((64, 64, 3), np.uint8))


@pytest.mark.parametrize(("at", "value"), [(43, 2), (45, 0x87), (42, 11)])
def test_jpeg_2000_of_other_samples_is_refused(at: int, value: int) -> None:
    """Subsampled, signed, and of 12 bits; by what its header says."""
    data = bytearray(imagecodecs.jpeg2k_encode(picture(64, 64), level=0, codecformat="j2k"))
    data[at] = value
    with pytest.raises(ValueError, match="samples"):
        tiles.Jpeg2000Codec(ycbcr=False).decode(
            bytes(data), shrink=1, out=np.empty((64, 64, 3), np.uint8)
        )


def test_patches_are_not_read_beside_the_array_that_is_to_hold_them(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", picture(256, 256), tile=(PX, PX), compression="deflate")
    out = np.empty((1, PX, 2 * PX, 3), np.uint8)[:, :, ::2]
    with Slide(path, mpp=0.5) as slide, pytest.raises(ValueError, match="contiguous"):
        slide.read_patches(np.array([[0, 0, PX, PX]]), mpp=0.5, out=out)


@pytest.mark.parametrize("lengths", [2**33, 2**62, 2**64 - 1])
def test_absurd_lengths_of_dicom_frames_cost_their_own_patches_or_the_direct_path(
    lengths: int, tmp_path: Path
) -> None:
    folder = tmp_path / "series"
    folder.mkdir()
    path = write_level(folder / "0.dcm", picture(), tile=PX, mpp=0.5, table="long")
    data = bytearray(path.read_bytes())
    at = data.index(struct.pack("<HH2s", 0x7FE0, 2, b"OV")) + 12
    data[at : at + 8] = struct.pack("<Q", lengths)
    path.write_bytes(data)
    levels, why = dicom_levels([path], series=SERIES)
    if lengths >= 2**63:
        assert not levels
        assert "table of frames is damaged" in why
        return
    with open(path, "rb") as file, pytest.raises(SlideError) as caught:
        direct.Tiles(file.fileno(), levels[0]).decode(0)
    assert caught.value.code == "bad_tile"


@pytest.mark.parametrize(("offset", "count"), [(2**63 - 8, 100), (2**64 - 8, 100), (8, 2**63 - 4)])
def test_offsets_that_overflow_are_beyond_the_end_of_the_file(
    offset: int, count: int, tmp_path: Path
) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(
        path, picture(), compression="deflate", tile=(PX, PX), photometric="rgb", bigtiff=True,
        metadata=None,
    )  # fmt: skip
    with tifffile.TiffFile(path, mode="r+b") as file:
        for tag, value in ((324, offset), (325, count)):
            old = file.pages[0].tags[tag]
            old.overwrite([value, *old.value[1:]], dtype=16)
    with pytest.raises(SlideError) as caught:
        Slide(path)
    assert caught.value.code == "unreadable"


# -- falling back ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*DAMAGED, "dicom"])
def test_pixels_unlike_openslides_end_the_direct_path(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One grey level of difference is enough, whatever the codec."""
    path = tmp_path / name
    if name == "dicom":
        path.mkdir()
        write_level(path / "0.dcm", picture(), tile=PX, mpp=0.5)
    else:
        DAMAGED[name](path)
    with Slide(path) as slide:
        assert slide.reader == "direct", slide.reader_note
        codec = slide._direct[0].codec
        before = slide.read(0, 0, 300)
    plain = type(codec).decode

    def wrong(self: Any, data: bytes, **options: Any) -> Pixels:
        pixels = plain(self, data, **options)
        pixels[5, 5, 1] ^= 1
        return pixels

    monkeypatch.setattr(type(codec), "decode", wrong)
    with Slide(path) as slide:
        assert slide.reader == "openslide"
        assert f"{codec.name} pixels of level 0 differ from OpenSlide's by up to 1 " in (
            slide.reader_note
        )
        assert np.array_equal(slide.read(0, 0, 300), before)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"planarconfig": "separate"}, "no RGB of 8 bits"),
        ({"photometric": "minisblack"}, "no RGB of 8 bits"),
        ({"dtype": np.uint16}, "no RGB of 8 bits"),
    ],
)
def test_layouts_without_a_direct_path_say_so(
    options: dict[str, Any], says: str, tmp_path: Path
) -> None:
    base: NDArray[Any] = picture()
    expected = base
    if options.get("dtype"):
        base = base.astype(options.pop("dtype")) * 257
    if "planarconfig" in options:
        base = np.moveaxis(base, -1, 0).copy()
    if "photometric" in options:
        base = base[..., 1]
        expected = np.dstack([base] * 3)
    path = tmp_path / "a.tif"
    tifffile.imwrite(
        path, base, compression="deflate", tile=(PX, PX), metadata=None,
        **{"photometric": "rgb", **options},
    )  # fmt: skip
    with Slide(path) as slide:
        assert slide.reader == "openslide"
        assert says in slide.reader_note
        assert np.array_equal(slide.read(0, 0, (640, 512)), expected)


def test_dicom_of_another_kind_is_left_to_openslide(tmp_path: Path) -> None:
    base = picture()
    for index, (changes, says) in enumerate((
        ({"tiling": "TILED_SPARSE"}, "sparse"), ({"paths": 2}, "optical paths"),
        ({"syntax": "1.2.840.10008.1.2.4.91"}, "transfer syntax 1.2.840.10008.1.2.4.91"),
        ({"frames": [b"\xff\xd8"] * 3}, "one frame for each tile"),
    )):  # fmt: skip
        path = write_level(tmp_path / f"{index}.dcm", base, tile=PX, mpp=0.5, **changes)
        found, why = dicom_levels([path], series=SERIES)
        assert not found
        assert says in why
    folder = tmp_path / "paths"
    folder.mkdir()
    write_level(folder / "0.dcm", base, tile=PX, mpp=0.5, paths=2)
    with Slide(folder) as slide:
        assert slide.reader == "openslide"
        assert "optical paths" in slide.reader_note
        assert np.abs(slide.read(0, 0, (640, 512)).astype(int) - base).mean() < 3


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"syntax": "1.2.840.10008.1.2.4.80"}, "is compressed by JPEG-LS"),
        ({"syntax": "1.2.840.10008.1.2.5"}, "is compressed by RLE"),
        ({"planes": 2}, "TotalPixelMatrixFocalPlanes 2"),
    ],
)
def test_dicom_that_openslide_does_not_read_is_not_called_damaged(
    changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    folder = tmp_path / "series"
    folder.mkdir()
    write_level(folder / "0.dcm", picture(), tile=PX, mpp=0.5, **changes)
    with pytest.raises(SlideError) as caught:
        Slide(folder)
    assert caught.value.code == "unsupported"
    assert says in caught.value.message
    assert "damaged" not in f"{caught.value.message} {caught.value.hint}"
