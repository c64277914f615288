"""Columns of an archive's tables, and the checksum of every row.

Every writer of a table writes exactly these columns, in this order. Which tables there are, and how
they depend on each other, is in :mod:`pathflip.archive.tables`.

Positions are level-0 pixels (``x0``, ``y0``, ``size0``) beside the slide's level-0 ``mpp`` (µm per
pixel). ``slides.fingerprint`` identifies content and cut (slide sha256, tiling, tissue settings),
not the encoders: those a slide has been embedded with are in ``slides.encoders``, and the revision
of each is fixed for the whole archive.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pathflip.geometry import TREE_NODES

SCHEMA_VERSION = 5
"""Version of the table layout; an archive with a higher one is refused. 2 added captions and
models, 3 patch trees, 4 a table of pictures apart from ``slides`` and embeddings that do not repeat
the patient, 5 slide encoders. An archive of an older version opens as it is; captions, models,
trees and slide encoders are added to it, the rest stays as it was made."""
NEW_LAYOUT = 4
"""Layout of a new archive: tables that came later are added with the first of their rows."""

CHECKSUM = "checksum"
PICTURE_COLUMNS = ("tissue_png", "thumbnail")
PATIENT = "patient_id"

_PIECE = 1 << 17  # numbers

_KEY = {b"lance-schema:unenforced-primary-key": b"true"}


def region_id(slide_id: str, *, rx: int, ry: int) -> str:
    """Return the key of the region at grid position (rx, ry) of a slide."""
    return f"{slide_id}/{rx}_{ry}"


def tree_id(slide_id: str, *, tx: int, ty: int) -> str:
    """Return the key of the patch tree whose root is at grid position (tx, ty) of a slide."""
    return f"{slide_id}/{tx}_{ty}"


def slug(name: str) -> str:
    """Return the name of an encoder or model reduced to [a-z0-9_], as table names carry it.

    Names too long for a file name are cut and told apart by a hash.
    """
    reduced = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    if not reduced:
        raise ValueError(f"encoder name {name!r} holds no letter or digit")
    if len(reduced) > 80:
        reduced = f"{reduced[:64]}_{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    return reduced


def features_table(encoder: str) -> str:
    """Return the name of the table that holds an encoder's patch features."""
    return f"features_{slug(encoder)}"


def embeddings_table(encoder: str) -> str:
    """Return the name of the table of an encoder's, or a model's, slide and region embeddings."""
    return f"embeddings_{slug(encoder)}"


def trees_table(encoder: str) -> str:
    """Return the name of the table that holds an encoder's features of patch trees."""
    return f"trees_{slug(encoder)}"


def _schema(
    key: str, fields: Sequence[tuple[str, pa.DataType]], metadata: Mapping[str, str] | None = None
) -> pa.Schema:
    columns = [
        pa.field(name, kind, nullable=name != key, metadata=_KEY if name == key else None)
        for name, kind in (*fields, (CHECKSUM, pa.string()))
    ]
    return pa.schema(columns, metadata=dict(metadata) if metadata else None)


def meta_schema() -> pa.Schema:
    """Return the schema of ``meta``: settings of the archive as JSON values."""
    return _schema("key", [("key", pa.string()), ("value", pa.string())])


def slides_schema(*, pictures: bool = True) -> pa.Schema:
    """Return the schema of ``slides``, the ledger: one row per slide, good or bad.

    With ``pictures`` it is all that is known of a slide; without, the stored table, beside which
    the pictures have a table of their own: rows that change would carry them along.

    ``width``, ``height``, ``bounds_*`` are level-0 px, ``mpp`` is µm per level-0 px, ``tissue_mpp``
    and ``thumbnail_mpp`` µm per pixel of those images, ``tissue_mm2`` mm². The thumbnail never
    shows the label or the macro image.
    """
    return _schema(
        "slide_id",
        [field for field in _slide_fields() if pictures or field[0] not in PICTURE_COLUMNS],
    )


def pictures_schema(metadata: Mapping[str, str] | None = None) -> pa.Schema:
    """Return the schema of ``pictures``: tissue mask (PNG) and thumbnail (JPEG) of a slide."""
    columns = [(name, pa.binary()) for name in PICTURE_COLUMNS]
    return _schema("slide_id", [("slide_id", pa.string()), *columns], metadata)


