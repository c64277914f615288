"""Tools for agents over HTTP, by the official client: the answers are those of the routes."""

from __future__ import annotations

import base64
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from mcp import MCPError

from pathflip.archive import Archive
from serve import audit
from serve.audit import AuditLog
from serve.auth import read_tokens
from serve.chat_engine import ChatEngine
from serve.config import ChatConfig
from serve.fake_engine import FakeEngine
from serve.ingress import make_app
from serve.limits import Limits
from serve.mcp import MAX_BODY, TOOLS
from serve.routing import Parts
from serve.search import Search
from tests.agents import MODES, fault, listening, over_http, pictures, result, texts
from tests.unit.serve.service_fixture import SECRETS, SLIDES, bearer, slide_id
from tests.unit.serve.test_hostile import PATHS, watched

READ = ["list_slides", "describe_slide", "measure"]
SEARCH = ["search", "ground", "classify"]
CLASSES = {"colon": ["colonic mucosa", "colon"], "lung": ["lung"]}


@pytest.fixture(scope="module")
def chat(parts, tuned, loop):
    """The parts with a chat engine whose answers are scripted."""

    async def script(prompt, sampling):
        yield "There is "
        yield "mucin."

    engine = ChatEngine(
        str(tuned.archive), str(tuned.run), config=ChatConfig(flush_s=0), engine=FakeEngine(script)
    )
    return replace(parts, instructor=engine)


@pytest.fixture
def agent(parts, world, loop) -> Callable:
    """``agent(use, who=…)``: runs ``use(client)`` of an agent connected to a service."""

    def run(use, *, who="all", mode="auto", tokens=True, limits=None, audit=None, parts=parts):
        known = read_tokens(world.token_file) if tokens else None
        app = make_app(parts, limits=limits, tokens=known, audit=audit)

        async def main():
            async with (
                listening(app) as url,
                over_http(url, bearer(who) if tokens else None, mode=mode) as client,
            ):
                return await use(client)

        return loop.run_until_complete(main())

    return run


# -- what is listed -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_tools_are_those_of_the_scopes_and_parts(agent, parts, chat, mode):
    async def names(client):
        return [tool.name for tool in (await client.list_tools()).tools]

    assert "view" in agent(names, who="reader", mode=mode, parts=parts)
    parts, chat = replace(parts, tiles=None), replace(chat, tiles=None)
    for who, own, expected in (
        ("all", parts, [*READ, *SEARCH]),
        ("reader", parts, READ),
        ("finder", parts, SEARCH),
        ("talker", parts, []),
        ("talker", chat, ["ask"]),
        ("all", replace(parts, embedder=None), [*READ, "ground", "classify"]),
        ("all", replace(parts, embedder=None, grounding=None), READ),
    ):
        assert sorted(agent(names, who=who, mode=mode, parts=own)) == sorted(expected), who
    assert sorted(agent(names, tokens=False, parts=chat)) == sorted([*READ, *SEARCH, "ask"])


def test_every_tool_tells_a_model_how_to_use_it(agent, chat):
    async def use(client):
        assert "level-0 pixels" in client.instructions
        return (await client.list_tools()).tools

    tools = agent(use, parts=replace(chat, tiles=object()))
    assert [tool.name for tool in tools] == [tool.name for tool in TOOLS]
    for tool in tools:
        assert tool.annotations.read_only_hint
        assert len(tool.description) > 60
        assert tool.input_schema["additionalProperties"] is False
        assert "$ref" not in json.dumps(tool.input_schema), tool.name
        assert tool.output_schema["type"] == "object"
        for name, about in tool.input_schema["properties"].items():
            bounded = json.dumps(about)
            if '"string"' in bounded:
                assert "maxLength" in bounded or "enum" in bounded, (tool.name, name)
            if '"array"' in bounded:
                assert "maxItems" in bounded, (tool.name, name)
            if '"number"' in bounded or '"integer"' in bounded:
                assert "aximum" in bounded, (tool.name, name)


# -- answers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_slides_as_the_route_lists_them(agent, ask, mode):
    async def use(client):
        found = await result(client, "list_slides", limit=2)
        more = await result(client, "list_slides", limit=100, after=found["next"])
        assert more["next"] is None
        assert found["total"] == more["total"] == SLIDES
        for asked, numbers in (
            ({"contains": "E00"}, range(SLIDES)),
            ({"contains": "3"}, [3]),
            ({"split": "test"}, [1, 3]),
            ({"label": "grade=1"}, [0, 2, 4]),
            ({"split": "test", "label": "grade=1"}, []),
        ):
            some = await result(client, "list_slides", **asked)
            assert [row["slide_id"] for row in some["slides"]] == [slide_id(n) for n in numbers]
        assert await fault(client, "list_slides", label="grade") == (
            "invalid", "invalid: The arguments do not fit. label: String should match pattern '='"
        )  # fmt: skip
        return found["slides"] + more["slides"]

    assert agent(use, mode=mode) == ask("GET", "/v1/slides").json()["data"]


