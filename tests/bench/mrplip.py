"""Benchmark of MR-PLIP: ``python -m tests.bench.mrplip --json``.

Parts: ``step`` (a training step beside plain formulations), ``trees`` (reading them beside bare
reads), ``keywords`` (captions a second), ``memory`` (of training's data as trees become more),
``tiles`` (``evaluate tiles`` with ``texture``). Each says what it measures where it is defined, in
``mrplip_<part>.py``. Seconds are CPU seconds, sides of a ratio take turns in one process, and the
best of some rounds counts, so that other load on the machine disturbs little.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable
from typing import Any

from tests.bench.ingest import rounded, say

Report = dict[str, Any]


def step(quick: bool) -> Report:
    """Measure a step beside the plain form; losses within 1e-6, relative where they are above 1."""
    from tests.bench import mrplip_step

    found = mrplip_step.measure(quick=quick)
    gap = max(found["loss_gap_edges"], found["loss_gap_bags"])
    return found | {
        "targets": {"ratio_edges": 4.0, "loss_gap": 1e-6},
        "losses_equal": gap <= 1e-6,
        "ok": gap <= 1e-6 and found["ratio_edges"] >= 4,
    }


def trees(quick: bool) -> Report:
    """Measure trees read by the job's actor beside bare reads with the same scores."""
    from tests.bench import mrplip_trees

    layouts = ("generic",) if quick else ("generic", "aperio")
    found = mrplip_trees.measure(side=1 if quick else 2, rounds=1 if quick else 6, layouts=layouts)
    ratios = [found[layout]["ratio"] for layout in layouts]
    return found | {"targets": {"ratio": 0.9}, "ok": min(ratios) >= 0.9}


def keywords(quick: bool) -> Report:
    """Measure captions a second, of sentences that recur and of new ones."""
    from tests.bench import mrplip_keywords

    found = mrplip_keywords.measure(3 if quick else 40)
    rates = [found[name]["captions_a_second"] for name in ("repeated", "distinct")]
    return found | {"targets": {"captions_a_second": 20_000}, "ok": min(rates) >= 20_000}


def memory(quick: bool) -> Report:
    """Measure peak memory at N and 4 N trees; flat: within a twentieth."""
    from tests.bench import mrplip_memory

    found = mrplip_memory.measure(64 if quick else 1_000)
    return found | {"targets": {"ratio": 1.05}, "ok": found["ratio"] <= 1.05}


def tiles(quick: bool) -> Report:
    """Measure 10,000 tiles, which may take a minute of one core."""
    from tests.bench import mrplip_tiles

    found = mrplip_tiles.measure(90 if quick else 10_000)
    return found | {"targets": {"cpu_s": 60.0}, "ok": found["cpu_s"] <= 60}


PARTS: dict[str, Callable[[bool], Report]] = {
    "step": step, "trees": trees, "keywords": keywords, "memory": memory, "tiles": tiles,
}  # fmt: skip


def main(given: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.mrplip", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all")
    parser.add_argument("--only", choices=PARTS, action="append", help="one part; repeatable")
    arguments = parser.parse_args(given)
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # idle threads spin
        os.environ.setdefault(variable, "1")
    report: Report = {}
    load = [os.getloadavg()[0]]
    for name in arguments.only or PARTS:
        say(name)
        report[name] = PARTS[name](arguments.quick)
        load.append(os.getloadavg()[0])
    report["machine"] = {
        "cpus": len(os.sched_getaffinity(0)),
        "load_average": load,
        "python": platform.python_version(),
        "quick": arguments.quick,
    }
    report = rounded(report)
    if arguments.json:
        print(json.dumps(report, indent=1))
        return
    for name, found in report.items():
        print(name, json.dumps(found))


if __name__ == "__main__":
    main()
