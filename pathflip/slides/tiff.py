"""The layout of TIFF slides, parsed once: its limits, and the levels that need no OpenSlide."""

from __future__ import annotations

import os
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import tifffile
from numpy.typing import NDArray

from pathflip.errors import SlideError
from pathflip.slides.tiles import Codec, Jpeg2000Codec, TiffCodec, TiledLevel, jpeg_codec

MAX_TILE_PX = 8192
MAX_LEVEL_PX = 2**36
MAX_LEVELS = 16
MAX_TILED_PAGES = 8 * MAX_LEVELS
"""Most tiled images of a file; several scenes may have a pyramid each, and planes between."""
MAX_PAGES = MAX_TILED_PAGES + 1
"""Pages looked at."""

_JPEG_COMPRESSION = 7
_TIFF_COMPRESSIONS = (1, 5, 8, 32773, 32946, 50000)
"""No compression, LZW, deflate, PackBits, deflate and zstd."""
_APERIO_YCBCR, _APERIO_RGB = 33003, 33005
_RGB, _YCBCR = 2, 6
COMPRESSIONS = {
    1: "none", 5: "LZW", 7: "JPEG", 8: "deflate", 32773: "PackBits", 32946: "deflate",
    33003: "JPEG 2000", 33005: "JPEG 2000", 34712: "JPEG 2000", 34887: "LERC", 34925: "LZMA",
    34933: "PNG", 34934: "JPEG XR", 22610: "JPEG XR", 50000: "zstd", 50001: "WebP",
    50002: "JPEG XL", 52546: "JPEG XL",
}  # fmt: skip
"""{value of the tag: name of the compression}."""


@dataclass(frozen=True, kw_only=True)
class TiffPage:
    """Tags of one page (image file directory) of a TIFF.

    Attributes:
        width, height: Size, px.
        tile_w, tile_h: Tile size, px; 0 if the page is not tiled.
        offsets, counts: int64 [tiles], where each tile's bytes lie in the file; empty if the page
            is not tiled, or its tiles are beyond ``MAX_TILE_PX``.
        compression, photometric, planar, samples, bits: Values of the tags of these names.
        jpeg_tables: JPEG tables shared by the tiles, or nothing.
        orientation: Value of the tag; 1 is upright.
        sample_format: Value of the tag; 1 is unsigned.
        extra_samples: Meanings of the samples beyond the colours.
        subfile: Flags of the page; 1 is a smaller version of another.
        predictor: Value of the tag; 2 is the difference to the pixel on the left.
        mpp: µm per pixel across that it states, 0 if none.
    """

    width: int
    height: int
    tile_w: int
    tile_h: int
    offsets: NDArray[np.int64]
    counts: NDArray[np.int64]
    compression: int
    photometric: int
    planar: int
    samples: int
    bits: int | tuple[int, ...]
    jpeg_tables: bytes
    orientation: int = 1
    sample_format: int = 1
    extra_samples: tuple[int, ...] = ()
    subfile: int = 0
    predictor: int = 1
    mpp: float = 0.0


@dataclass(frozen=True, kw_only=True)
class TiffLayout:
    """Tags of a TIFF file.

    Attributes:
        name: The file's name, for messages.
        file_bytes: Size of the file.
        pages: Its pages; none if the file is no TIFF or cannot be parsed.
        description: Text of its first page.
        big_endian: Whether its numbers are stored most significant byte first.
    """

    name: str
    file_bytes: int
    pages: tuple[TiffPage, ...] = ()
    description: str = ""
    big_endian: bool = False

    @property
    def tiled(self) -> list[TiffPage]:
        """Pages that are tiled; level 0 is the first."""
        return [page for page in self.pages if page.tile_w]

    @property
    def is_ome(self) -> bool:
        """True if the file describes itself in OME-XML."""
        return self.description.rstrip().endswith("OME>")


_Image = TypeVar("_Image", TiffPage, TiledLevel)


