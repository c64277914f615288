"""An hour of everything at once on one archive: ``python -m tests.bench.soak --minutes 60 --json``.

One process ingests new slides, indexes them and maintains the archive, again and again, on a Ray of
its own; ``pathflip serve`` answers searches and chats meanwhile. Every few seconds memory, open
files and threads of every process are noted, what lies on disk, and what requests took. At the end
the archive is verified, and a line is fitted to each of these: flat means that its slope's 95 %
interval holds zero.

All is small, so that it lives beside other work on two cores. Three settings are not those of a
user, so that an hour shows what otherwise takes weeks: ``maintain`` removes versions after minutes,
not a day; a vector index is made from a few hundred rows on; the service looks for commits every
5 s. docs/notes/performance.md has the result.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from tests.bench.ingest import say
from tests.faults import ROOT, command_line, descendants
from tests.serving import free_port, make_base, make_run

Report = dict[str, Any]

START_SLIDES, START_PX, NEW_PX = 16, 2048, 1024
TILING = ("tiling.region_um=256", "tiling.patch_um=128", "chunk_regions=8", "actors=1")
INDEX_ROWS = 250
KEEP_MINUTES = 5.0
SAMPLE_S, WEIGH_EVERY = 5.0, 3
TEXTS = ("necrosis", "mucin beside glands", "fibrosis", "dense lymphocytes", "colon", "fat")
PERIODS = {"ingest": 45.0, "index": 50.0, "maintain": 60.0}
"""Seconds from the beginning of a round to that of the next."""


# -- the process that writes ----------------------------------------------------------------------


def write(folder: Path) -> None:
    """Ingest the first slides; told to go on, ingest, index and maintain until told to stop.

    Prints a line of JSON for each round.
    """
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    from jobs.index import index
    from jobs.ingest import IngestConfig, ingest
    from pathflip.archive import compaction, indexes, maintain
    from pathflip.config import load_config
    from pathflip.errors import ArchiveError
    from pathflip.synth import make_slide

    indexes.VECTOR_INDEX_ROWS = indexes.SCALAR_INDEX_ROWS = INDEX_ROWS
    compaction.KEEP_HOURS = KEEP_MINUTES / 60  # type: ignore[assignment]
    archive, slides, printing = str(folder / "archive"), folder / "slides", threading.Lock()
    slides.mkdir()
    config = load_config(IngestConfig, overrides=TILING)
    over = threading.Event()
    made = iter(range(10**6))

    def tell(**event: Any) -> None:
        with printing:
            print(json.dumps(event), flush=True)

    def new(side: int) -> str:
        number = next(made)
        path = slides / f"s{number:04d}.tif"
        make_slide(path, width=side, height=side, mpp=0.5, seed=number)
        return str(path)

    def do_ingest() -> Report:
        return ingest([new(NEW_PX)], archive, config).slides

    def do_index() -> Report:
        done = index(archive, str(folder / "run"))
        return {"slides": done.slides, "indexes": done.indexes}

    def do_maintain() -> Report:
        return maintain.maintain(archive)

    def loop(what: str, do: Callable[[], Report]) -> None:
        while not over.is_set():
            began, waited = time.monotonic(), 0
            while not over.is_set():
                tried = time.monotonic()
                try:
                    done = do()
                except ArchiveError as error:
                    if error.code != "locked":
                        tell(what=what, error=repr(error))
                        break
                    waited += 1
                    over.wait(1)
                    continue
                except Exception as error:
                    tell(what=what, error=repr(error))
                    break
                tell(what=what, seconds=time.monotonic() - tried, waited=waited, done=done)
                break
            over.wait(max(0.0, PERIODS[what] - (time.monotonic() - began)))

    tell(what="first", done=ingest([new(START_PX) for _ in range(START_SLIDES)], archive,
                                   config).slides)  # fmt: skip
    sys.stdin.readline()
    tell(what="index", done=do_index())
    sys.stdin.readline()
    threads = [
        threading.Thread(target=loop, args=pair)
        for pair in (("ingest", do_ingest), ("index", do_index), ("maintain", do_maintain))
    ]
    for thread in threads:
        thread.start()
    sys.stdin.readline()
    over.set()
    for thread in threads:
        thread.join()
    for what, do in (("index", do_index), ("maintain", do_maintain)):
        tell(what=what, done=do())


@contextmanager
def child(arguments: list[str], temporary: Path, log: Path) -> Iterator[subprocess.Popen[str]]:
    """A process with Ray's files in a folder of its own; its descendants end with it."""
    temporary.mkdir()
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments], cwd=ROOT, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=errors, text=True, bufsize=1,
            env=os.environ | {"RAY_TMPDIR": str(temporary)},
        )  # fmt: skip
    try:
        yield process
    finally:
        below = descendants(process.pid)
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(90)
        for pid in [process.pid, *below]:
            with suppress(ProcessLookupError):
                os.kill(pid, 9)


