"""Grounding of a text on one slide of an archive, for the command ``ground``.

:func:`ground_slide` gives heat, boxes and geometry; :class:`GroundingResult` writes them as a
picture or for QuPath. The measured counterpart is :mod:`pathflip.evaluation.grounding`.

Shapes: N regions, M patch slots, P patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from pathflip.display import Picture, data_uri, frame, jpeg, page
from pathflip.errors import ConfigError
from pathflip.evaluation.encoding_cache import EncodingCache
from pathflip.evaluation.grounding import VARIANTS, check_variant
from pathflip.geometry import Tiling
from pathflip.heatmap import (
    MIN_PATCHES,
    SIGMA,
    Box,
    HeatmapGrid,
    find_boxes,
    heat_map,
    heatmap_grid,
    overlay,
    patch_list,
    to_geojson,
    write_geojson,
    write_png,
)

if TYPE_CHECKING:
    from pathflip.archive import Archive
    from pathflip.checkpoints import Run

PICTURE_PX = 640
"""Longer side of the picture that a notebook shows of a heatmap."""
BOX_COLUMNS = (
    "x0", "y0", "w0", "h0", "score", "x_um", "y_um", "w_um", "h_um", "patches",
)  # fmt: skip
PATCH_COLUMNS = ("x0", "y0", "size0", "heat")


@dataclass(frozen=True, kw_only=True, repr=False)
class GroundingResult:
    """Heat of one text on one slide, which a notebook shows over the slide.

    Attributes:
        slide: The slide's row in the archive; its id and mpp alone where no picture is wanted.
        text: Text that was looked for.
        variant, contrast: Settings of the heat.
        score: cos(v_tc(t), t): how well the text fits anywhere.
        heat: Heat of each kept patch [P]; for ``attn`` without contrast it sums to 1.
        rects: (x0, y0, w0, h0) of each kept patch, level-0 px [P, 4].
        grid: Smoothed heat in [0, 1] on the patch grid.
        boxes: The hottest parts, by falling score.
    """

    slide: dict[str, Any]
    text: str
    variant: str
    contrast: str | None
    score: float
    heat: NDArray[np.float64]
    rects: NDArray[np.int64]
    grid: HeatmapGrid
    boxes: list[Box]

    def __repr__(self) -> str:
        where = f"{self.slide['slide_id']}, {len(self.boxes)} boxes, {len(self.heat)} patches"
        return f"GroundingResult({self.text!r} on {where}, score {self.score:.3f})"

    def to_pandas(self, *, of: Literal["boxes", "patches"] = "boxes") -> Any:
        """Return a pandas DataFrame in level-0 px, boxes also in µm.

        Args:
            of: Rows: the ``boxes``, by falling score, or the heat of all ``patches``.
        """
        rows = self.as_json(patches=of == "patches")[of]
        return frame(rows, BOX_COLUMNS if of == "boxes" else PATCH_COLUMNS)

    def _repr_html_(self) -> str:
        """Show heat and boxes over the thumbnail, and the boxes as a table."""
        pictures = []
        if self.slide.get("thumbnail") and self.slide.get("thumbnail_mpp"):
            picture = jpeg(self.picture(), px=PICTURE_PX)
            pictures = [Picture(uri=data_uri(picture), alt=f"Heat of {self.text!r}")]
        boxes = [box.as_json() for box in self.boxes]
        return page(
            self.text,
            note=f"{self.slide['slide_id']}, score {self.score:.3f}",
            pictures=pictures,
            columns=("box", "x0, y0 (px)", "w0, h0 (px)", "w, h (µm)", "score", "patches"),
            rows=[
                (
                    str(number), f"{box['x0']}, {box['y0']}", f"{box['w0']}, {box['h0']}",
                    f"{box['w_um']:.0f}, {box['h_um']:.0f}", f"{box['score']:.3f}",
                    str(box["patches"]),
                )
                for number, box in enumerate(boxes, start=1)
            ],
        )  # fmt: skip

    def as_json(self, *, patches: bool = True) -> dict[str, Any]:
        """Return the result for JSON, in level-0 px; boxes in µm too.

        Args:
            patches: Whether to return the heat of every patch.
        """
        every = np.ones(len(self.heat), np.bool_)
        more = {"patches": patch_list(self.heat, every, self.rects)} if patches else {}
        return more | {
            "slide_id": self.slide["slide_id"],
            "text": self.text,
            "variant": self.variant,
            "contrast": self.contrast,
            "score": self.score,
            "mpp": self.slide["mpp"],
            "patch_um": self.grid.patch_um,
            "boxes": [box.as_json() for box in self.boxes],
        }

    def geojson(self, *, patches: bool = True) -> dict[str, Any]:
        """Return boxes, and patches as tiles, for QuPath, which crops to the slide's bounds.

        Args:
            patches: Whether to return the heat of every patch.
        """
        return to_geojson(
            slide_id=self.slide["slide_id"],
            text=self.text,
            boxes=self.boxes,
            rects=self.rects if patches else None,
            heat=self.heat if patches else None,
            bounds_x0=self.slide["bounds_x0"] or 0,
            bounds_y0=self.slide["bounds_y0"] or 0,
        )

    def picture(self, *, boxes: bool = True) -> NDArray[np.uint8]:
        """Draw heat and boxes over the thumbnail, RGB [h, w, 3].

        Raises:
            ConfigError: The archive has no thumbnail of the slide.
        """
        return overlay(
            self.thumbnail(),
            self.grid,
            mpp=self.slide["thumbnail_mpp"],
            boxes=self.boxes if boxes else (),
        )

    def thumbnail(self) -> NDArray[np.uint8]:
        """Return the slide's thumbnail, RGB [h, w, 3]."""
        import simplejpeg

        data = self.slide["thumbnail"]
        if not data or not self.slide["thumbnail_mpp"]:
            raise ConfigError(
                f"The archive has no thumbnail of {self.slide['slide_id']}.",
                hint="Write GeoJSON instead: --out FILE.geojson.",
                code="no_thumbnail",
            )
        return np.asarray(simplejpeg.decode_jpeg(data, fastdct=False), np.uint8)

    def write(self, path: str | Path) -> Path:
        """Write a ``.png`` over the thumbnail, or ``.geojson`` for QuPath.

        Raises:
            ConfigError: The ending is another, or the file cannot be written.
        """
        path = Path(path)
        check_ending(path)
        if path.suffix.lower() == ".png":
            return write_png(path, self.picture())
        return write_geojson(path, self.geojson())


