"""Captions of slides and answers to questions about them, one slide at a time, in this process.

:class:`SlideQA` holds a tuned run's slide model, projector and language model. It needs neither Ray
nor vLLM: notebooks, ``pathflip caption`` and ``pathflip ask`` use it. Batches of slides go through
jobs/answer.py, requests of users through serve/. All of them read a slide with :func:`slide_input`
and show the options of a question in the orders of :func:`rotations`.

A model that was tuned on questions which a slide cannot answer abstains where that is likeliest:
its answer is ``CANNOT_TELL`` then, and no option is chosen (:func:`offers_abstention`).

Shapes: N regions, M patch slots, d_in feature width, P visual tokens, D width of the language
model, C options of a question, E entries (C, and one more where abstaining is possible), R orders
they are shown in.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from pathflip.calibration import biased, tempered
from pathflip.compat import check_fits
from pathflip.errors import CheckpointError, ConfigError
from pathflip.models.chat_template import CAPTION_INSTRUCTION, multiple_choice
from pathflip.text import CANNOT_TELL, LETTERS, says_cannot_tell

if TYPE_CHECKING:
    import torch

    from pathflip.archive import Archive
    from pathflip.checkpoints import Run
    from pathflip.models.instruct import PathFLIPInstruct
    from pathflip.models.prompt_encoder import PromptEncoder

Mode = Literal["letter_logit", "option_ll", "generate"]
MODES: tuple[Mode, ...] = ("letter_logit", "option_ll", "generate")
"""Way an option is chosen: by the probability of its letter as the next token; by the mean
probability of a token of its text as the answer to the bare question; or by reading what the model
writes."""
Region = tuple[int, int, int]
"""Square of a slide: x0, y0 and side, level-0 px."""
CAPTION_TOKENS = 512
CHOICE_TOKENS = 64
"""Most tokens of a choice that is written: a letter, or an option's text."""
PROMPTS_AT_ONCE = 32
_LETTER = re.compile(r"\s*\(?([A-H])\b")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Answer of a model to a question about a slide.

    Attributes:
        slide_id: Id of the slide.
        answer: The answer; of a question with options the text of the chosen one, or
            ``CANNOT_TELL``.
        choice: Letter of the chosen option; None for an open question, and where the model named
            no option or abstains.
        scores: {letter: probability of the option}; empty for an open question.
        abstain: Probability that the slide cannot tell, which adds up to 1 with ``scores``; None
            where the model was not offered to abstain.
    """

    slide_id: str
    answer: str
    choice: str | None = None
    scores: dict[str, float] = field(default_factory=dict)
    abstain: float | None = None


@dataclass(frozen=True, kw_only=True)
class ChoiceQuestion:
    """Question with options about a slide.

    Attributes:
        prefix: Visual tokens of the slide [P, D].
        question: The question, without its options.
        choices: The options.
        abstain: Whether the model may say that the slide cannot tell; see
            :func:`offers_abstention`.
    """

    prefix: torch.Tensor
    question: str
    choices: tuple[str, ...]
    abstain: bool = False

    @property
    def shown(self) -> tuple[str, ...]:
        """The options and, where the model may abstain, that [E]."""
        return (*self.choices, CANNOT_TELL) if self.abstain else self.choices


class SlideQA:
    """Captions slides and answers questions about them with a tuned run.

    Args:
        run: The run: slide model, encoder and tiling.
        model: Slide model, projector and language model, in evaluation mode.
    """

    def __init__(self, run: Run, model: PathFLIPInstruct) -> None:
        self.run = run
        self.model = model

    @classmethod
    def from_run(
        cls, run: str | Path, *, llm: str | Path | None = None, device: str = "cpu"
    ) -> SlideQA:
        """Open a run of ``pathflip tune``.

        Args:
            run: Folder of the run.
            llm: Folder of the base language model, if it is no longer where it was tuned.
            device: Device of the model.

        Raises:
            CheckpointError: The run is missing, unfinished, damaged or not a tuned one
                (``not_tuned``), or the language model is not the one that was tuned.
        """
        from pathflip.checkpoints import load_run
        from pathflip.models.instruct import PathFLIPInstruct

        loaded = load_run(run)
        model = PathFLIPInstruct.from_pretrained(model_folder(loaded), llm=llm, device=device)
        # The run's slide model is the tuned one: keep a single copy.
        return cls(replace(loaded, model=model.vision), model.eval())

    def visual_prefix(
        self, archive: Archive, slide_id: str, region: Region | None = None
    ) -> tuple[str, torch.Tensor]:
        """Return the slide's id and its visual tokens [P, D]; see :func:`slide_input`."""
        import torch

        slide = archive.resolve(slide_id)
        features, mask = slide_input(archive, self.run, slide, region)
        device = self.run.model.device
        with torch.no_grad():
            return slide, self.model.visual_prefix(features.to(device), mask.to(device))[0]

    def caption(
        self,
        archive: Archive,
        slide_id: str,
        region: Region | None = None,
        *,
        max_new_tokens: int = CAPTION_TOKENS,
    ) -> str:
        """Describe a slide, or a part of it, greedily.

        Args:
            archive: Archive with the slide's features.
            slide_id: A slide id or unique file name.
            region: Only the regions that overlap this square.
            max_new_tokens: Most tokens of the caption.

        Raises:
            ArchiveError: The slide is unknown, not ready, or its rows are damaged.
            ConfigError: The run does not fit the archive, or there is no tissue in the region.
        """
        _, prefix = self.visual_prefix(archive, slide_id, region)
        prompt = self.model.embed_prompt(prefix, CAPTION_INSTRUCTION, kind="caption")
        return self.model.generate([prompt], max_new_tokens=max_new_tokens)[0]

    def ask(
        self,
        archive: Archive,
        slide_id: str,
        question: str,
        choices: Sequence[str] = (),
        *,
        mode: Mode | None = None,
        permute: int = 1,
        abstain: bool | None = None,
        region: Region | None = None,
        max_new_tokens: int = CAPTION_TOKENS,
    ) -> Answer:
        """Answer a question about a slide: one of its options, or freely where it has none.

        Args:
            archive: Archive with the slide's features.
            slide_id: A slide id or unique file name.
            question: The question, without its options.
            choices: The options.
            mode: Way an option is chosen, see ``MODES``; None: as the model was tuned.
            permute: Cyclic orders the options are shown in; probabilities are averaged.
            abstain: Whether the model may say that the slide cannot tell; None: as it was tuned.
            region: Only the regions that overlap this square.
            max_new_tokens: Most tokens of a written answer.

        Raises:
            ConfigError: The question or its options cannot be used (:func:`check_question`), the
                run does not fit the archive, or there is no tissue in the region.
            ArchiveError: The slide is unknown, not ready, or its rows are damaged.
        """
        check_question(question, choices)
        slide, prefix = self.visual_prefix(archive, slide_id, region)
        if not choices:
            prompt = self.model.embed_prompt(prefix, question)
            return Answer(
                slide_id=slide,
                answer=self.model.generate([prompt], max_new_tokens=max_new_tokens)[0],
            )
        asked = ChoiceQuestion(
            prefix=prefix,
            question=question,
            choices=tuple(choices),
            abstain=offers_abstention(self.model, choices, abstain),
        )
        scores = score_choices(self.model, [asked], mode=mode, permute=permute)[0]
        return chosen(slide, choices, scores)


