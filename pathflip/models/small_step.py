"""Loss of a small Qwen3 on one core: transformers' arithmetic with less memory traffic.

Rows are sorted by length and padded in groups of a few, to lengths of which there are few, as every
new shape of a bfloat16 product costs the time of some. Projections that read the same input are one
product, weights of norms are multiplied into the matrices behind them, and attention goes group by
group, in the cache. Where a processor multiplies bfloat16 in hardware, products are bfloat16, with
weights, sums and norms in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_GROUP, _MULTIPLE = 4, 16
"""Rows padded to one length, and the unit of this length."""
_PREDICTIONS = 128
"""Unit to which the number of predictions is rounded up."""
_NOTHING = -100
"""Prediction that does not count."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """Prompt about a slide, and its answer.

    Attributes:
        before: Tokens before the slide.
        regions: Vectors of the slide's regions [R, D].
        after: Tokens after it.
        answer: Tokens to be predicted.
    """

    before: Sequence[int]
    regions: Tensor
    after: Sequence[int]
    answer: Sequence[int]

    def __len__(self) -> int:
        return len(self.before) + len(self.regions) + len(self.after) + len(self.answer) - 1


@dataclass(frozen=True, kw_only=True)
class PackedRows:
    """Rows one after the other, in groups of equal length.

    Attributes:
        states: Input embeddings [T, D].
        groups: Number of rows and their length, of each group.
        places: Positions [A] in ``states`` from which a token is predicted.
        wanted: Token to be predicted at each [A], -100 for those that do not count.
    """

    states: Tensor
    groups: Sequence[tuple[int, int]]
    places: Tensor
    wanted: Tensor


def pack(table: Tensor, rows: Sequence[Row]) -> PackedRows:
    """Look rows up in an embedding table [vocabulary, D] and pack them."""
    rows = sorted(rows, key=len)
    groups: list[tuple[int, int]] = []
    ids: list[int] = []
    places: list[int] = []
    shown: list[int] = []
    for first in range(0, len(rows), _GROUP):
        group = rows[first : first + _GROUP]
        length = -(-len(group[-1]) // _MULTIPLE) * _MULTIPLE
        groups.append((len(group), length))
        for row in group:
            start, regions = len(ids), len(row.regions)
            shown += range(start + len(row.before), start + len(row.before) + regions)
            ids += [*row.before, *[0] * regions, *row.after, *row.answer[:-1]]
            places += range(len(ids) - len(row.answer), len(ids))
            ids += [0] * (start + length - len(ids))
    wanted = [token for row in rows for token in row.answer]
    spare = -len(wanted) % _PREDICTIONS
    places += [0] * spare
    wanted += [_NOTHING] * spare
    vectors = torch.cat([row.regions for row in rows])
    states = F.embedding(torch.tensor(ids), table).index_copy(0, torch.tensor(shown), vectors)
    return PackedRows(
        states=states,
        groups=groups,
        places=torch.tensor(places),
        wanted=torch.tensor(wanted),
    )


def product_dtype() -> torch.dtype:
    """Return bfloat16 where this processor multiplies it in hardware, float32 elsewhere."""
    fast = torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.bfloat16 if fast else torch.float32


def packed_loss(llm: Any, rows: PackedRows, dtype: torch.dtype = torch.float32) -> Tensor:
    """Compute the cross-entropy of the wanted tokens, added up.

    Args:
        llm: A ``transformers`` Qwen3ForCausalLM, dense, without dropout.
        rows: The input.
        dtype: Type of matrix products.
    """
    config = llm.config
    size, eps = config.head_dim, config.rms_norm_eps
    turn = _turn(rows.groups, size, float(config.rope_parameters["rope_theta"]))
    state = rows.states
    for layer in llm.model.layers:
        own = layer.self_attn
        read = _normed(state, eps, dtype)
        joint = torch.cat(
            [_paired(own.q_proj.weight, size), _paired(own.k_proj.weight, size), own.v_proj.weight]
        )
        out = F.linear(read, (joint * layer.input_layernorm.weight).to(dtype))
        widths = [config.num_attention_heads, config.num_key_value_heads]
        query, key, value = torch.split(out.view(len(out), -1, size), [*widths, widths[1]], 1)
        query = _turned(query, _paired(own.q_norm.weight, size), turn, eps, dtype)
        key = _turned(key, _paired(own.k_norm.weight, size), turn, eps, dtype)
        if widths[0] > widths[1]:
            key, value = (x.repeat_interleave(widths[0] // widths[1], 1) for x in (key, value))
        seen = _attention(query, key, value, rows.groups).flatten(1)
        state = state + F.linear(seen, own.o_proj.weight.to(dtype))
        read = _normed(state, eps, dtype)
        joint = torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight])
        joint = joint * layer.post_attention_layernorm.weight
        gate, up = F.linear(read, joint.to(dtype)).chunk(2, -1)
        state = state + F.linear(F.silu(gate) * up, layer.mlp.down_proj.weight.to(dtype))
    read = _normed(state[rows.places], eps, dtype)
    head = (llm.lm_head.weight * llm.model.norm.weight).to(dtype)
    return F.cross_entropy(
        F.linear(read, head).float(), rows.wanted, ignore_index=_NOTHING, reduction="sum"
    )


def _paired(weight: Tensor, size: int) -> Tensor:
    """Put the two dimensions next to each other that rotary embedding turns together."""
    halves = weight.reshape(-1, 2, size // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def _turn(groups: Sequence[tuple[int, int]], size: int, theta: float) -> Tensor:
    """Return rotary embedding as complex numbers [T, 1, size / 2], each row from position 0."""
    frequencies = theta ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
    longest = max(length for _, length in groups)
    angles = torch.outer(torch.arange(longest, dtype=torch.float32), frequencies)
    turn = torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turn[:length].repeat(rows, 1) for rows, length in groups])[:, None]


def _turned(x: Tensor, weight: Tensor, turn: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Norm and turn queries or keys [T, heads, size]."""
    x = _normed(x.float(), eps, torch.float32) * weight
    pairs = torch.view_as_complex(x.view(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turn).flatten(-2).to(dtype)


def _normed(x: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Divide by the root mean square over the last dimension."""
    out: Tensor = _Normed.apply(x, eps, dtype)  # type: ignore[no-untyped-call]
    return out


class _Normed(torch.autograd.Function):
    """Root-mean-square norm over the last dimension, without a weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        out = x * scale
        ctx.save_for_backward(out, scale)
        result: Tensor = out.to(dtype)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        out, scale = ctx.saved_tensors
        grad = grads[0].float()
        share = torch.linalg.vecdot(grad, out).unsqueeze_(-1).div_(-out.shape[-1])
        found: Tensor = torch.addcmul(grad, out, share).mul_(scale)
        return found, None, None


def _attention(
    query: Tensor, key: Tensor, value: Tensor, groups: Sequence[tuple[int, int]]
) -> Tensor:
    """Attend causally within each row; queries, keys, values and result [T, heads, size]."""
    out: Tensor = _Attention.apply(query, key, value, tuple(groups))  # type: ignore[no-untyped-call]
    return out


class _Attention(torch.autograd.Function):
    """Causal attention within rows.

    What a row is padded with lies behind all that is read, so only its own result sees it.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, groups: tuple[tuple[int, int], ...]
    ) -> Tensor:
        scale = 1 / math.sqrt(query.shape[-1])
        out = torch.empty_like(query)
        longest = max(length for _, length in groups)
        hidden = torch.full((longest, longest), -math.inf, dtype=query.dtype).triu_(1)
        kept: list[Tensor] = []
        for rows, length, part in _parts(groups):
            q, k, v = (_by_head(x[part], rows) for x in (query, key, value))
            mask = hidden[:length, :length]
            share = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scale).softmax(-1)
            out[part] = _by_place(torch.bmm(share, v), rows)
            kept += [q, k, v, share]
        ctx.save_for_backward(*kept)
        ctx.groups = groups
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        grad, kept = grads[0], iter(ctx.saved_tensors)
        found = [torch.empty_like(grad) for _ in range(3)]
        for rows, _, part in _parts(ctx.groups):
            q, k, v, share = (next(kept) for _ in range(4))
            g = _by_head(grad[part], rows)
            raw = torch._softmax_backward_data(
                torch.bmm(g, v.transpose(1, 2)), share, -1, share.dtype
            ).mul_(1 / math.sqrt(q.shape[-1]))
            found[0][part] = _by_place(torch.bmm(raw, k), rows)
            found[1][part] = _by_place(torch.bmm(raw.transpose(1, 2), q), rows)
            found[2][part] = _by_place(torch.bmm(share.transpose(1, 2), g), rows)
        return found[0], found[1], found[2], None


def _parts(groups: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, slice]]:
    """Yield number of rows, length and place of each group."""
    start = 0
    for rows, length in groups:
        yield rows, length, slice(start, start + rows * length)
        start += rows * length


def _by_head(x: Tensor, rows: int) -> Tensor:
    """Make [rows × length, heads, size] to [rows × heads, length, size]."""
    length, heads, size = len(x) // rows, x.shape[1], x.shape[2]
    return x.reshape(rows, length, heads, size).transpose(1, 2).reshape(-1, length, size)


def _by_place(x: Tensor, rows: int) -> Tensor:
    """Make [rows × heads, length, size] to [rows × length, heads, size]."""
    length, size = x.shape[1:]
    return x.view(rows, -1, length, size).transpose(1, 2).reshape(rows * length, -1, size)
