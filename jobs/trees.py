"""Trees: patch trees of MR-PLIP for the slides of an archive, their nodes read and embedded.

Roots are chosen from the tissue masks that the archive holds; slides are opened to read nodes only.
Slides are spread over Ray Data actors (:mod:`jobs.tree_actor`); the driver commits what they return
in batches, features first and the table ``trees`` last. A tree is there when it has its rows in
both, so the same command again does what is missing: new slides, more roots of a slide, a further
encoder on the roots there are, or what a killed run did not get to. A tree too damaged to be used
is quarantined in ``trees`` with its reason, and read again only with ``retry``.

    python -m jobs.trees --archive URI       (the same as: pathflip trees …)
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pyarrow as pa

from jobs import cluster
from jobs.cluster import Place
from jobs.stages import ended, map_actors
from jobs.tree_actor import SlideOutcome, SlideTask, TreeActor
from jobs.tree_plan import Choice, Plan, make_plan, plan_versions, roots_by_slide
from jobs.worker import from_ipc
from pathflip import tracing
from pathflip.archive import Archive
from pathflip.archive.commit import Committer
from pathflip.archive.trees import (
    TREES,
    append_trees,
    delete_strays,
    ensure_tree_encoder,
    ensure_trees,
    tree_encoders,
    tree_settings,
)
from pathflip.config import check_positive
from pathflip.cpus import cpus_here
from pathflip.encoders import EncoderInfo, encoder_info
from pathflip.encoders.mrplip import is_patch_model
from pathflip.errors import ConfigError
from pathflip.geometry import TREE_NODES
from pathflip.progress import Progress, Report

GPU_READERS = 4  # reading overlaps encoding where the CPU is free meanwhile
BYTES_OF_A_TREE = 1000  # estimate of a row of ``trees``
BYTES_OF_A_COMMIT = 256 << 20  # what waits for a commit is in memory


@dataclass(frozen=True, kw_only=True)
class TreesConfig:
    """Settings of the job. Those left out are the archive's, once it has trees.

    Raises:
        ConfigError: A number is out of its range.
    """

    encoder: str | None = None
    """Patch encoder, or several separated by commas: they share one pass over the pixels. By
    default those the trees have, before the first trees those of the archive."""
    per_slide: int | None = None
    """Trees of a slide at most, 20 by default. More later keeps those there are."""
    seed: int | None = None
    """Seed of the choice of roots, 0 by default."""
    min_tissue: float | None = None
    """Share of a root that is tissue, at least; 0.5 by default."""
    parent_um: float | None = None
    """Side of a root, µm; 1024 by default."""
    node_px: int | None = None
    """Side of a node as it is read, px; 512 by default."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto means a GPU where the cluster has one."""
    actors: int | None = None
    """Actors at most; None means one per CPU, or per GPU where an encoder uses one."""
    readers: int | None = None
    """Reader processes per actor; None means 1 on CPU, 4 on GPU (reading overlaps encoding)."""
    attempts: int = 3
    """Times a reader may die or hang on a slide before the slide is left out."""
    read_timeout_s: float = 60.0
    """Deadline for reading 64 nodes."""
    commit_s: float = 30.0
    """Finished slides are committed at least this often."""
    retry: bool = False
    """Try quarantined trees again even though nothing about their slides changed."""

    def __post_init__(self) -> None:
        check_positive(
            self, "per_slide", "parent_um", "node_px", "actors", "readers", "attempts",
            "read_timeout_s",
        )  # fmt: skip
        if self.min_tissue is not None and not 0 <= self.min_tissue <= 1:
            raise ConfigError(
                f"min_tissue is {self.min_tissue}.", hint="Give a share between 0 and 1."
            )


