"""An archive that grows writes in proportion to what it holds; what changes alone lies apart."""

from __future__ import annotations

from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from pathflip.archive import Archive, compaction, fragments, maintain, schema, slide_index
from pathflip.archive.commit import Committer
from pathflip.archive.create import create_archive
from pathflip.archive.search import search
from pathflip.archive.verify import verify
from pathflip.errors import ArchiveError
from tests.unit.archive import cohort
from tests.unit.archive.test_commit import assert_whole

PICTURES = {"tissue_png": b"mask", "thumbnail": b"jpeg"}


def with_pictures(rows: pa.Table) -> pa.Table:
    for name, data in PICTURES.items():
        at = rows.schema.get_field_index(name)
        rows = rows.set_column(at, rows.schema.field(name), pa.array([data], pa.binary()))
    return rows


def data_bytes(uri: Path) -> int:
    return sum(path.stat().st_size for path in uri.glob("*.lance/data/*"))


def live_bytes(uri: Path) -> int:
    tables = [lance.dataset(str(path)) for path in uri.glob("*.lance")]
    files = (f for table in tables for item in table.get_fragments() for f in item.data_files())
    return sum(file.file_size_bytes for file in files)


def test_the_small_fragments_of_a_commit_become_one_before_anybody_sees_them(
    tmp_path: Path,
) -> None:
    create_archive(tmp_path / "a", tiling=cohort.TILING)
    with Committer(tmp_path / "a") as committer:
        cohort.encoder(committer)
        cohort.commit(committer, *range(5))  # the features of each slide in a file of its own
    assert len(list((tmp_path / "a/features_tex.lance/data").iterdir())) == 1
    assert len(Archive(tmp_path / "a").dataset("features_tex").get_fragments()) == 1
    assert_whole(tmp_path / "a", range(5))
    assert verify(tmp_path / "a").notes == []


def test_rows_that_rot_before_they_are_merged_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checksum of a row is that of its worker, whatever is read of it later."""
    merged = fragments.merge_small
    create_archive(tmp_path / "a", tiling=cohort.TILING)

    def rotten(uri: str, shards: list[fragments.Shard], **how: int) -> object:
        path = next(p for shard in shards if shard.table == "features_tex" for p in shard.files)
        raw = bytearray(Path(uri, path).read_bytes())
        value = cohort.feature_rows(0)["features"][2].values.to_numpy().tobytes()[:8]
        raw[raw.index(value)] ^= 1
        Path(uri, path).write_bytes(raw)
        return merged(uri, shards, **how)

    with Committer(tmp_path / "a") as committer:
        cohort.encoder(committer)
        with monkeypatch.context() as patch:
            patch.setattr("pathflip.archive.commit.merge_small", rotten)
            cohort.commit(committer, 0, 1)
    assert [(d.kind, d.id) for d in verify(tmp_path / "a").damaged] == [
        ("row", "slide000/2_0"),
    ]


@pytest.mark.parametrize("commits", [40, 90])
def test_merging_leaves_little_behind_and_few_fragments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commits: int
) -> None:
    for name, value in (("_MANY", 8), ("_TOO_MANY", 10**6), ("_LITTLE", 0)):
        monkeypatch.setattr(compaction, name, value)
    monkeypatch.setattr(compaction, "FRAGMENT_BYTES", 40_000)
    uri = tmp_path / "a"
    create_archive(uri, tiling=cohort.TILING)
    with Committer(uri) as committer:
        cohort.encoder(committer)
        for n in range(commits):
            cohort.commit(committer, n)
            if n % 4 == 3:
                committer.tidy()
                assert data_bytes(uri) <= 1.25 * live_bytes(uri)
    archive = Archive(uri)
    tables = [archive.dataset(name).get_fragments() for name in archive.tables()]
    assert min(map(len, tables)) < commits // 2
    assert_whole(uri, range(commits))
    assert verify(uri).notes == []


def test_a_merge_at_least_doubles_each_of_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a row is written again as often as its fragment doubles, however often it is tidied."""
    monkeypatch.setattr(compaction, "_MANY", 2)
    monkeypatch.setattr(compaction, "_TOO_MANY", 2)
    uri, written = tmp_path / "a", 0
    cohort.build(uri)
    with Committer(uri) as committer:
        cohort.encoder(committer)
        for n in range(32):
            cohort.commit(committer, n)
            before = {f.fragment_id for f in Archive(uri).dataset("regions").get_fragments()}
            committer.tidy()
            now = Archive(uri).dataset("regions").get_fragments()
            written += sum(f.physical_rows for f in now if f.fragment_id not in before)
            assert len(now) <= 17  # one of half of the rows, and the others
    assert written <= 32 * cohort.REGIONS * 5  # log2(32)
    assert_whole(uri, range(32))


def test_a_patient_changes_in_one_table_alone(tmp_path: Path) -> None:
    uri = tmp_path / "a"
    cohort.build(uri, 0, 1, 2)
    before = {t: Archive(uri).dataset(t).version for t in Archive(uri).tables()}
    with Committer(uri) as committer:
        committer.update_slides(
            {"slide001": {"patient_id": "PX"}, "slide002": {"patient_id": None}}
        )
    archive = Archive(uri)
    changed = {t for t in archive.tables() if archive.dataset(t).version != before[t]}
    assert changed == {"slides", "files"}
    of = {row["slide_id"]: row["patient_id"] for row in archive.embeddings().to_pylist()}
    assert of == {"slide000": "P0", "slide001": "PX", "slide002": None}
    vector = archive.slide_embeddings("slide001")["vector"][0].as_py()
    found = search(archive, vector, level="slide", exclude_patient="PX")
    assert sorted(found["slide_id"].to_pylist()) == ["slide000", "slide002"]
    assert verify(uri).ok


