"""Archives and run folders made by an earlier version still open, and go on to the bit.

``tests/previous/v0.1.0.tar.xz`` was written by pathflip 0.1.0 (298ff4b): ``archive``, 20 slides of
made-up features with captions and questions; ``ingested``, two small slides and a broken one as the
ingest job leaves them; ``pretraining`` and ``tuning``, runs stopped after step 7 with a checkpoint
at step 5; ``pretrained`` and ``tuned``, the same runs finished, without their checkpoints; ``seen``
and ``base``, the slide model and the language model that were tuned.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pathflip.archive import Archive
from pathflip.archive.search import search
from pathflip.archive.tables import spec_of
from pathflip.archive.trees import read_trees
from pathflip.archive.verify import verify
from pathflip.checkpoints import load_run
from pathflip.synth import make_slide
from pathflip.training import run_dir
from pathflip.training.config import PretrainConfig, TuneConfig
from pathflip.training.contrastive import Contrastive
from pathflip.training.dataset import Corpus
from pathflip.training.instruct import Instruct
from pathflip.training.loop_config import read_settings
from pathflip.training.trainer import train
from tests.in_threads import in_threads

PACKED = Path(__file__).parents[1] / "previous" / "v0.1.0.tar.xz"
MADE_AT = "/tmp/golden/out"
"""Where the folders lay; run folders name their archive and models by absolute paths."""
CLOCK = ("slides_per_s", "memory_mb", "seconds")


@pytest.fixture(scope="module")
def previous(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders, unpacked and told where they lie now."""
    folder = tmp_path_factory.mktemp("previous")
    with tarfile.open(PACKED) as packed:
        packed.extractall(folder, filter="data")
    for run in ("pretrained", "pretraining", "tuned", "tuning"):
        settings = folder / run / "config.yaml"
        settings.write_text(settings.read_text().replace(MADE_AT, str(folder)))
        corpus = Corpus.load(folder / run / "data.parquet")
        about = json.loads(json.dumps(corpus.about).replace(MADE_AT, str(folder)))
        replace(corpus, about=about).save(folder / run / "data.parquet")
    return folder


def lines(run: Path) -> list[dict[str, Any]]:
    """Return the log without values that depend on the clock."""
    return [
        {key: value for key, value in line.items() if key not in CLOCK}
        for line in run_dir.read_metrics(run)
    ]


def assert_same(found: Any, made: Any) -> None:
    """Equal; numbers to 1e-4, as other processors add in another order."""
    assert type(found) is type(made)
    if isinstance(found, dict):
        assert found.keys() == made.keys()
        for key in found:
            assert_same(found[key], made[key])
    elif isinstance(found, float):
        assert found == pytest.approx(made, rel=1e-4, abs=1e-6)
    else:
        assert found == made


@pytest.mark.parametrize(
    ("kind", "settings", "begun", "finished", "last"),
    [
        (Contrastive, PretrainConfig, "pretraining", "pretrained", 16),
        (Instruct, TuneConfig, "tuning", "tuned", 12),
    ],
)
def test_a_run_begun_before_goes_on_as_it_would_have(
    previous: Path, tmp_path: Path, kind: Any, settings: Any, begun: str, finished: str, last: int
) -> None:
    run = tmp_path / begun
    shutil.copytree(previous / begun, run)
    asked = kind(read_settings(run, settings))
    objective, dataset = run_dir.prepare(asked, str(previous / "archive"), run)
    train(run, objective)
    made, found = lines(previous / finished), lines(run)
    assert [line["step"] for line in found] == [line["step"] for line in made]
    assert found[-1]["step"] == last
    for a, b in zip(found, made, strict=True):
        assert_same(a, b)
    result = run_dir.finish(objective, dataset, run)
    before = json.loads((previous / finished / "result.json").read_text())
    assert result.keys() == before.keys() | {"kind", "family"}
    for key in ("loss", "val", "best_step", "skipped", "steps"):
        assert_same(result[key], before[key])


@pytest.mark.parametrize(
    ("name", "exports"), [("pretrained", Contrastive.exports), ("tuned", Instruct.exports)]
)
def test_a_finished_run_is_finished_and_opens(
    previous: Path, name: str, exports: tuple[str, ...]
) -> None:
    assert run_dir.finished(previous / name, exports) is not None
    run = load_run(previous / name)
    assert run.encoder["name"] == "tex"
    archive = Archive(previous / "archive")
    features, mask, _ = archive.features_array("slide000")
    assert features.shape[:2] == mask.shape


def test_an_archive_of_before_is_whole_and_searchable(previous: Path) -> None:
    for name, ready in (("archive", 20), ("ingested", 2)):
        uri = str(previous / name)
        assert verify(uri).ok
        archive = Archive(uri)
        slides = archive.slides("ready")["slide_id"].to_pylist()
        assert len(slides) == ready
        embedded = archive.embeddings()
        own = next(row for row in embedded.to_pylist() if row["id"] == slides[0])
        found = search(archive, own["vector"], level="slide", k=2)
        assert found["slide_id"][0].as_py() == slides[0] or name == "archive"
    quarantined = Archive(previous / "ingested").slides("quarantined").to_pylist()
    assert [Path(row["uri"]).name for row in quarantined] == ["broken.svs"]


@pytest.mark.ray
def test_ingest_finds_nothing_to_do_in_an_archive_of_before_and_it_gets_trees(
    previous: Path, tmp_path: Path, cluster: str
) -> None:
    """The same bytes, tiling and encoder are the same work: fingerprints did not change."""
    from jobs.ingest import IngestConfig, ingest
    from jobs.trees import TreesConfig, trees
    from pathflip.config import load_config

    shutil.copytree(previous / "ingested", tmp_path / "ingested")
    slides = tmp_path / "slides"
    slides.mkdir()
    make_slide(slides / "a.svs", width=1024, height=1024, mpp=0.5, layout="aperio", seed=1)
    make_slide(slides / "b.tif", width=1536, height=1024, mpp=0.37, seed=2)
    before = Archive(tmp_path / "ingested").slides("ready").select(["slide_id", "fingerprint"])
    config = load_config(IngestConfig, overrides=["tiling.region_um=256"])
    result = ingest([str(slides)], str(tmp_path / "ingested"), config)
    assert result.as_json()["regions"] == 0
    after = Archive(tmp_path / "ingested").slides("ready").select(["slide_id", "fingerprint"])
    assert after.sort_by("slide_id").equals(before.sort_by("slide_id"))

    layout = Archive(tmp_path / "ingested").settings()["schema_version"]
    small = TreesConfig(parent_um=128, node_px=64, per_slide=2)
    with in_threads():
        made = trees(str(tmp_path / "ingested"), small)
    assert (made.slides["done"], made.exit_code) == (2, 0)
    archive = Archive(tmp_path / "ingested")
    assert layout < archive.settings()["schema_version"] == spec_of("trees").since
    assert read_trees(archive, encoder="texture").num_rows == made.trees == 4
    assert verify(archive.uri).ok
