"""Benchmark of the service against the engine inside it: ``python -m tests.bench.serve --json``.

A random Qwen3 of 3 M parameters (``throughput``: 26 M) over a small archive, all on this machine,
with the client. Both sides of a ratio run on the same prompts in one run, taking turns. Parts:

* ``throughput``: tokens a second at concurrency 16, through the service and from ``vllm.LLM``;
* ``first_token``: time to the first token at concurrency 1, of the service and of the engine;
* ``search``: ``/v1/search`` over a million regions, alone and 32 at once, beside LanceDB's query;
* ``during_ingest``: ``/v1/search`` while slides are committed to the archive, beside a calm minute;
* ``grounding``: ``/v1/classify`` and ``/v1/ground``, alone and 64 at once;
* ``tiles``: tiles a CPU-second beside other libraries', and 64 viewers that pan;
* ``overload``: ten times as many clients as answers at once: statuses, memory, what comes after;
* ``scale``: one replica to two under load, one of two killed, a new version under open streams;
* ``startup``: what a start of the engine costs as vLLM does it and as it is done here.

docs/notes/performance.md says what was measured.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from serve import proxy
from tests.bench.ingest import rounded, say
from tests.bench.serve_grounding import grounding
from tests.bench.serve_search import during_ingest, search
from tests.bench.serve_tiles import tiles
from tests.faults import command_line, descendants, resident_bytes
from tests.serving import Service, Tuned, cpu_s, make_tuned, start_service

Report = dict[str, Any]

CONCURRENCY, TOKENS, REQUESTS = 16, 64, 96
ENGINE = {"max_num_seqs": CONCURRENCY}
QUESTIONS = tuple(f"What is seen in field {n}?" for n in range(REQUESTS))


# -- the plain sides, each in a process of its own ------------------------------------------------


def prompts_of(tuned: Tuned) -> list[Any]:
    """The prompts the service makes of the questions, slide by slide in turn."""
    from pathflip.vllm_engine import EngineConfig, uses_gpu
    from serve.chat_engine import PromptReader
    from serve.config import find_model

    device = "cuda" if uses_gpu(EngineConfig()) else "cpu"
    reader = PromptReader(str(tuned.archive), *find_model(tuned.run), device, 1 << 28)
    return [
        reader.prompt({"slide_id": slide_of(n), "messages": [{"role": "user", "content": text}]})
        for n, text in enumerate(QUESTIONS)
    ]


def slide_of(number: int) -> str:
    """Slides take turns."""
    return f"slide{number % 8:03d}"


def offline(tuned: Tuned, rounds: int) -> Report:
    """Return the throughput of ``vllm.LLM`` over all prompts at once, tokens/s."""
    from pathflip import vllm_engine

    prompts = [{"prompt_embeds": prompt} for prompt in prompts_of(tuned)]
    llm = vllm_engine.offline(tuned.run / "llm", vllm_engine.EngineConfig(**ENGINE))
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    llm.generate(prompts[:CONCURRENCY], params, use_tqdm=False)
    rates = []
    for _ in range(rounds):
        began = time.perf_counter()
        made = llm.generate(prompts, params, use_tqdm=False)
        tokens = sum(len(one.outputs[0].token_ids) for one in made)
        rates.append(tokens / (time.perf_counter() - began))
    return {"tokens_per_s": rates}


def alone(tuned: Tuned, rounds: int) -> Report:
    """Milliseconds to the first token of the engine itself, one request at a time."""
    from pathflip import vllm_engine
    from serve.engine import start_vllm

    config = vllm_engine.EngineConfig(**ENGINE)
    vllm_engine.set_environment(config)
    prompts = prompts_of(tuned)
    held = start_vllm(vllm_engine.engine_arguments(tuned.run / "llm", config))
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=0, max_tokens=8, ignore_eos=True, output_kind=RequestOutputKind.DELTA
    )

    async def run() -> list[float]:
        found = []
        for number, prompt in enumerate((prompts * rounds)[: 20 * rounds]):
            began, first = time.perf_counter(), None
            async for _ in held.generate({"prompt_embeds": prompt}, params, str(number)):
                first = first or time.perf_counter() - began
            found.append(1e3 * (first or 0.0))
        return found[3:]

    try:
        return {"first_ms": asyncio.run(run())}
    finally:
        held.shutdown()


def start(tuned: Tuned, way: str) -> Report:
    """Seconds until an engine is there, as vLLM does it by itself or as it is done here."""
    from pathflip import vllm_engine
    from serve.engine import start_vllm

    config = vllm_engine.EngineConfig(**ENGINE)
    began = time.perf_counter()
    vllm_engine.set_environment(config)
    arguments = vllm_engine.engine_arguments(tuned.run / "llm", config)
    if way == "plain":
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
        arguments.pop("num_gpu_blocks_override", None)
    held = start_vllm(arguments)
    seconds = time.perf_counter() - began
    every = [os.getpid(), *descendants(os.getpid())]
    memory, cpu = resident_bytes(every) / 2**20, sum(map(cpu_s, every))
    held.shutdown()
    return {"seconds": seconds, "cpu_s": cpu, "rss_mb": memory, "processes": len(every)}


def aside(side: str, tuned: Tuned, *more: str) -> Report:
    """One plain side in a process of its own."""
    command = [sys.executable, "-m", "tests.bench.serve", "--side", side, *more]
    command += ["--folder", str(tuned.run.parent)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: Report = json.loads(done.stdout.splitlines()[-1])
    return found


# -- the service ----------------------------------------------------------------------------------


@contextmanager
def served(tuned: Tuned, **settings: Any) -> Iterator[Service]:
    """The service on a Ray of its own."""
    import ray
    from ray import serve

    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False,
        logging_level="ERROR", configure_logging=False, object_store_memory=80 << 20,
    )  # fmt: skip
    try:
        began = time.perf_counter()
        found = start_service(tuned, **{"engine": {"engine": ENGINE}} | settings)
        say(f"the service is up after {time.perf_counter() - began:.1f} s")
        yield found
    finally:
        serve.shutdown()
        ray.shutdown()


def connect(service: Service) -> httpx.AsyncClient:
    """A client without a limit of its own."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(base_url=service.url, timeout=300, limits=limits, verify=False)


