"""Padding of slides that differ in their number of regions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def pad_slides(
    features: Sequence[NDArray[Any]],
    masks: Sequence[NDArray[np.bool_]],
) -> tuple[Tensor, Tensor]:
    """Pad slides with zero regions to the largest number of regions among them.

    Shapes: b slides, n_i regions of slide i, N their maximum, M patch slots, d_in feature width.

    Args:
        features: Patch features of each slide, [n_i, M, d_in].
        masks: Patch mask of each slide, [n_i, M], True where a patch is.

    Returns:
        features float32 [b, N, M, d_in] and mask bool [b, N, M], False where a region is padding.
    """
    most = max(len(mask) for mask in masks)
    slots, dim = features[0].shape[1:]
    padded = torch.zeros(len(features), most, slots, dim)
    there = torch.zeros(len(features), most, slots, dtype=torch.bool)
    for row, (values, mask) in enumerate(zip(features, masks, strict=True)):
        # A copy where the array is read-only: torch warns of those.
        own = values if values.flags.writeable else np.array(values)
        padded[row, : len(mask)] = torch.from_numpy(own)
        there[row, : len(mask)] = torch.from_numpy(np.array(mask))
    return padded, there
