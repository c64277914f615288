"""Embeddings of slides and regions by a trained model.

They are computed from patch features, are deleted with them, and computed again by
``pathflip index``.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from pathflip.archive.archive import Archive
from pathflip.archive.commit import Committer
from pathflip.archive.schema import (
    embeddings_table,
)
from pathflip.archive.storage import guarded, is_local
from pathflip.errors import ArchiveError


def ensure_model(
    committer: Committer,
    name: str,
    *,
    dim: int,
    fingerprint: str,
    encoder: Mapping[str, Any],
    run: str,
) -> str:
    """Create the table of a model's vectors unless the archive has it.

    Args:
        committer: The open writer of the archive.
        name: The model, see :func:`pathflip.checkpoints.load_run`.
        dim: Size of its vectors.
        fingerprint: sha256 of its configuration and weights.
        encoder: ``name`` and ``revision`` of the patch encoder it was trained on.
        run: Name of the run's folder, shown to users.

    Returns:
        The name of the table.

    Raises:
        ArchiveError: If the table belongs to another model or encoder (``wrong_model``).
    """
    archive = committer.archive
    table = embeddings_table(name)
    entry = {
        "dim": dim,
        "fingerprint": fingerprint,
        "encoder": encoder["name"],
        "encoder_revision": encoder["revision"],
        "run": run,
        "embeddings_table": table,
    }
    made = archive.models().get(name)
    if made is not None:
        for key in ("dim", "fingerprint", "encoder", "encoder_revision"):
            if made[key] != entry[key]:
                raise ArchiveError(
                    f"The archive {archive.uri} holds model {name} with {key} {made[key]}, not "
                    f"{entry[key]}.",
                    hint="Give the run's folder another name.",
                    code="wrong_model",
                )
        return table
    if table in archive.tables():
        raise ArchiveError(
            f"The table {table} of {archive.uri} belongs to another model or encoder.",
            hint="Give the run's folder another name.",
            code="wrong_model",
        )
    entry["created_at"] = datetime.now(UTC).isoformat(timespec="seconds")
    committer.add_tables(f"model:{name}", entry)
    return table


def indexed_slides(archive: Archive, name: str) -> set[str]:
    """Return the ready slides that have all of their vectors of a model."""
    import pyarrow.compute as pc

    entry = archive.models().get(name)
    if entry is None:
        return set()
    table = entry["embeddings_table"]
    with guarded(archive.uri, f"read the table {table}", damaged=is_local(archive.uri)):
        rows = archive.dataset(table).to_table(columns=["slide_id"])
    counts = {
        item["values"]: item["counts"] for item in pc.value_counts(rows["slide_id"]).to_pylist()
    }
    ledger = archive.ledger()
    return {
        slide
        for slide in archive.ready_ids(entry["encoder"])
        if counts.get(slide) == ledger[slide]["n_regions"] + 1
    }
