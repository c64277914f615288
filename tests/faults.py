"""Hostile slides and hostile moments: what the fault tests inject, from outside the product."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import tifffile

ROOT = Path(__file__).resolve().parents[1]
_TILE_OFFSETS, _TILE_COUNTS = 324, 325

# -- files ----------------------------------------------------------------------------------------


def tiff(pages: list[dict[int, tuple[int, list[int]]]], *, loop: bool = False) -> bytes:
    """A classic TIFF of nothing but directories; tags as {code: (type 3 or 4, values)}."""
    data = bytearray(b"II*\0\0\0\0\0")
    link = 4
    for tags in pages:
        entries = b""
        for code, (kind, values) in sorted(tags.items()):
            packed = struct.pack(f"<{len(values)}{'HI'[kind - 3]}", *values)
            if len(packed) > 4:
                at = len(data)
                data += packed + b"\0" * (-len(packed) % 4)
                packed = struct.pack("<I", at)
            entries += struct.pack("<HHI", code, kind, len(values)) + packed.ljust(4, b"\0")
        struct.pack_into("<I", data, link, len(data))
        data += struct.pack("<H", len(tags)) + entries
        link = len(data)
        data += b"\0\0\0\0"
    if loop:
        struct.pack_into("<I", data, link, struct.unpack_from("<I", data, 4)[0])
    return bytes(data)


def bomb(*, width: int, height: int, tile_px: int, pages: int = 1, loop: bool = False) -> bytes:
    """A small file that declares a slide of any size; all of its tiles are the same few bytes."""
    count = -(-width // tile_px) * -(-height // tile_px)
    page: dict[int, tuple[int, list[int]]] = {
        254: (4, [0]),
        256: (4, [width]),
        257: (4, [height]),
        258: (3, [8, 8, 8]),
        259: (3, [7]),
        262: (3, [6]),
        277: (3, [3]),
        284: (3, [1]),
        322: (4, [tile_px]),
        323: (4, [tile_px]),
        _TILE_OFFSETS: (4, [8] * count),
        _TILE_COUNTS: (4, [64] * count),
    }
    return tiff([page] * pages, loop=loop)


def tile_spans(path: Path) -> tuple[int, list[tuple[int, int]]]:
    """(tiles across, [(offset, bytes)] of level 0) as tifffile reads them."""
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        assert isinstance(page, tifffile.TiffPage)
        across = -(-page.imagewidth // page.tilewidth)
        return across, list(zip(page.dataoffsets, page.databytecounts, strict=True))


def overwrite(source: Path, target: Path, tiles: list[int]) -> None:
    """Copy a slide, the middle of some level-0 tiles replaced by noise no decoder accepts."""
    _, spans = tile_spans(source)
    data = bytearray(source.read_bytes())
    for tile in tiles:
        offset, count = spans[tile]
        data[offset + count // 3 : offset + count] = b"\xff\xd8" * ((count - count // 3) // 2) + (
            b"\0" * ((count - count // 3) % 2)
        )
    target.write_bytes(data)


def flip_bits(source: Path, target: Path, *, bits: int, tiles: int, seed: int) -> list[int]:
    """Copy a slide with random bits flipped in random level-0 tiles; return those tiles."""
    rng = random.Random(seed)
    _, spans = tile_spans(source)
    chosen = sorted(rng.sample(range(len(spans)), tiles))
    data = bytearray(source.read_bytes())
    for index in range(bits):
        offset, count = spans[chosen[index % tiles]]
        data[offset + rng.randrange(count)] ^= 1 << rng.randrange(8)
    target.write_bytes(data)
    return chosen


def directory_first(source: Path, target: Path) -> None:
    """Rewrite a classic TIFF with all directories first and level 0's tiles last.

    Cut such a file anywhere and it still opens: the loss is met only while reading.
    """
    raw = source.read_bytes()
    with tifffile.TiffFile(source) as file:
        pages = [page for page in file.pages if isinstance(page, tifffile.TiffPage)]
        size = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 7: 1}
        tags = [
            {tag.code: (int(tag.dtype), tag.count, tag.valueoffset) for tag in page.tags.values()}
            for page in pages
        ]
        spans = [list(zip(p.dataoffsets, p.databytecounts, strict=True)) for p in pages]
    room = 8 + sum(
        2 + 12 * len(page) + 4 + sum(size[k] * n + 8 for k, n, _ in page.values()) for page in tags
    )
    at, moved, body = room, [[] for _ in pages], bytearray()
    for index in reversed(range(len(pages))):
        for offset, count in spans[index]:
            moved[index].append(at)
            body += raw[offset : offset + count]
            at += count
    head = bytearray(b"II*\0\0\0\0\0")
    link = 4
    for page, offsets in zip(tags, moved, strict=True):
        entries = b""
        for code, (kind, count, where) in sorted(page.items()):
            value = raw[where : where + size[kind] * count]
            if code == _TILE_OFFSETS:
                value = struct.pack(f"<{count}I", *offsets)
            if len(value) > 4:
                place = len(head)
                head += value + b"\0" * (-len(value) % 2)
                value = struct.pack("<I", place)
            entries += struct.pack("<HHI", code, kind, count) + value.ljust(4, b"\0")
        struct.pack_into("<I", head, link, len(head))
        head += struct.pack("<H", len(page)) + entries
        link = len(head)
        head += b"\0\0\0\0"
    assert len(head) <= room
    target.write_bytes(bytes(head).ljust(room, b"\0") + body)


def deflated(
    path: Path,
    pixels: np.ndarray,
    *,
    mpp: float | None = 0.5,
    pyramid: bool = False,
    **options: object,
) -> None:
    """A tiled TIFF of any pixel type without JPEG: OpenSlide's path, not the direct one."""
    scale = {} if mpp is None else {"resolution": (1e4 / mpp,) * 2, "resolutionunit": "CENTIMETER"}
    with tifffile.TiffWriter(path) as file:
        for step in (1, 8) if pyramid else (1,):
            kind = {"subfiletype": 0 if step == 1 else 1}
            level = np.ascontiguousarray(pixels[::step, ::step])
            file.write(level, tile=(256, 256), compression="zlib", **kind, **scale, **options)


