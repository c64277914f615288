"""Keywords of captions: noun phrases and pathology terms that a caption affirms.

The bag of a tree is the keywords of all its captions, ranked; a node's keywords are those its own
caption names. Rules, no model, so the same captions give the same keywords everywhere:

1. Captions are cut into sentences, sentences into clauses (at ``, ;`` and words like "but").
2. A clause that denies is left out, with the items of an enumeration that it begins ("no atypia,
   mitoses or necrosis"). In the others so are the five words after "no", "without", "free of".
3. Words are lower-cased and made singular. A run of them between stop words or punctuation is a
   keyword (as in RAKE; of more than four words the last four), and so is the longest term of the
   lexicon at each place.
4. What most bags of a corpus hold tells them apart no better than "image" does and is dropped
   (:func:`corpus_frequent`).
5. The rest is ranked by TF·IDF within the bag: mentions times log of (1 + captions) / (1 + captions
   that name it), ties by spelling.

Read in this order: :func:`load_lexicon`, :func:`extract`, :func:`corpus_frequent`.
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, compress, count
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pathflip.text import denies, split_sentences

EXTRACTOR = "rake-2"
"""Version of the rules; see :func:`extractor_version`."""
CAP = 255
"""Most keywords of a bag: an index of one takes a byte."""
SPAN = 5
"""Words after a denying word that are left out (MR-PLIP's authors give no rule)."""
LONGEST = 4
"""Words of the longest keyword that is not in the lexicon."""
ITEMS = 50
"""Items of the longest enumeration that is looked through for the "or" at its end."""
FREQUENT = 0.6
"""Share of a corpus's bags from which a keyword is dropped."""
MIN_BAGS = 20
"""Bags without which nothing is dropped: in a corpus of one, every keyword is in all of them."""

Made = TypeVar("Made")

_KEPT_SENTENCES = _KEPT_WORDS = 1 << 17
_TERMS = Path(__file__).parent / "templates" / "pathology_terms.txt"


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


STOP_WORDS = _set(
    "a about above across additionally adjacent after again all along also although am among "
    "an and any appear appearance appearing appears are area around as at away be because "
    "been before being below beneath beside between both but by can cannot characteristic "
    "characteristics characterized close cm compared composed consist consistent consisting "
    "consists contain containing contains could demonstrate demonstrates described describes "
    "despite did display displaying displays do does due during each either especially "
    "evident example exhibit exhibiting exhibits few field figure find finding findings for "
    "found from further furthermore had has have having he her here highlight highlighting "
    "his histological histology histopathological histopathology how however hpf i identified "
    "if image in include included includes including indicate indicates indicating indicative "
    "into is it its itself kind know known lack lacking lacks likely look looks magnification "
    "main mainly many may micrograph might mm more moreover most mostly much must my near "
    "neither next no none nor not notable note noted observe observed of off often on only or "
    "other others our out overall particularly per photo photomicrograph picture possible "
    "possibly presence present probably rather relatively represent representing represents "
    "result reveal revealing reveals same section see seem seems seen several she should show "
    "showing shown shows since slide so some such suggest suggesting suggestive suggests than "
    "that the their them then there therefore these they this those though through throughout "
    "thus to together toward towards typical typically um under up upon us various very via "
    "view visible was we were what when where whereas which while who whose why will with "
    "within without would yet you your µm"
)
"""Words that end a keyword: those of grammar, and those with which captions say that something is
to be seen."""

# -- words ----------------------------------------------------------------------------------------

_TOKEN = re.compile(r"non-[^\W_]+|[^\W_]+|[^\w\s-]|(?<!\w)-")
"""A word (hyphens part words, but after "non"), or punctuation."""
_POSSESSIVE = re.compile(r"['’]s\b")

_IRREGULAR = {
    "acini": "acinus", "alveoli": "alveolus", "analyses": "analysis", "bacteria": "bacterium",
    "biopsies": "biopsy", "bronchi": "bronchus", "bronchioli": "bronchiole", "calculi": "calculus",
    "cilia": "cilium", "corpora": "corpus", "diagnoses": "diagnosis", "emboli": "embolus",
    "endothelia": "endothelium", "epithelia": "epithelium", "foci": "focus", "fungi": "fungus",
    "ganglia": "ganglion", "glomeruli": "glomerulus", "lumina": "lumen", "metastases": "metastasis",
    "mitochondria": "mitochondrion", "nevi": "nevus", "nuclei": "nucleus", "nucleoli": "nucleolus",
    "macronucleoli": "macronucleolus", "micronuclei": "micronucleus", "rami": "ramus",
    "sarcomata": "sarcoma", "septa": "septum", "stromata": "stroma", "sulci": "sulcus",
    "carcinomata": "carcinoma", "thrombi": "thrombus", "tubuli": "tubulus", "uteri": "uterus",
    "villi": "villus", "microvilli": "microvillus", "tumour": "tumor", "tumours": "tumor",
    "grey": "gray", "haemorrhage": "hemorrhage", "oedema": "edema", "fibre": "fiber",
    "fibres": "fiber", "leukaemia": "leukemia", "oesophageal": "esophageal", "anaemia": "anemia",
}  # fmt: skip
"""Plurals of no rule, and spellings that differ by country."""
_SINGULAR = _set(
    "always ascites atlas bias biceps caries canvas diabetes does feces gas has herpes hiatus "
    "langhans lens meninges pancreas perhaps plus rabies series species this was yes"
)
"""Words that end as plurals do and are none."""


def singular(word: str) -> str:
    """Return the singular of a lower-case English word, by rule."""
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) < 4 or word in _SINGULAR or word.endswith(("us", "is", "ss")):
        return word
    if word.endswith("ae"):  # trabeculae, papillae, lacunae
        return word[:-1]
    if not word.endswith("s"):
        return word
    if word.endswith(("oses", "yses")) and len(word) > 5:  # mitoses, fibroses, hydrolyses
        return word[:-2] + "is"
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("sses", "shes", "ches", "xes", "zzes")):
        return word[:-2]
    return word[:-1]


