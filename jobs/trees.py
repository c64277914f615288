"""Trees: patch trees of MR-PLIP for the slides of an archive, their nodes read and embedded.

Roots are chosen from the tissue masks that the archive holds; slides are opened to read nodes only.
Slides are spread over Ray Data actors (:mod:`jobs.tree_actor`); the driver commits what they return
in batches, features first and the table ``trees`` last. A tree is there when it has its rows in
both, so the same command again does what is missing: new slides, more roots of a slide, a further
encoder on the roots there are, or what a killed run did not get to.

    python -m jobs.trees --archive URI       (the same as: pathflip trees …)
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from jobs.ray_data import available, from_ipc, map_actors, spread
from jobs.tree_actor import SlideOutcome, SlideTask, TreeActor, wanted_nodes
from pathflip.archive import READY, Archive, vectors
from pathflip.archive.commit import Committer
from pathflip.archive.storage import guarded, is_local
from pathflip.archive.trees import (
    TREES,
    append_trees,
    delete_strays,
    ensure_tree_encoder,
    ensure_trees,
    read_trees,
    tree_encoders,
    tree_settings,
)
from pathflip.config import check_positive
from pathflip.encoders import EncoderInfo, encoder_info
from pathflip.encoders.mrplip import is_patch_model
from pathflip.errors import ConfigError
from pathflip.geometry import TREE_NODES, TreeSpec, choose_parents, tree_levels, tree_tissue
from pathflip.progress import Progress, Report
from pathflip.slides.tissue import TissueMask

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
        trees: Trees that got rows: new ones, and stored ones that got a further encoder.
        nodes: Their nodes with features.
        levels: {levels: trees}; 4 levels are 85 nodes, 3 are 21.
        slides: {"done", "skipped": complete before, "none": without a root of enough tissue or too
            coarse, "failed"}: numbers of slides.
        dropped: {reason: trees} that were left out for damage.
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
    dropped: dict[str, int]
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
        """0 all good, 3 some slides or trees were left out."""
        return 3 if self.slides["failed"] or self.dropped else 0


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """Sizes of the trees and the choice of their roots."""

    spec: TreeSpec
    seed: int
    per_slide: int
    min_tissue: float

    @classmethod
    def of(cls, config: TreesConfig, made: Mapping[str, Any] | None) -> _Choice:
        """Return the settings of a run, completed by those the archive was made with."""
        given = asdict(config)
        defaults = {"parent_um": 1024.0, "node_px": 512, "seed": 0, "per_slide": 20}
        known: dict[str, Any] = defaults | {"min_tissue": 0.5} | dict(made or {})
        known |= {name: given[name] for name in known if given.get(name) is not None}
        spec = TreeSpec(parent_um=float(known.pop("parent_um")), node_px=known.pop("node_px"))
        return cls(spec=spec, **known)


@dataclass(kw_only=True)
class _Plan:
    """Slides and trees that are still to be done.

    Attributes:
        tasks: Slides with trees to be made or extended.
        trees: Trees of each task.
        nodes: Their nodes; counted for a dry run only.
        skipped: Slides that are complete.
        none: Slides without a root.
        levels: {levels: trees}.
    """

    tasks: list[SlideTask] = field(default_factory=list)
    trees: list[int] = field(default_factory=list)
    nodes: int = 0
    skipped: int = 0
    none: int = 0
    levels: Counter[str] = field(default_factory=Counter)


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
        address: Ray cluster; see ``cluster.connect``.
        progress: Called on the driver whenever a slide is finished.
        dry_run: Say what would be done, with bytes and hours; write nothing, start no Ray.

    Raises:
        ConfigError: More trees a slide are asked for without all the encoders that the trees there
            have (``encoders``).
        ArchiveError: If the archive is missing, damaged, being written, or its trees were cut or
            chosen otherwise (``settings``).
        EncoderError: If an encoder cannot be loaded.
    """
    from jobs.cluster import connect

    config = config or TreesConfig()
    started = time.monotonic()
    opened = Archive(archive)
    infos = {spec: encoder_info(spec) for spec in _specs(opened, config)}
    names = list(dict.fromkeys(info.name for info in infos.values()))
    choice = _Choice.of(config, tree_settings(opened))
    plan = _plan(opened, choice, names, count_nodes=dry_run)
    if dry_run:
        return _estimate(opened, plan, choice, config, infos, started=started)
    if not plan.tasks and TREES in opened.tables():
        return _result(plan, [], names, started=started)
    private = connect(address)
    with Committer(archive) as committer:
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
        plan = _plan(committer.archive, choice, names)
        outcomes = _run(
            committer, plan, choice, config, infos,
            private=private, progress=progress, started=started,
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


# -- what there is to do -------------------------------------------------------------------------


def _plan(
    archive: Archive, choice: _Choice, names: Sequence[str], *, count_nodes: bool = False
) -> _Plan:
    """Choose the roots of all ready slides and compare them with what is there.

    Raises:
        ConfigError: See :func:`trees`.
    """
    roots: dict[str, set[tuple[int, int]]] = {}
    for row in _roots(archive):
        roots.setdefault(row["slide_id"], set()).add((row["tx"], row["ty"]))
    have = {
        name: Counter(
            read_trees(archive, columns=["slide_id"], encoder=name)["slide_id"].to_pylist()
        )
        for name in tree_encoders(archive)
    }
    made = tree_settings(archive)
    more = made is not None and choice.per_slide > made["per_slide"]
    plan, left_out = _Plan(), set[str]()

    def choose(row: dict[str, Any]) -> tuple[dict[str, Any], list[list[int]], int]:
        return row, *_chosen(row, choice, roots.get(row["slide_id"], set()), count_nodes)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for rows in _ready_slides(archive):
            for row, new, nodes in pool.map(choose, rows):
                slide, count = row["slide_id"], len(roots.get(row["slide_id"], ()))
                held = {name for name, counts in have.items() if counts[slide]}
                # All trees of a slide have the same encoders, so new ones need all of them.
                if new and held - set(names):
                    left_out |= held - set(names) if more else set()
                    new, nodes = [], 0
                lacking = [n for n in names if count and have.get(n, Counter())[slide] < count]
                if not new and not lacking:
                    plan.skipped += bool(count)
                    plan.none += not count
                    continue
                plan.tasks.append(SlideTask(slide_id=slide, new=new, lacking=lacking))
                plan.trees.append(len(new) + (count if lacking else 0))
                plan.nodes += nodes
                plan.levels[str(tree_levels(row["mpp"], spec=choice.spec))] += plan.trees[-1]
    if left_out:
        raise ConfigError(
            f"The trees of {archive.uri} have features of {', '.join(sorted(left_out))} too, so "
            "more trees of the same slides need them as well.",
            hint=f"Give --encoder {','.join(dict.fromkeys([*names, *sorted(left_out)]))}.",
            code="encoders",
        )
    if count_nodes and any(task.lacking for task in plan.tasks):
        plan.nodes += _stored_nodes(archive, [task for task in plan.tasks if task.lacking])
    return plan


def _roots(archive: Archive) -> list[dict[str, Any]]:
    """Return the place of every stored tree."""
    rows: list[dict[str, Any]] = read_trees(archive, columns=["slide_id", "tx", "ty"]).to_pylist()
    return rows


def _ready_slides(archive: Archive) -> Iterator[list[dict[str, Any]]]:
    """Yield the ready slides, some at once as their tissue masks are large."""
    columns = ["slide_id", "width", "height", "mpp", "tissue_png", "tissue_mpp"]
    with guarded(archive.uri, "read the table slides", damaged=is_local(archive.uri)):
        batches = archive.dataset("slides").to_batches(
            columns=columns, filter=pc.field("status") == READY, batch_size=64
        )
        for batch in batches:
            yield batch.to_pylist()


def _chosen(
    row: Mapping[str, Any], choice: _Choice, stored: set[tuple[int, int]], count_nodes: bool
) -> tuple[list[list[int]], int]:
    """Return the roots of a slide that have no tree yet, and the nodes that would be read."""
    levels = tree_levels(row["mpp"], spec=choice.spec) if row["mpp"] else 0
    if not levels or not row["tissue_png"] or len(stored) >= choice.per_slide:
        return [], 0
    mask = TissueMask.from_png(row["tissue_png"], mpp=row["tissue_mpp"], slide_mpp=row["mpp"])
    chosen = choose_parents(
        mask,
        width=row["width"],
        height=row["height"],
        mpp=row["mpp"],
        spec=choice.spec,
        count=choice.per_slide,
        seed=choice.seed,
        slide_id=row["slide_id"],
        min_tissue=choice.min_tissue,
    )
    new = [[tx, ty] for tx, ty in chosen.tolist() if (tx, ty) not in stored]
    nodes = 0
    for tx, ty in new if count_nodes else ():
        tissue = tree_tissue(mask, tx=tx, ty=ty, mpp=row["mpp"], spec=choice.spec)
        nodes += int(wanted_nodes(tissue[None], levels=levels).sum())
    return new, nodes


def _stored_nodes(archive: Archive, tasks: Sequence[SlideTask]) -> int:
    rows = read_trees(archive, columns=["slide_id", "node_mask"])
    slides = pa.array([task.slide_id for task in tasks], pa.string())
    masks = rows.filter(pc.is_in(rows["slide_id"], slides))["node_mask"]
    return int((vectors(masks) != 0).sum())


# -- doing it ------------------------------------------------------------------------------------


def _run(
    committer: Committer,
    plan: _Plan,
    choice: _Choice,
    config: TreesConfig,
    infos: Mapping[str, EncoderInfo],
    *,
    private: bool,
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

    for table in _actors(committer.uri, plan, choice, config, infos, private=private):
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
                    note=f"{nodes:,} nodes" + (f" · {failed} slides left out" if failed else ""),
                )
            )
    commit()
    if len(outcomes) != len(plan.tasks):  # cannot happen while every actor returns every row
        raise RuntimeError(f"{len(plan.tasks) - len(outcomes)} slides never came back")
    return outcomes


