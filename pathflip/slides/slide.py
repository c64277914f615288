"""One slide: metadata, exact-scale reads, patches.

Coordinates are level-0 pixels from the top-left corner of level 0; sizes are in pixels at a stated
mpp. Reading at a resolution the file does not store takes the nearest finer level (or one equal
within 1 %) and averages areas down to the exact scale: never the "closest level", never upsampled
unless the caller asks for pixels finer than the slide has.

OpenSlide is the reader of record. Tiled TIFF and DICOM files whose compression has a codec (see
``tiles``) take the path of ``direct``, each level checked against OpenSlide on the tiles with most
detail before it is used.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

import numpy as np
import openslide
from numpy.typing import NDArray

from pathflip.display import jpeg
from pathflip.errors import SlideError
from pathflip.slides.dicom import check_one_series, dicom_levels, stated_colours
from pathflip.slides.direct import (
    DAMAGED_RGB,
    HalvedTiles,
    Tiles,
    disagreement,
    read_rect,
    shrink_for,
)
from pathflip.slides.direct import read_patches as read_direct
from pathflip.slides.opening import open_file
from pathflip.slides.resample import on_white, resize_area, resize_exact
from pathflip.slides.scale import Scale, resolve_scale
from pathflip.slides.sources import dicom_files, openable
from pathflip.slides.structure import Doubt, LevelTrust, colour_doubts, pixel_doubts, tag_doubts
from pathflip.slides.tiff import (
    TiffLayout,
    by_level,
    check_limits,
    no_codec,
    read_layout,
    tiled_levels,
)
from pathflip.slides.tiles import JpegCodec, TiledLevel

Halving = Literal["exact", "dct"]

EQUAL_SCALE = 0.01
_TIFF_VENDORS = ("aperio", "generic-tiff")
_STRIP_PX = 1024
_DAMAGE_PX = 256
_PICTURE_PX = 512
"""Longer side of the picture that a notebook shows of a slide."""


class Slide:
    """A whole-slide image, open for reading.

    Args:
        path: File, or folder of DICOM files of one series.
        mpp: µm per level-0 pixel, if the file's own metadata is missing or wrong.
        halving: Way the direct path halves a twice finer base: "exact" averages areas, "dct" lets
            libjpeg decode at half size (faster, about 43 dB from the exact average).

    Attributes:
        path: Path of the file, as given.
        width, height: Level-0 pixels.
        vendor: OpenSlide's name of the format.
        bounds_x0, bounds_y0: Offset of the scanned area in level 0 (MRXS and others), or 0.
        reader: "direct" or "openslide"; ``reader_note`` says why not direct.

    Raises:
        SlideError: With the reason code to store (``unreadable``, ``reader_limits``,
            ``not_a_file``, ``unsupported``, and those of ``structure``). A missing resolution
            raises only when it is needed, from ``mpp``.
    """

    def __init__(
        self, path: str | Path, *, mpp: float | None = None, halving: Halving = "exact"
    ) -> None:
        self.path = Path(path)
        self._files: dict[Path, int] = {}
        self._override = mpp
        self._halving = halving
        self._source = openable(self.path)
        layout = read_layout(self._source)
        check_limits(layout)
        self._handle = open_file(self._source, name=self.path.name, layout=layout)
        handle = self._handle
        if self.path.is_dir():
            check_one_series(self.path)
        self.width, self.height = handle.dimensions
        self.vendor = handle.properties.get(openslide.PROPERTY_NAME_VENDOR, "unknown")
        self.bounds_x0 = int(handle.properties.get(openslide.PROPERTY_NAME_BOUNDS_X, 0))
        self.bounds_y0 = int(handle.properties.get(openslide.PROPERTY_NAME_BOUNDS_Y, 0))
        self._scale: Scale | None = None
        self._description = layout.description
        self._direct: dict[int, TiledLevel] = {}
        self._notes = self._trust(layout)
        self._direct_note = ""
        self._compared: set[int] = set()
        self._direct = self._find_direct(layout)
        self.reader: Literal["direct", "openslide"] = (
            "openslide" if self._direct_level(0) is None else "direct"
        )

    # -- what it is ------------------------------------------------------------------------------

    @property
    def scale(self) -> Scale:
        """Resolution and where it came from. Raises SlideError (``needs_mpp`` and others)."""
        if self._scale is None:
            self._scale = resolve_scale(
                self._handle.properties,
                name=self.path.name,
                override=self._override,
                description=self._description,
            )
        return self._scale

    @property
    def mpp(self) -> float:
        """µm per level-0 pixel."""
        return self.scale.mpp

    @property
    def levels(self) -> int:
        """Number of stored levels that are used; looks at every one."""
        return self._trusted.all()

    @property
    def level_dimensions(self) -> Sequence[tuple[int, int]]:
        """(width, height) of each level that is used."""
        return self._sizes[: self.levels]

    @property
    def level_downsamples(self) -> Sequence[float]:
        """Level-0 pixels per pixel of each level that is used."""
        return self._downsamples[: self.levels]

    @property
    def reader_note(self) -> str:
        """Reason why the reader is not direct, and what of the file is read around."""
        levels = self._trusted.doubt.message if self.levels and self._trusted.doubt else ""
        return "; ".join(filter(None, [self._direct_note, *self._notes, levels]))

    @property
    def level_mpps(self) -> list[float]:
        """µm per pixel of each stored level."""
        return [self.mpp * downsample for downsample in self.level_downsamples]

    def __repr__(self) -> str:
        return f"Slide({str(self.path)!r}, {self.width} x {self.height} px, {self.vendor})"

    def _repr_jpeg_(self) -> bytes:
        return jpeg(self.thumbnail(_PICTURE_PX), px=_PICTURE_PX)

    def __enter__(self) -> Slide:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the file."""
        self._handle.close()
        self._close_files()

    def __del__(self) -> None:
        with suppress(OSError):
            self._close_files()

    def _close_files(self) -> None:
        files = getattr(self, "_files", {})
        while files:
            os.close(files.popitem()[1])

    # -- reading ---------------------------------------------------------------------------------

    def read(
        self, x0: int, y0: int, size_px: int | tuple[int, int], *, mpp: float | None = None
    ) -> NDArray[np.uint8]:
        """Read a rectangle at an exact resolution.

        Args:
            x0: Left edge, level-0 px.
            y0: Top edge, level-0 px.
            size_px: Side, or (width, height), in pixels at ``mpp``.
            mpp: µm per pixel of the result; None means level 0 as stored.

        Returns:
            uint8 RGB [h, w, 3]. What lies outside the slide is white, as are transparent pixels.

        Raises:
            SlideError: ``bad_tile`` when the file is damaged there; ``needs_mpp`` and the like
                when ``mpp`` is given for a slide without a resolution.
        """
        out_w, out_h = (size_px, size_px) if isinstance(size_px, int) else size_px
        ratio = 1.0 if mpp is None else mpp / self.mpp
        if abs(ratio - 1) <= EQUAL_SCALE:
            return self._level_rect(0, x0, y0, out_w, out_h)
        return self._read_scaled(x0, y0, out_w * ratio, out_h * ratio, out_w, out_h)

    def read_patches(
        self, rects: NDArray[np.int64], *, mpp: float, out: NDArray[np.uint8]
    ) -> NDArray[np.bool_]:
        """Read square patches at an exact resolution, each stored tile decoded once.

        Args:
            rects: int64 [n, 4]: x0, y0, w0, h0 in level-0 px, inside the slide.
            mpp: µm per pixel of the result.
            out: uint8 [n, px, px, 3], contiguous, filled.

        Returns:
            bool [n]: False where the file is damaged under the patch; ``out`` is undefined there.
        """
        if not out.flags.c_contiguous:
            raise ValueError("out must be contiguous: tiles are decoded where they are to lie")
        ratio = mpp / self.mpp
        level = self.level_for(ratio)
        downsample = self._downsamples[level]
        width, height = self._sizes[level]
        tiles = self._tiles(level, ratio, rects, out.shape[1]) if self._direct else None
        if tiles is not None:
            downsample, width, height = downsample * tiles.shrink, tiles.width, tiles.height
        # Decided by the scale, not by rounded widths: a patch is the same whatever is read with it.
        native = abs(ratio / downsample - 1) <= EQUAL_SCALE
        boxes = np.rint(rects / downsample).astype(np.int64)
        if native:
            boxes[:, 2:] = out.shape[1]
            boxes[:, 0] = np.minimum(boxes[:, 0], width - out.shape[1])
            boxes[:, 1] = np.minimum(boxes[:, 1], height - out.shape[1])
        if tiles is not None:
            return read_direct(tiles, boxes, out, native=native)
        return self._read_openslide(level, boxes, out)

    def thumbnail(self, max_px: int) -> NDArray[np.uint8]:
        """Read the whole slide, its longer side ``max_px`` pixels, as uint8 RGB [h, w, 3]."""
        scale = max(self.width, self.height) / max_px
        out_w, out_h = max(1, round(self.width / scale)), max(1, round(self.height / scale))
        return self._read_scaled(0, 0, self.width, self.height, out_w, out_h, tolerant=True)

    def shown(
        self, x0: int, y0: int, w0: int, h0: int, *, size_px: tuple[int, int]
    ) -> NDArray[np.uint8]:
        """Read a rectangle of level-0 px as a picture of (width, height), uint8 RGB [h, w, 3]."""
        return self._read_scaled(x0, y0, w0, h0, *size_px, tolerant=True)

    def shrunk(
        self, x0: int, y0: int, size_px: tuple[int, int], *, factor: int
    ) -> NDArray[np.uint8]:
        """Read (width, height) pixels of ``factor`` level-0 px each way, as :meth:`read` does.

        The resolution need not be known. What is damaged under many pixels is painted as tissue.
        """
        (w, h), coarse = size_px, factor >= 4 * self.stored_scale(factor)
        return self._read_scaled(x0, y0, w * factor, h * factor, w, h, tolerant=coarse)

    def decoded_px(self, w0: float, h0: float, *, size_px: tuple[int, int]) -> int:
        """Return about how many pixels :meth:`shown` decodes for a rectangle of level-0 px.

        A JPEG tile that is decoded at a smaller size counts a fourth: that takes as long.
        """
        level, shrink = self._source_of(min(w0 / size_px[0], h0 / size_px[1]))
        return round(w0 * h0 / self._downsamples[level] ** 2 / (4 if shrink > 2 else 1))

    def stored_scale(self, factor: float) -> float:
        """Level-0 px per pixel of the stored level that is read for pixels of ``factor``."""
        return self._downsamples[self.level_for(factor)]

    def stored_jpeg(
        self, x0: int, y0: int, size_px: tuple[int, int], *, factor: int
    ) -> bytes | None:
        """Return the stored JPEG tile whose pixels :meth:`shrunk` would return; None if none is it.

        Raises:
            SlideError: ``bad_tile``: there is one, and it is damaged.
        """
        number = self.level_for(factor)
        level, downsample = self._direct_level(number), self._downsamples[number]
        if level is None or size_px != (level.tile_w, level.tile_h):
            return None
        left, top = round(x0 / downsample), round(y0 / downsample)
        read = [math.ceil(side * factor / downsample - 1e-6) for side in size_px]
        (column, x), (row, y) = divmod(left, level.tile_w), divmod(top, level.tile_h)
        inside = left + level.tile_w <= level.width and top + level.tile_h <= level.height
        if x or y or not inside or tuple(read) != size_px:
            return None
        return Tiles(self._files[level.file], level).jpeg(row * level.across + column)

    @property
    def jpeg_tile(self) -> tuple[int, int] | None:
        """(width, height) of the JPEG tiles of level 0; None if it has none that are read."""
        level = self._direct_level(0)
        is_jpeg = level is not None and isinstance(level.codec, JpegCodec)
        return (level.tile_w, level.tile_h) if level is not None and is_jpeg else None

    def overview(self, mpp: float) -> NDArray[np.uint8]:
        """Read the whole slide at an exact coarse resolution, as uint8 RGB [h, w, 3].

        Covers at least the slide; what the last row and column have beyond it is white.
        """
        ratio = mpp / self.mpp
        out_w, out_h = math.ceil(self.width / ratio), math.ceil(self.height / ratio)
        return self._read_scaled(0, 0, out_w * ratio, out_h * ratio, out_w, out_h, tolerant=True)

    def level_for(self, ratio: float) -> int:
        """Return the coarsest level at or finer than ``ratio`` level-0 px per pixel, within 1 %."""
        fitting = [
            level
            for level, downsample in enumerate(self._downsamples)
            if downsample <= ratio * (1 + EQUAL_SCALE)
        ]
        usable = self._trusted.up_to(fitting[-1]) if fitting else 1
        return max((level for level in fitting if level < usable), default=0)

    # -- OpenSlide -------------------------------------------------------------------------------

    def _trust(self, layout: TiffLayout) -> list[str]:
        """Refuse what would be read wrong, choose the levels used, and say what is not.

        Raises:
            SlideError: The first doubt that refuses the slide; see ``structure``.
        """
        by_tags = tag_doubts(layout, vendor=self.vendor)
        if self.vendor == "dicom":
            files, series = self._series()
            stated = stated_colours(files, series=series)
            by_tags += colour_doubts(stated, name=self.path.name)
        _refuse(by_tags)  # before pixels are read for the others
        # All levels of the file: only those that ``level_for`` and ``levels`` name may be read.
        self._sizes: Sequence[tuple[int, int]] = self._handle.level_dimensions
        self._downsamples: Sequence[float] = self._handle.level_downsamples
        sizes, read = self._sizes, self._stored_pixels
        _refuse(pixel_doubts(layout, vendor=self.vendor, sizes=sizes, read=read))
        self._trusted = LevelTrust(layout, vendor=self.vendor, sizes=sizes, read=read)
        return [doubt.message for doubt in by_tags]

    def _stored_pixels(
        self, level: int, x: int, y: int, w: int, h: int
    ) -> NDArray[np.uint8] | None:
        """Read pixels of a level as OpenSlide does; None where it is damaged."""
        downsample = self._downsamples[level]
        try:
            return self._openslide_rect(level, round(x * downsample), round(y * downsample), w, h)
        except SlideError:
            return None

    def _level_pixels(self, level: int, x: int, y: int, w: int, h: int) -> NDArray[np.uint8] | None:
        """Read pixels of a level from a corner in that level; None where it is damaged."""
        downsample = self._downsamples[level]
        try:
            return self._level_rect(level, round(x * downsample), round(y * downsample), w, h)
        except SlideError:
            return None

    def _series(self) -> tuple[list[Path], str]:
        """Return the DICOM files beside the one that was opened, and the series it is of."""
        series = self._handle.properties.get("dicom.SeriesInstanceUID", "")
        return dicom_files(self._source.parent), series

    def _level_rect(self, level: int, x0: int, y0: int, w: int, h: int) -> NDArray[np.uint8]:
        """Read ``w`` x ``h`` pixels of a level from a level-0 corner: RGB, white outside."""
        if (layout := self._direct_level(level)) is not None:
            tiles = Tiles(self._files[layout.file], layout)
            downsample = self._downsamples[level]
            return read_rect(tiles, round(x0 / downsample), round(y0 / downsample), w, h)
        return self._openslide_rect(level, x0, y0, w, h)

    def _openslide_rect(self, level: int, x0: int, y0: int, w: int, h: int) -> NDArray[np.uint8]:
        try:
            rgba = np.asarray(self._handle.read_region((int(x0), int(y0)), level, (w, h)))
        except openslide.OpenSlideError as error:
            # OpenSlide's errors latch: the handle is dead for good after one bad tile.
            self._handle.close()
            self._handle = open_file(self._source, name=self.path.name)
            raise SlideError(
                f"{self.path.name} is damaged at ({x0}, {y0}): {error}", code="bad_tile"
            ) from error
        return on_white(rgba)

    def _read_scaled(
        self,
        x0: float,
        y0: float,
        w0: float,
        h0: float,
        out_w: int,
        out_h: int,
        *,
        tolerant: bool = False,
    ) -> NDArray[np.uint8]:
        """Read a level-0 rectangle resampled by area to ``out_w`` x ``out_h``, in bounded strips.

        The scale is exact; the corner of a strip is on a whole pixel of the level that is read.
        ``tolerant`` paints what is damaged as tissue instead of raising: for overviews, so that
        what lies there is still looked at on the level it is read from.
        """
        level, shrink = self._source_of(min(w0 / out_w, h0 / out_h))
        downsample = self._downsamples[level]
        tiles = None
        if (layout := self._direct_level(level)) is not None:
            tiles = Tiles(self._files[layout.file], layout, shrink=shrink)
            downsample *= shrink
        x_scale, y_scale = w0 / out_w / downsample, h0 / out_h / downsample
        step = max(1, int(_STRIP_PX / max(1.0, y_scale)))
        if step < out_h:
            # Strips that end nearly on a whole pixel, so that the next begins where it should.
            ends = range(step // 2 + 1, step + 1)
            step = min(ends, key=lambda n: abs(n * y_scale % 1 - 0.5) * -1)
        out = np.empty((out_h, out_w, 3), np.uint8)
        left, width = round(x0 / downsample), max(1, math.ceil(out_w * x_scale - 1e-6))
        for row in range(0, out_h, step):
            rows = min(step, out_h - row)
            top = round(y0 / downsample + row * y_scale)
            height = max(1, math.ceil(rows * y_scale - 1e-6))
            if tiles:
                strip = read_rect(tiles, left, top, width, height, tolerant=tolerant)
            else:
                corner = round(left * downsample), round(top * downsample)
                if tolerant:
                    strip = self._tolerant_rect(level, *corner, width, height)
                else:
                    strip = self._level_rect(level, *corner, width, height)
            out[row : row + rows] = resize_exact(
                strip, x_scale=x_scale, y_scale=y_scale, width=out_w, height=rows
            )
        return out

    def _source_of(self, ratio: float) -> tuple[int, int]:
        """Return the level that is read at ``ratio``, and how far its tiles shrink as decoded."""
        level = self.level_for(ratio)
        times = ratio / self._downsamples[level]
        layout = self._direct_level(level)
        if layout is None or times < 2:
            return level, 1
        shrink = shrink_for(times)
        # Shrinking in the DCT domain is for overviews; twice finer reads stay exact.
        while shrink > 1 and (
            not layout.can_shrink(shrink)
            or (shrink == 2 and self._halving == "exact" and times < 4)
        ):
            shrink //= 2
        return level, shrink

    def _tolerant_rect(self, level: int, x0: int, y0: int, w: int, h: int) -> NDArray[np.uint8]:
        try:
            return self._level_rect(level, x0, y0, w, h)
        except SlideError:
            if max(w, h) <= _DAMAGE_PX:
                return np.full((h, w, 3), DAMAGED_RGB, np.uint8)
        downsample = self._downsamples[level]
        out = np.empty((h, w, 3), np.uint8)
        for y in range(0, h, _DAMAGE_PX):
            for x in range(0, w, _DAMAGE_PX):
                block = out[y : y + _DAMAGE_PX, x : x + _DAMAGE_PX]
                corner = x0 + round(x * downsample), y0 + round(y * downsample)
                block[:] = self._tolerant_rect(level, *corner, block.shape[1], block.shape[0])
        return out

    def _read_openslide(
        self, level: int, boxes: NDArray[np.int64], out: NDArray[np.uint8]
    ) -> NDArray[np.bool_]:
        """Read patches row by row; a row with a damaged tile is read patch by patch."""
        ok = np.zeros(len(boxes), bool)
        px = out.shape[1]

        for top in np.unique(boxes[:, 1]):
            row = np.flatnonzero(boxes[:, 1] == top)
            row = row[np.argsort(boxes[row, 0], kind="stable")]
            gaps = np.flatnonzero(np.diff(boxes[row, 0]) > 2 * boxes[row[0], 2]) + 1
            for run in np.split(row, gaps):
                left, height = int(boxes[run[0], 0]), int(boxes[run, 3].max())
                width = int(boxes[run[-1], 0] + boxes[run[-1], 2]) - left
                strip = self._level_pixels(level, left, int(top), width, height)
                for index in run:
                    x, y, w, h = boxes[index].tolist()
                    if strip is None:
                        patch = self._level_pixels(level, x, y, w, h)
                    else:
                        patch = strip[:h, x - left :][:, :w]
                    if patch is not None:
                        out[index] = resize_area(patch, width=px, height=px)
                        ok[index] = True
        return ok

    # -- the direct path -------------------------------------------------------------------------

    def _find_direct(self, layout: TiffLayout) -> dict[int, TiledLevel]:
        """Choose the levels that are read directly; none, and a note, if unsure."""
        found: list[TiledLevel] = []
        if self.vendor in _TIFF_VENDORS:
            found = tiled_levels(layout, self._source)
            why = no_codec(layout.tiled[0]) if layout.tiled else "it has no tiles"
        elif self.vendor == "dicom":
            files, series = self._series()
            found, why = dicom_levels(files, series=series)
        else:
            why = f"{self.vendor} has no direct path"
        levels = by_level(self._sizes, found)
        if 0 not in levels:
            self._direct_note = why or "level 0 has no direct path"
            return {}
        for level in levels.values():
            if level.file not in self._files:
                self._files[level.file] = os.open(level.file, os.O_RDONLY | os.O_CLOEXEC)
        return levels

    def _direct_level(self, number: int) -> TiledLevel | None:
        """Return a level that is read directly, or None; it is compared when first asked for."""
        level = self._direct.get(number)
        if level is None or number in self._compared:
            return level
        self._compared.add(number)
        gap = disagreement(
            Tiles(self._files[level.file], level),
            number,
            downsample=self._downsamples[number],
            read=self._stored_pixels,
        )
        if gap == "" or (gap is None and number and 0 in self._direct):
            return level
        note = gap or f"no tile of level {number} could be compared with OpenSlide"
        self._direct_note = "; ".join(filter(None, [self._direct_note, note]))
        if gap and number == 0:
            self._direct = {}
        else:
            del self._direct[number]
        return None

    def _tiles(self, level: int, ratio: float, rects: NDArray[np.int64], px: int) -> Tiles | None:
        """Choose how to decode ``level`` for patches at ``ratio``; None if it is not direct."""
        layout = self._direct_level(level)
        if layout is None:
            return None
        file, downsample = self._files[layout.file], self._downsamples[level]
        if ratio / downsample < 2 * (1 - EQUAL_SCALE):
            return Tiles(file, layout)
        if self._halving == "dct" and layout.can_shrink(2):
            shrink = shrink_for(ratio / downsample)
            while not layout.can_shrink(shrink):
                shrink //= 2
            return Tiles(file, layout, shrink=shrink)
        # Averaging a tile before it is cut is exact only if no pixel of a patch splits a pair.
        even = layout.tile_w % 2 == 0 and layout.tile_h % 2 == 0
        if (
            even
            and downsample == 1
            and not (rects[:, :2] & 1).any()
            and (rects[:, 2:] == 2 * px).all()
        ):
            return HalvedTiles(file, layout)
        return Tiles(file, layout)


def _refuse(doubts: Sequence[Doubt]) -> None:
    for doubt in doubts:
        if doubt.refused:
            raise doubt.error()
