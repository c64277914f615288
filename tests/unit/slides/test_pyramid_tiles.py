"""Tiles that readers make: the pixels of ``Slide.read`` at every level of every layout."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import simplejpeg
import tifffile
from numpy.typing import NDArray
from PIL import Image

from pathflip.errors import SlideError
from pathflip.slides.pyramid import Pyramid, Tile
from pathflip.slides.reader import SlideReader
from pathflip.slides.slide import Slide
from pathflip.slides.tiff import read_layout
from pathflip.synth import make_slide
from pathflip.synth.tiff import SlideFile, encode_tile
from tests.unit.slides.area import averages
from tests.unit.slides.dicom_files import write_level
from tests.unit.slides.layouts import FORMATS, MPP, halved, picture

Pixels = NDArray[np.uint8]
MEAN = 2.0
"""Grey levels that a tile may differ from what is read, on average."""


def _dicom(folder: Path, *, rgb: bool) -> None:
    folder.mkdir()
    base = picture(900, 700)
    for number, pixels in enumerate((base, halved(base))):
        name = folder / f"{number}.dcm"
        write_level(name, pixels, tile=128, mpp=MPP * 2**number, number=number, rgb=rgb)


def _made(**options: Any) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        make_slide(path, mpp=MPP, seed=2, **options)

    return make


LAYOUTS: dict[str, Callable[[Path], None]] = {
    **FORMATS,
    "generic.tif": _made(width=1500, height=1100),
    "odd.tif": _made(width=1501, height=1099),
    "small.tif": _made(width=300, height=90),
    "aperio.svs": _made(width=2100, height=1300, layout="aperio"),
    "aperio-rgb.svs": _made(
        width=1700, height=1230, layout="aperio", components="rgb", tile_px=240
    ),
    "dicom": lambda path: _dicom(path, rgb=False),
    "dicom-rgb": lambda path: _dicom(path, rgb=True),
}
STORED = {
    "generic.tif", "odd.tif", "aperio.svs", "aperio-rgb.svs", "dicom", "dicom-rgb", "jpeg.tif",
    "jpeg-big.tif", "jpeg-first.tif", "aperio-jpeg.svs",
}  # fmt: skip
"""Layouts whose own tiles are shown as they are."""


@pytest.fixture(scope="module")
def reader() -> Iterator[SlideReader]:
    with SlideReader(patches=1, px=16) as opened:
        yield opened


def decoded(data: bytes) -> Pixels:
    """Pixels as a browser shows them, by another decoder than the one that is tested."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def inside(tile: Tile, slide: Slide) -> bool:
    """Return whether a tile is nowhere cut off by the slide's edge."""
    return (
        tile.x0 + tile.width * tile.scale0 <= slide.width
        and tile.y0 + tile.height * tile.scale0 <= slide.height
    )


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_tile_is_what_is_read_there(name: str, reader: SlideReader, tmp_path: Path) -> None:
    path = tmp_path / name
    LAYOUTS[name](path)
    pyramid, mpp, _ = reader.pyramid(str(path), slide_mpp=MPP)
    assert mpp == MPP
    stored, seen = 0, 0
    with Slide(path, mpp=MPP) as slide:
        assert (pyramid.width, pyramid.height) == (slide.width, slide.height)
        for level in pyramid.levels():
            for tile in pyramid.tiles(level):
                data, own = reader.tile(str(path), level, tile.column, tile.row, slide_mpp=MPP)
                pixels = decoded(data).astype(int)
                assert pixels.shape == (tile.height, tile.width, 3)
                truth = slide.read(
                    tile.x0, tile.y0, (tile.width, tile.height), mpp=MPP * tile.scale0
                )
                gap = np.abs(pixels - truth)
                assert gap.mean() <= MEAN, (level, tile)
                edges = [gap[0], gap[-1], gap[:, 0], gap[:, -1]]
                assert max(edge.mean() for edge in edges) <= 3 * MEAN, (level, tile)
                if own:
                    assert inside(tile, slide)
                    assert gap.max() <= 1, "a stored tile is shown as it is"
                stored, seen = stored + own, seen + 1
    assert bool(stored) == (name in STORED), (stored, seen)


@pytest.mark.parametrize("name", ["deflate.tif", "aperio-jpeg2000.svs", "none.tif"])
def test_tiles_are_averages_of_the_picture(name: str, reader: SlideReader, tmp_path: Path) -> None:
    """The truth here is the picture and the definition of an average, and no reader."""
    path, base = tmp_path / name, picture()
    FORMATS[name](path)
    pyramid, _, _ = reader.pyramid(str(path), slide_mpp=MPP)
    for level in range(pyramid.max_level - 4, pyramid.max_level + 1):
        scale0 = pyramid.scale0(level)
        width, height = pyramid.size(level)
        whole = np.full((height * scale0, width * scale0, 3), 255, np.uint8)
        whole[: base.shape[0], : base.shape[1]] = base
        truth = averages(whole, np.arange(height + 1.0) * scale0, np.arange(width + 1.0) * scale0)
        for tile in pyramid.tiles(level):
            data, _ = reader.tile(str(path), level, tile.column, tile.row, slide_mpp=MPP)
            x, y = tile.x0 // scale0, tile.y0 // scale0
            part = truth[y : y + tile.height, x : x + tile.width]
            assert np.abs(decoded(data) - part).mean() <= 3, (level, tile)


