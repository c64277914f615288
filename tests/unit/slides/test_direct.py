"""Single tiles of the direct path: colours, shrinking, damage."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import openslide
import pytest
from numpy.typing import NDArray

from pathflip.errors import SlideError
from pathflip.slides.direct import Tiles, disagreement, read_rect, shrink_for
from pathflip.slides.tiff import read_layout, tiled_levels
from pathflip.slides.tiles import JpegCodec, TiledLevel, jpeg_codec


@pytest.fixture
def ycbcr(tiffs: Path) -> Iterator[tuple[int, TiledLevel]]:
    path = tiffs / "ycbcr.tif"
    file = os.open(path, os.O_RDONLY)
    yield file, tiled_levels(read_layout(path), path)[0]
    os.close(file)


def test_rgb_components_need_the_adobe_marker(tiffs: Path) -> None:
    path = tiffs / "rgb.svs"
    (level,) = tiled_levels(read_layout(path), path)
    with openslide.OpenSlide(path) as handle:
        truth = np.asarray(handle.read_region((480, 480), 0, (240, 240)).convert("RGB"))
    file = os.open(path, os.O_RDONLY)
    try:
        tile = 2 * level.across + 2
        assert np.array_equal(Tiles(file, level).decode(tile), truth)
        assert isinstance(level.codec, JpegCodec)
        header = level.codec.header
        assert header.count(b"Adobe") == 1
        bare = JpegCodec(header=header[: header.index(b"\xff\xee")], rgb=False)
        plain = replace(level, codec=bare)
        wrong = Tiles(file, plain).decode(tile)
        assert np.abs(wrong.astype(int) - truth).mean() > 10
    finally:
        os.close(file)


def test_a_tile_is_decoded_into_the_given_buffer(ycbcr: tuple[int, TiledLevel]) -> None:
    file, level = ycbcr
    tile = 2 * level.across + 2
    out = np.zeros((256, 256, 3), np.uint8)
    again = Tiles(file, level).decode(tile, out)
    assert np.shares_memory(out, again)
    assert out.std() > 10
    assert np.array_equal(out, Tiles(file, level).decode(tile))


@pytest.mark.parametrize(
    ("downsample", "change", "differs"),
    [
        (16.0, 0, False), (16.0, 1, True),  # corners on whole pixels: equal, to the grey level
        (16.00005, 0, False), (16.00005, 1, True),  # others: moved by a step, and the first tile
        (16.00005, 20, True),
    ],
)  # fmt: skip
def test_pixels_may_differ_from_openslides_by_a_step_between_pixels_where_it_takes_one(
    ycbcr: tuple[int, TiledLevel], downsample: float, change: int, differs: bool
) -> None:
    """15000 px are 16.0085 times 937: corners of tiles are on no pixel of the slide."""
    tiles = Tiles(*ycbcr)
    asked = []

    def read(number: int, x: int, y: int, w: int, h: int) -> NDArray[np.uint8]:
        off = [abs(round(at * downsample) / downsample - at) for at in (x, y)]
        asked.append((x, y))
        shown = read_rect(tiles, x, y, w + 1, h + 1).astype(np.float64)
        for axis, share in enumerate(off[::-1]):  # y, x; bilinear, in steps of 1/128 px
            moved = np.ceil(share * 128 - 1e-6) / 128
            shown += moved * (np.roll(shown, -1, axis) - shown)
        shown = np.rint(shown[:h, :w])
        if change == 20 or not any(off):
            shown[3, 5, 1] += change if shown[3, 5, 1] < 128 else -change
        return shown.astype(np.uint8)

    found = disagreement(tiles, 1, downsample=downsample, read=read)
    assert found is not None
    assert bool(found) == differs, found
    if not differs and downsample % 1:
        assert len(asked) == 2, "the first tile has a corner that is met exactly"
        assert asked[0] != asked[1] == (0, 0)


@pytest.mark.parametrize("shrink", [2, 4, 8])
def test_dct_shrinking_is_near_the_area_average(ycbcr: tuple[int, TiledLevel], shrink: int) -> None:
    file, level = ycbcr
    side = 256 // shrink
    errors = []
    for tile in range(level.across, 4 * level.across):
        small = Tiles(file, level, shrink=shrink).decode(tile)
        full = Tiles(file, level).decode(tile)
        area = cv2.resize(full, (side, side), interpolation=cv2.INTER_AREA)
        errors.append((small.astype(np.float64) - area) ** 2)
    assert np.mean(errors) > 0
    assert 10 * np.log10(255**2 / np.mean(errors)) > 40


@pytest.mark.parametrize("what", ["cut", "garbled", "zeroed", "beyond the end", "another size"])
def test_damage_is_an_error_not_grey_pixels(
    ycbcr: tuple[int, TiledLevel], what: str, tmp_path: Path
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
    alone = TiledLevel(
        width=tile_px,
        height=tile_px,
        tile_w=tile_px,
        tile_h=tile_px,
        offsets=np.array([offset]),
        counts=np.array([count]),
        codec=level.codec,
        file=path,
    )
    with open(path, "rb") as damaged, pytest.raises(SlideError) as caught:
        Tiles(damaged.fileno(), alone).decode(0)
    assert caught.value.code == "bad_tile"


def test_shrinks() -> None:
    level = TiledLevel(
        width=240, height=240, tile_w=240, tile_h=240, codec=jpeg_codec(rgb=False),
        file=Path("none"), offsets=np.zeros(1, np.int64), counts=np.ones(1, np.int64),
    )  # fmt: skip
    assert [n for n in range(1, 17) if level.can_shrink(n)] == [1, 2, 4, 8]
    assert not replace(level, tile_h=244).can_shrink(8)
    with pytest.raises(ValueError, match="do not shrink"):
        Tiles(0, level, shrink=3)
    ratios = (0.5, 1.0, 1.9, 1.99, 2.0, 3.9, 3.97, 7.0, 8.0, 100.0)
    assert [shrink_for(ratio) for ratio in ratios] == [1, 1, 1, 2, 2, 2, 4, 4, 8, 8]
