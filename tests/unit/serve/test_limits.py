"""Limits: of bodies, JSON, pictures, time and how much is going on."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import struct
import tracemalloc
import zlib

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pathflip.image_query import ImageQuery, _read_picture
from serve.limits import MAX_NAMES, Limits, RequestError, read_body, read_image, strict_json
from tests.unit.serve.service_fixture import bearer, png

PIXELS = 1 << 20


@pytest.mark.parametrize(
    "body",
    [
        b'{"a": NaN}', b'{"a": Infinity}', b'{"a": -Infinity}', b'{"a": 1e999}', b'{"a": -1e999}',
        b'{"a": 1, "a": 2}', b'{"a": {"b": 1, "b": 2}}', b"[" * 100_000, b'{"a":' * 100_000,
        b'{"a": 1' + b"0" * 5000 + b"}", b"{", b"", b"\xff\xfe{}", b'"\xed\xa0\x80"', b"{}{}",
        b"{'a': 1}", b'{"a": 01}', b"\xef\xbb\xbf{}",
    ],
)  # fmt: skip
def test_json_read_in_more_than_one_way_is_refused(ask, body):
    with pytest.raises(RequestError):
        strict_json(body)
    answer = ask("POST", "/v1/search", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422)
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("make", [
    lambda n: {"text": "a"} | {f"x{i}": 0 for i in range(n - 1)},
    lambda n: {"input": [0] * (n - 1)},
    lambda n: {"text": {"a": [{"b": 0}] * ((n - 2) // 2)}},
])  # fmt: skip
def test_names_are_counted_while_they_are_read(ask, make):
    """Each would be an error of its own, and all of them are made before one is shown."""
    strict_json(json.dumps(make(MAX_NAMES)).encode())
    with pytest.raises(RequestError, match="10,000 names") as caught:
        strict_json(json.dumps(make(MAX_NAMES + 2)).encode())
    assert caught.value.code == "too_large"
    answer = ask("POST", "/v1/search", json=make(650_000))
    assert (answer.status_code, answer.json()["code"]) == (413, "too_large")


@pytest.mark.parametrize("value", [b"[]", b"{}", b"0", b"[[]]"])
def test_a_body_of_empty_lists_is_refused_before_it_is_parsed(value):
    body = b'{"a":[' + b",".join([value] * (2 << 20)) + b"]}"
    tracemalloc.start()
    with pytest.raises(RequestError) as caught:
        strict_json(body, names=1 << 30)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert caught.value.code == "too_large"
    assert peak < 1 << 20


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=20,
)  # fmt: skip


@given(json_values)
@settings(max_examples=100, deadline=None)
def test_other_json_is_read_as_it_is(value):
    assert strict_json(json.dumps(value).encode()) == json.loads(json.dumps(value))


def reading(limits, headers, *parts, pause=0.0):
    async def run():
        left = list(parts)
        taken = []

        async def receive():
            await asyncio.sleep(pause)
            taken.append(left.pop(0))
            return {"type": "http.request", "body": taken[-1], "more_body": bool(left)}

        try:
            return await read_body(receive, headers, limits), taken
        except RequestError as error:
            return error.code, taken

    return asyncio.run(run())


async def held(blocked):
    """Yield a body that does not end before an event is set: it keeps its request at work."""
    yield b"{"
    await blocked.wait()
    yield b'"text": "a"}'


def test_a_body_is_counted_while_it_is_read():
    limits = Limits(body_bytes=1000)
    assert reading(limits, {}, b"x" * 500, b"y" * 500)[0] == b"x" * 500 + b"y" * 500
    code, taken = reading(limits, {}, *[b"x" * 300] * 1000)
    assert (code, len(taken)) == ("too_large", 4)
    # Whatever Content-Length says.
    assert reading(limits, {"content-length": "10"}, *[b"x" * 300] * 1000)[0] == "too_large"
    for length in ("1001", "9" * 300):
        assert reading(limits, {"content-length": length}, b"x") == ("too_large", [])
    for odd in ("-1", "1e9", "٣", "", "0x10"):
        assert reading(limits, {"content-length": odd}, b"x")[0] == b"x"
    assert reading(Limits(body_s=0.05), {}, b"x", b"y", pause=0.04)[0] == "too_slow"


def test_a_large_body_is_refused_without_keeping_it(ask):
    async def endless():
        for _ in range(400):
            yield b"x" * (1 << 20)

    tracemalloc.start()
    answer = ask(
        "POST", "/v1/search", content=endless(), headers={"Content-Type": "application/json"}
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (answer.status_code, answer.json()["code"]) == (413, "too_large")
    assert peak < 50 << 20


@pytest.mark.parametrize(
    ("path", "who", "status"),
    [("/healthz", None, 200), ("/v1/slides", None, 401), ("/v1/slides", "all", 200),
     ("/readyz", "all", 200), ("/metrics", "all", 200)],
)  # fmt: skip
def test_nothing_is_read_that_no_route_reads(ask, path, who, status):
    taken = []

    async def endless():
        for _ in range(100):
            taken.append(b"x" * 1000)
            yield taken[-1]

    answer = ask("GET", path, who=who, content=endless())
    assert answer.status_code == status
    assert not taken


def test_one_request_too_many_is_told_to_come_back(serving, loop):
    app = serving(limits=Limits(concurrent=2, retry_s=7)).app
    blocked = asyncio.Event()

    async def run():
        transport = httpx.ASGITransport(app, client=("127.0.0.1", 1))
        options = {"headers": bearer("all") | {"Content-Type": "application/json"}}
        async with httpx.AsyncClient(
            transport=transport, base_url="http://127.0.0.1", timeout=60
        ) as http:
            busy = [
                asyncio.create_task(http.post("/v1/search", content=held(blocked), **options))
                for _ in range(2)
            ]
            while app.running < 2:
                await asyncio.sleep(0)
            refused = await http.post("/v1/search", content=b'{"text": "a"}', **options)
            health = await http.get("/healthz")
            ready = await http.get("/readyz", headers=bearer("all"))
            blocked.set()
            done = await asyncio.gather(*busy)
            after = await http.post("/v1/search", content=b'{"text": "a"}', **options)
        return refused, health, ready, done, after

    refused, health, ready, done, after = loop.run_until_complete(run())
    assert (refused.status_code, refused.json()["code"]) == (429, "busy")
    assert refused.headers["retry-after"] == "7"
    assert (health.status_code, ready.status_code) == (200, 200)
    assert [answer.status_code for answer in done] == [200, 200]
    assert after.status_code == 200


def test_one_token_leaves_places_to_the_others(serving, loop):
    """Six of eight places at most are one token's, whatever it asks for; a page needs none."""
    app = serving(limits=Limits(concurrent=8)).app
    blocked = asyncio.Event()

    async def run():
        transport = httpx.ASGITransport(app, client=("127.0.0.1", 1))
        async with httpx.AsyncClient(
            transport=transport, base_url="http://127.0.0.1", timeout=60
        ) as http:

            def ask(who, content):
                headers = bearer(who) | {"Content-Type": "application/json"}
                return http.post("/v1/search", content=content, headers=headers)

            greedy = [asyncio.create_task(ask("all", held(blocked))) for _ in range(6)]
            while app.running < 6:
                await asyncio.sleep(0)
            refused = await ask("all", b'{"text": "a"}')
            other = [await http.get("/v1/slides", headers=bearer("reader")) for _ in range(3)]
            blocked.set()
            done = await asyncio.gather(*greedy)
            again = await ask("all", b'{"text": "a"}')
        return refused, other, [*done, again]

    refused, other, done = loop.run_until_complete(run())
    assert (refused.status_code, refused.json()["code"]) == (429, "busy")
    assert "token" in refused.json()["message"]
    assert [answer.status_code for answer in other] == [200] * 3
    assert [answer.status_code for answer in done] == [200] * 7
    assert not +app.of_client


