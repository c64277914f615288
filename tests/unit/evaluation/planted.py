"""An archive whose features say what is where, and a model that reads them: both have known truth.

Features have four numbers a patch: tumour, necrosis, tissue (always 1), organ (+1 lung, -1 colon).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import torch

from pathflip import Archive
from pathflip.archive import schema
from pathflip.archive.commit import Committer
from pathflip.archive.create import create_archive
from pathflip.archive.fragments import write_fragment
from pathflip.geometry import Tiling, patch_rects
from tests.unit.archive.cohort import filled

TILING = Tiling(region_um=128.0, patch_um=32.0, mpp=0.5, min_patch_tissue=0.5)
GRID = ((0, 0), (1, 0), (1, 1), (3, 2))
DIM = 4
WORDS = {"tumour": (0, 1.0), "necrosis": (1, 1.0), "tissue": (2, 1.0)}
WORDS |= {"lung": (3, 1.0), "colon": (3, -1.0)}


@dataclass(frozen=True, kw_only=True)
class Seen:
    slide: torch.Tensor
    features: torch.Tensor
    mask: torch.Tensor


class PlantedModel:
    """Texts are sums of the words above; a slide is the mean of its patches, a region not used."""

    device = torch.device("cpu")

    def __init__(self, *, region_encoder: str = "qformer") -> None:
        self.config = SimpleNamespace(has_regions=region_encoder != "none")

    def encode_text(self, texts: list[str], *, normalize: bool = True) -> torch.Tensor:
        vectors = torch.zeros(len(texts), DIM)
        vectors[:, 2] = 1e-3  # no text is without direction
        for i, text in enumerate(texts):
            for word, (axis, value) in WORDS.items():
                vectors[i, axis] += value * (word in text.lower().replace(".", "").split())
        return torch.nn.functional.normalize(vectors, dim=-1) if normalize else vectors

    def encode_slide(self, features: torch.Tensor, mask: torch.Tensor) -> Seen:
        assert not features[~mask].any()
        mean = features.sum((1, 2)) / mask.sum((1, 2))[:, None]
        return Seen(slide=torch.nn.functional.normalize(mean, dim=-1), features=features, mask=mask)

    def local_scores(self, seen: Seen, raw: torch.Tensor) -> torch.Tensor:
        """The best patch's agreement with the text."""
        agree = torch.einsum("bnmd,ld->blnm", seen.features, raw) / 4
        return agree.masked_fill(~seen.mask[:, None], -torch.inf).amax((2, 3))

    def encode_vision(self, features: torch.Tensor, mask: torch.Tensor) -> SimpleNamespace:
        seen = self.encode_slide(features, mask)
        return SimpleNamespace(
            slide=seen.slide, tokens=features, attention=None, region_mask=mask.any(2)
        )

    def heat(self, sight, mask, text_raw, *, variant="attn", contrast=False):  # type: ignore[no-untyped-def]
        unit = torch.nn.functional.normalize(text_raw, dim=-1)
        agree = torch.einsum("bnmd,ld->blnm", sight.tokens, unit)
        if variant == "cosine":
            found = agree * mask[:, None]
        else:
            flat = (8 * agree).masked_fill(~mask[:, None], -torch.inf).flatten(2)
            found = flat.softmax(-1).reshape(agree.shape)
        if contrast:  # the last text
            found = found[:, :-1] - found[:, -1:]
        return SimpleNamespace(heat=found, region=found.sum(-1), score=found.amax((2, 3)))

    def ground(self, features, mask, texts, *, variant="attn", contrast=None):  # type: ignore[no-untyped-def]
        every = self.encode_text([*texts, *([contrast] if contrast else [])], normalize=False)
        sight = self.encode_vision(features, mask)
        return self.heat(sight, mask, every, variant=variant, contrast=contrast is not None)

    def fingerprint(self) -> str:
        return "0" * 64


def planted_run(**encoder: Any) -> Any:
    """A run of the planted model; ``encoder`` replaces what it says of its encoder."""
    return SimpleNamespace(
        name="planted_00000000",
        model=PlantedModel(),
        fingerprint="0" * 64,
        encoder={"name": "tex", "revision": "1", "dim": DIM} | encoder,
        tiling={"region_um": 128.0, "patch_um": 32.0, "mpp": 0.5},
        config={},
        path=Path("/runs/planted"),
    )


@dataclass(frozen=True, kw_only=True)
class Slide:
    """Content of one slide of the planted archive.

    ``lesions`` gives for each finding the patch lines (column, row, columns, rows) of a box.
    """

    name: str
    patient: str
    split: str
    mpp: float
    organ: str
    lesions: dict[str, tuple[int, int, int, int]]


