"""Reading of patch trees: part ``trees`` of ``mrplip``.

Trees of slides it makes, 1024 µm and 85 nodes of 512 px each, are read three ways, in CPU-seconds
of this process and its reader: ``bare`` reads each level of each tree by one ``Slide.read_patches``
in this process; ``scores`` is what the quality scores of those pixels take, which the archive
stores; ``trees`` is what the actor of the job does with both, by a reader process, embedding
nothing, and ``actor`` the part of it that is not the reader's; ``texture`` also embeds. Slides are
open on all sides. The ratio is (bare + scores) / trees, the same work on both sides: 1 would mean
that isolation and bookkeeping cost nothing. ``ratio_unscored`` is bare / trees.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from jobs.tree_actor import SlideTask, TreeActor, node_groups
from jobs.worker import from_ipc
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
ROOT_PX = 4096  # at 0.25 µm/px


Report = dict[str, Any]


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


def read_bare(
    slide: Slide, roots: list[list[int]], out: np.ndarray[Any, Any]
) -> tuple[float, float]:
    """Read each level of each tree by itself; return CPU-seconds of reads and of scores."""
    read = scored = 0.0
    for tx, ty in roots:
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


def read_trees(actor: TreeActor, path: Path, roots: list[list[int]]) -> tuple[float, float]:
    """Read the same nodes as the job does; return CPU-seconds, of all and of the actor alone."""
    task = SlideTask(slide_id=path.stem, new=roots, lacking=[])
    begun, alone = cpu_s(actor), cpu_s()
    table = actor([{"task": task.to_json()}])
    spent, own = cpu_s(actor) - begun, cpu_s() - alone
    assert json.loads(table.schema.metadata[b"outcome"])["nodes"] == len(roots) * 85
    assert sum(from_ipc(rows).num_rows for rows in table["rows"].to_pylist()) == 2 * len(roots)
    return spent, own


def measure(*, side: int, rounds: int, layouts: Sequence[str]) -> Report:
    """Return CPU-seconds of a tree for each way, and their ratios, by layout of the pyramid.

    Args:
        side: Roots a side of the slide.
        rounds: Times that everything is read, of which the best counts.
        layouts: Layouts, see :func:`pathflip.synth.make_slide`.
    """
    cv2.setNumThreads(1)
    report: Report = {"requests_of_20_trees": len(node_groups(np.ones((20, 85), np.bool_)))}
    with tempfile.TemporaryDirectory() as folder:
        for layout in layouts:
            report[layout] = _layout(Path(folder), layout, side=side, rounds=rounds)
    return report


def _layout(folder: Path, layout: str, *, side: int, rounds: int) -> Report:
    path = folder / f"{layout}.{'svs' if layout == 'aperio' else 'tif'}"
    roots = [[tx, ty] for ty in range(side) for tx in range(side)]
    make_slide(path, width=side * ROOT_PX, height=side * ROOT_PX, mpp=0.25, seed=1, layout=layout)
    uri = make_archive(folder / f"of_{layout}", [path])
    texture = load_encoder("texture")
    encoders: dict[str, Encoder] = {"trees": Nothing(), "texture": texture}
    actors = {}
    for name, encoder in encoders.items():
        actors[name] = TreeActor(uri, SPEC, [("texture", texture.revision)], "cpu", 1, 1, 60.0)
        actors[name]._encoders["texture"] = encoder
    out = np.zeros((64, SPEC.node_px, SPEC.node_px, 3), np.uint8)
    rows: list[dict[str, float]] = []
    with Slide(path, halving="exact") as slide:
        for turn in range(rounds + 2):  # two warm up: the reader process starts in the first
            row = dict(zip(("bare", "scores"), read_bare(slide, roots, out), strict=True))
            for name, actor in actors.items():
                spent, own = read_trees(actor, path, roots)
                row |= {name: spent} | ({"actor": own} if name == "trees" else {})
            rows += [row] if turn > 1 else []
    for actor in actors.values():
        actor.close()
    best = {name: min(row[name] for row in rows) / len(roots) for name in rows[0]}
    return {
        "cpu_s_a_tree": best,
        "ratio": (best["bare"] + best["scores"]) / best["trees"],
        "ratio_unscored": best["bare"] / best["trees"],
    }
