"""One pass over the slides of a split, shared by all evaluations: features are read once.

:func:`batches` reads and pads; :func:`encode` keeps the slides' vectors and the local scores of a
list of texts. Grounding takes the same batches (:mod:`pathflip.evaluation.grounding`).

Shapes: n slides, B slides of a batch, N regions, M patch slots, d_in feature width, d joint
width, L texts.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pathflip.compat import check_fits
from pathflip.errors import ConfigError
from pathflip.progress import Progress, Report
from pathflip.splits import canonical_split, requested_split

if TYPE_CHECKING:
    import torch

    from pathflip.archive import Archive
    from pathflip.checkpoints import Run

BATCH_BYTES = 96 << 20
"""Features of a padded batch, float32; one slide may need more."""
MAX_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class SlideRow:
    """A slide's row in the archive, as evaluations use it.

    Attributes:
        slide_id: Its id.
        stem: Its file's name without the ending.
        patient_id: Its patient, or None.
        split: train, val, test, or None.
        labels: Its labels, all text; empty where unknown.
        mpp: Level-0 µm/px.
    """

    slide_id: str
    stem: str
    patient_id: str | None
    split: str | None
    labels: dict[str, str]
    mpp: float
    uri: str
    n_regions: int


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Slides read from the archive, padded to the most regions among them.

    Attributes:
        rows: Index of each in the list of slides [B].
        slides: Their rows [B].
        features: float32 [B, N, M, d_in], zero where masked.
        patch_mask: bool [B, N, M], True where a patch is.
        region_xy: Grid position (rx, ry) of each slide's regions, int64 [N_i, 2] each.
    """

    rows: list[int]
    slides: list[SlideRow]
    features: torch.Tensor
    patch_mask: torch.Tensor
    region_xy: list[NDArray[np.int64]]


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Encoded slides and the local scores of texts.

    Attributes:
        slides: Their rows [n].
        slide: Slide vectors, float32 [n, d], L2-normalised.
        texts: Texts with local scores [L].
        local: cos(v_tc(t), t) of Eq. 5, float32 [n, L]; None of a model without regions.
    """

    slides: list[SlideRow]
    slide: NDArray[np.float32]
    texts: tuple[str, ...] = ()
    local: NDArray[np.float32] | None


def has_regions(run: Run) -> bool:
    """Return whether a run's model has regions; local scores and grounding need them."""
    return run.model.config.has_regions


def list_slides(
    archive: Archive, run: Run, *, splits: Sequence[str] | None = None
) -> list[SlideRow]:
    """Return ready slides with the features a run needs, sorted by id.

    What the run trained or validated on is of that split, whatever the archive says; it decides
    where the archive names no splits, too.

    Args:
        archive: Archive of the slides.
        run: Run to be measured.
        splits: Splits of the slides; None for all slides.

    Raises:
        ConfigError: There is none.
        ArchiveError: The run does not fit the archive.
    """
    encoder = check_fits(archive, run)
    return slide_rows(
        archive, usable=archive.ready_ids(encoder), drawn=drawn_splits(run.path), splits=splits
    )


