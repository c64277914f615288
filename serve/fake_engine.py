"""Fake engine: scripted answers at a scripted pace, without a model.

It stands where vLLM does, so the whole service runs without vLLM: routes, prompts, streams,
limits, the audit log. In a configuration (``pathflip serve … -o engine.backend=fake``)::

    engine:
      backend: fake
      fake: {text: "There is necrosis.", token_s: 0.05}

In a test of one's own, an asynchronous generator says the tokens, and may wait or fail::

    async def script(prompt, sampling):
        yield "There "
        raise EngineDied

    engine = FakeEngine(script)
    chat = ChatEngine(archive, run, engine=engine)
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from serve.engine import EngineLoad, EngineOutput, Sampling

if TYPE_CHECKING:
    import torch

Script = Callable[["torch.Tensor", Sampling], AsyncGenerator[str, None]]
"""Says the tokens of an answer to prompt embeddings [T, D]."""
Scores = Callable[["torch.Tensor", Sequence[int]], Sequence[float]]
"""Gives the log-probabilities of tokens as the next one after prompt embeddings [T, D]."""

HOLD_LOOK_S = 0.02
"""Seconds between two looks whether the hold file is still there."""


@dataclass(frozen=True, kw_only=True)
class FakeEngineConfig:
    """Scripted answer of a fake engine.

    Args:
        text: The answer; a token is a word with the space behind it.
        repeat: Whether the text begins again when it ends, until ``max_tokens``.
        token_s: Seconds before each token.
        hold: A path: while a file is there, answers stop before the token of index ``hold_at``.
        hold_at: Tokens that are said whether or not the file is there.
    """

    text: str = "This answer is scripted: no language model was asked. "
    repeat: bool = False
    token_s: float = 0.0
    hold: str | None = None
    hold_at: int = 1


class EngineDied(RuntimeError):
    """Raised by a script to let its engine die: this answer and all others fail."""


class FakeEngine:
    """Deterministic engine without a model; see :class:`serve.engine.Engine`.

    Args:
        script: Says the tokens of each answer; by default the one of ``config``.
        config: The answer where no script is given.
        scores: Gives the log-probabilities of tokens after a prompt; by default the earlier of
            them are likelier.

    Attributes:
        errored: Whether a script let the engine die; other answers fail at their next token.
        aborted: Number of answers that were left before they ended.
    """

    def __init__(
        self,
        script: Script | None = None,
        *,
        config: FakeEngineConfig | None = None,
        scores: Scores | None = None,
    ) -> None:
        self._scores = scores or (lambda prompt, tokens: [-1.0 - at for at in range(len(tokens))])
        self._script = script or scripted(config or FakeEngineConfig())
        self._running = 0
        self.errored = False
        self.aborted = 0

    async def generate(
        self, prompt: torch.Tensor, sampling: Sampling, *, request_id: str
    ) -> AsyncGenerator[EngineOutput, None]:
        """Say the script's tokens, up to ``max_tokens`` or a stop string."""
        self._running += 1
        try:
            async with (
                aclosing(self._tokens(prompt, sampling)) as tokens,
                aclosing(_outputs(tokens, sampling)) as outputs,
            ):
                async for output in outputs:
                    yield output
        except (GeneratorExit, asyncio.CancelledError):
            self.aborted += 1
            raise
        finally:
            self._running -= 1

    async def _tokens(self, prompt: torch.Tensor, sampling: Sampling) -> AsyncGenerator[str, None]:
        await self.check_health()
        try:
            async with aclosing(self._script(prompt, sampling)) as tokens:
                async for token in tokens:
                    await self.check_health()
                    yield token
        except EngineDied:
            self.errored = True
            raise

    async def next_log_probs(
        self, prompt: torch.Tensor, tokens: Sequence[int], *, request_id: str
    ) -> dict[int, float]:
        """Return what ``scores`` gives."""
        await self.check_health()
        return dict(zip(tokens, self._scores(prompt, tokens), strict=True))

    def unfinished(self) -> int:
        """Number of answers being said."""
        return self._running

    def load(self) -> EngineLoad:
        """Return its load: nothing waits, and there are no keys and values."""
        return EngineLoad(running=self._running)

    async def check_health(self) -> None:
        """Raise if a script let the engine die."""
        if self.errored:
            raise EngineDied("the engine is dead")

    def shutdown(self) -> None:
        """Do nothing: there is no process to stop."""


def scripted(config: FakeEngineConfig) -> Script:
    """Make the script that a configuration describes."""
    words = [word for word in config.text.replace(" ", " \0").split("\0") if word]
    gate = _Gate(config.hold)

    async def say(prompt: torch.Tensor, sampling: Sampling) -> AsyncGenerator[str, None]:
        said = itertools.cycle(words) if config.repeat else iter(words)
        for number, word in enumerate(said):
            if number >= config.hold_at:
                await gate.opened()
            await asyncio.sleep(config.token_s)
            yield word

    return say


class _Gate:
    """Waits while a file is there; one look serves all who wait."""

    def __init__(self, path: str | None) -> None:
        self._path = None if path is None else Path(path)
        self._looking: asyncio.Task[None] | None = None

    async def opened(self) -> None:
        if self._path is None or not self._path.exists():
            return
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look(self._path))
        await asyncio.shield(self._looking)

    async def _look(self, path: Path) -> None:
        while path.exists():
            await asyncio.sleep(HOLD_LOOK_S)


async def _outputs(
    tokens: AsyncGenerator[str, None], sampling: Sampling
) -> AsyncGenerator[EngineOutput, None]:
    """Cut tokens as vLLM does: at ``max_tokens``, before a stop string, in parts or as a whole."""
    said, sent, count, counted, reason = "", 0, 0, 0, "stop"
    # What may be the beginning of a stop string is held back.
    held = max(map(len, sampling.stop), default=1) - 1
    async for token in tokens:
        said, count = said + token, count + 1
        ends = [at for stop in sampling.stop if (at := said.find(stop)) >= 0]
        if ends:
            said = said[: min(ends)]
            break
        if count >= sampling.max_tokens:
            reason = "length"
            break
        if sampling.stream and len(said) - held > sent:
            part, sent = said[sent : len(said) - held], len(said) - held
            yield EngineOutput(text=part, tokens=count - counted)
            counted = count
    yield EngineOutput(text=said[sent:], tokens=count - counted, finish_reason=reason)
