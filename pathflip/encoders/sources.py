"""Resolution of an encoder spec: weights, architecture, preprocessing. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pathflip.encoders import zoo
from pathflip.encoders.base import EncoderInfo, Spec, table_name
from pathflip.encoders.weights import Weights, hub_weights, local_weights
from pathflip.errors import EncoderError

UNKNOWN_LICENCE = "unknown: see the model's page"
PREPARATION = "u8"
"""End of every revision: patches are resized in whole levels. Revisions without it are of patches
that were resized in floats, which differ by a third of a level in the mean."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """An encoder described: its card, its info, and its files (None while still on the hub)."""

    card: zoo.Card
    info: EncoderInfo
    path: Path | None


def describe(spec: Spec, *, download: bool) -> Source:
    """Find the weights of a spec and describe the model.

    Args:
        spec: Parsed spec.
        download: Fetch weights that are only on the hub.

    Raises:
        EncoderError: See ``pathflip.encoders.load_encoder``.
    """
    if spec.scheme == "torchscript":
        return _torchscript(spec)
    name = spec.card.name if spec.card else spec.text
    if spec.path is not None:
        weights = local_weights(spec.path, name=name)
    else:
        weights = hub_weights(spec.hub, name=name, revision=spec.revision, download=download)
    card = spec.card or _read_card(spec, weights)
    return Source(card=card, info=_info(card, weights.revision), path=weights.folder)


def _info(card: zoo.Card, revision: str) -> EncoderInfo:
    return EncoderInfo(
        name=card.name,
        revision=f"{revision}-{PREPARATION}",
        dim=card.dim,
        input_px=card.input_px,
        mpp=card.mpp,
        patch_um=card.patch_um,
        licence=card.licence,
        gated=card.gated,
    )


def _read_card(spec: Spec, weights: Weights) -> zoo.Card:
    """Read the card of a model outside the table, from the configuration beside its weights."""
    config = _json(spec, weights, "config.json")
    if not config:
        raise EncoderError(
            f"Encoder {spec.text}: there is no config.json beside the weights.",
            hint="Give a folder saved by timm or transformers.",
            code="bad_weights",
        )
    identity = spec.path.resolve().name if spec.path else spec.hub.rpartition("/")[2]
    name = table_name(identity)
    try:
        if spec.scheme == "timm":
            return _timm_card(name, spec, config)
        processor = _json(spec, weights, "preprocessor_config.json")
        return _transformers_card(name, spec, config, processor)
    except (KeyError, TypeError, ValueError) as error:
        raise EncoderError(
            f"Encoder {spec.text}: its configuration cannot be used ({error!r}).",
            hint="Give a vision model saved by timm (timm:) or transformers (hf:).",
            code="bad_weights",
        ) from error


def _timm_card(name: str, spec: Spec, config: dict[str, Any]) -> zoo.Card:
    view = config.get("pretrained_cfg", config)
    input_px = int(view.get("input_size", (3, 224, 224))[1])
    arguments = {**config.get("model_args", {}), "num_classes": 0}
    return zoo.Card(
        name=name,
        title=spec.text,
        hub=spec.hub,
        loader="timm",
        dim=int(config["num_features"]),
        input_px=input_px,
        resize_px=int(input_px / view.get("crop_pct", 1.0)),
        mean=_colour(view.get("mean", zoo.IMAGENET[0])),
        std=_colour(view.get("std", zoo.IMAGENET[1])),
        mpp=None,
        patch_um=None,
        pooling="model",
        licence=str(view.get("license", UNKNOWN_LICENCE)),
        gated=False,
        interpolation="bilinear" if view.get("interpolation") == "bilinear" else "bicubic",
        architecture=str(config["architecture"]),
        arguments=arguments,
    )


def _transformers_card(
    name: str, spec: Spec, config: dict[str, Any], processor: dict[str, Any]
) -> zoo.Card:
    kind = config["model_type"]
    vision = config.get("vision_config", config)
    clip = kind in ("clip", "clip_vision_model")
    size = processor.get("size") or {}
    if isinstance(size, int):
        size = {"shortest_edge": size}
    resize_px = size.get("shortest_edge") or size.get("height") or vision.get("image_size", 224)
    crop = processor.get("crop_size") if processor.get("do_center_crop", True) else None
    crop_px = crop.get("height") if isinstance(crop, dict) else crop
    default = zoo.OPENAI if clip else zoo.IMAGENET
    return zoo.Card(
        name=name,
        title=spec.text,
        hub=spec.hub,
        loader="clip" if clip else "transformers",
        dim=int(config.get("projection_dim", 512) if clip else vision["hidden_size"]),
        input_px=int(crop_px or resize_px),
        resize_px=int(resize_px),
        mean=_colour(processor.get("image_mean") or default[0]),
        std=_colour(processor.get("image_std") or default[1]),
        mpp=None,
        patch_um=None,
        pooling="model" if clip else "cls",
        licence=UNKNOWN_LICENCE,
        gated=False,
        # PIL's code for bilinear
        interpolation="bilinear" if processor.get("resample") == 2 else "bicubic",
    )


def _torchscript(spec: Spec) -> Source:
    import hashlib

    file = spec.path
    if file is None or not file.is_file():
        raise EncoderError(
            f"There is no TorchScript file {file}.",
            hint="Write torchscript:/path/to/model.pt.",
            code="missing_weights",
        )
    from pathflip.encoders.torchscript import torchscript_dim

    with file.open("rb") as stream:
        revision = hashlib.file_digest(stream, "sha256").hexdigest()[:16]
    input_px = 224
    card = zoo.Card(
        name=table_name(file.stem),
        title=spec.text,
        hub="",
        loader="torchscript",
        dim=torchscript_dim(file, input_px=input_px),
        input_px=input_px,
        resize_px=input_px,
        mean=zoo.IMAGENET[0],
        std=zoo.IMAGENET[1],
        mpp=None,
        patch_um=None,
        pooling="model",
        licence=UNKNOWN_LICENCE,
        gated=False,
    )
    return Source(card=card, info=_info(card, revision), path=file)


def _json(spec: Spec, weights: Weights, file: str) -> dict[str, Any]:
    if weights.folder is not None:
        path = weights.folder / file
    else:
        import huggingface_hub
        from huggingface_hub import errors

        try:
            path = Path(huggingface_hub.hf_hub_download(spec.hub, file, revision=weights.revision))
        except errors.EntryNotFoundError:
            return {}
    if not path.exists():
        return {}
    content = json.loads(path.read_text())
    return content if isinstance(content, dict) else {}


def _colour(values: Any) -> zoo.Colour:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