def read_line(process: subprocess.Popen[str], log: Path) -> Report:
    """Return the next line that a process prints."""
    line = process.stdout.readline() if process.stdout else ""
    if not line:
        raise RuntimeError(f"a process ended: {log.read_text()[-2000:]}")
    found: Report = json.loads(line)
    return found


def tell(process: subprocess.Popen[str]) -> None:
    """Tell a process to go on."""
    assert process.stdin is not None
    process.stdin.write("\n")


# -- the clients ----------------------------------------------------------------------------------


class Clients:
    """Asks the service for searches and chats until told to stop.

    Attributes:
        took: (time, kind, ms) of answers that came whole.
        failed: Answers that were refused or wrong, counted.
        asked: Requests sent.
    """

    def __init__(self, url: str) -> None:
        self._url, self._over, self._start = url, asyncio.Event(), time.monotonic()
        self.took: list[tuple[float, str, float]] = []
        self.failed: Counter[str] = Counter()
        self.asked = 0
        self.slides: list[str] = []

    async def run(self) -> None:
        """Ask until :meth:`stop`."""

        async def count(_: httpx.Request) -> None:
            self.asked += 1

        async with httpx.AsyncClient(
            base_url=self._url, timeout=60, event_hooks={"request": [count]}
        ) as client:
            listed = (await client.get("/v1/models")).json()["data"]
            model = next(entry["id"] for entry in listed if entry["capability"] == "chat")
            await self._list(client)
            await asyncio.gather(
                self._again("slides", 20, lambda n: self._list(client)),
                self._again("search", 1, lambda n: self._search(client, n)),
                self._again("search by slide", 3, lambda n: self._like(client, n)),
                self._again("chat", 4, lambda n: self._chat(client, model, n, stream=False)),
                self._again("chat stream", 4, lambda n: self._chat(client, model, n, stream=True)),
            )

    def stop(self) -> None:
        """End all asking."""
        self._over.set()

    async def _again(self, kind: str, pause: float, ask: Callable[[int], Any]) -> None:
        number = 0
        while not self._over.is_set():
            began = time.monotonic()
            try:
                problem = await ask(number)
            except (httpx.HTTPError, ValueError, KeyError) as error:
                problem = repr(error)
            if problem:
                self.failed[f"{kind}: {problem}"] += 1
            else:
                now = time.monotonic()
                self.took.append((now - self._start, kind, 1e3 * (now - began)))
            number += 1
            with suppress(TimeoutError):
                await asyncio.wait_for(self._over.wait(), pause)

    async def _list(self, client: httpx.AsyncClient) -> str:
        found: list[str] = []
        after = ""
        while True:
            answer = await client.get("/v1/slides", params={"after": after, "limit": 100})
            if answer.status_code != 200:
                return str(answer.status_code)
            page = answer.json()
            found += [row["slide_id"] for row in page["data"]]
            after = page.get("next")
            if not after:
                break
        if set(self.slides) - set(found):
            return "a slide is gone"
        self.slides = found
        return ""

    def _slide(self, number: int) -> str:
        """Every third request is about the newest slide, the others about all in turn."""
        return self.slides[-1 if number % 3 == 0 else number % len(self.slides)]

    async def _search(self, client: httpx.AsyncClient, number: int) -> str:
        level = "region" if number % 4 else "slide"
        body = {"text": TEXTS[number % len(TEXTS)], "level": level, "k": 10}
        answer = await client.post("/v1/search", json=body)
        return _unless(answer, lambda found: len(found["results"]) == 10)

    async def _like(self, client: httpx.AsyncClient, number: int) -> str:
        body = {"slide_id": self.slides[number % START_SLIDES], "level": "slide", "k": 5}
        answer = await client.post("/v1/search", json=body)
        return _unless(answer, lambda found: len(found["results"]) == 5)

    async def _chat(
        self, client: httpx.AsyncClient, model: str, number: int, *, stream: bool
    ) -> str:
        messages = [{"role": "user", "content": f"Is there {TEXTS[number % len(TEXTS)]}?"}]
        body = {"model": model, "slide_id": self._slide(number), "messages": messages}
        body |= {"max_tokens": 24, "stream": stream}
        if not stream:
            answer = await client.post("/v1/chat/completions", json=body)
            return _unless(answer, lambda found: found["choices"][0]["message"]["content"])
        last = ""
        async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                last = line or last
        return "" if last == "data: [DONE]" else f"{answer.status_code} {last[:200]}"


