"""A small run that knows the cohort's lesions: trained in seconds on patches of real pixels.

The preset learns from whole slides and takes minutes (docs/notes/mini.md). Here the slides it is
trained on are composed of patches whose content the planted outlines tell: an organ all over, and
a finding in one region. What it then finds on the cohort's own slides is its own work.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pathflip.archive import Archive
from pathflip.evaluation.grounding import inside
from pathflip.geometry import Tiling
from pathflip.heatmap import slide_rects
from pathflip.interop.annotation_files import read_objects
from pathflip.synth.text import FORMS, ORGAN_NAMES
from pathflip.training import run_dir
from pathflip.training.config import resolve
from pathflip.training.trainer import train
from tests.bench.planted import PlantedContrastive, Regions, corpus_of

SLIDES, REGIONS, LESION_SLOTS = 240, 12, 24
FINDINGS = ("tumour", "necrosis", "lymphoid", "mucin", "keratin", "calcification", "fibrosis")
"""Findings that the run learns, of all that are planted."""
SETTINGS = (
    "steps=300", "batch_size=8", "lr=0.003", "best=last", "val_every=1000", "log_every=1000",
    "save_every=1000", "max_regions=12", "num_subcaptions=4", "model.d=64", "model.hidden=64",
    "model.ffn=128", "model.num_queries=8", "model.text_hidden=64", "model.text_ffn=64",
    "model.text_heads=2", "model.vocab_size=256",
)  # fmt: skip

CORNERS = np.array([(0, 0), (1, 0), (0, 1), (1, 1)])
Content = dict[str, NDArray[np.float16]]


def patches_by_content(archive: Archive, lesions: Path) -> tuple[Content, Content]:
    """Return the features [n, d] of patches inside a lesion, by finding, and of others, by organ.

    Patches that an outline crosses are left out.
    """
    tiling = Tiling(**archive.tiling())
    found, plain = defaultdict(list), defaultdict(list)
    rows = archive.slides("ready", columns=["slide_id", "uri", "mpp", "labels"])
    for row in rows.sort_by("slide_id").to_pylist():  # not in the order in which they were done
        file = lesions / f"{Path(row['uri']).stem}.geojson"
        if not file.exists():  # no slide of the cohort
            continue
        features, mask, _ = archive.features_array(row["slide_id"])
        regions = archive.regions(row["slide_id"], columns=["rx", "ry"]).to_pylist()
        places = np.array([(one["rx"], one["ry"]) for one in regions])
        rects = slide_rects(places, tiling, mpp=row["mpp"])[mask]
        seen = features[mask]
        corners = rects[:, None, :2] + rects[:, None, 2:] * CORNERS
        touched = np.zeros(len(rects), np.bool_)
        for lesion in read_objects(file):
            within = inside(corners.reshape(-1, 2), lesion.polygons).reshape(-1, 4)
            found[lesion.classification].append(seen[within.all(1)])
            touched |= within.any(1)
        plain[_organ(row["labels"])].append(seen[~touched])
    shown = {name: np.concatenate(parts) for name, parts in found.items()}
    return shown, {name: np.concatenate(parts) for name, parts in sorted(plain.items())}


def _organ(labels: str) -> str:
    import json

    return str(json.loads(labels)["organ"])


def make_planted_run(folder: Path, archive: Archive, lesions: Path, *, seed: int = 0) -> Path:
    """Train a run below a folder on composed slides; it fits the archive."""
    findings, organs = patches_by_content(archive, lesions)
    findings = {name: findings[name] for name in FINDINGS}
    entry = archive.encoders()["texture"]
    rng = np.random.default_rng(seed)
    texts, pieces, blocks = [], [], []
    for _ in range(SLIDES):
        organ = str(rng.choice(list(organs)))
        name = str(rng.choice(list(findings)))
        said = [f"Sections show {ORGAN_NAMES[organ]}.", f"{rng.choice(FORMS[name])}."]
        pool = organs[organ]
        own = pool[rng.integers(len(pool), size=(REGIONS, archive.slots))]
        slots = rng.permutation(archive.slots)[:LESION_SLOTS]
        own[0, slots] = findings[name][rng.integers(len(findings[name]), size=LESION_SLOTS)]
        texts.append(" ".join(said))
        pieces.append(said)
        blocks.append(own)
    features = np.concatenate(blocks)
    mask = np.ones(features.shape[:2], np.bool_)
    counts = [REGIONS] * SLIDES
    corpus = corpus_of(texts, pieces, counts, slots=archive.slots, dim=entry["dim"])
    tiling = {key: archive.tiling()[key] for key in ("region_um", "patch_um", "mpp")}
    encoder = {"name": "texture", "revision": entry["revision"], "dim": entry["dim"]}
    corpus = replace(corpus, about=corpus.about | {"encoder": encoder, "tiling": tiling})
    config = resolve("pathflip/mini", overrides=SETTINGS)
    objective = PlantedContrastive(config, corpus, Regions(features, mask, counts))
    objective, dataset = run_dir.prepare(objective, "planted", folder)
    train(folder, objective)
    run_dir.finish(objective, dataset, folder)
    return folder
