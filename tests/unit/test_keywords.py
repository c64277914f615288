"""Keywords of captions: vectors by hand, a slow plain reference, and what must not matter."""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pathflip.errors import ConfigError
from pathflip.keywords import (
    EXTRACTOR,
    ITEMS,
    MIN_BAGS,
    STOP_WORDS,
    Keywords,
    caption_keywords,
    corpus_frequent,
    extract,
    extractor_version,
    load_lexicon,
    make_lexicon,
    singular,
)
from pathflip.text import denies, split_sentences

NONE = make_lexicon([])


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("No necrosis is identified; mitoses are frequent.", {"mitosis", "frequent"}),
        ("without evidence of invasion or atypia", set()),
        ("Nuclei with grooves", {"nucleus", "groove"}),
        ("Necrosis is absent, and Villi are blunted.", {"villus", "blunted"}),
        ("Necrosis not identified. Mitotic figures are not clearly seen.", set()),
        ("There is no atypia, mitotic activity, or necrosis.", set()),
        ("There is no atypia, necrosis is extensive.", {"necrosis", "extensive"}),
        ("No necrosis, frequent mitoses.", {"frequent mitosis"}),
        ("No ulcer, but erosions.", {"erosion"}),
        (
            "Glands without atypia, necrosis or mitoses but with fibrous stroma.",
            {"gland", "fibrous stroma"},
        ),
        # Five words after the denying one are left out, the sixth is not.
        ("Glands free of one two three four five six seven", {"gland", "six seven"}),
        ("Glands free of one two without three four five six seven eight", {"gland", "eight"}),
        ("The nuclei are not enlarged.", {"nucleus"}),
        ("No. 3 shows", set()),
        ("Non-necrotizing granulomas (H&E, 20x; 12 mm).", {"non-necrotizing granuloma"}),
        ("Paget’s disease with signet-ring cells", {"paget disease", "signet ring cell"}),
        ("MARKED pleomorphism - tumours: grey", {"marked pleomorphism", "tumor", "gray"}),
        ("one two three four five six", {"three four five six"}),
        ("The image shows a section in which there is", set()),
        ("", set()),
        ("12 3.5 % a b c", set()),
    ],
)
def test_keywords_of_a_caption(caption: str, expected: set[str]) -> None:
    assert set(caption_keywords(caption, lexicon=NONE)) == expected


def test_terms_of_the_lexicon_are_found_within_longer_phrases_the_longest_first() -> None:
    lexicon = make_lexicon(["Signet-ring cells", "cell", "loss of polarity", "carcinoma"])
    found = caption_keywords(
        "Poorly cohesive signet ring cell carcinoma cells with loss of polarity.", lexicon=lexicon
    )
    assert found == [
        "ring cell carcinoma cell", "loss", "polarity", "signet ring cell", "carcinoma", "cell",
        "loss of polarity",
    ]  # fmt: skip
    denied = caption_keywords("There is no loss of polarity, carcinoma or cell.", lexicon=lexicon)
    assert denied == []


@pytest.mark.parametrize(
    ("plural", "expected"),
    [
        ("nuclei", "nucleus"), ("mitoses", "mitosis"), ("metastases", "metastasis"),
        ("papillae", "papilla"), ("villi", "villus"), ("lumina", "lumen"), ("cells", "cell"),
        ("biopsies", "biopsy"), ("masses", "mass"), ("branches", "branch"), ("cases", "case"),
        ("nucleus", "nucleus"), ("necrosis", "necrosis"), ("loss", "loss"), ("mucus", "mucus"),
        ("pancreas", "pancreas"), ("series", "series"), ("gas", "gas"), ("dose", "dose"),
        ("doses", "dose"), ("noses", "nose"),
    ],
)  # fmt: skip
def test_singular(plural: str, expected: str) -> None:
    assert singular(plural) == expected
    assert singular(expected) == expected


def test_rank_is_tf_idf_within_the_bag() -> None:
    """Scores by hand: three captions; "hub" is in all of them and comes last."""
    captions = ["hub. rare rare.", "hub. common. often two.", "hub. common. two. two.", None]
    bag = extract(captions, lexicon=NONE)
    scores = {
        "rare rare": 1 * math.log(4 / 2),
        "common": 2 * math.log(4 / 3),
        "two": 3 * math.log(4 / 3),
        "hub": 3 * math.log(4 / 4),
    }
    assert bag.vocabulary == sorted(scores, key=lambda word: -scores[word])
    assert [bag.of(node) for node in range(4)] == [
        ["rare rare", "hub"], ["two", "common", "hub"], ["two", "common", "hub"], [],
    ]  # fmt: skip
    assert bag.offsets.dtype == np.uint16
    assert bag.indices.dtype == np.uint8
    first = extract(captions, lexicon=NONE, cap=1, dropped=frozenset({"two"}))
    assert first.vocabulary == ["rare rare"]
    assert first.offsets.tolist() == [0, 1, 1, 1, 1]


