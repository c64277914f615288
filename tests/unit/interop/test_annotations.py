"""Annotations as GeoJSON: what QuPath writes comes back as it was, anything else is refused."""

from __future__ import annotations

import json
import math
import uuid
import zipfile
from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathflip.errors import ConfigError
from pathflip.interop import annotation_files, qupath
from pathflip.interop.annotations import (
    MAX_POINTS,
    Annotation,
    collection_of,
    feature_of,
    own_id,
    read_collection,
    read_feature,
    read_shape,
)

WIDTH, HEIGHT = 50_000, 30_000
WHERE = {"slide_id": "s", "author": "ann", "width": WIDTH, "height": HEIGHT}

hundredths = st.integers(-50_000, 100 * HEIGHT).map(lambda value: value / 100)
position = st.tuples(hundredths, hundredths).map(list)
line = st.lists(position, min_size=2, max_size=8)


@st.composite
def ring(draw):
    """A closed ring of at least three points."""
    points = draw(st.lists(position, min_size=3, max_size=9))
    return [*points, points[0]]


polygon = st.lists(ring(), min_size=1, max_size=3)  # an outline and holes
geometry = st.one_of(
    st.builds(lambda c: {"type": "Point", "coordinates": c}, position),
    st.builds(
        lambda c: {"type": "MultiPoint", "coordinates": c},
        st.lists(position, min_size=1, max_size=5),
    ),
    st.builds(lambda c: {"type": "LineString", "coordinates": c}, line),
    st.builds(
        lambda c: {"type": "MultiLineString", "coordinates": c},
        st.lists(line, min_size=1, max_size=3),
    ),
    st.builds(lambda c: {"type": "Polygon", "coordinates": c}, polygon),
    st.builds(
        lambda c: {"type": "MultiPolygon", "coordinates": c},
        st.lists(polygon, min_size=1, max_size=3),
    ),
)
text = st.text(
    st.characters(exclude_categories=("Cc", "Cs", "Zs", "Zl", "Zp"), max_codepoint=0x2FF),
    max_size=20,
)
colour = st.none() | st.lists(st.integers(0, 255), min_size=3, max_size=3)


def flat(value) -> list[list[float]]:
    """All positions within coordinates, by another way than the code's."""
    if not value or not isinstance(value[0], list):
        return [value]
    return [one for part in value for one in flat(part)]


@given(geometry=geometry, name=text, label=text, colour=colour)
def test_what_is_written_reads_as_it_was(geometry, name, label, colour):
    """Through JSON text, and with the numbers of points and bounds that NumPy finds."""
    given = {
        "type": "Feature",
        "id": str(uuid.uuid4()),
        "geometry": geometry,
        "properties": {
            "objectType": "annotation", "name": name,
            "classification": {"name": label, "color": colour} if colour else {"name": label},
        },
    }  # fmt: skip
    one = read_feature(json.loads(json.dumps(given)), **WHERE)
    assert one.shape.geometry == geometry
    points = np.array(flat(geometry["coordinates"]))
    assert one.shape.points == len(points)
    assert (one.shape.x0, one.shape.y0) == tuple(points.min(axis=0))
    assert (one.shape.x1, one.shape.y1) == tuple(points.max(axis=0))
    written = json.loads(json.dumps(feature_of(one)))
    again = read_feature(written, **WHERE)
    assert again == one
    assert written["geometry"] == geometry
    assert written["id"] == given["id"]


@given(geometry=geometry, offset=st.tuples(hundredths, hundredths))
def test_an_offset_goes_in_as_it_comes_out(geometry, offset):
    inner = tuple(abs(value) / 100 for value in offset)
    inner = tuple(round(value, 2) for value in inner)
    shape = read_shape(geometry, width=None, height=None, offset=inner)
    one = Annotation(annotation_id="", slide_id="s", author="a", shape=shape)
    back = feature_of(one, offset=inner)["geometry"]
    assert back["type"] == geometry["type"]
    np.testing.assert_allclose(flat(back["coordinates"]), flat(geometry["coordinates"]), atol=0.011)


