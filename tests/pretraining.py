"""A short pretraining for tests of what interrupts it, and how its run is compared with another."""

from __future__ import annotations

from pathlib import Path

import torch

from pathflip.checkpoints import latest_checkpoint
from pathflip.training import run_dir
from tests.archives import TINY, make_archive

STEPS, SAVE_EVERY = 12, 5  # who goes on from step 5 has too few steps left to fail again
SETTINGS = (
    *TINY, f"steps={STEPS}", f"save_every={SAVE_EVERY}", "val_every=1", "batch_size=8",
    "log_every=1", "lr=0.003", "model.negatives=gathered", "num_subcaptions=4",
)  # fmt: skip


def make_cohort(folder: Path) -> str:
    """Make an archive of 40 slides of 20 patients, 8 of them for validation."""
    return str(
        make_archive(folder / "a", slides=40, split=lambda n: "val" if n % 10 > 7 else "train")
    )


def words(archive: str, run: Path, *settings: str) -> list[str]:
    """Words of ``pathflip pretrain`` with these settings and others."""
    found = ["--archive", archive, "--run", str(run), "--preset", "pathflip/mini", "--json"]
    return found + [word for setting in (*SETTINGS, *settings) for word in ("-o", setting)]


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Read the weights and the optimiser's state of a run that is done."""
    found = latest_checkpoint(run / "checkpoints")
    assert found is not None
    assert found.step == STEPS
    return {
        f"{name}/{key}": value
        for name in ("model", "optimizer")
        for key, value in found.tensors(name).items()
    }


def assert_close(run: Path, other: Path, *, within: float) -> None:
    """Check that no weight of a run is further from another's."""
    mine, theirs = weights(run), weights(other)
    assert mine.keys() == theirs.keys()
    gaps = {key: float((mine[key] - theirs[key]).abs().max()) for key in mine}
    worst = max(gaps, key=lambda key: gaps[key])
    assert gaps[worst] <= within, f"{worst} differs by {gaps[worst]:.2e}"


def curve(run: Path) -> list[float]:
    """Read the loss of every step."""
    return [line["loss"] for line in run_dir.read_metrics(run) if "loss" in line]


def logged_step(run: Path) -> int:
    """Return the last step that the log has, 0 before the first."""
    return max((line["step"] for line in run_dir.read_metrics(run)), default=0)
