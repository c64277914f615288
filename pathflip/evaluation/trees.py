"""Patch trees against planted truth: each cue by level and pooled, zero-shot and by probe.

``trees.csv`` of a cohort of ``pathflip synth --kind trees`` says of each node its architecture,
which only coarse levels show, and its nuclei, which only fine ones do. A tree is asked for its
architecture and each of its quadrants for its nuclei; the joint task is right in a quadrant where
both are, so that no level alone can solve it.

Scores are pooled as for tiles: softmax of the cosines with the mean vector of a level's nodes (in
that quadrant; the root stands for all four), averaged over levels.

Shapes: T trees, d joint width, C classes.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pathflip.errors import ConfigError
from pathflip.evaluation import bootstrap
from pathflip.evaluation.classification import resample
from pathflip.evaluation.patch_text import PatchReader, class_weights, softmax
from pathflip.evaluation.probe import draw_few, fit_predict
from pathflip.evaluation.prompts import PLACEHOLDER, read_classes
from pathflip.evaluation.tree_vectors import (
    TreeVectors,
    encode_trees,
    keyword_bank,
    node_quadrants,
)
from pathflip.geometry import LEVEL_OF, TREE_NODES, level_name
from pathflip.interop.tables import bad_line, needed_column
from pathflip.progress import Report

if TYPE_CHECKING:
    from pathflip.archive import Archive

CUES = ("architecture", "nuclei")
PROBE_NODES = 20_000
"""Most nodes of a level that a probe is trained on."""
FEW, FEW_DRAWS = 8, 5
"""Nodes of each class that a few-shot probe is trained on, and draws of them."""


@dataclass(frozen=True, kw_only=True)
class TreeTruth:
    """Planted truth of trees; -1 where there is none.

    Attributes:
        classes: {cue: names of its classes}.
        architecture: Class of each tree [T].
        nuclei: Class of each quadrant [T, 4].
        node_architecture: Class of each node [T, 85].
        node_nuclei: Class of each node [T, 85]; -1 where its nuclei are of two types.
    """

    classes: dict[str, list[str]]
    architecture: NDArray[np.int64]
    nuclei: NDArray[np.int64]
    node_architecture: NDArray[np.int64]
    node_nuclei: NDArray[np.int64]


def find_truth(archive: Archive) -> Path:
    """Return ``trees.csv`` beside the folder of the slides.

    Raises:
        ConfigError: There is none (``no_truth``).
    """
    uris = [uri for uri in archive.slides("ready", ["uri"])["uri"].to_pylist() if uri]
    for folder in dict.fromkeys(Path(uri).parent.parent for uri in uris):
        if (folder / "trees.csv").is_file():
            return folder / "trees.csv"
    raise ConfigError(
        f"No trees.csv lies beside the folder of the slides of {archive.uri}.",
        hint="Give it with --truth; pathflip synth DIR --kind trees writes one.",
        code="no_truth",
    )


def read_truth(
    path: str | Path, trees: TreeVectors, classes: Mapping[str, Sequence[str]]
) -> TreeTruth:
    """Read the truth of encoded trees.

    Args:
        path: Table of slide, tx, ty, node, level, architecture, nuclei.
        trees: The trees; slides by the stem of their file.
        classes: {cue: names of its classes}; other values count as no truth.

    Raises:
        ConfigError: A column is missing, or no tree is in the table (``no_truth``).
    """
    at = {
        (slide.stem, int(tx), int(ty)): i
        for i, (slide, tx, ty) in enumerate(zip(trees.slides, trees.tx, trees.ty, strict=True))
    }
    found = {cue: np.full((len(at), TREE_NODES), -1, np.int64) for cue in CUES}
    index = {cue: {name: i for i, name in enumerate(classes[cue])} for cue in CUES}
    # A row a node: by hand, as a cohort's table has hundreds of thousands of rows.
    with Path(path).open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        heads = {name: "" for name in reader.fieldnames or ()}
        columns = {
            name: needed_column(path, heads, (name,))
            for name in ("slide", "tx", "ty", "node", *CUES)
        }
        for row in reader:
            try:
                tx, ty, node = (int(row[columns[name]]) for name in ("tx", "ty", "node"))
            except (TypeError, ValueError):
                tx = ty = node = -1
            if not 0 <= node < TREE_NODES:
                raise bad_line(path, reader.line_num, "tx, ty or node is no such number")
            if (tree := at.get((row[columns["slide"]], tx, ty))) is not None:
                for cue in CUES:
                    found[cue][tree, node] = index[cue].get(row[columns[cue]], -1)
    if not (found["architecture"] >= 0).any():
        raise ConfigError(
            f"{path} says nothing about the {len(at)} patch trees.",
            hint="Give the trees.csv of the same cohort.",
            code="no_truth",
        )
    return TreeTruth(
        classes={cue: list(classes[cue]) for cue in CUES},
        architecture=found["architecture"][:, 0],
        nuclei=found["nuclei"][:, 1:5],  # the nodes of 10x are the quadrants
        node_architecture=found["architecture"],
        node_nuclei=found["nuclei"],
    )


# -- zero-shot ------------------------------------------------------------------------------------


def cue_scores(
    trees: TreeVectors,
    weights: NDArray[np.float32],
    *,
    tau: float,
    quadrant: int | None = None,
    levels: Sequence[int] = (0, 1, 2, 3),
) -> NDArray[np.float64]:
    """Return class scores of trees, or of one quadrant of each [T, C]; NaN without a node there.

    Args:
        trees: Encoded trees.
        weights: Unit class vectors [C, d].
        tau: Temperature.
        quadrant: Only nodes in this quadrant, and the root.
        levels: Levels that are averaged over, as far as a tree has them.
    """
    quadrants = node_quadrants()
    total = np.zeros((len(trees.vectors), len(weights)))
    count = np.zeros(len(trees.vectors))
    for level in levels:
        on = level == LEVEL_OF
        if quadrant is not None and level > 0:
            on &= quadrants == quadrant
        there = trees.mask[:, on].sum(axis=1)
        mean = trees.vectors[:, on].sum(axis=1) / np.maximum(there, 1)[:, None]
        total += np.where(there[:, None] > 0, softmax(mean @ weights.T, tau=tau), 0)
        count += there > 0
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(count[:, None] > 0, total / count[:, None], np.nan)


def hits(
    trees: TreeVectors,
    truth: TreeTruth,
    weights: Mapping[str, NDArray[np.float32]],
    *,
    tau: float,
    levels: Sequence[int] = (0, 1, 2, 3),
) -> dict[str, NDArray[np.float64]]:
    """Return right answers: architecture [T], nuclei and joint [T, 4]; NaN where not asked.

    Not asked is what has no truth; a tree or quadrant without nodes at these levels is wrong.
    """
    scores = cue_scores(trees, weights["architecture"], tau=tau, levels=levels)
    architecture = _right(scores, truth.architecture)
    nuclei = np.stack(
        [
            _right(
                cue_scores(trees, weights["nuclei"], tau=tau, quadrant=q, levels=levels),
                truth.nuclei[:, q],
            )
            for q in range(4)
        ],
        axis=1,
    )
    return {
        "architecture": architecture,
        "nuclei": nuclei,
        "joint": architecture[:, None] * nuclei,
    }


def _right(scores: NDArray[np.float64], truth: NDArray[np.int64]) -> NDArray[np.float64]:
    known = ~np.isnan(scores).any(axis=1)
    best = np.where(known, np.nan_to_num(scores).argmax(axis=1), -2)
    return np.where(truth >= 0, (best == truth).astype(np.float64), np.nan)


def evaluate_trees(
    archive: Archive,
    reader: PatchReader,
    *,
    truth: str | Path | None = None,
    templates: Sequence[str] = (PLACEHOLDER,),
    split: str = "test",
    probes: bool = True,
    source: str | None = None,
    resamples: int = bootstrap.RESAMPLES,
    seed: int = 0,
    progress: Report | None = None,
) -> dict[str, Any]:
    """Measure a model on the trees of a split against planted truth.

    Args:
        archive: Archive with trees of a cohort of planted truth.
        reader: The model.
        truth: ``trees.csv``; by default that beside the slides. Prompts are in ``classes/`` there.
        templates: Templates of the prompts.
        split: Split of the trees; ``all`` for every one.
        probes: Whether to fit linear probes on training trees, too.
        source: Source of the keywords that text-guided vectors need.
        resamples: Number of bootstrap resamples of patients, 0 for no intervals.
        seed: Seed of the resamples.
        progress: Called while trees are encoded.

    Returns:
        {"joint", "architecture", "nuclei": {"levels": {"5x": {"accuracy", "ci"}}, "pooled": {…},
        "best_level", "pooled_minus_best": {"difference", "ci"}, "chance", "n"}, "probe": {"v",
        "z": {cue: {level: accuracy}}, "few": {"shots", "draws", "v", "z"}}, "trees", "patients"}.
        "z" is None of a model without text-guided vectors, or where training trees have no
        keywords; "few" has the same of probes on 8 training nodes of each class.
    """
    file = Path(truth) if truth is not None else find_truth(archive)
    classes = {cue: read_classes(str(file.parent / "classes" / f"{cue}.yaml")) for cue in CUES}
    splits = None if split == "all" else (split, "train") if probes else (split,)
    every = encode_trees(archive, reader, splits=splits, progress=progress)
    about = read_truth(file, every, {cue: list(names) for cue, names in classes.items()})
    on = every.of_split(split)
    if not len(on):
        raise ConfigError(
            f"{archive.uri} has no patch tree of split {split}.", hint="See --split.",
            code="no_slides",
        )  # fmt: skip
    trees, mine = take(every, on), take_truth(about, on)
    weights = {
        cue: class_weights(reader, names, templates=templates) for cue, names in classes.items()
    }
    levels = [level for level in reader.levels if trees.mask[:, level == LEVEL_OF].any()]
    by_level = {
        level: hits(trees, mine, weights, tau=reader.tau, levels=(level,)) for level in levels
    }
    pooled = hits(trees, mine, weights, tau=reader.tau, levels=levels)
    patients, options = trees.patients, {"resamples": resamples, "seed": seed}
    chance = {cue: 1 / len(names) for cue, names in classes.items()}
    chance["joint"] = chance["architecture"] * chance["nuclei"]
    document: dict[str, Any] = {}
    for task in ("joint", *CUES):
        single = {
            level_name(reader.level_mpp[level]): accuracy(found[task], patients, **options)
            for level, found in by_level.items()
        }
        best = max(single, key=lambda name: single[name]["accuracy"] or 0.0)
        best_hits = by_level[levels[list(single).index(best)]][task]
        document[task] = {
            "levels": single,
            "pooled": accuracy(pooled[task], patients, **options),
            "best_level": best,
            "pooled_minus_best": difference(pooled[task], best_hits, patients, **options),
            "chance": chance[task],
            "n": int((~np.isnan(pooled[task])).sum()),
        }
    document |= {
        "model": reader.name,
        "split": split,
        "trees": len(on),
        "patients": len(set(patients)),
    }
    if probes:
        document["probe"] = _probes(archive, reader, every, about, on, source=source, seed=seed)
    return document


def accuracy(
    right: NDArray[np.float64], patients: Sequence[str], *, resamples: int, seed: int
) -> dict[str, Any]:
    """Return {"accuracy", "ci"} of answers [T] or [T, 4]; NaN was not asked."""
    counts = _by_patient(right, patients)
    total = counts.sum(axis=0)
    found: dict[str, Any] = {"accuracy": float(total[0] / total[1]) if total[1] else None}
    if resamples:
        drawn = np.concatenate(list(resample(counts, resamples=resamples, seed=seed)))
        with np.errstate(invalid="ignore", divide="ignore"):
            on = bootstrap.Support(float(total[1]), float(np.count_nonzero(counts[:, 1])))
            found["ci"] = bootstrap.interval(drawn[:, 0] / drawn[:, 1], found["accuracy"], on)
    return found


def difference(
    one: NDArray[np.float64],
    other: NDArray[np.float64],
    patients: Sequence[str],
    *,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Return {"difference", "ci"} of two accuracies on the same items, resampled together."""
    counts = np.concatenate([_by_patient(one, patients), _by_patient(other, patients)], axis=1)
    total = counts.sum(axis=0)
    found: dict[str, Any] = {
        "difference": float((total[0] - total[2]) / total[1]) if total[1] else None
    }
    if resamples:
        drawn = np.concatenate(list(resample(counts, resamples=resamples, seed=seed)))
        with np.errstate(invalid="ignore", divide="ignore"):
            found["ci"] = bootstrap.difference_interval(
                (drawn[:, 0] - drawn[:, 2]) / drawn[:, 1],
                found["difference"],
                int(np.count_nonzero(counts[:, 1])),
            )
    return found


