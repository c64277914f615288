"""The training loop in this process: resumed exactly, skips what is not finite, exports whole."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pathflip.archive import Archive
from pathflip.checkpoints import latest_checkpoint, load_run
from pathflip.errors import CheckpointError, ConfigError, TrainingError
from pathflip.models import PathFLIP
from pathflip.training import run_dir, trainer
from pathflip.training.config import resolve
from pathflip.training.contrastive import Contrastive
from pathflip.training.objective import Loss, Worker
from pathflip.training.trainer import train
from tests.archives import TINY, make_archive
from tests.packaged import make_package

STEPS = 20
SETTINGS = (
    *TINY,
    f"steps={STEPS}",
    "batch_size=8",
    "save_every=5",
    "log_every=1",
    "lr=0.01",
    "val_every=1",
)
"""Four steps an epoch: a validation each, so steps 7 and 13 are inside of one."""
NOT_COMPARED = ("slides_per_s", "memory_mb", "seconds")


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> str:
    """40 slides of 20 patients, 8 of them for validation."""
    folder = tmp_path_factory.mktemp("training")
    return str(
        make_archive(folder / "a", slides=40, split=lambda n: "val" if n % 10 > 7 else "train")
    )


class Cut(Exception):
    """Ends a run in the middle, as a kill does."""


@dataclass
class Seen:
    """Slides of each step a run did, as it did them."""

    steps: list[tuple[int, list[int]]] = field(default_factory=list)
    told: list[trainer.TrainingProgress] = field(default_factory=list)


def go(
    archive: str,
    run: Path,
    *settings: str,
    until: int | None = None,
    seen: Seen | None = None,
    kind: type[Contrastive] = Contrastive,
) -> Contrastive:
    """Prepare and train in this process; ``until``: cut off after that step."""
    config = resolve("pathflip/mini", overrides=[*SETTINGS, *settings])
    objective, _ = run_dir.prepare(kind(config), archive, run)
    real = trainer.Trainer._step

    def step(trainer: Any, model: Any, micro_batches: Any) -> Any:
        if seen is not None:
            slides = [slide for batch in micro_batches for slide in batch.slides]
            seen.steps.append((trainer.counters.step, slides))
        return real(trainer, model, micro_batches)

    def progress(at: trainer.TrainingProgress) -> None:
        if seen is not None:
            seen.told.append(at)
        if at.step == until:
            raise Cut

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Trainer, "_step", step)
        try:
            train(run, objective, progress=progress)
        except Cut:
            assert until is not None
    return objective


@pytest.fixture(scope="module")
def whole(archive: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Seen]:
    """The run nothing happened to."""
    run, seen = tmp_path_factory.mktemp("whole") / "run", Seen()
    go(archive, run, seen=seen)
    return run, seen


def lines(run: Path) -> list[dict[str, Any]]:
    """Return the log without values that depend on the clock."""
    return [
        {key: value for key, value in line.items() if key not in NOT_COMPARED}
        for line in run_dir.read_metrics(run)
    ]


def assert_same_end(run: Path, other: Path) -> None:
    mine, theirs = (latest_checkpoint(path / "checkpoints") for path in (run, other))
    assert mine is not None
    assert theirs is not None
    assert mine.step == theirs.step == STEPS
    for name in ("model", "optimizer"):
        a, b = mine.tensors(name), theirs.tensors(name)
        assert a.keys() == b.keys()
        for key in a:
            assert torch.equal(a[key], b[key]), key
    assert lines(run) == lines(other)


# -- learning -------------------------------------------------------------------------------------


def test_metrics_for_prometheus_are_those_of_the_log(whole: tuple[Path, Seen]) -> None:
    """The last step, its loss, and the last validation."""
    step, val = lines(whole[0])[-2:]
    found = {
        (sample.metric, *sample.labels.values()): sample.value
        for sample in whole[1].told[-1].samples()
    }
    assert found["pathflip_train_step",] == found["pathflip_train_steps_expected",] == STEPS
    assert found["pathflip_train_loss",] == step["loss"]
    for way in ("itr", "tir"):
        assert found["pathflip_train_validation", f"{way} r@1"] == val["val"][way]["r@1"]
    assert found["pathflip_train_validation", "mean_recall"] == val["val"]["mean_recall"]


def test_loss_goes_down(whole: tuple[Path, Seen]) -> None:
    steps = [line for line in lines(whole[0]) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    for name in ("loss", "loss_slide"):
        losses = [line[name] for line in steps]
        assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    for line in steps:
        assert line["loss"] == pytest.approx(line["loss_slide"] + line["loss_region"], rel=1e-5)
    assert [line["epoch"] for line in steps[3::4]] == [1, 2, 3, 4, 5]
    val = [line["val"] for line in lines(whole[0]) if "val" in line]
    assert len(val) == 5
    assert val[-1]["n"] == 8
    assert val[-1]["mean_recall"] > 0.5


def test_what_is_in_the_run_folder(whole: tuple[Path, Seen]) -> None:
    run = whole[0]
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names[-1] == "step-00000020"
    assert len(names) in (3, 4)  # the newest three, and the best where it is none of them
    versions = json.loads((run / "versions.json").read_text())
    assert versions["torch"] == torch.__version__
    assert list((run / "tensorboard").glob("events.out.*"))


# -- resuming -------------------------------------------------------------------------------------


@pytest.mark.parametrize("until", [3, 13])
def test_resumed_equals_uninterrupted(
    archive: str, whole: tuple[Path, Seen], tmp_path: Path, until: int
) -> None:
    """Same slides, same weights to the bit, same log."""
    run, first, then = tmp_path / "run", Seen(), Seen()
    go(archive, run, until=until, seen=first)
    saved = latest_checkpoint(run / "checkpoints")
    at = 0 if saved is None else saved.step
    assert at == max((n for n in (4, 5, 8, 10, 12) if n <= until), default=0)
    go(archive, run, seen=then)
    assert first.steps == whole[1].steps[:until]
    assert then.steps == whole[1].steps[at:]
    assert_same_end(run, whole[0])


def test_no_slide_twice_in_an_epoch(whole: tuple[Path, Seen]) -> None:
    for epoch in range(5):
        slides = [s for step, ids in whole[1].steps if step // 4 == epoch for s in ids]
        assert len(slides) == len(set(slides)) == 32


def test_a_damaged_checkpoint_is_passed_over(
    archive: str, whole: tuple[Path, Seen], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    go(archive, run, until=13)
    path = run / "checkpoints" / "step-00000012" / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    then = Seen()
    go(archive, run, seen=then)
    assert then.steps[0][0] == 10
    assert "step-00000012 is damaged: optimizer.safetensors" in caplog.text
    assert_same_end(run, whole[0])


def test_another_seed_is_another_run(
    archive: str, whole: tuple[Path, Seen], tmp_path: Path
) -> None:
    seen = Seen()
    go(archive, tmp_path / "run", "seed=1", until=1, seen=seen)
    assert seen.steps[0] != whole[1].steps[0]
    assert lines(tmp_path / "run")[0]["loss"] != lines(whole[0])[0]["loss"]


# -- not finite -----------------------------------------------------------------------------------


def poisoned(steps: set[int], value: float) -> type[Contrastive]:
    """The objective with a slide loss that is not finite in some steps."""

    class Poisoned(Contrastive):
        step = 0

        def losses(self, model: Any, batch: Any, *, group: Any) -> dict[str, Loss]:
            found = super().losses(model, batch, group=group)
            if self.step in steps:
                found["loss_slide"] = Loss(found["loss_slide"].total * value)
            self.step += 1
            return found

    return Poisoned


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_steps_that_are_not_finite_are_skipped(archive: str, tmp_path: Path, value: float) -> None:
    """They are counted and logged as null; weights stay finite and go on learning."""
    run = tmp_path / "run"
    go(archive, run, kind=poisoned({4, 5, 9}, value))
    steps = [line for line in lines(run) if "loss" in line]
    assert [line["step"] - 1 for line in steps if line["loss"] is None] == [4, 5, 9]
    assert steps[-1]["skipped"] == 3
    assert steps[-1]["loss"] < steps[0]["loss"]
    end = latest_checkpoint(run / "checkpoints")
    assert end is not None
    assert end.state()["skipped"] == 3
    for name in ("model", "optimizer"):
        assert all(torch.isfinite(value).all() for value in end.tensors(name).values())


def test_a_skipped_step_changes_nothing(
    archive: str, whole: tuple[Path, Seen], tmp_path: Path
) -> None:
    go(archive, tmp_path / "run", "save_every=1", until=6, kind=poisoned({4}, float("nan")))
    before, after = (
        run_dir.checkpoint_at(tmp_path / "run", step).tensors("model") for step in (4, 5)
    )
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_many_stop_the_run_with_a_sentence(archive: str, tmp_path: Path) -> None:
    kind = poisoned(set(range(6, 20)), float("nan"))
    run = tmp_path / "run"
    with pytest.raises(TrainingError, match="stopped at step 9: the last 3 steps had a") as caught:
        go(archive, run, "max_skipped_in_row=3", kind=kind)
    assert "lower lr" in caught.value.hint
    end = latest_checkpoint(run / "checkpoints")
    assert end is not None
    assert end.step == 8
    assert all(torch.isfinite(value).all() for value in end.tensors("model").values())


def test_weights_that_are_not_finite_are_never_written(
    archive: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = torch.nn.Linear(2, 2)
    with torch.no_grad():
        model.weight[0, 0] = float("inf")
    with pytest.raises(TrainingError, match="weights weight are not finite"):
        run_dir.model_tensors(model)


# -- the end --------------------------------------------------------------------------------------


def test_the_exported_model(archive: str, whole: tuple[Path, Seen], tmp_path: Path) -> None:
    run = tmp_path / "A run"
    shutil.copytree(whole[0], run)
    asked = Contrastive(resolve("pathflip/mini", overrides=SETTINGS))
    objective, dataset = run_dir.prepare(asked, archive, run)
    assert run_dir.finished(run) is None
    result = run_dir.finish(objective, dataset, run)
    assert (result["kind"], result["family"]) == ("contrastive", "pathflip")
    run_dir.clear(run)
    assert run_dir.finished(run) == json.loads((run / "result.json").read_text()) == result
    assert result["steps"] == STEPS
    losses = [line["loss"] for line in lines(run) if "loss" in line]
    assert result["loss"] == pytest.approx(sum(losses) / STEPS)
    val = {line["step"]: line["val"] for line in lines(run) if "val" in line}
    best = max(val, key=lambda step: (val[step]["mean_recall"], step))
    assert (result["best_step"], result["val"]) == (best, val[best])

    loaded = load_run(run)
    assert load_run(run / "model").fingerprint == loaded.fingerprint == loaded.model.fingerprint()
    assert loaded.name == f"a_run_{loaded.fingerprint[:8]}"
    assert loaded.encoder == {"name": "tex", "revision": "1", "dim": 12}
    assert loaded.tiling["region_um"] == 256
    assert loaded.config["batch_size"] == 8
    assert not loaded.model.training
    weights = dict(loaded.model.named_parameters())
    for name, value in run_dir.checkpoint_at(run, best).tensors("model").items():
        if name in weights:
            assert torch.equal(weights[name], value)
    card = (run / "README.md").read_text()
    assert "32 training slides of 16 patients" in card
    assert f"| slide to caption | {val[best]['itr']['r@1']:.3f} |" in card

    weights_file = run / "model" / "model.safetensors"
    content = bytearray(weights_file.read_bytes())
    content[-1] ^= 1
    weights_file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not what was written"):
        load_run(run)
    assert run_dir.finished(run) is None


def test_another_run_in_the_same_folder_is_refused(
    archive: str, whole: tuple[Path, Seen], tmp_path: Path
) -> None:
    run = whole[0]
    with pytest.raises(ConfigError, match=r"was begun with lr=0\.01; this asks for lr=0\.5"):
        go(archive, run, "lr=0.5")
    asked = Contrastive(resolve("pathflip/mini", overrides=SETTINGS))
    with pytest.raises(ConfigError, match="was begun with --archive"):
        run_dir.prepare(asked, str(tmp_path / "other"), run)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"not a run and not empty \(it holds notes\.txt\)"):
        run_dir.prepare(asked, archive, tmp_path)


def test_two_trainers_of_a_run_are_one_too_many(tmp_path: Path) -> None:
    with (
        run_dir.run_lock(tmp_path / ".lock"),
        pytest.raises(TrainingError, match="Another process is training"),
        run_dir.run_lock(tmp_path / ".lock"),
    ):
        pass
    with run_dir.run_lock(tmp_path / ".lock"):
        pass


def test_without_validation_the_last_weights_are_exported(archive: str, tmp_path: Path) -> None:
    folder = make_archive(tmp_path / "b", slides=16, split=lambda n: "train")
    run = tmp_path / "run"
    objective = go(str(folder), run, "steps=3", "val_fraction=0")
    result = run_dir.finish(*run_dir.prepare(objective, str(folder), run), run)
    assert (result["best_step"], result["val"]) == (3, {})
    assert "No slide was held out" in (run / "README.md").read_text()


def test_a_text_tower_at_rate_0_stays_as_it_is(
    archive: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is in no checkpoint, and the finished run opens without the package it came from."""
    captions = Archive(archive).captions()["text"].to_pylist()
    package = make_package(tmp_path, captions)
    monkeypatch.syspath_prepend(tmp_path)
    theirs = load_file(package / "model.safetensors")
    settings = ("steps=6", "save_every=2", "model.text_model=minilm", "text_rate=0")
    run, cut = tmp_path / "run", tmp_path / "cut"
    objective = go(archive, run, *settings)
    go(archive, cut, *settings, until=3)
    shutil.rmtree(package)
    go(archive, cut, *settings)
    model, again = (latest_checkpoint(path / "checkpoints").tensors("model") for path in (run, cut))
    assert model.keys() == again.keys()
    assert not [name for name in model if name.startswith("text_tower.")]
    for name, value in model.items():
        assert torch.allclose(value, again[name], atol=1e-5), name
    init = load_file(run / "init" / "model.safetensors")
    assert not torch.equal(init["text_out.weight"], model["text_out.weight"])
    run_dir.finish(*run_dir.prepare(objective, archive, run), run)
    loaded = load_run(run)
    tower = {
        name.removeprefix("text_tower.bert."): value
        for name, value in loaded.model.state_dict().items()
        if name.startswith("text_tower.")
    }
    assert tower
    for name, value in tower.items():
        assert torch.equal(value, theirs[name]), name
    frozen = sum(value.numel() for value in tower.values())
    dataset = objective.load(run / "data.parquet")
    monkeypatch.setattr(Contrastive, "_drawn", lambda *_: PathFLIP.from_pretrained(run / "model"))
    assert objective.parameters(dataset)[1] == frozen


