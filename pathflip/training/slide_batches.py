"""Batches of slides: region features from the archive, text drawn per slide.

What a slide shows in an epoch (its regions, its sub-captions, which of them is a negative for whom,
what is asked about it) is a function of (seed, epoch, slide), never of a worker, a thread or an
earlier draw: any number of workers sees the same, and so does a run that is resumed.

Shapes: b slides of this worker, B slides of all workers in a micro-batch, N regions (padded), M
patch slots, d feature width, K sub-captions.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pathflip.models.chat_template import Example
from pathflip.training.dataset import Corpus, rng_for
from pathflip.training.examples import Examples, all_examples, draw_examples
from pathflip.training.features import FeatureReader
from pathflip.training.order import StepOrder

VAL_SLIDES, VAL_REGIONS = 16, 1024
"""A validation batch holds at most so many slides, and regions with padding."""
START_SLIDES, START_REGIONS, START_BYTES = 128, 24, 256 << 20
"""Limits of the training data a model's start is fitted to: slides, regions of each, bytes."""


@dataclass(frozen=True, kw_only=True)
class SlideBatch:
    """One micro-batch of slides, the share of one worker.

    Attributes:
        slides: Positions of this worker's slides in the corpus [b].
        features: Patch features [b, N, M, d], zero where there is no patch; float16 as read,
            float32 on the device.
        patch_mask: bool [b, N, M].
        captions: Texts [b].
        subcaptions: K texts for each slide [b][K].
        negative_choice: int64 [b, B]: which of slide j's sub-captions is the negative for slide i.
        first: Column of this worker's first slide in ``negative_choice``.
        examples: Instruction examples of each slide, in tuning [b]; at least one each.
    """

    slides: list[int]
    features: torch.Tensor
    patch_mask: torch.Tensor
    captions: list[str]
    subcaptions: list[list[str]]
    negative_choice: torch.Tensor
    first: int = 0
    examples: list[list[Example]] = field(default_factory=list)

    def to(self, device: torch.device) -> SlideBatch:
        """Return the batch on a device, features as float32."""
        move: dict[str, Any] = {"device": device, "non_blocking": True}
        return replace(
            self,
            features=self.features.to(**move).float(),
            patch_mask=self.patch_mask.to(**move),
            negative_choice=self.negative_choice.to(**move),
        )

    def choice_of(self, negatives: str) -> torch.Tensor:
        """Return the columns of ``negative_choice`` that count: all, or this worker's slides.

        Args:
            negatives: ``gathered``, ``local`` or ``exchanged``, as in the model's settings.
        """
        if negatives == "gathered":
            return self.negative_choice
        return self.negative_choice[:, self.first : self.first + len(self.slides)]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of what a slide contributes to a batch.

    Attributes:
        seed: Seed of all draws.
        batch_size: Number of slides in a step, over all workers.
        accumulate: Number of micro-batches in a step.
        num_subcaptions: K; 0 where no sub-captions are needed.
        max_regions: Maximum number of regions of a slide in training; None for all.
        max_merged: Maximum number of sentences merged into a sub-caption.
        statements: Whether pieces are whole statements.
        v1_window_bug: Draw windows of sentences as the published code does.
        examples: Settings of the instruction examples, in tuning.
    """

    seed: int
    batch_size: int
    accumulate: int
    num_subcaptions: int
    max_regions: int | None
    max_merged: int = 3
    statements: bool = False
    v1_window_bug: bool = False
    examples: Examples | None = None


class SlideDataset:
    """The slides of a run, their order and how a batch of them is drawn.

    Features are opened when the first batch is drawn; until then the list of slides is enough.

    Args:
        corpus: Slides and texts.
        sampling: Settings of the draws.
        cache_bytes: Largest size of features that is kept in memory.
    """

    unit = "slides"

    def __init__(self, corpus: Corpus, sampling: Sampling, *, cache_bytes: int = 0) -> None:
        self.corpus, self.sampling, self._cache_bytes = corpus, sampling, cache_bytes
        self._order = StepOrder(
            corpus,
            seed=sampling.seed,
            batch_size=sampling.batch_size,
            accumulate=sampling.accumulate,
        )

    @property
    def archive(self) -> str:
        """URI of the archive the slides are in."""
        return str(self.corpus.about["archive"])

    def save(self, path: str | Path) -> None:
        """Write the list of slides as Parquet."""
        self.corpus.save(path)

    def summary(self) -> dict[str, Any]:
        """Return the encoder, counts of each split, and counts of slides left out."""
        corpus = self.corpus
        return {
            "encoder": corpus.about["encoder"]["name"],
            **corpus.counts(),
            "left_out": corpus.about["left_out"],
            **({"targets": corpus.about["targets"]} if "targets" in corpus.about else {}),
        }

    def memory_mb(self, num_slides: int, *, read_ahead: int) -> dict[str, float]:
        """Return MiB a worker needs for data: a batch's features, read-ahead, and the cache.

        Args:
            num_slides: Number of slides in a worker's micro-batch.
            read_ahead: Number of batches read ahead.
        """
        corpus = self.corpus
        region = corpus.about["slots"] * corpus.about["encoder"]["dim"]
        largest = min(self.sampling.max_regions or sys.maxsize, max(corpus.num_regions))
        batch = num_slides * largest * region * (4 + 2 * read_ahead)
        cache = sum(corpus.num_regions) * region * 2
        return {
            "features_of_a_batch": round(batch / 2**20, 1),
            "cached_features": round(cache / 2**20, 1) if cache <= self._cache_bytes else 0.0,
        }

    @cached_property
    def reader(self) -> FeatureReader:
        """Reader of the slides' features.

        Raises:
            CheckpointError: Slides are no longer in the archive as they were.
        """
        return FeatureReader(self.corpus, cache_bytes=self._cache_bytes)

    @property
    def steps_per_epoch(self) -> int:
        """Full batches of an epoch.

        Raises:
            ConfigError: There are too few slides or patients for one batch.
        """
        return self._order.steps_per_epoch

    def step_slides(self, step: int) -> NDArray[np.int64]:
        """Return the slides of a global step, of all workers: int64 [accumulate, B]."""
        return self._order.step(step)

    def micro_batches(
        self, step: int, *, rank: int = 0, world: int = 1, pin: bool = False
    ) -> list[SlideBatch]:
        """Return a worker's share of a step, a micro-batch each.

        Args:
            step: The global step.
            rank: The worker.
            world: Number of workers; batch_size / accumulate is a multiple of it.
            pin: Whether tensors are to be in page-locked memory, which copies to a GPU start from.
        """
        epoch = step // self.steps_per_epoch
        found = []
        for slides in self.step_slides(step):
            share = len(slides) // world
            mine = slides[rank * share : (rank + 1) * share]
            batch = self.batch(mine.tolist(), others=slides.tolist(), epoch=epoch, pin=pin)
            found.append(replace(batch, first=rank * share))
        return found

    def validation_batches(self, *, most_slides: int = VAL_SLIDES) -> list[list[int]]:
        """Return the validation slides in batches: consecutive, bounded in padded regions."""
        chunks: list[list[int]] = []
        for slide in self.corpus.members("val").tolist():
            together = [*chunks[-1], slide] if chunks else []
            most = max((self.corpus.num_regions[i] for i in together), default=0)
            if not chunks or len(together) > most_slides or most * len(together) > VAL_REGIONS:
                chunks.append([slide])
            else:
                chunks[-1].append(slide)
        return chunks

    def start_batch(self, max_regions: int | None) -> SlideBatch:
        """Return some training slides that a start from data is fitted to; set by the seed.

        Args:
            max_regions: Maximum number of regions of a slide; None for the setting's.
        """
        corpus, sampling = self.corpus, self.sampling
        whole = max(1, corpus.about["slots"] * corpus.about["encoder"]["dim"] * 2)
        most = min(max_regions or START_REGIONS, START_REGIONS)
        count = max(2, min(START_SLIDES, START_BYTES // (whole * most)))
        train = corpus.members("train").tolist()
        chosen = rng_for("start", sampling.seed).permutation(train)[:count].tolist()
        return self.batch(chosen, epoch=0, sampling=replace(sampling, max_regions=most))

    def batch(
        self,
        slides: list[int],
        *,
        others: list[int] | None = None,
        epoch: int,
        validating: bool = False,
        sampling: Sampling | None = None,
        pin: bool = False,
    ) -> SlideBatch:
        """Return a micro-batch of given slides, as drawn for an epoch.

        Args:
            slides: The slides.
            others: The slides of all workers; None where these are all.
            epoch: Epoch of the draws.
            validating: Show all regions; in tuning as many as in training, and the same examples
                each time.
            sampling: Settings of the draws; None for those of the run.
            pin: See :meth:`micro_batches`.
        """
        sampling, corpus = sampling or self.sampling, self.corpus
        ids = corpus.slide_ids
        numbers = [
            draw_regions(
                corpus.num_regions[i],
                most=None if validating and sampling.examples is None else sampling.max_regions,
                seed=sampling.seed,
                epoch=epoch,
                slide_id=ids[i],
            )
            for i in slides
        ]
        if sampling.examples is not None and not validating:
            # A language model reads regions one after the other; what it says of a slide must
            # not hang on which comes first.
            for row, i in enumerate(slides):
                rng = rng_for("order", sampling.seed, epoch, ids[i])
                numbers[row] = numbers[row][rng.permutation(len(numbers[row]))]
        features, mask = self.reader.read_padded(list(zip(slides, numbers, strict=True)), pin=pin)
        subcaptions = [
            draw_subcaptions(
                corpus.pieces[i],
                num=sampling.num_subcaptions,
                seed=sampling.seed,
                epoch=epoch,
                slide_id=ids[i],
                max_merged=sampling.max_merged,
                statements=sampling.statements,
                v1_window_bug=sampling.v1_window_bug,
            )
            for i in slides
        ]
        choice = torch.from_numpy(
            negative_choice(
                [ids[i] for i in slides],
                [ids[i] for i in (slides if others is None else others)],
                num=sampling.num_subcaptions,
                seed=sampling.seed,
                epoch=epoch,
            )
        )
        examples: list[list[Example]] = []
        if sampling.examples is not None:
            examples = [self._examples(i, epoch=epoch, validating=validating) for i in slides]
        return SlideBatch(
            slides=slides,
            features=features,
            patch_mask=mask,
            captions=[corpus.captions[i] for i in slides],
            subcaptions=subcaptions,
            negative_choice=choice.pin_memory() if pin else choice,
            examples=examples,
        )

    def _examples(self, slide: int, *, epoch: int, validating: bool) -> list[Example]:
        examples, corpus = self.sampling.examples, self.corpus
        assert examples is not None
        caption, questions = corpus.target_of(slide), corpus.questions_of(slide)
        if validating:
            return all_examples(caption, questions, examples)
        return draw_examples(
            caption,
            questions,
            examples,
            seed=self.sampling.seed,
            epoch=epoch,
            slide_id=corpus.slide_ids[slide],
        )


def named_means(names: Sequence[str], sums: torch.Tensor) -> dict[str, float | None]:
    """Return means by name from their sums and, last, the number of terms.

    A mean that is not finite is None.
    """
    means = (sums[:-1] / sums[-1]).tolist()
    return {
        name: value if math.isfinite(value) else None
        for name, value in zip(names, means, strict=True)
    }


# -- draws ----------------------------------------------------------------------------------------


def draw_regions(
    num_regions: int, *, most: int | None, seed: int, epoch: int, slide_id: str
) -> NDArray[np.int64]:
    """Return the regions of a slide shown in an epoch: sorted, drawn without replacement."""
    if most is None or num_regions <= most:
        return np.arange(num_regions, dtype=np.int64)
    rng = rng_for("regions", seed, epoch, slide_id)
    return np.sort(rng.choice(num_regions, most, replace=False)).astype(np.int64)


def draw_subcaptions(
    pieces: Sequence[str],
    *,
    num: int,
    seed: int,
    epoch: int,
    slide_id: str,
    max_merged: int = 3,
    statements: bool = False,
    v1_window_bug: bool = False,
) -> list[str]:
    """Return a slide's K sub-captions of an epoch: merged sentences, or whole statements.

    Statements are drawn without replacement; where there are fewer than K, all of them and random
    repeats.
    """
    from pathflip.text import draw_rng, sample_subcaptions

    if not num:
        return []

    rng = draw_rng(seed, epoch, slide_id)
    if not statements:
        return sample_subcaptions(
            list(pieces),
            num=num,
            rng=rng,
            max_merged=max_merged,
            v1_window_bug=v1_window_bug,
        )
    first = rng.permutation(len(pieces))[:num]
    more = rng.integers(len(pieces), size=num - len(first))
    return [pieces[i] for i in (*first, *more)]


def negative_choice(
    mine: Sequence[str], others: Sequence[str], *, num: int, seed: int, epoch: int
) -> NDArray[np.int64]:
    """Return int64 [b, B] in [0, num): drawn for each ordered pair of slides in an epoch.

    With ``num`` 0 nothing is drawn: [b, 0].
    """
    if not num:
        return np.zeros((len(mine), 0), np.int64)

    def keys(slides: Sequence[str], role: str) -> NDArray[np.uint64]:
        texts = [f"negative\x1f{role}\x1f{seed}\x1f{epoch}\x1f{slide}" for slide in slides]
        digests = b"".join(hashlib.sha256(text.encode()).digest()[:8] for text in texts)
        return np.frombuffer(digests, "<u8")

    mixed = keys(mine, "of")[:, None] ^ keys(others, "from")[None, :]
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # SplitMix64
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return ((mixed ^ (mixed >> np.uint64(31))) % np.uint64(num)).astype(np.int64)
