"""Sentences, sub-captions, tokenizer."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pathflip.text import (
    CANNOT_TELL,
    denies,
    draw_rng,
    sample_subcaptions,
    says_cannot_tell,
    split_sentences,
    train_tokenizer,
)

ABBREVIATIONS = set(re.findall(r"\S+", "al vs dr e.g u.s approx cm mm no inc µm"))
MAY_END = {"cm", "mm", "no", "al", "inc", "µm"}
UNITS = {"cm", "mm", "µm"}
GO_ON = {"in", "of"}
OPENERS = {"the", "a", "in", "no"}
LETTERED = {"type"}
TAKES_A_NAME = {"of"}
TITLES = {"dr"}
"""Those of the module's that the plain reference meets."""
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        # Split by hand.
        (
            "The tumor measures 2.5 x 1.8 x 0.4 cm. Margins are clear by 0.3 cm. Stage pT2a N0.",
            [
                "The tumor measures 2.5 x 1.8 x 0.4 cm.",
                "Margins are clear by 0.3 cm.",
                "Stage pT2a N0.",
            ],
        ),
        (
            "Findings vs. prior biopsy are unchanged. Dr. Lee agrees (see Fig. 2).",
            ["Findings vs. prior biopsy are unchanged.", "Dr. Lee agrees (see Fig. 2)."],
        ),
        (
            "ER is positive, e.g. 90% of nuclei. Ki-67 is 12.5%.",
            ["ER is positive, e.g. 90% of nuclei.", "Ki-67 is 12.5%."],
        ),
        (
            "1. Invasive carcinoma. 2. Margins negative.",
            ["1. Invasive carcinoma.", "2. Margins negative."],
        ),
        ("Mitoses 15/10 HPF. Necrosis present.", ["Mitoses 15/10 HPF.", "Necrosis present."]),
        (
            "Gleason score 3+4=7. No. of nodes: 14.",
            ["Gleason score 3+4=7.", "No. of nodes: 14."],
        ),
        # Hard breaks, missing space, initials, other stops.
        ("One</s>two\n\nthree", ["One", "two", "three"]),
        (
            "It measures 5 cm.The margins are clear.",
            ["It measures 5 cm.", "The margins are clear."],
        ),
        ("Stage pT2a.N0 by p53.", ["Stage pT2a.N0 by p53."]),
        ("Toxins of C. difficile were found.", ["Toxins of C. difficile were found."]),
        ("Seen by Dr. A. Lee. Agreed.", ["Seen by Dr. A. Lee.", "Agreed."]),
        ("See U.S. guidelines. Done.", ["See U.S. guidelines.", "Done."]),
        ("Is it malignant? Yes! It is.", ["Is it malignant?", "Yes!", "It is."]),
        ("IV. Diagnosis follows. Then more.", ["IV. Diagnosis follows.", "Then more."]),
        ('He wrote "benign." Then "not."', ['He wrote "benign."', 'Then "not."']),
        ("  spaces   \t collapse .  ... ", ["spaces collapse ."]),
        ("No stop at the end", ["No stop at the end"]),
        # Lower-case beginnings.
        (
            "It grows in a diffuse manner. moderately differentiated tubules. HER2 3+. pT2a pN0.",
            [
                "It grows in a diffuse manner.",
                "moderately differentiated tubules.",
                "HER2 3+.",
                "pT2a pN0.",
            ],
        ),
        (
            "Tubules with mucin. infiltr. cells. fat. the rest.",
            ["Tubules with mucin.", "infiltr. cells.", "fat.", "the rest."],
        ),
        ("Nodes pos. margins neg.", ["Nodes pos. margins neg."]),
        (
            "It shows ... benign glands (see above.) and fat.",
            ["It shows ... benign glands (see above.) and fat."],
        ),
        # Measures.
        ("It is 2.5 cm. 3 of 12 nodes.", ["It is 2.5 cm.", "3 of 12 nodes."]),
        ("Size 3.2cm. margins free.", ["Size 3.2cm.", "margins free."]),
        ("Size 3.2 cm. in length. 5 mm. from it.", ["Size 3.2 cm. in length.", "5 mm. from it."]),
        ("Nuclei are round.3 mitoses.", ["Nuclei are round.", "3 mitoses."]),
        ("Fig.3 is approx.3 cm of no.2.", ["Fig.3 is approx.3 cm of no.2."]),
        ("Grade 2 of 3.Tubules 3.Nuclei 2.", ["Grade 2 of 3.", "Tubules 3.", "Nuclei 2."]),
        # Items: letters and numbers of lists.
        (
            "A. Colon: adenoma. B. Rectum: polyp.",
            ["A. Colon: adenoma.", "B. Rectum: polyp."],
        ),
        ("i. Tumour present. ii. Margins clear.", ["i. Tumour present.", "ii. Margins clear."]),
        ("a) adenoma. b) polyp.", ["a) adenoma.", "b) polyp."]),
        ("1.Colon: polyp.2.Rectum.", ["1.Colon: polyp.", "2.Rectum."]),
        ("A.\nColon: polyp.\n2)\nFat.\nB.", ["A. Colon: polyp.", "2) Fat. B."]),
        ("Mitoses:\n2.\nGrade: 3.", ["Mitoses: 2.", "Grade: 3."]),
        ("A.", []),
        # Initials, and letters that are none.
        ("Seen by Dr. A. B. Smith. Agreed.", ["Seen by Dr. A. B. Smith.", "Agreed."]),
        ("Seen by G. Van Veen. Agreed.", ["Seen by G. Van Veen.", "Agreed."]),
        ("Positive for H. Pylori. Treat.", ["Positive for H. Pylori.", "Treat."]),
        ("Hepatitis B. Cirrhosis.", ["Hepatitis B.", "Cirrhosis."]),
        ("Pattern a. The rest. Grade I. Fat.", ["Pattern a.", "The rest.", "Grade I.", "Fat."]),
        (
            "History of ca. Breast. Duct ca. Margins free.",
            ["History of ca. Breast.", "Duct ca.", "Margins free."],
        ),
        # Other scripts.
        ("腺癌。中分化，2.5cm。切缘阴性！", ["腺癌。", "中分化，2.5cm。", "切缘阴性！"]),
        ("「腫瘍。」断端陰性", ["「腫瘍。」", "断端陰性"]),
        ("Adenoma.切缘阴性。1.结肠", ["Adenoma.", "切缘阴性。", "1.结肠"]),
        ("यह कैंसर है। सीमा साफ है।", ["यह कैंसर है।", "सीमा साफ है।"]),
        ("الورم خبيث. الهوامش سليمة؟ نعم.", ["الورم خبيث.", "الهوامش سليمة؟", "نعم."]),
        ("Mide 2 cm. ¿Invasión? No.", ["Mide 2 cm.", "¿Invasión?", "No."]),
        # HTML.
        (
            "Size &lt;2 cm &amp; fat.<br>Margins &amp;gt; 1&nbsp;mm.<p class='x'>A <b>bold</b> end",
            ["Size <2 cm & fat.", "Margins > 1 mm.", "A bold end"],
        ),
        ("R&D; p < b and c > d &notes", ["R&D; p < b and c > d &notes"]),
        ("It is approx. 2 cm wide.", ["It is approx. 2 cm wide."]),
        ("", []),
        ("... \n - ", []),
    ],
)
def test_a_caption_is_cut_into_its_sentences(text: str, sentences: list[str]) -> None:
    assert split_sentences(text) == sentences


