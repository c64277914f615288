"""Recall of a vector index, measured against comparing every row, before searches may use it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathflip.archive import vectors
from pathflip.archive.ann import DEFAULT_PARAMS, FLOAT32_ERROR, candidates_of

MIN_RECALL = 0.9
"""Least recall of an index that is used. Indexes of clustered vectors have 0.97 and more
(docs/notes/performance.md); what is below has lost rows or does not fit the vectors."""

QUERIES, NEAREST = 32, 10


def index_recall(dataset: Any) -> float:
    """Return the share of each sampled row's ten nearest rows that its vector index finds.

    Searches as :func:`pathflip.archive.ann.search_index` does with its defaults. A row that is as
    near as the tenth counts as it, so that equal vectors do not lower the figure.

    Args:
        dataset: A Lance dataset with a column ``vector`` and an index on it.
    """
    total = dataset.count_rows()
    rows = np.random.default_rng(total).permutation(total)[:QUERIES]
    queries = _unit(vectors(dataset.take(np.sort(rows).tolist(), columns=["vector"])["vector"]))
    queries = queries[np.linalg.norm(queries, axis=1) > 0]
    if not len(queries):
        return 1.0
    best = np.full((len(queries), 0), 0, np.float32)
    for batch in dataset.to_batches(columns=["vector"], batch_size=8192):
        if batch.num_rows:
            scores = queries @ _unit(vectors(batch["vector"])).T
            best = _largest(np.concatenate([best, scores], axis=1))
    least = best.min(axis=1) - FLOAT32_ERROR
    found = dataset.scanner(
        columns=["vector", "_distance"],
        nearest={
            "column": "vector",
            "q": queries[0 if len(queries) == 1 else slice(None)],
            "k": candidates_of(NEAREST, DEFAULT_PARAMS),
            "metric": "cosine",
            "minimum_nprobes": DEFAULT_PARAMS.nprobe,
        },
    ).to_table()
    numbers = np.zeros(found.num_rows, np.int64)
    if len(queries) > 1:
        numbers = found["query_index"].to_numpy().astype(np.int64)
    near = (_unit(vectors(found["vector"])) * queries[numbers]).sum(axis=1) >= least[numbers]
    hits = np.minimum(np.bincount(numbers[near], minlength=len(queries)), best.shape[1])
    return float(hits.sum() / best.size)


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: NDArray[np.float32] = (rows / np.where(lengths > 0, lengths, 1)).astype(np.float32)
    return unit


def _largest(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    if scores.shape[1] <= NEAREST:
        return scores
    return np.partition(scores, -NEAREST, axis=1)[:, -NEAREST:]
