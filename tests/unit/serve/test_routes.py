"""The routes over a real archive and model: what they answer is what the library answers."""

from __future__ import annotations

import base64
import json
import re

import cv2
import numpy as np
import pytest

from pathflip.archive import Archive
from pathflip.archive.commit import Committer
from pathflip.archive.search import search, stored_vector
from pathflip.archive.textsearch import search_text
from pathflip.evaluation.classify import classify
from pathflip.evaluation.ground_slide import ground_slide
from pathflip.interop.annotation_files import read_objects
from serve.limits import RequestError
from serve.schemas import SearchRequest
from serve.search import Search
from tests.serving import same
from tests.unit.archive import cohort, models
from tests.unit.serve.service_fixture import (
    REGIONS,
    SIDE,
    SLIDES,
    TILING,
    pixels,
    png,
    rows_of,
    slide_id,
)


def test_slides_by_pages(ask, world):
    seen, after = [], ""
    while True:
        answer = ask("GET", "/v1/slides", params={"limit": 2, "after": after})
        assert answer.status_code == 200
        page = answer.json()
        assert len(page["data"]) <= 2
        seen += [row["slide_id"] for row in page["data"]]
        if page["next"] is None:
            break
        after = page["next"]
    assert seen == [slide_id(n) for n in range(SLIDES)]  # not the quarantined one


def test_one_slide(ask):
    row = ask("GET", "/v1/slides/slide001").json()
    assert row == {
        "slide_id": "slide001", "width": 384, "height": 128, "mpp": 0.5, "vendor": "aperio",
        "split": "test", "n_regions": 3, "n_patches": 12, "tissue_mm2": 0.1,
        "status": "ready",
    }  # fmt: skip


def test_thumbnail_is_the_archives(ask, world):
    answer = ask("GET", "/v1/slides/slide001/thumbnail")
    assert answer.headers["content-type"] == "image/jpeg"
    stored = Archive(world.archive).slide("slide001")["thumbnail"]
    assert answer.content == stored
    again = {"If-None-Match": answer.headers["etag"]}
    kept = ask("GET", "/v1/slides/slide001/thumbnail", headers=again)
    assert (kept.status_code, kept.content) == (304, b"")
    small = ask("GET", "/v1/slides/slide001/thumbnail?px=32", headers=again)
    pictures = [
        cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        for data in (small.content, stored)
    ]
    (height, width), shape = pictures[1].shape[:2], pictures[0].shape
    assert shape[:2] == (round(32 * height / width), 32)
    wanted = cv2.resize(pictures[1], shape[1::-1], interpolation=cv2.INTER_AREA)
    assert np.abs(pictures[0].astype(int) - wanted).mean() < 6
    for px in (0, 2000):
        assert ask("GET", f"/v1/slides/slide001/thumbnail?px={px}").status_code == 422
    answer = ask("GET", f"/v1/slides/{slide_id(SLIDES - 1)}/thumbnail")
    assert (answer.status_code, answer.json()["code"]) == (404, "no_thumbnail")


@pytest.mark.parametrize("level", ["region", "slide"])
def test_search_by_text_is_the_librarys(ask, world, level):
    archive, run = Archive(world.archive), world.loaded
    vector = run.model.encode_text(["areas of mucin"])[0].numpy()
    asked = {"text": "areas of mucin", "level": level, "k": 7}
    filters = [{"field": "split", "op": "=", "value": "test"}]
    for more, own in (({}, ()), ({"filters": filters}, ("split=test",))):
        from pathflip.archive.filters import Filter

        expected = search(
            archive, vector, model=run.name, level=level, k=7,
            filters=[Filter.parse(one) for one in own],
        )  # fmt: skip
        answer = ask("POST", "/v1/search", json=asked | more)
        assert answer.status_code == 200
        found = answer.json()
        assert found["model"] == run.name
        assert len(found["results"]) == expected.num_rows > 0
        for ours, theirs in zip(found["results"], rows_of(expected), strict=True):
            assert ours.pop("score") == pytest.approx(theirs.pop("score"), abs=1e-6)
            assert ours == theirs


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_picture_of_a_region_finds_it(ask, kind):
    for n, number in ((0, 1), (3, 2)):
        data = png(pixels(n, number), kind, **({"quality": 100} if kind == "JPEG" else {}))
        image = {"data": data, "mpp": 0.5}
        answer = ask("POST", "/v1/search", json={"image": image, "k": 1})
        (best,) = answer.json()["results"]
        if kind == "PNG":  # features are stored as float16
            assert best["region_id"] == f"{slide_id(n)}/{number}_0"
            assert best["score"] == pytest.approx(1, abs=1e-3)
        assert answer.status_code == 200


