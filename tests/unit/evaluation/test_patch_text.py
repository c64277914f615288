"""Cutting pictures into nodes of levels, class vectors, and pooling over levels."""

from __future__ import annotations

import numpy as np
import pytest

from pathflip.evaluation.patch_text import (
    LevelVectors,
    class_scores,
    class_weights,
    cut_picture,
    mean_vectors,
    pool_levels,
    softmax,
)
from pathflip.geometry import level_name
from tests.unit.evaluation.planted_patches import ColourModel, colour_reader


def test_levels_have_the_names_of_their_magnification() -> None:
    assert [level_name(mpp) for mpp in (2.0, 1.0, 0.5, 0.25)] == ["5x", "10x", "20x", "40x"]


@pytest.mark.parametrize(
    ("side", "mpp", "nodes"),
    [
        (256, 0.25, {0: 1, 1: 4, 2: 16, 3: 64}),  # a whole tree
        (256, 0.27, {0: 1, 1: 4, 2: 16, 3: 64}),  # sold as 40x
        (128, 0.5, {0: 1, 1: 4, 2: 16}),  # no 40x in it
        (48, 0.5, {2: 1}),  # 24 µm: a 20x node and a half
        (231, 0.25, {0: 1, 1: 1, 2: 9, 3: 49}),  # 57.5 µm: nine tenths of a 5x node
    ],
)
def test_a_picture_is_cut_at_every_level_it_fills(
    side: int, mpp: float, nodes: dict[int, int]
) -> None:
    rgb = np.zeros((side, side, 3), np.uint8)
    cuts = cut_picture(rgb, mpp=mpp, reader=colour_reader())
    assert {cut.level: len(cut.pixels) for cut in cuts} == nodes
    assert all(cut.pixels.shape[1:] == (32, 32, 3) and not cut.by_field for cut in cuts)


def test_nodes_are_the_pixels_of_the_picture_around_its_centre() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (40, 100, 3), dtype=np.uint8)
    (cut,) = cut_picture(rgb, mpp=0.25, reader=colour_reader(levels=(3,)))
    assert (cut.pixels == [rgb[4:36, x : x + 32] for x in (2, 34, 66)]).all()
    (half,) = cut_picture(np.repeat(np.repeat(rgb, 2, 0), 2, 1), mpp=0.25,
                          reader=colour_reader(levels=(2,)))  # fmt: skip
    assert (half.pixels == cut.pixels).all()


@pytest.mark.parametrize(
    ("side", "mpp", "level"), [(28, 0.5, 2), (25, 0.5, 2), (20, 0.5, 3), (27, 1.0, 1), (17, 3.0, 0)]
)
def test_a_picture_that_fills_no_node_stands_for_one_of_like_field(
    side: int, mpp: float, level: int
) -> None:
    reader = colour_reader(node_px=32 if mpp > 0.5 or side > 22 else 64)
    rgb = np.random.default_rng(0).integers(0, 256, (side, side + 6, 3), dtype=np.uint8)
    (cut,) = cut_picture(rgb, mpp=mpp, reader=reader)
    assert cut.by_field
    assert cut.level == level
    assert (cut.pixels[0] == rgb[:, 3 : 3 + side]).all()


def test_a_class_is_the_mean_of_its_normalised_prompts() -> None:
    reader = colour_reader()
    classes = {"warm": ("red", "red and green"), "cold": ("blue",)}
    found = class_weights(reader, classes, templates=("a CLASSNAME", "CLASSNAME"))
    prompts = reader.texts(["a red", "red", "a red and green", "red and green"])
    mean = prompts.mean(axis=0)
    assert np.allclose(found[0], mean / np.linalg.norm(mean), atol=1e-6)
    assert np.allclose(np.linalg.norm(found, axis=1), 1)


def test_scores_are_the_mean_over_levels_of_the_softmax_of_within_level_means() -> None:
    rng = np.random.default_rng(3)
    nodes = rng.normal(size=(23, 4)).astype(np.float32)
    nodes /= np.linalg.norm(nodes, axis=1, keepdims=True)
    item = np.array([0] * 9 + [1] * 6 + [3] * 8)
    level = np.array([0] + [3] * 8 + [2] * 6 + [1] * 4 + [3] * 4)
    weights = rng.normal(size=(3, 4))
    found = mean_vectors(nodes, item=item, level=level, count=5)
    scores = class_scores(found, weights, tau=0.2)
    for picture in (0, 1, 3):
        by_level = []
        for one in np.unique(level[item == picture]):
            cosines = [v @ weights.T for v in nodes[(item == picture) & (level == one)]]
            logits = np.mean(cosines, axis=0) / 0.2
            by_level.append(np.exp(logits) / np.exp(logits).sum())
        assert scores[picture] == pytest.approx(np.mean(by_level, axis=0), abs=1e-6)
    assert np.isnan(scores[[2, 4]]).all()  # no level, no score
    assert (found.at(3).item == [0, 3]).all()


def test_many_blind_nodes_do_not_outvote_one_that_sees() -> None:
    """One node of 5x says green; 64 of 40x lean to red, each a little."""
    green, red = np.array([0.0, 1, 0]), np.array([0.15, 0.05, 0.99])
    nodes = np.stack([green, *[red / np.linalg.norm(red)] * 64]).astype(np.float32)
    level = np.array([0, *[3] * 64])
    weights = np.eye(3)[:2]
    found = mean_vectors(nodes, item=np.zeros(65, np.int64), level=level, count=1)
    assert class_scores(found, weights, tau=0.1)[0].argmax() == 1
    assert nodes.mean(axis=0)[:2].argmax() == 0


def test_softmax_and_pooling_in_closed_form() -> None:
    assert softmax([[0.0, np.log(3) * 0.5]], tau=0.5)[0] == pytest.approx([0.25, 0.75])
    assert softmax([[1e5, 0.0]], tau=0.01)[0] == pytest.approx([1, 0])
    pooled = pool_levels(np.array([[1.0, 0], [0, 1], [0.5, 0.5]]), np.array([0, 0, 1]), count=2)
    assert (pooled == 0.5).all()


def test_a_whole_vector_weighs_levels_alike() -> None:
    found = LevelVectors(
        item=np.array([0, 0]), level=np.array([0, 3]),
        vectors=np.array([[0.6, 0], [0, 0.6]], np.float32), count=2,
    )  # fmt: skip
    assert found.whole()[0] == pytest.approx([np.sqrt(0.5)] * 2)
    assert (found.whole()[1] == 0).all()


def test_the_level_reaches_the_model() -> None:
    model = ColourModel()
    reader = colour_reader(model)
    reader.vectors(np.zeros((3, 32, 32, 3), np.uint8), np.array([0, 2, 3]))
    assert model.levels == [0, 2, 3]
