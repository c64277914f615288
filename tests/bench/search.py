"""Benchmark of search in an archive, beside FAISS: ``python -m tests.bench.search --json``.

Both sides get the same vectors in one run: clusters of unequal size whose members lie near a
low-dimensional plane of their cluster, as embeddings of tissue do, all of length 1. Truth is every
vector compared. CPU time is that of all threads of the process. Ours is what users call:
``pathflip.archive.search.search`` on an archive, results as a table with the regions' places; FAISS
returns row numbers. Everything is kept below the system's temporary folder.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

K = 10
BLOCK = 50_000
PER_SLIDE = 200
KEPT = (1.0, 0.2, 0.05, 0.01)
"""Shares of regions that filters keep, picked without regard to where they lie; 1 is no filter."""
KINDS = ("IVF_RQ", "IVF_HNSW_SQ", "IVF_SQ")

Vectors = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Data:
    """Vectors [n, dim] in a file, queries [q, dim], and the true answers [q, K] by share kept."""

    vectors: Vectors
    queries: Vectors
    truth: dict[float, NDArray[np.int64]]


# -- vectors --------------------------------------------------------------------------------------


def make_blocks(rows: int, dim: int, *, seed: int = 0) -> Iterator[Vectors]:
    """Yield the vectors, a block at a time."""
    rng = np.random.default_rng(seed)
    clusters = max(32, rows // 2000)
    centres = rng.standard_normal((clusters, dim), dtype=np.float32)
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    planes = rng.standard_normal((16, 24, dim), dtype=np.float32) / np.sqrt(24 * dim)
    share = rng.pareto(1.5, clusters) + 0.2
    share /= share.sum()
    for start in range(0, rows, BLOCK):
        n = min(BLOCK, rows - start)
        which = rng.choice(clusters, n, p=share)
        block = centres[which]
        for plane in range(len(planes)):
            own = np.flatnonzero(which % len(planes) == plane)
            inside = rng.standard_normal((len(own), 24), dtype=np.float32)
            block[own] += 0.7 * inside @ planes[plane] * np.sqrt(1.0)
        block += rng.standard_normal((n, dim), dtype=np.float32) * (0.15 / np.sqrt(dim))
        block /= np.linalg.norm(block, axis=1, keepdims=True)
        yield block


def make_data(folder: Path, rows: int, dim: int, queries: int) -> Data:
    """Return vectors, queries near some of them, and the truth by comparing everything."""
    path = folder / "vectors.npy"
    vectors = np.lib.format.open_memmap(path, "w+", np.float32, (rows, dim))
    for number, block in enumerate(make_blocks(rows, dim)):
        vectors[number * BLOCK : number * BLOCK + len(block)] = block
    rng = np.random.default_rng(1)
    asked = vectors[np.sort(rng.choice(rows, queries, replace=False))]
    asked = asked + rng.standard_normal(asked.shape, dtype=np.float32) * (0.2 / np.sqrt(dim))
    asked /= np.linalg.norm(asked, axis=1, keepdims=True)
    truth = {share: _truth(vectors, asked, keeping(rows, share)) for share in KEPT}
    return Data(vectors=vectors, queries=asked, truth=truth)


def tissue(row: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the column the filter is on, spread evenly over [0, 1)."""
    return ((row * 7919) % 10_000 / 10_000).astype(np.float32)


def keeping(rows: int, share: float) -> NDArray[np.bool_]:
    """Return which rows the filter that keeps a share of them keeps."""
    return tissue(np.arange(rows)) >= 1 - share


def _truth(vectors: Vectors, queries: Vectors, kept: NDArray[np.bool_]) -> NDArray[np.int64]:
    best = np.full((len(queries), K), -np.inf, np.float32)
    ids = np.zeros((len(queries), K), np.int64)
    for start in range(0, len(vectors), BLOCK):
        scores = queries @ vectors[start : start + BLOCK].T
        scores[:, ~kept[start : start + BLOCK]] = -np.inf
        both = np.concatenate([best, scores], axis=1)
        numbers = np.arange(start, start + scores.shape[1])
        both_ids = np.concatenate([ids, np.broadcast_to(numbers, scores.shape)], axis=1)
        order = np.argpartition(-both, K, axis=1)[:, :K]
        best, ids = np.take_along_axis(both, order, 1), np.take_along_axis(both_ids, order, 1)
    return ids


# -- measuring ------------------------------------------------------------------------------------


