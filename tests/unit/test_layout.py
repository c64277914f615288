"""Rules of imports (docs/concepts/architecture.md), and calls that no module of ours makes."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("pathflip", "jobs", "serve")
FORBIDDEN = {
    "pathflip": {"ray", "jobs", "serve", "tests"},
    "jobs": {"serve", "tests"},
    "serve": {"jobs", "tests"},
}
UNSAFE_MODULES = {"pickle", "cloudpickle", "dill", "joblib", "shelve"}
UNSAFE_CALLS = {"torch.load", "pandas.read_pickle", "pd.read_pickle"}
# Keyword: the only literal it may be given.
SAFE_KEYWORDS = {"weights_only": True, "trust_remote_code": False, "allow_pickle": False}
IMPORTERS = {"__import__", "import_module", "find_spec", "run_module"}


def imports(tree: ast.Module) -> Iterator[tuple[str, int, bool]]:
    """Yield (module, line, inside a function) for every absolute import, written or called."""
    lazy = {
        id(inner)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef)
        for statement in outer.body  # decorators and defaults run on import
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func).rpartition(".")[2]
            first = node.args[0]
            if (
                called in IMPORTERS
                and isinstance(first, ast.Constant)
                and isinstance(first.value, str)
            ):
                names = [first.value]
        for name in names:
            yield name, getattr(node, "lineno", 0), id(node) in lazy


def faults(path: str, source: str) -> list[str]:
    """Return what breaks the rules in one module, as `path:line sentence`."""
    owner = path.partition("/")[0]
    tree = ast.parse(source)
    found = []
    for name, line, lazy in imports(tree):
        top = name.partition(".")[0]
        lazy_cli = path.startswith("pathflip/cli/") and lazy and top in {"jobs", "serve"}
        if top in FORBIDDEN[owner] and not lazy_cli:
            found.append(f"{path}:{line} {owner} imports {top}")
        if top in UNSAFE_MODULES or name == "torch.load":
            found.append(f"{path}:{line} uses {name}")
        if name.startswith(("platform.image", "platform.helm", "platform.serve")):
            found.append(f"{path}:{line} imports {name}")
    for node in ast.walk(tree):
        settings: list[tuple[object, ast.expr]] = []
        if isinstance(node, ast.Call):
            settings = [(keyword.arg, keyword.value) for keyword in node.keywords]
            if ast.unparse(node.func) in UNSAFE_CALLS:
                found.append(f"{path}:{node.lineno} calls {ast.unparse(node.func)}")
        elif isinstance(node, ast.Dict):
            settings = [
                (key.value, value)
                for key, value in zip(node.keys, node.values, strict=True)
                if isinstance(key, ast.Constant)
            ]
        for setting, value in settings:
            if isinstance(setting, str) and setting in SAFE_KEYWORDS:
                safe = SAFE_KEYWORDS[setting]
                if not (isinstance(value, ast.Constant) and value.value is safe):
                    found.append(f"{path}:{value.lineno} {setting} is not {safe}")
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_our_modules_keep_the_rules(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    broken = [
        fault
        for file in files
        for fault in faults(file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8"))
    ]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("pathflip/x.py", "import ray"),
        ("pathflip/x.py", "import ray.data as rd"),
        ("pathflip/x.py", "def f():\n    import ray"),
        ("pathflip/x.py", "from jobs import ingest"),
        ("pathflip/x.py", "def f():\n    from jobs.ingest import main"),
        ("pathflip/slides/x.py", "import importlib\nimportlib.import_module('serve.app')"),
        ("pathflip/x.py", "__import__('ray')"),
        ("pathflip/x.py", "import tests.bench.ingest"),
        ("pathflip/cli/archive.py", "import jobs.ingest"),
        ("pathflip/cli/archive.py", "if True:\n    from serve import app"),
        ("pathflip/cli/archive.py", "def f(x=__import__('jobs')):\n    pass"),
        ("pathflip/cli/archive.py", "def f():\n    import ray"),
        ("jobs/x.py", "from serve.app import build"),
        ("serve/x.py", "def f():\n    import jobs.ingest"),
        ("jobs/x.py", "import platform.helm"),
        ("jobs/x.py", "from platform import image"),
        ("pathflip/x.py", "import pickle"),
        ("pathflip/x.py", "from pickle import loads"),
        ("jobs/x.py", "import ray, cloudpickle"),
        ("pathflip/x.py", "import torch\ntorch.load('w.pt')"),
        ("pathflip/x.py", "from torch import load"),
        ("pathflip/x.py", "f(x, weights_only=False)"),
        ("pathflip/x.py", "f(x, trust_remote_code=True)"),
        ("pathflip/x.py", "f(x, trust_remote_code=flag)"),
        ("pathflip/x.py", "f(x, **{'trust_remote_code': True})"),
        ("serve/x.py", "import numpy as np\nnp.load(f, allow_pickle=True)"),
    ],
)
def test_a_planted_fault_is_found(path: str, source: str) -> None:
    assert faults(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("pathflip/cli/archive.py", "def ingest():\n    from jobs.ingest import main\n    main()"),
        ("pathflip/x.py", "import platform\nplatform.system()"),
        ("pathflip/x.py", "import rayon, servers"),
        ("pathflip/slides/x.py", "from . import jobs\nfrom ..serve import x"),
        ("jobs/x.py", "import ray\nfrom pathflip import Archive"),
        ("jobs/x.py", "from jobs.ingest import main"),
        ("pathflip/x.py", "f(x, trust_remote_code=False, weights_only=True)"),
        ("pathflip/x.py", "# pickle, torch.load(x)\ntext = 'trust_remote_code=True'"),
        ("pathflip/x.py", "import json\njson.load(f)"),
    ],
)
def test_what_is_allowed_passes(path: str, source: str) -> None:
    assert faults(path, source) == []


# -- structure ------------------------------------------------------------------------------------


def modules(packages: Sequence[str] = PACKAGES) -> dict[str, Path]:
    """Every module of ours by its dotted name."""
    found = {}
    for package in packages:
        for file in sorted((ROOT / package).rglob("*.py")):
            name = file.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
            found[name.removesuffix(".__init__")] = file
    return found


def needs(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Return each module's imports of the others, also inside functions; not for types alone."""
    found: dict[str, set[str]] = {}
    for module, tree in trees.items():
        for_types = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            for inner in ast.walk(node)
        }
        names: set[str] = set()
        for node in ast.walk(tree):
            if id(node) in for_types:
                continue
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    names.add(inner if inner in trees else str(node.module))
        found[module] = {name for name in names if name in trees and name != module}
    return found


