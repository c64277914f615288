"""Fixtures of tuning tests: a small archive with captions and questions, two small models."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from pathflip.archive import Archive
from pathflip.checkpoints import write_whole
from pathflip.interop.questions import import_questions
from pathflip.models import PathFLIP
from pathflip.training.config import TuneConfig, resolve_tuning
from tests.archives import DIM, FINDINGS, ORGANS, make_archive
from tests.serving import SMALL, make_base

STEPS_PER_EPOCH = 4
SETTINGS = (
    "projector_epochs=1", "epochs=2", "batch_size=4", "save_every=5", "log_every=1", "lr=0.005",
    "projector_lr=0.005", "instruct.lora_r=4", "examples_per_slide=2", "num_subcaptions=4",
)  # fmt: skip
"""Four steps of the first stage, eight of the second."""
STEPS = 12


@dataclass(frozen=True, kw_only=True)
class Given:
    """Inputs of a tuning.

    Attributes:
        archive: 20 slides of 10 patients, four of them for validation; slide 0 has no caption, and
            every third has no question.
        run: A slide model, as a pretraining run exports it; not trained.
        base: A language model; not trained.
    """

    archive: str
    run: Path
    base: Path

    def settings(self, *more: str, preset: str | None = None) -> TuneConfig:
        """The settings of a small tuning."""
        given = {"run": str(self.run), "llm": str(self.base)}
        return resolve_tuning(preset, overrides=[*SETTINGS, *more], given=given)


def make_given(folder: Path) -> Given:
    """Make all of it below a folder, in seconds."""
    archive = make_archive(
        folder / "archive", slides=20, split=lambda n: "val" if n % 10 > 7 else "train"
    )
    said = Archive(archive).captions()
    lines = []
    for slide, text in zip(said["slide_id"].to_pylist(), said["text"].to_pylist(), strict=True):
        if int(slide[-3:]) % 3 == 2:
            continue
        organ = next(name for name in ORGANS if name in text)
        lines.append({"slide": slide, "question": "Organ?", "options": ORGANS, "answer": organ})
        for name in FINDINGS[:3]:
            answer = "yes" if name in text else "no"
            lines.append(
                {"slide": slide, "question": f"Any {name}?", "options": ["yes", "no"],
                 "answer": answer, "kind": "finding"}
            )  # fmt: skip
    asked = folder / "vqa.jsonl"
    asked.write_text("\n".join(map(json.dumps, lines)))
    import_questions(str(archive), asked)
    base = make_base(folder / "base", [*said["text"].to_pylist(), asked.read_text()], width=32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        texts = said["text"].to_pylist()
        vision = PathFLIP.from_preset("pathflip/mini", feature_dim=DIM, texts=texts, **SMALL).eval()
    opened = Archive(archive)
    entry = opened.encoders()["tex"]
    about = {
        "run": "seen",
        "fingerprint": vision.fingerprint(),
        "encoder": {"name": "tex", "revision": entry["revision"], "dim": entry["dim"]},
        "tiling": opened.tiling(),
    }

    def fill(part: Path) -> None:
        vision.save_pretrained(part)
        (part / "pathflip.json").write_text(json.dumps(about))

    write_whole(folder / "seen" / "model", fill)
    return Given(archive=str(archive), run=folder / "seen", base=base)
