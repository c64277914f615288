"""Evaluation of multiple-choice answers: accuracy beside chance and baselines.

* ``majority_baseline``: what is right without looking at any slide, the better of two guesses: the
  option that training questions of the same wording are answered by most often, and always the
  letter that is right most often.
* ``consistency``: options are shown in cyclic orders; the share of orders that agree with the
  choice most of them make, averaged over questions. 1 for a model that reads options, 1/C for one
  that always takes the same letter.
* ``swapped``: the same questions with another slide before the model; what stays of the accuracy
  was not seen.
* ``calibration``: how far confidence is from accuracy; :mod:`pathflip.calibration`.
* ``abstaining``: of questions that no option answers, beside all others, those of which the model
  says that the slide cannot tell.

Shapes: n questions, C options of one, E entries (C + 1 with abstaining), R orders, S resamples.
"""

from __future__ import annotations

import random
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pathflip.calibration import chance_error, expected_error, reliability, tempered, weighted_error
from pathflip.errors import ConfigError
from pathflip.evaluation.bootstrap import interval, patient_weights, support, weighted_mean
from pathflip.evaluation.encode import SlideRow, list_slides
from pathflip.interop.questions import Question, stored_questions
from pathflip.progress import Progress, Report
from pathflip.slide_qa import (
    MODES,
    ChoiceQuestion,
    Mode,
    mode_of,
    offers_abstention,
    score_choices,
    temperature_of,
    tuned_name,
)
from pathflip.text import CANNOT_TELL

if TYPE_CHECKING:
    import torch

    from pathflip.archive import Archive
    from pathflip.slide_qa import SlideQA

ORDERS = 4
QUESTIONS_AT_ONCE = 64


