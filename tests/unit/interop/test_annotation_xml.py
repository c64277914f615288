"""XML of ASAP, Aperio ImageScope and HALO, as these tools write it, and as nobody should."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from pathflip.errors import ConfigError
from pathflip.interop import annotation_xml
from pathflip.interop.annotation_files import (
    read_annotations,
    read_objects,
    read_tissue,
)
from pathflip.interop.annotations import Annotation
from pathflip.slides.outlines import inside

ASAP = """<?xml version="1.0"?>
<ASAP_Annotations>
	<Annotations>
		<Annotation Name="Annotation 0" Type="Polygon" PartOfGroup="in situ" Color="#F4FA58">
			<Coordinates>
				<Coordinate Order="2" X="400.5" Y="300" />
				<Coordinate Order="0" X="100.25" Y="100" />
				<Coordinate Order="1" X="400.5" Y="100" />
				<Coordinate Order="3" X="100.25" Y="300" />
			</Coordinates>
		</Annotation>
		<Annotation Name="Annotation 1" Type="Spline" PartOfGroup="None" Color="#F4FA58">
			<Coordinates>
				<Coordinate Order="0" X="500" Y="100" />
				<Coordinate Order="1" X="600" Y="100" />
				<Coordinate Order="2" X="600" Y="200" />
			</Coordinates>
		</Annotation>
		<Annotation Name="Annotation 2" Type="Dot" PartOfGroup="Tumor" Color="#F4FA58">
			<Coordinates><Coordinate Order="0" X="7,5" Y="8" /></Coordinates>
		</Annotation>
		<Annotation Name="Annotation 3" Type="PointSet" PartOfGroup="Tumor" Color="#F4FA58">
			<Coordinates>
				<Coordinate Order="0" X="1" Y="2" /><Coordinate Order="1" X="3" Y="4" />
			</Coordinates>
		</Annotation>
		<Annotation Name="Annotation 4" Type="Measurement" PartOfGroup="None" Color="#F4FA58">
			<Coordinates>
				<Coordinate Order="0" X="1" Y="2" /><Coordinate Order="1" X="3" Y="4" />
			</Coordinates>
		</Annotation>
		<Annotation Name="Annotation 5" Type="Polygon" PartOfGroup="Tumor" Color="#F4FA58">
			<Coordinates><Coordinate Order="0" X="1" Y="2" /></Coordinates>
		</Annotation>
	</Annotations>
	<AnnotationGroups>
		<Group Name="Tumor" PartOfGroup="None" Color="#ff0000"><Attributes /></Group>
		<Group Name="in situ" PartOfGroup="Tumor" Color="#00ff00"><Attributes /></Group>
	</AnnotationGroups>
</ASAP_Annotations>
"""

# Both slides of these files have level-0 pixels; the colour is 0x00BBGGRR, here red 255, green 128.
APERIO = """<Annotations MicronsPerPixel="0.252100">
  <Annotation Id="1" Name="" ReadOnly="0" NameReadOnly="0" LineColorReadOnly="0" Incremental="0"
      Type="4" LineColor="33023" Visible="1" Selected="1" MarkupImagePath="" MacroName="">
    <Attributes><Attribute Name="Description" Id="0" Value="Tumor"/></Attributes>
    <Regions>
      <RegionAttributeHeaders>
        <AttributeHeader Id="9999" Name="Region" ColumnWidth="-1"/>
        <AttributeHeader Id="1" Name="Description" ColumnWidth="-1"/>
      </RegionAttributeHeaders>
      <Region Id="1" Type="0" Zoom="0.042148" Selected="0" ImageLocation="" ImageFocus="-1"
          Length="1600.0" Area="160000.0" LengthMicrons="403.4" AreaMicrons="10168.7" Text="first"
          NegativeROA="0" InputRegionId="0" Analyze="1" DisplayId="1">
        <Attributes/>
        <Vertices>
          <Vertex X="1000" Y="1000" Z="0"/><Vertex X="1400" Y="1000" Z="0"/>
          <Vertex X="1400" Y="1400" Z="0"/><Vertex X="1000" Y="1400" Z="0"/>
        </Vertices>
      </Region>
      <Region Id="2" Type="0" Text="" NegativeROA="1" InputRegionId="1" Analyze="0" DisplayId="2">
        <Attributes/>
        <Vertices>
          <Vertex X="1100" Y="1100" Z="0"/><Vertex X="1200" Y="1100" Z="0"/>
          <Vertex X="1200" Y="1200" Z="0"/><Vertex X="1100" Y="1200" Z="0"/>
        </Vertices>
      </Region>
      <Region Id="3" Type="1" Text="" NegativeROA="0" DisplayId="3">
        <Vertices>
          <Vertex X="2000" Y="1000" Z="0"/><Vertex X="2100" Y="1000" Z="0"/>
          <Vertex X="2100" Y="1300" Z="0"/><Vertex X="2000" Y="1300" Z="0"/>
        </Vertices>
      </Region>
      <Region Id="4" Type="2" Text="" NegativeROA="0" DisplayId="4">
        <Vertices><Vertex X="3000" Y="1000" Z="0"/><Vertex X="3400" Y="1200" Z="0"/></Vertices>
      </Region>
      <Region Id="5" Type="4" Text="" NegativeROA="0" DisplayId="5">
        <Vertices><Vertex X="0" Y="0" Z="0"/><Vertex X="30" Y="40" Z="0"/></Vertices>
      </Region>
      <Region Id="6" Type="0" Text="" NegativeROA="1" DisplayId="6">
        <Vertices>
          <Vertex X="10" Y="10"/><Vertex X="20" Y="10"/><Vertex X="20" Y="20"/>
        </Vertices>
      </Region>
      <Region Id="7" Type="0" Text="" NegativeROA="0" DisplayId="7">
        <Vertices><Vertex X="10" Y="10"/></Vertices>
      </Region>
    </Regions>
    <Plots/>
  </Annotation>
