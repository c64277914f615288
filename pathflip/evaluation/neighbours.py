"""Retrieval of slides by slides: whether those nearest to a slide have its label.

Several spaces (patch encoders, trained models, slide encoders whose vectors were imported) are
measured over the same slides, so that they compare. Slides of the query's own patient are no
candidates: they would be found by what is the patient's.

Shapes: n slides, d the width of a space, K values of k.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from pathflip.archive import vectors
from pathflip.archive.search import vector_space
from pathflip.archive.storage import guarded
from pathflip.errors import ArchiveError, ConfigError
from pathflip.evaluation.bootstrap import RESAMPLES, interval, patient_weights, support

if TYPE_CHECKING:
    from pathflip.archive import Archive

KS = (1, 3, 5)


def precision_at(
    space: NDArray[Any],
    labels: Sequence[str],
    patients: Sequence[str | None],
    ks: Sequence[int] = KS,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Measure the share of the k nearest slides that have the query's label.

    Args:
        space: Vectors [n, d], none of them zero.
        labels: Label of each slide [n].
        patients: Patient of each slide [n]; a slide of none is a patient of its own.
        ks: Values of k; where there are fewer candidates, all of them.

    Returns:
        Shares [n, K], and the share among all candidates [n], which is that of a random order. NaN
        of slides without a candidate of their label.
    """
    unit = np.asarray(space, np.float64)
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    kind = np.asarray(labels)
    own = np.array([f"p {p}" if p else f"s {i}" for i, p in enumerate(patients)])
    found = np.full((len(unit), len(ks)), np.nan)
    chance = np.full(len(unit), np.nan)
    for at, vector in enumerate(unit):
        others = np.flatnonzero(own != own[at])
        same = kind[others] == kind[at]
        if not same.any():
            continue
        order = np.argsort(-(unit @ vector)[others], kind="stable")
        chance[at] = same.mean()
        found[at] = [same[order[:k]].mean() for k in ks]
    return found, chance


def neighbours(
    archive: Archive,
    label: str,
    spaces: Sequence[str] = (),
    *,
    split: str | None = None,
    ks: Sequence[int] = KS,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare spaces by the labels of the slides nearest to each slide.

    Args:
        archive: The archive.
        label: Name of the label.
        spaces: Encoders, models and slide encoders whose vectors the archive holds; all of them
            where none is named.
        split: Only slides of this split.
        ks: Values of k.
        resamples: Number of bootstrap resamples of patients.
        seed: Seed of the bootstrap.

    Returns:
        {"label", "n", "alone", "classes": {label: slides}, "chance", "spaces": {name: {"p@1": …,
        "ci": {"p@1": [low, high], …}}}}: ``n`` slides have the label and a vector in every space;
        ``alone`` of them have no other patient's slide of their label and count nowhere.

    Raises:
        ArchiveError: The archive has no vectors of a space (``unknown_encoder``).
        ConfigError: No two slides of two patients can be compared (``no_labels``).
    """
    kinds = {
        "encoder": archive.encoders(), "model": archive.models(),
        "slide_encoder": archive.slide_encoders(),
    }  # fmt: skip
    held = {name: kind for kind, names in kinds.items() for name in names}
    for name in spaces:
        if name not in held:
            raise ArchiveError(
                f"The archive {archive.uri} has no vectors of {name}.",
                hint=f"It has those of {', '.join(held) or 'none'}.",
                code="unknown_encoder",
            )
    chosen = list(dict.fromkeys(spaces)) or list(held)
    of = {name: _of_slides(archive, name, kind=held[name]) for name in chosen}
    rows = archive.slides("ready", columns=["slide_id", "patient_id", "split", "labels"])
    slides: list[str] = []
    labels: list[str] = []
    patients: list[str | None] = []
    labelled: set[str] = set()
    for row in rows.to_pylist():
        of_slide = json.loads(row["labels"] or "{}")
        labelled |= of_slide.keys()
        value = of_slide.get(label)
        in_all = all(row["slide_id"] in space for space in of.values())
        if value and in_all and split in (None, row["split"]):
            slides.append(row["slide_id"])
            labels.append(value)
            patients.append(row["patient_id"])
    measured = {
        name: precision_at(np.stack([x[slide] for slide in slides]), labels, patients, ks)
        for name, x in of.items()
        if slides
    }
    chance = next(iter(measured.values()), (None, np.array([])))[1]
    counted = np.isfinite(chance)
    if not counted.any():
        raise _nothing(label, chosen, labelled, splits=set(rows["split"].to_pylist()), split=split)
    who = [patient for patient, use in zip(patients, counted, strict=True) if use]
    weights = patient_weights(who, resamples=resamples, seed=seed)
    weights = weights / weights.sum(axis=1, keepdims=True)
    on = support(who, graded=True)
    document: dict[str, Any] = {}
    for name, (found, _) in measured.items():
        shares = found[counted]
        means = shares.mean(axis=0)
        document[name] = {f"p@{k}": float(mean) for k, mean in zip(ks, means, strict=True)}
        document[name]["ci"] = {
            f"p@{k}": interval(weights @ shares[:, i], float(means[i]), on)
            for i, k in enumerate(ks)
        }
    return {
        "label": label,
        "n": len(slides),
        "alone": int((~counted).sum()),
        "classes": {value: labels.count(value) for value in sorted(set(labels))},
        "chance": float(chance[counted].mean()),
        "spaces": document,
    }


def _nothing(
    label: str,
    spaces: Sequence[str],
    labelled: set[str],
    *,
    splits: set[str | None],
    split: str | None,
) -> ConfigError:
    """Return the error for slides of which no two compare; its hint names what is wrong."""
    within = "" if split is None else f" of split {split}"
    hint = "Take more slides, or fewer vectors: --space NAME."
    if not labelled:
        hint = "Import labels: pathflip archive import --labels FILE."
    elif label not in labelled:
        hint = f"The archive has the labels {', '.join(sorted(labelled))}."
    elif split is not None and split not in splits:
        known = sorted(one for one in splits if one)
        hint = f"The archive has the splits {', '.join(known)}." if known else "It has no splits."
    return ConfigError(
        f"No two slides{within} of two patients have the same label {label} and vectors of "
        f"{', '.join(spaces)}.",
        hint=hint,
        code="no_labels",
    )


def _of_slides(archive: Archive, name: str, *, kind: str) -> dict[str, NDArray[np.float32]]:
    """Return {slide: vector} of the slides that a space has; zero vectors point nowhere."""
    named = {"model": name} if kind == "model" else {"encoder": name}
    table = vector_space(archive, **named).table
    where = pc.field("kind") == "slide"
    with guarded(archive.uri, f"read the table {table}", damaged=True):
        rows = archive.dataset(table).to_table(columns=["slide_id", "vector"], filter=where)
    found = zip(rows["slide_id"].to_pylist(), vectors(rows["vector"]), strict=True)
    return {slide: vector for slide, vector in found if vector.any()}
