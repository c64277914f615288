"""The dashboard and the rules: every expression reads metrics and labels that are exported."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from pathflip import job_metrics
from pathflip.archive import Archive
from pathflip.archive.indexes import RECALL
from pathflip.job_metrics import METRICS, render
from pathflip.progress import Progress, show_progress
from pathflip.synth import make_slide
from pathflip.training.trainer import TrainingProgress
from serve.chat import count_tokens
from serve.search import _lag
from tests.unit.serve.service_fixture import REGIONS, SLIDES

FOLDER = Path(__file__).resolve().parents[3] / "platform" / "observability"
RULES = yaml.safe_load((FOLDER / "rules.yaml").read_text())
BOARD = json.loads((FOLDER / "dashboard.json").read_text())

OF_PROMETHEUS = {"up": {"instance", "job"}}
OF_RAY = {"ray_node_gpus_utilization", "ray_node_gram_used"}
SCRAPED = {"instance", "job"}
"""Labels that Prometheus gives to what it scrapes."""
_SELECTED = re.compile(r"([a-zA-Z_:][\w:]*)\s*(?:\{([^}]*)\})?")
_GROUPED = re.compile(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)")
_WORDS = {"by", "without", "on", "or", "and", "unless", "bool"}


def samples(text: str) -> dict[str, set[str]]:
    """Return {name of a time series: its labels} of what was scraped."""
    found: dict[str, set[str]] = defaultdict(set)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name] |= set(sample.labels)
    return found


def names(expression: str) -> Iterator[tuple[str, set[str]]]:
    """Yield (name, labels it is selected by) of the time series that an expression reads."""
    left = _GROUPED.sub(" ", expression)
    left = re.sub(r"\[[^\]]*\]", " ", left)
    for found in _SELECTED.finditer(left):
        name, labels = found.group(1), found.group(2) or ""
        called = left[found.end() :].lstrip().startswith("(")
        if (
            name not in _WORDS
            and not called
            and not left[found.start() - 1 : found.start()].isdigit()
        ):
            yield name, set(re.findall(r"(\w+)\s*[=!]~?", labels))


def expressions() -> Iterator[tuple[str, str]]:
    """Yield (where, expression) of the dashboard's panels and of the rules, records first."""
    for group in RULES["groups"]:
        for rule in group["rules"]:
            yield rule.get("record") or rule["alert"], rule["expr"]
    for panel in BOARD["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]


@pytest.fixture(scope="module")
def exported(ask: Any) -> dict[str, set[str]]:
    """Series of a scrape of the service, once it has answered: {name: labels}."""
    assert ask("GET", "/v1/slides/slide001").status_code == 200
    count_tokens(ask.app.metrics, {"prompt_tokens": 1, "completion_tokens": 1})
    return samples(ask("GET", "/metrics").text)


@pytest.fixture(scope="module")
def ingested(
    job_here: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, str, Path]:
    """A job, here an ingest of three slides of which two are broken: result, metrics, archive."""
    folder = tmp_path_factory.mktemp("observed")
    slides, file = folder / "slides", folder / "cohort.prom"
    slides.mkdir()
    make_slide(slides / "good.svs", width=1024, height=1024, mpp=0.5, layout="aperio", seed=1)
    for name in ("one.svs", "two.svs"):
        (slides / name).write_bytes(b"no slide: " + name.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(job_metrics.FILE, str(file))
        with show_progress() as progress:
            result = job_here(slides, folder / "archive", progress=progress)
    return result, file.read_text(), folder / "archive"


@pytest.fixture(scope="module")
def of_jobs(ingested: tuple[Any, str, Path]) -> dict[str, set[str]]:
    """Series of jobs: {name: labels}: of the ingest, of a training, of one that counts slides."""
    val = {"itr": {"r@1": 0.5}, "tir": {"r@1": 0.25}, "mean_recall": 0.375}
    trained = TrainingProgress(
        step=5, steps=9, epoch=0.1, loss=2.5, items_per_s=8.0, unit="pairs", seconds_left=1.0,
        val=val,
    )  # fmt: skip
    counted = Progress(what="index", done=1, total=2, seconds=1.0)
    return samples(ingested[1]) | {
        name: labels
        for one in (trained, counted)
        for name, labels in samples(render(one.samples(), run="x")).items()
    }


@pytest.fixture(scope="module")
def known(exported: dict[str, set[str]], of_jobs: dict[str, set[str]]) -> dict[str, set[str]]:
    """Time series that an expression may read: exported ones, and what the rules record."""
    there = OF_PROMETHEUS | {
        name: labels | SCRAPED for name, labels in (exported | of_jobs).items()
    }
    there |= {name: {"GpuIndex"} | SCRAPED for name in OF_RAY}
    # Only an index of 50,000 vectors has it: see tests/unit/archive/test_indexed.py.
    there["pathflip_index_recall"] = {"replica"} | SCRAPED
    # A chat engine is in tests/integration/test_observability.py, and a real one in test_traces.py.
    there["pathflip_engine_answers"] = {"engine", "state", "replica"} | SCRAPED
    there["pathflip_engine_kv_cache_ratio"] = {"engine", "replica"} | SCRAPED
    for group in RULES["groups"]:
        for rule in group["rules"]:
            if "record" in rule:
                grouped = _GROUPED.search(rule["expr"])
                assert grouped, rule["record"]
                there[rule["record"]] = set(re.split(r"[\s,]+", grouped.group(1))) - {"le"}
    return there


@pytest.mark.parametrize(("where", "expression"), list(expressions()))
def test_every_expression_reads_what_is_exported(
    where: str, expression: str, known: dict[str, set[str]]
) -> None:
    read = list(names(expression))
    assert read, where
    for name, selected in read:
        assert name in known, f"{where}: nothing exports {name}"
        assert selected <= known[name], f"{where}: {name} lacks {selected - known[name]}"
    grouped = {
        label for found in _GROUPED.findall(expression) for label in re.split(r"[\s,]+", found)
    }
    there = set().union(*(known[name] for name, _ in read))
    assert grouped <= there, f"{where}: no series has {grouped - there}"


def test_a_name_that_nothing_exports_is_found(known: dict[str, set[str]]) -> None:
    wrong = 'sum by (route) (rate(pathflip_request_total{route="x", stat=~"5.."}[5m])) > 0.5'
    assert list(names(wrong)) == [("pathflip_request_total", {"route", "stat"})]
    assert "pathflip_request_total" not in known


def test_a_job_tells_what_became_of_slides(ingested: tuple[Any, str, Path]) -> None:
    """Its metrics are its result, and what the archive says."""
    result, text, archive = ingested
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    rows = Archive(archive).slides(columns=["status", "reason"]).to_pylist()
    reasons = Counter(row["reason"] for row in rows if row["status"] == "quarantined")
    assert reasons.total() == 2
    for reason, count in reasons.items():
        assert found["pathflip_ingest_quarantined_total", "cohort", reason] == count
    for status, count in result.slides.items():
        assert found["pathflip_ingest_slides_total", "cohort", status] == count
    assert found["pathflip_ingest_patches_total", "cohort"] == result.patches > 0
    assert found["pathflip_ingest_regions_total", "cohort"] == result.regions > 0
    assert found["pathflip_ingest_slides_expected", "cohort"] == 3
    assert found["pathflip_ingest_commit_seconds_count", "cohort"] >= 1
    assert found["pathflip_ingest_commit_seconds_sum", "cohort"] > 0
    assert found["pathflip_job_progress_ratio", "cohort"] == 1
    assert found["pathflip_job_running", "cohort"] == 0


def test_every_metric_of_a_job_is_on_a_panel(of_jobs: dict[str, set[str]]) -> None:
    shown = {
        name
        for panel in BOARD["panels"]
        for target in panel.get("targets", ())
        for name, _ in names(target["expr"])
    }
    assert set(of_jobs) <= shown
    assert {re.sub(r"_(sum|count)$", "", name) for name in of_jobs} == set(METRICS)
    assert all("run" in labels for labels in of_jobs.values())


def test_the_recall_of_an_index_is_exported(ingested: tuple[Any, str, Path]) -> None:
    table = Archive(ingested[2]).dataset("embeddings_texture")
    assert "index_recall" not in _lag(table)
    table.update_config({RECALL: "0.9812"})
    assert _lag(table)["index_recall"] == 0.9812
    assert _lag(table)["indexed"] == 1
    table.update_config({RECALL: ""})  # the index was dropped
    assert "index_recall" not in _lag(table)


def test_ray_exports_what_is_read_of_it() -> None:
    found = importlib.util.find_spec("ray")
    assert found is not None
    assert found.submodule_search_locations is not None
    reporter = "dashboard/modules/reporter/reporter_agent.py"
    source = (Path(found.submodule_search_locations[0]) / reporter).read_text()
    for name in OF_RAY:
        assert f'"{name.removeprefix("ray_")}": Gauge(' in source
    assert '"GpuIndex"' in source


def test_what_is_exported_is_of_one_replica_and_is_read(
    exported: dict[str, set[str]],
) -> None:
    read = {name for _, expression in expressions() for name, _ in names(expression)}
    for name, labels in exported.items():
        assert "replica" in labels, name
        plain = re.sub(r"_(bucket|count|sum|created|total)$", "", name)
        assert any(one.startswith(plain) for one in read), f"{name} is on no panel"


def test_counts_are_those_of_the_archive(ask: Any, world: Any) -> None:
    values = {
        sample.name: sample.value
        for family in text_string_to_metric_families(ask("GET", "/metrics").text)
        for sample in family.samples
    }
    rows = Archive(world.archive).slides(columns=["status"]).to_pylist()
    assert values["pathflip_slides"] == sum(row["status"] == "ready" for row in rows) == SLIDES
    assert values["pathflip_slides_indexed"] == SLIDES
    assert values["pathflip_unindexed_rows"] == SLIDES * (1 + REGIONS)  # too few for an index
    assert values["pathflip_part_up"] == 1


def test_alerts_say_what_to_do() -> None:
    alerts = [rule for group in RULES["groups"] for rule in group["rules"] if "alert" in rule]
    for alert in alerts:
        assert alert["labels"]["severity"] in ("critical", "warning")
        assert set(alert["annotations"]) == {"summary", "action"}, alert["alert"]
        assert alert["for"], "one scrape is no incident"


def test_panels_have_places_and_titles_of_their_own() -> None:
    panels = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])
    assert len({panel["title"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for at in (panel["gridPos"] for panel in BOARD["panels"])
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


def scraped(*values: float, every: int = 2, first: int = 0) -> str:
    """Write a series of scrapes of which only every other reached the replica."""
    return " ".join(["_"] * first + [f"{value} {'_ ' * (every - 1)}".strip() for value in values])


def expects(expression: str, value: float, **labels: str) -> dict[str, Any]:
    """Return what promtool is to find for an expression."""
    told = ",".join(f'{key}="{text}"' for key, text in labels.items())
    name = expression.partition("{")[0]
    sample = {"labels": f"{name}{{{told}}}", "value": value}
    return {"expr": expression, "eval_time": "80m", "exp_samples": [sample]}


def fires(alert: str, severity: str, **labels: str) -> dict[str, Any]:
    """Return that an alert fires once, with these labels."""
    own = {"alertname": alert, "alertstate": "firing"}
    selected = ",".join(f'{key}="{text}"' for key, text in own.items())
    return expects(f"ALERTS{{{selected}}}", 1, **own, severity=severity, **labels)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_rules_see_through_replicas_and_killed_jobs(tmp_path: Path) -> None:
    """Scrapes of every 15 s reach two replicas in turn; each answers a request a second."""
    count = range(0, 30 * 200, 30)
    one, two = 'instance="a",replica="1"', 'instance="a",replica="2"'
    series = {
        f'pathflip_requests_total{{{one},route="r",status="200"}}': scraped(*count),
        f'pathflip_requests_total{{{two},route="r",status="500"}}': scraped(*count, first=1),
        f'pathflip_part_up{{{one},part="search"}}': scraped(*[0] * 200),
        f'pathflip_part_up{{{two},part="search"}}': scraped(*[0] * 200, first=1),
        f'pathflip_part_up{{{one},part="tiles"}}': scraped(*[0, 1] * 100),  # it comes and goes
        f"pathflip_slides{{{one}}}": scraped(*[12] * 200),
        f"pathflip_slides_indexed{{{two}}}": scraped(*[9] * 200, first=1),
        'pathflip_job_running{run="killed"}': "1x400",
        'pathflip_job_updated_timestamp_seconds{run="killed"}': "60x400",
        'pathflip_job_running{run="ended"}': "0x400",
        'pathflip_job_updated_timestamp_seconds{run="ended"}': "60x400",
    }
    expected = [
        expects("pathflip:requests:rate5m", 2, instance="a", route="r"),
        expects("pathflip:errors:ratio5m", 0.5, instance="a"),
        expects("pathflip:index_lag:slides", 3, instance="a"),
        fires("PathflipErrors", "critical", instance="a"),
        fires("PathflipPartDown", "critical", instance="a", part="search"),
        fires("PathflipJobStalled", "warning", run="killed"),
    ]
    inputs = [{"series": name, "values": values} for name, values in series.items()]
    test = {"interval": "15s", "input_series": inputs, "promql_expr_test": expected}
    document = {
        "rule_files": [str(FOLDER / "rules.yaml")], "evaluation_interval": "15s", "tests": [test],
    }  # fmt: skip
    file = tmp_path / "scrapes.yaml"
    file.write_text(yaml.safe_dump(document))
    done = subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_accepts_rules_and_configuration(tmp_path: Path) -> None:
    for what, file in (("rules", "rules.yaml"), ("config", "prometheus.yaml")):
        command = ["promtool", "check", what, *(["--syntax-only"] * (what == "config"))]
        done = subprocess.run([*command, str(FOLDER / file)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    panels = [
        {"record": "panel:checked", "expr": expression.replace("$__rate_interval", "5m")}
        for _, expression in expressions()
    ]
    (tmp_path / "panels.yaml").write_text(
        yaml.safe_dump({"groups": [{"name": f"of-{at}", "rules": [panel]}
                                   for at, panel in enumerate(panels)]})
    )  # fmt: skip
    command = ["promtool", "check", "rules", "--lint=none", str(tmp_path / "panels.yaml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
