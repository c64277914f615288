"""The synthetic cohort on disk: slides, reports, labels, questions and lesion outlines."""

from __future__ import annotations

import json
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from pathflip.files import write_file
from pathflip.synth import text
from pathflip.synth.atlas import GRADES, NUCLEI, ORGANS, PATTERNS, Atlas
from pathflip.synth.output import (
    check_same_cohort,
    draw_all,
    make_folders,
    worker_count,
    write_csv,
    write_json,
)
from pathflip.synth.scene import (
    FINDINGS,
    RATES,
    SITE_STAINS,
    Scene,
    lay_out,
    polygons,
    render,
    sample_scenes,
)
from pathflip.synth.tiff import write_slide

VERSION = 1
"""Changes when the same seed gives other slides or other text."""
_NAMESPACE = uuid.UUID("6f1c3f56-5d0a-4b8e-9a53-6d2f1a7b90c4")


@dataclass(frozen=True, kw_only=True)
class Cohort:
    """Summary of a cohort that ``make_cohort`` wrote.

    Attributes:
        directory: Folder of the cohort.
        slides, patients: Number of slides and patients.
        rendered, skipped: Number of slides drawn now, and of slides that were already there.
        splits: Number of slides per split.
        bytes: Size of all slide files.
        seconds: Wall time.
        vqa_majority: Accuracy per question kind of always answering what is most frequent in train.
    """

    directory: Path
    slides: int
    patients: int
    rendered: int
    skipped: int
    splits: dict[str, int]
    bytes: int
    seconds: float
    vqa_majority: dict[str, float]


def make_cohort(
    directory: str | Path,
    *,
    slides: int,
    seed: int = 0,
    processes: int | None = None,
    size_um: float = 1024.0,
    progress: Callable[[int, int], None] | None = None,
) -> Cohort:
    """Write a cohort whose truth is planted; the same seed gives the same bytes.

    Running it again draws only the slides that are missing, and a larger ``slides`` extends the
    cohort. Files: ``slides/*.svs|tif``, ``lesions/<slide>.geojson``, ``captions.csv``,
    ``sentences.json``, ``labels.csv``, ``patients.csv``, ``vqa.jsonl``, ``abstain.jsonl``,
    ``tasks.yaml``, ``cohort.json``.

    Args:
        directory: Output folder; made when missing.
        slides: Number of slides.
        seed: Seed of all draws.
        processes: Number of processes that draw; None for one per CPU.
        size_um: Side of a slide in µm, at least 512; lesions grow with it, cells do not.
        progress: Called with (slides done, slides in all) after each.

    Raises:
        ConfigError: The directory holds a cohort of another seed, size or version.
        ValueError: ``slides`` or ``size_um`` is too small.
    """
    if slides < 1 or size_um < 512:
        raise ValueError(f"slides is {slides} and size_um {size_um}; at least 1 and 512 are needed")
    start = time.monotonic()
    root = Path(directory)
    scenes = sample_scenes(slides=slides, seed=seed, size_um=size_um)
    spec = {"version": VERSION, "seed": seed, "size_um": size_um}
    check_same_cohort(root / "cohort.json", spec)
    make_folders(root, "slides", "lesions")
    items = [item for scene in scenes for item in text.questions(scene)]
    majority = text.majority_baseline(items)
    write_json(root / "cohort.json", {**spec, **_describe(scenes), "vqa_majority": majority})
    _write_tables(root, scenes, items)
    todo = [s for s in scenes if not _slide_path(root, s).exists()]
    for done, _ in enumerate(_draw_all(root, todo, processes), start=slides - len(todo) + 1):
        if progress is not None:
            progress(done, slides)
    return Cohort(
        directory=root,
        slides=slides,
        patients=len({s.patient_id for s in scenes}),
        rendered=len(todo),
        skipped=slides - len(todo),
        splits={name: sum(s.split == name for s in scenes) for name in ("train", "val", "test")},
        bytes=sum(_slide_path(root, s).stat().st_size for s in scenes),
        seconds=time.monotonic() - start,
        vqa_majority=majority,
    )


