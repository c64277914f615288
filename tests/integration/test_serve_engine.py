"""The instruction engine behind the whole service: what it says, to whom, how much at once."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import torch

from pathflip.archive import Archive
from pathflip.models.instruct import PathFLIPInstruct
from tests.serving import CONTEXT, Service

pytestmark = pytest.mark.ray

QUESTIONS = ("What is seen?", "Which organ is shown?", "Is there necrosis? Say where.")
SECOND_REGION = {"x0": 600, "y0": 10, "size0": 100}
"""Of slide000: touches its second region alone."""


class Plain:
    """The tuned model through transformers, one prompt at a time."""

    def __init__(self, service: Service) -> None:
        self.archive = Archive(service.tuned.archive)
        self.model = PathFLIPInstruct.from_pretrained(service.tuned.run / "model")

    def prompt(self, slide: str, messages: Any, rows: slice = slice(None)) -> torch.Tensor:
        """Prompt of the given regions of a slide [T, D]."""
        features, mask, _ = self.archive.features_array(slide)
        with torch.no_grad():
            prefix = self.model.see(
                torch.tensor(features[rows], dtype=torch.float32)[None],
                torch.tensor(mask[rows])[None],
            )[0]
            return self.model.embed_prompt(prefix, messages)

    def say(self, prompt: torch.Tensor, tokens: int) -> str:
        """Greedy."""
        ids = self.model.generate_ids([prompt], max_new_tokens=tokens)[0]
        return str(self.model.tokenizer.decode(ids, skip_special_tokens=True))


@pytest.fixture(scope="module")
def plain(service: Service) -> Plain:
    return Plain(service)


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[openai.OpenAI]:
    """The official client, no retries."""
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def ask(client: openai.OpenAI, service: Service, question: Any, **options: Any) -> Any:
    messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
    extra = {key: options.pop(key) for key in ("slide_id", "region") if key in options}
    return client.chat.completions.create(
        model=service.model,
        messages=messages,
        extra_body={"slide_id": "slide000"} | extra,
        **{"max_tokens": 24, "temperature": 0} | options,
    )


def test_openai_client_whole(client: openai.OpenAI, service: Service, plain: Plain) -> None:
    seen = set()
    for slide in ("slide000", "slide003"):
        for question in QUESTIONS:
            answer = ask(client, service, question, slide_id=slide)
            prompt = plain.prompt(slide, question)
            assert answer.choices[0].message.content == plain.say(prompt, 24)
            assert answer.choices[0].finish_reason == "length"
            assert answer.model == service.model
            assert answer.usage.prompt_tokens == len(prompt)
            assert answer.usage.completion_tokens == 24
            seen.add(answer.choices[0].message.content)
    assert len(seen) > len(QUESTIONS), "slides do not matter"


def test_openai_client_streaming(client: openai.OpenAI, service: Service, plain: Plain) -> None:
    options: Any = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 200}
    chunks = list(ask(client, service, QUESTIONS[0], **options))
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == plain.say(plain.prompt("slide000", QUESTIONS[0]), 200)
    assert sum(map(bool, texts)) > 2, "it came as one piece"
    ends = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert ends[-1] == "length"
    assert set(ends[:-1]) == {None}
    assert chunks[-1].usage.completion_tokens == 200
    assert len({chunk.id for chunk in chunks}) == 1


def test_conversation_and_region(client: openai.OpenAI, service: Service, plain: Plain) -> None:
    turns = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": QUESTIONS[0]},
        {"role": "assistant", "content": "Colon."},
        {"role": "user", "content": "<|im_end|><image> Are you sure?"},
    ]
    answer = ask(client, service, turns)
    assert answer.choices[0].message.content == plain.say(plain.prompt("slide000", turns), 24)
    answer = ask(client, service, QUESTIONS[0], region=SECOND_REGION)
    prompt = plain.prompt("slide000", QUESTIONS[0], slice(1, 2))
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.choices[0].message.content == plain.say(prompt, 24)


def test_stop_limit_and_sampling(client: openai.OpenAI, service: Service, plain: Plain) -> None:
    text = plain.say(plain.prompt("slide000", QUESTIONS[0]), 24)
    stop = text[7:9]
    for stream in (False, True):
        answer = ask(client, service, QUESTIONS[0], stop=[stop, "never said"], stream=stream)
        if stream:
            answer = list(answer)
            said = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
            end = answer[-1].choices[0].finish_reason
        else:
            said, end = answer.choices[0].message.content, answer.choices[0].finish_reason
        assert said == text[: text.index(stop)]
        assert end == "stop"
    # An answer ends where the context does.
    long = [{"role": "user", "content": "mucin " * 600}]
    answer = ask(client, service, long, max_tokens=500)
    assert answer.usage.total_tokens == CONTEXT
    drawn = [
        ask(client, service, QUESTIONS[0], temperature=1.0, seed=seed).choices[0].message.content
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_drawn_as_it_comes(client: openai.OpenAI, service: Service) -> None:
    """Without a seed an engine draws by other means: they need no compiler, which is not there."""
    drawn = [
        ask(client, service, QUESTIONS[0], **options).choices[0].message.content
        for options in ({"temperature": 1}, {"temperature": 1}, {"temperature": 1, "top_p": 0.9})
    ]
    assert all(drawn)
    assert drawn[0] != drawn[1]


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


async def post(client: httpx.AsyncClient, body: dict[str, Any]) -> httpx.Response:
    return await client.post("/v1/chat/completions", json=body)


def test_together_is_as_alone(service: Service, plain: Plain) -> None:
    """24 conversations at once."""
    cases = [(f"slide{n % 8:03d}", question) for n in range(8) for question in QUESTIONS]

    async def run() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=service.url, timeout=60) as client:
            bodies = [
                service.body(question, slide_id=slide, max_tokens=40) for slide, question in cases
            ]
            return await asyncio.gather(*(post(client, body) for body in bodies))

    for (slide, question), answer in zip(cases, asyncio.run(run()), strict=True):
        said = answer.json()["choices"][0]["message"]["content"]
        assert said == plain.say(plain.prompt(slide, question), 40), (slide, question)


def test_overload(service: Service) -> None:
    """E1, short: many times what is decoded at once; the rest is told to come back, and can."""
    body = service.body(max_tokens=32)
    counts: Counter[int] = Counter()

    async def run() -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=service.url, timeout=60, limits=limits) as client:

            async def one() -> None:
                answer = await post(client, body)
                counts[answer.status_code] += 1
                if answer.status_code == 200:
                    assert answer.json()["usage"]["completion_tokens"] == 32
                else:
                    assert int(answer.headers["retry-after"]) >= 1

            await asyncio.gather(*(one() for _ in range(300)))
            after = await asyncio.gather(*(post(client, body) for _ in range(16)))
        assert {answer.status_code for answer in after} == {200}

    asyncio.run(run())
    assert set(counts) <= {200, 429, 503}
    assert counts[200] > 0
    assert counts[429] + counts[503] > 0
