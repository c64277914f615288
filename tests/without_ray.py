"""Jobs whose actors live in this process: all that they decide and write, without starting Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pyarrow as pa

from jobs.ingest.config import IngestConfig
from jobs.ingest.embed import Embedder
from jobs.ingest.plan import Planner
from jobs.ray_data import Available
from pathflip.encoders import EncoderInfo


@contextmanager
def without_ray() -> Iterator[None]:
    """Have ``ingest``, ``index`` and ``trees`` call one actor of each kind, row by row."""
    with (
        mock.patch("jobs.cluster.connect", return_value=True),
        mock.patch.multiple("jobs.ingest", _pipeline=_pipeline, available=_available),
        mock.patch.multiple("jobs.index", map_actors=_map_actors, available=_available),
        mock.patch.multiple("jobs.trees", map_actors=_map_actors, available=_available),
    ):
        yield


def _available(*_: Any, **__: Any) -> Available:
    return Available(cpus=1, gpus=0, use_gpu=False)


def _pipeline(
    groups: list[dict[str, str]],
    config: IngestConfig,
    archive: str,
    tables: Sequence[str],
    encoders: Sequence[EncoderInfo],
    **_: Any,
) -> Iterator[pa.Table]:
    planner = Planner(config, archive)
    embedder = Embedder(config, archive, tables, [info.revision for info in encoders], 1)
    for group in groups:
        for chunks in planner(pa.Table.from_pylist([group])):
            for row in range(len(chunks)):
                yield embedder(chunks.slice(row, 1))


def _map_actors(
    rows: Sequence[dict[str, str]],
    actor: Callable[..., Callable[[list[dict[str, str]]], pa.Table]],
    arguments: tuple[Any, ...],
    *,
    at_once: int,
    **_: Any,
) -> Iterator[pa.Table]:
    made = actor(*arguments)
    for start in range(0, len(rows), at_once):
        yield made(list(rows[start : start + at_once]))
