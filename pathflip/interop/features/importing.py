"""Imports patch features of other tools into an archive, by its one writer.

Threads read files, place patches and write fragments that nobody sees; this one commits, as in an
ingest, so that slides become ready whole. What cannot be used costs one slide: it is left out and
told with its reason. The same call again does only what is missing, which reads coordinates alone.
"""

from __future__ import annotations

import math
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

import pathflip
from pathflip.archive.archive import Archive
from pathflip.archive.commit import Committer
from pathflip.archive.create import create_archive
from pathflip.archive.schema import CHECKSUM, slides_schema
from pathflip.archive.slide_names import SlideNames
from pathflip.cpus import cpus_here
from pathflip.errors import ArchiveError, ConfigError, SlideError
from pathflip.geometry import Tiling
from pathflip.interop.features import apart
from pathflip.interop.features.encoders import UNSTATED, encoder_name, known_card
from pathflip.interop.features.find import find_features
from pathflip.interop.features.planning import Planned, Scales, plan_slide
from pathflip.interop.features.record import FeatureFile
from pathflip.interop.features.writing import Written, write_slide
from pathflip.interop.labels import read_resolutions
from pathflip.progress import Progress, Report
from pathflip.slides.sources import discover

COMMIT_SLIDES = 128
COMMIT_S = 30.0
TIDY_AFTER_COMMITS = 64


@dataclass(frozen=True, kw_only=True)
class FeatureImport:
    """Settings of an import of features.

    Attributes:
        format: Format of the files; ``auto`` tells it by what they hold.
        encoder: Name of the encoder; where the folder has several, the one to import.
        revision: Revision of the encoder's weights, where the files do not say it.
        licence: Licence of the weights, likewise.
        slides: Slide files and folders: resolution, size and digest are theirs.
        mpp_csv: Table slide,mpp of µm per level-0 pixel; goes before files and slides.
        patch_um: Side of a patch, µm, for an archive that does not exist yet.
        pack_consecutive: Patches to fill a region with, of files without coordinates; None refuses
            them.
        workers: Threads that read and write; None for as many as there are CPUs.
    """

    format: str = "auto"
    encoder: str | None = None
    revision: str | None = None
    licence: str | None = None
    slides: Sequence[str] = ()
    mpp_csv: str | None = None
    patch_um: float | None = None
    pack_consecutive: int | None = None
    workers: int | None = None


@dataclass(frozen=True, kw_only=True)
class FeaturesImported:
    """Result of an import of features.

    Attributes:
        slides: Counts of slides: imported, extended (that had features of another encoder), skipped
            (that are in already) and refused.
        regions: Regions written.
        patches: Patches placed.
        left_out: Counts of patches left out: doubled, outside, not_finite.
        aligned: Share of the patches placed that lie on the archive's grid.
        encoder: The encoder: name, dim, revision, licence, mpp.
        tiling: The archive's grid.
        refused: {path: code and reason}.
        others: Files that hold no patch features.
        bytes: Bytes of features read.
        seconds: Time it took.
    """

    slides: dict[str, int]
    regions: int
    patches: int
    left_out: dict[str, int]
    aligned: float | None
    encoder: dict[str, Any]
    tiling: dict[str, float]
    refused: dict[str, str] = field(default_factory=dict)
    others: int = 0
    bytes: int = 0
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """The document that ``pathflip archive import --features --json`` prints."""
        rate = self.bytes / 1e6 / self.seconds if self.seconds else 0.0
        return asdict(self) | {"mb_per_second": round(rate, 1)}

    @property
    def exit_code(self) -> int:
        """0, or 3 where files were refused."""
        return 3 if self.refused else 0


