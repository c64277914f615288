"""Tuning in this process: two stages, resumed exactly, the base untouched, exported to serve."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pathflip.archive import Archive
from pathflip.calibration import COLDEST, HOTTEST
from pathflip.checkpoints import latest_checkpoint, load_run, write_whole
from pathflip.errors import CheckpointError, ConfigError
from pathflip.interop.questions import stored_questions
from pathflip.models import PathFLIPInstruct
from pathflip.models.prompt_encoder import PromptEncoder
from pathflip.slide_qa import SlideQA
from pathflip.training import run_dir, trainer
from pathflip.training.contrastive import Contrastive
from pathflip.training.instruct import Instruct
from pathflip.training.trainer import train
from tests.tuning import SETTINGS, STEPS, STEPS_PER_EPOCH, Given, make_given

NOT_COMPARED = ("slides_per_s", "memory_mb", "seconds")


class Cut(Exception):
    """Ends a run in the middle, as a kill does."""


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    return make_given(tmp_path_factory.mktemp("tuning"))


def go(given: Given, run: Path, *settings: str, until: int | None = None) -> Instruct:
    """Prepare and train in this process; ``until``: cut off after that step."""
    objective, _ = run_dir.prepare(Instruct(given.settings(*settings)), given.archive, run)

    def progress(at: trainer.TrainingProgress) -> None:
        if at.step == until:
            raise Cut

    try:
        train(run, objective, progress=progress)
    except Cut:
        assert until is not None
    return objective


def export(given: Given, run: Path, objective: Instruct) -> dict[str, Any]:
    result = run_dir.finish(*run_dir.prepare(objective, given.archive, run), run)
    run_dir.clear(run)
    return result


@pytest.fixture(scope="module")
def whole(given: Given, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run nothing happened to, exported."""
    run = tmp_path_factory.mktemp("whole") / "Tuned"
    before = contents(given.base)
    export(given, run, go(given, run))
    assert contents(given.base) == before
    return run


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def lines(run: Path) -> list[dict[str, Any]]:
    """Return the log without values that depend on the clock."""
    return [
        {key: value for key, value in line.items() if key not in NOT_COMPARED}
        for line in run_dir.read_metrics(run)
    ]


def tensors(run: Path, step: int, name: str = "model") -> dict[str, torch.Tensor]:
    return run_dir.checkpoint_at(run, step).tensors(name)


def at_start(given: Given, *settings: str) -> dict[str, torch.Tensor]:
    config = given.settings(*settings)
    vision = load_run(given.run).model
    model = PathFLIPInstruct.from_parts(vision, config.llm, config.instruct, seed=config.seed)
    return dict(model.state_dict())


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Parts of the model with weights that differ."""
    moved = {name for name, value in after.items() if not torch.equal(before[name], value)}
    return {"adapter" if "lora_" in name else name.partition(".")[0] for name in moved}


# -- learning -------------------------------------------------------------------------------------


def test_loss_falls_in_both_stages(whole: Path) -> None:
    steps = [line for line in lines(whole) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert [line["stage"] for line in steps] == ["projector"] * 4 + ["all"] * 8
    losses = [line["loss"] for line in steps]
    val = [line["val"] for line in lines(whole) if "val" in line]
    assert sum(losses[-2:]) < 0.6 * sum(losses[:2])
    assert [each["n"] for each in val] == [4, 4, 4]
    assert val[2]["loss_answer"] < val[1]["loss_answer"] < val[0]["loss_answer"]
    for line in steps:
        assert line["loss"] == line["loss_answer"]
        assert line["loss_slide"] == line["loss_region"] == 0


def test_each_stage_has_a_schedule_of_its_own(whole: Path) -> None:
    rates = [line["lr"] for line in lines(whole) if "lr" in line]
    for stage in (rates[:4], rates[4:]):
        assert stage == sorted(stage, reverse=True)
        assert stage[0] == 0.005
        assert stage[-1] == pytest.approx(5e-6)


def test_checkpoints_do_not_hold_the_frozen_base(whole: Path) -> None:
    for name in ("model", "optimizer"):
        held = {key.removeprefix("exp_avg/") for key in tensors(whole, STEPS, name)}
        assert any("lora_" in key for key in held)
        assert not [key for key in held if key.startswith("llm.") and "lora_" not in key]
        assert not [key for key in held if "text_tower" in key]  # no answer depends on it


# -- resuming -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("until", "at"), [(5, 4), (7, 5), (11, 10)])
def test_resumed_equals_uninterrupted(
    given: Given, whole: Path, tmp_path: Path, until: int, at: int
) -> None:
    """Cut off right after the stages change, within one, and late: same to the bit."""
    run = tmp_path / "Tuned"
    go(given, run, until=until)
    saved = latest_checkpoint(run / "checkpoints")
    assert saved is not None
    assert saved.step == at
    if at == STEPS_PER_EPOCH:
        assert changed(at_start(given), saved.tensors("model")) == {"projector"}
    go(given, run)
    trained = {"projector", "adapter", "vision"}
    assert changed(at_start(given), tensors(run, STEPS)) == trained
    for name in ("model", "optimizer"):
        mine, theirs = tensors(run, STEPS, name), tensors(whole, STEPS, name)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert lines(run) == lines(whole)


def test_micro_batches_weigh_by_their_tokens(given: Given, tmp_path: Path) -> None:
    """However a step is cut, its loss is the mean over all of its answers' tokens."""
    settings = ("instruct.lora_dropout=0", "projector_epochs=0", "epochs=1")
    go(given, tmp_path / "one", *settings)
    go(given, tmp_path / "cut", *settings, "accumulate=4")
    mine, theirs = (
        [line["loss"] for line in lines(tmp_path / name) if "loss" in line]
        for name in ("one", "cut")
    )
    assert mine == pytest.approx(theirs, rel=1e-4)
    assert len(set(mine)) == len(mine) == STEPS_PER_EPOCH


