"""Slides by their best patches: top-K means, K chosen on validation, levels pooled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pathflip.errors import ArchiveError, ConfigError
from pathflip.evaluation.wsi import KS, evaluate_wsi, patch_level, top_means
from tests.unit.evaluation.planted import build, sample
from tests.unit.evaluation.planted_patches import (
    WordModel,
    sample_trees,
    tree_archive,
    word_reader,
)

ORGANS = {"lung": ("lung",), "colon": ("tissue",)}


def test_top_means_in_closed_form_and_against_a_loop() -> None:
    assert top_means([[3.0], [1], [2]], (1, 2, 5))[:, 0].tolist() == [3, 2.5, 2]
    cosines = np.random.default_rng(0).normal(size=(120, 3))
    found = top_means(cosines)
    for i, k in enumerate(KS):
        for c in range(3):
            assert found[i, c] == pytest.approx(np.mean(sorted(cosines[:, c])[::-1][:k]))


def test_the_level_of_patches_is_that_of_like_field_of_view() -> None:
    reader = word_reader()  # 64, 32, 16 and 8 µm
    assert [patch_level(reader, patch_um=um) for um in (64, 30, 16, 9)] == [0, 1, 2, 3]
    with pytest.raises(ArchiveError, match="23 µm") as refused:
        patch_level(reader, patch_um=23)
    assert refused.value.code == "encoder_scale"


def organ_reader(**changed: Any) -> Any:
    """Features of the planted archive: tumour, necrosis, tissue (1), organ (+1 lung, -1 colon)."""
    model = WordModel(("tumour", "necrosis", "tissue", "lung"))
    base = {"name": "tex", "revision": "1", "dim": 4}
    return word_reader(model, **({"base": base, "level_mpp": (2.0, 1.0, 0.5, 0.25)} | changed))


def test_slides_of_an_archive_are_classified_by_their_patches(tmp_path: Path) -> None:
    archive = build(tmp_path, sample())
    found = evaluate_wsi([archive], organ_reader(), ORGANS, label="organ", resamples=50)
    assert found["n"] == 8
    assert found["k"] == 1  # every K is right on val: the smallest
    assert found["chosen"] == found["topk"]["1"]
    assert all(one["accuracy"] == 1 for one in found["topk"].values())
    assert set(found["levels"]) == {"10x"}  # 32 µm patches
    assert found["chance"]["accuracy"] == 0.5
    every = evaluate_wsi([archive], organ_reader(), ORGANS, label="organ", split="all")
    assert (every["n"], every["k"], every["chosen"]) == (24, None, None)


def test_rare_patches_are_found_by_a_small_k_only(tmp_path: Path) -> None:
    """Necrosis is a few patches of a slide: the mean of 100 patches forgets it."""
    archive = build(tmp_path, sample(48, seed=2))
    classes = {"1": ("necrosis",), "0": ("tissue",)}
    found = evaluate_wsi([archive], organ_reader(), classes, label="necrosis", resamples=0)
    recall = {k: one["classes"]["1"]["recall"] for k, one in found["topk"].items()}
    assert recall["1"] >= recall["100"]
    assert found["k"] in KS


def test_k_is_chosen_on_validation_slides_alone(tmp_path: Path) -> None:
    archive = build(tmp_path, sample())
    reader = organ_reader(drawn={f"s{i:03d}": "test" for i in range(24)})
    found = evaluate_wsi([archive], reader, ORGANS, label="organ", resamples=0)
    assert (found["n"], found["k"]) == (24, None)


def test_trees_give_all_levels_and_the_one_that_sees_decides(tmp_path: Path) -> None:
    archive = tree_archive(tmp_path, sample_trees(12), captions=False)
    classes = {"solid": ("solid",), "nested": ("nested",)}
    found = evaluate_wsi([archive], word_reader(), classes, label="growth", trees=True, resamples=0)
    assert found["n"] == 4
    assert found["k"] in KS
    assert set(found["levels"]) == {"5x", "10x", "20x", "40x"}


def test_slides_without_a_label_are_counted_and_none_at_all_is_refused(tmp_path: Path) -> None:
    archive = build(tmp_path, sample())
    only = {"lung": ("lung",), "breast": ("tissue",)}
    found = evaluate_wsi([archive], organ_reader(), only, label="organ", resamples=0)
    assert found["n"] + found["other_labels"] == 8
    assert found["unlabelled"] == 0
    with pytest.raises(ConfigError, match="Its values are: colon, lung"):
        evaluate_wsi([archive], organ_reader(), {"a": ("x",), "b": ("y",)}, label="organ")
    with pytest.raises(ArchiveError) as refused:
        evaluate_wsi([archive], organ_reader(base={"name": "uni2"}), ORGANS, label="organ")
    assert refused.value.code == "other_encoder"
