"""Corpus of a run: slides with their texts and their split.

The corpus is read from the archive once, when the run begins, and kept beside it (data.parquet):
slides ingested later do not change a run that is resumed. Every order is a function of (seed,
epoch) alone, so it is the same on any number of workers and after any restart.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pathflip.archive import Archive
from pathflip.errors import ArchiveError, CheckpointError, ConfigError
from pathflip.splits import SPLITS, canonical_split


def rng_for(*key: object) -> np.random.Generator:
    """Return a generator seeded by the sha256 of a key: equal in every process."""
    digest = hashlib.sha256("\x1f".join(map(str, key)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Slides of a run, sorted by id; lists are parallel.

    Attributes:
        slide_ids: The slides.
        patients: Their patients; a slide without one is its own.
        splits: ``train`` or ``val``; test slides are not in a corpus.
        captions: Their texts; empty for a slide that has questions only.
        targets: In tuning what their captions are learned to be, empty where nothing is left of a
            text; None for the texts themselves.
        pieces: Sentences (or statements) of each caption, at least one unless it is empty.
        num_regions: Regions of each.
        fingerprints: Content and cut of each, as in ``slides.fingerprint``.
        questions: In tuning the questions about each, JSON lists of {question, answer, choices?}.
        about: Archive URI, encoder {name, revision, dim}, tiling, slots, counts of slides left out;
            in tuning also the models it began with.
    """

    slide_ids: list[str]
    patients: list[str]
    splits: list[str]
    captions: list[str]
    pieces: list[list[str]]
    num_regions: list[int]
    fingerprints: list[str]
    questions: list[str] | None = None
    targets: list[str] | None = None
    about: dict[str, Any] = field(repr=False)

    unit: ClassVar[str] = "slides"

    def __len__(self) -> int:
        return len(self.slide_ids)

    def members(self, split: str) -> NDArray[np.int64]:
        """Return the positions of the slides of a split, ascending."""
        return np.flatnonzero([name == split for name in self.splits]).astype(np.int64)

    def says(self, slide: int) -> str:
        """Return the text by which slides count as equal: the caption, else the slide id."""
        return self.captions[slide] or self.slide_ids[slide]

    def target_of(self, slide: int) -> str:
        """Return the text that a slide's caption is learned to be, by its position."""
        return (self.captions if self.targets is None else self.targets)[slide]

    def questions_of(self, slide: int) -> list[dict[str, Any]]:
        """Return the questions about a slide, by its position."""
        return json.loads(self.questions[slide]) if self.questions else []

    def counts(self) -> dict[str, int]:
        """Return slides, patients and regions of each split, for people."""
        found: dict[str, int] = {}
        for split in ("train", "val"):
            mine = self.members(split)
            found[f"{split}_slides"] = len(mine)
            found[f"{split}_patients"] = len({self.patients[i] for i in mine})
            found[f"{split}_regions"] = sum(self.num_regions[i] for i in mine)
            if self.questions is not None:
                found[f"{split}_captions"] = sum(bool(self.target_of(i)) for i in mine)
                found[f"{split}_questions"] = sum(len(self.questions_of(i)) for i in mine)
        return found

    def digest(self) -> str:
        """Return the sha256 of the corpus."""
        return digest_of(self)

    def save(self, path: str | Path) -> None:
        """Write the corpus as Parquet; ``about`` goes into the file's metadata."""
        save_items(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Corpus:
        """Read a corpus that :meth:`save` wrote.

        Raises:
            CheckpointError: If the file is damaged.
        """
        return load_items(cls, path)


# -- lists of items on disk -----------------------------------------------------------------------


class ItemList(Protocol):
    """List of a run's items: a dataclass of parallel lists, None where left out, and ``about``.

    Attributes:
        unit: Name of an item, in the plural.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]
    unit: ClassVar[str]


L = TypeVar("L", bound=ItemList)


def digest_of(items: ItemList) -> str:
    """Return the sha256 of a list of items."""
    body = [value for item in fields(items) if (value := getattr(items, item.name)) is not None]
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def save_items(items: ItemList, path: str | Path) -> None:
    """Write a list of items as Parquet; ``about`` and the digest go into the file's metadata."""
    given = {item.name: getattr(items, item.name) for item in fields(items)}
    about = json.dumps(given.pop("about") | {"digest": digest_of(items)})
    columns = {name: value for name, value in given.items() if value is not None}
    pq.write_table(pa.table(columns).replace_schema_metadata({"about": about}), path)


def load_items(kind: type[L], path: str | Path) -> L:
    """Read a list of items that :func:`save_items` wrote.

    Raises:
        CheckpointError: If the file is damaged.
    """
    try:
        table = pq.read_table(path)
        about = json.loads(table.schema.metadata[b"about"])
        digest = about.pop("digest")
        items: L = kind(**table.to_pydict(), **{"about": about})
        intact = digest_of(items) == digest
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
        intact = False
    if not intact:
        raise CheckpointError(
            f"{path}, the list of {kind.unit} of the run, is damaged.",
            hint="Restore it from a copy, or begin again in another run folder.",
            code="damaged",
        )
    return items


# -- choosing slides ------------------------------------------------------------------------------


def make_corpus(
    archive: Archive,
    *,
    encoder: str | None = None,
    source: str | None = None,
    subcaption_source: Literal["sentences", "affirmed", "statements"] = "sentences",
    seed: int = 0,
    val_fraction: float = 0.1,
    questions: bool = False,
    captioned: bool = True,
) -> Corpus:
    """Choose the slides to train on and the slides to validate on.

    A slide takes part if it is ready, has features of the encoder and a text. Its split is the
    archive's; slides without one are drawn by a hash of seed and patient. If the archive names
    training slides but none for validation, those are drawn from the training slides.

    Args:
        archive: The archive.
        encoder: Encoder of the features; may be left out where the archive holds one encoder.
        source: Source of the captions; without it, the first source (by name) each slide has.
        subcaption_source: Units that sub-captions are drawn from; slides without statements use
            their sentences, and those that only deny all of theirs.
        seed: Seed of the split.
        val_fraction: Share of patients held out to validate, where the archive has no split.
        questions: Whether the questions about slides, of all sources, are taken as well.
        captioned: Whether a slide without a caption is left out although it has questions.

    Raises:
        ArchiveError: No ready slide, no features of the encoder, no texts.
        ConfigError: A split of another name, or a patient with slides in several splits.
    """
    name, entry = archive.encoder(encoder)
    columns = ["slide_id", "patient_id", "split", "n_regions", "fingerprint"]
    ready = archive.slides("ready", columns=columns).to_pylist()
    if not ready:
        raise ArchiveError(
            f"The archive {archive.uri} has no slide that is ready.",
            hint=f"Ingest some: pathflip ingest SLIDES --archive {archive.uri}",
            code="no_slides",
        )
    embedded = archive.ready_ids(name)
    texts = _first_captions(archive, source)
    asked = _questions(archive) if questions else {}
    rows: list[tuple[dict[str, Any], str, list[str]]] = []
    for row in ready:
        if row["slide_id"] not in embedded or not row["n_regions"]:
            continue
        caption = texts.get(row["slide_id"])
        parts = _pieces(caption, subcaption_source) if caption else []
        if caption and parts:
            rows.append((row, caption["text"], parts))
        elif row["slide_id"] in asked and not captioned:
            rows.append((row, "", []))
    without = len(embedded & {row["slide_id"] for row in ready}) - len(rows)
    if not rows:
        of = "" if source is None else f" from source {source}"
        of += "" if captioned else " or a question"
        raise ArchiveError(
            f"None of the {len(embedded)} slides of {archive.uri} with features of {name} has a "
            f"caption{of}.",
            hint=f"Add them: pathflip archive import --archive {archive.uri} --captions FILE",
            code="no_captions",
        )
    splits = splits_of([row for row, _, _ in rows], seed=seed, val_fraction=val_fraction)
    order = sorted(
        (i for i, split in enumerate(splits) if split != "test"),
        key=lambda i: str(rows[i][0]["slide_id"]),
    )
    return Corpus(
        slide_ids=[rows[i][0]["slide_id"] for i in order],
        patients=[patient_of(rows[i][0]) for i in order],
        splits=[splits[i] for i in order],
        captions=[rows[i][1] for i in order],
        pieces=[rows[i][2] for i in order],
        num_regions=[rows[i][0]["n_regions"] for i in order],
        fingerprints=[rows[i][0]["fingerprint"] or "" for i in order],
        questions=[json.dumps(asked.get(rows[i][0]["slide_id"], [])) for i in order]
        if questions
        else None,
        about={
            "archive": archive.uri,
            "encoder": {"name": name, "revision": entry["revision"], "dim": entry["dim"]},
            "tiling": archive.tiling(),
            "slots": archive.slots,
            "left_out": {"test": splits.count("test"), "without_caption": without},
        },
    )


def _first_captions(archive: Archive, source: str | None) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for row in archive.captions(source).to_pylist():  # sorted by slide, then source
        if row["text"] and row["text"].strip():
            found.setdefault(row["slide_id"], row)
    return found


def _pieces(caption: dict[str, Any], kind: str) -> list[str]:
    """Return the units that a caption's sub-captions are drawn from; none of an empty caption."""
    from pathflip.text import denies, split_sentences

    parts = [part for part in caption["sentences"] or () if part.strip()]
    if kind == "statements" and caption["statements"]:
        parts = list(caption["statements"])
    parts = parts or split_sentences(caption["text"])
    if kind == "affirmed":
        parts = [part for part in parts if not denies(part)] or parts
    return parts


def _questions(archive: Archive) -> dict[str, list[dict[str, Any]]]:
    from pathflip.interop.questions import stored_questions

    found: dict[str, list[dict[str, Any]]] = {}
    for asked in stored_questions(archive):
        entry: dict[str, Any] = {"question": asked.question, "answer": asked.answer}
        if asked.choices:
            entry["choices"] = list(asked.choices)
        found.setdefault(asked.slide, []).append(entry)
    return found


def patient_of(slide: Mapping[str, Any]) -> str:
    """Return the patient of a row of ``slides``; a slide without one is its own."""
    return str(slide["patient_id"] or f"slide {slide['slide_id']}")


def splits_of(slides: Sequence[Mapping[str, Any]], *, seed: int, val_fraction: float) -> list[str]:
    """Return the split of each slide: as the archive names it, else drawn by patient.

    Args:
        slides: Rows of ``slides`` with slide_id, patient_id and split.
        seed: Seed of the draws.
        val_fraction: Share of patients drawn to validate, where no slide is named for it.

    Raises:
        ConfigError: A split of another name (``unknown_split``), or a patient with slides in
            several (``patient_in_splits``).
    """
    patients = [patient_of(row) for row in slides]
    named = [_split_name(row["split"], row["slide_id"]) for row in slides]
    owned = {patient: split for patient, split in zip(patients, named, strict=True) if split}
    draw_val = "val" not in owned.values()

    def drawn(patient: str) -> str:
        digest = hashlib.sha256(f"split\x1f{seed}\x1f{patient}".encode()).digest()
        share = int.from_bytes(digest[:8], "little") / 2**64
        return "val" if share < val_fraction else "train"

    found = []
    for patient, split in zip(patients, named, strict=True):
        split = split or owned.get(patient)
        if split is None or (split == "train" and draw_val):
            split = drawn(patient)
        found.append(split)
    _check_patients(patients, found)
    return found


def _split_name(given: str | None, slide_id: str) -> str | None:
    split = canonical_split(given)
    if split is not None and split not in SPLITS:
        raise ConfigError(
            f"Slide {slide_id} has split {given!r}.",
            hint="Splits are train, val and test: correct them by pathflip ingest --patients CSV.",
            code="unknown_split",
        )
    return split


def _check_patients(patients: list[str], splits: list[str]) -> None:
    seen: dict[str, str] = {}
    for patient, split in zip(patients, splits, strict=True):
        if seen.setdefault(patient, split) != split:
            raise ConfigError(
                f"Patient {patient} has slides in {seen[patient]} and in {split}.",
                hint="Split by patient: correct the splits with pathflip ingest --patients CSV.",
                code="patient_in_splits",
            )
