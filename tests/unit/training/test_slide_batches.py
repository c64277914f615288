"""Contents of a batch: functions of (seed, epoch, slide), the archive's own numbers, checked."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pathflip import Archive
from pathflip.errors import ArchiveError, CheckpointError
from pathflip.training import features as module
from pathflip.training.dataset import Corpus, make_corpus
from pathflip.training.examples import Examples
from pathflip.training.features import FeatureReader
from pathflip.training.loader import stream
from pathflip.training.slide_batches import (
    Sampling,
    SlideDataset,
    draw_regions,
    draw_subcaptions,
    negative_choice,
)
from tests.archives import DIM, SLOTS, make_archive

SAMPLING = Sampling(seed=3, batch_size=8, accumulate=1, num_subcaptions=4, max_regions=3)
CAPTIONS_ALONE = Examples(most=1, caption_share=1.0, drop_options_prob=0.0, caption_epochs=0)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 slides of 15 patients, 2 to 6 regions each; every fifth patient validates."""
    folder = tmp_path_factory.mktemp("batches")
    return make_archive(
        folder / "a",
        slides=30,
        regions=(2, 6),
        split=lambda n: "val" if n // 2 % 5 == 4 else "train",
    )


@pytest.fixture(scope="module")
def corpus(archive: Path) -> Corpus:
    return make_corpus(Archive(archive))


# -- draws ----------------------------------------------------------------------------------------


def test_regions_are_drawn_evenly_and_without_replacement() -> None:
    def draw(**key: Any) -> list[int]:
        found: list[int] = draw_regions(10, most=4, **key).tolist()
        return found

    assert draw(seed=0, epoch=1, slide_id="a") == draw(seed=0, epoch=1, slide_id="a")
    times = Counter(i for n in range(3000) for i in draw(seed=0, epoch=n, slide_id="a"))
    assert all(abs(times[i] - 1200) < 150 for i in range(10))
    for n in range(50):
        found = draw(seed=n, epoch=0, slide_id="b")
        assert found == sorted(set(found))
        assert len(found) == 4
    assert draw_regions(3, most=4, seed=0, epoch=0, slide_id="a").tolist() == [0, 1, 2]
    assert draw_regions(9, most=None, seed=0, epoch=0, slide_id="a").tolist() == list(range(9))


def test_negative_choice_is_even_and_of_each_ordered_pair() -> None:
    ids = [f"s{n}" for n in range(200)]
    whole = negative_choice(ids, ids, num=8, seed=0, epoch=0)
    assert whole.shape == (200, 200)
    times = np.bincount(whole.ravel(), minlength=8)
    assert (abs(times - 5000) < 5 * np.sqrt(5000)).all()
    # Not of the slide alone, nor of the unordered pair.
    assert 0.10 < (whole == whole.T).mean() < 0.16
    assert 0.10 < (whole[0] == whole[1]).mean() < 0.18
    # A worker's rows are those rows; another epoch is another draw.
    assert np.array_equal(negative_choice(ids[50:60], ids, num=8, seed=0, epoch=0), whole[50:60])
    other = negative_choice(ids, ids, num=8, seed=0, epoch=1)
    assert 0.10 < (other == whole).mean() < 0.15


def test_statements_are_drawn_without_replacement() -> None:
    pieces = [f"p{n}" for n in range(5)]
    key: dict[str, Any] = {"seed": 0, "epoch": 0, "slide_id": "a", "statements": True}
    assert len(set(draw_subcaptions(pieces, num=5, **key))) == 5
    found = draw_subcaptions(pieces, num=8, **key)
    assert len(found) == 8
    assert set(found) == set(pieces)


def test_subcaptions_are_of_epoch_and_slide() -> None:
    pieces = [f"Sentence {n}." for n in range(6)]

    def draw(epoch: int, slide: str) -> list[str]:
        return draw_subcaptions(pieces, num=8, seed=0, epoch=epoch, slide_id=slide)

    assert draw(0, "a") == draw(0, "a")
    assert len({tuple(draw(epoch, slide)) for epoch in range(5) for slide in "abc"}) == 15


