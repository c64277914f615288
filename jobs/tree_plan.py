"""Plan of ``pathflip trees``: the roots of slides, compared with the trees there are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from jobs.tree_actor import SlideTask, wanted_nodes
from pathflip.archive import Archive, vectors
from pathflip.archive.trees import TREES, read_trees, tree_encoders, tree_settings
from pathflip.cpus import cpus_here
from pathflip.errors import ConfigError
from pathflip.geometry import TreeSpec, choose_parents, tree_levels, tree_tissue
from pathflip.slides.tissue import TissueMask


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Sizes of the trees and the choice of their roots."""

    spec: TreeSpec
    seed: int
    per_slide: int
    min_tissue: float

    @classmethod
    def of(cls, given: Mapping[str, Any], made: Mapping[str, Any] | None) -> Choice:
        """Return the settings given for a run, completed by those the archive was made with."""
        defaults = {"parent_um": 1024.0, "node_px": 512, "seed": 0, "per_slide": 20}
        known: dict[str, Any] = defaults | {"min_tissue": 0.5} | dict(made or {})
        known |= {name: given[name] for name in known if given.get(name) is not None}
        spec = TreeSpec(parent_um=float(known.pop("parent_um")), node_px=known.pop("node_px"))
        return cls(spec=spec, **known)


@dataclass(kw_only=True)
class Plan:
    """Slides and trees that are still to be done.

    Attributes:
        tasks: Slides with trees to be made or extended.
        trees: Trees of each task.
        nodes: Their nodes; counted for a dry run only.
        skipped: Slides that are complete.
        none: Slides without a root.
        levels: {levels: trees}.
        quarantined: {reason: trees} that are there and are not read again.
    """

    tasks: list[SlideTask] = field(default_factory=list)
    trees: list[int] = field(default_factory=list)
    nodes: int = 0
    skipped: int = 0
    none: int = 0
    levels: Counter[str] = field(default_factory=Counter)
    quarantined: Counter[str] = field(default_factory=Counter)


def plan_versions(archive: Archive) -> dict[str, int]:
    """Return the versions of the tables that a plan is made from."""
    read = ["slides", TREES, *(entry["table"] for entry in tree_encoders(archive).values())]
    return {table: archive.dataset(table).version for table in read if table in archive.tables()}


def make_plan(
    archive: Archive,
    choice: Choice,
    names: Sequence[str],
    *,
    retry: bool,
    count_nodes: bool = False,
) -> Plan:
    """Choose the roots of all ready slides and compare them with what is there.

    Raises:
        ConfigError: More trees a slide, or quarantined ones, are asked for without all the encoders
            that the trees there have (``encoders``).
    """
    good, bad = roots_by_slide(archive), roots_by_slide(archive, quarantined=True)
    have = {
        name: Counter(
            read_trees(archive, columns=["slide_id"], encoder=name)["slide_id"].to_pylist()
        )
        for name in tree_encoders(archive)
    }
    made = tree_settings(archive)
    more = made is not None and choice.per_slide > made["per_slide"]
    plan, left_out = Plan(), set[str]()
    if not retry:
        plan.quarantined.update(str(fault) for own in bad.values() for fault in own.values())

    def choose(row: dict[str, Any]) -> tuple[dict[str, Any], list[list[int]], int]:
        own, faulty = (roots.get(row["slide_id"], {}) for roots in (good, bad))
        return row, *_chosen(row, choice, {**own, **faulty}, faulty if retry else {}, count_nodes)

    with ThreadPoolExecutor(cpus_here()) as pool:
        for rows in _ready_slides(archive):
            for row, new, nodes in pool.map(choose, rows):
                slide, count = row["slide_id"], len(good.get(row["slide_id"], ()))
                held = {name for name, counts in have.items() if counts[slide]}
                # All trees of a slide have the same encoders, so new ones need all of them.
                if new and held - set(names):
                    left_out |= held - set(names) if more or retry else set()
                    new, nodes = [], 0
                lacking = [n for n in names if count and have.get(n, Counter())[slide] < count]
                if not new and not lacking:
                    there = slide in good or slide in bad
                    plan.skipped += there
                    plan.none += not there
                    continue
                plan.tasks.append(SlideTask(slide_id=slide, new=new, lacking=lacking))
                plan.trees.append(len(new) + (count if lacking else 0))
                plan.nodes += nodes
                plan.levels[str(tree_levels(row["mpp"], spec=choice.spec))] += plan.trees[-1]
    if left_out:
        raise ConfigError(
            f"The trees of {archive.uri} have features of {', '.join(sorted(left_out))} too, so "
            "further trees of the same slides need them as well.",
            hint=f"Give --encoder {','.join(dict.fromkeys([*names, *sorted(left_out)]))}.",
            code="encoders",
        )
    if count_nodes and any(task.lacking for task in plan.tasks):
        plan.nodes += _stored_nodes(archive, [task for task in plan.tasks if task.lacking])
    return plan


def roots_by_slide(
    archive: Archive, *, quarantined: bool = False
) -> dict[str, dict[tuple[int, int], str | None]]:
    """Return {slide: {(tx, ty): fault}} of good or quarantined trees."""
    found: dict[str, dict[tuple[int, int], str | None]] = {}
    columns = ["slide_id", "tx", "ty", "fault"]
    for row in read_trees(archive, columns=columns, quarantined=quarantined).to_pylist():
        found.setdefault(row["slide_id"], {})[row["tx"], row["ty"]] = row["fault"]
    return found


def _ready_slides(archive: Archive) -> Iterator[list[dict[str, Any]]]:
    """Yield the ready slides, some at once as their tissue masks are large."""
    columns = ["slide_id", "width", "height", "mpp", "tissue_png", "tissue_mpp"]
    ready = sorted(archive.ready_ids())
    for start in range(0, len(ready), 64):
        ids = ready[start : start + 64]
        yield archive.slides(columns=columns, slide_ids=ids).to_pylist()


def _chosen(
    row: Mapping[str, Any],
    choice: Choice,
    stored: Collection[tuple[int, int]],
    again: Collection[tuple[int, int]],
    count_nodes: bool,
) -> tuple[list[list[int]], int]:
    """Return the roots of a slide to read, and their nodes if they are to be counted.

    Args:
        row: The slide.
        choice: Settings of the choice.
        stored: Roots that have a tree.
        again: Those of them to read again.
        count_nodes: Whether nodes are counted.
    """
    levels = tree_levels(row["mpp"], spec=choice.spec) if row["mpp"] else 0
    full = len(stored) >= choice.per_slide
    if not levels or not row["tissue_png"] or (full and not again):
        return [], 0
    mask = TissueMask.from_png(row["tissue_png"], mpp=row["tissue_mpp"], slide_mpp=row["mpp"])
    new = [list(root) for root in sorted(again)]
    if not full:
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
        new += [[tx, ty] for tx, ty in chosen.tolist() if (tx, ty) not in stored]
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
