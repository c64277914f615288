"""Files of equal size: each is planned by itself, and copies are one slide all the same."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import tifffile

from jobs import ingest as jobs_ingest
from jobs.ingest.candidates import Candidate
from jobs.ingest.config import IngestConfig
from jobs.ingest.copies import PLACES, SAMPLE_BYTES, may_be_copies
from pathflip.geometry import Tiling
from pathflip.slides.reader import SlideReader
from pathflip.slides.sources import discover
from tests.conftest import content
from tests.in_threads import in_threads

SIZE = 4 << 20


def names(groups: Sequence[Sequence[Candidate]]) -> list[list[str]]:
    return [[Path(one.source.uri).name for one in group] for group in groups]


def grouped(folder: Path) -> list[list[str]]:
    found = [Candidate(source=source) for source in discover([str(folder)])]
    return names(may_be_copies(found))


@pytest.mark.parametrize("place", PLACES)
def test_a_difference_in_any_sample_separates_and_copies_stay_together(
    place: float, tmp_path: Path
) -> None:
    whole = np.random.default_rng(0).bytes(SIZE)
    at = min(SIZE - 1, round((SIZE - SAMPLE_BYTES) * place) + 5)
    other = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
    for name, data in {"a": whole, "b": other, "c": whole, "d": other, "e": whole[1:]}.items():
        (tmp_path / f"{name}.svs").write_bytes(data)
    os.symlink(tmp_path / "b.svs", tmp_path / "f.svs")
    assert grouped(tmp_path) == [["a.svs", "c.svs"], ["b.svs", "d.svs", "f.svs"], ["e.svs"]]


def test_what_samples_do_not_tell_apart_stays_together(tmp_path: Path) -> None:
    """Between two samples, and where one of the files cannot be read."""
    whole, between = bytes(SIZE), bytearray(SIZE)
    between[SAMPLE_BYTES] = 1
    for name, data in {"a": whole, "b": bytes(between), "c": whole}.items():
        (tmp_path / f"{name}.svs").write_bytes(data)
    assert grouped(tmp_path) == [["a.svs", "b.svs", "c.svs"]]
    found = [Candidate(source=source) for source in discover([str(tmp_path)])]
    (tmp_path / "a.svs").write_bytes(b"\1" * SIZE)
    (tmp_path / "b.svs").unlink()
    assert names(may_be_copies(found)) == [["a.svs", "b.svs", "c.svs"]]


def test_files_that_are_not_there_and_series_of_files(tmp_path: Path) -> None:
    for name in ("x.svs", "y.svs"):
        os.symlink(tmp_path / "nowhere", tmp_path / name)
    for folder, large in {"one": b"DICM" * 9, "two": b"dicm" * 9, "three": b"DICM" * 9}.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.dcm").write_bytes(b"small")
        (tmp_path / folder / "2.dcm").write_bytes(large)
    assert grouped(tmp_path) == [["one", "three"], ["two"], ["x.svs"], ["y.svs"]]


def uncompressed(path: Path, seed: int) -> None:
    """Write a slide of 512 px: pink noise with glass around it; all are of one size."""
    rng = np.random.default_rng(seed)
    pixels = np.full((512, 512, 3), 244, np.uint8)
    pixels[64:448, 64:448] = rng.integers(0, 90, (384, 384, 1)) + np.array([160, 70, 130])
    scale: Any = {"resolution": (2e4, 2e4), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, pixels, tile=(256, 256), photometric="rgb", **scale)


def run(folder: Path, archive: Path, **settings: Any) -> Any:
    tiling = Tiling(region_um=256, patch_um=128)
    config = IngestConfig(tiling=tiling, device="cpu", **settings)
    with in_threads():
        return jobs_ingest.ingest([str(folder)], str(archive), config)


def by_size(candidates: Sequence[Candidate]) -> list[list[Candidate]]:
    """Group files of one size, which is right and slow."""
    sizes: dict[int, list[Candidate]] = {}
    for one in candidates:
        sizes.setdefault(one.source.bytes, []).append(one)
    return list(sizes.values())


def test_an_archive_of_files_of_one_size(tmp_path: Path) -> None:
    """Twelve distinct slides, two of them three times; one copy has a resolution that was given."""
    folder = tmp_path / "in"
    folder.mkdir()
    for seed in range(12):
        uncompressed(folder / f"s{seed:02}.tif", seed)
    shutil.copy(folder / "s03.tif", folder / "a copy of 3.tif")
    shutil.copy(folder / "s03.tif", folder / "z copy of 3.tif")
    shutil.copy(folder / "s07.tif", folder / "b copy of 7.tif")
    shutil.copy(folder / "s07.tif", folder / "z copy of 7.tif")
    assert len({path.stat().st_size for path in folder.iterdir()}) == 1
    mpp = tmp_path / "mpp.csv"
    mpp.write_text("slide,mpp\nz copy of 7.tif,0.25\n")

    with mock.patch("jobs.ingest.ledger.may_be_copies", by_size):
        slow = run(folder, tmp_path / "slow", mpp_csv=str(mpp))
    handed: list[list[str]] = []
    opened: list[str] = []
    pipeline, plan = jobs_ingest._pipeline, SlideReader.plan

    def seen(groups: Any, *args: Any, **rest: Any) -> Any:
        for row in groups:
            given = [Candidate.from_dict(one) for one in json.loads(row["candidates"])]
            handed.extend(names([given]))
        return pipeline(groups, *args, **rest)

    def opening(self: SlideReader, path: str, **rest: Any) -> Any:
        opened.append(Path(path).name)
        return plan(self, path, **rest)

    with (
        mock.patch.object(jobs_ingest, "_pipeline", seen),
        mock.patch.object(SlideReader, "plan", opening),
    ):
        quick = run(folder, tmp_path / "quick", mpp_csv=str(mpp))

    alone = [f"s{seed:02}.tif" for seed in range(12) if seed not in (3, 7)]
    assert handed == [
        ["a copy of 3.tif", "s03.tif", "z copy of 3.tif"],
        ["z copy of 7.tif", "b copy of 7.tif", "s07.tif"],
        *([name] for name in alone),
    ]
    assert sorted(opened) == ["a copy of 3.tif", *alone, "z copy of 7.tif"]
    assert quick.slides == slow.slides == {"ready": 12, "quarantined": 0, "empty": 0, "skipped": 4}
    rows = content(tmp_path / "quick")
    assert rows == content(tmp_path / "slow")
    aliases = {
        Path(one["row"]["uri"]).name: [Path(uri).name for uri in one["row"]["aliases"]]
        for one in rows.values()
    }
    assert aliases == {
        "a copy of 3.tif": ["s03.tif", "z copy of 3.tif"],
        "z copy of 7.tif": ["b copy of 7.tif", "s07.tif"],
    } | {name: [] for name in alone}

    shutil.copy(folder / "s05.tif", folder / "late copy of 5.tif")
    again = run(folder, tmp_path / "quick", mpp_csv=str(mpp))
    assert again.slides == {"ready": 0, "quarantined": 0, "empty": 0, "skipped": 17}
