"""Sentences of captions of the synthetic cohort: of which kind each one is.

A model writes in words of its own, so a sentence is of the kind of the planted wording that shares
most of its words.
"""

from __future__ import annotations

import re
from functools import cache

import numpy as np

from pathflip.synth import text

DRAWS = 20
"""Times each distractor is written: its numbers and names differ."""
FEWEST_SHARED = 0.3
"""Share of common words below which a sentence is like nothing that was planted."""


def unsupported_kind(sentence: str) -> str | None:
    """Return why no image of the cohort could support a sentence; None where one could.

    ``distractor``: it is like a distractor; ``control gene``: it tells of the gene that nothing in
    a slide depends on; ``unknown``: it is like no sentence of the cohort.
    """
    words = _words(sentence)
    best, kind = max(
        (len(words & own) / max(1, len(words | own)), kind) for own, kind in _planted()
    )
    if best < FEWEST_SHARED:
        return "unknown"
    return kind or None


@cache
def _planted() -> tuple[tuple[frozenset[str], str], ...]:
    """Return the words of every planted wording, and why it is unsupported, or ""."""
    rng = np.random.default_rng(0)
    shown = [form for forms in text.FORMS.values() for form in forms]
    shown += [
        form for values in text.DETAILS.values() for forms in values.values() for form in forms
    ]
    shown += [f"Sections show {name}" for name in text.ORGAN_NAMES.values()]
    shown += [form.format(name) for form in text.NEGATIONS for name in text.ABSENT_NAMES.values()]
    found = {(_words(form), "") for form in shown}
    for gene, name in text.GENES.items():
        why = "control gene" if gene == "control" else ""
        found |= {
            (_words(form.format(name)), why) for forms in text.GENE_FORMS.values() for form in forms
        }
    for say in text.DISTRACTORS:
        found |= {(_words(say(rng)), "distractor") for _ in range(DRAWS)}
    return tuple(sorted(found, key=lambda entry: (sorted(entry[0]), entry[1])))


def _words(sentence: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z]+", sentence.lower()))
