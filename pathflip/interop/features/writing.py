"""Writes one slide's imported features as rows and fragments of an archive."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pathflip.archive.fragments import write_fragment
from pathflip.archive.halves import convert, patch_sums
from pathflip.archive.slide_rows import (
    embedding_rows,
    feature_rows,
    region_embeddings,
    region_rows,
)
from pathflip.geometry import Tiling
from pathflip.interop.features.place import corners
from pathflip.interop.features.planning import Planned
from pathflip.interop.features.record import FeatureFile, unusable
from pathflip.slides.tissue import TissueMask

BLOCK_BYTES = 64 << 20
"""Bytes of a slide's features that are written at once."""
READ_BYTES = 24 << 20
"""Bytes of features that are read at once. For more than 32 MB the C library takes fresh memory
from the kernel each time, whose pages cost as much as the reading."""
PIECE_BYTES = 1 << 20
"""Bytes of features that are rounded and placed at once: they stay in the CPU's cache."""
MIN_BAD = 4
MAX_BAD = 0.01
"""Patches of a slide that may be not finite, as an ingest has it for damaged ones."""
_MASK_CELLS = 1 << 26
_EXPONENT = np.uint16(0x7C00)
_here = threading.local()


@dataclass(frozen=True, kw_only=True)
class Written:
    """Rows of one slide, to commit with those of others.

    Attributes:
        slide: Its row of ``slides``.
        regions: Its rows of ``regions``.
        embeddings: Its rows of the encoder's embeddings.
        fragments: Its features, as ``write_fragment`` returned them.
        patches: Patches kept.
        not_finite: Patches left out because their features are not finite numbers of 16 bits.
        bytes: Bytes of features read.
    """

    slide: dict[str, Any]
    regions: pa.Table
    embeddings: pa.Table
    fragments: list[str]
    patches: int
    not_finite: int
    bytes: int


