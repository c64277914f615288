"""The reader process: ``python -m pathflip.slides.reader_child``, started by ``SlideReader``.

It limits its own address space first and imports what a request needs when it comes, so that a
process starts fast.
"""

from __future__ import annotations

import mmap
import os
import select
import socket
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from pathflip.errors import ConfigError, SlideError
from pathflip.geometry import Tiling
from pathflip.slides.reader_messages import pack_regions, read_message, write_message

if TYPE_CHECKING:
    from pathflip.slides.pyramid import Pyramid, Tile
    from pathflip.slides.slide import Slide
    from pathflip.slides.sources import Source

MEMORY_LIMIT_BYTES = 3 << 30
"""Address space of a reader beside the memory that it shares with its owner."""
MAX_ENLARGED = 0.03
"""Share that a slide may be coarser than the tiling: a cohort's scanners differ by that much."""
THUMBNAIL_PX = 1024
TILE_QUALITY = 97
"""JPEG quality of tiles: no picture then differs by 2 grey levels on average. At 85 those that are
all noise, as tissue is far away, differ by 5."""
SMALL_TILE = 1 << 12
"""Pixels of tiles that get the best quality there is: of so few, one poor block is a large part."""
FAR, OVERVIEWS = 8, 2
"""Times that a level is finer than one which is then read whole; of how many slides one is kept."""
DARK, PALE = 40, 215
"""Grey levels: all channels of a pixel below the one, or above the other."""

Answer = tuple[dict[str, Any], list[bytes]]
"""Header and blobs of a message."""
Operations = dict[str, Callable[[dict[str, Any], list[bytes]], Answer]]


