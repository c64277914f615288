"""Slides with planted findings in memory, and objectives that train on them without an archive."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pathflip.archive.storage import normalise
from pathflip.training.config import PretrainConfig, TuneConfig
from pathflip.training.contrastive import Contrastive
from pathflip.training.dataset import Corpus
from pathflip.training.features import FeatureReader
from pathflip.training.instruct import Instruct
from pathflip.training.slide_batches import SlideDataset

ARCHIVE = normalise("planted")
ORGANS = ("colon", "breast", "lung", "muscle")
FINDINGS = ("necrosis", "mucin", "keratin", "haemorrhage", "fibrosis", "lymphocytes")


class Regions(FeatureReader):
    """Features of slides that are in memory from the start.

    Args:
        features: float16 [rows, M, d], slide by slide.
        mask: bool [rows, M].
        num_regions: Number of rows of each slide.
    """

    def __init__(
        self, features: NDArray[np.float16], mask: NDArray[np.bool_], num_regions: list[int]
    ) -> None:
        self._kept, self._mask = features, mask
        _, self.slots, self.dim = features.shape
        self._starts = np.concatenate([[0], np.cumsum(num_regions)])


class Slides:
    """Slides with captions in memory: an organ all over, each finding in one region."""

    def __init__(self, slides: int, *, regions: tuple[int, int], slots: int, dim: int) -> None:
        rng = np.random.default_rng(0)
        looks = {name: rng.standard_normal(dim) for name in (*ORGANS, *FINDINGS)}
        features, masks, texts, pieces, asked, counts = [], [], [], [], [], []
        for _ in range(slides):
            organ = ORGANS[int(rng.integers(len(ORGANS)))]
            found = [FINDINGS[i] for i in rng.permutation(len(FINDINGS))[: int(rng.integers(1, 4))]]
            sentences = [f"Sections show {organ}.", *(f"There is {name}." for name in found)]
            texts.append(" ".join(sentences))
            pieces.append(sentences)
            question = "Which organ is shown?"
            asked.append([{"question": question, "answer": organ, "choices": list(ORGANS)}])
            count = int(rng.integers(regions[0], regions[1] + 1))
            own = looks[organ] + 0.3 * rng.standard_normal((count, slots, dim))
            for name in found:
                own[int(rng.integers(count)), : slots // 3] += 2 * looks[name]
            mask = rng.random((count, slots)) < 0.9
            mask[:, 0] = True
            own[~mask] = 0
            features.append(own.astype(np.float16))
            masks.append(mask)
            counts.append(count)
        self.regions = Regions(np.concatenate(features), np.concatenate(masks), counts)
        self.corpus = corpus_of(texts, pieces, counts, slots=slots, dim=dim)
        self.questions = [json.dumps(own) for own in asked]


def corpus_of(
    texts: list[str], pieces: list[list[str]], num_regions: list[int], *, slots: int, dim: int
) -> Corpus:
    """A corpus of slides, each a patient, every fifth for validation."""
    names = [f"slide{n:04d}" for n in range(len(texts))]
    return Corpus(
        slide_ids=names,
        patients=names,
        splits=["val" if n % 5 == 4 else "train" for n in range(len(names))],
        captions=texts,
        pieces=pieces,
        num_regions=num_regions,
        fingerprints=[""] * len(names),
        about={
            "archive": ARCHIVE,
            "encoder": {"name": "planted", "revision": "1", "dim": dim},
            "tiling": {"region_um": 256.0, "patch_um": 64.0, "mpp": 0.5},
            "slots": slots,
            "left_out": {"test": 0, "without_caption": 0},
        },
    )


def wide_slides(slides: int, *, regions: int, slots: int, dim: int) -> tuple[Corpus, Regions]:
    """Slides at the size that is measured: noise, and reports of 7 sentences of 19 words."""
    rng = np.random.default_rng(1)
    pool = rng.standard_normal((128, slots, dim), np.float32).astype(np.float16)
    kept = pool[rng.integers(len(pool), size=slides * regions)]
    mask = rng.random((len(kept), slots)) < 0.9
    mask[:, 0] = True
    pieces = [
        [f"{' '.join(f'w{i}' for i in rng.integers(3000, size=19))}." for _ in range(7)]
        for _ in range(slides)
    ]
    texts = [" ".join(own) for own in pieces]
    corpus = corpus_of(texts, pieces, [regions] * slides, slots=slots, dim=dim)
    return replace(corpus, splits=["train"] * slides), Regions(kept, mask, [regions] * slides)


class PlantedContrastive(Contrastive):
    """Contrastive pretraining on slides in memory."""

    def __init__(self, config: PretrainConfig, corpus: Corpus, regions: Regions) -> None:
        super().__init__(config)
        self.corpus, self.regions = corpus, regions

    def select(self, archive: str) -> SlideDataset:
        """Take all slides."""
        return self._dataset(self.corpus)

    def fitted(self, dataset: SlideDataset) -> PlantedContrastive:
        """The width of features is in the settings already."""
        return self

    def _dataset(self, corpus: Corpus) -> SlideDataset:
        dataset = super()._dataset(corpus)
        dataset.reader = self.regions
        return dataset


class PlantedInstruct(Instruct):
    """Instruction tuning on slides in memory."""

    def __init__(self, config: TuneConfig, corpus: Corpus, regions: Regions) -> None:
        super().__init__(config)
        self.corpus, self.regions = corpus, regions

    def select(self, archive: str) -> SlideDataset:
        """Take all slides."""
        return self._dataset(self.corpus)

    def fitted(self, dataset: SlideDataset) -> PlantedInstruct:
        """Nothing follows from the data."""
        return self

    def _dataset(self, corpus: Corpus) -> SlideDataset:
        dataset = super()._dataset(corpus)
        dataset.reader = self.regions
        return dataset
