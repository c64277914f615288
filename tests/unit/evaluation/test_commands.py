"""The commands and the page: what they print and write, on the planted archive and model."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml

from pathflip.archive.captions import Caption, write_captions
from pathflip.archive.commit import Committer
from pathflip.cli import main
from pathflip.interop.annotation_files import read_objects
from tests.unit.evaluation import planted

TASKS = {
    "templates": "CLASSNAME",
    "tasks": [
        {"name": "tumour", "prompts": ["tumour"], "negative_prompts": ["no tumour"],
         "score": "local"},
        {"name": "necrosis", "prompts": ["necrosis"], "score": "local"},
        {"name": "organ", "kind": "multiclass",
         "classes": {"lung": "lung", "colon": "colon"}},
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A planted archive with captions and a task file where the slides would lie."""
    folder = tmp_path_factory.mktemp("commands")
    slides = planted.sample(seed=1)
    archive = planted.build(folder, slides)
    captions = [
        Caption(slide_id=s.name, text=f"tissue of {s.organ} with {' and '.join(s.lesions)}")
        for s in slides
    ]
    with Committer(archive.uri) as committer:
        write_captions(committer, captions, source="made")
    (folder / "tasks.yaml").write_text(yaml.safe_dump(TASKS))
    return archive.uri


