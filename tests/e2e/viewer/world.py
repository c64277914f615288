"""World of the browser tests: slides with planted lesions, their archive, runs, and two services.

The services are the real routes over the real parts, in this process and without Ray, by real HTTP:
one without tokens, as ``pathflip serve`` on one's own machine, and one with, which also shows
patients' ids and whose answers never end. The language model alone is scripted.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pathflip.archive import Archive
from pathflip.checkpoints import Run, load_run
from pathflip.evaluation.ground_slide import GroundingResult, ground_slide
from pathflip.interop.annotation_files import DrawnObject, read_objects
from pathflip.search import Query, embed_texts, run_query
from tests.e2e.viewer.planted_run import make_planted_run
from tests.serving import make_base, make_run

COHORT = 7
"""Slides with planted lesions; s00005 has 0.25 µm/px, the others 0.5."""
COLUMNS = (
    "slide_id", "uri", "status", "reason", "width", "height", "mpp", "split", "labels",
    "patient_id",
)  # fmt: skip
ANSWER = "Mucin pools are present. Coagulative necrosis is present."
TOKENS = {
    "all": ("read,search,chat,annotate,admin", "all-" + "a" * 40),
    "viewer": ("read", "viewer-" + "b" * 40),
    "finder": ("read,search", "finder-" + "c" * 40),
}
"""{name: (scopes, token)}."""


@dataclass(frozen=True, kw_only=True)
class World:
    """Slides, archive and runs behind the services.

    Attributes:
        folder: Everything below it; ``slides`` and ``lesions`` are the cohort's.
        archive: The archive's folder.
        run: Run that finds the lesions, if there is one.
        tuned: Tuned run, if there is one, whose language model is replaced by a script.
        hold: While this file is there, answers stop after their first word.
    """

    folder: Path
    archive: Path
    run: Path | None
    tuned: Path | None
    hold: Path

    @cached_property
    def loaded(self) -> Run:
        """The run."""
        assert self.run is not None
        return load_run(self.run)

    @cached_property
    def rows(self) -> dict[str, dict[str, Any]]:
        """{file stem: row} of all slides of the archive."""
        rows = Archive(self.archive).slides(columns=list(COLUMNS)).to_pylist()
        return {Path(row["uri"]).stem: row for row in rows}

    def id(self, stem: str) -> str:
        """Return the id of a slide."""
        return str(self.rows[stem]["slide_id"])

    def path(self, stem: str) -> Path:
        """Return the file of a slide."""
        return Path(self.rows[stem]["uri"])

    def stem(self, slide_id: str) -> str:
        """Return the file stem of a slide."""
        return next(stem for stem, row in self.rows.items() if row["slide_id"] == slide_id)

    def found(self, text: str | None = None, **query: Any) -> list[dict[str, Any]]:
        """Search by the library: a text, or the slide or region that ``query`` names."""
        archive, run = Archive(self.archive), self.loaded
        vector = None if text is None else embed_texts(run, [text])[0]
        wanted = {"level": "region"} | query
        asked = Query(vector=vector, model=run.name, fingerprint=run.fingerprint, **wanted)
        found: list[dict[str, Any]] = run_query(archive, asked).to_pylist()
        return found

    def grounded(self, stem: str, text: str) -> GroundingResult:
        """Locate a text on a slide by the library."""
        archive = Archive(self.archive)
        return ground_slide(archive, self.loaded, self.id(stem), text, images=False)

    def lesions(self, stem: str) -> list[DrawnObject]:
        """Return what is planted on a slide."""
        file = self.folder / "lesions" / f"{stem}.geojson"
        return read_objects(file) if file.exists() else []


def make_world(folder: Path, ingest: Callable[..., Any]) -> World:
    """Draw the slides, ingest them (``ingest(sources, archive, *settings)``), train and index."""
    from jobs.demo_slides import make_slides
    from jobs.index import IndexConfig, index
    from pathflip.synth import make_slide
    from tests.in_threads import in_threads

    make_slides(folder, cohort=COHORT)
    make_slide(folder / "slides" / "large.svs", width=9000, height=6000, mpp=0.25, layout="aperio")
    ingest(
        folder / "slides", folder / "archive",
        "tiling.region_um=256", "tiling.patch_um=32", "chunk_regions=32",
        f"patients={folder / 'labels.csv'}", f"captions={folder / 'captions.csv'}",
    )  # fmt: skip
    archive = Archive(folder / "archive")
    run = make_planted_run(folder / "run", archive, folder / "lesions")
    with in_threads():
        index(str(folder / "archive"), str(run), config=IndexConfig(actors=1, device="cpu"))
    texts = archive.captions()["text"].to_pylist()
    base = make_base(folder / "base", texts)
    tuned = make_run(folder / "tuned", folder / "archive", base, encoder="texture")
    return World(
        folder=folder, archive=folder / "archive", run=run, tuned=tuned, hold=folder / "hold"
    )


def write_tokens(path: Path) -> Path:
    """Write the token file."""
    lines = [f"{name} {scopes} {token}\n" for name, (scopes, token) in TOKENS.items()]
    path.write_text("".join(lines))
    path.chmod(0o600)
    return path


@dataclass(frozen=True, kw_only=True)
class Services:
    """Addresses of the two services.

    Attributes:
        world: Slides, archive and runs behind them.
        url: The one without tokens.
        guarded: The one with :data:`TOKENS`.
        audit: Folder of the audit log of the latter.
    """

    world: World
    url: str
    guarded: str
    audit: Path


@contextmanager
def serving(world: World) -> Iterator[Services]:
    """Run both services on one event loop in a thread, on free ports of this machine."""
    import uvicorn

    from serve.audit import AuditLog
    from serve.auth import read_tokens
    from serve.ingress import make_app

    parts = _parts(world)
    audit = AuditLog(str(world.folder / "audit"))
    tokens = read_tokens(write_tokens(world.folder / "tokens"))
    apps = [make_app(parts), make_app(_others(world, parts), tokens=tokens, audit=audit)]
    servers = [
        uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
        for app in apps
    ]
    started = threading.Event()

    async def run() -> None:
        running = [asyncio.create_task(server.serve()) for server in servers]
        while not all(server.started for server in servers):
            await asyncio.sleep(0.01)
        started.set()
        await asyncio.gather(*running)

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    assert started.wait(60)
    ports = [server.servers[0].sockets[0].getsockname()[1] for server in servers]
    try:
        yield Services(
            world=world,
            url=f"http://127.0.0.1:{ports[0]}",
            guarded=f"http://127.0.0.1:{ports[1]}",
            audit=world.folder / "audit",
        )
    finally:
        for server in servers:
            server.should_exit = True
        thread.join(30)
        audit.close()


def _others(world: World, parts: Any) -> Any:
    """The same with patients' ids, and with answers that are cut off."""
    from serve.search import Search

    if world.run is None or world.tuned is None:
        return parts
    model = {"model": world.loaded.name, "fingerprint": world.loaded.fingerprint}
    search = Search(str(world.archive), patients=True, **model)
    return replace(parts, search=search, instructor=_chat(world, repeat=True))


def _chat(world: World, **script: Any) -> Any:
    from serve.chat_engine import ChatEngine
    from serve.config import ChatConfig
    from serve.fake_engine import FakeEngineConfig

    fake = FakeEngineConfig(text=ANSWER, hold=str(world.hold), **script)
    config = ChatConfig(backend="fake", fake=fake)
    return ChatEngine(str(world.archive), str(world.tuned), config=config)


def _parts(world: World) -> Any:
    from serve.annotations import Annotations
    from serve.embedder import Embedder
    from serve.grounding import Grounding
    from serve.routing import Parts
    from serve.search import Search
    from serve.tiles import Tiles

    archive = str(world.archive)
    shared = {"tiles": Tiles(archive), "annotations": Annotations(archive)}
    redactions = {archive: "the archive"}
    if world.run is None or world.tuned is None:
        return Parts(search=Search(archive), redactions=redactions, **shared)
    run = str(world.run)
    return Parts(
        search=Search(archive, model=world.loaded.name, fingerprint=world.loaded.fingerprint),
        embedder=Embedder(archive, run),
        grounding=Grounding(archive, run),
        instructor=_chat(world),
        redactions=redactions | {run: "the run"},
        **shared,
    )