class ReaderChild:
    """Answers requests one by one, keeping the last slides open.

    Args:
        memory: Memory shared with the owner, for pixels; the last byte is 1 from when a request is
            begun.
        slides: Slides that are kept open.
    """

    def __init__(self, memory: memoryview, slides: int = 2) -> None:
        self.memory, self.kept = memory, slides
        self.slides: OrderedDict[tuple[Any, ...], Slide] = OrderedDict()
        self.overviews: WeakKeyDictionary[Slide, _Overview] = WeakKeyDictionary()

    def slide(self, request: dict[str, Any]) -> Slide:
        """The open slide of a request; opened again if its file changed."""
        from pathflip.slides.slide import Slide

        path, found = Path(request["path"]), _expected(request)
        key = (found, request["mpp"], request["halving"])
        if key in self.slides:
            self.slides.move_to_end(key)
            return self.slides[key]
        slide = Slide(path, mpp=request["mpp"], halving=request["halving"])
        _expected(request)  # else a file put there meanwhile would be kept as the one before
        self.slides[key] = slide
        while len(self.slides) > self.kept:
            self.slides.popitem(last=False)[1].close()
        return slide

    def digest(self, request: dict[str, Any], _: list[bytes]) -> Answer:
        """Answer ``SlideReader.digest``."""
        from pathflip.slides.sources import digest_source

        return {"sha256": digest_source(Path(request["path"]))}, []

    def plan(self, request: dict[str, Any], _: list[bytes]) -> Answer:
        """Answer ``SlideReader.plan``."""
        from pathflip.geometry import plan_regions
        from pathflip.interop.annotation_dicom import SlideFile
        from pathflip.interop.annotation_files import read_tissue
        from pathflip.slides.slide import EQUAL_SCALE
        from pathflip.slides.tissue import TissueConfig, find_tissue

        slide = self.slide(request)
        tiling = Tiling(**request["tiling"])
        config = TissueConfig()
        if tiling.mpp * (1 + MAX_ENLARGED) < slide.mpp:
            raise SlideError(
                f"{slide.path.name} is scanned at {slide.mpp:g} µm per pixel, coarser than the "
                f"{tiling.mpp:g} the archive is cut at.",
                hint="Finer pixels cannot be invented; ingest it into an archive with a coarser "
                "tiling.mpp.",
                code="mpp_too_coarse",
            )
        overview = slide.overview(config.mpp)
        if request["geojson"]:
            mask = read_tissue(
                Path(request["geojson"]),
                width=slide.width,
                height=slide.height,
                slide_mpp=slide.mpp,
                mpp=config.mpp,
                bounds_x0=slide.bounds_x0,
                bounds_y0=slide.bounds_y0,
                classes=request["classes"],
                slide=SlideFile(path=slide.path, width=slide.width, height=slide.height),
            )
        else:
            mask = find_tissue(overview, mpp=config.mpp, slide_mpp=slide.mpp, config=config)
        regions = plan_regions(
            tiling, width=slide.width, height=slide.height, mpp=slide.mpp, tissue=mask
        )
        thumbnail, thumbnail_mpp = _thumbnail(slide, overview, config.mpp)
        info = _about(slide)
        if slide.mpp > tiling.mpp * (1 + EQUAL_SCALE):
            share = slide.mpp / tiling.mpp - 1
            note = f"pixels of {slide.mpp:g} µm are enlarged by {share:.1%}"
            info["reader_note"] = "; ".join(filter(None, [info["reader_note"], note]))
        if not len(regions):
            info["message"] = _why_empty(overview, mask.area_mm2)
        info |= {
            "bounds_x0": slide.bounds_x0,
            "bounds_y0": slide.bounds_y0,
            "tissue_mpp": mask.mpp,
            "tissue_mm2": mask.area_mm2,
            "thumbnail_mpp": thumbnail_mpp,
        }
        blobs = [mask.to_png(), thumbnail, *pack_regions(regions)]
        return {"info": info, "size0": int(regions.size0)}, blobs

    def check(self, request: dict[str, Any], _: list[bytes]) -> Answer:
        """Answer ``SlideReader.check``."""
        return {"info": _about(self.slide(request))}, []

    def read(self, request: dict[str, Any], blobs: list[bytes]) -> Answer:
        """Answer ``SlideReader.start_read``: pixels into the shared memory."""
        from pathflip.slides.quality import patch_quality

        slide = self.slide(request)
        n, px = request["n"], request["px"]
        rects = np.frombuffer(blobs[0], np.int64).reshape(n, 4)
        size = n * px * px * 3
        out = np.frombuffer(self.memory, np.uint8, size, request["offset"]).reshape(n, px, px, 3)
        ok = slide.read_patches(rects, mpp=request["at_mpp"], out=out)
        out[~ok] = 0
        quality = patch_quality(out)
        return {"n": n}, [ok.astype(np.uint8).tobytes(), quality.astype(np.float32).tobytes()]

    def view(self, request: dict[str, Any], _: list[bytes]) -> Answer:
        """Answer ``SlideReader.view``."""
        slide, box, size_px = self.slide(request), request["box"], tuple(request["size_px"])
        _check_work(request, slide, slide.decoded_px(*box[2:], size_px=size_px))
        return {}, [_jpeg(slide.shown(*box, size_px=size_px))]

    def pyramid(self, request: dict[str, Any], _: list[bytes]) -> Answer:
        """Answer ``SlideReader.pyramid``."""
        slide = self.slide(request)
        scale: dict[str, Any]
        try:
            scale = {"mpp": slide.mpp, "mpp_source": slide.scale.source}
        except SlideError:  # its pixels can be looked at all the same
            scale = {"mpp": None, "mpp_source": ""}
        return asdict(_pyramid(slide)) | scale, []

    def tile(self, request: dict[str, Any], _: list[bytes]) -> Answer:
        """Answer ``SlideReader.tile``."""
        slide = self.slide(request)
        place = _pyramid(slide)
        level, column, row = request["tile"]
        if not place.has(level, column, row):
            raise SlideError(f"{slide.path.name} has no such tile.", code="unknown_tile")
        tile = place.tile(level, column, row)
        size_px = tile.width, tile.height
        stored = slide.stored_jpeg(tile.x0, tile.y0, size_px, factor=tile.scale0)
        if stored is not None:
            return {"stored": True}, [stored]
        whole = None
        if level <= place.overview_level:
            whole = self._overview(slide, place, most_px=request.get("most_px"))
        if whole is not None:
            pixels = whole.tile(tile)
        else:
            w0, h0 = tile.width * tile.scale0, tile.height * tile.scale0
            _check_work(request, slide, slide.decoded_px(w0, h0, size_px=size_px))
            pixels = slide.shrunk(tile.x0, tile.y0, size_px, factor=tile.scale0)
        quality = TILE_QUALITY if tile.width * tile.height > SMALL_TILE else 100
        return {"stored": False}, [_jpeg(pixels, quality=quality)]

    def _overview(self, slide: Slide, place: Pyramid, *, most_px: int | None) -> _Overview | None:
        """Return a whole coarse level of a slide that stores none near it; it is read once.

        Args:
            slide: The slide.
            place: Its pyramid.
            most_px: Most pixels to decode for it; None for any number.
        """
        scale0 = place.scale0(place.overview_level)
        if slide.stored_scale(scale0) * FAR > scale0:
            return None
        if slide not in self.overviews:
            size_px = place.size(place.overview_level)
            work = slide.decoded_px(size_px[0] * scale0, size_px[1] * scale0, size_px=size_px)
            if most_px is not None and work > most_px:
                return None
            if len(self.overviews) >= OVERVIEWS:
                self.overviews.clear()
            pixels = slide.shrunk(0, 0, size_px, factor=scale0)
            self.overviews[slide] = _Overview(pixels=pixels, scale0=scale0)
        return self.overviews[slide]

    def unchanged(self, request: dict[str, Any], _: list[bytes]) -> Answer:
        """Answer ``SlideReader.check_unchanged``."""
        _expected(request)
        return {}, []


