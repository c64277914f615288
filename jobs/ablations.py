"""Ablations: the model with parts left out, trained over several seeds and measured.

Each training is a run of its own in ``RUN/ablations/<name>-seed<k>``, made by ``jobs.pretrain``
with the settings of RUN (or the preset named), one switch and one seed changed. A run that is
finished is not trained again, and one that is measured (``evaluation.json`` in it, of the same
model and the same questions) not measured again; the same command goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from jobs import cluster
from jobs.pretrain import AnyPretrainConfig, plan, pretrain, resolve, settings_of
from pathflip.archive import Archive
from pathflip.archive.slide_names import outline_files
from pathflip.archive.storage import normalise
from pathflip.checkpoints import load_run
from pathflip.cpus import cpus_here
from pathflip.errors import ConfigError, TrainingError
from pathflip.evaluation.patch_suite import evaluate_patches
from pathflip.evaluation.prompts import read_tasks
from pathflip.evaluation.suite import evaluate_all, headline
from pathflip.evaluation.trees import find_truth
from pathflip.evaluation.zeroshot import default_tasks
from pathflip.files import write_file
from pathflip.progress import HasLine, Report
from pathflip.training.loop_config import save_settings
from pathflip.training.tree_config import MRPretrainConfig, single_level

BASELINE = ("itc", "itm", "mlm", "plm")
"""L_bl, the losses of MR-PLIP that are not new."""
ABLATIONS: dict[str, dict[str, dict[str, Any]]] = {
    # arXiv 2512.17621
    "pathflip": {
        "full": {},
        "no_region_qformer": {"region_encoder": "mean"},
        "no_slide_qformer": {"slide_encoder": "region_mean"},
        "no_tr_attention": {"tr_attention": "none"},
        "global_only": {"global_only": True},
    },
    "mrplip": {
        "all": {},
        "l_bl": {"losses": BASELINE},
        "plus_cvta": {"losses": (*BASELINE, "cvta")},
        "plus_mrtva": {"losses": (*BASELINE, "mrtva")},
        "no_hierarchy": {"edges": "random"},
        "as_printed": {
            "selection": "frozen_then_current",
            "cvta_mean": "nodes",
            "keywords": 8,
        },
        **{
            f"single_{5 << level}x": {"losses": (*BASELINE, "cvta"), "levels": (level,)}
            for level in range(4)
        },
    },
}
"""Model settings of each ablation, by model family; the first of a family changes nothing."""
KNOWN = [name for switches in ABLATIONS.values() for name in switches]


@dataclass(frozen=True, kw_only=True)
class AblationConfig:
    """Settings of ``pathflip evaluate ablations``.

    Attributes:
        seeds: Number of trainings of each, with seeds first_seed, first_seed + 1, …
        first_seed: First seed.
        only: Names of the ablations to train; all when empty.
        parallel: Number of trainings at a time; each gets its share of this machine's cores.
        tasks: Task file; ``tasks.yaml`` beside the slides' folder by default. For slides only.
        truth: Folder of outlines, or ``trees.csv`` of patch trees; by default ``lesions``, or that
            file, beside the slides' folder.
        split: The split measured.
        resamples: Number of bootstrap resamples within each run.
    """

    seeds: int = 3
    first_seed: int = 0
    only: tuple[str, ...] = ()
    parallel: int = 1
    tasks: str | None = None
    truth: str | None = None
    split: str = "test"
    resamples: int = 200

    def __post_init__(self) -> None:
        for name in self.only:
            if name not in KNOWN:
                raise ConfigError(
                    f"There is no ablation {name!r}.", hint=f"Known: {', '.join(KNOWN)}."
                )
        if self.seeds < 1 or self.parallel < 1:
            raise ConfigError(
                f"seeds is {self.seeds} and parallel {self.parallel}.", hint="Give 1 or more."
            )

    def names(self, family: str) -> list[str]:
        """Return the ablations asked for, in their order.

        Args:
            family: Family of the model.

        Raises:
            ConfigError: One is of another family.
        """
        switches = ABLATIONS[family]
        if alien := [name for name in self.only if name not in switches]:
            raise ConfigError(
                f"{alien[0]} is no ablation of {family}.", hint=f"Known: {', '.join(switches)}."
            )
        return [name for name in switches if not self.only or name in self.only]

    def trainings(self, family: str) -> list[tuple[str, int]]:
        """Return (ablation, seed) of every training, in order: all ablations of a seed first."""
        seeds = range(self.first_seed, self.first_seed + self.seeds)
        names = self.names(family)
        return [(name, seed) for seed in seeds for name in names]

    def check_files(self, family: str) -> None:
        """Refuse before training the files that measuring would refuse after it.

        Args:
            family: Family of the model.

        Raises:
            ConfigError: The file of tasks is wrong or of no use, or there is no truth.
        """
        patches = family == "mrplip"
        if self.tasks is not None:
            if patches:
                raise ConfigError(
                    "Models of patches are not measured on tasks of slides.",
                    hint="Leave out --tasks.",
                )
            read_tasks(self.tasks)
        if self.truth is None:
            return
        if patches and not Path(self.truth).is_file():
            raise ConfigError(
                f"There is no file {self.truth}.", hint="Give the cohort's trees.csv in --truth."
            )
        if not patches and not Path(self.truth).exists():
            raise ConfigError(
                f"There is no folder {self.truth}.",
                hint="Give a folder of <slide>.geojson, or a table of boxes, in --truth.",
            )


@dataclass(frozen=True, kw_only=True)
class AblationProgress:
    """Progress of the ablations: trainings done and the last message."""

    done: int
    total: int
    inner: str
    inner_fraction: float = 0.0

    @property
    def fraction(self) -> float:
        """Share done, 0 to 1."""
        return min(1.0, (self.done + self.inner_fraction) / max(1, self.total))

    def line(self) -> str:
        """One line for people."""
        return f"ablations {self.done}/{self.total} · {self.inner}"


def pretrain_config(
    run: str | Path | None = None,
    *,
    preset: str | None = None,
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> AnyPretrainConfig:
    """Return settings of the trainings: a run's or a preset's, then a file, then overrides.

    Args:
        run: A run whose settings are taken where it has any and no preset is named.
        preset: Preset instead.
        config: YAML file of settings.
        overrides: ``key=value``.
    """
    own = Path(run) if run is not None and preset is None else None
    base = None
    if own is not None and (own / "config.yaml").exists():
        base = settings_of(own)
    return resolve(preset, base=base, file=config, overrides=overrides)


def ablations(
    archive: str,
    run: str | Path,
    config: AblationConfig | None = None,
    *,
    settings: AnyPretrainConfig | None = None,
    address: str | None = None,
    progress: Report | None = None,
) -> dict[str, Any]:
    """Train and measure every ablation over every seed.

    Args:
        archive: Archive URI.
        run: Folder below which ``ablations/`` lies; usually a finished run.
        config: Ablations, seeds and measurement.
        settings: Settings of the trainings; those of ``run`` by default.
        address: Ray cluster; see ``cluster.connect``.
        progress: Called on every change of trainings and evaluations.

    Returns:
        {"run", "split", "seeds", "runs": [{"name", "seed", "run", "metrics", …}], "table":
        {name: {metric: {"mean", "sd", "ci", "n", "values"}}}, "difference": the same of full minus
        each ablation, seed by seed, "chance": {metric: …}, "seconds"}.

    Raises:
        TrainingError: A training failed; the message names it.
    """
    start = time.monotonic()
    config = config or AblationConfig()
    settings = settings or pretrain_config(run)
    config.check_files(settings.family)
    folder = Path(run).expanduser().absolute() / "ablations"
    todo = config.trainings(settings.family)
    plans = {key: variant(settings, name=key[0], seed=key[1]) for key in todo}
    folders = {key: folder / f"{key[0]}-seed{key[1]}" for key in todo}
    if config.parallel == 1:
        for i, key in enumerate(todo):
            tell = _inner(progress, done=i, total=len(todo), name=folders[key].name)
            pretrain(archive, folders[key], plans[key], address=address, progress=tell)
    else:
        _train_beside(archive, plans, folders, config.parallel, address, progress)
    rows = []
    for i, (name, seed) in enumerate(todo):
        tell = _inner(progress, done=i, total=len(todo), name=folders[name, seed].name)
        document = measure(
            archive, folders[name, seed], config, family=settings.family, progress=tell
        )
        rows.append(
            {
                "name": name,
                "seed": seed,
                "run": str(folders[name, seed]),
                "fingerprint": document["fingerprint"],
                "metrics": {key: value for key, (value, _) in document["headline"].items()},
                "chance": {key: chance for key, (_, chance) in document["headline"].items()},
                "seconds": _seconds(folders[name, seed]),
            }
        )
    values = {name: by_seed(rows, name) for name in config.names(settings.family)}
    result = {
        "run": str(Path(run)),
        "split": config.split,
        "seeds": sorted({seed for _, seed in todo}),
        "runs": rows,
        "table": {
            name: {key: spread(v) for key, v in mine.items()} for name, mine in values.items()
        },
        "difference": differences(values, full=next(iter(ABLATIONS[settings.family]))),
        "chance": rows[0]["chance"] if rows else {},
        "seconds": time.monotonic() - start,
    }
    write_file(folder / "ablations.json", json.dumps(result, indent=1))
    return result


def planned(
    archive: str,
    run: str | Path,
    config: AblationConfig | None = None,
    *,
    settings: AnyPretrainConfig | None = None,
) -> dict[str, Any]:
    """Return the plan of :func:`ablations`, without starting or writing anything.

    Raises:
        PathFLIPError: A training would be refused, or a file is wrong.
    """
    config = config or AblationConfig()
    settings = settings or pretrain_config(run)
    config.check_files(settings.family)
    folder = Path(run).expanduser().absolute() / "ablations"
    steps = {
        f"{name}-seed{seed}": plan(
            archive, folder / f"{name}-seed{seed}", variant(settings, name=name, seed=seed)
        )["steps"]
        for name, seed in config.trainings(settings.family)
    }
    return {"run": str(Path(run)), "trainings": len(steps), "steps": steps}


def variant(settings: AnyPretrainConfig, *, name: str, seed: int) -> AnyPretrainConfig:
    """Return the settings of one training."""
    switches = ABLATIONS[settings.family][name]
    if isinstance(settings, MRPretrainConfig):
        trees = replace(settings, model=replace(settings.model, **switches), seed=seed)
        return single_level(trees) if "levels" in switches else trees
    return replace(settings, model=replace(settings.model, **switches), seed=seed)


def measure(
    archive: str,
    run: Path,
    config: AblationConfig,
    *,
    family: str = "pathflip",
    progress: Report | None = None,
) -> dict[str, Any]:
    """Measure a finished run, or read the measurement from its ``evaluation.json``."""
    opened = Archive(archive)
    asked: dict[str, Any] = {
        "truth": config.truth,
        "split": config.split,
        "resamples": config.resamples,
        "versions": {name: opened.dataset(name).version for name in sorted(opened.tables())},
    }
    document: dict[str, Any]
    kept = run / "evaluation.json"
    made = json.loads(kept.read_text()) if kept.exists() else {}
    if family == "mrplip":
        patches = load_run(run, family="mrplip")
        asked |= {"fingerprint": patches.fingerprint, "planted": _planted(opened, config.truth)}
        if made.get("asked") == asked:
            return dict(made)
        document = evaluate_patches(
            opened, patches, truth=config.truth, split=config.split, resamples=config.resamples,
            progress=progress,
        )  # fmt: skip
    else:
        trained = load_run(run)
        file = Path(config.tasks) if config.tasks else default_tasks(opened)
        asked |= {
            "fingerprint": trained.fingerprint,
            "tasks": hashlib.sha256(file.read_bytes()).hexdigest(),
            "outlines": _stamps(opened, config.truth),
        }
        if made.get("asked") == asked:
            return dict(made)
        document = evaluate_all(
            opened,
            trained,
            suite=read_tasks(file),
            truth=config.truth,
            split=config.split,
            resamples=config.resamples,
            progress=progress,
        )
        document |= {"headline": headline(document)}
    document |= {"asked": asked}
    write_file(kept, json.dumps(document, indent=1))
    return document


def _planted(archive: Archive, truth: str | None) -> str | None:
    """Return a digest of the planted truth of trees and its prompts; None where there is none."""
    try:
        file = Path(truth) if truth is not None else find_truth(archive)
    except ConfigError:
        return None
    parts = [file, *sorted((file.parent / "classes").glob("*.yaml"))]
    return hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()


def _stamps(archive: Archive, truth: str | None) -> str:
    """Return a digest of names, sizes and times of the outlines measured against."""
    uris = archive.slides("ready", ["uri"])["uri"].to_pylist()
    near = {Path(uri).parent.parent / "lesions" for uri in uris}
    folders = [Path(truth)] if truth is not None else sorted(near)
    files = [
        path
        for folder in folders
        for path in ([folder] if folder.is_file() else outline_files(folder))
    ]
    stamps = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(stamps).encode()).hexdigest()


def spread(values: Sequence[float | None]) -> dict[str, Any]:
    """Return mean, sample standard deviation and t interval (95 %) of a metric over seeds."""
    known = np.array([value for value in values if value is not None], np.float64)
    found: dict[str, Any] = {"mean": None, "sd": None, "ci": None, "n": len(known)}
    if len(known):
        found["mean"] = float(known.mean())
    if len(known) > 1:
        from scipy.stats import t  # type: ignore[import-untyped]

        found["sd"] = float(known.std(ddof=1))
        half = float(t.ppf(0.975, len(known) - 1)) * found["sd"] / len(known) ** 0.5
        found["ci"] = [found["mean"] - half, found["mean"] + half]
    return found | {"values": list(values)}


def differences(
    values: Mapping[str, Mapping[str, list[float | None]]], *, full: str = "full"
) -> dict[str, Any]:
    """Return {name: {metric: spread of the full model minus name}}, seed by seed."""
    whole = values.get(full, {})
    return {
        name: {
            key: spread(
                [
                    None if a is None or b is None else a - b
                    for a, b in zip(whole[key], theirs, strict=True)
                ]
            )
            for key, theirs in mine.items()
            if key in whole
        }
        for name, mine in values.items()
        if name != full and whole
    }


def table(document: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Return columns and rows for people: metrics down, ablations across."""
    names = list(document["table"])
    metrics = list(dict.fromkeys(key for name in names for key in document["table"][name]))
    rows = []
    for key in metrics:
        row: list[Any] = [key]
        for name in names:
            cell = document["table"][name].get(key)
            text = "" if cell is None or cell["mean"] is None else f"{cell['mean']:.3f}"
            if text and cell["sd"] is not None:
                text += f" ± {cell['sd']:.3f}"
            row.append(text)
        rows.append([*row, document["chance"].get(key)])
    return ["metric", *names, "chance"], rows


