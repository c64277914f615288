import numpy as np
import pytest
import torch

from pathflip.models.slide_batch import pad_slides


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_regions_are_padded_with_masked_zeros(dtype):
    rng = np.random.default_rng(0)
    features = [rng.random((n, 4, 3)).astype(np.float16) for n in (2, 5, 1)]
    masks = [rng.random((n, 4)) < 0.5 for n in (2, 5, 1)]
    features[1].flags.writeable = masks[1].flags.writeable = False  # as they come from Arrow
    padded, mask = pad_slides(features, masks, dtype=dtype)
    assert (padded.shape, padded.dtype) == ((3, 5, 4, 3), dtype)
    assert (mask.shape, mask.dtype) == ((3, 5, 4), torch.bool)
    for row, (values, own) in enumerate(zip(features, masks, strict=True)):
        assert np.array_equal(padded[row, : len(own)].numpy(), values.astype(padded.numpy().dtype))
        assert np.array_equal(mask[row, : len(own)].numpy(), own)
        assert not padded[row, len(own) :].any()
        assert not mask[row, len(own) :].any()
