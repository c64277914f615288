"""The index job: vectors of a trained model for every slide, once; and searching with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pathflip.archive import Archive
from pathflip.archive.commit import Committer
from pathflip.archive.model_vectors import indexed_slides
from pathflip.archive.verify import verify
from pathflip.errors import ArchiveError, CheckpointError
from tests.in_threads import in_threads
from tests.unit.archive import cohort, models

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

SLIDES = range(6)
Shell = Callable[..., tuple[int, str, str]]


@pytest.fixture
def pathflip(capfd: pytest.CaptureFixture[str]) -> Shell:
    """``pathflip(arguments…) -> (exit code, stdout, stderr)``, in this process."""
    from pathflip.cli import main

    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, err

    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "Mini Run"
    models.make_run(folder)
    return folder


@pytest.fixture(scope="module")
def indexed(run: Path, cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive whose indexing was stopped half way, to which much happened, and run again."""
    import lance

    from jobs.index import IndexConfig, index

    uri = tmp_path_factory.mktemp("indexed") / "a"
    cohort.build(uri)
    with Committer(uri) as committer:
        cohort.commit(committer, *SLIDES[:-1])
        models.tell(committer, *SLIDES[:-1])
    plan = index(str(uri), str(run), dry_run=True)
    assert (plan.slides, plan.skipped, plan.regions) == (5, 0, 5 * cohort.REGIONS)
    assert Archive(uri).models() == {}
    seen = []

    def stop(progress: Any) -> None:
        seen.append(progress)
        if progress.done == 3:
            raise KeyboardInterrupt

    with in_threads(), pytest.raises(KeyboardInterrupt):
        index(str(uri), str(run), config=IndexConfig(commit_rows=1), progress=stop)
    done = sorted(indexed_slides(Archive(uri), plan.model))
    assert len(done) == 3
    assert " left" in seen[1].line()
    anew, torn, _ = done
    with Committer(uri) as committer:
        cohort.commit(committer, SLIDES[-1])
        models.tell(committer, SLIDES[-1])
        cohort.commit(committer, int(anew[5:]), fingerprint="other")
    lance.dataset(str(uri / f"{plan.table}.lance")).delete(f"id LIKE '{torn}/2%'")
    result = index(str(uri), str(run), config=IndexConfig(actors=1), progress=seen.append)
    assert (result.slides, result.skipped, result.regions) == (5, 1, 5 * cohort.REGIONS)
    assert seen[-1].fraction == 1
    return uri


