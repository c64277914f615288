"""Reader processes: same pixels as in process, and nothing they do harms their owner."""

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from pathflip.errors import SlideError
from pathflip.geometry import Tiling, patch_rects
from pathflip.slides.reader import SlideReader
from pathflip.slides.slide import Slide
from pathflip.synth import make_slide

TILING = Tiling(region_um=256.0, patch_um=64.0)  # regions of 4 x 4 patches of 128 px


@pytest.fixture(scope="module")
def slide_path(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("reader") / "a.svs"
    make_slide(path, width=2048, height=1536, mpp=0.5, layout="aperio", seed=3)
    return str(path)


@pytest.fixture
def reader():
    with SlideReader(patches=16, px=TILING.patch_px) as opened:
        yield opened


def first_region(reader, path):
    plan = reader.plan(path, tiling=TILING, timeout_s=60)
    region = int(plan.regions.patch_mask.sum(axis=1).argmax())
    rects = patch_rects(
        TILING, rx=int(plan.regions.rx[region]), ry=int(plan.regions.ry[region]), mpp=0.5
    )
    return plan, rects[plan.regions.patch_mask[region]]


def read(reader, path, rects, timeout_s=60.0):
    reader.start_read(path, rects, mpp=0.5, px=128, slide_mpp=None, timeout_s=timeout_s)
    return reader.finish_read(px=128)


def test_pixels_are_those_read_in_process(reader, slide_path):
    _, rects = first_region(reader, slide_path)
    patches = read(reader, slide_path, rects)
    assert patches.ok.all()
    here = np.empty_like(patches.pixels)
    assert Slide(slide_path).read_patches(rects, mpp=0.5, out=here).all()
    assert (patches.pixels == here).all()
    assert np.isfinite(patches.quality).all()
    assert patches.quality.shape == (len(rects), 2)


def test_plan_tells_what_the_slide_is(reader, slide_path):
    plan, _ = first_region(reader, slide_path)
    info = plan.info
    assert (info["width"], info["height"], info["mpp"]) == (2048, 1536, 0.5)
    assert (info["vendor"], info["reader"], info["mpp_source"]) == ("aperio", "direct", "metadata")
    assert plan.thumbnail[:2] == b"\xff\xd8"
    assert plan.tissue_png[:4] == b"\x89PNG"


def victim_pid(path: str) -> int:
    """The reader child that has the slide open, found from outside."""
    for _ in range(500):
        for process in Path("/proc").glob("[0-9]*"):
            try:
                links = [os.readlink(link) for link in (process / "fd").iterdir()]
            except OSError:
                continue
            if path in links and int(process.name) != os.getpid():
                return int(process.name)
        time.sleep(0.01)
    raise AssertionError("nobody opened the slide")


@pytest.mark.parametrize(
    ("sent", "code"), [(signal.SIGSTOP, "timeout"), (signal.SIGABRT, "reader_crash")]
)
def test_a_stuck_or_dead_process_is_replaced(reader, slide_path, sent, code):
    _, rects = first_region(reader, slide_path)
    pid = victim_pid(slide_path)
    os.kill(pid, sent)
    began = time.monotonic()
    with pytest.raises(SlideError) as caught:
        read(reader, slide_path, rects, timeout_s=2.0)
    assert caught.value.code == code
    assert time.monotonic() - began < 10
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert read(reader, slide_path, rects).ok.all()


def test_a_process_killed_while_it_works_is_replaced(reader, slide_path):
    _, rects = first_region(reader, slide_path)
    pid = victim_pid(slide_path)
    killer = threading.Timer(0.05, os.kill, (pid, signal.SIGKILL))
    killer.start()

    def read_for_ever():
        while True:
            read(reader, slide_path, rects)

    with pytest.raises(SlideError) as caught:
        read_for_ever()
    assert caught.value.code == "reader_crash"
    assert "SIGKILL" in caught.value.message
    assert read(reader, slide_path, rects).ok.all()


def test_the_child_goes_with_its_owner(slide_path):
    opened = SlideReader(patches=16, px=128)
    first_region(opened, slide_path)
    pid = victim_pid(slide_path)
    opened.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_errors_carry_the_slides_reason(reader, tmp_path):
    (tmp_path / "empty.svs").touch()
    (tmp_path / "noise.svs").write_bytes(os.urandom(5000))
    cases = {"empty.svs": "not_a_file", "noise.svs": "unreadable", "gone.svs": "not_a_file"}
    for name, code in cases.items():
        with pytest.raises(SlideError) as caught:
            reader.plan(str(tmp_path / name), tiling=TILING, timeout_s=60)
        assert caught.value.code == code
        assert name in str(caught.value)
        assert caught.value.hint


def test_a_slide_replaced_on_disk_is_opened_anew(reader, tmp_path):
    path = tmp_path / "a.svs"
    make_slide(path, width=1024, height=1024, mpp=0.5, layout="aperio", seed=1)
    _, rects = first_region(reader, str(path))
    before = read(reader, str(path), rects).pixels.copy()
    make_slide(tmp_path / "b.svs", width=1024, height=1024, mpp=0.5, layout="aperio", seed=2)
    os.replace(tmp_path / "b.svs", path)
    after = read(reader, str(path), rects).pixels
    assert (before != after).any()
