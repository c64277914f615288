"""Pixels of slides over HTTP: what is shown, kept, refused, and what a hostile file costs."""

from __future__ import annotations

import asyncio
import io
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from pathflip.archive import schema
from pathflip.archive.commit import Committer
from pathflip.archive.create import create_archive
from pathflip.errors import SlideError
from pathflip.slides.reader import SlideReader
from pathflip.slides.slide import Slide
from pathflip.slides.sources import digest_source, stat_source
from pathflip.slides.tissue import TissueMask
from pathflip.synth import make_slide
from serve import slide_files
from serve.audit import AuditLog
from serve.auth import read_tokens
from serve.ingress import make_app
from serve.limits import RequestError
from serve.reader_pool import DEATHS, ReaderPool, ReadingConfig
from serve.routing import Parts
from serve.slide_files import FileSlides
from serve.tiles import TileCache, Tiles
from tests.archives import TILING, filled
from tests.unit.serve.service_fixture import bearer, write_tokens

NAMES = ("DOE^JANE", "JONES")
CONFIG = ReadingConfig(readers=2, timeout_s=30)
Get = Callable[..., httpx.Response]


def tissue_of(path: Path) -> TissueMask:
    mask = np.zeros((40, 60), np.bool_)
    mask[5:20, 10:30] = True
    mask[8:12, 14:20] = False
    mask[25:30, 40:50] = True
    return TissueMask(mask, 10.0, 0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slides, an archive that knows them, tokens; slide "b" is for tests that change it."""
    root = tmp_path_factory.mktemp("tiles")
    files = {"a": root / f"{NAMES[0]}.svs", "b": root / f"{NAMES[1]}.tif"}
    make_slide(files["a"], width=1900, height=1300, mpp=0.5, layout="aperio", seed=1)
    make_slide(files["b"], width=900, height=700, mpp=0.5, seed=2)
    rows, regions = [], []
    for slide, path in files.items():
        source, mask = stat_source(path), tissue_of(path)
        with Slide(path) as opened:
            width, height = opened.width, opened.height
        override = slide == "b"
        rows.append(
            {"slide_id": slide, "uri": str(path), "aliases": [], "status": "ready"}
            | {"bytes": source.bytes, "mtime_ns": source.mtime_ns, "sha256": digest_source(path)}
            | {"width": width, "height": height, "mpp": 0.4 if override else 0.5}
            | {"mpp_source": "override" if override else "metadata", "fingerprint": slide}
            | {"encoders": [], "n_regions": 1, "n_patches": 4}
            | {"tissue_png": mask.to_png(), "tissue_mpp": mask.mpp}
        )
        regions.append(
            {"slide_id": slide, "region_id": schema.region_id(slide, rx=0, ry=0), "rx": 0, "ry": 0}
            | {"x0": 0, "y0": 0, "size0": 512, "mpp": 0.5, "tissue_fraction": 1.0, "n_patches": 4}
            | {"n_bad": 0, "patch_mask": np.ones(16, np.uint8)}
            | {f"patch_{what}": np.zeros(16) for what in ("tissue", "blur", "pen")}
        )
    rows.append(
        {"slide_id": "broken", "uri": str(files["a"]), "aliases": [], "status": "quarantined"}
        | {"reason": "unreadable", "encoders": []}
    )
    create_archive(root / "archive", tiling=dict(TILING))
    with Committer(root / "archive") as committer:
        committer.commit(
            slides=filled(schema.slides_schema(), rows),
            regions=filled(schema.regions_schema(16), regions),
        )
    write_tokens(root / "tokens")
    return root


@pytest.fixture(scope="module")
def tiles(folder: Path, loop: asyncio.AbstractEventLoop) -> Iterator[Tiles]:
    found = Tiles(str(folder / "archive"), config=CONFIG, refresh_s=0.2)
    yield found
    loop.run_until_complete(found.close())


@pytest.fixture(scope="module")
def get(tiles: Tiles, folder: Path, loop: asyncio.AbstractEventLoop) -> Iterator[Get]:
    """``get(path, who=…, headers=…)`` from a service with tokens and an audit log."""
    audit = AuditLog(folder / "audit")
    app = make_app(
        Parts(search=None, tiles=tiles, redactions={str(folder): "the folder"}),
        tokens=read_tokens(folder / "tokens"),
        audit=audit,
    )

    def ask(path: str, *, who: str = "reader", headers: Any = None, **params: Any) -> Any:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://t") as http:
                sent = dict(bearer(who)) | dict(headers or {})
                return await http.get(f"/v1/slides/{path}", headers=sent, params=params or None)

        return loop.run_until_complete(send())

    yield ask
    audit.close()


def pixels(data: bytes) -> Any:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"), np.int16)


def test_every_tile_is_there_and_right(get: Get, folder: Path) -> None:
    info = get("a/tiles").json()
    assert (info["slide_id"], info["width"], info["height"]) == ("a", 1900, 1300)
    assert (info["mpp"], info["power"], info["tile_w"], info["format"]) == (0.5, 20, 256, "jpg")
    assert (info["min_level"], info["max_level"]) == (8, 11)
    assert [level["level"] for level in info["levels"]] == [8, 9, 10, 11]
    with Slide(folder / f"{NAMES[0]}.svs") as slide:
        for level in info["levels"]:
            assert level["scale0"] == 2 ** (11 - level["level"])
            whole = np.zeros((level["height"], level["width"], 3), np.int16)
            for x in range(-(-level["width"] // 256)):
                for y in range(-(-level["height"] // 256)):
                    answer = get(f"a/tiles/{level['level']}/{x}_{y}.jpg")
                    assert answer.status_code == 200
                    assert answer.headers["content-type"] == "image/jpeg"
                    part = pixels(answer.content)
                    h, w = part.shape[:2]
                    whole[256 * y : 256 * y + h, 256 * x : 256 * x + w] = part
            truth = slide.read(0, 0, (level["width"], level["height"]), mpp=0.5 * level["scale0"])
            assert np.abs(whole - truth).mean() <= 2


def test_a_tile_is_sent_once(get: Get, folder: Path) -> None:
    answer = get("a/tiles/11/1_1.jpg")
    tag = answer.headers["etag"]
    assert answer.headers["cache-control"] == "private, max-age=3600"
    for known in (tag, f'"other", {tag}', f"W/{tag}"):
        again = get("a/tiles/11/1_1.jpg", headers={"If-None-Match": known})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == tag
        assert again.headers["cache-control"] == "private, max-age=3600"
    other = get("a/tiles/11/2_1.jpg", headers={"If-None-Match": tag})
    assert other.status_code == 200
    assert other.headers["etag"] != tag
    assert "DOE" not in tag
    assert tag[1:13] == digest_source(folder / f"{NAMES[0]}.svs")[:12]


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("a/tiles/11/8_0.jpg", 404, "unknown_tile"),
        ("a/tiles/12/0_0.jpg", 404, "unknown_tile"),
        ("a/tiles/99/0_0.jpg", 422, "invalid"),
        ("a/tiles/11/-1_0.jpg", 422, "invalid"),
        ("a/tiles/11/0_x.jpg", 422, "invalid"),
        ("a/tiles/11/99999999999999999999_0.jpg", 422, "invalid"),
        ("broken/tiles", 404, "unknown_slide"),
        ("broken/tiles/0/0_0.jpg", 404, "unknown_slide"),
        (f"{NAMES[0]}.svs/tiles", 404, "unknown_slide"),
        ("..%2Farchive/tiles", 404, "not_found"),
        ("a/view?x0=0&y0=0&w0=10&h0=0", 422, "invalid"),
        ("a/view?x0=0&y0=0&w0=10&h0=10&px=4096", 422, "invalid"),
        ("a/view?x0=0&y0=0&w0=1000&h0=1", 422, "bad_view"),
        ("a/view?x0=0&y0=0&w0=100000&h0=100000", 422, "bad_view"),
        ("a/view?x0=900000&y0=0&w0=10&h0=10", 422, "bad_view"),
        ("a/label", 404, "not_found"),
        ("a/macro", 404, "not_found"),
    ],
)
def test_what_is_refused(get: Get, path: str, status: int, code: str) -> None:
    answer = get(path)
    assert (answer.status_code, answer.json()["code"]) == (status, code)


@pytest.mark.parametrize("path", ["a/tiles", "a/tiles/11/0_0.jpg", "a/outlines", "a/tiles.dzi",
                                  "a/view?x0=0&y0=0&w0=9&h0=9"])  # fmt: skip
def test_pixels_need_the_scope_and_are_audited(get: Get, folder: Path, path: str) -> None:
    refused = get(path, who="talker")
    assert (refused.status_code, refused.json()["code"]) == (403, "scope")
    assert get(path).status_code == 200
    (log,) = (folder / "audit").iterdir()
    line = json.loads(log.read_text().splitlines()[-1])
    assert (line["slides"], line["who"], line["outcome"]) == (["a"], "reader", 200)


def test_a_view_is_the_rectangle(get: Get, folder: Path) -> None:
    answer = get("a/view", x0=400, y0=300, w0=1024, h0=512, px=512)
    with Slide(folder / f"{NAMES[0]}.svs") as slide:
        truth = slide.read(400, 300, (512, 256), mpp=1.0)
    gap = (pixels(answer.content) - truth).reshape(64, 4, 128, 4, 3).mean((1, 3))
    assert np.abs(gap).mean() <= 2  # of 4 x 4: a picture is compressed more than a tile


def test_deep_zoom_finds_the_same_tiles(get: Get) -> None:
    """A client of Deep Zoom makes the address of a tile of that of the XML."""
    import xml.etree.ElementTree as ET

    image = ET.fromstring(get("a/tiles.dzi").text)
    size = next(iter(image))
    assert (image.get("TileSize"), image.get("Overlap"), image.get("Format")) == ("256", "0", "jpg")
    assert (size.get("Width"), size.get("Height")) == ("1900", "1300")
    assert get("a/tiles_files/11/1_1.jpg").content == get("a/tiles/11/1_1.jpg").content
    assert pixels(get("a/tiles_files/0/0_0.jpg").content).shape == (1, 1, 3)


def test_outlines_are_the_archives(get: Get, folder: Path) -> None:
    found = get("a/outlines").json()
    assert found["regions"] == [{"region_id": "a/0_0", "x0": 0, "y0": 0, "size0": 512}]
    drawn = [
        (np.array(rings[0][:-1]), [np.array(hole[:-1]) for hole in rings[1:]])
        for rings in found["tissue"]["coordinates"]
    ]
    assert all(rings[0][0] == rings[0][-1] for rings in found["tissue"]["coordinates"])
    mask = tissue_of(folder)
    again = TissueMask.from_polygons(drawn, width=1200, height=800, slide_mpp=0.5, mpp=10.0)
    assert np.array_equal(again.mask, mask.mask)


def test_outlines_are_drawn_once_and_one_at_a_time(
    folder: Path, loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ragged tissue takes seconds: whoever asks for it all the time keeps nobody from tiles."""
    began: list[str] = []
    draw, go = slide_files._outlines, threading.Event()

    def slow(archive: Any, slide: str) -> bytes:
        began.append(slide)
        assert go.wait(60)
        return draw(archive, slide)

    monkeypatch.setattr(slide_files, "_outlines", slow)
    tiles = Tiles(str(folder / "archive"), config=CONFIG)

    async def ask() -> None:
        asked = [
            asyncio.create_task(tiles.outlines("ab"[number % 2], client="greedy"))
            for number in range(40)
        ]
        assert (await tiles.tile("a", 11, 1, 1))[1]  # whatever waits for the other thing
        async with asyncio.timeout(60):
            while not began:
                await asyncio.sleep(0.01)
        assert began == ["a"]
        go.set()
        found = await asyncio.gather(*asked)
        assert len(set(found)) == 2
        assert json.loads(found[0])["regions"][0]["region_id"] == "a/0_0"
        assert await tiles.outlines("b", client="other") == found[1]
        assert sorted(began) == ["a", "b"]

    try:
        loop.run_until_complete(ask())
    finally:
        loop.run_until_complete(tiles.close())


def test_many_points_are_fewer_and_nearly_the_same() -> None:
    from serve.slide_files import _multi_polygon

    y, x = np.mgrid[:600, :600]
    noise = np.random.default_rng(0).random((600, 600)) < 0.3
    ring = np.hypot(x - 300, y - 300)
    mask = TissueMask((ring < 290) & ~((ring > 250) & noise), 8.0, 0.5)
    exact = mask.polygons()
    made = _multi_polygon(exact, 16.0)
    count = sum(len(r) for outer, holes in exact for r in (outer, *holes))
    assert sum(len(r) for rings in made["coordinates"] for r in rings) < count / 3
    drawn = [(np.array(r[0][:-1]), [np.array(h[:-1]) for h in r[1:]]) for r in made["coordinates"]]
    again = TissueMask.from_polygons(drawn, width=9600, height=9600, slide_mpp=0.5, mpp=8.0)
    assert (again.mask != mask.mask).mean() < 0.08  # nearly all of the noise, and nothing else
    smooth = ring < 245
    assert again.mask[smooth].all()


def test_an_override_of_the_resolution_is_told(get: Get) -> None:
    info = get("b/tiles").json()
    assert (info["mpp"], info["power"]) == (0.4, 25)


def test_a_changed_file_is_refused(get: Get, tiles: Tiles, folder: Path) -> None:
    path = folder / f"{NAMES[1]}.tif"
    status, kept = path.stat(), path.with_suffix(".kept")
    first = get("b/tiles/10/0_0.jpg")
    asked = ["b/tiles", "b/tiles/10/0_0.jpg", "b/tiles/10/1_0.jpg", "b/view?x0=0&y0=0&w0=9&h0=9"]

    def refusals() -> None:
        time.sleep(2.1)  # nobody has looked lately
        for address in asked:
            answer = get(address, headers={"If-None-Match": first.headers["etag"]})
            assert (answer.status_code, answer.json()["code"]) == (409, "source_changed")
            assert NAMES[1] not in answer.text
            assert str(folder) not in answer.text

    os.utime(path, ns=(0, status.st_mtime_ns + 1))
    refusals()
    path.rename(kept)
    refusals()
    os.utime(kept, ns=(0, status.st_mtime_ns))
    kept.rename(path)
    assert get("b/tiles/10/0_0.jpg").content == first.content
    assert get("b/outlines").status_code == 200


# -- what is kept ----------------------------------------------------------------------------------


def test_a_cache_keeps_its_bound_and_what_is_used() -> None:
    cache = TileCache(100)
    for number in range(50):
        cache.put(str(number), bytes(10))
        assert cache.bytes <= 100
        assert cache.get("0") is not None
    assert len(cache) == 10
    assert cache.get("30") is None
    cache.put("large", bytes(26))
    assert cache.get("large") is None
    cache.put("0", bytes(20))
    assert (cache.bytes, len(cache)) == (100, 9)


def test_same_tiles_at_once_are_read_once(
    folder: Path, loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    read = SlideReader.tile

    def counted(self: SlideReader, *place: Any, **options: Any) -> Any:
        calls.append(place)
        return read(self, *place, **options)

    monkeypatch.setattr(SlideReader, "tile", counted)

    async def ask() -> list[tuple[str, bytes | None]]:
        found = await asyncio.gather(*(tiles.tile("a", 11, 2, 2) for _ in range(20)))
        found += [await tiles.tile("a", 11, 2, 2)]
        return found

    tiles = Tiles(FileSlides({"a": folder / f"{NAMES[0]}.svs"}), config=CONFIG)
    try:
        found = loop.run_until_complete(ask())
        assert len(calls) == 1
        assert len(set(found)) == 1
    finally:
        loop.run_until_complete(tiles.close())


def test_a_request_that_is_given_up_takes_no_reader(
    folder: Path, loop: asyncio.AbstractEventLoop
) -> None:
    tiles = Tiles(
        FileSlides({"a": folder / f"{NAMES[0]}.svs"}), config=ReadingConfig(readers=1, queued=30)
    )

    async def ask() -> int:
        await tiles.info("a")  # where its file is, so that the first asks first
        asked = [asyncio.create_task(tiles.tile("a", 11, n % 7, n // 7)) for n in range(30)]
        await asked[0]
        for task in asked[1:]:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        await tiles.tile("a", 10, 0, 0)
        return len(tiles.cache)

    try:
        assert loop.run_until_complete(ask()) < 10
    finally:
        loop.run_until_complete(tiles.close())


def test_more_than_may_wait_are_refused(folder: Path, loop: asyncio.AbstractEventLoop) -> None:
    tiles = Tiles(
        FileSlides({"a": folder / f"{NAMES[0]}.svs"}), config=ReadingConfig(readers=1, queued=3)
    )

    async def ask() -> list[Any]:
        asked = (tiles.tile("a", 11, n % 7, n // 7) for n in range(10))
        return await asyncio.gather(*asked, return_exceptions=True)

    try:
        found = loop.run_until_complete(ask())
        refused = [one for one in found if isinstance(one, RequestError)]
        assert {one.code for one in refused} == {"busy"}
        assert (len(refused), sum(isinstance(one, tuple) for one in found)) == (6, 4)
    finally:
        loop.run_until_complete(tiles.close())


# -- hostile and vanished slides -------------------------------------------------------------------


def pids(pool: ReaderPool) -> list[int]:
    return [pid for w in pool._workers if (pid := w.reader._process.pid) is not None]


def test_200_tiles_of_bad_slides_cost_an_error_each(
    folder: Path, tmp_path: Path, loop: asyncio.AbstractEventLoop
) -> None:
    hostile, cut = tmp_path / "hostile.tif", tmp_path / "cut.svs"
    hostile.write_bytes(b"II*\0" + bytes(64))
    cut.write_bytes((folder / f"{NAMES[0]}.svs").read_bytes()[:60_000])
    slides = {
        "a": folder / f"{NAMES[0]}.svs", "gone": tmp_path / "gone.svs", "hostile": hostile,
        "cut": cut, "folder": tmp_path,
    }  # fmt: skip
    tiles = Tiles(FileSlides(slides), config=CONFIG)

    async def one(slide: str, number: int) -> str:
        try:
            await tiles.tile(slide, 8, number % 20, number // 20)
        except SlideError as error:
            return error.code
        return ""

    async def ask(slide: str) -> set[str]:
        return set(await asyncio.gather(*(one(slide, number) for number in range(200))))

    try:
        loop.run_until_complete(tiles.tile("a", 11, 0, 0))
        loop.run_until_complete(asyncio.sleep(0))
        for slide, codes in (
            ("gone", {"not_a_file", "source_changed"}), ("hostile", {"unreadable"}),
            ("cut", {"unreadable"}), ("folder", {"not_a_file", "unreadable", "source_changed"}),
        ):  # fmt: skip
            found = loop.run_until_complete(ask(slide))
            assert found
            assert found <= codes, (slide, found)
            before = pids(tiles._pool)
            loop.run_until_complete(tiles.tile("a", 11, 1, 1))
            assert pids(tiles._pool) == before
    finally:
        loop.run_until_complete(tiles.close())


@pytest.mark.parametrize("how", ["abort", "hang"])
def test_a_slide_that_kills_readers_is_refused_for_a_while(
    how: str, folder: Path, tmp_path: Path, loop: asyncio.AbstractEventLoop
) -> None:
    """Three readers die on it; the other 197 tiles cost none, and other slides go on."""
    from tests.failing_reader import failed, failing

    good, bad = folder / f"{NAMES[0]}.svs", tmp_path / "bad.tif"
    make_slide(bad, width=600, height=600, mpp=0.5)
    with failing(tmp_path / "failures", {"bad.tif": ("tile", how)}):
        tiles = Tiles(
            FileSlides({"good": good, "bad": bad}),
            config=ReadingConfig(readers=1, timeout_s=2 if how == "hang" else 30),
        )

        async def ask(number: int) -> str:
            try:
                await tiles.tile("bad", 10, number % 3, number // 3 % 3)
            except SlideError as error:
                return error.code
            return ""

        async def all_of_them() -> list[str]:
            return [await ask(number) for number in range(200)]

        try:
            found = loop.run_until_complete(all_of_them())
            assert set(found) == {"timeout" if how == "hang" else "reader_crash"}
            # On a busy machine a reader that hangs may be ended before it has even begun.
            assert len(failed(tmp_path / "failures").get("bad.tif", [])) <= DEATHS
            tiles.config = ReadingConfig(readers=1)
            assert loop.run_until_complete(tiles.tile("good", 11, 0, 0))[1]
        finally:
            loop.run_until_complete(tiles.close())


def test_a_reader_killed_from_outside_is_replaced(
    folder: Path, loop: asyncio.AbstractEventLoop
) -> None:
    tiles = Tiles(FileSlides({"a": folder / f"{NAMES[0]}.svs"}), config=ReadingConfig(readers=1))
    try:
        loop.run_until_complete(tiles.tile("a", 11, 0, 0))
        (pid,) = pids(tiles._pool)
        os.kill(pid, 9)
        assert loop.run_until_complete(tiles.tile("a", 11, 1, 0))[1]
        assert pids(tiles._pool) != [pid]
    finally:
        loop.run_until_complete(tiles.close())


def test_label_and_macro_are_nowhere(tmp_path: Path, loop: asyncio.AbstractEventLoop) -> None:
    """A slide whose label is pure green and whose macro is pure blue: no picture has either."""
    import tifffile

    path = tmp_path / "labelled.svs"
    base = np.full((700, 900, 3), 200, np.uint8)
    base[100:400, 200:700] = (150, 60, 120)
    about = "Aperio Image Library v1\n900x700 |AppMag = 20|MPP = 0.5"
    with tifffile.TiffWriter(path) as file:
        file.write(base, tile=(256, 256), photometric="rgb", compression="jpeg", metadata=None,
                   compressionargs={"level": 90}, description=about)  # fmt: skip
        small = np.ascontiguousarray(base[::4, ::4])
        file.write(small, photometric="rgb", metadata=None, description=about, rowsperstrip=16)
        for name, colour, kind in (("label", (0, 255, 0), 1), ("macro", (0, 0, 255), 9)):
            page = np.full((200, 300, 3), colour, np.uint8)
            file.write(page, photometric="rgb", metadata=None, subfiletype=kind, rowsperstrip=16,
                       description=f"Aperio Image Library v1\n{name} 300x200")  # fmt: skip
    import openslide

    with openslide.OpenSlide(path) as opened:
        assert {"label", "macro"} <= set(opened.associated_images)
    tiles = Tiles(FileSlides({"a": path}), config=ReadingConfig(readers=1))

    async def all_pictures() -> list[bytes]:
        info = await tiles.info("a")
        found = [await tiles.view("a", x0=-900, y0=-700, w0=2700, h0=2100, px=1024)]
        for level in range(info["max_level"] + 1):
            scale0 = 2 ** (info["max_level"] - level)
            for x in range(-(-900 // (scale0 * info["tile_w"]))):
                for y in range(-(-700 // (scale0 * info["tile_h"]))):
                    found.append((await tiles.tile("a", level, x, y))[1] or b"")
        return found

    try:
        for data in loop.run_until_complete(all_pictures()):
            shown = pixels(data)
            green = (shown[..., 1] > 200) & (shown[..., 0] < 90)
            blue = (shown[..., 2] > 200) & (shown[..., 0] < 90)
            assert not green.any()
            assert not blue.any()
    finally:
        loop.run_until_complete(tiles.close())
