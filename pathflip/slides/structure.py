"""Trust in the structure of a slide file, decided before any of its pixels count.

Two readers of the same bytes may see two pictures: tags that turn or recolour it, images that one
of them never shows, levels whose sizes understate what they were scaled by. Each such doubt has a
code and a sentence. A doubt refuses the slide where its pixels or places would be wrong, and is a
note where the slide is read around it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np
from numpy.typing import NDArray

from pathflip.errors import SlideError
from pathflip.slides.resample import resize_exact
from pathflip.slides.tiff import COMPRESSIONS, MAX_LEVELS, TiffLayout, TiffPage, by_level

if TYPE_CHECKING:
    from pathflip.slides.dicom import StatedColours

GENERIC, APERIO = "generic-tiff", "aperio"
_SIZES_SAY_SCALE = (GENERIC, APERIO, "dicom")
"""Formats in which a level's scale is known from its size alone."""
_RIGHTLY_READ = (0, 1, 2, 3, 6)
"""Grey values of both kinds, RGB, a palette and YCbCr: libtiff makes the right RGB of them."""
_PHOTOMETRIC = {5: "CMYK", 8: "CIE Lab", 32803: "a colour filter array"}
_ASSOCIATED, _UNASSOCIATED = 1, 2
"""Meanings of an extra sample: alpha that the colours were multiplied with, or were not."""
_APERIO_JPEG2000 = (33003, 33005)
_SIZES_AGREE = 0.005
"""Relative gap between two statements of one scale that rounding does not explain."""
_WINDOW, _MARGIN = 128, 16
"""Side of what is compared of a level, px, and how far it is looked for."""
_LEAST = 2 * _MARGIN + 16
"""Side of a level, px, up to which too little would be left to compare."""
_WINDOWS = 2
_MOST_COARSER = 32
"""Times that a level is coarser than the one before it and still compared with it: a window would
be sixteen megapixels. What cannot be compared may be a picture of the label, stored in tiles."""
_MAX_SHIFT = 2.0
_FLAT = 6.0
"""Standard deviation of grey levels below which there is nothing to compare."""
_SAME_COLOUR = 16.0
"""Gap of the mean of a window that JPEG and smoothing do not explain, in grey levels."""

ReadLevel = Callable[[int, int, int, int, int], NDArray[np.uint8] | None]
"""(level, x, y, w, h in pixels of that level) -> RGB [h, w, 3]; None where it is damaged."""


@dataclass(frozen=True, kw_only=True)
class Doubt:
    """Something in a file's structure that a reader may get wrong.

    Attributes:
        code: Its reason code.
        message: A sentence that says what was found.
        hint: A sentence that says what to do.
        refused: Whether the slide is refused; else it is read around the doubt.
    """

    code: str
    message: str
    hint: str
    refused: bool = True

    def error(self) -> SlideError:
        """Return the error that refuses the slide."""
        return SlideError(self.message, hint=self.hint, code=self.code)


# -- tags ------------------------------------------------------------------------------------------


def tag_doubts(layout: TiffLayout, *, vendor: str) -> list[Doubt]:
    """Return what the tags of a TIFF slide make doubtful.

    Formats of which OpenSlide knows the structure (Leica, Philips, Ventana and others) store
    pages by rules of their own and are not judged by those of plain TIFF.

    Args:
        layout: Tags of the file.
        vendor: OpenSlide's name of the format.
    """
    if vendor not in (GENERIC, APERIO) or not layout.pages:
        return []
    found = [doubt for page in layout.tiled[:1] for doubt in _page_doubts(layout.name, page)]
    if any(_skewed(page) for page in layout.tiled):
        found.append(
            Doubt(
                code="unsupported",
                message=f"{layout.name} holds 16-bit grey values in tiles that reach beyond its "
                "right edge, whose rows are read from the wrong places.",
                hint="Scale it to 8 bits: vips cast, for example.",
            )
        )
    if vendor == GENERIC:
        found += _unread(layout)
    return found


