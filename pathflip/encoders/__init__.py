"""Patch encoders behind one protocol: uint8 patches in, one float32 vector each out.

An encoder is named by a spec:

* a name of the table: ``texture`` (the default, nothing to download), ``uni2``, ``conch``, … with
  weights from the hub, or from a folder: ``uni2=/path/to/folder``;
* ``timm:ID`` or ``hf:ID`` with a hub id (``@revision`` may follow) or a local folder: any timm
  model, any vision model of transformers;
* ``torchscript:FILE.pt``: only files you trust;
* ``mrplip:RUN``: vectors of a run of ``pathflip pretrain --preset mrplip/…``, at the level that the
  patches' size chooses or ``mrplip:RUN@20x`` names. ``mrplip:RUN=BASE`` says by which spec the
  encoder under it is loaded, where that is not its name.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from pathflip.encoders import mrplip, zoo
from pathflip.encoders.base import Encoder, EncoderInfo, Spec, table_name
from pathflip.errors import EncoderError

__all__ = ["Encoder", "EncoderInfo", "encoder_info", "load_encoder", "patch_model", "table_name"]

_SCHEMES = ("timm", "hf", "torchscript")
_OF_SLIDES = ("titan", "prism", "chief", "madeleine")


def load_encoder(spec: str, *, device: str = "auto", patch_um: float | None = None) -> Encoder:
    """Load an encoder.

    Args:
        spec: See the module's docstring.
        device: ``auto`` (a GPU if there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        patch_um: Side of the patches, µm, from which a patch model takes its level.

    Raises:
        EncoderError: ``unknown_encoder``, ``missing_weights``, ``gated_weights``,
            ``pickle_weights``, ``bad_weights``, ``missing_package``, ``remote_code``, ``no_gpu``;
            for a patch model those of :func:`pathflip.encoders.mrplip.describe`.
    """
    if spec == "texture":
        from pathflip.encoders.texture import TextureEncoder

        return TextureEncoder()
    if spec.startswith(f"{mrplip.SCHEME}:"):
        from pathflip.encoders.neural import pick_device

        model = patch_model(spec, patch_um=patch_um, device=str(pick_device(device)))
        return mrplip.MRPLIPEncoder(model, load_encoder(model.base, device=device))
    from pathflip.encoders import neural

    return neural.load(_parse(spec), device=device)


def encoder_info(spec: str, *, patch_um: float | None = None) -> EncoderInfo:
    """Describe an encoder without building it: no weights are downloaded.

    A TorchScript file says nothing about itself, so it is run once; the run of a patch model is
    loaded.

    Args:
        spec: See the module's docstring.
        patch_um: Side of the patches it will see, µm; see ``load_encoder``.

    Raises:
        EncoderError: As ``load_encoder``; so what cannot be loaded fails here, before anything is
            written.
    """
    if spec == "texture":
        from pathflip.encoders.texture import TextureEncoder as T

        return EncoderInfo(
            name=T.name,
            revision=T.revision,
            dim=T.dim,
            input_px=T.input_px,
            mpp=T.mpp,
            patch_um=None,
            licence=T.licence,
            gated=False,
        )
    if spec.startswith(f"{mrplip.SCHEME}:"):
        return patch_model(spec, patch_um=patch_um).info
    from pathflip.encoders import sources

    return sources.describe(_parse(spec), download=False).info


def patch_model(
    spec: str, *, patch_um: float | None = None, device: str = "cpu"
) -> mrplip.PatchModel:
    """Load the run of a patch model and choose its level; its base encoder is only described.

    Args:
        spec: ``mrplip:RUN``, see the module's docstring.
        patch_um: Side of the patches, µm.
        device: Device of the model.

    Raises:
        EncoderError: See :func:`pathflip.encoders.mrplip.describe`.
    """
    return mrplip.describe(spec, info_of=encoder_info, patch_um=patch_um, device=device)


def _parse(spec: str) -> Spec:
    scheme, colon, rest = spec.partition(":")
    if colon and scheme in _SCHEMES and rest:
        path = Path(rest).expanduser()
        if scheme == "torchscript" or path.exists() or rest.startswith(("/", ".", "~")):
            return Spec(text=spec, scheme=scheme, path=path)
        hub, _, revision = rest.partition("@")
        if scheme == "timm" and "/" not in hub:
            hub = f"timm/{hub}"
        return Spec(text=spec, scheme=scheme, hub=hub, revision=revision or None)
    name, equals, folder = spec.partition("=")
    name, _, revision = name.partition("@")
    known = zoo.card(name)
    if known is None:
        names = ["texture", *(card.name for card in zoo.CARDS)]
        if mrplip.is_patch_model(name):
            raise EncoderError(
                f"There is no encoder {spec!r} without the run of its patch model.",
                hint="Write mrplip:RUN, as for ingest.",
                code="unknown_encoder",
            )
        if table_name(name) in _OF_SLIDES:
            raise EncoderError(
                f"{name} is an encoder of slides, not of patches.",
                hint="Vectors that it made elsewhere come in by: pathflip archive import "
                "--slide-features PATH.",
                code="unknown_encoder",
            )
        near = difflib.get_close_matches(table_name(name), names, n=3, cutoff=0.5)
        raise EncoderError(
            f"There is no encoder {spec!r}.",
            hint=f"Did you mean {' or '.join(near)}?"
            if near
            else f"Known: {', '.join(names)}; or timm:ID, hf:ID, torchscript:FILE, mrplip:RUN.",
            code="unknown_encoder",
        )
    where = Path(folder).expanduser() if equals else None
    return Spec(text=spec, card=known, path=where, hub=known.hub, revision=revision or None)
