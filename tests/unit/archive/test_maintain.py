import os
from datetime import UTC, datetime, timedelta

import lance
import pytest

from pathflip.archive import Archive, commit, compaction
from pathflip.archive.commit import Committer
from pathflip.archive.fragments import write_fragment
from pathflip.archive.maintain import maintain, plan_maintenance
from pathflip.archive.verify import verify
from tests.unit.archive import cohort
from tests.unit.archive.harm import assert_like_clean
from tests.unit.archive.test_commit import assert_whole

TEX = ("features_tex", "embeddings_tex")


def test_maintain_compacts_cleans_and_keeps_all_rows(uri, monkeypatch):
    old = uri / "regions.lance/data/orphan.lance"
    old.write_bytes(b"x" * 1000)
    os.utime(old, (0, 0))
    young = uri / "regions.lance/data/young.lance"
    young.write_bytes(b"y")
    kept = len(list(uri.glob("features_tex.lance/data/*")))
    before = sorted(uri.rglob("*"))
    planned = plan_maintenance(uri)
    assert sorted(uri.rglob("*")) == before
    assert planned["unused_bytes"] == {"regions": 1000}
    assert planned["versions"] == {}
    small = {table: len(Archive(uri).dataset(table).get_fragments()) for table in ("slides", *TEX)}
    assert planned["fragments"].items() >= small.items()
    done = maintain(uri)
    left = plan_maintenance(uri)
    assert not any(left[key] for key in ("fragments", "unused_bytes", "indexes"))
    assert done["bytes_removed"] == 1000
    assert young.exists()
    assert set(done["fragments"].values()) == {1}
    assert len(list(uri.glob("features_tex.lance/data/*"))) == kept + 1  # readers of 24 hours
    assert_like_clean(uri)
    monkeypatch.setattr(
        "pathflip.archive.compaction.KEEP_HOURS", timedelta(microseconds=1) / timedelta(hours=1)
    )
    maintain(uri)
    assert not young.exists()
    assert len(list(uri.glob("features_tex.lance/data/*"))) == 1
    assert_like_clean(uri)
    assert verify(uri).notes == []


def test_a_version_is_kept_for_who_read_it_before_it_was_replaced(tmp_path):
    """However old it is: the last commit may be of last week, its readers of this minute."""
    uri = tmp_path / "a"
    cohort.build(uri, 0, 1)
    reader = Archive(uri)
    before = datetime.now(UTC)  # as if a day ago
    with Committer(uri) as committer:
        committer.drop_slides(["slide000", "slide001"])  # files of which no later version has a row
        tables = ["meta", *committer.archive.tables()]
        compaction.free_versions(committer.lock, tables, before=before)
        assert reader.embeddings().num_rows == 2 * (cohort.REGIONS + 1)
        assert reader.features("slide000").num_rows == cohort.REGIONS
        assert compaction.free_versions(committer.lock, tables, before=datetime.now(UTC)) > 0
        assert {len(lance.dataset(f"{uri}/{table}.lance").versions()) for table in tables} == {1}
    with pytest.raises((OSError, ValueError)):
        reader.dataset("features_tex").to_table()


def test_files_about_to_be_committed_stay_however_long_their_writer_slept(tmp_path, monkeypatch):
    uri = tmp_path / "a"
    cohort.build(uri, 0)
    monkeypatch.setattr(commit, "FREE_EVERY_S", -1)
    monkeypatch.setattr(compaction, "KEEP_HOURS", 1e-9)
    with Committer(uri) as committer:
        written = write_fragment(uri, "features_tex", cohort.feature_rows(1))
        committer.tidy()
        done = committer.commit(
            slides=cohort.slide_rows(1), regions=cohort.region_rows(1),
            embeddings={"tex": cohort.embedding_rows(1)}, fragments={"tex": [written]},
        )  # fmt: skip
    assert done.written == ["slide001"]
    assert_whole(uri, range(2))
