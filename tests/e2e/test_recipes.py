"""Every recipe from slides to figures, on small stand-ins of the real data in the real layouts."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np
import pytest

from pathflip import Slide
from pathflip.cli import main
from pathflip.evaluation.expected import compare, read_expected
from pathflip.synth import make_slide
from pathflip.synth.trees import make_tree_cohort
from tests import recipes
from tests.serving import SMALL, make_base
from tests.unit.datasets import small_copies

PAGE = recipes.FOLDER.parent / "howto" / "reproduce.md"
ORGANS = ("breast", "lung", "skin", "brain")
CPTAC_SLIDES = ("01BR001-a", "01BR001-b", "01BR002-a", "C3L-00083-21", "C3N-1-21")
TINY = " ".join(f"-o model.{key}={value}" for key, value in SMALL.items())
TINY_PATCHES = (
    "-o model.d=16 -o model.text_hidden=16 -o model.text_heads=2 -o model.text_ffn=16 "
    "-o model.vocab_size=128 -o model.fusion_heads=2 -o model.fusion_ffn=16 "
    "-o model.projection=16 -o model.bottleneck=4"
)
VARIABLES = {
    "TCGA": "tcga", "MANIFEST": "manifest.txt", "SLIDECHAT": "SlideChat", "CPTAC": "cptac",
    "CPTAC_SLIDES": "cptac-slides", "BCNB": "BCNB", "QUILT": "quilt", "WORK": "work",
    "ENCODER": "texture", "PRESET": "pathflip/mini", "TUNE": "instruct/mini", "LLM": "llm",
    "EMBEDDER": "llm", "TOKENS": "4", "INGEST": "-o tiling.region_um=512 -o chunk_regions=2",
    "PRETRAIN": f"{TINY} -o steps=3 -o batch_size=4",
    "TUNING": "-o epochs=1 -o batch_size=2 -o instruct.lora_r=4 -o examples_per_slide=1",
}  # fmt: skip
MR_VARIABLES = {
    "TCGA": "trees/slides", "TILES": "tiles", "NSCLC": "nsclc", "NSCLC_LABELS": "nsclc.csv",
    "WORK": "work", "UNI": "texture", "MR_PRESET": "mrplip/mini",
    "TREE_CAPTIONS": "trees/tree_captions.jsonl",
    "MR_INGEST": "-o tiling.patch_um=64 -o tiling.region_um=256 -o chunk_regions=2",
    "TREES": "-o parent_um=256 -o node_px=128 -o per_slide=3",
    "MR_PRETRAIN": f"{TINY_PATCHES} -o steps=2 -o batch_size=2",
}  # fmt: skip


def slide_data(folder: Path) -> None:
    """Write stand-ins of what the recipes of PathFLIP read."""
    names = [f"TCGA-A1-{n:04d}-01Z-00-DX1" for n in range(10)]
    texts = {name: f"Case {n}. Sections show {ORGANS[n % 4]}" for n, name in enumerate(names)}
    rows = ["id\tfilename\tmd5\tsize\tstate"]
    (folder / "tcga").mkdir()
    for number, name in enumerate(names):
        path = folder / "tcga" / f"{name}.svs"
        make_slide(path, width=1024, height=1024, mpp=0.5, layout="aperio", seed=number)
        content = path.read_bytes()
        digest = hashlib.md5(content).hexdigest()
        rows.append(f"u{number}\t{path.name}\t{digest}\t{len(content)}\treleased")
    (folder / "manifest.txt").write_text("\n".join(rows) + "\n")
    small_copies.slidechat(
        folder / "SlideChat",
        train={name: texts[name] for name in names[:6]},
        test={name: texts[name] for name in names[6:]},
    )
    asked = [f"{n},{n},ER,Is ER positive?,yes,no,,,{'AB'[n % 2]}" for n in (1, 2, 3)]
    (folder / "SlideChat" / "SlideBench-VQA-BCNB.csv").write_text(
        "\n".join(["ID,Slide,Task,Question,A,B,C,D,Answer", *asked]) + "\n"
    )
    small_copies.cptac(folder / "cptac")
    (folder / "cptac-slides").mkdir()
    for number, name in enumerate(CPTAC_SLIDES):
        path = folder / "cptac-slides" / f"{name}.tif"
        make_slide(path, width=1024, height=1024, mpp=0.5, seed=20 + number)
    small_copies.bcnb(folder / "BCNB")
    for path, name in zip(sorted((folder / "BCNB" / "WSIs").glob("*.jpg")), names, strict=False):
        with Slide(folder / "tcga" / f"{name}.svs") as slide:
            cv2.imwrite(str(path), np.ascontiguousarray(slide.read(0, 0, 1024)[..., 2::-1]))
    small_copies.quilt(folder / "quilt", {f"{n}.jpg": f"Picture {n} of skin." for n in range(6)})
    make_base(folder / "llm", [*texts.values(), "Which organ? yes no"], width=32)


def patch_data(folder: Path) -> None:
    """Write stand-ins of what the recipe of MR-PLIP reads."""
    make_tree_cohort(folder / "trees", slides=4, seed=0)
    (folder / "nsclc").mkdir()
    rows = ["slide,patient_id,split,subtype"]
    for number in range(4):
        path = folder / "nsclc" / f"C3N-{number}-21.svs"
        make_slide(path, width=512, height=512, mpp=0.5, layout="aperio", seed=40 + number)
        subtype, split = ("LUAD", "LSCC")[number % 2], ("val", "test")[number // 2]
        rows.append(f"{path.stem},P{number},{split},{subtype}")
    (folder / "nsclc.csv").write_text("\n".join(rows) + "\n")
    tiles = folder / "tiles"
    pictures = {
        "nct-crc/CRC-VAL-HE-7K/TUM/a.png": 0, "nct-crc/CRC-VAL-HE-7K/NORM/b.png": 1,
        "LC25000/lung_image_sets/lung_aca/a.jpeg": 0, "LC25000/lung_image_sets/lung_n/b.jpeg": 1,
        "digestpath/tissue-train-pos-v1/2018_1_a.jpg": 0,
        "digestpath/tissue-train-neg/2018_2_b.jpg": 1, "mhist/images/a.png": 0,
        "mhist/images/b.png": 1, "sicap/images/16B_1.jpg": 0, "sicap/images/16B_2.jpg": 1,
    }  # fmt: skip
    for name, seed in pictures.items():
        small_copies.picture(tiles / name, px=224, seed=seed)
    (tiles / "mhist" / "annotations.csv").write_text(
        "Image Name,Majority Vote Label,Number of Annotators who Selected SSA (Out of 7),Partition"
        "\na.png,SSA,6,test\nb.png,HP,1,test\n"
    )
    (tiles / "sicap" / "partition" / "Test").mkdir(parents=True)
    (tiles / "sicap" / "partition" / "Test" / "Test.csv").write_text(
        "image_name,NC,G3,G4,G5,G4C\n16B_1.jpg,1,0,0,0,0\n16B_2.jpg,0,1,0,0,0\n"
    )
    (tiles / "pcam").mkdir()
    pixels = np.random.default_rng(0).integers(90, 200, (4, 96, 96, 3), np.uint8)
    for part, values in (("x", pixels), ("y", np.arange(4).reshape(4, 1, 1, 1) % 2)):
        path = tiles / "pcam" / f"camelyonpatch_level_2_split_test_{part}.h5"
        with h5py.File(path, "w") as file:
            file[part] = values


def written(names: list[str], folder: Path, variables: dict[str, str]) -> Iterator[Path]:
    """Run recipes, and yield the documents that they write."""
    (folder / "work").mkdir()
    for name in names:
        for command in recipes.run(name, folder, variables):
            if command.out is not None:
                yield command.out


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the recipes of PathFLIP wrote into, all of them in their order."""
    folder = tmp_path_factory.mktemp("slides")
    slide_data(folder)
    order = ["train", "table1", "table2", "answers", "ablations"]
    documents = list(written([f"pathflip-{name}.sh" for name in order], folder, VARIABLES))
    assert len(documents) == len(set(documents)) == 13
    return folder / "work"


