"""HDF5 files of patch features: TRIDENT, CLAM, STAMP, AtlasPatch, and others like theirs.

=========== ===================================================================================
trident     ``features`` [n, d], ``coords`` [n, 2] level-0 px with attributes: patch_size,
            patch_size_level0, level0_width, level0_height, target_magnification
clam        ``features``, ``coords`` without attributes; ``patches/S.h5`` has patch_size,
            patch_level and downsample
stamp       ``feats`` fp16, ``coords`` in µm, attributes of the file: unit, tile_size_um, extractor
atlaspatch  ``coords`` [n, 5] (x0, y0, width and height read, level), ``features/<encoder>``
=========== ===================================================================================

A file may refer to others (external links, external and virtual storage): those are refused, or
a feature file from elsewhere could have any file of this machine read as its numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathflip.files import replacing
from pathflip.interop.features.record import FeatureFile, check_shape, reading, unusable

MAGIC = b"\x89HDF\r\n\x1a\n"
ROWS_PER_CHUNK = 1024
"""Rows of a chunk that is written: one row, as TRIDENT writes them, costs 15 times the reading."""
STAMP_VERSION = "2.4.0"
"""Version of STAMP whose layout is written; it refuses files of a newer one than itself."""
_FILE = "/"
_SMALL_CHUNK = 32
_TEXT = 4096  # characters of an attribute
NOTES = ("sha256", "name", "mpp_source", "tissue_mm2", "encoder_mpp", "region_um")
"""Attributes of coordinates that pathflip writes beside those of TRIDENT."""
_STAMP_KEYS = ("feats", "patch_embeddings")


def read_hdf5(path: Path, slide: str) -> list[FeatureFile]:
    """Return what an HDF5 file holds: one record for each encoder.

    A file of places alone gives one record of ``dim`` 0; one of whole slides' vectors none.

    Raises:
        SlideError: The file is damaged, or refers to others (``unreadable``).
    """
    import h5py

    with reading(path), h5py.File(path, "r") as file:
        about = _attributes(file)
        coords = dataset(path, file, "coords")
        places = {} if coords is None else _attributes(coords)
        if coords is not None and coords.shape[-1:] == (5,):
            return _atlaspatch(path, slide, file, coords, about)
        for key in _STAMP_KEYS:
            if (found := dataset(path, file, key)) is not None:
                return _stamp(path, slide, found, coords, about)
        features = dataset(path, file, "features")
        if features is None:
            return [] if coords is None else [_places(path, slide, coords, places)]
        if _is_of_slide(features, coords):
            return []
        return [_trident_or_clam(path, slide, file, features, coords, places)]


def _trident_or_clam(
    path: Path, slide: str, file: Any, features: Any, coords: Any, places: dict[str, Any]
) -> FeatureFile:
    n, dim = _shape(features)
    check_shape(path, n=n, dim=dim, coordinates=None if coords is None else len(coords))
    quality = dataset(path, file, "patch_quality")
    regions = dataset(path, file, "regions")
    for extra in (quality, regions):
        if extra is not None and (extra.ndim != 2 or len(extra) > n or extra.shape[1] > 4):
            raise unusable(path, f"has a table {extra.name} of another size than its patches")
    named = text(_attributes(features).get("encoder")) or _encoder_of(path)
    record = FeatureFile(
        path=path,
        format="trident" if "patch_size_level0" in places else "clam",
        slide=slide,
        n=n,
        dim=dim,
        read=partial(rows, path, "features"),
        coordinates=None if coords is None else partial(matrix, path, "coords", 2),
        encoder=named,
        revision=text(places.get("encoder_revision")),
        licence=text(places.get("encoder_licence")),
        quality=None if quality is None else partial(matrix, path, "patch_quality", 3),
        regions=None if regions is None else partial(matrix, path, "regions", 4),
    )
    return with_places(record, places)


def _places(path: Path, slide: str, coords: Any, places: dict[str, Any]) -> FeatureFile:
    check_shape(path, n=len(coords), dim=1)
    return with_places(
        FeatureFile(
            path=path,
            format="places",
            slide=slide.removesuffix("_patches"),
            n=len(coords),
            dim=0,
            read=partial(rows, path, "coords"),
            coordinates=partial(matrix, path, "coords", 2),
        ),
        places,
    )


def with_places(record: FeatureFile, places: Mapping[str, Any]) -> FeatureFile:
    """Add to a record what the attributes of its coordinates say."""
    from dataclasses import replace

    px, size0 = number(places.get("patch_size")), number(places.get("patch_size_level0"))
    if size0 is None and px is not None and (down := places.get("downsample")) is not None:
        # CLAM: pixels of patch_level, which are whole multiples of those of level 0.
        scale = number(np.ravel(down)[0]) or 0.0
        size0 = px * int(scale) * (number(places.get("custom_downsample")) or 1.0) or None
    magnification = number(places.get("target_magnification"))
    pixel_um = 10 / magnification if magnification else None
    width = number(places.get("level0_width"))
    height = number(places.get("level0_height"))
    return replace(
        record,
        size=size0,
        pixel_um=pixel_um,
        size_um=px * pixel_um if px and pixel_um else None,
        mpp=number(places.get("mpp")),
        extent=(int(width), int(height)) if width and height else None,
        notes={key: places[key] for key in NOTES if places.get(key) not in (None, "", "None")},
    )


def _stamp(
    path: Path, slide: str, features: Any, coords: Any, about: dict[str, Any]
) -> list[FeatureFile]:
    if about.get("feat_type", "tile") != "tile" or _is_of_slide(features, coords):
        return []
    n, dim = _shape(features)
    check_shape(path, n=n, dim=dim, coordinates=None if coords is None else len(coords))
    if coords is not None and about.get("unit") != "um":
        raise unusable(
            path,
            "does not say the unit of its coordinates",
            hint="STAMP writes the attribute unit since version 2: extract the features again.",
            code="unsupported",
        )
    size_um, px = number(about.get("tile_size_um")), number(about.get("tile_size_px"))
    return [
        FeatureFile(
            path=path,
            format="stamp",
            slide=slide,
            n=n,
            dim=dim,
            read=partial(rows, path, features.name.lstrip("/")),
            coordinates=None if coords is None else partial(matrix, path, "coords", 2),
            unit="um",
            size=size_um,
            size_um=size_um,
            pixel_um=size_um / px if size_um and px else None,
            mpp=number(about.get("mpp")),
            encoder=text(about.get("extractor")),
            revision=text(about.get("encoder_revision")),
            licence=text(about.get("encoder_licence")),
        )
    ]


def _atlaspatch(
    path: Path, slide: str, file: Any, coords: Any, about: dict[str, Any]
) -> list[FeatureFile]:
    group = item(path, file, "features")
    if group is None or not hasattr(group, "keys"):
        return []
    found = []
    for name in sorted(group):
        features = dataset(path, group, name)
        if features is None or features.ndim != 2:
            continue
        n, dim = _shape(features)
        check_shape(path, n=n, dim=dim, coordinates=len(coords))
        found.append(
            FeatureFile(
                path=path,
                format="atlaspatch",
                slide=slide,
                n=n,
                dim=dim,
                read=partial(rows, path, f"features/{name}"),
                coordinates=partial(matrix, path, "coords", 2),
                size=number(about.get("patch_size_level0")),
                mpp=number(about.get("mpp")),
                encoder=name,
            )
        )
    return found


# -- writing --------------------------------------------------------------------------------------


def write_trident(folder: Path, record: FeatureFile, *, px: int) -> list[Path]:
    """Write ``patches/S_patches.h5`` and ``features_<encoder>/S.h5`` as TRIDENT lays them out.

    Args:
        folder: Folder of the coordinates, ``20x_256px_0px_overlap``.
        record: The slide.
        px: Side of a patch as it was read.
    """
    attributes = _trident_attributes(record, px=px)
    places = folder / "patches" / f"{record.slide}_patches.h5"
    made = folder / f"features_{record.encoder}" / f"{record.slide}.h5"
    xy = _xy(record).astype(np.int64)
    _write(places, {"coords": xy}, {"coords": attributes})
    arrays: dict[str, NDArray[Any]] = {
        "features": record.read(0, record.n).astype(np.float32),
        "coords": xy,
    }
    for key, extra in (("patch_quality", record.quality), ("regions", record.regions)):
        if extra is not None and (values := extra()) is not None:
            arrays[key] = values.astype(np.float32) if key == "patch_quality" else values
    about = {"encoder": record.encoder, "name": record.slide, "savetodir": "."}
    _write(made, arrays, {"coords": attributes, "features": about})
    return [places, made]


def write_clam(folder: Path, record: FeatureFile) -> list[Path]:
    """Write a slide as CLAM does; its training reads the tensor alone.

    ``h5_files/S.h5`` has float32 features and int32 coordinates without attributes,
    ``pt_files/S.pt`` the features as a tensor, and ``patches/S.h5`` the size of patches.
    """
    import torch

    target = folder / "h5_files" / f"{record.slide}.h5"
    arrays: dict[str, NDArray[Any]] = {
        "features": record.read(0, record.n).astype(np.float32),
        "coords": _xy(record).astype(np.int32),
    }
    _write(target, arrays, {})
    places = folder / "patches" / f"{record.slide}.h5"
    size0 = round(record.size or 0)
    about: dict[str, Any] = {
        "patch_size": size0,
        "patch_level": 0,
        "downsample": (1.0, 1.0),
        "name": record.slide,
        "save_path": ".",
    }
    if record.extent is not None:
        about |= {"level_dim": record.extent, "downsampled_level_dim": record.extent}
    _write(places, {"coords": arrays["coords"]}, {"coords": about})
    tensor = folder / "pt_files" / f"{record.slide}.pt"
    tensor.parent.mkdir(parents=True, exist_ok=True)
    with replacing(tensor, one_writer=True) as part:
        torch.save(torch.from_numpy(arrays["features"]), part)
    return [target, places, tensor]


def write_stamp(folder: Path, record: FeatureFile, *, px: int) -> Path:
    """Write ``S.h5`` as STAMP does: fp16 features, coordinates in µm."""
    if record.mpp is None or record.size_um is None:
        raise unusable(record.path, "has no resolution", code="unsupported")
    target = folder / f"{record.slide}.h5"
    arrays: dict[str, NDArray[Any]] = {
        "feats": record.read(0, record.n).astype(np.float16),
        "coords": _xy(record) * record.mpp,
    }
    about = {
        "stamp_version": STAMP_VERSION,
        "extractor": record.encoder,
        "unit": "um",
        "tile_size_um": float(record.size_um),
        "tile_size_px": px,
        "code_hash": "pathflip",
        "feat_type": "tile",
        "mpp": record.mpp,
        "encoder_revision": record.revision,
        "encoder_licence": record.licence,
    }
    stated = {key: value for key, value in about.items() if value is not None}
    _write(target, arrays, {_FILE: stated})
    return target


def _trident_attributes(record: FeatureFile, *, px: int) -> dict[str, Any]:
    width, height = record.extent or (0, 0)
    magnification = 10 / record.pixel_um if record.pixel_um else 0
    whole = round(magnification)
    return {
        "patch_size": px,
        "patch_size_level0": round(record.size or 0),
        "level0_magnification": level0_magnification(record.mpp),
        "target_magnification": whole if abs(whole - magnification) < 1e-9 else magnification,
        "overlap": 0,
        "savetodir": ".",
        "level0_width": width,
        "level0_height": height,
        "mpp": record.mpp,
        "encoder_revision": record.revision,
        "encoder_licence": record.licence,
        **{"name": record.slide, **record.notes},
    }


def level0_magnification(mpp: float | None) -> int:
    """Return the magnification that TRIDENT calls a slide's level 0; 0 where it has none."""
    for below, magnification in ((0.16, 80), (0.2, 60), (0.3, 40), (0.6, 20), (1.2, 10), (2.4, 5)):
        if mpp is not None and mpp < below:
            return magnification
    return 0


