"""The dashboard and the rules: every expression reads metrics and labels that are exported."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from pathflip.archive import Archive
from serve.chat import count_tokens
from tests.unit.serve.service_fixture import REGIONS, SLIDES

FOLDER = Path(__file__).resolve().parents[3] / "platform" / "observability"
RULES = yaml.safe_load((FOLDER / "rules.yaml").read_text())
BOARD = json.loads((FOLDER / "dashboard.json").read_text())

OF_PROMETHEUS = {"up": {"instance", "job"}}
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
def known(exported: dict[str, set[str]]) -> dict[str, set[str]]:
    """Time series that an expression may read: exported ones, and what the rules record."""
    there = OF_PROMETHEUS | {name: labels | SCRAPED for name, labels in exported.items()}
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
