"""One large synthetic slide, fast: for benchmarks and fault tests, with no planted truth."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from pathflip.synth.atlas import GLASS_LEVEL, TEXTURES, Atlas, colour_table
from pathflip.synth.scene import outline
from pathflip.synth.tiff import SlideFile, encode_tile, halve

GLASS = "glass"
"""Tissue name of a slide that holds none."""
_BLOCK_TILES = 8
_OUTLINE = 384


@lru_cache(maxsize=1)
def _atlas() -> Atlas:
    return Atlas()


def make_slide(
    path: str | Path,
    *,
    width: int,
    height: int,
    mpp: float,
    layout: str = "generic",
    tile_px: int = 256,
    quality: int = 85,
    seed: int = 0,
    tissue: str = "breast",
    components: str = "ycbcr",
) -> Path:
    """Write a synthetic slide of any size: one tissue with an irregular outline on white glass.

    Memory stays bounded and time short because the tissue repeats: every block of 8 x 8 tiles is
    the same 64 pictures, encoded once and written again and again; only the tiles the outline
    crosses are drawn one by one. Levels are area averages of level 0 up to the outline's edge.

    Args:
        path: The file; written under a temporary name and renamed when complete.
        width: Width of level 0, px.
        height: Height of level 0, px.
        mpp: µm per pixel of level 0.
        layout: ``generic`` (a TIFF pyramid halving down to 512 px) or ``aperio`` (SVS: levels
            1, 4, 16 …, thumbnail, shared JPEG tables).
        tile_px: Side of a tile, a multiple of 16.
        quality: JPEG quality.
        seed: Seed of the outline and of the texture's offset.
        tissue: A name of ``atlas.TEXTURES``, or ``glass`` for a slide without tissue.
        components: ``ycbcr`` (4:2:0), or ``rgb`` as real Aperio files store it (4:4:4).

    Returns:
        The path.

    Raises:
        ValueError: An argument is not one of those named above.
    """
    if layout not in ("generic", "aperio") or components not in ("ycbcr", "rgb"):
        raise ValueError(f"layout {layout!r} or components {components!r} is not known")
    if tile_px % 16 or tile_px <= 0 or min(width, height) < 1:
        raise ValueError("tile_px must be a positive multiple of 16 and the slide not empty")
    if tissue not in (GLASS, *TEXTURES):
        raise ValueError(f"tissue {tissue!r} is none of {(GLASS, *TEXTURES)}")
    rng = np.random.default_rng([seed, 5])
    field = outline(rng, _OUTLINE, fill=0.86)
    if tissue == GLASS:
        field[:] = 1
    block = _block(tissue, mpp, tile_px * _BLOCK_TILES, rng)
    step, smallest = (4, 1024) if layout == "aperio" else (2, 512)
    with SlideFile(
        path, mpp=mpp, aperio=layout == "aperio", quality=quality, components=components
    ) as file:
        factor = 1
        while factor == 1 or max(width, height) // factor >= smallest:
            size = (width // factor, height // factor)
            if min(size) < 1 or min(block.shape[:2]) < 1:
                break
            file.level(
                width=size[0],
                height=size[1],
                tile_px=tile_px,
                tiles=_tiles(block, field, size, tile_px, quality, components),
            )
            if factor == 1 and layout == "aperio":
                file.thumbnail(_thumbnail(block, field, width, height))
            block, factor = halve(block, step), factor * step
    return Path(path)


def _block(tissue: str, mpp: float, side: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    if tissue == GLASS:
        return np.full((side, side, 4), GLASS_LEVEL, np.uint8)
    texture = _atlas()(tissue, mpp=mpp)
    at = np.arange(side) + rng.integers(0, len(texture), (2, 1))
    code = texture[at[0][:, None] % len(texture), at[1][None, :] % len(texture)]
    return np.asarray(colour_table()[code].view(np.uint8).reshape(side, side, 4))


def _tiles(
    block: NDArray[np.uint8],
    field: NDArray[np.float32],
    size: tuple[int, int],
    tile_px: int,
    quality: int,
    components: str,
) -> Iterator[tuple[bytes, bytes]]:
    """Yield encoded tiles of one level, row by row."""
    width, height = size
    step_x, step_y = len(field) / width, len(field) / height  # outline cells per pixel
    reach = -(-tile_px // len(block)) + 1
    tiled = np.tile(block, (reach, reach, 1))  # any tile can be cut from it without wrapping
    inside: dict[tuple[int, int], tuple[bytes, bytes]] = {}
    glass_tile = np.full((tile_px, tile_px, 4), GLASS_LEVEL, np.uint8)
    glass = encode_tile(glass_tile, quality=quality, components=components)
    for y in range(0, height, tile_px):
        rows = _span(y, tile_px, step_y, len(field))
        for x in range(0, width, tile_px):
            near = field[rows, _span(x, tile_px, step_x, len(field))]
            if near.min() >= 0:
                yield glass
                continue
            at = (y % len(block), x % len(block))
            whole = near.max() < 0
            if whole and at in inside:
                yield inside[at]
                continue
            pixels = tiled[at[0] : at[0] + tile_px, at[1] : at[1] + tile_px]
            if not whole:
                move = np.array(
                    [
                        [step_x, 0, (x + 0.5) * step_x - 0.5],
                        [0, step_y, (y + 0.5) * step_y - 0.5],
                    ]
                )
                edge = cv2.warpAffine(
                    field,
                    move,
                    (tile_px, tile_px),
                    flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
                    borderMode=cv2.BORDER_REPLICATE,
                )
                pixels = np.where(edge[..., None] < 0, pixels, np.uint8(GLASS_LEVEL))
            encoded = encode_tile(pixels, quality=quality, components=components)
            if whole:
                inside[at] = encoded
            yield encoded


def _span(start: int, length: int, step: float, cells: int) -> slice:
    """Return the outline cells that a tile's pixels are interpolated from."""
    first = int(np.floor((start + 0.5) * step - 0.5))
    last = int(np.ceil((start + length - 0.5) * step - 0.5))
    return slice(min(max(first, 0), cells - 1), min(max(last, 0), cells - 1) + 1)


def _thumbnail(
    block: NDArray[np.uint8], field: NDArray[np.float32], width: int, height: int
) -> NDArray[np.uint8]:
    scale = 768 / max(width, height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    edge = cv2.resize(field, size, interpolation=cv2.INTER_LINEAR)
    mean = np.rint(block.reshape(-1, 4).mean(0)).astype(np.uint8)
    return np.where(edge[..., None] < 0, mean, np.uint8(GLASS_LEVEL)).astype(np.uint8)
