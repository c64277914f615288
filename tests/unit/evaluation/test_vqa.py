"""Accuracy of choices, against models whose figures are known beforehand."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from pathflip.archive import Archive
from pathflip.archive.captions import Caption, write_captions
from pathflip.archive.commit import Committer
from pathflip.errors import ConfigError
from pathflip.evaluation.encode import SlideRow
from pathflip.evaluation.vqa import abstaining, evaluate_vqa, exchange, vqa_metrics
from pathflip.interop.questions import Question
from pathflip.slide_qa import SlideQA, rotations
from pathflip.text import CANNOT_TELL
from tests.archives import ORGANS, make_archive
from tests.serving import Tuned, make_run


def ask(n: int, *, slide: str | None = None, answer: int | None = None, size: int = 4) -> Question:
    """Question n: its right option is at place n mod size."""
    choices = tuple(f"{name} {n // size}" for name in ORGANS[:size])
    at = n % size if answer is None else answer
    return Question(
        slide=slide or f"slide{n:03d}", question="Which tissue is shown?", answer=choices[at],
        choices=choices, category=f"kind {n % 2}",
    )  # fmt: skip


def shown_first(question: Question, orders: int) -> np.ndarray:
    """Scores of a model that always takes the first option it is shown."""
    count = len(question.choices)
    return np.eye(count)[[order[0] for order in rotations(count, orders)]]


def knows(question: Question, orders: int) -> np.ndarray:
    """Scores of a model that reads the options and knows the answer."""
    row = np.full(len(question.choices), 0.1)
    row[question.choices.index(question.answer)] = 0.7
    return np.tile(row, (len(rotations(len(question.choices), orders)), 1))


QUESTIONS = [ask(n) for n in range(40)]


def test_a_model_that_always_says_a() -> None:
    found = vqa_metrics(QUESTIONS, [shown_first(one, 4) for one in QUESTIONS])
    assert found["accuracy"] == 0.25
    assert found["consistency"] == 0.25
    assert found["accuracy_permuted"] == 0.25  # every option got one order: the first is taken
    assert found["unanswered"] == 0
    assert found["chance"] == 0.25


def test_a_model_that_knows() -> None:
    found = vqa_metrics(QUESTIONS, [knows(one, 4) for one in QUESTIONS])
    assert found["accuracy"] == found["accuracy_permuted"] == found["consistency"] == 1
    assert found["macro"] == 1
    low, high = found["ci"]
    assert 0.3 < low < high == 1


def test_a_model_that_reads_options_and_knows_nothing() -> None:
    """Blind to places, so the same choice in every order, right or wrong."""
    rng = np.random.default_rng(0)
    scores = [np.tile(rng.random(4), (4, 1)) for _ in QUESTIONS]
    found = vqa_metrics(QUESTIONS, scores)
    assert found["consistency"] == 1
    right = [row[0].argmax() == n % 4 for n, row in enumerate(scores)]
    assert found["accuracy"] == found["accuracy_permuted"] == pytest.approx(np.mean(right))


def test_orders_are_averaged_before_the_choice() -> None:
    """One order is sure and wrong; three lean to the right option: together it wins."""
    one = ask(1)
    scores = np.array([[0.8, 0.2, 0, 0], [0.2, 0.8, 0, 0], [0.2, 0.8, 0, 0], [0.2, 0.8, 0, 0]])
    found = vqa_metrics([one], [scores])
    assert (found["accuracy"], found["accuracy_permuted"], found["consistency"]) == (0, 1, 0.75)


def test_naming_no_option_is_wrong_and_no_agreement() -> None:
    found = vqa_metrics(QUESTIONS, [np.zeros((4, 4)) for _ in QUESTIONS])
    assert (found["accuracy"], found["consistency"], found["unanswered"]) == (0, 0, 1)


def test_one_order_says_nothing_of_consistency() -> None:
    found = vqa_metrics(QUESTIONS, [knows(one, 1) for one in QUESTIONS])
    assert found["consistency"] is None
    assert found["accuracy_permuted"] is None
    assert found["accuracy"] == 1


def test_categories_and_macro() -> None:
    scores = [knows(one, 1) if n % 2 else shown_first(one, 1) for n, one in enumerate(QUESTIONS)]
    found = vqa_metrics(QUESTIONS[:30], scores[:30])
    # Of kind 0 are the questions 0, 2, …, 28: A is right in those of 0, 4, …, 28.
    assert found["by_category"]["kind 0"]["accuracy"] == 8 / 15
    assert found["by_category"]["kind 1"] == {
        "n": 15, "accuracy": 1.0,
        "majority_baseline": found["by_category"]["kind 1"]["majority_baseline"],
    }  # fmt: skip
    assert found["accuracy"] == 23 / 30
    assert found["macro"] == pytest.approx((1 + 8 / 15) / 2)


def test_majority_by_wording_is_the_cohorts() -> None:
    """The same figure as the synthetic cohort computes for itself."""
    from pathflip.synth import text
    from pathflip.synth.cohort import sample_scenes

    items = [q for scene in sample_scenes(slides=120, seed=3) for q in text.questions(scene)]
    asked = [
        Question(
            slide=item.slide, question=item.question, answer=item.answer_text,
            choices=item.options, category=item.kind, split=item.split,
        )
        for item in items
    ]  # fmt: skip
    test = [one for one in asked if one.split == "test"]
    train = [one for one in asked if one.split == "train"]
    found = vqa_metrics(test, [shown_first(one, 1) for one in test], training=train)
    assert found["baselines"]["text"] > found["baselines"]["letter"]
    expected = text.majority_baseline(items)
    assert set(expected) == set(found["by_category"])
    for kind, share in expected.items():
        assert found["by_category"][kind]["majority_baseline"] == pytest.approx(share)
    counts = [sum(one.category == kind for one in test) for kind in expected]
    mean = np.average(list(expected.values()), weights=counts)
    assert found["majority_baseline"] == pytest.approx(mean)


def test_majority_without_training_is_a_letter() -> None:
    questions = [ask(n, answer=1 if n % 5 else 0) for n in range(20)]  # B 16 times, A 4 times
    found = vqa_metrics(questions, [shown_first(one, 4) for one in questions])
    assert found["baselines"] == {"text": 4 / 20, "letter": 16 / 20}
    assert found["majority_baseline"] == 16 / 20


def test_interval_resamples_patients_not_questions() -> None:
    """A patient owns all questions of one answer: the interval is that of two coin tosses."""
    questions = [ask(n, answer=0 if n < 20 else 1) for n in range(40)]
    patients = ["P0"] * 20 + ["P1"] * 20
    scores = [shown_first(one, 1) for one in questions]
    assert vqa_metrics(questions, scores, patients=patients)["ci"] == pytest.approx(
        [0, 1], abs=0.02
    )
    low, high = vqa_metrics(questions, scores)["ci"]  # a patient each
    assert 0.3 < low < 0.45 < 0.55 < high < 0.7


def test_swapped_is_measured_beside_it() -> None:
    found = vqa_metrics(
        QUESTIONS,
        [knows(one, 4) for one in QUESTIONS],
        swapped=[shown_first(one, 1) for one in QUESTIONS],
    )
    assert found["accuracy"] == 1
    assert found["swapped"]["accuracy"] == 0.25
    assert set(found["swapped"]["by_category"]) == {"kind 0", "kind 1"}


def test_calibration_of_a_model_that_is_too_sure() -> None:
    """It says 0.9 and is right in half of them; the temperature in its scores is taken back."""
    right, wrong = np.array([[0.9, 0.1]]), np.array([[0.1, 0.9]])
    questions = [ask(n, answer=0, size=2) for n in range(40)]
    scores = [right if n % 2 else wrong for n in range(40)]
    found = vqa_metrics(questions, scores, temperature=2.0)["calibration"]
    assert found["ece"] == pytest.approx(0.4)
    assert (found["n"], found["confidence"]) == (40, pytest.approx(0.9))
    low, high = found["ci"]
    assert 0.2 < low < 0.4 < high < 0.6
    assert found["floor"] < 0.12
    raw = 9**2 / (9**2 + 1)  # odds of 9, squared
    assert found["ece_uncalibrated"] == pytest.approx(raw - 0.5)
    named_none = vqa_metrics(questions, [np.zeros((1, 2))] * 40)
    assert named_none["calibration"] is None


def test_abstaining_by_hand() -> None:
    """Three questions that no option answers, two of them seen; three others, one of them lost."""
    answered = [ask(n) for n in range(3)]
    silent = [dataclasses.replace(ask(n), answer=CANNOT_TELL) for n in range(3, 6)]
    abstains = np.array([[0.1, 0.1, 0.1, 0.1, 0.6]])

    def says(option: int) -> np.ndarray:
        return np.array([[0.6 if place == option else 0.1 for place in range(5)]])

    found = abstaining(
        [*answered, *silent],
        [says(0), says(3), abstains, abstains, abstains, says(2)],
        patients=list("ABCDEF"),
    )
    assert (found["n"], found["unanswerable"], found["abstained"]) == (6, 3, 3)
    assert found["precision"] == found["recall"] == pytest.approx(2 / 3)
    assert found["wrongly"] == pytest.approx(1 / 3)
    assert found["accuracy_answered"] == 1 / 2, "question 0 is answered by A, 1 is not by D"
    assert found["by_category"]["kind 1"] == {
        "n": 3, "unanswerable": 2, "recall": 0.5, "wrongly": 0.0,
    }  # fmt: skip
    for low, high in found["ci"].values():
        assert 0 <= low < 2 / 3 < high <= 1
    none = abstaining(answered, [says(n) for n in range(3)], resamples=0)
    assert (none["precision"], none["recall"], none["accuracy_answered"]) == (None, None, 1)


def test_wrong_input() -> None:
    with pytest.raises(ValueError, match="options"):
        vqa_metrics([], [])
    with pytest.raises(ValueError, match="options"):
        vqa_metrics([dataclasses.replace(QUESTIONS[0], choices=())], [np.ones((1, 1))])
    with pytest.raises(ValueError, match="40 questions and 1 scores"):
        vqa_metrics(QUESTIONS, [np.ones((1, 4))])


@pytest.mark.parametrize("owned", [[1] * 7, [3, 2, 1, 1, 1], [4, 4], [2, 2, 2, 1], [1, 1]])
@pytest.mark.parametrize("seed", range(3))
def test_slides_are_exchanged_between_patients(owned: list[int], seed: int) -> None:
    slides = [
        SlideRow(
            slide_id=f"s{patient}-{n}", stem="", patient_id=f"P{patient}", split="test", labels={},
            mpp=0.5, uri="", n_regions=1,
        )
        for patient, count in enumerate(owned) for n in range(count)
    ]  # fmt: skip
    order, step = exchange(slides, seed=seed)
    assert sorted(order) == list(range(len(slides)))
    for place, at in enumerate(order):
        other = order[place - step]
        assert slides[at].patient_id != slides[other].patient_id


def test_a_patient_with_most_slides_is_still_exchanged() -> None:
    slides = [
        SlideRow(
            slide_id=f"s{n}", stem="", patient_id="P" if n else "Q", split="test", labels={},
            mpp=0.5, uri="", n_regions=1,
        )
        for n in range(5)
    ]  # fmt: skip
    order, step = exchange(slides)
    assert all(at != order[place - step] for place, at in enumerate(order))


# -- through a model ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive of 12 slides, the last 6 of the test split, with questions about all."""
    uri = make_archive(
        tmp_path_factory.mktemp("asked") / "archive", slides=12,
        split=lambda n: "test" if n >= 6 else "train",
    )  # fmt: skip
    qa = [
        {"question": one.question, "answer": one.answer, "choices": list(one.choices),
         "category": one.category}
        for one in (ask(n, size=4 if n % 3 else 3) for n in range(5))
    ]  # fmt: skip
    open_one = {"question": "What is seen?", "answer": "necrosis"}
    with Committer(uri) as committer:
        write_captions(
            committer,
            [Caption(slide_id=f"slide{n:03d}", text="", qa=[*qa, open_one]) for n in range(12)],
            source="questions",
        )
    return uri


