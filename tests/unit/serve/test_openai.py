"""Chat as OpenAI's clients do it: what they send unasked, send back, and show of errors."""

from __future__ import annotations

import time
from dataclasses import replace

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve.auth import read_tokens
from serve.chat_engine import ChatEngine
from serve.config import ChatConfig
from serve.fake_engine import EngineDied, FakeEngine
from serve.ingress import make_app
from tests.unit.serve.service_fixture import TOKENS

QUESTION = {"role": "user", "content": "What is seen?"}


@pytest.fixture(scope="module")
def said():
    """Prompts' lengths and sampling that the engine was asked for."""
    return []


@pytest.fixture(scope="module")
def chat(tuned, said):
    async def script(prompt, sampling):
        said.append((len(prompt), sampling))
        if sampling.seed == 13:
            raise EngineDied
        yield "mucin "

    def make():
        config = ChatConfig(flush_s=0)
        return ChatEngine(
            str(tuned.archive), str(tuned.run), config=config, engine=FakeEngine(script)
        )

    return make


@pytest.fixture
def talk(parts, world, loop, chat):
    """``talk(use)``: runs ``use(client, http, model)`` on a service with a fresh engine."""

    def run(use):
        app = make_app(replace(parts, instructor=chat()), tokens=read_tokens(world.token_file))

        async def main():
            transport = httpx.ASGITransport(app, client=("127.0.0.1", 1))
            async with (
                httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http,
                openai.AsyncOpenAI(
                    base_url="http://127.0.0.1/v1", api_key=TOKENS["all"][1], http_client=http,
                    max_retries=0,
                ) as client,
            ):  # fmt: skip
                http.headers["Authorization"] = f"Bearer {TOKENS['all'][1]}"
                model = (await client.models.list()).data[0].id
                return await use(client, http, model)

        return loop.run_until_complete(main())

    return run


def asked(model, **fields):
    return {"model": model, "slide_id": "slide000", "messages": [QUESTION]} | fields


CHANGES_NOTHING = {
    "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "logprobs": False,
    "top_logprobs": 0, "response_format": {"type": "text"}, "store": False, "tools": [],
    "tool_choice": "none", "n": 1, "user": "me",
}  # fmt: skip
NULLS = (
    *CHANGES_NOTHING, "region", "max_tokens", "max_completion_tokens", "temperature", "top_p",
    "stop", "seed", "stream", "stream_options",
)  # fmt: skip


def test_what_changes_nothing_is_accepted(talk, said):
    async def use(client, http, model):
        for more in ({}, CHANGES_NOTHING, dict.fromkeys(NULLS)):
            answer = await http.post("/v1/chat/completions", json=asked(model, **more))
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"][0]["message"]["content"] == "mucin "

    said.clear()
    talk(use)
    assert said[0] == said[1] == said[2]


def test_an_answer_is_counted_by_its_tokens_and_its_first_one(talk):
    async def use(client, http, model):
        begun = time.perf_counter()
        usage = (await http.post("/v1/chat/completions", json=asked(model))).json()["usage"]
        took = time.perf_counter() - begun
        found = {
            (sample.name, sample.labels.get("kind")): sample.value
            for family in text_string_to_metric_families((await http.get("/metrics")).text)
            for sample in family.samples
        }
        for kind in ("prompt", "completion"):
            assert found["pathflip_tokens_total", kind] == usage[f"{kind}_tokens"] > 0
        assert found["pathflip_first_token_seconds_count", None] == 1
        assert 0 < found["pathflip_first_token_seconds_sum", None] < took

    talk(use)


@pytest.mark.parametrize("more", [
    {"frequency_penalty": 0.1}, {"presence_penalty": -1}, {"response_format": {"type": "json"}},
    {"store": True}, {"tools": [None]}, {"tool_choice": "auto"}, {"n": 2},
    {"messages": [QUESTION | {"tool_calls": [{}]}]}, {"messages": [QUESTION | {"audio": {}}]},
])  # fmt: skip
def test_what_would_change_something_is_refused(ask, more):
    answer = ask("POST", "/v1/chat/completions", json=asked("m", **more))
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid")


