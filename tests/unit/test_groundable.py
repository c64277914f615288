"""Rules of what no image could support, on sentences of reports that a person sorted."""

from __future__ import annotations

import numpy as np
import pytest

from pathflip.groundable import RULES, unsupported
from pathflip.synth import text

UNSUPPORTED = {
    "history": [
        "The patient has a history of hypertension.", "A 64-year-old man with weight loss.",
        "Status post neoadjuvant chemotherapy.", "Known diabetic, former smoker.",
    ],
    "clinical": [
        "Clinical correlation is recommended.", "Follow-up colonoscopy in one year.",
        "The radiologic impression was a spiculated mass.", "Seen on CT.",
    ],
    "prior": [
        "The prior biopsy was reviewed.", "Compared with the previous resection (S12-345).",
        "The findings are similar to those of the outside slides.",
    ],
    "specimen": [
        "Received in formalin is a segment of colon.", "The specimen measures 4 x 3 x 2 cm.",
        "The largest nodule is 2.5 cm in greatest dimension.", "Grossly, the cut surface is tan.",
        "Representative sections are submitted in cassettes A1 to A6.",
    ],
    "stage": [
        "Pathologic stage is pT2a N1 per AJCC 8th ed.", "pT3 N0 MX.", "Stage IIB.",
        "TNM: T1c N0.",
    ],
    "nodes": [
        "A total of 14 lymph nodes were examined.", "Fourteen lymph nodes, negative (0/14).",
        "Three of twelve regional lymph nodes contain metastases.",
        "Metastatic carcinoma in 2/17 axillary nodes.",
    ],
    "margins": [
        "Surgical margins are free of tumour.", "The deep margin is positive.",
        "Tumor is close to the radial margin.",
    ],
    "tests": [
        "Immunohistochemistry is pending.", "The cells are positive for p53.",
        "A KRAS mutation is detected.", "BRAF is wild type.", "HER2 FISH is not amplified.",
    ],
    "person": [
        "Dr. Moreau concurs.", "The case was discussed with the surgeon.",
        "Dr Lee was notified by telephone.",
    ],
    "admin": [
        "See note.", "CPT 88305.", "This addendum is issued to correct the header.",
    ],
    "date": ["Signed 12/03/2019.", "Collected on 3 March 2020."],
}  # fmt: skip
SUPPORTED = [
    "Based on these observations, the diagnosis is endometrioid adenocarcinoma, FIGO grade 2.",
    "The absence of necrosis correlates with low mitotic activity.",
    "The tumour has pushing margins.", "The invasive margin is infiltrative.",
    "Tumour cells show mild atypia.", "Lymphoid follicles with germinal centres are seen.",
    "Psammoma bodies are present throughout the specimen.",
    "Gleason score 3+4 = 7.", "Two mitoses in 10 high power fields.",
    "Nuclei are stained dark blue.", "Invasion reaches a depth of 0.5 mm.",
    "There is no evidence of lymphovascular invasion.", "T cells surround the vessels.",
    "Marked pleomorphism with 3 nucleoli in some nuclei.", "Nodes of tumour cells lie in fat.",
    "Calcifications may reflect previous necrosis.", "Stages of maturation are preserved.",
    "Giant cells and may be macrophages are present.",
]  # fmt: skip


@pytest.mark.parametrize("why", UNSUPPORTED)
def test_what_no_image_could_support(why: str) -> None:
    for sentence in UNSUPPORTED[why]:
        assert unsupported(sentence) is not None, sentence
    assert any(unsupported(sentence) == why for sentence in UNSUPPORTED[why])
    assert UNSUPPORTED.keys() == RULES.keys()


@pytest.mark.parametrize("sentence", SUPPORTED)
def test_what_a_slide_shows_stays(sentence: str) -> None:
    assert unsupported(sentence) is None


def test_on_the_cohorts_sentences() -> None:
    rng = np.random.default_rng(1)
    for say in text.DISTRACTORS:
        assert unsupported(f"{say(rng)}.") is not None
    shown = [form for forms in text.FORMS.values() for form in forms]
    shown += [f for values in text.DETAILS.values() for forms in values.values() for f in forms]
    shown += [f"Sections show {name}" for name in text.ORGAN_NAMES.values()]
    shown += [form.format(name) for form in text.NEGATIONS for name in text.ABSENT_NAMES.values()]
    assert [form for form in shown if unsupported(f"{form}.")] == []
