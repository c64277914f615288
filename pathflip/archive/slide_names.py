"""Finds the slides that a name means, whoever wrote it: a table, a folder of outlines, a user.

A slide goes by its id and by its paths: where it lies and, as an alias, where each copy of it lies.
Of a path these count, in this order: the whole of it; the file's name; that without its ending;
that without the UUID of a TCGA file. A name asked for is shortened in the same way, so that a
feature file's name (``TCGA-LUSC/<stem>.<UUID>.pt``) finds its slide. Case, and the kind and number
of spaces, count only where they make a difference. Where several slides carry a name, the folders
before it decide (``siteA/1.tif``); where they do not, the name is ambiguous and means none of them.
"""

from __future__ import annotations

import os
import re
import stat
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Generic, TypeVar

from pathflip.interop.annotations import FILE_ENDINGS
from pathflip.interop.tables import clean, known_patient, loosely
from pathflip.slides.sources import DICOM_SUFFIX, SUFFIXES

Row = TypeVar("Row")

NAME_COLUMNS = ("slide_id", "uri", "aliases", "patient_id")
"""Columns of the slides table that :meth:`SlideNames.from_rows` reads."""

_ENDINGS = (
    *SUFFIXES, DICOM_SUFFIX, ".ome", ".bif", ".qptiff", ".vsi", ".isyntax", ".zarr",
    ".csv", ".pt", ".h5", ".npy", ".npz", ".jpg", ".jpeg", ".png", *FILE_ENDINGS,
)  # fmt: skip
_UUID = re.compile(r"\.[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Matches(Generic[Row]):
    """Rows of a table, and the slides that their names mean.

    Attributes:
        found: (row, its slides), in the order of the table: one slide, or all those of a case.
        unclear: (row, slides) where several slides carry the name.
        unmatched: Names that no slide has, sorted.
        ambiguous: Names that several slides have, sorted.
    """

    found: list[tuple[Row, list[str]]]
    unclear: list[tuple[Row, list[str]]]
    unmatched: list[str]
    ambiguous: list[str]

    def report(self) -> dict[str, Any]:
        """Return the names without a slide of their own, as every import reports them."""
        return {"unmatched": self.unmatched, "ambiguous": self.ambiguous}


class SlideNames:
    """Index of the names that slides go by; :meth:`from_rows` and :meth:`from_paths` make it."""

    def __init__(self) -> None:
        self._exact: dict[str, set[str]] = {}
        self._folded: dict[str, set[str]] = {}
        self._cases: dict[str, set[str]] = {}
        self._folded_cases: dict[str, set[str]] = {}
        self._paths: dict[str, list[str]] = {}

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]]) -> SlideNames:
        """Index the slides of an archive, each under its ``slide_id``.

        Args:
            rows: Rows of the slides table with :data:`NAME_COLUMNS`, whatever their status.
        """
        names = cls()
        for row in rows:
            slide = row["slide_id"]
            names._add(slide, slide)
            for path in (row["uri"], *(row["aliases"] or ())):
                if path:
                    names._add_path(path, slide)
            if patient := known_patient(row["patient_id"]):
                names._add_case(patient, slide)
        return names

    @classmethod
    def from_paths(cls, paths: Iterable[str]) -> SlideNames:
        """Index slides that no archive knows yet, each under its path.

        A link goes by the name of the file it points to as well.
        """
        names = cls()
        for path in dict.fromkeys(paths):
            names._add_path(path, path)
            if os.path.islink(path):
                names._add_path(os.path.realpath(path), path)
        return names

    def _add(self, name: str, slide: str) -> None:
        self._exact.setdefault(name, set()).add(slide)
        self._folded.setdefault(loosely(name), set()).add(slide)

    def _add_path(self, path: str, slide: str) -> None:
        path = _normal(path)
        self._paths.setdefault(slide, []).append(path)
        forms = shortened(path)
        if len(forms) == 2:  # no ending that is known: what is behind the last dot is one
            forms.append(PurePosixPath(path).stem)
        for form in forms:
            self._add(form, slide)
            fields = form.split("-")
            for count in range(2, len(fields)):
                self._add_case("-".join(fields[:count]), slide)

    def _add_case(self, case: str, slide: str) -> None:
        case = _normal(case)
        self._cases.setdefault(case, set()).add(slide)
        self._folded_cases.setdefault(loosely(case), set()).add(slide)

    def short(self) -> list[str]:
        """Return the names without folders, sorted: what a misspelt name may have meant."""
        return sorted(name for name in self._exact if "/" not in name)

    def find(self, name: str) -> list[str]:
        """Return the slides a name means, sorted: none, one, or several where it is not clear."""
        name = _normal(name)
        for form in shortened(name):
            if found := self._exact.get(form) or self._folded.get(loosely(form)):
                return self._nearest(name, found)
        return []

    def find_case(self, case: str) -> list[str]:
        """Return the slides of a case: of that patient, or named ``<case>-…``."""
        case = _normal(case)
        found = self._cases.get(case) or self._folded_cases.get(loosely(case))
        return sorted(found) if found else self.find(case)

    def match(self, rows: Iterable[Row], name: Callable[[Row], tuple[str, bool]]) -> Matches[Row]:
        """Find the slides of the rows of a table.

        A name with folders that its slide does not lie in still means it (the table may be from
        another machine), but not where the table has a row with the right folders as well, or where
        there is another file of that size at that very path: then the row is about another slide.

        Args:
            rows: The table.
            name: Returns a row's name, and whether it is that of a case, so that all slides of the
                case are meant.
        """
        found: list[tuple[Row, list[str], str, bool]] = []
        unclear: list[tuple[Row, list[str]]] = []
        unmatched, ambiguous = [], []
        placed: set[str] = set()  # slides that some row names with the folders they lie in
        for row in rows:
            asked, is_case = name(row)
            slides = self.find_case(asked) if is_case else self.find(asked)
            stray = False
            if len(slides) > 1 and not is_case:
                ambiguous.append(asked)
                unclear.append((row, slides))
                continue
            if len(slides) == 1 and not is_case and _folders(_normal(asked)):
                stray = not self._agreement(_normal(asked), slides[0])
                if not stray:
                    placed.update(slides)
                elif self._is_another_file(asked, slides[0]):
                    slides = []
            if slides:
                found.append((row, slides, asked, stray))
            else:
                unmatched.append(asked)
        kept = []
        for row, slides, asked, stray in found:
            if stray and slides[0] in placed:
                unmatched.append(asked)
            else:
                kept.append((row, slides))
        return Matches(
            found=kept,
            unclear=unclear,
            unmatched=listed(unmatched),
            ambiguous=listed(ambiguous),
        )

    def _nearest(self, name: str, slides: set[str]) -> list[str]:
        """Return the slides whose folders agree best with those before a name."""
        if len(slides) == 1 or not _folders(name):
            return sorted(slides)
        agreement = {slide: self._agreement(name, slide) for slide in slides}
        best = max(agreement.values())
        return sorted(slide for slide in slides if agreement[slide] == best)

    def _agreement(self, name: str, slide: str) -> int:
        """Return how many folders before a name a path of the slide has as well, from the last."""
        asked = _folders(name)
        return max(
            (_common(asked, _folders(path)) for path in self._paths.get(slide, ())), default=0
        )

    def _is_another_file(self, name: str, slide: str) -> bool:
        """Return whether the file at the path asked for is of another size."""
        if not os.path.isabs(name):
            return False
        size = _file_size(name)
        sizes = {_file_size(path) for path in self._paths.get(slide, ())} - {None}
        return size is not None and bool(sizes) and size not in sizes


