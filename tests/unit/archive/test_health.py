import itertools
import os
import random
import shutil
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from pathflip.archive import Archive
from pathflip.archive.commit import Committer
from pathflip.archive.lock import ArchiveLock
from pathflip.archive.maintain import maintain
from pathflip.archive.repair import repair
from pathflip.archive.storage import known_digests
from pathflip.archive.verify import verify
from pathflip.errors import ArchiveError
from tests.unit.archive import cohort

SLIDES = range(4)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    uri = tmp_path_factory.mktemp("health") / "a"
    cohort.build(uri, *SLIDES)
    return uri


@pytest.fixture
def uri(pristine, tmp_path):
    return Path(shutil.copytree(pristine, tmp_path / "a"))


def flip(path: Path, byte: int, bit: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[byte] ^= 1 << bit
    path.write_bytes(raw)


def newest_manifest(uri: Path, table: str) -> Path:
    return min((uri / f"{table}.lance/_versions").glob("*.manifest"))


def ingest_again(uri: Path) -> None:
    """What the ingest command does: the encoder's tables, then every slide not done."""
    with Committer(uri) as committer:
        cohort.encoder(committer)
        for n in SLIDES:
            cohort.commit(committer, n)


def assert_like_clean(uri: Path) -> None:
    assert verify(uri).damaged == []
    archive = Archive(uri)
    for n in SLIDES:
        written = cohort.region_rows(n)
        assert archive.regions(f"slide{n:03d}").select(written.column_names).equals(written)
        features = archive.features(f"slide{n:03d}").combine_chunks()
        assert features.equals(cohort.feature_rows(n).combine_chunks())
    assert archive.stats()["slides"] == len(SLIDES)
    assert archive.embeddings().num_rows == len(SLIDES) * (cohort.REGIONS + 1)


def test_a_clean_archive_has_nothing_to_report(uri):
    report = verify(uri)
    assert report.ok
    assert (report.damaged, report.slides, report.notes) == ([], [], [])
    assert report.files >= 4 * 4
    assert report.rows >= len(SLIDES) * (2 * cohort.REGIONS + cohort.REGIONS + 2)
    assert report.to_json()["ok"] is True


def test_every_one_of_20_bit_flips_in_data_files_of_all_tables_is_reported(uri, monkeypatch):
    """D4, in whatever file and wherever in it, one at a time; what is left is another test's."""
    monkeypatch.setattr("pathflip.archive.verify.salvage", lambda *_: (None, []))
    chance = random.Random(11)
    files = sorted(uri.glob("*.lance/data/*.lance"))
    tables = sorted({path.parent.parent for path in files})
    assert len(tables) == 6
    for i in range(20):
        path = chance.choice([f for f in files if f.parent.parent == tables[i % 6]])
        byte, bit = chance.randrange(path.stat().st_size), chance.randrange(8)
        flip(path, byte, bit)
        found = verify(uri).damaged
        assert str(path.relative_to(uri)) in [d.id for d in found if d.kind == "file"], found
        flip(path, byte, bit)
    assert verify(uri).ok


def test_damaged_rows_are_named(uri):
    region = "slide002/3_2"
    features = Archive(uri).features("slide002")
    at = features["region_id"].to_pylist().index(region)
    needle = np.array(features["features"][at].as_py(), np.float16).tobytes()
    path = next(p for p in uri.glob("features_tex.lance/data/*") if needle in p.read_bytes())
    flip(path, path.read_bytes().index(needle) + 100, 3)
    report = verify(uri)
    assert {(d.kind, d.id) for d in report.damaged} == {
        ("file", str(path.relative_to(uri))),
        ("row", region),
    }
    assert report.slides == ["slide002"]


def test_flipped_values_are_found_without_any_digest(uri):
    """Row checksums alone: what a fragment rewritten from rotten bytes would show."""
    import lance
    import pyarrow as pa

    dataset = lance.dataset(str(uri / "regions.lance"))
    rows = dataset.to_table()
    x0 = rows["x0"].to_pylist()
    x0[7] ^= 4
    lance.write_dataset(
        rows.set_column(rows.schema.get_field_index("x0"), rows.schema.field("x0"), pa.array(x0)),
        str(uri / "regions.lance"),
        mode="overwrite",
    )
    named = [d for d in verify(uri).damaged if d.kind == "row"]
    assert [d.id for d in named] == [rows["region_id"][7].as_py()]


def test_repair_after_flips_loses_only_the_damaged_slides(uri):
    chance = random.Random(3)
    for table in ("features_tex", "slides", "files", "meta"):
        path = sorted(uri.glob(f"{table}.lance/data/*"))[1 if table == "features_tex" else 0]
        flip(path, chance.randrange(path.stat().st_size), chance.randrange(8))
    assert not verify(uri).ok
    done = repair(uri)
    assert done.report.damaged == []
    redo = Archive(uri).slides("quarantined", columns=["slide_id", "reason", "fingerprint"])
    assert set(redo["reason"].to_pylist()) <= {"damaged_rows"}
    assert set(redo["fingerprint"].to_pylist()) <= {""}
    assert len(done.redo) < len(SLIDES)
    ingest_again(uri)
    assert_like_clean(uri)
    assert repair(uri).actions == []


def test_a_flipped_digest_accuses_no_good_file_and_hides_no_bad_one(uri):
    """The digests themselves rot: both the rotten row and the rotten file are told."""
    with Committer(uri) as committer:
        committer.compact()
    (ledger,) = (
        p for p in uri.glob("files.lance/data/*") if b"features_tex" in p.read_bytes()
        and p.name in Archive(uri).dataset("files").get_fragments()[0].data_files()[0].path
    )  # fmt: skip
    digests, raw = known_digests(str(uri)), ledger.read_bytes()
    told = {
        p: digests[str(p.relative_to(uri))][0].encode() for p in uri.glob("features_tex*/data/*")
    }
    # The file that compaction made is told of in a later one.
    bad, sha256 = next((p, digest) for p, digest in sorted(told.items()) if digest in raw)
    flip(ledger, raw.index(sha256), 0)
    flip(bad, bad.stat().st_size // 2, 0)
    found = verify(uri).damaged
    assert [d.id for d in found if d.kind == "row" and d.table == "files"] == [
        str(bad.relative_to(uri))
    ]
    assert {d.id for d in found if d.kind == "file"} <= {
        str(bad.relative_to(uri)),
        str(ledger.relative_to(uri)),
    }
    assert repair(uri).report.damaged == []
    ingest_again(uri)
    assert_like_clean(uri)


def test_a_missing_data_file_is_reported_and_repaired(uri):
    path = sorted(uri.glob("regions.lance/data/*"))[2]
    path.unlink()
    report = verify(uri)
    assert ("file", "The file is missing.") in [(d.kind, d.detail) for d in report.damaged]
    assert len([d for d in report.damaged if d.kind == "missing"]) == cohort.REGIONS
    assert len(report.slides) == 1
    assert repair(uri).redo == report.slides
    ingest_again(uri)
    assert_like_clean(uri)


@pytest.mark.parametrize(
    ("harm", "table"),
    [  # for each table one harm that Lance opens without a word, removed or zeros, and one other
        *itertools.product(["emptied", "removed"], ["meta", "slides", "features_tex"]),
        *itertools.product(["halved", "zeros"], ["regions", "files", "embeddings_tex"]),
    ],
)
def test_dead_manifest(uri, table, harm):
    """D3: opening names the repair command; repair and the same ingest give a clean run's rows."""
    path = newest_manifest(uri, table)
    raw = path.read_bytes()
    if harm == "removed":
        path.unlink()
    else:
        path.write_bytes(
            {"emptied": b"", "halved": raw[: len(raw) // 2]}.get(harm, bytes(len(raw)))
        )
    for make in (Archive, lambda where: Committer(where).__enter__()):
        with pytest.raises(ArchiveError, match="damaged") as error:
            make(uri)
        assert error.value.code == "damaged"
        assert f"pathflip archive repair --archive {uri}" in error.value.hint
    assert table in [d.table for d in verify(uri).damaged if d.kind == "table"]
    done = repair(uri)
    assert done.report.damaged == []
    assert done.actions
    ingest_again(uri)
    assert_like_clean(uri)


@pytest.mark.parametrize("table", ["slides", "regions", "meta", "features_tex", "files"])
def test_a_table_with_no_manifest_left(uri, table):
    for path in (uri / f"{table}.lance/_versions").glob("*.manifest"):
        path.write_bytes(b"")
    repair(uri)
    ingest_again(uri)
    assert_like_clean(uri)


def test_rolled_back_tables_are_noticed_without_the_note(uri):
    """Even where nothing tells that a manifest is gone, the rows do."""
    newest_manifest(uri, "regions").unlink()
    (uri / "regions.lance/_versions/latest_version_hint.json").unlink()
    report = verify(uri)
    assert report.slides == ["slide003"]
    assert {d.kind for d in report.damaged} == {"missing"}
    repair(uri)
    ingest_again(uri)
    assert_like_clean(uri)


def test_repair_waits_for_nobody(uri):
    with ArchiveLock(uri), pytest.raises(ArchiveError) as error:
        repair(uri)
    assert error.value.code == "locked"
    for where, code in ((uri / "nothing", "missing_archive"), ("s3://bucket/a", "remote")):
        with pytest.raises(ArchiveError) as error:
            repair(where)
        assert error.value.code == code


def test_maintain_compacts_cleans_and_keeps_all_rows(uri, monkeypatch):
    old = uri / "regions.lance/data/orphan.lance"
    old.write_bytes(b"x" * 1000)
    os.utime(old, (0, 0))
    young = uri / "regions.lance/data/young.lance"
    young.write_bytes(b"y")
    kept = len(list(uri.glob("features_tex.lance/data/*")))
    done = maintain(uri)
    assert done["bytes_removed"] == 1000
    assert young.exists()
    assert set(done["fragments"].values()) == {1}
    assert len(list(uri.glob("features_tex.lance/data/*"))) == kept + 1  # readers of 24 hours
    assert_like_clean(uri)
    monkeypatch.setattr(
        "pathflip.archive.maintain.KEEP_HOURS", timedelta(microseconds=1) / timedelta(hours=1)
    )
    maintain(uri)
    assert not young.exists()
    assert len(list(uri.glob("features_tex.lance/data/*"))) == 1
    assert_like_clean(uri)
    assert verify(uri).notes == []
