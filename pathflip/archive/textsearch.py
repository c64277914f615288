"""Full-text search in captions (BM25), and its fusion with search by vector.

A text is a bag of words to the full-text index: operators, field names and wildcards in it have no
meaning. The index is made when captions are written; without it there is no search by words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import ArrayLike

from pathflip.archive import CAPTIONS, Archive
from pathflip.archive.filters import Filter, row_mask
from pathflip.archive.indexes import indexed_columns
from pathflip.archive.search import (
    RESULT,
    Level,
    VectorSpace,
    all_conditions,
    allowed_slides,
    search,
    vector_space,
)
from pathflip.archive.storage import guarded
from pathflip.errors import ArchiveError, ConfigError

MAX_TEXT = 10_000
"""Longest text that is searched for, characters."""

RRF = 60
"""The constant of reciprocal rank fusion (Cormack, Clarke and Büttcher 2009)."""


def search_text(
    archive: Archive,
    text: str,
    *,
    encoder: str | None = None,
    model: str | None = None,
    k: int = 10,
    filters: Sequence[Filter] = (),
    exclude_slide: str | None = None,
    exclude_patient: str | None = None,
) -> pa.Table:
    """Find the slides whose captions match the words of a text best, by BM25.

    Args:
        archive: The archive; only ready slides are found.
        text: The words.
        encoder: Patch encoder whose rows of slides are filtered; may be left out with one encoder.
        model: Trained model whose rows of slides are filtered, instead.
        k: Results wanted, 1 to 10,000.
        filters: Conditions that all have to hold.
        exclude_slide: Id of a slide to leave out.
        exclude_patient: Patient to leave out; slides without a patient stay.

    Returns:
        The columns of :func:`pathflip.archive.search.search` for slides; score is the BM25 of the
        slide's best caption.

    Raises:
        ArchiveError: There are no captions (``no_captions``), or no full-text index of them
            (``not_indexed``).
        ConfigError: The text is empty or too long, or ``k`` is out of range.
    """
    if not 1 <= k <= 10_000:
        raise ConfigError(f"Cannot search for {k} results.")
    space = vector_space(archive, encoder=encoder, model=model)
    slides = _slide_rows(archive, space, filters, exclude_slide, exclude_patient)
    ranked = _ranked(archive, text, set(slides["slide_id"].to_pylist()), k)
    return _result(slides, ranked)


def search_hybrid(
    archive: Archive,
    text: str,
    vector: ArrayLike,
    *,
    encoder: str | None = None,
    model: str | None = None,
    fingerprint: str | None = None,
    level: Level = "slide",
    k: int = 10,
    filters: Sequence[Filter] = (),
    exclude_slide: str | None = None,
    exclude_patient: str | None = None,
) -> pa.Table:
    """Find by a text's embedding and by its words, fused by reciprocal rank.

    A result's score is the sum of 1 / (60 + rank) over the two rankings; a region has its slide's
    rank among the captions. Arguments, columns and errors are those of
    :func:`pathflip.archive.search.search` and :func:`search_text`.
    """
    depth = min(10_000, max(100, 5 * k))
    near = search(
        archive, vector, encoder=encoder, model=model, fingerprint=fingerprint, level=level,
        k=depth, filters=filters, exclude_slide=exclude_slide, exclude_patient=exclude_patient,
    )  # fmt: skip
    space = vector_space(archive, encoder=encoder, model=model)
    slides = _slide_rows(archive, space, filters, exclude_slide, exclude_patient)
    words = dict(_ranked(archive, text, set(slides["slide_id"].to_pylist()), depth))
    by_words = {slide: rank for rank, slide in enumerate(words, start=1)}
    key = "region_id" if level == "region" else "slide_id"
    scores: dict[str, float] = {}
    rows = near.to_pylist()
    for row in rows:
        rank = by_words.get(row["slide_id"])
        scores[row[key]] = 1 / (RRF + row["rank"]) + (1 / (RRF + rank) if rank else 0.0)
    if level == "slide":
        for slide, rank in by_words.items():
            scores.setdefault(slide, 1 / (RRF + rank))
        best = sorted(scores.items(), key=lambda item: (-item[1], item[0]))[:k]
        return _result(slides, best)
    best = sorted(scores.items(), key=lambda item: (-item[1], item[0]))[:k]
    found = {row["region_id"]: row for row in rows}
    return pa.Table.from_pylist(
        [
            found[region] | {"rank": rank, "score": score}
            for rank, (region, score) in enumerate(best, start=1)
        ],
        schema=RESULT,
    )


def _slide_rows(
    archive: Archive,
    space: VectorSpace,
    filters: Sequence[Filter],
    exclude_slide: str | None,
    exclude_patient: str | None,
) -> pa.Table:
    """Return id and location of the slides that meet the conditions."""
    columns = ["slide_id", "x0", "y0", "size0", "mpp", "tissue_fraction", "n_patches"]
    with guarded(archive.uri, f"read the table {space.table}", damaged=True):
        rows = archive.cached(
            f"{space.table}/slides",
            lambda: archive.dataset(space.table).to_table(
                columns=columns, filter=pc.field("kind") == "slide"
            ),
            of=(space.table,),
        )
    conditions = all_conditions(filters, exclude_slide, exclude_patient)
    rows = rows.filter(pa.array(row_mask(rows, conditions)))
    slides = allowed_slides(archive, space.encoder, conditions)
    return rows.filter(pc.is_in(rows["slide_id"], slides)).select(
        ["slide_id", "x0", "y0", "size0", "mpp"]
    )


def _ranked(archive: Archive, text: str, slides: set[str], k: int) -> list[tuple[str, float]]:
    """Return the best k of some slides by BM25, as (slide, score), best first, ties by id."""
    from lance.query import MatchQuery

    if not text.strip() or len(text) > MAX_TEXT or "\0" in text:
        raise ConfigError(
            "The text to search for is empty." if not text.strip() else "The text is too long.",
            hint=f"Give 1 to {MAX_TEXT:,} characters.",
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError("The text to search for is not text.") from error
    if CAPTIONS not in archive.tables():
        raise ArchiveError(
            f"The archive {archive.uri} holds no captions.",
            hint=f"Run: pathflip archive import --archive {archive.uri} --captions FILE",
            code="no_captions",
        )
    dataset: Any = archive.dataset(CAPTIONS)
    with guarded(archive.uri, "search the captions", damaged=True):
        indexed = archive.cached(
            "captions/indexes", lambda: indexed_columns(dataset), of=(CAPTIONS,)
        )
        if "text" not in indexed:
            raise ArchiveError(
                f"The captions of {archive.uri} have no index of their words.",
                hint=f"Run: pathflip archive maintain --archive {archive.uri}",
                code="not_indexed",
            )
        total = archive.cached("captions/rows", dataset.count_rows, of=(CAPTIONS,))
        asked = max(4 * k, 100)
        while True:
            rows = dataset.to_table(
                columns=["slide_id", "_score"],
                full_text_query=MatchQuery(text, "text"),
                limit=asked,
            )
            best: dict[str, float] = {}
            found = zip(rows["slide_id"].to_pylist(), rows["_score"].to_pylist(), strict=True)
            for slide, score in found:
                if slide in slides:
                    best[slide] = max(score, best.get(slide, -np.inf))
            # Ties at the end of what was asked for would be cut at random.
            if rows.num_rows < asked or asked >= total:
                break
            if len(best) >= k and sorted(best.values())[-k] > min(rows["_score"].to_pylist()):
                break
            asked *= 4
    return sorted(best.items(), key=lambda item: (-item[1], item[0]))[:k]


def _result(slides: pa.Table, ranked: Sequence[tuple[str, float]]) -> pa.Table:
    rows = {row["slide_id"]: row for row in slides.to_pylist()}
    return pa.Table.from_pylist(
        [
            rows[slide] | {"rank": rank, "score": score, "region_id": None}
            for rank, (slide, score) in enumerate(ranked, start=1)
            if slide in rows
        ],
        schema=RESULT,
    )
