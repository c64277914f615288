"""Tiled levels: where the bytes of each tile lie in a file, and the codec that decodes them.

A codec gives the pixels OpenSlide gives. JPEG is decoded by libjpeg-turbo, JPEG 2000 by OpenJPEG,
deflate by libdeflate; LZW, zstd and PackBits by libtiff, which gets a tile as a picture of its own
and undoes the predictor too.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import simplejpeg
from numpy.typing import NDArray

SOI = b"\xff\xd8"
"""Start of image, the first two bytes of every JPEG stream."""
_DEFLATE = (8, 32946)
_JFIF = b"\xff\xe0"
_ITEM = b"\xfe\xff\x00\xe0"
"""Tag of an item of DICOM, little-endian."""
_J2K = b"\xff\x4f\xff\x51"
"""First bytes of a JPEG 2000 codestream; the sizes follow."""
_J2K_SIZES = struct.Struct(">4s4x8IH9s")
_BYTES = bytes((7, 1, 1)) * 3
"""Three components of unsigned bytes, none of them subsampled."""
_ADOBE = bytes.fromhex("ffee000e41646f6265006400000000")
"""Marker of colours but for its last byte: 0 for R, G, B, 1 for Y, Cb, Cr."""
_SOF, _SOS, _EOI = (0xC0, 0xC1), 0xDA, 0xD9
_USED = (0xC4, 0xDB, 0xDD, *_SOF)
"""Segments that a sequential JPEG is decoded by: tables, restart interval, frame."""
_UNUSED = (*range(0xE0, 0xF0), 0xFE)
"""Segments of applications, and comments: they may say anything, names included."""
_AFTER_SCAN = re.compile(rb"\xff+([^\x00\xd0-\xd7\xff])")


class Codec(Protocol):
    """Makes pixels of the bytes of one tile."""

    @property
    def name(self) -> str:
        """Name of the compression, as in ``tiff.COMPRESSIONS``."""

    @property
    def scales(self) -> bool:
        """True if it can decode at a half, a quarter or an eighth of the size."""

    def decode(self, data: bytes, *, shrink: int, out: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Decode one tile to uint8 RGB.

        Args:
            data: The tile's bytes.
            shrink: Number by which the tile is larger; 1 unless it ``scales``.
            out: uint8 [height, width, 3] to fill, contiguous. No more is allocated than it takes,
                whatever size a hostile tile says it has.

        Returns:
            The pixels, which lie in ``out`` if they have its size.

        Raises:
            ValueError, RuntimeError: The bytes are damaged.
        """


