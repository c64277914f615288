"""Pixels of slides for patch trees, whose two cues can be read at opposite ends of the pyramid.

Architecture is a pattern of a period wider than a 20x node. All patterns share one histogram of
densities, the length of their outlines and the number of nuclei, and none has edges, so that small
nodes show a slope and no more. The type of nuclei is their chromatin: two densities in equal
shares that alternate within 1 µm, so that averages over 1 µm are one colour for every type under
any stain (equal mean density would not do, as it is colours that are averaged). Patterns are drawn
anew for every parent and nuclei for every slide, since a texture that repeats is known by its mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from pathflip.synth.atlas import colour_table

Float = NDArray[np.float32]
Bytes = NDArray[np.uint8]

ARCHITECTURES = ("trabecular", "nested", "cribriform", "solid")
NUCLEI = ("grooved", "stippled", "granular")
MPP = 0.25
PARENT_UM = 256.0
GRID = 4
"""Parents along a side of the slide."""
SIDE_PX = round(GRID * PARENT_UM / MPP)

_CELLS = round(PARENT_UM)  # patterns are drawn at 1 µm/px
_PERIODS = 3.1  # of a pattern along a parent: 83 µm, a 20x node being 64
# Densities in hundredths, as all codes: mean, what a pattern's highest value adds, noise.
_EOSIN, _HAEMATOXYLIN = (38.0, -9.0, 3.5), (13.0, 9.0, 1.3)
_PITCH_UM, _DIAMETER_UM, _APART_UM = 10.0, 7.6, 8.7
_CHROMATIN, _CONTRAST = 0.62, 0.34  # its mean density, and how far its two densities lie from it
_SHAPES = 32  # nuclei drawn per type and slide


@dataclass(frozen=True, kw_only=True)
class Parent:
    """Square of 256 µm under one root: a tumour, or benign stroma where ``architecture`` is None.

    Attributes:
        tx, ty: Column and row in the slide.
        architecture: One of ``ARCHITECTURES``, or None.
        nuclei: Nuclear type of each quadrant, row-major; empty in benign stroma.
    """

    tx: int
    ty: int
    architecture: str | None
    nuclei: tuple[str, ...]


def render(
    parents: Sequence[Parent], *, stain: tuple[float, float], zoom: float, seed: Sequence[int]
) -> Bytes:
    """Draw a slide, uint8 RGBX [4096, 4096, 4] at 0.25 µm/px; squares without a parent are glass.

    Args:
        parents: Parents of the slide.
        stain: Strengths of haematoxylin and eosin.
        zoom: Factor of all lengths but the chromatin's, whose null at 1 µm/px is exact.
        seed: Seed of everything drawn.
    """
    rng = np.random.default_rng(seed)
    side = GRID * _CELLS
    inside = np.zeros((side, side), np.float32)
    tissue = np.zeros((GRID, GRID), np.uint8)
    for parent in parents:
        tissue[parent.ty, parent.tx] = 1
        rows, columns = (slice(i * _CELLS, (i + 1) * _CELLS) for i in (parent.ty, parent.tx))
        if parent.architecture is not None:
            inside[rows, columns] = _pattern(rng, parent.architecture, zoom=zoom)
        else:
            inside[rows, columns] = -0.6 + 0.1 * _noise(rng, _CELLS, sigma=12)
    covered = _outline(rng, tissue)
    eosin, haematoxylin = (
        _enlarged(np.where(covered, mean + slope * inside + noise * _noise(rng, side, sigma=7), 0))
        for mean, slope, noise in (_EOSIN, _HAEMATOXYLIN)
    )
    eosin = _with_grain(rng, eosin)
    _stamp_all(rng, haematoxylin, parents, inside, covered, zoom=zoom)
    code = cv2.merge([eosin, haematoxylin]).view(np.uint16)[..., 0]
    colours, table = np.empty(code.shape, np.uint32), colour_table(*stain)
    for top in range(0, SIDE_PX, 256):  # in bands, as an index takes four times what a code does
        np.take(table, code[top : top + 256], out=colours[top : top + 256])
    return colours.view(np.uint8).reshape(*code.shape, 4)


def _enlarged(density: Float) -> Bytes:
    codes = np.clip(np.rint(density), 0, 255).astype(np.uint8)
    size = (SIDE_PX, SIDE_PX)
    return np.asarray(cv2.resize(codes, size, interpolation=cv2.INTER_LINEAR), np.uint8)


def _noise(rng: np.random.Generator, side: int, *, sigma: float, coarse: int = 4) -> Float:
    """Draw smooth noise [side, side], mean 0, deviation 1, drawn at every ``coarse``-th pixel."""
    white = rng.standard_normal((side // coarse, side // coarse), dtype=np.float32)
    smooth = cv2.GaussianBlur(white, (0, 0), sigma / coarse)
    field = cv2.resize(smooth, (side, side), interpolation=cv2.INTER_CUBIC)
    return np.asarray((field - field.mean()) / field.std(), np.float32)


def _pattern(rng: np.random.Generator, architecture: str, *, zoom: float) -> Float:
    """Draw a field [256, 256] at 1 µm/px that is positive in the tumour, on half of the area."""
    period = zoom * PARENT_UM / _PERIODS * np.exp(rng.uniform(-0.22, 0.22))
    y, x = np.mgrid[:_CELLS, :_CELLS].astype(np.float32)
    x += 0.08 * period * _noise(rng, _CELLS, sigma=PARENT_UM / 9)
    y += 0.08 * period * _noise(rng, _CELLS, sigma=PARENT_UM / 9)
    turn, (across, along) = rng.uniform(0, np.pi), rng.uniform(0, period, 2)
    u = x * np.float32(np.cos(turn)) + y * np.float32(np.sin(turn)) + np.float32(across)
    v = y * np.float32(np.cos(turn)) - x * np.float32(np.sin(turn)) + np.float32(along)

    def wave(angle: float, length: float) -> Float:
        direction = np.cos(angle) * u + np.sin(angle) * v
        return np.asarray(np.cos(2 * np.pi / length * direction), np.float32)

    if architecture == "trabecular":
        field = wave(0, 0.9 * period)
    elif architecture == "solid":
        field = _noise(rng, _CELLS, sigma=0.16 * period)
    else:
        field = sum((wave(i * np.pi / 3, 1.03 * period) for i in range(3)), np.zeros_like(u))
        field = field if architecture == "nested" else -field
    # One histogram for all: what a pattern's densities are says nothing about it.
    shares = np.linspace(-1, 1, 65)
    levels = np.quantile(field[::4, ::4], (shares + 1) / 2)
    contrast = rng.uniform(0.7, 1.1)
    return (contrast * np.interp(field, levels, shares)).astype(np.float32)


def _outline(rng: np.random.Generator, tissue: Bytes) -> NDArray[np.bool_]:
    """Return where there is tissue at 1 µm/px; a little reaches into squares of glass, bent."""
    squares = tissue.repeat(_CELLS, 0).repeat(_CELLS, 1).astype(np.float32)
    wide = cv2.GaussianBlur(squares, (0, 0), 12)
    return np.asarray(wide + 0.1 * np.tanh(_noise(rng, len(wide), sigma=10)) > 0.35)


def _with_grain(rng: np.random.Generator, eosin: Bytes) -> Bytes:
    """Add grain of 1 µm to a density map; glass stays clean."""
    half = SIDE_PX // 2
    white = np.frombuffer(rng.bytes(half * half), np.uint8).reshape(half, half)
    fine = cv2.GaussianBlur(white, (5, 5), 1.3)
    grain = cv2.resize(fine, (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_LINEAR)
    noisy = cv2.addWeighted(eosin, 1.0, grain, 0.25, -0.25 * 127.5)
    return np.asarray(np.where(eosin > 0, noisy, 0), np.uint8)


def _sites(rng: np.random.Generator, *, zoom: float) -> NDArray[np.float64]:
    """Return points [n, 2] (x, y) in µm, in random order and never so near that nuclei overlap."""
    count = int(GRID * PARENT_UM / (_PITCH_UM * zoom))
    pitch = GRID * PARENT_UM / count
    lattice = np.stack(np.meshgrid(np.arange(count), np.arange(count)), -1) + 0.5
    points = (lattice + rng.uniform(-0.25, 0.25, lattice.shape)) * pitch
    first = rng.random((count, count))
    kept = np.ones((count, count), bool)
    near = (_APART_UM * zoom) ** 2
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
        a = slice(0, count - down), slice(max(0, -right), count - max(0, right))
        b = slice(down, count), slice(max(0, right), count - max(0, -right))
        clash = ((points[a] - points[b]) ** 2).sum(-1) < near
        kept[a] &= ~(clash & (first[a] < first[b]))
        kept[b] &= ~(clash & (first[a] >= first[b]))
    return rng.permutation(points[kept])


def nuclei_shapes(rng: np.random.Generator, kind: str, *, diameter_um: float, count: int) -> Bytes:
    """Draw nuclei [count, k, k] in hundredths of density, k odd."""
    radius = diameter_um / MPP / 2 * rng.uniform(0.93, 1.07, (count, 1, 1))
    aspect = rng.uniform(1.0, 1.2, (count, 1, 1)) ** 0.5
    angle = rng.uniform(0, np.pi, (count, 1, 1))
    k = int(np.ceil((radius * aspect).max() * 1.1)) + 1
    y, x = np.mgrid[-k : k + 1, -k : k + 1]
    q = np.hypot(
        (x * np.cos(angle) + y * np.sin(angle)) / (radius * aspect),
        (y * np.cos(angle) - x * np.sin(angle)) / (radius / aspect),
    )
    body = np.clip((1.05 - q) * radius * 0.6, 0, 1)
    # Without the taper the stripes that the rim cuts would be left in averages over a period.
    taper = np.clip((0.92 - q) * radius * 0.25, 0, 1)
    at = (
        x[None] + 2 * rng.integers(2, size=(count, 1, 1)),
        y[None] + 2 * rng.integers(2, size=(count, 1, 1)),
    )
    striped, crossed = (1 - 2 * (axis // 2 % 2) for axis in at)
    if kind == "grooved":
        chromatin = np.where(rng.integers(2, size=(count, 1, 1)), striped, crossed)
    elif kind == "stippled":
        chromatin = striped * crossed
    else:
        chromatin = 1 - 2 * ((at[0] + at[1] + rng.integers(2, size=(count, 1, 1))) % 2)
    return np.asarray(np.rint(100 * body * (_CHROMATIN + _CONTRAST * taper * chromatin)), np.uint8)


def _stamp_all(
    rng: np.random.Generator,
    density: Bytes,
    parents: Sequence[Parent],
    inside: Float,
    covered: NDArray[np.bool_],
    *,
    zoom: float,
) -> None:
    """Stamp nuclei: in each tumour as many, of its quadrants' types; small ones in the stroma."""
    bank = [
        nuclei_shapes(rng, kind, diameter_um=_DIAMETER_UM * zoom, count=_SHAPES) for kind in NUCLEI
    ]
    bank.append(nuclei_shapes(rng, "granular", diameter_um=4.0 * zoom, count=_SHAPES) // 5 * 4)
    points = _sites(rng, zoom=zoom)
    cell = points.astype(np.int64)
    square = cell // _CELLS
    kind = np.full(len(points), -1)
    expected = (PARENT_UM / (_PITCH_UM * zoom)) ** 2
    for parent in parents:
        here = np.flatnonzero((square == (parent.tx, parent.ty)).all(1))
        in_tumour = inside[cell[here, 1], cell[here, 0]] > 0
        if parent.architecture is None:
            kind[here[: round(0.3 * expected)]] = len(NUCLEI)
            continue
        tumour, stroma = here[in_tumour], here[~in_tumour]
        # Fewer than any pattern has room for, so that their number is the same for all.
        tumour = tumour[: round(rng.uniform(0.24, 0.28) * expected)]
        quadrant = (cell[tumour] % _CELLS) // (_CELLS // 2)
        types = np.array([NUCLEI.index(name) for name in parent.nuclei])
        kind[tumour] = types[quadrant[:, 1] * 2 + quadrant[:, 0]]
        kind[stroma[: round(0.08 * expected)]] = len(NUCLEI)
    kind[~covered[cell[:, 1], cell[:, 0]]] = -1
    # Even pixels, or halving would null half of the stripes at 20x already.
    pixel = np.rint(points / MPP / 2).astype(np.int64) * 2
    which = rng.integers(_SHAPES, size=len(points))
    margin = max(b.shape[1] for b in bank) // 2 + 1
    fits = ((pixel >= margin) & (pixel < SIDE_PX - margin)).all(1) & (kind >= 0)
    for (x, y), k, i in zip(
        pixel[fits].tolist(), kind[fits].tolist(), which[fits].tolist(), strict=True
    ):
        shape = bank[k][i]
        r = len(shape) // 2
        view = density[y - r : y + r + 1, x - r : x + r + 1]
        np.maximum(view, shape, out=view)
