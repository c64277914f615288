"""Training on patch trees in this process: what it learns, resumed exactly, shared by workers."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs.pretrain import pretrain, resolve, settings_of
from pathflip.archive.commit import Committer
from pathflip.checkpoints import latest_checkpoint, load_run
from pathflip.errors import CheckpointError, ConfigError
from pathflip.geometry import TREE_NODES
from pathflip.models import MRPLIP
from pathflip.training import run_dir, trainer, tree_dataset
from pathflip.training.multiresolution import MultiResolution, collapse, sentence
from pathflip.training.objective import Worker
from pathflip.training.trainer import train
from pathflip.training.tree_config import MRPretrainConfig, resolve_trees, single_level
from tests.trees import DIM, make_tree_archive, plain_caption, text_row, write_texts

STEPS = 12
TINY_PATCHES = tuple(
    f"model.{name}={value}"
    for name, value in {
        "d": 16, "text_hidden": 16, "text_heads": 2, "text_ffn": 16, "vocab_size": 128,
        "fusion_heads": 2, "fusion_ffn": 16, "projection": 16, "bottleneck": 4,
    }.items()
)  # fmt: skip
SETTINGS = (
    *TINY_PATCHES, f"steps={STEPS}", "save_every=5", "log_every=1", "lr=0.01", "val_every=1",
)  # fmt: skip
"""Four steps an epoch, so a validation each."""
CHANGING = (
    "model.dropout=0.1", "model.selection=frozen_then_current", "model.selection_frozen_share=0.5",
)  # fmt: skip
"""Settings under which a step depends on its number: dropout, positives that change half way."""
NOT_COMPARED = ("trees_per_s", "memory_mb", "seconds")


def uneven_caption(tree: int, node: int, pattern: str, nuclei: str) -> str | None:
    """Caption three nodes of tree 3, tree 6 with two keywords, and no fourth node of others."""
    if tree == 6:
        return f"{nuclei} nuclei in field {node}"
    if tree == 3:
        return plain_caption(tree, node, pattern, nuclei) if node in (0, 30, 60) else None
    return None if node % 4 == 3 else plain_caption(tree, node, pattern, nuclei)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> str:
    """24 trees of 12 slides, three of them for validation; tree 2 has 21 nodes."""
    folder = tmp_path_factory.mktemp("trees")
    return str(
        make_tree_archive(
            folder / "a", caption=uneven_caption, levels=lambda tree: 3 if tree == 2 else 4
        )
    )


def settings(*more: str) -> MRPretrainConfig:
    return resolve_trees("mrplip/mini", overrides=[*SETTINGS, *more])


class Cut(Exception):
    """Ends a run in the middle, as a kill does."""


def go(archive: str, run: Path, *more: str, until: int | None = None) -> MultiResolution:
    """Prepare and train in this process; ``until``: cut off after that step."""
    objective, _ = run_dir.prepare(MultiResolution(settings(*more)), archive, run)

    def progress(at: trainer.TrainingProgress) -> None:
        if at.step == until:
            raise Cut

    try:
        train(run, objective, progress=progress)
    except Cut:
        assert until is not None
    return objective


@pytest.fixture(scope="module")
def whole(archive: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run nothing happened to."""
    run = tmp_path_factory.mktemp("whole") / "run"
    go(archive, run, *CHANGING)
    return run


def lines(run: Path) -> list[dict[str, Any]]:
    """Return the log without values that depend on the clock."""
    return [
        {key: value for key, value in line.items() if key not in NOT_COMPARED}
        for line in run_dir.read_metrics(run)
    ]


def weights(run: Path) -> dict[str, torch.Tensor]:
    found = latest_checkpoint(run / "checkpoints")
    assert found is not None
    return {
        f"{name}/{key}": value
        for name in ("model", "optimizer")
        for key, value in found.tensors(name).items()
    }


# -- the loop -------------------------------------------------------------------------------------


