"""Geometry of a slide's cut: regions, patches and 5x to 40x patch trees. Pure functions.

One grid per slide starts at level-0 pixel (0, 0) and is laid out in µm. Line ``i`` of a grid of
pitch ``unit_um`` falls on level-0 pixel ``floor(i * unit_um / mpp + 0.5)`` and that rounding is
done in one place, :func:`edge`. Every rectangle is the space between two such lines, so patches
tile their region, and children their parent, without gap or overlap whatever the slide's mpp;
widths then differ by at most one pixel. Tissue is measured between the unrounded lines, so that
the same tissue scanned at another resolution is cut the same way.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pathflip.errors import ConfigError

_Scalar = TypeVar("_Scalar", bound=np.generic)

TREE_OFFSETS = (0, 1, 5, 21)
"""Index of the first node of each level."""
TREE_NODES = 85
"""Nodes of a whole tree: 1 + 4 + 16 + 64."""
LEVEL_OF: NDArray[np.int64] = np.repeat(np.arange(4), [1, 4, 16, 64])
"""Level of each node of a whole tree [85], 0 the coarsest."""
FIELD_OFF = 1.25
"""Largest ratio between the side of a patch and of the nodes of the level it stands for."""


class Coverage(Protocol):
    """Protocol of tissue for :func:`plan_regions`; a ``TissueMask`` implements it."""

    def coverage(
        self, x_edges0: NDArray[np.float64], y_edges0: NDArray[np.float64]
    ) -> NDArray[np.float32]:
        """Return tissue share [ny, nx] of cells between ascending level-0 lines; outside is 0."""


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """Tiling of slides into regions and patches.

    Attributes:
        region_um: Side of a region, µm.
        patch_um: Side of a patch, µm; divides ``region_um`` into 1 to 64 slots a side.
        mpp: Resolution patches are read at, µm/px; ``patch_um / mpp`` is a whole number >= 16.
        min_patch_tissue: A patch is kept if at least this share of it is tissue.
        min_region_patches: A region is kept if at least this share of all its slots is kept, and
            never without one patch. Slots beyond the slide's edge count as not kept. Does not
            apply to a slide none of whose regions reaches it.

    Raises:
        ConfigError: A field is out of range or the sizes do not divide.
    """

    region_um: float = 2048.0
    patch_um: float = 128.0
    mpp: float = 0.5
    min_patch_tissue: float = 0.5
    min_region_patches: float = 0.1

    def __post_init__(self) -> None:
        for name in ("region_um", "patch_um", "mpp"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(
                    f"{name} is {value}.", hint="Give a positive size in µm.", code="tiling"
                )
        for name in ("min_patch_tissue", "min_region_patches"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ConfigError(
                    f"{name} is {value}.", hint="Give a share between 0 and 1.", code="tiling"
                )
        side = self.region_um / self.patch_um
        if abs(side - round(side)) > 1e-6 or not 1 <= round(side) <= 64:
            raise ConfigError(
                f"region_um {self.region_um:g} is {side:g} times patch_um {self.patch_um:g}.",
                hint="Make it a whole number from 1 to 64 times, for example 2048 and 128.",
                code="tiling",
            )
        px = self.patch_um / self.mpp
        if abs(px - round(px)) > 1e-6 or round(px) < 16:
            raise ConfigError(
                f"patch_um {self.patch_um:g} at mpp {self.mpp:g} is {px:g} px.",
                hint="Make it a whole number of pixels, 16 or more, for example 128 and 0.5.",
                code="tiling",
            )

    @property
    def side(self) -> int:
        """Number of patch slots along one side of a region."""
        return round(self.region_um / self.patch_um)

    @property
    def slots(self) -> int:
        """Number of patch slots in a region; slot = row * side + col."""
        return self.side**2

    @property
    def patch_px(self) -> int:
        """Side of a patch as it is read, px at :attr:`mpp`."""
        return round(self.patch_um / self.mpp)

    @property
    def min_patches(self) -> int:
        """Minimum number of patches of a kept region, at least 1."""
        return max(1, math.ceil(self.min_region_patches * self.slots - 1e-9))

    def fingerprint(self) -> str:
        """Hash of all fields, 12 hex digits, the same on every machine."""
        fields = {key: float(value) for key, value in dataclasses.asdict(self).items()}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Regions:
    """The regions kept on one slide, R of them, ordered by (ry, rx).

    Attributes:
        rx: Grid column [R].
        ry: Grid row [R].
        x0: Left edge [R], level-0 px.
        y0: Top edge [R], level-0 px.
        size0: Nominal side, level-0 px: ``round(region_um / mpp)``; exact edges are those of
            :func:`patch_rects`.
        patch_mask: True where a patch is kept [R, slots], row-major.
        patch_tissue: Tissue share of each kept patch [R, slots], 0 where masked.
        tissue_fraction: Tissue share of the whole region's area [R], slide's outside included.
    """

    rx: NDArray[np.int32]
    ry: NDArray[np.int32]
    x0: NDArray[np.int64]
    y0: NDArray[np.int64]
    size0: int
    patch_mask: NDArray[np.bool_]
    patch_tissue: NDArray[np.float32]
    tissue_fraction: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.rx)

    @property
    def n_patches(self) -> NDArray[np.int32]:
        """Number of kept patches of each region [R]."""
        counts: NDArray[np.int32] = self.patch_mask.sum(axis=1, dtype=np.int32)
        return counts


def edge(index: ArrayLike, *, unit_um: float, mpp: float) -> NDArray[np.int64]:
    """Return the level-0 pixel of grid lines.

    Args:
        index: Line numbers, any shape.
        unit_um: Distance between lines, µm.
        mpp: The slide's level-0 µm/px.

    Returns:
        ``floor(index * unit_um / mpp + 0.5)``, the shape of ``index``.
    """
    return np.floor(_line(index, unit_um=unit_um, mpp=mpp) + 0.5).astype(np.int64)


def plan_regions(
    tiling: Tiling, *, width: int, height: int, mpp: float, tissue: Coverage
) -> Regions:
    """Cut one slide into regions of masked patch slots.

    A slot holds a patch if the patch lies wholly inside the slide and enough of it is tissue;
    a region is kept if enough of its slots do, also where part of it is beyond the slide's edge.
    On a slide where no region has enough (a small biopsy), every region with a patch is kept.

    Args:
        tiling: Sizes and thresholds.
        width: Level-0 width, px.
        height: Level-0 height, px.
        mpp: Level-0 µm/px.
        tissue: Tissue of the slide.

    Returns:
        The kept regions; none for a slide smaller than a patch or without tissue.
    """
    side = tiling.side
    columns = _whole_cells(width, unit_um=tiling.patch_um, mpp=mpp)
    rows = _whole_cells(height, unit_um=tiling.patch_um, mpp=mpp)
    n_x, n_y = -(-columns // side), -(-rows // side)

    x_lines = _line(np.arange(columns + 1), unit_um=tiling.patch_um, mpp=mpp)
    y_lines = _line(np.arange(rows + 1), unit_um=tiling.patch_um, mpp=mpp)
    grid = np.zeros((n_y * side, n_x * side), np.float32)
    kept = np.zeros(grid.shape, np.bool_)
    if grid.size:
        grid[:rows, :columns] = tissue.coverage(x_lines, y_lines)
        kept[:rows, :columns] = grid[:rows, :columns] >= np.float32(tiling.min_patch_tissue)
    grid[~kept] = 0

    slots = _to_slots(kept, side=side)
    counts = slots.sum(axis=-1)
    # A biopsy may lie across regions and fill none: better thin regions than a lost slide.
    enough = tiling.min_patches if counts.max(initial=0) >= tiling.min_patches else 1
    ry, rx = np.nonzero(counts >= enough)
    if len(rx):
        fraction = tissue.coverage(
            _line(np.arange(n_x + 1) * side, unit_um=tiling.patch_um, mpp=mpp),
            _line(np.arange(n_y + 1) * side, unit_um=tiling.patch_um, mpp=mpp),
        )[ry, rx]
    else:
        fraction = np.zeros(0, np.float32)
    return Regions(
        rx=rx.astype(np.int32),
        ry=ry.astype(np.int32),
        x0=edge(rx * side, unit_um=tiling.patch_um, mpp=mpp),
        y0=edge(ry * side, unit_um=tiling.patch_um, mpp=mpp),
        size0=round(tiling.region_um / mpp),
        patch_mask=slots[ry, rx],
        patch_tissue=_to_slots(grid, side=side)[ry, rx],
        tissue_fraction=fraction,
    )


def patch_rects(tiling: Tiling, *, rx: int, ry: int, mpp: float) -> NDArray[np.int64]:
    """Return rectangles (x0, y0, w0, h0) of all slots of region (rx, ry), level-0 px [slots, 4]."""
    steps = np.arange(tiling.side + 1)
    x = edge(rx * tiling.side + steps, unit_um=tiling.patch_um, mpp=mpp)
    y = edge(ry * tiling.side + steps, unit_um=tiling.patch_um, mpp=mpp)
    row, col = np.divmod(np.arange(tiling.slots), tiling.side)
    return np.stack([x[col], y[row], x[col + 1] - x[col], y[row + 1] - y[row]], axis=1)


def patch_at(
    tiling: Tiling, *, x0: ArrayLike, y0: ArrayLike, mpp: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return the patch that holds each level-0 position: the inverse of :func:`patch_rects`.

    Args:
        tiling: Sizes.
        x0: Level-0 px, >= 0, any shape; whole or fractional.
        y0: As ``x0``.
        mpp: Level-0 µm/px.

    Returns:
        (rx, ry, slot), each of the shape of ``x0``.
    """
    column = _cell(x0, unit_um=tiling.patch_um, mpp=mpp)
    row = _cell(y0, unit_um=tiling.patch_um, mpp=mpp)
    side = tiling.side
    return column // side, row // side, (row % side) * side + column % side