def _by_patient(right: NDArray[np.float64], patients: Sequence[str]) -> NDArray[np.float64]:
    """Return right answers and questions of each patient [G, 2]."""
    _, of = np.unique(np.asarray(patients), return_inverse=True)
    flat = right.reshape(len(right), -1)
    counts = np.zeros((int(of.max()) + 1, 2))
    np.add.at(counts, of, np.stack([np.nansum(flat, 1), (~np.isnan(flat)).sum(1)], axis=1))
    return counts


def take(trees: TreeVectors, rows: NDArray[np.int64]) -> TreeVectors:
    """Return some of the trees."""
    return TreeVectors(
        tree_ids=[trees.tree_ids[i] for i in rows],
        slides=[trees.slides[i] for i in rows],
        tx=trees.tx[rows],
        ty=trees.ty[rows],
        vectors=trees.vectors[rows],
        mask=trees.mask[rows],
    )


def take_truth(truth: TreeTruth, rows: NDArray[np.int64]) -> TreeTruth:
    """Return the truth of some of the trees."""
    return TreeTruth(
        classes=truth.classes,
        architecture=truth.architecture[rows],
        nuclei=truth.nuclei[rows],
        node_architecture=truth.node_architecture[rows],
        node_nuclei=truth.node_nuclei[rows],
    )


