"""Files behind slide ids: those of an archive, or a few that were named.

:class:`Tiles <serve.tiles.Tiles>` asks one of the two classes here where a slide's pixels are, in
which state its file must be to be shown, and for its outlines.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pathflip.archive.snapshot import ArchiveSnapshot, ready_row
from pathflip.errors import ArchiveError
from pathflip.slides.sources import Source, stat_slide

if TYPE_CHECKING:
    from pathflip.archive import Archive

_COLUMNS = ["slide_id", "uri", "bytes", "mtime_ns", "sha256", "mpp", "mpp_source"]
_MOST_KEPT = 8  # slides whose outlines are kept, up to some MB each
_MOST_POINTS = 20_000
"""Points of a slide's outlines from which on they are simplified by a pixel of the mask."""


@dataclass(frozen=True, kw_only=True)
class SlideFile:
    """File of a slide.

    Attributes:
        slide_id: Id of the slide.
        uri: Path, or address in an object store.
        bytes, mtime_ns: Size and time that it must have.
        content: Digest that tells its content from others'.
        mpp: µm per level-0 px; None if only the file says it.
        mpp_source: Origin of ``mpp``, as the archive has it; "override" overrules the file.
        sha256: Digest that a copy must have; None where none is known.
    """

    slide_id: str
    uri: str
    bytes: int
    mtime_ns: int
    content: str
    mpp: float | None = None
    mpp_source: str = ""
    sha256: str | None = None

    @property
    def override(self) -> float | None:
        """µm per level-0 px that readers are told; None if the file says it."""
        return self.mpp if self.mpp_source == "override" else None


class SlideFiles(Protocol):
    """Files behind slide ids."""

    async def check(self) -> None:
        """Raise an error if no slide could be found at present."""

    async def find(self, slide_id: str) -> SlideFile:
        """Return the file of a slide.

        Raises:
            ArchiveError: ``unknown_slide``.
        """

    async def outlines(self, slide_id: str) -> bytes:
        """Return JSON of {"tissue": MultiPolygon or None, "regions": [...]}, in level-0 px.

        Raises:
            ArchiveError: ``unknown_slide``.
        """


class ArchiveSlides:
    """The ready slides of an archive.

    Args:
        archive: URI of the archive; it is opened when a slide is first asked for.
        refresh_s: Seconds until new commits are looked for.
    """

    def __init__(self, archive: str, *, refresh_s: float = 30.0) -> None:
        self.archive, self.refresh_s = archive, refresh_s
        self._snapshot: ArchiveSnapshot | None = None
        self._opening = asyncio.Lock()
        # One, of its own: outlines of a ragged tissue take two seconds of Python.
        self._drawing = ThreadPoolExecutor(1, thread_name_prefix="outlines")

    async def check(self) -> None:
        """Raise an error if the archive cannot be read."""
        archive = await self._newest()
        await asyncio.to_thread(lambda: archive.dataset("slides").to_table(limit=1))

    async def find(self, slide_id: str) -> SlideFile:
        """Return the file of a ready slide, as it was when it was ingested."""
        archive = await self._newest()
        known: dict[str, SlideFile] = archive.cached("serve/files", dict, of=("slides",))
        if slide_id not in known:
            await asyncio.to_thread(ready_row, archive, slide_id)
            row = await asyncio.to_thread(self._row, archive, slide_id)
            known[slide_id] = _file_of(row)
        return known[slide_id]

    async def outlines(self, slide_id: str) -> bytes:
        """Return the outlines of a slide's tissue and its regions, as they were ingested."""
        archive = await self._newest()
        kept: OrderedDict[str, bytes] = archive.cached(
            "serve/outlines", OrderedDict, of=("slides", "regions")
        )
        if slide_id not in kept:
            await asyncio.to_thread(ready_row, archive, slide_id)
            loop = asyncio.get_running_loop()
            made = await loop.run_in_executor(self._drawing, _outlines, archive, slide_id)
            kept[slide_id] = made
            while len(kept) > _MOST_KEPT:
                kept.popitem(last=False)
            return made
        kept.move_to_end(slide_id)
        return kept[slide_id]

    async def _newest(self) -> Archive:
        async with self._opening:
            if self._snapshot is None:
                self._snapshot = await asyncio.to_thread(
                    ArchiveSnapshot, self.archive, refresh_s=self.refresh_s
                )
        return await self._snapshot.newest_async()

    @staticmethod
    def _row(archive: Archive, slide_id: str) -> dict[str, Any]:
        row: dict[str, Any] = archive.slides(columns=_COLUMNS, slide_ids=[slide_id]).to_pylist()[0]
        return row


