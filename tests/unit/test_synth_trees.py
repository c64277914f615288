"""The cohort of patch trees: each cue is read by a linear probe at its own levels and no other."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pathflip.encoders.texture import TextureEncoder
from pathflip.errors import ConfigError
from pathflip.evaluation.prompts import read_classes
from pathflip.geometry import TREE_OFFSETS, TreeSpec, patch_tree
from pathflip.interop.labels import read_patients
from pathflip.interop.tree_captions import parse_tree_image
from pathflip.keywords import caption_keywords, corpus_frequent, extract, make_lexicon
from pathflip.slides.slide import Slide
from pathflip.slides.tissue import find_tissue
from pathflip.synth import make_tree_cohort
from pathflip.synth.tree_pixels import ARCHITECTURES, NUCLEI, nuclei_shapes
from pathflip.synth.trees import FILLERS, FORMS, QUERIES, TERMS, captions, sample_slides

SPEC = TreeSpec(parent_um=256, node_px=128)
TREES = 200
CLASS_FILES = ("architecture", "nuclei", "joint")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trees")
    summary = make_tree_cohort(root, slides=16, seed=1, processes=1)
    assert (summary.rendered, summary.skipped) == (16, 0)
    return root


def rows(root: Path, name: str) -> list[dict[str, str]]:
    with (root / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def truth(root: Path) -> dict[tuple[str, int, int], dict[int, tuple[str, str]]]:
    """The truth by (slide, tx, ty) and node."""
    found: dict[tuple[str, int, int], dict[int, tuple[str, str]]] = {}
    for row in rows(root, "trees.csv"):
        tree = found.setdefault((row["slide"], int(row["tx"]), int(row["ty"])), {})
        tree[int(row["node"])] = row["architecture"], row["nuclei"]
    return found


class Probes:
    """Held-out class probabilities of linear probes, by level, for four quadrants a tree.

    Attributes:
        node: {cue: {level: from one node of each quadrant [4 T, classes]}}.
        mean: {cue: by level, from mean features of up to four nodes of each quadrant}.
        truth: {cue: class of each quadrant [4 T]}.
    """

    def __init__(self, root: Path, *, trees: int) -> None:
        patients = {row["slide"]: row["patient_id"] for row in rows(root, "labels.csv")}
        tumours = {k: v for k, v in truth(root).items() if v[0][0]}
        keys = list(tumours)[:trees]
        assert len(keys) == trees
        rng = np.random.default_rng(0)
        choice = [[np.zeros((1, 1), np.int64)] for _ in keys]
        for nodes in choice:
            for level in (1, 2, 3):
                nodes.append(np.stack([rng.permutation(inside(level, q))[:4] for q in range(4)]))
        features = read_features(root, keys, choice)
        leaf = [int(inside(3, q)[0]) for q in range(4)]
        names = {"architecture": ARCHITECTURES, "nuclei": NUCLEI}
        self.truth = {
            cue: np.array([values.index(tumours[k][n][i]) for k in keys for n in leaf])
            for i, (cue, values) in enumerate(names.items())
        }
        self._patient = np.array([patients[slide] for slide, _, _ in keys for _ in leaf])
        mean = [x.mean(2).reshape(4 * trees, -1) for x in features]
        node = [x[:, :, 0].reshape(4 * trees, -1) for x in features]
        self.mean = {cue: [self._held_out(x, y) for x in mean] for cue, y in self.truth.items()}
        self.node = {
            cue: {level: self._held_out(node[level], self.truth[cue]) for level in levels}
            for cue, levels in {"architecture": (0, 3), "nuclei": (0, 2, 3)}.items()
        }

    def _held_out(self, x: NDArray[np.float32], y: NDArray[np.int64]) -> NDArray[np.float64]:
        out = np.zeros((len(y), y.max() + 1))
        for fitted, held in GroupKFold(5).split(x, y, self._patient):
            probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.05, tol=1e-3))
            out[held] = probe.fit(x[fitted], y[fitted]).predict_proba(x[held])
        return out

    def right(self, cue: str, probabilities: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Return whether each quadrant's cue is the most probable [4 T]."""
        return np.asarray(probabilities.argmax(1) == self.truth[cue])

    def joint(self, levels: list[int]) -> float:
        """Share of quadrants of which both cues are right, by mean probabilities of levels."""
        right = [self.right(c, np.mean([p[i] for i in levels], 0)) for c, p in self.mean.items()]
        return float((right[0] & right[1]).mean())


def inside(level: int, quadrant: int) -> NDArray[np.int64]:
    """The nodes of a quadrant at 10x, 20x or 40x, from their rows and columns."""
    side = 2**level
    row, column = np.divmod(np.arange(side**2), side)
    here = (row >= side / 2) * 2 + (column >= side / 2) == quadrant
    return TREE_OFFSETS[level] + np.flatnonzero(here)


