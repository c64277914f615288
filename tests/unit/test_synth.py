"""The synthetic cohort: what its files, labels, words and pixels promise, checked from outside."""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import openslide
import pytest
import simplejpeg
import tifffile

from pathflip.errors import ConfigError
from pathflip.evaluation.prompts import read_tasks
from pathflip.synth import atlas as textures
from pathflip.synth import make_cohort, make_slide
from pathflip.synth import scene as drawing
from pathflip.synth.atlas import NUCLEI, Atlas, colour_table, nucleus
from pathflip.synth.scene import CELL_UM, FINDINGS, lay_out, polygons, render, sample_scenes
from pathflip.synth.text import (
    ABSENT_NAMES,
    DETAILS,
    EVERYDAY,
    FORMS,
    QUERIES,
    abstain_questions,
    questions,
    sentences,
)
from pathflip.text import CANNOT_TELL

SLIDES = 12  # holds all three resolutions, both layouts and a pen mark


def digests(root: Path) -> dict[str, str]:
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(root.rglob("*"))
        if p.is_file()
    }


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("synth") / "cohort"
    summary = make_cohort(root, slides=SLIDES, seed=3, processes=1, size_um=512.0)
    assert (summary.slides, summary.rendered, summary.skipped) == (SLIDES, SLIDES, 0)
    return root


@pytest.fixture(scope="module")
def scenes():  # type: ignore[no-untyped-def]
    return sample_scenes(slides=2000, seed=0)


