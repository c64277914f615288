"""Tiled JPEG TIFFs that no test changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pathflip.synth.large import make_slide

TIFF_SIDE = 1500


@pytest.fixture(scope="session")
def tiffs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ycbcr.tif (256 px tiles, two levels) and rgb.svs (240 px tiles), 1500 px."""
    folder = tmp_path_factory.mktemp("tiff")
    make_slide(folder / "ycbcr.tif", width=TIFF_SIDE, height=TIFF_SIDE, mpp=0.5)
    make_slide(
        folder / "rgb.svs",
        width=TIFF_SIDE,
        height=TIFF_SIDE,
        mpp=0.5,
        tile_px=240,
        layout="aperio",
        components="rgb",
    )
    return folder


@pytest.fixture(scope="session")
def real() -> NDArray[np.uint8]:
    """Level-0 pixels of a real slide."""
    file = Path(__file__).parents[4] / "shared" / "slides" / "CMU-1-Small-Region.svs"
    if not file.exists():
        pytest.skip(f"{file.name} is not here")
    import openslide

    slide = openslide.OpenSlide(file)
    return np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))
