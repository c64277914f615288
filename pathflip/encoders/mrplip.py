"""MR-PLIP as a patch encoder: vectors of a trained patch model, in the space of its texts.

A patch goes through the base encoder the run was trained on, then through the model's projection
and level embedding, and is scaled to length 1. The level is the one whose nodes show as much tissue
as a patch: base encoders resize what they get, so that field of view is what a level looks like to
them, not µm per pixel.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from pathflip.encoders.base import Encoder, EncoderInfo, table_name
from pathflip.errors import CheckpointError, EncoderError
from pathflip.geometry import TreeSpec, level_name, nearest_level

if TYPE_CHECKING:
    from pathflip.checkpoints import TreeRun

SCHEME = "mrplip"
_REST = re.compile(r"(?P<run>[^=]+?)(@(?P<level>[\d.]+x))?(=(?P<base>.+))?")


def is_patch_model(encoder: str) -> bool:
    """Return whether a spec, or the name of an encoder in an archive, is that of a patch model."""
    return encoder.startswith((f"{SCHEME}:", f"{SCHEME}_"))


@dataclass(frozen=True, kw_only=True)
class PatchModel:
    """A run and the level its model stands for, before the base encoder is loaded.

    Attributes:
        run: The trained run.
        level: Level of the patches, 0 the coarsest.
        base: Spec of the base encoder.
        info: Description of run, level and base encoder together.
    """

    run: TreeRun
    level: int
    base: str
    info: EncoderInfo


def describe(
    spec: str,
    *,
    info_of: Callable[[str], EncoderInfo],
    patch_um: float | None = None,
    device: str = "cpu",
) -> PatchModel:
    """Load the run of a spec and choose its level; see :func:`pathflip.encoders.patch_model`.

    Args:
        spec: ``mrplip:RUN[@LEVEL][=BASE]``: folder of the run, name of a level (``20x``) where the
            patches' size is not to choose it, and spec of the base encoder where its weights are
            not where its name says.
        info_of: Describes the base encoder by its spec.
        patch_um: Side of the patches, µm.
        device: Device of the model.

    Raises:
        EncoderError: There is no such run, or one of another kind (codes of
            :func:`pathflip.checkpoints.load_run`); no level shows about as much as a patch, or the
            model was not trained on the one that is named (``encoder_scale``); the base encoder is
            not the one of the run (``other_encoder``).
    """
    from pathflip.checkpoints import load_run

    found = _REST.fullmatch(spec.removeprefix(f"{SCHEME}:"))
    if found is None:
        raise EncoderError(
            f"There is no encoder {spec!r}.",
            hint=f"Write {SCHEME}:RUN, {SCHEME}:RUN@20x or {SCHEME}:RUN=BASE.",
            code="unknown_encoder",
        )
    try:
        run = load_run(found["run"], device=device, family="mrplip")
    except CheckpointError as error:
        raise EncoderError(
            f"Encoder {spec}: {error.message}", hint=error.hint, code=error.code
        ) from error
    trees = TreeSpec(**run.trees)
    level = _level(spec, run, trees, named=found["level"], patch_um=patch_um)
    base_spec = found["base"] or str(run.encoder["name"])
    base = info_of(base_spec)
    check_base(run, base, hint=f"Name the encoder it was trained on: {SCHEME}:RUN=BASE.")
    info = EncoderInfo(
        name=table_name(f"{SCHEME}_{run.name}_{level_name(trees.level_mpp[level])}"),
        revision=f"{run.fingerprint[:12]}-{base.revision}",
        dim=run.model.config.d,
        input_px=base.input_px,
        mpp=None,
        patch_um=trees.level_mpp[level] * trees.node_px,
        licence=base.licence,
        gated=base.gated,
    )
    return PatchModel(run=run, level=level, base=base_spec, info=info)


def check_base(run: TreeRun, base: Encoder | EncoderInfo, *, hint: str) -> None:
    """Refuse an encoder that is not the one a patch model was trained on.

    Args:
        run: The run of the model.
        base: The encoder at hand, loaded or described.
        hint: Hint of the error.

    Raises:
        EncoderError: Its name, revision or dimension differs (``other_encoder``).
    """
    held = {"name": base.name, "revision": base.revision, "dim": base.dim}
    wanted = {key: run.encoder.get(key) for key in held}
    if held != wanted:
        raise EncoderError(
            f"Model {run.name} was trained on {wanted['name']} {wanted['revision']}; this is "
            f"{held['name']} {held['revision']}.",
            hint=hint,
            code="other_encoder",
        )


class MRPLIPEncoder:
    """A patch model over its base encoder; uint8 patches [n, px, px, 3] -> unit vectors [n, d].

    Args:
        model: The run and its level.
        base: The base encoder.
    """

    def __init__(self, model: PatchModel, base: Encoder) -> None:
        info = model.info
        self.name, self.revision, self.dim = info.name, info.revision, info.dim
        self.input_px, self.mpp, self.licence = info.input_px, info.mpp, info.licence
        self._model, self._base = model, base
        self._stream: Any = None

    def __call__(self, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Encode RGB patches [n, px, px, 3] -> [n, d], of length 1."""
        return self._vectors(self._base(patches))

    def begin(self, patches: NDArray[np.uint8]) -> Callable[[], NDArray[np.float32]]:
        """Begin to encode patches; return what waits for their vectors."""
        begin = getattr(self._base, "begin", None)
        if begin is None:
            vectors = self(patches)
            return lambda: vectors
        features = begin(patches)
        return lambda: self._vectors(features())

    def compile(self) -> None:
        """Compile the base encoder's network, if it is one, when it first runs."""
        if compile_base := getattr(self._base, "compile", None):
            compile_base()

    def _vectors(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Map features of the base encoder to vectors, on a stream of its own.

        Elsewhere it would wait for whatever the base encoder has begun since.
        """
        import torch

        model, cuda = self._model.run.model, cast(Any, torch.cuda)
        if model.device.type == "cuda" and self._stream is None:
            self._stream = cuda.Stream(model.device)  # one: the memory of each is kept apart
        with nullcontext() if self._stream is None else cuda.stream(self._stream):
            level = torch.full((len(features),), self._model.level)
            vectors = model.encode_patches(torch.from_numpy(features), level)
            return np.ascontiguousarray(vectors.float().cpu().numpy())


def _level(
    spec: str, run: TreeRun, trees: TreeSpec, *, named: str | None, patch_um: float | None
) -> int:
    trained: Sequence[int] = run.model.config.levels
    names = {level_name(trees.level_mpp[level]): level for level in trained}
    fields = {level: trees.level_mpp[level] * trees.node_px for level in trained}
    if named is not None:
        if named not in names:
            raise _scale(f"Encoder {spec}: the model has no level {named}.", names, fields)
        return names[named]
    if patch_um is None:
        raise _scale(f"Encoder {spec}: the level is not known.", names, fields)
    level = nearest_level(patch_um, fields)
    if level is None:
        raise _scale(f"Encoder {spec}: patches show {patch_um:g} µm.", names, fields)
    return level


def _scale(message: str, names: Mapping[str, Any], fields: Mapping[int, float]) -> EncoderError:
    shown = ", ".join(
        f"{name} ({field:g} µm)" for name, field in zip(names, fields.values(), strict=True)
    )
    return EncoderError(
        f"{message} Its levels and what a node of each shows: {shown}.",
        hint="Choose another -o tiling.patch_um, or name a level: mrplip:RUN@20x.",
        code="encoder_scale",
    )