def import_features(
    archive: str,
    folder: str | Path,
    config: FeatureImport | None = None,
    *,
    dry_run: bool = False,
    progress: Report | None = None,
) -> FeaturesImported:
    """Import the patch features in a folder; the same call again does only what is missing.

    Args:
        archive: Archive URI; made if it does not exist, with the patches' own size.
        folder: Folder of feature files, see :func:`pathflip.interop.features.find.find_features`.
        config: Settings.
        dry_run: Read coordinates, place them and count; read no features and write nothing.
        progress: Progress callback.

    Raises:
        ConfigError: Settings or the folder are wrong, or it holds several encoders.
        ArchiveError: The archive is locked, damaged, or holds the encoder in another revision.
    """
    config = config or FeatureImport()
    started = time.monotonic()
    found = find_features(folder, only=config.format, progress=progress)
    apart.close()  # other threads read the features
    if not found.files:
        path, error = next(iter(found.problems.items()))
        raise ConfigError(
            f"No file of features in {folder} can be used ({len(found.problems):,} are refused), "
            f"beginning with {path}: {error}",
            hint=error.hint,
            code="no_features",
        )
    files, encoder = _of_one_encoder(found.files, config)
    opened = _existing(archive)
    tiling = _tiling(opened, files, config, card_um=encoder.pop("patch_um"))
    if config.pack_consecutive not in (None, tiling.slots):
        raise ConfigError(
            f"Regions of {archive} have {tiling.slots} patches, not {config.pack_consecutive}.",
            hint=f"Give --pack-consecutive {tiling.slots}.",
        )
    tally = _Tally(total=len(files), started=started, progress=progress)
    tally.refused |= {path: f"{error.code}: {error}" for path, error in found.problems.items()}
    if opened is not None and encoder["name"] in opened.encoders():
        encoder = _as_held(encoder, opened, config)
    with _scales(config, files) as scales:

        def planned(record: FeatureFile, *, held: Archive | None) -> Planned:
            return plan_slide(
                record,
                tiling=tiling,
                encoder=encoder["name"],
                scales=scales,
                held=held,
                consecutive=config.pack_consecutive is not None,
            )

        if dry_run:
            for record, plan in _each(
                files, lambda record: planned(record, held=opened), config.workers
            ):
                if isinstance(plan, SlideError):
                    tally.refuse(record, plan)
                else:
                    tally.count(plan, None)
        elif files:
            uri = create_archive(archive, tiling=asdict(tiling)).uri
            with Committer(uri) as committer:
                _run(committer, files, planned, encoder, tiling, tally, config.workers)
    return FeaturesImported(
        slides=tally.slides(),
        regions=tally.regions,
        patches=tally.patches,
        left_out=dict(tally.left_out),
        aligned=round(tally.aligned / tally.planned, 4) if tally.planned else None,
        encoder=encoder,
        tiling=asdict(tiling),
        refused=tally.refused,
        others=found.others,
        bytes=tally.bytes,
        seconds=round(time.monotonic() - started, 3),
    )


def _run(
    committer: Committer,
    files: Sequence[FeatureFile],
    planned: Callable[..., Planned],
    encoder: Mapping[str, Any],
    tiling: Tiling,
    tally: _Tally,
    workers: int | None,
) -> None:
    table = committer.ensure_encoder_table(
        encoder["name"],
        revision=encoder["revision"],
        dim=encoder["dim"],
        mpp=encoder["mpp"],
        licence=encoder["licence"],
    )
    before = committer.archive
    stamp = datetime.now(UTC)
    run = {
        "run_id": stamp.strftime("%Y%m%dT%H%M%S") + "-" + uuid.uuid4().hex[:6],
        "ingested_at": stamp,
        "package_version": pathflip.__version__,
    }

    def work(record: FeatureFile) -> tuple[Planned, Written | None]:
        plan = planned(record, held=before)
        if plan.action == "skip":
            return plan, None
        return plan, write_slide(committer.uri, table, plan, tiling=tiling)

    batch: list[Written] = []
    seen: dict[str, Path] = {}
    commits, since = 0, time.monotonic()
    for record, done in _each(files, work, workers):
        if isinstance(done, SlideError):
            tally.refuse(record, done)
            continue
        plan, written = done
        other = seen.setdefault(plan.slide_id, record.path)
        if other != record.path:
            tally.refuse(record, _same_slide(record, other))
            continue
        tally.count(plan, written)
        if written is not None:
            batch.append(written)
        if len(batch) >= COMMIT_SLIDES or (batch and time.monotonic() - since > COMMIT_S):
            _commit(committer, batch, encoder["name"], run)
            batch, since, commits = [], time.monotonic(), commits + 1
            if commits % TIDY_AFTER_COMMITS == 0:
                committer.tidy()
    if batch:
        _commit(committer, batch, encoder["name"], run)
        commits += 1
    if commits:
        committer.tidy()
        committer.index_slides()


