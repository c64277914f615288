"""Server-sent events of a chat: every word in its order, as few messages as there can be."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from pathflip.errors import PathFLIPError
from serve.chat import ChatChunks, events
from serve.middleware import Metrics

USAGE = {"prompt_tokens": 3, "completion_tokens": 2}
LAST: dict[str, Any] = {"text": "glands.", "finish_reason": "stop", "usage": USAGE}


def sent(items: list[Any], *, usage: bool = False) -> list[str]:
    """Body messages of an answer that the engine gives in these items; an error is raised."""

    async def stream() -> AsyncIterator[Any]:
        for item in items[1:]:
            if isinstance(item, Exception):
                raise item
            yield item

    async def main() -> list[str]:
        chunks = ChatChunks(id="chatcmpl-1", model="m", created=7)
        body = events(
            chunks, items[0], stream(), usage=usage, metrics=Metrics(),
            public=lambda text: text.replace("/data", "…"),
        )  # fmt: skip
        return [message async for message in body]

    return asyncio.run(main())


def told(messages: list[str]) -> list[Any]:
    """Documents of the events; each ends with an empty line, as the format wants."""
    whole = "".join(messages)
    assert whole.endswith("\n\n")
    lines = [line for line in whole.split("\n\n") if line]
    assert all(line.startswith("data: ") and "\n" not in line for line in lines)
    return [json.loads(line[6:]) if line != "data: [DONE]" else None for line in lines]


@pytest.mark.parametrize("usage", [False, True])
@pytest.mark.parametrize("pieces", [[], ["There are "], ["There ", "are\n\n", "ünd "]])
def test_every_piece_in_its_order(pieces: list[str], usage: bool) -> None:
    messages = sent([*({"text": piece} for piece in pieces), LAST], usage=usage)
    found = told(messages)
    assert found[-1] is None
    deltas = [one["choices"][0]["delta"] for one in found[:-1] if one["choices"]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert [delta["content"] for delta in deltas[1:-1]] == [*pieces, "glands."]
    assert deltas[-1] == {}
    reasons = [one["choices"][0]["finish_reason"] for one in found[:-1] if one["choices"]]
    assert reasons == [None] * (len(deltas) - 1) + ["stop"]
    assert [one["usage"]["total_tokens"] for one in found[:-1] if not one["choices"]] == [5] * usage
    # A message for each piece of the engine: the role goes with the first, the end with the last.
    assert len(messages) == len(pieces) + 1


def test_an_error_in_the_middle_ends_the_answer_without_its_end_mark() -> None:
    messages = sent([{"text": "There "}, PathFLIPError("/data is gone.", code="engine_dead")])
    *_, error = told(messages)
    assert error == {"error": {"message": "… is gone.", "code": "engine_dead"}}
