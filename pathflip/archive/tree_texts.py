"""Captions of patch trees' nodes and the keywords cut from them: rows of ``tree_texts``.

A row is a tree's captions from one source. Its keywords are a function of all captions of that
source (but those of test slides), as those most trees have are left out. So they do not depend on
the order of imports: writing captions makes the keywords of the source's other trees again, and
only rows that change are written. Terms of one's own are stored with the archive, so that captions
that come later, by an import or a job, get their keywords by the same terms.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pathflip.archive.archive import Archive
from pathflip.archive.indexes import refresh_indexes
from pathflip.archive.schema import CHECKSUM, intact_rows, tree_text_id, tree_texts_schema
from pathflip.archive.storage import damaged_error, guarded, is_local
from pathflip.archive.trees import TREE_TEXTS, ensure_tree_texts
from pathflip.errors import ArchiveError, ConfigError
from pathflip.geometry import TREE_NODES
from pathflip.keywords import (
    Keywords,
    Lexicon,
    caption_keywords,
    corpus_frequent,
    extended_lexicon,
    extract,
    extractor_version,
)
from pathflip.splits import canonical_split

if TYPE_CHECKING:
    from pathflip.archive.commit import Committer

TREES_AT_ONCE = 512
"""Trees whose texts are held together: 85 captions of 700 characters are 60 kB."""
_OFFSETS = np.dtype("<u2")
_BODY = pa.schema([field for field in tree_texts_schema() if field.name != CHECKSUM])


@dataclass(frozen=True, kw_only=True)
class NodeCaptions:
    """Captions of a tree's nodes.

    Attributes:
        slide_id: The slide.
        tree_id: The tree.
        model: Model that wrote them; None if the source does not say.
        captions: Caption of each of the 85 nodes; None where there is none.
    """

    slide_id: str
    tree_id: str
    model: str | None
    captions: Sequence[str | None]


@dataclass(frozen=True, kw_only=True)
class TextCounts:
    """Result of writing texts, or of a dry run.

    Attributes:
        new: Trees that had no text of the source.
        changed: Trees whose row changed: captions or keywords.
        unchanged: Trees of the source whose row stays.
        without_keywords: Trees whose captions have no keyword.
        keywords: Keywords of the trees, added up.
        dropped: Keywords left out as most trees have them, sorted.
        extractor: Version of the extraction.
        terms: Terms that were used beside those of pathflip: those ``given`` now, those ``stored``
            with the archive when they were given before, or none (``built-in``).
        own_terms: Number of these.
    """

    new: int
    changed: int
    unchanged: int
    without_keywords: int
    keywords: int
    dropped: list[str]
    extractor: str
    terms: str
    own_terms: int


def encode_keywords(keywords: Keywords) -> bytes:
    """Return the column ``keyword_of``: offsets as little-endian uint16, then indices as uint8."""
    return keywords.offsets.astype(_OFFSETS).tobytes() + keywords.indices.tobytes()


def decode_keywords(vocabulary: Sequence[str], data: bytes) -> Keywords:
    """Return the keywords of a row from its columns ``keywords`` and ``keyword_of``.

    Raises:
        ValueError: The bytes are not those of 85 nodes and this vocabulary.
    """
    head = (TREE_NODES + 1) * _OFFSETS.itemsize
    offsets = np.frombuffer(data[:head], _OFFSETS).astype(np.uint16)
    indices = np.frombuffer(data[head:], np.uint8)
    whole = len(offsets) == TREE_NODES + 1 and offsets[-1] == len(indices) and offsets[0] == 0
    if not whole or (np.diff(offsets.astype(np.int64)) < 0).any():
        raise ValueError(f"{len(data)} bytes are not the keywords of {TREE_NODES} nodes")
    if len(indices) and int(indices.max()) >= len(vocabulary):
        raise ValueError(f"keyword {int(indices.max())} of {len(vocabulary)}")
    return Keywords(vocabulary=list(vocabulary), offsets=offsets, indices=indices)


def archive_lexicon(archive: Archive) -> Lexicon:
    """Return the terms of an archive's keywords: those of pathflip, and those last given for it."""
    made = archive.settings().get(TREE_TEXTS) or {}
    return extended_lexicon(tuple(made.get("terms", ())))


def text_sources(archive: Archive) -> list[str]:
    """Return the sources that trees have captions from, sorted."""
    if TREE_TEXTS not in archive.tables():
        return []
    with guarded(archive.uri, f"read the table {TREE_TEXTS}", damaged=is_local(archive.uri)):
        rows = archive.dataset(TREE_TEXTS).to_table(columns=["source"])
    return sorted(pc.unique(rows["source"]).to_pylist())


