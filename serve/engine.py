"""The interface between the chat engine and what decodes: vLLM, or a fake for tests.

:class:`VLLMEngine` is the real one; :class:`serve.fake_engine.FakeEngine` decodes nothing.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pathflip import tracing
from pathflip.vllm_engine import EngineConfig, engine_arguments, import_vllm

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Decoding settings of one answer.

    Attributes:
        max_tokens: Most tokens of the answer.
        temperature: 0 takes the likeliest token.
        top_p: Probability mass that tokens are drawn from.
        stop: Strings that end the answer and are not part of it.
        stop_token_ids: Tokens that end the answer.
        seed: Makes drawn tokens repeatable; None draws anew.
        stream: Whether outputs come as they are decoded, or one for the whole answer.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    stream: bool = True


@dataclass(frozen=True, kw_only=True)
class EngineOutput:
    """A further part of an answer.

    Attributes:
        text: Text since the last output.
        tokens: Number of tokens since the last output.
        finish_reason: ``stop`` or ``length`` in the last output of an answer, else None.
    """

    text: str
    tokens: int
    finish_reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class EngineLoad:
    """Load of an engine.

    Attributes:
        running: Answers that are being decoded.
        waiting: Answers that wait for room.
        kv_cache: Share of the memory for keys and values that is taken, 0 to 1.
    """

    running: int = 0
    waiting: int = 0
    kv_cache: float = 0.0


class Engine(Protocol):
    """Interface between the chat engine and what decodes its prompts."""

    @property
    def errored(self) -> bool:
        """Return whether the engine is dead and answers nothing more."""

    def generate(
        self, prompt: torch.Tensor, sampling: Sampling, *, request_id: str
    ) -> AsyncGenerator[EngineOutput, None]:
        """Decode an answer to prompt embeddings [T, D]; closing the generator aborts it.

        Raises:
            ValueError: The engine refuses the request.
            Exception: Anything else while ``errored`` means that the engine died.
        """

    async def next_log_probs(
        self, prompt: torch.Tensor, tokens: Sequence[int], *, request_id: str
    ) -> dict[int, float]:
        """Return the log-probabilities of tokens as the next one after prompt embeddings [T, D].

        Raises:
            ValueError, Exception: As of :meth:`generate`.
        """

    def unfinished(self) -> int:
        """Number of answers being decoded or waiting."""

    def load(self) -> EngineLoad:
        """Return its load, as of its last step."""

    async def check_health(self) -> None:
        """Raise if the engine is dead."""

    def shutdown(self) -> None:
        """Stop the engine and its processes."""


class VLLMEngine:
    """vLLM's asynchronous engine, in a child process.

    Call :func:`pathflip.vllm_engine.set_environment` first.

    Args:
        folder: The merged language model, ``OUT/llm`` of a tuned run.
        config: Settings.

    Raises:
        CheckpointError: There is no language model in the folder.
        ConfigError: vLLM is not installed, or a setting is wrong.
    """

    def __init__(self, folder: str | Path, config: EngineConfig) -> None:
        self._last = _LastStep()
        self._llm = start_vllm(engine_arguments(folder, config) | _traces(), steps=self._last)

    @property
    def errored(self) -> bool:
        """Return whether the engine is dead."""
        return bool(self._llm.errored)

    async def generate(
        self, prompt: torch.Tensor, sampling: Sampling, *, request_id: str
    ) -> AsyncGenerator[EngineOutput, None]:
        """Decode an answer; see :meth:`Engine.generate`."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        kind = RequestOutputKind.DELTA if sampling.stream else RequestOutputKind.FINAL_ONLY
        params = SamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            stop=list(sampling.stop) or None,
            seed=sampling.seed,
            stop_token_ids=list(sampling.stop_token_ids),
            output_kind=kind,
        )
        stream = self._llm.generate(
            {"prompt_embeds": prompt}, params, request_id, trace_headers=_trace_headers()
        )
        async with aclosing(stream):  # leaving it early aborts the request
            async for output in stream:
                part = output.outputs[0]
                yield EngineOutput(
                    text=part.text,
                    tokens=len(part.token_ids),
                    finish_reason=part.finish_reason if output.finished else None,
                )

    async def next_log_probs(
        self, prompt: torch.Tensor, tokens: Sequence[int], *, request_id: str
    ) -> dict[int, float]:
        """Score tokens as the next one; see :meth:`Engine.next_log_probs`."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            logprob_token_ids=list(tokens),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        found: dict[int, float] = {}
        stream = self._llm.generate(
            {"prompt_embeds": prompt}, params, request_id, trace_headers=_trace_headers()
        )
        async with aclosing(stream):
            async for output in stream:
                logs = output.outputs[0].logprobs[0]
                found = {token: float(logs[token].logprob) for token in tokens}
        return found

    def unfinished(self) -> int:
        """Number of answers being decoded or waiting."""
        return int(self._llm.get_num_unfinished_requests())

    def load(self) -> EngineLoad:
        """Return its load, as of its last step."""
        return self._last.load if self.unfinished() else EngineLoad()

    async def check_health(self) -> None:
        """Raise if the engine is dead."""
        await self._llm.check_health()

    def shutdown(self) -> None:
        """Stop the engine and its child process."""
        self._llm.shutdown()


def _traces() -> dict[str, Any]:
    """Return the arguments with which the engine sends spans of its own, where any are sent."""
    where = tracing.endpoint()
    if where is None:
        return {}
    tracing.check()  # names the service before vLLM looks for that
    os.environ[tracing.TRACES_PROTOCOL] = "http/protobuf"  # its default is another
    # Times of a request are statistics.
    return {"otlp_traces_endpoint": where, "disable_log_stats": False}


def _trace_headers() -> dict[str, str] | None:
    parent = tracing.traceparent()
    return None if parent is None else {"traceparent": parent}


class _LastStep:
    """Keeps the load that vLLM's scheduler tells of a step; stands where its loggers do."""

    def __init__(self) -> None:
        self.load = EngineLoad()

    def record(self, scheduler_stats: Any, *_: Any, **__: Any) -> None:
        """Keep what a step tells."""
        if scheduler_stats is not None:
            self.load = EngineLoad(
                running=scheduler_stats.num_running_reqs,
                waiting=scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs,
                kv_cache=float(scheduler_stats.kv_cache_usage),
            )

    def log(self, *_: Any) -> None:
        """Do nothing: a scrape asks."""

    log_engine_initialized = record_sleep_state = log


def start_vllm(arguments: dict[str, Any], *, steps: _LastStep | None = None) -> Any:
    """Start vLLM's asynchronous engine.

    Args:
        arguments: Result of :func:`pathflip.vllm_engine.engine_arguments`.
        steps: Takes what the engine tells of each step; None for nobody.

    Raises:
        ConfigError: vLLM is not installed (``no_vllm``).
    """
    import_vllm()
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    told: Any = None if steps is None else [lambda *_: steps]
    return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments), stat_loggers=told)
