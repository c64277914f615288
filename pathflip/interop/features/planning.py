"""Plans the import of one slide: its resolution, its id, and where its patches go."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pathflip.archive.archive import READY, Archive, vectors
from pathflip.archive.slide_names import SlideNames
from pathflip.geometry import FIELD_OFF, Tiling
from pathflip.interop.features.place import Placement, place, place_consecutively, spacing
from pathflip.interop.features.record import FeatureFile, unusable
from pathflip.slides.reader import SlideReader
from pathflip.slides.sources import Source, digest_source, slide_id
from pathflip.slides.staging import Stage

CHECK_TIMEOUT_S = 300.0
MPP_RANGE = (0.1, 10.0)
MAX_SIDE0 = 100_000_000
"""Largest coordinate, level-0 px: 10 m of slide at 0.1 µm/px."""
NO_PLACES = "none: patches in the order of their file"
"""``mpp_source`` of slides whose patches have no places."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """Import of one slide as it is about to happen.

    Attributes:
        record: The file.
        action: ``write`` it, ``extend`` a slide by an encoder, or ``skip`` what is in.
        slide_id: Its id.
        placement: Slots of its patches.
        mpp: µm per level-0 px.
        about: Columns of its row of ``slides`` that are known before features are read.
    """

    record: FeatureFile
    action: Literal["write", "extend", "skip"]
    slide_id: str
    placement: Placement
    mpp: float
    about: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class OfSlide:
    """Facts about a slide beside its features.

    Attributes:
        mpp: µm per level-0 px.
        mpp_source: Origin of it.
        columns: Further columns of ``slides``.
    """

    mpp: float | None
    mpp_source: str | None
    columns: Mapping[str, Any]


class Scales:
    """Resolutions of slides: those of a table, of the slides' files, of the feature files.

    A context manager: it ends the process that opens slides.

    Args:
        given: {slide, as records name it: µm per level-0 px} of a table.
        sources: {uri: slide file}.
        lock: Held while a slide is opened, as there is one reader.
    """

    def __init__(
        self, *, given: Mapping[str, float], sources: Mapping[str, Source], lock: threading.Lock
    ) -> None:
        self._given, self._sources, self._lock = given, sources, lock
        self._names = SlideNames.from_paths(sources)
        self._stage = Stage()
        self._reader: SlideReader | None = None

    def __enter__(self) -> Scales:
        return self

    def __exit__(self, *_: object) -> None:
        if self._reader is not None:
            self._reader.close()

    def of(self, record: FeatureFile) -> OfSlide:
        """Return what is known of the slide of a record.

        Raises:
            SlideError: Its file cannot be used, or several slides have its name
                (``ambiguous_slide``).
        """
        given = self._given.get(record.slide)
        uris = self._names.find(record.slide) if self._sources else []
        if len(uris) > 1:
            raise unusable(
                record.path,
                f"may be of {uris[0]} or of {uris[1]}",
                hint="Give --slides one of their folders at a time.",
                code="ambiguous_slide",
            )
        if not uris:
            mpp = given or record.mpp
            stated = record.notes.get("mpp_source") or record.format
            return OfSlide(
                mpp=mpp,
                mpp_source="override" if given else str(stated) if mpp else None,
                columns=self._of_record(record),
            )
        source = self._sources[uris[0]]
        with self._stage.open(source) as staged:
            with self._lock:
                self._reader = self._reader or SlideReader(patches=1, px=16)
                info = self._reader.check(str(staged.path), mpp=given, timeout_s=CHECK_TIMEOUT_S)
            digest = digest_source(staged.path)
        kept = ("vendor", "width", "height", "levels", "reader", "reader_note")
        return OfSlide(
            mpp=info["mpp"],
            mpp_source=info["mpp_source"],
            columns={name: info.get(name) for name in kept}
            | {"uri": source.uri, "bytes": source.bytes, "mtime_ns": source.mtime_ns}
            | {"sha256": digest, "name": source.uri},
        )

    def _of_record(self, record: FeatureFile) -> dict[str, Any]:
        about = record.path.stat()
        width, height = record.extent or (None, None)
        sha256 = record.notes.get("sha256")
        return {
            "uri": str(record.path),
            "bytes": about.st_size,
            "mtime_ns": about.st_mtime_ns,
            "width": width,
            "height": height,
            "sha256": sha256 if _is_sha256(sha256) else None,
            "name": str(record.notes.get("name") or Path(record.slide).name),
        }


def plan_slide(
    record: FeatureFile,
    *,
    tiling: Tiling,
    encoder: str,
    scales: Scales,
    held: Archive | None,
    consecutive: bool,
) -> Planned:
    """Plan the import of a slide.

    Args:
        record: The file.
        tiling: The archive's grid.
        encoder: The encoder's name in the archive.
        scales: Resolutions.
        held: The archive before this import; None where there is none.
        consecutive: Whether patches without coordinates fill regions in the order of the file.

    Raises:
        SlideError: It cannot be imported: ``needs_mpp``, ``no_places``, ``other_scale``,
            ``no_patches``, ``other_patches``, or its file is damaged.
    """
    known = scales.of(record)
    places = None if record.coordinates is None else record.coordinates()
    if places is None:
        if not consecutive:
            raise unusable(
                record.path,
                "has no coordinates of its patches",
                hint=f"Give the folder that has them beside it, or --pack-consecutive "
                f"{tiling.slots} to make regions of patches in the order of the file.",
                code="no_places",
            )
        # A scale that no place rests on: the grid's own, and said to be none.
        mpp, origin = known.mpp or tiling.mpp, NO_PLACES
        placement = place_consecutively(tiling, record.n)
    else:
        mpp, origin = _checked(record, known)
        placement = _placed(record, places, tiling=tiling, mpp=mpp)
    if not placement.placed:
        raise unusable(record.path, "holds no patch on its slide", code="no_patches")
    name, sha256 = str(known.columns["name"]), known.columns.get("sha256")
    key = slide_id(name, sha256 or record.slide)
    action: Literal["write", "extend", "skip"] = "write"
    cells = hashlib.sha256()
    for part in (placement.rx, placement.ry, np.packbits(placement.source >= 0)):
        cells.update(part.tobytes())
    fingerprint = (
        f"{sha256 or record.slide}/{tiling.fingerprint()}/{mpp}/places:{cells.hexdigest()[:16]}"
    )
    row = None if held is None else held.ledger().get(key)
    if held is not None and row is not None and row["status"] == READY:
        others = sorted(set(row["encoders"] or ()) - {encoder})
        if row["fingerprint"] == fingerprint:
            action = "skip" if encoder in (row["encoders"] or ()) else "extend"
        elif others:
            placement = _as_held(record, placement, held, key, mpp=mpp, others=others)
            fingerprint = row["fingerprint"]
            action = "skip" if encoder in (row["encoders"] or ()) else "extend"
    about = {name: value for name, value in known.columns.items() if name != "name"}
    return Planned(
        record=record,
        action=action,
        slide_id=key,
        placement=placement,
        mpp=mpp,
        about=about | {"fingerprint": fingerprint, "mpp_source": origin},
    )


def _checked(record: FeatureFile, known: OfSlide) -> tuple[float, str]:
    """Return the resolution of a slide, which must be stated somewhere."""
    if known.mpp is None:
        raise unusable(
            record.path,
            "does not say how many µm a level-0 pixel is",
            hint="Give the slides (--slides DIR) or a table slide,mpp (--mpp-csv FILE).",
            code="needs_mpp",
        )
    if not MPP_RANGE[0] <= known.mpp <= MPP_RANGE[1]:
        raise unusable(
            record.path,
            f"is said to have {known.mpp:g} µm per pixel",
            hint="Correct it with --mpp-csv.",
            code="mpp_out_of_range",
        )
    return float(known.mpp), known.mpp_source or record.format


def _placed(
    record: FeatureFile, places: NDArray[np.float64], *, tiling: Tiling, mpp: float
) -> Placement:
    """Place a slide's patches by their centres."""
    scale = mpp if record.unit == "um" else 1.0
    corner = places / scale
    if len(corner) and not (np.abs(corner) <= MAX_SIDE0).all():
        raise unusable(record.path, "has coordinates that are on no slide")
    size = record.size / scale if record.size else spacing(corner)
    size = size or tiling.patch_um / mpp
    ratio = size * mpp / tiling.patch_um
    if not 1 / FIELD_OFF <= ratio <= FIELD_OFF:
        raise unusable(
            record.path,
            f"has patches of {size * mpp:.4g} µm; those of the archive are {tiling.patch_um:g} µm",
            hint=f"Import into an archive of its own, made with --patch-um {size * mpp:.4g}.",
            code="other_scale",
        )
    return place(tiling, corner + size / 2, mpp=mpp, extent=record.extent)


