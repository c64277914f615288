"""A long-lived process sees what was committed, when it is due, and nothing half."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from pathflip.archive import Archive, transactions
from pathflip.archive.commit import Committer
from pathflip.archive.lock import ArchiveLock
from pathflip.archive.snapshot import ArchiveSnapshot, ready_row
from pathflip.errors import ArchiveError
from tests.unit.archive import cohort, models


@pytest.fixture
def uri(tmp_path: Path) -> Path:
    cohort.build(tmp_path / "a", 0)
    return tmp_path / "a"


def commit(uri: Path, number: int) -> None:
    with Committer(uri) as committer:
        cohort.commit(committer, number)


def test_a_commit_is_seen_when_it_is_due_and_the_old_state_stays(uri: Path) -> None:
    patient, eager = ArchiveSnapshot(uri, refresh_s=3600), ArchiveSnapshot(uri, refresh_s=-1)
    before = eager.newest()
    assert eager.newest() is before  # nothing new: what it has cached stays
    commit(uri, 1)
    assert sorted(patient.newest().ledger()) == ["slide000"]
    assert sorted(eager.newest().ledger()) == ["slide000", "slide001"]
    assert sorted(before.ledger()) == ["slide000"]
    assert before.embeddings().num_rows == cohort.REGIONS + 1


def test_a_model_that_is_indexed_later_is_seen(uri: Path) -> None:
    """Its table is new: the service may be started before ``pathflip index``."""
    snapshot = ArchiveSnapshot(uri, refresh_s=-1)
    assert snapshot.newest().models() == {}
    with Committer(uri) as committer:
        models.add(committer, 0)
    assert list(snapshot.newest().models()) == [models.MODEL]


def test_a_state_from_the_midst_of_a_commit_knows_that_it_is_old(
    uri: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Digests of new files come first: a state that has them may lack what they are of."""
    register, states = transactions.register, []

    def look(lock: ArchiveLock, files: Mapping[str, tuple[str, int]]) -> None:
        register(lock, files)
        states.append(Archive(uri))

    with Committer(uri) as committer, monkeypatch.context() as watched:
        watched.setattr(transactions, "register", look)
        committer.ensure_encoder_table("later", revision="1", dim=4, mpp=0.5, licence="MIT")
    assert states
    assert "later" not in states[-1].encoders()
    assert not states[-1].is_newest()
    assert "later" in states[-1].successor().encoders()


