"""One world and two services for the session; one browser for this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.viewer import browser as browsers
from tests.e2e.viewer.world import Services, make_world, serving

if TYPE_CHECKING:
    from playwright.sync_api import Browser

HERE = "tests/e2e/viewer/"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests of this folder where there is no browser."""
    reason = browsers.why_not()
    for item in items:
        if reason and item.nodeid.startswith(HERE):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def services(
    job_here: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Services]:
    """Both services over one world."""
    with serving(make_world(tmp_path_factory.mktemp("viewer"), job_here)) as services:
        yield services


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """The browser, while tests of this folder run: its event loop would be in the way of others."""
    with browsers.launched() as browser:
        yield browser


@pytest.fixture
def tab(browser: Browser, services: Services) -> Iterator[Callable[..., browsers.Viewer]]:
    """``tab(guarded=…, viewport=…)``: a tab of its own on one of the services."""
    from contextlib import ExitStack

    with ExitStack() as tabs:

        def open_tab(*, guarded: bool = False, **options: Any) -> browsers.Viewer:
            url = services.guarded if guarded else services.url
            return tabs.enter_context(browsers.tab(browser, url, **options))

        yield open_tab


@pytest.fixture
def viewer(tab: Callable[..., browsers.Viewer]) -> browsers.Viewer:
    """A tab on the service without tokens."""
    return tab()
