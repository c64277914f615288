"""The audit log: a line before every answer, and a chain that shows what was done to it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from pathflip.errors import ConfigError
from serve.audit import AuditError, AuditLog, verify


def filled(folder, lines=5):
    log = AuditLog(folder)
    for number in range(lines):
        log.write({"who": "a", "slides": [f"slide{number:03d}"]})
    log.close()
    return log.path


def test_a_whole_log_is_whole(tmp_path):
    path = filled(tmp_path / "log")
    (head,) = verify(path).values()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert (head.lines, head.hash, head.torn) == (6, lines[-1]["hash"], False)
    assert [line["number"] for line in lines] == list(range(1, 7))
    assert lines[3]["slides"] == ["slide002"]
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert verify(path.parent) == {path.name: head}


def tampered(path, number, change):
    lines = path.read_bytes().splitlines(keepends=True)
    lines[number : number + 1] = change(lines[number])
    path.write_bytes(b"".join(lines))


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize(
    "change",
    [
        lambda line: [line.replace(b'"time"', b'"Time"')],
        lambda line: [line.replace(b"2", b"3", 1)],
        lambda line: [line, line],
        lambda line: [line.upper()],
        lambda line: [b"{}\n"],
        lambda line: [b"\n"],
        lambda line: [b"[" * 100_000 + b"\n"],
    ],
)
def test_any_changed_line_is_found(tmp_path, number, change):
    path = filled(tmp_path)
    tampered(path, number, change)
    with pytest.raises(AuditError, match=r"line|first"):
        verify(path)


@pytest.mark.parametrize("number", range(5))
def test_a_removed_line_is_found(tmp_path, number):
    path = filled(tmp_path)
    tampered(path, number, lambda line: [])
    with pytest.raises(AuditError):
        verify(path)


def test_swapped_lines_are_found(tmp_path):
    path = filled(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], lines[3], lines[2], *lines[4:]]))
    with pytest.raises(AuditError, match="line 3"):
        verify(path)


def test_a_file_cut_short_is_told_of_by_the_next(tmp_path):
    path = filled(tmp_path)
    filled(tmp_path)
    assert len(verify(tmp_path)) == 2
    tampered(path, 5, lambda line: [])
    verify(path)  # by itself it is a chain
    with pytest.raises(AuditError, match=path.name):
        verify(tmp_path)
    path.unlink()
    with pytest.raises(AuditError, match=path.name):
        verify(tmp_path)


def test_a_head_that_was_kept_shows_what_was_cut_off(tmp_path):
    """The newest file has no other to tell of it."""
    filled(tmp_path)
    path = filled(tmp_path)
    early = json.loads(path.read_text().splitlines()[2])["hash"]
    head = verify(tmp_path)[path.name].hash
    assert len(verify(tmp_path, kept=[early, head])) == 2
    tampered(path, 5, lambda line: [])
    verify(tmp_path, kept=[early])
    with pytest.raises(AuditError, match=f"{head}: it was cut short"):
        verify(tmp_path, kept=[early, head])
    for wrong in ("", head[:-1], head.upper()):
        with pytest.raises(ConfigError, match="is no head"):
            verify(tmp_path, kept=[wrong])


def test_lines_from_many_threads_are_one_chain(tmp_path):
    log = AuditLog(tmp_path)
    threads = [
        threading.Thread(target=lambda n=n: [log.write({"n": n, "i": i}) for i in range(50)])
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    assert verify(log.path)[log.path.name].lines == 401


def test_a_killed_writer_loses_no_line_it_returned_from(tmp_path):
    code = (
        "import sys; from serve.audit import AuditLog; log = AuditLog(sys.argv[1]); n = 0\n"
        "while True: log.write({'n': n}); print(n, flush=True); n += 1"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=-1) as writer:
        for _ in range(200):
            last = writer.stdout.readline()
        os.kill(writer.pid, signal.SIGKILL)
        last = writer.stdout.read().splitlines()[-1:] or [last]
    (head,) = verify(tmp_path).values()
    assert head.lines >= int(last[0]) + 2  # the first line is the opening


def test_half_a_line_at_the_end_is_told(tmp_path):
    path = filled(tmp_path)
    path.write_bytes(path.read_bytes()[:-10])
    (head,) = verify(path).values()
    assert (head.lines, head.torn) == (5, True)
    filled(tmp_path)  # the next begins in spite of it, and tells of the five
    assert len(verify(tmp_path)) == 2


def test_every_answer_has_its_line(serving, tmp_path):
    log = AuditLog(tmp_path)
    ask = serving(audit=log)
    ask("GET", "/v1/slides/slide001", who="reader")
    ask("POST", "/v1/search", json={"text": "a secret question", "k": 2, "level": "slide"})
    ask("POST", "/v1/ground", json={"slide_id": "slide001", "text": "a secret question"})
    ask("POST", "/v1/search", who="reader", json={"text": "a"})
    ask("GET", "/v1/slides/nope%0A{}", who="reader")
    ask("GET", "/v1/slides", who=None)
    ask("GET", "/healthz", who=None)
    log.close()
    verify(log.path)
    lines = [json.loads(line) for line in log.path.read_text().splitlines()][1:]
    assert [(line["who"], line["action"], line["outcome"]) for line in lines] == [
        ("reader", "GET /v1/slides/{slide_id}", 200),
        ("all", "POST /v1/search", 200),
        ("all", "POST /v1/ground", 200),
        ("reader", "POST /v1/search", 403),
        ("reader", "GET /v1/slides/{slide_id}", 404),
    ]
    assert lines[0]["slides"] == ["slide001"]
    assert len(lines[1]["slides"]) == 2
    assert "secret question" not in log.path.read_text()


def test_nothing_is_answered_that_cannot_be_written_down(serving, tmp_path):
    log = AuditLog(tmp_path)
    ask = serving(audit=log)
    # Nothing can be written to a file that is open for reading.
    full = os.open(log.path, os.O_RDONLY)
    os.dup2(full, log._file)
    for method, path, options in (
        ("GET", "/v1/slides/slide001", {}),
        ("GET", "/v1/slides/slide001/thumbnail", {}),
        ("POST", "/v1/search", {"json": {"text": "a"}}),
    ):
        answer = ask(method, path, **options)
        assert (answer.status_code, answer.json()["code"]) == (503, "audit")
        assert "retry-after" in answer.headers
        assert "slide001" not in answer.text
    os.close(full)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        AuditLog(tmp_path / "file")
    with pytest.raises(ConfigError, match="no audit log"):
        verify(tmp_path)
