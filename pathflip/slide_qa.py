"""Captions of slides and answers to questions about them, one at a time, in this process.

:class:`Answerer` holds a tuned run's vision model, projector and language model and needs neither
Ray nor vLLM: it is what a notebook, ``pathflip caption`` and ``pathflip ask`` use. Many slides go
through jobs/answer.py, users through serve/; all of them read a slide by :func:`slide_input` and
put the options of a question to the model by :func:`rotations`.

Shapes: N regions, M patch slots, d_in feature width, P visual tokens, D width of the language
model, C options of a question, R orders they are shown in.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from pathflip.compat import check_fits
from pathflip.errors import CheckpointError, ConfigError
from pathflip.models.chat_template import CAPTION_INSTRUCTION, multiple_choice
from pathflip.text import LETTERS

if TYPE_CHECKING:
    import torch

    from pathflip.archive import Archive
    from pathflip.checkpoints import Run
    from pathflip.models.instruct import PathFLIPInstruct

Mode = Literal["letter_logit", "option_ll", "generate"]
MODES: tuple[Mode, ...] = ("letter_logit", "option_ll", "generate")
"""How a choice is made: by the next token's probability among the letters; by the probability a
token of each option's text as the answer to the question alone; by what the model writes."""
Region = tuple[int, int, int]
"""x0, y0 and side of a square, level-0 px."""
CAPTION_TOKENS = 512
CHOICE_TOKENS = 64
"""Tokens of a written choice: a letter, or an option's text."""
PROMPTS_AT_ONCE = 32
_LETTER = re.compile(r"\s*\(?([A-H])\b")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model says to a question.

    Attributes:
        slide_id: The slide it is about.
        answer: The answer; with options the text of the chosen one.
        choice: The letter of the chosen option; None of an open question, or where the model named
            no option.
        scores: {letter: probability among the options}; empty of an open question.
    """

    slide_id: str
    answer: str
    choice: str | None = None
    scores: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A question with options, to be put to a model.

    Attributes:
        prefix: What the model sees of the slide [P, D].
        question: Without its options.
        choices: The options.
    """

    prefix: torch.Tensor
    question: str
    choices: tuple[str, ...]


