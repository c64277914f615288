"""Captions of patch trees' nodes: their files, their rows, and what may be wrong with either."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pathflip.archive import Archive
from pathflip.archive.commit import Committer
from pathflip.archive.tree_texts import (
    NodeCaptions,
    decode_keywords,
    encode_keywords,
    put_captions,
    redo_keywords,
    text_sources,
)
from pathflip.archive.trees import Tree, write_trees
from pathflip.archive.verify import verify
from pathflip.cli import main
from pathflip.errors import ArchiveError, ConfigError
from pathflip.interop.tree_captions import (
    PROMPT,
    import_tree_captions,
    parse_tree_image,
    read_tree_captions,
    tree_image_name,
)
from pathflip.keywords import extended_lexicon, extract, extractor_version, load_lexicon
from tests.archives import make_archive
from tests.trees import MASKED, make_bare_trees

TREES = [(f"slide{n:03d}", tx) for n in range(2) for tx in range(2)]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bare_trees(tmp_path_factory.mktemp("trees") / "a")


@pytest.fixture
def uri(pristine: Path, tmp_path: Path) -> str:
    return str(shutil.copytree(pristine, tmp_path / "a"))


def line(
    slide: str, tx: int, node: int, text: str | None, model: str | None = "vlm-7b", **more: Any
) -> dict[str, Any]:
    image = tree_image_name(slide, tx=tx, ty=0, node=node)
    return {"Image": image, "prompt": PROMPT, "Answer": text, "model_id": model} | more


def write(folder: Path, lines: list[dict[str, Any]], name: str = "captions.jsonl") -> Path:
    file = folder / name
    file.write_text("\n".join(json.dumps(one) for one in lines))
    return file


def run(uri: str, file: Path, **given: Any) -> dict[str, Any]:
    captions = read_tree_captions(Archive(uri), file)
    return import_tree_captions(uri, captions, **({"source": "vlm"} | given))


def rows(uri: str, source: str = "vlm") -> dict[str, dict[str, Any]]:
    table = Archive(uri).dataset("tree_texts").to_table().to_pylist()
    return {row["tree_id"]: row for row in table if row["source"] == source}


@pytest.mark.parametrize("slide", ["S1-0a1b2c3d", "TCGA-A7-A0CJ-01Z-00-DX2.1f", "sé__n1 x", "__t"])
def test_a_name_is_parsed_as_it_was_made(slide: str) -> None:
    for tx, ty, node in ((0, 0, 0), (12, 3, 84), (100000, 7, 21)):
        name = tree_image_name(slide, tx=tx, ty=ty, node=node)
        upper, bare = name.replace(".png", ".PNG"), name.removesuffix(".png")
        for spelled in (name, upper, bare, f"a/b/{name}", f"C:\\a\\{name}"):
            found = parse_tree_image(spelled)
            assert found is not None
            assert (found.slide, found.tx, found.ty, found.node) == (slide, tx, ty, node)


def test_names_of_no_node() -> None:
    for name in ("", "a.png", "a__t1_2.png", "__t1_2__n3.png", "a__t1_2__n85.png", "a__t-1_2__n3"):
        assert parse_tree_image(name) is None
    assert parse_tree_image(f"a__t{'1' * 5000}_2__n3.png") is None
    nested = parse_tree_image("x__t1_1__n1__t2_3__n4.jpeg")
    assert nested is not None
    assert (nested.slide, nested.tx) == ("x__t1_1__n1", 2)


def test_captions_for_half_of_the_nodes(uri: str, tmp_path: Path) -> None:
    """Every second node of one tree has one; the rest of the archive has none."""
    texts = {node: f"Nest {'ab'[node % 4 // 2]} with mitoses." for node in range(0, 84, 2)}
    lines = [line("slide000", 1, node, text) for node, text in texts.items()]
    document = run(uri, write(tmp_path, lines[::-1]))
    counted = {"source": "vlm", "model": "vlm-7b", "trees": 1, "lines": 42, "nodes": 42, "new": 1}
    assert document == counted | {
        "empty": 0, "duplicates": 0, "masked": 0, "quarantined": 0, "changed": 0, "unchanged": 0,
        "without_keywords": 0, "keywords": 2, "dropped": [], "extractor": extractor_version(),
        "terms": "built-in", "own_terms": 0,
        "unmatched": {"lines": 0, "examples": []}, "ambiguous": {"lines": 0, "examples": []},
    }  # fmt: skip
    assert text_sources(Archive(uri)) == ["vlm"]
    row = rows(uri)["slide000/1_0"]
    assert row["captions"] == [texts.get(node) for node in range(85)]
    keywords = decode_keywords(row["keywords"], row["keyword_of"])
    expected = extract(row["captions"])
    assert keywords.vocabulary == expected.vocabulary == ["mitosis", "nest"]
    assert [keywords.of(node) for node in range(85)] == [expected.of(node) for node in range(85)]
    assert (row["model"], row["slide_id"]) == ("vlm-7b", "slide000")
    assert row["text_id"] == "slide000/1_0/vlm"
    assert verify(uri).damaged == []
    again = run(uri, tmp_path / "captions.jsonl")
    assert (again["new"], again["changed"], again["unchanged"]) == (0, 0, 1)


def test_the_command_imports_plans_and_reads_further_terms(
    uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, [line("slide000", 0, 1, "Striped zebras within large striped zebras.")])
    terms = tmp_path / "terms.txt"
    terms.write_text("striped zebra\n")
    words = ["archive", "import", "--archive", uri, "--tree-captions", str(file), "--json"]
    words += ["--terms", str(terms)]
    for more in (["--dry-run"], []):
        with pytest.raises(SystemExit) as ended:
            main([*words, *more])
        assert not ended.value.code
        told = json.loads(capsys.readouterr().out)
        assert told.get("dry_run", False) == bool(more)
        document = told["tree_captions"]
        assert (document["source"], document["new"], document["keywords"]) == ("captions", 1, 2)
        assert (document["terms"], document["own_terms"]) == ("given", 1)
        assert ("tree_texts" in Archive(uri).tables()) != bool(more)
    keywords = rows(uri, "captions")["slide000/0_0"]["keywords"]
    assert keywords == ["large striped zebra", "striped zebra"]
    redo = ["trees", "keywords", "--archive", uri, "--json"]
    terms.write_text("")  # takes one's own away again
    none = ["--terms", str(terms)]
    for more, changed, whose in (
        ([], 0, ("stored", 1)),
        (["--dry-run", *none], 1, ("given", 0)),
        ([], 0, ("stored", 1)),
        (none, 1, ("given", 0)),
        ([], 0, ("built-in", 0)),
    ):
        with pytest.raises(SystemExit) as ended:
            main([*redo, *more])
        assert not ended.value.code
        told = json.loads(capsys.readouterr().out)
        assert told.get("dry_run", False) == ("--dry-run" in more)
        counts = told["sources"]["captions"]
        assert (counts["changed"], (counts["terms"], counts["own_terms"])) == (changed, whose)
    assert rows(uri, "captions")["slide000/0_0"]["extractor"] == extractor_version()


def test_what_a_line_may_look_like(uri: str, tmp_path: Path) -> None:
    """BOM, CRLF, empty lines, other endings and folders, padded numbers, an id or a file's name."""
    names = {
        "slide000__t0_0__n0.PNG": "Nuclei.",
        "export/slide000__t0_0__n01.jpeg": " Glands.\n\nSecond line.\u200b ",
        "slide000.svs__t0_0__n2": "Stroma",
        "C:\\out\\SLIDE000__t00_00__n3.Png": "Fat.",
    }
    text = "\r\n\r\n".join(json.dumps({"Image": k, "Answer": v}) for k, v in names.items())
    file = tmp_path / "x.jsonl"
    file.write_bytes("\ufeff".encode() + text.encode() + b"\r\n")
    document = run(uri, file)
    assert (document["nodes"], document["lines"], document["model"]) == (4, 4, None)
    assert document["unmatched"]["lines"] == 0
    captions = rows(uri)["slide000/0_0"]["captions"]
    assert captions[:5] == ["Nuclei.", "Glands.\n\nSecond line.", "Stroma", "Fat.", None]


