"""Caption targets: what a slide model's scores say of sentences, and what is left of a corpus."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pathflip.archive import Archive
from pathflip.archive.captions import Caption, write_captions
from pathflip.archive.commit import Committer
from pathflip.checkpoints import load_run
from pathflip.errors import ConfigError
from pathflip.training.dataset import Corpus, make_corpus
from pathflip.training.model_card import _targets
from pathflip.training.targets import judge, lifts, with_targets
from tests.tuning import Given, make_given


def test_lift_is_the_share_of_other_patients_slides_that_fit_less() -> None:
    scores = np.array([[0.9, 0.1], [0.5, 0.1], [0.2, 0.8], [0.7, 0.1]], np.float32)  # slides, texts
    patients = np.array(["P", "P", "Q", "R"])
    rows, columns = np.array([0, 1, 2, 2, 3]), np.array([0, 0, 0, 1, 1])
    # Slide 0 beats Q and R; slide 1 Q alone; slide 2 nobody, then all; slide 3 ties with two.
    expected = [1.0, 0.5, 0.0, 1.0, 2 * 0.5 / 3]
    assert lifts(scores, rows, columns, patients) == pytest.approx(expected)


def test_sentences_are_judged_by_their_neighbours() -> None:
    """Two directions of text: of one every lift is drawn by chance, of the other they are high."""
    rng = np.random.default_rng(0)

    def around(axis: int, count: int) -> np.ndarray:
        found = np.eye(8, dtype=np.float32)[axis] + 0.2 * rng.standard_normal((count, 8))
        return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)

    said = np.concatenate([around(0, 200), around(3, 200)])
    lift = np.concatenate([rng.uniform(0.4, 1, 200), rng.uniform(0, 1, 200)])
    texts = np.concatenate([around(0, 50), around(3, 50)])
    kept = judge(texts, said, lift)
    assert kept[:50].all()
    assert kept[50:].mean() < 0.25  # 0.05 of independent groups
    chance = judge(said, said, rng.uniform(0, 1, 400))
    assert chance.mean() < 0.15


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    """A tuning's inputs, some captions of which say what no slide shows."""
    given = make_given(tmp_path_factory.mktemp("targets"))
    captions = [
        Caption(slide_id="slide002", text="Lung. Dr. Lee concurs. No mucin. Clinically benign."),
        Caption(slide_id="slide004", text="Received in formalin. See note."),
        Caption(slide_id="slide005", text="The patient is 40 years old."),
    ]
    with Committer(given.archive) as committer:
        write_captions(committer, captions, source="captions")
    return given


def corpus_of(given: Given) -> Corpus:
    return make_corpus(Archive(given.archive), encoder="tex", questions=True, captioned=False)


def test_only_what_a_slide_can_show_is_a_target(given: Given) -> None:
    before = corpus_of(given)
    assert "slide005" in before.slide_ids
    assert not before.questions_of(before.slide_ids.index("slide005"))
    found = with_targets(before, Archive(given.archive), load_run(given.run), statements=False)
    at = found.slide_ids.index
    assert found.target_of(at("slide002")) == "Lung. No mucin."
    assert found.captions[at("slide002")].endswith("Clinically benign."), "the caption itself stays"
    assert found.target_of(at("slide004")) == ""  # it has questions
    assert found.questions_of(at("slide004"))
    assert "slide005" not in found.slide_ids, "nothing of it can be learned"
    assert len(found) == len(before) - 1
    others = [i for i, name in enumerate(found.slide_ids) if name not in ("slide002", "slide004")]
    assert all(found.target_of(i) == found.captions[i] for i in others)
    report = found.about["targets"]
    assert report["measured"].startswith("not measured")
    assert report["sentences"] - report["kept"] == 5
    assert {why: own["sentences"] for why, own in report["left_out"].items()} == {
        "person": 1, "clinical": 1, "specimen": 1, "admin": 1, "history": 1,
    }  # fmt: skip
    assert report["left_out"]["person"]["examples"] == ["Dr. Lee concurs."]
    assert report["slides_without_target"] == 2
    card = "\n".join(_targets(report))
    assert "| person | 1 |" in card
    assert "Lee" not in card, "cards are published"
    assert found.about["left_out"]["nothing_groundable"] == 1


def test_targets_are_kept_with_the_run(given: Given, tmp_path: Path) -> None:
    found = with_targets(
        corpus_of(given), Archive(given.archive), load_run(given.run), statements=False
    )
    found.save(tmp_path / "data.parquet")
    assert Corpus.load(tmp_path / "data.parquet") == found
    assert found.counts()["train_captions"] == sum(
        bool(found.target_of(i)) for i in found.members("train")
    )


def test_statements_are_taken_where_they_are_asked_for(given: Given) -> None:
    corpus = corpus_of(given)
    at = corpus.slide_ids.index("slide002")
    corpus.pieces[at] = ["A statement of lung.", "The patient coughs."]
    archive, run = Archive(given.archive), load_run(given.run)
    found = with_targets(corpus, archive, run, statements=True)
    assert found.target_of(found.slide_ids.index("slide002")) == "A statement of lung."


def test_captions_of_which_nothing_is_left_are_refused(given: Given) -> None:
    corpus = corpus_of(given)
    corpus.captions[:] = ["Received in formalin." for _ in corpus.captions]
    with pytest.raises(ConfigError) as refused:
        with_targets(corpus, Archive(given.archive), load_run(given.run), statements=False)
    assert refused.value.code == "nothing_groundable"
    assert "groundable=false" in str(refused.value.hint)
