"""Pretraining on patch trees: patches of four resolutions, captions and keywords in one space.

MR-PLIP (docs/howto/pretrain-mrplip.md); the losses are in ``pathflip/models/mr_losses.py``.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pathflip.archive import Archive
from pathflip.checkpoints import Checkpoint
from pathflip.geometry import LEVEL_OF, TreeSpec, level_name
from pathflip.models import MRPLIP, MRPLIPConfig, MRPLIPOutput, TreeBatch
from pathflip.models.data_init import warm_start_patches
from pathflip.training.model_card import about_patch_model, patch_card
from pathflip.training.objective import Loss, Objective, Worker
from pathflip.training.run_dir import load_tensors, write_model
from pathflip.training.tree_config import MRPretrainConfig
from pathflip.training.tree_corpus import TreeCorpus, make_tree_corpus, unchanged_rows
from pathflip.training.tree_dataset import VAL_PAIRS, TreeDataset

logger = logging.getLogger(__name__)

ALARMS = ("keyword_entropy", "cvta_floor", "cvta_skipped", "z_std", "match_accuracy")
"""Signs of collapse that are logged; see :class:`pathflip.models.MRPLIPOutput`."""
EVEN_KEYWORDS = 0.5
"""Entropy of the chosen keywords, as a share of an even choice's, below which few are hubs."""
ABOVE_FLOOR = 0.25
"""CVTA above the least it can be: nearer, all patches have chosen the same keywords."""
SPREAD = 0.3
"""Spread of unit projections, as a share of an even spread, below which they are one vector."""


class MultiResolution(Objective[TreeDataset, MRPretrainConfig]):
    """Alignment of patches with captions and keywords, within a resolution and across."""

    @cached_property
    def weights(self) -> Mapping[str, float]:
        """The losses that are on, each with weight 1."""
        return {f"loss_{name}": 1.0 for name in self.config.model.losses}

    # -- beginning --------------------------------------------------------------------------------

    def select(self, archive: str) -> TreeDataset:
        """Choose the trees with a caption."""
        config = self.config
        corpus = make_tree_corpus(
            Archive(archive),
            encoder=config.encoder,
            source=config.source,
            levels=config.model.levels,
            seed=config.seed,
            val_fraction=config.val_fraction,
        )
        return self._dataset(corpus)

    def load(self, path: Path) -> TreeDataset:
        """Read the trees of a begun run."""
        return self._dataset(TreeCorpus.load(path))

    def _dataset(self, corpus: TreeCorpus) -> TreeDataset:
        return TreeDataset(corpus, self.config.sampling(), cache_bytes=self.config.cache_mb << 20)

    def fitted(self, dataset: TreeDataset) -> MultiResolution:
        """Return the objective for features as wide as the archive's."""
        width = dataset.corpus.about["encoder"]["dim"]
        model = replace(self.config.model, feature_dim=width)
        return type(self)(replace(self.config, model=model))

    def initial(self, dataset: TreeDataset) -> MRPLIP:
        """Return the model at its start: the same weights for the same seed and trees.

        A tokenizer, if need be, is trained on captions to train on; what the model takes from data
        before training (input statistics, warm start) is fitted to some of the trees.
        """
        model = self._drawn(dataset)
        if model.config.warm_start or model.config.feature_norm != "none":
            features, _, keywords = dataset.start_data
            if model.config.warm_start:
                warm_start_patches(model, features, keywords)
            else:
                model.fit_normalization(features)
        return model

    def _drawn(self, dataset: TreeDataset) -> MRPLIP:
        torch.manual_seed(self.config.seed)
        settings = asdict(self.config.model)
        settings["feature_dim"] = dataset.corpus.about["encoder"]["dim"]
        texts: list[str] | None = None
        if self.config.model.text_model is None:
            _, captions, keywords = dataset.start_data
            texts = [*captions, *keywords]
        return MRPLIP.from_preset(self.config.preset, texts=texts, **settings)

    def parameters(self, dataset: TreeDataset) -> tuple[int, int]:
        """Return how many parameters train, and how many never do."""
        return self.counted(self._drawn(dataset))

    def check(self, dataset: TreeDataset) -> None:
        """Refuse an archive whose trees or captions have changed since the run began."""
        unchanged_rows(dataset.corpus, Archive(dataset.archive))

    # -- training ---------------------------------------------------------------------------------

    def build(self, dataset: TreeDataset, init: Path) -> MRPLIP:
        """Build the patch model itself."""
        return MRPLIP.from_pretrained(str(init))

    def counts(self, model: MRPLIP, batch: TreeBatch) -> dict[str, float]:
        """Return the number of terms of each loss: pairs, tokens, trees, edges."""
        return {f"loss_{name}": count for name, count in model.counts(batch).items()}

    def losses(self, model: Any, batch: TreeBatch, *, group: Any) -> dict[str, Loss]:
        """Return the sum of each loss over its terms, and the alarms beside them."""
        output: MRPLIPOutput = model(batch, group=group)
        found = {
            f"loss_{name}": Loss(total, output.counts[name])
            for name, total in output.totals.items()
        }
        return found | {name: Loss(output.alarms[name]) for name in ALARMS if name in output.alarms}

    # -- the end ----------------------------------------------------------------------------------

    def evaluate(self, model: Any, dataset: TreeDataset, worker: Worker) -> dict[str, Any]:
        """Return retrieval among validation pairs, by level as well, the losses and the alarms."""
        chunks = dataset.validation_batches()
        if not chunks:
            return {}
        names = [*self.weights, *ALARMS]
        sums = torch.zeros(2, len(names), dtype=torch.float64)  # totals, counts
        rows = len(chunks) * len(chunks[0]) * VAL_PAIRS
        # Of patches and texts; then level + 1 and the caption's id. Each worker fills in its own.
        vectors = torch.zeros(2, rows, self.config.model.d)
        about = torch.zeros(2, rows, dtype=torch.int64)
        for number in range(worker.rank, len(chunks), worker.world):
            batch = dataset.batch(chunks[number], epoch=-1, pairs=VAL_PAIRS).to(worker.device)
            torch.manual_seed(_seed(self.config.seed, number))  # mismatched pairs are drawn
            with worker.autocast():
                output: MRPLIPOutput = model(batch, group=worker.alone)
            start = number * len(chunks[0]) * VAL_PAIRS
            mine = slice(start, start + len(output.image))
            vectors[:, mine] = torch.stack([output.image, output.text]).float().cpu()
            about[0, mine] = torch.from_numpy(LEVEL_OF[batch.pair_node.cpu().numpy()]) + 1
            about[1, mine] = batch.caption_id.cpu()
            for i, name in enumerate(names):
                sums[:, i] += _terms(output, name, trees=len(chunks[number]))
        vectors, about = worker.summed(vectors), worker.summed(about)
        totals, counts = worker.summed(sums).tolist()
        drawn = about[0] > 0
        image, text = vectors[:, drawn].numpy()
        level, ids = (about[0, drawn] - 1).numpy(), about[1, drawn].numpy().astype(str)
        means = {
            name: total / count if count and math.isfinite(total) else None
            for name, total, count in zip(names, totals, counts, strict=True)
        }
        parts = [means[name] for name, count in zip(self.weights, counts, strict=False) if count]
        found = _retrieval(image, text, ids)
        collapsed = collapse(means, self.config.model)
        if collapsed and worker.rank == 0:
            logger.warning("%s", sentence(collapsed, means))
        return {
            "n": int(drawn.sum()),
            "trees": sum(map(len, chunks)),
            **found,
            "levels": {
                name: _retrieval(image[level == own], text[level == own], ids[level == own])
                for own, name in enumerate(level_names(dataset.corpus.about["trees"]))
                if (level == own).any()
            },
            # None, not less, where one of them is not finite.
            "loss": None if None in parts else sum(part for part in parts if part is not None),
            **means,
            "collapsed": collapsed,
        }

    def export(
        self, run: Path, dataset: TreeDataset, best: Checkpoint, result: dict[str, Any]
    ) -> str:
        """Write RUN/model."""
        model = MRPLIP.from_pretrained(str(run / "init"))
        load_tensors(model, best.tensors("model"), self.saved(model))
        corpus = dataset.corpus
        card = patch_card(run.name, self.config, corpus, result)
        about = about_patch_model(
            self.config, corpus, result, run=run.name, fingerprint=model.fingerprint()
        )
        write_model(run, model, about=about, card=card, step=best.step)
        return card


