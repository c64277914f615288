"""Panels beside a slide: search and fly there, a conversation, annotations."""

from __future__ import annotations

import json
import re
from typing import Any

import cv2
import numpy as np
import pytest

from tests.e2e.viewer.browser import Viewer
from tests.e2e.viewer.test_slide import assert_true
from tests.e2e.viewer.world import ANSWER, Services, World

pytestmark = pytest.mark.timeout(300)

SENTENCE, STEM = "Mucin pools are present.", "s00000"


@pytest.fixture(scope="module")
def world(services: Services) -> World:
    return services.world


def test_words_find_regions_and_a_click_flies_to_the_pixels(viewer: Viewer, world: World) -> None:
    page = viewer.open(f"#/slide/{world.id(STEM)}?panel=search").page
    page.get_by_role("searchbox", name="Search in words").fill(SENTENCE)
    page.get_by_role("button", name="Search", exact=True).click()
    results = page.get_by_role("list", name=re.compile("^Results")).get_by_role("listitem")
    results.first.wait_for()
    expected = world.found(SENTENCE, k=12)
    assert results.count() == len(expected)
    for number in (0, 5):  # one is often of this slide, one of another
        row = expected[number]
        shown = results.nth(number)
        assert row["slide_id"] in shown.inner_text()
        assert f"{row['score']:.3f}".replace("-", "−") in shown.inner_text()
        shown.get_by_role("button").first.click()
        page.wait_for_url(re.compile(f"#/slide/{re.escape(row['slide_id'])}"))
        slide = page.get_by_role("application", name=f"Slide {row['slide_id']}")
        slide.wait_for()
        x0, y0, w0, h0 = viewer.view()
        assert x0 <= row["x0"]
        assert y0 <= row["y0"]
        assert x0 + w0 >= row["x0"] + row["size0"]
        assert y0 + h0 >= row["y0"] + row["size0"]
        assert h0 < 2 * row["size0"]
        assert_true(viewer, world.path(world.stem(row["slide_id"])))


def test_a_region_and_a_slide_find_their_like(viewer: Viewer, world: World) -> None:
    page = viewer.open(f"#/slide/{world.id(STEM)}?x=1280&y=1280&w=512&panel=search").page
    viewer.still()
    page.get_by_role("button", name="Like this region").click()
    results = page.get_by_role("list", name=re.compile("^Results")).get_by_role("listitem")
    results.first.wait_for()
    region = f"{world.id(STEM)}/2_2"  # 512 px each
    like = [row for row in world.found(region=region, k=13) if row["region_id"] != region]
    assert [like[0]["slide_id"] in results.first.inner_text(), results.count()] == [True, 12]
    page.get_by_role("button", name="Like this slide").click()
    page.get_by_role("status").filter(has_text=re.compile(r"\d+ slides? (for|like)")).wait_for()
    best = world.found(slide=world.id(STEM), level="slide", k=2, exclude_same_slide=True)
    assert best[0]["slide_id"] in results.first.inner_text()


def test_an_answer_is_written_as_it_comes_and_its_claims_are_shown(
    viewer: Viewer, world: World
) -> None:
    page = viewer.open(f"#/slide/{world.id(STEM)}?panel=ask").page
    viewer.still()
    world.hold.touch()
    try:
        page.get_by_role("textbox", name="Question").fill("What is seen?")
        page.get_by_role("button", name="Ask", exact=True).click()
        talk = page.get_by_role("log", name="Conversation")
        first, _, rest = ANSWER.partition(" ")
        talk.get_by_text(first).wait_for()
        assert rest not in talk.inner_text()
        assert talk.get_attribute("aria-busy") == "true"
    finally:
        world.hold.unlink()
    claim = talk.get_by_role("button", name=SENTENCE)
    claim.click()
    page.wait_for_url(re.compile("layers=Mucin"))
    page.get_by_role("tab", name="Where").click()
    layers = page.get_by_role("list", name="Layers").get_by_role("listitem")
    layers.first.get_by_text("Fit").wait_for()
    page.get_by_role("tab", name="Ask").click()
    page.get_by_role("button", name="Describe it").click()
    talk.get_by_role("button", name=SENTENCE).nth(1).wait_for()
    page.get_by_role("checkbox", name="choose among options").check()
    page.get_by_role("textbox", name="Options").fill("colon\nbreast\nlung")
    page.get_by_role("textbox", name="Question").fill("Which organ is shown?")
    page.get_by_role("button", name="Ask", exact=True).click()
    scores = talk.get_by_role("table").get_by_role("row")
    scores.first.wait_for()
    assert scores.get_by_role("rowheader").all_inner_texts()[:3] == ["colon", "breast", "lung"]


