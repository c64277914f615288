"""Small archives with features and captions that belong together, made without slides."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pathflip.archive import schema
from pathflip.archive.captions import Caption, write_captions
from pathflip.archive.commit import Committer
from pathflip.archive.create import create_archive
from pathflip.archive.fragments import write_fragment
from pathflip.archive.settings import slots_of

TILING = {
    "region_um": 256.0,
    "patch_um": 64.0,
    "mpp": 0.5,
    "min_patch_tissue": 0.5,
    "min_region_patches": 0.1,
}
SLOTS, DIM = 16, 12
ORGANS = ("colon", "breast", "lung", "muscle")
FINDINGS = ("necrosis", "mucin", "keratin", "haemorrhage", "fibrosis", "lymphocytes")


def filled(fields: pa.Schema, rows: list[dict[str, Any]]) -> pa.Table:
    """Rows as a table, null where a row says nothing."""
    body = pa.schema([field for field in fields if field.name != "checksum"])
    columns = [pa.array([row.get(field.name) for row in rows], field.type) for field in body]
    return pa.Table.from_arrays(columns, schema=body)


def make_archive(
    uri: Path,
    *,
    slides: int = 24,
    regions: tuple[int, int] = (2, 5),
    per_patient: int = 2,
    split: Any = lambda n: "train",
    captions: bool = True,
    dim: int = DIM,
    tiling: Mapping[str, float] = TILING,
    seed: int = 0,
) -> Path:
    """Make an archive: slide n shows an organ all over and each of its findings in one region.

    Args:
        uri: URI of the archive.
        slides: Number of slides.
        regions: Fewest and most regions of a slide.
        per_patient: Slides of a patient.
        split: n -> split, or None.
        captions: Whether to write captions; slide 0 has none then as well.
        dim: Feature width.
        tiling: Grid the slides are cut on.
        seed: Seed of the features.
    """
    slots = slots_of(dict(tiling))
    side = round(tiling["region_um"] / tiling["mpp"])
    rng = np.random.default_rng(seed)
    looks = {name: rng.standard_normal(dim) for name in (*ORGANS, *FINDINGS)}
    rows: dict[str, list[dict[str, Any]]] = {"slides": [], "regions": [], "features": [], "emb": []}
    texts = []
    for n in range(slides):
        slide = f"slide{n:03d}"
        organ = ORGANS[int(rng.integers(len(ORGANS)))]
        found = [FINDINGS[i] for i in rng.permutation(len(FINDINGS))[: int(rng.integers(1, 4))]]
        sentences = [f"Sections show {organ}.", *(f"There is {name}." for name in found)]
        texts.append(Caption(slide_id=slide, text=" ".join(sentences)))
        count = int(rng.integers(regions[0], regions[1] + 1))
        where = {name: int(rng.integers(count)) for name in found}
        for number in range(count):
            mask = rng.random(slots) < 0.9
            mask[0] = True
            features = looks[organ] + 0.3 * rng.standard_normal((slots, dim))
            for name, place in where.items():
                if place == number:
                    features[:6] += 2 * looks[name]
            features[~mask] = 0
            key = {"slide_id": slide, "region_id": schema.region_id(slide, rx=number, ry=n)}
            rows["regions"].append(
                key
                | {"rx": number, "ry": n, "x0": side * number, "y0": side * n, "size0": side}
                | {"mpp": 0.5, "tissue_fraction": 1.0, "n_patches": int(mask.sum()), "n_bad": 0}
                | {"patch_mask": mask.astype(np.uint8)}
                | {f"patch_{what}": np.zeros(slots) for what in ("tissue", "blur", "pen")}
            )
            rows["features"].append(key | {"features": features.astype(np.float16).ravel()})
            rows["emb"].append(
                {"id": key["region_id"], "kind": "region", "slide_id": slide, "mpp": 0.5}
                | {"vector": np.eye(dim)[0]}
            )
        rows["emb"].append(
            {"id": slide, "kind": "slide", "slide_id": slide, "vector": np.eye(dim)[0]}
        )
        rows["slides"].append(
            {"slide_id": slide, "uri": f"/data/{slide}.svs", "aliases": [], "status": "ready"}
            | {"fingerprint": f"f{n}", "encoders": ["tex"], "patient_id": f"P{n // per_patient}"}
            | {"split": split(n), "mpp": 0.5, "n_regions": count, "n_patches": 1}
        )
    create_archive(uri, tiling=dict(tiling))
    with Committer(uri) as committer:
        committer.ensure_encoder_table("tex", revision="1", dim=dim, mpp=0.5, licence="MIT")
        table = schema.features_table("tex")
        fragment = write_fragment(
            committer.uri, table, filled(schema.features_schema(slots, dim), rows["features"])
        )
        committer.commit(
            slides=filled(schema.slides_schema(), rows["slides"]),
            regions=filled(schema.regions_schema(slots), rows["regions"]),
            embeddings={"tex": filled(schema.embeddings_schema(dim), rows["emb"])},
            fragments={"tex": [fragment]},
        )
        if captions:
            write_captions(committer, texts, source="report")
    return uri


TINY = tuple(
    f"model.{name}={value}"
    for name, value in {
        "d": 32, "hidden": 32, "layers": 1, "heads": 2, "ffn": 32, "num_queries": 4,
        "text_hidden": 32, "text_layers": 1, "text_heads": 2, "text_ffn": 32, "vocab_size": 128,
        "dropout": 0.0, "patch_dropout": 0.0, "negatives": "gathered",
    }.items()
)  # fmt: skip
"""Settings over preset pathflip/mini that make a very small model, without dropout."""
