"""Vectors of slides and regions by a trained model.

They are made from features, so they go with them, and ``pathflip index`` makes them again.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pathflip.archive.archive import Archive
from pathflip.archive.commit import Committer
from pathflip.archive.schema import (
    embeddings_table,
)
from pathflip.archive.storage import guarded, is_local
from pathflip.errors import ArchiveError

if TYPE_CHECKING:
    from pathflip.checkpoints import Run


def ensure_model(
    committer: Committer,
    name: str,
    *,
    dim: int,
    fingerprint: str,
    encoder: Mapping[str, Any],
    run: str,
) -> str:
    """Makes the table of a model's vectors unless it is there.

    Args:
        committer: The open writer of the archive.
        name: The model, see :func:`pathflip.checkpoints.load_run`.
        dim: Size of its vectors.
        fingerprint: sha256 of its configuration and weights.
        encoder: ``name`` and ``revision`` of the patch encoder it was trained on.
        run: Name of its run's folder, for people.

    Returns:
        The name of the table.

    Raises:
        ArchiveError: If the table belongs to something else (``wrong_model``).
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


def check_fits(archive: Archive, run: Run) -> None:
    """Refuses an archive whose features are not what the model was trained on.

    Raises:
        ArchiveError: With the code ``other_encoder`` or ``other_tiling``.
    """
    wanted = run.encoder
    held = archive.encoders()
    if wanted["name"] not in held:
        raise ArchiveError(
            f"Model {run.name} reads features of {wanted['name']}; the archive {archive.uri} "
            f"holds {', '.join(held) or 'none'}.",
            hint=f"Run: pathflip ingest SLIDES --archive {archive.uri} --encoder "
            f"{wanted['name']} --add-encoder",
            code="other_encoder",
        )
    entry = held[wanted["name"]]
    for key in ("revision", "dim"):
        if entry[key] != wanted[key]:
            raise ArchiveError(
                f"Model {run.name} reads features of {wanted['name']} {key} {wanted[key]}; those "
                f"of {archive.uri} are {key} {entry[key]}.",
                hint="Use the archive it was trained on, or one made with the same encoder.",
                code="other_encoder",
            )
    tiling = archive.tiling()
    if other := [key for key in tiling if run.tiling.get(key) != tiling[key]]:
        raise ArchiveError(
            f"Model {run.name} was trained on slides cut with "
            f"{', '.join(f'{key} {run.tiling.get(key)}' for key in other)}; those of "
            f"{archive.uri} are cut with {', '.join(f'{key} {tiling[key]}' for key in other)}.",
            hint="Use the archive it was trained on, or one cut the same way.",
            code="other_tiling",
        )


def indexed_slides(archive: Archive, name: str) -> set[str]:
    """Returns the ready slides of which all vectors of a model are there."""
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