@dataclass(frozen=True, kw_only=True)
class TreesResult:
    """Result of the job, or with ``dry_run`` what it would be.

    Attributes:
        trees: Good trees that got rows: new ones, and stored ones that got a further encoder.
        nodes: Their nodes with features.
        levels: {levels: trees}; 4 levels are 85 nodes, 3 are 21.
        slides: {"done", "skipped": complete before, "none": without a root of enough tissue or too
            coarse, "failed"}: numbers of slides.
        quarantined: {reason: trees} that this run found too damaged to be used.
        quarantined_before: {reason: trees} of earlier runs, which this one did not read.
        problems: {slide: "reason: message"} of slides that were left out.
        encoders: Names of the encoders.
        seconds: Wall time.
        archive_bytes: Bytes added to the archive, about; of a dry run only.
        estimated_hours: Time it would take on the CPUs of this machine; of a dry run only.
    """

    trees: int
    nodes: int
    levels: dict[str, int]
    slides: dict[str, int]
    quarantined: dict[str, int]
    quarantined_before: dict[str, int]
    problems: dict[str, str]
    encoders: list[str]
    seconds: float
    archive_bytes: int | None = None
    estimated_hours: float | None = None

    def as_json(self) -> dict[str, Any]:
        """The document ``pathflip trees --json`` prints."""
        document = asdict(self) | {"seconds": round(self.seconds, 3)}
        for name in ("archive_bytes", "estimated_hours"):
            if document[name] is None:
                del document[name]
        return document

    @property
    def exit_code(self) -> int:
        """0 all good, 3 some slides were left out or trees quarantined in this run."""
        return 3 if self.slides["failed"] or self.quarantined else 0


@tracing.job
def trees(
    archive: str,
    config: TreesConfig | None = None,
    *,
    address: str | None = None,
    progress: Report | None = None,
    dry_run: bool = False,
) -> TreesResult:
    """Make the patch trees that an archive's slides do not have yet.

    Args:
        archive: Archive URI.
        config: Settings.
        address: Engine or Ray cluster; see ``cluster.connect``.
        progress: Called on the driver whenever a slide is finished.
        dry_run: Say what would be done, with bytes and hours; write nothing, start no Ray.

    Raises:
        ConfigError: More trees a slide, or quarantined ones, are asked for without all the encoders
            that the trees there have (``encoders``).
        ArchiveError: If the archive is missing, damaged, being written, or its trees were cut or
            chosen otherwise (``settings``).
        EncoderError: If an encoder cannot be loaded.
    """
    config = config or TreesConfig()
    started = time.monotonic()
    opened = Archive(archive)
    infos = {spec: encoder_info(spec) for spec in _specs(opened, config)}
    names = list(dict.fromkeys(info.name for info in infos.values()))
    choice = Choice.of(asdict(config), tree_settings(opened))
    plan = make_plan(opened, choice, names, retry=config.retry, count_nodes=dry_run)
    if dry_run:
        return _estimate(opened, plan, choice, config, infos, started=started)
    if not plan.tasks and TREES in opened.tables():
        return _result(plan, [], names, started=started)
    place = cluster.connect(address)
    with Committer(archive) as committer:
        if plan_versions(committer.archive) != plan_versions(opened):  # another job was faster
            plan = make_plan(committer.archive, choice, names, retry=config.retry)
        ensure_trees(
            committer,
            choice.spec,
            seed=choice.seed,
            per_slide=choice.per_slide,
            min_tissue=choice.min_tissue,
        )
        for info in infos.values():
            ensure_tree_encoder(
                committer,
                info.name,
                dim=info.dim,
                revision=info.revision,
                mpp=info.mpp,
                licence=info.licence,
            )
        delete_strays(committer)
        outcomes = _run(
            committer, plan, choice, config, infos,
            place=place, progress=progress, started=started,
        )  # fmt: skip
    return _result(plan, outcomes, names, started=started)


