"""Retrieval between pictures and captions: vectors and recalls are those of slides."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from pathflip.checkpoints import Run, load_run
from pathflip.cli import main
from pathflip.encoders.texture import TextureEncoder
from pathflip.errors import ArchiveError, ConfigError
from pathflip.evaluation import pictures
from pathflip.evaluation.pictures import evaluate_pictures, read_pairs
from pathflip.evaluation.retrieval import retrieval
from pathflip.geometry import Tiling
from pathflip.image_query import ImageQuery, image_regions
from pathflip.search import embed_regions, embed_texts
from tests.unit.serve.service_fixture import PX, SLOTS, make_slide_run
from tests.unit.serve.service_fixture import pixels as tissue

CAPTIONS = ["Colon.", "There is necrosis.", "Mucin, and more mucin.", "Colon.", "Sections."]
ENCODER = TextureEncoder()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, five pictures of its scale and a table of them."""
    folder = tmp_path_factory.mktemp("pictures")
    make_slide_run(folder / "run")
    lines = ["image,caption,split,patient,mpp"]
    for at, caption in enumerate(CAPTIONS):
        cv2.imwrite(str(folder / f"{at}.png"), tissue(at, 0)[..., ::-1])
        lines.append(f'{at}.png,"{caption}",{"dev" if at else "train"},P{at // 2},0.5')
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    return load_run(folder / "run")


def test_recalls_are_those_of_vectors_made_one_by_one(
    folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "BATCH", 2)
    pairs = read_pairs(folder / "pairs.csv")
    found = evaluate_pictures(pairs, run, ENCODER, shuffles=0, resamples=50)
    tiling = Tiling(**run.tiling)
    vectors = [
        embed_regions(
            run,
            image_regions(ImageQuery(path=pair.path), encoder=ENCODER, tiling=tiling, mpp=0.5),
            slots=SLOTS,
        )
        for pair in pairs
    ]
    expected = retrieval(
        np.stack(vectors), embed_texts(run, CAPTIONS), CAPTIONS,
        patients=["P0", "P0", "P1", "P1", "P2"], shuffles=0, resamples=50,
    )  # fmt: skip
    assert found["one_patch"] == 0
    assert found["refused"] == []
    for way in ("itr", "tir", "chance"):
        assert found[way] == pytest.approx(expected[way])
    assert found["ci"] == expected["ci"]


def test_a_picture_of_unknown_scale_is_its_middle_square(folder: Path, run: Run) -> None:
    wide = np.zeros((PX * 2, PX * 4, 3), np.uint8)
    wide[:, PX : 3 * PX] = tissue(1, 0)
    cv2.imwrite(str(folder / "wide.png"), wide[..., ::-1])
    (pair,) = [replace(one, mpp=None) for one in read_pairs(folder / "pairs.csv")[1:2]]
    cut = []
    for path in (folder / "wide.png", pair.path):
        (group,) = pictures._groups([replace(pair, path=path)], [])
        ((regions,), single) = pictures._features(group, run, ENCODER, mpp=None)
        assert single == 1
        assert [patches.shape for patches in regions] == [(1, ENCODER.dim)]
        cut.append(regions[0])
    np.testing.assert_array_equal(*cut)
    small = cv2.resize(tissue(1, 0), (PX, PX), interpolation=cv2.INTER_AREA)
    np.testing.assert_array_equal(cut[0], ENCODER(np.asarray(small)[None]))


def test_splits_go_by_all_their_names(folder: Path) -> None:
    assert len(read_pairs(folder / "pairs.csv", split="validation")) == 4
    with pytest.raises(ConfigError, match="no picture of split test"):
        read_pairs(folder / "pairs.csv", split="test")


@pytest.mark.parametrize(
    ("line", "words"),
    [("x.png,,train,,", "no caption"), ("x.png,a,,,0", "mpp is '0'"), (",a,,,", "no image")],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "p.csv").write_text(f"image,caption,split,patient,mpp\n{line}\n")
    with pytest.raises(ConfigError, match=f"line 2: {words}"):
        read_pairs(tmp_path / "p.csv")


def test_another_encoder_is_refused(folder: Path, run: Run) -> None:
    other = replace(run, encoder={**run.encoder, "revision": "0"})
    with pytest.raises(ArchiveError, match="revision 0; this encoder is texture"):
        evaluate_pictures(read_pairs(folder / "pairs.csv"), other, ENCODER)


def test_the_command_leaves_out_what_cannot_be_read(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = folder / "more.csv"
    table.write_text((folder / "pairs.csv").read_text() + "gone.png,Gone.,dev,,\n")
    words = ["evaluate", "pictures", str(table), "--run", str(folder / "run"), "--split", "val"]
    with pytest.raises(SystemExit, match="3"):
        main([*words, "--resamples", "0", "--json"])
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert document["n"] == 4
    assert [one["code"] for one in document["refused"]] == ["not_a_file"]
    assert set(document["itr"]) == {"r@1", "r@5", "r@10"}
    with pytest.raises(SystemExit, match="3"):
        main([*words, "--resamples", "0"])
    assert "batch64: 4 pictures" in capsys.readouterr().out
