"""The multimodal encoder E_mm over patch vectors and text tokens, and the head that says words.

Sequences are lists of rows of one bank of vectors, packed by :func:`pathflip.models.packing.pack`:
a vector that stands in many sequences is projected once, and nothing is padded on CPUs. There are
no positions: those of text tokens are in their states, and keywords have no order.

Shapes: R rows of the bank, T tokens of all sequences, n distinct sequences, H width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pathflip.models.packing import Group, Packed
from pathflip.models.qformer import feed_forward


class FusionLayer(nn.Module):
    """Transformer layer with norms first.

    Args:
        width: H.
        heads: Number of heads.
        ffn: Width inside the feed-forward block.
        dropout: Dropout of attention and of both blocks.
        recompute: Whether GELU outputs are recomputed for the gradient.
    """

    def __init__(
        self, width: int, *, heads: int, ffn: int, dropout: float, recompute: bool
    ) -> None:
        super().__init__()
        self.heads, self.p, self.recompute = heads, dropout, recompute
        self.attention_norm, self.ffn_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, ffn), nn.Linear(ffn, width)

    def forward(
        self, x: Tensor, packed: Packed, *, first: bool = False, rows: Tensor | None = None
    ) -> Tensor:
        """Encode tokens [T, H]; or return the states of first tokens, or of some rows, alone."""
        p = self.p if self.training else 0.0
        y = self.attention_norm(x)
        asking = y[packed.first] if first else y
        seen = packed.attend(
            self.query(asking), self.key(y), self.value(y), heads=self.heads, dropout=p, first=first
        )
        if first:
            x = x[packed.first]
        elif rows is not None:
            x, seen = x[rows], seen[rows]
        x = x + F.dropout(self.out(seen), p)
        inner = feed_forward(self.ffn_norm(x), self.up, self.down, recompute=self.recompute)
        return x + F.dropout(inner, p)


class FusionEncoder(nn.Module):
    """E_mm: transformer over sequences of a patch vector and text tokens.

    Args:
        width: H.
        layers: Number of layers.
        heads: Number of heads.
        ffn: Width inside the feed-forward blocks.
        dropout: Dropout.
        recompute: Whether GELU outputs are recomputed for the gradient.
    """

    def __init__(
        self, width: int, *, layers: int, heads: int, ffn: int, dropout: float, recompute: bool
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            FusionLayer(width, heads=heads, ffn=ffn, dropout=dropout, recompute=recompute)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(
        self, bank: Tensor, packed: Packed, *, first: bool = False, rows: Tensor | None = None
    ) -> Tensor:
        """Encode packed sequences; of the last layer, only what is asked for is computed.

        Args:
            bank: Vectors [R, H].
            packed: Sequences whose token ids are rows of the bank.
            first: Whether only the first tokens' states are wanted.
            rows: Tokens whose states are wanted [m]; None: all.

        Returns:
            States [T, H], [n, H] or [m, H].
        """
        x = bank[packed.ids]
        *inner, last = self.layers
        for layer in inner:
            x = layer(x, packed)
        out: Tensor = self.norm(last(x, packed, first=first, rows=rows))
        return out


class WordHead(nn.Module):
    """Scores of words from states: BERT's head, whose matrix is the text tower's word embeddings.

    Args:
        width: H.
        vocab_size: Number of words.
    """

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, states: Tensor, words: Tensor) -> Tensor:
        """Score every word.

        Args:
            states: [m, H].
            words: Word embeddings [vocabulary, H].

        Returns:
            Logits [m, vocabulary].
        """
        return F.linear(self.norm(F.gelu(self.dense(states))), words, self.bias)


def prefixed(packed: Packed, prefixes: Sequence[int]) -> Packed:
    """Return packed sequences in which a token sees the prefix, itself and what is before it.

    Args:
        packed: Sequences.
        prefixes: Tokens of the prefix of each given sequence, its patch included.
    """
    sizes = torch.zeros(len(packed.lengths), dtype=torch.long, device=packed.ids.device)
    given = torch.tensor(list(prefixes), dtype=torch.long).to(sizes.device, non_blocking=True)
    sizes[packed.inverse] = given
    groups, at = [], 0
    for group in packed.groups:
        place = torch.arange(group.longest, device=sizes.device)
        seen = place[None] <= place[:, None]  # [asking, asked]
        seen = seen[None] | (place < sizes[at : at + group.texts, None])[:, None]
        if group.mask is not None:
            seen = seen & group.mask[:, 0]
        groups.append(Group(texts=group.texts, longest=group.longest, mask=seen[:, None]))
        at += group.texts
    return replace(packed, groups=tuple(groups))
