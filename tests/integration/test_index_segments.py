"""A vector index that two nodes of a Ray cluster build together, beside that of one process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pytest

from jobs.index_segments import shares
from pathflip.archive import Archive, indexes, schema
from pathflip.archive.commit import Committer
from pathflip.archive.recall import index_recall
from tests import faults
from tests.unit.archive import cohort, models

DIM, PER_SLIDE, SLIDES, MORE = 16, 400, 8, 3
TABLE = "embeddings_m"

NODES = """
import json, sys
import ray
from ray.cluster_utils import Cluster
from jobs import index_segments
from pathflip.archive import indexes
from pathflip.archive.lock import ArchiveLock

archive, table = sys.argv[1:]
store = {"object_store_memory": 80 << 20}
cluster = Cluster(initialize_head=True,
                  head_node_args={"num_cpus": 0, "include_dashboard": False, **store})
for _ in range(2):
    cluster.add_node(num_cpus=1, **store)
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
indexes.VECTOR_INDEX_ROWS = 1000
build = index_segments.segmented(archive, table, tasks=index_segments.nodes())
done = indexes.refresh_indexes(ArchiveLock(archive), table, build=build)
print(json.dumps({"nodes": index_segments.nodes(), "made": done.made}), flush=True)
sys.stdin.read()  # whoever started this ends it, and all below it
"""


def rows_of(n: int) -> pa.Table:
    rng = np.random.default_rng((5, n))
    centres = np.random.default_rng(2).standard_normal((20, DIM))
    own = cohort.embedding_rows(n).to_pylist()[-1]
    rows = [own | {"vector": centres.mean(0).astype(np.float32)}]
    for i in range(PER_SLIDE):
        vector = (centres[rng.integers(20)] + rng.standard_normal(DIM) / 3).astype(np.float32)
        rows.append(own | {"id": f"slide{n:03d}/{i}_0", "kind": "region", "vector": vector})
    return cohort.filled(schema.embeddings_schema(DIM), rows)


def add(uri: Path, *slides: int) -> None:
    """Commit slides; the rows of each are a fragment of the model's table."""
    with Committer(uri) as committer:
        cohort.commit(committer, *slides)
        models.ensure_model(
            committer, "m", dim=DIM, fingerprint="m", encoder=models.ENCODER, run="m"
        )
        for slide in slides:
            committer.replace_rows(TABLE, rows_of(slide))


def coarse_recall(uri: Path) -> float:
    """Share of the ten nearest rows among ten candidates, by the index alone: no refinement."""
    dataset = Archive(uri).dataset(TABLE)
    rows = dataset.to_table(columns=["vector"], with_row_id=True).combine_chunks()
    matrix = np.stack(rows["vector"].to_numpy())
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    ids, hits = rows["_rowid"].to_numpy(), 0
    for query in matrix[::11]:
        found = dataset.scanner(
            columns=["_distance"], with_row_id=True,
            nearest={"column": "vector", "q": query, "k": 10, "metric": "cosine", "nprobes": 16},
        ).to_table()  # fmt: skip
        truth = ids[np.argsort(-(matrix @ query))[:10]]
        hits += len(set(truth.tolist()) & set(found["_rowid"].to_pylist()))
    return hits / 10 / len(matrix[::11])


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_two_nodes_build_one_index_and_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An index of two segments is as good as that of one process, after three updates, too.

    lance#7731: segments merged by ``merge_existing_index_segments`` and merged again lost recall.
    """
    monkeypatch.setattr(indexes, "VECTOR_INDEX_ROWS", 1000)
    uri, alone = tmp_path / "a", tmp_path / "alone"
    for one in (uri, alone):
        cohort.build(one)
        with Committer(one) as committer:
            cohort.encoder(committer, dim=cohort.DIM)
        add(one, *range(SLIDES))
    with Committer(alone) as committer:
        indexes.refresh_indexes(committer.lock, TABLE)
    own = tempfile.mkdtemp(prefix="ray-")  # short: Ray's sockets lie below it
    with subprocess.Popen(
        [sys.executable, "-c", NODES, str(uri), TABLE],
        cwd=faults.ROOT,
        env=os.environ | {"RAY_TMPDIR": own, "RAY_raylet_start_wait_time_s": "120"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as run:
        try:
            assert run.stdout is not None
            told = json.loads(next(line for line in run.stdout if line.startswith("{")))
        finally:
            faults.kill_tree(run)
            shutil.rmtree(own, ignore_errors=True)
    assert told == {"nodes": 2, "made": [f"{TABLE}.vector"]}
    assert len(list((uri / f"{TABLE}.lance" / "_indices").iterdir())) == 3  # two, and of both
    for turn in range(MORE + 1):
        for one in (uri, alone):
            if turn:
                add(one, SLIDES + turn)
                with Committer(one) as committer:
                    assert not indexes.refresh_indexes(committer.lock, TABLE).refused
        dataset = lance.dataset(str(uri / f"{TABLE}.lance"))
        (index,) = (i for i in dataset.describe_indices() if "vector" in i.field_names)
        assert index.index_type == "IVF_RQ"
        assert index.num_rows_indexed == dataset.count_rows()
        assert index_recall(dataset) >= 0.97
        assert coarse_recall(uri) >= coarse_recall(alone) - 0.04  # 300 to 400 queries: 0.01


def test_fragments_are_shared_by_their_rows() -> None:
    assert shares({1: 10, 2: 40, 3: 10, 4: 20}, 2) == [[2], [1, 3, 4]]
    assert shares({7: 3}, 4) == [[7]]
    assert shares({0: 5, 1: 5, 2: 5}, 2) == [[0, 2], [1]]
