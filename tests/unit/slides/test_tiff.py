"""The layout of tiled JPEG TIFF and its limits."""

from __future__ import annotations

import struct
from pathlib import Path

import openslide
import pytest
import tifffile

from pathflip.errors import SlideError
from pathflip.slides.slide import Slide
from pathflip.slides.tiff import check_limits, read_layout, tiled_levels
from pathflip.synth.large import make_slide

SIDE = 1500  # of the files of ``tiffs``


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
        ([page(4096, 4096, 256)] * 129, "more than 128 tiled images"),
    ],
)
def test_absurd_geometry_is_refused_before_openslide_sees_it(
    pages: list[dict[int, int]], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "hostile.svs"
    path.write_bytes(tiff(*pages))
    assert path.stat().st_size < 20_000
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
    check_limits(read_layout(path))


def test_what_cannot_be_parsed_is_left_to_openslide(tiffs: Path, tmp_path: Path) -> None:
    data = (tiffs / "ycbcr.tif").read_bytes()
    for index, content in enumerate((b"II*\0", b"II*\0\xff\xff\xff\xff", data[:4000], b"text")):
        path = tmp_path / f"{index}.tif"
        path.write_bytes(content)
        check_limits(read_layout(path))
        assert tiled_levels(read_layout(path), path) == []


# -- layout ----------------------------------------------------------------------------------------


def test_every_level_is_found_and_the_thumbnail_is_not(tiffs: Path) -> None:
    for name, factors, tile in (("ycbcr.tif", (1, 2), 256), ("rgb.svs", (1,), 240)):
        levels = tiled_levels(read_layout(tiffs / name), tiffs / name)
        assert [(one.width, one.height) for one in levels] == [(SIDE // f,) * 2 for f in factors]
        assert {(one.tile_w, one.tile_h) for one in levels} == {(tile, tile)}
        for one in levels:
            assert len(one.offsets) == len(one.counts) == one.across**2
            assert one.across == -(-one.width // tile)


@pytest.mark.parametrize("mpp", [0.25, 0.5])
def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path, mpp: float) -> None:
    """Also where only levels that are not read are cut: half a copy is no slide."""
    whole = make_slide(tmp_path / "whole.tif", width=2048, height=2048, mpp=mpp, seed=1)
    data = whole.read_bytes()
    check_limits(read_layout(whole))
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
                check_limits(read_layout(cut))
            assert caught.value.code == "unreadable"
        with pytest.raises(SlideError):
            Slide(cut)
