"""The file a batch of answers writes: what is done stays, what is half written goes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs import answer
from pathflip.errors import ConfigError

MODEL = "run_01234567"


def line(**more: object) -> str:
    return json.dumps({"slide_id": "s", "model": MODEL, **more})


def test_the_last_line_of_a_request_counts(tmp_path: Path) -> None:
    file = tmp_path / "o.jsonl"
    error = {"code": "damaged", "message": "m", "hint": "h"}
    file.write_text(f"{line(error=error)}\n{line(caption='c')}\n{line(caption='half')[:-5]}")
    found = answer._read_lines(file, MODEL, asking=False)
    assert list(found.values()) == [json.loads(line(caption="c"))]
    assert answer._read_lines(tmp_path / "none", MODEL, asking=False) == {}


def test_a_half_written_line_is_cut_off_before_the_next(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "o.jsonl"
    with answer._appending(file) as stream:
        answer._append(stream, line(caption="one") + "\n")
    with file.open("a") as torn:
        torn.write(line(caption="two")[:9])
    with answer._appending(file) as stream:
        answer._append(stream, line(caption="three") + "\n")
    assert [json.loads(one)["caption"] for one in file.read_text().splitlines()] == ["one", "three"]


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with (
        answer._appending(tmp_path / "o.jsonl"),
        pytest.raises(ConfigError, match="Another process") as refused,
        answer._appending(tmp_path / "o.jsonl"),
    ):
        pass
    assert refused.value.code == "out"


def test_questions_of_a_table_need_no_answers(tmp_path: Path) -> None:
    file = tmp_path / "q.csv"
    file.write_text("slide,question,choices\na,Which tissue?,lung | colon\nb,What is seen?,\n")
    first, second = answer.read_asked(str(file))
    assert (first.slide, first.choices, first.answer) == ("a", ("lung", "colon"), "")
    assert (second.question, second.choices) == ("What is seen?", ())
    file.write_text("slide,question,choices\na,,\n")
    with pytest.raises(ConfigError, match="line 2: no question"):
        answer.read_asked(str(file))
