"""Readers are shared fairly: one client's many or long requests do not keep others from them."""

from __future__ import annotations

import asyncio
import io
import struct
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pathflip.errors import PathFLIPError, SlideError
from pathflip.slides.reader import SlideReader
from serve.limits import RequestError
from serve.reader_pool import LONG_PX, LONG_WAITING, ReaderPool, ReadingConfig
from serve.slide_files import FileSlides
from serve.tiles import Tiles

Work = Callable[[SlideReader], str]


class Slow:
    """Work that waits until it is let go; ``began`` has the names of that which began."""

    def __init__(self) -> None:
        self.began: list[str] = []
        self.go = threading.Event()

    def named(self, name: str) -> Work:
        def work(_: SlideReader) -> str:
            self.began.append(name)
            assert self.go.wait(60)
            return name

        return work


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not true():
            await asyncio.sleep(0.01)


async def settled() -> None:
    """Let everything begin that may."""
    for _ in range(20):
        await asyncio.sleep(0.005)


def test_clients_take_turns(loop: asyncio.AbstractEventLoop) -> None:
    pool, slow = ReaderPool(ReadingConfig(readers=1)), Slow()

    async def ask() -> None:
        asked = []
        for client, count in (("greedy", 40), ("modest", 3), ("other", 1)):
            for number in range(count):
                run = pool.run("s", slow.named(f"{client} {number}"), client=client)
                asked.append(asyncio.create_task(run))
                await asyncio.sleep(0)
        await settled()
        assert slow.began == ["greedy 0"]
        slow.go.set()
        await asyncio.gather(*asked)

    loop.run_until_complete(ask())
    pool.close()
    assert slow.began[:7] == [
        "greedy 0", "greedy 1", "modest 0", "other 0", "greedy 2", "modest 1", "greedy 3",
    ]  # fmt: skip
    assert len(slow.began) == 44


def test_who_has_most_in_a_full_queue_is_refused(loop: asyncio.AbstractEventLoop) -> None:
    pool, slow = ReaderPool(ReadingConfig(readers=1, queued=6)), Slow()

    async def ask() -> tuple[list[Any], list[Any]]:
        def some(client: str, count: int) -> list[asyncio.Task[str]]:
            names = (f"{client} {number}" for number in range(count))
            return [
                asyncio.create_task(pool.run("s", slow.named(name), client=client))
                for name in names
            ]

        greedy = some("greedy", 9)
        await settled()
        modest = some("modest", 5)
        await settled()
        slow.go.set()
        return (
            await asyncio.gather(*greedy, return_exceptions=True),
            await asyncio.gather(*modest, return_exceptions=True),
        )

    greedy, modest = loop.run_until_complete(ask())
    pool.close()
    for found in (greedy, modest):
        assert {one.code for one in found if isinstance(one, RequestError)} == {"busy"}
    # One runs and six wait; of those the other client gets half.
    assert [one for one in greedy if isinstance(one, str)] == [f"greedy {n}" for n in range(4)]
    assert [one for one in modest if isinstance(one, str)] == [f"modest {n}" for n in range(3)]


def test_a_queue_of_nothing_refuses_all_that_would_wait(loop: asyncio.AbstractEventLoop) -> None:
    pool, slow = ReaderPool(ReadingConfig(readers=1, queued=0)), Slow()

    async def ask() -> None:
        first = asyncio.create_task(pool.run("s", slow.named("first"), client="a"))
        await settled()
        with pytest.raises(RequestError) as error:
            await pool.run("s", slow.named("second"), client="b")
        assert error.value.code == "busy"
        slow.go.set()
        assert await first == "first"

    loop.run_until_complete(ask())
    pool.close()


def test_long_requests_have_half_of_the_readers_and_one_a_client(
    loop: asyncio.AbstractEventLoop,
) -> None:
    pool, slow, brief = ReaderPool(ReadingConfig(readers=4)), Slow(), Slow()
    brief.go.set()

    async def ask() -> None:
        def long(client: str, number: int) -> asyncio.Task[str]:
            run = pool.run("s", slow.named(f"{client} {number}"), client=client, long=True)
            return asyncio.create_task(run)

        greedy = [long("greedy", number) for number in range(LONG_WAITING + 3)]
        await settled()
        assert slow.began == ["greedy 0"]
        refused = [task.exception() for task in greedy if task.done()]
        assert [isinstance(one, RequestError) and one.code for one in refused] == ["busy"] * 3
        others = [long("modest", 0), long("third", 0)]
        await settled()
        assert slow.began == ["greedy 0", "modest 0"]
        for number in range(8):  # whatever else is asked has the other readers
            await pool.run("t", brief.named(str(number)), client="greedy")
        # Who leaves frees no turn before the reader is free.
        for task in greedy:
            task.cancel()
        await asyncio.gather(*greedy, return_exceptions=True)
        await settled()
        assert slow.began == ["greedy 0", "modest 0"]
        again = long("greedy", 99)
        slow.go.set()
        assert await asyncio.gather(*others, again) == ["modest 0", "third 0", "greedy 99"]
        await until(lambda: not pool._long_of)
        assert not pool._turns

    loop.run_until_complete(ask())
    pool.close()
    assert set(slow.began) == {"greedy 0", "modest 0", "third 0", "greedy 99"}


