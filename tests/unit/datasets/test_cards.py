"""Cards of public data sets: complete, honest about what is not known, their commands real."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
import typer

from pathflip.cli import app
from pathflip.datasets import cards
from pathflip.datasets.cards import Card, read_card
from pathflip.errors import ConfigError

NAMES = {
    "bcnb", "cptac", "histai-instruct", "multipathqa", "patho-bench", "pathtext", "quilt-1m",
    "refpath", "slidechat", "wsi-bench",
}  # fmt: skip
CARDS = cards.cards()
COMMAND: Any = typer.main.get_command(app)


def test_all_sets_have_a_card() -> None:
    assert set(cards.names()) == NAMES


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_a_card_says_where_on_which_terms_and_what_for(card: Card) -> None:
    assert card.about.endswith(".")
    assert card.get
    assert card.licence
    assert card.files
    assert card.measures
    assert all(place.where.startswith("https://") for place in card.get)
    if "unknown" in (card.licence, *(place.access for place in card.get)):
        assert card.unknown, "what is unknown is told"
    for one in card.files:  # a checked fact has an origin
        facts = (one.files, one.rows, one.stated_rows, *one.columns, *one.sha256)
        assert one.source or not any(facts), one.path


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_its_commands_are_commands(card: Card) -> None:
    for one in (*card.steps, *card.measures):
        assert accepted(shlex.split(one.run)), one.run
    made = [one for one in card.steps if "datasets prepare" in one.run]
    assert len(made) == card.prepare


def accepted(words: list[str]) -> bool:
    """Parse words as the command line does; it raises where they are no command."""
    command = COMMAND
    assert words.pop(0) == "pathflip"
    names = []
    while hasattr(command, "commands"):
        names.append(words.pop(0))
        command = command.commands[names[-1]]
    command.make_context(" ".join(names), list(words))
    return True


def test_a_misspelt_name_is_told_the_near_one() -> None:
    with pytest.raises(ConfigError, match=r"data set 'slidecat'.*Did you mean slidechat"):
        read_card("slidecat")


def test_a_card_with_a_key_of_no_meaning_is_refused(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "odd.yaml").write_text(
        "title: t\nabout: a\nlicence: l\nget: []\nmeasures: []\n"
        "files: [{path: a.csv, holds: h, row: 3}]\n"
    )
    monkeypatch.setattr(cards, "FOLDER", tmp_path)
    with pytest.raises(ValueError, match="has row in a FileCard"):
        read_card("odd")
