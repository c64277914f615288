"""Finds the slides to ingest, with what the user gave for each."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.ingest.config import IngestConfig
from pathflip.errors import ConfigError
from pathflip.slides.sources import SUFFIXES, Source, discover

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A slide to be ingested, with what the user gave for it.

    Attributes:
        source: The file.
        mpp: µm per level-0 px, where the user gave it.
        geojson: Path of the tissue outline to use instead of the computed mask.
        outline: Source of the tissue: ``mask``, or the digest of the GeoJSON.
    """

    source: Source
    mpp: float | None = None
    geojson: str | None = None
    outline: str = "mask"

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Candidate:
        """Return the candidate that ``dataclasses.asdict`` described."""
        return cls(**fields | {"source": Source(**fields["source"])})


def find_candidates(sources: Sequence[str], config: IngestConfig) -> list[Candidate]:
    """Find the slides under the sources, with the resolution and outline the user gave for each.

    Raises:
        ConfigError: A source, CSV or folder is missing or wrong, or a line is not clear.
    """
    found = discover(sources)
    scale = _sheet(
        config.mpp_csv,
        ("slide", "mpp"),
        lambda row: {"mpp": _positive(row["mpp"], config.mpp_csv, row["slide"])},
    )
    outlines: dict[str, dict[str, Any]] = {}
    if config.tissue_dir:
        folder = Path(config.tissue_dir).absolute()
        if not folder.is_dir():
            raise ConfigError(f"{config.tissue_dir} is no folder.", hint="Check --tissue.")
        outlines = {
            path.stem: {
                "geojson": str(path),
                "outline": hashlib.sha256(path.read_bytes()).hexdigest()[:12],
            }
            for path in sorted(folder.glob("*.geojson"))
        }
    drawn = Sheet(config.tissue_dir, outlines)
    candidates = [
        Candidate(source=source, **scale.find(source.uri), **drawn.find(source.uri))
        for source in found
    ]
    scale.warn_unmatched(candidates)
    drawn.warn_unmatched(candidates)
    _check_unambiguous(candidates)
    return candidates


def read_people(file: str | None) -> Sheet:
    """Read patient, split and labels of slides from a CSV.

    Raises:
        ConfigError: The file is missing or wrong.
    """

    def person(row: dict[str, str]) -> dict[str, Any]:
        labels = {k: v for k, v in row.items() if k not in ("slide", "patient_id", "split")}
        return {
            "patient_id": row["patient_id"] or None,
            "split": row.get("split") or None,
            "labels": json.dumps(labels, sort_keys=True) if labels else None,
        }

    return _sheet(file, ("slide", "patient_id"), person)


class Sheet:
    """Rows of a CSV by slide: its path, its file's name, or that name without its ending."""

    def __init__(self, file: str | None, rows: dict[str, dict[str, Any]]) -> None:
        self._file = file
        self._rows = rows

    def find(self, uri: str) -> dict[str, Any]:
        """The row of a slide; empty where there is none."""
        for key in _keys(uri):
            if key in self._rows:
                return self._rows[key]
        return {}

    def warn_unmatched(self, candidates: Sequence[Candidate]) -> None:
        """Say which rows name no slide of this run: often a spelling, sometimes another batch."""
        named = {key for candidate in candidates for key in _keys(candidate.source.uri)}
        lost = [key for key in self._rows if key not in named]
        if lost:
            logger.warning(
                "%s: %d of %d rows name no slide of this run, such as %s.",
                self._file,
                len(lost),
                len(self._rows),
                lost[0],
            )


def _keys(uri: str) -> tuple[str, str, str]:
    name = Path(uri).name
    stem = next((name[: -len(end)] for end in SUFFIXES if name.lower().endswith(end)), name)
    return uri, name, stem


def _check_unambiguous(candidates: Sequence[Candidate]) -> None:
    """One mpp or outline meant for one file must not reach another of the same name."""
    named: dict[str, str] = {}
    for candidate in candidates:
        if candidate.mpp is None and candidate.geojson is None:
            continue
        uri = candidate.source.uri
        other = named.setdefault(_keys(uri)[2], uri)
        if other != uri:
            raise ConfigError(
                f"{uri} and {other} have the same name, so one line for both is not clear.",
                hint="Write their full paths in the CSV, or ingest them one by one.",
            )


def _sheet(
    file: str | None, columns: Sequence[str], read: Callable[[dict[str, str]], dict[str, Any]]
) -> Sheet:
    rows: dict[str, dict[str, Any]] = {}
    for row in _csv(file, columns):
        value = read(row)
        if rows.setdefault(row["slide"], value) != value:
            raise ConfigError(
                f"{file} has two different rows for {row['slide']}.", hint="Keep one of them."
            )
    return Sheet(file, rows)


def _csv(file: str | None, columns: Sequence[str]) -> list[dict[str, str]]:
    if file is None:
        return []
    try:
        with open(file, newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        hint = "Give a CSV in UTF-8."
        raise ConfigError(f"{file} cannot be read: {error}.", hint=hint) from error
    missing = [column for column in columns if rows and column not in rows[0]]
    if missing or not rows:
        raise ConfigError(
            f"{file} has no column {' or '.join(missing)}." if missing else f"{file} has no rows.",
            hint=f"Its first line must be {','.join(columns)}.",
        )
    return rows


def _positive(text: str, file: str | None, slide: str) -> float:
    try:
        value = float(text)
    except (TypeError, ValueError):
        value = math.nan
    if not value > 0:
        raise ConfigError(
            f"{file} gives {slide} the mpp {text!r}.", hint="Write µm per pixel, for example 0.25."
        )
    return value
