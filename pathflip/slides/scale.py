"""Physical scale of a slide: µm per level-0 pixel, and the source of that number."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pathflip.errors import SlideError

MPP_MIN, MPP_MAX = 0.1, 10.0
"""µm per pixel that a scanner's file may state; a tenth of the truth is a known converter fault."""
GIVEN_MIN = 0.02
"""Least that is believed of somebody who names the slide."""
SCALE_REASONS = ("needs_mpp", "mpp_out_of_range", "mpp_conflict", "anisotropic_pixels")
"""Codes of what a table of resolutions mends."""
MAX_ANISOTROPY = 0.05
MAX_CONFLICT = 0.01
"""Relative gap between two statements of one file."""

_VENDOR_KEYS = (  # (x, y) pairs, µm per pixel, in the order they are believed
    ("openslide.mpp-x", "openslide.mpp-y"),
    ("aperio.MPP", "aperio.MPP"),
    ("mirax.LAYER_0_LEVEL_0_SECTION.MICROMETER_PER_PIXEL_X",) * 2,
)
_TIFF_UNIT_UM = {"centimeter": 10_000.0, "inch": 25_400.0}
_OME_UNIT_UM = {"": 1.0, "µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4}


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Resolution of level 0.

    Attributes:
        mpp: µm per level-0 pixel (mean of x and y).
        source: "override", "metadata" or "objective" (10 / power: approximate).
        note: A sentence about pixels that are not quite square; empty if there is none.
    """

    mpp: float
    source: Literal["override", "metadata", "objective"]
    note: str = ""


def resolve_scale(
    properties: Mapping[str, str],
    *,
    name: str,
    override: float | None = None,
    description: str = "",
) -> Scale:
    """Decide a slide's resolution: override, then vendor metadata, then objective power.

    Args:
        properties: OpenSlide's property map.
        name: Name of the slide in errors.
        override: µm per pixel given by the user for this slide.
        description: Text of a TIFF's first page; OME-XML states the size of a pixel there.

    Raises:
        SlideError: One of ``SCALE_REASONS``. Never guesses.
    """
    if override is not None:
        return Scale(
            mpp=_plausible(override, name, "the given mpp", least=GIVEN_MIN), source="override"
        )
    stated = _stated(properties)
    if (ome := ome_mpp(description)) is not None:
        # Writers of OME-TIFF leave the TIFF's own resolution at a default, which is no scanner's.
        if (
            stated is not None
            and MPP_MIN <= stated[0] <= MPP_MAX
            and abs(stated[0] / ome[0] - 1) > MAX_CONFLICT
        ):
            raise SlideError(
                f"{name} states {ome[0]:g} µm per pixel (OME) and {stated[0]:g} ({stated[2]}).",
                hint=_GIVE,
                code="mpp_conflict",
            )
        stated = (*ome, "OME PhysicalSizeX")
    if stated is not None:
        x, y, source = stated
        mpp, note = _isotropic(x, y, name)
        return Scale(mpp=_plausible(mpp, name, source), source="metadata", note=note)
    power = _number(properties.get("openslide.objective-power"))
    if power:
        return Scale(mpp=_plausible(10.0 / power, name, "objective power"), source="objective")
    raise SlideError(
        f"{name} states no resolution.",
        hint="Give it in a CSV with the columns slide,mpp (--mpp-csv FILE).",
        code="needs_mpp",
    )


def ome_mpp(description: str) -> tuple[float, float | None] | None:
    """Return (x, y) µm per pixel of the first image in OME-XML; None if it does not say."""
    pixels = re.search(r"<(?:\w+:)?Pixels\b[^>]*>", description)
    if pixels is None:
        return None

    def um(axis: str) -> float | None:
        # By pattern: an XML parser expands whatever entities a hostile file declares.
        size = re.search(rf'\bPhysicalSize{axis}="([^"]*)"', pixels[0])
        unit = re.search(rf'\bPhysicalSize{axis}Unit="([^"]*)"', pixels[0])
        factor = _OME_UNIT_UM.get(html.unescape(unit[1]) if unit else "")
        value = _number(size[1] if size else None)
        return None if value is None or factor is None else value * factor

    x = um("X")
    return None if x is None else (x, um("Y"))


_GIVE = (
    "If the metadata is wrong, give the true value in a CSV with the columns slide,mpp "
    "(--mpp-csv FILE)."
)


def _stated(properties: Mapping[str, str]) -> tuple[float, float | None, str] | None:
    """Return (x, y, which property) of the resolution that OpenSlide's properties state."""
    for key_x, key_y in _VENDOR_KEYS:
        x, y = _number(properties.get(key_x)), _number(properties.get(key_y))
        if x is not None:
            return x, y, key_x
    unit_um = _TIFF_UNIT_UM.get(properties.get("tiff.ResolutionUnit", ""))
    x = _number(properties.get("tiff.XResolution"))
    if unit_um and x:
        y = _number(properties.get("tiff.YResolution"))
        return unit_um / x, unit_um / y if y else None, "tiff.XResolution"
    return None


def _number(text: str | None) -> float | None:
    try:
        value = float(text) if text is not None else None
    except ValueError:
        return None
    return value if value is not None and math.isfinite(value) and value > 0 else None


def _isotropic(x: float, y: float | None, name: str) -> tuple[float, str]:
    """Return the mean of both, and a note where they differ by more than scanners' rounding."""
    if y is None or x == y:
        return x, ""
    gap = abs(x - y) / min(x, y)
    if gap > MAX_ANISOTROPY:
        raise SlideError(
            f"{name} has pixels of {x:g} by {y:g} µm.",
            hint="Pixels must be square within 5 %; give the true mpp in --mpp-csv if this is "
            "a metadata error.",
            code="anisotropic_pixels",
        )
    note = f"pixels of {x:g} by {y:g} µm are taken as square" if gap > MAX_CONFLICT else ""
    return (x + y) / 2, note


def _plausible(mpp: float, name: str, source: str, *, least: float = MPP_MIN) -> float:
    if not least <= mpp <= MPP_MAX:
        raise SlideError(
            f"{name} states {mpp:g} µm per pixel ({source}), outside {least:g} to {MPP_MAX:g}.",
            hint=_GIVE,
            code="mpp_out_of_range",
        )
    return mpp
