"""Corpus of a run on patch trees: the trees, their split, and which rows hold their texts.

The list is made once, when the run begins, and kept beside it (data.parquet). Captions are not
copied: at the size of the paper they are tens of gigabytes. A digest of each tree's rows is, and a
tree that is no longer what it was ends the run (``archive_changed``).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pathflip.archive import Archive, vectors
from pathflip.archive.schema import CHECKSUM, tree_text_id
from pathflip.archive.storage import guarded
from pathflip.archive.tree_texts import check_source
from pathflip.archive.trees import TREE_TEXTS, TREES, read_trees, tree_encoder, tree_spec
from pathflip.errors import ArchiveError
from pathflip.geometry import LEVEL_OF, TREE_NODES
from pathflip.training.dataset import (
    digest_of,
    load_items,
    patient_of,
    save_items,
    splits_of,
)
from pathflip.training.rows import RowReader, changed, damaged

_TEXTS_AT_ONCE = 1024


@dataclass(frozen=True, kw_only=True)
class TreeCorpus:
    """Trees of a run, sorted by id; lists are parallel.

    Attributes:
        tree_ids: The trees.
        slide_ids: Their slides.
        patients: Patients of the slides; a slide without one is its own.
        splits: ``train`` or ``val``; trees of test slides are not in a corpus.
        levels: Levels of each, 1 to 4.
        captioned: Nodes of each that can be trained on: read, of a level that trains, captioned.
        sources: Source of each one's captions.
        digests: Digest of each one's rows: the tree, its features, its text.
        about: Archive URI, encoder {name, revision, dim}, sizes of trees, bytes of texts, counts of
            trees left out.
    """

    tree_ids: list[str]
    slide_ids: list[str]
    patients: list[str]
    splits: list[str]
    levels: list[int]
    captioned: list[int]
    sources: list[str]
    digests: list[str]
    about: dict[str, Any] = field(repr=False)

    unit: ClassVar[str] = "trees"

    def __len__(self) -> int:
        return len(self.tree_ids)

    def members(self, split: str) -> NDArray[np.int64]:
        """Return the positions of the trees of a split, ascending."""
        return np.flatnonzero([name == split for name in self.splits]).astype(np.int64)

    def says(self, tree: int) -> str:
        """Return the text by which trees count as equal: the id, so that none does.

        Equal captions of two trees are no negatives of each other wherever they meet.
        """
        return self.tree_ids[tree]

    def counts(self) -> dict[str, int]:
        """Return trees, slides, patients and captioned nodes of each split, for people."""
        found: dict[str, int] = {}
        for split in ("train", "val"):
            mine = self.members(split).tolist()
            found[f"{split}_trees"] = len(mine)
            found[f"{split}_slides"] = len({self.slide_ids[i] for i in mine})
            found[f"{split}_patients"] = len({self.patients[i] for i in mine})
            found[f"{split}_captions"] = sum(self.captioned[i] for i in mine)
        return found

    def digest(self) -> str:
        """Return the sha256 of the corpus."""
        return digest_of(self)

    def save(self, path: str | Path) -> None:
        """Write the corpus as Parquet; ``about`` goes into the file's metadata."""
        save_items(self, path)

    @classmethod
    def load(cls, path: str | Path) -> TreeCorpus:
        """Read a corpus that :meth:`save` wrote.

        Raises:
            CheckpointError: If the file is damaged.
        """
        return load_items(cls, path)


