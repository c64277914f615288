"""Bulk annotations of DICOM slides: files that highdicom wrote, made ones, and hostile ones."""

from __future__ import annotations

import base64
import math
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset

from pathflip.archive.annotations import AnnotationStore
from pathflip.archive.commit import Committer
from pathflip.cli import main
from pathflip.errors import ConfigError
from pathflip.interop import annotation_dicom
from pathflip.interop.annotation_dicom import SlideFile
from pathflip.interop.annotation_files import read_annotations, read_objects
from tests.archives import make_archive

# Written by highdicom 0.28.2 for the slide of these tests (its base image, see below), compressed.
# TWO: two polygons, "Tumor"; two points; an ellipse; a rectangle; a line. THREE: the same polygons
# by highdicom's ImageToReferenceTransformer, in mm of the frame of reference.
TWO = """
eNrdVk9v41QQn7hp1lS7K3f/qQe0eiocuPD0/CdOwgGcJqEJcpyAE6ReYNPUbR0ltrEdQU8snFdiQeLGocsn6UfZI8f9BMA82z
FJk2ovSIg6smfmzbx5M7+ZNwrAf/s0O42ugHRoFuE3pAIUoHfAKT4FAemw8y7IVKFVjVGZMValZSpTDV+Z1vAjwBbaiImNSqu4
Q0L50bU9XJJR9wB1T1OdolPUUlWvMqaptEYrmqrSxONDsNsSnLtn5yfu2J8xqlSpQkTc3ayLoDBFl2WlKqLdoHsfcDu6oDWtXG
Y1tHry1phF2FuJWQSSe2YyQ/17105ieBKgnbrxxD7Gy7XPoGEXoW5ZuBaA2RNghtxL6Ftc+1LiKx6uPN61Pwc4RYj//AtefwVc
+1mydpCtfZSs9XdztDZkUqngRxdhiFZ3s1w0xJFhNveX8tPQk/Evepfw17cECIiEJ/GcOMcQMUCNgRgA4gtJtjLZA5JzhUsexZ
ssij+SKDhO+9Be1Jr4geN9GPnzcOyQse/FoXs8j/0wSvHb+acrMs8lSNtjD4TL5uBJXrOkRgpVkJc1tN26tAcUbP80/nYUOmTq
Hoej8ILMI+eExD4Zh84odkh87kbE9aJ45OH5BgSveMQfZxHrScRQsNslkFlNZooIAkpFaDa6WNdiwew9gn7oj50ocr0z0vpm7g
Yzx4sJ3FuqSPlahSooS0kPEdiFjs3RItjdKWfAg22O4Bi5h9s8Hv4YsLfEP8v5NhS2GnYJvuyZw25rgve5gV6U5gRvH7f5vZTm
8qLA9z1/NbT5nT+Ffeg1AauRPdKRkTIZFS82y1dhSo3vV/VXP94gu9fsXeMU4+iZCbIYCcAdfCfJVNnJ8JGxPSewDbzag/nMD8
kErXiW3bo1rJsTeCfJzcrq9GleJxG0WgVvKVMXlbIbg6xS+9D1w+Dcn/pn7ng0nV6Q+rHnh7PRlNhxOB/H89CZwE7iWc8809wz
xsaqql5jTCfrvkWwHD+YjqLZBO4m01VIsrqXTIijlk0CnDENG29hzzw67FmEe/9gqSZCXhOST+unGWYko/sZfd9Yw0tJ8RKh68
Z+hE19WxArIWIda5Dg1V7CayvHy1jAZfxkrNDXv67KV7+klLxYldnP63iqi/47nI68k/8hmoUb+q9lmp2+3VrDs7iOJ7z5ZIFs
SkRjsywZq/bSOp5aimcRDvzvbg2aO/BFqzGoW4dmiqe+hOf2hvt8E55SPhOL2Uxcw6+8wM90Pef2dCOfhmbHagXwPMnI7n6Nf6
cC+AFzBfgbdbsBRg==
"""
THREE = """
eNrFVD1s00AUfnHTYqq2pBSqDBU6lRFxOtupk4CEnMaUFiVOwMkAAzRN3dZREhvbEepWxIDYkFgZ2oUJMTIxMDMgBhY2FiRGJG
Z+3l0dt7RILEhcFN+9n3v3vfe9O4D/O8yVclXCuVlJwzOcJUhBbZHPOFISzs2VOVCoSgs5RhXGWIEuUIXm8K/QIn4kGEEfWfho
tIA7MiifObKHSwraTqPt3L5N1SlaqaYXGMtptEjzOU2jIuIM2MsZ2HI3t9bdttdjVC1Qlci42yzJoDJVVxS1IKNfozoFuL3A8H
DGioqGXrN/xSxD9jfMMpAkMlMY2s8fOYnhSYB+2h9PrCNebl2Fsp2GkmWhzodKTYIerp5A3eLWJxmu6aPm7LR9A2ADS/zjJ3y6
A9x6XegWY90loatPJ9X6Qyb5PH50GZroNRHnksM6Msxm6lB+OYxk/MPoGfzVLQl8ksGTeE58xbBigBYDawBYXxDZKiQLJFmldj
mKrzGKLwIFr9M8LA+5Jp7v9C+G3iBoO6Tt9aPAXRtEXhDu12/8oCviyGOw3x5ZkHbNxmzCWcKRqusMfUd27QYF29uI7rcCh3Td
taAVbJNB6KyTyCPtwGlFDom23JC4/TBq9fF8A/w9jvhKjFgXiCFlL4+BgtwzVQYJpTSY5Srymk5VamegHnhtJwzd/ia5em/g+j
2nHxGYPMTIwhGG8ihnRA8RmIYVm1eLYHcPVzcP+eroY2DegJU+Pcor20acM6McJx8GZA+tV5N1B292GeNpZgfvIde+TO1n9TzF
PXf2mja//RswDzUTkBeAmYdv3u5t54wLj2Y/vpszjaGs8TFjGkuvvn3/0D2Qh/bX0dNsOnMgPy6tfn4/YRov5m6vXw6Py0P/Dc
RRq4gaIxKAEwI3f1/G4+wVbNQOjALnvTHoeQHpoFfZHoNqyWqWKh04KXKzYsaWEsZkyBXzCwuMaUPO7HIj5mweql7gb3ldb9Nt
t7rdbVJa63tBr9UldhQM2tEgcDowLiLrcWSaREZsrKDpRcZ0cjy2DJbj+d1W2OvAhHhnJZHVpHgrbl21MYNTghmr1sEuWDLl5H
X28R0q23hTa5Vb12oW8WFH5GpX7+Ij48MD4H3wC5tDKw0=
"""

