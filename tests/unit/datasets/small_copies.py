"""Small copies of public data sets, by hand in the layout of the real ones."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import cv2
import numpy as np


def sheet(path: Path, rows: list[list[Any]]) -> None:
    """Write an .xlsx as a spreadsheet program does: texts shared, numbers in their cells."""
    shared: list[str] = []
    lines = []
    for number, row in enumerate(rows, start=1):
        cells = []
        for column, value in enumerate(row):
            at = f"{chr(65 + column)}{number}"
            if isinstance(value, str):
                cells.append(f'<c r="{at}" t="s"><v>{len(shared)}</v></c>')
                shared.append(value)
            else:
                cells.append(f'<c r="{at}"><v>{value}</v></c>')
        lines.append(f'<row r="{number}">{"".join(cells)}</row>')
    main = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
    with zipfile.ZipFile(path, "w") as book:
        book.writestr(
            "xl/worksheets/sheet1.xml",
            f"<worksheet {main}><sheetData>{''.join(lines)}</sheetData></worksheet>",
        )
        book.writestr(
            "xl/sharedStrings.xml",
            f"<sst {main}>{''.join(f'<si><t>{escape(text)}</t></si>' for text in shared)}</sst>",
        )


def picture(path: Path, *, px: int = 64, seed: int = 0) -> None:
    """Write a picture in the colours of stained tissue."""
    noise = np.random.default_rng(seed).integers(0, 60, (px, px, 3))
    pixels = np.clip(np.array([150, 60, 170]) + noise, 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), pixels)


def lines(path: Path, entries: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")


def bcnb(folder: Path) -> Path:
    """Three patients of BCNB, one a split."""
    folder.mkdir(parents=True, exist_ok=True)
    sheet(
        folder / "patient-clinical-data.xlsx",
        [
            ["Patient ID", "Age(years)", "Tumour Size(cm)", "Tumour Type", "ER", "PR", "HER2",
             "HER2 Expression", "Histological grading", "Surgical", "Ki67", "Molecular subtype",
             "Number of lymph node metastases", "ALN status"],
            [1, 51, 2.5, "Invasive ductal carcinoma", "Positive", "Negative", "Negative", 0, 2,
             "Mastectomy", 30, "Luminal A", 0, "N0"],
            [2, 43, 1.5, "Invasive ductal carcinoma", "Negative", "Negative", "Positive", "3+", 3,
             "Mastectomy", 60, "HER2(+)", 1, "N+(1-2)"],
            [3, 62, 3.0, "Invasive lobular carcinoma", "Positive", "Positive", "Negative", "1+",
             "unknown", "Mastectomy", 20, "Luminal B", 4, "N+(>2)"],
        ],
    )  # fmt: skip
    for number, split in ((1, "train"), (2, "val"), (3, "test")):
        picture(folder / "WSIs" / f"{number}.jpg", px=256, seed=number)
        drawn = [{"name": "Annotation 0", "vertices": [[10, 20], [90, 20], [90, 100]]}]
        document = {"positive": drawn if number != 2 else [], "negative": []}
        (folder / "WSIs" / f"{number}.json").write_text(json.dumps(document))
        (folder / "dataset-splitting").mkdir(exist_ok=True)
        (folder / "dataset-splitting" / f"{split}_id.txt").write_text(f"{number}\n")
    return folder


def cptac(folder: Path) -> Path:
    """A breast study of cBioPortal and three tables of Patho-Bench."""
    study = folder / "brca_cptac_2020"
    (study / "case_lists").mkdir(parents=True)
    (study / "case_lists" / "cases_sequenced.txt").write_text(
        "cancer_study_identifier: brca_cptac_2020\ncase_list_ids: X01BR001\tX01BR002\tX01BR003\n"
    )
    (study / "data_mutations.txt").write_text(
        "#version 2.4\n"
        "Hugo_Symbol\tEntrez_Gene_Id\tVariant_Classification\tTumor_Sample_Barcode\n"
        "PIK3CA\t5290\tMissense_Mutation\tX01BR001\n"
        "GATA3\t2625\tSilent\tX01BR001\n"
        "GATA3\t2625\tFrame_Shift_Ins\tX01BR002\n"
        "KRAS\t3845\tMissense_Mutation\tX09BR009\n"
        "TTN\t7273\tMissense_Mutation\tX01BR003\n"
    )
    tables = {
        "cptac_brca/PIK3CA_mutation": [("01BR001", "01BR001-a", 1), ("01BR001", "01BR001-b", 1),
                                       ("01BR002", "01BR002-a", 1)],
        "cptac_luad/KRAS_mutation": [("C3L-00083", "C3L-00083-21", 0), ("C3N-1", "C3N-1-21", 1)],
        "cptac_luad/OS": [("C3L-00083", "C3L-00083-21", 3)],
    }  # fmt: skip
    for name, rows in tables.items():
        patho_task(folder / name, rows, {0: "wildtype", 1: "mutant"})
    return folder


def patho_task(folder: Path, rows: list[tuple[str, str, int]], words: dict[int, Any]) -> None:
    """Write one task as Patho-Bench does; slides of odd rows are test."""
    task = folder.name
    folder.mkdir(parents=True)
    told = "\n".join(f"  {key}: {word}" for key, word in words.items())
    kind = "survival" if task in ("OS", "PFS") else "classification"
    (folder / "config.yaml").write_text(
        f"datasets:\n  - x\n\ntask_col: {task}\ntask_type: {kind}\nlabel_dict:\n{told}\n"
    )
    body = [
        f"{case}\t{slide}\t{label}\t{'test' if at % 2 else 'train'}"
        for at, (case, slide, label) in enumerate(rows)
    ]
    (folder / "k=all.tsv").write_text(
        "\n".join([f"case_id\tslide_id\t{task}\tfold_0", *body]) + "\n"
    )


def multipathqa(folder: Path) -> Path:
    """A question of each benchmark, and one that its authors took back."""
    folder.mkdir(parents=True, exist_ok=True)
    head = (
        "benchmark_name,benchmark_id,image_path,answer,options,image_exists,patch_exists,is_valid,"
        "metric_type,file_id,prompt\n"
    )
    rows = [
        "gtex,g,GTEX-1.tiff,Skin,\"['Skin', 'Lung']\",True,True,True,balanced_accuracy,f,"
        '"What organ?\n{options}"',
        "tcga,t,TCGA-A1.svs,2,\"['Glioma', 'Melanoma']\",True,True,True,balanced_accuracy,f,What?",
        "tcga_slidebench,s,TCGA-A1.svs,3,\"['2', '3', '4', '5']\",True,True,True,accuracy,f,"
        "Which secondary Gleason pattern?",
        "tcga_expert_vqa,e,TCGA-A2.svs,1,\"['Low', 'High']\",True,True,True,accuracy,f,Mitoses?",
        "panda,p,dbf7.tiff,4,,True,True,True,balanced_accuracy,f,Grade it.",
        "tcga_expert_vqa,e,TCGA-A2.svs,2,\"['Low', 'High']\",True,True,False,accuracy,f,Old?",
    ]
    (folder / "MultiPathQA.csv").write_text(head + "\n".join(rows) + "\n")
    return folder


def histai(folder: Path) -> Path:
    """Two cases of HISTAI-Instruct, one with two slides here."""
    turn = {"role": "user", "content": "What is seen?"}
    lines(
        folder / "histai-instruct.jsonl",
        [
            {
                "case_mapping": "histai/HISTAI-breast/case_0001", "organ": "breast",
                "clean_report": [turn, {"role": "assistant", "content": "Invasive carcinoma."}],
                "multi_turn_conversation": [
                    turn, {"role": "assistant", "content": "Glands."},
                    {"role": "user", "content": "Mitoses?"},
                    {"role": "assistant", "content": "Few."},
                ],
            },
            {
                "case_mapping": "histai/HISTAI-skin-b1/case_0001",
                "clean_report": [turn, {"role": "assistant", "content": "Naevus."}],
            },
        ],
    )  # fmt: skip
    splits = {"train": "HISTAI-breast", "test": "HISTAI-skin-b1", "val": "HISTAI-lung"}
    for split, subset in splits.items():
        (folder / "splits").mkdir(exist_ok=True)
        (folder / "splits" / f"{split}.txt").write_text(f"histai/{subset}/case_0001\n")
    for name in ("slide_H&E_0.tiff", "slide_H&E_1_x40.tiff"):
        path = folder / "HISTAI-breast" / "case_0001" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"II*\0")
    return folder


def quilt(folder: Path, captions: dict[str, str], *, px: int = 160) -> Path:
    """Pictures with a caption each, the first with a second one."""
    rows = [",caption,image_path,subset,split,pathology,magnification,height,width"]
    for at, (name, caption) in enumerate(captions.items()):
        picture(folder / "quilt_1m" / name, px=px, seed=at)
        rows.append(f'{at},"{caption}",{name},quilt,{"val" if at else "train"},,0.0,{px},{px}')
    first = next(iter(captions))
    rows.append(f"99,Another caption.,{first},quilt,train,,0.0,{px},{px}")
    (folder / "quilt_1M_lookup.csv").write_text("\n".join(rows) + "\n")
    return folder


def refpath(folder: Path) -> Path:
    """Two pictures with boxes; one box has no picture."""
    for at, name in enumerate(("8006.jpg", "8007.jpg")):
        picture(folder / "images" / name, px=256, seed=at)
    size = {"height": 256, "width": 256}
    lines(
        folder / "train.jsonl",
        [{"image_id": "8006.jpg", "bbox": [10, 20, 60, 90], "bbox_id": 1, **size,
          "expression": ["A cluster of tumour cells.", "Tumour."]}],
    )  # fmt: skip
    lines(
        folder / "testB.jsonl",
        [
            {"image_id": "8007.jpg", "bbox": [0, 0, 128, 128], "bbox_id": 1, **size,
             "expression": ["Necrosis."]},
            {"image_id": "8009.jpg", "bbox": [0, 0, 9, 9], "bbox_id": 1, **size,
             "expression": ["Gone."]},
        ],
    )  # fmt: skip
    return folder


def slidechat(folder: Path, *, train: dict[str, str], test: dict[str, str]) -> Path:
    """SlideInstruction about some slides and SlideBench about others: {stem: caption}."""
    folder.mkdir(parents=True, exist_ok=True)

    def turns(asked: str, answer: str) -> list[dict[str, str]]:
        return [{"from": "human", "value": f"{asked}\n<image>"}, {"from": "gpt", "value": answer}]

    stages = {
        "stage1_caption": [turns("Describe the slide.", text) for text in train.values()],
        "stage2_vqa": [
            turns(f"Which organ? A) {text.split()[-1]} B) none", "A") for text in train.values()
        ],
    }
    for stage, said in stages.items():
        entries = [
            {"id": f"train::{at}", "image": [f"{stem}.csv"], "conversations": told}
            for at, (stem, told) in enumerate(zip(train, said, strict=True))
        ]
        (folder / f"SlideInstruct_train_{stage}.json").write_text(json.dumps(entries))
    captions, asked = ["ID,Slide,Tumor,Question,Caption"], []
    for at, (stem, text) in enumerate(test.items()):
        captions.append(f'{at},{stem},BRCA,"Please, a report.","{text}"')
        topic = ("Microscopy", "Diagnosis", "Clinical")[at % 3]
        asked.append(f"{at},{stem},BRCA,{topic},Organ,Which organ?,skin,brain,lung,breast,D")
    head = "ID,Slide,Tumor,Broad Category,Narrow Category,Question,A,B,C,D,Answer"
    for name, lines_ in (("Caption", captions), ("VQA", [head, *asked])):
        path = folder / f"SlideBench-{name}-TCGA.csv"
        path.write_text("\ufeff" + "\n".join(lines_) + "\n", encoding="utf-8")
    return folder
