"""Zero-shot classification of tiles: pictures of known scale against the prompts of classes.

Reported twice: ``npe`` takes one prompt a class, its first name in the first template; ``pe`` takes
the ensemble, all names in the 20 templates of :mod:`pathflip.evaluation.prompts`. For each, every
level that tiles could be read at by itself, and pooled over a tile's levels
(:mod:`pathflip.evaluation.patch_text`).

Shapes: n tiles, C classes.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathflip.errors import ConfigError, SlideError
from pathflip.evaluation import bootstrap
from pathflip.evaluation.classification import baselines, measure
from pathflip.evaluation.patch_text import (
    Cut,
    LevelVectors,
    PatchReader,
    class_scores,
    class_weights,
    cut_picture,
    mean_vectors,
)
from pathflip.evaluation.prompts import TEMPLATES, TileTask
from pathflip.geometry import level_name
from pathflip.heatmap import write_png
from pathflip.interop.tile_sets import Tile, read_tile, read_tiles
from pathflip.progress import Progress, Report
from pathflip.splits import of_split

BATCH_BYTES = 64 << 20
"""Pixels of nodes that are encoded at a time; one picture may need more."""
_READERS = 2


@dataclass(frozen=True, kw_only=True)
class EncodedTiles:
    """Tiles that could be read, with their vectors.

    Attributes:
        tiles: The tiles [n].
        truth: Index of each one's class [n].
        found: Mean vectors by tile and level.
        by_field: Number of tiles that fill no node; see
            :func:`pathflip.evaluation.patch_text.cut_picture`.
        refused: Tiles that could not be used, {"tile", "code", "why"} each.
    """

    tiles: list[Tile]
    truth: NDArray[np.int64]
    found: LevelVectors
    by_field: int
    refused: list[dict[str, str]]


def list_tiles(source: str | Path, task: TileTask, *, split: str = "all") -> list[Tile]:
    """List the tiles of a split that have one of the task's classes.

    Args:
        source: Folder of the set, or a CSV; see :mod:`pathflip.interop.tile_sets`.
        task: Layout, classes and scale of the set.
        split: Split of the tiles; ``all`` for every tile.

    Raises:
        ConfigError: A label is neither a class of the task nor left out by it (``classes``), there
            is no tile of the split (``no_tiles``), or the set cannot be read.
    """
    tiles = read_tiles(source, task.layout)
    tiles = [tile for tile in tiles if tile.label not in task.leave_out]
    unknown = sorted({tile.label for tile in tiles} - set(task.classes))
    if unknown:
        raise ConfigError(
            f"{source} has tiles of {', '.join(unknown)}; the classes are "
            f"{', '.join(task.classes)}.",
            hint="Give every class its prompts, or name those to pass over in leave_out.",
            code="classes",
        )
    return of_split(tiles, split, source=source, what="tile", code="no_tiles")


def encode_tiles(
    tiles: Sequence[Tile],
    reader: PatchReader,
    task: TileTask,
    *,
    progress: Report | None = None,
) -> EncodedTiles:
    """Read and encode tiles; one that cannot be read costs that tile.

    Raises:
        ConfigError: A tile's scale is not known (``needs_mpp``), or none could be read
            (``no_tiles``).
    """
    index = {name: i for i, name in enumerate(task.classes)}
    kept: list[Tile] = []
    refused: list[dict[str, str]] = []
    vectors: list[NDArray[np.float32]] = []
    item: list[int] = []
    level: list[int] = []
    by_field = 0
    started = time.monotonic()
    for read in _chunks(_read_all(tiles, reader, task)):
        good = [(tile, cuts) for tile, cuts, error in read if error is None]
        refused += [
            {"tile": tile.name, "code": error.code, "why": str(error)}
            for tile, _, error in read
            if error is not None
        ]
        encoded = _encode([cuts for _, cuts in good], reader)
        for (tile, cuts), parts in zip(good, encoded, strict=True):
            if not all(np.isfinite(part).all() for part in parts):
                why = f"The encoder's values for {tile.name} are not finite."
                refused.append({"tile": tile.name, "code": "bad_features", "why": why})
                continue
            by_field += any(cut.by_field for cut in cuts)
            for cut, part in zip(cuts, parts, strict=True):
                # A tile may be thousands of nodes: only their mean is kept.
                vectors.append(part.mean(axis=0, dtype=np.float64, keepdims=True))
                item.append(len(kept))
                level.append(cut.level)
            kept.append(tile)
        if progress is not None:
            done, seconds = len(kept) + len(refused), time.monotonic() - started
            progress(
                Progress(what="encode", done=done, total=len(tiles), seconds=seconds, unit="tiles")
            )
    if not kept:
        first = f" The first: {refused[0]['why']}" if refused else ""
        raise ConfigError(
            f"None of {len(tiles)} tiles can be used.{first}",
            hint="Check that the set was unpacked whole.",
            code="no_tiles",
        )
    return EncodedTiles(
        tiles=kept,
        truth=np.array([index[tile.label] for tile in kept]),
        found=mean_vectors(
            np.concatenate(vectors).astype(np.float32),
            item=np.array(item),
            level=np.array(level),
            count=len(kept),
        ),
        by_field=by_field,
        refused=refused,
    )


def zero_shot(
    encoded: EncodedTiles,
    reader: PatchReader,
    task: TileTask,
    *,
    resamples: int = bootstrap.RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure zero-shot classification of encoded tiles.

    Args:
        encoded: The tiles.
        reader: Reader that encoded them.
        task: Classes and their prompts.
        resamples: Number of bootstrap resamples of patients, slides, or tiles where no group is
            known; 0 for no intervals.
        seed: Seed of the resamples.

    Returns:
        {"npe": {"weighted_f1", "balanced_accuracy", "accuracy", "ci", "classes", "confusion"},
        "pe": {…}, "levels": {"20x": {"n", "npe", "pe"}}, "majority", "chance", "n", "groups",
        "by_field", "without_tiles", "refused"}.
    """
    names, found = list(task.classes), encoded.found
    groups = [tile.group for tile in encoded.tiles]
    options: dict[str, Any] = {"resamples": resamples, "seed": seed}
    weights = {
        "npe": class_weights(reader, task.one_prompt(), templates=TEMPLATES[:1]),
        "pe": class_weights(reader, task.classes, templates=TEMPLATES),
    }
    document: dict[str, Any] = {
        "model": reader.name,
        "task": task.name,
        "n": len(encoded.tiles),
        "groups": len({group for group in groups if group}),
        "templates": len(TEMPLATES),
    }
    for kind, weight in weights.items():
        scores = class_scores(found, weight, tau=reader.tau)
        document[kind] = measure(
            encoded.truth, scores.argmax(axis=1), names, groups=groups, **options
        )
    document["levels"] = {}
    for level in np.unique(found.level).tolist():
        part = found.at(level)
        mine = encoded.truth[part.item]
        by_kind = {
            kind: measure(
                mine,
                (part.vectors @ weight.T).argmax(axis=1),
                names,
                groups=[groups[i] for i in part.item],
                **options,
            )
            for kind, weight in weights.items()
        }
        name = level_name(reader.level_mpp[level])
        document["levels"][name] = {"n": len(mine), **by_kind}
    there = Counter(names[i] for i in encoded.truth)
    return document | baselines(encoded.truth, classes=len(names)) | {
        "by_field": encoded.by_field,
        "without_tiles": [name for name in names if name not in there],
        "refused": encoded.refused,
    }  # fmt: skip


