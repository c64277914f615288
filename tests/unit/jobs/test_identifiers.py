"""Planted identifiers of patients and staff are not in an archive: not as bytes, not in a table."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openslide

from pathflip import Archive
from pathflip.archive.maintain import maintain
from tests.unit.slides.layouts import aperio, leica, philips

PLANTED = ("PATIENT-8413-OTTO", "dr-hilda-quill", "MUSTERMANN-1941", "SS7734XY", "BC-55-SPECIMEN")


def plant(folder: Path) -> None:
    """Three formats whose properties hold barcodes, names and numbers."""
    folder.mkdir()
    code = base64.b64encode(PLANTED[0].encode()).decode()
    leica(folder / "a.scn", barcode=code)
    other = base64.b64encode(PLANTED[4].encode()).decode()
    philips(folder / "b.tiff", barcode=other)
    more = f"|User = {PLANTED[1]}|Filename = {PLANTED[2]}|ScanScope ID = {PLANTED[3]}"
    aperio(folder / "c.svs", "jpeg", more=more)


def test_planted_identifiers_are_nowhere_in_the_archive(
    job_here: Callable[..., Any], tmp_path: Path
) -> None:
    plant(tmp_path / "slides")
    seen = ""
    for path in sorted((tmp_path / "slides").iterdir()):
        with openslide.OpenSlide(path) as slide:
            seen += str(dict(slide.properties))
            if path.suffix == ".scn":
                assert slide.properties[openslide.PROPERTY_NAME_BARCODE] == PLANTED[0]
    encoded = [base64.b64encode(text.encode()).decode() for text in PLANTED]
    for text, coded in zip(PLANTED, encoded, strict=True):
        assert text in seen or coded in seen, f"{text} was not planted where OpenSlide sees it"

    archive = tmp_path / "archive"
    result = job_here(tmp_path / "slides", archive, "tiling.region_um=128")
    assert result.slides["ready"] == 3
    maintain(archive)
    wanted = [text.lower() for text in (*PLANTED, *encoded)]
    files = [path for path in archive.rglob("*") if path.is_file()]
    assert len(files) > 20
    for path in files:
        data = path.read_bytes().lower()
        assert not [text for text in wanted if text.encode() in data], path
    opened = Archive(archive)
    for table in opened.tables():  # whatever the files compress
        rows = opened.dataset(table).to_table().to_pylist()
        held = repr(rows).lower()
        assert rows
        assert not [text for text in wanted if text in held], table
