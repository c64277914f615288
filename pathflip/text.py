"""Text of captions: sentences, sub-captions, and a tokenizer trained on them.

Read in this order: :func:`split_sentences`, :func:`sample_subcaptions` with :func:`draw_rng`,
:func:`train_tokenizer`. No part of it downloads anything.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from heapq import heapify, heappop, heappush
from itertools import pairwise
from typing import Any

import numpy as np

LETTERS = "ABCDEFGH"
"""Letters of a question's options; no question has more."""

CANNOT_TELL = "cannot be told from this slide"
"""Answer to a question that a slide cannot answer."""
_NO_ANSWER = re.compile(
    r"\b(can ?not|can't|unable to|impossible to|not possible to)(\s+\w+){0,2}\s+"
    r"(tell|told|determined?|assess(ed)?|answer(ed)?|say|said|know|known|inferred)\b"
    r"|\b(not enough|insufficient) (information|evidence|data)\b",
    re.IGNORECASE,
)


def says_cannot_tell(text: str) -> bool:
    """Return whether an option or an answer says that the question cannot be answered."""
    return _NO_ANSWER.search(text) is not None


# -- sentences ------------------------------------------------------------------------------------


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_UNITS = _words("cm mm um µm hpf ml mg kg")
_ABBREVIATIONS = _UNITS | _words(
    "dr mr mrs ms prof st vs approx ca cf e.g i.e eg ie etc fig figs no nos inc al ed eds resp "
    "incl excl max min avg lt rt l r ant post sup inf dx hx bx ln lns u.s a.m p.m "
    "m.d ph.d sp spp var wt ht vol ref refs dept esp viz"
)
"""Words whose full stop is part of the word."""
_MAY_END = _words(
    "cm mm um µm hpf ml mg kg ca no ed inc l r al etc ln lns post inf sup min max vol a.m p.m"
)
"""Those of them that also end sentences, when the next word is capitalised."""
_SHORTENED = _words(
    "adenoca assoc biop clin comp compat conf cont desc diag diff hist histol infil infilt "
    "infiltr inflam interp intraep metast micro morphol neopl path poss prev prob prolif resect "
    "sect spec squam susp undiff"
)
"""Further ones, before a word that is not capitalised."""
_TITLES = _words("dr mr mrs ms prof st")
_TAKES_A_NAME = _words("by of for with from to via and/or ? h/o k/c/o c/o s/o")
_LETTERED = _words(
    "and or to type types subtype group groups grade grades class category part parts specimen "
    "specimens block blocks slide slides pattern patterns stage level levels hepatitis vitamin "
    "score zone child child-pugh figure fig panel case cassette cohort arm lobe segment variant "
    "option answer factor protein antigen gene domain region area section site sample side"
)
"""Words after which a lone letter is no initial: "hepatitis B. The liver"."""
_OPENERS = _words(
    "the there this these those it its no not an a in is are all both each some we they however "
    "although also overall"
)
"""Words that begin a sentence more often than they go on with an abbreviated one."""
_GO_ON = _words(
    "in from of at to thick wide long deep high tall x by and or with on away across below above "
    "apart each between beyond per diameter length width depth maximum max greatest largest"
)
"""Words that go on with a measurement: "2 cm. in diameter"."""
_LONGEST_SHORT = max(map(len, _ABBREVIATIONS | _SHORTENED))
"""Letters beyond which a word is no abbreviation, initial or number of a list."""

