"""Vectors and captions of an archive's patch trees, as evaluations take them.

Shapes: T trees, 85 nodes, d joint width, K keywords.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from pathflip.archive.tree_texts import check_source
from pathflip.archive.trees import (
    TREE_TEXTS,
    read_trees,
    take_features,
    tree_encoders,
    tree_spec,
)
from pathflip.compat import check_features
from pathflip.errors import ArchiveError, ConfigError
from pathflip.evaluation.encode import SlideRow, slide_rows
from pathflip.evaluation.patch_text import PatchReader
from pathflip.geometry import LEVEL_OF, TREE_NODES, TREE_OFFSETS
from pathflip.progress import Progress, Report

if TYPE_CHECKING:
    from pathflip.archive import Archive

BANK = 4096
"""Most keywords of a bank."""
_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True)
class TreeVectors:
    """Encoded nodes of trees.

    Attributes:
        tree_ids: Keys of the trees [T].
        slides: Slide of each tree [T].
        tx, ty: Grid position of each root [T].
        vectors: Unit vectors, float32 [T, 85, d]; zero where there is no node.
        mask: bool [T, 85], True where a node is.
    """

    tree_ids: list[str]
    slides: list[SlideRow]
    tx: NDArray[np.int64]
    ty: NDArray[np.int64]
    vectors: NDArray[np.float32]
    mask: NDArray[np.bool_]

    @property
    def patients(self) -> list[str]:
        """Patient of each tree, or its slide where that is not known [T]."""
        return [slide.patient_id or slide.slide_id for slide in self.slides]

    def of_split(self, split: str) -> NDArray[np.int64]:
        """Return the trees of a split; of ``all``, every one."""
        return np.flatnonzero([split in ("all", slide.split) for slide in self.slides])


def check_trees(archive: Archive, reader: PatchReader) -> str:
    """Refuse an archive whose trees are not of the kind a model was trained on.

    Returns:
        The archive's name of the encoder.

    Raises:
        ArchiveError: It has no trees (``no_trees``), none with features of the model's encoder
            (``other_encoder``), or trees of other sizes (``other_tiling``).
    """
    spec, held = tree_spec(archive), tree_encoders(archive)
    name, wanted = str(reader.base["name"]), reader.base
    if name not in held:
        raise ArchiveError(
            f"Model {reader.name} reads features of {name}; the trees of {archive.uri} have "
            f"{', '.join(held) or 'none'}.",
            hint=f"Run: pathflip trees --archive {archive.uri} --encoder {name}",
            code="other_encoder",
        )
    check_features(reader.name, wanted, held[name], of=f"the trees of {archive.uri}")
    if spec.node_px != reader.node_px or not np.allclose(spec.level_mpp, reader.level_mpp):
        raise ArchiveError(
            f"Model {reader.name} was trained on nodes of {reader.node_px} px at "
            f"{reader.level_mpp[0]:g} to {reader.level_mpp[-1]:g} µm/px; those of {archive.uri} "
            f"are {spec.node_px} px at {spec.level_mpp[0]:g} to {spec.level_mpp[-1]:g}.",
            hint="Use an archive whose trees were cut the same way.",
            code="other_tiling",
        )
    return name


def tree_slides(
    archive: Archive, reader: PatchReader, *, splits: Sequence[str] | None
) -> list[SlideRow]:
    """Return slides of some splits that have trees for a model, sorted by id."""
    rows = read_trees(archive, columns=["slide_id"], encoder=check_trees(archive, reader))
    usable = set(rows["slide_id"].to_pylist())
    return slide_rows(archive, usable=usable, drawn=reader.drawn, splits=splits)


def encode_trees(
    archive: Archive,
    reader: PatchReader,
    *,
    splits: Sequence[str] | None = None,
    progress: Report | None = None,
) -> TreeVectors:
    """Encode the nodes of all trees of some splits, sorted by tree id.

    Levels the model was not trained on count as not there.

    Args:
        archive: Archive with trees that have features of the model's encoder.
        reader: The model.
        splits: Splits of the slides; None for all.
        progress: Called while trees are encoded.

    Raises:
        ConfigError: There is no tree of these splits (``no_slides``).
        ArchiveError: See :func:`check_trees`.
    """
    name = check_trees(archive, reader)
    slides = {row.slide_id: row for row in tree_slides(archive, reader, splits=splits)}
    columns = ["tree_id", "slide_id", "tx", "ty", "node_mask"]
    rows = read_trees(archive, columns=columns, encoder=name)
    rows = rows.filter(pc.is_in(rows["slide_id"], _strings(slides)))
    count = rows.num_rows
    mask = rows["node_mask"].combine_chunks().flatten().to_numpy().reshape(count, TREE_NODES) != 0
    mask = mask & np.isin(LEVEL_OF, reader.levels)
    places = rows["row"].to_numpy()
    vectors: NDArray[np.float32] | None = None
    started = time.monotonic()
    for start in range(0, count, _AT_ONCE):
        part = slice(start, min(start + _AT_ONCE, count))
        there = mask[part]
        features = take_features(archive, places[part], encoder=name)[there]
        found = reader.of_features(features, np.broadcast_to(LEVEL_OF, there.shape)[there])
        if vectors is None:
            vectors = np.zeros((count, TREE_NODES, found.shape[1]), np.float32)
        vectors[part][there] = found
        if progress is not None:
            seconds = time.monotonic() - started
            progress(
                Progress(what="encode", done=part.stop, total=count, seconds=seconds, unit="trees")
            )
    assert vectors is not None
    return TreeVectors(
        tree_ids=rows["tree_id"].to_pylist(),
        slides=[slides[slide] for slide in rows["slide_id"].to_pylist()],
        tx=rows["tx"].to_numpy().astype(np.int64),
        ty=rows["ty"].to_numpy().astype(np.int64),
        vectors=vectors,
        mask=mask,
    )


def node_quadrants() -> NDArray[np.int64]:
    """Return the quadrant of its tree that each node lies in, row-major [85]; -1 of the root."""
    found = [-1]
    for level in (1, 2, 3):
        row, column = np.divmod(np.arange(4**level), 2**level)
        half = 2 ** (level - 1)
        found += (2 * (row // half) + column // half).tolist()
    return np.asarray(found, np.int64)


def node_position(node: int) -> tuple[int, int, int]:
    """Return (level, row, column) of a node within its tree."""
    level = int(LEVEL_OF[node])
    row, column = divmod(node - TREE_OFFSETS[level], 2**level)
    return level, row, column


# -- texts ----------------------------------------------------------------------------------------


def node_captions(
    archive: Archive, trees: Sequence[str], *, source: str | None = None
) -> dict[str, list[str | None]]:
    """Return {tree_id: captions of its 85 nodes} of those trees that have any.

    Args:
        archive: Archive with captions of trees.
        trees: Keys of the trees; no other row is opened.
        source: Source of the captions; may be left out when the archive has one.

    Raises:
        ConfigError: None of the trees has captions (``no_captions``), or the archive has several
            sources and none was named (``source``).
    """
    found: dict[str, list[str | None]] = {}
    for tree_id, captions in _texts(archive, trees, "captions", source=source):
        if any(captions):
            found[tree_id] = captions
    if not found:
        raise ConfigError(
            f"None of {len(trees)} patch trees of {archive.uri} has captions.",
            hint=f"Add them: pathflip archive import --archive {archive.uri} --tree-captions FILE",
            code="no_captions",
        )
    return found


def keyword_bank(
    archive: Archive, reader: PatchReader, *, source: str | None = None, most: int = BANK
) -> list[str]:
    """Return the keywords of training trees, those of most trees first, for text-guided vectors.

    Captions of other trees are never opened: their keywords would tell what is in them.

    Args:
        archive: Archive the model was trained on.
        reader: The model; what it was trained on is of split train.
        source: Source of the captions; may be left out when the archive has one.
        most: Largest number of keywords.

    Raises:
        ConfigError: Training trees have no keywords (``no_captions``), or see
            :func:`node_captions`.
    """
    slides = {row.slide_id for row in tree_slides(archive, reader, splits=("train",))}
    rows = read_trees(archive, columns=["tree_id", "slide_id"])
    rows = rows.filter(pc.is_in(rows["slide_id"], _strings(slides)))
    counts: Counter[str] = Counter()
    for _, words in _texts(archive, rows["tree_id"].to_pylist(), "keywords", source=source):
        counts.update(word for word in words if word)
    if not counts:
        raise ConfigError(
            f"The training trees of {archive.uri} have no keywords.",
            hint="Text-guided vectors need the archive the model was trained on.",
            code="no_captions",
        )
    return sorted(counts, key=lambda word: (-counts[word], word))[:most]


def _texts(
    archive: Archive, trees: Sequence[str], column: str, *, source: str | None
) -> Iterator[tuple[str, list[str | None]]]:
    """Yield (tree_id, a column of ``tree_texts``) of these trees, from one source."""
    check_source(archive, source)
    if TREE_TEXTS not in archive.tables():
        return
    columns = ["tree_id", "source", column]
    dataset = archive.dataset(TREE_TEXTS)
    for start in range(0, len(trees), 512):
        wanted = ", ".join("'" + one.replace("'", "''") + "'" for one in trees[start : start + 512])
        rows = dataset.to_table(columns=columns, filter=f"tree_id IN ({wanted})").to_pylist()
        for row in sorted(rows, key=lambda row: str(row["tree_id"])):
            if source in (None, row["source"]):
                yield row["tree_id"], row[column] or []


def _strings(values: Sequence[str] | set[str] | dict[str, SlideRow]) -> object:
    import pyarrow as pa

    return pa.array(sorted(values), pa.string())
