"""QuPath GeoJSON: tissue, regions and annotations out, a user's annotations in.

Coordinates in these files are full-resolution pixels of QuPath's image. QuPath crops a slide that
states bounds (MRXS and some others) to them, pathflip does not; so every function here takes the
slide's ``bounds_x0`` and ``bounds_y0``, subtracts them on the way out and adds them on the way in.

The schema is that of QuPath's ``PathObjectTypeAdapters``, 0.4 and later; files of before 0.4 (type
in ``id``, measurements as a list) and files with a classification written as a JSON string are
read too.
"""

from __future__ import annotations

import json
import math
import os
import uuid
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pathflip.errors import ConfigError
from pathflip.files import replacing
from pathflip.geometry import Tiling, edge
from pathflip.interop.annotations import Annotation, collection_of, read_collection
from pathflip.interop.tables import clean

if TYPE_CHECKING:
    from pathflip.archive import Archive
    from pathflip.slides.outlines import Polygon
    from pathflip.slides.tissue import TissueMask

MAX_BYTES = 1 << 30
"""Largest GeoJSON text read; a zip that unpacks to more is refused before it is unpacked."""
MAX_OF_FILE = 10_000
"""Annotations read from one file."""

_IDS = uuid.UUID("6f0d9a53-5c0e-5d0b-9a55-0b0e6f7c1d2a")
_TISSUE = {"name": "Tissue", "color": [46, 160, 67]}
_NO_TISSUE = {
    "artifact", "artifacts", "artefact", "artefacts", "background", "hole", "holes", "fold",
    "folds", "glass", "blur", "ink", "pen", "marker", "debris", "bubble",
}  # fmt: skip
_REGION = {"name": "Region", "color": [31, 111, 235]}
_ROW_KEYS = frozenset({"rx", "ry", "x0", "y0", "size0", "mpp"})
_OLD_TYPES = {
    "PathAnnotationObject": "annotation",
    "PathDetectionObject": "detection",
    "PathTileObject": "tile",
    "PathCellObject": "cell",
    "TMACoreObject": "tmaCore",
}


