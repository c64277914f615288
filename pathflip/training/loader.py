"""Batches for training: region features streamed from the archive, text drawn per slide.

What a slide shows in an epoch (its regions, its sub-captions, which of them is a negative for whom,
what is asked about it) is a function of (seed, epoch, slide), never of a worker, a thread or what
was drawn before: any number of workers sees the same, and so does a run that is resumed.

Shapes: b slides of this worker, B slides of all workers in a micro-batch, N regions (padded), M
patch slots, d feature width, K sub-captions.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pathflip.archive import Archive, vectors
from pathflip.archive.schema import intact_rows
from pathflip.archive.storage import guarded, is_local
from pathflip.errors import ArchiveError, CheckpointError
from pathflip.models.chat_template import CaptionStyle, Example, caption_example, question_example
from pathflip.models.slide_batch import pad_slides
from pathflip.training.dataset import Corpus, epoch_order, rng_for, steps_per_epoch

AHEAD = 2
"""Batches read ahead of the one being trained on."""
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch, the share of one worker.

    Attributes:
        slides: Positions in the corpus of this worker's slides [b].
        features: float16 [b, N, M, d], zero where there is no patch.
        patch_mask: bool [b, N, M].
        captions: Texts [b].
        subcaptions: K texts for each slide [b][K].
        negative_choice: int64 [b, B]: which of slide j's sub-captions is the negative for slide i.
        examples: What is asked about each slide, in tuning [b]; at least one each.
    """

    slides: list[int]
    features: torch.Tensor
    patch_mask: torch.Tensor
    captions: list[str]
    subcaptions: list[list[str]]
    negative_choice: torch.Tensor
    examples: list[list[Example]] = field(default_factory=list)


# -- drawing --------------------------------------------------------------------------------------


def draw_regions(
    num_regions: int, *, most: int | None, seed: int, epoch: int, slide_id: str
) -> NDArray[np.int64]:
    """Returns which regions of a slide are seen in an epoch: sorted, without replacement."""
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
    contig_off_by_one: bool = False,
) -> list[str]:
    """Returns a slide's K sub-captions of an epoch: merged sentences, or whole statements.

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
            contig_off_by_one=contig_off_by_one,
        )
    first = rng.permutation(len(pieces))[:num]
    more = rng.integers(len(pieces), size=num - len(first))
    return [pieces[i] for i in (*first, *more)]


def negative_choice(
    mine: Sequence[str], others: Sequence[str], *, num: int, seed: int, epoch: int
) -> NDArray[np.int64]:
    """Returns int64 [b, B] in [0, num): drawn for each ordered pair of slides in an epoch.

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


@dataclass(frozen=True, kw_only=True)
class Examples:
    """What is asked about a slide.

    Attributes:
        most: Most examples of a slide in an epoch.
        caption_share: How often a slide that has questions, too, shows its caption.
        open_share: How often a question with options is asked without them.
        caption_epochs: Epochs at the beginning in which captions alone are shown.
        captions: How captions are written, see
            :func:`pathflip.models.chat_template.caption_example`.
        letters: Whether options are answered by their letter.
    """

    most: int
    caption_share: float
    open_share: float
    caption_epochs: int
    captions: CaptionStyle = "whole"
    letters: bool = True


def draw_examples(
    caption: str,
    questions: Sequence[Mapping[str, Any]],
    sampling: Examples,
    *,
    seed: int,
    epoch: int,
    slide_id: str,
) -> list[Example]:
    """Returns what is asked about a slide in an epoch: its caption, questions, or both.

    Questions are drawn without replacement. Options come in a random order, so that no letter is
    right more often than others. While captions alone are shown, a slide without one shows its
    questions.

    Args:
        caption: The slide's caption; empty where it has none.
        questions: {question, answer, choices?} each.
        sampling: How much of them.
        seed: Of the draw.
        epoch: Of the draw.
        slide_id: Of the draw.
    """
    rng = rng_for("examples", seed, epoch, slide_id)
    if caption and (epoch < sampling.caption_epochs or not questions):
        return [caption_example(caption, sampling.captions, rng)]
    shown = []
    if caption and rng.random() < sampling.caption_share:
        shown.append(caption_example(caption, sampling.captions, rng))
    for i in rng.permutation(len(questions))[: sampling.most - len(shown)].tolist():
        choices = list(questions[i].get("choices", ()))
        ordered = [choices[j] for j in rng.permutation(len(choices))]
        if rng.random() < sampling.open_share:
            ordered = []
        shown.append(_asked(questions[i], ordered, sampling))
    return shown


