"""MR-PLIP's losses written plainly from their equations: loops, padding, nothing shared.

Reads the weights of an :class:`pathflip.models.MRPLIP`, and takes masked words, prefixes and edges
from its plan. Two styles: ``edges`` runs the fusion encoder anew for both ends of every edge, on
texts padded to a fixed length, and loops over patches; ``bags`` is what a careful plain version
does: batched over the patches of a tree, texts padded to the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pathflip.geometry import LEVEL_OF
from pathflip.models import MRPLIP, TreeBatch


def losses(
    model: MRPLIP, batch: TreeBatch, *, style: str = "bags", texts: int = 0, words: int = 0
) -> dict[str, Tensor]:
    """Compute the mean of each loss over its terms.

    Args:
        model: The model.
        batch: Trees of one process.
        style: ``edges`` or ``bags``.
        texts: Length captions are padded to; 0: the longest.
        words: The same of keywords.
    """
    config, plan = model.config, model.plan(batch)
    tau = model.temperature.clamp(0.01, 0.5)
    found: dict[str, Tensor] = {}
    x = batch.features
    if config.feature_norm != "none":
        x = x - model.feature_mean
        x = x @ model.feature_scale if config.feature_norm == "whiten" else x * model.feature_scale
    v = F.normalize(model.visual(x) + model.level.weight[torch.from_numpy(LEVEL_OF)], dim=-1)

    # Vision-text alignment, and the text-guided vectors of all patches.
    nodes: list[Tensor] = []
    number: dict[int, int] = {}
    aligned = []
    keyword_ids = model.ids(batch.keywords)
    for tree in range(len(v)):
        own_words = [int(i) for i in batch.keyword_index[tree] if i >= 0][: config.keyword_cap]
        w = torch.zeros(0, config.d)
        if own_words:
            states, mask = tower(model, [keyword_ids[i] for i in own_words], words)
            w = F.normalize(model.text_out(pooled(config, states, mask)), dim=-1)
        there = [node for node in range(85) if plan.present[tree, node]]
        scores = v[tree] @ w.T
        most = min(config.keywords, len(own_words) // 2)
        if config.takes_own(batch.progress):
            own = batch.own[tree].tolist()
            chosen = {
                node: [place for place in range(len(own_words)) if own[node][place]][:most]
                for node in there
            }
        else:
            top = scores.detach().topk(most).indices.tolist()
            chosen = {node: top[node] for node in there}
        if len(own_words) >= 4 and any(chosen.values()):
            some = [node for node in there if chosen[node]]
            if style == "edges":
                terms = [
                    -(scores[node] / tau).log_softmax(-1)[chosen[node]].mean() for node in some
                ]
            else:
                index, mask = padded([chosen[node] for node in some], 0)
                log_p = (scores[some] / tau).log_softmax(-1).gather(1, index)
                terms = list(-(log_p * mask).sum(1) / mask.sum(1))
            by_level: dict[int, list[Tensor]] = {}
            for node, term in zip(some, terms, strict=True):
                level = int(LEVEL_OF[node]) if config.cvta_mean == "levels" else 0
                by_level.setdefault(level, []).append(term)
            aligned.append(
                torch.stack([torch.stack(own).mean() for own in by_level.values()]).mean()
            )
        if config.has("mrtva"):
            guided: dict[int, Tensor] = {}
            if style == "edges":
                ends = [node - 85 * tree for edge in plan.edges.tolist() for node in edge]
                ends = [node for node in ends if 0 <= node < 85]
                for node in [*ends, *sorted(set(there) - set(ends))]:
                    near = w[None, chosen[node]]
                    mask = torch.ones(near.shape[:2], dtype=torch.bool)
                    guided[node] = guide(model, v[tree, [node]], near, mask)[0]
            else:
                index, mask = padded([chosen[node] for node in there], 0)
                near = w[index] if len(w) else torch.zeros(*index.shape, config.d)
                guided = dict(zip(there, guide(model, v[tree, there], near, mask), strict=True))
            for node in there:
                number[85 * tree + node] = len(nodes)
                nodes.append(guided[node])
    if config.has("cvta"):
        found["cvta"] = torch.stack(aligned).mean() if aligned else torch.zeros(())
    if config.has("mrtva"):
        f, q = heads(model, torch.stack(nodes))
        one, other = ([number[node] for node in end] for end in plan.edges.T.tolist())
        forth = F.cosine_similarity(q[one], f[other].detach())
        back = F.cosine_similarity(q[other], f[one].detach())
        found["mrtva"] = -(forth + back).mean() / 2

    # Pairs.
    image = v[batch.pair_bag, batch.pair_node]
    states, mask = tower(model, plan.captions, texts)
    text = F.normalize(model.text_out(pooled(config, states, mask)), dim=-1)
    size = len(image)
    sim = image @ text.T / tau
    terms = []
    for i in range(size):
        others = [j for j in range(size) if batch.caption_id[j] != batch.caption_id[i]]
        for row in (sim[i], sim[:, i]):
            terms.append(torch.logsumexp(row[[i, *others]], 0) - row[i])
    found["itc"] = torch.stack(terms).mean()
    if config.has("itm"):
        patches, captions = negatives(plan, sim.detach(), batch.pair_bag)
        one = [*range(size), *(i for i, _ in patches), *(i for i, _ in captions)]
        two = [*range(size), *(j for _, j in patches), *(j for _, j in captions)]
        seen = fuse(model, image[one], states[two], mask[two])[:, 0]
        truth = torch.tensor([1] * size + [0] * (len(one) - size))
        found["itm"] = F.cross_entropy(model.match(seen), truth)
    if config.has("mlm"):
        hidden, hidden_mask = tower(model, plan.masked, texts)
        logits = say(model, fuse(model, image, hidden, hidden_mask)[:, 1:])
        target = torch.full(hidden_mask.shape, -100)
        for i, places in enumerate(plan.places):
            for place in places:
                target[i, place] = plan.captions[i][place]
        found["mlm"] = F.cross_entropy(logits.flatten(0, 1), target.flatten())
    if config.has("plm"):
        ids, ids_mask = padded(plan.captions, texts)
        before = [own[:n] for own, n in zip(plan.captions, plan.prefixes, strict=True)]
        prefix, prefix_mask = tower(model, before, ids.shape[1])
        rest = model.text_tower.bert.embeddings(input_ids=ids)
        line = torch.where(prefix_mask[..., None], prefix, rest)
        sizes = torch.tensor(plan.prefixes)
        logits = say(model, fuse(model, image, line, ids_mask, prefix=sizes)[:, 1:])
        target = torch.full(ids.shape, -100)
        for i, (own, n) in enumerate(zip(plan.captions, plan.prefixes, strict=True)):
            for place in range(n, len(own)):
                target[i, place - 1] = own[place]
        found["plm"] = F.cross_entropy(logits.flatten(0, 1), target.flatten())
    return {name: found[name] for name in config.losses}


def padded(ids: Sequence[Sequence[int]], length: int) -> tuple[Tensor, Tensor]:
    """Token ids [n, T] padded with 0, and where there are any, bool [n, T]."""
    most = max([length, *map(len, ids)])
    found = torch.zeros(len(ids), most, dtype=torch.long)
    mask = torch.zeros(len(ids), most, dtype=torch.bool)
    for i, own in enumerate(ids):
        found[i, : len(own)] = torch.tensor(own)
        mask[i, : len(own)] = True
    return found, mask


def tower(model: MRPLIP, ids: Sequence[Sequence[int]], length: int) -> tuple[Tensor, Tensor]:
    """States of padded texts [n, T, H] by ``transformers``, and their mask."""
    tokens, mask = padded(ids, length)
    return model.text_tower.bert(input_ids=tokens, attention_mask=mask.long())[0], mask


def pooled(config: Any, states: Tensor, mask: Tensor) -> Tensor:
    """Vector of each text [n, H]."""
    if config.text_pooling == "cls":
        return states[:, 0]
    return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def fuse(
    model: MRPLIP, v: Tensor, states: Tensor, mask: Tensor, *, prefix: Tensor | None = None
) -> Tensor:
    """E_mm on [v; states], padded [n, 1 + T, H]."""
    x = torch.cat([model.visual_in(v)[:, None], states], 1)
    kinds = torch.tensor([0] + [1] * states.shape[1])
    x = x + model.kind.weight[kinds]
    n, length = x.shape[:2]
    seen = torch.cat([mask.new_ones(n, 1), mask], 1)[:, None].expand(n, length, length)
    if prefix is not None:
        place = torch.arange(length)
        causal = place[None] <= place[:, None]
        seen = seen & (causal[None] | (place[None, None] <= prefix[:, None, None]))
    for layer in model.fusion.layers:
        y = layer.attention_norm(x)
        split = [
            part(y).view(n, length, layer.heads, -1).transpose(1, 2)
            for part in (layer.query, layer.key, layer.value)
        ]
        got = F.scaled_dot_product_attention(*split, attn_mask=seen[:, None])
        x = x + layer.out(got.transpose(1, 2).flatten(2))
        x = x + layer.down(F.gelu(layer.up(layer.ffn_norm(x))))
    return model.fusion.norm(x)


def guide(model: MRPLIP, v: Tensor, w: Tensor, mask: Tensor) -> Tensor:
    """Text-guided vectors z [n, H] of patches [n, d] beside their keywords [n, m, d]."""
    return fuse(model, v, model.keyword_in(w), mask)[:, 0]


def heads(model: MRPLIP, z: Tensor) -> tuple[Tensor, Tensor]:
    """f(z) and q(f(z)), with the batch norm of ``torch``."""
    x = z
    for number, (linear, norm) in enumerate(
        zip(model.project.maps, model.project.norms, strict=True)
    ):
        x = F.batch_norm(linear(x), None, None, norm.weight, norm.bias, training=True)
        x = F.relu(x) if number < 2 else x
    norm = model.predict.norm
    inner = F.batch_norm(model.predict.down(x), None, None, norm.weight, norm.bias, training=True)
    return x, model.predict.up(F.relu(inner))


def say(model: MRPLIP, states: Tensor) -> Tensor:
    """Scores of words at all places, padding too."""
    head = model.words_out
    inner = head.norm(F.gelu(head.dense(states)))
    return inner @ model.text_tower.bert.embeddings.word_embeddings.weight.T + head.bias


def negatives(
    plan: Any, sim: Tensor, bag: Tensor
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Draw (patch, text) that do not match: a patch for every text, then a text for every patch."""
    drawn = []
    for scores, allowed in ((sim.T, plan.allowed.T), (sim, plan.allowed)):
        rows, weights = [], []
        for i in range(len(scores)):
            may = [j for j in range(len(scores)) if allowed[i, j]]
            if may:
                p = torch.zeros(len(scores))
                p[may] = scores[i, may].softmax(0) + 1e-6
                p[bag == bag[i]] *= 0.1
                rows.append(i)
                weights.append(p)
        which = torch.multinomial(torch.stack(weights), 1)[:, 0].tolist() if rows else []
        drawn.append(list(zip(rows, which, strict=True)))
    return [(i, j) for j, i in drawn[0]], drawn[1]