def plain_sentences(text: str) -> list[str]:
    """Cut a caption a stop at a time, without any shortcut."""
    found = []
    for line in re.split(r"</s>|[\r\n\u2028\u2029]", text):
        line, start = " ".join(line.split()), 0
        stops = (
            r"[.!?]+[\"'”’)\]]*(?=\s|$)|(?<=[a-z]{2})\.(?=[A-Z][a-z])"
            r"|(?<=[a-z]{4})\.(?=\d)|(?<=\d)\.(?=[A-Z][a-z]{2})"
        )
        for stop in re.finditer(stops, line):
            if plainly_ends(line[start : stop.start()].split(), stop.group(), line[stop.end() :]):
                found.append(line[start : stop.end()].strip())
                start = stop.end()
        found.append(line[start:].strip())
    joined: list[str] = []
    held = ""
    for piece in found:
        if not any(char.isalnum() for char in piece):
            continue
        if not re.fullmatch(r"\(?(\d{1,2}|[ivx]{1,4}|[a-z])(\.+\)?|\)\.*)", piece.lower()):
            joined.append(f"{held} {piece}".strip())
            held = ""
        else:
            held = f"{held} {piece}".strip()
    if joined and held:
        joined[-1] += f" {held}"
    return joined


def plainly_ends(words: list[str], stop: str, rest: str) -> bool:
    """Return whether a stop ends the sentence of these words."""
    after = rest.strip()[:1]
    if not after or stop[0] != ".":
        return True
    if after.islower() and len(stop) > 1:
        return False
    last = words[-1] if words else ""
    if len(words) < 2 and re.fullmatch(
        r"\(?(\d{1,2}(\.\d{1,2})*|[ivx]{1,4}|[a-z](\.?\d{1,2})*)\)?", last.lower()
    ):
        return False
    word = last.lstrip("([{\"'“‘").lower()
    before = words[-2].lower() if len(words) > 1 else ""
    following = re.split(r"[^\w/-]", rest.strip().lower())[0]
    if re.fullmatch(r"([a-z]\.)*[a-z]", word):
        if "." in word or not after.isupper() or before.rstrip(".") in TITLES:
            return False
        letter = before in LETTERED or (word in "ivx" and before not in TAKES_A_NAME)
        return following in OPENERS or any(map(str.isdigit, before)) or letter
    unit = re.sub(r"^[\d.,x*/+-]*\d", "", word)
    if unit in UNITS:
        if any(map(str.isdigit, word + before)):
            return not (after.islower() and following in GO_ON) and after.isalnum()
        return after.isupper()
    if word in ABBREVIATIONS:
        return word in MAY_END and after.isupper()
    if not after.islower() or re.match(r"([a-z]|[ivx]{1,4})[.)]\s", rest.strip() + "  "):
        return True
    tail = re.split("[-/]", word)[-1]
    return not tail.isalpha() or (len(tail) > 3 or following in OPENERS)


