"""Structured reports of DICOM slides: files that highdicom wrote, made ones, and hostile ones."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset

from pathflip.errors import ConfigError
from pathflip.interop import annotation_dicom
from pathflip.interop.annotation_dicom import SlideFile
from pathflip.interop.annotation_files import read_annotations, read_objects
from pathflip.interop.annotations import Annotation
from tests.unit.interop.test_annotation_dicom import (
    HEIGHT,
    IMAGE,
    MM,
    POLYGONS,
    WIDTH,
    imported,
    item,
    save,
    unpacked,
    write_image,
)  # fmt: skip

# Written by highdicom 0.28.2 for the slide of these tests: reports of measurements (TID 1500) with
# a group for each region, whose finding is "Neoplasm" or "Mitosis". TWO is a Comprehensive SR: two
# polygons, one with a measurement of its area, a point, an ellipse, a circle, a line. THREE is a
# Comprehensive 3D SR: the same polygons, point and ellipse by ImageToReferenceTransformer.
TWO = """
eNrtWE+I42QUf9OpQxh06fpnGUTlY/WwioYkTdNWRNNNUifSfzatqIiYabOdaJt0k1QZDzKIB/WkKAuKyA6ueBEEDx7Eg0dP4sGb
IJ5EPHkUD+r78qfTbbPrysjsjLRD5mtevrz3e7/vvV++FOD6flRdqWdw7Nay8CGOGViB5lk64mclg2NXvwt4VmBLIsfyHMeV2ALL
syIePFsqsfk8zlnFWUw4K8+W+Azk8PzWubvoGY9zb973KEgsXmXzUonjxDxbZotiPk8dZ+AWMDZzsG0Ptvt2zx1xrFBiBcLg3WqF
AYETJJ4XSgzO69RPACcKxXyBlcrFUrGAs05dA2oGNi5DzQBB34D2u+dicBiD2vOpsVqIlF59DhQjA0abgTHUmhkY4bW3oNWg106e
NB6P+M7hH7XlMBqdNSY59E/j5kBGD4CoVi7S2b/h7D//gp9+AeqB+jwNmwkfxB1bzgO+O/F6Fum5TuDZW5PA9XyMmas11/eZIxtA
0LIGEYUbkLmodk5Ns4uzKQo8L5Zx7upFo8OC4Z4LXjI9iwztLc/0dsjEt/okcEnPs8zAIsG27RPb8QPTwfgyjPco4odjxFKIGFaM
zTXguTLPCQxk8CwLqlJHVrIrteat0PLcnuX7tjMg2vmJPR5ZTkDgppk14ZGjEzPnZTzPhWwTOAk6ss0TghUQfZNBvqgY66A0G52K
3tDaaFFCJtUY10OzuAQJq2IR1+2gj8wBBVW3TH/iWSGstjV2vUCG1jSC3ug2u4YM3kfJysowCb+/GUd7NYx2W7jy52Lbs6HtvdB2
NrY9GNpaJ69WscUi/pMY6OKsG2M2ROwXbo4hEeYZlOHtS4rBIOZ6q6Z1NBneuURz6Dae0Np6VddUGS6gZQ2qeqNSQ86yH1N0JEa3
EaK7YUUxQpbaMsAP9Dtf4DgZuE9Cfkk09/uQhRxylIPNikGQJ0VrdUi9qcark0UcqpasSzuO8dhl68JzYnlxXc5AzXQGE3NgEfcc
UbDi6brogTUiptMnquX3LKdvOoEvw3ZYjdXY+8Mz3rFnugaJvDPQrioFSZTiCBugOYOh7W+TM13HDrDejQBr3b+XUC+X5nJrng3z
62hPdlJzK8XRubncuMJibiegueVb3ouWRzo7Y9pPUQZc7OPMvA9p0ccatCzPdx06f/cfseLsRqWuTTsktXNppFJq54aRyBR0wxxZ
Mty912owoLrWsxXHCTn76l/Ww0MxCnEORSEFxc2RfvSxQ4kXdqfVT3hb7HdU8wInFh6Q4rXPQK2R9LvSIRPHH1s9+5yNi77l9nfQ
48COuNy+M8mBSZTFuLLSpPMocTyXxmOK0vhpGhN12Y93RL5fu+HfIErnFJu3mMbprOY96rmTMUnDc40KIfJThfguu6+J/9RF9OSq
fPICly+n8dnxzN4LlFC9jwnQ5fTQ63N73U54NwwtH1eV8NTj69fQI11dbWvVqz5FEIuY+hSZYkEtOT+xZiDJcM9eV1+PFZoqO/X6
NVxpVS/vkUVG1kEoSgIvoiyQBImBRR0hyUHVdvoUSA/FbOB6O0mXNGJP1ZkuEcvFAtZGftHPaai73njbHboDu2cOhzuksuW43sgc
okx6k16AZUO9fXCNeQhx9Pvmer3IL7LJTHNIsEvx3ewMCzxXykvldBYYaFjueGj6I3rXt1fB2OjWp72zqL/IkFAsl2Z2DvsxslDB
zRFWf7gLeD6+dyuM9StDbQ/GNmHqLwujkTDF21W69aQT/fMTuv8a2cOhPbKCsJLNvarKxPv23x+RYf0jlfYZWwjVdrhypazWEGWz
2VaTvBbZo5XMc/mUSr4xVCkLd0BUEZN+/jL28Pl/vp+JMjgBhlbTlI6mkmq7WZ92pF6vPLr/1BLjiPfP9oLEFQt5jiunVAHyEG6Y
N2FllXp7olnr1rUxnIZqDdVs9xtMAQ/5G2V/vKAk9jG+F1BuW83aUzXUWBr5i+zx0+LMUdJi4YhpsbDU4sPV4mCpWgdQLfpk+iNS
Kzil7o+bSmRPxnT1evcYqtdPq/Eu+Lqp1zp6GNmB69s+4ckR06/8/0m/3j8U/VrsRwaKBUkQUnd5DNTjtaf3tJfqdQD1ovuA37DJ
oRKp0xqqk97ohMx+egy16fdYm3avmzatoYfBkP4gdsR0SVzuqw53X7V8Gzzg2yC8rEbHZ/F4AQ8zGnffUJP9lFar6S1DC/vt/WOo
WT8fCc3ChI6eZhWWmnW4mvX0UrMOoFk5+i6ohoe8qtEx2VUpelupacddoV65bgqVpb9X2Y51xPRJWurT4erTM0t9OqA+7T4SLjPI
eOzK879J/Q3wUWgj
"""
THREE = """
eNrtWM9v23QUf01DZVWjSseYKg7bd90OG2KWf8VJpmk4zY81KHFCnCC4THMTNzUkdmY7TL1NCAnECQRC6oRQuw7B3zBx4MQBMQ4I
cdmFE0IcEEeE0OB9HSdNE6/rLl2Hlqr111+/73uf9/m+9/E3BXi8n2whU4rgtV6Mwud4jcAUlJfoFT9TEbzWCyeAZwU2KXEsz3Fc
ko2zPCvhL88mk6wooc00WjG+lcgmhQjE8P7Y2Cp6x6Pt0R2PgsziU1aUkxwniWyKTUiiSB1H4DnQlmOwZrbWmmbD7nCskGQFwuDq
bJoBgRNknheSDNrVSnPASUJCjNPlqQSHVsf3gZqBhV2oGSDoG3D+9FgMDmPQeTE0VgWR0qdXIaNFQKsy0IViOQIdfPYhVFT6bH5e
e7XPdwx/6FwMo1GrLomhfxo3Bgp6AEQ1tUmt/0Tr+//CL78B9UB9LsLygA9idw3rvGv3nIZBGrblOeZKz7MdF2PGiuXZHebIAhCc
mYE+hQsQ2czWjg+zG2ST4EVRQtvpTa3Ggmavetd1xyBtc8XRnXXSc40m8WzScAzdM4i3ZrrEtFxPtzC+At0tivhSgFj2EcOUtjwD
PJfiOeQ2gndRyGZKyEp0qlg+BhXHbhiua1otkrvWM7sdw/IIPDuyJzxyNDdyn8L7mM82gXkoINs8IVgB/ZECymZGm4VMWa2lC2qu
ijMZn8lsgOviKC5BxqqYxPUCFDp6i4IqGbrbcwwfVtXo2o6nQGUYoaDWy3VNAWd7sLMK9PzxB0G0d/xoz/s7vxrMXfHnNvy5pWDu
gj9Xmd+rYhMJ/CMzUEerIwEbEvYLN8aQBOMMKvDR7YzGIOZSpZir5RT4+DbNoa6+lqsW8oVcVoFPcWYG8gU1XUTOol9QdCRAt+Cj
e2Yqo/ksVRWAe3TMxzlOAe5Lassd69v+5LMQQ45isJzWCPKUyVVqpFTOBrsTRRzZ3GBfqkGMV3btC89Jqcl9OQtF3Wr19JZB7FWS
wYqn+1LwjA7RrSbJGm7DsJq65bkKrPnVmA+8Xxrxjj1T10jfOwPVfCYuS3IQYQFyVqttumvkbN0yPax3zcNad88R6uX2WG7lJT+/
Wu71WmhuySA6N5YbF5/MbQ7KK67hvG04pLbepf3Uz4ALfJwd9yFP+piBiuG4tkXtbzwUK1qr6VJu2CGhnUsjJUM7149EhqBVvWMo
cHqrojKQtY0racvyOfv6EevhYoBCGkMRD0FxtK8fTexQ4vjdaTQHvE32O6p5nJPi5+Vg7yNQVAf9nqmRnuV2jYa5auKmr9jNdfTY
Mvtc1uYHOTADZdEerDThPMocz4XxGKI0bpjG9Lvsu1jf94/RR0EUzik2byKM01HNu+zYvS4Jw7NPhZD4oUKciO5o4sO6iN7syScv
cGIqjM+aozfeooQWmpgA3U4HvV7dqtf81dA2XNxVwlOP7++jR+qFbDWX3/Mtglik0LfIEAtqybWeMQJJgTNb9cJsoNBU2anXb+BB
u7q7RyYZmQUhIQu8hLJABkg0LOo+khjkTatJgTRQzFq2sz7oEjXwlB/pEimViGNtiJN+FqFkO901u223zIbebq+T9IplOx29jTLp
9Boelg319tk+8xCC6C+O9XqCn2STGeYwwC4Hq9kRFnguKcqpcBYYUA2729bdDl31wx4Y1Xpp2DuT+osMCYlUcuTksBMjCmk8HGH1
+6eAN4O1K36s3xk6dyGYE4b+otDpCEO89Uy9NOhE91qPnr86ZrttdgzPr2R9K59lgnP7Xy8rMLudpX3Gxn21vfPArBhEWS5Xs2J2
kNkkf7SWeU4MqeUjvk4ZeAaimtiFRcgXOZi7u52+/iuhhxh/fHOjP/5qdWc8atPFUzVFUikX37hcVskMd2bknCL7aJgnUNlq04dI
2YRDpmzCU2U7WGX79gA14KLf36du7PT6e6v98b2N3eNRm8F4P3rw8/STpweLgR68+9j0YBY9dEzPdvErOk8OmSKI/ydFuHkgiiAF
q18awZ6Iy4IQegphoBTsPV3zyQHqwRE49892On5/tL/xe2a5oNZCu/vvJ7C780F333hs3T2DHlpt+i+PQ9bZ0tN3/cG+6w/2vL8E
t9KnoN/bdHxn46Q/7om30n98fzJ4v28Nx4P3e65YLFS03IQC/AcATquF
"""
REPORT, REPORT_3D = "1.2.840.10008.5.1.4.1.1.88.33", "1.2.840.10008.5.1.4.1.1.88.34"
SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.4"


def code(value: str, meaning: str = "") -> list[Dataset]:
    return [item(CodeValue=value, CodingSchemeDesignator="DCM", CodeMeaning=meaning)]


def content(
    kind: str, concept: str = "", *below: Dataset, meaning: str = "", **values: Any
) -> Dataset:
    """Build a content item (PS3.3 C.17.3)."""
    found = item(ValueType=kind, **values)
    if concept:
        found.ConceptNameCodeSequence = code(concept, meaning)
    if below:
        found.ContentSequence = list(below)
    return found


def image(number: int = 0, *, kind: str = IMAGE) -> Dataset:
    uid = f"1.2.3.4.9.{number}"
    return content(
        "IMAGE",
        ReferencedSOPSequence=[item(ReferencedSOPClassUID=kind, ReferencedSOPInstanceUID=uid)],
    )


def region(
    points: Any, *below: Dataset, kind: str = "POINT", concept: str = "111030", **values: Any
) -> Dataset:
    """Build a region in pixels of an image, the whole of it unless ``values`` say another."""
    values = {"PixelOriginInterpretation": "VOLUME"} | values
    data = np.array(points, float).ravel().tolist()
    return content(
        "SCOORD", concept, *(below or (image(),)), meaning="Of a concept", GraphicType=kind,
        GraphicData=data, **{name: value for name, value in values.items() if value},
    )  # fmt: skip


def in_space(points: Any, *, kind: str = "POINT", frame: str = "1.2.3.6") -> Dataset:
    data = np.array(points, float).ravel().tolist()
    uid = {"ReferencedFrameOfReferenceUID": frame}
    return content("SCOORD3D", "111030", GraphicType=kind, GraphicData=data, **uid)


def group(*below: Dataset) -> Dataset:
    return content("CONTAINER", "125007", *below)


def finding(meaning: str, *, concept: str = "121071") -> Dataset:
    return content("CODE", concept, ConceptCodeSequence=code("1", meaning))


def write_report(path: Path, *items: Dataset, kind: str = REPORT) -> Path:
    report = content("CONTAINER", "126000", *items)
    report.SOPClassUID, report.SOPInstanceUID = kind, "1.2.3.8"
    return save(report, path)


@pytest.fixture
def slide(tmp_path: Path) -> SlideFile:
    write_image(tmp_path / "slide")
    write_image(
        tmp_path / "slide", number=1, width=1000, height=750, mm=4 * MM, Rows=750, Columns=1000
    )
    return SlideFile(path=tmp_path / "slide", width=WIDTH, height=HEIGHT)


def read(path: Path, slide: SlideFile | None) -> tuple[list[Annotation], dict[str, int]]:
    where = {"slide_id": "s", "author": "ann", "width": WIDTH, "height": HEIGHT, "slide": slide}
    found, left_out = read_annotations(path, bounds_x0=9, bounds_y0=9, **where)
    return found, dict(left_out)


def test_what_highdicom_wrote_in_pixels(slide: SlideFile, tmp_path: Path) -> None:
    path = tmp_path / "slide.dcm"
    path.write_bytes(unpacked(TWO))
    found, left_out = read(path, slide)
    assert not left_out
    assert [(one.name, one.classification) for one in found] == [
        ("lesion 1", "Neoplasm"), ("lesion 2", "Neoplasm"), ("mitosis 1", "Mitosis"),
        ("gland", "Neoplasm"), ("round", "Neoplasm"), ("line", "Neoplasm"),
    ]  # fmt: skip
    shapes = [one.shape.geometry["coordinates"] for one in found]
    assert shapes[:2] == [[ring] for ring in POLYGONS]
    assert shapes[2] == [7.5, 8]
    ring = np.array(shapes[3][0])
    assert np.hypot((ring[:, 0] - 1200) / 200, (ring[:, 1] - 1000) / 100) == pytest.approx(1, 1e-3)
    ring = np.array(shapes[4][0])
    assert np.hypot(*(ring - 2000).T) == pytest.approx(100, abs=0.011)
    assert shapes[5] == [[1, 2], [3, 4]]
    assert [len(one.polygons) for one in read_objects(path, slide=slide)] == [1, 1, 0, 1, 1, 0]


def test_what_highdicom_wrote_in_millimetres(slide: SlideFile, tmp_path: Path) -> None:
    path = tmp_path / "slide.dcm"
    path.write_bytes(unpacked(THREE))
    found, left_out = read(path, slide)
    assert not left_out
    shapes = [one.shape.geometry["coordinates"] for one in found]
    for rings, expected in zip(shapes[:2], POLYGONS, strict=True):
        assert np.array(rings[0]) == pytest.approx(np.array(expected), abs=0.011)
    assert shapes[2] == pytest.approx([7.5, 8], abs=0.011)
    ring = np.array(shapes[3][0])
    assert np.hypot((ring[:, 0] - 1200) / 200, (ring[:, 1] - 1000) / 100) == pytest.approx(1, 1e-3)


def test_names_and_classes_come_from_the_nearest_container(
    slide: SlideFile, tmp_path: Path
) -> None:
    tracked = content("TEXT", "112039", TextValue="no. 7")
    length = content("NUM", "410668003", region([[1, 1], [2, 2]], kind="POLYLINE"))
    path = write_report(
        tmp_path / "a.dcm",
        finding("Outer"),
        group(finding("Tumour"), finding("Mass", concept="276214006"), tracked, region([1, 2])),
        group(finding("Mass", concept="276214006"), length),
        group(region([3, 4]), finding("")),
    )
    found, _ = read(path, slide)
    assert [(one.classification, one.name) for one in found] == [
        ("Tumour", "no. 7"), ("Mass", ""), ("Outer", ""),
    ]  # fmt: skip
    path = write_report(tmp_path / "a.dcm", region([1, 2], concept="99"), region([3, 4]))
    assert [one.classification for one in read(path, slide)[0]] == ["Of a concept", ""]


def test_kinds_of_regions(slide: SlideFile, tmp_path: Path) -> None:
    square = [[0, 0], [10, 0], [10, 10], [0, 0]]
    path = write_report(
        tmp_path / "a.dcm",
        region([[10, 20], [30, 40]], kind="MULTIPOINT"),
        region(square, kind="POLYLINE"),
        region(square[:3], kind="POLYLINE"),
        region([[1, 1], [2, 2], [1, 1], [1, 1]], kind="POLYLINE"),
        content("IMAGE", "121191", **{
            "ReferencedSOPSequence": image(5, kind=SEGMENTATION).ReferencedSOPSequence
        }),
        content("SCOORD3D", GraphicType="ELLIPSOID", GraphicData=[0.0] * 18),
    )  # fmt: skip
    found, left_out = read(path, slide)
    assert [one.shape.geometry["type"] for one in found] == ["MultiPoint", "Polygon", "LineString"]
    assert found[0].shape.geometry["coordinates"] == [[10, 20], [30, 40]]
    assert found[1].shape.geometry["coordinates"] == [square]
    assert left_out == {
        "areas that are segments of another file": 1,
        "ellipsoids": 1,
        "areas with fewer than three points": 1,
    }


def test_images_are_named_by_reference_and_scaled(slide: SlideFile, tmp_path: Path) -> None:
    """An item may be elsewhere in the report: numbers 1, 1, 2 are the second of the first."""
    library = content("CONTAINER", "111028", image(0), image(1))
    there = item(ReferencedContentItemIdentifier=[1, 1, 2])
    path = write_report(tmp_path / "a.dcm", library, group(region([10, 20], there)))
    assert [one.shape.geometry["coordinates"] for one in read(path, slide)[0]] == [[40, 80]]


@pytest.mark.filterwarnings("ignore:The value for the data element")
def test_an_outline_of_many_points_is_whole(slide: SlideFile, tmp_path: Path) -> None:
    """Values of more than 64 KiB have no length of their own kind in explicit files."""
    angle = np.linspace(0, 2 * np.pi, 20_001)
    ring = np.stack([1000 + 500 * np.cos(angle), 1000 + 500 * np.sin(angle)], axis=1)
    ring[-1] = ring[0]
    path = write_report(tmp_path / "a.dcm", region(ring, kind="POLYLINE"))
    found, _ = read(path, slide)
    assert found[0].shape.points == 20_001
    assert np.array(found[0].shape.geometry["coordinates"][0]) == pytest.approx(ring, abs=0.011)


def test_pixels_of_a_frame_are_placed_where_it_is_the_whole_image(
    slide: SlideFile, tmp_path: Path
) -> None:
    """Without a word on it, pixels are those of a frame (PS3.3 C.18.6)."""
    for origin in ("FRAME", None):
        values = {"PixelOriginInterpretation": origin}
        path = write_report(tmp_path / "a.dcm", region([10, 20], image(1), **values))
        assert [one.shape.geometry["coordinates"] for one in read(path, slide)[0]] == [[40, 80]]
        path = write_report(tmp_path / "a.dcm", region([10, 20], image(0), **values))
        with pytest.raises(ConfigError, match="single frames"):
            read(path, slide)


def test_a_report_about_several_slides_gives_each_its_own(slide: SlideFile, tmp_path: Path) -> None:
    path = write_report(
        tmp_path / "a.dcm", region([1, 2], image(7)), region([3, 4]),
        in_space([1, 1, 0], frame="1.9"), in_space([20.5, 40.25, 0]), kind=REPORT_3D,
    )  # fmt: skip
    found, left_out = read(path, slide)
    assert [one.shape.geometry["coordinates"] for one in found] == [[3, 4], [0.5, 0.5]]
    assert left_out == {"regions of other slides": 2}


def test_what_cannot_be_placed_is_refused(slide: SlideFile, tmp_path: Path) -> None:
    def refused(says: str, *items: Dataset, of: SlideFile | None = slide) -> None:
        path = write_report(tmp_path / "a.dcm", *items)
        with pytest.raises(ConfigError, match=says) as error:
            read_objects(path, slide=of)
        assert error.value.code == "annotations"
        assert "a.dcm" in error.value.message

    refused("not at hand", region([1, 2]), of=None)
    refused("none of this slide's", region([1, 2], image(7)))
    refused("none of this slide's", region([1, 2], content("TEXT", TextValue="no image")))
    refused("another slide", in_space([1, 1, 0], frame="1.9"))
    refused("another slide", in_space([1, 1, 0], frame=""))
    refused("has no regions", group(finding("Tumour")))
    refused("no regions but segments of other files", image(1, kind=SEGMENTATION))
    refused("unknown kind 'SPHERE'", region([1, 2], kind="SPHERE"))
    refused("POINT of it has 2 points", region([[1, 2], [3, 4]]))
    refused("ELLIPSE of it has 3 points", region([[1, 2], [3, 4], [5, 6]], kind="ELLIPSE"))
    refused("POLYLINE of it has 1 points", region([1, 2], kind="POLYLINE"))
    refused("cut off", region([1, 2, 3]))
    refused("cut off", region([]))
    refused("no position", region([1, float("nan")]))
    refused("damaged", region([1, 2], item(ReferencedContentItemIdentifier=[1, 9, 9])))
    refused("none of this", region([1, 2], item(ReferencedContentItemIdentifier=[1, 1, 1])))
    refused("names an item", region([1, 2], item(ReferencedContentItemIdentifier=[1, 0])))


def test_reports_are_bounded(
    slide: SlideFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(annotation_dicom, "MAX_ANNOTATIONS", 2)
    path = write_report(tmp_path / "a.dcm", *[region([1, 2])] * 2)
    assert len(read(path, slide)[0]) == 2
    path = write_report(tmp_path / "a.dcm", *[region([1, 2])] * 3)
    with pytest.raises(ConfigError, match="more than 2 regions"):
        read(path, slide)


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_refused(slide: SlideFile, tmp_path: Path) -> None:
    path = tmp_path / "a.dcm"
    rng = np.random.default_rng(0)
    for whole in (unpacked(TWO), unpacked(THREE)):
        for _ in range(30):
            data = bytearray(whole[: int(rng.integers(140, len(whole) + 1))])
            for at in rng.integers(132, len(data), 6):
                data[at] = rng.integers(256)
            path.write_bytes(data)
            with suppress(ConfigError):  # and nothing else
                read_objects(path, slide=slide)


def test_a_report_is_imported_on_the_slide_of_an_archive(slide: SlideFile, tmp_path: Path) -> None:
    path = tmp_path / "slide001.dcm"
    path.write_bytes(unpacked(TWO))
    _, classes = imported(slide, path)
    assert classes == ["Mitosis"] + ["Neoplasm"] * 5
