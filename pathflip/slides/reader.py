"""Slides read in a process of their own.

The C libraries under any slide reader can abort, hang or allocate without bound on a damaged or
hostile file, and no Python exception catches that. So whatever reads slides in bulk owns
``SlideReader``s: children with an address-space limit, a deadline on every request, killed and
replaced when they break it. Requests and answers are JSON with raw byte blobs over a socket;
pixels lie in memory shared with the child and are never copied. Nothing is pickled.
"""

from __future__ import annotations

import json
import mmap
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathflip.errors import ConfigError, SlideError
from pathflip.geometry import Regions, Tiling

MEMORY_LIMIT_BYTES = 3 << 30
OPEN_SLIDES = 2
THUMBNAIL_PX = 1024
_HEADER = struct.Struct(">I")


@dataclass(frozen=True, kw_only=True)
class SlidePlan:
    """What a slide is and where it is cut.

    Attributes:
        info: Slide metadata: vendor, width, height, levels, mpp, mpp_source, bounds_x0, bounds_y0,
            reader, reader_note, tissue_mpp, tissue_mm2, thumbnail_mpp.
        regions: Its regions and patches, planned on the tissue mask.
        tissue_png: The tissue mask, one bit per pixel, origin at level-0 (0, 0).
        thumbnail: JPEG of the slide (never of its label or macro image).
    """

    info: dict[str, Any]
    regions: Regions
    tissue_png: bytes
    thumbnail: bytes


@dataclass(frozen=True, kw_only=True)
class Patches:
    """Patches just read. ``pixels`` is a view of shared memory: valid until the next read.

    Attributes:
        pixels: uint8 [n, px, px, 3].
        ok: bool [n]; False where the file is damaged, pixels undefined.
        quality: float32 [n, 2]: blur and pen scores (see ``tissue.patch_quality``).
    """

    pixels: NDArray[np.uint8]
    ok: NDArray[np.bool_]
    quality: NDArray[np.float32]


