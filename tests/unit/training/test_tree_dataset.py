"""Patch trees of a run: which take part, what is drawn of them, and that they have not changed."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from pathflip import Archive
from pathflip.archive.commit import Committer
from pathflip.archive.schema import row_checksum
from pathflip.archive.trees import TREE_TEXTS
from pathflip.errors import ArchiveError, CheckpointError, ConfigError
from pathflip.geometry import LEVEL_OF, TREE_NODES
from pathflip.models.tree_batch import TreeBatch
from pathflip.training.tree_corpus import TreeCorpus, make_tree_corpus
from pathflip.training.tree_dataset import (
    TreeDataset,
    TreeReader,
    TreeSampling,
    draw_nodes,
    quotas,
)
from tests.trees import DIM, make_tree_archive, plain_caption, text_row, write_texts

SAMPLING = TreeSampling(seed=3, batch_size=4, accumulate=1, pairs=8)
KEY: dict[str, Any] = {"seed": 0, "epoch": 0, "tree_id": "s/0_0", "levels": (0, 1, 2, 3)}


def half_captioned(tree: int, node: int, pattern: str, nuclei: str) -> str | None:
    """Say nothing of every second node, and nothing at all of tree 5."""
    return None if tree == 5 or node % 2 else plain_caption(tree, node, pattern, nuclei)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 trees of 12 slides; tree 2 has 21 nodes, half of the nodes captions, tree 5 none."""
    folder = tmp_path_factory.mktemp("trees")
    return make_tree_archive(
        folder / "a", caption=half_captioned, levels=lambda tree: 3 if tree == 2 else 4
    )


@pytest.fixture(scope="module")
def corpus(archive: Path) -> TreeCorpus:
    return make_tree_corpus(Archive(archive))


# -- corpus ---------------------------------------------------------------------------------------


def test_trees_with_a_caption_take_part_and_follow_their_slides(
    archive: Path, corpus: TreeCorpus
) -> None:
    assert corpus.tree_ids == sorted(corpus.tree_ids)
    assert len(corpus) == 23
    assert "slide002/1_0" not in corpus.tree_ids
    assert corpus.about["left_out"] == {"test": 0, "without_caption": 1}
    for slide, split in zip(corpus.slide_ids, corpus.splits, strict=True):
        assert split == ("val" if int(slide[5:]) % 4 == 3 else "train")
    assert corpus.levels[corpus.tree_ids.index("slide001/0_0")] == 3
    assert corpus.counts()["val_trees"] == 6
    masks = TreeReader(corpus).mask
    for tree, count in enumerate(corpus.captioned):
        assert count == masks[tree][::2].sum()


def test_splits_are_drawn_by_patient_where_there_are_none(tmp_path: Path) -> None:
    uri = make_tree_archive(tmp_path / "a", slides=16, per_patient=2, split=lambda n: None)
    made = make_tree_corpus(Archive(uri), val_fraction=0.4, seed=1)
    by_patient = set(zip(made.patients, made.splits, strict=True))
    assert len(by_patient) == 8
    assert {split for _, split in by_patient} == {"train", "val"}
    again = make_tree_corpus(Archive(uri), val_fraction=0.4, seed=1)
    assert again.splits == made.splits


def test_a_patient_in_two_splits_is_refused(tmp_path: Path) -> None:
    uri = make_tree_archive(
        tmp_path / "a", slides=4, per_patient=2, split=lambda n: "val" if n == 1 else "train"
    )
    with pytest.raises(ConfigError, match="Patient P0 has slides in"):
        make_tree_corpus(Archive(uri))


def test_what_there_is_nothing_to_train_on_is_said(tmp_path: Path) -> None:
    from tests.archives import make_archive

    with pytest.raises(ArchiveError, match="has no patch trees") as caught:
        make_tree_corpus(Archive(make_archive(tmp_path / "none", slides=2)))
    assert caught.value.code == "no_trees"
    uri = make_tree_archive(tmp_path / "a", slides=2, caption=lambda *_: None)
    with pytest.raises(ArchiveError, match="None of the 4 patch trees") as caught:
        make_tree_corpus(Archive(uri))
    assert caught.value.code == "no_captions"
    with pytest.raises(ArchiveError, match="none of them is 'uni'"):
        make_tree_corpus(Archive(uri), encoder="uni")


