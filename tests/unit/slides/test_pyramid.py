"""Geometry of the tile pyramid, against its definition and OpenSlide's Deep Zoom generator."""

from __future__ import annotations

import math

import numpy as np
import openslide
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openslide.deepzoom import DeepZoomGenerator
from PIL import Image

from pathflip.slides.pyramid import MAX_SIDE, Pyramid, own_tile, picture_size

SIDES = st.integers(1, 3000)
TILES = st.sampled_from([16, 128, 240, 256, 1024])


@given(width=SIDES, height=SIDES, tile_w=TILES, tile_h=TILES)
@settings(max_examples=60, deadline=None)
def test_tiles_cover_every_level_once(width: int, height: int, tile_w: int, tile_h: int) -> None:
    pyramid = Pyramid(width=width, height=height, tile_w=tile_w, tile_h=tile_h)
    for level in pyramid.levels():
        w, h = pyramid.size(level)
        seen = np.zeros((h, w), np.uint8)
        for tile in pyramid.tiles(level):
            assert (tile.x0 % tile.scale0, tile.y0 % tile.scale0) == (0, 0)
            x, y = tile.x0 // tile.scale0, tile.y0 // tile.scale0
            part = seen[y : y + tile.height, x : x + tile.width]
            assert part.shape == (tile.height, tile.width)
            part += 1
        assert (seen == 1).all()
        # The last pixel shows some of the slide, and nothing of the slide is beyond it.
        assert (w - 1) * tile.scale0 < width <= w * tile.scale0
        assert (h - 1) * tile.scale0 < height <= h * tile.scale0


@given(width=st.integers(1, MAX_SIDE), height=st.integers(1, MAX_SIDE), tile=TILES)
def test_levels_halve_down_to_a_pixel(width: int, height: int, tile: int) -> None:
    pyramid = Pyramid(width=width, height=height, tile_w=tile, tile_h=tile)
    assert pyramid.size(0) == (1, 1)
    assert pyramid.size(pyramid.max_level) == (width, height)
    for level in range(1, pyramid.max_level + 1):
        assert pyramid.size(level - 1) == tuple(math.ceil(side / 2) for side in pyramid.size(level))
        assert pyramid.scale0(level - 1) == 2 * pyramid.scale0(level)
    assert pyramid.grid(pyramid.min_level) == (1, 1)
    if pyramid.min_level < pyramid.max_level:
        assert pyramid.grid(pyramid.min_level + 1) != (1, 1)


@given(width=st.integers(1, 700), height=st.integers(1, 700), tile=st.sampled_from([64, 100, 256]))
@settings(max_examples=30, deadline=None)
def test_numbers_are_those_of_deep_zoom(width: int, height: int, tile: int) -> None:
    image = openslide.ImageSlide(Image.new("RGB", (width, height)))
    theirs = DeepZoomGenerator(image, tile_size=tile, overlap=0, limit_bounds=False)
    ours = Pyramid(width=width, height=height, tile_w=tile, tile_h=tile)
    assert len(ours.levels()) == theirs.level_count
    assert [ours.size(level) for level in ours.levels()] == list(theirs.level_dimensions)
    assert [ours.grid(level) for level in ours.levels()] == list(theirs.level_tiles)
    for level in ours.levels():
        columns, rows = ours.grid(level)
        for column, row in {(0, 0), (columns - 1, rows - 1)}:
            place = ours.tile(level, column, row)
            assert theirs.get_tile_dimensions(level, (column, row)) == (place.width, place.height)


@pytest.mark.parametrize("place", [(-1, 0, 0), (11, 0, 0), (10, 4, 0), (10, 0, 3), (10, -1, 0)])
def test_what_is_not_there_is_no_tile(place: tuple[int, int, int]) -> None:
    pyramid = Pyramid(width=1000, height=700)
    assert not pyramid.has(*place)
    with pytest.raises(ValueError, match="no tile"):
        pyramid.tile(*place)


@pytest.mark.parametrize("sizes", [(0, 5), (5, -1), (MAX_SIDE + 1, 5)])
def test_absurd_sizes_are_refused(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"px|positive"):
        Pyramid(width=sizes[0], height=sizes[1])


@pytest.mark.parametrize(
    ("stored", "shown"),
    [
        (None, (256, 256)), ((240, 240), (240, 240)), ((512, 1024), (512, 1024)),
        ((64, 64), (256, 256)), ((256, 2048), (256, 256)),
    ],
)  # fmt: skip
def test_own_tiles_are_taken_where_they_are_of_use(
    stored: tuple[int, int] | None, shown: tuple[int, int]
) -> None:
    assert own_tile(stored) == shown


@given(w0=st.integers(1, 10**6), h0=st.integers(1, 10**6), px=st.integers(16, 1024))
def test_pictures_keep_their_shape(w0: int, h0: int, px: int) -> None:
    width, height = picture_size(w0, h0, px)
    assert max(width, height) == px
    assert min(width, height) >= 1
    exact = min(w0, h0) * px / max(w0, h0)
    assert abs(min(width, height) - exact) <= max(0.5, 1 - exact)
