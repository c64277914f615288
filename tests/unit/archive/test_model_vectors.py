"""Captions and vectors of models: through the one committer, checked and mended like the rest."""

import random
import shutil
from pathlib import Path

import lance
import pytest

from pathflip.archive import Archive, transactions
from pathflip.archive.commit import Committer
from pathflip.archive.export import export_parquet
from pathflip.archive.maintain import maintain
from pathflip.archive.model_vectors import ensure_model, indexed_slides
from pathflip.archive.repair import repair
from pathflip.archive.verify import verify
from pathflip.errors import ArchiveError
from tests.unit.archive import cohort, models
from tests.unit.archive.harm import flip, newest_manifest

SLIDES = range(4)
TABLE = f"embeddings_{models.MODEL}"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    uri = tmp_path_factory.mktemp("vectors") / "a"
    cohort.build(uri)
    with Committer(uri) as committer:
        cohort.commit(committer, *SLIDES)
        models.add(committer, *SLIDES)
        models.tell(committer, *SLIDES)
    return uri


@pytest.fixture
def uri(pristine, tmp_path):
    return Path(shutil.copytree(pristine, tmp_path / "a"))


def index_again(uri):
    """Index as the job does: the slides that are not whole."""
    with Committer(uri) as committer:
        missing = sorted(
            committer.archive.ready_ids() - indexed_slides(committer.archive, models.MODEL)
        )
        models.add(committer, *[int(slide[5:]) for slide in missing])
    return missing


def assert_whole(uri, numbers=SLIDES):
    assert verify(uri).damaged == []
    archive = Archive(uri)
    # Patients are those of the slides; the table has none.
    stored = archive.embeddings(model=models.MODEL).drop_columns(["checksum", "patient_id"])
    wanted = models.rows(*numbers).sort_by("id")
    assert stored.to_pylist() == wanted.to_pylist()
    assert indexed_slides(archive, models.MODEL) == {f"slide{n:03d}" for n in numbers}
    assert archive.captions()["text"].to_pylist() == [models.caption(n) for n in numbers]


def test_rows_come_back_as_written(uri):
    assert_whole(uri)
    archive = Archive(uri)
    assert archive.models() == {
        models.MODEL: {
            "dim": models.DIM, "fingerprint": "f" * 64, "encoder": "tex", "encoder_revision": "1",
            "run": "mini", "embeddings_table": TABLE,
            "created_at": archive.models()[models.MODEL]["created_at"],
        }
    }  # fmt: skip
    assert archive.captions().column_names == [
        "caption_id", "slide_id", "source", "text", "sentences", "statements", "model", "qa",
    ]  # fmt: skip
    assert archive.captions("report").num_rows == len(SLIDES)
    assert archive.captions("other").num_rows == 0
    assert archive.stats()["captions"] == len(SLIDES)
    assert list(archive.encoders()) == ["tex"]
    written = export_parquet(archive, uri.parent / "out")
    assert (written["captions"], written[TABLE]) == (4, 4 * (cohort.REGIONS + 1))


def test_a_slide_ingested_anew_keeps_its_caption_and_loses_its_vectors(uri):
    with Committer(uri) as committer:
        cohort.commit(committer, 2, fingerprint="other")
        assert Archive(uri).captions().num_rows == len(SLIDES)
    assert verify(uri).ok
    assert f"1 slides have no rows in table {TABLE} yet" in " ".join(verify(uri).notes)
    assert index_again(uri) == ["slide002"]
    assert_whole(uri)
    with Committer(uri) as committer:
        committer.commit(slides=cohort.slide_rows(2, status="quarantined", fingerprint="bad"))
    archive = Archive(uri)
    assert "slide002" not in archive.captions()["slide_id"].to_pylist()  # not ready: not seen
    assert lance.dataset(str(uri / "captions.lance")).count_rows() == len(SLIDES)
    with Committer(uri) as committer:
        committer.drop_slides(["slide002"])
    assert lance.dataset(str(uri / "captions.lance")).count_rows() == len(SLIDES) - 1
    assert verify(uri).ok


def test_a_patient_changes_for_every_row_of_the_slide(uri):
    with Committer(uri) as committer:
        committer.update_slides({"slide000": {"patient_id": "PX"}})
    rows = Archive(uri).embeddings(model=models.MODEL).to_pylist()
    assert {r["patient_id"] for r in rows if r["slide_id"] == "slide000"} == {"PX"}
    assert verify(uri).ok


