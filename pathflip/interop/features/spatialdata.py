"""SpatialData stores of Zarr, as LazySlide (wsidata) lays out the tiles of a slide.

=========================== ===================================================================
attributes of ``S.zarr``    slide_properties (shape, mpp), tile_spec {tiles: width, height, mpp,
                            base_downsample}; pathflip's own facts under ``pathflip``
``tables/<model>_<tiles>``  AnnData: ``X`` [n, d], ``obs/<instance_key>``; attribute ``region``
                            names the tiles
``shapes/<tiles>``          GeoParquet: the tiles as rectangles, level-0 px
=========================== ===================================================================

Written in the container format 0.2 (Zarr 3), read in that and the one before it (Zarr 2). Needs
zarr (``pathflip[spatialdata]``).

Only attributes, tables of numbers and the rectangles are read, and no array that is packed by
Python's pickle, which zarr refuses for numbers. Links are refused: a store from elsewhere could
have any file of this machine read as its numbers.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pathflip.files import partial as partial_path
from pathflip.files import sync
from pathflip.interop.features.hdf5 import NOTES, ROWS_PER_CHUNK, number, text
from pathflip.interop.features.record import (
    MAX_DIM,
    MAX_PATCHES,
    FeatureFile,
    check_shape,
    reading,
    unusable,
)

TILES = "tiles"
"""Name of the tiles in a store that is written; LazySlide's own default."""
SUFFIX = ".zarr"
MAX_CHUNK_BYTES = 1 << 30
"""Bytes of a chunk, all of which are unpacked to read a row of it."""
_MARKS = ("zarr.json", ".zgroup")
_AGGREGATE = "uns/agg_ops/agg_slide"
"""Where a table has the vector of its slide, and what made it."""
_BATCH = 1 << 14
_RECTANGLE = np.dtype([("head", "u1", 13), ("corners", "<f8", (5, 2))])
_HEAD = np.frombuffer(b"\1" + np.array([3, 1, 5], "<u4").tobytes(), np.uint8)
"""Beginning of a polygon of one ring of five points in WKB, little-endian."""


def is_zarr(names: list[str]) -> bool:
    """Return whether a folder with these files is a group of Zarr."""
    return any(mark in names for mark in _MARKS)


def read_spatialdata(path: Path, slide: str) -> list[FeatureFile]:
    """Return the features of tiles in a store: one record for each table.

    A store without any, such as a slide in OME-Zarr, gives none.

    Raises:
        SlideError: It is damaged (``unreadable``), of an unknown kind (``unsupported``), or zarr
            is not installed (``missing_package``).
    """
    if not (path / "tables").is_dir():
        return []
    found = []
    with reading(path):
        root = _group(path, "")
        specs = _mapping(root.attrs.get("tile_spec"))
        for name in sorted(os.listdir(path / "tables")):
            if not any((path / "tables" / name / mark).is_file() for mark in _MARKS):
                continue
            region = _group(path, f"tables/{name}").attrs.get("region")
            if isinstance(region, list) and len(region) == 1:
                region = region[0]
            if isinstance(region, str) and isinstance(specs.get(region), Mapping):
                found.append((name, region))
        about = dict(root.attrs)
    models = Counter(name.removesuffix(f"_{region}") for name, region in found)
    records = []
    for name, region in found:
        model = name.removesuffix(f"_{region}")
        # The same model on two sets of tiles, such as LazySlide's dense ones.
        encoder = model if models[model] == 1 or region == TILES else name
        if (record := _record(path, slide, name, region, encoder, about)) is not None:
            records.append(record)
    return records


