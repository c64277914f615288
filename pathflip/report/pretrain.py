"""Report of a pretrained model: training curves, metrics, search results, grounding.

Pictures are not picked by hand: each finding is shown on the first slide, by id, that has it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pathflip.archive import Archive
from pathflip.display import data_uri
from pathflip.errors import ConfigError
from pathflip.report.page import about_run, metric_row, slide_view, write_page

if TYPE_CHECKING:
    from pathflip.checkpoints import Run
    from pathflip.evaluation.prompts import Suite

CHART = (470, 230)
"""Inside of a chart, px."""
EXAMPLES = 8
HITS = 5
PICTURE_PX = 320
HIT_PX = 150
MAX_POINTS = 240
"""Most points of a curve; longer ones are averaged, so that the page stays small."""


def write_pretrain_report(
    archive: Archive | str,
    run: Run,
    document: Mapping[str, Any],
    path: str | Path,
    *,
    suite: Suite | None = None,
    truth: str | Path | None = None,
    title: str = "Pretraining results",
) -> Path:
    """Write the report of a pretraining run as one self-contained HTML file.

    Args:
        archive: The archive it was measured on, or its URI.
        run: The run, loaded; its folder's metrics.jsonl, result.json and ablations are shown
            where they are.
        document: Results of :func:`pathflip.evaluation.suite.evaluate_all`.
        path: The HTML file; replaced whole.
        suite: Its tasks: the texts that slides are searched with and that are drawn on them.
        truth: Outlines, see :func:`pathflip.evaluation.grounding.read_outlines`.
        title: Heading of the page.

    Returns:
        The path.

    Raises:
        ArchiveError: The archive cannot be read.
        OSError: The file cannot be written.
    """
    archive = Archive(archive) if isinstance(archive, str) else archive
    lines = _read_lines(run.path / "metrics.jsonl")
    result = _read_json(run.path / "result.json")
    searches, examples = _pictures(archive, run, document, suite=suite, truth=truth)
    return write_page(
        "pretrain.html",
        Path(path),
        title=title,
        archive=archive.uri,
        run=about_run(run) | {"path": str(run.path), "tiling": archive.tiling()},
        result={key: result.get(key) for key in ("steps", "seconds", "best_step")},
        document=document,
        headline=_headline(document),
        charts=_charts(lines, result),
        groups=_groups(document),
        searches=searches,
        examples=examples,
        ablations=_ablations(_read_json(run.path / "ablations" / "ablations.json")),
        settings=_settings(run.config),
    )


# -- curves ---------------------------------------------------------------------------------------


def _charts(lines: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the charts of metrics.jsonl: both losses, validation recall, the learning rate."""
    steps = [line for line in lines if "val" not in line]
    vals = [line for line in lines if "val" in line]
    best = result.get("best_step")
    charts = []
    for key, name in (("loss_slide", "Slide loss (global)"), ("loss_region", "Region loss (fine)")):
        series = [
            ("train", _points(steps, lambda line, key=key: line.get(key)), 1, ""),
            ("validation", _points(vals, lambda line, key=key: line["val"].get(key)), 2, ""),
        ]
        charts.append(_chart(name, series, best=best))
    series = []
    vals = [line for line in vals if "itr" in line["val"]]  # a tuning judges by its loss alone
    for nth, key in enumerate(("r@1", "r@5", "r@10"), start=1):
        mean = _points(
            vals, lambda line, key=key: (line["val"]["itr"][key] + line["val"]["tir"][key]) / 2
        )
        chance = _points(vals, lambda line, key=key: line["val"].get("chance", {}).get(key))
        series += [(key.upper(), mean, nth, ""), ("", chance, nth, "chance")]
    charts.append(_chart("Validation recall, mean of both ways; dotted: chance", series, best=best))
    rate = _points(steps, lambda line: line.get("lr"))
    charts.append(_chart("Learning rate", [("", rate, 1, "")]))
    return [chart for chart in charts if chart]