def test_a_slide_is_described_and_shown(agent, world):
    async def use(client):
        answer = await client.call_tool("describe_slide", {"slide": "slide001"})
        bare = await client.call_tool("describe_slide", {"slide": slide_id(SLIDES - 1)})
        return answer, bare

    answer, bare = agent(use)
    about = answer.structured_content
    assert (about["width"], about["height"], about["mpp"]) == (384, 128, 0.5)
    assert (about["width_um"], about["height_um"], about["magnification"]) == (192, 64, 20)
    # The thumbnail has a quarter of the pixels a side.
    place = {"x0": 0, "y0": 0, "width": 96, "height": 32, "px0": 4, "mpp": 2}
    assert about["picture"] == place
    (block,) = (block for block in answer.content if block.type == "image")
    assert base64.b64decode(block.data) == Archive(world.archive).slide("slide001")["thumbnail"]
    assert "x = 0 + u * 4" in texts(answer)[1]
    assert bare.structured_content["picture"] is None
    assert pictures(bare) == []


def test_search_is_the_routes(agent, ask):
    asked = (
        ({"text": "areas of mucin", "k": 7}, {}),
        ({"text": "areas of mucin", "level": "slide", "k": 3}, {}),
        (
            {"slide": "slide002", "level": "slide", "exclude_same_slide": True},
            {"slide": "slide_id"},
        ),
        ({"region": "slide002/1_0", "k": 50}, {"region": "region_id"}),
        ({"text": "a", "k": 50, "filters": ["split=test", "label.grade=2"]}, {}),
    )

    async def use(client):
        return [await result(client, "search", **arguments) for arguments, _ in asked]

    for (arguments, renamed), found in zip(asked, agent(use), strict=True):
        body = {renamed.get(name, name): value for name, value in arguments.items()}
        if "filters" in body:
            body["filters"] = [
                {"field": "split", "value": "test"}, {"field": "label.grade", "value": "2"},
            ]  # fmt: skip
        expected = ask("POST", "/v1/search", json=body).json()
        assert len(found["results"]) > 0
        assert found == {**expected, "pictures": []}


def test_slides_that_are_found_are_shown(agent, world):
    async def use(client):
        return await client.call_tool(
            "search", {"text": "mucin", "level": "slide", "k": SLIDES, "pictures": SLIDES}
        )

    answer = agent(use)
    found = answer.structured_content
    # One slide has no picture: the others are there.
    assert len(found["results"]) == SLIDES
    assert len(pictures(answer)) == len(found["pictures"]) == SLIDES - 1
    blocks = [block for block in answer.content if block.type == "image"]
    ids = {row["rank"]: row["slide_id"] for row in found["results"]}
    for place, block in zip(found["pictures"], blocks, strict=True):
        stored = Archive(world.archive).slide(ids[place["rank"]])["thumbnail"]
        assert base64.b64decode(block.data) == stored


def test_ground_is_the_routes_with_its_picture(agent, ask):
    async def use(client):
        asked = {"slide": "slide001", "text": "necrosis", "contrast": "tissue"}
        answer = await client.call_tool("ground", asked)
        bare = await client.call_tool("ground", asked | {"picture": False})
        return answer, bare

    answer, bare = agent(use)
    asked = {"slide_id": "slide001", "text": "necrosis", "contrast": "tissue"}
    expected = ask("POST", "/v1/ground", json=asked).json()
    found = answer.structured_content
    assert found["score"] == expected["score"]
    hottest = sorted(expected["boxes"], key=lambda box: -box["score"])
    assert found["boxes"] == hottest
    assert found["boxes_left_out"] == 0
    png = ask("POST", "/v1/ground", json=asked | {"format": "png"}).content
    from io import BytesIO

    from PIL import Image

    with Image.open(BytesIO(png)) as image:
        drawn = np.asarray(image.convert("RGB"), np.float64)
    (seen,) = pictures(answer)
    assert seen.shape == drawn.shape
    assert np.abs(seen - drawn).mean() < 6
    assert found["picture"]["px0"] == pytest.approx(384 / seen.shape[1])
    assert pictures(bare) == []
    assert bare.structured_content == found | {"picture": None}


