"""The recipes of docs/recipes, run as they stand: bash says their commands, this process runs them.

A process of its own for each of some thirty commands would spend its time on imports.
"""

from __future__ import annotations

import io
import os
import subprocess
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from pathflip.cli import main
from tests.in_threads import in_threads

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "recipes"
# In place of the command: its words, each ended by a zero byte, with the file that its output goes
# to before them and an empty word behind.
SAYS = r"""
pathflip() {
  local to; to=$(readlink "/proc/$$/fd/1")
  { printf '%s\0' "$to" "$@"; printf '\0'; } >&3
}
"""


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command of a recipe.

    Attributes:
        words: Words after ``pathflip``.
        out: File that its output goes to; None where that is the terminal.
    """

    words: list[str]
    out: Path | None


def commands(recipe: str, folder: Path, **variables: str) -> list[Command]:
    """Return the commands that bash makes of a recipe with these variables, in order."""
    folder.mkdir(parents=True, exist_ok=True)
    said, stub = folder / ".said", folder / ".stub.sh"
    stub.write_text(SAYS)
    with open(said, "wb") as told:
        subprocess.run(
            ["bash", "-c", f'exec 3>&{told.fileno()}; source "$0"; source "$1"', stub,
             FOLDER / recipe],
            check=True, cwd=folder, pass_fds=(told.fileno(),), stdout=subprocess.DEVNULL,
            env={"PATH": os.environ["PATH"], **variables},
        )  # fmt: skip
    found: list[Command] = []
    for part in said.read_bytes().decode().split("\0\0")[:-1]:
        to, *words = part.split("\0")
        out = Path(to) if to.endswith(".json") else None
        found.append(Command(words=words, out=out))
    return found


def run(recipe: str, folder: Path, variables: Mapping[str, str]) -> list[Command]:
    """Run the commands of a recipe in this process; each has to end well.

    Raises:
        AssertionError: One did not.
    """
    found = commands(recipe, folder, **variables)
    for command in found:
        said = run_words(command.words, folder)
        if command.out is not None:
            command.out.write_text(said)
    return found


def run_words(words: list[str], folder: Path) -> str:
    """Run a command in a folder, and return what it says; it has to end well.

    Raises:
        AssertionError: It did not.
    """
    before = Path.cwd()
    os.chdir(folder)
    try:
        return _run(words)
    finally:
        os.chdir(before)


def _run(words: list[str]) -> str:
    said = io.StringIO()
    code: object = None
    try:
        with (
            in_threads(),
            mock.patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": ""}),  # as a worker's process has
            redirect_stdout(said),
        ):
            main(words)
    except SystemExit as end:
        code = end.code
    unmatched = 3 if "--tree-captions" in words else 0  # squares that have no tree
    assert code in (0, unmatched), f"{' '.join(words)} ended with {code}\n{said.getvalue()}"
    return said.getvalue()
