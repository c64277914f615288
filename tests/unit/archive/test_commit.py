import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest

from pathflip.archive import Archive, transactions
from pathflip.archive.commit import Committer
from pathflip.archive.create import create_archive
from pathflip.archive.fragments import Shard, write_fragment
from pathflip.archive.lock import ArchiveLock
from pathflip.archive.settings import meta_rows
from pathflip.archive.tables import key_of
from pathflip.archive.verify import verify
from pathflip.errors import ArchiveError
from tests.unit.archive import cohort

SCRIPT = str(Path(cohort.__file__))
ROOT = str(Path(cohort.__file__).parents[3])


def start(uri, first: int, last: int, *more: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, SCRIPT, str(uri), str(first), str(last), *more],
        env={**os.environ, "PYTHONPATH": ROOT},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def assert_whole(uri, numbers) -> None:
    """Exactly these slides are ready, with exactly their rows."""
    report = verify(uri)
    assert report.damaged == []
    archive = Archive(uri)
    assert sorted(archive.ready_ids()) == [f"slide{n:03d}" for n in numbers]
    for n in numbers:
        written = cohort.region_rows(n)
        assert archive.regions(f"slide{n:03d}").select(written.column_names).equals(written)
        features = archive.features(f"slide{n:03d}").combine_chunks()
        assert features.equals(cohort.feature_rows(n).combine_chunks())
    for table in ("regions", "features_tex"):
        assert archive.dataset(table).count_rows() == len(numbers) * cohort.REGIONS
    assert archive.dataset("embeddings_tex").count_rows() == len(numbers) * (cohort.REGIONS + 1)


def test_committing_twice_changes_nothing(tmp_path):
    cohort.build(tmp_path / "a", 0, 1)
    with Committer(tmp_path / "a") as committer:
        done = cohort.commit(committer, 0, 1, 2)
        assert (done.written, done.extended, done.skipped) == (
            ["slide002"], [], ["slide000", "slide001"],
        )  # fmt: skip
        versions = {t: committer.archive.dataset(t).version for t in committer.archive.tables()}
        assert cohort.commit(committer, 1, 2, together=True).written == []
        after = {t: committer.archive.dataset(t).version for t in committer.archive.tables()}
        assert versions["slides"] + 1 >= after["slides"]
        assert versions["features_tex"] == after["features_tex"]
    assert_whole(tmp_path / "a", range(3))


def test_a_fragment_of_done_and_new_slides_is_narrowed(tmp_path):
    cohort.build(tmp_path / "a", 1)
    with Committer(tmp_path / "a") as committer:
        assert cohort.commit(committer, 0, 1, 2, together=True).skipped == ["slide001"]
    assert_whole(tmp_path / "a", range(3))


def test_stale_fragments_are_not_appended_again(tmp_path):
    uri = tmp_path / "a"
    cohort.build(uri)
    with Committer(uri) as committer:
        shard = write_fragment(uri, "features_tex", cohort.feature_rows(0))
        parts = {
            "slides": cohort.slide_rows(0),
            "regions": cohort.region_rows(0),
            "embeddings": {"tex": cohort.embedding_rows(0)},
        }
        assert committer.commit(**parts, fragments={"tex": [shard, shard]}).written == ["slide000"]
        assert committer.commit(**parts, fragments={"tex": [shard]}).skipped == ["slide000"]
        with pytest.raises(ValueError, match="already holds"):
            transactions.append(committer.lock, Shard.from_json(shard))
    assert_whole(uri, [0])


def test_changed_content_replaces_the_rows(tmp_path):
    cohort.build(tmp_path / "a", 0, 1)
    with Committer(tmp_path / "a") as committer:
        assert cohort.commit(committer, 1, fingerprint="other").written == ["slide001"]
    assert_whole(tmp_path / "a", [0, 1])
    assert Archive(tmp_path / "a").slide("slide001")["fingerprint"] == "other1"


def test_quarantine_never_replaces_a_ready_slide_of_the_same_content(tmp_path):
    cohort.build(tmp_path / "a", 0, 1)
    with Committer(tmp_path / "a") as committer:
        assert committer.commit(slides=cohort.slide_rows(0, status="quarantined")).skipped
        other = cohort.slide_rows(1, status="quarantined", fingerprint="other")
        assert committer.commit(slides=other).written == ["slide001"]
        assert_whole(tmp_path / "a", [0])
        assert cohort.commit(committer, 1).written == ["slide001"]
    assert_whole(tmp_path / "a", [0, 1])


