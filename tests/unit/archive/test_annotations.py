"""Annotations: saved by many at once, beside jobs that hold the archive's lock, and never lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import uuid
from collections import Counter
from dataclasses import replace
from pathlib import Path

import lance
import pyarrow.parquet as pq
import pytest

from pathflip.archive import (
    Archive,
    annotation_table,
    annotations,
    lease,
    transactions,
)
from pathflip.archive.annotation_table import read_counter
from pathflip.archive.annotations import AnnotationStore, Ground
from pathflip.archive.commit import Committer
from pathflip.archive.export import export_parquet
from pathflip.archive.lock import ArchiveLock
from pathflip.archive.maintain import maintain
from pathflip.archive.repair import repair
from pathflip.archive.storage import OBJECT_STORE_ON_DISK
from pathflip.archive.verify import verify
from pathflip.errors import ArchiveError
from tests.unit.archive import cohort
from tests.unit.archive.annotation_writer import GROUND, SHARED, drawn
from tests.unit.archive.harm import flip, newest_manifest
from tests.unit.archive.test_lease import wait_for_stop

ROOT = Path(__file__).resolve().parents[3]
WRITERS, SAVES = 4, 5


def start(uri: object, by: str, count: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.unit.archive.annotation_writer", str(uri), by, str(count)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def stored(uri: object) -> list[dict]:
    """The table's rows as Lance has them, without the counter."""
    rows = lance.dataset(f"{uri}/annotations.lance").to_table().to_pylist()
    return [row for row in rows if row["annotation_id"]]


def ids(store: AnnotationStore, ground: Ground = GROUND) -> set[str]:
    return {one.annotation_id for one in store.on_slide(ground).annotations}


def commits(uri: object) -> int:
    return read_counter(str(uri), lance.dataset(f"{uri}/annotations.lance"))["revision"]


@pytest.fixture(params=["folder", "object store"])
def either(request, tmp_path) -> str:
    """An archive of two slides, in a folder and on what Lance takes for an object store.

    There writers take no turns, so commits do refuse each other.
    """
    uri = f"{tmp_path}/a"
    uri = uri if request.param == "folder" else f"{OBJECT_STORE_ON_DISK}{uri}"
    cohort.build(uri, 0, 1)
    return uri


# -- one writer -----------------------------------------------------------------------------------


def test_an_archive_without_them_has_none_and_gets_the_table_with_the_first(uri):
    store = AnnotationStore(uri)
    assert store.on_slide(GROUND).annotations == []
    assert store.count() == Archive(uri).stats()["annotations"] == 0
    assert not (uri / "annotations.lance").exists()
    before = Archive(uri).settings()
    saved = store.put(drawn(), ground=GROUND, by="ann")
    assert saved.revision == 1
    assert Archive(uri).settings() == before  # written under the lock, which this does not take
    assert Archive(uri).stats()["annotations"] == 1
    assert verify(uri).damaged == []


def test_nothing_is_made_where_there_is_no_archive(tmp_path):
    with pytest.raises(ArchiveError) as error:
        AnnotationStore(tmp_path / "none").put(drawn(), ground=GROUND, by="ann")
    assert error.value.code == "missing_archive"
    assert not (tmp_path / "none").exists()


def test_a_save_comes_back_as_it_was(uri):
    given = drawn(name="näher ansehen")
    saved = AnnotationStore(uri).put(given, ground=GROUND, by="ann")
    assert saved.drawn_as(replace(given, sha256=GROUND.sha256))
    assert (saved.author, saved.created) == ("ann", saved.updated)
    assert AnnotationStore(uri).on_slide(GROUND).annotations == [saved]
    row = stored(uri)[0]
    assert (row["x0"], row["y0"], row["x1"], row["y1"], row["points"]) == (10, 10, 60, 60, 4)
    assert (row["class"], row["colour"]) == ("Tumor: invasive", "#2ea043")


