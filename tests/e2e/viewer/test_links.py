"""The address is all it takes: what one reader sees, another sees who opens it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import cv2
import numpy as np
import pytest

from tests.e2e.viewer.browser import Viewer
from tests.e2e.viewer.world import Services, World

pytestmark = pytest.mark.timeout(300)

TEXT = "Mucin pools are present."
STEM = "s00000"


@pytest.fixture(scope="module")
def world(services: Services) -> World:
    return services.world


def results(viewer: Viewer) -> list[str]:
    """Return the texts of the results, once they are there."""
    found = viewer.page.get_by_role("list", name=re.compile("^Results")).get_by_role("listitem")
    found.first.wait_for()
    return found.all_inner_texts()


def test_a_search_with_its_options_is_a_link_and_its_results_are_seen_at_once(
    tab: Callable[..., Viewer], world: World
) -> None:
    organ = json.loads(world.rows[STEM]["labels"])["organ"]
    first = tab()
    page = first.open(f"#/slide/{world.id(STEM)}?panel=search").page
    page.get_by_role("button", name="Options and filters").click()
    page.get_by_role("combobox", name="Find").select_option("slide")
    page.get_by_role("combobox", name="Words are compared by").select_option("hybrid")
    page.get_by_role("spinbutton", name="Results").fill("5")
    page.get_by_role("button", name="Add a label").click()
    page.get_by_role("textbox", name="Name of label 1").fill("organ")
    page.get_by_role("textbox", name="Value of label 1").fill(organ)
    page.get_by_role("searchbox", name="Search in words").fill(TEXT)
    page.get_by_role("textbox", name="Value of label 1").press("Enter")
    shown = results(first)
    of_organ = [row for row in world.rows.values() if f'"{organ}"' in (row["labels"] or "")]
    assert 0 < len(shown) <= 5
    assert all(any(row["slide_id"] in one for row in of_organ) for one in shown)
    # The options have made room, say what they are, and the keyboard is where they open again.
    options = page.get_by_role("button", name="Options and filters")
    assert options.get_attribute("aria-expanded") == "false"
    assert options.evaluate("(button) => button === document.activeElement")
    page.get_by_text(f"slides, by meaning and words, 5 results, organ={organ}").wait_for()
    box = page.get_by_role("list", name=re.compile("^Results")).get_by_role("button").first
    place = box.bounding_box()
    assert place
    assert place["y"] + place["height"] <= 800
    page.wait_for_url(re.compile("find=slide.*by=hybrid.*k=5.*label=organ"))
    second = tab()
    second.page.goto(page.url)
    assert results(second) == shown


def test_a_link_to_what_is_like_a_region_finds_it_again(
    tab: Callable[..., Viewer], world: World
) -> None:
    first = tab()
    page = first.open(f"#/slide/{world.id(STEM)}?x=1280&y=1280&w=512&panel=search").page
    first.still()
    page.get_by_role("button", name="Like this region").click()
    shown = results(first)
    page.wait_for_url(re.compile("like="))
    # What is typed and not searched yet changes nothing when a result is opened.
    page.get_by_role("searchbox", name="Search in words").fill("necrosis")
    other = next(i for i, one in enumerate(shown) if world.id(STEM) not in one)
    found = page.get_by_role("list", name=re.compile("^Results")).get_by_role("listitem")
    found.nth(other).get_by_role("button").click()
    page.wait_for_url(re.compile(r"(?!.*s00000.*\?)#/slide/"))
    first.still()
    places = [one.replace("\nCompare", "") for one in shown]
    assert [one.replace("\nCompare", "") for one in results(first)] == places
    page.wait_for_url(re.compile("like="))
    second = tab()
    second.page.goto(page.url)
    assert [one.replace("\nCompare", "") for one in results(second)] == places


def test_layers_and_the_picture_look_the_same_to_who_opens_the_link(
    tab: Callable[..., Viewer], world: World
) -> None:
    first = tab()
    page = first.open(f"#/slide/{world.id(STEM)}?panel=where").page
    first.still()
    sentence = page.get_by_role("textbox", name="Show where this is true")
    layers = page.get_by_role("list", name="Layers").locator("> li")
    plain = first.picture().astype(int)
    for number, text in enumerate((TEXT, "Necrosis is present.")):
        if number:
            page.locator("summary", has_text="Contrast").click()
            page.get_by_role("textbox", name="Subtract the heat of").fill("tissue")
        sentence.fill(text)
        page.get_by_role("button", name="Show", exact=True).click()
        layers.nth(number).get_by_text("Fit").wait_for()
        layers.nth(number).get_by_text("Colours and export").click()
    one, two = layers.nth(0), layers.nth(1)
    one.get_by_role("combobox", name="Colours").select_option("turbo")
    one.get_by_role("slider", name="Opacity").fill("0.9")
    one.get_by_role("slider", name="Hide heat below").fill("0.5")
    two.get_by_role("slider", name="Opacity").fill("0.3")
    two.get_by_role("checkbox", name="show single patches").check()
    two.get_by_role("checkbox", name="outline boxes").uncheck()
    page.get_by_role("tab", name="Slide").click()
    page.get_by_role("slider", name="Brightness").fill("0.8")
    page.get_by_role("slider", name="Gamma").fill("1.5")
    page.wait_for_url(re.compile(r"looks=turbo\+90\+50.*looks=single\+30\+10.*picture=0.8"))
    second = tab()
    second.page.goto(page.url)
    second.still()
    second.page.get_by_role("tab", name="Where").click()
    again = second.page.get_by_role("list", name="Layers").locator("> li")
    again.nth(1).get_by_text("Fit").wait_for()
    assert "less “tissue”" in again.nth(1).inner_text()
    pictures = [viewer.picture().astype(int) for viewer in (first, second)]
    assert np.abs(pictures[0] - pictures[1]).mean() < 0.5
    assert np.abs(pictures[0] - plain).mean() > 10
    # Each layer is what it says: without it, and with it alone, other pixels are seen.
    again.nth(0).get_by_role("checkbox", name=TEXT).uncheck()
    without = second.picture().astype(int)
    assert np.abs(without - pictures[1]).max() > 60
    second.page.wait_for_url(re.compile(r"looks=turbo\+90\+50\+boxes"))  # hidden, and kept


def test_heat_and_outlines_turn_with_the_slide(viewer: Viewer, world: World) -> None:
    heat = f"layers={TEXT.replace(' ', '+')}&looks=turbo+100+50+shown"
    seen = []
    for turn in (0, 90):
        viewer.open(f"#/slide/{world.id(STEM)}?x=1024&y=1024&w=2800&rot={turn}&{heat}")
        viewer.still()
        plain = viewer.picture()
        viewer.page.get_by_role("tab", name="Where").click()
        viewer.page.get_by_text(re.compile("^Fit ")).first.wait_for()
        viewer.page.get_by_role("tab", name="Slide").click()
        viewer.page.get_by_role("checkbox", name="Regions").check()
        viewer.page.get_by_role("checkbox", name="Tissue").check()
        viewer.page.wait_for_load_state("networkidle")
        picture = viewer.picture()
        assert np.abs(picture.astype(int) - plain).max() > 100
        middle = [int(side // 2) for side in picture.shape[:2]]
        rows, columns = (slice(at - 250, at + 250) for at in middle)
        seen.append(picture[rows, columns].astype(int))
    upright, turned = seen
    # Lines between two pixels fall on either, so a pixel's mean over its neighbours is compared.
    means = [cv2.blur(one.astype(np.float32), (5, 5)) for one in (np.rot90(upright, -1), turned)]
    assert np.abs(means[0] - means[1]).mean() < 4
    assert (np.abs(means[0] - means[1]).max(axis=2) > 60).mean() < 0.002
