"""The page in a real browser: first picture, and how long a pan takes to be sharp.

Times are the browser's own clock, in a tab of 1280 x 800 px on a service of this machine with a
warm cache of tiles: each address is opened once before. *Sharp* is when the slide's element stops
being busy: every tile of the view is drawn at its scale. The tab asks for reduced motion, so that
no time of an animation is in it.

* ``first_picture_ms``: from the start of the navigation to the sharp slide, by the address of a
  view; ``loaded_kb`` are the bytes of scripts and styles that it took, as sent.
* ``pan_ms``: from an arrow key (a fifth of the screen) to the sharp view.
* ``zoom_ms``: from + or - to the sharp view.

``python -m tests.bench.serve_page --json`` (Chromium as for the browser tests, CONTRIBUTING.md)
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.e2e.viewer.browser import Viewer, launched, tab, why_not

if TYPE_CHECKING:
    from playwright.sync_api import Browser

SIDE_PX = 24_000
OPENINGS = 20
STEPS = 200
CLOCK = """() => {
    const clock = (window.clock = { began: 0, took: [] });
    addEventListener("keydown", () => { clock.began = performance.now(); }, true);
    const look = (records) => {
        for (const { target } of records) {
            if (target.getAttribute?.("aria-busy") !== "false") continue;
            clock.first ??= performance.now();
            if (clock.began) clock.took.push(performance.now() - clock.began);
            clock.began = 0;
        }
    };
    const watch = { subtree: true, attributes: true, attributeFilter: ["aria-busy"] };
    new MutationObserver(look).observe(document, watch);
}"""


def measure(folder: Path) -> dict[str, Any]:
    """Make a slide, serve it, look at it."""
    from jobs.ingest import IngestConfig, ingest
    from pathflip.archive import Archive
    from pathflip.config import load_config
    from pathflip.synth import make_slide
    from tests.e2e.viewer.world import World, serving
    from tests.in_threads import in_threads

    (folder / "slides").mkdir()
    make_slide(
        folder / "slides" / "large.svs", width=SIDE_PX, height=SIDE_PX, mpp=0.25, layout="aperio"
    )
    with in_threads():
        ingest([str(folder / "slides")], str(folder / "archive"), load_config(IngestConfig))
    (slide,) = Archive(folder / "archive").ready_ids()
    world = World(
        folder=folder, archive=folder / "archive", run=None, tuned=None, hold=folder / "hold"
    )
    with serving(world) as services, launched() as browser:
        return {
            "slide_px": SIDE_PX,
            **_openings(browser, services.url, slide),
            **_steps(browser, services.url, slide),
        }


def _address(slide: str, number: int) -> str:
    x, y = (SIDE_PX * (0.3 + 0.4 * (number * step % 1)) for step in (0.618, 0.414))
    return f"#/slide/{slide}?x={x:.0f}&y={y:.0f}&w={1280 * 2 ** (number % 4)}"


def _openings(browser: Browser, url: str, slide: str) -> dict[str, Any]:
    cold, warm, sent = [], [], 0
    for again in (False, True):
        for number in range(OPENINGS):
            with tab(browser, url) as viewer:  # a cache of its own: only the service's is warm
                viewer.page.add_init_script(f"({CLOCK})()")
                viewer.open(_address(slide, number)).still()
                (warm if again else cold).append(viewer.page.evaluate("clock.first"))
                sent = viewer.page.evaluate(
                    "performance.getEntriesByType('resource')"
                    ".filter(({name}) => /[.](js|css)$/.test(name))"
                    ".reduce((sum, {encodedBodySize}) => sum + encodedBodySize, 0)"
                )
    return {
        "first_picture_ms": {"cold": _times(cold), "warm": _times(warm)},
        "loaded_kb": round(sent / 1e3, 1),
    }


def _steps(browser: Browser, url: str, slide: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with tab(browser, url) as viewer:
        viewer.page.add_init_script(f"({CLOCK})()")
        viewer.open(_address(slide, 1)).still().focus()
        around = ["ArrowRight"] * 8 + ["ArrowDown"] * 4 + ["ArrowLeft"] * 8 + ["ArrowUp"] * 4
        for name, keys in (("pan_ms", around), ("zoom_ms", ["+", "+", "-", "-"])):
            for passes in (1, -(-STEPS // len(keys))):
                took = _press(viewer, keys * passes)
            found[name] = _times(took)
    return found


def _press(viewer: Viewer, keys: Sequence[str]) -> list[float]:
    viewer.page.evaluate("clock.took.length = 0")
    for number, key in enumerate(keys):
        viewer.page.keyboard.press(key)
        viewer.page.wait_for_function("count => clock.took.length >= count", arg=number + 1)
    took: list[float] = viewer.page.evaluate("clock.took")
    return took


def _times(took: Sequence[float]) -> dict[str, Any]:
    ordered = sorted(took)
    return {
        "p50": round(statistics.median(ordered), 1),
        "p95": round(ordered[len(ordered) * 95 // 100], 1),
        "n": len(ordered),
    }


def main() -> None:
    """Print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    if reason := why_not():
        parser.exit(1, f"{reason}\n")
    with tempfile.TemporaryDirectory(prefix="pathflip-") as folder:
        report = measure(Path(folder))
    if arguments.json:
        print(json.dumps(report, indent=1))
    else:
        for name, value in report.items():
            print(f"{name:18} {value}")


if __name__ == "__main__":
    main()