class Answerer:
    """A tuned run, ready to answer.

    Args:
        run: Its vision model, encoder and tiling.
        model: Vision model, projector and language model, in evaluation mode.
    """

    def __init__(self, run: Run, model: PathFLIPInstruct) -> None:
        self.run = run
        self.model = model

    @classmethod
    def from_run(
        cls, run: str | Path, *, llm: str | Path | None = None, device: str = "cpu"
    ) -> Answerer:
        """Open a run of ``pathflip tune``.

        Args:
            run: Its folder.
            llm: Where the base language model is, if it is no longer where it was tuned.
            device: Where to put the model.

        Raises:
            CheckpointError: The run is missing, unfinished or damaged, or not a tuned one
                (``not_tuned``), or the language model is another.
        """
        from pathflip.checkpoints import load_run
        from pathflip.models.instruct import PathFLIPInstruct

        loaded = load_run(run)
        model = PathFLIPInstruct.from_pretrained(model_folder(loaded), llm=llm, device=device)
        # One copy of the vision model: the tuned one, which is the run's.
        return cls(replace(loaded, model=model.vision), model.eval())

    def see(
        self, archive: Archive, slide_id: str, region: Region | None = None
    ) -> tuple[str, torch.Tensor]:
        """The slide's id and its visual tokens [P, D]; see :func:`slide_input`."""
        import torch

        slide = archive.resolve(slide_id)
        features, mask = slide_input(archive, self.run, slide, region)
        device = self.run.model.device
        with torch.no_grad():
            return slide, self.model.see(features.to(device), mask.to(device))[0]

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
            archive: Where the slide's features are.
            slide_id: A slide id or unique file name.
            region: Only the regions that overlap this square.
            max_new_tokens: Where to stop at the latest.

        Raises:
            ArchiveError: The slide is unknown, not ready, or its rows are damaged.
            ConfigError: The run does not fit the archive, or there is no tissue in the region.
        """
        _, prefix = self.see(archive, slide_id, region)
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
        region: Region | None = None,
        max_new_tokens: int = CAPTION_TOKENS,
    ) -> Answer:
        """Answer a question about a slide: one of its options, or freely where it has none.

        Args:
            archive: Where the slide's features are.
            slide_id: A slide id or unique file name.
            question: What to ask.
            choices: The options.
            mode: How to choose among them, see ``MODES``; None: as the model was tuned to.
            permute: In how many cyclic orders to show them; probabilities are averaged.
            region: Only the regions that overlap this square.
            max_new_tokens: Where an answer that is written stops at the latest.

        Raises:
            ConfigError: The question is empty or its options are of no use, the run does not fit
                the archive, or there is no tissue in the region.
            ArchiveError: The slide is unknown, not ready, or its rows are damaged.
        """
        check_question(question, choices)
        slide, prefix = self.see(archive, slide_id, region)
        if not choices:
            prompt = self.model.embed_prompt(prefix, question)
            return Answer(
                slide_id=slide,
                answer=self.model.generate([prompt], max_new_tokens=max_new_tokens)[0],
            )
        asked = Asked(prefix=prefix, question=question, choices=tuple(choices))
        scores = score_choices(self.model, [asked], mode=mode, permute=permute)[0]
        return chosen(slide, choices, scores)


# -- slides ---------------------------------------------------------------------------------------


def slide_input(
    archive: Archive, run: Run, slide_id: str, region: Region | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read what a model sees of a slide.

    Args:
        archive: Where.
        run: The run whose encoder and tiling are asked for.
        slide_id: A slide id or unique file name.
        region: Only the regions that overlap this square, level-0 px.

    Of more regions than the model was shown in training, as many are taken, evenly spaced in the
    order of the archive.

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
    """The folder ``model`` of a tuned run.

    Raises:
        CheckpointError: The run is a pretraining run (``not_tuned``).
    """
    from pathflip.checkpoints import is_tuned

    if not is_tuned(run.path):
        raise CheckpointError(
            f"{run.path} has no language model: it was pretrained, not tuned.",
            hint=f"Tune it: pathflip tune --archive URI --run {run.path} --llm LLM --out DIR, and "
            "give that folder.",
            code="not_tuned",
        )
    return run.path / "model"


def tuned_name(run: Run) -> str:
    """Name of a tuned run in files: its folder's name and the start of its fingerprint.

    Unlike ``run.name``, which is the vision model's, it tells two tunings of one model apart.

    Raises:
        CheckpointError: The run was not tuned (``not_tuned``), or is damaged.
    """
    from pathflip.checkpoints import model_name
    from pathflip.models.prompt_encoder import read_about

    return model_name(run.path.name, read_about(model_folder(run))["fingerprint"])


def _overlapping(archive: Archive, slide_id: str, region: Region) -> NDArray[np.int64]:
    """Positions of the regions that share pixels with a square, ascending."""
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
            f"There is no tissue of {slide_id} in the square of {size0:,} pixels at "
            f"({x0:,}, {y0:,}).",
            hint=f"Its tissue lies between ({left.min():,}, {top.min():,}) and "
            f"({(left + side).max():,}, {(top + side).max():,}), level-0 pixels.",
            code="outside_tissue",
        )
    return found


# -- questions with options -----------------------------------------------------------------------


def check_question(question: str, choices: Sequence[str]) -> None:
    """Refuse a question nobody can answer.

    Raises:
        ConfigError: It is empty, or its options are one, more than there are letters, empty or
            equal.
    """
    plain = [choice.strip() for choice in choices]
    what = ""
    if not question.strip():
        what = "The question is empty."
    elif len(plain) == 1 or len(plain) > len(LETTERS):
        what = f"The question has {len(plain)} options."
    elif "" in plain or len(set(plain)) < len(plain):
        what = "An option is empty." if "" in plain else "Two options are equal."
    if what:
        raise ConfigError(
            what,
            hint=f"Give no options, or 2 to {len(LETTERS)} different ones.",
            code="question",
        )


def rotations(count: int, permute: int) -> list[tuple[int, ...]]:
    """Cyclic orders of ``count`` options: which option stands at each place, the given order first.

    In all ``count`` of them every option stands at every place once, so a model that prefers a
    letter gains nothing.
    """
    return [
        tuple((start + place) % count for place in range(count))
        for start in range(max(1, min(permute, count)))
    ]


def mode_of(model: PathFLIPInstruct) -> Mode:
    """How a model chooses: as it was tuned to answer, by the letter or by the option's text."""
    return "letter_logit" if model.config.choice_answer == "letter" else "option_ll"


