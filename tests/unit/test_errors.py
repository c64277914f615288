"""Errors on their way between processes: what arrives is what was sent, and nothing else."""

from __future__ import annotations

import json

import pytest

from pathflip import errors
from pathflip.errors import PathFLIPError, from_dict

KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, PathFLIPError)
]


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_arrives_as_it_was_sent(kind: type[PathFLIPError]) -> None:
    sent = kind("Slide ä is damaged.", hint="Ingest it again.", code="damaged")
    found = from_dict(json.loads(json.dumps(sent.to_dict())))
    assert type(found) is kind
    assert (found.message, found.hint, found.code) == (sent.message, sent.hint, sent.code)
    plain = from_dict(kind("No hint.").to_dict())
    assert (plain.hint, plain.code) == ("", kind.default_code)


def test_every_kind_is_among_them() -> None:
    assert len(KINDS) == 7


def test_an_error_of_another_module_arrives_as_the_nearest_kind() -> None:
    class DeepError(errors.ArchiveError):
        default_code = "deep"

    found = from_dict(DeepError("It is deep.").to_dict())
    assert type(found) is errors.ArchiveError
    assert found.code == "deep"


@pytest.mark.parametrize("kind", ["SystemExit", "os.system", "REASONS", "__import__", "", None, 3])
def test_an_unknown_kind_becomes_a_plain_error(kind: object) -> None:
    found = from_dict({"kind": kind, "message": "m", "hint": "h", "code": "c"})
    assert type(found) is PathFLIPError
    assert (found.message, found.hint, found.code) == ("m", "h", "c")


def test_what_is_missing_counts_as_empty() -> None:
    assert str(from_dict({})) == ""
    assert from_dict({"kind": "ConfigError"}).code == "config"


def test_what_people_see_has_no_kind() -> None:
    shown = errors.ConfigError("m", hint="h", code="c").as_json()
    assert shown == {"code": "c", "message": "m", "hint": "h"}


def test_a_note_of_the_first_version_is_still_read() -> None:
    note = '{"kind": "TrainingError", "message": "m", "hint": "h", "code": "not_finite"}'
    found = from_dict(json.loads(note))
    assert type(found) is errors.TrainingError
    assert found.code == "not_finite"
