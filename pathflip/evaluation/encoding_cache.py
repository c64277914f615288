"""Slides and texts as a run's model encodes them, kept for questions that come again.

One question about a slide costs reading its features and encoding it, and the text tower; the
answer itself is a small part of that. :class:`EncodingCache` encodes each slide once while it is
kept, and many texts in one pass. :func:`pathflip.evaluation.ground_slide.ground_slide` and
:func:`pathflip.evaluation.classify.classify_slides` read from it.

Shapes: N regions, M patch slots, P patches, L texts, d joint width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pathflip.compat import check_fits
from pathflip.geometry import Tiling
from pathflip.heatmap import slide_rects

if TYPE_CHECKING:
    import torch

    from pathflip.archive import Archive
    from pathflip.checkpoints import Run
    from pathflip.models.outputs import VisionOutput

MAX_BYTES = 256 << 20
"""Memory for encoded slides: some 300 of 25 regions, 16 queries and 256 patches."""
RECENT = 16
"""Slides asked about last that are looked up in a newer state of the archive before it is used."""
MAX_TEXTS = 10_000
"""Texts whose vectors are kept: 30 MB at 768 numbers each."""


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedSlide:
    """A slide that the model has read.

    Attributes:
        slide_id: Its id.
        mpp: Its level-0 µm/px.
        sight: Output of the model, with attention; a batch of one.
        mask: bool [1, N, M], True where a patch is.
        region_xy: Grid position (rx, ry) of the regions [N, 2].
        rects: (x0, y0, w0, h0) of each patch that is there, level-0 px [P, 4].
    """

    slide_id: str
    mpp: float
    sight: VisionOutput
    mask: torch.Tensor
    region_xy: NDArray[np.int64]
    rects: NDArray[np.int64]

    @property
    def nbytes(self) -> int:
        """Memory it takes."""
        sight = self.sight
        tensors = (sight.slide, sight.tokens, sight.attention, sight.region_mask, self.mask)
        arrays = self.region_xy.nbytes + self.rects.nbytes
        return arrays + sum(tensor.nbytes for tensor in tensors if tensor is not None)


class EncodingCache:
    """A run's model with the slides and texts it encoded of late. For one thread at a time.

    A slide is encoded by itself, so its vectors do not depend on what else is asked. It is read
    again once its own regions or features were written.

    Args:
        run: The run.
        max_bytes: Memory for slides; the last one stays, whatever it takes.
        max_texts: Number of texts.
    """

    def __init__(self, run: Run, *, max_bytes: int = MAX_BYTES, max_texts: int = MAX_TEXTS) -> None:
        self.run = run
        self._max_bytes, self._max_texts = max_bytes, max_texts
        self._slides: OrderedDict[tuple[object, ...], EncodedSlide] = OrderedDict()
        self._texts: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._bytes = 0

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Return text vectors, not normalised [L, d]; those not kept are encoded in one pass."""
        import torch

        if new := self._new(texts):
            vectors = self.run.model.encode_text(new, normalize=False)
            # Each of its own, not a view that keeps the vectors of all.
            self._texts.update(zip(new, (row.clone() for row in vectors), strict=True))
        for text in texts:
            self._texts.move_to_end(text)
        found = torch.stack([self._texts[text] for text in texts])
        while len(self._texts) > self._max_texts:
            self._texts.popitem(last=False)
        return found

    def missing(self, texts: Sequence[str]) -> int:
        """Return how many of some texts are not kept."""
        return len(self._new(texts))

    def _new(self, texts: Sequence[str]) -> list[str]:
        return [text for text in dict.fromkeys(texts) if text not in self._texts]

    def holds(self, archive: Archive, slide_id: str) -> bool:
        """Return whether a slide is kept, so that it costs next to nothing."""
        return self._key(archive, slide_id) in self._slides

    def look_up(self, archive: Archive) -> None:
        """Find out for the last slides whether they are as before; may run beside other calls."""
        encoder = check_fits(archive, self.run)
        for _, slide_id, *_ in list(self._slides)[-RECENT:]:
            archive.written(str(slide_id), encoder)

    def slide(self, archive: Archive, name: str) -> EncodedSlide:
        """Return a slide, encoded now unless it is kept.

        Args:
            archive: Archive of the slide.
            name: A ``slide_id``, or another name that only this slide goes by.

        Raises:
            ArchiveError: The slide is unknown, not ready, or has no features of the encoder; the
                run does not fit the archive.
        """
        slide_id = archive.resolve(name)
        key = self._key(archive, slide_id)
        if key not in self._slides:
            found = self._read(archive, slide_id)
            self._slides[key] = found
            self._bytes += found.nbytes
            while self._bytes > self._max_bytes and len(self._slides) > 1:
                self._bytes -= self._slides.popitem(last=False)[1].nbytes
        self._slides.move_to_end(key)
        return self._slides[key]

    def _key(self, archive: Archive, slide_id: str) -> tuple[object, ...]:
        """Return what the encoding of a slide hangs on; what is written of others changes none."""
        encoder = check_fits(archive, self.run)
        mpp = archive.ledger()[slide_id]["mpp"]
        return (archive.uri, slide_id, mpp, archive.written(slide_id, encoder))

    def _read(self, archive: Archive, slide_id: str) -> EncodedSlide:
        import torch

        model = self.run.model
        features, there, _ = archive.features_array(slide_id, check_fits(archive, self.run))
        regions = archive.regions(slide_id, columns=["region_id", "rx", "ry"])
        xy = np.stack([regions["rx"].to_numpy(), regions["ry"].to_numpy()], axis=1)
        xy = xy.astype(np.int64)
        mask = torch.from_numpy(np.array(there))[None].to(model.device)
        mpp = archive.ledger()[slide_id]["mpp"]
        rects = slide_rects(xy, Tiling(**archive.tiling()), mpp=mpp)
        return EncodedSlide(
            slide_id=slide_id,
            mpp=mpp,
            sight=model.encode_vision(torch.from_numpy(np.array(features)).float()[None], mask),
            mask=mask,
            region_xy=xy,
            rects=rects[there],
        )
