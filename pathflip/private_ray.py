"""A Ray of one's own on this machine: what keeps it apart from other users and other Rays.

Jobs (``jobs/cluster.py``) and the service (``serve/session.py``) start theirs with these variables
and arguments. Nothing here imports Ray, which reads the variables when it is imported.
"""

from __future__ import annotations

import logging
import os
import secrets
from pathlib import Path
from typing import Any

_ROOT = str(Path(__file__).resolve().parents[1])  # of pathflip, jobs and serve
OBJECT_STORE_BYTES = 256 << 20
"""Rows hold metadata and requests are small, pixels pass neither: this is plenty."""
_ATTEMPTS = 3


def set_environment() -> None:
    """Set what Ray reads: a token that only this process and its children know, no metrics, quiet.

    What the user has set stays.
    """
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    for name, value in {
        "RAY_AUTH_MODE": "token",
        # The exporter of metrics would listen to everybody, without a token.
        "RAY_enable_metrics_collection": "0",
        # Logs of Ray and Lance do not help whoever reads a terminal.
        "RAY_BACKEND_LOG_LEVEL": "fatal",
        "LANCE_LOG": "error",
        # Ray starts workers at niceness 15: right beside a service, wrong for one's own machine.
        "RAY_worker_niceness": "0",
    }.items():
        os.environ.setdefault(name, value)


def start(ray: Any, folder: Path) -> None:
    """Start a Ray that has no dashboard, autoscaler or collector of logs, and connect to it.

    Those three would take 270 MB and two CPU seconds, two of them show metrics to everybody at
    ports that all Rays of a machine share, and none is of use on one machine.

    Args:
        ray: The module: the library does not import it.
        folder: A :class:`pathflip.files.PrivateFolder`: sockets, logs and spilled objects are in
            it, and Ray would let everybody write where it puts them by itself.
    """
    node = ray._private.node.Node
    for attendant in ("start_monitor", "start_api_server", "start_log_monitor"):
        setattr(node, attendant, lambda *_, **__: None)
    for left in reversed(range(_ATTEMPTS)):
        # Workers would look for modules in the working folder first, where a jobs.py may lie.
        job = ray.job_config.JobConfig(_py_driver_sys_path=[_ROOT])
        job._runtime_env_has_working_dir = lambda: True
        try:
            ray.init(
                job_config=job,
                address="local",
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=False,
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=str(folder / "ray"),
            )
            return
        except Exception as error:  # Ray raises no narrower type here
            ray.shutdown()
            # Ray waits a fixed 30 s for its own processes, too little on a busy machine.
            if not left or "timed out during startup" not in str(error):
                raise
