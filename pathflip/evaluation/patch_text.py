"""Patch–text models on pictures: levels of a picture, their vectors, scores pooled over levels.

A model of patches reads nodes: squares of ``node_px`` pixels at one of four resolutions. A picture
of known scale is cut into the nodes it fills at every resolution it has (:func:`cut_picture`), the
base encoder and the model turn each into a unit vector, and the vectors of a level are averaged:
the mean of cosines with a text is the cosine with that mean.

The score of a class at a level is softmax(mean cosine / τ) over the classes, and the score of the
picture is the mean over its levels. A mean over all nodes would let the many nodes of the finest
level outvote the rest: 64 of the 85 nodes of a tree are of 40x.

Shapes: n pictures, r rows (a picture at a level), k nodes, C classes, d joint width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pathflip.encoders import Encoder, load_encoder
from pathflip.encoders.mrplip import check_base
from pathflip.errors import ConfigError
from pathflip.evaluation.encode import drawn_splits
from pathflip.evaluation.prompts import PLACEHOLDER, TEMPLATES
from pathflip.geometry import TreeSpec
from pathflip.slides.resample import resize_area

if TYPE_CHECKING:
    import torch

    from pathflip.checkpoints import TreeRun

ENLARGED = 1.1
"""Largest factor by which a picture is enlarged to reach a level, as for slides."""
FILLED = 0.9
"""Smallest share of a node's side that a picture must show to stand for one."""


