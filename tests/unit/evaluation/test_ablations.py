"""Ablations: what is trained, what is tabulated, and that what is done is not done again."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from jobs import ablations as jobs_evaluate
from pathflip.errors import ConfigError, TrainingError
from pathflip.files import write_file
from tests.unit.evaluation import planted, planted_patches


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
    for name, switch in jobs_evaluate.ABLATIONS["pathflip"].items():
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


def test_every_switch_of_the_patch_model() -> None:
    """A step has as many pairs, and a run as many steps, whatever the level."""
    settings = jobs_evaluate.resolve("mrplip/mini")
    switches = jobs_evaluate.ABLATIONS["mrplip"]
    assert list(switches) == [
        "all", "l_bl", "plus_cvta", "plus_mrtva", "no_hierarchy", "as_printed",
        "single_5x", "single_10x", "single_20x", "single_40x",
    ]  # fmt: skip
    before = vars(settings.model)
    for name, switch in switches.items():
        made = jobs_evaluate.variant(settings, name=name, seed=3)
        assert made.seed == 3
        changed = {key for key, value in vars(made.model).items() if value != before[key]}
        assert changed == set(switch)
        assert made.batch_size * made.pairs == 32
        assert made.epochs / made.batch_size == settings.epochs / settings.batch_size
        assert made.trees_per_patient == made.batch_size // 4
    single = jobs_evaluate.variant(settings, name="single_5x", seed=0)
    assert (single.model.levels, single.batch_size, single.pairs) == ((0,), 32, 1)
    chosen = jobs_evaluate.AblationConfig(only=("l_bl",))
    assert chosen.names("mrplip") == ["l_bl"]
    with pytest.raises(ConfigError, match="l_bl is no ablation of pathflip"):
        chosen.names("pathflip")


def test_patch_models_are_tabulated_against_planted_truth(
    trained: list[tuple[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted model solves the joint task by all its levels, and by no single one."""
    opened = planted_patches.tree_archive(tmp_path, planted_patches.sample_trees(12))

    def load(run: Path, *, family: str) -> Any:
        model: Any = planted_patches.WordModel(planted_patches.WORDS)
        model.config = SimpleNamespace(levels=(1,) if "10x" in run.name else (0, 1, 2, 3))
        about = {"name": "planted", "revision": "1", "dim": len(planted_patches.WORDS)}
        return SimpleNamespace(
            name="planted", model=model, fingerprint=run.name, encoder=about, path=run,
            trees={"parent_um": 64.0, "node_px": 32}, config={"source": "oracle"},
        )  # fmt: skip

    monkeypatch.setattr(jobs_evaluate, "load_run", load)
    config = jobs_evaluate.AblationConfig(seeds=2, only=("all", "single_10x"), resamples=0)
    settings = jobs_evaluate.resolve("mrplip/mini")
    found = jobs_evaluate.ablations(opened.uri, tmp_path / "run", config, settings=settings)
    assert [name for name, _ in trained] == [
        "all-seed0", "single_10x-seed0", "all-seed1", "single_10x-seed1",
    ]  # fmt: skip
    assert found["table"]["all"]["joint"]["values"] == [1, 1]
    assert found["table"]["all"]["joint, pooled minus best"]["mean"] > 0.1
    assert found["table"]["single_10x"]["architecture"]["mean"] == 1
    assert found["table"]["single_10x"]["nuclei"]["mean"] < 0.7
    assert found["difference"]["single_10x"]["joint"]["mean"] > 0.3
    assert found["chance"]["joint"] == pytest.approx(1 / 6)
    assert found["table"]["all"]["mean recall, 10x"]["mean"] > 0.1
    truth = tmp_path / "trees.csv"
    truth.write_text(truth.read_text().replace(",solid,", ",nested,"))
    other = jobs_evaluate.ablations(opened.uri, tmp_path / "run", config, settings=settings)
    assert other["table"]["all"]["architecture"]["mean"] < 1, "other truth is measured anew"
    monkeypatch.setattr(jobs_evaluate, "evaluate_patches", None)  # measured already
    again = jobs_evaluate.ablations(opened.uri, tmp_path / "run", config, settings=settings)
    assert again["table"] == other["table"]


@pytest.mark.parametrize(
    ("given", "message"),
    [({"tasks": "tasks.yaml"}, "not measured on tasks"), ({"truth": "none.csv"}, "no file none")],
)
def test_what_patch_models_are_not_measured_on_is_refused(
    given: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        jobs_evaluate.AblationConfig(**given).check_files("mrplip")


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


@pytest.mark.parametrize(
    ("address", "shared"), [(None, True), ("local", True), ("ray", True), ("head:6379", False)]
)
def test_trainings_beside_each_other_share_the_cores_of_this_machine(
    address: str | None, shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def run(command: list[str], **options: Any) -> Any:
        given = yaml.safe_load(Path(command[command.index("--config") + 1]).read_text())
        end = command[command.index("--json") + 1 :]
        seen.append((given["cpus_per_worker"], options["env"]["OMP_NUM_THREADS"], end))
        return SimpleNamespace(returncode=0)

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(jobs_evaluate.os, "sched_getaffinity", lambda _: range(6))
    monkeypatch.setattr(jobs_evaluate.subprocess, "run", run)
    plans = {("full", seed): jobs_evaluate.resolve("pathflip/mini") for seed in range(2)}
    folders = {key: tmp_path / f"full-seed{key[1]}" for key in plans}
    jobs_evaluate._train_beside(str(tmp_path), plans, folders, 2, address, None)
    end = ["--address", address] if address else []
    assert seen == [(3 if shared else None, "3", end)] * 2