WIDTH, HEIGHT, MM = 4000, 3000, 0.00025
POLYGONS = [
    [[100.25, 100], [400.5, 100], [400.5, 300], [100.25, 100]],
    [[500, 100], [600, 100], [600, 200], [500, 200], [500, 100]],
]
ANN, IMAGE = "1.2.840.10008.5.1.4.1.1.91.1", "1.2.840.10008.5.1.4.1.1.77.1.6"


def unpacked(text: str) -> bytes:
    return zlib.decompress(base64.b64decode("".join(text.split())))


def save(dataset: Dataset, path: Path) -> Path:
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1"
    dataset.save_as(path, enforce_file_format=True)
    return path


def item(**values: Any) -> Dataset:
    found = Dataset()
    for name, value in values.items():
        setattr(found, name, value)
    return found


def write_image(
    folder: Path,
    *,
    number: int = 0,
    width: int = WIDTH,
    height: int = HEIGHT,
    mm: float = MM,
    **changes: Any,
) -> None:
    """Write what an image of a slide says of itself (PS3.3 C.8.12.4), without pixels.

    Its rows run against y and its columns against x, as on a slide whose label is on the right.
    """
    folder.mkdir(exist_ok=True)
    measures = item(PixelMeasuresSequence=[item(PixelSpacing=[mm, mm])])
    origin = item(XOffsetInSlideCoordinateSystem=20.5, YOffsetInSlideCoordinateSystem=40.25)
    values = {
        "SOPClassUID": IMAGE, "SOPInstanceUID": f"1.2.3.4.9.{number}",
        "ImageType": ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"], "Modality": "SM",
        "SeriesInstanceUID": "1.2.3.4", "FrameOfReferenceUID": "1.2.3.6",
        "TotalPixelMatrixColumns": width, "TotalPixelMatrixRows": height,
        "ImageOrientationSlide": [0, -1, 0, -1, 0, 0],
        "TotalPixelMatrixOriginSequence": [origin],
        "SharedFunctionalGroupsSequence": [measures],
    }  # fmt: skip
    save(item(**values | changes), folder / f"{number}.dcm")


def write_points(
    path: Path, points: Any, *, image: int = 0, group: dict[str, Any] | None = None, **changes: Any
) -> Path:
    """Write annotations of one point each, as PS3.3 C.37.1.2 has them."""
    values = np.array(points, np.float32)
    of_group = {
        "AnnotationGroupLabel": "Cell", "GraphicType": "POINT",
        "NumberOfAnnotations": len(values), "PointCoordinatesData": values.tobytes(),
    } | (group or {})  # fmt: skip
    found = {
        "SOPClassUID": ANN, "SOPInstanceUID": "1.2.3.8", "AnnotationCoordinateType": "2D",
        "PixelOriginInterpretation": "VOLUME",
        "ReferencedImageSequence": [
            item(ReferencedSOPClassUID=IMAGE, ReferencedSOPInstanceUID=f"1.2.3.4.9.{image}")
        ],
        "AnnotationGroupSequence": [item(**of_group)],
    }  # fmt: skip
    return save(item(**found | changes), path)


