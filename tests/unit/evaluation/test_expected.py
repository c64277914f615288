"""Figures of papers beside measured ones: where a number is found, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pathflip.errors import ConfigError
from pathflip.evaluation.expected import compare, figure_at, read_expected

DOCUMENT = {
    "a": {"auc": 0.5, "n": 3}, "b": {"auc": 0.7}, "c": {"auc": None}, "d": 4, "yes": True,
    "itr": {"r@1": 0.25},
}  # fmt: skip
ROW = {"table": "T", "name": "x", "expected": 0.3, "file": "x.json", "key": "itr.r@1"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("itr.r@1", 0.25), ("*.auc", 0.6), ("d", 4), ("a.n", 3), ("itr.*", 0.25),
        ("itr", None), ("c.auc", None), ("yes", None), ("none.auc", None), ("d.auc", None),
    ],
)  # fmt: skip
def test_a_key_leads_to_a_number(key: str, value: float | None) -> None:
    assert figure_at(DOCUMENT, key) == (None if value is None else pytest.approx(value))


def test_figures_are_compared_with_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps(DOCUMENT))
    found = compare([ROW, ROW | {"file": "none.json"}], tmp_path)
    assert found[0] == {
        "table": "T", "name": "x", "expected": 0.3, "measured": 0.25,
        "difference": pytest.approx(-0.05),
    }  # fmt: skip
    assert (found[1]["measured"], found[1]["difference"]) == (None, None)


def test_a_document_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"itr":')
    with pytest.raises(ConfigError, match=r"x\.json is no JSON"):
        compare([ROW], tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("figures: [", "is no YAML"),
        ("[]", "has no list of figures"),
        ("figures: []", "has no list of figures"),
        ("figures: [7]", "7 is no figure"),
        ("figures: [{table: T, name: x}]", "is no figure"),
        ("figures: [{table: T, name: x, expected: much, file: f, key: k}]", "is no figure"),
    ],
)
def test_what_is_no_list_of_figures_is_refused(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "e.yaml").write_text(content)
    with pytest.raises(ConfigError, match=words):
        read_expected(tmp_path / "e.yaml")


def test_figures_are_read(tmp_path: Path) -> None:
    (tmp_path / "e.yaml").write_text(json.dumps({"figures": [ROW]}))
    assert read_expected(tmp_path / "e.yaml") == [ROW]