def _commit(
    committer: Committer, batch: Sequence[Written], encoder: str, run: Mapping[str, Any]
) -> None:
    schema = pa.schema([column for column in slides_schema() if column.name != CHECKSUM])
    whole = [{**one.slide, **run} | {"encoders": [encoder]} for one in batch]
    rows = [{name: row.get(name) for name in schema.names} for row in whole]
    committer.commit(
        slides=pa.Table.from_pylist(rows, schema=schema),
        regions=pa.concat_tables([one.regions for one in batch]),
        embeddings={encoder: pa.concat_tables([one.embeddings for one in batch])},
        fragments={encoder: [text for one in batch for text in one.fragments]},
    )


def _each(
    files: Sequence[FeatureFile], work: Callable[[FeatureFile], Any], workers: int | None
) -> Iterator[tuple[FeatureFile, Any]]:
    """Yield (file, result or SlideError) in the order of the files, some ahead of the caller."""
    count = workers or cpus_here()
    with ThreadPoolExecutor(count, thread_name_prefix="features") as pool:
        waiting: list[tuple[FeatureFile, Future[Any]]] = []
        rest = iter(files)
        try:
            while True:
                while len(waiting) < 2 * count and (record := next(rest, None)) is not None:
                    waiting.append((record, pool.submit(work, record)))
                if not waiting:
                    return
                record, future = waiting.pop(0)
                try:
                    result: Any = future.result()
                except SlideError as error:
                    result = error
                yield record, result
        finally:
            for _, future in waiting:
                future.cancel()


class _Tally:
    """Counts of an import, and its progress."""

    def __init__(self, *, total: int, started: float, progress: Report | None) -> None:
        self._total, self._started, self._progress = total, started, progress
        self._actions: Counter[str] = Counter()
        self.refused: dict[str, str] = {}
        self.left_out: Counter[str] = Counter(doubled=0, outside=0, not_finite=0)
        self.regions = self.patches = self.planned = self.aligned = self.bytes = 0

    def refuse(self, record: FeatureFile, error: SlideError) -> None:
        """Count a file that cannot be used."""
        self.refused[str(record.path)] = f"{error.code}: {error}"
        self._report()

    def count(self, plan: Planned, written: Written | None) -> None:
        """Count a slide; ``written`` is None where nothing was, or will not be in a dry run."""
        self._actions[plan.action] += 1
        if plan.action != "skip":
            self.planned += plan.placement.placed
            self.aligned += plan.placement.aligned
            self.left_out["doubled"] += plan.placement.doubled
            self.left_out["outside"] += plan.placement.outside
            self.regions += len(plan.placement.rx) if written is None else len(written.regions)
            self.patches += plan.placement.placed if written is None else written.patches
        if written is not None:
            self.left_out["not_finite"] += written.not_finite
            self.bytes += written.bytes
        self._report()

    def slides(self) -> dict[str, int]:
        """Return the counts of slides."""
        return {
            "imported": self._actions["write"],
            "extended": self._actions["extend"],
            "skipped": self._actions["skip"],
            "refused": len(self.refused),
        }

    def _report(self) -> None:
        if self._progress is not None:
            self._progress(
                Progress(
                    what="importing",
                    done=self._actions.total() + len(self.refused),
                    total=max(self._total, self._actions.total() + len(self.refused)),
                    seconds=time.monotonic() - self._started,
                    note=f"{self.patches:,} patches",
                )
            )


def _of_one_encoder(
    files: Sequence[FeatureFile], config: FeatureImport
) -> tuple[list[FeatureFile], dict[str, Any]]:
    """Return the files of the encoder to import, and what the archive is to know of it."""
    asked = None if config.encoder is None else encoder_name(config.encoder)
    named = {encoder_name(one.encoder) for one in files if one.encoder}
    if asked is None and len(named) != 1:
        raise ConfigError(
            f"The folder holds features of {len(named)} encoders: {', '.join(sorted(named))}."
            if named
            else "The files do not say which encoder made them.",
            hint="Name it: --encoder NAME.",
            code="encoder",
        )
    name = asked or next(iter(named))
    if name in named:
        files = [one for one in files if one.encoder and encoder_name(one.encoder) == name]
    else:
        files = [one for one in files if not one.encoder]  # the one named is theirs
    if not files:
        raise ConfigError(
            f"No file holds features of {config.encoder}.",
            hint=f"There are: {', '.join(sorted(named))}.",
            code="encoder",
        )
    dim, _ = Counter(one.dim for one in files).most_common(1)[0]
    card = known_card(name, dim=dim)
    return list(files), {
        "name": name,
        "dim": dim,
        "revision": _stated(config.revision, [one.revision for one in files]) or UNSTATED,
        "licence": _stated(config.licence, [one.licence for one in files])
        or (card.licence if card else UNSTATED),
        "mpp": _encoder_mpp(files) if card is None else card.mpp,
        "patch_um": None if card is None else card.patch_um,
    }