def _write(
    path: Path, arrays: Mapping[str, NDArray[Any]], attributes: Mapping[str, Mapping[str, Any]]
) -> None:
    import h5py

    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, one_writer=True) as part, h5py.File(part, "w") as file:
        for name, value in attributes.get(_FILE, {}).items():
            file.attrs[name] = value
        for key, values in arrays.items():
            at_once = min(ROWS_PER_CHUNK, max(1, len(values)))
            # TRIDENT appends to its own files: they can grow.
            made = file.create_dataset(
                key,
                data=values,
                chunks=(at_once, values.shape[1]),
                maxshape=(None, values.shape[1]),
            )
            for name, value in attributes.get(key, {}).items():
                made.attrs[name] = "None" if value is None else value


def _xy(record: FeatureFile) -> NDArray[np.float64]:
    found = record.coordinates() if record.coordinates is not None else None
    if found is None:
        raise unusable(record.path, "has no places", code="unsupported")
    return found


# -- reading --------------------------------------------------------------------------------------


def item(path: Path, group: Any, key: str) -> Any:
    """Return a member that lies in the file itself; None where there is none."""
    import h5py

    if key not in group:
        return None
    if not isinstance(group.get(key, getlink=True), h5py.HardLink):
        raise unusable(path, f"takes {key} from elsewhere by a link")
    return group[key]


