"""Traces for OpenTelemetry: where the time of a request, or of a job, went.

On where ``OTEL_EXPORTER_OTLP_ENDPOINT`` or ``OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`` names a
collector; without them OpenTelemetry is not imported. What it reads of other variables ``OTEL_*``
holds as well: sampling, headers for the collector, the name of the service.

A span says how long, how many and how it ended, never about whom or what: no id of a slide, no
text, no path, no token, and of an error its code alone. That is why the provider is private and the
present span a variable of this module: nothing that other packages would trace comes along.

The service's requests begin a trace (:mod:`serve.middleware`), and so do jobs; whatever else is
traced is so below one of those.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from pathflip.errors import ConfigError, PathFLIPError

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

T = TypeVar("T")
P = ParamSpec("P")

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
"""Variable with the URL of a collector, below which ``/v1/traces`` takes spans."""
TRACES_ENDPOINT = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
"""Variable with the URL that takes spans; it goes first."""
PROTOCOL = "OTEL_EXPORTER_OTLP_PROTOCOL"
TRACES_PROTOCOL = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"
DELAY = "OTEL_BSP_SCHEDULE_DELAY"
"""Variable with the milliseconds between two sendings; 1,000 without it."""
PARENT = "TRACEPARENT"
"""Variable with the span, of a workflow say, below which a job belongs (W3C ``traceparent``)."""
_SPOKEN = "http/protobuf"
_CURRENT: ContextVar[Span | None] = ContextVar("span", default=None)


def endpoint() -> str | None:
    """Return the URL that spans are sent to; None where nothing is traced."""
    off = os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    if off or os.environ.get("OTEL_TRACES_EXPORTER") == "none":
        return None
    if own := os.environ.get(TRACES_ENDPOINT):
        return own
    shared = os.environ.get(ENDPOINT)
    return f"{shared.rstrip('/')}/v1/traces" if shared else None


def check() -> None:
    """Check that spans can be sent, where that is asked for.

    Raises:
        ConfigError: OpenTelemetry's exporter is missing, or another protocol is asked for
            (``traces``).
    """
    _tracer()


@functools.cache
def _tracer() -> Tracer | None:
    """Start what sends spans from this process; None where nothing is traced."""
    where = endpoint()
    if where is None:
        return None
    for name in (TRACES_PROTOCOL, PROTOCOL):
        if os.environ.get(name, _SPOKEN) != _SPOKEN:
            raise ConfigError(
                f"{name} is {os.environ[name]}; traces are sent by {_SPOKEN}.",
                hint=f"Name the collector's port for HTTP (4318), and leave {name} out.",
                code="traces",
            )
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(
            f"Traces need OpenTelemetry, which cannot be imported here: {error}.",
            hint=f"Install it: pip install 'pathflip[traces]', or unset {ENDPOINT}.",
            code="traces",
        ) from error
    if "service.name=" not in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", ""):
        os.environ.setdefault("OTEL_SERVICE_NAME", "pathflip")
    provider = TracerProvider(resource=Resource.create())
    # OpenTelemetry's own 5 s are more than a replica has between its last answer and its end.
    delay = None if DELAY in os.environ else 1000.0
    exporter = OTLPSpanExporter(endpoint=where)
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=delay))
    return provider.get_tracer("pathflip")


@contextmanager
def span(
    name: str, *, traceparent: str | None = None, begins: bool = False, **attributes: str | int
) -> Iterator[Span | None]:
    """Trace a block as a part of what is traced around it.

    Args:
        name: Name of the span; like the attributes the same for all slides and clients.
        traceparent: The span it is a part of, where that is of another process (W3C).
        begins: Whether the block begins a trace where nothing around it is traced.
        attributes: Counts and kinds; each is sent as ``pathflip.<name>``.

    Yields:
        The span; None where nothing is traced.
    """
    made = _begin(name, traceparent, begins, attributes)
    if made is None:
        yield None
        return
    token = _CURRENT.set(made)
    try:
        yield made
    except Exception as error:
        fail(made, kind_of(error))
        raise
    finally:
        _CURRENT.reset(token)
        made.end()


def stream(
    name: str, items: AsyncGenerator[T, None], *, traceparent: str | None = None
) -> AsyncGenerator[T, None]:
    """Trace an asynchronous generator from its first item to its end; close it as any other.

    Args:
        name: Name of the span.
        items: The generator; it sees the span as the one around it.
        traceparent: W3C trace context of the caller, see :func:`span`.
    """
    return items if _tracer() is None else _stream(name, items, traceparent)


async def _stream(
    name: str, items: AsyncGenerator[T, None], traceparent: str | None
) -> AsyncGenerator[T, None]:
    made = _begin(name, traceparent, False, {})
    try:
        async with aclosing(items):
            while True:
                # Between two items whoever asks for them goes on, perhaps in another task.
                token = _CURRENT.set(made)
                try:
                    item = await anext(items)
                except StopAsyncIteration:
                    return
                finally:
                    _CURRENT.reset(token)
                yield item
    except Exception as error:
        if made is not None:
            fail(made, kind_of(error))
        raise
    finally:
        if made is not None:
            made.end()


def _begin(
    name: str, traceparent: str | None, begins: bool, attributes: dict[str, str | int]
) -> Span | None:
    tracer, parent = _tracer(), _CURRENT.get()
    if tracer is None or (parent is None and traceparent is None and not begins):
        return None
    from opentelemetry.context import Context
    from opentelemetry.trace import SpanKind, set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    context = Context()
    if traceparent is not None:
        carrier = {"traceparent": traceparent}
        context = TraceContextTextMapPropagator().extract(carrier, context)
    elif parent is not None:
        context = set_span_in_context(parent, context)
    return tracer.start_span(
        name,
        context=context,
        kind=SpanKind.SERVER if parent is None else SpanKind.INTERNAL,
        attributes={f"pathflip.{key}": value for key, value in attributes.items()},
    )


def kind_of(error: Exception) -> str:
    """Return the code of an error, or its class: its message may be about a slide."""
    return error.code if isinstance(error, PathFLIPError) else type(error).__name__


def fail(of: Span, kind: str) -> None:
    """Note the kind of error that a span ended with."""
    from opentelemetry.trace import StatusCode

    of.set_attribute("error.type", kind)
    of.set_status(StatusCode.ERROR)


def traceparent() -> str | None:
    """Return the present span for another process (W3C ``traceparent``); None for none."""
    current = _CURRENT.get()
    if current is None:
        return None
    from opentelemetry.trace import set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier, set_span_in_context(current))
    return carrier.get("traceparent")


def trace_id() -> str | None:
    """Return the id of the present trace, 32 hexadecimal digits; None for none."""
    current = _CURRENT.get()
    return None if current is None else f"{current.get_span_context().trace_id:032x}"


def job(function: Callable[P, T]) -> Callable[P, T]:
    """Let a function be traced as a job of its name."""

    @functools.wraps(function)
    def traced_job(*args: P.args, **kwargs: P.kwargs) -> T:
        given = None if _CURRENT.get() else os.environ.get(PARENT)
        with span(f"job {function.__name__}", traceparent=given, begins=True):
            return function(*args, **kwargs)

    return traced_job


def traced(part: type[T], *, name: str) -> type[T]:
    """Make of a class one whose public asynchronous methods are traced.

    Each takes ``traceparent`` beside its arguments: the span of the process that calls it.

    Args:
        part: The class.
        name: First part of the names of its spans; the method is the second.
    """
    methods: dict[str, Any] = {}
    for method, function in inspect.getmembers(part, inspect.isfunction):
        if method.startswith("_"):
            continue
        if inspect.isasyncgenfunction(function):
            methods[method] = _traced_stream(f"{name}.{method}", function)
        elif inspect.iscoroutinefunction(function):
            methods[method] = _traced_call(f"{name}.{method}", function)
    return type(part.__name__, (part,), methods | {"__doc__": part.__doc__})


def _traced_call(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    async def call(*args: Any, traceparent: str | None = None, **kwargs: Any) -> Any:
        with span(name, traceparent=traceparent):
            return await function(*args, **kwargs)

    return call


def _traced_stream(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    async def call(*args: Any, traceparent: str | None = None, **kwargs: Any) -> Any:
        made = stream(name, function(*args, **kwargs), traceparent=traceparent)
        async with aclosing(made):
            async for item in made:
                yield item

    return call
