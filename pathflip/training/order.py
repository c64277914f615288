"""Order of an epoch: batches without two items of a patient, equal captions kept apart.

Items are slides or patch trees. Every order is a function of (seed, epoch) alone, so it is the same
on any number of workers and after any restart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pathflip.errors import ConfigError
from pathflip.training.dataset import rng_for

_SWAPS, _ALL_SWAPS = 200, 100_000
"""Swaps tried for an item, and in an epoch, to part equal captions."""
_TAKEN = np.iinfo(np.int64).max
"""Fill of a batch that has an item of the patient."""


class Items(Protocol):
    """Items that are put in order."""

    @property
    def unit(self) -> str:
        """Name of an item, in the plural: ``slides``."""
        ...

    @property
    def patients(self) -> Sequence[str]:
        """Patient of each item; a batch has one item of each."""
        ...

    def members(self, split: str) -> NDArray[np.int64]:
        """Return the positions of the items of a split, ascending."""
        ...

    def says(self, item: int, /) -> str:
        """Return the text by which items count as equal."""
        ...


class StepOrder:
    """Items of each step of a run: epoch after epoch, each in an order of its own.

    Args:
        items: The items.
        seed: Seed of the orders.
        batch_size: Number of items in a step, over all workers.
        accumulate: Number of micro-batches in a step.
    """

    def __init__(self, items: Items, *, seed: int, batch_size: int, accumulate: int) -> None:
        self._items, self._seed = items, seed
        self._batch_size, self._accumulate = batch_size, accumulate
        self._epoch: tuple[int, NDArray[np.int64]] | None = None

    @cached_property
    def steps_per_epoch(self) -> int:
        """Full batches of an epoch; see :func:`steps_per_epoch`."""
        return steps_per_epoch(self._items, self._batch_size)

    def step(self, step: int) -> NDArray[np.int64]:
        """Return the items of a global step, of all workers: int64 [accumulate, B]."""
        epoch, number = divmod(step, self.steps_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            order = epoch_order(
                self._items, epoch=epoch, seed=self._seed, batch_size=self._batch_size
            )
            self._epoch = (epoch, order)
        items: NDArray[np.int64] = self._epoch[1][number]
        return items.reshape(self._accumulate, -1)


def steps_per_epoch(corpus: Items, batch_size: int) -> int:
    """Return the number of full batches of an epoch.

    Raises:
        ConfigError: If there are too few items or patients for one batch (``too_few_slides``,
            ``too_few_trees``).
    """
    patients = [corpus.patients[i] for i in corpus.members("train")]
    steps = _num_batches(Counter(patients).values(), batch_size)
    if steps == 0:
        raise ConfigError(
            f"A batch of {batch_size} {corpus.unit} of different patients cannot be made from "
            f"{len(patients)} training {corpus.unit} of {len(set(patients))} patients.",
            hint=f"Use -o batch_size={max(1, len(set(patients)))} or less, or more {corpus.unit}.",
            code=f"too_few_{corpus.unit}",
        )
    return steps


def _num_batches(group_sizes: Iterable[int], batch_size: int) -> int:
    """Return the largest number of batches in which no two items are of one group."""
    sizes = list(group_sizes)
    steps = sum(sizes) // batch_size
    while steps and (most := sum(min(size, steps) for size in sizes) // batch_size) < steps:
        steps = most
    return steps


def epoch_order(corpus: Items, *, epoch: int, seed: int, batch_size: int) -> NDArray[np.int64]:
    """Return the items of every global batch of an epoch.

    No batch holds two items of a patient, and equal captions are kept apart where that is
    possible: both would count as negatives of each other. What does not fill a batch is left out
    of this epoch, others each time.

    Returns:
        int64 [steps, batch_size], positions in the corpus; none is there twice.
    """
    steps = steps_per_epoch(corpus, batch_size)
    rng = rng_for("order", seed, epoch)
    members = rng.permutation(corpus.members("train"))
    groups: dict[str, list[int]] = {}
    for i in members.tolist():
        groups.setdefault(corpus.patients[i], []).append(i)
    kept = [group[:steps] for group in groups.values()]
    _leave_out(kept, sum(map(len, kept)) - steps * batch_size, rng)
    times = Counter(corpus.says(i) for i in members.tolist())

    def rarest_last(group: list[int]) -> int:
        return -max(len(group), *(times[corpus.says(i)] for i in group))

    # Largest groups first, each into the emptiest batches: fills then differ by one at most, and
    # single items level them out. Sorting is stable, so equals stay shuffled.
    batches: list[list[int]] = [[] for _ in range(steps)]
    held: dict[str, list[int]] = {}
    fill = np.zeros(steps, np.int64)
    for group in sorted((group for group in kept if group), key=rarest_last):
        noise = rng.random(steps)
        room = fill.copy() if len(group) > 1 else fill
        for i in group:
            emptiest = np.flatnonzero(room == room.min())
            caption = corpus.says(i)
            if times[caption] > 1:
                there = held.setdefault(caption, [])
                apart = emptiest[~np.isin(emptiest, there)] if there else emptiest
                emptiest = apart if len(apart) else emptiest
            chosen = int(emptiest[noise[emptiest].argmin()])
            if times[caption] > 1:
                there.append(chosen)
            batches[chosen].append(i)
            fill[chosen] += 1
            if room is not fill:
                room[chosen] = _TAKEN
    _separate(batches, corpus, rng)
    order = np.array(batches, np.int64).reshape(steps, batch_size)
    return rng.permuted(order, axis=1)


def _leave_out(groups: list[list[int]], count: int, rng: np.random.Generator) -> None:
    """Drop ``count`` items at random from the groups, in place."""
    owner = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    for which in rng.permutation(owner)[:count].tolist():
        groups[which].pop()


def _separate(batches: list[list[int]], corpus: Items, rng: np.random.Generator) -> None:
    """Swap items between batches, in place, so that equal captions part where they can."""

    def fits(i: int, batch: list[int], without: int) -> bool:
        rest = [j for j in batch if j != without]
        return all(
            corpus.patients[j] != corpus.patients[i] and corpus.says(j) != corpus.says(i)
            for j in rest
        )

    left = _ALL_SWAPS
    for number, batch in enumerate(batches):
        times = Counter(corpus.says(i) for i in batch)
        for i in [i for i in batch if times[corpus.says(i)] > 1]:
            if fits(i, batch, i):  # its twin was swapped away already
                continue
            for _ in range(min(_SWAPS, left)):
                left -= 1
                other = int(rng.integers(len(batches)))
                place = int(rng.integers(len(batch)))
                j = batches[other][place]
                if other != number and fits(i, batches[other], j) and fits(j, batch, i):
                    batches[other][place] = i
                    batch[batch.index(i)] = j
                    break