def _specs(archive: Archive, config: TreesConfig) -> list[str]:
    """Return the specs of the encoders."""
    if config.encoder is None:
        plain = [name for name in archive.encoders() if not is_patch_model(name)]
        return list(tree_encoders(archive)) or plain or ["texture"]
    found = [spec.strip() for spec in config.encoder.split(",") if spec.strip()]
    if not found:
        raise ConfigError("No encoder was named.", hint="Leave --encoder out.")
    if any(is_patch_model(spec) for spec in found):
        raise ConfigError(
            "Patch models encode patches of one level; a tree has nodes of four.",
            hint="Name the encoder under the model.",
        )
    return found


# -- doing it ------------------------------------------------------------------------------------


def _run(
    committer: Committer,
    plan: Plan,
    choice: Choice,
    config: TreesConfig,
    infos: Mapping[str, EncoderInfo],
    *,
    place: Place,
    progress: Report | None,
    started: float,
) -> list[SlideOutcome]:
    """Give the tasks to actors and commit what they return."""
    total = sum(plan.trees)
    size = {task.slide_id: count for task, count in zip(plan.tasks, plan.trees, strict=True)}
    outcomes: list[SlideOutcome] = []
    waiting: dict[str, list[pa.Table]] = {}
    done, nodes, failed, held = 0, 0, 0, 0
    committed_at = time.monotonic()

    def commit() -> None:
        nonlocal committed_at, held
        parts = {table: pa.concat_tables(rows) for table, rows in waiting.items()}
        if parts:
            empty = committer.archive.dataset(TREES).schema.empty_table().drop_columns(["checksum"])
            append_trees(committer, parts.pop(TREES, empty), parts)
        waiting.clear()
        committed_at, held = time.monotonic(), 0

    with ended(_actors(committer.uri, plan, choice, config, infos, place=place)) as tables:
        for table in tables:
            outcome = SlideOutcome(**json.loads(table.schema.metadata[b"outcome"]))
            outcomes.append(outcome)
            for row in table.to_pylist():
                part = from_ipc(row["rows"])
                waiting.setdefault(row["table"], []).append(part)
                held += part.nbytes
            if time.monotonic() - committed_at > config.commit_s or held > BYTES_OF_A_COMMIT:
                commit()
            done += size[outcome.slide_id]
            nodes, failed = nodes + outcome.nodes, failed + bool(outcome.reason)
            if progress is not None:
                progress(
                    Progress(
                        what="reading",
                        done=done,
                        total=total,
                        seconds=time.monotonic() - started,
                        unit="trees",
                        note=f"{nodes:,} nodes"
                        + (f" · {failed} slides left out" if failed else ""),
                    )
                )
    commit()
    if len(outcomes) != len(plan.tasks):  # cannot happen while every actor returns every row
        raise RuntimeError(f"{len(plan.tasks) - len(outcomes)} slides never came back")
    return outcomes


def _actors(
    archive: str,
    plan: Plan,
    choice: Choice,
    config: TreesConfig,
    infos: Mapping[str, EncoderInfo],
    *,
    place: Place,
) -> Iterator[pa.Table]:
    """Yield the rows of one slide after the other, made by actors."""
    if not plan.tasks:
        return
    there = cluster.available(config.device, place=place)
    # The texture encoder has no use for a GPU.
    use_gpu = there.use_gpu and any(info.name != "texture" for info in infos.values())
    workers = config.actors or (there.gpus if use_gpu else there.cpus) or 1
    readers = config.readers or (GPU_READERS if use_gpu else 1)
    yield from map_actors(
        [{"task": task.to_json()} for task in plan.tasks],
        TreeActor,
        _actor_arguments(archive, choice, config, infos, readers=readers),
        place=place,
        workers=workers,
        actors=config.actors,
        num_cpus=float(readers) if use_gpu else 1.0,
        num_gpus=1.0 if use_gpu else 0.0,
    )


def _actor_arguments(
    archive: str,
    choice: Choice,
    config: TreesConfig,
    infos: Mapping[str, EncoderInfo],
    *,
    readers: int,
) -> tuple[Any, ...]:
    encoders = [(spec, info.revision) for spec, info in infos.items()]
    return (
        archive, choice.spec, encoders, config.device, readers, config.attempts,
        config.read_timeout_s,
    )  # fmt: skip


