"""PathFLIP on MR-PLIP's features beside the base encoder's: ``… mrplip_under_pathflip DIR --json``.

One cohort of slides with reports and planted findings (the demo's kind) is archived with the base
encoder and cut into trees. Captions are those of a captioner that looks at single patches. A
``sparse`` one says the sentences of the report whose findings cover a quarter of the node, each in
half of such nodes, and nothing of 94 % of the nodes; a ``full`` one names the organ, too, and the
findings that cover a tenth, four times in five. MR-PLIP is trained on those of the training slides,
the same slides are archived with its features, cut the same, and PathFLIP is trained on both
archives with the same settings and seeds. Whatever is finished is not done again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jobs.ablations import AblationConfig, ablations, pretrain_config, spread
from jobs.ingest import ingest
from jobs.ingest.config import IngestConfig
from jobs.pretrain import pretrain
from jobs.trees import TreesConfig, trees
from pathflip import Archive
from pathflip.archive.trees import read_trees
from pathflip.geometry import Tiling, TreeSpec, patch_tree
from pathflip.interop.tree_captions import (
    PROMPT,
    import_tree_captions,
    read_tree_captions,
    tree_image_name,
)
from pathflip.slides.outlines import fill
from pathflip.synth import make_cohort
from tests.bench.mrplip_planted import cell

SPEC = TreeSpec(parent_um=256, node_px=128)
TILING = Tiling(region_um=256, patch_um=64)
"""Patches show as much as a node of 20x."""
CAPTIONERS = {"sparse": (0.25, 0.5), "full": (0.1, 0.8)}
"""{captioner: share of a node that a finding covers at least, chance that it is said then}."""
MASK_UM = 4.0


def archives(
    folder: Path, *, slides: int, seed: int, steps: int, captioner: str
) -> dict[str, Path]:
    """Make {"base", "mrplip": archive} of one cohort, and the run of MR-PLIP between them."""
    made = {"base": folder / "base", "mrplip": folder / f"features-{captioner}"}
    if (folder / f"archived-{captioner}").exists():
        return made
    make_cohort(folder, slides=slides, seed=seed, size_um=1024.0)
    sources = [str(folder / "slides")]
    common: dict[str, Any] = {
        "tiling": TILING,
        "patients": str(folder / "labels.csv"),
        "captions": str(folder / "captions.csv"),
    }
    ingest(sources, str(made["base"]), IngestConfig(**common))
    config = TreesConfig(parent_um=SPEC.parent_um, node_px=SPEC.node_px)
    trees(str(made["base"]), config)
    lines = folder / f"captions-{captioner}.jsonl"
    said = node_captions(Archive(made["base"]), folder, seed=seed, captioner=captioner)
    lines.write_text("".join(said))
    captions = read_tree_captions(Archive(made["base"]), lines)
    import_tree_captions(str(made["base"]), captions, source=captioner)
    given = [f"steps={steps}", f"source={captioner}"]
    settings = pretrain_config(preset="mrplip/mini", overrides=given)
    run = folder / f"patches-{captioner}"
    pretrain(str(made["base"]), run, settings)
    ingest(sources, str(made["mrplip"]), IngestConfig(encoder=f"mrplip:{run}", **common))
    (folder / f"archived-{captioner}").touch()
    return made


def node_captions(archive: Archive, folder: Path, *, seed: int, captioner: str) -> Iterator[str]:
    """Yield the lines of a captioner's output for the nodes of an archive's trees."""
    covered, chance = CAPTIONERS[captioner]
    reports = json.loads((folder / "sentences.json").read_text())
    places = {
        row["slide_id"]: (Path(row["uri"]).stem, row["width"], row["height"])
        for row in archive.slides("ready", ["slide_id", "uri", "width", "height"]).to_pylist()
    }
    stored: dict[str, list[dict[str, Any]]] = {}
    for tree in read_trees(archive).to_pylist():
        stored.setdefault(tree["slide_id"], []).append(tree)
    for slide_id, mine in sorted(stored.items()):
        name, width, height = places[slide_id]
        scale = MASK_UM / mine[0]["mpp"]
        shape = (int(height / scale), int(width / scale))
        lesions = lesion_masks(folder / "lesions" / f"{name}.geojson", scale, shape)
        said = [
            (one["text"], np.any([lesions[key] for key in one["lesions"]], axis=0))
            for one in reports[name]
            if one["lesions"]
        ]
        everywhere = [
            one["text"] for one in reports[name] if one["kind"] == "organ" and captioner == "full"
        ]
        rng = np.random.default_rng([seed, *slide_id.encode()])
        for tree in mine:
            cut = patch_tree(
                tree["tx"], tree["ty"], mpp=tree["mpp"], levels=tree["levels"], spec=SPEC
            )
            for node, rect in enumerate(cut.rects[0]):
                x0, y0, x1, y1 = (
                    np.array([rect[0], rect[1], rect[0] + rect[2], rect[1] + rect[3]]) / scale
                ).astype(int)
                seen = [
                    text
                    for text, mask in said
                    if mask[y0:y1, x0:x1].mean() >= covered and rng.random() < chance
                ]
                seen = everywhere + seen
                line = {
                    "Image": tree_image_name(name, tree["tx"], tree["ty"], node),
                    "prompt": PROMPT,
                    "Answer": " ".join(seen) or "Tissue without a focal finding.",
                    "model_id": "reports",
                }
                yield json.dumps(line) + "\n"


def lesion_masks(path: Path, scale: float, shape: tuple[int, int]) -> dict[str, NDArray[np.bool_]]:
    """Read {id of a lesion: bool [h, w]} of a slide's outlines."""
    found = {}
    for feature in json.loads(path.read_text())["features"]:
        shapes = feature["geometry"]["coordinates"]
        if feature["geometry"]["type"] == "Polygon":
            shapes = [shapes]
        polygons = [
            (np.array(rings[0], float), [np.array(hole, float) for hole in rings[1:]])
            for rings in shapes
        ]
        found[feature["id"]] = fill(polygons, scale=scale, h=shape[0], w=shape[1])
    return found