@pytest.fixture(scope="module")
def patches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the recipe of MR-PLIP wrote into."""
    folder = tmp_path_factory.mktemp("patches")
    patch_data(folder)
    assert len(list(written(["mrplip.sh"], folder, MR_VARIABLES))) == 7
    return folder / "work"


def figures(folder: Path, family: str) -> list[dict[str, Any]]:
    rows = compare(read_expected(recipes.FOLDER / "expected.yaml"), folder)
    return [row for row in rows if row["table"].startswith(family)]


def test_recipes_of_pathflip_give_every_figure(slides: Path) -> None:
    found = figures(slides, "PathFLIP")
    assert len(found) > 30
    assert all(0 <= row["measured"] <= 1 for row in found), found


def test_mean_auc_is_that_of_the_tasks(slides: Path) -> None:
    tasks = json.loads((slides / "table1.json").read_text())
    assert set(tasks) == {"BRCA_PIK3CA", "BRCA_MAP3K1", "BRCA_GATA3", "BRCA_KRAS", "LUAD_KRAS"}
    known = [task["auc"] for task in tasks.values() if task["auc"] is not None]
    (row,) = [row for row in figures(slides, "PathFLIP") if "twelve" in row["name"]]
    assert row["measured"] == pytest.approx(sum(known) / len(known))


def test_no_test_slide_was_trained_on(slides: Path) -> None:
    import pyarrow.parquet as pq

    for run in ("pathflip", "answers"):
        rows = pq.read_table(slides / run / "data.parquet")
        used = {slide[:12] for slide in rows["slide_ids"].to_pylist()}
        assert used == {f"TCGA-A1-{n:04d}" for n in range(6)}, run


def test_bcnb_and_quilt_are_measured_whole(slides: Path) -> None:
    assert json.loads((slides / "table4-bcnb.json").read_text())["n"] == 3
    pictures = json.loads((slides / "table2-quilt.json").read_text())
    assert (pictures["n"], pictures["refused"]) == (5, [])


def test_the_recipe_of_mrplip_gives_every_figure(patches: Path) -> None:
    found = figures(patches, "MR-PLIP")
    assert len(found) == 7
    assert all(0 <= row["measured"] <= 1 for row in found), found


def test_the_command_compares(slides: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = str(recipes.FOLDER / "expected.yaml")
    with pytest.raises(SystemExit, match="0"):
        main(["evaluate", "compare", expected, str(slides), "--json"])
    rows = json.loads(capsys.readouterr().out)["figures"]
    assert rows[0]["difference"] == pytest.approx(rows[0]["measured"] - 0.6634)
    assert all(row["measured"] is None for row in rows if row["table"].startswith("MR-PLIP"))


def test_the_page_has_the_expected_figures() -> None:
    text = PAGE.read_text()
    for figure in read_expected(recipes.FOLDER / "expected.yaml"):
        value = f"{figure['expected']:.4f}".rstrip("0").lstrip("0")
        assert re.search(rf"{re.escape(value)}0*\b", text), figure
