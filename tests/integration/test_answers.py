"""The batch job: questions about many slides on Ray with vLLM, into a file that is added to."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.answer import caption_all
from pathflip.archive import Archive
from pathflip.checkpoints import load_run
from pathflip.errors import ConfigError
from pathflip.slide_qa import SlideQA, tuned_name
from tests.serving import Tuned

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

CHOICES = ["colon", "breast", "lung", "muscle"]
BAD = "slide002"
Shell = Callable[..., tuple[int, Any]]


@pytest.fixture(scope="module")
def damaged(tuned: Tuned, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive without the features of one slide that is said to be ready."""
    import lance

    uri = tmp_path_factory.mktemp("damaged") / "archive"
    shutil.copytree(tuned.archive, uri)
    lance.dataset(str(uri / "features_tex.lance")).delete(f"slide_id = '{BAD}'")
    return uri


@pytest.fixture
def ask(
    cluster: str, tuned: Tuned, damaged: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> Shell:
    """``ask(arguments…) -> (exit code, JSON document)``: the command over a file of questions."""
    from pathflip.cli import main

    file = tmp_path / "questions.csv"
    rows = [f"slide{n:03d}.svs,Which tissue is shown?,{'|'.join(CHOICES)}" for n in range(5)]
    rows += [f"slide{n:03d},What is seen?," for n in range(4)]
    file.write_text("\n".join(["slide,question,choices", *rows, "ghost,What is seen?,"]) + "\n")

    def run(*arguments: object) -> tuple[int, Any]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(
                ["ask", "--archive", str(damaged), "--run", str(tuned.run), "--json",
                 "--questions", str(file), "--max-new-tokens", "8", *map(str, arguments)]
            )  # fmt: skip
        out, err = capfd.readouterr()
        assert isinstance(ended.value.code, int), err
        return ended.value.code, json.loads(out)

    return run


def test_questions_are_answered_once_whatever_was_there(
    ask: Shell, tuned: Tuned, damaged: Path, tmp_path: Path
) -> None:
    """A file whose writer was killed in a line, a slide that cannot be read, a name of no slide."""
    out = tmp_path / "answers.jsonl"
    model = tuned_name(load_run(tuned.run))
    kept = json.dumps(
        {"slide_id": "slide000", "model": model, "question": "Which tissue is shown?",
         "choices": CHOICES, "answer": "what was there", "choice": "A", "scores": {}}
    )  # fmt: skip
    torn = f'{kept}\n{{"slide_id": "slide001", "model": "{model}", "question": "Wh'
    out.write_text(torn)
    code, plan = ask("--out", out, "--dry-run")
    assert (code, plan["written"], plan["skipped"], plan["dry_run"]) == (0, 8, 1, True)
    assert out.read_text() == torn
    code, result = ask("--out", out, "-o", "slides_at_once=2")
    assert code == 3
    assert result["failed"] == {BAD: "damaged"}
    assert (result["written"], result["skipped"], result["unmatched"]) == (6, 1, ["ghost"])
    text = out.read_text()
    assert text.startswith(kept + "\n")
    assert text.endswith("\n")
    lines = [json.loads(line) for line in text.splitlines()]
    assert len(lines) == 9
    assert {line["model"] for line in lines} == {model}
    answerer, archive = SlideQA.from_run(tuned.run), Archive(damaged)
    for line in lines[1:]:
        if line["slide_id"] == BAD:
            assert line["error"]["code"] == "damaged"
            assert "answer" not in line
            continue
        answer = answerer.ask(
            archive, line["slide_id"], line["question"], line["choices"], max_new_tokens=8
        )
        assert (line["answer"], line["choice"]) == (answer.answer, answer.choice)
        assert line["scores"] == pytest.approx(answer.scores, abs=1e-5)
    asked = {(line["slide_id"], line["question"]) for line in lines}
    assert len(asked) == 9
    code, plan = ask("--out", out, "--dry-run")
    assert (plan["written"], plan["skipped"]) == (2, 7), "what failed is tried again"
    assert out.read_text() == text


def test_files_of_something_else_are_left_alone(ask: Shell, tuned: Tuned, tmp_path: Path) -> None:
    out = tmp_path / "lines.jsonl"
    model = tuned_name(load_run(tuned.run))
    for text, what in {
        '{"slide_id": "slide000", "model": "other_01234567", "question": "q"}\n': "of model other",
        json.dumps({"slide_id": "s", "model": model, "caption": "c"}) + "\n": "is a caption",
        "slide,answer\n": "line 1 is neither a caption nor an answer",
        "a note without an end": "not a file of JSON lines",
    }.items():
        out.write_text(text)
        code, document = ask("--out", out)
        assert (code, document["error"]["code"]) == (2, "out")
        assert what in document["error"]["message"]
        assert out.read_text() == text


def test_two_writers_of_one_file(ask: Shell, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    with out.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        code, document = ask("--out", out)
    assert (code, document["error"]["code"]) == (2, "out")
    assert "Another process" in document["error"]["message"]


def test_captions_that_are_all_there_start_nothing(tuned: Tuned, tmp_path: Path) -> None:
    out = tmp_path / "captions.jsonl"
    plan = caption_all(str(tuned.archive), str(tuned.run), str(out), dry_run=True)
    assert (plan.written, plan.skipped) == (8, 0)
    assert not out.exists()
    rows = [{"slide_id": f"slide{n:03d}", "model": plan.model, "caption": "c"} for n in range(8)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    out.write_text(text)
    done = caption_all(str(tuned.archive), str(tuned.run), str(out))
    assert (done.written, done.skipped, done.failed) == (0, 8, {})
    assert out.read_text() == text
    with pytest.raises(ConfigError, match="split test"):
        caption_all(str(tuned.archive), str(tuned.run), str(out), split="test", dry_run=True)
