"""An archive in a bucket, through every command that reads or writes it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from jobs.index import index
from pathflip.archive import Archive
from pathflip.archive.commit import Committer
from pathflip.archive.export import export_parquet
from pathflip.archive.maintain import maintain
from pathflip.archive.repair import repair
from pathflip.archive.verify import verify
from pathflip.errors import ArchiveError
from pathflip.synth import make_slide
from serve.search import Search
from tests.conftest import content
from tests.in_threads import in_threads
from tests.unit.archive import cohort, models


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


def test_index_search_serve_maintain_and_export(
    bucket: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from pathflip.cli import main

    run, remote, local = tmp_path / "run", f"{bucket}/a", str(tmp_path / "a")
    models.make_run(run)
    found, exported = [], []
    for uri in (local, remote):
        cohort.build(uri, 0, 1, 2)
        with Committer(uri) as committer:
            models.tell(committer, 0, 1, 2)
        with in_threads():
            done = index(uri, str(run))
        assert (done.slides, done.regions) == (3, 3 * cohort.REGIONS)
        for mode in ("vector", "hybrid"):
            capfd.readouterr()
            with pytest.raises(SystemExit) as ended:
                main(["search", "mucin", "--run", str(run), "--mode", mode, "--archive", uri,
                      "--json"])  # fmt: skip
            assert ended.value.code == 0
            found.append(json.loads(capfd.readouterr().out))
        part = Search(uri, model=done.model, fingerprint=Archive(uri).models()[done.model][
            "fingerprint"], refresh_s=0)  # fmt: skip
        assert asyncio.run(part.describe()) == {"slides": 3}
        with Committer(uri) as committer:
            cohort.commit(committer, 3)
        assert asyncio.run(part.describe()) == {"slides": 4}
        assert maintain(uri)["fragments"]["slides"] == 1
        assert verify(uri).damaged == []
        target = tmp_path / f"exported{len(exported)}"
        export_parquet(Archive(uri), target)
        exported.append(
            {t: pq.read_table(target / t).sort_by(k) for t, k in
             (("regions", "region_id"), ("features_tex", "region_id"), ("captions", "caption_id"))}
        )  # fmt: skip
    assert found[:2] == found[2:]
    assert exported[0] == exported[1]
    with pytest.raises(ArchiveError) as error:
        repair(remote)
    assert error.value.code == "remote"