def test_a_long_request_that_hangs_refuses_long_ones_alone(
    loop: asyncio.AbstractEventLoop,
) -> None:
    pool = ReaderPool(ReadingConfig(readers=1))
    calls = []

    def hang(_: SlideReader) -> str:
        calls.append("hang")
        raise SlideError("It hangs.", code="timeout")

    async def ask(slide: str, *, long: bool) -> str:
        try:
            return await pool.run(slide, hang if long else lambda _: "fine", long=long)
        except SlideError as error:
            return error.code

    async def all_of_them() -> list[str]:
        return [
            await ask(slide, long=long)
            for slide, long in [("s", True), ("s", True), ("s", False), ("t", True), ("s", True)]
        ]

    assert loop.run_until_complete(all_of_them()) == [
        "timeout", "timeout", "fine", "timeout", "timeout",
    ]  # fmt: skip
    assert len(calls) == 2  # one of each slide
    pool.close()


# -- a slide whose pixels nobody could read in time ------------------------------------------------

SIDE, TILE = 102_400, 256


def write_flat(path: Path, side: int) -> None:
    """Write a slide of ``side`` px without a pyramid, all of whose tiles are one: a bomb."""
    tile = np.zeros((TILE, TILE, 3), np.uint8)
    tile[..., 0], tile[..., 1], tile[..., 2] = np.arange(TILE), np.arange(TILE)[:, None], 150
    data = zlib.compress(tile.tobytes(), 9)
    count = (side // TILE) ** 2
    blob, at = io.BytesIO(), {}
    blob.write(b"II*\0" + bytes(4))
    for name, content in (
        ("tile", data),
        ("bits", struct.pack("<3H", 8, 8, 8)),
        ("mpp", struct.pack("<2I", 40_000, 1)),
        ("offsets", struct.pack("<I", 8) * count),
        ("counts", struct.pack("<I", len(data)) * count),
    ):
        at[name] = blob.tell()
        blob.write(content + bytes(len(content) % 2))
    entries = [
        (256, 4, 1, side), (257, 4, 1, side), (258, 3, 3, at["bits"]), (259, 3, 1, 8),
        (262, 3, 1, 2), (277, 3, 1, 3), (282, 5, 1, at["mpp"]), (283, 5, 1, at["mpp"]),
        (296, 3, 1, 3), (322, 3, 1, TILE), (323, 3, 1, TILE), (324, 4, count, at["offsets"]),
        (325, 4, count, at["counts"]),
    ]  # fmt: skip
    first = blob.tell()
    blob.write(struct.pack("<H", len(entries)))
    for entry in entries:
        blob.write(struct.pack("<HHII", *entry))
    blob.write(bytes(4))
    blob.seek(4)
    blob.write(struct.pack("<I", first))
    path.write_bytes(blob.getvalue())


def test_what_could_not_be_read_in_time_is_refused_before_it_is_read(
    tmp_path: Path, loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten billion pixels in 2 MB: wide views are refused, and parts of it are shown."""
    path = tmp_path / "flat.tif"
    write_flat(path, SIDE)
    asked: list[tuple[str, bool]] = []
    run = ReaderPool.run

    def noted(self: ReaderPool, slide: str, work: Any, *, client: str = "", long: bool = False):  # type: ignore[no-untyped-def]
        asked.append((client, long))
        return run(self, slide, work, client=client, long=long)

    monkeypatch.setattr(ReaderPool, "run", noted)
    tiles = Tiles(FileSlides({"flat": path}), config=ReadingConfig(readers=1, timeout_s=60))

    said: list[str] = []

    async def code(asking: Any) -> str:
        try:
            await asking
        except PathFLIPError as error:
            said.append(str(error))
            return error.code
        return ""

    async def ask() -> None:
        whole = {"x0": 0, "y0": 0, "w0": SIDE, "h0": SIDE, "px": 512}
        for number in range(20):
            assert await code(tiles.view("flat", **whole, client=f"c{number}")) == "too_many_pixels"
        for level in (0, 4, 8):
            assert await code(tiles.tile("flat", level, 0, 0)) == "too_many_pixels"
        asked.clear()
        side = 6144
        assert side**2 > LONG_PX
        data = await tiles.view("flat", x0=0, y0=0, w0=side, h0=side, px=24 * 8, client="me")
        assert asked == [("me", False), ("me", True)]
        shown = np.asarray(Image.open(io.BytesIO(data)), np.int16)
        assert np.abs(shown.mean((0, 1)) - (127.5, 127.5, 150)).max() < 2
        asked.clear()
        _, tile = await tiles.tile("flat", 17, 3, 5, client="me")
        assert asked == [("me", False)]
        assert tile is not None
        one = np.asarray(Image.open(io.BytesIO(tile)), np.int16)
        assert np.abs(one[..., 0] - np.arange(TILE)).mean() <= 2

    try:
        loop.run_until_complete(ask())
    finally:
        loop.run_until_complete(tiles.close())
    assert "flat.tif" not in "".join(said)
