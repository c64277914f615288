"""Captions and answers of one slide: what is read, how options are shown, and the commands."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from pathflip.archive import Archive
from pathflip.calibration import Calibration
from pathflip.checkpoints import load_run
from pathflip.errors import ArchiveError, CheckpointError, ConfigError
from pathflip.models.chat_template import multiple_choice
from pathflip.slide_qa import (
    ChoiceQuestion,
    SlideQA,
    as_given,
    check_question,
    chosen,
    read_choice,
    rotations,
    score_choices,
    slide_input,
    softmax,
    tuned_name,
)
from pathflip.text import CANNOT_TELL
from tests.serving import Tuned
from tests.unit.archive import models

Shell = Callable[..., tuple[int, Any, str]]
SLIDE = "slide003"
CHOICES = ("colon", "breast tissue", "lung")


@pytest.fixture(scope="module")
def answerer(tuned: Tuned) -> SlideQA:
    return SlideQA.from_run(tuned.run)


@pytest.fixture
def pathflip(tuned: Tuned, capfd: pytest.CaptureFixture[str]) -> Shell:
    """``pathflip(arguments…) -> (exit code, JSON document, stderr)`` over the tuned run."""
    from pathflip.cli import main

    def run(*arguments: object, run: object = tuned.run) -> tuple[int, Any, str]:
        capfd.readouterr()
        given = [str(argument) for argument in arguments]
        with pytest.raises(SystemExit) as ended:
            main([*given, "--archive", str(tuned.archive), "--run", str(run), "--json"])
        out, err = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, json.loads(out) if out.strip() else None, err

    return run


# -- slides ---------------------------------------------------------------------------------------


def test_a_slide_is_read_as_it_is_stored(tuned: Tuned) -> None:
    archive, run = Archive(tuned.archive), load_run(tuned.run)
    features, mask = slide_input(archive, run, SLIDE)
    stored, stored_mask, _ = archive.features_array(SLIDE)
    assert features.dtype == torch.float32
    assert torch.equal(features[0], torch.from_numpy(stored.astype(np.float32)))
    assert torch.equal(mask[0], torch.from_numpy(stored_mask.copy()))


def test_a_region_takes_what_it_overlaps(tuned: Tuned) -> None:
    """Regions of slide 3 stand side by side from (0, 1536), 512 pixels each."""
    archive, run = Archive(tuned.archive), load_run(tuned.run)
    whole, _ = slide_input(archive, run, SLIDE)
    count = whole.shape[1]
    assert count >= 2
    for region, expected in {
        (0, 1536, 512): [0],
        (511, 1536, 1): [0],
        (512, 1536, 1): [1],
        (511, 1600, 2): [0, 1],
        (0, 1536, 512 * count): list(range(count)),
        (-1000, 0, 100_000): list(range(count)),
    }.items():
        features, mask = slide_input(archive, run, SLIDE, region)
        assert features.shape[:2] == mask.shape[:2] == (1, len(expected))
        assert torch.equal(features[0], whole[0, expected])
    for outside in ((0, 0, 1536), (512 * count, 1536, 512), (0, 2048, 512), (-512, 1536, 512)):
        with pytest.raises(ConfigError, match="no tissue") as refused:
            slide_input(archive, run, SLIDE, outside)
        assert refused.value.code == "outside_tissue"
        assert "(0, 1,536)" in refused.value.hint
    for size in (0, -512):
        with pytest.raises(ConfigError) as empty:
            slide_input(archive, run, SLIDE, (0, 1536, size))
        assert empty.value.code == "region"


def test_an_unknown_slide(answerer: SlideQA, tuned: Tuned) -> None:
    with pytest.raises(ArchiveError) as refused:
        answerer.caption(Archive(tuned.archive), "slide999")
    assert refused.value.code == "unknown_slide"


def test_what_is_said_depends_on_the_slide_and_the_region(answerer: SlideQA, tuned: Tuned) -> None:
    archive = Archive(tuned.archive)
    names = [f"slide{n:03d}" for n in range(8)]
    asked = [answerer.ask(archive, name, "Which tissue?", CHOICES).scores for name in names]
    assert len({tuple(one.values()) for one in asked}) == 8
    part = answerer.ask(archive, SLIDE, "Which tissue?", CHOICES, region=(0, 1536, 512)).scores
    assert part != asked[3]


# -- runs -----------------------------------------------------------------------------------------


def test_a_pretrained_run_is_no_tuned_one(tmp_path: Path) -> None:
    models.make_run(tmp_path / "run")
    with pytest.raises(CheckpointError, match="is a pretrained run") as refused:
        SlideQA.from_run(tmp_path / "run")
    assert refused.value.code == "not_tuned"
    assert "pathflip tune" in refused.value.hint


def test_another_base_is_refused(tuned: Tuned) -> None:
    with pytest.raises(CheckpointError) as refused:
        SlideQA.from_run(tuned.run, llm=tuned.run / "llm")
    assert refused.value.code == "other_model"


def test_the_name_is_the_tunings_not_the_vision_models(tuned: Tuned) -> None:
    run = load_run(tuned.run)
    about = json.loads((tuned.run / "model" / "instruct.json").read_text())
    assert tuned_name(run) == f"run_{about['fingerprint'][:8]}"
    assert tuned_name(run) != run.name


# -- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(2, 9))
@pytest.mark.parametrize("permute", [1, 2, 4, 8])
def test_orders_of_options(count: int, permute: int) -> None:
    orders = rotations(count, permute)
    assert orders[0] == tuple(range(count))
    assert len(orders) == min(count, permute)
    assert all(sorted(order) == list(range(count)) for order in orders)
    if permute >= count:  # every option at every place once
        assert all(len(set(place)) == count for place in zip(*orders, strict=True))
    for order in orders:
        shown = np.array([10.0 * option for option in order])
        assert as_given(shown, order).tolist() == [10.0 * option for option in range(count)]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("B", 1), ("B.", 1), ("B. breast tissue", 1), (" b.", None), ("(C) lung", 2), ("A)", 0),
        ("C\nbecause", 2), ("breast tissue", 1), ("Breast  tissue.", 1), ("A lung", 0), ("D", None),
        ("D. none", None), ("", None), ("Cells", None), ("I think B", None), ("lung. It is.", None),
    ],
)  # fmt: skip
def test_reading_what_was_written(said: str, expected: int | None) -> None:
    assert read_choice(said, CHOICES) == expected


def test_an_option_that_begins_like_a_letter_is_read_by_its_text() -> None:
    assert read_choice("A malignant tumour", ("benign", "A malignant tumour")) == 1


def test_the_answer_is_the_best_on_average() -> None:
    scores = np.array([[0.6, 0.4, 0.0], [0.1, 0.8, 0.1]])
    answer = chosen(SLIDE, CHOICES, scores)
    assert (answer.answer, answer.choice) == ("breast tissue", "B")
    assert answer.scores == pytest.approx({"A": 0.35, "B": 0.6, "C": 0.05})
    silent = chosen(SLIDE, CHOICES, np.zeros((2, 3)))
    assert (silent.answer, silent.choice) == ("", None)


@pytest.mark.parametrize(
    ("question", "choices"),
    [("", ()), ("  ", CHOICES), ("Q?", ("one",)), ("Q?", ("a", "a")), ("Q?", ("a", " ")),
     ("Q?", tuple("abcdefghi"))],
)  # fmt: skip
def test_questions_nobody_can_answer(question: str, choices: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as refused:
        check_question(question, choices)
    assert refused.value.code == "question"


def test_scores_are_the_models_probabilities(answerer: SlideQA, tuned: Tuned) -> None:
    """Each mode against the model's own methods, prompt by prompt."""
    archive, model = Archive(tuned.archive), answerer.model
    _, prefix = answerer.visual_prefix(archive, SLIDE)
    question = "Which tissue is shown?"
    asked = [ChoiceQuestion(prefix=prefix, question=question, choices=CHOICES)] * 2
    found = score_choices(model, asked, permute=3)
    assert [one.shape for one in found] == [(3, 3), (3, 3)]
    for row, order in zip(found[1], rotations(3, 3), strict=True):
        text = multiple_choice(question, [CHOICES[i] for i in order])
        logits = model.letter_logits([model.embed_prompt(prefix, text)], "ABC")[0]
        expected = torch.softmax(logits, 0).tolist()
        for place, option in enumerate(order):
            assert row[option] == pytest.approx(expected[place], abs=1e-6)
    likely = score_choices(model, asked, mode="option_ll", permute=3)[0]
    prompt = model.embed_prompt(prefix, question)
    per_token = [
        total / count for total, count in model.continuation_log_probs([prompt], [CHOICES])[0]
    ]
    assert likely[0] == pytest.approx(softmax(np.array(per_token)), abs=1e-6)
    assert (likely == likely[0]).all(), "no options are shown, so their order cannot matter"
    assert likely.shape == (3, 3)
    written = score_choices(model, asked[:1], mode="generate")[0]
    text = model.generate(
        [model.embed_prompt(prefix, multiple_choice(question, CHOICES))], max_new_tokens=64
    )[0]
    place = read_choice(text, CHOICES)
    assert written.tolist() == [[float(i == place) for i in range(3)]]