def test_search_by_slide_and_region(ask, world):
    archive, model = Archive(world.archive), world.loaded.name
    for asked, key in (
        ({"slide_id": "slide002", "level": "slide"}, "slide002"),
        ({"region_id": "slide002/1_0"}, "slide002/1_0"),
    ):
        rows = ask("POST", "/v1/search", json=asked | {"k": 50}).json()["results"]
        best = rows[0]["region_id"] or rows[0]["slide_id"]
        assert best == key
        expected = search(
            archive, stored_vector(archive, key, model=model), model=model, k=50,
            level=asked.get("level", "region"),
        )  # fmt: skip
        assert [r["slide_id"] for r in rows] == expected["slide_id"].to_pylist()
        rows = ask("POST", "/v1/search", json=asked | {"k": 50, "exclude_same_slide": True}).json()
        assert "slide002" not in {row["slide_id"] for row in rows["results"]}
        rows = ask(
            "POST", "/v1/search", json=asked | {"k": 50, "exclude_same_patient": True}
        ).json()["results"]
        # The slide before it is another patient's, the one after it is nobody's.
        assert {row["slide_id"] for row in rows} == {slide_id(n) for n in (0, 1, 3, 4)}
    answer = ask("POST", "/v1/search", json={"slide_id": "slide003", "exclude_same_patient": True})
    assert (answer.status_code, answer.json()["code"]) == (422, "no_patient")


def test_search_by_words(ask, world):
    asked = {"text": "mucin", "mode": "text", "level": "slide", "k": 1}
    (best,) = ask("POST", "/v1/search", json=asked).json()["results"]
    assert best["slide_id"] == "slide002"
    expected = search_text(Archive(world.archive), "mucin", model=world.loaded.name, k=1)
    assert best["score"] == expected["score"][0].as_py()
    rows = ask("POST", "/v1/search", json=asked | {"mode": "hybrid", "k": 50}).json()["results"]
    assert len(rows) == SLIDES


def test_vectors_of_another_model_are_refused(serving, parts, world):
    from dataclasses import replace

    # The embedder was redeployed with another run, the search was not, or the other way round.
    other = Search(str(world.archive), model=world.loaded.name, fingerprint="0" * 64)
    old = parts.search
    object.__setattr__(parts, "search", other)
    try:
        answer = serving()("POST", "/v1/search", json={"slide_id": "slide001"})
        assert (answer.status_code, answer.json()["code"]) == (409, "wrong_model")
        assert "0" * 12 in answer.json()["detail"]
        assert world.loaded.fingerprint[:12] in answer.json()["detail"]
        assert str(world.archive) not in answer.text
    finally:
        object.__setattr__(parts, "search", old)
    assert replace(parts).search is old


def test_a_slide_without_vectors_is_not_an_unknown_one(serving, parts, tmp_path):
    """Indexing mends the one, nothing the other."""
    cohort.build(tmp_path / "archive", *range(3))
    with Committer(tmp_path / "archive") as committer:
        models.add(committer, 0, 1)
    old = parts.search
    partly = Search(str(tmp_path / "archive"), model=models.MODEL, fingerprint="f" * 64)
    object.__setattr__(parts, "search", partly)
    try:
        ask = serving()
        for asked, found in (
            ({"slide_id": "slide001"}, (200, None)),
            ({"region_id": "slide001/1_1"}, (200, None)),
            ({"slide_id": "slide002"}, (409, "not_indexed")),
            ({"region_id": "slide002/1_2"}, (409, "not_indexed")),
            ({"slide_id": "slide003"}, (404, "unknown_slide")),
            ({"region_id": "slide002/99_2"}, (404, "unknown_slide")),
            ({"region_id": "slide001/99_1"}, (404, "unknown_slide")),
        ):
            answer = ask("POST", "/v1/search", json=asked)
            assert (answer.status_code, answer.json().get("code")) == found, asked
            assert str(tmp_path) not in answer.text
    finally:
        object.__setattr__(parts, "search", old)


def test_ground_is_the_librarys(ask, world):
    asked = {"slide_id": "slide001", "text": "necrosis", "min_patches": 1, "patches": True}
    found = ask("POST", "/v1/ground", json=asked).json()
    expected = ground_slide(
        Archive(world.archive), world.loaded, "slide001", "necrosis", min_patches=1
    )
    assert same(found, json.loads(json.dumps(expected.as_json() | {"model": world.loaded.name})))
    assert len(found["patches"]) == REGIONS * 4
    assert "patches" not in ask("POST", "/v1/ground", json=asked | {"patches": False}).json()
    assert found["patch_um"] == TILING["patch_um"]
    picture = ask("POST", "/v1/ground", json=asked | {"format": "png"})
    assert picture.headers["content-type"] == "image/png"
    from io import BytesIO

    from PIL import Image

    assert np.array_equal(np.asarray(Image.open(BytesIO(picture.content))), expected.picture())


