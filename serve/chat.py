"""Chat as OpenAI has it: the engine's request from an allow-list, its pieces as chunks."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from pathflip.errors import PathFLIPError
from serve.limits import Limits
from serve.middleware import Metrics
from serve.schemas import ChatRequest


def rebuilt(asked: ChatRequest, limits: Limits) -> dict[str, Any]:
    """The request as the engine gets it: these fields and no other."""
    wanted = asked.max_completion_tokens or asked.max_tokens or limits.max_tokens
    stop = [asked.stop] if isinstance(asked.stop, str) else list(asked.stop or ())
    return {
        "slide_id": asked.slide_id,
        "region": None if asked.region is None else asked.region.model_dump(),
        "messages": [{"role": m.role, "content": m.text()} for m in asked.messages],
        "max_tokens": min(wanted, limits.max_tokens),
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "stop": stop,
        "seed": asked.seed,
        "stream": asked.stream,
    }


@dataclass(frozen=True, kw_only=True)
class Told:
    """What all chunks of an answer have in common: ``id``, ``model`` and time."""

    id: str
    model: str
    created: int

    def whole(self, text: str, last: Mapping[str, Any]) -> dict[str, Any]:
        """The answer at once."""
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": last["finish_reason"]}
        return self._body("chat.completion", [choice | {"logprobs": None}], last["usage"])

    def chunk(self, delta: Mapping[str, str], finish: str | None = None) -> str:
        """A piece of it as an event."""
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return _event(self._body("chat.completion.chunk", [choice]))

    def usage(self, usage: Mapping[str, int]) -> str:
        """Its tokens as an event."""
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
    """Adds the tokens of an answer to the metrics."""
    metrics.tokens.labels("prompt").inc(usage["prompt_tokens"])
    metrics.tokens.labels("completion").inc(usage["completion_tokens"])


async def events(
    told: Told,
    first: Mapping[str, Any],
    stream: AsyncIterator[Mapping[str, Any]],
    *,
    usage: bool,
    metrics: Metrics,
    public: Callable[[str], str],
) -> AsyncIterator[str]:
    """The chunks of an answer; the engine stops when the client is gone.

    Args:
        told: What they have in common.
        first: The first piece of the stream, already taken.
        stream: The rest.
        usage: Whether a chunk with the tokens is wanted at the end.
        metrics: Where they are counted.
        public: Takes the paths of this server out of a message.
    """
    piece = first
    async with aclosing(stream):  # type: ignore[type-var]
        yield told.chunk({"role": "assistant", "content": ""})
        try:
            while "finish_reason" not in piece:
                yield told.chunk({"content": piece["text"]})
                piece = await anext(stream)
        except PathFLIPError as error:
            yield _event({"error": {"message": public(error.message), "code": error.code}})
            return
        if piece["text"]:
            yield told.chunk({"content": piece["text"]})
        yield told.chunk({}, piece["finish_reason"])
        count_tokens(metrics, piece["usage"])
        if usage:
            yield told.usage(piece["usage"])
        yield "data: [DONE]\n\n"