@dataclass(frozen=True, kw_only=True)
class _Overview:
    """A level of a pyramid in full.

    Attributes:
        pixels: uint8 RGB [h, w, 3].
        scale0: Level-0 px per pixel.
    """

    pixels: NDArray[np.uint8]
    scale0: int

    def tile(self, tile: Tile) -> NDArray[np.uint8]:
        """Return a tile of this level or a coarser one, by area averages."""
        from pathflip.slides.resample import resize_area

        step = tile.scale0 // self.scale0
        x, y = tile.x0 // self.scale0, tile.y0 // self.scale0
        part = np.full((tile.height * step, tile.width * step, 3), 255, np.uint8)
        there = self.pixels[y : y + len(part), x : x + part.shape[1]]
        part[: there.shape[0], : there.shape[1]] = there
        return resize_area(part, width=tile.width, height=tile.height)


def _expected(request: dict[str, Any]) -> Source:
    """Return size and time of a request's slide.

    Raises:
        SlideError: ``source_changed``: they are not those that the request expects.
    """
    from pathflip.slides.sources import stat_source

    path, expected = Path(request["path"]), request.get("expected")
    found = stat_source(path)
    if expected is not None and [found.bytes, found.mtime_ns] != expected:
        there = found.bytes >= 0
        raise SlideError(
            f"{path.name} is not the file that was ingested any more."
            if there
            else f"The file of {path.name} is not where it was.",
            hint="Ingest it again." if there else "Put it back, or ingest it from where it is now.",
            code="source_changed",
        )
    return found


def _check_work(request: dict[str, Any], slide: Slide, px: int) -> None:
    """Refuse to decode more pixels than a request may (``too_many_pixels``)."""
    most = request.get("most_px")
    if most is not None and px > most:
        raise SlideError(
            f"{slide.path.name} stores no smaller level for this: {px:,} pixels would have to be "
            f"decoded, and {most:,} may be.",
            hint="Ask for a smaller part of the slide.",
            code="too_many_pixels",
        )


def _pyramid(slide: Slide) -> Pyramid:
    """Return the pyramid that viewers are given of a slide."""
    from pathflip.slides.pyramid import Pyramid, own_tile

    tile_w, tile_h = own_tile(slide.jpeg_tile)
    return Pyramid(width=slide.width, height=slide.height, tile_w=tile_w, tile_h=tile_h)


