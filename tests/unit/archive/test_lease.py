"""The right to write an archive on an object store, and how those lose it who were too slow."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import lance
import pyarrow as pa
import pytest

from pathflip.archive import Archive, lease, transactions
from pathflip.archive.commit import Committer
from pathflip.archive.fragments import Shard, write_fragment
from pathflip.archive.lock import ArchiveLock
from pathflip.archive.maintain import maintain
from pathflip.archive.storage import OBJECT_STORE_ON_DISK
from pathflip.errors import ArchiveError
from tests.unit.archive import cohort
from tests.unit.archive.test_commit import ROOT, SCRIPT, assert_whole

EXPIRES_S = 1.5
LIVES_S = 4.0
"""The same where a writer that lives has to renew its lease on a busy machine."""
STOPS = ("files", "regions", "slides")
"""Tables at whose commit a writer is suspended: before the rows, between them, at the last."""


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "EXPIRES_S", EXPIRES_S)


@pytest.fixture
def on_disk(tmp_path: Path) -> str:
    """An archive of two slides on a folder that Lance takes for an object store."""
    uri = f"{OBJECT_STORE_ON_DISK}{tmp_path}/a"
    cohort.build(uri, 0, 1)
    return uri


def start(
    uri: str, first: int, last: int, *more: str, lease_s: float = EXPIRES_S, **variables: str
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, SCRIPT, uri, str(first), str(last), *more],
        env={**os.environ, "PYTHONPATH": ROOT, "LEASE_S": str(lease_s), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def suspended(uri: str, stack: ExitStack) -> Committer:
    """A writer that renews its lease no more, as if its process had been stopped."""
    writer = Committer(uri)
    writer.__enter__()
    held = writer.lock._lease
    assert held is not None
    held._ended.set()
    stack.callback(held._renewing.join)
    return writer


def wait_for_stop(process: subprocess.Popen[str]) -> None:
    while Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "T":
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def test_a_living_writer_is_named_and_keeps_its_lease(bucket: str) -> None:
    uri = f"{bucket}/a"
    holder = start(uri, 0, 2, "stay", lease_s=LIVES_S)
    try:
        assert holder.stdout is not None
        assert [holder.stdout.readline() for _ in range(3)] == [
            "open\n",
            "slide000\n",
            "slide001\n",
        ]
        for _ in range(2):  # longer than the lease lives without renewal
            with pytest.raises(ArchiveError, match=f"locked by process {holder.pid} on ") as error:
                maintain(uri)
            assert error.value.code == "locked"
            assert f"expires {LIVES_S:g} s after" in error.value.message
    finally:
        holder.kill()
        holder.wait()
    with Committer(uri) as committer:  # nobody need remove anything by hand
        cohort.commit(committer, 2)
    assert_whole(uri, range(3))
    maintain(uri)
    assert lease.Lease(uri)._read()[1] is None, "it was given back"


def test_a_suspended_writer_can_write_no_more(bucket: str) -> None:
    """Stopped with its commit ready to be sent, whichever table it goes to."""

    def take_over(stopped: tuple[str, subprocess.Popen[str]]) -> None:
        table, writer = stopped
        wait_for_stop(writer)
        with Committer(f"{bucket}/{table}") as committer:
            cohort.commit(committer, 1, 7)
        writer.send_signal(signal.SIGCONT)

    writers = {table: start(f"{bucket}/{table}", 0, 3, STOP_AT=table) for table in STOPS}
    try:
        with ThreadPoolExecutor(len(STOPS)) as pool:
            list(pool.map(take_over, writers.items()))
        for table, writer in writers.items():
            out, said = writer.communicate(timeout=60)
            assert writer.returncode == 1
            acknowledged = out.split()[1:]
            assert "slide001" not in acknowledged
            assert "lease_lost" in said or "Incompatible transaction" in said, said
            assert_whole(f"{bucket}/{table}", sorted({*(int(s[-3:]) for s in acknowledged), 1, 7}))
    finally:
        for writer in writers.values():
            writer.kill()


def test_commits_of_every_kind_are_fenced(on_disk: str) -> None:
    """Commits that were prepared before the lease was lost fail, and so do later ones."""
    with ExitStack() as stack:
        slow = suspended(on_disk, stack)
        shard = Shard.from_json(write_fragment(on_disk, "regions", cohort.region_rows(5)))
        opened = {table: slow.lock.open(table) for table in ("regions", "slides", "embeddings_tex")}
        row = pa.table({"key": ["k"], "value": ["1"], "checksum": ["c"]})
        meta = slow.lock.open("meta")
        made, _ = meta.merge_insert("key").when_not_matched_insert_all().execute_uncommitted(row)
        with Committer(on_disk) as other:
            cohort.commit(other, 2)
        added = [lance.fragment.FragmentMetadata.from_json(json.dumps(f)) for f in shard.fragments]
        regions = opened["regions"]
        for late in (
            lambda: lance.LanceDataset.commit(
                regions, lance.LanceOperation.Append(added), read_version=regions.version
            ),
            lambda: lance.LanceDataset.commit(meta, made),
            lambda: opened["slides"].delete("slide_id = 'slide000'"),
            lambda: regions.optimize.compact_files(),
            lambda: opened["embeddings_tex"].create_scalar_index("slide_id", "BTREE"),
        ):
            with pytest.raises(OSError, match="Incompatible transaction"):
                late()
        for late in (
            lambda: transactions.append(slow.lock, shard),
            lambda: slow.upsert("meta", pa.table({"key": ["k"], "value": ["1"]})),
            lambda: slow.drop_slides(["slide000"]),
            slow.compact,
            lambda: cohort.commit(slow, 3),
        ):
            with pytest.raises(ArchiveError) as error:
                late()
            assert error.value.code == "lease_lost"
        with pytest.raises(ArchiveError, match="did not renew its lease"):
            slow.__exit__(None, None, None)
    assert_whole(on_disk, range(3))


def test_a_last_commit_before_the_fence_counts(
    on_disk: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lands between the taker's look at the table and its own commit."""
    with ExitStack() as stack:
        slow = suspended(on_disk, stack)
        opened = slow.lock.open("slides")
        restore, late = lease._restore, []

        def after_one_more(dataset: lance.LanceDataset) -> None:
            if dataset.uri.endswith("slides.lance") and not late:
                late.append(opened.delete("slide_id = 'slide000'"))
            restore(dataset)

        monkeypatch.setattr(lease, "_restore", after_one_more)
        with Committer(on_disk):
            pass
    assert late
    assert sorted(Archive(on_disk).ready_ids()) == ["slide001"]
    assert_whole(on_disk, [1])


