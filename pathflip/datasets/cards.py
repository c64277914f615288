"""Cards of public data sets: where each is, on which terms, its files, and what it measures here.

A card is a YAML file in ``pathflip/datasets/cards``::

    title: SlideInstruction and SlideBench
    about: One sentence.
    papers: [arXiv:2410.11761]
    get:
    - {what: texts, where: https://…, access: open}
    licence: unknown                      # or the words of its owners
    files:
    - path: SlideBench-VQA-TCGA.csv       # below the folder; * and ** as in a shell
      holds: questions with four options
      columns: [Slide, Question, A, B, C, D, Answer]
      stated_rows: 1494
      source: as a user counts them
    steps:
    - {what: questions into the archive, run: pathflip archive import …}
    measures:
    - {what: accuracy by topic, run: pathflip evaluate vqa …}
    unknown: [the licence of the texts]

Facts that nobody could verify are not in a card, or under ``unknown``. ``DIR`` in a command is the
folder of the copy.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pathflip.errors import ConfigError

FOLDER = Path(__file__).with_name("cards")
ACCESS = ("open", "request", "gated", "unknown")
"""Anyone may download; on request; after an agreement on the hub; not known."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A place that a part of the set is downloaded from.

    Attributes:
        what: Part of the set.
        where: Address.
        access: One of :data:`ACCESS`.
    """

    what: str
    where: str
    access: str = "unknown"


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command with its purpose.

    Attributes:
        what: Purpose.
        run: The command.
    """

    what: str
    run: str


@dataclass(frozen=True, kw_only=True)
class FileCard:
    """Files of a set that follow one pattern, with the facts that a copy is compared with.

    Attributes:
        path: Pattern below the folder of the set.
        holds: Content, in words.
        optional: Whether a copy is whole without it.
        files: Number of files that match; None where it is not known.
        rows: Number of rows of each, or of entries.
        stated_rows: Number of rows that a paper or page states and nobody counted: a copy that
            differs is told of it, and whole all the same.
        columns: Columns, or keys of entries, that are needed; whatever their case, and what stands
            in brackets behind them.
        distinct: {column: number of different values}.
        values: {column: all values it may have}.
        refers: {column: pattern with ``{}``}: files that must be there, one for each value; after
            ``|`` another pattern that will do.
        beside: File that must be there for each of these, as a path from the folder it lies in.
        sha256: {path of a file: its digest, in hexadecimal}.
        source: Origin of the facts.
    """

    path: str
    holds: str
    optional: bool = False
    files: int | None = None
    rows: int | None = None
    stated_rows: int | None = None
    columns: tuple[str, ...] = ()
    distinct: Mapping[str, int] = dataclasses.field(default_factory=dict)
    values: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    refers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    beside: str = ""
    sha256: Mapping[str, str] = dataclasses.field(default_factory=dict)
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Card:
    """A public data set.

    Attributes:
        name: Name in commands: that of the card's file.
        title: Name among people.
        about: Content, in a sentence.
        papers: Papers that describe it.
        get: Places of its parts.
        licence: Terms in the words of its owners; ``unknown`` where none are stated.
        files: Its files.
        prepare: Whether ``pathflip datasets prepare`` makes files for the importers of it.
        steps: Commands that bring it into an archive, in order.
        measures: Evaluations that it makes possible.
        unknown: Facts that could not be verified.
    """

    name: str
    title: str
    about: str
    papers: tuple[str, ...] = ()
    get: tuple[Place, ...]
    licence: str
    files: tuple[FileCard, ...]
    prepare: bool = False
    steps: tuple[Command, ...] = ()
    measures: tuple[Command, ...]
    unknown: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the card as ``--json`` prints it, without what is not known."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value}


def names() -> list[str]:
    """Return the names of all cards, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def cards() -> list[Card]:
    """Return all cards by name."""
    return [read_card(name) for name in names()]


def read_card(name: str) -> Card:
    """Return the card of a data set.

    Raises:
        ConfigError: There is none of that name (``no_dataset``).
    """
    known = names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise ConfigError(
            f"There is no card of a data set {name!r}.",
            hint=f"Did you mean {near[0]}?" if near else f"Known: {', '.join(known)}.",
            code="no_dataset",
        )
    content = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    parts: dict[str, Any] = {
        "get": tuple(_made(Place, one, name) for one in content.pop("get")),
        "files": tuple(_made(FileCard, one, name) for one in content.pop("files")),
        "steps": tuple(_made(Command, one, name) for one in content.pop("steps", ())),
        "measures": tuple(_made(Command, one, name) for one in content.pop("measures")),
    }
    card: Card = _made(Card, {"name": name, **content, **parts}, name)
    return card


def _made(kind: type[Any], given: Mapping[str, Any], card: str) -> Any:
    """Make a part of a card; a key that the class does not have is a fault of the card.

    Raises:
        ValueError: A key is unknown, a needed one is missing, or an access is none there is.
    """
    known = {field.name for field in dataclasses.fields(kind)}
    unknown = sorted(set(given) - known)
    if unknown:
        raise ValueError(f"the card {card} has {', '.join(unknown)} in a {kind.__name__}")
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in given.items()}
    try:
        made = kind(**values)
    except TypeError as error:
        raise ValueError(f"the card {card}: {error}") from error
    if isinstance(made, Place) and made.access not in ACCESS:
        raise ValueError(f"the card {card} has access {made.access!r}")
    return made