def test_classify_is_the_routes(agent, ask):
    async def use(client):
        return await result(client, "classify", slides=["slide004", "slide001"], classes=CLASSES)

    asked = {"slide_ids": ["slide004", "slide001"], "classes": CLASSES}
    assert agent(use) == ask("POST", "/v1/classify", json=asked).json()


def test_ask_is_answered_by_the_language_model(agent, chat, loop):
    async def use(client):
        whole = await result(client, "ask", slide="slide000", question="What is seen?")
        part = await result(
            client, "ask", slide="slide000", question="And here?", x0=0, y0=0, size_um=64
        )
        code, _ = await fault(client, "ask", slide="slide000", question="And here?", x0=0)
        return whole, part, code

    whole, part, code = agent(use, parts=chat)
    model = loop.run_until_complete(chat.instructor.describe())["id"]
    expected = {"model": model, "slide_id": "slide000", "answer": "There is mucin."}
    assert whole | expected == whole
    assert part["answer"] == whole["answer"]
    assert (whole["choice"], whole["scores"], code) == (None, None, "invalid")


def test_lengths_and_areas_in_closed_form(agent):
    async def use(client):
        # A 3-4-5 triangle of 30, 40 and 50 px at 0.5 µm per px.
        points = [[10, 20], [40, 20], [40, 60.0]]
        line = await result(client, "measure", slide="slide001", points=points)
        area = await result(client, "measure", slide="slide001", points=points, what="area")
        return line, area

    line, area = agent(use)
    assert line["length_um"] == 35
    assert (line["area_um2"], line["mpp"]) == (None, 0.5)
    assert area["length_um"] == 60
    assert area["area_um2"] == 150
    assert math.isclose(area["area_mm2"], 150e-6)


# -- errors ---------------------------------------------------------------------------------------


def test_errors_say_cause_and_hint(agent):
    async def use(client):
        found = {}
        for name, tool, arguments in (
            ("slide", "describe_slide", {"slide": "slide999"}),
            ("quarantined", "describe_slide", {"slide": "broken"}),
            ("outside", "measure", {"slide": "slide001", "points": [[0, 0], [384, 129]]}),
            ("two", "measure", {"slide": "slide001", "points": [[0, 0], [9, 9]], "what": "area"}),
            ("bow", "measure", {"slide": "slide001", "what": "area",
                                "points": [[0, 0], [9, 9], [9, 0], [0, 9]]}),
            ("nothing", "search", {}),
            ("both", "search", {"text": "a", "slide": "slide001"}),
            ("filter", "search", {"text": "a", "filters": ["uri=x"]}),
            ("patient", "search", {"text": "a", "filters": ["patient_id=x"]}),
            ("label", "search", {"text": "a", "filters": ["label.nothing=x"]}),
            ("embed", "search", {"text": "a", "level": "slide", "encoder": "titan"}),
            ("encoder", "search", {"slide": "slide001", "level": "slide", "encoder": "titan"}),
            ("many", "list_slides", {"limit": 101}),
            ("unknown", "list_slides", {"path": "/etc"}),
            ("blank", "ground", {"slide": "slide001", "text": "a", "contrast": " "}),
            ("one", "classify", {"slides": ["slide001"], "classes": {"a": ["a"]}}),
        ):  # fmt: skip
            found[name] = await fault(client, tool, **arguments)
        return found

    found = agent(use)
    codes = {name: code for name, (code, _) in found.items()}
    assert codes == {
        "slide": "unknown_slide", "quarantined": "unknown_slide", "outside": "outside_slide",
        "two": "outline", "bow": "outline", "nothing": "invalid", "both": "invalid",
        "filter": "config", "patient": "patients", "label": "unknown_label", "many": "invalid",
        "embed": "invalid", "encoder": "unknown_slide_encoder",
        "unknown": "invalid", "blank": "invalid", "one": "invalid",
    }  # fmt: skip
    assert "384 x 128" in found["outside"][1]
    assert "exactly one of text" in found["nothing"][1]
    assert "limit" in found["many"][1]
    assert "/etc" not in found["unknown"][1]


def test_a_slide_without_a_size_has_no_places(agent, tuned):
    """Its features were imported, its pixels are elsewhere."""

    async def use(client):
        assert (await result(client, "describe_slide", slide="slide001"))["width_um"] is None
        return await fault(client, "measure", slide="slide001", points=[[0, 0], [1, 1]])

    code, _ = agent(use, parts=Parts(search=Search(str(tuned.archive))))
    assert code == "no_size"


