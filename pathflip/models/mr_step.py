"""Losses of a batch of patch trees.

One packed pass of the text tower reads captions, the same with words masked, their prefixes and the
distinct keywords; the fusion encoder reads sequences of rows of one bank of vectors.

Shapes: G trees, V nodes, d joint width, H width of the text tower, K keywords of the step, k most
keywords of a tree, m most positives of a patch, P pairs, T tokens of all texts, R rows of the bank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pathflip.models import losses, mr_losses
from pathflip.models.fusion import prefixed
from pathflip.models.mr_plan import Plan
from pathflip.models.outputs import MRPLIPOutput
from pathflip.models.packing import Packed, pack
from pathflip.models.tree_batch import TreeBatch

if TYPE_CHECKING:
    from pathflip.models.mrplip import MRPLIP


def losses_of(model: MRPLIP, batch: TreeBatch, plan: Plan, *, group: Any) -> MRPLIPOutput:
    """Compute the losses of a batch; arguments as of ``MRPLIP.forward``, and its plan."""
    config, device = model.config, model.device
    totals: dict[str, Tensor] = {}
    alarms: dict[str, Tensor] = {}
    present = plan.present.to(device)
    v = model.see(batch.features, model.levels, present)  # [G, V, d]
    image = v[batch.pair_bag, batch.pair_node]
    texts = model.ids(batch.keywords) + plan.captions + plan.masked
    texts += [ids[:size] for ids, size in zip(plan.captions, plan.prefixes, strict=False)]
    packed = pack(texts, device=device)
    states = model.text_tower.states(packed)  # [T, H]
    pooled = states[packed.first] if config.text_pooling == "cls" else packed.mean(states)
    captions = len(batch.keywords)  # place of the first among the texts
    masked = captions + len(image)
    vectors = losses.unit(model.text_out(pooled))[packed.inverse[:masked]]
    w, text = vectors[:captions], vectors[captions:]
    totals["itc"] = _itc(model, image, text, batch.caption_id, group)
    if config.has("cvta", "mrtva"):
        keyword, chosen = _align(model, v, w, plan, batch.progress, totals, alarms)
    if model.fuses:
        bank = _Bank(model, packed, states, texts)
        nodes = bank.add(model.visual_in(v[present]), kind=0)
        row = torch.full(plan.present.shape, -1)  # of each patch in the bank
        row[plan.present] = torch.arange(nodes, nodes + int(plan.present.sum()))
        pairs = row[batch.pair_bag.cpu(), batch.pair_node.cpu()].tolist()
        if config.has("mrtva"):
            words = bank.add(model.keyword_in(w), kind=1)
            beside = (keyword + words).masked_fill(~chosen, -1)[present].tolist()
            sequences = [
                [patch, *(word for word in own if word >= 0)]
                for patch, own in zip(row[plan.present].tolist(), beside, strict=True)
            ]
            edges = (row.flatten()[plan.edges] - nodes).to(device)
            f = model.project(bank.first(sequences), group=group)
            q = model.predict(f, group=group)
            totals["mrtva"] = mr_losses.mrtva(f, q, edges)
            spread = F.normalize(f.detach(), dim=-1).std(0, correction=0).mean()
            alarms["z_std"] = spread * config.projection**0.5
        if config.has("itm"):
            similarity = (mr_losses.similarity(image, text) / model.tau).detach()
            wrong = _hard_negatives(similarity, plan, batch.pair_bag)
            tried = [*((i, i) for i in range(len(pairs))), *wrong]
            sequences = [[pairs[i], *bank.text(captions + j)] for i, j in tried]
            logits = model.match(bank.first(sequences)).float()
            truth = (torch.arange(len(tried), device=device) < len(pairs)).long()
            totals["itm"] = F.cross_entropy(logits, truth, reduction="sum")
            alarms["match_accuracy"] = (logits.argmax(-1) == truth).float().mean()
        if config.has("mlm"):
            totals["mlm"] = _mlm(bank, pairs, masked, plan)
        if config.has("plm"):
            totals["plm"] = _plm(bank, pairs, masked + len(plan.masked), plan)
    means = {name: totals[name] / (plan.counts[name] or 1.0) for name in config.losses}
    return MRPLIPOutput(
        loss=torch.stack(list(means.values())).sum(),
        totals={name: totals[name] for name in config.losses},
        counts=plan.counts,
        image=image,
        text=text,
        alarms={name: value.detach().float() for name, value in alarms.items()},
        loss_itc=means["itc"],
        loss_itm=means.get("itm"),
        loss_mlm=means.get("mlm"),
        loss_plm=means.get("plm"),
        loss_cvta=means.get("cvta"),
        loss_mrtva=means.get("mrtva"),
    )


def _itc(model: MRPLIP, image: Tensor, text: Tensor, caption_id: Tensor, group: Any) -> Tensor:
    """Sum the contrastive loss over this process's pairs; equal captions are no negatives."""
    images, texts, ids, offset = image, text, caption_id, 0
    if model.config.negatives == "gathered" and losses.world(group)[1] > 1:
        both, offset = losses.gather_ragged(torch.cat([image, text], -1), group)
        images, texts = both[:, : model.config.d], both[:, model.config.d :]
        ids, _ = losses.gather_ragged(caption_id, group)
    with torch.autocast(image.device.type, enabled=False):  # see mr_losses.similarity
        mean = losses.info_nce(
            image,
            text,
            temperature=model.tau,
            all_slides=images,
            all_texts=texts,
            offset=offset,
            same=caption_id[:, None] == ids,
        )
    return mean * len(image)


