import json
from pathlib import Path

import pyarrow as pa
import pytest

from pathflip.archive import Archive, schema
from pathflip.archive.commit import Committer
from pathflip.errors import ArchiveError, ConfigError
from pathflip.interop.captions import (
    import_captions,
    read_captions,
    remove_source,
    source_name,
)
from pathflip.interop.questions import import_questions
from tests.unit.archive import cohort

REAL = Path(__file__).parents[4] / "shared/data"
UUID = "8288ca92-b611-4acf-986e-0b8a3f620b94"
URIS = [
    f"/data/TCGA-21-1083-01Z-00-DX1.{UUID}.svs",
    "/data/TCGA-21-1083-01Z-00-DX2.00000000-b611-4acf-986e-0b8a3f620b94.svs",
    "/data/C3N-00580-27.svs",
    "/data/one/same.svs",
    "/data/two/same.tiff",
    "/data/with.dots.v2.ndpi",
]


@pytest.fixture
def uri(tmp_path):
    """Six slides without regions, under the names of several projects."""
    where = tmp_path / "archive"
    cohort.build(where)
    schema_ = pa.schema([f for f in schema.slides_schema() if f.name != schema.CHECKSUM])
    rows = [
        {"slide_id": f"id{n}", "uri": uri, "aliases": [], "status": "ready", "encoders": [],
         "n_regions": 0, "bytes": 1000 + n, "patient_id": "P9" if n == 3 else None}
        for n, uri in enumerate(URIS)
    ]  # fmt: skip
    with Committer(where) as committer:
        committer.upsert("slides", pa.Table.from_pylist(rows, schema=schema_))
    return str(where)


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode("utf-8"))
    return path


PLAIN = 'slide,caption\nid0,One. Two.\nsame.svs,"A, b\nc"\nnobody,x\nsame,y\n'


@pytest.mark.parametrize(
    "text",
    [
        PLAIN,
        PLAIN.replace("\n", "\r\n"),
        "\ufeff" + PLAIN,
        PLAIN.replace("slide,caption", "Slide,Caption"),
        'caption,more,slide\nOne. Two.,1,id0\n"A, b\nc",2,same.svs\n\nx,3,nobody\ny,4,same\n',
    ],
    ids=["lf", "crlf", "bom", "case", "other columns"],
)
def test_csv_in_every_dress(uri, tmp_path, text):
    file = write(tmp_path / "my captions.csv", text)
    done = import_captions(uri, file)
    assert done == {
        "source": "my_captions", "rows": 4, "new": 2, "changed": 0, "unchanged": 0,
        "unmatched": ["nobody"], "ambiguous": ["same"], "not_in_file": [], "other_sources": [],
        "removed": [],
    }  # fmt: skip
    rows = Archive(uri).captions().to_pylist()
    assert [(row["caption_id"], row["text"].replace("\r", "")) for row in rows] == [
        ("id0/my_captions", "One. Two."),
        ("id3/my_captions", "A, b\nc"),
    ]
    assert rows[0]["sentences"] == ["One.", "Two."]
    assert (rows[0]["statements"], rows[0]["model"], rows[0]["qa"]) == ([], None, None)


def test_again_changes_nothing_and_a_correction_changes_its_row(uri, tmp_path):
    file = write(tmp_path / "c.csv", PLAIN)
    assert import_captions(uri, file, dry_run=True)["new"] == 2
    assert Archive(uri).captions().num_rows == 0
    import_captions(uri, file)
    versions = {t: Archive(uri).dataset(t).version for t in Archive(uri).tables()}
    done = import_captions(uri, file)
    assert (done["new"], done["changed"], done["unchanged"]) == (0, 0, 2)
    assert {t: Archive(uri).dataset(t).version for t in Archive(uri).tables()} == versions
    write(file, PLAIN.replace("One.", "Corrected."))
    done = import_captions(uri, file)
    assert (done["new"], done["changed"], done["unchanged"]) == (0, 1, 1)
    import_captions(uri, file, source="second")
    opened = Archive(uri)
    assert opened.captions()["slide_id"].to_pylist() == ["id0", "id0", "id3", "id3"]
    assert opened.captions("second").num_rows == 2
    assert opened.captions("c")["text"][0].as_py() == "Corrected. Two."