# -- probes ---------------------------------------------------------------------------------------


def probe_nodes(
    x: NDArray[np.float32],
    y: NDArray[np.int64],
    mask: NDArray[np.bool_],
    *,
    train: NDArray[np.int64],
    test: NDArray[np.int64],
    classes: int,
    few: int | None = None,
    seed: int = 0,
) -> dict[int, float]:
    """Fit a linear probe on the nodes of each level and return {level: accuracy of test nodes}.

    With ``few`` it is the mean over draws of so many training nodes of each class. Where a probe on
    all nodes is right nearly always, that still tells vectors apart.

    Args:
        x: Vectors of nodes [T, 85, d].
        y: Their classes [T, 85], -1 where not known.
        mask: bool [T, 85], True where a node is.
        train: Trees to fit on.
        test: Trees to measure on.
        classes: C, number of classes.
        few: Training nodes of each class in a draw; None for one probe on all of them.
        seed: Seed of the draws, and of the choice among more than 20,000 training nodes.
    """
    found = {}
    for level in range(4):
        usable = mask & (y >= 0) & (level == LEVEL_OF)
        fit = np.argwhere(usable[train])
        ask = np.argwhere(usable[test])
        if len(fit) > PROBE_NODES:
            drawn = np.random.default_rng(seed).permutation(len(fit))[:PROBE_NODES]
            fit = fit[np.sort(drawn)]
        rows, others = (train[fit[:, 0]], fit[:, 1]), (test[ask[:, 0]], ask[:, 1])
        if len(np.unique(y[rows])) < 2 or not len(ask):
            continue
        known, labels, asked, answers = x[rows], y[rows], x[others], y[others]
        subsets: list[Any] = [slice(None)]
        if few is not None:
            subsets = [draw_few(labels, few, seed=[seed, level, i]) for i in range(FEW_DRAWS)]
        right = [
            fit_predict(known[some], labels[some], asked, classes=classes) == answers
            for some in subsets
        ]
        found[level] = float(np.mean(right))
    return found