def measured(
    name: str, ask: Callable[[Vectors], list[NDArray[np.int64]]], data: Data, *, share: float,
    batch: int = 1,
) -> dict[str, Any]:  # fmt: skip
    """Return recall, latency and CPU time of all queries, after one round of a few."""
    for start in range(0, min(10, len(data.queries)), batch):
        ask(data.queries[start : start + batch])
    seconds, hits = [], 0
    before = time.process_time()
    for start in range(0, len(data.queries), batch):
        asked = data.queries[start : start + batch]
        began = time.perf_counter()
        found = ask(asked)
        seconds.append((time.perf_counter() - began) / len(asked))
        for number, ids in enumerate(found):
            hits += len(set(ids.tolist()) & set(data.truth[share][start + number].tolist()))
    cpu = (time.process_time() - before) / len(data.queries)
    line = {
        "what": name,
        "kept": share,
        "batch": batch,
        "recall": round(hits / len(data.queries) / K, 4),
        "p50_ms": round(1e3 * float(np.quantile(seconds, 0.5)), 3),
        "p95_ms": round(1e3 * float(np.quantile(seconds, 0.95)), 3),
        "qps": round(len(seconds) / sum(seconds), 1),
        "cpu_ms": round(1e3 * cpu, 3),
    }
    print(json.dumps(line), file=sys.stderr, flush=True)
    return line