def expected(uri: Path, run: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The model asked slide by slide, without the job."""
    import torch

    from pathflip.checkpoints import load_run

    loaded, archive, found = load_run(run), Archive(uri), {}
    for slide in sorted(archive.ready_ids()):
        features, mask, ids = archive.features_array(slide)
        made = loaded.model.encode_slide(
            torch.tensor(features).float()[None], torch.tensor(mask)[None]
        )
        found[slide] = made.slide[0].numpy()
        found |= dict(zip(ids, made.regions[0].numpy(), strict=True))
    return found


def test_every_slide_and_region_has_the_models_vector(indexed: Path, run: Path) -> None:
    archive = Archive(indexed)
    (name,) = archive.models()
    truth = expected(indexed, run)
    rows = archive.embeddings(model=name).to_pylist()
    assert [row["id"] for row in rows] == sorted(truth)
    for row in rows:
        np.testing.assert_allclose(row["vector"], truth[row["id"]], atol=1e-5)
    own = {row["id"]: row for row in archive.embeddings("tex").to_pylist()}
    for row in rows:
        for key in ("kind", "slide_id", "patient_id", "x0", "y0", "size0", "mpp", "n_patches"):
            assert row[key] == own[row["id"]][key]
    assert verify(indexed).ok
    assert name.startswith("mini_run_")


def test_again_does_nothing(indexed: Path, run: Path) -> None:
    from jobs.index import index

    versions = {t: Archive(indexed).dataset(t).version for t in Archive(indexed).tables()}
    again = index(str(indexed), str(run))
    assert (again.slides, again.skipped, again.indexes) == (0, 6, [])
    after = Archive(indexed)
    assert {t: after.dataset(t).version for t in after.tables()} == versions


def test_what_does_not_fit_is_refused_before_anything_is_written(
    indexed: Path, run: Path, tmp_path: Path
) -> None:
    from jobs.index import index

    def refused(folder: Path, kind: type[Exception], code: str) -> None:
        before = set(Archive(indexed).models())
        with pytest.raises(kind) as error:
            index(str(indexed), str(folder))
        assert error.value.code == code  # type: ignore[attr-defined]
        assert error.value.hint  # type: ignore[attr-defined]
        assert set(Archive(indexed).models()) == before

    models.make_run(tmp_path / "encoder", encoder={"revision": "2"})
    refused(tmp_path / "encoder", ArchiveError, "other_encoder")
    models.make_run(tmp_path / "tiling", tiling={"mpp": 0.25})
    refused(tmp_path / "tiling", ArchiveError, "other_tiling")
    refused(tmp_path / "nothing", CheckpointError, "missing")
    damaged = shutil.copytree(run, tmp_path / "damaged")
    (damaged / "model/model.safetensors").write_bytes(b"x")
    refused(damaged, CheckpointError, "damaged")


def test_command_line(indexed: Path, run: Path, pathflip: Shell, tmp_path: Path) -> None:
    code, out, err = pathflip("index", "--archive", indexed, "--run", run, "--json")
    assert code == 0, err
    document = json.loads(out)
    assert {"table", "slides", "regions", "seconds"} <= set(document)
    assert (document["slides"], document["skipped"]) == (0, 6)

    def hits(*words: object) -> list[dict[str, Any]]:
        code, out, err = pathflip("search", *words, "--archive", indexed, "--json")
        assert code == 0, err
        rows: list[dict[str, Any]] = json.loads(out)
        keys = {"rank", "score", "slide_id", "region_id", "x0", "y0", "size0", "mpp"}
        assert all(set(row) == keys for row in rows)
        assert [row["rank"] for row in rows] == list(range(1, len(rows) + 1))
        return rows

    from pathflip.checkpoints import load_run

    truth = expected(indexed, run)
    query = load_run(run).model.encode_text(["necrosis and mucin"])[0].numpy()
    for level, keys in (
        ("slide", [key for key in truth if "/" not in key]),
        ("region", [key for key in truth if "/" in key]),
    ):
        rows = hits("necrosis and mucin", "--run", run, "--level", level, "-k", 4)
        right = sorted(keys, key=lambda key: -float(truth[key] @ query))[:4]
        assert [row["region_id"] or row["slide_id"] for row in rows] == right
    like = hits("--slide", "slide002", "--run", run, "--level", "slide", "-k", 2)
    assert like[0]["slide_id"] == "slide002"
    assert like[0]["score"] == pytest.approx(1)
    region = hits("--region", "slide002/1_2", "--run", run, "-k", 1)
    assert region[0]["region_id"] == "slide002/1_2"
    words = hits("necrosis", "--mode", "text", "--level", "slide")
    assert {row["slide_id"] for row in words} == {
        f"slide{n:03d}" for n in SLIDES if "necrosis" in models.caption(n)
    }
    both = hits("necrosis", "--mode", "hybrid", "--run", run, "--level", "slide", "-k", 6)
    assert both[0]["slide_id"] in {row["slide_id"] for row in words}
    others = hits("x", "--run", run, "--exclude-patient", "P0", "--where", "split=train", "-k", 99)
    assert {row["slide_id"] for row in others} == {"slide002", "slide004"}

    other = tmp_path / "other"
    models.make_run(other, seed=5)
    for words_, told in (
        (["x", "--run", other], "not_indexed"),
        (["x"], "config"),
        (["x", "--run", run, "--mode", "text"], "config"),
        (["x", "--slide", "slide001", "--run", run], "config"),
        (["--slide", "slide001", "--mode", "hybrid", "--run", run], "config"),
        (["x", "--run", tmp_path / "none"], "missing"),
    ):
        code, out, err = pathflip("search", *words_, "--archive", indexed, "--json")
        assert code in (1, 2)
        error = json.loads(out)["error"]
        assert error["code"] == told
        assert error["hint"]
    code, out, _ = pathflip("search", "x", "--run", other, "--archive", indexed, "--json")
    assert f"pathflip index --archive {indexed} --run {other}" in json.loads(out)["error"]["hint"]


def test_ingest_brings_captions(slides: Path, job_here: Callable[..., Any], tmp_path: Path) -> None:
    from pathflip.errors import ConfigError

    archive, sheet = tmp_path / "a", tmp_path / "reports.csv"
    sheet.write_text("slide,caption\na,\n")
    with pytest.raises(ConfigError, match="line 2: no caption"):
        job_here(slides / "a.svs", archive, f"captions={sheet}")
    assert not archive.exists()
    sheet.write_text("slide,caption\na.svs,A tumour. No necrosis.\nb,elsewhere\n")
    result = job_here(slides / "a.svs", archive, f"captions={sheet}")
    assert result.as_json()["captions"]["new"] == 1
    assert result.as_json()["captions"]["unmatched"] == ["b"]
    (row,) = Archive(archive).captions("reports").to_pylist()
    assert row["sentences"] == ["A tumour.", "No necrosis."]
    again = job_here(slides / "a.svs", archive, f"captions={sheet}")
    assert again.as_json()["captions"]["unchanged"] == 1
    assert verify(archive).ok
