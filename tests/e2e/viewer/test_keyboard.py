"""Everything is done with the keyboard alone, and one sees where one is."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from tests.e2e.viewer.browser import Viewer
from tests.e2e.viewer.world import TOKENS, Services, World

pytestmark = pytest.mark.timeout(300)

NAME_OF_FOCUSED = """() => {
    const at = document.activeElement;
    if (at === document.body) return "";  // all that the page says is the name of nothing
    const label = at.getAttribute("aria-label") ?? at.labels?.[0]?.innerText;
    return (label ?? at.innerText ?? "").trim();
}"""
RING_OF_FOCUSED = """() => {
    const {outlineStyle, outlineWidth, boxShadow} = getComputedStyle(document.activeElement);
    return (outlineStyle !== "none" && parseFloat(outlineWidth) >= 1) || boxShadow !== "none";
}"""


@pytest.fixture(scope="module")
def world(services: Services) -> World:
    return services.world


def test_everything_is_done_with_the_keyboard_alone(tab: Callable[..., Viewer]) -> None:
    viewer = tab(guarded=True)
    viewer.expected.append("401")
    page = viewer.open().page

    def focused() -> str:
        return str(page.evaluate(NAME_OF_FOCUSED))

    def tab_to(name: str, *, back: bool = False) -> None:
        for _ in range(80):
            if re.search(name, focused()):
                return
            page.keyboard.press("Shift+Tab" if back else "Tab")
        pytest.fail(f"the tab key does not reach {name}")

    page.get_by_label("Access token").wait_for()
    tab_to("Access token")
    page.keyboard.type(TOKENS["all"][1])
    page.keyboard.press("Enter")
    page.get_by_role("link", name=re.compile("^s00000")).wait_for()
    tab_to("^s00000")
    page.keyboard.press("Enter")
    viewer.still()
    tab_to("^Slide s00000")
    viewer.moved(lambda: page.keyboard.press("+"))
    viewer.moved(lambda: page.keyboard.press("ArrowDown"))
    page.keyboard.press("?")
    page.get_by_role("dialog").wait_for()
    page.keyboard.press("Escape")
    page.get_by_role("dialog").wait_for(state="detached")
    assert re.search("^Slide s00000", focused())
    tab_to("^Slide$")
    page.keyboard.press("ArrowRight")
    assert page.get_by_role("tab", name="Search").get_attribute("aria-selected") == "true"
    tab_to("Search in words")
    page.keyboard.type("necrosis")
    page.keyboard.press("Enter")
    page.get_by_role("list", name=re.compile("^Results")).wait_for()
    tab_to(r"^−?\d\.\d{3}")
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile("q=necrosis"))
    viewer.still()
    tab_to("^Sign out", back=True)
    page.keyboard.press("Enter")
    page.get_by_label("Access token").wait_for()


def test_a_focused_element_is_seen(tab: Callable[..., Viewer], world: World) -> None:
    viewer = tab()
    page = viewer.open(f"#/slide/{world.id('s00000')}").page
    viewer.still()
    for _ in range(12):
        page.keyboard.press("Tab")
        assert page.evaluate(RING_OF_FOCUSED), page.evaluate(NAME_OF_FOCUSED)


def test_every_panel_is_used_with_the_keyboard_alone(viewer: Viewer, world: World) -> None:
    from playwright.sync_api import expect

    page = viewer.open(f"#/slide/{world.id('s00002')}?panel=where").page
    viewer.still()

    def tab_to(name: str, *, back: bool = False) -> None:
        for _ in range(60):
            if re.search(name, str(page.evaluate(NAME_OF_FOCUSED))):
                return
            page.keyboard.press("Shift+Tab" if back else "Tab")
        pytest.fail(f"the tab key does not reach {name}")

    tab_to("^Show where this is true")
    page.keyboard.type("Necrosis is present.")
    page.keyboard.press("Enter")
    page.get_by_text(re.compile("^Fit ")).wait_for()  # a hint speaks of the fit, too
    tab_to("^Colours and export")
    page.keyboard.press("Enter")
    tab_to("^Opacity")
    page.keyboard.press("ArrowLeft")
    assert page.get_by_role("slider", name="Opacity").input_value() == "0.65"
    tab_to("^Remove", back=True)
    page.keyboard.press("Enter")
    page.get_by_role("list", name="Layers").wait_for(state="detached")
    tab_to("^Show where this is true")  # one is where one goes on
    tab_to("^Where$", back=True)
    page.keyboard.press("ArrowRight")
    tab_to("^Question")
    page.keyboard.type("What is seen?")
    page.keyboard.press("Enter")
    claim = page.get_by_role("button", name="Mucin pools are present.")
    claim.wait_for()
    tab_to("^Mucin pools", back=True)
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile("layers=Mucin"))
    assert claim.get_attribute("aria-pressed") == "true"
    tab_to("^Ask$", back=True)
    page.keyboard.press("ArrowRight")
    tab_to("^By keys")
    page.keyboard.press("Enter")
    assert page.evaluate(NAME_OF_FOCUSED) == "By keys"
    tab_to("^Set corner 1")
    page.keyboard.press("Enter")
    tab_to("^Save as a point")
    page.keyboard.press("Enter")
    page.get_by_role("textbox", name="Name").wait_for()
    tab_to("^Name")
    page.keyboard.type("here")
    page.keyboard.press("Enter")
    page.get_by_role("status").filter(has_text="1 annotation, all saved").wait_for()
    tab_to("^Delete$")
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Keep it")).to_be_focused()
    tab_to("^Delete for good", back=True)
    page.keyboard.press("Enter")
    page.get_by_text("Nothing is drawn on this slide yet.").wait_for()
