"""Imports vectors of slides that slide encoders made elsewhere (TITAN, PRISM, GigaPath, …).

They become a table of embeddings of their own, beside those of patch encoders and trained models,
whose slides are found by each other. No model is loaded and none is needed, so nothing is found
there by words or by a picture.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathflip.archive import Archive, vectors
from pathflip.archive.archive import READY
from pathflip.archive.commit import Committer
from pathflip.archive.indexes import refresh_indexes
from pathflip.archive.slide_rows import SLIDE_FACTS, slide_embeddings
from pathflip.archive.storage import guarded
from pathflip.archive.tables import names_of
from pathflip.encoders import table_name
from pathflip.encoders.zoo import card
from pathflip.errors import ArchiveError, ConfigError
from pathflip.interop.features import apart
from pathflip.interop.features.encoders import UNSTATED, encoder_name
from pathflip.interop.features.record import SlideVector
from pathflip.interop.features.slide_files import read_slide_vectors
from pathflip.progress import Report

SETTING = "slide_encoder"


@dataclass(frozen=True, kw_only=True)
class SlideFeatureImport:
    """Settings of an import of slides' vectors.

    Attributes:
        encoder: Name of the slide encoder; where the folder has several, the one to import.
            ``NEW=NAME`` gives that of the files another name in the archive.
        revision: Revision of its weights; None if it is not known.
        licence: Licence of its weights; None if it is not known.
        replace: Whether a slide that has another vector gets the new one.
    """

    encoder: str | None = None
    revision: str | None = None
    licence: str | None = None
    replace: bool = False


@dataclass(frozen=True, kw_only=True)
class SlideFeaturesImported:
    """Result of an import of slides' vectors.

    Attributes:
        encoder: The slide encoder: name, dim, revision, licence.
        slides: Counts of slides: written, replaced, unchanged, refused.
        unmatched: Names that no slide of the archive has.
        ambiguous: Names that several slides have.
        refused: {file, or file and slide: code and reason}.
        others: Files that hold no vectors of slides, or those of other encoders.
    """

    encoder: dict[str, Any]
    slides: dict[str, int]
    unmatched: list[str]
    ambiguous: list[str]
    refused: dict[str, str] = field(default_factory=dict)
    others: int = 0

    def as_json(self) -> dict[str, Any]:
        """The document that ``pathflip archive import --slide-features --json`` prints."""
        return asdict(self)

    @property
    def exit_code(self) -> int:
        """0, or 3 where vectors were refused or are of no single slide."""
        return 3 if self.refused or self.ambiguous else 0


def slide_encoder_name(name: str) -> str:
    """Return the name in an archive of a slide encoder that another tool names.

    One that is called as a patch encoder is (GigaPath has both) is told apart.
    """
    reduced = table_name(name)
    patch_encoder = encoder_name(reduced)
    return f"{patch_encoder}_slide" if card(patch_encoder) is not None else reduced


def import_slide_features(
    archive: str,
    path: str | Path,
    config: SlideFeatureImport | None = None,
    *,
    dry_run: bool = False,
    progress: Report | None = None,
) -> SlideFeaturesImported:
    """Import the vectors of slides in a file or folder; the same call again writes nothing.

    Args:
        archive: Archive URI. Slides that it does not hold are told, never made.
        path: See :func:`pathflip.interop.features.slide_files.read_slide_vectors`.
        config: Settings.
        dry_run: Only say what would be done.
        progress: Progress callback.

    Raises:
        ConfigError: The files are of several encoders or lengths (``encoder``, ``other_length``),
            of no slide (``patient_vectors``, ``no_features``).
        ArchiveError: The archive is missing, damaged or locked, or holds the slide encoder in
            another revision or length (``settings``).
    """
    config = config or SlideFeatureImport()
    read = read_slide_vectors(path, progress=progress)
    apart.close()
    refused = {file: f"{error.code}: {error}" for file, error in read.problems.items()}
    if not read.found:
        raise ConfigError(
            f"No vector in {path} can be read; {next(iter(refused.values()))}", code="no_features"
        )
    name, found = _of_one_encoder(read.found, config)
    if dry_run:
        plan = _plan(Archive(archive), name, found, config)
    else:
        with Committer(archive) as committer:
            plan = _plan(committer.archive, name, found, config)
            if plan.todo:
                _write(committer, name, plan)
    refused |= plan.refused
    return SlideFeaturesImported(
        encoder={"name": name} | {key: plan.entry[key] for key in ("dim", "revision", "licence")},
        slides={key: plan.counts[key] for key in ("written", "replaced", "unchanged")}
        | {"refused": len(refused)},
        unmatched=plan.unmatched,
        ambiguous=plan.ambiguous,
        refused=refused,
        others=read.others + len({o.path for o in read.found} - {o.path for o in found}),
    )


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Vectors to write, {slide: [d]}, and the encoder's settings as they are or will be."""

    entry: dict[str, Any]
    todo: dict[str, NDArray[np.float32]]
    counts: Counter[str]
    refused: dict[str, str]
    unmatched: list[str]
    ambiguous: list[str]


