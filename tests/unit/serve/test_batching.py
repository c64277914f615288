"""Questions answered together get the answers they get alone, and share what is encoded."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pathflip.archive import Archive
from pathflip.archive.captions import Caption, write_captions
from pathflip.archive.commit import Committer
from pathflip.errors import ConfigError
from pathflip.evaluation.classify import classify
from pathflip.evaluation.encoding_cache import EncodingCache
from pathflip.evaluation.ground_slide import ground_slide
from pathflip.evaluation.grounding import VARIANTS
from serve.grounding import SHARED_TEXTS, Grounding
from serve.schemas import ClassifyRequest, GroundRequest
from tests.unit.serve.service_fixture import World

TEXTS = ("necrosis", "mucin", "a long text about glands, stroma and fat", "tumour")
CLASSES = (
    {"colon": ["colonic mucosa", "colon"], "lung": ["lung"]},
    {"necrosis": ["necrosis"], "mucin": ["mucin"], "fat": ["fat", "adipose tissue"]},
    {f"class {n}": [f"name {n}", f"other name {n}"] for n in range(8)},  # more than are shared
)


@pytest.fixture
def part(world: World) -> Grounding:
    return Grounding(str(world.archive), str(world.run))


@pytest.fixture
def encoded(part: Grounding) -> Iterator[list[int]]:
    """Number of slides of each pass through the Q-Former's patches."""
    passes: list[int] = []

    def count(_: Any, given: tuple[Any, ...], __: Any) -> None:
        passes.append(len(given[2]))

    hook = part.run.model.qformer.register_forward_hook(count)
    yield passes
    hook.remove()


