import numpy as np
import torch

from pathflip.models.slide_batch import pad_slides


def test_regions_are_padded_with_masked_zeros():
    rng = np.random.default_rng(0)
    features = [rng.random((n, 4, 3)).astype(np.float16) for n in (2, 5, 1)]
    masks = [rng.random((n, 4)) < 0.5 for n in (2, 5, 1)]
    features[1].flags.writeable = masks[1].flags.writeable = False  # as they come from Arrow
    padded, mask = pad_slides(features, masks)
    assert (padded.shape, padded.dtype) == ((3, 5, 4, 3), torch.float32)
    assert (mask.shape, mask.dtype) == ((3, 5, 4), torch.bool)
    for row, (values, own) in enumerate(zip(features, masks, strict=True)):
        assert np.array_equal(padded[row, : len(own)].numpy(), values.astype(np.float32))
        assert np.array_equal(mask[row, : len(own)].numpy(), own)
        assert not padded[row, len(own) :].any()
        assert not mask[row, len(own) :].any()
