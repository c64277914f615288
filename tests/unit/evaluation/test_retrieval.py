"""Retrieval: ranks and recall against another library and counting, chance against all orders."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from torchmetrics.retrieval import RetrievalHitRate, RetrievalRecall

import pathflip.evaluation.retrieval as retrieval_module
from pathflip.evaluation.retrieval import chance_at, ranks, recall_at, retrieval, text_ids


@pytest.mark.parametrize("k", [1, 5, 10])
def test_recall_is_torchmetrics(k: int) -> None:
    rng = np.random.default_rng(k)
    similarity = rng.normal(size=(40, 30)).astype(np.float32)
    one = np.zeros((40, 30), np.bool_)
    one[np.arange(40), rng.integers(30, size=40)] = True
    several = one | (rng.uniform(size=one.shape) < 0.1)
    query = torch.arange(40)[:, None].expand(40, 30).reshape(-1)

    def other(metric: type, positives: np.ndarray) -> float:
        scorer = metric(top_k=k)
        scorer.update(
            torch.from_numpy(similarity).reshape(-1),
            torch.from_numpy(positives).reshape(-1),
            indexes=query,
        )
        return float(scorer.compute())

    ours = recall_at(similarity, one, ks=(k,))[f"r@{k}"]
    assert ours == pytest.approx(other(RetrievalRecall, one))
    ours = recall_at(similarity, several, ks=(k,))[f"r@{k}"]
    assert ours == pytest.approx(other(RetrievalHitRate, several))


def test_ties_and_nan_count_against_the_query() -> None:
    eye = np.eye(4, dtype=np.bool_)
    assert recall_at(np.zeros((4, 4)), eye, ks=(1, 3, 4)) == {"r@1": 0, "r@3": 0, "r@4": 1}
    assert recall_at(np.full((4, 4), np.nan), eye, ks=(3, 4)) == {"r@3": 0, "r@4": 1}
    row = np.array([[1.0, np.nan, 0.5]])
    assert recall_at(row, [[1, 0, 0]], ks=(1, 2)) == {"r@1": 0, "r@2": 1}
    assert recall_at(row, [[0, 1, 0]], ks=(2, 3)) == {"r@2": 0, "r@3": 1}
    # Two positives that tie do not push each other down.
    assert recall_at([[1.0, 1.0, 0.0]], [[1, 1, 0]], ks=(1,)) == {"r@1": 1}
    with pytest.raises(ValueError, match="no positive"):
        recall_at(np.zeros((1, 3)), np.zeros((1, 3)))


def test_chance_is_the_mean_over_all_orders() -> None:
    positives = np.array([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]], np.bool_)
    orders = [np.array(order, np.float64) for order in permutations(range(5))]
    for k in (1, 2, 4, 9):
        mean = np.mean(
            [recall_at(np.tile(o, (3, 1)), positives, ks=(k,))[f"r@{k}"] for o in orders]
        )
        assert chance_at(positives, ks=(k,))[f"r@{k}"] == pytest.approx(mean, abs=1e-12)
    assert chance_at(np.eye(64), ks=(1, 5, 10)) == pytest.approx(
        {"r@1": 1 / 64, "r@5": 5 / 64, "r@10": 10 / 64}
    )


def test_batches_of_64_keep_the_last_and_weigh_queries_alike() -> None:
    rng = np.random.default_rng(0)
    slide, text = rng.normal(size=(2, 150, 8))
    text[:64] = slide[:64]  # the first batch is perfect, the others are chance
    captions = [str(i) for i in range(150)]
    found = retrieval(slide, text, captions, resamples=0, shuffles=0)
    hits = 0.0
    for rows in (slice(0, 64), slice(64, 128), slice(128, 150)):
        a, b = slide[rows], text[rows]
        near = (a @ b.T) / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)[None]
        hits += recall_at(near, np.eye(len(a)), ks=(5,))["r@5"] * len(a)
    assert found["itr"]["r@5"] == pytest.approx(hits / 150)
    assert found["batches"] == 3
    expected = (64 * 5 / 64 + 64 * 5 / 64 + 22 * 5 / 22) / 150
    assert found["chance"]["r@5"] == pytest.approx(expected)
    full = retrieval(slide, text, captions, protocol="full", resamples=0)
    assert full["chance"]["r@5"] == pytest.approx(5 / 150)
    assert "shuffled" not in full


def test_equal_captions_are_all_right() -> None:
    slide = np.eye(6)
    text = np.roll(np.eye(6), 1, axis=0)  # every slide finds its neighbour's caption
    assert retrieval(slide, text, list("abcdef"), resamples=0)["itr"]["r@1"] == 0
    assert retrieval(slide, text, ["same"] * 6, resamples=0)["itr"]["r@1"] == 1
    pairs = retrieval(slide, text, list("aabbcc"), resamples=0, shuffles=0)
    assert pairs["itr"]["r@1"] == pytest.approx(0.5)
    assert pairs["chance"]["r@1"] == pytest.approx(2 / 6)
    ids = text_ids(["a", "b", "a"])
    assert ids[0] == ids[2] != ids[1]


def test_random_vectors_are_at_chance_and_seeds_repeat() -> None:
    rng = np.random.default_rng(3)
    slide, text = rng.normal(size=(2, 640, 16))
    captions = [str(i) for i in range(640)]
    patients = [str(i // 2) for i in range(640)]
    found = retrieval(slide, text, captions, patients=patients)
    assert found == retrieval(slide, text, captions, patients=patients)
    for way in ("itr", "tir"):
        for k in ("r@1", "r@5", "r@10"):
            chance = found["chance"][k]
            assert abs(found[way][k] - chance) < 4 * (chance / 640) ** 0.5
            low, high = found["ci"][way][k]
            assert low <= found[way][k] <= high
            shuffled = found["shuffled"][way][k]
            assert abs(shuffled["mean"] - chance) < 4 * (chance / 640) ** 0.5
            assert 0 < shuffled["sd"] < 0.05


def test_blocks_give_the_same_ranks_as_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole numbers have no rounding: ties and equal captions included, nothing may differ."""
    rng = np.random.default_rng(3)
    slide, text = rng.integers(-2, 3, (2, 97, 6)).astype(np.float64)
    slide[5], slide[40, 0] = slide[4], np.nan
    ids = rng.integers(0, 60, 97)
    near, right = slide @ text.T, ids[:, None] == ids
    expected = ranks(near, right), ranks(near.T, right.T)
    for rows in (1, 10, 96, 97, 500):
        monkeypatch.setattr(retrieval_module, "BLOCK_BYTES", 8 * 97 * rows)
        found = retrieval_module._both_ranks(slide, text, ids)
        np.testing.assert_array_equal(found, expected)
