"""Progress of long work: its line and share, and where it is shown."""

from __future__ import annotations

import pytest

from pathflip.progress import Progress, duration, show_progress


def test_a_line_has_rate_and_time_left() -> None:
    one = Progress(what="index", done=50, total=2000, seconds=10.0, note="800 regions")
    # 5 a second; 1,950 are left: 390 s.
    assert one.line() == "index 50/2,000 slides · 800 regions · 5.0/s · 6 min 30 s left"
    assert one.fraction == 0.025


def test_a_line_at_the_beginning_promises_nothing() -> None:
    one = Progress(what="make-llm", done=0, total=10, seconds=0.0, unit="steps")
    assert one.line() == "make-llm 0/10 steps"
    assert Progress(what="x", done=0, total=0, seconds=1.0).fraction == 1.0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-3, "0 s"), (0.4, "0 s"), (42, "42 s"), (59.6, "1 min 00 s"), (190, "3 min 10 s"),
     (3599, "59 min 59 s"), (3600, "1 h 00 min"), (7500, "2 h 05 min")],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_without_a_terminal_there_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with show_progress() as progress:
        for done in range(101):
            progress(Progress(what="count", done=done, total=100, seconds=float(done)))
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert lines[-1].startswith("count 100/100 slides")
    assert len(lines) <= 2  # at once at the end, else every 10 s