def test_a_finished_run_is_left_alone(
    given: Given, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jobs import ray_train
    from jobs.tune import tune

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("it was trained again")

    monkeypatch.setattr(ray_train, "_fit", never)
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
    assert tune(given.archive, whole, given.settings())["trained"] == 0
    after = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
    assert {path for path in after if after[path] != before.get(path)} <= {whole / ".lock"}


# -- refused --------------------------------------------------------------------------------------


def test_other_settings_are_refused(given: Given, whole: Path) -> None:
    with pytest.raises(ConfigError, match=r"was begun with lr=0\.005; this asks for lr=0\.1"):
        go(given, whole, "lr=0.1")
    with pytest.raises(ConfigError, match=r"instruct\.train_vision=true; this asks for"):
        go(given, whole, "instruct.train_vision=false")
    from pathflip.training.config import resolve

    with pytest.raises(CheckpointError, match="is a run of pathflip tune"):
        run_dir.prepare(Contrastive(resolve("pathflip/mini")), given.archive, whole)


def test_another_base_is_refused(given: Given, whole: Path, tmp_path: Path) -> None:
    """By name, and where its files changed under its name: before training and at the export."""
    base = Path(shutil.copytree(given.base, tmp_path / "base"))
    moved = Given(archive=given.archive, run=given.run, base=base)
    with pytest.raises(ConfigError, match=r"was begun with llm="):
        go(moved, whole)
    run = tmp_path / "run"
    go(moved, run, until=6)
    weights = base / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match="not the language model this tuning began with"):
        go(moved, run)
    with pytest.raises(CheckpointError, match="not the language model this tuning began with"):
        train(run, Instruct(moved.settings()))
    with pytest.raises(CheckpointError, match="is not the language model"):
        PathFLIPInstruct.from_pretrained(whole / "model", llm=base)


def test_a_slide_model_of_other_features_is_refused(given: Given, tmp_path: Path) -> None:
    other = Path(shutil.copytree(given.run / "model", tmp_path / "seen"))
    about = json.loads((other / "pathflip.json").read_text())
    about["encoder"]["revision"] = "7"
    from pathflip.checkpoints import write_whole

    write_whole(tmp_path / "other" / "model", lambda part: _copied(other, part, about))
    asked = Given(archive=given.archive, run=tmp_path / "other", base=given.base)
    with pytest.raises(Exception, match="revision 7") as caught:
        go(asked, tmp_path / "run")
    assert getattr(caught.value, "code", "") == "other_encoder"
    assert not (tmp_path / "run").exists()


def _copied(source: Path, part: Path, about: dict[str, Any]) -> None:
    for path in source.iterdir():
        if path.name not in ("COMPLETE.json", "pathflip.json"):
            shutil.copy(path, part)
    (part / "pathflip.json").write_text(json.dumps(about))


# -- what trains ----------------------------------------------------------------------------------

SHORT = ("projector_epochs=0", "epochs=1")