def _slide_fields() -> list[tuple[str, pa.DataType]]:
    i32, i64, f64, text = pa.int32(), pa.int64(), pa.float64(), pa.string()
    return [
        ("slide_id", text),
        ("uri", text),
        ("aliases", pa.list_(text)),
        ("status", text),
        ("reason", text),
        ("message", text),
        ("stage", text),
        ("sha256", text),
        ("bytes", i64),
        ("mtime_ns", i64),
        ("vendor", text),
        ("width", i64),
        ("height", i64),
        ("levels", i32),
        ("mpp", f64),
        ("mpp_source", text),
        ("bounds_x0", i64),
        ("bounds_y0", i64),
        ("reader", text),
        ("reader_note", text),
        ("patient_id", text),
        ("split", text),
        ("labels", text),
        ("n_regions", i32),
        ("n_patches", i64),
        ("tiles_ok", i64),
        ("tiles_bad", i64),
        ("attempts", i32),
        ("fingerprint", text),
        ("encoders", pa.list_(text)),
        ("tissue_png", pa.binary()),
        ("tissue_mpp", f64),
        ("tissue_mm2", f64),
        ("thumbnail", pa.binary()),
        ("thumbnail_mpp", f64),
        ("run_id", text),
        ("seconds", f64),
        ("ingested_at", pa.timestamp("us", tz="UTC")),
        ("package_version", text),
    ]


def regions_schema(slots: int, metadata: Mapping[str, str] | None = None) -> pa.Schema:
    """Return the schema of ``regions``.

    Args:
        slots: Patch slots of a region, row-major (256 by default).
        metadata: Schema metadata; the archive's settings, so that ``meta`` can be rebuilt.
    """
    scores = pa.list_(pa.float32(), slots)
    return _schema(
        "region_id",
        [
            ("region_id", pa.string()),
            ("slide_id", pa.string()),
            ("rx", pa.int32()),
            ("ry", pa.int32()),
            ("x0", pa.int64()),
            ("y0", pa.int64()),
            ("size0", pa.int32()),
            ("mpp", pa.float64()),
            ("tissue_fraction", pa.float32()),
            ("n_patches", pa.int32()),
            ("n_bad", pa.int32()),
            ("patch_mask", pa.list_(pa.uint8(), slots)),
            ("patch_tissue", scores),
            ("patch_blur", scores),
            ("patch_pen", scores),
        ],
        metadata,
    )


def features_schema(slots: int, dim: int, metadata: Mapping[str, str] | None = None) -> pa.Schema:
    """Return the schema of ``features_<encoder>``: fp16 [slots * dim] a region, slot-major."""
    return _schema(
        "region_id",
        [
            ("region_id", pa.string()),
            ("slide_id", pa.string()),
            ("features", pa.list_(pa.float16(), slots * dim)),
        ],
        metadata,
    )


def embeddings_schema(dim: int, metadata: Mapping[str, str] | None = None) -> pa.Schema:
    """Return the schema of ``embeddings_<encoder or model>``; ``kind`` is slide or region.

    The patient of a slide is in ``slides`` alone: there it can change without moving a vector.
    """
    return _schema(
        "id",
        [
            ("id", pa.string()),
            ("kind", pa.string()),
            ("slide_id", pa.string()),
            ("x0", pa.int64()),
            ("y0", pa.int64()),
            ("size0", pa.int32()),
            ("mpp", pa.float64()),
            ("tissue_fraction", pa.float32()),
            ("n_patches", pa.int32()),
            ("vector", pa.list_(pa.float32(), dim)),
        ],
        metadata,
    )


def caption_id(slide_id: str, source: str) -> str:
    """Return the key of a slide's caption from one source."""
    return f"{slide_id}/{source}"


def captions_schema() -> pa.Schema:
    """Return the schema of ``captions``, the text that goes with slides.

    ``text`` is empty where a source has questions only; ``sentences`` are those of ``text``;
    ``statements`` what the language model named in ``model`` made of it, empty until one did;
    ``qa`` is JSON, a list of {question, answer, choices?, category?}, or null.
    """
    text, many = pa.string(), pa.list_(pa.string())
    return _schema(
        "caption_id",
        [
            ("caption_id", text),
            ("slide_id", text),
            ("source", text),
            ("text", text),
            ("sentences", many),
            ("statements", many),
            ("model", text),
            ("qa", text),
        ],
    )


