"""The service as one Ray Serve application: ``serve run serve.app:build archive=… run=…``.

``pathflip serve`` is :func:`run`. Parts are ordinary classes; here each becomes a deployment with
its own number of replicas, and the ingress reaches them through :class:`Remote`.

==============  ===========================================================
deployment      what
==============  ===========================================================
``ingress``     HTTP: who asks, limits, audit, routes (:mod:`serve.ingress`)
``embedder``    texts and pictures to vectors (:mod:`serve.embedder`)
``search``      the archive: search and slides (:mod:`serve.search`)
``grounding``   heat and classes (:mod:`serve.grounding`)
``Instructor``  answers (:mod:`serve.chat_engine`); only with a language model
==============  ===========================================================
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
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pathflip.config import load_config
from pathflip.errors import CheckpointError, ConfigError, PathFLIPError
from serve import proxy
from serve.auth import is_loopback, read_tokens
from serve.limits import Limits, Refused

logger = logging.getLogger(__name__)

NAME = "pathflip"


@dataclass(frozen=True, kw_only=True)
class Replicas:
    """How a deployment runs and grows.

    Args:
        min_replicas: At least.
        max_replicas: At most.
        target: Requests at work a replica is meant to have.
        ongoing: Requests a replica takes at once.
        queued: Requests that may wait for a replica; of more, the rest are refused (429).
        cpus: Of one replica.
        gpus: Of one replica.
        upscale_s: How long there must be too much before there are more.
        downscale_s: How long there must be too little before there are fewer.
    """

    min_replicas: int = 1
    max_replicas: int = 1
    target: float = 2.0
    ongoing: int = 16
    queued: int = 64
    cpus: float = 0.1
    gpus: float = 0.0
    upscale_s: float = 5.0
    downscale_s: float = 120.0

    def options(self, drain_s: float) -> dict[str, Any]:
        """The options of a deployment whose replicas may finish for so many seconds."""
        return {
            "autoscaling_config": {
                "min_replicas": self.min_replicas,
                "max_replicas": self.max_replicas,
                "target_ongoing_requests": self.target,
                "upscale_delay_s": self.upscale_s,
                "downscale_delay_s": self.downscale_s,
            },
            "max_ongoing_requests": self.ongoing,
            "max_queued_requests": self.queued,
            "backpressure_config": {"status_code": 429, "retry_after_s": 1},
            "graceful_shutdown_timeout_s": drain_s,
            "graceful_shutdown_wait_loop_s": 0.2,
            "health_check_period_s": 5,
            "health_check_timeout_s": 20,
            # Paths hold ids of slides: the audit log has them, no other log.
            "logging_config": {"enable_access_log": False, "log_level": "WARNING"},
            "ray_actor_options": {"num_cpus": self.cpus, "num_gpus": self.gpus},
        }


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Settings of the service.

    Args:
        archive: What is served.
        run: The run whose model searches, grounds and classifies.
        llm: What answers: a tuned run, or where the base of one is now. Where ``run`` is a tuned
            run it answers itself.
        token_file: Who may ask (:mod:`serve.auth`); without, this machine alone.
        audit: Folder of the audit log; ``RUN/audit`` by default.
        encoder: How to load the archive's encoder, for pictures; by default by its name.
        device: Of the small models: ``cpu``, ``cuda`` or ``auto``.
        refresh_s: How old what is known of the archive may be.
        patients: Whether ids of patients may be asked for and are told.
        drain_s: Time for answers at work when a replica or the service is stopped.
        limits: Of one ingress replica.
        ingress, embedder, search, grounding, instructor: Replicas of each.
        engine: Settings of the instructor.
    """

    archive: str
    run: str
    llm: str | None = None
    token_file: str | None = None
    audit: str | None = None
    encoder: str | None = None
    device: str = "cpu"
    refresh_s: float = 30.0
    patients: bool = False
    drain_s: float = 30.0
    limits: Limits = field(default_factory=Limits)
    # The guard counts what is at work; Serve's own limit is a second wall behind it.
    ingress: Replicas = field(
        default_factory=lambda: Replicas(max_replicas=2, target=32, ongoing=256, queued=256)
    )
    embedder: Replicas = field(default_factory=lambda: Replicas(max_replicas=4))
    search: Replicas = field(default_factory=lambda: Replicas(max_replicas=4, target=8))
    grounding: Replicas = field(default_factory=lambda: Replicas(max_replicas=4, target=1))
    instructor: Replicas = field(
        default_factory=lambda: Replicas(max_replicas=2, target=16, ongoing=64, cpus=0.75)
    )
    engine: dict[str, Any] = field(default_factory=dict)


