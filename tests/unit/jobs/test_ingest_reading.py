"""Reading ahead: what is read while patches are encoded, and what a lost reader costs."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from jobs.ingest.decision import Attempts
from jobs.ingest.reading import Request, SlideFile, encode_ahead, read_ahead
from pathflip.errors import SlideError
from pathflip.slides.reader import Patches, SlideReader
from pathflip.slides.slide import Slide
from pathflip.synth import make_slide

PX = 64


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> SlideFile:
    path = tmp_path_factory.mktemp("ahead") / "a.svs"
    make_slide(path, width=1024, height=1024, mpp=0.5, layout="aperio", seed=5)
    stat = path.stat()
    return SlideFile(path=path, bytes=stat.st_size, mtime_ns=stat.st_mtime_ns)


def requests(n: int) -> list[Request]:
    """Row ``i`` of squares of the slide, a different number of them in each."""
    return [
        Request(
            rects=np.array([[PX * x, PX * i, PX, PX] for x in range(3 + i % 2)], np.int64), mpp=0.5
        )
        for i in range(n)
    ]


class Told:
    """Reader that tells what it is asked, and fails where the test says so."""

    def __init__(self, events: list[str], fails: dict[int, str] | None = None) -> None:
        self.events, self.fails = events, fails or {}
        self.row = -1

    def start_read(self, _: str, rects: Any, **__: Any) -> None:
        self.row = int(rects[0, 1]) // PX
        self.events.append(f"start {self.row}")

    def finish_read(self, *, px: int) -> Patches:
        if code := self.fails.pop(self.row, ""):
            self.events.append(f"lost {self.row}")
            raise SlideError("lost", hint="none", code=code)
        self.events.append(f"finish {self.row}")
        pixels = np.full((1, px, px, 3), self.row, np.uint8)
        return Patches(pixels=pixels, ok=np.ones(1, bool), quality=np.zeros((1, 2), np.float32))


def ahead(
    readers: Sequence[Any], file: SlideFile, n: int, attempts: Attempts, timeout_s: float = 60.0
) -> Iterator[Patches]:
    return read_ahead(readers, file, requests(n), px=PX, attempts=attempts, timeout_s=timeout_s)


@pytest.mark.parametrize("readers", [1, 2])
def test_a_read_is_begun_before_the_last_one_is_encoded(file: SlideFile, readers: int) -> None:
    events: list[str] = []
    told = [Told(events) for _ in range(readers)]
    for patches in ahead(told, file, 5, Attempts(limit=3)):
        events.append(f"encode {patches.pixels[0, 0, 0, 0]}")
    for row in range(5):
        begun = {event for event in events[: events.index(f"encode {row}")] if "start" in event}
        assert begun == {f"start {at}" for at in range(min(5, row + readers + 1))}
    assert [event for event in events if "encode" in event] == [f"encode {i}" for i in range(5)]


def test_a_reader_lost_while_it_read_ahead_costs_one_attempt(file: SlideFile) -> None:
    events: list[str] = []
    attempts = Attempts(limit=2)
    rows = [
        int(patches.pixels[0, 0, 0, 0])
        for patches in ahead([Told(events, {1: "reader_crash"})], file, 3, attempts)
    ]
    assert rows == [0, 1, 2]
    assert attempts.made == 2
    assert events == [
        "start 0", "finish 0", "start 1", "lost 1", "start 1", "finish 1", "start 2", "finish 2"
    ]  # fmt: skip
    twice = Told([], {1: "reader_crash", 2: "timeout"})
    with pytest.raises(SlideError, match="lost"):
        list(ahead([twice], file, 3, Attempts(limit=2)))


@pytest.mark.parametrize("how", [None, signal.SIGKILL, signal.SIGSTOP])
def test_pixels_are_those_of_the_slide_whatever_becomes_of_the_reader(
    file: SlideFile, how: signal.Signals | None
) -> None:
    """The first pixels outlive the read begun after them, and the reader's process."""
    attempts = Attempts(limit=4)
    with SlideReader(patches=4, px=PX, buffers=2) as reader:
        found = []
        for at, patches in enumerate(ahead([reader], file, 6, attempts, 10.0)):
            if at == 1 and how is not None:
                assert reader._process.pid is not None
                os.kill(reader._process.pid, how)
            found.append(patches.pixels.copy())
    for request, pixels in zip(requests(6), found, strict=True):
        here = np.empty_like(pixels)
        assert Slide(file.path).read_patches(request.rects, mpp=request.mpp, out=here).all()
        assert (pixels == here).all()


def test_two_buffers_hold_two_reads(file: SlideFile) -> None:
    with SlideReader(patches=4, px=PX, buffers=2) as reader:
        read = []
        for request in requests(3):
            reader.start_read(
                str(file.path), request.rects, mpp=0.5, px=PX, slide_mpp=None, timeout_s=60
            )
            read.append(reader.finish_read(px=PX).pixels)
        assert len({pixels.tobytes() for pixels in read[1:]}) == 2
        first = np.empty_like(read[1])
        Slide(file.path).read_patches(requests(3)[1].rects, mpp=0.5, out=first)
        assert (read[1] == first).all()
        assert np.shares_memory(read[0], read[2])
        assert not np.shares_memory(read[1], read[2])


class Mean:
    """An encoder of two numbers, the mean colour and a constant, that notes when it computes."""

    name, revision, dim, input_px, mpp, licence = "mean", "1", 2, PX, None, "none"

    def __init__(self, constant: float, events: list[str]) -> None:
        self._constant, self._events = constant, events

    def __call__(self, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
        self._events.append(f"encode {patches[0, 0, 0, 0]}")
        means = patches.mean((1, 2, 3))
        return np.stack([means, np.full(len(means), self._constant)], 1).astype(np.float32)


def test_features_come_in_order_while_the_next_batch_is_begun() -> None:
    events: list[str] = []
    memory = np.zeros((3, PX, PX, 3), np.uint8)  # shared with a reader, which overwrites it

    def batches() -> Iterator[tuple[str, NDArray[np.uint8]]]:
        for value in (5, 6, 7):
            memory[:] = value
            yield f"region {value}", memory[: value - 4]
            memory[:] = 0

    found = []
    for key, values in encode_ahead([Mean(1.0, events), Mean(1e6, events)], batches()):
        events.append(f"take {key}")
        found.append((key, values))
    assert [key for key, _ in found] == ["region 5", "region 6", "region 7"]
    for count, (_, (one, other)) in enumerate(found, start=1):
        np.testing.assert_array_equal(one, [[count + 4, 1]] * count)
        np.testing.assert_array_equal(other[:, 0], [count + 4] * count)
        assert np.isnan(other[:, 1]).all(), "fp16 cannot hold it"
    assert events.index("encode 6") < events.index("take region 5") < events.index("encode 7")
