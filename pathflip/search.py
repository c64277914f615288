"""One way to search an archive, for the command line, the service and notebooks.

A :class:`Query` says what is looked for, in which vectors and among which rows; :func:`run_query`
answers it with an Arrow table, and :func:`find` does both for notebooks, with pictures. The command
line and the service translate flags and JSON into a query and rows back; what a query may ask is
decided here (:func:`query_faults`), once.

=================  ========  ==============================================================
looked for         mode      found by
=================  ========  ==============================================================
a picture          vector    cosine with its embedding, by a patch encoder or a model
a slide, a region  vector    cosine with its own stored embedding
a text             vector    cosine with its embedding by a model, or by a patch model
a text             text      BM25 over captions (slides only)
a text             hybrid    both, by reciprocal rank fusion
=================  ========  ==============================================================

Regions or slides are found, or single patches (level ``patch``): those by a picture or a text, in
the space of an encoder's features, which for a text is a patch model's (``mrplip:RUN``).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pathflip.errors import ConfigError

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import ArrayLike, NDArray

    from pathflip.archive import Archive
    from pathflip.archive.filters import Filter
    from pathflip.archive.search import Level
    from pathflip.checkpoints import Run, TreeRun

Mode = Literal["vector", "text", "hybrid"]
Fault = Literal[
    "not_one", "nothing_stored", "two_patients", "needs_text", "needs_model", "needs_slides",
    "only_features",
]  # fmt: skip

PICTURE_PX = 160
"""Side of the pictures that a notebook shows of results."""

FAULTS: dict[Fault, str] = {
    "not_one": "A query is one of a text, a picture, a slide and a region.",
    "nothing_stored": "A text or a picture has no slide or patient of the archive to leave out.",
    "two_patients": "Leave out one patient: the query's own, or a named one.",
    "needs_text": "The modes text and hybrid search for a text.",
    "needs_model": "Searching for a text by its meaning needs a trained model.",
    "needs_slides": "Captions are of slides, not of regions.",
    "only_features": "Patches are found by the vector of a text or a picture, by an encoder's "
    "features.",
}
"""Faults of a query; the command line and the service word each in their own terms."""


class NoPatientError(ConfigError):
    """The query's own patient shall be left out, and the archive does not know the patient.

    Nothing is searched then: results of the same patient could not be told from others.
    """


def query_faults(
    sought: Collection[str],
    *,
    mode: str,
    level: str,
    exclude_same: bool = False,
    exclude_same_patient: bool = False,
    exclude_patient: bool = False,
    has_model: bool = True,
    by_slide_model: bool = False,
) -> set[Fault]:
    """Check the kinds of a query's parts against each other.

    Args:
        sought: Queries given: of ``text``, ``image``, ``slide``, ``region``.
        mode: ``vector``, ``text`` or ``hybrid``.
        level: ``region``, ``slide`` or ``patch``.
        exclude_same: Whether the query's own slide or patient is left out.
        exclude_same_patient: Whether it is the patient.
        exclude_patient: Whether a named patient is left out.
        has_model: Whether there is a trained model to embed a text with.
        by_slide_model: Whether it is a model of slides.
    """
    found: set[Fault] = set()
    if len(sought) != 1:
        found.add("not_one")
    if exclude_same and not {"slide", "region"} & set(sought):
        found.add("nothing_stored")
    if exclude_same_patient and exclude_patient:
        found.add("two_patients")
    if "text" not in sought and mode != "vector":
        found.add("needs_text")
    if "text" in sought and mode != "text" and not has_model:
        found.add("needs_model")
    if level == "patch":
        if mode != "vector" or {"slide", "region"} & set(sought) or by_slide_model:
            found.add("only_features")
    elif mode == "text" and level != "slide":
        found.add("needs_slides")
    return found


@dataclass(frozen=True, kw_only=True, eq=False)
class Query:
    """A search: what is looked for, in which vectors, among which rows.

    Attributes:
        text: Words; with ``vector`` unless ``mode`` is ``text``.
        vector: Embedding [d] of the text, or of a picture, by ``model`` or else ``encoder``.
        slide: A slide of the archive, by id or unique file name.
        region: A region of the archive, by id.
        mode: By embedding (``vector``), by the words of captions (``text``), or both (``hybrid``).
        level: Whether regions, slides or patches are found.
        k: Results wanted, 1 to 10,000.
        filters: Conditions that all have to hold.
        exclude_same_slide: Leave out the slide that ``slide`` or ``region`` names.
        exclude_same_patient: Leave out its patient.
        exclude_patient: Leave out this patient; slides without a patient stay.
        encoder: Patch encoder whose embeddings are compared, may be left out when the archive holds
            one; or a slide encoder whose vectors were imported, which finds slides only.
        model: Trained model whose embeddings are compared, instead.
        fingerprint: The model's, compared with that of the stored embeddings.

    Raises:
        ConfigError: The parts do not go together, see :data:`FAULTS`.
    """

    text: str | None = None
    vector: ArrayLike | None = None
    slide: str | None = None
    region: str | None = None
    mode: Mode = "vector"
    level: Level | Literal["patch"] = "region"
    k: int = 10
    filters: Sequence[Filter] = ()
    exclude_same_slide: bool = False
    exclude_same_patient: bool = False
    exclude_patient: str | None = None
    encoder: str | None = None
    model: str | None = None
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        parts = {
            "text": self.text is not None,
            "image": self.text is None and self.vector is not None,
            "slide": self.slide is not None,
            "region": self.region is not None,
        }
        found = query_faults(
            [name for name, given in parts.items() if given],
            mode=self.mode,
            level=self.level,
            exclude_same=self.exclude_same_slide or self.exclude_same_patient,
            exclude_same_patient=self.exclude_same_patient,
            exclude_patient=self.exclude_patient is not None,
            has_model=self.vector is not None,
            by_slide_model=self.model is not None,
        )
        for fault, message in FAULTS.items():
            if fault in found:
                raise ConfigError(message)


def run_query(archive: Archive, query: Query) -> pa.Table:
    """Search an archive.

    Returns:
        Best first: rank (from 1), score (cosine; BM25; or the sum of reciprocal ranks), slide_id,
        region_id (null for slides), x0, y0, size0 (level-0 px), mpp (µm per level-0 px). Of patches
        region_id is the region they are of, and the schema's metadata says b"exhaustive": b"true",
        or b"false" where only patches of the best regions were compared.

    Raises:
        ArchiveError: Slide or region are not there or not ready (``unknown_slide``); the embeddings
            are not there (``not_indexed``, ``unknown_encoder``) or of another model
            (``wrong_model``, ``wrong_encoder``); there are no captions (``no_captions``).
        NoPatientError: The query's own patient shall be left out and is not known.
        ConfigError: The text is empty or too long, the vector zero, or ``k`` out of range.
    """
    from pathflip.archive.search import search, stored_vector
    from pathflip.archive.textsearch import search_hybrid, search_text

    among: dict[str, Any] = {
        "k": query.k, "filters": query.filters, "exclude_patient": query.exclude_patient,
    }  # fmt: skip
    key = None
    if query.slide is not None or query.region is not None:
        key = archive.resolve(query.slide) if query.slide is not None else str(query.region)
        among |= _left_out(archive, key, query)
    if query.level == "patch":
        from pathflip.archive.patch_search import search_patches

        assert query.vector is not None
        patches = search_patches(archive, query.vector, encoder=query.encoder, **among)
        told = {"exhaustive": str(patches.exhaustive).lower()}
        return patches.rows.replace_schema_metadata(told)
    if query.mode == "text":
        assert query.text is not None
        # Filters look at the rows of slides, which are the same by every encoder and model.
        model = query.model if query.model in archive.models() else None
        encoder = next(iter(archive.encoders()), None) if model is None else None
        return search_text(archive, query.text, encoder=encoder, model=model, **among)
    vector = query.vector
    if vector is None:
        assert key is not None
        vector = stored_vector(archive, key, encoder=query.encoder, model=query.model)
    space: dict[str, Any] = {
        "encoder": query.encoder, "model": query.model, "fingerprint": query.fingerprint,
    }  # fmt: skip
    if query.mode == "hybrid":
        assert query.text is not None
        return search_hybrid(archive, query.text, vector, level=query.level, **space, **among)
    return search(archive, vector, level=query.level, **space, **among)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class SearchResults:
    """Results of a search, which a notebook shows with pictures.

    Attributes:
        archive: The archive searched.
        query: The query.
        rows: The results, as :func:`run_query` returns them.
    """

    archive: Archive
    query: Query
    rows: pa.Table

    def __len__(self) -> int:
        return int(self.rows.num_rows)

    def __repr__(self) -> str:
        return f"SearchResults({len(self)} for {self._sought()} in {self.archive.uri!r})"

    def to_pandas(self) -> Any:
        """Return the results as a pandas DataFrame, a row each, best first."""
        return self.rows.to_pandas()

    def _sought(self) -> str:
        query = self.query
        named = query.text or query.slide or query.region
        return "a picture" if named is None else repr(named)

    def _repr_html_(self) -> str:
        """Show the best results with pictures read from the slides."""
        from pathflip.display import MAX_ROWS, Picture, page
        from pathflip.report.archive import hits

        def seen(hit: dict[str, Any]) -> str | Picture:
            where = f"result {hit['rank']}, {hit['slide_id']} at {hit['x0']}, {hit['y0']}"
            uri = hit["picture"] if hit["region_id"] else (hit["map"] or {}).get("uri", "")
            return Picture(uri=uri, alt=where) if uri else hit["fault"] or "no picture"

        found = hits(self.archive, self.rows.slice(0, MAX_ROWS), px=PICTURE_PX, patches=False)
        return page(
            f"{len(self)} results for {self._sought()}",
            columns=("rank", "score", "picture", "slide", "x0, y0 (px)", "side (µm)"),
            rows=[
                (
                    str(hit["rank"]), f"{hit['score']:.3f}", seen(hit), hit["slide_id"],
                    f"{hit['x0']}, {hit['y0']}", f"{hit['size0'] * hit['mpp']:.0f}",
                )
                for hit in found
            ],
            total=len(self),
        )  # fmt: skip


def find(
    archive: Archive, text: str | None = None, *, run: Run | None = None, **query: Any
) -> SearchResults:
    """Search an archive from Python: by words, by a slide or a region, or by a vector.

    Args:
        archive: The archive.
        text: Words to look for; by their meaning with ``run``, or with ``mode="text"`` in captions.
        run: Trained model, indexed, whose vectors are compared; see
            :func:`pathflip.checkpoints.load_run`.
        query: Other fields of :class:`Query`.

    Raises:
        ArchiveError: The archive has no vectors of the run's model (``not_indexed``, and those of
            :func:`pathflip.compat.check_fits`), or as :func:`run_query` says.
        ConfigError: The query cannot be asked, see :class:`Query` and :func:`run_query`.
    """
    if run is not None:
        from pathflip.compat import check_indexed

        check_indexed(archive, run, folder=str(run.path))
        query |= {"model": run.name, "fingerprint": run.fingerprint}
        if text is not None and query.get("mode") != "text":
            if not text.strip():
                raise ConfigError("The text to search for is empty.")
            query["vector"] = embed_texts(run, [text])[0]
    asked = Query(text=text, **query)
    return SearchResults(archive=archive, query=asked, rows=run_query(archive, asked))


def embed_texts(run: Run | TreeRun, texts: Sequence[str]) -> NDArray[np.float32]:
    """Embed texts by a run's model, to search with.

    Those of a run on patch trees are compared with vectors of its encoder, ``mrplip:RUN``.

    Returns:
        [n, d], of length 1.
    """
    vectors = run.model.encode_text(texts).float().cpu().numpy()
    return np.ascontiguousarray(vectors, np.float32)


def embed_regions(
    run: Run, regions: Sequence[NDArray[np.float32]], *, slots: int
) -> NDArray[np.float32]:
    """Embed a picture by a run's model, as it embeds a slide.

    Args:
        run: The trained model.
        regions: Patch features [n, d_in] of each region, 1 to ``slots`` patches, see
            :func:`pathflip.image_query.image_regions`.
        slots: Patch slots of a region.

    Returns:
        [d], of length 1.
    """
    import torch

    features = torch.zeros(1, len(regions), slots, regions[0].shape[1])
    mask = torch.zeros(1, len(regions), slots, dtype=torch.bool)
    for number, values in enumerate(regions):
        features[0, number, : len(values)] = torch.from_numpy(values)
        mask[0, number, : len(values)] = True
    vector = run.model.encode_slide(features, mask).slide[0].float().cpu().numpy()
    return np.ascontiguousarray(vector, np.float32)


def _left_out(archive: Archive, key: str, query: Query) -> dict[str, Any]:
    """Return the slide and the patient that a query by a stored embedding leaves out."""
    slide = key.rpartition("/")[0] or key
    archive.resolve(slide)  # says so if there is none
    found: dict[str, Any] = {"exclude_slide": slide if query.exclude_same_slide else None}
    if query.exclude_same_patient:
        patient = archive.slide(slide)["patient_id"]
        if patient is None:
            raise NoPatientError(
                f"The archive knows no patient of {slide}.",
                hint="Give them when ingesting (--patients CSV), or use --exclude-same-slide.",
            )
        found["exclude_patient"] = patient
    return found
