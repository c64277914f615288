"""Reports of the synthetic cohort, and the questions about its slides.

Every finding has four wordings that captions use and a fifth, held out, that only queries use:
its words are known from captions, its phrase is not. A sixth is of words that no caption has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from pathflip.synth.scene import FINDINGS, Scene
from pathflip.text import CANNOT_TELL

FORMS: dict[str, tuple[str, str, str, str]] = {
    "tumour": (
        "Atypical epithelial cells infiltrate the stroma",
        "There is invasive carcinoma with malignant epithelial cells",
        "Infiltrating tumour cells are seen",
        "A malignant epithelial tumour is present",
    ),
    "necrosis": (
        "Coagulative necrosis is present",
        "There is necrosis with ghost cells",
        "Areas of necrotic debris are seen",
        "Necrosis is noted",
    ),
    "lymphoid": (
        "Lymphoid aggregates are present",
        "Dense lymphocytic infiltrates are seen",
        "Aggregates of small lymphocytes are identified",
        "A lymphoid infiltrate is noted",
    ),
    "mucin": (
        "Pools of extracellular mucin are identified",
        "Mucin pools are present",
        "There is abundant extracellular mucin",
        "Mucinous material is seen",
    ),
    "keratin": (
        "Keratin pearls are present",
        "There is prominent keratinization with pearl formation",
        "Concentric keratin whorls are seen",
        "Squamous pearls are identified",
    ),
    "haemorrhage": (
        "Fresh haemorrhage is present",
        "There is interstitial haemorrhage",
        "Extravasated red blood cells are seen",
        "Areas of haemorrhage are identified",
    ),
    "calcification": (
        "Microcalcifications are present",
        "Dystrophic calcification is identified",
        "There are coarse calcifications",
        "Calcified deposits are seen",
    ),
    "fibrosis": (
        "Dense collagenous fibrosis is present",
        "There is desmoplastic fibrosis",
        "Broad bands of hyalinized collagen are seen",
        "Sclerotic stroma is identified",
    ),
}
"""Wordings of each finding that captions use."""

ORGAN_NAMES = {
    "colon": "colonic mucosa",
    "breast": "breast tissue",
    "muscle": "smooth muscle",
    "lung": "lung parenchyma",
}

DETAILS: dict[str, dict[str, tuple[str, ...]]] = {
    "grade": {
        "high": (
            "Tumour nuclei are enlarged and high grade",
            "The tumour is high grade with large nuclei",
        ),
        "low": (
            "Tumour nuclei are small and low grade",
            "The tumour is low grade with small nuclei",
        ),
    },
    "nuclei": {
        "nucleolus": ("Nucleoli are prominent", "There are conspicuous nucleoli"),
        "groove": ("Longitudinal nuclear grooves are present", "Tumour nuclei are grooved"),
        "plain": ("Nucleoli are inconspicuous", "Chromatin is even and nucleoli are small"),
    },
    "pattern": {
        "trabecular": ("The tumour grows in trabeculae", "The architecture is trabecular"),
        "nested": ("The tumour grows in rounded nests", "The architecture is nested"),
        "cribriform": ("The tumour grows in cribriform sheets", "The architecture is cribriform"),
        "solid": ("The tumour grows in solid islands", "The architecture is solid"),
    },
    "til": {
        "intermixed": (
            "Lymphocytes are intermixed with the tumour",
            "Lymphocytes lie within the tumour",
        ),
        "separate": ("Lymphocytes lie apart from the tumour", "Lymphocytes spare the tumour"),
    },
    "extent": {
        "extensive": (
            "Necrosis is multifocal and extensive",
            "Several separate foci of necrosis are seen",
        ),
        "focal": ("Necrosis is confined to a single focus", "Only one focus of necrosis is seen"),
    },
}
"""Wordings of what captions say about a finding beyond its presence."""

GENES = {"geneA": "GENEA", "geneB": "GENEB", "geneC": "GENEC", "control": "GENEX"}
GENE_FORMS: dict[bool, tuple[str, ...]] = {
    True: (
        "A {} mutation is detected",
        "Molecular testing shows mutated {}",
        "{} is mutated",
        "Sequencing reports a {} mutation",
    ),
    False: (
        "No {} mutation is detected",
        "Molecular testing shows wild type {}",
        "{} is wild type",
        "Sequencing reports wild type {}",
    ),
}

ABSENT_NAMES = {
    "tumour": "carcinoma",
    "necrosis": "necrosis",
    "lymphoid": "lymphoid infiltrate",
    "mucin": "mucin",
    "keratin": "keratinization",
    "haemorrhage": "haemorrhage",
    "calcification": "calcification",
    "fibrosis": "fibrosis",
}
NEGATIONS = ("No {} is identified", "There is no evidence of {}")

QUERIES: dict[str, dict[str, str]] = {
    "findings": {
        "tumour": "invasive tumour",
        "necrosis": "areas of necrosis",
        "lymphoid": "aggregates of lymphoid cells",
        "mucin": "abundant mucin pools",
        "keratin": "keratin pearl formation",
        "haemorrhage": "haemorrhage with red blood cells",
        "calcification": "coarse calcified deposits",
        "fibrosis": "bands of dense fibrosis",
    },
    "organ": {organ: f"tissue of {name}" for organ, name in ORGAN_NAMES.items()},
    "grade": {"high": "tumour with high grade nuclei", "low": "tumour with low grade nuclei"},
    "nuclei": {
        "nucleolus": "tumour with prominent nucleoli",
        "groove": "tumour with nuclear grooves",
        "plain": "tumour with inconspicuous nucleoli",
    },
    "pattern": {
        "trabecular": "trabecular tumour",
        "nested": "nested tumour",
        "cribriform": "cribriform tumour",
        "solid": "solid tumour",
    },
    "til": {
        "intermixed": "tumour intermixed with lymphocytes",
        "separate": "lymphocytes apart from tumour",
    },
    "extent": {"extensive": "multifocal necrosis", "focal": "single focus of necrosis"},
    **{
        gene: {"1": f"tissue with mutated {name}", "0": f"tissue with wild type {name}"}
        for gene, name in GENES.items()
    },
}
"""Held-out short forms, by label column and value; no caption contains one."""

EVERYDAY = {
    "tumour": "cancer",
    "necrosis": "cell death",
    "lymphoid": "inflammation",
    "mucin": "mucus",
    "keratin": "cornification",
    "haemorrhage": "bleeding",
    "calcification": "calcium salts",
    "fibrosis": "scarring",
}
"""Findings in words of everyday; no caption has any of these words."""

_Rng = np.random.Generator


def _cm(rng: _Rng, low: float, high: float) -> str:
    return f"{rng.uniform(low, high):.1f}"


DISTRACTORS: tuple[Callable[[_Rng], str], ...] = (
    lambda rng: (
        "The specimen is received in formalin and measures "
        f"{_cm(rng, 1, 6)} x {_cm(rng, 1, 4)} x {_cm(rng, 0.2, 1)} cm"
    ),
    lambda rng: f"Surgical margins are clear by {_cm(rng, 0.1, 1.5)} cm",
    lambda rng: f"Pathologic stage is pT{rng.integers(1, 4)}a N{rng.integers(2)} per AJCC 8th ed",
    lambda rng: (
        f"Dr. {('Lee', 'Moreau', 'Okafor')[rng.integers(3)]} compared the slides "
        "vs. the prior biopsy"
    ),
    lambda rng: "The patient has a history of hypertension",
    lambda rng: f"A total of {rng.integers(4, 20)} lymph nodes were examined",
    lambda rng: "Clinical correlation is recommended",
    lambda rng: "Immunohistochemistry is pending, e.g. p53 and Ki-67",
    lambda rng: f"The prior biopsy (approx. {_cm(rng, 0.4, 2)} cm) was reviewed",
)
"""Sentences that nothing in the image supports; their decimals and abbreviations test splitters."""


@dataclass(frozen=True, kw_only=True)
class Sentence:
    """One sentence of a caption.

    Attributes:
        text: The sentence with its full stop.
        kind: ``organ``, ``finding``, ``grade``, ``nuclei``, ``pattern``, ``til``, ``extent``,
            ``gene``, ``negation`` or ``distractor``.
        subject: The finding, label column or organ it is about; empty for a distractor.
        lesions: Indices into the scene's lesions where the sentence is true.
    """

    text: str
    kind: str
    subject: str = ""
    lesions: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Question:
    """One multiple-choice item; ``answer`` is the letter of the right option, or CANNOT_TELL."""

    slide: str
    split: str
    kind: str
    question: str
    options: tuple[str, ...]
    answer: str

    @property
    def answer_text(self) -> str:
        """Text of the right option."""
        return (
            self.answer if self.answer == CANNOT_TELL else self.options["ABCD".index(self.answer)]
        )


def sentences(scene: Scene) -> list[Sentence]:
    """Write the report of a scene, its sentences shuffled."""
    rng = np.random.default_rng([scene.seed, 1])

    def pick(forms: tuple[str, ...]) -> str:
        return forms[rng.integers(len(forms))]

    def where(*findings: str) -> tuple[int, ...]:
        return tuple(i for i, lesion in enumerate(scene.lesions) if lesion.finding in findings)

    said = [Sentence(text=f"Sections show {ORGAN_NAMES[scene.organ]}", kind="organ")]
    said += [
        Sentence(text=pick(FORMS[f]), kind="finding", subject=f, lesions=where(f))
        for f in scene.findings
    ]
    extra: list[Sentence] = []
    about: dict[str, tuple[str | None, str]] = {
        "grade": (scene.grade, "tumour"),
        "nuclei": (scene.nuclei, "tumour"),
        "pattern": (scene.pattern, "tumour"),
        "til": (scene.til, "lymphoid"),
        "extent": (scene.extent, "necrosis"),
    }
    for kind, (value, at) in about.items():
        if value:
            text = pick(DETAILS[kind][value])
            extra.append(Sentence(text=text, kind=kind, subject=kind, lesions=where(at)))
    shown: dict[str, tuple[str, ...]] = {
        "geneA": ("tumour",),
        "geneB": ("lymphoid", "tumour"),
        "geneC": ("necrosis",),
    }
    for gene, name in GENES.items():
        if (state := scene.genes[gene]) is not None:
            text = pick(GENE_FORMS[state]).format(name)
            lesions = where(*shown.get(gene, ()))
            extra.append(Sentence(text=text, kind="gene", subject=gene, lesions=lesions))
    said += [s for s in extra if rng.uniform() < 0.8]  # reports leave things out
    absent = [f for f in FINDINGS if f not in scene.findings]
    for i in rng.permutation(len(absent))[:2]:
        text = pick(NEGATIONS).format(ABSENT_NAMES[absent[i]])
        said.append(Sentence(text=text, kind="negation", subject=absent[i]))
    for i in rng.permutation(len(DISTRACTORS))[: rng.integers(1, 4)]:
        said.append(Sentence(text=DISTRACTORS[i](rng), kind="distractor"))
    return [
        Sentence(text=s.text + ".", kind=s.kind, subject=s.subject, lesions=s.lesions)
        for s in (said[i] for i in rng.permutation(len(said)))
    ]


def questions(scene: Scene) -> list[Question]:
    """Write the multiple-choice items of a scene; the answer's position is uniform."""
    rng = np.random.default_rng([scene.seed, 2])
    items: list[Question] = []

    def ask(kind: str, question: str, right: str, wrong: Iterable[str]) -> None:
        options = [right, *wrong]
        order = rng.permutation(len(options))
        items.append(
            Question(
                slide=scene.slide,
                split=scene.split,
                kind=kind,
                question=question,
                options=tuple(options[i] for i in order),
                answer="ABCD"[int(np.argmin(order))],
            )
        )

    def ask_among(kind: str, question: str, right: str, choices: Iterable[str]) -> None:
        ask(kind, question, right, [c for c in choices if c != right])

    organs = ORGAN_NAMES.values()
    ask_among("organ", "Which tissue is shown?", ORGAN_NAMES[scene.organ], organs)
    absent = [f for f in FINDINGS if f not in scene.findings]
    if scene.findings and len(absent) >= 3:
        right = scene.findings[rng.integers(len(scene.findings))]
        wrong = [ABSENT_NAMES[absent[i]] for i in rng.permutation(len(absent))[:3]]
        ask("presence", "Which of these findings is present?", ABSENT_NAMES[right], wrong)
    grades = {"low": "low grade", "high": "high grade", None: "no tumour is present"}
    ask_among("grade", "What is the grade of the tumour?", grades[scene.grade], grades.values())
    if "tumour" in scene.findings:
        tils = {"intermixed": "within the tumour", "separate": "apart from the tumour"}
        right = tils.get(scene.til or "", "there are none")
        choices = (*tils.values(), "there are none")
        ask_among("til", "Where are lymphoid aggregates?", right, choices)
    counts = {0: "none", 1: "one", 4: "four", 5: "five"}
    question = "How many foci of necrosis are there?"
    ask_among("necrotic_foci", question, counts[scene.necrotic_foci], counts.values())
    return items