def _record(
    path: Path, slide: str, name: str, region: str, encoder: str, about: Mapping[str, Any]
) -> FeatureFile | None:
    with reading(path):
        table = _group(path, f"tables/{name}")
        features = _array(path, f"tables/{name}/X")
        if features is None or features.ndim != 2:
            return None  # a graph of tiles, or a sparse table
        n, dim = features.shape
        check_shape(path, n=n, dim=dim)
        quality = _array(path, f"tables/{name}/obsm/patch_quality")
        regions = _array(path, f"tables/{name}/uns/pathflip/regions")
        for extra in (quality, regions):
            if extra is not None and (
                extra.ndim != 2 or len(extra.shape) != 2 or extra.shape[0] > n or extra.shape[1] > 4
            ):
                raise unusable(path, f"has a table {extra.path} of another size than its tiles")
        own = _mapping(about.get("pathflip"))
        spec = _mapping(_mapping(about["tile_spec"])[region])
        properties = _mapping(about.get("slide_properties"))
        side, tall = number(spec.get("width")), number(spec.get("height"))
        scale, pixel_um = number(spec.get("base_downsample")), number(spec.get("mpp"))
        if side is None or side != tall or scale is None:
            raise unusable(path, f"has {region} that are no squares", code="unsupported")
        mpp = number(own.get("mpp")) or _agreed(number(properties.get("mpp")), pixel_um, scale)
        shape = properties.get("shape")
        known = isinstance(shape, list) and len(shape) == 2 and all(map(number, shape))
        size = float(int(side * scale))
        key = table.attrs.get("instance_key")
    read = partial(_table, path, f"tables/{name}")
    return FeatureFile(
        path=path,
        format="spatialdata",
        slide=slide,
        n=n,
        dim=dim,
        read=partial(_rows, path, f"tables/{name}/X"),
        coordinates=partial(_places, path, name, region, str(key), n, size),
        size=size,
        size_um=side * pixel_um if pixel_um else None,
        pixel_um=pixel_um,
        mpp=mpp,
        encoder=encoder,
        revision=text(own.get("encoder_revision")),
        licence=text(own.get("encoder_licence")),
        extent=(int(shape[1]), int(shape[0])) if known and shape else None,
        notes={key: own[key] for key in NOTES if own.get(key) not in (None, "")},
        quality=None if quality is None else partial(read, "obsm/patch_quality", 3),
        regions=None if regions is None else partial(read, "uns/pathflip/regions", 4),
    )


def read_aggregates(path: Path) -> list[tuple[str, NDArray[Any]]]:
    """Return the vectors of the slide in a store, as LazySlide aggregates features of tiles.

    Returns:
        (slide encoder, [1, d]) for each table that has one; a statistic of the tiles is called
        after it and their model: ``mean_uni2``.
    """
    found = []
    with reading(path):
        folders = sorted((path / "tables").glob(f"*/{_AGGREGATE}"))
        for name in (str(folder.relative_to(path)) for folder in folders):
            encoder = _word(path, f"{name}/encoder")
            vector = _array(path, f"{name}/features")
            if encoder is None or vector is None:
                continue
            if vector.shape[-1:] != (vector.size,) or vector.size > MAX_DIM:
                raise unusable(
                    path, f"has no one vector in {name}: {vector.shape}", code="unsupported"
                )
            if callable(getattr(np, encoder, None)):
                tiles = _word(path, f"{name}/tile_key") or TILES
                encoder = f"{encoder}_{Path(name).parts[1].removesuffix(f'_{tiles}')}"
            found.append((encoder.removesuffix("-slide-encoder"), np.asarray(vector[...])))
    return found


def _agreed(stated: float | None, pixel_um: float | None, scale: float) -> float | None:
    """Return the slide's resolution, unless its tiles were cut by another one."""
    if stated is None or pixel_um is None:
        return stated
    return stated if abs(pixel_um / scale / stated - 1) < 0.01 else None


# -- reading --------------------------------------------------------------------------------------


def _zarr(path: Path) -> Any:
    try:
        import zarr
    except ImportError as error:
        raise unusable(
            path,
            "is a store of Zarr, and zarr is not installed",
            hint="Run: pip install 'pathflip[spatialdata]'",
            code="missing_package",
        ) from error
    return zarr


def _group(path: Path, name: str) -> Any:
    """Return a group that lies in the store itself."""
    _check_links(path, name, deep=False)
    return _zarr(path).open_group(str(path / name), mode="r", use_consolidated=False)


def _array(path: Path, name: str) -> Any:
    """Return a table of numbers that lies in the store itself; None where there is none."""
    zarr = _zarr(path)
    if not any((path / name / mark).is_file() for mark in ("zarr.json", ".zarray")):
        return None
    _check_links(path, name, deep=True)
    found = zarr.open(str(path / name), mode="r")
    if not isinstance(found, zarr.Array) or found.dtype.kind not in "fiu":
        return None
    if (size := int(np.prod(found.chunks, dtype=object)) * found.dtype.itemsize) > MAX_CHUNK_BYTES:
        raise unusable(
            path,
            f"holds {name} in chunks of {size >> 20:,} MiB",
            hint=f"Write it again in chunks of up to {MAX_CHUNK_BYTES >> 20:,} MiB.",
            code="too_large",
        )
    return found


