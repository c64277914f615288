"""The model card of a run: what it is, what it saw, what it scores, what it is not for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jobs.corpus import Corpus
from jobs.recipe import PretrainConfig, save_settings


def model_card(name: str, config: PretrainConfig, corpus: Corpus, result: dict[str, Any]) -> str:
    """Returns the model card: what it is, what it saw, what it scores, what it is not for."""
    counts, about = corpus.counts(), corpus.about
    tiling, encoder, val = about["tiling"], about["encoder"], result["val"]
    left_out = about["left_out"]

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
        "## Data", "",
        f"* {counts['train_slides']:,} training slides of {counts['train_patients']:,} patients "
        f"({counts['train_regions']:,} regions), {counts['val_slides']:,} validation slides of "
        f"{counts['val_patients']:,} patients; no patient is in both.",
        f"* Left out: {left_out['test']:,} test slides, {left_out['without_caption']:,} slides "
        "without a caption.",
        f"* Patch features: `{encoder['name']}` revision {encoder['revision']}, {encoder['dim']} "
        f"wide. Regions of {tiling['region_um']:g} µm, patches of {tiling['patch_um']:g} µm at "
        f"{tiling['mpp']:g} µm per pixel. The model is of no use with other features or another "
        "tiling.", "",
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
    loss = "-" if result["loss"] is None else f"{result['loss']:.4f}"
    lines += [
        "",
        f"Training loss at the end {loss}, {result['skipped']} steps skipped, "
        f"{result['seconds']:,.0f} s.", "",
        "## Settings", "", "```yaml", save_settings(config).rstrip(), "```", "",
        "## Limits", "",
        "* For research. Not a medical device; not validated for diagnosis.",
        "* It knows the scanners, stains, organs and wording of its training slides; expect less "
        "elsewhere.",
        "* Contrastive text encoders hardly read negation: \"no necrosis\" is close to "
        "\"necrosis\".",
        "* Whatever the captions share with the slides besides the findings (site, stain) can be "
        "learned as well.",
        "* Features, weights and captions carry the licences of the encoder and the data.",
        "",
    ]  # fmt: skip
    return "\n".join(lines)
