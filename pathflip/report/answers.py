"""Report of a tuned run: its captions and answers beside the true ones.

Examples are not picked by hand: they are the first slides of the split, by id, that have a caption
and questions with options.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pathflip.archive import Archive
from pathflip.report.page import metric_row, slide_view, write_page
from pathflip.text import CANNOT_TELL

if TYPE_CHECKING:
    from pathflip.evaluation.encode import SlideRow
    from pathflip.slide_qa import SlideQA

EXAMPLES = 6
QUESTIONS = 8
"""Asked of each example, at most."""
PICTURE_PX = 320


def write_answers_report(
    archive: Archive | str,
    answerer: SlideQA,
    path: str | Path,
    *,
    vqa: Mapping[str, Any],
    captions: Mapping[str, Any],
    title: str = "Captions and answers",
) -> Path:
    """Write the report of a tuned run as one self-contained HTML file.

    Args:
        archive: The archive it was measured on, or its URI.
        answerer: The tuned run; it is asked about the examples.
        path: The HTML file; replaced whole.
        vqa: Results of :func:`pathflip.evaluation.vqa.evaluate_vqa`.
        captions: Results of :func:`pathflip.evaluation.captioning.evaluate_captions`.
        title: Heading of the page.

    Returns:
        The path.

    Raises:
        ArchiveError: The archive cannot be read.
        ConfigError: The file cannot be written.
    """
    from pathflip.evaluation.encode import captions_of, list_slides

    archive = Archive(archive) if isinstance(archive, str) else archive
    split = vqa["split"]
    slides = list_slides(archive, answerer.run, splits=None if split == "all" else (split,))
    reports = captions_of(archive, slides)
    return write_page(
        "answers.html",
        Path(path),
        title=title,
        archive=archive.uri,
        run={"name": answerer.run.name, "path": str(answerer.run.path)},
        vqa=vqa,
        captions=captions,
        headline=_headline(vqa, captions),
        groups=[_questions(vqa), *_captions(captions)],
        examples=_examples(archive, answerer, slides, reports, captions),
    )


def _headline(vqa: Mapping[str, Any], captions: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return (number, label, comparison) of the tiles at the top."""
    tiles = [
        (f"{vqa['accuracy']:.3f}", "questions answered right",
         f"majority {vqa['majority_baseline']:.3f}"),
    ]  # fmt: skip
    if swapped := vqa.get("swapped"):
        tiles.append((f"{swapped['accuracy']:.3f}", "shown another slide", "should fall"))
    if findings := captions.get("findings"):
        base = captions["baseline"]["findings"]
        for key, name in (("named", "of the findings named"), ("invented", "of the absent named")):
            if findings[key] is not None:
                note = f"one caption for all {base[key]:.3f}"
                tiles.append((f"{findings[key]:.3f}", name, note))
    claims = captions["unsupported"]
    if claims["share"] is not None:
        note = "by the planted truth" if claims["by"] == "planted" else f"estimate, {claims['by']}"
        tiles.append((f"{claims['share']:.3f}", "of sentences no image supports", note))
    if calibration := vqa.get("calibration"):
        note = f"uncalibrated {calibration['ece_uncalibrated']:.3f}"
        tiles.append((f"{calibration['ece']:.3f}", "calibration error", note))
    if (silent := vqa.get("abstaining")) and silent["recall"] is not None:
        note = f"precision {silent['precision'] or 0:.3f}"
        tiles.append((f"{silent['recall']:.3f}", "of the unanswerable abstained from", note))
    bleu, base = captions["bleu1"], captions["baseline"]["bleu1"]
    return [*tiles, (f"{bleu:.3f}", "BLEU-1", f"one caption for all {base:.3f}")]


def _questions(vqa: Mapping[str, Any]) -> dict[str, Any]:
    swapped = (vqa.get("swapped") or {}).get("by_category", {})

    def beside(name: str) -> str:
        return f"another slide {swapped[name]:.3f}" if name in swapped else ""

    consistency = vqa["consistency"]
    rows = [
        metric_row(
            "all", vqa["accuracy"], vqa.get("ci"), vqa["majority_baseline"],
            "" if consistency is None else f"consistency {consistency:.3f}", n=vqa["n"],
        ),
        *(
            metric_row(name, one["accuracy"], None, one["majority_baseline"], beside(name),
                       n=one["n"])
            for name, one in vqa["by_category"].items()
        ),
    ]  # fmt: skip
    return {
        "name": "Questions, accuracy",
        "note": f"beside the majority answer; scored by {vqa['mode']}",
        "rows": rows,
    }


def _captions(captions: Mapping[str, Any]) -> list[dict[str, Any]]:
    base, n = captions["baseline"], captions["n"]
    names = {
        "bleu1": "BLEU-1", "bleu2": "BLEU-2", "bleu3": "BLEU-3", "rouge_l": "ROUGE-L",
        "embedding_similarity": "embedding similarity", "tfidf_similarity": "TF-IDF similarity",
    }  # fmt: skip
    rows = [
        metric_row(name, captions[key], None, base[key], "", n=n)
        for key, name in names.items()
        if captions.get(key) is not None
    ]
    note = "beside one caption for all slides, the most typical one"
    groups = [{"name": "Captions", "note": note, "rows": rows}]
    if findings := captions.get("findings"):
        rows = [
            metric_row(finding, one["named"], None, one["invented"] or 0.0, "")
            for finding, one in findings["by_finding"].items()
        ]
        note = "share of the slides with it that name it; the mark: of those without it"
        groups.append({"name": "Findings named", "note": note, "rows": rows})
    return groups


def _examples(
    archive: Archive,
    answerer: SlideQA,
    slides: Sequence[SlideRow],
    reports: Mapping[str, str],
    captions: Mapping[str, Any],
) -> list[dict[str, Any]]:
    from pathflip.evaluation.captioning import named_findings, planted
    from pathflip.interop.questions import stored_questions

    asked: dict[str, list[Any]] = {}
    for one in stored_questions(archive):
        if one.choices:
            asked.setdefault(one.slide, []).append(one)
    found: list[dict[str, Any]] = []
    for slide in slides:
        name = slide.slide_id
        if len(found) == EXAMPLES or name not in asked or name not in captions["captions"]:
            continue
        said = captions["captions"][name]
        truth = planted([slide])
        chips = []
        if truth is not None:
            told = named_findings(said)
            chips = [
                (one, _verdict(one in told, one in truth[0])) for one in sorted(told | truth[0])
            ]
        found.append(
            {
                "slide_id": name,
                "view": slide_view(archive.slide(name), PICTURE_PX),
                "said": said,
                "report": reports.get(name, ""),
                "findings": chips,
                "questions": [
                    _asked(answerer, archive, name, one) for one in asked[name][:QUESTIONS]
                ],
            }
        )
    return found


def _verdict(told: bool, true: bool) -> str:
    return ("right" if true else "invented") if told else "missed"


def _asked(answerer: SlideQA, archive: Archive, slide: str, one: Any) -> dict[str, Any]:
    answer = answerer.ask(archive, slide, one.question, one.choices)
    options = [
        {
            "text": f"{letter}. {text}",
            "score": score,
            "chosen": letter == answer.choice,
            "true": text == one.answer,
        }
        for (letter, score), text in zip(answer.scores.items(), one.choices, strict=True)
    ]
    if answer.abstain is not None:
        options.append(
            {
                "text": CANNOT_TELL,
                "score": answer.abstain,
                "chosen": answer.answer == CANNOT_TELL,
                "true": one.answer == CANNOT_TELL,
            }
        )
    return {"question": one.question, "options": options}