def test_grounded_boxes_are_objects_of_qupath(ask, tmp_path):
    asked = {"slide_id": "slide001", "text": "necrosis", "min_patches": 1}
    boxes = ask("POST", "/v1/ground", json=asked).json()["boxes"]
    assert boxes
    for patches in (False, True):
        more = {"patches": patches, "format": "geojson"}
        answer = ask("POST", "/v1/ground", json=asked | more)
        file = tmp_path / f"{patches}.geojson"
        file.write_bytes(answer.content)
        objects = read_objects(file)
        found = [one for one in objects if one.object_type == "annotation"]
        for one, box in zip(found, boxes, strict=True):
            ((corners, holes),) = one.polygons
            left, top = corners.min(axis=0)
            right, bottom = corners.max(axis=0)
            assert not holes
            assert [left, top] == [box["x0"], box["y0"]]
            assert [right - left, bottom - top] == [box["w0"], box["h0"]]
            assert one.classification == "necrosis"
            assert one.measurements["score"] == pytest.approx(box["score"])
        tiles = [one for one in objects if one.object_type == "tile"]
        assert len(tiles) == (REGIONS * SIDE**2 if patches else 0)
        if patches:  # attn heat is a share of the slide's
            assert sum(one.measurements["heat"] for one in tiles) == pytest.approx(1)


def test_labels_filter_and_are_not_shown(ask, world):
    grade = {"field": "label.grade", "value": "2"}
    found = ask("POST", "/v1/search", json={"text": "a", "k": 50, "filters": [grade]})
    assert {row["slide_id"] for row in found.json()["results"]} == {"slide001", "slide003"}
    unknown = ask(
        "POST", "/v1/search", json={"text": "a", "filters": [grade | {"field": "label.x"}]}
    )
    assert unknown.json()["code"] == "unknown_label"
    assert "note" not in unknown.text
    assert "grade" not in unknown.text


def test_labels_can_be_kept_from_filters(world, together):
    part = Search(
        str(world.archive), model=world.loaded.name, fingerprint=world.loaded.fingerprint,
        labels=False,
    )  # fmt: skip
    request = SearchRequest(
        slide_id="slide001", filters=[{"field": "label.grade", "value": "2"}]
    ).model_dump()
    with pytest.raises(RequestError, match="does not filter by labels"):
        together(part.search(request, None))


def test_a_blank_contrast_is_refused(ask):
    for blank in ("", " ", "\t\n"):
        asked = {"slide_id": "slide001", "text": "necrosis", "contrast": blank}
        answer = ask("POST", "/v1/ground", json=asked)
        assert (answer.status_code, answer.json()["errors"][0]["where"]) == (422, "body.contrast")


def test_classify_is_the_librarys(ask, world):
    classes = {"colon": ["colonic mucosa", "colon"], "lung": ["lung"]}
    asked = {"slide_ids": ["slide004", "slide001"], "classes": classes, "score": "sum"}
    found = ask("POST", "/v1/classify", json=asked).json()
    expected = classify(
        Archive(world.archive), world.loaded, classes, slides=["slide001", "slide004"], score="sum"
    )
    assert found["model"] == world.loaded.name
    for ours, theirs in zip(found["results"], expected, strict=True):
        assert ours["slide_id"] == theirs["slide_id"]
        assert ours["label"] == theirs["label"]
        assert ours["scores"] == pytest.approx(theirs["scores"], abs=1e-6)


def test_embeddings_in_both_formats(ask, world):
    texts = ["necrosis", "mucin everywhere"]
    expected = world.loaded.model.encode_text(texts).numpy()
    found = ask("POST", "/v1/embeddings", json={"input": texts}).json()
    assert np.allclose([row["embedding"] for row in found["data"]], expected, atol=1e-6)
    assert found["usage"]["prompt_tokens"] > 0
    packed = ask(
        "POST", "/v1/embeddings",
        json={"input": texts[1], "encoding_format": "base64", "model": world.loaded.name},
    ).json()  # fmt: skip
    vector = np.frombuffer(base64.b64decode(packed["data"][0]["embedding"]), "<f4")
    assert np.allclose(vector, expected[1], atol=1e-6)
    image = {"data": png(pixels(1, 1)), "mpp": 0.5}
    seen = ask("POST", "/v1/embeddings", json={"image": image}).json()["data"][0]["embedding"]
    stored = stored_vector(Archive(world.archive), "slide001/1_0", model=world.loaded.name)
    assert np.dot(seen, stored) / np.linalg.norm(stored) > 0.99


