"""Heat of a sentence lies over the planted lesion that it is about."""

from __future__ import annotations

import json
import re

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from pathflip.evaluation.grounding import inside
from tests.e2e.viewer.browser import Viewer
from tests.e2e.viewer.world import Services, World

PATCH_UM = 32.0
LESION, SENTENCE = "mucin", "Mucin pools are present."
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def world(services: Services) -> World:
    return services.world


def found_slide(world: World) -> str:
    """Return a slide on which the run, asked by the library, is hottest in the lesion."""
    for stem, row in sorted(world.rows.items()):
        if row["status"] != "ready" or LESION not in {one.name for one in world.lesions(stem)}:
            continue
        found = world.grounded(stem, SENTENCE)
        hottest = found.rects[int(found.heat.argmax())]
        polygons = [one.polygons for one in world.lesions(stem) if one.name == LESION]
        if inside(hottest[:2] + hottest[2:] / 2, [one for own in polygons for one in own]).all():
            return stem
    raise AssertionError(f"the run finds {LESION} nowhere")


def lesion_on_screen(
    world: World, stem: str, view: tuple[float, ...], shape: tuple[int, ...]
) -> NDArray[np.bool_]:
    """Return the mask of the screen's pixels that lie in a lesion, or a patch beside it."""
    x0, y0, w0, _ = view
    scale = shape[1] / w0
    mask = np.zeros(shape[:2], np.uint8)
    for lesion in world.lesions(stem):
        if lesion.name == LESION:
            for outer, _ in lesion.polygons:
                ring = np.rint((outer - (x0, y0)) * scale).astype(np.int32)
                cv2.fillPoly(mask, [ring], 1)
    patch = round(PATCH_UM / world.rows[stem]["mpp"] * scale)
    return cv2.dilate(mask, np.ones((2 * patch + 1, 2 * patch + 1), np.uint8)) > 0


def test_heat_lies_over_the_planted_lesion(viewer: Viewer, world: World) -> None:
    stem = found_slide(world)
    page = viewer.open(f"#/slide/{world.id(stem)}?panel=where").page
    viewer.still()
    page.get_by_role("textbox", name="Show where this is true").fill(SENTENCE)
    page.get_by_role("button", name="Show", exact=True).click()
    layer = page.get_by_role("list", name="Layers").get_by_role("listitem").first
    layer.get_by_text("Fit").wait_for()
    layer.get_by_text("Colours and export").click()
    layer.get_by_role("checkbox", name="outline boxes").uncheck()
    layer.get_by_role("slider", name="Opacity").fill("1")
    layer.get_by_role("slider", name="Hide heat below").fill("0.8")
    view, hot = viewer.view(), viewer.picture()
    layer.get_by_role("checkbox", name=SENTENCE).uncheck()
    plain = viewer.picture()
    painted = np.abs(hot.astype(int) - plain).max(axis=2) > 24
    lesion = lesion_on_screen(world, stem, view, hot.shape)
    assert painted.any()
    assert painted.mean() < 0.2
    assert lesion[painted].mean() > 0.5  # though it covers few per cent of the screen
    assert lesion.mean() < 0.1
    # A box flies to its place, and the box of most heat is in the lesion.
    layer.get_by_role("checkbox", name=SENTENCE).check()
    box = layer.get_by_role("list", name=re.compile("^Boxes of")).get_by_role("button").first
    near = viewer.moved(box.click)
    centre = lesion_on_screen(world, stem, near, hot.shape)
    assert centre[hot.shape[0] // 2, hot.shape[1] // 2]
    assert "layers=" in page.url
    with page.expect_download() as saved:
        layer.get_by_role("button", name=re.compile("^Save boxes")).click()
    document = json.loads(saved.value.path().read_text(encoding="utf-8"))
    assert {one["properties"]["objectType"] for one in document["features"]} == {"annotation"}
