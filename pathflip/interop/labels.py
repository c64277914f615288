"""Labels and patients of slides from tables of others.

=============  ==================================================================================
label tables   CSV or TSV with a column for the slide (slide_id, slide) or the case (case_id,
               patient_id) and labels: CPTAC splits (slide_id, conch_feature, label), Patho-Bench
               tasks (case_id, slide_id, <task>, fold_0…)
GDC manifests  TSV id, filename, md5, size, state: patient and sample type from the TCGA barcode
=============  ==================================================================================
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pathflip.archive import Archive
from pathflip.archive.commit import Committer
from pathflip.archive.slide_names import SlideNames, listed, patient_of, shortened
from pathflip.errors import ConfigError
from pathflip.interop.captions import SLIDE_COLUMNS
from pathflip.interop.tables import bad_line, column, read_rows

_CASE_COLUMNS = ("case_id", "patient_id", "case", "patient")
_NO_LABEL = re.compile(r"fold_\d+|.*feature|unnamed.*|", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class LabelRow:
    """What a line of a table says of a slide, or of all slides of a case.

    Attributes:
        slide: The slide as the file names it; None where the row is about a case.
        patient: The case.
        split: train, val or test, where the file says.
        labels: {name: value}.
        line: Where in the file.
        bytes: Size of the slide's file, where the file says.
    """

    slide: str | None
    patient: str | None = None
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
    """Reads a table of labels.

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
    case = column(path, first, _CASE_COLUMNS, asked=case_col)
    split = column(path, first, ("split",))
    if slide is None and case is None:
        raise bad_line(path, 1, f"no column slide_id or case_id among {', '.join(first)}")
    chosen = [column(path, first, (), asked=name) for name in label_cols] or [
        name for name in first if name not in (slide, case, split) and not _NO_LABEL.fullmatch(name)
    ]
    found = []
    for line, row in rows:
        name = row[slide] if slide is not None else None
        patient = row[case] if case is not None else None
        if not name and not patient:
            raise bad_line(path, line, "no slide and no case")
        found.append(
            LabelRow(
                slide=name or None,
                patient=patient or None,
                split=(row[split] or None) if split is not None else None,
                labels={key: row[key] for key in chosen if key is not None and row[key]},
                line=line,
            )
        )
    return found


def read_manifest(path: str | Path) -> list[LabelRow]:
    """Reads a GDC manifest; the files of it that are no TCGA slides are left out.

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
                patient=patient,
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
    """Adds patients, splits and labels to the slides that are in the archive.

    Labels a slide has under other names stay. Again, it changes nothing.

    Args:
        archive: The archive.
        path: The file the rows are from, for messages.
        rows: What :func:`read_labels` or :func:`read_manifest` returned.
        dry_run: Only say what would be done.

    Returns:
        {"rows", "changed", "unchanged": counts of slides, "unmatched", "ambiguous": names,
        "other_size": slides whose file is not as long as the manifest says}.

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
    names = SlideNames(archive)
    stored = {
        row["slide_id"]: row
        for row in archive.slides(
            columns=["slide_id", "patient_id", "split", "labels", "bytes"]
        ).to_pylist()
    }
    said: dict[str, dict[str, tuple[str, int]]] = {}  # slide -> name -> value, line
    unmatched, ambiguous, other_size = [], [], []
    for row in rows:
        slides = names.find(row.slide) if row.slide else names.find_case(row.patient or "")
        if not slides:
            unmatched.append(row.slide or row.patient or "")
        if row.slide and len(slides) > 1:
            ambiguous.append(row.slide)
            continue
        for slide in slides:
            if row.bytes is not None and stored[slide]["bytes"] != row.bytes:
                other_size.append(slide)
            values = {f"label:{name}": value for name, value in row.labels.items()}
            values |= {"patient_id": row.patient or "", "split": row.split or ""}
            for name, value in values.items():
                if not value:
                    continue
                other, line = said.setdefault(slide, {}).setdefault(name, (value, row.line))
                if other != value:
                    what = name.removeprefix("label:")
                    raise bad_line(
                        path,
                        row.line,
                        f"{row.slide or row.patient} has {what} {value!r}, but {other!r} in line "
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
        "unmatched": listed(unmatched),
        "ambiguous": listed(ambiguous),
        "other_size": listed(other_size),
    }
