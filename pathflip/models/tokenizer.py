"""The tokenizer of a model's texts as the ``tokenizers`` library runs it.

A model folder's ``tokenizer.json`` holds all of it, so a model that is loaded needs no
``transformers`` to cut texts. Language models' tokenizers, which have chat templates, and other
classes are those of ``transformers``: :func:`pathflip.models.hub.read_tokenizer`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"
PLAIN = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Classes of ``transformers`` that add nothing to ``tokenizer.json``, in tokenizer_config.json."""
BERTS = ("BertTokenizer", "BertTokenizerFast")
"""Classes whose ``tokenizer.json`` holds all that cuts texts, where there is one."""


class TextTokenizer:
    """Tokenizer of a folder, with the part of the interface of ``transformers`` that models use.

    Args:
        folder: Folder with ``tokenizer.json`` and ``tokenizer_config.json``.

    Raises:
        Exception: A file is damaged (the library raises the bare class).
    """

    def __init__(self, folder: str | Path) -> None:
        from tokenizers import Tokenizer

        folder = Path(folder)
        self.backend_tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
        self.backend_tokenizer.no_truncation()
        self.backend_tokenizer.no_padding()
        self._settings: dict[str, Any] = json.loads((folder / SETTINGS).read_text())

    def __len__(self) -> int:
        return int(self.backend_tokenizer.get_vocab_size())

    def __call__(
        self, texts: Sequence[str], *, truncation: bool = False, max_length: int | None = None
    ) -> dict[str, list[list[int]]]:
        """Cut texts, and return ``{"input_ids": their token ids}``, framed in special tokens.

        Args:
            texts: Texts.
            truncation: Whether to cut to ``max_length``.
            max_length: Maximum number of tokens, the special ones included.
        """
        if isinstance(texts, str):
            raise TypeError("texts are a list of strings")
        backend = self.backend_tokenizer
        if truncation and max_length is not None:
            backend.enable_truncation(max_length)
        else:
            backend.no_truncation()
        return {"input_ids": [found.ids for found in backend.encode_batch(list(texts))]}

    def get_vocab(self) -> dict[str, int]:
        """Return {token: id}, added tokens included."""
        return dict(self.backend_tokenizer.get_vocab())

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of the special tokens that the settings name."""
        named = [value for key, value in self._settings.items() if key.endswith("_token")]
        for key in ("additional_special_tokens", "extra_special_tokens"):
            named += self._settings.get(key) or []
        ids = (self.backend_tokenizer.token_to_id(_content(token)) for token in named if token)
        return sorted({number for number in ids if number is not None})

    @property
    def mask_token_id(self) -> int | None:
        """Id of the mask token, None where there is none."""
        token = self._settings.get("mask_token")
        found: int | None = token and self.backend_tokenizer.token_to_id(_content(token))
        return found

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json``."""
        folder = Path(folder)
        self.backend_tokenizer.save(str(folder / TOKENIZER))
        (folder / SETTINGS).write_text(json.dumps(self._settings, indent=2, sort_keys=True) + "\n")


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)
