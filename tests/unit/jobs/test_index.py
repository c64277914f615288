"""The index job's actor, without Ray: its vectors, and what it refuses to write."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.index import IndexActor, encode_slide
from pathflip.archive import Archive
from pathflip.archive.commit import Committer
from pathflip.checkpoints import Run, load_run
from pathflip.errors import ArchiveError, CheckpointError
from tests.unit.archive import cohort, models


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("runs") / "mini"
    models.make_run(folder)
    return load_run(folder)


@pytest.fixture
def uri(tmp_path: Path) -> str:
    cohort.build(tmp_path / "a")
    with Committer(tmp_path / "a") as committer:
        cohort.commit(committer, 0)
    return str(tmp_path / "a")


def test_rows_of_a_slide_are_the_models_vectors(run: Run, uri: str) -> None:
    actor = IndexActor(str(run.path), run.fingerprint, uri, use_gpu=False)
    rows = actor([{"slide_id": "slide000"}]).to_pylist()
    features, mask, ids = Archive(uri).features_array("slide000")
    made = run.model.encode_slide(torch.tensor(features).float()[None], torch.tensor(mask)[None])
    truth = dict(zip(ids, made.regions[0].numpy(), strict=True)) | {
        "slide000": made.slide[0].numpy()
    }
    assert sorted(row["id"] for row in rows) == sorted(truth)
    for row in rows:
        np.testing.assert_allclose(row["vector"], truth[row["id"]], atol=1e-6)


def test_another_model_on_the_node_is_refused(run: Run, uri: str) -> None:
    with pytest.raises(CheckpointError) as refused:
        IndexActor(str(run.path), "0" * 64, uri, use_gpu=False)
    assert refused.value.code == "wrong_model"


def test_values_that_are_not_finite_are_never_written(
    run: Run, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run.model.encode_slide

    def spoilt(*given: torch.Tensor) -> object:
        made = whole(*given)
        made.regions[0, -1, 0] = torch.nan
        return made

    monkeypatch.setattr(run.model, "encode_slide", spoilt)
    with pytest.raises(CheckpointError) as refused:
        encode_slide(Archive(uri), run, "slide000")
    assert refused.value.code == "not_finite"
    assert "slide000" in refused.value.message


def test_regions_without_a_row_are_damage(run: Run, uri: str) -> None:
    import lance

    *_, lost = Archive(uri).features_array("slide000")[2]
    lance.dataset(f"{uri}/embeddings_tex.lance").delete(f"id = '{lost}'")
    with pytest.raises(ArchiveError) as refused:
        encode_slide(Archive(uri), run, "slide000")
    assert refused.value.code == "damaged"
    assert "repair" in refused.value.hint
