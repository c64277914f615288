import random

import pytest

from pathflip.archive import Archive
from pathflip.archive.commit import Committer
from pathflip.archive.lock import ArchiveLock
from pathflip.archive.recover import Salvager, salvage
from pathflip.archive.repair import repair
from pathflip.archive.storage import known_digests
from pathflip.archive.verify import verify
from pathflip.errors import ArchiveError
from tests.unit.archive import cohort
from tests.unit.archive.harm import SLIDES, assert_like_clean, flip, ingest_again, newest_manifest


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


def test_a_fragment_that_ends_its_reader_is_given_up_alone(uri):
    (first, *_, last) = Archive(uri).dataset("regions").get_fragments()
    with Salvager() as salvager:
        for fragment, rows in ((first.fragment_id, cohort.REGIONS), (1000, None)) * 2:
            good, bad = salvage(salvager, str(uri), "regions", fragment)
            assert (None if good is None else good.num_rows) == rows
            assert bad == []
        path = uri / "regions.lance/data" / last.data_files()[0].path
        path.write_bytes(bytes(path.stat().st_size))
        none, _ = salvage(salvager, str(uri), "regions", last.fragment_id)
        assert none is None or none.num_rows == 0


@pytest.mark.parametrize(
    "table", ["meta", "slides", "regions", "files", "features_tex", "embeddings_tex"]
)
@pytest.mark.parametrize("harm", ["emptied", "halved", "removed", "zeros"])
def test_dead_manifest(uri, table, harm):
    """Opening names the repair command; repair and the same ingest give a clean run's rows."""
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
