"""Patch trees of an archive, made up: written once, read by place, checked, mended, dropped."""

import dataclasses
import json
import shutil

import lance
import numpy as np
import pyarrow as pa
import pytest

from pathflip.archive import Archive, transactions
from pathflip.archive.commit import Committer
from pathflip.archive.export import export_parquet
from pathflip.archive.lock import ArchiveLock
from pathflip.archive.maintain import maintain
from pathflip.archive.repair import repair
from pathflip.archive.schema import intact_rows, tree_text_id
from pathflip.archive.settings import meta_rows
from pathflip.archive.trees import (
    Tree,
    append_trees,
    delete_strays,
    ensure_tree_encoder,
    ensure_tree_texts,
    ensure_trees,
    read_trees,
    take_features,
    tree_encoder,
    tree_feature_rows,
    tree_rows,
    tree_settings,
    tree_spec,
    write_trees,
)
from pathflip.archive.verify import verify
from pathflip.errors import ArchiveError
from pathflip.geometry import TreeSpec
from tests.unit.archive import cohort

SPEC = TreeSpec(parent_um=256, node_px=128)
HOW = {"seed": 0, "per_slide": 3, "min_tissue": 0.5}
DIMS = {"tex": 6, "other": 4}


def made_up(n: int, place: int, *encoders: str) -> Tree:
    """The tree at a place of slide n, the same on every call."""
    rng = np.random.default_rng((n, place))
    mask = rng.random(85) < 0.8
    mask[0] = True
    return Tree(
        slide_id=f"slide{n:03d}", tx=place, ty=n, mpp=0.25, levels=4, node_mask=mask,
        node_tissue=rng.random(85, np.float32), node_blur=rng.random(85, np.float32),
        features={name: np.random.default_rng((n, place, DIMS[name])).standard_normal(
            (85, DIMS[name])) for name in encoders},
    )  # fmt: skip


def text_row(tree: Tree) -> dict:
    captions = [None] * 85
    captions[3] = "Glands."
    return {
        "text_id": tree_text_id(tree.tree_id, "vlm"), "slide_id": tree.slide_id,
        "tree_id": tree.tree_id, "source": "vlm", "model": "m", "captions": captions,
        "keywords": ["gland"], "keyword_of": b"\0" * 173, "extractor": "rake-1",
    }  # fmt: skip


def encoder(committer: Committer, name: str, **how) -> str:
    given = {"dim": DIMS[name], "revision": "1", "mpp": None, "licence": "MIT"} | how
    return ensure_tree_encoder(committer, name, **given)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    uri = tmp_path_factory.mktemp("trees") / "a"
    cohort.build(uri, 0, 1)
    with Committer(uri) as committer:
        committer.upsert("meta", meta_rows({"schema_version": 1}))
    with Committer(uri) as committer:
        ensure_trees(committer, SPEC, **HOW)
        assert encoder(committer, "tex") == "trees_tex"
        ensure_tree_texts(committer)
        trees = [made_up(n, place, "tex") for n in (0, 1) for place in range(3)]
        write_trees(committer, trees[:3])
        write_trees(committer, trees)
        rows = pa.Table.from_pylist([text_row(tree) for tree in trees])
        committer.upsert("tree_texts", rows)
    return uri


@pytest.fixture
def uri(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "a")


def ids(archive: Archive, encoder: str | None = None) -> list[str]:
    return read_trees(archive, columns=["tree_id"], encoder=encoder)["tree_id"].to_pylist()


def assert_truth(archive: Archive, name: str) -> None:
    """Every tree's features are those it was made with, zero where masked."""
    rows = read_trees(archive, encoder=name)
    order = np.random.default_rng(0).permutation(rows.num_rows)
    features = take_features(archive, rows["row"].to_numpy()[order], encoder=name)
    assert features.shape == (rows.num_rows, 85, DIMS[name])
    for at, row in enumerate(order):
        told = rows.slice(row, 1).to_pylist()[0]
        tree = made_up(told["ty"], told["tx"], name)
        expected = np.where(tree.node_mask[:, None], tree.features[name], 0).astype(np.float16)
        np.testing.assert_array_equal(features[at], expected)
        assert told["node_mask"] == tree.node_mask.tolist()
        assert (told["x0"], told["y0"], told["size0"]) == (1024 * tree.tx, 1024 * tree.ty, 1024)


def test_they_are_written_once_and_read_by_place(uri):
    archive = Archive(uri)
    assert tree_spec(archive) == SPEC
    assert ids(archive) == [f"slide00{n}/{place}_{n}" for n in (0, 1) for place in range(3)]
    assert_truth(archive, "tex")
    assert archive.settings()["schema_version"] == 3  # was 1 before the first trees
    assert archive.stats()["slides"] == 2
    report = verify(uri)
    assert (report.damaged, report.notes) == ([], [])