def _points(lines: Sequence[Mapping[str, Any]], value: Any) -> list[tuple[float, float]]:
    """Return (step, value) of the lines that have one, averaged to a drawable number."""
    points = [(float(line["step"]), value(line)) for line in lines]
    known = np.array([p for p in points if p[1] is not None and math.isfinite(p[1])], np.float64)
    if len(known) > MAX_POINTS:
        parts = np.array_split(known, MAX_POINTS)
        known = np.array([part.mean(axis=0) for part in parts])
    return [(float(x), float(y)) for x, y in known]


def _chart(
    name: str,
    series: Sequence[tuple[str, list[tuple[float, float]], int, str]],
    *,
    best: float | None = None,
) -> dict[str, Any] | None:
    """Return paths and ticks of a line chart in px; None without a point."""
    drawn = [entry for entry in series if entry[1]]
    if not drawn:
        return None
    every = np.array([point for _, points, _, _ in drawn for point in points])
    width, height = CHART
    most_x = max(float(every[:, 0].max()), 1.0)
    low, high = min(0.0, float(every[:, 1].min())), float(every[:, 1].max()) or 1.0
    x_ticks, y_ticks = _ticks(0, most_x), _ticks(low, high)
    low, high = min(low, y_ticks[0]), max(high, y_ticks[-1])

    def place(x: float, y: float) -> str:
        return f"{width * x / most_x:.1f} {height * (1 - (y - low) / (high - low)):.1f}"

    return {
        "name": name,
        "width": width,
        "height": height,
        "x_ticks": [(width * x / most_x, _tick(x)) for x in x_ticks],
        "y_ticks": [(height * (1 - (y - low) / (high - low)), _tick(y)) for y in y_ticks],
        "series": [
            {
                "label": label,
                "path": "M" + "L".join(place(x, y) for x, y in points),
                "last": place(*points[-1]).split(),
                "value": points[-1][1],
                "number": number,
                "style": style,
            }
            for label, points, number, style in drawn
        ],
        "best": None if best is None else width * min(best, most_x) / most_x,
    }


