"""Writes the patch features of an archive's slides as files of other tools."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathflip.archive.archive import Archive, vectors
from pathflip.archive.slide_names import shortened
from pathflip.errors import ConfigError
from pathflip.files import write_file
from pathflip.geometry import Tiling
from pathflip.interop.features import hdf5, slidechat, spatialdata, tables
from pathflip.interop.features.encoders import encoder_name, foreign_name
from pathflip.interop.features.place import patch_corners
from pathflip.interop.features.planning import NO_PLACES
from pathflip.interop.features.record import FeatureFile
from pathflip.progress import Progress, Report

_COLUMNS = (
    "slide_id", "uri", "sha256", "mpp", "mpp_source", "width", "height", "tissue_mm2",
    "fingerprint", "run_id", "n_patches",
)  # fmt: skip
DONE = ".pathflip-export.jsonl"
"""File in the folder of an export: a line for each slide whose files are written."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Folder, names and grid of an export, for the writer of a format.

    Attributes:
        out: Folder to write into.
        px: Side of a patch as it was read.
        tiling: The archive's grid.
        encoder: Encoder's name, as the tool knows it.
        origin: Digest of what a slide's files are made from.
    """

    out: Path
    px: int
    tiling: Tiling
    encoder: str
    origin: str = ""


Writer = Callable[[Layout, FeatureFile], Sequence[Path]]
"""Writes the files of a slide, each whole or not at all, and returns them."""


def export_features(
    archive: Archive,
    to: str,
    out: str | Path,
    *,
    slides: Sequence[str] | None = None,
    encoder: str | None = None,
    dry_run: bool = False,
    progress: Report | None = None,
) -> dict[str, Any]:
    """Write slides' patch features as files of another tool, one slide at a time.

    Files are named after the slides' files, and after their ids where two have one name. The same
    call again writes what is missing, and what the archive has made anew since; other files that
    are there already are replaced, whole.

    Args:
        archive: The archive.
        to: A format of :data:`WRITERS`.
        out: Folder to write into; made if it does not exist.
        slides: Slides; by default all ready ones with this encoder.
        encoder: The encoder; may be left out where the archive holds one.
        dry_run: Write nothing, and return what would be written.
        progress: Progress callback.

    Returns:
        {"out", "format", "encoder", "slides" and "patches" that were written, "skipped": slides
        whose files are there, "notes": what the format cannot say}.

    Raises:
        ConfigError: There is no such format.
        ArchiveError: There is no such slide or encoder.
    """
    if to not in WRITERS:
        raise ConfigError(f"There is no format {to!r}.", hint=f"Known: {', '.join(WRITERS)}.")
    name, entry = archive.encoder(encoder)
    ready = archive.ready_ids(name)
    chosen = [archive.resolve(one) for one in slides or ()] or sorted(ready)
    rows = archive.slides(columns=list(_COLUMNS), slide_ids=chosen).to_pylist()
    tiling = Tiling(**archive.tiling())
    names = _file_names(rows)
    layout = Layout(
        out=Path(out).expanduser().absolute(),
        px=tiling.patch_px,
        tiling=tiling,
        encoder=foreign_name(name),
    )
    if not dry_run:
        layout.out.mkdir(parents=True, exist_ok=True)
    started, patches, skipped = time.monotonic(), 0, 0
    done = _done(layout.out)
    for number, row in enumerate(rows):
        stem = names[row["slide_id"]]
        origin = _origin(row, to=to, name=name, entry=entry, tiling=tiling, stem=stem)
        if origin in done:
            skipped += 1
        elif dry_run:
            patches += row["n_patches"]
        else:
            record = slide_record(archive, row, encoder=name, entry=entry, tiling=tiling, name=stem)
            files = WRITERS[to](replace(layout, origin=origin), record)
            _note(layout.out, origin, files)
            patches += record.n
        if progress is not None:
            progress(
                Progress(
                    what="exporting",
                    done=number + 1,
                    total=len(rows),
                    seconds=time.monotonic() - started,
                )
            )
    notes = []
    if to == "slidechat" and entry["dim"] != slidechat.WIDTH:
        notes.append(f"SlideChat reads the first {slidechat.WIDTH} of {entry['dim']} numbers.")
    if placeless := [row["slide_id"] for row in rows if row["mpp_source"] == NO_PLACES]:
        notes.append(f"Patches of {len(placeless)} slides have no true places.")
    return {
        "out": str(layout.out),
        "format": to,
        "encoder": name,
        "slides": len(rows) - skipped,
        "skipped": skipped,
        "patches": patches,
        "notes": notes,
    }


def _origin(
    row: dict[str, Any], *, to: str, name: str, entry: dict[str, Any], tiling: Tiling, stem: str
) -> str:
    """Return a digest of what a slide's files are made from, without reading its features."""
    # Features of a slide that was ingested or imported again are of another run.
    made_from = [to, stem, name, entry["revision"], tiling.fingerprint(), row["slide_id"],
                 row["fingerprint"], row["run_id"]]  # fmt: skip
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:32]


def _done(out: Path) -> set[str]:
    """Return the origins of slides whose files are as they were written."""
    found = set()
    with suppress(FileNotFoundError):
        for line in (out / DONE).read_text(encoding="utf-8").splitlines():
            with suppress(ValueError, KeyError, TypeError, AttributeError):  # a line cut off
                noted = json.loads(line)
                if all(_state(out / file) == was for file, was in noted["files"].items()):
                    found.add(noted["origin"])
    return found