def test_a_revision_that_is_not_the_newest_is_stale(uri):
    store = AnnotationStore(uri)
    first = store.put(drawn(), ground=GROUND, by="ann")
    second = store.put(replace(first, name="b"), ground=GROUND, by="ann")
    assert (second.revision, second.created) == (2, first.created)
    assert second.updated > first.updated
    for wrong in (0, 1, 3):
        with pytest.raises(ArchiveError) as error:
            store.put(replace(first, name="c", revision=wrong), ground=GROUND, by="ann")
        assert error.value.code == "stale"
    store.delete(first.annotation_id, ground=GROUND, by="ann")
    with pytest.raises(ArchiveError, match="removed meanwhile") as error:
        store.put(replace(second, name="c"), ground=GROUND, by="ann")
    assert error.value.code == "stale"
    assert stored(uri) == []


def test_a_save_that_is_sent_again_is_acknowledged_again(uri):
    """The first acknowledgement may have been lost on the way."""
    store = AnnotationStore(uri)
    given = drawn()
    first = store.put(given, ground=GROUND, by="ann")
    made = commits(uri)
    assert store.put(given, ground=GROUND, by="ann") == first
    changed = replace(first, name="b")
    second = store.put(changed, ground=GROUND, by="ann")
    assert store.put(changed, ground=GROUND, by="ann") == second
    assert commits(uri) == made + 1


def test_authors_are_kept_apart(uri):
    store = AnnotationStore(uri)
    own = store.put(drawn(), ground=GROUND, by="ann")
    other = store.put(drawn(author="bob"), ground=GROUND, by="bob")
    assert store.on_slide(GROUND, author="ann").annotations == [own]
    assert ids(store) == {own.annotation_id, other.annotation_id}
    for attempt in (
        lambda: store.put(replace(own, name="mine"), ground=GROUND, by="bob"),
        lambda: store.put(replace(own, revision=0), ground=GROUND, by="bob"),
        lambda: store.delete(own.annotation_id, ground=GROUND, by="bob"),
        lambda: store.delete(str(uuid.uuid4()), ground=GROUND, by="bob"),
    ):
        with pytest.raises(ArchiveError) as error:
            attempt()
        assert error.value.code == "unknown_annotation"
    seen = store.put(replace(own, name="checked"), ground=GROUND, by="chief", anyone=True)
    assert (seen.author, seen.name, seen.revision) == ("ann", "checked", 2)


def test_another_slides_annotation_cannot_be_reached_from_here(uri):
    store = AnnotationStore(uri)
    own = store.put(drawn(), ground=GROUND, by="ann")
    elsewhere = Ground(slide_id="slide001", sha256="b" * 64)
    with pytest.raises(ArchiveError) as error:
        store.delete(own.annotation_id, ground=elsewhere, by="ann", anyone=True)
    assert error.value.code == "unknown_annotation"
    assert ids(store) == {own.annotation_id}


def test_importing_again_changes_nothing_and_another_author_gets_copies(uri):
    store = AnnotationStore(uri)
    given = [drawn(x=x) for x in range(10, 60, 10)]
    keys = [one.annotation_id for one in given]
    dry = store.put_all(given, ground=GROUND, by="ann", dry_run=True)
    assert (dry.new, store.count()) == (keys, 0)
    assert store.put_all(given, ground=GROUND, by="ann").new == keys
    made = commits(uri)
    assert store.put_all(given, ground=GROUND, by="ann").unchanged == keys
    given[2] = replace(given[2], name="changed")
    again = store.put_all(given, ground=GROUND, by="ann")
    assert (again.changed, len(again.unchanged)) == ([keys[2]], 4)
    assert commits(uri) == made + 1
    copies = store.put_all(given, ground=GROUND, by="bob")
    assert len(copies.new) == 5
    assert not set(copies.new) & set(keys)
    assert store.put_all(given, ground=GROUND, by="bob").unchanged == copies.new
    assert Counter(row["author"] for row in stored(uri)) == {"ann": 5, "bob": 5}


def test_one_file_on_three_slides_is_there_three_times(uri):
    store = AnnotationStore(uri)
    given = drawn(name="given")
    grounds = [GROUND, *(Ground(slide_id=f"s{n}", sha256=n * 64) for n in "bc")]
    saved = [store.put_all([given], ground=ground, by="ann").new for ground in grounds]
    assert len({key for keys in saved for key in keys}) == 3
    for ground, keys in zip(grounds, saved, strict=True):
        assert ids(store, ground) == set(keys)
        assert store.put_all([given], ground=ground, by="ann").unchanged == keys


