"""Files of annotations of whatever tool drew them, as annotations, areas or tissue.

A file's format is found by its content; a reader per format gives the same GeoJSON features, and
everything after that is the same for all:

| content | reader |
|---|---|
| JSON, or a zip of such files | :func:`pathflip.interop.qupath.geojson_features` |
| XML | :mod:`pathflip.interop.annotation_xml`: ASAP, Aperio ImageScope, HALO |
| Parquet | :mod:`pathflip.interop.annotation_parquet`: GeoParquet |
| DICOM | :mod:`pathflip.interop.annotation_dicom`: bulk annotations, structured reports |

:func:`read_annotations` is strict, since what it reads is stored and shown to others; truth and
tissue (:func:`read_objects`, :func:`read_tissue`) take areas and pass over all else.

Coordinates become level-0 pixels. QuPath counts from the corner of the slide's bounds, where it has
some; so every function takes ``bounds_x0`` and ``bounds_y0``. The other tools count from the corner
of the slide.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pathflip.errors import ConfigError
from pathflip.interop.annotation_dicom import SlideFile, read_dicom
from pathflip.interop.annotation_xml import NotAnnotations, read_xml
from pathflip.interop.annotations import Annotation, read_collection
from pathflip.interop.qupath import geojson_features, not_geojson
from pathflip.interop.tables import clean

if TYPE_CHECKING:
    from pathflip.slides.outlines import Polygon
    from pathflip.slides.tissue import TissueMask

T = TypeVar("T")

MAX_OF_FILE = 10_000
"""Annotations read from one file."""

_MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")  # byte order marks of UTF-8 and UTF-16
_NO_TISSUE = {
    "artifact", "artifacts", "artefact", "artefacts", "background", "hole", "holes", "fold",
    "folds", "glass", "blur", "ink", "pen", "marker", "debris", "bubble", "exclusion",
}  # fmt: skip
_OLD_TYPES = {
    "PathAnnotationObject": "annotation",
    "PathDetectionObject": "detection",
    "PathTileObject": "tile",
    "PathCellObject": "cell",
    "TMACoreObject": "tmaCore",
}


@dataclass(frozen=True, kw_only=True)
class Features:
    """Features of a file, unread.

    Attributes:
        format: Format of the file, for people.
        features: GeoJSON features.
        from_bounds: Whether their coordinates count from the corner of the slide's bounds.
        left_out: Number of objects that were left out, by reason.
    """

    format: str
    features: list[Any]
    from_bounds: bool = False
    left_out: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, kw_only=True)
class DrawnObject:
    """An object of a file of annotations.

    Attributes:
        polygons: Its area, level-0 px; empty for points and lines.
        object_type: ``annotation``, ``detection``, ``tile``, ``cell`` or ``tmaCore``.
        name: Its name, or "".
        classification: Its class, or ""; nested classes joined by ": " as QuPath shows them.
        measurements: Its finite measurements.
    """

    polygons: list[Polygon]
    object_type: str = "annotation"
    name: str = ""
    classification: str = ""
    measurements: dict[str, float] = field(default_factory=dict)


def read_annotations(
    path: str | Path,
    *,
    slide_id: str,
    author: str,
    width: int | None,
    height: int | None,
    bounds_x0: float = 0,
    bounds_y0: float = 0,
    slide: SlideFile | None = None,
) -> tuple[list[Annotation], Counter[str]]:
    """Read the objects of a file as annotations of a slide; strict about what they hold.

    Args:
        path: The file.
        slide_id: The slide.
        author: Author of all of them.
        width: Level-0 width of the slide; None where it is not known.
        height: Level-0 height.
        bounds_x0: Left of the slide's bounds, level-0 px, 0 without; see the module.
        bounds_y0: Top likewise.
        slide: File of the slide, which annotations of DICOM refer to.

    Returns:
        The annotations, and how many objects were left out, by reason.

    Raises:
        ConfigError: The file cannot be read (``geojson``, ``annotations``), or an object of it
            cannot be used (``geojson``).
    """

    def read(found: Features) -> list[Annotation]:
        try:
            return read_collection(
                found.features, slide_id=slide_id, author=author, width=width, height=height,
                offset=(bounds_x0, bounds_y0) if found.from_bounds else (0.0, 0.0),
                most_features=MAX_OF_FILE,
            )  # fmt: skip
        except ConfigError as error:
            raise ConfigError(
                f"{path}: {error.message}", hint=error.hint, code=error.code
            ) from error

    found, annotations = _read(Path(path), slide, read)
    return annotations, found.left_out


def read_objects(
    path: str | Path,
    *,
    bounds_x0: float = 0,
    bounds_y0: float = 0,
    slide: SlideFile | None = None,
) -> list[DrawnObject]:
    """Read the objects of a file, for their areas.

    Args:
        path: The file.
        bounds_x0: Left of the slide's bounds, level-0 px, 0 without; see the module.
        bounds_y0: Top likewise.
        slide: File of the slide, which annotations of DICOM refer to.

    Returns:
        Its objects in order, coordinates in level-0 px.

    Raises:
        ConfigError: The file is missing, is of no format known (``geojson``, ``annotations``), or a
            polygon in it is malformed.
    """

    def read(found: Features) -> list[DrawnObject]:
        corner = (bounds_x0, bounds_y0) if found.from_bounds else (0.0, 0.0)
        return [_object(feature, np.array(corner, np.float64)) for feature in found.features]

    return _read(Path(path), slide, read)[1]


def _read(path: Path, slide: SlideFile | None, use: Callable[[Features], T]) -> tuple[Features, T]:
    """Read a file's features and use them, naming the file in every error."""
    try:
        found = _features_of(path, slide)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror or error}.",
            hint="Check the path and its permissions.",
            code="annotations",
        ) from error
    except NotAnnotations as error:
        raise ConfigError(
            f"{path} cannot be read as annotations: {error}.",
            hint="It reads GeoJSON of QuPath, XML of ASAP, Aperio ImageScope and HALO, GeoParquet, "
            "and annotations (ANN, SR) of DICOM slides.",
            code="annotations",
        ) from error
    try:
        return found, use(found)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError,
            RecursionError) as error:  # fmt: skip
        raise not_geojson(path, error) from error


