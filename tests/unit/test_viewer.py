"""The viewer in a notebook: a server of its own, on this machine alone, gone with its process."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from pathflip import Archive
from pathflip.errors import ArchiveError, ConfigError
from pathflip.synth import make_slide
from pathflip.viewer import Viewer, close_viewers, open_viewer


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory, job_here: Callable[..., Any]) -> Archive:
    folder = tmp_path_factory.mktemp("viewed")
    make_slide(folder / "one.svs", width=2048, height=2048, mpp=0.5, layout="aperio")
    assert job_here(folder, folder / "archive").exit_code == 0
    return Archive(folder / "archive")


@pytest.fixture(scope="module", autouse=True)
def closed() -> Iterator[None]:
    """Whatever was started ends with this file."""
    yield
    close_viewers()


@pytest.fixture
def viewer(archive: Archive) -> Viewer:
    """One server for all tests, started again where one of them has closed it."""
    return archive.view("one")


def base(viewer: Viewer) -> str:
    return viewer.url.partition("#")[0]


def slides(address: str) -> str:
    """Address of the list of slides, which needs no page that was built."""
    return f"{address.partition('#')[0]}v1/slides"


def gone(url: str) -> bool:
    """Wait until nobody listens at an address."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            httpx.get(url, timeout=5)
        except httpx.ConnectError:
            return True
        time.sleep(0.1)
    return False


def test_a_frame_shows_the_slide(archive: Archive, viewer: Viewer) -> None:
    slide_id = archive.resolve("one")
    assert re.fullmatch(rf"http://127\.0\.0\.1:\d+/#/slide/{slide_id}", viewer.url)
    listed = httpx.get(f"{base(viewer)}v1/slides").json()
    assert [row["slide_id"] for row in listed["data"]] == [slide_id]
    tiles = httpx.get(f"{base(viewer)}v1/slides/{slide_id}/tiles").json()
    assert (tiles["width"], tiles["height"]) == (2048, 2048)
    page = httpx.get(base(viewer))
    ancestors = page.headers["content-security-policy"].partition("frame-ancestors ")[2]
    assert ancestors.partition(";")[0].split() == ["http://127.0.0.1:*", "http://localhost:*"]
    assert "x-frame-options" not in page.headers


def test_frames_of_an_archive_share_a_server(archive: Archive, viewer: Viewer) -> None:
    again = archive.view("one", region=(512, 1024, 256), height=300)
    assert base(again) == base(viewer)
    assert urlsplit(again.url).fragment.partition("?")[2] == "x=640.0&y=1152.0&w=256"
    assert 'height="300"' in again._repr_html_()
    assert archive.view().url == f"{base(viewer)}#/"
    with pytest.raises(ArchiveError) as caught:
        archive.view("nobody")
    assert caught.value.code == "unknown_slide"


def test_it_listens_on_this_machine_alone(viewer: Viewer) -> None:
    port = urlsplit(viewer.url).port
    heard = [row.split()[1:4] for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    own = [local for local, _, state in heard if state == "0A" and int(local[9:], 16) == port]
    assert own == [f"0100007F:{port:04X}"]


def test_it_ends_with_its_process_however_that_ends(archive: Archive) -> None:
    code = (
        "import sys, time; from pathflip import Archive\n"
        "print(Archive(sys.argv[1]).view().url, flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, archive.uri]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        try:
            url = owner.stdout.readline().strip()
            assert httpx.get(slides(url)).status_code == 200
        finally:
            owner.kill()
    assert gone(url)


def test_it_can_be_closed_and_opened_again(archive: Archive) -> None:
    first = archive.view()
    close_viewers()
    assert gone(base(first))
    assert httpx.get(slides(base(archive.view()))).status_code == 200
    close_viewers()


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        open_viewer(str(tmp_path / "nothing"))
    assert caught.value.code == "not_started"
    assert "nothing" in caught.value.message
