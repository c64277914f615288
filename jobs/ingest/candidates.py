"""Finds the slides to ingest, with what the user gave for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jobs.ingest.config import IngestConfig
from jobs.ingest.side_files import SideFiles, read_side_files
from pathflip.slides.sources import Source, by_suffix, discover


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


def find_candidates(
    sources: Sequence[str], config: IngestConfig, *, slide_of: Mapping[str, str]
) -> tuple[list[Candidate], SideFiles]:
    """Find the slides under the sources, with the resolution and outline the user gave for each.

    Args:
        sources: Slide files and folders.
        config: Settings, which name the side files.
        slide_of: {path: slide_id} of what the archive holds, copies included.

    Returns:
        The slides, sorted by path, and the side files.

    Raises:
        ConfigError: A source or side file is missing or wrong, or a line of one is not clear.
    """
    skipped: list[str] = []
    found = discover(sources, skipped=skipped)
    side = read_side_files(config, [source.uri for source in found], slide_of=slide_of)
    side = replace(side, skipped=by_suffix(skipped))
    side.warn("unmatched")
    candidates = []
    for source in found:
        mpp = None if side.mpp is None else side.mpp.of_path(source.uri)
        drawn = None if side.tissue is None else side.tissue.of_path(source.uri)
        if drawn is None:
            candidates.append(Candidate(source=source, mpp=mpp))
        else:
            outline = Candidate(source=source, mpp=mpp, geojson=drawn.path, outline=drawn.digest)
            candidates.append(outline)
    return candidates, side
