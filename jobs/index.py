"""Index: vectors of a trained model for every slide and region, so that text can find them.

Slides are spread over actors. Each holds the run's model, reads a slide's features from
the archive and returns the rows of its vectors; the driver commits them in batches into
``embeddings_<model>``, beside those of other models. A slide is done when all of its rows are
there, so the same command again does what is missing: slides that are new, were ingested anew, or
did not get there before the process died.

    python -m jobs.index --archive URI --run DIR       (the same as: pathflip index …)
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from jobs import cluster
from jobs.cluster import Place
from jobs.index_segments import nodes, segmented
from jobs.stages import ended, map_actors, wrong_model
from pathflip import tracing
from pathflip.archive import Archive
from pathflip.archive.commit import Committer
from pathflip.archive.indexes import indexes_due, refresh_indexes
from pathflip.archive.model_vectors import ensure_model, indexed_slides
from pathflip.archive.slide_rows import fixed
from pathflip.compat import check_fits
from pathflip.config import check_positive
from pathflip.errors import ArchiveError, CheckpointError
from pathflip.progress import Progress, Report

if TYPE_CHECKING:
    from pathflip.checkpoints import Run

_COPIED = (
    "id", "kind", "slide_id", "x0", "y0", "size0", "mpp", "tissue_fraction", "n_patches",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """Settings of an index job.

    Raises:
        ConfigError: A number is out of its range.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto means a GPU where the cluster has one."""
    actors: int | None = None
    """Actors at most; None means one per CPU, or per GPU where the model uses one."""
    commit_rows: int = 16_384
    """Vectors of a commit; a commit takes about 0.2 s whatever its size."""
    commit_s: float = 30.0
    """Finished slides are committed at least this often."""
    index_tasks: int | None = None
    """Ray tasks that build the vector index together; None means one on each node."""

    def __post_init__(self) -> None:
        check_positive(self, "actors", "commit_rows", "index_tasks")


@dataclass(frozen=True, kw_only=True)
class IndexResult:
    """Result of an index job, or with ``dry_run`` what it would be.

    Attributes:
        model: Name of the model.
        table: Its table.
        slides: Slides indexed by this run.
        regions: Their regions.
        skipped: Slides that were indexed before.
        indexes: Search indexes made, ``table.column``.
        refused: {``table.column``: recall} of vector indexes that are not used; see
            :class:`pathflip.archive.indexes.Refreshed`.
        seconds: Wall time.
    """

    model: str
    table: str
    slides: int
    regions: int
    skipped: int
    indexes: list[str]
    refused: dict[str, float]
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """The document ``pathflip index --json`` prints."""
        return asdict(self) | {"seconds": round(self.seconds, 3)}


@tracing.job
def index(
    archive: str,
    run: str,
    *,
    config: IndexConfig | None = None,
    address: str | None = None,
    progress: Report | None = None,
    dry_run: bool = False,
) -> IndexResult:
    """Write the vectors of a run's model for all slides that do not have them yet.

    Args:
        archive: Archive URI.
        run: The run's folder; on a cluster every node must see it under this path.
        config: Settings.
        address: Engine or Ray cluster; see ``cluster.connect``.
        progress: Called on the driver whenever something finished.
        dry_run: Say what would be done; write nothing, start nothing.

    Raises:
        CheckpointError: If there is no whole model in the run.
        ArchiveError: If the archive is missing, damaged, being written, or was made with another
            encoder (``other_encoder``) or tiling (``other_tiling``) than the model.
    """
    from pathflip.archive.schema import embeddings_table
    from pathflip.checkpoints import load_run

    config = config or IndexConfig()
    started = time.monotonic()
    loaded = load_run(run)
    opened = Archive(archive)
    check_fits(opened, loaded)
    todo, total = _outstanding(opened, loaded)
    if dry_run or (not todo and loaded.name in opened.models() and not _due(opened, loaded.name)):
        return IndexResult(
            model=loaded.name,
            table=embeddings_table(loaded.name),
            slides=len(todo),
            regions=sum(opened.ledger()[slide]["n_regions"] for slide in todo),
            skipped=total - len(todo),
            indexes=[],
            refused={},
            seconds=time.monotonic() - started,
        )
    place = cluster.connect(address)
    with Committer(archive) as committer:
        table = ensure_model(
            committer,
            loaded.name,
            dim=_dim(loaded),
            fingerprint=loaded.fingerprint,
            encoder=loaded.encoder,
            run=loaded.path.name,
        )
        opened = committer.archive
        todo, total = _outstanding(opened, loaded)
        regions, done, waiting, committed_at = 0, 0, [], time.monotonic()

        def report(stage: str) -> None:
            if progress is not None:
                progress(
                    Progress(
                        what=stage,
                        done=done,
                        total=len(todo),
                        seconds=time.monotonic() - started,
                        note=f"{regions:,} regions",
                    )
                )

        with ended(_encoded(todo, committer.uri, loaded, config, place=place)) as tables:
            for rows in tables:
                waiting.append(rows)
                done, regions = done + 1, regions + rows.num_rows - 1
                overdue = time.monotonic() - committed_at > config.commit_s
                if overdue or sum(part.num_rows for part in waiting) >= config.commit_rows:
                    committer.replace_rows(table, pa.concat_tables(waiting))
                    waiting, committed_at = [], time.monotonic()
                report("indexing")
        if waiting:
            committer.replace_rows(table, pa.concat_tables(waiting))
        if done != len(todo):  # cannot happen while every actor returns every row it was given
            raise RuntimeError(f"{len(todo) - done} slides never came back")
        several = None
        if place != "local" and (tasks := config.index_tasks or nodes()) > 1:
            several = segmented(committer.uri, table, tasks=tasks)
        refreshed = refresh_indexes(committer.lock, table, build=several)
        report("done")
    return IndexResult(
        model=loaded.name,
        table=table,
        slides=done,
        regions=regions,
        skipped=total - done,
        indexes=refreshed.made,
        refused=refreshed.refused,
        seconds=time.monotonic() - started,
    )


def _outstanding(archive: Archive, run: Run) -> tuple[list[str], int]:
    """Return the slides to do, sorted, and the number of all slides."""
    slides = archive.ready_ids(run.encoder["name"])
    return sorted(slides - indexed_slides(archive, run.name)), len(slides)


def _due(archive: Archive, model: str) -> bool:
    """Return whether rows of a model are not in its search indexes, or an index is missing."""
    table = archive.model(model)[1]["embeddings_table"]
    return indexes_due(archive.dataset(table), table)


def _dim(run: Run) -> int:
    return int(run.model.config.d)


def _encoded(
    slides: list[str], archive: str, run: Run, config: IndexConfig, *, place: Place
) -> Iterator[pa.Table]:
    """Yield the rows of one slide after the other, made by actors."""
    if not slides:
        return
    there = cluster.available(config.device, place=place)
    workers = config.actors or (there.gpus if there.use_gpu else there.cpus) or 1
    yield from map_actors(
        [{"slide_id": slide} for slide in slides],
        IndexActor,
        (str(run.path), run.fingerprint, archive, there.use_gpu),
        place=place,
        workers=workers,
        actors=config.actors,
        num_gpus=1.0 if there.use_gpu else 0.0,
    )


class IndexActor:
    """Encodes slides with a run's model; one actor of the job.

    Args:
        run: The run's folder.
        fingerprint: Fingerprint of the model the driver found there.
        archive: Archive URI.
        use_gpu: Whether the model is on a GPU.

    Raises:
        CheckpointError: There is no whole model in the run, or another one (``wrong_model``).
    """

    def __init__(self, run: str, fingerprint: str, archive: str, use_gpu: bool) -> None:
        import torch

        from pathflip.checkpoints import load_run

        torch.set_num_threads(1)  # parallel work is Ray's
        self._run = load_run(run, device="cuda" if use_gpu else "cpu")
        if self._run.fingerprint != fingerprint:
            raise wrong_model(run)
        self._archive = Archive(archive)

    def __call__(self, slides: list[dict[str, str]]) -> pa.Table:
        """Return the rows of one slide."""
        (slide,) = slides
        return encode_slide(self._archive, self._run, slide["slide_id"])


def encode_slide(archive: Archive, run: Run, slide: str) -> pa.Table:
    """Return a slide's rows for its model's table: its own and one for every region.

    Raises:
        ArchiveError: If the archive is damaged.
        CheckpointError: If the model gives values that are not finite (``not_finite``).
    """
    import torch

    encoder = run.encoder["name"]
    features, mask, ids = archive.features_array(slide, encoder)
    device = run.model.device
    embedding = run.model.encode_slide(
        torch.tensor(features, dtype=torch.float32, device=device)[None],
        torch.tensor(mask, device=device)[None],
    )
    vectors = np.concatenate(
        [embedding.slide.float().cpu().numpy(), embedding.regions[0].float().cpu().numpy()]
    )
    if not np.isfinite(vectors).all():
        raise CheckpointError(
            f"Model {run.name} gives values that are not finite for slide {slide}.",
            hint="Look at the features of that slide, and at the training's loss.",
            code="not_finite",
        )
    rows = archive.slide_embeddings(slide, encoder).select(list(_COPIED))
    order = {key: at for at, key in enumerate([slide, *ids])}
    if sorted(order) != sorted(rows["id"].to_pylist()):
        raise ArchiveError(
            f"The archive {archive.uri} is damaged: regions and embeddings of slide {slide} "
            "differ.",
            hint=f"Run: pathflip archive repair --archive {archive.uri}",
            code="damaged",
        )
    at = [order[key] for key in rows["id"].to_pylist()]
    return rows.append_column("vector", fixed(vectors[at].astype(np.float32)))


if __name__ == "__main__":
    from pathflip.cli import main

    main(["index", *sys.argv[1:]])