_BREAKS = re.compile(r"</s>|[\r\n\u2028\u2029]+")
# All kinds of stop begin with one class of characters: the search skips all others.
_ENDS = (
    r"[.!?]*[\"'”’)\]]*(?=\s|$)"
    r"|(?<=[a-z]{2}\.)(?=[A-Z][a-z])|(?<=[a-z]{4}\.)(?=\d)|(?<=\d\.)(?=[A-Z][a-z]{2})"
)
_STOP = re.compile(rf"[.!?](?:{_ENDS})")
_WIDE = "。！？｡؟۔।॥"
_ANY_STOP = re.compile(
    rf"[.!?{_WIDE}](?:(?<=[{_WIDE}])[.!?{_WIDE}]*[\"'”’」』）)\]]*"
    rf"|(?<=[A-Za-z%)]\.)(?=[\u3040-\u30ff\u3400-\u9fff])|{_ENDS})"
)
_SAYS = re.compile(r"[^\W_]")
_INITIALS = re.compile(r"(?:[a-z]\.)*[a-z]")
_ENUMERATOR = re.compile(r"\(?(?:\d{1,2}(?:\.\d{1,2})*|[ivx]{1,4}|[a-z](?:\.?\d{1,2})*)\)?")
_ITEM = re.compile(r"\(?(?:[a-z]|[ivx]{1,4})[.)]\s")
_LONE_ITEM = re.compile(r"\(?(?:\d{1,2}|[ivx]{1,4}|[a-z])(?:[.:]+\)?|\)[.:]*)")
_LONGEST_ITEM = 8
_MEASURED = re.compile(r"(?:[\d.,x×*/+-]*\d)?([a-zµ]+)")
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,30});")
_TAG = re.compile(
    r"</?(?:(br|p|div|li|ul|ol|tr|table|h[1-6])|b|i|u|em|strong|span|font|sub|sup|td|th|tbody)"
    r"(?:\s+[a-z-]+\s*=[^<>]*)?\s*/?>",
    re.IGNORECASE,
)


def plain_text(text: str) -> str:
    """Return a text without its HTML: entities decoded, tags that end a line as line breaks."""
    if "&" in text:
        for _ in range(2):  # what was escaped twice
            text = _ENTITY.sub(lambda entity: html.unescape(entity[0]), text)
    if "<" in text:
        text = _TAG.sub(lambda tag: "\n" if tag[1] else "", text)
    return text


def split_sentences(text: str) -> list[str]:
    """Cut a caption into sentences.

    Rules, not a model: decimals (2.5 cm), stages (pT2a), abbreviations (vs., Dr., e.g.), initials
    and enumerators (``1. Invasive carcinoma.``, ``A. Colon``) do not end a sentence; a missing
    space (``0.4 cm.The``) or capital (``manner. moderately differentiated``) does not hide its end.
    Stops of other scripts (``。``, ``।``, ``؟``) are stops; HTML is decoded.

    Args:
        text: A caption; line breaks and ``</s>`` always end a sentence.

    Returns:
        The sentences with their punctuation, white space collapsed, none without a letter or digit,
        none that is an enumerator alone.
    """
    text = plain_text(text)
    found = []
    # Searching a line for breaks takes as long as all the rest, and most captions are of one line.
    plain = text.isascii()
    broken = "\n" in text or "\r" in text or "</s>" in text or not plain
    stops = _STOP if plain else _ANY_STOP
    lone = False
    for line in _BREAKS.split(text) if broken else (text,):
        line = " ".join(line.split())
        start = 0
        for stop in stops.finditer(line):
            begin, end = stop.span()
            if _ends_sentence(line, start, begin, end):
                found.append(line[start:end].strip())
                lone = lone or end - start <= _LONGEST_ITEM
                start = end
        if start < len(line):
            found.append(line[start:].strip())
            lone = lone or len(line) - start <= _LONGEST_ITEM
    found = [piece for piece in found if piece[:1].isalnum() or _SAYS.search(piece)]
    return _with_items(found) if lone else found


