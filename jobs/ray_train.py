"""Processes around the training loop, for every objective: one of this machine, or Ray Train.

One worker on this machine needs no Ray; several, and those of a cluster, are Ray Train's. Workers
share nothing but the run folder and the archive. A worker that dies takes the others with
it; Ray starts them again and they go on from the newest intact checkpoint, on as many workers as
there are then. The same command does the same after the driver died.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pyarrow as pa

from jobs import cluster
from jobs.cluster import Available, Place
from jobs.stages import ActorPool, ended, run_stages
from pathflip.checkpoints import latest_checkpoint
from pathflip.errors import ConfigError, PathFLIPError, TrainingError
from pathflip.files import write_file
from pathflip.training import run_dir
from pathflip.training.loader import AHEAD
from pathflip.training.loop_config import LoopConfig
from pathflip.training.objective import Objective
from pathflip.training.trainer import TrainingProgress, shareable, train

PROGRESS_EVERY_S = 1.0
_IP = (socket.AF_INET, socket.AF_INET6)


def fit(
    objective: Objective[Any, Any],
    archive: str,
    run: str | Path,
    *,
    address: str | None = None,
    progress: Callable[[TrainingProgress], None] | None = None,
) -> dict[str, Any]:
    """Train to the end; the same call again resumes, or returns the finished run's result.

    Args:
        objective: Objective of the run, with its settings.
        archive: Archive URI.
        run: Run folder, on storage that every worker sees; made if it does not exist.
        address: Engine or Ray cluster; see ``cluster.connect``.
        progress: Called on the driver about once a second.

    Returns:
        {"run", "kind", "family", "steps", "loss", "val", "seconds", "best_step", "skipped",
        "trained"}: the loss is the mean of the last steps, val the validation of the exported
        weights, trained the steps that this call did (0: the run was finished already).

    Raises:
        ConfigError, ArchiveError, EncoderError, CheckpointError: Before anything is started.
        TrainingError: Losses that are not finite, or workers that keep dying.
    """
    run = _local(run)
    _check_workers(objective.config)
    with run_dir.opened(run):
        objective, dataset = run_dir.prepare(objective, archive, run)
        if done := run_dir.finished(run, objective.exports):
            return done | {"trained": 0}
        before = latest_checkpoint(run / "checkpoints")
        steps = objective.config.total_steps(dataset.steps_per_epoch)
        if before is None or before.step < steps:
            _fit(objective, run, address, progress)
        result = run_dir.finish(objective, dataset, run)
        run_dir.clear(run)
    return result | {"trained": result["steps"] - (before.step if before else 0)}


def planned(objective: Objective[Any, Any], archive: str, run: str | Path) -> dict[str, Any]:
    """Return the plan of :func:`fit`, without starting or writing anything.

    Memory is in MiB and leaves out activations, which depend on the lengths of texts.
    """
    run, config = _local(run), objective.config
    _check_workers(config)
    objective, dataset = run_dir.inspect(objective, archive, run)
    trained, frozen = objective.parameters(dataset)
    share = config.batch_size // config.accumulate // (config.max_workers or 1)
    return {
        "run": str(run),
        "preset": config.preset,
        **dataset.summary(),
        "steps": config.total_steps(dataset.steps_per_epoch),
        "steps_per_epoch": dataset.steps_per_epoch,
        "parameters": trained,
        **({"frozen_parameters": frozen} if frozen else {}),
        "memory_mb": {
            "weights_and_optimizer": round((trained * 16 + frozen * 4) / 2**20, 1),
            **dataset.memory_mb(share, read_ahead=AHEAD),
        },
    }


def _local(run: str | Path) -> Path:
    if "://" in str(run):
        raise ConfigError(
            f"The run folder {run} is not a path.",
            hint="Runs are written to a file system that every worker sees; archives may be on "
            "s3://, gs:// or az://.",
        )
    return Path(run).expanduser().absolute()


def _check_workers(config: LoopConfig) -> None:
    """Refuse worker counts that cannot share a micro-batch evenly."""
    share = config.batch_size // config.accumulate
    most = config.max_workers or 1
    if shareable(share, most) != most and config.min_workers in (None, most):
        raise ConfigError(
            f"{most} workers cannot share micro-batches of {share} evenly.",
            hint="Make batch_size / accumulate a multiple of the number of workers.",
        )


# -- workers --------------------------------------------------------------------------------------


def _fit(
    objective: Objective[Any, Any],
    run: Path,
    address: str | None,
    progress: Callable[[TrainingProgress], None] | None,
) -> None:
    """Train until the last step is done: in one process of this machine, or on Ray Train."""
    for name in (run_dir.STOPPED, run_dir.PROGRESS):
        (run / name).unlink(missing_ok=True)
    config = objective.config
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="lance is not fork-safe")  # Ray execs at once
        place = cluster.connect(address)
        there = cluster.available(config.device, place=place)
        workers = _workers(config, there, place=place)
        if place == "local" and workers.most > 1:
            cluster.connect("ray")
            place = "ray"
    try:
        with _watching(run, progress):
            if place == "local":
                _train_here(objective, run, workers)
            else:
                _train_on_ray(objective, run, workers, place=place)
    except _WorkersDied as error:
        if (noted := run_dir.stopped(run)) is not None:
            raise noted from error
        raise TrainingError(
            f"The workers of {run} died {config.max_failures + 1} times: {error}",
            hint="The same command goes on from the last checkpoint.",
            code="workers_died",
        ) from error
    if (noted := run_dir.stopped(run)) is not None and not run_dir.may_pass(noted):
        raise noted


class _WorkersDied(Exception):
    """Workers died more often than the settings allow; the message is the last one's last line."""