def _result(
    plan: Plan, outcomes: Sequence[SlideOutcome], names: list[str], *, started: float
) -> TreesResult:
    levels, quarantined = Counter[str](), Counter[str]()
    for one in outcomes:
        levels.update(one.levels)
        quarantined.update(one.quarantined)
    failed = {one.slide_id: f"{one.reason}: {one.message}" for one in outcomes if one.reason}
    return TreesResult(
        trees=sum(one.trees for one in outcomes),
        nodes=sum(one.nodes for one in outcomes),
        levels=dict(levels),
        slides={
            "done": len(outcomes) - len(failed),
            "skipped": plan.skipped,
            "none": plan.none,
            "failed": len(failed),
        },
        quarantined=dict(quarantined),
        quarantined_before=dict(plan.quarantined),
        problems=failed,
        encoders=names,
        seconds=time.monotonic() - started,
    )


# -- dry run -------------------------------------------------------------------------------------


def _estimate(
    archive: Archive,
    plan: Plan,
    choice: Choice,
    config: TreesConfig,
    infos: Mapping[str, EncoderInfo],
    *,
    started: float,
) -> TreesResult:
    """Return what the job would do; times one tree, read and embedded in this process."""
    dims = {info.name: info.dim for info in infos.values()}
    added = 0
    for task, count in zip(plan.tasks, plan.trees, strict=True):
        new, stored = len(task.new), count - len(task.new)
        added += new * (BYTES_OF_A_TREE + 2 * TREE_NODES * sum(dims.values()))
        added += stored * 2 * TREE_NODES * sum(dims[name] for name in task.lacking)
    node_s, problems = _time_a_node(archive, plan, choice, config, infos)
    workers = config.actors or cpus_here()
    return TreesResult(
        trees=sum(plan.trees),
        nodes=plan.nodes,
        levels=dict(sorted(plan.levels.items())),
        slides={
            "done": len(plan.tasks), "skipped": plan.skipped, "none": plan.none,
            "failed": len(problems),
        },
        quarantined={},
        quarantined_before=dict(plan.quarantined),
        problems=problems,
        encoders=list(dims),
        seconds=time.monotonic() - started,
        archive_bytes=added,
        estimated_hours=round(plan.nodes * node_s / workers / 3600, 4),
    )  # fmt: skip


def _time_a_node(
    archive: Archive,
    plan: Plan,
    choice: Choice,
    config: TreesConfig,
    infos: Mapping[str, EncoderInfo],
) -> tuple[float, dict[str, str]]:
    """Return the seconds to read and embed one node, measured on the first slide that opens."""
    problems: dict[str, str] = {}
    if not plan.tasks:
        return 0.0, problems
    stored = roots_by_slide(archive)
    tasks = [
        SlideTask(
            slide_id=task.slide_id,
            new=task.new[:1] or [list(min(stored[task.slide_id]))],
            lacking=[],
        )
        for task in plan.tasks[:3]
    ]
    actor = TreeActor(*_actor_arguments(archive.uri, choice, config, infos, readers=1))
    try:
        for task in tasks:
            times, outcome = [], SlideOutcome(slide_id=task.slide_id)
            for _ in range(2):  # the first one warms up
                begun = time.perf_counter()
                table = actor([{"task": task.to_json()}])
                times.append(time.perf_counter() - begun)
                outcome = SlideOutcome(**json.loads(table.schema.metadata[b"outcome"]))
            if outcome.nodes:
                return min(times) / outcome.nodes, problems
            if outcome.reason:
                problems[task.slide_id] = f"{outcome.reason}: {outcome.message}"
    finally:
        actor.close()
    return 0.0, problems


if __name__ == "__main__":
    from pathflip.cli import main

    main(["trees", *sys.argv[1:]])
