"""Instruction tuning: a slide model and a language model that answers about slides.

PathFLIP, arXiv 2512.17621: the loss is the cross-entropy of the answers' tokens, Eq. 11. It trains
in two stages, the projector alone on captions, then everything the settings name on captions and
questions. The base language model is read, never written or copied into checkpoints.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pathflip.archive import Archive
from pathflip.calibration import (
    FEWEST,
    FEWEST_UNANSWERABLE,
    Calibration,
    fit_bias,
    fit_temperature,
)
from pathflip.checkpoints import Checkpoint, load_run, write_whole
from pathflip.compat import check_fits
from pathflip.errors import CheckpointError, ConfigError
from pathflip.models import PathFLIP, PathFLIPInstruct, hub
from pathflip.models.data_init import start_projector
from pathflip.models.instruct import InstructOutput, fingerprint_of
from pathflip.models.llm import compile_layers, recompute_layers
from pathflip.models.small_llm import made_to_read
from pathflip.slide_qa import ChoiceQuestion, mode_of, offers_abstention, score_choices
from pathflip.text import CANNOT_TELL
from pathflip.training.config import TuneConfig
from pathflip.training.dataset import Corpus, make_corpus
from pathflip.training.model_card import about_model, tuned_card
from pathflip.training.objective import Loss, Objective, Stage, Worker
from pathflip.training.run_dir import load_tensors, write_model
from pathflip.training.sharding import shard_layers
from pathflip.training.slide_batches import VAL_SLIDES, SlideBatch, SlideDataset, named_means
from pathflip.training.targets import with_targets

logger = logging.getLogger(__name__)

SHARE_OF_A_CARD = 0.25
"""Share of a GPU's memory above which a language model's weights are cut over several."""
CALIBRATE_ON = 500
"""Validation questions that a temperature is fitted on, at most."""


class Instruct(Objective[SlideDataset, TuneConfig]):
    """Instruction tuning; the slide model's alignment losses may train along."""

    exports = ("model", "llm")

    def __init__(self, config: TuneConfig) -> None:
        super().__init__(config)
        self._aligning = False

    @property
    def weights(self) -> Mapping[str, float]:
        """Losses with their weights; alignment counts in the stage that it trains in."""
        align = self.config.align if self._aligning else 0.0
        return {"loss_answer": 1.0, "loss_slide": align, "loss_region": align}

    # -- beginning --------------------------------------------------------------------------------

    def select(self, archive: str) -> SlideDataset:
        """Choose the slides with a caption or questions; note the models the run begins with."""
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
            subcaption_source=config.subcaption_source,
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
        if config.groundable and any(corpus.captions):
            statements = config.subcaption_source == "statements"
            corpus = with_targets(corpus, opened, run, statements=statements)
        return self._dataset(corpus)

    def load(self, path: Path) -> SlideDataset:
        """Read the slides of a begun run."""
        return self._dataset(Corpus.load(path))

    def _dataset(self, corpus: Corpus) -> SlideDataset:
        sampling = self.config.sampling()
        if sampling.examples is not None and not _abstains(corpus):
            sampling = replace(sampling, examples=replace(sampling.examples, abstain_share=0.0))
        return SlideDataset(corpus, sampling, cache_bytes=self.config.cache_mb << 20)

    def initial(self, dataset: SlideDataset) -> PathFLIP:
        """Return the pretrained slide model."""
        run = load_run(self.config.run)
        if run.fingerprint != dataset.corpus.about["vision"]["fingerprint"]:
            raise CheckpointError(
                f"{self.config.run} is not the model this tuning began with.",
                hint="Restore it, or begin again in another folder.",
                code="other_model",
            )
        return run.model

    def check(self, dataset: SlideDataset) -> None:
        """Refuse another base language model than the run began with."""
        base = dataset.corpus.about["base"]["fingerprint"]
        if fingerprint_of(hub.find(self.config.llm)) != base:
            raise CheckpointError(
                f"{self.config.llm} is not the language model this tuning began with: its files "
                "have changed.",
                hint="Restore them, or begin again in another folder.",
                code="other_model",
            )

    def parameters(self, dataset: SlideDataset) -> tuple[int, int]:
        """Return how many parameters train in the last stage, and how many never do."""
        model = self._built(self.initial(dataset), dataset)
        saved = self.saved(model)
        sizes = {name: p.numel() for name, p in model.named_parameters()}
        trained = sum(sizes[name] for name in saved)
        return trained, sum(sizes.values()) - trained

    # -- training ---------------------------------------------------------------------------------

    def build(self, dataset: SlideDataset, init: Path) -> PathFLIPInstruct:
        """Build slide model, new projector and adapter, and the base language model."""
        model = self._built(PathFLIP.from_pretrained(str(init)), dataset)
        if self.config.instruct.projector_start == "text":
            corpus = dataset.corpus
            batch = dataset.start_batch(self.config.max_regions)
            train = corpus.members("train").tolist()
            sentences = sorted({text for i in train for text in corpus.pieces[i]})
            start_projector(model, batch.features, batch.patch_mask, sentences)
        if self.config.recompute:
            recompute_layers(model.causal)
        if self.config.compile:
            compile_layers(model.causal)
        return model

    def shard(self, model: PathFLIPInstruct, worker: Worker) -> bool:
        """Cut the language model's layers over the workers, by the settings or its size."""
        if self.config.shard == "auto":
            large = 0.0
            if worker.device.type == "cuda":
                memory = torch.cuda.get_device_properties(worker.device).total_memory
                weights = sum(own.nbytes for own in model.llm.parameters())
                large = float(weights > SHARE_OF_A_CARD * memory)
            if not float(worker.summed(torch.tensor(large))):  # all agree, whatever their cards
                return False
        elif self.config.shard == "never":
            return False
        shard_layers(model.causal, worker)
        model.one_pass = True
        return True

    def _built(self, vision: PathFLIP, dataset: SlideDataset) -> PathFLIPInstruct:
        """Return the model before anything is fitted to slides."""
        config = self.config
        model = PathFLIPInstruct.from_parts(vision, config.llm, config.instruct, seed=config.seed)
        if model.base["fingerprint"] != dataset.corpus.about["base"]["fingerprint"]:
            self.check(dataset)
        return model

    def stages(self, steps_per_epoch: int) -> list[Stage]:
        """Return the projector's stage, if it has one, and that of all."""
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

    def trainable(self, model: PathFLIPInstruct, stage: Stage) -> None:
        """Train the projector alone, or what the settings name; alignment trains in the latter."""
        self._aligning = stage.name == "all"
        model.trainable(
            "all" if stage.name == "all" else "projector", align=bool(self.config.align)
        )

    def saved(self, model: PathFLIPInstruct) -> Collection[str]:
        """Return the names of tensors that the last stage trains; the base's only if it trains."""
        model.trainable("all", align=bool(self.config.align))
        return [name for name, parameter in model.named_parameters() if parameter.requires_grad]

    def counts(self, model: PathFLIPInstruct, batch: SlideBatch) -> dict[str, float]:
        """Return the number of answer tokens: the loss is a mean over those of all workers."""
        ids = model.prompter.answer_ids
        tokens = sum(len(ids(example.answer)) for own in batch.examples for example in own)
        return dict.fromkeys(self.weights, 1.0) | {"loss_answer": float(tokens)}

    def losses(self, model: Any, batch: SlideBatch, *, group: Any) -> dict[str, Loss]:
        """Return the sum over the answers' tokens, and slide and region loss where they train."""
        output = self._output(model, batch, group)
        return {
            "loss_answer": Loss(output.answer_sum, output.tokens),
            "loss_slide": Loss(output.loss_slide),
            "loss_region": Loss(output.loss_region),
        }

    def _output(self, model: Any, batch: SlideBatch, group: Any) -> InstructOutput:
        vision = getattr(model, "module", model).vision  # below DistributedDataParallel
        output: InstructOutput = model(
            batch.features,
            batch.patch_mask,
            batch.examples,
            captions=batch.captions,
            subcaptions=batch.subcaptions,
            negative_choice=batch.choice_of(vision.config.negatives),
            group=group,
            align=self.weights["loss_slide"],
        )
        return output

    # -- the end ----------------------------------------------------------------------------------

    def evaluate(
        self, model: PathFLIPInstruct, dataset: SlideDataset, worker: Worker
    ) -> dict[str, Any]:
        """Return the losses of the validation slides, means over their answers' tokens."""
        config, slides = self.config, dataset.corpus.members("val")
        if not len(slides):
            return {}
        names = ("loss", *self.weights)
        sums = torch.zeros(len(names) + 1, dtype=torch.float64)
        most = min(VAL_SLIDES, config.batch_size // config.accumulate)
        chunks = dataset.validation_batches(most_slides=most)
        for turn in range(-(-len(chunks) // worker.world)):
            place = turn * worker.world + worker.rank
            counts = place < len(chunks)
            if not counts and not model.one_pass:
                break
            # Layers that are cut over the workers run equally often in each of them.
            batch = dataset.batch(chunks[place if counts else 0], epoch=0, validating=True)
            with worker.autocast():
                output = self._output(model, batch.to(worker.device), worker.alone)
            if not counts:
                continue
            parts = [getattr(output, name) for name in names]
            sums[:-1] += torch.stack([part.double().cpu() for part in parts]) * output.tokens
            sums[-1] += output.tokens
        sums = worker.summed(sums)
        return {"n": len(slides), **named_means(names, sums)}

    def export(
        self, run: Path, dataset: SlideDataset, best: Checkpoint, result: dict[str, Any]
    ) -> str:
        """Write RUN/model, the tuned weights, and RUN/llm, a language model any engine reads."""
        corpus = dataset.corpus
        model = self._built(PathFLIP.from_pretrained(str(run / "init")), dataset)
        load_tensors(model, best.tensors("model"), self.saved(model))
        model.eval()
        write_whole(run / "llm", model.save_merged, step=best.step)
        model.abstains = _abstains(corpus)
        model.calibration = self._calibrated(model, dataset)
        vision = corpus.about["vision"]
        card = tuned_card(run.name, self.config, corpus, result, model.calibration)
        fingerprint = model.vision.fingerprint()
        # A slide model that did not change keeps its name, and with it the vectors made with it.
        name = vision["run"] if fingerprint == vision["fingerprint"] else run.name
        about = about_model(self.config, corpus, result, run=name, fingerprint=fingerprint) | {
            "instruct_fingerprint": model.fingerprint(),
            "base": corpus.about["base"],
            "max_regions": self.config.max_regions,
            "calibration": None if model.calibration is None else model.calibration.as_json(),
        }
        write_model(run, model, about=about, card=card, step=best.step)
        return card

    def _calibrated(self, model: PathFLIPInstruct, dataset: SlideDataset) -> Calibration | None:
        """Fit the temperature of choices on the validation slides' questions with options.

        Where the model was tuned to abstain, the bias of that is fitted, too.

        Returns:
            None where there are fewer than ``FEWEST`` questions that an option answers.
        """
        corpus, mode = dataset.corpus, mode_of(model)
        asked = [
            (slide, entry)
            for slide in corpus.members("val").tolist()
            for entry in corpus.questions_of(slide)
            if entry.get("choices") and (model.abstains or entry["answer"] in entry["choices"])
        ]
        asked = asked[:: max(1, -(-len(asked) // CALIBRATE_ON))]
        answered = sum(entry["answer"] in entry["choices"] for _, entry in asked)
        if answered < FEWEST:
            logger.warning(
                "Choices are not calibrated: the validation slides have %s questions with options, "
                "and %s are needed.", answered, FEWEST,
            )  # fmt: skip
            return None
        if torch.cuda.is_available() and self.config.device != "cpu":
            model.to("cuda")
        by_slide: dict[int, list[dict[str, Any]]] = {}
        for slide, entry in asked:
            by_slide.setdefault(slide, []).append(entry)
        questions: dict[bool, list[ChoiceQuestion]] = {False: [], True: []}  # may it abstain?
        truth: dict[bool, list[int]] = {False: [], True: []}
        for slide, entries in by_slide.items():
            batch = dataset.batch([slide], epoch=0, validating=True).to(model.device)
            with torch.no_grad():
                prefix = model.visual_prefix(batch.features, batch.patch_mask)[0]
            for entry in entries:
                choices = tuple(entry["choices"])
                known = entry["answer"] in choices
                for abstain in (False, True):
                    if offers_abstention(model, choices) if abstain else known:
                        questions[abstain].append(
                            ChoiceQuestion(
                                prefix=prefix, question=entry["question"], choices=choices,
                                abstain=abstain,
                            )
                        )  # fmt: skip
                        place = choices.index(entry["answer"]) if known else len(choices)
                        truth[abstain].append(place)
        rows = {
            abstain: [scores[0] for scores in score_choices(model, own, mode=mode)]
            for abstain, own in questions.items()
        }
        model.to("cpu")
        found = fit_temperature(rows[False], truth[False], mode=mode)
        beyond = len(asked) - answered
        if beyond < FEWEST_UNANSWERABLE:
            return found
        bias = fit_bias(rows[True], truth[True], found.temperature)
        return replace(found, abstain_bias=bias, unanswerable=beyond)


def _abstains(corpus: Corpus) -> bool:
    """Return whether training slides are asked what they cannot answer."""
    return any(
        entry["answer"] == CANNOT_TELL
        for slide in corpus.members("train").tolist()
        for entry in corpus.questions_of(slide)
    )
