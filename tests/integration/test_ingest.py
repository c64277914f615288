"""The ingest job when nothing goes wrong, and when the command line asks for what cannot be."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import SETTINGS, Clean, content, listing
from tests.s3 import Store

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]

GIVEN = [word for setting in SETTINGS for word in ("-o", setting)]
Shell = Callable[..., tuple[int, str, str]]


@pytest.fixture
def pathflip(capfd: pytest.CaptureFixture[str]) -> Shell:
    """``pathflip(arguments…) -> (exit code, stdout, stderr)``, in this process."""
    from pathflip.cli import main

    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, err

    return run


# -- a clean run ----------------------------------------------------------------------------------


def test_every_slide_is_ready_and_counted(slides: Path, clean: Clean) -> None:
    from pathflip.archive.verify import verify

    assert clean.result.slides == {"ready": 7, "quarantined": 0, "empty": 0, "skipped": 0}
    assert clean.result.exit_code == 0
    rows = [entry["row"] for entry in clean.content.values()]
    assert {Path(row["uri"]).name for row in rows} == set(os.listdir(slides))
    assert clean.result.regions == sum(row["n_regions"] for row in rows)
    assert clean.result.patches == sum(row["n_patches"] for row in rows) > 500
    assert not verify(clean.archive).damaged


@pytest.mark.parametrize(
    ("name", "mpp", "size", "reader"),
    [
        ("a.svs", 0.5, (2048, 2048), "direct"),
        ("b.tif", 0.25, (4096, 4096), "direct"),
        ("c.tif", 0.37, (3072, 2048), "direct"),
        ("g.tif", 0.5, (2048, 2048), "direct"),
    ],
)
def test_slide_is_described_as_it_is(
    name: str, mpp: float, size: tuple[int, int], reader: str, slides: Path, clean: Clean
) -> None:
    (row,) = (e["row"] for e in clean.content.values() if Path(e["row"]["uri"]).name == name)
    assert row["sha256"] == hashlib.sha256((slides / name).read_bytes()).hexdigest()
    assert row["mpp"] == pytest.approx(mpp, rel=1e-3)
    assert (row["width"], row["height"]) == size
    assert (row["reader"], row["mpp_source"], row["tiles_bad"]) == (reader, "metadata", 0)


def test_features_are_those_of_the_pixels_at_their_place(slides: Path, clean: Clean) -> None:
    """OpenSlide's own pixels, encoded by themselves, sit in the slot of their coordinates."""
    import openslide

    from pathflip import Archive
    from pathflip.encoders import load_encoder

    archive = Archive(clean.archive)
    (slide,) = (
        slide for slide, e in clean.content.items() if Path(e["row"]["uri"]).name == "d.svs"
    )
    features, mask, _ = archive.features_array(slide)
    regions = archive.regions(slide).to_pylist()
    encoder = load_encoder("texture", device="cpu")
    with openslide.OpenSlide(str(slides / "d.svs")) as source:
        for index in (3, len(regions) // 2, len(regions) - 4):
            region = regions[index]
            slots = np.flatnonzero(mask[index])
            pixels = np.stack(
                [
                    np.asarray(
                        source.read_region(
                            (region["x0"] + slot % 4 * 256, region["y0"] + slot // 4 * 256),
                            0,
                            (256, 256),
                        ).convert("RGB")
                    )
                    for slot in slots.tolist()
                ]
            )
            truth = encoder(pixels)
            stored = features[index][slots].astype(np.float32)
            gaps = np.abs(stored[:, None] - truth[None]).mean(axis=2)
            assert (gaps.argmin(axis=1) == np.arange(len(slots))).all()
            assert gaps.diagonal().max() < 0.05


def test_pixels_stay_out_of_the_object_store(clean: Clean) -> None:
    """A store of 80 MiB serves a run over more pixels than that, and nothing spills."""
    from tests.conftest import STORE_BYTES

    assert clean.result.patches * 256 * 256 * 3 > STORE_BYTES
    assert clean.peak_bytes < 3 << 30  # of every Ray process of the session, shared pages and all
    assert not [path for path in clean.spilled.rglob("*") if path.is_file()]


# -- doing it again -------------------------------------------------------------------------------


def test_again_does_nothing_and_more_adds_only_itself(
    slides: Path, clean: Clean, job_here: Callable[..., Any], tmp_path: Path
) -> None:
    """Resume: a new slide, copies under other names, a slide whose file was replaced."""
    from pathflip.synth import make_slide

    archive = tmp_path / "archive"
    shutil.copytree(clean.archive, archive)
    data = {name: it for name, it in listing(archive).items() if "/data/" in name}
    again = job_here([slides, slides / "a.svs", slides], archive)
    assert (again.slides["skipped"], again.slides["ready"], again.patches) == (7, 0, 0)
    assert {name: it for name, it in listing(archive).items() if "/data/" in name} == data
    assert content(archive) == clean.content

    more = tmp_path / "more"
    more.mkdir()
    make_slide(more / "new.svs", width=1024, height=1024, mpp=0.5, layout="aperio", seed=40)
    shutil.copy(more / "new.svs", more / "same content.svs")
    shutil.copy(slides / "a.svs", more / "known.svs")
    added = job_here([slides, more], archive)
    assert added.slides == {"ready": 1, "quarantined": 0, "empty": 0, "skipped": 9}
    found = content(archive)
    (new,) = set(found) - set(clean.content)
    row = found.pop(new)["row"]
    names = {Path(name).name for name in (row["uri"], *row["aliases"])}
    assert names == {"new.svs", "same content.svs"}
    for slide, entry in clean.content.items():
        aliases = [str(more / "known.svs")] if slide.startswith("a-") else []
        assert found[slide].pop("row") == entry["row"] | {"aliases": aliases}
        assert found[slide] == {key: it for key, it in entry.items() if key != "row"}

    make_slide(more / "new.svs", width=1024, height=1024, mpp=0.5, layout="aperio", seed=41)
    changed = job_here(more / "new.svs", archive)
    assert changed.slides["ready"] == 1
    final = content(archive)
    (newer,) = (s for s, e in final.items() if e["row"]["uri"] == str(more / "new.svs"))
    assert newer != new
    assert final[new]["row"]["uri"] == str(more / "same content.svs")  # the copy keeps the old one
    assert final[newer]["row"]["sha256"] != row["sha256"]


def test_slides_of_an_object_store_become_what_files_become(
    slides: Path, clean: Clean, job: Callable[..., Any], store: Store, bucket: str, tmp_path: Path
) -> None:
    """All of it through Ray, in room for the largest of the slides alone."""
    names = ("a.svs", "c.tif", "g.tif")
    for name in names:
        store.request(
            "PUT", f"{bucket.removeprefix('s3:/')}/x/{name}", (slides / name).read_bytes()
        )
    largest = max((slides / name).stat().st_size for name in names)
    settings = (f"stage_dir={tmp_path}", f"stage_gb={largest / 1e9}")
    done = job([f"{bucket}/x"], tmp_path / "archive", *settings)
    assert done.slides == {"ready": 3, "quarantined": 0, "empty": 0, "skipped": 0}
    found = content(tmp_path / "archive")
    known = {s: e for s, e in clean.content.items() if Path(e["row"]["uri"]).name in names}
    assert set(found) == set(known)
    for slide, entry in known.items():
        row = found[slide]["row"]
        name = Path(entry["row"]["uri"]).name
        assert row == entry["row"] | {"uri": f"{bucket}/x/{name}", "mtime_ns": row["mtime_ns"]}
        assert found[slide] | {"row": None} == entry | {"row": None}
    staged = list(tmp_path.glob("pathflip-stage-*/*/*/*"))
    assert sum(path.stat().st_size for path in staged) <= largest
    again = job([f"{bucket}/x"], tmp_path / "archive", *settings)
    assert (again.slides["skipped"], again.patches) == (3, 0)


# -- the command line -----------------------------------------------------------------------------


def test_json_is_all_of_stdout(slides: Path, clean: Clean, pathflip: Shell, tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    code, out, _ = pathflip("ingest", slides / "a.svs", "--archive", archive, "--json", *GIVEN)
    assert code == 0
    document = json.loads(out)
    assert set(document) == {"slides", "regions", "patches", "seconds", "patches_per_second"}
    assert document["slides"] == {"ready": 1, "quarantined": 0, "empty": 0, "skipped": 0}

    code, out, _ = pathflip("slides", "list", "--archive", archive, "--json")
    assert code == 0
    (row,) = json.loads(out)
    assert set(row) >= {
        "slide_id", "uri", "status", "reason", "mpp", "mpp_source", "width", "height",
        "n_regions", "n_patches", "tiles_bad", "sha256",
    }  # fmt: skip
    assert row["status"] == "ready"

    code, out, _ = pathflip("archive", "stats", "--archive", archive, "--json")
    assert code == 0
    stats = json.loads(out)
    assert set(stats) >= {"slides", "regions", "patches", "encoders", "bytes"}
    assert (stats["slides"], stats["patches"]) == (1, document["patches"])
    assert set(stats["encoders"]["texture"]) >= {"dim", "regions"}

    code, out, _ = pathflip(
        "search", "--slide", row["slide_id"], "--archive", clean.archive, "-k", "5", "--json"
    )
    assert code == 0
    hits = json.loads(out)
    assert [hit["rank"] for hit in hits] == [1, 2, 3, 4, 5]
    keys = {"rank", "score", "slide_id", "region_id", "x0", "y0", "size0", "mpp"}
    assert all(keys <= set(hit) for hit in hits)
    assert [hit["score"] for hit in hits] == sorted((h["score"] for h in hits), reverse=True)


BAD_INPUT = {
    "missing folder": ["{none}", "--archive", "{new}"],
    "folder without slides": ["{bare}", "--archive", "{new}"],
    "archive is a file": ["{slides}", "--archive", "{file}"],
    "archive below a file": ["{slides}", "--archive", "{file}/x"],
    "folder with other files": ["{slides}", "--archive", "{other}"],
    "unknown encoder": ["{slides}", "--archive", "{new}", "--encoder", "textur"],
    "missing weights": ["{slides}", "--archive", "{new}", "--encoder", "uni2={bare}"],
    "unknown setting": ["{slides}", "--archive", "{new}", "-o", "chunk_region=3"],
    "impossible tiling": ["{slides}", "--archive", "{new}", "-o", "tiling.region_um=500"],
    "no CSV": ["{slides}", "--archive", "{new}", "--mpp-csv", "{none}"],
    "CSV without its columns": ["{slides}", "--archive", "{new}", "--mpp-csv", "{file}"],
    "CSV with a wrong scale": ["{slides}", "--archive", "{new}", "--mpp-csv", "{wrong}"],
    "no GPU": ["{slides}", "--archive", "{new}", "-o", "device=cuda"],
    "other tiling": ["{slides}", "--archive", "{clean}", "-o", "tiling.region_um=1024"],
    "other encoder": ["{slides}", "--archive", "{clean}", "--encoder", "torchscript:{model}"],
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_sentence_and_touches_nothing(
    case: str,
    slides: Path,
    clean: Clean,
    pathflip: Shell,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """Mistyped flags and paths: exit 2, the fault, the remedy, nothing written."""
    import torch

    if case == "no GPU" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    places = {
        "slides": slides,
        "clean": clean.archive,
        "none": tmp_path / "none",
        "new": tmp_path / "new",
        "bare": tmp_path / "bare",
        "other": tmp_path / "other",
        "file": tmp_path / "file.csv",
        "wrong": tmp_path / "wrong.csv",
        "model": tmp_path / "model.pt",
    }
    places["bare"].mkdir()
    (places["bare"] / "notes.txt").write_text("no slide")
    places["other"].mkdir()
    (places["other"] / "thesis.txt").write_text("years of work")
    places["file"].write_text("a,b\n1,2\n")
    places["wrong"].write_text("slide,mpp\na,fine\n")
    if case == "other encoder":

        class Mean(torch.nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x.mean((2, 3))

        torch.jit.trace(Mean(), torch.zeros(1, 3, 224, 224)).save(places["model"])
    own = [] if "tiling" in case else ["-o", "tiling.region_um=512"]
    before = listing(tmp_path), listing(clean.archive)
    code, out, err = pathflip(
        "ingest", *(word.format(**places) for word in BAD_INPUT[case]), *own, "--json"
    )
    assert code == 2, err
    assert (listing(tmp_path), listing(clean.archive)) == before
    error = json.loads(out)["error"]
    assert error["code"]
    assert error["message"].endswith((".", "!", "?"))
    assert error["hint"], "says what is wrong, not what to do"
    (line,) = [line for line in err.splitlines() if line.startswith("pathflip: ")]
    assert error["message"] in line
    assert "Traceback" not in err