def inflate_tile(source: Path, target: Path, tile: int) -> None:
    """Copy a slide, the JPEG of one level-0 tile claiming to be 65,500 x 65,500 px."""
    _, spans = tile_spans(source)
    offset, count = spans[tile]
    data = bytearray(source.read_bytes())
    frame = data.index(b"\xff\xc0", offset, offset + count)
    struct.pack_into(">HH", data, frame + 5, 65500, 65500)
    target.write_bytes(data)


# -- processes ------------------------------------------------------------------------------------


def pathflip(*words: str) -> subprocess.Popen[str]:
    """The command, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "pathflip.cli", *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


_WAITING = """
import os, signal, sys
from pathflip.archive import transactions
from pathflip.cli import main

said = os.fdopen(os.dup(1), "w")  # with --json all else goes to stderr
table, before = sys.argv.pop(1), int(sys.argv.pop(1))
append, upsert = transactions.append, transactions.upsert
done = []

def wait(written):
    if written == table:
        done.append(written)
        if len(done) > before:
            print("waiting", file=said, flush=True)
            os.kill(os.getpid(), signal.SIGSTOP)

def waiting_append(lock, shard):
    wait(shard.table)
    append(lock, shard)

def waiting_upsert(lock, table, rows):
    wait(table)
    upsert(lock, table, rows)

transactions.append, transactions.upsert = waiting_append, waiting_upsert
main()
"""


def waiting(*words: str, table: str, commits: int) -> subprocess.Popen[str]:
    """Start the command, which makes some commits to a table and stops before the next.

    It prints a line before. All of its threads stand still then, so its actors have work left and
    stay.
    """
    return subprocess.Popen(
        [sys.executable, "-c", _WAITING, table, str(commits), *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def kill_tree(run: subprocess.Popen[str]) -> None:
    """Kill a process and all below it, which would outlive it."""
    below = descendants(run.pid)
    run.kill()
    for pid in below:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def without_compiler(folder: Path) -> dict[str, str]:
    """Variables that make a machine without a compiler of this one, as an image is.

    Folders of ``PATH`` that have one are replaced by folders of links to all else in them.

    Args:
        folder: An empty one, for the links and for what a compiler would make.
    """
    compiler = re.compile(r"(.*-)?(cc|c\+\+|c89|c99|gcc|g\+\+|clang|clang\+\+)(-[\d.]+)?")
    folders = []
    for number, place in enumerate(os.environ["PATH"].split(os.pathsep)):
        names = os.listdir(place) if os.path.isdir(place) else []
        if any(map(compiler.fullmatch, names)):
            kept = folder / str(number)
            kept.mkdir()
            for name in names:
                if not compiler.fullmatch(name):
                    (kept / name).symlink_to(Path(place, name).absolute())
            place = str(kept)
        folders.append(place)
    path = os.pathsep.join(folders)
    assert not any(shutil.which(name, path=path) for name in ("cc", "c++", "gcc", "g++", "clang"))
    return {"PATH": path, "TORCHINDUCTOR_CACHE_DIR": str(folder / "made")}


def private_folder(service: int) -> Path:
    """The private folder of a running ``pathflip serve``, by the process of the command."""
    (session,) = (pid for pid in descendants(service) if "-m serve.session" in command_line(pid))
    variables = Path(f"/proc/{session}/environ").read_bytes().split(b"\0")
    (folder,) = (Path(v[7:].decode()) for v in variables if v.startswith(b"TMPDIR="))
    return folder


def command_line(pid: int) -> str:
    """Return the command line of a process; empty when it is gone."""
    try:
        return (
            Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        )
    except OSError:
        return ""


def parent(pid: int) -> int:
    """The parent of a process, 0 when it is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def alive(pid: int) -> bool:
    """Return whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def descendants(pid: int) -> list[int]:
    """Every process below ``pid``: only these are ours to strike."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            children.setdefault(parent(int(entry)), []).append(int(entry))
    found, todo = [], [pid]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def listening(pids: list[int]) -> set[int]:
    """TCP ports at which the processes listen."""
    own = set()
    for pid in pids:
        with suppress(OSError):
            for entry in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    own.add(os.readlink(entry))
    return {
        int(row.split()[1].rpartition(":")[2], 16)
        for name in ("tcp", "tcp6")
        for row in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
        if row.split()[3] == "0A" and f"socket:[{row.split()[9]}]" in own
    }


def resident_bytes(pids: list[int]) -> int:
    """Memory of processes, shared pages counted once per process."""
    total = 0
    for pid in pids:
        with suppress(OSError):
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
    return total


def until(condition: Callable[[], bool], *, seconds: float, what: str) -> None:
    """Wait for a condition; fail the test when it does not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain: {what}"
        time.sleep(0.02)