def _plan(
    archive: Archive, name: str, found: Sequence[SlideVector], config: SlideFeatureImport
) -> _Plan:
    entry = {
        "dim": _length(found),
        "revision": config.revision or UNSTATED,
        "licence": config.licence or UNSTATED,
        **names_of(SETTING, name),
    }
    entry = _check(archive, name, entry, config)
    matches = archive.names().match(found, lambda one: (one.slide, False))
    chosen, refused = _chosen(archive, matches.found)
    stored = _stored(archive, name, entry)
    counts: Counter[str] = Counter()
    todo = {}
    for slide, (one, vector) in chosen.items():
        before = stored.get(slide)
        if before is not None and np.array_equal(before, vector):
            counts["unchanged"] += 1
        elif before is not None and not config.replace:
            refused[f"{one.path}: {one.slide}"] = (
                f"differs: slide {slide} has another vector of {name}; --replace takes this one."
            )
        else:
            counts["written" if before is None else "replaced"] += 1
            todo[slide] = vector
    return _Plan(
        entry=entry,
        todo=todo,
        counts=counts,
        refused=refused,
        unmatched=matches.unmatched,
        ambiguous=matches.ambiguous,
    )


def _write(committer: Committer, name: str, plan: _Plan) -> None:
    if name not in committer.archive.slide_encoders():
        made = {"created_at": datetime.now(UTC).isoformat(timespec="seconds")}
        committer.add_tables(f"{SETTING}:{name}", plan.entry | made)
    table = plan.entry["embeddings_table"]
    facts = committer.archive.slides(columns=list(SLIDE_FACTS), slide_ids=list(plan.todo))
    slides = facts.to_pylist()
    matrix = np.stack([plan.todo[slide["slide_id"]] for slide in slides])
    committer.replace_rows(table, slide_embeddings(slides, matrix))
    refresh_indexes(committer.lock, table)


def _of_one_encoder(
    found: Sequence[SlideVector], config: SlideFeatureImport
) -> tuple[str, list[SlideVector]]:
    """Return the name of the encoder to import, and its vectors."""
    named = {slide_encoder_name(one.encoder) for one in found if one.encoder}
    asked, _, theirs = (config.encoder or "").partition("=")
    if not asked and len(named) != 1:
        raise ConfigError(
            f"There are vectors of {len(named)} slide encoders: {', '.join(sorted(named))}."
            if named
            else "The files do not say which slide encoder made them.",
            hint="Name it: --encoder NAME.",
            code="encoder",
        )
    name = slide_encoder_name(asked) if asked else next(iter(named))
    wanted = slide_encoder_name(theirs) if theirs else name
    if wanted in named:
        chosen = [one for one in found if one.encoder and slide_encoder_name(one.encoder) == wanted]
    else:
        chosen = [one for one in found if not one.encoder]  # the one named is theirs
    if not chosen:
        raise ConfigError(
            f"No file holds vectors of {wanted}.",
            hint=f"There are: {', '.join(sorted(named))}.",
            code="encoder",
        )
    return name, chosen


