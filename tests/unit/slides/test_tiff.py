"""The layout of tiled JPEG TIFF, the limits, and single tiles."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import openslide
import pytest
import tifffile

from pathflip.errors import SlideError
from pathflip.slides.slide import Slide
from pathflip.slides.tiff import (
    JpegLevel,
    JpegTiles,
    can_shrink,
    check_limits,
    jpeg_levels,
    shrink_for,
)
from pathflip.synth.large import make_slide

SIDE = 1500


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiff")
    make_slide(folder / "ycbcr.tif", width=SIDE, height=SIDE, mpp=0.5)
    make_slide(
        folder / "rgb.svs",
        width=SIDE,
        height=SIDE,
        mpp=0.5,
        tile_px=240,
        layout="aperio",
        components="rgb",
    )
    return folder


@pytest.fixture
def ycbcr(folder: Path) -> Iterator[tuple[int, JpegLevel]]:
    path = folder / "ycbcr.tif"
    file = os.open(path, os.O_RDONLY)
    yield file, jpeg_levels(path)[0]
    os.close(file)


def tiff(*pages: dict[int, int]) -> bytes:
    """A little-endian TIFF with these one-valued tags and no pixels."""
    data = bytearray(b"II*\0")
    for tags in pages:
        data += struct.pack("<I", len(data) + 4)
        data += struct.pack("<H", len(tags))
        for tag, value in sorted(tags.items()):
            data += struct.pack("<HHII", tag, 4, 1, value)
    return bytes(data + b"\0\0\0\0")


def page(width: int, height: int, tile: int) -> dict[int, int]:
    return {
        256: width, 257: height, 258: 8, 259: 7, 262: 6, 277: 3,
        322: tile, 323: tile, 324: 8, 325: 100,
    }  # fmt: skip


# -- limits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pages", "named"),
    [
        ([page(65536, 65536, 65536)], "tiles of 65536 x 65536"),
        ([page(1024, 1024, 256), page(8193, 8193, 8208)], "tiles of 8208"),
        ([page(2**19, 2**18, 256)], "524288 x 262144"),  # 137 gigapixels
        ([page(264_576, 264_576, 240)], "264576"),  # 70 gigapixels: just above 2^36
        ([page(4096, 4096, 256)] * 17, "17 tiled levels"),
    ],
)
def test_absurd_geometry_is_refused_before_openslide_sees_it(
    pages: list[dict[int, int]], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "hostile.svs"
    path.write_bytes(tiff(*pages))
    assert path.stat().st_size < 5000
    monkeypatch.setattr(openslide, "OpenSlide", lambda *_: pytest.fail("OpenSlide opened it"))
    with pytest.raises(SlideError, match=named) as caught:
        Slide(path)
    assert caught.value.code == "reader_limits"


@pytest.mark.parametrize(
    "pages", [[page(8192, 8192, 8192)], [page(2**18, 2**18, 256)], [page(4096, 4096, 256)] * 16]
)
def test_the_limits_themselves_are_allowed(pages: list[dict[int, int]], tmp_path: Path) -> None:
    path = tmp_path / "large.svs"
    path.write_bytes(tiff(*pages))
    check_limits(path)


def test_what_cannot_be_parsed_is_left_to_openslide(folder: Path, tmp_path: Path) -> None:
    data = (folder / "ycbcr.tif").read_bytes()
    for index, content in enumerate((b"II*\0", b"II*\0\xff\xff\xff\xff", data[:4000], b"text")):
        path = tmp_path / f"{index}.tif"
        path.write_bytes(content)
        check_limits(path)
        assert jpeg_levels(path) == []


# -- layout ----------------------------------------------------------------------------------------


def test_every_level_is_found_and_the_thumbnail_is_not(folder: Path) -> None:
    for name, factors, tile in (("ycbcr.tif", (1, 2), 256), ("rgb.svs", (1,), 240)):
        levels = jpeg_levels(folder / name)
        assert [(one.width, one.height) for one in levels] == [(SIDE // f,) * 2 for f in factors]
        assert {(one.tile_w, one.tile_h) for one in levels} == {(tile, tile)}
        for one in levels:
            assert len(one.offsets) == len(one.counts) == one.across**2
            assert one.across == -(-one.width // tile)


def test_rgb_components_need_the_adobe_marker(folder: Path) -> None:
    path = folder / "rgb.svs"
    (level,) = jpeg_levels(path)
    with openslide.OpenSlide(path) as handle:
        truth = np.asarray(handle.read_region((480, 480), 0, (240, 240)).convert("RGB"))
    file = os.open(path, os.O_RDONLY)
    try:
        tile = 2 * level.across + 2
        assert np.array_equal(JpegTiles(file, level).decode(tile), truth)
        assert level.header.count(b"Adobe") == 1
        plain = replace(level, header=level.header[: level.header.index(b"\xff\xee")])
        wrong = JpegTiles(file, plain).decode(tile)
        assert np.abs(wrong.astype(int) - truth).mean() > 10
    finally:
        os.close(file)


# -- tiles -----------------------------------------------------------------------------------------


def test_a_tile_is_decoded_into_the_given_buffer(ycbcr: tuple[int, JpegLevel]) -> None:
    file, level = ycbcr
    tile = 2 * level.across + 2
    out = np.zeros((256, 256, 3), np.uint8)
    again = JpegTiles(file, level).decode(tile, out)
    assert np.shares_memory(out, again)
    assert out.std() > 10
    assert np.array_equal(out, JpegTiles(file, level).decode(tile))


@pytest.mark.parametrize("shrink", [2, 4, 8])
def test_dct_shrinking_is_near_the_area_average(ycbcr: tuple[int, JpegLevel], shrink: int) -> None:
    file, level = ycbcr
    side = 256 // shrink
    errors = []
    for tile in range(level.across, 4 * level.across):
        small = JpegTiles(file, level, shrink=shrink).decode(tile)
        full = JpegTiles(file, level).decode(tile)
        area = cv2.resize(full, (side, side), interpolation=cv2.INTER_AREA)
        errors.append((small.astype(np.float64) - area) ** 2)
    assert np.mean(errors) > 0
    assert 10 * np.log10(255**2 / np.mean(errors)) > 40


@pytest.mark.parametrize("what", ["cut", "garbled", "zeroed", "beyond the end", "another size"])
def test_damage_is_an_error_not_grey_pixels(
    ycbcr: tuple[int, JpegLevel], what: str, tmp_path: Path
) -> None:
    file, level = ycbcr
    tile = int(np.argmax(level.counts))
    data = bytearray(os.pread(file, int(level.counts[tile]), int(level.offsets[tile])))
    count, offset, tile_px = len(data), 0, 256
    if what == "cut":
        data[len(data) // 2 :] = b"\0" * (len(data) - len(data) // 2)
    elif what == "garbled":
        data[len(data) // 2 : len(data) // 2 + 2] = b"\xff\xd9"  # an end of image too early
    elif what == "zeroed":
        data[:] = bytes(len(data))
    elif what == "beyond the end":
        offset = 1 << 20
    else:
        tile_px = 128
    path = tmp_path / "tile"
    path.write_bytes(data)
    alone = JpegLevel(
        width=tile_px,
        height=tile_px,
        tile_w=tile_px,
        tile_h=tile_px,
        offsets=np.array([offset]),
        counts=np.array([count]),
        header=level.header,
    )
    with open(path, "rb") as damaged, pytest.raises(SlideError) as caught:
        JpegTiles(damaged.fileno(), alone).decode(0)
    assert caught.value.code == "bad_tile"


def test_shrinks() -> None:
    level = JpegLevel(
        width=240, height=240, tile_w=240, tile_h=240, header=b"",
        offsets=np.zeros(1, np.int64), counts=np.ones(1, np.int64),
    )  # fmt: skip
    assert [n for n in range(1, 17) if can_shrink(level, n)] == [1, 2, 4, 8]
    assert not can_shrink(replace(level, tile_h=244), 8)
    with pytest.raises(ValueError, match="do not shrink"):
        JpegTiles(0, level, shrink=3)
    ratios = (0.5, 1.0, 1.9, 1.99, 2.0, 3.9, 3.97, 7.0, 8.0, 100.0)
    assert [shrink_for(ratio) for ratio in ratios] == [1, 1, 1, 2, 2, 2, 4, 4, 8, 8]


@pytest.mark.parametrize("mpp", [0.25, 0.5])
def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path, mpp: float) -> None:
    """Also where only levels that are not read are cut: half a copy is no slide."""
    whole = make_slide(tmp_path / "whole.tif", width=2048, height=2048, mpp=mpp, seed=1)
    data = whole.read_bytes()
    check_limits(whole)
    with tifffile.TiffFile(whole) as tif:
        last = max(
            offset + count
            for page in tif.pages
            for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True)
        )
    for end in (last - 1, last // 2):
        cut = tmp_path / f"cut{end}.tif"
        cut.write_bytes(data[:end])
        try:
            with tifffile.TiffFile(cut) as tif:
                readable = len(tif.pages) > 0
        except tifffile.TiffFileError:
            readable = False
        if readable:  # the directory comes first: only the tiles tell
            with pytest.raises(SlideError) as caught:
                check_limits(cut)
            assert caught.value.code == "unreadable"
        with pytest.raises(SlideError):
            Slide(cut)
