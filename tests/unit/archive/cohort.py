"""A small made-up cohort for the archive tests, and a writer to be killed.

As a script: python cohort.py URI FIRST LAST: commits slides one by one, and prints the id of each
slide whose commit has returned. With LEASE_S its lease expires after that many seconds; with
STOP_AT=TABLE it stops itself (SIGSTOP) before Lance commits rows of that table for the second time.
"""

import os
import signal
import sys
import time

import numpy as np
import pyarrow as pa

from pathflip.archive import lease, schema
from pathflip.archive.commit import Committed, Committer
from pathflip.archive.create import create_archive
from pathflip.archive.fragments import write_fragment

TILING = {
    "region_um": 512.0,
    "patch_um": 128.0,
    "mpp": 0.5,
    "min_patch_tissue": 0.5,
    "min_region_patches": 0.1,
}
SLOTS, DIM, REGIONS = 16, 12, 5


def filled(fields: pa.Schema, rows: list[dict]) -> pa.Table:
    """Rows as a table, null where a row says nothing."""
    body = pa.schema([field for field in fields if field.name != "checksum"])
    columns = [pa.array([row.get(field.name) for row in rows], field.type) for field in body]
    return pa.Table.from_arrays(columns, schema=body)


def slide_rows(n: int, *, status: str = "ready", encoders=("tex",), fingerprint="f") -> pa.Table:
    row = {
        "slide_id": f"slide{n:03d}",
        "uri": f"/data/it's {n}.svs",
        "aliases": [f"/other/copy{n}.svs"],
        "status": status,
        "fingerprint": f"{fingerprint}{n}",
        "encoders": list(encoders) if status == "ready" else [],
        "patient_id": None if n % 4 == 3 else f"P{n // 2}",
        "split": "test" if n % 2 else "train",
        "mpp": 0.25 + n / 100,
        "n_regions": REGIONS if status == "ready" else 0,
        "n_patches": REGIONS * SLOTS,
        "tissue_png": bytes(range(256)),
        "seconds": float("nan") if n % 2 else 1.5,
    }
    return filled(schema.slides_schema(), [row])


def region_rows(n: int) -> pa.Table:
    rng = np.random.default_rng(n)
    rows = [
        {
            "region_id": schema.region_id(f"slide{n:03d}", rx=i, ry=n),
            "slide_id": f"slide{n:03d}",
            "rx": i,
            "ry": n,
            "x0": 1024 * i,
            "y0": 1024 * n,
            "size0": 1024,
            "mpp": 0.25 + n / 100,
            "tissue_fraction": i / 8,
            "n_patches": SLOTS - i,
            "n_bad": 0,
            "patch_mask": [1] * (SLOTS - i) + [0] * i,
            "patch_tissue": rng.random(SLOTS),
            "patch_blur": rng.random(SLOTS),
            "patch_pen": [0.0] * SLOTS,
        }
        for i in range(REGIONS)
    ]
    return filled(schema.regions_schema(SLOTS), rows)


def feature_rows(n: int, *, dim: int = DIM) -> pa.Table:
    rng = np.random.default_rng((n, dim))
    rows = [
        {
            "region_id": schema.region_id(f"slide{n:03d}", rx=i, ry=n),
            "slide_id": f"slide{n:03d}",
            "features": rng.standard_normal(SLOTS * dim).astype(np.float16),
        }
        for i in range(REGIONS)
    ]
    return filled(schema.features_schema(SLOTS, dim), rows)


def embedding_rows(n: int, *, dim: int = DIM) -> pa.Table:
    rng = np.random.default_rng((7, n, dim))
    slide = slide_rows(n).to_pylist()[0]
    rows = [
        {**region, "id": region["region_id"], "kind": "region"}
        for region in region_rows(n).to_pylist()
    ]
    rows.append({"id": slide["slide_id"], "kind": "slide", "slide_id": slide["slide_id"]})
    for row in rows:
        vector = rng.standard_normal(dim)
        row["vector"] = (vector / np.linalg.norm(vector)).astype(np.float32)
        row["mpp"] = slide["mpp"]
    return filled(schema.embeddings_schema(dim), rows)


def commit(
    committer: Committer,
    *numbers: int,
    dims=None,
    together: bool = False,
    fingerprint: str = "f",
    others=None,
) -> Committed:
    """Commit ready slides; dims is {encoder: dim}, others {table: rows} of further tables."""
    dims = dims or {"tex": DIM}
    fragments = {}
    for name, dim in dims.items():
        table = schema.features_table(name)
        rows = [feature_rows(n, dim=dim) for n in numbers]
        if together:
            rows = [pa.concat_tables(rows)]
        fragments[name] = [write_fragment(committer.uri, table, part) for part in rows]
    return committer.commit(
        slides=pa.concat_tables(
            [slide_rows(n, encoders=tuple(dims), fingerprint=fingerprint) for n in numbers]
        ),
        regions=pa.concat_tables([region_rows(n) for n in numbers]),
        embeddings={
            name: pa.concat_tables([embedding_rows(n, dim=dim) for n in numbers])
            for name, dim in dims.items()
        },
        fragments=fragments,
        others=others,
    )


def encoder(committer: Committer, name: str = "tex", *, dim: int = DIM) -> str:
    return committer.ensure_encoder_table(name, revision="1", dim=dim, mpp=0.5, licence="MIT")


def build(uri, *numbers: int) -> None:
    """Make an archive with these slides, one commit each."""
    create_archive(uri, tiling=TILING)
    with Committer(uri) as committer:
        encoder(committer)
        for n in numbers:
            commit(committer, n)


def stop_at(table: str) -> None:
    """Stop this process when a commit to a table is prepared for the second time, checks done."""
    import lance

    commit, seen = lance.LanceDataset.commit, []

    def stopping(dataset, *args, **kwargs):
        if dataset.uri.endswith(f"{table}.lance"):
            seen.append(table)
            if len(seen) == 2:
                os.kill(os.getpid(), signal.SIGSTOP)
        return commit(dataset, *args, **kwargs)

    lance.LanceDataset.commit = stopping


if __name__ == "__main__":
    lease.EXPIRES_S = float(os.environ.get("LEASE_S", lease.EXPIRES_S))
    create_archive(sys.argv[1], tiling=TILING)
    with Committer(sys.argv[1]) as writer:
        encoder(writer)
        print("open", flush=True)
        if "STOP_AT" in os.environ:
            stop_at(os.environ["STOP_AT"])
        for number in range(int(sys.argv[2]), int(sys.argv[3])):
            commit(writer, number)
            print(f"slide{number:03d}", flush=True)
        if sys.argv[4:] == ["stay"]:
            time.sleep(60)
