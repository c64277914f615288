"""Searches over HTTP: parts ``search`` and ``during_ingest`` of the bench.

``python -m tests.bench.serve --only search --only during_ingest --json``
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from tests.bench.serve_grounding import running
from tests.serving import SMALL

Report = dict[str, Any]

WORDS = ("necrosis", "mucin", "keratin", "fibrosis", "tumour", "lymphocytes", "glands", "fat")
TEXTS = tuple(f"There is {a} beside {b} and {c}." for a in WORDS for b in WORDS for c in WORDS)
REFRESH_S = 2.0
"""Seconds between two looks for commits: a tenth of what users have, so that many happen."""
COMMIT_S = 1.0
"""Seconds between two slides that are committed."""
INDEXED = 4
"""Every so many slides the vectors of their regions by the model are written, too."""


class _Made(NamedTuple):
    uri: str
    run: str
    table: str
    asked: Any  # vectors of TEXTS


def _make(folder: Path, rows: int, dim: int) -> _Made:
    """Make an archive of so many regions with a vector index, and the run of its model."""
    import numpy as np

    from pathflip.archive import Archive
    from pathflip.archive.indexes import refresh_indexes
    from pathflip.archive.lock import ArchiveLock
    from pathflip.checkpoints import model_name, write_whole
    from pathflip.models.pathflip import PathFLIP
    from tests.bench.search import Data, make_archive, make_blocks

    model = PathFLIP.from_preset(
        "pathflip/mini", texts=TEXTS, **(SMALL | {"d": dim, "feature_dim": 8})
    ).eval()
    fingerprint = model.fingerprint()
    vectors = np.concatenate(list(make_blocks(rows, dim)))
    data = Data(vectors=vectors, queries=vectors[:1], truth={})
    name = model_name("bench", fingerprint)
    folder.mkdir()
    uri = make_archive(folder, data, model=name, fingerprint=fingerprint)
    table = Archive(uri).models()[name]["embeddings_table"]
    refresh_indexes(ArchiveLock(uri), table)
    about = {
        "run": "bench",
        "fingerprint": fingerprint,
        "encoder": {"name": "patches", "revision": "1", "dim": 8},
        "tiling": Archive(uri).tiling(),
    }

    def fill(part: Path) -> None:
        model.save_pretrained(part)
        (part / "pathflip.json").write_text(json.dumps(about))

    write_whole(folder / "run" / "model", fill)
    return _Made(uri, str(folder / "run"), table, model.encode_text(TEXTS).numpy())


def search(folder: Path, rows: int, seconds: float, dim: int = 256) -> Report:
    """Milliseconds of a search by text over HTTP, and of LanceDB's query for the same vectors.

    Both return the ten nearest regions with their places. Ingress, embedder and search are the
    service's own; the model that makes vectors of texts is small: its time is not what is asked.
    """
    import lancedb

    uri, run, table, asked = _make(folder, rows, dim)
    opened = lancedb.connect(uri).open_table(table)
    columns = ["id", "slide_id", "x0", "y0", "size0", "mpp"]

    def bare(number: int) -> None:
        query = opened.search(asked[number % len(asked)]).distance_type("cosine").limit(10)
        query = query.where("kind = 'region'", prefilter=True).nprobes(16).refine_factor(3)
        assert query.select(columns).to_arrow().num_rows == 10

    def over_http(number: int) -> None:
        body = {"text": TEXTS[number % len(TEXTS)], "level": "region", "k": 10}
        answer = client.post("/v1/search", json=body).raise_for_status()
        assert len(answer.json()["results"]) == 10

    def one_by_one(ask: Callable[[int], None]) -> float:
        took = []
        for number in range(220):
            began = time.perf_counter()
            ask(number)
            took.append(1e3 * (time.perf_counter() - began))
        return statistics.median(took[20:])

    def together(ask: Callable[[int], None]) -> float:
        done, end = [0] * 32, time.monotonic() + seconds

        def work(mine: int) -> None:
            while time.monotonic() < end:
                ask(mine * 1000 + done[mine])
                done[mine] += 1

        threads = [threading.Thread(target=work, args=(n,)) for n in range(32)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(done) / seconds

    with running(uri, run) as url, httpx.Client(base_url=url, timeout=60) as client:
        found = {"rows": rows, "bare_p50_ms": one_by_one(bare), "p50_ms": one_by_one(over_http)}
        found |= {"bare_per_s_at_32": together(bare), "per_s_at_32": together(over_http)}
    return found | {"added_ms": found["p50_ms"] - found["bare_p50_ms"]}


# -- while slides are committed -------------------------------------------------------------------


def during_ingest(folder: Path, rows: int, seconds: float, dim: int = 64) -> Report:
    """Milliseconds of searches in a calm time and while another process commits slides.

    *Elsewhere* it commits to another archive: what the commits themselves take from the machine.
    Clients ask for regions by a text, with and without a condition, for slides, and for the list of
    slides, one after another.
    """
    made = _make(folder, rows, dim)
    other = _make(folder.with_name("elsewhere"), 2_000, dim)
    took: dict[str, list[float]] = {}
    commits: dict[str, int] = {}
    with (
        running(made.uri, made.run, refresh_s=REFRESH_S) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        _ask(client, seconds=min(5.0, seconds))
        for name, uri in (("calm", None), ("elsewhere", other.uri), ("here", made.uri)) * 2:
            with _writing(uri) as count:
                took.setdefault(name, []).extend(_ask(client, seconds=seconds / 2))
            commits[name] = commits.get(name, 0) + count()
        listed = client.get("/v1/slides", params={"after": "written"}).json()["data"]
    figures = {
        name: {
            "searches": len(ms),
            "commits": commits[name],
            "p50_ms": statistics.median(ms),
            "p99_ms": statistics.quantiles(ms, n=100)[-1],
            "most_ms": max(ms),
        }
        for name, ms in took.items()
    }
    calm = figures["calm"]["p99_ms"]
    return {
        "rows": rows,
        "refresh_s": REFRESH_S,
        "p99_over_calm": {name: figures[name]["p99_ms"] / calm for name in ("elsewhere", "here")},
        "slides_seen": len(listed),
        **figures,
    }


def _ask(client: httpx.Client, *, seconds: float) -> list[float]:
    """Milliseconds of searches, one after another with a hundredth of a second between them."""
    took, end, number = [], time.monotonic() + seconds, 0
    condition = {"field": "tissue_fraction", "op": ">=", "value": 0.95}
    while time.monotonic() < end:
        number += 1
        body: dict[str, Any] = {"text": TEXTS[number % len(TEXTS)], "level": "region", "k": 10}
        body |= {1: {"filters": [condition]}, 2: {"level": "slide"}}.get(number % 4, {})
        began = time.perf_counter()
        if number % 4 == 3:
            answer = client.get("/v1/slides", params={"limit": 10})
        else:
            answer = client.post("/v1/search", json=body)
        answer.raise_for_status()
        took.append(1e3 * (time.perf_counter() - began))
        time.sleep(0.01)
    return took


@contextmanager
def _writing(uri: str | None) -> Iterator[Callable[[], int]]:
    """Commit slides in another process until this is left; then tells how many."""
    if uri is None:
        yield lambda: 0
        return
    command = [sys.executable, "-m", "tests.bench.serve_search", uri]
    writer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    assert writer.stdin is not None
    assert writer.stdout.readline()  # it has the lock, and has imported what it needs
    lines: list[str] = []
    try:
        yield lambda: len(lines)
    finally:
        writer.stdin.close()
        lines += writer.stdout.readlines()
        assert writer.wait() == 0


def _write(uri: str) -> None:
    """Commit a slide every second, as an ingest does, until standard input ends."""
    from pathflip.archive import Archive
    from pathflip.archive.commit import Committer

    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    opened = Archive(uri)
    begin = sum(name.startswith("written") for name in opened.ledger())
    table = next(iter(opened.models().values()))["embeddings_table"]
    waiting: list[Any] = []
    with Committer(uri) as committer:
        print("writing", flush=True)
        number = begin
        while not ended.wait(COMMIT_S):
            waiting.append(_commit(committer, f"written{number:04d}", table))
            number += 1
            if len(waiting) == INDEXED:
                import pyarrow as pa

                committer.replace_rows(table, pa.concat_tables(waiting))
                waiting.clear()
            print(number, flush=True)


def _commit(committer: Any, slide: str, table: str) -> Any:
    """Commit a slide of 32 regions; return the rows that the model would give it."""
    import numpy as np

    from pathflip.archive import Archive, schema
    from pathflip.archive.fragments import write_fragment
    from tests.archives import filled

    archive: Archive = committer.archive
    slots, rng = archive.slots, np.random.default_rng(len(archive.ledger()))
    width = archive.dataset(table).schema.field("vector").type.list_size
    keys = [
        {"slide_id": slide, "region_id": schema.region_id(slide, rx=n, ry=0)} for n in range(32)
    ]
    regions = [
        key
        | {"rx": n, "ry": 0, "x0": 4096 * n, "y0": 0, "size0": 4096, "mpp": 0.5}
        | {"tissue_fraction": 1.0, "n_patches": slots, "n_bad": 0}
        | {"patch_mask": np.ones(slots, np.uint8)}
        | {f"patch_{what}": np.zeros(slots) for what in ("tissue", "blur", "pen")}
        for n, key in enumerate(keys)
    ]

    def vectors(size: int) -> Any:
        drawn = rng.standard_normal((len(keys) + 1, size))
        drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
        rows = [
            {"id": row["region_id"], "kind": "region", "slide_id": slide, "n_patches": slots}
            | {name: row[name] for name in ("x0", "y0", "size0", "mpp", "tissue_fraction")}
            for row in regions
        ]
        rows.append({"id": slide, "kind": "slide", "slide_id": slide})
        return filled(
            schema.embeddings_schema(size),
            [row | {"vector": one} for row, one in zip(rows, drawn, strict=True)],
        )

    features = [
        key | {"features": rng.standard_normal(slots * 8).astype(np.float16)} for key in keys
    ]
    fragment = write_fragment(
        committer.uri,
        schema.features_table("patches"),
        filled(schema.features_schema(slots, 8), features),
    )
    row = {"slide_id": slide, "uri": f"/data/{slide}.svs", "aliases": [], "status": "ready"}
    row |= {"fingerprint": slide, "encoders": ["patches"], "mpp": 0.5}
    row |= {"n_regions": len(keys), "n_patches": slots * len(keys)}
    committer.commit(
        slides=filled(schema.slides_schema(), [row]),
        regions=filled(schema.regions_schema(slots), regions),
        embeddings={"patches": vectors(8)},
        fragments={"patches": [fragment]},
    )
    return vectors(width)


if __name__ == "__main__":
    _write(sys.argv[1])