def shortened(name: str) -> list[str]:
    """Return a name, without folders, without its endings, without its UUID; each once."""
    forms = [name, PurePosixPath(name.replace("\\", "/")).name]
    while True:
        last = forms[-1]
        end = next((end for end in _ENDINGS if last.lower().endswith(end)), "")
        if not end:
            break
        forms.append(last[: -len(end)])
    return list(dict.fromkeys(filter(None, (*forms, _UUID.sub("", forms[-1])))))


def outline_files(folder: str | Path) -> list[Path]:
    """Return the files in a folder that may hold outlines of slides, sorted; none if it is none.

    They are what :func:`pathflip.interop.annotation_files.read_objects` reads, by their ending,
    whatever its case.
    """
    if not Path(folder).is_dir():
        return []
    return sorted(
        path
        for path in Path(folder).iterdir()
        if path.name.lower().endswith(FILE_ENDINGS) and path.is_file()
    )


def patient_of(stem: str) -> str | None:
    """Return the patient of a TCGA barcode (first three fields) or a CPTAC name (first two)."""
    for barcode in (r"TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}", r"C3[A-Z]-\d{5}"):
        if match := re.match(rf"({barcode})(-|$)", stem, re.IGNORECASE):
            return match[1].upper()
    return None


def listed(names: Iterable[str]) -> list[str]:
    """Return names for a report: sorted, each once."""
    return sorted(set(names))


def _normal(name: str) -> str:
    """Return a name without space around it; letters with accents are one character each."""
    return unicodedata.normalize("NFC", clean(name))


def _folders(name: str) -> list[str]:
    """Return the folders before a name, the last first."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    return [part.casefold() for part in reversed(parts[:-1])]


def _common(one: list[str], other: list[str]) -> int:
    return next(
        (n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )


def _file_size(path: str) -> int | None:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None