class _Kept(dict[str, Made]):
    """{text: what a function makes of it}, filled as texts are met."""

    def __init__(self, make: Callable[[str], Made]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, text: str) -> Made:
        made = self._make(text)
        if len(self) < _KEPT_WORDS:
            self[text] = made
        return made


def _tokens(text: str) -> list[str]:
    """Return the words and the punctuation of a text, in lower case."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    text = text.lower()
    if "'" in text or "’" in text:
        text = _POSSESSIVE.sub(" ", text)
    return _TOKEN.findall(text)


def _content(word: str) -> str:
    """Return a word with a mark behind it that no word has; white space where it ends a keyword."""
    ends = len(word) < 2 or word in STOP_WORDS or not word[0].isalpha()
    return " " if ends else f"{word}_"


_WORDS = _Kept(singular)
"""{token: the word as keywords have it}."""
_CONTENT = _Kept(_content)

_RUNS = _Kept(lambda run: " ".join(run[:-1].split("_")[-LONGEST:]))
"""{run of words with those marks: the keyword}."""

_PIECES = _Kept(lambda piece: tuple(_tokens(piece)))
"""{what stands between white space: its tokens}; no token goes over white space."""


# -- the lexicon ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, kw_only=True)
class Lexicon:
    """Terms that count as keywords wherever they stand.

    Attributes:
        terms: The terms as keywords have them.
        kept: Those of them that are never dropped, however many bags hold them.
        given: Those kept as they were written.
        sha: First eight hexadecimal digits of the sha256 of the terms.
        lengths: {first word: {second word: numbers of words of the terms that begin with the two,
            longest first}}; of a term of one word the inner table may be empty.
    """

    terms: frozenset[str]
    kept: frozenset[str]
    given: tuple[str, ...]
    sha: str
    lengths: Mapping[str, Mapping[str, tuple[int, ...]]]


def make_lexicon(terms: Iterable[str], *, kept: Iterable[str] = ()) -> Lexicon:
    """Make a lexicon of terms; case, hyphens, plurals and their order make no difference.

    Args:
        terms: Terms that are dropped, as other keywords are, where most bags hold them.
        kept: Further terms, which are not.
    """
    given = tuple(kept)
    never = [words for term in given if (words := list(map(singular, _tokens(term))))]
    found = [words for term in terms if (words := list(map(singular, _tokens(term))))]
    found += never
    names = {" ".join(words) for words in found}
    stay = {" ".join(words) for words in never}
    lengths: dict[str, dict[str, set[int]]] = {}
    for words in found:
        following = lengths.setdefault(words[0], {})
        if len(words) > 1:
            following.setdefault(words[1], set()).add(len(words))
    return Lexicon(
        terms=frozenset(names),
        kept=frozenset(stay),
        given=given,
        sha=hashlib.sha256("\n".join([*sorted(names), "", *sorted(stay)]).encode()).hexdigest()[:8],
        lengths={
            first: {second: tuple(sorted(own, reverse=True)) for second, own in following.items()}
            for first, following in lengths.items()
        },
    )


def load_lexicon(terms: str | Path | None = None) -> Lexicon:
    """Load the terms that come with pathflip, and a file of one's own beside them.

    One's own are never dropped for being frequent: whoever names them says that they matter.

    Args:
        terms: Text file, one term a line; empty lines and lines that begin with # are left out.

    Raises:
        ConfigError: The file cannot be read.
    """
    from pathflip.interop.tables import read_text

    return extended_lexicon(() if terms is None else tuple(_terms(read_text(terms))))


@cache
def extended_lexicon(kept: tuple[str, ...]) -> Lexicon:
    """Return the terms that come with pathflip, and further ones that are never dropped."""
    return make_lexicon(_terms(_TERMS.read_text("utf-8")), kept=kept)


def _terms(text: str) -> list[str]:
    lines = (line.strip().lstrip("\ufeff") for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def extractor_version(lexicon: Lexicon | None = None) -> str:
    """Return what keywords were made by: the version of the rules and the terms' sha256."""
    return f"{EXTRACTOR}:{(lexicon or load_lexicon()).sha}"