def test_a_second_encoder_is_added_without_touching_regions(tmp_path):
    uri = tmp_path / "a"
    cohort.build(uri, 0, 1)
    with Committer(uri) as committer:
        cohort.encoder(committer, "big", dim=20)
        version = committer.archive.dataset("regions").version
        done = cohort.commit(committer, 0, 2, dims={"big": 20})
        assert (done.written, done.extended) == (["slide002"], ["slide000"])
        cohort.commit(committer, 1, dims={"big": 20, "tex": cohort.DIM})
        assert committer.archive.dataset("regions").version == version + 1  # slide 2 alone
    archive = Archive(uri)
    assert verify(uri).damaged == []
    assert archive.ledger()["slide000"]["encoders"] == ["big", "tex"]
    assert archive.ledger()["slide002"]["encoders"] == ["big"]
    assert archive.stats()["encoders"]["big"]["regions"] == 15
    assert archive.stats()["encoders"]["tex"]["regions"] == 10
    with pytest.raises(ArchiveError, match="encoder"):
        archive.features("slide000")


def test_encoder_of_another_revision_or_size_is_refused(tmp_path):
    cohort.build(tmp_path / "a")
    with Committer(tmp_path / "a") as committer:
        cohort.encoder(committer)
        for change in ({"revision": "2"}, {"dim": 13}, {"mpp": None}):
            settings = {"revision": "1", "dim": cohort.DIM, "mpp": 0.5, "licence": "MIT"} | change
            with pytest.raises(ArchiveError) as error:
                committer.ensure_encoder_table("tex", **settings)
            assert error.value.code == "settings"
        with pytest.raises(ArchiveError, match="share"):
            cohort.encoder(committer, "TEX")


def test_incomplete_rows_are_refused_before_anything_is_written(tmp_path):
    cohort.build(tmp_path / "a", 0)
    with Committer(tmp_path / "a") as committer:
        before = {t: committer.archive.dataset(t).version for t in committer.archive.tables()}
        shard = write_fragment(committer.uri, "features_tex", cohort.feature_rows(1))
        with pytest.raises(ValueError, match="rows for"):
            committer.commit(
                slides=cohort.slide_rows(1),
                regions=cohort.region_rows(1).slice(1),
                embeddings={"tex": cohort.embedding_rows(1)},
                fragments={"tex": [shard]},
            )
        after = {t: committer.archive.dataset(t).version for t in committer.archive.tables()}
        assert before == after
        cohort.commit(committer, 1)
    assert_whole(tmp_path / "a", [0, 1])


@pytest.mark.parametrize("step", ["register", "append", "upsert"])
def test_disk_full_between_commits_then_again(tmp_path, monkeypatch, step):
    cohort.build(tmp_path / "a", 0)
    owner = Committer if step == "upsert" else transactions
    original = getattr(owner, step)
    calls = []

    def full(*args, **kwargs):
        calls.append(step)
        if len(calls) == 2:
            raise ArchiveError("full", code="disk_full")
        return original(*args, **kwargs)

    with Committer(tmp_path / "a") as committer:
        with monkeypatch.context() as patch:
            patch.setattr(owner, step, full)
            calls += ["", ""] if step == "upsert" else []
            if step == "upsert":
                calls.pop()
            with pytest.raises(ArchiveError):
                cohort.commit(committer, 1)
        assert sorted(Archive(tmp_path / "a").ready_ids()) == ["slide000"]
        cohort.commit(committer, 1)
    assert_whole(tmp_path / "a", [0, 1])


def test_no_space_is_said_with_the_free_space(tmp_path, monkeypatch):
    import lance.fragment

    cohort.build(tmp_path / "a")

    def full(*args, **kwargs):
        raise OSError("LanceError(IO): No space left on device (os error 28)")

    monkeypatch.setattr(lance.fragment, "write_fragments", full)
    with pytest.raises(ArchiveError, match=r"full \(free: [\d,]+ MiB\)") as error:
        write_fragment(tmp_path / "a", "features_tex", cohort.feature_rows(0))
    assert error.value.code == "disk_full"


def test_dropped_slides_are_gone_from_all_tables(tmp_path):
    cohort.build(tmp_path / "a", 0, 1, 2)
    with Committer(tmp_path / "a") as committer:
        committer.drop_slides(["slide001"])
    assert_whole(tmp_path / "a", [0, 2])


