"""SkyPilot's task: its machines become one Ray, which ends with the command."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from tests.faults import descendants

ROOT = Path(__file__).resolve().parents[2]
TASK = yaml.safe_load((ROOT / "platform" / "sky" / "pathflip.yaml").read_text("utf-8"))
DEADLINE_S = 240.0

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


def test_machines_join_with_the_token_and_end_with_the_command(tmp_path: Path) -> None:
    script = tmp_path / "count.py"
    script.write_text(
        "import os, sys, ray\n"
        "ray.init('auto', log_to_driver=False, logging_level='ERROR')\n"
        "print(len(ray.nodes()), 'RAY_TOKEN' in os.environ)\n"
        "sys.exit(5)\n"
    )
    before = set(Path("/tmp").glob("pf.*"))
    address, ports = unused_ports()
    dropped = ("RAY_", "SKYPILOT_", "PYTHON")
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(dropped)},
        **TASK["envs"],
        "COMMAND": f"python {script}",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_PORT": str(ports),
        "RAY_TOKEN": secrets.token_hex(32),
        "SKYPILOT_NODE_IPS": f"{address}\n{address}",
        "SKYPILOT_NUM_NODES": "2",
    }
    with ExitStack() as stack:
        machines = [
            stack.enter_context(
                subprocess.Popen(
                    ["/bin/bash", "-c", TASK["run"]],
                    env={**environment, "SKYPILOT_NODE_RANK": str(rank)},
                    cwd=ROOT,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            for rank in range(2)
        ]
        for machine in machines:
            stack.callback(machine.terminate)
        output, errors = machines[0].communicate(timeout=DEADLINE_S)
        assert (machines[0].returncode, output) == (5, "2 False\n"), errors
        _, errors = machines[1].communicate(timeout=DEADLINE_S)
        assert machines[1].returncode == 0, errors
    assert set(Path("/tmp").glob("pf.*")) <= before
    assert not [pid for machine in machines for pid in descendants(machine.pid)]


def unused_ports() -> tuple[str, int]:
    """Address of this machine, and a port of two that nobody has.

    Between those of Ray's workers and those that the kernel gives to whoever asks for any.
    """
    from ray.util import get_node_ip_address

    address = get_node_ip_address()
    for _ in range(100):
        port = 20_000 + 2 * secrets.randbelow(6_000)
        try:
            with (
                socket.create_server((address, port)),
                socket.create_server((address, port + 1)),
            ):
                return address, port
        except OSError:
            continue
    raise AssertionError("no two ports side by side")
