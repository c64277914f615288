"""Several machines on this one, for tests of a cluster: hosts with a network between them.

A host has network, name, processes, shared memory and ``/tmp`` of its own; the rest of the file
system is one, as where all machines mount the same. It is a set of namespaces that its first
process holds: when that ends, and it does when the process of the tests does, however that ends,
the kernel ends all others of the host and removes its network. Nothing has a name outside.

Read in this order: :class:`World`, :class:`Host`, :class:`Cluster`.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.faults import ROOT, parent, until

NEEDED = ("unshare", "nsenter", "ip", "tc", "mount")
_SPACES = ("--net", "--uts", "--ipc", "--pid", "--mount")
START_S = 180.0
"""Deadline for a node of Ray, which takes seconds on a machine with nothing else to do."""
_STORE_BYTES = 80 << 20
_OWN = ("PATH", "HOME", "LANG", "LC_ALL", "OMP_NUM_THREADS", "HF_HUB_OFFLINE")
"""Variables that hosts have of this process: a machine of its own knows nothing of the others."""
LOST = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "3",
}
"""Variables of a head that takes a host for lost after 18 s of silence: by itself after a minute,
and one that is cut off for half a minute would not be."""

_NODE = """
umask 077
mkdir /tmp/proxy && cp "$1" /tmp/proxy/secret
eval "$("$0" -m serve.proxy /tmp/proxy)"
shift
exec "$0" -m ray.scripts.scripts "$@"
"""
"""Program of a node, as docs/howto/serve.md starts one that is to serve."""

_FIRST = """
import os, signal, socket, subprocess, sys

name, *kept = sys.argv[1:]
socket.sethostname(name)
mount = lambda *words: subprocess.run(["mount", *words], check=True)
mount("-t", "tmpfs", "tmpfs", "/dev/shm")
kept = {path: os.open(path, os.O_PATH) for path in kept if path.startswith("/tmp/")}
mount("-t", "tmpfs", "tmpfs", "/tmp")
for path, opened in kept.items():
    os.makedirs(path, exist_ok=True)
    mount("-c", "--bind", f"/proc/{os.getpid()}/fd/{opened}", path)
with open("/tmp/hosts", "w") as file:  # as Debian's installer writes it
    print("127.0.0.1 localhost", f"127.0.1.1 {name}", sep="\\n", file=file)
