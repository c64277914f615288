"""Settings of the service, and the checks made before anything starts.

Read in this order: :class:`ServeConfig`, :func:`check_inputs`, :class:`CheckedAside`.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pathflip import tracing
from pathflip.config import load_config
from pathflip.errors import CheckpointError, ConfigError, PathFLIPError, from_dict
from pathflip.vllm_engine import EngineConfig, context_length
from serve.auth import read_tokens
from serve.fake_engine import FakeEngineConfig
from serve.limits import Limits
from serve.reader_pool import ReadingConfig

if TYPE_CHECKING:
    from pathflip.archive import Archive

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Replicas:
    """Number, size and scaling of a deployment's replicas.

    Args:
        min_replicas: Fewest replicas; with 0, the first request waits for one to start.
        max_replicas: Most replicas.
        target: Concurrent requests per replica that scaling aims for.
        max_ongoing: Most concurrent requests of a replica (formerly ``ongoing``).
        max_queued: Most requests waiting for a replica; more are refused with 429; -1 refuses none
            (formerly ``queued``).
        cpus: CPUs Ray reserves for a replica.
        gpus: GPUs Ray reserves for a replica.
        upscale_s: Seconds of overload before a replica is added.
        downscale_s: Seconds of idleness before a replica is removed.
    """

    min_replicas: int = 1
    max_replicas: int = 1
    target: float = 2.0
    max_ongoing: int = field(default=16, metadata={"formerly": "ongoing"})
    max_queued: int = field(default=64, metadata={"formerly": "queued"})
    cpus: float = 0.1
    gpus: float = 0.0
    upscale_s: float = 5.0
    downscale_s: float = 120.0

    def options(self, drain_s: float) -> dict[str, Any]:
        """Ray Serve's options for a deployment.

        Args:
            drain_s: Seconds a replica that is stopped has to finish its requests.
        """
        return {
            "autoscaling_config": {
                "min_replicas": self.min_replicas,
                "max_replicas": self.max_replicas,
                "target_ongoing_requests": self.target,
                "upscale_delay_s": self.upscale_s,
                "downscale_delay_s": self.downscale_s,
            },
            "max_ongoing_requests": self.max_ongoing,
            "max_queued_requests": self.max_queued,
            "backpressure_config": {"status_code": 429, "retry_after_s": 1},
            "graceful_shutdown_timeout_s": drain_s,
            "graceful_shutdown_wait_loop_s": 0.2,
            "health_check_period_s": 1,
            "health_check_timeout_s": 20,
            "ray_actor_options": {"num_cpus": self.cpus, "num_gpus": self.gpus},
        }


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """Settings of a chat replica, ``engine.*`` in a configuration file.

    Args:
        backend: ``vllm``, or ``fake`` to run the service without decoding anything
            (:mod:`serve.fake_engine`).
        engine: Settings of vLLM.
        fake: Settings of the fake engine.
        prefix_cache_mb: Memory for the visual tokens of slides asked about recently.
        flush_s: Shortest time between two pieces of a stream, longer where many streams run at
            once. Every piece passes three processes; more of them than an eye can follow take the
            CPU from decoding.
    """

    backend: Literal["vllm", "fake"] = "vllm"
    engine: EngineConfig = field(default_factory=EngineConfig)
    fake: FakeEngineConfig = field(default_factory=FakeEngineConfig)
    prefix_cache_mb: int = 256
    flush_s: float = 0.04


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Settings of the service.

    Args:
        archive: URI of the archive to serve.
        run: Run whose model searches, grounds and classifies.
        llm: Tuned run that answers questions, or the present place of the base model of one.
            Where ``run`` is a tuned run it answers itself.
        token_file: Clients and their tokens (:mod:`serve.auth`); without, only this machine is
            answered.
        audit: Folder of the audit log; ``RUN/audit`` by default.
        encoder: Spec of the archive's encoder, for pictures; by default its name.
        patches: Run of a patch model whose features the archive has (``--encoder mrplip:RUN`` of
            ingest): finds patches and segments slides by words.
        device: Device of the slide model and the encoder: ``cpu``, ``cuda`` or ``auto``.
        refresh_s: Seconds after which a commit to the archive is noticed at the latest.
        patients: Whether clients may filter by patient and see patients' ids.
        labels: Whether clients may filter by labels of slides; they never see one.
        drain_s: Seconds that running answers have when a replica or the service is stopped.
        limits: Limits of one ingress replica.
        ingress, embedder, search, grounding, annotations, instructor: Replicas of each deployment.
        engine: Settings of the chat engine.
        reading: Readers of slides of one ingress replica.
    """

    archive: str
    run: str
    llm: str | None = None
    token_file: str | None = None
    audit: str | None = None
    encoder: str | None = None
    patches: str | None = None
    device: str = "cpu"
    refresh_s: float = 30.0
    patients: bool = False
    labels: bool = True
    drain_s: float = 30.0
    limits: Limits = field(default_factory=Limits)
    # The middleware counts running requests; Serve's own limit is a second wall behind it.
    ingress: Replicas = field(
        default_factory=lambda: Replicas(max_replicas=2, target=32, max_ongoing=256, max_queued=256)
    )
    embedder: Replicas = field(default_factory=lambda: Replicas(max_replicas=4))
    search: Replicas = field(default_factory=lambda: Replicas(max_replicas=4, target=8))
    # Questions that wait in one replica are answered together; one more has to encode slides anew.
    grounding: Replicas = field(
        default_factory=lambda: Replicas(max_replicas=4, target=64, max_ongoing=128)
    )
    annotations: Replicas = field(default_factory=lambda: Replicas(max_replicas=2, target=8))
    instructor: Replicas = field(
        default_factory=lambda: Replicas(max_replicas=2, target=16, max_ongoing=64, cpus=0.75)
    )
    engine: ChatConfig = field(default_factory=ChatConfig)
    reading: ReadingConfig = field(default_factory=ReadingConfig)


