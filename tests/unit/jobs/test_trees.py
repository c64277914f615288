"""Pure parts of the trees job: which nodes are read, together with which, and settings."""

from __future__ import annotations

import numpy as np
import pytest

from jobs.tree_actor import node_groups, wanted_nodes
from jobs.trees import TreesConfig
from pathflip.errors import ConfigError
from pathflip.geometry import TREE_OFFSETS


def level_of(node: int) -> int:
    return sum(node >= first for first in TREE_OFFSETS) - 1


def test_glass_and_levels_the_slide_lacks_are_not_read() -> None:
    tissue = np.random.default_rng(0).random((3, 85)).astype(np.float32)
    tissue[:, ::3], tissue[1, 0] = 0.04, 0.0
    for levels, nodes in ((4, 85), (3, 21), (1, 1)):
        wanted = wanted_nodes(tissue, levels=levels)
        for tree in range(3):
            for node in range(85):
                expected = node == 0 or (node < nodes and tissue[tree, node] >= 0.05)
                assert wanted[tree, node] == expected


@pytest.mark.parametrize("trees", [1, 5, 70])
def test_each_node_is_read_once_in_groups_of_one_level(trees: int) -> None:
    wanted = np.random.default_rng(trees).random((trees, 85)) < 0.8
    wanted[0, 21:] = False
    groups = node_groups(wanted)
    read = [(int(t), int(n)) for tree, node in groups for t, n in zip(tree, node, strict=True)]
    assert sorted(read) == [(int(t), int(n)) for t, n in np.argwhere(wanted)]
    for tree, node in groups:
        assert 0 < len(tree) <= 64
        assert len({level_of(int(n)) for n in node}) == 1
    whole = node_groups(np.ones((20, 85), np.bool_))
    assert [len(tree) for tree, _ in whole] == [20, 64, 16, *[64] * 5, *[64] * 20]


@pytest.mark.parametrize("wrong", [{"min_tissue": 1.5}, {"per_slide": 0}, {"node_px": 0}])
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        TreesConfig(**wrong)  # type: ignore[arg-type]