def test_compaction_keeps_rows_and_digests(tmp_path):
    cohort.build(tmp_path / "a", *range(4))
    with Committer(tmp_path / "a") as committer:
        assert set(committer.compact().values()) == {1}
    assert_whole(tmp_path / "a", range(4))
    assert verify(tmp_path / "a").notes == []


def test_lock_names_its_holder_and_goes_with_the_process(tmp_path):
    holder = start(tmp_path / "a", 0, 0, "stay")
    try:
        assert holder.stdout.readline() == "open\n"
        others = [start(tmp_path / "a", 0, 1) for _ in range(2)]
        for other in others:
            _, said = other.communicate(timeout=60)
            assert other.returncode == 1
            assert f"locked by process {holder.pid} on " in said
    finally:
        holder.kill()
        holder.wait()
    with ArchiveLock(tmp_path / "a"), pytest.raises(ArchiveError) as error:
        Committer(tmp_path / "a").__enter__()
    assert error.value.code == "locked"


def test_racing_writers_never_write_a_slide_twice(tmp_path):
    cohort.build(tmp_path / "a")
    racers = [start(tmp_path / "a", 0, 6) for _ in range(3)]
    said = [racer.communicate(timeout=120)[1] for racer in racers]
    losers = [text for racer, text in zip(racers, said, strict=True) if racer.returncode]
    assert len(losers) < 3
    assert all("is locked by" in text for text in losers)
    assert_whole(tmp_path / "a", range(6))


def test_kills_at_random_moments(tmp_path):
    """Acknowledged rows are there, nothing is partial, and going on repeats nothing."""
    chance = random.Random(5)
    acknowledged: set[str] = set()
    for _ in range(6):
        writer = start(tmp_path / "a", 0, 500)
        assert writer.stdout.readline() == "open\n", writer.stderr.read()
        time.sleep(chance.uniform(0.0, 0.6))
        writer.send_signal(signal.SIGKILL)
        acknowledged |= set(writer.stdout.read().split())
        writer.wait()
        assert verify(tmp_path / "a").damaged == []
        assert acknowledged <= Archive(tmp_path / "a").ready_ids()
    last = max(20, len(acknowledged) + 2)
    with Committer(tmp_path / "a") as committer:
        for n in range(last):
            cohort.commit(committer, n)
    assert len(acknowledged) > 3
    assert_whole(tmp_path / "a", range(last))


def test_rows_of_slides_that_are_not_ready_are_hidden_then_deleted(tmp_path):
    uri = tmp_path / "a"
    cohort.build(uri, 0)
    with Committer(uri) as committer:
        for table, rows in (
            ("regions", cohort.region_rows(1)),
            ("features_tex", cohort.feature_rows(1)),
        ):
            transactions.append(committer.lock, Shard.from_json(write_fragment(uri, table, rows)))
    archive = Archive(uri)
    assert archive.regions()["slide_id"].unique().to_pylist() == ["slide000"]
    assert archive.stats()["regions"] == cohort.REGIONS
    assert verify(uri).damaged == []
    assert len(verify(uri).notes) >= 2
    with Committer(uri) as committer:
        assert committer.recovered == {"regions": 5, "features_tex": 5}
    assert_whole(uri, [0])


def test_upsert_of_the_ledger_alone(tmp_path):
    cohort.build(tmp_path / "a", 0, 1)
    with Committer(tmp_path / "a") as committer:
        rows = committer.archive.dataset("slides").to_table()
        rows = rows.set_column(
            rows.schema.get_field_index("labels"), "labels", pa.array(["{}"] * 2)
        )
        committer.upsert("slides", rows)
        with pytest.raises(ValueError, match="twice"):
            committer.upsert("slides", pa.concat_tables([rows, rows]))
    assert Archive(tmp_path / "a").slides()["labels"].to_pylist() == ["{}", "{}"]
    assert_whole(tmp_path / "a", [0, 1])
    assert key_of("slides") == "slide_id"


def test_a_table_opens_while_another_process_commits(tmp_path: Path) -> None:
    """Workers open the tables they write to while the driver commits."""
    import threading

    from pathflip.archive.storage import open_table

    archive = create_archive(tmp_path / "a", tiling=cohort.TILING)
    done = threading.Event()

    def commit() -> None:
        with Committer(archive.uri) as committer:
            for n in range(25):
                committer.upsert("meta", meta_rows({"note": n}))
        done.set()

    writer = threading.Thread(target=commit)
    writer.start()
    opened = 0
    while not done.is_set():
        assert open_table(archive.uri, "meta").version >= 1
        opened += 1
    writer.join()
    assert opened > 25
