"""Slides and questions through vLLM: engines in actors, and a tuned run with one of them.

:class:`BatchSlideQA` is what an actor of jobs/answer.py holds. The slide model and the projector
make prompt embeddings in the actor; the engine has the language model, adapter folded in, so there
is one copy of it. jobs/decompose.py needs only the engine.

Shapes: P visual tokens, D width of the language model, T length of a prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from jobs import cluster
from jobs.stages import map_actors
from pathflip.choice_prompts import ScoredPrompt, scored_prompts, scores_of
from pathflip.config import check_positive
from pathflip.errors import ArchiveError, ConfigError, PathFLIPError
from pathflip.slide_qa import (
    CAPTION_TOKENS,
    ChoiceQuestion,
    chosen,
    model_folder,
    offers_abstention,
    slide_input,
)
from pathflip.vllm_engine import EngineConfig, context_length, offline, uses_gpu

if TYPE_CHECKING:
    import torch

    from pathflip.archive import Archive

Item = dict[str, Any]
"""Request about a slide: {} for a caption, else {"question", "choices"}; also a line of output."""


@dataclass(frozen=True, kw_only=True)
class AnswerConfig:
    """Settings of captions and answers in batch.

    Raises:
        ConfigError: A number is out of its range.
    """

    engine: EngineConfig = field(default_factory=EngineConfig)
    actors: int | None = None
    """Engines; None means one per GPU, or one where there is none."""
    slides_at_once: int = 16
    """Slides an engine is given together; what is lost when a machine fails."""
    max_new_tokens: int = CAPTION_TOKENS
    permute: int = 1
    """Cyclic orders that options are shown in; probabilities are averaged."""
    abstain: bool | None = None
    """Permission to say that a slide cannot tell; None means as the model was tuned."""

    def __post_init__(self) -> None:
        check_positive(self, "actors", "slides_at_once", "max_new_tokens", "permute")


@dataclass
class _Request:
    """One prompt to the engine, and the request it belongs to."""

    slide: str
    item: Item
    prompt: torch.Tensor
    scored: ScoredPrompt | None = None
    """Tokens that are scored as the next one; None: an answer is written."""
    asked: ChoiceQuestion | None = None


def map_engines(
    rows: Sequence[dict[str, str]],
    actor: type,
    arguments: tuple[Any, ...],
    *,
    at_once: int,
    actors: int | None,
    engine: EngineConfig,
    address: str | None,
) -> Iterator[pa.Table]:
    """Give rows to actors that each hold a vLLM engine; see :func:`jobs.stages.map_actors`.

    Args:
        rows: Columns of text.
        actor: Class of the actors.
        arguments: Arguments of its constructor.
        at_once: Rows an actor is given together.
        actors: Number of actors; None means one per GPU, or one where there is none.
        engine: Settings of an engine.
        address: Engine or Ray cluster; see ``cluster.connect``.

    Raises:
        ConfigError: The engine's device is cuda and there is no GPU.
        PathFLIPError: The error an actor raised.
    """
    if not rows:
        return
    place = cluster.connect(address)
    there = cluster.available(engine.device, place=place)
    size = min(actors or max(there.gpus, 1), -(-len(rows) // at_once))
    yield from map_actors(
        rows,
        actor,
        arguments,
        at_once=at_once,
        place=place,
        workers=size,
        actors=size,
        num_cpus=float(engine.threads),
        num_gpus=1.0 if there.use_gpu else 0.0,
    )


def check_settings(folder: str | Path, engine: EngineConfig, *, address: str | None) -> None:
    """Refuse engine settings that cannot work, on the driver, before anything is started.

    A GPU is looked for here only where no cluster is named: a driver needs none.

    Raises:
        CheckpointError: There is no language model in the folder.
        ConfigError: A setting does not go with the model, or there is no GPU and one is asked for.
    """
    context_length(folder, engine)
    if cluster.is_here(address):
        uses_gpu(engine)


class BatchSlideQA:
    """A tuned run with its language model in a vLLM engine of this process.

    Args:
        run: Run of ``pathflip tune``.
        config: Settings.

    Raises:
        CheckpointError: The run has no tuned model.
        ConfigError: vLLM is not here, or the settings do not go with the model.
    """

    def __init__(self, run: str | Path, config: AnswerConfig) -> None:
        from pathflip.checkpoints import load_run

        self.run = load_run(run)
        self._config = config
        llm = self.run.path / "llm"
        folder = model_folder(self.run)
        self.engine = offline(llm, config.engine)
        from pathflip.models.prompt_encoder import PromptEncoder

        device = "cuda" if uses_gpu(config.engine) else "cpu"
        self.front = PromptEncoder.from_pretrained(folder, llm=llm).to(device)
        self.run = replace(self.run, model=self.front.vision)
        self._context = context_length(llm, config.engine)

    def lines(self, archive: Archive, asked: dict[str, list[Item]]) -> dict[str, list[Item]]:
        """Answer requests about slides, all prompts in the engine together.

        Args:
            archive: Archive with the slides' features.
            asked: {slide_id: its requests}.

        Returns:
            {slide_id: a line for each, in that order, without slide and model}.
        """
        answers: dict[tuple[Any, ...], Item] = {}
        waiting: list[_Request] = []
        for slide, items in asked.items():
            try:
                prefix = self.visual_prefix(archive, slide)
            except PathFLIPError as error:
                for item in items:
                    answers[key_of(slide, item)] = {**item, "error": error.as_json()}
                continue
            for item in items:
                requests = list(self._requests(slide, item, prefix))
                longest = max(len(request.prompt) for request in requests)
                if longest >= self._context:
                    too_long = ConfigError(
                        f"The prompt has {longest:,} tokens; the language model reads at most "
                        f"{self._context:,}.",
                        hint="Ask about a part of the slide, or a shorter question.",
                        code="prompt_too_long",
                    )
                    answers[key_of(slide, item)] = {**item, "error": too_long.as_json()}
                else:
                    waiting += requests
        self._run(waiting, answers)
        return {
            slide: [answers[key_of(slide, item)] for item in items]
            for slide, items in asked.items()
        }

    def visual_prefix(self, archive: Archive, slide: str) -> torch.Tensor:
        """Return a slide's visual tokens [P, D].

        Raises:
            ArchiveError: The slide's rows are damaged, or its features are not finite.
        """
        import torch

        features, mask = slide_input(archive, self.run, slide)
        with torch.no_grad():
            prefix = self.front.visual_prefix(features, mask)[0]
        if not torch.isfinite(prefix).all():
            raise ArchiveError(
                f"The model gives values that are not finite for slide {slide}: its features are "
                "damaged.",
                hint=f"Ingest it again: pathflip slides retry {slide} --archive {archive.uri}",
                code="not_finite",
            )
        return prefix

    def _requests(self, slide: str, item: Item, prefix: torch.Tensor) -> Iterator[_Request]:
        from pathflip.models.chat_template import CAPTION_INSTRUCTION

        if not item:
            prompt = self.front.embed_prompt(prefix, CAPTION_INSTRUCTION, kind="caption")
            yield _Request(slide, item, prompt)
            return
        choices = item["choices"]
        if not choices:
            yield _Request(slide, item, self.front.embed_prompt(prefix, item["question"]))
            return
        asked = ChoiceQuestion(
            prefix=prefix,
            question=item["question"],
            choices=tuple(choices),
            abstain=offers_abstention(self.front, choices, self._config.abstain),
        )
        for scored in scored_prompts(self.front, asked, permute=self._config.permute):
            yield _Request(slide, item, scored.prompt, scored, asked)

    def _run(self, waiting: Sequence[_Request], answers: dict[tuple[Any, ...], Item]) -> None:
        from vllm import SamplingParams

        params = [
            SamplingParams(
                temperature=0.0,
                max_tokens=min(self._config.max_new_tokens, self._context - len(request.prompt)),
                stop_token_ids=self.front.eos_ids,
            )
            if request.scored is None
            else SamplingParams(
                temperature=0.0, max_tokens=1, logprob_token_ids=list(request.scored.tokens)
            )
            for request in waiting
        ]
        prompts = [{"prompt_embeds": request.prompt.cpu()} for request in waiting]
        outputs = self.engine.generate(prompts, params, use_tqdm=False) if prompts else []
        found: dict[tuple[Any, ...], list[tuple[ScoredPrompt, dict[int, float]]]] = {}
        asked: dict[tuple[Any, ...], _Request] = {}
        for request, output in zip(waiting, outputs, strict=True):
            key = key_of(request.slide, request.item)
            first = output.outputs[0]
            if request.scored is not None:
                logs = {token: first.logprobs[0][token].logprob for token in request.scored.tokens}
                found.setdefault(key, []).append((request.scored, logs))
                asked[key] = request
            elif request.item:
                answers[key] = {
                    **request.item, "answer": first.text.strip(), "choice": None, "scores": {},
                    "abstain": None,
                }  # fmt: skip
            else:
                answers[key] = {"caption": first.text.strip()}
        for key, request in asked.items():
            assert request.asked is not None
            scores = scores_of(self.front, request.asked, found[key], permute=self._config.permute)
            answer = chosen(request.slide, request.asked.choices, scores)
            answers[key] = {
                **request.item, "answer": answer.answer, "choice": answer.choice,
                "scores": answer.scores, "abstain": answer.abstain,
            }  # fmt: skip


def key_of(slide: str, item: Item) -> tuple[Any, ...]:
    """Return the key of a request, or of its line: slide, question and options."""
    return (slide, item.get("question"), tuple(item.get("choices") or ()))
