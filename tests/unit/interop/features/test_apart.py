"""Files of features that break whatever reads them cost themselves, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest

from pathflip.archive import Archive
from pathflip.archive.verify import verify
from pathflip.errors import SlideError
from pathflip.interop.features import apart
from pathflip.interop.features.find import find_features
from pathflip.interop.features.importing import import_features
from tests import failing_features
from tests.unit.interop.features.test_files import FEATURES, trident

BREAKING = {
    f"{how}_{when}": code
    for how, code in (("crash", "reader_crash"), ("hang", "timeout"))
    for when in ("looking", "reading")
}


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    """The process of the thread of a test ends with it."""
    apart.close()
    yield
    apart.close()


def slide(job: Path, name: str) -> Path:
    """A slide of TRIDENT that says its resolution."""
    path = trident(job, name)
    with h5py.File(path, "a") as file:
        file["coords"].attrs["mpp"] = 0.25
    return path


def test_files_that_crash_or_hang_their_reader_are_refused_and_all_others_come_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two are found while looking at them, two while their features are read."""
    files = {name: slide(tmp_path / "job", name) for name in ("a", *BREAKING, "z")}
    monkeypatch.setattr(apart, "PROGRAM", failing_features.__name__)
    monkeypatch.setattr(apart, "TIMEOUT_S", 20.0)
    result = import_features(str(tmp_path / "archive"), tmp_path / "job")
    assert {Path(path).stem: why.partition(":")[0] for path, why in result.refused.items()} == (
        BREAKING
    )
    assert "SIGSEGV" in result.refused[str(files["crash_reading"])]
    assert result.slides == {"imported": 2, "extended": 0, "skipped": 0, "refused": 4}
    archive = Archive(tmp_path / "archive")
    assert not verify(tmp_path / "archive").damaged
    held = set(archive.slides(columns=["slide_id"])["slide_id"].to_pylist())
    assert len(held) == 2
    monkeypatch.undo()
    apart.close()
    again = import_features(str(tmp_path / "archive"), tmp_path / "job")
    assert again.slides == {"imported": 4, "extended": 0, "skipped": 2, "refused": 0}


def test_chunks_that_need_more_memory_than_there_is_cost_their_file(tmp_path: Path) -> None:
    """A chunk is unpacked whole to read one row of it: this one would take 15 GiB."""
    with h5py.File(tmp_path / "bomb.h5", "w") as file:
        shape = (3_900_000, 1024)
        data = file.create_dataset(
            "features", shape, np.float32, chunks=(1_000_000, 1024), compression="gzip"
        )
        data.id.write_direct_chunk((0, 0), b"x" * 100)
        file["coords"] = np.zeros((3_900_000, 2), np.int8)
    slide(tmp_path, "fine")
    records = {record.slide: record for record in find_features(tmp_path).files}
    with pytest.raises(SlideError, match=r"bomb\.h5") as caught:
        records["bomb"].read(0, 4)
    assert caught.value.code in ("unreadable", "reader_limits", "reader_crash")
    assert (records["fine"].read(0, 7) == FEATURES).all()


def test_rows_beyond_the_shared_memory_are_read_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The features of a file are its own however many are asked for at once."""
    slide(tmp_path, "S")
    monkeypatch.setattr(apart, "MEMORY_BYTES", 16 * FEATURES.shape[1] * 3)
    (record,) = find_features(tmp_path).files
    assert (record.read(0, 7) == FEATURES).all()
    assert (record.read(1, 4) == FEATURES[1:4]).all()


def test_a_file_that_changes_after_it_was_looked_at_is_refused(tmp_path: Path) -> None:
    """Numbers of another table are never taken for those that were planned."""
    path = slide(tmp_path, "S")
    (record,) = find_features(tmp_path).files
    with h5py.File(path, "w") as file:
        file["features"], file["coords"] = FEATURES[:5], np.zeros((5, 2))
    with pytest.raises(SlideError, match="has changed since"):
        record.read(0, 5)
