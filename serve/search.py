"""Search over the archive, and the public metadata of its slides.

A query is :func:`pathflip.search.run_query` in a thread: Lance and NumPy release the interpreter's
lock, so the event loop stays free. LanceDB's asynchronous API took nearly twice as long per query
for the same columns, because the library keeps region locations in memory and the API reads them
each time (docs/howto/serve.md).
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

from pathflip import tracing
from pathflip.archive.snapshot import ArchiveSnapshot, ready_row
from pathflip.display import shrunk
from pathflip.errors import ConfigError, PathFLIPError
from pathflip.heatmap import encode_png
from serve.limits import RequestError
from serve.slide_list import HIDDEN, Page, SlideList

if TYPE_CHECKING:
    from pathflip.archive import Archive

T = TypeVar("T")

SHOWN = (
    "slide_id", "width", "height", "mpp", "vendor", "split", "n_regions", "n_patches", "tissue_mm2",
)  # fmt: skip
"""Columns of a slide that clients may see; no other leaves the archive but :data:`STATE`."""
STATE = ("status", "reason", "message")
"""Columns that say why a slide is not ready; the message without names of files."""
THREADS = 8
SCANS = 2
"""Searches for patches at a time: each compares up to millions, and others do not wait for it."""
RECENT = 16
"""Kinds of searches that are made once of a newer state before it is used."""
_JPEG = b"\xff\xd8\xff"


class Search:
    """Service part for search and slide metadata; needs no model.

    Args:
        archive: URI of the archive.
        model: Name of the trained model whose embeddings are searched; None for the archive's
            encoder, by which nothing is found by words.
        fingerprint: The model's; embeddings of another are refused.
        refresh_s: Seconds until new commits are looked for.
        patients: Whether clients may filter by patient and see patients' ids.
        labels: Whether clients may filter by labels of slides.
    """

    def __init__(
        self,
        archive: str,
        *,
        model: str | None = None,
        fingerprint: str | None = None,
        refresh_s: float = 30.0,
        patients: bool = False,
        labels: bool = True,
    ) -> None:
        self.snapshot = ArchiveSnapshot(archive, refresh_s=refresh_s, warm=self._warm)
        self._recent: OrderedDict[Any, tuple[Mapping[str, Any], Mapping[str, Any] | None]]
        self._recent = OrderedDict()
        self.model, self.fingerprint = model, fingerprint
        self.patients, self.labels = patients, labels
        # Lance spreads a query over all processors: more threads only wait for each other.
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="search")
        self._scans = ThreadPoolExecutor(SCANS, thread_name_prefix="patches")

    async def describe(self) -> dict[str, Any]:
        """Number of ready slides; reads a row, so that a lost file is noticed."""
        archive = await self.snapshot.newest_async()
        await asyncio.to_thread(lambda: archive.dataset("slides").to_table(limit=1))
        return {"slides": len(_ready(archive))}

    async def offers(self) -> dict[str, bool]:
        """Tell whether there are vectors of its model, and whether patients' ids are shown."""
        archive = await self.snapshot.newest_async()
        return {"indexed": self.model in archive.models(), "patients": self.patients}

    async def slide_encoders(self) -> list[dict[str, Any]]:
        """List the slide encoders whose vectors were imported: id, created (Unix s), revision."""
        archive = await self.snapshot.newest_async()
        return [
            {
                "id": name,
                "created": int(datetime.fromisoformat(entry["created_at"]).timestamp()),
                "revision": entry["revision"],
            }
            for name, entry in sorted(archive.slide_encoders().items())
        ]

    async def counts(self) -> dict[str, float]:
        """Count ready slides ("slides"), for operators.

        Where there are vectors of its model, count the slides that have one ("indexed") and the
        vectors that no vector index has ("unindexed_rows"); of a vector index, the recall when it
        was last changed ("index_recall").
        """
        archive = await self.snapshot.newest_async()
        return await self._run(self._count, archive)

    def _count(self, archive: Archive) -> dict[str, float]:
        found: dict[str, float] = {"slides": len(_ready(archive))}
        if self.model in archive.models():
            table = archive.models()[self.model]["embeddings_table"]
            lag = archive.cached("serve/lag", lambda: _lag(archive.dataset(table)), of=(table,))
            found |= lag
        return found

    # -- slides -----------------------------------------------------------------------------------

    async def slides(self, *, limit: int, label: str = "", **filters: Any) -> Page:
        """A page of slides by id; see :meth:`serve.slide_list.SlideList.page`.

        Raises:
            RequestError: ``labels``: this service does not filter by labels.
        """
        if label and not self.labels:
            raise RequestError("This service does not filter by labels.", code="labels")
        archive = await self.snapshot.newest_async()
        listed = await self._run(self._list, archive)
        return listed.page(limit=limit, label=label, **filters)

    async def slide(self, slide_id: str) -> dict[str, Any]:
        """Public metadata of a slide.

        Raises:
            ArchiveError: ``unknown_slide``.
        """
        archive = await self.snapshot.newest_async()
        ready_row(archive, slide_id)
        listed = await self._run(self._list, archive)
        return listed.rows[slide_id]

    async def thumbnail(self, slide_id: str, *, px: int | None = None) -> bytes:
        """The JPEG of a slide's thumbnail, its longer side at most ``px`` pixels.

        Raises:
            ArchiveError: ``unknown_slide``.
            RequestError: ``no_thumbnail``.
        """
        archive = await self.snapshot.newest_async()
        ready_row(archive, slide_id)
        data: bytes | None = (await self._run(archive.slide, slide_id))["thumbnail"]
        if not data or not data.startswith(_JPEG):
            raise RequestError("The archive has no thumbnail of this slide.", code="no_thumbnail")
        return data if px is None else await self._run(shrunk, data, px) or data

    def _list(self, archive: Archive) -> SlideList:
        def read() -> SlideList:
            columns = [*SHOWN, *(["patient_id"] if self.patients else [])]
            return SlideList(archive.slides(columns=[*columns, *STATE, *HIDDEN]).to_pylist())

        return archive.cached("serve/slides", read, of=("slides",))

    # -- search -----------------------------------------------------------------------------------

    async def search(
        self, request: Mapping[str, Any], embedded: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        """Answer a :class:`serve.schemas.SearchRequest`.

        Args:
            request: Its fields.
            embedded: Embedding of its text or picture, as :class:`serve.embedder.Embedder` returns
                it, for level patch by its patch model; None for a slide or region, and for a search
                by words.

        Returns:
            {"model", "results"} of :class:`serve.schemas.SearchResponse`, of patches "exhaustive".

        Raises:
            ArchiveError: ``unknown_slide``; ``wrong_model``: the embedding is of another model;
                ``not_indexed``; ``no_captions``.
            RequestError: ``patients``, ``labels``, ``unknown_label``, ``no_patient``,
                ``unknown_slide_encoder``.
            ConfigError: A filter is wrong.
        """
        archive = await self.snapshot.newest_async()
        patches = request["level"] == "patch"
        pool = self._scans if patches else self._threads
        loop = asyncio.get_running_loop()
        with tracing.span("query", level=request["level"], mode=request["mode"]):
            found = await loop.run_in_executor(pool, self._search, archive, request, embedded)
        if not patches:  # one reads all features whatever came before
            self._remember(request, embedded)
        return found

    def _remember(self, request: Mapping[str, Any], embedded: Mapping[str, Any] | None) -> None:
        fields = tuple(sorted({condition["field"] for condition in request["filters"]}))
        kind = request["level"], request["mode"], request["encoder"], embedded is None, fields
        self._recent[kind] = request, embedded
        self._recent.move_to_end(kind)
        while len(self._recent) > RECENT:
            self._recent.popitem(last=False)

    def _warm(self, archive: Archive) -> None:
        """Read what requests need into a newer state: a search of each kind that came of late."""
        self._list(archive)
        _ready(archive)
        for request, embedded in list(self._recent.values()):
            with suppress(PathFLIPError):  # the slide it is about may be gone
                self._search(archive, request, embedded)

    def _search(
        self, archive: Archive, request: Mapping[str, Any], embedded: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        from pathflip.archive.filters import LABEL, Filter
        from pathflip.search import NoPatientError, Query, run_query

        filters = [Filter(**condition) for condition in request["filters"]]
        if not self.patients and any(one.field == "patient_id" for one in filters):
            raise RequestError("This service does not filter by patient.", code="patients")
        if not self.labels and any(one.field.startswith(LABEL) for one in filters):
            raise RequestError("This service does not filter by labels.", code="labels")
        slide, region = request["slide_id"], request["region_id"]
        if slide is not None or region is not None:
            ready_row(archive, slide or region.rpartition("/")[0])
        imported = request["encoder"]
        if imported is not None and imported not in (known := archive.slide_encoders()):
            raise RequestError(
                "The archive has no vectors of slides by this encoder.",
                hint=f"It has those of: {', '.join(sorted(known))}." if known else "It has none.",
                code="unknown_slide_encoder",
            )
        space = embedded or {"model": self.model, "fingerprint": self.fingerprint}
        patches = request["level"] == "patch"
        by_encoder = patches or imported is not None
        shared = ("text", "mode", "level", "k", "exclude_same_slide", "exclude_same_patient")
        query = Query(
            vector=None if embedded is None else embedded["vectors"][0],
            slide=slide,
            region=region,
            filters=filters,
            encoder=imported or (space["model"] if patches else None),
            model=None if by_encoder else space["model"],
            fingerprint=None if by_encoder else space["fingerprint"],
            **{name: request[name] for name in shared},
        )
        try:
            found = run_query(archive, query)
        except NoPatientError:
            # The hint of the library names flags of the command line.
            raise RequestError(
                "The archive knows no patient of this slide.", code="no_patient"
            ) from None
        except ConfigError as error:
            if error.code != "unknown_label":
                raise
            # The hint of the library names all labels there are.
            raise RequestError("No slide has this label.", code="unknown_label") from None
        if patches:
            exhaustive = found.schema.metadata[b"exhaustive"] == b"true"
            told = {"model": query.encoder, "exhaustive": exhaustive}
            return told | {"results": found.to_pylist()}
        model = "captions" if query.mode == "text" else imported or query.model
        return {"model": model, "results": found.to_pylist()}

    async def segment(
        self, request: Mapping[str, Any], classes: Mapping[str, Any]
    ) -> dict[str, Any] | bytes:
        """Answer a :class:`serve.schemas.SegmentRequest`.

        Args:
            request: Its fields.
            classes: Vectors of its classes, as :meth:`serve.embedder.Embedder.classes` returns
                them.

        Returns:
            The JSON document, or a PNG.

        Raises:
            ArchiveError: ``unknown_slide``; ``unknown_encoder``: there are no features of the patch
                model.
            ConfigError: ``no_thumbnail``.
        """
        archive = await self.snapshot.newest_async()
        ready_row(archive, request["slide_id"])
        with tracing.span("segment", classes=len(request["classes"])):
            return await self._run(_segment, archive, request, classes)

    async def _run(self, work: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)


def _segment(
    archive: Archive, request: Mapping[str, Any], classes: Mapping[str, Any]
) -> dict[str, Any] | bytes:
    from pathflip.evaluation.segment_stored import segment_stored

    found = segment_stored(
        archive, request["slide_id"], list(request["classes"]), classes["vectors"],
        tau=classes["tau"], encoder=classes["model"], min_patches=request["min_patches"],
    )  # fmt: skip
    if request["format"] == "png":
        return encode_png(found.picture())
    if request["format"] == "geojson":
        return found.geojson()
    return found.as_json() | {"model": classes["model"]}


def _lag(dataset: Any) -> dict[str, float]:
    """Count slides with a vector and vectors without an index; read the recall of the index."""
    from pathflip.archive.indexes import noted_recall

    has = sum(
        index.num_rows_indexed
        for index in dataset.describe_indices()
        if "vector" in index.field_names
    )
    recall = noted_recall(dataset)
    return {
        "indexed": dataset.count_rows("kind = 'slide'"),
        "unindexed_rows": max(0, dataset.count_rows() - has),
        **({} if recall is None else {"index_recall": recall}),
    }


def _ready(archive: Archive) -> list[str]:
    """Ids of the ready slides, sorted."""
    return archive.cached("serve/ready", lambda: sorted(archive.ready_ids()), of=("slides",))
