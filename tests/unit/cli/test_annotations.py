"""Annotations from the command line: files of QuPath in and out, and what a dry run says."""

from __future__ import annotations

import json
import shutil
import uuid
from pathlib import Path
from typing import Any

import pytest

from pathflip.archive import Archive
from pathflip.archive.annotations import AnnotationStore
from pathflip.archive.commit import Committer
from pathflip.cli import main
from tests.archives import make_archive

SIZE = {"width": 4000, "height": 3000}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    uri = make_archive(tmp_path_factory.mktemp("drawn") / "a", slides=3, captions=False)
    with Committer(uri) as committer:
        committer.update_slides(
            {
                "slide000": SIZE | {"sha256": "a" * 64},
                "slide001": SIZE | {"sha256": "b" * 64, "bounds_x0": 100, "bounds_y0": 50},
            }
        )
    return uri


@pytest.fixture
def uri(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "a"))


def shell(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[object, Any, str]:
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    return ended.value.code, json.loads(out), err


def write(file: Path, *places: tuple[float, float]) -> list[str]:
    """Write points as QuPath does, and return their ids."""
    ids = [str(uuid.uuid4()) for _ in places]
    features = [
        {"type": "Feature", "id": key, "geometry": {"type": "Point", "coordinates": list(at)},
         "properties": {"objectType": "annotation", "name": f"{at}"}}
        for key, at in zip(ids, places, strict=True)
    ]  # fmt: skip
    file.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return ids


def test_a_folder_is_not_taken_for_a_slide(uri, tmp_path, capsys):
    command = ["annotations", "import", "--archive", uri, "--author", "ann"]
    code, refused, _ = shell(capsys, *command, tmp_path)
    assert (code, refused["error"]["message"]) == (2, f"{tmp_path} is a folder.")
    code, refused, _ = shell(capsys, *command, tmp_path / "slide000.xml")
    assert (code, refused["error"]["message"][:16]) == (2, "There is no file")


def test_files_go_in_and_come_out_as_they_were(uri, tmp_path, capsys):
    files = [tmp_path / f"slide00{n}.geojson" for n in (0, 1)]
    ids = [*write(files[0], (1, 2), (3, 4)), *write(files[1], (5, 6))]
    command = ["annotations", "import", *files, "--archive", uri, "--author", "ann"]
    counts = {"files": 2, "new": 3, "changed": 0, "unchanged": 0, "left_out": {}}
    assert shell(capsys, *command, "--dry-run")[1] == counts | {"dry_run": True}
    assert not (uri / "annotations.lance").exists()
    assert shell(capsys, *command)[1] == counts
    assert shell(capsys, *command)[1] == counts | {"new": 0, "unchanged": 3}

    listed = shell(capsys, "annotations", "list", "--archive", uri)[1]["annotations"]
    assert {row["id"] for row in listed} == set(ids)
    assert {row["state"] for row in listed} == {"ok"}
    # QuPath counts from the corner of a slide's bounds; the archive from that of the slide.
    assert [(row["x0"], row["y0"]) for row in listed if row["slide"] == "slide001"] == [(105, 56)]

    out = tmp_path / "out"
    export = ["annotations", "export", "--archive", uri, "--out", out]
    dry = shell(capsys, *export, "--dry-run")[1]
    assert not out.exists()
    done = shell(capsys, *export)[1]
    assert done == {k: v for k, v in dry.items() if k != "dry_run"}
    assert (done["annotations"], done["outdated"], done["without_slide"]) == (3, 0, 0)
    for file in files:
        given, made = (
            {f["id"]: f["geometry"] for f in json.loads(p.read_text())["features"]}
            for p in (file, out / file.name)
        )
        assert given == made


def test_outlines_that_the_archive_writes_can_be_imported(uri, tmp_path, capsys):
    out = tmp_path / "outlines"
    shell(capsys, "archive", "export", "--archive", uri, "--to", "qupath", "--out", out)
    files = sorted(out.iterdir())
    command = ["annotations", "import", *files, "--archive", uri, "--author", "ann"]
    code, done, _ = shell(capsys, *command)
    assert (code, done["files"]) == (0, len(files))
    assert done["new"] > 0


def test_a_dry_run_of_an_export_names_the_tables_that_are_written(uri, tmp_path, capsys):
    export = ["archive", "export", "--archive", uri, "--out", tmp_path / "tables"]
    planned = shell(capsys, *export, "--dry-run")[1]["tables"]
    assert not (tmp_path / "tables").exists()
    assert set(shell(capsys, *export)[1]["rows"]) == set(planned)


def test_files_of_other_tools_count_from_the_corner_of_the_slide(uri, tmp_path, capsys):
    file = tmp_path / "slide001.tif.annotations"
    pin = '<Region Type="Pin"><Vertices><V X="5" Y="6"/></Vertices></Region>'
    file.write_text(
        f'<Annotations><Annotation Name="Mitosis"><Regions>{pin}<Region Type="Polygon"/></Regions>'
        "</Annotation></Annotations>"
    )
    command = ["annotations", "import", file, "--archive", uri, "--author", "ann"]
    done = shell(capsys, *command)[1]
    assert (done["new"], done["left_out"]) == (1, {"areas with fewer than three points": 1})
    [row] = shell(capsys, "annotations", "list", "--archive", uri)[1]["annotations"]
    assert (row["slide"], row["x0"], row["y0"], row["class"]) == ("slide001", 5, 6, "Mitosis")


def test_regions_are_labelled_by_the_share_drawn_on_them(uri, tmp_path, capsys):
    out = tmp_path / "labels.csv"
    command = ["annotations", "regions", "--archive", uri, "--out", out]
    assert shell(capsys, *command)[0] == 2
    assert not out.exists()
    ring = [[0, 0], [4000, 0], [4000, 3000], [0, 3000], [0, 0]]
    feature = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]},
               "properties": {"classification": {"name": "=Tumor"}}}  # fmt: skip
    (tmp_path / "slide000.geojson").write_text(json.dumps(feature))
    file = tmp_path / "slide000.geojson"
    shell(capsys, "annotations", "import", file, "--archive", uri, "--author", "ann")
    planned = shell(capsys, *command, "--dry-run")[1]
    assert not out.exists()
    done = shell(capsys, *command)[1]
    assert planned == done | {"dry_run": True}
    regions = Archive(uri).regions("slide000").num_rows
    assert (done["slides"], done["labels"]) == (1, {"=Tumor": regions})
    heading, first, *_ = out.read_text().splitlines()
    assert heading == "region_id,slide_id,patient_id,rx,ry,label,share,share of =Tumor"
    assert first.endswith(",'=Tumor,1.0000,1.0000")