async def ask(
    client: httpx.AsyncClient, service: Service, number: int, *, tokens: int, stream: bool
) -> Report:
    """One chat: status, seconds to the first words and to the end, whether it came whole."""
    body = service.body(
        QUESTIONS[number % REQUESTS], slide_id=slide_of(number), max_tokens=tokens, stream=stream
    )
    began, first, last, retry = time.perf_counter(), None, "", None
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            retry = answer.headers.get("retry-after")
            async for line in answer.aiter_lines():
                if '"content": "' in line and '"content": ""' not in line:
                    first = first or time.perf_counter() - began
                last = line or last
    except httpx.HTTPError as error:
        return {"status": 0, "whole": False, "error": repr(error), "first": None, "seconds": 0.0}
    return {
        "status": answer.status_code,
        "retry": retry,
        "first": first,
        "seconds": time.perf_counter() - began,
        "whole": answer.status_code == 200 and (not stream or last == "data: [DONE]"),
    }


async def many(
    service: Service, requests: int, concurrency: int, *, tokens: int, stream: bool
) -> tuple[float, list[Report]]:
    """Seconds for so many chats, ``concurrency`` at once."""
    numbers, found = iter(range(requests)), []
    async with connect(service) as client:

        async def worker() -> None:
            for number in numbers:
                found.append(await ask(client, service, number, tokens=tokens, stream=stream))

        began = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(concurrency)))
        return time.perf_counter() - began, found


