"""A vector index built on several machines of a Ray cluster.

The driver trains the centroids of the partitions and draws the rotation of the quantizer; tasks on
the nodes put the rows of their fragments into partitions, each a segment of its own; the driver
merges the segments and commits one index. Lance calls a segment's files by a new id each time, so a
task that ran twice leaves files that no version names, which ``archive maintain`` removes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pathflip.archive.indexes import Build, vector_index
from pathflip.archive.storage import open_table

NAME = "vector_idx"  # that Lance gives by itself


def nodes() -> int:
    """Return the number of nodes of the Ray cluster that may run tasks; Ray is connected to."""
    import ray

    found: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    able = [one for one in found if one["Alive"] and one["Resources"].get("CPU", 0) >= 1]
    return max(1, len(able))


def segmented(archive: str, table: str, *, tasks: int) -> Build:
    """Return what builds the vector index of a table by tasks on a Ray cluster.

    Args:
        archive: Archive URI, which every node must see.
        table: Its table of embeddings.
        tasks: Tasks at most; there are no more than fragments.
    """

    def build(dataset: Any, rows: int) -> None:
        import ray
        from lance.indices import IndicesBuilder
        from lance.lance import indices as native

        kind = vector_index(dataset, rows)
        width = dataset.schema.field("vector").type.list_size
        partitions = kind["num_partitions"]
        trained = IndicesBuilder(dataset, "vector").train_ivf(
            num_partitions=partitions,
            distance_type=kind["metric"],
            sample_rate=min(256, rows // partitions),  # Lance's own is 256
        )
        shared: dict[str, Any] = {"ivf_centroids": trained.centroids}
        if "num_bits" in kind:  # one rotation: segments of several cannot be merged
            shared["rabitq_model"] = native.build_rq_model(width, num_bits=kind["num_bits"])
        held = ray.put(shared)
        task = ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(_segment)
        sizes = {part.fragment_id: part.count_rows() for part in dataset.get_fragments()}
        segments = ray.get(
            [
                task.remote(archive, table, dataset.version, group, kind, held)
                for group in shares(sizes, tasks)
            ]
        )
        if len(segments) > 1:
            segments = [dataset.merge_existing_index_segments(segments)]
        dataset.commit_existing_index_segments(NAME, "vector", segments)

    return build


def shares(sizes: dict[int, int], parts: int) -> list[list[int]]:
    """Return fragments in groups of about equally many rows, none of them empty.

    Args:
        sizes: Rows of each fragment, by its id.
        parts: Groups at most.
    """
    groups: list[list[int]] = [[] for _ in range(max(1, min(parts, len(sizes))))]
    rows = [0] * len(groups)
    for fragment in sorted(sizes, key=lambda one: (-sizes[one], one)):
        least = rows.index(min(rows))
        groups[least].append(fragment)
        rows[least] += sizes[fragment]
    return [sorted(group) for group in groups if group]


def _segment(
    archive: str,
    table: str,
    version: int,
    fragments: Sequence[int],
    kind: dict[str, Any],
    shared: dict[str, Any],
) -> Any:
    """Build the segment of some fragments, uncommitted."""
    dataset = open_table(archive, table).checkout_version(version)
    return dataset.create_index_uncommitted(
        "vector", name=NAME, replace=True, fragment_ids=list(fragments), **kind, **shared
    )
