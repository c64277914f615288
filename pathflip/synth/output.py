"""Files of a cohort and the processes that draw its slides, whatever the cohort is of."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import cv2

from pathflip.cpus import cpus_here
from pathflip.errors import ConfigError
from pathflip.files import write_file

_Item = TypeVar("_Item")


def check_same_cohort(path: Path, spec: dict[str, Any]) -> None:
    """Compare a cohort's ``cohort.json``, where there is one, with what is to be written.

    Raises:
        ConfigError: It holds another value of a key of ``spec``, or is damaged.
    """
    if not path.exists():
        return
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
        other = [name for name, value in spec.items() if there.get(name) != value]
    except (ValueError, AttributeError):
        other = list(spec)
    if other:
        raise ConfigError(
            f"{path.parent} holds a cohort made with another {', '.join(other)}.",
            hint="Give an empty folder, or the options it was made with.",
        )


def make_folders(root: Path, *names: str) -> None:
    """Make folders of a cohort, and remove from them what a killed run left unfinished."""
    for name in names:
        (root / name).mkdir(parents=True, exist_ok=True)
        for left in (root / name).glob(".*.tmp"):
            left.unlink(missing_ok=True)


def worker_count(processes: int | None, items: int) -> int:
    """Return how many processes draw; with 1 the caller's own does."""
    return max(1, min(processes or cpus_here(), items))


def draw_all(
    draw: Callable[[Path, _Item], str], root: Path, items: Sequence[_Item], processes: int | None
) -> Iterator[str]:
    """Yield ``draw(root, item)`` of all items as they finish, from processes of one thread each.

    Args:
        draw: A function of a module; draws one slide below ``root`` and returns its name.
        root: Folder of the cohort.
        items: Slides to draw, as ``draw`` takes them.
        processes: Number of processes; None for one per CPU.
    """
    count = worker_count(processes, len(items))
    if count <= 1:
        for item in items:
            yield draw(root, item)
        return
    with ProcessPoolExecutor(
        count, mp_context=get_context("spawn"), initializer=_one_thread
    ) as pool:
        waiting = [pool.submit(draw, root, item) for item in items]
        try:
            for finished in as_completed(waiting):
                yield finished.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _one_thread() -> None:
    cv2.setNumThreads(1)


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table; None is an empty cell."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    write_file(path, out.getvalue())


def write_json(path: Path, value: Any) -> None:
    """Write a JSON document on one line."""
    write_file(path, json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n")
