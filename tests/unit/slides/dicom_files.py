"""DICOM whole-slide images, written element by element (PS3.5 7.1, PS3.10 7.1, PS3.3 C.8.12)."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
JPEG_BASELINE = "1.2.840.10008.1.2.4.50"
_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
_LONG = ("OB", "OW", "SQ", "UN", "OV", "UT")
SERIES = "1.2.3.4"


def element(tag: int, kind: str, value: bytes, *, undefined: bool = False) -> bytes:
    value += (b"\0" if kind in ("UI", "OB") else b" ") * (len(value) % 2)
    head = struct.pack("<HH", tag >> 16, tag & 0xFFFF) + kind.encode()
    length = 0xFFFFFFFF if undefined else len(value)
    return head + (
        struct.pack("<HI", 0, length) if kind in _LONG else struct.pack("<H", length)
    ) + value  # fmt: skip


def sequence(tag: int, *items: bytes, undefined: bool = False) -> bytes:
    body = b""
    for item in items:
        if undefined:
            body += struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF) + item
            body += struct.pack("<HHI", 0xFFFE, 0xE00D, 0)
        else:
            body += struct.pack("<HHI", 0xFFFE, 0xE000, len(item)) + item
    if undefined:
        body += struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    return element(tag, "SQ", body, undefined=undefined)


def jpeg_frames(pixels: Pixels, tile: int, *, rgb: bool) -> list[bytes]:
    """Encode a picture tile by tile; what is beyond its edges is white."""
    frames = []
    for y in range(0, pixels.shape[0], tile):
        for x in range(0, pixels.shape[1], tile):
            whole = np.full((tile, tile, 3), 255, np.uint8)
            part = pixels[y : y + tile, x : x + tile]
            whole[: part.shape[0], : part.shape[1]] = part
            if rgb:
                planes = [np.ascontiguousarray(whole[..., c]) for c in range(3)]
                data = without_jfif(simplejpeg.encode_jpeg_yuv_planes(*planes, quality=92))
            else:
                data = simplejpeg.encode_jpeg(whole, quality=92, colorsubsampling="422")
            frames.append(data)
    return frames


def without_jfif(stream: bytes) -> bytes:
    """Leave out the marker of streams of Y, Cb, Cr, as scanners that store RGB do."""
    assert stream[2:4] == b"\xff\xe0"
    return stream[:2] + stream[4 + int.from_bytes(stream[4:6], "big") :]


def _split(frame: bytes, pieces: int) -> list[bytes]:
    size = -(-len(frame) // pieces // 2) * 2
    return [frame[at : at + size] for at in range(0, len(frame), size)]


def write_level(
    path: Path,
    pixels: Pixels,
    *,
    tile: int,
    mpp: float,
    number: int = 0,
    rgb: bool = False,
    table: str = "short",
    undefined: bool = True,
    **changes: Any,
) -> Path:
    """Write one level.

    Args:
        path: The file.
        pixels: RGB [h, w, 3].
        tile: Side of a frame, px.
        mpp: µm per pixel.
        number: Number of the level.
        rgb: Whether the frames hold R, G, B, else Y, Cb, Cr.
        table: Kind of the list of frames: ``short`` (32 bits), ``long`` (64 bits) or ``none``.
        undefined: Whether sequences are of undefined length.
        changes: Other values: ``tiling``, ``syntax``, ``paths``, ``planes``, ``series``, ``kind``
            (of the image), ``colour`` (Photometric Interpretation), ``frames`` or ``pieces``, the
            number of items of each frame.
    """
    frames = changes.get("frames") or jpeg_frames(pixels, tile, rgb=rgb)
    h, w = pixels.shape[:2]
    us, ul, ui = (lambda v: struct.pack("<H", v)), (lambda v: struct.pack("<I", v)), str.encode
    uid = f"{SERIES}.9.{number}".encode()
    meta = (
        element(0x00020001, "OB", b"\0\1")
        + element(0x00020002, "UI", ui(_SLIDE))
        + element(0x00020003, "UI", uid)
        + element(0x00020010, "UI", ui(changes.get("syntax", JPEG_BASELINE)))
        + element(0x00020012, "UI", b"1.2.3")
    )
    kind = changes.get("kind") or ("VOLUME\\NONE" if number == 0 else "VOLUME\\RESAMPLED")
    colour = changes.get("colour") or ("RGB" if rgb else "YBR_FULL_422")
    spacing = f"{mpp / 1000:.8f}".encode()
    measures = sequence(
        0x00289110,
        element(0x00180050, "DS", b"0.001") + element(0x00280030, "DS", spacing + b"\\" + spacing),
        undefined=undefined,
    )
    body = (
        element(0x00080008, "CS", f"DERIVED\\PRIMARY\\{kind}".encode())
        + element(0x00080016, "UI", ui(_SLIDE))
        + element(0x00080018, "UI", uid)
        + element(0x00080060, "CS", b"SM")
        + element(0x0020000D, "UI", b"1.2.3.5")
        + element(0x0020000E, "UI", ui(changes.get("series", SERIES)))
        + element(0x00200052, "UI", b"1.2.3.6")
        + element(0x00209311, "CS", changes.get("tiling", "TILED_FULL").encode())
        + element(0x00280002, "US", us(3))
        + element(0x00280004, "CS", colour.encode())
        + element(0x00280006, "US", us(0))
        + element(0x00280008, "IS", str(len(frames)).encode())
        + element(0x00280010, "US", us(tile))
        + element(0x00280011, "US", us(tile))
        + element(0x00280100, "US", us(8))
        + element(0x00280101, "US", us(8))
        + element(0x00280102, "US", us(7))
        + element(0x00280103, "US", us(0))
        + element(0x00480006, "UL", ul(w))
        + element(0x00480007, "UL", ul(h))
        + sequence(0x00480105, element(0x00480106, "SH", b"1"), undefined=undefined)
        + element(0x00480302, "UL", ul(changes.get("paths", 1)))
        + element(0x00480303, "UL", ul(changes.get("planes", 1)))
        + sequence(0x52009229, measures, undefined=undefined)
    )
    frames = [frame + b"\0" * (len(frame) % 2) for frame in frames]
    pieces = [_split(frame, changes.get("pieces", 1)) for frame in frames]
    starts = np.cumsum([0] + [sum(len(part) + 8 for part in frame) for frame in pieces])[:-1]
    if table == "long":
        body += element(0x7FE00001, "OV", starts.astype("<u8").tobytes())
        lengths = np.array([len(frame) for frame in frames], "<u8")
        body += element(0x7FE00002, "OV", lengths.tobytes())
    listed = starts.astype("<u4").tobytes() if table == "short" else b""
    items = struct.pack("<HHI", 0xFFFE, 0xE000, len(listed)) + listed
    for part in (part for frame in pieces for part in frame):
        items += struct.pack("<HHI", 0xFFFE, 0xE000, len(part)) + part
    items += struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    body += element(0x7FE00010, "OB", items, undefined=True)
    length = element(0x00020000, "UL", ul(len(meta)))
    path.write_bytes(bytes(128) + b"DICM" + length + meta + body)
    return path


def corrected(series: Path, folder: Path) -> Path:
    """Copy a series whose headers say RGB, and say YBR_FULL_422 instead."""
    folder.mkdir()
    wrong = element(0x00280004, "CS", b"RGB")
    for file in series.glob("*.dcm"):
        data = file.read_bytes()
        assert data.count(wrong) == 1
        (folder / file.name).write_bytes(
            data.replace(wrong, element(0x00280004, "CS", b"YBR_FULL_422"))
        )
    return folder
