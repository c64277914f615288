"""Questions from the files they come in: read, refused line by line, stored, read back."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from pathflip.archive import Archive
from pathflip.archive.textsearch import search_text
from pathflip.archive.verify import verify
from pathflip.errors import ConfigError
from pathflip.interop.captions import import_captions
from pathflip.interop.questions import (
    Question,
    import_questions,
    read_questions,
    stored_questions,
)
from pathflip.synth.scene import sample_scenes
from pathflip.synth.text import questions as cohort_questions
from pathflip.text import CANNOT_TELL
from tests.archives import make_archive
from tests.unit.interop.test_captions import REAL, UUID, turns, uri, write

__all__ = ["uri"]


def read(folder: Path, text: str) -> list[Question]:
    return read_questions(write(folder / "q", text))


BENCH = (
    "\ufeffID,Slide,Tumor,Broad Category,Narrow Category,Question,A,B,C,D,Answer\r\n"
    "1,C3N-00580-27,LUAD,Diagnosis,Subtype,Which?,acinar,lepidic,solid,papillary,B\r\n"
    '2,C3N-00580-27,LUAD,Clinical,Risk,"Smoker, or not?",yes,no,,,A\r\n'
)


def test_slidebench(tmp_path: Path) -> None:
    first, second = read(tmp_path, BENCH)
    assert (first.slide, first.question, first.category) == ("C3N-00580-27", "Which?", "Diagnosis")
    assert (first.choices, first.answer) == (("acinar", "lepidic", "solid", "papillary"), "lepidic")
    assert (second.choices, second.answer, second.line) == (("yes", "no"), "yes", 3)
    bcnb = "ID,Slide,Task,Question,A,B,C,D,Answer\n7,31,ER,ER status?,positive,negative,,,B\n"
    (row,) = read(tmp_path, bcnb)
    assert (row.slide, row.category, row.answer) == ("31", "ER", "negative")


@pytest.mark.parametrize(
    ("choices", "answer", "right"),
    [
        ("low|high", "B", "high"),
        ("low|high", "low", "low"),
        ("low | high ", "High.", "high"),
        ("low|high", "(b)", "high"),
        ("low|high", "b", "high"),
        ("low|high", "Option B", "high"),
        ("low|high", "answer: b) high", "high"),
        ("low|high", "A. low", "low"),
        ("B|A", "A", "A"),  # the text, before the letter
        ("", "It is of high grade.", "It is of high grade."),
        ("b|a", "A", "a"),
    ],
)
def test_plain_csv(tmp_path: Path, choices: str, answer: str, right: str) -> None:
    (row,) = read(tmp_path, f"slide,question,choices,answer\ns,Grade?,{choices},{answer}\n")
    assert (row.question, row.answer) == ("Grade?", right)
    assert row.choices == tuple(part.strip() for part in choices.split("|") if part)


def test_conversations(tmp_path: Path) -> None:
    inline = "<image>\nStage? A) T1a N0 M0 B) T1b (N0) C) Tis. D) T2, A. Smith"
    entries = [
        {"image": ["a.csv"], "conversations": turns("How?\n<image>", "So.", "And?", " Thus. ")},
        {"image": "x/b.pt", "conversations": turns(inline, "C")},
        {"image": "x/b.pt", "conversations": turns("What?\nA. one\nB. two", 'B "')},
        {"image": "x/b.pt", "conversations": turns("See A) or B)?", "A tumour.")},
    ]
    rows = read(tmp_path, json.dumps(entries))
    assert [(row.slide, row.question, row.answer) for row in rows[:2]] == [
        ("a.csv", "How?", "So."),
        ("a.csv", "And?", "Thus."),
    ]
    assert rows[2].question == "Stage?"
    assert rows[2].choices == ("T1a N0 M0", "T1b (N0)", "Tis.", "T2, A. Smith")
    assert rows[2].answer == "Tis."
    assert (rows[3].question, rows[3].choices, rows[3].answer) == ("What?", ("one", "two"), "two")
    assert (rows[4].question, rows[4].choices) == ("See A) or B)?", ())


def test_wsi_vqa_means_all_slides_of_the_case(uri: str, tmp_path: Path) -> None:
    entries = [
        {"Id": "TCGA-21-1083", "Question": "Type?", "Choice": ["LUAD", "LUSC"], "Answer": "LUSC"},
        {"Id": "TCGA-21-1083", "Question": "Stage?", "Answer": "stage ib"},
    ]
    done = import_questions(uri, write(tmp_path / "wsi-vqa.json", json.dumps(entries)))
    assert (done["rows"], done["questions"], done["new"]) == (2, 2, 2)
    stored = stored_questions(Archive(uri))
    assert [(one.slide, one.question, one.answer) for one in stored] == [
        ("id0", "Type?", "LUSC"), ("id0", "Stage?", "stage ib"),
        ("id1", "Type?", "LUSC"), ("id1", "Stage?", "stage ib"),
    ]  # fmt: skip


def test_the_cohorts_own(tmp_path: Path) -> None:
    """Questions of the cohort: letters become the texts they stand for."""
    scenes = sample_scenes(slides=4, seed=0)
    items = [asdict(item) for scene in scenes for item in cohort_questions(scene)]
    rows = read(tmp_path, "\n".join(map(json.dumps, items)))
    assert len(rows) == len(items) > 8
    for row, item in zip(rows, items, strict=True):
        assert (row.slide, row.split, row.category) == (item["slide"], item["split"], item["kind"])
        assert row.choices == item["options"]
        assert row.answer == item["options"]["ABCD".index(item["answer"])]


def test_a_question_may_be_beyond_its_options(tmp_path: Path) -> None:
    """Its answer is then that the slide cannot tell; in whatever case, with or without options."""
    rows = read(
        tmp_path,
        "slide,question,choices,answer\n"
        "a,Age?,40|60,Cannot be told from this slide.\n"
        "a,Age?,,CANNOT BE TOLD from this slide\n"
        "a,Age?,40|Cannot be told from this slide,cannot be told from this slide\n",
    )
    assert [(row.choices, row.answer) for row in rows] == [
        (("40", "60"), CANNOT_TELL),
        ((), CANNOT_TELL),
        (("40", "Cannot be told from this slide"), "Cannot be told from this slide"),
    ]


WRONG = {
    "no column": ("slide,words\na,b\n", "line 1: no column question"),
    "no answer": ("slide,question,answer\na,b,so\na,b,\n", "line 3: no answer"),
    "no slide": ("slide,question,answer\n,b,c\n", "line 2: no slide"),
    "other letter": (
        "slide,question,choices,answer\na,b,x|y,C\n",
        "line 2: the answer 'C' is none of the options",
    ),
    "letter of another": (
        "slide,question,choices,answer\na,b,x|y,A. y\n",
        "line 2: the answer 'A. y' is none",
    ),
    "one option": ("slide,question,choices,answer\na,b,x,x\n", "line 2: 1 options"),
    "too many": (f"slide,question,choices,answer\na,b,{'|'.join('123456789')},1\n", "2: 9 options"),
    "hole": ("Slide,Question,A,B,C,Answer\na,b,x,,z,C\n", "line 2: option B is empty"),
    "letter alone": (
        json.dumps([{"image": "a", "conversations": turns("What?", "B")}]),
        "line 1: the answer is a letter",
    ),
    "no image": ('[{"conversations": []}]', "line 1: an entry without the name"),
    "no turns": ('[{"image": "a",\n"conversations": [1]}]', "line 1: no question and answer"),
    "no object": ("[3]", "line 1: an entry that is no object"),
    "options no list": (
        '{"slide": "a", "question": "b", "options": "c", "answer": "d"}',
        "line 1: options that are no list",
    ),
    "nothing": ("", "no rows"),
    "empty list": ("[]", "holds no questions"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_line_is_named(tmp_path: Path, kind: str) -> None:
    text, message = WRONG[kind]
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    assert message in caught.value.message


# -- stored ---------------------------------------------------------------------------------------

PLAIN = (
    "slide,question,choices,answer,category\n"
    "slide000,Organ?,colon|lung,A,organ\nslide000,Why?,,So.,\nslide001,Organ?,colon|lung,lung,\n"
    "nobody,Organ?,colon|lung,A,\n"
)


def test_stored_beside_captions(tmp_path: Path) -> None:
    """Questions alone make a row without text, which nobody takes for a caption."""
    where = make_archive(tmp_path / "a", slides=4, split=lambda n: "test" if n > 1 else "train")
    said = Archive(where).captions().to_pylist()
    file = write(tmp_path / "vqa.csv", PLAIN)
    assert import_questions(str(where), file, dry_run=True)["new"] == 2
    assert stored_questions(Archive(where)) == []
    done = import_questions(str(where), file)
    assert done == {
        "source": "vqa", "rows": 4, "questions": 3, "new": 2, "changed": 0, "unchanged": 0,
        "unmatched": ["nobody"], "ambiguous": [],
    }  # fmt: skip
    archive = Archive(where)
    assert stored_questions(archive) == [
        Question(slide="slide000", question="Organ?", answer="colon", choices=("colon", "lung"),
                 category="organ", split="train"),
        Question(slide="slide000", question="Why?", answer="So.", split="train"),
        Question(slide="slide001", question="Organ?", answer="lung", choices=("colon", "lung"),
                 split="train"),
    ]  # fmt: skip
    assert stored_questions(archive, source="report") == []
    assert len(stored_questions(archive, source="vqa", split="train")) == 3
    assert stored_questions(archive, split="test") == []
    assert archive.stats()["captions"] == len(said)
    rows = archive.captions().to_pylist()
    assert [row for row in rows if row["source"] == "report"] == said
    assert [(row["text"], row["sentences"]) for row in rows if row["source"] == "vqa"] == [
        ("", []), ("", []),
    ]  # fmt: skip
    found = search_text(archive, said[0]["text"], k=10)
    assert found["slide_id"][0].as_py() == "slide000"
    assert verify(str(where)).damaged == []
    again = import_questions(str(where), file)
    assert (again["new"], again["changed"], again["unchanged"]) == (0, 0, 2)


def test_questions_and_captions_of_one_source_leave_each_other_alone(tmp_path: Path) -> None:
    where = str(make_archive(tmp_path / "a", slides=4))
    captions = write(tmp_path / "both.csv", "slide,caption\nslide000,Colon.\n")
    import_questions(where, write(tmp_path / "q.csv", PLAIN), source="both")
    import_captions(where, captions)
    (row,) = [row for row in Archive(where).captions("both").to_pylist() if row["text"]]
    assert (row["text"], len(json.loads(row["qa"]))) == ("Colon.", 2)
    fewer = write(tmp_path / "q.csv", "\n".join(PLAIN.splitlines()[:2]) + "\n")
    assert import_questions(where, fewer, source="both")["changed"] == 1
    (row,) = [row for row in Archive(where).captions("both").to_pylist() if row["text"]]
    assert (row["text"], len(json.loads(row["qa"]))) == ("Colon.", 1)
    assert import_captions(where, captions)["unchanged"] == 1


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pathflip.cli import main

    where = make_archive(tmp_path / "a", slides=4)
    file = write(tmp_path / "vqa.csv", PLAIN)

    def run(*words: str) -> Any:
        with pytest.raises(SystemExit) as ended:
            main(["archive", "import", "--archive", str(where), "--json", *words])
        return ended.value.code, json.loads(capsys.readouterr().out)

    code, document = run("--questions", str(file), "--dry-run")
    assert (code, document["questions"]["new"]) == (0, 2)
    code, document = run("--questions", str(file), "--source", "bench")
    assert (code, document["questions"]["source"]) == (0, "bench")
    write(file, PLAIN.replace("lung,A,organ", "lung,C,organ"))
    code, document = run("--questions", str(file), "--captions", str(file))
    assert (code, document["error"]["code"]) == (2, "config")
    assert len(stored_questions(Archive(where))) == 3


# -- files of others ------------------------------------------------------------------------------


@pytest.mark.skipif(not REAL.exists(), reason="the data of others is not there")
@pytest.mark.parametrize(
    ("name", "count", "with_choices"),
    [
        ("wsi-bench/1_Report_test.json", 208, 0),
        ("wsi-bench/Morphology_choice_test.json", 682, 682),
        ("wsi-bench/Staging_choice_test.json", 145, 145),
        ("slidechat-example/train_data_example.json", 3, 0),
    ],
)
def test_real_files(name: str, count: int, with_choices: int) -> None:
    rows = read_questions(REAL / name)
    assert len(rows) == count
    assert sum(len(row.choices) == 4 for row in rows) == with_choices
    entries = json.loads((REAL / name).read_text())
    for row, entry in zip(rows, entries, strict=True):
        asked, said = (turn["value"] for turn in entry["conversations"])
        assert row.question in asked
        assert "<image>" not in row.question
        if with_choices:
            assert row.choices["ABCD".index(said.strip(' "'))] == row.answer
            assert all(choice in asked for choice in row.choices)
        else:
            assert row.answer == said.strip()


@pytest.mark.skipif(not REAL.exists(), reason="the data of others is not there")
def test_a_real_file_finds_its_slide(uri: str) -> None:
    done = import_questions(uri, REAL / "wsi-bench/Morphology_choice_test.json")
    assert (done["source"], done["new"]) == ("Morphology_choice_test", 1)
    (first, *_) = stored_questions(Archive(uri))
    assert (first.slide, len(first.choices)) == ("id0", 4)
    assert UUID in read_questions(REAL / "wsi-bench/Morphology_choice_test.json")[0].slide


def test_missing_options_are_left_out_and_missing_answers_are_named(tmp_path: Path) -> None:
    head = "Slide,Question,A,B,C,D,Answer\n"
    (one,) = read(tmp_path, head + "p1a,Tumour?,yes,None,nan,NaN,B\n")
    assert (one.choices, one.answer) == (("yes", "None"), "None")
    with pytest.raises(ConfigError, match="line 2: no answer"):
        read(tmp_path, head + "p1a,Tumour?,yes,no,,,nan\n")
    with pytest.raises(ConfigError, match="line 2: option B is empty"):
        read(tmp_path, head + "p1a,Tumour?,yes,n/a,no,,A\n")
    (one,) = read(tmp_path, "slide;question;choices;answer\np1a;Tumour?;yes|no|nan;no\n")
    assert one.choices == ("yes", "no")
    (one,) = read(
        tmp_path,
        json.dumps(
            [{"slide": "a", "question": "Site?", "options": ["NA", "lung"], "answer": "NA"}]
        ),
    )
    assert one.answer == "NA"  # an option by that name is one


@pytest.mark.parametrize(
    "cell", ["colon|breast", "colon;breast", "\"['colon', 'breast']\"", '"[""colon"", ""breast""]"']
)
def test_options_in_one_cell(tmp_path: Path, cell: str) -> None:
    (one,) = read(tmp_path, f"slide,question,choices,answer\np1a,Organ?,{cell},b\n")
    assert (one.choices, one.answer) == (("colon", "breast"), "breast")


@pytest.mark.parametrize(
    ("entry", "choices", "answer"),
    [
        ({"options": {"A": "colon", "B": "breast"}, "answer": "B"}, ("colon", "breast"), "breast"),
        ({"options": {"b": "breast", "a": "colon"}, "answer": "a"}, ("colon", "breast"), "colon"),
        ({"options": [1, 2, 3], "answer": 2}, ("1", "2", "3"), "2"),
        ({"answer": 3}, (), "3"),
        ({"answer": 0.5}, (), "0.5"),
    ],
)
def test_options_by_letter_and_numbers(
    tmp_path: Path, entry: dict[str, Any], choices: tuple[str, ...], answer: str
) -> None:
    (one,) = read(tmp_path, json.dumps([{"slide": "p1a", "question": "What?"} | entry]))
    assert (one.choices, one.answer) == (choices, answer)


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"answer": "B"}, "the answer is a letter, B, and the question has no options"),
        ({"answer": "(b)"}, "the answer is a letter"),
        ({"answer": True}, "no answer"),
        ({"answer": float("nan")}, "no answer"),
        ({"options": {"A": "x", "C": "y"}, "answer": "A"}, "options that are no list"),
        ({"options": ["x", None], "answer": "x"}, "options that are no list"),
        ({"options": ["x", "y"], "answer": 1}, "'1' is none of the options"),
    ],
)
def test_an_answer_that_could_mean_anything_is_refused(
    tmp_path: Path, entry: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, json.dumps([{"slide": "p1a", "question": "What?"} | entry]))
    assert told in caught.value.message
    if isinstance(entry["answer"], str) and "options" not in entry:
        with pytest.raises(ConfigError, match="line 2: the answer is a letter"):
            read(tmp_path, f"slide,question,opt1,opt2,answer\na,What?,x,y,{entry['answer']}\n")


def test_small_letters_in_a_conversation(tmp_path: Path) -> None:
    said = turns("<image>\nWhich? (a) colon (b) breast", "(b)")
    (one,) = read(tmp_path, json.dumps([{"image": "a", "conversations": said}]))
    assert (one.question, one.choices, one.answer) == ("Which?", ("colon", "breast"), "breast")


def test_html_is_read_as_it_is_shown(tmp_path: Path) -> None:
    (one,) = read(tmp_path, "slide,question,choices,answer\na,p &lt; .05?,&gt;2 cm|2 cm,&gt;2 cm\n")
    assert (one.question, one.choices, one.answer) == ("p < .05?", (">2 cm", "2 cm"), ">2 cm")


def test_questions_by_case(uri: str, tmp_path: Path) -> None:
    file = write(tmp_path / "q.csv", "case_id,question,answer\nTCGA-21-1083,Organ?,lung\n")
    assert import_questions(uri, file)["new"] == 2
    assert {one.slide for one in stored_questions(Archive(uri))} == {"id0", "id1"}


def test_roles_say_which_turn_is_a_question(tmp_path: Path) -> None:
    system = {"from": "system", "value": "You are a pathologist."}
    asked = [{"from": "human", "value": "Organ?"}, {"from": "gpt", "value": "Breast."}]
    described = {"from": "gpt", "value": "A carcinoma."}
    for before in ([], [system], [described], [system, described]):
        (one,) = read(tmp_path, json.dumps([{"image": "a", "conversations": [*before, *asked]}]))
        assert (one.question, one.answer) == ("Organ?", "Breast.")


@pytest.mark.parametrize("heading", ["A,B", "a,b", "option_a,option_b", "Option A,Option B"])
def test_options_under_every_heading(tmp_path: Path, heading: str) -> None:
    (one,) = read(tmp_path, f"slide,question,{heading},answer\np1a,Organ?,colon,breast,B\n")
    assert (one.choices, one.answer) == (("colon", "breast"), "breast")


def test_a_split_goes_by_one_name(tmp_path: Path) -> None:
    (one,) = read(
        tmp_path, '{"slide": "a", "question": "q?", "answer": "x", "split": "Validation"}'
    )
    assert one.split == "val"
