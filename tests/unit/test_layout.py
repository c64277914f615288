"""Who may import whom (docs/concepts/architecture.md), and what no module of ours may do."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
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
        if name.startswith(("platform.image", "platform.kuberay", "platform.serve")):
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
        ("jobs/x.py", "import platform.kuberay"),
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


def test_the_wheel_carries_pathflip_alone() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["packages"] == ["pathflip"]


def test_importing_pathflip_stays_light() -> None:
    if not (ROOT / "pathflip" / "cli").exists():
        pytest.skip("pathflip/cli is not there yet")
    heavy = "{'ray', 'torch', 'lancedb', 'lance', 'transformers', 'timm', 'cv2', 'pandas'}"
    code = f"import sys, pathflip, pathflip.cli; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
