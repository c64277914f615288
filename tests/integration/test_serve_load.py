"""The whole service on Ray with a fake engine: refusals, overload, vectors that come in."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from pathflip.interop.features.slide_importing import SlideFeatureImport, import_slide_features
from tests.faults import until
from tests.serving import Service
from tests.streams import connect, post, run

pytestmark = pytest.mark.ray

CONCURRENT = 128
"""``limits.concurrent`` of the fixture's service, which has one ingress replica."""


def test_refusals(service: Service) -> None:
    far = {"x0": 10**6, "y0": 0, "size0": 64}
    with httpx.Client(base_url=service.url, timeout=30) as client:
        for fields, status, code in (
            ({"slide_id": "no-such-slide"}, 404, "unknown_slide"),
            ({"model": "another"}, 404, "unknown_model"),
            ({"region": far}, 422, "outside_tissue"),
            ({"messages": [{"role": "user", "content": "mucin " * 1200}]}, 422, "prompt_too_long"),
        ):
            for stream in (False, True):
                answer = client.post(
                    "/v1/chat/completions", json=service.body(**fields, stream=stream)
                )
                assert (answer.status_code, answer.json()["code"]) == (status, code)
                assert answer.headers["content-type"] == "application/problem+json"
                assert str(service.tuned.archive) not in answer.text


def test_overload(service: Service) -> None:
    """More at once than are let in; the rest is told to come back, and can."""
    body = service.body(max_tokens=32)
    refused = asyncio.Event()
    counts: Counter[int] = Counter()

    async def one(client: httpx.AsyncClient) -> None:
        answer = await post(client, body)
        counts[answer.status_code] += 1
        if answer.status_code == 200:
            assert answer.json()["usage"]["completion_tokens"] == 32
        else:
            assert answer.json()["code"] == "busy"
            assert int(answer.headers["retry-after"]) >= 1
        if counts[429] == 300 - CONCURRENT:
            refused.set()

    async def main() -> None:
        async with connect(service) as client:
            with service.held():
                every = [asyncio.create_task(one(client)) for _ in range(300)]
                await refused.wait()
                assert set(counts) == {429}, "an answer ended that was held"
            await asyncio.gather(*every)
            after = await asyncio.gather(*(post(client, body) for _ in range(16)))
        assert {answer.status_code for answer in after} == {200}

    run(main())
    assert counts == {200: CONCURRENT, 429: 300 - CONCURRENT}


def test_vectors_of_a_slide_encoder_come_in_while_it_runs(service: Service, tmp_path: Path) -> None:
    """They are listed and searched, nearest first by numpy; nothing else is found by them."""
    names = [f"slide{n:03d}" for n in range(8)]
    values = np.random.default_rng(3).normal(size=(8, 24)).astype(np.float32)
    np.savez(tmp_path / "titan.npz", slides=names[:7], embeddings=values[:7])

    with httpx.Client(base_url=service.url, timeout=30) as client:

        def search(**body: Any) -> tuple[int, Any]:
            answer = client.post("/v1/search", json={"encoder": "titan", "level": "slide"} | body)
            return answer.status_code, answer.json()

        def ranks(query: int, among: int) -> tuple[list[str], list[float]]:
            unit = values[:among].astype(np.float64)
            unit /= np.linalg.norm(unit, axis=1, keepdims=True)
            cosine = unit @ unit[query]
            order = np.argsort(-cosine)
            return [names[n] for n in order], cosine[order].tolist()

        def found(query: int) -> tuple[list[str], list[float]]:
            status, body = search(slide_id=names[query], k=100)
            assert (status, body["model"]) == (200, "titan"), body
            assert {row["region_id"] for row in body["results"]} == {None}
            return (
                [row["slide_id"] for row in body["results"]],
                [row["score"] for row in body["results"]],
            )

        status, body = search(slide_id=names[0])
        assert (status, body["code"]) == (422, "unknown_slide_encoder")
        assert "It has none." in body["message"]
        before = client.get("/v1/models").json()["data"]

        settings = SlideFeatureImport(encoder="titan", revision="r1")
        import_slide_features(str(service.tuned.archive), tmp_path / "titan.npz", settings)
        until(lambda: search(slide_id=names[0])[0] == 200, seconds=60, what="the new table")
        *others, listed = client.get("/v1/models").json()["data"]
        assert others == before
        assert client.get("/v1/models/titan").json() == listed
        assert listed.pop("created") > 0
        assert listed == {
            "id": "titan", "object": "model", "owned_by": "pathflip", "capability": "slides",
            "revision": "r1",
        }  # fmt: skip
        for query in (0, 5):
            (found_ids, scores), (ids, cosine) = found(query), ranks(query, 7)
            assert found_ids == ids
            np.testing.assert_allclose(scores, cosine, atol=1e-6)
        # slide000 and slide001 are of one patient.
        status, body = search(slide_id=names[0], exclude_same_patient=True, k=100)
        left = [name for name in ranks(0, 7)[0] if name not in names[:2]]
        assert [row["slide_id"] for row in body["results"]] == left
        status, body = search(slide_id=names[7])
        assert (status, body["code"]) == (409, "not_indexed")
        assert str(service.tuned.archive) not in str(body)

        np.savez(tmp_path / "titan.npz", slides=names, embeddings=values)
        import_slide_features(str(service.tuned.archive), tmp_path / "titan.npz", settings)
        until(lambda: search(slide_id=names[7])[0] == 200, seconds=60, what="the new row")
        assert found(7)[0] == ranks(7, 8)[0]

        picture = {"data": "AAAA", "mpp": 0.5}
        for wrong, words in (
            ({"text": "mucin"}, "embeds texts or pictures"),
            ({"text": "mucin", "mode": "text"}, "embeds texts or pictures"),
            ({"image": picture}, "embeds texts or pictures"),
            ({"region_id": f"{names[0]}/0_0"}, "has no regions"),
            ({"slide_id": names[0], "level": "region"}, "give level slide"),
        ):
            status, body = search(**wrong)
            assert (status, body["code"]) == (422, "invalid")
            assert words in body["message"], wrong
        status, body = search(slide_id=names[0], encoder="prism")
        assert (status, body["code"]) == (422, "unknown_slide_encoder")
        assert "It has those of: titan." in body["message"]