class SlideReader:
    """Owner of one reader process; starts it on first use and again after it was lost.

    Args:
        patches: How many patches one ``read`` may ask for.
        px: Their side in pixels.
        halving: See ``Slide``.

    Every method raises SlideError: the slide's own reason code, ``timeout`` when the deadline
    passed, ``reader_crash`` when the process died.
    """

    def __init__(self, *, patches: int = 256, px: int = 256, halving: str = "exact") -> None:
        self._halving = halving
        self._capacity = patches * px * px * 3
        self._memory = os.memfd_create("pathflip-patches", os.MFD_CLOEXEC)
        os.ftruncate(self._memory, self._capacity)
        self._map = mmap.mmap(self._memory, self._capacity)
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the reader
        self._pending: tuple[str, float, float] | None = None

    def __enter__(self) -> SlideReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def digest(self, path: str, *, timeout_s: float) -> str:
        """sha256 of the slide's bytes (see ``sources.digest_source``)."""
        answer, _ = self._ask({"op": "digest", "path": path}, timeout_s)
        return str(answer["sha256"])

    def plan(
        self,
        path: str,
        *,
        tiling: Tiling,
        mpp: float | None = None,
        tissue_geojson: str | None = None,
        timeout_s: float,
    ) -> SlidePlan:
        """Open a slide, find its tissue and cut it."""
        answer, blobs = self._ask(
            {
                "op": "plan",
                "path": path,
                "mpp": mpp,
                "tiling": asdict(tiling),
                "geojson": tissue_geojson,
                "halving": self._halving,
            },
            timeout_s,
        )
        regions = _unpack_regions(answer["size0"], tiling.slots, blobs[2:])
        return SlidePlan(
            info=answer["info"], regions=regions, tissue_png=blobs[0], thumbnail=blobs[1]
        )

    def start_read(
        self,
        path: str,
        rects: NDArray[np.int64],
        *,
        mpp: float,
        px: int,
        slide_mpp: float | None,
        timeout_s: float,
    ) -> None:
        """Begin reading patches; ``finish_read`` returns them. One read at a time."""
        if len(rects) * px * px * 3 > self._capacity:
            raise ValueError(f"{len(rects)} patches of {px} px do not fit the shared memory")
        self._send(
            {
                "op": "read",
                "path": path,
                "mpp": slide_mpp,
                "at_mpp": mpp,
                "px": px,
                "n": len(rects),
                "halving": self._halving,
            },
            timeout_s,
            np.ascontiguousarray(rects, np.int64).tobytes(),
        )

    def finish_read(self, *, px: int) -> Patches:
        """Wait for the read begun by ``start_read``."""
        answer, blobs = self._receive()
        n = int(answer["n"])
        pixels = np.frombuffer(self._map, np.uint8, n * px * px * 3).reshape(n, px, px, 3)
        return Patches(
            pixels=pixels,
            ok=np.frombuffer(blobs[0], np.uint8).astype(bool),
            quality=np.frombuffer(blobs[1], np.float32).reshape(n, 2),
        )

    def view(
        self,
        path: str,
        *,
        x0: int,
        y0: int,
        size0: int,
        px: int,
        slide_mpp: float | None = None,
        timeout_s: float = 30.0,
    ) -> bytes:
        """JPEG of a square of ``size0`` level-0 px, shown ``px`` pixels wide."""
        _, blobs = self._ask(
            {"op": "view", "path": path, "mpp": slide_mpp, "box": [x0, y0, size0], "px": px,
             "halving": self._halving},
            timeout_s,
        )  # fmt: skip
        return blobs[0]

    def close(self) -> None:
        """Stop the process and release the shared memory."""
        self._stop()
        self._stderr.close()
        if self._memory >= 0:
            os.close(self._memory)
            self._memory = -1

    # -- the process -----------------------------------------------------------------------------

    def _start(self) -> socket.socket:
        if self._socket is not None:
            return self._socket
        ours, theirs = socket.socketpair()
        self._stderr.seek(0)
        self._stderr.truncate()
        threads = {name: "1" for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")}
        root = str(Path(__file__).resolve().parents[2])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pathflip.slides.reader"]
            + [str(number) for number in (theirs.fileno(), self._memory, self._capacity)],
            pass_fds=(theirs.fileno(), self._memory),
            env={**os.environ, **threads, "PYTHONPATH": root, "MALLOC_ARENA_MAX": "2"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._stderr,
        )
        theirs.close()
        self._socket = ours
        return ours

    def _stop(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._process is not None:
            self._process.kill()
            with suppress(subprocess.TimeoutExpired):  # stuck in the kernel on a dead mount
                self._process.wait(timeout=5)
            self._process = None
        self._pending = None

    def _ask(
        self, request: dict[str, Any], timeout_s: float, *blobs: bytes
    ) -> tuple[dict[str, Any], list[bytes]]:
        self._send(request, timeout_s, *blobs)
        return self._receive()

    def _send(self, request: dict[str, Any], timeout_s: float, *blobs: bytes) -> None:
        if self._pending is not None:
            self._stop()  # an answer nobody came for: never mistake it for this one's
        if self._process is not None and self._process.poll() is not None:
            self._stop()  # it died while idle: not this slide's doing
        connection = self._start()
        self._pending = (request["path"], time.monotonic() + timeout_s, timeout_s)
        try:
            _write(connection, request, blobs)
        except OSError:
            raise self._crashed() from None

    def _receive(self) -> tuple[dict[str, Any], list[bytes]]:
        if self._pending is None or self._socket is None:
            raise ValueError("nothing was asked")
        path, deadline, timeout_s = self._pending
        try:
            answer, blobs = _read(self._socket, deadline)
        except TimeoutError:
            self._stop()
            raise SlideError(
                f"{Path(path).name} gave no answer within {timeout_s:g} s.",
                hint="The storage is too slow or the file makes the reader hang.",
                code="timeout",
            ) from None
        except (EOFError, OSError):
            raise self._crashed() from None
        self._pending = None
        if "error" in answer:
            error = answer["error"]
            raise SlideError(error["message"], hint=error["hint"], code=error["code"])
        return answer, blobs

    def _crashed(self) -> SlideError:
        path = self._pending[0] if self._pending else "?"
        code = None
        if self._process is not None:
            try:
                code = self._process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                code = None
        self._stderr.seek(0)
        words = self._stderr.read().decode(errors="replace").strip().splitlines()
        self._stop()
        died = signal.Signals(-code).name if code is not None and code < 0 else f"exit {code}"
        said = f": {words[-1][:200]}" if words else ""
        return SlideError(
            f"The reader process died on {Path(path).name} ({died}{said}).",
            hint="The file is damaged in a way that crashes the C library, or needs more memory "
            "than a reader may use.",
            code="reader_crash",
        )


# -- messages: 4-byte length, JSON header, then the blobs whose sizes the header lists ----------


def _write(connection: socket.socket, header: dict[str, Any], blobs: tuple[bytes, ...]) -> None:
    text = json.dumps({**header, "blobs": [len(blob) for blob in blobs]}).encode()
    connection.sendall(b"".join((_HEADER.pack(len(text)), text, *blobs)))


def _read(
    connection: socket.socket, deadline: float | None = None
) -> tuple[dict[str, Any], list[bytes]]:
    (length,) = _HEADER.unpack(_exactly(connection, _HEADER.size, deadline))
    header = json.loads(_exactly(connection, length, deadline))
    return header, [_exactly(connection, size, deadline) for size in header["blobs"]]


def _exactly(connection: socket.socket, size: int, deadline: float | None) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        if deadline is not None:
            # An answer that waited for us came in time, however late we collect it.
            left = max(0.0, deadline - time.monotonic())
            if not select.select([connection], [], [], left)[0]:
                raise TimeoutError
        part = connection.recv(min(size - len(parts), 1 << 20))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)


def _pack_regions(regions: Regions) -> list[bytes]:
    return [
        np.asarray(regions.rx, np.int32).tobytes(),
        np.asarray(regions.ry, np.int32).tobytes(),
        np.asarray(regions.x0, np.int64).tobytes(),
        np.asarray(regions.y0, np.int64).tobytes(),
        np.asarray(regions.patch_mask, np.uint8).tobytes(),
        np.asarray(regions.patch_tissue, np.float32).tobytes(),
        np.asarray(regions.tissue_fraction, np.float32).tobytes(),
    ]


def _unpack_regions(size0: int, slots: int, blobs: list[bytes]) -> Regions:
    return Regions(
        rx=np.frombuffer(blobs[0], np.int32),
        ry=np.frombuffer(blobs[1], np.int32),
        x0=np.frombuffer(blobs[2], np.int64),
        y0=np.frombuffer(blobs[3], np.int64),
        size0=size0,
        patch_mask=np.frombuffer(blobs[4], np.uint8).astype(bool).reshape(-1, slots),
        patch_tissue=np.frombuffer(blobs[5], np.float32).reshape(-1, slots),
        tissue_fraction=np.frombuffer(blobs[6], np.float32),
    )


# -- the child -----------------------------------------------------------------------------------


class _Child:
    """The reader process: answers requests one by one, keeping the last slides open."""

    def __init__(self, memory: memoryview) -> None:
        self.memory = memory
        self.slides: OrderedDict[tuple[Any, ...], Any] = OrderedDict()

    def slide(self, request: dict[str, Any]) -> Any:
        from pathflip.slides.slide import Slide
        from pathflip.slides.sources import stat_source

        path = Path(request["path"])
        found = stat_source(path)
        key = (found, request["mpp"], request["halving"])
        if key in self.slides:
            self.slides.move_to_end(key)
            return self.slides[key]
        slide = Slide(path, mpp=request["mpp"], halving=request["halving"])
        self.slides[key] = slide
        while len(self.slides) > OPEN_SLIDES:
            self.slides.popitem(last=False)[1].close()
        return slide

    def digest(self, request: dict[str, Any], _: list[bytes]) -> tuple[dict[str, Any], list[bytes]]:
        from pathflip.slides.sources import digest_source

        return {"sha256": digest_source(Path(request["path"]))}, []

    def plan(self, request: dict[str, Any], _: list[bytes]) -> tuple[dict[str, Any], list[bytes]]:
        from pathflip.geometry import plan_regions
        from pathflip.slides.tissue import TissueConfig, TissueMask, find_tissue

        slide = self.slide(request)
        tiling = Tiling(**request["tiling"])
        config = TissueConfig()
        if tiling.mpp < slide.mpp * 0.99:
            raise SlideError(
                f"{slide.path.name} is scanned at {slide.mpp:g} µm per pixel, coarser than the "
                f"{tiling.mpp:g} the archive is cut at.",
                hint="Finer pixels cannot be invented; ingest it into an archive with a coarser "
                "tiling.mpp.",
                code="mpp_too_coarse",
            )
        overview = slide.overview(config.mpp)
        if request["geojson"]:
            mask = TissueMask.from_geojson(
                Path(request["geojson"]),
                width=slide.width,
                height=slide.height,
                slide_mpp=slide.mpp,
                mpp=config.mpp,
                bounds_x0=slide.bounds_x0,
                bounds_y0=slide.bounds_y0,
            )
        else:
            mask = find_tissue(overview, mpp=config.mpp, slide_mpp=slide.mpp, config=config)
        regions = plan_regions(
            tiling, width=slide.width, height=slide.height, mpp=slide.mpp, tissue=mask
        )
        thumbnail, thumbnail_mpp = _thumbnail(slide, overview, config.mpp)
        info = {
            "vendor": slide.vendor,
            "width": slide.width,
            "height": slide.height,
            "levels": slide.levels,
            "mpp": slide.mpp,
            "mpp_source": slide.scale.source,
            "bounds_x0": slide.bounds_x0,
            "bounds_y0": slide.bounds_y0,
            "reader": slide.reader,
            "reader_note": slide.reader_note,
            "tissue_mpp": mask.mpp,
            "tissue_mm2": mask.area_mm2,
            "thumbnail_mpp": thumbnail_mpp,
        }
        blobs = [mask.to_png(), thumbnail, *_pack_regions(regions)]
        return {"info": info, "size0": int(regions.size0)}, blobs

    def read(
        self, request: dict[str, Any], blobs: list[bytes]
    ) -> tuple[dict[str, Any], list[bytes]]:
        from pathflip.slides.tissue import patch_quality

        slide = self.slide(request)
        n, px = request["n"], request["px"]
        rects = np.frombuffer(blobs[0], np.int64).reshape(n, 4)
        out = np.frombuffer(self.memory, np.uint8, n * px * px * 3).reshape(n, px, px, 3)
        ok = slide.read_patches(rects, mpp=request["at_mpp"], out=out)
        out[~ok] = 0
        quality = patch_quality(out)
        return {"n": n}, [ok.astype(np.uint8).tobytes(), quality.astype(np.float32).tobytes()]

    def view(self, request: dict[str, Any], _: list[bytes]) -> tuple[dict[str, Any], list[bytes]]:
        slide = self.slide(request)
        x0, y0, size0 = request["box"]
        return {}, [_jpeg(slide.shown(x0, y0, size0, px=request["px"]))]


def _thumbnail(slide: Any, overview: NDArray[np.uint8], mpp: float) -> tuple[bytes, float]:
    import cv2

    longest = max(overview.shape[:2])
    if longest < THUMBNAIL_PX:  # a small slide: finer than the overview where it has the pixels
        pixels = slide.thumbnail(min(THUMBNAIL_PX, max(slide.width, slide.height)))
        return _jpeg(pixels), slide.mpp * max(slide.width, slide.height) / max(pixels.shape[:2])
    factor = longest / THUMBNAIL_PX
    height, width = (max(1, round(side / factor)) for side in overview.shape[:2])
    small = cv2.resize(overview, (width, height), interpolation=cv2.INTER_AREA)
    return _jpeg(np.asarray(small, np.uint8)), mpp * factor


def _jpeg(rgb: NDArray[np.uint8]) -> bytes:
    import simplejpeg

    data: bytes = simplejpeg.encode_jpeg(np.ascontiguousarray(rgb), quality=85)
    return data


def _serve(connection: socket.socket, child: _Child) -> None:
    requests: list[tuple[dict[str, Any], list[bytes]]] = []
    ready = threading.Condition()

    def listen() -> None:
        try:
            while True:
                request = _read(connection)
                with ready:
                    requests.append(request)
                    ready.notify()
        except (EOFError, OSError):
            os._exit(0)  # the owner is gone, whatever C code the main thread is in

    threading.Thread(target=listen, daemon=True).start()
    operations: dict[str, Callable[..., tuple[dict[str, Any], list[bytes]]]] = {
        "digest": child.digest,
        "plan": child.plan,
        "read": child.read,
        "view": child.view,
    }
    while True:
        with ready:
            while not requests:
                ready.wait()
            request, blobs = requests.pop(0)
        try:
            answer, out = operations[request["op"]](request, blobs)
        except SlideError as error:
            answer, out = _failure(error.code, error.message, error.hint), []
        except ConfigError as error:  # the only file of the user's that is read here
            answer, out = _failure("bad_outline", error.message, error.hint), []
        except Exception as error:  # the outermost line of a process that must answer
            name = Path(request["path"]).name
            if isinstance(error, MemoryError) or "Insufficient memory" in str(error):
                answer = _failure(
                    "reader_limits",
                    f"{name} needs more memory than a reader may use.",
                    "The file declares a geometry no real slide has.",
                )
            else:
                message = f"{name} cannot be read: {type(error).__name__}: {error}"
                answer = _failure("unreadable", message[:500], "The file may be damaged.")
            out = []
        _write(connection, answer, tuple(out))


def _failure(code: str, message: str, hint: str) -> dict[str, Any]:
    return {"error": {"code": code, "message": message, "hint": hint}}


def main(arguments: list[str]) -> None:
    """Run the child: arguments are the socket, the shared memory and its size."""
    import resource

    connection_fd, memory_fd, capacity = (int(argument) for argument in arguments)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import cv2

    cv2.setNumThreads(1)
    memory = mmap.mmap(memory_fd, capacity)
    _serve(socket.socket(fileno=connection_fd), _Child(memoryview(memory)))


if __name__ == "__main__":
    main(sys.argv[1:])
