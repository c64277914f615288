"""Evaluation of grounding: heat of a finding's text against outlines of the finding.

For each slide and finding with an outline on it, the text asks for the finding and every patch of
tissue gets heat. A patch is right when its centre lies in an outline of that finding.

* Pointing game: is the hottest patch right? (Ties count by their share of right patches.)
* Patch AP: average precision of the heat over the slide's patches.

Both are averaged over (slide, finding) pairs. Their chance levels are exact for the same pairs:
the share of right patches, and the mean AP of a random order. Heat is measured as the model gives
it, and again smoothed as the map that is drawn (``smoothed``). The boxes of that map are measured
against those of the outlines (:mod:`pathflip.evaluation.boxes`).

Shapes: B slides of a batch, N regions, M patch slots, P patches of a slide, L texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from pathflip.archive.slide_names import NAME_COLUMNS, SlideNames, outline_files
from pathflip.compat import check_fits
from pathflip.errors import ConfigError
from pathflip.evaluation import bootstrap
from pathflip.evaluation.boxes import (
    THRESHOLDS,
    BoxScore,
    bounding_boxes,
    check_thresholds,
    read_boxes,
    score_boxes,
    summarise_boxes,
)
from pathflip.evaluation.encode import Batch, SlideRow, batches, list_slides
from pathflip.evaluation.prompts import Suite
from pathflip.geometry import Tiling
from pathflip.heatmap import (
    find_boxes,
    heatmap_grid,
    normalise,
    patch_heat,
    slide_rects,
    smooth,
)
from pathflip.interop.annotation_dicom import SlideFile
from pathflip.interop.annotation_files import read_objects
from pathflip.progress import Report
from pathflip.slides.outlines import Polygon, inside

if TYPE_CHECKING:
    from pathflip.archive import Archive
    from pathflip.checkpoints import Run

Variant = Literal["attn", "region_only", "cosine", "product"]
VARIANTS: tuple[Variant, ...] = ("attn", "region_only", "cosine", "product")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One text on one slide.

    Attributes:
        slide_id, patient_id: The slide and its patient.
        finding: Finding of the text.
        patches, right: Number of tissue patches, and of those in an outline.
        pointing: Whether the hottest patch is right; a share where several tie.
        patch_ap: Average precision.
        smooth_pointing, smooth_patch_ap: The same of smoothed heat.
        boxes: Overlap of the map's boxes with those of the outlines; None where not measured.
    """

    slide_id: str
    patient_id: str | None
    finding: str
    patches: int
    right: int
    pointing: float
    patch_ap: float
    smooth_pointing: float
    smooth_patch_ap: float
    boxes: BoxScore | None = None

    @property
    def pointing_chance(self) -> float:
        """Pointing accuracy of a random patch."""
        return self.right / self.patches

    @property
    def patch_ap_chance(self) -> float:
        """Average precision of a random order."""
        return chance_ap(self.right, self.patches)


def check_variant(name: str) -> Variant:
    """Return the name, if there is such a variant.

    Raises:
        ConfigError: There is none.
    """
    if name not in VARIANTS:
        raise ConfigError(
            f"There is no grounding variant {name!r}.", hint=f"Use {', '.join(VARIANTS)}."
        )
    return name


def chance_ap(right: int, patches: int) -> float:
    """Return mean average precision over all orders of ``patches`` items, ``right`` of them right.

    The i-th item is right with probability r/n, and the mean precision there is then
    (1 + (i - 1)(r - 1)/(n - 1)) / i; summed over i this is
    (H + (n - H)(r - 1)/(n - 1)) / n with the n-th harmonic number H.
    """
    if patches <= 1 or not right:
        return float(bool(right))
    harmonic = float((1 / np.arange(1, patches + 1)).sum())
    return (harmonic + (patches - harmonic) * (right - 1) / (patches - 1)) / patches


def point(heat: ArrayLike, right: ArrayLike) -> float:
    """Return the share of right patches among the hottest [P]; NaN is never the hottest."""
    heat = np.nan_to_num(np.asarray(heat, np.float64), nan=-np.inf)
    return float(np.asarray(right, np.bool_)[heat == heat.max()].mean())


