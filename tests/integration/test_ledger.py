"""Slides that the archive already has: moved, replaced, touched, failed, extended.

All of it is decided on the driver, so the actors live in this process.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.ingest.plan import Planner
from pathflip.archive import Archive
from pathflip.archive.verify import verify
from pathflip.slides.slide import Slide
from pathflip.synth import make_slide

TEXTURE = "features_texture"


def small(path: Path, seed: int, **options: Any) -> Path:
    options = {"mpp": 0.5, "layout": "aperio"} | options
    return make_slide(path, width=1024, height=1024, seed=seed, **options)


def rows(archive: Path) -> dict[str, dict[str, Any]]:
    return {row["slide_id"]: row for row in Archive(archive).slides().to_pylist()}


@pytest.fixture(scope="module")
def ingested(
    job_here: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Path]:
    """A folder with two slides, its archive, with patients, and a copy of both."""
    home = tmp_path_factory.mktemp("ledger")
    folder, archive = home / "now" / "in", home / "now" / "archive"
    folder.mkdir(parents=True)
    small(folder / "TCGA-1.DX1.0A.svs", 1)
    small(folder / "b.svs", 2)
    people = home / "people.csv"
    people.write_text(
        "slide,patient_id,split,grade\nTCGA-1.DX1.0A,P1,train,high\nb.svs,P2,test,low\n"
    )
    done = job_here(folder, archive, f"patients={people}")
    assert done.slides == {"ready": 2, "quarantined": 0, "empty": 0, "skipped": 0}
    assert {row["patient_id"] for row in rows(archive).values()} == {"P1", "P2"}
    return folder, archive, Path(shutil.copytree(home / "now", home / "before"))


@pytest.fixture
def two(ingested: tuple[Path, Path, Path]) -> tuple[Path, Path]:
    """The folder and its archive, as they were: the archive knows slides by where they lie."""
    folder, archive, before = ingested
    shutil.rmtree(folder.parent)
    shutil.copytree(before, folder.parent)  # with the times of files
    return folder, archive


def test_a_moved_slide_keeps_its_row_while_another_takes_its_place(job_here, two):
    folder, archive = two
    (slide,) = (s for s, row in rows(archive).items() if row["uri"].endswith("b.svs"))
    (folder / "old").mkdir()
    os.replace(folder / "b.svs", folder / "old" / "b.svs")
    small(folder / "b.svs", 3)  # scanned again under the same name
    done = job_here(folder, archive)
    assert done.slides == {"ready": 1, "quarantined": 0, "empty": 0, "skipped": 2}
    found = rows(archive)
    assert len(found) == 3
    assert found[slide]["uri"] == str(folder / "old" / "b.svs")
    assert found[slide]["patient_id"] == "P2"
    assert job_here(folder, archive).slides["skipped"] == 3
    assert verify(archive).ok


def test_a_touched_slide_is_hashed_not_embedded_again(job_here, two):
    folder, archive = two
    before = rows(archive)
    os.utime(folder / "b.svs")
    done = job_here(folder, archive)
    assert (done.slides["skipped"], done.patches) == (2, 0)
    after = rows(archive)
    for slide, row in after.items():
        assert row["ingested_at"] == before[slide]["ingested_at"]
        assert row["mtime_ns"] == os.stat(row["uri"]).st_mtime_ns


def test_a_replaced_slide_leaves_nothing_of_the_old_one(job_here, two):
    folder, archive = two
    (old,) = (s for s, row in rows(archive).items() if row["uri"].endswith("b.svs"))
    small(folder / "b.svs", 4)
    assert job_here(folder, archive).slides["ready"] == 1
    assert old not in rows(archive)
    opened = Archive(archive)
    for table in ("regions", TEXTURE, "embeddings_texture"):
        assert (
            old not in opened.dataset(table).to_table(columns=["slide_id"])["slide_id"].to_pylist()
        )


def test_people_can_be_told_later(job_here, two, tmp_path):
    folder, archive = two
    people = tmp_path / "later.csv"
    people.write_text("slide,patient_id\nb,P9\n")
    assert job_here(folder, archive, f"patients={people}").slides["skipped"] == 2
    assert sorted(row["patient_id"] for row in rows(archive).values()) == ["P1", "P9"]
    told = Archive(archive).embeddings("texture").select(["slide_id", "patient_id"]).to_pylist()
    assert {row["patient_id"] for row in told if row["slide_id"].startswith("b-")} == {"P9"}
    assert verify(archive).ok


@pytest.fixture(scope="module")
def second_encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small convolution with random weights, in a file: quicker to start than transformers."""
    import torch
    from torch import nn

    net = nn.Sequential(nn.Conv2d(3, 16, 32, stride=32), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    file = tmp_path_factory.mktemp("encoder") / "net.pt"
    torch.jit.trace(net, torch.zeros(1, 3, 224, 224)).save(str(file))
    return f"torchscript:{file}"


def test_a_further_encoder_sees_the_stored_patches(job_here, two, tmp_path):
    """Here a small vision transformer with random weights, as a folder transformers loads."""
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        image_size=32, patch_size=16,
    )  # fmt: skip
    ViTModel(config).save_pretrained(tmp_path / "vit")
    folder, archive = two
    before, features = rows(archive), Archive(archive).features("b").to_pylist()
    extra = (f"encoder=hf:{tmp_path / 'vit'}", "add_encoder=true")
    done = job_here(folder, archive, *extra)
    assert done.slides == {"ready": 2, "quarantined": 0, "empty": 0, "skipped": 0}
    opened = Archive(archive)
    (name,) = set(opened.encoders()) - {"texture"}
    for slide, row in rows(archive).items():
        assert row.pop("encoders") == sorted(["texture", name])
        assert before[slide].pop("encoders") == ["texture"]
        ours, theirs = dict(row), dict(before[slide])
        assert [ours.pop("checksum"), theirs.pop("checksum")]
        assert ours == theirs  # patient, split, labels, counts
        _, mask, ids = opened.features_array(slide, "texture")
        other, other_mask, other_ids = opened.features_array(slide, name)
        assert ids == other_ids
        assert (mask == other_mask).all()
        assert ((other != 0).any(axis=-1) == mask).all()
        assert set(opened.embeddings(name)["patient_id"].to_pylist()) == {"P1", "P2"}
    assert opened.features("b", "texture").to_pylist() == features
    assert verify(archive).ok
    assert job_here(folder, archive, *extra).slides["skipped"] == 2