def test_a_file_with_an_annotation_and_ones_own_copy_of_it_doubles_nothing(uri):
    store = AnnotationStore(uri)
    theirs = store.put(drawn(name="theirs"), ground=GROUND, by="ann")
    (key,) = store.put_all([theirs], ground=GROUND, by="bob").new
    (copy,) = store.on_slide(GROUND, author="bob").annotations
    mine = store.put(replace(copy, name="mine"), ground=GROUND, by="bob")
    both = [theirs, mine]  # as an administrator exports them
    assert store.put_all(both, ground=GROUND, by="bob").unchanged == [key]
    assert store.on_slide(GROUND, author="bob").annotations == [mine]
    store.delete(key, ground=GROUND, by="bob")
    assert store.put_all(both, ground=GROUND, by="bob").new == [key]
    assert sorted(row["name"] for row in stored(uri)) == ["mine", "theirs"]


def test_an_id_that_others_took_before_does_not_give_them_a_copy(uri):
    store = AnnotationStore(uri)
    theirs = store.put(drawn(), ground=GROUND, by="eve")
    (expected,) = store.put_all([theirs], ground=GROUND, by="ann", dry_run=True).new
    store.put(drawn(expected, name="trap"), ground=GROUND, by="eve")
    (key,) = store.put_all([replace(theirs, name="secret")], ground=GROUND, by="ann").new
    assert {one.name for one in store.on_slide(GROUND, author="eve").annotations} == {"", "trap"}
    assert [one.name for one in store.on_slide(GROUND, author="ann").annotations] == ["secret"]
    assert key != expected
    for _ in range(annotations._COPIES - 1):
        (expected,) = store.put_all([theirs], ground=GROUND, by="bob", dry_run=True).new
        store.put(drawn(expected), ground=GROUND, by="eve")
    with pytest.raises(ArchiveError) as error:
        store.put_all([theirs], ground=GROUND, by="bob")
    assert error.value.code == "unknown_annotation"


def test_fragments_are_merged(uri, monkeypatch):
    monkeypatch.setattr(annotations, "MERGE_FROM", 6)
    store = AnnotationStore(uri)
    saved = {store.put(drawn(), ground=GROUND, by="ann").annotation_id for _ in range(8)}
    store.tidy()
    assert len(lance.dataset(f"{uri}/annotations.lance").get_fragments()) == 1
    assert ids(store) == saved
    assert verify(uri).damaged == []


# -- many writers ---------------------------------------------------------------------------------


def test_many_processes_lose_and_double_nothing(either):
    """Every acknowledged save is there once, and no addition to a number they share is lost."""
    names = [f"writer{number}" for number in range(WRITERS)]
    running = [start(either, name, SAVES) for name in names]  # the first makes the table
    told = [process.communicate(timeout=240)[0].split() for process in running]
    assert [process.returncode for process in running] == [0] * WRITERS
    rows = stored(either)
    assert len({row["annotation_id"] for row in rows}) == len(rows) == WRITERS * SAVES + 1
    assert {key for lines in told for key in lines} == {row["annotation_id"] for row in rows}
    shared = next(row for row in rows if row["annotation_id"] == SHARED)
    assert int(shared["name"].split()[0]) == shared["revision"] == WRITERS * SAVES
    assert commits(either) == 2 * WRITERS * SAVES
    assert verify(either).damaged == []


def test_two_that_insert_one_key_make_one_row(either):
    """A request that a proxy repeats to another replica."""
    stores = [AnnotationStore(either) for _ in range(4)]
    stores[0].put(drawn(), ground=GROUND, by="ann")
    for _ in range(5):
        given, found = drawn(), []
        at_once = threading.Barrier(len(stores))

        def save(store, given=given, found=found, at_once=at_once):
            at_once.wait()
            found.append(store.put(given, ground=GROUND, by="ann"))

        threads = [threading.Thread(target=save, args=(store,)) for store in stores]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [one.revision for one in found] == [1] * len(stores)
        assert sum(row["annotation_id"] == given.annotation_id for row in stored(either)) == 1


