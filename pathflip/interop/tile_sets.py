"""Labelled tiles from public data sets and from folders and tables of a user's own.

==========  ===================================================================================
folders     [split/]class/picture, whatever its name and depth below the class
csv         table of image, label[, mpp][, split][, patient]; paths relative to the table
nct-crc     NCT-CRC-HE-100K/CLASS/*.tif (train), CRC-VAL-HE-7K/CLASS/*.tif (test)
pcam        camelyonpatch_level_2_split_SPLIT_{x,y}.h5, and _meta.csv with the slide, if there
lc25000     lung_image_sets/CLASS, colon_image_sets/CLASS (jpeg)
mhist       annotations.csv and images/
digestpath  tissue-train-pos-v1/*.jpg with *_mask.jpg, tissue-train-neg/*.jpg
sicap       partition/Test/{Train,Test}.xlsx (or .csv) and images/
bach        Photos/CLASS/*.tif
==========  ===================================================================================

Nothing is opened but tables until :func:`read_tile`, which fails for one tile at a time. A layout
may lie in the folder given or in one folder below it, as archives unpack.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pathflip.errors import ConfigError, SlideError
from pathflip.interop.spreadsheet import read_sheet
from pathflip.interop.tables import bad_line, column, is_missing, known, needed_column, read_rows
from pathflip.slides.resample import on_white
from pathflip.splits import SPLITS, canonical_split

PICTURES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp"})
MIN_SIDE = 16
"""Smallest side of a tile, px."""


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One labelled picture, not opened yet.

    Attributes:
        name: Path below the folder of the set, or ``file[row]``.
        label: Class, as the set spells it.
        path: File of the picture.
        row: Row of an HDF5 file; None of a picture of its own.
        mpp: µm per pixel, where its table says so.
        split: train, val, test, or None where the set has none.
        group: Patient or slide it was cut from, where known; intervals resample groups.
    """

    name: str
    label: str
    path: Path
    row: int | None = None
    mpp: float | None = None
    split: str | None = None
    group: str | None = None


def read_tiles(source: str | Path, layout: str | None = None) -> list[Tile]:
    """List the tiles of a set, in a fixed order.

    Args:
        source: Folder of the set, or a CSV of tiles.
        layout: A name of the table above; by default ``csv`` for a file and ``folders``.

    Raises:
        ConfigError: There is no such layout (``layout``), the source does not have it or has no
            tile (``tiles``), or a package that reads it is missing (``missing_package``).
    """
    source = Path(source)
    if not source.exists():
        raise ConfigError(f"{source} does not exist.", hint="Check the path.", code="tiles")
    layout = layout or ("csv" if source.is_file() else "folders")
    if layout not in LAYOUTS:
        raise ConfigError(
            f"There is no layout {layout!r}.", hint=f"Known: {', '.join(LAYOUTS)}.", code="layout"
        )
    tiles = list(LAYOUTS[layout](source))
    if not tiles:
        raise ConfigError(
            f"{source} holds no tile in the layout {layout}.",
            hint="Give the folder that the set was unpacked into; pathflip.interop.tile_sets "
            "shows every layout.",
            code="tiles",
        )
    return sorted(tiles, key=lambda tile: (tile.name, tile.row or 0))


def read_tile(tile: Tile) -> NDArray[np.uint8]:
    """Read the pixels of a tile, uint8 RGB [h, w, 3].

    Raises:
        SlideError: ``not_a_file`` where there is none, ``unreadable`` where it is no picture, is
            damaged, or is smaller than 16 px.
    """
    if tile.row is not None:
        pixels = np.asarray(_h5(tile.path)["x"][tile.row])
    else:
        if not tile.path.is_file():
            raise SlideError(f"{tile.name} is missing.", code="not_a_file")
        try:
            # OpenCV would open the name itself, and cannot where it is not ASCII on some systems.
            content = np.fromfile(tile.path, np.uint8)
            decoded = cv2.imdecode(content, cv2.IMREAD_COLOR)
            if tile.path.suffix.lower() in (".png", ".webp"):  # these may be transparent
                whole = cv2.imdecode(content, cv2.IMREAD_UNCHANGED)
                if whole is not None and whole.dtype == np.uint8 and whole.shape[2:] == (4,):
                    rgba = np.asarray(cv2.cvtColor(whole, cv2.COLOR_BGRA2RGBA), np.uint8)
                    decoded = cv2.cvtColor(on_white(rgba), cv2.COLOR_RGB2BGR)
        except (cv2.error, OSError) as error:
            raise SlideError(f"{tile.name} cannot be read: {error}.") from error
        if decoded is None:
            raise SlideError(f"{tile.name} is no picture, or is damaged.")
        pixels = cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise SlideError(f"{tile.name} has pixels {pixels.dtype} {pixels.shape}, not 8-bit RGB.")
    if min(pixels.shape[:2]) < MIN_SIDE:
        raise SlideError(f"{tile.name} is {pixels.shape[1]} x {pixels.shape[0]} px: too small.")
    return np.asarray(pixels, np.uint8)


