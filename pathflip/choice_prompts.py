"""Options scored by an engine that tells the log-probability of chosen tokens as the next one.

vLLM scores no prompt that is embedded, so the text of an option becomes a prompt for each of its
tokens. :func:`scored_prompts` builds what is asked of an engine about a question and
:func:`scores_of` makes probabilities of what it answers, the same as
:func:`pathflip.slide_qa.score_choices` of one's own process: batches and the service use both.

Shapes: T length of a prompt, D width of the language model, E entries of a question, R orders.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pathflip.slide_qa import (
    ChoiceQuestion,
    as_given,
    by_text,
    calibrated,
    in_order,
    mode_of,
    orders_of,
    softmax,
)
from pathflip.text import LETTERS

if TYPE_CHECKING:
    import torch

    from pathflip.models.prompt_encoder import PromptEncoder


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoredPrompt:
    """Prompt of which the next token is scored.

    Attributes:
        prompt: Prompt embeddings [T, D].
        tokens: Tokens whose log-probability as the next one is wanted.
    """

    prompt: torch.Tensor
    tokens: tuple[int, ...]


def scored_prompts(
    front: PromptEncoder, asked: ChoiceQuestion, *, permute: int = 1
) -> Iterator[ScoredPrompt]:
    """Yield the prompts of a question: an order of its options each, or a token of one each."""
    if mode_of(front) == "option_ll":
        before, after = front.prompt_ids(asked.question)
        for text in asked.shown:
            ids = front.prompter.text_ids(text)
            for at, token in enumerate(ids):
                prompt = front.embed_ids(asked.prefix, before, after + ids[:at])
                yield ScoredPrompt(prompt=prompt, tokens=(token,))
        return
    letters = tuple(front.prompter.text_ids(letter)[0] for letter in LETTERS)
    for order in orders_of(asked, permute):
        prompt = front.embed_prompt(asked.prefix, in_order(asked, order))
        yield ScoredPrompt(prompt=prompt, tokens=letters[: len(order)])


def scores_of(
    front: PromptEncoder,
    asked: ChoiceQuestion,
    found: Sequence[tuple[ScoredPrompt, Mapping[int, float]]],
    *,
    permute: int = 1,
) -> NDArray[np.float64]:
    """Return the probabilities of a question's entries [R, E], calibrated.

    Args:
        front: Prompt encoder of the model.
        asked: The question.
        found: Its prompts in their order, each with the log-probabilities of its tokens.
        permute: Number of orders, that of :func:`scored_prompts`.
    """
    mode = mode_of(front)
    if mode == "option_ll":
        values = iter(logs[prompt.tokens[0]] for prompt, logs in found)
        sums = []
        for text in asked.shown:
            own = [next(values) for _ in front.prompter.text_ids(text)]
            sums.append((sum(own), len(own)))
        return calibrated(by_text(sums), front, mode, abstain=asked.abstain)[None]
    rows = []
    for order, (prompt, logs) in zip(orders_of(asked, permute), found, strict=True):
        row = softmax(np.array([logs[token] for token in prompt.tokens]))
        row = calibrated(row, front, mode, abstain=asked.abstain)
        rows.append(as_given(row, order))
    return np.array(rows)
