"""Side files of ingest: slides that a line reaches, by hand for each case; opens no slide."""

import hashlib
import json
import logging
import os
from pathlib import Path

import pytest

from jobs.ingest.config import IngestConfig
from jobs.ingest.side_files import list_outlines, read_side_files
from pathflip.errors import ConfigError

UUID = "0a1b2c3d-1111-2222-3333-444455556666"


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def people(tmp_path, text, paths, slide_of=None):
    file = write(tmp_path / "people.csv", text)
    return read_side_files(IngestConfig(patients=file), paths, slide_of=slide_of or {})


def patient(given, *paths):
    return given.people(paths).get("patient_id")


def test_a_line_reaches_its_slide_under_every_name(tmp_path):
    slides = [f"/in/TCGA-AA-0001-01Z-00-DX1.{UUID}.tif", "/in/x1.TIF", "/in/p1a.tif", "/in/p1b.tif"]
    given = people(
        tmp_path,
        "slide;patient_id;split;grade\nTCGA-AA-0001-01Z-00-DX1;T1;Validation;2\n"
        "x1.tif;PX;TRAIN;nan\np1a;P1\u00a0;;high\nP1B.svs ; P1;test;\n",
        slides,
    )
    assert [patient(given, slide) for slide in slides] == ["T1", "PX", "P1", "P1"]
    assert given.people([slides[0]]) == {
        "patient_id": "T1", "split": "val", "labels": json.dumps({"grade": "2"}),
    }  # fmt: skip
    assert given.people([slides[1]])["labels"] is None
    assert given.report()["patients"] == {
        "rows": 4, "matched": 4, "unmatched": [], "ambiguous": [],
    }  # fmt: skip


def test_equal_names_in_two_folders_never_share_a_line(tmp_path, caplog):
    slides = ["/in/siteA/1.tif", "/in/siteB/1.tif", "/in/siteA/2.tif"]
    given = people(tmp_path, "slide,patient_id\n1.tif,PA\n2,P2\n3,P3\n", slides)
    assert [patient(given, slide) for slide in slides] == [None, None, "P2"]
    assert given.report()["patients"] == {
        "rows": 3, "matched": 1, "unmatched": ["3"], "ambiguous": ["1.tif"],
    }  # fmt: skip
    with caplog.at_level(logging.WARNING):
        given.warn("unmatched")
        given.warn("ambiguous")
    assert "1 of 3 entries name no slide, such as 3." in caplog.text
    assert "1 of 3 entries name several slides, such as 1.tif." in caplog.text
    given = people(tmp_path, "slide,patient_id\nsiteA/1,PA\nsiteB\\1.tif,PB\n", slides)
    assert [patient(given, slide) for slide in slides] == ["PA", "PB", None]


@pytest.mark.parametrize("cell", ["nan", "NA", "", "None", "unknown", "-", "\u00a0"])
def test_a_missing_patient_is_nobody(tmp_path, cell):
    given = people(tmp_path, f"slide,patient_id\na,{cell}\nb,{cell}\n", ["/in/a.tif", "/in/b.tif"])
    assert given.people(["/in/a.tif"]) == {"patient_id": None, "split": None, "labels": None}


def test_a_copy_keeps_its_patient(tmp_path):
    slides = ["/in/copy of p1b.tif", "/in/p1b.tif"]
    given = people(tmp_path, "slide,patient_id\np1b,P1\n", slides)
    assert patient(given, *slides) == "P1"  # the copy is where the slide is read from
    # one name in two folders: one slide if they turn out to be copies, else not clear
    twice = ["/in/a/1.tif", "/in/b/1.tif"]
    given = people(tmp_path, "slide,patient_id\n1,P1\n", twice)
    assert patient(given, twice[0]) is None
    assert given.report()["patients"]["ambiguous"] == ["1"]
    assert patient(given, *twice) == "P1"
    assert given.report()["patients"]["ambiguous"] == []
    # what the archive knows to be one slide is one
    given = people(tmp_path, "slide,patient_id\n1,P1\n", [], dict.fromkeys(twice, "1-abc"))
    assert given.report()["patients"]["matched"] == 1
    assert patient(given, *twice) == "P1"


def test_a_link_keeps_its_patient(tmp_path):
    (tmp_path / "p1a.tif").write_bytes(b"x")
    os.symlink(tmp_path / "p1a.tif", tmp_path / "link.tif")
    link, own = str(tmp_path / "link.tif"), str(tmp_path / "p1a.tif")
    assert patient(people(tmp_path, "slide,patient_id\np1a,P1\n", [link]), link) == "P1"
    given = people(tmp_path, "slide,patient_id\np1a,P1\n", [link, own])
    assert given.report()["patients"]["matched"] == 1
    assert patient(given, link, own) == "P1"
    scale = write(tmp_path / "mpp.csv", "slide,mpp\np1a,0.25\n")
    given = read_side_files(IngestConfig(mpp_csv=scale), [link, own], slide_of={})
    assert given.mpp is not None
    assert given.mpp.of_path(link) == given.mpp.of_path(own) == 0.25


