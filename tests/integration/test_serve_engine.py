"""vLLM behind the service: what only the real engine shows.

What it says, to one and to many at once, that it stops for who has left, and that it does not
outlive its replica. Streams, limits and ends of the service are tested with a fake engine
(test_serve_load.py, tests/chaos/test_serve_chaos.py).
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
import torch

from pathflip.archive import Archive
from pathflip.models.instruct import PathFLIPInstruct
from serve.app import NAME
from tests.faults import alive, until
from tests.serving import CONTEXT, Service, Tuned, cpu_s
from tests.streams import (
    chat_replica,
    connect,
    engine_of,
    load,
    open_streams,
    post,
    processes,
    read,
    run,
)

pytestmark = pytest.mark.ray

QUESTIONS = ("What is seen?", "Which organ is shown?", "Is there necrosis? Say where.")
Ask = Callable[..., Any]
SECOND_REGION = {"x0": 600, "y0": 10, "size0": 100}
"""Square on slide000 that touches its second region alone."""


class Plain:
    """The tuned model through transformers, one prompt at a time."""

    def __init__(self, tuned: Tuned) -> None:
        self.archive = Archive(tuned.archive)
        self.model = PathFLIPInstruct.from_pretrained(tuned.run / "model")

    def prompt(self, slide: str, messages: Any, rows: slice = slice(None)) -> torch.Tensor:
        """Prompt of the given regions of a slide [T, D]."""
        features, mask, _ = self.archive.features_array(slide)
        with torch.no_grad():
            prefix = self.model.visual_prefix(
                torch.tensor(features[rows], dtype=torch.float32)[None],
                torch.tensor(mask[rows])[None],
            )[0]
            return self.model.embed_prompt(prefix, messages)

    def say(self, prompt: torch.Tensor, tokens: int) -> str:
        """Greedy."""
        ids = self.model.generate_ids([prompt], max_new_tokens=tokens)[0]
        return str(self.model.tokenizer.decode(ids, skip_special_tokens=True))


@pytest.fixture(scope="module")
def plain(tuned: Tuned) -> Plain:
    return Plain(tuned)


@pytest.fixture
def ask(engine_service: Service) -> Iterator[Ask]:
    """``ask(question or messages, …)``: the official client's answer, without retries."""
    with openai.OpenAI(
        base_url=f"{engine_service.url}/v1", api_key="none", max_retries=0
    ) as client:

        def send(question: Any, **options: Any) -> Any:
            if isinstance(question, str):
                question = [{"role": "user", "content": question}]
            extra = {key: options.pop(key) for key in ("slide_id", "region") if key in options}
            return client.chat.completions.create(
                model=engine_service.model,
                messages=question,
                extra_body={"slide_id": "slide000"} | extra,
                **{"max_tokens": 24, "temperature": 0} | options,
            )

        yield send


def test_openai_client_whole(ask: Ask, engine_service: Service, plain: Plain) -> None:
    seen = set()
    for slide in ("slide000", "slide003"):
        for question in QUESTIONS:
            answer = ask(question, slide_id=slide)
            prompt = plain.prompt(slide, question)
            assert answer.choices[0].message.content == plain.say(prompt, 24)
            assert answer.choices[0].finish_reason == "length"
            assert answer.model == engine_service.model
            assert answer.usage.prompt_tokens == len(prompt)
            assert answer.usage.completion_tokens == 24
            seen.add(answer.choices[0].message.content)
    assert len(seen) > len(QUESTIONS), "slides do not matter"


def test_openai_client_streaming(ask: Ask, plain: Plain) -> None:
    options: Any = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 200}
    chunks = list(ask(QUESTIONS[0], **options))
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == plain.say(plain.prompt("slide000", QUESTIONS[0]), 200)
    assert sum(map(bool, texts)) > 1, "it came as one piece"
    ends = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert ends[-1] == "length"
    assert set(ends[:-1]) == {None}
    assert chunks[-1].usage.completion_tokens == 200
    assert len({chunk.id for chunk in chunks}) == 1