def _page_doubts(name: str, page: TiffPage) -> list[Doubt]:
    """Return doubts about the samples of level 0."""
    found = []
    convert = "Convert it to a pyramid of 8-bit RGB, with vips tiffsave for example."
    if page.orientation not in (0, 1):
        found.append(
            Doubt(
                code="orientation",
                message=f"{name} asks to be turned or mirrored (orientation {page.orientation}), "
                "which readers of tiles leave undone.",
                hint="Write it upright and without the tag: vips autorot, for example.",
            )
        )
    if page.sample_format not in (0, 1):
        kind = {2: "signed whole numbers", 3: "floating-point numbers"}.get(
            page.sample_format, f"samples of format {page.sample_format}"
        )
        found.append(
            Doubt(code="unsupported", message=f"{name} holds {kind}, not bytes.", hint=convert)
        )
    elif (bits := _bits(page)) not in (8, 16):
        kind = f"samples of {bits} bits"
        found.append(
            Doubt(code="unsupported", message=f"{name} holds {kind}, not bytes.", hint=convert)
        )
    elif page.photometric not in _RIGHTLY_READ and page.compression not in _APERIO_JPEG2000:
        kind = _PHOTOMETRIC.get(page.photometric, f"colours of kind {page.photometric}")
        found.append(Doubt(code="not_rgb", message=f"{name} holds {kind}, not RGB.", hint=convert))
    elif page.extra_samples not in ((), (_UNASSOCIATED,)):
        if page.extra_samples == (_ASSOCIATED,):
            says = "colours multiplied with their alpha"
        else:
            says = f"{len(page.extra_samples)} samples a pixel beside its colours"
        found.append(
            Doubt(
                code="extra_samples",
                message=f"{name} holds {says}; reading them as transparency gives false colours.",
                hint="Write it with three samples: vips extract_band in.tif out.tif 0 --n 3.",
            )
        )
    return found


def _skewed(page: TiffPage) -> bool:
    """Return whether OpenSlide shows a page skewed at its right edge.

    So it was seen with 4.0.1: rows of 16-bit grey tiles that reach beyond the edge are taken from
    the wrong places; tiles that end at the edge, and 16-bit RGB, are right.
    """
    return page.samples == 1 and _bits(page) > 8 and page.width % page.tile_w > 0


def _unread(layout: TiffLayout) -> list[Doubt]:
    """Return doubts about tiled images that OpenSlide takes for no level."""
    first = layout.pages[0]
    unread = [page for page in layout.pages[1:] if page.tile_w and not page.subfile & 1]
    sizes = Counter((page.width, page.height) for page in unread)
    images: list[TiffPage] = []
    levels: list[TiffPage] = []
    for page in unread:
        size = page.width, page.height
        smaller = page.width < first.width and page.height < first.height
        alone = sizes[size] == 1 and not layout.is_ome
        is_level = smaller and alone and sizes_meet((first.width, first.height), size)
        (levels if is_level else images).append(page)
    if images:
        shown = ", ".join(f"{page.width} x {page.height}" for page in images[:3])
        more = f" and {len(images) - 3} more" if len(images) > 3 else ""
        return [
            Doubt(
                code="several_images",
                message=f"{layout.name} holds {len(images) + 1} images: one of {first.width} x "
                f"{first.height} px, and {shown}{more} that would not be read.",
                hint="Write each to a file of its own, and ingest those that are meant: pathflip "
                f"slides split {layout.name} --out FOLDER",
            )
        ]
    if levels:
        return [
            Doubt(
                code="unread_levels",
                message=f"{len(levels)} smaller pages of {layout.name} are not marked as levels "
                "and are not used.",
                hint="Nothing is wrong with what is read; it is slower.",
                refused=False,
            )
        ]
    return []


def unsupported_doubt(layout: TiffLayout) -> Doubt | None:
    """Return why OpenSlide knows no format of a TIFF that is whole; None if that is not known."""
    if not layout.pages:
        return None
    if layout.big_endian:
        what = "stores its numbers most significant byte first, which OpenSlide does not read"
    elif not layout.tiled:
        what = "is stored in strips, not in tiles"
    else:
        return None
    return Doubt(
        code="unsupported",
        message=f"{layout.name} {what}.",
        hint="Convert it to a tiled pyramid, with vips tiffsave --tile --pyramid for example.",
    )


