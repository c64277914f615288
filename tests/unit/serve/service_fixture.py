"""A small archive that the whole service can run on, with secrets where slides have them.

Regions are made of real pixels, embedded by the real ``texture`` encoder, and a small untrained
model's vectors are indexed, so that a picture of a region must find that region.
"""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pathflip.archive import Archive, schema
from pathflip.archive.captions import Caption, write_captions
from pathflip.archive.commit import Committer
from pathflip.archive.create import create_archive
from pathflip.archive.fragments import write_fragment
from pathflip.archive.indexes import refresh_indexes
from pathflip.archive.model_vectors import ensure_model
from pathflip.checkpoints import Run, load_run, write_whole
from pathflip.encoders import Encoder, load_encoder
from tests.archives import filled
from tests.patch_runs import TEXTURE, make_run

SLIDES, REGIONS, SIDE, PX = 5, 3, 2, 64
SLOTS = SIDE * SIDE
TILING = {
    "region_um": SIDE * PX * 0.5,
    "patch_um": PX * 0.5,
    "mpp": 0.5,
    "min_patch_tissue": 0.5,
    "min_region_patches": 0.1,
}
SECRETS = (
    "/data/DOE^JANE/19561224.svs", "/copies/MRN-4711.svs", "PATIENT-0815", "Jane Doe, born 1956",
    "hospital of secrets", "label: 19561224", "run-secret", "patches-secret",
)  # fmt: skip
"""Words that must not leave: paths, patient, labels, captions, messages."""
TOKENS = {
    "all": ("read,search,chat,annotate,admin", "all-" + "a" * 40),
    "reader": ("read", "reader-" + "b" * 40),
    "finder": ("search", "finder-" + "c" * 40),
    "talker": ("chat", "talker-" + "d" * 40),
    "ann": ("read,annotate", "ann-" + "e" * 40),
    "bob": ("read,annotate", "bob-" + "f" * 40),
}


@dataclass(frozen=True, kw_only=True)
class World:
    """A small archive, a run and tokens.

    Attributes:
        archive, run: Folders.
        token_file: Tokens of :data:`TOKENS`.
        loaded: The run.
        patches: Spec of a patch model whose features the archive has as well.
    """

    archive: Path
    run: Path
    token_file: Path
    loaded: Run
    patches: str | None = None


def pixels(slide: int, region: int) -> NDArray[np.uint8]:
    """The region as a picture at 0.5 µm/px: no two are alike."""
    rng = np.random.default_rng((slide, region))
    side = SIDE * PX
    base = rng.integers(60, 220, 3)
    y, x = np.mgrid[:side, :side]
    wave = np.sin(x / rng.uniform(2, 20)) * np.cos(y / rng.uniform(2, 20))
    noise = rng.normal(0, rng.uniform(3, 30), (side, side, 3))
    return np.clip(base + 30 * wave[..., None] + noise, 0, 255).astype(np.uint8)