def test_an_archive_without_trees_says_what_to_do(tmp_path):
    cohort.build(tmp_path / "a", 0)
    archive = Archive(tmp_path / "a")
    assert (tree_settings(archive), read_trees(archive).num_rows) == (None, 0)
    with pytest.raises(ArchiveError, match="no patch trees") as error:
        tree_spec(archive)
    assert error.value.code == "no_trees"
    with pytest.raises(ArchiveError) as error:
        tree_encoder(archive)
    assert error.value.code == "unknown_encoder"


def test_a_further_encoder_joins_and_waits_for_its_slides(uri):
    with Committer(uri) as committer:
        encoder(committer, "other")
        write_trees(committer, [made_up(0, place, "other") for place in range(3)])
        archive = committer.archive
        assert ids(archive, "other") == [f"slide000/{place}_0" for place in range(3)]
        assert len(ids(archive)) == 6
        assert_truth(archive, "other")
    report = verify(uri)
    assert report.damaged == []
    assert report.notes == [
        "1 slides have no rows in table trees_other yet; make them: pathflip trees."
    ]


@pytest.mark.parametrize("changed", [{"seed": 1}, {"min_tissue": 0.4}])
def test_trees_are_chosen_in_one_way(uri, changed):
    with Committer(uri) as committer:
        with pytest.raises(ArchiveError, match="patch trees") as error:
            ensure_trees(committer, SPEC, **(HOW | changed))
        assert error.value.code == "settings"
        with pytest.raises(ArchiveError, match="parent_um 256"):
            ensure_trees(committer, TreeSpec(), **HOW)
        with pytest.raises(ArchiveError, match="revision 1, not 2"):
            encoder(committer, "tex", revision="2")
        with pytest.raises(ValueError, match="no table of encoder other"):
            write_trees(committer, [made_up(0, 5, "other")])
        for count in (5, 4):
            ensure_trees(committer, SPEC, **(HOW | {"per_slide": count}))
        assert tree_settings(committer.archive)["per_slide"] == 5


def test_features_whose_tree_was_never_written_go(uri):
    """A writer was killed between the two tables."""
    with Committer(uri) as committer:
        late = [made_up(0, 7, "tex"), made_up(1, 7, "tex")]
        none = tree_rows(late, SPEC).slice(0, 0)
        append_trees(committer, none, {"trees_tex": tree_feature_rows(late, "tex")})
        assert len(ids(committer.archive, "tex")) == 6
        assert delete_strays(committer) == 2
        write_trees(committer, late)
        assert len(ids(committer.archive, "tex")) == 8
        assert_truth(committer.archive, "tex")
    assert verify(uri).damaged == []


@pytest.fixture
def faulty(uri):
    """The archive with one more tree of each slide, quarantined."""
    with Committer(uri) as committer:
        write_trees(committer, [with_fault(0, 7), with_fault(1, 7)])
    return uri


def with_fault(n: int, place: int) -> Tree:
    return dataclasses.replace(
        made_up(n, place), fault="too_many_bad_tiles", node_mask=np.zeros(85, np.bool_)
    )


def faults(archive: Archive) -> dict[str, str]:
    rows = read_trees(archive, quarantined=True).to_pylist()
    assert not any(any(row["node_mask"]) for row in rows)
    return {row["tree_id"]: row["fault"] for row in rows}


QUARANTINED = dict.fromkeys(["slide000/7_0", "slide001/7_1"], "too_many_bad_tiles")


def test_a_quarantined_tree_is_there_and_is_none_to_use(faulty, tmp_path):
    """Readers see good trees, checks find nothing wrong, and no table lacks its rows."""
    archive = Archive(faulty)
    assert len(ids(archive)) == len(ids(archive, "tex")) == 6
    assert faults(archive) == QUARANTINED
    with Committer(faulty) as committer:
        encoder(committer, "other")
        write_trees(committer, [made_up(n, place, "other") for n in (0, 1) for place in range(3)])
        write_trees(committer, [with_fault(0, 7)])
        assert delete_strays(committer) == 0
    for step in (lambda: None, lambda: maintain(faulty), lambda: repair(faulty)):
        step()
        report = verify(faulty)
        assert (report.damaged, report.notes) == ([], [])
        assert faults(Archive(faulty)) == QUARANTINED
    done = export_parquet(Archive(faulty), tmp_path / "out")
    assert (done["trees"], done["trees_tex"], done["trees_other"]) == (8, 6, 6)


def test_a_slide_of_quarantined_trees_alone_waits_for_no_features(uri):
    with Committer(uri) as committer:
        committer.drop_rows("trees", ["slide001"])
        write_trees(committer, [with_fault(1, place) for place in range(3)])
    report = verify(uri)
    assert (report.damaged, report.notes) == ([], [])


