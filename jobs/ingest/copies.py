"""Groups files that may be copies of each other, so that each group can be planned by itself.

Only files of equal size can be copies. Exported slides are often all of one size, and then they
differ in their bytes: a few of those are compared, and only files that agree in all of them stay
together. Whether they are copies is for the digest of the whole file to say (``plan.py``).
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from jobs.ingest.candidates import Candidate
from pathflip.errors import SlideError
from pathflip.slides.objects import ObjectReader, is_remote
from pathflip.slides.sources import source_files, stored_files

SAMPLE_BYTES = 16 << 10
PLACES = (0.5, 0.0, 1.0, *(n / 16 for step in (8, 4, 2) for n in range(step // 2, 16, step)))
"""Places of the samples, from the first byte of a file (0) to its last (1), in the order read."""
_AT_ONCE = 16  # samples that are read at the same time, as reading one is mostly waiting


def may_be_copies(candidates: Sequence[Candidate]) -> list[list[Candidate]]:
    """Split files into groups; files with the same content are always in the same group.

    Files that differ in size or in a sample are apart. A group with a file that cannot be read is
    not split further, as nothing is known of that file.

    Args:
        candidates: The files.

    Returns:
        Groups in the order of their first files, each in the order of ``candidates``. Files that
        are not accessible (size -1) are each alone.
    """
    whole = range(len(candidates))

    def size(at: int) -> Hashable:
        source = candidates[at].source
        return source.bytes if source.bytes >= 0 else source.uri

    groups, alike = _separate(_split(whole, size))
    with ThreadPoolExecutor(_AT_ONCE, "copies") as threads:
        for place in PLACES:
            members = [at for group in alike for at in group]
            uris = [candidates[at].source.uri for at in members]
            found = dict(
                zip(members, threads.map(partial(_sample, place=place), uris), strict=True)
            )
            known: list[list[int]] = []
            unknown: list[list[int]] = []
            for group in alike:
                (unknown if any(found[at] is None for at in group) else known).append(group)
            groups += unknown
            alone, alike = _separate(
                [part for group in known for part in _split(group, found.__getitem__)]
            )
            groups += alone
    return [[candidates[at] for at in group] for group in sorted(groups + alike)]


def _split(members: Sequence[int], key: Callable[[int], Hashable]) -> list[list[int]]:
    """Return the members that share a key together, in their order."""
    parts: dict[Hashable, list[int]] = {}
    for at in members:
        parts.setdefault(key(at), []).append(at)
    return list(parts.values())


def _separate(groups: Sequence[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
    """Return the groups of one, and the others."""
    return [g for g in groups if len(g) == 1], [g for g in groups if len(g) > 1]


def _sample(uri: str, *, place: float) -> bytes | None:
    """Return a digest of some bytes of a slide's largest file, None if they cannot be read.

    It depends on the slide's content and the names inside of it alone.
    """
    try:
        if is_remote(uri):
            stored = max(stored_files(uri), key=lambda one: (one.bytes, one.uri))
            start, count = _span(stored.bytes, place)
            data = ObjectReader(stored.uri).read(start, count)
        else:
            data = _read(max(source_files(Path(uri)), key=lambda one: one.stat().st_size), place)
    except (OSError, SlideError, ValueError):  # ValueError: a slide that has no files any more
        return None
    return hashlib.blake2b(data, digest_size=16).digest()


def _read(path: Path, place: float) -> bytes:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
        raise OSError(f"{path} is no regular file")
    start, count = _span(status.st_size, place)
    with open(path, "rb", buffering=0) as file:
        return os.pread(file.fileno(), count, start)


def _span(size: int, place: float) -> tuple[int, int]:
    """Return the start and the length of a sample in a file."""
    count = min(SAMPLE_BYTES, size)
    return round((size - count) * place), count
