"""The documentation as a site: it builds without a warning, and needs nothing from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="the site's packages are not installed: make site")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "-q", "-d", str(folder)],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return folder


def test_every_page_is_there_and_loads_only_what_is_beside_it(site: Path) -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").with_suffix(".html")
        html = (site / name.with_name(name.name.replace("README", "index"))).read_text()
        loaded = re.findall(r"<(?:script|img|iframe|link)\b[^>]*?\b(?:src|href)=\"([^\"]+)", html)
        assert [address for address in loaded if re.match(r"(https?:)?//", address)] == []


def test_the_library_is_shown_with_signatures_and_plain_words(site: Path) -> None:
    html = (site / "reference" / "api.html").read_text()
    for name in ("slides.slide.Slide.read", "archive.archive.Archive.view", "search.find"):
        assert f'id="pathflip.{name}"' in html
    assert re.findall(r":(?:class|func|meth|mod|data|attr):", html) == []
