"""The page for everyone: axe, 200 % zoom, a phone upright, light and dark."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.viewer.browser import Viewer
from tests.e2e.viewer.world import Services, World

pytestmark = pytest.mark.timeout(300)

AXE = Path(__file__).resolve().parents[3] / "serve/viewer/node_modules/axe-core/axe.min.js"
TAGS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
PANELS = ("Slide", "Search", "Where", "Ask", "Draw")


@pytest.fixture(scope="module")
def world(services: Services) -> World:
    return services.world


def faults(viewer: Viewer) -> list[str]:
    """Return what axe finds wrong with the page as it is now."""
    page = viewer.page
    if not page.evaluate("Boolean(window.axe)"):
        page.evaluate(AXE.read_text(encoding="utf-8"))
    found: list[dict[str, Any]] = page.evaluate(
        "(tags) => axe.run({runOnly: tags}).then(({violations}) => violations)", TAGS
    )
    return [
        f"{fault['id']}: {node['target']} {node['failureSummary']}"
        for fault in found
        for node in fault["nodes"]
    ]


def visit(viewer: Viewer, world: World, check: Callable[[str], None]) -> None:
    """Go through every page and panel with something in each, and check each state."""
    page = viewer.page
    viewer.open()
    page.get_by_role("link", name=re.compile("^s00000")).wait_for()
    check("archive")
    page.get_by_role("combobox", name="Status").select_option("all")
    page.get_by_text(world.id("truncated")).wait_for()
    check("archive with quarantined slides")
    viewer.open(f"#/slide/{world.id('s00000')}")
    viewer.still()
    for name in PANELS:
        page.get_by_role("tab", name=name, exact=True).click()
        if name == "Search":
            page.get_by_role("searchbox", name="Search in words").fill("necrosis")
            page.get_by_role("button", name="Search", exact=True).click()
            page.get_by_role("list", name=re.compile("^Results")).wait_for()
            page.get_by_role("button", name="Options and filters").click()
            page.get_by_role("button", name="Add a label").click()
        if name == "Where":
            page.get_by_role("textbox", name="Show where this is true").fill("Mucin pools")
            page.get_by_role("button", name="Show", exact=True).click()
            page.get_by_text(re.compile("^Fit ")).first.wait_for()
            page.get_by_text("Colours and export").click()
        if name == "Ask":
            page.get_by_role("textbox", name="Question").fill("What is seen?")
            page.get_by_role("button", name="Ask", exact=True).click()
            page.get_by_role("button", name="Mucin pools").wait_for()
        if name == "Draw":
            page.get_by_role("button", name="Rectangle").wait_for()
        check(f"panel {name}")
    page.get_by_role("button", name="Help and keys").click()
    page.get_by_role("dialog").wait_for()
    check("help")
    page.keyboard.press("Escape")
    viewer.open(f"#/compare/{world.id('s00000')}/{world.id('s00005')}")
    viewer.still(0)
    viewer.still(1)
    check("compare")


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_axe_finds_nothing(tab: Callable[..., Viewer], world: World, colours: str) -> None:
    viewer = tab(color_scheme=colours)
    found = {}

    def check(state: str) -> None:
        if wrong := faults(viewer):
            found[state] = wrong

    visit(viewer, world, check)
    guarded = tab(guarded=True, color_scheme=colours)
    guarded.expected.append("401")
    guarded.open().page.get_by_label("Access token").wait_for()
    if wrong := faults(guarded):
        found["sign-in"] = wrong
    assert found == {}


@pytest.mark.parametrize(
    "screen",
    [
        {"viewport": {"width": 640, "height": 400}, "device_scale_factor": 2},
        {"viewport": {"width": 360, "height": 740}, "device_scale_factor": 3, "has_touch": True,
         "is_mobile": True},
    ],
    ids=["200 % zoom", "phone"],
)  # fmt: skip
def test_small_screens_need_no_scrolling_sideways(
    tab: Callable[..., Viewer], world: World, screen: dict[str, Any]
) -> None:
    viewer = tab(**screen)
    found = []

    def check(state: str) -> None:
        wide, seen = viewer.page.evaluate(
            "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
        )
        if wide > seen:
            found.append(f"{state}: {wide} of {seen} px")

    viewer.open(f"#/slide/{world.id('s00000')}?panel=slide")
    viewer.still()
    if viewer.page.get_by_role("tab").count() == 0:  # the panel is closed where there is no room
        viewer.page.get_by_role("button", name="Side panel").click()
    for name in PANELS:
        viewer.page.get_by_role("tab", name=name, exact=True).click()
        check(f"panel {name}")
    viewer.open()
    viewer.page.get_by_role("link", name=re.compile("^s00000")).wait_for()
    check("archive")
    viewer.open(f"#/compare/{world.id('s00000')}/{world.id('s00005')}")
    viewer.still(0)
    check("compare")
    guarded = tab(guarded=True, **screen)
    guarded.expected.append("401")
    viewer = guarded.open()
    viewer.page.get_by_label("Access token").wait_for()
    check("sign-in")
    assert found == []
