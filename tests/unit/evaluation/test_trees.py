"""Trees with planted truth: each cue by level and pooled, pairs of nodes and captions, probes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from pathflip import Archive
from pathflip.archive import schema
from pathflip.archive.commit import Committer
from pathflip.errors import ArchiveError, ConfigError
from pathflip.evaluation.pairs import evaluate_pairs
from pathflip.evaluation.probe import draw_few
from pathflip.evaluation.tree_vectors import (
    encode_trees,
    keyword_bank,
    node_captions,
    node_position,
    node_quadrants,
)
from pathflip.evaluation.trees import accuracy, difference, evaluate_trees, probe_nodes
from pathflip.geometry import patch_tree
from tests.unit.archive.cohort import filled
from tests.unit.evaluation.planted_patches import (
    WORDS,
    WordModel,
    node_features,
    sample_trees,
    split_of,
    tree_archive,
    word_reader,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trees")
    tree_archive(folder, sample_trees(12))
    return folder


def test_nodes_lie_where_geometry_puts_them() -> None:
    tree = patch_tree(0, 0, mpp=0.25)
    assert [node_position(node) for node in range(85)] == list(
        zip(tree.level.tolist(), tree.row.tolist(), tree.col.tolist(), strict=True)
    )
    quadrants = node_quadrants()
    assert quadrants[0] == -1
    for parent, child in tree.edges.tolist():
        if parent:  # children lie in their parent's quadrant
            assert quadrants[child] == quadrants[parent]
    assert quadrants[1:5].tolist() == [0, 1, 2, 3]


def test_vectors_are_those_of_the_stored_features(folder: Path) -> None:
    trees = encode_trees(Archive(folder / "archive"), word_reader(), splits=("test",))
    assert {slide.split for slide in trees.slides} == {"test"}
    assert trees.tree_ids == sorted(trees.tree_ids)
    assert trees.mask.all()
    planted = {(tree.slide, tree.tx): tree for tree in sample_trees(12)}
    for slide, tx, vectors in zip(trees.slides, trees.tx, trees.vectors, strict=True):
        values = node_features(planted[slide.slide_id, int(tx)], noise=0.1, seed=7)
        unit = values / np.linalg.norm(values, axis=1, keepdims=True)
        assert np.abs(vectors - unit).max() < 2e-3  # stored as fp16


def test_each_level_sees_one_cue_and_together_they_solve_the_joint_task(folder: Path) -> None:
    found = evaluate_trees(Archive(folder / "archive"), word_reader(), resamples=100)
    assert (found["trees"], found["patients"]) == (16, 2)
    assert found["joint"]["n"] == 64
    for level in ("5x", "10x"):
        assert found["architecture"]["levels"][level]["accuracy"] == 1
        assert found["nuclei"]["levels"][level]["accuracy"] < 0.7
    for level in ("20x", "40x"):
        assert found["nuclei"]["levels"][level]["accuracy"] == 1
        assert found["architecture"]["levels"][level]["accuracy"] < 0.95
    assert found["joint"]["pooled"]["accuracy"] == 1
    low, high = found["joint"]["pooled"]["ci"]
    assert low < 0.1 < high == 1  # all right, but of two patients only
    best = max(one["accuracy"] for one in found["joint"]["levels"].values())
    gain = found["joint"]["pooled_minus_best"]
    assert gain["difference"] == pytest.approx(1 - best)
    assert gain["ci"][0] < gain["difference"] < gain["ci"][1]
    assert found["joint"]["chance"] == pytest.approx(1 / 6)
    for kind in ("v", "z"):
        assert found["probe"][kind]["nuclei"]["20x"] == 1
        assert found["probe"][kind]["architecture"]["10x"] == 1
        assert found["probe"][kind]["architecture"]["40x"] < 0.8
        few = found["probe"]["few"][kind]
        assert few["nuclei"]["20x"] > 0.9 > 0.8 > few["architecture"]["40x"]


def test_a_probe_of_few_nodes_is_the_mean_over_draws_of_so_many_a_class() -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(2, size=(60, 85))
    x = (y[..., None] * 2.0 - 1 + rng.normal(scale=3, size=(60, 85, 8))).astype(np.float32)
    mask = np.ones((60, 85), np.bool_)
    options = {"train": np.arange(40), "test": np.arange(40, 60), "classes": 2}
    few = probe_nodes(x, y, mask, few=4, **options)
    every = probe_nodes(x, y, mask, **options)
    assert set(few) == set(every) == {0, 1, 2, 3}
    assert 0.5 < few[3] < every[3]
    fit, ask = y[:40, 21:].ravel(), y[40:, 21:].ravel()
    vectors = x[:, 21:]
    expected = []
    for draw in range(5):
        rows = draw_few(fit, 4, seed=[0, 3, draw])
        assert sorted(fit[rows]) == [0] * 4 + [1] * 4
        model = LogisticRegression(C=8 * 2 / 100, max_iter=1000)
        model.fit(vectors[:40].reshape(-1, 8)[rows], fit[rows])
        expected.append(model.score(vectors[40:].reshape(-1, 8), ask))
    assert few[3] == pytest.approx(np.mean(expected))


def test_a_model_of_some_levels_is_measured_by_them_alone(folder: Path) -> None:
    found = evaluate_trees(
        Archive(folder / "archive"), word_reader(levels=(2,)), resamples=0, probes=False
    )
    assert set(found["joint"]["levels"]) == {"20x"}
    assert found["joint"]["pooled"] == found["joint"]["levels"]["20x"]
    assert found["joint"]["pooled_minus_best"]["difference"] == 0
    assert "probe" not in found


def test_a_blind_model_is_at_chance(tmp_path: Path) -> None:
    archive = tree_archive(tmp_path, sample_trees(36, seed=3), noise=30.0, captions=False)
    found = evaluate_trees(archive, word_reader(), split="all", resamples=300, probes=False)
    for task in ("joint", "architecture", "nuclei"):
        low, high = found[task]["pooled"]["ci"]
        assert low - 0.06 < found[task]["chance"] < high + 0.06


def test_a_mixed_root_has_no_truth_of_its_own_and_an_unknown_class_none_at_all(
    tmp_path: Path,
) -> None:
    archive = tree_archive(tmp_path, sample_trees(6))
    text = (tmp_path / "trees.csv").read_text().replace(",solid,", ",,")
    (tmp_path / "trees.csv").write_text(text)
    trees = [tree for tree in sample_trees(6) if split_of(tree.slide) == "test"]
    nested = [tree for tree in trees if tree.architecture == 1]
    found = evaluate_trees(archive, word_reader(), resamples=0, probes=False)
    assert found["architecture"]["n"] == len(nested)
    assert found["nuclei"]["n"] == 4 * len(trees)
    assert found["joint"]["n"] == 4 * len(nested)


def test_what_is_missing_is_told(tmp_path: Path) -> None:
    archive = tree_archive(tmp_path, sample_trees(6), captions=False)
    with pytest.raises(ConfigError, match="has captions"):
        evaluate_pairs(archive, word_reader())
    found = evaluate_trees(archive, word_reader(), resamples=0)
    assert found["probe"]["z"] is None  # no keywords: v alone
    for changed, code in (
        ({"base": {"name": "uni2", "revision": "1", "dim": 5}}, "other_encoder"),
        ({"base": {"name": "planted", "revision": "2", "dim": 5}}, "other_encoder"),
        ({"node_px": 64}, "other_tiling"),
    ):
        with pytest.raises(ArchiveError) as refused:
            encode_trees(archive, word_reader(**changed))
        assert refused.value.code == code
    table = tmp_path / "trees.csv"
    lines = table.read_text().splitlines()
    for broken in ("s04,0,0,85,3,solid,oval", "s04,0,0,first,3,solid,oval", "s04,0"):
        table.write_text("\n".join([*lines[:3], broken, *lines[3:]]))
        with pytest.raises(ConfigError, match="line 4"):
            evaluate_trees(archive, word_reader(), probes=False)
    table.unlink()
    with pytest.raises(ConfigError, match=r"No trees\.csv"):
        evaluate_trees(archive, word_reader())


def test_among_several_sources_of_keywords_one_is_named(tmp_path: Path) -> None:
    archive = tree_archive(tmp_path, sample_trees(6))
    stored = archive.dataset("tree_texts").to_table().to_pylist()
    more = [
        {**row, "text_id": f"{row['tree_id']}/vlm", "source": "vlm", "checksum": None}
        for row in stored
    ]
    with Committer(archive.uri) as committer:
        committer.upsert("tree_texts", filled(schema.tree_texts_schema(), more))
    archive = Archive(archive.uri)
    with pytest.raises(ConfigError, match="captions of oracle, vlm") as refused:
        evaluate_trees(archive, word_reader(), resamples=0)
    assert refused.value.code == "source"
    found = evaluate_trees(archive, word_reader(), source="vlm", resamples=0)
    assert found["probe"]["z"] is not None


def test_differences_are_paired_by_patient() -> None:
    one = np.array([1.0, 1, 0, 0, 1, 1])
    other = np.array([0.0, 0, 0, 0, np.nan, 0])
    patients = ["p", "p", "q", "q", "r", "r"]
    options: dict[str, Any] = {"resamples": 200, "seed": 0}
    assert accuracy(other, patients, **options)["accuracy"] == 0
    same = difference(one, one, patients, **options)
    assert same["difference"] == 0
    assert -1 <= same["ci"][0] == -same["ci"][1] < 0
    assert difference(one, np.zeros(6), patients, **options)["difference"] == pytest.approx(4 / 6)


# -- texts ----------------------------------------------------------------------------------------


def test_the_bank_holds_no_keyword_of_validation_or_test_trees(folder: Path) -> None:
    archive = Archive(folder / "archive")
    bank = keyword_bank(archive, word_reader())
    assert "seen in train" in bank
    assert not {"seen in val", "seen in test"} & set(bank)
    # What a model was trained on counts, whatever the archive says of it.
    drawn = {f"s{i:02d}": "val" if i < 6 else "train" for i in range(12)}
    bank = keyword_bank(archive, word_reader(drawn=drawn))
    assert {"seen in train", "seen in val", "seen in test"} <= set(bank)
    assert keyword_bank(archive, word_reader(), most=2) == sorted(bank)[:2]


def test_captions_are_read_of_the_trees_asked_for(folder: Path) -> None:
    archive = Archive(folder / "archive")
    trees = encode_trees(archive, word_reader(), splits=("val",))
    found = node_captions(archive, trees.tree_ids[:3])
    assert sorted(found) == trees.tree_ids[:3]
    assert all(len(captions) == 85 for captions in found.values())
    with pytest.raises(ConfigError, match="None of 2 patch trees"):
        node_captions(archive, trees.tree_ids[:2], source="another")


def test_pairs_are_found_by_level_and_together(folder: Path) -> None:
    archive = Archive(folder / "archive")
    found = evaluate_pairs(archive, word_reader(), resamples=50, shuffles=2)
    assert found["trees"] == 16
    assert found["no_caption"] == 16 * 43
    # Captions of 5x are none (node 0 is even), so that level is not there.
    assert set(found["levels"]) == {"10x", "20x", "40x"}
    assert found["levels"]["10x"]["n"] == 32
    assert found["levels"]["40x"]["n"] == 512
    assert found["all"]["n"] == 3 * 32
    assert 0 < found["levels"]["40x"]["chance"]["r@1"] < 0.05
    assert found["all"]["gallery"] == 64
    assert found["all"]["itr"]["r@10"] < found["all"]["chance"]["r@10"]  # ties count against it
    few = evaluate_pairs(archive, word_reader(), per_level=10, resamples=0, shuffles=0)
    assert few["all"]["n"] == 30


def test_pairs_of_a_model_that_reads_captions_exactly_are_all_found(folder: Path) -> None:
    archive = Archive(folder / "archive")
    trees = encode_trees(archive, word_reader(), splits=("test",))
    at = {
        f"node {node} of {slide.slide_id} {tx}": trees.vectors[i, node]
        for i, (slide, tx) in enumerate(zip(trees.slides, trees.tx, strict=True))
        for node in range(85)
    }

    class Oracle(WordModel):
        def encode_text(self, texts: Sequence[str]) -> torch.Tensor:
            names = [text.partition(" is")[0] for text in texts]
            return torch.from_numpy(np.stack([at[name] for name in names]))

    found = evaluate_pairs(archive, word_reader(Oracle(WORDS)), resamples=20, shuffles=0)
    for one in [*found["levels"].values(), found["all"]]:
        assert one["itr"]["r@1"] == one["tir"]["r@1"] == 1
        assert 0 < one["ci"]["itr"]["r@1"][0] < one["ci"]["itr"]["r@1"][1] == 1
    blind = evaluate_pairs(
        archive, word_reader(WordModel(("nothing",) * 5)), resamples=0, shuffles=0, protocol="full"
    )
    assert blind["levels"]["40x"]["itr"]["r@1"] == 0  # all captions tie
