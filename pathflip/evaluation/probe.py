"""Linear probes of frozen tile vectors: all training tiles, and k of each class.

The classifier is scikit-learn's logistic regression (lbfgs, 1,000 iterations) on unit vectors as
they are. Its strength follows the convention of UNI and CONCH, λ = 100/(d·C), so scikit-learn's
``C`` is d·C/100: dimensions times classes, over a hundred.

Shapes: n tiles, C classes, d joint width.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathflip.errors import ConfigError
from pathflip.evaluation import bootstrap
from pathflip.evaluation.classification import (
    METRICS,
    baselines,
    confusion,
    measure,
    scores_of,
)
from pathflip.evaluation.tiles import EncodedTiles
from pathflip.interop.tile_sets import Tile

SHOTS = (1, 2, 4, 8, 16, 32)
SEEDS = 10
TEST_SHARE = 0.3
"""Share of tiles held out of a set that names no test split."""


def strength(width: int, classes: int) -> float:
    """Return scikit-learn's ``C`` of a probe: width x classes / 100."""
    return width * classes / 100


def fit_predict(
    x: NDArray[np.float32], y: NDArray[np.int64], test: NDArray[np.float32], *, classes: int
) -> NDArray[np.int64]:
    """Fit a probe on vectors [n, d] of classes [n], and return the classes of others [m].

    Args:
        x: Training vectors, of two classes or more.
        y: Their classes.
        test: Vectors [m, d].
        classes: C, number of classes of the task.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=strength(x.shape[1], classes), solver="lbfgs", max_iter=1000)
    with warnings.catch_warnings():
        # The convention stops after 1,000 iterations, converged or not.
        warnings.simplefilter("ignore", ConvergenceWarning)
        found: NDArray[np.int64] = model.fit(x, y).predict(test).astype(np.int64)
    return found


def draw_test(tiles: Sequence[Tile], *, seed: int = 0) -> NDArray[np.bool_]:
    """Return the tiles held out for testing [n], by a rank that other tiles do not change.

    Whole patients or slides where they are known; else tiles, the same share of each class.
    """

    def rank(name: str) -> bytes:
        return hashlib.sha256(f"{seed}/{name}".encode()).digest()

    held = np.zeros(len(tiles), np.bool_)
    if any(tile.group for tile in tiles):
        names = [tile.group or f"\0{tile.name}" for tile in tiles]
        groups = sorted(set(names), key=rank)
        chosen = set(groups[: max(1, round(TEST_SHARE * len(groups)))])
        held[:] = [name in chosen for name in names]
        return held
    for label in {tile.label for tile in tiles}:
        mine = [i for i, tile in enumerate(tiles) if tile.label == label]
        mine.sort(key=lambda i: rank(tiles[i].name))
        held[mine[: max(1, round(TEST_SHARE * len(mine)))]] = True
    return held


def probe(
    encoded: EncodedTiles,
    names: Sequence[str],
    *,
    vectors: NDArray[np.float32] | None = None,
    shots: Sequence[int] = SHOTS,
    seeds: int = SEEDS,
    resamples: int = bootstrap.RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure linear probes of encoded tiles.

    Trained on the tiles of split train (those of val are used for nothing) and tested on those of
    test; a set without either has its test tiles drawn (:func:`draw_test`).

    Args:
        encoded: Tiles of all splits.
        names: Names of the classes [C].
        vectors: Vectors [n, d] to probe; by default each tile's unit vector.
        shots: Numbers of training tiles a class for the probes of few; where a class has fewer,
            it gives all it has.
        seeds: Number of draws of those.
        resamples: Number of bootstrap resamples over the test's groups, 0 for no intervals.
        seed: Seed of draws and resamples.

    Returns:
        {"train", "test", "split": "given" or "drawn", "C", "linear": {"weighted_f1", …, "ci"},
        "kshot": {"4": {"weighted_f1": {"mean", "sd"}, …}}, "majority", "chance", "refused"}.

    Raises:
        ConfigError: The training tiles are all of one class, or there is no test tile
            (``no_tiles``).
    """
    x = encoded.found.whole() if vectors is None else vectors
    y, classes = encoded.truth, len(names)
    splits = np.array([tile.split or "" for tile in encoded.tiles])
    given = (splits == "train").any() and (splits == "test").any()
    if given:
        train, test = np.flatnonzero(splits == "train"), np.flatnonzero(splits == "test")
    else:
        held = draw_test(encoded.tiles, seed=seed)
        train, test = np.flatnonzero(~held), np.flatnonzero(held)
    if len(np.unique(y[train])) < 2 or not len(test):
        raise ConfigError(
            f"A probe needs training tiles of two classes and a test tile; there are {len(train)} "
            f"training tiles of {len(np.unique(y[train]))} classes, and {len(test)} test tiles.",
            hint="Give the whole set, or a CSV with a column split.",
            code="no_tiles",
        )
    groups = [encoded.tiles[i].group for i in test]
    predicted = fit_predict(x[train], y[train], x[test], classes=classes)
    document = {
        "n": len(y),
        "train": len(train),
        "test": len(test),
        "split": "given" if given else "drawn",
        "width": x.shape[1],
        "C": strength(x.shape[1], classes),
        "linear": measure(y[test], predicted, names, groups=groups, resamples=resamples, seed=seed),
        "kshot": {},
    }
    for k in shots:
        runs: list[NDArray[np.int64]] = []
        for draw in range(seeds):
            rows = draw_few(y[train], k, seed=[seed, k, draw])
            few = train[rows]
            said = fit_predict(x[few], y[few], x[test], classes=classes)
            runs.append(confusion(y[test], said, classes=classes))
        scores = scores_of(np.stack(runs))
        document["kshot"][str(k)] = {"seeds": seeds} | {
            key: {
                "mean": float(scores[key].mean()),
                "sd": float(scores[key].std(ddof=1)) if seeds > 1 else 0.0,
            }
            for key in METRICS
        }
    return document | baselines(y[test], classes=classes) | {"refused": encoded.refused}


def draw_few(y: NDArray[np.int64], k: int, *, seed: list[int]) -> NDArray[np.int64]:
    """Draw k rows of each class there is, without replacement; all of a class that has fewer."""
    rng = np.random.default_rng(seed)
    return np.concatenate(
        [rng.permutation(np.flatnonzero(y == value))[:k] for value in np.unique(y)]
    )
