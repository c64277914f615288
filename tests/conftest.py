"""Fixtures of the whole session: one Ray cluster, one set of slides, one clean run of the job."""

from __future__ import annotations

import hashlib
import os
import signal
import tempfile
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
from hypothesis import settings

from serve import proxy
from tests import s3
from tests.faults import descendants, resident_bytes, without_compiler

if TYPE_CHECKING:
    from tests.serving import Deployed, Service, Tuned

STORE_BYTES = 80 << 20
"""Small on purpose: whatever of the job went through Ray's object store would spill."""
SETTINGS = ("tiling.region_um=512", "chunk_regions=2", "commit_s=1")
"""Small regions and chunks, so that small slides are many units of work."""
WITHOUT_CLUSTER = (
    "tests/unit/", "tests/integration/test_training", "tests/integration/test_tuning",
    "tests/integration/test_serve.py", "tests/integration/test_serve_life.py",
    "tests/integration/test_ledger.py", "tests/integration/test_staged_slides.py",
    "tests/integration/test_interruptions.py", "tests/integration/test_slurm.py",
    "tests/integration/test_sky.py", "tests/chaos/test_hosts.py",
    "tests/e2e/viewer/", "tests/e2e/test_recipes",
)  # fmt: skip
"""Where no test uses the session's Ray: the process that hands out tests knows no fixtures."""
SAME = (
    "uri", "aliases", "status", "reason", "sha256", "bytes", "mtime_ns", "vendor", "width",
    "height", "levels", "mpp", "mpp_source", "reader", "n_regions", "n_patches", "tiles_ok",
    "tiles_bad", "fingerprint", "encoders", "tissue_png", "tissue_mpp", "tissue_mm2", "thumbnail",
)  # fmt: skip
"""Columns of a slide's row that any run over the same slides must agree on."""


settings.register_profile("nightly", max_examples=600)


def pytest_configure(config: pytest.Config) -> None:
    """Ray reads what it serves with when it is first imported."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        # A shell's background job ignores it, and so would all commands that are interrupted here.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    folder = tempfile.TemporaryDirectory(prefix="pathflip-", ignore_cleanup_errors=True)
    os.environ.update(proxy.environment(folder.name))
    config.add_cleanup(folder.cleanup)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> Generator[None, object, object]:
    """Fast tests first, then those that need Ray, then those that break things, the service last.

    In two processes (``make test``) those that share the cluster come before the others, as one of
    the two needs all its time for them: see :func:`pytest_xdist_make_scheduler`. Unit tests keep
    the random order that pytest-randomly gave them, all others lose it.
    """
    collected = {item: at for at, item in enumerate(items)}
    result = yield

    def weight(item: pytest.Item) -> int:
        chaos = item.get_closest_marker("chaos") is not None
        for services, name in enumerate(("service", "engine_service")):
            if name in getattr(item, "fixturenames", ()):
                return 3 + 2 * services + chaos
        return 2 if item.get_closest_marker("chaos") else bool(item.get_closest_marker("ray"))

    def place(item: pytest.Item) -> int:
        return len(collected) if item.nodeid.startswith("tests/unit/") else collected[item]

    two = hasattr(config, "workerinput")
    items.sort(key=place)
    items.sort(key=lambda item: (two and item.nodeid.startswith(WITHOUT_CLUSTER), weight(item)))
    return result


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One process has all that share the cluster; the others have the rest, file by file."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid.partition("::")[0] if nodeid.startswith(WITHOUT_CLUSTER) else "cluster"

    config.option.loadscopereorder = False  # as they are sorted above
    return Scheduling(config, log)


@dataclass(frozen=True, kw_only=True)
class Clean:
    """The run nothing happened to."""

    archive: Path
    result: Any
    content: dict[str, dict[str, Any]]
    peak_bytes: int
    spilled: Path


@pytest.fixture(scope="session")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good slides: both layouts, several resolutions, both readers."""
    import numpy as np

    from pathflip import Slide
    from pathflip.synth import make_slide
    from tests.faults import deflated

    folder = tmp_path_factory.mktemp("slides")
    for name, options in {
        "a.svs": {"width": 2048, "height": 2048, "mpp": 0.5, "layout": "aperio"},
        "b.tif": {"width": 4096, "height": 4096, "mpp": 0.25},
        "c.tif": {"width": 3072, "height": 2048, "mpp": 0.37, "tile_px": 240},
        "d.svs": {"width": 4096, "height": 4096, "mpp": 0.5, "layout": "aperio", "quality": 80},
        "e.tif": {"width": 4096, "height": 4096, "mpp": 0.5},
        "f.tif": {"width": 3840, "height": 2560, "mpp": 0.5, "tissue": "colon"},
    }.items():
        components = "rgb" if name == "a.svs" else "ycbcr"
        make_slide(folder / name, **options, components=components, seed=ord(name[0]))
    with Slide(folder / "a.svs") as slide:
        pixels = np.rot90(slide.read(0, 0, 2048)).copy()
    deflated(folder / "g.tif", pixels, pyramid=True, photometric="rgb")
    return folder


@pytest.fixture(scope="session")
def spilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that Ray would spill objects to."""
    return tmp_path_factory.mktemp("spilled")


@pytest.fixture(scope="session")
def store() -> Iterator[s3.Store]:
    """The session's S3-compatible store; this process and those it starts find it by variables."""
    with s3.running() as store, mock.patch.dict(os.environ, store.environment):
        yield store


