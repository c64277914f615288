"""MR-PLIP: patches of four resolutions and texts in one embedding space.

Read in this order: :meth:`MRPLIP.forward` (losses of a batch of patch trees),
:meth:`MRPLIP.encode_patches`, :meth:`MRPLIP.encode_text`, :meth:`MRPLIP.text_guided`. The parts are
in mr_plan.py (draws and counts of a step), mr_step.py (its losses), mr_losses.py, fusion.py,
norm.py and text_tower.py; mrplip_config.py has the switches.

Shapes: G trees, V = 85 nodes, N patches there are, d_in feature width, d joint width, H width of
the text tower, K keywords of the step, k most keywords of a tree, m most positives of a patch, P
pairs, T tokens, p projector width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pathflip.errors import ConfigError
from pathflip.geometry import LEVEL_OF
from pathflip.models import hub, inputs, losses, mr_losses, mr_step
from pathflip.models.config import changed
from pathflip.models.fusion import FusionEncoder, WordHead
from pathflip.models.mr_plan import Plan, make_plan, plain_tokens
from pathflip.models.mrplip_config import TAU, MRPLIPConfig, mr_preset
from pathflip.models.norm import Predictor, Projector
from pathflip.models.outputs import MRPLIPOutput
from pathflip.models.packing import pack
from pathflip.models.text_tower import (
    TextTower,
    build_tower,
    by_length,
    evaluating,
    token_ids,
    tokenizer_of,
)
from pathflip.models.tree_batch import TreeBatch

_PATCHES_AT_ONCE = 4096
"""Patches that go through the fusion encoder together where no gradient is wanted."""


class MRPLIP(nn.Module):
    """Patch projection, text tower and fusion encoder, trained on patch trees.

    Args:
        config: Settings of the model.
        tokenizer: Tokenizer of ``transformers``.
        text_config: Configuration of the text tower's ``transformers`` model, where its weights are
            loaded afterwards; None: they come from ``config.text_model`` or are drawn.

    Raises:
        ConfigError: The text tower does not fit the losses or the fusion encoder.
    """

    feature_mean: Tensor
    feature_scale: Tensor
    levels: Tensor
    text_tower: TextTower

    def __init__(
        self, config: MRPLIPConfig, tokenizer: Any, *, text_config: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        inputs.add_statistics(self)
        self.register_buffer("levels", torch.tensor(LEVEL_OF), persistent=False)
        self.visual = nn.Linear(config.feature_dim, config.d)
        self.level = nn.Embedding(4, config.d)
        self.text_tower = build_tower(config, vocab_size=len(tokenizer), text_config=text_config)
        width = self.text_tower.width
        self.text_out = nn.Linear(width, config.d)
        self.temperature = nn.Parameter(torch.tensor(float(config.tau_init)))
        # A module without its loss would be parameters without a gradient, which DDP refuses.
        self._check()
        self.fuses = config.has("itm", "mlm", "plm", "mrtva")
        if self.fuses:
            self.visual_in = nn.Linear(config.d, width)
            self.keyword_in = nn.Linear(config.d, width)
            self.kind = nn.Embedding(2, width)
            self.fusion = FusionEncoder(
                width, layers=config.fusion_layers, heads=config.fusion_heads,
                ffn=config.fusion_ffn, dropout=config.dropout, recompute=config.recompute,
            )  # fmt: skip
            # Kept where no loss trains it, so that every such model has text-guided vectors.
            self.keyword_in.requires_grad_(config.has("mrtva"))
            nn.init.normal_(self.kind.weight, std=0.02)
        if config.has("itm"):
            self.match = nn.Linear(width, 2)
        if config.has("mlm", "plm"):
            self.words_out = WordHead(width, len(self.text_tower.words))
        if config.has("mrtva"):
            self.project = Projector(width, config.projection)
            self.predict = Predictor(config.projection, config.bottleneck)
        nn.init.normal_(self.level.weight, std=0.02)
        self._words = plain_tokens(tokenizer)

    def _check(self) -> None:
        config, tower = self.config, self.text_tower
        if tower.width % config.fusion_heads:
            raise ConfigError(
                f"The text tower is {tower.width} wide, no multiple of model.fusion_heads "
                f"{config.fusion_heads}.",
                hint="Change model.fusion_heads.",
            )
        if config.has("plm") and not tower.packs:
            raise ConfigError(
                f"model.losses has plm, which needs a BERT; {config.text_model} is another model.",
                hint="Leave plm out of model.losses.",
            )
        if config.has("mlm") and self.tokenizer.mask_token_id is None:
            raise ConfigError(
                "model.losses has mlm, and the tokenizer has no mask token.",
                hint="Leave mlm out of model.losses.",
            )

    # -- making and keeping -----------------------------------------------------------------------

    @classmethod
    def from_preset(
        cls,
        name: str,
        *,
        feature_dim: int | None = None,
        tokenizer: Any = None,
        texts: Sequence[str] | None = None,
        **overrides: Any,
    ) -> MRPLIP:
        """Build an untrained model.

        Args:
            name: ``mrplip/paper`` or ``mrplip/mini``.
            feature_dim: Width of the patch features.
            tokenizer: Tokenizer of a text tower from scratch; others have that of ``text_model``.
            texts: Captions to train that tokenizer on instead.
            overrides: Other settings of :class:`MRPLIPConfig`.

        Raises:
            ConfigError: Unknown preset or setting, or captions are needed and not given.
            CheckpointError: The text model cannot be loaded.
        """
        if feature_dim is not None:
            overrides["feature_dim"] = feature_dim
        config = changed(mr_preset(name).model, overrides)
        return cls(config, tokenizer_of(config, tokenizer, texts, name))

    @classmethod
    def from_pretrained(cls, source: str | Path) -> MRPLIP:
        """Load a model from a folder or the hub, in evaluation mode, on the CPU.

        Args:
            source: Folder that :meth:`save_pretrained` wrote, or ``owner/name`` on the hub.

        Raises:
            CheckpointError: A file is missing, damaged or does not fit; says which.
        """
        folder = hub.find(source)
        config, text_config = hub.read_config(folder, MRPLIPConfig)
        model = cls(config, hub.read_tokenizer(folder, texts=True), text_config=text_config)
        hub.read_weights(model, folder)
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, model.safetensors, the tokenizer's files and README.md."""
        hub.save(self, Path(folder))

    def push_to_hub(self, name: str, *, private: bool = True, token: str | None = None) -> str:
        """Upload the model to the hub and return its address; see :meth:`PathFLIP.push_to_hub`."""
        return hub.push(self, name, private=private, token=token)

    def fingerprint(self) -> str:
        """Return hex SHA-256 of configuration, vocabulary, weights; saving and loading keep it."""
        return hub.fingerprint(self)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.text_out.weight.device

    @property
    def tau(self) -> Tensor:
        """Temperature, within its bounds."""
        return mr_losses.bounded(self.temperature, *TAU)

    def fit_normalization(self, features: Tensor) -> None:
        """Fit ``feature_norm`` to a sample of training patches [n, d_in], where it is on."""
        inputs.fit(self, features)

    # -- training ---------------------------------------------------------------------------------

    def counts(self, batch: TreeBatch) -> dict[str, float]:
        """Return the number of terms of each loss of a batch, without a forward pass."""
        return self.plan(batch).counts

    def plan(self, batch: TreeBatch) -> Plan:
        """Return the draws and counts of a batch."""
        return make_plan(
            batch, self.config, self.ids(batch.captions),
            words=self._words, mask_id=self.tokenizer.mask_token_id,
        )  # fmt: skip

    def forward(self, batch: TreeBatch, *, group: Any = None) -> MRPLIPOutput:
        """Compute the losses of a batch.

        Args:
            batch: Trees of this process, on the model's device.
            group: Process group of gathered negatives and batch norm; None for all processes.

        Raises:
            ValueError: There are no pairs, or one of a patch that its tree lacks.
        """
        return mr_step.losses_of(self, batch, self.plan(batch), group=group)

    # -- patches and texts ------------------------------------------------------------------------

    def see(self, features: Tensor, level: Tensor, there: Tensor) -> Tensor:
        """Compute unit vectors of patches [..., d_in] -> [..., d]; 0 where there is none."""
        x = inputs.normalize(self, features.to(self.text_out.weight.dtype))
        return losses.unit(self.visual(x) + self.level(level)) * there[..., None]

    @torch.no_grad()
    def encode_patches(self, features: Tensor, level: Tensor) -> Tensor:
        """Encode patches of any level.

        Args:
            features: [n, d_in].
            level: int64 [n], 0 the coarsest.

        Returns:
            L2-normalised [n, d].
        """
        there = torch.ones(len(features), dtype=torch.bool, device=self.device)
        return self.see(features.to(self.device), level.to(self.device), there)

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return token ids of texts, cut to ``max_text_tokens``."""
        most = min(self.config.max_text_tokens, self.text_tower.max_positions)
        return token_ids(self.tokenizer, texts, most=most)

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Compute raw vectors of texts [n, d]; each distinct text is encoded once."""
        packed = pack(self.ids(texts), device=self.device)
        pooled = self.text_tower(packed, pooling=self.config.text_pooling)
        vectors: Tensor = self.text_out(pooled)
        return vectors[packed.inverse]

    @torch.no_grad()
    def encode_text(
        self, texts: Sequence[str], *, batch_size: int = 256, normalize: bool = True
    ) -> Tensor:
        """Encode texts, cut to ``max_text_tokens``.

        Args:
            texts: Texts to encode.
            batch_size: Number of texts at a time.
            normalize: Whether to L2-normalise.

        Returns:
            [n, d].
        """
        with evaluating(self):
            found = by_length(
                texts, self.embed, width=self.config.d, batch_size=batch_size, device=self.device
            )
        return losses.unit(found) if normalize else found

    @torch.no_grad()
    def text_guided(self, v: Tensor, bank: Tensor) -> Tensor:
        """Compute z: patches as the fusion encoder sees them beside their most similar keywords.

        Args:
            v: Vectors of patches from :meth:`encode_patches` [n, d].
            bank: Vectors of keywords from :meth:`encode_text` [K, d], those of training trees.

        Returns:
            [n, H].

        Raises:
            ConfigError: The model has no fusion encoder.
        """
        if not self.fuses:
            raise ConfigError(
                f"This model has no fusion encoder (model.losses is {list(self.config.losses)}).",
                hint="Use a model trained with itm, mlm, plm or mrtva.",
                code="not_guided",
            )
        v, bank = v.to(self.device), bank.to(self.device)
        words = self.keyword_in(bank) + self.kind.weight[1]
        most = min(self.config.keywords, len(bank))
        found = [v.new_zeros(0, self.text_tower.width)]
        with evaluating(self):
            for start in range(0, len(v), _PATCHES_AT_ONCE):
                part = v[start : start + _PATCHES_AT_ONCE]
                near = (part @ bank.T).topk(most, -1).indices + len(part)
                rows = torch.cat([self.visual_in(part) + self.kind.weight[0], words])
                sequences = [[i, *own] for i, own in enumerate(near.tolist())]
                packed = pack(sequences, device=self.device)
                found.append(self.fusion(rows, packed, first=True)[packed.inverse])
        return torch.cat(found)
