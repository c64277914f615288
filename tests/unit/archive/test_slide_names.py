"""Matching of names to slides. The truth is written out by hand beside each name."""

import os

import pytest

from pathflip.archive.slide_names import SlideNames, patient_of, shortened

UUID = "8288ca92-b611-4acf-986e-0b8a3f620b94"
OTHER = "00000000-b611-4acf-986e-0b8a3f620b94"
URIS = [
    f"/data/TCGA-21-1083-01Z-00-DX1.{UUID}.svs",
    f"/data/TCGA-21-1083-01Z-00-DX2.{OTHER}.svs",
    "/data/C3N-00580-27.svs",
    "/data/one/same.svs",
    "/data/two/same.tiff",
    "/data/with.dots.v2.ndpi",
    "/data/siteA/1.tif",
    "/data/siteB/1.tif",
    "/data/x1.TIF",
    "/data/pr\u00e4parat.svs",
    "/data/case7.ome.tif",
    "/data/tcga-bb-0002-01z-00-dx1.tif",
    "/data/upper.SVS",
    "/data/Upper.svs",
    "/data/odd.format",
]
ALIASES = {5: ["/backup/copy of it.svs", "/data/linked.svs"], 3: ["/backup/one/kept.svs"]}
PATIENTS = {3: "P9", 4: " nan "}


@pytest.fixture
def names():
    return SlideNames.from_rows(
        {
            "slide_id": f"id{n}",
            "uri": uri,
            "aliases": ALIASES.get(n),
            "patient_id": PATIENTS.get(n),
        }
        for n, uri in enumerate(URIS)
    )


@pytest.mark.parametrize(
    ("name", "slides"),
    [
        ("id2", ["id2"]),
        (URIS[0], ["id0"]),
        (f"TCGA-21-1083-01Z-00-DX1.{UUID}.svs", ["id0"]),
        (f"TCGA-LUSC/TCGA-21-1083-01Z-00-DX1.{UUID}.pt", ["id0"]),
        (f"TCGA-21-1083-01Z-00-DX1.{UUID.upper()}", ["id0"]),
        ("TCGA-21-1083-01Z-00-DX1.csv", ["id0"]),
        ("TCGA-21-1083-01Z-00-DX2", ["id1"]),
        (f"TCGA-21-1083-01Z-00-DX1.{OTHER}.svs", ["id0"]),  # its UUID says nothing
        ("TCGA-21-1083", []),
        ("C3N-00580-27", ["id2"]),
        ("same", ["id3", "id4"]),
        ("same.svs", ["id3"]),
        ("with.dots.v2", ["id5"]),
        ("with", []),
        ("", []),
        # folders decide between equal names, and only between those
        ("1.tif", ["id6", "id7"]),
        ("1", ["id6", "id7"]),
        ("siteA/1.tif", ["id6"]),
        ("siteB/1", ["id7"]),
        ("/elsewhere/siteB/1.tif", ["id7"]),
        ("data\\siteA\\1.tif", ["id6"]),
        ("siteC/1.tif", ["id6", "id7"]),
        ("two/same", ["id4"]),
        ("/elsewhere/C3N-00580-27.svs", ["id2"]),
        # case, endings, space, letters of two characters
        ("x1.tif", ["id8"]),
        ("X1", ["id8"]),
        ("x1.svs", ["id8"]),
        ("upper.SVS", ["id12"]),
        ("Upper.svs", ["id13"]),
        ("TCGA-BB-0002-01Z-00-DX1.svs", ["id11"]),
        (" C3N-00580-27\u00a0", ["id2"]),
        ("\ufeffC3N-00580-27.svs", ["id2"]),
        ("pra\u0308parat", ["id9"]),
        ("case7", ["id10"]),
        ("case7.ome.tiff", ["id10"]),
        ("C3N-00580-27.svs.geojson", ["id2"]),
        ("odd", ["id14"]),
        ("odd.format", ["id14"]),
        # copies
        ("copy of it", ["id5"]),
        ("linked.svs", ["id5"]),
        ("/backup/one/kept.svs", ["id3"]),
    ],
)
def test_names_mean_the_slide_that_carries_them(names, name, slides):
    assert names.find(name) == slides