def test_conversation_and_region(ask: Ask, plain: Plain) -> None:
    turns = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": QUESTIONS[0]},
        {"role": "assistant", "content": "Colon."},
        {"role": "user", "content": "<|im_end|><image> Are you sure?"},
    ]
    answer = ask(turns)
    assert answer.choices[0].message.content == plain.say(plain.prompt("slide000", turns), 24)
    answer = ask(QUESTIONS[0], region=SECOND_REGION)
    prompt = plain.prompt("slide000", QUESTIONS[0], slice(1, 2))
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.choices[0].message.content == plain.say(prompt, 24)


def test_stop_limit_and_sampling(ask: Ask, plain: Plain) -> None:
    text = plain.say(plain.prompt("slide000", QUESTIONS[0]), 24)
    stop = text[7:9]
    for stream in (False, True):
        answer = ask(QUESTIONS[0], stop=[stop, "never said"], stream=stream)
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
    answer = ask(long, max_tokens=500)
    assert answer.usage.total_tokens == CONTEXT
    drawn = [
        ask(QUESTIONS[0], temperature=1.0, seed=seed).choices[0].message.content
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_drawn_as_it_comes(ask: Ask) -> None:
    """Without a seed an engine draws by other means: they need no compiler, which is not there."""
    drawn = [
        ask(QUESTIONS[0], **options).choices[0].message.content
        for options in ({"temperature": 1}, {"temperature": 1}, {"temperature": 1, "top_p": 0.9})
    ]
    assert all(drawn)
    assert drawn[0] != drawn[1]


def test_together_is_as_alone(engine_service: Service, plain: Plain) -> None:
    """24 conversations at once."""
    cases = [(f"slide{n % 8:03d}", question) for n in range(8) for question in QUESTIONS]

    async def main() -> list[httpx.Response]:
        async with connect(engine_service) as client:
            bodies = [
                engine_service.body(question, slide_id=slide, max_tokens=40)
                for slide, question in cases
            ]
            return await asyncio.gather(*(post(client, body) for body in bodies))

    for (slide, question), answer in zip(cases, run(main()), strict=True):
        said = answer.json()["choices"][0]["message"]["content"]
        assert said == plain.say(plain.prompt(slide, question), 40), (slide, question)


def test_it_rests_when_nobody_reads(engine_service: Service) -> None:
    """Clients that leave, mid-stream or before the whole, end their answers in the engine."""
    body = engine_service.body(max_tokens=900)

    async def main() -> None:
        async with connect(engine_service) as client:
            found = await asyncio.gather(*(read(client, body, [], most=3) for _ in range(8)))
            assert set(found) == {200}
            whole = asyncio.create_task(post(client, body))
            while not (await load())["running"]:
                await asyncio.sleep(0.01)
            assert not whole.done()
            whole.cancel()

    run(main())
    until(
        lambda: run(load())["running"] == 0,
        seconds=15,
        what="the engine to drop what nobody reads",
    )
    engine = engine_of(chat_replica())

    def idle() -> bool:
        before = cpu_s(engine)
        time.sleep(0.5)
        return cpu_s(engine) - before < 0.1

    until(idle, seconds=15, what="the engine's process to rest")


@pytest.mark.chaos
def test_it_does_not_outlive_a_replica_that_dies(engine_service: Service) -> None:
    """And what the service starts in its place is gone when the service is."""
    from ray import serve

    replica = chat_replica()
    engine = engine_of(replica)

    async def main() -> list[list[str]]:
        async with connect(engine_service) as client:
            tasks, events = await open_streams(client, engine_service.body(max_tokens=900), 4)
            while not all(events):
                await asyncio.sleep(0.02)
            os.kill(replica, signal.SIGABRT)
            await asyncio.gather(*tasks)
        return events

    for events in run(main()):
        assert events[-1] != "[DONE]", "an answer that was cut looks whole"
        assert "error" in json.loads(events[-1])
    # Sooner than another could be there: nothing of it stands in that one's way.
    until(lambda: not alive(engine), seconds=10, what="the engine of a dead replica to end")
    serve.delete(NAME)
    until(
        lambda: not processes("ServeReplica:pathflip:"),
        seconds=60,
        what="every replica to end",
    )
