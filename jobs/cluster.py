"""Finds where a job runs: in processes of this machine, on a Ray of its own, or on a cluster."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pathflip import private_ray
from pathflip.cpus import cpus_here
from pathflip.errors import ConfigError
from pathflip.files import PrivateFolder

Place = Literal["local", "ray", "cluster"]
"""Engine of a job: processes of this machine, a Ray on this machine alone, or a Ray cluster."""
PATIENT = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "3000"}
"""Variables of workers: their threads sleep while they wait, so that other work has the cores, but
not at once: waking up between the products of a small model took more time than these."""
_GPU_NODES = ("nvidia[0-9]*", "dxg", "kfd")


@dataclass(frozen=True, kw_only=True)
class Available:
    """CPUs and GPUs that a job may use.

    Attributes:
        cpus: CPUs of the machine or cluster.
        gpus: Its GPUs; 0 where the job's device is ``cpu``.
        use_gpu: Whether the job runs on GPUs. On a cluster that grows there may be none yet.
    """

    cpus: int
    gpus: int
    use_gpu: bool


def is_here(address: str | None) -> bool:
    """Return whether :func:`connect` stays on this machine, before it is called."""
    return address in ("local", "ray") or not (address or os.environ.get("RAY_ADDRESS"))


def connect(address: str | None = None) -> Place:
    """Find where a job runs, and connect to Ray where that is Ray.

    Args:
        address: A cluster: ``auto``, ``host:port`` or ``ray://…``; ``local`` for processes of this
            machine, ``ray`` for a private Ray on it that ends with this process. None means the
            cluster this job was submitted to (RAY_ADDRESS), or a Ray that this process has
            connected to already, else ``local``.

    Raises:
        ConfigError: The named cluster does not answer (``no_cluster``); Ray is not installed
            (``no_ray``).
    """
    if address == "local":
        return "local"
    named = None if address == "ray" else address or os.environ.get("RAY_ADDRESS")
    if not named and "ray" not in sys.modules:
        if address is None:
            return "local"
        private_ray.set_environment()  # which Ray reads when it is imported
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ConfigError(
            "This runs on Ray, which is not installed here.",
            hint="Install it: pip install 'pathflip[ray]'; or leave --ray, --address and "
            "RAY_ADDRESS out to run in processes of this machine.",
            code="no_ray",
        ) from error

    if ray.is_initialized():
        return "cluster" if named else "ray"
    if named:
        try:
            ray.init(address=address or "auto", logging_level=logging.WARNING)
        except (ConnectionError, TimeoutError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"No Ray cluster answers at {named}: {error}",
                hint="Check the address and RAY_AUTH_MODE / the token, or leave --address out to "
                "run on this machine.",
                code="no_cluster",
            ) from error
        atexit.register(_leave)
        return "cluster"
    if address is None:
        return "local"
    folder = PrivateFolder()
    atexit.register(_end, folder)
    private_ray.start(ray, folder.path)
    return "ray"


def _leave() -> None:
    """Send what Ray still says of lost nodes while it ends, after the document, to stderr."""
    sys.stdout.flush()
    sys.stdout = sys.stderr


def _end(folder: PrivateFolder) -> None:
    """Stop Ray, then remove its folder: what Ray registered for the end comes after this."""
    import ray

    ray.shutdown()
    folder.remove()


def available(device: str, *, place: Place) -> Available:
    """Return the CPUs and GPUs that a job may use; it is connected already.

    Args:
        device: The job's setting: auto, cpu or cuda.
        place: Engine; see :func:`connect`.

    Raises:
        ConfigError: The device is cuda and this machine, which is all there is, has no GPU
            (``no_gpu``).
    """
    gpus = 0
    if place == "local":
        cpus = cpus_here()
        if device != "cpu":
            gpus = gpus_here()
    else:
        import ray

        found = ray.cluster_resources()  # type: ignore[no-untyped-call]
        cpus = int(found.get("CPU", 1))
        if device != "cpu":
            gpus = int(found.get("GPU", 0))
    if device == "cuda" and place != "cluster" and not gpus:
        raise ConfigError(
            "device is cuda but this machine has no GPU.",
            hint="Leave device on auto, or name a cluster with GPUs (--address).",
            code="no_gpu",
        )
    return Available(cpus=cpus, gpus=gpus, use_gpu=gpus > 0 or device == "cuda")


def gpus_here() -> int:
    """Return the GPUs this process sees; torch, which takes seconds, is asked only if there may be.

    Where there is no device of a GPU, there is none.
    """
    if not any(True for pattern in _GPU_NODES for _ in Path("/dev").glob(pattern)):
        return 0
    import torch

    return torch.cuda.device_count()