def test_a_token_without_the_scope_is_told_so(agent):
    async def use(client):
        return await fault(client, "search", text="a")

    assert agent(use, who="reader") == ("scope", "scope: This token lacks the scope search.")

    async def show(client):
        asked = {"text": "a", "level": "slide", "pictures": 1}
        return await fault(client, "search", **asked), await client.call_tool(
            "search", {"text": "a"}
        )

    (code, text), plain = agent(show, who="finder")
    assert (code, "scope read" in text, plain.is_error) == ("scope", True, False)


def test_an_unknown_tool_is_an_error_of_the_protocol(agent, parts):
    async def use(client):
        for name in ("view", "ask", "nothing", "../list_slides"):  # no part, no part, no tool
            with pytest.raises(MCPError, match="no tool of this name"):
                await client.call_tool(name, {})

    agent(use, parts=replace(parts, tiles=None))


def test_ids_are_no_paths(agent):
    async def use(client):
        for path in [*PATHS, "slide001\0", "19561224.svs", "slide001.svs"]:
            for tool, more in (
                ("describe_slide", {}),
                ("measure", {"points": [[0, 0], [1, 1]]}),
                ("ground", {"text": "a"}),
                ("search", {}),
            ):
                code, text = await fault(client, tool, slide=path, **more)
                assert code == "unknown_slide"
                assert not any(secret in text for secret in SECRETS)

    with watched() as files:
        agent(use)
    assert not [name for name in files if "passwd" in name or "environ" in name]


HOSTILE = [
    {"points": [[0, 0], [1e300, 0]]}, {"points": [[0, 0]] * 501}, {"points": [[0, 0, 0]] * 3},
    {"points": [["0", "0"], ["1", "1"]]}, {"points": "0,0 1,1"}, {"points": [[0, 0], [1, None]]},
    {"points": [[0, 0], [1, 1]], "what": "volume"}, {"points": [[0, 0], [1, 1]], "mpp": 1},
    {"points": [[0, 0], [True, 1]]}, {"slide": ["slide001"], "points": [[0, 0], [1, 1]]},
    {"slide": "x" * 10_000, "points": [[0, 0], [1, 1]]}, {},
]  # fmt: skip


def test_arguments_are_bounded(agent):
    async def use(client):
        for arguments in HOSTILE:
            code, text = await fault(client, "measure", **{"slide": "slide001"} | arguments)
            assert code == "invalid", arguments
            assert len(text) < 10_000

    agent(use)


# -- the same walls as every route ----------------------------------------------------------------

PING = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
ACCEPT = {"Accept": "application/json, text/event-stream"}