def _state(file: Path) -> list[int]:
    """Return size and time of a file: one that was replaced, by another encoder's say, differs."""
    try:
        about = file.stat()
    except FileNotFoundError:
        return []
    return [about.st_size, about.st_mtime_ns]


def _note(out: Path, origin: str, files: Sequence[Path]) -> None:
    """Note that the files of a slide are written."""
    states = {str(file.relative_to(out)): _state(file) for file in files}
    line = json.dumps({"origin": origin, "files": states})
    with (out / DONE).open("a", encoding="utf-8") as notes:
        notes.write(f"\n{line}\n")  # apart from a line that was cut off


def slide_record(
    archive: Archive,
    row: dict[str, Any],
    *,
    encoder: str,
    entry: dict[str, Any],
    tiling: Tiling,
    name: str,
) -> FeatureFile:
    """Return a slide's patch features row by row of the slide, as other tools have them.

    Args:
        archive: The archive.
        row: The slide's row of ``slides``.
        encoder: The encoder.
        entry: Its entry in the archive's settings.
        tiling: The archive's grid.
        name: The slide's name in files.
    """
    features, mask, _ = archive.features_array(row["slide_id"], encoder)
    regions = archive.regions(row["slide_id"])
    rx, ry = regions["rx"].to_numpy(), regions["ry"].to_numpy()
    places, region, slot = patch_corners(tiling, rx=rx, ry=ry, mask=mask, mpp=row["mpp"])
    scores = np.stack(
        [
            vectors(regions[f"patch_{what}"]).reshape(mask.shape)[region, slot]
            for what in ("tissue", "blur", "pen")
        ],
        axis=1,
    ).astype(np.float32)
    table = np.stack(
        [
            regions[what].to_numpy().astype(np.float64)
            for what in ("rx", "ry", "tissue_fraction", "n_bad")
        ],
        axis=1,
    )

    def read(start: int, stop: int) -> NDArray[Any]:
        return np.asarray(features[region[start:stop], slot[start:stop]])

    stated = {
        "name": Path(row["uri"]).name if row["sha256"] else None,
        "sha256": row["sha256"],
        "mpp_source": row["mpp_source"],
        "tissue_mm2": row["tissue_mm2"],
        "encoder_mpp": entry["mpp"],
        "region_um": tiling.region_um,
    }
    extent = (row["width"], row["height"]) if row["width"] and row["height"] else None
    return FeatureFile(
        path=Path(name),
        format="pathflip",
        slide=name,
        n=len(places),
        dim=int(entry["dim"]),
        read=read,
        coordinates=lambda: places.astype(np.float64),
        size=tiling.patch_um / row["mpp"],
        size_um=tiling.patch_um,
        pixel_um=tiling.mpp,
        mpp=row["mpp"],
        encoder=foreign_name(encoder),
        revision=entry["revision"],
        licence=entry["licence"],
        extent=extent,
        notes={key: value for key, value in stated.items() if value is not None},
        quality=lambda: scores.astype(np.float64),
        regions=lambda: table,
    )


def _file_names(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return {slide_id: name of its files}, no two of them the same whatever their case."""
    stems = {}
    for row in rows:
        forms = shortened(Path(row["uri"]).name)  # the whole, then without its endings
        stems[row["slide_id"]] = forms[min(1, len(forms) - 1)]
    counts = Counter(stem.casefold() for stem in stems.values())
    return {slide: stem if counts[stem.casefold()] == 1 else slide for slide, stem in stems.items()}


def _trident(layout: Layout, record: FeatureFile) -> list[Path]:
    tiling = layout.tiling
    folder = layout.out / f"{10 / tiling.mpp:g}x_{layout.px}px_0px_overlap"
    files = hdf5.write_trident(folder, record, px=layout.px)
    about = {"patch_encoder": layout.encoder, "patch_size": layout.px, "mag": 10 / tiling.mpp}
    config = folder / f"_config_feats_{layout.encoder}.json"
    if not config.exists():
        write_file(config, json.dumps(about, indent=4) + "\n")
    return files


def _clam(layout: Layout, record: FeatureFile) -> list[Path]:
    return hdf5.write_clam(layout.out, record)


def _slidechat(layout: Layout, record: FeatureFile) -> list[Path]:
    return [slidechat.write_slidechat(layout.out, record)]


def _stamp(layout: Layout, record: FeatureFile) -> list[Path]:
    return [hdf5.write_stamp(layout.out / layout.encoder, record, px=layout.px)]


def _h5ad(layout: Layout, record: FeatureFile) -> list[Path]:
    return [tables.write_h5ad(layout.out, record)]


def _spatialdata(layout: Layout, record: FeatureFile) -> list[Path]:
    # LazySlide and the archive name encoders alike.
    named = replace(record, encoder=encoder_name(layout.encoder))
    return [spatialdata.write_spatialdata(layout.out, named, px=layout.px, origin=layout.origin)]


WRITERS: dict[str, Writer] = {
    "trident": _trident,
    "clam": _clam,
    "stamp": _stamp,
    "slidechat": _slidechat,
    "h5ad": _h5ad,
    "spatialdata": _spatialdata,
}
"""Formats of patch features that an archive can be exported to."""