def read_features(
    root: Path, keys: list[tuple[str, int, int]], choice: list[list[NDArray[np.int64]]]
) -> list[NDArray[np.float32]]:
    """Texture features [T, 4, n, d] of chosen nodes [4, n] by level, each read at its own mpp."""
    encode = TextureEncoder()
    found: list[list[NDArray[np.float32]]] = [[], [], [], []]
    for slide in dict.fromkeys(key[0] for key in keys):
        here = [i for i, key in enumerate(keys) if key[0] == slide]
        with Slide(root / "slides" / f"{slide}.tif") as reader:
            tx, ty = (np.array([keys[i][k] for i in here]) for k in (1, 2))
            trees = patch_tree(tx, ty, mpp=reader.mpp, spec=SPEC)
            for level in range(4):
                nodes = np.stack([choice[i][level] for i in here])
                rects = trees.rects[np.arange(len(here))[:, None, None], nodes]
                pixels = np.empty((nodes.size, SPEC.node_px, SPEC.node_px, 3), np.uint8)
                mpp = float(trees.mpp[TREE_OFFSETS[level]])
                assert reader.read_patches(rects.reshape(-1, 4), mpp=mpp, out=pixels).all()
                found[level].append(encode(pixels).reshape(*nodes.shape, -1))
    return [np.broadcast_to(x, (len(x), 4, *x.shape[2:])) for x in map(np.concatenate, found)]


@pytest.fixture(scope="module")
def probes(cohort: Path) -> Probes:
    return Probes(cohort, trees=TREES)


def test_architecture_is_read_at_5x_and_not_at_40x(probes: Probes) -> None:
    right = {k: probes.right("architecture", p) for k, p in probes.node["architecture"].items()}
    assert right[0].mean() >= 0.65  # chance 0.25
    assert right[3].mean() <= 0.40


def test_nuclei_are_read_at_20x_and_40x_and_not_at_5x(probes: Probes) -> None:
    right = {k: probes.right("nuclei", p) for k, p in probes.node["nuclei"].items()}
    assert right[0].mean() <= 0.45  # chance 0.33
    assert right[2].mean() >= 0.85
    assert right[3].mean() >= 0.85


def test_both_cues_need_more_than_one_level(probes: Probes) -> None:
    single = [probes.joint([level]) for level in range(4)]
    assert max(single) <= 0.55  # chance 0.08
    assert probes.joint([0, 1, 2, 3]) >= max(single) + 0.15


def test_slides_are_tissue_where_there_are_trees(cohort: Path) -> None:
    lines = np.arange(5) * 256 / 0.25
    trees = truth(cohort)
    for row in rows(cohort, "labels.csv")[:4]:
        with Slide(cohort / "slides" / f"{row['slide']}.tif") as slide:
            assert (slide.width, slide.height) == (4096, 4096)
            assert slide.mpp == pytest.approx(0.25, rel=1e-5)
            assert slide.level_mpps[:4] == pytest.approx([0.25, 0.5, 1, 2], rel=1e-5)
            mask = find_tissue(slide.overview(8.0), mpp=8.0, slide_mpp=slide.mpp)
        covered = mask.coverage(lines, lines)
        for ty in range(4):
            for tx in range(4):
                there = (row["slide"], tx, ty) in trees
                assert covered[ty, tx] > 0.95 if there else covered[ty, tx] < 0.4


def test_same_bytes_whatever_the_processes_and_resume(cohort: Path, tmp_path: Path) -> None:
    make_tree_cohort(tmp_path, slides=2, seed=1, processes=2)
    slides = sorted((tmp_path / "slides").iterdir())
    assert [p.name for p in slides] == ["t00000.tif", "t00001.tif"]
    for path in slides:
        assert path.read_bytes() == (cohort / "slides" / path.name).read_bytes()
    for name in ("trees.csv", "tree_captions.jsonl", "labels.csv"):
        assert (cohort / name).read_text().startswith((tmp_path / name).read_text())
    before = slides[0].stat().st_mtime_ns
    slides[1].unlink()
    again = make_tree_cohort(tmp_path, slides=2, seed=1)
    assert (again.rendered, again.skipped) == (1, 1)
    assert slides[0].stat().st_mtime_ns == before
    for other in ({"seed": 2}, {"seed": 1, "mention": 0.5}):
        with pytest.raises(ConfigError, match="another"):
            make_tree_cohort(tmp_path, slides=2, **other)


def test_truth_is_by_quadrant(cohort: Path) -> None:
    corners = patch_tree(0, 0, mpp=0.25, spec=SPEC).rects[0]
    centre = corners[:, :2] + corners[:, 2:] / 2
    quadrant = (centre[:, 1] > 512) * 2 + (centre[:, 0] > 512)
    benign = 0
    for tree in truth(cohort).values():
        assert sorted(tree) == list(range(85))
        assert len({a for a, _ in tree.values()}) == 1
        kinds = [{tree[n][1] for n in range(1, 85) if quadrant[n] == q} for q in range(4)]
        assert all(len(k) == 1 for k in kinds)
        of_all = set.union(*kinds)
        assert tree[0][1] == (of_all.pop() if len(of_all) == 1 else "")
        benign += not tree[0][0]
    assert 0 < benign < 0.25 * len(truth(cohort))