def trees_schema(metadata: Mapping[str, str] | None = None) -> pa.Schema:
    """Return the schema of ``trees``, the patch trees of MR-PLIP: one row per tree of 85 nodes.

    ``tx``, ``ty`` are the root's place on the grid of roots, ``x0``, ``y0``, ``size0`` its
    rectangle; ``levels`` is 3 where the slide is too coarse for the last 64 nodes. ``node_mask`` is
    1 where a node was read and has features; the rectangles are those of
    :func:`pathflip.geometry.patch_tree`. ``fault`` is why a tree is quarantined and null of a good
    one; a quarantined tree has no node and no features.
    """
    scores = pa.list_(pa.float32(), TREE_NODES)
    return _schema(
        "tree_id",
        [
            ("tree_id", pa.string()),
            ("slide_id", pa.string()),
            ("tx", pa.int32()),
            ("ty", pa.int32()),
            ("x0", pa.int64()),
            ("y0", pa.int64()),
            ("size0", pa.int32()),
            ("mpp", pa.float64()),
            ("levels", pa.int32()),
            ("fault", pa.string()),
            ("node_mask", pa.list_(pa.uint8(), TREE_NODES)),
            ("node_tissue", scores),
            ("node_blur", scores),
        ],
        metadata,
    )


def tree_features_schema(dim: int, metadata: Mapping[str, str] | None = None) -> pa.Schema:
    """Return the schema of ``trees_<encoder>``: fp16 [85 * dim] a tree, zero where masked."""
    return _schema(
        "tree_id",
        [
            ("tree_id", pa.string()),
            ("slide_id", pa.string()),
            ("features", pa.list_(pa.float16(), TREE_NODES * dim)),
        ],
        metadata,
    )


def tree_text_id(tree: str, source: str) -> str:
    """Return the key of a patch tree's text from one source."""
    return f"{tree}/{source}"


def tree_texts_schema() -> pa.Schema:
    """Return the schema of ``tree_texts``, the captions of a patch tree's nodes.

    ``captions`` has 85 items, null where a node has none; ``keywords`` is the vocabulary of the
    tree, best first; ``keyword_of`` says which are whose: uint16 [86] offsets, then uint8 indices
    into ``keywords``, little-endian. ``extractor`` is the version of the keyword extraction.
    """
    text, many = pa.string(), pa.list_(pa.string())
    return _schema(
        "text_id",
        [
            ("text_id", text),
            ("slide_id", text),
            ("tree_id", text),
            ("source", text),
            ("model", text),
            ("captions", many),
            ("keywords", many),
            ("keyword_of", pa.binary()),
            ("extractor", text),
        ],
    )


def annotations_schema() -> pa.Schema:
    """Return the schema of ``annotations``, the objects that people draw on slides.

    ``geometry`` is GeoJSON, level-0 px; ``x0``, ``y0``, ``x1``, ``y1`` its bounds and ``points``
    the number of its points; ``colour`` is #rrggbb or null; ``revision`` counts saves. ``sha256``
    is the digest of the slide it was drawn on. The row with the empty key counts the commits of the
    table, see :mod:`pathflip.archive.annotations`.
    """
    text, f64, moment = pa.string(), pa.float64(), pa.timestamp("us", tz="UTC")
    return _schema(
        "annotation_id",
        [
            ("annotation_id", text),
            ("slide_id", text),
            ("sha256", text),
            ("author", text),
            ("name", text),
            ("class", text),
            ("colour", text),
            ("object_type", text),
            ("geometry", text),
            ("x0", f64),
            ("y0", f64),
            ("x1", f64),
            ("y1", f64),
            ("points", pa.int32()),
            ("revision", pa.int64()),
            ("created", moment),
            ("updated", moment),
        ],
    )


def files_schema() -> pa.Schema:
    """Return the schema of ``files``; paths are relative to the archive."""
    return _schema(
        "path",
        [
            ("path", pa.string()),
            ("table", pa.string()),
            ("sha256", pa.string()),
            ("bytes", pa.int64()),
        ],
    )


def conform(data: pa.Table, schema: pa.Schema) -> pa.Table:
    """Bring rows into a schema's column order and types and fills ``checksum``.

    Raises:
        ValueError: If a column is missing or unknown, or the key holds nulls.
    """
    wanted = [name for name in schema.names if name != CHECKSUM]
    missing = [name for name in wanted if name not in data.column_names]
    unknown = [name for name in data.column_names if name not in schema.names]
    if missing or unknown:
        raise ValueError(f"columns missing: {missing}, unknown: {unknown}")
    fields = [schema.field(name) for name in wanted]
    columns = [data.column(field.name).cast(field.type) for field in fields]
    for field, column in zip(fields, columns, strict=True):
        if not field.nullable and column.null_count:
            raise ValueError(f"column {field.name} holds nulls")
    body = pa.Table.from_arrays(columns, schema=pa.schema(fields))
    return body.append_column(schema.field(CHECKSUM), row_checksum(body)).cast(schema)