def throughput(tuned: Tuned, rounds: int) -> Report:
    """The service beside the engine offline, by 16 clients and by 32.

    Offline all prompts wait for the engine. With as many clients as it decodes at once none does:
    answers of equal length end together, and the engine idles until the next questions are there.
    With twice as many, as the service lets in by default, the next ones wait at the engine.
    """
    before = aside("offline", tuned)["tokens_per_s"]
    ways = {
        "whole": (CONCURRENCY, False),
        "streaming": (CONCURRENCY, True),
        "whole_queued": (2 * CONCURRENCY, False),
        "streaming_queued": (2 * CONCURRENCY, True),
    }
    rates: dict[str, list[float]] = {way: [] for way in ways}
    alone = {"limits.concurrent": 2 * CONCURRENCY, "instructor.max_replicas": 1}
    with served(tuned, **alone) as service:
        asyncio.run(many(service, CONCURRENCY, CONCURRENCY, tokens=TOKENS, stream=False))
        for _ in range(rounds):
            for way, (clients, stream) in ways.items():
                seconds, found = asyncio.run(
                    many(service, REQUESTS, clients, tokens=TOKENS, stream=stream)
                )
                assert all(one["whole"] for one in found)
                rates[way].append(REQUESTS * TOKENS / seconds)
    plain = [*before, *aside("offline", tuned)["tokens_per_s"]]
    best = statistics.median(plain)
    return {
        "over_offline": {way: statistics.median(found) / best for way, found in rates.items()},
        "tokens_per_s": {"offline": plain, **rates},
    }


def first_token(tuned: Tuned, rounds: int) -> Report:
    """The service beside the engine alone."""
    before = aside("alone", tuned)["first_ms"]
    with served(tuned) as service:
        _, found = asyncio.run(many(service, 20 * rounds + 3, 1, tokens=8, stream=True))
    plain = [*before, *aside("alone", tuned)["first_ms"]]
    ours = [1e3 * one["first"] for one in found[3:]]
    middle = statistics.median
    return {
        "added_ms": middle(ours) - middle(plain),
        "p50_ms": {"service": middle(ours), "engine": middle(plain)},
        "p90_ms": {name: statistics.quantiles(values, n=10)[-1]
                   for name, values in (("service", ours), ("engine", plain))},
    }  # fmt: skip


def overload(tuned: Tuned, seconds: float) -> Report:
    """Ten clients for every answer the service takes in; who is refused comes back when told.

    One replica of everything: what overload does, not what growing costs (:func:`scale`). Two
    answers are taken in for each the engine writes at once, as the defaults have it.
    """
    counts: Counter[int] = Counter()
    took: list[float] = []
    unasked = 0
    taken = 2 * CONCURRENCY
    settings: dict[str, Any] = {f"{part}.max_replicas": 1 for part in PARTS}
    settings |= {"limits.concurrent": taken, "instructor.max_queued": taken}
    with served(tuned, **settings) as service:
        _, calm = asyncio.run(many(service, 48, CONCURRENCY, tokens=TOKENS, stream=False))
        memory = [rss_mb()]
        over = threading.Event()

        def weigh() -> None:
            while not over.wait(2):
                memory.append(rss_mb())

        async def press() -> None:
            nonlocal unasked
            end = time.perf_counter() + seconds

            async def worker(number: int) -> None:
                nonlocal unasked
                # Each its own: a pool of httpx looks at every connection for every request.
                async with connect(service) as client:
                    while time.perf_counter() < end:
                        one = await ask(client, service, number, tokens=TOKENS, stream=False)
                        counts[one["status"]] += 1
                        if one["status"] == 200:
                            took.append(one["seconds"])
                        else:
                            unasked += one.get("retry") is None
                            await asyncio.sleep(float(one.get("retry") or 1))

            await asyncio.gather(*(worker(n) for n in range(10 * taken)))

        thread = threading.Thread(target=weigh)
        thread.start()
        asyncio.run(press())
        over.set()
        thread.join()
        normal_s, after = asyncio.run(many(service, 48, CONCURRENCY, tokens=TOKENS, stream=False))
    usual = [one["seconds"] for one in calm]
    return {
        "clients": 10 * taken,
        "seconds": seconds,
        "status": {str(status): count for status, count in sorted(counts.items())},
        "without_retry_after": unasked,
        "p99_over_calm": percentile(took, 99) / percentile(usual, 99),
        "p99_s": {"calm": percentile(usual, 99), "overload": percentile(took, 99)},
        "after": {"seconds": normal_s, "failed": failed(after),
                  "p99_s": percentile([one["seconds"] for one in after], 99)},
        "rss_mb": {"before": memory[0], "most": max(memory), "end": memory[-1]},
    }  # fmt: skip


