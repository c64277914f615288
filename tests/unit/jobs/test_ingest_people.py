"""Whole ingests of small slides, actors in this process: who gets what a side file gives."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from jobs import ingest as jobs_ingest
from jobs.ingest.config import IngestConfig
from pathflip.archive import Archive
from pathflip.geometry import Tiling
from pathflip.interop.labels import import_labels, read_labels
from tests.in_threads import in_threads

TCGA = "TCGA-AA-0001-01Z-00-DX1.0a1b2c3d-1111-2222-3333-444455556666"
Job = Callable[..., Any]


def slide(path: Path, seed: int, *, mpp: float | None = 0.5) -> Path:
    """Write a slide of 512 px: pink noise with glass around it."""
    rng = np.random.default_rng(seed)
    pixels = np.full((512, 512, 3), 244, np.uint8)
    pixels[64:448, 64:448] = rng.integers(0, 90, (384, 384, 1)) + np.array([160, 70, 130])
    path.parent.mkdir(parents=True, exist_ok=True)
    scale: dict[str, Any] = {}
    if mpp is not None:
        scale = {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, pixels, tile=(256, 256), photometric="rgb", **scale)
    return path


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """``job(**settings)`` ingests the folder ``in`` into ``archive``, without Ray."""

    def run(*, dry: bool = False, **settings: Any) -> Any:
        tiling = Tiling(region_um=256, patch_um=128)
        config = IngestConfig(tiling=tiling, device="cpu", **settings)
        do = jobs_ingest.dry_run if dry else jobs_ingest.ingest
        with in_threads():
            return do([str(tmp_path / "in")], str(tmp_path / "archive"), config)

    return run


def rows(folder: Path) -> dict[str, dict[str, Any]]:
    """Return {path below ``in``: row of slides}."""
    stored = Archive(folder / "archive").slides().to_pylist()
    return {str(Path(row["uri"]).relative_to(folder / "in")): row for row in stored}


def patients(folder: Path) -> dict[str, str | None]:
    return {name: row["patient_id"] for name, row in rows(folder).items()}


def test_who_a_line_of_the_patients_is_about(job: Job, tmp_path: Path) -> None:
    """Equal names in two folders, copies, TCGA names, space and missing cells, in one ingest."""
    people = tmp_path / "people.csv"
    names = ("siteA/1.tif", "siteB/1.tif", "p1b.tif", "x1.TIF", f"{TCGA}.tif")
    for seed, name in enumerate(names):
        slide(tmp_path / "in" / name, seed)
    shutil.copy(tmp_path / "in" / "p1b.tif", tmp_path / "in" / "a copy.tif")  # sorts before it
    people.write_text(
        "slide;patient_id;grade\n1.tif;PA;1\np1b ;P1;2\nx1.tif;nan;3\n"
        "TCGA-AA-0001-01Z-00-DX1;P1\u00a0;nan\nnobody;P7;1\n",
        encoding="utf-8",
    )
    planned = job(dry=True, patients=str(people)).as_json()
    assert planned["patients"]["unmatched"] == ["nobody"]
    assert not (tmp_path / "archive").exists()
    done = job(patients=str(people))
    assert done.slides == {"ready": 5, "quarantined": 0, "empty": 0, "skipped": 1}
    assert patients(tmp_path) == {
        "siteA/1.tif": None, "siteB/1.tif": None, "a copy.tif": "P1", "x1.TIF": None,
        f"{TCGA}.tif": "P1",
    }  # fmt: skip
    assert rows(tmp_path)["a copy.tif"]["labels"] == '{"grade": "2"}'
    assert rows(tmp_path)[f"{TCGA}.tif"]["labels"] is None
    document = done.as_json()
    assert document["patients"] == {
        "rows": 5, "matched": 3, "unmatched": ["nobody"], "ambiguous": ["1.tif"],
    }  # fmt: skip
    assert "side_files" not in document
    assert "mpp_csv" not in document

    # corrected, for slides that are all in the archive; one that is not in the file stays as it was
    people.write_text("slide,patient_id\nsiteA/1,PA\nsiteB/1.tif,PB\np1b,P1\n")
    assert job(patients=str(people)).slides["skipped"] == 6
    assert patients(tmp_path) == {
        "siteA/1.tif": "PA", "siteB/1.tif": "PB", "a copy.tif": "P1", "x1.TIF": None,
        f"{TCGA}.tif": "P1",
    }  # fmt: skip
    embedded = Archive(tmp_path / "archive").embeddings().to_pylist()
    ids = {row["slide_id"]: row["patient_id"] for row in rows(tmp_path).values()}
    assert {(row["slide_id"], row["patient_id"]) for row in embedded} == set(ids.items())

    # a copy that comes later, and a table by case, leave patients alone
    shutil.copy(tmp_path / "in" / f"{TCGA}.tif", tmp_path / "in" / "0 later.tif")
    people.write_text("slide,patient_id\nTCGA-AA-0001-01Z-00-DX1,P1\n")
    job(patients=str(people))
    cases = tmp_path / "cases.csv"
    cases.write_text("case_id,stage\nTCGA-AA-0001,II\n")
    import_labels(str(tmp_path / "archive"), cases, read_labels(cases))
    (row,) = (row for name, row in rows(tmp_path).items() if TCGA in name)
    assert (row["patient_id"], row["aliases"]) == ("P1", [str(tmp_path / "in" / "0 later.tif")])
    assert json.loads(row["labels"]) == {"stage": "II"}


def test_links_and_equal_copies_in_two_folders_keep_their_patient(job: Job, tmp_path: Path) -> None:
    folder, people = tmp_path / "in", tmp_path / "people.csv"
    slide(folder / "p1a.tif", 1)
    (folder / "link.tif").symlink_to(folder / "p1a.tif")
    slide(folder / "day1" / "2.tif", 2)
    (folder / "backup").mkdir()
    shutil.copy(folder / "day1" / "2.tif", folder / "backup" / "2.tif")
    people.write_text("slide,patient_id\np1a,P1\n2,P2\n")
    done = job(patients=str(people))
    assert done.as_json()["patients"]["ambiguous"] == []
    assert patients(tmp_path) == {"link.tif": "P1", "backup/2.tif": "P2"}
    assert job(patients=str(people)).as_json()["patients"]["matched"] == 2


def test_a_resolution_given_for_one_of_two_copies_is_the_slides(job: Job, tmp_path: Path) -> None:
    scale = tmp_path / "mpp.csv"
    slide(tmp_path / "in" / "p1b.tif", 3, mpp=None)
    shutil.copy(tmp_path / "in" / "p1b.tif", tmp_path / "in" / "a copy.tif")
    scale.write_text("slide,mpp\np1b,0.5\n")
    done = job(mpp_csv=str(scale))
    assert (done.slides["ready"], done.slides["quarantined"]) == (1, 0)
    assert done.as_json()["mpp_csv"] == {
        "rows": 1, "matched": 1, "unmatched": [], "ambiguous": [],
    }  # fmt: skip
    (row,) = rows(tmp_path).values()
    assert (row["mpp"], row["mpp_source"]) == (0.5, "override")
    assert job(mpp_csv=str(scale)).slides["skipped"] == 2


def test_an_outline_in_any_spelling_is_the_tissue_of_its_slide(job: Job, tmp_path: Path) -> None:
    slide(tmp_path / "in" / "p1a.tif", 4)
    (tmp_path / "drawn").mkdir()
    ring = [[0, 0], [256, 0], [256, 256], [0, 256], [0, 0]]
    drawn = {"type": "Feature", "properties": {},
             "geometry": {"type": "Polygon", "coordinates": [ring]}}  # fmt: skip
    (tmp_path / "drawn" / "P1A.JSON").write_text(json.dumps(drawn))
    done = job(tissue_dir=str(tmp_path / "drawn"))
    assert done.as_json()["tissue"]["matched"] == 1
    (row,) = rows(tmp_path).values()
    assert row["n_patches"] == 1  # 128 µm at 0.5: the square, and nothing of the rest
