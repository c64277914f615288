"""Lessons of a small language model: rows that show the sentences of reports as regions of slides.

A sentence is what the slide model makes of it, turned to where its words are, so that wordings of
one thing are nearly one vector, as they are in a slide; without a slide model it is the mean of its
words. To learn captioning from texts alone, in a space they share with images and with noise for
what sets the two apart, is CapDec's way (Nukrai et al. 2022).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from pathflip.models.chat_template import Example, Prompter, caption_example, question_example
from pathflip.models.data_init import distinct, rotation, words_of
from pathflip.models.small_step import Row
from pathflip.text import split_sentences

if TYPE_CHECKING:
    from pathflip.models.pathflip import PathFLIP


class Asked(Protocol):
    """A question about a text: see :class:`pathflip.interop.questions.Question`."""

    @property
    def question(self) -> str:
        """The question without its options."""
        ...

    @property
    def choices(self) -> Sequence[str]:
        """Its options; empty for an open question."""
        ...

    @property
    def answer(self) -> str:
        """The text of the right answer."""
        ...


_KEPT = 1 << 14
"""Examples whose tokens are kept, about 2 KB each. Mixed descriptions hardly ever come again."""
Turned = dict[str, torch.Tensor]
"""Sentences as vectors among those of words, each [D]."""


class Lessons:
    """Rows about each text, drawn anew in every epoch.

    Args:
        llm: The language model.
        prompter: Its prompts.
        texts: Reports, each of a sentence at least.
        asked: Questions about each.
        vision: Slide model whose vectors are to be read; None: any.
        turns, mixed, noise: See :class:`pathflip.models.small_llm.SmallLLMConfig`.
        longest: Maximum length of a row, in tokens.
    """

    def __init__(
        self,
        llm: Any,
        prompter: Prompter,
        *,
        texts: Sequence[str],
        asked: Sequence[Sequence[Asked]],
        vision: PathFLIP | None,
        turns: int,
        mixed: int,
        noise: float,
        longest: int,
    ) -> None:
        self._llm, self._prompter, self._asked = llm, prompter, asked
        self._turns, self._mixed, self._noise, self._longest = turns, mixed, noise, longest
        self._sentences = [split_sentences(text) for text in texts]
        self._every = sorted({sentence for own in self._sentences for sentence in own})
        self._kinds = distinct(self._every)
        self._seen = (
            None if vision is None else vision.encode_text(self._every, normalize=False).cpu()
        )
        self._turned: Turned = {}
        self._tokens = lru_cache(_KEPT)(self._tokenize)
        self._ids = cache(prompter.text_ids)
        self.begin()

    def begin(self) -> None:
        """Begin an epoch: take sentences for what their words are by now."""
        if self._seen is None:
            table = self._table()
            self._centre = words_of(table, self._prompter, self._kinds).mean(0).detach()
        else:
            self._turned, self._centre = turned_to_words(
                self._llm, self._prompter, self._every, self._seen
            )

    def rows(self, text: int, rng: np.random.Generator) -> list[Row]:
        """Draw the rows about a text, given by its number."""
        own = self._sentences[text]
        told = [(own, lesson(own, self._asked[text], self._turns, rng))]
        few = min(len(own), len(self._kinds))
        for _ in range(self._mixed):
            mixed = [self._kinds[j] for j in rng.choice(len(self._kinds), few, replace=False)]
            told.append((mixed, lesson(mixed, (), 0, rng)))
        rows = []
        for own, examples in told:
            regions = as_regions(self._said(own), self._centre, self._noise, rng)
            rows += [self._row(regions, example) for example in examples]
        return rows

    def _table(self) -> torch.Tensor:
        table: torch.Tensor = self._llm.get_input_embeddings().weight
        return table

    def _said(self, own: Sequence[str]) -> torch.Tensor:
        """Return sentence vectors [n, D]: rotated ones, or else the means of their words."""
        if self._turned:
            return torch.stack([self._turned[text] for text in own])
        ids = [self._ids(text) for text in own]
        starts = np.cumsum([0, *map(len, ids[:-1])])
        joint = torch.tensor([token for part in ids for token in part])
        return F.embedding_bag(joint, self._table(), torch.from_numpy(starts), mode="mean")

    def _tokenize(self, example: Example) -> tuple[list[int], list[int], list[int]]:
        before, after = self._prompter.prompt_ids(example.instruction, kind=example.kind)
        return before, after, self._prompter.answer_ids(example.answer)

    def _row(self, regions: torch.Tensor, example: Example) -> Row:
        """Return a row, regions and answer cut where it would be too long."""
        before, after, answer = self._tokens(example)
        room = self._longest - len(before) - len(after)
        regions = regions[: max(1, room - 1)]
        return Row(
            before=before,
            regions=regions,
            after=after,
            answer=answer[: max(1, room - len(regions))],
        )


def lesson(
    own: Sequence[str], asked: Sequence[Asked], most: int, rng: np.random.Generator
) -> list[Example]:
    """Return the training examples of a text: questions and descriptions, with answers."""
    turns = [
        question_example(asked[j].question, (), asked[j].answer)
        for j in rng.permutation(len(asked))[:most].tolist()
    ]
    return [*turns, caption_example("\n".join(own), "affirmed")]


@torch.no_grad()
def turned_to_words(
    llm: Any, prompter: Prompter, every: Sequence[str], seen: torch.Tensor
) -> tuple[Turned, torch.Tensor]:
    """Return the slide model's sentence vectors, rotated onto their words, and their centre.

    Args:
        llm: The language model as it is now.
        prompter: Its prompts.
        every: Sentences.
        seen: The slide model's vectors of them [n, d].
    """
    table = llm.get_input_embeddings().weight
    place = {text: at for at, text in enumerate(every)}
    kept = distinct(every)
    words = words_of(table, prompter, kept)
    texts = seen[[place[text] for text in kept]]
    turn, centre = rotation(texts, words)
    away = (seen - texts.mean(0)).double() @ turn
    scale = (words - centre).square().mean().sqrt() / away.square().mean().sqrt().clamp(min=1e-12)
    return dict(zip(every, (centre + scale * away).float(), strict=True)), centre.float()


def as_regions(
    said: torch.Tensor, centre: torch.Tensor, noise: float, rng: np.random.Generator
) -> torch.Tensor:
    """Place sentence vectors in regions as on a slide: some in several, some together.

    Args:
        said: Vectors of sentences [n, D].
        centre: Mean of such vectors [D]: the vector of a region that shows nothing.
        noise: Maximum noise, in standard deviations of the sentences.
        rng: Generator of the placement.

    Returns:
        Vectors of regions [R, D], R between n / 2 and 3 n / 2.
    """
    n = len(said)
    regions = int(rng.integers(max(1, n // 2), 1 + n + n // 2))
    there = rng.random((regions, n)) < rng.uniform(0, 0.3)
    there[rng.integers(regions, size=n), np.arange(n)] = True
    share = there / np.sqrt(there.sum(1, keepdims=True).clip(1))
    seen = torch.from_numpy(share.astype(np.float32)) @ (said - centre)
    drawn = torch.from_numpy(rng.standard_normal(tuple(seen.shape), np.float32))
    spread = rng.uniform(0, noise) * (said - centre).detach().square().mean().sqrt()
    return centre + seen + spread * drawn