def circles(edges: dict[str, set[str]]) -> list[str]:
    """Modules that import each other, however far round: in their circle's order."""
    left = {module: set(wanted) for module, wanted in edges.items()}
    while free := [module for module, wanted in left.items() if not wanted & left.keys()]:
        for module in free:
            del left[module]
    if not left:
        return []
    path = [next(iter(left))]
    while (following := next(iter(left[path[-1]] & left.keys()))) not in path:
        path.append(following)
    return [*path[path.index(following) :], following]


def parsed(sources: dict[str, str]) -> dict[str, ast.Module]:
    return {name: ast.parse(source) for name, source in sources.items()}


def test_no_modules_import_each_other() -> None:
    trees = parsed({name: file.read_text(encoding="utf-8") for name, file in modules().items()})
    circle = circles(needs(trees))
    assert not circle, " -> ".join(circle)


@pytest.mark.parametrize(
    ("sources", "circle"),
    [
        ({"a": "import b", "b": "def f():\n    import a"}, True),
        ({"a": "from b import x", "b": "from c import y", "c": "import a"}, True),
        ({"p": "from p.q import x", "p.q": "from p import x"}, True),
        ({"a": "import b", "b": "import c", "c": ""}, False),
        ({"a": "import b", "b": "if TYPE_CHECKING:\n    import a"}, False),
        ({"p": "from p.q import x", "p.q": "from p import r", "p.r": ""}, False),
    ],
)
def test_a_circle_is_found(sources: dict[str, str], circle: bool) -> None:
    found = circles(needs(parsed(sources)))
    assert bool(found) == circle
    if circle:
        assert found[0] == found[-1]


def names_in(tree: ast.Module) -> set[str]:
    """Names that a module defines or imports, wherever in it that is."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    return found


def test_what_tests_and_benchmarks_import_of_ours_is_there() -> None:
    """Types are checked in our packages alone, and most benchmarks run in no test."""
    dotted = modules((*PACKAGES, "tests"))
    known: dict[str, set[str]] = {}
    missing = []
    for path in modules(("tests",)).values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or node.level or node.module is None:
                continue
            module = node.module
            if module.partition(".")[0] not in (*PACKAGES, "tests"):
                continue
            if module not in known and module in dotted:
                text = dotted[module].read_text(encoding="utf-8")
                known[module] = names_in(ast.parse(text))
            missing += [
                f"{path.relative_to(ROOT)}:{node.lineno} {module}.{alias.name}"
                for alias in node.names
                if alias.name not in known.get(module, ())
                and f"{module}.{alias.name}" not in dotted
            ]
    assert missing == []


def test_no_file_is_long() -> None:
    """A file answers one question: split before 600 lines (CONTRIBUTING.md)."""
    files = [file for package in (*PACKAGES, "tests") for file in (ROOT / package).rglob("*.py")]
    sizes = {
        file.relative_to(ROOT).as_posix(): len(file.read_text(encoding="utf-8").splitlines())
        for file in files
    }
    assert {name: lines for name, lines in sizes.items() if lines > 600} == {}


def test_jobs_and_serve_are_packages_and_platform_is_not() -> None:
    for package in PACKAGES:
        assert (ROOT / package / "__init__.py").is_file(), package
    # An __init__.py there would shadow the standard library's platform: Ray jobs hang in PENDING.
    assert sorted((ROOT / "platform").rglob("*.py")) == []
    assert sorted((ROOT / "tests" / "unit").rglob("__init__.py")) == []


def test_the_standard_platform_module_wins_in_a_checkout() -> None:
    code = "import platform; print(platform.system(), platform.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    system, file = done.stdout.split(maxsplit=1)
    assert system
    assert not Path(file.strip()).is_relative_to(ROOT / "platform")


def test_importing_pathflip_stays_light() -> None:
    if not (ROOT / "pathflip" / "cli").exists():
        pytest.skip("pathflip/cli is not there yet")
    heavy = "{'ray', 'torch', 'lancedb', 'lance', 'transformers', 'timm', 'cv2', 'pandas'}"
    code = f"import sys, pathflip, pathflip.cli; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