class PatchTextModel(Protocol):
    """Protocol of a model with patches and texts in one space; :class:`MRPLIP` implements it."""

    @property
    def tau(self) -> torch.Tensor:
        """Temperature of the softmax over texts."""
        ...

    def encode_patches(self, features: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """Encode base features [n, d_in] of nodes at levels int64 [n] -> unit vectors [n, d]."""
        ...

    def encode_text(self, texts: list[str]) -> torch.Tensor:
        """Encode texts -> unit vectors [n, d]."""
        ...


@dataclass(frozen=True, kw_only=True)
class PatchReader:
    """A patch–text model with the encoder under it and the nodes both were trained on.

    Attributes:
        name: Name of the model in results.
        model: The model.
        base: Encoder it was trained on: name, revision, dim.
        encoder: That encoder; None where only stored features are read.
        level_mpp: µm per pixel of each level, coarsest first.
        node_px: Side of a node, px.
        levels: Levels the model was trained on, indices into ``level_mpp``.
        drawn: {slide_id: split} of the slides the model was made with.
    """

    name: str
    model: PatchTextModel
    base: Mapping[str, Any]
    encoder: Encoder | None
    level_mpp: tuple[float, ...]
    node_px: int
    levels: tuple[int, ...]
    drawn: Mapping[str, str] = field(default_factory=dict)

    def field_um(self, level: int) -> float:
        """Return the side of a node of a level, µm."""
        return self.level_mpp[level] * self.node_px

    @property
    def tau(self) -> float:
        """Temperature of the softmax over classes."""
        return float(self.model.tau.detach())

    def vectors(self, pixels: NDArray[np.uint8], level: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return unit vectors [k, d] of nodes [k, px, px, 3] at their levels [k]."""
        if self.encoder is None:
            raise ValueError("this reader was opened without its encoder")
        return self.of_features(self.encoder(pixels), level)

    def of_features(self, features: ArrayLike, level: ArrayLike) -> NDArray[np.float32]:
        """Return unit vectors [k, d] of the base encoder's features [k, d_in]."""
        import torch

        device = self.model.tau.device
        with torch.inference_mode():
            found = self.model.encode_patches(
                torch.as_tensor(np.asarray(features, np.float32), device=device),
                torch.as_tensor(np.asarray(level, np.int64), device=device),
            )
        return np.asarray(found.float().cpu().numpy(), np.float32)

    def guided(self, vectors: ArrayLike, keywords: Sequence[str]) -> NDArray[np.float32]:
        """Return text-guided vectors z [k, h] of unit vectors [k, d] with a bank of keywords.

        Raises:
            ConfigError: The model has none.
        """
        import torch

        if not hasattr(self.model, "text_guided"):
            raise ConfigError(f"Model {self.name} has no text-guided vectors.", code="not_guided")
        v = torch.as_tensor(np.asarray(vectors, np.float32), device=self.model.tau.device)
        with torch.inference_mode():
            z = self.model.text_guided(v, self.model.encode_text(list(keywords)))
        return np.asarray(z.float().cpu().numpy(), np.float32)

    def texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return unit vectors [n, d] of texts."""
        import torch

        with torch.inference_mode():
            return np.asarray(self.model.encode_text(list(texts)).float().cpu().numpy(), np.float32)


def patch_reader(run: TreeRun, *, pixels: bool = True, encoder: str | None = None) -> PatchReader:
    """Return the reader of a run's model.

    Args:
        run: Run of MR-PLIP.
        pixels: Whether to load the encoder under the model, too.
        encoder: Spec of that encoder, where its weights are not where its name says; see
            :mod:`pathflip.encoders`.

    Raises:
        EncoderError: The encoder cannot be loaded, or is not the one the model was trained on
            (``other_encoder``).
    """
    spec = TreeSpec(**run.trees)
    loaded = None
    if pixels:
        loaded = load_encoder(encoder or run.encoder["name"], device=str(run.model.device))
        check_base(run, loaded, hint="Name the encoder it was trained on with --encoder.")
    return PatchReader(
        name=run.name,
        model=run.model,
        base=run.encoder,
        encoder=loaded,
        level_mpp=spec.level_mpp,
        node_px=spec.node_px,
        levels=tuple(run.model.config.levels),
        drawn=drawn_splits(run.path),
    )


# -- pictures -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Cut:
    """The nodes of one picture at one level.

    Attributes:
        level: The level.
        pixels: uint8 [k, px, px, 3].
        by_field: Whether the picture fills no node, and stands for one of like field of view.
    """

    level: int
    pixels: NDArray[np.uint8]
    by_field: bool = False


def cut_picture(rgb: NDArray[np.uint8], *, mpp: float, reader: PatchReader) -> list[Cut]:
    """Cut a picture into the nodes it fills, at every level it can be read at.

    A level is used when the picture need not be enlarged to it by more than a tenth and shows nine
    tenths of a node or more. It is resampled to the level's mpp by area averages and cut into as
    many whole nodes as fit, around its centre.

    A picture that fills no node (most public tiles show 50 to 150 µm) stands for one: its central
    square goes to the encoder as it is, at the level whose nodes show about as much (nearest in
    ratio). Encoders that resize what they get see a level by its field of view.

    Args:
        rgb: Pixels [h, w, 3].
        mpp: µm per pixel of the picture.
        reader: Reader whose levels are meant.

    Returns:
        One cut a level, coarsest first; never none.
    """
    height, width = rgb.shape[:2]
    side_um, px = min(height, width) * mpp, reader.node_px
    found = []
    for level in reader.levels:
        at = reader.level_mpp[level]
        if mpp > ENLARGED * at or side_um < FILLED * reader.field_um(level):
            continue
        size = [max(px, round(side * mpp / at)) for side in (height, width)]
        found.append(Cut(level=level, pixels=_nodes(rgb, size=(size[0], size[1]), px=px)))
    if found:
        return found
    nearest = min(reader.levels, key=lambda one: abs(math.log(side_um / reader.field_um(one))))
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = np.ascontiguousarray(rgb[top : top + side, left : left + side])
    return [Cut(level=nearest, pixels=square[None], by_field=True)]


def _nodes(rgb: NDArray[np.uint8], *, size: tuple[int, int], px: int) -> NDArray[np.uint8]:
    """Resample to (height, width) and cut whole squares around the centre [k, px, px, 3]."""
    scaled = resize_area(rgb, height=size[0], width=size[1])
    rows, columns = size[0] // px, size[1] // px
    top, left = (size[0] - rows * px) // 2, (size[1] - columns * px) // 2
    whole = scaled[top : top + rows * px, left : left + columns * px]
    nodes = whole.reshape(rows, px, columns, px, 3).swapaxes(1, 2).reshape(-1, px, px, 3)
    return np.ascontiguousarray(nodes)


# -- vectors and scores ---------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LevelVectors:
    """Mean vectors of pictures at levels, one row for each picture and level it has.

    Attributes:
        item: Picture of each row [r], ascending.
        level: Level of each row [r].
        vectors: Mean of the unit vectors of its nodes, float32 [r, d]; not normalised.
        count: Number of pictures, n.
    """

    item: NDArray[np.int64]
    level: NDArray[np.int64]
    vectors: NDArray[np.float32]
    count: int

    def at(self, level: int) -> LevelVectors:
        """Return the rows of one level."""
        on = self.level == level
        return LevelVectors(
            item=self.item[on], level=self.level[on], vectors=self.vectors[on], count=self.count
        )

    def whole(self) -> NDArray[np.float32]:
        """Return one unit vector a picture [n, d]: the mean over its levels; zero without one."""
        total = np.zeros((self.count, self.vectors.shape[1]), np.float64)
        np.add.at(total, self.item, self.vectors)
        length = np.linalg.norm(total, axis=1, keepdims=True)
        return np.asarray(total / np.maximum(length, 1e-12), np.float32)


def mean_vectors(
    vectors: NDArray[np.float32],
    *,
    item: NDArray[np.int64],
    level: NDArray[np.int64],
    count: int,
) -> LevelVectors:
    """Average the unit vectors of nodes [k, d] by picture [k] and level [k]."""
    base = int(level.max(initial=0)) + 1
    key, row = np.unique(item * base + level, return_inverse=True)
    total = np.zeros((len(key), vectors.shape[1]), np.float64)
    np.add.at(total, row, vectors)
    total /= np.bincount(row, minlength=len(key))[:, None]
    return LevelVectors(
        item=key // base, level=key % base, vectors=total.astype(np.float32), count=count
    )


def class_weights(
    reader: PatchReader,
    classes: Mapping[str, Sequence[str]],
    *,
    templates: Sequence[str] = TEMPLATES,
) -> NDArray[np.float32]:
    """Return one unit vector a class [C, d]: the mean of its prompts', over names and templates."""
    prompts = class_prompts(classes, templates=templates)
    distinct = list(dict.fromkeys(prompt for one in prompts for prompt in one))
    return prompt_means(prompts, dict(zip(distinct, reader.texts(distinct), strict=True)))


def class_prompts(
    classes: Mapping[str, Sequence[str]], *, templates: Sequence[str] = TEMPLATES
) -> list[list[str]]:
    """Return the prompts of each class: its names in the templates."""
    return [
        [template.replace(PLACEHOLDER, name) for name in names for template in templates]
        for names in classes.values()
    ]


def prompt_means(
    prompts: Sequence[Sequence[str]], vectors: Mapping[str, NDArray[np.float32]]
) -> NDArray[np.float32]:
    """Return one unit vector a class [C, d]: the mean of the vectors [d] of its prompts."""
    means = np.stack(
        [np.stack([vectors[prompt] for prompt in one]).mean(0, np.float64) for one in prompts]
    )
    length = np.linalg.norm(means, axis=1, keepdims=True)
    return np.asarray(means / np.maximum(length, 1e-12), np.float32)


def softmax(scores: ArrayLike, *, tau: float) -> NDArray[np.float64]:
    """Return the softmax of scores / τ over the last axis."""
    scaled = np.asarray(scores, np.float64) / tau
    scaled = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    return np.asarray(scaled / scaled.sum(axis=-1, keepdims=True), np.float64)


def class_scores(found: LevelVectors, weights: ArrayLike, *, tau: float) -> NDArray[np.float64]:
    """Return class scores of pictures [n, C], summing to 1; NaN of one without a level.

    Args:
        found: Mean vectors by picture and level.
        weights: Unit class vectors [C, d].
        tau: Temperature.
    """
    weights = np.asarray(weights, np.float64)
    return pool_levels(softmax(found.vectors @ weights.T, tau=tau), found.item, count=found.count)


def pool_levels(
    scores: NDArray[np.float64], item: NDArray[np.int64], *, count: int
) -> NDArray[np.float64]:
    """Average class scores [r, C] over the rows of each item [n, C]; NaN of one without a row."""
    total = np.zeros((count, scores.shape[1]))
    np.add.at(total, item, scores)
    rows = np.bincount(item, minlength=count)[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(rows > 0, total / rows, np.nan)
