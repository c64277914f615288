"""Settings of commands: a flag wins over -o, -o over a file, and each can undo what is below it."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from pathflip.cli import main


class Reached(Exception):
    """A job was called; with the settings it was given."""


@pytest.fixture
def settings_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``settings_of("jobs.ingest", "ingest", arguments…)``: settings a command gives its job."""

    def run(module: str, name: str, *arguments: object) -> Any:
        def stand_in(*args: Any, **kwargs: Any) -> None:
            kept.append((args, kwargs))
            raise Reached

        kept: list[Any] = []
        monkeypatch.setattr(importlib.import_module(module), name, stand_in)
        with pytest.raises(Reached):
            main([str(argument) for argument in arguments])
        args, kwargs = kept[0]
        return kwargs["config"] if "config" in kwargs else args[2]

    return run


@pytest.fixture
def ingest(settings_of: Any, tmp_path: Path) -> Any:
    file = tmp_path / "c.yaml"
    file.write_text(
        "encoder: texture\nretry: true\nadd_encoder: true\ncaptions: reports.csv\n"
        "actors: 3\ntiling: {mpp: 0.25, patch_um: 64}\n"
    )

    def run(*more: object) -> Any:
        return settings_of(
            "jobs.ingest", "ingest", "ingest", "x", "--archive", "a", "--config", file, *more
        )

    return run


def test_a_file_sets_what_no_flag_does(ingest: Any) -> None:
    config = ingest()
    assert (config.retry, config.add_encoder, config.captions) == (True, True, "reports.csv")
    assert config.tiling.mpp == 0.25


def test_flags_undo_a_file(ingest: Any) -> None:
    config = ingest("--no-retry", "--no-add-encoder", "--captions", "other.csv")
    assert (config.retry, config.add_encoder, config.captions) == (False, False, "other.csv")
    config = ingest("-o", "retry=false", "--retry")
    assert config.retry


def test_null_undoes_a_file(ingest: Any) -> None:
    from jobs.ingest.config import IngestConfig

    config = ingest("-o", "captions=null", "-o", "retry=null", "-o", "actors=null")
    assert (config.captions, config.retry, config.actors) == (None, False, None)
    assert config.tiling.mpp == 0.25
    assert ingest("-o", "tiling=null").tiling == IngestConfig().tiling


BATCHES = {
    "caption_all": ["caption", "--all"],
    "ask_all": ["ask", "--questions", "q.csv"],
}


@pytest.mark.parametrize("job", BATCHES)
def test_a_flag_at_its_default_wins_over_a_file(job: str, settings_of: Any, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("max_new_tokens: 256\npermute: 4\nengine: {device: cuda, threads: 2}\n")
    common = ["--archive", "a", "--run", "r", "--out", "o.jsonl", "--config", file]
    command = [*BATCHES[job], *common]
    config = settings_of("jobs.answer", job, *command)
    assert (config.max_new_tokens, config.permute) == (256, 4)
    assert (config.engine.device, config.engine.threads) == ("cuda", 2)
    config = settings_of("jobs.answer", job, *command, "--max-new-tokens", 512, "--device", "auto")
    assert (config.max_new_tokens, config.engine.device, config.engine.threads) == (512, "auto", 2)
    if job == "ask_all":
        assert settings_of("jobs.answer", job, *command, "--permute", 1).permute == 1


@pytest.mark.parametrize(
    ("command", "setting", "words"),
    [
        (["decompose", "--llm", "l"], "engine.max_num_seq=3", "Did you mean max_num_seqs?"),
        (["decompose", "--llm", "l"], "engine.kv_gib=0", "kv_gib is 0"),
        (["decompose", "--llm", "l"], "captions_at_once=0", "captions_at_once is 0"),
        (["decompose", "--llm", "l"], "engine.device=gpu", "'gpu' is not valid"),
        (["caption", "--run", "r", "--all", "--out", "o"], "engine.thread=1", "mean threads?"),
        (["caption", "--run", "r", "--all", "--out", "o"], "actors=0", "actors is 0"),
        (["caption", "--run", "r", "--all", "--out", "o"], "engine=3", "engine = 3 is not valid"),
        (["index", "--run", "r"], "commit_row=1", "Did you mean commit_rows?"),
        (["index", "--run", "r"], "actors=-1", "actors is -1"),
    ],
)
def test_wrong_settings_are_named_before_anything_is_opened(
    command: list[str], setting: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--archive", "/nowhere", "-o", setting])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_ablations_take_the_settings_of_a_preset(settings_of: Any, tmp_path: Path) -> None:
    options = settings_of(
        "jobs.ablations", "ablations", "evaluate", "ablations", "--archive", "a", "--run", tmp_path,
        "--preset", "pathflip/mini", "--seeds", 2, "--only", "full", "--parallel", 3,
    )  # fmt: skip
    assert (options.seeds, options.only, options.parallel) == (2, ("full",), 3)
