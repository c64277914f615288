"""Images of one file, each written to a file of its own: the pixels are those of tifffile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from pathflip.cli import main
from pathflip.errors import ConfigError, SlideError
from pathflip.slides.slide import Slide
from pathflip.slides.split import list_images, split_images
from tests.unit.slides.test_structure import code_of, halved, per_cm, picture, write

LAYOUTS: list[dict[str, Any]] = [
    {"compression": "jpeg", "photometric": "rgb"},
    {"compression": "jpeg", "photometric": "ycbcr", "subsampling": (2, 2)},
    {"compression": "deflate", "photometric": "rgb", "predictor": True},
    {"compression": "lzw", "photometric": "rgb", "planarconfig": "separate"},
    {"compression": None, "photometric": "rgb"},
]


def scenes(path: Path, options: dict[str, Any], *, ome: bool, big: bool) -> list[list[np.ndarray]]:
    """Two scenes of two levels, 0.5 and 0.25 µm/px; returns what tifffile reads of each level."""
    planar = options.get("planarconfig") == "separate"

    def stored(pixels: np.ndarray) -> np.ndarray:
        return np.moveaxis(pixels, -1, 0).copy() if planar else pixels

    shared = {"tile": (128, 128), **options}
    with tifffile.TiffWriter(path, ome=ome, bigtiff=big) as file:
        for seed, mpp in ((1, 0.5), (2, 0.25)):
            base = picture(640 + 128 * seed, 512, seed=seed)
            if ome:
                axes = "SYX" if planar else "YXS"
                about = {"axes": axes, "PhysicalSizeX": mpp, "PhysicalSizeY": mpp}
                file.write(stored(base), subifds=1, metadata=about, **shared)
                file.write(stored(halved(base)), subfiletype=1, **shared)
            else:
                file.write(stored(base), metadata=None, **per_cm(mpp), **shared)
                file.write(
                    stored(halved(base)), metadata=None, subfiletype=1, **per_cm(2 * mpp), **shared
                )
    with tifffile.TiffFile(path) as file:
        if ome:
            pages = [[level.keyframe for level in series.levels] for series in file.series]
        else:
            pages = [[file.pages[n], file.pages[n + 1]] for n in (0, 2)]
        return [
            [np.moveaxis(page.asarray(), 0, -1) if planar else page.asarray() for page in one]
            for one in pages
        ]


@pytest.mark.parametrize("options", LAYOUTS, ids=str)
@pytest.mark.parametrize(("ome", "big"), [(True, False), (False, True)])
def test_each_image_has_its_own_pixels_and_resolution(
    options: dict[str, Any], ome: bool, big: bool, tmp_path: Path
) -> None:
    path = tmp_path / ("two.ome.tif" if ome else "two.tif")
    truth = scenes(path, options, ome=ome, big=big)
    with pytest.raises(SlideError, match="slides split") as raised:
        Slide(path)
    assert raised.value.code == "several_images"
    images = list_images(path)
    assert [(one.number, one.width, one.levels) for one in images] == [(0, 768, 2), (1, 896, 2)]
    written = split_images(path, tmp_path / "out")
    assert [file.name for _, file in written] == ["two_image0.tif", "two_image1.tif"]
    for (_, file), levels, mpp in zip(written, truth, (0.5, 0.25), strict=True):
        with tifffile.TiffFile(file) as copy:
            assert len(copy.pages) == 2
            assert copy.pages.first.description == ""
            read = [page.asarray() for page in copy.pages]
            if options.get("planarconfig"):
                read = [np.moveaxis(one, 0, -1) for one in read]
            assert all(np.array_equal(ours, true) for ours, true in zip(read, levels, strict=True))
        with Slide(file) as slide:
            assert (slide.width, slide.height) == levels[0].shape[1::-1]
            assert slide.mpp == pytest.approx(mpp, rel=1e-4)
            assert slide.levels == 2
            gap = np.abs(slide.read(0, 0, (slide.width, 512)).astype(int) - levels[0])
            # OpenSlide's decoder enlarges subsampled colour in another way.
            assert gap.mean() < (1.5 if "subsampling" in options else 0.7)


def test_one_image_is_chosen_and_nothing_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "two.ome.tif"
    truth = scenes(path, LAYOUTS[2], ome=True, big=False)
    words = ["slides", "split", str(path), "--out", str(tmp_path / "out"), "--image", "1", "--json"]
    for extra in (["--dry-run"], []):
        with pytest.raises(SystemExit) as done:
            main([*words, *extra])
        assert not done.value.code
        rows = json.loads(capsys.readouterr().out)
        assert [(row["image"], row["width"], row["mpp"]) for row in rows] == [(1, 896, 0.25)]
        assert (tmp_path / "out").exists() == (not extra)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["two_image1.tif"]
    with Slide(rows[0]["file"]) as slide:
        assert np.array_equal(slide.read(0, 0, (896, 512)), truth[1][0])
    with pytest.raises(ConfigError) as raised:
        split_images(path, tmp_path / "out", images=[1])
    assert raised.value.code == "exists"
    with pytest.raises(ConfigError) as raised:
        split_images(path, tmp_path / "other", images=[2])
    assert raised.value.code == "no_image"
    assert not (tmp_path / "other").exists()


def test_what_cannot_be_copied_is_refused(tmp_path: Path) -> None:
    strips = write(tmp_path / "strips.tif", picture(), tile=None, rowsperstrip=64)
    turned = write(tmp_path / "turned.tif", picture(), byteorder=">")
    (tmp_path / "no.tif").write_bytes(b"no TIFF")
    for path in (strips, turned, tmp_path / "no.tif"):
        with pytest.raises(SlideError) as raised:
            list_images(path)
        assert raised.value.code == "unsupported"


def test_each_plane_is_an_image_and_other_files_are_left_alone(tmp_path: Path) -> None:
    """Depths of one OME image, of which readers show the first, and one in another file."""
    planes = np.stack([picture(384, 256, seed=seed) for seed in range(3)])
    shared = {"tile": (128, 128), "photometric": "rgb", "compression": "deflate"}
    path = tmp_path / "z.ome.tif"
    about = {"axes": "ZYXS", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
    tifffile.imwrite(path, planes, metadata=about, **shared)
    assert code_of(path) == "several_images"
    written = split_images(path, tmp_path / "out")
    assert len(written) == 3
    for (_, file), plane in zip(written, planes, strict=True):
        with Slide(file) as slide:
            assert slide.mpp == pytest.approx(0.5)
            assert np.array_equal(slide.read(0, 0, (384, 256)), plane)

    write(tmp_path / "other.tif", planes[1])
    data = (
        '<TiffData FirstZ="{0}" IFD="0" PlaneCount="1"><UUID FileName="{1}">{2}</UUID></TiffData>'
    )
    here, there = (f"urn:uuid:00000000-0000-0000-0000-00000000000{number}" for number in (1, 2))
    xml = (
        f'<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="{here}">'
        '<Image ID="I:0">'
        '<Pixels ID="P:0" DimensionOrder="XYCZT" Type="uint8" SizeX="384" SizeY="256" SizeC="3" '
        'SizeZ="2" SizeT="1"><Channel ID="C:0" SamplesPerPixel="3"/>'
        + data.format(0, "two.ome.tif", here)
        + data.format(1, "other.tif", there)
        + "</Pixels></Image></OME>"
    )
    write(tmp_path / "two.ome.tif", planes[0], description=xml)
    with tifffile.TiffFile(tmp_path / "two.ome.tif") as opened:
        assert [page.parent is opened for page in opened.series[0].pages] == [True, False]
    ((_, file),) = split_images(tmp_path / "two.ome.tif", tmp_path / "out")
    with Slide(file, mpp=0.5) as slide:
        assert np.array_equal(slide.read(0, 0, (384, 256)), planes[0])
