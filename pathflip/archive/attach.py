"""What slides get after ingest: captions, and the vectors of a trained model.

Both go through the one :class:`pathflip.archive.commit.Committer`. Captions come from elsewhere, so
they stay while a slide is ingested anew; vectors are made from features, so they go with them and
``pathflip index`` makes them again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pathflip.archive import CAPTIONS, Archive
from pathflip.archive.commit import Committer
from pathflip.archive.schema import (
    CHECKSUM,
    caption_id,
    captions_schema,
    embeddings_schema,
    embeddings_table,
)
from pathflip.archive.storage import guarded, is_local
from pathflip.errors import ArchiveError

if TYPE_CHECKING:
    from pathflip.checkpoints import Run


@dataclass(frozen=True, kw_only=True)
class Caption:
    """What one source says of a slide: a text, questions about the slide, or both.

    Attributes:
        slide_id: The slide.
        text: The text; None leaves the one that is stored, which is empty where there is none.
        qa: Questions and answers, {"question", "answer", "choices"?, "category"?} each; None leaves
            those that are stored.
        statements: What a model made of the text, where the source has that.
    """

    slide_id: str
    text: str | None = None
    qa: list[dict[str, Any]] | None = None
    statements: list[str] = field(default_factory=list)


def write_captions(
    committer: Committer, captions: Iterable[Caption], *, source: str
) -> dict[str, int]:
    """Writes captions of one source; those that are there already are left alone.

    Statements that a model made of a caption stay as long as its text does.

    Args:
        committer: The open writer of the archive.
        captions: At most one a slide.
        source: What they come from; a slide may have captions from several.

    Returns:
        {"new", "changed", "unchanged"}: numbers of slides.
    """
    rows, counts = changed_captions(committer.archive, captions, source=source)
    if rows.num_rows:
        if CAPTIONS not in committer.archive.tables():
            made = {"created_at": datetime.now(UTC).isoformat(timespec="seconds")}
            committer.add_table(CAPTIONS, captions_schema(), {CAPTIONS: made})
        committer.upsert(CAPTIONS, rows)
    return counts


def changed_captions(
    archive: Archive, captions: Iterable[Caption], *, source: str
) -> tuple[pa.Table, dict[str, int]]:
    """Returns the rows that have to be written, and counts as :func:`write_captions` does."""
    from pathflip.text import split_sentences

    stored: dict[str, dict[str, Any]] = {}
    if CAPTIONS in archive.tables():
        with guarded(archive.uri, "read the captions", damaged=is_local(archive.uri)):
            rows = archive.dataset(CAPTIONS).to_table().drop_columns([CHECKSUM]).to_pylist()
        stored = {row["caption_id"]: row for row in rows}
    counts = {"new": 0, "changed": 0, "unchanged": 0}
    write = []
    for caption in captions:
        key = caption_id(caption.slide_id, source)
        old = stored.get(key)
        text, qa = caption.text, None
        if text is None:
            text = old["text"] if old else ""
        if caption.qa is None:
            qa = old["qa"] if old else None
        elif caption.qa:
            qa = json.dumps(caption.qa)
        row: dict[str, Any] = {
            "caption_id": key,
            "slide_id": caption.slide_id,
            "source": source,
            "text": text,
            "sentences": split_sentences(text),
            "statements": caption.statements,
            "model": source if caption.statements else None,
            "qa": qa,
        }
        if old is not None and old["text"] == row["text"] and not caption.statements:
            row |= {"statements": old["statements"] or [], "model": old["model"]}
        if old == row:
            counts["unchanged"] += 1
        else:
            counts["new" if old is None else "changed"] += 1
            write.append(row)
    schema = pa.schema([item for item in captions_schema() if item.name != CHECKSUM])
    return pa.Table.from_pylist(write, schema=schema), counts


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
    noted = {"model": json.dumps({"name": name, **entry})}
    committer.add_table(table, embeddings_schema(dim, noted), {f"model:{name}": entry})
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
