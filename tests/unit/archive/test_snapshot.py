"""A long-lived process sees what was committed, when it is due, and nothing half."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from pathflip.archive import Archive
from pathflip.archive.commit import Committer
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

        broken.setattr("pathflip.archive.snapshot.Archive", fail)
        with pytest.raises(ArchiveError, match="does not answer"):
            snapshot.newest()
        assert sorted(snapshot.archive.ledger()) == ["slide000"]
    assert sorted(snapshot.newest().ledger()) == ["slide000", "slide001"]


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