def make_tree_corpus(
    archive: Archive,
    *,
    encoder: str | None = None,
    source: str | None = None,
    levels: Sequence[int] = (0, 1, 2, 3),
    seed: int = 0,
    val_fraction: float = 0.1,
) -> TreeCorpus:
    """Choose the trees to train on and the trees to validate on.

    A tree takes part if its slide is ready, it has features of the encoder, and a node of it that
    was read has a caption. Trees follow the splits of their slides, see
    :func:`pathflip.training.dataset.splits_of`.

    Args:
        archive: The archive.
        encoder: Encoder of the features; may be left out where trees have one encoder.
        source: Source of the captions; may be left out when the archive has one.
        levels: Levels that are trained on, 0 (coarsest) to 3.
        seed: Seed of the split.
        val_fraction: Share of patients held out to validate, where the archive has no split.

    Raises:
        ArchiveError: No trees (``no_trees``), none with features of the encoder
            (``unknown_encoder``) or with captions (``no_captions``).
        ConfigError: Several sources of captions and none was named (``source``), a split of another
            name, or a patient with slides in several splits.
    """
    spec = tree_spec(archive)
    name, entry = tree_encoder(archive, encoder)
    columns = ["tree_id", "slide_id", "levels", "node_mask"]
    rows = read_trees(archive, columns=columns, encoder=name)
    check_source(archive, source)
    usable = (vectors(rows["node_mask"]) != 0) & np.isin(LEVEL_OF, levels)
    place = {tree: i for i, tree in enumerate(rows["tree_id"].to_pylist())}
    chosen, text_bytes = _choose_texts(archive, place, usable, source=source)
    if not chosen:
        of = "" if source is None else f" from source {source}"
        raise ArchiveError(
            f"None of the {len(place)} patch trees of {archive.uri} with features of {name} has a "
            f"caption{of}.",
            hint=f"Add them: pathflip archive import --archive {archive.uri} --tree-captions FILE",
            code="no_captions",
        )
    kept = sorted(chosen)  # rows are sorted by tree
    ids, slides = rows["tree_id"].to_pylist(), rows["slide_id"].to_pylist()
    named = {
        row["slide_id"]: row
        for row in archive.slides("ready", ["slide_id", "patient_id", "split"]).to_pylist()
    }
    with_trees = [named[slide] for slide in sorted({slides[i] for i in kept})]
    drawn = splits_of(with_trees, seed=seed, val_fraction=val_fraction)
    split = {row["slide_id"]: own for row, own in zip(with_trees, drawn, strict=True)}
    own = [i for i in kept if split[slides[i]] != "test"]
    sources = [chosen[i][0] for i in own]
    tree_ids = [ids[i] for i in own]
    depth = rows["levels"].to_pylist()
    digests, _ = read_digests(archive, entry["table"], tree_ids, sources)
    return TreeCorpus(
        tree_ids=tree_ids,
        slide_ids=[slides[i] for i in own],
        patients=[patient_of(named[slides[i]]) for i in own],
        splits=[split[slides[i]] for i in own],
        levels=[depth[i] for i in own],
        captioned=[chosen[i][1] for i in own],
        sources=sources,
        digests=digests,
        about={
            "archive": archive.uri,
            "encoder": {"name": name, "revision": entry["revision"], "dim": entry["dim"]},
            "trees": {"parent_um": spec.parent_um, "node_px": spec.node_px},
            "text_bytes": text_bytes,
            "left_out": {
                "test": len(kept) - len(own),
                "without_caption": len(place) - len(kept),
            },
        },
    )


def _choose_texts(
    archive: Archive, place: dict[str, int], usable: NDArray[np.bool_], *, source: str | None
) -> tuple[dict[int, tuple[str, int]], int]:
    """Return {row of the tree: (source, captioned nodes)}, and the bytes of those texts."""
    found: dict[int, tuple[str, int]] = {}
    sizes: dict[int, int] = {}
    for batch in _text_batches(archive, ["tree_id", "source", "captions", "keywords"]):
        captions = batch.column("captions").flatten()
        if len(captions) != len(batch) * TREE_NODES:
            raise damaged(archive, f"rows of {TREE_TEXTS} do not have {TREE_NODES} captions")
        lengths = pc.binary_length(pc.utf8_trim_whitespace(captions))
        said = np.asarray(pc.fill_null(lengths, 0)).reshape(len(batch), TREE_NODES)
        words = pc.fill_null(pc.list_value_length(batch.column("keywords")), 0).to_numpy()
        trees, sources = (batch.column(name).to_pylist() for name in ("tree_id", "source"))
        for row, (tree, own) in enumerate(zip(trees, sources, strict=True)):
            at = place.get(tree)
            if at is None or (source is not None and own != source):
                continue
            count = int(((said[row] > 0) & usable[at]).sum())
            if count:
                found[at] = (own, count)
                sizes[at] = int(said[row].sum()) + 16 * int(words[row])
    return found, sum(sizes.values())


