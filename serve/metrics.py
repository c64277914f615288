"""Metrics of an ingress replica, and of what it asks the parts for, in Prometheus' text format.

None names a slide or a client. Each has the label ``replica``: a scrape reaches one of the ingress
replicas, and counters of several would otherwise look like one that starts anew.
``platform/observability`` has the dashboard and the alerts that read them.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric

from pathflip.errors import PathFLIPError

if TYPE_CHECKING:
    from serve.routing import Parts

COUNTS_S = 2.0
"""Seconds that a scrape waits for the counts of slides; without them it has the rest."""
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_COUNTS = {
    "slides": ("pathflip_slides", "Ready slides."),
    "indexed": ("pathflip_slides_indexed", "Slides with a vector of the service's model."),
    "unindexed_rows": (
        "pathflip_unindexed_rows",
        "Vectors of the service's model that no vector index has.",
    ),
    "index_recall": (
        "pathflip_index_recall",
        "Share of the nearest vectors that the vector index finds, when it was last changed.",
    ),
}
"""{count of :meth:`serve.search.Search.counts`: name and text of its gauge}."""


class Metrics:
    """Prometheus metrics of an ingress replica."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._labels = {"replica": uuid.uuid4().hex[:8]}
        self.requests = Counter(
            "pathflip_requests", "Requests answered.", ("route", "method", "status"),
            registry=registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "pathflip_request_seconds", "Time until the answer was complete.", ("route",),
            buckets=_BUCKETS, registry=registry,
        )  # fmt: skip
        self.first = Histogram(
            "pathflip_first_byte_seconds", "Time until the answer began.", ("route",),
            buckets=_BUCKETS, registry=registry,
        )  # fmt: skip
        self.first_token = Histogram(
            "pathflip_first_token_seconds", "Time until the first token of an answer.",
            buckets=_BUCKETS, registry=registry,
        )  # fmt: skip
        self.in_flight = Gauge(
            "pathflip_requests_in_flight", "Running requests.", registry=registry
        )
        self.tokens = Counter(
            "pathflip_tokens", "Tokens of chat prompts and completions.", ("kind",),
            registry=registry,
        )  # fmt: skip
        self._up = Gauge(
            "pathflip_part_up", "Whether a part answers.", ("part",), registry=registry
        )
        self._engine_answers = Gauge(
            "pathflip_engine_answers", "Answers in the engine, decoded or waiting.",
            ("engine", "state"), registry=registry,
        )  # fmt: skip
        self._engine_cache = Gauge(
            "pathflip_engine_kv_cache_ratio", "Share of the memory for keys and values in use.",
            ("engine",), registry=registry,
        )  # fmt: skip
        self._counts: dict[str, Gauge] = {}

    async def scraped(self, parts: Parts, up: Mapping[str, bool]) -> bytes:
        """Render all metrics.

        Args:
            parts: The parts, whose counts of slides are asked for.
            up: Whether each part is up.
        """
        for part, answers in up.items():
            self._up.labels(part).set(answers)
        counts: Mapping[str, float] = {}
        if up.get("search"):
            try:
                counts = await asyncio.wait_for(parts.search.counts(), COUNTS_S)
            except (PathFLIPError, TimeoutError):
                counts = {}
        for name, (gauge, text) in _COUNTS.items():
            if name in counts:
                if name not in self._counts:
                    self._counts[name] = Gauge(gauge, text, registry=self.registry)
                self._counts[name].set(counts[name])
            elif name in self._counts:  # an old figure would look like a new one
                self.registry.unregister(self._counts.pop(name))
        await self._ask_engine(parts, up)
        return generate_latest(_Labelled(self.registry, self._labels))

    async def _ask_engine(self, parts: Parts, up: Mapping[str, bool]) -> None:
        """Tell the load of one replica's engine, whichever answers; the others' is an old one."""
        found = None
        if up.get("instructor"):
            with suppress(PathFLIPError, TimeoutError):
                found = await asyncio.wait_for(parts.instructor.engine_load(), COUNTS_S)
        # Nothing is awaited from here on, so that no other scrape meets half of it.
        self._engine_answers.clear()
        self._engine_cache.clear()
        if found is None:
            return
        for state in ("running", "waiting"):
            self._engine_answers.labels(found["name"], state).set(found[state])
        self._engine_cache.labels(found["name"]).set(found["kv_cache"])


class _Labelled(CollectorRegistry):
    """A registry whose samples have further labels, the same for all.

    Args:
        registry: The registry.
        labels: The labels.
    """

    def __init__(self, registry: CollectorRegistry, labels: Mapping[str, str]) -> None:
        super().__init__()
        self._registry, self._labels = registry, labels

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of the registry, labelled."""
        for metric in self._registry.collect():
            metric.samples = [self._labelled(sample) for sample in metric.samples]
            yield metric

    def _labelled(self, sample: Any) -> Any:
        return sample._replace(labels={**sample.labels, **self._labels})