</Annotations>
"""

HALO = """<Annotations>
  <Annotation LineColor="5634047" Name="Layer 1" Visible="True">
    <Regions>
      <Region Type="Rectangle" HasEndcaps="0" NegativeROA="0">
        <Vertices><V X="1000" Y="2000" /><V X="1400" Y="1000" /></Vertices>
        <Comments>
          <Comment Author="&lt;no user&gt;" Body="a box" CreatedTime="2024-03-20T17:02:03.8223080Z"
            ModifiedTime="2024-03-20T17:02:03.8223080Z" />
        </Comments>
      </Region>
      <Region Type="Ellipse" HasEndcaps="0" NegativeROA="1">
        <Vertices><V X="1100" Y="1100" /><V X="1300" Y="1300" /></Vertices>
      </Region>
      <Region Type="Ruler" HasEndcaps="1" NegativeROA="0">
        <Vertices><V X="0" Y="0" /><V X="30" Y="40" /></Vertices>
      </Region>
      <Region Type="Pin" HasEndcaps="0" NegativeROA="0">
        <Vertices><V X="5" Y="6" /></Vertices>
      </Region>
    </Regions>
  </Annotation>
  <Annotation LineColor="65280" Name="Necrosis" Visible="False">
    <Regions>
      <Region Type="Polygon" HasEndcaps="0" NegativeROA="0">
        <Vertices>
          <V X="100" Y="100" /><V X="200" Y="100" /><V X="200" Y="200" /><V X="100" Y="100" />
        </Vertices>
      </Region>
    </Regions>
  </Annotation>
