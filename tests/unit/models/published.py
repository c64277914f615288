"""A plain reading of the published code: its tensors, its forward pass, its losses.

Written from the method's columns V1 and the published behaviour: regions in a loop, keys and values
projected, texts padded to their maximum, one shared BERT for both.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pathflip.models import PathFLIP
from pathflip.models.official import load_official_v1
from tests.unit.models.tiny import TOKENIZER, tiny

H, LAYERS, HEADS, FFN, D, E_IN, Q, N, M, K = 24, 4, 3, 40, 16, 12, 3, 3, 6, 2
LONGEST = 48
Tensors = dict[str, Tensor]


def published(seed: int) -> Tensors:
    """Random tensors under the published names and shapes."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    found: Tensors = {"query_tokens": draw(1, Q, H), "logit_scale": torch.tensor(2.659)}

    def linear(name: str, out: int, into: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = draw(out, into), draw(out)

    def norm(name: str, width: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = 1 + draw(width), draw(width)

    linear("path_encoder", D, E_IN)
    bert = "Qformer.bert."
    found[bert + "embeddings.word_embeddings.weight"] = draw(len(TOKENIZER), H)
    found[bert + "embeddings.position_embeddings.weight"] = draw(512, H)
    found[bert + "embeddings.position_ids"] = torch.arange(512)[None]
    norm(bert + "embeddings.LayerNorm", H)
    for i in range(LAYERS):
        layer = f"{bert}encoder.layer.{i}."
        for kind, width in (("attention", H), ("crossattention", D)):
            if kind == "crossattention" and i % 2:
                continue
            linear(f"{layer}{kind}.self.query", H, H)
            linear(f"{layer}{kind}.self.key", H, width)
            linear(f"{layer}{kind}.self.value", H, width)
            linear(f"{layer}{kind}.output.dense", H, H)
            norm(f"{layer}{kind}.output.LayerNorm", H)
        for suffix in ("", "_query"):
            linear(f"{layer}intermediate{suffix}.dense", FFN, H)
            linear(f"{layer}output{suffix}.dense", H, FFN)
            norm(f"{layer}output{suffix}.LayerNorm", H)
    linear("Qformer.cls.predictions.transform.dense", H, H)
    linear("path_proj", D, H)
    linear("text_proj", D, H)
    for i in range(2):
        layer = f"path_trans.layers.{i}."
        found[layer + "self_attn.in_proj_weight"] = draw(3 * D, D)
        found[layer + "self_attn.in_proj_bias"] = draw(3 * D)
        linear(layer + "self_attn.out_proj", D, D)
        linear(layer + "linear1", 4 * D, D)
        linear(layer + "linear2", D, 4 * D)
        norm(layer + "norm1", D)
        norm(layer + "norm2", D)
    found["fg_head.attn.in_proj_weight"], found["fg_head.attn.in_proj_bias"] = (
        draw(3 * D, D), draw(3 * D),
    )  # fmt: skip
    linear("fg_head.attn.out_proj", D, D)
    for name in ("w_q", "w_k", "w_v"):
        linear(f"fg_head.{name}", D, D)
    return found


class Reference:
    """The published forward pass, one thing after the other."""

    def __init__(self, tensors: Tensors, heads: int) -> None:
        self.t, self.context_heads = tensors, heads

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.t[f"{name}.weight"].T + self.t[f"{name}.bias"]

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        x = (x - mean) / (var + eps).sqrt()
        return x * self.t[f"{name}.weight"] + self.t[f"{name}.bias"]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None) -> Tensor:
        size, parts = q.shape[-1] // heads, []
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            scores = q[..., part] @ k[..., part].transpose(-1, -2) / math.sqrt(size)
            if mask is not None:
                scores = scores + (1.0 - mask[:, None].float()) * -10000.0
            parts.append(scores.softmax(-1) @ v[..., part])
        return torch.cat(parts, -1)

    def block(self, name: str, x: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (
            self.linear(f"{name}.self.{part}", source)
            for part, source in (("query", x), ("key", keys), ("value", keys))
        )
        seen = self.linear(f"{name}.output.dense", self.attend(q, k, v, HEADS, mask))
        return self.norm(f"{name}.output.LayerNorm", seen + x, 1e-12)

    def bert(self, x: Tensor, mask: Tensor | None, patches: Tensor | None) -> Tensor:
        suffix = "" if patches is None else "_query"
        x = self.norm("Qformer.bert.embeddings.LayerNorm", x, 1e-12)
        for i in range(LAYERS):
            layer = f"Qformer.bert.encoder.layer.{i}."
            x = self.block(f"{layer}attention", x, x, mask)
            if patches is not None and i % 2 == 0:
                x = self.block(f"{layer}crossattention", x, patches, None)
            inner = F.gelu(self.linear(f"{layer}intermediate{suffix}.dense", x))
            out = self.linear(f"{layer}output{suffix}.dense", inner)
            x = self.norm(f"{layer}output{suffix}.LayerNorm", out + x, 1e-12)
        return x

    def text(self, texts: list[str], longest: int) -> Tensor:
        given = TOKENIZER(
            texts, padding="max_length", truncation=True, max_length=longest, return_tensors="pt"
        )
        words = self.t["Qformer.bert.embeddings.word_embeddings.weight"][given["input_ids"]]
        words = words + self.t["Qformer.bert.embeddings.position_embeddings.weight"][:longest]
        states = self.bert(words, given["attention_mask"], None)
        return self.linear("text_proj", states[:, 0])

    def heads(self, name: str, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        weights = self.t[f"{name}.in_proj_weight"].chunk(3)
        biases = self.t[f"{name}.in_proj_bias"].chunk(3)
        q, k, v = (x @ w.T + b for x, w, b in zip((q, k, v), weights, biases, strict=True))
        return self.linear(f"{name}.out_proj", self.attend(q, k, v, heads, None))

    def context(self, x: Tensor) -> Tensor:
        for i in range(2):
            layer = f"path_trans.layers.{i}."
            seen = self.heads(layer + "self_attn", x, x, x, self.context_heads)
            x = self.norm(layer + "norm1", x + seen, 1e-5)
            out = self.linear(layer + "linear2", F.relu(self.linear(layer + "linear1", x)))
            x = self.norm(layer + "norm2", x + out, 1e-5)
        return x

    def vectors(
        self, path: Tensor, captions: list[str], pieces: list[list[str]]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Slides [b, d] and captions [b, d], normalised; regions [b, N, d], pieces [b K, d]."""
        size = len(path)
        patches = self.linear("path_encoder", path)
        queries = self.t["query_tokens"].expand(size, -1, -1)
        whole = self.bert(queries, None, patches.reshape(size, N * M, D)).mean(1)
        rows = [self.linear("path_proj", whole)]
        for n in range(N):
            rows.append(self.linear("path_proj", self.bert(queries, None, patches[:, n]).mean(1)))
        line = self.context(torch.stack(rows, 1))
        slide, regions = F.normalize(line[:, 0], dim=-1), line[:, 1:]
        text = F.normalize(self.text(captions, LONGEST), dim=-1)
        flat = torch.cat([self.text(own, LONGEST // 2) for own in pieces])
        return slide, text, regions, flat

    def slide_loss(
        self, slide: Tensor, text: Tensor, slides: Tensor, texts: Tensor, first: int
    ) -> Tensor:
        """Contrast of a process's pairs, the first of which is candidate number ``first``."""
        target = torch.arange(first, first + len(slide))
        to_text, to_slide = slide @ texts.T / 0.1, text @ slides.T / 0.1
        return (
            F.cross_entropy(to_text, target, label_smoothing=0.1)
            + F.cross_entropy(to_slide, target, label_smoothing=0.1)
        ) / 2

    def texts_of(self, i: int, size: int, choice: Tensor) -> list[int]:
        """Places among a process's pieces of the texts slide i is compared with."""
        index = [i * K + k for k in range(K)]
        index += [j * K + int(choice[i, j]) for j in range(size) if j != i]
        return sorted(index)

    def region_loss(self, regions: Tensor, texts: Tensor, own: Tensor) -> Tensor:
        """Sigmoid loss of a slide's regions [N, d] and texts [L, d], own or not [L]."""
        seen = self.heads(
            "fg_head.attn",
            self.linear("fg_head.w_q", texts),
            self.linear("fg_head.w_k", regions),
            self.linear("fg_head.w_v", regions),
            self.context_heads,
        )
        logits = self.t["logit_scale"] * F.cosine_similarity(seen, texts, dim=-1)
        return -F.logsigmoid(torch.where(own, logits, -logits)).sum() / len(texts)

    def losses(
        self, path: Tensor, captions: list[str], pieces: list[list[str]], choice: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Slide and region loss of one process."""
        ((slide, region),) = self.losses_of_processes([(path, captions, pieces, choice)])
        return slide, region

    def losses_of_processes(
        self, parts: list[tuple[Tensor, list[str], list[list[str]], Tensor]]
    ) -> list[tuple[Tensor, Tensor]]:
        """Slide and region loss of each of several processes, as each computes them.

        Candidates of the slide loss have no gradient where there are several processes. Row i of
        another process's texts, whosever they are, is negative for slide i; all is divided by the
        number of processes.
        """
        every = [self.vectors(path, captions, pieces) for path, captions, pieces, _ in parts]
        slides, texts = torch.cat([v[0] for v in every]), torch.cat([v[1] for v in every])
        if len(parts) > 1:
            slides, texts = slides.detach(), texts.detach()
        found, first = [], 0
        for rank, (slide, text, regions, _) in enumerate(every):
            size, loss = len(slide), torch.zeros(())
            for i in range(size):
                for other, (*_, flat) in enumerate(every):
                    index = self.texts_of(i, size, parts[other][3])
                    own = torch.tensor([other == rank and j // K == i for j in index])
                    loss = loss + self.region_loss(regions[i], flat[index], own)
            found.append((self.slide_loss(slide, text, slides, texts, first), loss / len(parts)))
            first += size
        return found


def build(seed: int = 0) -> tuple[PathFLIP, Tensors]:
    """Our model with published tensors, and the tensors."""
    model = tiny(
        "pathflip/official_v1", layers=LAYERS, hidden=H, heads=HEADS, ffn=FFN, d=D, patch_width=D,
        num_queries=Q, max_text_tokens=LONGEST, feature_dim=E_IN, tr_heads=4, dropout=0.0,
    )  # fmt: skip
    tensors = published(seed)
    load_official_v1(model, {f"model.{name}": value for name, value in tensors.items()})
    return model, tensors
