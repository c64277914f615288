"""Finds feature files in a folder, by what they hold, and joins them with their coordinates."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathflip.errors import ConfigError, SlideError
from pathflip.interop.features import apart, hdf5, slidechat, spatialdata, tables, tensors
from pathflip.interop.features.record import FeatureFile, reading
from pathflip.progress import Report

FORMATS = (
    "trident", "clam", "stamp", "atlaspatch", "slide2vec", "slidechat", "h5ad", "spatialdata", "pt",
)  # fmt: skip
_HDF5 = (".h5", ".hdf5", ".h5ad")
_TENSORS = (".pt", ".pth")
_ENDINGS = (*_HDF5, *_TENSORS, ".csv")
_CONTAINERS = (
    "patches", "h5_files", "pt_files", "tile_embeddings", "hierarchical_embeddings", "features",
    "tiles", "bags",
)  # fmt: skip
"""Folders whose names say what is in them, and not of which slide."""
_MAX_FILES = 1_000_000
_META_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Found:
    """Feature files of a folder.

    Attributes:
        files: One record for each slide and encoder, sorted by slide.
        problems: {path: reason} of files of features that cannot be used.
        others: Files that hold no patch features: coordinates alone, vectors of slides, tables.
    """

    files: list[FeatureFile]
    problems: dict[str, SlideError] = field(default_factory=dict)
    others: int = 0


def find_features(
    folder: str | Path, *, only: str = "auto", progress: Report | None = None
) -> Found:
    """Look at every file below a folder; no features are read.

    Args:
        folder: Folder of feature files, or one of its parents: a job of TRIDENT, a run of CLAM.
        only: Only files of this format; auto for all.
        progress: Progress callback.

    Raises:
        ConfigError: There is no such folder or format, or it holds no feature files
            (``no_features``).
    """
    root = Path(folder).expanduser().absolute()
    if only not in ("auto", *FORMATS):
        raise ConfigError(
            f"There is no format {only!r}.", hint=f"Known: auto, {', '.join(FORMATS)}."
        )
    if not root.exists():
        raise ConfigError(f"{folder} does not exist.", hint="Check --features.")
    records: list[FeatureFile] = []
    places: dict[str, FeatureFile] = {}
    problems: dict[str, SlideError] = {}
    others = 0
    read = apart.read_each(
        list(files_below(root, _ENDINGS)),
        lambda path: apart.read_features(path, slide_name(root, path)),
        what="looking at",
        problems=problems,
        progress=progress,
    )
    for _, made in read:
        for record in made:
            if record.dim:
                records.append(record)
            else:
                places[record.slide] = record
        others += not any(record.dim for record in made)
    files = _joined(records, places)
    if only != "auto":
        files = [record for record in files if record.format == only]
    if not files and not problems:
        raise ConfigError(
            f"{folder} holds no patch features"
            + ("." if only == "auto" else f" in the format {only}."),
            hint="pathflip reads .h5, .h5ad, .zarr, .pt and .csv at any depth, of "
            f"{', '.join(FORMATS)}.",
            code="no_features",
        )
    return Found(files=files, problems=problems, others=others)


def slide_name(root: Path, path: Path) -> str:
    """Return the name of a file's slide: its path without endings, below the folder of features."""
    parts = list(path.relative_to(root).parts) if path != root else [path.name]
    for at, part in reversed(list(enumerate(parts[:-1]))):
        if part in _CONTAINERS or part.startswith(("features_", "patch_features_")):
            parts = parts[at + 1 :]
            break
    return str(Path(*parts).with_suffix(""))


def files_below(root: Path, endings: Collection[str]) -> Iterator[Path]:
    """Yield the files with such endings in a folder, and its Zarr stores; a file is itself.

    Raises:
        ConfigError: There are too many.
    """
    if root.is_file():
        yield root
        return
    count = 0
    for folder, folders, names in os.walk(root):
        if spatialdata.is_zarr(names):
            folders.clear()
            yield Path(folder)
            continue
        folders.sort()
        for name in sorted(names):
            if name.startswith("."):
                continue
            if Path(name).suffix.lower() in endings:
                count += 1
                if count > _MAX_FILES:
                    raise ConfigError(
                        f"{root} holds more than {_MAX_FILES:,} files.",
                        hint="Import it folder by folder.",
                    )
                yield Path(folder) / name


