"""Annotations that clients draw: saved in the archive, each author's apart from the others'.

The table has a writer path of its own (:mod:`pathflip.archive.annotations`), so saving waits for no
job, and any number of replicas may save. Nothing is kept between requests but what Lance knows of
the table's files: a replica sees at once what another has saved.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from pathflip.archive.annotations import AnnotationStore, Ground
from pathflip.archive.snapshot import ArchiveSnapshot, ready_row
from pathflip.errors import PathFLIPError
from pathflip.interop.annotations import (
    NO_OFFSET,
    feature_of,
    read_collection,
    read_feature,
)
from serve.limits import RequestError

T = TypeVar("T")
logger = logging.getLogger(__name__)

THREADS = 4
THREADS_OF_CLIENT = 2
"""Threads of these that one client has at a time: others do not wait for its long files."""
BYTES_AN_HOUR = 256 << 20
"""Bytes that one client may have a replica write in an hour, about. What was replaced or removed
stays on disk for a day, so bounds of what is there do not bound it."""
_BYTES_OF_SAVE, _BYTES_OF_POINT = 16 << 10, 24
TIDY_AFTER = 32
"""Saves of a replica after which it looks whether fragments are to be merged."""


class Annotations:
    """Service part for annotations; needs no model.

    Coordinates are level-0 pixels, or with ``qupath`` those of QuPath, which count from the corner
    of a slide's bounds where it has some.

    Args:
        archive: URI of the archive.
        refresh_s: Seconds until new commits to the slides are looked for.
    """

    def __init__(self, archive: str, *, refresh_s: float = 30.0) -> None:
        self.snapshot = ArchiveSnapshot(archive, refresh_s=refresh_s)
        self._store = AnnotationStore(archive)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="annotations")
        self._turns: dict[str, asyncio.Semaphore] = {}
        self._written: dict[str, tuple[float, float]] = {}  # bytes of late, and when that was
        self._saves = 0
        self._tidying: asyncio.Future[None] | None = None

    async def describe(self) -> dict[str, Any]:
        """Number of annotations; reads the table, so that damage is noticed."""
        return {"annotations": await self._run(self._store.count)}

    async def features(
        self, slide_id: str, *, author: str | None, qupath: bool = False, client: str = ""
    ) -> dict[str, Any]:
        """FeatureCollection of a slide's annotations, written feature by feature beside requests.

        Args:
            slide_id: The slide.
            author: Author whose annotations are listed; None for everybody's.
            qupath: Whether coordinates are QuPath's.
            client: Name of the client.

        Returns:
            {"ids": those of the annotations, "json": the collection as JSON in UTF-8}. In it
            ``outdated`` is the number of annotations that were drawn on other pixels under the
            same id, and are not listed.

        Raises:
            ArchiveError: ``unknown_slide``.
        """
        ground = await self._ground(slide_id)
        offset = ground.offset if qupath else NO_OFFSET

        def write() -> dict[str, Any]:
            found = self._store.on_slide(ground, author=author)
            features = ",".join(
                json.dumps(
                    feature_of(one, offset=offset), ensure_ascii=False, allow_nan=False,
                    separators=(",", ":"),
                )
                for one in found.annotations
            )  # fmt: skip
            text = (
                f'{{"type":"FeatureCollection","features":[{features}],'
                f'"outdated":{len(found.outdated)}}}'
            )
            return {"ids": [one.annotation_id for one in found.annotations], "json": text.encode()}

        async with self._turn(client):
            return await self._run(write)

    async def put(
        self, slide_id: str, annotation_id: str, feature: Any, *, author: str, anyone: bool
    ) -> dict[str, Any]:
        """Save a feature, and return it as it is stored. It is on disk then.

        Args:
            slide_id: The slide.
            annotation_id: Id of the annotation, lower case.
            feature: GeoJSON feature; ``properties.revision`` is the revision that was read last.
            author: Name of the client.
            anyone: Whether it may change annotations of others.

        Raises:
            ArchiveError: ``unknown_slide``, ``unknown_annotation``, ``stale``,
                ``too_many_annotations``, ``busy``.
            ConfigError: The feature cannot be used (``geojson``).
            RequestError: ``busy``: the client has saved too much in the last hour.
        """
        ground = await self._ground(slide_id)

        def save() -> tuple[dict[str, Any], int]:
            drawn = read_feature(
                feature, slide_id=slide_id, author=author, annotation_id=annotation_id,
                width=ground.width, height=ground.height,
            )  # fmt: skip
            saved = self._store.put(drawn, ground=ground, by=author, anyone=anyone)
            return feature_of(saved), drawn.shape.points

        async with self._turn(author, saves=True):
            saved, points = await self._run(save)
        self._saved(author, points)
        return saved

    async def delete(self, slide_id: str, annotation_id: str, *, author: str, anyone: bool) -> None:
        """Remove an annotation; see :meth:`put`.

        Raises:
            ArchiveError: ``unknown_slide``, ``unknown_annotation``, ``busy``.
            RequestError: See there.
        """
        ground = await self._ground(slide_id)
        async with self._turn(author, saves=True):
            await self._run(
                lambda: self._store.delete(annotation_id, ground=ground, by=author, anyone=anyone)
            )
        self._saved(author, 0)

    async def add(
        self, slide_id: str, document: Any, *, author: str, qupath: bool = False
    ) -> dict[str, int]:
        """Save the annotations of a FeatureCollection in one commit, all or none.

        Args:
            slide_id: The slide.
            document: The collection.
            author: Name of the client.
            qupath: Whether coordinates are QuPath's.

        Returns:
            {"imported", "new", "changed", "unchanged"}: numbers of annotations.

        Raises:
            ArchiveError, RequestError: See :meth:`put`.
            ConfigError: A feature cannot be used (``geojson``).
        """
        ground = await self._ground(slide_id)

        def save() -> tuple[dict[str, int], int]:
            drawn = read_collection(
                document, slide_id=slide_id, author=author, width=ground.width,
                height=ground.height, offset=ground.offset if qupath else NO_OFFSET,
            )  # fmt: skip
            saved = self._store.put_all(drawn, ground=ground, by=author)
            names = ("new", "changed", "unchanged")
            counts = {name: len(getattr(saved, name)) for name in names}
            points = sum(one.shape.points for one in drawn)
            return {"imported": sum(counts.values()), **counts}, points

        async with self._turn(author, saves=True):
            counts, points = await self._run(save)
        self._saved(author, points)
        return counts

    # -- pieces -----------------------------------------------------------------------------------

    async def _ground(self, slide_id: str) -> Ground:
        """The slide as it is now.

        Raises:
            ArchiveError: ``unknown_slide``.
        """
        archive = await self.snapshot.newest_async()
        ready_row(archive, slide_id)
        return (await self._run(lambda: Ground.all(archive)))[slide_id]

    @asynccontextmanager
    async def _turn(self, client: str, *, saves: bool = False) -> AsyncIterator[None]:
        """Wait until a client may have a thread; one that has written too much may not save."""
        turn = self._turns.setdefault(client, asyncio.Semaphore(THREADS_OF_CLIENT))
        async with turn:
            if saves and self._lately(client) > BYTES_AN_HOUR:
                raise RequestError(
                    "Too much was saved under this name within the last hour.",
                    hint="Try again in some minutes; what was saved stays.",
                    code="busy",
                )
            yield

    def _lately(self, client: str) -> float:
        """Return about how many bytes a client has had written lately: they ebb away in an hour."""
        written, at = self._written.get(client, (0.0, 0.0))
        return max(0.0, written - (time.monotonic() - at) / 3600 * BYTES_AN_HOUR)

    def _saved(self, client: str, points: int) -> None:
        """Count what was written; merge fragments now and then, after the answer to who saved."""
        written = self._lately(client) + _BYTES_OF_SAVE + points * _BYTES_OF_POINT
        self._written[client] = written, time.monotonic()
        self._saves += 1
        if self._saves % TIDY_AFTER == 0 and (self._tidying is None or self._tidying.done()):
            self._tidying = asyncio.ensure_future(self._tidy())

    async def _tidy(self) -> None:
        try:
            await self._run(self._store.tidy)
        except PathFLIPError as error:  # the next one tries again
            logger.warning("Annotations were not merged: %s", error.code)

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)
