"""Report of a patch model on trees of planted truth: what each level sees, and all pooled.

Pyramids are not picked by hand: they are the first test tree, by id, of each architecture.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from pathflip.archive import Archive
from pathflip.archive.tree_texts import decode_keywords
from pathflip.archive.trees import read_trees, tree_spec
from pathflip.display import data_uri
from pathflip.evaluation.patch_text import PatchReader, class_weights, patch_reader
from pathflip.evaluation.prompts import PLACEHOLDER, read_classes
from pathflip.evaluation.tree_vectors import TreeVectors, encode_trees, keyword_bank
from pathflip.evaluation.trees import CUES, TreeTruth, cue_scores, find_truth, read_truth, take
from pathflip.geometry import LEVEL_OF, level_name
from pathflip.interop.tree_images import tree_reader
from pathflip.report.page import about_run, metric_row, write_page
from pathflip.report.trees import SIDE_PX, node_texts, pyramid, tree_texts
from pathflip.slides.reader import SlideReader
from pathflip.slides.staging import opened

if TYPE_CHECKING:
    from pathflip.checkpoints import TreeRun

ACROSS = (1, 2, 4, 2)
"""Nodes across that are shown of each level: of 40x one of each quadrant, as large as they are."""
KEYWORDS = 6
"""Keywords shown of a level, at most."""
HITS, HIT_PX = 6, 256
BEST = 100
"""Patches that a search is judged by."""
_NO_TEXT: dict[str, Any] = {"captions": [], "keywords": [], "keyword_of": None}
_QUADRANTS = ("upper left", "upper right", "lower left", "lower right")


def write_patches_report(
    archive: Archive,
    run: TreeRun,
    document: Mapping[str, Any],
    path: str | Path,
    *,
    meanings: Mapping[str, str],
    title: str = "Patch trees of planted truth",
) -> Path:
    """Write the report of a patch model as one self-contained HTML file.

    Patches are searched for where the archive has the model's own vectors, ``mrplip:RUN``.

    Args:
        archive: Archive with trees, their captions, and ``trees.csv`` beside its slides.
        run: The run.
        document: Results of :func:`pathflip.evaluation.trees.evaluate_trees` on the same archive.
        path: The HTML file; replaced whole.
        meanings: {keyword: the class it names}, to say which keywords are right.
        title: Heading of the page.

    Returns:
        The path.

    Raises:
        ArchiveError: The archive cannot be read.
        ConfigError: There is no truth (``no_truth``), or the file cannot be written.
        SlideError: A slide that is shown cannot be read.
    """
    reader = patch_reader(run, pixels=False)
    file, split = find_truth(archive), document["split"]
    classes = {cue: read_classes(str(file.parent / "classes" / f"{cue}.yaml")) for cue in CUES}
    trees = encode_trees(archive, reader, splits=None if split == "all" else (split,))
    truth = read_truth(file, trees, {cue: list(names) for cue, names in classes.items()})
    return write_page(
        "patches.html",
        Path(path),
        title=title,
        archive=archive.uri,
        run=about_run(run),
        document=document,
        headline=_headline(document),
        groups=_groups(document),
        prompts={
            name: prompts[0] for of_cue in classes.values() for name, prompts in of_cue.items()
        },
        quadrants=_QUADRANTS,
        examples=_examples(archive, run, reader, trees, truth, classes, meanings=meanings),
        searches=_searches(archive, run, trees, truth, split=split),
        nearest=run.model.config.keywords,
        side=SIDE_PX,
    )


# -- numbers --------------------------------------------------------------------------------------


def _headline(document: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return (number, label, comparison) of the tiles at the top."""
    joint = document["joint"]
    best, gain = joint["best_level"], joint["pooled_minus_best"]["difference"]
    tiles = [
        (joint["pooled"]["accuracy"], "both right, levels pooled", f"chance {joint['chance']:.3f}"),
        (joint["levels"][best]["accuracy"], f"both right, {best} alone", "the best single level"),
    ]
    for cue in CUES:
        own = document[cue]
        tiles.append((own["pooled"]["accuracy"], f"{cue}, pooled", f"chance {own['chance']:.3f}"))
    shown = [(f"{value or 0:.3f}", name, note) for value, name, note in tiles]
    return [*shown[:2], (f"{gain or 0:+.3f}", "pooled − best level", "both right"), *shown[2:]]


