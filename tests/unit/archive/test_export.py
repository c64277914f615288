import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from pathflip.archive import Archive, export, transactions
from pathflip.archive.commit import Committer
from pathflip.archive.fragments import Shard, write_fragment
from pathflip.errors import ArchiveError, ConfigError
from tests.unit.archive import cohort


@pytest.fixture
def archive(tmp_path):
    uri = tmp_path / "a"
    cohort.build(uri, 0, 1)
    with Committer(uri) as committer:
        committer.commit(slides=cohort.slide_rows(2, status="quarantined"))
        shard = write_fragment(uri, "regions", cohort.region_rows(3))
        transactions.append(committer.lock, Shard.from_json(shard))
    return Archive(uri)


def test_parquet_holds_the_visible_rows(archive, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "ROWS_PER_FILE", 6)
    written = export.export_parquet(archive, tmp_path / "out")
    assert written == {"slides": 3, "regions": 10, "features_tex": 10, "embeddings_tex": 12}
    assert {p.name for p in (tmp_path / "out").iterdir()} == set(written)
    assert len(list((tmp_path / "out/features_tex").iterdir())) == 2
    read = pq.read_table(tmp_path / "out/features_tex").sort_by("region_id")
    for n in range(2):
        part = read.filter(pc.field("slide_id") == f"slide{n:03d}").drop_columns(["checksum"])
        assert part.to_pylist() == archive.features(f"slide{n:03d}").to_pylist()
    regions = pq.read_table(tmp_path / "out/regions").sort_by("region_id")
    assert regions["region_id"].to_pylist() == archive.regions()["region_id"].to_pylist()


def test_nothing_of_the_users_is_overwritten(archive, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("x")
    with pytest.raises(ConfigError, match="not an empty folder"):
        export.export_parquet(archive, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_failed_export_leaves_nothing(archive, tmp_path):
    for path in (tmp_path / "a/embeddings_tex.lance/data").iterdir():
        path.unlink()
    with pytest.raises(ArchiveError):
        export.export_parquet(archive, tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"a"}
