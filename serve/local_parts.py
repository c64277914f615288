"""The parts of a service in this process, without Ray: for one agent over stdio.

A part that holds a model is made when it is first asked (:class:`Later`), so that an agent is
greeted at once and pays for no model it does not ask. Answers come from
:class:`pathflip.slide_qa.SlideQA`, as those of ``pathflip ask``.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pathflip.errors import ConfigError
from serve.app import redactions
from serve.config import ServeConfig, check_inputs
from serve.limits import Limits
from serve.reader_pool import ReadingConfig
from serve.routing import Parts

if TYPE_CHECKING:
    from pathflip.checkpoints import Run
    from pathflip.slide_qa import SlideQA


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """Settings of the tools for one agent.

    Args:
        archive: URI of the archive.
        run: Run whose model searches, grounds and classifies; None for none.
        llm: Tuned run that answers questions, or the present place of the base model of ``run``.
        device: ``cpu``, ``cuda`` or ``auto``.
        refresh_s: Seconds after which a commit to the archive is noticed at the latest.
        patients: Whether an agent may filter by patient and see patients' ids.
        labels: Whether an agent may filter by labels of slides.
        limits: Limits of an answer.
        reading: Readers of slides.
    """

    archive: str
    run: str | None = None
    llm: str | None = None
    device: str = "auto"
    refresh_s: float = 30.0
    patients: bool = False
    labels: bool = True
    limits: Limits = field(default_factory=Limits)
    # One agent looks at one place after the other.
    reading: ReadingConfig = field(default_factory=lambda: ReadingConfig(readers=1, cache_mb=32))


def local_parts(config: AgentConfig) -> Parts:
    """Open the parts that the settings name.

    Raises:
        PathFLIPError: See :func:`serve.config.check_inputs`.
        ConfigError: A language model is named, and no run.
    """
    from pathflip.archive import Archive
    from pathflip.archive.storage import normalise
    from serve.search import Search
    from serve.tiles import Tiles

    seen: dict[str, Any] = {
        "refresh_s": config.refresh_s,
        "patients": config.patients,
        "labels": config.labels,
    }
    archive = Archive(normalise(config.archive)).uri
    tiles = Tiles(archive, config=config.reading, refresh_s=config.refresh_s)
    if config.run is None:
        if config.llm is not None:
            raise ConfigError("A language model needs a run.", hint="Give --run, too.")
        return Parts(
            search=Search(archive, **seen),
            tiles=tiles,
            redactions=dict.fromkeys((archive, config.archive), "the archive"),
        )
    settings = ServeConfig(
        archive=config.archive, run=config.run, llm=config.llm, device=config.device, **seen
    )
    inputs = check_inputs(settings)
    answers = None
    if inputs.chat:
        answers = LocalAnswers(
            archive, inputs.run, llm=inputs.llm, device=config.device, refresh_s=config.refresh_s
        )
    return Parts(
        search=Search(archive, model=inputs.model, fingerprint=inputs.fingerprint, **seen),
        instructor=answers,
        tiles=tiles,
        redactions=redactions(settings, inputs),
        **model_parts(archive, inputs.run, device=config.device, refresh_s=config.refresh_s),
    )


def model_parts(
    archive: str, run: str, *, device: str, refresh_s: float = 30.0
) -> dict[str, Later]:
    """Make the parts that hold a run's model, which is loaded once, when one is first asked.

    Args:
        archive: URI of the archive.
        run: Folder of the run.
        device: ``cpu``, ``cuda`` or ``auto``.
        refresh_s: Seconds until new commits are looked for.

    Returns:
        ``embedder`` and ``grounding`` of :class:`serve.routing.Parts`.
    """

    @cache
    def loaded() -> Run:
        from pathflip.checkpoints import load_run

        return load_run(run, device=device)

    def embedder() -> Any:
        from serve.embedder import Embedder

        return Embedder(archive, loaded(), device=device, computing=computing)

    def grounding() -> Any:
        from serve.grounding import Grounding

        return Grounding(archive, loaded(), device=device, refresh_s=refresh_s, computing=computing)

    turn, computing = asyncio.Lock(), threading.Lock()
    return {"embedder": Later(embedder, turn), "grounding": Later(grounding, turn)}


class Later:
    """A part that is made in a thread when one of its methods is first called.

    Args:
        make: Makes the part.
        turn: Held meanwhile: two that load models at once only wait for each other's imports.
    """

    def __init__(self, make: Callable[[], Any], turn: asyncio.Lock) -> None:
        self._make, self._turn = make, turn
        self._part: Any = None

    def __getattr__(self, method: str) -> Any:
        if method.startswith("_"):
            raise AttributeError(method)

        async def call(*args: Any, **kwargs: Any) -> Any:
            async with self._turn:
                if self._part is None:
                    self._part = await asyncio.to_thread(self._make)
            return await getattr(self._part, method)(*args, **kwargs)

        return call


class LocalAnswers:
    """Answers about slides by a tuned run in this process, one at a time.

    Its methods are those of :class:`serve.chat_engine.ChatEngine` that tools ask.

    Args:
        archive: URI of the archive.
        run: A tuned run, unless ``llm`` is.
        llm: A tuned run, which then answers; or where the base language model of ``run`` is.
        device: ``cpu``, ``cuda`` or ``auto``.
        refresh_s: Seconds until new commits are looked for.
    """

    def __init__(
        self, archive: str, run: str, *, llm: str | None, device: str, refresh_s: float
    ) -> None:
        from pathflip.archive.snapshot import ArchiveSnapshot
        from pathflip.checkpoints import is_tuned

        tuned = llm is not None and is_tuned(llm)
        self._run = Path(llm if tuned and llm is not None else run)
        self._llm, self._device = None if tuned else llm, device
        self._snapshot = ArchiveSnapshot(archive, refresh_s=refresh_s)
        self._turn = asyncio.Lock()
        self._qa: SlideQA | None = None

    async def describe(self) -> dict[str, Any]:
        """``id`` and ``fingerprint`` of the model."""
        from pathflip.checkpoints import model_name
        from pathflip.models.prompt_encoder import read_about

        fingerprint = read_about(self._run / "model")["fingerprint"]
        return {"id": model_name(self._run.name, fingerprint), "fingerprint": fingerprint}

    async def chat(self, request: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """Answer the one message of a request whole; see :meth:`ChatEngine.chat`.

        Yields:
            ``{"text", "finish_reason"}``, with choices also ``"options"``.
        """
        async with self._turn:
            answer = await asyncio.to_thread(self._answer, request)
        yield answer

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        from pathflip.archive.snapshot import ready_row
        from pathflip.slide_qa import SlideQA

        archive = self._snapshot.newest()
        ready_row(archive, request["slide_id"])
        if self._qa is None:
            from pathflip.encoders.neural import pick_device

            device = str(pick_device(self._device))
            self._qa = SlideQA.from_run(self._run, llm=self._llm, device=device)
        region = request["region"]
        answer = self._qa.ask(
            archive,
            request["slide_id"],
            request["messages"][-1]["content"],
            request["choices"] or (),
            abstain=request["abstain"],
            region=None if region is None else (region["x0"], region["y0"], region["size0"]),
            max_new_tokens=request["max_tokens"],
        )
        told: dict[str, Any] = {"text": answer.answer, "finish_reason": "stop"}
        if request["choices"]:
            options = {name: asdict(answer)[name] for name in ("choice", "scores", "abstain")}
            told["options"] = options
        return told