@pytest.mark.parametrize(
    ("settings", "trained", "held"),
    [
        (("instruct.llm_tuning=freeze", "instruct.train_vision=false"), {"projector"},
         {"projector"}),
        (("instruct.llm_tuning=freeze",), {"projector", "vision"}, {"projector", "vision"}),
        (("instruct.train_vision=false",), {"projector", "adapter"}, {"projector", "llm"}),
        (("instruct.llm_tuning=full", "instruct.train_vision=false"), {"projector", "llm"},
         {"projector", "llm"}),
    ],
)  # fmt: skip
def test_what_is_told_to_train_trains(
    given: Given, tmp_path: Path, settings: tuple[str, ...], trained: set[str], held: set[str]
) -> None:
    run = tmp_path / "run"
    before = contents(given.base)
    objective = go(given, run, *SHORT, *settings)
    config = objective.config
    last = tensors(run, STEPS_PER_EPOCH)
    assert changed(at_start(given, *settings), last) == trained
    assert {name.partition(".")[0] for name in last} == held
    export(given, run, objective)
    assert contents(given.base) == before
    tuned = load_run(run)
    if config.instruct.train_vision:
        assert tuned.name == f"run_{tuned.fingerprint[:8]}"
    else:  # vectors made with the pretrained model are still this one's
        assert tuned.name == load_run(given.run).name
    model = PathFLIPInstruct.from_pretrained(run / "model")
    for name, value in last.items():
        assert torch.equal(dict(model.state_dict())[name], value), name
    assert_same_words(model, run / "llm", given)


def assert_same_words(model: PathFLIPInstruct, llm: Path, given: Given) -> None:
    """The exported language model alone gives the logits of base and adapter."""
    from transformers import AutoModelForCausalLM

    alone = AutoModelForCausalLM.from_pretrained(str(llm)).eval()
    features, mask, _ = Archive(given.archive).features_array("slide001")
    with torch.no_grad():
        (prefix,) = model.visual_prefix(
            torch.from_numpy(features.copy()).float()[None], torch.from_numpy(mask.copy())[None]
        )
        prompt = model.embed_prompt(prefix, "Organ?")[None]
        mine = model.causal(inputs_embeds=prompt).logits
        theirs = alone(inputs_embeds=prompt).logits
    torch.testing.assert_close(mine, theirs, atol=2e-3, rtol=1e-3)


def test_alignment_trains_along(given: Given, tmp_path: Path) -> None:
    """The vision model's own losses are logged and reach its text tower; captions are needed."""
    run = tmp_path / "run"
    go(given, run, *SHORT, "align=0.5")
    steps = [line for line in lines(run) if "loss" in line]
    for line in steps:
        own = line["loss_slide"] + line["loss_region"]
        assert own > 0.1
        assert line["loss"] == pytest.approx(line["loss_answer"] + 0.5 * own, rel=1e-5)
    last = tensors(run, STEPS_PER_EPOCH)
    begun = at_start(given)
    moved = {name for name, value in last.items() if not torch.equal(begun[name], value)}
    assert any(name.startswith("vision.text_tower") for name in moved)
    val = [line["val"] for line in lines(run) if "val" in line][-1]
    assert all(math.isfinite(val[name]) and val[name] > 0 for name in ("loss_slide", "loss_region"))


# -- the end --------------------------------------------------------------------------------------


def test_the_exported_run(given: Given, whole: Path) -> None:
    result = json.loads((whole / "result.json").read_text())
    val = {line["step"]: line["val"] for line in lines(whole) if "val" in line}
    best = min(val, key=lambda step: val[step]["loss_answer"])
    assert (result["steps"], result["best_step"], result["val"]) == (STEPS, best, val[best])
    assert run_dir.finished(whole, Instruct.exports) == result
    assert (result["kind"], result["family"]) == ("instruct", "pathflip")
    assert not (whole / "init").exists()
    model = PathFLIPInstruct.from_pretrained(whole / "model")
    about = json.loads((whole / "model" / "pathflip.json").read_text())
    assert about["kind"] == "instruct"
    assert about["instruct_fingerprint"] == model.fingerprint()
    assert about["split"]["train_questions"] == 44
    run = load_run(whole)
    assert run.fingerprint == about["fingerprint"] == model.vision.fingerprint()
    assert load_run(whole / "model").fingerprint == run.fingerprint
    assert run.encoder == {"name": "tex", "revision": "1", "dim": 12}
    assert run.config["examples_per_slide"] == 2
    assert_same_words(model, whole / "llm", given)
    card = (whole / "README.md").read_text()
    assert "16 training slides of 8 patients" in card
    assert f"{val[best]['loss_answer']:.4f}" in card


