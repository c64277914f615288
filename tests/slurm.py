"""Slurm on one machine, for tests: ``srun`` starts processes, ``scontrol`` notes what it is told.

Options are those that Slurm 22 and later know; an unknown one is an error, as it is there. And as
there, a signal to ``srun`` kills its tasks, ``scancel`` tells them to end, and a job that is queued
again loses what still runs.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "platform" / "slurm" / "pathflip.sbatch"
FLAGS = {"--no-kill"}
OPTIONS = {
    "--relative", "--nodes", "--ntasks", "--ntasks-per-node", "--wait", "--kill-on-bad-exit",
    "--cpus-per-task",
}  # fmt: skip


def _steps() -> Path:
    """Folder with a file for each step of this run of the job: process ids of its tasks."""
    folder = Path(os.environ["FAKE_SLURM"], f"steps.{os.environ.get('SLURM_RESTART_COUNT', 0)}")
    folder.mkdir(exist_ok=True)
    return folder


def srun(words: list[str]) -> int:
    """Run a step: one process a node, told which by Slurm's variables; SIGTERM goes to all."""
    options: dict[str, str] = {}
    while words and words[0].startswith("--"):
        name, _, value = words.pop(0).partition("=")
        if name not in FLAGS | OPTIONS or bool(value) == (name in FLAGS):
            print(f"srun: unrecognized option '{name}'", file=sys.stderr)
            return 1
        options[name] = value
    first, count = int(options["--relative"]), int(options["--nodes"])
    if first + count > int(os.environ["SLURM_JOB_NUM_NODES"]):
        print("srun: Requested node configuration is not available", file=sys.stderr)
        return 1
    step = _steps() / str(len(list(_steps().iterdir())))
    tasks = [
        subprocess.Popen(
            words,
            env={
                **os.environ,
                "SLURM_NODEID": str(node),
                "SLURM_PROCID": str(node),
                "SLURMD_NODENAME": f"node{first + node}",
                "SLURM_CPUS_PER_TASK": options.get("--cpus-per-task", "1"),
            },
            start_new_session=True,
        )
        for node in range(count)
    ]
    step.write_text(" ".join(str(task.pid) for task in tasks))

    def kill(_: int, __: object) -> None:
        print("srun: forcing job termination", file=sys.stderr)
        for task in tasks:
            os.killpg(task.pid, signal.SIGKILL)

    signal.signal(signal.SIGTERM, kill)
    return max(task.wait() % 256 for task in tasks)


def scancel(words: list[str]) -> int:
    """Send a signal to the tasks of a step, which goes by the order in which steps began."""
    option, number, where = words[0].partition("=")[0], words[0].partition("=")[2], words[1]
    job, _, step = where.partition(".")
    assert (option, job) == ("--signal", os.environ["SLURM_JOB_ID"])
    for pid in (_steps() / step).read_text().split():
        with suppress(ProcessLookupError):
            os.killpg(int(pid), signal.Signals[f"SIG{number}"])
    return 0


def scontrol(words: list[str]) -> int:
    """Note a command; steps must have ended by then, and the job goes on to its own end."""
    for step in _steps().iterdir():
        alive = [pid for pid in step.read_text().split() if Path(f"/proc/{pid}").exists()]
        assert not alive, "Slurm would kill what has not cleaned up"
    with Path(os.environ["FAKE_SLURM"], "scontrol").open("a", encoding="utf-8") as log:
        print(*words, file=log)
    return 0


class Allocation:
    """Some nodes of Slurm, all of them this machine, and what is submitted to them.

    Args:
        folder: Folder for its programs and state.
        nodes: Number of nodes.
    """

    def __init__(self, folder: Path, *, nodes: int) -> None:
        self.folder = folder
        programs = folder / "bin"
        programs.mkdir()
        for name in ("srun", "scontrol", "scancel"):
            program = programs / name
            program.write_text(
                f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n"
                f"from tests import slurm\nsys.exit(slurm.{name}(sys.argv[1:]))\n"
            )
            program.chmod(0o755)
        path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        dropped = ("RAY_", "SLURM_", "PATHFLIP_", "PYTHON")
        self.environment = {
            **{name: at for name, at in os.environ.items() if not name.startswith(dropped)},
            "PATH": path,
            "PYTHONPATH": str(ROOT),
            "FAKE_SLURM": str(folder),
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_CPUS_PER_TASK": "2",
            "PATHFLIP_STATE": str(folder / "state"),
            # Slurm's own default; pytest's folders are too long for sockets.
            "PATHFLIP_SCRATCH": "/tmp",
        }

    def submit(self, *command: str, **environment: str) -> subprocess.Popen[str]:
        """Start the script as Slurm does: a copy of it, on the first node."""
        copy = self.folder / "slurm_script"
        copy.write_bytes(SCRIPT.read_bytes())
        return subprocess.Popen(
            ["/bin/bash", str(copy), *command],
            env={**self.environment, **environment},
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def queued_again(self) -> list[str]:
        """Commands that ``scontrol`` was given."""
        log = self.folder / "scontrol"
        return log.read_text().splitlines() if log.exists() else []

    def left(self) -> list[Path]:
        """Files of the job that are still there."""
        return list((self.folder / "state").glob("*"))
