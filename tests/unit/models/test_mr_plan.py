"""Draws and counts of a step: edges by hand, masks, prefixes, which pairs may be mismatched."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from pathflip.models import mr_plan
from tests.unit.models.tree_samples import TOKENIZER, patch_model, tree_batch

SPECIAL = {0, 1, 2, 3, 4}
WORDS = np.arange(5, 40)


# -- edges ----------------------------------------------------------------------------------------


def test_edges_of_a_whole_tree_by_hand() -> None:
    assert mr_plan.EDGES[:4].tolist() == [[0, 1], [0, 2], [0, 3], [0, 4]]
    # Node 2 is the upper right quarter: its children stand in rows 0 and 1, columns 2 and 3, of 4.
    assert [child for parent, child in mr_plan.EDGES.tolist() if parent == 2] == [7, 8, 11, 12]
    # Node 20, row 3 and column 3 of 4: rows and columns 6 and 7 of 8, the last at 84.
    assert [child for parent, child in mr_plan.EDGES.tolist() if parent == 20] == [75, 76, 83, 84]
    children = Counter(parent for parent, _ in mr_plan.EDGES.tolist())
    assert children == dict.fromkeys(range(21), 4)
    assert sorted(child for _, child in mr_plan.EDGES.tolist()) == list(range(1, 85))
    assert len(mr_plan.ANCESTORS) == 84 + 80 + 64
    assert {tuple(pair) for pair in mr_plan.ANCESTORS.tolist()} >= {(0, 84), (4, 84), (20, 84)}


def test_edges_need_both_patches() -> None:
    present = torch.ones(2, 85).bool()
    present[0, 2] = False  # an inner node: its edge up and four edges down
    present[1, 21:] = False
    edges = mr_plan.tree_edges(present, kind="hierarchy", draws=[0, 0])
    first, second = edges[edges[:, 0] < 85], edges[edges[:, 0] >= 85] - 85
    assert len(first) == 84 - 5
    assert not (first == 2).any()
    assert sorted(second[:, 1].tolist()) == list(range(1, 21))
    kept = mr_plan.tree_edges(present, kind="all_ancestors", draws=[0, 0])
    # The root still has all but node 2; node 2's 4 children and 16 grandchildren lose it alone.
    assert len(kept) == 228 - 1 - 4 - 16 + (20 + 16)


def test_random_edges_are_as_many_and_drawn_by_seed() -> None:
    present = tree_batch().node_mask
    count = len(mr_plan.tree_edges(present, kind="hierarchy", draws=[1, 2]))
    edges = mr_plan.tree_edges(present, kind="random", draws=[1, 2])
    assert len(edges) == count
    assert (edges[:, 0] != edges[:, 1]).all()
    assert torch.equal(edges[:, 0] // 85, edges[:, 1] // 85), "of one tree"
    assert present.flatten()[edges].all()
    assert torch.equal(edges, mr_plan.tree_edges(present, kind="random", draws=[1, 2]))
    assert not torch.equal(edges, mr_plan.tree_edges(present, kind="random", draws=[1, 3]))


# -- words ----------------------------------------------------------------------------------------


def test_masked_words() -> None:
    ids = [2, *range(5, 25), 3]
    kinds: Counter[str] = Counter()
    for seed in range(400):
        hidden, places = mr_plan.mask_tokens(ids, WORDS, 4, 0.15, np.random.default_rng(seed))
        assert len(places) == 3, "15 % of 20"
        assert places == sorted(set(places))
        for place, (old, new) in enumerate(zip(ids, hidden, strict=True)):
            if place in places:
                assert old not in SPECIAL
                kinds["mask" if new == 4 else "kept" if new == old else "other"] += 1
                assert new == 4 or new in WORDS
            else:
                assert new == old
    share = {name: count / kinds.total() for name, count in kinds.items()}
    assert share["mask"] == pytest.approx(0.8, abs=0.04)
    assert share["other"] == pytest.approx(0.1, abs=0.03)
    assert share["kept"] == pytest.approx(0.1, abs=0.03)


def test_one_word_at_least_is_masked_and_none_where_there_is_none() -> None:
    rng = np.random.default_rng(0)
    assert mr_plan.mask_tokens([2, 9, 3], WORDS, 4, 0.15, rng)[1] == [1]
    assert mr_plan.mask_tokens([2, 3], WORDS, 4, 0.15, rng) == ([2, 3], [])


def test_a_prefix_leaves_a_word_and_the_end() -> None:
    found = {mr_plan.prefix_length(6, np.random.default_rng(seed)) for seed in range(200)}
    assert found == {1, 2, 3, 4}
    assert mr_plan.prefix_length(2, np.random.default_rng(0)) == 1


def test_words_of_a_tokenizer_are_not_special() -> None:
    words = mr_plan.plain_tokens(TOKENIZER)
    assert not SPECIAL & set(words.tolist())
    assert len(words) == len(TOKENIZER) - 5


# -- mismatched pairs -----------------------------------------------------------------------------


def test_equal_captions_and_equal_keywords_are_never_mismatched() -> None:
    sets = [frozenset(own) for own in ({1, 2}, {2, 1}, {3}, set(), set())]
    allowed = mr_plan.negatives_allowed(torch.tensor([5, 6, 5, 7, 8]), sets)
    expected = [
        [0, 0, 0, 1, 1],  # 1 has its keywords, 2 its caption
        [0, 0, 1, 1, 1],
        [0, 1, 0, 1, 1],
        [1, 1, 1, 0, 1],  # no keywords at all are not equal keywords
        [1, 1, 1, 1, 0],
    ]
    assert allowed.long().tolist() == expected


# -- counts ---------------------------------------------------------------------------------------


def test_counts_are_known_before_the_forward_pass() -> None:
    model, batch = patch_model(selection="own"), tree_batch(trees=3)
    counts, out = model.counts(batch), model(batch)
    assert counts == out.counts
    assert list(counts) == list(model.config.losses)
    assert counts["itc"] == 12
    assert counts["itm"] == 36, "every pair has a partner that it may be mismatched with"
    plan = model.plan(batch)
    assert counts["mlm"] == sum(map(len, plan.places))
    assert counts["plm"] == sum(map(len, plan.captions)) - sum(plan.prefixes)
    assert counts["cvta"] == 3
    assert counts["mrtva"] == len(plan.edges)


def test_trees_with_few_keywords_or_none_of_their_own_are_left_out() -> None:
    batch = tree_batch(trees=3)
    index = batch.keyword_index.clone()
    index[0, 3:] = -1
    own = batch.own.clone()
    own[1] = False
    bare = replace(batch, keyword_index=index, own=own)
    assert patch_model(selection="own").counts(bare)["cvta"] == 1
    assert patch_model(selection="current").counts(bare)["cvta"] == 2
    for progress, count in ((0.0, 1), (0.0999, 1), (0.1, 2)):
        assert patch_model().counts(replace(bare, progress=progress))["cvta"] == count


def test_at_most_half_of_the_keywords_are_positive() -> None:
    batch = tree_batch(trees=2)
    index = batch.keyword_index.clone()
    index[0, 5:] = -1
    plan = patch_model().plan(replace(batch, keyword_index=index))
    assert plan.limit.tolist() == [2, 3]
    capped = patch_model(keyword_cap=4).plan(batch)
    assert capped.limit.tolist() == [2, 2]
    assert capped.index.shape[1] == 4


def test_draws_do_not_depend_on_the_rest_of_the_batch() -> None:
    model, batch = patch_model(), tree_batch(trees=2)
    whole = model.plan(batch)
    mine = batch.pair_bag == 1
    part = replace(
        batch, trees=[1], features=batch.features[1:], node_mask=batch.node_mask[1:],
        keyword_index=batch.keyword_index[1:], own=batch.own[1:], edge_draw=batch.edge_draw[1:],
        pair_bag=batch.pair_bag[mine] - 1, pair_node=batch.pair_node[mine],
        captions=batch.captions[4:], caption_id=batch.caption_id[mine], draw=batch.draw[mine],
    )  # fmt: skip
    alone = model.plan(part)
    assert alone.masked == whole.masked[4:]
    assert alone.prefixes == whole.prefixes[4:]
    assert patch_model(losses=("itc", "plm")).plan(part).prefixes == alone.prefixes


def test_a_pair_of_a_patch_that_is_not_there_is_refused() -> None:
    batch = tree_batch()
    with pytest.raises(ValueError, match="patch of its tree"):
        patch_model().plan(replace(batch, node_mask=batch.node_mask & False))
    with pytest.raises(ValueError, match="patch of its tree"):
        patch_model(levels=(0, 1)).plan(replace(batch, pair_node=batch.pair_node * 0 + 7))