@pytest.fixture(scope="module")
def answerer(asked: Path, tuned: Tuned, tmp_path_factory: pytest.TempPathFactory) -> SlideQA:
    return SlideQA.from_run(make_run(tmp_path_factory.mktemp("runs") / "r", asked, tuned.base))


@pytest.mark.parametrize("mode", ["letter_logit", "option_ll"])
def test_evaluation_is_what_asking_one_by_one_gives(
    asked: Path, answerer: SlideQA, mode: str
) -> None:
    """Batches, the ring of exchanged slides and the padding change nothing."""
    archive = Archive(asked)
    found = evaluate_vqa(archive, answerer, mode=mode, permute_options=2, seed=1)
    assert (found["n"], found["open"], found["slides"]) == (30, 6, 6)
    names = [f"slide{n:03d}" for n in range(6, 12)]
    slides = [
        SlideRow(
            slide_id=name, stem="", patient_id=f"P{n // 2}", split="test", labels={}, mpp=0.5,
            uri="", n_regions=1,
        )
        for n, name in enumerate(names, start=6)
    ]  # fmt: skip
    order, step = exchange(slides, seed=1)
    other = {names[at]: names[order[place - step]] for place, at in enumerate(order)}
    right, swapped = [], []
    for name in names:
        for n in range(5):
            one = ask(n, size=4 if n % 3 else 3)
            for slide, into in ((name, right), (other[name], swapped)):
                answer = answerer.ask(archive, slide, one.question, one.choices, mode=mode)
                into.append(answer.answer == one.answer)
    assert found["accuracy"] == pytest.approx(np.mean(right))
    assert found["swapped"]["accuracy"] == pytest.approx(np.mean(swapped))
    if mode == "option_ll":
        assert found["consistency"] == 1