def test_captions_that_a_corrected_file_leaves_are_told(uri, tmp_path, caplog):
    file = write(tmp_path / "c.csv", PLAIN)
    import_captions(uri, file)
    write(file, "slide,caption\nid0,Corrected.\n")
    dry = import_captions(uri, file, dry_run=True)
    assert (dry["changed"], dry["not_in_file"], dry["other_sources"]) == (1, ["id3"], [])
    assert import_captions(uri, file) == dry
    assert Archive(uri).captions("c")["slide_id"].to_pylist() == ["id0", "id3"]
    assert "1 slides keep a caption of source c that the file does not have, id3 for" in caplog.text
    second = write(tmp_path / "c_corrected.csv", "slide,caption\nid0,Corrected.\nid2,New.\n")
    done = import_captions(uri, second)
    assert (done["not_in_file"], done["other_sources"]) == ([], ["c"])
    assert "import the file with --source c;" in caplog.text


def test_captions_a_file_dropped_are_removed_when_asked(uri, tmp_path):
    file = write(tmp_path / "c.csv", PLAIN)
    import_captions(uri, file)
    import_captions(uri, file, source="second")
    asked = write(tmp_path / "c.tsv", "slide\tquestion\tanswer\nsame.svs\tWhich?\tThis.\n")
    import_questions(uri, asked, source="second")
    write(file, "slide,caption\nid0,Corrected.\n")
    dry = import_captions(uri, file, replace_source=True, dry_run=True)
    assert (dry["changed"], dry["removed"], dry["not_in_file"]) == (1, ["id3"], [])
    assert Archive(uri).captions("c")["slide_id"].to_pylist() == ["id0", "id3"]
    assert import_captions(uri, file, replace_source=True) == dry
    assert Archive(uri).captions("c")["slide_id"].to_pylist() == ["id0"]
    assert Archive(uri).captions("second").num_rows == 2  # the other source is left alone
    # All of a source; the questions of its rows stay.
    assert remove_source(uri, "second", dry_run=True)["removed"] == ["id0", "id3"]
    assert remove_source(uri, "second") == {"source": "second", "removed": ["id0", "id3"]}
    left = Archive(uri).captions("second").to_pylist()
    assert [(row["slide_id"], row["text"], row["sentences"]) for row in left] == [("id3", "", [])]
    assert json.loads(left[0]["qa"])[0]["answer"] == "This."
    with pytest.raises(ConfigError) as raised:
        remove_source(uri, "second")
    assert (raised.value.code, "c (1)" in raised.value.hint) == ("no_source", True)


def test_a_name_that_has_become_ambiguous_removes_no_caption(uri, tmp_path):
    """Another slide of the same name was ingested since; the file is the same."""
    file = write(tmp_path / "c.csv", "slide,caption\nid0,first\nid3,second\nid4,third\n")
    import_captions(uri, file)
    write(file, "slide,caption\nid0,first\nsame,second\n")
    done = import_captions(uri, file, replace_source=True)
    assert (done["ambiguous"], done["removed"]) == (["same"], [])
    assert done["not_in_file"] == ["id3", "id4"]
    write(file, "slide,caption\nid0,first\none/same,second\n")
    assert import_captions(uri, file, replace_source=True)["removed"] == ["id4"]


def test_a_file_of_other_slides_removes_nothing(uri, tmp_path):
    file = write(tmp_path / "c.csv", PLAIN)
    import_captions(uri, file)
    write(file, "slide,caption\nnobody,x\n")
    with pytest.raises(ConfigError, match="would go"):
        import_captions(uri, file, replace_source=True)
    assert Archive(uri).captions("c").num_rows == 2


def turns(*values):
    return [
        {"from": "human" if n % 2 == 0 else "gpt", "value": value} for n, value in enumerate(values)
    ]


