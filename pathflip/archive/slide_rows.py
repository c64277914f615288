"""Rows of a slide's tables, made of arrays: regions, their features, and the means of these.

Whoever fills an archive (an ingest, an import of features) makes its rows here, so that the same
patches give the same rows, to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pathflip.archive.schema import region_id

SLIDE_FACTS = ("slide_id", "width", "height", "mpp", "tiles_ok", "tissue_mm2")
"""Columns of ``slides`` that the row of a slide among embeddings is made of."""


def fixed(matrix: NDArray[Any]) -> pa.FixedSizeListArray:
    """Return a matrix [n, d] as an Arrow column of n lists of d."""
    flat = np.ascontiguousarray(matrix)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), matrix.shape[1])


def unit(vectors: NDArray[np.float64]) -> NDArray[np.float32]:
    """Scale rows [n, d] to length 1; zero rows stay zero."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled = np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)
    return np.asarray(scaled, np.float32)


def region_rows(
    slide_id: str,
    *,
    rx: NDArray[np.int32],
    ry: NDArray[np.int32],
    x0: NDArray[np.int64],
    y0: NDArray[np.int64],
    size0: int,
    mpp: float,
    tissue_fraction: NDArray[np.float32],
    n_bad: NDArray[np.int32],
    patch_mask: NDArray[np.uint8],
    patch_tissue: NDArray[np.float32],
    patch_blur: NDArray[np.float32],
    patch_pen: NDArray[np.float32],
) -> pa.Table:
    """Return n rows of the table ``regions``; columns as there, masks and scores [n, slots]."""
    n = len(rx)
    ids = [region_id(slide_id, rx=int(x), ry=int(y)) for x, y in zip(rx, ry, strict=True)]
    return pa.table(
        {
            "region_id": pa.array(ids, pa.string()),
            "rx": pa.array(rx, pa.int32()),
            "ry": pa.array(ry, pa.int32()),
            "n_bad": pa.array(n_bad, pa.int32()),
            "patch_mask": fixed(patch_mask),
            "patch_tissue": fixed(patch_tissue),
            "patch_blur": fixed(patch_blur),
            "patch_pen": fixed(patch_pen),
            "slide_id": pa.array([slide_id] * n, pa.string()),
            "x0": pa.array(x0, pa.int64()),
            "y0": pa.array(y0, pa.int64()),
            "size0": pa.array(np.full(n, size0, np.int32)),
            "mpp": pa.array(np.full(n, mpp, np.float64)),
            "tissue_fraction": pa.array(tissue_fraction, pa.float32()),
            "n_patches": pa.array(patch_mask.sum(axis=1, dtype=np.int32)),
        }
    )


def feature_rows(regions: pa.Table, features: NDArray[np.float16]) -> pa.Table:
    """Return rows of ``features_<encoder>``: [n, slots, dim] of n rows of ``regions``."""
    n, slots, dim = features.shape
    block = features.reshape(n, slots * dim)
    return pa.table(
        {
            "region_id": regions["region_id"],
            "slide_id": regions["slide_id"],
            "features": fixed(block),
        }
    )


def region_embeddings(regions: pa.Table, sums: NDArray[np.float64]) -> pa.Table:
    """Return rows of ``embeddings_<encoder>`` of n regions, but for ``kind``.

    Args:
        regions: Rows of ``regions``.
        sums: Sum over the patches of each region [n, dim].
    """
    columns = ["slide_id", "x0", "y0", "size0", "mpp", "tissue_fraction", "n_patches"]
    named = {name: regions[name] for name in columns}
    return pa.table({"id": regions["region_id"], "vector": fixed(unit(sums))} | named)


def embedding_rows(
    slide: Mapping[str, Any], regions: pa.Table, total: NDArray[np.float64]
) -> pa.Table:
    """Return the rows of ``embeddings_<encoder>`` of a slide: its own, then those of its regions.

    Args:
        slide: The slide's :data:`SLIDE_FACTS`.
        regions: Rows of :func:`region_embeddings`.
        total: Sum over all patches of the slide [dim].
    """
    own = slide_embeddings([slide], unit(total[None]))
    regions = regions.append_column("kind", pa.array(["region"] * len(regions), pa.string()))
    return pa.concat_tables([own, regions.select(own.column_names)])


def slide_embeddings(slides: Sequence[Mapping[str, Any]], vectors: NDArray[np.float32]) -> pa.Table:
    """Return rows of a table of embeddings for n slides themselves.

    Args:
        slides: Their :data:`SLIDE_FACTS`.
        vectors: Their vectors [n, dim].
    """
    ids = [slide["slide_id"] for slide in slides]
    sides = [max(slide["width"] or 0, slide["height"] or 0) for slide in slides]
    return pa.table(
        {
            "id": pa.array(ids, pa.string()),
            "vector": fixed(vectors),
            "slide_id": pa.array(ids, pa.string()),
            "x0": pa.array([0] * len(ids), pa.int64()),
            "y0": pa.array([0] * len(ids), pa.int64()),
            "size0": pa.array(sides, pa.int32()),
            "mpp": pa.array([slide["mpp"] for slide in slides], pa.float64()),
            "tissue_fraction": pa.array([_tissue_share(slide) for slide in slides], pa.float32()),
            "n_patches": pa.array([slide["tiles_ok"] for slide in slides], pa.int32()),
            "kind": pa.array(["slide"] * len(ids), pa.string()),
        }
    )


def _tissue_share(slide: Mapping[str, Any]) -> float:
    area = (slide["width"] or 0) * (slide["height"] or 0) * (slide["mpp"] or 0.0) ** 2 / 1e6
    return min(1.0, (slide["tissue_mm2"] or 0.0) / area) if area else 0.0
