"""Annotations of an archive: a table that people's clients write while jobs write the others.

An ingest holds the archive's lock for hours, and whoever draws on a slide does not wait for it. So
this table has a writer path of its own, and holders of the lock leave it alone
(:attr:`pathflip.archive.tables.TableSpec.unlocked`): they neither fence, merge, count nor open it,
so neither can make the other fail, and a job that dies takes no annotation with it.

**Writers.** Every save or removal is one commit of Lance, from however many processes on however
many hosts. Lance lets two commits pass that insert rows at the same time, even rows of one key; it
refuses one of two that change the same row. Therefore every commit also changes one row, the
counter (its key is empty, its ``revision`` the number of commits): of two that were prepared on the
same version one is refused, reads the newest version, checks its revisions against that and tries
again. No row is doubled or lost, and the counter tells how many commits there were. On one machine
writers also take turns, by a lock that each holds for a commit: nothing rests on it but speed.

**On disk.** In a folder the new data files are flushed before the commit and the manifest after it,
so what was acknowledged survives a crash of the machine; an object store acknowledges a write when
it has it. An answer that got lost is recognised: the counter carries a random name of the commit,
and a save of what is stored already is acknowledged again.

**Slides.** An annotation belongs to pixels: beside the slide's id it has the digest of the slide's
file. Its coordinates are level-0 pixels, so another mpp changes nothing. Removing a slide, or
replacing the file at its path, leaves annotations where they are; they show again on whatever slide
has these bytes, under this id or another. Where a slide has kept its id and changed its bytes, they
are *outdated*: counted, and not shown until somebody saves them again.
"""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import pyarrow.compute as pc

from pathflip.archive.annotation_room import check_room
from pathflip.archive.annotation_table import (
    COLUMNS,
    COUNTER,
    annotation_of,
    commit_rows,
    find_annotations,
    make_table,
    merge_fragments,
    read_counter,
    row_of,
    turn,
)
from pathflip.archive.settings import read_meta
from pathflip.archive.storage import guarded, is_failure, is_local, normalise, sql_in
from pathflip.errors import ArchiveError
from pathflip.interop.annotations import Annotation, own_id

if TYPE_CHECKING:
    from pathflip.archive.archive import Archive

T = TypeVar("T")


WAIT_S = 30.0
"""Seconds for which a save tries again while others write; then it is refused (``busy``)."""
MERGE_FROM = 64
"""Fragments from which on :meth:`AnnotationStore.tidy` merges."""
_COPIES = 4  # ids that are tried for a copy: more than one where others made theirs of the same

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, kw_only=True)
class Ground:
    """A slide as annotations refer to it.

    Attributes:
        slide_id: Its id.
        sha256: Digest of its file; None where none is known.
        width, height: Level-0 px, where known.
        offset: Corner of its bounds, level-0 px: QuPath counts from there.
    """

    slide_id: str
    sha256: str | None = None
    width: int | None = None
    height: int | None = None
    offset: tuple[float, float] = (0.0, 0.0)

    @classmethod
    def all(cls, archive: Archive) -> dict[str, Ground]:
        """Return {slide_id: ground} of an archive's slides, whatever their status."""

        def read() -> dict[str, Ground]:
            found = {}
            columns = ["slide_id", "sha256", "width", "height", "bounds_x0", "bounds_y0"]
            for row in archive.slides(columns=columns).to_pylist():
                x0, y0 = row.pop("bounds_x0"), row.pop("bounds_y0")
                found[row["slide_id"]] = cls(**row, offset=(float(x0 or 0), float(y0 or 0)))
            return found

        return archive.cached("grounds", read, of=("slides",))

    def bears(self, one: Annotation) -> bool:
        """Return whether an annotation was drawn on these pixels."""
        if one.sha256 is None or self.sha256 is None:
            return one.slide_id == self.slide_id
        return one.sha256 == self.sha256


@dataclass(frozen=True, kw_only=True)
class OnSlide:
    """Result of :meth:`AnnotationStore.on_slide`.

    Attributes:
        annotations: Those of the slide as it is now, oldest first.
        outdated: Those drawn on other pixels under the same id.
    """

    annotations: list[Annotation]
    outdated: list[Annotation]


