"""Caption targets of a tuning: the sentences of reports that a slide can show.

Two things decide, in this order:

* **wording**: rules of what no image could support, :mod:`pathflip.groundable`;
* **measurement**: what the slide model says of slides that it did not learn from. A sentence that
  tells of something in its slide fits that slide better than those of other patients: its *lift* is
  the share of those that it fits less, 0.5 by chance. One sentence says little, so a sentence is
  judged by the ``NEAREST`` validation sentences whose text vectors are nearest, and stays where
  their mean lift is above 0.5 by more than chance.

Sentences that deny are not measured: contrastive text encoders read "no necrosis" as necrosis.
docs/notes/instruct.md has both against a planted truth.

Shapes: S sentences, V validation sentences that are measured, n validation slides, d joint width.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pathflip.errors import ConfigError
from pathflip.groundable import VERSION, unsupported
from pathflip.text import denies, split_sentences
from pathflip.training.dataset import Corpus, rng_for

if TYPE_CHECKING:
    from pathflip.archive import Archive
    from pathflip.checkpoints import Run

logger = logging.getLogger(__name__)

NEAREST = 30
"""Validation sentences that a sentence is judged by."""
FEWEST_SENTENCES, FEWEST_PATIENTS = 200, 20
"""Validation sentences and patients below which nothing is measured."""
MOST_SLIDES = 400
"""Validation slides that are measured, at most."""
BY_CHANCE = 1.645
"""Standard errors above 0.5 that one in twenty groups reaches by chance."""
MEASURED = "measured"
"""Reason of a sentence that the measurement leaves out."""
EXAMPLES = 3


def with_targets(corpus: Corpus, archive: Archive, run: Run, *, statements: bool) -> Corpus:
    """Return a corpus whose caption targets are what slides can show.

    A slide of which nothing is left has no caption to learn; without questions it is left out.

    Args:
        corpus: Slides of the tuning.
        archive: The archive they are in.
        run: Pretraining run whose model measures.
        statements: Take the statements of captions, where they have some, for their sentences.

    Raises:
        ConfigError: Nothing is left of any training caption (``nothing_groundable``).
    """
    units = [
        list(pieces) if statements else split_sentences(caption)
        for caption, pieces in zip(corpus.captions, corpus.pieces, strict=True)
    ]
    texts = sorted({text for own in units for text in own})
    reasons = {text: why for text in texts if (why := unsupported(text)) is not None}
    affirmed = [text for text in texts if not denies(text)]
    judged, about = measured(corpus, units, affirmed, archive, run)
    seen = {text: MEASURED for text in affirmed if not judged.get(text, True)}
    reasons = seen | reasons
    targets = [" ".join(text for text in own if text not in reasons) for own in units]
    train = corpus.members("train").tolist()
    if not any(targets[i] for i in train):
        raise ConfigError(
            f"Nothing in the captions of {len(train):,} training slides is what a slide can show.",
            hint="Tune on whole reports: -o groundable=false",
            code="nothing_groundable",
        )
    kept = [
        i for i in range(len(corpus)) if targets[i] or not corpus.captions[i]
        or corpus.questions_of(i)
    ]  # fmt: skip
    report = {
        "rules": VERSION,
        **about,
        **_counts([units[i] for i in train], reasons),
        "slides_without_target": sum(
            bool(corpus.captions[i]) and not targets[i] for i in range(len(corpus))
        ),
    }
    _log(report)
    left_out = {**corpus.about["left_out"], "nothing_groundable": len(corpus) - len(kept)}
    return _only(
        replace(
            corpus,
            targets=targets,
            about=corpus.about | {"targets": report, "left_out": left_out},
        ),
        kept,
    )


def measured(
    corpus: Corpus,
    units: Sequence[Sequence[str]],
    texts: Sequence[str],
    archive: Archive,
    run: Run,
) -> tuple[dict[str, bool], dict[str, Any]]:
    """Judge texts by what the slide model says of the validation slides.

    Args:
        corpus: Slides of the tuning.
        units: Sentences of each slide.
        texts: Sentences to judge [S].
        archive: The archive of the slides.
        run: The pretraining run.

    Returns:
        {text: whether a slide can show it}, empty where too little can be measured; and what the
        record says of it: "measured" in words, "kept_by_chance": share of the validation sentences
        that stay when each is judged with the slide of another patient.
    """
    from pathflip.evaluation.encode import encode, list_slides

    place = {slide: i for i, slide in enumerate(corpus.slide_ids)}
    wanted = set(texts)
    try:
        unseen = list_slides(archive, run, splits=("val",))
    except ConfigError:  # the run held no slide out
        unseen = []
    val = {corpus.slide_ids[i] for i in corpus.members("val").tolist()}
    slides = [
        row
        for row in unseen
        if row.slide_id in val and wanted.intersection(units[place[row.slide_id]])
    ]
    slides = slides[:: max(1, -(-len(slides) // MOST_SLIDES))]
    said = [
        (row, text)
        for row, slide in enumerate(slides)
        for text in units[place[slide.slide_id]]
        if text in wanted
    ]
    patients = np.array([corpus.patients[place[slide.slide_id]] for slide in slides])
    if len(said) < FEWEST_SENTENCES or len(set(patients)) < FEWEST_PATIENTS:
        few = f"not measured: {len(said):,} sentences of {len(set(patients)):,} validation patients"
        return {}, {"measured": few}
    own = sorted({text for _, text in said})
    encoded = encode(archive, run, slides=slides, texts=own)
    every = _vectors(run, texts)
    place_of = {text: i for i, text in enumerate(texts)}
    vectors = every[[place_of[text] for text in own]]
    scores = encoded.slide @ vectors.T if encoded.local is None else encoded.local
    number = {text: i for i, text in enumerate(own)}
    rows = np.array([row for row, _ in said])
    columns = np.array([number[text] for _, text in said])
    kept = judge(every, vectors[columns], lifts(scores, rows, columns, patients))
    # The same sentences with the slides of other patients: what stays then, stays by chance.
    turned = rng_for("targets", corpus.digest()).permutation(len(slides))
    chance = judge(vectors, vectors[columns], lifts(scores, turned[rows], columns, patients))
    about = {
        "measured": f"measured on {len(said):,} sentences of {len(slides):,} validation slides",
        "kept_by_chance": round(float(chance[columns].mean()), 4),
    }
    return dict(zip(texts, kept.tolist(), strict=True)), about


def lifts(
    scores: NDArray[np.float32],
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    patients: NDArray[Any],
) -> NDArray[np.float64]:
    """Return the share of other patients' slides that a sentence fits less than its own [V].

    Args:
        scores: Fit of texts to slides [n, texts].
        rows: Slide of each sentence [V].
        columns: Its text [V].
        patients: Patient of each slide [n].
    """
    other = patients[rows][:, None] != patients[None, :]  # [V, n]
    own, every = scores[rows, columns][:, None], scores[:, columns].T
    less = ((every < own) + 0.5 * (every == own)) * other
    found: NDArray[np.float64] = less.sum(axis=1) / np.maximum(1, other.sum(axis=1))
    return found


def judge(
    texts: NDArray[np.float32],
    said: NDArray[np.float32],
    lift: NDArray[np.float64],
) -> NDArray[np.bool_]:
    """Return whether a slide can show each text [S]: its neighbours' mean lift is above chance.

    Args:
        texts: Text vectors, L2-normalised [S, d].
        said: Text vectors of the sentences that were measured [V, d].
        lift: Their lifts [V].
    """
    kept = np.zeros(len(texts), np.bool_)
    for start in range(0, len(texts), 1024):
        near = np.argsort(-(texts[start : start + 1024] @ said.T), axis=1, kind="stable")
        own = lift[near[:, :NEAREST]]
        error = own.std(axis=1, ddof=1) / np.sqrt(own.shape[1])
        kept[start : start + 1024] = own.mean(axis=1) - BY_CHANCE * error > 0.5
    return kept


def _vectors(run: Run, texts: Sequence[str]) -> NDArray[np.float32]:
    """Return the slide model's text vectors, L2-normalised [S, d]."""
    import torch

    if not texts:
        return np.zeros((0, run.model.config.d), np.float32)
    with torch.no_grad():
        found: NDArray[np.float32] = run.model.encode_text(list(texts)).float().cpu().numpy()
    return found