def test_an_answer_is_sent_back_as_the_client_gives_it(talk, said):
    async def use(client, http, model):
        async def ask(*messages):
            return await client.chat.completions.create(
                model=model, messages=messages, extra_body={"slide_id": "slide000"}
            )

        reply = (await ask(QUESTION)).choices[0].message
        assert reply.content == "mucin "
        for back in (reply, reply.model_dump(), {"role": "assistant", "content": "mucin "}):
            await ask(QUESTION, back, QUESTION)
        for role in ("developer", "system"):
            await ask({"role": role, "content": "Be brief."}, QUESTION)

    said.clear()
    talk(use)
    lengths = [tokens for tokens, _ in said]
    assert lengths[0] < lengths[1] == lengths[2] == lengths[3]
    assert lengths[0] < lengths[4] == lengths[5]


def test_one_model_by_its_id(talk):
    async def use(client, http, model):
        for listed in (await client.models.list()).data:
            assert await client.models.retrieve(listed.id) == listed
        with pytest.raises(openai.NotFoundError) as caught:
            await client.models.retrieve("none")
        assert caught.value.code == "unknown_model"

    talk(use)


def test_an_error_says_what_is_wrong_and_which_request_it_was(talk):
    async def use(client, http, model):
        create = client.chat.completions.create
        with pytest.raises(openai.NotFoundError) as caught:
            await create(model=model, messages=[QUESTION], extra_body={"slide_id": "none"})
        assert "There is no such slide." in str(caught.value)
        assert caught.value.request_id == caught.value.body["request_id"]
        with pytest.raises(openai.UnprocessableEntityError) as caught:
            await create(model=model, messages=[QUESTION], extra_body={"slide": "none"})
        assert "body.slide_id: Field required" in str(caught.value)
        long = QUESTION | {"content": "mucin " * 1200}
        with pytest.raises(openai.UnprocessableEntityError) as caught:
            await create(model=model, messages=[long], extra_body={"slide_id": "slide000"})
        assert caught.value.code == "prompt_too_long"
        hint = "Ask about a region of the slide, or shorten the conversation."
        assert caught.value.body["hint"] == hint
        assert hint in str(caught.value)
        answer = await create(model=model, messages=[QUESTION], extra_body={"slide_id": "slide000"})
        assert answer.id == f"chatcmpl-{answer._request_id}"

    talk(use)


def test_a_dead_engine_is_told_to_come_back_to(talk):
    async def use(client, http, model):
        assert (await http.get("/readyz")).status_code == 200
        for seed in (13, 1):  # the first kills it
            answer = await http.post("/v1/chat/completions", json=asked(model, seed=seed))
            assert (answer.status_code, answer.json()["code"]) == (503, "engine_dead")
            assert answer.headers["retry-after"] == "1"
            assert answer.json()["hint"].startswith("Ask again")

    talk(use)


def test_a_service_with_a_dead_engine_is_not_ready(talk):
    async def use(client, http, model):
        await http.post("/v1/chat/completions", json=asked(model, seed=13))
        ready = await http.get("/readyz")
        assert (ready.status_code, ready.json()["status"]) == (503, "down")
        assert ready.json()["parts"]["instructor"] is False
        assert ready.json()["parts"]["search"] is True

    talk(use)


# -- options --------------------------------------------------------------------------------------

CHOICES = ["colon", "breast tissue", "lung"]


