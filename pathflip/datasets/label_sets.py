"""Labels of slides from BCNB, the gene mutations of CPTAC, and the tasks of Patho-Bench."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from pathflip.datasets.check import entries, read_splits
from pathflip.datasets.prepared import Options, Prepared, Table, binary, multiclass, mutation
from pathflip.errors import ConfigError
from pathflip.interop.spreadsheet import read_sheet
from pathflip.interop.tables import bad_line, clean, is_missing, is_unknown, json_entries, read_text

# -- BCNB -----------------------------------------------------------------------------------------

_BCNB_CLASSES: dict[str, dict[str, list[str]]] = {
    "aln_status": {
        "N0": ["breast carcinoma without metastasis to axillary lymph nodes"],
        "N+(1-2)": ["breast carcinoma with metastasis to one or two axillary lymph nodes"],
        "N+(>2)": ["breast carcinoma with metastasis to many axillary lymph nodes"],
    },
    "histological_grading": {
        "1": ["well differentiated invasive breast carcinoma, grade 1"],
        "2": ["moderately differentiated invasive breast carcinoma, grade 2"],
        "3": ["poorly differentiated invasive breast carcinoma, grade 3"],
    },
    "molecular_subtype": {
        "Luminal A": ["luminal A breast carcinoma"],
        "Luminal B": ["luminal B breast carcinoma"],
        "HER2(+)": ["HER2-positive breast carcinoma"],
        "Triple negative": ["triple-negative breast carcinoma"],
    },
}  # fmt: skip
_RECEPTORS = {"er": "oestrogen receptor", "pr": "progesterone receptor", "her2": "HER2"}
TUMOUR = "tumour"
"""Class of BCNB's outlines."""


def bcnb(root: Path, options: Options) -> Prepared:
    """Read clinical labels, splits and outlines of BCNB.

    Columns go by their headings in lower case without units: ``her2_expression``, ``age``.
    """
    rows = read_sheet(root / "patient-clinical-data.xlsx")
    names = {heading: _column(heading) for heading in rows[0][1]}
    split_of = _bcnb_splits(root)
    passed: Counter[str] = Counter()
    labels: list[dict[str, Any]] = []
    seen: set[str] = set()
    for line, row in rows:
        named = {names[heading]: clean(value) for heading, value in row.items()}
        patient = re.sub(r"\.0$", "", named.pop("patient_id", ""))
        if is_missing(patient):
            raise bad_line(root / "patient-clinical-data.xlsx", line, "no patient")
        if patient in seen:
            raise bad_line(
                root / "patient-clinical-data.xlsx", line, f"patient {patient} is there twice"
            )  # fmt: skip
        seen.add(patient)
        split = split_of.get(patient)
        if split is None:
            passed["patients in no split"] += 1
        if options.split is not None and split != options.split:
            passed["of another split"] += 1
            continue
        grade = named.get("histological_grading")
        if grade is not None:  # numbers of a sheet may come as 2.0
            named["histological_grading"] = re.sub(r"\.0$", "", grade)
        known = {key: value for key, value in named.items() if not is_unknown(value)}
        labels.append({"slide": patient, "patient_id": patient, "split": split, **known})
    chosen = {row["slide"] for row in labels}
    here = set(names.values())
    tasks = [
        binary(
            name,
            prompt=f"a histopathology image of {receptor} positive breast carcinoma.",
            negative=f"a histopathology image of {receptor} negative breast carcinoma.",
            positive=("Positive",),
        )
        for name, receptor in _RECEPTORS.items()
        if name in here
    ]
    tasks += [multiclass(name, found) for name, found in _BCNB_CLASSES.items() if name in here]
    tasks.append(
        {"name": TUMOUR, "label": TUMOUR, "kind": "presence", "prompts": ["breast carcinoma"]}
    )
    outlines = {
        path.stem: polygons
        for path in sorted(root.glob("WSIs/*.json"))
        if path.stem in chosen and (polygons := list(_vertices(path)))
    }
    pictures = {path.stem: path for path in sorted(root.glob("WSIs/*.jpg")) if path.stem in chosen}
    return Prepared(
        tables={"labels.csv": Table.of(labels, "slide", "patient_id", "split")},
        tasks=tasks,
        outlines=outlines,
        pictures=pictures,
        passed=passed,
    )


def _column(heading: str) -> str:
    return re.sub(r"\W+", "_", re.sub(r"\s*[(（].*$", "", clean(heading)).lower())