def _as_held(
    record: FeatureFile,
    placement: Placement,
    held: Archive,
    key: str,
    *,
    mpp: float,
    others: list[str],
) -> Placement:
    """Return the placement cut down to the patches the archive has of a slide; all must be there.

    Encoders of a slide share its patches: what another encoder has seen must have features.
    """
    rows = held.regions(key, columns=["rx", "ry", "mpp", "patch_mask"])
    mask = vectors(rows["patch_mask"]).reshape(len(rows), -1) != 0
    where = {(int(x), int(y)): at for at, (x, y) in enumerate(zip(
        placement.rx, placement.ry, strict=True))}  # fmt: skip
    source = np.full(mask.shape, -1, np.int64)
    rx, ry = rows["rx"].to_numpy(), rows["ry"].to_numpy()
    for at, cell in enumerate(zip(rx.tolist(), ry.tolist(), strict=True)):
        if cell in where:
            source[at] = placement.source[where[cell]]
    missing = int((mask & (source < 0)).sum())
    if missing or not np.allclose(rows["mpp"].to_numpy(), mpp, rtol=1e-9):
        raise unusable(
            record.path,
            f"lacks {missing:,} of the {int(mask.sum()):,} patches that the archive holds of "
            f"{key} with {', '.join(others)}"
            if missing
            else f"has another resolution than {key} in the archive",
            hint="Import it into another archive: encoders of one archive share its patches.",
            code="other_patches",
        )
    return replace(
        placement,
        rx=rx.astype(np.int32),
        ry=ry.astype(np.int32),
        source=np.where(mask, source, -1),
        aligned=min(placement.aligned, int(mask.sum())),
    )


def _is_sha256(text: Any) -> bool:
    digits = set("0123456789abcdef")
    return isinstance(text, str) and len(text) == 64 and set(text) <= digits