def by_seed(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, list[float | None]]:
    """Return {metric: its values by seed} of an ablation's runs."""
    mine = [row for row in rows if row["name"] == name]
    keys = dict.fromkeys(key for row in mine for key in row["metrics"])
    return {key: [row["metrics"].get(key) for row in mine] for key in keys}


def _inner(progress: Report | None, *, done: int, total: int, name: str) -> Report | None:
    if progress is None:
        return None

    def tell(inner: HasLine) -> None:
        progress(
            AblationProgress(
                done=done,
                total=total,
                inner=f"{name}: {inner.line()}",
                inner_fraction=min(0.99, inner.fraction),
            )
        )

    return tell


def _train_beside(
    archive: str,
    plans: Mapping[tuple[str, int], AnyPretrainConfig],
    folders: Mapping[tuple[str, int], Path],
    parallel: int,
    address: str | None,
    progress: Report | None,
) -> None:
    """Train several at a time, each in a process of its own with its share of the cores."""
    cores = max(1, cpus_here() // parallel)

    def one(key: tuple[str, int]) -> None:
        run = folders[key]
        own = plans[key]
        if cluster.is_here(address) and own.cpus_per_worker is None:
            own = replace(own, cpus_per_worker=cores)
        given = run.parent / f".{run.name}.yaml"
        given.parent.mkdir(parents=True, exist_ok=True)
        given.write_text(save_settings(own))
        command = [
            sys.executable, "-m", "jobs.pretrain", "--archive", normalise(archive),
            "--run", str(run), "--config", str(given), "--json",
            *(["--address", address] if address else []),
        ]  # fmt: skip
        with (run.parent / f"{run.name}.log").open("w") as log:
            done = subprocess.run(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=Path(__file__).resolve().parents[1],
                env=os.environ | {"OMP_NUM_THREADS": str(cores)},
                check=False,
            )
        given.unlink(missing_ok=True)
        if done.returncode:
            last = (run.parent / f"{run.name}.log").read_text().strip().splitlines()[-1:]
            raise TrainingError(
                f"The training of {run.name} failed: {' '.join(last)[:300]}",
                hint=f"See {run.parent / run.name}.log; the same command goes on.",
            )

    with ThreadPoolExecutor(parallel) as pool:
        waiting: dict[Future[None], tuple[str, int]] = {pool.submit(one, key): key for key in plans}
        finished = 0
        try:
            while waiting:
                ready, _ = wait(waiting, return_when=FIRST_COMPLETED)
                for future in ready:
                    key = waiting.pop(future)
                    future.result()
                    finished += 1
                    if progress is not None:
                        inner = f"{folders[key].name} is trained"
                        progress(AblationProgress(done=finished, total=len(plans), inner=inner))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _seconds(run: Path) -> float | None:
    try:
        value = json.loads((run / "result.json").read_text()).get("seconds")
    except (OSError, ValueError):
        return None
    return None if value is None else float(value)
