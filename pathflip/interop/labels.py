"""Labels, patients and splits of slides from tables of other tools.

==============  =================================================================================
resolutions     CSV or TSV slide, mpp, for ``--mpp-csv``
patients        CSV or TSV slide, patient_id[, split][, any label…], for ``ingest --patients``
label tables    CSV or TSV with a column for the slide (slide_id, slide) or the case (case_id,
                patient_id) and labels: CPTAC splits (slide_id, conch_feature, label), Patho-Bench
                tasks (case_id, slide_id, <task>, fold_0…)
GDC manifests   TSV id, filename, md5, size, state: patient and sample type from the TCGA barcode
==============  =================================================================================

A table gives a slide a patient by a column ``patient_id`` in a line about that slide. A case that
lines are looked up by, or that a barcode names, becomes the patient of slides that have none; it
never renames one, which would make two patients of the slides of one.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pathflip.archive import Archive
from pathflip.archive.commit import Committer
from pathflip.archive.slide_names import listed, patient_of, shortened
from pathflip.errors import ConfigError
from pathflip.interop.tables import (
    CASE_COLUMNS,
    PATIENT_COLUMNS,
    SLIDE_COLUMNS,
    bad_line,
    column,
    is_missing,
    known_patient,
    needed_column,
    read_rows,
)
from pathflip.splits import canonical_split

_NO_LABEL = re.compile(r"fold_\d+|.*feature|unnamed.*|", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class LabelRow:
    """Patient, split and labels of a slide, or of all slides of a case, from a line of a table.

    Attributes:
        slide: Name of the slide in the file; None where the row is about a case.
        patient: Patient of the slide.
        case: Case the row is about, or that the slide is of: the patient of slides without one.
        split: train, val or test, or another name of the file's own; None where it has none.
        labels: {name: value}.
        line: Line in the file.
        bytes: Size of the slide's file, where the file has it.
    """

    slide: str | None
    patient: str | None = None
    case: str | None = None
    split: str | None = None
    labels: dict[str, str] = field(default_factory=dict)
    line: int = 0
    bytes: int | None = None


def read_labels(
    path: str | Path,
    *,
    slide_col: str | None = None,
    case_col: str | None = None,
    label_cols: Sequence[str] = (),
) -> list[LabelRow]:
    """Read a table of labels.

    Args:
        path: CSV or TSV.
        slide_col: Column of the slide; by default one that is called so.
        case_col: Column of the case.
        label_cols: Columns of labels; by default all others but folds and features.

    Raises:
        ConfigError: If a column is not there, or a line is wrong: then it names the line.
    """
    rows = read_rows(path)
    first = rows[0][1]
    slide = column(path, first, SLIDE_COLUMNS, asked=slide_col)
    case = column(path, first, CASE_COLUMNS, asked=case_col)
    by_slide = slide is not None and case_col is None
    patient = column(path, first, PATIENT_COLUMNS) if by_slide else None
    split = column(path, first, ("split",))
    if slide is None and case is None:
        raise bad_line(path, 1, f"no column slide_id or case_id among {', '.join(first)}")
    taken = (slide, case, patient, split)
    chosen = [column(path, first, (), asked=name) for name in label_cols] or [
        name for name in first if name not in taken and not _NO_LABEL.fullmatch(name)
    ]
    found = []
    for line, row in rows:
        name = None if slide is None or is_missing(row[slide]) else row[slide]
        who = None if case is None else known_patient(row[case])
        if not name and not who:
            raise bad_line(path, line, "no slide and no case")
        found.append(
            LabelRow(
                slide=name,
                patient=None if patient is None or name is None else known_patient(row[patient]),
                case=None if patient == case and name is not None else who,
                split=None if split is None else canonical_split(row[split]),
                labels=_labels(row, chosen),
                line=line,
            )
        )
    return found


@dataclass(frozen=True, kw_only=True)
class Resolution:
    """Line of a table of resolutions.

    Attributes:
        slide: Name of the slide.
        mpp: µm per level-0 pixel.
        line: Line of the file.
    """

    slide: str
    mpp: float
    line: int


def read_resolutions(file: str | Path) -> list[Resolution]:
    """Read µm per pixel of slides from a table with the columns slide and mpp.

    Raises:
        ConfigError: The file is missing or wrong.
    """
    rows = read_rows(file)
    slide = needed_column(file, rows[0][1], SLIDE_COLUMNS)
    mpp = needed_column(file, rows[0][1], ("mpp",))
    found = []
    for line, row in rows:
        if is_missing(row[slide]):
            raise bad_line(file, line, "no slide")
        try:
            value = float(row[mpp].replace(",", "."))
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise bad_line(
                file,
                line,
                f"{row[slide]} has the mpp {row[mpp]!r}",
                hint="Write µm per pixel, for example 0.25.",
            )
        found.append(Resolution(slide=row[slide], mpp=value, line=line))
    return found


def read_patients(path: str | Path) -> list[LabelRow]:
    """Read the patients of slides, their splits and labels: every further column is a label.

    Raises:
        ConfigError: If the columns slide and patient_id are not there, or a line names no slide.
    """
    rows = read_rows(path)
    first = rows[0][1]
    slide = needed_column(path, first, SLIDE_COLUMNS)
    patient = needed_column(path, first, (*PATIENT_COLUMNS, *CASE_COLUMNS))
    split = column(path, first, ("split",))
    chosen = [name for name in first if name and name not in (slide, patient, split)]
    found = []
    for line, row in rows:
        if is_missing(row[slide]):
            raise bad_line(path, line, "no slide")
        found.append(
            LabelRow(
                slide=row[slide],
                patient=known_patient(row[patient]),
                split=None if split is None else canonical_split(row[split]),
                labels=_labels(row, chosen),
                line=line,
            )
        )
    return found


def _labels(row: dict[str, str], columns: Sequence[str | None]) -> dict[str, str]:
    """Return the labels of a row that are there; "none" is one, a cell left empty is none."""
    return {name: row[name] for name in columns if name is not None and not is_missing(row[name])}


def read_manifest(path: str | Path) -> list[LabelRow]:
    """Read a GDC manifest; the files of it that are no TCGA slides are left out.

    Raises:
        ConfigError: If it is none, or a line is wrong.
    """
    rows = read_rows(path)
    if missing := [name for name in ("id", "filename", "size") if name not in rows[0][1]]:
        raise bad_line(path, 1, f"no column {missing[0]}: this is no GDC manifest")
    found = []
    for line, row in rows:
        stem = shortened(row["filename"])[-1] if row["filename"] else ""
        patient = patient_of(stem)
        if not stem or not row["size"].isdigit():
            raise bad_line(path, line, "no file name" if not stem else "the size is no number")
        if patient is None:
            continue
        code = stem.split("-")[3][:2] if stem.count("-") >= 3 else ""
        kind = {"0": "tumour", "1": "normal"}.get(code[:1], "other")
        found.append(
            LabelRow(
                slide=row["filename"],
                case=patient,
                labels={"sample_type": kind} if code else {},
                line=line,
                bytes=int(row["size"]),
            )
        )
    if not found:
        raise ConfigError(f"{path} lists no TCGA slides.", hint="Give a manifest of slides.")
    return found


def import_labels(
    archive: str, path: str | Path, rows: Sequence[LabelRow], *, dry_run: bool = False
) -> dict[str, Any]:
    """Add patients, splits and labels to the slides that are in the archive.

    Labels that a slide has under other names stay. Importing again changes nothing.

    Args:
        archive: The archive.
        path: The file the rows are from, for messages.
        rows: Rows of :func:`read_labels` or :func:`read_manifest`.
        dry_run: Only say what would be done.

    Returns:
        {"rows", "changed", "unchanged": counts of slides, "unmatched", "ambiguous": names,
        "other_size": slides whose file is not as long as the manifest says, "other_patient": slides
        that keep a patient who is not the case of their row}.

    Raises:
        ConfigError: If two lines contradict each other; nothing is written then.
        ArchiveError: If the archive is missing, damaged or being written.
    """
    if dry_run:
        return _import(Archive(archive), path, rows, lambda changes: None)
    with Committer(archive) as committer:
        return _import(committer.archive, path, rows, committer.update_slides)


def _import(
    archive: Archive,
    path: str | Path,
    rows: Sequence[LabelRow],
    write: Callable[[dict[str, dict[str, Any]]], None],
) -> dict[str, Any]:
    columns = ["slide_id", "patient_id", "split", "labels", "bytes"]
    stored = {row["slide_id"]: row for row in archive.slides(columns=columns).to_pylist()}
    matches = archive.names().match(rows, lambda row: (row.slide or row.case or "", not row.slide))
    said: dict[str, dict[str, tuple[str, int]]] = {}  # slide -> name -> value, line
    other_size, other_patient = [], []
    held: dict[str, set[str]] = {}  # case -> patients that its slides have
    for row, slides in matches.found:
        own_patients = (known_patient(stored[slide]["patient_id"]) for slide in slides)
        held.setdefault(row.case or "", set()).update(filter(None, own_patients))
    for row, slides in matches.found:
        for slide in slides:
            own = known_patient(stored[slide]["patient_id"])
            if row.bytes is not None and stored[slide]["bytes"] != row.bytes:
                other_size.append(slide)
            if row.case and not row.patient and own not in (None, row.case):
                other_patient.append(slide)
            values = {f"label:{name}": value for name, value in row.labels.items()}
            patient = row.patient
            if patient is None and row.case:
                patient = own or _patient_of_case(row.case, held[row.case])
            values |= {"patient_id": patient or "", "split": row.split or ""}
            for name, value in values.items():
                if not value:
                    continue
                other, line = said.setdefault(slide, {}).setdefault(name, (value, row.line))
                if other != value:
                    what = name.removeprefix("label:")
                    raise bad_line(
                        path,
                        row.line,
                        f"{row.slide or row.case} has {what} {value!r}, but {other!r} in line "
                        f"{line}",
                    )
    changes = {}
    for slide, told in said.items():
        labels = json.loads(stored[slide]["labels"] or "{}")
        new: dict[str, Any] = {}
        for name, (value, _line) in told.items():
            if name.startswith("label:"):
                labels[name.removeprefix("label:")] = value
            elif stored[slide][name] != value:
                new[name] = value
        text = json.dumps(labels, sort_keys=True) if labels else None
        if text != (stored[slide]["labels"] or None):
            new["labels"] = text
        if new:
            changes[slide] = new
    if changes:
        write(changes)
    return {
        "rows": len(rows),
        "changed": len(changes),
        "unchanged": len(said) - len(changes),
        **matches.report(),
        "other_size": listed(other_size),
        "other_patient": listed(other_patient),
    }


def _patient_of_case(case: str, held: set[str]) -> str | None:
    """Return the patient of a case's slides that have none: their siblings', or else the case."""
    if not held:
        return case
    return next(iter(held)) if len(held) == 1 else None
