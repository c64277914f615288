import shutil
from pathlib import Path

import pytest

from tests.unit.archive import cohort
from tests.unit.archive.harm import SLIDES


@pytest.fixture(scope="session")
def four_slides(tmp_path_factory):
    """An archive of four slides; for reading."""
    uri = tmp_path_factory.mktemp("four") / "a"
    cohort.build(uri, *SLIDES)
    return uri


@pytest.fixture
def uri(four_slides, tmp_path):
    """A copy of it, to be harmed."""
    return Path(shutil.copytree(four_slides, tmp_path / "a"))
