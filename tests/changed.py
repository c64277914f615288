"""Print the unit tests of what changed since main: ``make check`` runs them.

A module's tests mirror its path: those of pathflip/x/y.py are tests/unit/x/test_y.py, those of
jobs/y.py are tests/unit/jobs/test_y.py or tests/unit/test_y.py. Where there are none, the few that
import it stand in. No plugin does this: pytest-picked knows tests that changed themselves, and
pytest-testmon must have run the whole suite first.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

UNIT = Path("tests/unit")
FEW = 4  # a module that more test files import is left to ``make test``
DEPLOYED = ("platform/", "requirements/", "cluster.yaml", "pyproject.toml")  # test_manifests.py


def git(*words: str) -> list[str]:
    """Lines that a git command prints; none where it fails."""
    return subprocess.run(["git", *words], capture_output=True, text=True).stdout.splitlines()


def importers(module: str) -> list[Path]:
    """Unit tests that import a module, given by its dotted name."""
    parent, _, name = module.rpartition(".")
    pattern = re.compile(rf"{module}\b|from {parent} import (\([^)]*|[^\n(]*)\b{name}\b")
    return [test for test in UNIT.rglob("test_*.py") if pattern.search(test.read_text("utf-8"))]


def tests_of(path: Path) -> list[Path]:
    """Unit tests of a changed file, which may be gone."""
    if path.is_relative_to(UNIT) and path.name.startswith("test_"):
        return [path] if path.exists() else []
    if path.as_posix().startswith(DEPLOYED):
        install = [UNIT / "test_install.py"] if path.name == "install.sh" else []
        return [UNIT / "test_manifests.py", *install]
    if path.suffix != ".py":
        return []
    if path.is_relative_to(UNIT) and path.name == "conftest.py":
        return sorted(path.parent.glob("test_*.py"))
    *folders, name = (path.parent if path.name == "__init__.py" else path.with_suffix("")).parts
    for folder in (folders[1:], folders, folders[:1], []):
        if (mirror := UNIT.joinpath(*folder, f"test_{name}.py")).exists():
            return [mirror]
    return importers(".".join((*folders, name)))


if __name__ == "__main__":
    base = git("merge-base", "HEAD", "origin/main") or git("merge-base", "HEAD", "main") or ["HEAD"]
    changed = git("diff", "--name-only", "--no-renames", *base)
    changed += git("ls-files", "--others", "--exclude-standard")
    tests = {name: tests_of(Path(name)) for name in changed}
    few = {name for name in tests if name.startswith("tests/unit/") or len(tests[name]) <= FEW}
    if left := [name for name in tests if not tests[name] or name not in few]:
        print("No unit test, or too many, for:", *left, "(make test runs all)", file=sys.stderr)
    print(UNIT / "test_layout.py", *sorted({test for name in few for test in tests[name]}))
