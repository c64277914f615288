"""Reading of region features of a run's slides from the archive: checked, finite, cached."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pathflip.archive import Archive, vectors
from pathflip.training.dataset import Corpus
from pathflip.training.rows import RowReader, changed, damaged, keys_of

_MASKS_AT_ONCE = 1 << 16


class FeatureReader:
    """Reader of region features by slide and number; checks them as they are read.

    Rows are taken by position from the newest state of the archive, just those asked for. If all
    of them together are small enough they are read once and kept.

    Args:
        corpus: The slides.
        cache_bytes: Largest total that is kept in memory.

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
        # A slide's regions are consecutive here, in the order of their ids.
        self._starts = np.concatenate([[0], np.cumsum(corpus.num_regions)])
        self._features, feature_ids = self._rows(str(entry["features_table"]))
        regions, region_ids = self._rows("regions")
        if feature_ids != region_ids:
            raise damaged(self._archive, "regions and features of its slides differ")
        self._mask = np.zeros((len(regions), self.slots), np.bool_)
        for places, rows in regions.every(columns=["patch_mask"], at_once=_MASKS_AT_ONCE):
            self._mask[places] = vectors(rows["patch_mask"]) != 0
        self._kept: NDArray[np.float16] | None = None
        self.bytes = len(self._features) * self.slots * self.dim * 2
        if self.bytes <= cache_bytes:
            self._kept = np.zeros((len(self._features), self.slots, self.dim), np.float16)
            for places, rows in self._features.every():
                self._kept[places] = self._finite(rows)

    def read_padded(
        self, wanted: Sequence[tuple[int, NDArray[np.int64]]], *, pin: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return features and masks of slides, padded with regions to the most that one has.

        Shapes: b slides, N regions of the slide with most, M patch slots, d feature width.

        Args:
            wanted: Slides and the numbers of their regions, in any order.
            pin: Whether they are to be in page-locked memory, which copies to a GPU start from.

        Returns:
            features float16 [b, N, M, d], zero in padding; mask bool [b, N, M].
        """
        places = [self._starts[slide] + numbers for slide, numbers in wanted]
        most = max(len(own) for own in places)
        shape = (len(places), most, self.slots)
        # At the paper's sizes a batch has 0.8 GB: each row is written once, straight to its place.
        features = torch.empty(*shape, self.dim, dtype=torch.float16, pin_memory=pin)
        mask = torch.zeros(shape, dtype=torch.bool, pin_memory=pin)
        flat = np.concatenate(places)
        taken = None if self._kept is not None else self._take(flat)
        end = 0
        for row, own in enumerate(places):
            start, end = end, end + len(own)
            into = features[row, : len(own)]
            if self._kept is not None:
                rows, index = torch.from_numpy(self._kept), torch.from_numpy(own)
                torch.index_select(rows, 0, index, out=into)
            else:
                assert taken is not None
                into.numpy()[:] = taken[start:end]
            features[row, len(own) :] = 0
            mask[row, : len(own)] = torch.from_numpy(self._mask[own])
        return features, mask

    def _check(self) -> None:
        ledger = self._archive.ledger()
        name = self.corpus.about["encoder"]["name"]
        held = self._archive.ready_ids(name)
        for slide, made in zip(self.corpus.slide_ids, self.corpus.fingerprints, strict=True):
            if slide not in held or (ledger[slide]["fingerprint"] or "") != made:
                raise changed(self._archive, f"Slide {slide}")

    def _rows(self, table: str) -> tuple[RowReader, list[str]]:
        """Return a reader of the corpus' regions, slide by slide, and their ids."""
        import pyarrow.compute as pc

        keys = keys_of(
            self._archive, table, by="slide_id", among=self.corpus.slide_ids, columns=["region_id"]
        )
        keys = keys.sort_by([("slide_id", "ascending"), ("region_id", "ascending")])
        counts = pc.value_counts(keys["slide_id"].combine_chunks())  # in order of appearance
        if (
            counts.field("values").to_pylist() != self.corpus.slide_ids
            or counts.field("counts").to_pylist() != self.corpus.num_regions
        ):
            raise damaged(self._archive, f"rows of its slides are missing from {table}")
        return (
            RowReader(self._archive, table, keys["row"].to_numpy()),
            keys["region_id"].to_pylist(),
        )

    def _take(self, places: NDArray[np.int64]) -> NDArray[np.float16]:
        """Read rows by their place in the corpus; float16 [n, M, d]."""
        if not len(places):
            return np.zeros((0, self.slots, self.dim), np.float16)
        return self._finite(self._features.take(places))

    def _finite(self, rows: Any) -> NDArray[np.float16]:
        features = vectors(rows["features"]).reshape(len(rows), self.slots, self.dim)
        if not np.isfinite(features).all():
            raise damaged(self._archive, f"rows of {self._features.table} are not finite")
        return features