def rows(root: Path, name: str) -> list[dict[str, str]]:
    with (root / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_slides_open_with_their_scale(cohort: Path) -> None:
    labels = rows(cohort, "labels.csv")
    assert {row["mpp"] for row in labels} == {"0.5", "0.25", "0.2738"}
    assert {row["layout"] for row in labels} == {"generic", "aperio"}
    for row in labels:
        aperio = row["layout"] == "aperio"
        path = cohort / "slides" / f"{row['slide']}.{'svs' if aperio else 'tif'}"
        with openslide.OpenSlide(path) as slide:
            side = round(512 / float(row["mpp"]))
            assert slide.dimensions == (side, side)
            mpp = float(slide.properties["openslide.mpp-x"])
            assert mpp == pytest.approx(float(row["mpp"]), rel=1e-5)
            assert slide.properties["openslide.vendor"] == ("aperio" if aperio else "generic-tiff")
            step = 4 if aperio else 2
            expected = [step**i for i in range(slide.level_count)]
            assert slide.level_downsamples == pytest.approx(expected, rel=0.01)
            assert slide.level_count >= 2
            assert list(slide.associated_images) == (["thumbnail"] if aperio else [])


def test_same_bytes_whatever_the_processes_and_resume(cohort: Path, tmp_path: Path) -> None:
    make_cohort(tmp_path, slides=3, seed=3, processes=2, size_um=512.0)
    first = digests(tmp_path)
    assert not [name for name in first if "atlas" in name or name.endswith(".partial")]
    whole = digests(cohort)
    drawn = [name for name in first if name.startswith(("slides/", "lesions/"))]
    assert len(drawn) == 6
    assert all(first[name] == whole[name] for name in drawn)

    victim = next((tmp_path / "slides").iterdir())
    victim.unlink()
    seen: list[tuple[int, int]] = []
    again = make_cohort(
        tmp_path, slides=3, seed=3, size_um=512.0, progress=lambda done, n: seen.append((done, n))
    )
    assert (again.rendered, again.skipped, seen) == (1, 2, [(3, 3)])
    assert digests(tmp_path) == first
    with pytest.raises(ConfigError, match="another seed"):
        make_cohort(tmp_path, slides=3, seed=4, size_um=512.0)
    assert digests(tmp_path) == first


def test_questions_beyond_a_slide(cohort: Path, scenes) -> None:  # type: ignore[no-untyped-def]
    """Slides with a tumour, or necrosis, answer what supposes one, and no others do."""
    labels = {row["slide"]: row for row in rows(cohort, "labels.csv")}
    items = [json.loads(line) for line in (cohort / "abstain.jsonl").read_text().splitlines()]
    assert len(items) >= 3 * len(labels)
    for item in items:
        kind = item["kind"]
        cannot = kind in ("outside", "unseen") or not labels[item["slide"]][kind]
        assert (item["answer"] == CANNOT_TELL) == cannot
        assert CANNOT_TELL not in item["options"]
        assert cannot or item["answer"] in "ABCD"[: len(item["options"])]
        assert kind != "unseen" or item["split"] == "test"
    every = [item for scene in scenes for item in abstain_questions(scene)]
    shown = {(item.kind, item.answer_text) for item in every}
    assert ("pattern", "in trabeculae") in shown
    for scene in scenes[:300]:
        for item in abstain_questions(scene):
            if item.kind == "nuclei" and scene.nuclei == "groove":
                assert item.answer_text == "nuclear grooves"
            if item.kind == "extent" and scene.necrotic_foci == 1:
                assert item.answer_text == "a single focus"


def test_tasks_ask_for_every_label_in_held_out_words(cohort: Path, scenes) -> None:  # type: ignore[no-untyped-def]
    suite = read_tasks(cohort / "tasks.yaml")
    tasks = {task.name: task for task in suite.tasks}
    assert [t.name for t in suite.tasks if t.kind == "presence"] == list(FINDINGS)
    assert [t.name for t in suite.tasks if t.kind == "binary"] == list(QUERIES)[-4:]
    assert tasks["control"].contrast == tasks["geneA"].contrast == "negation"
    labels = rows(cohort, "labels.csv")
    for task in suite.tasks:
        values = {row[task.label] for row in labels} - {""}
        known = set(task.classes) if task.kind == "multiclass" else {"0", "1"}
        assert values <= known, task.name
    said = {s.text for scene in scenes[:300] for s in sentences(scene)}
    prompts = [p for t in suite.tasks for p in (*t.prompts, *sum(t.classes.values(), ()))]
    assert len(prompts) == 8 + 4 + 2 + 3 + 4 + 2 + 2 + 4
    for prompt in prompts:
        assert not any(prompt.lower() in text.lower() for text in said), prompt


def test_a_longer_cohort_begins_with_the_shorter(scenes) -> None:  # type: ignore[no-untyped-def]
    assert sample_scenes(slides=50, seed=0) == scenes[:50]
    assert sample_scenes(slides=50, seed=1) != scenes[:50]


def test_patients_lie_in_one_split(scenes) -> None:  # type: ignore[no-untyped-def]
    owned = Counter(s.patient_id for s in scenes)
    assert set(owned.values()) == {1, 2, 3}
    for patient in owned:
        mine = [s for s in scenes if s.patient_id == patient]
        assert len({(s.split, s.site, s.organ) for s in mine}) == 1
    shares = Counter(s.split for s in scenes)
    assert shares["train"] / 2000 == pytest.approx(0.7, abs=0.03)
    assert shares["test"] / 2000 == pytest.approx(0.2, abs=0.03)
    for split in shares:
        assert {s.site for s in scenes if s.split == split} == {0, 1, 2, 3}


def rate(picked: list[bool]) -> tuple[float, float]:
    """A share and three standard errors of it; slides of a patient are not independent."""
    share = float(np.mean(picked))
    return share, 3 * (2 * max(share * (1 - share), 0.05) / len(picked)) ** 0.5


def test_confounders_hold_in_train_and_break_in_test(scenes) -> None:  # type: ignore[no-untyped-def]
    def gene_a(split: str, sites: set[int]) -> list[bool]:
        return [
            s.genes["geneA"]
            for s in scenes
            if s.split == split and s.site in sites and s.genes["geneA"] is not None
        ]

    def keratin(split: str, lung: bool) -> list[bool]:
        return [
            "keratin" in s.findings
            for s in scenes
            if s.split == split and (s.organ == "lung") == lung
        ]

    for picked, truth in (
        (gene_a("train", {2, 3}), 0.8),
        (gene_a("train", {0, 1}), 0.2),
        (gene_a("test", {2, 3}), 0.5),
        (gene_a("test", {0, 1}), 0.5),
        (keratin("train", True), 0.7),
        (keratin("train", False), 0.14),
        (keratin("test", True), 0.28),
        (keratin("test", False), 0.28),
        ([s.genes["control"] for s in scenes], 0.5),
        ([bool(s.genes["control"]) for s in scenes if s.genes["geneA"]], 0.5),
        ([s.artefact is not None for s in scenes], 0.05),
    ):
        share, margin = rate(picked)
        assert abs(share - truth) < margin


def test_genes_are_what_is_drawn(scenes) -> None:  # type: ignore[no-untyped-def]
    for s in scenes:
        assert (s.genes["geneA"] is None) == ("tumour" not in s.findings)
        assert s.genes["geneA"] in (None, s.nuclei == "nucleolus")
        both = {"tumour", "lymphoid"} <= set(s.findings)
        assert s.genes["geneB"] == ((s.til == "intermixed") if both else None)
        assert s.genes["geneC"] == {0: None, 1: False, 4: True, 5: True}[s.necrotic_foci]
        assert s.necrotic_foci == sum(x.finding == "necrosis" for x in s.lesions)
    many, one = (
        np.mean(
            [
                sum(x.long_um * x.short_um for x in s.lesions if x.finding == "necrosis")
                for s in scenes
                if s.genes["geneC"] is state
            ]
        )
        for state in (True, False)
    )
    assert many == pytest.approx(one, rel=0.1)  # area does not give the count away


def test_captions_say_what_is_there(scenes) -> None:  # type: ignore[no-untyped-def]
    held_out = [q for group in QUERIES.values() for q in group.values()]
    for s in scenes[:400]:
        said = sentences(s)
        caption = " ".join(x.text for x in said)
        mentioned = {f for f in FINDINGS if any(form + "." in caption for form in FORMS[f])}
        assert mentioned == set(s.findings)
        denied = {x.subject for x in said if x.kind == "negation"}
        assert not denied & set(s.findings)
        assert len(denied) == min(2, 8 - len(s.findings))
        assert not [q for q in held_out if q.lower() in caption.lower()]
        assert 1 <= sum(x.kind == "distractor" for x in said) <= 3
        for x in said:
            if x.kind == "finding":
                assert {s.lesions[i].finding for i in x.lesions} == {x.subject}
                drawn = sum(y.finding == x.subject for y in s.lesions)
                assert len(x.lesions) == drawn
    kinds = Counter(x.kind for s in scenes[:400] for x in sentences(s))
    assert kinds["finding"] > 0
    assert set(DETAILS) < set(kinds)


def test_held_out_words_are_known_words(scenes) -> None:  # type: ignore[no-untyped-def]
    known = set()
    for s in scenes:
        if s.split == "train":
            known |= {w.strip(".,()").lower() for x in sentences(s) for w in x.text.split()}
    for group in QUERIES.values():
        for query in group.values():
            assert {w.lower() for w in query.split()} <= known, query
    assert list(EVERYDAY) == list(FINDINGS)
    for query in EVERYDAY.values():
        assert not set(query.split()) & known, query


def test_answers_stand_anywhere(scenes) -> None:  # type: ignore[no-untyped-def]
    items = [q for s in scenes for q in questions(s)]
    assert {q.kind for q in items} == {"organ", "presence", "grade", "til", "necrotic_foci"}
    for kind in {q.kind for q in items}:
        mine = [q for q in items if q.kind == kind]
        options = {len(q.options) for q in mine}
        assert len(options) == 1
        n = options.pop()
        counts = Counter(q.answer for q in mine)
        assert set(counts) == set("ABCD"[:n])
        margin = 4 * (len(mine) / n * (1 - 1 / n)) ** 0.5
        assert max(abs(c - len(mine) / n) for c in counts.values()) < margin
    by_slide = {s.slide: s for s in scenes}
    names = {ABSENT_NAMES[f]: f for f in FINDINGS}
    for q in items:
        assert len(set(q.options)) == len(q.options)
        if q.kind == "presence":
            there = [names[o] in by_slide[q.slide].findings for o in q.options]
            assert there == ["ABCD"[i] == q.answer for i in range(4)]


def test_lesions_lie_in_tissue_and_look_different(cohort: Path) -> None:
    labels = {row["slide"]: row for row in rows(cohort, "labels.csv")}
    reports = json.loads((cohort / "sentences.json").read_text())
    checked = 0
    for slide, row in labels.items():
        shapes = json.loads((cohort / "lesions" / f"{slide}.geojson").read_text())
        assert shapes["type"] == "FeatureCollection"
        names = {f["properties"]["classification"]["name"] for f in shapes["features"]}
        assert names == {f for f in FINDINGS if row[f] == "1"}
        ids = {f["id"]: f for f in shapes["features"]}
        for i, sentence in enumerate(reports[slide]):
            for lesion in sentence["lesions"]:
                metadata = ids[lesion]["properties"]["metadata"]
                assert str(i) in metadata["sentences"].split()
        path = next((cohort / "slides").glob(f"{slide}.*"))
        with openslide.OpenSlide(path) as image:
            pixels = np.asarray(image.read_region((0, 0), 0, image.dimensions))[..., :3]
        lesions = np.zeros(pixels.shape[:2], np.uint8)
        for feature in shapes["features"]:
            geometry = feature["geometry"]
            many = geometry["type"] == "MultiPolygon"
            mask = np.zeros_like(lesions)
            for polygon in geometry["coordinates"] if many else [geometry["coordinates"]]:
                assert all(ring[0] == ring[-1] and len(ring) >= 4 for ring in polygon)
                cv2.fillPoly(mask, [np.array(ring) for ring in polygon], 1)
            lesions |= mask
            if feature["properties"]["name"] in ("mucin", "calcification") or row["artefact"]:
                continue
            inside = pixels[mask > 0].mean(0)
            glass = (np.abs(pixels[mask > 0].astype(int) - 244).max(1) < 4).mean()
            assert glass < 0.25  # bent edges, clefts
            assert 244 - inside[1] > 30
        if row["organ"] != "lung" and lesions.any():
            benign = pixels[(lesions == 0) & (pixels.min(2) < 235)]
            feature = next(f for f in shapes["features"])
            other = pixels[lesions > 0]
            gap = np.abs(benign.astype(float).mean(0) - other.mean(0)).max()
            spread = abs(benign.std() - other.std())
            assert gap + spread > 4, (slide, feature["properties"]["name"])
            checked += 1
    assert checked >= 2


def test_no_lesion_is_lost(scenes) -> None:  # type: ignore[no-untyped-def]
    for s in scenes[:150]:
        layout = lay_out(s)
        for i, (lesion, mask) in enumerate(zip(s.lesions, layout.masks, strict=True)):
            ellipse = np.pi * lesion.long_um * lesion.short_um / 16  # in cells of 4 µm
            assert mask.sum() > 0.35 * ellipse
            assert not (mask & ~layout.tissue).any()
            assert (layout.labels == 3 + i).any()


@pytest.mark.parametrize("index", [0, 5, 11])  # 0.5, 0.25 and 0.2738 µm/px
def test_a_pixel_is_the_code_of_its_own_label(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a look-up of every pixel on its own, with textures that say where they were read."""
    (scene,) = sample_scenes(slides=index + 1, seed=3, size_um=512.0)[index:]
    layout = lay_out(scene)
    side, mpp = scene.side_px, scene.mpp
    tile = np.random.default_rng(0).integers(1 << 16, size=(96, 96), dtype=np.uint16)
    strips: list[np.ndarray] = []

    def same(texture: np.ndarray, **_: object) -> np.ndarray:
        strips.append(texture)
        return texture

    monkeypatch.setattr(drawing, "_varied", same)
    monkeypatch.setattr(drawing, "colour_table", lambda *_: np.arange(1 << 16, dtype=np.uint32))
    plain = replace(scene, artefact=None)
    code = render(plain, lambda *_, **__: tile, layout=layout).view(np.uint32)[..., 0]  # type: ignore[arg-type]
    rng = np.random.default_rng([scene.seed, 4])
    shifts = rng.integers(0, 1 << 16, (3 + len(scene.lesions), 2))
    bend_x, bend_y = drawing._bends(side, mpp)
    at = (np.arange(side) + 0.5) * mpp / CELL_UM * 256
    column = (at.astype(int)[None, :] + bend_x[np.arange(side) % 512]) // 256
    row = (at.astype(int)[:, None] + bend_y[np.arange(side) % 512]) // 256
    last = len(layout.labels) - 1
    label = layout.labels[row.clip(0, last), column.clip(0, last)]
    expected = np.zeros((side, side), np.uint32)
    present = np.unique(layout.labels[layout.labels > 0]).tolist()
    y, x = np.mgrid[:side, :side]
    for one, texture in zip(present, strips, strict=True):
        own = texture[(y + shifts[one][1]) % 96, (x + shifts[one][0]) % 96]
        expected = np.where(label == one, own, expected)
    assert len(present) > 3
    assert np.array_equal(code, expected)


def test_a_texture_is_drawn_once_for_all_scales_and_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = Atlas()
    expected = {mpp: alone("mucin", mpp=mpp).copy() for mpp in (0.25, 0.2738, 0.5)}
    assert [len(code) for code in expected.values()] == [1024, 935, 512]
    drawn: list[str] = []
    draw = textures._master
    monkeypatch.setattr(textures, "_master", lambda name: drawn.append(name) or draw(name))
    for mpp, code in expected.items():
        assert np.array_equal(Atlas(tmp_path)("mucin", mpp=mpp), code)  # as another process would
    assert drawn == ["mucin"]
    with pytest.raises(KeyError):
        Atlas(tmp_path)("none such", mpp=0.5)


def test_polygons_enclose_their_mask() -> None:
    mask = np.zeros((40, 50), bool)
    mask[4:20, 6:30] = True
    mask[8:12, 10:18] = False
    mask[30:36, 40:50] = True
    canvas = np.zeros((320, 400), np.uint8)
    shapes = polygons(mask, mpp=0.5)
    assert sorted(len(rings) for rings in shapes) == [1, 2]
    for rings in shapes:
        cv2.fillPoly(canvas, [np.array(ring) for ring in rings], 1)
    expected = mask.repeat(8, 0).repeat(8, 1)
    assert (canvas.astype(bool) != expected).mean() < 0.01


@pytest.mark.parametrize("aspect", [1.0, 1.4])
def test_nuclei_differ_only_inside(aspect: float) -> None:
    shapes = {k: nucleus(k, 9.5, aspect=aspect, angle=0.4).astype(float) for k in NUCLEI}
    y, x = np.indices(shapes["plain"].shape) - shapes["plain"].shape[0] // 2
    extent = (shapes["plain"] * x * x).sum()
    for kind in NUCLEI:
        for order, power in ((0, 1), (2, x * x), (2, y * y), (2, x * y)):
            moment, plain = ((shapes[k] * power).sum() for k in (kind, "plain"))
            tolerance = 1e-4 * (10 * extent if order else plain)
            assert moment == pytest.approx(plain, abs=tolerance)
    centre = {k: v[len(v) // 2, len(v) // 2] for k, v in shapes.items()}
    assert centre["nucleolus"] > 1.3 * centre["plain"] > 2 * centre["groove"]


def test_colours_follow_beer_lambert() -> None:
    table = colour_table(1.1, 0.9).view(np.uint8).reshape(256, 256, 4)
    assert table[0, 0].tolist() == [244, 244, 244, 255]
    red = 244 * np.exp(-1.6 * (0.65 * 1.1 * 0.5 + 0.09 * 0.9 * 0.3))
    assert table[50, 30, 0] == pytest.approx(red, abs=0.51)


@pytest.mark.parametrize(
    ("layout", "tile_px", "components", "mpp"),
    [("generic", 256, "ycbcr", 0.25), ("aperio", 240, "rgb", 0.5), ("aperio", 256, "ycbcr", 0.5)],
)
def test_large_slide(
    tmp_path: Path, layout: str, tile_px: int, components: str, mpp: float
) -> None:
    path = tmp_path / f"big.{'svs' if layout == 'aperio' else 'tif'}"
    make_slide(
        path,
        width=5000,
        height=4200,
        mpp=mpp,
        layout=layout,
        tile_px=tile_px,
        components=components,
        seed=5,
    )
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    with openslide.OpenSlide(path) as slide:
        assert slide.dimensions == (5000, 4200)
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(mpp, rel=1e-5)
        steps = [1, 4] if layout == "aperio" else [1, 2, 4, 8]
        assert slide.level_downsamples == pytest.approx(steps, rel=0.01)
        assert slide.properties["openslide.level[0].tile-width"] == str(tile_px)
        for level in range(1, slide.level_count):
            step = steps[level]
            # JPEG at each level adds noise but no bias, and nothing is shifted.
            base = np.asarray(slide.read_region((2000, 2000), 0, (64 * step, 64 * step)))
            truth = base[..., :3].reshape(64, step, 64, step, 3).mean((1, 3))
            got = np.asarray(slide.read_region((2000, 2000), level, (64, 64)))[..., :3]
            assert np.abs((truth - got).mean((0, 1))).max() < 1.5
            still = np.corrcoef(truth.ravel(), got.ravel())[0, 1]
            moved = np.corrcoef(truth[:-1].ravel(), got[1:].ravel())[0, 1]
            assert still > max(0.9, moved)
        corner = np.asarray(slide.read_region((0, 0), 0, (64, 64)))[..., :3]
        assert np.abs(corner.astype(int) - 244).max() <= 1
    with tifffile.TiffFile(path) as tif:
        counts = np.array(tif.pages[0].databytecounts)
        assert (tif.pages[0].jpegtables is not None) == (layout == "aperio")
        photometric = tifffile.PHOTOMETRIC.RGB if components == "rgb" else 6
        assert tif.pages[0].photometric == photometric
    tissue = np.median(counts[counts > 3000])
    assert 8_000 < tissue < 30_000
    assert counts.min() < 2_000
    other = make_slide(
        tmp_path / "again.tif",
        width=5000,
        height=4200,
        mpp=mpp,
        layout=layout,
        tile_px=tile_px,
        components=components,
        seed=5,
    )
    assert other.read_bytes() == path.read_bytes()


def test_tiles_are_whole_jpegs(tmp_path: Path) -> None:
    path = make_slide(tmp_path / "a.tif", width=1024, height=1024, mpp=0.5, tissue="lymphoid")
    with tifffile.TiffFile(path) as tif:
        page = tif.pages[0]
        raw = path.read_bytes()
        start, count = page.dataoffsets[5], page.databytecounts[5]
    tile = simplejpeg.decode_jpeg(raw[start : start + count])
    assert tile.shape == (256, 256, 3)
    with openslide.OpenSlide(path) as slide:
        same = np.asarray(slide.read_region((256, 256), 0, (256, 256)))[..., :3]
    assert np.abs(tile.astype(int) - same).max() <= 2


def test_slide_without_tissue(tmp_path: Path) -> None:
    path = make_slide(
        tmp_path / "a.svs", width=2048, height=1000, mpp=0.25, layout="aperio", tissue="glass"
    )
    with openslide.OpenSlide(path) as slide:
        pixels = np.asarray(slide.read_region((0, 0), 0, slide.dimensions))[..., :3]
    assert np.abs(pixels.astype(int) - 244).max() <= 1


def test_bad_arguments_leave_nothing(tmp_path: Path) -> None:
    for wrong in ({"layout": "ndpi"}, {"tile_px": 250}, {"tissue": "liver"}, {"width": 0}):
        with pytest.raises(ValueError, match=r"."):
            make_slide(tmp_path / "a.tif", **({"width": 512, "height": 512, "mpp": 0.5} | wrong))
    with pytest.raises(ValueError, match="at least"):
        make_cohort(tmp_path / "c", slides=0)
    assert list(tmp_path.iterdir()) == []
