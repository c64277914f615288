"""Further attempts of a command: when there is one, after what wait, and who may end them."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.attempts import attempts, main

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def ending(tmp_path: Path) -> Callable[..., list[str]]:
    """``ending(7, 0)``: a command that ends with 7, then with 0, and with 99 if run again."""
    runs = tmp_path / "runs"

    def command(*codes: int) -> list[str]:
        runs.write_text("")
        script = f"""
            echo x >> {runs}; n=$(wc -l < {runs})
            code=$(echo {" ".join(map(str, codes))} 99 | cut -d' ' -f$n)
            [ "$code" -lt 128 ] || kill -$((code - 128)) $$
            exit $code
        """
        return ["/bin/sh", "-c", script]

    return command


@pytest.mark.parametrize(
    ("codes", "accept", "code", "waited"),
    [
        ((0,), (), 0, []),
        ((1, 0), (), 0, [5.0]),
        ((1, 137, 0), (), 0, [5.0, 20.0]),
        ((1, 1, 4), (), 4, [5.0, 20.0]),
        ((1, 3), (3,), 0, [5.0]),
        ((3, 0), (), 0, [5.0]),
        ((2,), (), 2, []),
        ((1, 2), (3,), 2, [5.0]),
        ((1, 1, 137), (), 137, [5.0, 20.0]),
    ],
)
def test_command_is_run_again_while_its_failure_may_pass(
    ending: Callable[..., list[str]],
    codes: tuple[int, ...],
    accept: tuple[int, ...],
    code: int,
    waited: list[float],
) -> None:
    slept: list[float] = []
    found = attempts(ending(*codes), waits=(5, 20), accept=accept, sleep=slept.append)
    assert (found, slept) == (code, waited)


def test_words_of_the_command_are_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--waits", "0", "--accept", "3", "--", "echo", "--waits", "a b"]) == 0
    assert capfd.readouterr().out == "--waits a b\n"


@pytest.mark.parametrize("words", [["--waits", "soon", "--", "true"], []])
def test_wrong_usage_ends_with_2(words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert main(["--waits", "1", "--", "no-such-program"]) == 2


def test_who_stops_it_stops_the_command_and_all_further_attempts(tmp_path: Path) -> None:
    script = f"trap 'echo stopped > {tmp_path}/end; exit 1' TERM; echo $$; sleep 60 >&- 2>&- & wait"
    words = [sys.executable, "-m", "jobs.attempts", "--waits", "0,0", "--", "/bin/sh", "-c", script]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout
        pid = int(process.stdout.readline())
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
        assert (tmp_path / "end").read_text() == "stopped\n"
        assert not Path(f"/proc/{pid}").exists()
        assert process.stdout.read() == "", "it was run again"
