"""Selection of a run's slides, and their order."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pathflip import Archive
from pathflip.archive.captions import Caption, write_captions
from pathflip.archive.commit import Committer
from pathflip.errors import ArchiveError, CheckpointError, ConfigError
from pathflip.training import order as orders_of
from pathflip.training.dataset import Corpus, make_corpus, rng_for
from pathflip.training.order import epoch_order, steps_per_epoch
from tests.archives import make_archive


def corpus(patients: list[str], captions: list[str] | None = None, **changes: Any) -> Corpus:
    count = len(patients)
    values: dict[str, Any] = {
        "slide_ids": [f"s{n:04d}" for n in range(count)],
        "patients": patients,
        "splits": ["train"] * count,
        "captions": captions or [f"caption {n}" for n in range(count)],
        "pieces": [["a"]] * count,
        "num_regions": [1] * count,
        "fingerprints": ["f"] * count,
        "about": {"encoder": {"name": "tex"}, "tiling": {}, "slots": 16},
    }
    return Corpus(**values | changes)


# -- order ----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=40),
    batch=st.integers(1, 8),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 3),
)
def test_no_two_slides_of_a_patient_in_a_batch(
    sizes: list[int], batch: int, seed: int, epoch: int
) -> None:
    patients = [f"P{number}" for number, size in enumerate(sizes) for _ in range(size)]
    random.Random(seed).shuffle(patients)
    made = corpus(patients)
    try:
        steps = steps_per_epoch(made, batch)
    except ConfigError:
        assert len(sizes) < batch  # as many patients as slides in a batch are always enough
        return
    order = epoch_order(made, epoch=epoch, seed=seed, batch_size=batch)
    assert order.shape == (steps, batch)
    assert len(set(order.ravel().tolist())) == order.size
    for row in order.tolist():
        assert len({patients[i] for i in row}) == batch
    # As many as there can be: one step more would need a patient twice in a batch.
    assert sum(min(size, steps + 1) for size in sizes) < (steps + 1) * batch


def test_order_is_of_seed_and_epoch() -> None:
    made = corpus([f"P{n // 2}" for n in range(60)])

    def order(**key: int) -> list[list[int]]:
        found: list[list[int]] = epoch_order(made, batch_size=8, **key).tolist()
        return found

    assert order(seed=1, epoch=0) == order(seed=1, epoch=0)
    assert order(seed=1, epoch=0) != order(seed=1, epoch=1)
    assert order(seed=1, epoch=0) != order(seed=2, epoch=0)


def test_every_slide_has_its_turn_and_its_place() -> None:
    """Over many epochs: all are seen about equally often, in all positions of the batch."""
    made = corpus(["big"] * 4 + [f"P{n}" for n in range(30)])
    orders = np.array([epoch_order(made, epoch=e, seed=0, batch_size=8) for e in range(300)])
    times = np.bincount(orders.ravel(), minlength=34)
    expected = orders.size / 34
    assert (abs(times - expected) < 5 * np.sqrt(expected)).all()
    for position in range(8):
        share = (orders[:, :, position] < 4).mean()
        assert abs(share - 4 / 34) < 0.05


def test_equal_captions_are_kept_apart() -> None:
    count, batch = 64, 8
    captions = [f"c{n // 4}" for n in range(count)]  # each four times, eight batches
    made = corpus([f"P{n}" for n in range(count)], captions)
    for epoch in range(20):
        for row in epoch_order(made, epoch=epoch, seed=0, batch_size=batch).tolist():
            assert max(Counter(captions[i] for i in row).values()) == 1


def test_equal_captions_everywhere_are_no_obstacle() -> None:
    made = corpus([f"P{n}" for n in range(40)], ["same"] * 40)
    assert epoch_order(made, epoch=0, seed=0, batch_size=8).shape == (5, 8)


def placed_one_by_one(made: Any, *, epoch: int, seed: int, batch_size: int) -> list[list[int]]:
    """Batches of the definition: each item asks every batch how full it is and what it holds."""
    steps = steps_per_epoch(made, batch_size)
    rng = rng_for("order", seed, epoch)
    groups: dict[str, list[int]] = {}
    for i in rng.permutation(made.members("train")).tolist():
        groups.setdefault(made.patients[i], []).append(i)
    times = Counter(made.says(i) for own in groups.values() for i in own)
    kept = [group[:steps] for group in groups.values()]
    orders_of._leave_out(kept, sum(map(len, kept)) - steps * batch_size, rng)
    batches: list[list[int]] = [[] for _ in range(steps)]
    for group in sorted(
        filter(None, kept), key=lambda own: -max(len(own), *(times[made.says(i)] for i in own))
    ):
        noise = rng.random(steps).tolist()
        free = set(range(steps))
        for i in group:
            least = min(len(batches[b]) for b in free)
            chosen = min(
                (b for b in sorted(free) if len(batches[b]) == least),
                key=lambda b: (made.says(i) in map(made.says, batches[b]), noise[b]),
            )
            free.remove(chosen)
            batches[chosen].append(i)
    orders_of._separate(batches, made, rng)
    found: list[list[int]] = rng.permuted(np.array(batches, np.int64), axis=1).tolist()
    return found


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=4, max_size=40),
    captions=st.integers(1, 60),
    batch=st.integers(1, 4),
    seed=st.integers(0, 5),
)
def test_order_is_the_one_by_definition(
    sizes: list[int], captions: int, batch: int, seed: int
) -> None:
    """An unfinished run goes on with the order it began with."""
    patients = [f"P{number}" for number, size in enumerate(sizes) for _ in range(size)]
    made = corpus(patients, [f"c{n * 7 % captions}" for n in range(len(patients))])
    found = epoch_order(made, epoch=1, seed=seed, batch_size=batch)
    assert found.tolist() == placed_one_by_one(made, epoch=1, seed=seed, batch_size=batch)


def test_too_few_for_a_batch() -> None:
    with pytest.raises(ConfigError, match="12 training slides of 2 patients") as caught:
        steps_per_epoch(corpus([f"P{n % 2}" for n in range(12)]), 4)
    assert "batch_size=2" in caught.value.hint


# -- slides and splits ----------------------------------------------------------------------------


def test_named_splits_are_kept(tmp_path: Path) -> None:
    names = ("train", "train", "val", "test")
    uri = make_archive(tmp_path / "a", slides=16, per_patient=1, split=lambda n: names[n % 4])
    made = make_corpus(Archive(uri))
    assert len(made) == 12
    assert made.slide_ids == sorted(made.slide_ids)
    for slide, split in zip(made.slide_ids, made.splits, strict=True):
        assert split == names[int(slide[-3:]) % 4]
    assert made.about["left_out"] == {"test": 4, "without_caption": 0}
    assert made.counts()["train_slides"] == 8
    assert made.pieces[0][0].startswith("Sections show")


def test_unnamed_splits_are_drawn_by_patient(tmp_path: Path) -> None:
    uri = make_archive(
        tmp_path / "a", slides=120, regions=(1, 1), per_patient=3, split=lambda n: None
    )
    archive = Archive(uri)
    made = make_corpus(archive, val_fraction=0.3, seed=1)
    by_patient: dict[str, set[str]] = {}
    for patient, split in zip(made.patients, made.splits, strict=True):
        by_patient.setdefault(patient, set()).add(split)
    assert all(len(splits) == 1 for splits in by_patient.values())
    assert 4 <= sum(splits == {"val"} for splits in by_patient.values()) <= 20  # of 40
    assert made.splits == make_corpus(archive, val_fraction=0.3, seed=1).splits
    assert made.splits != make_corpus(archive, val_fraction=0.3, seed=2).splits
    assert set(make_corpus(archive, val_fraction=0.0).splits) == {"train"}


def test_validation_is_drawn_from_training_slides_where_none_is_named(tmp_path: Path) -> None:
    uri = make_archive(
        tmp_path / "a", slides=60, regions=(1, 1), split=lambda n: "test" if n % 6 < 2 else "train"
    )
    made = make_corpus(Archive(uri), val_fraction=0.3)
    assert made.about["left_out"]["test"] == 20
    assert 2 <= made.splits.count("val") <= 24


def test_a_patient_in_two_splits_is_refused(tmp_path: Path) -> None:
    uri = make_archive(
        tmp_path / "a", slides=4, regions=(1, 1), split=lambda n: "train" if n % 2 else "val"
    )
    with pytest.raises(ConfigError, match="Patient P0 has slides in val and in train"):
        make_corpus(Archive(uri))


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    uri = make_archive(tmp_path / "a", slides=4, captions=False)
    with pytest.raises(ArchiveError, match="None of the 4 slides") as caught:
        make_corpus(Archive(uri))
    assert (caught.value.code, "archive import" in caught.value.hint) == ("no_captions", True)
    with pytest.raises(ArchiveError, match="no encoder 'uni'"):
        make_corpus(Archive(uri), encoder="uni")


def test_sources_and_pieces(tmp_path: Path) -> None:
    uri = make_archive(tmp_path / "a", slides=4, regions=(1, 1))
    text = "Tumour is seen. No necrosis is identified. There is no evidence of mucin."
    with Committer(uri) as committer:
        more = [Caption(slide_id="slide001", text=text), Caption(slide_id="slide002", text=text)]
        write_captions(committer, more, source="second")
    archive = Archive(uri)
    assert make_corpus(archive).pieces[1][0].startswith("Sections show")  # the first by name
    second = make_corpus(archive, source="second", val_fraction=0)
    assert second.slide_ids == ["slide001", "slide002"]
    assert second.about["left_out"]["without_caption"] == 2
    assert len(second.pieces[0]) == 3
    affirmed = make_corpus(archive, source="second", subcaption_source="affirmed", val_fraction=0)
    assert affirmed.pieces == [["Tumour is seen."]] * 2
    assert affirmed.captions == second.captions


def test_saved_and_loaded(tmp_path: Path) -> None:
    made = corpus(["a", "b", "c"], pieces=[["x", "y"], ["z"], ["ü."]])
    made.save(tmp_path / "data.parquet")
    assert Corpus.load(tmp_path / "data.parquet") == made
    content = (tmp_path / "data.parquet").read_bytes()
    refused = 0
    for place in range(0, len(content), 37):
        changed = bytearray(content)
        changed[place] ^= 1
        (tmp_path / "data.parquet").write_bytes(changed)
        try:
            found = Corpus.load(tmp_path / "data.parquet")
        except CheckpointError:
            refused += 1
            continue
        assert found == made  # a byte nobody reads
    assert refused > 20