def test_draining_waits_for_what_is_at_work_and_takes_nothing_more(serving, loop):
    app = serving().app
    blocked = asyncio.Event()

    async def run():
        transport = httpx.ASGITransport(app, client=("127.0.0.1", 1))
        options = {"headers": bearer("all") | {"Content-Type": "application/json"}}
        async with httpx.AsyncClient(
            transport=transport, base_url="http://127.0.0.1", timeout=60
        ) as http:
            busy = asyncio.create_task(http.post("/v1/search", content=held(blocked), **options))
            while not app.running:
                await asyncio.sleep(0.01)
            draining = asyncio.create_task(app.drain(60))
            while not app.stopping:
                await asyncio.sleep(0)
            refused = await http.post("/v1/search", content=b'{"text": "a"}', **options)
            waiting = not draining.done()
            blocked.set()
            await draining
            return waiting, refused, await busy, app.running

    waiting, refused, busy, left = loop.run_until_complete(run())
    assert waiting
    assert (refused.status_code, "retry-after" in refused.headers) == (503, True)
    assert busy.status_code == 200
    assert left == 0


def test_an_answer_has_a_deadline(serving):
    ask = serving(limits=Limits(answer_s=1e-4))
    answer = ask("POST", "/v1/ground", json={"slide_id": "slide001", "text": "a"})
    assert (answer.status_code, answer.json()["code"]) == (504, "deadline")
    assert "retry-after" in answer.headers


# -- pictures -------------------------------------------------------------------------------------


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width, height, *, kind=2, body=b""):
    head = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + body
        + chunk(b"IDAT", zlib.compress(bytes(10 << 20))) + chunk(b"IEND", b"")
    )  # fmt: skip