def test_a_quarantined_tree_becomes_a_good_one(faulty):
    """First its features alone, as when the writer was killed: they go, and come again."""
    good = made_up(0, 7, "tex")
    with Committer(faulty) as committer:
        none = tree_rows([good], SPEC).slice(0, 0)
        append_trees(committer, none, {"trees_tex": tree_feature_rows([good], "tex")})
    assert verify(faulty).damaged == []
    assert faults(Archive(faulty)) == QUARANTINED
    assert len(ids(Archive(faulty), "tex")) == 6
    with Committer(faulty) as committer:
        assert delete_strays(committer) == 1
        write_trees(committer, [good, made_up(0, 0, "tex")])
        assert set(faults(committer.archive)) == {"slide001/7_1"}
        assert len(ids(committer.archive, "tex")) == 7
        assert_truth(committer.archive, "tex")
        write_trees(committer, [with_fault(0, 7)])  # a good tree stays one
        assert len(ids(committer.archive)) == 7
    report = verify(faulty)
    assert (report.damaged, report.notes) == ([], [])


def test_quarantine_goes_with_its_slide(faulty):
    with Committer(faulty) as committer:
        cohort.commit(committer, 1, fingerprint="other")
        assert set(faults(committer.archive)) == {"slide000/7_0"}
        assert committer.archive.dataset("trees").count_rows() == 4


def test_a_slide_ingested_anew_loses_its_trees_and_keeps_its_texts(uri):
    with Committer(uri) as committer:
        cohort.commit(committer, 1, fingerprint="other")
        assert ids(committer.archive) == [f"slide000/{place}_0" for place in range(3)]
        assert committer.archive.dataset("trees_tex").count_rows() == 3
        assert committer.archive.dataset("tree_texts").count_rows() == 6
        committer.update_slides({"slide000": {"mpp": 0.5}})
        cohort.commit(committer, 0, fingerprint="other")  # at 0.25: its trees are other tissue
        assert committer.archive.dataset("tree_texts").count_rows() == 3
        committer.drop_slides(["slide001"])
        assert committer.archive.dataset("tree_texts").count_rows() == 0
    assert verify(uri).damaged == []


def test_another_patch_encoder_of_the_slide_does_not_touch_its_trees(uri):
    with Committer(uri) as committer:
        cohort.encoder(committer, "more", dim=5)
        cohort.commit(committer, 0, dims={"more": 5})
        assert len(ids(committer.archive, "tex")) == 6


@pytest.mark.parametrize("table", ["trees", "trees_tex", "tree_texts"])
def test_damage_is_found_and_mended(uri, table):
    path = max((uri / f"{table}.lance/data").iterdir(), key=lambda item: item.stat().st_size)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 3] ^= 4
    path.write_bytes(raw)
    assert str(path.relative_to(uri)) in [item.id for item in verify(uri).damaged]
    assert repair(uri).report.damaged == []
    with Committer(uri) as committer:
        delete_strays(committer)
        write_trees(committer, [made_up(n, place, "tex") for n in (0, 1) for place in range(3)])
        assert_truth(committer.archive, "tex")
        assert len(ids(committer.archive, "tex")) == 6
    assert verify(uri).damaged == []


def test_settings_that_are_lost_come_back(uri):
    told = "key LIKE 'tree%'"
    meta = lance.dataset(str(uri / "meta.lance"))
    before = {
        row["key"]: json.loads(row["value"]) for row in meta.to_table(filter=told).to_pylist()
    }
    assert set(before) == {"trees", "tree_encoder:tex", "tree_texts"}
    meta.delete(told)
    repair(uri)
    assert tree_settings(Archive(uri)) == before["trees"]
    assert tree_encoder(Archive(uri)) == ("tex", before["tree_encoder:tex"])


def test_maintain_and_export(uri, tmp_path):
    assert maintain(uri)["fragments"]["trees_tex"] == 1
    assert_truth(Archive(uri), "tex")
    done = export_parquet(Archive(uri), tmp_path / "out")
    assert (done["trees"], done["trees_tex"], done["tree_texts"]) == (6, 6, 6)


def test_a_row_that_was_changed_is_refused(uri):
    data = lance.dataset(str(uri / "trees_tex.lance"))
    rows = data.to_table(filter="tree_id = 'slide000/1_0'")
    wrong = rows.set_column(3, "checksum", pa.array(["0" * 64]))
    assert intact_rows(rows).all()
    transactions.delete_rows(ArchiveLock(uri), "trees_tex", "tree_id", ["slide000/1_0"])
    lance.write_dataset(wrong, str(uri / "trees_tex.lance"), mode="append")
    archive = Archive(uri)
    with pytest.raises(ArchiveError, match="not what was written"):
        take_features(archive, read_trees(archive, encoder="tex")["row"].to_numpy())