def write_slide(uri: str, table: str, plan: Planned, *, tiling: Tiling) -> Written:
    """Write a slide's features as fragments and return its other rows.

    Args:
        uri: The archive.
        table: The encoder's table of features.
        plan: The slide.
        tiling: The archive's grid.

    Raises:
        SlideError: Its file is damaged, or too many features are not finite (``bad_features``).
    """
    started = time.perf_counter()
    record, placement = plan.record, plan.placement
    quality = _scores(record)
    fractions = _fractions(record)
    x0, y0 = corners(tiling, rx=placement.rx, ry=placement.ry, mpp=plan.mpp)
    at_once = max(1, BLOCK_BYTES // (2 * tiling.slots * record.dim))
    regions, embeddings, fragments = [], [], []
    total = np.zeros(record.dim)
    read = bad = 0
    for first in range(0, len(placement.rx), at_once):
        part = slice(first, first + at_once)
        source = placement.source[part]
        features, finite, count = _gather(record, source)
        read += count
        kept = (source >= 0) & finite
        bad += int(((source >= 0) & ~finite).sum())
        _check_bad(plan, bad)
        alive = kept.any(axis=1)
        scores = quality[source] * kept[..., None] if quality is not None else None
        mask = kept[alive].astype(np.uint8)
        cells = zip(placement.rx[part][alive], placement.ry[part][alive], strict=True)
        stated = [fractions.get((int(x), int(y))) for x, y in cells]
        share = mask.mean(axis=1)
        blank = np.zeros(mask.shape, np.float32)
        rows = region_rows(
            plan.slide_id,
            rx=placement.rx[part][alive],
            ry=placement.ry[part][alive],
            x0=x0[part][alive],
            y0=y0[part][alive],
            size0=round(tiling.region_um / plan.mpp),
            mpp=plan.mpp,
            tissue_fraction=np.array(
                [own if one is None else one[0] for one, own in zip(stated, share, strict=True)],
                np.float32,
            ),
            n_bad=np.array([0 if one is None else one[1] for one in stated], np.int32)
            + ((source >= 0) & ~finite)[alive].sum(axis=1).astype(np.int32),
            patch_mask=mask,
            patch_tissue=mask.astype(np.float32) if scores is None else scores[alive, :, 0],
            patch_blur=blank if scores is None else scores[alive, :, 1],
            patch_pen=blank if scores is None else scores[alive, :, 2],
        )
        block = features if alive.all() else features[alive]
        if len(rows):
            fragments.append(write_fragment(uri, table, feature_rows(rows, block)))
        sums = patch_sums(block)
        total += sums.sum(axis=0)
        regions.append(rows)
        embeddings.append(region_embeddings(rows, sums))
    every = pa.concat_tables(regions)
    patches = int(np.asarray(every["n_patches"]).sum())
    if not patches:
        raise unusable(record.path, "has no finite features", code="bad_features")
    slide = _slide_row(plan, tiling=tiling, regions=every, patches=patches, bad=bad)
    slide["seconds"] = time.perf_counter() - started
    return Written(
        slide=slide,
        regions=every,
        embeddings=embedding_rows(slide, pa.concat_tables(embeddings), total),
        fragments=fragments,
        patches=patches,
        not_finite=bad,
        bytes=read,
    )


def _slide_row(
    plan: Planned, *, tiling: Tiling, regions: pa.Table, patches: int, bad: int
) -> dict[str, Any]:
    record, about = plan.record, dict(plan.about)
    if not about.get("width") or not about.get("height"):
        # As far as the patches reach, where neither file nor slide says more.
        about["width"], about["height"] = _reach(plan, tiling)
    area = record.notes.get("tissue_mm2")
    stated = isinstance(area, int | float) and area >= 0
    return {
        "aliases": [],
        "status": "ready",
        "attempts": 1,
        "reader": "features",
        "reader_note": f"patch features of {record.format}: {record.path.name}",
        **{key: value for key, value in about.items() if value is not None},
        "slide_id": plan.slide_id,
        "mpp": plan.mpp,
        "n_regions": len(regions),
        "n_patches": patches,
        "tiles_ok": patches,
        "tiles_bad": bad,
        "tissue_png": _tissue(plan, tiling),
        "tissue_mpp": tiling.patch_um,
        "tissue_mm2": float(area) if stated and area else patches * tiling.patch_um**2 / 1e6,
    }


def _gather(
    record: FeatureFile, source: NDArray[np.int64]
) -> tuple[NDArray[np.float16], NDArray[np.bool_], int]:
    """Read the features of some slots.

    Returns:
        fp16 [n, slots, dim], zero where there are none, which is good until this thread calls
        again; bool [n, slots], False where they are not finite numbers of 16 bits; the bytes that
        were read.
    """
    out = _zeros((*source.shape, record.dim))
    finite = np.ones(source.shape, np.bool_)
    region, slot = np.nonzero(source >= 0)
    number = source[region, slot]
    order = np.argsort(number, kind="stable")
    number, where = number[order], (region * source.shape[1] + slot)[order]
    flat, fine = out.reshape(-1, record.dim), finite.reshape(-1)
    size = max(1, PIECE_BYTES // (4 * record.dim))
    piece, count = np.empty((size, record.dim), np.float16), 0
    for start, stop in _blocks(record, number):
        rows = np.asarray(record.read(start, stop))
        if rows.shape != (stop - start, record.dim) or rows.dtype.kind not in "fiu":
            raise unusable(record.path, f"gave features of the shape {rows.shape}")
        count += rows.nbytes
        first, last = np.searchsorted(number, (start, stop))
        for at in range(first, last, size):
            part = slice(at, min(at + size, last))
            own = number[part] - start
            without_gaps = own[-1] - own[0] == len(own) - 1
            chosen = rows[own[0] : own[-1] + 1] if without_gaps else rows[own]
            half = _halves(chosen, piece[: len(own)])
            # By its bits, a number is not finite if all of its exponent are set.
            bad = np.asarray((half.view(np.uint16) & _EXPONENT).max(axis=1) == _EXPONENT)
            half[bad] = 0
            fine[where[part]] = ~bad
            flat[where[part]] = half
    return out, finite, count


def _zeros(shape: tuple[int, ...]) -> NDArray[np.float16]:
    """Return zeros, in memory that this thread used before: fresh pages cost as much as filling."""
    size = math.prod(shape)
    block: NDArray[np.float16] | None = getattr(_here, "block", None)
    if block is None or block.size < size:
        block = _here.block = np.empty(size, np.float16)
    zeros = block[:size].reshape(shape)
    zeros.fill(0)
    return zeros


def _halves(rows: NDArray[Any], out: NDArray[np.float16]) -> NDArray[np.float16]:
    """Round features [n, d] to 16 bits, into ``out``."""
    if rows.dtype == np.float32:
        convert(rows, out)
    else:
        with np.errstate(over="ignore", invalid="ignore"):
            out[:] = rows
    return out


def _blocks(record: FeatureFile, number: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield runs of rows to read: all that are needed, without long stretches that are not."""
    size = max(1, READ_BYTES // (4 * record.dim))
    at = 0
    while at < len(number):
        start = int(number[at])
        upto = int(np.searchsorted(number, start + size))
        gaps = np.flatnonzero(np.diff(number[at:upto]) > 1024)
        end = at + int(gaps[0]) + 1 if len(gaps) else upto
        yield start, int(number[end - 1]) + 1
        at = end


def _check_bad(plan: Planned, bad: int) -> None:
    record, planned = plan.record, plan.placement.placed
    if bad > max(MIN_BAD, MAX_BAD * planned) or (bad and plan.action == "extend"):
        raise unusable(
            record.path,
            f"has features that are no finite numbers of 16 bits in {bad:,} or more of {planned:,} "
            "patches",
            hint="Check the encoder's precision; scale features beyond 65,504 down.",
            code="bad_features",
        )


def _scores(record: FeatureFile) -> NDArray[np.float32] | None:
    values = record.quality() if record.quality is not None else None
    if values is None or values.shape != (record.n, 3):
        return None
    return values.astype(np.float32)


def _fractions(record: FeatureFile) -> dict[tuple[int, int], tuple[float, int]]:
    values = record.regions() if record.regions is not None else None
    if values is None:
        return {}
    return {(int(rx), int(ry)): (float(share), int(bad)) for rx, ry, share, bad in values}


def _reach(plan: Planned, tiling: Tiling) -> tuple[int, int]:
    step = round(tiling.region_um / plan.mpp)
    return (
        int((int(plan.placement.rx.max()) + 1) * step),
        int((int(plan.placement.ry.max()) + 1) * step),
    )


def _tissue(plan: Planned, tiling: Tiling) -> bytes | None:
    """Return a mask of the patches, one pixel each; None of a slide that is too large for one."""
    placement, side = plan.placement, tiling.side
    columns = (int(placement.rx.max()) + 1) * side
    rows = (int(placement.ry.max()) + 1) * side
    if rows * columns > _MASK_CELLS:
        return None
    mask = np.zeros((rows, columns), np.bool_)
    region, slot = np.nonzero(placement.source >= 0)
    mask[placement.ry[region] * side + slot // side, placement.rx[region] * side + slot % side] = (
        True
    )
    return TissueMask(mask, tiling.patch_um, plan.mpp).to_png()