def test_annotations_of_slides_that_are_gone_are_told_and_kept(uri, tmp_path, capsys):
    file = tmp_path / "drawn.geojson"
    write(file, (1, 2))
    given = ["annotations", "import", file, "--archive", uri, "--author", "ann"]
    assert shell(capsys, *given)[0] == 2  # the file names no slide
    assert shell(capsys, *given, "--slide", "slide000")[1]["new"] == 1
    with Committer(uri) as committer:
        committer.drop_slides(["slide000"])
    rows = shell(capsys, "annotations", "list", "--archive", uri)[1]["annotations"]
    assert [(row["slide"], row["state"]) for row in rows] == [("slide000", "no slide")]
    out = shell(capsys, "annotations", "export", "--archive", uri, "--out", tmp_path / "out")[1]
    assert (out["files"], out["without_slide"]) == ([], 1)
    with Committer(uri) as committer:  # the same bytes, under another id
        committer.update_slides({"slide002": {"sha256": "a" * 64}})
    rows = shell(capsys, "annotations", "list", "--archive", uri)[1]["annotations"]
    assert [(row["slide"], row["state"]) for row in rows] == [("slide002", "ok")]
    with Committer(uri) as committer:
        committer.update_slides({"slide002": {"sha256": "c" * 64}})
    remove = ["annotations", "remove", "--archive", uri, "--slide", "slide000"]
    assert shell(capsys, *remove, "--dry-run")[1] == {"removed": 1, "dry_run": True}
    assert shell(capsys, *remove)[1] == {"removed": 1}
    assert AnnotationStore(uri).count() == 0


def test_removal_takes_only_what_it_is_told(uri, tmp_path, capsys):
    for author in ("ann", "bob"):
        for n in (0, 1):
            file = tmp_path / f"slide00{n}.geojson"
            write(file, (1, 2), (3, 4))
            shell(capsys, "annotations", "import", file, "--archive", uri, "--author", author)
    store = AnnotationStore(uri)
    remove = ["annotations", "remove", "--archive", uri]
    assert shell(capsys, *remove)[0] == 2
    assert shell(capsys, *remove, "--slide", "slide000", "--author", "ann")[1] == {"removed": 2}
    assert {(one.slide_id, one.author) for one in store.all()} == {
        ("slide001", "ann"), ("slide000", "bob"), ("slide001", "bob"),
    }  # fmt: skip
    first = store.all()[0]
    key = first.annotation_id.upper()
    assert shell(capsys, *remove, key, str(uuid.uuid4()))[1] == {"removed": 1}
    assert first not in store.all()
    assert shell(capsys, *remove, "--author", "bob")[1] == {"removed": 4}
    assert {one.author for one in store.all()} == {"ann"}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--author", "no name"], "no name of an author"),
        (["--author", "ann", "--slide", "slide000"], "--slide is of one file"),
    ],
)
def test_wrong_usage_writes_nothing(uri, tmp_path, capsys, more, words):
    files = [tmp_path / f"slide00{n}.geojson" for n in (0, 1)]
    for file in files:
        write(file, (1, 2))
    code, _, err = shell(capsys, "annotations", "import", *files, "--archive", uri, *more)
    assert (code, words in err) == (2, True)


def test_a_file_with_a_fault_keeps_all_files_out(uri, tmp_path, capsys):
    files = [tmp_path / f"slide00{n}.geojson" for n in (0, 1)]
    write(files[0], (1, 2))
    write(files[1], (1, 2), (1e9, 2))
    code, _, err = shell(
        capsys, "annotations", "import", *files, "--archive", uri, "--author", "ann"
    )
    assert code == 2
    assert "slide001.geojson: Feature 2: It lies beyond the slide of 4,000 x 3,000 px." in err
    assert AnnotationStore(uri).count() == 0