def _word(path: Path, name: str) -> str | None:
    """Return a word that lies in the store itself; None where there is none.

    Zarr 2 packs texts by any codec that a store names, Python's pickle among them.
    """
    _check_links(path, name, deep=True)
    if (path / name / ".zarray").is_file():
        about = json.loads((path / name / ".zarray").read_text())
        packed = [one.get("id") for one in (about.get("filters") or ())]
        if about.get("dtype") != "|O" or packed != ["vlen-utf8"]:
            return None
    elif not (path / name / "zarr.json").is_file():
        return None
    found = _zarr(path).open(str(path / name), mode="r")
    value = found[()] if getattr(found, "shape", None) == () else None
    return str(value) if value is not None and found.dtype.kind in "OT" else None


def _check_links(path: Path, name: str, *, deep: bool) -> None:
    """Refuse a part of a store that is, or holds, a link: it could have any file be read."""
    place = path
    for part in Path(name).parts:
        place /= part
        if place.is_symlink():
            raise unusable(path, f"takes {name} from elsewhere by a link")
    listed: Iterator[Any] = os.walk(place) if deep else iter([(place, (), _MARKS)])
    for folder, folders, names in listed:
        if any(Path(folder, one).is_symlink() for one in (*folders, *names)):
            raise unusable(path, f"takes {name} from elsewhere by a link")


def _rows(path: Path, name: str, start: int, stop: int) -> NDArray[Any]:
    """Read rows [stop - start, d] of a table."""
    with reading(path):
        return np.asarray(_array(path, name)[start:stop])


def _table(path: Path, name: str, key: str, width: int) -> NDArray[np.float64]:
    """Read a small table [n, width] of a table's further ones."""
    with reading(path):
        values = np.asarray(_array(path, f"{name}/{key}")[:, :width], np.float64)
        if values.shape[1] != width:
            raise ValueError(f"{key} has {values.shape[1]} columns")
        return values


def _places(
    path: Path, name: str, region: str, key: str, n: int, size: float
) -> NDArray[np.float64]:
    """Return the top left corners (x, y) of a table's tiles, level-0 px [n, 2], in its order."""
    with reading(path):
        numbers, corners = _rectangles(path, region, key, size)
        ids = _array(path, f"tables/{name}/obs/{key}")
        wanted = np.arange(n) if ids is None else np.asarray(ids[:])
        if wanted.shape != (n,):
            raise unusable(path, f"has {len(wanted):,} numbers of tiles and {n:,} features")
        order = np.argsort(numbers, kind="stable")
        at = np.searchsorted(numbers, wanted, sorter=order)
        at = order[np.minimum(at, len(order) - 1)] if len(order) else np.zeros(0, np.int64)
        if len(np.unique(numbers)) != len(numbers) or not np.array_equal(numbers[at], wanted):
            raise unusable(path, f"has features of {region} that it does not hold, or twice")
        return corners[at]