# -- calibrated, and abstaining -------------------------------------------------------------------


@pytest.fixture
def abstainer(answerer: SlideQA) -> Iterator[SlideQA]:
    """The tuned run as one that was tuned to abstain and calibrated."""
    model = answerer.model
    model.abstains = True
    model.calibration = Calibration(
        mode="letter_logit", temperature=3.0, questions=60, ece_before=0.2, ece=0.1,
        nll_before=2.0, nll=1.0,
    )  # fmt: skip
    yield answerer
    model.abstains, model.calibration = False, None


def test_abstaining_is_the_last_letter_and_scores_are_tempered(
    abstainer: SlideQA, tuned: Tuned
) -> None:
    archive, model = Archive(tuned.archive), abstainer.model
    _, prefix = abstainer.visual_prefix(archive, SLIDE)
    answer = abstainer.ask(archive, SLIDE, "Which?", CHOICES, permute=3)
    rows = []
    for order in rotations(3, 3):
        text = multiple_choice("Which?", [*(CHOICES[i] for i in order), CANNOT_TELL])
        logits = model.letter_logits([model.embed_prompt(prefix, text)], "ABCD")[0]
        likely = torch.softmax(logits / 3.0, 0).tolist()
        rows.append([likely[order.index(i)] for i in range(3)] + [likely[3]])
    mean = np.mean(rows, axis=0)
    assert [*answer.scores.values(), answer.abstain] == pytest.approx(mean.tolist(), abs=1e-6)
    assert answer.answer == [*CHOICES, CANNOT_TELL][int(mean.argmax())]
    told = abstainer.ask(archive, SLIDE, "Which?", CHOICES, abstain=False)
    assert told.abstain is None
    assert sum(told.scores.values()) == pytest.approx(1)


