"""The notebook as it is stored: executed from first cell to last, small, without an error."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

NOTEBOOK = Path(__file__).parents[2] / "docs" / "howto" / "notebook.ipynb"
MOST_BYTES = 1_500_000
SHOWN = {"slide", "archive", "search", "alike", "ground"}
"""Cells that show pictures."""


@pytest.fixture(scope="module")
def stored() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return document


def code(stored: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Cells of code by their names."""
    return {cell["id"]: cell for cell in stored["cells"] if cell["cell_type"] == "code"}


def test_it_is_small() -> None:
    assert NOTEBOOK.stat().st_size < MOST_BYTES


def test_every_cell_ran_in_order_and_none_failed(stored: dict[str, Any]) -> None:
    cells = code(stored)
    assert [cell["execution_count"] for cell in cells.values()] == list(range(1, len(cells) + 1))
    for name, cell in cells.items():
        for output in cell["outputs"]:
            assert output["output_type"] in ("stream", "display_data", "execute_result"), name
            text = "".join(output.get("text", ""))
            assert "Traceback" not in text, name
            assert not re.search(r"^\w+: error|quarantined: [1-9]", text, re.MULTILINE), name


def test_it_walks_from_slides_to_an_answer(stored: dict[str, Any]) -> None:
    cells = code(stored)
    said = {name: "".join(cell["source"]) for name, cell in cells.items()}
    order = list(said)
    steps = {"ingest-run": "pathflip ingest", "search": "find(", "ground": "ground_slide(",
             "ask": ".ask(", "view": "archive.view("}  # fmt: skip
    assert [order.index(name) for name in steps] == sorted(order.index(name) for name in steps)
    assert all(text in said[name] for name, text in steps.items())


def pictures(cell: dict[str, Any]) -> list[bytes]:
    """Pictures of a cell's outputs: of their own, and inside HTML."""
    found = []
    for output in cell["outputs"]:
        data = output.get("data", {})
        found += [data[kind] for kind in ("image/jpeg", "image/png") if kind in data]
        html = "".join(data.get("text/html", ""))
        found += re.findall(r'src="data:image/\w+;base64,([^"]+)"', html)
    return [base64.b64decode(one) for one in found]


def test_its_pictures_are_pictures_and_nothing_in_it_can_act(stored: dict[str, Any]) -> None:
    for name, cell in code(stored).items():
        shown = [cv2.imdecode(np.frombuffer(one, np.uint8), 1) for one in pictures(cell)]
        assert bool(shown) == (name in SHOWN), name
        for picture in shown:
            assert picture is not None
            assert max(picture.shape) <= 640
            assert picture.std() > 5  # something is on it
        for output in cell["outputs"]:
            html = "".join(output.get("data", {}).get("text/html", ""))
            assert "<script" not in html
            assert not re.search(r"\son\w+=", html)


def test_it_tells_nothing_of_the_machine_it_ran_on(stored: dict[str, Any]) -> None:
    text = json.dumps([cell["outputs"] for cell in code(stored).values()])
    text = re.sub(r"base64,[^\"\\]+", "", text)
    assert not re.search(r"(?<![\w.])/(home|root|tmp|work|Users|mnt)/", text)
    assert "127.0.0.1" not in text  # of a server that ended with the kernel
