"""The whole service on Ray with a fake engine: refusals and overload."""

from __future__ import annotations

import asyncio
from collections import Counter

import httpx
import pytest

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
