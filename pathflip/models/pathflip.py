"""PathFLIP: slides and captions in one embedding space, with text-conditioned regions.

Read in this order: :meth:`PathFLIP.forward` (losses of a batch),
:meth:`PathFLIP.encode_regions` (slides), :meth:`PathFLIP.embed` (texts), :meth:`PathFLIP.ground`.
The parts are in qformer.py, text_tower.py, attention.py, alignment.py, losses.py and grounding.py;
config.py has the switches.

Shapes: B slides, N regions, M patch slots of a region, d_in feature width, d_e patch width, h
Q-Former width, d joint width, Q latent queries, T vectors of a region (Q or 1), K sub-captions, L
texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pathflip.errors import ConfigError
from pathflip.models import alignment, grounding, hub, inputs, losses
from pathflip.models.attention import RegionAttention, build_attention
from pathflip.models.config import PathFLIPConfig, changed, preset
from pathflip.models.outputs import Grounding, PathFLIPOutput, SlideEmbedding, VisionOutput
from pathflip.models.packing import pack
from pathflip.models.qformer import QFormer, QFormerOutput
from pathflip.models.text_tower import (
    TextTower,
    build_tower,
    by_length,
    evaluating,
    token_ids,
    tokenizer_of,
)

SEQUENCES_AT_ONCE = 256
"""Regions that go through the Q-Former together where no gradient is wanted."""

Texts = Sequence[str] | Sequence[Sequence[int]]


class PathFLIP(nn.Module):
    """Slide tower, text tower, and text-conditioned attention over regions (arXiv 2512.17621).

    Args:
        config: Settings of the model.
        tokenizer: Tokenizer of ``transformers``.
        text_config: Configuration of the text tower's ``transformers`` model, where its weights are
            loaded afterwards; None: they come from ``config.text_model`` or are drawn.
    """

    feature_mean: Tensor
    feature_scale: Tensor
    queries: Tensor
    qformer: QFormer
    text_tower: TextTower | None
    region_attention: RegionAttention
    token_bias: Tensor | None
    slide_bias: Tensor | None
    region_scale: Tensor | None
    region_bias: Tensor | None

    def __init__(
        self, config: PathFLIPConfig, tokenizer: Any, *, text_config: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        width = config.patch_width or config.feature_dim
        shared = config.text_encoder == "shared_qformer"
        inputs.add_statistics(self)
        if config.patch_width:
            self.patch_in = nn.Linear(config.feature_dim, width)
        if config.uses_qformer:
            self.queries = nn.Parameter(torch.randn(config.num_queries, config.hidden) * 0.02)
            self.qformer = QFormer(
                hidden=config.hidden,
                layers=config.layers,
                heads=config.heads,
                ffn=config.ffn,
                patch_width=width,
                cross_every=config.cross_attention_freq,
                dropout=config.dropout,
                vocab_size=len(tokenizer) if shared else 0,
                max_positions=max(512, config.max_text_tokens),
                recompute=config.recompute,
            )
            self.token_out = nn.Linear(config.hidden, config.d)
        if config.region_encoder == "mean" and config.trains_regions:
            self.region_out = nn.Linear(width, config.d)
        biases = (config.tokens_per_region, config.d)
        wanted = config.vector_biases
        self.token_bias = (
            nn.Parameter(torch.zeros(biases)) if wanted and config.trains_regions else None
        )
        self.slide_bias = nn.Parameter(torch.zeros(config.d)) if wanted else None
        if config.slide_context_layers:
            layer = nn.TransformerEncoderLayer(
                config.d,
                config.tr_heads,
                dim_feedforward=4 * config.d,
                dropout=config.dropout,
                batch_first=True,
            )
            self.context = nn.TransformerEncoder(
                layer, config.slide_context_layers, enable_nested_tensor=False
            )
        self.text_tower = (
            None
            if shared
            else build_tower(config, vocab_size=len(tokenizer), text_config=text_config)
        )
        text_width = config.hidden if self.text_tower is None else self.text_tower.width
        self.text_out = nn.Linear(text_width, config.d)
        self.region_attention = build_attention(config)
        losing = config.has_region_loss
        self.region_scale = (
            nn.Parameter(torch.tensor(float(config.region_scale_init))) if losing else None
        )
        bias = config.region_bias_init
        self.region_bias = (
            nn.Parameter(torch.tensor(float(bias))) if losing and bias is not None else None
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
    ) -> PathFLIP:
        """Build an untrained model.

        Args:
            name: ``pathflip/paper``, ``pathflip/official_v1`` or ``pathflip/mini``.
            feature_dim: Width of the patch features.
            tokenizer: Tokenizer of a text tower from scratch; others have that of ``text_model``.
            texts: Captions to train that tokenizer on instead.
            overrides: Other settings of :class:`PathFLIPConfig`.

        Raises:
            ConfigError: Unknown preset or setting, or captions are needed and not given.
            CheckpointError: The text model cannot be loaded.
        """
        if feature_dim is not None:
            overrides["feature_dim"] = feature_dim
        config = changed(preset(name).model, overrides)
        tokenizer = tokenizer_of(config, tokenizer, texts, name)
        model = cls(config, tokenizer)
        if config.text_model is not None and config.qformer_from_text and config.uses_qformer:
            hub.start_from_bert(model, config.text_model)
        return model

    @classmethod
    def from_pretrained(cls, source: str | Path) -> PathFLIP:
        """Load a model from a folder or the hub, in evaluation mode, on the CPU.

        Args:
            source: Folder that :meth:`save_pretrained` wrote, or ``owner/name`` on the hub.

        Raises:
            CheckpointError: A file is missing, damaged or does not fit; says which.
        """
        folder = hub.find(source)
        config, text_config = hub.read_config(folder, PathFLIPConfig)
        model = cls(config, hub.read_tokenizer(folder, texts=True), text_config=text_config)
        hub.read_weights(model, folder)
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, model.safetensors, the tokenizer's files and README.md."""
        hub.save(self, Path(folder))

    def push_to_hub(self, name: str, *, private: bool = True, token: str | None = None) -> str:
        """Upload the model to the hub.

        Args:
            name: ``owner/name``, made if it does not exist.
            private: Whether a new repository is private.
            token: Access token; None: that of the logged-in user.

        Returns:
            Its address.
        """
        return hub.push(self, name, private=private, token=token)

    def fingerprint(self) -> str:
        """Return hex SHA-256 of configuration, vocabulary, weights; saving and loading keep it."""
        return hub.fingerprint(self)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.text_out.weight.device

    def fit_normalization(self, features: Tensor) -> None:
        """Fit ``feature_norm`` to a sample of training patches [n, d_in], where it is on."""
        inputs.fit(self, features)

    # -- training ---------------------------------------------------------------------------------

    def forward(
        self,
        features: Tensor,
        patch_mask: Tensor,
        captions: Texts,
        subcaptions: Sequence[Texts],
        *,
        negative_choice: Tensor | None = None,
        group: Any = None,
    ) -> PathFLIPOutput:
        """Compute the losses of a batch.

        Args:
            features: Patch features [B, N, M, d_in]; masked slots may hold any finite value.
            patch_mask: bool [B, N, M]; a region without a patch counts as absent.
            captions: One text per slide, or its token ids.
            subcaptions: K texts per slide, or their token ids.
            negative_choice: int64 [B, B_all], which of slide j's K sub-captions is the negative for
                slide i of this process; None draws them. B_all is B, or with gathered negatives the
                slides of all processes, by rank.
            group: Process group of gathered negatives; None for all processes.

        Raises:
            ValueError: Slides, captions and sub-captions are not equally many.
        """
        regions = self.config.has_region_loss
        sight = self.encode_regions(features, self.training_mask(patch_mask), regions=regions)
        return self.align(
            sight, captions, subcaptions, negative_choice=negative_choice, group=group
        )

    def training_mask(self, patch_mask: Tensor) -> Tensor:
        """Return the mask of patches without those that ``patch_dropout`` hides in training."""
        if self.training and self.config.patch_dropout:
            return _hide_patches(patch_mask, self.config.patch_dropout)
        return patch_mask

    def align(
        self,
        sight: VisionOutput,
        captions: Texts,
        subcaptions: Sequence[Texts],
        *,
        negative_choice: Tensor | None = None,
        group: Any = None,
    ) -> PathFLIPOutput:
        """Compute losses of encoded slides; the arguments are those of :meth:`forward`."""
        return alignment.align(
            self, sight, captions, subcaptions, negative_choice=negative_choice, group=group
        )

    # -- slides -----------------------------------------------------------------------------------

    def patches(self, features: Tensor) -> Tensor:
        """Normalise and project patch features [..., d_in] -> [..., d_e]."""
        x = inputs.normalize(self, features.to(self.text_out.weight.dtype))
        return self.patch_in(x) if self.config.patch_width else x

    def encode_regions(
        self,
        features: Tensor,
        patch_mask: Tensor,
        *,
        regions: bool,
        attention: bool = False,
        queries: bool = False,
    ) -> VisionOutput:
        """Compute raw vectors of slides and their regions.

        Args:
            features: [B, N, M, d_in].
            patch_mask: bool [B, N, M].
            regions: Whether to return regions; where slides depend on them, they are read anyway.
            attention: Whether to return the regions' attention to patches.
            queries: Whether to return also a slide's vectors per query, before their mean.
        """
        config = self.config
        patches = self.patches(features)
        region_mask = patch_mask.any(-1)
        regions = (regions or config.slide_needs_regions) and config.has_regions
        slide = tokens = weights = by_query = None
        if regions and config.region_encoder == "mean":
            share = patch_mask / patch_mask.sum(-1, keepdim=True).clamp(min=1)
            weights = share.to(patches.dtype)[:, :, None]
            tokens = self.region_out(weights @ patches)
        read_regions = regions and config.region_encoder == "qformer"
        read_slide = config.slide_encoder == "qformer"
        if read_regions or read_slide:
            seen = self._read(
                patches, patch_mask, regions=read_regions, slide=read_slide, attention=attention
            )
            if seen.slide is not None:
                slide = self.token_out(seen.slide.mean(-2))
                if queries and not config.slide_context_layers:
                    by_query = self.token_out(seen.slide)
            if seen.regions is not None:
                states, weights = seen.regions, seen.attention
                if config.tokens_per_region == 1:
                    states = states.mean(-2, keepdim=True)
                    weights = None if weights is None else weights.mean(-2, keepdim=True)
                tokens = self.token_out(states)
        if tokens is not None and self.token_bias is not None:
            tokens = tokens + self.token_bias
        if slide is None:
            if tokens is None:
                raise TypeError("a configuration reads slides or regions")
            real = region_mask[..., None].to(tokens.dtype)
            slide = (tokens.mean(2) * real).sum(1) / real.sum(1).clamp(min=1)
        if self.slide_bias is not None:
            slide = slide + self.slide_bias
            by_query = None if by_query is None else by_query + self.slide_bias
        if config.slide_context_layers:
            slide, tokens = self._in_context(slide, tokens, region_mask)
        return VisionOutput(
            slide=slide,
            tokens=tokens,
            attention=weights,
            region_mask=region_mask,
            queries=by_query,
        )

    def _read(
        self, patches: Tensor, mask: Tensor, *, regions: bool, slide: bool, attention: bool
    ) -> QFormerOutput:
        """Run the Q-Former; without gradients, some regions at a time."""
        batch, num = mask.shape[:2]
        if torch.is_grad_enabled() or not regions or batch * num <= SEQUENCES_AT_ONCE:
            seen: QFormerOutput = self.qformer(
                self.queries, patches, mask, regions=regions, slide=slide, attention=attention
            )
            return seen
        whole = self.qformer(self.queries, patches, mask, regions=False).slide if slide else None
        step = max(1, SEQUENCES_AT_ONCE // batch)
        parts = [
            self.qformer(
                self.queries,
                patches[:, start : start + step].contiguous(),
                mask[:, start : start + step],
                slide=False,
                attention=attention,
            )
            for start in range(0, num, step)
        ]
        return QFormerOutput(
            regions=torch.cat([part.regions for part in parts], 1),
            slide=whole,
            attention=torch.cat([part.attention for part in parts], 1) if attention else None,
        )

    def _in_context(
        self, slide: Tensor, tokens: Tensor | None, region_mask: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Let slide and region vectors see one another."""
        if tokens is None:
            return self.context(slide[:, None])[:, 0], None
        hidden = ~region_mask.repeat_interleave(tokens.shape[2], 1)
        padding = F.pad(hidden, (1, 0)) if bool(hidden.any()) else None
        line = torch.cat([slide[:, None], tokens.flatten(1, 2)], 1)
        out = self.context(line, src_key_padding_mask=padding)
        return out[:, 0], out[:, 1:].reshape(tokens.shape)

    @torch.no_grad()
    def encode_slide(self, features: Tensor, patch_mask: Tensor) -> SlideEmbedding:
        """Encode slides of any number of regions.

        Args:
            features: [B, N, M, d_in].
            patch_mask: bool [B, N, M].
        """
        return self.slide_embedding(self.encode_vision(features, patch_mask, attention=False))

    @torch.no_grad()
    def encode_vision(
        self, features: Tensor, patch_mask: Tensor, *, attention: bool = True
    ) -> VisionOutput:
        """Encode slides for :meth:`slide_embedding` and, with attention, for :meth:`heat`.

        The arguments are those of :meth:`encode_regions`.
        """
        with evaluating(self):
            features, patch_mask = features.to(self.device), patch_mask.to(self.device)
            return self.encode_regions(features, patch_mask, regions=True, attention=attention)

    @torch.no_grad()
    def slide_embedding(self, sight: VisionOutput) -> SlideEmbedding:
        """Return the vectors of slides that :meth:`encode_vision` encoded."""
        tokens, mask = sight.flat()
        region_mask = sight.region_mask
        regions = sight.slide.new_zeros((*region_mask.shape, self.config.d))
        if sight.tokens is None:
            region_mask = torch.zeros_like(region_mask)
        else:
            regions = losses.unit(self.region_attention.values(sight.tokens).mean(2))
            regions = regions * region_mask[..., None]
        return SlideEmbedding(
            slide=losses.unit(sight.slide),
            tokens=tokens,
            token_mask=mask,
            regions=regions,
            region_mask=region_mask,
        )

    # -- texts ------------------------------------------------------------------------------------

    def embed(self, captions: Texts, subcaptions: Texts = ()) -> Tensor:
        """Compute raw vectors of texts in one pass; each distinct text is encoded once.

        Args:
            captions: Texts or token ids, cut at ``max_text_tokens``.
            subcaptions: The same, cut at ``max_subcaption_tokens``.

        Returns:
            [captions + subcaptions, d].
        """
        config = self.config
        most = config.max_text_tokens
        if self.text_tower is not None:
            most = min(most, self.text_tower.max_positions)
        ids = token_ids(self.tokenizer, captions, most=most)
        ids += token_ids(self.tokenizer, subcaptions, most=min(most, config.subcaption_tokens))
        packed = pack(ids, device=self.device)
        tower = self.qformer.text if self.text_tower is None else self.text_tower
        vectors: Tensor = self.text_out(tower(packed, pooling=config.text_pooling))
        return vectors[packed.inverse]

    @torch.no_grad()
    def encode_text(
        self, texts: Sequence[str], *, batch_size: int = 256, normalize: bool = True
    ) -> Tensor:
        """Encode texts, cut to ``max_text_tokens``.

        Args:
            texts: Texts to encode.
            batch_size: Number of texts at a time.
            normalize: Whether to L2-normalise; :meth:`local_scores` takes raw vectors.

        Returns:
            [n, d].
        """
        with evaluating(self):
            found = by_length(
                texts, self.embed, width=self.config.d, batch_size=batch_size, device=self.device
            )
        return losses.unit(found) if normalize else found

    @torch.no_grad()
    def local_scores(self, slide: SlideEmbedding, text_raw: Tensor) -> Tensor:
        """Compute cos(v_tc(t), t) of slides and texts (Eq. 5) [B, L].

        Args:
            slide: Output of :meth:`encode_slide`.
            text_raw: Text vectors that are not normalised [L, d].
        """
        self._need_regions()
        texts = text_raw.to(slide.tokens)[None].expand(len(slide.slide), -1, -1)
        seen, _ = self.region_attention(texts, slide.tokens, slide.token_mask)
        return (losses.unit(seen) * losses.unit(texts)).sum(-1)

    # -- grounding --------------------------------------------------------------------------------

    @torch.no_grad()
    def ground(
        self,
        features: Tensor,
        patch_mask: Tensor,
        texts: Sequence[str],
        *,
        variant: grounding.Variant = "attn",
        contrast: str | None = None,
    ) -> Grounding:
        """Compute heat of texts on the patches of slides.

        Args:
            features: [B, N, M, d_in].
            patch_mask: bool [B, N, M].
            texts: Texts to look for [L].
            variant: ``attn``: attention of the text to region vectors times theirs to patches, sums
                to 1 over a slide. ``region_only``: the first alone, shared evenly in a region.
                ``cosine``: cosine of text and region vectors, at each patch the mean over those
                vectors by their attention to it. ``product``: attn times the positive cosine.
            contrast: A neutral text, say "tissue", whose heat is subtracted.

        Raises:
            ConfigError: The model has no regions, or there is no such variant.
        """
        self._need_regions()
        every = [*texts] if contrast is None else [*texts, contrast]
        return self.heat(
            self.encode_vision(features, patch_mask),
            patch_mask,
            self.encode_text(every, normalize=False),
            variant=variant,
            contrast=contrast is not None,
        )

    @torch.no_grad()
    def heat(
        self,
        sight: VisionOutput,
        patch_mask: Tensor,
        text_raw: Tensor,
        *,
        variant: grounding.Variant = "attn",
        contrast: bool = False,
    ) -> Grounding:
        """Compute heat as :meth:`ground` does, of slides and texts that are encoded already.

        Args:
            sight: Output of :meth:`encode_vision`, with attention.
            patch_mask: bool [B, N, M].
            text_raw: Text vectors that are not normalised [L, d].
            variant: See :meth:`ground`.
            contrast: Whether the last text is the neutral one.
        """
        self._need_regions()
        if variant not in grounding.VARIANTS:
            raise ConfigError(
                f"There is no grounding variant {variant!r}.",
                hint=f"Known: {', '.join(grounding.VARIANTS)}.",
            )
        with evaluating(self):
            return grounding.ground(
                sight,
                patch_mask.to(self.device),
                text_raw.to(sight.slide.dtype),
                self.region_attention,
                variant=variant,
                contrast=contrast,
            )

    def _need_regions(self) -> None:
        if not self.config.has_regions:
            raise ConfigError(
                "This model has no region vectors (model.region_encoder is "
                f"{self.config.region_encoder}).",
                hint="Use a model trained with regions.",
            )


def _hide_patches(mask: Tensor, share: float) -> Tensor:
    """Hide patches at random, except in regions that would lose all of theirs."""
    kept = mask & (torch.rand(mask.shape, device=mask.device) >= share)
    return torch.where(kept.any(-1, keepdim=True), kept, mask)