def png(picture: NDArray[np.uint8], kind: str = "PNG", **options: Any) -> str:
    """A picture as a client sends it."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(picture).save(out, kind, **options)
    return base64.b64encode(out.getvalue()).decode()


def bearer(name: str) -> dict[str, str]:
    """The header of a client."""
    return {"Authorization": f"Bearer {TOKENS[name][1]}"}


def signed_in(url: str, name: str) -> httpx.Client:
    """A client of a running service that asks as its page does: by a session, without the token."""
    client = httpx.Client(base_url=url, headers={"Sec-Fetch-Site": "same-origin"}, timeout=60)
    assert client.get("/").headers["content-type"].startswith("text/html")
    assert client.post("/v1/session", json={}, headers=bearer(name)).status_code == 204
    assert client.get("/v1/session").json()["name"] == name
    return client


def write_tokens(path: Path) -> Path:
    """The token file; half of the tokens are there as digests only."""
    import hashlib

    lines = ["# who may", ""]
    for number, (name, (scopes, token)) in enumerate(TOKENS.items()):
        shown = f"sha256:{hashlib.sha256(token.encode()).hexdigest()}" if number % 2 else token
        lines.append(f"{name}  {scopes}  {shown}")
    path.write_text("\n".join(lines))
    path.chmod(0o600)
    return path


def make_world(folder: Path, *, patches: bool = False) -> World:
    """Make archive, run and token file below a folder, and a patch model if wanted."""
    archive, run = folder / "archive", folder / "run-secret"
    spec = None
    if patches:
        # Nodes of 256, 128, 64 and 32 µm; patches are of 32.
        spec = f"mrplip:{folder / 'patches-secret'}"
        make_run(folder / "patches-secret", TEXTURE, parent_um=256.0, node_px=128)
    _make_archive(archive, patches=spec)
    make_slide_run(run)
    loaded = load_run(run)
    _index(archive, loaded)
    tokens = write_tokens(folder / "tokens")
    return World(archive=archive, run=run, token_file=tokens, loaded=loaded, patches=spec)


def slide_id(slide: int) -> str:
    """Return the id of slide n."""
    return f"slide{slide:03d}"


def _make_archive(uri: Path, *, patches: str | None = None) -> None:
    import cv2

    from pathflip.encoders.texture import TextureEncoder

    encoders: list[Encoder] = [TextureEncoder()]
    if patches is not None:
        encoders.append(load_encoder(patches, device="cpu", patch_um=TILING["patch_um"]))
    names = [encoder.name for encoder in encoders]
    create_archive(uri, tiling=TILING)
    rows: dict[str, list[dict[str, Any]]] = {"slides": [], "regions": []}
    features: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    embeddings: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for n in range(SLIDES):
        slide = slide_id(n)
        means: dict[str, list[Any]] = {name: [] for name in names}
        for number in range(REGIONS):
            key = {"slide_id": slide, "region_id": schema.region_id(slide, rx=number, ry=0)}
            cut = pixels(n, number).reshape(SIDE, PX, SIDE, PX, 3).swapaxes(1, 2)
            cut = np.ascontiguousarray(cut.reshape(-1, PX, PX, 3))
            place = {"x0": number * SIDE * PX, "y0": 0, "size0": SIDE * PX, "mpp": 0.5}
            more = {"tissue_fraction": 1.0, "n_patches": SLOTS}
            rows["regions"].append(
                key
                | place
                | more
                | {"rx": number, "ry": 0, "n_bad": 0, "patch_mask": np.ones(SLOTS, np.uint8)}
                | {f"patch_{what}": np.zeros(SLOTS) for what in ("tissue", "blur", "pen")}
            )
            for encoder in encoders:
                seen = encoder(cut)
                means[encoder.name].append(seen.mean(axis=0))
                features[encoder.name].append(key | {"features": seen.astype(np.float16).ravel()})
                embeddings[encoder.name].append(
                    {"id": key["region_id"], "kind": "region", "slide_id": slide}
                    | {"patient_id": _patient(n)}
                    | place
                    | more
                    | {"vector": _unit(means[encoder.name][-1])}
                )
        for name in names:
            embeddings[name].append(
                {"id": slide, "kind": "slide", "slide_id": slide, "patient_id": _patient(n)}
                | {"mpp": 0.5, "vector": _unit(np.mean(means[name], axis=0))}
            )
        whole = np.concatenate([pixels(n, number) for number in range(REGIONS)], axis=1)
        small = cv2.resize(whole, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA)
        thumbnail = cv2.imencode(".jpg", np.ascontiguousarray(small[..., ::-1]))[1].tobytes()
        rows["slides"].append(
            {"slide_id": slide, "uri": SECRETS[0], "aliases": [SECRETS[1]], "status": "ready"}
            | {"fingerprint": f"f{n}", "encoders": names, "patient_id": _patient(n)}
            | {"split": "test" if n % 2 else "train", "mpp": 0.5, "vendor": "aperio"}
            | {"width": REGIONS * SIDE * PX, "height": SIDE * PX, "n_regions": REGIONS}
            | {"n_patches": REGIONS * SLOTS, "thumbnail_mpp": 2.0, "tissue_mm2": 0.1}
            | {"thumbnail": None if n == SLIDES - 1 else thumbnail}
            | {"labels": json.dumps({"note": SECRETS[5], "grade": str(1 + n % 2)})}
            | {"reader_note": SECRETS[4]}
        )
    rows["slides"].append(
        {"slide_id": "broken", "uri": SECRETS[0], "aliases": [], "status": "quarantined"}
        | {"reason": "unreadable", "message": f"{SECRETS[0]} cannot be read", "encoders": []}
    )
    with Committer(uri) as committer:
        fragments = {}
        for encoder in encoders:
            table = committer.ensure_encoder_table(
                encoder.name, revision=encoder.revision, dim=encoder.dim, mpp=0.5, licence="MIT"
            )
            block = filled(schema.features_schema(SLOTS, encoder.dim), features[encoder.name])
            fragments[encoder.name] = [write_fragment(committer.uri, table, block)]
        committer.commit(
            slides=filled(schema.slides_schema(), rows["slides"]),
            regions=filled(schema.regions_schema(SLOTS), rows["regions"]),
            embeddings={
                one.name: filled(schema.embeddings_schema(one.dim), embeddings[one.name])
                for one in encoders
            },
            fragments=fragments,
        )
        captions = [Caption(slide_id=slide_id(n), text=caption(n)) for n in range(SLIDES)]
        write_captions(committer, captions, source="report")
        refresh_indexes(committer.lock, "captions")


def caption(slide: int) -> str:
    """Slide n's text; only slide 2 has mucin."""
    found = "mucin" if slide == 2 else "necrosis"
    return f"{SECRETS[3]}. Sections show colon. There is {found}."