def test_ties_are_ordered_by_spelling_and_an_empty_bag_is_no_error() -> None:
    assert extract(["b. c. a."], lexicon=make_lexicon("cab")).vocabulary == ["a", "b", "c"]
    for nothing in ([None] * 85, ["No necrosis."] * 85, [""] * 85):
        bag = extract(nothing)
        assert (bag.vocabulary, bag.offsets.tolist(), len(bag.indices)) == ([], [0] * 86, 0)
    with pytest.raises(ValueError, match="cap is 256"):
        extract(["a"], cap=256)


def test_a_bag_keeps_the_best_255() -> None:
    captions = [f"word{chr(97 + n % 26)}{chr(97 + n // 26)}x" for n in range(300)]
    bag = extract(captions, lexicon=NONE)
    assert bag.vocabulary == sorted(captions)[:255]
    assert bag.indices.max() == 254


def test_what_most_bags_hold_is_frequent() -> None:
    bags = [["image", f"finding {n}"] + (["tissue"] if n < 12 else []) for n in range(MIN_BAGS)]
    assert corpus_frequent(bags) == {"image"}, "12 of 20 are not more than 60 %"
    assert corpus_frequent(bags, share=0.5) == {"image", "tissue"}
    assert corpus_frequent(bags[:-1]) == frozenset(), "too few bags to say"
    assert corpus_frequent([["a", "a", "a"], *([["b"]] * 30)]) == {"b"}


def test_the_lexicon_that_comes_along() -> None:
    lexicon = load_lexicon()
    assert 600 <= len(lexicon.terms) <= 1000
    assert {"signet ring cell", "cribriform pattern", "lymphovascular invasion"} <= lexicon.terms
    assert extractor_version() == f"{EXTRACTOR}:{lexicon.sha}"
    assert re.fullmatch(r"rake-\d+:[0-9a-f]{8}", extractor_version())
    cues = [term for term in lexicon.terms if caption_keywords(term, lexicon=lexicon) == []]
    assert cues == [], "a term that denies can never be found"


def test_a_file_of_terms_is_added_and_changes_the_version(tmp_path: Path) -> None:
    file = tmp_path / "terms.txt"
    file.write_bytes("\ufeff# planted\r\nZebra-striped nuclei\r\n\r\n".encode())
    lexicon = load_lexicon(file)
    assert lexicon.terms - load_lexicon().terms == {"zebra striped nucleus"}
    assert extractor_version(lexicon) != extractor_version()
    assert lexicon.kept == {"zebra striped nucleus"}
    again = make_lexicon(sorted(lexicon.terms, reverse=True), kept=lexicon.kept)
    assert again.sha == lexicon.sha, "order and repeats of the terms do not count"
    assert make_lexicon(lexicon.terms).sha != lexicon.sha, "what is kept does"
    with pytest.raises(ConfigError, match="cannot be read"):
        load_lexicon(tmp_path / "none.txt")


# -- against a plain reference --------------------------------------------------------------------

LEXICON = make_lexicon(
    ["signet ring cells", "cell", "loss of polarity", "fibrous stroma", "no man"]
)
_VOCABULARY = tuple(
    re.findall(
        r"\S+",
        "no not without absence of negative for free lack nor or and but however while is are "
        "shows  absent seen identified clearly glands nuclei mitoses necrosis signet-ring cells "
        "fibrous stroma  loss of polarity non-small the in with a 20x 7 tumour's man , , ; . ( "
        ") : - large e.g. Evidence ",
    )
)
_captions = st.lists(st.sampled_from(_VOCABULARY), max_size=24).map(
    lambda words: re.sub(r" ([,;.)])", r"\1", " ".join(words))
)


def plain(captions: list[str | None], *, cap: int, dropped: frozenset[str]) -> Keywords:
    """The rules of the module, a step at a time, without any of its shortcuts."""
    own = [plain_caption(text) if text else [] for text in captions]
    texts = sum(1 for text in captions if text)
    scored = []
    for word in {word for words in own for word in words} - dropped:
        mentions = sum(words.count(word) for words in own)
        nodes = sum(word in words for words in own)
        scored.append((-mentions * math.log((1 + texts) / (1 + nodes)), word))
    vocabulary = [word for _, word in sorted(scored)][:cap]
    offsets, indices = [0], []
    for words in own:
        indices += [at for at, word in enumerate(vocabulary) if word in words]
        offsets.append(len(indices))
    return Keywords(
        vocabulary=vocabulary,
        offsets=np.array(offsets, np.uint16),
        indices=np.array(indices, np.uint8),
    )


