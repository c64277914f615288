"""requirements/install.sh against package indexes of our own on 127.0.0.1."""

from __future__ import annotations

import io
import os
import runpy
import shutil
import subprocess
import sys
import threading
import venv
import zipfile
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pip
import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "requirements" / "install.sh"
CPU = "2.13.0+cpu"
GPU = "2.13.0"
UV = Path(sys.executable).with_name("uv")
Install = Callable[..., subprocess.CompletedProcess[str]]
Installed = Callable[[], set[str]]
needs_uv = pytest.mark.skipif(not UV.exists(), reason="uv is not installed")


def wheel(name: str, version: str) -> bytes:
    """The smallest wheel pip and uv accept: an empty module."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": "",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = f"{info}/RECORD"
    files[record] = "".join(f"{file},,\n" for file in (*files, record))
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
    return packed.getvalue()


class Index:
    """A package index (PEP 503) on this machine that remembers what it was asked for."""

    def __init__(self) -> None:
        self.wheels: dict[str, bytes] = {}
        self.asked: list[str] = []
        index = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                index.asked.append(self.path)
                _, project, file = self.path.split("/", 2)
                names = [name for name in index.wheels if name.startswith(f"{project}-")]
                page = "".join(f'<a href="{name.replace("+", "%2B")}">{name}</a>' for name in names)
                body = index.wheels.get(file.replace("%2B", "+")) if file else page.encode()
                self.send_response(200 if body else 404)
                self.send_header("Content-Type", "text/html" if not file else "application/zip")
                self.send_header("Content-Length", str(len(body or b"")))
                self.end_headers()
                self.wfile.write(body or b"")

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def add(self, name: str, *versions: str) -> Index:
        for version in versions:
            self.wheels[f"{name}-{version}-py3-none-any.whl"] = wheel(name, version)
        return self

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def main() -> Iterator[Index]:
    """Default index of pip or uv; it has everything but torch."""
    index = Index().add("steady", "1.0", "1.1")
    yield index
    index.close()


@pytest.fixture
def second() -> Iterator[Index]:
    """Index that TORCH_INDEX points at."""
    index = Index().add("torch", "2.12.0+cpu", CPU)
    yield index
    index.close()


@pytest.fixture
def install(second: Index, tmp_path: Path) -> Install:
    """``install(torch, NAME=value)``: run the script with a lock of two pins and these variables.

    Nothing of this machine's configuration is seen: no pip.conf, no PIP_* or UV_* variables, no
    uv unless it is put on PATH.
    """
    venv.create(tmp_path / "venv", symlinks=True)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "pip").symlink_to(Path(pip.__file__).parent)

    def run(
        torch: str = CPU, *, pins: Sequence[str] = (), **variables: str
    ) -> subprocess.CompletedProcess[str]:
        lock = tmp_path / "cpu.lock"
        lines = ["steady==1.0", f"torch=={torch}", *pins]
        lock.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        plain = {
            "PATH": "/usr/bin:/bin",
            "HOME": str(tmp_path),
            "PIP_CONFIG_FILE": os.devnull,
            "NO_PROXY": "127.0.0.1",
            "TORCH_INDEX": second.url,
        }
        return subprocess.run(
            ["/bin/bash", str(SCRIPT), str(tmp_path / "venv"), str(lock)],
            env={**plain, **variables},
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


@pytest.fixture
def installed(tmp_path: Path) -> Installed:
    """``installed()``: which of the lock's packages the environment holds, as its folders say."""

    def read() -> set[str]:
        found = (tmp_path / "venv").glob("lib/python*/site-packages/*.dist-info")
        return {path.name.removesuffix(".dist-info") for path in found}

    return read


