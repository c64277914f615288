"""The direct path: decodes tiled levels tile by tile, without OpenSlide.

OpenSlide decodes the same tile again for every patch that touches it and converts every pixel
twice. Here each needed tile is decoded once, straight into the patches that touch it. ``Slide``
compares the result with OpenSlide's before it uses a level (:func:`disagreement`) and keeps to
OpenSlide where they differ.
"""

from __future__ import annotations

import math
import os

import cv2
import numpy as np
from numpy.typing import NDArray

from pathflip.errors import SlideError
from pathflip.slides.resample import Scratch, resize_area
from pathflip.slides.structure import ReadLevel
from pathflip.slides.tiles import JpegCodec, TiledLevel

DAMAGED_RGB = (205, 130, 180)
"""Colour of damaged tiles on overviews: tissue to the mask, and plain to see on a thumbnail."""
_CHECK_PX = 96
_STEPS = 128
"""Places between two pixels that OpenSlide's drawing library tells apart."""
_MOST_BESIDE = 8 << 20
"""Most bytes of a tile beside its pixels: tables, a colour profile."""


class Tiles:
    """Decodes tiles of one level, optionally shrunk 2, 4 or 8 times in the DCT domain.

    Args:
        file: Open file descriptor; not owned.
        level: The level.
        shrink: 1, 2, 4 or 8; see ``TiledLevel.can_shrink``.
    """

    def __init__(self, file: int, level: TiledLevel, *, shrink: int = 1) -> None:
        if not level.can_shrink(shrink):
            raise ValueError(
                f"{level.codec.name} tiles of {level.tile_w} x {level.tile_h} px do not shrink by "
                f"{shrink}"
            )
        self.level = level
        self.shrink = shrink
        self.tile_w, self.tile_h = level.tile_w // shrink, level.tile_h // shrink
        self.width, self.height = level.width // shrink, level.height // shrink
        self._file = file

    def decode(self, tile: int, out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
        """Decode one tile to uint8 RGB [tile_h, tile_w, 3], into ``out`` if it is given.

        Raises:
            SlideError: ``bad_tile`` when the bytes are missing or damaged, however slightly:
                libjpeg's warnings count, since it fills what it cannot read with grey.
        """
        if out is None:
            out = np.empty((self.tile_h, self.tile_w, 3), np.uint8)
        data = self._stored(tile)
        try:
            pixels = self.level.codec.decode(data, shrink=self.shrink, out=out)
        except (ValueError, RuntimeError) as error:
            raise _damaged(tile, error) from error
        if pixels.shape != out.shape or not np.may_share_memory(pixels, out):
            raise SlideError(f"tile {tile} has the wrong size", code="bad_tile")
        return pixels

    def jpeg(self, tile: int) -> bytes | None:
        """Return one tile as a JPEG, as it is stored; None if it is not, or of an unusual kind.

        Raises:
            SlideError: ``bad_tile``, as of :meth:`decode`.
        """
        level, codec = self.level, self.level.codec
        if not isinstance(codec, JpegCodec):
            return None
        try:
            return codec.portable(self._stored(tile), width=level.tile_w, height=level.tile_h)
        except (ValueError, RuntimeError) as error:
            raise _damaged(tile, error) from error

    def _stored(self, tile: int) -> bytes:
        """Return the bytes of one tile."""
        count = int(self.level.counts[tile])
        if not 0 <= count <= 2 * self.level.tile_w * self.level.tile_h * 3 + _MOST_BESIDE:
            raise SlideError(f"tile {tile} is said to have {count} bytes", code="bad_tile")
        data = os.pread(self._file, count, int(self.level.offsets[tile]))
        if len(data) != count:
            raise SlideError(f"tile {tile} is cut off", code="bad_tile")
        return data


def _damaged(tile: int, error: Exception) -> SlideError:
    return SlideError(f"tile {tile} is damaged: {error}", code="bad_tile")


class HalvedTiles(Tiles):
    """Tiles decoded at full size, then halved by exact area averages."""

    def __init__(self, file: int, level: TiledLevel) -> None:
        super().__init__(file, level)
        self._whole = Tiles(file, level)
        self._full = np.empty((level.tile_h, level.tile_w, 3), np.uint8)
        self.tile_w, self.tile_h = level.tile_w // 2, level.tile_h // 2
        self.width, self.height = level.width // 2, level.height // 2
        self.shrink = 2

    def decode(self, tile: int, out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
        """Decode and halve one tile."""
        full = self._whole.decode(tile, self._full)
        halved = cv2.resize(full, (self.tile_w, self.tile_h), dst=out, interpolation=cv2.INTER_AREA)
        return np.asarray(halved, np.uint8)


def disagreement(tiles: Tiles, number: int, *, downsample: float, read: ReadLevel) -> str | None:
    """Return how direct pixels of a level differ from OpenSlide's; None if none can be compared.

    Compares pixel for pixel where the most bytes are, so where the most detail is. A corner that no
    level-0 pixel meets exactly OpenSlide moves by up to a hundredth of a pixel, and interpolates:
    then it may differ by as much as that can make, and the first tile, which has such a corner, is
    compared as well.

    Args:
        tiles: The level, as stored.
        number: Its number.
        downsample: Level-0 pixels per pixel of it.
        read: Reads pixels of a level as OpenSlide does.
    """
    level, compared, exactly = tiles.level, False, False
    by_bytes = np.argsort(level.counts)[::-1]
    most = by_bytes[:: max(1, len(by_bytes) // 4)][: 3 if number == 0 else 1].tolist()
    for tile in [*most, 0]:
        if tile == 0 and exactly:
            continue
        w, h = min(_CHECK_PX, level.width), min(_CHECK_PX, level.height)
        x = max(0, min(tile % level.across * level.tile_w, level.width - w))
        y = max(0, min(tile // level.across * level.tile_h, level.height - h))
        off = [abs(round(at * downsample) / downsample - at) for at in (x, y)]
        if max(off) > 0.01:
            continue  # nothing to compare
        try:
            ours = read_rect(tiles, x, y, w, h)
        except SlideError:
            continue  # a damaged tile says nothing about the others
        theirs = read(number, x, y, w, h)
        if theirs is None:
            continue
        compared, exactly = True, exactly or max(off) < 1e-9
        moved = sum(math.ceil(share * _STEPS - 1e-6) for share in off) / _STEPS
        gap = int(np.abs(ours.astype(np.int16) - theirs).max())
        if gap > 255 * moved:
            what = f"{level.codec.name} pixels of level {number}"
            return f"direct {what} differ from OpenSlide's by up to {gap} grey levels"
    return "" if compared else None


def shrink_for(ratio: float) -> int:
    """Return the largest DCT shrink (1, 2, 4, 8) at or finer than ``ratio`` within 1 %."""
    return int(min(8, 2 ** max(0, math.floor(math.log2(ratio * 1.01)))))


def read_rect(
    tiles: Tiles, x: int, y: int, w: int, h: int, *, tolerant: bool = False
) -> NDArray[np.uint8]:
    """Read a rectangle given in pixels of ``tiles``: RGB [h, w, 3], white outside the level.

    A damaged tile raises SlideError (``bad_tile``); with ``tolerant`` it is painted as tissue.
    """
    out = np.full((h, w, 3), 255, np.uint8)
    right, bottom = min(x + w, tiles.width), min(y + h, tiles.height)
    left, top = max(x, 0), max(y, 0)
    if left >= right or top >= bottom:
        return out
    tile_w, tile_h = tiles.tile_w, tiles.tile_h
    for row in range(top // tile_h, -(-bottom // tile_h)):
        for column in range(left // tile_w, -(-right // tile_w)):
            try:
                pixels = tiles.decode(row * tiles.level.across + column)
            except SlideError:
                if not tolerant:
                    raise
                pixels = np.full((tile_h, tile_w, 3), DAMAGED_RGB, np.uint8)
            ax, bx = max(left, column * tile_w), min(right, (column + 1) * tile_w)
            ay, by = max(top, row * tile_h), min(bottom, (row + 1) * tile_h)
            out[ay - y : by - y, ax - x : bx - x] = pixels[
                ay - row * tile_h : by - row * tile_h, ax - column * tile_w : bx - column * tile_w
            ]
    return out


def read_patches(
    tiles: Tiles, boxes: NDArray[np.int64], out: NDArray[np.uint8], *, native: bool
) -> NDArray[np.bool_]:
    """Fill ``out`` [n, px, px, 3] decoding each needed tile once; False where one is damaged.

    Tiles are visited in file order and copied into every patch they touch; a tile that is a patch
    is decoded in place. A patch that is not at the target scale is gathered in a buffer of its own
    and averaged down when its last tile came, so about two rows of patches are held at a time.
    """
    px = out.shape[1]
    ok = np.ones(len(boxes), bool)
    pieces = _pieces(boxes, tiles)
    waiting = np.bincount([piece[1] for piece in pieces], minlength=len(boxes)).tolist()
    buffers: dict[int, NDArray[np.uint8]] = {}
    spare: list[NDArray[np.uint8]] = []  # of patches that are done, for those to come
    room = int((boxes[:, 2] * boxes[:, 3]).max(initial=0)) * 3
    averaging = Scratch()
    scratch = np.empty((tiles.tile_h, tiles.tile_w, 3), np.uint8)
    whole = (0, px, 0, px) if native and tiles.tile_w == tiles.tile_h == px else None
    decoded, damaged = -1, False
    for tile, index, top, bottom, left, right, down, across in pieces:
        in_place = (top, bottom, left, right) == whole
        if in_place or tile != decoded:
            try:
                tiles.decode(tile, out[index] if in_place else scratch)
                damaged = False
            except SlideError:
                damaged = True
            decoded = -1 if in_place else tile
        if damaged:
            ok[index] = False
            if index in buffers:
                spare.append(buffers.pop(index))
            continue
        if in_place:
            continue
        if native:
            target = out[index]
        elif ok[index]:
            if index not in buffers:
                buffers[index] = spare.pop() if spare else np.empty(room, np.uint8)
            target = _shaped(buffers[index], boxes[index])
        else:
            continue
        target[top + down : bottom + down, left + across : right + across] = scratch[
            top:bottom, left:right
        ]
        waiting[index] -= 1
        if not native and not waiting[index]:
            done = buffers.pop(index)
            gathered = _shaped(done, boxes[index])
            resize_area(gathered, width=px, height=px, out=out[index], scratch=averaging)
            spare.append(done)
    return ok


def _shaped(buffer: NDArray[np.uint8], box: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Return the part of a buffer that holds the pixels of a box, as [h, w, 3]."""
    w, h = int(box[2]), int(box[3])
    return buffer[: h * w * 3].reshape(h, w, 3)


def _pieces(boxes: NDArray[np.int64], tiles: Tiles) -> list[list[int]]:
    """List the overlaps of patches and tiles, in tile order.

    Args:
        boxes: int64 [n, 4]: x, y, w, h in pixels of ``tiles``.
        tiles: The level.

    Returns:
        For each piece: tile, patch, top, bottom, left, right inside the tile, and what to add to
        rows and to columns to find it in the patch.
    """
    x, y, w, h = boxes.T
    tile_w, tile_h = tiles.tile_w, tiles.tile_h
    columns = (x + w - 1) // tile_w - x // tile_w + 1
    rows = (y + h - 1) // tile_h - y // tile_h + 1
    count = columns * rows
    patch = np.repeat(np.arange(len(boxes)), count)
    nth = np.arange(len(patch)) - np.repeat(np.cumsum(count) - count, count)
    x, y, w, h = boxes[patch].T
    column = x // tile_w + nth % columns[patch]
    row = y // tile_h + nth // columns[patch]
    x, y = x - column * tile_w, y - row * tile_h  # the patch's corner, seen from the tile's
    piece = [
        row * tiles.level.across + column,
        patch,
        np.maximum(y, 0),
        np.minimum(y + h, tile_h),
        np.maximum(x, 0),
        np.minimum(x + w, tile_w),
        -y,
        -x,
    ]
    table: list[list[int]] = np.stack(piece, axis=1)[np.argsort(piece[0], kind="stable")].tolist()
    return table