def dataset(path: Path, group: Any, key: str) -> Any:
    """Return a table of numbers that lies in the file itself; None where there is none."""
    import h5py

    found = item(path, group, key)
    if not isinstance(found, h5py.Dataset):
        return None
    if found.external or found.is_virtual:
        raise unusable(path, f"takes {key} from another file")
    if found.dtype.kind not in "fiu" or found.ndim not in (1, 2, 3):
        raise unusable(path, f"holds {key} that are no table of numbers")
    return found


def _shape(features: Any) -> tuple[int, int]:
    """Return n and d of features [n, d], also as [1, n, d]."""
    if features.ndim == 3 and features.shape[0] == 1:
        return int(features.shape[1]), int(features.shape[2])
    if features.ndim != 2:
        raise ValueError(f"features have the shape {features.shape}")
    return int(features.shape[0]), int(features.shape[1])


def _is_of_slide(features: Any, coords: Any) -> bool:
    """Return whether a vector is that of a whole slide: one, and no place or many."""
    if features.ndim == 1:
        return True
    return features.ndim == 2 and len(features) == 1 and coords is not None and len(coords) != 1


def _attributes(item: Any) -> dict[str, Any]:
    found = {}
    for key in item.attrs:
        value = item.attrs[key]
        if isinstance(value, bytes):
            value = value.decode(errors="replace")
        if isinstance(value, str):
            value = value[:_TEXT]
        elif isinstance(value, np.generic):
            value = value.item()
        elif isinstance(value, np.ndarray) and value.size > 16:
            continue
        found[str(key)] = value
    return found