def test_among_several_sources_of_captions_one_is_named(tmp_path: Path) -> None:
    """Though no tree has two."""
    uri = make_tree_archive(tmp_path / "a", slides=4, caption=half_captioned)
    said = [f"another text {node}" for node in range(TREE_NODES)]
    with Committer(uri) as committer:
        write_texts(committer, [text_row("slide002", tx=1, captions=said, source="vlm")])
    with pytest.raises(ConfigError, match="have captions of oracle, vlm") as caught:
        make_tree_corpus(Archive(uri))
    assert caught.value.code == "source"
    assert set(make_tree_corpus(Archive(uri), source="oracle").sources) == {"oracle"}
    assert make_tree_corpus(Archive(uri), source="vlm").tree_ids == ["slide002/1_0"]


def test_levels_that_do_not_train_do_not_count(archive: Path) -> None:
    """Tree 2 has no 40x nodes."""
    made = make_tree_corpus(Archive(archive), levels=(3,))
    assert "slide001/0_0" not in made.tree_ids
    assert max(made.captioned) <= 32


def test_the_list_survives_its_file(corpus: TreeCorpus, tmp_path: Path) -> None:
    corpus.save(tmp_path / "data.parquet")
    assert TreeCorpus.load(tmp_path / "data.parquet") == corpus
    replace(corpus, splits=["train"] * len(corpus)).save(tmp_path / "other.parquet")
    (tmp_path / "other.parquet").write_bytes((tmp_path / "data.parquet").read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="list of trees of the run, is damaged"):
        TreeCorpus.load(tmp_path / "other.parquet")


# -- draws ----------------------------------------------------------------------------------------


def test_levels_have_their_shares() -> None:
    assert quotas(16, (0, 1, 2, 3)) == [1, 3, 5, 7]
    assert quotas(8, (0, 1, 2, 3)) == [1, 2, 2, 3]
    assert quotas(8, (2,)) == [8]
    for num in range(1, 30):
        assert sum(quotas(num, (0, 1, 2, 3))) == num


def test_pairs_are_of_all_levels_and_of_epoch_and_tree() -> None:
    captions = [f"caption {node}" for node in range(TREE_NODES)]
    drawn = draw_nodes(captions, num=8, **KEY)
    assert drawn == sorted(set(drawn))
    assert Counter(LEVEL_OF[drawn].tolist()) == {0: 1, 1: 2, 2: 2, 3: 3}
    assert drawn == draw_nodes(captions, num=8, **KEY)
    assert drawn != draw_nodes(captions, num=8, **{**KEY, "epoch": 1})
    assert drawn != draw_nodes(captions, num=8, **{**KEY, "tree_id": "s/0_1"})
    times = Counter(
        node
        for epoch in range(400)
        for node in draw_nodes(captions, num=8, **{**KEY, "epoch": epoch})
    )
    assert times[0] == 400
    for level, expected in ((1, 200), (2, 50), (3, 18.75)):
        counts = [times[node] for node in np.flatnonzero(level == LEVEL_OF).tolist()]
        assert np.abs(np.array(counts) - expected).max() < 5 * np.sqrt(expected)


def test_what_a_level_lacks_goes_to_the_others() -> None:
    """21 nodes, half of them captioned, fewer than asked for."""
    captions = [f"c{node}" if node < 21 and node % 2 == 0 else None for node in range(TREE_NODES)]
    drawn = draw_nodes(captions, num=8, **KEY)
    assert len(drawn) == 8
    assert Counter(LEVEL_OF[drawn].tolist())[0] == 1
    assert set(draw_nodes(captions, num=16, **KEY)) == set(range(0, 21, 2))
    assert draw_nodes([None] * TREE_NODES, num=8, **KEY) == []


def test_equal_captions_come_last() -> None:
    captions: list[str | None] = ["same"] * TREE_NODES
    captions[7] = captions[30] = captions[31] = None
    captions[40], captions[50], captions[4] = "a", "b", "c"
    drawn = draw_nodes(captions, num=4, **KEY)
    assert sorted(captions[node] or "" for node in drawn) == ["a", "b", "c", "same"]
    drawn = draw_nodes(captions, num=8, **KEY)
    assert {40, 50, 4} <= set(drawn)
    assert len(set(drawn)) == 8


# -- batches --------------------------------------------------------------------------------------


def pairs(batch: TreeBatch) -> list[tuple[Any, ...]]:
    """Return what a batch says of each pair, without its place."""
    rows = zip(
        batch.pair_bag.tolist(), batch.pair_node.tolist(), batch.captions,
        batch.caption_id.tolist(), batch.draw.tolist(), strict=True,
    )  # fmt: skip
    return [(batch.trees[bag], *rest) for bag, *rest in rows]


