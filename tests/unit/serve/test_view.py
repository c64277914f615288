"""pathflip view: the viewer without Ray, over an archive, over files, in a frame of a notebook."""

from __future__ import annotations

import asyncio
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from pathflip.synth import make_slide
from serve.ingress import make_app
from serve.reader_pool import ReadingConfig
from serve.slide_files import FileSlides
from serve.tiles import Tiles
from serve.view import _parts
from serve.view_files import FileList, ids_of
from tests.faults import until
from tests.serving import same
from tests.unit.serve.service_fixture import SLIDES, World, slide_id

ROOT = Path(__file__).resolve().parents[3]


@contextmanager
def viewing(*words: str, **options: Any) -> Iterator[tuple[dict[str, Any], subprocess.Popen[str]]]:
    """The command while it runs; yields its document and process."""
    command = [sys.executable, "-m", "pathflip.cli", "view", *words, "--port", "0", "--no-browser"]
    process = subprocess.Popen(
        [*command, "--json"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        stdin=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, **options,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        line = process.stdout.readline()
        assert line, process.stderr.read()
        yield json.loads(line), process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two slides of one name, another, and three files that are none."""
    folder = tmp_path_factory.mktemp("slides")
    make_slide(folder / "lung.svs", width=1500, height=1000, mpp=0.5, seed=1)
    (folder / "more").mkdir()
    shutil.copy(folder / "lung.svs", folder / "more" / "lung.svs")
    make_slide(folder / "colon 7.tif", width=900, height=700, mpp=0.5, seed=2)
    (folder / "broken.svs").write_bytes(b"not a slide" * 100)
    (folder / "cut.svs").write_bytes((folder / "lung.svs").read_bytes()[:3000])
    (folder / "empty.svs").touch()
    return folder


def test_a_folder_without_an_archive(folder: Path) -> None:
    with viewing(str(folder)) as (told, process):
        assert told["url"] == told["page"] + "#/"
        assert told["slides"] == 6
        with httpx.Client(base_url=told["page"], timeout=60) as http:

            def known() -> bool:
                return bool(http.get("/v1/slides?status=quarantined").json()["total"] == 3)

            until(known, seconds=60, what="all files were opened")
            listed = http.get("/v1/slides?status=all").json()
            assert listed["total"] == 6
            rows = {row["slide_id"]: row for row in listed["data"]}
            assert set(rows) == {"lung", "lung-2", "colon_7", "broken", "cut", "empty"}
            ready = {name for name, row in rows.items() if row["status"] == "ready"}
            assert ready == {"lung", "lung-2", "colon_7"}
            assert (rows["lung"]["width"], rows["lung"]["height"]) == (1500, 1000)
            for name, reason in (
                ("broken", "unreadable"), ("cut", "unreadable"), ("empty", "not_a_file")
            ):  # fmt: skip
                assert (rows[name]["status"], rows[name]["reason"]) == ("quarantined", reason)
                answer = http.get(f"/v1/slides/{name}")
                assert (answer.status_code, answer.json()["code"]) == (422, reason)
                assert answer.json()["detail"] == rows[name]["message"]
            assert "empty" in rows["empty"]["message"]
            assert http.get("/v1/slides/none").status_code == 404
            assert str(folder) not in json.dumps(listed)
            assert http.get("/v1/slides").json()["total"] == 3
            assert http.get("/v1/slides?q=LUNG").json()["total"] == 2
            picture = http.get("/v1/slides/colon_7/thumbnail")
            assert Image.open(io.BytesIO(picture.content)).size == (512, 398)
            info = http.get("/v1/slides/lung/tiles").json()
            assert info["width"] == 1500
            tile = http.get(f"/v1/slides/lung/tiles/{info['max_level']}/0_0.jpg")
            assert Image.open(io.BytesIO(tile.content)).size == (info["tile_w"], info["tile_h"])
            can = http.get("/v1/session").json()["can"]
            assert can == {
                "search": False, "ground": False, "chat": None, "annotate": False,
                "patients": False,
            }  # fmt: skip
            for path, body in (
                ("search", {"text": "necrosis"}),
                ("search", {"slide_id": "lung", "level": "slide"}),
                ("ground", {"slide_id": "lung", "text": "necrosis"}),
            ):
                answer = http.post(f"/v1/{path}", json=body)
                assert (answer.status_code, answer.json()["code"]) == (404, "no_model")
            for base in ("http://evil.org", "http://192.0.2.1"):
                answer = http.get("/v1/slides", headers={"Host": base.removeprefix("http://")})
                assert answer.status_code == 403
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        assert "Traceback" not in process.stderr.read()  # type: ignore[union-attr]


def test_one_file_is_opened_at_once(folder: Path) -> None:
    with viewing(str(folder / "colon 7.tif")) as (told, process):
        assert told["url"] == told["page"] + "#/slide/colon_7"
        process.terminate()
        assert process.wait(30) == 0


def test_one_file_that_cannot_be_opened(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pathflip.cli", "view", str(folder / "broken.svs")],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert "broken cannot be shown: OpenSlide cannot open the file" in done.stderr


def test_in_a_frame_it_ends_with_whoever_started_it(folder: Path) -> None:
    with viewing(str(folder / "lung.svs"), "--embed") as (told, process):
        policy = httpx.get(told["page"]).headers["content-security-policy"]
        assert policy.endswith("frame-ancestors http://127.0.0.1:* http://localhost:*")
        assert "x-frame-options" not in httpx.get(told["page"]).headers
        assert (
            "frame-ancestors 'none'"
            in (httpx.get(told["page"] + "v1/slides").headers["content-security-policy"])
        )
        assert process.poll() is None
        process.stdin.close()  # type: ignore[union-attr]
        assert process.wait(30) == 0


def test_an_archive(world: World) -> None:
    # A file name is a name of the slide, as everywhere.
    with viewing("slide002", "--archive", str(world.archive)) as (told, _):
        assert told["url"] == told["page"] + "#/slide/slide002"
        assert told["slides"] == SLIDES
        with httpx.Client(base_url=told["page"], timeout=60) as http:
            assert http.get("/v1/slides").json()["total"] == SLIDES
            (broken,) = http.get("/v1/slides?status=quarantined").json()["data"]
            assert broken["reason"] == "unreadable"
            assert http.get("/v1/slides/slide001/thumbnail").status_code == 200
            # Like this slide, by the archive's own encoder; not by words.
            body = {"slide_id": "slide001", "level": "slide", "k": 1}
            (best,) = http.post("/v1/search", json=body).json()["results"]
            assert best["slide_id"] == "slide001"
            answer = http.post("/v1/search", json={"text": "necrosis"})
            assert (answer.status_code, answer.json()["code"]) == (404, "no_model")
            assert http.get("/v1/session").json()["can"]["annotate"] is True
            assert http.get("/readyz").status_code == 200


def test_with_a_run_words_are_searched_and_located(world: World, loop: Any, ask: Any) -> None:
    parts, shown, slides = _parts(
        None, archive=str(world.archive), run=str(world.run), device="auto"
    )
    assert (shown, slides) == (None, SLIDES)
    app = make_app(parts)

    async def asked(path: str, body: dict[str, Any]) -> Any:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
            if not body:
                return (await http.get(path)).json()
            return (await http.post(path, json=body)).json()

    for path, body in (
        ("/v1/search", {"text": "areas of mucin", "k": 4}),
        ("/v1/ground", {"slide_id": slide_id(1), "text": "necrosis"}),
    ):
        assert same(loop.run_until_complete(asked(path, body)), ask("POST", path, json=body).json())
    # Both parts have one model between them, and take turns at it.
    assert parts.embedder._part.run is parts.grounding._part.run
    texts = [f"mucin and necrosis, {number} of them" for number in range(6)]
    bodies = [("/v1/search", {"text": text, "k": 2}) for text in texts]
    bodies += [("/v1/ground", {"slide_id": slide_id(1), "text": text}) for text in texts]

    async def all_at_once() -> list[Any]:
        return await asyncio.gather(*(asked(*one) for one in bodies))

    found = loop.run_until_complete(all_at_once())
    for (path, body), answer in zip(bodies, found, strict=True):
        assert same(answer, ask("POST", path, json=body).json())
    can = loop.run_until_complete(asked("/v1/session", {}))["can"]
    assert can["search"] is True
    assert can["ground"] is True
    loop.run_until_complete(parts.tiles.close())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "--archive"),
        (("nothing.svs",), "does not exist"),
        (("--run", "{run}"), "--archive"),
        (("slide9", "--archive", "{archive}"), "no slide"),
        (("--archive", "{folder}/none"), "no archive"),
        (("{folder}",), "no slides"),
    ],
)
def test_what_cannot_be_shown(
    world: World, tmp_path: Path, words: tuple[str, ...], says: str
) -> None:
    named = {"run": world.run, "archive": world.archive, "folder": tmp_path}
    done = subprocess.run(
        [sys.executable, "-m", "pathflip.cli", "view", *(word.format(**named) for word in words)],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2
    assert says in done.stderr
    assert done.stdout == ""


def test_a_file_that_could_not_be_opened_yet_is_not_given_up(folder: Path, loop: Any) -> None:
    paths = {name: str(folder / name) for name in ("colon 7.tif", "lung.svs", "more/lung.svs")}
    tiles = Tiles(FileSlides(paths), config=ReadingConfig(readers=1, queued=0))
    files = FileList(paths, tiles)

    async def look() -> tuple[list[dict[str, Any]], ...]:
        try:
            first = (await files.slides(limit=9, status="all")).rows
            for _ in paths:
                await files.slides(limit=9)
            return first, (await files.slides(limit=9, status="all")).rows
        finally:
            await tiles.close()

    first, then = loop.run_until_complete(look())
    assert {row["status"] for row in first} == {"ready"}
    assert None in {row["width"] for row in first}
    assert [row["width"] for row in then] == [900, 1500, 1500]


def test_ids_are_names_of_files() -> None:
    assert ids_of(["/a/x.svs", "/b/x.TIF", "/b/é y.ndpi", "/c/dicom", "/d/x-2.svs", "/.svs"]) == {
        "x": "/a/x.svs", "x-2": "/b/x.TIF", "é_y": "/b/é y.ndpi", "dicom": "/c/dicom",
        "x-2-2": "/d/x-2.svs", "slide": "/.svs",
    }  # fmt: skip