def test_abstaining_by_text_is_one_more_text_with_a_bias(abstainer: SlideQA, tuned: Tuned) -> None:
    archive, model = Archive(tuned.archive), abstainer.model
    model.calibration = replace(
        cast(Calibration, model.calibration), mode="option_ll", abstain_bias=1.5
    )
    _, prefix = abstainer.visual_prefix(archive, SLIDE)
    prompt = model.embed_prompt(prefix, "Which?")
    logs = model.continuation_log_probs([prompt], [[*CHOICES, CANNOT_TELL]])[0]
    logits = np.array([total / tokens for total, tokens in logs]) / 3.0
    logits[3] += 1.5
    answer = abstainer.ask(archive, SLIDE, "Which?", CHOICES, mode="option_ll")
    assert [*answer.scores.values(), answer.abstain] == pytest.approx(softmax(logits), abs=1e-6)
    told = abstainer.ask(archive, SLIDE, "Which?", CHOICES, mode="option_ll", abstain=False)
    assert list(told.scores.values()) == pytest.approx(softmax(logits[:3]), abs=1e-6)


def test_a_temperature_is_of_its_mode(abstainer: SlideQA, tuned: Tuned) -> None:
    archive = Archive(tuned.archive)
    hot = abstainer.ask(archive, SLIDE, "Which?", CHOICES, mode="option_ll", abstain=False)
    abstainer.model.calibration = None
    plain = abstainer.ask(archive, SLIDE, "Which?", CHOICES, mode="option_ll", abstain=False)
    assert hot == plain


@pytest.mark.parametrize(
    "own",
    ["cannot be told from this slide", "It cannot be determined.", "Not enough information",
     "Impossible to tell"],
)  # fmt: skip
def test_options_of_the_caller_that_say_so_are_enough(
    abstainer: SlideQA, tuned: Tuned, own: str
) -> None:
    """They are options like others: scored by their letter, and nothing is added to them."""
    choices = ("colon", "lung", own)
    found = abstainer.ask(Archive(tuned.archive), SLIDE, "Which?", choices)
    assert found.abstain is None
    assert list(found.scores) == ["A", "B", "C"]
    assert found.choice == "ABC"[choices.index(found.answer)]
    assert sum(found.scores.values()) == pytest.approx(1)


