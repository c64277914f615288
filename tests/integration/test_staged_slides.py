"""Slides of object stores in every command that reads pixels; actors live in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs.ingest import IngestConfig, dry_run
from jobs.ingest.candidates import Candidate
from jobs.ingest.embed import Embedder
from jobs.ingest.plan import Planner
from jobs.ingest.rows import Chunk, from_table
from jobs.trees import TreesConfig, trees
from pathflip.archive import Archive
from pathflip.archive.verify import verify
from pathflip.config import load_config
from pathflip.encoders import encoder_info
from pathflip.interop.tree_images import export_tree_images
from pathflip.report.archive import write_results
from pathflip.search import Query, run_query
from pathflip.slides import objects
from pathflip.slides.sources import discover
from pathflip.synth import make_slide
from tests import proxy
from tests.conftest import SETTINGS, listing
from tests.in_threads import in_threads
from tests.s3 import Store, environment

Job = Callable[..., Any]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tiny slides."""
    folder = tmp_path_factory.mktemp("files")
    for seed, name in enumerate(("a.svs", "b.svs", "c.svs")):
        make_slide(folder / name, width=1024, height=1024, mpp=0.5, layout="aperio", seed=seed)
    return folder


@pytest.fixture(autouse=True)
def staged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that slides are staged in."""
    monkeypatch.setenv("PATHFLIP_STAGE_DIR", str(tmp_path / "stage"))
    return tmp_path / "stage"


def put(store: Store, bucket: str, key: str, data: bytes) -> None:
    assert store.request("PUT", f"{bucket.removeprefix('s3:/')}/{key}", data)[0] == 200


@pytest.fixture
def slides(store: Store, bucket: str, files: Path) -> str:
    """The address of the slides."""
    for path in files.iterdir():
        put(store, bucket, f"x/{path.name}", path.read_bytes())
    return f"{bucket}/x"


def rows(archive: Path) -> dict[str, dict[str, Any]]:
    return {Path(row["uri"]).name: row for row in Archive(archive).slides().to_pylist()}


def test_a_dry_run_counts_and_copies_nothing(
    slides: str, files: Path, staged: Path, tmp_path: Path
) -> None:
    config = load_config(IngestConfig, overrides=SETTINGS)
    total = sum(path.stat().st_size for path in files.iterdir())
    plan = dry_run([slides, str(files / "a.svs")], str(tmp_path / "archive"), config)
    assert plan.slides == {"ready": 1, "quarantined": 0, "empty": 0, "skipped": 0, "not_opened": 3}
    assert plan.bytes_to_read == total + (files / "a.svs").stat().st_size
    assert not staged.exists()


def test_what_changed_in_the_store_is_ingested_again_and_nothing_else(
    slides: str, files: Path, bucket: str, store: Store, job_here: Job, tmp_path: Path
) -> None:
    archive = tmp_path / "archive"
    assert job_here([slides], archive).slides["ready"] == 3
    before = rows(archive)
    assert before["a.svs"]["uri"] == f"{slides}/a.svs"
    make_slide(tmp_path / "b.svs", width=1024, height=1024, mpp=0.5, layout="aperio", seed=9)
    put(store, bucket, "x/b.svs", (tmp_path / "b.svs").read_bytes())
    put(store, bucket, "x/copy.svs", (files / "c.svs").read_bytes())
    done = job_here([slides], archive)
    assert done.slides == {"ready": 1, "quarantined": 0, "empty": 0, "skipped": 3}
    after = rows(archive)
    assert after["b.svs"]["sha256"] != before["b.svs"]["sha256"]
    assert after["a.svs"] == before["a.svs"]
    assert after["c.svs"]["aliases"] == [f"{slides}/copy.svs"]
    # The same content in a folder is a copy, to which a slide moves if it is gone from the store.
    store.request("DELETE", f"{bucket.removeprefix('s3:/')}/x/a.svs")
    done = job_here([str(files)], archive)
    assert done.slides == {"ready": 1, "quarantined": 0, "empty": 0, "skipped": 2}
    moved = rows(archive)
    assert moved["c.svs"]["uri"] == f"{slides}/c.svs"
    assert moved["c.svs"]["aliases"] == [str(files / "c.svs"), f"{slides}/copy.svs"]
    assert moved["a.svs"]["uri"] == str(files / "a.svs")
    assert moved["a.svs"]["mtime_ns"] == (files / "a.svs").stat().st_mtime_ns
    assert verify(archive).ok


def test_one_bad_object_costs_one_slide_until_it_is_mended(
    slides: str, store: Store, job_here: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "BACKOFF_S", ())
    with proxy.between(store.port) as between, monkeypatch.context() as patched:
        for name, value in environment(between.port).items():
            patched.setenv(name, value)
        between.fault = lambda method, path: (
            proxy.FORBIDDEN if method == "GET" and path.endswith("b.svs") else None
        )
        done = job_here([slides], tmp_path / "archive")
        assert done.slides == {"ready": 2, "quarantined": 1, "empty": 0, "skipped": 0}
        bad = rows(tmp_path / "archive")["b.svs"]
        assert (bad["reason"], bad["stage"]) == ("access_denied", "hash")
        assert "denies access" in bad["message"]
        between.fault = proxy.no_fault
        done = job_here([slides], tmp_path / "archive")  # without --retry
        assert done.slides == {"ready": 1, "quarantined": 0, "empty": 0, "skipped": 2}
        assert rows(tmp_path / "archive")["b.svs"]["status"] == "ready"


def test_an_object_replaced_between_plan_and_embed_is_not_embedded(
    slides: str, files: Path, bucket: str, store: Store, tmp_path: Path, job_here: Job
) -> None:
    """Seen by the actors of the node that planned it, and of another that stages it anew."""
    config = load_config(IngestConfig, overrides=SETTINGS)
    archive = str(tmp_path / "archive")
    job_here([f"{slides}/a.svs"], Path(archive))
    (source,) = discover([f"{slides}/b.svs"])
    group = {"candidates": json.dumps([asdict(Candidate(source=source))])}
    (chunks,) = Planner(config, archive, {})(pa.Table.from_pylist([group]))
    planned = from_table(chunks)
    assert planned[0].n_chunks

    def embedded(stage: str) -> Chunk:
        there = load_config(IngestConfig, overrides=(*SETTINGS, f"stage_dir={tmp_path / stage}"))
        actor = Embedder(
            there, archive, ["features_texture"], [encoder_info("texture").revision], 1
        )
        (chunk,) = from_table(actor(chunks.slice(0, 1)))
        return chunk

    assert embedded("stage").record.status == "ready"
    assert embedded("other").record.sha256 == planned[0].record.sha256
    put(store, bucket, "x/b.svs", (files / "c.svs").read_bytes())
    for stage in ("stage", "other", "third"):
        record = embedded(stage).record
        assert (record.status, record.reason) == ("quarantined", "source_changed")


def test_every_command_that_reads_pixels_reads_them_from_the_store(
    slides: str,
    files: Path,
    staged: Path,
    job_here: Job,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Trees, their pictures, and pages of results are those of an archive of the same files."""
    from pathflip.cli import main

    found = {}
    for where, source in {"store": slides, "files": str(files)}.items():
        archive = tmp_path / where
        job_here([source], archive)
        config = load_config(
            TreesConfig, overrides=("parent_um=256", "node_px=128", "per_slide=1", "actors=1")
        )
        with in_threads():
            trees(str(archive), config)
        opened = Archive(archive)
        export_tree_images(opened, tmp_path / f"{where}-pictures")
        pictures = {
            path.name: path.read_bytes() for path in (tmp_path / f"{where}-pictures").iterdir()
        }
        features = opened.dataset("trees_texture").to_table().sort_by("tree_id").to_pylist()
        (slide, *_) = sorted(row["slide_id"] for row in opened.slides("ready").to_pylist())
        results = run_query(opened, Query(slide=slide, k=3))
        write_results(opened, results, tmp_path / "page.html")
        page = (tmp_path / "page.html").read_text()
        found[where] = (pictures, features, page.count("data:image/jpeg"), "any more" in page)
    assert found["store"] == found["files"]
    assert len(found["store"][0]) > 40
    assert found["store"][2] >= 3
    before = listing(staged)
    with pytest.raises(SystemExit) as ended:
        main(["slides", "check", slides, "--json"])
    assert ended.value.code == 0
    checked = json.loads(capsys.readouterr().out)
    assert [row["slide"] for row in checked] == [f"{slides}/{name}.svs" for name in "abc"]
    assert {name for name in listing(staged) if name.endswith(".svs")} == {
        name for name in before if name.endswith(".svs")
    }