def colour_doubts(stated: Sequence[StatedColours], *, name: str) -> list[Doubt]:
    """Return a doubt about levels of DICOM whose frames are marked as other colours than stated.

    Readers go by the header, which shall agree with the frames (DICOM PS3.5, 8.2.1). Some
    converters write RGB there and compress as Y, Cb, Cr: shown by the header, tissue is green.

    Args:
        stated: Colours of each level, by header and frames.
        name: Name of the slide.
    """
    for level in stated:
        if not level.agree:
            return [
                Doubt(
                    code="colours_conflict",
                    message=f"{level.file}, a level of {name}, says that its colours are "
                    f"{level.header}, and its JPEG frames say {level.stream} by {level.sign}: "
                    "read as stated, its colours would be false.",
                    hint="If the frames are right, correct the header of each such file, with "
                    f'DCMTK for example: dcmodify -m "(0028,0004)={level.stream}" FILE.',
                )
            ]
    return []


def compression_name(layout: TiffLayout) -> str | None:
    """Return the name of level 0's compression; None of a file that is no TIFF."""
    pages = layout.tiled or layout.pages
    if not pages:
        return None
    number = int(pages[0].compression)
    return COMPRESSIONS.get(number, f"compression {number}")


def sizes_meet(whole: tuple[int, int], level: tuple[int, int]) -> bool:
    """Return whether width and height of a level were divided by one number, rounding aside."""
    low, high = 0.0, math.inf
    for full, side in zip(whole, level, strict=True):
        low = max(low, full / (side + 1))
        high = min(high, full / max(side - 1, 0.5))
    return low <= high * (1 + 1e-9)


# -- levels ----------------------------------------------------------------------------------------


class LevelTrust:
    """Count of the levels of a slide that can be used, from the finest.

    A level is compared with the finer one when it is about to be used and not before, since that
    reads pixels of both: who reads level 0 alone does not pay for five others. From the first
    doubtful one on, none is used.

    Args:
        layout: Tags of the file.
        vendor: OpenSlide's name of the format.
        sizes: (width, height) of the levels.
        read: Reads pixels of a level.

    Attributes:
        doubt: Doubt about the first level that cannot be used; None while there is none.
    """

    def __init__(
        self, layout: TiffLayout, *, vendor: str, sizes: Sequence[tuple[int, int]], read: ReadLevel
    ) -> None:
        self.doubt: Doubt | None = None
        self._name, self._sizes, self._read = layout.name, sizes, read
        self._pages = by_level(sizes, layout.tiled)
        self._usable = 1 if vendor in _SIZES_SAY_SCALE else len(sizes)

    def up_to(self, level: int) -> int:
        """Return the number of usable levels, after looking at those up to ``level``."""
        while self.doubt is None and self._usable <= min(level, len(self._sizes) - 1):
            self.doubt = _level_doubt(
                self._usable, sizes=self._sizes, pages=self._pages, read=self._read,
                name=self._name,
            )  # fmt: skip
            self._usable += self.doubt is None
        return self._usable

    def all(self) -> int:
        """Return the number of usable levels, after looking at every one."""
        return self.up_to(len(self._sizes) - 1)


def pixel_doubts(
    layout: TiffLayout, *, vendor: str, sizes: Sequence[tuple[int, int]], read: ReadLevel
) -> list[Doubt]:
    """Return what number of levels and depth of samples make doubtful.

    Args:
        layout: Tags of the file.
        vendor: OpenSlide's name of the format.
        sizes: (width, height) of the levels.
        read: Reads pixels of a level.
    """
    if len(sizes) > MAX_LEVELS:
        what = f"{layout.name} declares {len(sizes)} levels; the limit is {MAX_LEVELS}."
        hint = "Such a file is damaged or hostile."
        return [Doubt(code="reader_limits", message=what, hint=hint)]
    return _depth_doubts(layout, vendor, sizes, read)


