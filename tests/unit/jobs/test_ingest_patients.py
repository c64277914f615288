"""Two hundred slides under eight habits of naming: every patient keeps all of its slides."""

from __future__ import annotations

import json
import logging
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pytest

from jobs.ingest.config import IngestConfig
from jobs.ingest.side_files import SideFiles, read_side_files
from pathflip.archive import Archive, schema
from pathflip.archive.commit import Committer
from pathflip.archive.create import create_archive
from pathflip.interop.labels import import_labels, read_labels
from tests.archives import TILING

SPACES = (" ", "  ", "\u00a0", "\u200b", "\ufeff", "\t", "\u3000")


@dataclass(frozen=True, kw_only=True)
class Named:
    """A slide: its paths, its name in the table, its patient, and how the table spells that."""

    paths: tuple[str, ...]
    asked: str
    patient: str
    spelled: str | None = None


def uuid(n: int, *, upper: bool = False) -> str:
    text = f"0a1b2c3d-1111-2222-3333-{n:012x}"
    return text.upper() if upper else text


def named() -> Iterator[Named]:
    """25 slides of each habit; patients have one to three slides."""
    for n in range(25):
        who = n // 3 if n < 15 else n  # five patients of three slides, ten of one
        barcode = f"TCGA-AA-{who:04d}-01Z-00-DX{n % 3 + 1}"
        with_uuid = f"{barcode}.{uuid(n)}"
        yield Named(paths=(f"/in/a/{with_uuid}.svs",), asked=barcode, patient=barcode[:12])

        other = barcode.replace("-AA-", "-BB-")
        names = (
            f"{other}.{uuid(n)}.svs",
            f"TCGA-X/{other}.{uuid(n, upper=True)}.pt",
            f"{other}.h5",
        )
        yield Named(paths=(f"/in/b/{other}.tif",), asked=names[n % 3], patient=other[:12])

        held = (".ndpi", ".ome.tif", ".TIF", ".mrxs", ".SVS")[n % 5]
        told = ("", ".svs", ".tiff", ".SVS", ".geojson")[n // 5]
        yield Named(paths=(f"/in/c/end{n}{held}",), asked=f"end{n}{told}", patient=f"C{who}")

        one, two = f"Case-S{n:02d}-HE.tif", f"case-s{n:02d}-he.TIF"
        held, told = (one, two) if n % 2 else (two, one)
        yield Named(paths=(f"/in/d/{held}",), asked=told, patient=f"D{who}")

        paths = (f"/in/e/copy of e{n}.tif", f"/in/e/e{n}.tif", f"/backup/old e{n}.tif")
        asked = (f"e{n}", f"old e{n}.svs", f"/in/e/copy of e{n}.tif")[n % 3]
        yield Named(paths=paths, asked=asked, patient=f"E{who}")

        site = ("siteA", "siteB")[n % 2]
        told = (f"{site}/{n // 2}.tif", f"{site}\\{n // 2}", f"/mnt/{site}/{n // 2}.svs")[n % 3]
        yield Named(paths=(f"/in/f/{site}/{n // 2}.tif",), asked=told, patient=f"F{who}")

        space, spelled = SPACES[n % 7], f"G\u00a0{who}" if n % 2 else f"G  {who}"
        yield Named(
            paths=(f"/in/g/gap {n}.tif",), asked=f"{space}gap\u00a0{n}{space}",
            patient=f"G {who}", spelled=f"{spelled}{space}",
        )  # fmt: skip

        forms = ("NFC", "NFD") if n % 2 else ("NFD", "NFC")
        held, told = (unicodedata.normalize(form, f"pr\u00e4parat \u00e9{n}") for form in forms)
        name = f"M\u00fcller{who}"
        yield Named(
            paths=(f"/in/h/{held}.tif",), asked=told, patient=name,
            spelled=unicodedata.normalize(forms[1], name),
        )  # fmt: skip


NAMED = list(named())
SLIDE_OF = {path: f"id{n:03d}" for n, one in enumerate(NAMED) for path in one.paths}


def table(folder: Path) -> Path:
    lines = [f'"{one.asked}","{one.spelled or one.patient}",train' for one in NAMED]
    file = folder / "people.csv"
    file.write_text("\n".join(["slide,patient_id,split", *lines]), encoding="utf-8-sig")
    return file


def read(folder: Path, paths: list[str], slide_of: dict[str, str]) -> SideFiles:
    return read_side_files(IngestConfig(patients=str(table(folder))), paths, slide_of=slide_of)


def test_there_are_two_hundred_slides_of_as_many_patients_as_were_meant() -> None:
    assert len(NAMED) == 200
    assert len({path for one in NAMED for path in one.paths}) == 250
    assert len({one.patient for one in NAMED}) == 8 * 15


@pytest.mark.parametrize("known", [False, True], ids=["new slides", "slides of the archive"])
def test_every_patient_keeps_its_slides(tmp_path: Path, known: bool) -> None:
    paths = list(SLIDE_OF)
    given = read(tmp_path, [] if known else paths, SLIDE_OF if known else {})
    wrong = {
        one.asked: (given.people(one.paths).get("patient_id"), one.patient)
        for one in NAMED
        if given.people(one.paths).get("patient_id") != one.patient
    }
    assert wrong == {}
    assert given.report()["patients"] == {
        "rows": 200, "matched": 200, "unmatched": [], "ambiguous": [],
    }  # fmt: skip


def test_half_the_slides_leave_the_other_half_unmatched_and_unmixed(tmp_path: Path) -> None:
    """A table of more slides than there are: no line goes to a slide of another name."""
    there = [one for n, one in enumerate(NAMED) if n % 16 < 8]
    given = read(tmp_path, [path for one in there for path in one.paths], {})
    assert [given.people(one.paths).get("patient_id") for one in there] == [
        one.patient for one in there
    ]
    report = given.report()["patients"]
    assert report["rows"] == 200
    assert report["matched"] + len(report["unmatched"]) == 200
    assert report["ambiguous"] == []


def test_tables_by_slide_and_by_case_name_the_same_patients(tmp_path: Path) -> None:
    """The archive's rows alone: patients by slide, then labels by case, which rename nobody."""
    uri = create_archive(tmp_path / "archive", tiling=TILING).uri
    fields = pa.schema([field for field in schema.slides_schema() if field.name != schema.CHECKSUM])
    rows = [
        {"slide_id": SLIDE_OF[one.paths[0]], "uri": one.paths[0], "aliases": list(one.paths[1:]),
         "status": "ready", "encoders": [], "n_regions": 0, "bytes": 1}
        for one in NAMED
    ]  # fmt: skip
    with Committer(uri) as committer:
        committer.upsert("slides", pa.Table.from_pylist(rows, schema=fields))

    def held(column: str) -> list[str]:
        stored = Archive(uri).slides(columns=["slide_id", column]).to_pylist()
        return [row[column] for row in sorted(stored, key=lambda row: row["slide_id"])]

    file = table(tmp_path)
    done = import_labels(uri, file, read_labels(file))
    assert (done["changed"], done["unmatched"], done["ambiguous"]) == (200, [], [])
    patients = [one.patient for one in NAMED]
    assert held("patient_id") == patients

    cases = tmp_path / "cases.csv"
    grades = {patient: str(n) for n, patient in enumerate(dict.fromkeys(patients))}
    for spell in (str, str.lower, lambda one: unicodedata.normalize("NFD", f" {one}\u00a0")):
        lines = [f"{spell(patient)},{grade}" for patient, grade in grades.items()]
        cases.write_text("\n".join(["case_id,grade", *lines]), encoding="utf-8")
        done = import_labels(uri, cases, read_labels(cases))
        assert (done["unmatched"], done["ambiguous"]) == ([], [])
        assert held("patient_id") == patients
        assert [json.loads(labels) for labels in held("labels")] == [
            {"grade": grades[patient]} for patient in patients
        ]


@pytest.mark.parametrize(
    ("spellings", "patient"),
    [
        (("P1", " P1\u00a0", "P1\u200b", "\ufeffP1"), "P1"),
        (("12", "12.0", " 12 "), "12"),
        (("P 1", "P\u00a01", "P  1"), "P 1"),
        (("M\u00fcller", "Mu\u0308ller"), "M\u00fcller"),
        (("nan", "NA", "N/A", "null", "None", "-", "", "<NA>", "unknown"), None),
    ],
)
def test_spellings_of_one_patient_are_one(
    tmp_path: Path, spellings: tuple[str, ...], patient: str | None
) -> None:
    lines = "".join(f'{n},"{spelled}"\n' for n, spelled in enumerate(spellings))
    (tmp_path / "p.csv").write_text(f"slide,patient_id\n{lines}", encoding="utf-8")
    config = IngestConfig(patients=str(tmp_path / "p.csv"))
    paths = [f"/in/{n}.tif" for n in range(len(spellings))]
    given = read_side_files(config, paths, slide_of={})
    assert {given.people([path])["patient_id"] for path in paths} == {patient}


def test_patients_that_differ_in_case_alone_are_two_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "p.csv").write_text("slide,patient_id\na,P1\nb,p1\n")
    config = IngestConfig(patients=str(tmp_path / "p.csv"))
    with caplog.at_level(logging.WARNING):
        given = read_side_files(config, ["/in/a.tif", "/in/b.tif"], slide_of={})
    assert given.people(["/in/b.tif"])["patient_id"] == "p1"
    assert "1 patients are spelled in several ways, such as P1 and p1" in caplog.text
