"""Damage to a cohort's archive, and the way back."""

from pathlib import Path

from pathflip.archive import Archive
from pathflip.archive.commit import Committer
from pathflip.archive.verify import verify
from tests.unit.archive import cohort

SLIDES = range(4)


def flip(path: Path, byte: int, bit: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[byte] ^= 1 << bit
    path.write_bytes(raw)


def newest_manifest(uri: Path, table: str) -> Path:
    return min((uri / f"{table}.lance/_versions").glob("*.manifest"))


def ingest_again(uri: Path) -> None:
    """Ingest as the command does: the encoder's tables, then every slide not done."""
    with Committer(uri) as committer:
        cohort.encoder(committer)
        for n in SLIDES:
            cohort.commit(committer, n)


def assert_like_clean(uri: Path) -> None:
    assert verify(uri).damaged == []
    archive = Archive(uri)
    for n in SLIDES:
        written = cohort.region_rows(n)
        assert archive.regions(f"slide{n:03d}").select(written.column_names).equals(written)
        features = archive.features(f"slide{n:03d}").combine_chunks()
        assert features.equals(cohort.feature_rows(n).combine_chunks())
    assert archive.stats()["slides"] == len(SLIDES)
    assert archive.embeddings().num_rows == len(SLIDES) * (cohort.REGIONS + 1)