def test_a_copy_with_another_patient_is_told(tmp_path, caplog):
    slides = ["/in/a.tif", "/in/b.tif"]
    given = people(tmp_path, "slide,patient_id\na,P1\nb,P2\n", slides)
    with caplog.at_level(logging.WARNING):
        assert patient(given, *slides) == "P1"
    assert "line 3 is about a copy of the slide of" in caplog.text


WRONG = {
    "two patients": ("slide,patient_id\na,P1\na.tif,P2\n", "line 3: a.tif is the slide of"),
    "unquoted comma": ("slide,patient_id,note\na,P1,ok\nb,P1,moderate, grade 2\n", "line 3: 4 ce"),
    "no patient column": ("slide,who\na,P1\n", "line 1: no column patient_id"),
    "no slide": ("slide,patient_id\n ,P1\n", "line 2: no slide"),
    "nothing": ("slide,patient_id\n", "no rows"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_patients_names_the_line(tmp_path, case):
    text, told = WRONG[case]
    with pytest.raises(ConfigError) as error:
        people(tmp_path, text, ["/in/a.tif", "/in/b.tif"])
    assert told in error.value.message
    assert str(tmp_path / "people.csv") in error.value.message
    assert error.value.hint


def scales(tmp_path, text, paths):
    file = write(tmp_path / "mpp.csv", text)
    return read_side_files(IngestConfig(mpp_csv=file), paths, slide_of={}).mpp


def test_resolutions(tmp_path):
    slides = ["/in/a.tif", "/in/x/1.tif", "/in/y/1.tif"]
    given = scales(tmp_path, 'slide;mpp\na ;"0,25"\nx/1;0.5\nnobody;1\n', slides)
    assert [given.of_path(slide) for slide in slides] == [0.25, 0.5, None]
    assert given.report()["unmatched"] == ["nobody"]
    for cell in ("fine", "", "nan", "0", "-1", "inf"):
        with pytest.raises(ConfigError, match=r"line 2: a has the mpp"):
            scales(tmp_path, f"slide,mpp\na,{cell}\n", slides)
    with pytest.raises(ConfigError, match="have the same name, so it is not clear"):
        scales(tmp_path, "slide,mpp\n1,0.5\n", slides)
    with pytest.raises(ConfigError, match="no column mpp"):
        scales(tmp_path, "slide,um\na,1\n", slides)


def outlined(tmp_path, names, paths):
    folder = tmp_path / "drawn"
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text(json.dumps({"name": name}))
    config = IngestConfig(tissue_dir=str(folder))
    return read_side_files(config, paths, slide_of={}).tissue


@pytest.mark.parametrize(
    "name",
    ["p1a.geojson", "p1a.json", "p1a.GEOJSON", "p1a.tif.geojson", "P1A.Json", "p1a.geojson.zip"],
)
def test_outlines_are_found_as_the_reader_reads_them(tmp_path, name):
    given = outlined(tmp_path, [name, "other.geojson"], ["/in/p1a.tif", "/in/p2.tif"])
    found = given.of_path("/in/p1a.tif")
    assert Path(found.path).name == name
    assert given.of_path("/in/p2.tif") is None
    assert given.report()["unmatched"] == ["other.geojson"]


def test_an_outline_of_other_classes_is_another_outline(tmp_path):
    (tmp_path / "a.geojson").write_text("{}")
    digests = [
        list_outlines(str(tmp_path), classes=classes)[0].value.digest
        for classes in ((), ("Tumor",), ("Stroma", "Tumor"), ("Tumor", "Stroma"))
    ]
    assert digests[0] == hashlib.sha256(b"{}").hexdigest()[:12]
    assert digests[2] == digests[3]
    assert len(set(digests)) == 3


def test_outlines_that_are_of_no_slide_or_of_two_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no outlines"):
        outlined(tmp_path, ["notes.txt"], ["/in/a.tif"])
    with pytest.raises(ConfigError, match=r"No outline in .* b\.geojson"):
        outlined(tmp_path, ["b.geojson"], ["/in/a.tif"])
    with pytest.raises(ConfigError, match=r"not clear which of them b\.geojson means"):
        outlined(tmp_path, [], ["/in/x/b.tif", "/in/y/b.tif"])
    with pytest.raises(ConfigError, match=r"is the slide of .* again"):
        outlined(tmp_path, ["b.json"], ["/in/b.tif"])
    with pytest.raises(ConfigError, match="is no folder"):
        read_side_files(IngestConfig(tissue_dir=str(tmp_path / "none")), [], slide_of={})


def test_texts_are_checked_and_their_names_matched_before_anything_is_read(tmp_path):
    slides = ["/in/a.tif", "/in/x/1.tif", "/in/y/1.tif"]
    captions = write(tmp_path / "c.csv", "slide,caption\na,One.\n1,Two.\nnobody,Three.\n")
    config = IngestConfig(captions=captions)
    given = read_side_files(config, slides, slide_of={"/old/1.tif": "1-abc"})
    assert given.texts["captions"].report() == {
        "rows": 3, "matched": 1, "unmatched": ["nobody"], "ambiguous": ["1"],
    }  # fmt: skip
    bad = write(tmp_path / "q.csv", "slide,question\na,Why?\n")
    with pytest.raises(ConfigError, match="no column answer"):
        read_side_files(IngestConfig(questions=bad), slides, slide_of={})
