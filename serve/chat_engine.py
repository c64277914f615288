"""The instruction engine: one slide and a conversation in, an answer out as it is written.

A replica of :class:`Instructor` is two processes. This one reads slides from the archive, turns
them and the conversation into prompt embeddings (vision model, projector, embedding table; no
second copy of the language model) and streams; vLLM's engine, its child, decodes all conversations
of the replica together.

Read in this order: :meth:`Instructor.chat`, then :class:`_Reader`.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import serve

from pathflip.config import load_config
from pathflip.errors import ArchiveError, CheckpointError, ConfigError, PathFLIPError
from pathflip.vllm_engine import (
    EngineConfig,
    engine_arguments,
    import_vllm,
    set_environment,
    uses_gpu,
)

if TYPE_CHECKING:
    import torch

    from pathflip.archive import Archive
    from pathflip.checkpoints import Run
    from pathflip.models.prompt_encoder import InstructFront

logger = logging.getLogger("ray.serve")

REFRESH_S = 10.0
"""Seconds after which a slide that was withdrawn or made again is noticed at the latest."""
MAX_TOKENS = 512
"""Tokens of an answer where the request names no limit."""


@dataclass(frozen=True, kw_only=True)
class InstructorConfig:
    """Settings of a replica."""

    engine: EngineConfig = field(default_factory=EngineConfig)
    prefix_cache_mb: int = 256
    """Memory for the visual tokens of slides asked about recently."""
    flush_s: float = 0.04
    """Shortest time between two pieces of a stream. Every piece passes three processes; more of
    them than an eye can follow take the CPU from decoding."""


@serve.deployment
class Instructor:
    """Answers about slides, streamed; on a CPU or a GPU, as its configuration says.

    Args:
        archive: Where slides and features are.
        run: A tuned run.
        llm: Its merged language model; None: ``run/llm``. Another tuned run answers instead of
            ``run``.
        config: Fields of :class:`InstructorConfig`.

    Raises:
        CheckpointError: There is no tuned run, or the language model is another's.
        ConfigError: vLLM is not installed, or a setting is wrong.
        ArchiveError: There is no archive.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, archive: str, run: str, llm: str | None = None, config: dict[str, Any] | None = None
    ) -> None:
        began = time.perf_counter()
        self.config = load_config(InstructorConfig, given=config or {})
        set_environment(self.config.engine)
        model, llm_folder = find_model(run, llm)
        # One thread reads slides: of two that ask for the same slide, the second finds it read.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="slides")
        device = "cuda" if uses_gpu(self.config.engine) else "cpu"
        size = self.config.prefix_cache_mb << 20
        reading = self._thread.submit(_Reader, archive, model, llm_folder, device, size)
        arguments = engine_arguments(llm_folder, self.config.engine)
        self.engine = start_engine(arguments)
        self._begun = 0
        self._limit = int(arguments["max_model_len"])
        self._reader = reading.result()
        await self._warm_up()
        logger.info("Engine ready after %.1f s.", time.perf_counter() - began)

    async def _warm_up(self) -> None:
        """One token about nothing, the likeliest and a drawn one, so that no client waits for it.

        What an engine makes at the first request of each kind is made here, and an engine that
        cannot draw is no engine: the replica does not start.
        """
        prompt = self._reader.without_slide("?")
        for temperature in (0.0, 1.0):
            params = self._sampling({"max_tokens": 1, "temperature": temperature}, len(prompt))
            name = f"warm-up-{temperature}"
            async for _ in self.engine.generate({"prompt_embeds": prompt}, params, name):
                pass

    async def describe(self) -> dict[str, Any]:
        """Returns id, fingerprint, max_model_len, created (seconds since 1970)."""
        return self._reader.about | {"max_model_len": self._limit}

    async def load(self) -> dict[str, int]:
        """Returns answers begun since the start, those the engine holds, bytes of visual tokens."""
        return {
            "begun": self._begun,
            "running": self.engine.get_num_unfinished_requests(),
            "prefix_bytes": self._reader.prefix_bytes,
        }

    async def check_health(self) -> None:
        """Raises if the engine is dead: Serve then replaces the replica."""
        await self.engine.check_health()

    def __del__(self) -> None:
        if engine := getattr(self, "engine", None):
            engine.shutdown()

    async def chat(self, request: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """Answer; a caller that goes away ends the answer in the engine as well.

        Args:
            request: ``slide_id``, ``messages`` [{role, content}]; optional: ``region`` {x0, y0,
                size0} in level-0 px, ``max_tokens``, ``temperature`` (default 0), ``top_p``,
                ``stop``, ``seed``, and ``stream``: False makes one piece of the whole answer.

        Yields:
            ``{"text"}`` for each piece, then ``{"text": "", "finish_reason", "usage"}``.

        Raises:
            ArchiveError: No slide has this id, or it is not ready (``unknown_slide``).
            ConfigError: The prompt is too long (``prompt_too_long``), the region is outside tissue,
                or the conversation is not one.
            PathFLIPError: The engine died (``engine_dead``).
        """
        self._begun += 1
        loop = asyncio.get_running_loop()
        prompt = await loop.run_in_executor(self._thread, self._reader.prompt, request)
        params = self._sampling(request, len(prompt))
        held, tokens, sent = "", 0, 0.0
        stream = self.engine.generate({"prompt_embeds": prompt}, params, uuid.uuid4().hex)
        try:
            async with aclosing(stream):  # leaving it early aborts the request
                async for output in stream:
                    piece = output.outputs[0]
                    held += piece.text
                    tokens += len(piece.token_ids)
                    now = loop.time()
                    if held and (output.finished or now - sent >= self.config.flush_s):
                        yield {"text": held}
                        held, sent = "", now
        except ValueError as error:
            raise ConfigError(f"The engine refused the request: {error}") from error
        except Exception as error:
            if not self.engine.errored:
                raise
            raise PathFLIPError(
                "The engine died while it answered.",
                hint="Ask again in half a minute; a replica is being started.",
                code="engine_dead",
            ) from error
        yield {
            "text": "",
            "finish_reason": piece.finish_reason,
            "usage": {"prompt_tokens": len(prompt), "completion_tokens": tokens},
        }

    def _sampling(self, request: dict[str, Any], prompt_tokens: int) -> Any:
        """VLLM's parameters of a request, whose answer must fit behind its prompt."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        room = self._limit - prompt_tokens
        if room < 1:
            raise ConfigError(
                f"The prompt has {prompt_tokens:,} tokens, the slide's included; "
                f"{self._limit - 1:,} are possible.",
                hint="Ask about a region of the slide, or shorten the conversation.",
                code="prompt_too_long",
            )
        whole = request.get("stream") is False
        return SamplingParams(
            max_tokens=min(request.get("max_tokens") or MAX_TOKENS, room),
            temperature=request.get("temperature") or 0.0,
            top_p=request.get("top_p") or 1.0,
            stop=request.get("stop") or None,
            seed=request.get("seed"),
            stop_token_ids=self._reader.eos_ids,
            output_kind=RequestOutputKind.FINAL_ONLY if whole else RequestOutputKind.DELTA,
        )


class _Reader:
    """Makes prompts. Its methods run in one thread.

    Args:
        archive: Where slides are.
        model: The folder ``model`` of a tuned run.
        llm: The merged language model.
        device: Where the vision model is.
        most_bytes: Of visual tokens kept.
    """

    def __init__(self, archive: str, model: Path, llm: Path, device: str, most_bytes: int) -> None:
        from pathflip.archive import Archive
        from pathflip.checkpoints import load_run
        from pathflip.models.prompt_encoder import InstructFront

        self.archive: Archive = Archive(archive)
        front: InstructFront = InstructFront.from_pretrained(model, llm=llm)
        self.front = front.to(device)
        run = load_run(model.parent)
        self.run: Run = replace(run, model=front.vision)  # one copy of it
        self.eos_ids = front.eos_ids
        self.about = _about(self.run, model)
        self.prefix_bytes = 0
        self._most_bytes = most_bytes
        self._prefixes: OrderedDict[tuple[Any, ...], torch.Tensor] = OrderedDict()
        self._looked = time.monotonic()

    def prompt(self, request: dict[str, Any]) -> torch.Tensor:
        """What the language model reads of a request [T, D]."""
        import torch

        with torch.no_grad():
            prefix = self._prefix(request["slide_id"], request.get("region"))
            return self.front.embed_prompt(prefix, request["messages"]).cpu()

    def without_slide(self, question: str) -> torch.Tensor:
        """A prompt about nothing [T, D]."""
        import torch

        with torch.no_grad():
            nothing = self.front.projector.bias.new_zeros(0, self.front.width)
            return self.front.embed_prompt(nothing, question).cpu()

    def _prefix(self, slide_id: str, region: dict[str, int] | None) -> torch.Tensor:
        """The visual tokens of a slide or a part of it [P, D]."""
        from pathflip.slide_qa import slide_input

        row = self._newest().ledger().get(slide_id)
        if row is None or row["status"] != "ready":  # by its id alone: file names may name people
            raise ArchiveError("There is no such slide.", code="unknown_slide")
        square = None if region is None else (region["x0"], region["y0"], region["size0"])
        key = slide_id, row["fingerprint"], square  # a slide made again has another fingerprint
        if (known := self._prefixes.get(key)) is not None:
            self._prefixes.move_to_end(key)
            return known
        features, mask = slide_input(self.archive, self.run, slide_id, square)
        prefix = self.front.see(features, mask)[0]
        self._prefixes[key] = prefix
        self.prefix_bytes += prefix.nbytes
        while self.prefix_bytes > self._most_bytes:
            self.prefix_bytes -= self._prefixes.popitem(last=False)[1].nbytes
        return prefix

    def _newest(self) -> Archive:
        """The archive, opened again where something was committed."""
        if time.monotonic() - self._looked > REFRESH_S:
            known = [self.archive.dataset(name) for name in self.archive.tables()]
            if any(table.version != table.latest_version for table in known):
                self.archive = type(self.archive)(self.archive.uri)
            self._looked = time.monotonic()
        return self.archive


def find_model(run: str | Path, llm: str | Path | None = None) -> tuple[Path, Path]:
    """The folder of the instruction model and that of its merged language model.

    Args:
        run: A run; a tuned one, unless ``llm`` is.
        llm: A tuned run, which then answers; or where the merged language model of ``run`` is.

    Raises:
        CheckpointError: Neither is a tuned run (``not_tuned``).
    """
    from pathflip.checkpoints import is_tuned

    run, other = Path(run).absolute(), None if llm is None else Path(llm).absolute()
    if other is not None and is_tuned(other):
        return other / "model", other / "llm"
    if is_tuned(run):
        return run / "model", other or run / "llm"
    raise CheckpointError(
        f"{run} has no language model: it was pretrained, not tuned.",
        hint="Tune it with pathflip tune and give that run, or name a tuned run by --llm.",
        code="not_tuned",
    )


def start_engine(arguments: dict[str, Any]) -> Any:
    """VLLM's asynchronous engine, in a child process.

    Args:
        arguments: Of :func:`pathflip.vllm_engine.engine_arguments`.

    Raises:
        ConfigError: vLLM is not installed.
    """
    import_vllm()
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))


def _about(run: Run, model: Path) -> dict[str, Any]:
    """What is told of a model to those who may ask."""
    from pathflip.checkpoints import COMPLETE, model_name
    from pathflip.models.prompt_encoder import read_about

    fingerprint = read_about(model)["fingerprint"]
    return {
        "id": model_name(run.path.name, fingerprint),
        "fingerprint": fingerprint,
        "created": int((model / COMPLETE).stat().st_mtime),
    }