def check_ending(path: str | Path) -> None:
    """Refuse a file that is neither a picture nor GeoJSON.

    Raises:
        ConfigError: Its ending is neither .png nor .geojson.
    """
    if Path(path).suffix.lower() not in (".png", ".geojson"):
        raise ConfigError(
            f"{path} is neither a picture nor GeoJSON.",
            hint="End its name in .png or .geojson.",
            code="out",
        )


def ground_slide(
    archive: Archive,
    run: Run | EncodingCache,
    slide: str,
    text: str,
    *,
    variant: str = VARIANTS[0],
    contrast: str | None = None,
    sigma: float = SIGMA,
    min_patches: int = MIN_PATCHES,
    images: bool = True,
) -> GroundingResult:
    """Compute heat and boxes of a text on a slide.

    Args:
        archive: Archive with the slide and its features.
        run: Run of the model, or a cache of what it encoded.
        slide: A ``slide_id`` or unique file name.
        text: Text to look for.
        variant: ``attn``, ``region_only``, ``cosine`` or ``product``.
        contrast: Neutral prompt whose heat is subtracted, such as "tissue".
        sigma: Standard deviation of the smoothing, patches.
        min_patches: Minimum number of patches of a box.
        images: Whether to read the slide's whole row, which a picture or a file needs.

    Raises:
        ConfigError: The text is empty, the variant unknown, or the run does not fit the archive.
        ArchiveError: The slide is unknown or not ready.
    """
    if not text.strip():
        raise ConfigError("The text to look for is empty.", hint='Say it: "areas of necrosis".')
    how = check_variant(variant)
    cache = run if isinstance(run, EncodingCache) else EncodingCache(run)
    seen = cache.slide(archive, slide)
    found = cache.run.model.heat(
        seen.sight, seen.mask, cache.texts([text] if contrast is None else [text, contrast]),
        variant=how, contrast=contrast is not None,
    )  # fmt: skip
    heat, mask = found.heat[0, 0].double().cpu().numpy(), seen.mask[0].cpu().numpy()
    tiling = Tiling(**archive.tiling())
    raw = heatmap_grid(heat, mask, seen.region_xy, tiling, mpp=seen.mpp)
    grid = heat_map(raw, sigma=sigma)
    return GroundingResult(
        slide=archive.slide(seen.slide_id)
        if images
        else {"slide_id": seen.slide_id, "mpp": seen.mpp},
        text=text,
        variant=variant,
        contrast=contrast,
        score=float(found.score[0, 0]),
        heat=heat[mask],
        rects=seen.rects,
        grid=grid,
        boxes=find_boxes(grid, heat=raw, min_patches=min_patches),
    )
