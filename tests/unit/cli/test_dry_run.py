"""A dry run tells what is wrong with a file as the run does: same words, same exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pathflip.cli import main
from tests.archives import make_archive

WRONG = {
    "patients": ("--patients", "slide,split\na,train\n", "patient_id"),
    "patients, none": ("--patients", None, "cannot be read"),
    "patients, two rows": ("--patients", "slide,patient_id\na,1\na,2\n", "again, and differs"),
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
    assert "is not a small language model" in err
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
        ["annotations", "import", "{tmp}/none.geojson", "--author", "ann"],
        ["annotations", "remove"],
        ["archive", "import", "--tree-captions", "{tmp}/none.jsonl"],
        ["trees", "keywords", "--terms", "{tmp}/none.txt"],
        ["trees", "keywords"],
        ["trees", "caption", "--vlm", "{tmp}/none"],
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


@pytest.fixture(scope="module")
def trainable(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An archive that has enough slides to train on."""
    folder = tmp_path_factory.mktemp("trainable")
    return str(make_archive(folder / "a", slides=12, split=lambda n: "val" if n < 4 else "train"))


SMALL = ["--preset", "pathflip/mini", "-o", "batch_size=4", "-o", "epochs=2"]


def test_training_over_something_else_is_refused(
    trainable: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pathflip.training import run_dir
    from pathflip.training.config import resolve
    from pathflip.training.contrastive import Contrastive

    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/notes.txt").write_text("mine")
    settings = resolve("pathflip/mini", overrides=["batch_size=4", "epochs=2"])
    run_dir.prepare(Contrastive(settings), trainable, tmp_path / "run")
    made = sorted((tmp_path / "run").iterdir())
    for words, told in (
        (["--run", tmp_path / "notes", *SMALL], "notes.txt"),
        (["--run", tmp_path / "run", *SMALL, "-o", "lr=0.5"], "lr=0.5"),
        (["--run", tmp_path / "run", *SMALL[:2]], "was begun with"),
    ):
        command = ["pretrain", "--archive", trainable, *words]
        code, err = shell(capsys, *command, "--dry-run")
        assert code == 2
        assert told in err
        assert shell(capsys, *command) == (code, err)
    assert [path for path in made if path.name != ".lock"] == [
        path for path in sorted((tmp_path / "run").iterdir()) if path.name != ".lock"
    ]
    code, _ = shell(
        capsys, "pretrain", "--archive", trainable, "--run", tmp_path / "run", *SMALL, "--dry-run"
    )
    assert code == 0, "the run's own settings go on"


def test_ablations_are_planned_and_their_files_read_first(
    trainable: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tasks.yaml").write_text("tasks: 3\n")
    command = ["evaluate", "ablations", "--archive", trainable, "--run", tmp_path / "r", *SMALL]
    for words in (
        ["--tasks", tmp_path / "tasks.yaml"],
        ["--tasks", tmp_path / "none.yaml"],
        ["--truth", tmp_path / "none"],
        ["--only", "ful"],
        ["-o", "batch_size=400"],
    ):
        code, err = shell(capsys, *command, *words, "--dry-run")
        assert code in (1, 2)
        assert shell(capsys, *command, *words) == (code, err)
    fresh = ["--run", str(tmp_path / "fresh")]
    with pytest.raises(SystemExit):
        main([*map(str, command), *fresh, "--only", "full", "--seeds", "2", "--dry-run", "--json"])
    document = json.loads(capsys.readouterr().out)
    # 8 slides in batches of 4, twice.
    assert document["steps"] == {"full-seed0": 4, "full-seed1": 4}
    assert document["trainings"] == 2
    assert not (tmp_path / "fresh").exists()
