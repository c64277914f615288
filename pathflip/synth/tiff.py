"""Writing of pyramidal tiled JPEG TIFF from tiles that are already encoded.

tifffile needs imagecodecs to write JPEG; the few tags a slide needs are written here instead. The
file stays classic TIFF while it fits 4 GB and becomes BigTIFF beyond. Baseline tags: TIFF 6.0 and
its Technical Note 2 (JPEG); Aperio's layout as OpenSlide's documentation describes it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from pathflip.files import partial
from pathflip.synth.atlas import GLASS_LEVEL

_QUALITY = 85
_TILE_PX = 256
_RGB, _YCBCR = 2, 6
_CLASSIC_LIMIT = 2**32 - 2**20
_TABLES = (0xDB, 0xC4)  # DQT, DHT
_DROPPED = (0xE0,)  # JFIF's marker says YCbCr, which RGB components are not

_Tags = dict[int, tuple[int, tuple[int, ...] | bytes]]


def encode_tile(
    pixels: NDArray[np.uint8], *, quality: int, components: str = "ycbcr"
) -> tuple[bytes, bytes]:
    """Encode uint8 RGBX [h, w, 4] as one JPEG, cut into (tables, stream without tables).

    Args:
        pixels: One tile.
        quality: 1 to 100.
        components: ``ycbcr`` (4:2:0) or ``rgb`` (R, G, B as they are, 4:4:4, as Aperio).
    """
    if components == "rgb":
        planes = [np.ascontiguousarray(pixels[..., c]) for c in range(3)]
        data: bytes = simplejpeg.encode_jpeg_yuv_planes(*planes, quality=quality)
    else:
        data = simplejpeg.encode_jpeg(
            np.ascontiguousarray(pixels), quality=quality, colorspace="RGBX", colorsubsampling="420"
        )
    at, tables, rest = 2, [data[:2]], [data[:2]]
    while data[at + 1] != 0xDA:  # segments before the scan
        end = at + 2 + struct.unpack_from(">H", data, at + 2)[0]
        if data[at + 1] in _TABLES:
            tables.append(data[at:end])
        elif data[at + 1] not in _DROPPED:
            rest.append(data[at:end])
        at = end
    return b"".join([*tables, b"\xff\xd9"]), b"".join([*rest, data[at:]])


def whole(tables: bytes, stream: bytes) -> bytes:
    """Return a self-contained JPEG from the two parts of ``encode_tile``."""
    return tables[:-2] + stream[2:]


def halve(pixels: NDArray[np.uint8], factor: int = 2) -> NDArray[np.uint8]:
    """Average [h, w, c] over areas of a whole factor, dropping rows and columns left over."""
    height, width = pixels.shape[0] // factor, pixels.shape[1] // factor
    cut = pixels[: height * factor, : width * factor]
    shrunk = cv2.resize(cut, (width, height), interpolation=cv2.INTER_AREA)
    return np.asarray(shrunk, dtype=np.uint8)


def write_slide(path: str | Path, pixels: NDArray[np.uint8], *, mpp: float, aperio: bool) -> None:
    """Write a slide of uint8 RGBX [h, w, 4] with its levels, as a scanner of either layout does."""
    components = "rgb" if aperio else "ycbcr"
    step = 4 if aperio else 2
    level = pixels
    with SlideFile(path, mpp=mpp, aperio=aperio, quality=_QUALITY, components=components) as file:
        while True:
            height, width = level.shape[:2]
            tiles = _cut(level, components)
            file.level(width=width, height=height, tile_px=_TILE_PX, tiles=tiles)
            if level is pixels and aperio:
                shrink = min(1.0, 768 / width)
                size = (round(width * shrink), round(height * shrink))
                thumbnail = cv2.resize(level, size, interpolation=cv2.INTER_AREA)
                file.thumbnail(np.asarray(thumbnail, np.uint8))
            if width // step < _TILE_PX:
                break
            level = halve(level, step)


def _cut(level: NDArray[np.uint8], components: str) -> Iterator[tuple[bytes, bytes]]:
    height, width = level.shape[:2]
    for y in range(0, height, _TILE_PX):
        for x in range(0, width, _TILE_PX):
            tile = level[y : y + _TILE_PX, x : x + _TILE_PX]
            if tile.shape[0] < _TILE_PX or tile.shape[1] < _TILE_PX:
                whole = np.full((_TILE_PX, _TILE_PX, 4), GLASS_LEVEL, np.uint8)
                whole[: tile.shape[0], : tile.shape[1]] = tile
                tile = whole
            yield encode_tile(tile, quality=_QUALITY, components=components)


class SlideFile:
    """A TIFF being written: levels from the largest down, then ``commit``.

    Everything goes to a temporary neighbour of ``path``; leaving the ``with`` block without an
    error puts it in place, so a file under its final name is always complete.

    Args:
        path: File of the slide.
        mpp: µm per pixel of level 0.
        aperio: Aperio's layout (descriptions, shared JPEG tables) instead of a generic pyramid.
        quality: JPEG quality, for Aperio's description alone.
        components: ``ycbcr`` or ``rgb``, as the tiles were encoded.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        mpp: float,
        aperio: bool,
        quality: int = 85,
        components: str = "ycbcr",
    ) -> None:
        self.path = Path(path)
        self.mpp, self.aperio, self.quality, self.components = mpp, aperio, quality, components
        self._temp = partial(self.path)
        self._file = open(self._temp, "wb", buffering=1 << 20)  # noqa: SIM115 - closed in __exit__
        self._file.write(b"\0" * 16)  # room for either header
        self._pages: list[_Tags] = []
        self._size0 = (0, 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._write_directories()
            self._file.close()
            if kind is None:
                os.replace(self._temp, self.path)
        finally:
            self._file.close()
            self._temp.unlink(missing_ok=True)

    def level(
        self, *, width: int, height: int, tile_px: int, tiles: Iterable[tuple[bytes, bytes]]
    ) -> None:
        """Write one level; ``tiles`` row by row, each (tables, stream) of ``encode_tile``."""
        first = not self._size0[0]
        if first:
            self._size0 = (width, height)
        offsets, counts, shared = [], [], b""
        for tables, stream in tiles:
            shared = tables
            data = stream if self.aperio else whole(tables, stream)
            offsets.append(self._append(data))
            counts.append(len(data))
        expected = -(-width // tile_px) * -(-height // tile_px)
        if len(offsets) != expected:
            raise ValueError(f"{len(offsets)} tiles for a level of {expected}")
        tags = self._image_tags(width, height)
        tags |= {322: (4, (tile_px,)), 323: (4, (tile_px,))}
        tags |= {324: (16, tuple(offsets)), 325: (4, tuple(counts))}
        if self.aperio:
            tags[347] = (7, shared)
            into = "" if first else f" -> {width}x{height}"
            scale = f"|AppMag = {round(10 / self.mpp)}|MPP = {self.mpp:g}" if first else ""
            self._describe(tags, f" ({tile_px}x{tile_px}){into} JPEG/RGB Q={self.quality}{scale}")
        else:
            tags[254] = (4, (0 if first else 1,))
        self._pages.append(tags)

    def thumbnail(self, pixels: NDArray[np.uint8]) -> None:
        """Write a stripped page of uint8 RGBX [h, w, 4]; Aperio files have it after level 0."""
        data = simplejpeg.encode_jpeg(
            np.ascontiguousarray(pixels), quality=80, colorspace="RGBX", colorsubsampling="420"
        )
        height, width = pixels.shape[:2]
        tags = self._image_tags(width, height) | {262: (3, (_YCBCR,)), 530: (3, (2, 2))}
        tags |= {273: (16, (self._append(data),)), 278: (4, (height,)), 279: (4, (len(data),))}
        self._describe(tags, f" -> {width}x{height} - ")
        self._pages.append(tags)

    def _append(self, data: bytes) -> int:
        offset = self._file.tell()
        self._file.write(data)
        return offset

    def _image_tags(self, width: int, height: int) -> _Tags:
        rgb = self.components == "rgb"
        tags: _Tags = {
            254: (4, (0,)),
            256: (4, (width,)),
            257: (4, (height,)),
            258: (3, (8, 8, 8)),
            259: (3, (7,)),
            262: (3, (_RGB if rgb else _YCBCR,)),
            277: (3, (3,)),
            284: (3, (1,)),
        }
        if not rgb:
            tags[530] = (3, (2, 2))
        if not self.aperio:
            mpp = self.mpp * (self._size0[0] / width)
            resolution = (round(1e4 / mpp * 10_000), 10_000)  # pixels per centimetre
            tags |= {282: (5, resolution), 283: (5, resolution), 296: (3, (3,))}
            tags[305] = (2, b"pathflip\0")
        return tags

    def _describe(self, tags: _Tags, what: str) -> None:
        if self.aperio:
            size = "{}x{}".format(*self._size0)
            text = f"Aperio Image Library v12.0.16 \r\n{size} [0,0 {size}]{what}"
            tags[270] = (2, text.encode() + b"\0")

    def _write_directories(self) -> None:
        big = self._file.tell() > _CLASSIC_LIMIT
        word, entry = ("Q", "<HHQ8s") if big else ("I", "<HHI4s")
        room = 8 if big else 4
        link = 8 if big else 4  # where the pointer to the next directory lies
        for tags in self._pages:
            entries = []
            for tag in sorted(tags):
                kind, values = tags[tag]
                if kind == 16 and not big:
                    kind = 4
                code = {3: "H", 4: "I", 5: "I", 16: "Q"}.get(kind)
                if isinstance(values, bytes):
                    data, count = values, len(values)
                else:
                    data = struct.pack(f"<{len(values)}{code}", *values)
                    count = len(values) // (2 if kind == 5 else 1)
                if len(data) > room:
                    self._align()
                    data = struct.pack(f"<{word}", self._append(data))
                entries.append(struct.pack(entry, tag, kind, count, data.ljust(room, b"\0")))
            self._align()
            at = self._append(struct.pack("<Q" if big else "<H", len(entries)) + b"".join(entries))
            after = self._append(b"\0" * room)
            self._file.seek(link)
            self._file.write(struct.pack(f"<{word}", at))
            self._file.seek(0, os.SEEK_END)
            link = after
        self._file.seek(0)
        self._file.write(struct.pack("<2sHHH", b"II", 43, 8, 0) if big else b"II*\0")

    def _align(self) -> None:
        self._file.write(b"\0" * (-self._file.tell() % 8))