@dataclass(frozen=True, kw_only=True)
class TiledLevel:
    """One tiled level of a slide that can be read without OpenSlide.

    Attributes:
        width, height: Size of the level, px.
        tile_w, tile_h: Size of a tile, px.
        offsets, counts: int64 [rows * across], where each tile's bytes lie in the file.
        codec: Decoder of their bytes.
        file: The file; a level of a DICOM slide has one of its own.
    """

    width: int
    height: int
    tile_w: int
    tile_h: int
    offsets: NDArray[np.int64]
    counts: NDArray[np.int64]
    codec: Codec
    file: Path

    @property
    def across(self) -> int:
        """Tiles in a row."""
        return -(-self.width // self.tile_w)

    def can_shrink(self, shrink: int) -> bool:
        """Return whether the codec can scale by ``shrink`` and every tile side divides by it."""
        known = shrink in (1, 2, 4, 8) if self.codec.scales else shrink == 1
        return known and self.tile_w % shrink == 0 and self.tile_h % shrink == 0


@dataclass(frozen=True, kw_only=True)
class JpegCodec:
    """JPEG as libjpeg-turbo decodes it; its warnings count as damage.

    Attributes:
        header: Bytes put before each tile's own: SOI, shared tables, colour transform.
        rgb: Whether the components are R, G, B, whatever a JFIF marker in the stream says.
        items: Whether a tile is stored as items of DICOM, one or more, each with a head.
    """

    header: bytes
    rgb: bool
    items: bool = False
    name = "JPEG"
    scales = True

    def decode(self, data: bytes, *, shrink: int, out: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """See :class:`Codec`. Scaling is done in the DCT domain."""
        stream = self._stream(data)
        if shrink == 1:
            pixels = simplejpeg.decode_jpeg(stream, buffer=out)
        else:
            height, width = out.shape[:2]
            if simplejpeg.decode_jpeg_header(stream)[:2] != (height * shrink, width * shrink):
                raise ValueError("its size is another")  # libjpeg could shrink it to ours
            pixels = simplejpeg.decode_jpeg(
                stream, min_height=height, min_width=width, min_factor=shrink, buffer=out
            )
        return np.asarray(pixels)

    def portable(self, data: bytes, *, width: int, height: int) -> bytes | None:
        """Return a tile as a JPEG that every program shows in the colours of :meth:`decode`.

        It has the tile's pixels as they are stored, their tables and the marker of their colours,
        and nothing else: no comment, no EXIF, no profile. The pixels are decoded once, at an eighth
        of the size, which reads every bit of them.

        Args:
            data: The tile's bytes.
            width: Width that the tile must have, px.
            height: Height likewise.

        Returns:
            The JPEG; None of a kind that is better encoded anew, a progressive one for example.

        Raises:
            ValueError, RuntimeError: The bytes are damaged.
        """
        found = _portable(self._stream(data), width, height)
        if found is not None:
            out = np.empty((-(-height // 8), -(-width // 8), 1), np.uint8)
            simplejpeg.decode_jpeg(
                found, colorspace="GRAY", min_height=out.shape[0], min_width=out.shape[1],
                min_factor=8, buffer=out,
            )  # fmt: skip
        return found

    def _stream(self, data: bytes) -> bytes:
        """Return a tile's bytes as a JPEG of its own."""
        if self.items:
            data = _joined(data)
        if data[:2] != SOI:
            raise ValueError("no JPEG")
        start = 2
        if self.rgb and data[2:4] == _JFIF:  # whose colours are Y, Cb, Cr: OpenSlide overrules it
            start += 2 + int.from_bytes(data[4:6], "big")
        return self.header + data[start:]


def _portable(stream: bytes, width: int, height: int) -> bytes | None:
    """Return a stream without what is not needed; None unless it is sequential and of one scan.

    The colours are those libjpeg finds: JFIF means Y, Cb, Cr, else the last marker of Adobe's says
    it (jdapimin.c, default_decompress_parms).
    """
    at, kept, jfif, transform, sized = 2, [], False, 1, False
    while True:
        if stream[at : at + 1] != b"\xff" or at + 4 > len(stream):
            raise ValueError("a marker is not where it should be")
        marker, end = stream[at + 1], at + 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
        if marker == 0xFF:  # filling
            at += 1
            continue
        if end < at + 4 or end > len(stream):
            raise ValueError("it is cut off")
        body = stream[at + 4 : end]
        if marker == _SOS:
            break
        if marker in _SOF:
            if body[1:5] != height.to_bytes(2, "big") + width.to_bytes(2, "big"):
                raise ValueError("its size is another")
            sized = body[0] == 8 and body[5] == 3
        elif marker == 0xE0 and len(body) >= 14 and body.startswith(b"JFIF\0"):
            jfif = True
        elif marker == 0xEE and len(body) >= 12 and body.startswith(b"Adobe"):
            transform = body[11]
        elif marker not in (*_USED, *_UNUSED):
            return None
        if marker in _USED:
            kept.append(stream[at:end])
        at = end
    # Most streams are nothing but stuffed bytes up to their end: seen faster than searched.
    scan = np.frombuffer(stream, np.uint8)[end:]
    marks = np.flatnonzero(scan[:-1] == 0xFF)
    others = marks[scan[marks + 1] != 0]
    if len(others) and scan[others[0] + 1] == _EOI:
        last = end + int(others[0])
    else:
        after = _AFTER_SCAN.search(stream, end)
        if after is None:
            raise ValueError("it is cut off")
        if after[1][0] != _EOI:
            return None
        last = after.end() - 2
    if not sized or body[:1] != b"\x03" or transform not in (0, 1):
        return None
    colours = bytes((1 if jfif else transform,))
    return b"".join((SOI, _ADOBE, colours, *kept, stream[at : last + 2]))


def _joined(data: bytes) -> bytes:
    """Return what the items of a frame hold, one after the other (DICOM PS3.5, A.4)."""
    parts, at = [], 0
    while at < len(data):
        end = at + 8 + int.from_bytes(data[at + 4 : at + 8], "little")
        if data[at : at + 4] != _ITEM or end > len(data):
            raise ValueError("its items are not where they are said to be")
        parts.append(data[at + 8 : end])
        at = end
    return parts[0] if len(parts) == 1 else b"".join(parts)


def jpeg_colours(stream: bytes) -> tuple[str, str] | None:
    """Return the colours that a JPEG stream says it holds, and the mark of it that says so.

    Adobe's marker names the transform. Without it, components of different size are a brightness
    and its colours, JFIF knows Y, Cb, Cr alone, and libjpeg names those of RGB by their letters.

    Args:
        stream: The beginning of a stream.

    Returns:
        RGB or YBR_FULL_422, as DICOM calls them, and the mark; both empty where nothing says so.
        None where the stream goes on before its pixels begin.
    """
    at, jfif, adobe, parts = 2, False, -1, b""
    while stream[at : at + 2] != b"\xff\xda":
        if at + 4 > len(stream):
            return None
        if stream[at] != 0xFF:
            return "", ""  # no stream of JPEG
        if stream[at + 1] == 0xFF:  # which may fill the room before a marker
            at += 1
            continue
        end = at + 2 + max(2, int.from_bytes(stream[at + 2 : at + 4], "big"))
        marker, body = stream[at + 1], stream[at + 4 : end]
        jfif |= marker == 0xE0 and body[:5] == b"JFIF\0"
        if marker == 0xEE and body[:5] == b"Adobe" and len(body) >= 12:
            adobe = body[11]
        if marker in (0xC0, 0xC1, 0xC2):
            parts = body[6:]  # number, sampling and table of each component
        at = end
    if len(parts) != 9:
        return "", ""
    if adobe in (0, 1):
        return ("YBR_FULL_422" if adobe else "RGB"), f"Adobe's marker with transform {adobe}"
    if len(set(parts[1::3])) > 1:
        return "YBR_FULL_422", "two components of fewer pixels than the first"
    if jfif:
        return "YBR_FULL_422", "a JFIF marker"
    return ("RGB", "components called R, G, B") if parts[::3] == b"RGB" else ("", "")


def jpeg_codec(*, rgb: bool, tables: bytes = b"", items: bool = False) -> JpegCodec:
    """Return the codec of JPEG tiles.

    Args:
        rgb: Whether the components are R, G, B, which scanners do not say inside the stream;
            else Y, Cb, Cr.
        tables: JPEG tables that the tiles share, as a stream without a picture.
        items: Whether a tile is stored as items of DICOM.
    """
    adobe = _ADOBE + (b"\x00" if rgb else b"\x01")
    return JpegCodec(header=(tables[:-2] if tables else SOI) + adobe, rgb=rgb, items=items)


@dataclass(frozen=True, kw_only=True)
class TiffCodec:
    """Compressions of TIFF that lose nothing.

    For libtiff a tile becomes a file of one strip in memory.

    Attributes:
        name: Name of the compression.
        compression, predictor: Values of these tags.
        tile_w, tile_h: Size of a tile, px.
    """

    name: str
    compression: int
    predictor: int
    tile_w: int
    tile_h: int
    scales = False

    @cached_property
    def _header(self) -> tuple[bytes, bytes]:
        """Bytes before and after the number of the strip's bytes; the strip follows."""
        bits_at, strip_at = 148, 156
        tags = [
            (256, self.tile_w), (257, self.tile_h), (258, bits_at), (259, self.compression),
            (262, 2), (273, strip_at), (277, 3), (278, self.tile_h), (279, 0), (284, 1),
            (317, self.predictor),
        ]  # fmt: skip
        entries = [
            struct.pack("<HHII", code, 3 if code == 258 else 4, 3 if code == 258 else 1, value)
            for code, value in tags
        ]
        head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(entries) + bytes(4)
        head = head.ljust(bits_at, b"\0") + struct.pack("<HHH", 8, 8, 8)
        count_at = 10 + 12 * 8 + 8
        return head[:count_at], head[count_at + 4 :].ljust(strip_at - count_at - 4, b"\0")

    def decode(self, data: bytes, *, shrink: int, out: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """See :class:`Codec`."""
        import imagecodecs

        if self.compression in _DEFLATE:  # of which libtiff does not check the sum at the end
            got = imagecodecs.deflate_decode(data, out=out.reshape(-1).data)
            if len(got) != out.size:
                raise ValueError("it ends early")
            if self.predictor == 2:
                imagecodecs.delta_decode(out, axis=1, out=out)
            return out
        before, after = self._header
        stream = b"".join((before, struct.pack("<I", len(data)), after, data))
        return np.asarray(imagecodecs.tiff_decode(stream, out=out))


@dataclass(frozen=True, kw_only=True)
class Jpeg2000Codec:
    """JPEG 2000 as OpenJPEG decodes it.

    Attributes:
        ycbcr: Whether the components are Y, Cb, Cr, which the stream does not say.
    """

    ycbcr: bool
    name = "JPEG 2000"
    scales = False

    def decode(self, data: bytes, *, shrink: int, out: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """See :class:`Codec`."""
        import imagecodecs

        if len(data) < _J2K_SIZES.size or data[:4] != _J2K:
            raise ValueError("no JPEG 2000")
        _, right, bottom, left, top, *_, samples, kinds = _J2K_SIZES.unpack_from(data)
        if (bottom - top, right - left, samples) != out.shape or kinds != _BYTES:
            raise ValueError("its size or samples are others")  # before any of it is allocated
        pixels = np.asarray(imagecodecs.jpeg2k_decode(data, out=out))
        if self.ycbcr:
            _ycbcr_to_rgb(pixels)
        return pixels


@lru_cache(maxsize=1)
def _colour_tables() -> tuple[NDArray[np.int16], ...]:
    """Shares of Cr in red, of both in green [256 Cb * 256 Cr], of Cb in blue: OpenSlide's."""
    x = (np.arange(256) - 128) * 65536.0
    half = 1 << 15

    def scaled(factor: float) -> NDArray[np.int64]:
        return np.asarray(np.rint(factor * x), np.int64)

    red, blue = (scaled(1.402) + half) >> 16, (scaled(1.772) + half) >> 16
    green = (scaled(-0.34414)[:, None] + half + scaled(-0.71414)[None, :]) >> 16
    return red.astype(np.int16), green.astype(np.int16).ravel(), blue.astype(np.int16)


def _ycbcr_to_rgb(pixels: NDArray[np.uint8]) -> None:
    """Turn Y, Cb, Cr [h, w, 3] into R, G, B, in place."""
    red, green, blue = _colour_tables()
    y = pixels[..., 0].astype(np.int16)
    cb, cr = pixels[..., 1].astype(np.intp), pixels[..., 2].astype(np.intp)
    for channel, share in enumerate((red[cr], green[(cb << 8) + cr], blue[cb])):
        share += y
        pixels[..., channel] = np.clip(share, 0, 255, out=share)
