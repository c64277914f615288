"""Geometry of the tile pyramid that viewers are given: levels that halve, cut into tiles.

Levels are numbered as in Deep Zoom (DZI): level 0 is one pixel, each level doubles the one before
it, and the last is the slide in full. A pixel of a level covers exactly 2^k level-0 px each way,
whatever levels the file stores; the last column and row may reach beyond the slide. Tiles do not
overlap, and those at the right and lower edge are cut off there. Nothing here reads a pixel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

MAX_SIDE = 2**36
"""Longest side of a slide, px."""
TILE_PX = 256
"""Side of a tile where the slide has none of its own that can be shown as they are."""
OVERVIEW_PX = 4096
"""Longest side of a level that may be held in full, a power of two."""
OWN_PX = (128, 1024)
"""Least and most side of a slide's own tiles that are taken over."""


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One tile of a pyramid.

    Attributes:
        level, column, row: Its place.
        width, height: Size in pixels of the level.
        scale0: Level-0 px per pixel.
        x0, y0: Corner, level-0 px.
    """

    level: int
    column: int
    row: int
    width: int
    height: int
    scale0: int
    x0: int
    y0: int


@dataclass(frozen=True, kw_only=True)
class Pyramid:
    """Pyramid of a slide.

    Attributes:
        width, height: Size of the slide, level-0 px.
        tile_w, tile_h: Size of a tile, px.

    Raises:
        ValueError: A size is not positive, or absurd.
    """

    width: int
    height: int
    tile_w: int = TILE_PX
    tile_h: int = TILE_PX

    def __post_init__(self) -> None:
        if min(self.width, self.height, self.tile_w, self.tile_h) < 1:
            raise ValueError(f"sizes must be positive: {self}")
        if max(self.width, self.height) > MAX_SIDE:
            raise ValueError(f"a side is longer than {MAX_SIDE} px: {self}")

    @property
    def max_level(self) -> int:
        """Number of the level that is the slide in full."""
        return (max(self.width, self.height) - 1).bit_length()

    @property
    def min_level(self) -> int:
        """Number of the largest level that is one tile."""
        return max(level for level in self.levels() if self.grid(level) == (1, 1))

    @property
    def overview_level(self) -> int:
        """Number of the finest level of at most ``OVERVIEW_PX`` px a side, or the last."""
        return min(self.max_level, OVERVIEW_PX.bit_length() - 1)

    def levels(self) -> range:
        """Numbers of all levels, from the one pixel on."""
        return range(self.max_level + 1)

    def scale0(self, level: int) -> int:
        """Level-0 px per pixel of a level.

        Raises:
            ValueError: There is no such level.
        """
        if not 0 <= level <= self.max_level:
            raise ValueError(f"level {level} is not 0 to {self.max_level}")
        return 1 << (self.max_level - level)

    def size(self, level: int) -> tuple[int, int]:
        """Return (width, height) of a level, px."""
        scale0 = self.scale0(level)
        return -(-self.width // scale0), -(-self.height // scale0)

    def grid(self, level: int) -> tuple[int, int]:
        """Return (columns, rows) of tiles of a level."""
        width, height = self.size(level)
        return -(-width // self.tile_w), -(-height // self.tile_h)

    def has(self, level: int, column: int, row: int) -> bool:
        """Return whether there is such a tile."""
        if not 0 <= level <= self.max_level:
            return False
        columns, rows = self.grid(level)
        return 0 <= column < columns and 0 <= row < rows

    def tile(self, level: int, column: int, row: int) -> Tile:
        """Return a tile by its place.

        Raises:
            ValueError: There is no such tile.
        """
        if not self.has(level, column, row):
            raise ValueError(f"there is no tile {column}_{row} of level {level} in {self}")
        width, height = self.size(level)
        scale0 = self.scale0(level)
        x, y = column * self.tile_w, row * self.tile_h
        return Tile(
            level=level,
            column=column,
            row=row,
            width=min(self.tile_w, width - x),
            height=min(self.tile_h, height - y),
            scale0=scale0,
            x0=x * scale0,
            y0=y * scale0,
        )

    def tiles(self, level: int) -> Iterator[Tile]:
        """Yield the tiles of a level, row by row."""
        columns, rows = self.grid(level)
        for row in range(rows):
            for column in range(columns):
                yield self.tile(level, column, row)


def own_tile(size: tuple[int, int] | None) -> tuple[int, int]:
    """Return the size of tiles for a slide whose JPEG tiles have ``size``, or that has none."""
    least, most = OWN_PX
    if size is None or not all(least <= side <= most for side in size):
        return TILE_PX, TILE_PX
    return size


def picture_size(w0: float, h0: float, px: int) -> tuple[int, int]:
    """Return (width, height) of a picture of ``w0`` x ``h0``, its longer side ``px`` pixels."""
    scale = max(w0, h0) / px
    return max(1, round(w0 / scale)), max(1, round(h0 / scale))
