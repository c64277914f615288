import json

import pytest

from pathflip.archive import Archive
from pathflip.errors import ConfigError
from pathflip.interop.labels import import_labels, read_labels, read_manifest, read_patients
from tests.unit.interop.test_captions import UUID, uri, write  # noqa: F401


def stored(where):
    rows = Archive(where).slides(columns=["slide_id", "patient_id", "split", "labels"]).to_pylist()
    return {
        row["slide_id"]: (row["patient_id"], row["split"], json.loads(row["labels"] or "{}"))
        for row in rows
    }


def test_cptac_split(uri, tmp_path):  # noqa: F811
    file = write(
        tmp_path / "split.csv",
        "slide_id,conch_feature,label\r\nC3N-00580-27,x/y.pt,CPTAC-LUAD\r\nC3L-1,z,CPTAC-LSCC\r\n",
    )
    rows = read_labels(file)
    assert rows[0].labels == {"label": "CPTAC-LUAD"}
    done = import_labels(uri, file, rows)
    assert (done["changed"], done["unchanged"], done["unmatched"]) == (1, 0, ["C3L-1"])
    assert stored(uri)["id2"] == (None, None, {"label": "CPTAC-LUAD"})
    again = import_labels(uri, file, rows)
    assert (again["changed"], again["unchanged"]) == (0, 1)


def test_patho_bench_adds_to_the_labels_that_are_there(uri, tmp_path):  # noqa: F811
    first = write(tmp_path / "a.csv", "slide_id,label\nC3N-00580-27,LUAD\n")
    import_labels(uri, first, read_labels(first))
    task = write(
        tmp_path / "all.tsv",
        "case_id\tslide_id\tBAP1_mutation\tfold_0\tfold_1\nC3N-00580\tC3N-00580-27\t1\ttrain\ttest\n",
    )
    import_labels(uri, task, read_labels(task))
    assert stored(uri)["id2"] == ("C3N-00580", None, {"label": "LUAD", "BAP1_mutation": "1"})


def test_chosen_columns_cases_and_splits(uri, tmp_path):  # noqa: F811
    file = write(
        tmp_path / "t.csv",
        "who,split,stage,site\nTCGA-21-1083,test,II,lung\nP9,train,I,\nnobody,val,III,x\n",
    )
    with pytest.raises(ConfigError, match="no column slide_id or case_id"):
        read_labels(file)
    with pytest.raises(ConfigError, match="no column 'grade'"):
        read_labels(file, case_col="who", label_cols=["grade"])
    rows = read_labels(file, case_col="who", label_cols=["stage"])
    dry = import_labels(uri, file, rows, dry_run=True)
    assert stored(uri)["id0"] == (None, None, {})
    assert import_labels(uri, file, rows) == dry
    assert dry["unmatched"] == ["nobody"]
    found = stored(uri)
    assert found["id0"] == found["id1"] == ("TCGA-21-1083", "test", {"stage": "II"})
    assert found["id3"] == ("P9", "train", {"stage": "I"})


def test_lines_that_contradict_each_other(uri, tmp_path):  # noqa: F811
    file = write(tmp_path / "t.csv", "slide,label\nid3,a\nsame.svs,b\n")
    with pytest.raises(ConfigError, match=r"line 3: same\.svs has label 'b', but 'a' in line 2"):
        import_labels(uri, file, read_labels(file))
    assert stored(uri)["id3"][2] == {}
    bad = write(tmp_path / "t.csv", "slide,label\n,a\n")
    with pytest.raises(ConfigError, match="line 2: no slide and no case"):
        read_labels(bad)


def test_gdc_manifest(uri, tmp_path):  # noqa: F811
    file = write(
        tmp_path / "gdc.txt",
        "id\tfilename\tmd5\tsize\tstate\n"
        f"1\tTCGA-21-1083-01Z-00-DX1.{UUID}.svs\tx\t1000\treleased\n"
        "2\tTCGA-21-1083-11A-01-TS1.00000000-0000-0000-0000-000000000000.svs\tx\t7\treleased\n"
        "3\tTCGA-21-1083-01Z-00-DX2.svs\tx\t7\treleased\n"
        "4\tclinical.tsv\tx\t9\treleased\n",
    )
    rows = read_manifest(file)
    assert [row.labels["sample_type"] for row in rows] == ["tumour", "normal", "tumour"]
    done = import_labels(uri, file, rows)
    assert done["other_size"] == ["id1"]
    assert done["unmatched"] == ["TCGA-21-1083-11A-01-TS1.00000000-0000-0000-0000-000000000000.svs"]
    assert stored(uri)["id0"] == ("TCGA-21-1083", None, {"sample_type": "tumour"})
    for text, told in (
        ("a\tb\n1\t2\n", "no GDC manifest"),
        ("id\tfilename\tsize\n1\tTCGA-21-1083-01Z.svs\tbig\n", "line 2: the size is no number"),
        ("id\tfilename\tsize\n1\tclinical.tsv\t7\n", "no TCGA slides"),
    ):
        with pytest.raises(ConfigError, match=told):
            read_manifest(write(tmp_path / "bad.txt", text))


