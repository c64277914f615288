"""Zero-shot tiles: part ``tiles`` of ``mrplip``.

Ten thousand pictures of 224 px at 0.5 µm/px (JPEG files, a folder per class) are read, encoded with
``texture``, projected by an untrained ``mrplip/mini``, scored against nine classes by one prompt
and by the ensemble, and resampled 1,000 times. CPU seconds of the process, on one core; the parts
are measured by themselves on a tenth of the tiles.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from pathflip.encoders import load_encoder
from pathflip.evaluation.patch_text import PatchReader, cut_picture
from pathflip.evaluation.prompts import read_tile_task
from pathflip.evaluation.tiles import encode_tiles, list_tiles, zero_shot
from pathflip.geometry import TreeSpec
from pathflip.interop.tile_sets import read_tile
from pathflip.models.mrplip import MRPLIP

PX, MPP = 224, 0.5


def make_tiles(folder: Path, count: int) -> Path:
    """Write tiles of blurred grain, in the layout of NCT-CRC."""
    classes = list(read_tile_task("nct-crc").classes)
    rng = np.random.default_rng(0)
    grain = rng.integers(0, 256, (2048, 2048, 3), dtype=np.uint8)
    tissue = cv2.GaussianBlur(grain, (0, 0), 3)
    tissue = cv2.normalize(tissue, None, 60, 240, cv2.NORM_MINMAX)
    for i in range(count):
        x, y = rng.integers(0, 2048 - PX, 2).tolist()
        path = folder / "CRC-VAL-HE-7K" / classes[i % len(classes)] / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), tissue[y : y + PX, x : x + PX])
    return folder


def reader() -> PatchReader:
    """Return a reader with an untrained mini model over ``texture``."""
    encoder, spec = load_encoder("texture"), TreeSpec(parent_um=256.0, node_px=128)
    texts = [f"{name} {i}" for i, name in enumerate(("tissue", "tumour", "stroma", "fat"))]
    model = MRPLIP.from_preset("mrplip/mini", feature_dim=encoder.dim, texts=texts).eval()
    return PatchReader(
        name="bench",
        model=model,
        base={"name": encoder.name, "revision": encoder.revision, "dim": encoder.dim},
        encoder=encoder,
        level_mpp=spec.level_mpp,
        node_px=spec.node_px,
        levels=(0, 1, 2, 3),
    )


def cpu_s(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return CPU seconds of this process and the result."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def measure(count: int) -> dict[str, Any]:
    """Measure all tiles at once, and the parts on a tenth of them."""
    import torch

    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    model, task = reader(), read_tile_task("nct-crc")
    with tempfile.TemporaryDirectory() as folder:
        make_tiles(Path(folder), count)
        listing, tiles = cpu_s(lambda: list_tiles(folder, task))
        encoding, encoded = cpu_s(lambda: encode_tiles(tiles, model, task))
        scoring, document = cpu_s(lambda: zero_shot(encoded, model, task))
        few = tiles[:: max(1, len(tiles) // 1000)]
        reading, pictures = cpu_s(lambda: [read_tile(tile) for tile in few])
        cutting, cuts = cpu_s(
            lambda: [cut for rgb in pictures for cut in cut_picture(rgb, mpp=MPP, reader=model)]
        )
        assert model.encoder is not None
        pixels = np.concatenate([cut.pixels for cut in cuts])
        bare, _ = cpu_s(lambda: model.encoder(pixels))
    per_1000 = {
        name: 1000 * seconds / len(few)
        for name, seconds in (("read", reading), ("cut", cutting), ("texture", bare))
    }
    return {
        "tiles": len(tiles),
        "nodes": len(pixels) * len(tiles) // len(few),
        "cpu_s": listing + encoding + scoring,
        "list_s": listing,
        "encode_s": encoding,
        "score_s": scoring,
        "per_1000_tiles_cpu_s": per_1000,
        "weighted_f1": document["pe"]["weighted_f1"],
    }