def _bcnb_splits(root: Path) -> dict[str, str]:
    """Return {patient: split} of the lists in ``dataset-splitting``."""
    files = {
        path.name.partition("_")[0]: path
        for path in sorted(root.glob("dataset-splitting/*_id.txt"))
    }
    return read_splits(files, named=str.split)


def _vertices(file: Path) -> Iterator[tuple[str, list[list[tuple[float, float]]]]]:
    """Yield the polygons of an annotation file, each one closed ring."""
    documents = [document for _, document in json_entries(file)]
    drawn = documents[0].get("positive") if _is_one_object(documents) else None
    if not isinstance(drawn, list):
        raise ConfigError(f"{file} has no list of outlines.", hint="Download it again.")
    for at, item in enumerate(drawn, start=1):
        try:
            ring = [(float(x), float(y)) for x, y in item["vertices"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{file}: outline {at} has no list of vertices.", hint="Download it again."
            ) from error
        if len(ring) > 2:
            yield TUMOUR, [[*ring, ring[0]]]


def _is_one_object(documents: list[Any]) -> bool:
    return len(documents) == 1 and isinstance(documents[0], Mapping)


# -- CPTAC ----------------------------------------------------------------------------------------

GENES = {
    "brca": ("PIK3CA", "MAP3K1", "GATA3", "KRAS"),
    "coad": ("PIK3CA", "TP53"),
    "luad": ("TP53", "STK11", "KRAS"),
    "lscc": ("TP53", "PIK3R1", "KEAP1"),
}
"""The twelve tasks of PathFLIP (arXiv 2512.17621), by cohort."""
_STUDIES = {"lusc": "lscc"}  # cBioPortal's name of the cohort
_STATES = {"0": "WT", "0.0": "WT", "1": "MUT", "1.0": "MUT"}
SILENT = frozenset(
    {"Silent", "Intron", "3'UTR", "5'UTR", "3'Flank", "5'Flank", "IGR", "RNA", "lincRNA"}
)
"""Variants that leave the protein as it is: they are no mutation here."""


def cptac(root: Path, options: Options) -> Prepared:
    """Read which genes are mutated in which cases: from cBioPortal, else from Patho-Bench.

    A gene of a sequenced case without a line is wild type. Labels are given to the slides that any
    Patho-Bench table of the cohort lists for a case; without one, to the case.
    """
    states: dict[str, dict[str, dict[str, str]]] = {}  # cohort -> case -> gene -> MUT or WT
    for study in sorted(root.glob("*_cptac_20*")):
        cohort = study.name.partition("_")[0]
        states[_STUDIES.get(cohort, cohort)] = _mutations(study)
    slides: dict[str, dict[str, set[str]]] = {}
    passed: Counter[str] = Counter()
    for file in sorted(root.glob("cptac_*/*/k=all.tsv")):
        cohort, task = file.parts[-3].removeprefix("cptac_"), file.parts[-2]
        gene = task.removesuffix("_mutation")
        asked = gene != task and gene in GENES.get(cohort, ())
        needed = ("case_id", "slide_id", task) if asked else ("case_id", "slide_id")
        for number, row in enumerate(entries(file, *needed), start=2):
            case = clean(str(row["case_id"]))
            slides.setdefault(cohort, {}).setdefault(case, set()).add(clean(str(row["slide_id"])))
            if not asked:
                continue
            if (value := clean(row[task])) not in _STATES:
                raise bad_line(file, number, f"{task} is {value!r}, not 0 or 1")
            label = _STATES[value]
            of_case = states.setdefault(cohort, {}).setdefault(case, {})
            if of_case.setdefault(gene, label) != label:
                passed["Patho-Bench says otherwise than cBioPortal"] += 1
    rows: list[dict[str, Any]] = []
    for cohort, genes in GENES.items():
        for case, found in sorted(states.get(cohort, {}).items()):
            labels = {f"{cohort.upper()}_{gene}": found[gene] for gene in genes if gene in found}
            if not labels:
                continue
            known = sorted(slides.get(cohort, {}).get(case, set()))
            if cohort in slides and not known:
                passed["sequenced cases without a slide in Patho-Bench"] += 1
            rows += [
                {"slide_id": slide, "case_id": case, **labels}
                for slide in (known if cohort in slides else [None])
            ]
    names = {
        f"{cohort.upper()}_{gene}": gene for cohort, genes in GENES.items() for gene in genes
    }  # fmt: skip
    there = {name for row in rows for name in row}
    passed["tasks without a label"] += sum(name not in there for name in names)
    return Prepared(
        tables={"labels.csv": Table.of(rows, "slide_id", "case_id")},
        tasks=[mutation(name, gene) for name, gene in names.items() if name in there],
        passed=+passed,
    )


def _mutations(study: Path) -> dict[str, dict[str, str]]:
    """Return {case: {gene: MUT or WT}} of the twelve tasks' genes in a cBioPortal study."""
    genes = {gene for found in GENES.values() for gene in found}
    listed = study / "case_lists" / "cases_sequenced.txt"
    ids = next(
        (
            line.partition(":")[2].split()
            for line in read_text(listed).splitlines()
            if line.startswith("case_list_ids:")
        ),
        None,
    )
    if ids is None:
        raise ConfigError(f"{listed} has no case_list_ids.", hint="Take it from the same study.")
    found = {_case(name): dict.fromkeys(sorted(genes), "WT") for name in ids}
    columns = ("Hugo_Symbol", "Variant_Classification", "Tumor_Sample_Barcode")
    for row in entries(study / "data_mutations.txt", *columns):
        gene, variant, sample = (row[name] for name in columns)
        case = _case(sample)
        if gene in genes and case in found and variant not in SILENT:
            found[case][gene] = "MUT"
    return found


def _case(name: str) -> str:
    """Return a case as slides name it: R has written ``X11BR050`` and ``C3L.00083`` of it."""
    return re.sub(r"^X(?=\d)", "", clean(name)).replace(".", "-")


# -- Patho-Bench ----------------------------------------------------------------------------------


def patho_bench(root: Path, options: Options) -> Prepared:
    """Read all classification tasks in a folder; a label is called ``<set>/<task>``.

    Prompts are the words of the labels; those of a gene are PathFLIP's. Splits are those of a fold
    where all tasks agree.
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    tasks: list[dict[str, Any]] = []
    passed: Counter[str] = Counter()
    for file in sorted(root.glob("*/*/k=all.tsv")):
        kind, column, words = _patho_config(file.with_name("config.yaml"))
        if kind != "classification":
            passed["survival tasks"] += 1
            continue
        name = f"{file.parts[-3]}/{file.parts[-2]}"
        tasks.append(_task(name, file.parts[-2], set(words.values())))
        for number, row in enumerate(entries(file, "slide_id", "case_id", column), start=2):
            key = clean(str(row["slide_id"])), clean(str(row["case_id"]))
            mine = rows.setdefault(key, {"slide_id": key[0], "case_id": key[1]})
            value = re.sub(r"\.0$", "", clean(row[column]))
            if value not in words:
                raise bad_line(file, number, f"{column} is {value!r}, none of config.yaml")
            if mine.setdefault(name, words[value]) != words[value]:
                raise bad_line(file, number, f"slide {key[0]} has another label before")
            part = row.get(f"fold_{options.fold}")
            if part is None:
                raise ConfigError(
                    f"{file} has no fold {options.fold}.", hint="Give another with --fold."
                )
            if mine.setdefault("split", part) != part:
                mine["split"] = ""
    passed["slides whose tasks put them into different splits"] += sum(
        row["split"] == "" for row in rows.values()
    )
    return Prepared(
        tables={"labels.csv": Table.of(rows.values(), "slide_id", "case_id", "split")},
        tasks=tasks,
        passed=+passed,
    )


def _patho_config(file: Path) -> tuple[str, str, dict[str, str]]:
    """Return kind and column of a task, and {label: word}."""
    about = yaml.safe_load(read_text(file))
    found = about if isinstance(about, Mapping) else {}
    kind, column, words = (found.get(key) for key in ("task_type", "task_col", "label_dict"))
    if kind and kind != "classification":
        return str(kind), "", {}
    if not kind or not column or not isinstance(words, Mapping):
        raise ConfigError(
            f"{file} has no task_type, task_col and label_dict.", hint="Download it again."
        )  # fmt: skip
    return str(kind), str(column), {str(key): str(word) for key, word in words.items()}


def _task(name: str, task: str, words: set[str]) -> dict[str, Any]:
    if words == {"wildtype", "mutant"}:
        return mutation(name, task.removesuffix("_mutation"), positive=("mutant",))
    said = task.replace("_", " ")
    plain = {
        word: [word if re.search(r"[A-Za-z]{4}", word) else f"{said} {word}"] for word in words
    }
    return multiclass(name, dict(sorted(plain.items())))