def test_an_annotation_is_drawn_kept_and_exported(viewer: Viewer, world: World) -> None:
    address = f"#/slide/{world.id(STEM)}?x=1000&y=1000&w=1600&panel=draw"
    page = viewer.open(address).page
    box = viewer.still().bounding_box()
    assert box
    x0, y0, w0, _ = viewer.view()
    scale = w0 / box["width"]
    page.get_by_role("button", name="Rectangle").click()
    left, top, right, bottom = box["x"] + 150, box["y"] + 200, box["x"] + 450, box["y"] + 380
    page.mouse.move(left, top)
    page.mouse.down()
    page.mouse.move((left + right) / 2, (top + bottom) / 2)
    page.mouse.move(right, bottom)
    page.mouse.up()
    rows = page.get_by_role("list", name="Annotations").get_by_role("listitem")
    rows.first.wait_for()
    page.get_by_role("textbox", name="Name").fill("Focus of necrosis")
    page.get_by_role("textbox", name="Name").press("Tab")
    page.get_by_role("combobox", name="Class").fill("Necrosis")
    page.get_by_role("combobox", name="Class").press("Tab")
    page.get_by_role("status").filter(has_text="all saved").wait_for()
    page.reload()
    again = rows.filter(has_text="Focus of necrosis")
    again.wait_for()
    with page.expect_download() as saved:
        page.get_by_role("button", name="Save for QuPath").click()
    (feature,) = json.loads(saved.value.path().read_text(encoding="utf-8"))["features"]
    ring = np.array(feature["geometry"]["coordinates"][0])
    origin = (box["x"], box["y"])
    for found, corner in ((ring.min(axis=0), (left, top)), (ring.max(axis=0), (right, bottom))):
        expected = (x0, y0) + np.subtract(corner, origin) * scale
        assert found == pytest.approx(expected, abs=1.5 * scale)
    assert feature["properties"]["name"] == "Focus of necrosis"
    assert feature["properties"]["classification"]["name"] == "Necrosis"
    # It is drawn where it is: its outline differs from the plain slide.
    again.get_by_role("button").click()
    page.get_by_role("button", name="Delete", exact=True).click()
    page.get_by_role("button", name="Delete for good").click()
    again.wait_for(state="detached")
    page.reload()
    page.get_by_text("Nothing is drawn on this slide yet.").wait_for()


def test_an_annotation_is_drawn_with_keys_alone(viewer: Viewer, world: World) -> None:
    page = viewer.open(f"#/slide/{world.id('s00004')}?x=1000&y=1000&w=1600&panel=draw").page
    viewer.still()
    page.get_by_role("button", name="By keys").focus()
    page.keyboard.press("Enter")
    for number, arrow in enumerate(("ArrowRight", "ArrowDown", "ArrowLeft")):
        page.get_by_role("button", name=f"Set corner {number + 1}").focus()
        page.keyboard.press("Enter")
        viewer.still().focus()
        viewer.moved(lambda arrow=arrow: page.keyboard.press(arrow))
    page.get_by_role("button", name="Finish").focus()
    page.keyboard.press("Enter")
    rows = page.get_by_role("list", name="Annotations").get_by_role("listitem")
    rows.first.wait_for()
    page.get_by_role("status").filter(has_text="1 annotation").wait_for()


def test_a_point_is_dragged_and_put_in_the_middle(viewer: Viewer, world: World) -> None:
    stem = "s00006"
    page = viewer.open(f"#/slide/{world.id(stem)}?x=1000&y=1000&w=1600&panel=draw").page
    box = viewer.still().bounding_box()
    assert box
    x0, y0, w0, h0 = viewer.view()
    scale = w0 / box["width"]
    page.get_by_role("button", name="Point", exact=True).click()
    page.mouse.click(box["x"] + 200, box["y"] + 300)
    saved = page.get_by_role("status").filter(has_text="1 annotation, all saved")
    saved.wait_for()

    def coordinates() -> list[float]:
        answer = page.request.get(f"{viewer.url}/v1/slides/{world.id(stem)}/annotations")
        (feature,) = answer.json()["features"]
        found: list[float] = feature["geometry"]["coordinates"]
        return found

    assert coordinates() == pytest.approx([x0 + 200 * scale, y0 + 300 * scale], abs=scale)
    before = coordinates()
    page.mouse.move(box["x"] + 203, box["y"] + 298)  # where it is gripped makes no difference
    page.mouse.down()
    page.mouse.move(box["x"] + 260, box["y"] + 340)
    page.mouse.move(box["x"] + 323, box["y"] + 358)
    with page.expect_response(re.compile("/annotations/")) as answer:
        page.mouse.up()
    assert answer.value.ok
    assert viewer.view() == (x0, y0, w0, h0)  # the slide has stayed
    moved = [before[0] + 120 * scale, before[1] + 60 * scale]
    assert coordinates() == pytest.approx(moved, abs=0.05)
    with page.expect_response(re.compile("/annotations/")):
        page.get_by_role("button", name="Move to the middle of the view").click()
    saved.wait_for()
    assert coordinates() == pytest.approx([1000, 1000], abs=0.05)
    page.get_by_role("button", name="Delete", exact=True).click()
    page.get_by_role("button", name="Delete for good").click()
    page.get_by_text("Nothing is drawn on this slide yet.").wait_for()


