"""The service on this machine, in a private Ray: start, signals, drain, stop.

Read in this order: :func:`run`, :func:`_start`, :func:`_stop`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import tempfile
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from pathflip.errors import ConfigError
from serve import proxy
from serve.app import NAME, application
from serve.auth import is_loopback
from serve.config import ServeConfig, ServiceInputs, check_inputs

logger = logging.getLogger(__name__)


class _Stopped(BaseException):
    """SIGTERM or SIGINT arrived."""


def run(
    config: ServeConfig,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    ready: Callable[[dict[str, Any]], None],
) -> None:
    """Serve until SIGTERM or SIGINT, then let running answers finish.

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
    """
    if config.token_file is None and not is_loopback(host):
        raise ConfigError(
            f"Without tokens the service listens on this machine only, not on {host}.",
            hint="Give --token-file; docs/howto/serve.md shows one.",
            code="no_tokens",
        )
    _check_port(host, port)
    inputs = check_inputs(config)
    stopped = threading.Event()

    def stop(*_: Any) -> None:
        if not stopped.is_set():
            stopped.set()
            raise _Stopped

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    folder = tempfile.TemporaryDirectory(prefix="pathflip-", ignore_cleanup_errors=True)
    try:
        _start(config, inputs, host, port, folder.name)
        for number in before:  # Ray has installed its own, which abort the process
            signal.signal(number, stop)
        bracketed = f"[{host}]" if ":" in host else host
        url = f"http://{bracketed}:{port}"
        about = {"archive": config.archive, "chat": inputs.chat, "patches": inputs.patch_model}
        ready({"url": url, "pid": os.getpid()} | about | {"audit": inputs.audit})
        threading.Event().wait()
    except _Stopped:
        pass
    finally:
        stopped.set()
        _stop(config.drain_s)
        folder.cleanup()
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(config: ServeConfig, inputs: ServiceInputs, host: str, port: int, folder: str) -> None:
    _set_environment(folder)
    import ray
    from ray import serve

    # Ray's news is not the user's, and whatever Ray forks becomes another program at once.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message="lance(db)? (is not fork-safe|fork support)")

    app = application(config, inputs)
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        configure_logging=False,
        object_store_memory=256 << 20,
    )
    serve.start(
        proxy_location="HeadOnly",
        http_options={
            "host": host,
            "port": port,
            "request_timeout_s": config.limits.stream_s + config.drain_s,
            "keep_alive_timeout_s": 75,
        },
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
    )
    try:
        serve.run(app, name=NAME, route_prefix="/")
    except RuntimeError as error:
        # Ray wraps what a part raised, with its trace.
        last = str(error).strip().splitlines()[-1][:500]
        raise ConfigError(
            f"The service did not start: {last}",
            hint="Mend that, or see the log of the part that failed below /tmp/ray.",
            code="start",
        ) from error


def _set_environment(folder: str) -> None:
    """Set what Ray reads when it is imported: a token known to this process and its children."""
    os.environ.update(proxy.environment(folder))
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # Ray's metrics exporter would listen to everybody, without a token.
    os.environ.setdefault("RAY_enable_metrics_collection", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("LANCE_LOG", "error")
    os.environ.setdefault("RAY_worker_niceness", "0")


def _stop(drain_s: float) -> None:
    import ray

    if not ray.is_initialized():
        return
    try:
        asyncio.run(_drain_and_delete(drain_s))
    except Exception as error:  # Ray raises no narrower type; nothing may keep the process
        logger.warning("Serve did not stop in order: %s", error)


async def _drain_and_delete(drain_s: float) -> None:
    """Drain, delete the application and stop Ray, all in the event loop of Serve's handle."""
    import ray
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        # Serve would stop all parts at once, also those that running answers still need.
        with suppress(RayServeException):
            handle = serve.get_app_handle(NAME)
            await handle.broadcast("drain").results_async(timeout_s=drain_s + 5)
        await asyncio.to_thread(serve.delete, NAME)
    finally:
        await asyncio.to_thread(ray.shutdown)


def _check_port(host: str, port: int) -> None:
    import socket

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"The service cannot listen on {host}, port {port}: {error}.",
                hint="Choose another --port or --host.",
                code="port",
            ) from error