def test_fighting_writers_lose_and_double_nothing(bucket: str) -> None:
    """Two processes want the same slides, are killed while one writes, and others come."""
    uri, killed, done = f"{bucket}/a", 0, 0
    writers = [start(uri, 0, 3, lease_s=LIVES_S) for _ in range(2)]
    acknowledged: set[str] = set()
    try:
        while not done:
            for writer in list(writers):
                if writer.poll() is not None:
                    out, said = writer.communicate()
                    acknowledged |= set(out.split()) - {"open"}
                    done += writer.returncode == 0
                    assert writer.returncode in (0, -9) or "locked" in said or "lease" in said, said
                    writers.remove(writer)
                    if not done:
                        writers.append(start(uri, 0, 3, lease_s=LIVES_S))
            if not killed and "slide000" in _ready(uri):
                for writer in writers:
                    writer.kill()
                    killed += 1
            time.sleep(0.05)
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
    assert killed
    assert acknowledged <= _ready(uri)
    with Committer(uri) as committer:
        cohort.commit(committer, 0, 1, 2)
    assert_whole(uri, range(3))


def _ready(uri: str) -> set[str]:
    try:
        return set(Archive(uri).ready_ids())
    except ArchiveError:
        return set()


def test_where_files_cannot_be_locked_the_lease_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import fcntl

    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    cohort.build(tmp_path / "a", 0)
    with ArchiveLock(tmp_path / "a"):
        with pytest.raises(ArchiveError) as error:
            Committer(tmp_path / "a").__enter__()
        assert error.value.code == "locked"
    assert_whole(tmp_path / "a", [0])
