"""The chat engine: a slide and a conversation in, an answer out as it is decoded.

A replica of :class:`ChatEngine` is two processes. This one reads slides from the archive, turns
them and the conversation into prompt embeddings (slide model, projector, embedding table; no second
copy of the language model) and streams; the engine, vLLM in a child process, decodes all
conversations of the replica together.

Read in this order: :meth:`ChatEngine.chat`, then :class:`PromptReader`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncGenerator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pathflip import tracing
from pathflip.errors import ConfigError, PathFLIPError
from pathflip.vllm_engine import context_length, set_environment, uses_gpu
from serve.config import ChatConfig, find_model
from serve.engine import Engine, Sampling, VLLMEngine
from serve.fake_engine import FakeEngine

if TYPE_CHECKING:
    import torch

    from pathflip.archive import Archive
    from pathflip.checkpoints import Run
    from pathflip.choice_prompts import ScoredPrompt
    from pathflip.models.prompt_encoder import PromptEncoder
    from pathflip.slide_qa import ChoiceQuestion

logger = logging.getLogger("ray.serve")

REFRESH_S = 10.0
"""Seconds after which a slide that was withdrawn or made again is noticed at the latest."""
MAX_TOKENS = 512
"""Tokens of an answer where the request names no limit."""
FEW_STREAMS = 8
"""Streams at once that send a piece every ``flush_s``; of more, each sends less often."""
MAX_CHOICE_TOKENS = 512
"""Tokens of all options of a question, where a model chooses by their texts."""


class ChatEngine:
    """Answers questions about slides, streamed, on a CPU or a GPU.

    Serve calls :meth:`check_health` before it sends requests; without Serve, await it once.

    Args:
        archive: URI of the archive.
        run: A tuned run.
        llm: Its merged language model; None means ``run/llm``. Another tuned run answers instead of
            ``run``.
        config: Settings.
        engine: A running engine to use instead of the one that ``config`` names.

    Raises:
        CheckpointError: There is no tuned run, or the language model is another's.
        ConfigError: vLLM is not installed, or a setting is wrong.
        ArchiveError: There is no archive.
    """

    def __init__(
        self,
        archive: str,
        run: str,
        llm: str | None = None,
        config: ChatConfig | None = None,
        *,
        engine: Engine | None = None,
    ) -> None:
        began = time.perf_counter()
        self.config = config or ChatConfig()
        if engine is None and self.config.backend == "fake":
            engine = FakeEngine(config=self.config.fake)
        settings, device = self.config.engine, "cpu"
        if engine is None:
            set_environment(settings)
            device = "cuda" if uses_gpu(settings) else "cpu"
        model, llm_folder = find_model(run, llm)
        # One thread reads slides: of two requests for the same slide, the second finds it read.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="slides")
        size = self.config.prefix_cache_mb << 20
        reading = self._thread.submit(PromptReader, archive, model, llm_folder, device, size)
        self._limit = context_length(llm_folder, settings)
        self.engine = engine or VLLMEngine(llm_folder, settings)
        self._begun = 0
        self._name = uuid.uuid4().hex[:8]
        self._reader = reading.result()
        self._warm: asyncio.Task[None] | None = None
        logger.info("Engine started after %.1f s.", time.perf_counter() - began)

    async def _warm_up(self) -> None:
        """Decode one token about nothing, once greedily and once drawn.

        What an engine makes at the first request of each kind is made here, so that no client waits
        for it; an engine that cannot draw is no engine, and its replica does not start.
        """
        prompt = self._reader.without_slide("?")
        for temperature in (0.0, 1.0):
            sampling = self._sampling({"max_tokens": 1, "temperature": temperature}, len(prompt))
            name = f"warm-up-{temperature}"
            async for _ in self.engine.generate(prompt, sampling, request_id=name):
                pass

    async def describe(self) -> dict[str, Any]:
        """Describe the model: id, fingerprint, max_model_len, created (seconds since 1970).

        Raises:
            PathFLIPError: The engine is dead (``engine_dead``); readiness asks here.
        """
        if self.engine.errored:
            raise _engine_dead()
        about = self._reader.about | {"max_model_len": self._limit}
        if self.config.backend == "fake":  # nobody shall take its answers for the model's
            about["id"] = f"fake-{about['id']}"
        return about

    async def load(self) -> dict[str, int]:
        """Count answers begun since the start, unfinished ones, bytes of cached visual tokens."""
        return {
            "begun": self._begun,
            "running": self.engine.unfinished(),
            "prefix_bytes": self._reader.prefix_bytes,
        }

    async def engine_load(self) -> dict[str, Any]:
        """Return the load of the engine (:class:`serve.engine.EngineLoad`), and its ``name``."""
        return {"name": self._name} | asdict(self.engine.load())

    async def check_health(self) -> None:
        """Raise if the engine is dead: Serve then replaces the replica. The first call warms up."""
        if self._warm is None:
            self._warm = asyncio.create_task(self._warm_up())
        await asyncio.shield(self._warm)
        await self.engine.check_health()

    def __del__(self) -> None:
        if engine := getattr(self, "engine", None):
            engine.shutdown()

    async def chat(self, request: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """Answer a conversation; a caller that leaves ends the answer in the engine as well.

        Args:
            request: ``slide_id``, ``messages`` [{role, content}]; optional: ``region`` {x0, y0,
                size0} in level-0 px, ``max_tokens``, ``temperature`` (default 0), ``top_p``,
                ``stop``, ``seed``, and ``stream``: False yields the whole answer at once. With
                ``choices`` one of them is the answer to the one message, or, with ``abstain``, that
                the slide cannot tell: see :meth:`_choose`.

        Yields:
            ``{"text"}`` for each piece of it; last ``{"text", "finish_reason", "usage"}``, the text
            being what is left, with choices also ``"options"``: {choice, scores, abstain}.

        Raises:
            ArchiveError: No slide has this id, or it is not ready (``unknown_slide``).
            ConfigError: The prompt is too long (``prompt_too_long``), the region is outside tissue,
                or the conversation is not one.
            PathFLIPError: The engine died (``engine_dead``).
        """
        self._begun += 1
        loop = asyncio.get_running_loop()
        if request.get("choices"):
            yield await self._choose(request)
            return
        with tracing.span("prompt"):  # reads the slide and encodes it, where it is not kept
            prompt = await loop.run_in_executor(self._thread, self._reader.prompt, request)
        sampling = self._sampling(request, len(prompt))
        held, tokens, sent, reason = "", 0, -math.inf, None
        stream = tracing.stream(
            "engine", self.engine.generate(prompt, sampling, request_id=uuid.uuid4().hex)
        )
        with self._engine_errors():
            async with aclosing(stream):  # leaving it early aborts the request
                async for output in stream:
                    held, tokens = held + output.text, tokens + output.tokens
                    reason = output.finish_reason
                    if held and not reason and loop.time() - sent >= self._pause():
                        yield {"text": held}
                        held, sent = "", loop.time()
        yield {
            "text": held,
            "finish_reason": reason,
            "usage": {"prompt_tokens": len(prompt), "completion_tokens": tokens},
        }

    def _pause(self) -> float:
        """Seconds between two pieces of a stream; its first never waits."""
        return self.config.flush_s * max(1.0, self.engine.unfinished() / FEW_STREAMS)

    async def _choose(self, request: dict[str, Any]) -> dict[str, Any]:
        """Choose among options as ``pathflip ask`` does: the same probabilities, calibrated."""
        from pathflip.choice_prompts import scores_of
        from pathflip.slide_qa import chosen

        loop = asyncio.get_running_loop()
        with tracing.span("prompt"):
            asked, prompts = await loop.run_in_executor(self._thread, self._reader.choices, request)
        lengths = [len(one.prompt) for one in prompts]
        self._sampling(request, max(lengths))  # refuses a prompt that is too long
        with tracing.span("engine", prompts=len(prompts)):
            found = await self._score(prompts)
        scores = scores_of(self._reader.front, asked, list(zip(prompts, found, strict=True)))
        answer = chosen(request["slide_id"], asked.choices, scores)
        return {
            "text": answer.answer,
            "finish_reason": "stop",
            "usage": {"prompt_tokens": sum(lengths), "completion_tokens": len(prompts)},
            "options": {
                "choice": answer.choice, "scores": answer.scores, "abstain": answer.abstain,
            },
        }  # fmt: skip

    async def _score(self, prompts: Sequence[ScoredPrompt]) -> list[dict[int, float]]:
        """Return the log-probabilities of the tokens that each prompt asks about."""
        tasks = [
            asyncio.ensure_future(
                self.engine.next_log_probs(one.prompt, one.tokens, request_id=uuid.uuid4().hex)
            )
            for one in prompts
        ]
        try:
            with self._engine_errors():
                return await asyncio.gather(*tasks)
        finally:
            for task in tasks:  # one has failed: the others are for nobody
                task.cancel()

    @contextmanager
    def _engine_errors(self) -> Iterator[None]:
        """Map what the engine raises inside the block to an error of ours."""
        try:
            yield
        except ValueError as error:
            raise ConfigError(f"The engine refused the request: {error}") from error
        except Exception as error:
            if not self.engine.errored:
                raise
            raise _engine_dead() from error

    def _sampling(self, request: dict[str, Any], prompt_tokens: int) -> Sampling:
        """Sampling of a request whose answer must fit behind its prompt."""
        room = self._limit - prompt_tokens
        if room < 1:
            raise ConfigError(
                f"The prompt has {prompt_tokens:,} tokens, the slide's included; "
                f"{self._limit - 1:,} are possible.",
                hint="Ask about a region of the slide, or shorten the conversation.",
                code="prompt_too_long",
            )
        return Sampling(
            max_tokens=min(request.get("max_tokens") or MAX_TOKENS, room),
            temperature=request.get("temperature") or 0.0,
            top_p=request.get("top_p") or 1.0,
            stop=tuple(request.get("stop") or ()),
            stop_token_ids=tuple(self._reader.eos_ids),
            seed=request.get("seed"),
            stream=request.get("stream") is not False,
        )


class PromptReader:
    """Builds prompt embeddings from slides of an archive. Its methods run in one thread.

    Args:
        archive: URI of the archive.
        model: The folder ``model`` of a tuned run.
        llm: The merged language model.
        device: Device of the slide model.
        max_bytes: Memory for the visual tokens of slides asked about recently.
    """

    def __init__(self, archive: str, model: Path, llm: Path, device: str, max_bytes: int) -> None:
        from pathflip.archive.snapshot import ArchiveSnapshot
        from pathflip.checkpoints import load_run
        from pathflip.models.prompt_encoder import PromptEncoder

        self._snapshot = ArchiveSnapshot(archive, refresh_s=REFRESH_S, warm=self._look_up)
        front: PromptEncoder = PromptEncoder.from_pretrained(model, llm=llm)
        self.front = front.to(device)
        run = load_run(model.parent)
        self.run: Run = replace(run, model=front.vision)  # one copy of it
        self.eos_ids = front.eos_ids
        self.about = _about(self.run, model)
        self.prefix_bytes = 0
        self._max_bytes = max_bytes
        self._prefixes: OrderedDict[tuple[Any, ...], torch.Tensor] = OrderedDict()

    def _look_up(self, archive: Archive) -> None:
        """Find out for the last slides whether they are as before; runs in a thread of its own."""
        from pathflip.compat import check_fits
        from pathflip.evaluation.encoding_cache import RECENT

        encoder = check_fits(archive, self.run)
        for slide_id, *_ in list(self._prefixes)[-RECENT:]:
            archive.written(slide_id, encoder)

    def prompt(self, request: dict[str, Any]) -> torch.Tensor:
        """Prompt embeddings of a request [T, D]."""
        import torch

        with torch.no_grad():
            prefix = self._prefix(request["slide_id"], request.get("region"))
            return self.front.embed_prompt(prefix, request["messages"]).cpu()

    def choices(self, request: dict[str, Any]) -> tuple[ChoiceQuestion, list[ScoredPrompt]]:
        """The question of a request that has options, and the prompts that score them."""
        import torch

        from pathflip.choice_prompts import ScoredPrompt, scored_prompts
        from pathflip.slide_qa import ChoiceQuestion, check_question, mode_of, offers_abstention

        with torch.no_grad():
            asked = ChoiceQuestion(
                prefix=self._prefix(request["slide_id"], request.get("region")),
                question=request["messages"][-1]["content"],
                choices=tuple(request["choices"]),
                abstain=offers_abstention(self.front, request["choices"], request.get("abstain")),
            )
            check_question(asked.question, asked.choices)
            # Each token may be a prompt of its own, as long as the slide.
            tokens = sum(len(self.front.prompter.text_ids(text)) for text in asked.shown)
            if mode_of(self.front) == "option_ll" and tokens > MAX_CHOICE_TOKENS:
                raise ConfigError(
                    f"The options have {tokens:,} tokens; {MAX_CHOICE_TOKENS} are possible.",
                    hint="Shorten them, or ask again with fewer.",
                    code="question",
                )
            return asked, [
                ScoredPrompt(prompt=one.prompt.cpu(), tokens=one.tokens)
                for one in scored_prompts(self.front, asked)
            ]

    def without_slide(self, question: str) -> torch.Tensor:
        """Prompt embeddings of a question alone [T, D]."""
        import torch

        with torch.no_grad():
            nothing = self.front.projector.bias.new_zeros(0, self.front.width)
            return self.front.embed_prompt(nothing, question).cpu()

    def _prefix(self, slide_id: str, region: dict[str, int] | None) -> torch.Tensor:
        """Visual tokens of a slide or a region of it [P, D]."""
        from pathflip.archive.snapshot import ready_row
        from pathflip.compat import check_fits
        from pathflip.slide_qa import slide_input

        archive = self._snapshot.newest()
        ready_row(archive, slide_id)
        square = None if region is None else (region["x0"], region["y0"], region["size0"])
        written = archive.written(slide_id, check_fits(archive, self.run))
        key = slide_id, written, square
        if (known := self._prefixes.get(key)) is not None:
            self._prefixes.move_to_end(key)
            return known
        features, mask = slide_input(archive, self.run, slide_id, square)
        prefix = self.front.visual_prefix(features, mask)[0]
        self._prefixes[key] = prefix
        self.prefix_bytes += prefix.nbytes
        while self.prefix_bytes > self._max_bytes:
            self.prefix_bytes -= self._prefixes.popitem(last=False)[1].nbytes
        return prefix


def _engine_dead() -> PathFLIPError:
    return PathFLIPError(
        "The engine that answers has died.",
        hint="Ask again in half a minute; a replica is being started.",
        code="engine_dead",
    )


def _about(run: Run, model: Path) -> dict[str, Any]:
    """Public description of a model."""
    from pathflip.checkpoints import COMPLETE, model_name
    from pathflip.models.prompt_encoder import read_about

    fingerprint = read_about(model)["fingerprint"]
    return {
        "id": model_name(run.path.name, fingerprint),
        "fingerprint": fingerprint,
        "created": int((model / COMPLETE).stat().st_mtime),
    }
