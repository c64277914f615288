"""Captions a second that keywords are cut from, on one core: part ``keywords`` of ``mrplip``.

Two kinds of captions, of three sentences and about 27 words, a bag of 85 at a time. ``repeated``:
sentences recur, as in the captions of the synthetic cohort and of a captioner at temperature 0 (300
different ones in all). ``distinct``: no sentence was met before and a third of them deny something,
which is the worst case. CPU time of this process, the best of some bags: other processes disturb
it in one direction only.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

from pathflip.keywords import extract, load_lexicon
from pathflip.text import split_sentences

NODES = 85
TEMPLATES = (
    "The image shows {} with {}, consistent with {}.",
    "There is {} and {}, next to {}.",
    "No {} is identified; {} and {} are frequent.",
)


def sentences(rng: random.Random, count: int) -> list[str]:
    terms = sorted(load_lexicon().terms)
    return [
        TEMPLATES[n % len(TEMPLATES)].format(*(rng.choice(terms) for _ in range(3)))
        for n in range(count)
    ]


def bags(rng: random.Random, count: int, *, different: int | None) -> list[list[str]]:
    """Captions of three sentences: of so many different sentences, or all of them different."""
    pool = sentences(rng, different or 3 * NODES * count)
    rng.shuffle(pool)
    chosen = iter(pool if different is None else rng.choices(pool, k=3 * NODES * count))
    return [[" ".join(next(chosen) for _ in range(3)) for _ in range(NODES)] for _ in range(count)]


def best_rate(work: Callable[[list[str]], Any], given: list[list[str]]) -> float:
    seconds = []
    for bag in given:
        started = time.process_time()
        work(bag)
        seconds.append(time.process_time() - started)
    return NODES / min(seconds[1:])


def measure(count: int) -> dict[str, Any]:
    """Measure rates in captions a second, the best of ``count`` bags."""
    report: dict[str, Any] = {}
    for name, different in (("repeated", 300), ("distinct", None)):
        given = bags(random.Random(0), count, different=different)
        words = sum(len(text.split()) for bag in given for text in bag) / (NODES * count)
        report[name] = {
            "captions_a_second": best_rate(extract, given),
            "words_a_caption": words,
            "of_it_sentences": best_rate(
                lambda bag: [split_sentences(text) for text in bag], given
            ),
        }
    return report
