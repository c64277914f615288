"""Retrieval between pictures and their captions, each picture taken as a slide of its own.

Sets of pictures with captions, such as Quilt-1M, measure a slide model on tissue it was not trained
on. A picture of known scale is cut into patches as a slide is, and those fill one region or more;
of unknown scale it is one patch, its middle square. Galleries, recalls and chance are those of
slides (:mod:`pathflip.evaluation.retrieval`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pathflip.errors import ArchiveError, ConfigError, SlideError
from pathflip.evaluation.retrieval import retrieval
from pathflip.geometry import Tiling
from pathflip.image_query import picture_regions
from pathflip.interop.tables import clean, column, is_missing, known, needed_column, read_rows
from pathflip.interop.tile_sets import Tile, read_tile
from pathflip.models.slide_batch import pad_slides
from pathflip.progress import Progress, Report
from pathflip.splits import canonical_split, of_split

if TYPE_CHECKING:
    from pathflip.checkpoints import Run
    from pathflip.encoders import Encoder

BATCH = 64
"""Pictures that are encoded at a time."""


@dataclass(frozen=True, kw_only=True)
class CaptionedPicture:
    """A picture with its caption.

    Attributes:
        path: File of the picture.
        caption: Its caption.
        split: train, val, test, or another name; None where the table has none.
        group: Patient, video or article it is of; pictures of a group are resampled together.
        mpp: µm per pixel; None where the table does not say.
    """

    path: Path
    caption: str
    split: str | None = None
    group: str | None = None
    mpp: float | None = None


def read_pairs(file: str | Path, *, split: str = "all") -> list[CaptionedPicture]:
    """Read a table of image, caption[, split][, patient][, mpp]; paths relative to the table.

    Raises:
        ConfigError: A column or a caption is missing, a scale is no number, or no line is of the
            split (``no_pairs``).
    """
    file = Path(file).expanduser()
    rows = read_rows(file)
    first = rows[0][1]
    image = needed_column(file, first, ("image", "image_path", "picture"))
    caption = needed_column(file, first, ("caption", "text"))
    part = column(file, first, ("split",))
    group = column(file, first, ("patient", "patient_id", "group", "video"))
    scale = column(file, first, ("mpp",))
    found = []
    for line, row in rows:
        if is_missing(row[image]) or is_missing(row[caption]):
            raise ConfigError(
                f"{file}, line {line}: no {image if is_missing(row[image]) else caption}.",
                hint="Leave such lines out.",
            )
        found.append(
            CaptionedPicture(
                path=file.parent / Path(row[image]).expanduser(),
                caption=clean(row[caption]),
                split=canonical_split(row[part]) if part else None,
                group=known(row[group]) if group else None,
                mpp=_scale(file, line, row[scale]) if scale else None,
            )
        )
    return of_split(found, split, source=file, what="picture", code="no_pairs")


def evaluate_pictures(
    pairs: Sequence[CaptionedPicture],
    run: Run,
    encoder: Encoder,
    *,
    mpp: float | None = None,
    progress: Report | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Measure recall from picture to caption ("itr") and back ("tir"), in the order of the table.

    Args:
        pairs: The pictures.
        run: Run of the model.
        encoder: The patch encoder that it was trained on.
        mpp: Scale of pictures whose line has none; None where it is not known.
        progress: Called while pictures are encoded.
        options: Options of :func:`pathflip.evaluation.retrieval.retrieval`.

    Returns:
        As :func:`pathflip.evaluation.retrieval.retrieval`, with "model", "one_patch": the number
        of pictures of unknown scale or smaller than a patch, and "refused": pictures that could not
        be read, {"picture", "code", "why"} each.

    Raises:
        ArchiveError: The encoder is not the run's (``other_encoder``).
        ConfigError: No picture can be read (``no_pairs``).
    """
    for key in ("name", "revision", "dim"):
        if run.encoder.get(key) != getattr(encoder, key):
            raise ArchiveError(
                f"Model {run.name} reads features of {run.encoder.get('name')}, {key} "
                f"{run.encoder.get(key)}; this encoder is {encoder.name}, {key} "
                f"{getattr(encoder, key)}.",
                hint="Give the encoder it was trained on with --encoder.",
                code="other_encoder",
            )
    refused: list[dict[str, str]] = []
    kept: list[CaptionedPicture] = []
    vectors: list[NDArray[np.float32]] = []
    single = 0
    start = time.monotonic()
    for group in _groups(pairs, refused):
        cut, one = _features(group, run, encoder, mpp=mpp)
        single += one
        vectors.append(_vectors(cut, run))
        kept += [pair for pair, _ in group]
        if progress is not None:
            done = len(kept) + len(refused)
            elapsed = time.monotonic() - start
            progress(Progress(what="pictures", done=done, total=len(pairs), seconds=elapsed))
    if not kept:
        raise ConfigError(
            f"None of the {len(pairs)} pictures can be read; the first: {refused[0]['why']}",
            hint="Check the paths of the table.",
            code="no_pairs",
        )
    captions = [pair.caption for pair in kept]
    found = retrieval(
        np.concatenate(vectors),
        run.model.encode_text(captions).float().cpu().numpy(),
        captions,
        patients=[pair.group or str(pair.path) for pair in kept],
        **options,
    )
    return found | {"model": run.name, "one_patch": single, "refused": refused}


