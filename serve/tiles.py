"""Pixels of slides for the viewer: tiles at exact scale, pictures of rectangles, outlines.

:class:`Tiles` is a part like the others: plain and asynchronous, with or without Ray, with or
without an archive (:mod:`serve.slide_files`). Pixels are made by reader processes
(:mod:`serve.reader_pool`) in the geometry of :mod:`pathflip.slides.pyramid`. Tiles that were made
are kept up to a bound, and a tile that several ask for at once is made once. Nothing is shown of a
file that is not the one that was ingested: the reader that makes a tile looks, and before a kept
tile is shown somebody looked within ``CHECK_S``.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Collection
from typing import Any, TypeVar

from pathflip.errors import REASONS, SlideError
from pathflip.slides.pyramid import Pyramid
from pathflip.slides.reader import SlideReader
from serve.copies import Copies
from serve.limits import RequestError
from serve.reader_pool import LONG_PX, ReaderPool, ReadingConfig
from serve.slide_files import ArchiveSlides, SlideFile, SlideFiles

T = TypeVar("T")

EDITION = 1
"""Number that changes when tiles are made in another way, so that browsers ask for them anew."""
CHECK_S = 2.0
"""Seconds for which a slide that was looked at counts as the one that was ingested."""
MIN_VIEW_PX, MAX_VIEW_PX = 16, 1024
"""Least and most pixels of a view's longer side."""
MAX_ASPECT = 64
"""Most that a view is longer than wide."""
MAX_BEYOND = 4
"""Most sides of the slide that a view is long, and lies away from it."""
_MOST_KNOWN = 4096  # slides whose pyramids are remembered
_GONE = ("source_changed", "not_a_file")
_SAID = {
    "bad_tile": "The slide's file is damaged here.",
    "reader_crash": "The slide's file makes its reader crash.",
    "timeout": "Reading the slide takes too long.",
    "unknown_tile": "The slide has no such tile.",
    "too_many_pixels": "The slide stores no small level, and too much of it is in this picture.",
    "source_changed": "The slide's file is not the one that was ingested: it moved, is gone or "
    "has changed.",
}
"""Messages of errors of readers, whose own name files: the names of files may name people."""