</Annotations>
"""


def write(folder: Path, text: str | bytes, name: str = "slide.xml") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def read(path: Path) -> list[Annotation]:
    where = {"width": 5000, "height": 4000, "bounds_x0": 100, "bounds_y0": 50}
    return read_annotations(path, slide_id="s", author="ann", **where)[0]


def test_asap(tmp_path: Path) -> None:
    """Groups are classes, nested ones too; order is by Order; bounds do not move anything."""
    path = write(tmp_path, ASAP)
    found, left_out = read_annotations(path, slide_id="s", author="ann", width=5000, height=4000)
    assert left_out == {"areas with fewer than three points": 1}
    assert [one.classification for one in found] == ["Tumor: in situ", "", "Tumor", "Tumor", ""]
    assert [one.colour for one in found] == ["#00ff00", "#f4fa58", "#ff0000", "#ff0000", "#f4fa58"]
    assert [one.name for one in found] == [f"Annotation {n}" for n in range(5)]
    assert [one.shape.geometry for one in found] == [
        {
            "type": "Polygon",
            "coordinates": [
                [[100.25, 100], [400.5, 100], [400.5, 300], [100.25, 300], [100.25, 100]],
            ],
        },
        {"type": "Polygon", "coordinates": [[[500, 100], [600, 100], [600, 200], [500, 100]]]},
        {"type": "Point", "coordinates": [7.5, 8]},
        {"type": "MultiPoint", "coordinates": [[1, 2], [3, 4]]},
        {"type": "LineString", "coordinates": [[1, 2], [3, 4]]},
    ]  # fmt: skip
    assert read(path) == found, "QuPath's corner of the bounds is not ASAP's"


def test_imagescope(tmp_path: Path) -> None:
    """Layers are classes, by their description; negative regions are holes of what they overlap."""
    path = write(tmp_path, APERIO)
    found, left_out = read_annotations(path, slide_id="s", author="ann", width=5000, height=4000)
    assert left_out == {
        "areas with fewer than three points": 1,
        "negative regions outside the others of their layer": 1,
    }
    area, box, ellipse, ruler = found
    assert (area.name, area.classification, area.colour) == ("first", "Tumor", "#ff8000")
    assert [len(ring) for ring in area.shape.geometry["coordinates"]] == [5, 5]
    assert (box.shape.x0, box.shape.y0, box.shape.x1, box.shape.y1) == (2000, 1000, 2100, 1300)
    assert ruler.shape.geometry == {"type": "LineString", "coordinates": [[0, 0], [30, 40]]}
    # Area of an ellipse: pi a b; its corners are outside, its centre inside.
    ring = np.array(ellipse.shape.geometry["coordinates"][0])
    x, y = (ring - ring[0]).T
    assert abs(x[:-1] @ y[1:] - x[1:] @ y[:-1]) / 2 == pytest.approx(math.pi * 200 * 100, rel=0.005)
    assert np.hypot((ring[:, 0] - 3200) / 200, (ring[:, 1] - 1100) / 100) == pytest.approx(1, 1e-3)


def test_halo(tmp_path: Path) -> None:
    """Types are words; a box is two corners in any order, an elliptic hole is one of it."""
    found = read(write(tmp_path, HALO, "slide.annotations"))
    assert [one.classification for one in found] == ["Layer 1"] * 3 + ["Necrosis"]
    assert [one.shape.geometry["type"] for one in found] == [
        "Polygon", "LineString", "Point", "Polygon",
    ]  # fmt: skip
    assert found[0].colour == "#fff755"  # 5634047 is 0x55F7FF: blue 55, green f7, red ff
    (objects, *_) = read_objects(tmp_path / "slide.annotations")
    points = [(1050, 1050), (1200, 1200), (1101, 1101), (1399, 1999), (1200, 2001)]
    assert inside(points, objects.polygons).tolist() == [True, False, True, True, False]


def test_importing_again_gives_the_same_ids(tmp_path: Path) -> None:
    one, other = (read(write(tmp_path, ASAP)) for _ in range(2))
    assert one == other
    assert len({found.annotation_id for found in one}) == 5


def test_a_hole_cuts_every_area_of_its_layer_that_it_overlaps(tmp_path: Path) -> None:
    """A bar across two areas, whose points lie in neither, cuts both, and not the next layer."""

    def region(x0: float, y0: float, x1: float, y1: float, negative: int = 0) -> str:
        return (
            f'<Region Type="1" NegativeROA="{negative}"><Vertices><Vertex X="{x0}" Y="{y0}"/>'
            f'<Vertex X="{x1}" Y="{y1}"/></Vertices></Region>'
        )

    first = region(0, 40, 400, 60, 1) + region(10, 0, 110, 100) + region(200, 0, 300, 100)
    layers = [first + region(500, 0, 600, 100), region(10, 0, 110, 100)]
    text = "".join(f'<Annotation Name="{n}"><Regions>{r}</Regions></Annotation>'
                   for n, r in enumerate(layers))  # fmt: skip
    path = write(tmp_path, f"<Annotations>{text}</Annotations>")
    objects = read_objects(path)
    assert [len(one.polygons[0][1]) for one in objects] == [1, 1, 0, 0]
    middles = [(one.polygons[0][0][0][0] + 50, 50) for one in objects]
    held = [inside([at], one.polygons).item() for at, one in zip(middles, objects, strict=True)]
    assert held == [False, False, True, True]


def test_areas_are_tissue(tmp_path: Path) -> None:
    """The mask holds what the areas hold, less their holes: 400 x 400 - 100 x 100 px at 0.25 µm."""
    path = write(tmp_path, APERIO)
    mask = read_tissue(path, width=5000, height=4000, slide_mpp=0.25, mpp=1.0)
    expected = 400 * 400 - 100 * 100 + 100 * 300 + math.pi * 200 * 100
    assert mask.area_mm2 == pytest.approx(expected * 0.25**2 / 1e6, rel=0.01)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_files_in_other_encodings(tmp_path: Path, encoding: str) -> None:
    text = ASAP.replace("Tumor", "Tumör").replace(
        '"1.0"?', f'"1.0" encoding="{encoding.removesuffix("-sig")}"?'
    )
    found = read(write(tmp_path, text.encode(encoding)))
    assert found[0].classification == "Tumör: in situ"


BOMB = """<?xml version="1.0"?><!DOCTYPE a [<!ENTITY a "aaaaaaaaaa">
<!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">]><Annotations>&b;</Annotations>"""
OUTSIDE = """<?xml version="1.0"?><!DOCTYPE a SYSTEM "file:///etc/passwd">
<Annotations/>"""
ONE = """<Annotations><Annotation><Regions><Region Type="0"><Vertices>{}</Vertices></Region>
</Regions></Annotation></Annotations>"""


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (BOMB, "declares a document type"),
        (OUTSIDE, "declares a document type"),
        ("<html><body/></html>", "root element is 'html'"),
        ("<Annotations><Annotation>", "no well-formed XML"),
        ("<Annotations>&nothing;</Annotations>", "no well-formed XML"),
        ("<Annotations>" + "<a>" * 40, "nested more than 32"),
        ("<Annotations><Region/></Annotations>", "in no Annotation"),
        ("<Annotations><Vertex X='1' Y='1'/></Annotations>", "in no Region"),
        (ONE.format("<V X='1e' Y='2'/>"), "X='1e', which is no number"),
        (ONE.format("<V X='nan' Y='2'/>"), "no position"),
        (ONE.format("<V X='1e999' Y='2'/>"), "no position"),
        (ONE.format("<V X='" + "1" * 5000 + "' Y='2'/>"), "no number"),
        (ONE.format("<V Y='2'/>"), "X='', which is no number"),
        (ONE.replace('"0"', '"9"').format(""), "unknown type '9'"),
        (ASAP.replace('"Tumor" PartOfGroup="None"', '"Tumor" PartOfGroup="in situ"'), "of itself"),
        (ASAP.replace("PointSet", "Sphere"), "unknown type 'Sphere'"),
    ],
)  # fmt: skip
def test_what_is_no_annotations_is_named(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=r"slide\.xml") as caught:
        read_objects(write(tmp_path, text))
    assert says in caught.value.message
    assert caught.value.hint
    assert caught.value.code == "annotations"


