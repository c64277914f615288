"""Benchmark of MR-PLIP on planted truth: ``python -m tests.bench.mrplip_planted DIR --json``.

For each seed a cohort of its own is drawn, archived and cut into trees; the ablations named are
trained on it with that seed and measured on its test trees. The table holds means over seeds with
t intervals, and ``all`` minus each, seed by seed. No setting was chosen on these seeds. Whatever is
finished is not done again, so the same command goes on, adds seeds, ablations or another share of
captions that name what is seen (``--mention``), for which pixels are not read again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.ablations import (
    KNOWN,
    AblationConfig,
    ablations,
    by_seed,
    differences,
    pretrain_config,
    spread,
)
from jobs.ingest import ingest
from jobs.ingest.config import IngestConfig
from jobs.trees import TreesConfig, trees
from pathflip import Archive
from pathflip.geometry import Tiling
from pathflip.interop.tree_captions import import_tree_captions, read_tree_captions
from pathflip.keywords import load_lexicon
from pathflip.synth.trees import make_tree_cohort

SEEDS = (11, 12, 13, 14, 15)
SLIDES = 64
STEPS = 700


def make_archive(folder: Path, *, seed: int, slides: int, mention: float) -> Path:
    """Make a cohort with its archive of captioned trees, or return the one there is."""
    cohort = folder / f"seed{seed}-mention{mention}"
    archive = cohort / "archive"
    if (cohort / "captioned").exists():
        return archive
    drawn = next((path.parent for path in folder.glob(f"seed{seed}-*/captioned")), None)
    if drawn is not None:  # the same slides with other captions
        (cohort / "slides").mkdir(parents=True, exist_ok=True)
        for slide in (drawn / "slides").iterdir():
            if not (cohort / "slides" / slide.name).exists():
                os.link(slide, cohort / "slides" / slide.name)
        shutil.rmtree(archive, ignore_errors=True)
        shutil.copytree(drawn / "archive", archive)
    make_tree_cohort(cohort, slides=slides, seed=seed, mention=mention)
    if drawn is None:
        config = IngestConfig(
            tiling=Tiling(region_um=256, patch_um=64), patients=str(cohort / "labels.csv")
        )
        ingest([str(cohort / "slides")], str(archive), config)
        trees(str(archive), TreesConfig(parent_um=256, node_px=128))
    captions = read_tree_captions(Archive(archive), cohort / "tree_captions.jsonl")
    lexicon = load_lexicon(cohort / "terms.txt")
    import_tree_captions(str(archive), captions, source="cohort", lexicon=lexicon)
    (cohort / "captioned").touch()
    return archive


def measure(
    folder: Path,
    *,
    seeds: Sequence[int],
    only: Sequence[str],
    slides: int,
    mention: float,
    overrides: Sequence[str],
) -> dict[str, Any]:
    """Train and measure; return {"table", "difference", "chance", "runs"}."""
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        archive = make_archive(folder, seed=seed, slides=slides, mention=mention)
        config = AblationConfig(
            seeds=1,
            first_seed=seed,
            only=tuple(only),
            truth=str(archive.parent / "trees.csv"),
        )
        settings = pretrain_config(preset="mrplip/mini", overrides=overrides)
        found = ablations(str(archive), archive.parent, config, settings=settings)
        rows += found["runs"]
        print(f"mention {mention}, seed {seed}: {len(found['runs'])} runs", file=sys.stderr)
    values = {name: by_seed(rows, name) for name in dict.fromkeys(row["name"] for row in rows)}
    chance: dict[str, float] = {}
    for row in rows:
        chance |= {key: value for key, value in row["chance"].items() if value is not None}
    return {
        "mention": mention,
        "table": {
            name: {key: spread(own) for key, own in mine.items()} for name, mine in values.items()
        },
        "difference": differences(values, full="all"),
        "chance": chance,
        "seconds": {f"{row['name']}-{row['seed']}": row["seconds"] for row in rows},
    }


def main() -> None:
    """Run the benchmark and print one JSON document, or a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where cohorts, archives and runs are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--slides", type=int, default=SLIDES)
    parser.add_argument("--mention", type=float, default=0.2)
    parser.add_argument("--only", nargs="+", choices=KNOWN, default=["all", "l_bl"])
    parser.add_argument("-o", dest="overrides", action="append", default=[])
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    document = measure(
        given.folder.absolute(),
        seeds=given.seeds,
        only=given.only,
        slides=given.slides,
        mention=given.mention,
        overrides=[f"steps={STEPS}", *given.overrides],
    )
    if given.json:
        print(json.dumps(document, indent=1))
        return
    for name, mine in document["table"].items():
        print(name)
        for key, own in mine.items():
            gain = document["difference"].get(name, {}).get(key)
            print(f"  {key:36} {cell(own)}", f"  all minus it {cell(gain)}" if gain else "")


def cell(found: dict[str, Any]) -> str:
    """Return mean, interval and number of runs as text."""
    if found["mean"] is None:
        return "-"
    low, high = found["ci"] or (float("nan"), float("nan"))
    return f"{found['mean']:+.3f} [{low:+.3f}, {high:+.3f}] n={found['n']}"


if __name__ == "__main__":
    main()