SHAPE = [[800, 700], [1300, 800], [1200, 1250], [900, 1100], [800, 700]]


@pytest.mark.parametrize("turn", [0, 90, 37])
def test_an_area_lies_where_it_is_and_is_found_there_whatever_the_turn(
    viewer: Viewer, world: World, turn: int
) -> None:
    slide = world.id("s00003")
    path = f"{viewer.url}/v1/slides/{slide}/annotations"
    feature = {
        "type": "Feature",
        "id": "7f4c1c7e-0000-4000-8000-000000000001",
        "geometry": {"type": "Polygon", "coordinates": [SHAPE]},
        "properties": {
            "name": "a shape",
            "classification": {"name": "of blue", "color": [0, 0, 255]},
        },
    }
    document = {"type": "FeatureCollection", "features": [feature]}
    viewer.page.request.post(f"{path}/import", data=document)
    page = viewer.open(f"#/slide/{slide}?x=1000&y=1000&w=1600&rot={turn}&panel=slide").page
    plain = viewer.picture().astype(int)
    page.get_by_role("tab", name="Draw").click()
    page.get_by_role("status").filter(has_text="1 annotation").wait_for()
    shown = viewer.picture().astype(int)
    changed = np.abs(shown - plain).max(axis=2) > 40  # the line; the area itself is paler
    angle = np.deg2rad(turn)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    height, width = plain.shape[:2]
    on_screen = (np.array(SHAPE) - 1000) @ rotation.T * width / 1600 + (width / 2, height / 2)
    line = np.zeros((height, width), np.uint8)
    cv2.polylines(line, [np.rint(on_screen).astype(np.int32)], isClosed=True, color=1)
    near = cv2.dilate(line, np.ones((5, 5), np.uint8)) > 0
    assert near[changed].mean() > 0.98
    assert changed[line > 0].mean() > 0.9
    # A click on it opens it, and one beside it closes it.
    box = viewer.slide().bounding_box()
    assert box
    editor = page.get_by_role("textbox", name="Name")
    inside = np.array([1050, 950]) - 1000
    x, y = inside @ rotation.T * width / 1600 + (width / 2, height / 2)
    page.mouse.click(box["x"] + x, box["y"] + y)
    editor.wait_for()
    assert editor.input_value() == "a shape"
    page.mouse.click(box["x"] + 20, box["y"] + 20)
    editor.wait_for(state="detached")
    page.request.delete(f"{path}/{feature['id']}", headers={"Content-Type": "application/json"})


def test_what_is_drawn_while_the_list_is_loaded_stays(viewer: Viewer, world: World) -> None:
    page = viewer.open(f"#/slide/{world.id('s00001')}?panel=slide").page
    box = viewer.still().bounding_box()
    assert box
    waiting: list[Any] = []
    page.route(
        re.compile("/annotations$"),
        lambda route: waiting.append(route) if route.request.method == "GET" else route.continue_(),
    )
    page.get_by_role("tab", name="Draw").click()
    page.get_by_role("button", name="Point", exact=True).click()
    page.mouse.click(box["x"] + 300, box["y"] + 300)
    page.get_by_role("textbox", name="Name").fill("early")
    (held,) = waiting
    held.fulfill(json={"type": "FeatureCollection", "features": []})  # as it was before
    page.get_by_role("textbox", name="Name").press("Enter")
    page.get_by_role("status").filter(has_text="1 annotation, all saved").wait_for()
    page.get_by_role("list", name="Annotations").get_by_text("early").wait_for()
    page.get_by_role("button", name="Delete", exact=True).click()
    page.get_by_role("button", name="Delete for good").click()
    page.get_by_text("Nothing is drawn on this slide yet.").wait_for()
