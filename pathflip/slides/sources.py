"""Finds slide files and identifies them by their content."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pathflip.errors import ConfigError, SlideError

SUFFIXES = (
    ".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".svslide", ".czi", ".bif",
)  # fmt: skip
DICOM_SUFFIX = ".dcm"
FOREIGN_SUFFIXES = (
    ".isyntax", ".i2syntax", ".kfb", ".sdpc", ".vsi", ".qptiff", ".mds", ".mdsx", ".tron", ".zvi",
    ".lif", ".nd2", ".oir", ".jp2", ".jpx", ".eslide", ".dzi",
)  # fmt: skip
"""Whole-slide formats that OpenSlide does not read."""
_DICOM_MAGIC = b"DICM"
_BLOCK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Source:
    """A slide on disk as found, before anything of it is read.

    Attributes:
        uri: Absolute path of the file, or of the folder of one DICOM series.
        bytes: Size of all its files; -1 if it is not accessible.
        mtime_ns: Newest modification time of its files.
    """

    uri: str
    bytes: int
    mtime_ns: int


def discover(sources: Sequence[str], *, skipped: list[str] | None = None) -> list[Source]:
    """Find every slide under the given files and folders, sorted by path.

    A folder that holds DICOM files is one slide, and so are its files named one by one; MRXS side
    folders belong to their .mrxs file. Links are followed once; of files without a suffix the first
    bytes are read, as DICOM often has none, and no other is opened. A file named outright is taken
    whatever its suffix.

    Args:
        sources: Files and folders.
        skipped: List to which the other files of the folders are added.

    Raises:
        ConfigError: A source does not exist, or a folder holds no slide at all.
    """
    found: dict[str, Source] = {}
    for source in sources:
        if "://" in source:
            raise ConfigError(
                f"{source} is not a path.",
                hint="Slides are read from file systems: mount the bucket on every node.",
                code="missing_source",
            )
        path = Path(os.path.abspath(source))
        if path.is_dir():
            inside = list(_walk(path, skipped if skipped is not None else []))
            if not inside and path.suffix.lower() in SUFFIXES:
                inside = [path]  # reported as what it is
            if not inside:
                raise ConfigError(
                    f"{source} holds no slides.",
                    hint=f"pathflip looks for {' '.join(SUFFIXES)} and folders of "
                    f"*{DICOM_SUFFIX}, at any depth.",
                    code="no_slides",
                )
        elif os.path.lexists(path):
            inside = [path.parent if is_dicom(path) else path]
        else:
            raise ConfigError(
                f"{source} does not exist.", hint="Check the path.", code="missing_source"
            )
        for entry in inside:
            found[str(entry)] = stat_source(entry)
    return [found[uri] for uri in sorted(found)]


def is_dicom(path: Path) -> bool:
    """Return whether a file is DICOM: by its suffix, or by its first bytes if it has none.

    Archives export files named by UIDs or as DCM_0, whose last digits look like a suffix.
    """
    suffix = path.suffix.lower()
    if suffix == DICOM_SUFFIX:
        return True
    if suffix and not suffix[1:].isdigit():
        return False
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return False
        with open(path, "rb") as file:
            return file.read(132)[128:] == _DICOM_MAGIC
    except OSError:
        return False


def dicom_files(folder: Path) -> list[Path]:
    """Return the DICOM files of a folder, sorted by name."""
    return sorted(path for path in folder.iterdir() if not path.is_dir() and is_dicom(path))


def _walk(root: Path, skipped: list[str]) -> Iterator[Path]:
    seen: set[tuple[int, int]] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:  # a loop of links
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.sort()
        here = Path(folder)
        dicom = {name for name in files if is_dicom(here / name)}
        if dicom:
            yield here
        sides = {name[: -len(".mrxs")] for name in files if name.lower().endswith(".mrxs")}
        folders[:] = [name for name in folders if name not in sides]
        for name in sorted(files):
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield here / name
            elif name not in dicom and not name.startswith("."):
                skipped.append(str(here / name))
        for name in list(folders):  # a folder named like a slide is reported, not entered
            if name.lower().endswith(SUFFIXES):
                folders.remove(name)
                yield here / name


def by_suffix(paths: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return {suffix: {"files", "example"}} of paths, the most frequent suffix first."""
    groups: dict[str, list[str]] = {}
    for path in paths:
        groups.setdefault(Path(path).suffix.lower() or "none", []).append(path)
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    return {suffix: {"files": len(own), "example": min(own)} for suffix, own in ordered}


def source_files(path: Path) -> list[Path]:
    """Return every file of a slide, the named one first."""
    if path.is_dir():
        return dicom_files(path)
    side = path.with_suffix("")
    if path.suffix.lower() == ".mrxs" and side.is_dir():
        return [path, *sorted(file for file in side.rglob("*") if file.is_file())]
    return [path]


def stat_source(path: Path) -> Source:
    """Return size and newest modification time of a slide; bytes -1 if it is not accessible."""
    try:
        statuses = [file.stat() for file in source_files(path)]
    except OSError:
        statuses = []
    return Source(
        uri=str(path),
        bytes=sum(status.st_size for status in statuses) if statuses else -1,
        mtime_ns=max((status.st_mtime_ns for status in statuses), default=0),
    )


def check_ingested(slide: Mapping[str, Any]) -> None:
    """Refuse a slide whose file is gone, or is another one than was ingested.

    Args:
        slide: Its row in an archive.

    Raises:
        SlideError: ``not_a_file``, ``source_changed``.
    """
    path = Path(slide["uri"])
    source = stat_source(path)
    if source.bytes < 0:
        raise SlideError(
            f"{path.name} is not at {path} any more.",
            hint="Put it back, or ingest it from where it is now.",
            code="not_a_file",
        )
    if (source.bytes, source.mtime_ns) != (slide["bytes"], slide["mtime_ns"]):
        raise SlideError(
            f"{path.name} is not the file that was ingested any more.",
            hint="Ingest it again, then make its trees.",
            code="source_changed",
        )


def digest_source(path: Path) -> str:
    """Return the sha256 of a slide: of its file, or of its files' names and digests in order.

    Raises:
        SlideError: ``not_a_file`` when a file cannot be read.
    """
    files = source_files(path)
    try:
        if len(files) == 1:
            return _digest_file(files[0])
        whole = hashlib.sha256()
        for file in files:
            whole.update(f"{file.relative_to(path.parent)}\0{_digest_file(file)}\n".encode())
        return whole.hexdigest()
    except OSError as error:
        raise SlideError(
            f"{path.name} cannot be read: {error.strerror}.",
            hint="Check the path, the link and the permissions.",
            code="not_a_file",
        ) from error


def _digest_file(path: Path) -> str:
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for, a device never end
        raise OSError(errno.EINVAL, "it is no regular file")
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        buffer = bytearray(_BLOCK)
        view = memoryview(buffer)
        while count := file.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()


def slide_id(uri: str, identity: str) -> str:
    """Return a slide's key: its file's stem and eight digits of its content's sha256.

    Readable, and the same wherever and in whatever order slides are ingested; two files of one
    name in two folders never collide. ``identity`` is the sha256, or the uri where none is known.
    """
    stem = Path(uri).name
    for suffix in (*SUFFIXES, DICOM_SUFFIX):
        if stem.lower().endswith(suffix):
            stem = stem[: -len(suffix)]
            break
    safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in stem)[:120] or "slide"
    if len(identity) != 64:
        identity = hashlib.sha256(identity.encode(errors="surrogateescape")).hexdigest()
    return f"{safe}-{identity[:8]}"