class TileCache:
    """Bytes of tiles, those used longest ago dropped first.

    Args:
        limit: Bytes that are kept at most.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0
        self._kept: OrderedDict[str, bytes] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: str) -> bytes | None:
        """Return what is kept of a key."""
        data = self._kept.get(key)
        if data is not None:
            self._kept.move_to_end(key)
        return data

    def put(self, key: str, data: bytes) -> None:
        """Keep bytes; nothing that is larger than a quarter of all."""
        self.bytes -= len(self._kept.pop(key, b""))
        if len(data) > self.limit // 4:
            return
        self._kept[key] = data
        self.bytes += len(data)
        while self.bytes > self.limit:
            self.bytes -= len(self._kept.popitem(last=False)[1])


class Tiles:
    """Service part for pixels of slides.

    Args:
        slides: Files behind slide ids; or the URI of an archive, whose ready slides are meant.
        config: Readers and memory.
        refresh_s: Seconds until new commits to the archive are looked for.
        copies: Slides of object stores as files.
    """

    def __init__(
        self,
        slides: SlideFiles | str,
        *,
        config: ReadingConfig | None = None,
        refresh_s: float = 30.0,
        copies: Copies | None = None,
    ) -> None:
        self._slides: SlideFiles = (
            ArchiveSlides(slides, refresh_s=refresh_s) if isinstance(slides, str) else slides
        )
        self.config = config or ReadingConfig()
        self._pool = ReaderPool(self.config)
        self._copies = copies or Copies()
        self.cache = TileCache(self.config.cache_mb << 20)
        self._seen: OrderedDict[str, float] = OrderedDict()
        self._pyramids: OrderedDict[str, tuple[Pyramid, float | None, str]] = OrderedDict()
        self._drawing: dict[str, asyncio.Lock] = {}  # held by a client whose outlines are made
        self._making: dict[str, asyncio.Task[Any]] = {}
        self._waiting: Counter[str] = Counter()

    async def describe(self) -> dict[str, Any]:
        """Say how many bytes of tiles are kept; an archive that is away is an error."""
        await self._slides.check()
        return {"tiles": len(self.cache), "bytes": self.cache.bytes}

    async def close(self) -> None:
        """End the readers and let go of copies."""
        await asyncio.to_thread(self._pool.close)
        await self._copies.close()

    async def info(self, slide_id: str, *, client: str = "") -> dict[str, Any]:
        """Geometry of a slide's tiles, see :class:`serve.tile_routes.TileInfo`.

        Args:
            slide_id: The slide.
            client: Name of the client who asks, for :class:`serve.reader_pool.ReaderPool`.

        Raises:
            ArchiveError: ``unknown_slide``.
            SlideError: ``source_changed``, or the code of what a reader refuses.
        """
        file = await self._slides.find(slide_id)
        if file.content in self._pyramids:
            await self._look(file, client)
        else:
            known = await self._shared(
                f"info {file.content}",
                lambda: self._read(file, client, lambda reader, path, _: reader.pyramid(
                    path, slide_mpp=file.override, expected=(file.bytes, file.mtime_ns),
                    timeout_s=self.config.timeout_s,
                )),
            )  # fmt: skip
            _remember(self._pyramids, file.content, known)
        pyramid, own_mpp, _ = self._pyramids[file.content]
        mpp = file.mpp or own_mpp
        levels = []
        for level in range(pyramid.min_level, pyramid.max_level + 1):
            width, height = pyramid.size(level)
            scale0 = pyramid.scale0(level)
            levels.append({"level": level, "width": width, "height": height, "scale0": scale0})
        return {
            "slide_id": slide_id,
            "width": pyramid.width,
            "height": pyramid.height,
            "mpp": mpp,
            "power": 10 / mpp if mpp else None,
            "tile_w": pyramid.tile_w,
            "tile_h": pyramid.tile_h,
            "min_level": pyramid.min_level,
            "max_level": pyramid.max_level,
            "levels": levels,
            "format": "jpg",
            "version": _version(file),
        }

    async def tile(
        self,
        slide_id: str,
        level: int,
        column: int,
        row: int,
        *,
        known: Collection[str] = (),
        client: str = "",
    ) -> tuple[str, bytes | None]:
        """Return a tile's ETag and its JPEG; None instead of the JPEG if the client has it.

        Args:
            slide_id: The slide.
            level: Level of its pyramid, 0 to ``max_level``.
            column: Place of the tile.
            row: Place of the tile.
            known: ETags of what the client has.
            client: Name of the client.

        Raises:
            ArchiveError: ``unknown_slide``.
            SlideError: ``unknown_tile``, ``source_changed``, ``too_many_pixels``, or the code of
                what a reader refuses.
            RequestError: ``busy``.
        """
        file = await self._slides.find(slide_id)
        tag = f'"{_version(file)}-{level}-{column}_{row}"'
        key = f"{file.content} {level} {column} {row}"
        kept = self.cache.get(key)
        if kept is not None or tag in known:
            await self._look(file, client)
            return tag, None if tag in known else kept
        place = level, column, row
        return tag, await self._shared(key, lambda: self._make(file, key, place, client))

    async def view(
        self, slide_id: str, *, x0: int, y0: int, w0: int, h0: int, px: int, client: str = ""
    ) -> bytes:
        """JPEG of a rectangle of level-0 px, its longer side ``px`` pixels; white off the slide.

        Raises:
            ArchiveError: ``unknown_slide``.
            RequestError: ``bad_view``: it is too narrow, or far from the slide; ``busy``.
            SlideError: ``source_changed``, ``too_many_pixels``, or the code of what a reader
                refuses.
        """
        info = await self.info(slide_id, client=client)
        reach = MAX_BEYOND * max(info["width"], info["height"])
        if not MIN_VIEW_PX <= px <= MAX_VIEW_PX or min(w0, h0) < 1:
            raise RequestError(
                f"A view has {MIN_VIEW_PX} to {MAX_VIEW_PX} pixels.", code="bad_view"
            )
        if max(w0, h0) > MAX_ASPECT * min(w0, h0):
            raise RequestError(
                f"A view is at most {MAX_ASPECT} times as long as wide.", code="bad_view"
            )
        if max(abs(x0), abs(y0), w0, h0) > reach:
            raise RequestError(
                f"A view is at most {reach:,} px long, and from the slide.", code="bad_view"
            )
        file = await self._slides.find(slide_id)
        return await self._shared(
            f"view {file.content} {x0} {y0} {w0} {h0} {px}",
            lambda: self._read(file, client, lambda reader, path, most_px: reader.view(
                path, x0=x0, y0=y0, size0=(w0, h0), px=px, slide_mpp=file.override,
                expected=(file.bytes, file.mtime_ns), most_px=most_px,
                timeout_s=self.config.timeout_s,
            )),
        )  # fmt: skip

    async def outlines(self, slide_id: str, *, client: str = "") -> bytes:
        """Outlines of a slide's tissue and its regions; see :class:`serve.slide_files.SlideFiles`.

        They are made once for all who ask at the same time, and one slide at a time for a client.

        Raises:
            ArchiveError: ``unknown_slide``.
        """

        async def make() -> bytes:
            async with self._drawing.setdefault(client, asyncio.Lock()):
                return await self._slides.outlines(slide_id)

        return await self._shared(f"outlines {slide_id}", make)

    async def _make(
        self, file: SlideFile, key: str, place: tuple[int, int, int], client: str
    ) -> bytes:
        data, _ = await self._read(file, client, lambda reader, path, most_px: reader.tile(
            path, *place, slide_mpp=file.override, expected=(file.bytes, file.mtime_ns),
            most_px=most_px, timeout_s=self.config.timeout_s,
        ))  # fmt: skip
        self.cache.put(key, data)
        return data

    async def _look(self, file: SlideFile, client: str) -> None:
        """Refuse a slide whose file is another one than was ingested."""
        if time.monotonic() - self._seen.get(file.content, -CHECK_S) < CHECK_S:
            return
        await self._shared(
            f"look {file.content}",
            lambda: self._read(file, client, lambda reader, path, _: reader.check_unchanged(
                path, expected=(file.bytes, file.mtime_ns), timeout_s=self.config.timeout_s
            )),
        )  # fmt: skip

    async def _read(
        self, file: SlideFile, client: str, ask: Callable[[SlideReader, str, int], T]
    ) -> T:
        """Ask a reader for something of a slide; its errors name the slide by its id alone.

        Args:
            file: The slide.
            client: Name of the client.
            ask: Asks a reader, with the slide's path and the most pixels it may decode: few at
                first, so that what takes long is known before it begins.
        """
        began = time.monotonic()
        try:
            async with self._copies.open(file, client=client) as path:
                try:
                    found = await self._pool.run(
                        path, lambda reader: ask(reader, path, LONG_PX), client=client
                    )
                except SlideError as error:
                    if error.code != "too_many_pixels":
                        raise
                    most_px = self.config.most_px
                    found = await self._pool.run(
                        path, lambda reader: ask(reader, path, most_px), client=client, long=True
                    )
        except SlideError as error:
            if error.code in _GONE:
                self._seen.pop(file.content, None)
            raise _public(error) from None
        _remember(self._seen, file.content, began)
        return found

    async def _shared(self, key: str, make: Callable[[], Awaitable[T]]) -> T:
        """Await what is made once for all who ask at the same time; left by all, it is given up."""
        if key not in self._making:
            self._making[key] = asyncio.create_task(_run(make))
            self._making[key].add_done_callback(lambda task: self._made(key, task))
        task = self._making[key]
        self._waiting[key] += 1
        try:
            found: T = await asyncio.shield(task)
            return found
        finally:
            self._waiting[key] -= 1
            if not self._waiting[key]:
                del self._waiting[key]
                if not task.done():
                    task.cancel()
                    self._making.pop(key, None)

    def _made(self, key: str, task: asyncio.Task[Any]) -> None:
        if self._making.get(key) is task:
            del self._making[key]
        if not task.cancelled():
            task.exception()  # whoever waits has it; where nobody does, it is no warning


async def _run(make: Callable[[], Awaitable[T]]) -> T:
    return await make()


def _remember(known: OrderedDict[str, Any], key: str, value: Any) -> None:
    known[key] = value
    known.move_to_end(key)
    while len(known) > _MOST_KNOWN:
        known.popitem(last=False)


def _version(file: SlideFile) -> str:
    return f"{file.content[:20]}-{EDITION}"


def _public(error: SlideError) -> SlideError:
    """Return an error of a reader without the names of files."""
    code = "source_changed" if error.code in _GONE else error.code
    message = _SAID.get(code) or REASONS.get(code) or "The slide cannot be read."
    hint = "Ingest it again, or put the file back." if code == "source_changed" else ""
    return SlideError(message, hint=hint, code=code)
