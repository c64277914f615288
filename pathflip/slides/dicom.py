"""The layout of DICOM whole-slide images: where the frames of each level lie in its file.

Reads what the direct path needs and no more (DICOM PS3.5, 7 and A.4: elements and encapsulated
frames; PS3.3, C.8.12: whole-slide images). Files of another kind, or that use what is not read
here, have no level; OpenSlide reads them.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openslide
from numpy.typing import NDArray

from pathflip.errors import SlideError
from pathflip.slides.sources import dicom_files, is_other_dicom
from pathflip.slides.tiles import TiledLevel, jpeg_codec, jpeg_colours

_JPEG_BASELINE = "1.2.840.10008.1.2.4.50"
_SYNTAXES = {
    "1.2.840.10008.1.2.5": "RLE", "1.2.840.10008.1.2.1.99": "deflate",
    "1.2.840.10008.1.2.4.51": "JPEG of 12 bits", "1.2.840.10008.1.2.4.57": "lossless JPEG",
    "1.2.840.10008.1.2.4.70": "lossless JPEG", "1.2.840.10008.1.2.4.80": "JPEG-LS",
    "1.2.840.10008.1.2.4.81": "JPEG-LS", "1.2.840.10008.1.2.4.110": "JPEG XL",
    "1.2.840.10008.1.2.4.111": "JPEG XL", "1.2.840.10008.1.2.4.112": "JPEG XL",
    "1.2.840.10008.1.2.4.201": "high-throughput JPEG 2000",
    "1.2.840.10008.1.2.4.202": "high-throughput JPEG 2000",
    "1.2.840.10008.1.2.4.203": "high-throughput JPEG 2000",
}  # fmt: skip
"""{transfer syntax: name of the compression} of what OpenSlide does not read."""
_HEAD_BYTES = 4 << 20
"""Most of a file that is searched for its pixels: longer descriptions are of sparse frames."""
_MAX_FRAMES = 1 << 20
_LONG = frozenset((b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR",
                   b"UT", b"UV"))  # fmt: skip
"""Value representations whose length has 32 bits."""
_UNDEFINED = 0xFFFFFFFF
_BEYOND = 1 << 40
"""Most bytes that a file may lack of what its tables say: it is cut off, not absurd."""
_MAX_FRAGMENTS = 1024
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_CUT_OFF = -1
_PREAMBLE = 132
_MAX_DEPTH = 16
_STREAM_BYTES = 1 << 20
"""Most bytes of a frame that are searched for what its stream says of colours."""

_KIND, _SYNTAX, _SERIES, _TILING, _CONCATENATION = (
    0x00080008, 0x00020010, 0x0020000E, 0x00209311, 0x00209161
)  # fmt: skip
_SAMPLES, _COLOUR, _FRAMES = 0x00280002, 0x00280004, 0x00280008
_ROWS, _COLUMNS, _BITS = 0x00280010, 0x00280011, 0x00280100
_WIDTH, _HEIGHT, _PATHS, _PLANES = 0x00480006, 0x00480007, 0x00480302, 0x00480303
_LONG_OFFSETS, _LONG_LENGTHS, _PIXELS = 0x7FE00001, 0x7FE00002, 0x7FE00010


def dicom_levels(files: Sequence[Path], *, series: str) -> tuple[list[TiledLevel], str]:
    """Find the levels of a series whose frames can be decoded directly.

    Args:
        files: DICOM files, of this series or others.
        series: UID of the series.

    Returns:
        Levels in no order, and why other files have none.
    """
    levels, reasons = [], []
    for path in files:
        try:
            levels.append(_level(path, series))
        except _OtherSeriesError:
            continue
        except (_NoLayoutError, struct.error, OSError, ValueError, IndexError) as error:
            reasons.append(str(error) if isinstance(error, _NoLayoutError) else "a file is damaged")
    return levels, reasons[0] if reasons else ""


@dataclass(frozen=True, kw_only=True)
class StatedColours:
    """Colours of a level's frames, by the header of its file and by the first frame itself.

    Attributes:
        file: Name of the file.
        header: Photometric Interpretation, which readers go by (PS3.5, 8.2.1).
        stream: Photometric Interpretation that the frame's JPEG stream asks for, RGB or
            YBR_FULL_422; empty where it says nothing.
        sign: Mark of the stream that says so.
    """

    file: str
    header: str
    stream: str
    sign: str

    @property
    def agree(self) -> bool:
        """True where the frames may be what the header says."""
        return not self.stream or (self.header == "RGB") == (self.stream == "RGB")


def stated_colours(files: Sequence[Path], *, series: str) -> list[StatedColours]:
    """Return the colours stated of each level of a series that is stored as baseline JPEG.

    Args:
        files: DICOM files, of this series or others.
        series: UID of the series.
    """
    found = []
    for path in files:
        try:
            with open(path, "rb", buffering=0) as file:
                head = os.pread(file.fileno(), _HEAD_BYTES, 0)
                values, pixels = _values(head, series)
                text = {
                    tag: values.get(tag, b"").decode("ascii", "replace").strip("\0 ")
                    for tag in (_KIND, _SYNTAX, _COLOUR)
                }
                if text[_SYNTAX] != _JPEG_BASELINE or "VOLUME" not in text[_KIND].split("\\"):
                    continue  # a label or an overview is never read
                stream, sign = _stream_colours(file.fileno(), pixels)
        except (_OtherSeriesError, _NoLayoutError, struct.error, OSError, IndexError):
            continue  # whether it can be read at all is another question
        found.append(StatedColours(file=path.name, header=text[_COLOUR], stream=stream, sign=sign))
    return found


def _stream_colours(file: int, start: int) -> tuple[str, str]:
    """Return what the first frame's JPEG stream says of its colours, and by which mark.

    Args:
        file: Open file descriptor.
        start: Position of the items of the pixels, of which the first is the list of frames.
    """
    tag, length = _item(file, start)
    at, data = start + 8 + length, b""
    for _ in range(_MAX_DEPTH):
        tag, length = _item(file, at)
        if tag != _ITEM or len(data) >= _STREAM_BYTES:
            break
        data += os.pread(file, min(length, _STREAM_BYTES - len(data)), at + 8)
        at += 8 + length
        if (found := jpeg_colours(data)) is not None:
            return found
    return "", ""


def unread_dicom(message: str) -> str:
    """Return what OpenSlide's words say that a file has and is not read; empty if it is damaged."""
    if found := re.search(r"[Uu]nsupported transfer syntax ([\d.]+)", message):
        return f"is compressed by {_SYNTAXES.get(found[1], f'transfer syntax {found[1]}')}"
    if found := re.search(r"[Uu]nsupported (photometric interpretation) (\w+)", message):
        return f"has the {found[1]} {found[2]}"
    if found := re.search(r"Attribute (\w+) value (\S+) != (\S+)", message):
        return f"has {found[1]} {found[2].rstrip(',')} and not {found[3].rstrip('.,')}"
    return ""