def _probes(
    archive: Archive,
    reader: PatchReader,
    trees: TreeVectors,
    truth: TreeTruth,
    test: NDArray[np.int64],
    *,
    source: str | None,
    seed: int,
) -> dict[str, Any]:
    train = np.setdiff1d(trees.of_split("train"), test)
    if not len(train):
        return {"v": None, "z": None, "few": None}
    vectors: dict[str, NDArray[np.float32] | None] = {"v": trees.vectors, "z": None}
    try:
        guided = reader.guided(
            trees.vectors[trees.mask], keyword_bank(archive, reader, source=source)
        )
    except ConfigError as error:
        if error.code not in ("no_captions", "not_guided"):
            raise
        guided = None
    if guided is not None:
        z = np.zeros((*trees.mask.shape, guided.shape[1]), np.float32)
        z[trees.mask] = guided
        vectors["z"] = z
    answers = {"architecture": truth.node_architecture, "nuclei": truth.node_nuclei}

    def probed(x: NDArray[np.float32] | None, few: int | None) -> dict[str, Any] | None:
        if x is None:
            return None
        return {
            cue: {
                level_name(reader.level_mpp[level]): value
                for level, value in probe_nodes(
                    x, answers[cue], trees.mask, train=train, test=test,
                    classes=len(truth.classes[cue]), few=few, seed=seed,
                ).items()
            }
            for cue in CUES
        }  # fmt: skip

    found: dict[str, Any] = {name: probed(x, None) for name, x in vectors.items()}
    few = {name: probed(x, FEW) for name, x in vectors.items()}
    return found | {"few": {"shots": FEW, "draws": FEW_DRAWS, **few}}