def _ends_sentence(line: str, start: int, begin: int, end: int) -> bool:
    """Return whether the stop at ``line[begin:end]`` ends the sentence that starts at ``start``."""
    following = line[end : end + 2].lstrip()[:1]  # single spaces only
    if not following or line[begin] != ".":
        return True
    small = following.islower()
    if small and end - begin > 1:  # an ellipsis, or the end of what is in brackets
        return False
    if begin - start > _LONGEST_SHORT and line[begin - _LONGEST_SHORT - 1 : begin].isalpha():
        return True
    before, _, last = line[start:begin].strip().rpartition(" ")
    if not before and _ENUMERATOR.fullmatch(last.lower()):
        return False
    word = last.lstrip("([{\"'“‘").lower()
    rest = line[end : end + 20].lstrip(" ¿¡")
    capital = rest[:1].isupper()
    after = re.split(r"[^\w/-]", rest.lower(), maxsplit=1)[0]
    previous = before.rpartition(" ")[2].lower()
    if word and _INITIALS.fullmatch(word) and (len(word) == 1 or word not in _MAY_END):
        if "." in word or not capital or previous.rstrip(".") in _TITLES:
            return False
        if after in _OPENERS or any(map(str.isdigit, previous)):
            return True
        return previous in _LETTERED or (word in "ivx" and previous not in _TAKES_A_NAME)
    measured = _MEASURED.fullmatch(word)
    if measured is not None and measured[1] in _UNITS:
        if word[0].isdigit() or any(map(str.isdigit, previous)):
            return capital or following.isdigit() or (small and after not in _GO_ON)
        return capital
    if word in _ABBREVIATIONS:
        named = word == "ca" and (not before or previous in _TAKES_A_NAME)
        return word in _MAY_END and capital and not named
    if not small or _ITEM.match(rest):
        return True
    tail = re.split(r"[-/]", word)[-1]
    if tail in _SHORTENED or tail in _ABBREVIATIONS:
        return False
    return not tail.isalpha() or len(tail) > 3 or after in _OPENERS


def _with_items(pieces: Sequence[str]) -> list[str]:
    """Put the number or letter of an item before the item, or after the colon it is the value of.

    One at the end of a caption stays with what is before it; one that is all there is says nothing.
    """
    found: list[str] = []
    held = ""
    for piece in pieces:
        if len(piece) > _LONGEST_ITEM or not _LONE_ITEM.fullmatch(piece.lower()):
            found.append(f"{held} {piece}" if held else piece)
            held = ""
        elif found and not held and found[-1].endswith(":"):
            found[-1] += f" {piece}"
        else:
            held = f"{held} {piece}" if held else piece
    if held and found:
        found[-1] += f" {held}"
    return found


# -- sub-captions ---------------------------------------------------------------------------------


_DENIAL = re.compile(
    r"^(?:\(?(?:\d{1,2}|[ivx]{1,4}|[a-z])[.)]+:?\s+)?"
    r"(no|not|none|neither|absence of|absent|negative for|free of)\b"
    r"|\b(there (is|are|was|were) no|no evidence of|is absent|are absent)\b"
    r"|\b(is not (seen|identified|present)"
    r"|are not (seen|identified|present)|without evidence of)\b",
    re.IGNORECASE,
)


def denies(sentence: str) -> bool:
    """Return whether a sentence says that something is absent ("No necrosis is identified.").

    Such a sentence is true of no region more than of another: there is nothing to ground it in, and
    a text tower reads its noun as if it were there. A rule on the wording, not a parser.
    """
    return _DENIAL.search(sentence.strip()) is not None


def sample_subcaptions(
    sentences: Sequence[str],
    *,
    num: int,
    rng: np.random.Generator,
    max_merged: int = 3,
    v1_window_bug: bool = False,
) -> list[str]:
    """Draw sub-captions of a slide: one sentence, neighbours, or sentences from anywhere.

    Each of ``num`` independent draws takes s ~ U{1..max_merged} sentences: one of them; or, with
    equal chance, s neighbours in order (the whole caption where it has no more than s) or s
    different ones in random order (with repeats where it has fewer).

    Args:
        sentences: The slide's sentences, at least one.
        num: K, number of sub-captions to draw.
        rng: See :func:`draw_rng`.
        max_merged: Maximum number of sentences in one sub-caption.
        v1_window_bug: Draw neighbours as the published code does, never with the last sentence.

    Returns:
        ``num`` texts, repeats possible.
    """
    count = len(sentences)
    if not count:
        raise ValueError("a caption without a sentence has no sub-captions")
    drawn = []
    for _ in range(num):
        merged = int(rng.integers(1, max_merged + 1))
        if merged == 1:
            drawn.append(sentences[int(rng.integers(count))])
        elif rng.random() < 0.5:
            if merged >= count:
                drawn.append(" ".join(sentences))
                continue
            start = int(rng.integers(count - merged + (0 if v1_window_bug else 1)))
            drawn.append(" ".join(sentences[start : start + merged]))
        else:
            chosen = rng.choice(count, merged, replace=count < merged)
            drawn.append(" ".join(sentences[int(i)] for i in chosen))
    return drawn