@dataclass(frozen=True, kw_only=True)
class QuPathObject:
    """One object of a GeoJSON file.

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


def export_slide(
    path: str | Path,
    *,
    slide_id: str,
    mpp: float,
    tiling: Tiling,
    tissue: TissueMask | None,
    regions: Iterable[Mapping[str, Any]],
    bounds_x0: int = 0,
    bounds_y0: int = 0,
) -> int:
    """Write one slide's tissue (annotations) and regions (tiles) for QuPath.

    Args:
        path: File to write; replaced as a whole or not at all.
        slide_id: Goes into the objects' ids and metadata; equal input gives an equal file.
        mpp: The slide's level-0 µm/px.
        tiling: Tiling of the regions.
        tissue: The mask, or None to leave tissue out.
        regions: One mapping a region with ``rx`` and ``ry``; every other finite number in it
            (``tissue_fraction``, ``n_patches``, ...) becomes a measurement. The rows of the
            archive's regions table will do.
        bounds_x0: Left of the slide's bounds, level-0 px, 0 without; see the module.
        bounds_y0: Top likewise.

    Returns:
        Number of objects written.
    """
    bounds = np.array([bounds_x0, bounds_y0], np.float64)
    features = []
    if tissue is not None:
        for index, (outer, holes) in enumerate(tissue.polygons()):
            rings = [_ring(points - bounds) for points in (outer, *holes)]
            px2 = _area(outer) - sum(_area(hole) for hole in holes)
            features.append(
                _feature(
                    key=f"{slide_id}/tissue/{index}",
                    rings=rings,
                    object_type="annotation",
                    name=f"tissue {index + 1}",
                    classification=_TISSUE,
                    measurements={"area_mm2": px2 * mpp**2 / 1e6},
                    metadata={"slide_id": slide_id},
                )
            )
    for row in regions:
        rx, ry = int(row["rx"]), int(row["ry"])
        x = edge(np.array([rx, rx + 1]) * tiling.side, unit_um=tiling.patch_um, mpp=mpp)
        y = edge(np.array([ry, ry + 1]) * tiling.side, unit_um=tiling.patch_um, mpp=mpp)
        corners = np.array([[x[0], y[0]], [x[1], y[0]], [x[1], y[1]], [x[0], y[1]]], np.float64)
        features.append(
            _feature(
                key=f"{slide_id}/{rx}_{ry}",
                rings=[_ring(corners - bounds)],
                object_type="tile",
                name=f"{rx}_{ry}",
                classification=_REGION,
                measurements=_measurements(row),
                metadata={"slide_id": slide_id, "region_id": f"{slide_id}/{rx}_{ry}"},
            )
        )
    _write_atomic(Path(path), {"type": "FeatureCollection", "features": features})
    return len(features)


def export_archive(
    archive: Archive, folder: str | Path, *, slides: Sequence[str] | None = None
) -> list[Path]:
    """Write ``<folder>/<slide_id>.geojson`` for ready slides of an archive.

    Args:
        archive: Archive of the slides.
        folder: Made if missing; files of the same names in it are replaced.
        slides: Ids or unique file names of slides; all that are ready by default.

    Returns:
        The files written, in order of ``slide_id``.

    Raises:
        ArchiveError: A slide is unknown or not ready.
        ConfigError: The folder cannot be written.
    """
    from pathflip.slides.tissue import TissueMask

    folder = Path(folder).expanduser()
    tiling = Tiling(**archive.tiling())
    ids = archive.ready_ids() if slides is None else {archive.resolve(name) for name in slides}
    columns = ["rx", "ry", "tissue_fraction", "n_patches", "n_bad"]
    written = []
    for slide_id in sorted(ids):
        regions = archive.regions(slide_id, columns=columns).to_pylist()
        slide = archive.slide(slide_id)
        png, mpp = slide["tissue_png"], slide["mpp"]
        path = folder / f"{slide_id}.geojson"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            export_slide(
                path,
                slide_id=slide_id,
                mpp=mpp,
                tiling=tiling,
                tissue=TissueMask.from_png(png, mpp=slide["tissue_mpp"], slide_mpp=mpp)
                if png
                else None,
                regions=regions,
                bounds_x0=slide["bounds_x0"] or 0,
                bounds_y0=slide["bounds_y0"] or 0,
            )
        except OSError as error:
            raise _unwritten(path, error) from error
        written.append(path)
    return written


def _unwritten(path: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"{path} cannot be written: {error.strerror or error}.",
        hint="Give a folder with room that you may write to.",
        code="export",
    )


def read_geojson(path: str | Path, *, bounds_x0: int = 0, bounds_y0: int = 0) -> list[QuPathObject]:
    """Read the objects of a GeoJSON file.

    Takes a FeatureCollection, a bare array of features, one feature, one geometry, or a ``.zip``
    holding such files.

    Args:
        path: The file.
        bounds_x0: Left of the slide's bounds, level-0 px, 0 without; see the module.
        bounds_y0: Top likewise.

    Returns:
        Its objects in order, coordinates in level-0 px.

    Raises:
        ConfigError: The file is missing, is no GeoJSON, or a polygon in it is malformed.
    """
    path = Path(path)
    offset = np.array([bounds_x0, bounds_y0], np.float64)
    try:
        return [_object(feature, offset) for text in _texts(path) for feature in _features(text)]
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror or error}.",
            hint="Check the path and its permissions.",
            code="geojson",
        ) from error
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:
        raise ConfigError(
            f"{path} is not GeoJSON that pathflip understands: {error}.",
            hint="Export it from QuPath with File > Export objects as GeoJSON.",
            code="geojson",
        ) from error
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise ConfigError(
            f"{path} is not a zip file that can be unpacked: {error}.",
            hint="Unpack it by hand and give the .geojson file.",
            code="geojson",
        ) from error


def read_annotations(
    path: str | Path,
    *,
    slide_id: str,
    author: str,
    width: int | None,
    height: int | None,
    bounds_x0: float = 0,
    bounds_y0: float = 0,
) -> list[Annotation]:
    """Read the objects of a GeoJSON file as annotations of a slide; strict about what they hold.

    Args:
        path: The file, as :func:`read_geojson` takes it.
        slide_id: The slide.
        author: Author of all of them.
        width: Level-0 width of the slide; None where it is not known.
        height: Level-0 height.
        bounds_x0: Left of the slide's bounds, level-0 px, 0 without; see the module.
        bounds_y0: Top likewise.

    Raises:
        ConfigError: The file cannot be read, or an object of it cannot be used (``geojson``).
    """
    path = Path(path)
    try:
        features = [one for text in _texts(path) for one in _features(text)]
        return read_collection(
            features, slide_id=slide_id, author=author, width=width, height=height,
            offset=(bounds_x0, bounds_y0), most_features=MAX_OF_FILE,
        )  # fmt: skip
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}", hint=error.hint, code=error.code) from error
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror or error}.",
            hint="Check the path and its permissions.",
            code="geojson",
        ) from error
    except (ValueError, TypeError, KeyError, RecursionError, zipfile.BadZipFile, zlib.error,
            EOFError, NotImplementedError, RuntimeError) as error:  # fmt: skip
        raise ConfigError(
            f"{path} is not GeoJSON that pathflip understands: {error}.",
            hint="Export it from QuPath with File > Export objects as GeoJSON.",
            code="geojson",
        ) from error


def write_annotations(
    path: str | Path,
    annotations: Sequence[Annotation],
    *,
    bounds_x0: float = 0,
    bounds_y0: float = 0,
) -> None:
    """Write annotations of one slide for QuPath; the file is replaced as a whole or not at all.

    Raises:
        ConfigError: It cannot be written (``export``).
    """
    document = collection_of(annotations, offset=(bounds_x0, bounds_y0))
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        _write_atomic(Path(path), document)
    except OSError as error:
        raise _unwritten(Path(path), error) from error


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
) -> TissueMask:
    """Read a user's annotations as a tissue mask.

    All polygons of annotations together; if the file has none, all polygons. A pixel is tissue if
    its centre is inside. Areas of classes that :func:`is_ignored` are cut out of the others.

    Args:
        path: GeoJSON, see :func:`read_geojson`.
        width: Level-0 width of the slide, px.
        height: Level-0 height of the slide, px.
        slide_mpp: Level-0 µm/px.
        mpp: µm per pixel of the mask; that of ``TissueConfig`` by default.
        bounds_x0: Left of the slide's bounds, level-0 px, 0 without; see the module.
        bounds_y0: Top likewise.
        classes: Classes that are tissue; all that are not ignored by default.

    Raises:
        ConfigError: Not GeoJSON, no polygon of tissue in it, or none on the slide.
    """
    from pathflip.slides.tissue import TissueConfig, TissueMask

    objects = read_geojson(path, bounds_x0=bounds_x0, bounds_y0=bounds_y0)
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


def is_ignored(classification: str) -> bool:
    """Return whether a class says that an area is no tissue.

    Those are QuPath's ignored classes, which end in ``*``, but ``Region*``, which marks a place to
    look at; and areas called artifact, background, hole, fold and so on.
    """
    return any(
        (part.endswith("*") and part != "region*") or part in _NO_TISSUE
        for part in map(clean, classification.casefold().split(":"))
    )


def _feature(
    *,
    key: str,
    rings: list[list[list[float]]],
    object_type: str,
    name: str,
    classification: Mapping[str, Any],
    measurements: Mapping[str, float],
    metadata: Mapping[str, str],
) -> dict[str, Any]:
    return {
        "type": "Feature",
        "id": str(uuid.uuid5(_IDS, key)),
        "geometry": {"type": "Polygon", "coordinates": rings},
        "properties": {
            "objectType": object_type,
            "name": name,
            "classification": dict(classification),
            "isLocked": True,
            "measurements": dict(measurements),
            "metadata": dict(metadata),
        },
    }


def _ring(points: NDArray[np.float64]) -> list[list[float]]:
    """A closed GeoJSON ring; a hundredth of a level-0 pixel is enough."""
    return np.round(np.concatenate([points, points[:1]]), 2).tolist()  # type: ignore[no-any-return]


def _area(ring: NDArray[np.float64]) -> float:
    x, y = (ring - ring[0]).T
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2


def _measurements(row: Mapping[str, Any]) -> dict[str, float]:
    return {
        key: float(value)
        for key, value in row.items()
        if key not in _ROW_KEYS
        and isinstance(value, int | float | np.integer | np.floating)
        and not isinstance(value, bool)
        and math.isfinite(value)
    }


def _write_atomic(path: Path, document: Mapping[str, Any]) -> None:
    with replacing(path) as part, part.open("w", encoding="utf-8") as file:
        json.dump(document, file, allow_nan=False, separators=(",", ":"))


def _texts(path: Path) -> Iterable[bytes]:
    with path.open("rb") as file:
        if file.read(4) == b"PK\x03\x04":
            with zipfile.ZipFile(path) as archive:
                members = [
                    member
                    for member in archive.infolist()
                    if member.filename.lower().endswith((".geojson", ".json"))
                    and not member.filename.startswith("__MACOSX/")
                ]
                if not members:
                    raise ValueError("the zip holds no .geojson or .json file")
                if sum(member.file_size for member in members) > MAX_BYTES:
                    raise ValueError(f"it unpacks to more than {MAX_BYTES >> 20} MiB")
                for member in members:
                    with archive.open(member) as packed:
                        # The declared size may lie; zipfile stops at it, and so does this.
                        yield packed.read(member.file_size)
            return
        if os.fstat(file.fileno()).st_size > MAX_BYTES:
            raise ValueError(f"it is larger than {MAX_BYTES >> 20} MiB")
        file.seek(0)
        yield file.read()


def _features(text: bytes) -> Sequence[dict[str, Any]]:
    document = json.loads(text.decode("utf-8-sig"))
    if isinstance(document, dict):
        whole = document.get("type") == "FeatureCollection"
        document = document["features"] if whole else [document]
    if not isinstance(document, list):
        raise ValueError("its top level is neither an object nor an array")
    return [item if item["type"] == "Feature" else _bare(item) for item in document]


def _bare(geometry: Any) -> dict[str, Any]:
    return {"type": "Feature", "geometry": geometry}


def _object(feature: Mapping[str, Any], offset: NDArray[np.float64]) -> QuPathObject:
    properties = feature.get("properties") or {}
    kind = properties.get("objectType") or _OLD_TYPES.get(str(feature.get("id")), "annotation")
    measurements = properties.get("measurements") or {}
    if isinstance(measurements, list):
        measurements = {entry["name"]: entry["value"] for entry in measurements}
    return QuPathObject(
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
