"""Requests and bytes of an archive in an object store, step by step, counted by a proxy.

    python -m tests.bench.store [--json]

The archive holds made-up slides; the store runs on this machine, so only counts mean anything.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

SLIDES = 50


def measure(*, slides: int) -> dict[str, dict[str, int]]:
    """Return {step: requests and bytes} of opening, searching, committing and maintaining."""
    from tests import proxy, s3

    with s3.running() as store, proxy.between(store.port) as between, TemporaryDirectory() as made:
        os.environ.update(s3.environment(between.port))
        return _steps(store.new_bucket(), between, Path(made), slides=slides)


def _steps(bucket: str, between: Any, folder: Path, *, slides: int) -> dict[str, dict[str, int]]:
    import numpy as np

    from pathflip.archive import Archive
    from pathflip.archive.commit import Committer
    from pathflip.archive.maintain import maintain
    from pathflip.archive.search import search
    from tests import proxy
    from tests.unit.archive import cohort, models

    uri = f"{bucket}/a"
    cohort.build(uri)
    with Committer(uri) as committer:
        cohort.commit(committer, *range(slides))
        models.add(committer, *range(slides))
    found: dict[str, dict[str, int]] = {}
    query = np.ones(models.DIM, np.float32)
    between.traffic = proxy.Traffic()

    def counted(step: str) -> None:
        passed = between.traffic
        found[step] = {"requests": len(passed.requests), "bytes": passed.received}
        between.traffic = proxy.Traffic()

    archive = Archive(uri)
    counted("open")
    for step in ("first search", "second search"):
        search(archive, query, model=models.MODEL)
        counted(step)
    archive.is_newest()
    counted("look for commits")
    with Committer(uri) as committer:
        counted("take the lease")
        cohort.commit(committer, slides)
        counted("commit a slide")
    between.traffic = proxy.Traffic()
    maintain(uri)
    counted("maintain")
    return found


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--slides", type=int, default=SLIDES)
    arguments = parser.parse_args()
    found = measure(slides=arguments.slides)
    if arguments.json:
        print(json.dumps(found))
        return
    for step, counts in found.items():
        print(f"{step:18} {counts['requests']:5} requests {counts['bytes']:9,} bytes")


if __name__ == "__main__":
    main()
