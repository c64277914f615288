"""The service on this machine: ``pathflip serve``.

This process is small: it takes the signals and supervises another (:mod:`serve.session`), in which
Ray, with handlers of its own, and everything Ray starts live. Until the service is ready there is
nothing to lose, and a signal kills all of it; then running answers have ``drain_s``. Nothing that
was started outlives this process, however it ends.

Read in this order: :func:`run`, :class:`_Session`.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pathflip.errors import ConfigError, PathFLIPError, from_dict
from pathflip.files import PRIVATE, PrivateFolder
from serve import processes
from serve.auth import is_loopback
from serve.config import ServeConfig

_SESSION = "serve.session"
GRACE_S = 20.0
"""Seconds beyond ``drain_s`` after which a service that was told to stop is killed."""


def run(
    config: ServeConfig,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    ready: Callable[[dict[str, Any]], None],
) -> None:
    """Serve until SIGTERM or SIGINT, then let running answers finish.

    A signal before the service is ready, or a second one, ends it at once.

    Args:
        config: Settings.
        host: Address to listen on; other than loopback only with a token file.
        port: Port to listen on, not 0.
        ready: Called once every part is up, with {"url", "pid", "archive", "chat", "patches",
            "audit"}; ``patches`` is the name of the patch model or None.

    Raises:
        ConfigError: ``no_tokens``, ``port``, ``start``, or what
            :func:`serve.config.check_inputs` raises.
        ArchiveError, CheckpointError: See :func:`serve.config.check_inputs`.
        PathFLIPError: ``service_died``: a process died without which the service cannot go on.
    """
    with _Signals() as signals:
        if config.token_file is None and not is_loopback(host):
            raise ConfigError(
                f"Without tokens the service listens on this machine only, not on {host}.",
                hint="Give --token-file; docs/howto/serve.md shows one.",
                code="no_tokens",
            )
        _check_port(host, port)
        try:
            with PrivateFolder() as folder, _Session(config, host, port, folder) as session:
                started = session.next(signals)
                if started is None:
                    return
                bracketed = f"[{host}]" if ":" in host else host
                url = f"http://{bracketed}:{port}"
                ready({"url": url, "pid": os.getpid()} | started["ready"])
                if session.next(signals) is None:
                    session.stop()
                    session.next(signals, seconds=config.drain_s + GRACE_S)
        except PathFLIPError as error:
            if error.code == "start":  # another may have taken the port meanwhile
                _check_port(host, port)
            raise


class _Signals:
    """Receives SIGTERM and SIGINT, and makes them readable beside other events."""

    def __enter__(self) -> _Signals:
        self.read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        numbers = (signal.SIGTERM, signal.SIGINT)
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self.read)
        os.close(self._write)

    def _note(self, *_: object) -> None:
        with suppress(BlockingIOError):
            os.write(self._write, b".")


class _Session:
    """The process of :mod:`serve.session` and all below it, as a context manager.

    When it is left, every one of them is gone.
    """

    def __init__(self, config: ServeConfig, host: str, port: int, folder: Path) -> None:
        self._order = {
            "config": asdict(config), "host": host, "port": port, "folder": str(folder),
        }  # fmt: skip
        self._folder, self._rest = folder, b""

    def __enter__(self) -> _Session:
        self._others = processes.children(os.getpid())
        processes.adopt_orphans()
        self._reports, reports = os.pipe()
        root = str(Path(__file__).resolve().parents[1])
        paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        # What it starts keeps its temporary files in the folder, too.
        environment = os.environ | {"PYTHONPATH": paths, "TMPDIR": str(self._folder)}
        # A file serve.py or queue.py in the working folder is no module of ours.
        environment["PYTHONSAFEPATH"] = "1"
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", _SESSION, str(reports)],
                stdin=subprocess.PIPE, stdout=2, pass_fds=(reports,), env=environment,
                start_new_session=True,  # a terminal's Ctrl-C is for this process alone
            )  # fmt: skip
        finally:
            os.close(reports)
        self._tell(json.dumps(self._order))
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGSTOP)  # so that it starts nothing, says nothing
        processes.kill_below(self._process.pid)
        self._process.kill()
        self._process.wait()
        # Where it died first, what it had started is here now.
        while orphans := processes.children(os.getpid()) - self._others:
            for pid in orphans:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            processes.reap(orphans)
            time.sleep(0.01)
        processes.adopt_orphans(on=False)
        os.close(self._reports)
        with suppress(BrokenPipeError):
            self._process.stdin.close()  # type: ignore[union-attr]

    def stop(self) -> None:
        """Let running answers finish, then end."""
        self._tell("stop")

    def next(self, signals: _Signals, *, seconds: float | None = None) -> dict[str, Any] | None:
        """Wait for what the process reports next.

        Returns:
            The report; None where a signal comes first, or the time is over.

        Raises:
            PathFLIPError: The error that it reports, or ``service_died``.
        """
        with selectors.DefaultSelector() as selector:
            selector.register(signals.read, selectors.EVENT_READ)
            selector.register(self._reports, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                found = [key.fileobj for key, _ in selector.select(seconds)]
                if signals.read in found or not found:
                    os.read(signals.read, 1 if found else 0)
                    return None
                part = os.read(self._reports, 1 << 16)
                if not part:
                    raise _died(self._process.wait())
                self._rest += part
        line, _, self._rest = self._rest.partition(b"\n")
        report: dict[str, Any] = json.loads(line)
        if "error" in report:
            raise from_dict(report["error"])
        return report

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # next() finds that it has died
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()


def _died(code: int) -> PathFLIPError:
    ended = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
    return PathFLIPError(
        f"The service has ended: its main process {ended}.",
        hint="Start it again; the system's log may say what killed the process.",
        code="service_died",
    )


def _check_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            hint = "Choose another --port or --host."
            pid = processes.listener(port)
            if pid is not None and PRIVATE in " ".join(processes.command_line(pid)):
                own = processes.above(pid)
                sessions = [at for at in own[:-1] if _SESSION in processes.command_line(at)]
                if sessions:  # the command is above it
                    pid = own[own.index(sessions[-1]) + 1]
                hint = f"A service of yours listens there (process {pid}); end it: kill {pid}"
            raise ConfigError(
                f"The service cannot listen on {host}, port {port}: {error}.",
                hint=hint,
                code="port",
            ) from error
