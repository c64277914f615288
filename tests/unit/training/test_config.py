"""Settings of a run: what goes over what, the schedule, which parameters decay."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pathflip.config import load_config, read_yaml
from pathflip.errors import CheckpointError, ConfigError
from pathflip.models import PRESETS
from pathflip.training.config import PretrainConfig, resolve
from pathflip.training.loop_config import differing, read_settings, save_settings
from pathflip.training.optim import learning_rate, parameter_groups


def test_what_goes_over_what(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("lr: 0.5\nbatch_size: 12\nepochs: 7\nmodel: {negatives: local}\n")
    made = resolve(
        "pathflip/mini",
        file=file,
        overrides=["batch_size=24", "epochs=8", "seed=3"],
        given={"epochs": 9},
    )
    assert (made.lr, made.batch_size, made.epochs, made.seed) == (0.5, 24, 9, 3)
    assert made.preset == "pathflip/mini"
    mini = PRESETS["pathflip/mini"]
    assert made.model == replace(mini.model, negatives="local")
    plain = resolve("pathflip/mini")
    for key, value in mini.train.items():
        assert getattr(plain, key) == value


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_resolves(name: str) -> None:
    made = resolve(name)
    assert made.model == PRESETS[name].model
    assert made == resolve(overrides=[f"preset={name}"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["preset=pathflip/none"], "no preset 'pathflip/none'"),
        (["lrr=1"], "no setting 'lrr'"),
        (["model.negative=local"], "no setting 'negative'"),
        (["lr=-1"], "lr is -1"),
        (["batch_size=9", "accumulate=2"], "batch_size 9 cannot be cut into 2"),
        (["max_workers=1", "min_workers=2"], "min_workers 2 is more than max_workers 1"),
        (["subcaption_source=words"], "subcaption_source"),
    ],
)
def test_what_cannot_be_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(None if "preset" in overrides[0] else "pathflip/mini", overrides=overrides)


def test_numbers_stay_numbers(tmp_path: Path) -> None:
    """YAML 1.1 takes 1e-05 for text; presets never become text at all."""
    assert resolve("pathflip/mini", overrides=["lr=1e-05"]).lr == 1e-05
    file = tmp_path / "run.yaml"
    file.write_text("lr: 1e-05\nmodel: {temperature: 7E-2}\n")
    made = resolve("pathflip/mini", file=file)
    assert (made.lr, made.model.temperature) == (1e-05, 0.07)
    assert read_yaml(file) == {"lr": 1e-05, "model": {"temperature": 0.07}}
    text = PretrainConfig(source="1e5")  # a name that looks like a number stays a name
    assert resolve(base=text).source == "1e5"


def test_settings_may_go_over_those_of_a_run() -> None:
    made = resolve("pathflip/mini", overrides=["lr=0.5", "model.d=48"])
    over = resolve(base=made, overrides=["epochs=3", "model.negatives=local"])
    assert over == replace(made, epochs=3, model=replace(made.model, negatives="local"))


@pytest.mark.parametrize(
    ("former", "name", "value"),
    [
        ("pieces", "subcaption_source", "statements"),
        ("contig_off_by_one", "v1_window_bug", True),
    ],
)
def test_former_names_of_settings_still_work(
    tmp_path: Path, former: str, name: str, value: Any
) -> None:
    made = resolve("pathflip/mini", overrides=[f"{former}={value}"])
    assert getattr(made, name) == value
    file = tmp_path / "run.yaml"
    file.write_text(f"{former}: {value}\n")
    assert resolve("pathflip/mini", file=file) == made
    with pytest.raises(ConfigError, match="former name"):
        load_config(PretrainConfig, given={former: value, name: value})


def test_a_file_is_named_where_it_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("epoch: 3\n")
    with pytest.raises(ConfigError, match=r"bad\.yaml: there is no setting 'epoch'") as caught:
        resolve("pathflip/mini", file=file)
    assert caught.value.hint == "Did you mean epochs?"


def test_settings_survive_the_run_folder(tmp_path: Path) -> None:
    made = resolve("pathflip/mini", overrides=["lr=3e-4", "steps=11", "max_regions=null"])
    (tmp_path / "config.yaml").write_text(save_settings(made))
    assert read_settings(tmp_path, PretrainConfig) == made
    (tmp_path / "config.yaml").write_text("of: something else\n")
    with pytest.raises(CheckpointError, match="no setting 'of'"):
        read_settings(tmp_path, PretrainConfig)


def test_differing_names_what_matters() -> None:
    made = resolve("pathflip/mini")
    same = replace(made, max_workers=2, log_every=1, cache_mb=0)
    assert differing(made, same) == []
    other = replace(made, lr=0.5, model=replace(made.model, negatives="local"))
    assert {key for key, _, _ in differing(made, other)} == {"model.negatives", "lr"}


def test_learning_rate() -> None:
    """Linear to the peak over 5 %, then half a cosine that ends at the floor."""
    rates = [learning_rate(n, steps=200, peak=1.0, floor=0.1, warmup=0.05) for n in range(200)]
    assert rates[:10] == pytest.approx([(n + 1) / 10 for n in range(10)])
    assert rates[10] == 1.0
    assert rates[-1] == pytest.approx(0.1)
    middle = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 100 / 189))
    assert rates[110] == pytest.approx(middle)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert learning_rate(0, steps=1, peak=1.0, floor=0.1, warmup=0.0) == 1.0


def test_what_decays() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(3, 3)
            self.norm = torch.nn.LayerNorm(3)
            self.query_tokens = torch.nn.Parameter(torch.zeros(1, 2, 3))
            self.scale = torch.nn.Parameter(torch.tensor(1.0))
            self.frozen = torch.nn.Parameter(torch.zeros(3, 3), requires_grad=False)

    model = Model()
    decayed, plain = parameter_groups(model, 0.05)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    assert [id(p) for p in decayed["params"]] == [id(model.linear.weight)]
    assert len(plain["params"]) == 5


def test_best_is_by_recall_or_loss() -> None:
    val: dict[str, Any] = {"mean_recall": 0.4, "loss": 2.0}
    config: Any = PretrainConfig
    assert config(best="recall").metric(val) == 0.4
    assert config(best="loss").metric(val) == -2.0
    assert config(best="last").metric(val) is None
    assert config(best="loss").metric({"mean_recall": 0.4, "loss": None}) is None
