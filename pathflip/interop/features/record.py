"""Records of a slide's patch features and of its vector, between tools' files and the archive."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pathflip.errors import SlideError

MAX_PATCHES = 4_000_000
"""Patches of a slide; 1 mm² has 61 of 128 µm, a glass slide of 25 x 75 mm 114,000."""
MAX_DIM = 65_536

Coordinates = Callable[[], "NDArray[np.float64] | None"]
Rows = Callable[[int, int], "NDArray[Any]"]


@dataclass(frozen=True, kw_only=True)
class FeatureFile:
    """Patch features of one slide as a tool stored them; nothing large is read yet.

    Attributes:
        path: The file.
        format: Name of its format.
        slide: Name of the slide, without endings; folders below the one of the features are kept.
        n: Number of patches.
        dim: Width of a feature.
        read: Function of (start, stop) that returns these features [stop - start, dim]. They may
            lie in memory that the thread's next reading overwrites.
        coordinates: Function that returns the top left corners (x, y) of the patches [n, 2], in
            ``unit``; None where the file has no places.
        unit: Unit of the coordinates: level-0 px, or µm.
        size: Side of a patch, in ``unit``.
        size_um: Side of a patch by its nominal resolution, µm (256 px at 20x are 128 µm).
        pixel_um: Nominal resolution the patches were read at, µm/px.
        mpp: µm per level-0 px, where the file states it.
        encoder: Name of the encoder, as the tool spells it.
        revision: Revision of the encoder's weights.
        licence: Licence of the encoder's weights.
        extent: Width and height of the slide, level-0 px.
        notes: Further facts about the slide and its cut: sha256, name (its file's), tissue_mm2,
            mpp_source, encoder_mpp, region_um.
        quality: Function that returns tissue share, blur and pen scores of the patches [n, 3].
        regions: Function that returns (rx, ry, tissue_fraction, n_bad) of regions [r, 4].
    """

    path: Path
    format: str
    slide: str
    n: int
    dim: int
    read: Rows = field(repr=False)
    coordinates: Coordinates | None = field(default=None, repr=False)
    unit: Literal["px", "um"] = "px"
    size: float | None = None
    size_um: float | None = None
    pixel_um: float | None = None
    mpp: float | None = None
    encoder: str | None = None
    revision: str | None = None
    licence: str | None = None
    extent: tuple[int, int] | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)
    quality: Coordinates | None = field(default=None, repr=False)
    regions: Coordinates | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True, eq=False)
class SlideVector:
    """Vector of a slide as a tool stored it.

    Attributes:
        path: The file.
        slide: Name of the slide, without endings; folders below that of the features are kept.
        vector: The vector [d].
        encoder: Name of the slide encoder, as the tool spells it.
        one_row: Whether it was stored as a matrix of one row, as the features of one patch are.
    """

    path: Path
    slide: str
    vector: NDArray[Any]
    encoder: str | None = None
    one_row: bool = False


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what libraries raise of a damaged file into the error of one slide.

    Raises:
        SlideError: The file is missing or damaged (``unreadable``).
    """
    import zipfile
    import zlib

    try:
        yield
    except (
        OSError,
        KeyError,
        IndexError,
        ValueError,
        TypeError,
        RuntimeError,
        OverflowError,
        zlib.error,
        zipfile.BadZipFile,
    ) as error:
        raise unusable(path, f"is damaged or not what its name says ({_short(error)})") from error


def unusable(path: Path, what: str, *, hint: str = "", code: str = "unreadable") -> SlideError:
    """Return the error for a file of features; ``what`` follows its name."""
    hint = hint or "Copy the file again, or leave it out."
    return SlideError(f"{path.name} {what}.", hint=hint, code=code)


def check_shape(path: Path, *, n: int, dim: int, coordinates: int | None = None) -> None:
    """Refuse features that are too many or too wide, or as many as the coordinates are not.

    Raises:
        SlideError: They are (``unsupported``, ``unreadable``).
    """
    if n > MAX_PATCHES or not 0 < dim <= MAX_DIM:
        raise unusable(
            path,
            f"holds {n:,} patches of {dim:,} numbers",
            hint=f"A slide may have {MAX_PATCHES:,} patches of up to {MAX_DIM:,}.",
            code="unsupported",
        )
    if coordinates is not None and coordinates != n:
        raise unusable(path, f"holds {n:,} features and {coordinates:,} coordinates")


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 120 else f"{text[:119]}…"
