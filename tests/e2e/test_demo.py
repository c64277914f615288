"""The demo as a newcomer runs it: made slides, a second run, and slides of one's own."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from jobs.demo import PLANTED, demo, main
from pathflip import Archive
from pathflip.archive.search import search

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, cluster: str) -> Path:
    out = tmp_path_factory.mktemp("demo")
    assert demo(out, cohort=2, size_um=1024.0) == 0  # though two files are quarantined
    return out


def test_the_archive_holds_what_was_made(made: Path) -> None:
    archive = Archive(made / "archive")
    rows = {Path(row["uri"]).name: row for row in archive.slides().to_pylist()}
    assert {name: row["reason"] for name, row in rows.items() if row["reason"]} == {
        "truncated.svs": "unreadable",
        "without-mpp.tif": "needs_mpp",
    }
    assert rows["glass.svs"]["status"] == "empty"
    ready = [name for name, row in rows.items() if row["status"] == "ready"]
    assert len(rows) == 6
    assert len(ready) == 3
    assert {row["patient_id"] for name, row in rows.items() if name.startswith("s0")} != {None}
    vectors = archive.embeddings()
    regions = vectors.filter([kind == "region" for kind in vectors["kind"].to_pylist()])
    first = search(archive, regions["vector"][0].as_py(), k=1)
    assert first["region_id"][0].as_py() == regions["id"][0].as_py()


def test_the_report_shows_it(made: Path) -> None:
    page = (made / "report.html").read_text(encoding="utf-8")
    assert page.count('<article class="card">') == 3
    for name in PLANTED:
        assert name in page
    assert page.count('<li class="hit">') >= 2
    assert 'alt="The query image"' in page
    assert "no picture" not in page
    # The query is part of a region, read again from its slide: nothing is more like it.
    query = re.search(r"µm of (\S+)\.\w+,", page)
    best = re.search(r'score (\d\.\d+)</span></p>\s*<h3 title="[^"]*">([^<]+)</h3>', page)
    assert query is not None
    assert best is not None
    assert best[2].rpartition("-")[0] == query[1]
    assert float(best[1]) > 0.9


def test_a_second_run_skips_everything(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in (made / "slides").iterdir()}
    assert demo(made, cohort=2, size_um=1024.0) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (made / "slides").iterdir()}
    out = capsys.readouterr().out
    assert "6 skipped" in out
    assert "nothing was left to read" in out
    assert "spoilt on purpose" in out
    assert re.search(r"^Open .*report\.html, then try: .*search --archive", out, re.MULTILINE)


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
    theirs = Archive(made / "archive-2").slides(columns=["uri"])["uri"].to_pylist()
    assert sorted(theirs) == sorted(str(path) for path in own.iterdir())
    assert len(Archive(made / "archive").slides(columns=["uri"])) == 6