def slide_rows(
    archive: Archive,
    *,
    usable: Collection[str],
    drawn: Mapping[str, str],
    splits: Sequence[str] | None = None,
) -> list[SlideRow]:
    """Return ready slides of some splits, sorted by id.

    Args:
        archive: Archive of the slides.
        usable: Ids of the slides that have what is measured.
        drawn: {slide_id: split} that a model was trained with; it wins over the archive's.
        splits: Splits of the slides; None for all slides.

    Raises:
        ConfigError: There is none.
    """
    columns = ["slide_id", "uri", "patient_id", "split", "labels", "mpp", "n_regions"]
    rows = [
        row for row in archive.slides("ready", columns).to_pylist() if row["slide_id"] in usable
    ]
    for row in rows:
        row["split"] = drawn.get(row["slide_id"]) or canonical_split(row["split"])
    wanted = None if splits is None else {requested_split(split) for split in splits}
    chosen = [row for row in rows if wanted is None or row["split"] in wanted]
    if not chosen:
        there = sorted({str(row["split"]) for row in rows})
        raise ConfigError(
            f"{archive.uri} has no ready slide of split {' or '.join(splits or ['any'])}.",
            hint=f"Its slides are of: {', '.join(there) or '(no slides)'}; see --split, or give "
            "splits with pathflip ingest --patients.",
            code="no_slides",
        )
    return [
        SlideRow(
            slide_id=row["slide_id"],
            stem=_stem(row["uri"] or row["slide_id"]),
            patient_id=row["patient_id"],
            split=row["split"],
            labels={key: str(value) for key, value in json.loads(row["labels"] or "{}").items()},
            mpp=row["mpp"],
            uri=row["uri"] or "",
            n_regions=row["n_regions"] or 0,
        )
        for row in chosen
    ]


def batches(
    archive: Archive,
    slides: Sequence[SlideRow],
    *,
    encoder: str,
    device: str | torch.device = "cpu",
    what: str = "encode",
    progress: Report | None = None,
) -> Iterator[Batch]:
    """Read slides in padded batches, like sizes together; the next is read meanwhile.

    Args:
        archive: Archive of the slides.
        slides: Slides to read; ``Batch.rows`` are indices into it.
        encoder: Encoder of the features.
        device: Device of the tensors.
        what: Name of the work in the progress.
        progress: Called after each batch.
    """
    dim = archive.encoders()[encoder]["dim"]
    per_region = archive.slots * dim * 4
    groups: list[list[int]] = []
    for row in sorted(range(len(slides)), key=lambda i: (slides[i].n_regions, i)):
        cost = slides[row].n_regions * per_region
        if not groups or len(groups[-1]) == MAX_BATCH or (len(groups[-1]) + 1) * cost > BATCH_BYTES:
            groups.append([])
        groups[-1].append(row)
    start, done = time.monotonic(), 0
    with ThreadPoolExecutor(1) as pool:
        waiting = [pool.submit(_read, archive, slides, group, encoder) for group in groups[:2]]
        for index in range(len(groups)):
            batch = waiting.pop(0).result()
            if index + 2 < len(groups):
                waiting.append(pool.submit(_read, archive, slides, groups[index + 2], encoder))
            yield Batch(
                rows=batch.rows,
                slides=batch.slides,
                features=batch.features.to(device),
                patch_mask=batch.patch_mask.to(device),
                region_xy=batch.region_xy,
            )
            done += len(batch.rows)
            if progress is not None:
                progress(
                    Progress(
                        what=what,
                        done=done,
                        total=len(slides),
                        seconds=time.monotonic() - start,
                    )
                )


class Encoder:
    """Accumulator of :class:`Encoded` over batches.

    Args:
        run: Run whose model encodes.
        slides: Slides of all batches.
        texts: Texts to score locally.
    """

    def __init__(self, run: Run, slides: Sequence[SlideRow], *, texts: Sequence[str] = ()) -> None:
        self._model = run.model
        self._slides = list(slides)
        self._texts = tuple(dict.fromkeys(texts))
        self._raw: torch.Tensor | None = None
        if has_regions(run):
            self._raw = run.model.encode_text(list(self._texts), normalize=False)
        self._slide: NDArray[np.float32] | None = None
        self._local = np.zeros((len(slides), len(self._texts)), np.float32)

    def add(self, batch: Batch) -> None:
        """Encode a batch."""
        import torch

        with torch.no_grad():
            seen = self._model.encode_slide(batch.features, batch.patch_mask)
            if self._slide is None:
                self._slide = np.zeros((len(self._slides), seen.slide.shape[1]), np.float32)
            self._slide[batch.rows] = seen.slide.float().cpu().numpy()
            if self._raw is not None and self._texts:
                scores = self._model.local_scores(seen, self._raw)
                self._local[batch.rows] = scores.float().cpu().numpy()

    def result(self) -> Encoded:
        """Return all slides, in the order they were given."""
        if self._slide is None:
            raise ValueError("no batch was added")
        return Encoded(
            slides=self._slides,
            slide=self._slide,
            texts=self._texts,
            local=None if self._raw is None else self._local,
        )