def vqa_metrics(
    questions: Sequence[Question],
    scores: Sequence[NDArray[np.float64]],
    *,
    training: Sequence[Question] = (),
    patients: Sequence[str | None] | None = None,
    swapped: Sequence[NDArray[np.float64]] | None = None,
    temperature: float = 1.0,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure the accuracy of choices, beside chance and baselines.

    Args:
        questions: Questions about the slides evaluated, each with options [n].
        scores: Probabilities of each one's options [R, C], options as given, the first row with
            the options shown as given; a row of zeros names none. See
            :func:`pathflip.slide_qa.score_choices`.
        training: Questions of training slides, for the baseline.
        patients: Patient of each question [n], for 95 % intervals by resampling patients; one of
            no known patient counts by its slide.
        swapped: Scores of the same questions asked about other slides; only first rows count.
        temperature: Temperature that is in the scores.
        resamples: Number of bootstrap resamples, 0 for no interval.
        seed: Seed of the resamples.

    Returns:
        {"n", "accuracy": options as given, "accuracy_permuted": probabilities averaged over the
        orders, "ci", "macro": mean over categories, "consistency", "unanswered": share that names
        no option, "majority_baseline", "baselines": {"text", "letter"}, "chance", "by_category":
        {name: {"n", "accuracy", "majority_baseline"}}, "swapped": {"accuracy", "by_category"},
        "calibration": see :func:`calibration_of`}.
        Where one order is shown, ``accuracy_permuted`` and ``consistency`` are None.

    Raises:
        ValueError: No question, one without options, or lists of different lengths.
    """
    if not questions or any(len(one.choices) < 2 for one in questions):
        raise ValueError("every question needs options, and there must be one")
    if len(scores) != len(questions) or (swapped is not None and len(swapped) != len(questions)):
        raise ValueError(f"{len(questions)} questions and {len(scores)} scores")
    truth = np.array([one.choices.index(one.answer) for one in questions])
    picks = [_picks(one) for one in scores]
    right = np.array([own[0] for own in picks]) == truth
    permuted = np.array([_picks(one.mean(axis=0)[None])[0] for one in scores]) == truth
    several = any(len(own) > 1 for own in picks)
    by_text = _text_guess(questions, training) == truth
    by_letter = truth == Counter(truth.tolist()).most_common(1)[0][0]
    baseline = by_text if by_text.mean() >= by_letter.mean() else by_letter
    groups = _categories(questions)
    found: dict[str, Any] = {
        "n": len(questions),
        "slides": len({one.slide for one in questions}),
        "accuracy": float(right.mean()),
        "accuracy_permuted": float(permuted.mean()) if several else None,
        "macro": float(np.mean([right[rows].mean() for rows in groups.values()])),
        "consistency": float(np.mean([_agreement(own) for own in picks])) if several else None,
        "unanswered": float(np.mean([own[0] < 0 for own in picks])),
        "majority_baseline": float(baseline.mean()),
        "baselines": {"text": float(by_text.mean()), "letter": float(by_letter.mean())},
        "chance": float(np.mean([1 / len(one.choices) for one in questions])),
        "by_category": {
            name: {
                "n": len(rows),
                "accuracy": float(right[rows].mean()),
                "majority_baseline": float(baseline[rows].mean()),
            }
            for name, rows in groups.items()
        },
    }
    names = _owners(questions, patients)
    weights = patient_weights(names, resamples=resamples, seed=seed) if resamples else None
    if weights is not None:
        found["ci"] = interval(weighted_mean(right, weights), float(right.mean()), support(names))
    found["calibration"] = calibration_of(
        [one[0] for one in scores], truth, temperature=temperature, names=names, weights=weights
    )
    if swapped is not None:
        wrong_slide = np.array([_picks(one)[0] for one in swapped]) == truth
        found["swapped"] = {
            "accuracy": float(wrong_slide.mean()),
            "by_category": {name: float(wrong_slide[rows].mean()) for name, rows in groups.items()},
        }
    return found


def calibration_of(
    scores: Sequence[NDArray[np.float64]],
    truth: NDArray[np.int64],
    *,
    temperature: float,
    names: Sequence[str],
    weights: NDArray[np.float64] | None,
) -> dict[str, Any] | None:
    """Measure how far the confidence of choices is from their accuracy.

    Args:
        scores: Probabilities of each question's options [n][C]; rows of zeros are left out.
        truth: Right option of each [n].
        temperature: Temperature that is in the scores.
        names: Patient of each [n].
        weights: Resamples of patients [S, n]; None for no interval.

    Returns:
        {"n", "ece", "ci", "floor": ECE that a perfectly calibrated model of this confidence has by
        chance, "ece_uncalibrated": without the temperature, "temperature", "confidence": mean,
        "bins": of equal mass, see :func:`pathflip.calibration.reliability`}; None where no option
        was named.
    """
    kept = np.flatnonzero([row.any() for row in scores])
    if not len(kept):
        return None
    sure = np.array([scores[i].max() for i in kept])
    right = np.array([scores[i].argmax() for i in kept]) == truth[kept]
    raw = np.array([tempered(scores[i], 1 / temperature).max() for i in kept])
    ece = expected_error(sure, right)
    found: dict[str, Any] = {
        "n": len(kept),
        "ece": ece,
        "floor": chance_error(sure),
        "ece_uncalibrated": expected_error(raw, right),
        "temperature": temperature,
        "confidence": float(sure.mean()),
        "bins": reliability(sure, right),
    }
    if weights is not None:
        drawn = weighted_error(sure, right, weights[:, kept])
        found["ci"] = interval(drawn, ece, support([names[i] for i in kept], graded=True))
    return found


def abstaining(
    questions: Sequence[Question],
    scores: Sequence[NDArray[np.float64]],
    *,
    patients: Sequence[str | None] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure when a model says that a slide cannot tell.

    Args:
        questions: Questions about the slides evaluated, each with options [n]; of some the answer
            is ``CANNOT_TELL``.
        scores: Probabilities of each one's options and, last, of abstaining [R, C + 1].
        patients: Patient of each [n], see :func:`vqa_metrics`.
        resamples: Number of bootstrap resamples, 0 for no intervals.
        seed: Seed of the resamples.

    Returns:
        {"n", "unanswerable": questions that the slide cannot answer, "abstained", "precision":
        share of the abstentions that are about those, "recall": share of those that it abstains
        from, "wrongly": share of the others that it abstains from, "accuracy_answered": of the
        others that it answers, "ci": {"precision", "recall"}, "by_category": {name: {"n",
        "unanswerable", "recall", "wrongly"}}}; None where nothing of the kind was asked.
    """
    without = np.array([one.answer == CANNOT_TELL for one in questions])
    picks = np.array([int(_picks(own.mean(axis=0)[None])[0]) for own in scores])
    silent = picks == np.array([len(one.choices) for one in questions])
    right = np.array(
        [not w and one.choices[p : p + 1] == (one.answer,)
         for one, p, w in zip(questions, picks.tolist(), without, strict=True)]
    )  # fmt: skip

    def share(what: NDArray[np.bool_], among: NDArray[np.bool_]) -> float | None:
        return float(what[among].mean()) if among.any() else None

    found: dict[str, Any] = {
        "n": len(questions),
        "unanswerable": int(without.sum()),
        "abstained": int(silent.sum()),
        "precision": share(without, silent),
        "recall": share(silent, without),
        "wrongly": share(silent, ~without),
        "accuracy_answered": share(right, ~without & ~silent),
        "by_category": {
            name: {
                "n": len(rows),
                "unanswerable": int(without[rows].sum()),
                "recall": share(silent[rows], without[rows]),
                "wrongly": share(silent[rows], ~without[rows]),
            }
            for name, rows in _categories(questions).items()
        },
    }
    if resamples:
        names = _owners(questions, patients)
        weights = patient_weights(names, resamples=resamples, seed=seed)
        found["ci"] = {}
        for key, what, among in (("precision", without, silent), ("recall", silent, without)):
            kept = np.flatnonzero(among)
            drawn = weighted_mean(what[kept], weights[:, kept])
            found["ci"][key] = interval(drawn, found[key], support([names[i] for i in kept]))
    return found


def evaluate_vqa(
    archive: Archive,
    answerer: SlideQA,
    *,
    split: str = "test",
    source: str | None = None,
    mode: Mode | None = None,
    permute_options: int = ORDERS,
    swap: bool = True,
    resamples: int = 1000,
    seed: int = 0,
    progress: Report | None = None,
) -> dict[str, Any]:
    """Ask a tuned run the archive's questions about the slides of a split.

    Args:
        archive: Archive with slides, features and questions.
        answerer: Tuned run that answers.
        split: Split to measure; ``all`` for every slide.
        source: Source of the questions, where there are several.
        mode: Way an option is chosen, see :data:`pathflip.slide_qa.MODES`; None: as the model was
            tuned to answer.
        permute_options: Maximum number of cyclic orders that the options are shown in.
        swap: Whether to ask everything about other slides, too.
        resamples: Number of bootstrap resamples of patients, 0 for no interval.
        seed: Seed of the resamples and of the exchange of slides.
        progress: Called after each slide.

    Returns:
        As :func:`vqa_metrics`, of the questions that one of their options answers, with "mode",
        "split", "model" and "open", the questions without options that are left out. Where the
        model was tuned to abstain, "abstaining" of all questions whose options leave it to the
        model: see :func:`abstaining`.

    Raises:
        ConfigError: The split has no question with options, or the run does not fit the archive.
    """
    mode = mode or mode_of(answerer.model)
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is none of {', '.join(MODES)}")
    every = list_slides(archive, answerer.run)
    chosen = {row.slide_id: row for row in every if split in ("all", row.split)}
    train = {row.slide_id for row in every if row.split == "train"}
    stored = stored_questions(archive, source=source)
    asked = [one for one in stored if one.slide in chosen]
    every_question = [one for one in asked if one.choices]
    questions = [one for one in every_question if one.answer in one.choices]
    if not questions:
        of = "" if source is None else f" of source {source}"
        raise ConfigError(
            f"{archive.uri} has no questions with options{of} about slides of split {split}.",
            hint=f"Add them: pathflip archive import --archive {archive.uri} --questions FILE",
            code="no_questions",
        )
    model = answerer.model
    leaving = [
        one for one in every_question if model.abstains and offers_abstention(model, one.choices)
    ]
    # Asked of the slide itself, of another one, and with abstaining among the options.
    kinds = {"own": questions, "other": questions, "abstaining": leaving}
    scores: dict[str, dict[int, NDArray[np.float64]]] = {kind: {} for kind in kinds}
    slides = [chosen[name] for name in dict.fromkeys(one.slide for one in every_question)]
    waiting: list[tuple[str, int, ChoiceQuestion]] = []

    def put(*, everything: bool) -> None:
        while len(waiting) >= QUESTIONS_AT_ONCE or (everything and waiting):
            part = waiting[:QUESTIONS_AT_ONCE]
            del waiting[:QUESTIONS_AT_ONCE]
            for kind, into in scores.items():
                mine = [(number, one) for of_kind, number, one in part if of_kind == kind]
                orders = permute_options if kind == "own" else 1
                own = score_choices(model, [one for _, one in mine], mode=mode, permute=orders)
                into.update(zip((number for number, _ in mine), own, strict=True))

    of_slide = {kind: _numbers(asked_of) for kind, asked_of in kinds.items()}
    for slide, prefix, is_own in _prefixes(archive, answerer, slides, swap, seed, progress):
        for kind in ("own", "abstaining") if is_own else ("other",):
            for number in of_slide[kind].get(slide.slide_id, ()):
                one = kinds[kind][number]
                item = ChoiceQuestion(
                    prefix=prefix,
                    question=one.question,
                    choices=one.choices,
                    abstain=kind == "abstaining",
                )
                waiting.append((kind, number, item))
        put(everything=False)
    put(everything=True)

    def ordered(kind: str) -> list[NDArray[np.float64]]:
        return [scores[kind][number] for number in range(len(kinds[kind]))]

    found = vqa_metrics(
        questions,
        ordered("own"),
        training=[one for one in stored if one.slide in train and one.answer in one.choices],
        patients=[chosen[one.slide].patient_id for one in questions],
        swapped=ordered("other") if scores["other"] else None,
        temperature=temperature_of(model, mode),
        resamples=resamples,
        seed=seed,
    )
    if leaving:
        found["abstaining"] = abstaining(
            leaving,
            ordered("abstaining"),
            patients=[chosen[one.slide].patient_id for one in leaving],
            resamples=resamples,
            seed=seed,
        )
    return found | {
        "mode": mode,
        "split": split,
        "model": tuned_name(answerer.run),
        "open": len(asked) - len(every_question),
    }


def _numbers(questions: Sequence[Question]) -> dict[str, list[int]]:
    """Return the positions of the questions about each slide."""
    found: dict[str, list[int]] = {}
    for number, one in enumerate(questions):
        found.setdefault(one.slide, []).append(number)
    return found


def _owners(questions: Sequence[Question], patients: Sequence[str | None] | None) -> list[str]:
    """Return the patient of each question; one of no known patient counts by its slide."""
    known = list(patients or [None] * len(questions))
    return [own or f"slide {one.slide}" for own, one in zip(known, questions, strict=True)]


def exchange(slides: Sequence[SlideRow], *, seed: int = 0) -> tuple[list[int], int]:
    """Return an order of slides and a step; each is exchanged with the one a step before it.

    Slides of a patient stand together and the step is the most that one has, so the other slide is
    another patient's unless one patient has more than half of all.
    """
    patients = [slide.patient_id or f"slide {slide.slide_id}" for slide in slides]
    names = sorted(set(patients))
    random.Random(f"exchange {seed}").shuffle(names)
    place = {name: at for at, name in enumerate(names)}
    order = sorted(range(len(slides)), key=lambda i: (place[patients[i]], slides[i].slide_id))
    most = max(Counter(patients).values())
    return order, most if 2 * most <= len(slides) else 1


def _prefixes(
    archive: Archive,
    answerer: SlideQA,
    slides: Sequence[SlideRow],
    swap: bool,
    seed: int,
    progress: Report | None,
) -> Iterator[tuple[SlideRow, torch.Tensor, bool]]:
    """Yield each slide with its own prefix, and with that of the slide it is exchanged with."""
    order, step = exchange(slides, seed=seed)
    swap = swap and len(slides) > 1
    last: deque[torch.Tensor] = deque(maxlen=step)  # each slide is read once
    start = time.monotonic()
    for done, at in enumerate(order, start=1):
        _, prefix = answerer.visual_prefix(archive, slides[at].slide_id)
        yield slides[at], prefix, True
        if swap and len(last) == step:
            yield slides[at], last[0], False
        last.append(prefix)
        if progress is not None:
            seconds = time.monotonic() - start
            progress(Progress(what="ask", done=done, total=len(slides), seconds=seconds))
    if swap:
        for at, prefix in zip(order, last, strict=False):
            yield slides[at], prefix, False


def _picks(scores: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the best option of each row, the first among equals; -1 of a row that names none."""
    best: NDArray[np.int64] = scores.argmax(axis=1)
    return np.where(scores.any(axis=1), best, -1)


def _agreement(picks: NDArray[np.int64]) -> float:
    """Return the share of orders that agree with the majority; naming no option is no choice."""
    named = Counter(picks[picks >= 0].tolist())
    return max(named.values(), default=0) / len(picks)


def _text_guess(questions: Sequence[Question], training: Sequence[Question]) -> NDArray[np.int64]:
    """Return the option that answers training questions of the same wording most often.

    Of wordings that training does not have, questions of the same category count.
    """
    wording: dict[str, Counter[str]] = {}
    category: dict[str, Counter[str]] = {}
    for one in training:
        wording.setdefault(one.question, Counter())[one.answer] += 1
        category.setdefault(one.category, Counter())[one.answer] += 1
    none: Counter[str] = Counter()
    guesses = []
    for one in questions:
        counts = wording.get(one.question) or category.get(one.category, none)
        guesses.append(int(np.argmax([counts[choice] for choice in one.choices])))
    return np.array(guesses, np.int64)


def _categories(questions: Sequence[Question]) -> dict[str, NDArray[np.int64]]:
    names = np.array([one.category or "(none)" for one in questions])
    return {str(name): np.flatnonzero(names == name) for name in np.unique(names)}
