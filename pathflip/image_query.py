"""Query embeddings from pictures: cut, resampled and pooled as slides in the archive are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from pathflip.encoders import Encoder
from pathflip.errors import ConfigError, SlideError
from pathflip.geometry import Tiling, patch_rects
from pathflip.slides.reader import SlideReader
from pathflip.slides.resample import picture_pixels
from pathflip.slides.tissue import TissueMask

READ_TIMEOUT_S = 60.0
PLAN_TIMEOUT_S = 900.0
_PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP")


@dataclass(frozen=True, kw_only=True)
class ImageQuery:
    """A file to search with, or a box of it: ``FILE`` or ``FILE#x,y,w,h``.

    Attributes:
        path: Slide or picture.
        box: x, y, width, height in level-0 px of a slide or pixels of a picture; None for all.
    """

    path: Path
    box: tuple[int, int, int, int] | None = None

    @classmethod
    def parse(cls, text: str) -> ImageQuery:
        """Read the command-line form.

        Raises:
            ConfigError: The box is not four integers with a positive size.
        """
        name, separator, box = text.rpartition("#")
        if not separator or Path(text).exists():
            return cls(path=Path(text))
        try:
            x, y, w, h = (int(part) for part in box.split(","))
        except ValueError:
            x = y = w = h = -1
        if w <= 0 or h <= 0 or x < 0 or y < 0:
            raise ConfigError(
                f"{box!r} is no box.", hint="Write it as FILE#x,y,w,h in whole level-0 pixels."
            )
        return cls(path=Path(name), box=(x, y, w, h))


def embed_image(
    query: ImageQuery, *, encoder: Encoder, tiling: Tiling, mpp: float | None = None
) -> NDArray[np.float32]:
    """Mean feature of the query's patches, as a unit vector.

    A slide without a box is cut on its tissue as in ingest. A box is cut into whole patches from
    its corner (one patch around its centre if it is smaller); those on tissue are used, or all if
    none is.

    Args:
        query: The file and box.
        encoder: The archive's encoder.
        tiling: The archive's tiling.
        mpp: µm per level-0 pixel of the file; needed for ordinary pictures, which do not state it.

    Returns:
        float32 [dim].

    Raises:
        ConfigError: The picture's scale is unknown, or it is smaller than one patch.
        SlideError: The slide cannot be read there.
    """
    patches = np.concatenate(image_regions(query, encoder=encoder, tiling=tiling, mpp=mpp))
    mean = patches.mean(axis=0, dtype=np.float64)
    return np.asarray(mean / np.linalg.norm(mean), np.float32)


def image_regions(
    query: ImageQuery, *, encoder: Encoder, tiling: Tiling, mpp: float | None = None
) -> list[NDArray[np.float32]]:
    """Patch features of the query by region, as models take them; cut as in :func:`embed_image`.

    A slide keeps its regions; the patches of a box or a picture fill one region or more.

    Returns:
        float32 [n, dim] for each region, 1 to ``tiling.slots`` patches each.

    Raises:
        ConfigError, SlideError: See :func:`embed_image`.
    """
    if not query.path.exists():
        raise ConfigError(f"{query.path} does not exist.", hint="Check the path of --image.")
    picture = query.path.suffix.lower() in _PICTURES
    regions = (_picture if picture else _slide)(query, encoder, tiling, mpp)
    if not regions:
        raise SlideError(f"{query.path.name} has no readable tissue there.", code="empty")
    return regions


def query_picture(
    query: ImageQuery, *, tiling: Tiling, mpp: float | None = None, px: int = 512
) -> bytes:
    """JPEG of the query for people, its longer side about ``px`` pixels."""
    if query.path.suffix.lower() in _PICTURES:
        pixels = _read_picture(query)
        scale = min(1.0, px / max(pixels.shape[:2]))
        size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
        small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
        return bytes(cv2.imencode(".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR))[1])
    with SlideReader(patches=1, px=16) as reader:
        path = str(query.path.absolute())
        if query.box is None:
            return reader.plan(path, tiling=tiling, mpp=mpp, timeout_s=PLAN_TIMEOUT_S).thumbnail
        x, y, w, h = query.box
        return reader.view(path, x0=x, y0=y, size0=max(w, h), px=px, slide_mpp=mpp)


def _slide(
    query: ImageQuery, encoder: Encoder, tiling: Tiling, mpp: float | None
) -> list[NDArray[np.float32]]:
    found = []
    with SlideReader(patches=tiling.slots, px=tiling.patch_px) as reader:
        path = str(query.path.absolute())
        plan = reader.plan(path, tiling=tiling, mpp=mpp, timeout_s=PLAN_TIMEOUT_S)
        scale, width, height = plan.info["mpp"], plan.info["width"], plan.info["height"]
        if query.box is None:
            regions = plan.regions
            rects = [
                patch_rects(tiling, rx=int(rx), ry=int(ry), mpp=scale)[mask]
                for rx, ry, mask in zip(regions.rx, regions.ry, regions.patch_mask, strict=True)
            ]
        else:
            boxed = _box_rects(query.box, tiling.patch_um / scale, width, height)
            mask = TissueMask.from_png(
                plan.tissue_png, mpp=plan.info["tissue_mpp"], slide_mpp=scale
            )
            rects = np.array_split(_on_tissue(boxed, mask, tiling), -(-len(boxed) // tiling.slots))
        for group in rects:
            reader.start_read(
                path, group, mpp=tiling.mpp, px=tiling.patch_px, slide_mpp=mpp,
                timeout_s=READ_TIMEOUT_S,
            )  # fmt: skip
            patches = reader.finish_read(px=tiling.patch_px)
            if patches.ok.any():
                found.append(encoder(patches.pixels[patches.ok]))
    return found


def _on_tissue(rects: NDArray[np.int64], mask: TissueMask, tiling: Tiling) -> NDArray[np.int64]:
    """Patches with at least the tissue the archive's tiling asks for; all if none has it."""
    share = np.array(
        [
            mask.coverage(np.array([x, x + w], float), np.array([y, y + h], float))[0, 0]
            for x, y, w, h in rects
        ]
    )
    enough = share >= tiling.min_patch_tissue
    return rects[enough] if enough.any() else rects


