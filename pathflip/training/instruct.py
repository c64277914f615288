"""Instruction tuning: a slide model and a language model that answers about slides."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from pathflip.archive import Archive
from pathflip.checkpoints import Checkpoint, load_run, write_whole
from pathflip.compat import check_fits
from pathflip.errors import CheckpointError, ConfigError
from pathflip.models import PathFLIP, PathFLIPInstruct, hub
from pathflip.models.data_init import start_projector
from pathflip.models.instruct import InstructOutput, fingerprint_of
from pathflip.models.small_llm import made_to_read
from pathflip.training.config import TuneConfig
from pathflip.training.dataset import Corpus, make_corpus
from pathflip.training.loader import Batch
from pathflip.training.model_card import tuned_card
from pathflip.training.objective import Stage, Task, about_model, start_batch
from pathflip.training.run_dir import load_tensors

logger = logging.getLogger(__name__)


class Tuning(Task):
    """Answers about slides: cross-entropy of their tokens (Eq. 11), alignment along with it.

    Args:
        config: The settings.
    """

    losses = ("loss", "loss_answer", "loss_slide", "loss_region")
    exports = ("model", "llm")

    def __init__(self, config: TuneConfig) -> None:
        self.config = config
        self.val_slides = min(16, config.batch_size // config.accumulate)
        self._align = 0.0

    # -- beginning --------------------------------------------------------------------------------

    def corpus(self, archive: str) -> Corpus:
        """Returns the slides with a caption or questions, and with which models it begins."""
        config = self.config
        run = load_run(config.run)
        opened = Archive(archive)
        if config.encoder not in (None, run.encoder["name"]):
            raise ConfigError(
                f"{config.run} reads features of {run.encoder['name']}, not {config.encoder}.",
                hint="Leave encoder out.",
            )
        check_fits(opened, run)
        base = hub.find(config.llm)
        if made_to_read(base) not in (None, run.fingerprint):
            logger.warning(
                "%s was made to read another slide model than %s and will read this one worse. "
                "Make one for it: pathflip make-llm OUT --archive %s --run %s",
                config.llm, config.run, archive, config.run,
            )  # fmt: skip
        corpus = make_corpus(
            opened,
            encoder=run.encoder["name"],
            source=config.source,
            pieces=config.pieces,
            seed=config.seed,
            val_fraction=config.val_fraction,
            questions=True,
            captioned=bool(config.align),
        )
        corpus.about["vision"] = {
            "run": run.path.name,
            "name": run.name,
            "fingerprint": run.fingerprint,
        }
        corpus.about["base"] = {"name": config.llm, "fingerprint": fingerprint_of(base)}
        return corpus

    def fitted(self, corpus: Corpus) -> TuneConfig:
        """Returns the settings as they are."""
        return self.config

    def begin(self, corpus: Corpus) -> PathFLIP:
        """Returns the pretrained slide model."""
        run = load_run(self.config.run)
        if run.fingerprint != corpus.about["vision"]["fingerprint"]:
            raise CheckpointError(
                f"{self.config.run} is not the model this tuning began with.",
                hint="Restore it, or begin again in another folder.",
                code="other_model",
            )
        return run.model

    def check(self, corpus: Corpus) -> None:
        """Refuses another base language model than the run began with."""
        if fingerprint_of(hub.find(self.config.llm)) != corpus.about["base"]["fingerprint"]:
            raise CheckpointError(
                f"{self.config.llm} is not the language model this tuning began with: its files "
                "have changed.",
                hint="Restore them, or begin again in another folder.",
                code="other_model",
            )

    def parameters(self, corpus: Corpus) -> tuple[int, int]:
        """Returns how many parameters train in the last stage, and how many never do."""
        model = self._built(self.begin(corpus), corpus)
        kept = self.kept(model)
        sizes = {name: p.numel() for name, p in model.named_parameters()}
        trained = sum(sizes[name] for name in kept)
        return trained, sum(sizes.values()) - trained

    # -- training ---------------------------------------------------------------------------------

    def model(self, vision: PathFLIP, corpus: Corpus) -> PathFLIPInstruct:
        """Returns slide model, new projector and adapter, and the base language model."""
        model = self._built(vision, corpus)
        if self.config.instruct.projector_start == "text":
            batch = start_batch(corpus, self.config)
            train = corpus.members("train").tolist()
            sentences = sorted({text for i in train for text in corpus.pieces[i]})
            start_projector(model, batch.features, batch.patch_mask, sentences)
        return model

    def _built(self, vision: PathFLIP, corpus: Corpus) -> PathFLIPInstruct:
        """The model before anything is fitted to slides: enough to count it, or to be filled."""
        config = self.config
        model = PathFLIPInstruct.from_parts(vision, config.llm, config.instruct, seed=config.seed)
        if model.base["fingerprint"] != corpus.about["base"]["fingerprint"]:
            self.check(corpus)
        return model

    def stages(self, steps_per_epoch: int) -> list[Stage]:
        """Returns the projector's stage, if it has one, and that of all."""
        config = self.config
        first = config.projector_epochs * steps_per_epoch
        rest = config.epochs * steps_per_epoch
        projector = Stage(
            name="projector", start=0, steps=first, lr=config.projector_lr, weight_decay=0.0
        )
        every = Stage(
            name="all",
            start=first,
            steps=rest,
            lr=config.lr,
            weight_decay=config.weight_decay,
            rates={"projector": config.projector_rate, "vision": config.vision_rate},
        )
        return [projector, every] if first else [every]

    def enter(self, model: PathFLIPInstruct, stage: Stage) -> None:
        """The projector alone, or what the settings name; alignment only trains in the latter."""
        self._align = self.config.align if stage.name == "all" else 0.0
        model.trainable(
            "all" if stage.name == "all" else "projector", align=bool(self.config.align)
        )

    def kept(self, model: PathFLIPInstruct) -> Collection[str]:
        """Returns what the last stage trains: the base is not in checkpoints unless it trains."""
        model.trainable("all", align=bool(self.config.align))
        return [name for name, parameter in model.named_parameters() if parameter.requires_grad]

    def forward(
        self, model: Any, features: torch.Tensor, mask: torch.Tensor, batch: Batch, group: Any
    ) -> InstructOutput:
        """Returns the losses of a micro-batch."""
        output: InstructOutput = model(
            features,
            mask,
            batch.examples,
            captions=batch.captions,
            subcaptions=batch.subcaptions,
            negative_choice=batch.negative_choice.to(features.device, non_blocking=True),
            group=group,
            align=self._align,
        )
        return output

    def weights(self, model: PathFLIPInstruct, batches: Sequence[Batch]) -> list[float]:
        """Returns the answers' tokens: their mean is over those of all workers."""
        ids = model.prompter.answer_ids
        return [
            float(sum(len(ids(example.answer)) for own in batch.examples for example in own))
            for batch in batches
        ]

    def parts(self, output: InstructOutput, share: float) -> list[torch.Tensor]:
        """Returns the losses, that of the answers as their tokens count."""
        answer = output.loss_answer * share
        # With share 1, as in one process, nothing is rounded anew.
        loss = output.loss + (answer - output.loss_answer)
        return [loss, answer, output.loss_slide, output.loss_region]

    # -- validation -------------------------------------------------------------------------------

    def size(self, output: InstructOutput, slides: Sequence[int]) -> int:
        """Returns the number of answer tokens."""
        return output.tokens

    def judge(
        self, corpus: Corpus, slides: Sequence[int], vectors: torch.Tensor, losses: dict[str, Any]
    ) -> dict[str, Any]:
        """Returns the losses."""
        return {"n": len(slides), **losses}

    # -- the end ----------------------------------------------------------------------------------

    def export(self, run: Path, corpus: Corpus, best: Checkpoint, result: dict[str, Any]) -> str:
        """Writes RUN/model, what was tuned, and RUN/llm, a language model any engine reads."""
        model = self._built(PathFLIP.from_pretrained(str(run / "init")), corpus)
        load_tensors(model, best.tensors("model"), self.kept(model))
        model.eval()
        write_whole(run / "llm", model.save_merged, step=best.step)
        vision, card = corpus.about["vision"], tuned_card(run.name, self.config, corpus, result)
        fingerprint = model.vision.fingerprint()
        # A slide model that did not change keeps its name, and with it the vectors made with it.
        name = vision["run"] if fingerprint == vision["fingerprint"] else run.name
        about = about_model(self.config, corpus, result, run=name, fingerprint=fingerprint) | {
            "kind": "instruct",
            "instruct_fingerprint": model.fingerprint(),
            "base": corpus.about["base"],
            "max_regions": self.config.max_regions,
        }

        def fill(part: Path) -> None:
            model.save_pretrained(part)
            (part / "pathflip.json").write_text(json.dumps(about, indent=1))
            (part / "README.md").write_text(card)

        write_whole(run / "model", fill, step=best.step)
        return card