@pytest.mark.parametrize("table", ["captions", TABLE])
def test_bit_flips_are_reported_and_repaired(uri, table):
    chance = random.Random(5)
    (path,) = (uri / f"{table}.lance/data").glob("*")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pathflip.archive.verify.salvage", lambda *_, **__: (None, []))  # slow
        for _ in range(4):
            byte, bit = chance.randrange(path.stat().st_size), chance.randrange(8)
            flip(path, byte, bit)
            found = verify(uri)
            assert str(path.relative_to(uri)) in [d.id for d in found.damaged if d.kind == "file"]
            assert found.slides == []  # what ingest made is whole
            flip(path, byte, bit)
    flip(path, path.stat().st_size // 2, 3)
    assert repair(uri).redo == []
    assert verify(uri).damaged == []
    assert Archive(uri).ready_ids() == {f"slide{n:03d}" for n in SLIDES}
    index_again(uri)
    with Committer(uri) as committer:
        models.tell(committer, *SLIDES)
    assert_whole(uri)


@pytest.mark.parametrize("table", ["captions", TABLE])
@pytest.mark.parametrize("harm", ["halved", "removed", "all"])
def test_dead_manifests(uri, table, harm):
    path = newest_manifest(uri, table)
    if harm == "halved":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif harm == "removed":
        path.unlink()
    else:
        for each in path.parent.glob("*.manifest"):
            each.write_bytes(b"")
    with pytest.raises(ArchiveError) as error:
        Archive(uri)
    assert error.value.code == "damaged"
    assert repair(uri).report.damaged == []
    index_again(uri)
    with Committer(uri) as committer:
        models.tell(committer, *SLIDES)
    assert_whole(uri)


def test_settings_that_are_lost_come_back_from_the_tables(uri):
    lance.dataset(str(uri / "meta.lance")).delete("key LIKE 'model:%' OR key = 'captions'")
    assert repair(uri).actions
    assert_whole(uri)


def test_a_slide_that_lost_a_vector_is_indexed_again_not_ingested(uri):
    lance.dataset(str(uri / f"{TABLE}.lance")).delete("id = 'slide001/2_1'")
    report = verify(uri)
    assert report.slides == []
    assert report.reindex == {TABLE: ["slide001"]}
    assert repair(uri).report.damaged == []
    assert index_again(uri) == ["slide001"]
    assert_whole(uri)


def test_rows_of_slides_that_are_gone_are_deleted_by_the_next_writer(uri):
    with Committer(uri) as committer:
        transactions.append(committer.lock, committer._shard(TABLE, models.rows(9), ["slide009"]))
    with Committer(uri) as committer:
        assert committer.recovered == {TABLE: cohort.REGIONS + 1}
    assert_whole(uri)


def test_maintain_covers_them(uri):
    with Committer(uri) as committer:
        for n in (4, 5):
            cohort.commit(committer, n)
            models.add(committer, n)
            models.tell(committer, n)
    done = maintain(uri)
    assert done["fragments"]["captions"] == done["fragments"][TABLE] == 1
    assert_whole(uri, range(6))


def test_two_models_side_by_side_and_names_that_clash(uri):
    with Committer(uri) as committer:
        models.add(committer, 0, name="other_ffff0000", fingerprint="0" * 64)
        assert indexed_slides(committer.archive, "other_ffff0000") == {"slide000"}
        for name, told in ((models.MODEL, "fingerprint"), ("tex", "belongs to another")):
            with pytest.raises(ArchiveError, match=told) as error:
                models.add(committer, name=name, fingerprint="1" * 64)
            assert error.value.code == "wrong_model"
        with pytest.raises(ArchiveError, match="encoder_revision 1, not 2"):
            ensure_model(
                committer, models.MODEL, dim=models.DIM, fingerprint="f" * 64, run="mini",
                encoder=models.ENCODER | {"revision": "2"},
            )  # fmt: skip
    assert sorted(Archive(uri).models()) == [models.MODEL, "other_ffff0000"]
    with pytest.raises(ArchiveError) as error:
        Archive(uri).model()
    assert error.value.code == "unknown_model"
    assert_whole(uri)
