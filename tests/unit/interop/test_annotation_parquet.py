"""GeoParquet as geopandas writes it, and as nobody should."""

from __future__ import annotations

import json
import struct
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathflip.errors import ConfigError
from pathflip.interop import annotation_parquet
from pathflip.interop.annotation_files import read_annotations, read_objects
from pathflip.interop.annotation_parquet import read_wkb
from pathflip.interop.annotation_xml import NotAnnotations

WHERE: dict[str, Any] = {"slide_id": "s", "author": "ann", "width": 5000, "height": 4000}
SQUARE = [[10, 20], [110, 20], [110, 70], [10, 70], [10, 20]]
HOLE = [[30, 30], [40, 30], [40, 40], [30, 30]]


def wkb(geometry: dict[str, Any], *, order: str = "<", z: bool = False, srid: int = 0) -> bytes:
    """Write a geometry by the tables of OGC 06-103r4, 8.2 (and PostGIS's SRID)."""
    kinds = ["Point", "LineString", "Polygon", "MultiPoint", "MultiLineString", "MultiPolygon"]
    kind = kinds.index(geometry["type"]) + 1
    code = kind + 1000 * z | (0x20000000 if srid else 0)
    head = struct.pack(order + "BI", order == "<", code) + (
        struct.pack("<I", srid) if srid else b""
    )

    def points(line: list[list[float]]) -> bytes:
        return b"".join(struct.pack(order + "dd" + "d" * z, *at, *[7.0] * z) for at in line)

    found = geometry["coordinates"]
    if kind == 1:
        return head + points([found])
    if kind == 2:
        return head + struct.pack(order + "I", len(found)) + points(found)
    if kind == 3:
        rings = [struct.pack(order + "I", len(ring)) + points(ring) for ring in found]
        return head + struct.pack(order + "I", len(rings)) + b"".join(rings)
    parts = [wkb({"type": kinds[kind - 4], "coordinates": one}, order=order, z=z) for one in found]
    return head + struct.pack(order + "I", len(parts)) + b"".join(parts)


GEOMETRIES = [
    {"type": "Polygon", "coordinates": [SQUARE, HOLE]},
    {"type": "MultiPolygon", "coordinates": [[SQUARE], [HOLE]]},
    {"type": "Point", "coordinates": [1.5, 2.5]},
    {"type": "MultiPoint", "coordinates": [[1, 2], [3, 4]]},
    {"type": "LineString", "coordinates": [[1, 2], [3, 4]]},
    {"type": "MultiLineString", "coordinates": [[[1, 2], [3, 4]]]},
]


def write(
    folder: Path, columns: dict[str, Any], *, column: dict[str, Any] | None = None, geo: Any = None
) -> Path:
    """Write a table as ``GeoDataFrame.to_parquet`` does: metadata beside pandas' own."""
    if geo is None:
        geo = {
            "version": "1.1.0",
            "primary_column": "geometry",
            "columns": {
                "geometry": {"encoding": "WKB", "geometry_types": ["Polygon"], "crs": None}
                if column is None
                else column
            },
            "creator": {"library": "geopandas", "version": "1.1.1"},
        }
    table = pa.table(columns)
    metadata = {"geo": geo if isinstance(geo, str) else json.dumps(geo)} if geo else {}
    path = folder / "slide.parquet"
    pq.write_table(table.replace_schema_metadata(metadata), path)
    return path


@pytest.mark.parametrize(
    "how", [{}, {"order": ">"}, {"z": True}, {"srid": 4326}, {"order": ">", "srid": 1}]
)
def test_wkb_of_every_kind(how: dict[str, Any]) -> None:
    for geometry in GEOMETRIES:
        assert read_wkb(wkb(geometry, **how)) == geometry


@given(data=st.binary(max_size=120), at=st.integers(0, 80), byte=st.integers(0, 255))
def test_bytes_are_a_geometry_or_refused(data: bytes, at: int, byte: int) -> None:
    good = bytearray(wkb(GEOMETRIES[0]))
    good[at % len(good)] = byte
    for one in (data, bytes(good), bytes(good[: at + 1])):
        with suppress(NotAnnotations):
            read_wkb(one)


def test_a_table_becomes_annotations(tmp_path: Path) -> None:
    key = str(uuid.uuid4())
    path = write(
        tmp_path,
        {
            "geometry": [wkb(one) for one in GEOMETRIES] + [None],
            "Classification": ["Tumor", None, '{"name": "Stroma", "color": [1, 2, 3]}', *[""] * 4],
            "name": ["a", None, "c", "", "", "", ""],
            "id": [key, None, "not one", "", "", "", ""],
            "area": [1.0] * 7,
        },
    )  # fmt: skip
    found, left_out = read_annotations(path, bounds_x0=100, bounds_y0=50, **WHERE)
    assert left_out == {"rows without a geometry": 1}
    assert [one.shape.geometry for one in found] == GEOMETRIES
    assert [one.classification for one in found[:3]] == ["Tumor", "", "Stroma"]
    assert [one.name for one in found[:3]] == ["a", "", "c"]
    assert (found[0].annotation_id, found[2].colour) == (key, "#010203")
    assert len({one.annotation_id for one in found}) == 6
    objects = read_objects(path)
    assert [len(one.polygons) for one in objects] == [1, 2, 0, 0, 0, 0]
    assert len(objects[0].polygons[0][1]) == 1


def test_pixels_are_in_no_system_of_coordinates(tmp_path: Path) -> None:
    one = {"geometry": [wkb(GEOMETRIES[0])]}
    crs = {"encoding": "WKB", "crs": {"type": "GeographicCRS", "name": "WGS 84"}}
    with pytest.raises(ConfigError, match="'WGS 84'; pixels are in none"):
        read_objects(write(tmp_path, one, column=crs))
    with pytest.raises(ConfigError, match="'longitude and latitude'"):
        read_objects(write(tmp_path, one, column={"encoding": "WKB"}))


@pytest.mark.parametrize(
    ("geo", "says"),
    [
        ("", "without the metadata"),
        ("{", "without the metadata"),
        ("[" * 100_000, "without the metadata"),
        ({"primary_column": "geometry"}, "without the metadata"),
        ({"primary_column": "other", "columns": {"other": {"encoding": "WKB"}}}, "not there"),
        (
            {"primary_column": "geometry", "columns": {"geometry": {"encoding": "polygon"}}},
            "encoded as 'polygon'",
        ),
    ],
)
def test_what_is_no_geoparquet_is_named(tmp_path: Path, geo: Any, says: str) -> None:
    path = write(tmp_path, {"geometry": [wkb(GEOMETRIES[0])]}, geo=geo or "")
    with pytest.raises(ConfigError, match=r"slide\.parquet") as error:
        read_objects(path)
    assert says in error.value.message
    assert error.value.code == "annotations"


def test_hostile_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, {"geometry": [wkb(GEOMETRIES[0])] * 20})
    whole = path.read_bytes()
    for cut in (5, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:cut])
        with pytest.raises(ConfigError, match="no Parquet that can be read"):
            read_objects(path)
    path.write_bytes(whole)
    text = write(tmp_path, {"geometry": ["POINT (1 2)"]})
    with pytest.raises(ConfigError, match="not as WKB"):
        read_objects(text)
    path.write_bytes(whole)
    monkeypatch.setattr(annotation_parquet, "MAX_WKB_BYTES", 500)
    with pytest.raises(ConfigError, match="more than 0 MiB"):
        read_objects(path)
    monkeypatch.setattr(annotation_parquet, "MAX_ROWS", 19)
    with pytest.raises(ConfigError, match="more than 19 rows"):
        read_objects(path)