def _unless(answer: httpx.Response, right: Callable[[Any], Any]) -> str:
    if answer.status_code == 200 and right(answer.json()):
        return ""
    return f"{answer.status_code} {answer.text[:200]}"


# -- what is measured -----------------------------------------------------------------------------


def role(line: str) -> str:
    """Name the part that a process is, by its command line."""
    for part in ("ingress", "embedder", "search", "grounding", "instructor"):
        if f"ServeReplica:pathflip:{part}" in line:
            return part
    for words, name in (
        ("gcs_server", "ray"), ("raylet", "ray"), ("ray/dashboard", "ray"), ("log_monitor", "ray"),
        ("runtime_env", "ray"), ("haproxy", "haproxy"), ("EngineCore", "engine"),
        ("pathflip.slides.reader", "workers"), ("ServeController", "controller"),
        ("HAProxy", "haproxy"), ("ProxyActor", "haproxy"),
    ):  # fmt: skip
        if words in line:
            return name
    return "workers"


def processes(pid: int, *, weigh: bool) -> dict[str, Report]:
    """Sums over each part of a process tree: MB, open files, threads, processes."""
    found: dict[str, Report] = {}
    for one in [pid, *descendants(pid)]:
        try:
            name = "driver" if one == pid else role(command_line(one))
            folder = Path(f"/proc/{one}")
            lines = (folder / "status").read_text().splitlines()
            status = {
                line.split(":")[0]: line.split()[1] for line in lines if len(line.split()) > 1
            }
            add = {
                "rss_mb": int(status.get("VmRSS", 0)) / 1024,
                "threads": int(status["Threads"]),
                "files": len(os.listdir(folder / "fd")),
                "processes": 1,
            }
            if weigh:
                rollup = (folder / "smaps_rollup").read_text()
                add["pss_mb"] = int(rollup.partition("Pss:")[2].split()[0]) / 1024
        except (OSError, IndexError):
            continue  # it has ended
        part = found.setdefault(name, {})
        for key, value in add.items():
            part[key] = part.get(key, 0) + value
    return found


def on_disk(folder: Path) -> tuple[int, float]:
    """(files, MB) below a folder."""
    files, size = 0, 0
    for where, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                size += os.lstat(os.path.join(where, name)).st_size
                files += 1
    return files, size / 2**20


def sample(
    archive: Path, temporary: Path, trees: dict[str, int], *, weigh: bool
) -> dict[str, float]:
    """One look at everything but latency: {name of a series: value}."""
    found: dict[str, float] = {}
    total: Counter[str] = Counter()
    for side, pid in trees.items():
        for name, values in processes(pid, weigh=weigh).items():
            for key, value in values.items():
                found[f"{side} {name} {key}"] = value
                total[f"{side} all {key}"] += value
    found |= total
    found["archive files"], found["archive mb"] = on_disk(archive)
    found["archive versions"] = len(list(archive.glob("*.lance/_versions/*.manifest")))
    found["archive data files"] = len(list(archive.glob("*.lance/data/*")))
    for side in trees:
        found[f"{side} ray session files"], found[f"{side} ray session mb"] = on_disk(
            temporary / side
        )
    return found


