"""A dry run tells what is wrong with a file as the run does: same words, same exit code."""

from __future__ import annotations

from pathlib import Path

import pytest

from pathflip.cli import main
from tests.archives import make_archive

WRONG = {
    "patients": ("--patients", "slide,split\na,train\n", "patient_id"),
    "patients, none": ("--patients", None, "cannot be read"),
    "patients, two rows": ("--patients", "slide,patient_id\na,1\na,2\n", "two different rows"),
    "captions": ("--captions", "slide,caption\na,\n", "no caption"),
    "captions, none": ("--captions", None, "cannot be read"),
    "questions": ("--questions", "slide,question\na,b\n", ""),
    "questions, none": ("--questions", None, "cannot be read"),
    "mpp": ("--mpp-csv", "slide,mpp\na,wide\n", "'wide'"),
    "mpp, none": ("--mpp-csv", None, "cannot be read"),
    "tissue": ("--tissue", None, "file.csv"),
    "config": ("--config", "encodr: x\n", "Did you mean encoder?"),
    "config, none": ("--config", None, "cannot be read"),
}


def shell(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[object, str]:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code, capsys.readouterr().err


@pytest.mark.parametrize("case", WRONG)
def test_ingest(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flag, text, words = WRONG[case]
    file = tmp_path / "file.csv"
    if text is not None:
        file.write_text(text)
    (tmp_path / "a.svs").write_bytes(b"no slide")
    command = ["ingest", tmp_path / "a.svs", "--archive", tmp_path / "archive", flag, file]
    code, err = shell(capsys, *command, "--dry-run")
    assert code == 2
    assert words in err
    assert not (tmp_path / "archive").exists()
    assert shell(capsys, *command) == (code, err)


def test_a_language_model_is_not_made_over_another_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = make_archive(tmp_path / "archive", slides=6)
    (tmp_path / "llm").mkdir()
    command = ["make-llm", tmp_path / "llm", "--archive", uri]
    code, err = shell(capsys, *command, "--dry-run")
    assert code == 2
    assert "is no small language model" in err
    assert shell(capsys, *command) == (code, err)
    assert list((tmp_path / "llm").iterdir()) == []


@pytest.mark.parametrize(
    "command",
    [
        ["index", "--run", "{tmp}/none"],
        ["pretrain", "--run", "{tmp}/run", "--preset", "pathflip/mni"],
        ["pretrain", "--run", "{tmp}/run", "--config", "{tmp}/none.yaml"],
        ["tune", "--run", "{tmp}/none", "--llm", "{tmp}/none", "--out", "{tmp}/out"],
        ["decompose", "--llm", "{tmp}/none"],
        ["caption", "--run", "{tmp}/none", "--all", "--out", "{tmp}/o.jsonl"],
        ["ask", "--run", "{tmp}/none", "--questions", "{tmp}/none.csv", "--out", "{tmp}/o.jsonl"],
        ["archive", "import", "--captions", "{tmp}/none.csv"],
        ["archive", "import", "--labels", "{tmp}/none.csv"],
        ["make-llm", "{tmp}/llm", "--run", "{tmp}/none"],
    ],
    ids=lambda command: " ".join(command[:4]),
)
def test_other_jobs(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = make_archive(tmp_path / "archive", slides=6)
    words = [part.replace("{tmp}", str(tmp_path)) for part in command]
    before = sorted(tmp_path.rglob("*"))
    code, err = shell(capsys, *words, "--archive", uri, "--dry-run")
    assert code in (1, 2)
    assert err.startswith("pathflip: ")
    assert shell(capsys, *words, "--archive", uri) == (code, err)
    assert sorted(tmp_path.rglob("*")) == before


def test_repair_says_what_is_damaged_and_touches_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = make_archive(tmp_path / "archive", slides=3)
    damaged = next(Path(uri).glob("captions.lance/data/*"))
    damaged.write_bytes(b"x" + damaged.read_bytes()[1:])
    before = {path: path.stat().st_mtime_ns for path in Path(uri).rglob("*")}
    with pytest.raises(SystemExit) as ended:
        main(["archive", "repair", "--archive", str(uri), "--dry-run", "--json"])
    assert not ended.value.code
    out = capsys.readouterr().out
    assert '"dry_run": true' in out
    assert "captions file" in out
    assert {path: path.stat().st_mtime_ns for path in Path(uri).rglob("*")} == before
