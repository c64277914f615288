"""One planted archive for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.unit.evaluation import planted


@pytest.fixture(scope="session")
def planted_slides() -> list[planted.Slide]:
    return planted.sample()


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory, planted_slides: list[planted.Slide]) -> Any:
    return planted.build(tmp_path_factory.mktemp("planted"), planted_slides)


@pytest.fixture(scope="session")
def run() -> Any:
    return planted.planted_run()


@pytest.fixture(scope="session")
def other_run() -> Callable[..., Any]:
    return planted.planted_run