@dataclass(frozen=True, kw_only=True)
class TreeSpec:
    """Sizes of patch trees; the defaults are those of MR-PLIP.

    A tree is a square of tissue cut four times: 1, 2x2, 4x4 and 8x8 nodes, each ``node_px`` wide at
    the resolution of its level. By default these are 5x, 10x, 20x and 40x, or 2, 1, 0.5 and 0.25
    µm/px.

    Attributes:
        parent_um: Side of the root, µm.
        node_px: Side of every node as it is read, px.

    Raises:
        ConfigError: A field is out of range (``trees``).
    """

    parent_um: float = 1024.0
    node_px: int = 512

    def __post_init__(self) -> None:
        if not (math.isfinite(self.parent_um) and self.parent_um > 0):
            raise ConfigError(
                f"parent_um is {self.parent_um}.", hint="Give a positive size in µm.", code="trees"
            )
        if self.node_px < 16:
            raise ConfigError(
                f"node_px is {self.node_px}.", hint="Give 16 or more pixels.", code="trees"
            )

    @property
    def level_mpp(self) -> tuple[float, float, float, float]:
        """µm per pixel of the four levels, coarsest first."""
        root = self.parent_um / self.node_px
        return root, root / 2, root / 4, root / 8

    def fingerprint(self) -> str:
        """Hash of all fields, 12 hex digits, the same on every machine."""
        fields = {key: float(value) for key, value in dataclasses.asdict(self).items()}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]


