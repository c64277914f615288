"""The viewer on this machine without Ray: ``pathflip view``.

The application of :mod:`serve.ingress` over plain parts, in this process, on loopback, without
tokens. There is no language model. With a run, its model searches and grounds, and is loaded when
it is first asked; without one, nothing of PyTorch is imported. Without an archive the slides are
files (:mod:`serve.view_files`).

Read in this order: :func:`view`, :func:`_parts`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from urllib.parse import quote

from pathflip.errors import ConfigError, SlideError
from serve.limits import RequestError
from serve.pages import DIST
from serve.routing import Parts

HOST, PORT = "127.0.0.1", 8000
STOP_S = 2
"""Seconds that running answers have at the end."""


def view(
    slide: str | None = None,
    *,
    archive: str | None = None,
    run: str | None = None,
    device: str = "cpu",
    port: int | None = None,
    embed: bool = False,
    ready: Callable[[dict[str, Any]], None],
) -> None:
    """Serve the viewer until SIGINT or SIGTERM.

    Args:
        slide: Slide of the archive, by id or another name of it; without an archive a file, or a
            folder of slides. None shows the archive.
        archive: URI of the archive.
        run: Run whose model searches and grounds.
        device: Its device: ``cpu``, ``cuda`` or ``auto``.
        port: Port to listen on, 0 for any free one; None for :data:`PORT` if it is free.
        embed: Whether a page of this machine may show the viewer in a frame; then it also ends with
            its standard input.
        ready: Called once it listens, with {"url", "page", "pid", "slides"}.

    Raises:
        ConfigError: There is neither slide nor archive, or a run without an archive; no slide is
            found (``no_slides``, ``missing_source``); the port is taken (``port``).
        SlideError: The only file that was named cannot be opened.
        ArchiveError, CheckpointError: The archive or the run cannot be opened, or they do not
            belong together; there is no such slide.
    """
    parts, shown, slides = _parts(slide, archive=archive, run=run, device=device)
    only = shown if archive is None else None
    ended = threading.Event()
    with _listen(port) as listening:
        page = f"http://{HOST}:{listening.getsockname()[1]}/"
        url = f"{page}#/slide/{quote(shown)}" if shown else f"{page}#/"
        server = _server(parts, embed=embed)
        failed: list[BaseException] = []

        def serve() -> None:
            try:
                asyncio.run(_serve(server, listening, parts, only=only))
            except BaseException as error:  # it is raised by the main thread
                failed.append(error)
            finally:
                ended.set()

        before = {
            number: signal.signal(number, lambda *_: ended.set())
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        thread = threading.Thread(target=serve, name="view")
        try:
            thread.start()
            while not (server.started or ended.wait(0.01)):
                pass
            if not failed:
                if embed:
                    threading.Thread(target=_end_with_input, args=(ended,), daemon=True).start()
                if not (DIST / "index.html").exists():
                    print(
                        "The page is not built yet. Run in the checkout: make viewer",
                        file=sys.stderr,
                    )
                ready({"url": url, "page": page, "pid": os.getpid(), "slides": slides})
                ended.wait()
        finally:
            server.should_exit = True
            thread.join()
            for number, handler in before.items():
                signal.signal(number, handler)
    if failed:
        raise failed[0]


def _parts(
    slide: str | None, *, archive: str | None, run: str | None, device: str
) -> tuple[Parts, str | None, int]:
    """Make the parts; return them, the slide to show, and the number of slides."""
    if archive is None:
        if run is not None:
            raise ConfigError(
                "A run searches an archive, and none was named.", hint="Give --archive URI as well."
            )
        if slide is None:
            raise ConfigError(
                "Nothing was named to look at.",
                hint="Give a slide file, a folder of slides, or --archive URI.",
            )
        return _parts_of_files(slide)
    from pathflip.archive import Archive
    from pathflip.archive.storage import normalise
    from serve.annotations import Annotations
    from serve.search import Search
    from serve.tiles import Tiles

    uri = normalise(archive)
    opened = Archive(uri)
    shown = None if slide is None else opened.resolve(slide)
    models: dict[str, Any] = {}
    model = fingerprint = None
    if run is not None:
        from pathflip.checkpoints import describe_run
        from pathflip.compat import check_fits
        from serve.local_parts import model_parts

        described = describe_run(run)
        check_fits(opened, described)
        model, fingerprint = described.name, described.fingerprint
        models = model_parts(uri, run, device=device)
    parts = Parts(
        search=Search(uri, model=model, fingerprint=fingerprint),
        tiles=Tiles(uri),
        annotations=Annotations(uri),
        redactions={uri: "the archive", archive: "the archive"} | ({run: "the run"} if run else {}),
        **models,
    )
    return parts, shown, len(opened.ready_ids())


def _parts_of_files(source: str) -> tuple[Parts, str | None, int]:
    from pathflip.slides.sources import discover
    from serve.slide_files import FileSlides
    from serve.tiles import Tiles
    from serve.view_files import FileList, ids_of

    paths = ids_of(found.uri for found in discover([source]))
    tiles = Tiles(FileSlides(paths))
    shown = next(iter(paths)) if len(paths) == 1 else None
    redactions = {path: "the slide" for path in paths.values()}
    parts = Parts(search=FileList(paths, tiles), tiles=tiles, redactions=redactions)
    return parts, shown, len(paths)


def _listen(port: int | None) -> socket.socket:
    """Bind a socket of this machine alone."""
    for tried in (PORT, 0) if port is None else (port,):
        listening = socket.socket()
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((HOST, tried))
        except OSError as error:
            listening.close()
            if port is not None:
                raise ConfigError(
                    f"The viewer cannot listen on {HOST}, port {port}: {error.strerror}.",
                    hint="Leave --port out, and a free one is taken.",
                    code="port",
                ) from error
        else:
            return listening
    raise AssertionError("some port is free")


def _server(parts: Parts, *, embed: bool) -> Any:
    import uvicorn

    from serve.ingress import make_app

    config = uvicorn.Config(
        make_app(parts, framed=embed), lifespan="off", access_log=False, log_level="warning",
        proxy_headers=False, server_header=False, timeout_graceful_shutdown=STOP_S,
    )  # fmt: skip
    return uvicorn.Server(config)


async def _serve(server: Any, listening: socket.socket, parts: Parts, *, only: str | None) -> None:
    """Serve; a file that is all there is to see is opened before, so that its error ends this."""
    # In this thread uvicorn takes no signals, which the main thread has.
    try:
        if only is not None:
            try:
                await parts.search.slide(only)
            except SlideError as error:
                raise SlideError(
                    f"{only} cannot be shown: {error.message}", code=error.code
                ) from None
            except RequestError:
                pass  # it takes long, and the page says so
        await server.serve(sockets=[listening])
    finally:
        await parts.tiles.close()


def _end_with_input(ended: threading.Event) -> None:
    """Wait until whoever started this process has closed its standard input, or has died."""
    with suppress(OSError, ValueError):
        while os.read(0, 4096):
            pass
    ended.set()
