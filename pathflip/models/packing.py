"""Packed variable-length text batches, without padding.

Linear maps and norms run on the tokens alone; attention runs on groups of texts of the same length
(on GPUs, where many small calls cost more than some padding: of about the same length, padded to
the longest of the group). Each distinct text is there once.

Shapes: n distinct texts, T tokens of all of them, P tokens with padding, H hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_SLACK = 1.2
"""On GPUs a group's longest text has at most so many times the tokens of its shortest."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Texts whose attention is computed in one call.

    Attributes:
        texts: Number of texts.
        longest: Number of tokens of the longest.
        mask: bool [texts, 1, 1, longest]; None where all are of that length.
    """

    texts: int
    longest: int
    mask: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Distinct texts, sorted by length and concatenated.

    Attributes:
        ids: Token ids, int64 [T].
        positions: Position of each token in its text, int64 [T].
        owner: Index of each token's text, int64 [T].
        first: Index of the first token of each text, int64 [n].
        lengths: Number of tokens of each text, int64 [n].
        groups: Texts that attend in one call, padded to the same length.
        pad_index: Position of each token in the padded layout, int64 [T]; None without padding.
        inverse: Index of each given text among the distinct ones, int64 [texts given].
    """

    ids: Tensor
    positions: Tensor
    owner: Tensor
    first: Tensor
    lengths: Tensor
    groups: tuple[Group, ...]
    pad_index: Tensor | None
    inverse: Tensor

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, heads: int, dropout: float, first: bool = False
    ) -> Tensor:
        """Compute self-attention within each text.

        Args:
            q: Queries [T, H]; with ``first``, those of each text's first token alone [n, H].
            k: Keys [T, H].
            v: Values [T, H].
            heads: Number of heads.
            dropout: Dropout of the attention weights.
            first: Whether only first tokens attend.

        Returns:
            Values attended to, of the shape of ``q``.
        """
        asking = (
            torch.split(q, [group.texts for group in self.groups]) if first else self._blocks(q)
        )
        found = []
        for group, *parts in zip(
            self.groups, asking, self._blocks(k), self._blocks(v), strict=True
        ):
            shaped = [part.view(group.texts, -1, heads, q.shape[-1] // heads) for part in parts]
            mine, keys, values = (part.transpose(1, 2) for part in shaped)
            seen = F.scaled_dot_product_attention(
                mine, keys, values, attn_mask=group.mask, dropout_p=dropout
            )
            found.append(seen.transpose(1, 2).reshape(-1, q.shape[-1]))
        seen = torch.cat(found) if len(found) > 1 else found[0]
        if first or self.pad_index is None:
            return seen
        return _move(seen, self.pad_index, size=None)

    def padded(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Return values of tokens [T] padded with zeros, by group [texts, longest]."""
        blocks = self._blocks(tokens[:, None])
        return tuple(
            block.view(group.texts, group.longest)
            for block, group in zip(blocks, self.groups, strict=True)
        )

    def _blocks(self, x: Tensor) -> tuple[Tensor, ...]:
        sizes = [group.texts * group.longest for group in self.groups]
        if self.pad_index is not None:
            x = _move(x, self.pad_index, size=sum(sizes))
        parts: tuple[Tensor, ...] = torch.split(x, sizes)
        return parts

    def unpadded(self, blocks: Sequence[Tensor]) -> Tensor:
        """Return values of padded tokens, by group [texts, longest, H], without padding [T, H]."""
        x = torch.cat([block.flatten(0, 1) for block in blocks])
        return x if self.pad_index is None else _move(x, self.pad_index, size=None)

    def mean(self, states: Tensor) -> Tensor:
        """Return the mean over the tokens of each text [T, H] -> [n, H]."""
        sums = states.new_zeros(len(self.lengths), states.shape[-1])
        return sums.index_add(0, self.owner, states) / self.lengths[:, None]


class _Move(torch.autograd.Function):
    """Permutation of rows to distinct places, or back, so that gradients need no accumulation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, size: int | None) -> Tensor:
        ctx.save_for_backward(places)
        ctx.sizes = len(x), size
        return _put(x, places, size)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        rows, size = ctx.sizes
        return _put(gradients[0], places, rows if size is None else None), None, None


def _put(x: Tensor, places: Tensor, size: int | None) -> Tensor:
    if size is None:
        return x.index_select(0, places)
    return x.new_zeros(size, x.shape[1]).index_copy_(0, places, x)


def _move(x: Tensor, places: Tensor, *, size: int | None) -> Tensor:
    """Move row i to ``places[i]`` of ``size`` rows; without a size, from ``places[i]`` to i."""
    out: Tensor = _Move.apply(x, places, size)  # type: ignore[no-untyped-call]
    return out


def pack(
    texts: Sequence[Sequence[int]],
    *,
    device: torch.device | str = "cpu",
    slack: float | None = None,
) -> Packed:
    """Pack tokenised texts.

    Args:
        texts: Token ids of each text, at least one each.
        device: Device of the tensors.
        slack: Maximum ratio of a group's longest text to its shortest, in tokens; None: by
            device.
    """
    if slack is None:
        slack = 1.0 if torch.device(device).type == "cpu" else _SLACK
    places: dict[tuple[int, ...], int] = {}
    for text in texts:
        places.setdefault(tuple(text), len(places))
    order = sorted(places, key=lambda ids: (len(ids), ids))
    number = {ids: i for i, ids in enumerate(order)}
    lengths = [len(ids) for ids in order]
    groups: list[Group] = []
    inside: list[int] = []
    at = row = 0
    while at < len(order):
        stop = at
        while stop < len(order) and lengths[stop] <= lengths[at] * slack:
            stop += 1
        mine, longest = lengths[at:stop], lengths[stop - 1]
        mask = None
        if mine[0] != longest:
            real = torch.arange(longest)[None] < torch.tensor(mine)[:, None]
            mask = real[:, None, None].to(device, non_blocking=True)
        groups.append(Group(texts=len(mine), longest=longest, mask=mask))
        for length in mine:
            inside.extend(range(row, row + length))
            row += longest
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
        pad_index=None if row == len(inside) else put(inside),
        inverse=put([number[tuple(text)] for text in texts]),
    )