def level_name(mpp: float) -> str:
    """Return the name of a level by its nominal magnification: 0.5 µm/px is ``20x``."""
    return f"{10 / mpp:g}x"


def nearest_level(field_um: float, fields: Mapping[int, float]) -> int | None:
    """Return the level whose nodes show about as much as a patch, by the ratio of their sides.

    Args:
        field_um: Side of the patch, µm.
        fields: {level: side of its nodes, µm}.

    Returns:
        The level; None where a side of none is within a quarter of the patch's.
    """
    level = min(fields, key=lambda one: abs(math.log(field_um / fields[one])))
    ratio = field_um / fields[level]
    return level if 1 / FIELD_OFF <= ratio <= FIELD_OFF else None


@dataclass(frozen=True)
class PatchTree:
    """The nodes of T patch trees. Node = ``TREE_OFFSETS[level] + row * 2**level + col``.

    Attributes:
        level: 0 (by default 5x, 2 µm/px) to 3 (40x, 0.25 µm/px) [n].
        row: Row inside the root at the node's own level [n].
        col: Column likewise [n].
        parent: Node this one is a quarter of [n]; -1 for the root.
        mpp: Resolution the node is read at, µm/px [n]; all nodes are ``node_px`` wide then.
        rects: (x0, y0, w0, h0), level-0 px [T, n, 4].
    """

    level: NDArray[np.int32]
    row: NDArray[np.int32]
    col: NDArray[np.int32]
    parent: NDArray[np.int32]
    mpp: NDArray[np.float64]
    rects: NDArray[np.int64]

    @property
    def edges(self) -> NDArray[np.int32]:
        """Return (parent, child) node pairs [n - 1, 2]; 84 in a whole tree."""
        return np.stack([self.parent[1:], np.arange(1, len(self.parent), dtype=np.int32)], axis=1)


