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
        ({"openslide.mpp-x": "0.05"}, 0.06, 0.06, "override"),  # oil immersion, as somebody says
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
        ({"openslide.mpp-x": "0.05"}, None, "mpp_out_of_range"),  # a tenth of the truth
        ({"openslide.objective-power": "400"}, None, "mpp_out_of_range"),
        ({"openslide.mpp-x": "0.25"}, 0.01, "mpp_out_of_range"),
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


def ome(**sizes: str) -> str:
    said = " ".join(f'{name}="{value}"' for name, value in sizes.items())
    return f'<?xml version="1.0"?><OME><Image><Pixels ID="Pixels:0" {said}></Pixels></Image></OME>'


TIFF = {"tiff.ResolutionUnit": "inch"}


@pytest.mark.parametrize(
    ("description", "properties", "mpp"),
    [
        (ome(PhysicalSizeX="0.5", PhysicalSizeY="0.5"), {}, 0.5),
        (ome(PhysicalSizeX="500", PhysicalSizeXUnit="nm"), {}, 0.5),
        (ome(PhysicalSizeX="0.00025", PhysicalSizeXUnit="mm"), {}, 0.25),
        (ome(PhysicalSizeX="0.5", PhysicalSizeXUnit="&#181;m"), {}, 0.5),
        (ome(PhysicalSizeX="0.5"), TIFF | {"tiff.XResolution": "72"}, 0.5),  # a default
        (ome(PhysicalSizeX="0.5"), TIFF | {"tiff.XResolution": "50800"}, 0.5),
        (ome(PhysicalSizeX="2", PhysicalSizeXUnit="pixel"), {"openslide.mpp-x": "0.3"}, 0.3),
        (ome(SizeX="2"), {"openslide.mpp-x": "0.3"}, 0.3),
        ("<Pixels and no more", {"openslide.mpp-x": "0.3"}, 0.3),
    ],
)
def test_ome_states_the_size_of_a_pixel(description, properties, mpp):
    scale = resolve_scale(properties, name="a.ome.tif", description=description)
    assert scale.mpp == pytest.approx(mpp)
    assert scale.source == "metadata"


def test_two_statements_that_differ_are_a_conflict():
    properties = TIFF | {"tiff.XResolution": "101600"}  # 0.25
    with pytest.raises(SlideError, match=r"0\.5 µm per pixel .OME. and 0\.25") as caught:
        resolve_scale(properties, name="a.tif", description=ome(PhysicalSizeX="0.5"))
    assert caught.value.code == "mpp_conflict"
    given = resolve_scale(
        properties, name="a.tif", description=ome(PhysicalSizeX="0.5"), override=0.5
    )
    assert given.mpp == 0.5


def test_pixels_that_are_not_quite_square_are_noted():
    wide = {"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.26"}
    scale = resolve_scale(wide, name="a.svs")
    assert scale.mpp == pytest.approx(0.255)
    assert "0.25 by 0.26" in scale.note
    nearly = {"openslide.mpp-x": "0.2526", "openslide.mpp-y": "0.2530"}
    assert not resolve_scale(nearly, name="a.svs").note