def scale(tuned: Tuned) -> Report:
    """One to two replicas under load, a death of one of two, a new version under open streams."""
    from ray import serve

    from serve.app import NAME, build

    settings = {
        "instructor.max_replicas": 2, "instructor.target": 4, "instructor.upscale_s": 1,
        "instructor.downscale_s": 600, "limits.concurrent": 128, "instructor.max_queued": 128,
        "drain_s": 300,
    }  # fmt: skip
    found: list[Report] = []

    def replicas() -> int:
        deployment = serve.status().applications[NAME].deployments["instructor"]
        return int(deployment.replica_states.get("RUNNING", 0))

    async def load(service: Service, until: Callable[[], bool], pause: float) -> float:
        began, tasks = time.perf_counter(), set()
        async with connect(service) as client:
            number = 0
            while not await asyncio.to_thread(until):
                while len(tasks) < CONCURRENCY:
                    number += 1
                    one = ask(client, service, number, tokens=TOKENS, stream=True)
                    tasks.add(asyncio.create_task(one))
                    await asyncio.sleep(pause)
                done, tasks = await asyncio.wait(tasks, return_when="FIRST_COMPLETED")
                found.extend(task.result() for task in done)
            seconds = time.perf_counter() - began
            found.extend(await asyncio.gather(*tasks))
        return seconds

    report: Report = {}
    with served(tuned, **settings) as service:
        seconds = asyncio.run(load(service, lambda: replicas() == 2, 0))
        report["up"] = {"seconds": seconds, "requests": len(found), "failed": failed(found)}
        say(f"scale up: {report['up']}")
        found.clear()
        victim = pids("ServeReplica:pathflip:instructor")[0]
        died = threading.Timer(2, os.kill, (victim, signal.SIGABRT))
        died.start()
        seen: set[int] = set()

        def back() -> bool:
            now = replicas()
            seen.add(now)
            return not died.is_alive() and seen == {1, 2} and now == 2

        seconds = asyncio.run(load(service, back, 0.1))
        report["death"] = {"seconds": seconds, "requests": len(found), "failed": failed(found)}
        say(f"one of two dies: {report['death']}")
        found.clear()

        async def streams() -> list[Report]:
            async with connect(service) as client:
                tasks = [
                    asyncio.create_task(ask(client, service, n, tokens=512, stream=True))
                    for n in range(20)
                ]
                await asyncio.sleep(1)
                args = {f"{part}.cpus": 0 for part in PARTS} | settings
                args |= {"archive": str(tuned.archive), "run": str(tuned.run),
                         "engine": {"engine": ENGINE, "prefix_cache_mb": 255}}  # fmt: skip
                await asyncio.to_thread(serve.run, build(args), name=NAME)
                return await asyncio.gather(*tasks)

        drained = asyncio.run(streams())
        report["redeploy"] = {"streams": 20, "failed": failed(drained)}
    return report


PARTS = ("ingress", "embedder", "search", "grounding", "annotations", "instructor")


