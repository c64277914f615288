"""Connects jobs to Ray: a named cluster, the one they were submitted to, or this machine."""

from __future__ import annotations

import logging
import os

import ray

from pathflip.errors import ConfigError

START_ATTEMPTS = 3
LOCAL_OBJECT_STORE_BYTES = 256 << 20  # rows hold metadata, never pixels: this is plenty


def connect(address: str | None = None) -> bool:
    """Connect to Ray, starting it on this machine if no cluster is named.

    Args:
        address: ``auto``, ``host:port`` or ``ray://…``; None means the cluster this job was
            submitted to (RAY_ADDRESS), else a private one on this machine that ends with it.

    Returns:
        Whether Ray runs on this machine alone, so that its resources cannot grow.

    Raises:
        ConfigError: The named cluster does not answer.
    """
    if ray.is_initialized():
        return not os.environ.get("RAY_ADDRESS")
    if address or os.environ.get("RAY_ADDRESS"):
        try:
            ray.init(address=address or "auto", logging_level=logging.WARNING)
        except (ConnectionError, TimeoutError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"No Ray cluster answers at {address or os.environ['RAY_ADDRESS']}: {error}",
                hint="Check the address and RAY_AUTH_MODE / the token, or leave --address out to "
                "run on this machine.",
                code="no_cluster",
            ) from error
        return False
    # Logs of Ray and Lance do not help whoever reads a terminal.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("LANCE_LOG", "error")
    # Ray starts workers at niceness 15: right beside a service, wrong for a job alone.
    os.environ.setdefault("RAY_worker_niceness", "0")
    for attempt in range(START_ATTEMPTS):
        try:
            _start_local()
            return True
        except Exception as error:  # Ray raises no narrower type here
            # Ray waits a fixed 30 s for its own processes, too little on a busy machine.
            if "timed out during startup" not in str(error) or attempt == START_ATTEMPTS - 1:
                raise
            ray.shutdown()
    raise AssertionError("at least one attempt")


def _start_local() -> None:
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=LOCAL_OBJECT_STORE_BYTES,
        configure_logging=False,
    )
