"""Instruction examples of a slide in an epoch, and the settings of a tuning."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pathflip.archive import Archive
from pathflip.errors import ArchiveError, CheckpointError, ConfigError
from pathflip.interop.questions import import_questions
from pathflip.models.chat_template import CAPTION_INSTRUCTION, Example
from pathflip.text import CANNOT_TELL
from pathflip.training.config import (
    TUNE_PRESETS,
    PretrainConfig,
    TuneConfig,
    resolve,
    resolve_tuning,
)
from pathflip.training.dataset import Corpus, make_corpus
from pathflip.training.examples import Examples, all_examples, draw_examples
from pathflip.training.instruct import Instruct
from pathflip.training.loop_config import read_settings, save_settings
from pathflip.training.optim import parameter_groups
from pathflip.training.slide_batches import SlideDataset
from tests.archives import make_archive

QUESTIONS: list[dict[str, Any]] = [
    {"question": "Organ?", "answer": "lung", "choices": ["colon", "lung", "breast", "muscle"]},
    {"question": "Any?", "answer": "yes", "choices": ["yes", "no"]},
    {"question": "Why?", "answer": "It grew."},
]
USUAL = Examples(most=3, caption_share=0.5, drop_options_prob=0.25, caption_epochs=2)
CAPTION = Example(instruction=CAPTION_INSTRUCTION, answer="Lung.", kind="caption")
GIVEN = {"run": "run", "llm": "llm"}


def drawn(
    sampling: Examples, epoch: int, *, caption: str = "Lung.", slide: str = "s", seed: int = 0
) -> list[Example]:
    return draw_examples(caption, QUESTIONS, sampling, seed=seed, epoch=epoch, slide_id=slide)


def test_a_draw_is_of_seed_epoch_and_slide() -> None:
    one = [drawn(USUAL, epoch) for epoch in range(2, 20)]
    assert one == [drawn(USUAL, epoch) for epoch in reversed(range(2, 20))][::-1]
    for other in ({"slide": "t"}, {"seed": 1}):
        assert one != [drawn(USUAL, epoch, **other) for epoch in range(2, 20)]  # type: ignore[arg-type]
    assert len({tuple(found) for found in one}) > 10


def test_captions_first() -> None:
    assert drawn(USUAL, 0) == drawn(USUAL, 1) == [CAPTION]
    asked = drawn(USUAL, 0, caption="")  # a slide without a caption is not idle meanwhile
    assert len(asked) == 3
    assert all(example.kind == "question" for example in asked)
    only = draw_examples("Lung.", [], USUAL, seed=0, epoch=9, slide_id="s")
    assert only == [CAPTION]


@pytest.mark.parametrize("most", [1, 2, 3, 9])
def test_shares_of_captions_and_open_questions(most: int) -> None:
    sampling = replace(USUAL, most=most)
    every = [drawn(sampling, epoch) for epoch in range(2, 802)]
    for found in every:
        there = CAPTION in found
        assert len(found) == min(most, 3 + there)
        assert len(set(found)) == len(found)
    assert 0.44 < sum(CAPTION in found for found in every) / 800 < 0.56  # 3.4 standard deviations
    asked = [one for found in every for one in found if one.instruction.startswith(("Or", "Any"))]
    share = sum("\n" not in one.instruction for one in asked) / len(asked)
    assert abs(share - 0.25) < 3.5 * (0.1875 / len(asked)) ** 0.5
    for value in (0.0, 1.0):
        extreme = replace(sampling, caption_share=value, drop_options_prob=value)
        for epoch in range(2, 12):
            found = drawn(extreme, epoch)
            assert (CAPTION in found) == bool(value)
            assert all(("\n" in one.instruction) != bool(value) or one.instruction == "Why?"
                       for one in found if one != CAPTION)  # fmt: skip


def test_options_are_shuffled_and_answered_by_letter_and_text() -> None:
    sampling = Examples(most=1, caption_share=0.0, drop_options_prob=0.0, caption_epochs=0)
    letters: Counter[str] = Counter()
    for epoch in range(1200):
        (one,) = draw_examples("", QUESTIONS[:1], sampling, seed=0, epoch=epoch, slide_id="s")
        head, *lines = one.instruction.splitlines()
        assert head == "Organ?"
        assert sorted(line[3:] for line in lines) == sorted(QUESTIONS[0]["choices"])
        assert one.answer in lines
        assert one.answer.endswith(". lung")
        letters[one.answer[0]] += 1
    assert set(letters) == set("ABCD")
    assert all(abs(count - 300) < 60 for count in letters.values())  # 4 standard deviations


def test_validation_asks_the_same_each_time() -> None:
    found = all_examples("Lung.", QUESTIONS, replace(USUAL, most=2))
    assert found == [
        CAPTION,
        Example(instruction="Organ?\nA. colon\nB. lung\nC. breast\nD. muscle", answer="B. lung"),
        Example(instruction="Any?\nA. yes\nB. no", answer="A. yes"),
    ]
    assert all_examples("", QUESTIONS[2:], USUAL) == [
        Example(instruction="Why?", answer="It grew.")
    ]


def test_how_captions_are_written() -> None:
    caption = "There is mucin. Lung. No necrosis. There is mucin."
    shuffled = replace(USUAL, captions="shuffled")
    found = [drawn(shuffled, 0, caption=caption, slide=f"s{n}")[0].answer for n in range(90)]
    assert len(set(found)) == 12
    assert {" ".join(sorted(said.split())) for said in found} == {" ".join(sorted(caption.split()))}
    assert all_examples(caption, [], shuffled)[0].answer == caption
    affirmed = replace(USUAL, captions="affirmed")
    assert drawn(affirmed, 0, caption=caption)[0].answer == "Lung. There is mucin."
    assert all_examples(caption, [], affirmed)[0].answer == "Lung. There is mucin."
    denied = "No mucin. No necrosis."
    assert all_examples(denied, [], affirmed)[0].answer == denied  # rather than nothing


def test_options_may_be_answered_by_their_text() -> None:
    sampling = replace(USUAL, letters=False, drop_options_prob=0.5)
    found = [one for n in range(40) for one in drawn(sampling, 9, slide=f"s{n}")]
    asked = [one for one in found if one.instruction.startswith("Organ?")]
    assert {one.answer for one in asked} == {"lung"}
    assert {"\n" in one.instruction for one in asked} == {True, False}
    never = replace(USUAL, letters=False, drop_options_prob=1.0)
    assert all("\n" not in one.instruction for one in all_examples("", QUESTIONS, never))


CANNOT: dict[str, Any] = {"question": "Age?", "answer": CANNOT_TELL, "choices": ["40", "60"]}


def test_a_question_that_cannot_be_answered_is_shown_so_among_its_options() -> None:
    sampling = Examples(most=1, caption_share=0, drop_options_prob=0, caption_epochs=0,
                        abstain_share=0.5)  # fmt: skip
    for epoch in range(20):
        (one,) = draw_examples("", [CANNOT], sampling, seed=0, epoch=epoch, slide_id="s")
        assert one.instruction.endswith(f"C. {CANNOT_TELL}")
        assert one.answer == f"C. {CANNOT_TELL}"
    found = [
        draw_examples("", QUESTIONS[:1], sampling, seed=0, epoch=epoch, slide_id="s")[0]
        for epoch in range(200)
    ]
    share = sum(one.instruction.endswith(f"E. {CANNOT_TELL}") for one in found) / 200
    assert 0.37 < share < 0.63  # 3.5 standard deviations
    assert all(one.answer.endswith(". lung") for one in found)


def test_it_is_answered_in_words_where_no_options_are_shown() -> None:
    never = replace(USUAL, letters=False, drop_options_prob=1.0, abstain_share=0.5)
    assert all_examples("", [CANNOT], never) == [Example(instruction="Age?", answer=CANNOT_TELL)]


def test_options_that_say_so_themselves_are_left_as_they_are() -> None:
    own = {"question": "Age?", "answer": "40", "choices": ["40", "It cannot be determined"]}
    full = {"question": "Which?", "answer": "1", "choices": [str(n) for n in range(8)]}
    sampling = replace(USUAL, most=2, drop_options_prob=0.0, abstain_share=1.0)
    for one in all_examples("", [own, full], sampling):
        assert CANNOT_TELL not in one.instruction


def test_slides_with_questions_only_take_part(tmp_path: Path) -> None:
    """They do where no caption is needed, in every epoch, and the corpus is read back as it was."""
    where = make_archive(tmp_path / "a", slides=6, captions=False)
    rows = [f"slide00{n},Organ?,colon|lung,A\n" for n in range(4)]
    (tmp_path / "q.csv").write_text("slide,question,choices,answer\n" + "".join(rows))
    import_questions(str(where), tmp_path / "q.csv")
    archive = Archive(where)
    with pytest.raises(ArchiveError, match="has a caption"):
        make_corpus(archive, questions=True, captioned=True)
    corpus = make_corpus(archive, questions=True, captioned=False, val_fraction=0)
    assert corpus.slide_ids == [f"slide00{n}" for n in range(4)]
    assert set(corpus.captions) == {""}
    assert (corpus.counts()["train_captions"], corpus.counts()["train_questions"]) == (0, 4)
    corpus.save(tmp_path / "data.parquet")
    loaded = Corpus.load(tmp_path / "data.parquet")
    assert (loaded, loaded.digest()) == (corpus, corpus.digest())
    sampling = resolve_tuning(given=GIVEN, overrides=["batch_size=2"]).sampling()
    batches = SlideDataset(loaded, sampling)
    for epoch in (0, 7):  # while captions alone are shown, and after
        batch = batches.batch([0, 2], epoch=epoch)
        assert [len(own) for own in batch.examples] == [1, 1]
        assert all(own[0].instruction.startswith("Organ?") for own in batch.examples)
        assert batch.subcaptions == [[], []]


# -- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(TUNE_PRESETS))
def test_every_preset_resolves_and_is_read_back(name: str, tmp_path: Path) -> None:
    made = resolve_tuning(name, given=GIVEN)
    assert made.preset == name
    assert made.run == str(Path.cwd() / "run")
    (tmp_path / "config.yaml").write_text(save_settings(made))
    assert read_settings(tmp_path, TuneConfig) == made
    with pytest.raises(CheckpointError, match="is a run of pathflip tune"):
        read_settings(tmp_path, PretrainConfig)


def test_the_published_code_has_one_stage() -> None:
    made = resolve_tuning("instruct/official_v1", given=GIVEN)
    assert (made.instruct.prefix, made.instruct.template) == ("mean", "official_v1")
    (stage,) = Instruct(made).stages(10)
    assert (stage.name, stage.start, stage.steps) == ("all", 0, 10 * made.epochs)
    first, second = Instruct(resolve_tuning(given=GIVEN)).stages(10)
    assert (first.name, first.start, first.steps, first.lr, first.weight_decay) == (
        "projector", 0, 50, 1e-3, 0.0,
    )  # fmt: skip
    assert (second.name, second.start, second.steps, second.lr) == ("all", 50, 20, 1e-4)


def test_settings_tell_which_training_they_are_of(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(save_settings(resolve("pathflip/mini")))
    assert read_settings(tmp_path, PretrainConfig) == resolve("pathflip/mini")
    with pytest.raises(CheckpointError, match="is a run of pathflip pretrain"):
        read_settings(tmp_path, TuneConfig)
    said = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert (said["kind"], said["family"]) == ("contrastive", "pathflip")
    older = {key: value for key, value in said.items() if key not in ("kind", "family")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(older))
    assert read_settings(tmp_path, PretrainConfig) == resolve("pathflip/mini")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["preset=pathflip/mini"], "no preset 'pathflip/mini'"),
        (["caption_share=1.5"], "caption_share is 1.5"),
        (["examples_per_slide=0"], "examples_per_slide is 0"),
        (["align=0.5", "instruct.train_vision=false"], "the vision model does not train"),
        (["instruct.lora_rr=3"], "no setting 'lora_rr'"),
        (["projector_epochs=-1"], "projector_epochs is -1"),
    ],
)
def test_what_cannot_be_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_tuning(overrides=overrides, given=GIVEN)


def test_parts_may_have_rates_of_their_own() -> None:
    model = torch.nn.ModuleDict(
        {name: torch.nn.Linear(2, 2) for name in ("llm", "projector", "vision")}
    )
    model["llm"].requires_grad_(False)
    model["llm"].weight.requires_grad_(True)
    groups = parameter_groups(model, 0.1, {"projector": 3.0, "vision": 0.5})
    found = {
        id(parameter): (group["rate"], group["weight_decay"])
        for group in groups
        for parameter in group["params"]
    }
    assert found == {
        id(model["llm"].weight): (1.0, 0.1),
        id(model["projector"].weight): (3.0, 0.1),
        id(model["projector"].bias): (3.0, 0.0),
        id(model["vision"].weight): (0.5, 0.1),
        id(model["vision"].bias): (0.5, 0.0),
    }


def test_both_models_are_asked_for() -> None:
    with pytest.raises(ConfigError, match="language model is not named"):
        resolve_tuning(given={"run": "run"})


def test_sub_captions_are_drawn_only_where_they_are_used() -> None:
    assert TuneConfig().sampling().num_subcaptions == 0
    assert TuneConfig(align=0.5).sampling().num_subcaptions == 8