def _slide_path(root: Path, scene: Scene) -> Path:
    return root / "slides" / f"{scene.slide}.{'svs' if scene.layout == 'aperio' else 'tif'}"


def _draw_all(root: Path, scenes: Sequence[Scene], processes: int | None) -> Iterator[str]:
    shared = root / ".atlas"
    shutil.rmtree(shared, ignore_errors=True)
    if worker_count(processes, len(scenes)) > 1:
        shared.mkdir()
    try:
        yield from draw_all(_draw, root, scenes, processes)
    finally:
        shutil.rmtree(shared, ignore_errors=True)


@lru_cache(maxsize=1)
def _atlas(shared: Path | None) -> Atlas:
    return Atlas(shared)


def _draw(root: Path, scene: Scene) -> str:
    """Write one slide and its lesion outlines; the slide last, as it marks both as done."""
    layout = lay_out(scene)
    write_json(root / "lesions" / f"{scene.slide}.geojson", _geojson(scene, layout.masks))
    shared = root / ".atlas"
    pixels = render(scene, _atlas(shared if shared.exists() else None), layout=layout)
    write_slide(_slide_path(root, scene), pixels, mpp=scene.mpp, aperio=scene.layout == "aperio")
    return scene.slide


def _geojson(scene: Scene, masks: Iterable[NDArray[np.bool_]]) -> dict[str, Any]:
    """Return QuPath annotations, one per lesion, each naming the sentences it makes true."""
    said = text.sentences(scene)
    features = []
    for i, (lesion, mask) in enumerate(zip(scene.lesions, masks, strict=True)):
        shapes = polygons(mask, mpp=scene.mpp)
        one = len(shapes) == 1
        features.append(
            {
                "type": "Feature",
                "id": lesion_id(scene.slide, i),
                "geometry": {
                    "type": "Polygon" if one else "MultiPolygon",
                    "coordinates": shapes[0] if one else shapes,
                },
                "properties": {
                    "objectType": "annotation",
                    "name": lesion.finding,
                    "classification": {
                        "name": lesion.finding,
                        "color": _COLOURS[FINDINGS.index(lesion.finding)],
                    },
                    "metadata": {
                        "sentences": " ".join(str(k) for k, s in enumerate(said) if i in s.lesions)
                    },
                },
            }
        )
    return {"type": "FeatureCollection", "features": features}


_COLOURS = (
    [220, 20, 60],
    [105, 105, 105],
    [30, 60, 200],
    [90, 190, 220],
    [250, 160, 30],
    [160, 30, 30],
    [60, 20, 90],
    [40, 150, 90],
)


def lesion_id(slide: str, index: int) -> str:
    """Return the GeoJSON id of a slide's lesion; ``sentences.json`` refers to it."""
    return str(uuid.uuid5(_NAMESPACE, f"{slide}/{index}"))


def _describe(scenes: Sequence[Scene]) -> dict[str, Any]:
    return {
        "slides": len(scenes),
        "findings": FINDINGS,
        "organs": ORGANS,
        "grades": tuple(GRADES),
        "patterns": PATTERNS,
        "nuclei": NUCLEI,
        "genes": text.GENES,
        "sites": [{"stain_h": h, "stain_e": e} for h, e in SITE_STAINS],
        "rates": RATES,
        "forms": text.FORMS,
        "details": text.DETAILS,
        "organ_names": text.ORGAN_NAMES,
        "gene_forms": {"1": text.GENE_FORMS[True], "0": text.GENE_FORMS[False]},
        "negations": [n.format(a) for a in text.ABSENT_NAMES.values() for n in text.NEGATIONS],
        "queries": text.QUERIES,
    }


