"""The cohort of patch trees: each cue is read by a linear probe at its own levels and no other."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pathflip.encoders.texture import TextureEncoder
from pathflip.errors import ConfigError
from pathflip.evaluation.prompts import read_classes
from pathflip.geometry import TREE_OFFSETS, TreeSpec, patch_tree
from pathflip.interop.labels import read_patients
from pathflip.keywords import corpus_frequent, extract, load_lexicon
from pathflip.slides.slide import Slide
from pathflip.slides.tissue import find_tissue
from pathflip.synth import make_tree_cohort
from pathflip.synth.tree_pixels import ARCHITECTURES, NUCLEI, nuclei_shapes
from pathflip.synth.trees import FORMS, QUERIES, TERMS, captions, sample_slides

SPEC = TreeSpec(parent_um=256, node_px=128)
TREES = 200
LEVELS = ("5x", "10x", "20x", "40x")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trees")
    summary = make_tree_cohort(root, slides=16, seed=1, processes=1)
    assert (summary.rendered, summary.skipped) == (16, 0)
    return root


def rows(root: Path, name: str) -> list[dict[str, str]]:
    with (root / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def truth(root: Path) -> dict[tuple[str, int, int], dict[int, tuple[str, str]]]:
    """The truth by (slide, tx, ty) and node."""
    found: dict[tuple[str, int, int], dict[int, tuple[str, str]]] = {}
    for row in rows(root, "trees.csv"):
        tree = found.setdefault((row["slide"], int(row["tx"]), int(row["ty"])), {})
        tree[int(row["node"])] = row["architecture"], row["nuclei"]
    return found


class Quadrants:
    """Features of trees, and what is true of their quadrants, four a tree.

    Attributes:
        node: By level, features of one node of each quadrant [4 T, d].
        mean: By level, mean features of four nodes of each quadrant [4 T, d], as many as it has.
        architecture, nuclei: Truth [4 T].
        patient: Patient [4 T].
    """

    def __init__(self, root: Path, *, trees: int) -> None:
        patients = {row["slide"]: row["patient_id"] for row in rows(root, "labels.csv")}
        tumours = {k: v for k, v in truth(root).items() if v[0][0]}
        keys = list(tumours)[:trees]
        assert len(keys) == trees
        # The first leaf, 20x and 10x node of each quadrant, and their siblings.
        rng = np.random.default_rng(0)
        choice = [[np.zeros((4, 1), int)] for _ in keys]
        for nodes in choice:
            for level in (1, 2, 3):
                nodes.append(np.stack([rng.permutation(inside(level, q))[:4] for q in range(4)]))
        features = read_features(root, keys, choice)
        self.node = [features[level][:, :, 0].reshape(4 * trees, -1) for level in range(4)]
        self.mean = [features[level].mean(2).reshape(4 * trees, -1) for level in range(4)]
        leaf = [int(inside(3, q)[0]) for q in range(4)]
        self.architecture = np.array(
            [ARCHITECTURES.index(tumours[k][n][0]) for k in keys for n in leaf]
        )
        self.nuclei = np.array([NUCLEI.index(tumours[k][n][1]) for k in keys for n in leaf])
        self.patient = np.array([patients[slide] for slide, _, _ in keys for _ in leaf])

    def score(self, x: NDArray[np.float32], y: NDArray[np.int64]) -> float:
        """Return the accuracy of a linear probe on patients that it was not fitted on."""
        hits = 0
        for fitted, held in GroupKFold(5).split(x, y, self.patient):
            probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.05, max_iter=300))
            hits += int((probe.fit(x[fitted], y[fitted]).predict(x[held]) == y[held]).sum())
        return hits / len(y)


def inside(level: int, quadrant: int) -> NDArray[np.int64]:
    """The nodes of a quadrant at 10x, 20x or 40x, from their rows and columns."""
    side = 2**level
    row, column = np.divmod(np.arange(side**2), side)
    here = (row >= side / 2) * 2 + (column >= side / 2) == quadrant
    return TREE_OFFSETS[level] + np.flatnonzero(here)


def read_features(
    root: Path, keys: list[tuple[str, int, int]], choice: list[list[NDArray[np.int64]]]
) -> list[NDArray[np.float32]]:
    """Texture features [T, 4, n, d] of the chosen nodes [4, n] by level, each read at its own mpp."""
    encode = TextureEncoder()
    found: list[list[NDArray[np.float32]]] = [[], [], [], []]
    for slide in dict.fromkeys(key[0] for key in keys):
        here = [i for i, key in enumerate(keys) if key[0] == slide]
        with Slide(root / "slides" / f"{slide}.tif") as reader:
            tx, ty = (np.array([keys[i][k] for i in here]) for k in (1, 2))
            trees = patch_tree(tx, ty, mpp=reader.mpp, spec=SPEC)
            for level in range(4):
                nodes = np.stack([choice[i][level] for i in here])
                rects = trees.rects[np.arange(len(here))[:, None, None], nodes]
                pixels = np.empty((nodes.size, SPEC.node_px, SPEC.node_px, 3), np.uint8)
                mpp = float(trees.mpp[TREE_OFFSETS[level]])
                assert reader.read_patches(rects.reshape(-1, 4), mpp=mpp, out=pixels).all()
                found[level].append(encode(pixels).reshape(*nodes.shape, -1))
    return [
        np.broadcast_to(x, (len(x), 4, *x.shape[2:])) for x in map(np.concatenate, found)
    ]


@pytest.fixture(scope="module")
def quadrants(cohort: Path) -> Quadrants:
    return Quadrants(cohort, trees=TREES)


def test_architecture_is_read_at_5x_alone(quadrants: Quadrants) -> None:
    x5, _, _, x40 = quadrants.node
    assert quadrants.score(x5, quadrants.architecture) >= 0.65  # chance 0.25
    assert quadrants.score(x40, quadrants.architecture) <= 0.40


def test_nuclei_are_read_at_20x_and_40x_alone(quadrants: Quadrants) -> None:
    x5, _, x20, x40 = quadrants.node
    assert quadrants.score(x5, quadrants.nuclei) <= 0.45  # chance 0.33
    assert quadrants.score(x20, quadrants.nuclei) >= 0.85
    assert quadrants.score(x40, quadrants.nuclei) >= 0.85


def test_both_cues_need_more_than_one_level(quadrants: Quadrants) -> None:
    both = quadrants.architecture * len(NUCLEI) + quadrants.nuclei
    single = [quadrants.score(x, both) for x in quadrants.mean]
    assert max(single) <= 0.55  # chance 0.08
    assert quadrants.score(np.concatenate(quadrants.mean, 1), both) >= max(single) + 0.15