def test_slideinstruction(uri, tmp_path):
    entries = [
        {"id": "train::0", "image": ["TCGA-21-1083-01Z-00-DX1.csv"],
         "conversations": turns("<image>\nDescribe it.", "A tumour.", "Which?", "LUSC")},
        {"id": "train::1", "image": "x/C3N-00580-27.pt",
         "conversations": turns("Describe it.\n<image>", " Lung tissue. ")},
        {"id": "train::2", "image": ["TCGA-21-1083-01Z-00-DX1.csv"],
         "conversations": turns("Grade?\n<image>", "High.")},
    ]  # fmt: skip
    for text in (json.dumps(entries, indent=1), "\n".join(map(json.dumps, entries))):
        rows = read_captions(write(tmp_path / "s.json", text))
        assert [(row.slide, row.text) for row in rows] == [
            ("TCGA-21-1083-01Z-00-DX1.csv", "A tumour."),
            ("x/C3N-00580-27.pt", "Lung tissue."),
        ]
        assert rows[0].qa == [
            {"question": "Which?", "answer": "LUSC"},
            {"question": "Grade?", "answer": "High."},
        ]
    assert import_captions(uri, tmp_path / "s.json")["new"] == 2
    stored = Archive(uri).captions().to_pylist()
    assert json.loads(stored[0]["qa"])[0]["answer"] == "LUSC"


def test_slidebench_alignment_and_pathtext(uri, tmp_path):
    bench = "\ufeffID,Slide,Tumor,Question,Caption\r\n1,C3N-00580-27,LUAD,What?,Acinar growth.\r\n"
    (row,) = read_captions(write(tmp_path / "b.csv", bench))
    assert (row.slide, row.text, row.question) == ("C3N-00580-27", "Acinar growth.", "What?")

    aligned = {"image": "a/id2.h5", "caption": "Solid.", "fine_grained_concepts": [
        {"visual_description": "solid nests"}, {"other": 1}]}  # fmt: skip
    import_captions(uri, write(tmp_path / "v2.json", json.dumps(aligned)))
    (stored,) = Archive(uri).captions("v2").to_pylist()
    assert (stored["slide_id"], stored["statements"], stored["model"]) == (
        "id2", ["solid nests"], "v2",
    )  # fmt: skip

    for case, text in (("TCGA-21-1083", "Report."), ("TCGA-99-9999", "Other.")):
        (tmp_path / "PathText" / case).mkdir(parents=True)
        (tmp_path / "PathText" / case / "annotation").write_text(json.dumps(text))
    done = import_captions(uri, tmp_path / "PathText")
    assert (done["new"], done["unmatched"]) == (2, ["TCGA-99-9999"])