def _align(
    model: MRPLIP,
    v: Tensor,
    w: Tensor,
    plan: Plan,
    progress: float,
    totals: dict[str, Tensor],
    alarms: dict[str, Tensor],
) -> tuple[Tensor, Tensor]:
    """Choose positive keywords of all patches, and align patches with them (CVTA).

    Returns:
        Keywords of the step, int64 [G, V, m], and which are chosen, bool [G, V, m].
    """
    config = model.config
    present, index, real, own, limit, aligned = (
        x.to(v.device)
        for x in (plan.present, plan.index, plan.real, plan.own, plan.limit, plan.aligned)
    )
    # Without a keyword in the step there is nothing to score, but w stays part of the graph.
    scores = mr_losses.similarity(v, w[index]) if len(w) else v[..., :0] + w.sum()  # [G, V, k]
    if config.takes_own(progress):
        place, chosen = mr_losses.own_positives(own, limit)
    else:
        place, chosen = mr_losses.similar_positives(scores, real, limit)
    chosen = chosen & present[..., None]
    keyword = index[:, None].expand(-1, v.shape[1], -1).gather(-1, place)
    if config.has("cvta"):
        there = chosen.any(-1) & aligned[:, None]
        weights = mr_losses.node_weights(there, model.levels, mean=config.cvta_mean)
        total, least = mr_losses.cvta(scores / model.tau, real, place, chosen, weights)
        totals["cvta"] = total
        count = plan.counts["cvta"]
        alarms["cvta_floor"] = (total.detach() - least) / (count or torch.nan)
        alarms["cvta_skipped"] = total.new_tensor(1 - count / len(v))
        times = torch.bincount(keyword[chosen & there[..., None]], minlength=len(w))
        alarms["keyword_entropy"] = mr_losses.keyword_entropy(times)
    return keyword, chosen


def _mlm(bank: _Bank, pairs: list[int], offset: int, plan: Plan) -> Tensor:
    """Sum the loss of masked words."""
    packed = bank.pack([[row, *bank.text(offset + i)] for i, row in enumerate(pairs)])
    wanted = [(i, 1 + place) for i, own in enumerate(plan.places) for place in own]
    return bank.say(packed, wanted, [plan.captions[i][at - 1] for i, at in wanted])


