"""Instruction examples of a slide: its caption and questions, drawn by (seed, epoch, slide)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pathflip.models.chat_template import CaptionStyle, Example, caption_example, question_example
from pathflip.text import CANNOT_TELL, LETTERS, says_cannot_tell
from pathflip.training.dataset import rng_for


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Settings of the instruction examples drawn for a slide.

    Attributes:
        most: Maximum number of examples of a slide in an epoch.
        caption_share: Probability that a slide with questions shows its caption, too.
        drop_options_prob: Probability that a question with options is asked without them.
        caption_epochs: Number of epochs at the beginning in which captions alone are shown.
        captions: Style of caption targets, see
            :func:`pathflip.models.chat_template.caption_example`.
        letters: Whether options are answered by their letter.
        abstain_share: Probability that a question with options shows that the slide cannot tell as
            a further, last one; of those whose answer it is all do.
    """

    most: int
    caption_share: float
    drop_options_prob: float
    caption_epochs: int
    captions: CaptionStyle = "whole"
    letters: bool = True
    abstain_share: float = 0.0


def draw_examples(
    caption: str,
    questions: Sequence[Mapping[str, Any]],
    sampling: Examples,
    *,
    seed: int,
    epoch: int,
    slide_id: str,
) -> list[Example]:
    """Return the examples of a slide in an epoch: its caption, questions, or both.

    Questions are drawn without replacement. Options come in a random order, so that no letter is
    right more often than others. While captions alone are shown, a slide without one shows its
    questions.

    Args:
        caption: The slide's caption; empty where it has none.
        questions: {question, answer, choices?} each.
        sampling: Settings of the draw.
        seed: Seed of the draw.
        epoch: Epoch of the draw.
        slide_id: Slide of the draw.
    """
    rng = rng_for("examples", seed, epoch, slide_id)
    if caption and (epoch < sampling.caption_epochs or not questions):
        return [caption_example(caption, sampling.captions, rng)]
    shown = []
    if caption and rng.random() < sampling.caption_share:
        shown.append(caption_example(caption, sampling.captions, rng))
    for i in rng.permutation(len(questions))[: sampling.most - len(shown)].tolist():
        choices = list(questions[i].get("choices", ()))
        ordered = [choices[j] for j in rng.permutation(len(choices))]
        if rng.random() < sampling.drop_options_prob:
            ordered = []
        elif sampling.abstain_share:
            offered = rng.random() < sampling.abstain_share
            ordered = _with_abstaining(ordered, questions[i]["answer"], offered)
        shown.append(_asked(questions[i], ordered, sampling))
    return shown


def all_examples(
    caption: str, questions: Sequence[Mapping[str, Any]], sampling: Examples
) -> list[Example]:
    """Return the examples of a slide in validation: its caption and its first questions."""
    shown = [caption_example(caption, sampling.captions)] if caption else []
    for entry in questions[: sampling.most]:
        choices = list(entry.get("choices", ())) if sampling.drop_options_prob < 1 else []
        choices = _with_abstaining(choices, entry["answer"], bool(sampling.abstain_share))
        shown.append(_asked(entry, choices, sampling))
    return shown


def _asked(entry: Mapping[str, Any], choices: Sequence[str], sampling: Examples) -> Example:
    return question_example(entry["question"], choices, entry["answer"], letter=sampling.letters)


def _with_abstaining(choices: list[str], answer: str, offered: bool) -> list[str]:
    """Return options with ``CANNOT_TELL`` behind them, where it is offered or the answer."""
    if not choices or len(choices) == len(LETTERS) or any(map(says_cannot_tell, choices)):
        return choices
    return [*choices, CANNOT_TELL] if offered or answer == CANNOT_TELL else choices
