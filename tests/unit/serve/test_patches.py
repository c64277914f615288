"""Patches by words and pictures, and segmentation, over a real patch model's features."""

from __future__ import annotations

import asyncio
import json
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
from serve.embedder import PROMPTS_AT_ONCE, Embedder
from serve.ingress import make_app
from serve.routing import Parts
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

CLASSES = {"round": ["round"], "clear": ["clear nuclei"], "é": ["nuclei of tissue"]}
"""Slide 1 has patches of each."""


@pytest.fixture(scope="module")
def patches(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("patches"), patches=True)


@pytest.fixture(scope="module")
def embedder(patches: World) -> Embedder:
    return Embedder(str(patches.archive), str(patches.run), patches=patches.patches)


@pytest.fixture(scope="module")
def ask_patches(
    patches: World, embedder: Embedder, loop: asyncio.AbstractEventLoop
) -> Callable[..., httpx.Response]:
    archive = str(patches.archive)
    fingerprint = patches.loaded.fingerprint
    parts = Parts(
        embedder=embedder,
        search=Search(archive, model=patches.loaded.name, fingerprint=fingerprint),
        grounding=None,
        redactions={archive: "the archive"},
    )
    app = make_app(parts, tokens=read_tokens(patches.token_file))

    def ask(path: str, *, method: str = "POST", **body: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
                # ASCII, as any client may send it: what httpx cannot encode can be asked as well.
                headers = bearer("all") | {"Content-Type": "application/json"}
                content = json.dumps(body) if method == "POST" else None
                return await http.request(method, path, headers=headers, content=content)

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
    for templates, wording in (("single", TEMPLATES[:1]), ("ensemble", TEMPLATES)):
        weights = class_weights(reader, CLASSES, templates=wording)
        expected = segment_stored(
            archive, "slide001", list(CLASSES), weights, tau=reader.tau, encoder=name,
            min_patches=1,
        )  # fmt: skip
        asked = {"slide_id": "slide001", "classes": CLASSES, "templates": templates}
        found = ask_patches("/v1/segment", **asked, min_patches=1).json()
        assert found.pop("model") == name
        assert sum(found["shares"].values()) == pytest.approx(1)
        assert_near(found, expected.as_json())
        outlines = ask_patches("/v1/segment", **asked, min_patches=1, format="geojson").json()
        assert_near(outlines, expected.geojson())
    assert all(expected.as_json()["shares"].values())  # each class is seen
    picture = ask_patches("/v1/segment", **asked, format="png")
    assert picture.headers["content-type"] == "image/png"
    drawn = cv2.imdecode(np.frombuffer(picture.content, np.uint8), cv2.IMREAD_COLOR)
    thumbnail = Archive(patches.archive).slide("slide001")["thumbnail"]
    plain = cv2.imdecode(np.frombuffer(thumbnail, np.uint8), cv2.IMREAD_COLOR)
    assert drawn.shape[0] == plain.shape[0] + 20 * len(CLASSES) + 4
    assert (drawn[: plain.shape[0], : plain.shape[1]] != plain).any(axis=2).mean() > 0.9


def assert_near(found: Any, expected: Any) -> None:
    """Documents agree, but for rounding: the service encodes prompts in other batches."""
    expected = json.loads(json.dumps(expected))
    for row, other in zip(found.get("areas", []), expected.get("areas", []), strict=True):
        assert row["score"] == pytest.approx(other.pop("score"), abs=1e-6)
        del row["score"]
    for row, other in zip(found.get("features", []), expected.get("features", []), strict=True):
        held, wanted = (one["properties"]["measurements"] for one in (row, other))
        assert held.pop("score") == pytest.approx(wanted.pop("score"), abs=1e-6)
    assert found == expected


def test_what_cannot_be_asked_is_told(ask_patches: Any, ask: Any, patches: World) -> None:
    two = {"a": ["a"], "b": ["b"]}
    for path, body, status, code in (
        ("/v1/search", {"slide_id": "slide001", "level": "patch"}, 422, "invalid"),
        ("/v1/search", {"text": "a", "mode": "hybrid", "level": "patch"}, 422, "invalid"),
        ("/v1/search", {"text": " ", "level": "patch"}, 422, "config"),
        ("/v1/search", {"text": "a" * 2001, "level": "patch"}, 422, "invalid"),
        ("/v1/search", {"text": "\ud800", "level": "patch"}, 422, "invalid"),
        ("/v1/segment", {"slide_id": "slide001", "classes": {"a": ["a"]}}, 422, "invalid"),
        ("/v1/segment", {"slide_id": "slide001", "classes": [["a"], ["b"]]}, 422, "invalid"),
        ("/v1/segment", {"slide_id": "slide001", "classes": {"a": "a", "b": "b"}}, 422, "invalid"),
        ("/v1/segment", {"slide_id": "slide001", "classes": {"a": [1], "b": ["b"]}}, 422,
         "invalid"),
        ("/v1/segment", {"slide_id": 1, "classes": two}, 422, "invalid"),
        ("/v1/segment", {"slide_id": "slide001", "classes": two, "min_patches": "1"}, 422,
         "invalid"),
        ("/v1/segment", {"slide_id": "slide001", "classes": two, "encoder": "texture"}, 422,
         "invalid"),
        ("/v1/segment", {"slide_id": "slide001", "classes": {"a": ["\ud800"], "b": ["b"]}}, 422,
         "invalid"),
        ("/v1/segment", {"slide_id": "slide001", "classes": classes(33, 1)}, 422, "invalid"),
        ("/v1/segment", {"slide_id": "slide001", "classes": classes(2, 9)}, 422, "invalid"),
        ("/v1/segment", {"slide_id": "slide001", "classes": classes(13, 5)}, 422, "invalid"),
        ("/v1/segment", {"slide_id": "slide001", "classes": two | {"x" * 201: ["a"]}}, 422,
         "invalid"),
        ("/v1/segment", {"slide_id": "slide001", "classes": two | {"c": ["x" * 201]}}, 422,
         "invalid"),
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


def classes(count: int, names: int) -> dict[str, list[str]]:
    return {f"class {c}": [f"name {c} {n}" for n in range(names)] for c in range(count)}


def test_any_text_may_name_a_class(ask_patches: Any) -> None:
    odd = [
        "\x00",
        "a\nb\x1b[31m",
        "</script><b>",
        "CLASSNAME",
        "{}%s",
        "\u202ertl",
        "核",
        "x" * 200,
    ]
    asked = {"slide_id": "slide001", "min_patches": 1, "classes": {name: [name] for name in odd}}
    shares = ask_patches("/v1/segment", **asked).json()["shares"]
    assert list(shares) == odd
    for feature in ask_patches("/v1/segment", **asked, format="geojson").json()["features"]:
        assert feature["properties"]["name"] in odd
    assert ask_patches("/v1/segment", **asked, format="png").content.startswith(b"\x89PNG")


def test_long_class_lists_let_searches_go_first(
    embedder: Embedder, together: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert embedder.patches is not None
    model, calls = embedder.patches.run.model, list[list[str]]()
    encode = type(model).encode_text

    def noted(self: Any, texts: Any) -> Any:
        if self is model:
            calls.append(list(texts))
        return encode(self, texts)

    monkeypatch.setattr(type(model), "encode_text", noted)
    lists = [{f"class {c}": [f"name {c * k} {n}" for n in range(2)] for c in range(8)}
             for k in (1, 1, 2)]  # fmt: skip

    async def main() -> int:
        asked = [asyncio.create_task(embedder.classes(one, templates="ensemble")) for one in lists]
        while len(calls) < 5:
            await asyncio.sleep(0)
        before = len(calls)
        await embedder.patch_text("round nuclei")
        assert not any(task.done() for task in asked)
        for task in asked:
            await task
        return before

    before = together(main())
    assert calls.index(["round nuclei"]) <= before + 2  # one at work, one about to be
    assert max(map(len, calls)) == PROMPTS_AT_ONCE
    prompts = [prompt for call in calls if call != ["round nuclei"] for prompt in call]
    assert len(prompts) == len(set(prompts))  # lists that share prompts have them encoded once
    calls.clear()
    kept = together(embedder.classes(lists[0], templates="ensemble"))
    assert calls == []
    # Fewer are kept than one list has: what it gets is the same.
    monkeypatch.setattr("serve.embedder.MAX_PROMPTS", 7)
    together(embedder.classes(classes(3, 3), templates="single"))
    assert len(embedder._prompts) == 7
    again = together(embedder.classes(lists[0], templates="ensemble"))
    assert calls
    np.testing.assert_allclose(again["vectors"], kept["vectors"], atol=1e-6)


def test_an_unknown_slide_costs_no_encoding(embedder: Embedder, ask_patches: Any) -> None:
    before = list(embedder._prompts)
    answer = ask_patches("/v1/segment", slide_id="nobody", classes=classes(2, 1))
    assert answer.status_code == 404
    assert list(embedder._prompts) == before


def test_the_patch_model_is_listed(ask_patches: Any, patches: World) -> None:
    (name,) = set(Archive(patches.archive).encoders()) - {"texture"}
    slides, found = ask_patches("/v1/models", method="GET").json()["data"]
    assert (slides["id"], slides["capability"]) == (patches.loaded.name, "embeddings")
    assert (found["id"], found["capability"]) == (name, "patches")
    assert found["fingerprint"] == model_of(patches).fingerprint


def test_the_patch_model_belongs_to_the_archive(patches: World, world: World) -> None:
    assert patches.patches is not None
    run = patches.patches.removeprefix("mrplip:")
    inputs = check_inputs(
        ServeConfig(archive=str(patches.archive), run=str(patches.run), patches=run)
    )
    assert inputs.patches == patches.patches
    assert inputs.patch_model in Archive(patches.archive).encoders()
    with pytest.raises(ArchiveError) as refused:  # an archive without its features
        check_inputs(ServeConfig(archive=str(world.archive), run=str(world.run), patches=run))
    assert refused.value.code == "unknown_encoder"
    slides = ServeConfig(
        archive=str(patches.archive), run=str(patches.run), patches=str(patches.run)
    )
    with pytest.raises(EncoderError) as caught:
        check_inputs(slides)
    assert caught.value.code == "other_kind"
