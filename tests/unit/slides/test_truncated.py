"""Slides cut off anywhere, in every format at hand: refused with a code, masked, or as the whole.

A file that ends early has lost pixels. What may never happen is that a reader makes up others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pathflip.errors import REASONS, SlideError
from pathflip.slides.reader import SlideReader
from tests.unit.slides.dicom_files import corrected
from tests.unit.slides.layouts import FORMATS, MPP, TILE, picture

CUTS = 20
PX = 128
REAL = Path(__file__).parents[4] / "shared" / "slides"


@pytest.fixture(scope="module")
def reader() -> Iterator[SlideReader]:
    with SlideReader(patches=400, px=PX) as one:
        yield one


def places(width: int, height: int) -> NDArray[np.int64]:
    """Squares of a tile all over a slide, level-0 px."""
    found = [
        (x, y, PX, PX) for y in range(0, height - PX + 1, PX) for x in range(0, width - PX + 1, PX)
    ]
    return np.array(found[:400], np.int64)


def read(
    reader: SlideReader, path: Path, *, scale: int = 1
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Patches of level 0, or at half its resolution, and which of them are good."""
    about = reader.check(str(path), mpp=MPP, timeout_s=60)
    rects = places(about["width"] // scale, about["height"] // scale) * scale
    reader.start_read(str(path), rects, mpp=MPP * scale, px=PX, slide_mpp=MPP, timeout_s=60)
    patches = reader.finish_read(px=PX)
    return patches.pixels.copy(), patches.ok.copy()


def cuts(size: int, seed: int) -> list[int]:
    """Lengths: the first and last bytes, and random ones between."""
    rng = np.random.default_rng(seed)
    return [8, size // 2, size - 1, *rng.integers(9, size - 1, CUTS - 3).tolist()]


def judge(reader: SlideReader, path: Path, whole: dict[int, NDArray[np.uint8]]) -> str:
    """Say what becomes of a cut slide; fail where it has other pixels than the whole one."""
    verdict = "as the whole"
    for scale, expected in whole.items():
        try:
            pixels, good = read(reader, path, scale=scale)
        except SlideError as error:
            return error.code if len(error.message) > 20 else "says nothing"
        assert len(pixels) == len(expected), path.name
        assert np.array_equal(pixels[good], expected[good]), f"{path} has other pixels"
        if not good.all():
            verdict = "masked"
    return verdict


@pytest.mark.parametrize("name", FORMATS)
def test_a_cut_file_never_shows_other_pixels(
    name: str, reader: SlideReader, tmp_path: Path
) -> None:
    path = tmp_path / name
    FORMATS[name](path)
    whole = {}
    for scale in (1, 2):
        pixels, good = read(reader, path, scale=scale)
        assert good.all()
        whole[scale] = pixels
    first = whole[1][1].astype(int)
    assert np.abs(first - picture()[:TILE, TILE : 2 * TILE]).mean() < 6  # it is that picture
    data = path.read_bytes()
    found: Counter[str] = Counter()
    for number, size in enumerate(cuts(len(data), seed=len(name))):
        cut = path.with_name(f"{number}-{name}")
        cut.write_bytes(data[:size])
        found[judge(reader, cut, whole)] += 1
        cut.unlink()
    assert sum(found.values()) == CUTS
    assert sum(found[code] for code in REASONS) + found["masked"] >= CUTS - 3, found


def test_a_real_aperio_slide(reader: SlideReader, tmp_path: Path) -> None:
    whole_path = REAL / "CMU-1-Small-Region.svs"
    if not whole_path.exists():
        pytest.skip(f"{whole_path.name} is not here")
    whole = {1: read(reader, whole_path)[0]}
    data = whole_path.read_bytes()
    found: Counter[str] = Counter()
    for number, size in enumerate(cuts(len(data), seed=1)):
        cut = tmp_path / f"{number}.svs"
        cut.write_bytes(data[:size])
        found[judge(reader, cut, whole)] += 1
        cut.unlink()
    assert found["unreadable"] >= CUTS - 3, found


def test_a_dicom_series_with_one_file_cut(reader: SlideReader, tmp_path: Path) -> None:
    """Each file in turn: the finest level, and coarser ones."""
    series = REAL / "dicom-CMU-1-small"
    if not series.exists():
        pytest.skip(f"{series.name} is not here")
    series = corrected(series, tmp_path / "whole")
    files = sorted(series.glob("*.dcm"))
    whole = {scale: read(reader, series, scale=scale)[0] for scale in (1, 2)}
    found: Counter[str] = Counter()
    for number in range(CUTS):
        cut = tmp_path / f"series-{number}"
        cut.mkdir()
        for file in files:
            data = file.read_bytes()
            if file == files[number % len(files)]:
                # Most in the header, where a file is left out of its series.
                size = cuts(len(data), seed=number)[number % CUTS]
                data = data[: size if number % 2 else size % 1500]
            (cut / file.name).write_bytes(data)
        found[judge(reader, cut, whole)] += 1
    assert min(found["unreadable"], found["masked"]) > 3, found