@given(polygons=st.lists(polygon, min_size=1, max_size=3))
def test_areas_are_those_that_the_reader_of_tissue_finds(polygons, tmp_path_factory):
    geometry = {"type": "MultiPolygon", "coordinates": polygons}
    one = Annotation(
        annotation_id=str(uuid.uuid4()), slide_id="s", author="a",
        shape=read_shape(geometry, width=WIDTH, height=HEIGHT),
    )  # fmt: skip
    file = tmp_path_factory.mktemp("areas") / "a.geojson"
    qupath.write_annotations(file, [one], bounds_x0=100, bounds_y0=50)
    [read] = annotation_files.read_objects(file, bounds_x0=100, bounds_y0=50)
    assert len(read.polygons) == len(polygons)
    for (outer, holes), rings in zip(read.polygons, polygons, strict=True):
        np.testing.assert_allclose(outer, rings[0][:-1], atol=0.011)
        assert len(holes) == len(rings) - 1


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=9)
    | st.sampled_from(["Feature", "FeatureCollection", "Polygon", "Point", "annotation"]),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(
        st.sampled_from(
            ["type", "id", "geometry", "coordinates", "properties", "name", "classification",
             "names", "color", "features", "revision", "geometries"]
        ),
        inner, max_size=6,
    ),
    max_leaves=20,
)  # fmt: skip


@given(document=json_values)
def test_any_json_is_read_or_refused_in_a_sentence(document):
    refused, found = None, []
    try:
        found = read_collection(document, **WHERE)
    except ConfigError as error:
        refused = error
    if refused is not None:
        assert refused.code == "geojson"
        assert refused.message.endswith(".")
        assert len(str(refused)) < 400
    for one in found:
        assert one.shape.points > 0
        assert json.loads(json.dumps(feature_of(one), allow_nan=False))


def test_files_of_qupath_old_and_new_are_read():
    """Classes and colours as its versions wrote them; a nucleus, a plane, measurements."""
    point = {"type": "Point", "coordinates": [1, 2], "plane": {"c": -1, "z": 0, "t": 0}}
    for classification, name, colour in (
        ({"name": "Tumor", "color": [200, 0, 10]}, "Tumor", "#c8000a"),
        ({"name": "Tumor", "colorRGB": -3670006}, "Tumor", "#c8000a"),
        ({"names": ["Tumor", "Positive"], "color": [1, 2, 3]}, "Tumor: Positive", "#010203"),
        ('{"name": "Stroma", "colorRGB": -6895466}', "Stroma", "#96c896"),
        ("Stroma", "Stroma", None),
        (None, "", None),
    ):
        feature = {
            "type": "Feature", "id": "PathAnnotationObject", "geometry": point,
            "nucleusGeometry": point,
            "properties": {
                "objectType": "cell", "classification": classification, "isLocked": True,
                "measurements": {"Area": 1.5}, "metadata": {"a": "b"},
            },
        }  # fmt: skip
        [one] = read_collection({"type": "FeatureCollection", "features": [feature]}, **WHERE)
        assert (one.classification, one.colour, one.object_type) == (name, colour, "cell")
        assert uuid.UUID(one.annotation_id)


def test_rings_are_closed_third_coordinates_dropped_and_hundredths_kept():
    open_ring = [[0.004, 0, 7], [10.126, 0, 7], [10, 10, 7]]
    shape = read_shape({"type": "Polygon", "coordinates": [open_ring]}, width=100, height=100)
    assert shape.geometry["coordinates"] == [[[0, 0], [10.13, 0], [10, 10], [0, 0]]]
    assert math.copysign(1, shape.geometry["coordinates"][0][0][1]) == 1
    minus = read_shape({"type": "Point", "coordinates": [-0.001, -0.0]}, width=9, height=9)
    assert json.dumps(minus.geometry["coordinates"]) == "[0.0, 0.0]"


def test_a_collection_of_shapes_is_refused_with_what_to_do():
    geometry = {"type": "GeometryCollection", "geometries": []}
    with pytest.raises(ConfigError, match="GeometryCollection") as error:
        read_shape(geometry, width=None, height=None)
    assert "QuPath" in error.value.hint


