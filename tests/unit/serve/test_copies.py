"""Slides of an object store behind the viewer: bounded copies, whole, of what was ingested."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pathflip.errors import PathFLIPError, SlideError
from pathflip.slides import staging
from pathflip.slides.sources import digest_source, stat_slide
from pathflip.slides.staging import Stage
from pathflip.synth import make_slide
from serve import copies as copies_module
from serve.copies import COPYING_OF_CLIENT, Copies
from serve.limits import RequestError
from serve.reader_pool import ReadingConfig
from serve.slide_files import FileSlides, SlideFile
from serve.tiles import Tiles
from tests.s3 import Store

CONFIG = ReadingConfig(readers=1)


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("copies") / "JANE.tif"
    make_slide(path, width=700, height=600, mpp=0.5, seed=4)
    return path


@pytest.fixture
def bucket(store: Store, slide: Path) -> str:
    """A bucket with six slides of one size, "0.tif" to "5.tif"."""
    bucket = store.new_bucket()
    for number in range(6):
        put(store, bucket, number, slide.read_bytes())
    return bucket


def put(store: Store, bucket: str, number: int, data: bytes) -> None:
    path = f"{bucket.removeprefix('s3:/')}/{number}.tif"
    assert store.request("PUT", path, data)[0] == 200


def staged(tmp_path: Path, slide: Path, *, slides: float) -> Stage:
    """Copies that may take the bytes of so many slides."""
    return Stage(str(tmp_path / "stage"), gb=slides * slide.stat().st_size / 1e9)


def taken(stage: Stage) -> int:
    """Bytes of copies on disk, whole or not."""
    return sum(
        os.path.getsize(os.path.join(folder, name))
        for folder, _, names in os.walk(stage.folder)
        for name in names
        if name.endswith(".tif")
    )


def found(bucket: str, number: int, **more: Any) -> SlideFile:
    uri = f"{bucket}/{number}.tif"
    source = stat_slide(uri)
    return SlideFile(
        slide_id=str(number), uri=uri, bytes=source.bytes, mtime_ns=source.mtime_ns, content=uri,
        **more,
    )  # fmt: skip


@pytest.fixture
def run(loop: asyncio.AbstractEventLoop) -> Any:
    """``run(coroutine)`` within a minute."""
    return lambda coroutine: loop.run_until_complete(asyncio.wait_for(coroutine, 60))


async def code(asked: Any) -> str:
    try:
        await asked
    except PathFLIPError as error:
        assert "JANE" not in str(error)  # noqa: PT017
        return error.code
    return ""


def test_tiles_of_objects_are_those_of_the_file(
    store: Store, bucket: str, slide: Path, tmp_path: Path, run: Any
) -> None:
    """Six slides through a disk for two and a half: each is shown, and the bound holds."""
    stage = staged(tmp_path, slide, slides=2.5)
    uris = {str(number): f"{bucket}/{number}.tif" for number in range(6)}
    tiles = Tiles(FileSlides(uris), config=CONFIG, copies=Copies(stage))
    own = Tiles(FileSlides({"own": slide}), config=CONFIG)

    async def ask() -> None:
        _, truth = await own.tile("own", 10, 1, 1)
        for name in [*uris, "0"]:
            _, data = await tiles.tile(name, 10, 1, 1)
            assert data == truth
            assert taken(stage) <= 2.5 * slide.stat().st_size
        # All at once: each waits for its turn at the room, and none fails.
        tiles.cache = type(tiles.cache)(1 << 20)
        asked = (tiles.tile(name, 9, 0, 0, client=name) for name in uris)
        assert len({data for _, data in await asyncio.gather(*asked)}) == 1
        assert taken(stage) <= 2.5 * slide.stat().st_size
        await tiles.close()
        await own.close()

    run(ask())
    shutil.rmtree(stage.folder)  # nobody holds a file of it


def test_an_object_that_is_another_by_now_is_not_shown(
    store: Store, bucket: str, slide: Path, tmp_path: Path, run: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(copies_module, "CHECK_S", 0.0)
    stage = staged(tmp_path, slide, slides=9)
    tiles = Tiles(
        FileSlides({"a": f"{bucket}/0.tif", "b": f"{bucket}/1.tif"}), config=CONFIG,
        copies=Copies(stage),
    )  # fmt: skip
    other = bytearray(slide.read_bytes())
    other[-1] ^= 1

    async def ask() -> None:
        assert await code(tiles.tile("a", 10, 0, 0)) == ""
        await tiles.info("b")
        put(store, bucket, 0, bytes(other) + b"\0")  # another size: times of objects are seconds
        assert store.request("DELETE", f"{bucket.removeprefix('s3:/')}/1.tif")[0] == 204
        for name in ("a", "b"):
            for place in ((10, 1, 1), (10, 1, 1), (9, 0, 0)):
                assert await code(tiles.tile(name, *place)) == "source_changed"
        assert not tiles._copies._held
        await tiles.close()

    run(ask())


def test_a_copy_has_the_digest_that_was_ingested(
    bucket: str, slide: Path, tmp_path: Path, run: Any
) -> None:
    """Whoever replaces an object within a second by one of its size is found out by its bytes."""
    copies = Copies(staged(tmp_path, slide, slides=9))
    right = found(bucket, 0, sha256=digest_source(slide))

    async def ask() -> None:
        async with copies.open(right) as path:
            assert Path(path).read_bytes() == slide.read_bytes()
        wrong = replace(right, content="other", sha256="0" * 64)
        with pytest.raises(SlideError) as error:
            async with copies.open(wrong):
                pytest.fail("it was opened")
        assert error.value.code == "source_changed"
        await copies.close()

    run(ask())


def test_half_a_download_is_not_shown(
    bucket: str, slide: Path, tmp_path: Path, run: Any, monkeypatch: Any
) -> None:
    stage, go = staged(tmp_path, slide, slides=9), threading.Event()
    copies = Copies(stage)
    monkeypatch.setattr(staging, "_BLOCK", 4096)
    read = staging.ObjectReader.read

    def slow(self: Any, offset: int, size: int) -> bytes:
        if offset > slide.stat().st_size // 2:
            assert go.wait(60)
        return read(self, offset, size)

    monkeypatch.setattr(staging.ObjectReader, "read", slow)
    tiles = Tiles(FileSlides({"a": f"{bucket}/0.tif"}), config=CONFIG, copies=copies)

    async def ask() -> None:
        monkeypatch.setattr(copies_module, "COPY_S", 0.3)
        while taken(stage) < slide.stat().st_size // 3:
            assert await code(tiles.tile("a", 10, 0, 0)) == "unavailable"
        assert taken(stage) < slide.stat().st_size
        assert await code(tiles.tile("a", 10, 0, 0)) == "unavailable"
        go.set()
        monkeypatch.setattr(copies_module, "COPY_S", 30.0)
        assert await code(tiles.tile("a", 10, 0, 0)) == ""
        await tiles.close()

    run(ask())


def test_a_copy_stays_while_it_is_read_whatever_else_comes(
    bucket: str, slide: Path, tmp_path: Path, run: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(copies_module, "COPIES", 1)
    stage = staged(tmp_path, slide, slides=4)
    copies = Copies(stage)
    files = [found(bucket, number) for number in range(6)]

    async def reads(number: int) -> None:
        async with copies.open(files[number], client=str(number)) as path:
            for _ in range(20):
                await asyncio.sleep(0.002)
                assert os.path.getsize(path) == slide.stat().st_size

    async def ask() -> None:
        async with copies.open(files[0]) as first:
            for _ in range(3):
                asked = [reads(number % 6) for number in range(12)]
                await asyncio.gather(*asked)
            assert Path(first).read_bytes() == slide.read_bytes()
        await copies.close()
        assert not copies._held

    run(ask())


def test_one_client_has_two_copies_made_at_a_time(
    bucket: str, slide: Path, tmp_path: Path, run: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(copies_module, "WAITING", 5)
    copies, go = Copies(staged(tmp_path, slide, slides=9)), threading.Event()
    began: list[str] = []
    download = staging._download

    def slow(stored: Any, target: Path) -> str:
        began.append(stored.uri[-5])
        assert go.wait(60)
        return download(stored, target)

    monkeypatch.setattr(staging, "_download", slow)

    async def opened(number: int, client: str) -> None:
        async with copies.open(found(bucket, number), client=client):
            pass

    async def ask() -> None:
        asked = [asyncio.create_task(opened(number, "greedy")) for number in range(4)]
        asked.append(asyncio.create_task(opened(5, "modest")))
        while len(began) < COPYING_OF_CLIENT + 1:
            await asyncio.sleep(0.01)
        assert sorted(began) == ["0", "1", "5"]
        with pytest.raises(RequestError) as error:
            await opened(4, "third")
        assert error.value.code == "busy"
        # Who leaves a copy that is being made does not stop it for whoever asks again.
        asked[0].cancel()
        again = asyncio.create_task(opened(0, "greedy"))
        await asyncio.sleep(0.05)
        go.set()
        await asyncio.gather(again, *asked[1:])
        assert sorted(began) == ["0", "1", "2", "3", "5"]
        await copies.close()

    run(ask())