def test_one_looks_and_the_others_go_on(uri: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = ArchiveSnapshot(uri, refresh_s=-1)
    before, looks = snapshot.archive, []
    entered, leave = threading.Event(), threading.Event()

    def look(archive: Archive) -> bool:
        looks.append(archive)
        entered.set()
        assert leave.wait(30)
        return True

    monkeypatch.setattr(Archive, "is_newest", look)

    async def ask() -> list[Any]:
        first = asyncio.create_task(snapshot.newest_async())
        assert await asyncio.to_thread(entered.wait, 30)
        others = [await snapshot.newest_async(), snapshot.newest()]  # while the first still looks
        leave.set()
        return [*others, await first]

    assert asyncio.run(ask()) == [before] * 3
    assert looks == [before]


def test_a_look_that_fails_is_made_again(uri: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = ArchiveSnapshot(uri, refresh_s=-1)
    commit(uri, 1)
    with monkeypatch.context() as broken:

        def fail(*_: Any) -> Archive:
            raise ArchiveError("The store does not answer.")

        broken.setattr(Archive, "successor", fail)
        with pytest.raises(ArchiveError, match="does not answer"):
            snapshot.newest()
        assert sorted(snapshot.archive.ledger()) == ["slide000"]
    assert sorted(snapshot.newest().ledger()) == ["slide000", "slide001"]


class Clock(SimpleNamespace):
    """Time of the module under test, moved by hand."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("pathflip.archive.snapshot.time", made)
    return made


def until(true: Any) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_next_state_is_warmed_before_it_is_used(uri: Path, clock: Clock) -> None:
    entered, leave, warmed = threading.Event(), threading.Event(), []

    def warm(archive: Archive) -> None:
        warmed.append(sorted(archive.ledger()))
        entered.set()
        assert leave.wait(60)

    snapshot = ArchiveSnapshot(uri, refresh_s=30, warm=warm)
    commit(uri, 1)
    clock.now = 14
    assert sorted(snapshot.newest().ledger()) == ["slide000"]
    assert not entered.is_set()
    clock.now = 16  # half of the time is over: somebody looks, and nobody waits for it
    assert sorted(snapshot.newest().ledger()) == ["slide000"]
    assert entered.wait(60)
    assert sorted(snapshot.newest().ledger()) == ["slide000"]
    leave.set()
    until(lambda: len(snapshot.newest().ledger()) == 2)
    assert warmed == [["slide000", "slide001"]]


def test_a_removed_slide_is_gone_in_time_however_long_warming_takes(
    uri: Path, clock: Clock
) -> None:
    entered, leave = threading.Event(), threading.Event()

    def warm(_: Archive) -> None:
        entered.set()
        assert leave.wait(60)

    snapshot = ArchiveSnapshot(uri, refresh_s=30, warm=warm)
    with Committer(uri) as committer:
        committer.commit(slides=cohort.slide_rows(0, status="quarantined", fingerprint="g"))
    clock.now = 20
    assert ready_row(snapshot.newest(), "slide000")
    assert entered.wait(60)
    clock.now = 31  # as old as may be, and still warming
    with pytest.raises(ArchiveError, match="There is no such slide"):
        ready_row(snapshot.newest(), "slide000")
    leave.set()


def test_who_comes_after_a_pause_is_told_of_all_that_was_committed(uri: Path, clock: Clock) -> None:
    snapshot = ArchiveSnapshot(uri, refresh_s=30)
    commit(uri, 1)
    clock.now = 3600
    assert sorted(snapshot.newest().ledger()) == ["slide000", "slide001"]


def test_warming_that_fails_keeps_nobody_from_the_next_state(uri: Path, clock: Clock) -> None:
    def warm(_: Archive) -> None:
        raise ValueError("no query")

    snapshot = ArchiveSnapshot(uri, refresh_s=30, warm=warm)
    commit(uri, 1)
    clock.now = 20
    until(lambda: len(snapshot.newest().ledger()) == 2)


def test_a_look_aside_that_fails_is_made_again_by_who_needs_it(
    uri: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = ArchiveSnapshot(uri, refresh_s=30)
    commit(uri, 1)
    tried = threading.Event()

    def fail(_: Archive) -> bool:
        tried.set()
        raise ArchiveError("The store does not answer.")

    with monkeypatch.context() as broken:
        broken.setattr(Archive, "is_newest", fail)
        clock.now = 20
        assert sorted(snapshot.newest().ledger()) == ["slide000"]  # old enough to be true still
        assert tried.wait(60)
        until(lambda: not snapshot._looking.locked())
        clock.now = 31
        with pytest.raises(ArchiveError, match="does not answer"):
            snapshot.newest()
    assert sorted(snapshot.newest().ledger()) == ["slide000", "slide001"]


def test_what_is_known_of_tables_that_did_not_change_stays(uri: Path) -> None:
    with Committer(uri) as committer:
        table = models.add(committer, 0)
    before = Archive(uri)
    made: Counter[str] = Counter()
    tables = {"vectors": (table,), "slides": ("slides",), "both": (table, "slides"), "all": None}

    def know(archive: Archive) -> dict[str, int]:
        for name, of in tables.items():
            archive.cached(name, lambda name=name: made.update([name]), of=of)
        return dict(made)

    assert know(before) == dict.fromkeys(tables, 1)
    commit(uri, 1)
    after = before.successor()
    assert know(after) == {"vectors": 1, "slides": 2, "both": 2, "all": 2}
    assert know(before) == know(after)  # the old state has what it had
    assert (len(before.ledger()), len(after.ledger())) == (1, 2)
    with Committer(uri) as committer:
        models.add(committer, 1)
    assert know(after.successor()) == {"vectors": 2, "slides": 2, "both": 3, "all": 3}


def test_queries_may_learn_more_while_the_next_state_is_opened(uri: Path) -> None:
    """Threads answer from the old state meanwhile, and keep what they compute."""
    before = Archive(uri)

    class Tables(tuple[str, ...]):
        def __iter__(self) -> Any:
            before.cached(f"at {len(before._cache)}", lambda: 1, of=("slides",))
            return super().__iter__()

    before.cached("first", lambda: 1, of=Tables(["slides"]))
    before.cached("second", lambda: 2, of=("slides",))
    after = before.successor()
    assert after.cached("second", lambda: 3, of=("slides",)) == 2


def test_what_a_slide_is_made_of_has_one_digest_until_it_is_written_anew(uri: Path) -> None:
    first = Archive(uri)
    written = first.written("slide000", "tex")
    commit(uri, 1)
    second = first.successor()
    assert second.written("slide000", "tex") == written  # another slide was added
    assert second.written("slide001", "tex") != written
    features = second.encoders()["tex"]["features_table"]
    rows = cohort.feature_rows(0)
    other = pa.array([[2.0] * len(row) for row in rows["features"].to_pylist()])
    at = rows.schema.get_field_index("features")
    with Committer(uri) as committer:
        committer.replace_rows(
            features, rows.set_column(at, "features", other.cast(rows.schema.field(at).type))
        )
    third = second.successor()
    assert third.written("slide000", "tex") != written
    assert third.written("slide001", "tex") == second.written("slide001", "tex")


def test_slides_go_by_their_id_alone(uri: Path) -> None:
    with Committer(uri) as committer:
        committer.commit(slides=cohort.slide_rows(7, status="quarantined"))
    archive = Archive(uri)
    assert ready_row(archive, "slide000")["fingerprint"] == "f0"
    assert archive.resolve("it's 0") == "slide000"  # a file's name, to those who own the archive
    for name in ("it's 0", "slide007", "nobody"):
        with pytest.raises(ArchiveError, match="There is no such slide") as error:
            ready_row(archive, name)
        assert error.value.code == "unknown_slide"
