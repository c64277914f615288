"""Patch features as annotated tables: AnnData's .h5ad, which Scanpy, Squidpy and LazySlide read.

Written as HDF5 by AnnData's layout (encoding 0.1.0 and 0.2.0), without the package: ``X`` are the
features, ``obs`` the patches (tile_id, x, y in level-0 px, row and column of the grid, region),
``obsm/spatial`` their centres, ``uns/pathflip`` what else is known. Read by the same keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathflip.files import replacing
from pathflip.interop.features.hdf5 import (
    NOTES,
    ROWS_PER_CHUNK,
    dataset,
    item,
    matrix,
    number,
    rows,
    text,
)
from pathflip.interop.features.record import FeatureFile, check_shape, reading, unusable


def is_h5ad(file: Any) -> bool:
    """Return whether an open HDF5 file is one of AnnData."""
    return "X" in file and "obs" in file


def read_h5ad(path: Path, slide: str) -> list[FeatureFile]:
    """Return the features of an .h5ad file.

    Raises:
        SlideError: It is damaged, or its table is sparse (``unsupported``).
    """
    import h5py

    with reading(path), h5py.File(path, "r") as file:
        features = dataset(path, file, "X")
        if features is None or features.ndim != 2:
            raise unusable(path, "holds no dense table of features", code="unsupported")
        n, dim = features.shape
        obsm = item(path, file, "obsm")
        spatial = None if obsm is None else dataset(path, obsm, "spatial")
        placed = None if spatial is None else len(spatial)
        check_shape(path, n=int(n), dim=int(dim), coordinates=placed)
        uns = item(path, file, "uns")
        about = None if uns is None else item(path, uns, "pathflip")
        facts = {} if about is None else {key: _value(path, about, key) for key in about}
    size = number(facts.get("patch_size_level0"))
    width, height = number(facts.get("width")), number(facts.get("height"))
    return [
        FeatureFile(
            path=path,
            format="h5ad",
            slide=slide,
            n=int(n),
            dim=int(dim),
            read=partial(rows, path, "X"),
            # Centres, from which the size is taken: without one they count as corners.
            coordinates=None if spatial is None or size is None else partial(_places, path, size),
            size=size,
            size_um=number(facts.get("patch_um")),
            pixel_um=number(facts.get("pixel_um")),
            mpp=number(facts.get("mpp")),
            encoder=text(facts.get("encoder")),
            revision=text(facts.get("encoder_revision")),
            licence=text(facts.get("encoder_licence")),
            extent=(int(width), int(height)) if width and height else None,
            notes={key: facts[key] for key in NOTES if facts.get(key) not in (None, "")},
        )
    ]


def write_h5ad(folder: Path, record: FeatureFile) -> Path:
    """Write ``S.h5ad``."""
    import h5py

    target = folder / f"{record.slide}.h5ad"
    target.parent.mkdir(parents=True, exist_ok=True)
    found = record.coordinates() if record.coordinates is not None else None
    places = np.zeros((record.n, 2)) if found is None else found
    size = round(record.size or 0)
    width, height = record.extent or (0, 0)
    facts: dict[str, Any] = {
        "mpp": record.mpp,
        "patch_size_level0": float(size),
        "patch_um": record.size_um,
        "pixel_um": record.pixel_um,
        "width": float(width),
        "height": float(height),
        "encoder": record.encoder,
        "encoder_revision": record.revision,
        "encoder_licence": record.licence,
        "slide": record.slide,
        **record.notes,
    }
    with replacing(target, one_writer=True) as part, h5py.File(part, "w") as file:
        _encode(file, "anndata", "0.1.0")
        chunk = (min(ROWS_PER_CHUNK, max(1, record.n)), record.dim)
        values = record.read(0, record.n).astype(np.float32)
        _encode(file.create_dataset("X", data=values, chunks=chunk), "array", "0.2.0")
        _frame(
            file,
            "obs",
            {
                "tile_id": np.arange(record.n),
                "x": places[:, 0].astype(np.int64),
                "y": places[:, 1].astype(np.int64),
            },
            index=[str(at) for at in range(record.n)],
        )
        _frame(file, "var", {}, index=[str(at) for at in range(record.dim)])
        for name in ("layers", "obsm", "obsp", "varm", "varp", "uns"):
            _encode(file.create_group(name), "dict", "0.1.0")
        _encode(file["obsm"].create_dataset("spatial", data=places + size / 2), "array", "0.2.0")
        own = _encode(file["uns"].create_group("pathflip"), "dict", "0.1.0")
        for key, value in facts.items():
            if value is not None:
                kind = "string" if isinstance(value, str) else "numeric-scalar"
                _encode(own.create_dataset(key, data=value), kind, "0.2.0")
    return target


def _encode(item: Any, kind: str, version: str) -> Any:
    item.attrs.update({"encoding-type": kind, "encoding-version": version})
    return item


def _frame(file: Any, name: str, columns: Mapping[str, NDArray[Any]], *, index: list[str]) -> None:
    import h5py

    group = _encode(file.create_group(name), "dataframe", "0.2.0")
    words = h5py.string_dtype()
    group.attrs["_index"] = "_index"
    group.attrs.create("column-order", list(columns), dtype=words)
    _encode(
        group.create_dataset("_index", data=np.array(index, object), dtype=words),
        "string-array",
        "0.2.0",
    )
    for column, values in columns.items():
        _encode(group.create_dataset(column, data=values), "array", "0.2.0")


def _value(path: Path, group: Any, key: str) -> Any:
    """Return a small value of ``uns``."""
    import h5py

    found = item(path, group, key)
    if not isinstance(found, h5py.Dataset) or found.shape != () or found.external:
        return None
    value = found[()]
    if isinstance(value, bytes):
        return value.decode(errors="replace")[:4096]
    return value.item() if isinstance(value, np.generic) else None


def _places(path: Path, size: float) -> NDArray[np.float64]:
    """Return corners of patches whose centres are in ``obsm/spatial``."""
    return matrix(path, "obsm/spatial", 2) - size / 2