def test_a_failure_does_not_cost_a_good_slide(job_here, tmp_path, second_encoder):
    """The further encoder is asked for, but the slide is damaged now: it stays as it was."""
    folder, archive = tmp_path / "in", tmp_path / "archive"
    folder.mkdir()
    path = small(folder / "a.svs", 1)
    assert job_here(folder, archive).slides["ready"] == 1
    before = rows(archive)
    level = Slide(path)._direct[0]
    with open(path, "r+b") as file:  # the same size, so only the bytes tell
        for tile in range(len(level.offsets)):
            file.seek(int(level.offsets[tile]) + 2)
            file.write(b"\0" * 8)
    done = job_here(folder, archive, f"encoder={second_encoder}", "add_encoder=true")
    assert done.slides["quarantined"] == 1
    found = rows(archive)
    assert {s: r for s, r in found.items() if r["status"] == "ready"} == before
    assert Archive(archive).stats()["regions"] > 0


def test_a_resolution_once_given_is_remembered(job_here, tmp_path, second_encoder):
    folder, archive = tmp_path / "in", tmp_path / "archive"
    folder.mkdir()
    path = small(folder / "a.svs", 1)
    scale = tmp_path / "scale.csv"
    scale.write_text("slide,mpp\na,0.4\n")
    assert job_here(folder, archive, f"mpp_csv={scale}").slides["ready"] == 1
    assert job_here(folder, archive).slides["skipped"] == 1
    done = job_here(folder, archive, f"encoder={second_encoder}", "add_encoder=true")
    assert done.slides["ready"] == 1
    (row,) = rows(archive).values()
    assert (row["mpp"], row["mpp_source"], len(row["encoders"])) == (0.4, "override", 2)
    scale.write_text(f"slide,mpp\n{path},0.5\n")  # corrected: cut anew, by its path
    assert job_here(folder, archive, f"mpp_csv={scale}").slides["ready"] == 1
    (row,) = rows(archive).values()
    assert (row["mpp"], row["encoders"]) == (0.5, ["texture"])
    assert verify(archive).ok


def test_an_outline_that_cannot_be_used_says_so_and_is_read_again(job_here, tmp_path):
    folder, archive, drawn = tmp_path / "in", tmp_path / "archive", tmp_path / "drawn"
    folder.mkdir()
    drawn.mkdir()
    small(folder / "a.svs", 1)
    (drawn / "a.geojson").write_text('{"type": "FeatureCollection", "features": []}')
    assert job_here(folder, archive, f"tissue_dir={drawn}").slides["quarantined"] == 1
    (row,) = rows(archive).values()
    assert row["reason"] == "bad_outline"
    square = [[0, 0], [512, 0], [512, 512], [0, 512], [0, 0]]
    (drawn / "a.geojson").write_text(
        '{"type": "Feature", "properties": {}, "geometry": {"type": "Polygon", '
        f'"coordinates": [{square}]}}}}'
    )
    assert job_here(folder, archive, f"tissue_dir={drawn}").slides["ready"] == 1
    (row,) = rows(archive).values()
    assert row["n_patches"] == 4
    assert job_here(folder, archive, f"tissue_dir={drawn}").slides["skipped"] == 1


def test_a_copy_is_not_hashed_for_ever(job_here, two, monkeypatch):
    folder, archive = two
    shutil.copy2(folder / "b.svs", folder / "copy of b.svs")  # keeps its time
    assert job_here(folder, archive).slides["skipped"] == 3

    def nothing(*_: Any, **__: Any) -> Any:
        raise AssertionError("there was something to do")

    monkeypatch.setattr(Planner, "__call__", nothing)
    assert job_here(folder, archive).slides["skipped"] == 3
