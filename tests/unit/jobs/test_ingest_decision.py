"""Decisions of ingest: tables of the state found and the row stored."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from jobs.ingest.candidates import Candidate
from jobs.ingest.decision import (
    Attempts,
    conclude,
    identify,
    is_spared,
    quarantine,
    relocate,
    same_cut,
    stale_slides,
)
from jobs.ingest.result import IngestResult
from jobs.ingest.rows import CHUNK_SCHEMA, Chunk, Held, SlideRecord, from_table, to_table
from pathflip.errors import SlideError
from pathflip.slides.sources import Source

SHA = "0123456789abcdef" * 4
FOUND = SlideRecord(slide_id="a-12345678", uri="/in/a.svs", bytes=10, mtime_ns=5)
PLANNED = replace(FOUND, sha256=SHA, mpp=0.5, planned_patches=1000)


def at(uri: str) -> Source:
    return Source(uri=uri, bytes=7, mtime_ns=9)


def chunk(**counted: Any) -> SlideRecord:
    return replace(PLANNED, **counted)


# -- the whole slide -------------------------------------------------------------------------------

CRASHED = quarantine(
    chunk(attempts=3), SlideError("It died.", hint="Copy it.", code="reader_crash"), stage="read"
)
CASES: dict[str, tuple[list[SlideRecord], int, tuple[str, str | None]]] = {
    "all good": ([chunk(tiles_ok=1000)], 4, ("ready", None)),
    "good in parts": ([chunk(tiles_ok=600), chunk(tiles_ok=400)], 4, ("ready", None)),
    "a hundredth is bad": ([chunk(tiles_ok=990, tiles_bad=10)], 4, ("ready", None)),
    "one more is bad": (
        [chunk(tiles_ok=989, tiles_bad=11)],
        4,
        ("quarantined", "too_many_bad_tiles"),
    ),
    "bad in parts": (
        [chunk(tiles_ok=494, tiles_bad=6), chunk(tiles_ok=495, tiles_bad=5)],
        4,
        ("quarantined", "too_many_bad_tiles"),
    ),
    "four of few are bad": (
        [chunk(planned_patches=9, tiles_ok=5, tiles_bad=4)],
        1,
        ("ready", None),
    ),
    "five of few are bad": (
        [chunk(planned_patches=9, tiles_ok=4, tiles_bad=5)],
        1,
        ("quarantined", "too_many_bad_tiles"),
    ),
    "all of few are bad": (
        [chunk(planned_patches=3, tiles_bad=3)],
        0,
        ("quarantined", "too_many_bad_tiles"),
    ),
    "mostly not finite": (
        [chunk(tiles_bad=12, not_finite=7)],
        4,
        ("quarantined", "bad_features"),
    ),
    "half not finite": (
        [chunk(tiles_bad=12, not_finite=6)],
        4,
        ("quarantined", "too_many_bad_tiles"),
    ),
    "few not finite": ([chunk(tiles_ok=995, tiles_bad=5, not_finite=5)], 4, ("ready", None)),
    "empty": ([replace(FOUND, status="empty", message="None.")], 0, ("empty", None)),
    "failed at once": (
        [quarantine(FOUND, SlideError("No.", code="needs_mpp"), stage="plan")],
        0,
        ("quarantined", "needs_mpp"),
    ),
    "one chunk failed": (
        [chunk(tiles_ok=500), CRASHED],
        2,
        ("quarantined", "reader_crash"),
    ),
    "chunks after the failure were left": (
        [CRASHED, chunk(status="unread")],
        0,
        ("quarantined", "reader_crash"),
    ),
    "another chunk than the first failed": (
        [chunk(status="unread"), CRASHED],
        0,
        ("quarantined", "reader_crash"),
    ),
    "failed, and too much is bad": (
        [chunk(tiles_bad=500), CRASHED],
        0,
        ("quarantined", "reader_crash"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_slide_is_concluded_from_its_chunks(case: str) -> None:
    chunks, regions, (status, reason) = CASES[case]
    record = conclude(chunks, regions=regions, max_bad_tiles=0.01)
    assert (record.status, record.reason) == (status, reason)
    assert (record.message is None) == (status == "ready")
    assert (record.stage is None) == (status != "quarantined")


def test_counts_of_chunks_add_up_and_attempts_do_not() -> None:
    chunks = [
        chunk(tiles_ok=90, tiles_bad=2, not_finite=1, attempts=1, seconds=1.5),
        chunk(tiles_ok=80, tiles_bad=1, not_finite=0, attempts=3, seconds=2.0),
    ]
    record = conclude(chunks, regions=2, max_bad_tiles=0.01)
    assert (record.tiles_ok, record.tiles_bad, record.not_finite) == (170, 3, 1)
    assert (record.attempts, record.seconds) == (3, 3.5)


def test_a_message_says_how_many_of_which_slide() -> None:
    record = conclude([chunk(tiles_bad=30)], regions=1, max_bad_tiles=0.02)
    assert record.message is not None
    assert "30 of 1000 patches of a.svs" in record.message
    assert conclude([chunk(tiles_bad=20)], regions=1, max_bad_tiles=0.02).status == "ready"


def test_a_bad_tile_is_too_many_where_it_ends_the_slide() -> None:
    record = quarantine(FOUND, SlideError("Tile 3.", hint="Copy.", code="bad_tile"), stage="read")
    assert (record.status, record.reason, record.stage) == (
        "quarantined", "too_many_bad_tiles", "read",
    )  # fmt: skip
    assert record.message == "Tile 3. Copy."


# -- attempts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "made", "final"),
    [
        ("reader_crash", 1, False),
        ("timeout", 2, False),
        ("reader_crash", 3, True),
        ("unreadable", 1, True),
        ("source_changed", 1, True),
        ("bad_tile", 1, True),
    ],
)
def test_only_what_the_reader_did_is_tried_again(code: str, made: int, final: bool) -> None:
    attempts, error = Attempts(limit=3, made=made), SlideError("It.", code=code)
    if not final:
        attempts.retry_or_raise(error)
        assert attempts.made == made + 1
        return
    with pytest.raises(SlideError) as raised:
        attempts.retry_or_raise(error)
    assert raised.value is error
    assert attempts.made == made


# -- copies ----------------------------------------------------------------------------------------

OLD = Held(slide_id="old-name-01234567", mpp=0.5, outline="mask", complete=True)


@pytest.mark.parametrize(
    ("held", "mpp", "named", "status", "extends"),
    [
        (None, None, "a-01234567", "ready", False),
        (OLD, None, OLD.slide_id, "duplicate", False),
        (replace(OLD, complete=False), None, OLD.slide_id, "ready", True),
        (OLD, 0.25, OLD.slide_id, "ready", False),  # cut anew, under its id
        (replace(OLD, complete=False), 0.25, OLD.slide_id, "ready", False),
    ],
)
def test_a_file_is_what_its_content_is(
    held: Held | None, mpp: float | None, named: str, status: str, extends: bool
) -> None:
    candidate = Candidate(source=at(FOUND.uri), mpp=mpp)
    record = identify(FOUND, candidate=candidate, sha256=SHA, held=held)
    assert (record.slide_id, record.status, record.extends) == (named, status, extends)
    assert (record.sha256, record.outline, record.uri) == (SHA, "mask", FOUND.uri)


@pytest.mark.parametrize(
    ("mpp", "outline", "held", "same"),
    [
        (None, "mask", OLD, True),
        (0.5, "mask", OLD, True),
        (0.25, "mask", OLD, False),
        (0.5, "mask", replace(OLD, mpp=None), False),
        (None, "abc", OLD, False),
        (None, "abc", replace(OLD, outline="abc"), True),
        (None, "mask", replace(OLD, outline="abc"), True),  # no outline given: the old one stands
    ],
)
def test_the_cut_is_the_same_unless_something_else_is_asked_for(
    mpp: float | None, outline: str, held: Held, same: bool
) -> None:
    assert same_cut(Candidate(source=at("/in/a.svs"), mpp=mpp, outline=outline), held) == same


@pytest.mark.parametrize(
    ("status", "stored", "spared"),
    [
        ("quarantined", {"status": "ready", "sha256": SHA}, True),
        ("quarantined", {"status": "ready", "sha256": "other"}, False),
        ("quarantined", {"status": "quarantined", "sha256": SHA}, False),
        ("quarantined", None, False),
        ("ready", {"status": "ready", "sha256": SHA}, False),
        ("empty", {"status": "ready", "sha256": SHA}, False),
    ],
)
def test_a_failure_does_not_cost_a_good_slide_of_the_same_bytes(
    status: Any, stored: dict[str, Any] | None, spared: bool
) -> None:
    assert is_spared(replace(PLANNED, status=status), stored) == spared


# -- paths -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("aliases", "confirmed", "vacated", "uri", "now"),
    [
        ([], ["/a"], False, "/a", []),  # touched
        ([], ["/b"], False, None, ["/b"]),  # a copy of what is still there
        ([], ["/b"], True, "/b", []),  # moved
        ([], ["/b", "/c"], True, "/b", ["/c"]),
        ([], ["/b", "/a"], True, "/a", ["/b"]),
        (["/b"], ["/b"], True, "/b", []),  # gone, but for its copy
        (["/c"], ["/b"], False, None, ["/b", "/c"]),
        (None, ["/a"], False, "/a", []),
    ],
)
def test_a_slide_lies_where_its_content_was_found(
    aliases: list[str] | None, confirmed: list[str], vacated: bool, uri: str | None, now: list[str]
) -> None:
    row = {"uri": "/a", "aliases": aliases}
    found = relocate(row, confirmed=[at(one) for one in confirmed], vacated=vacated)
    assert found.pop("aliases") == now
    assert found == ({} if uri is None else {"uri": uri, "bytes": 7, "mtime_ns": 9})


def test_a_slide_nobody_saw_stays_where_it_is() -> None:
    assert relocate({"uri": "/a", "aliases": ["/b"]}, confirmed=[], vacated=True) == {}


@pytest.mark.parametrize(
    ("states", "confirmed", "stale"),
    [
        ([("old", "ready"), ("new", "ready")], {"new"}, ["old"]),
        ([("old", "ready"), ("new", "quarantined")], set(), []),  # what it held may still be good
        ([("old", "quarantined"), ("new", "ready")], set(), ["old"]),
        ([("old", "quarantined"), ("new", "quarantined")], set(), ["old"]),
        ([("old", "ready"), ("new", "ready")], {"old"}, ["new"]),  # put back
        ([("old", "ready"), ("mid", "empty"), ("new", "ready")], set(), ["old", "mid"]),
        ([("one", "ready")], set(), []),
    ],
)
def test_of_each_path_its_last_state_stays(
    states: list[tuple[str, str]], confirmed: set[str], stale: list[str]
) -> None:
    rows = [
        {
            "slide_id": name,
            "uri": "/a",
            "status": status,
            "ingested_at": datetime(2025, 1, 1 + day, tzinfo=UTC),
        }
        for day, (name, status) in enumerate(states)
    ]
    other = {**rows[0], "slide_id": "other", "uri": "/b"}
    assert stale_slides([*reversed(rows), other], confirmed=confirmed) == stale


# -- rows ------------------------------------------------------------------------------------------


def test_a_chunk_comes_back_from_a_table_as_it_was() -> None:
    full = Chunk(
        record=replace(
            PLANNED, aliases=("/in/ä.svs", "/in/c\udcff.svs"), error={"kind": "ArchiveError"}
        ),
        chunk=1,
        n_chunks=2,
        tissue_png=b"\x89PNG",
        regions=b"\0\1",
        embeddings=(b"a", b""),
        sums=(b"\0" * 8,),
        fragments=(("{}",), ()),
    )
    bare = Chunk(record=FOUND)
    table = to_table([full, bare])
    assert table.schema == CHUNK_SCHEMA
    assert from_table(table) == [full, bare]


@pytest.mark.parametrize(
    ("counts", "code"),
    [
        ({"ready": 2}, 0),
        ({"ready": 1, "empty": 3}, 0),
        ({"skipped": 1, "empty": 3}, 0),
        ({"empty": 3}, 3),  # a whole folder without tissue is no success
        ({"ready": 1, "quarantined": 1}, 3),
        ({}, 0),
    ],
)
def test_exit_code(counts: dict[str, int], code: int) -> None:
    slides = {"ready": 0, "quarantined": 0, "empty": 0, "skipped": 0} | counts
    assert IngestResult(slides=slides, regions=0, patches=0, seconds=1.0).exit_code == code
