"""Contrastive pretraining: slides and captions into one space."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pathflip.archive import Archive
from pathflip.checkpoints import Checkpoint, write_whole
from pathflip.models import PathFLIP, PathFLIPOutput
from pathflip.models.data_init import warm_start
from pathflip.training.config import PretrainConfig
from pathflip.training.dataset import Corpus, make_corpus
from pathflip.training.loader import Batch
from pathflip.training.model_card import model_card
from pathflip.training.objective import Stage, Task, about_model, start_batch
from pathflip.training.run_dir import load_tensors


class Pretraining(Task):
    """Slides and captions into one space: the alignment losses of the paper (Eq. 6-10).

    Args:
        config: The settings.
    """

    losses = ("loss", "loss_slide", "loss_region")

    def __init__(self, config: PretrainConfig) -> None:
        self.config = config

    def corpus(self, archive: str) -> Corpus:
        """Returns the slides with a caption."""
        config = self.config
        return make_corpus(
            Archive(archive),
            encoder=config.encoder,
            source=config.source,
            pieces=config.pieces,
            seed=config.seed,
            val_fraction=config.val_fraction,
        )

    def fitted(self, corpus: Corpus) -> PretrainConfig:
        """Returns the settings with the width of the archive's features in them."""
        width = corpus.about["encoder"]["dim"]
        return replace(self.config, model=replace(self.config.model, feature_dim=width))

    def begin(self, corpus: Corpus) -> PathFLIP:
        """Returns the model at its start: the same weights for the same seed and slides.

        A tokenizer, if need be, is trained on the captions to train on; what the model takes from
        data before training (input statistics, warm start) is fitted to some of the slides.
        """
        model = self._drawn(corpus)
        config = self.config
        if config.model.warm_start or config.model.feature_norm != "none":
            batch = start_batch(corpus, config)
            sentences = list(dict.fromkeys(t for i in batch.slides for t in corpus.pieces[i]))
            if config.model.warm_start:
                warm_start(model, batch.features, batch.patch_mask, sentences, seed=config.seed)
            else:
                model.fit_input(batch.features[batch.patch_mask].float())
        return model

    def _drawn(self, corpus: Corpus) -> PathFLIP:
        torch.manual_seed(self.config.seed)
        overrides = asdict(self.config.model) | {"feature_dim": corpus.about["encoder"]["dim"]}
        texts = [corpus.captions[i] for i in corpus.members("train").tolist()]
        return PathFLIP.from_preset(self.config.preset, texts=texts, **overrides)

    def parameters(self, corpus: Corpus) -> tuple[int, int]:
        """Returns how many parameters train, and that none is frozen."""
        model = self._drawn(corpus)
        return sum(p.numel() for p in model.parameters() if p.requires_grad), 0

    def model(self, vision: PathFLIP, corpus: Corpus) -> PathFLIP:
        """Returns the slide model itself."""
        return vision

    def stages(self, steps_per_epoch: int) -> list[Stage]:
        """Returns the one stage there is."""
        config = self.config
        return [
            Stage(
                name="all",
                start=0,
                steps=config.total_steps(steps_per_epoch),
                lr=config.lr,
                weight_decay=config.weight_decay,
            )
        ]

    def forward(
        self, model: Any, features: torch.Tensor, mask: torch.Tensor, batch: Batch, group: Any
    ) -> PathFLIPOutput:
        """Returns losses and vectors of a micro-batch."""
        output: PathFLIPOutput = model(
            features,
            mask,
            batch.captions,
            batch.subcaptions,
            negative_choice=batch.negative_choice.to(features.device, non_blocking=True),
            group=group,
        )
        return output

    def size(self, output: PathFLIPOutput, slides: Sequence[int]) -> int:
        """Returns the number of slides."""
        return len(slides)

    def vectors(self, output: PathFLIPOutput) -> torch.Tensor:
        """Returns the vectors of slides and captions."""
        return torch.stack([output.slide, output.text])

    def judge(
        self, corpus: Corpus, slides: Sequence[int], vectors: torch.Tensor, losses: dict[str, Any]
    ) -> dict[str, Any]:
        """Returns retrieval among the validation slides, and the losses."""
        from pathflip.evaluation.retrieval import retrieval

        captions = [corpus.captions[i] for i in slides]
        found = retrieval(vectors[0].numpy(), vectors[1].numpy(), captions, resamples=0, shuffles=0)
        recalls = [*found["itr"].values(), *found["tir"].values()]
        return {
            "n": len(slides),
            "protocol": found["protocol"],
            "itr": found["itr"],
            "tir": found["tir"],
            "chance": found["chance"],
            "mean_recall": float(np.mean(recalls)),
            **losses,
        }

    def export(self, run: Path, corpus: Corpus, best: Checkpoint, result: dict[str, Any]) -> str:
        """Writes RUN/model."""
        model = PathFLIP.from_pretrained(str(run / "init"))
        load_tensors(model, best.tensors("model"))
        card = model_card(run.name, self.config, corpus, result)
        about = about_model(
            self.config, corpus, result, run=run.name, fingerprint=model.fingerprint()
        )

        def fill(part: Path) -> None:
            model.save_pretrained(str(part))
            (part / "pathflip.json").write_text(json.dumps(about, indent=1))
            (part / "README.md").write_text(card)

        write_whole(run / "model", fill, step=best.step)
        return card