def check_source(archive: Archive, source: str | None) -> None:
    """Refuse to choose among several sources of captions.

    Args:
        archive: The archive.
        source: The source that was named, if any.

    Raises:
        ConfigError: None was, and there are several (``source``).
    """
    if source is None and len(known := text_sources(archive)) > 1:
        raise ConfigError(
            f"Patch trees of {archive.uri} have captions of {', '.join(known)}.",
            hint="Say which: with --source, or -o source= to train.",
            code="source",
        )


def write_tree_texts(
    committer: Committer,
    given: Mapping[str, NodeCaptions],
    *,
    source: str,
    lexicon: Lexicon | None = None,
) -> TextCounts:
    """Write captions of one source and make the keywords of all of its trees again.

    A node without a caption in ``given`` keeps the stored one if the model is the same; texts of
    another model are replaced as a whole. Rows that do not change are not written.

    Args:
        committer: The open writer of the archive.
        given: {tree_id: captions}; values are asked for twice and never all held at once.
        source: Name of the source.
        lexicon: Terms of the keywords, of :func:`pathflip.keywords.load_lexicon`, stored for later
            calls; default: see :func:`archive_lexicon`.
    """
    terms = None if lexicon is None else lexicon.given
    changes, counts = _plan(committer.archive, given, source=source, lexicon=lexicon)
    if TREE_TEXTS in committer.archive.tables():
        ensure_tree_texts(committer, terms=terms)
    for rows in changes:
        ensure_tree_texts(committer, terms=terms)
        committer.upsert(TREE_TEXTS, pa.Table.from_pylist(rows, schema=_BODY))
    made = counts()
    if made.new or made.changed:
        refresh_indexes(committer.lock, TREE_TEXTS)
    return made


def planned_tree_texts(
    archive: Archive,
    given: Mapping[str, NodeCaptions],
    *,
    source: str,
    lexicon: Lexicon | None = None,
) -> TextCounts:
    """Return what :func:`write_tree_texts` would return; write nothing."""
    changes, counts = _plan(archive, given, source=source, lexicon=lexicon)
    for _ in changes:
        pass
    return counts()


def put_captions(committer: Committer, trees: Sequence[NodeCaptions], *, source: str) -> None:
    """Insert or replace the captions of whole trees in one commit.

    Keywords are those of each tree by itself until :func:`redo_keywords` has seen the source.
    """
    ensure_tree_texts(committer)
    lexicon = archive_lexicon(committer.archive)
    rows = [_row(tree, source, lexicon, frozenset()) | {"extractor": None} for tree in trees]
    committer.upsert(TREE_TEXTS, pa.Table.from_pylist(rows, schema=_BODY))


def redo_keywords(
    committer: Committer, *, source: str | None = None, lexicon: Lexicon | None = None
) -> dict[str, TextCounts]:
    """Make the keywords of stored captions again, as after a change of the terms or the rules.

    Args:
        committer: The open writer of the archive.
        source: Only this source; default: all.
        lexicon: Terms; see :func:`write_tree_texts`.

    Returns:
        {source: counts}.

    Raises:
        ArchiveError: The trees have no captions, or none of this source (``no_captions``).
    """
    chosen = chosen_sources(committer.archive, source)
    return {name: write_tree_texts(committer, {}, source=name, lexicon=lexicon) for name in chosen}


def chosen_sources(archive: Archive, source: str | None) -> list[str]:
    """Return the sources of captions asked for.

    Raises:
        ArchiveError: See :func:`redo_keywords`.
    """
    known = text_sources(archive)
    if not known or source not in (None, *known):
        of = "" if source is None else f" of source {source}"
        raise ArchiveError(
            f"The patch trees of {archive.uri} have no captions{of}.",
            hint=f"Sources there are: {', '.join(known)}."
            if known
            else f"Add them: pathflip archive import --archive {archive.uri} --tree-captions FILE",
            code="no_captions",
        )
    return known if source is None else [source]


# -- plans ----------------------------------------------------------------------------------------