def build(args: Mapping[str, Any]) -> Any:
    """Makes the application.

    Args:
        args: Fields of :class:`ServeConfig`, nested ones with dots
            (``limits.concurrent=8``) or as mappings.

    Returns:
        A ``ray.serve.Application``.

    Raises:
        ConfigError: A setting, the token file or the audit folder is wrong.
        ArchiveError, CheckpointError: There is no archive or no finished run, or the language model
            is missing.
    """
    plain = {key: value for key, value in args.items() if "." not in key}
    dotted = [f"{key}={value}" for key, value in args.items() if "." in key]
    config = load_config(ServeConfig, given=plain, overrides=dotted)
    return application(config, check(config))


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What a service is made of, found to be there: paths are whole, workers have other folders.

    Attributes:
        archive, run, llm, token_file, audit: As in :class:`ServeConfig`.
        model, fingerprint: Of the run.
        chat: Whether something answers.
    """

    archive: str
    run: str
    llm: str | None
    token_file: str | None
    audit: str
    model: str
    fingerprint: str
    chat: bool


def check(config: ServeConfig) -> Checked:
    """Opens what the settings name, so that what is wrong is said before anything starts.

    Raises:
        ConfigError, ArchiveError, CheckpointError: See :func:`build`.
    """
    from pathflip.archive import Archive
    from pathflip.archive.storage import normalise
    from pathflip.checkpoints import is_tuned, load_run
    from pathflip.evaluation.encode import check_fits

    def whole(path: str | None) -> str | None:
        return None if path is None else str(Path(path).expanduser().absolute())

    token_file, llm, run = whole(config.token_file), whole(config.llm), str(whole(config.run))
    if token_file is not None:
        read_tokens(token_file)
    opened, loaded = Archive(normalise(config.archive)), load_run(run)
    check_fits(opened, loaded)
    if loaded.name not in opened.models():
        logger.warning(
            "The archive has no vectors of model %s: search by meaning answers 409. "
            "Run: pathflip index --archive %s --run %s",
            loaded.name, config.archive, config.run,
        )  # fmt: skip
    tuned = any(path and is_tuned(path) for path in (run, llm))
    if llm is not None and not tuned:
        raise CheckpointError(
            f"Neither {config.run} nor {config.llm} is a tuned run, so nothing can answer.",
            hint="Make one: pathflip tune --archive URI --run DIR --llm DIR --out DIR",
            code="not_tuned",
        )
    return Checked(
        archive=opened.uri,
        run=run,
        llm=llm,
        token_file=token_file,
        audit=str(whole(config.audit or f"{run}/audit")),
        model=loaded.name,
        fingerprint=loaded.fingerprint,
        chat=tuned,
    )


def application(config: ServeConfig, checked: Checked) -> Any:
    """The application of settings that were checked; see :func:`build`."""
    from ray import serve

    from serve.embedder import Embedder
    from serve.grounding import Grounding
    from serve.search import Search

    archive, run = checked.archive, checked.run

    def deployed(part: Any, name: str, replicas: Replicas) -> Any:
        return serve.deployment(name=name, **replicas.options(config.drain_s))(part)

    parts = {
        "embedder": deployed(Embedder, "embedder", config.embedder).bind(
            archive, run, encoder=config.encoder, device=config.device
        ),
        "search": deployed(Search, "search", config.search).bind(
            archive, model=checked.model, fingerprint=checked.fingerprint,
            refresh_s=config.refresh_s, patients=config.patients,
        ),
        "grounding": deployed(Grounding, "grounding", config.grounding).bind(
            archive, run, device=config.device, refresh_s=config.refresh_s
        ),
    }  # fmt: skip
    if checked.chat:
        from serve.chat_engine import Instructor

        parts["instructor"] = Instructor.options(**config.instructor.options(config.drain_s)).bind(  # type: ignore[attr-defined]
            archive, run, checked.llm, config.engine
        )
    hidden = {archive: "the archive", config.archive: "the archive", run: "the run"}
    if checked.llm is not None:
        hidden[checked.llm] = "the language model"
    ingress: Any = deployed(serve.ingress()(Ingress), "ingress", config.ingress)
    return ingress.bind(
        parts,
        limits=config.limits,
        token_file=checked.token_file,
        audit=checked.audit,
        hidden=hidden,
        drain_s=config.drain_s,
    )


class Remote:
    """A deployment as if its object were here: methods are awaited, errors are ours.

    Args:
        handle: Of the deployment.
        streams: Methods that are asynchronous generators.
        retried: Whether a call is made a second time when its replica died under it.
    """

    def __init__(self, handle: Any, *, streams: tuple[str, ...] = (), retried: bool = True) -> None:
        self._handle, self._streams, self._tries = handle, streams, 2 if retried else 1

    def __getattr__(self, method: str) -> Any:
        if method.startswith("_"):
            raise AttributeError(method)
        streams = method in self._streams
        # Serve makes a handle anew for each option and each method: here it is made once.
        handle = getattr(self._handle.options(stream=True) if streams else self._handle, method)

        async def call(*args: Any, **kwargs: Any) -> Any:
            for left in reversed(range(self._tries)):
                try:
                    return await handle.remote(*args, **kwargs)
                except Exception as error:
                    ours = _ours(error)
                    if left and ours.code == "unavailable":
                        continue
                    raise ours from None
            raise AssertionError("at least one attempt")

        async def stream(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
            found = handle.remote(*args, **kwargs)
            try:
                async for item in found:
                    yield item
            except Exception as error:
                raise _ours(error) from None
            finally:
                found.cancel()

        made = stream if streams else call
        setattr(self, method, made)
        return made


def _ours(error: Exception) -> PathFLIPError:
    """What an error of a call means; others are raised as they are."""
    from ray.exceptions import RayActorError, RayTaskError
    from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, PathFLIPError):
        return cause
    if isinstance(cause, BackPressureError):
        return Refused("Too much is going on; try again.", code="busy")
    if isinstance(cause, RayActorError | DeploymentUnavailableError):
        return Refused("This part of the service is restarting; try again.", code="unavailable")
    raise error


class Ingress:
    """The ingress replica: the routes of :mod:`serve.ingress` over handles.

    Args:
        parts: {name: handle}.
        limits: See :class:`serve.limits.Limits`.
        token_file: Who may ask.
        audit: Folder of the audit log.
        hidden: What messages must not show.
        drain_s: See :class:`ServeConfig`.
    """

    def __init__(
        self,
        parts: Mapping[str, Any],
        *,
        limits: Limits,
        token_file: str | None,
        audit: str,
        hidden: Mapping[str, str],
        drain_s: float,
    ) -> None:
        from serve.audit import AuditLog
        from serve.ingress import Parts, make_app

        remote = {
            name: Remote(handle, streams=("chat",), retried=name != "instructor")
            for name, handle in parts.items()
        }
        self._audit, self._drain_s = AuditLog(audit), drain_s
        self._app = make_app(
            Parts(**remote, hidden=hidden),
            limits=limits,
            tokens=None if token_file is None else read_tokens(token_file),
            audit=self._audit,
            proofs=proxy.Proofs.here(),
        )

    def __serve_build_asgi_app__(self) -> Any:
        return self._app

    async def drain(self) -> None:
        """Lets what is at work finish while the parts are still there to ask."""
        await self._app.drain(self._drain_s)

    def __del__(self) -> None:
        if hasattr(self, "_audit"):
            self._audit.close()


# -- on this machine ------------------------------------------------------------------------------


class _Stopped(BaseException):
    """SIGTERM or SIGINT arrived."""


def run(
    config: ServeConfig,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    ready: Callable[[dict[str, Any]], None],
) -> None:
    """Serves until SIGTERM or SIGINT, then lets the answers at work finish.

    Args:
        config: Settings.
        host: Address to listen on; other than loopback only with a token file.
        port: Likewise; 0 is not taken.
        ready: Told once, with {"url", "pid", "archive", "chat",
            "audit"}, when every part is up.

    Raises:
        ConfigError: ``no_tokens``, ``port``, or what :func:`build` raises.
    """
    if config.token_file is None and not is_loopback(host):
        raise ConfigError(
            f"Without tokens the service listens on this machine only, not on {host}.",
            hint="Give --token-file; docs/serve.md shows one.",
            code="no_tokens",
        )
    _check_port(host, port)
    checked = check(config)
    stopped = threading.Event()

    def stop(*_: Any) -> None:
        if not stopped.is_set():
            stopped.set()
            raise _Stopped

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    folder = tempfile.TemporaryDirectory(prefix="pathflip-", ignore_cleanup_errors=True)
    try:
        _start(config, checked, host, port, folder.name)
        for number in before:  # Ray has put its own in place, which end in an abort
            signal.signal(number, stop)
        bracketed = f"[{host}]" if ":" in host else host
        url = f"http://{bracketed}:{port}"
        about = {"archive": config.archive, "chat": checked.chat, "audit": checked.audit}
        ready({"url": url, "pid": os.getpid()} | about)
        threading.Event().wait()
    except _Stopped:
        pass
    finally:
        stopped.set()
        _stop(config.drain_s)
        folder.cleanup()
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(config: ServeConfig, checked: Checked, host: str, port: int, folder: str) -> None:
    _set_environment(folder)
    import ray
    from ray import serve

    # Their news is not the user's; and what Ray forks becomes another program at once.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message="lance(db)? (is not fork-safe|fork support)")

    app = application(config, checked)
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
    """What Ray reads when it is imported: a token that only this process and its children know."""
    os.environ.update(proxy.environment(folder))
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # Ray's exporter would listen to everybody, without a token.
    os.environ.setdefault("RAY_enable_metrics_collection", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("LANCE_LOG", "error")
    os.environ.setdefault("RAY_worker_niceness", "0")


def _stop(drain_s: float) -> None:
    import ray

    if not ray.is_initialized():
        return
    try:
        asyncio.run(_end(drain_s))
    except Exception as error:  # Ray raises no narrower type; nothing may keep the process
        logger.warning("Serve did not stop in order: %s", error)


async def _end(drain_s: float) -> None:
    """Serve's handle belongs to this event loop, which must run until Serve is gone, and Ray."""
    import ray
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        # Serve would stop all parts at once, also those that answers at work have yet to ask.
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
