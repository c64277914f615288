import subprocess
import sys
from functools import partial
from pathlib import Path

import lancedb
import numpy as np
import pytest

from pathflip.archive import Archive
from pathflip.archive.commit import Committer
from pathflip.archive.create import create_archive
from pathflip.errors import ArchiveError
from tests.unit.archive import cohort


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    uri = tmp_path_factory.mktemp("archive") / "a"
    cohort.build(uri, 0, 1, 2)
    with Committer(uri) as committer:
        committer.commit(slides=cohort.slide_rows(3, status="quarantined"))
    return Archive(uri)


def test_rows_come_back_as_written(archive):
    for n in range(3):
        written = cohort.region_rows(n)
        assert archive.regions(f"slide{n:03d}").select(written.column_names).equals(written)
        written = cohort.feature_rows(n)
        read = archive.features(f"slide{n:03d}")
        assert read.column_names == ["region_id", "slide_id", "features"]
        assert read.combine_chunks().equals(written.combine_chunks())
    assert archive.regions().num_rows == 3 * cohort.REGIONS
    assert archive.embeddings().num_rows == 3 * (cohort.REGIONS + 1)
    row = archive.slide("slide001")
    assert row["uri"] == "/data/it's 1.svs"
    assert row["tissue_png"] == bytes(range(256))


def test_features_array(archive):
    features, mask, ids = archive.features_array("slide001", "tex")
    assert features.shape == (cohort.REGIONS, cohort.SLOTS, cohort.DIM)
    assert features.dtype == np.float16
    assert mask.sum(axis=1).tolist() == [16, 15, 14, 13, 12]
    assert ids == cohort.region_rows(1)["region_id"].to_pylist()
    row = cohort.feature_rows(1)["features"][2].as_py()
    assert np.array_equal(features[2].ravel(), np.array(row, np.float16))


def test_slides_lists_all_and_filters(archive):
    assert archive.slides()["status"].to_pylist() == ["ready"] * 3 + ["quarantined"]
    assert archive.slides("quarantined", columns=["uri"]).to_pylist() == [
        {"uri": "/data/it's 3.svs"}
    ]
    assert "thumbnail" not in archive.slides().column_names


def test_stats(archive):
    stats = archive.stats()
    assert stats["slides"] == 3
    assert stats["regions"] == 15
    assert stats["patches"] == 3 * cohort.REGIONS * cohort.SLOTS
    assert stats["encoders"]["tex"]["dim"] == cohort.DIM
    assert stats["encoders"]["tex"]["regions"] == 15
    assert stats["status"] == {"ready": 3, "quarantined": 1}
    on_disk = sum(
        path.stat().st_size for path in Path(archive.uri).rglob("*.lance") if path.is_file()
    )
    assert stats["bytes"] > on_disk > 0
    assert archive.tiling() == cohort.TILING


def test_lookup_by_id_or_unique_name(archive):
    assert archive.resolve("slide002") == "slide002"
    assert archive.resolve("it's 2") == "slide002"
    assert archive.resolve("copy2.svs") == "slide002"
    with pytest.raises(ArchiveError, match="no slide") as error:
        archive.resolve("slide02")
    assert "slide002" in error.value.hint
    with pytest.raises(ArchiveError) as error:
        archive.regions("slide003")
    assert error.value.code == "not_ready"
    with pytest.raises(ArchiveError) as error:
        archive.features("slide001", "uni")
    assert error.value.code == "unknown_encoder"
    assert "tex" in error.value.hint


def test_ambiguous_name_names_the_candidates(tmp_path):
    cohort.build(tmp_path / "a", 0, 1)
    with Committer(tmp_path / "a") as committer:
        rows = committer.archive.dataset("slides").to_table()
        at = rows.schema.get_field_index("aliases")
        same = cohort.pa.array([["x/same.svs"], ["y/same.tiff"]], rows.schema.field(at).type)
        committer.upsert("slides", rows.set_column(at, rows.schema.field(at), same))
    with pytest.raises(ArchiveError, match="2 slides") as error:
        Archive(tmp_path / "a").resolve("same")
    assert "slide000, slide001" in error.value.hint