@pytest.fixture(autouse=True)
def run_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Every --run is the planted model, with a metrics.jsonl of its own."""
    lines: list[dict[str, Any]] = [
        {"step": i, "loss_slide": 3 / i, "loss_region": 0.6, "lr": 1e-3} for i in range(1, 600)
    ]
    recall = {"r@1": 0.1, "r@5": 0.4, "r@10": 0.6}
    val = {"itr": recall, "tir": recall, "chance": recall, "loss_slide": 1.0, "loss_region": None}
    lines.insert(300, {"step": 300, "val": val})
    text = "\n".join(json.dumps(line) for line in lines) + '\n{"step": 601, "lo'
    (tmp_path / "metrics.jsonl").write_text(text)
    run = planted.planted_run()
    run.path = tmp_path
    run.name = "<b>bold</b>_00000000"
    run.config = {"preset": "pathflip/mini", "lr": 1e-3, "model": {"tau": 0.1}}
    monkeypatch.setattr("pathflip.checkpoints.load_run", lambda *args, **options: run)
    return tmp_path


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    with pytest.raises(SystemExit) as left:
        main([*arguments, "--json"])
    out = capsys.readouterr().out
    assert out.count("\n") == 1, out
    return left.value.code, json.loads(out)


def test_retrieval(uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = command(
        capsys, "evaluate", "retrieval", "--archive", uri, "--run", "R", "--split", "all"
    )
    assert code == 0
    assert (found["n"], found["protocol"], found["no_caption"]) == (24, "batch64", 0)
    # Captions say organ and findings, and the planted slide vector holds the same.
    assert found["itr"]["r@1"] > 2 * found["chance"]["r@1"]
    assert found["tir"]["r@10"] > 0.9
    assert set(found["shuffled"]["itr"]["r@5"]) == {"mean", "sd"}


def test_zeroshot_grounding_and_classify(uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, found = command(capsys, "evaluate", "zeroshot", "--archive", uri, "--run", "R")
    assert set(found) == {"tumour", "necrosis", "organ"}
    assert found["organ"]["accuracy"] == 1
    assert found["tumour"]["n"] == 8
    code, found = command(
        capsys, "evaluate", "grounding", "--archive", uri, "--run", "R", "--variant", "all",
        "--split", "all",
    )  # fmt: skip
    assert code == 0
    assert found["pointing"] == found["patch_ap"] == 1
    assert set(found["variants"]) == {"attn", "region_only", "cosine", "product"}
    assert 0 < found["pointing_chance"] < 0.2
    _, rows = command(
        capsys, "classify", "--archive", uri, "--run", "R", "--classes", "lung,colon",
        "--slide", "s003",
    )  # fmt: skip
    assert len(rows) == 1
    assert set(rows[0]) == {"slide_id", "scores", "label"}


def test_ground_writes_what_it_says(
    uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slides = planted.sample(seed=1)
    slide = next(s for s in slides if "tumour" in s.lesions and s.mpp == 0.2738)
    arguments = ("ground", slide.name, "tumour", "--archive", uri, "--run", "R")
    _, found = command(capsys, *arguments, "--out", str(tmp_path / "a.png"), "--min-patches", "2")
    x, y, w, h = (v * 32 / slide.mpp for v in slide.lesions["tumour"])
    hot = [p for p in found["patches"] if p["heat"] > 1e-2]
    assert hot
    for patch in hot:
        assert x - 1 <= patch["x0"] <= x + w
        assert y - 1 <= patch["y0"] <= y + h
        assert patch["size0"] == pytest.approx(32 / slide.mpp, abs=1)
    (box,) = found["boxes"]
    assert box["x0"] <= x + w / 2 <= box["x0"] + box["w0"]
    assert box["y0"] <= y + h / 2 <= box["y0"] + box["h0"]
    assert box["x_um"] == pytest.approx(box["x0"] * slide.mpp, abs=1e-3)
    picture = cv2.imread(str(tmp_path / "a.png"))
    assert picture.shape == (128, 128, 3)
    assert np.abs(picture.astype(int) - 230).max() > 80
    command(capsys, *arguments, "--out", str(tmp_path / "a.geojson"), "--min-patches", "2")
    first, *tiles = read_objects(tmp_path / "a.geojson")
    assert first.polygons[0][0].min(axis=0).tolist() == [box["x0"], box["y0"]]
    assert len(tiles) == len(found["patches"])
    code, said = command(capsys, *arguments, "--out", str(tmp_path / "a.tiff"))
    assert (code, said["error"]["code"]) == (2, "out")
    code, said = command(capsys, "ground", slide.name, " ", "--archive", uri, "--run", "R")
    assert code == 2


class Page(HTMLParser):
    """Counts tags and fails on badly nested ones."""

    VOID = {"meta", "link", "img", "input", "br"}  # noqa: RUF012

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_all_of_it_on_one_page(
    uri: str, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spread = {"mean": 0.5, "sd": 0.1, "ci": [0.4, 0.6], "n": 3, "values": [0.5]}
    (run_folder / "ablations").mkdir()
    (run_folder / "ablations" / "ablations.json").write_text(
        json.dumps(
            {
                "table": {"full": {"pointing": spread}, "global_only": {"pointing": spread}},
                "difference": {"global_only": {"pointing": spread}},
                "chance": {"pointing": 0.1},
                "seeds": [0, 1, 2],
                "split": "test",
            }
        )
    )
    out = run_folder / "page.html"
    arguments = ("--archive", uri, "--run", "R", "--split", "all", "--out", str(out))
    code, found = command(capsys, "evaluate", "all", *arguments)
    assert code == 0
    assert found["grounding"]["pointing"] == 1
    assert found["zeroshot"]["organ"]["accuracy"] == 1
    assert found["zeroshot_summary"]["presence"]["tasks"] == 2
    assert found["retrieval"]["n"] == found["retrieval_full"]["n"] == 24
    source = out.read_text(encoding="utf-8")
    page = Page(source)
    names = [tag for tag, _ in page.tags]
    assert "script" not in names
    assert not any(key.startswith("on") or key == "style" for _, a in page.tags for key in a)
    links = [a[key] or "" for _, a in page.tags for key in ("href", "src") if key in a]
    assert all(link.startswith(("#", "data:")) for link in links)
    assert "<b>bold</b>" not in source
    sections = [a.get("id") for tag, a in page.tags if tag == "section"]
    assert sections == ["training", "metrics", "search", "grounding", "ablations", "settings"]
    # Both losses, recall and its chance, the learning rate; 599 steps are drawn as 240 points.
    curves = [a for tag, a in page.tags if tag == "path" and "curve" in (a["class"] or "")]
    assert len(curves) == 2 + 1 + 6 + 1
    assert (curves[0]["d"] or "").count("L") == 239
    assert sum(tag == "article" for tag in names) == 2  # a finding each
    assert "hottest patch inside" in source
    assert "hottest patch outside" not in source
    hits = [a["class"] for tag, a in page.tags if tag == "li" and a.get("class")]
    assert hits[:5] == ["right"] * 5  # the planted model finds tumour first


def test_an_archive_without_any_truth(archive: Any, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = command(capsys, "evaluate", "all", "--archive", archive.uri, "--run", "R")
    assert code == 0
    assert found["retrieval"] is found["zeroshot"] is found["grounding"] is None
    code, said = command(capsys, "evaluate", "zeroshot", "--archive", archive.uri, "--run", "R")
    assert (code, said["error"]["code"]) == (2, "no_tasks")
    code, said = command(capsys, "evaluate", "retrieval", "--archive", archive.uri, "--run", "R")
    assert (code, said["error"]["code"]) == (2, "no_captions")