# -- slides ---------------------------------------------------------------------------------------


def slide_input(
    archive: Archive, run: Run, slide_id: str, region: Region | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read the features of a slide that a run's model takes.

    Where the slide has more regions than the model was shown in training, as many are taken, evenly
    spaced in the order of the archive.

    Args:
        archive: Archive with the slide's features.
        run: The run; its encoder names the features.
        slide_id: A slide id or unique file name.
        region: Only the regions that overlap this square, level-0 px.

    Returns:
        features float32 [1, N, M, d_in] and mask bool [1, N, M].

    Raises:
        ArchiveError: The slide is unknown, not ready, or its rows are damaged; or the run does not
            fit the archive.
        ConfigError: There is no tissue in the region (``outside_tissue``).
    """
    import torch

    encoder = check_fits(archive, run)
    features, mask, ids = archive.features_array(slide_id, encoder)
    keep = np.arange(len(ids)) if region is None else _overlapping(archive, slide_id, region)
    if run.max_regions is not None and len(keep) > run.max_regions:
        keep = keep[np.linspace(0, len(keep) - 1, run.max_regions).round().astype(np.int64)]
    return (
        torch.from_numpy(features[keep].astype(np.float32))[None],
        torch.from_numpy(np.array(mask[keep]))[None],
    )


def model_folder(run: Run) -> Path:
    """Return the folder ``model`` of a tuned run.

    Raises:
        CheckpointError: The run is a pretraining run (``not_tuned``).
    """
    from pathflip.checkpoints import is_tuned

    if not is_tuned(run.path):
        raise CheckpointError(
            f"{run.path} is a pretrained run: it has no language model that could answer.",
            hint=f"Tune it: pathflip tune --archive URI --run {run.path} --llm LLM --out DIR, then "
            "give DIR as --run.",
            code="not_tuned",
        )
    return run.path / "model"


def tuned_name(run: Run) -> str:
    """Return the name of a tuned run in files: its folder's name and part of its fingerprint.

    Unlike ``run.name``, the slide model's, it tells two tunings of one slide model apart.

    Raises:
        CheckpointError: The run was not tuned (``not_tuned``), or is damaged.
    """
    from pathflip.checkpoints import model_name
    from pathflip.models.prompt_encoder import read_about

    return model_name(run.path.name, read_about(model_folder(run))["fingerprint"])


def _overlapping(archive: Archive, slide_id: str, region: Region) -> NDArray[np.int64]:
    """Return the positions of the regions that share pixels with a square, ascending."""
    x0, y0, size0 = region
    if size0 <= 0:
        raise ConfigError(
            f"The region's side is {size0} pixels.",
            hint="Give x0, y0 and a side above 0, in level-0 pixels.",
            code="region",
        )
    rows = archive.regions(slide_id, columns=["region_id", "x0", "y0", "size0"])
    left, top, side = (rows[name].to_numpy().astype(np.int64) for name in ("x0", "y0", "size0"))
    across = (left < x0 + size0) & (left + side > x0)
    down = (top < y0 + size0) & (top + side > y0)
    found = np.flatnonzero(across & down)
    if not len(found):
        raise ConfigError(
            f"Slide {slide_id} has no tissue in the square of {size0:,} pixels at "
            f"({x0:,}, {y0:,}).",
            hint=f"Its tissue lies between ({left.min():,}, {top.min():,}) and "
            f"({(left + side).max():,}, {(top + side).max():,}), level-0 pixels.",
            code="outside_tissue",
        )
    return found


# -- questions with options -----------------------------------------------------------------------


def check_question(question: str, choices: Sequence[str]) -> None:
    """Refuse a question that cannot be answered.

    Raises:
        ConfigError: It is empty, it has a single option or more than there are letters, or an
            option is empty or given twice.
    """
    plain = [choice.strip() for choice in choices]
    what = ""
    if not question.strip():
        what = "The question is empty."
    elif len(plain) == 1 or len(plain) > len(LETTERS):
        what = f"The question has {len(plain)} option{'s' if len(plain) > 1 else ''}."
    elif "" in plain or len(set(plain)) < len(plain):
        what = "An option is empty." if "" in plain else "Two options of the question are equal."
    if what:
        raise ConfigError(
            what,
            hint="Write a question."
            if not question.strip()
            else f"Give no options, or 2 to {len(LETTERS)} different ones.",
            code="question",
        )


def rotations(count: int, permute: int) -> list[tuple[int, ...]]:
    """Return cyclic orders of ``count`` options, the given order first.

    Over all ``count`` orders every option stands at every place once, so a model that prefers a
    letter gains nothing.

    Returns:
        ``permute`` orders, ``count`` at most; an order has the option at each place.
    """
    return [
        tuple((start + place) % count for place in range(count))
        for start in range(max(1, min(permute, count)))
    ]


def mode_of(model: PromptEncoder) -> Mode:
    """Return how a model chooses: by letter or by the option's text, as it was tuned to answer."""
    return "letter_logit" if model.config.choice_answer == "letter" else "option_ll"


def offers_abstention(
    model: PromptEncoder, choices: Sequence[str], asked: bool | None = None
) -> bool:
    """Return whether "cannot be told from this slide" is scored beside the options.

    It never is where one of them says so itself, or where all letters are taken.

    Args:
        model: A tuned model.
        choices: The options.
        asked: Wish of the caller; None: whether the model was tuned to abstain.
    """
    wished = model.abstains if asked is None else asked
    return wished and len(choices) < len(LETTERS) and not any(map(says_cannot_tell, choices))


def temperature_of(model: PromptEncoder, mode: Mode) -> float:
    """Return the divisor of the options' logits; 1 where none was fitted for this mode."""
    own = model.calibration
    return own.temperature if own is not None and own.mode == mode else 1.0


def calibrated(
    row: NDArray[np.float64], model: PromptEncoder, mode: Mode, *, abstain: bool
) -> NDArray[np.float64]:
    """Return probabilities of a question's entries [E] with the model's temperature and bias."""
    own = model.calibration
    if own is None or own.mode != mode:
        return row
    row = tempered(row, own.temperature)
    return biased(row, own.abstain_bias) if abstain else row


def score_choices(
    model: PathFLIPInstruct,
    asked: Sequence[ChoiceQuestion],
    *,
    mode: Mode | None = None,
    permute: int = 1,
) -> list[NDArray[np.float64]]:
    """Return the probabilities of the options of questions, in each order they are shown in.

    They are calibrated, where the model has a temperature for the mode.

    Args:
        model: A tuned model.
        asked: The questions.
        mode: Way an option is chosen, see ``MODES``; None: see :func:`mode_of`.
        permute: Most orders; ``option_ll`` shows no options, so its rows are all equal.

    Returns:
        An array [R, E] for each question, options in their given order, then abstaining; a row of
        zeros where ``generate`` named no option.
    """
    mode = mode or mode_of(model)
    found: list[NDArray[np.float64]] = []
    if mode == "option_ll":
        for part in _parts(asked):
            prompts = [model.embed_prompt(one.prefix, one.question) for one in part]
            rows = model.continuation_log_probs(prompts, [one.shown for one in part])
            for one, logs in zip(part, rows, strict=True):
                likely = calibrated(by_text(logs), model, mode, abstain=one.abstain)[None]
                found.append(likely.repeat(len(rotations(len(one.choices), permute)), axis=0))
        return found
    shown = [
        (number, order) for number, one in enumerate(asked) for order in orders_of(one, permute)
    ]
    found = [np.zeros((0, len(one.shown))) for one in asked]
    for items in _parts(shown):
        prompts = [
            model.embed_prompt(asked[number].prefix, in_order(asked[number], order))
            for number, order in items
        ]
        rows_of = _by_letter if mode == "letter_logit" else _by_writing
        texts = [[asked[number].shown[i] for i in order] for number, order in items]
        for (number, order), row in zip(items, rows_of(model, prompts, texts), strict=True):
            row = calibrated(row, model, mode, abstain=asked[number].abstain)
            found[number] = np.vstack([found[number], as_given(row, order)])
    return found


def orders_of(asked: ChoiceQuestion, permute: int) -> list[tuple[int, ...]]:
    """Return the orders a question's entries are shown in; abstaining always comes last."""
    last = (len(asked.choices),) if asked.abstain else ()
    return [(*order, *last) for order in rotations(len(asked.choices), permute)]


def in_order(asked: ChoiceQuestion, order: Sequence[int]) -> str:
    """Return the instruction that shows a question's entries in an order."""
    return multiple_choice(asked.question, [asked.shown[i] for i in order])


def as_given(row: NDArray[np.float64], order: Sequence[int]) -> NDArray[np.float64]:
    """Return values of options in the order they were shown [E] in the order they were given."""
    back = np.empty(len(order))
    back[list(order)] = row
    return back


def by_text(logs: Sequence[tuple[float, int]]) -> NDArray[np.float64]:
    """Return the probabilities of texts as the answer to a question that shows none [E].

    They compare by the mean log-probability of a token, as some are longer than others.

    Args:
        logs: (sum of log-probabilities, tokens) of each.
    """
    return softmax(np.array([total / tokens for total, tokens in logs]))


def softmax(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the softmax along the last axis."""
    powers = np.exp(values - values.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def chosen(slide_id: str, choices: Sequence[str], scores: NDArray[np.float64]) -> Answer:
    """Return the answer that scores [R, E] choose: the most probable entry, mean over orders."""
    mean = scores.mean(axis=0)
    abstain = float(mean[-1]) if len(mean) > len(choices) else None
    named = dict(zip(LETTERS, map(float, mean[: len(choices)]), strict=False))
    if not mean.any():
        return Answer(slide_id=slide_id, answer="", scores=named, abstain=abstain)
    best = int(mean.argmax())
    if best == len(choices):
        return Answer(slide_id=slide_id, answer=CANNOT_TELL, scores=named, abstain=abstain)
    return Answer(
        slide_id=slide_id,
        answer=choices[best],
        choice=LETTERS[best],
        scores=named,
        abstain=abstain,
    )


def read_choice(text: str, choices: Sequence[str]) -> int | None:
    """Return the option that a written answer names; None if it names none.

    As in the published evaluation the text before the first full stop is the letter. Otherwise it
    is a letter the answer begins with, or the text of an option; case and a final full stop do not
    matter there.
    """
    letters = LETTERS[: len(choices)]
    before = text.partition(".")[0].strip()
    if len(before) == 1 and before in letters:
        return letters.index(before)
    plain = [_plain(choice) for choice in choices]
    if _plain(text) in plain:
        return plain.index(_plain(text))
    match = _LETTER.match(text)
    return letters.index(match[1]) if match and match[1] in letters else None


def _plain(text: str) -> str:
    return " ".join(text.split()).rstrip(".").casefold()


def _by_letter(
    model: PathFLIPInstruct, prompts: Sequence[torch.Tensor], texts: Sequence[Sequence[str]]
) -> list[NDArray[np.float64]]:
    most = max(map(len, texts))
    logits = model.letter_logits(prompts, LETTERS[:most]).double().cpu().numpy()
    return [softmax(row[: len(own)]) for row, own in zip(logits, texts, strict=True)]


def _by_writing(
    model: PathFLIPInstruct, prompts: Sequence[torch.Tensor], texts: Sequence[Sequence[str]]
) -> list[NDArray[np.float64]]:
    rows = []
    for text, own in zip(model.generate(prompts, max_new_tokens=CHOICE_TOKENS), texts, strict=True):
        row = np.zeros(len(own))
        if (place := read_choice(text, own)) is not None:
            row[place] = 1
        rows.append(row)
    return rows


def _parts(items: Sequence[Any]) -> list[Sequence[Any]]:
    return [items[at : at + PROMPTS_AT_ONCE] for at in range(0, len(items), PROMPTS_AT_ONCE)]