def _rectangles(
    path: Path, region: str, key: str, size: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the numbers [t] of the tiles of a store, and their top left corners [t, 2]."""
    _check_links(path, f"shapes/{region}", deep=True)
    numbers, corners = [np.zeros(0, np.int64)], [np.zeros((0, 2))]
    with pq.ParquetFile(path / "shapes" / region / "shapes.parquet") as file:
        if file.metadata.num_rows > MAX_PATCHES:
            raise unusable(path, f"holds {file.metadata.num_rows:,} tiles", code="unsupported")
        names = file.schema_arrow.names
        # What the tables count tiles by is a column of them, or the index of their table.
        by = next((one for one in (key, "__index_level_0__") if one in names), None)
        columns = ["geometry", *([by] if by else [])]
        for batch in file.iter_batches(batch_size=_BATCH, columns=columns):
            shapes = batch.column("geometry")
            shapes = (shapes.storage if isinstance(shapes, pa.ExtensionArray) else shapes).cast(
                pa.binary()
            )
            lengths = pc.binary_length(shapes)
            if shapes.null_count or not pc.all(pc.equal(lengths, _RECTANGLE.itemsize)).as_py():
                raise unusable(path, f"has {region} that are no rectangles", code="unsupported")
            found = _flat(shapes)
            low, high = found["corners"].min(axis=1), found["corners"].max(axis=1)
            if (found["head"] != _HEAD).any() or not (np.abs(high - low - size) <= 1).all():
                raise unusable(
                    path, f"has {region} that are no squares of {size:g} px", code="unsupported"
                )
            corners.append(low)
            start = sum(map(len, numbers))
            held = batch.column(by) if by else pa.array(range(start, start + len(low)))
            numbers.append(held.to_numpy(zero_copy_only=False).astype(np.int64))
    return np.concatenate(numbers), np.concatenate(corners)


def _flat(shapes: Any) -> NDArray[Any]:
    """Return binary values that all have the length of a rectangle as an array, not copied."""
    if not len(shapes):
        return np.zeros(0, _RECTANGLE)
    starts = np.frombuffer(shapes.buffers()[1], np.int32)
    first = int(starts[shapes.offset])
    return np.frombuffer(shapes.buffers()[2], _RECTANGLE, count=len(shapes), offset=first)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


# -- writing --------------------------------------------------------------------------------------


def write_spatialdata(folder: Path, record: FeatureFile, *, px: int, origin: str) -> Path:
    """Write ``S.zarr``: its tiles, and the features of them.

    A store that is there already is left alone: it may hold the work of others.

    Args:
        folder: Folder to write into.
        record: The slide.
        px: Side of a patch as it was read.
        origin: Digest of what the store is made from: one with the same is the one to write.

    Raises:
        SlideError: There is another store (``exists``), or zarr is not installed
            (``missing_package``).
    """
    target = folder / f"{record.slide}{SUFFIX}"
    zarr = _zarr(target)
    if target.exists():
        with reading(target):
            if _mapping(_group(target, "").attrs.get("pathflip")).get("origin") == origin:
                return target
        raise unusable(
            target,
            f"is in {folder} already, and may hold more than these features",
            hint="Move it away, or choose another folder.",
            code="exists",
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    part = partial_path(target, one_writer=True)
    shutil.rmtree(part, ignore_errors=True)
    root = zarr.create_group(
        str(part), zarr_format=3, attributes=_attributes(record, px=px, origin=origin)
    )
    found = record.coordinates() if record.coordinates is not None else None
    places = np.zeros((record.n, 2)) if found is None else found
    shapes = root.create_group("shapes")
    shapes.create_group(TILES, attributes=_SHAPES)
    _write_rectangles(part / "shapes" / TILES / "shapes.parquet", places, size=_size(record))
    _write_table(root.create_group("tables"), record)
    os.rename(part, target)
    sync(target.parent)
    return target


def _size(record: FeatureFile) -> int:
    return round(record.size or 0)


def _attributes(record: FeatureFile, *, px: int, origin: str) -> dict[str, Any]:
    """Return the attributes of a store."""
    size = _size(record)
    scale = size / px
    if int(px * scale) != size:  # as wsidata takes it back
        scale = float(np.nextafter(scale, np.inf))
    spec = {
        "height": px,
        "width": px,
        "stride_height": px,
        "stride_width": px,
        "mpp": record.pixel_um,
        "ops_level": 0,
        "ops_downsample": scale,
        "base_level": 0,
        "base_downsample": scale,
        "tissue_name": None,
    }
    own = {
        "origin": origin,
        "mpp": record.mpp,
        "encoder_revision": record.revision,
        "encoder_licence": record.licence,
        **record.notes,
    }
    found: dict[str, Any] = {
        "spatialdata_attrs": {"version": "0.2"},
        "tile_spec": {TILES: spec},
        "pathflip": {key: value for key, value in own.items() if value is not None},
    }
    if record.extent is not None:
        width, height = record.extent
        found["slide_properties"] = {
            "shape": [height, width],
            "n_level": 1,
            "level_shape": [[height, width]],
            "level_downsample": [1.0],
            "mpp": record.mpp,
            "magnification": None,
            "bounds": [0, 0, width, height],
        }
    return found


_AXES = [{"name": name, "type": "space", "unit": "unit"} for name in "xy"]
_SHAPES = {
    "encoding-type": "ngff:shapes",
    "axes": ["x", "y"],
    "coordinateTransformations": [
        {
            "type": "identity",
            "input": {"name": "xy", "axes": _AXES},
            "output": {"name": "global", "axes": _AXES},
        }
    ],
    "spatialdata_attrs": {"version": "0.3"},
}


def _write_rectangles(path: Path, places: NDArray[np.float64], *, size: int) -> None:
    """Write tiles as GeoParquet: their number, place and rectangle."""
    found = np.zeros(len(places), _RECTANGLE)
    found["head"] = _HEAD
    found["corners"] = places[:, None] + size * np.array([[1, 0], [1, 1], [0, 1], [0, 0], [1, 0]])
    offsets = np.arange(len(places) + 1, dtype=np.int32) * _RECTANGLE.itemsize
    buffers = [None, pa.py_buffer(offsets.tobytes()), pa.py_buffer(found.tobytes())]
    table = pa.table(
        {
            "tile_id": np.arange(len(places)),
            "x": places[:, 0].astype(np.int64),
            "y": places[:, 1].astype(np.int64),
            "geometry": pa.Array.from_buffers(pa.binary(), len(places), buffers),
        }
    )
    column = {"encoding": "WKB", "crs": None, "geometry_types": ["Polygon"]}
    geo = {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": column}}
    pq.write_table(table.replace_schema_metadata({"geo": json.dumps(geo)}), path)


def _write_table(tables: Any, record: FeatureFile) -> None:
    """Write features as AnnData lays them out in Zarr."""
    attributes = {"region": TILES, "region_key": "library_id", "instance_key": "tile_id"}
    table = tables.create_group(
        f"{record.encoder}_{TILES}",
        attributes=_as("anndata", "0.1.0")
        | {"spatialdata-encoding-type": "ngff:regions_table", "version": "0.2"}
        | attributes,
    )
    features = table.create_array(
        "X",
        shape=(record.n, record.dim),
        dtype=np.float32,
        chunks=(min(ROWS_PER_CHUNK, max(1, record.n)), record.dim),
        attributes=_as("array", "0.2.0"),
    )
    for start in range(0, record.n, ROWS_PER_CHUNK):
        stop = min(start + ROWS_PER_CHUNK, record.n)
        features[start:stop] = record.read(start, stop).astype(np.float32)
    numbers = np.arange(record.n)
    obs = _frame(table, "obs", columns=["tile_id", "library_id"], rows=record.n)
    _numbers(obs, "tile_id", numbers)
    library = obs.create_group(
        "library_id", attributes=_as("categorical", "0.2.0") | {"ordered": False}
    )
    _numbers(library, "codes", np.zeros(record.n, np.int8))
    _words(library, "categories", [TILES])
    _frame(table, "var", columns=[], rows=record.dim)
    for name in ("layers", "obsm", "obsp", "varm", "varp", "uns"):
        table.create_group(name, attributes=_as("dict", "0.1.0"))
    kept = table["uns"].create_group("spatialdata_attrs", attributes=_as("dict", "0.1.0"))
    for key, value in attributes.items():
        text = np.array(value, np.dtypes.StringDType())
        kept.create_array(key, data=text, attributes=_as("string", "0.2.0"))
    if record.quality is not None and (scores := record.quality()) is not None:
        _numbers(table["obsm"], "patch_quality", scores.astype(np.float32))
    if record.regions is not None and (regions := record.regions()) is not None:
        own = table["uns"].create_group("pathflip", attributes=_as("dict", "0.1.0"))
        _numbers(own, "regions", regions)


def _as(kind: str, version: str) -> dict[str, Any]:
    return {"encoding-type": kind, "encoding-version": version}


def _frame(table: Any, name: str, *, columns: list[str], rows: int) -> Any:
    about = {"_index": "_index", "column-order": columns}
    frame = table.create_group(name, attributes=_as("dataframe", "0.2.0") | about)
    _words(frame, "_index", [str(at) for at in range(rows)])
    return frame


def _numbers(group: Any, name: str, values: NDArray[Any]) -> None:
    chunks = tuple(max(1, side) for side in values.shape)
    group.create_array(name, data=values, chunks=chunks, attributes=_as("array", "0.2.0"))


def _words(group: Any, name: str, words: list[str]) -> None:
    values = np.array(words, np.dtypes.StringDType())
    group.create_array(name, data=values, attributes=_as("string-array", "0.2.0"))
