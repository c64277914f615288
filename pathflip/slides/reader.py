"""Reads slides in a process of their own.

The C libraries under any slide reader can abort, hang or allocate without bound on a damaged or
hostile file, and no Python exception catches that. So whatever reads slides in bulk owns
``SlideReader``s: children with an address-space limit, a deadline on every request, killed and
replaced when they break it. Requests and answers are JSON with raw byte blobs over a socket;
pixels lie in memory shared with the child and are never copied. Nothing is pickled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathflip.geometry import Regions, Tiling
from pathflip.slides.pyramid import Pyramid, picture_size
from pathflip.slides.reader_messages import unpack_regions
from pathflip.slides.reader_process import ReaderProcess


@dataclass(frozen=True, kw_only=True)
class SlidePlan:
    """A slide's metadata, tissue mask and regions.

    Attributes:
        info: Slide metadata: vendor, width, height, levels, mpp, mpp_source, bounds_x0, bounds_y0,
            reader, reader_note, tissue_mpp, tissue_mm2, thumbnail_mpp; of a slide without a region
            message, which says why.
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
    """Patches just read. ``pixels`` is a view of shared memory, which a later read overwrites.

    Attributes:
        pixels: uint8 [n, px, px, 3]; valid until the reader begins its next read, or with two
            buffers the one after that.
        ok: bool [n]; False where the file is damaged, pixels undefined.
        quality: float32 [n, 2]: blur and pen scores (see ``tissue.patch_quality``).
    """

    pixels: NDArray[np.uint8]
    ok: NDArray[np.bool_]
    quality: NDArray[np.float32]