def test_lancedb_opens_it(archive):
    table = lancedb.connect(archive.uri).open_table("regions")
    assert table.count_rows() == 15


def test_snapshot_does_not_see_later_commits(tmp_path):
    uri = tmp_path / "a"
    cohort.build(uri, 0)
    archive = Archive(uri)
    with Committer(uri) as committer:
        cohort.commit(committer, 1)
        committer.compact()
    assert archive.slides().num_rows == 1
    assert archive.regions("slide000").num_rows == cohort.REGIONS
    archive.refresh()
    assert archive.slides().num_rows == 2


@pytest.mark.parametrize("content", [None, "empty", "other"])
def test_no_archive_there(tmp_path, content):
    uri = tmp_path / "a"
    if content:
        uri.mkdir()
    if content == "other":
        (uri / "notes.txt").write_text("mine")
    for make in (Archive, lambda path: Committer(path).__enter__()):
        with pytest.raises(ArchiveError) as error:
            make(uri)
        assert error.value.code == "missing_archive"
        assert error.value.hint
    assert not (uri / ".lock").exists()
    if content == "other":
        with pytest.raises(ArchiveError) as error:
            create_archive(uri, tiling=cohort.TILING)
        assert error.value.code == "not_empty"
        assert [path.name for path in uri.iterdir()] == ["notes.txt"]


def test_create_again_and_with_other_settings(tmp_path):
    cohort.build(tmp_path / "a", 0)
    assert create_archive(tmp_path / "a", tiling=cohort.TILING).stats()["slides"] == 1
    with pytest.raises(ArchiveError, match=r"mpp 0\.5 instead of 0\.25") as error:
        create_archive(tmp_path / "a", tiling={**cohort.TILING, "mpp": 0.25})
    assert error.value.code == "settings"


@pytest.mark.parametrize("begun", [False, True], ids=["", "a folder of the next"])
@pytest.mark.parametrize("survives", range(5))
def test_a_creation_that_was_killed_is_completed(tmp_path, monkeypatch, survives, begun):
    import lance

    calls = []
    original = lance.write_dataset

    def killed(*args, **kwargs):
        calls.append(args)
        if len(calls) > survives:
            if begun:
                Path(args[1], "_versions").mkdir(parents=True)
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(lance, "write_dataset", killed)
        with pytest.raises(KeyboardInterrupt):
            create_archive(tmp_path / "a", tiling=cohort.TILING)
    with pytest.raises(ArchiveError) as caught:
        Archive(tmp_path / "a")
    assert caught.value.code == "missing_archive"  # as an ingest asks first
    cohort.build(tmp_path / "a", 0)
    assert Archive(tmp_path / "a").stats()["slides"] == 1


def test_an_archive_with_slides_that_lost_its_settings_is_damaged(tmp_path):
    cohort.build(tmp_path / "a", 0)
    (tmp_path / "a" / "meta.lance").rename(tmp_path / "meta.lance")
    for attempt in (Archive, partial(create_archive, tiling=cohort.TILING)):
        with pytest.raises(ArchiveError, match="meta is missing") as caught:
            attempt(tmp_path / "a")
        assert caught.value.code == "damaged"


def test_importing_the_package_does_not_import_lance():
    code = (
        "import sys, pathflip.archive; sys.exit('lance' in sys.modules or 'pyarrow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_archive_on_an_object_store(tmp_path: Path) -> None:
    uri = f"file-object-store://{tmp_path}/remote"
    with pytest.raises(ArchiveError) as caught:
        Archive(uri)
    assert caught.value.code == "missing_archive"
    tiling = {"region_um": 256.0, "patch_um": 128.0, "mpp": 0.5}
    for _ in range(2):  # making it again is opening it
        assert create_archive(uri, tiling=tiling).slots == 4
    with Committer(uri) as committer:
        committer.ensure_encoder_table("texture", revision="1", dim=4, mpp=None, licence="none")
    assert Archive(uri).stats()["encoders"]["texture"]["dim"] == 4
