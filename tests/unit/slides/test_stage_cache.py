"""The folder that the processes of a machine share: bounded, held, and never half filled."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from pathflip.errors import SlideError
from pathflip.slides.stage_cache import StageCache

SIZE = 100_000


def body(name: str, size: int = SIZE) -> bytes:
    return hashlib.sha256(name.encode()).digest() * (size // 32 + 1)


class Filler:
    """Fills entries whose content follows from their name, and counts how often."""

    def __init__(self) -> None:
        self.filled: list[str] = []

    def __call__(self, name: str, size: int = SIZE) -> Any:
        def fill(folder: Path) -> Mapping[str, str]:
            self.filled.append(name)
            data = body(name)[:size]
            (folder / "side").mkdir()
            (folder / "side" / "a.svs").write_bytes(data)
            return {"side/a.svs": hashlib.sha256(data).hexdigest()}

        return fill


@contextmanager
def process(code: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Run code that knows this module as ``t``; it is killed when the block ends."""
    root = Path(__file__).parents[3]
    program = f"import importlib.util as u, sys\ns = u.spec_from_file_location('t', {__file__!r})\n"
    program += f"t = u.module_from_spec(s)\ns.loader.exec_module(t)\n{code}"
    with subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    ) as started:
        try:
            yield started
        finally:
            started.kill()


def said(started: subprocess.Popen[str]) -> str:
    assert started.stdout is not None
    return started.stdout.readline().strip()


@pytest.fixture
def fill() -> Filler:
    return Filler()


def cache(folder: Path, entries: float) -> StageCache:
    return StageCache(folder / "cache", limit=round(entries * SIZE), spare=0)


def there(folder: Path) -> set[str]:
    return {path.name.partition(".")[0] for path in (folder / "cache").glob("*.*/")}


def test_what_is_there_is_not_filled_again(tmp_path, fill):
    stage = cache(tmp_path, 3)
    for _ in range(2):
        with stage.hold("a", SIZE, fill("a")) as entry:
            assert (entry.folder / "side" / "a.svs").read_bytes() == body("a")[:SIZE]
            assert entry.sha256 == {"side/a.svs": hashlib.sha256(body("a")[:SIZE]).hexdigest()}
    assert fill.filled == ["a"]
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700


def test_what_was_not_held_for_longest_goes_first(tmp_path, fill):
    stage = cache(tmp_path, 3)
    for name in ("a", "b", "c", "a", "d", "e"):
        with stage.hold(name, SIZE, fill(name)):
            pass
    assert there(tmp_path) == {"a", "d", "e"}
    assert fill.filled == ["a", "b", "c", "d", "e"]


def test_what_is_held_stays_and_has_no_room_taken(tmp_path, fill):
    stage = cache(tmp_path, 2)
    with stage.hold("a", SIZE, fill("a")) as a, stage.hold("b", SIZE, fill("b")):
        with pytest.raises(SlideError, match="no room") as refused:
            stage.hold("c", SIZE, fill("c"), wait_s=0.3).__enter__()
        assert refused.value.code == "stage_failed"
        assert (a.folder / "side" / "a.svs").read_bytes() == body("a")[:SIZE]
    with stage.hold("c", SIZE, fill("c"), wait_s=0):
        assert there(tmp_path) == {"b", "c"}


def test_what_does_not_fit_is_refused_at_once(tmp_path, fill):
    stage = cache(tmp_path, 2)
    with stage.hold("a", SIZE, fill("a")):
        pass
    with pytest.raises(SlideError, match=r"stage_gb") as refused:
        stage.hold("b", 2 * SIZE + 1, fill("b", 2 * SIZE + 1)).__enter__()
    assert refused.value.code == "stage_failed"
    assert there(tmp_path) == {"a"}
    full = StageCache(tmp_path / "cache", limit=1 << 60, spare=1 << 60)  # of a disk that is full
    with pytest.raises(SlideError, match="disk has"):
        full.hold("b", SIZE, fill("b")).__enter__()


def test_a_slide_in_use_is_seen_by_other_processes_until_they_die(tmp_path, fill):
    """Nobody evicts what another process holds; its death, however sudden, frees it."""
    hold = (
        "c = t.cache(t.Path(sys.argv[1]), 1)\n"
        "with c.hold('a', t.SIZE, t.Filler()('a')):\n    print('held', flush=True)\n"
        "    t.time.sleep(600)"
    )
    stage = cache(tmp_path, 1)
    with process(hold, tmp_path) as holder:
        assert said(holder) == "held"
        with pytest.raises(SlideError):
            stage.hold("b", SIZE, fill("b"), wait_s=0.3).__enter__()
        with stage.hold("a", SIZE, fill("a"), wait_s=0):
            assert fill.filled == []
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with stage.hold("b", SIZE, fill("b"), wait_s=0):
            assert there(tmp_path) == {"b"}


def test_what_a_killed_process_left_half_filled_is_never_used(tmp_path, fill):
    half = (
        "def fill(folder):\n    (folder / 'side').mkdir()\n"
        "    (folder / 'side' / 'a.svs').write_bytes(b'half')\n    print('half', flush=True)\n"
        "    t.time.sleep(600)\n"
        "t.cache(t.Path(sys.argv[1]), 1).hold('a', t.SIZE, fill).__enter__()"
    )
    stage = cache(tmp_path, 1)
    for name in ("a", "b"):  # the same entry, and one that needs its room
        with process(half, tmp_path) as filling:
            assert said(filling) == "half"
            with pytest.raises(SlideError):
                stage.hold("b", SIZE, fill("b"), wait_s=0).__enter__()
            filling.send_signal(signal.SIGKILL)
            filling.wait()
        with stage.hold(name, SIZE, fill(name), wait_s=0) as entry:
            assert (entry.folder / "side" / "a.svs").read_bytes() == body(name)[:SIZE]
        assert there(tmp_path) == {name}
        if name == "a":
            with cache(tmp_path, 1).hold("z", SIZE, fill("z")):
                pass
    assert fill.filled == ["a", "z", "b"]


