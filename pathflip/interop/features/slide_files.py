"""Vectors of whole slides in the files of other tools.

======================= ========================================================================
a file for each slide   TRIDENT's ``slide_features_<encoder>/S.h5`` (``features`` [d]); STAMP's
                        ``feats``, by its attribute ``feat_type``; AtlasPatch's group
                        ``slide_features``; ``.pt``, ``.npy`` and ``.npz`` with one vector;
                        LazySlide's stores, where it aggregated features over the slide
a table of many slides  CSV, TSV and Parquet with a column ``slide`` and numbered columns, Parquet
                        also with a column of lists; ``.npz`` of names and a matrix; AnnData whose
                        ``obs`` are slides
======================= ========================================================================

Files of patch features, of places and of other tables are counted and left alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathflip.errors import ConfigError, SlideError
from pathflip.interop.features import apart, hdf5, tensors
from pathflip.interop.features.find import files_below
from pathflip.interop.features.record import MAX_DIM, SlideVector, reading, unusable
from pathflip.interop.features.spatialdata import read_aggregates
from pathflip.interop.features.tables import is_h5ad
from pathflip.progress import Report

ENDINGS = (".h5", ".hdf5", ".h5ad", ".pt", ".pth", ".npy", ".npz", ".csv", ".tsv", ".parquet")
PREFIX = "slide_features_"
_VECTOR_KEYS = ("features", "feats", "embeddings", "embedding", "vectors", "vector", "feature")
_NAME_KEYS = ("slide", "slide_id", "slides", "slide_ids", "filename", "filenames", "names", "wsi")
_PATIENT_KEYS = ("patient", "patient_id", "case", "case_id")
_NUMBERED = re.compile(r"^(.*?)(\d+)$")


@dataclass(frozen=True, kw_only=True)
class SlideVectors:
    """Vectors of slides in a file or a folder.

    Attributes:
        found: The vectors, in the order of the files.
        problems: {path: reason} of files that cannot be used.
        others: Files that hold no vectors of slides.
    """

    found: list[SlideVector]
    problems: dict[str, SlideError] = field(default_factory=dict)
    others: int = 0


def read_slide_vectors(path: str | Path, *, progress: Report | None = None) -> SlideVectors:
    """Read the vectors of slides in a file, or in the files below a folder.

    Args:
        path: File, or folder: one of vectors, or any of its parents.
        progress: Progress callback.

    Raises:
        ConfigError: There is no such path or nothing of slides there (``no_features``), or the
            vectors are of patients (``patient_vectors``).
    """
    root = Path(path).expanduser().absolute()
    if not root.exists():
        raise ConfigError(f"{path} does not exist.", hint="Check --slide-features.")
    found: list[SlideVector] = []
    problems: dict[str, SlideError] = {}
    others: list[Path] = []
    read = apart.read_each(
        list(files_below(root, ENDINGS)),
        lambda file: apart.read_vectors(file, _slide_name(root, file)),
        what="reading",
        problems=problems,
        progress=progress,
    )
    for file, made in read:
        found += made
        others += [] if made else [file]
    mixed = {(file.parent, file.suffix) for file in others}
    for one in [
        one for one in found if one.one_row and (one.path.parent, one.path.suffix) in mixed
    ]:
        found.remove(one)
        problems[str(one.path)] = unusable(
            one.path,
            "has one row, beside files of patches: it may be the vector of a slide or of a patch",
            hint="Give a folder of vectors of slides alone.",
            code="unclear",
        )
    if not found and not problems:
        raise ConfigError(
            f"{path} holds no vectors of slides.",
            hint="A file for each slide (.h5, .pt, .npy), or a table with a column slide and "
            "numbered columns (docs/howto/interop.md).",
            code="no_features",
        )
    return SlideVectors(found=found, problems=problems, others=len(others))


def _slide_name(root: Path, path: Path) -> str:
    parts = list(path.relative_to(root).parts) if path != root else [path.name]
    for at, part in reversed(list(enumerate(parts[:-1]))):
        if part.startswith(PREFIX):
            parts = parts[at + 1 :]
            break
    return str(Path(*parts).with_suffix(""))


def _encoder_of(path: Path) -> str | None:
    """Return the encoder that TRIDENT names in a folder above a file."""
    for part in reversed(path.parts[:-1]):
        if part.startswith(PREFIX):
            return part.removeprefix(PREFIX) or None
    return None


def read_file(path: Path, slide: str) -> list[SlideVector]:
    """Return the vectors of one file, read in this process; none where it holds something else.

    Raises:
        SlideError: The file cannot be used.
        ConfigError: Its vectors are of patients.
    """
    if path.is_dir():
        return [
            one
            for encoder, vector in read_aggregates(path)
            for one in _one(path, slide, vector.reshape(-1), encoder)
        ]
    ending = path.suffix.lower()
    if ending in (".csv", ".tsv", ".parquet"):
        return _of_table(path)
    if ending == ".npz":
        return _of_npz(path, slide)
    if ending == ".npy":
        with reading(path):
            values = np.load(path, allow_pickle=False)
        return _one(path, slide, values)
    if ending in (".pt", ".pth"):
        return _of_tensors(path, slide)
    return _of_hdf5(path, slide)


def _one(path: Path, slide: str, values: Any, encoder: str | None = None) -> list[SlideVector]:
    """Return the record of an array that is one vector, [d] or [1, d]; none of any other."""
    shape = tuple(size for size in np.shape(values)[:-1] if size != 1)
    if np.ndim(values) == 0 or shape:
        return []
    vector = np.asarray(values).reshape(-1)
    if vector.dtype.kind not in "fiu" or not 0 < len(vector) <= MAX_DIM:
        raise unusable(path, f"holds {len(vector):,} values that are no vector", code="unsupported")
    named = encoder or _encoder_of(path)
    one_row = np.ndim(values) > 1
    return [SlideVector(path=path, slide=slide, vector=vector, encoder=named, one_row=one_row)]


def _many(
    path: Path, names: Sequence[str], matrix: NDArray[Any], encoder: str | None = None
) -> list[SlideVector]:
    if matrix.ndim != 2 or len(matrix) != len(names) or matrix.dtype.kind not in "fiu":
        raise unusable(
            path,
            f"has {len(names):,} names and vectors of shape {matrix.shape}",
            code="unsupported",
        )
    if not 0 < matrix.shape[1] <= MAX_DIM:
        raise unusable(path, f"has vectors of {matrix.shape[1]:,} numbers", code="unsupported")
    named = encoder or _encoder_of(path)
    return [
        SlideVector(path=path, slide=str(name), vector=row, encoder=named)
        for name, row in zip(names, matrix, strict=True)
    ]


def _of_hdf5(path: Path, slide: str) -> list[SlideVector]:
    import h5py

    with reading(path), h5py.File(path, "r") as file:
        if is_h5ad(file):
            return _of_h5ad(path, file)
        kind = str(file.attrs.get("feat_type", ""))
        if kind == "patient":
            raise of_patients(path)
        encoder = hdf5.text(file.attrs.get("encoder")) or hdf5.text(file.attrs.get("extractor"))
        group = hdf5.item(path, file, "slide_features")
        if isinstance(group, h5py.Group):
            return [
                one
                for name in group
                if (data := hdf5.dataset(path, group, name)) is not None
                for one in _one(path, slide, data[()], str(name))
            ]
        coords = hdf5.dataset(path, file, "coords")
        for key in _VECTOR_KEYS:
            if (data := hdf5.dataset(path, file, key)) is None:
                continue
            places = 0 if coords is None or coords.ndim < 2 else len(coords)
            if kind == "tile" or (data.ndim > 1 and data.shape[-2] == places):
                return []  # features of patches, be it of one
            if kind != "slide" and data.ndim > 1 and data.shape[-2] != 1:
                return []
            named = hdf5.text(data.attrs.get("encoder")) or encoder
            return _one(path, slide, data[()], named)
    return []


def _of_h5ad(path: Path, file: Any) -> list[SlideVector]:
    matrix = hdf5.dataset(path, file, "X")
    obsm, obs = hdf5.item(path, file, "obsm"), hdf5.item(path, file, "obs")
    if "x" in obs or (obsm is not None and "spatial" in obsm):
        return []  # patches
    if matrix is None:
        raise unusable(path, "holds no dense table X", code="unsupported")
    index = str(obs.attrs.get("_index", "_index"))
    names = hdf5.item(path, obs, index)
    if names is None:
        raise unusable(path, "does not name the rows of its table", code="unsupported")
    return _many(path, [_text(name) for name in names[()]], matrix[()])


def _of_tensors(path: Path, slide: str) -> list[SlideVector]:
    with reading(path):
        found = tensors.load_tensors(path)
    if isinstance(found, dict):
        found = next((found[key] for key in _VECTOR_KEYS if key in found), None)
    if not isinstance(found, tensors.Tensor):
        raise unusable(
            path,
            "holds no tensor of a slide",
            hint="It should hold a tensor [width], or a dictionary with features.",
            code="unsupported",
        )
    if any(size != 1 for size in found.shape[:-1]) or not found.shape:
        return []
    vector = tensors.read_vector(path, found)
    return _one(path, slide, vector if len(found.shape) == 1 else vector[None])


def _of_npz(path: Path, slide: str) -> list[SlideVector]:
    with reading(path), np.load(path, allow_pickle=False) as file:
        key = next((key for key in _VECTOR_KEYS if key in file), None)
        if key is None and file.files == ["arr_0"]:
            key = "arr_0"
        if key is None:
            return []
        values = file[key]
        named = next((name for name in _NAME_KEYS if name in file), None)
        if named is None:
            if any(name in file for name in _PATIENT_KEYS):
                raise of_patients(path)
            return _one(path, slide, values)
        names = np.atleast_1d(file[named])
    if names.dtype.kind not in "US":
        raise unusable(path, f"has names {named} that are no text", code="unsupported")
    return _many(path, [_text(name) for name in names], np.atleast_2d(values))


def _of_table(path: Path) -> list[SlideVector]:
    """Return the rows of a table; none of a table that has no vectors."""
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet as pq

    with reading(path):
        if path.suffix.lower() == ".parquet":
            rows = pq.read_table(path)
        else:
            tab = path.suffix.lower() == ".tsv"
            parse = pyarrow.csv.ParseOptions(delimiter="\t" if tab else ",")
            words = dict.fromkeys((*_NAME_KEYS, *_PATIENT_KEYS), pa.string())
            convert = pyarrow.csv.ConvertOptions(column_types=words)
            rows = pyarrow.csv.read_csv(path, parse_options=parse, convert_options=convert)
    columns = {name.lower(): name for name in rows.column_names}
    lists = [
        name
        for key, name in columns.items()
        if key in _VECTOR_KEYS and hasattr(rows.schema.field(name).type, "value_type")
    ]
    numbered = _numbered(rows.column_names)
    if not lists and len(numbered) < 2:
        return []
    name = next((columns[key] for key in _NAME_KEYS if key in columns), None)
    if name is None:
        if any(key in columns for key in _PATIENT_KEYS):
            raise of_patients(path)
        raise unusable(
            path,
            "has vectors and no column that names slides",
            hint="Name that column slide.",
            code="unsupported",
        )
    if rows[name].null_count:
        raise unusable(path, f"has rows without a {name}", code="unsupported")
    names = [str(value) for value in rows[name].to_pylist()]
    with reading(path):
        if lists:
            values = rows[lists[0]].to_pylist()
            if len({len(value) if value is not None else -1 for value in values}) > 1:
                raise unusable(path, "has vectors of several lengths", code="unsupported")
            matrix = np.asarray(values, np.float64)
        else:
            matrix = np.stack(
                [rows[column].to_numpy(zero_copy_only=False) for column in numbered], 1
            )
    if matrix.dtype.kind not in "fiu":
        raise unusable(path, "has numbered columns that hold text", code="unsupported")
    return _many(path, names, matrix)


def _numbered(names: Sequence[str]) -> list[str]:
    """Return the columns that are numbered on from 0 or 1; of several such series the longest."""
    series: dict[str, dict[int, str]] = {}
    for name in names:
        if (match := _NUMBERED.match(name)) is not None:
            series.setdefault(match[1], {})[int(match[2])] = name
    whole = [
        [held[at] for at in sorted(held)]
        for held in series.values()
        if sorted(held) in (list(range(len(held))), list(range(1, len(held) + 1)))
    ]
    return max(whole, key=len, default=[])


def of_patients(path: Path) -> ConfigError:
    """Return the error for vectors of patients, which are of no slide."""
    return ConfigError(
        f"{path.name} holds vectors of patients, not of slides.",
        hint="Import vectors that were made slide by slide; a patient's slides share none here.",
        code="patient_vectors",
    )


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
