"""An archive in a bucket."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pathflip.archive.verify import verify
from pathflip.synth import make_slide
from tests.conftest import content


def test_ingest_writes_what_it_writes_to_a_folder(
    bucket: str, job_here: Callable[..., Any], tmp_path: Path
) -> None:
    slides = tmp_path / "slides"
    slides.mkdir()
    for seed in (1, 2):
        make_slide(slides / f"{seed}.svs", width=1024, height=1024, mpp=0.5, layout="aperio",
                   seed=seed)  # fmt: skip
    remote: Any = f"{bucket}/a"
    assert job_here(slides, tmp_path / "a").slides["ready"] == 2
    assert job_here(slides, remote).slides["ready"] == 2
    assert content(remote) == content(tmp_path / "a")
    assert job_here(slides, remote).slides["skipped"] == 2
    assert verify(remote).damaged == []