def _actors(
    archive: str,
    plan: _Plan,
    choice: _Choice,
    config: TreesConfig,
    infos: Mapping[str, EncoderInfo],
    *,
    private: bool,
) -> Iterator[pa.Table]:
    """Yield the rows of one slide after the other, made by actors on Ray Data."""
    if not plan.tasks:
        return
    there = available(config.device, private=private)
    # The texture encoder has no use for a GPU.
    use_gpu = there.use_gpu and any(info.name != "texture" for info in infos.values())
    workers = config.actors or (there.gpus if use_gpu else there.cpus) or 1
    readers = config.readers or (GPU_READERS if use_gpu else 1)
    blocks, pool = spread(len(plan.tasks), workers=workers, actors=config.actors, private=private)
    yield from map_actors(
        [{"task": task.to_json()} for task in plan.tasks],
        TreeActor,
        _actor_arguments(archive, choice, config, infos, readers=readers),
        at_once=1,
        blocks=blocks,
        pool=pool,
        num_cpus=float(readers) if use_gpu else 1.0,
        num_gpus=1.0 if use_gpu else 0.0,
    )


def _actor_arguments(
    archive: str,
    choice: _Choice,
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
    plan: _Plan, outcomes: Sequence[SlideOutcome], names: list[str], *, started: float
) -> TreesResult:
    levels, dropped = Counter[str](), Counter[str]()
    for one in outcomes:
        levels.update(one.levels)
        dropped.update(one.dropped)
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
        dropped=dict(dropped),
        problems=failed,
        encoders=names,
        seconds=time.monotonic() - started,
    )