def _encoder_mpp(files: Sequence[FeatureFile]) -> float | None:
    for one in files:
        if one.notes.get("encoder_mpp"):
            return float(one.notes["encoder_mpp"])
    return None


def _stated(given: str | None, stated: Sequence[str | None]) -> str | None:
    found = sorted({one for one in stated if one})
    if given is not None or not found:
        return given
    if len(found) > 1:
        raise ConfigError(
            f"The files name several revisions or licences of the encoder: {', '.join(found)}.",
            hint="Import them one by one, or state --revision and --licence.",
            code="encoder",
        )
    return found[0]


def _as_held(encoder: dict[str, Any], archive: Archive, config: FeatureImport) -> dict[str, Any]:
    """Return the encoder as the archive has it, where the files do not say otherwise."""
    held = archive.encoders()[encoder["name"]]
    if encoder["revision"] == UNSTATED and held["revision"] != UNSTATED:
        raise ArchiveError(
            f"The archive holds encoder {encoder['name']} with revision {held['revision']}, and "
            "the files do not say theirs.",
            hint=f"If it is the same: --revision {held['revision']}.",
            code="settings",
        )
    return encoder | {"mpp": held["mpp"], "licence": held["licence"]}


def _existing(archive: str) -> Archive | None:
    try:
        return Archive(archive)
    except ArchiveError as error:
        if error.code == "missing_archive":
            return None
        raise


def _tiling(
    archive: Archive | None,
    files: Sequence[FeatureFile],
    config: FeatureImport,
    *,
    card_um: float | None,
) -> Tiling:
    """Return the archive's grid; for a new archive that of the patches."""
    if archive is not None:
        held = Tiling(**archive.tiling())
        if config.patch_um is not None and not math.isclose(config.patch_um, held.patch_um):
            raise ConfigError(
                f"Patches of this archive are {held.patch_um:g} µm wide, not {config.patch_um:g}.",
                hint="Leave --patch-um out, or import into another archive.",
                code="tiling",
            )
        return held
    sizes = Counter(round(one.size_um, 6) for one in files if one.size_um)
    pixels = Counter(round(one.pixel_um, 6) for one in files if one.pixel_um)
    side = config.patch_um or (sizes.most_common(1)[0][0] if sizes else card_um)
    if side is None:
        raise ConfigError(
            "The files do not say how large their patches are at a nominal resolution.",
            hint="Give --patch-um: 128 for 256 pixels at 20x (0.5 µm/px).",
            code="tiling",
        )
    pixel = pixels.most_common(1)[0][0] if pixels else side / 256
    regions = Counter(one.notes["region_um"] for one in files if one.notes.get("region_um"))
    region = float(regions.most_common(1)[0][0]) if regions else side * Tiling().side
    return Tiling(region_um=region, patch_um=side, mpp=pixel)


def _scales(config: FeatureImport, files: Sequence[FeatureFile]) -> Scales:
    """Return where the slides' resolutions come from."""
    given: dict[str, float] = {}
    if config.mpp_csv is not None:
        names = SlideNames.from_paths([one.slide for one in files])
        matches = names.match(read_resolutions(config.mpp_csv), lambda row: (row.slide, False))
        for row, slides in matches.found:
            given |= dict.fromkeys(slides, row.mpp)
    sources = discover(list(config.slides)) if config.slides else []
    return Scales(given=given, sources={one.uri: one for one in sources}, lock=threading.Lock())


def _same_slide(record: FeatureFile, other: Path) -> SlideError:
    return SlideError(
        f"{record.path.name} is of the same slide as {other}.",
        hint="Leave one of them out.",
        code="same_slide",
    )