def _text_batches(archive: Archive, columns: list[str]) -> Iterator[pa.RecordBatch]:
    if TREE_TEXTS in archive.tables():
        with guarded(archive.uri, f"read the table {TREE_TEXTS}", damaged=True):
            yield from archive.dataset(TREE_TEXTS).to_batches(
                columns=columns, batch_size=_TEXTS_AT_ONCE
            )


def read_digests(
    archive: Archive, features: str, trees: Sequence[str], sources: Sequence[str]
) -> tuple[list[str], dict[str, NDArray[np.int64]]]:
    """Return a digest of each tree's rows, and {table: their row numbers, int64 [n]}.

    Args:
        archive: The archive.
        features: Table of the encoder's features.
        trees: The trees.
        sources: Source of each one's text.

    Raises:
        CheckpointError: A tree lacks a row (``archive_changed``).
    """
    texts = [tree_text_id(tree, own) for tree, own in zip(trees, sources, strict=True)]
    parts, rows = [], {}
    for table, key, wanted in (
        (TREES, "tree_id", trees), (features, "tree_id", trees), (TREE_TEXTS, "text_id", texts),
    ):  # fmt: skip
        with guarded(archive.uri, f"read the table {table}", damaged=True):
            held = archive.dataset(table).to_table(columns=[key, CHECKSUM])
        at = pc.index_in(pa.array(wanted, pa.string()), held[key].combine_chunks())
        if at.null_count:
            raise changed(archive, f"Tree {trees[at.is_null().to_pylist().index(True)]}")
        rows[table] = at.to_numpy().astype(np.int64)
        parts.append(held[CHECKSUM].take(at).to_pylist())
    joined = zip(*parts, strict=True)
    return [hashlib.sha256("".join(own).encode()).hexdigest()[:32] for own in joined], rows


def unchanged_rows(corpus: TreeCorpus, archive: Archive) -> dict[str, RowReader]:
    """Return readers of the corpus' rows: ``trees``, ``features``, ``texts``.

    Raises:
        CheckpointError: A tree is no longer in the archive as it was (``archive_changed``).
    """
    wanted = corpus.about["encoder"]
    try:
        _, entry = tree_encoder(archive, wanted["name"])
    except ArchiveError as error:
        raise changed(archive, f"Tree {corpus.tree_ids[0]}") from error
    if TREE_TEXTS not in archive.tables():
        raise changed(archive, f"Tree {corpus.tree_ids[0]}")
    table = str(entry["table"])
    digests, rows = read_digests(archive, table, corpus.tree_ids, corpus.sources)
    for tree, made, found in zip(corpus.tree_ids, corpus.digests, digests, strict=True):
        if made != found:
            raise changed(archive, f"Tree {tree}")
    names = {"trees": TREES, "features": table, "texts": TREE_TEXTS}
    return {name: RowReader(archive, own, rows[own]) for name, own in names.items()}


def spread_over(patients: Sequence[str], most: int) -> list[str]:
    """Return patients of whom ``most`` trees may be in a batch, as if each were so many.

    Args:
        patients: Patient of each tree.
        most: Largest number of a patient's trees in a batch.
    """
    if most == 1:
        return list(patients)
    seen: Counter[str] = Counter()
    found = []
    for patient in patients:
        found.append(f"{patient}\x1f{seen[patient] % most}")
        seen[patient] += 1
    return found