def test_a_language_model_that_always_says_a(asked: Path, answerer: SlideQA) -> None:
    """Layers that add nothing and a head that knows one letter, through the whole evaluation."""
    model = copy.deepcopy(answerer.model)
    (letter,) = model.prompter.text_ids("A")
    last = model.prompt_ids("anything")[1][-1]
    with torch.no_grad():
        for name, weight in model.llm.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                weight.zero_()
        model.causal.lm_head.weight.zero_()
        model.causal.lm_head.weight[letter] = model.embedding.weight[last]
    found = evaluate_vqa(Archive(asked), SlideQA(answerer.run, model), split="all")
    assert found["n"] == 60
    share = np.mean([n % (4 if n % 3 else 3) == 0 for n in range(5)])
    assert found["accuracy"] == pytest.approx(share)
    assert found["swapped"]["accuracy"] == pytest.approx(share)
    assert found["consistency"] == pytest.approx(np.mean([1 / 3, 1 / 4, 1 / 4, 1 / 3, 1 / 4]))
    # Training slides are asked the same. Of "colon 0" and "breast 0" both are right once each, and
    # the first is taken; the options of questions 3 and 4 have one right answer between them.
    assert found["baselines"]["text"] == pytest.approx(3 / 5)


def test_no_questions_is_said(asked: Path, answerer: SlideQA) -> None:
    with pytest.raises(ConfigError) as refused:
        evaluate_vqa(Archive(asked), answerer, source="nobody")
    assert refused.value.code == "no_questions"
    assert "pathflip archive import" in refused.value.hint