def _features(read: tuple[str, list[dict[str, Any]], Counter[str]]) -> Features:
    name, features, left_out = read
    return Features(format=name, features=features, left_out=left_out)


def _features_of(path: Path, slide: SlideFile | None) -> Features:
    """Read a file by the reader that its content asks for."""
    with path.open("rb") as file:
        head = file.read(512)
        file.seek(0)
        start = head
        for mark in _MARKS:
            start = start.removeprefix(mark)
        if start.replace(b"\0", b"").lstrip().startswith(b"<"):
            return _features(read_xml(file))
    if head.startswith(b"PAR1"):
        from pathflip.interop.annotation_parquet import read_parquet

        return _features(read_parquet(path))
    if head[128:132] == b"DICM":
        return _features(read_dicom(path, slide=slide))
    return Features(format="GeoJSON", features=geojson_features(path), from_bounds=True)


def read_tissue(
    path: str | Path,
    *,
    width: int,
    height: int,
    slide_mpp: float,
    mpp: float | None = None,
    bounds_x0: int = 0,
    bounds_y0: int = 0,
    classes: Sequence[str] = (),
    slide: SlideFile | None = None,
) -> TissueMask:
    """Read a user's annotations as a tissue mask.

    All polygons of annotations together; if the file has none, all polygons. A pixel is tissue if
    its centre is inside. Areas of classes that :func:`is_ignored` are cut out of the others.

    Args:
        path: The file, see :func:`read_objects`.
        width: Level-0 width of the slide, px.
        height: Level-0 height of the slide, px.
        slide_mpp: Level-0 µm/px.
        mpp: µm per pixel of the mask; that of ``TissueConfig`` by default.
        bounds_x0: Left of the slide's bounds, level-0 px, 0 without; see the module.
        bounds_y0: Top likewise.
        classes: Classes that are tissue; all that are not ignored by default.
        slide: File of the slide, which annotations of DICOM refer to.

    Raises:
        ConfigError: The file cannot be read, has no polygon of tissue, or none on the slide.
    """
    from pathflip.slides.tissue import TissueConfig, TissueMask

    objects = read_objects(path, bounds_x0=bounds_x0, bounds_y0=bounds_y0, slide=slide)
    objects = [one for one in objects if one.polygons]
    annotations = [one for one in objects if one.object_type == "annotation"]
    outlines = annotations or objects
    wanted = {clean(name).casefold() for name in classes}
    kept = [
        one
        for one in outlines
        if not is_ignored(one.classification)
        and (not wanted or one.classification.casefold() in wanted)
    ]
    polygons = [polygon for one in kept for polygon in one.polygons]
    if not polygons:
        there = sorted({one.classification or "no class" for one in outlines})
        raise ConfigError(
            f"{path} holds no polygon{' of tissue' if there else ''}.",
            hint=f"Its areas are of: {', '.join(there)}."
            if there
            else "Export annotations that are areas, not points or lines.",
            code="geojson",
        )
    if all(
        (outer.max(axis=0) <= 0).any() or (outer.min(axis=0) >= (width, height)).any()
        for outer, _ in polygons
    ):
        raise ConfigError(
            f"No polygon of {path} lies on the slide of {width} x {height} px.",
            hint="Check that it belongs to this slide and is in full-resolution pixels.",
            code="geojson",
        )
    mpp = TissueConfig().mpp if mpp is None else mpp

    def fill(drawn: list[Polygon]) -> TissueMask:
        return TissueMask.from_polygons(
            drawn, width=width, height=height, slide_mpp=slide_mpp, mpp=mpp
        )

    tissue = fill(polygons)
    ignored = [one for one in outlines if is_ignored(one.classification)]
    if ignored:
        without = fill([polygon for one in ignored for polygon in one.polygons])
        tissue = TissueMask(tissue.mask & ~without.mask, mpp, slide_mpp)
    return tissue