def all_examples(
    caption: str, questions: Sequence[Mapping[str, Any]], sampling: Examples
) -> list[Example]:
    """Returns what is asked about a slide in validation: its caption and its first questions."""
    shown = [caption_example(caption, sampling.captions)] if caption else []
    for entry in questions[: sampling.most]:
        choices = entry.get("choices", ()) if sampling.open_share < 1 else ()
        shown.append(_asked(entry, choices, sampling))
    return shown


def _asked(entry: Mapping[str, Any], choices: Sequence[str], sampling: Examples) -> Example:
    return question_example(entry["question"], choices, entry["answer"], letter=sampling.letters)


# -- reading --------------------------------------------------------------------------------------


class FeatureReader:
    """Regions of the slides of a corpus, by slide and number; checked as they are read.

    Rows are taken by position from the newest state of the archive, just those asked for. If all
    of them together are small enough they are read once and kept.

    Args:
        corpus: The slides.
        cache_bytes: Keep everything in memory if it is no more than this.

    Raises:
        CheckpointError: If slides of the corpus are no longer in the archive as they were.
    """

    def __init__(self, corpus: Corpus, *, cache_bytes: int = 0) -> None:
        self.corpus = corpus
        self.slots = int(corpus.about["slots"])
        self.dim = int(corpus.about["encoder"]["dim"])
        self._archive = Archive(corpus.about["archive"])
        self._check()
        _, entry = self._archive.encoder(corpus.about["encoder"]["name"])
        self._table = str(entry["features_table"])
        # A slide's regions are consecutive here, in the order of their ids.
        self._starts = np.concatenate([[0], np.cumsum(corpus.num_regions)])
        self._feature_rows, feature_ids = self._rows(self._table)
        self._region_rows, region_ids = self._rows("regions")
        if feature_ids != region_ids:
            raise self._damaged("regions and features of its slides differ")
        self._mask = self._read_masks()
        self._kept: NDArray[np.float16] | None = None
        self.bytes = len(self._feature_rows) * self.slots * self.dim * 2
        if self.bytes <= cache_bytes:
            self._kept = self._read_all()

    def read(self, slide: int, numbers: NDArray[np.int64]) -> tuple[Any, Any]:
        """Returns features float16 [n, M, d] and mask bool [n, M] of a slide's regions."""
        features, mask = self.read_many([(slide, numbers)])
        return features[0], mask[0]

    def read_many(
        self, wanted: Sequence[tuple[int, NDArray[np.int64]]]
    ) -> tuple[list[Any], list[Any]]:
        """Returns what :meth:`read` does for several slides, read together."""
        places = [self._starts[slide] + numbers for slide, numbers in wanted]
        ends = np.cumsum([len(place) for place in places])[:-1]
        flat = np.concatenate(places)
        rows = self._kept[flat] if self._kept is not None else self._take(flat)
        return np.split(rows, ends), np.split(self._mask[flat], ends)

    def _check(self) -> None:
        ledger = self._archive.ledger()
        name = self.corpus.about["encoder"]["name"]
        held = self._archive.ready_ids(name)
        for slide, made in zip(self.corpus.slide_ids, self.corpus.fingerprints, strict=True):
            if slide not in held or (ledger[slide]["fingerprint"] or "") != made:
                raise CheckpointError(
                    f"Slide {slide} is no longer in {self._archive.uri} as it was when the run "
                    "began.",
                    hint="Begin again in another run folder.",
                    code="archive_changed",
                )

    def _rows(self, table: str) -> tuple[NDArray[np.int64], list[str]]:
        """Row numbers of the corpus' regions, slide by slide, and their ids."""
        import pyarrow as pa
        import pyarrow.compute as pc

        with guarded(self._archive.uri, f"read the table {table}", damaged=True):
            keys = self._archive.dataset(table).to_table(columns=["slide_id", "region_id"])
        keys = keys.append_column("row", pa.array(np.arange(keys.num_rows)))
        chosen = pa.array(self.corpus.slide_ids, pa.string())
        keys = keys.filter(pc.is_in(keys["slide_id"], chosen))
        keys = keys.sort_by([("slide_id", "ascending"), ("region_id", "ascending")])
        counts = pc.value_counts(keys["slide_id"].combine_chunks())  # in order of appearance
        if (
            counts.field("values").to_pylist() != self.corpus.slide_ids
            or counts.field("counts").to_pylist() != self.corpus.num_regions
        ):
            raise self._damaged(f"rows of its slides are missing from {table}")
        return keys["row"].to_numpy(), keys["region_id"].to_pylist()

    def _read_masks(self) -> NDArray[np.bool_]:
        order = np.argsort(self._region_rows)
        mask = np.zeros((len(order), self.slots), np.bool_)
        with guarded(self._archive.uri, "read the table regions", damaged=True):
            for start in range(0, len(order), 64 * _ROWS_AT_ONCE):
                part = order[start : start + 64 * _ROWS_AT_ONCE]
                rows = self._archive.dataset("regions").take(
                    self._region_rows[part], columns=["patch_mask"]
                )
                mask[part] = vectors(rows["patch_mask"]) != 0
        return mask

    def _read_all(self) -> NDArray[np.float16]:
        kept = np.zeros((len(self._feature_rows), self.slots, self.dim), np.float16)
        order = np.argsort(self._feature_rows)
        for start in range(0, len(order), _ROWS_AT_ONCE):
            part = order[start : start + _ROWS_AT_ONCE]
            kept[part] = self._take(part)
        return kept

    def _take(self, places: NDArray[np.int64]) -> NDArray[np.float16]:
        """Read rows by their place in the corpus; float16 [n, M, d]."""
        if not len(places):
            return np.zeros((0, self.slots, self.dim), np.float16)
        rows = self._feature_rows[places]
        order = np.argsort(rows)
        with guarded(self._archive.uri, f"read the table {self._table}", damaged=True):
            taken = self._archive.dataset(self._table).take(rows[order])
        features = vectors(taken["features"]).reshape(len(places), self.slots, self.dim)
        if not intact_rows(taken).all() or not np.isfinite(features).all():
            raise self._damaged(f"rows of {self._table} are not what was written")
        back = np.empty_like(features)
        back[order] = features
        return back

    def _damaged(self, what: str) -> ArchiveError:
        uri = self._archive.uri
        hint = f"Mend it: pathflip archive repair --archive {uri}" if is_local(uri) else ""
        return ArchiveError(f"The archive {uri} is damaged: {what}.", hint=hint, code="damaged")