def _plan(
    archive: Archive, given: Mapping[str, NodeCaptions], *, source: str, lexicon: Lexicon | None
) -> tuple[Iterator[list[dict[str, Any]]], Callable[[], TextCounts]]:
    """Return the rows to write, some at a time, and a function that returns the counts behind them.

    The rows are made while they are taken: a writer may commit what it has taken.
    """
    stored = archive_lexicon(archive)
    whose = "stored" if stored.given else "built-in"
    whose, lexicon = (whose, stored) if lexicon is None else ("given", lexicon)
    made = extractor_version(lexicon)
    test = _test_slides(archive)
    bags = (
        {word for text in tree.captions if text for word in caption_keywords(text, lexicon=lexicon)}
        for batch in _merged(archive, given, source)
        for _, tree in batch
        if tree.slide_id not in test
    )
    dropped = corpus_frequent(bags) - lexicon.kept
    total = Counter[str]()

    def changes() -> Iterator[list[dict[str, Any]]]:
        for batch in _merged(archive, given, source):
            write = []
            for stored, tree in batch:
                row = _row(tree, source, lexicon, dropped)
                total["keywords"] += len(row["keywords"])
                total["without_keywords"] += not row["keywords"]
                if row == stored:
                    total["unchanged"] += 1
                else:
                    total["new" if stored is None else "changed"] += 1
                    write.append(row)
            if write:
                yield write

    def counts() -> TextCounts:
        return TextCounts(
            new=total["new"],
            changed=total["changed"],
            unchanged=total["unchanged"],
            without_keywords=total["without_keywords"],
            keywords=total["keywords"],
            dropped=sorted(dropped),
            extractor=made,
            terms=whose,
            own_terms=len(lexicon.given),
        )

    return changes(), counts


def _test_slides(archive: Archive) -> set[str]:
    """Return the slides of split test: what their captions say shapes no other tree's keywords."""
    rows = archive.slides(columns=["slide_id", "split"]).to_pylist()
    return {row["slide_id"] for row in rows if canonical_split(row["split"]) == "test"}


def _merged(
    archive: Archive, given: Mapping[str, NodeCaptions], source: str
) -> Iterator[list[tuple[dict[str, Any] | None, NodeCaptions]]]:
    """Yield (stored row, captions as they will be) of all trees of a source, some at a time."""
    seen: set[str] = set()
    for rows in _stored(archive, source):
        batch: list[tuple[dict[str, Any] | None, NodeCaptions]] = []
        for row in rows:
            old = NodeCaptions(
                slide_id=row["slide_id"], tree_id=row["tree_id"], model=row["model"],
                captions=row["captions"],
            )  # fmt: skip
            new = given.get(old.tree_id)
            if new is not None:
                seen.add(old.tree_id)
            batch.append((row, old if new is None else _over(new, old)))
        yield batch
    rest = [tree for tree in given if tree not in seen]
    for start in range(0, len(rest), TREES_AT_ONCE):
        yield [(None, given[tree]) for tree in rest[start : start + TREES_AT_ONCE]]


def _over(new: NodeCaptions, old: NodeCaptions) -> NodeCaptions:
    """Return new captions, and where a node has none the old one of the same model."""
    if new.model != old.model:
        return new
    pairs = zip(new.captions, old.captions, strict=True)
    return NodeCaptions(
        slide_id=new.slide_id,
        tree_id=new.tree_id,
        model=new.model,
        captions=[ours if ours is not None else theirs for ours, theirs in pairs],
    )


def _stored(archive: Archive, source: str) -> Iterator[list[dict[str, Any]]]:
    """Yield the stored rows of a source, some at a time.

    Raises:
        ArchiveError: A row is not what was written (``damaged``).
    """
    if TREE_TEXTS not in archive.tables():
        return
    with guarded(archive.uri, f"read the table {TREE_TEXTS}", damaged=is_local(archive.uri)):
        batches = archive.dataset(TREE_TEXTS).to_batches(
            filter=pc.field("source") == source, batch_size=TREES_AT_ONCE
        )
        for batch in batches:
            if not intact_rows(batch).all():
                raise damaged_error(archive.uri, f"rows of {TREE_TEXTS} are not what was written")
            yield batch.drop_columns([CHECKSUM]).to_pylist()


def _row(
    tree: NodeCaptions, source: str, lexicon: Lexicon, dropped: frozenset[str]
) -> dict[str, Any]:
    if len(tree.captions) != TREE_NODES:
        raise ValueError(f"{len(tree.captions)} captions of a tree of {TREE_NODES} nodes")
    keywords = extract(tree.captions, lexicon=lexicon, dropped=dropped)
    return {
        "text_id": tree_text_id(tree.tree_id, source),
        "slide_id": tree.slide_id,
        "tree_id": tree.tree_id,
        "source": source,
        "model": tree.model,
        "captions": list(tree.captions),
        "keywords": keywords.vocabulary,
        "keyword_of": encode_keywords(keywords),
        "extractor": extractor_version(lexicon),
    }