def write_sheet(
    path: str | Path,
    encoded: EncodedTiles,
    reader: PatchReader,
    task: TileTask,
    *,
    columns: int = 8,
    px: int = 96,
) -> Path:
    """Draw the tiles that each class's prompts fit best, framed green where right, else red.

    A row for each class, in the task's order, its tiles by falling score of the ensemble; only
    tiles given to that class, so a class that is never predicted has an empty row.
    """
    import cv2

    scores = class_scores(encoded.found, class_weights(reader, task.classes), tau=reader.tau)
    given = scores.argmax(axis=1)
    label, rows = 220, []
    for index, name in enumerate(task.classes):
        row = np.full((px + 8, label + columns * (px + 8), 3), 255, np.uint8)
        cv2.putText(
            row, name[:24], (4, px // 2), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA
        )
        mine = np.flatnonzero(given == index)
        for at, i in enumerate(mine[np.argsort(-scores[mine, index], kind="stable")][:columns]):
            rgb = read_tile(encoded.tiles[i])
            left = label + at * (px + 8)
            right = encoded.truth[i] == index
            row[: px + 6, left : left + px + 6] = (40, 150, 60) if right else (200, 50, 40)
            square = cv2.resize(rgb, (px, px), interpolation=cv2.INTER_AREA)
            row[3 : px + 3, left + 3 : left + px + 3] = square
        rows.append(row)
    return write_png(path, np.concatenate(rows))


# -- reading --------------------------------------------------------------------------------------

_Read = tuple[Tile, list[Cut], SlideError | None]


def _read_all(tiles: Sequence[Tile], reader: PatchReader, task: TileTask) -> Iterator[_Read]:
    """Yield tiles with their nodes, or with the error that they cost, in order."""

    def read(tile: Tile) -> _Read:
        mpp = tile.mpp or task.mpp
        if mpp is None:
            raise ConfigError(
                f"The scale of {tile.name} is not known.",
                hint="Add --mpp with its µm per pixel, for example --mpp 0.5, or a column mpp.",
                code="needs_mpp",
            )
        try:
            return tile, cut_picture(read_tile(tile), mpp=mpp, reader=reader), None
        except SlideError as error:
            return tile, [], error

    with ThreadPoolExecutor(_READERS) as pool:
        for start in range(0, len(tiles), 8 * _READERS):
            yield from pool.map(read, tiles[start : start + 8 * _READERS])


def _chunks(read: Iterator[_Read]) -> Iterator[list[_Read]]:
    """Group tiles until their nodes are :data:`BATCH_BYTES`."""
    chunk: list[_Read] = []
    held = 0
    for one in read:
        chunk.append(one)
        held += sum(cut.pixels.nbytes for cut in one[1])
        if held >= BATCH_BYTES:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk


def _encode(
    pictures: Sequence[Sequence[Cut]], reader: PatchReader
) -> list[list[NDArray[np.float32]]]:
    """Return unit vectors [k, d] of every cut of every picture; nodes of one size go together."""
    encoded: list[list[NDArray[np.float32]]] = [[] for _ in pictures]
    flat = [(i, cut) for i, cuts in enumerate(pictures) for cut in cuts]
    results: dict[int, NDArray[np.float32]] = {}
    for px in sorted({cut.pixels.shape[1] for _, cut in flat}):
        on = [at for at, (_, cut) in enumerate(flat) if cut.pixels.shape[1] == px]
        cuts = [flat[at][1] for at in on]
        pixels = np.concatenate([cut.pixels for cut in cuts])
        level = np.repeat([cut.level for cut in cuts], [len(cut.pixels) for cut in cuts])
        ends = np.cumsum([len(cut.pixels) for cut in cuts])[:-1]
        results |= zip(on, np.split(reader.vectors(pixels, level), ends), strict=True)
    for at, (i, _) in enumerate(flat):
        encoded[i].append(results[at])
    return encoded