def test_what_fits_no_tree_is_counted_with_examples(uri: str, tmp_path: Path) -> None:
    none = np.zeros(85, np.float32)
    bad = Tree(
        slide_id="slide000", tx=6, ty=0, mpp=0.25, levels=4, fault="bad_features",
        node_mask=none != 0, node_tissue=none, node_blur=none,
    )  # fmt: skip
    with Committer(uri) as committer:
        write_trees(committer, [bad])
    lines = [
        line("slide000", 0, 0, "Nuclei."),
        line("slide000", 0, MASKED, "Glass."),
        line("slide000", 0, 5, ""),
        line("slide000", 0, 6, None),
        line("slide000", 0, 7, " n/a "),
        *(line("unknown", 0, node, "Nuclei.") for node in range(10)),
        line("slide000", 7, 0, "A tree that is not there."),
        line("slide000", 6, 0, "A tree that is quarantined."),
        line("slide000", 0, 0, "x", Image="thumbnail.png"),
    ]
    document = run(uri, write(tmp_path, lines))
    told = ("lines", "nodes", "masked", "quarantined", "empty", "trees")
    assert [document[key] for key in told] == [18, 1, 1, 1, 3, 1]
    assert document["unmatched"] == {
        "lines": 12, "examples": [tree_image_name("unknown", tx=0, ty=0, node=n) for n in range(5)],
    }  # fmt: skip
    nothing = run(uri, write(tmp_path, lines[5:], "unknown.jsonl"), source="other")
    assert (nothing["new"], nothing["nodes"], nothing["unmatched"]["lines"]) == (0, 0, 12)
    assert text_sources(Archive(uri)) == ["vlm"]