def is_tiff(path: str | Path) -> bool:
    """Return whether the file begins with a TIFF or BigTIFF magic number."""
    with open(path, "rb") as file:
        magic = file.read(4)
    return magic in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def read_layout(path: str | Path) -> TiffLayout:
    """Parse the tags of a TIFF file, none of its pixels.

    A file that is no TIFF or that tifffile cannot parse has no pages: OpenSlide, in a process of
    its own, has the last word on it.
    """
    empty = TiffLayout(name=Path(path).name, file_bytes=os.stat(path).st_size)
    if not is_tiff(path):
        return empty
    pages, description, big_endian = [], "", False
    try:
        with tifffile.TiffFile(path) as tif:
            big_endian = tif.byteorder == ">"
            for index, page in enumerate(tif.pages):
                if index == MAX_PAGES or not isinstance(page, tifffile.TiffPage):
                    break
                pages.append(_page(page))
                description = description or page.description
    except (ValueError, LookupError, OSError, struct.error, MemoryError, TypeError, OverflowError):
        return empty
    return TiffLayout(
        name=empty.name,
        file_bytes=empty.file_bytes,
        pages=tuple(pages),
        description=description,
        big_endian=big_endian,
    )


def _page(page: tifffile.TiffPage) -> TiffPage:
    tile_w, tile_h = (page.tilewidth, page.tilelength) if page.is_tiled else (0, 0)
    # Offsets of absurd tiles are not even looked at: such a file is refused.
    located = page.is_tiled and max(tile_w, tile_h) <= MAX_TILE_PX
    return TiffPage(
        width=page.imagewidth,
        height=page.imagelength,
        tile_w=tile_w,
        tile_h=tile_h,
        offsets=np.asarray(page.dataoffsets if located else (), np.int64),
        counts=np.asarray(page.databytecounts if located else (), np.int64),
        compression=page.compression,
        photometric=page.photometric,
        planar=page.planarconfig,
        samples=page.samplesperpixel,
        bits=page.bitspersample,
        jpeg_tables=page.jpegtables or b"",
        orientation=_whole(page.tags.valueof(274, 1), 1),
        sample_format=_whole(page.sampleformat, 1),
        extra_samples=tuple(int(kind) for kind in page.extrasamples),
        subfile=_whole(page.subfiletype, 0),
        predictor=_whole(page.predictor, 1),
        mpp=_stated_mpp(page),
    )


def _stated_mpp(page: tifffile.TiffPage) -> float:
    """Return µm per pixel across as the page states it; 0 if it does not."""
    unit_um = {2: 25_400.0, 3: 10_000.0}.get(page.tags.valueof(296, 2))
    try:
        numerator, denominator = page.tags.valueof(282, (0, 1))
        return 0.0 if unit_um is None else unit_um * denominator / numerator
    except (TypeError, ValueError, ZeroDivisionError):  # whatever a hostile file has there
        return 0.0


def _whole(value: object, default: int) -> int:
    """Return a tag's value if it is the one number that it should be."""
    return value if isinstance(value, int) else default


