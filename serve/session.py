"""The process in which the Ray of ``pathflip serve`` lives, below that of :mod:`serve.local`.

It has a session and a folder of its own. What it is to serve comes as the first line on its
standard input; it reports by lines of JSON. Its parent stops it by another line, or by dying: the
end of its input means that nobody is left to stop it, and it takes everything down by itself.

Read in this order: :func:`main`, :func:`_serve`, :func:`_drain`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import queue
import sys
import threading
import time
import traceback
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from pathflip import private_ray
from pathflip.errors import ConfigError, PathFLIPError
from pathflip.files import remove_tree
from serve import logs, processes, proxy
from serve.app import NAME, application
from serve.config import CheckedAside, ServeConfig, from_arguments

logger = logging.getLogger(__name__)

WATCH_S = 1.0
"""Seconds between two looks at Ray's own processes."""


def main() -> None:
    """Serve as the first line of standard input says; end by itself, with everything below."""
    reports = os.fdopen(int(sys.argv[1]), "w")
    os.set_inheritable(reports.fileno(), False)
    processes.adopt_orphans()

    def report(**message: Any) -> None:
        print(json.dumps(message), file=reports, flush=True)

    order = json.loads(sys.stdin.readline())
    folder = Path(order["folder"])
    events: queue.SimpleQueue[PathFLIPError | None] = queue.SimpleQueue()
    threading.Thread(target=_obey, args=(folder, events), daemon=True).start()
    try:
        config = from_arguments(order["config"])
        about = _serve(config, order["host"], order["port"], folder, events)
        report(ready=about)
        if (died := events.get()) is not None:
            raise died
        _drain(config.drain_s)
        report(stopped=True)
    except BaseException as error:  # the outermost line of the service
        broken = _ray_died()
        if broken is None and isinstance(error, PathFLIPError):
            broken = error
        if broken is None:
            traceback.print_exc()
            broken = PathFLIPError(f"The service did not start: {error!r}.", code="start")
        report(error=broken.to_dict())
    sys.stderr.flush()
    os._exit(0)  # the parent ends what is left: nothing here can hold it up


def _obey(folder: Path, events: queue.SimpleQueue[PathFLIPError | None]) -> None:
    """Wait for the parent's line; where it dies, end everything."""
    if sys.stdin.readline():
        events.put(None)
        sys.stdin.readline()
    processes.kill_below(os.getpid())
    remove_tree(folder)
    os._exit(1)


def _serve(
    config: ServeConfig,
    host: str,
    port: int,
    folder: Path,
    events: queue.SimpleQueue[PathFLIPError | None],
) -> dict[str, Any]:
    """Start Ray and the service; return what the ready line says of it."""
    checking = CheckedAside(config)
    os.environ.update(proxy.environment(folder))
    private_ray.set_environment()
    os.environ.update(processes.SETUP_HOOK)
    os.environ[logs.FILE] = str(folder / "log")
    processes.import_serve()
    import ray
    from ray import serve

    # Ray's news is not the user's, and whatever Ray forks becomes another program at once.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message="lance(db)? (is not fork-safe|fork support)")

    inputs = checking.result()
    app = application(config, inputs)
    private_ray.start(ray, folder)
    threading.Thread(target=_watch, args=(folder, events), daemon=True).start()
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
        print(error, file=sys.stderr)
        last = str(error).strip().splitlines()[-1][:500]
        raise ConfigError(
            f"The service did not start: {last}",
            hint="Mend that; where the part failed stands above, on standard error.",
            code="start",
        ) from error
    return {
        "archive": config.archive,
        "chat": inputs.chat,
        "patches": inputs.patch_model,
        "audit": inputs.audit,
    }


def _watch(folder: Path, events: queue.SimpleQueue[PathFLIPError | None]) -> None:
    """Report when a process of Ray has died without which nothing that dies is started again.

    Beside that, pass the log on and let nothing that has ended below this process stay.
    """
    shown = 0
    while (died := _ray_died()) is None:
        rays = {info.process.pid for info in _ray_processes().values()}
        processes.reap(processes.children(os.getpid()) - rays)
        shown = logs.pass_on(folder / "log", shown)
        time.sleep(WATCH_S)
    events.put(died)


def _ray_processes() -> dict[str, Any]:
    """Processes of Ray that this one started: {``gcs_server`` or ``raylet``: Ray's note of it}."""
    if "ray" not in sys.modules:
        return {}
    from ray._private import worker

    node: Any = worker._global_node
    return {} if node is None else {kind: own[0] for kind, own in node.all_processes.items()}


def _ray_died() -> PathFLIPError | None:
    """Return the error of a service whose Ray has lost a process, if it has."""
    for kind, info in _ray_processes().items():
        if info.process.poll() is not None:
            return PathFLIPError(
                f"The service has ended: Ray's {kind} died, without which no part is restarted.",
                hint="Start it again; the system's log may say what killed the process.",
                code="service_died",
            )
    return None


def _drain(drain_s: float) -> None:
    """Let running answers finish, then take the application down."""
    try:
        asyncio.run(_drain_and_delete(drain_s))
    except Exception as error:  # Ray raises no narrower type; nothing may keep the process
        logger.warning("Serve did not stop in order: %s", error)


async def _drain_and_delete(drain_s: float) -> None:
    """Drain and delete the application, in the event loop of Serve's handle."""
    from ray import serve
    from ray.serve.exceptions import RayServeException

    # Serve would stop all parts at once, also those that running answers still need.
    with suppress(RayServeException):
        handle = serve.get_app_handle(NAME)
        await handle.broadcast("drain").results_async(timeout_s=drain_s + 5)
    await asyncio.to_thread(serve.delete, NAME)


if __name__ == "__main__":
    main()
