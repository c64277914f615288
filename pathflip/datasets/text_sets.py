"""Texts, splits and labels from SlideChat's sets, MultiPathQA, HISTAI-Instruct and Quilt-1M."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pathflip.datasets.check import entries, read_splits
from pathflip.datasets.prepared import Options, Prepared, Table, multiclass
from pathflip.errors import ConfigError
from pathflip.interop.tables import bad_line, clean, is_missing
from pathflip.splits import canonical_split
from pathflip.text import LETTERS

# -- SlideInstruction and SlideBench --------------------------------------------------------------


def slidechat(root: Path, options: Options) -> Prepared:
    """Read which slides are for training and which for testing, by the files that name them.

    A training slide of a patient who has a test slide is left out of the training: it becomes a
    test slide without texts.
    """
    test = {
        _stem(row["Slide"])
        for file in sorted(root.glob("SlideBench-*-TCGA.csv"))
        for row in entries(file, "Slide")
    }
    if not test:
        raise ConfigError(
            f"{root} has no SlideBench-…-TCGA.csv.", hint="Download it into the same folder."
        )  # fmt: skip
    train = {
        _stem(name)
        for file in sorted(root.glob("SlideInstruct_train_*.json"))
        for entry in entries(file, "image")
        for name in ([entry["image"]] if isinstance(entry["image"], str) else entry["image"])
    } - test
    patients = {_patient(slide) for slide in test}
    rows = [
        {"slide": slide, "split": "test" if _patient(slide) in patients else "train"}
        for slide in sorted(test | train)
    ]
    kept_out = sum(_patient(slide) in patients for slide in train)
    return Prepared(
        tables={"splits.csv": Table.of(rows, "slide", "split")},
        passed=Counter({"training slides of test patients": kept_out}) if kept_out else Counter(),
    )


def _stem(name: str) -> str:
    return re.sub(r"\.(csv|pt|h5|svs)$", "", clean(str(name)).rpartition("/")[2])


def _patient(slide: str) -> str:
    return "-".join(slide.split("-")[:3])


# -- MultiPathQA ----------------------------------------------------------------------------------

_LABELS = {"gtex": "gtex_organ", "tcga": "tcga_diagnosis", "panda": "panda_isup"}
_GRADES = {
    "0": ["benign prostate tissue"],
    "1": ["prostate adenocarcinoma, Gleason score 3+3=6"],
    "2": ["prostate adenocarcinoma, Gleason score 3+4=7"],
    "3": ["prostate adenocarcinoma, Gleason score 4+3=7"],
    "4": ["prostate adenocarcinoma, Gleason score 8"],
    "5": ["prostate adenocarcinoma, Gleason score 9 or 10"],
}


def multipathqa(root: Path, options: Options) -> Prepared:
    """Read questions with few options as questions, those with many as labels with a task.

    An answer is the number of an option, from 1, even where the options are numbers themselves;
    only that of ``gtex`` is its text and that of ``panda`` a grade.
    """
    file = root / "MultiPathQA.csv"
    asked: list[dict[str, Any]] = []
    labels: dict[str, dict[str, Any]] = {}
    classes: dict[str, dict[str, list[str]]] = {}
    passed: Counter[str] = Counter()
    needed = ("benchmark_name", "image_path", "answer", "options", "is_valid", "prompt")
    for number, row in enumerate(entries(file, *needed), start=1):
        if str(row["is_valid"]).lower() != "true":
            passed["not valid by the set's own mark"] += 1
            continue
        kind, answer = row["benchmark_name"], clean(row["answer"])
        given = _options(file, number, row["options"])
        if kind == "panda":
            name = _LABELS[kind]
            classes[name] = _GRADES
            _label(labels, file, number, row["image_path"], name, answer)
            continue
        text = answer if answer in given and kind == "gtex" else _nth(file, number, given, answer)
        if kind in _LABELS:
            name = _LABELS[kind]
            classes[name] = {option: [option] for option in given}
            _label(labels, file, number, row["image_path"], name, text)
            continue
        asked.append(
            {
                "slide": row["image_path"], "question": clean(row["prompt"]),
                **dict(zip(LETTERS, given, strict=False)),
                "answer": LETTERS[given.index(text)], "category": kind,
            }
        )  # fmt: skip
    rows = [{"slide": slide, **found} for slide, found in labels.items()]
    first = ("slide", "question", *LETTERS[: max((len(row) - 4 for row in asked), default=0)])
    return Prepared(
        tables={
            "questions.csv": Table.of(asked, *first, "answer", "category"),
            "labels.csv": Table.of(rows, "slide"),
        },
        tasks=[multiclass(name, found) for name, found in classes.items()],
        passed=passed,
    )


def _label(
    labels: dict[str, dict[str, Any]], file: Path, number: int, slide: str, name: str, value: str
) -> None:
    """Note the label of a slide, which may be there once."""
    if labels.setdefault(slide, {}).setdefault(name, value) != value:
        raise bad_line(file, number + 1, f"{name} of {slide} is {labels[slide][name]!r} before")


def _options(file: Path, number: int, cell: str) -> list[str]:
    if is_missing(cell):
        return []
    try:
        found = ast.literal_eval(cell)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        found = None
    if not isinstance(found, list):
        raise bad_line(file, number + 1, f"options that are no list: {cell[:40]!r}")
    return [clean(str(item)) for item in found]


def _nth(file: Path, number: int, given: list[str], answer: str) -> str:
    if not answer.isdigit() or not 1 <= int(answer) <= len(given):
        raise bad_line(file, number + 1, f"answer {answer!r} of {len(given)} options")
    return given[int(answer) - 1]


# -- HISTAI-Instruct ------------------------------------------------------------------------------


def histai_instruct(root: Path, options: Options) -> Prepared:
    """Read instructions, splits, and the scale and patients of the slides beside them.

    A case is the patient ``HISTAI-breast/case_0001``. The answer of ``clean_report`` is the caption
    of its slides; every other list of turns are questions about them.
    """
    split_of = read_splits(
        {
            path.stem: path
            for path in sorted(root.glob("splits/*.txt"))
            if path.stem in ("train", "val", "test")
        },
        named=lambda line: [_case(line)] if clean(line) else [],
    )
    captions: list[dict[str, Any]] = []
    questions: list[dict[str, Any]] = []
    passed: Counter[str] = Counter()
    told: set[str] = set()
    for entry in entries(root / "histai-instruct.jsonl", "case_mapping"):
        case = _case(str(entry["case_mapping"]))
        passed["instructions of cases in no split"] += case not in split_of
        if options.split is not None and split_of.get(case) != options.split:
            passed["of another split"] += 1
            continue
        told.add(case)
        for name, value in entry.items():
            for question, answer in _turns(value):
                if name == "clean_report":
                    captions.append({"case_id": case, "caption": answer})
                else:
                    questions.append(
                        {"case_id": case, "question": question, "answer": answer, "category": name}
                    )  # fmt: skip
    slides = [
        (f"{path.parts[-3]}/{path.parts[-2]}", path)
        for path in sorted(root.glob("HISTAI-*/case_*/slide_*.tif*"))
    ]
    passed["cases without a slide here"] += len(told - {case for case, _ in slides})
    seen: set[str] = set()
    once = [c for c in captions if not (c["case_id"] in seen or seen.add(c["case_id"]))]  # type: ignore[func-returns-value]
    passed["further captions of a case"] += len(captions) - len(once)
    return Prepared(
        tables={
            "captions.csv": Table.of(once, "case_id", "caption"),
            "questions.csv": Table.of(questions, "case_id", "question", "answer", "category"),
            "patients.csv": Table.of(
                [
                    {
                        "slide": path.relative_to(root).as_posix(), "patient_id": case,
                        "split": split_of.get(case),
                    }
                    for case, path in slides
                ],
                "slide", "patient_id", "split",
            ),
            "scale.csv": Table.of(
                [
                    {
                        "slide": path.relative_to(root).as_posix(),
                        "mpp": 0.25 if re.search(r"x40", path.stem, re.IGNORECASE) else 0.5,
                    }
                    for _, path in slides
                ],
                "slide", "mpp",
            ),
        },
        passed=+passed,
    )  # fmt: skip


def _case(mapping: str) -> str:
    return "/".join(clean(mapping).rstrip("/").split("/")[-2:])


def _turns(value: Any) -> Iterator[tuple[str, str]]:
    """Yield (question, answer) of a list of turns, or of a list of such lists."""
    if not isinstance(value, list):
        return
    question = ""
    for turn in value:
        if isinstance(turn, list):
            yield from _turns(turn)
            continue
        role, text = _said(turn)
        if role == "user":
            question = text
        elif role == "assistant" and question and text:
            yield question, text
            question = ""


def _said(turn: Any) -> tuple[str, str]:
    if not isinstance(turn, Mapping) or not isinstance(turn.get("content"), str):
        return "", ""
    return str(turn.get("role", "")).lower(), clean(turn["content"])


# -- Quilt-1M -------------------------------------------------------------------------------------


def quilt_1m(root: Path, options: Options) -> Prepared:
    """Read one caption of each picture, the first; pictures lie in ``quilt_1m`` or ``images``."""
    folder = next((f for f in ("quilt_1m", "images") if (root / f).is_dir()), None)
    if folder is None:
        raise ConfigError(
            f"{root} has neither quilt_1m nor images.",
            hint="Unpack the pictures into one of them, beside quilt_1M_lookup.csv.",
        )
    rows: dict[str, dict[str, Any]] = {}
    passed: Counter[str] = Counter()
    for row in entries(root / "quilt_1M_lookup.csv", "caption", "image_path"):
        split = canonical_split(row.get("split"))
        if options.split is not None and split != canonical_split(options.split):
            passed["of another split"] += 1
        elif is_missing(row["caption"]) or is_missing(row["image_path"]):
            passed["without caption or picture"] += 1
        elif row["image_path"] in rows:
            passed["further captions of a picture"] += 1
        else:
            rows[row["image_path"]] = {
                "image": str((root / folder / row["image_path"]).absolute()),
                "caption": clean(row["caption"]), "split": split, "subset": row.get("subset"),
            }  # fmt: skip
    return Prepared(
        tables={"pairs.csv": Table.of(rows.values(), "image", "caption", "split", "subset")},
        passed=passed,
    )
