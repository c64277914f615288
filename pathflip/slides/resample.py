"""Resampling by area averages, and pictures as people see them: upright, on white."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import math
import os
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

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


class Scratch:
    """Memory for intermediate pictures, kept from one picture to the next.

    glibc hands arrays of this size back to the system and gets them again, a page fault every 4 KB:
    400 faults a patch at 0.2738 to 0.5 µm/px, more time than the averages themselves.
    """

    def __init__(self) -> None:
        self._kept: dict[str, NDArray[np.uint8]] = {}

    def array(self, name: str, shape: tuple[int, ...], kind: type[Any]) -> NDArray[Any]:
        """Return an uninitialised array, valid until the next one of this name is asked for."""
        size = math.prod(shape) * np.dtype(kind).itemsize
        kept = self._kept.get(name)
        if kept is None or kept.size < size:
            kept = self._kept[name] = np.empty(size, np.uint8)
        view: NDArray[Any] = kept[:size].view(kind).reshape(shape)
        return view


def resize_area(
    pixels: NDArray[np.uint8],
    *,
    width: int,
    height: int,
    out: NDArray[np.uint8] | None = None,
    scratch: Scratch | None = None,
) -> NDArray[np.uint8]:
    """Resample [h, w, 3] to a size by area averages; linear where it must enlarge.

    Args:
        pixels: The source; itself returned where it has the size and there is no ``out``.
        width: Pixels across.
        height: Pixels down.
        out: uint8 [height, width, 3] to fill.
        scratch: Memory to use again, of who resamples many.
    """
    rows, columns = pixels.shape[:2]
    if (rows, columns) == (height, width):
        if out is None:
            return pixels
        out[...] = pixels
        return out
    finer = rows >= height and columns >= width
    whole = rows % height == 0 and columns % width == 0
    if finer and not whole and rows < _FEW * height and columns < _FEW * width:
        # What most 40x slides need (0.2525 or 0.2738 to 0.5): OpenCV takes five times as long.
        scratch = scratch or Scratch()
        tall = scratch.array("tall", (height, columns, 3), np.uint8)
        _average_rows(pixels.reshape(rows, -1), tall.reshape(height, -1), scratch)
        turned = scratch.array("turned", (columns, height, 3), np.uint8)
        cv2.transpose(tall, dst=turned)
        both = scratch.array("both", (width, height, 3), np.uint8)
        _average_rows(turned.reshape(columns, -1), both.reshape(width, -1), scratch)
        return np.asarray(cv2.transpose(both, dst=out), np.uint8)
    method = cv2.INTER_AREA if finer else cv2.INTER_LINEAR
    source = np.ascontiguousarray(pixels)
    return np.asarray(cv2.resize(source, (width, height), dst=out, interpolation=method), np.uint8)


def _average_rows(pixels: NDArray[np.uint8], out: NDArray[np.uint8], scratch: Scratch) -> None:
    """Area averages of rows [n, m] -> ``out`` [cells, m], in 16-bit integers."""
    (n, m), cells = pixels.shape, len(out)
    wide = scratch.array("wide", (n, m), np.uint16)
    np.copyto(wide, pixels)
    total = scratch.array("total", (cells, m), np.uint16)
    total.fill(128)  # so that what is cut off below rounds
    _weighted_sums()(cells, n, m, *_row_weights(n, cells), wide.ravel(), total.ravel())
    total >>= 8
    np.copyto(out, total, casting="unsafe")


@lru_cache(maxsize=1)
def _weighted_sums() -> Callable[..., None]:
    """Return the compiled product of a sparse matrix and rows, or its equal in NumPy.

    Args of what is returned: rows of the sum, of the source, their length; starts, indices and
    weights of the matrix (CSR); source and sum, flat.

    SciPy's own is found without ``scipy.sparse``, whose import takes 0.1 CPU-s and 25 MB of every
    reader process. It is half of the time of NumPy's, which writes each product to memory.
    """
    scipy = importlib.util.find_spec("scipy")
    for folder in (scipy.submodule_search_locations or ()) if scipy else ():
        path = [os.path.join(folder, "sparse")]
        spec = importlib.machinery.PathFinder.find_spec("_sparsetools", path)
        if spec is not None and spec.loader is not None:
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            found: Callable[..., None] = module.csr_matvecs
            return found
    return weighted_sums


def weighted_sums(
    cells: int,
    n: int,
    m: int,
    starts: NDArray[np.int32],
    rows: NDArray[np.int32],
    weights: NDArray[np.uint16],
    source: NDArray[np.uint16],
    total: NDArray[np.uint16],
) -> None:
    """Add weighted rows of ``source`` [n * m] to ``total`` [cells * m]; see ``_weighted_sums``."""
    source, total = source.reshape(n, m), total.reshape(cells, m)
    for nth in range(int(np.diff(starts).max())):
        cell = np.flatnonzero(starts[:-1] + nth < starts[1:])
        at = starts[cell] + nth
        total[cell] += source[rows[at]] * weights[at, None]


@lru_cache(maxsize=64)
def _row_weights(
    n: int, cells: int
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.uint16]]:
    """Rows under every cell and their shares in 1/256, as a sparse matrix [cells, n] (CSR)."""
    edges = np.arange(cells + 1) * (n / cells)
    first = np.floor(edges[:-1]).astype(np.int64)
    nth = first + np.arange(math.ceil(n / cells) + 1)[:, None]
    share = np.minimum(edges[1:], nth + 1) - np.maximum(edges[:-1], nth)
    weights = np.rint(np.maximum(0, share) * (256 * cells / n)).astype(np.int64)
    weights[weights.argmax(axis=0), np.arange(cells)] += 256 - weights.sum(axis=0)
    used = (weights > 0).T
    starts = np.concatenate([[0], np.cumsum(used.sum(axis=1))])
    rows, shares = np.minimum(nth, n - 1).T[used], weights.T[used]
    return starts.astype(np.int32), rows.astype(np.int32), shares.astype(np.uint16)


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