def measure(
    folder: Path,
    *,
    slides: int,
    seed: int,
    seeds: int,
    steps: int,
    captioner: str,
    overrides: list[str],
) -> dict[str, Any]:
    """Train PathFLIP on both; return {"table", "difference": mrplip minus base, "chance"}."""
    values: dict[str, list[dict[str, Any]]] = {}
    chance: dict[str, Any] = {}
    both = archives(folder, slides=slides, seed=seed, steps=steps, captioner=captioner)
    for name, archive in both.items():
        settings = pretrain_config(preset="pathflip/mini", overrides=overrides)
        config = AblationConfig(
            seeds=seeds,
            only=("full",),
            tasks=str(folder / "tasks.yaml"),
            truth=str(folder / "lesions"),
        )
        found = ablations(
            str(archive), folder / f"slides-{archive.name}", config, settings=settings
        )
        values[name] = [row["metrics"] for row in found["runs"]]
        chance |= found["chance"]
    keys = list(values["base"][0])
    return {
        "table": {
            name: {key: spread([run[key] for run in runs]) for key in keys}
            for name, runs in values.items()
        },
        "difference": {
            key: spread(
                [
                    None if a[key] is None or b[key] is None else a[key] - b[key]
                    for a, b in zip(values["mrplip"], values["base"], strict=True)
                ]
            )
            for key in keys
        },
        "chance": chance,
    }


def main() -> None:
    """Run the benchmark and print one JSON document, or a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where cohort, archives and runs are kept")
    parser.add_argument("--slides", type=int, default=320)
    parser.add_argument("--seed", type=int, default=21, help="seed of the cohort")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of PathFLIP on each")
    parser.add_argument("--steps", type=int, default=700, help="steps of MR-PLIP")
    parser.add_argument("--captioner", choices=list(CAPTIONERS), default="full")
    parser.add_argument("-o", dest="overrides", action="append", default=[])
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    document = measure(
        given.folder.absolute(),
        slides=given.slides,
        seed=given.seed,
        seeds=given.seeds,
        steps=given.steps,
        captioner=given.captioner,
        overrides=given.overrides,
    )
    if given.json:
        print(json.dumps(document, indent=1))
        return
    for key, gain in document["difference"].items():
        base, over = (document["table"][name][key] for name in ("base", "mrplip"))
        print(f"{key:32} {cell(base)}  {cell(over)}  {cell(gain)}  {document['chance'].get(key)}")


if __name__ == "__main__":
    main()