def owned(batch: TreeBatch) -> dict[tuple[int, int], set[str]]:
    """Return the keywords of each node."""
    found = {}
    for bag, node, k in batch.own.nonzero().tolist():
        word = batch.keywords[int(batch.keyword_index[bag, k])]
        found.setdefault((batch.trees[bag], node), set()).add(word)
    return found


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
def test_a_batch_is_what_the_archive_holds(
    archive: Path, corpus: TreeCorpus, cache_bytes: int
) -> None:
    made = TreeDataset(corpus, SAMPLING, cache_bytes=cache_bytes)
    batch = made.micro_batches(0)[0]
    opened = Archive(archive)
    texts = {r["tree_id"]: r for r in opened.dataset(TREE_TEXTS).to_table().to_pylist()}
    rows = {r["tree_id"]: r for r in opened.dataset("trees_tex").to_table().to_pylist()}
    assert batch.features.shape == (4, TREE_NODES, DIM)
    assert batch.features.dtype == torch.float16
    for row, tree in enumerate(batch.trees):
        name = corpus.tree_ids[tree]
        stored = np.array(rows[name]["features"], np.float16).reshape(TREE_NODES, DIM)
        assert np.array_equal(batch.features[row].numpy(), stored)
        assert not batch.features[row][~batch.node_mask[row]].any()
    for tree, node, caption, *_ in pairs(batch):
        assert texts[corpus.tree_ids[tree]]["captions"][node] == caption
        assert batch.node_mask[batch.trees.index(tree), node]
    for (tree, node), words in owned(batch).items():
        said = texts[corpus.tree_ids[tree]]["captions"][node]
        assert words == set(said.split()[:2])
    assert len(batch.keywords) == len(set(batch.keywords))
    assert Counter(batch.pair_bag.tolist()) == {0: 8, 1: 8, 2: 8, 3: 8}
    assert len({corpus.patients[tree] for tree in batch.trees}) == 4


@pytest.mark.parametrize("accumulate", [1, 2])
def test_any_number_of_workers_sees_the_same(corpus: TreeCorpus, accumulate: int) -> None:
    """Rank r has its slice, whoever the others are; with a restart anywhere as well."""
    sampling = replace(SAMPLING, accumulate=accumulate)
    made, fresh = TreeDataset(corpus, sampling), TreeDataset(corpus, sampling)
    for step in (5, 0, 1):
        whole = made.micro_batches(step)
        shares = [fresh.micro_batches(step, rank=rank, world=2) for rank in (0, 1)]
        assert len(whole) == accumulate
        for number, batch in enumerate(whole):
            halves = [share[number] for share in shares]
            assert [tree for half in halves for tree in half.trees] == batch.trees
            assert [pair for half in halves for pair in pairs(half)] == pairs(batch)
            assert owned(halves[0]) | owned(halves[1]) == owned(batch)
            assert torch.equal(torch.cat([half.features for half in halves]), batch.features)
            assert torch.equal(torch.cat([half.edge_draw for half in halves]), batch.edge_draw)
            assert halves[0].progress == batch.progress == step / made.steps_per_epoch


def test_draws_are_of_epoch_tree_and_node(corpus: TreeCorpus) -> None:
    made = TreeDataset(corpus, SAMPLING)
    one, two = (made.batch(np.array(trees), epoch=1) for trees in ([3, 8], [8, 0]))
    other = made.batch(np.array([3, 8]), epoch=2)
    assert [pair for pair in pairs(one) if pair[0] == 8] == [p for p in pairs(two) if p[0] == 8]
    assert {pair[-1] for pair in pairs(one)}.isdisjoint({pair[-1] for pair in pairs(other)})
    assert len(set(one.draw.tolist())) == len(one.draw)
    assert one.edge_draw[1] == two.edge_draw[0] != other.edge_draw[1]


def test_caption_ids_are_equal_where_captions_are(tmp_path: Path) -> None:
    uri = make_tree_archive(
        tmp_path / "a", slides=4, split=lambda n: "train",
        caption=lambda tree, node, *_: f"growth {node % 5}",
    )  # fmt: skip
    made = TreeDataset(make_tree_corpus(Archive(uri), val_fraction=0.0), SAMPLING)
    batch = made.micro_batches(0)[0]
    same = [[a == b for b in batch.captions] for a in batch.captions]
    found = batch.caption_id[:, None] == batch.caption_id
    assert torch.equal(found, torch.tensor(same))
    assert (batch.caption_id >= 0).all()