def test_a_failure_leaves_nothing(tmp_path):
    def fail(folder: Path) -> Mapping[str, str]:
        (folder / "a.svs").write_bytes(b"part")
        raise SlideError("Broke off.", code="store_failed")

    with pytest.raises(SlideError, match="Broke off"):
        cache(tmp_path, 1).hold("a", SIZE, fail).__enter__()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["room.lock"]


def damage(file: Path) -> None:
    """Change a byte and put the time back, as no tool does by accident."""
    before = file.stat()
    with open(file, "r+b") as opened:
        opened.seek(SIZE // 2)
        opened.write(b"X")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("harm", ["byte", "cut", "gone", "note"])
def test_a_damaged_copy_is_made_again(tmp_path, fill, harm):
    stage = cache(tmp_path, 1)
    with stage.hold("a", SIZE, fill("a")) as entry:
        file, note = entry.folder / "side" / "a.svs", entry.folder.parent / "entry.json"
    {
        "byte": lambda: damage(file),
        "cut": lambda: os.truncate(file, SIZE - 1),
        "gone": file.unlink,
        "note": lambda: note.write_text("{"),
    }[harm]()
    with stage.hold("a", SIZE, fill("a")) as entry:
        assert (entry.folder / "side" / "a.svs").read_bytes() == body("a")[:SIZE]
    assert fill.filled == ["a", "a"]


def test_after_a_restart_copies_are_compared_with_their_digest(tmp_path, fill):
    stage = cache(tmp_path, 1)
    with stage.hold("a", SIZE, fill("a")) as entry:
        file, note = entry.folder / "side" / "a.svs", entry.folder.parent / "entry.json"
    about = json.loads(note.read_text())
    note.write_text(json.dumps(about | {"boot": "another"}))
    with stage.hold("a", SIZE, fill("a")):
        assert fill.filled == ["a"]
    assert json.loads(note.read_text()) == about  # so that it is compared once
    # As if the disk had lost what was written before the power failed.
    damage(file)
    status = file.stat()
    stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    files = {name: known | {"stamp": stamp} for name, known in about["files"].items()}
    note.write_text(json.dumps({"boot": "another", "files": files}))
    with stage.hold("a", SIZE, fill("a")) as entry:
        assert fill.filled == ["a", "a"]
        assert (entry.folder / "side" / "a.svs").read_bytes() == body("a")[:SIZE]


def test_a_reader_that_has_an_evicted_file_open_keeps_no_space(tmp_path, fill):
    stage = cache(tmp_path, 1)
    with stage.hold("a", SIZE, fill("a")) as entry:
        file = entry.folder / "side" / "a.svs"
        opened = os.open(file, os.O_RDONLY)
    with stage.hold("b", SIZE, fill("b")):
        assert os.fstat(opened).st_blocks == 0
    os.close(opened)
    with stage.hold("a", SIZE, fill("a")) as entry:  # nor is its file taken for a later one
        assert entry.folder / "side" / "a.svs" != file


def test_a_folder_that_others_can_write_is_refused(tmp_path, fill):
    (tmp_path / "cache").mkdir(mode=0o777)
    (tmp_path / "cache").chmod(0o777)
    with pytest.raises(SlideError, match="not this user's own") as refused:
        cache(tmp_path, 1).hold("a", SIZE, fill("a")).__enter__()
    assert refused.value.code == "stage_failed"


WORKER = """
import random
rng, stage = random.Random(int(sys.argv[2])), t.cache(t.Path(sys.argv[1]), 4)
for turn in range(25):
    name = f"{rng.randrange(10):x}"
    with stage.hold(name, t.SIZE, t.Filler()(name)) as entry:
        file = entry.folder / "side" / "a.svs"
        assert file.read_bytes() == t.body(name)[:t.SIZE], "another's"
        t.time.sleep(rng.random() / 200)
        assert file.read_bytes() == t.body(name)[:t.SIZE], "taken away while it was held"
print("done", flush=True)
"""


def test_many_processes_stay_within_the_bound(tmp_path):
    """Six processes, ten slides, room for four; one of them is killed on the way."""
    (tmp_path / "cache").mkdir(mode=0o700)
    most = 0
    with (
        process(WORKER, tmp_path, 0) as killed,
        process(WORKER, tmp_path, 1) as one,
        process(WORKER, tmp_path, 2) as two,
        process(WORKER, tmp_path, 3) as three,
        process(WORKER, tmp_path, 4) as four,
        process(WORKER, tmp_path, 5) as five,
    ):
        others = (one, two, three, four, five)
        while any(other.poll() is None for other in others):
            most = max(most, taken(tmp_path / "cache"))
            if most > 3 * SIZE and killed.poll() is None:
                killed.kill()
            time.sleep(0.002)
        assert [said(other) for other in others] == ["done"] * 5
        assert killed.wait() == -signal.SIGKILL
    assert 3 * SIZE < most <= 4 * SIZE


def taken(folder: Path) -> int:
    """Bytes of the slides in a folder, in part or whole."""
    total = 0
    for inside, _, files in os.walk(folder):  # which passes over what is removed meanwhile
        for name in files:
            if name == "a.svs":
                with suppress(FileNotFoundError):
                    total += os.stat(os.path.join(inside, name)).st_size
    return total