def check_limits(layout: TiffLayout) -> None:
    """Refuse a TIFF whose declared geometry would make the C library allocate absurd memory.

    A 1,151-byte file that declares one 65536 x 65536 tile makes GLib abort the whole process; no
    Python exception can catch that, so the tags are checked before OpenSlide sees the file.

    Raises:
        SlideError: ``reader_limits`` naming the tag; ``unreadable`` when the file ends before its
            tiles do, whichever level they belong to.
    """
    name = layout.name
    for page in layout.pages:
        if max(page.tile_w, page.tile_h) > MAX_TILE_PX:
            raise SlideError(
                f"{name} declares tiles of {page.tile_w} x {page.tile_h} px; the limit is "
                f"{MAX_TILE_PX}.",
                hint="Such a file is damaged or hostile; convert it to a tiled pyramid first.",
                code="reader_limits",
            )
        if page.width * page.height > MAX_LEVEL_PX:
            raise SlideError(
                f"{name} declares a level of {page.width} x {page.height} px; the limit is 2^36 "
                "pixels.",
                hint="Such a file is damaged or hostile.",
                code="reader_limits",
            )
        if page.tile_w and not 0 < len(page.offsets) == len(page.counts):
            # OpenSlide would leave the level out, without a word.
            raise SlideError(
                f"{name} is cut off: the list of tiles of a level is not in the file.",
                hint="Copy it again from its source.",
                code="unreadable",
            )
    beyond = 0
    for page in layout.pages:
        after = page.offsets > layout.file_bytes - page.counts  # a sum could overflow
        beyond += int(((page.counts < 0) | (page.offsets < 0) | after).sum())
    if beyond:
        raise SlideError(
            f"{name} is cut off: {beyond} of its tiles lie beyond the end of the file.",
            hint="Copy it again from its source.",
            code="unreadable",
        )
    # Scenes, planes and levels of one file; how many of them are levels, OpenSlide says.
    if len(layout.tiled) > MAX_TILED_PAGES:
        raise SlideError(
            f"{name} declares more than {MAX_TILED_PAGES} tiled images.",
            hint="Such a file is damaged or hostile.",
            code="reader_limits",
        )


def by_level(sizes: Sequence[tuple[int, int]], images: Sequence[_Image]) -> dict[int, _Image]:
    """Return {level: its image} of the levels whose size one image alone has.

    Args:
        sizes: (width, height) of the levels.
        images: Pages of the file, or levels.
    """
    counts = Counter((image.width, image.height) for image in images)
    by_size = {(image.width, image.height): image for image in images}
    return {level: by_size[size] for level, size in enumerate(sizes) if counts[size] == 1}


def tiled_levels(layout: TiffLayout, path: Path) -> list[TiledLevel]:
    """Return every tiled level of a TIFF file that has a codec; see :func:`no_codec` for others."""
    return [
        TiledLevel(
            width=page.width,
            height=page.height,
            tile_w=page.tile_w,
            tile_h=page.tile_h,
            offsets=page.offsets,
            counts=page.counts,
            codec=_codec(page),
            file=path,
        )
        for page in layout.tiled
        if not no_codec(page)
    ]


def no_codec(page: TiffPage) -> str:
    """Return why the tiles of a page are not decoded without OpenSlide; empty if they are."""
    known = (_JPEG_COMPRESSION, _APERIO_YCBCR, _APERIO_RGB, *_TIFF_COMPRESSIONS)
    if page.compression not in known:
        name = COMPRESSIONS.get(page.compression, f"compression {page.compression}")
        return f"{name} has no direct path"
    bits = set(page.bits) if isinstance(page.bits, tuple) else {page.bits}
    aperio = page.compression in (_APERIO_YCBCR, _APERIO_RGB)
    colour = page.photometric == _RGB or aperio
    if page.compression == _JPEG_COMPRESSION:
        colour = page.photometric in (_RGB, _YCBCR)
    if page.samples != 3 or bits != {8} or page.planar != 1 or not colour:
        return "its pixels are no RGB of 8 bits, one beside the other"
    if page.predictor not in (1, 2):
        return f"predictor {page.predictor} has no direct path"
    tiles = -(-page.width // page.tile_w) * -(-page.height // page.tile_h)
    if len(page.offsets) != tiles or len(page.counts) != tiles or not page.counts.all():
        return "tiles are missing"  # OpenSlide knows what each vendor means by that
    return ""


def _codec(page: TiffPage) -> Codec:
    if page.compression in (_APERIO_YCBCR, _APERIO_RGB):
        return Jpeg2000Codec(ycbcr=page.compression == _APERIO_YCBCR)
    if page.compression != _JPEG_COMPRESSION:
        return TiffCodec(
            name=COMPRESSIONS[page.compression],
            compression=page.compression,
            predictor=page.predictor,
            tile_w=page.tile_w,
            tile_h=page.tile_h,
        )
    return jpeg_codec(rgb=page.photometric == _RGB, tables=page.jpeg_tables)
