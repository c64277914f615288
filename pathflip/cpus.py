"""CPUs that a process may use."""

from __future__ import annotations

import os
from pathlib import Path

_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def cpus_here() -> int:
    """Return the CPUs this process may use, by its affinity and its container's quota."""
    cpus = len(os.sched_getaffinity(0))
    try:
        quota, _, period = _QUOTA.read_text().partition(" ")
        return max(1, min(cpus, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup, or "max"
        return cpus
