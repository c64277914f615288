"""The viewer of an archive inside a notebook: a page in a frame, served by a process of its own.

The page and the tiles are those of ``pathflip view``, which is run as a child: the library imports
nothing of the service, tiles come while a cell computes, and a fault of the server stays there. It
listens on this machine alone and ends with the process that started it, whatever ends that one, as
its standard input is then at its end. All frames of an archive share one.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from pathlib import Path
from select import select
from typing import IO, Any
from urllib.parse import quote, urlencode

from pathflip.errors import ConfigError

STARTING_S = 60.0
"""Seconds that the server may take until it listens."""
ENDING_S = 5.0
TOLD_BYTES = 2000
"""Most of what a server that did not start has said that is repeated."""

_servers: dict[tuple[str, str | None], _Server] = {}
"""Servers of this process by URI of the archive and folder of the run."""


@dataclass(frozen=True, kw_only=True)
class Viewer:
    """A page of the viewer, which a notebook shows in a frame.

    Attributes:
        url: Address of the page, on this machine.
        height: Height of the frame, px.
    """

    url: str
    height: int

    def __repr__(self) -> str:
        return f"Viewer({self.url!r})"

    def _repr_html_(self) -> str:
        url = escape(self.url)
        return (
            f'<iframe src="{url}" title="pathflip" width="100%" height="{self.height}" '
            'style="border:0" allow="fullscreen"></iframe>'
            f'<p><a href="{url}" target="_blank" rel="noopener">Open it in a tab</a></p>'
        )


def open_viewer(
    uri: str,
    slide_id: str | None = None,
    *,
    run: str | Path | None = None,
    region: tuple[int, int, int] | None = None,
    height: int = 600,
) -> Viewer:
    """Return the page of a slide, or of the whole archive; start its server if there is none.

    Args:
        uri: URI of the archive.
        slide_id: Id of the slide.
        run: Folder of the run that searches and grounds in the page.
        region: Square to fly to: x0, y0 and side, level-0 px.
        height: Height of the frame, px.

    Raises:
        ConfigError: The server did not start (``not_started``).
    """
    key = uri, None if run is None else os.path.abspath(run)
    server = _servers.get(key)
    if server is None or not server.runs:
        server = _servers[key] = _Server(*key)
    if slide_id is None:
        return Viewer(url=f"{server.url}#/", height=height)
    at = ""
    if region is not None:
        x0, y0, size0 = region
        at = "?" + urlencode({"x": x0 + size0 / 2, "y": y0 + size0 / 2, "w": size0})
    return Viewer(url=f"{server.url}#/slide/{quote(slide_id, safe='')}{at}", height=height)


def close_viewers() -> None:
    """End the servers that this process started; frames that show their pages stay empty."""
    while _servers:
        _servers.popitem()[1].close()


atexit.register(close_viewers)


class _Server:
    """The process that serves an archive.

    Args:
        uri: URI of the archive.
        run: Folder of a run.

    Attributes:
        url: Address of its page, without a fragment.
    """

    def __init__(self, uri: str, run: str | None) -> None:
        command = [sys.executable, "-m", "pathflip.cli", "view", "--archive", uri, "--json",
                   "--no-browser", "--embed", "--port", "0"]  # fmt: skip
        command += [] if run is None else ["--run", run]
        with tempfile.TemporaryFile() as told:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=told
            )
            try:
                self.url = str(self._ready()["url"]).partition("#")[0]
            except BaseException as error:
                self.close()
                if isinstance(error, (ValueError, KeyError, TypeError)):
                    raise ConfigError(
                        f"The viewer of {uri} did not start: {_end(told)}",
                        hint="Try the command yourself: pathflip view --archive URI",
                        code="not_started",
                    ) from error
                raise

    @property
    def runs(self) -> bool:
        """True while the process runs."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the process."""
        process = self._process
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
        try:
            process.wait(ENDING_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _ready(self) -> dict[str, Any]:
        """Return the line with which the process says that it listens.

        Raises:
            ValueError: It said nothing, or something else.
        """
        out = self._process.stdout
        assert out is not None
        if not select([out], [], [], STARTING_S)[0]:
            raise ValueError("no line came")
        document: dict[str, Any] = json.loads(out.readline())
        return document


def _end(told: IO[bytes]) -> str:
    """Return the end of what a process said."""
    told.seek(max(0, told.seek(0, 2) - TOLD_BYTES))
    return told.read().decode("utf-8", "replace").strip() or "it said nothing"