def level_names(trees: Mapping[str, Any]) -> list[str]:
    """Return the levels' names, coarsest first: their magnification, as in ``5x``.

    Args:
        trees: Fields of :class:`pathflip.geometry.TreeSpec`.
    """
    return [level_name(mpp) for mpp in TreeSpec(**trees).level_mpp]


def collapse(means: Mapping[str, float | None], config: MRPLIPConfig) -> list[str]:
    """Return the signs of collapse among the means of a validation, by name.

    That a patch's own keywords are told from all others is no collapse but learned: the floor of
    CVTA is judged where the model chooses the keywords itself.

    Args:
        means: Alarms by name; None where there was nothing to measure.
        config: Settings of the model.
    """
    limits = {"keyword_entropy": EVEN_KEYWORDS, "z_std": SPREAD}
    if config.selection != "own":
        limits["cvta_floor"] = ABOVE_FLOOR
    return [
        name
        for name, least in limits.items()
        if (value := means.get(name)) is not None and value < least
    ]


def sentence(collapsed: list[str], means: Mapping[str, float | None]) -> str:
    """Return what signs of collapse mean, for people."""
    meanings = {
        "keyword_entropy": "patches choose few of the keywords",
        "cvta_floor": "all patches choose the same keywords",
        "z_std": "text-guided vectors are nearly one vector",
    }
    said = [f"{meanings[name]} ({name} {means[name] or 0.0:.2f})" for name in collapsed]
    return f"The model shows signs of collapse: {'; '.join(said)}."


def _terms(output: MRPLIPOutput, name: str, *, trees: int) -> torch.Tensor:
    """Return the sum of a loss or an alarm over a batch and its count [2]; zeros if it is off.

    Alarms count by trees, of which the last batch has fewer.
    """
    part = name.removeprefix("loss_")
    if part in output.totals:
        value, count = output.totals[part], output.counts[part]
        return torch.tensor([float(value), count], dtype=torch.float64)
    alarm = output.alarms.get(name)
    if alarm is None or not math.isfinite(float(alarm)):
        return torch.zeros(2, dtype=torch.float64)
    return torch.tensor([float(alarm) * trees, trees], dtype=torch.float64)


def _retrieval(image: Any, text: Any, ids: Any) -> dict[str, Any]:
    """Return recall both ways in galleries of 64, its mean, and chance."""
    from pathflip.evaluation.retrieval import retrieval

    found = retrieval(image, text, ids, resamples=0, shuffles=0)
    recalls = [*found["itr"].values(), *found["tir"].values()]
    kept = {key: found[key] for key in ("protocol", "gallery", "itr", "tir", "chance")}
    return kept | {"mean_recall": float(np.mean(recalls))}


def _seed(*key: int) -> int:
    digest = hashlib.sha256("\x1f".join(map(str, ("validation", *key))).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
