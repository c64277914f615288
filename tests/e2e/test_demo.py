"""The demo as a newcomer runs it: made slides, a second run, and slides of one's own."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from jobs.demo import PLANTED, demo, main
from pathflip import Archive

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]  # its setup is the whole demo
COHORT = 24
SHORT: dict[str, Any] = {
    "training": ("epochs=1", "batch_size=8", "max_workers=1"),
    "language": ("epochs=1", "hidden=64", "layers=1", "heads=2", "kv_heads=2"),
    "tuning": ("epochs=1", "batch_size=8"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, cluster: str) -> Path:
    out = tmp_path_factory.mktemp("demo")
    assert demo(out, cohort=COHORT, **SHORT) == 0  # though two files are quarantined
    return out


def test_the_archive_holds_what_was_made(made: Path) -> None:
    archive = Archive(made / "archive")
    rows = {Path(row["uri"]).name: row for row in archive.slides().to_pylist()}
    assert {name: row["reason"] for name, row in rows.items() if row["reason"]} == {
        "truncated.svs": "unreadable",
        "without-mpp.tif": "needs_mpp",
    }
    assert rows["glass.svs"]["status"] == "empty"
    ready = [row for row in rows.values() if row["status"] == "ready"]
    assert len(ready) == COHORT
    assert {row["split"] for row in ready} == {"train", "val", "test"}
    captions = archive.captions().to_pylist()
    assert sum(bool(row["text"]) for row in captions) == COHORT
    assert sum(bool(row["qa"]) for row in captions) == COHORT
    (model,) = archive.models().values()
    vectors = archive.dataset(model["embeddings_table"]).to_table(columns=["kind"])
    kinds = vectors["kind"].to_pylist()
    assert kinds.count("slide") == COHORT
    assert kinds.count("region") == archive.regions().num_rows


def test_the_reports_show_it(made: Path) -> None:
    slides = (made / "slides.html").read_text(encoding="utf-8")
    assert '<article class="card">' in slides
    for name in PLANTED:
        assert name in slides
    page = (made / "report.html").read_text(encoding="utf-8")
    for shown in ("chance", "pointing", "R@5", "necrosis", "<svg", "data:image/"):
        assert shown.lower() in page.lower(), shown


def test_the_answers_are_shown_beside_the_truth(made: Path) -> None:
    page = (made / "answers.html").read_text(encoding="utf-8")
    for shown in ("majority", "another slide", "BLEU-1", "How many foci of necrosis", "<meter"):
        assert shown in page, shown
    result = json.loads((made / "tuned" / "result.json").read_bytes())
    assert result["steps"] > 0
    assert (made / "tuned" / "llm" / "model.safetensors").exists()


def test_settings_reach_the_workers(made: Path) -> None:
    workers = {
        name: json.loads((made / name / "attempt.json").read_bytes())["workers"]
        for name in ("run", "tuned")
    }
    assert workers == {"run": 1, "tuned": min(2, os.cpu_count() or 1)}


def test_a_second_run_skips_everything(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in (made / "slides").iterdir()}
    result = (made / "run" / "result.json").read_bytes()
    tuned = (made / "tuned" / "result.json").read_bytes()
    assert demo(made, cohort=COHORT, **SHORT) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (made / "slides").iterdir()}
    assert (made / "run" / "result.json").read_bytes() == result
    assert (made / "tuned" / "result.json").read_bytes() == tuned
    assert json.loads(result)["steps"] > 0
    out = capsys.readouterr().out
    assert f"{COHORT + 3} skipped" in out
    assert "nothing was left to read" in out
    assert "spoilt on purpose" in out
    assert re.search(r"^Open .*report\.html", out, re.MULTILINE)
    assert re.search(r'search "necrosis" --archive .* --run ', out)
    assert re.search(r"serve --archive .* --run .* --llm .*tuned", out)


def test_own_slides_are_only_read_and_never_mixed_in(made: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    for name in ("s00000", "truncated"):
        (source,) = (made / "slides").glob(f"{name}.*")
        shutil.copy2(source, own / source.name)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in own.iterdir()}
    own.chmod(0o500)
    assert main(["--slides", str(own), "--out", str(made)]) == 3  # one of them is quarantined
    own.chmod(0o700)
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in own.iterdir()}
    page = (made / "report.html").read_text(encoding="utf-8")
    assert page.count('<li class="hit">') >= 1
    assert 'alt="The query image"' in page
    theirs = Archive(made / "archive-2").slides(columns=["uri"])["uri"].to_pylist()
    assert sorted(theirs) == sorted(str(path) for path in own.iterdir())
    assert len(Archive(made / "archive").slides(columns=["uri"])) == COHORT + 3