def sample(count: int = 24, *, seed: int = 0) -> list[Slide]:
    rng = np.random.default_rng(seed)
    slides = []
    for i in range(count):
        lesions = {}
        for finding, p in (("tumour", 0.6), ("necrosis", 0.4)):
            if rng.uniform() < p:
                # Every other slide lacks the last region: some of its necrosis is not seen.
                rx, ry = GRID[rng.integers(3 + (finding == "necrosis"))]
                lesions[finding] = (4 * rx + int(rng.integers(2)), 4 * ry + 1, 2, 2)
        slides.append(
            Slide(
                name=f"s{i:03d}",
                patient=f"P{i // 2}",
                split=("train", "val", "test")[i // 2 % 3],
                mpp=(0.5, 0.25, 0.2738)[i % 3],
                organ=("lung", "colon")[int(rng.integers(2))],
                lesions=lesions,
            )
        )
    return slides


def box_ring(box: tuple[int, int, int, int], mpp: float) -> list[list[float]]:
    """The closed outline of patches, level-0 px, off the lines by a third of a patch."""
    um = TILING.patch_um
    x, y, w, h = (value * um / mpp for value in box)
    margin = um / mpp / 3
    x, y, w, h = x - margin, y - margin, w + 2 * margin, h + 2 * margin
    return [[x, y], [x + w, y], [x + w, y + h], [x, y + h], [x, y]]


def build(folder: Path, slides: list[Slide]) -> Archive:
    """Commit the archive and write ``lesions/`` beside where the slides would lie."""
    uri = folder / "archive"
    (folder / "lesions").mkdir(parents=True)
    create_archive(uri, tiling={k: getattr(TILING, k) for k in TILING.__dataclass_fields__})
    rows, regions, features, vectors = [], [], [], []
    for i, slide in enumerate(slides):
        grid = GRID[: 3 + i % 2]
        row, mine, values = _rows(slide, grid, folder)
        rows.append(row)
        regions += mine
        features += values
        vectors += [{**r, "id": r["region_id"], "kind": "region"} for r in mine]
        vectors.append({"id": slide.name, "kind": "slide", "slide_id": slide.name})
        outlines = [
            {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": [box_ring(box, slide.mpp)]},
                "properties": {"classification": {"name": finding}},
            }
            for finding, box in slide.lesions.items()
        ]
        (folder / "lesions" / f"{slide.name}.geojson").write_text(
            json.dumps({"type": "FeatureCollection", "features": outlines})
        )
    for vector in vectors:
        vector["vector"] = [1.0, *[0.0] * (DIM - 1)]
    with Committer(uri) as committer:
        table = committer.ensure_encoder_table("tex", revision="1", dim=DIM, mpp=0.5, licence="MIT")
        committer.commit(
            slides=filled(schema.slides_schema(), rows),
            regions=filled(schema.regions_schema(TILING.slots), regions),
            embeddings={"tex": filled(schema.embeddings_schema(DIM), vectors)},
            fragments={
                "tex": [
                    write_fragment(
                        uri, table, filled(schema.features_schema(TILING.slots, DIM), features)
                    )
                ]
            },
        )
    return Archive(uri)


def _rows(
    slide: Slide, grid: tuple[tuple[int, int], ...], folder: Path
) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    regions, features = [], []
    for rx, ry in grid:
        slot = np.arange(TILING.slots)
        column, line = 4 * rx + slot % 4, 4 * ry + slot // 4
        values = np.zeros((TILING.slots, DIM), np.float16)
        values[:, 2] = 1
        values[:, 3] = 1 if slide.organ == "lung" else -1
        for finding, (x, y, w, h) in slide.lesions.items():
            inside = (column >= x) & (column < x + w) & (line >= y) & (line < y + h)
            values[inside, WORDS[finding][0]] = 1
        mask = np.ones(TILING.slots, np.bool_)
        mask[[0, 15]] = False
        values[~mask] = 0
        rects = patch_rects(TILING, rx=rx, ry=ry, mpp=slide.mpp)
        key = schema.region_id(slide.name, rx=rx, ry=ry)
        regions.append(
            {
                "region_id": key,
                "slide_id": slide.name,
                "rx": rx,
                "ry": ry,
                "x0": int(rects[0, 0]),
                "y0": int(rects[0, 1]),
                "size0": round(128 / slide.mpp),
                "mpp": slide.mpp,
                "tissue_fraction": 0.9,
                "n_patches": int(mask.sum()),
                "n_bad": 0,
                "patch_mask": mask.astype(np.uint8).tolist(),
                "patch_tissue": mask.astype(np.float32),
                "patch_blur": np.zeros(TILING.slots, np.float32),
                "patch_pen": np.zeros(TILING.slots, np.float32),
            }
        )
        features.append({"region_id": key, "slide_id": slide.name, "features": values.reshape(-1)})
    side = round(512 / slide.mpp)
    thumbnail = cv2.imencode(".jpg", np.full((128, 128, 3), 230, np.uint8))[1].tobytes()
    labels = {
        "organ": slide.organ,
        "tumour": str(int("tumour" in slide.lesions)),
        "necrosis": str(int("necrosis" in slide.lesions)),
        "empty": "",
    }
    row = {
        "slide_id": slide.name,
        "uri": str(folder / "slides" / f"{slide.name}.svs"),
        "aliases": [],
        "status": "ready",
        "fingerprint": slide.name,
        "encoders": ["tex"],
        "patient_id": slide.patient,
        "split": slide.split,
        "labels": json.dumps(labels),
        "mpp": slide.mpp,
        "width": side,
        "height": side,
        "bounds_x0": 0,
        "bounds_y0": 0,
        "n_regions": len(grid),
        "n_patches": 14 * len(grid),
        "thumbnail": thumbnail,
        "thumbnail_mpp": 4.0,
    }
    return row, regions, features
