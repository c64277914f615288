"""Resampling by area averages, and pictures as people see them: upright, on white."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import cv2
import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL import Image

_FEW = 3  # averages of fewer pixels than this each way are made here, of more by OpenCV


def on_white(rgba: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Composite straight-alpha RGBA [h, w, 4] on white; an opaque image is only converted."""
    alpha = rgba[..., 3]
    if alpha.min() == 255:
        return np.asarray(cv2.cvtColor(rgba, cv2.COLOR_RGBA2RGB), np.uint8)
    weight = alpha[..., None].astype(np.float32) / 255
    rgb = rgba[..., :3] * weight + 255 * (1 - weight)
    return (rgb + 0.5).astype(np.uint8)


def picture_pixels(image: Image.Image) -> NDArray[np.uint8]:
    """Decode an opened picture as people see it: turned by its EXIF tag, on white, in 8 bits.

    Args:
        image: A picture of any of Pillow's modes for PNG, JPEG, BMP and WebP.

    Returns:
        RGB [h, w, 3].
    """
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # grey of 16 bits, which Pillow would cut off at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        return on_white(np.asarray(image.convert("RGBA"), np.uint8))
    return np.array(image.convert("RGB"), np.uint8)


def resize_area(pixels: NDArray[np.uint8], *, width: int, height: int) -> NDArray[np.uint8]:
    """Resample [h, w, 3] to a size by area averages; linear where it must enlarge."""
    rows, columns = pixels.shape[:2]
    if (rows, columns) == (height, width):
        return pixels
    finer = rows >= height and columns >= width
    whole = rows % height == 0 and columns % width == 0
    if finer and not whole and rows < _FEW * height and columns < _FEW * width:
        # What most 40x slides need (0.2525 or 0.2738 to 0.5): OpenCV takes three times as long.
        tall = _average_rows(pixels.reshape(rows, -1), height)
        turned = cv2.transpose(tall.reshape(height, columns, 3))
        both = _average_rows(np.asarray(turned, np.uint8).reshape(columns, -1), width)
        return np.asarray(cv2.transpose(both.reshape(width, height, 3)), np.uint8)
    method = cv2.INTER_AREA if finer else cv2.INTER_LINEAR
    resized = cv2.resize(np.ascontiguousarray(pixels), (width, height), interpolation=method)
    return np.asarray(resized, np.uint8)


def _average_rows(pixels: NDArray[np.uint8], cells: int) -> NDArray[np.uint8]:
    """Area averages of rows [n, m] -> [cells, m], in integers."""
    total = np.full((cells, pixels.shape[1]), 128, np.uint16)
    for rows, weights in _row_weights(len(pixels), cells):
        part = pixels[rows].astype(np.uint16)
        part *= weights
        total += part
    total >>= 8
    return total.astype(np.uint8)


@lru_cache(maxsize=64)
def _row_weights(n: int, cells: int) -> list[tuple[NDArray[np.int64], NDArray[np.uint16]]]:
    """For the first, second, ... row under every cell: which it is, and its share in 1/256."""
    edges = np.arange(cells + 1) * (n / cells)
    first = np.floor(edges[:-1]).astype(np.int64)
    nth = first + np.arange(math.ceil(n / cells) + 1)[:, None]
    share = np.minimum(edges[1:], nth + 1) - np.maximum(edges[:-1], nth)
    weights = np.rint(np.maximum(0, share) * (256 * cells / n)).astype(np.int64)
    weights[weights.argmax(axis=0), np.arange(cells)] += 256 - weights.sum(axis=0)
    return [
        (rows, one.astype(np.uint16)[:, None])
        for rows, one in zip(np.minimum(nth, n - 1), weights, strict=True)
        if one.any()
    ]


def resize_exact(
    pixels: NDArray[np.uint8], *, x_scale: float, y_scale: float, width: int, height: int
) -> NDArray[np.uint8]:
    """Resample [h, w, 3] by area averages at an exact scale, from the top-left corner on.

    Args:
        pixels: The source.
        x_scale: Source pixels per output pixel across, at least 1 unless it enlarges.
        y_scale: The same down.
        width: Output pixels across.
        height: Output pixels down.

    Returns:
        uint8 [height, width, 3].
    """
    if pixels.shape[:2] == (height, width) or min(x_scale, y_scale) < 1:
        return resize_area(pixels, width=width, height=height)
    # Given factors instead of a size, OpenCV uses them as they are; the size it makes may be one
    # more, and what is asked for may reach a fraction of a pixel beyond what was read.
    grown = cv2.copyMakeBorder(
        pixels, 0, math.ceil(y_scale), 0, math.ceil(x_scale), cv2.BORDER_REPLICATE
    )
    resized = cv2.resize(grown, None, fx=1 / x_scale, fy=1 / y_scale, interpolation=cv2.INTER_AREA)
    return np.asarray(resized[:height, :width], np.uint8)