# -- layouts --------------------------------------------------------------------------------------


def _folders(root: Path) -> Iterator[Tile]:
    folders = _subfolders(root)
    splits = {canonical_split(folder.name) for folder in folders}
    if folders and splits <= set(SPLITS):
        for folder in folders:
            split = canonical_split(folder.name)
            for one in _subfolders(folder):
                yield from _class_folder(root, one, split=split)
        return
    for folder in folders:
        yield from _class_folder(root, folder)


def _table(file: Path) -> Iterator[Tile]:
    rows = read_rows(file)
    first = rows[0][1]
    image = needed_column(file, first, ("image", "path", "file", "filename", "tile"))
    label = needed_column(file, first, ("label", "class"))
    scale = column(file, first, ("mpp",))
    split = column(file, first, ("split", "partition"))
    group = column(file, first, ("patient", "patient_id", "group", "slide", "slide_id"))
    for line, row in rows:
        if is_missing(row[image]) or is_missing(row[label]):
            raise bad_line(file, line, "no image or no label")
        yield Tile(
            name=row[image],
            label=row[label],
            path=file.parent / row[image],
            mpp=_mpp(file, line, row[scale]) if scale else None,
            split=canonical_split(row[split]) if split else None,
            group=known(row[group]) if group else None,
        )


def _nct_crc(root: Path) -> Iterator[Tile]:
    parts: dict[str, str | None] = {
        "NCT-CRC-HE-100K": "train",
        "NCT-CRC-HE-100K-NONORM": "train",
        "CRC-VAL-HE-7K": "test",
    }
    found = [(root / name, split) for name, split in parts.items() if (root / name).is_dir()]
    if [folder.name for folder, _ in found][:2] == ["NCT-CRC-HE-100K", "NCT-CRC-HE-100K-NONORM"]:
        found.pop(1)  # the same tiles without stain normalisation
    for folder, split in found or [(root, parts.get(root.name))]:
        for one in _subfolders(folder):
            yield from _class_folder(root, one, split=split)


def _pcam(root: Path) -> Iterator[Tile]:
    for file in sorted(root.glob("*_x.h5")):
        labels = file.with_name(file.name.replace("_x.h5", "_y.h5"))
        if not labels.is_file():
            raise ConfigError(
                f"{file.name} is there and {labels.name} is not.",
                hint="Unpack both files of each split into the same folder.",
                code="tiles",
            )
        split = canonical_split(file.stem.removesuffix("_x").rpartition("_")[2])
        positive = np.asarray(_h5(labels)["y"]).reshape(-1)
        meta = file.with_name(file.name.replace("_x.h5", "_meta.csv"))
        slides: list[str | None] = [None] * len(positive)
        if meta.is_file():
            rows = [row for _, row in read_rows(meta)]
            if len(rows) != len(positive):
                raise ConfigError(
                    f"{meta.name} has {len(rows)} rows for {len(positive)} tiles.",
                    hint="Take both from the same release of the set.",
                    code="tiles",
                )
            slides = [known(row.get("wsi")) for row in rows]
        for row, value in enumerate(positive.tolist()):
            yield Tile(
                name=f"{file.name}[{row}]", label="tumour" if value else "normal", path=file,
                row=row, split=split, group=slides[row],
            )  # fmt: skip


