"""The text tower of the demo: the installed sentence encoder, unless its run began otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.demo import QUICK, text_settings
from jobs.pretrain import resolve
from pathflip.packaged import TEXT_MODELS
from pathflip.training.loop_config import save_settings
from tests.packaged import make_package
from tests.unit.models.tiny import CAPTIONS


def begin(run: Path) -> None:
    """Write the settings of a run as its beginning does."""
    config = resolve("pathflip/mini", overrides=[*QUICK.training, *text_settings(run)])
    run.mkdir()
    (run / "config.yaml").write_text(save_settings(config))


@pytest.mark.skipif(
    TEXT_MODELS["minilm"].folder() is not None, reason="the package is installed here"
)
def test_the_tower_is_that_of_the_package_where_it_is_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    assert text_settings(before) == []
    begin(before)
    with monkeypatch.context() as installed:
        make_package(tmp_path / "site", CAPTIONS)
        installed.syspath_prepend(tmp_path / "site")
        assert text_settings(before) == []
        assert text_settings(after) == ["model.text_model=minilm", "text_rate=0"]
        begin(after)
    assert text_settings(before) == []
    assert text_settings(after) == ["model.text_model=minilm", "text_rate=0"]