def tree_node(level: int, row: int, col: int) -> int:
    """Return the index of a node of a patch tree."""
    if not (0 <= level < len(TREE_OFFSETS) and 0 <= row < 1 << level and 0 <= col < 1 << level):
        raise ValueError(f"no node at level {level}, row {row}, col {col}")
    return TREE_OFFSETS[level] + (row << level) + col


def tree_levels(mpp: float, *, spec: TreeSpec = TreeSpec()) -> int:
    """Return the number of levels that a slide fills without being enlarged by over 10 %.

    Scanners sold as 40x have 0.22 to 0.274 µm/px, hence the margin; by default a 20x slide has 3
    levels (21 nodes). 0 for a slide coarser than the roots.
    """
    return sum(1 for level_mpp in spec.level_mpp if mpp <= 1.1 * level_mpp)


def patch_tree(
    tx: ArrayLike, ty: ArrayLike, *, mpp: float, levels: int = 4, spec: TreeSpec = TreeSpec()
) -> PatchTree:
    """Return the patch trees under roots of the grid of ``parent_um`` (MR-PLIP).

    By default the leaves of a whole tree are the patches of the default tiling, and four roots make
    one of its regions.

    Args:
        tx: Grid columns of the roots, scalar or [T].
        ty: Grid rows of the roots, like ``tx``.
        mpp: The slide's level-0 µm/px.
        levels: 1 to 4, coarsest first; see :func:`tree_levels`.
        spec: Sizes.

    Returns:
        Trees of 1, 5, 21 or 85 nodes.
    """
    if not 1 <= levels <= len(TREE_OFFSETS):
        raise ValueError(f"levels is {levels}, must be 1 to {len(TREE_OFFSETS)}")
    level = LEVEL_OF[levels > LEVEL_OF]
    row, col = np.divmod(np.arange(len(level)) - np.array(TREE_OFFSETS)[level], 2**level)
    above = np.maximum(level - 1, 0)
    parent = np.array(TREE_OFFSETS)[above] + row // 2 * 2**above + col // 2
    parent[0] = -1

    # All levels use the lines of the finest one, or their edges would round apart.
    finest = 2 ** (len(TREE_OFFSETS) - 1)
    step = finest >> level
    unit_um = spec.parent_um / finest
    first_x = np.atleast_1d(np.asarray(tx))[:, None] * finest + col * step
    first_y = np.atleast_1d(np.asarray(ty))[:, None] * finest + row * step
    x0, y0 = (edge(first, unit_um=unit_um, mpp=mpp) for first in (first_x, first_y))
    x1, y1 = (edge(first + step, unit_um=unit_um, mpp=mpp) for first in (first_x, first_y))
    return PatchTree(
        level=level.astype(np.int32),
        row=row.astype(np.int32),
        col=col.astype(np.int32),
        parent=parent.astype(np.int32),
        mpp=np.array(spec.level_mpp)[level],
        rects=np.stack([x0, y0, x1 - x0, y1 - y0], axis=-1),
    )


