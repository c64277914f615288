"""The benchmark of a card, in its CPU form: one document, every part measured."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest

from tests.bench.gpu import BUDGET, FIGURES, figure, measured

ON_A_GPU = {"ingest_busy"} | {name for name in FIGURES if name.endswith("_gib")} | {"job_busy"}


def leaves(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from leaves(inner)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)


@pytest.mark.timeout(1200)
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_one_document_has_every_figure() -> None:
    made = subprocess.run(
        [sys.executable, "-m", "tests.bench.gpu", "--json", "--quick"],
        capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert made.returncode == 0, made.stderr[-3000:]
    found = json.loads(made.stdout)
    assert list(found) == ["machine", "figures", *BUDGET]
    assert (found["machine"]["device"], found["machine"]["quick"]) == ("cpu", True)
    assert "measure nothing" in made.stderr
    figures = found["figures"]
    assert {name for name, value in figures.items() if value is None} == ON_A_GPU
    assert all(math.isfinite(value) and value >= 0 for value in leaves(found))
    assert min(value for value in figures.values() if value is not None) > 0
    # By hand: 2 layers of 4 x 32² and 2 x 32 x 64 on 5 tokens, 4 pieces of 16 x 16 x 3, and a
    # pooler of 32². Attention itself is counted on GPUs alone.
    layer = 2 * 5 * (4 * 32 * 32 + 2 * 32 * 64)
    patch = 2 * layer + 2 * 4 * 16 * 16 * 3 * 32 + 2 * 32 * 32
    assert found["ingest"]["floor"]["gflop_a_patch"] * 1e9 == pytest.approx(patch, rel=1e-3)
    assert sum(BUDGET.values()) == 360


def test_a_part_that_fails_says_so(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """A process that ends without a report, and one that takes too long."""
    monkeypatch.setattr(sys, "executable", "false")
    found = measured("tune", quick=True)
    assert "ended with 1" in found["error"]
    assert figure({"tune": found}, "tune/step/mfu") is None
