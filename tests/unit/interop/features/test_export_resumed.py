"""Exports of features that end before their time, or are asked for again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pathflip.archive import Archive
from pathflip.interop.features import exporting
from pathflip.interop.features.exporting import DONE, WRITERS, export_features
from pathflip.interop.features.importing import import_features
from tests.unit.interop.features.test_exchange import scaled
from tests.unit.interop.features.test_files import trident

NAMES = ("s0", "s1", "s2")


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    """Three slides."""
    folder = tmp_path_factory.mktemp("archive")
    for name in NAMES:
        trident(folder / "job", name)
    settings = scaled(folder, **dict.fromkeys(NAMES, 0.25))
    import_features(str(folder / "archive"), folder / "job", settings)
    return Archive(folder / "archive")


def files(folder: Path) -> dict[str, int]:
    """Files of a folder and when each was written."""
    return {
        str(one.relative_to(folder)): one.stat().st_mtime_ns
        for one in folder.rglob("*")
        if one.is_file() and one.name != DONE
    }


@pytest.mark.parametrize("to", sorted(WRITERS))
def test_an_export_that_was_interrupted_goes_on(
    archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    whole = export_features(archive, to, tmp_path / "whole")
    assert (whole["slides"], whole["skipped"]) == (3, 0)
    calls = []

    def dying(layout: Any, record: Any) -> Any:
        calls.append(record.slide)
        if record.slide == "s1":
            raise KeyboardInterrupt
        return WRITERS[to](layout, record)

    with monkeypatch.context() as patch:
        patch.setattr(exporting, "WRITERS", {to: dying})
        with pytest.raises(KeyboardInterrupt):
            export_features(archive, to, tmp_path / "out")
    assert calls == ["s0", "s1"]
    before = files(tmp_path / "out")
    with (tmp_path / "out" / DONE).open("a") as notes:
        notes.write('{"origin": "12')  # the machine stopped in the middle of a line
    rest = export_features(archive, to, tmp_path / "out")
    assert (rest["slides"], rest["skipped"], rest["patches"]) == (2, 1, 14)
    after = files(tmp_path / "out")
    assert set(after) == set(files(tmp_path / "whole"))
    assert {name: after[name] for name in before} == before
    last = export_features(archive, to, tmp_path / "out")
    assert (last["slides"], last["skipped"]) == (0, 3)
    assert files(tmp_path / "out") == after


def test_what_is_missing_or_made_anew_is_written(archive: Archive, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_features(archive, "clam", out)
    (out / "patches" / "s1.h5").unlink()
    assert export_features(archive, "clam", out)["slides"] == 1
    assert (out / "patches" / "s1.h5").exists()
    assert export_features(archive, "trident", out)["slides"] == 3  # another format
    for name in NAMES:
        trident(tmp_path / "job", name)
    settings = scaled(tmp_path, **dict.fromkeys(NAMES, 0.25))
    import_features(str(tmp_path / "archive"), tmp_path / "job", settings)
    assert export_features(Archive(tmp_path / "archive"), "clam", out)["slides"] == 3


def test_files_of_another_encoder_are_not_taken_for_those_asked_for(tmp_path: Path) -> None:
    for encoder in ("uni_v1", "conch_v15"):
        for name in NAMES:
            trident(tmp_path / encoder, name, encoder=encoder)
        settings = scaled(tmp_path, **dict.fromkeys(NAMES, 0.25))
        import_features(str(tmp_path / "archive"), tmp_path / encoder, settings)
    archive, out = Archive(tmp_path / "archive"), tmp_path / "out"
    for encoder in ("uni", "conch_v1_5", "uni"):
        assert export_features(archive, "clam", out, encoder=encoder)["slides"] == 3
    assert export_features(archive, "clam", out, encoder="uni")["skipped"] == 3