class SlideReader:
    """Owns one reader process; starts it on first use and again after it was lost.

    A process that dies while it works on a request costs that request (``reader_crash``). One that
    died before it began on it, idle or between two slides, says nothing about this slide: it is
    replaced and the new one asked.

    Args:
        patches: Maximum number of patches of one ``read``.
        px: Their side in pixels.
        halving: See ``Slide``.
        buffers: Reads that the shared memory holds, each of patches · px² · 3 bytes. With two, a
            read may begin while the pixels of the one before it are in use.
        slides: Slides that the process keeps open.

    Every method raises SlideError: the slide's own reason code, ``timeout`` when the deadline
    passed, ``reader_crash`` when the process died.
    """

    program = "pathflip.slides.reader_child"
    """Module that the process runs."""

    def __init__(
        self,
        *,
        patches: int = 256,
        px: int = 256,
        halving: str = "exact",
        buffers: int = 1,
        slides: int = 2,
    ) -> None:
        self._halving = halving
        self._capacity = patches * px * px * 3
        self._buffers, self._buffer = buffers, 0  # the last one that a read was given
        self._process = ReaderProcess(self.program, slides, memory_bytes=buffers * self._capacity)

    def __enter__(self) -> SlideReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def digest(self, path: str, *, timeout_s: float) -> str:
        """sha256 of the slide's bytes (see ``sources.digest_source``)."""
        answer, _ = self._process.ask({"op": "digest", "path": path}, timeout_s)
        return str(answer["sha256"])

    def check(self, path: str, *, mpp: float | None = None, timeout_s: float) -> dict[str, Any]:
        """Open a slide and decide whether its structure can be trusted; read no tissue.

        Returns:
            Its vendor, width, height, levels (those used), mpp, mpp_source, reader, reader_note.
        """
        request = {"op": "check", "path": path, "mpp": mpp, "halving": self._halving}
        answer, _ = self._process.ask(request, timeout_s)
        info: dict[str, Any] = answer["info"]
        return info

    def plan(
        self,
        path: str,
        *,
        tiling: Tiling,
        mpp: float | None = None,
        tissue_geojson: str | None = None,
        tissue_classes: Sequence[str] = (),
        timeout_s: float,
    ) -> SlidePlan:
        """Open a slide, find its tissue and cut it."""
        answer, blobs = self._process.ask(
            {
                "op": "plan",
                "path": path,
                "mpp": mpp,
                "tiling": asdict(tiling),
                "geojson": tissue_geojson,
                "classes": list(tissue_classes),
                "halving": self._halving,
            },
            timeout_s,
        )
        regions = unpack_regions(blobs[2:], size0=answer["size0"], slots=tiling.slots)
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
        self._buffer = (self._buffer + 1) % self._buffers
        self._process.send(
            {
                "op": "read",
                "path": path,
                "mpp": slide_mpp,
                "at_mpp": mpp,
                "px": px,
                "n": len(rects),
                "offset": self._buffer * self._capacity,
                "halving": self._halving,
            },
            timeout_s,
            np.ascontiguousarray(rects, np.int64).tobytes(),
        )

    def finish_read(self, *, px: int) -> Patches:
        """Wait for the read begun by ``start_read``."""
        answer, blobs = self._process.receive()
        n = int(answer["n"])
        offset = self._buffer * self._capacity
        pixels = np.frombuffer(self._process.memory, np.uint8, n * px * px * 3, offset).reshape(
            n, px, px, 3
        )
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
        size0: int | tuple[int, int],
        px: int,
        slide_mpp: float | None = None,
        expected: tuple[int, int] | None = None,
        most_px: int | None = None,
        timeout_s: float = 30.0,
    ) -> bytes:
        """JPEG of a rectangle of level-0 px, its longer side ``px`` pixels; white off the slide.

        Args:
            path: The slide.
            x0: Left edge, level-0 px.
            y0: Top edge.
            size0: Side, or (width, height), level-0 px.
            px: Pixels of the longer side.
            slide_mpp: µm per level-0 pixel, if the file's own is missing or wrong.
            expected: Bytes and mtime_ns that the slide must still have (``source_changed``).
            most_px: Most pixels to decode for it, about (``too_many_pixels``); None for any number.
            timeout_s: Deadline.
        """
        w0, h0 = (size0, size0) if isinstance(size0, int) else size0
        request = self._about(path, slide_mpp, expected)
        request |= {"op": "view", "box": [x0, y0, w0, h0], "size_px": picture_size(w0, h0, px)}
        request["most_px"] = most_px
        _, blobs = self._process.ask(request, timeout_s)
        return blobs[0]

    def pyramid(
        self,
        path: str,
        *,
        slide_mpp: float | None = None,
        expected: tuple[int, int] | None = None,
        timeout_s: float = 30.0,
    ) -> tuple[Pyramid, float | None, str]:
        """Pyramid of a slide's tiles, its µm per level-0 pixel or None, and where that came from.

        Args:
            path: The slide.
            slide_mpp: See :meth:`view`, as the others.
            expected: See there.
            timeout_s: Deadline.
        """
        request = self._about(path, slide_mpp, expected) | {"op": "pyramid"}
        answer, _ = self._process.ask(request, timeout_s)
        sizes = {name: answer[name] for name in ("width", "height", "tile_w", "tile_h")}
        return Pyramid(**sizes), answer["mpp"], answer["mpp_source"]

    def tile(
        self,
        path: str,
        level: int,
        column: int,
        row: int,
        *,
        slide_mpp: float | None = None,
        expected: tuple[int, int] | None = None,
        most_px: int | None = None,
        timeout_s: float = 30.0,
    ) -> tuple[bytes, bool]:
        """JPEG of a tile of :meth:`pyramid`, and whether it is one that the slide itself holds.

        Args:
            path: The slide.
            level: Level of the pyramid.
            column: Place of the tile.
            row: Place of the tile.
            slide_mpp: See :meth:`view`, as the others.
            expected: See there.
            most_px: See there.
            timeout_s: Deadline.

        Raises:
            SlideError: Also ``unknown_tile``; ``bad_tile`` where the file is damaged.
        """
        request = self._about(path, slide_mpp, expected)
        request |= {"op": "tile", "tile": [level, column, row], "most_px": most_px}
        answer, blobs = self._process.ask(request, timeout_s)
        return blobs[0], bool(answer["stored"])

    def check_unchanged(
        self, path: str, *, expected: tuple[int, int], timeout_s: float = 30.0
    ) -> None:
        """Refuse a slide whose bytes and mtime_ns are not these (``source_changed``)."""
        request = self._about(path, None, expected) | {"op": "unchanged"}
        self._process.ask(request, timeout_s)

    def _about(
        self, path: str, slide_mpp: float | None, expected: tuple[int, int] | None
    ) -> dict[str, Any]:
        return {"path": path, "mpp": slide_mpp, "halving": self._halving, "expected": expected}

    def close(self) -> None:
        """Stop the process and release the shared memory."""
        self._process.close()