def test_patients_lie_in_one_split_and_cues_are_balanced(cohort: Path) -> None:
    found = read_patients(cohort / "labels.csv")
    assert [(r.slide, r.patient, r.split) for r in found] == [
        (s.slide, s.patient_id, s.split) for s in sample_slides(slides=16, seed=1)
    ]
    slides = sample_slides(slides=600, seed=0)
    assert slides[:50] == sample_slides(slides=50, seed=0)
    assert len({s.patient_id for s in slides}) == len({(s.patient_id, s.split) for s in slides})
    assert Counter(s.split for s in slides)["train"] / 600 == pytest.approx(0.7, abs=0.05)
    tumours = [p for s in slides for p in s.parents if p.architecture]
    n = len(tumours)
    pairs = Counter((p.architecture, k) for p in tumours for k in p.nuclei)
    assert len(pairs) == 12
    for count in pairs.values():
        assert count / (4 * n) == pytest.approx(1 / 12, abs=4 * (2 * 1 / 12 / n) ** 0.5 / 2)
    mixed = sum(len(set(p.nuclei)) == 2 for p in tumours) / n
    assert mixed == pytest.approx(0.6, abs=4 * (0.24 / n) ** 0.5)


@pytest.mark.parametrize("mention", [0.2, 0.5])
def test_captions_say_what_their_level_shows(mention: float) -> None:
    cues = {form: value for value in QUERIES for form in FORMS[value]}
    fine = {int(n): q for level in (2, 3) for q in range(4) for n in inside(level, q)}
    said: dict[bool, list[bool]] = {True: [], False: []}
    guessed = []
    bags, lexicon = [], make_lexicon(TERMS)
    for slide in sample_slides(slides=14, seed=0):
        trees = {(p.tx, p.ty): p for p in slide.parents}
        texts: dict[tuple[int, int], list[str]] = {at: [] for at in trees}
        for line in captions(slide, seed=0, mention=mention):
            image, caption = parse_tree_image(line["Image"]), line["Answer"]
            assert image is not None
            assert image.slide == slide.slide
            parent = trees[image.tx, image.ty]
            texts[image.tx, image.ty].append(caption)
            named = {cues[s] for s in caption.rstrip(".").split(". ") if s in cues}
            if not parent.nuclei:
                continue
            coarse = image.node not in fine
            own, other = (ARCHITECTURES, NUCLEI) if coarse else (NUCLEI, ARCHITECTURES)
            right = parent.architecture if coarse else parent.nuclei[fine[image.node]]
            assert named & set(own) <= {right}
            said[coarse].append(right in named)
            guessed.append(not named.isdisjoint(other))
        bags += [extract(bag, lexicon=lexicon).vocabulary for bag in texts.values()]
    for hits in (*said.values(), guessed):
        share = 0.15 if hits is guessed else mention
        assert np.mean(hits) == pytest.approx(
            share, abs=4 * (share * (1 - share) / len(hits)) ** 0.5
        )
    # Words of the cues are the lexicon's, and in few enough bags to be kept at import.
    terms = {term: {v for form, v in cues.items() if term in form.lower()} for term in TERMS}
    assert Counter(v for values in terms.values() for v in values) == dict.fromkeys(QUERIES, 4)
    words = {k for t, v in terms.items() if v for k in caption_keywords(t, lexicon=lexicon)}
    assert len(words) >= 4 * len(QUERIES)
    assert not corpus_frequent(bags) & words


def test_queries_are_new_wording_of_known_words(cohort: Path) -> None:
    known = {w for f in (*FILLERS, *sum(FORMS.values(), ())) for w in f.lower().split()}
    classes = {n: read_classes(str(cohort / "classes" / f"{n}.yaml")) for n in CLASS_FILES}
    assert list(classes["architecture"]) == list(ARCHITECTURES)
    assert list(classes["nuclei"]) == list(NUCLEI)
    assert list(classes["joint"]) == [f"{a}/{n}" for a in ARCHITECTURES for n in NUCLEI]
    for prompts in classes.values():
        for (prompt,) in prompts.values():
            assert not [f for forms in FORMS.values() for f in forms if prompt in f.lower()]
            assert {w.strip(",") for w in prompt.split()} <= known, prompt


def test_nuclei_have_one_mean_colour() -> None:
    """Means of any function of density agree between types, and 1 µm averages in the nucleus."""
    shapes = {
        kind: nuclei_shapes(np.random.default_rng(3), kind, diameter_um=7.6, count=64)
        for kind in NUCLEI
    }
    for look_up in (np.arange(256.0), np.exp(-np.arange(256) / 40), (np.arange(256) > 50) * 1.0):
        means = [look_up[s].mean() for s in shapes.values()]
        step = abs(look_up[96] - look_up[28])
        assert np.ptp(means) < 0.004 * step
    middle = slice(14, 30)  # 4 µm, without the rim
    for stack in shapes.values():
        core = stack[:, middle, middle].astype(float)
        assert core.std() > 25
        averages = core.reshape(len(core), 4, 4, 4, 4).mean((2, 4))
        assert averages.std() < 1.5
