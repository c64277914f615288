"""Ingest: slide files in, a searchable archive out.

This module is the pipeline; its parts, in the order of the data::

    config.py      settings
    side_files.py  resolutions, outlines and patients, by the names of slides
    candidates.py  slides found, with what the user gave for each
    resume.py      slides the archive holds already
    copies.py      files that may be copies of each other, in groups
    plan.py        Planner: hash, open, find tissue, cut into chunks of regions
    reading.py     patches of a slide, read ahead by reader processes
    embed.py       Embedder: read, embed, write fragments
    deaths.py      workers that a slide kills, counted
    rows.py        the rows between them and the driver: a slide's record, a chunk
    decision.py    what becomes of a slide
    ledger.py      on the driver: one committer, slides become visible whole
    result.py      progress and result

Planner and Embedder are Ray Data actors, each owning reader processes; a row between them is one
chunk of regions of one slide, so pixels and features never cross the object store and work is
spread by chunk, not by slide. Neither raises for what is wrong with a slide: they return rows with
a status, so that one bad slide costs one slide.

    python -m jobs.ingest SLIDES… --archive URI       (the same as: pathflip ingest …)
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from jobs import cluster
from jobs.cluster import Available, Place
from jobs.ingest.candidates import Candidate, find_candidates
from jobs.ingest.config import IngestConfig as IngestConfig
from jobs.ingest.deaths import Deaths
from jobs.ingest.embed import Embedder
from jobs.ingest.ledger import Ledger
from jobs.ingest.plan import Planner
from jobs.ingest.result import IngestProgress
from jobs.ingest.result import IngestResult as IngestResult
from jobs.ingest.resume import Archived
from jobs.ingest.rows import Held
from jobs.stages import ActorPool, ended, run_stages
from pathflip import tracing
from pathflip.archive import Archive
from pathflip.archive.commit import Committer
from pathflip.archive.create import create_archive
from pathflip.cpus import cpus_here
from pathflip.encoders import EncoderInfo, load_encoder
from pathflip.errors import ArchiveError, ConfigError, SlideError
from pathflip.geometry import patch_rects
from pathflip.interop.captions import import_captions
from pathflip.interop.questions import import_questions
from pathflip.slides.objects import is_remote
from pathflip.slides.reader import SlidePlan, SlideReader
from pathflip.slides.staging import Stage

ACTORS_OF_A_GPU = 2  # one computes while another writes its chunk and begins the next
GPU_READERS = 2  # of each: reading overlaps encoding where the CPU is free meanwhile
STAGED_GROUPS = 8  # groups of slides of object stores that a planner gets at once
PICTURE_BYTES = 256 << 10  # estimate of a thumbnail and a tissue mask


@tracing.job
def ingest(
    sources: Sequence[str],
    archive: str,
    config: IngestConfig | None = None,
    *,
    address: str | None = None,
    progress: Callable[[IngestProgress], None] | None = None,
) -> IngestResult:
    """Ingest slides into an archive; the same call again does only what is missing.

    Args:
        sources: Slide files and folders, also of object stores.
        archive: Archive URI; made if it does not exist.
        config: Settings.
        address: Engine or Ray cluster; see ``cluster.connect``.
        progress: Called on the driver whenever something finished.

    Raises:
        ConfigError, EncoderError, ArchiveError: Before anything is written.
    """
    config = config or IngestConfig()
    started = time.monotonic()
    encoders = config.infos()
    candidates, side = find_candidates(sources, config, slide_of=Archived(archive).paths())
    _check(archive, config, encoders)
    place = cluster.connect(address)
    # The texture encoder has no use for a GPU.
    device = "cpu" if config.device == "auto" and config.specs == ["texture"] else config.device
    there = cluster.available(device, place=place)
    uri = create_archive(archive, tiling=asdict(config.tiling)).uri
    with Committer(uri) as committer:
        tables = [
            committer.ensure_encoder_table(
                info.name,
                revision=info.revision,
                dim=info.dim,
                mpp=info.mpp,
                licence=info.licence,
            )
            for info in encoders
        ]
        ledger = Ledger(
            committer,
            config=config,
            encoders=encoders,
            candidates=candidates,
            side=side,
            started=started,
            progress=progress,
        )
        groups = ledger.outstanding()
        if groups:
            with ended(
                _pipeline(
                    groups,
                    config,
                    uri,
                    tables,
                    encoders,
                    held=ledger.held(),
                    there=there,
                    place=place,
                )
            ) as chunks:
                for batch in chunks:
                    ledger.take(batch)
        result = replace(ledger.finish(), side_files=side.report())
        side.warn("ambiguous")
        if config.captions is not None:
            result = replace(result, captions=import_captions(committer, config.captions))
        if config.questions is not None:
            result = replace(result, questions=import_questions(committer, config.questions))
        return result


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """Result of a dry run: what an ingest would do.

    Attributes:
        slides: Counts of slides: ready, quarantined, empty and skipped; and those of object stores,
            which are not_opened, so that nothing below but bytes_to_read counts them.
        regions: Regions it would cut.
        patches: Patches it would embed.
        bytes_to_read: Bytes of the slides that are not done.
        archive_bytes: Bytes it would add to the archive, about.
        estimated_seconds: Time it would take, about.
        problems: {path: what is wrong} of slides that would be quarantined.
        side_files: For each side file that was given, captions and questions too: {"rows",
            "matched": counts of entries, "unmatched", "ambiguous": names}. Files that turn out to
            be copies of each other are not ambiguous to the ingest itself.
    """

    slides: dict[str, int]
    regions: int
    patches: int
    bytes_to_read: int
    archive_bytes: int
    estimated_seconds: float
    problems: dict[str, str]
    side_files: dict[str, dict[str, Any]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The document ``pathflip ingest --dry-run --json`` prints."""
        document = asdict(self)
        side_files: dict[str, Any] = document.pop("side_files")
        return document | side_files