def test_choices_are_calibrated_on_validation_questions(
    given: Given, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The temperature is of the exported weights; both readers of the model get it."""
    about = json.loads((whole / "model" / "instruct.json").read_text())
    assert (about["calibration"], about["abstains"]) == (None, False), "12 questions are too few"
    assert "not calibrated" in (whole / "README.md").read_text()
    monkeypatch.setattr("pathflip.training.instruct.FEWEST", 5)
    run = tmp_path / "again"
    export(given, run, go(given, run))
    found = json.loads((run / "model" / "instruct.json").read_text())["calibration"]
    model = PathFLIPInstruct.from_pretrained(run / "model")
    front = PromptEncoder.from_pretrained(run / "model", llm=run / "llm")
    assert model.calibration == front.calibration
    assert model.calibration is not None
    assert model.calibration.as_json() == found
    assert model.fingerprint() == PathFLIPInstruct.from_pretrained(whole / "model").fingerprint()
    assert f"temperature {found['temperature']:.3g}" in (run / "README.md").read_text()
    answerer, archive = SlideQA.from_run(run), Archive(given.archive)
    asked = [one for one in stored_questions(archive, split="val") if one.choices]
    assert found["questions"] == len(asked)
    said = [answerer.ask(archive, one.slide, one.question, one.choices).scores for one in asked]

    def loss(heat: float) -> float:
        """Mean loss at a temperature, from scores that have the one that was fitted."""
        total = 0.0
        for one, scores in zip(asked, said, strict=True):
            powers = np.array(list(scores.values())) ** (found["temperature"] / heat)
            total -= np.log(powers[one.choices.index(one.answer)] / powers.sum())
        return total / len(asked)

    best = loss(found["temperature"])
    assert best == pytest.approx(found["nll"], abs=1e-4)
    others = np.clip(found["temperature"] * np.array([0.8, 1.25]), COLDEST, HOTTEST)
    assert best <= min(map(loss, others.tolist())) + 1e-5


def test_a_damaged_language_model_is_not_finished(whole: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    weights = run / "llm" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert run_dir.finished(run, Instruct.exports) is None


@pytest.mark.parametrize("made_for", ["this", "another", None])
def test_a_base_made_for_another_slide_model_is_told(
    given: Given, tmp_path: Path, caplog: pytest.LogCaptureFixture, made_for: str | None
) -> None:
    reads = {"this": load_run(given.run).fingerprint, "another": "0" * 64, None: None}[made_for]
    base = tmp_path / "base"

    def fill(part: Path) -> None:
        shutil.copytree(given.base, part, dirs_exist_ok=True)

    write_whole(base, fill, vision=reads)
    Instruct(replace(given.settings(), llm=str(base))).select(given.archive)
    told = f"{base} was made to read another slide model than {given.run}"
    assert (told in caplog.text) == (made_for == "another")


def test_the_command_plans_and_is_refused(
    given: Given, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pathflip.cli import main

    def command(*words: str, llm: str = str(given.base)) -> tuple[int, Any]:
        flags = [word for setting in SETTINGS for word in ("-o", setting)]
        with pytest.raises(SystemExit) as ended:
            main([
                "tune", "--json", "--archive", given.archive, "--run", str(given.run), "--llm", llm,
                "--out", str(tmp_path / "out"), *flags, *words,
            ])  # fmt: skip
        return int(ended.value.code or 0), json.loads(capsys.readouterr().out)

    code, plan = command("--dry-run")
    assert code == 0
    assert (plan["steps"], plan["train_slides"], plan["val_slides"]) == (STEPS, 16, 4)
    assert (plan["train_captions"], plan["train_questions"]) == (16, 44)
    assert plan["targets"]["kept"] == plan["targets"]["sentences"] > 16
    assert 0 < plan["parameters"] < plan["frozen_parameters"]
    code, document = command("-o", "align=1", "-o", "instruct.train_vision=false")
    assert (code, document["error"]["code"]) == (2, "config")
    code, document = command(llm=str(tmp_path / "none"))
    assert (code, document["error"]["code"]) == (1, "checkpoint")
    assert not (tmp_path / "out").exists()
