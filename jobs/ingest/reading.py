"""Reading of a slide's patches by an actor: its own reader processes, the next reads begun early.

A reader reads on while the patches it read are encoded: its shared memory holds two requests, of
256 patches of 256 px 2 x 48 MiB.

The file must stay the one the archive knows: its size and time are compared before every read and
after the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from jobs.ingest.decision import Attempts
from pathflip.encoders import Encoder
from pathflip.errors import EncoderError, SlideError
from pathflip.slides.reader import Patches, SlideReader
from pathflip.slides.sources import changed, stat_source

K = TypeVar("K")


@dataclass(frozen=True, kw_only=True)
class SlideFile:
    """File of a slide as the archive knows it.

    Attributes:
        path: Its path, that of a local copy where it lies in an object store.
        bytes: Its size.
        mtime_ns: Its modification time.
        mpp: µm per level-0 px given by the user, if any.
    """

    path: Path
    bytes: int
    mtime_ns: int
    mpp: float | None = None


@dataclass(frozen=True, kw_only=True)
class Request:
    """Patches of a slide that are read together.

    Attributes:
        rects: int64 [n, 4]: x0, y0, w0, h0 in level-0 px.
        mpp: µm per pixel they are read at.
    """

    rects: NDArray[np.int64]
    mpp: float


def read_ahead(
    readers: Sequence[SlideReader],
    file: SlideFile,
    requests: Sequence[Request],
    *,
    px: int,
    attempts: Attempts,
    timeout_s: float,
) -> Iterator[Patches]:
    """Yield the patches of each request in turn; every reader reads a next one meanwhile.

    Args:
        readers: Readers of the actor, each with two buffers; pixels are valid until the next step
            of the iteration.
        file: The slide.
        requests: Patches to read, in order.
        px: Side of a patch.
        attempts: Attempts at the slide, over all of its requests.
        timeout_s: Deadline of one request.

    Raises:
        SlideError: The slide's own reason, or ``source_changed``.
    """

    def start(at: int) -> None:
        check_source(file)
        readers[at % len(readers)].start_read(
            str(file.path), requests[at].rects, mpp=requests[at].mpp, px=px, slide_mpp=file.mpp,
            timeout_s=timeout_s,
        )  # fmt: skip

    def finish(at: int) -> Patches:
        while True:
            try:
                return readers[at % len(readers)].finish_read(px=px)
            except SlideError as error:
                check_source(file)  # what failed may be another file than was planned
                attempts.retry_or_raise(error)
                start(at)

    for at in range(min(len(readers), len(requests))):
        start(at)
    for at in range(len(requests)):
        patches = finish(at)
        if at + len(readers) < len(requests):
            start(at + len(readers))
        yield patches
    check_source(file)


def check_source(file: SlideFile) -> None:
    """Refuse a file that is not the one the archive knows any more (``source_changed``)."""
    source = stat_source(file.path)
    if (source.bytes, source.mtime_ns) != (file.bytes, file.mtime_ns):
        raise changed(str(file.path))


def check_revision(encoder: Encoder, revision: str) -> None:
    """Refuse weights on this node that are not the driver's (``other_encoder``)."""
    if encoder.revision != revision:
        raise EncoderError(
            f"{encoder.name} is revision {encoder.revision} on this node, not {revision}.",
            hint="Give every node the same weights: NAME=/shared/folder, or a pinned revision.",
            code="other_encoder",
        )


def begin_encoding(
    encoder: Encoder, pixels: NDArray[np.uint8]
) -> Callable[[], NDArray[np.float32]]:
    """Begin to encode patches; return what waits for their features [n, dim].

    NaN stands where features do not fit the stored fp16. The pixels may be overwritten once this
    returns; an encoder that computes on a GPU goes on meanwhile.

    Raises:
        SlideError: One patch does not fit the memory (``out_of_memory``).
    """
    begin = getattr(encoder, "begin", None)
    try:
        wait = begin(pixels) if begin else _known(encoder(pixels))
    except EncoderError as error:
        if error.code == "out_of_memory":
            raise SlideError(error.message, hint=error.hint, code="out_of_memory") from error
        raise

    def features() -> NDArray[np.float32]:
        values: NDArray[np.float32] = wait()
        # What does not fit fp16 is as lost as a NaN.
        return np.where(np.abs(values) <= np.finfo(np.float16).max, values, np.nan)

    return features


def _known(values: NDArray[np.float32]) -> Callable[[], NDArray[np.float32]]:
    return lambda: values


def encode_ahead(
    encoders: Sequence[Encoder], batches: Iterable[tuple[K, NDArray[np.uint8]]]
) -> Iterator[tuple[K, list[NDArray[np.float32]]]]:
    """Yield each batch's key and features, one array an encoder, in the order of the batches.

    A GPU computes one batch while the next is read, copied and given to it. The pixels of a batch
    are used only until the next is asked for.
    """
    begun: tuple[K, list[Callable[[], NDArray[np.float32]]]] | None = None
    for key, pixels in batches:
        waits = [begin_encoding(encoder, pixels) for encoder in encoders]
        if begun is not None:
            yield begun[0], [wait() for wait in begun[1]]
        begun = key, waits
    if begun is not None:
        yield begun[0], [wait() for wait in begun[1]]
