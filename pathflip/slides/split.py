"""Writes each image of a file that holds several to a file of its own, without decoding a pixel.

Readers show the first image of a TIFF and no other, so which one is meant has to be chosen before
ingest. Tiles and tags are copied as they are: whatever the compression, the pixels are the same.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tifffile

from pathflip.errors import ConfigError, SlideError
from pathflip.files import replacing
from pathflip.slides.scale import ome_mpp
from pathflip.slides.tiff import check_limits, read_layout

_SUBFILE, _DESCRIPTION, _X, _Y, _UNIT, _OFFSETS, _COUNTS = 254, 270, 282, 283, 296, 324, 325
_LEFT_OUT = (_DESCRIPTION, 330, 34665, 34853, 40965)
"""Tags that tell of all images of the file, and places of other directories."""
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 16: 8, 17: 8}
"""Bytes of a value of each TIFF type."""

Entry = tuple[int, int, int, bytes]
"""Tag, type, number of values, values."""


@dataclass(frozen=True, kw_only=True)
class StoredImage:
    """One image of a file.

    Attributes:
        number: Its number, from 0, in the order of the file.
        width, height: Level-0 px.
        levels: Number of its levels.
        mpp: µm per pixel that the file's OME-XML states for it; None where it is in the tags or
            nowhere.
    """

    number: int
    width: int
    height: int
    levels: int
    mpp: float | None


def list_images(path: str | Path) -> list[StoredImage]:
    """Return the tiled images of a TIFF file.

    Raises:
        SlideError: The file is no TIFF whose images can be copied (``unsupported``), damaged or
            beyond the limits of a reader.
    """
    with _opened(path) as tif:
        return [image for image, _ in _images(tif)]


def split_images(
    path: str | Path, out: str | Path, *, images: Sequence[int] = ()
) -> list[tuple[StoredImage, Path]]:
    """Write images to ``NAME_image<number>.tif`` in a folder.

    Args:
        path: The file.
        out: Folder; made if it is not there. Nothing in it is overwritten.
        images: Their numbers; all by default.

    Returns:
        The images, and their files.

    Raises:
        SlideError: See :func:`list_images`.
        ConfigError: There is no such image (``no_image``), or a file of that name (``exists``).
    """
    path, out = Path(path), Path(out)
    with _opened(path) as tif:
        there = _images(tif)
        if unknown := sorted(set(images) - set(range(len(there)))):
            raise ConfigError(
                f"{path.name} has no image {unknown[0]}.",
                hint=f"Its images are 0 to {len(there) - 1}.",
                code="no_image",
            )
        chosen = [one for one in there if not images or one[0].number in images]
        stem = re.sub(r"\.(ome\.)?tiff?$", "", path.name, flags=re.IGNORECASE)
        files = [out / f"{stem}_image{image.number}.tif" for image, _ in chosen]
        for file in files:
            if file.exists():
                raise ConfigError(
                    f"{file} is there already.", hint="Give another folder.", code="exists"
                )
        out.mkdir(parents=True, exist_ok=True)
        for (image, pages), file in zip(chosen, files, strict=True):
            with replacing(file) as part, open(part, "wb") as target, open(path, "rb") as source:
                _write(target, source, image, pages)
    return [(image, file) for (image, _), file in zip(chosen, files, strict=True)]


def _opened(path: str | Path) -> tifffile.TiffFile:
    path = Path(path)
    try:
        layout = read_layout(path)
    except OSError as error:
        raise SlideError(
            f"{path.name} cannot be read: {error.strerror}.",
            hint="Check the path.",
            code="not_a_file",
        ) from error
    check_limits(layout)
    if not layout.tiled or layout.big_endian:
        raise SlideError(
            f"{path.name} is no TIFF of tiles whose images can be copied.",
            hint="Write the image that is meant with bfconvert -series N, for example.",
            code="unsupported",
        )
    return tifffile.TiffFile(path)


def _images(tif: tifffile.TiffFile) -> list[tuple[StoredImage, list[tifffile.TiffPage]]]:
    """Return the images of a file with the pages of their levels, finest first."""
    found: list[list[Any]] = []
    stated: list[tuple[float, float | None] | None] = []
    if tif.is_ome:
        parts = re.split(r"<(?:\w+:)?Image\b", tif.ome_metadata or "")[1:]
        known = [ome_mpp(part) for part in parts] if len(parts) == len(tif.series) else []
        for number, series in enumerate(tif.series):
            # A page for each depth, channel or time: readers show one, so each is an image. Pages
            # of other files, which OME-XML may name, are not copied.
            planes = [list(level.pages) for level in series.levels]
            for plane in range(len(planes[0])):
                own = [level[plane] for level in planes if plane < len(level)]
                found.append([page.aspage() for page in own if page and page.parent is tif])
                stated.append(known[number] if known else None)
    else:
        for number in range(len(tif.pages)):
            page: Any = tif.pages.get(number, aspage=True)
            if not page.is_tiled:
                continue
            if page.subfiletype & 1 and found:
                found[-1].append(page)
            else:
                found.append([page, *(page.pages or ())])
    images: list[tuple[StoredImage, list[tifffile.TiffPage]]] = []
    for number, pages in enumerate(found):
        levels = [page for page in pages if page.is_tiled]
        if not levels:
            continue
        mpp = stated[number] if stated else None
        image = StoredImage(
            number=len(images),
            width=levels[0].imagewidth,
            height=levels[0].imagelength,
            levels=len(levels),
            mpp=None if mpp is None else mpp[0],
        )
        images.append((image, levels))
    return images


# -- the copy --------------------------------------------------------------------------------------


def _write(
    target: BinaryIO, source: BinaryIO, image: StoredImage, pages: Sequence[tifffile.TiffPage]
) -> None:
    """Write pages as a BigTIFF of one image, a directory for each level."""
    target.write(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 0))
    link = 8  # where the place of the next directory is written
    for level, page in enumerate(pages):
        entries = _entries(source, page, level=level)
        if image.mpp is not None:
            per_cm = 1e4 / image.mpp * page.imagewidth / image.width
            ratio = struct.pack("<II", round(per_cm * 1000), 1000)
            entries |= {_X: (_X, 5, 1, ratio), _Y: (_Y, 5, 1, ratio)}
            entries[_UNIT] = (_UNIT, 3, 1, struct.pack("<H", 3))
        places = _copy_tiles(target, source, page)
        counts = np.asarray(page.databytecounts, "<u8")
        entries[_OFFSETS] = (_OFFSETS, 16, len(places), np.asarray(places, "<u8").tobytes())
        entries[_COUNTS] = (_COUNTS, 16, len(counts), counts.tobytes())
        link = _directory(target, [entries[tag] for tag in sorted(entries)], link)


def _entries(source: BinaryIO, page: tifffile.TiffPage, *, level: int) -> dict[int, Entry]:
    """Return the tags of a page as they are stored, but those that this copy changes."""
    found: dict[int, Entry] = {
        _SUBFILE: (_SUBFILE, 4, 1, struct.pack("<I", int(level > 0))),
    }
    for tag in page.tags:
        kind, count = int(tag.dtype), int(tag.count)
        if tag.code in (*_LEFT_OUT, *found, _OFFSETS, _COUNTS) or kind not in _SIZES:
            continue
        source.seek(tag.valueoffset)
        found[tag.code] = (tag.code, kind, count, source.read(_SIZES[kind] * count))
    return found


def _copy_tiles(target: BinaryIO, source: BinaryIO, page: Any) -> list[int]:
    """Copy the tiles of a page and return their new places; 0 of those that are not stored."""
    places = []
    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
        if not count:
            places.append(0)
            continue
        target.seek(0, 2)
        places.append(target.tell())
        source.seek(offset)
        target.write(source.read(count))
    return places


def _directory(target: BinaryIO, entries: Sequence[Entry], link: int) -> int:
    """Write a directory, link it to the one before, and return the place of its own link."""
    fields = []
    for tag, kind, count, values in entries:
        if len(values) > 8:
            at = target.seek(0, 2)
            at += target.write(b"\0" * (-at % 8))
            target.write(values)
            values = struct.pack("<Q", at)
        fields.append(struct.pack("<HHQ", tag, kind, count) + values.ljust(8, b"\0"))
    at = target.seek(0, 2)
    at += target.write(b"\0" * (-at % 8))
    target.write(struct.pack("<Q", len(fields)) + b"".join(fields) + struct.pack("<Q", 0))
    end = target.tell() - 8
    target.seek(link)
    target.write(struct.pack("<Q", at))
    return end