def _train_here(objective: Objective[Any, Any], run: Path, workers: Workers) -> None:
    pool = ActorPool(
        actor=LoneWorker,
        arguments=(objective, str(run), workers.cpus),
        most=1,
        num_cpus=workers.cpus,
        num_gpus=float(workers.use_gpu),
        deaths=objective.config.max_failures,
    )
    with ended(run_stages([{"run": str(run)}], [pool], place="local")) as trained:
        try:
            deque(trained, maxlen=0)
        except PathFLIPError as error:
            if error.code != "workers_died":
                raise
            raise _WorkersDied(error.message.partition(": ")[2] or "killed") from error


class LoneWorker:
    """The one worker of a run on this machine, in a process of its own.

    Args:
        objective: Objective of the run.
        run: Run folder.
        threads: Threads of torch.
    """

    def __init__(self, objective: Objective[Any, Any], run: str, threads: int) -> None:
        self._objective, self._run, self._threads = objective, Path(run), threads

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Train to the end. What fails without a name ends the process: it is started again."""
        import torch

        torch.set_num_threads(self._threads)
        device = "cuda:0" if os.environ["CUDA_VISIBLE_DEVICES"] else "cpu"
        try:
            train(self._run, self._objective, device=device, progress=_note_progress(self._run))
        except PathFLIPError as error:
            run_dir.stop(self._run, error)
        except Exception:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        return rows


def _train_on_ray(
    objective: Objective[Any, Any], run: Path, workers: Workers, *, place: Place
) -> None:
    # Ray looks after its workers every 2 s otherwise: half of that is lost at each start and end.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    train_api: Any = ray.train  # what a type checker sees there is the API before 2.43
    few, many, use_gpu = workers.least, workers.most, workers.use_gpu
    trainer = TorchTrainer(
        _work,
        train_loop_config={"run": str(run), "objective": objective, "threads": workers.cpus},
        torch_config=(TorchConfig if place == "ray" else _over_hosts())(
            backend="nccl" if use_gpu else "gloo"
        ),
        scaling_config=train_api.ScalingConfig(
            num_workers=many if few == many else (few, many),
            use_gpu=use_gpu,
            resources_per_worker={"CPU": workers.cpus, **({"GPU": 1} if use_gpu else {})},
        ),
        run_config=train_api.RunConfig(
            name=f"attempt-{time.time_ns()}",
            storage_path=str(run / ".ray"),
            failure_config=train_api.FailureConfig(max_failures=objective.config.max_failures),
            logging_config=train_api.LoggingConfig(log_level="ERROR"),
            # Threads that wait would otherwise spin: beside other work on two cores, a step of a
            # small model took 1.7 CPU-seconds instead of 0.2.
            worker_runtime_env={"env_vars": cluster.PATIENT},
        ),
    )
    try:
        with _own_interrupt():
            trainer.fit()
    except train_api.TrainingFailedError as error:
        raise _WorkersDied(_last_line(error)) from error


def _over_hosts() -> Any:
    """Make the class of Ray's settings for torch whose workers find each other between hosts."""
    import ray.train.torch

    backend: Any = ray.train.torch.TorchConfig().backend_cls

    class OverHosts(backend):  # type: ignore[misc]
        def on_start(self, group: Any, config: Any) -> None:
            group.execute(_name_interface)
            super().on_start(group, config)

    class Config(ray.train.torch.TorchConfig):
        backend_cls = property(lambda _: OverHosts)

    return Config