def test_what_is_stored_is_not_encoded_again(reader: SlideReader, tmp_path: Path) -> None:
    """Inside, tiles of levels that are there are the stored ones, and no others."""
    path = tmp_path / "a.tif"
    make_slide(path, width=1024, height=1024, mpp=MPP, seed=3)
    pyramid, _, _ = reader.pyramid(str(path))
    own = {
        level: sum(
            reader.tile(str(path), level, tile.column, tile.row)[1] for tile in pyramid.tiles(level)
        )
        for level in pyramid.levels()
    }
    assert {level: count for level, count in own.items() if count} == {10: 16, 9: 4}


@pytest.mark.parametrize("compression", ["jpeg", "deflate"])
def test_coarse_tiles_of_a_slide_without_a_pyramid(
    compression: str, reader: SlideReader, tmp_path: Path
) -> None:
    """They are cut from one overview; the truth is the tile that the slide repeats."""
    path, block = tmp_path / "flat.tif", picture(256, 256)
    across, down = 132, 6
    tifffile.imwrite(
        path, (block for _ in range(across * down)), shape=(down * 256, across * 256, 3),
        dtype=np.uint8, tile=(256, 256), photometric="rgb", compression=compression,
    )  # fmt: skip
    pyramid, _, _ = reader.pyramid(str(path), slide_mpp=MPP)
    assert (pyramid.max_level, pyramid.overview_level) == (16, 12)
    for level in (12, 11, 10, 8):
        scale0 = pyramid.scale0(level)
        lines = np.arange(256 // scale0 + 1.0) * scale0
        truth = averages(block, lines, lines)
        for tile in pyramid.tiles(level):
            data, _ = reader.tile(str(path), level, tile.column, tile.row, slide_mpp=MPP)
            repeats = -(-tile.height // len(truth)), -(-tile.width // len(truth)), 1
            expected = np.tile(truth, repeats)[: tile.height, : tile.width]
            assert np.abs(decoded(data) - expected).mean() <= 3, (level, tile)


# -- streams of stored tiles -----------------------------------------------------------------------

SECRET = b"DOE^JANE 19561224"
COMMENT = b"\xff\xfe" + struct.pack(">H", len(SECRET) + 2) + SECRET
EXIF = b"\xff\xe1" + struct.pack(">H", len(SECRET) + 8) + b"Exif\0\0" + SECRET
SIDE = 256
Stream = Callable[[bytes, bytes], tuple[bytes, bytes]]


def tissue() -> Pixels:
    return picture(2 * SIDE, 2 * SIDE)


def write(path: Path, change: Stream, *, components: str = "ycbcr", aperio: bool = False) -> Path:
    """Write a slide of four tiles whose tables and streams are changed."""
    base = np.dstack([tissue(), np.full((2 * SIDE, 2 * SIDE), 255, np.uint8)])
    with SlideFile(path, mpp=MPP, aperio=aperio, components=components) as file:
        tiles = [
            change(*encode_tile(
                np.ascontiguousarray(base[y : y + SIDE, x : x + SIDE]), quality=90,
                components=components,
            ))
            for y in (0, SIDE)
            for x in (0, SIDE)
        ]  # fmt: skip
        file.level(width=2 * SIDE, height=2 * SIDE, tile_px=SIDE, tiles=tiles)
    return path


def with_names(tables: bytes, stream: bytes) -> tuple[bytes, bytes]:
    return tables[:2] + COMMENT + tables[2:], stream[:2] + EXIF + COMMENT + stream[2:] + SECRET


@pytest.mark.parametrize("components", ["ycbcr", "rgb"])
@pytest.mark.parametrize("aperio", [False, True])
def test_names_in_a_stream_are_left_out(
    components: str, aperio: bool, reader: SlideReader, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.tif", with_names, components=components, aperio=aperio)
    assert SECRET in path.read_bytes()
    data, own = reader.tile(str(path), 9, 1, 0, slide_mpp=MPP)
    assert own
    assert SECRET not in data
    with Image.open(io.BytesIO(data)) as image:
        assert not image.getexif()
        assert "comment" not in image.info
        assert [name for name, _ in image.applist] == ["APP14"]
    truth = Slide(path, mpp=MPP).read(SIDE, 0, (SIDE, SIDE))
    assert np.abs(decoded(data).astype(int) - truth).max() <= 1


def test_a_progressive_tile_is_encoded_anew(reader: SlideReader, tmp_path: Path) -> None:
    def progressive(tables: bytes, stream: bytes) -> tuple[bytes, bytes]:
        pixels = simplejpeg.decode_jpeg(tables[:-2] + stream[2:])
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "JPEG", quality=92, progressive=True)
        return b"\xff\xd8\xff\xd9", out.getvalue()

    path = write(tmp_path / "a.tif", progressive)
    data, own = reader.tile(str(path), 9, 0, 0, slide_mpp=MPP)
    assert not own
    truth = Slide(path, mpp=MPP).read(0, 0, (SIDE, SIDE))
    assert np.abs(decoded(data).astype(int) - truth).mean() <= MEAN


def damaged(path: Path, how: str) -> None:
    """Spoil the third tile of a slide that was written."""
    page = read_layout(path).pages[0]
    at, count = int(page.offsets[2]), int(page.counts[2])
    with open(path, "r+b") as file:
        data = bytearray(os.pread(file.fileno(), count, at))
        if how == "zeroed":
            data[count // 2 : count - 64] = bytes(count - 64 - count // 2)
        elif how == "cut":
            data[count - 400 :] = bytes(400)
        elif how == "another size":
            frame = data.index(b"\xff\xc0")
            data[frame + 5 : frame + 7] = struct.pack(">H", 8 * SIDE)
        elif how == "no JPEG":
            data[:2] = b"no"
        elif how == "an endless segment":
            data[2:6] = b"\xff\xdb\xff\xff"
        os.pwrite(file.fileno(), data, at)


@pytest.mark.parametrize("how", ["zeroed", "cut", "another size", "no JPEG", "an endless segment"])
def test_a_damaged_tile_is_an_error_and_no_picture(
    how: str, reader: SlideReader, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.tif", lambda tables, stream: (tables, stream))
    damaged(path, how)
    with pytest.raises(SlideError) as caught:
        reader.tile(str(path), 9, 0, 1, slide_mpp=MPP)
    assert caught.value.code == "bad_tile"
    assert reader.tile(str(path), 9, 1, 1, slide_mpp=MPP)[1]  # the others are as they were


# -- requests --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def svs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tile") / "a.svs"
    make_slide(path, width=1800, height=1200, mpp=MPP, layout="aperio", seed=4)
    return path


def test_what_is_no_tile_has_a_code(reader: SlideReader, svs: Path) -> None:
    for place in ((40, 0, 0), (11, 8, 0), (11, 0, 5), (-1, 0, 0)):
        with pytest.raises(SlideError) as caught:
            reader.tile(str(svs), *place)
        assert caught.value.code == "unknown_tile"


@pytest.mark.parametrize("box", [(300, 200, 800, 600), (-400, -100, 900, 700), (1700, 0, 50, 400)])
def test_a_view_is_the_rectangle_on_white(
    box: tuple[int, int, int, int], reader: SlideReader, svs: Path
) -> None:
    x0, y0, w0, h0 = box
    data = reader.view(str(svs), x0=x0, y0=y0, size0=(w0, h0), px=200)
    pixels = decoded(data).astype(float)
    assert max(pixels.shape[:2]) == 200
    h, w = pixels.shape[:2]
    assert abs(w / h - w0 / h0) < 0.02 * w / h + 1 / h
    with Slide(svs) as slide:
        base = slide.read(0, 0, (slide.width, slide.height))
    around = np.pad(base, ((400, 400), (400, 400), (0, 0)), constant_values=255)
    part = around[y0 + 400 : y0 + 400 + h0, x0 + 400 : x0 + 400 + w0]
    truth = averages(part, np.linspace(0, h0, h + 1), np.linspace(0, w0, w + 1))
    # Means of 5 x 5 pixels: what JPEG leaves out of a picture that is all noise is not of interest.
    gap = cv2.blur(pixels - truth, (5, 5), borderType=cv2.BORDER_REPLICATE)
    assert np.abs(gap).mean() <= MEAN


def test_another_file_in_its_place_is_refused(reader: SlideReader, tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    make_slide(path, width=512, height=512, mpp=MPP)
    status = path.stat()
    state = (status.st_size, status.st_mtime_ns)
    assert reader.tile(str(path), 9, 0, 0, expected=state)
    reader.check_unchanged(str(path), expected=state)
    os.utime(path, ns=(0, status.st_mtime_ns + 1))
    asked: list[Callable[[], object]] = [
        lambda: reader.tile(str(path), 9, 0, 0, expected=state),
        lambda: reader.pyramid(str(path), expected=state),
        lambda: reader.view(str(path), x0=0, y0=0, size0=9, px=16, expected=state),
        lambda: reader.check_unchanged(str(path), expected=state),
    ]
    for gone in (False, True):
        if gone:
            path.unlink()
        for ask in asked:
            with pytest.raises(SlideError) as caught:
                ask()
            assert caught.value.code == "source_changed"


def test_a_slide_without_resolution_has_tiles(reader: SlideReader, tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, tissue(), tile=(SIDE, SIDE), photometric="rgb", compression="deflate")
    pyramid, mpp, source = reader.pyramid(str(path))
    assert (pyramid, mpp, source) == (Pyramid(width=512, height=512), None, "")
    data, _ = reader.tile(str(path), 8, 0, 0)
    assert np.abs(decoded(data).astype(int) - halved(tissue())).mean() <= MEAN