def test_the_official_client_reads_embeddings_and_models(serving, world, loop):
    import httpx
    import openai

    app = serving().app
    from tests.unit.serve.service_fixture import TOKENS

    async def use() -> None:
        transport = httpx.ASGITransport(app, client=("127.0.0.1", 1))
        async with (
            httpx.AsyncClient(transport=transport) as http,
            openai.AsyncOpenAI(
                base_url="http://127.0.0.1/v1", api_key=TOKENS["all"][1], http_client=http,
                max_retries=0,
            ) as client,
        ):  # fmt: skip
            models = (await client.models.list()).data
            assert [model.id for model in models] == [world.loaded.name]
            made = await client.embeddings.create(model=models[0].id, input=["necrosis"])
            assert np.allclose(
                made.data[0].embedding, world.loaded.model.encode_text(["necrosis"])[0], atol=1e-6
            )
            with pytest.raises(openai.NotFoundError) as caught:
                await client.chat.completions.create(
                    model="any", messages=[{"role": "user", "content": "Which organ?"}],
                    extra_body={"slide_id": "slide001"},
                )  # fmt: skip
            assert caught.value.body["code"] == "no_engine"

    loop.run_until_complete(use())


def test_health_and_metrics(ask):
    assert ask("GET", "/healthz", who=None).json() == {"status": "ok"}
    assert ask("HEAD", "/healthz", who=None).status_code == 200
    up = ask("GET", "/readyz").json()
    assert up == {"status": "ok", "parts": dict.fromkeys(PARTS, True)}
    ask("GET", "/v1/slides/slide001")
    text = ask("GET", "/metrics").text
    got = (
        r'pathflip_requests_total\{method="GET",\S*route="/v1/slides/\{slide_id\}",status="200"\} '
    )
    assert re.search(got, text)
    assert "slide001" not in text


PARTS = ("embedder", "search", "grounding", "tiles", "annotations")


def test_openapi_names_every_route_and_its_errors(ask):
    schema = ask("GET", "/openapi.json").json()
    assert set(schema["paths"]) == {
        "/healthz", "/readyz", "/metrics", "/v1/slides", "/v1/slides/{slide_id}",
        "/v1/slides/{slide_id}/thumbnail", "/v1/slides/{slide_id}/annotations",
        "/v1/slides/{slide_id}/annotations/{annotation_id}",
        "/v1/slides/{slide_id}/annotations/import", "/v1/slides/{slide_id}/tiles",
        "/v1/slides/{slide_id}/tiles.dzi", "/v1/slides/{slide_id}/tiles/{level}/{x}_{y}.jpg",
        "/v1/slides/{slide_id}/view", "/v1/slides/{slide_id}/outlines", "/v1/search",
        "/v1/classify", "/v1/ground",
        "/v1/segment", "/v1/embeddings", "/v1/models", "/v1/models/{model_id}",
        "/v1/chat/completions", "/v1/session",
    }  # fmt: skip
    for path, methods in schema["paths"].items():
        for method in methods.values():
            assert method["responses"].keys() >= ({"200"} if path == "/healthz" else {"401", "429"})
    for name in (
        "SearchRequest",
        "ClassifyRequest",
        "GroundRequest",
        "SegmentRequest",
        "ChatRequest",
    ):
        assert schema["components"]["schemas"][name]["examples"], name
        assert schema["components"]["schemas"][name]["additionalProperties"] is False


def test_a_service_without_a_run_says_so(parts, loop):
    """Slides are listed and shown; whatever needs a model is a 404 that says why."""
    import httpx

    from serve.ingress import make_app
    from serve.routing import Parts

    app = make_app(Parts(search=parts.search))

    async def ask_all():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
            posts = {
                "search": {"text": "necrosis"},
                "classify": {"slide_ids": ["slide001"], "classes": {"a": ["a"], "b": ["b"]}},
                "ground": {"slide_id": "slide001", "text": "necrosis"},
                "segment": {"slide_id": "slide001", "classes": {"a": ["a"], "b": ["b"]}},
                "embeddings": {"input": "necrosis"},
            }
            asked = {
                path: await http.post(f"/v1/{path}", json=body) for path, body in posts.items()
            }
            return asked, [await http.get(path) for path in ("/v1/slides", "/v1/models", "/readyz")]

    asked, others = loop.run_until_complete(ask_all())
    found = {path: (answer.status_code, answer.json()["code"]) for path, answer in asked.items()}
    assert found == dict.fromkeys(asked, (404, "no_model"))
    assert "without a trained run" in asked["ground"].json()["message"]
    assert [answer.status_code for answer in others] == [200, 200, 200]
    assert len(others[0].json()["data"]) == SLIDES
    assert others[1].json()["data"] == []
    assert others[2].json()["parts"] == {"search": True}
