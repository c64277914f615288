"""GeoParquet: tables of geometries, such as geopandas and SpatialData write, as GeoJSON features.

Read by the specification of GeoParquet 1.0 and 1.1: the key ``geo`` of the file's metadata names
the column of geometries, its encoding, which has to be WKB, and the system of its coordinates.
Pixels are in none (``crs`` is null); a column that names one, or says nothing, which means degrees
of longitude and latitude, cannot be placed on a slide and is refused.

Of the other columns, those called ``classification`` (or ``class``, ``class_name``, ``label``),
``name``, ``id``, ``objectType`` and ``color`` are read, in any case of letters.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pathflip.interop.annotation_xml import NotAnnotations

MAX_ROWS = 500_000
"""Geometries of one file."""
MAX_WKB_BYTES = 256 << 20
"""Bytes of all geometries of one file."""

_BATCH = 1024  # rows that are in memory at once
_COLUMNS = {
    "classification": ("classification", "class", "class_name", "label"),
    "name": ("name",),
    "id": ("id",),
    "objectType": ("objecttype", "object_type"),
    "color": ("color", "colour"),
}
_KINDS = {
    1: "Point", 2: "LineString", 3: "Polygon", 4: "MultiPoint", 5: "MultiLineString",
    6: "MultiPolygon",
}  # fmt: skip
_PARTS = {4: 1, 5: 2, 6: 3}
"""{number of a collection's kind: number of its parts' kind}."""


def read_parquet(path: Path) -> tuple[str, list[dict[str, Any]], Counter[str]]:
    """Read the objects of a GeoParquet file.

    Args:
        path: The file.

    Returns:
        Name of the format, GeoJSON features in level-0 px, and how many objects were left out, by
        reason.

    Raises:
        NotAnnotations: It is no GeoParquet, or what it holds cannot be placed.
    """
    try:
        with pq.ParquetFile(path) as file:
            return _read(file)
    except (pa.ArrowException, struct.error, UnicodeDecodeError) as error:
        raise NotAnnotations(f"it is no Parquet that can be read ({error})") from error


def _read(file: pq.ParquetFile) -> tuple[str, list[dict[str, Any]], Counter[str]]:
    geometry = _geometry_column(file.schema_arrow)
    if file.metadata.num_rows > MAX_ROWS:
        raise NotAnnotations(f"it has more than {MAX_ROWS:,} rows")
    names = {name.lower(): name for name in file.schema_arrow.names if name != geometry}
    found = {key: next((names[n] for n in of if n in names), None) for key, of in _COLUMNS.items()}
    columns = [geometry, *(name for name in found.values() if name is not None)]
    features, left_out, held = list[dict[str, Any]](), Counter[str](), 0
    for batch in file.iter_batches(batch_size=_BATCH, columns=columns):
        for row in batch.to_pylist():
            data = row[geometry]
            if not data:
                left_out["rows without a geometry"] += 1
                continue
            held += len(data)
            if held > MAX_WKB_BYTES or len(features) >= MAX_ROWS:
                raise NotAnnotations(f"its geometries have more than {MAX_WKB_BYTES >> 20} MiB")
            shape = read_wkb(data)
            if shape is None:
                left_out["empty geometries"] += 1
                continue
            values = {key: row[name] for key, name in found.items() if name is not None}
            features.append(_feature(shape, values))
    return "GeoParquet", features, left_out


def _geometry_column(schema: pa.Schema) -> str:
    """Return the name of the column of geometries, if they are pixels in WKB."""
    try:
        geo = json.loads((schema.metadata or {})[b"geo"])
        name = geo["primary_column"]
        column = geo["columns"][name]
        encoding, known, crs = column["encoding"], "crs" in column, column.get("crs")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise NotAnnotations("it is Parquet without the metadata of GeoParquet") from error
    if not isinstance(name, str) or name not in schema.names:
        raise NotAnnotations("the column of geometries that it names is not there")
    kind = schema.field(name).type
    if encoding != "WKB" or not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise NotAnnotations(f"its geometries are encoded as {str(encoding)[:60]!r}, not as WKB")
    if not known or crs is not None:
        what = crs.get("name", "another") if isinstance(crs, dict) else "longitude and latitude"
        raise NotAnnotations(
            f"its coordinates are of the system {str(what)[:60]!r}; pixels are in none (crs null)"
        )
    return name


def _feature(shape: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    label, name = values.get("classification"), values.get("name")
    properties: dict[str, Any] = {"objectType": values.get("objectType") or "annotation"}
    if label is not None:
        properties["classification"] = label if isinstance(label, str | dict) else str(label)
    if name is not None:
        properties["name"] = str(name)
    if values.get("color") is not None:
        properties["color"] = values["color"]
    return {
        "type": "Feature",
        "id": values.get("id"),
        "geometry": shape,
        "properties": properties,
    }


def read_wkb(data: bytes) -> dict[str, Any] | None:
    """Read one geometry of well-known binary, as GeoJSON; None if it is empty.

    Takes ISO WKB and the extended one of PostGIS; heights and measures are dropped.

    Raises:
        NotAnnotations: It is none of the kinds read here, or is cut off.
    """
    reader = _Wkb(data)
    kind, coordinates = reader.geometry()
    if reader.at != len(data):
        raise NotAnnotations("a geometry of it has bytes left over")
    return {"type": _KINDS[kind], "coordinates": coordinates} if coordinates else None


class _Wkb:
    """Reads well-known binary from its beginning on.

    Args:
        data: The bytes.
    """

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def geometry(self, *, only: int | None = None) -> tuple[int, Any]:
        """Read a geometry, of one kind ``only`` within a collection."""
        order = "<" if self._take("<B", 1)[0] == 1 else ">"
        code = self._take(order + "I", 4)[0]
        extended, code = code >> 29, code & 0x1FFFFFFF
        if extended & 1:
            self._take(order + "I", 4)  # the number of a system of coordinates
        kind, dimensions = code % 1000, {0: 2, 1: 3, 2: 3, 3: 4}.get(code // 1000, 0)
        dimensions += (extended >> 2 & 1) + (extended >> 1 & 1)
        if kind not in _KINDS or not 2 <= dimensions <= 4 or (only is not None and kind != only):
            raise NotAnnotations(f"a geometry of it is of the kind {code}, which is not read")
        if kind == 1:
            [point] = self._points(order, 1, dimensions)
            return kind, [] if point[0] != point[0] else point  # an empty point is not a number
        count = self._count(order)
        if kind == 2:
            return kind, self._points(order, count, dimensions)
        if kind == 3:
            rings = [self._points(order, self._count(order), dimensions) for _ in range(count)]
            return kind, rings if any(rings) else []
        return kind, [self.geometry(only=_PARTS[kind])[1] for _ in range(count)]

    def _count(self, order: str) -> int:
        count: int = self._take(order + "I", 4)[0]
        if count > len(self.data) - self.at:  # every part has a byte at least
            raise NotAnnotations("a geometry of it is cut off")
        return count

    def _points(self, order: str, count: int, dimensions: int) -> list[list[float]]:
        size = 8 * count * dimensions
        if size > len(self.data) - self.at:
            raise NotAnnotations("a geometry of it is cut off")
        values = self._take(f"{order}{count * dimensions}d", size)
        return [[values[n], values[n + 1]] for n in range(0, len(values), dimensions)]

    def _take(self, form: str, size: int) -> tuple[Any, ...]:
        if size > len(self.data) - self.at:
            raise NotAnnotations("a geometry of it is cut off")
        found = struct.unpack_from(form, self.data, self.at)
        self.at += size
        return found
