"""Reads what a user gives beside the slides: resolutions, tissue outlines, patients.

A line means a slide by one of its names (:mod:`pathflip.archive.slide_names`). Before a slide is
read only its paths are known, and two of them may be copies of one slide. So a line whose name
several paths carry is given to a slide only if all of these turn out to be its own.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from jobs.ingest.config import IngestConfig
from pathflip.archive.slide_names import SlideNames, outline_files
from pathflip.errors import ConfigError
from pathflip.interop.captions import CaptionRow, read_captions
from pathflip.interop.labels import read_patients, read_resolutions
from pathflip.interop.questions import Question, read_questions
from pathflip.interop.tables import loosely
from pathflip.slides.sources import FOREIGN_SUFFIXES

logger = logging.getLogger(__name__)

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class Entry(Generic[Value]):
    """A line of a side file, or a file of a folder.

    Attributes:
        name: Name of the slide, of the case where ``is_case``.
        value: Resolution, outline or patient given for it.
        where: File and line, for messages.
        is_case: Whether the name is a case's, so that all of its slides are meant.
    """

    name: str
    value: Value
    where: str
    is_case: bool = False


@dataclass(frozen=True, kw_only=True)
class Outline:
    """A tissue outline: the first digits of its sha256, and the path of the GeoJSON."""

    digest: str
    path: str = field(compare=False)


class SideFile(Generic[Value]):
    """Entries of a side file by the paths of the slides they mean.

    Args:
        file: The file or folder, for messages.
        entries: Its entries.
        names: Names of the slides there are, keyed by path.
        slide_of: Slide of each path that the archive knows: equal ones are copies.

    Raises:
        ConfigError: If two entries give one slide different things.
    """

    def __init__(
        self,
        file: str,
        entries: Sequence[Entry[Value]],
        names: SlideNames,
        slide_of: Mapping[str, str] | None = None,
    ) -> None:
        self._file = file
        self._rows = len(entries)
        self._matches = names.match(entries, lambda entry: (entry.name, entry.is_case))
        self._of_path: dict[str, list[tuple[Entry[Value], frozenset[str]]]] = {}
        self._clear: set[str] = set()  # names carried by several paths, all of one slide
        for entry, paths in self._matches.unclear:
            if len({(slide_of or {}).get(path) or os.path.realpath(path) for path in paths}) == 1:
                self._clear.add(entry.name)
        for entry, paths in (*self._matches.found, *self._matches.unclear):
            for path in paths:
                others = self._of_path.setdefault(path, [])
                if len(paths) == 1:
                    _check_equal(entry, [other for other, meant in others if len(meant) == 1])
                others.append((entry, frozenset(paths)))

    def find(self, paths: Iterable[str]) -> Value | None:
        """Return what is given for a slide; None if nothing is.

        Args:
            paths: All paths that hold the slide, the one it is read from first.
        """
        own = dict.fromkeys(paths)
        found: list[Entry[Value]] = []
        for path in own:
            entries = self._of_path.get(path, ())
            for entry, meant in sorted(entries, key=lambda one: len(one[1])):
                if meant <= own.keys():
                    found.append(entry)
                    self._clear.add(entry.name)
        for entry in found[1:]:
            if entry.value != found[0].value:
                logger.warning(
                    "%s is about a copy of the slide of %s, and is not used.",
                    entry.where,
                    found[0].where,
                )
        return found[0].value if found else None

    def require_clear(self) -> None:
        """Refuse names that several files carry, unless they are one file and links to it.

        Raises:
            ConfigError: If there is one.
        """
        for entry, paths in self._matches.unclear:
            if entry.name not in self._clear:
                raise ConfigError(
                    f"{entry.where}: {paths[0]} and {paths[1]} have the same name, so it is not "
                    f"clear which of them {entry.name} means.",
                    hint="Write the path, or as many of its folders as tell the two apart.",
                )

    def of_path(self, path: str) -> Value | None:
        """Return what is given for one path, once all is clear; None if nothing is."""
        entries = self._of_path.get(path)
        return entries[0][0].value if entries else None

    def report(self) -> dict[str, Any]:
        """Return {"rows", "matched": counts of entries, "unmatched", "ambiguous": names}."""
        clear = sum(entry.name in self._clear for entry, _ in self._matches.unclear)
        return {
            "rows": self._rows,
            "matched": len(self._matches.found) + clear,
            "unmatched": self._matches.unmatched,
            "ambiguous": [name for name in self._matches.ambiguous if name not in self._clear],
        }

    def warn(self, kind: str) -> None:
        """Log how many names are ``unmatched`` or ``ambiguous``, with one of them."""
        what = {"unmatched": "name no slide", "ambiguous": "name several slides"}[kind]
        if names := self.report()[kind]:
            logger.warning(
                "%s: %d of %d entries %s, such as %s.",
                self._file, len(names), self._rows, what, names[0],
            )  # fmt: skip


def _check_equal(entry: Entry[Value], others: Sequence[Entry[Value]]) -> None:
    for other in others:
        if other.value != entry.value:
            raise ConfigError(
                f"{entry.where}: {entry.name} is the slide of {other.where} again, and differs.",
                hint="Keep one of them.",
            )


@dataclass(frozen=True, kw_only=True)
class SideFiles:
    """The side files of an ingest, those that were given.

    Attributes:
        mpp: µm per level-0 px of slides.
        tissue: Tissue outlines of slides.
        patients: Patient, split and labels of slides, as columns of the table ``slides``.
        texts: Captions and questions, for their names alone: they are imported at the end.
        skipped: {suffix: {"files", "example"}} of files in the slides' folders that are no slides.
    """

    mpp: SideFile[float] | None = None
    tissue: SideFile[Outline] | None = None
    patients: SideFile[dict[str, Any]] | None = None
    texts: Mapping[str, SideFile[None]] = field(default_factory=dict)
    skipped: Mapping[str, dict[str, Any]] = field(default_factory=dict)

    def people(self, paths: Iterable[str]) -> dict[str, Any]:
        """Return patient_id, split and labels of a slide; empty if none are given.

        Args:
            paths: All paths that hold the slide, the one it is read from first.
        """
        return {} if self.patients is None else self.patients.find(paths) or {}

    def report(self) -> dict[str, dict[str, Any]]:
        """Return the report of each file that was given."""
        given = {"mpp_csv": self.mpp, "tissue": self.tissue, "patients": self.patients}
        found = {name: one.report() for name, one in given.items() if one is not None}
        return found | ({"skipped_files": dict(self.skipped)} if self.skipped else {})

    def warn(self, kind: str) -> None:
        """Log the names that are ``unmatched`` or ``ambiguous`` in each file."""
        for one in (self.mpp, self.tissue, self.patients):
            if one is not None:
                one.warn(kind)
        for suffix in FOREIGN_SUFFIXES if kind == "unmatched" else ():
            if own := self.skipped.get(suffix):
                logger.warning(
                    "%d %s files are left out, which OpenSlide does not read, such as %s.",
                    own["files"], suffix, own["example"],
                )  # fmt: skip


def read_side_files(
    config: IngestConfig, paths: Sequence[str], *, slide_of: Mapping[str, str]
) -> SideFiles:
    """Read the side files that the settings name, and finds the slides that they mean.

    Args:
        config: Settings.
        paths: Slides of this run.
        slide_of: {path: slide_id} of what the archive holds, copies included: patients of its
            slides may be given as well.

    Raises:
        ConfigError: A file is missing or wrong, a line that changes how a slide is read may mean
            two of them, or no outline is of a slide of this run.
    """
    names = SlideNames.from_paths(paths)
    every = SlideNames.from_paths([*paths, *slide_of])
    mpp = tissue = patients = None
    if config.mpp_csv is not None:
        mpp = SideFile(config.mpp_csv, list_resolutions(config.mpp_csv), names)
        mpp.require_clear()
    if config.tissue_dir is not None:
        tissue = SideFile(
            config.tissue_dir,
            list_outlines(config.tissue_dir, classes=config.tissue_classes),
            names,
        )
        tissue.require_clear()
        _require_match(config.tissue_dir, tissue)
    if config.patients is not None:
        people = read_people(config.patients)
        _warn_of_spellings(config.patients, people)
        patients = SideFile(config.patients, people, every, slide_of)
    texts: dict[str, SideFile[None]] = {}
    if config.captions is not None:
        captions = read_captions(config.captions)
        texts["captions"] = _names_of(config.captions, captions, every, slide_of)
    if config.questions is not None:
        questions = read_questions(config.questions)
        texts["questions"] = _names_of(config.questions, questions, every, slide_of)
    return SideFiles(mpp=mpp, tissue=tissue, patients=patients, texts=texts)


def _names_of(
    file: str,
    rows: Sequence[CaptionRow] | Sequence[Question],
    names: SlideNames,
    slide_of: Mapping[str, str],
) -> SideFile[None]:
    entries: list[Entry[None]] = [
        Entry(name=row.slide, value=None, where=f"{file}, line {row.line}", is_case=row.is_case)
        for row in rows
    ]
    return SideFile(file, entries, names, slide_of)


def _require_match(folder: str, tissue: SideFile[Outline]) -> None:
    report = tissue.report()
    if not report["matched"]:
        raise ConfigError(
            f"No outline in {folder} has the name of a slide, {report['unmatched'][0]} for one.",
            hint="Name outlines like the slides: <slide name>.geojson.",
        )


def list_resolutions(file: str) -> list[Entry[float]]:
    """Read µm per pixel of slides; see :func:`pathflip.interop.labels.read_resolutions`."""
    return [
        Entry(name=row.slide, value=row.mpp, where=f"{file}, line {row.line}")
        for row in read_resolutions(file)
    ]


def read_people(file: str) -> list[Entry[dict[str, Any]]]:
    """Read patient, split and labels of slides, as the columns of the table ``slides``.

    Raises:
        ConfigError: The file is missing or wrong.
    """
    return [
        Entry(
            name=row.slide or "",
            value={
                "patient_id": row.patient,
                "split": row.split,
                "labels": json.dumps(row.labels, sort_keys=True) if row.labels else None,
            },
            where=f"{file}, line {row.line}",
        )
        for row in read_patients(file)
    ]


def _digest(path: Path, classes: Sequence[str]) -> str:
    chosen = json.dumps(sorted(classes)).encode() if classes else b""
    return hashlib.sha256(path.read_bytes() + chosen).hexdigest()[:12]


def _warn_of_spellings(file: str, people: Sequence[Entry[dict[str, Any]]]) -> None:
    """Log patients whose names differ in their case alone: they may be one."""
    spelled: dict[str, set[str]] = {}
    for entry in people:
        if patient := entry.value["patient_id"]:
            spelled.setdefault(loosely(patient), set()).add(patient)
    if several := sorted(sorted(names) for names in spelled.values() if len(names) > 1):
        logger.warning(
            "%s: %d patients are spelled in several ways, such as %s: each counts as a patient.",
            file, len(several), " and ".join(several[0]),
        )  # fmt: skip


def list_outlines(folder: str, *, classes: Sequence[str] = ()) -> list[Entry[Outline]]:
    """List the tissue outlines in a folder: files of annotations, named like slides.

    Args:
        folder: The folder.
        classes: Classes that are tissue: the same file with others is another outline.

    Raises:
        ConfigError: There is no such folder, or no outline in it.
    """
    where = Path(folder).absolute()
    if not where.is_dir():
        raise ConfigError(f"{folder} is no folder.", hint="Check --tissue.")
    files = outline_files(where)
    if not files:
        raise ConfigError(
            f"{folder} holds no outlines.",
            hint="Give a folder of <slide name>.geojson, .zip, .xml or .annotations with --tissue.",
        )
    return [
        Entry(
            name=path.name,
            value=Outline(path=str(path), digest=_digest(path, classes)),
            where=str(path),
        )
        for path in files
    ]
