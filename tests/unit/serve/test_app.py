"""Deployments of the service, and the client that reaches them: without a running Ray."""

import asyncio

import pytest
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.schema import DeploymentStatusOverview

from pathflip.errors import ArchiveError
from serve import app
from serve.app import NAME, DeploymentClient, Failures, build
from serve.config import DEPLOYMENTS
from serve.limits import RequestError

NOT_FOUND = ArchiveError("There is no such slide.", code="unknown_slide")


def task_error(cause):
    """Wrap an error as Ray does that of a replica."""
    return RayTaskError("slide", "a trace", cause).as_instanceof_cause()


class Handle:
    """A deployment's handle: each call raises the next error, or answers.

    Attributes:
        calls: Arguments of the calls.
        cancelled: Streams that were left or ended.
    """

    def __init__(self, *errors):
        self.errors, self.calls, self.cancelled = list(errors), [], 0
        self.deployment_name, self.gate = "grounding", None

    def options(self, *, stream):
        assert stream
        return self

    def __getattr__(self, method):
        if method not in ("slide", "chat"):
            raise AttributeError(method)
        handle = self

        class Method:
            def remote(self, *args):
                handle.calls.append(args)
                return Stream(handle) if method == "chat" else Call(handle)

        return Method()

    async def answer(self):
        if self.gate is not None:
            await self.gate.wait()
        if self.errors:
            raise self.errors.pop(0)
        return "answer"


class Call:
    def __init__(self, handle):
        self.handle = handle

    def __await__(self):
        return self.handle.answer().__await__()

    def cancel(self):
        pass


class Stream:
    def __init__(self, handle):
        self.handle = handle

    async def __aiter__(self):
        if self.handle.gate is None:
            yield "first"
        yield await self.handle.answer()

    def cancel(self):
        self.handle.cancelled += 1


def died():
    return RayActorError()


def unavailable():
    return DeploymentUnavailableError(None)


@pytest.mark.parametrize(
    ("error", "code", "calls"),
    [
        (lambda: task_error(NOT_FOUND), "unknown_slide", 1),
        (lambda: NOT_FOUND, "unknown_slide", 1),
        (lambda: BackPressureError(num_queued_requests=1, max_queued_requests=1), "busy", 1),
        (died, "unavailable", 2),
        (unavailable, "unavailable", 2),
    ],
)
def test_errors_of_a_call_are_ours(error, code, calls):
    handle = Handle(error(), error())
    client = DeploymentClient(handle)
    with pytest.raises((ArchiveError, RequestError)) as caught:
        asyncio.run(client.slide("a"))
    assert caught.value.code == code
    assert handle.calls == [("a",)] * calls


def test_a_call_whose_replica_died_is_made_again_once():
    handle = Handle(died())
    assert asyncio.run(DeploymentClient(handle).slide("a")) == "answer"
    assert handle.calls == [("a",), ("a",)]
    handle = Handle(died())
    with pytest.raises(RequestError):
        asyncio.run(DeploymentClient(handle, retried=False).slide("a"))
    assert len(handle.calls) == 1


def status(state, replicas):
    return DeploymentStatusOverview(
        status=state, status_trigger="UNSPECIFIED", replica_states=replicas, message=""
    )


@pytest.mark.parametrize(
    ("state", "replicas", "failed"),
    [
        ("UNHEALTHY", {"STARTING": 1}, True),
        ("UNHEALTHY", {"RUNNING": 0}, True),
        ("DEPLOY_FAILED", {}, True),
        ("UNHEALTHY", {"STARTING": 1, "RUNNING": 1}, False),  # another answers
        ("UNHEALTHY", {"STOPPING": 1}, False),  # what it was asked it still answers
        ("UPSCALING", {"STARTING": 1}, False),  # from none, as it was told
        ("HEALTHY", {}, False),
    ],
)
def test_a_call_waits_for_a_replica_unless_its_deployment_has_failed(
    state, replicas, failed, monkeypatch
):
    monkeypatch.setattr(app, "ASK_S", 0.05)
    known = {"grounding": status(state, replicas)}
    handle = Handle()
    gate = handle.gate = asyncio.Event()
    client = DeploymentClient(handle, streams=("chat",), failures=Failures(lambda: known))

    async def main():
        call = asyncio.create_task(client.slide("a"))
        stream = asyncio.create_task(anext(client.chat({})))
        done, _ = await asyncio.wait((call, stream), timeout=1)
        assert bool(done) == failed
        if failed:
            for refused in (call, stream):
                with pytest.raises(RequestError) as caught:
                    await refused
                assert caught.value.code == "unavailable"
            asked = len(handle.calls)
            with pytest.raises(RequestError):
                await client.slide("b")
            assert len(handle.calls) == asked, "what is known to be down was asked"
            known["grounding"] = status("HEALTHY", {"RUNNING": 1})
            await asyncio.sleep(0.1)
        gate.set()
        if not failed:
            assert await asyncio.gather(call, stream) == ["answer", "answer"]
        assert await client.slide("c") == "answer"

    asyncio.run(main())


def test_where_the_controller_does_not_answer_calls_wait(monkeypatch):
    monkeypatch.setattr(app, "ASK_S", 0.05)
    handle = Handle()
    gate = handle.gate = asyncio.Event()

    def dead():
        raise died()

    client = DeploymentClient(handle, failures=Failures(dead))

    async def main():
        call = asyncio.create_task(client.slide("a"))
        assert not (await asyncio.wait((call,), timeout=0.5))[0]
        gate.set()
        assert await call == "answer"

    asyncio.run(main())


def test_other_errors_are_not_dressed_up():
    with pytest.raises(ZeroDivisionError):
        asyncio.run(DeploymentClient(Handle(task_error(ZeroDivisionError()))).slide("a"))


@pytest.mark.parametrize("error", [None, died])
def test_a_stream_is_cancelled_whatever_ends_it(error):
    handle = Handle(*([error()] if error else []))
    client = DeploymentClient(handle, streams=("chat",), retried=False)

    async def main():
        return [item async for item in client.chat({})]

    if error is None:
        assert asyncio.run(main()) == ["first", "answer"]
    else:
        with pytest.raises(RequestError) as caught:
            asyncio.run(main())
        assert caught.value.code == "unavailable"
    assert handle.cancelled == 1
    assert len(handle.calls) == 1, "half an answer is not begun again"


def test_a_stream_that_is_left_is_cancelled():
    handle = Handle()

    async def main():
        stream = DeploymentClient(handle, streams=("chat",)).chat({})
        await anext(stream)
        await stream.aclose()

    asyncio.run(main())
    assert handle.cancelled == 1


def test_what_is_built(tuned, world):
    """Every part is a deployment of its own; a run without a language model has no instructor."""
    assert NAME == "pathflip"
    for archive, run, names in (
        (tuned.archive, tuned.run, DEPLOYMENTS),
        (world.archive, world.run, DEPLOYMENTS[:-1]),
    ):
        args = {"archive": str(archive), "run": str(run), "search.max_ongoing": 3}
        ingress = build(args)._bound_deployment
        parts = ingress.init_args[0]
        found = {name: part._bound_deployment for name, part in parts.items()}
        assert {ingress.name, *found} == set(names)
        assert {one.name for one in found.values()} == set(names[1:])
        assert found["search"].max_ongoing_requests == 3
        assert ingress.init_kwargs["redactions"][str(run)] == "the run"