def test_a_slide_that_could_be_several_is_none(uri: str, tmp_path: Path) -> None:
    with Committer(uri) as committer:
        committer.update_slides({"slide001": {"uri": "/other/slide000.svs"}})
    document = run(uri, write(tmp_path, [line("slide000.svs", 0, 3, "Nuclei.")]))
    image = tree_image_name("slide000.svs", tx=0, ty=0, node=3)
    assert document["ambiguous"] == {"lines": 1, "examples": [image]}
    assert document["new"] == 0


def test_lines_twice(uri: str, tmp_path: Path) -> None:
    """The same caption again is counted; another one is an error, also under another name."""
    lines = [line("slide000", 0, 3, "Nuclei."), line("slide000.svs", 0, 3, "Nuclei. ")]
    document = run(uri, write(tmp_path, lines), dry_run=True)
    assert (document["nodes"], document["duplicates"], document["new"]) == (1, 1, 1)
    assert "tree_texts" not in Archive(uri).tables()
    lines += [line("slide000.svs", 0, 3, "Glands.")]
    with pytest.raises(ConfigError, match=r"captions\.jsonl, line 3: another caption of slide000"):
        run(uri, write(tmp_path, lines))


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ("{", "not one JSON object"),
        ('["a"]', "not one JSON object"),
        ('{"Answer": "a"}', "no Image"),
        ('{"Image": "slide000__t0_0__n0.png"}', "no Answer"),
        ('{"Image": "slide000__t0_0__n0.png", "Answer": ["a"]}', "Answer is no text"),
        ('{"Image": "a", "Answer": "a", "model_id": 7}', "model_id is no text"),
        ('{"Image": "a", "Answer": "\\ud83d", "model_id": "vlm-7b"}', "not UTF-8"),
        ('{"Image": "\\ud83d", "Answer": "a", "model_id": "vlm-7b"}', "not UTF-8"),
        (b'{"Image": "a", "Answer": "\xff"}', "not UTF-8"),
        ("{}" * 2, "not one JSON object"),
        ("[" * 10**5, "not one JSON object"),
        ('{"Image": "a", "Answer": "a", "model_id": "b"}', "model_id is b, but vlm-7b in"),
    ],
)
def test_a_wrong_line_names_itself_and_nothing_is_written(
    uri: str, tmp_path: Path, wrong: str | bytes, what: str
) -> None:
    good = json.dumps(line("slide000", 0, 1, "Nuclei.")).encode()
    raw = wrong if isinstance(wrong, bytes) else wrong.encode()
    file = tmp_path / "x.jsonl"
    file.write_bytes(good + b"\n\n" + raw + b"\n")
    with pytest.raises(ConfigError, match=f"line 3: {what}") as error:
        run(uri, file)
    assert "nothing was written" in str(error.value.hint)
    assert "tree_texts" not in Archive(uri).tables()


