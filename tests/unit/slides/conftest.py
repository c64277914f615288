"""Tiled JPEG TIFFs that no test changes."""

from __future__ import annotations

from pathlib import Path

import pytest

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