OUTSIDE: dict[str, tuple[str, ...]] = {
    "Does the patient have a history of hypertension?": ("yes", "no"),
    "How many lymph nodes were examined?": ("four", "nine", "fifteen"),
    "What is the pathologic stage?": ("pT1a N0", "pT2a N0", "pT3a N1"),
    "Who compared the slides with the prior biopsy?": ("Dr. Lee", "Dr. Moreau", "Dr. Okafor"),
    "By how much are the surgical margins clear?": ("0.2 cm", "0.6 cm", "1.2 cm"),
    "How large is the specimen?": ("2 cm", "4 cm", "6 cm"),
}
"""Questions that no slide answers, with options; DISTRACTORS are about the same things."""
UNSEEN: dict[str, tuple[str, ...]] = {
    "How old is the patient?": ("45 years", "60 years", "75 years"),
    "Which medication does the patient take?": ("aspirin", "insulin", "none"),
    "What did the radiologist see?": ("a mass", "a cyst", "nothing"),
}
"""Further ones, which are asked of test slides only."""
_PREMISE: dict[str, tuple[str, dict[str, str]]] = {
    "pattern": (
        "How does the tumour grow?",
        {"trabecular": "in trabeculae", "nested": "in rounded nests",
         "cribriform": "in cribriform sheets", "solid": "in solid islands"},
    ),
    "nuclei": (
        "What do the nuclei of the tumour look like?",
        {"nucleolus": "prominent nucleoli", "groove": "nuclear grooves",
         "plain": "inconspicuous nucleoli"},
    ),
    "extent": (
        "How far does the necrosis extend?",
        {"extensive": "several separate foci", "focal": "a single focus"},
    ),
}  # fmt: skip
"""Questions by label column that suppose something: only slides that have it answer them."""


