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


def dead(pid: int) -> None:
    """Wait until a killed process has ended; its owner has not looked at it yet."""
    for _ in range(1000):
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.01)
    raise AssertionError("the process does not die")


def gone(pid: int) -> bool:
    """Return whether a process is dead and was waited for."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_stuck_process_costs_the_request_and_is_replaced(reader, slide_path):
    _, rects = first_region(reader, slide_path)
    pid = victim_pid(slide_path)
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(SlideError) as caught:
        read(reader, slide_path, rects, timeout_s=2.0)
    assert caught.value.code == "timeout"
    assert time.monotonic() - began < 10
    assert gone(pid)
    assert read(reader, slide_path, rects).ok.all()


@pytest.mark.parametrize("when", ["before the request", "as the request waits to be taken"])
def test_a_death_before_the_work_costs_the_slide_nothing(reader, slide_path, when):
    """Nothing of the slide was being read: the request is answered by another process."""
    _, rects = first_region(reader, slide_path)
    before = read(reader, slide_path, rects).pixels.copy()
    pid = victim_pid(slide_path)
    if when == "before the request":
        os.kill(pid, signal.SIGABRT)
        dead(pid)
        after = read(reader, slide_path, rects)
    else:
        os.kill(pid, signal.SIGSTOP)  # alive, but it can take no request any more
        reader.start_read(slide_path, rects, mpp=0.5, px=128, slide_mpp=None, timeout_s=60)
        os.kill(pid, signal.SIGKILL)
        dead(pid)
        after = reader.finish_read(px=128)
    assert after.ok.all()
    assert (after.pixels == before).all()
    assert gone(pid)


@pytest.fixture
def endless(tmp_path) -> str:
    """A file whose digest takes minutes; its bytes are a hole that takes no room."""
    path = tmp_path / "endless.svs"
    path.touch()
    os.truncate(path, 1 << 40)
    return str(path)


@pytest.mark.parametrize("served", [False, True])
def test_a_death_at_work_costs_the_request(reader, slide_path, endless, served):
    """Return whether the process is new or answered before; the next request has another one."""
    if served:
        first_region(reader, slide_path)
    killer = threading.Thread(target=lambda: os.kill(victim_pid(endless), signal.SIGKILL))
    killer.start()
    with pytest.raises(SlideError) as caught:
        reader.digest(endless, timeout_s=60)
    killer.join()
    assert caught.value.code == "reader_crash"
    assert "SIGKILL" in caught.value.message
    assert "endless.svs" in caught.value.message
    _, rects = first_region(reader, slide_path)
    assert read(reader, slide_path, rects).ok.all()


def test_a_process_that_cannot_start_is_not_started_for_ever(slide_path, monkeypatch):
    """A new process that dies before it begins is an error, with what it said last."""
    monkeypatch.setattr("sys.executable", "/bin/false")
    with SlideReader(patches=16, px=128) as broken, pytest.raises(SlideError) as caught:
        broken.digest(slide_path, timeout_s=60)
    assert caught.value.code == "reader_crash"
    assert "exit 1" in caught.value.message


def test_the_child_goes_with_its_owner(slide_path):
    opened = SlideReader(patches=16, px=128)
    first_region(opened, slide_path)
    pid = victim_pid(slide_path)
    opened.close()
    assert gone(pid)


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
