"""QuPath GeoJSON: tissue, regions and annotations out, features in.

Coordinates in these files are full-resolution pixels of QuPath's image. QuPath crops a slide that
states bounds (MRXS and some others) to them, pathflip does not; so every function that writes takes
the slide's ``bounds_x0`` and ``bounds_y0`` and subtracts them, and who reads adds them.

The schema is that of QuPath's ``PathObjectTypeAdapters``, 0.4 and later. What a feature read here
holds is read by :mod:`pathflip.interop.annotation_files`.
"""

from __future__ import annotations

import json
import math
import os
import uuid
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pathflip.errors import ConfigError
from pathflip.files import replacing
from pathflip.geometry import Tiling, edge
from pathflip.interop.annotations import Annotation, collection_of

if TYPE_CHECKING:
    from pathflip.archive import Archive
    from pathflip.slides.tissue import TissueMask

MAX_BYTES = 1 << 30
"""Largest GeoJSON text read; a zip that unpacks to more is refused before it is unpacked."""

_IDS = uuid.UUID("6f0d9a53-5c0e-5d0b-9a55-0b0e6f7c1d2a")
_TISSUE = {"name": "Tissue", "color": [46, 160, 67]}
_REGION = {"name": "Region", "color": [31, 111, 235]}
_ROW_KEYS = frozenset({"rx", "ry", "x0", "y0", "size0", "mpp"})


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
    extent: tuple[int, int] | None = None,
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
        extent: Width and height of the slide, level-0 px: regions at its edges are cut off there.

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
        if extent is not None:
            x, y = np.minimum(x, extent[0]), np.minimum(y, extent[1])
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
        known = slide["width"] and slide["height"]  # not of features that came without their slide
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
                extent=(slide["width"], slide["height"]) if known else None,
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


def geojson_features(path: Path) -> list[Any]:
    """Read the features of a GeoJSON file, unread.

    Takes a FeatureCollection, a bare array of features, one feature, one geometry, or a ``.zip``
    holding such files.

    Args:
        path: The file.

    Raises:
        ConfigError: It is no GeoJSON (``geojson``).
        OSError: It cannot be opened.
    """
    try:
        return [feature for text in _texts(path) for feature in _features(text)]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise not_geojson(path, error) from error
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise ConfigError(
            f"{path} is not a zip file that can be unpacked: {error}.",
            hint="Unpack it by hand and give the .geojson file.",
            code="geojson",
        ) from error


def not_geojson(path: Path, error: Exception) -> ConfigError:
    """Return the error of a file whose GeoJSON cannot be used."""
    return ConfigError(
        f"{path} is not GeoJSON that pathflip understands: {error}.",
        hint="Export it from QuPath with File > Export objects as GeoJSON.",
        code="geojson",
    )


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
