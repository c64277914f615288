"""Types shared by all patch encoders: the protocol, its description, and a parsed spec."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from pathflip.encoders import zoo


@runtime_checkable
class Encoder(Protocol):
    """Encoder of RGB patches into feature vectors.

    Attributes:
        name: Name, in ``[a-z0-9_]``; the feature table is ``features_<name>``.
        revision: Identity of the weights: features of two revisions are not comparable.
        dim: Length of a feature.
        input_px: Side of its square input, px; patches of another size are resampled inside.
        mpp: µm per pixel it expects; None if it takes any.
        licence: Licence of the weights.
    """

    name: str
    revision: str
    dim: int
    input_px: int
    mpp: float | None
    licence: str

    def __call__(self, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Encode RGB patches [n, px, px, 3] -> [n, dim].

        Raises:
            EncoderError: ``out_of_memory`` when not even one patch fits.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class EncoderInfo:
    """Description of an encoder that is not loaded yet; attributes as of :class:`Encoder`.

    Attributes:
        patch_um: Field of view it expects, µm; None if it takes any.
        gated: Whether the hub asks to accept terms first.
    """

    name: str
    revision: str
    dim: int
    input_px: int
    mpp: float | None
    patch_um: float | None
    licence: str
    gated: bool


def table_name(text: str) -> str:
    """Return a name reduced to ``[a-z0-9_]``, for tables."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A parsed encoder spec: a card of the table or a scheme, and the place of the weights.

    Attributes:
        text: The spec as given.
        card: Row of the table, for a table name.
        scheme: ``timm``, ``hf`` or ``torchscript`` otherwise.
        path: Local folder or file, if one was named.
        hub: Hub repository otherwise.
        revision: Revision of the hub repository, if one was named.
    """

    text: str
    card: zoo.Card | None = None
    scheme: str = ""
    path: Path | None = None
    hub: str = ""
    revision: str | None = None