def test_levels_that_are_not_read_are_not_shown(corpus: TreeCorpus) -> None:
    """Nor are their words: a model of one level must not read what another level shows."""
    sampling = replace(SAMPLING, levels=(2,))
    batch = TreeDataset(corpus, sampling).micro_batches(0)[0]
    assert not batch.node_mask[:, LEVEL_OF != 2].any()
    assert not batch.features[:, LEVEL_OF != 2].any()
    assert (LEVEL_OF[batch.pair_node] == 2).all()
    assert set(batch.keywords) <= {"grooved", "stippled", "granular", "nuclei"}
    assert not batch.own[:, LEVEL_OF != 2].any()


def test_a_tree_without_keywords_has_none(tmp_path: Path) -> None:
    uri = make_tree_archive(tmp_path / "a", slides=4, keywords=False, split=lambda n: "train")
    made = TreeDataset(make_tree_corpus(Archive(uri), val_fraction=0.0), SAMPLING)
    batch = made.micro_batches(0)[0]
    assert batch.keywords == []
    assert batch.keyword_index.shape == (4, 0)
    assert batch.own.shape == (4, TREE_NODES, 0)


def test_the_best_keywords_are_kept(corpus: TreeCorpus) -> None:
    whole = TreeDataset(corpus, SAMPLING).batch(np.array([0]), epoch=0)
    cut = TreeDataset(corpus, replace(SAMPLING, keyword_cap=2)).batch(np.array([0]), epoch=0)
    assert cut.keywords == whole.keywords[:2]
    assert torch.equal(cut.own, whole.own[..., :2])


def test_validation_is_the_same_each_time_and_of_validation_trees(corpus: TreeCorpus) -> None:
    made = TreeDataset(corpus, SAMPLING)
    trees = np.concatenate(made.validation_batches())
    assert sorted(trees.tolist()) == corpus.members("val").tolist()
    first, again = (made.batch(trees, epoch=-1, pairs=8) for _ in range(2))
    assert pairs(first) == pairs(again)
    assert {corpus.splits[tree] for tree in made.start_trees().tolist()} == {"train"}


def test_too_few_trees_are_refused(tmp_path: Path) -> None:
    uri = make_tree_archive(tmp_path / "a", slides=1, per_slide=3, split=lambda n: "train")
    made = make_tree_corpus(Archive(uri), val_fraction=0.0)
    with pytest.raises(ConfigError, match="4 trees of different patients") as caught:
        _ = TreeDataset(made, SAMPLING).steps_per_epoch
    assert caught.value.code == "too_few_trees"
    # Three trees of a patient may be asked for.
    spread = replace(SAMPLING, batch_size=3, trees_per_patient=3)
    assert sorted(TreeDataset(made, spread).step_trees(0).ravel().tolist()) == [0, 1, 2]


# -- changes --------------------------------------------------------------------------------------


def test_a_text_that_changed_ends_the_run(tmp_path: Path) -> None:
    uri = make_tree_archive(tmp_path / "a", slides=4)
    made = make_tree_corpus(Archive(uri))
    TreeReader(made)
    with Committer(uri) as committer:  # a further source changes nothing
        said = [f"another text {node}" for node in range(TREE_NODES)]
        write_texts(committer, [text_row("slide001", tx=1, captions=said, source="zzz")])
    TreeReader(made)
    with Committer(uri) as committer:
        write_texts(committer, [text_row("slide001", tx=1, captions=said)])
    with pytest.raises(CheckpointError, match=r"Tree slide001/1_0 is no longer") as caught:
        TreeReader(made)
    assert caught.value.code == "archive_changed"
    with Committer(uri) as committer:
        committer.drop_slides(["slide000"])
    with pytest.raises(CheckpointError, match=r"Tree slide000/0_0 is no longer"):
        TreeReader(made)


def test_rows_that_are_not_what_was_written_are_refused(
    corpus: TreeCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = TreeReader(corpus)
    table = reader._rows["texts"]
    real = table._archive.dataset(TREE_TEXTS)

    class Rotten:
        def take(self, rows: Any) -> Any:
            taken = real.take(rows)
            other = pa.array(["changed"] * len(taken))
            made = taken.set_column(taken.schema.get_field_index("model"), "model", other)
            assert made["checksum"] != row_checksum(made)
            return made

    monkeypatch.setitem(table._archive._datasets, TREE_TEXTS, Rotten())
    with pytest.raises(ArchiveError, match="not what was written"):
        reader.texts(np.array([0]))