def row_checksum(data: pa.Table | pa.RecordBatch) -> pa.Array:
    """Return the sha256 (hex) of every row over all columns but ``checksum``, in their order.

    A value enters as one byte (1 valid, 0 null) and its bytes: numbers little-endian, every NaN the
    same, null as zeros; text and binary with their length before them (int64); lists of text with
    their count; fixed-size lists as their raw values. The result does not depend on how the rows
    are cut into chunks.

    Raises:
        ValueError: If a column's type has no rule here, or a fixed-size list holds null items.
    """
    batches = [data] if isinstance(data, pa.RecordBatch) else data.to_batches()
    digests: list[str] = []
    for batch in batches:
        parts: list[Any] = []
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            if name != CHECKSUM:
                parts += _row_bytes(column)
        for row in range(batch.num_rows):
            digest = hashlib.sha256()
            for part in parts:
                digest.update(part[row])
            digests.append(digest.hexdigest())
    return pa.array(digests, pa.string())


def intact_rows(data: pa.Table | pa.RecordBatch) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return bool [n]: rows whose stored checksum is the one of their values."""
    stored = data.column(CHECKSUM).to_pylist()
    computed = row_checksum(data).to_pylist()
    return np.array([a == b for a, b in zip(stored, computed, strict=True)], dtype=np.bool_)


def _row_bytes(column: pa.Array) -> list[Any]:
    """Return sequences whose items, row by row, are the bytes that are hashed."""
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_binary(kind):
        return [[_sized(value) for value in column.to_pylist()]]
    if pa.types.is_list(kind) and pa.types.is_string(kind.value_type):
        return [
            [
                b"\0"
                if items is None
                else b"\1" + struct.pack("<q", len(items)) + b"".join(map(_sized, items))
                for items in column.to_pylist()
            ]
        ]
    valid = np.asarray(column.is_valid()).astype(np.uint8)
    if pa.types.is_fixed_size_list(kind):
        width = kind.list_size
        items = column.values.slice(column.offset * width, len(column) * width)
        if column.null_count:
            items = items.fill_null(0)
        if items.null_count:
            raise ValueError("fixed-size lists must not hold null items")
        raw = _numbers(items).reshape(len(column), -1)
        if column.null_count:
            raw = raw * valid[:, None]
        return [[b"\1" if ok else b"\0" for ok in valid], raw]
    raw = _numbers(column).reshape(len(column), -1)
    narrow = np.concatenate([valid[:, None], raw], axis=1)
    width, flat = narrow.shape[1], narrow.tobytes()
    return [[flat[i * width : (i + 1) * width] for i in range(len(column))]]


def _sized(value: str | bytes | None) -> bytes:
    if value is None:
        return b"\0"
    raw = value.encode() if isinstance(value, str) else value
    return b"\1" + struct.pack("<q", len(raw)) + raw


def _without_nan_bits(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return numbers with every NaN the same: most often there is none, and nothing is copied."""
    flat = values.reshape(-1)
    for at in range(0, flat.size, _PIECE):  # a piece's booleans stay in the CPU's cache
        if _is_nan(flat[at : at + _PIECE]).any():
            return np.where(_is_nan(values), np.array(np.nan, values.dtype), values)
    return values


def _is_nan(values: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    if values.dtype != np.float16:
        return np.asarray(np.isnan(values))
    # numpy widens each number first; by its bits it takes a fifth of the time.
    return np.asarray((values.view(np.uint16) & np.uint16(0x7FFF)) > np.uint16(0x7C00))


def _numbers(column: pa.Array) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the raw little-endian bytes [n, width] of a column of numbers, null as zeros."""
    kind = column.type
    if pa.types.is_boolean(kind):
        column = column.cast(pa.uint8())
    elif pa.types.is_timestamp(kind):
        column = column.cast(pa.int64())
    elif not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise ValueError(f"no checksum rule for columns of type {kind}")
    if column.null_count:
        column = column.fill_null(pa.scalar(0, pa.int8()).cast(column.type))
    values = column.to_numpy(zero_copy_only=False)
    if values.dtype.kind == "f":
        values = _without_nan_bits(values)
    values = np.ascontiguousarray(values.astype(values.dtype.newbyteorder("<"), copy=False))
    raw: np.ndarray[Any, np.dtype[np.uint8]] = values.view(np.uint8)
    return raw.reshape(len(values), values.dtype.itemsize)