mount("--bind", "/tmp/hosts", "/etc/hosts")
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody else waits for orphans
print("up", flush=True)
sys.stdin.read()
"""


def refusal() -> str | None:
    """Return why hosts cannot be made here, or None where they can."""
    missing = [name for name in NEEDED if _program(name) is None]
    if missing:
        return f"hosts need {', '.join(missing)} (Debian: iproute2, util-linux)"
    tried = subprocess.run(
        [str(_program("unshare")), *_SPACES, "--fork", "mount", "-t", "tmpfs", "tmpfs", "/mnt"],
        capture_output=True,
        text=True,
    )
    if tried.returncode:
        return f"hosts need root and namespaces: {tried.stderr.strip()}"
    return None


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _run(*words: str) -> None:
    ended = subprocess.run([str(_program(words[0])), *words[1:]], capture_output=True, text=True)
    assert ended.returncode == 0, f"{' '.join(words)}: {ended.stderr}"


class _Spaces:
    """A set of namespaces, and the process that holds them.

    Args:
        name: Name of the host.
        kept: Folders that are the same on all hosts though they may be below ``/tmp``.
    """

    def __init__(self, name: str, kept: Sequence[Path]) -> None:
        self.name = name
        words = [*_SPACES, "--fork", "--kill-child", "--mount-proc", sys.executable, "-I", "-c"]
        self._holder = subprocess.Popen(
            [str(_program("unshare")), *words, _FIRST, name, *map(str, kept)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == "up\n", self._holder.communicate()
        below = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children").read_text()
        self.pid = int(below)

    def ip(self, words: str) -> None:
        """Change the network with ``ip``."""
        _run("nsenter", f"--net=/proc/{self.pid}/ns/net", str(_program("ip")), *words.split())

    def tc(self, words: str) -> None:
        """Change how the network sends with ``tc``."""
        _run("nsenter", f"--net=/proc/{self.pid}/ns/net", str(_program("tc")), *words.split())

    def end(self) -> None:
        """End every process in them."""
        own = self.processes()
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._holder.communicate(timeout=60)
        until(
            lambda: not any(Path(f"/proc/{pid}").exists() for pid in own),
            seconds=60,
            what=f"processes of {self.name} end",
        )

    def processes(self) -> list[int]:
        """Ids of their processes, as this process sees them."""

        def space(pid: int | str) -> str:
            try:
                return os.readlink(f"/proc/{pid}/ns/pid")
            except OSError:
                return ""

        own = space(self.pid)
        return [
            int(pid) for pid in os.listdir("/proc") if pid.isdigit() and own and space(pid) == own
        ]


class Host(_Spaces):
    """A machine of a :class:`World`.

    Args:
        name: Name of the host, at most 15 characters.
        address: Its IPv4 address, in a network of 24 bits.
        switch: Namespaces with the bridge ``br0``, which becomes its network.
        kept: Folders that are the same on all hosts.
    """

    def __init__(self, name: str, address: str, switch: _Spaces, kept: Sequence[Path]) -> None:
        super().__init__(name, kept)
        self.address, self._switch = address, switch
        switch.ip(f"link add name {name} type veth peer name eth0 netns {self.pid}")
        switch.ip(f"link set dev {name} master br0 up")
        self.ip("link set lo up")
        self.ip(f"addr add {address}/24 dev eth0")
        self.ip("link set eth0 up")
        self.ip("route add default dev eth0")

    def start(
        self, *words: str, environment: dict[str, str], output: Path | None = None
    ) -> subprocess.Popen[str]:
        """Start a program on the host, in the root of the checkout.

        Args:
            words: Program and its arguments.
            environment: All of its variables.
            output: File for what it prints, errors too; None means pipes.
        """
        enter = [str(_program("nsenter")), f"--target={self.pid}", *_SPACES]
        command = [*enter, "/bin/sh", "-c", 'cd "$0" && exec "$@"', str(ROOT), *words]
        where = subprocess.PIPE if output is None else output.open("a")
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=where,
            stderr=where,
            text=True,
        )

    def cut(self) -> None:
        """Pull its cable: what is sent to it, or by it, is lost without a word."""
        self._switch.ip(f"link set dev {self.name} down")

    def heal(self) -> None:
        """Plug the cable in again."""
        self._switch.ip(f"link set dev {self.name} up")

    def lose(self) -> None:
        """Lose it as by a power cut: nobody hears of it."""
        self.cut()
        self.end()

    @contextmanager
    def slow(self, *, share: float, mbit: int) -> Iterator[None]:
        """Let it have a share of the CPUs and of the network.

        Args:
            share: Share of the time that its processes may run.
            mbit: Megabits in a second, each way.
        """
        limit = f"root tbf rate {mbit}mbit burst 64kb latency 500ms"
        self._switch.tc(f"qdisc add dev {self.name} {limit}")
        self.tc(f"qdisc add dev eth0 {limit}")
        over = threading.Event()

        def brake() -> None:
            while not over.is_set():
                # But what was started from outside: nsenter would stop itself with it, for ever.
                there = self.processes()
                own = [pid for pid in there if parent(pid) in there]
                for number, seconds in ((signal.SIGSTOP, 1 - share), (signal.SIGCONT, share)):
                    for pid in own:
                        with suppress(ProcessLookupError):
                            os.kill(pid, number)
                    time.sleep(seconds / 2)

        thread = threading.Thread(target=brake, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self._switch.tc(f"qdisc del dev {self.name} root")
            self.tc("qdisc del dev eth0 root")


class World:
    """Hosts and the network between them; as a context manager, which leaves nothing behind.

    Args:
        kept: Folders that are the same on all hosts; the checkout and its Python are.
    """

    def __init__(self, *kept: Path) -> None:
        self._kept = [ROOT, Path(sys.prefix).resolve(), *kept]
        self._hosts: dict[str, Host] = {}

    def __enter__(self) -> World:
        self._switch = _Spaces("switch", self._kept)
        self._switch.ip("link add name br0 type bridge forward_delay 0")
        self._switch.ip("link set br0 up")
        return self

    def __exit__(self, *_: object) -> None:
        for host in self._hosts.values():
            host.end()
        self._switch.end()

    def host(self, name: str) -> Host:
        """Add a host."""
        address = f"10.77.0.{len(self._hosts) + 1}"
        assert name not in self._hosts
        self._hosts[name] = Host(name, address, self._switch, self._kept)
        return self._hosts[name]


class Cluster:
    """A Ray over hosts of a world: a head without CPUs, where commands run, and what joins it.

    Args:
        world: World of its hosts.
        folder: Folder that all hosts see, for its token and logs.
    """

    def __init__(self, world: World, folder: Path) -> None:
        self._world, self.folder = world, folder
        token = folder / "token"
        for secret in (token, folder / "secret"):  # the second is of the service's proxies
            secret.touch(mode=0o600)
            secret.write_text(os.urandom(32).hex())
        self.environment = {
            **{name: at for name, at in os.environ.items() if name in _OWN},
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "TMPDIR": "/tmp",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            **LOST,
            "LANCE_LOG": "error",
        }
        self._nodes: dict[str, subprocess.Popen[str]] = {}
        self.head = world.host("head")
        self.address = f"{self.head.address}:6379"
        self._ray(self.head, "--head", "--port=6379", "--include-dashboard=false", "--num-cpus=0")
        self.workers: dict[str, Host] = {}

    def grow(self, count: int) -> None:
        """Let hosts join until so many are there."""
        for _ in range(len(self.up()), count):
            name = f"worker{len(self.workers)}"
            self.workers[name] = self._world.host(name)
            self._ray(self.workers[name], f"--address={self.address}", "--num-cpus=1")

    def up(self) -> list[Host]:
        """Hosts that work."""
        return [host for name, host in self.workers.items() if self._nodes[name].poll() is None]

    def cut_off(self, host: Host, *, seconds: float) -> None:
        """Cut a host off for longer than Ray waits for it, and see its Ray end when it is back."""
        host.cut()
        time.sleep(seconds)
        host.heal()
        until(lambda: host not in self.up(), seconds=START_S, what=f"{host.name} is told")

    def run(self, *words: str) -> subprocess.Popen[str]:
        """Start a Python with arguments on the head, which finds the cluster by its address."""
        environment = self.environment | {"RAY_ADDRESS": self.address}
        return self.head.start(sys.executable, *words, environment=environment)

    def _ray(self, host: Host, *words: str) -> None:
        log = self.folder / f"{host.name}.log"
        begun = self._nodes[host.name] = host.start(
            "/bin/sh", "-c", _NODE, sys.executable, str(self.folder / "secret"), "start", *words,
            "--block",
            f"--node-ip-address={host.address}", f"--object-store-memory={_STORE_BYTES}",
            "--temp-dir=/tmp/ray", environment=self.environment, output=log,
        )  # fmt: skip
        until(
            lambda: "Ray runtime started" in log.read_text() or begun.poll() is not None,
            seconds=START_S,
            what=f"Ray on {host.name}",
        )
        assert begun.poll() is None, log.read_text()