def slope(minutes: np.ndarray, values: np.ndarray) -> Report:
    """A line through minute means: slope an hour with its 95 % interval, and whether it is flat.

    Neighbouring minutes are alike, so the residuals count as fewer than they are: by their
    correlation at one minute, corrected for the bias that a fitted line leaves in it
    (tests/unit/test_bench_soak.py has the coverage).
    """
    from scipy import stats

    cells = np.floor(minutes).astype(int)
    at = np.unique(cells)
    y = np.array([values[cells == cell].mean() for cell in at])
    t, count = at / 60.0, len(at)
    x = np.column_stack([np.ones(count), t - t.mean()])
    inverse = np.linalg.inv(x.T @ x)
    beta = inverse @ x.T @ y
    rest = y - x @ beta
    power = float(rest @ rest)
    alike = float(rest[1:] @ rest[:-1]) / power if power > 0 else 0.0
    alike = min(0.95, max(0.0, alike + (1 + 4 * alike) / count))
    error = float(np.sqrt(power / (count - 2) * inverse[1, 1] * (1 + alike) / (1 - alike)))
    free = max(3.0, count * (1 - alike) / (1 + alike) - 2)
    half = float(stats.t.ppf(0.975, free)) * error
    low, high = float(beta[1]) - half, float(beta[1]) + half
    fifth = max(1, count // 5)
    return {
        "mean": float(y.mean()),
        "first": float(y[:fifth].mean()),
        "last": float(y[-fifth:].mean()),
        "per_hour": float(beta[1]),
        "interval": [low, high],
        "is": "flat" if low <= 0 <= high else "grows" if low > 0 else "falls",
    }


def fits(folder: Path, warm_up: float) -> dict[str, Report]:
    """Fit every series that a run noted, without its first minutes."""
    series: dict[str, list[tuple[float, float]]] = {}
    for line in (folder / "samples.jsonl").read_text().splitlines():
        noted = json.loads(line)
        for name, value in noted["values"].items():
            series.setdefault(name, []).append((noted["minute"], value))
    found = {}
    for name, points in sorted(series.items()):
        minutes, values = np.array(points).T
        keep = minutes >= warm_up
        if len(np.unique(np.floor(minutes[keep]))) >= 5:
            found[name] = slope(minutes[keep], values[keep])
    return found


# -- the run --------------------------------------------------------------------------------------


def soak(folder: Path, short: Path, *, minutes: float, warm_up: float, engine: str) -> Report:
    """Run everything for so many minutes; return what was found."""
    from pathflip.archive import Archive
    from pathflip.archive.verify import verify
    from serve.audit import verify as verify_audit

    archive, run = folder / "archive", folder / "run"
    logs = {name: folder / f"{name}.log" for name in ("writer", "service")}
    rounds: dict[str, list[Report]] = {name: [] for name in PERIODS}
    errors: list[Report] = []
    port, load = free_port(), [os.getloadavg()[0]]
    words = ["tests.bench.soak", "--write", "--folder", str(folder)]
    service_words = [
        "pathflip.cli", "serve", "--archive", str(archive), "--run", str(run), "--port", str(port),
        "--json", "-o", f"engine.backend={engine}", "-o", "refresh_s=5",
        "-o", "engine.engine.max_num_seqs=8",
    ]  # fmt: skip
    with child(words, short / "writer", logs["writer"]) as writer:
        first = read_line(writer, logs["writer"])
        say(f"the archive has {first['done']}")
        texts = [f"There is {a} beside {b}." for a in TEXTS for b in TEXTS]
        base = make_base(folder / "base", texts)
        make_run(run, archive, base, encoder="texture")
        tell(writer)
        read_line(writer, logs["writer"])
        with child(service_words, short / "service", logs["service"]) as service:
            read_line(service, logs["service"])
            say("the service is up")
            tell(writer)
            began = time.monotonic()

            def follow() -> None:
                assert writer.stdout is not None
                for line in writer.stdout:
                    event = json.loads(line) | {"minute": (time.monotonic() - began) / 60}
                    (errors if "error" in event else rounds[event["what"]]).append(event)

            follower = threading.Thread(target=follow, daemon=True)
            follower.start()
            clients = Clients(f"http://127.0.0.1:{port}")
            trees = {"service": service.pid, "writer": writer.pid}

            async def watch() -> None:
                asked, noted = asyncio.create_task(clients.run()), 0
                with (folder / "samples.jsonl").open("w") as file:
                    for number in range(10**9):
                        due = number * SAMPLE_S
                        await asyncio.sleep(max(0.0, began + due - time.monotonic()))
                        minute = (time.monotonic() - began) / 60
                        if minute >= minutes or asked.done():
                            break
                        weigh = number % WEIGH_EVERY == 0
                        values = await asyncio.to_thread(sample, archive, short, trees, weigh=weigh)
                        answers, noted = clients.took[noted:], len(clients.took)
                        for kind in {answer[1] for answer in answers}:
                            ms = [answer[2] for answer in answers if answer[1] == kind]
                            values[f"{kind} ms"] = float(np.median(ms))
                        line = json.dumps({"minute": minute, "values": values})
                        print(line, file=file, flush=True)
                        load.append(os.getloadavg()[0])
                clients.stop()
                await asked

            asyncio.run(watch())
            died = [name for name, one in (("service", service), ("writer", writer))
                    if one.poll() is not None]  # fmt: skip
            tell(writer)
            writer.wait(300)
            follower.join(10)
            service.terminate()
            code = service.wait(90)
    opened, checked = Archive(archive), verify(archive)
    ingested = START_SLIDES + sum(one["done"]["ready"] for one in rounds["ingest"])
    heads = verify_audit(run / "audit")
    found = fits(folder, warm_up)
    return {
        "minutes": minutes,
        "warm_up": warm_up,
        "engine": engine,
        "load_average": {"mean": float(np.mean(load)), "most": max(load)},
        "answers": Counter(answer[1] for answer in clients.took),
        "failed": clients.failed,
        "ms": {
            kind: percentiles([answer[2] for answer in clients.took if answer[1] == kind])
            for kind in sorted({answer[1] for answer in clients.took})
        },
        "rounds": {
            what: {
                "done": len(done),
                "waited_for_the_lock": sum(one.get("waited", 0) > 0 for one in done),
                "seconds": percentiles([one["seconds"] for one in done if "seconds" in one]),
            }
            for what, done in rounds.items()
        },
        "errors": errors,
        "died": died,
        "service_exit_code": code,
        "audit_lines": sum(head.lines for head in heads.values()),
        "requests": clients.asked,
        "vector_index_made": sum(
            any("vector" in name for name in one["done"]["indexes"]) for one in rounds["index"]
        ),
        "slides": {"ingested": ingested, "ready": len(opened.ready_ids())},
        "damaged": checked.damaged,
        "series": found,
        "not_flat": sorted(name for name, fit in found.items() if fit["is"] == "grows"),
    }


def percentiles(values: list[float]) -> Report:
    """Median and tail."""
    if not values:
        return {}
    return {f"p{q}": float(np.percentile(values, q)) for q in (50, 95, 99)} | {"most": max(values)}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--warm-up", type=float, default=10, help="minutes that are not fitted")
    parser.add_argument("--engine", choices=("vllm", "fake"), default="vllm")
    parser.add_argument("--json", action="store_true", help="accepted for symmetry; always JSON")
    parser.add_argument("--folder", type=Path, help="a new folder that is kept")
    parser.add_argument("--fit", type=Path, help="only fit what a run left in its folder")
    parser.add_argument("--write", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if args.write:
        write(args.folder)
        return
    if args.fit:
        print(json.dumps(fits(args.fit, args.warm_up), indent=1))
        return
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as made,
        # Short: Ray's sockets lie below it.
        tempfile.TemporaryDirectory(prefix="soak-", dir="/tmp", ignore_cleanup_errors=True) as low,
    ):
        folder = args.folder or Path(made) / "soak"
        folder.mkdir(parents=True)
        report = soak(
            folder, Path(low), minutes=args.minutes, warm_up=args.warm_up, engine=args.engine
        )
        print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