def _write_tables(root: Path, scenes: Sequence[Scene], items: Sequence[text.Question]) -> None:
    said = {s.slide: text.sentences(s) for s in scenes}
    captions = [(s.slide, " ".join(x.text for x in said[s.slide])) for s in scenes]
    write_csv(root / "captions.csv", ("slide", "caption"), captions)
    write_csv(
        root / "patients.csv", ("slide", "patient_id"), [(s.slide, s.patient_id) for s in scenes]
    )
    write_csv(root / "labels.csv", LABEL_COLUMNS, [_labels(s) for s in scenes])
    sentences = {
        slide: [
            {
                "text": s.text,
                "kind": s.kind,
                "subject": s.subject,
                "lesions": [lesion_id(slide, i) for i in s.lesions],
            }
            for s in report
        ]
        for slide, report in said.items()
    }
    write_json(root / "sentences.json", sentences)
    write_file(root / "tasks.yaml", yaml.safe_dump(tasks(), sort_keys=False, width=100))
    write_file(root / "vqa.jsonl", _lines(items))
    abstain = [item for scene in scenes for item in text.abstain_questions(scene)]
    write_file(root / "abstain.jsonl", _lines(abstain))


def _lines(items: Iterable[text.Question]) -> str:
    rows = (
        {
            "slide": q.slide,
            "split": q.split,
            "kind": q.kind,
            "question": q.question,
            "options": q.options,
            "answer": q.answer,
        }
        for q in items
    )
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def tasks() -> dict[str, Any]:
    """Return a cohort's zero-shot tasks, in held-out wording; see ``pathflip.evaluation.prompts``.

    Presence of each finding, classes among several, and the genes as positive minus negative; all
    by local scores, which were best on validation slides (docs/howto/evaluation.md).
    """
    found: list[dict[str, Any]] = [
        {
            "name": finding,
            "label": finding,
            "kind": "presence",
            "prompts": [text.QUERIES["findings"][finding]],
            "negative_prompts": [f"no {text.ABSENT_NAMES[finding]}"],
            "score": "local",
            "contrast": "none",
            "group": "findings",
        }
        for finding in FINDINGS
    ]
    for column in ("organ", "grade", "nuclei", "pattern", "til", "extent"):
        classes = {value: [query] for value, query in text.QUERIES[column].items()}
        found.append(
            {
                "name": column,
                "label": column,
                "kind": "multiclass",
                "classes": classes,
                "score": "local",
            }
        )
    found += [
        {
            "name": gene,
            "label": gene,
            "kind": "binary",
            "prompts": [text.QUERIES[gene]["1"]],
            "negative_prompts": [text.QUERIES[gene]["0"]],
            "score": "local",
            "contrast": "negation",
        }
        for gene in text.GENES
    ]
    return {"version": 1, "templates": ["CLASSNAME"], "neutral": "tissue", "tasks": found}


def everyday_tasks() -> dict[str, Any]:
    """Return the tasks of presence, asked in words that no caption has."""
    found = tasks()
    present = [task for task in found["tasks"] if task["kind"] == "presence"]
    asked = [task | {"prompts": [text.EVERYDAY[task["name"]]]} for task in present]
    return found | {"tasks": asked}


LABEL_COLUMNS = (
    "slide",
    "patient_id",
    "site",
    "split",
    "organ",
    *FINDINGS,
    "grade",
    "pattern",
    "nuclei",
    "til",
    "extent",
    "necrotic_foci",
    *text.GENES,
    "artefact",
    "mpp",
    "layout",
)
"""Columns of labels.csv; truth values are 1 and 0, and empty where the slide cannot show it."""


def _labels(scene: Scene) -> tuple[Any, ...]:
    return (
        scene.slide,
        scene.patient_id,
        scene.site,
        scene.split,
        scene.organ,
        *(int(f in scene.findings) for f in FINDINGS),
        scene.grade,
        scene.pattern,
        scene.nuclei,
        scene.til,
        scene.extent,
        scene.necrotic_foci,
        *(None if scene.genes[g] is None else int(bool(scene.genes[g])) for g in text.GENES),
        scene.artefact,
        scene.mpp,
        scene.layout,
    )