# -- what a sentence affirms ----------------------------------------------------------------------

_CUES = _set(
    "no not none nor never neither without absence absent lack lacks lacking cannot negative free "
    "devoid"
)
"""Words of which a denial has at least one."""
_ABSENT = re.compile(
    r"\b(?:not|never|cannot be)(?: \w+)? (?:seen|identified|present|found|observed|noted|evident"
    r"|detected|visible|apparent|appreciated|demonstrated)\b|\babsent$"
)
_TURNS = _set(", ; but however although though whereas while yet")
"""Tokens between two clauses."""
_ONE_WORD_CUES = _set("no not nor neither never without lack lacks lacking")
_TWO_WORD_CUES = frozenset(
    [("absence", "of"), ("negative", "for"), ("free", "of"), ("devoid", "of")]
)
_VERBS = _set(
    "is are was were be been has have had show shows showed contain contains line lines surround "
    "surrounds form forms appear appears infiltrate infiltrates exhibit exhibits display displays "
    "reveal reveals demonstrate demonstrates"
)


def _affirmed(tokens: list[str]) -> list[tuple[int, int]]:
    """Return the parts of a sentence's tokens that deny nothing, as (first, behind the last)."""
    turns = [-1, *compress(count(), map(_TURNS.__contains__, tokens)), len(tokens)]
    kept: list[tuple[int, int]] = []
    at = 0
    while at < len(turns) - 1:
        start, end = turns[at] + 1, turns[at + 1]
        clause = tokens[start:end]
        at += 1
        if _CUES.isdisjoint(clause):
            kept.append((start, end))
            continue
        spoken = " ".join([token for token in clause if token[0].isalnum()])
        is_open = denies(spoken) or _ABSENT.search(spoken) is not None
        if not is_open:
            parts, is_open = _outside_spans(clause)
            kept += [(start + first, start + last) for first, last in parts]
        if is_open:
            at = _end_of_enumeration(tokens, turns, at)
    return kept


def _outside_spans(tokens: list[str]) -> tuple[list[tuple[int, int]], bool]:
    """Return what stands before denying words and behind their spans, and whether one is open."""
    parts: list[tuple[int, int]] = []
    left = at = start = 0
    while at < len(tokens):
        token = tokens[at]
        width = 1 if token in _ONE_WORD_CUES else 2 * (tuple(tokens[at : at + 2]) in _TWO_WORD_CUES)
        if width:
            if not left:
                parts.append((start, at))
            left = SPAN
            at += width
            start = at
            continue
        at += 1
        if left:
            left -= token[0].isalnum()
            start = at
    return [*parts, (start, at)], left > 0


def _end_of_enumeration(tokens: list[str], turns: list[int], start: int) -> int:
    """Return the first clause that does not go on with what the one before ``start`` denies.

    Items between commas go on if none has a verb and the last is joined by "or" or "nor".

    Args:
        tokens: Tokens of the sentence.
        turns: Places of those between clauses, with -1 before and the number of tokens behind them.
        start: Number of a clause.
    """
    for at in range(start, min(start + ITEMS, len(turns) - 1)):
        words = tokens[turns[at] + 1 : turns[at + 1]]
        if tokens[turns[at]] != "," or not _VERBS.isdisjoint(words):
            return start
        if "or" in words or "nor" in words:
            return at + 1
    return start


# -- keywords -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, kw_only=True)
class Keywords:
    """Bag of a tree's keywords, and which of them each node's caption names.

    Attributes:
        vocabulary: The keywords of all captions, best first.
        offsets: uint16 [nodes + 1]; those of node i are ``indices[offsets[i]:offsets[i + 1]]``.
        indices: uint8 [n], positions in the vocabulary, ascending within a node.
    """

    vocabulary: list[str]
    offsets: np.ndarray[Any, np.dtype[np.uint16]]
    indices: np.ndarray[Any, np.dtype[np.uint8]]

    def of(self, node: int) -> list[str]:
        """Return the keywords of a node's own caption, best first."""
        own = self.indices[int(self.offsets[node]) : int(self.offsets[node + 1])]
        return [self.vocabulary[at] for at in own]


