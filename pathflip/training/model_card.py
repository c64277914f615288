"""Model cards of runs: contents, data, results, settings and limits; and their pathflip.json."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pathflip.calibration import Calibration
from pathflip.geometry import TreeSpec
from pathflip.training.config import AnyConfig, PretrainConfig, TuneConfig
from pathflip.training.dataset import Corpus
from pathflip.training.loop_config import LoopConfig, save_settings
from pathflip.training.tree_config import MRPretrainConfig
from pathflip.training.tree_corpus import TreeCorpus


def pretrained_card(
    name: str, config: PretrainConfig, corpus: Corpus, result: dict[str, Any]
) -> str:
    """Return the model card of a pretraining run."""
    val = result["val"]

    def row(what: str, cells: Callable[[str], str]) -> str:
        return f"| {what} | {' | '.join(cells(k) for k in ('r@1', 'r@5', 'r@10'))} |"

    lines = [
        "---", "library_name: pathflip", "tags: [pathology, whole-slide-image, contrastive]",
        "---", "",
        f"# {name}", "",
        f"A slide and text encoder trained with pathflip, preset `{config.preset}`: slides and "
        "captions in one space, slides searchable and groundable by text.", "",
        "```python", "from pathflip.models import PathFLIP",
        'model = PathFLIP.from_pretrained("<this folder>")', "```", "",
        *_data(corpus, "without a caption"),
        "## Results", "",
    ]  # fmt: skip
    if val:
        lines += [
            f"Validation retrieval, {val['n']} slides, protocol {val['protocol']}, step "
            f"{result['best_step']:,} of {result['steps']:,}:", "",
            "| | R@1 | R@5 | R@10 |", "|---|---|---|---|",
            row("slide to caption", lambda k: f"{val['itr'][k]:.3f}"),
            row("caption to slide", lambda k: f"{val['tir'][k]:.3f}"),
            row("chance", lambda k: f"{val['chance'][k]:.3f}"), "",
            "These slides chose the weights: measure on others before quoting a figure.",
        ]  # fmt: skip
    else:
        lines += ["No slide was held out to validate; the last weights were exported."]
    lines += [
        "", *_training(config, result),
        "* Contrastive text encoders hardly read negation: \"no necrosis\" is close to "
        "\"necrosis\".",
        "* Whatever the captions share with the slides besides the findings (site, stain) can be "
        "learned as well.",
        "* Features, weights and captions carry the licences of the encoder and the data.",
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def tuned_card(
    name: str,
    config: TuneConfig,
    corpus: Corpus,
    result: dict[str, Any],
    calibration: Calibration | None,
) -> str:
    """Return the model card of a tuned run."""
    counts, about, val = corpus.counts(), corpus.about, result["val"]
    trained = ["the projector"]
    if config.instruct.llm_tuning != "freeze":
        adapted = config.instruct.llm_tuning == "lora"
        trained.append("a LoRA adapter" if adapted else "the language model")
    if config.instruct.train_vision:
        trained.append("the slide model")
    lines = [
        "---", "library_name: pathflip", "tags: [pathology, whole-slide-image, captioning, vqa]",
        "---", "",
        f"# {name}", "",
        f"Answers about slides: the slide model of `{about['vision']['name']}` and the language "
        f"model `{Path(about['base']['name']).name}`, tuned with pathflip, preset "
        f"`{config.preset}`. What trained: {', '.join(trained)}.", "",
        "`model/` holds what was tuned; `llm/` the language model as it is served, adapter folded "
        "in.", "",
        *_data(corpus, "without a text"),
        f"Of these, {counts['train_captions']:,} training slides have a caption; "
        f"{counts['train_questions']:,} questions are about them. Validation: "
        f"{counts['val_captions']:,} and {counts['val_questions']:,}.", "",
        *_targets(corpus.about.get("targets")),
        "## Results", "",
    ]  # fmt: skip
    if val:
        lines += [
            f"Mean cross-entropy of the answers' tokens on {val['n']} validation slides, step "
            f"{result['best_step']:,} of {result['steps']:,}: "
            f"{_number(val['loss_answer'])}. These slides chose the weights: measure on others "
            "(pathflip evaluate vqa, caption) before quoting a figure.",
        ]  # fmt: skip
    else:
        lines += ["No slide was held out to validate; the last weights were exported."]
    if calibration is not None:
        lines += [
            "", f"Choices are calibrated on {calibration.questions:,} questions about these slides "
            f"(temperature {calibration.temperature:.3g}): expected calibration error "
            f"{calibration.ece_before:.3f} before, {calibration.ece:.3f} after.",
        ]  # fmt: skip
    else:
        lines += ["", "Choices are not calibrated: too few validation questions have options."]
    lines += [
        "", *_training(config, result),
        "* What it says is generated text: it can be wrong, and sound sure of it.",
        "* It may answer from the question alone; evaluation says how far it looks at the slide "
        "(accuracy with slides exchanged, majority baseline).",
        "* Features, weights and texts carry the licences of the encoder, the language model and "
        "the data.",
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def _targets(found: dict[str, Any] | None) -> list[str]:
    """Return what caption targets leave out; ``found`` is a report of ``training.targets``."""
    if found is None:
        return ["Captions were learned from whole reports.", ""]
    lines = [
        f"Captions were learned from {found['kept']:,} of {found['sentences']:,} sentences: those "
        f"that a slide can show (rules {found['rules']}, {found['measured']}).", "",
    ]  # fmt: skip
    if found["left_out"]:
        # Without examples: a card is published, and these sentences name people and histories.
        lines += ["| left out as | sentences |", "|---|---|"]
        lines += [f"| {name} | {own['sentences']:,} |" for name, own in found["left_out"].items()]
        lines += [""]
    return lines


def patch_card(
    name: str, config: MRPretrainConfig, corpus: TreeCorpus, result: dict[str, Any]
) -> str:
    """Return the model card of a pretraining run on patch trees."""
    val, counts, about = result["val"], corpus.counts(), corpus.about
    encoder, left_out = about["encoder"], about["left_out"]
    spec = TreeSpec(**about["trees"])
    lines = [
        "---", "library_name: pathflip", "tags: [pathology, multi-resolution, contrastive]",
        "---", "",
        f"# {name}", "",
        f"A patch and text encoder of four resolutions trained with pathflip, preset "
        f"`{config.preset}`: patches and captions in one space. Losses: "
        f"{', '.join(config.model.losses)}.", "",
        "```python", "from pathflip.models import MRPLIP",
        'model = MRPLIP.from_pretrained("<this folder>")', "```", "",
        "## Data", "",
        f"* {counts['train_trees']:,} training trees of {counts['train_slides']:,} slides and "
        f"{counts['train_patients']:,} patients ({counts['train_captions']:,} captions), "
        f"{counts['val_trees']:,} validation trees of {counts['val_patients']:,} patients; no "
        "patient is in both.",
        f"* Left out: {left_out['test']:,} trees of test slides, {left_out['without_caption']:,} "
        "without a caption.",
        f"* Patch features: `{encoder['name']}` revision {encoder['revision']}, {encoder['dim']} "
        f"wide, of trees of {spec.parent_um:g} µm in nodes of {spec.node_px} px at "
        f"{', '.join(f'{mpp:g}' for mpp in spec.level_mpp)} µm per pixel. The model is of no use "
        "with other features.", "",
        "## Results", "",
    ]  # fmt: skip
    if val:
        lines += [
            f"Validation retrieval, {val['n']} pairs of {val['trees']} trees, galleries of "
            f"{val['gallery']}, step {result['best_step']:,} of {result['steps']:,}:", "",
            "| | patch to caption R@1 | caption to patch R@1 | chance |", "|---|---|---|---|",
            *(
                f"| {level} | {own['itr']['r@1']:.3f} | {own['tir']['r@1']:.3f} | "
                f"{own['chance']['r@1']:.3f} |"
                for level, own in ({"all levels": val} | val["levels"]).items()
            ), "",
        ]  # fmt: skip
        if config.best != "last":
            lines += ["These trees chose the weights: measure on others before quoting a figure."]
        else:
            lines += ["These are the last weights, which no figure chose."]
        if skipped := val.get("cvta_skipped"):  # None without that loss
            lines += [
                "",
                f"Left out of cvta for want of keywords: {skipped:.0%} of validation trees.",
            ]
        if val["collapsed"]:
            lines += ["", f"**Signs of collapse**: {', '.join(val['collapsed'])}."]
    else:
        lines += ["No tree was held out to validate; the last weights were exported."]
    lines += [
        "", *_training(config, result),
        "* Captions of a model say what it guesses as well as what it sees; both are learned.",
        "* Features, weights and captions carry the licences of the encoder and the data.",
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def _data(corpus: Corpus, without: str) -> list[str]:
    counts, about = corpus.counts(), corpus.about
    tiling, encoder, left_out = about["tiling"], about["encoder"], about["left_out"]
    return [
        "## Data", "",
        f"* {counts['train_slides']:,} training slides of {counts['train_patients']:,} patients "
        f"({counts['train_regions']:,} regions), {counts['val_slides']:,} validation slides of "
        f"{counts['val_patients']:,} patients; no patient is in both.",
        f"* Left out: {left_out['test']:,} test slides, {left_out['without_caption']:,} slides "
        f"{without}.",
        f"* Patch features: `{encoder['name']}` revision {encoder['revision']}, {encoder['dim']} "
        f"wide. Regions of {tiling['region_um']:g} µm, patches of {tiling['patch_um']:g} µm at "
        f"{tiling['mpp']:g} µm per pixel. The model is of no use with other features or another "
        "tiling.", "",
    ]  # fmt: skip


def _training(config: LoopConfig, result: dict[str, Any]) -> list[str]:
    return [
        f"Training loss at the end {_number(result['loss'])}, {result['skipped']} steps skipped, "
        f"{result['seconds']:,.0f} s.", "",
        "## Settings", "", "```yaml", save_settings(config).rstrip(), "```", "",
        "## Limits", "",
        "* For research. Not a medical device; not validated for diagnosis.",
        "* It knows the scanners, stains, organs and wording of its training slides; expect less "
        "elsewhere.",
    ]  # fmt: skip


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def about_model(
    config: AnyConfig, corpus: Corpus, result: dict[str, Any], *, run: str, fingerprint: str
) -> dict[str, Any]:
    """Return pathflip.json of an exported model.

    Args:
        config: The settings.
        corpus: The slides.
        result: The run's result.json.
        run: Name of the slide model, see ``pathflip.checkpoints.model_name``.
        fingerprint: Fingerprint of the slide model.
    """
    return _about(config, corpus, result, run=run, fingerprint=fingerprint) | {
        "tiling": corpus.about["tiling"]
    }


def about_patch_model(
    config: MRPretrainConfig,
    corpus: TreeCorpus,
    result: dict[str, Any],
    *,
    run: str,
    fingerprint: str,
) -> dict[str, Any]:
    """Return pathflip.json of an exported patch model; see :func:`about_model`."""
    return _about(config, corpus, result, run=run, fingerprint=fingerprint) | {
        "trees": corpus.about["trees"]
    }


def _about(
    config: AnyConfig | MRPretrainConfig,
    corpus: Corpus | TreeCorpus,
    result: dict[str, Any],
    *,
    run: str,
    fingerprint: str,
) -> dict[str, Any]:
    return {
        "run": run,
        "kind": config.kind,
        "family": config.family,
        "preset": config.preset,
        "step": result["best_step"],
        "fingerprint": fingerprint,
        "encoder": corpus.about["encoder"],
        "archive": {"uri": corpus.about["archive"], corpus.unit: len(corpus),
                    "sha256": corpus.digest()},
        "split": {**corpus.counts(), "seed": config.seed, "val_fraction": config.val_fraction},
        "val": result["val"],
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
