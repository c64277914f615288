"""Files are whole or as before, and a lock is one process's."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from pathflip.files import FileLock, PrivateFolder, claim, partial, replacing, write_file


def held(who: str) -> RuntimeError:
    return RuntimeError(f"held by {who}")


def test_a_file_is_the_old_one_until_the_block_has_ended(tmp_path):
    path = tmp_path / "a.json"
    write_file(path, "old")
    with replacing(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
        assert part.parent == path.parent
        assert part.name.startswith(".")
    assert path.read_text() == "new"
    with pytest.raises(ZeroDivisionError), replacing(path) as part:
        part.write_text(str(1 / 0 if part.write_text("half") else ""))
    assert path.read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_text_and_bytes_are_written_as_they_are(tmp_path):
    write_file(tmp_path / "text", "µm\r\n")
    assert (tmp_path / "text").read_bytes() == b"\xc2\xb5m\r\n"
    write_file(tmp_path / "bytes", b"\xff\0")
    assert (tmp_path / "bytes").read_bytes() == b"\xff\0"


def test_two_writers_do_not_share_a_neighbour_and_one_uses_its_own_again(tmp_path):
    path = tmp_path / "f"
    assert partial(path) != partial(path)
    assert partial(path, one_writer=True) == partial(path, one_writer=True)


def test_a_lock_names_its_holder_and_goes_with_the_process(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from pathflip.files import FileLock\n"
        "with FileLock(Path(sys.argv[1]), refusal=RuntimeError): print('held', flush=True), input()"
    )
    path = tmp_path / ".lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RuntimeError, match=rf"held by process {holder.pid} on \S+ since \d"):
            FileLock(path, refusal=held).__enter__()
    finally:
        holder.kill()
        holder.wait()
        holder.stdin.close()
        holder.stdout.close()
    with FileLock(path, refusal=held, wait_s=5):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_lock_without_a_readable_note_is_still_a_lock(tmp_path):
    path = tmp_path / ".lock"
    with path.open("w") as file:
        assert claim(file.fileno())
        with pytest.raises(RuntimeError, match="held by another process"):
            FileLock(path, refusal=held).__enter__()
        with path.open("r") as other:
            assert not claim(other.fileno(), wait_s=0.2)
    with FileLock(path, refusal=held):
        pass


def test_a_lock_just_taken_is_not_said_to_be_held_by_the_one_before(tmp_path):
    path = tmp_path / ".lock"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()

    def note(pid):
        text = json.dumps({"pid": pid, "host": socket.gethostname(), "started": "2026-01-01"})
        path.write_text(text)

    with path.open("a+") as file:
        assert claim(file.fileno())
        note(ended.pid)
        writes = threading.Timer(0.2, note, [os.getpid()])
        writes.start()
        with pytest.raises(RuntimeError, match=f"held by process {os.getpid()} on"):
            FileLock(path, refusal=held).__enter__()
        writes.join()


def test_private_folders_go_with_their_process(tmp_path, monkeypatch):
    """One that is held stays; one whose process was killed is removed by the next."""
    short = Path(tempfile.mkdtemp(dir="/tmp", prefix="t"))
    monkeypatch.setattr(tempfile, "tempdir", str(short))
    code = (
        "import os, sys, tempfile\nfrom pathflip.files import PrivateFolder\n"
        f"tempfile.tempdir = {str(short)!r}\n"
        "with PrivateFolder() as folder:\n    (folder / 'ray').mkdir()\n"
        "    print(folder, flush=True)\n    sys.stdin.readline()\n"
    )
    try:
        with (
            PrivateFolder() as own,
            subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            ) as other,
        ):
            assert other.stdout is not None
            theirs = Path(other.stdout.readline().strip())
            assert own.parent == theirs.parent == short
            assert own.stat().st_mode & 0o777 == theirs.stat().st_mode & 0o777 == 0o700
            with PrivateFolder() as third:
                assert {own, theirs, third} == set(short.iterdir())
            other.kill()
            other.wait()
            with PrivateFolder() as third:
                assert {own, third} == set(short.iterdir())
        assert not list(short.iterdir())
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # too long for a socket's path
        with PrivateFolder() as far:
            assert far.parent == Path("/tmp")
    finally:
        shutil.rmtree(short)