@dataclass(frozen=True, kw_only=True)
class Saved:
    """Result of :meth:`AnnotationStore.put_all`.

    Attributes:
        new: Ids of those that were added.
        changed: Ids of those that were replaced.
        unchanged: Ids of those that were stored already.
    """

    new: list[str]
    changed: list[str]
    unchanged: list[str]


@dataclass(frozen=True, kw_only=True)
class _Change(Generic[T]):
    """A commit to make of what a version holds; none if there is nothing to write.

    Attributes:
        result: Result to return once it is made.
        rows: Rows to insert or replace.
        gone: Keys to delete.
    """

    result: T
    rows: list[dict[str, Any]] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)


class AnnotationStore:
    """Reads and writes the annotations of an archive; safe to share between threads.

    Every call sees the newest commit, whichever process made it. The table is made by the first
    save; until then there are no annotations.

    Args:
        uri: The archive.
    """

    def __init__(self, uri: str | Path) -> None:
        self.uri = normalise(uri)
        self._known: Any = None  # shares what Lance keeps of the table's files between versions
        self._writing = threading.Lock()

    # -- reading ----------------------------------------------------------------------------------

    def on_slide(self, ground: Ground, *, author: str | None = None) -> OnSlide:
        """Return the annotations of a slide, of one author or of all.

        Raises:
            ArchiveError: The table cannot be read.
        """
        where = pc.field("slide_id") == ground.slide_id
        if ground.sha256 is not None:
            where |= pc.field("sha256") == ground.sha256
        found = self._read(where if author is None else where & (pc.field("author") == author))
        return OnSlide(
            annotations=[one for one in found if ground.bears(one)],
            outdated=[one for one in found if not ground.bears(one)],
        )

    def all(self, *, author: str | None = None) -> list[Annotation]:
        """Return every annotation, oldest first; those of slides that are gone as well."""
        return self._read(None if author is None else pc.field("author") == author)

    def count(self) -> int:
        """Return how many annotations there are."""
        if (dataset := self._newest()) is None:
            return 0
        with guarded(self.uri, "count the annotations"):
            return max(0, int(dataset.count_rows()) - 1)

    def _read(self, where: Any) -> list[Annotation]:
        if (dataset := self._newest()) is None:
            return []
        drawn = pc.field("annotation_id") != COUNTER
        with guarded(self.uri, "read the annotations", damaged=is_local(self.uri)):
            rows = dataset.to_table(
                columns=COLUMNS, filter=drawn if where is None else drawn & where
            )
        found = [annotation_of(row) for row in rows.to_pylist()]
        return sorted(found, key=lambda one: (one.created or _EPOCH, one.annotation_id))

    # -- writing ----------------------------------------------------------------------------------

    def put(self, one: Annotation, *, ground: Ground, by: str, anyone: bool = False) -> Annotation:
        """Save an annotation, and return it as it is stored.

        Args:
            one: The annotation; its revision is the one that was read last, 0 of a new one.
            ground: The slide it is on.
            by: Name of who saves it: the author of a new one.
            anyone: Whether those of other authors may be changed; they keep their author.

        Raises:
            ArchiveError: Another revision is stored (``stale``); it is somebody else's or of
                another slide (``unknown_annotation``); the author has too many
                (``too_many_annotations``); others write all the time (``busy``).
        """

        def plan(dataset: Any) -> _Change[Annotation]:
            stored = self._stored(dataset, [one.annotation_id]).get(one.annotation_id)
            if stored is not None:
                if not (_may(stored, by=by, anyone=anyone) and _on(ground, stored)):
                    raise _unknown()
                again = replace(one, author=stored.author, sha256=ground.sha256)
                if one.revision == stored.revision - 1 and again.drawn_as(stored):
                    return _Change(result=stored)  # its acknowledgement was lost
            if one.revision != (0 if stored is None else stored.revision):
                raise _stale(stored)
            new = _saved(one, over=stored, ground=ground, by=by)
            self._check_room(
                dataset, [new], stored={} if stored is None else {new.annotation_id: stored}
            )
            return _Change(result=new, rows=[row_of(new)])

        return self._commit(plan)

    def put_all(
        self, annotations: Sequence[Annotation], *, ground: Ground, by: str, dry_run: bool = False
    ) -> Saved:
        """Save annotations of one slide in one commit, whatever their revision.

        An id that is somebody else's, or of another slide, is replaced by one of the author's own
        on this slide, so that a file which one exported and another imports makes copies, always
        the same ones. Where the file has such a copy as well, that is what is saved.

        Args:
            annotations: The annotations, each id once.
            ground: The slide they are on.
            by: Their author.
            dry_run: Whether to say only what would be written.

        Raises:
            ArchiveError: See :meth:`put`.
        """

        def plan(dataset: Any) -> _Change[Saved]:
            own, stored = self._own(dataset, annotations, ground=ground, by=by)
            new, changed, unchanged = list[str](), list[str](), list[str]()
            write = []
            for one in own:
                old = stored.get(one.annotation_id)
                now = _saved(one, over=old, ground=ground, by=by)
                if old is not None and now.drawn_as(old):
                    unchanged.append(now.annotation_id)
                    continue
                (new if old is None else changed).append(now.annotation_id)
                write.append(now)
            self._check_room(dataset, write, stored=stored)
            saved = Saved(new=new, changed=changed, unchanged=unchanged)
            return _Change(result=saved, rows=[] if dry_run else [row_of(one) for one in write])

        if dry_run:
            return plan(self._newest()).result
        return self._commit(plan)

    def delete(self, annotation_id: str, *, ground: Ground, by: str, anyone: bool = False) -> None:
        """Remove an annotation of a slide.

        Raises:
            ArchiveError: There is none of this id that ``by`` may remove (``unknown_annotation``);
                see :meth:`put`.
        """
        tried = False

        def plan(dataset: Any) -> _Change[None]:
            nonlocal tried
            stored = self._stored(dataset, [annotation_id]).get(annotation_id)
            if stored is None and tried:
                return _Change(result=None)  # the answer to the first attempt was lost
            if stored is None or not (_may(stored, by=by, anyone=anyone) and _on(ground, stored)):
                raise _unknown()
            tried = True
            return _Change(result=None, gone=[annotation_id])

        self._commit(plan)

    def remove(self, annotation_ids: Collection[str]) -> int:
        """Remove annotations by id, whoever's they are, and return how many there were."""

        def plan(dataset: Any) -> _Change[int]:
            there = sorted(self._stored(dataset, sorted(annotation_ids)))
            return _Change(result=len(there), gone=there)

        return self._commit(plan) if self._newest() is not None and annotation_ids else 0

    def tidy(self) -> None:
        """Merge small fragments where there are many; a save that comes between goes first."""
        if (dataset := self._newest()) is not None and len(dataset.get_fragments()) >= MERGE_FROM:
            merge_fragments(self.uri)

    # -- pieces -----------------------------------------------------------------------------------

    def _newest(self) -> Any:
        """Open the newest version; None if there is no table."""
        known = self._known
        if known is not None:
            with guarded(self.uri, "look for new annotations"):
                if known.version == known.latest_version:
                    return known
        self._known = find_annotations(self.uri, session=None if known is None else known.session())
        return self._known

    def _stored(self, dataset: Any, keys: Sequence[str]) -> dict[str, Annotation]:
        found: dict[str, Annotation] = {}
        if dataset is None:
            return found
        with guarded(self.uri, "read the annotations", damaged=is_local(self.uri)):
            for start in range(0, len(keys), 500):
                where = sql_in("annotation_id", list(keys[start : start + 500]))
                for row in dataset.to_table(columns=COLUMNS, filter=where).to_pylist():
                    found[row["annotation_id"]] = annotation_of(row)
        return found

    def _own(
        self, dataset: Any, annotations: Sequence[Annotation], *, ground: Ground, by: str
    ) -> tuple[list[Annotation], dict[str, Annotation]]:
        """Give annotations ids that an author may save under on a slide.

        Returns:
            The annotations, each id once, and what is stored under these ids.

        Raises:
            ArchiveError: Ids of copies are somebody else's, too (``unknown_annotation``).
        """
        keys = [one.annotation_id for one in annotations]
        stored = self._stored(dataset, keys)
        for _ in range(_COPIES):
            kept = {
                key
                for key in keys
                if (old := stored.get(key)) is None
                or (_may(old, by=by, anyone=False) and _on(ground, old))
            }
            taken = [number for number, key in enumerate(keys) if key not in kept]
            if not taken:
                once = dict[str, Annotation]()
                # Those that have kept their own ids go before copies of others under these ids.
                for key, one in sorted(
                    zip(keys, annotations, strict=True), key=lambda of: of[0] != of[1].annotation_id
                ):
                    once.setdefault(key, replace(one, annotation_id=key))
                return [once.pop(key) for key in keys if key in once], stored
            for number in taken:
                keys[number] = own_id(keys[number], by, ground.sha256 or ground.slide_id)
            stored |= self._stored(dataset, [keys[number] for number in taken])
        raise _unknown()

    def _check_room(
        self, dataset: Any, write: Sequence[Annotation], *, stored: Mapping[str, Annotation]
    ) -> None:
        """Refuse what would be too many annotations, or points.

        Args:
            dataset: The newest version.
            write: Annotations of one slide that are to be saved.
            stored: Those that they replace, and perhaps others, by id.

        Raises:
            ArchiveError: ``too_many_annotations``.
        """
        with guarded(self.uri, "count the annotations", damaged=is_local(self.uri)):
            there = None if dataset is None else dataset.to_table(
                columns=["author", "slide_id", "points"],
                filter=pc.field("annotation_id") != COUNTER,
            )  # fmt: skip
        old = [stored[one.annotation_id] for one in write if one.annotation_id in stored]
        check_room(there, more=write, less=old)

    def _commit(self, plan: Callable[[Any], _Change[T]]) -> T:
        """Plan a change on the newest version and commit it, again where another came between."""
        with self._writing, turn(self.uri):  # writers need not refuse each other
            last, pause = time.monotonic() + WAIT_S, 0.01
            while True:
                dataset = self._newest()
                if dataset is None:
                    dataset = self._made()
                change = plan(dataset)
                if not change.rows and not change.gone:
                    return change.result
                counter = read_counter(self.uri, dataset)
                name = uuid.uuid4().hex
                try:
                    with guarded(self.uri, "save the annotations"):
                        self._known = commit_rows(
                            self.uri, dataset, rows=change.rows, gone=change.gone,
                            counter=counter, name=name,
                        )  # fmt: skip
                    return change.result
                except ArchiveError as error:
                    if (newest := self._newest()) is None or newest.version == dataset.version:
                        raise
                    if read_counter(self.uri, newest)["name"] == name:
                        return change.result  # it was made, and the answer was lost
                    if time.monotonic() > last:
                        raise ArchiveError(
                            "Annotations are being saved by too many at once.", code="busy"
                        ) from error
                time.sleep(random.uniform(0, pause))
                pause = min(1.0, 2 * pause)

    def _made(self) -> Any:
        """Make the table, and return it; another process may be first."""
        read_meta(self.uri)  # do not leave a table where there is no archive
        with guarded(self.uri, "make the table of annotations"):
            try:
                make_table(self.uri)
            except BaseException as error:
                if not is_failure(error):
                    raise
                for _ in range(100):  # whoever was first is about to be done
                    if (found := self._newest()) is not None:
                        return found
                    time.sleep(0.05)
                raise
        return self._newest()


