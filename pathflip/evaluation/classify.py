"""Zero-shot choice of a class, for the command ``classify`` and for single slides of a service.

:mod:`pathflip.evaluation.zeroshot` has the scores, and measures them against labels.

Shapes: L texts, d joint width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pathflip.errors import ConfigError
from pathflip.evaluation.encode import encode, has_regions, list_slides
from pathflip.evaluation.prompts import Source, Suite, Task, read_classes, templates_of
from pathflip.evaluation.zeroshot import TextScores, task_score, text_scores
from pathflip.progress import Report

if TYPE_CHECKING:
    from pathflip.archive import Archive
    from pathflip.checkpoints import Run
    from pathflip.evaluation.encoding_cache import EncodingCache


def classify(
    archive: Archive,
    run: Run,
    classes: Mapping[str, Sequence[str]] | str,
    *,
    templates: str | Sequence[str] = "ensemble",
    score: Source = "global",
    split: str | None = None,
    slides: Sequence[str] | None = None,
    progress: Report | None = None,
) -> list[dict[str, Any]]:
    """Choose a class for each slide.

    Args:
        archive: Archive with the features.
        run: Run of the model.
        classes: {class: names}, or what :func:`pathflip.evaluation.prompts.read_classes` takes.
        templates: ``single``, ``ensemble``, or templates with CLASSNAME.
        score: ``global``, ``local`` or ``sum``.
        split: Only slides of it; all by default.
        slides: Only these, by id or unique file name.
        progress: Called while slides are encoded.

    Returns:
        One {"slide_id", "scores": {class: cosine}, "label": best class} per slide, by slide_id.
    """
    named = read_classes(classes) if isinstance(classes, str) else classes
    task = class_task(named, templates=templates, score=score)
    rows = list_slides(archive, run, splits=None if split is None else (split,))
    if slides is not None:
        wanted = {archive.resolve(slide) for slide in slides}
        rows = [row for row in rows if row.slide_id in wanted]
        if absent := sorted(wanted - {row.slide_id for row in rows}):
            raise ConfigError(
                f"Slide {absent[0]} is not ready, not of the split, or lacks features.",
                hint=f"See: pathflip slides show {absent[0]} --archive {archive.uri}",
                code="no_slides",
            )
    encoded = encode(archive, run, slides=rows, texts=class_texts(task), progress=progress)
    ids = [slide.slide_id for slide in encoded.slides]
    return _classified(task, text_scores(run, encoded), ids)


def class_task(
    classes: Mapping[str, Sequence[str]], *, templates: str | Sequence[str], score: Source
) -> Task:
    """Return the task of choosing one of some classes, as for :func:`classify`."""
    return Task(
        name="classify",
        kind="multiclass",
        classes={key: tuple(names) for key, names in classes.items()},
        templates=templates_of(templates),
        score=score,
    )


def class_texts(task: Task) -> list[str]:
    """Return the prompts of all classes of a task."""
    texts = [text for names in task.classes.values() for text in task.texts(names)]
    return list(dict.fromkeys(texts))


def classify_slides(
    archive: Archive, cache: EncodingCache, task: Task, *, slides: Sequence[str]
) -> list[dict[str, Any]]:
    """Choose a class for single slides, as :func:`classify` does for many.

    Args:
        archive: Archive with the features.
        cache: The run's model and what it encoded of late.
        task: Result of :func:`class_task`.
        slides: The slides, by id or unique file name.

    Raises:
        ArchiveError: A slide is unknown, not ready, or lacks features.
    """
    from torch.nn.functional import normalize

    model, texts = cache.run.model, class_texts(task)
    raw = cache.texts(texts)
    seen = {one.slide_id: one.sight for one in (cache.slide(archive, name) for name in slides)}
    ids = sorted(seen)
    embedded = [model.slide_embedding(seen[slide]) for slide in ids]
    local = None
    if has_regions(cache.run) and task.score != "global":
        scored = [model.local_scores(one, raw).double().cpu().numpy() for one in embedded]
        local = np.concatenate(scored)
    scores = TextScores(
        at={text: i for i, text in enumerate(texts)},
        vectors=normalize(raw.float(), dim=-1).double().cpu().numpy(),
        slide=np.concatenate([one.slide.double().cpu().numpy() for one in embedded]),
        local=local,
    )
    return _classified(task, scores, ids)


def _classified(task: Task, scores: TextScores, ids: Sequence[str]) -> list[dict[str, Any]]:
    values = task_score(task, scores, Suite(tasks=(task,)))
    names = list(task.classes)
    return [
        {
            "slide_id": slide,
            "scores": dict(zip(names, row.tolist(), strict=True)),
            "label": names[int(np.argmax(row))],
        }
        for slide, row in zip(ids, values, strict=True)
    ]