def score_choices(
    model: PathFLIPInstruct,
    asked: Sequence[Asked],
    *,
    mode: Mode | None = None,
    permute: int = 1,
) -> list[NDArray[np.float64]]:
    """Probabilities of the options of each question, in each order they are shown in.

    Args:
        model: A tuned model.
        asked: The questions.
        mode: How, see ``MODES``; None: see :func:`mode_of`.
        permute: Orders at most; ``option_ll`` shows no options, so its rows are all equal.

    Returns:
        Of each question [R, C], options as they were given; a row of zeros where ``generate``
        named none.
    """
    mode = mode or mode_of(model)
    found: list[NDArray[np.float64]] = []
    if mode == "option_ll":
        for part in _parts(asked):
            prompts = [model.embed_prompt(one.prefix, one.question) for one in part]
            rows = model.continuation_log_probs(prompts, [one.choices for one in part])
            for one, logs in zip(part, rows, strict=True):
                likely = softmax(np.array([[total / tokens for total, tokens in logs]]))
                found.append(likely.repeat(len(rotations(len(one.choices), permute)), axis=0))
        return found
    shown = [
        (number, order)
        for number, one in enumerate(asked)
        for order in rotations(len(one.choices), permute)
    ]
    found = [np.zeros((0, len(one.choices))) for one in asked]
    for items in _parts(shown):
        prompts = [
            model.embed_prompt(asked[number].prefix, in_order(asked[number], order))
            for number, order in items
        ]
        rows_of = _by_letter if mode == "letter_logit" else _by_writing
        texts = [[asked[number].choices[i] for i in order] for number, order in items]
        for (number, order), row in zip(items, rows_of(model, prompts, texts), strict=True):
            found[number] = np.vstack([found[number], as_given(row, order)])
    return found


def in_order(asked: Asked, order: Sequence[int]) -> str:
    """The instruction that shows a question's options in an order."""
    return multiple_choice(asked.question, [asked.choices[i] for i in order])


def as_given(row: NDArray[np.float64], order: Sequence[int]) -> NDArray[np.float64]:
    """Values of options in the order they were shown [C], back in the order they were given."""
    back = np.empty(len(order))
    back[list(order)] = row
    return back


def softmax(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Along the last axis."""
    powers = np.exp(values - values.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def chosen(slide_id: str, choices: Sequence[str], scores: NDArray[np.float64]) -> Answer:
    """The answer that scores [R, C] choose: the most probable option on average over the orders."""
    mean = scores.mean(axis=0)
    named = dict(zip(LETTERS, map(float, mean), strict=False))
    if not mean.any():
        return Answer(slide_id=slide_id, answer="", scores=named)
    best = int(mean.argmax())
    return Answer(slide_id=slide_id, answer=choices[best], choice=LETTERS[best], scores=named)


def read_choice(text: str, choices: Sequence[str]) -> int | None:
    """Which option a written answer names; None if none.

    As published: the text before the first full stop is the letter. Otherwise a letter it begins
    with, or the text of an option; case and a final full stop do not matter there.
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
