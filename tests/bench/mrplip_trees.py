"""Benchmark of reading patch trees: ``python -m tests.bench.mrplip_trees --json``.

Trees of slides it makes, 1024 µm and 85 nodes of 512 px each, are read three ways, in CPU-seconds
of this process and its reader: ``bare`` opens the slide in this process and reads each level of
each tree by one ``Slide.read_patches``; ``scores`` is what the quality scores of those pixels take,
which the archive stores; ``trees`` is what the actor of the job does with both, by a reader
process, embedding nothing; ``texture`` also embeds. The ratio is (bare + scores) / trees: 1 would
mean that isolation and bookkeeping cost nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from jobs.ray_data import from_ipc
from jobs.tree_actor import SlideTask, TreeActor, node_groups
from pathflip import Slide
from pathflip.archive.commit import Committer
from pathflip.archive.create import create_archive
from pathflip.archive.schema import slides_schema
from pathflip.encoders import Encoder, load_encoder
from pathflip.geometry import TreeSpec, patch_tree
from pathflip.slides.quality import patch_quality
from pathflip.slides.sources import stat_source
from pathflip.slides.tissue import TissueMask
from pathflip.synth import make_slide
from tests.archives import TILING, filled

SPEC = TreeSpec()
ROOTS = [[0, 0], [1, 0], [0, 1], [1, 1]]
SIDE_PX = 8192  # two roots a side at 0.25 µm/px


class Nothing:
    """Encoder that looks at no pixel, so that only reading is measured."""

    name, revision, dim, input_px, mpp, licence = "texture", "0", 1, 512, None, "none"

    def __call__(self, patches: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return zeros [n, 1]."""
        return np.zeros((len(patches), 1), np.float32)


def cpu_s(actor: TreeActor | None = None) -> float:
    """CPU time of this process, and of an actor's reader processes."""
    pids = [one._process.pid for one in actor._readers if one._process] if actor else []
    # The kernel's clock of another process: see clock_getcpuclockid(3).
    return time.process_time() + sum(time.clock_gettime(~pid << 3 | 2) for pid in pids)


def make_archive(folder: Path, slides: list[Path]) -> str:
    """Make an archive that knows these slides and that all of each is tissue."""
    uri = str(folder / "archive")
    create_archive(uri, tiling=TILING)
    rows = []
    for path in slides:
        with Slide(path) as slide:
            shape = (-(-slide.height // 32), -(-slide.width // 32))
            mask = TissueMask(np.ones(shape, np.bool_), 8.0, slide.mpp)
            rows.append(
                {"slide_id": path.stem, "uri": str(path), "status": "ready", "n_regions": 0}
                | {"fingerprint": "f", "encoders": [], "mpp": slide.mpp, "mpp_source": "tiff"}
                | {"width": slide.width, "height": slide.height, "tissue_mpp": 8.0}
                | {"tissue_png": mask.to_png(), "mtime_ns": stat_source(path).mtime_ns}
                | {"bytes": stat_source(path).bytes}
            )
    with Committer(uri) as committer:
        committer.upsert("slides", filled(slides_schema(), rows))
    return uri


def read_bare(slides: list[Path]) -> tuple[float, float]:
    """Read each level of each tree by itself; return CPU-seconds of reads and of scores."""
    read = scored = 0.0
    out = np.zeros((64, SPEC.node_px, SPEC.node_px, 3), np.uint8)
    for path in slides:
        with Slide(path, halving="exact") as slide:
            for tx, ty in ROOTS:
                tree = patch_tree(tx, ty, mpp=slide.mpp)
                for level in range(4):
                    at = np.flatnonzero(tree.level == level)
                    mpp, begun = float(tree.mpp[at[0]]), cpu_s()
                    ok = slide.read_patches(tree.rects[0, at], mpp=mpp, out=out[: len(at)])
                    read += cpu_s() - begun
                    assert ok.all()
                    begun = cpu_s()
                    patch_quality(out[: len(at)])
                    scored += cpu_s() - begun
    return read, scored


def read_trees(actor: TreeActor, slides: list[Path]) -> int:
    """Read the same nodes as the job does; return them."""
    count = 0
    for path in slides:
        task = SlideTask(slide_id=path.stem, new=ROOTS, lacking=[])
        table = actor([{"task": task.to_json()}])
        count += json.loads(table.schema.metadata[b"outcome"])["nodes"]
        assert sum(from_ipc(rows).num_rows for rows in table["rows"].to_pylist()) == 2 * len(ROOTS)
    return count


def measure(folder: Path, *, rounds: int) -> dict[str, Any]:
    """Return CPU-seconds of a tree for each way, and their ratios, by layout of the pyramid."""
    found: dict[str, Any] = {}
    texture = load_encoder("texture")
    for layout in ("generic", "aperio"):
        path = folder / f"{layout}.{'svs' if layout == 'aperio' else 'tif'}"
        make_slide(path, width=SIDE_PX, height=SIDE_PX, mpp=0.25, seed=1, layout=layout)
        uri = make_archive(folder / layout, [path])
        times: dict[str, list[float]] = {
            name: [] for name in ("bare", "scores", "trees", "texture")
        }
        encoders: dict[str, Encoder] = {"trees": Nothing(), "texture": texture}
        actors = {}
        for name, encoder in encoders.items():
            actor = TreeActor(uri, SPEC, [("texture", texture.revision)], "cpu", 1, 1, 60.0)
            actor._encoders["texture"] = encoder
            actors[name] = actor
        for turn in range(rounds + 1):  # the first one warms up
            read, scored = read_bare([path])
            spent = {"bare": read, "scores": scored}
            for name, actor in actors.items():
                if not turn:
                    read_trees(actor, [path])
                begun = cpu_s(actor)
                assert read_trees(actor, [path]) == len(ROOTS) * 85
                spent[name] = cpu_s(actor) - begun
            for name, value in spent.items() if turn else ():
                times[name].append(value)
        for actor in actors.values():
            actor.close()
        best = {name: min(values) / len(ROOTS) for name, values in times.items()}
        found[layout] = {
            "cpu_s_a_tree": {name: round(value, 4) for name, value in best.items()},
            "ratio": round((best["bare"] + best["scores"]) / best["trees"], 3),
        }
    groups = node_groups(np.ones((20, 85), np.bool_))
    found["requests_of_20_trees"] = len(groups)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for layout in ("generic", "aperio"):
            (Path(folder) / layout).mkdir()
        found = measure(Path(folder), rounds=arguments.rounds)
    found["seconds"] = round(time.monotonic() - begun, 1)
    if arguments.json:
        print(json.dumps(found))
        return
    for layout in ("generic", "aperio"):
        print(layout, found[layout], file=sys.stdout)


if __name__ == "__main__":
    main()
