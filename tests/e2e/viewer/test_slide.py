"""A slide on the screen: the right pixels at the right place and scale, however one gets there."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from pathflip import Slide
from tests.e2e.viewer.browser import Viewer
from tests.e2e.viewer.world import Services, World

pytestmark = pytest.mark.timeout(300)

CROP = 320
"""Side of the middle of the screen that is compared, px: nothing lies over it."""
SLACK = 6
"""Shifts that are tried, px."""
GREY = 6.0
"""Mean difference in grey levels that JPEG and the browser's interpolation make at most."""


@pytest.fixture(scope="module")
def world(services: Services) -> World:
    return services.world


def truth(
    path: Path, view: tuple[float, ...], shape: tuple[int, ...], *, quarters: int = 0
) -> NDArray[np.uint8]:
    """Read the middle of a view by the SDK, at the scale of the screen, RGB [CROP, CROP, 3].

    The view is turned by so many ``quarters`` clockwise.
    """
    x0, y0, w0, h0 = view
    scale = (h0 if quarters % 2 else w0) / shape[1]
    left, top = x0 + w0 / 2 - CROP / 2 * scale, y0 + h0 / 2 - CROP / 2 * scale
    with Slide(path) as slide:
        read = slide.read(round(left), round(top), CROP, mpp=slide.mpp * scale)
    return np.ascontiguousarray(np.rot90(read, -quarters))


Picture = NDArray[np.uint8]


def unlike(one: Picture, other: Picture) -> float:
    """Return the mean difference in grey levels, of means over 3 x 3 px: browsers interpolate."""
    a, b = (cv2.blur(picture.astype(np.float32), (3, 3)) for picture in (one, other))
    return float(np.abs(a - b).mean())