def check_one_series(folder: Path) -> None:
    """Refuse a folder of several series, and one of which OpenSlide would leave a level out.

    Raises:
        SlideError: ``several_series``, ``unreadable``.
    """
    series = set()
    for file in dicom_files(folder):
        try:
            with openslide.OpenSlide(str(file)) as opened:
                series.add(opened.properties.get("dicom.SeriesInstanceUID"))
        except openslide.OpenSlideError as error:
            if is_other_dicom(file):
                continue
            raise SlideError(
                f"{file.name}, one of the files of {folder.name}, is cut off or damaged: {error}.",
                hint="Copy it again from its source; without it the slide lacks a level.",
                code="unreadable",
            ) from error
    if len(series) > 1:
        raise SlideError(
            f"{folder.name} holds {len(series)} DICOM series.",
            hint="Put each series into a folder of its own.",
            code="several_series",
        )


class _NoLayoutError(Exception):
    """A file uses what is not read here."""


class _OtherSeriesError(Exception):
    """A file belongs to another series."""


def _level(path: Path, series: str) -> TiledLevel:
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        head = os.pread(file.fileno(), min(size, _HEAD_BYTES), 0)
        values, pixels = _values(head, series)

        def text(tag: int) -> str:
            return values.get(tag, b"").decode("ascii", "replace").strip("\0 ")

        def number(tag: int, default: int) -> int:
            value = values.get(tag, b"")
            return int.from_bytes(value, "little") if value else default

        if (syntax := text(_SYNTAX)) != _JPEG_BASELINE:
            raise _NoLayoutError(f"transfer syntax {syntax} has no direct path")
        if text(_TILING) != "TILED_FULL" or _CONCATENATION in values:
            raise _NoLayoutError("its frames are sparse or in several files")
        if number(_PATHS, 1) != 1 or number(_PLANES, 1) != 1:
            raise _NoLayoutError("it has several optical paths or focal planes")
        rgb, colour = text(_COLOUR) == "RGB", ("RGB", "YBR_FULL", "YBR_FULL_422")
        if number(_SAMPLES, 0) != 3 or number(_BITS, 0) != 8 or text(_COLOUR) not in colour:
            raise _NoLayoutError("its pixels are no RGB of 8 bits")
        width, height = number(_WIDTH, 0), number(_HEIGHT, 0)
        tile_w, tile_h = number(_COLUMNS, 0), number(_ROWS, 0)
        frames = int(text(_FRAMES) or 0)
        if min(width, height, tile_w, tile_h) < 1 or frames > _MAX_FRAMES:
            raise _NoLayoutError("its geometry is not stated")
        if frames != -(-width // tile_w) * -(-height // tile_h):
            raise _NoLayoutError("it has not one frame for each tile")
        offsets, counts = _frames(file.fileno(), values, start=pixels, frames=frames)
    if (offsets < 0).any() or (offsets > size + _BEYOND).any() or (counts < 0).any():
        raise _NoLayoutError("its table of frames is damaged")
    return TiledLevel(
        width=width,
        height=height,
        tile_w=tile_w,
        tile_h=tile_h,
        offsets=offsets,
        counts=counts,
        codec=jpeg_codec(rgb=rgb, items=True),
        file=path,
    )


def _values(head: bytes, series: str) -> tuple[dict[int, bytes], int]:
    """Return {tag: value} of the outermost elements, and where the items of the pixels begin."""
    if head[_PREAMBLE - 4 : _PREAMBLE] != b"DICM":
        raise _NoLayoutError("a file has no DICOM header")
    values: dict[int, bytes] = {}
    for tag, start, length in _elements(head, _PREAMBLE, depth=0):
        if tag == _PIXELS:
            if length != _UNDEFINED:
                raise _NoLayoutError("its frames are not encapsulated")
            return values, start
        if length != _UNDEFINED:
            values[tag] = head[start : start + length]
        if tag == _SERIES and values[tag].decode("ascii", "replace").strip("\0 ") != series:
            raise _OtherSeriesError
    raise _NoLayoutError("its pixels were not found")


def _elements(head: bytes, at: int, *, depth: int) -> Iterator[tuple[int, int, int]]:
    """Yield (tag, start of the value, length) of elements; those inside sequences are skipped."""
    if depth > _MAX_DEPTH:
        raise _NoLayoutError("its description is nested too deeply")
    while at + 8 <= len(head):
        group, element = struct.unpack_from("<HH", head, at)
        tag = group << 16 | element
        if group == 0xFFFE:  # an item or the end of one
            yield tag, at + 8, struct.unpack_from("<I", head, at + 4)[0]
            return
        kind = head[at + 4 : at + 6]
        if kind in _LONG:
            (length,) = struct.unpack_from("<I", head, at + 8)
            start = at + 12
        else:
            (length,) = struct.unpack_from("<H", head, at + 6)
            start = at + 8
        yield tag, start, length
        if length == _UNDEFINED:
            if tag == _PIXELS:
                return
            at = _after_sequence(head, start, depth=depth + 1)
        else:
            at = start + length


def _after_sequence(head: bytes, at: int, *, depth: int) -> int:
    """Return the position after a sequence of undefined length whose items begin at ``at``."""
    while True:
        group, element, length = struct.unpack_from("<HHI", head, at)
        tag = group << 16 | element
        at += 8
        if tag == _SEQUENCE_END:
            return at
        if tag != _ITEM:
            raise _NoLayoutError("its description is damaged")
        if length != _UNDEFINED:
            at += length
            continue
        for inner, start, _ in _elements(head, at, depth=depth):
            if inner >> 16 == 0xFFFE:
                if inner != _ITEM_END:
                    raise _NoLayoutError("its description is damaged")
                at = start


def _frames(
    file: int, values: dict[int, bytes], *, start: int, frames: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where the items of each frame lie: by the file's tables, or from item to item.

    Frames beyond the end of the file have a place there: whoever reads them finds them cut off.
    """
    tag, length = _item(file, start)
    if tag != _ITEM:
        raise _NoLayoutError("its frames are damaged")
    first = start + 8 + length  # of the first frame's item
    if _LONG_OFFSETS in values and _LONG_LENGTHS in values:
        offsets = np.frombuffer(values[_LONG_OFFSETS], "<u8").astype(np.int64)
        counts = np.frombuffer(values[_LONG_LENGTHS], "<u8").astype(np.int64)
        if (offsets < 0).any() or (counts < 0).any():
            raise _NoLayoutError("its table of frames is damaged")
        offsets, counts = offsets + first, 8 + counts + counts % 2
    elif length:
        if length != 4 * frames:
            raise _NoLayoutError("its table of frames is damaged")
        table = np.frombuffer(os.pread(file, length, start + 8), "<u4").astype(np.int64)
        offsets = table + first
        counts = np.diff(offsets, append=_after_items(file, int(offsets[-1])))
    else:
        found, at = [], first
        for _ in range(frames):
            tag, length = _item(file, at)
            if tag not in (_ITEM, _CUT_OFF):
                raise _NoLayoutError("its frames are damaged")
            found.append((at, 8 + length))
            at += 8 + length
        offsets, counts = np.array(found, np.int64).reshape(-1, 2).T
        if _item(file, at)[0] not in (_SEQUENCE_END, _CUT_OFF):
            raise _NoLayoutError("its frames are in several pieces each")
    if len(offsets) != frames or len(counts) != frames:
        raise _NoLayoutError("its table of frames is damaged")
    return offsets, counts


def _after_items(file: int, at: int) -> int:
    """Return the position after the items of the last frame, which begin at ``at``."""
    for _ in range(_MAX_FRAGMENTS):
        tag, length = _item(file, at)
        if tag == _CUT_OFF:
            return at + 9  # one byte that is not there
        if tag != _ITEM:
            return at
        at += 8 + length
    raise _NoLayoutError("its last frame has no end")


def _item(file: int, at: int) -> tuple[int, int]:
    """Return tag and length of an item; ``_CUT_OFF`` and 1 beyond the end of the file."""
    head = os.pread(file, 8, at)
    if len(head) < 8:
        return _CUT_OFF, 1
    group, element, length = struct.unpack("<HHI", head)
    return group << 16 | element, length