def _plm(bank: _Bank, pairs: list[int], offset: int, plan: Plan) -> Tensor:
    """Sum the loss of words behind a prefix; each is told by the prefix and what is before it."""
    captions, prefixes = plan.captions, plan.prefixes
    rest = [
        (token, at)
        for ids, size in zip(captions, prefixes, strict=True)
        for at, token in enumerate(ids[:-1])  # nothing follows the last
        if at >= size
    ]
    start = bank.add_words(rest)
    sequences, wanted, truth = [], [], []
    for i, (row, ids, size) in enumerate(zip(pairs, captions, prefixes, strict=True)):
        behind = max(0, len(ids) - 1 - size)
        sequences.append([row, *bank.text(offset + i), *range(start, start + behind)])
        start += behind
        wanted += [(i, at) for at in range(size, len(ids))]
        truth += ids[size:]
    packed = prefixed(bank.pack(sequences), [1 + size for size in prefixes])
    return bank.say(packed, wanted, truth)


class _Bank:
    """Vectors that sequences of the fusion encoder are made of, the states of texts first.

    Args:
        model: The model.
        packed: Texts.
        states: States of their tokens [T, H].
        texts: Their token ids, as given.
    """

    def __init__(
        self, model: MRPLIP, packed: Packed, states: Tensor, texts: Sequence[Sequence[int]]
    ) -> None:
        self._model = model
        self._rows = states + model.kind.weight[1]
        firsts = [0, *accumulate(packed.lengths.tolist())]
        self._texts = [
            range(firsts[i], firsts[i] + len(ids))
            for i, ids in zip(packed.inverse.tolist(), texts, strict=True)
        ]

    def add(self, vectors: Tensor, *, kind: int) -> int:
        """Add vectors of patches (kind 0) or words (1) and return the row of the first."""
        start = len(self._rows)
        self._rows = torch.cat([self._rows, vectors + self._model.kind.weight[kind]])
        return start

    def add_words(self, words: Sequence[tuple[int, int]]) -> int:
        """Add word embeddings of (token id, position) and return the row of the first."""
        tokens, places = self._pairs(words)
        return self.add(self._model.text_tower.embed(tokens, places), kind=1)

    def text(self, number: int) -> range:
        """Return the rows of a text's tokens."""
        return self._texts[number]

    def pack(self, sequences: Sequence[Sequence[int]]) -> Packed:
        """Pack sequences of rows."""
        return pack(sequences, device=self._rows.device)

    def first(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Encode sequences of rows and return the states of their first tokens [n, H]."""
        packed = self.pack(sequences)
        out: Tensor = self._model.fusion(self._rows, packed, first=True)
        return out[packed.inverse]

    def say(self, packed: Packed, wanted: Sequence[tuple[int, int]], truth: list[int]) -> Tensor:
        """Encode packed sequences and sum the cross-entropy of words at (sequence, place)."""
        which, place = self._pairs(wanted)
        rows = packed.first[packed.inverse[which]] + place
        states = self._model.fusion(self._rows, packed, rows=rows)
        logits = self._model.words_out(states, self._model.text_tower.words).float()
        target = torch.tensor(truth, dtype=torch.long, device=states.device)
        return F.cross_entropy(logits, target, reduction="sum")

    def _pairs(self, numbers: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        both = torch.tensor(numbers, dtype=torch.long).view(-1, 2).to(self._rows.device)
        return both[:, 0], both[:, 1]


def _hard_negatives(similarity: Tensor, plan: Plan, bag: Tensor) -> list[tuple[int, int]]:
    """Draw a patch for every text and a text for every patch that do not match: (patch, text)."""
    allowed, same_tree = plan.allowed.to(bag.device), bag[:, None] == bag
    patches = [(i, j) for j, i in _drawn(similarity.T, allowed.T, same_tree)]
    return [*patches, *_drawn(similarity, allowed, same_tree)]


def _drawn(similarity: Tensor, allowed: Tensor, same_tree: Tensor) -> Iterator[tuple[int, int]]:
    some = allowed.any(1)
    if bool(some.any()):
        weights = mr_losses.negative_weights(similarity[some], allowed[some], same_tree[some])
        drawn = torch.multinomial(weights, 1)[:, 0].tolist()
        yield from zip(some.nonzero()[:, 0].tolist(), drawn, strict=True)
