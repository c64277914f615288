"""The service as one Ray Serve application: ``serve run serve.app:build archive=… run=…``.

``pathflip serve`` runs it on this machine (:mod:`serve.local`). The parts are ordinary classes;
here each becomes a deployment with its own replicas, which the ingress reaches through a
:class:`DeploymentClient`. Only that of pixels is in the ingress itself: a call to another replica
takes more than a tile, and slides are read in processes of their own anyway.

==============  ===========================================================
deployment      serves
==============  ===========================================================
``ingress``     HTTP: tokens, limits, audit log, routes (:mod:`serve.ingress`); pixels of slides
                (:mod:`serve.tiles`)
``embedder``    vectors of texts and pictures (:mod:`serve.embedder`)
``search``      search and slides of the archive (:mod:`serve.search`)
``grounding``   heatmaps and classes (:mod:`serve.grounding`)
``annotations`` what clients draw on slides (:mod:`serve.annotations`)
``instructor``  answers (:mod:`serve.chat_engine`); only with a language model
==============  ===========================================================
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from pathflip import tracing
from pathflip.errors import PathFLIPError
from serve import proxy
from serve.auth import read_tokens
from serve.config import Replicas, ServeConfig, ServiceInputs, check_inputs, from_arguments
from serve.limits import Limits, RequestError
from serve.reader_pool import ReadingConfig

NAME = "pathflip"
"""Name of the Ray Serve application."""
ASK_S = 1.0
"""Seconds after which a call that is not answered asks whether anybody is there to answer it."""
_FAILED = ("UNHEALTHY", "DEPLOY_FAILED")


def build(args: Mapping[str, Any]) -> Any:
    """Build the application from the arguments of ``serve run`` or ``serve deploy``.

    Args:
        args: Fields of :class:`serve.config.ServeConfig`, nested ones with dots
            (``limits.concurrent=8``) or as mappings.

    Returns:
        A ``ray.serve.Application``.

    Raises:
        ConfigError: A setting or the token file is wrong.
        ArchiveError: There is no archive, or the run does not belong to it.
        CheckpointError: There is no finished run, or the language model is missing.
    """
    config = from_arguments(args)
    return application(config, check_inputs(config))


def application(config: ServeConfig, inputs: ServiceInputs) -> Any:
    """Bind the ingress to all parts of a service.

    Args:
        config: Settings.
        inputs: Result of :func:`serve.config.check_inputs`.

    Returns:
        A ``ray.serve.Application``.
    """
    return bind_ingress(config, inputs, bind_parts(config, inputs))


def bind_parts(config: ServeConfig, inputs: ServiceInputs) -> dict[str, Any]:
    """Bind every deployment but the ingress: {name: application}."""
    from serve.annotations import Annotations
    from serve.embedder import Embedder
    from serve.grounding import Grounding
    from serve.search import Search

    archive, run = inputs.archive, inputs.run
    parts = {
        "embedder": _deployment(Embedder, "embedder", config).bind(
            archive, run, encoder=config.encoder, device=config.device, patches=inputs.patches
        ),
        "search": _deployment(Search, "search", config).bind(
            archive, model=inputs.model, fingerprint=inputs.fingerprint,
            refresh_s=config.refresh_s, patients=config.patients, labels=config.labels,
        ),
        "grounding": _deployment(Grounding, "grounding", config).bind(
            archive, run, device=config.device, refresh_s=config.refresh_s
        ),
        "annotations": _deployment(Annotations, "annotations", config).bind(
            archive, refresh_s=config.refresh_s
        ),
    }  # fmt: skip
    if inputs.chat:
        from serve.chat_engine import ChatEngine

        parts["instructor"] = _deployment(ChatEngine, "instructor", config).bind(
            archive, run, inputs.llm, config.engine
        )
    return parts


def bind_ingress(config: ServeConfig, inputs: ServiceInputs, parts: Mapping[str, Any]) -> Any:
    """Bind the ingress to the applications of its parts."""
    from ray import serve

    return _deployment(serve.ingress()(Ingress), "ingress", config).bind(
        parts,
        archive=inputs.archive,
        reading=config.reading,
        refresh_s=config.refresh_s,
        limits=config.limits,
        token_file=inputs.token_file,
        audit=inputs.audit,
        redactions=redactions(config, inputs),
        drain_s=config.drain_s,
        session_key=os.urandom(32),
        traced=tracing.endpoint() is not None,
    )


def redactions(config: ServeConfig, inputs: ServiceInputs) -> dict[str, str]:
    """{path or URI of the server: what clients are shown instead}."""
    found = {
        inputs.archive: "the archive", config.archive: "the archive", inputs.run: "the run",
    }  # fmt: skip
    if inputs.llm is not None:
        found[inputs.llm] = "the language model"
    if inputs.patches is not None:
        found[inputs.patches.removeprefix("mrplip:")] = "the patch model"
    return found


def _deployment(part: Any, name: str, config: ServeConfig) -> Any:
    from ray import serve

    if name != "ingress" and tracing.endpoint() is not None:
        part = tracing.traced(part, name=name)
    replicas: Replicas = getattr(config, name)
    options = replicas.options(config.drain_s)
    # Paths contain slide ids, which belong in the audit log and in no other. Errors of a part name
    # slides, too: the ingress answers them, and writes those to the log that are not the client's.
    level = "WARNING" if name == "ingress" else "CRITICAL"
    options["logging_config"] = {"enable_access_log": False, "log_level": level}
    return serve.deployment(name=name, **options)(part)


class Failures:
    """Deployments without a replica, as Serve's controller knows them.

    Args:
        statuses: Asks the controller: {deployment: its status}.
    """

    def __init__(self, statuses: Callable[[], Mapping[str, Any]]) -> None:
        self._statuses = statuses
        self._failed: frozenset[str] = frozenset()
        self._at, self._lock = -ASK_S, asyncio.Lock()

    async def has(self, name: str, *, ask: bool = True) -> bool:
        """Return whether a deployment has failed and no replica of it is there to answer.

        Args:
            name: Name of the deployment.
            ask: Whether to ask the controller even where all was well when it was last asked.
        """
        if ask or name in self._failed:
            async with self._lock:
                if time.monotonic() - self._at >= ASK_S:
                    await self._ask()
        return name in self._failed

    async def _ask(self) -> None:
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        try:
            async with asyncio.timeout(2 * ASK_S):
                found = await asyncio.to_thread(self._statuses)
        except (RayError, RayServeException, TimeoutError, KeyError):
            # The controller is restarting, or it is not there yet: calls wait as Serve lets them.
            self._failed = frozenset()
        else:
            self._failed = frozenset(name for name, about in found.items() if _has_failed(about))
        self._at = time.monotonic()


def _has_failed(status: Any) -> bool:
    there = {state for state, count in status.replica_states.items() if count} - {"STARTING"}
    return not there and status.status in _FAILED


def _statuses() -> Mapping[str, Any]:
    """Return the deployments with their replicas if one of them is not well, else none.

    Serve's public status holds every setting of every deployment, 0.1 to 0.2 CPU seconds each time.
    """
    from ray import serve
    from ray.serve.context import _get_global_client

    client = _get_global_client()  # None only where it is asked not to raise
    brief = [] if client is None else client.get_serve_status(NAME).deployment_statuses
    if not any(one.status in _FAILED for one in brief):
        return {}
    return serve.status().applications[NAME].deployments


def _nodes() -> int:
    """Return the number of nodes of the cluster that are up."""
    import ray

    found: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return sum(bool(node["Alive"]) for node in found)


class DeploymentClient:
    """Asynchronous client of a deployment; maps Ray's errors to :class:`PathFLIPError`.

    Its attributes are the deployment's methods. Serve lets a call wait until there is a replica;
    here one that would wait for a failed deployment is refused, so that it takes no place of calls
    to others.

    Args:
        handle: Handle of the deployment.
        streams: Names of methods that are asynchronous generators.
        retried: Whether a call is repeated once if its replica died under it.
        failures: Deployments without a replica; None refuses no call.
        traced: Whether its methods take the span that a call is a part of.
    """

    def __init__(
        self,
        handle: Any,
        *,
        streams: tuple[str, ...] = (),
        retried: bool = True,
        failures: Failures | None = None,
        traced: bool = False,
    ) -> None:
        self._handle, self._streams, self._tries = handle, streams, 2 if retried else 1
        self._failures, self._traced = failures, traced

    def __getattr__(self, method: str) -> Any:
        if method.startswith("_"):
            raise AttributeError(method)
        streams = method in self._streams
        # Serve makes a new handle for each option and each method; this one is kept.
        handle = getattr(self._handle.options(stream=True) if streams else self._handle, method)

        async def call(*args: Any, **kwargs: Any) -> Any:
            for left in reversed(range(self._tries)):
                try:
                    await self._check(ask=False)
                    response = handle.remote(*args, **kwargs, **self._parent())
                    return await self._answer(response, response)
                except Exception as error:
                    mapped = _map_error(error)
                    if left and mapped.code == "unavailable":
                        continue
                    raise mapped from None
            raise AssertionError("at least one attempt")

        async def stream(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
            await self._check(ask=False)
            found = handle.remote(*args, **kwargs, **self._parent())
            try:
                items = aiter(found)
                first = await self._answer(anext(items, _NOTHING), found)
                if first is not _NOTHING:
                    yield first
                async for item in items:
                    yield item
            except Exception as error:
                raise _map_error(error) from None
            finally:
                found.cancel()

        made = stream if streams else call
        setattr(self, method, made)
        return made

    def _parent(self) -> dict[str, str]:
        parent = tracing.traceparent() if self._traced else None
        return {} if parent is None else {"traceparent": parent}

    async def _check(self, *, ask: bool) -> None:
        if self._failures and await self._failures.has(self._handle.deployment_name, ask=ask):
            raise RequestError("This part of the service is restarting.", code="unavailable")

    async def _answer(self, awaited: Awaitable[Any], response: Any) -> Any:
        """Await what a response brings, as long as there is anybody to bring it."""
        if self._failures is None:
            return await awaited
        answer = asyncio.ensure_future(awaited)
        try:
            while not (await asyncio.wait((answer,), timeout=ASK_S))[0]:
                try:
                    await self._check(ask=True)
                except RequestError:
                    response.cancel()
                    raise
            return answer.result()
        finally:
            answer.cancel()


_NOTHING = object()


def _map_error(error: Exception) -> PathFLIPError:
    """Map an error of a call to one of ours; raise any other as it is."""
    from ray.exceptions import RayActorError, RayTaskError
    from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, PathFLIPError):
        return cause
    if isinstance(cause, BackPressureError):
        return RequestError("Too many concurrent requests.", code="busy")
    if isinstance(cause, RayActorError | DeploymentUnavailableError):
        return RequestError("This part of the service is restarting.", code="unavailable")
    raise error


class Ingress:
    """Ingress replica: the routes of :mod:`serve.ingress` over deployment handles.

    Args:
        parts: {name: handle}.
        archive: URI of the archive whose slides are shown.
        reading: Readers of slides.
        refresh_s: Seconds until new commits to the archive are looked for.
        limits: Limits of this replica.
        token_file: Clients and their tokens; None answers this machine alone.
        audit: Folder of the audit log.
        redactions: {path or URI of the server: what to show instead} in messages.
        drain_s: Seconds that running answers have when the replica is stopped.
        session_key: Secret of sessions, the same in all replicas; with HAProxy it has another.
        traced: Whether the parts take the span that a call is a part of.
    """

    def __init__(
        self,
        parts: Mapping[str, Any],
        *,
        archive: str,
        reading: ReadingConfig,
        refresh_s: float,
        limits: Limits,
        token_file: str | None,
        audit: str,
        redactions: Mapping[str, str],
        drain_s: float,
        session_key: bytes,
        traced: bool,
    ) -> None:
        from serve import logs
        from serve.audit import AuditLog
        from serve.ingress import make_app
        from serve.routing import Parts
        from serve.sign_in import ended_folder, warn_of_nodes
        from serve.tiles import Tiles

        logs.set_up()
        tracing.check()
        failures = Failures(_statuses)
        clients = {
            name: DeploymentClient(
                handle,
                streams=("chat",),
                retried=name != "instructor",
                failures=failures,
                traced=traced,
            )
            for name, handle in parts.items()
        }
        tokens = None if token_file is None else read_tokens(token_file)
        proxy.admit(None if tokens is None else {one.name: own for own, one in tokens.digests})
        self._audit, self._drain_s = AuditLog(audit), drain_s
        if tokens is not None:
            warn_of_nodes(ended_folder(self._audit.path), nodes=_nodes())
        tiles = tracing.traced(Tiles, name="tiles") if traced else Tiles
        self._app = make_app(
            Parts(
                **clients,
                tiles=tiles(archive, config=reading, refresh_s=refresh_s),
                redactions=redactions,
            ),
            limits=limits,
            tokens=tokens,
            audit=self._audit,
            proofs=proxy.Proofs.here(),
            session_key=session_key,
        )

    def __serve_build_asgi_app__(self) -> Any:
        return self._app

    async def drain(self) -> None:
        """Wait for running requests while the parts they still need are there."""
        await self._app.drain(self._drain_s)

    def __del__(self) -> None:
        if hasattr(self, "_audit"):
            self._audit.close()