WRONG = {
    "no column": ("slide,words\na,b\n", "line 1: no column caption"),
    "too many cells": ("slide,caption\na,b\nc,d,e\n", "line 3: 3 cells"),
    "too few cells": ("slide,caption\na\n", "line 2: 1 cells"),
    "empty caption": ("slide,caption\na,b\nc,\n", "line 3: no caption"),
    "None": ("slide,caption\na,none seen\nc,None\n", "line 3: no caption"),
    "dash": ("slide,caption\na,b\nc,-\n", "line 3: no caption"),
    "empty slide": ("slide,caption\n,b\n", "line 2: no slide"),
    "after a long cell": ('slide,caption\na,"b\nb\nb"\nc\n', "line 5: 1 cells"),
    "open quote": ('slide,caption\na,"b\n', "line 2: "),
    "zero byte": ("slide,caption\na,b\0b\n", "line 2: a zero byte"),
    "two captions": ("slide,caption\na,b\nc,d\na,e\n", "line 4: another caption of a than in "),
    "column twice": ("slide,caption,slide\na,b,c\n", "line 1: the column 'slide'"),
    "nothing": ("", "no rows"),
    "only a header": ("slide,caption\n", "no rows"),
    "broken JSON": ('[{"image": "a",\n "caption" "b"}]', "line 2: not JSON"),
    "cut JSON": ('[{"image": "a", "caption": "b"},\n{"image": "c"', "does not end"),
    "no image": ('[{"image": "a", "caption": "b"},\n{"caption": "b"}]', "line 2: an entry without"),
    "no text": ('[\n{"image": "a"}]', "line 2: an entry without"),
    "one turn": ('[{"image": "a", "conversations": [{"value": "q"}]}]', "line 1: no question"),
    "choices": (
        '[{"image": "a", "conversations": [{"value": "q"}, {"value": "B"}]}]', "no caption",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_sentence_with_its_line(uri, tmp_path, case):
    text, told = WRONG[case]
    file = write(tmp_path / "wrong", text)
    with pytest.raises(ConfigError) as error:
        import_captions(uri, file)
    assert told in error.value.message
    assert str(file) in error.value.message
    assert error.value.hint
    assert Archive(uri).captions().num_rows == 0


def test_bytes_that_are_no_text_and_files_that_are_not_there(uri, tmp_path):
    file = tmp_path / "latin.csv"
    file.write_bytes(b"slide,caption\na,b\nc,\xe9t\xe9\n")
    with pytest.raises(ConfigError, match="line 3: not UTF-8"):
        read_captions(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_captions(tmp_path / "none.csv")
    with pytest.raises(ConfigError, match="no captions"):
        read_captions(tmp_path)
    with pytest.raises(ArchiveError):
        import_captions(str(tmp_path / "none"), write(tmp_path / "c.csv", PLAIN))


def test_one_slide_under_two_names_must_have_one_caption(uri, tmp_path):
    same = write(tmp_path / "c.csv", "slide,caption\nid3,a b c\nsame.svs,a b c\n")
    assert import_captions(uri, same)["new"] == 1
    other = write(tmp_path / "c.csv", "slide,caption\nid3,a b c\nsame.svs,d e f\n")
    with pytest.raises(ConfigError, match=r"line 3: same\.svs is the slide of line 2 again"):
        import_captions(uri, other)


def test_names_of_sources():
    assert source_name("x/SlideBench Caption (TCGA).csv") == "SlideBench_Caption_TCGA_"
    assert source_name("x/captions.csv") == "captions"


@pytest.mark.skipif(not REAL.exists(), reason="needs the public example files")
def test_real_files():
    rows = read_captions(REAL / "slidechat-example/train_data_example.json")
    assert [row.slide for row in rows] == [
        "TCGA-A7-A0CJ-01Z-00-DX2.csv", "TCGA-AR-A255-01Z-00-DX1.csv", "TCGA-A7-A6VV-01Z-00-DX2.csv",
    ]  # fmt: skip
    assert all(
        len(row.text) > 100 and "<image>" not in row.text + str(row.question) for row in rows
    )
    reports = read_captions(REAL / "wsi-bench/1_Report_test.json")
    assert len(reports) == 208
    assert all(row.slide.startswith("TCGA-") and len(row.text) > 50 for row in reports)
    with pytest.raises(ConfigError, match="choices"):
        read_captions(REAL / "wsi-bench/Staging_choice_test.json")


def test_command_line(uri, tmp_path, capsys):
    from pathflip.cli import main

    def run(*words):
        with pytest.raises(SystemExit) as ended:
            main(["archive", "import", "--archive", uri, "--json", *map(str, words)])
        return ended.value.code, json.loads(capsys.readouterr().out)

    captions = write(tmp_path / "c.csv", PLAIN)
    labels = write(tmp_path / "l.csv", "name,stage,site\nid2,II,lung\n")
    given = ["--captions", captions, "--labels", labels, "--slide-col", "name"]
    code, dry = run(*given, "--label-col", "stage", "--dry-run")
    assert (code, dry["dry_run"], dry["captions"]["new"], dry["labels"]["changed"]) == (
        0,
        True,
        2,
        1,
    )
    assert Archive(uri).captions().num_rows == 0
    code, done = run(*given, "--label-col", "stage")
    assert (code, done["captions"]) == (0, dry["captions"])
    assert json.loads(Archive(uri).slide("id2")["labels"]) == {"stage": "II"}
    assert Archive(uri).captions().num_rows == 2
    bad = write(tmp_path / "bad.csv", "slide,caption\na\n")
    code, failed = run("--labels", labels, "--slide-col", "name", "--captions", bad)
    assert (code, "line 2" in failed["error"]["message"]) == (2, True)
    assert json.loads(Archive(uri).slide("id2")["labels"]) == {"stage": "II"}  # no site: nothing
    assert run()[0] == 2


SYSTEM, HUMAN, GPT = (
    {"from": role, "value": text}
    for role, text in (
        ("system", "You are a pathologist."),
        ("human", "<image>\nDescribe the slide."),
        ("gpt", "Invasive carcinoma."),
    )
)
GRADE = [{"from": "human", "value": "Grade?"}, {"from": "gpt", "value": "Two."}]


@pytest.mark.parametrize(
    ("conversation", "question", "qa"),
    [
        ([HUMAN, GPT], "Describe the slide.", []),
        ([SYSTEM, HUMAN, GPT], "Describe the slide.", []),
        ([GPT], None, []),
        ([GPT, *GRADE], None, [{"question": "Grade?", "answer": "Two."}]),
        ([SYSTEM, HUMAN, GPT, *GRADE], "Describe the slide.",
         [{"question": "Grade?", "answer": "Two."}]),
        ([HUMAN, GPT, {"from": "human", "value": "And?"}], "Describe the slide.", []),
        ([{"role": "system", "content": "x"}, {"role": "user", "content": "Describe the slide."},
          {"role": "assistant", "content": "Invasive carcinoma."}], "Describe the slide.", []),
    ],
)  # fmt: skip
def test_roles_say_which_turn_is_the_caption(tmp_path, conversation, question, qa):
    file = write(tmp_path / "c.json", json.dumps([{"image": "a", "conversations": conversation}]))
    (row,) = read_captions(file)
    assert (row.text, row.question, row.qa) == ("Invasive carcinoma.", question, qa)


@pytest.mark.parametrize(
    ("conversation", "told"),
    [
        ([HUMAN, HUMAN, GPT], "turn 2 asks"),
        ([HUMAN, GPT, GPT], "turn 3 answers"),
        ([HUMAN, {"from": "tool", "value": "x"}, GPT], "turn 2 is of the unknown role 'tool'"),
        ([SYSTEM, HUMAN], "no question and answer"),
        ([HUMAN, {"from": "gpt", "value": " nan "}], "the caption is empty"),
        ([HUMAN, {"from": "gpt"}], "turn 2 of the conversation has no text"),
    ],
)
def test_conversations_of_another_order_are_refused(tmp_path, conversation, told):
    text = json.dumps([{"image": "a", "conversations": conversation}])
    with pytest.raises(ConfigError, match=told):
        read_captions(write(tmp_path / "c.json", text))


def test_a_missing_caption_is_no_text(tmp_path):
    for cell in ("nan", "N/A", ""):
        with pytest.raises(ConfigError, match="line 3: no caption"):
            read_captions(write(tmp_path / "c.csv", f"slide,caption\na,b\nc,{cell}\n"))
    (row,) = read_captions(write(tmp_path / "c.csv", "slide;caption\nid0\u00a0; A, b. \n"))
    assert (row.slide, row.text) == ("id0", "A, b.")


def test_captions_by_case(uri, tmp_path):
    file = write(tmp_path / "c.csv", "case_id,report\ntcga-21-1083,Lung.\nP9 ,Fat.\nnone,x\n")
    done = import_captions(uri, file)
    assert (done["new"], done["unmatched"]) == (3, ["none"])
    rows = Archive(uri).captions().to_pylist()
    assert {row["slide_id"]: row["text"] for row in rows} == {
        "id0": "Lung.", "id1": "Lung.", "id3": "Fat.",
    }  # fmt: skip
    both = read_captions(write(file, "case_id,slide,caption\nP9,id0,Text.\n"))
    assert [(row.slide, row.is_case) for row in both] == [("id0", False)]


def test_html_is_read_as_it_is_shown(tmp_path):
    file = write(tmp_path / "c.csv", "slide,caption\na,Size &lt;2 cm &amp;amp; fat.<br/>Free.\n")
    assert read_captions(file)[0].text == "Size <2 cm & fat.\nFree."