def dry_run(
    sources: Sequence[str],
    archive: str,
    config: IngestConfig | None = None,
    *,
    address: str | None = None,
    progress: Callable[[IngestProgress], None] | None = None,
) -> DryRun:
    """Plan every slide as ``ingest`` would, time the encoder on real patches, write nothing.

    Reads every file that ``ingest`` would be given, opens every slide and finds its tissue; hashes
    nothing. Slides of object stores are counted, not copied and opened. Time is estimated from
    patches of the first good slide read and embedded in this process, over the CPUs there are.
    """
    config = config or IngestConfig()
    started = time.monotonic()
    encoders = config.infos()
    archived = Archived(archive)
    candidates, side = find_candidates(sources, config, slide_of=archived.paths())
    side.warn("ambiguous")
    _check(archive, config, encoders)
    todo = [c for c in candidates if not archived.is_done(c, config, encoders)]
    here = [c for c in todo if not is_remote(c.source.uri)]
    counts = {"ready": 0, "quarantined": 0, "empty": 0, "skipped": len(candidates) - len(todo)}
    counts["not_opened"] = len(todo) - len(here)
    regions = patches = bytes_done = 0
    total = sum(max(0, c.source.bytes) for c in todo)
    problems: dict[str, str] = {}
    per_patch_s: float | None = None
    tiling = config.tiling
    with SlideReader(patches=tiling.slots, px=tiling.patch_px, halving=config.halving) as reader:
        for index, candidate in enumerate(here):
            source = candidate.source
            try:
                plan = reader.plan(
                    source.uri,
                    tiling=tiling,
                    mpp=candidate.mpp,
                    tissue_geojson=candidate.geojson,
                    tissue_classes=config.tissue_classes,
                    timeout_s=config.plan_timeout_s,
                )
                counts["ready" if len(plan.regions) else "empty"] += 1
                regions += len(plan.regions)
                patches += int(plan.regions.patch_mask.sum())
                if per_patch_s is None and len(plan.regions):
                    per_patch_s = _time_patches(reader, candidate, plan, config)
            except SlideError as error:
                counts["quarantined"] += 1
                problems[source.uri] = f"{error.code}: {error}"
            bytes_done += max(0, source.bytes)
            if progress is not None:
                progress(
                    IngestProgress(
                        slides_done=index + 1,
                        slides_total=len(here),
                        quarantined=counts["quarantined"],
                        regions=regions,
                        patches=patches,
                        bytes_done=bytes_done,
                        bytes_total=total,
                        seconds=time.monotonic() - started,
                        stage="planning",
                    )
                )
    width = sum(info.dim for info in encoders)
    workers = config.actors or cpus_here()
    return DryRun(
        slides=counts,
        regions=regions,
        patches=patches,
        bytes_to_read=total,
        archive_bytes=regions * (tiling.slots * (2 * width + 13) + 4 * width + 200)
        + len(here) * PICTURE_BYTES,
        estimated_seconds=round(
            (patches * (per_patch_s or 0.0) + time.monotonic() - started) / workers, 1
        ),
        problems=problems,
        side_files=side.report() | {name: one.report() for name, one in side.texts.items()},
    )


def _first(group: dict[str, str]) -> dict[str, Any]:
    """Return the first candidate of a planner's row."""
    found: dict[str, Any] = json.loads(group["candidates"])[0]
    return found


def _time_patches(
    reader: SlideReader, candidate: Candidate, plan: SlidePlan, config: IngestConfig
) -> float:
    """Measure the seconds to read and embed one patch, on the slide's fullest region."""
    encoders = [
        load_encoder(spec, device=config.device, patch_um=config.tiling.patch_um)
        for spec in config.specs
    ]
    fullest = int(plan.regions.patch_mask.sum(axis=1).argmax())
    rects = patch_rects(
        config.tiling,
        rx=int(plan.regions.rx[fullest]),
        ry=int(plan.regions.ry[fullest]),
        mpp=plan.info["mpp"],
    )[plan.regions.patch_mask[fullest]]
    seconds = math.inf
    for _ in range(2):  # the first one warms up
        started = time.perf_counter()
        reader.start_read(
            candidate.source.uri,
            rects,
            mpp=config.tiling.mpp,
            px=config.tiling.patch_px,
            slide_mpp=candidate.mpp,
            timeout_s=config.read_timeout_s,
        )
        patches = reader.finish_read(px=config.tiling.patch_px)
        for encoder in encoders:
            encoder(patches.pixels)
        seconds = min(seconds, time.perf_counter() - started)
    return seconds / len(rects)