@pytest.fixture
def fake_uv(tmp_path: Path) -> Path:
    """Folder with a ``uv`` that writes down how it was called and installs nothing."""
    folder = tmp_path / "fake-uv"
    folder.mkdir()
    (folder / "uv").write_text(
        f'#!/bin/sh\n(echo "$@"; cat) >>{tmp_path}/uv.log\n', encoding="utf-8"
    )
    (folder / "uv").chmod(0o755)
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {"PIP_INDEX_URL": "{main}"},
        {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "{main}/torch/ {main}/steady/"},
        {"PIP_CONFIG_FILE": "{folder}/pip.conf"},
    ],
    ids=lambda settings: "-".join(settings),
)
@pytest.mark.parametrize("by", ["pip", pytest.param("uv", marks=needs_uv)])
def test_the_second_index_is_never_asked_where_torch_is_found_as_pip_is_configured(
    main: Index,
    second: Index,
    install: Install,
    installed: Installed,
    tmp_path: Path,
    settings: dict[str, str],
    by: str,
) -> None:
    main.add("torch", GPU, CPU)
    (tmp_path / "pip.conf").write_text(f"[install]\nindex-url = {main.url}\n", encoding="utf-8")
    pip = {name: value.format(main=main.url, folder=tmp_path) for name, value in settings.items()}
    done = install(PATH=f"{UV.parent if by == 'uv' else '/bin'}:/usr/bin:/bin", **pip)
    assert done.returncode == 0, done.stderr
    assert f"with {by} " in done.stdout
    assert installed() == {f"torch-{CPU}", "steady-1.0"}
    assert second.asked == []


def test_torch_alone_comes_from_the_second_index(
    main: Index, second: Index, install: Install, installed: Installed
) -> None:
    main.add("torch", GPU)  # as on the default index: the same version, the other build
    second.add("steady", "1.0")
    done = install(PIP_INDEX_URL=main.url)
    assert done.returncode == 0, done.stderr
    assert installed() == {f"torch-{CPU}", "steady-1.0"}
    assert {path.split("/")[1] for path in second.asked} == {"torch"}
    assert [path for path in main.asked if path.startswith("/steady/steady-1.0")]

    main.asked.clear()
    second.asked.clear()
    assert install(PIP_INDEX_URL=main.url).returncode == 0
    assert main.asked == second.asked == [], "everything is there already"


@pytest.mark.parametrize("index", ["another", "none"])
def test_what_to_set_is_said_where_torch_is_nowhere(
    main: Index, second: Index, install: Install, installed: Installed, index: str
) -> None:
    second.wheels.pop(f"torch-{CPU}-py3-none-any.whl")
    done = install(PIP_INDEX_URL=main.url, **({"TORCH_INDEX": ""} if index == "none" else {}))
    assert done.returncode != 0
    assert all(name in done.stderr for name in ("PIP_EXTRA_INDEX_URL", "TORCH_INDEX", CPU))
    assert bool(second.asked) == (index == "another")
    assert installed() == set(), "torch goes first"


def test_another_failure_is_no_reason_to_look_elsewhere(
    main: Index, second: Index, install: Install
) -> None:
    main.wheels[f"torch-{CPU}-py3-none-any.whl"] = b"cut short"
    done = install(PIP_INDEX_URL=main.url)
    assert done.returncode != 0
    assert "is invalid" in done.stderr, "pip's own words"
    assert "TORCH_INDEX" not in done.stderr
    assert second.asked == []


def test_a_cuda_build_is_never_replaced_by_a_cpu_build(
    main: Index, second: Index, install: Install, installed: Installed
) -> None:
    main.add("torch", CPU)
    second.add("torch", GPU)
    assert install(GPU, PIP_INDEX_URL=main.url).returncode != 0
    assert second.asked == []
    main.add("torch", GPU)
    done = install(GPU, PIP_INDEX_URL=main.url)
    assert done.returncode == 0, done.stderr
    assert f"torch-{GPU}" in installed()


# ---- uv -------------------------------------------------------------------------------------


def test_uv_installs_where_pip_has_no_sources_of_its_own(
    install: Install, fake_uv: Path, tmp_path: Path
) -> None:
    done = install(PATH=f"{fake_uv}:/usr/bin:/bin", PIP_DISABLE_PIP_VERSION_CHECK="1")
    assert done.returncode == 0, done.stderr
    first, rest, pins = (tmp_path / "uv.log").read_text(encoding="utf-8").splitlines()
    for call in (first, rest):
        assert call.startswith(f"pip install --python {tmp_path}/venv/bin/python --no-deps ")
    assert first.endswith(f" torch==={CPU}")
    assert pins == "steady===1.0"


def test_pip_installs_where_uv_has_no_equal_for_a_setting(
    main: Index, install: Install, installed: Installed, fake_uv: Path, tmp_path: Path
) -> None:
    main.add("torch", CPU)
    done = install(
        PATH=f"{fake_uv}:/usr/bin:/bin", PIP_INDEX_URL=main.url, PIP_TRUSTED_HOST="127.0.0.1"
    )
    assert done.returncode == 0, done.stderr
    assert installed() == {f"torch-{CPU}", "steady-1.0"}
    assert not (tmp_path / "uv.log").exists()