def _groups(
    pairs: Sequence[CaptionedPicture], refused: list[dict[str, str]]
) -> Iterator[list[tuple[CaptionedPicture, NDArray[np.uint8]]]]:
    """Yield pictures that can be read, a batch at a time, the next read meanwhile."""
    starts = range(0, len(pairs), BATCH)
    with ThreadPoolExecutor(1) as pool:
        waiting = [pool.submit(_read, pairs[at : at + BATCH]) for at in starts[:1]]
        for at in starts:
            found, unread = waiting.pop().result()
            if at + BATCH < len(pairs):
                waiting.append(pool.submit(_read, pairs[at + BATCH : at + 2 * BATCH]))
            refused += unread
            if found:
                yield found


def _read(
    pairs: Sequence[CaptionedPicture],
) -> tuple[list[tuple[CaptionedPicture, NDArray[np.uint8]]], list[dict[str, str]]]:
    found, refused = [], []
    for pair in pairs:
        try:
            found.append((pair, read_tile(Tile(name=pair.path.name, label="", path=pair.path))))
        except SlideError as error:
            refused.append({"picture": str(pair.path), "code": error.code, "why": error.message})
    return found, refused


def _features(
    group: Sequence[tuple[CaptionedPicture, NDArray[np.uint8]]],
    run: Run,
    encoder: Encoder,
    *,
    mpp: float | None,
) -> tuple[list[list[NDArray[np.float32]]], int]:
    """Return patch features by region of each picture, and how many are one patch."""
    tiling = Tiling(**run.tiling)
    whole: list[int] = []
    cut: list[list[NDArray[np.float32]]] = []
    for at, (pair, pixels) in enumerate(group):
        scale = pair.mpp or mpp
        if scale is None or min(pixels.shape[:2]) * scale < tiling.patch_um:
            whole.append(at)
            cut.append([])
        else:
            cut.append(picture_regions(pixels, encoder=encoder, tiling=tiling, mpp=scale))
    if whole:
        patches = np.stack([_middle(group[at][1], tiling.patch_px) for at in whole])
        for at, values in zip(whole, encoder(patches), strict=True):
            cut[at] = [values[None]]
    return cut, len(whole)


def _middle(pixels: NDArray[np.uint8], px: int) -> NDArray[np.uint8]:
    """Return the middle square of a picture, ``px`` wide."""
    height, width = pixels.shape[:2]
    side = min(height, width)
    y, x = (height - side) // 2, (width - side) // 2
    how = cv2.INTER_AREA if side > px else cv2.INTER_LINEAR
    square = np.ascontiguousarray(pixels[y : y + side, x : x + side])
    return np.asarray(cv2.resize(square, (px, px), interpolation=how), np.uint8)


def _vectors(cut: Sequence[Sequence[NDArray[np.float32]]], run: Run) -> NDArray[np.float32]:
    """Embed pictures as the run embeds slides, [n, d]."""
    import torch

    slots, dim = Tiling(**run.tiling).slots, cut[0][0].shape[1]
    features, masks = [], []
    for regions in cut:
        values = np.zeros((len(regions), slots, dim), np.float32)
        mask = np.zeros((len(regions), slots), np.bool_)
        for row, patches in enumerate(regions):
            values[row, : len(patches)] = patches
            mask[row, : len(patches)] = True
        features.append(values)
        masks.append(mask)
    padded, there = pad_slides(features, masks)
    device = run.model.device
    with torch.no_grad():
        seen = run.model.encode_slide(padded.to(device), there.to(device))
    return np.asarray(seen.slide.float().cpu().numpy(), np.float32)


def _scale(file: Path, line: int, cell: str) -> float | None:
    if is_missing(cell):
        return None
    try:
        value = float(cell)
    except ValueError:
        value = -1.0
    if not 0.05 <= value <= 10:
        raise ConfigError(
            f"{file}, line {line}: mpp is {cell!r}.", hint="Give µm per pixel, 0.05 to 10."
        )  # fmt: skip
    return value
