"""Modules that processes of the service hold: counted, since seconds vary."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.unit.serve.service_fixture import World

PROGRAM = """
import json, sys
from serve.processes import SETUP_HOOK, import_serve
import_serve()
import serve.chat_engine, serve.embedder, serve.grounding, serve.ingress, serve.search
import serve.session  # it binds all of these, and asks another process about archive and run
heavy = {"pandas", "pyarrow", "lance", "torch", "transformers", "vllm", "ray.serve"}
held = sorted(heavy & set(sys.modules))
(hook,) = SETUP_HOOK
from ray._private import ray_constants
import pandas  # whoever wants it still gets it
print(json.dumps([held, hook == ray_constants.WORKER_PROCESS_SETUP_HOOK_ENV_VAR]))
"""


def test_what_starts_the_service_holds_ray_serve_and_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True, check=True
    )
    assert json.loads(done.stdout.splitlines()[-1]) == [["ray.serve"], True]


REPLICA = """
import json, sys
import pyarrow  # as in every process that Ray starts
from serve.processes import import_serve
import_serve()
from serve.embedder import Embedder
from serve.grounding import Grounding
from serve.search import Search
archive, run = sys.argv[1:]
parts = Search(archive, model="m", fingerprint="f"), Embedder(archive, run), Grounding(archive, run)
parts[0]._list(parts[0].snapshot.archive)
heavy = {"pandas", "transformers", "sklearn", "scipy", "vllm"}
print(json.dumps(sorted(heavy & set(sys.modules))))
"""


def test_replicas_hold_neither_transformers_nor_pandas(world: World) -> None:
    done = subprocess.run(
        [sys.executable, "-c", REPLICA, world.archive, world.run],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout.splitlines()[-1]) == []