def read_file(path: Path, slide: str) -> list[FeatureFile]:
    """Return the records of one file, read in this process; none where it is of another kind.

    Raises:
        SlideError: The file cannot be used.
    """
    if path.is_dir():
        return spatialdata.read_spatialdata(path, slide)
    with reading(path), path.open("rb") as file:
        head = file.read(8)
    ending = path.suffix.lower()
    if head == hdf5.MAGIC:
        return tables.read_h5ad(path, slide) if _is_h5ad(path) else hdf5.read_hdf5(path, slide)
    if head[:4] == tensors.MAGIC or ending in _TENSORS:
        return [_with_meta(record) for record in tensors.read_tensors(path, slide)]
    if ending == ".csv":
        try:
            return slidechat.read_slidechat(path, slide)
        except SlideError as error:
            if error.code == "unsupported":
                return []  # a list of slides, labels
            raise
    raise SlideError(f"{path.name} is no HDF5 file.", hint="Copy the file again, or leave it out.")


def _is_h5ad(path: Path) -> bool:
    import h5py

    with reading(path), h5py.File(path, "r") as file:
        return tables.is_h5ad(file)


def _joined(records: list[FeatureFile], places: dict[str, FeatureFile]) -> list[FeatureFile]:
    """Give records the places that lie in another file; of the same features keep one record."""
    kept: dict[tuple[str, str | None, int], FeatureFile] = {}
    rank = {"pt": 1, "slide2vec": 1}
    with_places = {
        (record.slide, record.n): record for record in records if record.coordinates is not None
    }
    for record in sorted(records, key=lambda one: (rank.get(one.format, 0), str(one.path))):
        found = places.get(record.slide)
        if found is not None and found.n == record.n:
            record = replace(
                record,
                coordinates=record.coordinates or found.coordinates,
                unit=record.unit if record.coordinates else found.unit,
                size=record.size or found.size,
                size_um=record.size_um or found.size_um,
                pixel_um=record.pixel_um or found.pixel_um,
                mpp=record.mpp or found.mpp,
                extent=record.extent or found.extent,
                notes={**found.notes, **record.notes},
            )
        twin = with_places.get((record.slide, record.n))
        if record.coordinates is None and twin is not None and twin.dim == record.dim:
            continue  # CLAM writes the same features to h5_files and pt_files
        kept.setdefault((record.slide, record.encoder, record.dim), record)
    return sorted(kept.values(), key=lambda one: (one.slide, one.encoder or ""))


def _with_meta(record: FeatureFile) -> FeatureFile:
    """Add to a .pt file what slide2vec writes beside it: ``S.meta.json``, ``S.coordinates.npz``."""
    path = record.path
    meta = path.with_name(f"{path.name.removesuffix(path.suffix)}.meta.json")
    if not meta.is_file() or meta.stat().st_size > _META_BYTES:
        return record
    with reading(path):
        about: dict[str, Any] = json.loads(meta.read_text(encoding="utf-8"))
        size = about.get("tile_size_lv0")
        spacing = about.get("requested_spacing_um")
        px = about.get("tile_size_px") or about.get("requested_tile_size_px")
    stem = path.name.removesuffix(path.suffix)
    beside = [path.parent, path.parent.parent / "tiles"]
    table = next(
        (one / f"{stem}.coordinates.npz" for one in beside
         if (one / f"{stem}.coordinates.npz").is_file()), None,
    )  # fmt: skip
    read: Callable[[], NDArray[np.float64] | None] | None = record.coordinates
    if read is None and table is not None:
        read = partial(_npz_places, table)
    return replace(
        record,
        format="slide2vec",
        encoder=str(about["encoder_name"]) if about.get("encoder_name") else None,
        coordinates=read,
        size=float(size) if size else None,
        pixel_um=float(spacing) if spacing else None,
        size_um=float(spacing) * float(px) if spacing and px else None,
    )


def _npz_places(path: Path) -> NDArray[np.float64]:
    """Return coordinates [n, 2] of an .npz file: a table, or columns x and y."""
    with reading(path), np.load(path, allow_pickle=False) as found:
        for pair in (("x", "y"), ("x_lv0", "y_lv0"), ("tile_x", "tile_y")):
            if all(name in found for name in pair):
                return np.stack([np.asarray(found[name], np.float64) for name in pair], axis=1)
        for name in ("coordinates", "coords", "arr_0"):
            if name in found:
                return np.asarray(found[name], np.float64)[:, :2]
        raise ValueError("no coordinates among " + ", ".join(found))
