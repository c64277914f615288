"""Contrastive pretraining: slides and captions, regions and sub-captions, in one space.

PathFLIP, arXiv 2512.17621: the slide loss is Eq. 7-9, the region loss Eq. 6.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from pathflip.archive import Archive
from pathflip.checkpoints import Checkpoint
from pathflip.models import PathFLIP, PathFLIPOutput
from pathflip.models.data_init import warm_start
from pathflip.training.config import PretrainConfig
from pathflip.training.dataset import Corpus, make_corpus
from pathflip.training.model_card import about_model, pretrained_card
from pathflip.training.objective import Loss, Objective, Worker
from pathflip.training.run_dir import load_tensors, write_model
from pathflip.training.slide_batches import SlideBatch, SlideDataset, named_means


class Contrastive(Objective[SlideDataset, PretrainConfig]):
    """Alignment of slides with captions and of regions with sub-captions."""

    weights: ClassVar[Mapping[str, float]] = {"loss_slide": 1.0, "loss_region": 1.0}

    # -- beginning --------------------------------------------------------------------------------

    def select(self, archive: str) -> SlideDataset:
        """Choose the slides with a caption."""
        config = self.config
        corpus = make_corpus(
            Archive(archive),
            encoder=config.encoder,
            source=config.source,
            subcaption_source=config.subcaption_source,
            seed=config.seed,
            val_fraction=config.val_fraction,
        )
        return self._dataset(corpus)

    def load(self, path: Path) -> SlideDataset:
        """Read the slides of a begun run."""
        return self._dataset(Corpus.load(path))

    def _dataset(self, corpus: Corpus) -> SlideDataset:
        return SlideDataset(corpus, self.config.sampling(), cache_bytes=self.config.cache_mb << 20)

    def fitted(self, dataset: SlideDataset) -> Contrastive:
        """Return the objective for features as wide as the archive's."""
        width = dataset.corpus.about["encoder"]["dim"]
        model = replace(self.config.model, feature_dim=width)
        return type(self)(replace(self.config, model=model))

    def initial(self, dataset: SlideDataset) -> PathFLIP:
        """Return the model at its start: the same weights for the same seed and slides.

        A tokenizer, if need be, is trained on the captions to train on; what the model takes from
        data before training (input statistics, warm start) is fitted to some of the slides.
        """
        model = self._drawn(dataset.corpus)
        config = self.config
        if config.model.warm_start or config.model.feature_norm != "none":
            batch = dataset.start_batch(config.max_regions)
            pieces = dataset.corpus.pieces
            sentences = list(dict.fromkeys(text for i in batch.slides for text in pieces[i]))
            if config.model.warm_start:
                warm_start(model, batch.features, batch.patch_mask, sentences, seed=config.seed)
            else:
                model.fit_normalization(batch.features[batch.patch_mask].float())
        return model

    def _drawn(self, corpus: Corpus) -> PathFLIP:
        torch.manual_seed(self.config.seed)
        overrides = asdict(self.config.model) | {"feature_dim": corpus.about["encoder"]["dim"]}
        texts = [corpus.captions[i] for i in corpus.members("train").tolist()]
        return PathFLIP.from_preset(self.config.preset, texts=texts, **overrides)

    def parameters(self, dataset: SlideDataset) -> tuple[int, int]:
        """Return how many parameters train, and how many never do."""
        return self.counted(self._drawn(dataset.corpus))

    # -- training ---------------------------------------------------------------------------------

    def build(self, dataset: SlideDataset, init: Path) -> PathFLIP:
        """Build the slide model itself."""
        return PathFLIP.from_pretrained(str(init))

    def losses(self, model: Any, batch: SlideBatch, *, group: Any) -> dict[str, Loss]:
        """Return slide and region loss of a micro-batch; each is a mean over its slides."""
        output = self._output(model, batch, group)
        return {"loss_slide": Loss(output.loss_slide), "loss_region": Loss(output.loss_region)}

    def _output(self, model: Any, batch: SlideBatch, group: Any) -> PathFLIPOutput:
        output: PathFLIPOutput = model(
            batch.features,
            batch.patch_mask,
            batch.captions,
            batch.subcaptions,
            negative_choice=batch.choice_of(self.config.model.negatives),
            group=group,
        )
        return output

    # -- the end ----------------------------------------------------------------------------------

    def evaluate(self, model: Any, dataset: SlideDataset, worker: Worker) -> dict[str, Any]:
        """Return retrieval among the validation slides, and the losses."""
        from pathflip.evaluation.retrieval import retrieval

        corpus = dataset.corpus
        slides = corpus.members("val").tolist()
        if not slides:
            return {}
        row = {slide: number for number, slide in enumerate(slides)}
        width = self.config.model.d
        vectors = torch.zeros(
            2, len(slides), width
        )  # of slides and texts; each worker fills in its
        sums = torch.zeros(len(self.weights) + 2, dtype=torch.float64)
        for chunk in dataset.validation_batches()[worker.rank :: worker.world]:
            batch = dataset.batch(chunk, epoch=0, validating=True)
            with worker.autocast():
                output = self._output(model, batch.to(worker.device), worker.alone)
            rows = [row[slide] for slide in chunk]
            vectors[:, rows] = torch.stack([output.slide, output.text]).float().cpu()
            parts = [output.loss, *(getattr(output, name) for name in self.weights)]
            sums[:-1] += torch.stack([part.double().cpu() for part in parts]) * len(chunk)
            sums[-1] += len(chunk)
        vectors, sums = worker.summed(vectors), worker.summed(sums)
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
            **named_means(("loss", *self.weights), sums),
        }

    def export(
        self, run: Path, dataset: SlideDataset, best: Checkpoint, result: dict[str, Any]
    ) -> str:
        """Write RUN/model."""
        model = PathFLIP.from_pretrained(str(run / "init"))
        load_tensors(model, best.tensors("model"), self.saved(model))
        corpus = dataset.corpus
        card = pretrained_card(run.name, self.config, corpus, result)
        about = about_model(
            self.config, corpus, result, run=run.name, fingerprint=model.fingerprint()
        )
        write_model(run, model, about=about, card=card, step=best.step)
        return card
