"""Sources of a slide's resolution, and the cases in which pathflip refuses to guess."""

import pytest

from pathflip.errors import SlideError
from pathflip.slides.scale import resolve_scale


@pytest.mark.parametrize(
    ("properties", "override", "mpp", "source"),
    [
        ({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.25"}, None, 0.25, "metadata"),
        ({"openslide.mpp-x": "0.2526", "openslide.mpp-y": "0.2530"}, None, 0.2528, "metadata"),
        ({"aperio.MPP": "0.499"}, None, 0.499, "metadata"),
        (
            {"tiff.XResolution": "20000", "tiff.ResolutionUnit": "centimeter"},
            None,
            0.5,
            "metadata",
        ),
        ({"tiff.XResolution": "50800", "tiff.ResolutionUnit": "inch"}, None, 0.5, "metadata"),
        ({"openslide.objective-power": "40"}, None, 0.25, "objective"),
        ({"openslide.mpp-x": "0.25", "openslide.objective-power": "20"}, None, 0.25, "metadata"),
        ({"openslide.mpp-x": "0.25"}, 0.5, 0.5, "override"),
        ({}, 0.2738, 0.2738, "override"),
        ({"openslide.mpp-x": "nan", "openslide.objective-power": "20"}, None, 0.5, "objective"),
        ({"openslide.mpp-x": "zero", "aperio.MPP": "0.3"}, None, 0.3, "metadata"),
    ],
)
def test_order_of_belief(properties, override, mpp, source):
    scale = resolve_scale(properties, name="a.svs", override=override)
    assert scale.mpp == pytest.approx(mpp)
    assert scale.source == source


@pytest.mark.parametrize(
    ("properties", "override", "code"),
    [
        ({}, None, "needs_mpp"),
        ({"tiff.XResolution": "72"}, None, "needs_mpp"),  # a number without a unit is no scale
        ({"openslide.mpp-x": "352.8"}, None, "mpp_out_of_range"),
        ({"openslide.mpp-x": "0.25"}, 20.0, "mpp_out_of_range"),
        ({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.5"}, None, "anisotropic_pixels"),
    ],
)
def test_refuses(properties, override, code):
    with pytest.raises(SlideError) as caught:
        resolve_scale(properties, name="a.svs", override=override)
    assert caught.value.code == code
    assert "a.svs" in str(caught.value) or override
    assert caught.value.hint