def caption_keywords(caption: str, *, lexicon: Lexicon | None = None) -> list[str]:
    """Return the keywords of one caption as they come, with repeats."""
    lexicon = lexicon or load_lexicon()
    known = _known(lexicon)
    return [word for sentence in split_sentences(caption) for word in known[sentence]]


class _Sentences(dict[str, tuple[str, ...]]):
    """{sentence: its keywords}: captions of one model repeat their sentences."""

    def __init__(self, lexicon: Lexicon) -> None:
        super().__init__()
        self._lexicon = lexicon

    def __missing__(self, sentence: str) -> tuple[str, ...]:
        made = _of_sentence(sentence, self._lexicon)
        if len(self) >= _KEPT_SENTENCES:
            self.clear()
        self[sentence] = made
        return made


@cache
def _known(lexicon: Lexicon) -> _Sentences:
    return _Sentences(lexicon)


def _of_sentence(sentence: str, lexicon: Lexicon) -> tuple[str, ...]:
    tokens = list(chain.from_iterable(map(_PIECES.__getitem__, sentence.split())))
    words = list(map(_WORDS.__getitem__, tokens))
    if _CUES.isdisjoint(tokens):
        found = _runs(words)
        return (*found, *_terms_in(words, lexicon, found))
    found = []
    for start, end in _affirmed(tokens):
        part = words[start:end]
        found += _runs(part)
        found += _terms_in(part, lexicon, found)
    return tuple(found)


def _runs(words: list[str]) -> list[str]:
    """Return the runs in a row of words, as keywords."""
    # Joined and cut again: faster than a loop over the words.
    marked = "".join(map(_CONTENT.__getitem__, words)).split()
    return list(map(_RUNS.__getitem__, marked))


def _terms_in(words: list[str], lexicon: Lexicon, runs: list[str]) -> list[str]:
    """Return the terms in a row of words, from the left, the longest at each place.

    A term that is a run as well is named once.
    """
    lengths, terms = lexicon.lengths, lexicon.terms
    found: list[str] = []
    behind = 0
    words = [*words, ""]
    for at in compress(count(), map(lengths.__contains__, words)):
        if at < behind:
            continue
        name = words[at]
        for length in lengths[name].get(words[at + 1], ()):
            longer = " ".join(words[at : at + length])
            if longer in terms:
                name, behind = longer, at + length
                break
        else:
            if name not in terms:
                continue
        if name not in runs:
            found.append(name)
    return found


def extract(
    captions: Sequence[str | None],
    *,
    lexicon: Lexicon | None = None,
    cap: int = CAP,
    dropped: frozenset[str] = frozenset(),
) -> Keywords:
    """Return the keywords of a tree's captions.

    Args:
        captions: Caption of each node; None where it has none.
        lexicon: Terms; default: those of pathflip.
        cap: Most keywords of the bag, at most 255.
        dropped: Keywords to leave out, as :func:`corpus_frequent` finds them.
    """
    if not 0 <= cap <= CAP:
        raise ValueError(f"cap is {cap}; an index of a keyword takes a byte")
    lexicon = lexicon or load_lexicon()
    own = [caption_keywords(text, lexicon=lexicon) if text else [] for text in captions]
    sets = [set(words) for words in own]
    mentions = Counter(chain.from_iterable(own))
    nodes = Counter(chain.from_iterable(sets))
    for word in dropped:
        mentions.pop(word, None)
    texts = 1 + sum(1 for text in captions if text)
    idf = [0.0, *(math.log(texts / (1 + count)) for count in range(1, texts))]
    score = {word: -count * idf[nodes[word]] for word, count in mentions.items()}
    ranked = sorted(sorted(score), key=score.__getitem__)[:cap]
    rank = {word: at for at, word in enumerate(ranked)}
    offsets = np.zeros(len(own) + 1, np.uint16)
    indices: list[int] = []
    for node, words in enumerate(sets):
        indices += sorted([rank[word] for word in words if word in rank])
        offsets[node + 1] = len(indices)
    return Keywords(vocabulary=ranked, offsets=offsets, indices=np.array(indices, np.uint8))


def corpus_frequent(bags: Iterable[Iterable[str]], *, share: float = FREQUENT) -> frozenset[str]:
    """Return the keywords that are in more than a share of bags; none of fewer than 20 bags.

    Args:
        bags: Keywords of each bag of a corpus; of the captions, before any are dropped or cut.
        share: Share of the bags.
    """
    counts: Counter[str] = Counter()
    total = 0
    for bag in bags:
        counts.update(set(bag))
        total += 1
    if total < MIN_BAGS:
        return frozenset()
    return frozenset(word for word, count in counts.items() if count > share * total)
