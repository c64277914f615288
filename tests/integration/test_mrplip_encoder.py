"""An archive of a patch model's vectors: ingest, search by its words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs.trees import TreesConfig, trees
from pathflip import Archive
from pathflip.checkpoints import load_run
from pathflip.cli import main
from pathflip.errors import ConfigError
from pathflip.synth import make_slide
from tests.patch_runs import TEXTURE, make_run

TEXT = "round nuclei of tissue"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, job_here: Callable[..., Any]) -> Path:
    """A slide by texture and by a patch model over it, in one pass."""
    home = tmp_path_factory.mktemp("patch-model")
    make_run(home / "run", TEXTURE, parent_um=1024.0, node_px=512)
    (home / "slides").mkdir()
    make_slide(home / "slides" / "s.tif", width=1024, height=1024, mpp=0.5, seed=1)
    specs = f"encoder=texture,mrplip:{home / 'run'}"
    result = job_here(home / "slides", home / "archive", specs, "tiling.region_um=256")
    assert result.slides["ready"] == 1
    return home


def held(home: Path) -> tuple[Archive, str]:
    archive = Archive(home / "archive")
    (name,) = set(archive.encoders()) - {"texture"}
    return archive, name


def test_features_are_the_models_of_the_same_patches(home: Path) -> None:
    archive, name = held(home)
    run = load_run(home / "run", family="mrplip")
    entry = archive.encoders()[name]
    assert name == f"mrplip_{run.name}_40x"
    assert entry["features_table"] == f"features_{name}"
    assert entry["revision"] == f"{run.fingerprint[:12]}-1"
    (slide,) = archive.ready_ids()
    seen, mask, ids = archive.features_array(slide, "texture")
    vectors, same_mask, same_ids = archive.features_array(slide, name)
    assert ids == same_ids
    np.testing.assert_array_equal(mask, same_mask)
    given = torch.from_numpy(seen[mask].astype(np.float32))
    expected = run.model.encode_patches(given, torch.full((len(given),), 3)).numpy()
    assert (vectors[mask].astype(np.float32) * expected).sum(axis=1).min() > 0.9999


def test_words_find_regions_by_the_mean_of_their_patches(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive, name = held(home)
    run = load_run(home / "run", family="mrplip")
    (slide,) = archive.ready_ids()
    vectors, mask, ids = archive.features_array(slide, name)
    means = np.stack(
        [
            one[there].astype(np.float64).mean(axis=0)
            for one, there in zip(vectors, mask, strict=True)
        ]
    )
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    scores = means @ run.model.encode_text([TEXT])[0].numpy()
    expected = {ids[i]: scores[i] for i in np.argsort(-scores)[:3]}
    spec = f"mrplip:{home / 'run'}"
    found = search(capsys, home, TEXT, "--encoder", spec, "-k", "3")
    assert [row["region_id"] for row in found] == list(expected)
    for row in found:
        assert row["score"] == pytest.approx(expected[row["region_id"]], abs=1e-3)
    (whole,) = search(capsys, home, TEXT, "--encoder", spec, "--level", "slide")
    assert whole["slide_id"] == slide
    # Single patches: the best by a plain product.
    (best,) = search(capsys, home, TEXT, "--encoder", spec, "--level", "patch", "-k", "1")
    flat = vectors[mask].astype(np.float64)
    flat = flat @ run.model.encode_text([TEXT])[0].double().numpy() / np.linalg.norm(flat, axis=1)
    assert best["score"] == pytest.approx(flat.max(), abs=1e-6)
    assert best["region_id"] == ids[np.argwhere(mask)[flat.argmax()][0]]
    assert best["size0"] == 256
    # A picture, by the same encoder: the slide itself is its nearest.
    picture = str(home / "slides" / "s.tif")
    (alike,) = search(capsys, home, "--image", picture, "--encoder", spec, "--level", "slide")
    assert alike["score"] > 0.999


def test_what_does_not_belong_together_is_refused(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, name = held(home)
    other = make_run(tmp_path / "other", TEXTURE, parent_um=1024.0, node_px=512, d=64)
    for words, code, told in [
        (("--encoder", f"mrplip:{other}"), 2, "no encoder 'mrplip_other"),
        (("--encoder", f"mrplip:{home / 'run'}@20x"), 2, "_20x'"),
        (("--encoder", name), 2, "needs a trained model"),
        (("--run", str(home / "run"), "--level", "patch"), 2, "leave out --run"),
        (("--run", str(home / "run")), 1, "--encoder mrplip:RUN"),
    ]:
        assert told in search(capsys, home, TEXT, *words, code=code)
    with pytest.raises(ConfigError, match="one level"):
        trees(str(home / "archive"), TreesConfig(encoder=f"mrplip:{home / 'run'}"))


def search(capsys: pytest.CaptureFixture[str], home: Path, *words: str, code: int = 0) -> Any:
    with pytest.raises(SystemExit) as ended:
        main(["search", *words, "--archive", str(home / "archive"), "--json"])
    told = capsys.readouterr()
    assert ended.value.code == code, told.err
    return json.loads(told.out) if code == 0 else told.err
