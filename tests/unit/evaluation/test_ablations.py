"""Ablations: what is trained, what is tabulated, and that what is done is not done again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from jobs import ablations as jobs_evaluate
from pathflip.errors import ConfigError, TrainingError
from pathflip.files import write_file
from tests.unit.evaluation import planted


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Trainings write what a run has and are listed; the model is planted, its name is the run."""
    calls: list[tuple[str, Any]] = []

    def pretrain(archive: str, run: Path, config: Any, **options: Any) -> dict[str, Any]:
        if not (run / "result.json").exists():
            calls.append((run.name, config))
            run.mkdir(parents=True)
            write_file(run / "result.json", json.dumps({"seconds": 7.0}))
        return {}

    def load(run: Path, **options: Any) -> Any:
        found = planted.planted_run()
        found.fingerprint = run.name
        return found

    monkeypatch.setattr(jobs_evaluate, "pretrain", pretrain)
    monkeypatch.setattr(jobs_evaluate, "load_run", load)
    return calls


@pytest.fixture
def config(tmp_path: Path) -> Any:
    tasks = tmp_path / "tasks.yaml"
    entries = [{"name": "tumour", "prompts": ["tumour"], "score": "local"}]
    tasks.write_text(yaml.safe_dump({"templates": "CLASSNAME", "tasks": entries}))
    return jobs_evaluate.AblationConfig(
        seeds=2, only=("full", "no_tr_attention"), tasks=str(tasks), split="all", resamples=0
    )


def test_each_is_trained_once_and_measured(
    archive: Any, trained: list[tuple[str, Any]], config: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    settings = jobs_evaluate.resolve("pathflip/mini")
    lines = []
    found = jobs_evaluate.ablations(
        archive.uri, tmp_path / "run", config, settings=settings,
        progress=lambda p: lines.append(p.line()),
    )  # fmt: skip
    names = ["full-seed0", "no_tr_attention-seed0", "full-seed1", "no_tr_attention-seed1"]
    assert [name for name, _ in trained] == names
    for name, made in trained:
        switch, _, seed = name.partition("-seed")
        assert made.seed == int(seed)
        expected = settings.model.tr_attention if switch == "full" else "none"
        assert made.model.tr_attention == expected
    assert found["table"]["full"]["presence auc"]["mean"] == 1
    assert found["difference"]["no_tr_attention"]["pointing"]["mean"] == 0
    assert found["chance"]["presence auc"] == 0.5
    assert [row["seconds"] for row in found["runs"]] == [7.0] * 4
    assert any("full-seed0" in line for line in lines)
    columns, rows = jobs_evaluate.table(found)
    assert columns == ["metric", "full", "no_tr_attention", "chance"]
    assert [row[0] for row in rows[:2]] == ["presence auc", "presence auc, global"]
    assert rows[0][1] == "1.000 ± 0.000"
    written = json.loads((tmp_path / "run" / "ablations" / "ablations.json").read_text())
    assert written["table"] == found["table"]
    # Again: nothing is trained or measured, the table is the same; one more seed is only that.
    monkeypatch.setattr(jobs_evaluate, "evaluate_all", None)
    again = jobs_evaluate.ablations(archive.uri, tmp_path / "run", config, settings=settings)
    assert len(trained) == 4
    assert again["table"] == found["table"]


def test_spread_is_students_interval() -> None:
    found = jobs_evaluate.spread([1.0, 2.0, 4.0])
    assert found["mean"] == pytest.approx(7 / 3)
    assert found["sd"] == pytest.approx(np.std([1, 2, 4], ddof=1))
    half = 4.302652729911275 * found["sd"] / 3**0.5  # t(0.975; 2) of any table
    assert found["ci"] == pytest.approx([7 / 3 - half, 7 / 3 + half])
    assert jobs_evaluate.spread([0.5, None])["sd"] is None
    assert jobs_evaluate.spread([None])["mean"] is None
    values = {"full": {"a": [1.0, 2.0]}, "less": {"a": [0.5, 1.0], "b": [1.0, 1.0]}}
    gap = jobs_evaluate.differences(values)
    assert gap["less"]["a"]["values"] == [0.5, 1.0]
    assert set(gap["less"]) == {"a"}


def test_every_switch_is_one_of_the_model() -> None:
    settings = jobs_evaluate.resolve("pathflip/mini")
    for name, switch in jobs_evaluate.ABLATIONS.items():
        made = jobs_evaluate.variant(settings, name=name, seed=3)
        assert made.seed == 3
        changed = [
            key
            for key in settings.model.__dataclass_fields__
            if getattr(made.model, key) != getattr(settings.model, key)
        ]
        assert changed == list(switch)
    with pytest.raises(ConfigError, match="no ablation 'none'"):
        jobs_evaluate.AblationConfig(only=("none",))


def test_a_training_that_fails_is_named(
    archive: Any, config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    monkeypatch.setattr(jobs_evaluate.sys, "executable", "/bin/false")
    with pytest.raises(TrainingError, match="-seed0 failed"):
        jobs_evaluate.ablations(
            archive.uri, tmp_path / "run", replace(config, parallel=2),
            settings=jobs_evaluate.resolve("pathflip/mini"),
        )  # fmt: skip