def measure(heat: ArrayLike, right: ArrayLike) -> tuple[float, float]:
    """Pointing and patch AP of one heat map [P] with at least one right patch [P]."""
    from sklearn.metrics import average_precision_score

    heat = np.nan_to_num(np.asarray(heat, np.float64), nan=-1e300)
    return point(heat, right), float(average_precision_score(np.asarray(right, np.bool_), heat))


class Grounder:
    """Accumulator of measured pairs over batches.

    Args:
        run: Run of the model.
        queries: {finding: text}.
        outlines: {slide_id: {finding: polygons}}, level-0 px; slides without an entry are skipped.
        tiling: Tiling of the archive.
        variants: Variants of the heat; see :meth:`pathflip.models.PathFLIP.ground`.
        contrast: Neutral prompt whose heat is subtracted, or None.
        thresholds: Overlaps from which on a box counts as found.
    """

    def __init__(
        self,
        run: Run,
        queries: Mapping[str, str],
        outlines: Mapping[str, Mapping[str, Sequence[Polygon]]],
        *,
        tiling: Tiling,
        variants: Sequence[Variant] = VARIANTS[:1],
        contrast: str | None = None,
        thresholds: Sequence[float] = THRESHOLDS,
    ) -> None:
        self._model = run.model
        self._queries = dict(queries)
        self._outlines = outlines
        self.tiling = tiling
        self._variants = tuple(variants)
        self._contrast = contrast
        self._thresholds = check_thresholds(thresholds)
        self.pairs: dict[str, list[Pair]] = {variant: [] for variant in self._variants}
        self.skipped = 0
        """Outlines in which no patch's centre lies."""

    def add(self, batch: Batch) -> None:
        """Ground every query on a batch."""
        import torch

        if not any(slide.slide_id in self._outlines for slide in batch.slides):
            return
        texts = list(self._queries.values())
        mask = batch.patch_mask.cpu().numpy()
        for nth, variant in enumerate(self._variants):
            with torch.no_grad():
                heat = self._model.ground(
                    batch.features, batch.patch_mask, texts,
                    variant=variant, contrast=self._contrast,
                ).heat.float().cpu().numpy()  # fmt: skip
            for i, slide in enumerate(batch.slides):
                found = self._outlines.get(slide.slide_id, {})
                num = len(batch.region_xy[i])
                here = mask[i, :num]
                rects = slide_rects(batch.region_xy[i], self.tiling, mpp=slide.mpp)[here]
                centres = rects[:, :2] + rects[:, 2:] / 2
                for k, finding in enumerate(self._queries):
                    if finding not in found:
                        continue
                    right = inside(centres, found[finding])
                    if not right.any():
                        self.skipped += nth == 0
                        continue
                    grid = heatmap_grid(
                        heat[i, k, :num], here, batch.region_xy[i], self.tiling, mpp=slide.mpp
                    )
                    smoothed = smooth(grid)
                    drawn = patch_heat(smoothed, here, batch.region_xy[i], self.tiling)
                    boxes = score_boxes(
                        find_boxes(normalise(smoothed), heat=grid),
                        bounding_boxes(found[finding]),
                        centres=centres,
                        thresholds=self._thresholds,
                    )
                    pointing, patch_ap = measure(heat[i, k, :num][here], right)
                    smooth_pointing, smooth_patch_ap = measure(drawn, right)
                    self.pairs[variant].append(
                        Pair(
                            slide_id=slide.slide_id,
                            patient_id=slide.patient_id,
                            finding=finding,
                            patches=len(right),
                            right=int(right.sum()),
                            pointing=pointing,
                            patch_ap=patch_ap,
                            smooth_pointing=smooth_pointing,
                            smooth_patch_ap=smooth_patch_ap,
                            boxes=boxes,
                        )
                    )

    def result(self, *, resamples: int = bootstrap.RESAMPLES, seed: int = 0) -> dict[str, Any]:
        """Return the metrics of all pairs, as :func:`grounding` does."""
        by_variant = {
            variant: summarise(pairs, thresholds=self._thresholds, resamples=resamples, seed=seed)
            for variant, pairs in self.pairs.items()
        }
        first = self._variants[0]
        document = {"variant": first, "contrast": self._contrast, **by_variant[first]}
        document |= {"skipped": self.skipped, "queries": self._queries}
        if len(by_variant) > 1:
            document["variants"] = by_variant
        return document


