"""Tables as Excel, pandas, R and people write them; every dress must give the same cells."""

import pytest

from pathflip.errors import ConfigError
from pathflip.interop.tables import (
    clean,
    column,
    is_missing,
    is_unknown,
    json_entries,
    known,
    read_rows,
    read_text,
)

ROWS = [
    {"slide": "a.svs", "text": "one, two; three"},
    {"slide": "b", "text": 'said "so"\non two lines'},
    {"slide": "c", "text": ""},
]


def dressed(separator: str, *, ending: str = "\n") -> str:
    lines = [
        ("slide", "text"),
        ("a.svs", '"one, two; three"'),
        ("b", '"said ""so""\non two lines"'),
        ("c", ""),
    ]
    return ending.join(separator.join(line) for line in lines) + ending


DRESSES = {
    "comma": dressed(","),
    "tab": dressed("\t"),
    "semicolon": dressed(";"),
    "bar": dressed("|"),
    "crlf": dressed(",", ending="\r\n"),
    "empty lines": "\n\n" + dressed(",").replace("\nc,", "\n\n  \nc,"),
    "Excel says its separator": "sep=;\r\n" + dressed(";"),
    "byte order mark": "\ufeff" + dressed(","),
    "space": dressed(",").replace("slide", " slide\u00a0").replace("\nc,", "\n\u2009c\u200b , \t"),
    "columns without heading and content": (
        dressed(",")
        .replace("slide,text", "slide,text,,")
        .replace('three"', 'three",,')
        .replace("c,", "c,,")
    ),
    "quoted headings": dressed(",").replace("slide,text", '"slide","text"'),
}


@pytest.mark.parametrize("dress", DRESSES)
def test_a_table_reads_the_same_in_every_dress(tmp_path, dress):
    file = tmp_path / "t.csv"
    file.write_bytes(DRESSES[dress].encode("utf-8"))
    assert [row for _, row in read_rows(file)] == ROWS


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings_that_say_what_they_are(tmp_path, encoding):
    file = tmp_path / "t.csv"
    file.write_bytes("slide,caption\npräparat №5,腺癌。\n".encode(encoding))
    assert read_rows(file) == [(2, {"slide": "präparat №5", "caption": "腺癌。"})]


def test_separators_within_quotation_marks_and_other_cells_do_not_count(tmp_path):
    file = tmp_path / "t.csv"
    file.write_text('slide;"grade (a, b, c)"\nx;2,5\n')
    assert read_rows(file) == [(2, {"slide": "x", "grade (a, b, c)": "2,5"})]
    file.write_text("slide\na\nb\n")
    assert [row for _, row in read_rows(file)] == [{"slide": "a"}, {"slide": "b"}]
    file.write_text(",slide,label\n0,a,x\n1,b,y\n")  # pandas wrote its index
    assert read_rows(file)[1] == (3, {"": "1", "slide": "b", "label": "y"})


WRONG = {
    "unquoted comma": (b"slide,note\na,ok\nb,moderate, grade 2\n", "line 3: 3 cells", "comma"),
    "unquoted semicolon": (b"slide;note\nb;moderate; grade 2\n", "line 2: 3 cells", "semicolon"),
    "too few": (b"slide,a,b\nx,1\n", "line 2: 2 cells where the first line has 3", "line"),
    "after a cell of three lines": (b'slide,t\na,"1\n2\n3"\nb\n', "line 5: 1 cells", "line"),
    "open quotation mark": (b'slide,t\na,b\nc,"d\n', "line 3: a quotation mark", "line"),
    "column twice": (b"slide,t,slide\na,b,c\n", "line 1: the column 'slide' is there twice", ""),
    "two columns without heading": (b",,slide\n0,1,a\n", "line 1: the column '' is", ""),
    "zero byte": (b"slide,t\na,b\0b\n", "line 2: a zero byte", ""),
    "nothing": (b"", "has no rows", "first line"),
    "only headings": (b"slide,t\n\n", "has no rows", "first line"),
    "Latin-1": (b"slide,t\na,b\nc,\xe9t\xe9\n", "line 3: not UTF-8", "UTF-8"),
    "a spreadsheet": (b"PK\x03\x04rest", "is a spreadsheet", "CSV"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_names_file_line_and_remedy(tmp_path, case):
    content, told, hint = WRONG[case]
    file = tmp_path / "t.csv"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        read_rows(file)
    assert told in error.value.message
    assert str(file) in error.value.message
    assert hint in error.value.hint
    assert error.value.hint


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_text(tmp_path / "none.csv")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_text(tmp_path)


@pytest.mark.parametrize(
    "cell", ["", " ", "nan", "NaN", "NA", "N/A", "#N/A", "<NA>", "NULL", "NaT"]
)
def test_empty_cells_as_software_writes_them(cell):
    assert is_missing(cell)
    assert is_missing(f"\u00a0{cell} ")
    assert known(cell) is None


@pytest.mark.parametrize("cell", ["Unknown", "None", "not reported", "[Not Available]", "'--"])
def test_what_people_write_for_an_unknown_label(cell):
    assert is_unknown(cell)
    assert known(cell) is None
    assert not is_missing(cell)  # "none" may be the answer to a question


@pytest.mark.parametrize("cell", ["0", "no", "P1", "naive", "Nanna", "null cell", "N/A1"])
def test_what_is_said_stays(cell):
    assert not is_missing(cell)
    assert known(f" {cell}\u2003") == cell


def test_a_dash_is_no_patient_but_may_be_a_result():
    assert known("-") is None
    assert not is_unknown("-")


def test_clean_leaves_the_inside_alone():
    assert clean("\ufeff\u200b a\u00a0 b\t\n\u3000") == "a\u00a0 b"


def test_columns_are_found_whatever_their_case(tmp_path):
    row = {"Slide_ID": "a", "slide": "b", "More": "c"}
    assert column("f", row, ("wsi", "slide_id", "slide")) == "Slide_ID"
    assert column("f", row, ("wsi",)) is None
    with pytest.raises(ConfigError, match="no column 'less'"):
        column("f", row, (), asked="less")


def test_json_lists_and_lines_with_their_lines(tmp_path):
    file = tmp_path / "t.json"
    file.write_text('\ufeff[{"a": 1},\n\n{"a":\n 2}]')
    assert list(json_entries(file)) == [(1, {"a": 1}), (3, {"a": 2})]
    file.write_text('{"a": 1}\n{"a": 2}\n')
    assert list(json_entries(file)) == [(1, {"a": 1}), (2, {"a": 2})]