def test_a_writer_that_is_stopped_in_its_turn_holds_nobody_up_for_long(uri, monkeypatch):
    monkeypatch.setattr(annotation_table, "TURN_S", 0.2)
    store = AnnotationStore(uri)
    store.put(drawn(), ground=GROUND, by="ann")
    with annotation_table.turn(str(uri)):
        saved = store.put(drawn(), ground=GROUND, by="ann")
    assert saved.annotation_id in ids(store)


def test_a_killed_writer_leaves_what_it_was_told_is_saved(uri):
    AnnotationStore(uri).put(drawn(), ground=GROUND, by="ann")
    process = start(uri, "killed", 1000)
    told = {process.stdout.readline().strip() for _ in range(6)}
    process.send_signal(signal.SIGKILL)
    told |= set(process.communicate()[0].split())
    store = AnnotationStore(uri)
    assert told <= ids(store)
    new = store.put(drawn(), ground=GROUND, by="ann")
    assert new.annotation_id in ids(store)
    keys = Counter(row["annotation_id"] for row in stored(uri))
    assert set(keys.values()) == {1}
    assert verify(uri).damaged == []


def test_merging_and_saving_at_once_lose_nothing(uri, monkeypatch):
    monkeypatch.setattr(annotations, "MERGE_FROM", 2)
    store, merging, ended = AnnotationStore(uri), AnnotationStore(uri), threading.Event()
    store.put(drawn(), ground=GROUND, by="ann")

    def merge():
        while not ended.is_set():
            merging.tidy()

    thread = threading.Thread(target=merge)
    thread.start()
    try:
        saved = {store.put(drawn(), ground=GROUND, by="ann").annotation_id for _ in range(12)}
    finally:
        ended.set()
        thread.join()
    assert saved < ids(store)
    assert len(stored(uri)) == 13
    assert verify(uri).damaged == []


def test_writers_on_an_object_store_lose_and_double_nothing(bucket):
    """Commits there are conditional writes, and two processes share no lock at all."""
    uri = f"{bucket}/a"
    cohort.build(uri, 0)
    running = [start(uri, name, 3) for name in ("one", "two")]
    told = [process.communicate(timeout=240)[0].split() for process in running]
    assert [process.returncode for process in running] == [0, 0]
    found = {one.annotation_id: one for one in AnnotationStore(uri).all()}
    assert {key for lines in told for key in lines} == set(found)
    assert len(found) == 7
    assert found[SHARED].revision == int(found[SHARED].name.split()[0]) == 6
    assert verify(uri).damaged == []


# -- beside jobs ----------------------------------------------------------------------------------


def test_a_save_waits_for_no_ingest_and_disturbs_none(either):
    store = AnnotationStore(either)
    saved = [store.put(drawn(), ground=GROUND, by="ann")]
    with Committer(either) as committer:
        with pytest.raises(ArchiveError) as error, ArchiveLock(either):
            pass
        assert error.value.code == "locked"
        for n in (2, 3):
            saved.append(store.put(drawn(), ground=GROUND, by="ann"))
            cohort.commit(committer, n)
            saved.append(store.put(drawn(), ground=GROUND, by="ann"))
            committer.tidy()
        committer.compact()
        saved.append(store.put(drawn(), ground=GROUND, by="ann"))
        committer.index_slides()
    assert store.on_slide(GROUND).annotations == saved
    assert Archive(either).stats()["slides"] == 4
    assert verify(either).damaged == []


def test_saves_go_on_while_a_dead_writers_lease_is_taken(tmp_path, monkeypatch):
    """The taker fences every table it will write; the annotations are none of them."""
    monkeypatch.setattr(lease, "EXPIRES_S", 1.0)
    uri = f"{OBJECT_STORE_ON_DISK}{tmp_path}/a"
    cohort.build(uri, 0)
    store = AnnotationStore(uri)
    saved = {store.put(drawn(), ground=GROUND, by="ann").annotation_id}
    dead = subprocess.Popen(
        [sys.executable, cohort.__file__, uri, "1", "3"], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "LEASE_S": "1.0", "STOP_AT": "regions"},
    )  # fmt: skip
    wait_for_stop(dead)
    dead.send_signal(signal.SIGKILL)
    dead.communicate()
    taken, ended = threading.Event(), threading.Event()

    def take():
        with Committer(uri) as committer:
            taken.set()
            cohort.commit(committer, 1, 2)
        ended.set()

    thread = threading.Thread(target=take)
    thread.start()
    while not ended.is_set():
        saved.add(store.put(drawn(), ground=GROUND, by="ann").annotation_id)
    thread.join()
    assert taken.is_set()
    assert ids(store) == saved
    assert Archive(uri).stats()["slides"] == 3
    assert verify(uri).damaged == []


