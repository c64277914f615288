"""Lines and tables that the demo prints."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jobs.ingest.result import IngestResult
    from pathflip.archive import Archive


def program() -> str:
    """Return the command to call, as it can be called here."""
    beside = Path(sys.executable).with_name("pathflip")
    on_path = shutil.which("pathflip")
    return "pathflip" if on_path or not beside.exists() else shlex.quote(shown(str(beside)))


def quoted(path: str) -> str:
    """Return a path for a shell; see :func:`shown`."""
    return shlex.quote(shown(path))


def shown(path: str) -> str:
    """Return a path, relative to the working directory where it lies in it."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path


def print_summary(
    archive: Archive, result: IngestResult, seconds: dict[str, float], *, planted: Sequence[str]
) -> None:
    """Print what is in the archive, what took how long, and what was quarantined."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    stats = archive.stats()
    run = result.as_json()
    done = {name: n for name, n in run["slides"].items() if n}
    speed = f"{run['patches_per_second']:,.0f}" if run["patches"] else "nothing was left to read"
    table = Table(title="pathflip demo", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for name, value in (
        ("slides in the archive", _listed(stats["status"])),
        ("in this run", _listed(done)),
        ("regions", f"{stats['regions']:,}"),
        ("patches", f"{stats['patches']:,}"),
        ("patches/s", speed),
        *((name, f"{took:,.1f} s") for name, took in seconds.items()),
        ("archive size", f"{stats['bytes'] / 1e6:,.1f} MB"),
    ):
        table.add_row(name, value)
    console = Console()
    console.print(table)
    columns = ["uri", "reason", "message"]
    bad = archive.slides("quarantined", columns=columns).to_pylist()
    if not bad:
        return
    faults = Table(title="quarantined", title_justify="left", caption_justify="left")
    if planted:
        faults.caption = "Files spoilt on purpose show what happens to bad ones; they are no error."
    for heading in ("file", "reason", "what is wrong"):
        faults.add_column(heading, overflow="fold")
    for row in bad:
        name = Path(row["uri"]).name
        note = " (spoilt on purpose)" if name in planted else ""
        faults.add_row(escape(name + note), row["reason"], escape(row["message"] or ""))
    console.print(faults)


def print_results(
    document: dict[str, Any],
    vqa: dict[str, Any],
    captions: dict[str, Any],
    *,
    everyday: dict[str, Any] | None,
) -> None:
    """Print what was measured on the test slides beside chance.

    Args:
        document: Evaluation of the slide model.
        vqa: Evaluation of its answers.
        captions: Evaluation of its captions.
        everyday: Evaluation of the slide model in words that no caption has, where it was made.
    """
    from rich.console import Console
    from rich.table import Table

    from pathflip.evaluation.suite import headline

    table = Table(title="on the test slides", title_justify="left")
    for heading in ("measured", "found", "chance"):
        table.add_column(heading, justify="left" if heading == "measured" else "right")
    rows = dict(headline(document))
    if everyday is not None:
        for name, found in headline(everyday).items():
            if name in ("presence auc", "pointing", "patch ap"):
                rows[f"{name}, in words no caption has"] = found
    rows["questions"] = (vqa["accuracy"], vqa["majority_baseline"])
    if vqa.get("swapped"):
        rows["questions, another slide shown"] = (vqa["swapped"]["accuracy"], None)
    plain = captions["baseline"]
    if findings := captions.get("findings"):
        rows["findings named"] = (findings["named"], plain["findings"]["named"])
        rows["absent findings named"] = (findings["invented"], plain["findings"]["invented"])
    rows["sentences no image supports"] = (captions["unsupported"]["share"], None)
    if calibration := vqa.get("calibration"):
        rows["calibration error of choices"] = (calibration["ece"], None)
    if silent := vqa.get("abstaining"):
        rows["unanswerable questions abstained from"] = (silent["recall"], None)
    rows["bleu-1"] = (captions["bleu1"], plain["bleu1"])
    rows["rouge-l"] = (captions["rouge_l"], plain["rouge_l"])
    for name, values in rows.items():
        table.add_row(name, *("" if value is None else f"{value:.3f}" for value in values))
    table.caption = (
        "Beside questions stands the majority answer, beside captions one caption for all slides."
    )
    Console().print(table)


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{n:,} {name}" for name, n in sorted(counts.items())) or "none"
