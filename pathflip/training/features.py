"""Reading of region features of a run's slides from the archive: checked, finite, cached."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathflip.archive import Archive, vectors
from pathflip.archive.schema import intact_rows
from pathflip.archive.storage import guarded, is_local
from pathflip.errors import ArchiveError, CheckpointError
from pathflip.training.dataset import Corpus

_ROWS_AT_ONCE = 1024


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
        """Return features float16 [n, M, d] and mask bool [n, M] of a slide's regions."""
        features, mask = self.read_many([(slide, numbers)])
        return features[0], mask[0]

    def read_many(
        self, wanted: Sequence[tuple[int, NDArray[np.int64]]]
    ) -> tuple[list[Any], list[Any]]:
        """Return features and masks of several slides, as :meth:`read` does of one."""
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
        """Return row numbers of the corpus' regions, slide by slide, and their ids."""
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