@pytest.fixture
def bucket(store: s3.Store) -> str:
    """An empty bucket of its own for a test, as ``s3://<name>``."""
    return store.new_bucket()


@pytest.fixture(scope="session")
def cluster(
    spilled: Path, store: s3.Store, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The session's Ray on this machine; yields its address. Jobs in this process use it.

    Its processes find no compiler, as in the image, nor what one made before; and the object store.
    """
    import ray

    without = without_compiler(tmp_path_factory.mktemp("without-compiler"))
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("LANCE_LOG", "error")
    os.environ.setdefault("RAY_worker_niceness", "0")
    with mock.patch.dict(os.environ, without):
        for name in ("CC", "CXX"):
            os.environ.pop(name, None)
        context = ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            configure_logging=False,
            object_store_memory=STORE_BYTES,
            object_spilling_directory=str(spilled),
        )
    yield context.address_info["gcs_address"]
    ray.shutdown()


@pytest.fixture(scope="session")
def job(cluster: str) -> Callable[..., Any]:
    """``job(sources, archive, *settings)``: the ingest job in this process."""
    from jobs.ingest import IngestConfig, ingest
    from pathflip.config import load_config

    def run(sources: list[Path] | Path, archive: Path, *settings: str, **options: Any) -> Any:
        paths = [sources] if isinstance(sources, Path) else sources
        config = load_config(IngestConfig, overrides=(*SETTINGS, *settings))
        return ingest([str(path) for path in paths], str(archive), config, **options)

    return run


@pytest.fixture(scope="session")
def job_here() -> Callable[..., Any]:
    """The same with actors in this process: quick, and all but the spreading of work is there."""
    from jobs.ingest import IngestConfig, ingest
    from pathflip.config import load_config
    from tests.in_threads import in_threads

    def run(sources: list[Path] | Path, archive: Path, *settings: str, **options: Any) -> Any:
        paths = [sources] if isinstance(sources, Path) else sources
        config = load_config(IngestConfig, overrides=(*SETTINGS, *settings))
        with in_threads():
            return ingest([str(path) for path in paths], str(archive), config, **options)

    return run


@pytest.fixture(scope="session")
def clean(
    slides: Path, job: Callable[..., Any], spilled: Path, tmp_path_factory: pytest.TempPathFactory
) -> Clean:
    """All good slides ingested with nothing going wrong."""
    archive = tmp_path_factory.mktemp("clean") / "archive"
    peak = [0]

    def sample(_: Any) -> None:
        peak[0] = max(peak[0], resident_bytes(descendants(os.getpid())))

    result = job(slides, archive, progress=sample)
    return Clean(
        archive=archive,
        result=result,
        content=content(archive),
        peak_bytes=peak[0],
        spilled=spilled,
    )


@pytest.fixture(scope="session")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    """A tiny tuned run and its archive."""
    from tests.serving import make_tuned

    return make_tuned(tmp_path_factory.mktemp("tuned"))


@pytest.fixture(scope="session")
def deployed(
    cluster: str, tuned: Tuned, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployed]:
    """The service over it, whichever a test wants."""
    from ray import serve

    from tests.serving import Deployed, indexed

    folder = tmp_path_factory.mktemp("deployed")
    yield Deployed(indexed(tuned, folder / "archive"), folder)
    serve.shutdown()


@pytest.fixture
def service(deployed: Deployed) -> Service:
    """The whole service with a fake engine. A test may break it: the next finds it whole."""
    return deployed.want("fake")


@pytest.fixture
def engine_service(deployed: Deployed) -> Service:
    """Chat alone, with the real engine."""
    return deployed.want("vllm")


def content(archive: Path) -> dict[str, dict[str, Any]]:
    """Everything visible of the ready slides, and a check that nothing is there twice.

    Returns:
        {slide_id: its row (columns SAME), its regions, features (digest) and embeddings}.
    """
    import pyarrow.compute as pc

    from pathflip import Archive
    from pathflip.archive.tables import key_of

    opened = Archive(archive)
    for table in opened.tables():
        keys = opened.dataset(table).to_table(columns=[key_of(table)])[0].to_pylist()
        assert len(keys) == len(set(keys)), f"{table} holds a key twice"
    found: dict[str, dict[str, Any]] = {}
    embedded = opened.embeddings() if opened.encoders() else None
    for row in opened.slides("ready", columns=["slide_id", *SAME]).to_pylist():
        slide = row["slide_id"]
        features, mask, ids = opened.features_array(slide)
        assert len(ids) == row["n_regions"]
        assert mask.sum() == row["n_patches"] == row["tiles_ok"]
        assert not features[~mask].any(), "a masked slot holds something"
        assert features[mask].any(axis=1).all(), "a kept slot is empty"
        assert embedded is not None
        own = embedded.filter(pc.field("slide_id") == slide)
        assert len(own) == row["n_regions"] + 1
        found[slide] = {
            "row": row,
            "regions": opened.regions(slide).to_pylist(),
            "features": hashlib.sha256(features.tobytes()).hexdigest(),
            "embeddings": own.to_pylist(),
        }
    return found


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder: {relative path: (bytes, mtime_ns)}."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if not path.is_dir()
    }