@pytest.fixture
def slide(tmp_path: Path) -> SlideFile:
    write_image(tmp_path / "slide")
    write_image(tmp_path / "slide", number=1, width=1000, height=750, mm=4 * MM)
    return SlideFile(path=tmp_path / "slide", width=WIDTH, height=HEIGHT)


def places(path: Path, slide: SlideFile | None) -> list[Any]:
    where = {"slide_id": "s", "author": "ann", "width": WIDTH, "height": HEIGHT, "slide": slide}
    found, _ = read_annotations(path, bounds_x0=9, bounds_y0=9, **where)
    return [one.shape.geometry["coordinates"] for one in found]


def test_what_highdicom_wrote_in_pixels(slide: SlideFile, tmp_path: Path) -> None:
    path = tmp_path / "slide.dcm"
    path.write_bytes(unpacked(TWO))
    where = {"slide_id": "s", "author": "ann", "width": WIDTH, "height": HEIGHT, "slide": slide}
    found, left_out = read_annotations(path, **where)
    assert not left_out
    assert [one.classification for one in found] == [
        "Tumor", "Tumor", "Mitosis", "Mitosis", "Gland", "Box", "Line",
    ]  # fmt: skip
    assert found[0].name == "Neoplasm"
    shapes = [one.shape.geometry["coordinates"] for one in found]
    assert shapes[:2] == [[ring] for ring in POLYGONS]
    assert shapes[2:4] == [[7.5, 8], [9, 10]]
    ring = np.array(shapes[4][0])
    assert np.hypot((ring[:, 0] - 1200) / 200, (ring[:, 1] - 1000) / 100) == pytest.approx(1, 1e-3)
    x, y = (ring - ring[0]).T
    assert abs(x[:-1] @ y[1:] - x[1:] @ y[:-1]) / 2 == pytest.approx(math.pi * 200 * 100, rel=0.005)
    assert shapes[5] == [[[1, 2], [3, 2], [3, 4], [1, 4], [1, 2]]]
    assert shapes[6] == [[1, 2], [3, 4]]
    assert [len(one.polygons) for one in read_objects(path, slide=slide)] == [1, 1, 0, 0, 1, 1, 0]


def test_what_highdicom_wrote_in_millimetres(slide: SlideFile, tmp_path: Path) -> None:
    path = tmp_path / "slide.dcm"
    path.write_bytes(unpacked(THREE))
    found = places(path, slide)
    for rings, expected in zip(found, POLYGONS, strict=True):
        assert np.array(rings[0]) == pytest.approx(np.array(expected), abs=0.011)


def test_an_image_of_a_coarser_level_is_scaled(slide: SlideFile, tmp_path: Path) -> None:
    path = write_points(tmp_path / "a.dcm", [[10, 20], [0, 0]], image=1)
    assert places(path, slide) == [[40, 80], [0, 0]]
    doubles = np.array([[10.125, 20]]).tobytes()
    group = {"DoublePointCoordinatesData": doubles, "NumberOfAnnotations": 1}
    path = write_points(tmp_path / "a.dcm", [[1, 1]], group=group | {"PointCoordinatesData": None})
    assert places(path, slide) == [[10.12, 20]]


def test_points_in_space_may_have_a_height_each(slide: SlideFile, tmp_path: Path) -> None:
    """The middle of the first pixel is at the origin: (0.5, 0.5) px; x falls as rows go down."""
    points = [[20.5, 40.25, 0.001], [20.5 - 100 * MM, 40.25 - 40 * MM, 0.002]]
    path = write_points(
        tmp_path / "a.dcm", points, AnnotationCoordinateType="3D", FrameOfReferenceUID="1.2.3.6"
    )
    assert np.array(places(path, slide)) == pytest.approx(
        np.array([[0.5, 0.5], [40.5, 100.5]]), abs=0.02
    )