def draw_rng(seed: int, epoch: int, slide_id: str) -> np.random.Generator:
    """Return the generator of a slide's draws in an epoch: the same in every process."""
    key = json.dumps([int(seed), int(epoch), str(slide_id)]).encode()
    return np.random.Generator(np.random.PCG64(int.from_bytes(hashlib.sha256(key).digest(), "big")))


# -- tokenizer ------------------------------------------------------------------------------------

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_LONGEST_WORD = 100


def train_tokenizer(texts: Iterable[str], *, vocab_size: int = 4096) -> Any:
    """Train a lower-casing WordPiece tokenizer.

    The pieces are learned here and not by the ``tokenizers`` trainer, which breaks ties by the
    order of a hash table: two runs of it on the same texts give different vocabularies.

    Args:
        texts: Captions; their order and repeats do not matter.
        vocab_size: Maximum number of entries with special tokens; single characters are always in.

    Returns:
        A ``transformers.PreTrainedTokenizerFast`` with [PAD] [UNK] [CLS] [SEP] [MASK] as 0 to 4,
        that frames a text in [CLS] … [SEP]. The same texts give the same tokenizer.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    normalizer = normalizers.BertNormalizer(lowercase=True)
    splitter = pre_tokenizers.BertPreTokenizer()
    words: Counter[str] = Counter()
    for text in set(texts):
        words.update(
            word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(str(text)))
        )
    pieces = [*_SPECIAL, *_learn_pieces(words, limit=vocab_size - len(_SPECIAL))]
    wordpiece = Tokenizer(
        models.WordPiece(
            vocab={piece: i for i, piece in enumerate(pieces)},
            unk_token="[UNK]",
            max_input_chars_per_word=_LONGEST_WORD,
        )
    )
    wordpiece.normalizer = normalizer
    wordpiece.pre_tokenizer = splitter
    wordpiece.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    make: Any = PreTrainedTokenizerFast
    return make(
        tokenizer_object=wordpiece,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def _learn_pieces(words: Mapping[str, int], *, limit: int) -> list[str]:
    """Merge the most frequent pair of neighbouring pieces, over and over; ties by spelling."""
    spelled = {
        word: [word[0], *(f"##{char}" for char in word[1:])]
        for word in sorted(words)
        if len(word) <= _LONGEST_WORD
    }
    pieces = sorted({piece for parts in spelled.values() for piece in parts})
    known = set(pieces)
    counts: Counter[tuple[str, str]] = Counter()
    where: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    for word, parts in spelled.items():
        for pair in pairwise(parts):
            counts[pair] += words[word]
            where[pair].add(word)
    heap = [(-count, pair) for pair, count in counts.items()]
    heapify(heap)
    while heap and len(pieces) < limit:
        count, pair = heappop(heap)
        if -count != counts[pair]:  # changed since: the current count is, or was, in the heap too
            continue
        merged = pair[0] + pair[1].removeprefix("##")
        if merged not in known:
            pieces.append(merged)
            known.add(merged)
        changed = set()
        for word in where.pop(pair):
            parts = spelled[word]
            for old in pairwise(parts):
                counts[old] -= words[word]
                changed.add(old)
            spelled[word] = parts = _merge(parts, pair, merged)
            for new in pairwise(parts):
                counts[new] += words[word]
                where[new].add(word)
                changed.add(new)
        for touched in changed:
            if counts[touched] > 0:
                heappush(heap, (-counts[touched], touched))
    return pieces


def _merge(parts: list[str], pair: tuple[str, str], merged: str) -> list[str]:
    joined: list[str] = []
    at = 0
    while at < len(parts):
        here = tuple(parts[at : at + 2]) == pair
        joined.append(merged if here else parts[at])
        at += 2 if here else 1
    return joined