def _groups(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the table of metrics: every level and all pooled, by task."""
    names = {
        "joint": "Both right: the tree's architecture and a quadrant's nuclei",
        "architecture": "Architecture of the tree",
        "nuclei": "Nuclei of a quadrant",
    }
    groups = []
    for task, name in names.items():
        found = document[task]
        gain = found["pooled_minus_best"]
        low, high = gain.get("ci") or (None, None)
        note = f"pooled − {found['best_level']}: {gain['difference'] or 0:+.3f}"
        note += "" if low is None else f" ({low:+.3f} to {high:+.3f})"
        rows = [
            metric_row(level, one["accuracy"], one.get("ci"), found["chance"],
                       "best single level" if level == found["best_level"] else "")
            for level, one in found["levels"].items()
        ]  # fmt: skip
        pooled = found["pooled"]
        rows.append(
            metric_row("pooled", pooled["accuracy"], pooled.get("ci"), found["chance"], note)
        )
        groups.append(
            {"name": name, "note": "", "rows": [{**row, "n": found["n"]} for row in rows]}
        )
    return groups


# -- pyramids -------------------------------------------------------------------------------------


def _examples(
    archive: Archive,
    run: TreeRun,
    reader: PatchReader,
    trees: TreeVectors,
    truth: TreeTruth,
    classes: Mapping[str, Mapping[str, Sequence[str]]],
    *,
    meanings: Mapping[str, str],
) -> list[dict[str, Any]]:
    """Return the first tree of each architecture: pictures, texts, answers beside the truth."""
    shown = _firsts(trees, truth)
    source = run.config.get("source")
    bank = keyword_bank(archive, reader, source=source)
    words = reader.texts(bank)
    weights = {
        cue: class_weights(reader, names, templates=(PLACEHOLDER,))
        for cue, names in classes.items()
    }
    stored = read_trees(archive)
    found = []
    with tree_reader(tree_spec(archive)) as slides:
        for at in shown:
            tree_id = trees.tree_ids[at]
            (tree,) = stored.filter(pc.equal(stored["tree_id"], tree_id)).to_pylist()
            texts = tree_texts(archive, tree)
            text = next((row for row in texts if source in (None, row["source"])), _NO_TEXT)
            captions = node_texts(text["captions"])
            planted = _planted(truth, at)
            levels = pyramid(
                archive, slides, tree, across=ACROSS,
                titles={one["node"]: one["text"] for one in captions},
            )  # fmt: skip
            said = _said(text)
            chosen = _chosen(trees, at, words, bank, most=run.model.config.keywords)
            for level, one in enumerate(levels):
                one["said"] = _chips(said[level], meanings, planted)
                one["chosen"] = _chips(chosen[level], meanings, planted)
            found.append(
                {
                    "tree_id": tree_id,
                    "levels": levels,
                    "rows": _answers(reader, trees, at, truth, weights),
                    "planted": planted,
                    "captions": captions,
                }
            )  # fmt: skip
    return found


def _firsts(trees: TreeVectors, truth: TreeTruth) -> list[int]:
    """Return the first tree of each architecture, each on another slide where there is one."""
    found: list[int] = []
    for one in range(len(truth.classes["architecture"])):
        shown = {trees.slides[at].slide_id for at in found}
        own = np.flatnonzero(truth.architecture == one).tolist()
        own.sort(key=lambda at: trees.slides[at].slide_id in shown)  # a stable sort
        found += own[:1]
    return found


def _planted(truth: TreeTruth, at: int) -> list[str]:
    """Return the classes of a tree: its architecture, and the nuclei of its quadrants."""
    return [
        truth.classes["architecture"][truth.architecture[at]],
        *(truth.classes["nuclei"][one] if one >= 0 else "" for one in truth.nuclei[at]),
    ]


def _answers(
    reader: PatchReader,
    trees: TreeVectors,
    at: int,
    truth: TreeTruth,
    weights: Mapping[str, NDArray[np.float32]],
) -> list[dict[str, Any]]:
    """Return what each level of a tree answers, and what all pooled do, beside the truth."""
    one = take(trees, np.array([at]))
    there = [level for level in reader.levels if one.mask[0, level == LEVEL_OF].any()]
    planted = _planted(truth, at)
    rows = []
    for level in [*there, None]:
        levels = there if level is None else (level,)
        asked = [("architecture", None), *(("nuclei", quadrant) for quadrant in range(4))]
        cells: list[dict[str, Any]] = []
        for (cue, quadrant), true in zip(asked, planted, strict=True):
            (scores,) = cue_scores(
                one, weights[cue], tau=reader.tau, quadrant=quadrant, levels=levels
            )
            if not true or np.isnan(scores).any():
                cells.append({"answer": "–", "score": None, "right": None})
                continue
            answer = truth.classes[cue][int(scores.argmax())]
            cells.append({"answer": answer, "score": float(scores.max()), "right": answer == true})
        right = [cells[0]["right"] and cell["right"] for cell in cells[1:] if cell["answer"] != "–"]
        rows.append(
            {
                "name": "pooled" if level is None else level_name(reader.level_mpp[level]),
                "cells": cells,
                "joint": f"{sum(map(bool, right))} of {len(right)}",
            }
        )
    return rows


def _said(text: Mapping[str, Any]) -> dict[int, Counter[str]]:
    """Return {level: how many of its nodes' captions have a keyword}.

    Of training trees these are the positives; of test trees no model has read them.
    """
    found: dict[int, Counter[str]] = {level: Counter() for level in range(4)}
    if text["keyword_of"]:
        keywords = decode_keywords(text["keywords"], text["keyword_of"])
        for node, level in enumerate(LEVEL_OF.tolist()):
            found[level].update(keywords.of(node))
    return found


def _chosen(
    trees: TreeVectors, at: int, words: NDArray[np.float32], bank: Sequence[str], *, most: int
) -> dict[int, Counter[str]]:
    """Return {level: how many of its nodes have a keyword of training trees among their nearest}.

    These are the keywords beside which a text-guided vector sees a patch.
    """
    near = np.argsort(-(trees.vectors[at] @ words.T), axis=1, kind="stable")[:, :most]
    return {
        level: Counter(bank[word] for word in near[trees.mask[at] & (level == LEVEL_OF)].flat)
        for level in range(4)
    }


def _chips(
    counts: Counter[str], meanings: Mapping[str, str], planted: Sequence[str]
) -> list[tuple[str, int, str]]:
    """Return (keyword, nodes, verdict) of the most frequent keywords; verdict "" of other words."""
    ranked = sorted(counts.items(), key=lambda one: (-one[1], one[0]))

    def verdict(word: str) -> str:
        if word not in meanings:
            return ""
        return "right" if meanings[word] in planted else "invented"

    return [(word, count, verdict(word)) for word, count in ranked[:KEYWORDS]]


# -- search ---------------------------------------------------------------------------------------


def _searches(
    archive: Archive, run: TreeRun, trees: TreeVectors, truth: TreeTruth, *, split: str
) -> list[dict[str, Any]]:
    """Return single patches of the split that each type of nuclei finds by its name."""
    from pathflip.archive.filters import Filter
    from pathflip.encoders import patch_model
    from pathflip.search import Query, embed_texts, run_query

    patch_um = float(archive.tiling()["patch_um"])
    name = patch_model(f"mrplip:{run.path}", patch_um=patch_um).info.name
    if name not in archive.encoders():
        return []
    among = [] if split == "all" else [Filter(field="split", op="=", value=split)]
    places = {
        (slide.slide_id, int(tx), int(ty)): at
        for at, (slide, tx, ty) in enumerate(zip(trees.slides, trees.tx, trees.ty, strict=True))
    }
    searches = []
    with SlideReader(patches=1, px=16) as reader:
        for at, nuclei in enumerate(truth.classes["nuclei"]):
            text = f"{nuclei} nuclei"
            query = Query(
                text=text, vector=embed_texts(run, [text])[0], level="patch", k=BEST,
                filters=among, encoder=name,
            )  # fmt: skip
            rows = run_query(archive, query).to_pylist()
            shown = [_nuclei_at(archive, row, places, truth) for row in rows]
            judged = [one == nuclei for one in shown if one is not None]
            searches.append(
                {
                    "text": text,
                    "judged": len(judged),
                    "right": sum(judged),
                    "share": float((truth.nuclei == at).mean()),
                    "hits": [
                        {
                            **row,
                            "picture": _view(archive, reader, row),
                            "um": row["size0"] * row["mpp"],
                            "shows": one,
                            "right": None if one is None else one == nuclei,
                        }
                        for row, one in zip(rows[:HITS], shown, strict=False)
                    ],
                }
            )
    return searches


def _nuclei_at(
    archive: Archive,
    row: Mapping[str, Any],
    places: Mapping[tuple[str, int, int], int],
    truth: TreeTruth,
) -> str | None:
    """Return the nuclei planted where a patch is, "none" in stroma; None outside of the trees."""
    side = tree_spec(archive).parent_um
    x, y = ((row[key] + row["size0"] / 2) * row["mpp"] / side for key in ("x0", "y0"))
    at = places.get((row["slide_id"], int(x), int(y)))
    if at is None:
        return None
    found = int(truth.nuclei[at, 2 * (y % 1 >= 0.5) + (x % 1 >= 0.5)])
    return truth.classes["nuclei"][found] if found >= 0 else "none"


def _view(archive: Archive, reader: SlideReader, row: Mapping[str, Any]) -> str:
    slide = archive.slide(row["slide_id"])
    override = slide["mpp"] if slide["mpp_source"] == "override" else None
    with opened(slide) as path:
        return data_uri(
            reader.view(
                str(path), x0=row["x0"], y0=row["y0"], size0=row["size0"], px=HIT_PX,
                slide_mpp=override,
            )
        )  # fmt: skip
