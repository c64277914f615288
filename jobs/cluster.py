"""Connects jobs to Ray: a named cluster, the one they were submitted to, or this machine."""

from __future__ import annotations

import atexit
import logging
import os
import sys

from pathflip import private_ray
from pathflip.errors import ConfigError
from pathflip.files import PrivateFolder


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
    named = address or os.environ.get("RAY_ADDRESS")
    if not named and "ray" not in sys.modules:  # which reads the environment when it is imported
        private_ray.set_environment()
    import ray

    if ray.is_initialized():
        return not os.environ.get("RAY_ADDRESS")
    if named:
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
    folder = PrivateFolder()
    atexit.register(_end, folder)
    private_ray.start(ray, folder.path)
    return True


def _end(folder: PrivateFolder) -> None:
    """Stop Ray, then remove its folder: what Ray registered for the end comes after this."""
    import ray

    ray.shutdown()
    folder.remove()