def _length(found: Sequence[SlideVector]) -> int:
    """Return the length that all vectors have."""
    by_length = {len(one.vector): one for one in reversed(found)}
    if len(by_length) > 1:
        first, second = sorted(by_length)[:2]
        raise ConfigError(
            f"The vectors have several lengths: {by_length[first].path} has {first} numbers, "
            f"{by_length[second].path} {second}.",
            hint="Import those of one encoder: name its folder, or --encoder.",
            code="other_length",
        )
    return next(iter(by_length))


def _check(
    archive: Archive, name: str, entry: Mapping[str, Any], config: SlideFeatureImport
) -> dict[str, Any]:
    """Return the encoder's settings in the archive, as they are or will be."""
    held = archive.slide_encoders().get(name)
    if held is None:
        taken = entry["embeddings_table"] in archive.tables()
        if taken or name in {**archive.encoders(), **archive.models()}:
            raise ArchiveError(
                f"The archive {archive.uri} holds a patch encoder or a model {name}.",
                hint=f"Give the slide encoder another name: --encoder {name}_slide={name}.",
                code="settings",
            )
        return dict(entry)
    given = {"dim": entry["dim"], "revision": config.revision, "licence": config.licence}
    for key, value in given.items():
        if value is not None and value != held[key]:
            raise ArchiveError(
                f"The archive {archive.uri} holds slide encoder {name} with {key} {held[key]}, "
                f"not {value}.",
                hint="Vectors of two revisions do not compare: give this one another name, "
                f"--encoder NEW={name}.",
                code="settings",
            )
    return held


_Chosen = dict[str, tuple[SlideVector, NDArray[np.float32]]]


def _chosen(
    archive: Archive, matched: Sequence[tuple[SlideVector, list[str]]]
) -> tuple[_Chosen, dict[str, str]]:
    """Return {slide: its vector}, and the reasons of those that cannot be used."""
    ledger = archive.ledger()
    chosen: _Chosen = {}
    refused: dict[str, str] = {}
    doubled: set[str] = set()
    for one, (slide, *_) in matched:
        where = f"{one.path}: {one.slide}"
        with np.errstate(over="ignore"):
            vector = np.asarray(one.vector, np.float32)
        if not np.isfinite(vector).all():
            refused[where] = "not_finite: the vector holds values that are not finite."
        elif not vector.any():
            refused[where] = "zero: all numbers of the vector are 0, which points nowhere."
        elif ledger[slide]["status"] != READY:
            refused[where] = f"not_ready: slide {slide} is {ledger[slide]['status']}."
        elif slide in chosen and not np.array_equal(chosen[slide][1], vector):
            refused[where] = (
                f"same_slide: {chosen[slide][0].path} has another vector of slide {slide}; "
                "neither is taken."
            )
            doubled.add(slide)
        else:
            chosen.setdefault(slide, (one, vector))
    return {slide: pair for slide, pair in chosen.items() if slide not in doubled}, refused


def _stored(archive: Archive, name: str, held: Mapping[str, Any]) -> dict[str, NDArray[np.float32]]:
    """Return {slide: vector} that the archive holds of the encoder."""
    if name not in archive.slide_encoders():
        return {}
    table = held["embeddings_table"]
    with guarded(archive.uri, f"read the table {table}", damaged=True):
        rows = archive.dataset(table).to_table(columns=["slide_id", "vector"])
    if not rows.num_rows:
        return {}
    return dict(zip(rows["slide_id"].to_pylist(), vectors(rows["vector"]), strict=True))