def test_files_that_hold_nothing(uri: str, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n\n")
    with pytest.raises(ConfigError, match="holds no captions"):
        run(uri, empty)
    with pytest.raises(ConfigError, match="cannot be read"):
        run(uri, tmp_path / "none.jsonl")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match="no files that end in"):
        run(uri, tmp_path / "folder")
    plain = make_archive(tmp_path / "plain", slides=1)
    with pytest.raises(ArchiveError) as error:
        run(str(plain), empty)
    assert error.value.code == "no_trees"


def test_a_folder_of_files_is_one_import(uri: str, tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    for n, (slide, tx) in enumerate(TREES):
        write(
            folder, [line(slide, tx, node, f"Nest {n} {node}.") for node in range(3)], f"{n}.jsonl"
        )
    document = run(uri, folder)
    assert (document["trees"], document["nodes"], document["new"]) == (4, 12, 4)
    assert rows(uri)["slide001/1_0"]["captions"][2] == "Nest 3 2."


def test_further_captions_of_a_model_are_added_and_those_of_another_replace(
    uri: str, tmp_path: Path
) -> None:
    run(uri, write(tmp_path, [line("slide000", 0, 1, "Nuclei."), line("slide000", 0, 2, "Fat.")]))
    run(
        uri,
        write(tmp_path, [line("slide000", 0, 2, "Fibrosis."), line("slide000", 0, 3, "Oedema.")]),
    )
    row = rows(uri)["slide000/0_0"]
    assert row["captions"][:4] == [None, "Nuclei.", "Fibrosis.", "Oedema."]
    assert sorted(row["keywords"]) == ["edema", "fibrosis", "nucleus"]
    document = run(uri, write(tmp_path, [line("slide000", 0, 4, "Bone.", "other")]))
    assert (document["changed"], document["new"]) == (1, 0)
    assert rows(uri)["slide000/0_0"]["captions"][:5] == [None] * 4 + ["Bone."]


def test_no_keyword_in_a_bag(uri: str, tmp_path: Path) -> None:
    lines = [line("slide000", 0, node, "No necrosis is identified.") for node in range(84)]
    document = run(uri, write(tmp_path, lines))
    assert (document["without_keywords"], document["keywords"], document["new"]) == (1, 0, 1)
    row = rows(uri)["slide000/0_0"]
    assert (row["keywords"], row["keyword_of"]) == ([], bytes(172))
    assert decode_keywords([], row["keyword_of"]).of(3) == []


@pytest.fixture
def many(tmp_path: Path) -> str:
    return str(make_bare_trees(tmp_path / "many", slides=4, trees=6))


def test_frequent_words_are_dropped_however_the_captions_came(many: str, tmp_path: Path) -> None:
    """24 trees, 15 of them (62.5 %) with "hub": imported at once, or in two halves, backwards."""
    places = [(f"slide{n:03d}", tx) for n in range(4) for tx in range(6)]
    lines = [
        line(slide, tx, node, ("Hub. " if at < 15 else "") + f"Finding{'abcdef'[tx]}. Common.")
        for at, (slide, tx) in enumerate(places)
        for node in range(2)
    ]
    document = run(many, write(tmp_path, lines))
    assert document["dropped"] == ["common", "hub"]
    whole = rows(many)
    (tmp_path / "terms.txt").write_text("Hubs")
    own = run(many, tmp_path / "captions.jsonl", lexicon=load_lexicon(tmp_path / "terms.txt"))
    assert own["dropped"] == ["common"], "terms of one's own stay"
    later = run(many, tmp_path / "captions.jsonl")
    assert (later["unchanged"], later["terms"], later["own_terms"]) == (24, "stored", 1)
    assert later["extractor"] == own["extractor"]
    back = run(many, tmp_path / "captions.jsonl", lexicon=load_lexicon())
    assert back["dropped"] == ["common", "hub"]
    assert {word for row in whole.values() for word in row["keywords"]} == {
        f"finding{letter}" for letter in "abcdef"
    }
    first = run(many, write(tmp_path, lines[26:]), source="halves")
    assert first["dropped"] == [], "11 trees are too few to say"
    second = run(many, write(tmp_path, lines[:26]), source="halves")
    assert (second["new"], second["changed"], second["unchanged"]) == (13, 11, 0)
    for tree, row in rows(many, "halves").items():
        for column in ("captions", "keywords", "keyword_of", "extractor"):
            assert row[column] == whole[tree][column]


def test_trees_for_testing_are_not_counted(tmp_path: Path) -> None:
    """Hubs are in 15 of 24 trees and none of 8 for testing, rims in 12 and all of those."""
    uri = str(make_bare_trees(tmp_path / "a", slides=4, trees=8))
    with Committer(uri) as committer:
        committer.update_slides({"slide003": {"split": "Testing"}})
    said = ["Hub. Rim."] * 4 + ["Hub."] + ["Stroma."] * 3
    lines = [
        line(f"slide{n:03d}", tx, 0, "Rim." if n == 3 else said[tx])
        for n in range(4)
        for tx in range(8)
    ]
    assert run(uri, write(tmp_path, lines))["dropped"] == ["hub"]


def test_keywords_are_made_again_where_the_terms_change(uri: str, tmp_path: Path) -> None:
    lexicon = extended_lexicon(("striped zebras",))
    run(uri, write(tmp_path, [line("slide000", 0, 1, "The large striped zebras. Nuclei.")]))
    assert "striped zebra" not in rows(uri)["slide000/0_0"]["keywords"]
    with Committer(uri) as committer:
        counts = redo_keywords(committer, lexicon=lexicon)["vlm"]
    assert (counts.changed, counts.extractor) == (1, extractor_version(lexicon))
    row = rows(uri)["slide000/0_0"]
    assert row["keywords"] == ["large striped zebra", "nucleus", "striped zebra"]
    assert row["extractor"] == extractor_version(lexicon)
    with Committer(uri) as committer:
        for same in (lexicon, None):
            assert redo_keywords(committer, source="vlm", lexicon=same)["vlm"].changed == 0
        given = NodeCaptions(
            slide_id="slide001",
            tree_id="slide001/0_0",
            model="m",
            captions=["Striped zebras.", *[None] * 84],
        )
        put_captions(committer, [given], source="m")
        assert redo_keywords(committer, source="m")["m"].extractor == extractor_version(lexicon)
        assert "striped zebra" in rows(uri, "m")["slide001/0_0"]["keywords"]
        with pytest.raises(ArchiveError, match="no captions of source x") as error:
            redo_keywords(committer, source="x")
    assert "vlm" in str(error.value.hint)


def test_captions_put_by_a_job_get_their_keywords_in_one_pass(uri: str) -> None:
    with Committer(uri) as committer:
        with pytest.raises(ArchiveError, match="have no captions"):
            redo_keywords(committer)
        for slide, tx in TREES:
            texts = ["Nuclei.", *[None] * 84]
            tree = f"{slide}/{tx}_0"
            given = NodeCaptions(slide_id=slide, tree_id=tree, model="m", captions=texts)
            put_captions(committer, [given], source="m")
        assert {row["extractor"] for row in rows(uri, "m").values()} == {None}
        assert redo_keywords(committer)["m"].changed == 4
    assert {tuple(row["keywords"]) for row in rows(uri, "m").values()} == {("nucleus",)}
    assert verify(uri).damaged == []


def test_a_damaged_row_is_not_used(uri: str, tmp_path: Path) -> None:
    run(uri, write(tmp_path, [line("slide000", 0, 1, "Nuclei.")]))
    dataset = Archive(uri).dataset("tree_texts")
    row = dataset.to_table()
    at = row.schema.get_field_index("model")
    dataset.delete("true")
    dataset.insert(row.set_column(at, row.schema.field(at), pa.array(["forged"])))
    with Committer(uri) as committer, pytest.raises(ArchiveError) as error:
        redo_keywords(committer)
    assert error.value.code == "damaged"


@pytest.mark.parametrize("wrong", ["short", "index", "order", "length"])
def test_bytes_that_are_no_keywords(wrong: str) -> None:
    keywords = extract(["a few nuclei", "fat"] + [None] * 83)
    data = encode_keywords(keywords)
    assert len(data) == 172 + len(keywords.indices)
    back = decode_keywords(keywords.vocabulary, data)
    np.testing.assert_array_equal(back.offsets, keywords.offsets)
    np.testing.assert_array_equal(back.indices, keywords.indices)
    damaged: dict[str, Callable[[], bytes]] = {
        "short": lambda: data[:100],
        "index": lambda: data[:-1] + b"\x09",
        "order": lambda: data[:2] + b"\x03\x00" + data[4:],
        "length": lambda: data + b"\0",
    }
    with pytest.raises(ValueError, match="keyword"):
        decode_keywords(keywords.vocabulary, damaged[wrong]())
