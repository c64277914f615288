"""Sentences of reports that no image of the slide could support, by their wording.

A report says what is seen, and besides whom the tissue is from, what was received, what other tests
and other specimens showed, who was told. A model that learns to write such sentences from slides
learns to make them up. The rules are a few patterns of general report language, not of any data
set; ``VERSION`` changes whenever one of them does, and the model card names it.

They know words, not slides: :mod:`pathflip.training.targets` adds what a slide model measures.
"""

from __future__ import annotations

import re

VERSION = "1"

_NUMBER = r"(?:\d+|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|all|none|no)"
_MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.?"
_RULES: dict[str, str] = {
    "history": (
        r"\bhistory\b|\bh/o\b|\byears?[- ]old\b|\bstatus[- ]post\b|\bs/p\b|\bpresent(?:s|ed) with\b"
        r"|\b(?:hypertension|hypertensive|diabet\w*|smok(?:er|ing)|medications?|allerg\w*"
        r"|symptom\w*|comorbid\w*|pregnan\w*|menopaus\w*)\b|\bthe patient\b|\bpatient'?s?\b"
    ),
    "clinical": (
        r"\bclinic(?:al|ally|ian|ians)\b|\brecommend\w*|\bfollow[- ]?up\b"
        r"|\bcorrelation (?:is|with (?:the )?(?:history|imaging))\b"
        r"|\b(?:endoscop|colonoscop|radiolog|radiograph|mammogra|ultraso|tomogra)\w*"
        r"|\b(?:imaging|mri|ct|x-ray)\b"
    ),
    "prior": (
        r"\b(?:prior|previous(?:ly)?|earlier|outside|concurrent|subsequent)\b.{0,40}"
        r"\b(?:biops\w+|specimens?|slides?|reports?|cases?|materials?|resections?|surger\w+"
        r"|excisions?|cytolog\w+|diagnos\w+|sections?)\b|\bsee also\b"
    ),
    "specimen": (
        r"\bformalin\b|\breceived\b|\bsubmitted (?:in|as|for|entirely)\b|\bentirely submitted\b"
        r"|\bgrossly\b"
        r"|\bspecimens? (?:is|are|was|were|measur\w+|consists?|weigh\w*|labell?ed)\b|\bcassettes?\b"
        r"|\bgross (?:examination|description|specimen)\b|\blabell?ed\b|\bweigh\w*"
        r"|\binked\b|\d\s*cm\b|\bcentimet\w+"
    ),
    "stage": (
        r"\bajcc\b|\btnm\b|\bstag(?:e|ed|ing)\b|(?-i:\b[yra]{0,2}[pc]?T(?:is|[0-4])[a-d]?\b"
        r".{0,6}\b[pc]?N[0-3xX]\b|\bp[TNM](?:is|x|X|\d))"
    ),
    "nodes": (
        rf"\b{_NUMBER} (?:[\w-]+ ){{0,4}}(?:lymph\s*)?nodes?\b|\blymph\s*nodes?\b.{{0,60}}\b(?:\d"
        r"|examined|sampled|submitted|negative|positive|involved|uninvolved|free)\b|\d\s*/\s*\d+"
        r".{0,20}\bnodes?\b"
    ),
    "margins": (
        r"\bmargins?\b.{0,60}\b(?:clear|free|negative|positive|involved|uninvolved|close|tumou?r)\b"
        r"|\b(?:clear|free|negative|positive|uninvolved|close|distance)\b.{0,40}\bmargins?\b"
    ),
    "tests": (
        r"\bimmuno(?:histochem\w*|stain\w*|react\w*|phenotyp\w*|fluoresc\w*)|\bihc\b|\bfish\b"
        r"|\bpcr\b|\bsequenc(?:ing|ed)\b|\bmolecular\b|\bmutat\w+|\bwild[- ]?type\b|\bcytogenet\w*"
        r"|\bflow cytometr\w*|\bmicrosatellite\b|\bamplif(?:ied|ication)\b|\brearrange\w*"
        r"|\bki-?67\b|\bp53\b|\bher-?2\b|\bspecial stains?\b|\bcultures?\b|\bpending\b"
    ),
    "person": (
        r"(?-i:\b(?:Drs?|Prof)\.?\s+[A-Z]|\bM\.?D\b)|\bpathologists?\b|\bphysicians?\b|\bsurgeons?\b"
        r"|\bcolleagues?\b|\bconsult\w*|\bdiscuss\w*|\bnotif\w+|\binformed\b|\btelephone\w*"
        r"|\bconcurs?\b|\b(?:reviewed|signed|verified|read) by\b|\bwas reviewed\b|\bwere reviewed\b"
    ),
    "admin": (
        r"\bbilling\b|\bcpt\b|\bicd-?(?:9|10|o)?\b|\baccession\w*|\baddend\w+|\bamended\b"
        r"|\b(?:this|the|final) report\b|\bsee (?:note|comment|report|synoptic)\b|\bfda\b|\bclia\b"
        r"|\bprotocol\b|\blaborator(?:y|ies)\b"
    ),
    "date": (
        rf"\b\d{{1,4}}[/.-]\d{{1,2}}[/.-]\d{{2,4}}\b|\b{_MONTH}\s+(?:\d{{1,2}},?\s+)?(?:19|20)\d\d\b"
        rf"|\b\d{{1,2}}\.?\s+{_MONTH}\s+(?:19|20)\d\d\b"
    ),
}  # fmt: skip
RULES: dict[str, re.Pattern[str]] = {
    name: re.compile(words, re.IGNORECASE) for name, words in _RULES.items()
}
"""Patterns by what a sentence is about; the first that matches names the reason."""


def unsupported(sentence: str) -> str | None:
    """Return the rule by which no image could support a sentence; None where no rule matches."""
    for name, words in RULES.items():
        if words.search(sentence):
            return name
    return None