def test_what_cannot_be_placed_is_refused(slide: SlideFile, tmp_path: Path) -> None:
    def refused(says: str, *, of: SlideFile | None = slide, **changes: Any) -> None:
        path = write_points(tmp_path / "a.dcm", [[1, 2]], **changes)
        with pytest.raises(ConfigError, match=says) as error:
            read_objects(path, slide=of)
        assert error.value.code == "annotations"
        assert "a.dcm" in error.value.message

    refused("not at hand", of=None)
    tif = tmp_path / "slide.tif"
    tif.write_bytes(b"II*")
    refused("slide.tif is none", of=SlideFile(path=tif, width=WIDTH, height=HEIGHT))
    refused("is none", of=SlideFile(path=slide.path, width=WIDTH + 1, height=HEIGHT))
    refused("none of this slide's", image=7)
    refused("none of this slide's", ReferencedImageSequence=[])
    refused("single frames", PixelOriginInterpretation="FRAME")
    refused("unknown type '4D'", AnnotationCoordinateType="4D")
    refused("another slide", AnnotationCoordinateType="3D", FrameOfReferenceUID="1.9")
    refused("neither bulk microscopy", SOPClassUID=IMAGE)
    write_image(slide.path, number=2, width=1000, height=750, mm=3 * MM)
    refused("contradict", image=2)
    turned = {"ImageOrientationSlide": [1, 0, 0, 0, 0, 1]}
    for wrong in ({"TotalPixelMatrixOriginSequence": []}, turned):
        write_image(slide.path, **wrong)
        refused("where it lies", AnnotationCoordinateType="3D", FrameOfReferenceUID="1.2.3.6")


def test_groups_that_contradict_themselves_are_refused(slide: SlideFile, tmp_path: Path) -> None:
    def refused(says: str, **group: Any) -> None:
        path = write_points(tmp_path / "a.dcm", [[1, 2], [3, 4], [5, 6], [7, 8]], group=group)
        with pytest.raises(ConfigError, match=says):
            read_objects(path, slide=slide)

    refused("not the 3 annotations", NumberOfAnnotations=3)
    refused("not the 9 annotations", NumberOfAnnotations=9)
    refused("more than 500,000", NumberOfAnnotations=2**31)
    refused("unknown kind", GraphicType="SPHERE")
    refused("cut off", PointCoordinatesData=b"\0" * 6)
    bad = np.array([[np.nan, 1]], np.float32).tobytes()
    refused("no position", PointCoordinatesData=bad, NumberOfAnnotations=1)
    for starts in ([], [1, 2], [2], [1, 9], [3], [0], [5, 1]):
        listed = np.array(starts, np.uint32).tobytes()
        refused(
            "not the", GraphicType="POLYGON", NumberOfAnnotations=max(1, len(starts)),
            LongPrimitivePointIndexList=listed,
        )  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_refused(
    slide: SlideFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.dcm"
    whole = unpacked(TWO)
    rng = np.random.default_rng(0)
    for _ in range(60):
        data = bytearray(whole[: int(rng.integers(140, len(whole) + 1))])
        for at in rng.integers(132, len(data), 6):
            data[at] = rng.integers(256)
        path.write_bytes(data)
        with suppress(ConfigError):  # and nothing else
            read_objects(path, slide=slide)
    monkeypatch.setattr(annotation_dicom, "MAX_DICOM_BYTES", 1000)
    path.write_bytes(whole)
    with pytest.raises(ConfigError, match="larger than"):
        read_objects(path, slide=slide)


def imported(slide: SlideFile, path: Path) -> tuple[Path, list[str]]:
    """Import a file by the command; return the archive and the classes it holds, sorted."""
    uri = make_archive(path.parent / "archive", slides=2, captions=False)
    size = {"width": WIDTH, "height": HEIGHT, "sha256": "a" * 64}
    with Committer(uri) as committer:
        committer.update_slides({"slide001": size | {"uri": str(slide.path)}})
    command = ["annotations", "import", str(path), "--archive", str(uri), "--author", "ann"]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--json"])
    assert not ended.value.code
    return uri, sorted(str(one.classification) for one in AnnotationStore(uri).all())


def test_a_file_is_imported_on_the_slide_of_an_archive(slide: SlideFile, tmp_path: Path) -> None:
    path = tmp_path / "slide001.dcm"
    path.write_bytes(unpacked(TWO))
    uri, classes = imported(slide, path)
    assert classes[-2:] == ["Tumor", "Tumor"]
    command = ["annotations", "import", str(path), "--archive", str(uri), "--author", "ann"]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--slide", "slide000", "--json"])
    assert ended.value.code == 2, "no such slide is slide000"


def test_numbers_of_another_order_are_not_placed(slide: SlideFile, tmp_path: Path) -> None:
    path = write_points(tmp_path / "a.dcm", [[1, 2]])
    uid = b"1.2.840.10008.1.2."
    path.write_bytes(path.read_bytes().replace(uid + b"1\0", uid + b"2\0"))
    with pytest.raises(ConfigError, match="order of bytes"):
        read_objects(path, slide=slide)


def test_deflated_files_are_not_unpacked(slide: SlideFile, tmp_path: Path) -> None:
    dataset = pydicom.dcmread(write_points(tmp_path / "a.dcm", [[1, 2]]))
    dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1.99"
    dataset.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    with pytest.raises(ConfigError, match="deflated"):
        read_objects(tmp_path / "a.dcm", slide=slide)
