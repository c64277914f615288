"""Checks of copies: planted faults are found and named, whole ones pass."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from pathflip.cli import main
from pathflip.datasets import cards
from pathflip.datasets.cards import Card, FileCard, Place
from pathflip.datasets.check import check, entries
from pathflip.errors import ConfigError

TABLE = "ID,Slide,Size(cm),Answer\n1,a,2.5,A\n2,b,1.0,B\n3,a,0.5,A\n"
LINES = [{"image": "a.jpg", "box": [1, 2]}, {"image": "b.jpg", "box": [3, 4]}]
CARD = Card(
    name="toy", title="Toy", about="Toy.", licence="none", measures=(),
    get=(Place(what="all", where="https://example.org"),),
    files=(
        FileCard(
            path="table.csv", holds="a table", columns=("id", "Size"), rows=3,
            distinct={"Slide": 2}, values={"Answer": ("A", "B")},
            sha256={"table.csv": hashlib.sha256(TABLE.encode()).hexdigest()},
        ),
        FileCard(path="lines.jsonl", holds="lines", columns=("box",), refers={"image": "p/{}"}),
        FileCard(path="p/*.jpg", holds="pictures", files=2),
        FileCard(path="more.csv", holds="more", optional=True, stated_rows=10),
    ),
)  # fmt: skip


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    (tmp_path / "p").mkdir()
    (tmp_path / "table.csv").write_bytes(TABLE.encode())
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / "p" / name).write_bytes(name.encode())
    return tmp_path


def codes(document: dict[str, Any]) -> set[tuple[str, str]]:
    return {(one["path"], said["code"]) for one in document["files"] for said in one["problems"]}


def test_a_whole_copy_passes_and_counts_are_true(copy: Path) -> None:
    document = check(CARD, copy)
    assert document["whole"]
    assert document["problems"] == 0
    counted = {one["path"]: (one["files"], one["rows"]) for one in document["files"]}
    assert counted == {"table.csv": (1, 3), "lines.jsonl": (1, 2), "p/*.jpg": (2, None)}


def test_a_copy_in_a_folder_of_its_own_is_found(copy: Path, tmp_path: Path) -> None:
    outer = tmp_path.parent / f"{tmp_path.name}-outer"
    outer.mkdir()
    copy.rename(outer / "inner")
    assert check(CARD, outer)["folder"] == str(outer / "inner")
    assert check(CARD, outer)["whole"]


@pytest.mark.parametrize(
    ("file", "text", "found"),
    [
        ("table.csv", None, {("table.csv", "missing")}),
        ("table.csv", TABLE + "4,b,1,B\n", {("table.csv", "rows"), ("table.csv", "sha256")}),
        ("table.csv", TABLE.replace("Size(cm)", "Width"),
         {("table.csv", "columns"), ("table.csv", "sha256")}),
        ("table.csv", TABLE.replace("b,1.0,B", "a,1.0,C"),
         {("table.csv", "distinct"), ("table.csv", "values"), ("table.csv", "sha256")}),
        ("table.csv", TABLE.replace("2.5", "2.6"), {("table.csv", "sha256")}),
        ("table.csv", TABLE + "4,b\n", {("table.csv", "unreadable"), ("table.csv", "sha256")}),
        ("lines.jsonl", '{"image": "c.jpg", "box": []}\n', {("lines.jsonl", "refers")}),
        ("lines.jsonl", '{"image": "a.jpg"', {("lines.jsonl", "unreadable")}),
        ("lines.jsonl", "[1, 2]\n", {("lines.jsonl", "unreadable")}),
        ("lines.jsonl", "", {("lines.jsonl", "empty")}),
        ("table.csv", TABLE.split("\n")[0] + "\n",
         {("table.csv", "unreadable"), ("table.csv", "sha256")}),
        ("table.csv", TABLE.replace("b", "\0"),
         {("table.csv", "unreadable"), ("table.csv", "sha256")}),
        ("p/b.jpg", None, {("p/*.jpg", "files"), ("lines.jsonl", "refers")}),
        ("p/b.jpg", "", {("p/*.jpg", "empty")}),
    ],
)  # fmt: skip
def test_a_planted_fault_is_found_and_nothing_else(
    copy: Path, file: str, text: str | None, found: set[tuple[str, str]]
) -> None:
    if text is None:
        (copy / file).unlink()
    else:
        (copy / file).write_bytes(text.encode())
    document = check(CARD, copy)
    assert codes(document) == found
    assert document["problems"] == len(found)
    assert not document["whole"]


def test_a_line_that_is_cut_off_is_told_with_its_cells(copy: Path) -> None:
    (copy / "table.csv").write_text(TABLE + "4,b\n")
    (said, _) = check(CARD, copy)["files"][0]["problems"]
    assert "line 5: 2 cells where the first line has 4" in said["message"]


def test_headings_may_have_space_around_them(copy: Path) -> None:
    (copy / "table.csv").write_text(TABLE.replace("ID,Slide,", "ID , Slide , "))
    assert codes(check(CARD, copy)) == {("table.csv", "sha256")}
    assert next(entries(copy / "table.csv", "Slide"))["Slide"] == "a"


def test_a_text_of_another_encoding_is_named(copy: Path) -> None:
    (copy / "table.csv").write_bytes(TABLE.encode("utf-16"))
    (said, _) = check(CARD, copy)["files"][0]["problems"]
    assert "table.csv is not UTF-8" in said["message"]


@pytest.mark.parametrize("name", cards.names())
def test_an_empty_folder_is_no_whole_copy(tmp_path: Path, name: str) -> None:
    document = check(cards.read_card(name), tmp_path)
    assert not document["whole"]
    assert {code for _, code in codes(document)} == {"missing"}


def test_a_file_is_looked_for_beside_another_and_in_one_of_two_places(tmp_path: Path) -> None:
    table = FileCard(
        path="*/table.csv", holds="a table", columns=("image",), beside="about.yaml",
        refers={"image": "p/{}|q/{}"},
    )  # fmt: skip
    card = dataclasses.replace(CARD, files=(table,))
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "table.csv").write_text("image\na.jpg\n")
    document = check(card, tmp_path)
    said = [problem["message"] for problem in document["files"][0]["problems"]]
    assert said[0] == "one/table.csv has no about.yaml beside it"
    assert "'p/a.jpg'" in said[1]
    (tmp_path / "one" / "about.yaml").write_text("x: 1\n")
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "a.jpg").write_bytes(b"a")
    assert check(card, tmp_path)["whole"]


def test_a_stated_count_that_differs_is_a_note_and_no_problem(copy: Path) -> None:
    (copy / "more.csv").write_text("a\n1\n")
    document = check(CARD, copy)
    assert document["whole"]
    assert document["files"][-1]["notes"] == ["more.csv has 1 rows; 10 are stated"]


def manifest(copy: Path, *, digest: str = "") -> str:
    rows = ["id\tfilename\tmd5\tsize\tstate"]
    for name in ("a.jpg", "b.jpg"):
        content = (copy / "p" / name).read_bytes()
        own = digest or hashlib.md5(content).hexdigest()
        rows.append(f"u\t{name}\t{own}\t{len(content)}\treleased")
    return "\n".join(rows) + "\n"


def test_a_published_list_is_compared(copy: Path) -> None:
    listed = copy / "manifest.txt"
    listed.write_text(manifest(copy))
    assert check(CARD, copy, checksums=listed)["whole"]
    (copy / "p" / "a.jpg").write_bytes(b"A.jpg")  # as long, and another
    assert codes(check(CARD, copy, checksums=listed)) == {("manifest.txt", "sha256")}
    (copy / "p" / "a.jpg").write_bytes(b"a.jp")
    assert codes(check(CARD, copy, checksums=listed)) == {("manifest.txt", "size")}
    listed.write_text(f"{hashlib.sha256(b'b.jpg').hexdigest()}  somewhere/b.jpg\n")
    assert check(CARD, copy, checksums=listed)["whole"]
    listed.write_text(f"{'0' * 64} *c.jpg\n")
    assert codes(check(CARD, copy, checksums=listed)) == {("manifest.txt", "missing")}
    listed.write_text("no digest here\n")
    with pytest.raises(ConfigError, match="line 1: no digest"):
        check(CARD, copy, checksums=listed)


# -- the command ----------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["datasets", *words])
    told = capsys.readouterr()
    return int(str(ended.value.code)), told.out, told.err


def test_the_command_says_it_by_exit_code_and_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "check", "pathtext", str(tmp_path), "--json")
    assert code == 1
    document = json.loads(out)
    assert not document["whole"]
    assert codes(document) == {("TCGA_*/*/annotation", "missing")}
    case = tmp_path / "TCGA_BRCA" / "TCGA-A7-A6VV"
    case.mkdir(parents=True)
    (case / "annotation").write_text('"Invasive ductal carcinoma."')
    code, out, _ = run(capsys, "check", "pathtext", str(tmp_path))
    assert code == 0
    assert "whole" in out
    code, _, err = run(capsys, "check", "pathtext", str(tmp_path / "none"))
    assert code == 2
    assert "There is no folder" in err
    code, _, err = run(capsys, "check", "pathtxt", str(tmp_path))
    assert code == 2
    assert "Did you mean pathtext" in err


def test_cards_are_listed_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "list", "--json")
    assert code == 0
    assert "slidechat" in {one["name"] for one in json.loads(out)["datasets"]}
    code, out, _ = run(capsys, "show", "slidechat")
    assert code == 0
    assert "pathflip evaluate retrieval" in out
    assert "not verified" in out
    code, out, _ = run(capsys, "show", "slidechat", "--json")
    files = {one["path"]: one for one in json.loads(out)["files"]}
    assert files["SlideInstruct_train_stage1_caption.json"]["stated_rows"] == 4181