def abstain_questions(scene: Scene) -> list[Question]:
    """Write items that a slide cannot answer, beside some of the like that it can.

    The answer of those it cannot is ``CANNOT_TELL``, which is none of their options: one of
    ``OUTSIDE`` (in the test split also one of ``UNSEEN``), and of two that suppose a tumour or
    necrosis those about a slide without.
    """
    rng = np.random.default_rng([scene.seed, 3])

    def item(kind: str, question: str, options: Iterable[str], right: str | None) -> Question:
        mixed = list(options)
        mixed = [mixed[i] for i in rng.permutation(len(mixed))]
        answer = CANNOT_TELL if right is None else "ABCD"[mixed.index(right)]
        return Question(
            slide=scene.slide, split=scene.split, kind=kind, question=question,
            options=tuple(mixed), answer=answer,
        )  # fmt: skip

    items = []
    for kind, pool in (("outside", OUTSIDE), ("unseen", UNSEEN)):
        question = list(pool)[rng.integers(len(pool))]
        if kind == "outside" or scene.split == "test":
            items.append(item(kind, question, pool[question], None))
    for i in rng.permutation(len(_PREMISE))[:2]:
        kind, (question, texts) = list(_PREMISE.items())[i]
        value = getattr(scene, kind)
        items.append(item(kind, question, texts.values(), texts[value] if value else None))
    return items


def majority_baseline(items: Iterable[Question], *, split: str = "test") -> dict[str, float]:
    """Return accuracy per kind, on ``split``, of the most frequent training answer."""
    items = list(items)
    answers: dict[tuple[str, str], int] = {}
    for item in items:
        if item.split == "train":
            key = (item.kind, item.answer_text)
            answers[key] = answers.get(key, 0) + 1
    hits: dict[str, list[bool]] = {}
    for item in items:
        if item.split == split:
            kind = item.kind
            guess = max(item.options, key=lambda text: answers.get((kind, text), 0))
            hits.setdefault(kind, []).append(guess == item.answer_text)
    return {kind: sum(found) / len(found) for kind, found in sorted(hits.items())}