def _may(stored: Annotation, *, by: str, anyone: bool) -> bool:
    return anyone or stored.author == by


def _on(ground: Ground, stored: Annotation) -> bool:
    return stored.slide_id == ground.slide_id or (
        ground.sha256 is not None and stored.sha256 == ground.sha256
    )


def _saved(one: Annotation, *, over: Annotation | None, ground: Ground, by: str) -> Annotation:
    """Return an annotation as it is stored over another, or as a new one."""
    now = datetime.now(UTC)
    now = now.replace(microsecond=now.microsecond // 1000 * 1000)
    if over is not None and over.updated is not None:  # clocks of hosts differ
        now = max(now, over.updated + timedelta(milliseconds=1))
    return replace(
        one,
        slide_id=ground.slide_id,
        sha256=ground.sha256,
        author=by if over is None else over.author,
        revision=1 if over is None else over.revision + 1,
        created=now if over is None else over.created,
        updated=now,
    )


def _unknown() -> ArchiveError:
    return ArchiveError("There is no such annotation of yours.", code="unknown_annotation")


def _stale(stored: Annotation | None) -> ArchiveError:
    if stored is None:
        return ArchiveError(
            "The annotation was removed meanwhile.",
            hint="Save it as a new one, with revision 0.",
            code="stale",
        )
    return ArchiveError(
        f"The annotation was saved meanwhile: its revision is {stored.revision}.",
        hint="Read it again, and save over that revision.",
        code="stale",
    )
