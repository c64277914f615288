"""The table of known patch encoders: repository, input, output and licence of each.

Facts are those of the model cards and of the authors' own loading code. ``mpp`` and ``patch_um``
are the resolution and field of view of the patches a model was trained on or is used with.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Loader = Literal[
    "timm", "transformers", "dinov2_registers", "clip", "conch", "conch_v1_5", "keep", "musk",
    "torchscript",
]  # fmt: skip
Pooling = Literal["model", "cls", "cls+mean"]
Colour = tuple[float, float, float]

IMAGENET: tuple[Colour, Colour] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI: tuple[Colour, Colour] = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)
BIOPTIMUS: tuple[Colour, Colour] = (
    (0.707223, 0.578729, 0.703617),
    (0.211883, 0.230117, 0.177517),
)
HIBOU: tuple[Colour, Colour] = ((0.7068, 0.5755, 0.722), (0.195, 0.2316, 0.1816))
HALF: tuple[Colour, Colour] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_NO_DERIVATIVES = "CC-BY-NC-ND-4.0"
_OWKIN = "Owkin non-commercial licence"


@dataclass(frozen=True, kw_only=True)
class Card:
    """One known encoder.

    Attributes:
        name: Name in specs.
        title: Its authors' name for it.
        hub: Repository on the Hugging Face hub.
        loader: Library that builds it; ``conch``, ``conch_v1_5``, ``keep`` and ``musk`` are image
            towers built here, ``dinov2_registers`` a class of transformers that the card shapes.
        dim: Length of a feature.
        input_px: Side of the square the network sees.
        resize_px: Side patches are resampled to before the centre crop to ``input_px``; None means
            never resampled when large enough, only cropped, so that µm per pixel stay exact.
        mean, std: Colour normalisation of values in 0..1.
        mpp: µm per pixel of the patches it expects; None where training had no one resolution.
        patch_um: Field of view it expects, µm; None likewise.
        pooling: ``model``: its own output; ``cls``: class token; ``cls+mean``: class token and mean
            of the patch tokens side by side, register tokens left out.
        licence: Licence of the weights.
        gated: Whether the hub asks to accept terms first.
        interpolation: Interpolation of the resampling (always antialiased).
        architecture, arguments: For timm: model name and its keyword arguments; SwiGLUPacked and
            SiLU are given by name. For ``dinov2_registers``: the arguments of its configuration.
    """

    name: str
    title: str
    hub: str
    loader: Loader
    dim: int
    input_px: int
    resize_px: int | None
    mean: Colour
    std: Colour
    mpp: float | None
    patch_um: float | None
    pooling: Pooling
    licence: str
    gated: bool
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    architecture: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)


CARDS: tuple[Card, ...] = (
    Card(
        name="conch",
        title="CONCH",
        hub="MahmoodLab/conch",
        loader="conch",
        dim=512,
        input_px=448,
        resize_px=448,
        mean=OPENAI[0],
        std=OPENAI[1],
        mpp=0.5,
        patch_um=128,  # as PathFLIP (arXiv 2512.17621) uses it: 256 px at 20x; others use 512 px
        pooling="model",
        licence=_NO_DERIVATIVES,
        gated=True,
    ),
    Card(
        name="conch_v1_5",
        title="CONCH v1.5",
        hub="MahmoodLab/conchv1_5",
        loader="conch_v1_5",
        dim=768,
        input_px=448,
        resize_px=448,
        mean=IMAGENET[0],
        std=IMAGENET[1],
        mpp=0.5,
        patch_um=256,
        pooling="model",
        licence=_NO_DERIVATIVES,
        gated=True,
        interpolation="bilinear",
    ),
    Card(
        name="uni",
        title="UNI",
        hub="MahmoodLab/UNI",
        loader="timm",
        dim=1024,
        input_px=224,
        resize_px=224,
        mean=IMAGENET[0],
        std=IMAGENET[1],
        mpp=0.5,
        patch_um=128,
        pooling="model",
        licence=_NO_DERIVATIVES,
        gated=True,
        interpolation="bilinear",
        architecture="vit_large_patch16_224",
        arguments={"init_values": 1e-5, "dynamic_img_size": True},
    ),
    Card(
        name="uni2",
        title="UNI2-h",
        hub="MahmoodLab/UNI2-h",
        loader="timm",
        dim=1536,
        input_px=224,
        resize_px=224,
        mean=IMAGENET[0],
        std=IMAGENET[1],
        mpp=0.5,
        patch_um=128,
        pooling="model",
        licence=_NO_DERIVATIVES,
        gated=True,
        interpolation="bilinear",
        architecture="vit_giant_patch14_224",
        arguments={
            "img_size": 224,
            "patch_size": 14,
            "depth": 24,
            "num_heads": 24,
            "init_values": 1e-5,
            "embed_dim": 1536,
            "mlp_ratio": 2.66667 * 2,
            "no_embed_class": True,
            "mlp_layer": "SwiGLUPacked",
            "act_layer": "SiLU",
            "reg_tokens": 8,
            "dynamic_img_size": True,
        },
    ),
    Card(
        name="gigapath",
        title="Prov-GigaPath tile encoder",
        hub="prov-gigapath/prov-gigapath",
        loader="timm",
        dim=1536,
        input_px=224,
        resize_px=256,
        mean=IMAGENET[0],
        std=IMAGENET[1],
        mpp=0.5,
        patch_um=128,
        pooling="model",
        licence="Apache-2.0, research use only by its terms",
        gated=True,
        architecture="vit_giant_patch14_dinov2",
        arguments={
            "img_size": 224,
            "patch_size": 16,
            "embed_dim": 1536,
            "depth": 40,
            "num_heads": 24,
            "mlp_ratio": 5.33334,
            "init_values": 1e-5,
        },
    ),
    Card(
        name="virchow",
        title="Virchow",
        hub="paige-ai/Virchow",
        loader="timm",
        dim=2560,
        input_px=224,
        resize_px=224,
        mean=IMAGENET[0],
        std=IMAGENET[1],
        mpp=0.5,
        patch_um=112,
        pooling="cls+mean",
        licence="Apache-2.0",
        gated=True,
        architecture="vit_huge_patch14_224",
        arguments={
            "img_size": 224,
            "init_values": 1e-5,
            "mlp_ratio": 5.3375,
            "global_pool": "",
            "dynamic_img_size": True,
            "mlp_layer": "SwiGLUPacked",
            "act_layer": "SiLU",
        },
    ),
    Card(
        name="virchow2",
        title="Virchow2",
        hub="paige-ai/Virchow2",
        loader="timm",
        dim=2560,
        input_px=224,
        resize_px=224,
        mean=IMAGENET[0],
        std=IMAGENET[1],
        mpp=0.5,
        patch_um=112,
        pooling="cls+mean",
        licence=_NO_DERIVATIVES,
        gated=True,
        architecture="vit_huge_patch14_224",
        arguments={
            "img_size": 224,
            "init_values": 1e-5,
            "reg_tokens": 4,
            "mlp_ratio": 5.3375,
            "global_pool": "",
            "dynamic_img_size": True,
            "mlp_layer": "SwiGLUPacked",
            "act_layer": "SiLU",
        },
    ),
    Card(
        name="h_optimus_0",
        title="H-optimus-0",
        hub="bioptimus/H-optimus-0",
        loader="timm",
        dim=1536,
        input_px=224,
        resize_px=None,
        mean=BIOPTIMUS[0],
        std=BIOPTIMUS[1],
        mpp=0.5,
        patch_um=112,
        pooling="model",
        licence="Apache-2.0",
        gated=True,
        architecture="vit_giant_patch14_reg4_dinov2",
        arguments={"img_size": 224, "init_values": 1e-5, "global_pool": "token"},
    ),
    Card(
        name="h_optimus_1",
        title="H-optimus-1",
        hub="bioptimus/H-optimus-1",
        loader="timm",
        dim=1536,
        input_px=224,
        resize_px=None,
        mean=BIOPTIMUS[0],
        std=BIOPTIMUS[1],
        mpp=0.5,
        patch_um=112,
        pooling="model",
        licence=_NO_DERIVATIVES,
        gated=True,
        architecture="vit_giant_patch14_reg4_dinov2",
        arguments={"img_size": 224, "init_values": 1e-5, "global_pool": "token"},
    ),
    Card(
        name="h0_mini",
        title="H0-mini",
        hub="bioptimus/H0-mini",
        loader="timm",
        dim=1536,
        input_px=224,
        resize_px=224,
        mean=BIOPTIMUS[0],
        std=BIOPTIMUS[1],
        mpp=0.5,
        patch_um=112,
        pooling="cls+mean",
        licence=_NO_DERIVATIVES,
        gated=True,
        architecture="vit_base_patch14_reg4_dinov2",
        arguments={
            "img_size": 224,
            "init_values": 1e-5,
            "mlp_ratio": 5.33334,
            "global_pool": "",
            "dynamic_img_size": True,
            "mlp_layer": "SwiGLUPacked",
            "act_layer": "SiLU",
        },
    ),
    Card(
        name="midnight",
        title="Midnight-12k",
        hub="kaiko-ai/midnight",
        loader="transformers",
        dim=3072,
        input_px=224,
        resize_px=224,
        mean=HALF[0],
        std=HALF[1],
        mpp=0.5,
        patch_um=112,
        pooling="cls+mean",
        licence="MIT",
        gated=False,
        interpolation="bilinear",
    ),
    Card(
        name="hibou_b",
        title="Hibou-B",
        hub="histai/hibou-b",
        loader="dinov2_registers",
        dim=768,
        input_px=224,
        resize_px=224,
        mean=HIBOU[0],
        std=HIBOU[1],
        mpp=0.5,
        patch_um=112,
        pooling="cls",
        licence="Apache-2.0",
        gated=True,
        arguments={
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "num_register_tokens": 4,
            "image_size": 224,
            "patch_size": 14,
            "use_swiglu_ffn": True,
        },
    ),
    Card(
        name="hibou_l",
        title="Hibou-L",
        hub="histai/hibou-L",
        loader="dinov2_registers",
        dim=1024,
        input_px=224,
        resize_px=224,
        mean=HIBOU[0],
        std=HIBOU[1],
        mpp=0.5,
        patch_um=112,
        pooling="cls",
        licence="Apache-2.0",
        gated=True,
        arguments={
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_register_tokens": 4,
            "image_size": 224,
            "patch_size": 14,
            "use_swiglu_ffn": True,
        },
    ),
    Card(
        name="phikon",
        title="Phikon",
        hub="owkin/phikon",
        loader="transformers",
        dim=768,
        input_px=224,
        resize_px=224,
        mean=IMAGENET[0],
        std=IMAGENET[1],
        mpp=0.5,
        patch_um=112,
        pooling="cls",
        licence=_OWKIN,
        gated=False,
        interpolation="bilinear",
    ),
    Card(
        name="phikon_v2",
        title="Phikon-v2",
        hub="owkin/phikon-v2",
        loader="transformers",
        dim=1024,
        input_px=224,
        resize_px=224,
        mean=IMAGENET[0],
        std=IMAGENET[1],
        mpp=0.5,
        patch_um=112,
        pooling="cls",
        licence=_OWKIN,
        gated=False,
    ),
    Card(
        name="keep",
        title="KEEP",
        hub="Astaxanthin/KEEP",
        loader="keep",
        dim=768,
        input_px=224,
        resize_px=224,
        mean=IMAGENET[0],
        std=IMAGENET[1],
        mpp=None,
        patch_um=None,
        pooling="model",
        licence="MIT",
        gated=False,
    ),
    Card(
        name="musk",
        title="MUSK",
        hub="xiangjx/musk",
        loader="musk",
        dim=1024,
        input_px=384,
        resize_px=384,
        mean=HALF[0],
        std=HALF[1],
        mpp=0.5,
        patch_um=192,
        pooling="model",
        licence=_NO_DERIVATIVES,
        gated=True,
    ),
    Card(
        name="plip",
        title="PLIP",
        hub="vinid/plip",
        loader="clip",
        dim=512,
        input_px=224,
        resize_px=224,
        mean=OPENAI[0],
        std=OPENAI[1],
        mpp=None,
        patch_um=None,
        pooling="model",
        licence="none stated; research use by its model card",
        gated=False,
    ),
    Card(
        name="quiltnet",
        title="QuiltNet-B-32",
        hub="wisdomik/QuiltNet-B-32",
        loader="clip",
        dim=512,
        input_px=224,
        resize_px=224,
        mean=OPENAI[0],
        std=OPENAI[1],
        mpp=None,
        patch_um=None,
        pooling="model",
        licence="MIT",
        gated=False,
    ),
)
"""Every encoder known by name, besides ``texture``."""


def card(name: str) -> Card | None:
    """Return the card of that name, or None."""
    return next((known for known in CARDS if known.name == name), None)
