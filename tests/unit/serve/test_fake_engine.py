"""The fake engine: what it says, when it stops, and the chat engine over it without vLLM."""

import asyncio
import sys
from contextlib import aclosing

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pathflip.errors import ConfigError, PathFLIPError
from serve.chat_engine import ChatEngine
from serve.config import ChatConfig
from serve.engine import Sampling
from serve.fake_engine import EngineDied, FakeEngine, FakeEngineConfig

PROMPT = torch.zeros(3, 8)
ASKED = {"slide_id": "slide000", "messages": [{"role": "user", "content": "What is seen?"}]}


async def outputs(engine, sampling):
    stream = engine.generate(PROMPT, sampling, request_id="a")
    async with aclosing(stream):
        return [output async for output in stream]


def scripted(words):
    async def script(prompt, sampling):
        for word in words:
            yield word

    return FakeEngine(script)


def expected(words, *, max_tokens, stop):
    """(text, tokens, finish_reason), word by word, by asking after each whether it is over."""
    said = ""
    for count, word in enumerate(words, start=1):
        said += word
        found = [said.index(one) for one in stop if one in said]
        if found:
            return said[: min(found)], count, "stop"
        if count == max_tokens:
            return said, count, "length"
    return said, len(words), "stop"


@given(
    st.lists(st.text("ab ", min_size=1, max_size=4), max_size=12),
    st.integers(1, 14),
    st.lists(st.text("ab ", min_size=1, max_size=5), max_size=2),
    st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_it_stops_as_an_engine_does(words, max_tokens, stop, stream):
    sampling = Sampling(max_tokens=max_tokens, stop=tuple(stop), stream=stream)
    found = asyncio.run(outputs(scripted(words), sampling))
    text, tokens = "".join(one.text for one in found), sum(one.tokens for one in found)
    assert (text, tokens, found[-1].finish_reason) == expected(
        words, max_tokens=max_tokens, stop=stop
    )
    assert [one.finish_reason for one in found[:-1]] == [None] * (len(found) - 1)
    assert stream or len(found) == 1


def test_a_stream_comes_in_parts():
    found = asyncio.run(outputs(FakeEngine(), Sampling(max_tokens=5)))
    assert [one.tokens for one in found] == [1] * 5
    assert "".join(one.text for one in found) == "This answer is scripted: no "


def test_a_text_is_repeated_only_where_it_is_set():
    once = FakeEngine(config=FakeEngineConfig(text="a b "))
    (found,) = asyncio.run(outputs(once, Sampling(max_tokens=5, stream=False)))
    assert (found.text, found.finish_reason) == ("a b ", "stop")
    again = FakeEngine(config=FakeEngineConfig(text="a b ", repeat=True))
    (found,) = asyncio.run(outputs(again, Sampling(max_tokens=5, stream=False)))
    assert (found.text, found.finish_reason) == ("a b a b a ", "length")


def test_answers_are_held_while_the_file_is_there(tmp_path):
    hold = tmp_path / "hold"
    engine = FakeEngine(config=FakeEngineConfig(text="a b c ", hold=str(hold), hold_at=2))
    hold.touch()

    async def main():
        streams = [engine.generate(PROMPT, Sampling(max_tokens=9), request_id="") for _ in "ab"]
        for stream in streams:
            assert [(await anext(stream)).text for _ in range(2)] == ["a ", "b "]
        rest = [asyncio.ensure_future(anext(stream)) for stream in streams]
        done, _ = await asyncio.wait(rest, timeout=0.2)
        assert not done
        assert engine.unfinished() == 2
        rest[0].cancel()
        await asyncio.wait(rest[:1])
        assert (engine.unfinished(), engine.aborted) == (1, 1)
        hold.unlink()
        assert (await rest[1]).text == "c "
        assert [one.finish_reason async for one in streams[1]] == ["stop"]
        assert (engine.unfinished(), engine.aborted) == (0, 1)

    asyncio.run(main())


def test_who_leaves_ends_the_answer():
    engine = FakeEngine(config=FakeEngineConfig(repeat=True))

    async def main():
        stream = engine.generate(PROMPT, Sampling(max_tokens=10**6), request_id="")
        await anext(stream)
        await stream.aclose()

    asyncio.run(main())
    assert (engine.unfinished(), engine.aborted) == (0, 1)


def test_an_engine_that_dies_takes_every_answer_with_it():
    died = asyncio.Event()

    async def script(prompt, sampling):
        yield "a "
        if sampling.max_tokens == 1:
            raise AssertionError("it has its token")
        if sampling.max_tokens == 2:
            died.set()
            raise EngineDied
        await died.wait()
        yield "b "

    engine = FakeEngine(script)

    async def main():
        first, second = (Sampling(max_tokens=tokens) for tokens in (2, 3))
        await outputs(engine, Sampling(max_tokens=1))
        await engine.check_health()
        found = await asyncio.gather(
            outputs(engine, second), outputs(engine, first), return_exceptions=True
        )
        assert [type(error) for error in found] == [EngineDied, EngineDied]
        with pytest.raises(EngineDied):
            await outputs(engine, first)
        with pytest.raises(EngineDied):
            await engine.check_health()

    asyncio.run(main())
    assert engine.errored
    assert engine.unfinished() == 0


# -- the chat engine over it ----------------------------------------------------------------------


@pytest.fixture
def chat(tuned):
    """``chat(script)``: the chat engine with real prompts."""

    def make(script=None, **config):
        engine = FakeEngine(script, config=FakeEngineConfig(**config))
        settings = ChatConfig(flush_s=0)
        return ChatEngine(str(tuned.archive), str(tuned.run), config=settings, engine=engine)

    return make


async def answer(chat, **fields):
    return [chunk async for chunk in chat.chat(ASKED | fields)]


def test_a_whole_service_needs_no_vllm(tuned):
    before = "vllm" in sys.modules
    config = ChatConfig(backend="fake", fake=FakeEngineConfig(text="There is mucin. "))
    chat = ChatEngine(str(tuned.archive), str(tuned.run), config=config)

    async def main():
        await chat.check_health()
        assert (await chat.describe())["id"].startswith("fake-"), "it is not the model's answer"
        return await answer(chat, stream=False)

    (last,) = asyncio.run(main())  # a whole answer is one message between processes
    assert last["text"] == "There is mucin. "
    assert last["finish_reason"] == "stop"
    assert last["usage"]["completion_tokens"] == 3
    assert last["usage"]["prompt_tokens"] > 3
    assert ("vllm" in sys.modules) == before


def test_tokens_that_are_there_go_together_and_the_first_at_once(tuned):
    words = [f"word{number} " for number in range(50)]

    async def main(flush_s):
        seen = asyncio.Event()

        async def script(prompt, sampling):
            yield words[0]
            await asyncio.wait_for(seen.wait(), 60)  # the first is not held for the second
            for word in words[1:]:
                yield word

        config = ChatConfig(flush_s=flush_s)
        chat = ChatEngine(
            str(tuned.archive), str(tuned.run), config=config, engine=FakeEngine(script)
        )
        found = []
        async for chunk in chat.chat(ASKED):
            found.append(chunk)
            seen.set()
        return found

    long, none = asyncio.run(main(3600)), asyncio.run(main(0))
    for found in (long, none):
        assert found[0] == {"text": words[0]}
        assert "".join(one["text"] for one in found) == "".join(words)
        assert found[-1]["usage"]["completion_tokens"] == len(words)
    assert [one["text"] for one in long] == [words[0], "".join(words[1:])]
    assert [one["text"] for one in none[:49]] == words[:49]


def test_many_streams_send_less_often(tuned, monkeypatch):
    engine = FakeEngine()
    chat = ChatEngine(
        str(tuned.archive), str(tuned.run), config=ChatConfig(flush_s=0.04), engine=engine
    )
    pauses = []
    for running in (1, 8, 32):
        monkeypatch.setattr(engine, "_running", running)
        pauses.append(chat._pause())
    assert pauses == [0.04, 0.04, 0.16]
    chat.config = ChatConfig(flush_s=0)
    assert chat._pause() == 0


def test_who_leaves_a_stream_between_two_pieces_ends_it_in_the_engine(tuned):
    engine = FakeEngine(config=FakeEngineConfig(repeat=True))
    chat = ChatEngine(
        str(tuned.archive), str(tuned.run), config=ChatConfig(flush_s=3600), engine=engine
    )

    async def main():
        stream = chat.chat(ASKED | {"max_tokens": 900})
        assert (await anext(stream))["text"]
        later = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        later.cancel()
        with pytest.raises(asyncio.CancelledError):
            await later

    asyncio.run(main())
    assert (engine.unfinished(), engine.aborted) == (0, 1)


def test_the_engine_is_asked_for_what_the_client_wants(chat):
    asked = []

    async def script(prompt, sampling):
        asked.append((prompt, sampling))
        yield "a"

    chat = chat(script)

    async def main():
        await answer(chat, max_tokens=7, temperature=0.5, top_p=0.25, stop=["x"], seed=9)
        await answer(chat, stream=False, region={"x0": 600, "y0": 10, "size0": 100})
        await answer(chat, max_tokens=10**6)

    asyncio.run(main())
    (slide, first), (region, second), (_, third) = asked
    assert (first.max_tokens, first.temperature, first.top_p) == (7, 0.5, 0.25)
    assert (first.stop, first.seed, first.stream) == (("x",), 9, True)
    assert (second.max_tokens, second.temperature, second.top_p) == (512, 0.0, 1.0)
    assert (second.stop, second.seed, second.stream) == ((), None, False)
    assert slide.ndim == 2
    assert len(region) < len(slide), "a region has fewer visual tokens"
    assert third.max_tokens + len(slide) == 1024, "the answer ends where the context does"
    assert first.stop_token_ids


def test_a_prompt_that_leaves_no_room_is_refused(chat):
    made = chat()
    long = [{"role": "user", "content": "mucin " * 1200}]
    with pytest.raises(ConfigError) as caught:
        asyncio.run(answer(made, messages=long))
    assert caught.value.code == "prompt_too_long"
    assert asyncio.run(made.load())["running"] == 0


def test_a_dead_engine_is_said_to_be_dead(chat):
    async def script(prompt, sampling):
        yield "a "
        if sampling.max_tokens > 1:  # not the warm-up
            raise EngineDied

    chat = chat(script)

    async def main():
        await chat.check_health()
        stream = chat.chat(ASKED)
        assert await anext(stream) == {"text": "a "}
        with pytest.raises(PathFLIPError) as caught:
            await anext(stream)
        assert caught.value.code == "engine_dead"
        with pytest.raises(PathFLIPError) as caught:  # readiness asks it
            await chat.describe()
        assert caught.value.code == "engine_dead"
        with pytest.raises(EngineDied):  # Serve replaces the replica
            await chat.check_health()

    asyncio.run(main())


def test_an_engine_that_cannot_draw_does_not_start(chat):
    async def script(prompt, sampling):
        if sampling.temperature:
            raise EngineDied
        yield "a "

    with pytest.raises(EngineDied):
        asyncio.run(chat(script).check_health())


def test_a_fault_of_a_request_is_its_own(chat):
    async def script(prompt, sampling):
        if sampling.seed == 1:
            raise ValueError("no such seed")
        yield "a "

    chat = chat(script)
    with pytest.raises(ConfigError, match="refused the request: no such seed"):
        asyncio.run(answer(chat, seed=1))
    assert asyncio.run(answer(chat, seed=2))[0] == {"text": "a "}