def built(make: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Return what was made, and the seconds and CPU seconds it took."""
    began, before = time.perf_counter(), time.process_time()
    value = make()
    took = {
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_s": round(time.process_time() - before, 1),
    }
    return value, took


def forget(folder: Path) -> None:
    """Drop the files of a folder from the page cache."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as handle:
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# -- ours -----------------------------------------------------------------------------------------


def make_archive(
    folder: Path, data: Data, *, model: str = "bench", fingerprint: str = "bench"
) -> str:
    """Write the vectors as the table of a model, as ``pathflip index`` does."""
    from pathflip.archive import schema
    from pathflip.archive.commit import Committer
    from pathflip.archive.create import create_archive
    from pathflip.archive.model_vectors import ensure_model

    uri = str(folder / "archive")
    tiling = {"region_um": 2048.0, "patch_um": 128.0, "mpp": 0.5}
    create_archive(uri, tiling=tiling)
    rows, dim = data.vectors.shape
    with Committer(uri) as committer:
        committer.ensure_encoder_table("patches", revision="1", dim=8, mpp=0.5, licence="none")
        slides = [f"slide{n:06d}" for n in range(-(-rows // PER_SLIDE))]
        body = pa.schema([item for item in schema.slides_schema() if item.name != schema.CHECKSUM])
        ready = [
            {"slide_id": name, "status": "ready", "encoders": ["patches"], "n_regions": PER_SLIDE}
            for name in slides
        ]
        committer.upsert("slides", pa.Table.from_pylist(ready, schema=body))
        table = ensure_model(
            committer, model, dim=dim, fingerprint=fingerprint,
            encoder={"name": "patches", "revision": "1"}, run="bench",
        )  # fmt: skip
        for start in range(0, rows, 4 * BLOCK):
            committer.replace_rows(table, _rows(data.vectors, start, min(rows, start + 4 * BLOCK)))
    return uri


def _rows(vectors: Vectors, start: int, stop: int) -> pa.Table:
    number = np.arange(start, stop)
    slide = [f"slide{n // PER_SLIDE:06d}" for n in number.tolist()]
    n = len(number)
    flat = np.ascontiguousarray(vectors[start:stop]).reshape(-1)
    return pa.table(
        {
            "id": [f"{s}/{i % PER_SLIDE}_0" for s, i in zip(slide, number.tolist(), strict=True)],
            "kind": ["region"] * n,
            "slide_id": slide,
            "patient_id": [f"P{i // (2 * PER_SLIDE):06d}" for i in number.tolist()],
            "x0": pa.array(number % PER_SLIDE * 4096),
            "y0": pa.array(np.zeros(n, np.int64)),
            "size0": pa.array(np.full(n, 4096, np.int32)),
            "mpp": np.full(n, 0.5),
            "tissue_fraction": pa.array(tissue(number)),
            "n_patches": pa.array((number % 256).astype(np.int32)),
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(flat), vectors.shape[1]),
        }
    )


def bench_ours(folder: Path, data: Data, *, quick: bool) -> dict[str, Any]:
    """The archive's search with its default index and settings, and a curve over the settings."""
    from pathflip.archive import Archive
    from pathflip.archive.ann import DEFAULT_PARAMS, SearchParams
    from pathflip.archive.filters import Filter
    from pathflip.archive.indexes import refresh_indexes
    from pathflip.archive.lock import ArchiveLock
    from pathflip.archive.search import search_many

    uri, writing = built(lambda: make_archive(folder, data))
    table = "embeddings_bench"
    home = Path(uri, f"{table}.lance")
    indexes, building = built(lambda: refresh_indexes(ArchiveLock(uri), table))
    archive = Archive(uri)

    def asking(share: float, params: SearchParams) -> Callable[[Vectors], list[NDArray[np.int64]]]:
        kept = Filter(field="tissue_fraction", op=">=", value=1 - share)

        def ask(queries: Vectors) -> list[NDArray[np.int64]]:
            tables = search_many(
                archive, queries, model="bench", k=K, filters=[kept] if share < 1 else (),
                params=params,
            )  # fmt: skip
            return [_numbers(found["region_id"].to_pylist()) for found in tables]

        return ask

    lines = []
    forget(home)
    archive = Archive(uri)
    began = time.perf_counter()
    asking(1.0, DEFAULT_PARAMS)(data.queries[:1])
    cold = {"first_query_ms": round(1e3 * (time.perf_counter() - began), 1)}
    curve = [DEFAULT_PARAMS] if quick else [
        SearchParams(nprobe=nprobe, refine=refine)
        for nprobe in (1, 4, 16, 64) for refine in (2, 4, 8)
    ]  # fmt: skip
    for share in KEPT:
        for params in dict.fromkeys([DEFAULT_PARAMS, *curve]):
            name = f"pathflip nprobe={params.nprobe} refine={params.refine}"
            name += " (default)" if params == DEFAULT_PARAMS else ""
            lines.append(measured(name, asking(share, params), data, share=share))
        lines.append(
            measured(
                "pathflip default",
                asking(share, DEFAULT_PARAMS),
                data,
                share=share,
                batch=50,
            )
        )
    return {
        "write": writing,
        "build": building | {"indexes": indexes},
        "index_mb": _megabytes(home / "_indices"),
        "data_mb": _megabytes(home / "data"),
        "cold": cold,
        "queries": lines,
    }


def bench_kinds(folder: Path, data: Data, kinds: list[str]) -> dict[str, Any]:
    """Lance's own kinds of index on a copy of the table, called bare: vector in, ids out."""
    import lance
    import pyarrow.compute as pc

    found: dict[str, Any] = {}
    for kind in kinds:
        home = folder / f"{kind}.lance"
        shutil.copytree(folder / "archive/embeddings_bench.lance", home)
        dataset = lance.dataset(str(home))
        for index in dataset.describe_indices():
            dataset.drop_index(index.name)
        dataset = lance.dataset(str(home))
        rows = len(data.vectors)
        partitions = max(1, rows >> 20) if "HNSW" in kind else max(16, round(rows**0.5 / 4))
        _, took = built(
            lambda d=dataset, k=kind, p=partitions: d.create_index(
                "vector", k, metric="cosine", num_partitions=p
            )
        )
        dataset = lance.dataset(str(home))
        lines = []
        for share in KEPT:
            least = pc.field("tissue_fraction") >= pa.scalar(1 - share, pa.float32())
            where = least if share < 1 else None
            for own in ({"ef": 32}, {"ef": 128}) if "HNSW" in kind else ({}, {"refine_factor": 4}):

                def ask(
                    queries: Vectors, own: Any = own, where: Any = where, d: Any = dataset
                ) -> Any:
                    near = {"column": "vector", "q": queries[0], "k": K, "metric": "cosine",
                            "nprobes": 16, **own}  # fmt: skip
                    rows = d.to_table(
                        columns=["id", "_distance"], nearest=near,
                        filter=where, prefilter=True,
                    )  # fmt: skip
                    return [_numbers(rows["id"].to_pylist())]

                lines.append(measured(f"{kind} {own}", ask, data, share=share))
        found[kind] = {"build": took, "index_mb": _megabytes(home / "_indices"), "queries": lines}
        shutil.rmtree(home)
    return found


def _numbers(ids: list[str]) -> NDArray[np.int64]:
    parts = [one[5:].removesuffix("_0").split("/") for one in ids]
    return np.array([int(slide) * PER_SLIDE + int(rest) for slide, rest in parts], np.int64)


def _megabytes(folder: Path) -> float:
    return round(sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 2**20, 1)


# -- FAISS ----------------------------------------------------------------------------------------


def bench_faiss(data: Data, *, hnsw: bool, threads: int) -> dict[str, Any]:
    """Flat, IVF and HNSW in memory, one thread a query."""
    import faiss

    rows, dim = data.vectors.shape
    found: dict[str, Any] = {}
    bits = {share: np.packbits(keeping(rows, share), bitorder="little") for share in KEPT}
    keep = {share: faiss.IDSelectorBitmap(held) for share, held in bits.items()}

    def run(
        name: str, index: Any, settings: list[tuple[str, Callable[..., Any]]]
    ) -> list[dict[str, Any]]:
        lines = []
        for label, make in settings:
            plain = make()
            for share in KEPT:
                parameters = make(sel=keep[share]) if share < 1 else plain

                def ask(queries: Vectors, p: Any = parameters) -> Any:
                    return list(index.search(queries, K, params=p)[1])

                lines.append(measured(f"faiss {name} {label}", ask, data, share=share))

            def many(queries: Vectors, p: Any = plain) -> Any:
                return list(index.search(queries, K, params=p)[1])

            lines.append(measured(f"faiss {name} {label}", many, data, share=1.0, batch=50))
        return lines

    def filled(index: Any) -> Any:
        faiss.omp_set_num_threads(threads)
        if not index.is_trained:
            step = max(1, rows // 100_000)
            index.train(np.ascontiguousarray(data.vectors[::step]))
        for start in range(0, rows, BLOCK):
            index.add(np.ascontiguousarray(data.vectors[start : start + BLOCK]))
        faiss.omp_set_num_threads(1)
        return index

    flat, took = built(lambda: filled(faiss.IndexFlatIP(dim)))
    found["flat"] = {"build": took, "queries": run("flat", flat, [("", faiss.SearchParameters)])}
    del flat
    lists = round(2 * rows**0.5)
    quantizer = faiss.IndexFlatIP(dim)
    ivf, took = built(
        lambda: filled(faiss.IndexIVFFlat(quantizer, dim, lists, faiss.METRIC_INNER_PRODUCT))
    )
    settings = [
        (f"nlist={lists} nprobe={n}", partial(faiss.SearchParametersIVF, nprobe=n))
        for n in (4, 16, 64)
    ]
    found["ivf"] = {"build": took, "queries": run("IVF", ivf, settings)}
    del ivf
    if hnsw:
        graph = faiss.IndexHNSWFlat(dim, 16, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efConstruction = 80
        graph, took = built(lambda: filled(graph))
        settings = [
            (f"M=16 ef={ef}", partial(faiss.SearchParametersHNSW, efSearch=ef)) for ef in (32, 128)
        ]
        found["hnsw"] = {"build": took, "queries": run("HNSW", graph, settings)}
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2, help="of FAISS while it builds")
    parser.add_argument("--quick", action="store_true", help="ours at its default, and FAISS")
    parser.add_argument("--no-hnsw", action="store_true", help="without FAISS's HNSW: it is slow")
    parser.add_argument(
        "--kinds", nargs="*", default=[], choices=KINDS, help="Lance's, called bare"
    )
    parser.add_argument("--folder", help="kept, and used for what is large")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    given = parser.parse_args()
    os.environ.setdefault("LANCE_LOG", "error")
    folder = Path(given.folder or tempfile.mkdtemp(prefix="pathflip-bench-search-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        data = make_data(folder, given.rows, given.dim, given.queries)
        document: dict[str, Any] = {
            "rows": given.rows,
            "dim": given.dim,
            "queries": given.queries,
            "load_average": os.getloadavg(),
            "pathflip": bench_ours(folder, data, quick=given.quick),
        }
        document["lance"] = bench_kinds(folder, data, given.kinds)
        document["faiss"] = bench_faiss(data, hnsw=not given.no_hnsw, threads=given.threads)
    finally:
        if not given.folder:
            shutil.rmtree(folder, ignore_errors=True)
    if given.json:
        print(json.dumps(document))
        return
    sides = [document["pathflip"], *document["lance"].values(), *document["faiss"].values()]
    print(f"{'':44}   kept batch  recall   p50 ms   p95 ms   CPU ms")
    for side in sides:
        for line in side["queries"]:
            print(
                f"{line['what']:44} {line['kept']:6.0%} {line['batch']:5} "
                f"{line['recall']:7.3f} {line['p50_ms']:8.2f} {line['p95_ms']:8.2f} "
                f"{line['cpu_ms']:8.2f}"
            )


if __name__ == "__main__":
    main()