DEPLOYMENTS = ("ingress", "embedder", "search", "grounding", "annotations", "instructor")
"""Deployments of the service; the last only with a language model."""


def from_arguments(arguments: Mapping[str, Any]) -> ServeConfig:
    """Read the arguments that Ray Serve gives a builder.

    Args:
        arguments: Fields of :class:`ServeConfig`, nested ones with dots
            (``limits.concurrent=8``) or as mappings.

    Raises:
        ConfigError: A setting is unknown (the nearest is named) or of the wrong type.
    """
    plain = {key: value for key, value in arguments.items() if "." not in key}
    dotted = [f"{key}={value}" for key, value in arguments.items() if "." in key]
    return load_config(ServeConfig, given=plain, overrides=dotted)


@dataclass(frozen=True, kw_only=True)
class ServiceInputs:
    """Validated inputs of a service, with absolute paths: workers have other working folders.

    Attributes:
        archive, run, llm, token_file, audit: As in :class:`ServeConfig`.
        model: Id of the run's model.
        fingerprint: Fingerprint of the run's weights.
        patches: Spec of the patch model.
        patch_model: Name of the patch model in the archive.
        chat: Whether the service has a language model.
    """

    archive: str
    run: str
    llm: str | None
    token_file: str | None
    audit: str
    model: str
    fingerprint: str
    patches: str | None
    patch_model: str | None
    chat: bool


def check_inputs(config: ServeConfig) -> ServiceInputs:
    """Open everything the settings name, so that faults are reported before anything starts.

    Raises:
        ConfigError: A setting or the token file is wrong.
        ArchiveError: There is no archive, or the run does not belong to it.
        CheckpointError: There is no finished run, or the language model is missing.
    """
    from pathflip.archive import Archive
    from pathflip.archive.storage import normalise
    from pathflip.checkpoints import describe_run, is_tuned
    from pathflip.compat import check_fits

    _check_numbers(config)
    tracing.check()
    token_file, llm = _absolute(config.token_file), _absolute(config.llm)
    run = str(_absolute(config.run))
    if token_file is not None:
        read_tokens(token_file)
    archive, loaded = Archive(normalise(config.archive)), describe_run(run)
    check_fits(archive, loaded)
    if loaded.name not in archive.models():
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
    if tuned and config.engine.backend == "fake":
        logger.warning("engine.backend is fake: answers are scripted, no language model is asked.")
    if tuned:
        context_length(find_model(run, llm)[1], config.engine.engine)
    patches, patch_model = _check_patches(archive, config.patches)
    return ServiceInputs(
        archive=archive.uri,
        run=run,
        llm=llm,
        token_file=token_file,
        audit=str(_absolute(config.audit or f"{run}/audit")),
        model=loaded.name,
        fingerprint=loaded.fingerprint,
        patches=patches,
        patch_model=patch_model,
        chat=tuned,
    )