_pieces = re.findall(
    r"\S+",
    "a in of cm mm no No al vs Dr The the e.g U.S approx carcinoma Carcinomas xcarcinoma glands "
    "1 12 iv i type fat b) (a (2 2.5 2cm pT2a . . . . .. ! ? .) .” , ; - _ </s> µm A B é É",
)


@given(
    st.lists(
        st.tuples(st.sampled_from(_pieces), st.sampled_from(["", " ", " ", "\n"])), max_size=24
    )
)
@settings(max_examples=300, deadline=None)
def test_sentences_are_those_of_a_plain_reference(pieces: list[tuple[str, str]]) -> None:
    text = "".join(chain.from_iterable(pieces))
    assert split_sentences(text) == plain_sentences(text)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared captions are not here")
def test_no_piece_of_a_real_caption_begins_in_the_middle() -> None:
    texts = []
    for path in sorted(SHARED.glob("*/*.json")):
        for entry in json.loads(path.read_text(encoding="utf-8")):
            answer = entry["conversations"][1]["value"]
            if len(answer.split()) > 20:  # a report, not the letter of a choice
                texts.append(answer)
    pieces = [piece for text in texts for piece in split_sentences(text)]
    assert len(texts) > 100
    assert len(pieces) > 3 * len(texts)
    assert [piece for piece in pieces if piece[0].isdigit() or piece[0].islower()] == []