def _pipeline(
    groups: list[dict[str, str]],
    config: IngestConfig,
    archive: str,
    tables: Sequence[str],
    encoders: Sequence[EncoderInfo],
    *,
    held: Mapping[str, Held],
    there: Available,
    place: Place,
) -> Iterator[pa.Table]:
    """Run both stages; yield chunks as they come back."""
    use_gpu = there.use_gpu and config.specs != ["texture"]
    room = there.gpus * ACTORS_OF_A_GPU if use_gpu else there.cpus
    workers = config.actors or room or 1
    readers = config.readers or (GPU_READERS if use_gpu else 1)
    revisions = [info.revision for info in encoders]
    planners = max(1, workers // 4)
    at_once = 1
    if any(is_remote(fields["source"]["uri"]) for fields in map(_first, groups)):
        # A planner stages the next slides of the groups that it works on.
        at_once = min(STAGED_GROUPS, math.ceil(len(groups) / planners))
    # 0.9 + 0.1 so that planning always finds room, also on one core.
    plan = ActorPool(
        actor=Planner,
        arguments=(config, archive, held),
        at_once=at_once,
        most=planners,
        num_cpus=0.1,
        waits=True,
    )
    embed = ActorPool(
        actor=Embedder,
        arguments=(config, archive, list(tables), revisions, readers),
        shared=Deaths,
        first=1 if place == "cluster" else min(workers, len(groups)),
        # A cluster may grow: what it is given to do is what makes it grow.
        most=config.actors or (None if place == "cluster" else workers),
        num_cpus=readers - 0.1 if use_gpu else 0.9,
        num_gpus=1 / ACTORS_OF_A_GPU if use_gpu else 0.0,
        deaths=config.attempts + 1,  # Deaths sees to it that there are fewer
    )
    yield from run_stages(groups, [plan, embed], place=place, block_bytes=4096)


def _check(archive: str, config: IngestConfig, encoders: Sequence[EncoderInfo]) -> None:
    """Refuse settings that fit neither encoder nor archive, before anything is written."""
    for info in encoders:
        if info.mpp is not None and abs(info.mpp / config.tiling.mpp - 1) > 0.01:
            raise ConfigError(
                f"Encoder {info.name} was trained at {info.mpp:g} µm per pixel; this tiling reads "
                f"{config.tiling.mpp:g}.",
                hint=f"Add -o tiling.mpp={info.mpp:g} and a patch_um that is its field of view.",
                code="encoder_scale",
            )
    _check_writable(archive)
    Stage(config.stage_dir, config.stage_gb)  # refuses what is no size
    try:
        existing = Archive(archive)
    except ArchiveError as error:
        if error.code == "missing_archive":
            return
        raise
    wanted = asdict(config.tiling)
    if existing.tiling() != wanted:
        differ = [key for key, value in wanted.items() if existing.tiling().get(key) != value]
        theirs = ", ".join(f"{key}={existing.tiling().get(key)}" for key in differ)
        raise ConfigError(
            f"The archive {archive} is cut with {theirs}; this run asks for "
            f"{', '.join(f'{key}={wanted[key]}' for key in differ)}.",
            hint="Use the archive's own tiling, or another archive.",
            code="other_tiling",
        )
    held = existing.encoders()
    for info in encoders:
        if info.name in held and held[info.name]["revision"] != info.revision:
            raise ConfigError(
                f"The archive {archive} holds features of {info.name} revision "
                f"{held[info.name]['revision']}; this run would add revision {info.revision}.",
                hint="Use the same weights, or another archive.",
                code="other_encoder",
            )
        if held and info.name not in held and not config.add_encoder:
            raise ConfigError(
                f"The archive {archive} was made with encoder {', '.join(held)}, not {info.name}.",
                hint=f"Use --encoder {next(iter(held))}, another archive, or --add-encoder to "
                f"embed its slides with {info.name} beside it.",
                code="other_encoder",
            )


def _check_writable(archive: str) -> None:
    if "://" in archive:
        return  # an object store says so itself, at the first write
    path = Path(archive).absolute()
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{archive} is a file.", hint="Give a folder for the archive.")
    while not path.exists():
        path = path.parent
    if not path.is_dir() or not os.access(path, os.W_OK | os.X_OK):
        raise ConfigError(
            f"The archive {archive} cannot be written: {path} does not permit it.",
            hint="Check the permissions, or give another place.",
            code="not_permitted",
        )
