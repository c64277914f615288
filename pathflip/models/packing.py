"""Texts behind each other, without padding.

Linear maps and norms run on the tokens alone; attention runs on groups of texts of about the same
length, padded to the longest of the group. Each distinct text is there once.

Shapes: n distinct texts, T tokens of all of them, H hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_SLACK = 1.2
"""A group's longest text has at most so many times the tokens of its shortest."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Texts that attend together.

    Attributes:
        start: First token of the group.
        stop: Behind its last token.
        begin: First text of the group.
        texts: How many.
        longest: Tokens of the longest.
        inside: Where the tokens are in the padded block, int64 [stop - start]; None where all texts
            have the same length.
        mask: bool [texts, 1, 1, longest]; None likewise.
    """

    start: int
    stop: int
    begin: int
    texts: int
    longest: int
    inside: Tensor | None
    mask: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Distinct texts, sorted by length, behind each other.

    Attributes:
        ids: Token ids, int64 [T].
        positions: Position of each token in its text, int64 [T].
        owner: Which text each token belongs to, int64 [T].
        first: First token of each text, int64 [n].
        lengths: Tokens of each text, int64 [n].
        groups: What attends together.
        back: For each text that was given, which of the distinct ones it is, int64 [texts given].
    """

    ids: Tensor
    positions: Tensor
    owner: Tensor
    first: Tensor
    lengths: Tensor
    groups: tuple[Group, ...]
    back: Tensor

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, heads: int, dropout: float, first: bool = False
    ) -> Tensor:
        """Self-attention within each text.

        Args:
            q: Queries [T, H]; with ``first`` of the first token of each text alone [n, H].
            k: Keys [T, H].
            v: Values [T, H].
            heads: Number of heads.
            dropout: Of the weights.
            first: Whether first tokens alone attend.

        Returns:
            Of the shape of ``q``.
        """
        found = []
        for group in self.groups:
            keys, values = (
                _padded(part[group.start : group.stop], group, heads) for part in (k, v)
            )
            if first:
                asking = q[group.begin : group.begin + group.texts]
                asking = asking.view(group.texts, 1, heads, -1).transpose(1, 2)
            else:
                asking = _padded(q[group.start : group.stop], group, heads)
            seen = F.scaled_dot_product_attention(
                asking, keys, values, attn_mask=group.mask, dropout_p=dropout
            )
            flat = seen.transpose(1, 2).reshape(-1, q.shape[-1])
            found.append(flat if first or group.inside is None else flat[group.inside])
        return torch.cat(found) if len(found) > 1 else found[0]

    def mean(self, states: Tensor) -> Tensor:
        """Mean over the tokens of each text [T, H] -> [n, H]."""
        sums = states.new_zeros(len(self.lengths), states.shape[-1])
        return sums.index_add(0, self.owner, states) / self.lengths[:, None]


def pack(texts: Sequence[Sequence[int]], *, device: torch.device | str = "cpu") -> Packed:
    """Pack tokenised texts.

    Args:
        texts: Token ids of each, at least one token each.
        device: Where to.
    """
    places: dict[tuple[int, ...], int] = {}
    for text in texts:
        places.setdefault(tuple(text), len(places))
    order = sorted(places, key=lambda ids: (len(ids), ids))
    number = {ids: i for i, ids in enumerate(order)}
    lengths = [len(ids) for ids in order]
    groups, at, start = [], 0, 0
    while at < len(order):
        stop = at
        while stop < len(order) and lengths[stop] <= max(lengths[at] * _SLACK, lengths[at] + 2):
            stop += 1
        groups.append(_group(lengths[at:stop], at, start, device))
        start = groups[-1].stop
        at = stop

    def put(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long).to(device, non_blocking=True)

    firsts = [0]
    for length in lengths[:-1]:
        firsts.append(firsts[-1] + length)
    return Packed(
        ids=put([token for ids in order for token in ids]),
        positions=put([i for length in lengths for i in range(length)]),
        owner=put([i for i, length in enumerate(lengths) for _ in range(length)]),
        first=put(firsts),
        lengths=put(lengths),
        groups=tuple(groups),
        back=put([number[tuple(text)] for text in texts]),
    )


def _group(lengths: list[int], begin: int, start: int, device: torch.device | str) -> Group:
    longest = lengths[-1]
    inside = mask = None
    if lengths[0] != longest:
        inside = torch.tensor(
            [row * longest + i for row, length in enumerate(lengths) for i in range(length)]
        ).to(device, non_blocking=True)
        real = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
        mask = real[:, None, None].to(device, non_blocking=True)
    return Group(
        start=start,
        stop=start + sum(lengths),
        begin=begin,
        texts=len(lengths),
        longest=longest,
        inside=inside,
        mask=mask,
    )


def _padded(part: Tensor, group: Group, heads: int) -> Tensor:
    """Tokens of a group [t, H] -> [texts, A, longest, H / A]."""
    width = part.shape[-1]
    if group.inside is not None:
        block = part.new_zeros(group.texts * group.longest, width)
        part = block.index_copy(0, group.inside, part)
    return part.view(group.texts, group.longest, heads, width // heads).transpose(1, 2)