def _box_rects(
    box: tuple[int, int, int, int], side0: float, width: int, height: int
) -> NDArray[np.int64]:
    x, y, w, h = box
    if x + w > width or y + h > height:
        raise ConfigError(
            f"The box {x},{y},{w},{h} leaves the slide of {width} x {height} px.",
            hint="Boxes are level-0 pixels.",
        )
    side = round(side0)
    if side > min(width, height):
        raise ConfigError("The slide is smaller than one patch.")
    lines = []
    for start, length, limit in ((x, w, width), (y, h, height)):
        n = int((length + 1) / side0)  # three patches of 256.5 px may be a box of 769
        if n == 0:
            corner = min(max(0, round(start + length / 2 - side0 / 2)), limit - side)
            lines.append(np.array([corner]))
        else:
            corners = np.floor(start + np.arange(n) * side0 + 0.5).astype(np.int64)
            lines.append(np.minimum(corners, limit - side))
    xs, ys = np.meshgrid(*lines)
    sides = np.full(xs.size, side)
    return np.stack([xs.ravel(), ys.ravel(), sides, sides], axis=1).astype(np.int64)


def _picture(
    query: ImageQuery, encoder: Encoder, tiling: Tiling, mpp: float | None
) -> list[NDArray[np.float32]]:
    if mpp is None:
        raise ConfigError(
            f"{query.path.name} does not state its scale.",
            hint="Add --mpp with its µm per pixel, for example --mpp 0.5.",
            code="needs_mpp",
        )
    rgb = _read_picture(query)
    return picture_regions(rgb, encoder=encoder, tiling=tiling, mpp=mpp, name=query.path.name)


def _read_picture(query: ImageQuery) -> NDArray[np.uint8]:
    """Return the pixels of a picture, or of the box of it [h, w, 3]."""
    from PIL import Image

    try:
        with Image.open(query.path, formats=_FORMATS) as image:
            rgb = picture_pixels(image)
    except Image.DecompressionBombError as error:
        raise ConfigError(
            f"{query.path} is too large for a picture: {error}.",
            hint="Cut it, or convert it to a tiled pyramid.",
        ) from error
    except Exception as error:  # Pillow's decoders raise anything for a damaged file
        raise ConfigError(
            f"{query.path} is no picture that can be read.",
            hint="Give a PNG, JPEG, BMP or WebP file, or a slide.",
        ) from error
    if query.box is None:
        return rgb
    x, y, w, h = query.box
    return rgb[y : y + h, x : x + w]


def picture_regions(
    rgb: NDArray[np.uint8],
    *,
    encoder: Encoder,
    tiling: Tiling,
    mpp: float,
    name: str = "The picture",
) -> list[NDArray[np.float32]]:
    """Patch features of a picture by region; what is left of a patch at its edges is cut off.

    Args:
        rgb: Pixels [h, w, 3].
        encoder: The archive's encoder.
        tiling: The archive's tiling.
        mpp: µm per pixel of the picture.
        name: The picture, for messages.

    Returns:
        As :func:`image_regions`.

    Raises:
        ConfigError: It is smaller than one patch.
    """
    factor = mpp / tiling.mpp
    size = (int(rgb.shape[1] * factor), int(rgb.shape[0] * factor))
    px = tiling.patch_px
    if min(size) < px:
        raise ConfigError(
            f"{name} shows {rgb.shape[1] * mpp:.0f} by {rgb.shape[0] * mpp:.0f} µm, "
            f"less than one patch of {tiling.patch_um:g} µm.",
            hint="Give a larger picture, or a slide with a box: its surroundings are used then.",
        )
    method = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
    scaled = rgb if factor == 1 else cv2.resize(rgb, size, interpolation=method)
    rows, columns = size[1] // px, size[0] // px
    cut = np.asarray(scaled[: rows * px, : columns * px], np.uint8)
    patches = cut.reshape(rows, px, columns, px, 3).swapaxes(1, 2).reshape(-1, px, px, 3)
    values = encoder(np.ascontiguousarray(patches))
    return np.array_split(values, -(-len(values) // tiling.slots))
