"""A patch–text model of known geometry: it sees mean colours, and words name colours.

The encoder gives the mean red, green and blue of a picture; a patch's vector is the unit vector of
how far each is from grey. A text's vector is the unit sum of the axes of the colours it names. So
which class a picture of known colour is given can be worked out by hand.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pathflip import Archive
from pathflip.archive import schema
from pathflip.archive.commit import Committer
from pathflip.archive.create import create_archive
from pathflip.archive.trees import (
    Tree,
    ensure_tree_encoder,
    ensure_tree_texts,
    ensure_trees,
    write_trees,
)
from pathflip.evaluation.patch_text import PatchReader
from pathflip.geometry import TreeSpec
from tests.unit.archive.cohort import filled

GREY = 128.0
AXES = {"red": 0, "green": 1, "blue": 2}


class ColourEncoder:
    name, revision, dim, input_px = "colour", "1", 3, 32
    mpp: float | None = None
    licence = "Apache-2.0"

    def __call__(self, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
        return patches.mean(axis=(1, 2), dtype=np.float64).astype(np.float32)


class ColourModel:
    """The model; ``blind`` names axes that a level cannot see."""

    def __init__(self, *, tau: float = 0.1, blind: Mapping[int, tuple[int, ...]] | None = None):
        self.tau = torch.tensor(tau)
        self.blind = dict(blind or {})
        self.levels: list[int] = []

    def encode_patches(self, features: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        self.levels += level.tolist()
        vectors = torch.cat([features - GREY, torch.full((len(features), 1), 1.0)], dim=1)
        for one, axes in self.blind.items():
            for axis in axes:
                vectors[level == one, axis] = 0
        return torch.nn.functional.normalize(vectors, dim=-1)

    def encode_text(self, texts: list[str]) -> torch.Tensor:
        vectors = torch.zeros(len(texts), 4)
        vectors[:, 3] = 1e-3
        for i, text in enumerate(texts):
            for word, axis in AXES.items():
                vectors[i, axis] += word in text
        return torch.nn.functional.normalize(vectors, dim=-1)


def colour_reader(model: ColourModel | None = None, **changed: object) -> PatchReader:
    fields: dict[str, object] = {
        "name": "planted",
        "model": model or ColourModel(),
        "base": {"name": "colour", "revision": "1", "dim": 3},
        "encoder": ColourEncoder(),
        "level_mpp": (2.0, 1.0, 0.5, 0.25),
        "node_px": 32,
        "levels": (0, 1, 2, 3),
    }
    return PatchReader(**(fields | changed))  # type: ignore[arg-type]


class WordModel:
    """A model whose features are the vectors: axis i of them is what word i names.

    Text-guided vectors add to a patch the word of the bank that it is nearest to.
    """

    def __init__(self, words: Sequence[str], *, tau: float = 0.1):
        self.words = tuple(words)
        self.tau = torch.tensor(tau)

    def encode_patches(self, features: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(features + 1e-6, dim=-1)

    def encode_text(self, texts: Sequence[str]) -> torch.Tensor:
        named = [[float(word in text) for word in self.words] for text in texts]
        return torch.nn.functional.normalize(torch.tensor(named) + 1e-6, dim=-1)

    def text_guided(self, v: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
        return v + bank[(v @ bank.T).argmax(-1)]


# -- trees ----------------------------------------------------------------------------------------

ARCHITECTURES, NUCLEI = ("solid", "nested"), ("round", "oval", "pale")
WORDS = (*ARCHITECTURES, *NUCLEI)
SPEC = TreeSpec(parent_um=64.0, node_px=32)


@dataclass(frozen=True, kw_only=True)
class PlantedTree:
    """Truth of a tree: its architecture, and the nuclei of each quadrant."""

    slide: str
    tx: int
    architecture: int
    nuclei: tuple[int, int, int, int]


def sample_trees(slides: int, *, per_slide: int = 4, seed: int = 0) -> list[PlantedTree]:
    rng = np.random.default_rng(seed)
    return [
        PlantedTree(
            slide=f"s{i:02d}",
            tx=tx,
            architecture=int(rng.integers(2)),
            nuclei=tuple(rng.integers(3, size=4).tolist()),
        )
        for i in range(slides)
        for tx in range(per_slide)
    ]


def split_of(slide: str) -> str:
    return ("train", "val", "test")[int(slide[1:]) // 2 % 3]


def node_features(tree: PlantedTree, *, noise: float, seed: int) -> NDArray[np.float64]:
    """Features [85, 5]: coarse nodes show the architecture alone, fine ones the nuclei alone."""
    values = np.random.default_rng([seed, tree.tx, int(tree.slide[1:])]).normal(0, noise, (85, 5))
    for node in range(85):
        level = (node >= 1) + (node >= 5) + (node >= 21)
        if level < 2:
            values[node, tree.architecture] += 1
            continue
        row, column = divmod(node - (5, 21)[level - 2], 2**level)
        quadrant = 2 * (row // 2 ** (level - 1)) + column // 2 ** (level - 1)
        values[node, 2 + tree.nuclei[quadrant]] += 1
    return values


def node_truth(tree: PlantedTree) -> list[tuple[int, int, str, str]]:
    """Rows (node, level, architecture, nuclei) of trees.csv; nuclei empty where they are mixed."""
    rows = []
    for level, first in enumerate((0, 1, 5, 21)):
        for i in range(4**level):
            row, column = divmod(i, 2**level)
            half = max(1, 2 ** (level - 1))
            kinds = set(tree.nuclei) if not level else {
                tree.nuclei[2 * (row // half) + column // half]
            }  # fmt: skip
            nuclei = NUCLEI[kinds.pop()] if len(kinds) == 1 else ""
            rows.append((first + i, level, ARCHITECTURES[tree.architecture], nuclei))
    return rows


def tree_archive(
    folder: Path, trees: Sequence[PlantedTree], *, noise: float = 0.1, captions: bool = True
) -> Archive:
    """Write an archive of planted trees, with truth, class prompts and captions beside it."""
    uri = folder / "archive"
    create_archive(uri, tiling={"region_um": 128.0, "patch_um": 8.0, "mpp": 0.25})
    slides = sorted({tree.slide for tree in trees})
    rows = [
        {"slide_id": slide, "uri": str(folder / "slides" / f"{slide}.tif"), "aliases": [],
         "status": "ready", "fingerprint": slide, "encoders": [],
         "patient_id": f"P{int(slide[1:]) // 2}", "split": split_of(slide), "mpp": 0.25,
         "labels": json.dumps({"growth": ARCHITECTURES[int(slide[1:]) % 2]}),
         "n_regions": 0, "n_patches": 0}
        for slide in slides
    ]  # fmt: skip
    written = [
        Tree(
            slide_id=tree.slide, tx=tree.tx, ty=0, mpp=0.25, levels=4,
            node_mask=np.ones(85, np.bool_), node_tissue=np.ones(85, np.float32),
            node_blur=np.zeros(85, np.float32),
            features={"planted": node_features(tree, noise=noise, seed=7)},
        )
        for tree in trees
    ]  # fmt: skip
    texts = [
        {"text_id": f"{one.tree_id}/oracle", "slide_id": tree.slide, "tree_id": one.tree_id,
         "source": "oracle", "captions": _captions(tree), "keyword_of": b"",
         "keywords": [*WORDS, f"seen in {split_of(tree.slide)}"]}
        for tree, one in zip(trees, written, strict=True)
    ]  # fmt: skip
    with Committer(uri) as committer:
        committer.commit(slides=filled(schema.slides_schema(), rows))
        ensure_trees(committer, SPEC, seed=0, per_slide=4, min_tissue=0.5)
        ensure_tree_encoder(
            committer, "planted", dim=len(WORDS), revision="1", mpp=None, licence="MIT"
        )
        write_trees(committer, written)
        if captions:
            ensure_tree_texts(committer)
            committer.upsert("tree_texts", filled(schema.tree_texts_schema(), texts))
    lines = ["slide,tx,ty,node,level,architecture,nuclei"]
    lines += [
        f"{tree.slide},{tree.tx},0,{','.join(map(str, row))}"
        for tree in trees
        for row in node_truth(tree)
    ]
    (folder / "trees.csv").write_text("\n".join(lines) + "\n")
    (folder / "classes").mkdir(exist_ok=True)
    for cue, names in (("architecture", ARCHITECTURES), ("nuclei", NUCLEI)):
        text = "\n".join(f"  {name}: [{name}]" for name in names)
        (folder / "classes" / f"{cue}.yaml").write_text(f"classes:\n{text}\n")
    return Archive(uri)


def _captions(tree: PlantedTree) -> list[str | None]:
    """Every other node says what it shows; of the others, nothing is said."""
    features = node_features(tree, noise=0, seed=0)
    return [
        f"node {node} of {tree.slide} {tree.tx} is {WORDS[int(features[node].argmax())]}"
        if node % 2
        else None
        for node in range(85)
    ]


def word_reader(model: WordModel | None = None, **changed: object) -> PatchReader:
    fields: dict[str, object] = {
        "name": "planted",
        "model": model or WordModel(WORDS),
        "base": {"name": "planted", "revision": "1", "dim": len(WORDS)},
        "encoder": None,
        "level_mpp": SPEC.level_mpp,
        "node_px": SPEC.node_px,
        "levels": (0, 1, 2, 3),
    }
    return PatchReader(**(fields | changed))  # type: ignore[arg-type]
