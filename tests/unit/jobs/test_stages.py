"""Stages of jobs without Ray: errors that are carried, the machines there are, dying processes."""

from __future__ import annotations

import json
import sys

import pyarrow as pa
import pytest
import ray

from jobs import cluster
from jobs.cluster import Place, available
from jobs.stages import Carrier
from jobs.worker import from_ipc
from pathflip.errors import ArchiveError, CheckpointError, ConfigError, from_dict


class Doubler:
    """Doubles numbers; cannot read some of them."""

    def __init__(self, fault: str) -> None:
        if fault == "model":
            raise CheckpointError("There is no model.", hint="Train one.", code="missing")

    def __call__(self, rows: list[dict[str, str]]) -> pa.Table:
        if any(row["n"] == "bad" for row in rows):
            raise ArchiveError("Row 3 is damaged.", hint="Repair it.", code="damaged")
        return pa.table({"n": [2 * int(row["n"]) for row in rows]})


def rows(*values: str) -> pa.Table:
    return pa.table({"n": list(values)})


def test_tables_of_an_actor_are_carried() -> None:
    (row,) = Carrier(Doubler, ("",))(rows("1", "2")).to_pylist()
    assert row["error"] == ""
    assert from_ipc(row["table"]).to_pylist() == [{"n": 2}, {"n": 4}]


def test_an_error_is_carried_and_costs_only_its_rows() -> None:
    carrier = Carrier(Doubler, ("",))
    (row,) = carrier(rows("bad")).to_pylist()
    found = from_dict(json.loads(row["error"]))
    assert isinstance(found, ArchiveError)
    assert (found.code, found.hint) == ("damaged", "Repair it.")
    (row,) = carrier(rows("1")).to_pylist()
    assert row["error"] == ""


def test_an_actor_that_cannot_be_made_says_so_for_every_row() -> None:
    carrier = Carrier(Doubler, ("model",))
    for _ in range(2):
        (row,) = carrier(rows("1")).to_pylist()
        assert isinstance(from_dict(json.loads(row["error"])), CheckpointError)


def test_faults_of_our_own_are_not_carried() -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        Carrier(Doubler, ("",))(rows("x"))


@pytest.mark.parametrize(
    ("device", "gpus", "place", "use_gpu", "seen"),
    [
        ("auto", 0, "ray", False, 0),
        ("auto", 2, "ray", True, 2),
        ("auto", 2, "local", True, 2),
        ("auto", 0, "cluster", False, 0),
        ("cpu", 2, "ray", False, 0),
        ("cpu", 2, "local", False, 0),
        ("cuda", 2, "local", True, 2),
        ("cuda", 0, "cluster", True, 0),  # a cluster may grow
    ],
)
def test_what_a_job_may_use(
    device: str, gpus: int, place: Place, use_gpu: bool, seen: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 3.0, "GPU": float(gpus)})
    monkeypatch.setattr(cluster, "cpus_here", lambda: 3)
    monkeypatch.setattr(cluster, "gpus_here", lambda: gpus)
    found = available(device, place=place)
    assert (found.cpus, found.gpus, found.use_gpu) == (3, seen, use_gpu)


@pytest.mark.parametrize("place", ["local", "ray"])
def test_a_gpu_that_is_not_there_is_refused(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 3.0})
    monkeypatch.setattr(cluster, "gpus_here", lambda: 0)
    with pytest.raises(ConfigError, match="this machine has no GPU") as refused:
        available("cuda", place=place)
    assert refused.value.code == "no_gpu"
    assert "--address" in refused.value.hint


@pytest.mark.parametrize(
    ("address", "named", "here", "place"),
    [
        (None, "", True, "ray"),
        (None, "head:6379", False, "cluster"),
        ("auto", "", False, "cluster"),
        ("head:6379", "", False, "cluster"),
        ("ray", "head:6379", True, "ray"),
        ("local", "head:6379", True, "local"),
    ],
)
def test_a_job_that_finds_ray_connected_runs_where_the_first_did(
    address: str | None, named: str, here: bool, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ablations train one run after the other in one process."""
    monkeypatch.setitem(sys.modules, "ray", ray)  # as a job has it that imported it
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setenv("RAY_ADDRESS", named)
    assert cluster.connect(address) == place
    assert cluster.is_here(address) is here