@needs_uv
def test_the_best_of_all_indexes_is_taken(
    main: Index, second: Index, install: Install, installed: Installed
) -> None:
    """Left to itself, uv stops at the first index that has a package at all."""
    main.add("torch", CPU)
    second.add("steady", "0.9")
    done = install(
        PATH=f"{UV.parent}:/usr/bin:/bin", PIP_INDEX_URL=main.url, PIP_EXTRA_INDEX_URL=second.url
    )
    assert done.returncode == 0, done.stderr
    assert "with uv " in done.stdout
    assert installed() == {f"torch-{CPU}", "steady-1.0"}
    assert any(path.startswith("/steady") for path in second.asked)


@needs_uv
def test_pip_installs_the_uv_of_the_lock_first(
    main: Index, install: Install, installed: Installed, tmp_path: Path
) -> None:
    main.add("torch", CPU)
    packed = io.BytesIO(wheel("uv", "0.1"))
    with zipfile.ZipFile(packed, "a") as archive:
        script = zipfile.ZipInfo("uv-0.1.data/scripts/uv")
        script.external_attr = 0o100755 << 16  # a file that may be executed
        archive.writestr(script, f'#!/bin/sh\nexec {UV} "$@"\n')
    main.wheels["uv-0.1-py3-none-any.whl"] = packed.getvalue()
    done = install(pins=("uv==0.1",), PIP_INDEX_URL=main.url)
    assert done.returncode == 0, done.stderr
    assert "with uv " in done.stdout
    assert installed() == {f"torch-{CPU}", "steady-1.0", "uv-0.1"}


@needs_uv
def test_uv_looks_in_both_places_as_pip_does(
    main: Index, second: Index, install: Install, installed: Installed
) -> None:
    uv = {"PATH": f"{UV.parent}:/usr/bin:/bin", "UV_DEFAULT_INDEX": main.url}
    main.add("torch", GPU)
    second.wheels.pop(f"torch-{CPU}-py3-none-any.whl")
    done = install(**uv)
    assert done.returncode != 0
    assert "PIP_EXTRA_INDEX_URL" in done.stderr
    assert second.asked
    second.asked.clear()
    second.add("torch", CPU)
    done = install(**uv)
    assert done.returncode == 0, done.stderr
    assert "with uv" in done.stdout
    assert installed() == {f"torch-{CPU}", "steady-1.0"}
    assert {path.split("/")[1] for path in second.asked} == {"torch"}


@pytest.mark.parametrize(
    ("lines", "options"),
    [
        ([], []),
        (["global.timeout='180'", "global.proxy=''"], []),
        (
            [
                "global.find-links='/a'",
                ":env:.find-links='/b /c'",
                "install.index-url='https://m/s'",
            ],
            ["--default-index=https://m/s", "--find-links=/b", "--find-links=/c"],
        ),
        (
            ["install.extra-index-url='\\nhttps://a\\nhttps://b'", ":env:.no-index='1'"],
            ["--index=https://a", "--index=https://b", "--no-index"],
        ),
        (
            [":env:.constraint='pins.txt'"],
            ["--constraints=pins.txt"],
        ),
        (["global.index-url='https://m/s'", "global.proxy='https://p'"], None),
        (["install.keyring-provider='subprocess'"], None),
    ],
)
def test_settings_of_pip_as_options_of_uv(lines: list[str], options: list[str] | None) -> None:
    found = runpy.run_path(str(SCRIPT.with_name("uv_options.py")))["uv_options"](lines)
    assert found == ([*options, "--index-strategy=unsafe-best-match"] if options else options)


# ---- Python ---------------------------------------------------------------------------------


def test_an_environment_is_made_where_there_is_none(
    main: Index, install: Install, installed: Installed, tmp_path: Path
) -> None:
    main.add("torch", CPU)
    shutil.rmtree(tmp_path / "venv")
    done = install(PIP_INDEX_URL=main.url, PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    assert installed() >= {f"torch-{CPU}", "steady-1.0"}


def test_what_to_install_is_said_where_no_python_fits(install: Install, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "venv")
    done = install(PATH="/nowhere", PYTHON="/bin/false")
    assert done.returncode != 0
    assert "Python 3.11 or 3.12" in done.stderr
