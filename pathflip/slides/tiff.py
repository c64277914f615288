"""The direct path: tiled JPEG pyramids decoded tile by tile with libjpeg-turbo.

OpenSlide decodes the same tile again for every patch that touches it and converts every pixel
twice. For tiled JPEG TIFF (Aperio SVS, generic pyramids) the layout is parsed once (tifffile) and
each needed tile is decoded once, straight into the patches that touch it. ``Slide`` checks the
result against OpenSlide when it opens a file and keeps to OpenSlide where they differ.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg
import tifffile
from numpy.typing import NDArray

from pathflip.errors import SlideError

MAX_TILE_PX = 8192
MAX_LEVEL_PX = 2**36
MAX_LEVELS = 16

_SOI = b"\xff\xd8"
_APP14 = bytes.fromhex("ffee000e41646f6265006400000000")  # Adobe marker, then the transform byte
_JPEG_COMPRESSION = 7
_RGB, _YCBCR = 2, 6


@dataclass(frozen=True, kw_only=True)
class JpegLevel:
    """One tiled JPEG level of a TIFF file.

    Attributes:
        width, height: Size in pixels of this level.
        tile_w, tile_h: Tile size in pixels.
        offsets, counts: int64 [rows * across], where each tile's bytes lie in the file.
        header: What goes before each tile's own bytes (SOI, shared tables, colour transform).
    """

    width: int
    height: int
    tile_w: int
    tile_h: int
    offsets: NDArray[np.int64]
    counts: NDArray[np.int64]
    header: bytes

    @property
    def across(self) -> int:
        """Tiles in a row."""
        return -(-self.width // self.tile_w)


def is_tiff(path: str | Path) -> bool:
    """Whether the file begins with a TIFF or BigTIFF magic number."""
    with open(path, "rb") as file:
        magic = file.read(4)
    return magic in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def check_limits(path: str | Path) -> None:
    """Refuse a TIFF whose declared geometry would make the C library allocate absurd memory.

    A 1,151-byte file that declares one 65536 x 65536 tile makes GLib abort the whole process; no
    Python exception can catch that, so the tags are read before OpenSlide sees the file.

    Raises:
        SlideError: ``reader_limits`` naming the tag; ``unreadable`` when the file ends before its
            tiles do, whichever level they belong to.
    """
    if not is_tiff(path):
        return
    name = Path(path).name
    try:
        geometry = _page_geometry(path)
    except (ValueError, KeyError, IndexError, OSError, struct.error, MemoryError, TypeError):
        return  # not parseable by us: OpenSlide, in its own process, has the last word
    levels = beyond = 0
    for width, height, tile_w, tile_h, lost in geometry:
        beyond += lost
        if max(tile_w, tile_h) > MAX_TILE_PX:
            raise SlideError(
                f"{name} declares tiles of {tile_w} x {tile_h} px; the limit is {MAX_TILE_PX}.",
                hint="Such a file is damaged or hostile; convert it to a tiled pyramid first.",
                code="reader_limits",
            )
        if width * height > MAX_LEVEL_PX:
            raise SlideError(
                f"{name} declares a level of {width} x {height} px; the limit is 2^36 pixels.",
                hint="Such a file is damaged or hostile.",
                code="reader_limits",
            )
        levels += tile_w > 0
    if beyond:
        raise SlideError(
            f"{name} is cut off: {beyond} of its tiles lie beyond the end of the file.",
            hint="Copy it again from its source.",
            code="unreadable",
        )
    if levels > MAX_LEVELS:
        raise SlideError(
            f"{name} declares {levels} tiled levels; the limit is {MAX_LEVELS}.",
            hint="Such a file is damaged or hostile.",
            code="reader_limits",
        )


def _page_geometry(path: str | Path) -> list[tuple[int, int, int, int, int]]:
    """Of every page: width, height, tile width and height (0 if not tiled), tiles past the end."""
    found = []
    size = Path(path).stat().st_size
    with tifffile.TiffFile(path) as tif:
        for index, page in enumerate(tif.pages):
            if index > 8 * MAX_LEVELS or not isinstance(page, tifffile.TiffPage):
                break
            tile_w, tile_h = (page.tilewidth, page.tilelength) if page.is_tiled else (0, 0)
            lost = 0
            if page.is_tiled and max(tile_w, tile_h) <= MAX_TILE_PX:
                ends = np.asarray(page.dataoffsets, np.int64) + np.asarray(
                    page.databytecounts, np.int64
                )
                lost = int((ends > size).sum())
            found.append((page.imagewidth, page.imagelength, tile_w, tile_h, lost))
    return found


def jpeg_levels(path: str | Path) -> list[JpegLevel]:
    """Every tiled 8-bit colour JPEG level of a TIFF file; empty where there is none."""
    levels: list[JpegLevel] = []
    if not is_tiff(path):
        return levels
    try:
        with tifffile.TiffFile(path) as tif:
            for page in tif.pages:
                if isinstance(page, tifffile.TiffPage) and (level := _jpeg_level(page)):
                    levels.append(level)
    except (ValueError, KeyError, IndexError, OSError, struct.error, MemoryError, TypeError):
        return []
    return levels


def _jpeg_level(page: tifffile.TiffPage) -> JpegLevel | None:
    if not (
        page.is_tiled
        and page.compression == _JPEG_COMPRESSION
        and page.samplesperpixel == 3
        and page.bitspersample == 8
        and page.photometric in (_RGB, _YCBCR)
        and page.planarconfig == 1
    ):
        return None
    offsets = np.asarray(page.dataoffsets, dtype=np.int64)
    counts = np.asarray(page.databytecounts, dtype=np.int64)
    tiles = -(-page.imagewidth // page.tilewidth) * -(-page.imagelength // page.tilelength)
    if len(offsets) != tiles or len(counts) != tiles or not counts.all():
        return None  # sparse files: OpenSlide knows what each vendor means by a missing tile
    tables: bytes = page.jpegtables or b""
    header = tables[:-2] if tables else _SOI
    # Aperio stores R, G, B components without saying so inside the JPEG stream.
    header += _APP14 + (b"\x00" if page.photometric == _RGB else b"\x01")
    return JpegLevel(
        width=page.imagewidth,
        height=page.imagelength,
        tile_w=page.tilewidth,
        tile_h=page.tilelength,
        offsets=offsets,
        counts=counts,
        header=header,
    )


class JpegTiles:
    """Decodes tiles of one level, optionally shrunk 2, 4 or 8 times in the DCT domain.

    Args:
        file: Open file descriptor; not owned.
        level: The layout.
        shrink: 1, 2, 4 or 8; tile sides must divide by it (see ``can_shrink``).
    """

    def __init__(self, file: int, level: JpegLevel, *, shrink: int = 1) -> None:
        if not can_shrink(level, shrink):
            raise ValueError(f"{level.tile_w} x {level.tile_h} px tiles do not shrink by {shrink}")
        self.level = level
        self.shrink = shrink
        self.tile_w, self.tile_h = level.tile_w // shrink, level.tile_h // shrink
        self.width, self.height = level.width // shrink, level.height // shrink
        self._file = file

    def decode(self, tile: int, out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
        """Decode one tile to uint8 RGB [tile_h, tile_w, 3], into ``out`` if it is given.

        Raises:
            SlideError: ``bad_tile`` when the bytes are missing or the stream is damaged, however
                slightly: libjpeg's warnings count, since it fills what it cannot read with grey.
        """
        level = self.level
        count = int(level.counts[tile])
        data = os.pread(self._file, count, int(level.offsets[tile]))
        if len(data) != count or data[:2] != _SOI:
            raise SlideError(f"tile {tile} is cut off or is no JPEG", code="bad_tile")
        stream = level.header + data[2:]
        try:
            if self.shrink == 1:
                pixels = simplejpeg.decode_jpeg(stream, buffer=out)
            else:
                pixels = simplejpeg.decode_jpeg(
                    stream,
                    min_height=self.tile_h,
                    min_width=self.tile_w,
                    min_factor=self.shrink,
                    buffer=out,
                )
        except ValueError as error:
            raise SlideError(f"tile {tile}: {error}", code="bad_tile") from error
        if pixels.shape != (self.tile_h, self.tile_w, 3):
            raise SlideError(f"tile {tile} has the wrong size", code="bad_tile")
        return np.asarray(pixels)


def can_shrink(level: JpegLevel, shrink: int) -> bool:
    """Whether every tile side divides by ``shrink`` and libjpeg can scale by it."""
    return shrink in (1, 2, 4, 8) and level.tile_w % shrink == 0 and level.tile_h % shrink == 0


def shrink_for(ratio: float) -> int:
    """Largest DCT shrink (1, 2, 4, 8) that stays at or finer than ``ratio`` within 1 %."""
    return int(min(8, 2 ** max(0, math.floor(math.log2(ratio * 1.01)))))