def kinds(count: int, *, sentences: int = 9, **settings: object) -> Counter[str]:
    """Return the kinds of sub-captions in so many draws."""
    words = [f"s{i}" for i in range(sentences)]
    rng = np.random.default_rng(0)
    found: Counter[str] = Counter()
    for text in sample_subcaptions(words, num=count, rng=rng, **settings):  # type: ignore[arg-type]
        numbers = [int(word[1:]) for word in text.split()]
        steps = {b - a for a, b in pairwise(numbers)}
        kind = "neighbours" if steps <= {1} and len(numbers) > 1 else "anywhere"
        found[f"{kind} {len(numbers)}" if len(numbers) > 1 else "single"] += 1
    return found


def test_the_six_kinds_of_sub_captions_have_their_probabilities() -> None:
    n, draws = 9, 24_000
    found = kinds(draws, sentences=n)
    # Random positions look like neighbours by chance, in n - s + 1 of n!/(n-s)! ordered choices.
    chance2, chance3 = (n - 1) / (n * (n - 1)), (n - 2) / (n * (n - 1) * (n - 2))
    expected = {
        "single": 1 / 3,
        "neighbours 2": (1 + chance2) / 6,
        "neighbours 3": (1 + chance3) / 6,
        "anywhere 2": (1 - chance2) / 6,
        "anywhere 3": (1 - chance3) / 6,
    }
    assert set(found) == set(expected)
    for kind, share in expected.items():
        deviation = (share * (1 - share) / draws) ** 0.5
        assert abs(found[kind] / draws - share) < 4 * deviation, kind


@pytest.mark.parametrize(("off", "last"), [(False, {"s0 s1 s2", "s1 s2 s3"}), (True, {"s0 s1 s2"})])
def test_windows_start_anywhere_unless_the_published_slip_is_asked_for(
    off: bool, last: set[str]
) -> None:
    drawn = set(
        sample_subcaptions(
            ["s0", "s1", "s2", "s3"],
            num=3000,
            rng=np.random.default_rng(1),
            v1_window_bug=off,
        )
    )
    pairs = {"s0 s1", "s1 s2"} | (set() if off else {"s2 s3"})
    neighbours = {"s0 s1 s2", "s1 s2 s3"} & drawn
    # Random triples in this order are rare (1 in 24), and excluded by the seed's count below.
    assert pairs <= drawn
    assert last <= neighbours


@pytest.mark.parametrize("off", [False, True])
def test_windows_are_uniform(off: bool) -> None:
    words = [f"s{i}" for i in range(5)]
    counts: Counter[str] = Counter()
    for text in sample_subcaptions(
        words, num=60_000, rng=np.random.default_rng(2), max_merged=2, v1_window_bug=off
    ):
        counts[text] += 1
    by_chance = 60_000 / 4 / 20  # anywhere, s = 2: each ordered pair
    windows = [counts[f"s{i} s{i + 1}"] - by_chance for i in range(4)]
    share = 60_000 / 4 / (3 if off else 4)
    expected = [share, share, share, 0 if off else share]
    assert windows == pytest.approx(expected, abs=5 * share**0.5)


def test_short_captions_repeat_and_whole_ones_stay_whole() -> None:
    drawn = sample_subcaptions(["only"], num=500, rng=np.random.default_rng(3))
    assert set(drawn) == {"only", "only only", "only only only"}
    two = set(sample_subcaptions(["a", "b"], num=2000, rng=np.random.default_rng(4)))
    assert two >= {"a", "b", "a b", "b a", "a a b"}
    with pytest.raises(ValueError, match="sentence"):
        sample_subcaptions([], num=1, rng=np.random.default_rng(0))


