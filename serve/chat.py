"""OpenAI's chat API: requests rebuilt from an allow-list, answers as chunks of a stream."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from pathflip.errors import PathFLIPError
from serve.limits import Limits
from serve.metrics import Metrics
from serve.schemas import ChatRequest


def to_engine_request(request: ChatRequest, limits: Limits) -> dict[str, Any]:
    """Rebuild a client's request for the chat engine: these fields and no other."""
    wanted = request.max_completion_tokens or request.max_tokens or limits.max_tokens
    stop = [request.stop] if isinstance(request.stop, str) else list(request.stop or ())
    return {
        "slide_id": request.slide_id,
        "region": None if request.region is None else request.region.model_dump(),
        "messages": [
            {"role": "system" if m.role == "developer" else m.role, "content": m.text()}
            for m in request.messages
        ],
        "max_tokens": min(wanted, limits.max_tokens),
        "temperature": request.temperature,
        "top_p": request.top_p,
        "stop": stop,
        "seed": request.seed,
        "stream": bool(request.stream),
        "choices": request.choices,
        "abstain": request.abstain,
    }


@dataclass(frozen=True, kw_only=True)
class ChatChunks:
    """Renders an answer in OpenAI's shapes, whole or in chunks.

    Attributes:
        id: Id of the answer, the same in every chunk.
        model: Id of the model.
        created: Seconds since 1970.
    """

    id: str
    model: str
    created: int

    def whole(self, text: str, last: Mapping[str, Any]) -> dict[str, Any]:
        """The answer as one document."""
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": last["finish_reason"]}
        body = self._body("chat.completion", [choice | {"logprobs": None}], last["usage"])
        return body | ({"options": last["options"]} if "options" in last else {})

    def chunk(self, delta: Mapping[str, str], finish: str | None = None) -> str:
        """A chunk of the answer as a server-sent event."""
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return _event(self._body("chat.completion.chunk", [choice]))

    def usage(self, usage: Mapping[str, int]) -> str:
        """The token counts as a server-sent event."""
        return _event(self._body("chat.completion.chunk", [], usage))

    def _body(
        self, kind: str, choices: list[Any], usage: Mapping[str, int] | None = None
    ) -> dict[str, Any]:
        body: dict[str, Any] = {"id": self.id, "object": kind, "created": self.created}
        body |= {"model": self.model, "choices": choices}
        if usage is not None:
            body["usage"] = _total(usage)
        return body


def _event(body: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def _total(usage: Mapping[str, int]) -> dict[str, int]:
    total = usage["prompt_tokens"] + usage["completion_tokens"]
    return {**usage, "total_tokens": total}


def count_tokens(metrics: Metrics, usage: Mapping[str, int]) -> None:
    """Add the tokens of an answer to the metrics."""
    metrics.tokens.labels("prompt").inc(usage["prompt_tokens"])
    metrics.tokens.labels("completion").inc(usage["completion_tokens"])


async def events(
    chunks: ChatChunks,
    first: Mapping[str, Any],
    stream: AsyncIterator[Mapping[str, Any]],
    *,
    usage: bool,
    metrics: Metrics,
    public: Callable[[str], str],
) -> AsyncIterator[str]:
    """Stream an answer as server-sent events; the engine stops when the client is gone.

    Args:
        chunks: Renders the chunks.
        first: The first item of the engine's stream, already taken.
        stream: The rest of it.
        usage: Whether to end with the token counts.
        metrics: Counts the tokens.
        public: Removes the paths of this server from a message.
    """
    # What is there together goes together: each piece sent is a message to the proxy and a packet.
    item, ready = first, chunks.chunk({"role": "assistant", "content": ""})
    async with aclosing(stream):  # type: ignore[type-var]
        try:
            while "finish_reason" not in item:
                yield ready + chunks.chunk({"content": item["text"]})
                ready = ""
                item = await anext(stream)
        except PathFLIPError as error:
            yield _event({"error": {"message": public(error.message), "code": error.code}})
            return
        if item["text"]:
            ready += chunks.chunk({"content": item["text"]})
        ready += chunks.chunk({}, item["finish_reason"])
        count_tokens(metrics, item["usage"])
        if usage:
            ready += chunks.usage(item["usage"])
        yield ready + "data: [DONE]\n\n"