def startup(tuned: Tuned, rounds: int) -> Report:
    """An engine's start as vLLM does it, and as it is done here."""
    found: dict[str, list[Report]] = {"plain": [], "ours": []}
    for _ in range(rounds):
        for way, runs in found.items():
            runs.append(aside("start", tuned, "--way", way))
            say(f"{way}: {runs[-1]}")
    keys = ("seconds", "cpu_s", "rss_mb", "processes")
    return {
        way: {key: statistics.median(run[key] for run in runs) for key in keys}
        for way, runs in found.items()
    }


def failed(found: list[Report]) -> int:
    """Answers that did not come whole."""
    return sum(not one["whole"] for one in found)


def percentile(values: list[float], share: int) -> float:
    """Return the largest of few values."""
    return sorted(values)[min(len(values) - 1, len(values) * share // 100)] if values else 0.0


def pids(words: str) -> list[int]:
    """This run's processes whose command line holds the words."""
    return [pid for pid in descendants(os.getpid()) if words in command_line(pid)]


def rss_mb() -> float:
    """Memory of the service's replicas and engines."""
    return resident_bytes([*pids("ServeReplica"), *pids("EngineCore")]) / 2**20


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parts = (
        "throughput", "first_token", "search", "during_ingest", "grounding", "tiles", "overload",
        "scale", "startup",
    )  # fmt: skip
    parser.add_argument("--only", action="append", choices=parts, default=[])
    parser.add_argument("--rows", type=int, default=1_000_000, help="regions that are searched")
    parser.add_argument("--quick", action="store_true", help="once, a smaller model, 10 s of load")
    parser.add_argument("--json", action="store_true", help="accepted for symmetry; always JSON")
    parser.add_argument("--side", choices=("offline", "alone", "start"), help=argparse.SUPPRESS)
    parser.add_argument("--way", default="ours", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    rounds = 1 if args.quick else 3
    if args.side:
        folder = Path(args.folder)
        tuned = Tuned(archive=folder / "archive", run=folder / "run", base=folder / "base")
        sides = {"offline": lambda: offline(tuned, 3), "alone": lambda: alone(tuned, 3),
                 "start": lambda: start(tuned, args.way)}  # fmt: skip
        print(json.dumps(sides[args.side]()), flush=True)
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    report: Report = {"load_average": os.getloadavg()[0], "cpus": os.cpu_count()}
    with (
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryDirectory(prefix="pathflip-", ignore_cleanup_errors=True) as short,
    ):
        os.environ.update(proxy.environment(short))
        size = {"width": 64, "layers": 2} if args.quick else {"width": 256, "layers": 6}
        tuned = make_tuned(Path(folder) / "tuned", **size)

        def larger() -> Tuned:
            if args.quick:
                return tuned
            return make_tuned(Path(folder) / "larger", width=512, layers=12)

        todo: dict[str, Callable[[], Report]] = {
            "startup": lambda: startup(tuned, rounds),
            "throughput": lambda: throughput(larger(), rounds),
            "first_token": lambda: first_token(tuned, rounds),
            "search": lambda: search(Path(folder) / "search", args.rows, 3 if args.quick else 15),
            "during_ingest": lambda: during_ingest(
                Path(folder) / "during", 60_000 if args.quick else 200_000, 8 if args.quick else 30
            ),
            "grounding": lambda: grounding(Path(folder) / "grounding", 3 if args.quick else 20),
            "tiles": lambda: tiles(Path(folder) / "tiles", quick=args.quick),
            "overload": lambda: overload(tuned, 10 if args.quick else 60),
            "scale": lambda: scale(tuned),
        }
        for name, part in todo.items():
            if not args.only or name in args.only:
                before = os.getloadavg()[0]
                report[name] = {"load_average": before} | part()
                say(f"{name}: {json.dumps(rounded(report[name]))}")
    print(json.dumps(rounded(report), indent=1))


if __name__ == "__main__":
    main()