def test_pictures_lie_apart_and_come_with_their_slide(tmp_path: Path) -> None:
    uri = tmp_path / "a"
    cohort.build(uri, 0)
    with Committer(uri) as committer:
        empty = with_pictures(cohort.slide_rows(1, status="empty"))
        committer.commit(slides=pa.concat_tables([empty, cohort.slide_rows(2, status="empty")]))
    with Committer(uri) as committer:  # pictures of slides without regions are kept as well
        assert committer.recovered == {}
        committer.update_slides({"slide001": {"labels": '{"a": "b"}'}})
    archive = Archive(uri)
    assert not set(PICTURES) & set(archive.dataset("slides").schema.names)
    assert {name: archive.slide("slide001")[name] for name in PICTURES} == PICTURES
    columns = ["thumbnail", "slide_id", "tissue_png"]
    rows = archive.slides(columns=columns, slide_ids=["slide000", "slide001"])
    assert rows.column_names == columns
    assert rows.to_pylist() == [
        {"slide_id": "slide000", "tissue_png": bytes(range(256)), "thumbnail": None},
        {"slide_id": "slide001", **PICTURES},
    ]
    assert set(archive.slide("slide000")) == set(schema.slides_schema().names)
    assert verify(uri).notes == []
    assert verify(uri).ok


def test_a_ready_slide_without_its_row_of_pictures_is_damaged(tmp_path: Path) -> None:
    cohort.build(tmp_path / "a", 0, 1)
    lance.dataset(str(tmp_path / "a/pictures.lance")).delete("slide_id = 'slide001'")
    report = verify(tmp_path / "a")
    assert [(d.table, d.kind, d.id) for d in report.damaged] == [
        ("pictures", "missing", "slide001")
    ]
    assert report.slides == ["slide001"]


def test_a_slide_is_found_by_an_index_that_follows_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slide_index, "SLIDE_INDEX_ROWS", 20)
    uri = tmp_path / "a"
    cohort.build(uri, *range(8))

    def unindexed(table: str) -> int | None:
        dataset = Archive(uri).dataset(table)
        if not dataset.describe_indices():
            return None
        found: int = dataset.stats.index_stats("slide_id_idx")["num_unindexed_rows"]
        return found

    assert unindexed("regions") is None
    for numbers, left in (((), 0), ((8,), 0), ((9, 10), 0)):
        with Committer(uri) as committer:
            for n in numbers:
                cohort.commit(committer, n)
            committer.index_slides()
        assert unindexed("regions") == left
        assert unindexed("features_tex") == left
    assert unindexed("slides") is None  # too small
    plan = Archive(uri).dataset("regions").scanner(
        columns=["region_id"], filter=pc.field("slide_id") == "slide009"
    ).explain_plan()  # fmt: skip
    assert "slide_id_idx" in plan
    assert_whole(uri, range(11))


def test_a_full_disk_is_freed_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = tmp_path / "a"
    cohort.build(uri, *range(3))
    maintain.maintain(uri)
    before = data_bytes(uri)

    def full(committer: Committer) -> None:
        raise ArchiveError("full", code="disk_full")

    monkeypatch.setattr(compaction, "KEEP_HOURS", 1e-9)
    monkeypatch.setattr(Committer, "recover", full)
    with pytest.raises(ArchiveError) as error:
        maintain.maintain(uri)
    assert error.value.code == "disk_full"
    assert data_bytes(uri) < before
    assert_whole(uri, range(3))


def test_keys_of_one_hash_accuse_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cohort.build(tmp_path / "a", 0, 1)
    monkeypatch.setattr(
        "pathflip.archive.keys.hash_keys", lambda keys: np.zeros(len(list(keys)), np.uint64)
    )
    assert verify(tmp_path / "a").damaged == []


def test_an_archive_of_layout_3_takes_slides_and_patients_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures stay in ``slides`` and the patient in embeddings, which older versions read."""
    uri = tmp_path / "a"

    def before(dim: int, metadata: dict[str, str] | None = None) -> pa.Schema:
        fields = schema.embeddings_schema(dim, metadata)
        return fields.insert(3, pa.field("patient_id", pa.string()))

    with monkeypatch.context() as patch:
        patch.setattr("pathflip.archive.create.PICTURES", "unused")
        patch.setattr("pathflip.archive.create.NEW_LAYOUT", 3)
        patch.setattr("pathflip.archive.tables.embeddings_schema", before)
        create_archive(uri, tiling=cohort.TILING)
        with Committer(uri) as committer:
            cohort.encoder(committer)
    with Committer(uri) as committer:
        cohort.commit(committer, 0, 1, 2)
        committer.update_slides({"slide002": {"patient_id": "PX"}})
    archive = Archive(uri)
    assert "pictures" not in archive.tables()
    assert archive.settings()["schema_version"] == 3
    stored = archive.dataset("embeddings_tex").to_table(columns=["slide_id", "patient_id"])
    of = {row["slide_id"]: row["patient_id"] for row in stored.to_pylist()}
    assert of == {"slide000": "P0", "slide001": "P0", "slide002": "PX"}
    assert archive.slide("slide001")["tissue_png"] == bytes(range(256))
    rows = archive.slides(columns=["slide_id", "tissue_png"], slide_ids=["slide002"])
    assert rows.to_pylist() == [{"slide_id": "slide002", "tissue_png": bytes(range(256))}]
    vector = archive.slide_embeddings("slide001")["vector"][0].as_py()
    found = search(archive, vector, level="slide", exclude_patient="P0")
    assert found["slide_id"].to_pylist() == ["slide002"]
    assert verify(uri).ok