def _name_interface() -> None:
    """Tell gloo the interface of the address by which Ray knows this host, unless the user did.

    By itself it takes that of the host's name, which Debian gives to loopback: workers of other
    hosts are refused there.
    """
    import ray.util

    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    if name := interface_of(ray.util.get_node_ip_address()):  # type: ignore[no-untyped-call]
        os.environ["GLOO_SOCKET_IFNAME"] = name


def interface_of(address: str) -> str | None:
    """Return the name of this host's network interface that has an IPv4 or IPv6 address."""
    import psutil

    wanted = ip_address(address)
    for name, addresses in psutil.net_if_addrs().items():
        for one in addresses:
            # An IPv6 address of one link names its interface after a per cent sign.
            if one.family in _IP and ip_address(one.address.partition("%")[0]) == wanted:
                return str(name)
    return None


@contextmanager
def _own_interrupt() -> Iterator[None]:
    """End the workers in Ray's way on Ctrl-C, and the command in ours: Ray would exit with 0."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT) if main else None
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if main:
            signal.signal(signal.SIGINT, before)


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Workers of a run.

    Attributes:
        use_gpu: Whether each has a GPU.
        least: Workers at least.
        most: Workers at most.
        cpus: Cores of each.
    """

    use_gpu: bool
    least: int
    most: int
    cpus: int


def _workers(config: LoopConfig, resources: Available, *, place: Place) -> Workers:
    use_gpu, gpus, cores = resources.use_gpu, resources.gpus, resources.cpus
    share = config.batch_size // config.accumulate
    many = config.max_workers or config.min_workers or 0
    many = many or (shareable(share, gpus) if use_gpu and gpus else 1)
    few = config.min_workers or many
    cpus = config.cpus_per_worker or (max(1, cores // many) if place != "cluster" else 1)
    there, what = (gpus, "GPUs") if use_gpu else (cores // cpus, f"times {cpus} cores")
    if place != "cluster" and few > there:
        raise ConfigError(
            f"{few} workers need {few} {what}; this machine has {there}.",
            hint="Ask for fewer workers (--min-workers, --max-workers), or name a cluster "
            "(--address).",
            code="resources",
        )
    return Workers(use_gpu=use_gpu, least=few, most=many, cpus=cpus)


def _work(settings: dict[str, Any]) -> None:
    """Run one worker; called by Ray Train."""
    import ray.train
    import ray.train.torch
    import torch

    run = Path(settings["run"])
    if (noted := run_dir.stopped(run)) is not None and not run_dir.may_pass(noted):
        return
    context = ray.train.get_context()
    rank, device = context.get_world_rank(), ray.train.torch.get_device()
    torch.set_num_threads(settings["threads"])
    try:
        train(
            run,
            settings["objective"],
            rank=rank,
            world=context.get_world_size(),
            device=str(device),
            progress=_note_progress(run) if rank == 0 else None,
        )
    except PathFLIPError as error:
        run_dir.stop(run, error)
        raise  # the others may wait for this one: Ray ends them


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1][:300] if lines else type(error).__name__


def _note_progress(run: Path) -> Callable[[TrainingProgress], None]:
    last = [0.0]

    def note(progress: TrainingProgress) -> None:
        now = time.monotonic()
        if now - last[0] >= PROGRESS_EVERY_S or progress.fraction >= 1:
            last[0] = now
            write_file(run / run_dir.PROGRESS, json.dumps(asdict(progress)))

    return note


@contextmanager
def _watching(run: Path, progress: Callable[[TrainingProgress], None] | None) -> Iterator[None]:
    """Report the progress that rank 0 writes down."""
    over, seen = threading.Event(), [""]

    def look() -> None:
        with suppress(FileNotFoundError):
            text = (run / run_dir.PROGRESS).read_text()
            if text != seen[0] and progress is not None:
                seen[0] = text
                progress(TrainingProgress(**json.loads(text)))

    def watch() -> None:
        while not over.wait(PROGRESS_EVERY_S / 2):
            look()

    thread = threading.Thread(target=watch, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        look()
