from __future__ import annotations

import cv2
import numpy as np
import pytest

from pathflip.encoders.texture import BLOCKS, CLIP, DIM, TextureEncoder
from tests.unit.encoders import tissue

ENCODER = TextureEncoder()
TRAIN, TEST = range(100, 106), range(200, 204)  # drawings; the constants saw seeds 0 to 11


@pytest.fixture(scope="module")
def rendered():
    """Features, tissue names and whether a patch is for testing: no drawing is on both sides."""
    features, names, test = [], [], []
    for name in tissue.TISSUES:
        for seed in (*TRAIN, *TEST):
            patches = tissue.patches(name, seed=seed, n=4)
            features.append(ENCODER(patches))
            names += [name] * len(patches)
            test += [seed in TEST] * len(patches)
    return np.concatenate(features), np.array(names), np.array(test)


def probe(features, labels, test, ridge=3.0):
    """Test accuracy of a linear least-squares classifier."""
    train = ~test
    x = np.c_[features / features[train].std(0).clip(1e-6), np.ones(len(features))]
    classes = np.unique(labels)
    targets = (labels[:, None] == classes) * 2.0 - 1
    gram = x[train].T @ x[train] + ridge * np.eye(x.shape[1])
    weights = np.linalg.solve(gram, x[train].T @ targets[train])
    return float((classes[(x[test] @ weights).argmax(1)] == labels[test]).mean())


def some_patches():
    names = ("colon", "tumour:7:nucleoli", "fibrosis", "lung", "haemorrhage")
    patches = [tissue.patches(name, seed=1, n=3) for name in names]
    return np.concatenate(patches)


def test_shape_and_blocks():
    out = ENCODER(some_patches())
    assert out.shape == (15, DIM)
    assert out.dtype == np.float32
    assert sum(BLOCKS.values()) == DIM


def test_same_bits_alone_in_any_batch_and_order():
    patches = some_patches()
    whole = ENCODER(patches)
    alone = np.concatenate([ENCODER(patch[None]) for patch in patches])
    np.testing.assert_array_equal(alone, whole)
    order = np.random.default_rng(0).permutation(len(patches))
    np.testing.assert_array_equal(ENCODER(patches[order]), whole[order])
    np.testing.assert_array_equal(TextureEncoder()(patches[3:11]), whole[3:11])


def test_views_encode_as_copies():
    canvas = np.zeros((300, 700, 3), np.uint8)
    patch = tissue.patches("breast", seed=1, n=1)[0]
    canvas[7:263, 211:467] = patch
    view = canvas[None, 7:263, 211:467]
    np.testing.assert_array_equal(ENCODER(view), ENCODER(patch[None]))


def test_turning_and_mirroring_change_nothing():
    patches = some_patches()
    whole = ENCODER(patches)
    for turned in (
        np.rot90(patches, 1, (1, 2)),
        np.rot90(patches, 2, (1, 2)),
        patches[:, ::-1],
        patches.transpose(0, 2, 1, 3),
    ):
        np.testing.assert_array_equal(ENCODER(np.ascontiguousarray(turned)), whole)


def test_finite_for_any_pixels():
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:256, :256]
    checker = ((x + y) % 2 * 255).astype(np.uint8)
    hostile = [np.full((256, 256, 3), v, np.uint8) for v in (0, 1, 128, 244, 255)]
    hostile += [
        np.full((256, 256, 3), c, np.uint8) for c in ((255, 0, 0), (0, 255, 0), (0, 0, 255))
    ]
    hostile += [np.repeat(checker[..., None], 3, 2), np.roll(checker, 1)[..., None].repeat(3, 2)]
    hostile += [rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)]
    hostile += [(rng.random((256, 256, 3)) < 0.5).astype(np.uint8) * 255]
    spot = np.full((256, 256, 3), 255, np.uint8)
    spot[128, 128] = 0
    out = ENCODER(np.stack([*hostile, spot]))
    assert np.isfinite(out).all()
    assert np.isfinite(out.astype(np.float16)).all()
    assert np.abs(out).max() <= CLIP * 2.2


@pytest.mark.parametrize("px", [16, 100, 224, 512])
def test_other_sizes(px):
    patch = tissue.patches("colon", seed=1, n=1)
    resized = cv2.resize(patch[0], (px, px), interpolation=cv2.INTER_AREA)[None]
    out = ENCODER(resized)
    assert out.shape == (1, DIM)
    assert np.isfinite(out).all()
    if px == 512:  # each pixel repeated: exactly the same picture
        doubled = patch.repeat(2, 1).repeat(2, 2)
        np.testing.assert_array_equal(ENCODER(doubled), ENCODER(patch))


