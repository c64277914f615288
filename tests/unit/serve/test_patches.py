"""Patches by words and pictures, and segmentation, over a real patch model's features."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import cv2
import httpx
import numpy as np
import pytest

from pathflip.archive import Archive
from pathflip.checkpoints import load_run
from pathflip.errors import ArchiveError, EncoderError
from pathflip.evaluation.patch_text import class_weights, patch_reader
from pathflip.evaluation.prompts import TEMPLATES
from pathflip.evaluation.segment_stored import segment_stored
from pathflip.search import Query, embed_texts, run_query
from serve.auth import read_tokens
from serve.config import ServeConfig, check_inputs
from serve.embedder import Embedder
from serve.ingress import Parts, make_app
from serve.search import Search
from tests.unit.serve.service_fixture import (
    PX,
    SECRETS,
    SIDE,
    World,
    bearer,
    make_world,
    pixels,
    png,
    rows_of,
    slide_id,
)

CLASSES = {"round": ["round nuclei", "clear nuclei"], "dark": ["dark nuclei"], "é": ["tissue"]}


@pytest.fixture(scope="module")
def patches(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("patches"), patches=True)


@pytest.fixture(scope="module")
def ask_patches(patches: World, loop: asyncio.AbstractEventLoop) -> Callable[..., httpx.Response]:
    archive, run = str(patches.archive), str(patches.run)
    fingerprint = patches.loaded.fingerprint
    parts = Parts(
        embedder=Embedder(archive, run, patches=patches.patches),
        search=Search(archive, model=patches.loaded.name, fingerprint=fingerprint),
        grounding=None,
        redactions={archive: "the archive"},
    )
    app = make_app(parts, tokens=read_tokens(patches.token_file))

    def ask(path: str, **body: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
                return await http.post(path, headers=bearer("all"), json=body)

        return loop.run_until_complete(send())

    return ask


def model_of(world: World) -> Any:
    assert world.patches is not None
    return load_run(world.patches.removeprefix("mrplip:"), family="mrplip")


def test_patches_by_words_are_the_librarys(ask_patches: Any, patches: World) -> None:
    archive, run = Archive(patches.archive), model_of(patches)
    (name,) = set(archive.encoders()) - {"texture"}
    text = "round nuclei"
    query = Query(text=text, vector=embed_texts(run, [text])[0], level="patch", k=7, encoder=name)
    expected = run_query(archive, query)
    answer = ask_patches("/v1/search", text=text, level="patch", k=7)
    assert answer.status_code == 200
    found = answer.json()
    assert (found["model"], found["exhaustive"]) == (name, True)
    assert len(found["results"]) == 7
    for ours, theirs in zip(found["results"], rows_of(expected), strict=True):
        assert ours.pop("score") == pytest.approx(theirs.pop("score"), abs=1e-6)
        assert ours == theirs
    more = {"filters": [{"field": "slide_id", "op": "=", "value": "slide002"}]}
    rows = ask_patches("/v1/search", text=text, level="patch", k=50, **more).json()["results"]
    assert {row["slide_id"] for row in rows} == {"slide002"}
    # What asks for regions is answered by the slide model as ever.
    regions = ask_patches("/v1/search", text=text, k=3).json()
    assert regions["model"] == patches.loaded.name
    assert "exhaustive" not in regions


def test_a_picture_of_a_patch_finds_it(ask_patches: Any) -> None:
    for n, number, row, column in ((1, 2, 0, 1), (3, 0, 1, 0)):
        cut = pixels(n, number)[row * PX : (row + 1) * PX, column * PX : (column + 1) * PX]
        image = {"data": png(cut), "mpp": 0.5}
        answer = ask_patches("/v1/search", image=image, level="patch", k=1)
        (best,) = answer.json()["results"]
        assert best["region_id"] == f"{slide_id(n)}/{number}_0"
        assert (best["x0"], best["y0"]) == ((number * SIDE + column) * PX, row * PX)
        assert best["size0"] == PX
        assert best["score"] == pytest.approx(1, abs=1e-3)


def test_segmentation_is_the_librarys(ask_patches: Any, patches: World) -> None:
    archive, run = Archive(patches.archive), model_of(patches)
    (name,) = set(archive.encoders()) - {"texture"}
    reader = patch_reader(run, pixels=False)
    for templates, wording in (("ensemble", TEMPLATES), ("single", TEMPLATES[:1])):
        weights = class_weights(reader, CLASSES, templates=wording)
        expected = segment_stored(
            archive, "slide001", list(CLASSES), weights, tau=reader.tau, encoder=name,
            min_patches=1,
        )  # fmt: skip
        asked = {"slide_id": "slide001", "classes": CLASSES, "templates": templates}
        found = ask_patches("/v1/segment", **asked, min_patches=1).json()
        assert found.pop("model") == name
        assert sum(found["shares"].values()) == pytest.approx(1)
        assert found == expected.as_json()
        outlines = ask_patches("/v1/segment", **asked, min_patches=1, format="geojson").json()
        assert outlines == {**expected.geojson(), "features": rows_of_json(expected)}
    picture = ask_patches("/v1/segment", **asked, format="png")
    assert picture.headers["content-type"] == "image/png"
    drawn = cv2.imdecode(np.frombuffer(picture.content, np.uint8), cv2.IMREAD_COLOR)
    thumbnail = Archive(patches.archive).slide("slide001")["thumbnail"]
    plain = cv2.imdecode(np.frombuffer(thumbnail, np.uint8), cv2.IMREAD_COLOR)
    assert drawn.shape[0] == plain.shape[0] + 20 * len(CLASSES) + 4
    assert (drawn[: plain.shape[0], : plain.shape[1]] != plain).any(axis=2).mean() > 0.9


def rows_of_json(found: Any) -> list[dict[str, Any]]:
    """Features with lists where JSON has them."""
    import json

    rows: list[dict[str, Any]] = json.loads(json.dumps(found.geojson()["features"]))
    return rows


def test_what_cannot_be_asked_is_told(ask_patches: Any, ask: Any, patches: World) -> None:
    two = {"a": ["a"], "b": ["b"]}
    for path, body, status, code in (
        ("/v1/search", {"slide_id": "slide001", "level": "patch"}, 422, "invalid"),
        ("/v1/search", {"text": "a", "mode": "hybrid", "level": "patch"}, 422, "invalid"),
        ("/v1/search", {"text": " ", "level": "patch"}, 422, "config"),
        ("/v1/segment", {"slide_id": "slide001", "classes": {"a": ["a"]}}, 422, "invalid"),
        ("/v1/segment", {"slide_id": "slide001", "classes": {"a": ["a"], "b": []}}, 422, "invalid"),
        ("/v1/segment", {"slide_id": "slide001", "classes": {"a": ["a"], "b": [" "]}}, 422,
         "invalid"),
        ("/v1/segment", {"slide_id": "nobody", "classes": two}, 404, "unknown_slide"),
        ("/v1/segment", {"slide_id": "broken", "classes": two}, 404, "unknown_slide"),
        ("/v1/segment", {"slide_id": slide_id(4), "classes": two, "format": "png"}, 404,
         "no_thumbnail"),
    ):  # fmt: skip
        answer = ask_patches(path, **body)
        assert (body, answer.status_code, answer.json()["code"]) == (body, status, code)
        assert not [secret for secret in SECRETS if secret in answer.text]
    # A service without a patch model says so.
    image = {"data": png(pixels(0, 0)), "mpp": 0.5}
    for path, body in (
        ("/v1/search", {"text": "a", "level": "patch"}),
        ("/v1/search", {"image": image, "level": "patch"}),
        ("/v1/segment", {"slide_id": "slide001", "classes": two}),
    ):
        answer = ask("POST", path, json=body)
        assert (answer.status_code, answer.json()["code"]) == (404, "no_patches")


def test_the_patch_model_belongs_to_the_archive(patches: World, world: World) -> None:
    assert patches.patches is not None
    run = patches.patches.removeprefix("mrplip:")
    inputs = check_inputs(
        ServeConfig(archive=str(patches.archive), run=str(patches.run), patches=run)
    )
    assert inputs.patches == patches.patches
    with pytest.raises(ArchiveError) as refused:  # an archive without its features
        check_inputs(ServeConfig(archive=str(world.archive), run=str(world.run), patches=run))
    assert refused.value.code == "unknown_encoder"
    slides = ServeConfig(
        archive=str(patches.archive), run=str(patches.run), patches=str(patches.run)
    )
    with pytest.raises(EncoderError) as caught:
        check_inputs(slides)
    assert caught.value.code == "other_kind"