def offset(picture: Picture, expected: Picture) -> tuple[tuple[int, int], float]:
    """Return how many px off the middle of a picture another lies best, and how unlike it is."""
    top, left = (int(side - CROP) // 2 for side in picture.shape[:2])
    wide = picture[top - SLACK : top + CROP + SLACK, left - SLACK : left + CROP + SLACK]
    misfit = cv2.matchTemplate(wide, expected, cv2.TM_SQDIFF)
    row, column = np.unravel_index(int(misfit.argmin()), misfit.shape)
    there = wide[row : row + CROP, column : column + CROP]
    return (int(column) - SLACK, int(row) - SLACK), unlike(there, expected)


def assert_true(viewer: Viewer, path: Path, *, number: int = 0, quarters: int = 0) -> None:
    """The middle of the screen shows what the SDK reads there."""
    view, picture = viewer.view(number), viewer.picture(number)
    (right, down), grey = offset(picture, truth(path, view, picture.shape, quarters=quarters))
    assert (abs(right), abs(down)) <= (1, 1), f"{right}, {down} px off"
    assert grey < GREY, f"{grey:.1f} grey levels"


def place(address: str) -> dict[str, float]:
    """Return the numbers of a permalink."""
    return {name: float(value) for name, value in re.findall(r"[?&](x|y|w|rot)=([-\d.]+)", address)}


def test_a_slide_is_found_and_opened(viewer: Viewer, world: World) -> None:
    page = viewer.open().page
    page.get_by_role("searchbox", name="Name").fill("s00003")
    page.get_by_role("link", name=re.compile("s00003")).click()
    x0, y0, w0, h0 = viewer.view()
    row = world.rows["s00003"]
    assert x0 <= 0
    assert y0 <= 0
    assert x0 + w0 >= row["width"]
    assert y0 + h0 >= row["height"]
    assert world.id("s00003") in page.title()
    assert_true(viewer, world.path("s00003"))


@pytest.mark.parametrize(
    ("stem", "scale"),
    [("large", 8.0), ("large", 2.7), ("large", 1.0), ("s00005", 1.5), ("s00001", 1.0)],
)
def test_the_pixels_on_screen_are_those_of_the_place(
    viewer: Viewer, world: World, stem: str, scale: float
) -> None:
    row = world.rows[stem]
    x, y = 0.55 * row["width"], 0.47 * row["height"]
    viewer.open(f"#/slide/{world.id(stem)}?x={x}&y={y}&w={scale * 900}&panel=none")
    x0, y0, w0, h0 = viewer.view()
    assert (x0 + w0 / 2, y0 + h0 / 2, w0) == pytest.approx((x, y, scale * 900), abs=0.2)
    assert_true(viewer, world.path(stem))


def test_keys_the_wheel_and_a_double_click_move_the_view(viewer: Viewer, world: World) -> None:
    row = world.rows["large"]
    page = viewer.open(f"#/slide/{world.id('large')}?x=4000&y=3000&w=2560&panel=none").page
    viewer.still().focus()
    x0, y0, w0, h0 = viewer.view()
    right = viewer.moved(lambda: page.keyboard.press("ArrowRight"))
    assert right == pytest.approx((x0 + 0.2 * w0, y0, w0, h0), abs=0.2)
    up = viewer.moved(lambda: page.keyboard.press("ArrowUp"))
    assert up == pytest.approx((x0 + 0.2 * w0, y0 - 0.2 * h0, w0, h0), abs=0.2)
    nearer = viewer.moved(lambda: page.keyboard.press("+"))
    assert nearer[2] == pytest.approx(w0 / 1.5, abs=0.2)
    assert viewer.moved(lambda: page.keyboard.press("-"))[2] == pytest.approx(w0, abs=0.2)
    box = viewer.still().bounding_box()
    assert box
    at = (box["x"] + 0.25 * box["width"], box["y"] + 0.25 * box["height"])
    page.mouse.move(*at)
    before = viewer.view()
    wheel = viewer.moved(lambda: page.mouse.wheel(0, -300))
    assert wheel[2] < before[2]
    # What is under the pointer stays there.
    assert wheel[0] + 0.25 * wheel[2] == pytest.approx(before[0] + 0.25 * before[2], abs=2)
    whole = viewer.moved(lambda: page.keyboard.press("0"))
    assert whole[0] <= 0
    assert whole[0] + whole[2] >= row["width"]
    nearer = viewer.moved(lambda: page.mouse.dblclick(*at))
    assert nearer[2] == pytest.approx(whole[2] / 2, rel=0.01)
    assert_true(viewer, world.path("large"))


def test_a_drag_moves_what_is_under_the_pointer(viewer: Viewer, world: World) -> None:
    page = viewer.open(f"#/slide/{world.id('large')}?x=4000&y=3000&w=2560&panel=none").page
    box = viewer.still().bounding_box()
    assert box
    x0, y0, w0, h0 = viewer.view()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    def drag() -> None:
        page.mouse.move(x, y)
        page.mouse.down()
        page.mouse.move(x - 60, y + 20)
        page.mouse.move(x - 120, y + 40)
        page.mouse.up()

    moved = viewer.moved(drag)
    scale = w0 / box["width"]
    assert moved == pytest.approx((x0 + 120 * scale, y0 - 40 * scale, w0, h0), abs=1.5 * scale)


@pytest.mark.parametrize("factor", [1, 2])
def test_the_scale_bar_is_as_long_as_it_says(
    tab: Callable[..., Viewer], world: World, factor: int
) -> None:
    viewer = tab(device_scale_factor=factor)
    for stem in ("s00001", "s00005"):
        for width in (300, 1777, 4096):
            viewer.open(f"#/slide/{world.id(stem)}?x=1000&y=1000&w={width}&panel=none")
            _, _, w0, _ = viewer.view()
            bar = viewer.page.get_by_role("img", name=re.compile("^Scale bar"))
            name = bar.get_attribute("aria-label") or ""
            (length, unit), box = re.findall(r"([\d.]+) (nm|µm|mm)", name)[0], bar.bounding_box()
            slide = viewer.slide().bounding_box()
            assert box
            assert slide
            um = float(length) * {"nm": 1e-3, "µm": 1, "mm": 1e3}[unit]
            um_per_px = world.rows[stem]["mpp"] * w0 / slide["width"]
            assert box["width"] == pytest.approx(um / um_per_px, abs=0.6)
            assert 40 <= box["width"] <= slide["width"]
            # Magnification and resolution of the screen are those of the same closed form.
            strip = bar.locator("xpath=..").inner_text().replace(",", "")
            (power,), (mpp,) = re.findall(r"([\d.]+)×", strip), re.findall(r"([\d.]+) µm/px", strip)
            assert float(power) == pytest.approx(10 / um_per_px, rel=0.01)
            assert float(mpp) == pytest.approx(um_per_px, rel=0.01)


def test_a_permalink_restores_the_view_turned_and_with_its_panel(
    tab: Callable[..., Viewer], world: World
) -> None:
    first = tab()
    page = first.open(f"#/slide/{world.id('large')}?x=4000&y=3000&w=3000").page
    page.get_by_role("tab", name="Search").click()
    page.get_by_role("searchbox", name="Search in words").fill("mucin & “pools”")
    first.still().focus()
    first.moved(lambda: page.keyboard.press("r"))
    first.moved(lambda: page.keyboard.press("ArrowLeft"))
    view = first.moved(lambda: page.keyboard.press("+"))
    page.wait_for_url(re.compile(r"w=2000\b.*rot=90.*q=mucin"))
    second = tab()
    second.page.goto(page.url)
    assert second.view() == pytest.approx(view, abs=0.5)
    assert second.page.get_by_role("tab", name="Search").get_attribute("aria-selected") == "true"
    box = second.page.get_by_role("searchbox", name="Search in words")
    assert box.input_value() == "mucin & “pools”"
    there, here = (place(one.page.url) for one in (first, second))
    assert there == here
    inner = slice(20, -20)  # the first has the focus, and a ring that says so
    pictures = [one.picture()[inner, inner].astype(int) for one in (first, second)]
    assert np.abs(pictures[0] - pictures[1]).mean() < 1


def test_brightness_changes_the_picture_and_back(viewer: Viewer, world: World) -> None:
    viewer.open(f"#/slide/{world.id('large')}?x=4000&y=3000&w=3000")
    before = viewer.picture()
    brightness = viewer.page.get_by_role("slider", name="Brightness")
    brightness.fill("0.5")
    assert viewer.picture().mean() < 0.7 * before.mean()
    viewer.page.get_by_role("button", name="As scanned").click()
    assert np.abs(viewer.picture().astype(int) - before).mean() < 1


@pytest.mark.parametrize(("width", "turn"), [(1600, 0), (333, 90), (3000, 37)])
def test_a_length_and_an_area_are_measured_in_um(
    viewer: Viewer, world: World, width: int, turn: int
) -> None:
    page = viewer.open(f"#/slide/{world.id('s00005')}?x=2000&y=2000&w={width}&rot={turn}").page
    box = viewer.still().bounding_box()
    assert box
    um = world.rows["s00005"]["mpp"] * width / box["width"]
    x, y = box["x"] + 200, box["y"] + 200
    corners = [(x, y), (x + 300, y), (x + 300, y + 200), (x, y + 200)]
    page.get_by_role("button", name="Measure a length").click()
    page.mouse.click(*corners[0])
    page.mouse.click(*corners[2])
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Measure an area").click()
    for corner in corners:
        page.mouse.click(*corner)
    page.keyboard.press("Enter")
    done = page.get_by_role("region", name="Measured").get_by_role("listitem")
    length, area = done.nth(0).inner_text(), done.nth(1).inner_text()
    assert _quantity(length) == pytest.approx(np.hypot(300, 200) * um, rel=0.01)
    assert _quantity(area) == pytest.approx(300 * 200 * um**2, rel=0.02)


def _quantity(text: str) -> float:
    """Return a measure in µm or µm²."""
    number, unit = re.findall(r"([\d.,]+)\s*(mm²|µm²|mm|µm)", text)[0]
    return float(number.replace(",", "")) * {"mm²": 1e6, "mm": 1e3}.get(unit, 1)


def test_a_slide_that_changed_since_ingest_is_refused_in_a_sentence(
    viewer: Viewer, world: World
) -> None:
    path = world.path("s00002")
    stat = path.stat()
    viewer.expected.append("409")
    try:
        path.touch()
        page = viewer.open(f"#/slide/{world.id('s00002')}").page
        alert = page.get_by_role("alert").filter(has_text=re.compile("changed|other", re.I))
        alert.first.wait_for()
        assert str(path.parent) not in page.content()
    finally:
        import os

        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    viewer.open().open(f"#/slide/{world.id('s00002')}")
    assert_true(viewer, path)
