"""Retrieval between slides and captions: recall at k, batched or over all, beside chance.

ITR asks for the caption of a slide, TIR for the slide of a caption. A query counts as found at k
when one of its positives is among its k best; captions with equal text are positives of each
other's slides.

Shapes: n queries, m gallery items, d joint width, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pathflip.evaluation.bootstrap import interval, patient_weights, support
from pathflip.evaluation.encode import Encoded, captions_of, encode
from pathflip.progress import Report

if TYPE_CHECKING:
    from pathflip.archive import Archive
    from pathflip.checkpoints import Run

KS = (1, 5, 10)
BATCH = 64
"""Gallery size of the protocol ``batch64``: the paper evaluates "with a batch size of 64"."""
SHUFFLES = 20
BLOCK_BYTES = 64 << 20
"""Bytes of similarities that are in memory at once; what is made of them takes as much again."""


def ranks(similarity: ArrayLike, positives: ArrayLike) -> NDArray[np.int64]:
    """Return the rank of each query's best positive, from 1; ties count against it.

    Args:
        similarity: [n, m]; NaN of a positive is the worst value there is, of another the best.
        positives: bool [n, m], at least one in each row.

    Returns:
        int64 [n], 1 to m.
    """
    similarity = np.asarray(similarity)
    positives = np.asarray(positives, np.bool_)
    if similarity.ndim != 2 or similarity.shape != positives.shape:
        raise ValueError(
            f"similarity is {similarity.shape} and positives {positives.shape}; both must be [n, m]"
        )
    if not positives.any(axis=1).all():
        raise ValueError("a query has no positive")
    usable = positives & ~np.isnan(similarity)
    best = np.max(similarity, axis=1, initial=-np.inf, where=usable, keepdims=True)
    ahead = ~positives & ~(similarity < best)
    rank: NDArray[np.int64] = 1 + ahead.sum(axis=1, dtype=np.int64)
    return rank


def recall_at(
    similarity: ArrayLike, positives: ArrayLike, ks: Sequence[int] = KS
) -> dict[str, float]:
    """Return the share of queries with a positive among their k best; ties count against it.

    Args:
        similarity: [n, m], higher is closer.
        positives: bool [n, m], at least one in each row.
        ks: Values of k.

    Returns:
        {"r@1": …} for each k; NaN without a query.
    """
    rank = ranks(similarity, positives)
    return {f"r@{k}": float((rank <= k).mean()) if len(rank) else float("nan") for k in ks}


def chance_at(positives: ArrayLike, ks: Sequence[int] = KS) -> dict[str, float]:
    """Return the exact expectation of :func:`recall_at` for a randomly ranked gallery.

    A query with p positives among m is missed with probability C(m - p, k) / C(m, k).
    """
    positives = np.asarray(positives, np.bool_)
    hit = _chance_hits(positives.sum(axis=1), positives.shape[1], ks)
    return {f"r@{k}": float(hit[:, i].mean()) for i, k in enumerate(ks)}


def text_ids(captions: Sequence[str]) -> NDArray[np.int64]:
    """Return a number for each caption [n], equal where the captions are."""
    _, ids = np.unique(np.asarray(captions, dtype=object).astype(str), return_inverse=True)
    return np.asarray(ids, np.int64)


def retrieval(
    slide: NDArray[Any],
    text: NDArray[Any],
    captions: Sequence[str],
    *,
    protocol: str = "batch64",
    patients: Sequence[str] | None = None,
    ks: Sequence[int] = KS,
    batch: int = BATCH,
    shuffles: int = SHUFFLES,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure retrieval both ways between slides and their captions, row i to row i.

    ``batch64`` cuts the rows, in the order given, into galleries of 64; the last may be smaller
    and every query weighs the same. Batches at random come beside it: mean and standard
    deviation over seeded shuffles. ``full`` makes one gallery of all rows.

    Args:
        slide: Vectors [n, d], normalised here.
        text: Caption vectors [n, d], likewise.
        captions: Texts of the captions [n]; equal ones are all right answers.
        protocol: ``batch64`` or ``full``.
        patients: Patient of each slide [n], for 95 % intervals by resampling patients.
        ks: Values of k.
        batch: Gallery size of ``batch64``.
        shuffles: Number of random orders, 0 for none.
        resamples: Number of bootstrap resamples, 0 for no intervals.
        seed: Seed of the shuffles and the bootstrap.

    Returns:
        {"protocol", "n", "batches", "itr": {"r@1": …}, "tir": …, "chance": …} and, where asked
        for, "ci": {"itr": {"r@1": [low, high]}, …}, "shuffled": {"itr": {"r@1": {"mean", "sd"}}}.
    """
    if protocol not in ("batch64", "full"):
        raise ValueError(f"protocol {protocol!r} is neither batch64 nor full")
    count = len(slide)
    if not count or len(text) != count or len(captions) != count:
        raise ValueError(f"{count} slides, {len(text)} vectors and {len(captions)} captions")
    slide, text = _unit(slide), _unit(text)
    ids = text_ids(captions)
    size = batch if protocol == "batch64" else count
    order = np.arange(count)
    itr, tir, chance = _hits(slide, text, ids, order, size=size, ks=ks)
    found: dict[str, Any] = {
        "protocol": protocol,
        "n": count,
        "gallery": min(size, count),
        "batches": -(-count // size),
        "itr": _named(itr.mean(axis=0), ks),
        "tir": _named(tir.mean(axis=0), ks),
        "chance": _named(chance.mean(axis=0), ks),
    }
    if resamples and patients is not None:
        weights = patient_weights(patients, resamples=resamples, seed=seed)
        weights = weights / weights.sum(axis=1, keepdims=True)
        on = support(patients)
        found["ci"] = {
            name: {
                f"r@{k}": interval(weights @ hits[:, i], float(hits[:, i].mean()), on)
                for i, k in enumerate(ks)
            }
            for name, hits in (("itr", itr), ("tir", tir))
        }
    if protocol == "batch64" and shuffles:
        rng = np.random.default_rng(seed)
        runs = [
            _hits(slide, text, ids, rng.permutation(count), size=size, ks=ks)[:2]
            for _ in range(shuffles)
        ]
        means = np.array([[hits.mean(axis=0) for hits in run] for run in runs])  # [S, 2, K]
        found["shuffled"] = {"shuffles": shuffles} | {
            name: {
                f"r@{k}": {
                    "mean": float(means[:, way, i].mean()),
                    "sd": float(means[:, way, i].std(ddof=1)) if shuffles > 1 else 0.0,
                }
                for i, k in enumerate(ks)
            }
            for way, name in enumerate(("itr", "tir"))
        }
    return found


def evaluate_retrieval(
    archive: Archive,
    run: Run,
    *,
    split: str = "test",
    source: str | None = None,
    encoded: Encoded | None = None,
    progress: Report | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Measure retrieval on the slides of a split that have a caption, in order of slide id.

    Args:
        archive: Archive with slides, features and captions.
        run: Run of the model.
        split: Split to measure; ``all`` for every slide.
        source: Source of the captions; by default that of the run's training.
        encoded: The slides already encoded; those of other splits are ignored.
        progress: Called while slides are encoded.
        options: Options of :func:`retrieval`: protocol, ks, shuffles, resamples, seed.

    Returns:
        As :func:`retrieval`, with "no_caption", the slides left out.
    """
    if encoded is None:
        splits = None if split == "all" else (split,)
        encoded = encode(archive, run, splits=splits, progress=progress)
    rows = [i for i, slide in enumerate(encoded.slides) if split in ("all", slide.split)]
    texts = captions_of(
        archive, [encoded.slides[i] for i in rows], source=source or run.config.get("source")
    )
    kept = [i for i in rows if encoded.slides[i].slide_id in texts]
    captions = [texts[encoded.slides[i].slide_id] for i in kept]
    text = run.model.encode_text(captions).float().cpu().numpy()
    slides = [encoded.slides[i] for i in kept]
    found = retrieval(
        encoded.slide[kept],
        text,
        captions,
        patients=[slide.patient_id or slide.slide_id for slide in slides],
        **options,
    )
    return found | {"split": split, "no_caption": len(rows) - len(kept)}


def _hits(
    slide: NDArray[np.float64],
    text: NDArray[np.float64],
    ids: NDArray[np.int64],
    order: NDArray[np.int64],
    *,
    size: int,
    ks: Sequence[int],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return hits at each k [n, K] by slides and by captions, and their chance, in row order."""
    itr, tir, chance = (np.zeros((len(order), len(ks))) for _ in range(3))
    wanted = np.asarray(ks)
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        of_slide, of_text = _both_ranks(slide[rows], text[rows], ids[rows])
        itr[rows] = of_slide[:, None] <= wanted
        tir[rows] = of_text[:, None] <= wanted
        # Equality is symmetric, so both ways have the same chance.
        _, kind, alike = np.unique(ids[rows], return_inverse=True, return_counts=True)
        chance[rows] = _chance_hits(alike[kind], len(rows), ks)
    return itr, tir, chance


def _both_ranks(
    slide: NDArray[np.float64], text: NDArray[np.float64], ids: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return :func:`ranks` of a gallery's slides and of its captions [m], a block at a time.

    A caption's best slide lies in any block, so similarities are computed twice: once to find it,
    once to count what is ahead of it. The same blocks give the same bits both times, without which
    ties would come apart.
    """
    count = len(ids)
    step = max(1, BLOCK_BYTES // (8 * count))
    blocks = [np.arange(start, min(start + step, count)) for start in range(0, count, step)]
    of_slide = np.empty(count, np.int64)
    best = np.full(count, -np.inf)
    for rows in blocks:
        near, right = slide[rows] @ text.T, ids[rows, None] == ids
        of_slide[rows] = ranks(near, right)
        usable = right & ~np.isnan(near)
        np.maximum(best, np.max(near, axis=0, initial=-np.inf, where=usable), out=best)
    of_text = np.ones(count, np.int64)
    for rows in blocks:
        if len(blocks) > 1:
            near, right = slide[rows] @ text.T, ids[rows, None] == ids
        of_text += (~right & ~(near < best)).sum(axis=0, dtype=np.int64)
    return of_slide, of_text


def _chance_hits(num_positives: NDArray[Any], size: int, ks: Sequence[int]) -> NDArray[np.float64]:
    """Return 1 - C(m - p, k) / C(m, k) for each query and k [n, K]."""
    draws = np.arange(max(ks))  # one gallery item after another, none of them right
    left = size - np.asarray(num_positives, np.float64)[:, None]
    miss = np.maximum(left - draws, 0.0) / np.maximum(size - draws, 1)
    return 1 - np.cumprod(miss, axis=1)[:, np.asarray(ks) - 1]


def _unit(rows: NDArray[Any]) -> NDArray[np.float64]:
    rows = np.asarray(rows, np.float64)
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12))


def _named(values: NDArray[np.float64], ks: Sequence[int]) -> dict[str, float]:
    return {f"r@{k}": float(value) for k, value in zip(ks, values, strict=True)}