def _counts(units: Sequence[Sequence[str]], reasons: Mapping[str, str]) -> dict[str, Any]:
    """Return counts of the training sentences, and of what is left out with examples."""
    every = [text for own in units for text in own]
    left_out: dict[str, dict[str, Any]] = {}
    for text in every:
        if (why := reasons.get(text)) is not None:
            own = left_out.setdefault(why, {"sentences": 0, "examples": []})
            own["sentences"] += 1
            if text not in own["examples"] and len(own["examples"]) < EXAMPLES:
                own["examples"].append(text)
    order = sorted(left_out, key=lambda why: -left_out[why]["sentences"])
    return {
        "sentences": len(every),
        "kept": sum(text not in reasons for text in every),
        "left_out": {why: left_out[why] for why in order},
    }


def _log(report: Mapping[str, Any]) -> None:
    gone = report["sentences"] - report["kept"]
    if gone:
        reasons = (
            f"{why} {own['sentences']:,} ({own['examples'][0]})"
            for why, own in report["left_out"].items()
        )
        logger.warning(
            "Captions are learned without %s of %s sentences that no slide can show: %s. "
            "-o groundable=false learns whole reports.",
            f"{gone:,}", f"{report['sentences']:,}", "; ".join(reasons),
        )  # fmt: skip


def _only(corpus: Corpus, kept: Sequence[int]) -> Corpus:
    """Return a corpus of some of its slides."""
    lists = {item.name: getattr(corpus, item.name) for item in fields(corpus)}
    del lists["about"]
    chosen: dict[str, Any] = {
        name: None if values is None else [values[i] for i in kept]
        for name, values in lists.items()
    }
    return replace(corpus, **chosen)