def test_what_is_off_the_slide_is_refused_by_its_number(tmp_path: Path) -> None:
    path = write(tmp_path, HALO.replace('"100"', '"-27865"'))
    with pytest.raises(ConfigError, match="Feature 4: It lies beyond the slide of 5,000 x 4,000"):
        read(path)


def test_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(annotation_xml, "MAX_XML_POINTS", 8)
    with pytest.raises(ConfigError, match="more than 8 points"):
        read_objects(write(tmp_path, ASAP))
    monkeypatch.setattr(annotation_xml, "MAX_XML_POINTS", 8000)
    monkeypatch.setattr(annotation_xml, "MAX_XML_OBJECTS", 3)
    with pytest.raises(ConfigError, match="more than 3 annotations"):
        read_objects(write(tmp_path, APERIO))
    monkeypatch.setattr(annotation_xml, "MAX_XML_BYTES", 100)
    with pytest.raises(ConfigError, match="larger than"):
        read_objects(write(tmp_path, HALO))


def test_work_for_holes_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Squares in the corner of angles: their boxes overlap, they do not."""
    angle = [(0, 0), (100, 0), (100, 1), (1, 1), (1, 100), (0, 100)]
    square = [(50, 50), (90, 50), (90, 90), (50, 90)]

    def region(ring: list[tuple[int, int]], negative: int) -> str:
        points = "".join(f'<V X="{x}" Y="{y}"/>' for x, y in ring)
        return f'<Region NegativeROA="{negative}"><Vertices>{points}</Vertices></Region>'

    regions = (region(angle, 0) + region(square, 1)) * 20
    text = f"<Annotations><Annotation><Regions>{regions}</Regions></Annotation></Annotations>"
    path = write(tmp_path, text)
    assert [len(one.polygons[0][1]) for one in read_objects(path)] == [0] * 20
    for name, value in (("_MAX_TESTS", 399), ("_MAX_TEST_WORK", 5000)):
        with monkeypatch.context() as patch:
            patch.setattr(annotation_xml, name, value)
            with pytest.raises(ConfigError, match="too many of its negative regions"):
                read_objects(path)
    inner = path.read_text().replace('"50"', '"0"').replace('"90"', '"1"')
    with monkeypatch.context() as patch:
        patch.setattr(annotation_xml, "MAX_XML_HOLES", 399)
        with pytest.raises(ConfigError, match="more than 399 holes"):
            read_objects(write(tmp_path, inner))