# -- dry run -------------------------------------------------------------------------------------


def _estimate(
    archive: Archive,
    plan: _Plan,
    choice: _Choice,
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
    workers = config.actors or len(os.sched_getaffinity(0))
    return TreesResult(
        trees=sum(plan.trees),
        nodes=plan.nodes,
        levels=dict(sorted(plan.levels.items())),
        slides={
            "done": len(plan.tasks), "skipped": plan.skipped, "none": plan.none,
            "failed": len(problems),
        },
        dropped={},
        problems=problems,
        encoders=list(dims),
        seconds=time.monotonic() - started,
        archive_bytes=added,
        estimated_hours=round(plan.nodes * node_s / workers / 3600, 4),
    )  # fmt: skip


def _time_a_node(
    archive: Archive,
    plan: _Plan,
    choice: _Choice,
    config: TreesConfig,
    infos: Mapping[str, EncoderInfo],
) -> tuple[float, dict[str, str]]:
    """Return the seconds to read and embed one node, measured on the first slide that opens."""
    problems: dict[str, str] = {}
    if not plan.tasks:
        return 0.0, problems
    first = {row["slide_id"]: [row["tx"], row["ty"]] for row in _roots(archive)}
    tasks = [
        SlideTask(slide_id=task.slide_id, new=task.new[:1] or [first[task.slide_id]], lacking=[])
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