@pytest.fixture
def scored(parts, world, loop, tuned):
    """``scored(fields, …)``: answers of a service whose engine scores tokens with the model."""
    from pathflip.slide_qa import SlideQA

    answerer = SlideQA.from_run(tuned.run)

    def scores(prompt, tokens):
        import torch

        with torch.no_grad():
            states = answerer.model._states([prompt], left=False)
            logs = answerer.model.causal.lm_head(states[0, -1]).float().log_softmax(0)
        return [float(logs[token]) for token in tokens]

    engine = ChatEngine(
        str(tuned.archive), str(tuned.run), config=ChatConfig(), engine=FakeEngine(scores=scores)
    )

    def run(*every, abstains=False, heat=None, answers="letter"):
        for front in (engine._reader.front, answerer.model):
            front.config = replace(front.config, choice_answer=answers)
            front.abstains = abstains
            front.calibration = heat
        app = make_app(replace(parts, instructor=engine), tokens=read_tokens(world.token_file))

        async def main():
            transport = httpx.ASGITransport(app, client=("127.0.0.1", 1))
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
                http.headers["Authorization"] = f"Bearer {TOKENS['all'][1]}"
                model = (await http.get("/v1/models")).json()["data"][0]["id"]
                return [
                    await http.post("/v1/chat/completions", json=asked(model, **fields))
                    for fields in every
                ]

        return loop.run_until_complete(main())

    return answerer, run


@pytest.mark.parametrize("abstains", [False, True])
def test_options_are_chosen_as_by_the_command_line(scored, tuned, abstains) -> None:
    """Probabilities, temperature and abstaining are those of ``pathflip ask``."""
    from pathflip.archive import Archive
    from pathflip.calibration import Calibration

    heat = Calibration(
        mode="letter_logit", temperature=3.0, questions=60, ece_before=0.2, ece=0.1,
        nll_before=2.0, nll=1.0, abstain_bias=0.7, unanswerable=20,
    )  # fmt: skip
    answerer, run = scored
    (answer, forced) = run(
        {"choices": CHOICES}, {"choices": CHOICES, "abstain": False}, abstains=abstains, heat=heat
    )
    for found, wish in ((answer, None), (forced, False)):
        expected = answerer.ask(
            Archive(tuned.archive), "slide000", QUESTION["content"], CHOICES, abstain=wish
        )
        body = found.json()
        assert body["choices"][0]["message"]["content"] == expected.answer
        options = body["options"]
        assert options["choice"] == expected.choice
        assert options["scores"] == pytest.approx(expected.scores, abs=1e-6)
        assert options["abstain"] == pytest.approx(expected.abstain, abs=1e-6)
        assert (options["abstain"] is not None) == (abstains and wish is None)


def test_options_that_cannot_be_are_refused(scored) -> None:
    _, run = scored
    wrong = [
        {"choices": ["one"]}, {"choices": ["one", " one "]}, {"choices": ["one", " "]},
        {"choices": list("abcdefghi")}, {"choices": CHOICES, "stream": True}, {"abstain": True},
        {"choices": CHOICES, "messages": [QUESTION, QUESTION]},
        {"choices": CHOICES, "messages": [QUESTION | {"content": " "}]},
    ]  # fmt: skip
    assert {answer.status_code for answer in run(*wrong)} == {422}
    long = [{"role": "user", "content": "Why? " * 3000}]
    (refused,) = run({"choices": CHOICES, "messages": long})
    assert refused.json()["code"] == "prompt_too_long"


def test_texts_of_options_are_no_thousand_prompts(scored) -> None:
    """A model that chooses by text reads a prompt for each token of an option."""
    answerer, run = scored
    long = ["qzxj " * 110, "mucin"]
    (by_letter,) = run({"choices": long})
    assert by_letter.status_code == 200
    (refused,) = run({"choices": long}, answers="text")
    assert (refused.status_code, refused.json()["code"]) == (422, "question")
    (short,) = run({"choices": CHOICES}, answers="text")
    assert short.json()["usage"]["completion_tokens"] == sum(
        len(answerer.model.prompter.text_ids(text)) for text in CHOICES
    )