@pytest.mark.parametrize("side", [None, 900, 90_000])
def test_objects_may_reach_a_little_beyond_the_slide(side):
    reach = 2.0**40 if side is None else side + max(1000, side / 10)
    least = -1000.0 if side is None else -max(1000, side / 10)
    for at in (least, reach):
        read_shape({"type": "Point", "coordinates": [at, 0]}, width=side, height=side)
    for at in (least - 1, reach + 1, 1e300, -1e300):
        with pytest.raises(ConfigError, match="beyond the slide"):
            read_shape({"type": "Point", "coordinates": [at, 0]}, width=side, height=side)


def test_points_are_counted_over_all_features():
    half = {"type": "MultiPoint", "coordinates": [[1, 1]] * (MAX_POINTS // 2)}
    features = [{"type": "Feature", "geometry": half}] * 2
    assert len(read_collection(features, **WHERE)) == 2
    with pytest.raises(ConfigError, match="Feature 3: There are more than 100,000 points"):
        read_collection([*features, features[0]], **WHERE)


def test_features_without_an_id_get_the_same_one_each_time_and_twins_one_each():
    feature = {"type": "Feature", "geometry": {"type": "Point", "coordinates": [1, 2]}}
    other = {"type": "Feature", "geometry": {"type": "Point", "coordinates": [1, 3]}}
    first = [one.annotation_id for one in read_collection([feature, feature, other], **WHERE)]
    again = [one.annotation_id for one in read_collection([feature, feature, other], **WHERE)]
    assert first == again
    assert len(set(first)) == 3
    bob = read_collection([feature], **(WHERE | {"author": "bob"}))
    assert bob[0].annotation_id not in first
    copies = [own_id(first[0], by, on) for by in ("bob", "eve") for on in ("a", "b")]
    assert len(set(copies)) == 4
    assert own_id(first[0], "bob", "a") == copies[0]


def test_an_id_that_is_there_twice_is_refused():
    key = str(uuid.uuid4())
    feature = {"type": "Feature", "id": key, "geometry": {"type": "Point", "coordinates": [1, 2]}}
    with pytest.raises(ConfigError, match="is there twice"):
        read_collection([feature, feature | {"id": key.upper()}], **WHERE)


def test_times_and_revision_are_written():
    at = datetime(2026, 1, 2, 3, 4, 5, 6000, UTC)
    shape = read_shape({"type": "Point", "coordinates": [1, 2]}, width=9, height=9)
    one = Annotation(
        annotation_id="x", slide_id="s", author="ann", shape=shape, revision=3, created=at,
        updated=at,
    )  # fmt: skip
    [written] = collection_of([one])["features"]
    assert written["properties"] == {
        "objectType": "annotation", "author": "ann", "revision": 3,
        "created": "2026-01-02T03:04:05.006+00:00", "updated": "2026-01-02T03:04:05.006+00:00",
    }  # fmt: skip


def test_files_and_zips_are_read_and_faults_name_the_file(tmp_path):
    feature = {"type": "Feature", "geometry": {"type": "Point", "coordinates": [1, 2]}}
    document = json.dumps({"type": "FeatureCollection", "features": [feature]})
    plain, packed, bare = (tmp_path / name for name in ("a.geojson", "b.zip", "c.geojson"))
    plain.write_text("\ufeff" + document)
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("a.geojson", document)
    bare.write_text(json.dumps(feature["geometry"]))
    for file in (plain, packed, bare):
        [one], _ = annotation_files.read_annotations(file, **WHERE)
        assert one.shape.geometry["coordinates"] == [1, 2]
    for content in (b"", b"{", b"[1]", b"\xff\xfe", b"PK\x03\x04", b'{"type":"Feature"}'):
        plain.write_bytes(content)
        with pytest.raises(ConfigError) as error:
            annotation_files.read_annotations(plain, **WHERE)
        assert error.value.code == "geojson"
        assert str(plain) in error.value.message
    with pytest.raises(ConfigError, match="cannot be read"):
        annotation_files.read_annotations(tmp_path / "none", **WHERE)
