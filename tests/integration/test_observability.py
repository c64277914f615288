"""The dashboard and the rules against a service and jobs that run: each name is exported.

tests/unit/serve/test_observability.py has the labels, the rules and promtool; there the service is
its routes alone, and the figures of a training are made up.
"""

from __future__ import annotations

import os
import subprocess
import sys

import httpx
import pytest

from pathflip.job_metrics import FILE
from pathflip.synth import make_slide
from tests.archives import TINY, make_archive
from tests.serving import PARTS, Service
from tests.unit.serve.test_observability import (
    OF_PROMETHEUS,
    OF_RAY,
    RULES,
    expressions,
    names,
    samples,
)

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

RECORDED = {rule["record"] for group in RULES["groups"] for rule in group["rules"]
            if "record" in rule}  # fmt: skip
OF_LARGE_INDEXES = {"pathflip_index_recall"}
"""Only 50,000 vectors have an index: tests/unit/archive/test_indexed.py."""


@pytest.fixture(scope="module")
def of_jobs(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Series of an ingest, a training and an index job, each a command of its own."""
    folder = tmp_path_factory.mktemp("observed")
    slides, archive = folder / "slides", folder / "archive"
    slides.mkdir()
    make_slide(slides / "good.svs", width=1024, height=1024, mpp=0.5, layout="aperio", seed=1)
    (slides / "broken.svs").write_bytes(b"no slide")
    make_archive(archive, slides=16, split=lambda n: "val" if n > 11 else "train")
    settings = [*TINY, "steps=4", "batch_size=4", "log_every=1", "val_every=1"]
    wanted = {
        "ingest": [slides, "--archive", folder / "new", "-o", "tiling.region_um=512"],
        "pretrain": ["--archive", archive, "--run", folder / "run", "--preset", "pathflip/mini",
                     *(word for setting in settings for word in ("-o", setting))],
        "index": ["--archive", archive, "--run", folder / "run"],
    }  # fmt: skip
    found: set[str] = set()
    for command, words in wanted.items():
        file = folder / f"{command}.prom"
        done = subprocess.run(
            [sys.executable, "-m", "pathflip.cli", command, *map(str, words), "--local", "--json"],
            env=os.environ | {FILE: str(file)}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == (3 if command == "ingest" else 0), done.stderr
        found |= set(samples(file.read_text()))
    return found


@pytest.fixture
def of_service(service: Service) -> set[str]:
    """Series of a service that has answered a search, a chat, and a question of no slide."""
    with httpx.Client(base_url=service.url, timeout=60) as client:
        search = {"text": "necrosis", "level": "slide", "k": 1}
        assert client.post("/v1/search", json=search).is_success
        assert client.post("/v1/chat/completions", json=service.body(max_tokens=4)).is_success
        assert client.get("/v1/slides/no-such-slide").status_code == 404
        found = samples(client.get("/metrics").text)
    assert found["pathflip_part_up"] == {"part", "replica"}
    assert found["pathflip_engine_answers"] == {"engine", "state", "replica"}
    assert found["pathflip_engine_kv_cache_ratio"] == {"engine", "replica"}
    return set(found)


def test_every_name_that_is_read_is_exported_by_what_runs(
    of_service: set[str], of_jobs: set[str]
) -> None:
    there = of_service | of_jobs | RECORDED | OF_LARGE_INDEXES | set(OF_PROMETHEUS) | OF_RAY
    read = {name for _, expression in expressions() for name, _ in names(expression)}
    assert read - there == set()
    # No list of exceptions grows unseen: each of its names is read, and nothing of ours exports it.
    for excepted in (OF_LARGE_INDEXES, set(OF_PROMETHEUS), OF_RAY):
        assert excepted <= read
        assert not excepted & (of_service | of_jobs)


def test_a_scrape_counts_what_was_asked(service: Service) -> None:
    def values(text: str) -> dict[tuple[str, ...], float]:
        from prometheus_client.parser import text_string_to_metric_families

        return {
            (sample.name, *(v for k, v in sorted(sample.labels.items()) if k != "replica")):
                sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }  # fmt: skip

    route = "/v1/chat/completions"
    with httpx.Client(base_url=service.url, timeout=60) as client:
        before = values(client.get("/metrics").text)
        for _ in range(3):
            assert client.post(route, json=service.body(max_tokens=4)).is_success
        after = values(client.get("/metrics").text)
    answered = ("pathflip_requests_total", "POST", route, "200")
    assert after[answered] - before.get(answered, 0) == 3
    first = ("pathflip_first_token_seconds_count",)
    assert after[first] - before[first] == 3
    completion = ("pathflip_tokens_total", "completion")
    assert after[completion] - before.get(completion, 0) == 12
    up = {part for name, *labels in after for part in labels if name == "pathflip_part_up"}
    assert up == {*PARTS[1:], "tiles"}
