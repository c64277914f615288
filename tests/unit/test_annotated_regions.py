"""Labels of regions: shares in closed form, at any resolution, and what has none."""

from __future__ import annotations

import uuid
from typing import Any

import pytest

from pathflip import Archive
from pathflip.annotated_regions import label_regions
from pathflip.archive.commit import Committer
from pathflip.errors import ConfigError
from pathflip.interop.annotations import Annotation, read_shape
from tests.archives import make_archive

REGION_UM = 256.0  # of the archives of tests
MPP = {"slide000": 0.5, "slide001": 0.25, "slide002": 0.2738}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    uri = make_archive(tmp_path_factory.mktemp("labels") / "a", slides=4, captions=False)
    with Committer(uri) as committer:
        committer.update_slides(
            {slide: {"mpp": mpp, "width": 40_000, "height": 30_000} for slide, mpp in MPP.items()}
        )
    return Archive(uri)


def drawn(slide: str, name: str, *rings: list[list[float]], um: bool = True) -> Annotation:
    """Return an area in regions of the slide's grid, as level-0 px."""
    scale = REGION_UM / MPP[slide] if um else 1
    scaled = [[[x * scale, y * scale] for x, y in ring] for ring in rings]
    return Annotation(
        annotation_id=str(uuid.uuid4()), slide_id=slide, author="ann", classification=name,
        shape=read_shape({"type": "Polygon", "coordinates": scaled}, width=None, height=None),
    )  # fmt: skip


def box(x0: float, y0: float, x1: float, y1: float) -> list[list[float]]:
    return [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]


def first(archive: Archive, slide: str) -> tuple[int, int]:
    row = archive.regions(slide, columns=["region_id", "rx", "ry"]).to_pylist()[0]
    return row["rx"], row["ry"]


def of(archive: Archive, *annotations: Annotation, **options: Any) -> Any:
    """Return the label of the first region of the first annotation's slide."""
    found = label_regions(archive, annotations, **options)
    at = first(archive, annotations[0].slide_id)
    [one] = [
        one for one in found if one.slide_id == annotations[0].slide_id and (one.rx, one.ry) == at
    ]
    return one


@pytest.mark.parametrize("slide", list(MPP))
def test_shares_are_those_of_the_areas(archive: Archive, slide: str) -> None:
    """Three quarters and a half of a region, less a hole of a sixteenth, whatever the mpp."""
    x, y = first(archive, slide)
    tumor = drawn(slide, "Tumor", box(x, y, x + 0.75, y + 1), box(x, y, x + 0.25, y + 0.25))
    stroma = drawn(slide, "Stroma", box(0, 0, x + 0.5, y + 5))
    one = of(archive, tumor, stroma)
    assert one.shares == pytest.approx({"Tumor": 0.75 - 1 / 16, "Stroma": 0.5}, abs=0.005)
    assert (one.label, one.share) == ("Tumor", pytest.approx(0.6875, abs=0.005))
    assert of(archive, tumor, stroma, min_share=0.7).label == ""
    assert of(archive, tumor, stroma, classes=["stroma"]).shares.keys() == {"stroma"}


def test_areas_of_a_class_that_overlap_count_once(archive: Archive) -> None:
    x, y = first(archive, "slide000")
    twice = [drawn("slide000", "T", box(x, y, x + 0.5, y + 1)) for _ in range(2)]
    assert of(archive, *twice).shares == {"T": pytest.approx(0.5, abs=0.005)}


def test_what_nobody_drew_on_has_no_label(archive: Archive) -> None:
    """Slides without an area of the classes have no rows; ignored classes do not count."""
    x, y = first(archive, "slide000")
    here = drawn("slide000", "Tumor", box(x, y, x + 1, y + 1))
    ignored = drawn("slide001", "Ignore*", box(0, 0, 9, 9))
    found = label_regions(archive, [here, ignored])
    assert {one.slide_id for one in found} == {"slide000"}
    assert len(found) == archive.regions("slide000").num_rows
    assert sum(one.label == "Tumor" for one in found) == 1
    assert {one.share for one in found if not one.label} <= {0.0}
    assert label_regions(archive, [ignored], classes=["Ignore*"])
    with pytest.raises(ConfigError, match="No area with a class was drawn") as error:
        label_regions(archive, [ignored])
    assert error.value.hint == "There are areas of: Ignore*."
    with pytest.raises(ConfigError, match="No area of these classes"):
        label_regions(archive, [here], classes=["Necrosis"])
    with pytest.raises(ConfigError, match="least share"):
        label_regions(archive, [here], min_share=0)


def test_annotations_of_slides_that_are_not_ready_are_passed(archive: Archive) -> None:
    x, y = first(archive, "slide000")
    here = drawn("slide000", "T", box(x, y, x + 1, y + 1))
    gone = Annotation(
        annotation_id=str(uuid.uuid4()), slide_id="gone", author="ann", classification="T",
        shape=here.shape,
    )  # fmt: skip
    assert {one.slide_id for one in label_regions(archive, [here, gone])} == {"slide000"}
