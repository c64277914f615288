"""Runs of patch models that nothing was trained for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from pathflip.checkpoints import write_whole
from pathflip.models import MRPLIP

TEXTURE = {"name": "texture", "revision": "1", "dim": 131}
TEXTS = [f"{word} nuclei of tissue" for word in ("round", "spindle", "clear", "dark")]


def make_run(
    folder: Path, encoder: dict[str, Any], *, parent_um: float, node_px: int, **settings: Any
) -> Path:
    """Write a run of an untrained mini model, as training leaves it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MRPLIP.from_preset(
            "mrplip/mini", feature_dim=encoder["dim"], texts=TEXTS, **settings
        ).eval()
    about = {
        "family": "mrplip",
        "kind": "multiresolution",
        "run": folder.name,
        "fingerprint": model.fingerprint(),
        "encoder": encoder,
        "trees": {"parent_um": parent_um, "node_px": node_px},
    }

    def fill(part: Path) -> None:
        model.save_pretrained(part)
        (part / "pathflip.json").write_text(json.dumps(about))

    write_whole(folder / "model", fill)
    return folder