def test_losses_and_alarms_are_logged(whole: Path) -> None:
    steps = [line for line in lines(whole) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    names = [f"loss_{name}" for name in ("itc", "itm", "mlm", "plm", "cvta", "mrtva")]
    for line in steps:
        assert line["loss"] == pytest.approx(sum(line[name] for name in names), rel=1e-5)
        assert 0 <= line["keyword_entropy"] <= 1
        assert 0 <= line["match_accuracy"] <= 1
        assert 0 < line["z_std"] < 1.5
        assert line["cvta_skipped"] == 0
    assert steps[-1]["loss"] < steps[0]["loss"]
    # 4 trees of 8 pairs: a model that knows nothing.
    assert steps[0]["loss_itc"] < 2 * np.log(32)
    val = [line["val"] for line in lines(whole) if "val" in line]
    assert len(val) == 3
    assert (val[-1]["trees"], val[-1]["n"]) == (6, 48)
    assert list(val[-1]["levels"]) == ["5x", "10x", "20x", "40x"]
    assert val[-1]["levels"]["5x"]["gallery"] == 6
    assert val[-1]["loss"] == pytest.approx(sum(val[-1][name] for name in names))
    assert val[-1]["mean_recall"] > 1.5 * np.mean(list(val[-1]["chance"].values()))
    assert isinstance(val[-1]["collapsed"], list)
    assert val[-1]["cvta_skipped"] == pytest.approx(1 / 6)


@pytest.mark.parametrize("until", [3, 11])
def test_resumed_equals_uninterrupted(
    archive: str, whole: Path, tmp_path: Path, until: int
) -> None:
    """Same weights to the bit, same log, though negatives and dropout are drawn."""
    run = tmp_path / "run"
    go(archive, run, *CHANGING, until=until)
    go(archive, run, *CHANGING)
    mine, theirs = weights(run), weights(whole)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert lines(run) == lines(whole)


def test_micro_batches_add_up(archive: str, tmp_path: Path) -> None:
    """Sums over words, trees: those of two halves are those of the whole."""
    whole, _ = run_dir.prepare(MultiResolution(settings()), archive, tmp_path / "run")
    made = trainer.Trainer(tmp_path / "run", whole, Worker())
    halves = replace(made.dataset.sampling, accumulate=2)
    cut = type(made.dataset)(made.dataset.corpus, halves)
    step = next(n for n in range(9) if 3 in made.dataset.step_trees(n))  # has fewer pairs
    (batch,) = made.dataset.micro_batches(step)
    found = made.objective.losses(made.model, batch.to("cpu"), group=None)
    parts = [
        made.objective.losses(made.model, part.to("cpu"), group=None)
        for part in cut.micro_batches(step)
    ]
    for name in ("loss_mlm", "loss_plm", "loss_cvta"):
        assert sum(part[name].count for part in parts) == found[name].count
        total = sum(float(part[name].total.detach()) for part in parts)
        assert total == pytest.approx(float(found[name].total.detach()), rel=1e-5)
    counts = made.objective.counts(made.model, batch)
    assert counts == {name: found[name].count for name in counts}
    assert counts["loss_itc"] == len(batch.captions) == 27


def test_it_starts_from_its_data(archive: str, tmp_path: Path) -> None:
    objective = MultiResolution(settings())
    objective, dataset = run_dir.prepare(objective, archive, tmp_path / "run")
    model = MRPLIP.from_pretrained(tmp_path / "run" / "init")
    features, _, keywords = dataset.start_data
    white = (features - model.feature_mean) @ model.feature_scale
    assert white.mean(0).abs().max() < 1e-4
    assert 0.3 < float(white.std(0).min()) <= float(white.std(0).max()) < 1.01
    assert model.encode_text(keywords, normalize=False).mean(0).abs().max() < 1e-5
    # The words are read from their embeddings: nothing is known of them, and nothing assumed.
    (batch,) = dataset.micro_batches(0)
    output = model(batch.to("cpu"))
    assert float(output.loss_mlm.detach()) == pytest.approx(np.log(len(model.tokenizer)), rel=0.5)
    again = objective.initial(dataset)
    assert again.fingerprint() == model.fingerprint()


# -- the end --------------------------------------------------------------------------------------


def test_the_exported_model(archive: str, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "A run"
    shutil.copytree(whole, run)
    objective, dataset = run_dir.prepare(MultiResolution(settings(*CHANGING)), archive, run)
    result = run_dir.finish(objective, dataset, run)
    run_dir.clear(run)
    assert (result["kind"], result["family"]) == ("multiresolution", "mrplip")
    assert result["collapsed"] == result["val"]["collapsed"]
    assert json.loads((run / "result.json").read_text()) == result
    loaded = load_run(run, family="mrplip")
    assert loaded.name == f"a_run_{loaded.fingerprint[:8]}"
    assert loaded.encoder == {"name": "tex", "revision": "1", "dim": DIM}
    assert loaded.trees == {"parent_um": 256.0, "node_px": 128}
    assert not loaded.model.training
    saved = run_dir.checkpoint_at(run, result["best_step"]).tensors("model")
    for name, value in loaded.model.named_parameters():
        assert torch.equal(value, saved[name])
    card = (run / "README.md").read_text()
    assert "18 training trees of 9 slides and 9 patients" in card
    assert "| 40x |" in card
    assert "Left out of cvta for want of keywords: 17% of validation trees." in card
    assert (result["best_step"], "no figure chose" in card) == (STEPS, True)
    assert settings_of(run) == objective.config
    with pytest.raises(CheckpointError, match=r"is a run of pathflip pretrain --preset mrplip"):
        load_run(run)


def test_signs_of_collapse() -> None:
    made = settings().model
    fine = {"keyword_entropy": 0.8, "cvta_floor": 0.05, "z_std": 0.9, "match_accuracy": 0.66}
    assert collapse(fine, made) == []
    # Keywords that the model chooses itself, all the same: the loss is log k_o and no more.
    assert collapse(fine, replace(made, selection="current")) == ["cvta_floor"]
    bad = {"keyword_entropy": 0.1, "cvta_floor": None, "z_std": 0.01}
    assert collapse(bad, made) == ["keyword_entropy", "z_std"]
    assert "few of the keywords (keyword_entropy 0.10)" in sentence(["keyword_entropy"], bad)
    assert collapse({"keyword_entropy": None}, made) == []


def test_a_collapse_is_said(
    archive: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Projections of a constant: their spread is 0."""
    monkeypatch.setattr(tree_dataset, "VAL_TREES_AT_ONCE", 5)
    objective, dataset = run_dir.prepare(MultiResolution(settings()), archive, tmp_path / "run")
    model = objective.build(dataset, tmp_path / "run" / "init")
    monkeypatch.setattr(
        model.project, "forward", lambda x, group: torch.ones(len(x), model.config.projection)
    )
    with caplog.at_level(logging.WARNING), torch.no_grad():
        val = objective.evaluate(model, dataset, Worker())
    assert val["collapsed"] == ["z_std"]
    assert val["cvta_skipped"] == pytest.approx(1 / 6), "of six trees, in batches of five and one"
    assert "text-guided vectors are nearly one vector" in caplog.text
    assert val["loss"] > val["loss_mrtva"]


def test_a_validation_loss_that_is_not_finite_is_none(archive: str, tmp_path: Path) -> None:
    """Without the loss that failed the sum would be less, and the checkpoint the best."""
    objective, dataset = run_dir.prepare(MultiResolution(settings()), archive, tmp_path / "run")
    model = objective.build(dataset, tmp_path / "run" / "init")
    with torch.no_grad():
        model.match.bias.fill_(torch.nan)
        val = objective.evaluate(model, dataset, Worker())
    assert (val["loss"], val["loss_itm"]) == (None, None)
    assert val["loss_itc"] > 0
    assert settings("best=loss").metric(val) is None


# -- faults ---------------------------------------------------------------------------------------


def test_captions_that_change_end_the_run(tmp_path: Path) -> None:
    uri = str(make_tree_archive(tmp_path / "a", slides=8))
    go(uri, tmp_path / "run", until=2)
    with Committer(uri) as committer:
        said = [f"another text {node}" for node in range(TREE_NODES)]
        write_texts(committer, [text_row("slide001", tx=1, captions=said)])
    with pytest.raises(CheckpointError, match=r"Tree slide001/1_0 is no longer") as caught:
        go(uri, tmp_path / "run")
    assert caught.value.code == "archive_changed"


@pytest.mark.parametrize("more", [(), ("model.selection=current",)])
def test_without_keywords_it_trains_on_the_rest(tmp_path: Path, more: tuple[str, ...]) -> None:
    uri = str(make_tree_archive(tmp_path / "a", slides=5, keywords=False, split=lambda n: "train"))
    go(uri, tmp_path / "run", "steps=2", "val_fraction=0", *more)
    steps = lines(tmp_path / "run")
    assert [line["loss_cvta"] for line in steps] == [None, None]
    assert all(line["loss"] is not None and not line["skipped"] for line in steps)


def test_one_tree_has_nothing_to_be_told_from(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mrtva needs two") as caught:
        settings("batch_size=1")
    assert caught.value.code == "one_tree"
    uri = str(make_tree_archive(tmp_path / "a", slides=1, per_slide=1, split=lambda n: "train"))
    with pytest.raises(ConfigError, match="4 trees of different patients") as caught:
        go(uri, tmp_path / "run", "val_fraction=0")
    assert caught.value.code == "too_few_trees"
    alone = ("batch_size=1", "model.losses=[itc,mlm]", "steps=1", "val_fraction=0")
    go(uri, tmp_path / "run", *alone)
    assert lines(tmp_path / "run")[0]["loss_itc"] > 0


def test_a_single_level_has_as_many_pairs(archive: str, tmp_path: Path) -> None:
    """32 in a step, whatever the level; nothing of another level is seen."""
    made = settings()
    for level, (trees, pairs) in enumerate(((32, 1), (8, 4), (4, 8), (4, 8))):
        losses = ("itc", "itm", "mlm", "plm", "cvta")
        own = single_level(replace(made, model=replace(made.model, levels=(level,), losses=losses)))
        assert (own.batch_size, own.pairs) == (trees, pairs)
        assert own.epochs == own.batch_size // 4 * made.epochs
    go(archive, tmp_path / "run", "model.levels=[1]", "model.losses=[itc,cvta]", "steps=1")
    val = lines(tmp_path / "run")[-1]["val"]
    assert list(val["levels"]) == ["10x"]


def test_a_validation_batch_of_one_pair(
    archive: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six validation trees of one node each, five in a batch: the last one is alone."""
    monkeypatch.setattr(tree_dataset, "VAL_TREES_AT_ONCE", 5)
    single = ("model.levels=[0]", "model.losses=[itc,cvta]", "pairs=1", "steps=1")
    go(archive, tmp_path / "run", *single)
    val = lines(tmp_path / "run")[-1]["val"]
    assert (val["n"], val["trees"], list(val["levels"])) == (6, 6, ["5x"])


def test_a_run_of_the_other_family_is_refused(archive: str, whole: Path) -> None:
    from pathflip.training.contrastive import Contrastive

    assert (
        settings_of(whole)
        == MultiResolution(settings(*CHANGING))
        .fitted(MultiResolution(settings()).load(whole / run_dir.DATA))
        .config
    )
    with pytest.raises(CheckpointError, match="is a run of pathflip pretrain --preset mrplip"):
        run_dir.prepare(Contrastive(resolve("pathflip/mini")), archive, whole)  # type: ignore[arg-type]


# -- the command line -----------------------------------------------------------------------------


def test_dry_run(archive: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pathflip.cli import main

    words = ["pretrain", "--archive", archive, "--run", str(tmp_path / "run"), "--json"]
    words += [word for setting in SETTINGS for word in ("-o", setting)]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--preset", "mrplip/mini", "--dry-run"])
    assert not ended.value.code
    plan = json.loads(capsys.readouterr().out)
    assert (plan["train_trees"], plan["val_trees"], plan["steps"]) == (18, 6, STEPS)
    assert plan["steps_per_epoch"] == 4
    assert plan["parameters"] > 1000
    assert not (tmp_path / "run").exists()
    with pytest.raises(SystemExit):
        main([*words, "--preset", "mrplip/maxi", "--dry-run"])
    error = json.loads(capsys.readouterr().out)["error"]
    assert "mrplip/mini" in error["hint"]
    assert "pathflip/mini" in error["hint"]


def test_a_dry_run_refuses_captions_of_several_sources(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pathflip.cli import main

    uri = str(make_tree_archive(tmp_path / "a", slides=8))
    with Committer(uri) as committer:
        said = [f"another text {node}" for node in range(TREE_NODES)]
        write_texts(committer, [text_row("slide001", tx=1, captions=said, source="vlm")])
    words = ["pretrain", "--archive", uri, "--run", str(tmp_path / "run"), "--dry-run", "--json"]
    words += [word for setting in SETTINGS for word in ("--preset", "mrplip/mini", "-o", setting)]
    with pytest.raises(SystemExit):
        main(words)
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["code"] == "source"
    assert "-o source=" in error["hint"]
    with pytest.raises(SystemExit) as ended:
        main([*words, "-o", "source=oracle"])
    assert not ended.value.code


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_two_workers_on_ray_are_one(archive: str, cluster: str, tmp_path: Path) -> None:
    """Trees have unequal numbers of pairs, words and edges; matching apart, whose draws differ."""
    more = ("steps=3", "model.losses=[itc,mlm,plm,cvta,mrtva]", "clip=0")
    alone, pair = tmp_path / "alone", tmp_path / "pair"
    go(archive, alone, *more)
    result = pretrain(archive, pair, settings(*more, "max_workers=2"))
    assert result["steps"] == result["trained"] == 3
    assert json.loads((pair / "attempt.json").read_text())["workers"] == 2
    for one, two in zip(lines(alone), lines(pair), strict=True):
        for name in ("loss", "loss_itc", "loss_mlm", "loss_plm", "loss_cvta", "loss_mrtva"):
            own, other = (line.get("val", line)[name] for line in (one, two))
            assert own == pytest.approx(other, abs=1e-5), name
    assert result["val"]["itr"] == lines(alone)[-1]["val"]["itr"]
    mine, theirs = weights(alone), weights(pair)
    for key in mine:
        if key.startswith("optimizer/exp_avg/"):  # what the gradients were
            assert torch.allclose(mine[key], theirs[key], atol=1e-5), key
    assert load_run(pair, family="mrplip").config["pairs"] == 8
    assert pretrain(archive, pair, settings(*more, "max_workers=2"))["trained"] == 0