def jpeg_that_says(width, height):
    data = bytearray(base64.b64decode(png(np.zeros((64, 64, 3), np.uint8), "JPEG")))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def tiff():
    out = io.BytesIO()
    Image.new("RGB", (64, 64)).save(out, "TIFF")
    return out.getvalue()


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"x", b"GIF89a", tiff(), b"<svg/>", b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe",
        bomb(65535, 65535), bomb(2**31 - 1, 2**31 - 1), bomb(0, 100), bomb(2**20, 2),
        bomb(64, 64, body=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(64 << 20)))),
        bomb(64, 64, body=chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(64 << 20)))),
        bomb(64, 64, kind=9), jpeg_that_says(65500, 65500), jpeg_that_says(0, 0),
        base64.b64decode(png(np.zeros((64, 64, 3), np.uint8)))[:60],
    ],
    ids=lambda raw: f"{raw[:4]!r}-{len(raw)}",
)  # fmt: skip
def test_what_is_no_small_picture_is_refused_before_it_is_decoded(raw):
    tracemalloc.start()
    with pytest.raises(RequestError) as caught:
        read_image(base64.b64encode(raw).decode(), pixels=PIXELS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert caught.value.code == "bad_image"
    assert peak < 50 << 20


@given(st.binary(max_size=300), st.integers(0, 400))
@settings(max_examples=150, deadline=None)
def test_a_damaged_picture_is_a_picture_or_refused(noise, at):
    whole = bytearray(base64.b64decode(png(np.zeros((32, 32, 3), np.uint8))))
    whole[at : at + len(noise)] = noise
    try:
        found = read_image(base64.b64encode(bytes(whole)).decode(), pixels=PIXELS)
    except RequestError:
        return
    assert found.ndim == 3
    assert found.shape[0] * found.shape[1] <= PIXELS


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "LA"])
def test_ordinary_pictures_are_read(mode):
    out = io.BytesIO()
    Image.new(mode, (40, 30), 1).save(out, "PNG")
    found = read_image(base64.b64encode(out.getvalue()).decode(), pixels=PIXELS)
    assert (found.shape, found.dtype) == ((30, 40, 3), np.uint8)


@pytest.mark.parametrize(
    "data", ["not base64!", "//etc/passwd", "http://169.254.169.254/", "AAA", "\u0661" * 8]
)
def test_what_is_no_file_in_base64_is_refused(ask, data):
    answer = ask("POST", "/v1/search", json={"image": {"data": data, "mpp": 0.5}})
    assert (answer.status_code, answer.json()["code"]) == (422, "bad_image")


def test_a_picture_that_grows_is_refused(ask):
    image = {"data": png(np.zeros((2000, 2000, 3), np.uint8)), "mpp": 10}
    answer = ask("POST", "/v1/search", json={"image": image})
    assert answer.status_code == 422
    assert "pixels" in answer.json()["detail"]
    small = {"data": png(np.zeros((8, 8, 3), np.uint8)), "mpp": 0.5}
    assert "patch" in ask("POST", "/v1/search", json={"image": small}).json()["detail"]


def test_a_picture_is_read_as_the_command_line_reads_it(tmp_path):
    """Turned, transparent and of a palette: the same pixels, written out by hand."""
    stripes = np.zeros((300, 300, 3), np.uint8) + np.array([200, 90, 150], np.uint8)
    stripes[:40] = 255
    alpha = np.where(np.arange(300) < 40, 0, 255)[:, None].repeat(300, 1)
    clear = np.dstack([np.where(alpha[..., None] > 0, stripes, 0), alpha]).astype(np.uint8)
    half = np.full((8, 8, 4), (0, 0, 0, 51), np.uint8)
    turned = Image.Exif()
    turned[274] = 6  # shown after a quarter turn clockwise
    for name, image, wanted, more in (
        ("clear.png", Image.fromarray(clear), stripes, {}),
        ("half.png", Image.fromarray(half), np.full((8, 8, 3), 204), {}),
        ("palette.png", Image.fromarray(clear).quantize(8), stripes, {}),
        ("grey.png", Image.new("LA", (9, 7), (0, 0)), np.full((7, 9, 3), 255), {}),
        ("turned.png", Image.fromarray(np.rot90(stripes).copy()), stripes, {"exif": turned}),
    ):
        image.save(tmp_path / name, **more)
        raw = base64.b64encode((tmp_path / name).read_bytes()).decode()
        np.testing.assert_array_equal(read_image(raw, pixels=PIXELS), wanted, err_msg=name)
        shown = _read_picture(ImageQuery(path=tmp_path / name))
        np.testing.assert_array_equal(shown, wanted, err_msg=name)