@pytest.mark.parametrize(
    ("case", "slides"),
    [
        ("TCGA-21-1083", ["id0", "id1"]),
        ("C3N-00580", ["id2"]),
        ("P9", ["id3"]),
        ("TCGA-21-10", []),
        ("TCGA-BB-0002", ["id11"]),
        ("nan", []),  # not a patient that slides share
    ],
)
def test_cases_mean_all_of_their_slides(names, case, slides):
    assert names.find_case(case) == slides


def matched(names, asked, *, cases=()):
    found = names.match(asked, lambda name: (name, name in cases))
    return dict(found.found), found.report()


def test_a_table_is_matched_line_by_line_and_what_is_not_clear_is_listed(names):
    asked = ["1.tif", "same.svs", "nobody", "TCGA-21-1083", "two/same.tiff", "1"]
    found, report = matched(names, asked, cases=("TCGA-21-1083",))
    assert found == {
        "same.svs": ["id3"],
        "TCGA-21-1083": ["id0", "id1"],
        "two/same.tiff": ["id4"],
    }
    assert report == {"unmatched": ["nobody"], "ambiguous": ["1", "1.tif"]}


def test_a_line_about_a_slide_elsewhere_is_not_given_to_one_of_the_same_name():
    names = SlideNames.from_paths(["/data/siteA/1.tif", "/data/b.svs"])
    found, report = matched(names, ["siteA/1.tif", "siteB/1.tif", "TCGA-X/b.pt"])
    assert found == {"siteA/1.tif": ["/data/siteA/1.tif"], "TCGA-X/b.pt": ["/data/b.svs"]}
    assert report["unmatched"] == ["siteB/1.tif"]
    # alone, a folder that is not there may be that of another machine
    assert matched(names, ["/mnt/old/1.tif"])[0] == {"/mnt/old/1.tif": ["/data/siteA/1.tif"]}


def test_a_path_at_which_there_is_another_file_is_not_the_slide_of_that_name(tmp_path):
    for folder, size in (("a", 10), ("b", 20), ("c", 10)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.tif").write_bytes(bytes(size))
    names = SlideNames.from_paths([str(tmp_path / "a" / "1.tif")])
    own = [str(tmp_path / "a" / "1.tif")]
    assert matched(names, [str(tmp_path / "b" / "1.tif")])[0] == {}
    assert list(matched(names, [str(tmp_path / "c" / "1.tif")])[0].values()) == [own]


def test_a_link_goes_by_the_name_of_its_file(tmp_path):
    (tmp_path / "p1a.tif").write_bytes(b"x")
    (tmp_path / "in").mkdir()
    os.symlink(tmp_path / "p1a.tif", tmp_path / "in" / "blinded 1.tif")
    link = str(tmp_path / "in" / "blinded 1.tif")
    names = SlideNames.from_paths([link])
    assert names.find("p1a") == names.find("blinded 1") == [link]


def test_patients_of_barcodes():
    assert patient_of("TCGA-A7-A0CJ-01Z-00-DX2") == "TCGA-A7-A0CJ"
    assert patient_of("tcga-a7-a0cj-01z-00-dx2") == "TCGA-A7-A0CJ"
    assert patient_of("C3N-00580-27") == "C3N-00580"
    assert patient_of("tcga") is None


def test_a_name_is_shortened_step_by_step():
    assert shortened("a/b.svs") == ["a/b.svs", "b.svs", "b"]
    assert shortened(f"b.{UUID}.svs.csv") == [
        f"b.{UUID}.svs.csv", f"b.{UUID}.svs", f"b.{UUID}", "b",
    ]  # fmt: skip