def test_a_save_makes_no_service_read_the_archive_anew(uri):
    """Snapshots of search are of what jobs write."""
    AnnotationStore(uri).put(drawn(), ground=GROUND, by="ann")
    archive = Archive(uri)
    AnnotationStore(uri).put(drawn(), ground=GROUND, by="ann")
    assert archive.is_newest()
    assert "annotations" not in archive.tables()


def test_a_killed_ingest_takes_no_annotation_with_it(uri):
    """The next one deletes its rows in the other tables."""
    store = AnnotationStore(uri)
    saved = {store.put(drawn(), ground=GROUND, by="ann").annotation_id for _ in range(3)}
    with Committer(uri) as committer:
        rows = cohort.region_rows(9)
        transactions.append(committer.lock, committer._shard("regions", rows, ["slide009"]))
    with Committer(uri) as committer:
        assert committer.recovered == {"regions": cohort.REGIONS}
    assert ids(store) == saved


def test_maintain_merges_digests_and_forgets(uri):
    store = AnnotationStore(uri)
    saved = {store.put(drawn(), ground=GROUND, by="ann").annotation_id for _ in range(5)}
    assert maintain(uri)["fragments"]["annotations"] == 1
    assert ids(store) == saved
    saved.add(store.put(drawn(), ground=GROUND, by="ann").annotation_id)
    report = verify(uri)
    assert (report.damaged, report.notes) == ([], [])
    maintain(uri)
    assert ids(store) == saved


# -- slides that change ---------------------------------------------------------------------------


def regrown(uri: Path, **changes: object) -> None:
    """Ingest slide 0 again with other columns."""
    with Committer(uri) as committer:
        rows = cohort.slide_rows(0, fingerprint="other").to_pylist()[0]
        committer.update_slides({"slide000": {"fingerprint": rows["fingerprint"]} | changes})


def grounds(uri: Path) -> dict[str, Ground]:
    return Ground.all(Archive(uri))


def test_another_mpp_leaves_drawings_where_they_are(uri):
    regrown(uri, sha256=GROUND.sha256, width=4000, height=3000)
    store = AnnotationStore(uri)
    saved = store.put(drawn(), ground=grounds(uri)["slide000"], by="ann")
    with Committer(uri) as committer:
        cohort.commit(committer, 0, fingerprint="finer")  # rewritten: its computed rows go
    regrown(uri, mpp=0.9, sha256=GROUND.sha256)
    assert store.on_slide(grounds(uri)["slide000"]).annotations == [saved]


def test_other_pixels_under_the_same_id_make_them_outdated_until_they_are_saved_again(uri):
    regrown(uri, sha256=GROUND.sha256)
    store = AnnotationStore(uri)
    saved = store.put(drawn(), ground=grounds(uri)["slide000"], by="ann")
    regrown(uri, sha256="c" * 64)
    now = grounds(uri)["slide000"]
    found = store.on_slide(now)
    assert (found.annotations, found.outdated) == ([], [saved])
    again = store.put(saved, ground=now, by="ann")
    assert store.on_slide(now).annotations == [again]
    assert (again.revision, again.sha256) == (2, "c" * 64)


def test_a_slide_that_is_gone_keeps_its_drawings_for_the_same_bytes_under_another_id(uri):
    regrown(uri, sha256=GROUND.sha256)
    store = AnnotationStore(uri)
    saved = store.put(drawn(), ground=grounds(uri)["slide000"], by="ann")
    with Committer(uri) as committer:
        committer.drop_slides(["slide000"])
    assert store.all() == [saved]
    assert verify(uri).damaged == []
    moved = Ground(slide_id="renamed", sha256=GROUND.sha256)
    assert store.on_slide(moved).annotations == [saved]
    again = store.put(replace(saved, name="here", slide_id="renamed"), ground=moved, by="ann")
    assert (again.slide_id, again.revision) == ("renamed", 2)


