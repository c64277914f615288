"""Readers of public data sets on small copies of their layouts, against what was written there."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from pathflip.cli import main
from pathflip.datasets.cards import read_card
from pathflip.datasets.check import check
from pathflip.datasets.prepare import READERS, prepare
from pathflip.datasets.prepared import Options
from pathflip.errors import ConfigError
from pathflip.evaluation.prompts import read_tasks
from pathflip.interop.annotation_files import read_objects
from pathflip.interop.captions import read_captions
from pathflip.interop.labels import read_labels, read_patients
from pathflip.interop.questions import read_questions
from pathflip.slides.slide import Slide
from tests.unit.datasets import small_copies


def made(name: str, folder: Path, **options: Any) -> dict[str, Any]:
    return prepare(read_card(name), folder, folder.parent / "out", options=Options(**options))


def table(folder: Path, name: str) -> list[dict[str, str]]:
    with open(folder / name, newline="", encoding="utf-8") as text:
        return list(csv.DictReader(text))


def test_sets_with_a_reader_say_so_on_their_card() -> None:
    from pathflip.datasets.cards import cards

    assert {card.name for card in cards() if card.prepare} == set(READERS)


def test_bcnb_becomes_labels_tasks_outlines_and_slides(tmp_path: Path) -> None:
    copy = small_copies.bcnb(tmp_path / "BCNB")
    document = made("bcnb", copy, mpp=0.5)
    assert document["files"] == {"labels.csv": 3, "tasks.yaml": 7, "outlines": 2, "slides": 3}
    rows = {row.slide: row for row in read_patients(tmp_path / "out" / "labels.csv")}
    assert [(row.patient, row.split) for row in rows.values()] == [
        ("1", "train"), ("2", "val"), ("3", "test"),
    ]  # fmt: skip
    assert rows["2"].labels["er"] == "Negative"
    assert rows["1"].labels["histological_grading"] == "2"
    assert "histological_grading" not in rows["3"].labels  # unknown
    tasks = {task.name: task for task in read_tasks(tmp_path / "out" / "tasks.yaml").tasks}
    for row in rows.values():  # every value has a class or a side
        assert tasks["er"].is_positive(row.labels["er"]) is (row.labels["er"] == "Positive")
        for name in ("aln_status", "molecular_subtype", "histological_grading"):
            assert row.labels.get(name) in (None, *tasks[name].classes)
    (drawn,) = read_objects(tmp_path / "out" / "outlines" / "1.geojson")
    assert drawn.classification == "tumour"
    assert drawn.polygons[0][0].tolist()[:3] == [[10, 20], [90, 20], [90, 100]]
    with Slide(tmp_path / "out" / "slides" / "1.tif") as slide:
        assert (slide.width, slide.height, slide.mpp) == (256, 256, pytest.approx(0.5))
    assert made("bcnb", copy, split="test")["files"]["labels.csv"] == 1


def test_a_whole_bcnb_passes_its_card_but_for_its_size(tmp_path: Path) -> None:
    document = check(read_card("bcnb"), small_copies.bcnb(tmp_path))
    said = [problem["message"] for one in document["files"] for problem in one["problems"]]
    assert len(said) == 3
    assert all("1058" in message for message in said)


def test_cptac_takes_silent_variants_for_none_and_labels_known_slides(tmp_path: Path) -> None:
    document = made("cptac", small_copies.cptac(tmp_path / "cptac"))
    rows = {row["slide_id"]: row for row in table(tmp_path / "out", "labels.csv")}
    assert set(rows) == {"01BR001-a", "01BR001-b", "01BR002-a", "C3L-00083-21", "C3N-1-21"}
    first = {gene: rows["01BR001-a"][f"BRCA_{gene}"] for gene in ("PIK3CA", "GATA3", "KRAS")}
    assert first == {"PIK3CA": "MUT", "GATA3": "WT", "KRAS": "WT"}  # Silent; another's sample
    assert rows["01BR002-a"]["BRCA_GATA3"] == "MUT"
    assert rows["01BR002-a"]["BRCA_PIK3CA"] == "WT"  # cBioPortal before Patho-Bench, and said:
    assert document["passed"] == {
        "Patho-Bench says otherwise than cBioPortal": 1,
        "sequenced cases without a slide in Patho-Bench": 1,
        "tasks without a label": 7,
    }
    assert rows["C3N-1-21"]["LUAD_KRAS"] == "MUT"
    tasks = {task.name: task for task in read_tasks(tmp_path / "out" / "tasks.yaml").tasks}
    assert set(tasks) == {"BRCA_PIK3CA", "BRCA_MAP3K1", "BRCA_GATA3", "BRCA_KRAS", "LUAD_KRAS"}
    task = tasks["BRCA_GATA3"]
    assert task.texts(task.prompts) == ["a histopathology image with a GATA3 gene mutation."]
    assert task.texts(task.negative_prompts) == [
        "a histopathology image without a GATA3 gene mutation."
    ]
    assert [task.is_positive(value) for value in ("MUT", "WT", "")] == [True, False, None]


def test_cptac_without_patho_bench_labels_cases(tmp_path: Path) -> None:
    copy = small_copies.cptac(tmp_path / "cptac")
    for name in ("cptac_brca", "cptac_luad"):
        (copy / name).rename(tmp_path / name)
    made("cptac", copy)
    rows = read_labels(tmp_path / "out" / "labels.csv")
    assert [(row.slide, row.case) for row in rows] == [
        (None, "01BR001"), (None, "01BR002"), (None, "01BR003"),
    ]  # fmt: skip


def test_patho_bench_becomes_one_table_of_labels(tmp_path: Path) -> None:
    copy = small_copies.cptac(tmp_path / "pb")
    grades = {0: "G1 Well differentiated", 1: 7}
    rows = [("01BR001", "01BR001-a", 0), ("b", "other", 1)]
    small_copies.patho_task(copy / "bracs" / "Grade", rows, grades)
    document = made("patho-bench", copy)
    assert document["passed"] == {"survival tasks": 1}
    found = {row["slide_id"]: row for row in table(tmp_path / "out", "labels.csv")}
    assert found["01BR001-a"]["cptac_brca/PIK3CA_mutation"] == "mutant"
    assert found["01BR001-a"]["bracs/Grade"] == "G1 Well differentiated"
    assert found["other"]["split"] == "test"
    tasks = {task.name: task for task in read_tasks(tmp_path / "out" / "tasks.yaml").tasks}
    assert tasks["bracs/Grade"].classes == {
        "7": ("Grade 7",), "G1 Well differentiated": ("G1 Well differentiated",),
    }  # fmt: skip
    assert tasks["cptac_brca/PIK3CA_mutation"].is_positive("mutant")
    with pytest.raises(ConfigError, match="no fold 3"):
        made("patho-bench", copy, fold=3)


def test_slidechat_keeps_patients_apart(tmp_path: Path) -> None:
    train = {"TCGA-A1-0001-01Z-00-DX1": "Breast.", "TCGA-A1-0002-01Z-00-DX2": "Lung."}
    test = {"TCGA-A1-0002-01Z-00-DX1": "Lung.", "TCGA-A1-0003-01Z-00-DX1": "Skin."}
    document = made("slidechat", small_copies.slidechat(tmp_path / "sc", train=train, test=test))
    assert document["passed"] == {"training slides of test patients": 1}
    rows = {row.slide: row.split for row in read_labels(tmp_path / "out" / "splits.csv")}
    assert rows == {
        "TCGA-A1-0001-01Z-00-DX1": "train", "TCGA-A1-0002-01Z-00-DX2": "test",
        "TCGA-A1-0002-01Z-00-DX1": "test", "TCGA-A1-0003-01Z-00-DX1": "test",
    }  # fmt: skip
    assert [len(read_captions(file)) for file in sorted((tmp_path / "sc").glob("*aption*"))] == [
        2, 2,
    ]  # fmt: skip
    asked = read_questions(tmp_path / "sc" / "SlideInstruct_train_stage2_vqa.json")
    assert [one.choices for one in asked] == [("Breast.", "none"), ("Lung.", "none")]


def test_multipathqa_takes_a_number_for_the_place_of_an_option(tmp_path: Path) -> None:
    document = made("multipathqa", small_copies.multipathqa(tmp_path / "mpq"))
    assert document["passed"] == {"not valid by the set's own mark": 1}
    asked = read_questions(tmp_path / "out" / "questions.csv")
    assert [(one.slide, one.choices, one.answer) for one in asked] == [
        ("TCGA-A1.svs", ("2", "3", "4", "5"), "4"),  # the third, and not the text "3"
        ("TCGA-A2.svs", ("Low", "High"), "Low"),
    ]
    assert [one.category for one in asked] == ["tcga_slidebench", "tcga_expert_vqa"]
    labels = {row.slide: row.labels for row in read_labels(tmp_path / "out" / "labels.csv")}
    assert labels == {
        "GTEX-1.tiff": {"gtex_organ": "Skin"},
        "TCGA-A1.svs": {"tcga_diagnosis": "Melanoma"},
        "dbf7.tiff": {"panda_isup": "4"},
    }
    tasks = {task.name: task for task in read_tasks(tmp_path / "out" / "tasks.yaml").tasks}
    for found in labels.values():
        ((name, value),) = found.items()
        assert value in tasks[name].classes


def test_multipathqa_refuses_an_answer_that_is_no_option(tmp_path: Path) -> None:
    copy = small_copies.multipathqa(tmp_path / "mpq")
    file = copy / "MultiPathQA.csv"
    file.write_text(file.read_text().replace("TCGA-A2.svs,1", "TCGA-A2.svs,5"))
    with pytest.raises(ConfigError, match="answer '5' of 2 options"):
        made("multipathqa", copy)


def test_histai_instruct_becomes_captions_questions_patients_and_scale(tmp_path: Path) -> None:
    document = made("histai-instruct", small_copies.histai(tmp_path / "histai"))
    assert document["passed"] == {"cases without a slide here": 1}
    captions = read_captions(tmp_path / "out" / "captions.csv")
    assert [(row.slide, row.text, row.is_case) for row in captions] == [
        ("HISTAI-breast/case_0001", "Invasive carcinoma.", True),
        ("HISTAI-skin-b1/case_0001", "Naevus.", True),
    ]
    asked = read_questions(tmp_path / "out" / "questions.csv")
    assert [(one.slide, one.question, one.answer, one.category) for one in asked] == [
        ("HISTAI-breast/case_0001", "What is seen?", "Glands.", "multi_turn_conversation"),
        ("HISTAI-breast/case_0001", "Mitoses?", "Few.", "multi_turn_conversation"),
    ]
    slides = read_patients(tmp_path / "out" / "patients.csv")
    assert {row.patient for row in slides} == {"HISTAI-breast/case_0001"}
    assert {row.split for row in slides} == {"train"}
    scale = {
        row["slide"].rpartition("/")[2]: row["mpp"] for row in table(tmp_path / "out", "scale.csv")
    }
    assert scale == {"slide_H&E_0.tiff": "0.5", "slide_H&E_1_x40.tiff": "0.25"}


def test_quilt_becomes_one_pair_a_picture(tmp_path: Path) -> None:
    copy = small_copies.quilt(tmp_path / "quilt", {"a.jpg": "Glands.", "b.jpg": "Necrosis."})
    document = made("quilt-1m", copy)
    assert document["passed"] == {"further captions of a picture": 1}
    rows = table(tmp_path / "out", "pairs.csv")
    assert [(Path(row["image"]).name, row["caption"], row["split"]) for row in rows] == [
        ("a.jpg", "Glands.", "train"), ("b.jpg", "Necrosis.", "val"),
    ]  # fmt: skip
    assert all(Path(row["image"]).is_file() for row in rows)
    assert made("quilt-1m", copy, split="validation")["files"] == {"pairs.csv": 1}


def test_refpath_becomes_outlines_with_a_task_for_each_sentence(tmp_path: Path) -> None:
    document = made("refpath", small_copies.refpath(tmp_path / "RefPath"), mpp=0.5)
    assert document["files"] == {
        "patients.csv": 2, "tasks.yaml": 2, "outlines": 2, "slides": 2,
    }  # fmt: skip
    assert document["passed"] == {"boxes without their picture": 1}
    (drawn,) = read_objects(tmp_path / "out" / "outlines" / "8006.geojson")
    corners = drawn.polygons[0][0]
    assert [*corners.min(axis=0), *corners.max(axis=0)] == [10, 20, 60, 90]
    tasks = read_tasks(tmp_path / "out" / "tasks.yaml").tasks
    assert drawn.classification == tasks[1].label == "A cluster of tumour cells."
    assert [row.split for row in read_patients(tmp_path / "out" / "patients.csv")] == [
        "testB", "train",
    ]  # fmt: skip


def test_pathtext_and_wsi_bench_are_read_as_they_are(tmp_path: Path) -> None:
    case = tmp_path / "TCGA_BRCA" / "TCGA-A7-A6VV"
    case.mkdir(parents=True)
    (case / "annotation").write_text('"Invasive ductal carcinoma."')
    (row,) = read_captions(tmp_path)
    assert (row.slide, row.text, row.is_case) == (
        "TCGA-A7-A6VV", "Invasive ductal carcinoma.", True,
    )  # fmt: skip
    file = tmp_path / "WSI-Bench-test.jsonl"
    small_copies.lines(
        file,
        [
            {"question_id": "q", "image": "TCGA-BRCA/a.pt", "question": "Which subtype?",
             "T-answer": "Luminal B.", "metadata": "Subtype"}
        ],
    )  # fmt: skip
    (asked,) = read_questions(file)
    assert (asked.slide, asked.answer, asked.category) == (
        "TCGA-BRCA/a.pt", "Luminal B.", "Subtype",
    )  # fmt: skip
    with pytest.raises(ConfigError, match="are imported as they are"):
        made("pathtext", tmp_path)


def test_a_copy_that_lacks_files_is_told_to_be_checked(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("bcnb", "multipathqa", "quilt-1m"):
        with pytest.raises(ConfigError):
            made(name, tmp_path / "in")
    with pytest.raises(ConfigError, match="datasets check multipathqa"):
        made("multipathqa", tmp_path / "in")
    with pytest.raises(ConfigError, match="is the copy itself"):
        prepare(read_card("cptac"), tmp_path, tmp_path)


def test_whole_copies_pass_their_cards(tmp_path: Path) -> None:
    """The lines that cBioPortal writes above the headings among them."""
    assert check(read_card("cptac"), small_copies.cptac(tmp_path / "cptac"))["whole"]
    assert check(read_card("histai-instruct"), small_copies.histai(tmp_path / "histai"))["whole"]
    assert check(read_card("refpath"), small_copies.refpath(tmp_path / "refpath"))["whole"]
    (tmp_path / "cptac" / "brca_cptac_2020" / "data_mutations.txt").unlink()
    assert not check(read_card("cptac"), tmp_path / "cptac")["whole"]


def refused(name: str, copy: Path, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        made(name, copy)
    assert not (copy.parent / "out").exists()
    assert str(copy) in error.value.message


def test_nobody_is_in_two_splits(tmp_path: Path) -> None:
    copy = small_copies.bcnb(tmp_path / "BCNB")
    (copy / "dataset-splitting" / "val_id.txt").write_text("2\n3\n")
    refused("bcnb", copy, "val_id.txt: 3 is in the split test")
    copy = small_copies.histai(tmp_path / "histai")
    (copy / "splits" / "val.txt").write_text("histai/HISTAI-breast/case_0001/\n")
    refused("histai-instruct", copy, "HISTAI-breast/case_0001 is in the split train")
    copy = small_copies.refpath(tmp_path / "refpath")
    line = (copy / "train.jsonl").read_text()
    (copy / "testA.jsonl").write_text(line)
    refused("refpath", copy, r"train.jsonl, line 1: 8006.jpg is a picture of testA")


def test_what_is_there_twice_has_to_agree(tmp_path: Path) -> None:
    copy = small_copies.multipathqa(tmp_path / "multipathqa")
    file = copy / "MultiPathQA.csv"
    first = file.read_text().split("\n", 1)
    again = "panda,p,dbf7.tiff,3,,True,True,True,balanced_accuracy,f,Grade it."
    file.write_text(f"{first[0]}\n{again}\n{first[1]}")
    refused("multipathqa", copy, "panda_isup of dbf7.tiff is '3' before")
    copy = tmp_path / "patho"
    rows = [("1", "s1", 0), ("1", "s1", 1)]
    small_copies.patho_task(copy / "bracs" / "coarse", rows, {0: "benign", 1: "malignant"})
    refused("patho-bench", copy, "line 3: slide s1 has another label before")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    copy = small_copies.bcnb(tmp_path / "BCNB")
    for text in ("null", "[1]", '{"negative": []}', '{"positive": [{}]}'):
        (copy / "WSIs" / "1.json").write_text(text)
        refused("bcnb", copy, r"1.json(:| has)")
    copy = tmp_path / "patho"
    small_copies.patho_task(copy / "bracs" / "coarse", [("1", "s1", 0)], {0: "benign"})
    table, config = (copy / "bracs" / "coarse" / name for name in ("k=all.tsv", "config.yaml"))
    table.write_text(table.read_text().replace("\t0\t", "\t7\t"))
    refused("patho-bench", copy, "line 2: coarse is '7'")
    for text in ("", "null", "[1]", "task_col: coarse\n"):
        config.write_text(text)
        refused("patho-bench", copy, "config.yaml has no task_type")
    table.write_text(table.read_text().split("\n")[0] + "\n")
    config.write_text("task_type: classification\ntask_col: coarse\nlabel_dict: {0: a}\n")
    refused("patho-bench", copy, "has no rows")
    copy = small_copies.cptac(tmp_path / "cptac")
    mutations = copy / "brca_cptac_2020" / "data_mutations.txt"
    mutations.write_text(mutations.read_text().split("PIK3CA")[0])
    refused("cptac", copy, "data_mutations.txt has no rows")


def test_a_copy_of_nothing_is_not_prepared(tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    for name in ("cptac", "patho-bench"):
        refused(name, tmp_path / "copy", "has nothing that")


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy, out = small_copies.bcnb(tmp_path / "BCNB"), tmp_path / "out"
    words = ["datasets", "prepare", "bcnb", str(copy), "--out", str(out), "--json"]
    with pytest.raises(SystemExit, match="0"):
        main([*words, "--mpp", "0.5", "--dry-run"])
    document = json.loads(capsys.readouterr().out)
    assert document["dry_run"]
    assert document["files"]["slides"] == 3
    assert not out.exists()
    with pytest.raises(SystemExit, match="0"):
        main(words)
    assert "slides" not in json.loads(capsys.readouterr().out)["files"]
    assert not (out / "slides").exists()