# -- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
def test_read_is_what_the_archive_holds(archive: Path, corpus: Corpus, cache_bytes: int) -> None:
    reader = FeatureReader(corpus, cache_bytes=cache_bytes)
    assert reader.bytes == sum(corpus.num_regions) * SLOTS * DIM * 2
    opened = Archive(archive)
    for slide in (0, 7, len(corpus) - 1):
        features, mask, _ = opened.features_array(corpus.slide_ids[slide])
        numbers = np.arange(len(features))[::-1].copy()  # any order
        got, own = reader.read_padded([(slide, numbers), (0, np.array([0]))])
        assert got.dtype == torch.float16
        assert np.array_equal(got[0, : len(numbers)].numpy(), features[::-1])
        assert np.array_equal(own[0, : len(numbers)].numpy(), mask[::-1])
        assert not own[1, 1:].any()
        assert not got[1, 1:].any()


def test_a_batch_pads_with_masked_regions(corpus: Corpus) -> None:
    made = SlideDataset(corpus, SAMPLING)
    batch = made.micro_batches(0)[0]
    counts = [min(3, corpus.num_regions[i]) for i in batch.slides]
    assert batch.features.shape == (8, max(counts), SLOTS, DIM)
    assert batch.features.dtype == torch.float16
    for row, count in enumerate(counts):
        assert batch.patch_mask[row, :count].any(-1).all()
        assert not batch.patch_mask[row, count:].any()
        assert not batch.features[row][~batch.patch_mask[row]].any()
    assert [len(texts) for texts in batch.subcaptions] == [4] * 8
    assert batch.captions == [corpus.captions[i] for i in batch.slides]
    assert batch.negative_choice.shape == (8, 8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_batch_for_a_gpu_is_in_page_locked_memory(corpus: Corpus) -> None:
    made = SlideDataset(corpus, SAMPLING)
    [plain], [pinned] = made.micro_batches(0), made.micro_batches(0, pin=True)
    for name in ("features", "patch_mask", "negative_choice"):
        assert torch.equal(getattr(pinned, name), getattr(plain, name))
        assert getattr(pinned, name).is_pinned()


def test_regions_stand_in_another_order_each_epoch_of_tuning_alone(corpus: Corpus) -> None:
    """The same regions, and their masks with them; validation and pretraining keep the order."""
    tuning = SlideDataset(corpus, replace(SAMPLING, examples=CAPTIONS_ALONE, max_regions=None))
    plain = SlideDataset(corpus, replace(SAMPLING, max_regions=None))
    slide = corpus.num_regions.index(6)

    def regions(made: SlideDataset, *, epoch: int, validating: bool = False) -> list[bytes]:
        batch = made.batch([slide], epoch=epoch, validating=validating)
        both = zip(batch.features[0], batch.patch_mask[0], strict=True)
        return [own.numpy().tobytes() + there.numpy().tobytes() for own, there in both]

    stored = regions(plain, epoch=0)
    assert regions(plain, epoch=1) == stored
    assert regions(tuning, epoch=1, validating=True) == stored
    seen = [regions(tuning, epoch=epoch) for epoch in range(8)]
    assert seen[3] == regions(tuning, epoch=3)
    assert all(sorted(own) == sorted(stored) for own in seen)
    assert len({tuple(own) for own in seen}) > 6


def parts(made: SlideDataset, step: int, **worker: int) -> list[tuple[Any, ...]]:
    """Return regions and texts of each slide of a step, in order."""
    found = []
    for batch in made.micro_batches(step, **worker):
        for row, slide in enumerate(batch.slides):
            mask = batch.patch_mask[row]
            found.append(
                (slide, batch.features[row][mask].numpy().tobytes(), tuple(batch.subcaptions[row]))
            )
    return found


@pytest.mark.parametrize("examples", [None, CAPTIONS_ALONE])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_any_number_of_workers_sees_the_same(
    corpus: Corpus, accumulate: int, examples: Examples | None
) -> None:
    """Rank r has its slice, whoever the others are; with a restart anywhere as well."""
    sampling = replace(SAMPLING, accumulate=accumulate, examples=examples)
    made = SlideDataset(corpus, sampling)
    for step in (4, 0, 1):  # also without having seen the steps before
        shares = [made.micro_batches(step, rank=rank, world=2) for rank in (0, 1)]
        whole = made.micro_batches(step)
        assert len(whole) == accumulate
        for number, batch in enumerate(whole):
            joined = [slide for share in shares for slide in share[number].slides]
            assert joined == batch.slides
            assert torch.equal(
                torch.cat([share[number].negative_choice for share in shares]),
                batch.negative_choice,
            )
        both = [part for rank in (0, 1) for part in parts(made, step, rank=rank, world=2)]
        assert sorted(parts(made, step)) == sorted(both)


def test_a_share_knows_which_columns_are_its_own(corpus: Corpus) -> None:
    made = SlideDataset(corpus, SAMPLING)
    batch = made.micro_batches(0, rank=1, world=2)[0]
    assert batch.negative_choice.shape == (4, 8)
    assert batch.first == 4
    ids = [corpus.slide_ids[i] for i in batch.slides]
    own = negative_choice(ids, ids, num=4, seed=3, epoch=0)
    assert np.array_equal(batch.negative_choice[:, 4:], own)


def test_an_epoch_shows_no_slide_twice_and_the_next_another_order(corpus: Corpus) -> None:
    made = SlideDataset(corpus, SAMPLING)
    seen = [made.step_slides(step).ravel().tolist() for step in range(2 * made.steps_per_epoch)]
    first = [slide for row in seen[: made.steps_per_epoch] for slide in row]
    second = [slide for row in seen[made.steps_per_epoch :] for slide in row]
    assert made.steps_per_epoch == 3
    assert len(set(first)) == len(first) == 24
    assert first != second
    assert {corpus.splits[slide] for slide in first} == {"train"}


def test_the_stream_is_the_steps_in_order(corpus: Corpus) -> None:
    made = SlideDataset(corpus, SAMPLING)
    streamed = [[batch.slides for batch in step] for step in stream(made, 2, 7)]
    assert streamed == [[batch.slides for batch in made.micro_batches(n)] for n in range(2, 7)]


def test_the_stream_raises_what_reading_raised(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = SlideDataset(corpus, SAMPLING)
    real = made.micro_batches

    def fail(step: int, **worker: int) -> Any:
        if step == 2:
            raise ArchiveError("gone")
        return real(step, **worker)

    monkeypatch.setattr(made, "micro_batches", fail)
    steps = stream(made, 0, 5)
    assert len([next(steps), next(steps)]) == 2
    with pytest.raises(ArchiveError, match="gone"):
        next(steps)


def test_a_stream_left_early_ends_its_thread(corpus: Corpus) -> None:
    import threading

    steps: Any = stream(SlideDataset(corpus, SAMPLING), 0, 1000)
    next(steps)
    steps.close()
    assert "batches" not in {thread.name for thread in threading.enumerate()}


# -- damage ---------------------------------------------------------------------------------------


def test_features_that_changed_are_refused(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = FeatureReader(corpus)
    real = reader._archive.dataset(reader._features.table)

    class Rotten:
        def take(self, rows: Any) -> Any:
            import pyarrow as pa

            taken = real.take(rows)
            values = module.vectors(taken["features"]).copy()
            values[0, 0] += 1
            flat = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
            return taken.set_column(taken.schema.get_field_index("features"), "features", flat)

    monkeypatch.setitem(reader._archive._datasets, reader._features.table, Rotten())
    with pytest.raises(ArchiveError, match="not what was written") as caught:
        reader.read_padded([(0, np.array([0]))])
    assert "archive repair" in caught.value.hint


def test_a_slide_that_changed_is_refused(corpus: Corpus) -> None:
    changed = replace(corpus, fingerprints=["other", *corpus.fingerprints[1:]])
    with pytest.raises(CheckpointError, match=f"Slide {corpus.slide_ids[0]} is no longer"):
        FeatureReader(changed)