def test_export_writes_those_of_slides_that_are_there(uri, tmp_path):
    store = AnnotationStore(uri)
    saved = store.put(drawn(), ground=GROUND, by="ann")
    gone = Ground(slide_id="gone", sha256="d" * 64)
    store.put(drawn(ground=gone), ground=gone, by="ann")
    assert export_parquet(Archive(uri), tmp_path / "out")["annotations"] == 1
    rows = pq.read_table(tmp_path / "out/annotations").to_pylist()
    assert [row["annotation_id"] for row in rows] == [saved.annotation_id]


# -- damage ---------------------------------------------------------------------------------------


def test_a_flipped_bit_is_found_and_costs_its_row_alone(uri):
    store = AnnotationStore(uri)
    given = [drawn(name=f"number {n}") for n in range(20)]
    store.put_all(given, ground=GROUND, by="ann")
    path = max((uri / "annotations.lance/data").iterdir(), key=lambda p: p.stat().st_mtime_ns)
    flip(path, path.read_bytes().index(b"number 7") + 7, 0)
    found = [(d.table, d.kind, d.id) for d in verify(uri).damaged]
    assert found == [("annotations", "row", given[7].annotation_id)]
    assert repair(uri).report.damaged == []
    left = {one.annotation_id for one in given} - {given[7].annotation_id}
    assert ids(AnnotationStore(uri)) == left
    AnnotationStore(uri).put(drawn(), ground=GROUND, by="ann")


def test_a_digested_file_is_told_by_its_digest(uri):
    AnnotationStore(uri).put_all([drawn() for _ in range(4)], ground=GROUND, by="ann")
    maintain(uri)
    files = lance.dataset(f"{uri}/annotations.lance").get_fragments()[0].data_files()
    path = uri / "annotations.lance/data" / files[0].path
    flip(path, path.stat().st_size // 2, 3)
    assert ("annotations", "file") in {(d.table, d.kind) for d in verify(uri).damaged}
    assert repair(uri).report.damaged == []
    AnnotationStore(uri).put(drawn(), ground=GROUND, by="ann")


@pytest.mark.parametrize("harm", ["zeroed", "gone"])
def test_a_lost_manifest_is_refused_and_mended(uri, harm):
    store = AnnotationStore(uri)
    first = store.put(drawn(), ground=GROUND, by="ann")
    store.put(drawn(), ground=GROUND, by="ann")
    path = newest_manifest(uri, "annotations")
    path.write_bytes(b"\0" * path.stat().st_size) if harm == "zeroed" else path.unlink()
    for attempt in (
        lambda: AnnotationStore(uri).on_slide(GROUND),
        lambda: AnnotationStore(uri).put(drawn(), ground=GROUND, by="ann"),
    ):
        with pytest.raises(ArchiveError) as error:
            attempt()
        assert error.value.code == "damaged"
    Archive(uri).regions()  # the rest of the archive is as well as ever
    assert any(d.table == "annotations" for d in verify(uri).damaged)
    assert repair(uri).report.damaged == []
    assert ids(AnnotationStore(uri)) == {first.annotation_id}
    AnnotationStore(uri).put(drawn(), ground=GROUND, by="ann")


def test_a_table_of_which_nothing_opens_is_made_anew(uri):
    AnnotationStore(uri).put(drawn(), ground=GROUND, by="ann")
    for path in (uri / "annotations.lance/_versions").glob("*.manifest"):
        path.write_bytes(b"")
    assert repair(uri).report.damaged == []
    assert AnnotationStore(uri).put(drawn(), ground=GROUND, by="ann").revision == 1
    assert verify(uri).damaged == []


def test_a_lost_counter_is_damage_and_comes_back(uri):
    store = AnnotationStore(uri)
    saved = store.put(drawn(), ground=GROUND, by="ann")
    lance.dataset(f"{uri}/annotations.lance").delete("annotation_id = ''")
    with pytest.raises(ArchiveError, match="counts commits"):
        store.put(drawn(), ground=GROUND, by="ann")
    assert [(d.table, d.kind) for d in verify(uri).damaged] == [("annotations", "missing")]
    assert repair(uri).report.damaged == []
    store.put(drawn(), ground=GROUND, by="ann")
    assert saved.annotation_id in ids(store)
