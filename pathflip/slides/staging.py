"""Opens slides by their uri: files where they lie, slides of object stores as local copies.

Readers of slides need files. A slide of an object store is copied whole to a folder of the machine
(:mod:`pathflip.slides.stage_cache`), once for all of its processes, and stays there while a process
holds it. Whoever reads the pixels of a slide goes through :meth:`Stage.open`, or through
:func:`opened` where an archive knows the slide.
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pathflip.errors import ConfigError, SlideError
from pathflip.slides.objects import ObjectReader, StoredObject, is_remote
from pathflip.slides.sources import (
    Source,
    changed,
    check_ingested,
    digest_of,
    stat_slide,
    stored_files,
)
from pathflip.slides.stage_cache import WAIT_S, StageCache

STAGE_GB = 50.0
"""Gigabytes of slides that are staged on a machine at most, by default."""
_BLOCK = 8 << 20
_BLOCKS_AHEAD = 4  # of an object, read at the same time
_SLIDES_AHEAD = 2
_NAME_BYTES = 255  # of a file, on Linux


@dataclass(frozen=True, kw_only=True)
class Staged:
    """A slide that can be opened.

    Attributes:
        path: Its file, or the folder of its DICOM series. Size and time are those of its source.
        sha256: Digest of its content (see ``sources.digest_source``), None of a file where it lies.
    """

    path: Path
    sha256: str | None


class Stage:
    """Slides as local files.

    Args:
        folder: Folder below which this user's copies lie; by default ``PATHFLIP_STAGE_DIR``, or
            that of temporary files.
        gb: Gigabytes that they may take; by default ``PATHFLIP_STAGE_GB``, or 50.

    Raises:
        ConfigError: ``gb`` is no positive number.
    """

    def __init__(self, folder: str | None = None, gb: float | None = None) -> None:
        given = gb if gb is not None else os.environ.get("PATHFLIP_STAGE_GB") or STAGE_GB
        try:
            size = float(given)
        except ValueError:
            size = math.nan
        if not 0 < size < math.inf:
            raise ConfigError(
                f"stage_gb is {given}.",
                hint="Give the gigabytes that slides of object stores may take on a machine.",
            )
        below = folder or os.environ.get("PATHFLIP_STAGE_DIR") or tempfile.gettempdir()
        self.folder = Path(below).expanduser().absolute() / f"pathflip-stage-{os.getuid()}"
        self._cache = StageCache(self.folder, limit=round(size * 1e9))
        self._threads: ThreadPoolExecutor | None = None
        self._ahead: dict[str, Future[None]] = {}

    @contextmanager
    def open(
        self, source: Source, *, sha256: str | None = None, wait_s: float = WAIT_S
    ) -> Iterator[Staged]:
        """Yield a slide as a file that stays as long as the block lasts.

        Args:
            source: The slide as it was found; one of an object store must still be that.
            sha256: Digest that its content must have, where it is staged.
            wait_s: Time to wait for room.

        Raises:
            SlideError: ``not_a_file``, ``access_denied``, ``store_failed``, ``source_changed``,
                ``stage_failed``; of slides of object stores only.
        """
        if not is_remote(source.uri):
            yield Staged(path=Path(source.uri), sha256=None)
            return
        files = stored_files(source.uri)
        if not files:
            raise _missing(source.uri)
        if Source.of_objects(source.uri, files=files) != source:
            raise changed(source.uri)
        names = {_inside(source.uri, one): one for one in files}
        key = hashlib.sha256(repr(files).encode(errors="surrogateescape")).hexdigest()[:32]
        with self._cache.hold(
            key,
            source.bytes,
            lambda folder: {name: _download(one, folder / name) for name, one in names.items()},
            wait_s=wait_s,
        ) as entry:
            whole = digest_of(entry.sha256)
            if sha256 is not None and whole != sha256:
                raise changed(source.uri)
            yield Staged(path=entry.folder / Path(source.uri).name, sha256=whole)

    def prefetch(self, sources: Sequence[Source]) -> None:
        """Begin to stage the next slides, as far as there is room; the first two that are remote.

        What goes wrong is met again when the slide is opened.
        """
        coming = [one for one in sources if is_remote(one.uri) and one.bytes >= 0][:_SLIDES_AHEAD]
        self._ahead = {uri: job for uri, job in self._ahead.items() if not job.done()}
        for source in coming:
            if source.uri not in self._ahead and len(self._ahead) < _SLIDES_AHEAD:
                if self._threads is None:
                    self._threads = ThreadPoolExecutor(_SLIDES_AHEAD, "stage")
                self._ahead[source.uri] = self._threads.submit(self._fetch, source)

    def _fetch(self, source: Source) -> None:
        with suppress(SlideError), self.open(source, wait_s=0):
            pass


@contextmanager
def opened(slide: Mapping[str, Any], *, stage: Stage | None = None) -> Iterator[Path]:
    """Yield the path of an archive's slide that is the one that was ingested, while it is read.

    Args:
        slide: Its row: uri, bytes, mtime_ns, and sha256 where it may be in an object store.
        stage: Local copies of slides of object stores; by default those of the environment.

    Raises:
        SlideError: ``not_a_file``, ``source_changed``; of an object store see :meth:`Stage.open`.
    """
    check_ingested(slide)
    if not is_remote(slide["uri"]):
        yield Path(slide["uri"])
        return
    source = Source(uri=slide["uri"], bytes=slide["bytes"], mtime_ns=slide["mtime_ns"])
    with (stage or Stage()).open(source, sha256=slide["sha256"]) as staged:
        yield staged.path


@contextmanager
def opened_uri(uri: str, *, stage: Stage | None = None) -> Iterator[Path]:
    """Yield the path of any slide while it is read, see :meth:`Stage.open`."""
    with (stage or Stage()).open(stat_slide(uri)) as staged:
        yield staged.path


def _missing(uri: str) -> SlideError:
    return SlideError(
        f"{Path(uri).name} is not at {uri}.",
        hint="Check the bucket and the key.",
        code="not_a_file",
    )


def _inside(uri: str, one: StoredObject) -> str:
    """Return the place of a slide's object in the folder it is staged in.

    Raises:
        SlideError: A part of its key cannot be the name of a file (``unsupported``).
    """
    name = one.uri[len(uri.rpartition("/")[0]) + 1 :]
    for part in name.split("/"):
        if part in ("", ".", "..") or "\0" in part or len(os.fsencode(part)) > _NAME_BYTES:
            raise SlideError(
                f"{Path(uri).name} has an object whose key cannot be the name of a file.",
                hint="Rename the object.",
                code="unsupported",
            )
    return name


def _download(stored: StoredObject, target: Path) -> str:
    """Copy an object to a file, with its time; return the sha256 of what was written.

    Raises:
        SlideError: ``source_changed`` where the object is another one before or after.
    """
    reader = ObjectReader(stored.uri)
    if reader.bytes != stored.bytes:
        raise changed(stored.uri)
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with (
        open(target, "xb", buffering=0) as file,
        ThreadPoolExecutor(_BLOCKS_AHEAD, "blocks") as threads,
    ):
        blocks: deque[Future[bytes]] = deque()
        for offset in range(0, stored.bytes, _BLOCK):
            if len(blocks) == _BLOCKS_AHEAD:
                _append(file, digest, blocks.popleft().result())
            blocks.append(threads.submit(reader.read, offset, _BLOCK))
        for block in blocks:
            _append(file, digest, block.result())
    now = ObjectReader(stored.uri)
    if (now.bytes, now.version) != (reader.bytes, reader.version):
        raise changed(stored.uri)
    os.utime(target, ns=(stored.mtime_ns, stored.mtime_ns))
    return digest.hexdigest()


def _append(file: Any, digest: Any, block: bytes) -> None:
    digest.update(block)
    view = memoryview(block)
    while view:
        view = view[file.write(view) :]