class FileSlides:
    """Slides by their files, without an archive; each must stay as it is when first asked for.

    Args:
        paths: {slide id: path, or address in an object store}.
        mpp: µm per level-0 px where the file's own is missing or wrong: {slide id: value}.
    """

    def __init__(
        self, paths: Mapping[str, str | Path], *, mpp: Mapping[str, float] | None = None
    ) -> None:
        self.paths = {slide: str(path) for slide, path in paths.items()}
        self.mpp = dict(mpp or {})
        self._known: dict[str, SlideFile] = {}

    async def check(self) -> None:
        """Do nothing: there is no store that could be away."""

    async def find(self, slide_id: str) -> SlideFile:
        """Return the file of a slide, as it was when it was first asked for."""
        if slide_id not in self.paths:
            raise ArchiveError("There is no such slide.", code="unknown_slide")
        if slide_id not in self._known:
            source = await asyncio.to_thread(stat_slide, self.paths[slide_id])
            given = self.mpp.get(slide_id)
            self._known.setdefault(
                slide_id,
                SlideFile(
                    slide_id=slide_id, uri=source.uri, bytes=source.bytes,
                    mtime_ns=source.mtime_ns, content=_digest(source), mpp=given,
                    mpp_source="override" if given else "",
                ),
            )  # fmt: skip
        return self._known[slide_id]

    async def outlines(self, slide_id: str) -> bytes:
        """Return nothing: a file has no outlines."""
        await self.find(slide_id)
        return b'{"tissue":null,"regions":[]}'


def _file_of(row: Mapping[str, Any]) -> SlideFile:
    size, mtime = row["bytes"], row["mtime_ns"]
    source = Source(
        uri=row["uri"],
        bytes=-1 if size is None else size,
        mtime_ns=0 if mtime is None else mtime,
    )
    return SlideFile(
        slide_id=row["slide_id"], uri=source.uri, bytes=source.bytes, mtime_ns=source.mtime_ns,
        content=row["sha256"] or _digest(source), mpp=row["mpp"],
        mpp_source=row["mpp_source"] or "", sha256=row["sha256"],
    )  # fmt: skip


def _digest(source: Source) -> str:
    return hashlib.sha256(repr(source).encode(errors="surrogateescape")).hexdigest()


def _outlines(archive: Archive, slide_id: str) -> bytes:
    from pathflip.slides.tissue import TissueMask

    row = archive.slide(slide_id)
    regions = archive.regions(slide_id, columns=["region_id", "x0", "y0", "size0"]).to_pylist()
    tissue = None
    if row["tissue_png"] and row["tissue_mpp"]:
        mask = TissueMask.from_png(row["tissue_png"], mpp=row["tissue_mpp"], slide_mpp=row["mpp"])
        tissue = _multi_polygon(mask.polygons(), mask.mpp / mask.slide_mpp)
    return json.dumps({"tissue": tissue, "regions": regions}, separators=(",", ":")).encode()


def _multi_polygon(polygons: list[Any], px0: float) -> dict[str, Any]:
    """Return polygons as GeoJSON; simplified by ``px0`` level-0 px where they have many points."""
    import cv2
    import numpy as np

    points = sum(len(ring) for outer, holes in polygons for ring in (outer, *holes))

    def ring_of(ring: Any) -> list[list[float]]:
        if points > _MOST_POINTS:
            ring = cv2.approxPolyDP(ring.astype(np.float32)[:, None], px0, closed=True)[:, 0]
        closed: list[list[float]] = np.round(np.concatenate([ring, ring[:1]]), 2).tolist()
        return closed

    coordinates = []
    for outer, holes in polygons:
        rings = [ring_of(outer), *map(ring_of, holes)]
        coordinates.append([rings[0], *(ring for ring in rings[1:] if len(ring) > 3)])
    kept = [rings for rings in coordinates if len(rings[0]) > 3]
    return {"type": "MultiPolygon", "coordinates": kept}
