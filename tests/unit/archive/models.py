"""Made-up vectors of a trained model, and a small real run, for the cohort's slides."""

import json
import zlib

import numpy as np

from pathflip.archive import schema
from pathflip.archive.captions import Caption, write_captions
from pathflip.archive.commit import Committer
from pathflip.archive.indexes import refresh_indexes
from pathflip.archive.model_vectors import ensure_model
from tests.unit.archive import cohort

MODEL, DIM = "mini_0123abcd", 8
ENCODER = {"name": "tex", "revision": "1", "dim": cohort.DIM}
WORDS = (
    "necrosis",
    "keratin",
    "mucin",
    "fibrosis",
    "lymphocytes",
    "haemorrhage",
    "glands",
    "nests",
)


def rows(*numbers: int, seed: int = 0):
    """The vectors of slides, as index writes them."""
    made = [row for n in numbers for row in cohort.embedding_rows(n).to_pylist()]
    for row in made:
        vector = np.random.default_rng((seed, zlib.crc32(row["id"].encode()))).standard_normal(DIM)
        row["vector"] = (vector / np.linalg.norm(vector)).astype(np.float32)
    return cohort.filled(schema.embeddings_schema(DIM), made)


def add(committer: Committer, *numbers: int, name: str = MODEL, fingerprint: str = "f" * 64) -> str:
    """Write the model's table and the vectors of slides."""
    table = ensure_model(
        committer, name, dim=DIM, fingerprint=fingerprint, encoder=ENCODER, run="mini"
    )
    if numbers:
        committer.replace_rows(table, rows(*numbers))
    return table


def caption(n: int) -> str:
    """Text of slide n: words that only some slides have."""
    found = [word for bit, word in enumerate(WORDS) if (n + 1) >> bit & 1]
    return f"Sections of slide {n}. There is {' and '.join(found)}."


def tell(committer: Committer, *numbers: int, source: str = "report") -> None:
    """Write captions of slides and the index of their words."""
    captions = [Caption(slide_id=f"slide{n:03d}", text=caption(n)) for n in numbers]
    write_captions(committer, captions, source=source)
    refresh_indexes(committer.lock, "captions")


def make_run(folder, *, seed: int = 0, tiling=None, encoder=None):
    """A run's exported model, untrained: small, with tokenizer and everything load_run checks."""
    import torch

    from pathflip.checkpoints import write_whole
    from pathflip.models import PathFLIP

    torch.manual_seed(seed)
    model = PathFLIP.from_preset(
        "pathflip/mini",
        feature_dim=cohort.DIM,
        texts=[caption(n) for n in range(60)],
        d=16, hidden=32, layers=1, heads=2, ffn=32, patch_width=0, num_queries=2,
        text_hidden=32, text_layers=1, text_heads=2, text_ffn=32,
    ).eval()  # fmt: skip
    about = {
        "run": folder.name,
        "fingerprint": model.fingerprint(),
        "encoder": ENCODER | (encoder or {}),
        "tiling": cohort.TILING | (tiling or {}),
    }

    def fill(part):
        model.save_pretrained(part)
        (part / "pathflip.json").write_text(json.dumps(about))

    write_whole(folder / "model", fill)
    return model