def test_the_guard_stands_before_it(serving):
    ask = serving()
    ping = {"json": PING, "headers": ACCEPT}
    assert ask("POST", "/mcp", **ping).json() == {"jsonrpc": "2.0", "id": 1, "result": {}}
    for status, code, options in (
        (401, "no_token", ping | {"who": None}),
        (415, "media_type", {"content": json.dumps(PING), "headers": ACCEPT}),
        (403, "cross_site", ping | {"headers": ACCEPT | {"Origin": "https://evil.example"}}),
        (403, "cross_site", ping | {"headers": ACCEPT | {"Origin": "null"}}),
        (403, "cross_site", ping | {"headers": ACCEPT | {"Sec-Fetch-Site": "same-site"}}),
        (413, "too_large", {"json": PING | {"params": {"x": "x" * MAX_BODY}}, "headers": ACCEPT}),
    ):
        answer = ask("POST", "/mcp", **options)
        assert (answer.status_code, answer.json()["code"]) == (status, code)
    own = ACCEPT | {"Origin": "http://127.0.0.1"}
    assert ask("POST", "/mcp", json=PING, headers=own).status_code == 200
    for body in (b'{"id": 1, "id": 2}', b"{", b'{"id": NaN}', b"\xff", b"[" * 100_000):
        headers = ACCEPT | {"Content-Type": "application/json"}
        answer = ask("POST", "/mcp", content=body, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (400, "bad_json")
    # No session, and no stream that would hold a place.
    for method in ("GET", "DELETE", "PUT"):
        options = {"json": PING} if method == "PUT" else {}
        assert ask(method, "/mcp", headers=ACCEPT, **options).status_code == 405
    for path in ("/mcp/", "/mcp/x", "/mcpx"):
        assert ask("POST", path, json=PING, headers=ACCEPT).status_code == 404
    # A batch, an answer and nonsense are no requests.
    for body in ([PING], [], {"jsonrpc": "2.0", "id": 1, "result": {}}, {}, 1, None):
        answer = ask("POST", "/mcp", content=json.dumps(body), headers=headers)
        assert answer.status_code in (202, 400), body
    text = ask("GET", "/metrics").text
    assert re.search(r'pathflip_requests_total\{method="POST",\S*route="/mcp",status="200"\}', text)


def test_without_tokens_only_this_machine_at_its_own_name(serving):
    ask = serving(tokens=False)
    ping = {"json": PING, "headers": ACCEPT}
    assert ask("POST", "/mcp", **ping).status_code == 200
    for options in ({"base": "http://evil.example"}, {"client": ("192.0.2.1", 1)}):
        answer = ask("POST", "/mcp", **ping, **options)
        assert (answer.status_code, answer.json()["code"]) == (403, "not_local")


def test_limits_hold(serving, parts):
    busy = serving(limits=Limits(concurrent=0))("POST", "/mcp", json=PING, headers=ACCEPT)
    assert (busy.status_code, busy.json()["code"]) == (429, "busy")
    call = {"name": "ground", "arguments": {"slide": "slide001", "text": "never asked before"}}
    late = serving(limits=Limits(answer_s=0))(
        "POST", "/mcp", headers=ACCEPT,
        json={"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": call},
    )  # fmt: skip
    assert (late.status_code, late.json()["code"]) == (504, "deadline")


def test_every_call_is_audited_with_its_slides(agent, tmp_path):
    log = AuditLog(tmp_path)

    async def use(client):
        await result(client, "list_slides", limit=2)
        await result(client, "describe_slide", slide="slide003")
        await result(client, "search", slide="slide002", level="slide", k=2)
        await result(client, "classify", slides=["slide004", "slide001"], classes=CLASSES)
        await fault(client, "measure", slide="slide001", points=[[0, 0], [1e6, 0]])
        await fault(client, "describe_slide", slide="nothing-of-this-name")
        await fault(client, "search", text="a secret question", k=99)

    agent(use, audit=log, who="all")
    log.close()
    audit.verify(tmp_path)
    written = log.path.read_text()
    lines = [json.loads(line) for line in written.splitlines()[1:]]
    assert {(line["who"], line["from"], line["action"], line["outcome"]) for line in lines} == {
        ("all", "127.0.0.1", "POST /mcp", 200)
    }
    calls = [line for line in lines if "tool" in line]
    seen = [(line["tool"], line.get("slides"), line.get("error")) for line in calls]
    assert seen[0] == ("list_slides", ["slide000", "slide001"], None)
    assert seen[1] == ("describe_slide", ["slide003"], None)
    assert seen[2][0] == "search"
    assert len(seen[2][1]) == 2
    assert calls[2]["asked"] == "slide002"
    assert seen[3] == ("classify", ["slide004", "slide001"], None)
    assert seen[4] == ("measure", ["slide001"], "outside_slide")
    assert seen[5] == ("describe_slide", None, "unknown_slide")
    assert seen[6] == ("search", None, "invalid")
    assert len(calls) == 7
    assert "secret question" not in written
    assert "colonic" not in written


def test_nothing_is_shown_that_cannot_be_audited(serving, tmp_path):
    log = AuditLog(tmp_path)
    ask = serving(audit=log)
    # Nothing can be written to a file that is open for reading.
    full = os.open(log.path, os.O_RDONLY)
    os.dup2(full, log._file)
    call = {"name": "describe_slide", "arguments": {"slide": "slide001"}}
    body = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": call}
    answer = ask("POST", "/mcp", json=body, headers=ACCEPT)
    assert (answer.status_code, answer.json()["code"]) == (503, "audit")
    assert "slide001" not in answer.text
    os.close(full)


def test_requests_of_many_agents_do_not_mix(parts, world, loop):
    """Every request is alone: no session, and none of another's slides."""
    import asyncio

    app = make_app(parts, tokens=read_tokens(world.token_file))

    async def one(url, number):
        who = ("all", "reader")[number % 2]
        async with over_http(url, bearer(who), mode=MODES[number // 2 % 2]) as client:
            found = [
                await result(client, "describe_slide", slide=slide_id(n))
                for n in range(number % SLIDES, SLIDES)
            ]
            assert [row["slide_id"] for row in found] == [
                slide_id(n) for n in range(number % SLIDES, SLIDES)
            ]
            return len((await client.list_tools()).tools)

    async def main():
        async with listening(app) as url:
            return await asyncio.gather(*(one(url, number) for number in range(12)))

    assert loop.run_until_complete(main()) == [7, 4] * 6


def test_the_package_is_imported_when_an_agent_comes():
    code = "import sys, serve.ingress, serve.app; print({'mcp', 'mcp_types'} & {*sys.modules})"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "set()"
