"""Cards of data sets, command for command, on small copies: what a card promises is measured."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pathflip.datasets.cards import read_card
from pathflip.synth import make_slide
from tests import recipes
from tests.e2e.test_recipes import TINY, VARIABLES
from tests.serving import make_base
from tests.unit.datasets import small_copies

ORGANS = ("breast", "lung", "skin", "brain")
SETTINGS = {
    "ingest": VARIABLES["INGEST"],
    "tune": f"--preset instruct/mini {VARIABLES['TUNING']}",
    "caption": "--max-new-tokens 4",
}
"""{command: more words}, which make it small."""


def slide(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    layout = {"layout": "aperio"} if path.suffix == ".svs" else {}
    make_slide(path, width=1024, height=1024, mpp=0.5, seed=seed, **layout)
    return path


def pathtext(folder: Path) -> None:
    """Two cases of two cancers with a slide each, and their manifest."""
    rows = ["id\tfilename\tmd5\tsize\tstate"]
    for number, (cancer, text) in enumerate((("BRCA", "Ductal carcinoma."), ("LUAD", "Lung."))):
        case = f"TCGA-A7-A6V{number}"
        path = folder / "DIR" / f"TCGA_{cancer}" / case / "annotation"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(text))
        content = slide(folder / "slides" / f"{case}-01Z-00-DX1.svs", number).read_bytes()
        digest = hashlib.md5(content).hexdigest()
        rows.append(f"u{number}\t{case}-01Z-00-DX1.svs\t{digest}\t{len(content)}\treleased")
    (folder / "gdc_manifest.txt").write_text("\n".join(rows) + "\n")


def wsi_bench(folder: Path) -> None:
    """Reports and questions about two slides."""
    (folder / "DIR").mkdir()
    said: dict[str, list[dict[str, Any]]] = {"1_Report_test": [], "Morphology_choice_test": []}
    asked = []
    for number in range(2):
        name = f"TCGA-A7-A6V{number}-01Z-00-DX1"
        slide(folder / "slides" / f"{name}.svs", number)
        options = "Which type? A) Ductal. B) Lobular. C) Mucinous. D) Papillary."
        for file, question, answer in (
            ("1_Report_test", "Write a report.", f"Report {number} of the breast."),
            ("Morphology_choice_test", options, "AB"[number]),
        ):
            turns = [{"from": "human", "value": f"<image>\n{question}"}]
            turns.append({"from": "gpt", "value": answer})
            image = f"TCGA-BRCA/{name}.pt"
            said[file].append({"id": f"{number}", "image": image, "conversations": turns})
        asked.append(
            {"question_id": number, "image": image, "question": "Necrosis?", "T-answer": "None.",
             "metadata": {}}
        )  # fmt: skip
    for file, entries in said.items():
        (folder / "DIR" / f"{file}.json").write_text(json.dumps(entries))
    small_copies.lines(folder / "DIR" / "WSI-Bench-test.jsonl", asked)


def histai(folder: Path) -> None:
    small_copies.histai(folder / "DIR")
    for number, path in enumerate(sorted((folder / "DIR").glob("HISTAI-*/case_*/*.tiff"))):
        slide(path, number)
    slide(folder / "DIR" / "HISTAI-skin-b1" / "case_0001" / "slide_H&E_0.tiff", 7)


def patho_bench(folder: Path) -> None:
    rows = [("1", "s1", 0), ("2", "s2", 1), ("3", "s3", 0), ("4", "s4", 1)]
    words = {0: "benign", 1: "malignant"}
    small_copies.patho_task(folder / "DIR" / "bracs" / "coarse", rows, words)
    for number, (_, name, _) in enumerate(rows):
        slide(folder / "slides" / f"{name}.tif", number)


def multipathqa(folder: Path) -> None:
    small_copies.multipathqa(folder / "DIR")
    for number, name in enumerate(("GTEX-1.tiff", "TCGA-A1.svs", "TCGA-A2.svs", "dbf7.tiff")):
        slide(folder / "slides" / name, number)


def refpath(folder: Path) -> None:
    small_copies.refpath(folder / "DIR")
    for number, path in enumerate(sorted((folder / "DIR" / "images").glob("*.jpg"))):
        small_copies.picture(path, px=768, seed=number)
    file = folder / "DIR" / "testB.jsonl"
    file.write_text(file.read_text().replace("[0, 0, 128, 128]", "[0, 0, 500, 300]"))


def bcnb(folder: Path) -> None:
    small_copies.bcnb(folder / "DIR")
    for number, path in enumerate(sorted((folder / "DIR" / "WSIs").glob("*.jpg"))):
        small_copies.picture(path, px=768, seed=number)
    for path in (folder / "DIR" / "WSIs").glob("*.json"):
        path.write_text(path.read_text().replace("[90, 20], [90, 100]", "[600, 20], [600, 700]"))
    asked = [f"{n},{n},ER,Is ER positive?,yes,no,,,{'AB'[n % 2]}" for n in (1, 2, 3)]
    (folder / "SlideBench-VQA-BCNB.csv").write_text(
        "\n".join(["ID,Slide,Task,Question,A,B,C,D,Answer", *asked]) + "\n"
    )


COPIES: dict[str, Callable[[Path], None]] = {
    "bcnb": bcnb, "histai-instruct": histai, "multipathqa": multipathqa, "patho-bench": patho_bench,
    "pathtext": pathtext, "refpath": refpath, "wsi-bench": wsi_bench,
}  # fmt: skip
"""The sets that no recipe takes whole; see tests/e2e/test_recipes.py for the others."""


def words(command: str) -> list[str]:
    """Return the words of a card's command with a small encoder, language model and settings."""
    found = [
        {"conch": "texture", "Qwen/Qwen3-0.6B": "llm"}.get(word, word)
        for word in shlex.split(command)[1:]
    ]
    for name in found[:2]:
        found += shlex.split(SETTINGS.get(name, ""))
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``runs/pathflip`` and ``runs/answers`` as the cards name them, and ``llm``."""
    folder = tmp_path_factory.mktemp("models")
    texts = [f"Case {number}. Sections show {ORGANS[number % 4]}." for number in range(4)]
    lines = ["slide,caption"]
    for number, text in enumerate(texts):
        slide(folder / "slides" / f"s{number}.tif", number)
        lines.append(f"s{number},{text}")
    (folder / "captions.csv").write_text("\n".join(lines) + "\n")
    make_base(folder / "llm", texts, width=32)
    for command in (
        "pathflip ingest slides --archive archive --encoder conch",
        "pathflip archive import --archive archive --captions captions.csv",
        f"pathflip pretrain --archive archive --preset pathflip/mini --run runs/pathflip {TINY} "
        "-o steps=1 -o batch_size=2 -o val_fraction=0",
        "pathflip tune --archive archive --run runs/pathflip --llm Qwen/Qwen3-0.6B "
        "--out runs/answers",
    ):
        recipes.run_words(words(command), folder)
    return folder


@pytest.mark.parametrize("name", COPIES)
def test_the_commands_of_a_card_measure_what_it_says(
    name: str, models: Path, tmp_path: Path
) -> None:
    COPIES[name](tmp_path)
    (tmp_path / "llm").symlink_to(models / "llm")
    (tmp_path / "runs").mkdir()
    for run in ("pathflip", "answers"):
        (tmp_path / "runs" / run).symlink_to(models / "runs" / run)
    card = read_card(name)
    for step in card.steps:
        if "--out runs/answers" in step.run:  # that of the fixture is there
            continue
        recipes.run_words(words(step.run), tmp_path)
    for measure in card.measures:
        said = json.loads(recipes.run_words([*words(measure.run), "--json"], tmp_path))
        assert numbers(said), measure.run


def numbers(document: Any) -> list[float]:
    """Return the shares between 0 and 1 of a document, its counts left out."""
    if isinstance(document, dict):
        return [one for value in document.values() for one in numbers(value)]
    if isinstance(document, list):
        return [one for value in document for one in numbers(value)]
    return [document] if isinstance(document, float) and 0 <= document <= 1 else []
