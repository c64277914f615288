"""Browser of the tests: Debian's Chromium, and a page that remembers all it must not do."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

PATIENCE_MS = 60_000
"""Longest wait for a state: two test processes and a browser share two cores."""
BUILT = Path(__file__).resolve().parents[3] / "serve" / "viewer" / "dist" / "index.html"
FRAMES = """async () => {
    for (let frame = 0; frame < 4; frame++) await new Promise(requestAnimationFrame);
}"""
FLAGS = (
    "--disable-gpu-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader",
    "--hide-scrollbars", "--force-color-profile=srgb", "--disable-lcd-text",
)  # fmt: skip


def chromium() -> str | None:
    """Return the browser's path: PATHFLIP_CHROMIUM, or ``chromium`` of PATH."""
    return shutil.which(os.environ.get("PATHFLIP_CHROMIUM") or "chromium")


def why_not() -> str | None:
    """Return why browser tests cannot run here, or None where they can."""
    if chromium() is None:
        return "Chromium is not installed: apt install chromium, or set PATHFLIP_CHROMIUM."
    if not BUILT.exists():
        return "The page is not built: make viewer."
    return None


@contextmanager
def launched() -> Iterator[Browser]:
    """Run a browser without windows."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Viewer:
    """A tab of the page.

    Attributes:
        page: Playwright's.
        url: Address of the service.
        errors: Errors in its console, among them violations of its content security policy.
        beyond: Addresses it asked that are not the service's.
        expected: Patterns of errors that a test provokes.
    """

    page: Page
    url: str
    errors: list[str] = field(default_factory=list)
    beyond: list[str] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)

    def open(self, address: str = "#/") -> Viewer:
        """Load the page anew at an address: another fragment alone would load nothing."""
        self.page.goto("about:blank")
        self.page.goto(f"{self.url}/{address}")
        return self

    def slide(self, number: int = 0) -> Locator:
        """The element in which a slide is shown; of two beside each other, the first or second."""
        return self.page.get_by_role("application").nth(number)

    def still(self, number: int = 0) -> Locator:
        """Wait until nothing moves, and all in view is drawn at its scale."""
        from playwright.sync_api import expect

        slide = self.slide(number)
        expect(slide).to_have_attribute("aria-busy", "false")
        return slide

    def view(self, number: int = 0) -> tuple[float, float, float, float]:
        """Return what is in view once it is still: x0, y0, w0, h0 in level-0 px."""
        x0, y0, w0, h0 = map(float, (self.still(number).get_attribute("data-view") or "").split())
        return x0, y0, w0, h0

    def moved(self, act: Callable[[], Any], number: int = 0) -> tuple[float, float, float, float]:
        """Do something that moves the view, and return what is in view then."""
        from playwright.sync_api import expect

        before = self.still(number).get_attribute("data-view") or ""
        act()
        expect(self.slide(number)).not_to_have_attribute("data-view", before)
        return self.view(number)

    def picture(self, number: int = 0) -> NDArray[np.uint8]:
        """Return what the slide's element shows, RGB [h, w, 3], without what lies over it."""
        slide = self.still(number)
        self.page.evaluate(FRAMES)  # what lies over the slide is drawn with the next frames
        return decoded(slide.locator("canvas").first.screenshot())

    def verdict(self) -> None:
        """Fail if the page did what it must not."""
        left = [
            error for error in self.errors
            if not any(re.search(pattern, error) for pattern in self.expected)
        ]  # fmt: skip
        assert not left, "errors in the console: " + "\n".join(left)
        assert not self.beyond, "requests beyond the service: " + "\n".join(self.beyond)


def decoded(png: bytes) -> NDArray[np.uint8]:
    """Decode a picture to RGB [h, w, 3]."""
    found = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)
    return np.ascontiguousarray(found[..., ::-1])


@contextmanager
def tab(browser: Browser, url: str, **options: Any) -> Iterator[Viewer]:
    """Open a tab with cookies of its own, and judge it at the end."""
    from playwright.sync_api import expect

    expect.set_options(timeout=PATIENCE_MS)
    settings = {"viewport": {"width": 1280, "height": 800}, "reduced_motion": "reduce"}
    settings |= {"locale": "en-GB", "accept_downloads": True} | options
    context = browser.new_context(**settings)
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    viewer = Viewer(page, url)

    def asked(request: Any) -> None:
        if not request.url.startswith((f"{url}/", "data:", "blob:")):
            viewer.beyond.append(request.url)

    context.on("request", asked)
    page.on("pageerror", lambda error: viewer.errors.append(str(error)))
    page.on(
        "console",
        lambda message: (
            viewer.errors.append(f"{message.text} ({message.location.get('url')})")
            if message.type in ("error", "warning")
            else None
        ),
    )
    try:
        yield viewer
        viewer.verdict()
    finally:
        context.close()