def _lc25000(root: Path) -> Iterator[Tile]:
    root = _holding(root, "lung_image_sets", "colon_image_sets")
    for name in ("lung_image_sets", "colon_image_sets"):
        if (root / name).is_dir():
            for folder in _subfolders(root / name):
                yield from _class_folder(root, folder)


def _mhist(root: Path) -> Iterator[Tile]:
    root = _holding(root, "annotations.csv")
    file = root / "annotations.csv"
    if not file.is_file():
        return
    rows = read_rows(file)
    image = needed_column(file, rows[0][1], ("image name",))
    label = needed_column(file, rows[0][1], ("majority vote label",))
    split = column(file, rows[0][1], ("partition",))
    for _, row in rows:
        yield Tile(
            name=f"images/{row[image]}", label=row[label], path=root / "images" / row[image],
            split=canonical_split(row[split]) if split else None,
        )  # fmt: skip


def _digestpath(root: Path) -> Iterator[Tile]:
    for folder in (folder for folder in [root, *_subfolders(root)] if folder.is_dir()):
        match = re.match(r"tissue-(?:train|test)-(pos|neg)", folder.name)
        if match is None:
            continue
        label = {"pos": "malignant", "neg": "benign"}[match[1]]
        for tile in _class_folder(root, folder):
            if not tile.path.stem.endswith("_mask"):
                # 2018_64982_1-3_2019-02-25 21_57_36-lv1-….jpg: year and number of the patient
                patient = "_".join(tile.path.stem.split("_")[:2])
                yield Tile(name=tile.name, label=label, path=tile.path, group=patient)


def _sicap(root: Path) -> Iterator[Tile]:
    root = _holding(root, "partition")
    for name in ("Train", "Test"):
        stem = root / "partition" / "Test" / name
        file = next((f for s in (".csv", ".xlsx") if (f := stem.with_suffix(s)).is_file()), None)
        if file is None:
            continue
        rows = read_rows(file) if file.suffix == ".csv" else read_sheet(file)
        image = needed_column(file, rows[0][1], ("image_name",))
        for line, row in rows:
            marked = [grade for grade in ("NC", "G3", "G4", "G5") if row.get(grade, "") in _ONE]
            if len(marked) != 1:
                raise bad_line(file, line, f"{len(marked)} of NC, G3, G4 and G5 are 1")
            picture = row[image] if Path(row[image]).suffix else f"{row[image]}.jpg"
            yield Tile(
                name=f"images/{picture}", label=marked[0], path=root / "images" / picture,
                split=canonical_split(name), group=picture.partition("_")[0],
            )  # fmt: skip


def _bach(root: Path) -> Iterator[Tile]:
    root = _holding(root, "Photos")
    photos = root / "Photos"
    for folder in _subfolders(photos if photos.is_dir() else root):
        yield from _class_folder(root, folder)


_ONE = ("1", "1.0", "True", "TRUE")
LAYOUTS: dict[str, Callable[[Path], Iterable[Tile]]] = {
    "folders": _folders,
    "csv": _table,
    "nct-crc": _nct_crc,
    "pcam": _pcam,
    "lc25000": _lc25000,
    "mhist": _mhist,
    "digestpath": _digestpath,
    "sicap": _sicap,
    "bach": _bach,
}


def _subfolders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))


def _holding(root: Path, *names: str) -> Path:
    """Return the folder, or the only one below it, that holds one of some names."""
    folders = [root, *_subfolders(root)]
    return next((f for f in folders if any((f / name).exists() for name in names)), root)


def _class_folder(root: Path, folder: Path, *, split: str | None = None) -> Iterator[Tile]:
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in PICTURES and not path.name.startswith("."):
            name = path.relative_to(root).as_posix()
            yield Tile(name=name, label=folder.name, path=path, split=split)


def _mpp(file: Path, line: int, text: str) -> float | None:
    if is_missing(text):
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.05 <= value <= 10:
        raise bad_line(file, line, f"mpp is {text!r}, not from 0.05 to 10 µm per pixel")
    return value


@lru_cache(maxsize=8)
def _h5(path: Path) -> Any:
    import h5py

    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error}.", hint="Unpack it again (gunzip).", code="tiles"
        ) from error
