"""Reads conversations about a slide, as instruction data holds them: turns with a role and a text.

``{"from": "human", "value": …}`` and ``{"role": "user", "content": …}`` are the two spellings.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pathflip.interop.tables import bad_line, clean

_IMAGE_TAG = re.compile(r"\s*<image>\s*")
_ROLES = {
    "human": "asks", "user": "asks", "gpt": "answers", "assistant": "answers", "model": "answers",
    "system": "instructs",
}  # fmt: skip


def without_image_tag(text: str) -> str:
    """Return a text without the ``<image>`` that marks where the slide stands in a prompt."""
    return clean(_IMAGE_TAG.sub(" ", text))


def question_answer_pairs(file: Path, line: int, turns: Any) -> list[tuple[str | None, str]]:
    """Return the questions and answers of a conversation, in order.

    Roles decide, not positions: what the system says is passed over, and an answer that comes
    before any question has none (None). Turns without roles are question and answer in turn. A
    question at the end that nobody answers is left out.

    Raises:
        ConfigError: If the turns are malformed, a role is unknown, or two questions or two answers
            follow each other.
    """
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise bad_line(file, line, "no question and answer among the conversations")
    pairs: list[tuple[str | None, str]] = []
    question: str | None = None
    last = ""
    for position, turn in enumerate(turns):
        text = turn.get("value", turn.get("content"))
        if not isinstance(text, str):
            raise bad_line(file, line, f"turn {position + 1} of the conversation has no text")
        name = turn.get("from", turn.get("role"))
        kind = "asks" if position % 2 == 0 else "answers"
        if name is not None:
            kind = _ROLES.get(str(name).lower(), "")
        if not kind:
            raise bad_line(file, line, f"turn {position + 1} is of the unknown role {name!r}")
        if kind == "instructs":
            continue
        if kind == last:
            raise bad_line(file, line, f"turn {position + 1} {kind}, as the one before it does")
        last = kind
        if kind == "asks":
            question = without_image_tag(text)
        else:
            pairs.append((question, without_image_tag(text)))
            question = None
    if not pairs:
        raise bad_line(file, line, "no question and answer among the conversations")
    return pairs
