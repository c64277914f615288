"""Physical scale of a slide: µm per level-0 pixel, and the source of that number."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pathflip.errors import SlideError

MPP_MIN, MPP_MAX = 0.05, 10.0
MAX_ANISOTROPY = 0.05

_VENDOR_KEYS = (  # (x, y) pairs, µm per pixel, in the order they are believed
    ("openslide.mpp-x", "openslide.mpp-y"),
    ("aperio.MPP", "aperio.MPP"),
    ("mirax.LAYER_0_LEVEL_0_SECTION.MICROMETER_PER_PIXEL_X",) * 2,
)
_TIFF_UNIT_UM = {"centimeter": 10_000.0, "inch": 25_400.0}


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Resolution of level 0.

    Attributes:
        mpp: µm per level-0 pixel (mean of x and y).
        source: "override", "metadata" or "objective" (10 / power: approximate).
    """

    mpp: float
    source: Literal["override", "metadata", "objective"]


def resolve_scale(
    properties: Mapping[str, str], *, name: str, override: float | None = None
) -> Scale:
    """Decide a slide's resolution: override, then vendor metadata, then objective power.

    Args:
        properties: OpenSlide's property map.
        name: Name of the slide in errors.
        override: µm per pixel given by the user for this slide.

    Raises:
        SlideError: ``needs_mpp``, ``mpp_out_of_range`` or ``anisotropic_pixels``. Never guesses.
    """
    if override is not None:
        return Scale(mpp=_plausible(override, name, "the given mpp"), source="override")
    for key_x, key_y in _VENDOR_KEYS:
        x, y = _number(properties.get(key_x)), _number(properties.get(key_y))
        if x is not None:
            return Scale(mpp=_plausible(_isotropic(x, y, name), name, key_x), source="metadata")
    unit_um = _TIFF_UNIT_UM.get(properties.get("tiff.ResolutionUnit", ""))
    x = _number(properties.get("tiff.XResolution"))
    if unit_um and x:
        y = _number(properties.get("tiff.YResolution"))
        mpp = _isotropic(unit_um / x, unit_um / y if y else None, name)
        return Scale(mpp=_plausible(mpp, name, "tiff.XResolution"), source="metadata")
    power = _number(properties.get("openslide.objective-power"))
    if power:
        return Scale(mpp=_plausible(10.0 / power, name, "objective power"), source="objective")
    raise SlideError(
        f"{name} states no resolution.",
        hint="Give it in a CSV with the columns slide,mpp (--mpp-csv FILE).",
        code="needs_mpp",
    )


def _number(text: str | None) -> float | None:
    try:
        value = float(text) if text is not None else None
    except ValueError:
        return None
    return value if value is not None and math.isfinite(value) and value > 0 else None


def _isotropic(x: float, y: float | None, name: str) -> float:
    if y is None or x == y:
        return x
    if abs(x - y) > MAX_ANISOTROPY * min(x, y):
        raise SlideError(
            f"{name} has pixels of {x:g} by {y:g} µm.",
            hint="Pixels must be square within 5 %; give the true mpp in --mpp-csv if this is "
            "a metadata error.",
            code="anisotropic_pixels",
        )
    return (x + y) / 2


def _plausible(mpp: float, name: str, source: str) -> float:
    if not MPP_MIN <= mpp <= MPP_MAX:
        raise SlideError(
            f"{name} states {mpp:g} µm per pixel ({source}), outside {MPP_MIN} to {MPP_MAX}.",
            hint="If the metadata is wrong, give the true value in a CSV with the columns "
            "slide,mpp (--mpp-csv FILE).",
            code="mpp_out_of_range",
        )
    return mpp
