"""Which slides of an archive a name in somebody else's table means."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePosixPath

from pathflip.archive import Archive
from pathflip.slides.sources import DICOM_SUFFIX, SUFFIXES

_ENDINGS = (*SUFFIXES, DICOM_SUFFIX, ".csv", ".pt", ".h5", ".npy", ".json", ".jpg", ".png")
_UUID = re.compile(r"\.[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$", re.IGNORECASE)


class SlideNames:
    """The names slides go by, all slides of the archive whatever their status.

    In this order: the slide's id or path; its file's name; that without its ending; that before
    the UUID, as TCGA's files carry one. The name asked for is shortened in the same way, so that a
    feature file's name (``TCGA-LUSC/<stem>.<UUID>.pt``) finds its slide.
    """

    def __init__(self, archive: Archive) -> None:
        self._slides: dict[str, set[str]] = {}
        self._patients: dict[str, set[str]] = {}
        columns = ["slide_id", "uri", "aliases", "patient_id"]
        for row in archive.slides(columns=columns).to_pylist():
            slide = row["slide_id"]
            self._add(slide, slide)
            for uri in (row["uri"], *(row["aliases"] or ())):
                for name in shortened(uri or ""):
                    self._add(name, slide)
                    self._add_case(name, slide)
            if row["patient_id"]:
                self._patients.setdefault(row["patient_id"], set()).add(slide)

    def _add(self, name: str, slide: str) -> None:
        self._slides.setdefault(name, set()).add(slide)

    def _add_case(self, name: str, slide: str) -> None:
        fields = name.split("-")
        for count in range(2, len(fields)):
            self._patients.setdefault("-".join(fields[:count]), set()).add(slide)

    def find(self, name: str) -> list[str]:
        """Returns the slides a name means, sorted: none, one, or several where it is not clear."""
        for form in shortened(name):
            if form in self._slides:
                return sorted(self._slides[form])
        return []

    def find_case(self, case: str) -> list[str]:
        """Returns the slides of a case: of that patient, or named ``<case>-…``."""
        return sorted(self._patients.get(case, ())) or self.find(case)


def shortened(name: str) -> list[str]:
    """Returns a name, without folders, without its ending, without its UUID; each once."""
    base = PurePosixPath(name.replace("\\", "/")).name
    stem = next((base[: -len(end)] for end in _ENDINGS if base.lower().endswith(end)), base)
    return list(dict.fromkeys(filter(None, (name, base, stem, _UUID.sub("", stem)))))


def patient_of(stem: str) -> str | None:
    """Returns the patient of a TCGA barcode (first three fields) or a CPTAC name (first two)."""
    if match := re.match(r"(TCGA-[A-Z0-9]{2}-[A-Z0-9]{4})(-|$)", stem):
        return match[1]
    if match := re.match(r"(C3[A-Z]-\d{5})(-|$)", stem):
        return match[1]
    return None


def listed(names: Iterable[str]) -> list[str]:
    """Returns names for a report: sorted, each once."""
    return sorted(set(names))