def test_a_lower_rate_of_the_text_tower_is_that_of_its_weights_alone(
    archive: str, tmp_path: Path
) -> None:
    config = resolve("pathflip/mini", overrides=[*SETTINGS, "text_rate=0.1"])
    objective, _ = run_dir.prepare(Contrastive(config), archive, tmp_path / "run")
    found = trainer.Trainer(tmp_path / "run", objective, Worker())
    slow = {id(p) for p in found.model.text_tower.parameters()}
    for group in found.optimizer.param_groups:
        for parameter in group["params"]:
            assert group["rate"] == (0.1 if id(parameter) in slow else 1.0)
    with pytest.raises(ConfigError, match="no text tower of its own"):
        resolve("pathflip/official_v1", overrides=["text_rate=0"])


def test_accumulated_gradients_are_the_mean(archive: str, tmp_path: Path) -> None:
    """With negatives within each micro-batch, a step is the mean of its micro-batches' losses."""
    run = tmp_path / "run"
    config = resolve(
        "pathflip/mini", overrides=[*SETTINGS, "accumulate=2", "clip=0", "log_every=1"]
    )
    objective, _ = run_dir.prepare(Contrastive(config), archive, run)
    train_ = trainer.Trainer(run, objective, Worker())
    micro = train_.dataset.micro_batches(0)
    assert [len(batch.slides) for batch in micro] == [4, 4]
    train_.model.train()
    grads, losses = [], []
    for number, batch in enumerate(micro):
        train_.optimizer.zero_grad()
        torch.manual_seed(trainer._seed(config.seed, 0, number, 0))
        parts = objective.losses(train_.model, batch.to(torch.device("cpu")), group=None)
        loss = parts["loss_slide"].total + parts["loss_region"].total
        loss.backward()
        losses.append(loss.item())
        grads.append({n: p.grad.clone() for n, p in train_.model.named_parameters()})
    found = train_._step(train_.model, micro)
    assert found["loss"] == pytest.approx(sum(losses) / 2, rel=1e-6)
    norm = torch.sqrt(
        sum((((grads[0][n] + grads[1][n]) / 2) ** 2).sum() for n in grads[0])  # type: ignore[arg-type]
    )
    assert found["grad_norm"] == pytest.approx(float(norm), rel=1e-4)