def patients(where):
    return {slide: row[0] for slide, row in stored(where).items()}


def imported(where, folder, text, **columns):
    file = write(folder / "t.csv", text)
    return import_labels(where, file, read_labels(file, **columns))


def test_a_table_by_case_never_renames_a_patient(uri, tmp_path):  # noqa: F811
    imported(uri, tmp_path, "slide_id,patient_id\nid0,P7\nid1,P7\nid5,P7\n")
    done = imported(uri, tmp_path, "case_id,grade\ntcga-21-1083,2\nC3N-00580,1\n")
    assert done["other_patient"] == ["id0", "id1"]
    found = stored(uri)
    assert found["id0"] == found["id1"] == ("P7", None, {"grade": "2"})
    assert found["id5"][0] == "P7"
    assert found["id2"] == ("C3N-00580", None, {"grade": "1"})  # it had none
    # a column of cases beside the slides, and a barcode, are cases as well
    imported(uri, tmp_path, "slide_id,case_id\nid0,TCGA-21-1083\nid4,C1\n")
    assert (patients(uri)["id0"], patients(uri)["id4"]) == ("P7", "C1")
    manifest = write(
        tmp_path / "gdc.txt", f"id\tfilename\tsize\n1\tTCGA-21-1083-01Z-00-DX1.{UUID}.svs\t1000\n"
    )
    assert import_labels(uri, manifest, read_manifest(manifest))["other_patient"] == ["id0"]
    assert patients(uri)["id0"] == "P7"
    # a line about a slide that names its patient is a correction
    assert imported(uri, tmp_path, "slide_id,patient_id\nid0,P8\n")["changed"] == 1
    assert (patients(uri)["id0"], patients(uri)["id1"]) == ("P8", "P7")


def test_a_slide_without_patient_gets_that_of_the_others_of_its_case(uri, tmp_path):  # noqa: F811
    imported(uri, tmp_path, "slide_id,patient_id\nid0,P7\n")
    imported(uri, tmp_path, "slide_id,case_id\nid0,C\nid1,C\n")
    assert (patients(uri)["id0"], patients(uri)["id1"]) == ("P7", "P7")


def test_missing_cells_are_no_patients_splits_or_labels(uri, tmp_path):  # noqa: F811
    imported(
        uri,
        tmp_path,
        "slide_id,patient_id,split,stage,margin\n"
        "id0,nan,N/A,NaN,none\nid1,Unknown,Validation,II,\nid2\u00a0, P1 ,TRAIN,NA,-\n",
    )
    found = stored(uri)
    assert found["id0"] == (None, None, {"margin": "none"})
    assert found["id1"] == (None, "val", {"stage": "II"})
    assert found["id2"] == ("P1", "train", {"margin": "-"})


def test_patients_as_ingest_reads_them(tmp_path):
    file = write(
        tmp_path / "p.csv", "Slide;Patient_ID;fold_0;grade\na ; P1\u00a0;1;nan\nb;nan;2;x\n"
    )
    rows = read_patients(file)
    assert [(row.slide, row.patient, row.labels) for row in rows] == [
        ("a", "P1", {"fold_0": "1"}),
        ("b", None, {"fold_0": "2", "grade": "x"}),
    ]
    for text, told in (
        ("slide,name\na,b\n", "no column patient_id among slide, name"),
        ("patient_id,x\na,b\n", "no column slide among patient_id, x"),
        ("slide,patient_id\n,P1\n", "line 2: no slide"),
        ("slide,patient_id,note\na,P1,moderate, grade 2\n", "line 2: 4 cells"),
    ):
        with pytest.raises(ConfigError, match=told):
            read_patients(write(file, text))