def test_abstaining_is_no_choice() -> None:
    scores = np.array([[0.2, 0.2, 0.1, 0.5]])
    answer = chosen(SLIDE, CHOICES, scores)
    assert (answer.answer, answer.choice, answer.abstain) == (CANNOT_TELL, None, 0.5)
    assert answer.scores == pytest.approx({"A": 0.2, "B": 0.2, "C": 0.1})


def test_a_model_that_never_learned_it_is_not_offered_it(answerer: SlideQA, tuned: Tuned) -> None:
    assert answerer.ask(Archive(tuned.archive), SLIDE, "Which?", CHOICES).abstain is None
    asked = answerer.ask(Archive(tuned.archive), SLIDE, "Which?", CHOICES, abstain=True)
    assert asked.abstain is not None


# -- commands -------------------------------------------------------------------------------------


def test_caption_command(pathflip: Shell, answerer: SlideQA, tuned: Tuned) -> None:
    expected = answerer.caption(Archive(tuned.archive), SLIDE, max_new_tokens=8)
    code, found, _ = pathflip("caption", f"{SLIDE}.svs", "--max-new-tokens", 8)
    assert (code, found) == (0, {"slide_id": SLIDE, "caption": expected})
    code, found, _ = pathflip("caption", SLIDE, "slide001", "--max-new-tokens", 8)
    assert [row["slide_id"] for row in found] == [SLIDE, "slide001"]
    code, found, _ = pathflip("caption", SLIDE, "--region", "0,0,512")
    assert (code, found["error"]["code"]) == (2, "outside_tissue")


def test_ask_command(pathflip: Shell, answerer: SlideQA, tuned: Tuned) -> None:
    expected = answerer.ask(Archive(tuned.archive), SLIDE, "Which?", CHOICES, permute=3)
    for options in (["--choices", "|".join(CHOICES)], [f"--choices={one}" for one in CHOICES]):
        code, found, _ = pathflip("ask", SLIDE, "Which?", *options, "--permute", 3)
        assert code == 0
        assert (found["slide_id"], found["answer"]) == (SLIDE, expected.answer)
        assert found["choice"] == expected.choice == "ABC"[CHOICES.index(expected.answer)]
        assert found["scores"] == pytest.approx(expected.scores)
        assert sum(found["scores"].values()) == pytest.approx(1)
    code, found, _ = pathflip("ask", SLIDE, "Which?", "--max-new-tokens", 4)
    assert (code, found["choice"], found["scores"], found["abstain"]) == (0, None, {}, None)
    code, found, _ = pathflip("ask", SLIDE, "Which?", "--choices", "|".join(CHOICES), "--abstain")
    assert found["abstain"] + sum(found["scores"].values()) == pytest.approx(1)


@pytest.mark.parametrize(
    "arguments",
    [
        ("caption",), ("caption", "--all"), ("caption", SLIDE, "--all", "--out", "x"),
        ("caption", "--split", "test"), ("caption", SLIDE, "--out", "x"),
        ("caption", SLIDE, "--dry-run"), ("caption", SLIDE, "--region", "1,2"),
        ("caption", "--all", "--split", "test", "--out", "x"), ("ask", SLIDE), ("ask",),
        ("ask", "--questions", "x"), ("ask", SLIDE, "q", "--questions", "x", "--out", "y"),
        ("ask", SLIDE, "q", "--choices", "one"), ("ask", SLIDE, "q", "-o", "permute=2"),
    ],
)  # fmt: skip
def test_wrong_usage(pathflip: Shell, arguments: tuple[str, ...]) -> None:
    code, found, err = pathflip(*arguments)
    assert code == 2, err
    assert found["error"]["hint"]


def test_evaluate_commands(pathflip: Shell, tuned: Tuned) -> None:
    code, found, err = pathflip("evaluate", "vqa", "--split", "all")
    assert (code, found["error"]["code"]) == (2, "no_questions"), err
    code, found, _ = pathflip("evaluate", "caption", "--split", "all", "--max-new-tokens", 4)
    assert code == 0
    assert found["n"] == 8
    assert {"bleu1", "bleu2", "bleu3", "rouge_l", "tfidf_similarity", "baseline"} <= set(found)
