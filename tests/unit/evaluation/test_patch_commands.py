"""The commands that measure a patch and text model, on an untrained model in a run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from pathflip.checkpoints import load_run
from pathflip.cli import main
from pathflip.errors import EncoderError
from pathflip.evaluation.patch_text import patch_reader
from tests.patch_runs import make_run
from tests.unit.evaluation.planted_patches import WORDS, sample_trees, tree_archive
from tests.unit.evaluation.test_segment import cohort


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("commands")
    tree_archive(home, sample_trees(12))
    planted = {"name": "planted", "revision": "1", "dim": len(WORDS)}
    make_run(home / "trees", planted, parent_um=64.0, node_px=32)
    make_run(
        home / "tiles", {"name": "texture", "revision": "1", "dim": 131},
        parent_um=256.0, node_px=128,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    for i in range(24):
        path = home / "set" / ("train", "test")[i % 2] / "ab"[i // 2 % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.normal((200, 120, 160), 10 + 30 * (i // 2 % 2), (64, 64, 3))
        cv2.imwrite(str(path), np.clip(pixels, 0, 255).astype(np.uint8))
    (home / "classes.yaml").write_text("a: [pale tissue]\nb: [round nuclei]\n")
    return home


def run(capsys: pytest.CaptureFixture[str], *words: str | Path, code: int = 0) -> Any:
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", *map(str, words)])
    told = capsys.readouterr()
    assert ended.value.code == code, told.err
    return json.loads(told.out) if "--json" in words else told.out


def test_tiles(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = (home / "set", "--run", home / "tiles", "--classes", home / "classes.yaml")
    sheet = tmp_path / "sheet.png"
    document = run(
        capsys, "tiles", *common, "--mpp", "0.5", "--split", "test", "--out", sheet, "--json"
    )
    assert (document["n"], document["by_field"]) == (12, 12)  # 32 µm, and no 40x in them
    assert set(document["levels"]) == {"40x"}
    assert sheet.stat().st_size > 1000
    shown = run(capsys, "tiles", *common, "--mpp", "0.5", "--resamples", "10")
    assert "majority" in shown
    assert "true class" in shown
    (home / "set" / "test" / "a" / "bad.png").write_text("none")
    try:
        document = run(capsys, "tiles", *common, "--mpp", "0.5", "--json", code=3)
    finally:
        (home / "set" / "test" / "a" / "bad.png").unlink()
    assert [one["code"] for one in document["refused"]] == ["unreadable"]


def test_probe(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = run(
        capsys, "probe", home / "set", "--run", home / "tiles", "--classes", home / "classes.yaml",
        "--mpp", "0.5", "--shots", "1,4", "--seeds", "2", "--json",
    )  # fmt: skip
    assert (document["train"], document["test"], document["split"]) == (12, 12, "given")
    assert document["C"] == pytest.approx(128 * 2 / 100)
    assert document["linear"]["accuracy"] == 1  # noise of another strength: texture sees it
    assert list(document["kshot"]) == ["1", "4"]
    assert "guided" not in document
    shown = run(
        capsys, "probe", home / "set", "--run", home / "tiles", "--classes", home / "classes.yaml",
        "--mpp", "0.5", "--shots", "2", "--seeds", "2", "--resamples", "0",
    )  # fmt: skip
    assert "2-shot" in shown


def test_pairs_trees_and_wsi(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ("--archive", home / "archive", "--run", home / "trees", "--resamples", "20")
    pairs = run(capsys, "pairs", *common, "--json")
    assert pairs["levels"]["40x"]["n"] == 512
    trees = run(capsys, "trees", *common, "--json")
    assert trees["trees"] == 16
    assert trees["probe"]["v"]["nuclei"]["40x"] == 1  # a probe of an untrained projection
    assert trees["probe"]["z"]["nuclei"]["40x"] > 0.8
    assert trees["joint"]["pooled"]["accuracy"] < 0.6
    classes = "solid,nested"
    slides = run(
        capsys, "wsi", *common, "--classes", classes, "--label", "growth", "--trees", "--json"
    )
    assert slides["n"] == 4
    assert "chosen on val" in run(
        capsys, "wsi", *common, "--classes", classes, "--label", "growth", "--trees"
    )
    assert "pooled - " in run(capsys, "trees", *common, "--no-probes")
    assert "to caption" in run(capsys, "pairs", *common)


def test_segment(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cohort(tmp_path)  # of two slides one is gone
    common = ("--archive", tmp_path / "archive", "--run", home / "tiles", "--rest", "stroma")
    words = (*common, "--classes", "tumour,stroma,fat", "--steps", "2", "--resamples", "5")
    document = run(capsys, "segment", *words, "--out", tmp_path / "out", "--json", code=3)
    assert set(document["levels"]) == {"10x", "20x"}  # 192 µm: no 5x node of 256
    assert [one["slide"] for one in document["failed"]] == ["s1"]
    assert 0 < document["dice"] < 1
    assert (tmp_path / "out" / "s0.png").stat().st_size > 1000
    shown = run(capsys, "segment", *words, "--slide", "s0")
    assert "cells of 4 µm" in shown
    assert "10x alone" in shown


def test_wrong_words_are_told(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiles = ("tiles", home / "set", "--run", home / "tiles")
    neither = run(capsys, *tiles, "--json", code=2)
    assert neither["error"]["code"] == "tasks"
    names = ("--classes", "a,b")
    assert run(capsys, *tiles, *names, "--json", code=2)["error"]["code"] == "needs_mpp"
    wrong = run(capsys, "probe", *tiles[1:], *names, "--shots", "few", "--json", code=2)
    assert "few" in wrong["error"]["message"]
    out = run(capsys, *tiles, *names, "--out", "sheet.jpg", "--json", code=2)
    assert "png" in out["error"]["message"]


def test_a_reader_wants_the_encoder_of_its_model(home: Path) -> None:
    other = make_run(
        home / "other", {"name": "texture", "revision": "0", "dim": 131},
        parent_um=256.0, node_px=128,
    )  # fmt: skip
    found = load_run(other, family="mrplip")
    with pytest.raises(EncoderError) as refused:
        patch_reader(found)
    assert refused.value.code == "other_encoder"
    reader = patch_reader(found, pixels=False)
    assert reader.level_mpp == (2.0, 1.0, 0.5, 0.25)
    with pytest.raises(ValueError, match="without its encoder"):
        reader.vectors(np.zeros((1, 128, 128, 3), np.uint8), np.zeros(1, np.int64))
