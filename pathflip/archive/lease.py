"""Lease on an archive: the right to write it where there is no file to lock.

The lease is one entry, the holder, in the configuration of the Lance table ``lease`` beside the
archive's tables. Lance changes it by a conditional commit, so of two writers that take it one
fails. The holder renews it in the background. Whoever finds it held watches it: a change says that
the holder lives (``locked``), none for as long as the holder promised says that it does not. Both
sides measure that time with clocks of their own, so what the hosts believe the time to be matters
nowhere.

A holder that was only slow, or suspended, comes back. It is fenced in two steps, so that no moment
remains at which it could still write:

1. The taker writes the lease, then one commit to every table (``restore``, which changes no row).
   Lance refuses any commit of rows, deletions, indexes or compactions that was prepared on an older
   version. Only entries of a table's configuration pass, which hold digests of files.
2. Every commit is prepared on a version that was opened *before* the lease was looked at, see
   :meth:`pathflip.archive.lock.ArchiveLock.open`. If the lease was still the writer's own then, the
   version lies before the taker's commit; if the version lies behind it, the lease is lost.

Lance sees the taker's commit as long as that version is kept, a day
(``compaction.KEEP_HOURS``). Who sleeps longer, and in the moment of a commit, is not kept out.

This rests on the store alone: conditional writes, and reads that see the newest write, which S3,
Google Cloud Storage, Azure and MinIO promise. It does not hold where a cache between the two
answers with older objects.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

import pyarrow as pa

from pathflip.archive.settings import read_meta
from pathflip.archive.storage import guarded, is_failure, open_table, table_uri
from pathflip.archive.tables import META, tables_of
from pathflip.errors import ArchiveError

logger = logging.getLogger(__name__)

EXPIRES_S = 60.0
"""Seconds without renewal after which another process may take the lease."""
RENEWALS = 6
"""Renewals in that time."""
_TABLE, _HOLDER = "lease", "holder"
_VERSIONS, _KEEP_S = 100, 3600
"""Each renewal is a version of the table; at the hundredth, Lance removes those of an hour ago."""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Process that may write an archive.

    Attributes:
        id: Random name of this stay; every one has another.
        host: Its host.
        pid: Its process id there.
        since: Time it took the lease, by its own clock.
        expires_s: Seconds without renewal after which the lease may be taken.
        renewals: Number of its renewals.
    """

    id: str
    host: str
    pid: int
    since: str
    expires_s: float
    renewals: int = 0

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


class Lease:
    """The lease on an archive, as a context manager; renewed in the background while it is held.

    Args:
        uri: The archive, normalised.

    Raises:
        ArchiveError: On entering, if a living process holds it (``locked``), or the store cannot be
            reached. On leaving without another error, if it was lost (``lease_lost``).
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._own = Holder(
            id=uuid.uuid4().hex,
            host=socket.gethostname(),
            pid=os.getpid(),
            since=datetime.now(UTC).isoformat(timespec="seconds"),
            expires_s=EXPIRES_S,
        )
        self._written: Any = None  # the version of the table that this process wrote last
        self._ended = threading.Event()
        self._renewing = threading.Thread(target=self._renew, daemon=True, name="archive lease")

    def __enter__(self) -> Lease:
        with guarded(self.uri, "take the lease of the archive"):
            if self._take():
                self._fence()
        self._renewing.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._renewing.join()
        if kind is None:
            self.check()
        with suppress(ArchiveError), guarded(self.uri, "give the lease back"):
            dataset, holder = self._read()
            if holder is not None and holder.id == self._own.id:
                dataset.update_config({_HOLDER: ""})

    def check(self) -> None:
        """Refuse to go on unless the lease is this one's.

        Raises:
            ArchiveError: Another process has taken it (``lease_lost``), or it cannot be read.
        """
        with guarded(self.uri, "read the lease of the archive"):
            written = self._written
            if written is not None and written.latest_version == written.version:
                return  # nobody has written it since this process did
            _, holder = self._read()
        if holder is None or holder.id != self._own.id:
            by = "another process" if holder is None else str(holder)
            raise ArchiveError(
                f"This process may not write the archive {self.uri} any more: it did not renew its "
                f"lease for {self._own.expires_s:g} s, and {by} took it.",
                hint="When that process is done, run the same command again; it continues where it "
                "stopped.",
                code="lease_lost",
            )

    def _take(self) -> bool:
        """Take the lease; return whether it was taken from a process that did not give it back."""
        dataset, holder = self._read()
        expired = False
        if holder is not None:
            logger.warning(
                "The archive %s is being written by %s, or was left by it; looking whether it "
                "still lives, for %g s at most.",
                self.uri,
                holder,
                holder.expires_s,
            )
            last, seen = time.monotonic() + holder.expires_s, holder
            while holder == seen and not (expired := time.monotonic() >= last):
                time.sleep(min(1.0, seen.expires_s / RENEWALS))
                dataset, holder = self._read()
            if holder not in (None, seen):
                raise self._locked(holder)
        try:
            self._write(dataset, self._own)
        except BaseException as error:
            if not is_failure(error):
                raise
            _, holder = self._read()  # the answer may have been lost on the way
            if holder is None:
                raise
            if holder.id != self._own.id:
                raise self._locked(holder) from error
        return expired

    def _locked(self, holder: Holder) -> ArchiveError:
        return ArchiveError(
            f"The archive {self.uri} is locked by {holder}. Its lease was just renewed and expires "
            f"{holder.expires_s:g} s after the last renewal.",
            hint="Wait for it to finish, or stop it.",
            code="locked",
        )

    def _fence(self) -> None:
        """Make every commit fail that an earlier holder has prepared.

        The settings come first: the tables they name afterwards are all that there will be.
        """
        try:
            self._fence_table(META)
        except ArchiveError as error:
            if error.code != "missing_table":
                raise
            return  # its creation did not end; what it left is empty
        for table in tables_of(read_meta(self.uri)):
            if table != META:
                self._fence_table(table)

    def _fence_table(self, table: str) -> None:
        import lance

        dataset = open_table(self.uri, table)
        before = dataset.version
        _restore(dataset)
        if dataset.version > before + 1:
            # A last commit came between: it counts, and none can come after it.
            last = dataset.version - 1
            _restore(lance.dataset(table_uri(self.uri, table), version=last))

    def _renew(self) -> None:
        own = self._own
        while not self._ended.wait(self._own.expires_s / RENEWALS):
            with suppress(Exception):  # the next one tries again; commits look for themselves
                dataset, holder = self._read()
                if holder is None or holder.id != own.id:
                    return
                own = replace(own, renewals=holder.renewals + 1)
                self._write(dataset, own)

    def _read(self) -> tuple[Any, Holder | None]:
        """Return the newest version of the table, made if there is none, and its holder."""
        import lance

        where = table_uri(self.uri, _TABLE)
        try:
            dataset = lance.dataset(where)
        except ValueError:
            with suppress(OSError):  # another process was first
                lance.write_dataset(
                    pa.table({"lease": pa.array([], pa.string())}),
                    where,
                    mode="create",
                    auto_cleanup_options={"interval": _VERSIONS, "older_than_seconds": _KEEP_S},
                )
            dataset = lance.dataset(where)
        held = dataset.config().get(_HOLDER)
        return dataset, Holder(**json.loads(held)) if held else None

    def _write(self, dataset: Any, holder: Holder) -> None:
        """Write the holder, unless it has changed since this version of the table."""
        dataset.update_config({_HOLDER: json.dumps(asdict(holder))})
        self._written = dataset


def _restore(dataset: Any) -> None:
    """Commit a version of a table again, as its newest."""
    dataset.restore()
