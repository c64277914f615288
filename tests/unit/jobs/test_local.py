"""Actors in processes of this machine: all rows come back, whatever dies; without Ray."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs import local
from jobs.stages import ActorPool, ended
from pathflip.errors import EncoderError, PathFLIPError
from tests import faults
from tests.actors import Count, Doubler, Late, Refuses, Twice


def made(rows: list[dict[str, str]], *pools: ActorPool, cpus: int = 2, gpus: int = 0) -> Any:
    rows = [{"fault": "", **row} for row in rows]
    tables = local.run(rows, pools, cpus=cpus, gpus=gpus)
    return sorted((row for table in tables for row in table.to_pylist()), key=lambda row: row["n"])


def numbers(*values: int) -> list[dict[str, str]]:
    return [{"n": str(value)} for value in values]


def test_rows_go_through_both_stages_in_processes_without_ray(tmp_path: Path) -> None:
    cut = ActorPool(actor=Twice, arguments=(), waits=True)
    double = ActorPool(actor=Doubler, arguments=(tmp_path,), shared=Count, most=2)
    rows = made(numbers(*range(10)), cut, double)
    assert [row["n"] for row in rows] == [2 * n for n in range(10) for _ in range(2)]
    assert {row["heavy"] for row in rows} == {False}
    assert {row["gpu"] for row in rows} == {""}, "no actor without one sees a GPU"
    pids = {row["pid"] for row in rows}
    assert os.getpid() not in pids
    assert 1 <= len(pids) <= 2
    assert sorted(row["seen"] for row in rows) == list(range(1, 21)), "all share one object"
    assert not any(map(faults.alive, pids))


def test_a_process_that_dies_costs_no_rows(tmp_path: Path) -> None:
    rows = [*numbers(1, 2), {"n": "3", "fault": "die2"}, *numbers(4)]
    found = made(rows, ActorPool(actor=Doubler, arguments=(tmp_path,), most=1))
    assert [row["n"] for row in found] == [2, 4, 6, 8]
    assert len((tmp_path / "3").read_text().splitlines()) == 2


def test_what_a_process_made_before_it_died_is_not_there_twice(tmp_path: Path) -> None:
    """A slide that came back twice would be committed twice, or wait for chunks for ever."""
    found = made(numbers(*range(6)), ActorPool(actor=Late, arguments=(tmp_path,), at_once=3))
    assert len(list(tmp_path.iterdir())) == 1
    assert [row["n"] for row in found] == list(range(6))


@pytest.mark.parametrize("at", ["made", "called"])
@pytest.mark.parametrize("waits", [True, False])
def test_an_error_with_a_name_keeps_it(at: str, waits: bool) -> None:
    with pytest.raises(EncoderError, match=r"No weights\.") as raised:
        made(numbers(1), ActorPool(actor=Refuses, arguments=(at,), waits=waits))
    assert (raised.value.code, raised.value.hint) == ("gated", "Get them.")


def test_rows_that_kill_every_process_end_the_job(tmp_path: Path) -> None:
    pool = ActorPool(actor=Doubler, arguments=(tmp_path,), most=1, deaths=2)
    with pytest.raises(PathFLIPError, match="3 processes died one after the other") as raised:
        made([*numbers(1), {"n": "2", "fault": "die99"}], pool)
    assert raised.value.code == "workers_died"
    assert len((tmp_path / "2").read_text().splitlines()) == 3


def test_a_fault_of_our_own_shows_its_traceback(tmp_path: Path) -> None:
    pool = ActorPool(actor=Doubler, arguments=(tmp_path,))
    with pytest.raises(RuntimeError, match=r"(?s)actors.py.*ValueError: No such number\."):
        made([{"n": "1", "fault": "raise"}], pool)


def test_an_actor_that_cannot_be_made_shows_why() -> None:
    with pytest.raises(RuntimeError, match="missing 1 required positional argument"):
        made(numbers(1), ActorPool(actor=Doubler, arguments=()))


@pytest.mark.parametrize(
    ("given", "seen"),
    [(None, {"0", "1"}), ("3,5", {"3", "5"}), ("GPU-a,GPU-b", {"GPU-a", "GPU-b"})],
)
def test_every_actor_has_a_gpu_of_its_own(
    given: str | None, seen: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if given is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    pool = ActorPool(actor=Doubler, arguments=(tmp_path,), num_gpus=1.0)
    rows = made([*numbers(1, 2), {"n": "3", "fault": "die1"}, *numbers(4, 5)], pool, gpus=2)
    assert [row["n"] for row in rows] == [2, 4, 6, 8, 10]
    assert {row["gpu"] for row in rows} <= seen


def test_two_actors_share_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    pool = ActorPool(actor=Doubler, arguments=(tmp_path,), num_gpus=0.5, first=4)
    rows = made([*numbers(*range(7)), {"n": "7", "fault": "die1"}], pool, gpus=2)
    assert [row["n"] for row in rows] == [0, 2, 4, 6, 8, 10, 12, 14]
    gpus = {row["pid"]: row["gpu"] for row in rows}
    assert set(gpus.values()) <= {"0", "1"}
    assert len(gpus) > 2, "more actors than GPUs"


def test_processes_end_with_whoever_reads(tmp_path: Path) -> None:
    """The reader is interrupted; its traceback, which a notebook keeps, keeps no process."""
    pool = ActorPool(actor=Doubler, arguments=(tmp_path,), most=1)
    rows = [{"fault": "", **row} for row in numbers(*range(5))]
    tables: Iterator[Any] = local.run(rows, [pool], cpus=1, gpus=0)
    with pytest.raises(KeyboardInterrupt) as kept:
        read_one(tables)
    (pid,) = kept.value.args
    assert not faults.alive(pid)


def read_one(tables: Iterator[Any]) -> None:
    with ended(tables):
        for table in tables:
            (pid,) = table["pid"].to_pylist()
            assert faults.alive(pid)
            raise KeyboardInterrupt(pid)
