"""Small slides in many formats, as scanners write them as far as readers look.

All show the same :func:`picture` at 0.5 µm/px in two levels.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tifffile
from numpy.typing import NDArray

from tests import faults

Pixels = NDArray[np.uint8]

WIDTH, HEIGHT, TILE, MPP = 640, 512, 128, 0.5
_NM = 500
"""Nanometres of a pixel, Leica's unit."""


def picture(w: int = WIDTH, h: int = HEIGHT, *, seed: int = 5) -> Pixels:
    """Tissue-like pixels [h, w, 3] without a repeat, smooth enough to be seen at a quarter."""
    rng = np.random.default_rng(seed)
    out = np.full((h, w, 3), 244, np.float32)
    for cell, depth in ((16, 90), (48, 60)):
        coarse = rng.random((h // cell + 2, w // cell + 2, 3)).astype(np.float32)
        out -= depth * np.kron(coarse, np.ones((cell, cell, 1), np.float32))[:h, :w]
    return np.clip(out, 5, 255).astype(np.uint8)


def halved(pixels: Pixels) -> Pixels:
    """The mean of each two by two; an odd last row or column is left out."""
    h, w = (side // 2 * 2 for side in pixels.shape[:2])
    blocks = pixels[:h, :w].reshape(h // 2, 2, w // 2, 2, -1)
    return blocks.mean((1, 3)).round().astype(np.uint8)


def _write(
    path: Path, *, big: bool = False, description: str | None = None, **options: Any
) -> None:
    """Two levels; ``options`` are those of :meth:`tifffile.TiffWriter.write`."""
    base = picture()
    with tifffile.TiffWriter(path, bigtiff=big) as file:
        for level, pixels in enumerate((base, halved(base))):
            scale = 1e4 / MPP / 2**level
            given = {
                "tile": (TILE, TILE), "photometric": "rgb", "metadata": None,
                "subfiletype": level, "resolution": (scale, scale), "resolutionunit": "CENTIMETER",
                "description": description if level == 0 else None, **options,
            }  # fmt: skip
            file.write(pixels, **given)


def _jpeg(path: Path, **options: Any) -> None:
    _write(path, compression="jpeg", compressionargs={"level": 90}, **options)


def aperio(path: Path, compression: str, *, more: str = "", **options: Any) -> None:
    """Write Aperio's format; ``more`` is appended to its description."""
    description = f"Aperio Image Library v1\n{WIDTH}x{HEIGHT} |AppMag = 20|MPP = {MPP}{more}"
    _write(path, compression=compression, description=description, subfiletype=0, **options)


def _ome(path: Path) -> None:
    base = picture()
    with tifffile.TiffWriter(path, ome=True) as file:
        about = {"axes": "YXS", "PhysicalSizeX": MPP, "PhysicalSizeY": MPP}
        shared: dict[str, Any] = {
            "tile": (TILE, TILE), "photometric": "rgb", "compression": "deflate",
            "resolution": (1e4 / MPP, 1e4 / MPP), "resolutionunit": "CENTIMETER",
        }  # fmt: skip
        file.write(base, metadata=about, **shared)


def leica(path: Path, *, barcode: str = "bm9uZQ==") -> None:
    """Write Leica's format; the barcode is text in base64."""
    sizes = [(WIDTH, HEIGHT), (WIDTH // 2, HEIGHT // 2)]
    dims = "".join(
        f'<dimension sizeX="{w}" sizeY="{h}" r="{n}" ifd="{n}"/>' for n, (w, h) in enumerate(sizes)
    )
    view = f'sizeX="{WIDTH * _NM}" sizeY="{HEIGHT * _NM}"'
    lit = "<illuminationSource>brightfield</illuminationSource>"
    xml = (
        '<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01">'
        f'<collection name="c" sizeX="{2 * WIDTH * _NM}" sizeY="{2 * HEIGHT * _NM}">'
        f'<barcode>{barcode}</barcode><image name="s">'
        '<creationDate>2020-01-01T00:00:00Z</creationDate><device model="SCN400" version="1"/>'
        f'<pixels sizeX="{WIDTH}" sizeY="{HEIGHT}">{dims}</pixels>'
        f'<view {view} offsetX="0" offsetY="0"/><scanSettings><objectiveSettings>'
        "<objective>20</objective></objectiveSettings><illuminationSettings>"
        f"<numericalAperture>0.4</numericalAperture>{lit}</illuminationSettings></scanSettings>"
        "</image></collection></scn>"
    )
    _jpeg(path, big=True, description=xml)


def philips(path: Path, *, barcode: str = "bm9uZQ==") -> None:
    """Write Philips' format; the barcode is text in base64."""

    def attribute(name: str, kind: str, value: str) -> str:
        return f'<Attribute Name="{name}" Group="0x0028" Element="0x0030" PMSVR="{kind}">{value}' \
               "</Attribute>"  # fmt: skip

    levels = "".join(
        '<DataObject ObjectType="PixelDataRepresentation">'
        + attribute("DICOM_PIXEL_SPACING", "IDoubleArray", f'"{m}" "{m}"')
        + attribute("PIIM_PIXEL_DATA_REPRESENTATION_NUMBER", "IUInt16", str(n))
        + "</DataObject>"
        for n, m in enumerate((MPP / 1e3, MPP / 500))
    )
    sequence = attribute("PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE", "IDataObjectArray",
                         f"<Array>{levels}</Array>")  # fmt: skip
    image = (
        '<DataObject ObjectType="DPScannedImage">'
        + attribute("PIM_DP_IMAGE_TYPE", "IString", "WSI") + sequence + "</DataObject>"
    )  # fmt: skip
    xml = (
        '<?xml version="1.0" encoding="UTF-8" ?><DataObject ObjectType="DPUfsImport">'
        + attribute("PIM_DP_UFS_BARCODE", "IString", barcode)
        + attribute("PIM_DP_SCANNED_IMAGES", "IDataObjectArray", f"<Array>{image}</Array>")
        + "</DataObject>"
    )
    _jpeg(path, description=xml, software="Philips DP v1.0")


def _ndpi(path: Path) -> None:
    """Each level is one JPEG; links between directories have 8 bytes."""
    data = bytearray(b"II*\0" + b"\0" * 8)
    link = 4
    for level, pixels in enumerate((picture(), halved(picture()))):
        options = [cv2.IMWRITE_JPEG_QUALITY, 90]
        jpeg = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), options)[1].tobytes()
        at = len(data)
        data += jpeg + b"\0" * (-len(jpeg) % 2)
        scale = len(data)
        data += struct.pack("<II", int(1e4 / MPP / 2**level), 1)
        h, w = pixels.shape[:2]
        lens = struct.unpack("<I", struct.pack("<f", 20 / 2**level))[0]
        tags = [
            (256, 4, w), (257, 4, h), (259, 3, 7), (262, 3, 6), (271, 2, 0), (273, 4, at),
            (277, 3, 3), (278, 4, h), (279, 4, len(jpeg)), (282, 5, scale), (283, 5, scale),
            (296, 3, 3), (65420, 4, 1), (65421, 11, lens), (65424, 9, 0),
        ]  # fmt: skip
        struct.pack_into("<Q", data, link, len(data))
        data += struct.pack("<H", len(tags))
        for code, kind, value in tags:
            data += struct.pack("<HHII", code, kind, 1, value)
        link = len(data)
        data += b"\0" * (8 + 4 * len(tags))  # the next, and the upper halves of these values
    path.write_bytes(data)


def _directories_first(write: Callable[[Path], None]) -> Callable[[Path], None]:
    def again(path: Path) -> None:
        plain = path.with_suffix(".plain")
        write(plain)
        faults.directory_first(plain, path)
        plain.unlink()

    return again


def _of(**options: Any) -> Callable[[Path], None]:
    return lambda path: _write(path, **options)


FORMATS: dict[str, Callable[[Path], None]] = {
    "jpeg.tif": _jpeg,
    "jpeg-big.tif": lambda path: _jpeg(path, big=True),
    "deflate.tif": _of(compression="deflate"),
    "deflate-big.tif": _of(compression="deflate", big=True),
    "predictor.tif": _of(compression="deflate", predictor=True),
    "lzw.tif": _of(compression="lzw"),
    "zstd.tif": _of(compression="zstd"),
    "none.tif": _of(compression=None),
    "planar.tif": lambda path: _planar(path),
    "aperio-jpeg.svs": lambda path: aperio(path, "jpeg"),
    "aperio-jpeg2000.svs": lambda path: aperio(path, "APERIO_JP2000_RGB"),
    "ome.tif": _ome,
    "leica.scn": leica,
    "philips.tiff": philips,
    "hamamatsu.ndpi": _ndpi,
}
"""{name of the file: what writes it}."""
FORMATS |= {
    f"{stem}-first.{suffix}": _directories_first(FORMATS[f"{stem}.{suffix}"])
    for stem, suffix in (
        ("jpeg", "tif"), ("deflate", "tif"), ("lzw", "tif"), ("none", "tif"),
        ("aperio-jpeg2000", "svs"),
    )
}  # fmt: skip


def _planar(path: Path) -> None:
    base = np.moveaxis(picture(), -1, 0).copy()
    scale = 1e4 / MPP
    tifffile.imwrite(
        path, base, tile=(TILE, TILE), photometric="rgb", planarconfig="separate", metadata=None,
        compression="deflate", resolution=(scale, scale), resolutionunit="CENTIMETER",
    )  # fmt: skip