def encode(
    archive: Archive,
    run: Run,
    *,
    splits: Sequence[str] | None = None,
    slides: Sequence[SlideRow] | None = None,
    texts: Sequence[str] = (),
    progress: Report | None = None,
) -> Encoded:
    """Encode slides of some splits and score texts against their regions.

    Args:
        archive: Archive with the features.
        run: A trained run whose encoder and tiling are the archive's.
        splits: Splits of the slides; None for all.
        slides: Exactly these slides instead.
        texts: Texts to score locally.
        progress: Called after each batch.
    """
    name = check_fits(archive, run)
    chosen = list_slides(archive, run, splits=splits) if slides is None else slides
    encoder = Encoder(run, chosen, texts=texts)
    for batch in batches(archive, chosen, encoder=name, device=run.model.device, progress=progress):
        encoder.add(batch)
    return encoder.result()


def captions_of(
    archive: Archive, slides: Sequence[SlideRow], *, source: str | None = None
) -> dict[str, str]:
    """Return {slide_id: caption} of those slides that have one.

    Args:
        archive: Archive of the slides.
        slides: Slides to find captions of.
        source: Source of the captions; by default the first each slide has, as in pretraining.

    Raises:
        ConfigError: No slide has a caption.
    """
    rows = archive.captions(source).select(["slide_id", "source", "text"]).to_pylist()
    wanted = {slide.slide_id for slide in slides}
    rows = [row for row in rows if row["slide_id"] in wanted and row["text"]]
    if not rows:
        raise ConfigError(
            f"None of the {len(slides)} slides has a caption"
            + (f" of source {source}." if source else "."),
            hint=f"Add them: pathflip archive import --archive {archive.uri} --captions FILE",
            code="no_captions",
        )
    return {row["slide_id"]: row["text"] for row in reversed(rows)}  # sorted by slide and source


def _read(
    archive: Archive, slides: Sequence[SlideRow], group: Sequence[int], encoder: str
) -> Batch:
    from pathflip.models.slide_batch import pad_slides

    read = []
    for row in group:
        slide_id = slides[row].slide_id
        features, mask, ids = archive.features_array(slide_id, encoder)
        regions = archive.regions(slide_id, columns=["region_id", "rx", "ry"])
        if regions["region_id"].to_pylist() != ids:  # sorted by id, both
            raise ConfigError(
                f"The regions of {slide_id} changed while they were read.", hint="Try again."
            )
        xy = np.stack([regions["rx"].to_numpy(), regions["ry"].to_numpy()], axis=1)
        read.append((features, mask, xy.astype(np.int64)))
    padded, masks = pad_slides([values for values, _, _ in read], [mask for _, mask, _ in read])
    return Batch(
        rows=list(group),
        slides=[slides[row] for row in group],
        features=padded,
        patch_mask=masks,
        region_xy=[xy for _, _, xy in read],
    )


def drawn_splits(run: Path) -> dict[str, str]:
    """Return {slide_id: split} of the slides a run was made with; empty for a bare model folder."""
    path = run / "data.parquet"
    if not path.is_file():
        return {}
    import pyarrow.parquet as pq

    rows = pq.read_table(path, columns=["slide_ids", "splits"])
    return dict(zip(rows["slide_ids"].to_pylist(), rows["splits"].to_pylist(), strict=True))


def _stem(uri: str) -> str:
    name: Any = uri.rstrip("/").rpartition("/")[2]
    return str(name).rpartition(".")[0] or str(name)