def _depth_doubts(
    layout: TiffLayout, vendor: str, sizes: Sequence[tuple[int, int]], read: ReadLevel
) -> list[Doubt]:
    """Return a doubt about 16-bit samples whose upper byte, which is what is read, says little.

    Cameras of 10 to 14 bits store their numbers as they are: a white slide is then nearly black.
    """
    if vendor != GENERIC or not layout.tiled or _bits(layout.tiled[0]) <= 8:
        return []
    level = len(sizes) - 1
    width, height = sizes[level]
    w, h = min(width, 256), min(height, 256)
    corners = {
        (x, y) for x in (0, (width - w) // 2, width - w) for y in (0, (height - h) // 2, height - h)
    }
    seen = [pixels for x, y in sorted(corners) if (pixels := read(level, x, y, w, h)) is not None]
    if not seen or max(int(pixels.max()) for pixels in seen) >= 128:
        return []
    return [
        Doubt(
            code="bit_depth",
            message=f"{layout.name} stores 16 bits a sample and uses the lower ones only: its "
            "brightest pixel would be read as nearly black.",
            hint="Scale it to 8 bits: vips linear, then vips cast to uchar.",
        )
    ]


def _bits(page: TiffPage) -> int:
    return max(page.bits) if isinstance(page.bits, tuple) else page.bits


def _level_doubt(
    level: int,
    *,
    sizes: Sequence[tuple[int, int]],
    pages: dict[int, TiffPage],
    read: ReadLevel,
    name: str,
) -> Doubt | None:
    """Return why a stored level cannot be what its size says; None if it can.

    A level's scale is known from its size alone, so a writer that padded it to whole tiles makes
    every place in it wrong. Its sides must agree, its own resolution where it states one, and its
    pixels with those of the next finer level, which is trusted: far from the origin, where an error
    of scale shows, and where there is most to see.

    Args:
        level: Number of the level, from 1.
        sizes: (width, height) of all levels.
        pages: {level: its page}, as far as they are known.
        read: Reads pixels of a level.
        name: Name of the file.
    """

    def doubt(what: str) -> Doubt:
        return Doubt(
            code="level_geometry",
            message=f"Level {level} of {name} ({sizes[level][0]} x {sizes[level][1]} px) {what}; "
            "it and coarser ones are not used.",
            hint="Nothing is wrong with what is read; it is slower. Write the pyramid again.",
            refused=False,
        )

    if sizes[level] == sizes[level - 1]:
        return doubt(f"is as large as level {level - 1}, as another image would be")
    if not sizes_meet(sizes[0], sizes[level]):
        across, down = (a / b for a, b in zip(sizes[0], sizes[level], strict=True))
        return doubt(f"is scaled by {across:.3f} across and {down:.3f} down")
    page, first = pages.get(level), pages.get(0)
    downsample = sizes[0][0] / sizes[level][0]
    if page is not None and first is not None and page.mpp and first.mpp:
        stated = page.mpp / first.mpp
        rounding = max(1 / sizes[level][0], 1 / sizes[level][1])
        # Writers that copy level 0's resolution to every page say nothing.
        if stated > 1.01 and abs(stated / downsample - 1) > _SIZES_AGREE + 2 * rounding:
            return doubt(f"states that it is {stated:.3f} times coarser, its size {downsample:.3f}")
    places = _windows(level, sizes[level], page, read)
    if min(sizes[level]) > _LEAST:
        # Where the finer level shows most, and this one least: it may have been left blank there.
        finer = pages.get(level - 1)
        most = _windows(level - 1, sizes[level - 1], finer, read, coarser=page)[:1]
        scale = [sizes[level][i] / sizes[level - 1][i] for i in (0, 1)]
        half = _WINDOW / 2
        places += [
            (
                max(0, round((x + half) * scale[0] - half)),
                max(0, round((y + half) * scale[1] - half)),
            )
            for x, y in most
        ]
    for place in places:
        if (shift := _shift(level, sizes, place, read)) is not None:
            return doubt(shift)
    return None


def _windows(
    level: int,
    size: tuple[int, int],
    page: TiffPage | None,
    read: ReadLevel,
    *,
    coarser: TiffPage | None = None,
) -> list[tuple[int, int]]:
    """Return corners of windows with much to see, far from the origin first.

    Of a level with a ``coarser`` one, those come first where that has little to see.
    """
    side = min(_WINDOW, *size)
    if side <= _LEAST:
        return []
    if page is not None and len(page.counts):
        across = -(-page.width // page.tile_w)
        column, row = np.arange(len(page.counts)) % across, np.arange(len(page.counts)) // across
        x = np.clip(column * page.tile_w + (page.tile_w - side) // 2, 0, size[0] - side)
        y = np.clip(row * page.tile_h + (page.tile_h - side) // 2, 0, size[1] - side)
        weight = page.counts * (0.25 + x / size[0] + y / size[1])
        if coarser is not None and len(coarser.counts):
            there = (x + side / 2) / page.width * coarser.width // coarser.tile_w
            below = (y + side / 2) / page.height * coarser.height // coarser.tile_h
            at = (below * -(-coarser.width // coarser.tile_w) + there).astype(np.int64)
            weight *= page.counts / (coarser.counts[np.minimum(at, len(coarser.counts) - 1)] + 1.0)
        best = np.argsort(weight)[::-1][:_WINDOWS]
        return list(zip(x[best].tolist(), y[best].tolist(), strict=True))
    places = [
        (round(fx * (size[0] - side)), round(fy * (size[1] - side)))
        for fx, fy in ((0.9, 0.9), (0.5, 0.9), (0.9, 0.5), (0.7, 0.7), (0.5, 0.5), (0.3, 0.7))
    ]
    seen = [(place, read(level, *place, side, side)) for place in places]
    detail = [(float(pixels.std()), place) for place, pixels in seen if pixels is not None]
    return [place for spread, place in sorted(detail, reverse=True)[:_WINDOWS] if spread > _FLAT]


def _shift(
    level: int,
    sizes: Sequence[tuple[int, int]],
    corner: tuple[int, int],
    read: ReadLevel,
) -> str | None:
    """Compare a window of a level with the finer one; say what is wrong, None if nothing is."""
    finer = level - 1
    side = min(_WINDOW, *sizes[level])
    scale = [sizes[finer][i] / sizes[level][i] for i in (0, 1)]
    if max(scale) > _MOST_COARSER:
        return f"is {max(scale):.0f} times coarser than level {finer}, too much to be compared"
    if max(scale) > 8:
        side = min(side, _WINDOW // 2)
    place = [min(corner[i], sizes[level][i] - side) for i in (0, 1)]
    x, y = (round(place[i] * scale[i]) for i in (0, 1))
    w, h = (min(math.ceil(side * scale[i]), sizes[finer][i] - at) for i, at in ((0, x), (1, y)))
    coarse = read(level, place[0], place[1], side, side)
    fine = read(finer, x, y, w, h)
    if coarse is None or fine is None:
        return None  # damaged there: nothing to compare
    whole = resize_exact(fine, x_scale=scale[0], y_scale=scale[1], width=side, height=side)
    inner = coarse[_MARGIN:-_MARGIN, _MARGIN:-_MARGIN]
    means = (one.mean((0, 1)) for one in (inner, whole[_MARGIN:-_MARGIN, _MARGIN:-_MARGIN]))
    other = float(np.abs(np.subtract(*means)).max()) > _SAME_COLOUR
    recoloured = f"has other colours at ({place[0]}, {place[1]}) than level {finer} has there"
    seen, expected = (cv2.cvtColor(one, cv2.COLOR_RGB2GRAY) for one in (inner, whole))
    if min(seen.std(), expected.std()) < _FLAT:
        return recoloured if other else None
    likeness = cv2.matchTemplate(expected, seen, cv2.TM_CCOEFF_NORMED)
    row, col = np.unravel_index(int(likeness.argmax()), likeness.shape)
    best, here = float(likeness.max()), float(likeness[_MARGIN, _MARGIN])
    away = math.hypot(int(row) - _MARGIN, int(col) - _MARGIN)
    if best < 0.4:
        return f"shows another picture at ({place[0]}, {place[1]}) than level {finer} does there"
    if away > _MAX_SHIFT and best - here > 0.1:
        return f"is off by {away:.0f} px at ({place[0]}, {place[1]})"
    return recoloured if other else None