def test_no_patches_and_wrong_arrays():
    assert ENCODER(np.zeros((0, 256, 256, 3), np.uint8)).shape == (0, DIM)
    for shape, dtype in (((2, 256, 256, 3), float), ((256, 256, 3), np.uint8)):
        with pytest.raises(ValueError, match="uint8"):
            ENCODER(np.zeros(shape, dtype))


def test_values_are_standardised(rendered):
    features, _, _ = rendered
    assert 0.5 < np.square(features).mean() < 2
    assert (np.abs(features) > 3.9).mean() < 0.02


def test_thirteen_tissues(rendered):
    features, names, test = rendered
    which = np.isin(names, tissue.ORGANS + tissue.FINDINGS)
    assert probe(features[which], names[which], test[which]) >= 0.97  # chance 0.08


def test_nucleoli_at_equal_density(rendered):
    features, names, test = rendered
    which = np.isin(names, [*tissue.NUCLEOLI, "tumour:7", "tumour:9.5"])
    label = np.char.endswith(names[which], "nucleoli")
    assert probe(features[which], label, test[which]) >= 0.97  # chance 0.5


def test_nuclear_size(rendered):
    features, names, test = rendered
    which = np.isin(names, [*tissue.NUCLEOLI, "tumour:7", "tumour:9.5"])
    label = np.char.find(names[which], "9.5") > 0
    assert probe(features[which], label, test[which]) >= 0.97


def test_mixed_lymphocytes(rendered):
    """Not every patch of a mixed tumour holds lymphocytes: the ceiling is below 1."""
    features, names, test = rendered
    which = np.isin(names, [*tissue.MIXED, "tumour:7", "tumour:9.5"])
    label = np.char.endswith(names[which], "mixed")
    assert probe(features[which], label, test[which]) >= 0.85


def test_neighbours_by_cosine_are_of_the_same_tissue(rendered):
    """Search without having seen the archive: nearest of other drawings, 17 tissues."""
    features, names, test = rendered
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    nearest = names[~test][(unit[test] @ unit[~test].T).argmax(1)]
    assert (nearest == names[test]).mean() >= 0.85


def test_fibres_are_told_from_isotropic_tissue():
    at = np.cumsum([0, *BLOCKS.values()])[list(BLOCKS).index("differences E")]
    spread = at + 1  # of the finest lag
    fibres, plain = (ENCODER(tissue.patches(n, seed=5, n=8)) for n in ("fibrosis", "haemorrhage"))
    assert fibres[:, spread].min() > plain[:, spread].max()


def test_lamp_moves_it_less_than_tissue_does():
    patches = np.concatenate([tissue.patches(n, seed=9, n=1) for n in tissue.TISSUES])
    table = np.rint(np.arange(256) * 0.95).astype(np.uint8)
    unit = [
        f / np.linalg.norm(f, axis=1, keepdims=True)
        for f in map(ENCODER, (patches, table[patches]))
    ]
    cosine = unit[0] @ unit[1].T
    same = np.diag(cosine)
    other = cosine[~np.eye(len(cosine), dtype=bool)]
    assert same.mean() > 0.8
    assert same.mean() > other.mean() + 0.5


def test_jpeg_hardly_moves_it():
    patches = np.concatenate([tissue.patches(n, seed=9, n=1) for n in tissue.TISSUES])
    coded = [
        cv2.imencode(".jpg", patch[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 80])[1]
        for patch in patches
    ]
    decoded = np.stack([cv2.imdecode(code, cv2.IMREAD_COLOR)[..., ::-1] for code in coded])
    a, b = ENCODER(patches), ENCODER(np.ascontiguousarray(decoded))
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert cosine.min() > 0.85  # colour at half resolution, as slides have it
    assert cosine.mean() > 0.95


def test_scale_is_seen():
    """One tissue read at 0.5 and at 1 µm per pixel is linearly two textures."""
    features, far, test = [], [], []
    for seed in (*TRAIN, *TEST):
        for mpp in (0.5, 1.0):
            features.append(ENCODER(tissue.patches("tumour:7", seed=seed, n=3, mpp=mpp)))
            far += [mpp == 1.0] * 3
            test += [seed in TEST] * 3
    assert probe(np.concatenate(features), np.array(far), np.array(test)) >= 0.95
