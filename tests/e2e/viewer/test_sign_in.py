"""Signing in and out, and what a token may not do."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest

from tests.e2e.viewer.browser import Viewer
from tests.e2e.viewer.world import TOKENS, Services

pytestmark = pytest.mark.timeout(300)

UNKNOWN = "401"
"""Browsers tell in the console of every answer 401: the page asks who is there."""


def sign_in(viewer: Viewer, name: str) -> None:
    """Sign in with a token, from wherever the tab is."""
    viewer.expected.append(UNKNOWN)
    page = viewer.page
    page.get_by_label("Access token").fill(TOKENS[name][1])
    page.get_by_role("button", name="Sign in").click()
    page.get_by_role("button", name=f"Sign out {name}").wait_for()


def test_a_token_becomes_a_cookie_until_one_signs_out(
    tab: Callable[..., Viewer], services: Services
) -> None:
    viewer = tab(guarded=True)
    page, slide = viewer.page, services.world.id("s00001")
    viewer.open(f"#/slide/{slide}")
    page.get_by_label("Access token").fill("guess-" + "x" * 40)
    page.get_by_role("button", name="Sign in").click()
    page.get_by_role("alert").filter(has_text="does not know this token").wait_for()
    assert page.context.cookies() == []
    sign_in(viewer, "all")
    viewer.still()  # the slide that was asked for
    (cookie,) = page.context.cookies()
    assert cookie["name"] == "pathflip_session"
    assert (cookie["httpOnly"], cookie["sameSite"], cookie["path"]) == (True, "Strict", "/")
    assert TOKENS["all"][1] not in cookie["value"]
    kept = page.evaluate("JSON.stringify([localStorage, sessionStorage, document.cookie])")
    assert "all-" not in kept
    assert "pathflip_session" not in kept
    assert "token" not in page.url
    page.reload()
    viewer.still()
    stolen = cookie["value"]
    page.get_by_role("button", name="Sign out all").click()
    page.get_by_label("Access token").wait_for()
    assert page.context.cookies() == []
    # Nothing of the slide is to be had now, and the address is kept for the next sign-in.
    answer = page.request.get(f"{services.guarded}/v1/slides/{slide}/tiles")
    assert answer.status == 401
    assert stolen
    assert slide in page.url
    lines = [
        json.loads(line)
        for file in sorted(services.audit.rglob("*"))
        if file.is_file()
        for line in file.read_text(encoding="utf-8").splitlines()
        if line.startswith("{")
    ]
    views = [line for line in lines if slide in json.dumps(line)]
    assert any("all" in json.dumps(line) for line in views)
    assert TOKENS["all"][1] not in json.dumps(lines)


def test_scopes_hide_what_a_token_may_not_do(
    tab: Callable[..., Viewer], services: Services
) -> None:
    viewer = tab(guarded=True)
    viewer.open(f"#/slide/{services.world.id('s00001')}?panel=search&q=necrosis")
    sign_in(viewer, "viewer")
    viewer.still()
    page = viewer.page
    tabs = page.get_by_role("tablist", name="Panels").get_by_role("tab")
    assert tabs.all_inner_texts() == ["Slide", "Draw"]
    tabs.nth(1).click()
    page.get_by_text("Drawing needs a token with the scope").wait_for()
    assert page.get_by_role("button", name="Rectangle").count() == 0
    # The service refuses as well, whatever the page shows.
    status = page.evaluate(
        """() => fetch("/v1/search", {method: "POST", body: '{"text": "necrosis"}',
            headers: {"Content-Type": "application/json"}}).then((answer) => answer.status)"""
    )
    assert status == 403
    viewer.expected.append("403")


def test_a_finder_searches_and_asks_nothing(tab: Callable[..., Viewer], services: Services) -> None:
    viewer = tab(guarded=True)
    viewer.open(f"#/slide/{services.world.id('s00001')}?panel=search")
    sign_in(viewer, "finder")
    page = viewer.page
    viewer.still()
    tabs = page.get_by_role("tablist", name="Panels").get_by_role("tab")
    assert tabs.all_inner_texts() == ["Slide", "Search", "Where", "Draw"]
    page.get_by_role("searchbox", name="Search in words").fill("necrosis")
    page.keyboard.press("Enter")
    page.get_by_role("list", name=re.compile("^Results")).wait_for()


def test_another_site_cannot_use_the_cookie(tab: Callable[..., Viewer], services: Services) -> None:
    viewer = tab(guarded=True)
    viewer.open()
    sign_in(viewer, "all")
    (cookie,) = viewer.page.context.cookies()
    slide = services.world.id("s00001")
    path = f"{services.guarded}/v1/slides/{slide}/annotations/import"
    body = '{"type": "FeatureCollection", "features": []}'
    header = {"Cookie": f"pathflip_session={cookie['value']}", "Content-Type": "application/json"}
    import httpx

    own = header | {"Origin": services.guarded, "Sec-Fetch-Site": "same-origin"}
    alien = header | {"Origin": "http://evil.example", "Sec-Fetch-Site": "cross-site"}
    simple = own | {"Content-Type": "text/plain"}
    assert httpx.post(path, content=body, headers=own).status_code == 200
    assert httpx.post(path, content=body, headers=alien).status_code == 403
    assert httpx.post(path, content=body, headers=simple).status_code in (403, 415)


def test_patients_are_sought_where_the_service_shows_them_and_in_no_address(
    tab: Callable[..., Viewer], services: Services
) -> None:
    world = services.world
    patient = world.rows["s00001"]["patient_id"]
    own = {row["slide_id"] for row in world.rows.values() if row["patient_id"] == patient}
    viewer = tab(guarded=True)
    viewer.open(f"#/slide/{world.id('s00001')}?panel=search&k=30")
    sign_in(viewer, "finder")
    page = viewer.page
    viewer.still()
    page.get_by_role("button", name="Options and filters").click()
    page.get_by_role("textbox", name="Only of patient").fill(patient)
    page.get_by_role("searchbox", name="Search in words").fill("necrosis")
    page.keyboard.press("Enter")
    found = page.get_by_role("list", name=re.compile("^Results")).get_by_role("listitem")
    found.first.wait_for()
    texts = found.all_inner_texts()
    assert all(any(slide in text for slide in own) for text in texts)
    page.wait_for_url(re.compile("q=necrosis"))
    assert patient not in page.url
    # The other service does not show them: there is no such field, and asking is refused.
    viewer = tab().open(f"#/slide/{world.id('s00001')}?panel=search")
    viewer.still()
    page = viewer.page
    page.get_by_role("button", name="Options and filters").click()
    page.get_by_role("textbox", name="Only of split").wait_for()
    assert page.get_by_role("textbox", name="Only of patient").count() == 0
    condition = {"field": "patient_id", "op": "=", "value": patient}
    asked = {"text": "necrosis", "filters": [condition]}
    assert page.request.post(f"{services.url}/v1/search", data=asked).json()["code"] == "patients"


def test_an_answer_that_is_cut_says_so_and_the_next_user_finds_nothing_of_it(
    tab: Callable[..., Viewer], services: Services
) -> None:
    viewer = tab(guarded=True)
    viewer.open(f"#/slide/{services.world.id('s00001')}?panel=ask")
    sign_in(viewer, "all")
    page = viewer.page
    viewer.still()
    page.get_by_role("textbox", name="Question").fill("What is seen on this slide?")
    page.get_by_role("button", name="Ask", exact=True).click()
    page.get_by_text("The answer was cut off at the longest the service gives.").wait_for()
    page.get_by_role("button", name="Sign out all").click()
    sign_in(viewer, "all")
    viewer.still()
    page.get_by_role("textbox", name="Question").wait_for()
    assert "What is seen on this slide?" not in page.content()
