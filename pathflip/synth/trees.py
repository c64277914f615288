"""The synthetic cohort of patch trees: slides, a caption of every node, labels and truth."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pathflip.files import write_file
from pathflip.geometry import TREE_OFFSETS
from pathflip.synth.output import check_same_cohort, draw_all, make_folders, write_csv, write_json
from pathflip.synth.scene import SITE_STAINS, SPLITS
from pathflip.synth.tiff import write_slide
from pathflip.synth.tree_pixels import ARCHITECTURES, GRID, MPP, NUCLEI, Parent, render

VERSION = 1
"""Changes when the same seed gives other slides or other text."""
MODEL_ID = "oracle"

GLASS, BENIGN, MIXED, GUESSED = 0.08, 0.10, 0.60, 0.15
"""Shares of squares that are glass or benign stroma, of tumours with two nuclear types, and of
captions that guess at the cue their level does not show."""

# The word of a cue stands in one form alone, as one in all forms would be in most bags of keywords,
# and such keywords are dropped at import.
FORMS = {
    "trabecular": (
        "Tumour cells grow in a trabecular fashion",
        "There are long parallel cords",
        "Ribbons of tumour are seen",
        "The epithelium forms anastomosing beams",
    ),
    "nested": (
        "Tumour cells grow in a nested fashion",
        "There are discrete rounded islands",
        "Ball-like clusters of tumour are seen",
        "The epithelium forms separate packets",
    ),
    "cribriform": (
        "Tumour cells grow in a cribriform fashion",
        "There are sieve-like sheets",
        "Punched-out lumina are seen",
        "The epithelium is fenestrated",
    ),
    "solid": (
        "Tumour cells grow in a solid fashion",
        "There are irregular confluent masses",
        "Patternless growth of tumour is seen",
        "The epithelium forms winding plates",
    ),
    "grooved": (
        "The nuclei are grooved",
        "Chromatin lies in longitudinal stripes",
        "Many nuclear clefts are present",
        "Nuclear membranes look pleated",
    ),
    "stippled": (
        "The nuclei are stippled",
        "Chromatin lies in coarse dots",
        "Many salt-and-pepper clumps are present",
        "Nuclear interiors look chequered",
    ),
    "granular": (
        "The nuclei are granular",
        "Chromatin is finely dispersed",
        "A dust-like nuclear texture is present",
        "Nuclear interiors look homogeneous",
    ),
    "benign": (
        "Benign fibrous stroma is seen",
        "There is no tumour here",
        "Only connective tissue is present",
        "The field holds bland fibroblasts",
    ),
}
"""Training forms of each value; captions use these alone."""
QUERIES = {
    "trabecular": "trabecular cords and ribbons",
    "nested": "nested rounded clusters",
    "cribriform": "cribriform fenestrated sheets",
    "solid": "solid confluent plates",
    "grooved": "grooved nuclei with stripes and clefts",
    "stippled": "stippled nuclei with dots and clumps",
    "granular": "granular nuclei with dispersed texture",
}
"""Held-out wording of each value, of words that captions use in other places."""
FILLERS = (
    "the section is stained with haematoxylin and eosin",
    "staining is even",
    "staining is a little pale",
    "pink collagen lies between the cells",
    "the background is eosinophilic",
    "the cytoplasm is moderate in amount",
    "cell borders are indistinct",
    "scattered lymphocytes may be reactive",
    "small vessels are congested",
    "mild oedema is noted",
    "no necrosis is identified",
    "mitotic figures are sparse",
    "the tissue is well preserved",
    "a few stromal spindle cells accompany the lesion",
    "fixation is adequate",
    "thin fibrous septa are visible",
)
TERMS = (
    *("trabecular", "parallel cords", "ribbons", "anastomosing beams"),
    *("nested", "rounded islands", "ball-like clusters", "separate packets"),
    *("cribriform", "sieve-like sheets", "punched-out lumina", "fenestrated"),
    *("solid", "confluent masses", "patternless growth", "winding plates"),
    *("grooved", "longitudinal stripes", "nuclear clefts", "pleated"),
    *("stippled", "coarse dots", "salt-and-pepper clumps", "chequered"),
    *("granular", "finely dispersed", "dust-like nuclear texture", "homogeneous"),
    *("fibrous stroma", "connective tissue", "fibroblasts"),
)
"""Lexicon of the cohort, for the extraction of keywords."""


@dataclass(frozen=True, kw_only=True)
class TreeSlide:
    """Ground truth of one slide of 1024 µm.

    Attributes:
        slide: Slide id, the file's stem.
        patient_id, split: The patient and their split.
        site: Scanner of the slide, 0 to 3.
        parents: Squares with tissue, row-major.
        stain: Strengths of haematoxylin and eosin.
        zoom: Factor of lengths.
        index: Position in the cohort; with its seed the seed of everything drawn and written.
    """

    slide: str
    patient_id: str
    site: int
    split: str
    parents: tuple[Parent, ...]
    stain: tuple[float, float]
    zoom: float
    index: int


@dataclass(frozen=True, kw_only=True)
class TreeCohort:
    """Summary of a cohort that ``make_tree_cohort`` wrote.

    Attributes:
        directory: Folder of the cohort.
        slides, patients, trees: Number of slides, patients, and squares with tissue.
        rendered, skipped: Number of slides drawn now, and of slides that were already there.
        splits: Number of slides per split.
        bytes: Size of all slide files.
        seconds: Wall time.
    """

    directory: Path
    slides: int
    patients: int
    trees: int
    rendered: int
    skipped: int
    splits: dict[str, int]
    bytes: int
    seconds: float


def make_tree_cohort(
    directory: str | Path,
    *,
    slides: int,
    seed: int = 0,
    mention: float = 0.2,
    processes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TreeCohort:
    """Write a cohort whose cues are planted at different levels; the same seed, the same bytes.

    Trees are cut with parents of 256 µm and nodes of 128 px, 16 to a slide less those of glass.
    Architecture can be read at 5x and 10x, the type of nuclei at 20x and 40x. Running it again
    draws only the slides that are missing, and a larger ``slides`` extends the cohort. Files:
    ``slides/*.tif``, ``labels.csv``, ``trees.csv``, ``tree_captions.jsonl``, ``terms.txt``,
    ``classes/*.yaml``, ``cohort.json``.

    Args:
        directory: Output folder; made when missing.
        slides: Number of slides.
        seed: Seed of all draws.
        mention: Share of captions that name the cue their level shows.
        processes: Number of processes that draw; None for one per CPU.
        progress: Called with (slides done, slides in all) after each.

    Raises:
        ConfigError: The directory holds a cohort of another kind, seed, mention or version.
        ValueError: ``slides`` is below 1 or ``mention`` no share.
    """
    if slides < 1 or not 0 <= mention <= 1:
        raise ValueError(f"slides is {slides} and mention {mention}; at least 1, and 0 to 1")
    start = time.monotonic()
    root = Path(directory)
    cohort = sample_slides(slides=slides, seed=seed)
    spec = {"kind": "trees", "version": VERSION, "seed": seed, "mention": mention}
    check_same_cohort(root / "cohort.json", spec)
    make_folders(root, "slides", "classes")
    write_json(root / "cohort.json", {**spec, "slides": slides, "forms": FORMS, "queries": QUERIES})
    _write_tables(root, cohort, seed=seed, mention=mention)
    todo = [s for s in cohort if not _path(root, s).exists()]
    work = [(s, seed) for s in todo]
    drawn = draw_all(_draw, root, work, processes)
    for done, _ in enumerate(drawn, start=slides - len(todo) + 1):
        if progress is not None:
            progress(done, slides)
    return TreeCohort(
        directory=root,
        slides=slides,
        patients=len({s.patient_id for s in cohort}),
        trees=sum(len(s.parents) for s in cohort),
        rendered=len(todo),
        skipped=slides - len(todo),
        splits={name: sum(s.split == name for s in cohort) for name in ("train", "val", "test")},
        bytes=sum(_path(root, s).stat().st_size for s in cohort),
        seconds=time.monotonic() - start,
    )


def sample_slides(*, slides: int, seed: int) -> list[TreeSlide]:
    """Sample a cohort's truth; the first n are the same whatever ``slides`` is.

    Patients own one to three slides and lie in one split: of every ten patients seven are train,
    one val and two test. Scanners and squares are drawn one by one, whatever the patient.
    """
    cohort: list[TreeSlide] = []
    patients = np.random.default_rng([seed, 0])
    splits: list[str] = []
    while len(cohort) < slides:
        if not splits:
            splits = [SPLITS[i] for i in patients.permutation(len(SPLITS))]
        split, owned = splits.pop(), int(patients.integers(1, 4))
        patient = f"p{len({s.patient_id for s in cohort}):05d}"
        for _ in range(min(owned, slides - len(cohort))):
            index = len(cohort)
            rng = np.random.default_rng([seed, 1, index])
            site = int(rng.integers(len(SITE_STAINS)))
            cohort.append(
                TreeSlide(
                    slide=f"t{index:05d}",
                    patient_id=patient,
                    site=site,
                    split=split,
                    parents=_sample_parents(rng),
                    stain=tuple(rng.uniform(0.93, 1.07, 2) * SITE_STAINS[site]),
                    zoom=float(rng.uniform(0.93, 1.07)),
                    index=index,
                )
            )
    return cohort


def _sample_parents(rng: np.random.Generator) -> tuple[Parent, ...]:
    parents = []
    for ty, tx in product(range(GRID), range(GRID)):
        what = rng.uniform()
        architecture = ARCHITECTURES[rng.integers(len(ARCHITECTURES))]
        first, second = rng.permutation(NUCLEI)[:2].tolist()
        second = second if rng.uniform() < MIXED else first
        pick = rng.permutation(4) < rng.integers(1, 4)
        if what < GLASS:
            continue
        benign = what < GLASS + BENIGN
        parents.append(
            Parent(
                tx=tx,
                ty=ty,
                architecture=None if benign else architecture,
                nuclei=() if benign else tuple(first if p else second for p in pick),
            )
        )
    return tuple(parents)


def quadrants(level: int) -> list[int | None]:
    """Return the quadrant of each node of a level, row-major; None of the root."""
    if level == 0:
        return [None]
    side = 2**level
    return [2 * (2 * r // side) + 2 * c // side for r in range(side) for c in range(side)]


_NODES = [
    (first + i, level, quadrant)
    for level, first in enumerate(TREE_OFFSETS)
    for i, quadrant in enumerate(quadrants(level))
]


def nuclei_of(parent: Parent, quadrant: int | None) -> str | None:
    """Return the nuclear type of a quadrant, of the root that of all, None where there is none."""
    kinds = set(parent.nuclei) if quadrant is None else set(parent.nuclei[quadrant : quadrant + 1])
    return kinds.pop() if len(kinds) == 1 else None


def captions(slide: TreeSlide, *, seed: int, mention: float) -> Iterator[dict[str, str]]:
    """Yield a caption of every node, as a captioner's output.

    Some captions of 5x and 10x nodes name the architecture, some of 20x and 40x nodes the nuclei.
    Some guess at the other cue, all of a tree the same: if each node guessed anew, every
    architecture would be in most bags of keywords. Benign stroma is called so at every level.
    """
    from pathflip.interop.tree_captions import PROMPT, tree_image_name  # archives: not to draw

    for parent in slide.parents:
        rng = np.random.default_rng([seed, 2, slide.index, parent.tx, parent.ty])
        draws = rng.random((len(_NODES), 2))
        forms = rng.integers(4, size=(len(_NODES), 2))
        guesses = NUCLEI[rng.integers(len(NUCLEI))], ARCHITECTURES[rng.integers(len(ARCHITECTURES))]
        fillers = rng.random((len(_NODES), len(FILLERS))).argpartition(2, 1)[:, :2]
        for node, level, quadrant in _NODES:
            coarse = level < 2
            seen = parent.architecture if coarse else nuclei_of(parent, quadrant)
            said = []
            if draws[node, 0] < mention:
                said.append(FORMS[seen or "benign"][forms[node, 0]])
            if draws[node, 1] < GUESSED:
                said.append(FORMS[guesses[not coarse]][forms[node, 1]])
            first, second = (FILLERS[i] for i in fillers[node])
            said.append(f"{first[0].upper()}{first[1:]}, and {second}")
            yield {
                "Image": tree_image_name(slide.slide, parent.tx, parent.ty, node),
                "prompt": PROMPT,
                "Answer": ". ".join(said) + ".",
                "model_id": MODEL_ID,
            }


def _path(root: Path, slide: TreeSlide) -> Path:
    return root / "slides" / f"{slide.slide}.tif"


def _draw(root: Path, work: tuple[TreeSlide, int]) -> str:
    slide, seed = work
    pixels = render(slide.parents, stain=slide.stain, zoom=slide.zoom, seed=[seed, 3, slide.index])
    write_slide(_path(root, slide), pixels, mpp=MPP, aperio=False)
    return slide.slide


def _write_tables(root: Path, cohort: Sequence[TreeSlide], *, seed: int, mention: float) -> None:
    columns = ("slide", "patient_id", "split", "site")
    rows = [(s.slide, s.patient_id, s.split, s.site) for s in cohort]
    write_csv(root / "labels.csv", columns, rows)
    write_csv(
        root / "trees.csv",
        ("slide", "tx", "ty", "node", "level", "architecture", "nuclei"),
        (
            (s.slide, p.tx, p.ty, node, level, p.architecture, nuclei_of(p, quadrant))
            for s in cohort
            for p in s.parents
            for node, level, quadrant in _NODES
        ),
    )
    lines = (json.dumps(line) for s in cohort for line in captions(s, seed=seed, mention=mention))
    write_file(root / "tree_captions.jsonl", "\n".join(lines) + "\n")
    write_file(root / "terms.txt", "\n".join(TERMS) + "\n")
    for name, classes in class_prompts().items():
        text = yaml.safe_dump({"classes": classes}, sort_keys=False, width=100)
        write_file(root / "classes" / f"{name}.yaml", text)


def class_prompts() -> dict[str, dict[str, Any]]:
    """Return zero-shot classes in held-out wording: by architecture, by nuclei, and by both.

    Classes of ``joint`` are called ``architecture/nuclei``.
    """
    joint = {f"{a}/{n}": f"{QUERIES[a]}, {QUERIES[n]}" for a, n in product(ARCHITECTURES, NUCLEI)}
    return {
        "architecture": {a: [QUERIES[a]] for a in ARCHITECTURES},
        "nuclei": {n: [QUERIES[n]] for n in NUCLEI},
        "joint": {name: [prompt] for name, prompt in joint.items()},
    }
