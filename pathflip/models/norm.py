"""Batch norm over the rows of all processes, without running statistics; SimSiam's heads on it.

Evaluation uses the statistics of its batch too, since only losses are computed behind it. So there
are no buffers that could differ between processes or be lost on resume.

Shapes: n rows of this process, C width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pathflip.models.losses import total, world


class GatheredBatchNorm(nn.Module):
    """Batch norm of rows, with mean and variance over all processes.

    Args:
        width: C.
        affine: Whether a learned scale and offset follow.
        eps: Added to the variance.
    """

    def __init__(self, width: int, *, affine: bool = True, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine else None

    def forward(self, x: Tensor, *, group: Any = None) -> Tensor:
        """Normalise rows [n, C] in float32.

        Args:
            x: Rows; processes may have different numbers of them.
            group: Process group; None for all processes.
        """
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            shared = world(group)[1] > 1
            count: Tensor = x.new_tensor(float(len(x)))
            if shared:
                count = total(count, group)
            # The variance of centred rows, not E[x²] - E[x]²: that cancels in float32.
            sums = x.sum(0)
            x = x - (total(sums, group) if shared else sums) / count
            squares = x.square().sum(0)
            variance = (total(squares, group) if shared else squares) / count
            x = x * (variance + self.eps).rsqrt()
            if self.weight is not None and self.bias is not None:
                x = x * self.weight + self.bias
            return x


class Projector(nn.Module):
    """f of SimSiam: three linear maps with batch norm; none learned after the last.

    Args:
        width: Width of the input.
        out: p.
    """

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(size, out, bias=False) for size in (width, out, out))
        self.norms = nn.ModuleList(GatheredBatchNorm(out, affine=i < 2) for i in range(3))

    def forward(self, x: Tensor, *, group: Any) -> Tensor:
        """Project [N, width] -> [N, p]."""
        for number, (linear, norm) in enumerate(zip(self.maps, self.norms, strict=True)):
            x = norm(linear(x), group=group)
            x = F.relu(x) if number < 2 else x
        return x


class Predictor(nn.Module):
    """q of SimSiam: a bottleneck with batch norm inside.

    Args:
        width: p.
        bottleneck: Width inside.
    """

    def __init__(self, width: int, bottleneck: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, bottleneck, bias=False)
        self.norm = GatheredBatchNorm(bottleneck)
        self.up = nn.Linear(bottleneck, width)

    def forward(self, x: Tensor, *, group: Any) -> Tensor:
        """Predict [N, p] -> [N, p]."""
        out: Tensor = self.up(F.relu(self.norm(self.down(x), group=group)))
        return out
