"""The archive's list, and two slides side by side."""

from __future__ import annotations

import json
import re

import pytest

from tests.e2e.viewer.browser import Viewer
from tests.e2e.viewer.test_slide import assert_true
from tests.e2e.viewer.world import Services, World

pytestmark = pytest.mark.timeout(300)

UNLOCK_AND_ZOOM = """async (box) => {
    box.click();
    await null;  // the page takes the click in
    const key = new KeyboardEvent("keydown", {key: "+", bubbles: true, cancelable: true});
    document.activeElement.dispatchEvent(key);
}"""
"""Unlocks the two slides and zooms the focused one before another frame is drawn."""


@pytest.fixture(scope="module")
def world(services: Services) -> World:
    return services.world


def test_slides_are_found_by_name_and_label(viewer: Viewer, world: World) -> None:
    page = viewer.open().page
    ready = {row["slide_id"]: row for row in world.rows.values() if row["status"] == "ready"}
    count = page.get_by_role("status").filter(has_text=re.compile(r"^\d+ slides?$"))
    count.filter(has_text=f"{len(ready)} slides").wait_for()
    assert page.get_by_role("link", name=re.compile("^s000|^large")).count() == len(ready)
    organ = json.loads(world.rows["s00000"]["labels"])["organ"]
    same = [row for row in ready.values() if f'"{organ}"' in (row["labels"] or "")]
    page.get_by_role("searchbox", name="Label").fill(f"organ={organ}")
    count.filter(has_text=re.compile(f"^{len(same)} slide")).wait_for()
    page.get_by_role("searchbox", name="Name").fill(world.id("s00000")[:7].upper())
    count.filter(has_text=re.compile("^1 slide$")).wait_for()
    assert page.get_by_role("link", name=re.compile("s00000")).count() == 1
    thumbnail = page.get_by_role("link", name=re.compile("s00000")).locator("img")
    thumbnail.evaluate("(image) => image.decode()")
    assert thumbnail.evaluate("(image) => image.naturalWidth") > 50
    page.reload()  # the address keeps what was asked
    count.filter(has_text=re.compile("^1 slide$")).wait_for()


def test_quarantined_slides_are_listed_with_reasons(viewer: Viewer, world: World) -> None:
    page = viewer.open().page
    page.get_by_role("button", name="2 quarantined").click()
    page.get_by_role("status").filter(has_text="2 slides").wait_for()
    assert page.get_by_role("combobox", name="Status").input_value() == "quarantined"
    listed = page.get_by_role("main").get_by_role("list").get_by_role("listitem")
    texts = " ".join(listed.all_inner_texts())
    for stem in ("truncated", "without-mpp"):
        row = world.rows[stem]
        assert row["slide_id"] in texts
        assert row["reason"] in texts
    assert str(world.folder) not in page.content()
    page.get_by_role("combobox", name="Status").select_option("empty")
    page.get_by_role("link", name=re.compile("^glass")).or_(
        page.get_by_text(world.id("glass"))
    ).first.wait_for()
    page.get_by_role("combobox", name="Status").select_option("all")
    page.get_by_role("status").filter(has_text=f"{len(world.rows)} slides").wait_for()


def test_two_slides_move_in_step_in_um(viewer: Viewer, world: World) -> None:
    left, right = "s00001", "s00005"  # 0.5 and 0.25 µm/px
    mpp = [world.rows[stem]["mpp"] for stem in (left, right)]
    assert mpp[0] != pytest.approx(mpp[1], rel=0.3)
    page = viewer.open(f"#/slide/{world.id(left)}").page
    viewer.still()
    page.get_by_role("button", name="Compare with another slide").click()
    dialog = page.get_by_role("dialog", name="Compare with")
    dialog.get_by_role("searchbox").fill(right)
    dialog.get_by_role("button", name=re.compile(right)).click()
    assert page.get_by_role("checkbox", name="In step").is_checked()

    def um() -> list[tuple[float, ...]]:
        return [tuple(side * mpp[n] for side in viewer.view(n)) for n in (0, 1)]

    before = um()
    assert before[0][2] == pytest.approx(before[1][2], rel=0.005)
    viewer.still(0).focus()
    viewer.moved(lambda: page.keyboard.press("+"), 1)
    viewer.moved(lambda: page.keyboard.press("+"), 1)
    viewer.moved(lambda: page.keyboard.press("ArrowRight"), 1)
    after = um()
    assert after[0][2] == pytest.approx(before[0][2] / 2.25, rel=0.005)
    assert after[0][2:] == pytest.approx(after[1][2:], rel=0.005)
    # The middle moved by as much on both: a fifth of the screen.
    for now, then in zip(after, before, strict=True):
        step = [now[i] + now[i + 2] / 2 - then[i] - then[i + 2] / 2 for i in (0, 1)]
        assert step == pytest.approx([0.2 * after[0][2], 0], abs=1)
    assert_true(viewer, world.path(left), number=0)
    assert_true(viewer, world.path(right), number=1)
    # Turned as one, too, and a step to the right is one on both.
    page.get_by_role("button", name="Rotate by 90 degrees").click()
    page.wait_for_url(re.compile(r"rot=90.*rot2=90"))
    middles = [[now[i] + now[i + 2] / 2 for i in (0, 1)] for now in um()]
    viewer.still(0).focus()
    viewer.moved(lambda: page.keyboard.press("ArrowRight"), 1)
    for now, then in zip(um(), middles, strict=True):
        step = [now[i] + now[i + 2] / 2 - then[i] for i in (0, 1)]
        assert step == pytest.approx([0, -0.2 * now[3]], abs=1)
    assert_true(viewer, world.path(left), number=0, quarters=1)
    assert_true(viewer, world.path(right), number=1, quarters=1)
    page.get_by_role("spinbutton", name="Turn the right by").fill("-30")
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile(r"rot=90.*rot2=60"))
    page.get_by_role("button", name="Rotate by 90 degrees").click()
    page.wait_for_url(re.compile(r"rot=180.*rot2=150"))
    # Led by the right one, and apart.
    viewer.still(1).focus()
    viewer.moved(lambda: page.keyboard.press("-"), 0)
    page.get_by_role("spinbutton", name="Turn the right by").fill("0")
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile(r"rot=180.*rot2=180"))
    assert um()[0][2] == pytest.approx(um()[1][2], rel=0.005)
    kept = viewer.view(0)
    viewer.still(1).focus()
    viewer.moved(lambda: page.get_by_role("checkbox", name="In step").evaluate(UNLOCK_AND_ZOOM), 1)
    assert not page.get_by_role("checkbox", name="In step").is_checked()
    assert viewer.view(0) == kept
