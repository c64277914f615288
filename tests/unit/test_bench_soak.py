"""The soak's line: its interval holds the slope about as often as it says, and small ones show."""

import numpy as np
import pytest

from tests.bench.soak import role, slope


@pytest.mark.parametrize("memory", [0.5, 0.95])
def test_interval_holds_the_slope_of_noise_that_remembers(memory: float) -> None:
    """An hour of looks every 5 s; of noise with a memory of seconds to minutes."""
    held = seen = 0
    minutes = np.arange(0, 50, 1 / 12)
    for seed in range(100):
        noise = np.random.default_rng(seed).standard_normal(len(minutes))
        for at in range(1, len(minutes)):
            noise[at] += memory * noise[at - 1]
        low, high = slope(minutes, 100 + noise + 3 * minutes / 60)["interval"]
        held += low <= 3 <= high
        steep = 10 * np.ptp(noise)
        seen += slope(minutes, noise + steep * minutes / 60)["is"] == "grows"
    assert 88 <= held <= 100
    assert seen == 100


def test_what_never_changes_is_flat() -> None:
    assert slope(np.arange(0, 9, 0.5), np.full(18, 7.0))["is"] == "flat"


def test_processes_are_told_by_their_command_lines() -> None:
    assert role("ray::ServeReplica:pathflip:search.search") == "search"
    assert role("/x/ray/core/src/ray/raylet/raylet --raylet_socket_name=/tmp") == "ray"
    assert role("python -m pathflip.slides.reader_child 48 38 768") == "workers"