# -- batches --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What of a slide goes into a batch.

    Attributes:
        seed: Of all draws.
        batch_size: Slides of all workers in a step.
        accumulate: Micro-batches a step is cut into.
        num_subcaptions: K; 0 where no sub-captions are needed.
        max_regions: Most regions of a slide in training; None for all.
        max_merged: Most sentences merged into a sub-caption.
        statements: Whether pieces are whole statements.
        contig_off_by_one: Draw windows of sentences as the published code does.
        examples: What is asked about the slides, in tuning.
    """

    seed: int
    batch_size: int
    accumulate: int
    num_subcaptions: int
    max_regions: int | None
    max_merged: int = 3
    statements: bool = False
    contig_off_by_one: bool = False
    examples: Examples | None = None


class Batches:
    """Micro-batches of one worker.

    Args:
        reader: Where features come from.
        sampling: What is drawn.
        rank: This worker.
        world: Number of workers; batch_size / accumulate must be a multiple of it.
        local: Whether negatives come from this worker's slides alone.
    """

    def __init__(
        self,
        reader: FeatureReader,
        sampling: Sampling,
        *,
        rank: int = 0,
        world: int = 1,
        local: bool = False,
    ) -> None:
        self.reader = reader
        self.corpus = reader.corpus
        self.sampling = sampling
        self.steps_per_epoch = steps_per_epoch(self.corpus, sampling.batch_size)
        self._rank, self._world, self._local = rank, world, local
        self._order: tuple[int, NDArray[np.int64]] | None = None

    def step_slides(self, step: int) -> NDArray[np.int64]:
        """Returns the slides of a global step, of all workers: int64 [accumulate, B]."""
        epoch, number = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            sampling = self.sampling
            self._order = (
                epoch,
                epoch_order(
                    self.corpus, epoch=epoch, seed=sampling.seed, batch_size=sampling.batch_size
                ),
            )
        slides: NDArray[np.int64] = self._order[1][number]
        return slides.reshape(self.sampling.accumulate, -1)

    def micro_batches(self, step: int) -> list[Batch]:
        """Returns this worker's share of a step, a micro-batch each."""
        epoch = step // self.steps_per_epoch
        found = []
        for slides in self.step_slides(step):
            share = len(slides) // self._world
            mine = slides[self._rank * share : (self._rank + 1) * share]
            others = mine if self._local else slides
            found.append(self.draw(mine.tolist(), others.tolist(), epoch=epoch))
        return found

    def draw(
        self, mine: list[int], others: list[int], *, epoch: int, validating: bool = False
    ) -> Batch:
        """Returns one micro-batch of given slides, as they are seen in an epoch.

        Args:
            mine: This worker's slides.
            others: The slides of all workers.
            epoch: Of the draws.
            validating: Whether all regions are wanted; in tuning, as many as ever, and the
                examples that are always asked.
        """
        sampling, corpus = self.sampling, self.corpus
        ids = corpus.slide_ids
        numbers = [
            draw_regions(
                corpus.num_regions[i],
                most=None if validating and sampling.examples is None else sampling.max_regions,
                seed=sampling.seed,
                epoch=epoch,
                slide_id=ids[i],
            )
            for i in mine
        ]
        blocks, masks = self.reader.read_many(list(zip(mine, numbers, strict=True)))
        if sampling.examples is not None and not validating:
            # A language model reads regions one after the other; what it says of a slide must
            # not hang on which comes first.
            for row, i in enumerate(mine):
                rng = rng_for("order", sampling.seed, epoch, ids[i])
                order = rng.permutation(len(blocks[row]))
                blocks[row], masks[row] = blocks[row][order], masks[row][order]
        features, mask = pad_slides(blocks, masks, dtype=torch.float16)
        subcaptions = [
            draw_subcaptions(
                corpus.pieces[i],
                num=sampling.num_subcaptions,
                seed=sampling.seed,
                epoch=epoch,
                slide_id=ids[i],
                max_merged=sampling.max_merged,
                statements=sampling.statements,
                contig_off_by_one=sampling.contig_off_by_one,
            )
            for i in mine
        ]
        choice = negative_choice(
            [ids[i] for i in mine],
            [ids[i] for i in others],
            num=sampling.num_subcaptions,
            seed=sampling.seed,
            epoch=epoch,
        )
        asked: list[list[Example]] = []
        if sampling.examples is not None:
            asked = [self._examples(i, epoch=epoch, validating=validating) for i in mine]
        return Batch(
            slides=mine,
            features=features,
            patch_mask=mask,
            captions=[corpus.captions[i] for i in mine],
            subcaptions=subcaptions,
            negative_choice=torch.from_numpy(choice),
            examples=asked,
        )

    def _examples(self, slide: int, *, epoch: int, validating: bool) -> list[Example]:
        examples, corpus = self.sampling.examples, self.corpus
        assert examples is not None
        caption, questions = corpus.captions[slide], corpus.questions_of(slide)
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

    def stream(self, start: int, stop: int, *, pin: bool = False) -> Iterator[list[Batch]]:
        """Yield the micro-batches of steps ``start`` to ``stop``, read ahead by a thread."""
        ready: queue.Queue[list[Batch] | BaseException | None] = queue.Queue(AHEAD)
        over = threading.Event()

        def offer(item: list[Batch] | BaseException | None) -> None:
            while not over.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    return
                except queue.Full:
                    continue

        def produce() -> None:
            try:
                for step in range(start, stop):
                    if over.is_set():
                        return
                    made = self.micro_batches(step)
                    offer([_pinned(batch) for batch in made] if pin else made)
                offer(None)
            except BaseException as error:  # raised again where it is waited for
                offer(error)

        thread = threading.Thread(target=produce, name="batches", daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            over.set()
            thread.join()


def _pinned(batch: Batch) -> Batch:
    from dataclasses import replace

    return replace(
        batch,
        features=batch.features.pin_memory(),
        patch_mask=batch.patch_mask.pin_memory(),
        negative_choice=batch.negative_choice.pin_memory(),
    )
