"""The benchmark of MR-PLIP at its smallest size: it runs, and both sides of it compute the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bench import mrplip, mrplip_memory
from tests.trees import make_tree_archive


def test_parts_make_one_document_with_their_targets(capsys: pytest.CaptureFixture[str]) -> None:
    parts = ("step", "keywords", "tiles")  # the others make slides, and processes
    mrplip.main(["--json", "--quick", *(f"--only={name}" for name in parts)])
    document = json.loads(capsys.readouterr().out)
    assert list(document) == [*parts, "machine"]
    for name in parts:
        assert isinstance(document[name]["ok"], bool)
        assert document[name]["targets"]
    step = document["step"]
    assert set(step["losses"]) == {"cvta", "mrtva", "itc", "itm", "mlm", "plm"}
    assert max(step["loss_gap_edges"], step["loss_gap_bags"]) <= step["targets"]["loss_gap"]
    assert max(step["gradient_gap_edges"], step["gradient_gap_bags"]) < 1e-5
    assert {"ours", "edges", "bags"} == set(step["cpu_s"])
    assert document["keywords"]["distinct"]["captions_a_second"] > 0
    assert document["tiles"]["tiles"] == 90
    assert set(mrplip.PARTS) == {*parts, "trees", "memory"}


def test_memory_is_measured_on_all_trees(tmp_path: Path) -> None:
    uri = make_tree_archive(tmp_path / "a", slides=8, per_slide=2)
    found = mrplip_memory.draw(str(uri))
    assert found["trees"] == 16
    assert found["peak_mb"] > 0
