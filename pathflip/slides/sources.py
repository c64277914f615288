"""Finds slide files, also in object stores, and identifies them by their content."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pathflip.errors import ConfigError, SlideError
from pathflip.slides.objects import (
    ObjectReader,
    StoredObject,
    check_address,
    find_object,
    is_remote,
    list_objects,
)

SUFFIXES = (
    ".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".svslide", ".czi", ".bif",
)  # fmt: skip
DICOM_SUFFIX = ".dcm"
FOREIGN_SUFFIXES = (
    ".isyntax", ".i2syntax", ".kfb", ".sdpc", ".vsi", ".qptiff", ".mds", ".mdsx", ".tron", ".zvi",
    ".lif", ".nd2", ".oir", ".jp2", ".jpx", ".eslide", ".dzi",
)  # fmt: skip
"""Whole-slide formats that OpenSlide does not read."""
OPENSLIDE_FLOOR = (4, 0, 1)
"""Least version of the OpenSlide library that opens slides: an earlier one writes out of bounds on
crafted Ventana files (CVE-2026-48977) and shows uninitialised memory as pixels with libtiff 4.7.1
(CVE-2026-54604)."""
_DICOM_MAGIC = b"DICM"
_DICOM_HEADER = 132  # bytes, of which the last four are the magic
_DICOM_KIND = b"\x02\x00\x02\x00UI"
_DICOM_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
_BLOCK = 1 << 20
_LOOKS = 16  # objects whose first bytes are read at once


@dataclass(frozen=True, kw_only=True)
class Source:
    """A slide as found, before anything of it is read.

    Attributes:
        uri: Absolute path of the file, or of the folder of one DICOM series; their address in an
            object store.
        bytes: Size of all its files; -1 if it is not accessible.
        mtime_ns: Newest modification time of its files.
    """

    uri: str
    bytes: int
    mtime_ns: int

    @classmethod
    def of_objects(cls, uri: str, *, files: Sequence[StoredObject]) -> Source:
        """Return the slide that objects of a store are together."""
        return cls(
            uri=uri,
            bytes=sum(one.bytes for one in files) if files else -1,
            mtime_ns=max((one.mtime_ns for one in files), default=0),
        )


def discover(sources: Sequence[str], *, skipped: list[str] | None = None) -> list[Source]:
    """Find every slide under the given files and folders, sorted by path.

    A folder that holds DICOM files is one slide, and so are its files named one by one; MRXS side
    folders belong to their .mrxs file. Links are followed once; of files without a suffix the first
    bytes are read, as DICOM often has none, and no other is opened. A file named outright is taken
    whatever its suffix. Addresses of object stores (``s3://bucket/prefix``) are listed by the same
    rules, except that there are no links.

    Args:
        sources: Files, folders, objects and prefixes of object stores.
        skipped: List to which the other files of the folders are added, and folders in them that
            cannot be read.

    Raises:
        ConfigError: A source does not exist, a folder cannot be read or holds no slide at all; an
            object store cannot be listed (``access_denied``, ``store_failed``).
    """
    found: dict[str, Source] = {}
    skipped = skipped if skipped is not None else []
    for source in sources:
        if is_remote(source):
            for slide in _discover_stored(check_address(source), skipped):
                found[slide.uri] = slide
            continue
        path = Path(os.path.abspath(source))
        if path.is_dir():
            inside = list(_walk(path, skipped))
            if not inside and path.suffix.lower() in SUFFIXES:
                inside = [path]  # reported as what it is
            if not inside:
                raise _no_slides(source)
        elif os.path.lexists(path):
            inside = [path.parent if is_dicom(path) else path]
        else:
            raise ConfigError(
                f"{source} does not exist.", hint="Check the path.", code="missing_source"
            )
        for entry in inside:
            found[str(entry)] = stat_source(entry)
    return [found[uri] for uri in sorted(found)]


def _no_slides(source: str) -> ConfigError:
    return ConfigError(
        f"{source} holds no slides.",
        hint=f"pathflip looks for {' '.join(SUFFIXES)} and folders of *{DICOM_SUFFIX}, at any "
        "depth.",
        code="no_slides",
    )


def version_numbers(version: str) -> tuple[int, ...]:
    """Return the numbers of a version, as in (4, 0, 1)."""
    parts = version.split("+")[0].split(".")
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in parts)


def is_dicom(path: Path) -> bool:
    """Return whether a file is DICOM: by its suffix, or by its first bytes if it has none.

    Archives export files named by UIDs or as DCM_0, whose last digits look like a suffix.
    """
    if (known := _is_dicom_by_name(path.name)) is not None:
        return known
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return False
        with open(path, "rb") as file:
            return file.read(_DICOM_HEADER).endswith(_DICOM_MAGIC)
    except OSError:
        return False


def _is_dicom_by_name(name: str) -> bool | None:
    """Return whether a file is DICOM; None if its first bytes must say so."""
    if name.startswith("."):  # macOS writes ._1.dcm beside 1.dcm on other disks
        return False
    suffix = Path(name).suffix.lower()
    if suffix == DICOM_SUFFIX:
        return True
    return False if suffix and not suffix[1:].isdigit() else None


def is_other_dicom(path: Path) -> bool:
    """Return whether a DICOM file says that it is no whole-slide image: a report, a label map.

    Its kind (SOP class) stands in the first bytes, so a file that was cut off says it, too.
    """
    with open(path, "rb") as file:
        head = file.read(1024)
    at = head.find(_DICOM_KIND)
    if head[128:132] != _DICOM_MAGIC or at < 0:
        return False
    start = at + len(_DICOM_KIND) + 2
    length = int.from_bytes(head[start - 2 : start], "little")
    kind = head[start : start + length].rstrip(b"\0 ")
    return len(head) >= start + length and kind != _DICOM_SLIDE.encode()


def dicom_files(folder: Path) -> list[Path]:
    """Return the DICOM files of a folder, sorted by name."""
    return sorted(path for path in folder.iterdir() if not path.is_dir() and is_dicom(path))


def _walk(root: Path, skipped: list[str]) -> Iterator[Path]:
    def closed(error: OSError) -> None:
        if error.filename == str(root):
            raise ConfigError(
                f"{root} cannot be read: {error.strerror}.",
                hint="Check the permissions of the folder.",
                code="missing_source",
            ) from error
        skipped.append(str(error.filename))

    seen: set[tuple[int, int]] = set()
    for folder, folders, files in os.walk(root, onerror=closed, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:  # a loop of links
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        here = Path(folder)
        slides, others = _pick(folders, files, {name for name in files if is_dicom(here / name)})
        yield from (here / name for name in slides)
        skipped += [str(here / name) for name in others]


def _pick(
    folders: list[str], files: Sequence[str], dicom: Collection[str]
) -> tuple[list[str], list[str]]:
    """Choose what of a folder is a slide.

    Args:
        folders: Names of the folders in it; those not to be entered are taken out.
        files: Names of its files.
        dicom: Those that are DICOM.

    Returns:
        Names of slides, "" for the folder itself, and of the files that are none.
    """
    slides, others = [""] if dicom else [], []
    folders.sort()
    sides = {name[: -len(".mrxs")] for name in files if name.lower().endswith(".mrxs")}
    folders[:] = [name for name in folders if name not in sides]
    for name in sorted(files):
        if name.lower().endswith(SUFFIXES) and not name.startswith("."):
            slides.append(name)
        elif name not in dicom and not name.startswith("."):
            others.append(name)
    for name in list(folders):  # a folder named like a slide is reported, not entered
        if name.lower().endswith(SUFFIXES):
            folders.remove(name)
            slides.append(name)
    return slides, others


def _discover_stored(uri: str, skipped: list[str]) -> list[Source]:
    """Find the slides at, or below, an address of an object store."""
    try:
        named = find_object(uri)
        if named is not None:
            whole = uri.rpartition("/")[0] if _dicom_objects([named]) else uri
            return [stat_slide(whole)]
        listed = list_objects(uri, recursive=True)
        if not listed:
            raise ConfigError(
                f"There is nothing at {uri}.",
                hint="Check the bucket and the prefix.",
                code="missing_source",
            )
        found = list(_walk_objects(uri, listed, skipped))
    except SlideError as error:
        code = "missing_source" if error.code == "not_a_file" else error.code
        raise ConfigError(error.message, hint=error.hint, code=code) from error
    if not found and uri.lower().endswith(SUFFIXES):
        return [Source.of_objects(uri, files=[])]  # reported as what it is
    if not found:
        raise _no_slides(uri)
    return found


def _walk_objects(
    root: str, listed: Sequence[StoredObject], skipped: list[str]
) -> Iterator[Source]:
    """Yield the slides among listed objects, as :func:`_walk` does of a folder."""
    files: dict[str, dict[str, StoredObject]] = {}
    folders: dict[str, set[str]] = {}
    for one in listed:
        here, _, name = one.uri.rpartition("/")
        files.setdefault(here, {})[name] = one
        while here != root and here not in folders.setdefault(here.rpartition("/")[0], set()):
            folders[here.rpartition("/")[0]].add(here)
            here = here.rpartition("/")[0]
    dicom = {one.uri for one in _dicom_objects(listed)}
    stack = [root]
    while stack:
        here = stack.pop()
        own = files.get(here, {})
        series = {name: one for name, one in own.items() if one.uri in dicom}
        inside = [path.rpartition("/")[2] for path in folders.get(here, ())]
        slides, others = _pick(inside, list(own), series)
        stack += [f"{here}/{name}" for name in inside]
        skipped += [f"{here}/{name}" for name in others]
        for name in slides:
            if not name:
                yield Source.of_objects(here, files=list(series.values()))
            elif name not in own:
                yield Source.of_objects(f"{here}/{name}", files=[])
            else:
                parts = [own[name]]
                sides = [f"{here}/{Path(name).stem}"] if name.lower().endswith(".mrxs") else []
                while sides:
                    side = sides.pop()
                    parts += files.get(side, {}).values()
                    sides += folders.get(side, ())
                yield Source.of_objects(f"{here}/{name}", files=parts)


def _dicom_objects(objects: Sequence[StoredObject]) -> list[StoredObject]:
    """Return those objects that are DICOM, by their names or by their first bytes."""

    def is_one(stored: StoredObject) -> bool:
        known = _is_dicom_by_name(stored.uri.rpartition("/")[2])
        if known is None and stored.bytes >= _DICOM_HEADER:
            return ObjectReader(stored.uri).read(0, _DICOM_HEADER).endswith(_DICOM_MAGIC)
        return bool(known)

    with ThreadPoolExecutor(_LOOKS, "dicom") as threads:
        return [one for one, yes in zip(objects, threads.map(is_one, objects), strict=True) if yes]


def stored_files(uri: str) -> list[StoredObject]:
    """Return every object of a slide in an object store, the named one first; none if it is gone.

    Raises:
        SlideError: ``access_denied``, ``store_failed``.
    """
    named = find_object(uri)
    if named is None:
        return _dicom_objects(list_objects(uri, recursive=False))
    if uri.lower().endswith(".mrxs"):
        return [named, *list_objects(uri[: -len(".mrxs")], recursive=True)]
    return [named]


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


def stat_slide(uri: str) -> Source:
    """Return size and time of a slide by its uri, a path or an address in an object store.

    Raises:
        SlideError: The object store cannot be asked (``access_denied``, ``store_failed``).
    """
    if is_remote(uri):
        return Source.of_objects(uri, files=stored_files(uri))
    return stat_source(Path(uri))


def is_there(uri: str) -> bool:
    """Return whether something lies at a slide's uri, or that cannot be told."""
    if not is_remote(uri):
        return os.path.lexists(uri)
    try:
        return stat_slide(uri).bytes >= 0
    except SlideError as error:
        return error.code != "not_a_file"


def check_ingested(slide: Mapping[str, Any]) -> None:
    """Refuse a slide whose file is gone, or is another one than was ingested.

    Args:
        slide: Its row in an archive.

    Raises:
        SlideError: ``not_a_file``, ``source_changed``; see also :func:`stat_slide`.
    """
    path = Path(slide["uri"])
    source = stat_slide(slide["uri"])
    if source.bytes < 0:
        raise SlideError(
            f"{path.name} is not at {slide['uri']} any more.",
            hint="Put it back, or ingest it from where it is now.",
            code="not_a_file",
        )
    if (source.bytes, source.mtime_ns) != (slide["bytes"], slide["mtime_ns"]):
        raise SlideError(
            f"{path.name} is not the file that was ingested any more.",
            hint="Ingest it again, then make its trees.",
            code="source_changed",
        )


def changed(uri: str) -> SlideError:
    """Return the error of a slide that is not the one that was found any more."""
    return SlideError(
        f"{Path(uri).name} changed while it was being read.",
        hint="Run the same command again once the file is at rest.",
        code="source_changed",
    )


def digest_source(path: Path) -> str:
    """Return the sha256 of a slide, see :func:`digest_of`.

    Raises:
        SlideError: ``not_a_file`` when a file cannot be read.
    """
    try:
        files = source_files(path)
        return digest_of({str(one.relative_to(path.parent)): _digest_file(one) for one in files})
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> SlideError:
    return SlideError(
        f"{path.name} cannot be read: {error.strerror}.",
        hint="Check the path, the link and the permissions.",
        code="not_a_file",
    )


def digest_of(files: Mapping[str, str]) -> str:
    """Return the sha256 of a slide: of its file, or of its files' names and digests in order.

    Args:
        files: {path from the folder that the slide lies in: sha256}.
    """
    if len(files) == 1:
        return next(iter(files.values()))
    lines = "".join(f"{name}\0{sha256}\n" for name, sha256 in files.items())
    return hashlib.sha256(lines.encode()).hexdigest()


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


def _folders(path: Path) -> list[Path]:
    """Return the folders in which OpenSlide looks for further files of a slide."""
    suffix = path.suffix.lower()
    sides = {".mrxs": path.with_suffix(""), ".vms": path.parent, ".vmu": path.parent}
    found = path if path.is_dir() else sides.get(suffix)
    return [found] if found is not None and found.is_dir() else []


def _check_regular(folder: Path) -> None:
    """Refuse a folder with a pipe, socket or device: whoever opens it waits for ever."""
    for entry in os.scandir(folder):
        try:
            mode = entry.stat().st_mode
        except OSError:  # a broken link
            continue
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise SlideError(
                f"{folder.name} holds {entry.name}, which is neither a file nor a folder.",
                hint="Take it out of the folder.",
                code="not_a_file",
            )


def openable(path: Path) -> Path:
    """Return the file to hand to OpenSlide: the path itself, or one DICOM file of a folder.

    Raises:
        SlideError: ``not_a_file`` for what is missing, unreadable, empty or neither, and where a
            pipe or device lies among the files of a slide.
    """
    import openslide

    try:
        for folder in _folders(path):
            _check_regular(folder)
        if path.is_dir():
            files = dicom_files(path)
            if not files:
                raise SlideError(
                    f"{path.name} is a folder without DICOM files.",
                    hint="Name a slide file, or the folder of one DICOM series.",
                    code="not_a_file",
                )
            # Reports and label maps lie beside the levels; OpenSlide knows which is a picture.
            images = (file for file in files if openslide.OpenSlide.detect_format(str(file)))
            return next(images, files[0])
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would make its reader wait for ever
            raise SlideError(
                f"{path.name} is neither a file nor a folder.",
                hint="Check the path.",
                code="not_a_file",
            )
        with open(path, "rb") as file:
            if not file.read(1):
                raise SlideError(
                    f"{path.name} is empty (0 bytes).",
                    hint="Copy it again from its source.",
                    code="not_a_file",
                )
    except OSError as error:
        raise _unreadable(path, error) from error
    return path