def summarise(
    pairs: Sequence[Pair],
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    resamples: int = bootstrap.RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Average over pairs, of all and of each finding, with intervals by resampling patients.

    Returns:
        {"pointing", "pointing_chance", "patch_ap", "patch_ap_chance", "n", "slides", "ci",
        "smoothed": {"pointing", "patch_ap"}, "boxes": as
        :func:`~pathflip.evaluation.boxes.summarise_boxes` does, "findings": {finding: the same}};
        ``n`` counts pairs.
    """
    if not pairs:
        return {"n": 0, "slides": 0, "findings": {}} | dict.fromkeys(
            (
                "pointing",
                "pointing_chance",
                "patch_ap",
                "patch_ap_chance",
                "smoothed",
                "boxes",
                "ci",
            )
        )

    def means(some: Sequence[Pair]) -> dict[str, Any]:
        return _means(some, thresholds=thresholds, resamples=resamples, seed=seed)

    findings = sorted({pair.finding for pair in pairs})
    by_finding = {name: means([p for p in pairs if p.finding == name]) for name in findings}
    return means(pairs) | {"findings": by_finding}


def grounding(
    archive: Archive,
    run: Run,
    queries: Mapping[str, str],
    *,
    truth: str | Path | None = None,
    split: str = "test",
    variants: Sequence[str] = VARIANTS[:1],
    contrast: str | None = None,
    thresholds: Sequence[float] = THRESHOLDS,
    resamples: int = bootstrap.RESAMPLES,
    seed: int = 0,
    progress: Report | None = None,
) -> dict[str, Any]:
    """Measure grounding on the outlined slides of a split.

    Args:
        archive: Archive with slides and features.
        run: Run of the model.
        queries: {finding: text}; a finding is an outline's classification.
        truth: Outlines or boxes, see :func:`read_outlines`.
        split: Split to measure; ``all`` for every slide.
        variants: Variants of the heat; the first is the headline.
        contrast: Neutral prompt whose heat is subtracted.
        thresholds: Overlaps from which on a box counts as found.
        resamples: Number of bootstrap resamples of patients.
        seed: Seed of the resamples.
        progress: Called while slides are read.

    Returns:
        As :func:`summarise` for the first variant, with "variant", "contrast", "queries",
        "skipped" (outlines without a patch) and, for several, "variants".

    Raises:
        ConfigError: No outline of a finding asked for was found, or none of them holds the centre
            of a patch (``no_truth``).
    """
    known = [check_variant(variant) for variant in variants]
    name = check_fits(archive, run)
    slides = list_slides(archive, run, splits=None if split == "all" else (split,))
    outlines = read_outlines(archive, slides, findings=set(queries), truth=truth)
    slides = [slide for slide in slides if slide.slide_id in outlines]
    grounder = Grounder(
        run,
        queries,
        outlines,
        tiling=Tiling(**archive.tiling()),
        variants=known,
        contrast=contrast,
        thresholds=thresholds,
    )
    for batch in batches(
        archive, slides, encoder=name, device=run.model.device, what="ground", progress=progress
    ):
        grounder.add(batch)
    if not any(grounder.pairs.values()):
        raise ConfigError(
            f"None of the {grounder.skipped} outlines and boxes holds the centre of a patch of "
            f"{grounder.tiling.patch_um:g} µm.",
            hint="Take a model of smaller patches, or larger outlines; see that their pixels are "
            "those of the slide at full resolution.",
            code="no_truth",
        )
    return grounder.result(resamples=resamples, seed=seed)


def read_outlines(
    archive: Archive,
    slides: Sequence[SlideRow],
    *,
    findings: set[str],
    truth: str | Path | None = None,
) -> dict[str, dict[str, list[Polygon]]]:
    """Return {slide_id: {finding: polygons}} of slides with an outline of one of the findings.

    Args:
        archive: Archive of the slides.
        slides: Slides to find outlines of.
        findings: Classes to read; outlines of other classes are ignored.
        truth: Folder of files of outlines (:mod:`pathflip.interop.annotation_files`) named like
            their slides, or a table of boxes (:func:`~pathflip.evaluation.boxes.read_boxes`); by
            default the folder ``lesions`` beside the folder of each slide.

    Raises:
        ConfigError: No slide has one, or the name of one is that of several slides.
    """
    columns = ["slide_id", "uri", "width", "height", "bounds_x0", "bounds_y0"]
    rows = {row["slide_id"]: row for row in archive.slides("ready", columns).to_pylist()}
    found: dict[str, dict[str, list[Polygon]]] = {}
    wanted = {slide.slide_id for slide in slides}
    if truth is not None and Path(truth).is_file():
        names = SlideNames.from_rows(archive.slides(columns=NAME_COLUMNS).to_pylist())
        found = read_boxes(truth, names=names, slides=wanted, findings=findings)
        paths, folders = dict[str, Path](), list[Path]()
    else:
        paths, folders = _outline_paths(archive, wanted, truth)
    for slide_id, path in sorted(paths.items()):
        row = rows[slide_id]
        for item in read_objects(
            path,
            bounds_x0=row["bounds_x0"] or 0,
            bounds_y0=row["bounds_y0"] or 0,
            slide=SlideFile.of(row["uri"], row["width"], row["height"]),
        ):
            if item.classification in findings and item.polygons:
                mine = found.setdefault(slide_id, {})
                mine.setdefault(item.classification, []).extend(item.polygons)
    if not found:
        looked = folders[0] if folders else truth
        raise ConfigError(
            f"No outline of {', '.join(sorted(findings)) or 'anything'} was found in {looked}.",
            hint="Give the folder of <slide>.geojson files, or a table of boxes, with --truth.",
            code="no_truth",
        )
    return found


def _outline_paths(
    archive: Archive, slides: set[str], truth: str | Path | None
) -> tuple[dict[str, Path], list[Path]]:
    """Return {slide_id: its outline file}, and the folders that were searched."""
    looked_in: dict[Path, list[dict[str, Any]]] = {}
    for row in archive.slides(columns=NAME_COLUMNS).to_pylist():
        uri = Path(row["uri"] or "")
        folder = Path(truth) if truth is not None else uri.parent.parent / "lesions"
        looked_in.setdefault(folder, []).append(row)
    paths: dict[str, Path] = {}
    for folder, rows in looked_in.items():
        # A file named by slide_id counts only where none is named like the slide's file.
        files = sorted(outline_files(folder), key=lambda path: path.stem in slides)
        matches = SlideNames.from_rows(rows).match(files, lambda path: (path.name, False))
        for path, several in matches.unclear:
            if slides & set(several):
                raise ConfigError(
                    f"The name of {path} matches several slides, {several[0]} and {several[1]}.",
                    hint="Name the outlines <slide_id>.geojson.",
                )
        for path, (slide,) in matches.found:
            if slide in slides:
                paths.setdefault(slide, path)
    return paths, list(looked_in)


def queries_of(suite: Suite) -> dict[str, str]:
    """Return {label: first prompt} of a suite's presence tasks, the queries of grounding."""
    return {
        task.label: task.texts(task.prompts)[0] for task in suite.tasks if task.kind == "presence"
    }


def _means(
    pairs: Sequence[Pair], *, thresholds: Sequence[float], resamples: int, seed: int
) -> dict[str, Any]:
    keys = ("pointing", "patch_ap")
    values = {key: np.array([getattr(pair, key) for pair in pairs]) for key in keys}
    found: dict[str, Any] = {}
    for key in keys:
        found[key] = float(values[key].mean())
        found[f"{key}_chance"] = float(np.mean([getattr(p, f"{key}_chance") for p in pairs]))
    found["smoothed"] = {
        key: float(np.mean([getattr(pair, f"smooth_{key}") for pair in pairs])) for key in keys
    }
    found |= {"n": len(pairs), "slides": len({pair.slide_id for pair in pairs}), "ci": None}
    patients = [pair.patient_id or pair.slide_id for pair in pairs]
    weights = None
    if resamples:
        weights = bootstrap.patient_weights(patients, resamples=resamples, seed=seed)
        found["ci"] = {
            key: bootstrap.interval(
                bootstrap.weighted_mean(values[key], weights),
                found[key],
                bootstrap.support(patients, graded=key == "patch_ap"),
            )
            for key in keys
        }
    boxes = [pair.boxes for pair in pairs if pair.boxes is not None]
    found["boxes"] = None
    if len(boxes) == len(pairs):
        found["boxes"] = summarise_boxes(
            boxes, thresholds=thresholds, patients=patients, weights=weights
        )
    return found
