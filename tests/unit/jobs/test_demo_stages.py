"""Stages of the demo that run beside each other, in processes of their own."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from jobs.demo_stages import Stages
from pathflip.errors import ConfigError, TrainingError


def meet(own: str, other: str) -> int:
    """Wait for the other side, which a process that runs first and not beside it never sees."""
    Path(own).touch()
    end = time.monotonic() + 60
    while not Path(other).exists():
        if time.monotonic() > end:
            raise ConfigError("Nobody came.", code="alone")
        time.sleep(0.01)
    return os.getpid()


def refuse() -> None:
    raise ConfigError("It cannot be.", hint="Try another.", code="never")


def die() -> None:
    os._exit(7)


def fail_once(noted: Path) -> None:
    with Stages().beside("lane", "Sleeping", sleep, str(noted)):
        while not noted.exists() or not noted.read_text():
            time.sleep(0.01)
        raise KeyError


def sleep(noted: str) -> None:
    Path(noted).write_text(str(os.getpid()))
    time.sleep(600)


def test_work_runs_beside_the_block_and_hands_back_what_it_found(tmp_path: Path) -> None:
    stages = Stages()
    left, right = str(tmp_path / "left"), str(tmp_path / "right")
    with stages.beside("lane", "Meeting", meet, left, right) as lane:
        here = meet(right, left)
    assert here == os.getpid() != lane.result
    assert stages.seconds["lane"] > 0


def test_an_error_of_the_work_is_raised_as_its_own() -> None:
    with pytest.raises(ConfigError) as found, Stages().beside("lane", "Refusing", refuse):
        pass
    assert found.value.as_json() == {
        "code": "never",
        "message": "It cannot be.",
        "hint": "Try another.",
    }


def test_a_process_that_dies_is_named() -> None:
    with pytest.raises(TrainingError, match="lane ended with 7"), Stages().beside("lane", "…", die):
        pass


def test_an_error_beside_it_ends_the_work(tmp_path: Path) -> None:
    noted = tmp_path / "pid"
    with pytest.raises(KeyError):
        fail_once(noted)
    with pytest.raises(ProcessLookupError):
        os.kill(int(noted.read_text()), 0)