class CheckedAside:
    """:func:`check_inputs` in a process of its own, which takes along what opens archives.

    Args:
        config: Settings.
    """

    def __init__(self, config: ServeConfig) -> None:
        command = [sys.executable, "-m", "serve.config"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(config)))
        self._process.stdin.close()

    def result(self) -> ServiceInputs:
        """Wait for the inputs.

        Raises:
            PathFLIPError: See :func:`check_inputs`.
        """
        assert self._process.stdout is not None
        lines = self._process.stdout.readlines()
        if self._process.wait() or not lines:
            raise PathFLIPError("The settings could not be checked.", code="start")
        told = json.loads(lines[-1])
        if "error" in told:
            raise from_dict(told["error"])
        return ServiceInputs(**told["inputs"])


def _check_patches(archive: Archive, patches: str | None) -> tuple[str | None, str | None]:
    """Return spec and name of the patch model, whose features the archive must have."""
    from pathflip.compat import check_weights
    from pathflip.encoders import patch_model
    from pathflip.encoders.mrplip import SCHEME

    if patches is None:
        return None, None
    spec = f"{SCHEME}:{_absolute(patches.removeprefix(f'{SCHEME}:'))}"
    model = patch_model(spec, patch_um=float(archive.tiling()["patch_um"]))
    check_weights(archive, model.info.name, encoder=model.info)
    return spec, model.info.name


def find_model(run: str | Path, llm: str | Path | None = None) -> tuple[Path, Path]:
    """Locate the instruction model and its merged language model.

    Args:
        run: A run; a tuned one, unless ``llm`` is.
        llm: A tuned run, which then answers; or where the merged language model of ``run`` is.

    Returns:
        Folder of the instruction model, folder of the merged language model.

    Raises:
        CheckpointError: Neither is a tuned run (``not_tuned``).
    """
    from pathflip.checkpoints import is_tuned

    run, other = Path(run).absolute(), None if llm is None else Path(llm).absolute()
    if other is not None and is_tuned(other):
        return other / "model", other / "llm"
    if is_tuned(run):
        return run / "model", other or run / "llm"
    raise CheckpointError(
        f"{run} has no language model: it was pretrained, not tuned.",
        hint="Tune it with pathflip tune and give that run, or name a tuned run by --llm.",
        code="not_tuned",
    )


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).expanduser().absolute())


def _check_numbers(config: ServeConfig) -> None:
    """Refuse numbers that no service can run with."""
    at_least: dict[str, tuple[float, float]] = {"drain_s": (config.drain_s, 0)}
    for name in DEPLOYMENTS:
        replicas: Replicas = getattr(config, name)
        at_least |= {
            f"{name}.min_replicas": (replicas.min_replicas, 0),
            f"{name}.max_replicas": (replicas.max_replicas, max(1, replicas.min_replicas)),
            f"{name}.max_ongoing": (replicas.max_ongoing, 1),
            f"{name}.max_queued": (replicas.max_queued, -1),
            f"{name}.cpus": (replicas.cpus, 0),
            f"{name}.gpus": (replicas.gpus, 0),
        }
        if replicas.target <= 0:
            raise ConfigError(
                f"{name}.target is {replicas.target:g}; it must be more than 0.",
                hint="It is the number of concurrent requests per replica that scaling aims for.",
            )
    at_least |= {  # EngineConfig checks its own
        "reading.readers": (config.reading.readers, 0),
        "reading.slides": (config.reading.slides, 1),
        "reading.timeout_s": (config.reading.timeout_s, 1),
        "reading.queued": (config.reading.queued, 1),
        "reading.cache_mb": (config.reading.cache_mb, 0),
        "engine.prefix_cache_mb": (config.engine.prefix_cache_mb, 0),
        "engine.flush_s": (config.engine.flush_s, 0),
    }
    for name, (value, least) in at_least.items():
        if value < least:
            raise ConfigError(
                f"{name} is {value:g}; it must be at least {least:g}.",
                hint="See Settings in docs/howto/serve.md.",
            )


def main() -> None:
    """Check the settings on standard input; print the inputs, or the error, as a line of JSON."""
    try:
        told = {"inputs": asdict(check_inputs(from_arguments(json.load(sys.stdin))))}
    except PathFLIPError as error:
        told = {"error": error.to_dict()}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