def test_draws_are_a_function_of_seed_epoch_and_slide() -> None:
    first = draw_rng(0, 1, "slide").integers(1 << 30, size=4).tolist()
    assert first == draw_rng(0, 1, "slide").integers(1 << 30, size=4).tolist()
    for other in ((1, 1, "slide"), (0, 2, "slide"), (0, 1, "other"), (0, 11, "slide")):
        assert draw_rng(*other).integers(1 << 30, size=4).tolist() != first
    # The same on every machine and in every version: written down once.
    assert first == [735797599, 764554462, 668180800, 842076464]


CORPUS = [
    "Necrosis is present. Tumour cells are seen.",
    "Mucin pools are present in the breast tissue.",
    "No necrosis is identified; nuclei are enlarged.",
]


def test_the_tokenizer_knows_its_texts_and_frames_them() -> None:
    tokenizer = train_tokenizer(CORPUS, vocab_size=200)
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3, 4]) == [
        "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]",
    ]  # fmt: skip
    ids = tokenizer("NECROSIS is  present.")["input_ids"]
    assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "necrosis is present ."
    assert ids == [2, *tokenizer.convert_tokens_to_ids(["necrosis", "is", "present", "."]), 3]
    assert len(tokenizer) <= 200
    cut = tokenizer(CORPUS[0], truncation=True, max_length=5)["input_ids"]
    assert len(cut) == 5
    assert cut[-1] == tokenizer.sep_token_id
    assert tokenizer("ξ")["input_ids"][1] == tokenizer.unk_token_id


def test_pieces_are_merged_by_frequency() -> None:
    # By hand: "ab" 5x, "abc" 3x, "xbc" 2x: pairs a+##b 8, ##b+##c 5, x+##b 2 -> first merge ab.
    corpus = [" ".join(["ab"] * 5 + ["abc"] * 3 + ["xbc"] * 2)]
    characters = 5 + len({"a", "x", "##b", "##c"})
    for limit, last in ((characters + 1, "ab"), (characters + 2, "abc"), (characters + 3, "##bc")):
        vocabulary = train_tokenizer(corpus, vocab_size=limit).get_vocab()
        assert max(vocabulary, key=vocabulary.get) == last


def test_the_tokenizer_is_the_same_in_every_process() -> None:
    code = (
        "import sys, json; from pathflip.text import train_tokenizer;"
        "t = train_tokenizer(json.loads(sys.argv[1]), vocab_size=90);"
        "print(json.dumps(sorted(t.get_vocab().items())))"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code, json.dumps(corpus)],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": str(seed), "PATH": ""},
            cwd=Path(__file__).resolve().parents[2],
        ).stdout
        for seed, corpus in enumerate([CORPUS, CORPUS[::-1]])
    }
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("sentence", "denied"),
    [
        ("No necrosis is identified.", True),
        ("A. No necrosis is identified.", True),
        ("2) Negative for carcinoma.", True),
        ("There is no evidence of mucin.", True),
        ("There are no mitoses.", True),
        ("Calcification is not seen.", True),
        ("Negative for carcinoma.", True),
        ("Perineural invasion is absent.", True),
        ("Necrosis is noted.", False),
        ("Nodules of tumour are present.", False),
        ("Normal colonic mucosa.", False),
        ("Nottingham grade 2.", False),
        ("Tumour is noted in two of nine nodes.", False),
    ],
)
def test_a_denial_is_told_from_a_finding(sentence: str, denied: bool) -> None:
    assert denies(sentence) is denied


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (CANNOT_TELL, True),
        ("It cannot reliably be determined.", True),
        ("Unable to assess", True),
        ("Not possible to say", True),
        ("Insufficient evidence", True),
        ("Carcinoma cannot be excluded; known primary", False),
        ("Necrosis, which cannot be seen at the edge but is known of", False),
        ("Grade 2", False),
    ],
)
def test_only_what_says_that_it_cannot_be_told_counts_as_that(text: str, says: bool) -> None:
    assert says_cannot_tell(text) is says
