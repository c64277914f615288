"""Modules that a command imports: how many, and which heavy packages none of them needs.

A command's time until it answers is mostly imports, and a count of them does not depend on the
machine. The budgets are a sixth above what was counted when they were written.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from pathflip.archive import Archive
from pathflip.archive.commit import Committer
from pathflip.archive.model_vectors import ensure_model
from pathflip.checkpoints import load_run
from tests.serving import Tuned

ROOT = Path(__file__).resolve().parents[3]
RUN = """
import atexit, json, sys
modules = sys.argv.pop(1)
atexit.register(lambda: open(modules, "w").write(json.dumps(sorted(sys.modules))))
from pathflip.cli import run
run()
"""
ARROW = ("pandas", "ray", "torch", "transformers", "scipy", "sklearn", "sympy", "lancedb", "cv2")
MODEL = ("pandas", "ray", "transformers", "scipy", "sklearn", "sympy", "lancedb", "torch._dynamo")
SHOWN = ARROW[:-1]
LLM = ("pandas", "ray", "scipy", "sklearn", "lancedb", "vllm", "cv2", "boto3", "botocore", "triton")
AGENT = ("pandas", "ray", "torch", "transformers", "scipy", "sklearn", "sympy", "lancedb")
BUDGETS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "help": ("--help", 215, (*ARROW, "pyarrow", "numpy")),
    "search help": ("search --help", 330, (*ARROW, "pyarrow", "numpy")),
    "slides list": ("slides list --archive {archive} --json", 560, ARROW),
    "search slide": ("search --archive {archive} --run {run} --slide slide003 --json", 560, ARROW),
    "search region": (
        "search --archive {archive} --run {run} --region slide003/0_3 --json", 560, ARROW
    ),
    "search text": ("search necrosis --archive {archive} --run {run} --json", 1700, MODEL),
    "ground": (
        "ground slide003 necrosis --archive {archive} --run {run} --device cpu --json", 1700, MODEL
    ),
    # It ends with its standard input.
    "view": ("view slide003 --archive {archive} --json --embed --port 0", 960, SHOWN),
    "view with a run": (
        "view slide003 --archive {archive} --run {run} --json --embed --port 0", 1000, SHOWN
    ),
    "ask": (
        "ask slide003 Organ? --choices colon|lung --archive {archive} --run {run} --device cpu "
        "--json", 3690, LLM
    ),
    "caption": (
        "caption slide003 --archive {archive} --run {run} --device cpu --max-new-tokens 4 --json",
        3690, LLM,
    ),
    "mcp": ("mcp --archive {archive}", 1150, AGENT),  # its input ends at once
}  # fmt: skip
"""{name: (command, most modules, packages that it does not import)}."""


@pytest.fixture(scope="module")
def indexed(tuned: Tuned, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The tuned run, and a copy of its archive with vectors of its model."""
    from jobs.index import encode_slide

    archive = str(shutil.copytree(tuned.archive, tmp_path_factory.mktemp("start") / "archive"))
    run = load_run(tuned.run)
    with Committer(archive) as committer:
        table = ensure_model(
            committer, run.name, dim=run.model.config.d, fingerprint=run.fingerprint,
            encoder=run.encoder, run="run",
        )  # fmt: skip
        opened = committer.archive
        rows = [encode_slide(opened, run, slide) for slide in sorted(opened.ready_ids())]
        committer.replace_rows(table, pa.concat_tables(rows))
    assert run.name in Archive(archive).models()
    return {"archive": archive, "run": str(tuned.run)}


@pytest.mark.parametrize("name", BUDGETS)
def test_a_command_imports_what_it_needs(
    indexed: dict[str, str], name: str, tmp_path: Path
) -> None:
    command, most, without = BUDGETS[name]
    modules = tmp_path / "modules.json"
    arguments = [part.format(**indexed) for part in command.split()]
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(modules), *arguments], cwd=ROOT, capture_output=True,
        text=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    if "--json" in arguments:
        assert json.loads(done.stdout)
    imported = json.loads(modules.read_text())
    without = without if name == "mcp" else (*without, "mcp")
    assert [package for package in without if package in imported] == []
    assert len(imported) <= most


@pytest.mark.parametrize("answers", [False, True])
def test_a_command_whose_reader_has_gone_ends_as_any_process_does(answers: bool) -> None:
    code = (
        "from pathflip.cli import process\n"
        "with process.own_process():\n"
        f"    process._answers = {answers}\n"
        "    print('answer')\n"
        "    raise SystemExit(0)\n"
    )
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, stdout=writing, stderr=subprocess.PIPE,
            text=True, check=False,
            env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""},
        )  # fmt: skip
    finally:
        os.close(writing)
    assert done.returncode == 120
    assert "Traceback" not in done.stderr
