"""The wheel: everything that is run is in it, nothing of what builds it, and it runs by itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from pathflip.synth import make_slide
from serve.pages import DIST

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("pathflip", "jobs", "serve")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_all_that_runs_is_in_it_and_no_source_of_the_page(wheel: zipfile.ZipFile) -> None:
    tracked = subprocess.run(
        ["git", "ls-files", *PACKAGES], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()
    held = {name for name in wheel.namelist() if not name.startswith("pathflip-")}
    page = {name for name in held if name.startswith("serve/viewer/")}
    assert held - page == {name for name in tracked if not name.startswith("serve/viewer/")}
    built = {f"serve/viewer/dist/{path.relative_to(DIST)}" for path in DIST.rglob("*")}
    assert page == {name for name in built if (ROOT / name).is_file()}


def test_the_page_in_it_comes_with_the_licences_of_its_parts(wheel: zipfile.ZipFile) -> None:
    if not (DIST / "index.html").exists():
        pytest.skip("the page is not built here: make viewer")
    text = wheel.read("serve/viewer/dist/licenses.md").decode()
    packages = json.loads((ROOT / "serve/viewer/package.json").read_text())["dependencies"]
    assert [name for name in packages if f"## {name} - " not in text] == []


def test_it_is_typed_and_runs_where_there_is_no_checkout(
    wheel: zipfile.ZipFile, tmp_path: Path
) -> None:
    site = tmp_path / "site"
    wheel.extractall(site)
    assert all((site / package / "py.typed").is_file() for package in PACKAGES)
    code = (
        "import pathflip.cli, jobs.ingest, serve.view, serve.pages\n"
        "for module in (pathflip.cli, jobs.ingest, serve.view): print(module.__file__)\n"
        "print(serve.pages.DIST)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = done.stdout.split()
    assert len(found) == 4
    assert all(Path(path).is_relative_to(site) for path in found)


def test_without_the_extras_a_command_says_which_it_needs(tmp_path: Path) -> None:
    (tmp_path / "slides").mkdir()
    make_slide(tmp_path / "slides" / "a.tif", width=512, height=512, mpp=0.5)
    code = (
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('ray', 'fastapi', 'mcp', 'pydicom', 'timm'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "from pathflip.cli import main\n"
        "main()"
    )

    def says(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 2, done.stderr
        return done.stderr

    assert "pip install 'pathflip[viewer]'" in says("view", "slides")
    assert "pip install 'pathflip[ray]'" in says("ingest", "slides", "--archive", "a", "--ray")
    assert "pip install 'pathflip[mcp]'" in says("mcp", "--archive", "a")
    assert "pip install 'pathflip[serve]'" in says("serve", "--archive", "a", "--run", "r")