def plain_caption(text: str) -> list[str]:
    found: list[str] = []
    for sentence in split_sentences(text):
        for part in plain_affirmed(sentence.lower()):
            words = [singular(word) for word in part]
            runs, run = [], []
            for word in [*words, "the"]:
                if word in STOP_WORDS or len(word) == 1 or not word[0].isalpha():
                    if run:
                        runs.append(" ".join(run[-4:]))
                    run = []
                else:
                    run.append(word)
            terms = []
            at = 0
            while at < len(words):
                ends = [
                    end
                    for end in range(len(words), at, -1)
                    if " ".join(words[at:end]) in LEXICON.terms
                ]
                if ends:
                    terms.append(" ".join(words[at : ends[0]]))
                at = ends[0] if ends else at + 1
            found += runs + [term for term in terms if term not in runs]
    return found


def plain_affirmed(sentence: str) -> list[list[str]]:
    sentence = sentence.replace("'s", " ")
    marked = re.sub(r"\b(but|however|although|though|whereas|while|yet)\b", r"; ", sentence)
    pieces = re.split(r"([,;])", marked)
    clauses = [("", pieces[0]), *zip(pieces[1::2], pieces[2::2], strict=True)]
    parts: list[list[str]] = []
    skip_to = -1
    for number, (_, clause) in enumerate(clauses):
        if number < skip_to:
            continue
        tokens = re.findall(r"non-\w+|\w+|[^\w\s-]|(?<!\w)-", clause)
        words = [token for token in tokens if token[0].isalnum()]
        said = " ".join(words)
        not_there = re.search(
            r"\bnot (\w+ )?(seen|identified|evident|present)\b|\bnever seen\b|\babsent$", said
        )
        open_at_end = True
        if not (denies(said) or not_there):
            part: list[str] = []
            left = 0
            at = 0
            while at < len(tokens):
                rest = tokens[at:]
                width = 0
                if rest[0] in ("no", "not", "nor", "neither", "never", "without", "lack"):
                    width = 1
                elif rest[:2] in (
                    ["absence", "of"], ["negative", "for"], ["free", "of"], ["devoid", "of"],
                ):  # fmt: skip
                    width = 2
                if width:
                    parts.append(part)
                    part, left = [], 5
                elif left == 0:
                    part.append(rest[0])
                elif rest[0][0].isalnum():
                    left -= 1
                at += width or 1
            parts.append(part)
            open_at_end = left > 0
        if open_at_end:
            for later in range(number + 1, len(clauses)):
                turn, item = clauses[later]
                verbs = re.search(r"\b(is|are|shows)\b", item)
                if turn != "," or verbs:
                    break
                if re.search(r"\b(or|nor)\b", item):
                    skip_to = later + 1
                    break
    return parts


@given(st.lists(st.none() | _captions, max_size=8), st.integers(0, 12))
@settings(max_examples=150, deadline=None)
def test_keywords_are_those_of_the_plain_reference(captions: list[str | None], cap: int) -> None:
    dropped = frozenset({"gland"})
    found = extract(captions, lexicon=LEXICON, cap=cap, dropped=dropped)
    expected = plain(captions, cap=cap, dropped=dropped)
    assert found.vocabulary == expected.vocabulary
    assert found.offsets.tolist() == expected.offsets.tolist()
    assert found.indices.tolist() == expected.indices.tolist()


def test_keywords_change_only_with_the_version_that_is_stored_with_them() -> None:
    """A faster way to the same keywords: their digest was taken before there was one."""
    rng = random.Random(0)
    digest = hashlib.sha256()
    for _ in range(40):
        captions = [" ".join(rng.choices(_VOCABULARY, k=24)) for _ in range(20)]
        bag = extract(captions, lexicon=LEXICON)
        digest.update(json.dumps([bag.vocabulary, bag.indices.tolist()]).encode())
    assert (EXTRACTOR, digest.hexdigest()[:16]) == ("rake-2", "c0ee7b0f03477ce8")


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_the_order_of_nodes_moves_only_which_node_says_what(data: st.DataObject) -> None:
    captions = data.draw(st.lists(st.none() | _captions, max_size=8))
    order = data.draw(st.permutations(range(len(captions))))
    bag = extract(captions, lexicon=LEXICON)
    moved = extract([captions[at] for at in order], lexicon=LEXICON)
    assert moved.vocabulary == bag.vocabulary
    assert [moved.of(node) for node in range(len(order))] == [bag.of(at) for at in order]
    assert all(a <= b for a, b in pairwise(bag.offsets.tolist()))


@pytest.mark.parametrize(("items", "denied"), [(ITEMS, True), (ITEMS + 1, False)])
def test_an_enumeration_that_is_denied_has_an_end(items: int, denied: bool) -> None:
    names = [f"finding{n}" for n in range(items)]
    text = f"No atypia, {', '.join(names[:-1])}, or {names[-1]}."
    assert caption_keywords(text) == ([] if denied else names)
