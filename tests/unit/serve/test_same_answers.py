"""The service and the command line answer the same query with the same rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pathflip.archive import Archive
from pathflip.cli import main
from tests.unit.serve.service_fixture import World, pixels, png


@pytest.fixture
def shell(world: World, capsys: pytest.CaptureFixture[str]) -> Any:
    """``shell(*words)``: the document of ``pathflip search`` with the service's run."""

    def search(*words: object, run: bool = True) -> Any:
        given = ["--archive", world.archive, *(["--run", world.run] if run else []), "--json"]
        with pytest.raises(SystemExit):
            main(["search", *map(str, words), *map(str, given)])
        return json.loads(capsys.readouterr().out)

    return search


TEST = {"field": "split", "op": "=", "value": "test"}
EAST = {"field": "x0", "op": ">=", "value": 128}
GRADE = {"field": "label.grade", "op": "=", "value": "2"}


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"text": "mucin"}, ["mucin"]),
        ({"text": "mucin", "level": "slide"}, ["mucin", "--level", "slide"]),
        (
            {"text": "mucin", "mode": "text", "level": "slide"},
            ["mucin", "--mode", "text", "--level", "slide"],
        ),
        ({"text": "mucin colon", "mode": "hybrid"}, ["mucin colon", "--mode", "hybrid"]),
        (
            {"text": "mucin", "mode": "hybrid", "level": "slide", "k": 3},
            ["mucin", "--mode", "hybrid", "--level", "slide", "-k", 3],
        ),
        ({"slide_id": "slide001"}, ["--slide", "slide001"]),
        ({"region_id": "slide002/1_0", "k": 99}, ["--region", "slide002/1_0", "-k", 99]),
        (
            {"slide_id": "slide002", "exclude_same_slide": True},
            ["--slide", "slide002", "--exclude-same-slide"],
        ),
        (
            {"region_id": "slide002/1_0", "exclude_same_patient": True, "level": "slide"},
            ["--region", "slide002/1_0", "--exclude-same-patient", "--level", "slide"],
        ),
        (
            {"text": "mucin", "filters": [TEST, EAST]},
            ["mucin", "--where", "split=test", "--where", "x0>=128"],
        ),
        ({"text": "mucin", "filters": [GRADE]}, ["mucin", "--where", "label.grade=2"]),
        (
            {"text": "mucin", "mode": "hybrid", "filters": [GRADE | {"op": "!="}]},
            ["mucin", "--mode", "hybrid", "--where", "label.grade!=2"],
        ),
    ],
)
def test_rows(ask: Any, shell: Any, asked: dict[str, Any], words: list[object]) -> None:
    answer = ask("POST", "/v1/search", json=asked)
    assert answer.status_code == 200
    assert answer.json()["results"] == shell(*words) != []


def test_a_picture(ask: Any, shell: Any, world: World, tmp_path: Path) -> None:
    from PIL import Image

    Image.fromarray(pixels(1, 2)).save(tmp_path / "crop.png")
    asked = {"image": {"data": png(pixels(1, 2)), "mpp": 0.5}, "k": 4}
    rows = ask("POST", "/v1/search", json=asked).json()["results"]
    assert rows == shell("--image", tmp_path / "crop.png", "--mpp", 0.5, "-k", 4)
    assert rows[0]["region_id"] == "slide001/2_0"
    # Without a model, by the encoder: the mean of the patches, which the archive has of regions.
    rows = shell("--image", tmp_path / "crop.png", "--mpp", 0.5, "-k", 1, run=False)
    assert rows[0]["region_id"] == "slide001/2_0"
    stored = {row["id"]: row["vector"] for row in Archive(world.archive).embeddings().to_pylist()}
    assert rows[0]["score"] == pytest.approx(np.linalg.norm(stored["slide001/2_0"]), abs=1e-3)


@pytest.mark.parametrize(
    ("asked", "words", "status", "codes"),
    [
        (
            {"slide_id": "slide003", "exclude_same_patient": True},
            ["--slide", "slide003", "--exclude-same-patient"],
            422,
            ("no_patient", "config"),
        ),
        ({"slide_id": "nobody"}, ["--slide", "nobody"], 404, ("unknown_slide", "unknown_slide")),
        (
            {"region_id": "slide001/9_9"},
            ["--region", "slide001/9_9"],
            404,
            ("unknown_slide", "unknown_slide"),
        ),
        (
            {"text": "a", "filters": [{"field": "x0", "op": "=", "value": "a"}]},
            ["a", "--where", "x0=a"],
            422,
            ("config", "config"),
        ),
        (
            {"text": "a", "filters": [GRADE | {"field": "label.organ"}]},
            ["a", "--where", "label.organ=2"],
            422,
            ("unknown_label", "unknown_label"),
        ),
        ({"text": "a", "mode": "text"}, ["a", "--mode", "text"], 422, ("invalid", "config")),
        (
            {"slide_id": "slide001", "mode": "hybrid"},
            ["--slide", "slide001", "--mode", "hybrid"],
            422,
            ("invalid", "config"),
        ),
        (
            {"text": "a", "exclude_same_slide": True},
            ["a", "--exclude-same-slide"],
            422,
            ("invalid", "config"),
        ),
        ({"text": "a", "slide_id": "b"}, ["a", "--slide", "b"], 422, ("invalid", "config")),
    ],
)
def test_refusals(
    ask: Any,
    shell: Any,
    asked: dict[str, Any],
    words: list[object],
    status: int,
    codes: tuple[str, str],
) -> None:
    answer = ask("POST", "/v1/search", json=asked)
    assert (answer.status_code, answer.json()["code"]) == (status, codes[0])
    assert shell(*words)["error"]["code"] == codes[1]