def _patient(slide: int) -> str | None:
    return None if slide == 3 else f"{SECRETS[2]}-{slide // 2}"


def _unit(vector: NDArray[Any]) -> NDArray[np.float32]:
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def make_slide_run(folder: Path) -> None:
    """Write a run of an untrained slide model that reads the archive's features."""
    import torch

    from pathflip.encoders.texture import TextureEncoder
    from pathflip.models import PathFLIP

    encoder = TextureEncoder()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = PathFLIP.from_preset(
            "pathflip/mini",
            feature_dim=encoder.dim,
            texts=[caption(n) for n in range(SLIDES)],
            d=16, hidden=32, layers=1, heads=2, ffn=32, patch_width=0, num_queries=2,
            text_hidden=32, text_layers=1, text_heads=2, text_ffn=32,
        ).eval()  # fmt: skip
    about = {
        "run": "run",
        "fingerprint": model.fingerprint(),
        "encoder": {"name": "texture", "revision": encoder.revision, "dim": encoder.dim},
        "tiling": TILING,
    }

    def fill(part: Path) -> None:
        model.save_pretrained(part)
        (part / "pathflip.json").write_text(json.dumps(about))

    write_whole(folder / "model", fill)


def _index(uri: Path, run: Run) -> None:
    import torch

    archive = Archive(uri)
    with Committer(uri) as committer:
        table = ensure_model(
            committer, run.name, dim=run.model.config.d, fingerprint=run.fingerprint,
            encoder=run.encoder, run="run",
        )  # fmt: skip
        for n in range(SLIDES):
            features, mask, ids = archive.features_array(slide_id(n), "texture")
            with torch.no_grad():
                seen = run.model.encode_slide(
                    torch.tensor(features, dtype=torch.float32)[None], torch.tensor(mask)[None]
                )
            vectors = dict(zip(ids, seen.regions[0].numpy(), strict=True))
            vectors[slide_id(n)] = seen.slide[0].numpy()
            rows = archive.slide_embeddings(slide_id(n), "texture").to_pylist()
            made = [row | {"vector": vectors[row["id"]]} for row in rows]
            committer.replace_rows(
                table, filled(schema.embeddings_schema(run.model.config.d), made)
            )


def rows_of(table: pa.Table) -> list[dict[str, Any]]:
    """Return rows with numbers as JSON has them."""
    found: list[dict[str, Any]] = json.loads(json.dumps(table.to_pylist()))
    return found