def _about(slide: Slide) -> dict[str, Any]:
    """Return what of a slide can be said before its tissue is found; ``SlideReader.check``."""
    return {
        "vendor": slide.vendor,
        "width": slide.width,
        "height": slide.height,
        "levels": slide.levels,
        "mpp": slide.mpp,
        "mpp_source": slide.scale.source,
        "reader": slide.reader,
        "reader_note": "; ".join(filter(None, [slide.reader_note, slide.scale.note])),
    }


def _why_empty(overview: NDArray[np.uint8], tissue_mm2: float) -> str:
    """Say why a slide has no region: what most of it looks like, or that its tissue is small."""
    if tissue_mm2 > 0:
        return f"No region has enough tissue: there are {tissue_mm2:.3g} mm² on the whole slide."
    shares = {
        "nearly black": float((overview.max(axis=2) < DARK).mean()),
        "nearly white, or transparent": float((overview.min(axis=2) > PALE).mean()),
    }
    look, share = max(shares.items(), key=lambda item: item[1])
    if share < 0.5:
        return "No tissue was found: nothing on the slide is darker than its own background."
    return f"No tissue was found: {share:.0%} of the slide is {look}."


def _thumbnail(slide: Slide, overview: NDArray[np.uint8], mpp: float) -> tuple[bytes, float]:
    import cv2

    longest = max(overview.shape[:2])
    if longest < THUMBNAIL_PX:  # a small slide: finer than the overview where it has the pixels
        pixels = slide.thumbnail(min(THUMBNAIL_PX, max(slide.width, slide.height)))
        return _jpeg(pixels), slide.mpp * max(slide.width, slide.height) / max(pixels.shape[:2])
    factor = longest / THUMBNAIL_PX
    height, width = (max(1, round(side / factor)) for side in overview.shape[:2])
    small = cv2.resize(overview, (width, height), interpolation=cv2.INTER_AREA)
    return _jpeg(np.asarray(small, np.uint8)), mpp * factor


def _jpeg(rgb: NDArray[np.uint8], *, quality: int = 85) -> bytes:
    import simplejpeg

    data: bytes = simplejpeg.encode_jpeg(np.ascontiguousarray(rgb), quality=quality)
    return data


def serve(connection: socket.socket, memory: memoryview, operations: Operations) -> None:
    """Answer the requests of a ``ReaderProcess`` until it is gone.

    Args:
        connection: Socket to the owner.
        memory: The memory shared with it; its last byte is 1 from when a request is begun.
        operations: {op: function of a request and its blobs}.
    """
    owner = select.poll()
    owner.register(connection, select.POLLHUP)

    def watch() -> None:
        owner.poll()
        os._exit(0)  # the owner is gone, whatever C code the main thread is in

    threading.Thread(target=watch, daemon=True).start()
    while True:
        try:
            request, blobs = read_message(connection)
        except (EOFError, OSError):
            os._exit(0)
        memory[-1] = 1
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
        write_message(connection, answer, out)


def _failure(code: str, message: str, hint: str) -> dict[str, Any]:
    return {"error": {"code": code, "message": message, "hint": hint}}


def confine(address_space: int) -> None:
    """Limit this process: bytes of address space, and no core dump."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main(arguments: list[str]) -> None:
    """Run the child: arguments are the socket, the shared memory, its size, slides kept open."""
    connection_fd, memory_fd, capacity, slides = (int(argument) for argument in arguments)
    confine(MEMORY_LIMIT_BYTES + capacity)
    import cv2

    cv2.setNumThreads(1)
    memory = memoryview(mmap.mmap(memory_fd, capacity))
    child = ReaderChild(memory, slides)
    operations: Operations = {
        "digest": child.digest,
        "plan": child.plan,
        "check": child.check,
        "read": child.read,
        "view": child.view,
        "pyramid": child.pyramid,
        "tile": child.tile,
        "unchanged": child.unchanged,
    }
    serve(socket.socket(fileno=connection_fd), memory, operations)


if __name__ == "__main__":
    main(sys.argv[1:])
