"""Prompts of the instruction head: templates, and token ids safe against injected tokens.

A prompt has two halves, the token ids before the slide and those after it; the slide's vectors are
put between them and never pass the embedding table. Templates are tokenised with their special
tokens, what people type without: ``<|im_end|>`` in a question is seven characters of text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pathflip.errors import ConfigError
from pathflip.text import CANNOT_TELL, LETTERS, denies, split_sentences

IMAGE = "<image>"
"""Where a slide stands in data of other projects; never a token, removed from what is asked."""
CAPTION_INSTRUCTION = "Describe the input pathology whole slide image."
TURN_END = "<|im_end|>"
ROLES = ("system", "user", "assistant")

Kind = Literal["caption", "question"]
CaptionStyle = Literal["whole", "shuffled", "affirmed"]
Messages = Sequence[Mapping[str, str]] | str

_IMAGE_MARK = "\ue000image\ue001"
_MARKS = re.compile("\ue000(image|[0-9]+)\ue001")


@dataclass(frozen=True, kw_only=True)
class Example:
    """An instruction about a slide and its answer.

    Attributes:
        instruction: Instruction or question, with its options; see :func:`multiple_choice`.
        answer: Text of the answer, without an end token.
        kind: Template of ``official_v1``.
    """

    instruction: str
    answer: str
    kind: Kind = "question"


def multiple_choice(question: str, choices: Sequence[str]) -> str:
    """Return a question with its options, a line each ("A. …"); the question alone without.

    Raises:
        ConfigError: More options than there are letters.
    """
    if len(choices) > len(LETTERS):
        raise ConfigError(
            f"A question has {len(choices)} options.", hint=f"At most {len(LETTERS)} are possible."
        )
    lines = [f"{letter}. {text}" for letter, text in zip(LETTERS, choices, strict=False)]
    return "\n".join([question, *lines])


def question_example(
    question: str, choices: Sequence[str], answer: str, *, letter: bool = True
) -> Example:
    """Return a question with its answer.

    Args:
        question: The question alone.
        choices: Its options, in the order they are shown.
        answer: The text of the right one; or ``CANNOT_TELL``, then no option need be right.
        letter: Whether an option is answered by its letter and text (``B. text``), or by its text.

    Raises:
        ConfigError: The answer is none of the options.
    """
    instruction = multiple_choice(question, choices)
    if choices and answer == CANNOT_TELL and answer not in choices:
        return Example(instruction=instruction, answer=answer)
    if choices and answer not in choices:
        raise ConfigError(
            f"The answer {answer!r} is not among the options of {question!r}.",
            hint="Give the text of one of them.",
        )
    if not choices or not letter:
        return Example(instruction=instruction, answer=answer)
    return Example(
        instruction=instruction, answer=f"{LETTERS[list(choices).index(answer)]}. {answer}"
    )


def caption_example(
    caption: str, style: CaptionStyle = "whole", rng: np.random.Generator | None = None
) -> Example:
    """Return the caption in the style of a training target.

    Args:
        caption: The text.
        style: ``whole``: unchanged. ``shuffled``: its sentences in a random order, for reports
            whose order means nothing. ``affirmed``: its affirmative sentences, each once, in
            alphabetical order: a model that writes greedily decides on one sentence after the
            other, and a small one need not remember which it wrote.
        rng: Generator of the order.
    """
    if style != "whole":
        sentences = split_sentences(caption)
        if style == "affirmed":
            sentences = sorted({text for text in sentences if not denies(text)}) or sentences
        elif rng is not None:
            sentences = [sentences[i] for i in rng.permutation(len(sentences))]
        caption = " ".join(sentences)
    return Example(instruction=CAPTION_INSTRUCTION, answer=caption, kind="caption")


class Prompter:
    """Converter of conversations into token ids.

    Args:
        tokenizer: Tokenizer of the language model.
        template: ``qwen3``: the tokenizer's chat template without thinking, the slide before the
            first thing the user says. ``official_v1``: plain text, as in the published code.

    Raises:
        ConfigError: The tokenizer lacks what the template needs.
    """

    def __init__(self, tokenizer: Any, template: Literal["qwen3", "official_v1"]) -> None:
        self.tokenizer, self.template = tokenizer, template
        self._added = {str(token): number for token, number in tokenizer.get_added_vocab().items()}
        names = sorted(self._added, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, names))) if names else None
        if template == "qwen3":
            if not getattr(tokenizer, "chat_template", None) or TURN_END not in self._added:
                raise ConfigError(
                    f"The language model's tokenizer has no chat template with {TURN_END}.",
                    hint="Take a Qwen3 that is tuned for chat, or template official_v1.",
                )
            self.end_id = self._added[TURN_END]
        elif tokenizer.eos_token_id is None:
            raise ConfigError("The language model's tokenizer has no end token.")
        else:
            self.end_id = int(tokenizer.eos_token_id)

    def text_ids(self, text: str) -> list[int]:
        """Return token ids of text a person typed; none of them is a special or added token."""
        text = unicodedata.normalize("NFC", text)  # as the tokenizer does, before it looks for them
        pieces, start, at = [], 0, 0
        while self._special is not None and (found := self._special.search(text, at)):
            at = found.start() + 1
            pieces.append(text[start:at])
            start = at
        pieces.append(text[start:])
        every = set(self._added.values())
        return [number for piece in pieces for number in self._ids(piece) if number not in every]

    def answer_ids(self, answer: str) -> list[int]:
        """Return token ids of an answer, with the end token."""
        return [*self.text_ids(answer.strip()), self.end_id]

    def prompt_ids(
        self, messages: Messages, *, kind: Kind = "question"
    ) -> tuple[list[int], list[int]]:
        """Return token ids before and after the slide.

        Args:
            messages: ``{"role", "content"}`` of each turn, the last of them the user's; a string
                is one turn of the user.
            kind: Template of official_v1.

        Raises:
            ConfigError: The conversation is not one, or official_v1 is asked for more than a turn.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        _check(messages)
        contents = [message["content"].replace(IMAGE, "").strip() for message in messages]
        if self.template == "official_v1":
            if len(messages) > 1:
                raise ConfigError(
                    "The template official_v1 supports no conversation of several turns.",
                    hint="Ask one question at a time.",
                )
            rendered = _OFFICIAL[kind]
        else:
            rendered = self._render(messages)
        halves: list[list[int]] = [[], []]
        side, seen = 0, []
        for place, part in enumerate(_MARKS.split(rendered)):
            if place % 2 == 0:
                halves[side] += self._ids(part)
            elif part == "image":
                side += 1
            else:
                seen.append(int(part))
                halves[side] += self.text_ids(contents[int(part)])
        if side != 1 or seen != list(range(len(contents))):
            raise ConfigError(
                "The tokenizer's chat template leaves out or repeats a turn.",
                hint="Use a Qwen3 chat template.",
            )
        return halves[0], halves[1]

    def _render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return the rendered chat template, with marks for the slide and the turns' contents."""
        first = next(i for i, message in enumerate(messages) if message["role"] == "user")
        marked = []
        for number, message in enumerate(messages):
            mark = f"\ue000{number}\ue001"
            content = f"{_IMAGE_MARK}\n{mark}" if number == first else mark
            marked.append({"role": message["role"], "content": content})
        return str(
            self.tokenizer.apply_chat_template(
                marked, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
        )

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


_OFFICIAL: dict[str, str] = {
    "caption": "Instruction: \ue0000\ue001\nInput pathology whole slide image: "
    f"{_IMAGE_MARK}.\nResponse: ",
    "question": f"Input pathology whole slide image: {_IMAGE_MARK}. \n"
    "Instruction: \ue0000\ue001 \nResponse:",
}


def _check(messages: Sequence[Mapping[str, str]]) -> None:
    roles = [message.get("role", "") for message in messages]
    if not roles or roles[-1] != "user" or any(role not in ROLES for role in roles):
        raise ConfigError(
            f"The roles of the conversation are {', '.join(map(str, roles)) or 'none'}.",
            hint=f"Use {', '.join(ROLES)}; the last turn must be the user's.",
        )
    if not all(isinstance(message.get("content"), str) for message in messages):
        raise ConfigError("A turn of the conversation has no text.", hint="Give it a content.")
