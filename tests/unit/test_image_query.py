"""From a picture to a query vector: same scale, same cut, clear refusals."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from pathflip.encoders import load_encoder
from pathflip.errors import ConfigError
from pathflip.geometry import Tiling
from pathflip.image_query import ImageQuery, embed_image, query_picture
from pathflip.slides.slide import Slide
from pathflip.synth import make_slide

TILING = Tiling(region_um=512.0, patch_um=128.0)


@pytest.fixture(scope="module")
def slide_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("query") / "q.svs"
    make_slide(path, width=2048, height=2048, mpp=0.5, layout="aperio", seed=5)
    return path


@pytest.fixture(scope="module")
def encoder():
    return load_encoder("texture")


def test_parse():
    assert ImageQuery.parse("a.svs").box is None
    assert ImageQuery.parse("a#b.svs#1,2,3,4").box == (1, 2, 3, 4)
    for bad in ("a.svs#1,2,3", "a.svs#1,2,0,4", "a.svs#-1,0,3,4", "a.svs#a,b,c,d"):
        with pytest.raises(ConfigError, match="is no box"):
            ImageQuery.parse(bad)


def test_a_file_whose_name_holds_a_hash_is_a_file(tmp_path):
    path = tmp_path / "a#1,2,3,4"
    path.touch()
    assert ImageQuery.parse(str(path)) == ImageQuery(path=path)


def test_box_of_a_slide_is_the_mean_of_its_patches(slide_path, encoder):
    vector = embed_image(
        ImageQuery(path=slide_path, box=(600, 700, 512, 256)), encoder=encoder, tiling=TILING
    )
    slide = Slide(slide_path)
    patches = np.stack([slide.read(600, 700, 256), slide.read(856, 700, 256)])
    mean = encoder(patches).mean(axis=0)
    assert vector == pytest.approx(mean / np.linalg.norm(mean), abs=1e-5)
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)


def test_glass_in_a_box_does_not_count(slide_path, encoder):
    slide = Slide(slide_path)
    row = slide.read(0, 1024, (2048, 256))
    tissue = [x for x in range(0, 2048, 256) if row[:, x : x + 256].mean() < 225]
    assert 0 < len(tissue) < 8  # the row has both
    vector = embed_image(
        ImageQuery(path=slide_path, box=(0, 1024, 2048, 256)), encoder=encoder, tiling=TILING
    )
    mean = encoder(np.stack([row[:, x : x + 256] for x in tissue])).mean(axis=0)
    assert vector @ (mean / np.linalg.norm(mean)) > 0.98


def test_a_small_box_is_read_with_its_surroundings(slide_path, encoder):
    vector = embed_image(
        ImageQuery(path=slide_path, box=(728, 828, 10, 10)), encoder=encoder, tiling=TILING
    )
    patch = Slide(slide_path).read(733 - 128, 833 - 128, 256)
    value = encoder(patch[None])[0]
    assert vector == pytest.approx(value / np.linalg.norm(value), abs=1e-5)


def test_a_picture_of_known_scale_equals_the_slide(slide_path, encoder, tmp_path):
    pixels = Slide(slide_path).read(600, 700, 512)
    cv2.imwrite(str(tmp_path / "crop.png"), cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))
    of_picture = embed_image(
        ImageQuery(path=tmp_path / "crop.png"), encoder=encoder, tiling=TILING, mpp=0.5
    )
    of_slide = embed_image(
        ImageQuery(path=slide_path, box=(600, 700, 512, 512)), encoder=encoder, tiling=TILING
    )
    assert of_picture == pytest.approx(of_slide, abs=1e-5)


def test_a_picture_without_a_background_is_the_same_tissue_on_white(encoder, tmp_path):
    rng = np.random.default_rng(0)
    rgb = np.full((512, 512, 3), 255, np.uint8)
    rgb[100:400, 50:450] = rng.integers(80, 200, (300, 400, 3))
    clear = (rgb.min(axis=2) == 255)[..., None]
    rgba = np.concatenate([np.where(clear, 0, rgb), np.where(clear, 0, 255)], axis=2)
    grey = rng.integers(0, 256, (512, 512)).astype(np.uint8)
    pictures = {
        "rgb": rgb, "rgba": rgba.astype(np.uint8),
        "grey": grey, "grey16": grey.astype(np.uint16) * 257,
    }  # fmt: skip
    vectors = {}
    for name, pixels in pictures.items():
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
        query = ImageQuery(path=tmp_path / f"{name}.png")
        vectors[name] = embed_image(query, encoder=encoder, tiling=TILING, mpp=0.5)
    assert vectors["rgba"] == pytest.approx(vectors["rgb"], abs=1e-6)
    assert vectors["grey16"] == pytest.approx(vectors["grey"], abs=1e-6)
    assert vectors["grey"] @ vectors["rgb"] < 0.9
    shown = query_picture(ImageQuery(path=tmp_path / "rgba.png"), tiling=TILING)
    assert np.asarray(Image.open(io.BytesIO(shown)))[:40, :40].min() > 250


def test_refusals(slide_path, encoder, tmp_path):
    cv2.imwrite(str(tmp_path / "small.png"), np.zeros((100, 100, 3), np.uint8))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    cases = [
        (ImageQuery(path=tmp_path / "gone.png"), 0.5, "does not exist"),
        (ImageQuery(path=tmp_path / "small.png"), None, "does not state its scale"),
        (ImageQuery(path=tmp_path / "small.png"), 0.5, "less than one patch"),
        (ImageQuery(path=tmp_path / "broken.png"), 0.5, "no picture"),
        (ImageQuery(path=slide_path, box=(1800, 0, 512, 512)), None, "leaves the slide"),
    ]
    for query, mpp, words in cases:
        with pytest.raises(ConfigError, match=words):
            embed_image(query, encoder=encoder, tiling=TILING, mpp=mpp)
