"""Rules of docstrings: the first sentence says what a thing is or does."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(
    path
    for folder in ("pathflip", "jobs", "serve", "tests")
    for path in (ROOT / folder).rglob("*.py")
)
QUESTION = re.compile(r"(What|Where|Who|Whose|Which|How|Whether)\b")
INDICATIVE = re.compile(r"(Returns|Yields|Reads|Writes|Says|[A-Z][a-z]+s (a|an|the|its|all))\b")
FIELD = re.compile(r"\s+[`*\w]+(?:, [`*\w]+)*: (Of|What|Where|Who|Whose|Which|How)\b")
"""An entry of Args, Attributes or Raises that is no noun phrase."""


def faults(source: str) -> list[str]:
    """Return the docstring lines of a module that break a rule, as `line text`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = ast.get_docstring(node)
        if not text:
            continue
        summary, *rest = text.splitlines()
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        bad = [summary] if QUESTION.match(summary) else []
        bad += [summary] if function and INDICATIVE.match(summary) else []
        bad += [line.strip() for line in rest if FIELD.match(line)]
        found += [f"{node.body[0].lineno} {line}" for line in bad]
    return found


@pytest.mark.parametrize(
    ("docstring", "right"),
    [
        ("Return the loss.", True),
        ("Whatever the seed, the same.", True),
        ("What the model returns.", False),
        ("Returns the loss.", False),
        ("Train.\n\n    Args:\n        seed: Seed of the draws.\n    ", True),
        ("Train.\n\n    Args:\n        seed: Of the draws.\n    ", False),
        ("Train.\n\n    Args:\n        x0, y0: Where it is.\n    ", False),
    ],
)
def test_a_docstring_that_asks_is_found(docstring: str, right: bool) -> None:
    assert (not faults(f'def f():\n    """{docstring}"""\n')) == right


def test_docstrings_say_what_things_are() -> None:
    found = [f"{p.relative_to(ROOT)}:{line}" for p in FILES for line in faults(p.read_text())]
    assert len(FILES) > 100
    assert not found, "\n".join(found)