def choose_parents(
    mask: Coverage,
    *,
    width: int,
    height: int,
    mpp: float,
    spec: TreeSpec,
    count: int,
    seed: int,
    slide_id: str,
    min_tissue: float,
) -> NDArray[np.int32]:
    """Choose the roots of a slide's patch trees at random among those with enough tissue.

    A root's rank is a hash of the seed, the slide and its place: a larger ``count`` keeps the roots
    that a smaller one chose and adds others, whatever the order slides are worked on.

    Args:
        mask: Tissue of the slide.
        width: Level-0 width, px.
        height: Level-0 height, px.
        mpp: Level-0 µm/px.
        spec: Sizes.
        count: Roots at most.
        seed: Seed of the choice.
        slide_id: Key of the slide.
        min_tissue: Smallest share of tissue in a root. Roots lie wholly inside the slide.

    Returns:
        (tx, ty) of each root, row by row of the grid [T, 2].
    """
    columns = _whole_cells(width, unit_um=spec.parent_um, mpp=mpp)
    rows = _whole_cells(height, unit_um=spec.parent_um, mpp=mpp)
    if not (columns and rows):
        return np.zeros((0, 2), np.int32)
    share = mask.coverage(
        _line(np.arange(columns + 1), unit_um=spec.parent_um, mpp=mpp),
        _line(np.arange(rows + 1), unit_um=spec.parent_um, mpp=mpp),
    )
    found = np.argwhere(share >= np.float32(min_tissue))[:, ::-1].tolist()
    rank = {
        (x, y): hashlib.sha256(json.dumps([seed, slide_id, x, y]).encode()).digest()
        for x, y in found
    }
    chosen = sorted(sorted(rank, key=lambda root: rank[root])[:count], key=lambda root: root[::-1])
    return np.array(chosen, np.int32).reshape(-1, 2)


def tree_tissue(
    mask: Coverage, *, tx: int, ty: int, mpp: float, spec: TreeSpec
) -> NDArray[np.float32]:
    """Return the tissue share of the nodes of one patch tree [85]."""
    finest = 2 ** (len(TREE_OFFSETS) - 1)
    steps, unit_um = np.arange(finest + 1), spec.parent_um / finest
    share = mask.coverage(
        _line(tx * finest + steps, unit_um=unit_um, mpp=mpp),
        _line(ty * finest + steps, unit_um=unit_um, mpp=mpp),
    )
    levels = [share]
    while len(levels[0]) > 1:
        half = len(levels[0]) // 2
        levels.insert(0, levels[0].reshape(half, 2, half, 2).mean(axis=(1, 3)))
    return np.concatenate([level.ravel() for level in levels]).astype(np.float32)


def _line(index: ArrayLike, *, unit_um: float, mpp: float) -> NDArray[np.float64]:
    """Return the unrounded level-0 position of grid lines."""
    if not (mpp > 0 and unit_um >= mpp):
        raise ValueError(f"grid of {unit_um} µm at {mpp} µm/px has cells below one pixel")
    return np.asarray(index, np.float64) * unit_um / mpp


def _cell(position: ArrayLike, *, unit_um: float, mpp: float) -> NDArray[np.int64]:
    """Return cell i with ``edge(i) <= position < edge(i + 1)``."""
    position = np.asarray(position)
    # edge() rounds by at most half a pixel, so the guess is off by at most one cell.
    cell = np.floor(position * (mpp / unit_um)).astype(np.int64)
    cell = cell + (edge(cell + 1, unit_um=unit_um, mpp=mpp) <= position)
    return cell - (edge(cell, unit_um=unit_um, mpp=mpp) > position)


def _whole_cells(length: int, *, unit_um: float, mpp: float) -> int:
    """Return the number of cells from 0 that end at or before pixel ``length``."""
    if length < 1:
        raise ValueError(f"slide side is {length} px")
    return int(_cell(length, unit_um=unit_um, mpp=mpp))


def _to_slots(grid: NDArray[_Scalar], *, side: int) -> NDArray[_Scalar]:
    """Reshape a patch grid [n_y * side, n_x * side] to slots [n_y, n_x, side * side]."""
    n_y, n_x = grid.shape[0] // side, grid.shape[1] // side
    blocks = grid.reshape(n_y, side, n_x, side).transpose(0, 2, 1, 3)
    return blocks.reshape(n_y, n_x, side * side)
