"""DICOM slides whose headers and frames state different colours: refused, never shown green."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from pathflip.errors import SlideError
from pathflip.slides.slide import Slide
from pathflip.slides.tiles import jpeg_colours
from tests.unit.slides import layouts
from tests.unit.slides.dicom_files import corrected, jpeg_frames, without_jfif, write_level

TILE = 128
PIXELS = layouts.picture(512, 384)
REAL = Path(__file__).parents[4] / "shared" / "slides"


def tiles(pixels: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    return [
        np.ascontiguousarray(pixels[y : y + TILE, x : x + TILE])
        for y in range(0, pixels.shape[0], TILE)
        for x in range(0, pixels.shape[1], TILE)
    ]


def ycbcr(sampling: str) -> list[bytes]:
    """Frames as most libraries write them: Y, Cb, Cr with JFIF's marker."""
    return [
        simplejpeg.encode_jpeg(tile, quality=92, colorsubsampling=sampling)
        for tile in tiles(PIXELS)
    ]


def marked(frame: bytes, transform: int) -> bytes:
    """Put Adobe's marker where JFIF's may have been."""
    marker = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0" + bytes([transform])
    return frame[:2] + marker + (without_jfif(frame) if frame[2:4] == b"\xff\xe0" else frame)[2:]


def lettered(frame: bytes) -> bytes:
    """Call the components R, G, B, in the header of the frame and in that of the scan."""
    data = bytearray(frame)
    frame_at, scan_at = data.index(b"\xff\xc0") + 10, data.index(b"\xff\xda") + 5
    for number, letter in enumerate(b"RGB"):
        data[frame_at + 3 * number] = data[scan_at + 2 * number] = letter
    return bytes(data)


RGB_FRAMES = jpeg_frames(PIXELS, TILE, rgb=True)
FRAMES = {
    "JFIF 4:2:0": ycbcr("420"),
    "JFIF 4:4:4": ycbcr("444"),
    "4:2:2 without a marker": [without_jfif(frame) for frame in ycbcr("422")],
    "Adobe, Y Cb Cr": [marked(frame, 1) for frame in ycbcr("444")],
    "Adobe, RGB": [marked(frame, 0) for frame in RGB_FRAMES],
    "letters": [lettered(frame) for frame in RGB_FRAMES],
    "unmarked": RGB_FRAMES,
}
HELD = dict.fromkeys(FRAMES, "RGB") | dict.fromkeys(list(FRAMES)[:4], "YBR_FULL_422")
"""{frames: colours that were encoded}."""


def series(folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    write_level(folder / "0.dcm", PIXELS, tile=TILE, mpp=0.5, **changes)
    return folder


@pytest.mark.parametrize("name", FRAMES)
def test_what_streams_say_is_what_libjpeg_makes_of_them(name: str) -> None:
    said, sign = jpeg_colours(FRAMES[name][0]) or ("cut off", "")
    assert bool(said) == bool(sign) == (name != "unmarked")
    if said:
        assert said == HELD[name]
        # libjpeg guesses by the same marks (but not by sampling), and finds the picture.
        seen = np.asarray(Image.open(io.BytesIO(FRAMES[name][0])).convert("RGB"))
        assert np.abs(seen.astype(int) - PIXELS[:TILE, :TILE]).mean() < 4


@pytest.mark.parametrize(
    ("name", "stated"), list(itertools.product(FRAMES, ("RGB", "YBR_FULL_422")))
)
def test_a_slide_is_refused_or_has_its_colours(name: str, stated: str, tmp_path: Path) -> None:
    folder = series(tmp_path / "series", frames=FRAMES[name], colour=stated)
    if stated == HELD[name]:
        with Slide(folder) as slide:
            seen = slide.read(0, 0, (512, 384))
        assert np.abs(seen.astype(int) - PIXELS).mean() < 4
        return
    if name == "unmarked":  # nothing contradicts the header: it is believed, as by all readers
        Slide(folder).close()
        return
    with pytest.raises(SlideError) as caught:
        Slide(folder)
    assert caught.value.code == "colours_conflict"
    assert "0.dcm" in caught.value.message
    assert f"are {stated}," in caught.value.message
    # The hint mends it: a header that says so is read with the right colours.
    assert f'"(0028,0004)={HELD[name]}"' in caught.value.hint


@pytest.mark.parametrize("pieces", [1, 7])
@pytest.mark.parametrize("paths", [1, 2])  # of two there is no direct path
def test_frames_are_found_however_they_are_stored(paths: int, pieces: int, tmp_path: Path) -> None:
    folder = series(
        tmp_path / "series", frames=FRAMES["JFIF 4:2:0"], colour="RGB", paths=paths, pieces=pieces,
        table="none" if pieces == 1 else "short",
    )  # fmt: skip
    with pytest.raises(SlideError, match="false") as caught:
        Slide(folder)
    assert caught.value.code == "colours_conflict"


def test_levels_count_and_labels_do_not(tmp_path: Path) -> None:
    folder = series(tmp_path / "series")
    wrong = {"frames": FRAMES["JFIF 4:4:4"], "colour": "RGB", "number": 1}
    write_level(folder / "label.dcm", PIXELS, tile=TILE, mpp=0.5, kind="LABEL\\NONE", **wrong)
    with Slide(folder) as slide:
        assert np.abs(slide.read(0, 0, (512, 384)).astype(int) - PIXELS).mean() < 4
    half = layouts.halved(PIXELS)
    coarse = [simplejpeg.encode_jpeg(tile, quality=92) for tile in tiles(half)[:4]]
    write_level(folder / "1.dcm", half, tile=TILE, mpp=1, number=2, frames=coarse, colour="RGB")
    with pytest.raises(SlideError, match=r"1\.dcm"):
        Slide(folder)


@pytest.mark.parametrize("size", [0, 1, 2, 3, 20, 100, 300])
def test_a_stream_that_is_cut_says_nothing(size: int) -> None:
    assert jpeg_colours(FRAMES["JFIF 4:2:0"][0][:size]) is None
    assert jpeg_colours(b"\xff\xd8" + bytes(size + 4)) == ("", "")


def test_a_real_converter_wrote_rgb_over_frames_of_y_cb_cr(tmp_path: Path) -> None:
    dicom, aperio = REAL / "dicom-CMU-1-small", REAL / "CMU-1-Small-Region.svs"
    if not dicom.exists():
        pytest.skip(f"{dicom.name} is not here")
    with pytest.raises(SlideError) as caught:
        Slide(dicom)
    assert caught.value.code == "colours_conflict"
    with Slide(corrected(dicom, tmp_path / "series")) as slide, Slide(aperio) as other:
        seen = slide.read(0, 0, (slide.width, slide.height)).astype(int)
        assert np.abs(seen - other.read(0, 0, (slide.width, slide.height))).mean() < 4