def polygons_of(geometry: Mapping[str, Any]) -> list[Polygon]:
    """Return the polygons of a checked GeoJSON geometry; none of points and lines."""
    return list(_polygons(geometry, np.zeros(2)))


def is_ignored(classification: str) -> bool:
    """Return whether a class says that an area is no tissue.

    Those are QuPath's ignored classes, which end in ``*``, but ``Region*``, which marks a place to
    look at; and areas called artifact, background, hole, fold and so on.
    """
    return any(
        (part.endswith("*") and part != "region*") or part in _NO_TISSUE
        for part in map(clean, classification.casefold().split(":"))
    )


def _object(feature: Mapping[str, Any], offset: NDArray[np.float64]) -> DrawnObject:
    properties = feature.get("properties") or {}
    kind = properties.get("objectType") or _OLD_TYPES.get(str(feature.get("id")), "annotation")
    measurements = properties.get("measurements") or {}
    if isinstance(measurements, list):
        measurements = {entry["name"]: entry["value"] for entry in measurements}
    return DrawnObject(
        polygons=list(_polygons(feature.get("geometry"), offset)),
        object_type=str(kind),
        name=str(properties.get("name") or ""),
        classification=_class_name(properties.get("classification")),
        measurements={
            str(key): float(value)
            for key, value in measurements.items()
            if isinstance(value, int | float) and math.isfinite(value)
        },
    )


def _class_name(value: Any) -> str:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return str(value)
    if not isinstance(value, dict):
        return ""
    return str(value.get("name") or ": ".join(map(str, value.get("names") or [])))


def _polygons(geometry: Any, offset: NDArray[np.float64]) -> Iterable[Polygon]:
    if geometry is None:
        return
    kind = geometry["type"]
    if kind == "GeometryCollection":
        for part in geometry["geometries"]:
            yield from _polygons(part, offset)
    elif kind in ("Polygon", "MultiPolygon"):
        coordinates = geometry["coordinates"]
        for rings in [coordinates] if kind == "Polygon" else coordinates:
            if rings:
                outer, *holes = (_points(ring, offset) for ring in rings)
                yield outer, holes
    elif kind not in ("Point", "MultiPoint", "LineString", "MultiLineString"):
        raise ValueError(f"unknown geometry type {kind!r}")


def _points(ring: Any, offset: NDArray[np.float64]) -> NDArray[np.float64]:
    """One ring; a third coordinate (QuPath's plane) is dropped."""
    points = np.array([position[:2] for position in ring], np.float64)
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError("a polygon has a ring that is no list of (x, y)")
    points = points + offset
    if not (np.abs(points) < 1e9).all():
        raise ValueError("a polygon has a coordinate that is no pixel of a slide")
    if len(points) > 1 and (points[0] == points[-1]).all():
        points = points[:-1]
    if len(points) < 3:
        raise ValueError("a polygon has a ring of fewer than three points")
    return points
