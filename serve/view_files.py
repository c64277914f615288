"""The slides of files that were named, in place of an archive's: they are listed and shown.

:class:`FileList` answers what :class:`serve.search.Search` answers about slides, and nothing that
needs an archive. Files are opened in reader processes beside the requests; what cannot be opened is
listed with the reason, as ingest would quarantine it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from pathflip.errors import ArchiveError, PathFLIPError, SlideError
from pathflip.slides.sources import SUFFIXES
from serve.limits import RequestError
from serve.slide_list import HIDDEN, Page, SlideList
from serve.tiles import Tiles

LIST_S = 2.0
"""Seconds that a list waits for files that are being opened; those that take longer follow."""
AT_ONCE = 8
"""Files that are opened at a time; tiles are asked for beside them."""
THUMBNAIL_PX = 512
FOR_NOW = ("busy", "unavailable")
"""Codes of what says nothing about a file: it is opened again when it is asked for again."""
_UNREAD = "The file is missing, empty or not readable with these permissions."
_UNKNOWN = (
    "width", "height", "mpp", "vendor", "split", "n_regions", "n_patches", "tissue_mm2", "reason",
    "message", *HIDDEN,
)  # fmt: skip


def ids_of(paths: Iterable[str]) -> dict[str, str]:
    """Return {slide id: path}: ids are the names of the files, numbered where names are equal."""
    found: dict[str, str] = {}
    for path in paths:
        stem = Path(path).name
        if stem.lower().endswith((*SUFFIXES, ".dcm")):
            stem = stem.rpartition(".")[0]
        safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in stem)[:120] or "slide"
        name, number = safe, 1
        while name in found:
            number += 1
            name = f"{safe}-{number}"
        found[name] = path
    return found


class FileList:
    """Service part for the list of slides where there is no archive.

    Args:
        paths: {slide id: path}.
        tiles: Part that opens them.
    """

    def __init__(self, paths: Mapping[str, str], tiles: Tiles) -> None:
        self._tiles = tiles
        self._rows: dict[str, dict[str, Any]] = {
            slide: dict.fromkeys(_UNKNOWN) | {"slide_id": slide, "status": "ready", "uri": path}
            for slide, path in paths.items()
        }
        self._opening: dict[str, asyncio.Task[None]] = {}
        self._listed: SlideList | None = None  # made anew when something was opened
        self._turns = asyncio.Semaphore(AT_ONCE)

    async def describe(self) -> dict[str, Any]:
        """Say how many files there are."""
        return {"slides": len(self._rows)}

    counts = describe

    async def offers(self) -> dict[str, bool]:
        """Tell that nothing can be searched."""
        return {"indexed": False, "patients": False}

    async def slide_encoders(self) -> list[dict[str, Any]]:
        """List none: there are no vectors."""
        return []

    async def slides(self, **asked: Any) -> Page:
        """A page of slides by id; see :meth:`serve.slide_list.SlideList.page`."""
        opening = [self._open(slide) for slide in self._rows]
        await asyncio.wait(opening, timeout=LIST_S)
        if self._listed is None:
            self._listed = SlideList(self._rows.values())
        return self._listed.page(**asked)

    async def slide(self, slide_id: str) -> dict[str, Any]:
        """Row of a slide, as far as it is known.

        Raises:
            ArchiveError: ``unknown_slide``.
            SlideError: It cannot be opened: its reason.
            RequestError: ``unavailable``: it could not be opened yet.
        """
        row = self._rows.get(slide_id)
        if row is None:
            raise ArchiveError("There is no such slide.", code="unknown_slide")
        await asyncio.shield(self._open(slide_id))
        if slide_id not in self._opening:
            raise RequestError("The slide is still being opened; ask again.", code="unavailable")
        if row["status"] != "ready":
            raise SlideError(row["message"], code=row["reason"])
        return SlideList([row]).rows[slide_id]

    async def thumbnail(self, slide_id: str, *, px: int | None = None) -> bytes:
        """JPEG of the whole slide, its longer side ``px`` pixels.

        Raises:
            ArchiveError, SlideError, RequestError: See :meth:`slide`.
        """
        row = await self.slide(slide_id)
        return await self._tiles.view(
            slide_id, x0=0, y0=0, w0=row["width"], h0=row["height"], px=px or THUMBNAIL_PX
        )

    async def search(self, *_: Any) -> NoReturn:
        """Refuse a search: there are no vectors (``no_model``)."""
        raise RequestError("Files that are in no archive cannot be searched.", code="no_model")

    segment = search

    def _open(self, slide: str) -> asyncio.Task[None]:
        if slide not in self._opening:
            self._opening[slide] = asyncio.create_task(self._look(slide))
        return self._opening[slide]

    async def _look(self, slide: str) -> None:
        async with self._turns:
            row = self._rows[slide]
            try:
                info = await self._tiles.info(slide)
            except PathFLIPError as error:
                if error.code in FOR_NOW:
                    del self._opening[slide]
                    return
                code, message = error.code, error.message
                if code == "source_changed":  # it never was another
                    code, message = "not_a_file", _UNREAD
                row |= {"status": "quarantined", "reason": code, "message": message}
            else:
                row |= {name: info[name] for name in ("width", "height", "mpp")}
            self._listed = None