def number(value: Any) -> float | None:
    """Return a positive number an attribute states; None of what is none, such as ``'None'``."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) and found > 0 else None


def text(value: Any) -> str | None:
    """Return the text an attribute states; None of none, also where it is spelled ``'None'``."""
    return value if isinstance(value, str) and value not in ("", "None") else None


def _encoder_of(path: Path) -> str | None:
    """Return the encoder that TRIDENT names in the folder of a file without the attribute."""
    for prefix in ("patch_features_", "features_"):
        if path.parent.name.startswith(prefix):
            return path.parent.name[len(prefix) :] or None
    return None


def matrix(path: Path, key: str, width: int) -> NDArray[np.float64]:
    """Read a small table, such as coordinates [n, 2]."""
    import h5py

    with reading(path), h5py.File(path, "r") as file:
        values = np.asarray(file[key][:, :width], np.float64)
        if values.shape[1] != width:
            raise ValueError(f"{key} has {values.shape[1]} columns")
        return values


def rows(path: Path, key: str, start: int, stop: int) -> NDArray[Any]:
    """Read features [stop - start, d]."""
    import h5py

    with reading(path), h5py.File(path, "r") as file:
        data = file[key]
        if data.ndim == 3:
            return np.asarray(data[0, start:stop])
        offsets = _row_offsets(data) if _is_cut_small(data) else None
        if offsets is None:
            return np.asarray(data[start:stop])
        return _gathered(path, offsets[start:stop], data.dtype, data.shape[1])


def _is_cut_small(data: Any) -> bool:
    """Return whether a table is stored plain, in chunks of a few whole rows."""
    plain = data.chunks is not None and data.id.get_create_plist().get_nfilters() == 0
    return bool(plain and data.chunks[0] < _SMALL_CHUNK and data.chunks[1] == data.shape[1])


def _row_offsets(data: Any) -> NDArray[np.int64] | None:
    """Return where in the file each row begins; None where some row is not stored."""
    high, size = data.chunks[0], data.dtype.itemsize * data.shape[1]
    offsets = np.full(-(-data.shape[0] // high), -1, np.int64)

    def note(chunk: Any) -> None:
        offsets[chunk.chunk_offset[0] // high] = chunk.byte_offset

    data.id.chunk_iter(note)
    if (offsets < 0).any():
        return None
    base = data.file.userblock_size
    every = base + offsets[:, None] + size * np.arange(high)
    return np.asarray(every.reshape(-1)[: data.shape[0]])


def _gathered(
    path: Path, offsets: NDArray[np.int64], dtype: np.dtype[Any], width: int
) -> NDArray[Any]:
    """Read rows that begin at these bytes, in runs that lie behind one another."""
    size = dtype.itemsize * width
    out = np.empty((len(offsets), width), dtype)
    breaks = np.flatnonzero(np.diff(offsets) != size) + 1
    with open(path, "rb", buffering=0) as content:
        for first, last in zip([0, *breaks], [*breaks, len(offsets)], strict=True):
            run = memoryview(out[first:last].reshape(-1).view(np.uint8).data)
            content.seek(int(offsets[first]) if len(run) else 0)
            while len(run):
                count = content.readinto(run)
                if not count:
                    raise ValueError("the file is cut off")
                run = run[count:]
    return out