# -- the command line -----------------------------------------------------------------------------


def command(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, Any]:
    """``pathflip pretrain … --json`` in this process: exit code and document."""
    from pathflip.cli import main

    with pytest.raises(SystemExit) as ended:
        main(["pretrain", "--json", *words])
    return int(ended.value.code or 0), json.loads(capsys.readouterr().out)


def flags(*settings: str) -> list[str]:
    return [word for setting in settings for word in ("-o", setting)]


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever starts Ray fails."""
    import jobs.cluster

    def never(address: str | None = None) -> bool:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(jobs.cluster, "connect", never)


@pytest.mark.usefixtures("no_ray")
def test_dry_run(archive: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--archive", archive, "--run", str(tmp_path / "run"), "--preset", "pathflip/mini"]
    code, plan = command(capsys, *words, *flags(*SETTINGS), "--dry-run")
    assert code == 0
    assert (plan["train_slides"], plan["val_slides"], plan["steps"]) == (32, 8, STEPS)
    assert (plan["train_patients"], plan["val_patients"]) == (16, 4)
    assert plan["parameters"] > 1000
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_ray")
def test_what_cannot_work_is_said_before_anything_starts(
    archive: str, whole: tuple[Path, Seen], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = make_archive(tmp_path / "bare", slides=4, captions=False)

    def said(*words: str, archive: str = archive) -> tuple[int, str]:
        run = ["--run", str(tmp_path / "run")] if "--run" not in words else []
        code, document = command(capsys, "--archive", archive, *run, *words)
        assert document["error"]["hint"]
        assert not (tmp_path / "run").exists()
        return code, document["error"]["code"]

    mini = ["--preset", "pathflip/mini", *flags(*SETTINGS)]
    assert said(*mini, archive=str(bare)) == (2, "no_captions")
    assert said(*mini, archive=str(tmp_path / "none")) == (2, "missing_archive")
    assert said(*mini, "-o", "encoder=uni") == (2, "unknown_encoder")
    assert said(*mini, "-o", "batch_size=64") == (2, "too_few_slides")
    assert said(*mini, "--max-workers", "3") == (2, "config")
    assert said(*mini, "--run", "s3://bucket/run") == (2, "config")
    assert said(*mini, "-o", "lr=0.5", "--run", str(whole[0])) == (2, "other_settings")
    assert said("--preset", "pathflip/maxi") == (2, "config")


@pytest.mark.usefixtures("no_ray")
def test_a_text_tower_without_weights_is_one_error(
    archive: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = ["--archive", archive, "--run", str(tmp_path / "run"), "--preset", "pathflip/paper"]
    words += flags("batch_size=8", f"model.text_model={tmp_path / 'bert'}")
    code, document = command(capsys, *words)
    assert code != 0
    assert document["error"]["code"] == "text_model"
    assert "bert" in document["error"]["message"]
    assert not (tmp_path / "run").exists()
