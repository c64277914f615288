"""Search over single patches, against a plain loop over the stored features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pathflip.archive import Archive, patch_search
from pathflip.archive.filters import Filter
from pathflip.archive.patch_search import search_patches
from pathflip.archive.search import RESULT
from pathflip.errors import ArchiveError, ConfigError
from pathflip.geometry import Tiling, patch_rects
from pathflip.search import Query, run_query
from tests.archives import DIM, make_archive


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    uri = tmp_path_factory.mktemp("patches") / "archive"
    split = ["train", "test"]
    return Archive(make_archive(uri, slides=8, split=lambda n: split[n % 2], captions=False))


def plain(archive: Archive, query: Any, slides: Any = None) -> list[tuple[float, str, int]]:
    """Every patch as (score, region, slot), best first."""
    found = []
    for slide in sorted(slides or archive.ready_ids()):
        features, mask, ids = archive.features_array(slide)
        for region, slot in np.argwhere(mask).tolist():
            value = features[region, slot].astype(np.float64)
            score = value @ query / np.linalg.norm(value) / np.linalg.norm(query)
            found.append((score, ids[region], slot))
    return sorted(found, key=lambda one: (-one[0], one[1], one[2]))


def test_every_finite_fp16_number_is_widened_exactly() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)].reshape(-1, 2)
    wide = patch_search._widened(finite, np.empty(finite.shape, np.int32))
    assert wide.dtype == np.float32
    np.testing.assert_array_equal(wide, finite.astype(np.float32))
    np.testing.assert_array_equal(np.signbit(wide), np.signbit(finite))


@pytest.mark.parametrize("block", [1, 4096, 16 << 20])
def test_patches_are_those_of_a_plain_loop(
    archive: Archive, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(patch_search, "_BLOCK_BYTES", block)
    query = np.random.default_rng(1).standard_normal(DIM)
    expected = plain(archive, query)
    found = search_patches(archive, query, k=25)
    assert found.exhaustive
    assert found.rows.schema == RESULT
    rows = found.rows.to_pylist()
    places = {row["region_id"]: row for row in archive.regions().to_pylist()}
    tiling = Tiling(**archive.tiling())
    for rank, (row, (score, region, slot)) in enumerate(zip(rows, expected[:25], strict=True)):
        assert (row["rank"], row["region_id"]) == (rank + 1, region)
        assert row["score"] == pytest.approx(score, abs=1e-12)
        at = places[region]
        x, y, w, _ = patch_rects(tiling, rx=at["rx"], ry=at["ry"], mpp=0.5)[slot].tolist()
        assert (row["x0"], row["y0"], row["size0"]) == (x, y, w)
    everything = search_patches(archive, query, k=10_000).rows
    assert everything.num_rows == len(expected) == sum(r["n_patches"] for r in places.values())


def test_conditions_hold_before_ranking(archive: Archive) -> None:
    query = np.random.default_rng(2).standard_normal(DIM)
    test = [f"slide{n:03d}" for n in (1, 3, 5, 7)]
    found = search_patches(archive, query, k=9, filters=[Filter.parse("split=test")]).rows
    assert found["region_id"].to_pylist() == [one[1] for one in plain(archive, query, test)[:9]]
    one = search_patches(archive, query, k=9, filters=[Filter.parse("slide_id=slide002")]).rows
    assert set(one["slide_id"].to_pylist()) == {"slide002"}
    none = search_patches(archive, query, filters=[Filter.parse("split=val")])
    assert (none.rows.num_rows, none.exhaustive) == (0, True)


def test_above_the_limit_the_best_regions_come_first(tmp_path: Path) -> None:
    """Planted: the means of regions name the one whose patches are compared."""
    archive = Archive(make_archive(tmp_path / "archive", slides=4, captions=False))
    query = np.eye(DIM)[0]  # as all means of regions here: ties go by id
    total = 16 * archive.regions().num_rows  # the rows of embeddings here do not say
    same = search_patches(archive, query, k=5, exhaustive=total)
    assert same.exhaustive
    found = search_patches(archive, query, k=5, exhaustive=total - 1, best_regions=2)
    assert not found.exhaustive
    first = sorted(archive.regions()["region_id"].to_pylist())[:2]
    expected = [one for one in plain(archive, query) if one[1] in first][:5]
    assert found.rows["region_id"].to_pylist() == [one[1] for one in expected]
    assert found.rows["score"].to_pylist() == pytest.approx([one[0] for one in expected])
    every = search_patches(archive, query, k=5, exhaustive=0, best_regions=1000)
    assert every.rows.equals(same.rows)
    assert not every.exhaustive


def test_queries_are_checked(archive: Archive) -> None:
    query = np.ones(DIM)
    told = run_query(archive, Query(vector=query, level="patch", k=3))
    assert told.schema.metadata == {b"exhaustive": b"true"}
    assert told.replace_schema_metadata().equals(search_patches(archive, query, k=3).rows)
    for wrong, code in ((np.zeros(DIM), "config"), (np.ones(3), "wrong_encoder")):
        with pytest.raises((ConfigError, ArchiveError)) as refused:
            search_patches(archive, wrong)
        assert refused.value.code == code
    for k in (0, 10_001):
        with pytest.raises(ConfigError):
            search_patches(archive, query, k=k)
    with pytest.raises(ArchiveError) as caught:
        search_patches(archive, query, encoder="uni")
    assert caught.value.code == "unknown_encoder"
    for parts in (
        {"slide": "slide001"}, {"region": "slide001/0_1"}, {"vector": query, "model": "m"},
        {"text": "a", "vector": query, "mode": "hybrid"}, {"text": "a", "mode": "text"},
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="Patches are found by"):
            Query(level="patch", **parts)
