"""Zero-shot scores and metrics on planted truth, against scikit-learn and plain loops."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics

from pathflip.errors import ConfigError
from pathflip.evaluation.classify import classify
from pathflip.evaluation.encode import SlideRow
from pathflip.evaluation.grounding import grounding
from pathflip.evaluation.prompts import Suite, Task
from pathflip.evaluation.suite import evaluate_all
from pathflip.evaluation.zeroshot import (
    TextScores,
    evaluate_task,
    suite_texts,
    summary,
    task_score,
    zeroshot,
)
from tests.unit.evaluation.planted import PlantedModel

ORGANS = {"lung": ("tissue of lung",), "colon": ("tissue of colon",)}
SUITE = Suite(
    tasks=(
        Task(
            name="tumour", label="tumour", prompts=("tumour",), negative_prompts=("no tumour",),
            score="local",
        ),
        Task(name="necrosis", label="necrosis", prompts=("necrosis",), contrast="others"),
        Task(name="organ", label="organ", kind="multiclass", classes=ORGANS),
        Task(name="absent", label="absent", prompts=("tumour",)),
        Task(name="empty", label="empty", prompts=("tumour",)),
    )
)  # fmt: skip


def row(i: int, *, patient: str, split: str, **labels: str) -> SlideRow:
    return SlideRow(
        slide_id=f"s{i}", stem=f"s{i}", patient_id=patient, split=split, labels=labels, mpp=0.5,
        uri="", n_regions=1,
    )  # fmt: skip


def random_scores(n: int, texts: list[str], *, d: int = 6, seed: int = 0) -> TextScores:
    rng = np.random.default_rng(seed)

    def unit(*shape: int) -> np.ndarray:
        values = rng.normal(size=shape)
        return values / np.linalg.norm(values, axis=-1, keepdims=True)

    return TextScores(
        at={text: i for i, text in enumerate(texts)},
        vectors=unit(len(texts), d),
        slide=unit(n, d),
        local=rng.uniform(-1, 1, (n, len(texts))),
    )


def test_planted_findings_are_read(archive, run, planted_slides) -> None:  # type: ignore[no-untyped-def]
    found = zeroshot(archive, run, SUITE, split="all", resamples=200)
    assert set(found) == {"tumour", "necrosis", "organ", "empty"}  # no slide has the label absent
    assert found["tumour"]["auc"] == 1
    assert 0.5 < found["tumour"]["ci"][0] < found["tumour"]["ci"][1] == 1
    assert found["tumour"]["balanced_accuracy"] == 1
    assert found["tumour"]["threshold_from"] == "val"
    # Necrosis in a region that the archive lacks is a coin's throw; the rest is told apart.
    lesions = [slide.lesions["necrosis"] for slide in planted_slides if "necrosis" in slide.lesions]
    seen = grounding(archive, run, {"necrosis": "necrosis"}, split="all", resamples=0)["n"]
    by = found["necrosis"]["auc_by"]
    assert by["local/none"] == pytest.approx((seen + (len(lesions) - seen) / 2) / len(lesions))
    assert found["necrosis"]["auc"] == pytest.approx(by["global/others"])
    assert found["organ"]["accuracy"] == found["organ"]["auc"] == 1
    assert 0.5 < found["organ"]["accuracy_ci"][0] < found["organ"]["accuracy_ci"][1] == 1
    assert (found["empty"]["n"], found["empty"]["auc"]) == (0, None)
    # "no tumour" reads as tumour here too: the contrast has nothing to say.
    assert found["tumour"]["auc_by"]["local/none"] == 1
    assert found["tumour"]["auc_by"]["local/negation"] == pytest.approx(0.5, abs=1e-3)
    means = summary(found)
    assert means["presence"]["tasks"] == 3
    assert means["presence"]["auc"] == pytest.approx((1 + found["necrosis"]["auc"]) / 2)
    test = zeroshot(archive, run, SUITE, resamples=0)
    assert test["tumour"]["n"] == 8
    assert test["tumour"]["ci"] is None


def test_scores_are_those_of_the_recipe() -> None:
    a = Task(
        name="a", prompts=("x", "y"), negative_prompts=("z",), templates=("CLASSNAME", "CLASSNAME!")
    )
    b = Task(name="b", prompts=("u",))
    c = Task(name="c", prompts=("v",))
    elsewhere = Task(name="d", prompts=("w",), group="others")
    suite = Suite(tasks=(a, b, c, elsewhere))
    texts = ["x", "x!", "y", "y!", "z", "z!", "u", "v", "w", "tissue"]
    scores = random_scores(7, texts)
    weight = scores.vectors[:4].sum(axis=0)
    weight /= np.linalg.norm(weight)
    near = scores.slide @ weight
    local = scores.local[:, :4].mean(axis=1)
    for source, expected in (("global", near), ("local", local), ("sum", near + local)):
        np.testing.assert_allclose(task_score(a, scores, suite, score=source), expected)  # type: ignore[arg-type]
    cos = scores.slide @ scores.vectors.T
    found = task_score(a, scores, suite, contrast="others")
    np.testing.assert_allclose(found, near - (cos[:, 6] + cos[:, 7]) / 2)
    np.testing.assert_allclose(task_score(a, scores, suite, contrast="neutral"), near - cos[:, 9])
    negative = scores.vectors[4:6].sum(axis=0)
    negative /= np.linalg.norm(negative)
    found = task_score(a, scores, suite, contrast="negation")
    np.testing.assert_allclose(found, near - scores.slide @ negative)


def test_two_sided_metrics_are_scikit_learns() -> None:
    rng = np.random.default_rng(5)
    truth = rng.uniform(size=90) < 0.3
    slides = [
        row(i, patient=f"p{i // 3}", split="test" if i < 60 else "val", y=str(int(t)))
        for i, t in enumerate(truth)
    ]
    task = Task(name="y", label="y", prompts=("x",), negative_prompts=("z",))
    suite = Suite(tasks=(task,))
    scores = random_scores(90, ["x", "z", "tissue"], seed=1)
    values = task_score(task, scores, suite)[:60]
    right = truth[:60]
    found = evaluate_task(task, scores, slides, suite)
    assert (found["n"], found["n_pos"]) == (60, right.sum())
    assert found["auc"] == pytest.approx(metrics.roc_auc_score(right, values))
    assert found["ap"] == pytest.approx(metrics.average_precision_score(right, values))
    assert found["ci"][0] < found["auc"] < found["ci"][1]
    said = values >= found["threshold"]
    assert found["balanced_accuracy"] == pytest.approx(metrics.balanced_accuracy_score(right, said))
    assert found["baseline"]["ap"] == pytest.approx(right.mean())
    assert found["baseline"]["accuracy"] == pytest.approx(max(right.mean(), 1 - right.mean()))
    # The threshold is the best there is on val, which is slides 60 to 90.
    own = task_score(task, scores, suite)[60:]
    best = max(metrics.balanced_accuracy_score(truth[60:], own >= cut) for cut in [*own, -np.inf])
    reached = metrics.balanced_accuracy_score(truth[60:], own >= found["threshold"])
    assert reached == pytest.approx(best)
    agreed = [i for i in range(20) if len(set(right[3 * i : 3 * i + 3])) == 1]
    assert found["patient"]["n"] == len(agreed)
    assert found["patient"]["n_mixed"] == 20 - len(agreed)
    means = [values[3 * i : 3 * i + 3].mean() for i in agreed]
    kept = [right[3 * i] for i in agreed]
    if len(set(kept)) == 2:
        assert found["patient"]["auc"] == pytest.approx(metrics.roc_auc_score(kept, means))
    contrast = Task(
        name="y", label="y", prompts=("x",), negative_prompts=("z",), contrast="negation"
    )
    zero = evaluate_task(contrast, scores, slides, Suite(tasks=(contrast,)))
    assert (zero["threshold"], zero["threshold_from"]) == (0, "zero")


def test_multiclass_metrics_are_scikit_learns() -> None:
    rng = np.random.default_rng(6)
    names = ["a", "b", "c"]
    truth = rng.choice(3, size=80, p=[0.6, 0.3, 0.1])
    slides = [row(i, patient=f"p{i}", split="test", y=names[t]) for i, t in enumerate(truth)]
    slides.append(row(80, patient="p80", split="test", y="unlisted"))
    task = Task(name="y", label="y", kind="multiclass", classes={n: (n,) for n in names})
    suite = Suite(tasks=(task,))
    scores = random_scores(81, [*names, "tissue"], seed=2)
    values = task_score(task, scores, suite)[:80]
    said = values.argmax(axis=1)
    shares = np.exp(values / 0.1)
    shares /= shares.sum(axis=1, keepdims=True)
    found = evaluate_task(task, scores, slides, suite, resamples=300)
    assert found["n"] == 80
    assert found["accuracy"] == pytest.approx((said == truth).mean())
    assert found["balanced_accuracy"] == pytest.approx(metrics.balanced_accuracy_score(truth, said))
    assert found["weighted_f1"] == pytest.approx(metrics.f1_score(truth, said, average="weighted"))
    assert found["auc"] == pytest.approx(
        metrics.roc_auc_score(truth, shares, multi_class="ovr", average="macro")
    )
    assert found["ci"][0] < found["auc"] < found["ci"][1]
    assert found["baseline"] == {
        "auc": 0.5,
        "accuracy": pytest.approx(np.bincount(truth).max() / 80),
        "balanced_accuracy": pytest.approx(1 / 3),
    }


def test_classify(archive, run, planted_slides) -> None:  # type: ignore[no-untyped-def]
    rows = classify(archive, run, ORGANS, templates="CLASSNAME")
    organ = {slide.name: slide.organ for slide in planted_slides}
    assert [r["slide_id"] for r in rows] == sorted(organ)
    assert all(r["label"] == organ[r["slide_id"]] for r in rows)
    assert all(r["label"] == max(r["scores"], key=r["scores"].get) for r in rows)
    (one,) = classify(archive, run, "lung,colon", slides=["s004"], score="local")
    assert (one["slide_id"], one["label"]) == ("s004", organ["s004"])
    with pytest.raises(ConfigError, match="not of the split"):
        classify(archive, run, ORGANS, slides=["s000"], split="test")


def test_a_model_without_regions_is_scored_globally(archive, other_run) -> None:  # type: ignore[no-untyped-def]
    run = other_run()
    run.model = PlantedModel(region_encoder="none")
    found = evaluate_all(archive, run, suite=SUITE, split="all", resamples=0)
    assert found["grounding"] is None
    assert {task["score"] for task in found["zeroshot"].values()} == {"global"}
    assert set(found["zeroshot"]["tumour"]["auc_by"]) == {
        f"global/{contrast}" for contrast in ("none", "neutral", "others", "negation")
    }


def test_a_task_without_a_label_reads_the_one_of_its_name_or_is_refused() -> None:
    slides = [row(i, patient=f"p{i}", split="test", y=str(i % 2)) for i in range(8)]
    named, other = Task(name="y", prompts=("x",)), Task(name="other", prompts=("x",))
    suite = Suite(tasks=(named,))
    scores = random_scores(8, suite_texts(suite))
    assert evaluate_task(named, scores, slides, suite, resamples=0)["n_pos"] == 4
    classes = Task(name="organ", kind="multiclass", classes=ORGANS)
    for task in (other, classes):
        with pytest.raises(ConfigError, match=f"none of 8 slides has the label '{task.name}'"):
            evaluate_task(task, scores, slides, suite, resamples=0)


def test_labels_that_are_not_there(archive, run) -> None:  # type: ignore[no-untyped-def]
    suite = Suite(tasks=(Task(name="x", label="x", prompts=("tumour",)),))
    with pytest.raises(ConfigError, match="none of the labels x"):
        zeroshot(archive, run, suite)
    with pytest.raises(ConfigError, match="no ready slide of split holdout"):
        zeroshot(archive, run, SUITE, split="holdout")