def _ticks(low: float, high: float, *, most: int = 6) -> list[float]:
    """Return round numbers between two, at most so many."""
    span = (high - low) or 1.0
    step = 10 ** math.floor(math.log10(span / most))
    step = next(step * by for by in (1, 2, 5, 10, 20) if span / (step * by) <= most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _tick(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 10 or value == 0 else f"{value:.2g}"


# -- numbers --------------------------------------------------------------------------------------


def _headline(document: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return (number, label, its chance) of the tiles at the top."""
    tiles = []
    if retrieval := document.get("retrieval"):
        for way, name in (("itr", "slide to caption"), ("tir", "caption to slide")):
            chance = f"R@5, chance {retrieval['chance']['r@5']:.3f}"
            tiles.append((f"{retrieval[way]['r@5']:.3f}", name, chance))
    summary = document.get("zeroshot_summary") or {}
    if "auc" in summary.get("presence", {}):
        mean = summary["presence"]
        note = f"mean AUC of {mean['tasks']}, chance 0.5"
        tiles.append((f"{mean['auc']:.3f}", "presence of findings", note))
    if grounding := document.get("grounding"):
        for key, name in (("pointing", "pointing game"), ("patch_ap", "patch AP")):
            if grounding[key] is not None:
                tiles.append(
                    (f"{grounding[key]:.3f}", name, f"chance {grounding[f'{key}_chance']:.3f}")
                )
    return tiles


def _groups(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the table of metrics: rows with value, interval, chance and a baseline, by suite."""
    groups = []
    for key, name in (
        ("retrieval", "Retrieval, galleries of 64"),
        ("retrieval_full", "Retrieval, all slides as gallery"),
    ):
        if found := document.get(key):
            rows = []
            for way, asks in (("itr", "slide → caption"), ("tir", "caption → slide")):
                for k, value in found[way].items():
                    spread = found.get("shuffled", {}).get(way, {}).get(k)
                    note = f"shuffled {spread['mean']:.3f} ± {spread['sd']:.3f}" if spread else ""
                    interval = found.get("ci", {}).get(way, {}).get(k)
                    rows.append(
                        metric_row(f"{asks} {k.upper()}", value, interval, found["chance"][k], note)
                    )
            groups.append({"name": name, "note": f"{found['n']} slides", "rows": rows})
    tasks = document.get("zeroshot") or {}
    kinds = (
        ("presence", "Presence of findings, AUC"),
        ("binary", "Properties, AUC"),
        ("multiclass", "Classes, balanced accuracy"),
    )
    for kind, name in kinds:
        rows = []
        for task, found in tasks.items():
            if found["kind"] != kind:
                continue
            if kind == "multiclass":
                chance = found["baseline"]["balanced_accuracy"]
                note = (
                    ""
                    if found["accuracy"] is None
                    else f"accuracy {found['accuracy']:.3f}, majority "
                    f"{found['baseline']['accuracy']:.3f} · AUC {_three(found['auc'])}"
                )
                rows.append(
                    metric_row(task, found["balanced_accuracy"], None, chance, note, n=found["n"])
                )
            else:
                note = f"AP {_three(found['ap'])}, prevalence {found['baseline']['ap']:.3f}"
                patient = found["patient"]["auc"]
                if patient is not None and found["patient"]["n"] < found["n"]:
                    note += f" · patients {_three(patient)}"
                negation = found["auc_by"].get("global/negation")
                if kind == "presence" and negation is not None:
                    note += f" · against a negated prompt {_three(negation)}"
                rows.append(metric_row(task, found["auc"], found["ci"], 0.5, note, n=found["n"]))
        if rows:
            groups.append({"name": name, "note": "", "rows": rows})
    if (found := document.get("grounding")) and found["n"]:
        for key, name in (("pointing", "Grounding: pointing game"), ("patch_ap", "Patch AP")):
            rows = [metric_row("all", found[key], found["ci"] and found["ci"][key],
                         found[f"{key}_chance"], "", n=found["n"])]  # fmt: skip
            rows += [
                metric_row(what, one[key], one["ci"] and one["ci"][key], one[f"{key}_chance"],
                     found["queries"].get(what, ""), n=one["n"])
                for what, one in found["findings"].items()
            ]  # fmt: skip
            note = f"variant {found['variant']}; smoothed as drawn {found['smoothed'][key]:.3f}"
            groups.append({"name": name, "note": note, "rows": rows})
    return groups


def _ablations(document: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return metrics down, ablations across; each with its difference from full."""
    if not document.get("table"):
        return None
    names = list(document["table"])
    metrics = list(dict.fromkeys(key for name in names for key in document["table"][name]))
    rows = []
    for key in metrics:
        cells = []
        for name in names:
            cell = document["table"][name].get(key) or {"mean": None, "sd": None}
            gap = document["difference"].get(name, {}).get(key)
            sure = bool(gap and gap["ci"] and gap["ci"][0] > 0)
            cells.append({**cell, "gap": gap and gap["mean"], "sure": sure})
        rows.append({"name": key, "cells": cells, "chance": document["chance"].get(key)})
    return {"names": names, "rows": rows, "seeds": document["seeds"], "split": document["split"]}


def _settings(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for key, value in config.items():
        if isinstance(value, Mapping):
            rows += [(f"{key}.{inner}", text) for inner, text in _settings(value)]
        else:
            rows.append((key, json.dumps(value) if not isinstance(value, str) else value))
    return rows


def _three(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


# -- pictures -------------------------------------------------------------------------------------


def _pictures(
    archive: Archive,
    run: Run,
    document: Mapping[str, Any],
    *,
    suite: Suite | None,
    truth: str | Path | None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return slides found by text, and heat beside outlines, of the measured split."""
    from pathflip.evaluation.encode import encode, has_regions, list_slides
    from pathflip.evaluation.grounding import queries_of, read_outlines
    from pathflip.evaluation.zeroshot import suite_texts, task_score, text_scores

    if suite is None or not (queries := queries_of(suite)):
        return [], []
    split = document["split"]
    slides = list_slides(archive, run, splits=None if split == "all" else (split,))
    try:
        outlines = read_outlines(archive, slides, findings=set(queries), truth=truth)
    except ConfigError:
        outlines = {}
    scores = text_scores(run, encode(archive, run, slides=slides, texts=suite_texts(suite)))
    searches = []
    for task in suite.tasks:
        if task.kind != "presence":
            continue
        values = task_score(task, scores, suite)
        known = [task.is_positive(slide.labels.get(task.label)) for slide in slides]
        labelled = [value for value in known if value is not None]
        order = np.argsort(-values, kind="stable")[:HITS]
        hits = [
            {
                "slide_id": slides[i].slide_id,
                "score": float(values[i]),
                "right": known[i],
                "view": slide_view(archive.slide(slides[i].slide_id), HIT_PX),
                "outlines": _paths(outlines.get(slides[i].slide_id, {}).get(task.label, ())),
            }
            for i in order
        ]
        searches.append(
            {
                "text": queries[task.label],
                "finding": task.name,
                "hits": hits,
                "share": float(np.mean(labelled)) if labelled else None,
            }
        )
    examples: list[dict[str, Any]] = []
    for finding, text in queries.items():
        first = next((s for s in slides if finding in outlines.get(s.slide_id, {})), None)
        if first is not None and len(examples) < EXAMPLES and has_regions(run):
            polygons = outlines[first.slide_id][finding]
            examples.append(_example(archive, run, first.slide_id, finding, text, polygons))
    return searches, examples


def _example(
    archive: Archive, run: Run, slide_id: str, finding: str, text: str, polygons: Sequence[Any]
) -> dict[str, Any]:
    """Return a slide with the outline of a finding, and beside it the heat of its text."""
    import cv2

    from pathflip.evaluation.ground_slide import ground_slide
    from pathflip.evaluation.grounding import point
    from pathflip.slides.outlines import inside

    found = ground_slide(archive, run, slide_id, text)
    centres = found.rects[:, :2] + found.rects[:, 2:] / 2
    right = inside(centres, polygons)
    view = slide_view(found.slide, PICTURE_PX)
    picture = ""
    if view is not None:
        drawn = found.picture(boxes=False)
        scale = PICTURE_PX / max(drawn.shape[:2])
        side = (max(1, round(drawn.shape[1] * scale)), max(1, round(drawn.shape[0] * scale)))
        small = np.asarray(cv2.resize(drawn, side, interpolation=cv2.INTER_AREA), np.uint8)
        picture = data_uri(_jpeg(small))
    hottest = int(np.argmax(found.heat))
    return {
        "slide_id": slide_id,
        "finding": finding,
        "text": text,
        "view": view,
        "heat": {**view, "uri": picture} if view else None,
        "outlines": _paths(polygons),
        "boxes": [(b.x0, b.y0, b.w0, b.h0, f"heat {b.score:.2f}") for b in found.boxes],
        "hottest": [round(float(v), 1) for v in centres[hottest]],
        "right": point(found.heat, right) > 0.5 if right.any() else None,
        "chance": float(right.mean()),
        "radius": round(found.slide["width"] / 60),
    }


def _paths(polygons: Sequence[Any]) -> str:
    """Return an SVG path of outlines in level-0 px."""
    parts = []
    for outer, holes in polygons:
        for ring in (outer, *holes):
            points = np.rint(np.asarray(ring)).astype(np.int64).tolist()
            parts.append("M" + "L".join(f"{x} {y}" for x, y in points) + "Z")
    return "".join(parts)


def _jpeg(rgb: NDArray[np.uint8]) -> bytes:
    import simplejpeg

    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(rgb), quality=85))


# -- files of the run -----------------------------------------------------------------------------


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl, without one that a dying process cut short."""
    lines = []
    if path.exists():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict) and isinstance(line.get("step"), int | float):
                lines.append(line)
    return lines


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