def ground_body(n: int) -> dict[str, Any]:
    asked: dict[str, Any] = {
        "slide_id": f"slide{n % 3:03d}", "text": TEXTS[n % 4], "variant": VARIANTS[n // 2 % 4],
        "contrast": "tissue" if n % 2 else None, "min_patches": 1, "patches": True,
    }  # fmt: skip
    return GroundRequest(**asked).model_dump()


def classify_body(n: int) -> dict[str, Any]:
    slides = [f"slide{(n + step) % 5:03d}" for step in range(1 + n % 3)]
    score = ("global", "local", "sum")[n % 3]
    asked = {"slide_ids": slides, "classes": CLASSES[n % 3], "score": score}
    return ClassifyRequest(**asked).model_dump()


def test_together_as_alone(
    part: Grounding, world: World, together: Callable[[Any], Any], encoded: list[int]
) -> None:
    assert sum(len(names) for names in CLASSES[2].values()) * 20 > SHARED_TEXTS
    grounds, classes = [ground_body(n) for n in range(16)], [classify_body(n) for n in range(6)]

    async def ask() -> list[Any]:
        wanted = [part.ground(one) for one in grounds] + [part.classify(one) for one in classes]
        return await asyncio.gather(*wanted)

    found = together(ask())
    assert encoded == [1] * 5  # 22 questions about five slides
    archive = Archive(world.archive)
    for asked, answer in zip(grounds, found[:16], strict=True):
        plain = ground_slide(
            archive, world.loaded, asked["slide_id"], asked["text"], variant=asked["variant"],
            contrast=asked["contrast"], min_patches=1,
        ).as_json()  # fmt: skip
        assert answer.pop("model") == world.loaded.name
        theirs, ours = plain.pop("patches"), answer.pop("patches")
        assert [row.pop("heat") for row in ours] == pytest.approx(
            [row.pop("heat") for row in theirs], abs=1e-6
        )
        assert ours == theirs
        scores = [[box.pop("score") for box in one.pop("boxes")] for one in (answer, plain)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-6)
        assert answer.pop("score") == pytest.approx(plain.pop("score"), abs=1e-6)
        assert answer == json.loads(json.dumps(plain))
    for asked, answer in zip(classes, found[16:], strict=True):
        plain = classify(
            archive, world.loaded, asked["classes"], slides=asked["slide_ids"],
            score=asked["score"],
        )  # fmt: skip
        for ours, theirs in zip(answer["results"], plain, strict=True):
            assert ours["slide_id"] == theirs["slide_id"]
            assert ours["scores"] == pytest.approx(theirs["scores"], abs=1e-6)


def test_one_fails_or_leaves_and_the_others_are_answered(
    part: Grounding, together: Callable[[Any], Any]
) -> None:
    async def ask() -> list[Any]:
        asked = [ground_body(n) for n in range(4)]
        asked[1]["text"] = " "
        tasks = [asyncio.ensure_future(part.ground(one)) for one in asked]
        await asyncio.sleep(0)
        tasks[2].cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        return [*found, await part.ground(asked[2])]

    found = together(ask())
    assert isinstance(found[1], ConfigError)
    assert isinstance(found[2], asyncio.CancelledError)
    assert [found[n]["slide_id"] for n in (0, 3, 4)] == ["slide000", "slide000", "slide002"]


def test_features_of_other_weights_are_refused_at_once(
    part: Grounding, together: Callable[[Any], Any]
) -> None:
    """Whoever answers the batch does not end with it, so that all would wait for ever."""
    part.cache.run = replace(part.run, encoder={**part.run.encoder, "revision": "another"})

    async def ask() -> list[Any]:
        async with asyncio.timeout(60):
            wanted = [part.ground(ground_body(n)) for n in range(3)]
            return await asyncio.gather(*wanted, return_exceptions=True)

    assert [one.code for one in together(ask())] == ["other_encoder"] * 3


def test_what_was_written_is_read_again(world: World, tmp_path: Path) -> None:
    uri = Path(shutil.copytree(world.archive, tmp_path / "archive"))
    archive, cache = Archive(uri), EncodingCache(world.loaded)
    first = cache.slide(archive, "slide001")
    with Committer(uri) as committer:
        write_captions(committer, [Caption(slide_id="slide001", text="Fat.")], source="other")
    archive = Archive(uri)
    assert cache.slide(archive, "slide001") is first  # captions change no features
    table = archive.encoders()["texture"]["features_table"]
    others = archive.features("slide002", "texture")
    with Committer(uri) as committer:
        committer.replace_rows(table, others)
    archive = Archive(uri)
    assert cache.slide(archive, "slide001") is first  # nor do features of another slide
    rows = archive.features("slide001", "texture")
    halves = [[value / 2 for value in row] for row in rows["features"].to_pylist()]
    import pyarrow as pa

    with Committer(uri) as committer:
        at = rows.schema.get_field_index("features")
        halved = pa.array(halves, rows.schema.field("features").type)
        committer.replace_rows(table, rows.set_column(at, "features", halved))
    archive = Archive(uri)
    assert not cache.holds(archive, "slide001")
    second = cache.slide(archive, "slide001")
    assert not torch.equal(first.sight.slide, second.sight.slide)


def test_a_slide_that_is_kept_is_looked_up_before_a_newer_state_is_used(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lance

    uri = Path(shutil.copytree(world.archive, tmp_path / "archive"))
    archive, cache = Archive(uri), EncodingCache(world.loaded)
    first = cache.slide(archive, "slide001")
    table = archive.encoders()["texture"]["features_table"]
    with Committer(uri) as committer:
        committer.replace_rows(table, archive.features("slide002", "texture"))
    newer = archive.successor()
    newer.ledger()
    cache.look_up(newer)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a client waits for the disk")

    with monkeypatch.context() as cold:
        cold.setattr(lance.LanceDataset, "to_table", refuse)
        assert cache.slide(newer, "slide001") is first


def test_memory_is_bounded(world: World) -> None:
    archive, cache = Archive(world.archive), EncodingCache(world.loaded, max_texts=2)
    size = cache.slide(archive, "slide000").nbytes
    cache = EncodingCache(world.loaded, max_bytes=2 * size, max_texts=2)
    for name in ("slide000", "slide001", "slide000", "slide002"):
        cache.slide(archive, name)
    kept = [cache.holds(archive, f"slide{n:03d}") for n in range(3)]
    assert kept == [True, False, True]  # the one not asked for longest is gone
    assert len(cache.texts(["a", "b", "c"])) == 3
    assert [cache.missing([text]) for text in "abc"] == [1, 0, 0]
