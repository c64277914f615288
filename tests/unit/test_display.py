"""Results in notebooks: their pictures are the slides' pixels, and nothing in them can act."""

from __future__ import annotations

import base64
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

from pathflip import Archive, Slide
from pathflip.display import MAX_ROWS, MAX_TEXT, frame, page
from pathflip.evaluation.ground_slide import BOX_COLUMNS, GroundingResult, ground_slide
from pathflip.search import find
from pathflip.synth import make_slide
from pathflip.viewer import Viewer
from tests.unit.evaluation import planted

HOSTILE = "<img src=x onerror=alert(1)> \"&'"
PX = 2048
LABEL = np.zeros((300, 300, 3), np.uint8)
LABEL[..., 1] = 255
"""Label and macro image: pure green, the colour no tissue has."""


class Shown(HTMLParser):
    """HTML as a notebook takes it: its tags with attributes, the texts of its rows, its pictures.

    Fails on whatever could act or load something.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text = ""
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self._in_cell = False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        assert tag in {"div", "p", "b", "img", "table", "thead", "tbody", "tr", "th", "td"}
        assert {name for name, _ in attrs} <= {"style", "src", "alt", "title"}
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True
        if tag == "img":
            assert (dict(attrs)["src"] or "").startswith("data:image/")

    def handle_endtag(self, tag: str) -> None:
        self._in_cell &= tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_cell:
            self.rows[-1][-1] += data

    @property
    def pictures(self) -> list[tuple[str, NDArray[np.uint8]]]:
        """(description, RGB) of each picture."""
        return [
            (attrs["alt"] or "", decoded(base64.b64decode((attrs["src"] or "").partition(",")[2])))
            for tag, attrs in self.tags
            if tag == "img"
        ]


def decoded(data: bytes) -> NDArray[np.uint8]:
    return np.asarray(cv2.imdecode(np.frombuffer(data, np.uint8), 1)[..., ::-1], np.uint8)


def gap(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    assert one.shape == other.shape
    return float(np.abs(one.astype(int) - other).mean())


def is_green(pixels: NDArray[np.uint8]) -> bool:
    red, green, blue = (pixels[..., c].astype(int) for c in range(3))
    return bool((green - np.maximum(red, blue) > 60).any())


def labelled(path: Path, pixels: NDArray[np.uint8]) -> None:
    """Write an Aperio slide with a label and a macro image."""
    about = f"Aperio Image Library v1.0\n{PX}x{PX} |AppMag = 20|MPP = 0.5"
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(pixels, tile=(256, 256), photometric="rgb", description=about, metadata=None)
        tiff.write(pixels[::4, ::4], photometric="rgb", description=about, metadata=None)
        for name, kind in (("label", 1), ("macro", 9)):
            text = f"Aperio Image Library v1.0\n{name} 300x300"
            tiff.write(LABEL, photometric="rgb", description=text, metadata=None, subfiletype=kind)


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three slides: a plain one, one of a hostile name, one with a label."""
    folder = tmp_path_factory.mktemp("shown")
    for seed, name in enumerate(("plain.svs", f"{HOSTILE.replace('/', '')}.svs")):
        make_slide(folder / name, width=PX, height=PX, mpp=0.5, layout="aperio", seed=seed)
    with Slide(folder / "plain.svs") as slide:
        labelled(folder / "labelled.svs", np.rot90(slide.read(0, 0, PX)).copy())
    return folder


@pytest.fixture(scope="module")
def archive(slides: Path, job_here: Callable[..., Any]) -> Archive:
    uri = slides / "archive"
    assert job_here(slides, uri, "tiling.region_um=128", "tiling.patch_um=64").exit_code == 0
    return Archive(uri)


def test_a_slide_is_its_thumbnail(slides: Path) -> None:
    with Slide(slides / "labelled.svs") as slide:
        seen = decoded(slide._repr_jpeg_())
        assert max(seen.shape) == 512
        assert gap(seen, slide.read(0, 0, 512, mpp=0.5 * PX / 512)) < 4
        assert not is_green(seen)
        assert is_green(np.asarray(slide._handle.associated_images["label"].convert("RGB")))


def test_an_archive_shows_counts_and_slides(archive: Archive) -> None:
    shown = Shown(archive._repr_html_())
    counts = dict(row[:2] for row in shown.rows[1:])
    regions = archive.regions()
    assert counts["ready"] == "3"
    assert counts["regions"] == f"{regions.num_rows:,}"
    assert counts["patches"] == f"{sum(regions['n_patches'].to_pylist()):,}"
    assert "texture" in counts["encoder"]
    ids = archive.slides()["slide_id"].to_pylist()
    assert [name for name, _ in shown.pictures] == ids
    for slide_id, seen in shown.pictures:
        with Slide(archive.slide(slide_id)["uri"]) as slide:
            whole = slide.read(0, 0, max(seen.shape), mpp=0.5 * PX / max(seen.shape))
            assert gap(seen, whole[: seen.shape[0], : seen.shape[1]]) < 8  # JPEG of a JPEG
        assert not is_green(seen)
    assert archive.uri in shown.text


def test_results_show_the_pixels_of_their_places(archive: Archive) -> None:
    region = archive.regions()["region_id"][0].as_py()
    found = find(archive, region=region, k=5)
    assert len(found) == 5
    shown = Shown(found._repr_html_())
    rows = found.rows.to_pylist()
    assert rows[0]["region_id"] == region
    assert len(shown.pictures) == 5
    for row, cells, (name, seen) in zip(rows, shown.rows[1:], shown.pictures, strict=True):
        assert cells[:2] == [str(row["rank"]), f"{row['score']:.3f}"]
        assert cells[3:] == [row["slide_id"], f"{row['x0']}, {row['y0']}", "128"]
        assert row["slide_id"] in name
        side = seen.shape[0]
        with Slide(archive.slide(row["slide_id"])["uri"]) as slide:
            truth = slide.read(row["x0"], row["y0"], side, mpp=0.5 * row["size0"] / side)
        assert gap(seen, truth) < 5


def test_whole_slides_are_shown_by_their_thumbnails(archive: Archive) -> None:
    found = find(archive, slide="plain", level="slide")
    shown = Shown(found._repr_html_())
    assert [cells[3] for cells in shown.rows[1:]] == found.rows["slide_id"].to_pylist()
    assert len(shown.pictures) == 3
    assert not any(is_green(seen) for _, seen in shown.pictures)


def test_results_are_a_data_frame(archive: Archive) -> None:
    found = find(archive, slide="plain", k=4)
    table = found.to_pandas()
    assert table.to_dict("records") == found.rows.to_pylist()
    assert list(table.columns) == found.rows.column_names
    assert "plain" in repr(found)
    assert archive.slides().to_pandas()["slide_id"].tolist() == [
        row["slide_id"] for row in archive.slides().to_pylist()
    ]


def test_a_notebook_does_not_grow_with_the_results(archive: Archive) -> None:
    found = find(archive, slide="plain", k=10_000)
    assert len(found) == archive.regions().num_rows > MAX_ROWS
    html = found._repr_html_()
    shown = Shown(html)
    assert len(shown.rows) == 1 + MAX_ROWS
    assert f"{len(found) - MAX_ROWS} more" in shown.text
    assert len(html) < 600_000
    long = page("t" * 10_000, note="n" * 10_000, columns=["c"], rows=[["x" * 10_000]] * 30)
    assert len(Shown(long).text) < 2 * MAX_TEXT + MAX_ROWS * (MAX_TEXT + 1) + 100


def test_a_slide_that_is_gone_costs_its_pictures_alone(archive: Archive, slides: Path) -> None:
    file = slides / "plain.svs"
    away = file.rename(file.with_suffix(".away"))
    try:
        shown = Shown(find(archive, slide="labelled", k=1000)._repr_html_())
    finally:
        away.rename(file)
    for cells in shown.rows[1:]:
        assert ("any more" in cells[2]) == cells[3].startswith("plain")
    assert len(shown.pictures) == sum(not cells[2] for cells in shown.rows[1:]) > 0


# -- heatmaps --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grounded(tmp_path_factory: pytest.TempPathFactory) -> GroundingResult:
    """A planted lesion, found by a model whose answer is known."""
    made = planted.sample()
    archive = planted.build(tmp_path_factory.mktemp("grounded"), made)
    slide = next(one for one in made if "tumour" in one.lesions and one.mpp == 0.5)
    return ground_slide(archive, planted.planted_run(), slide.name, "tumour", min_patches=1)


def test_boxes_are_a_table_and_a_data_frame(grounded: GroundingResult) -> None:
    document = grounded.as_json()
    assert document["boxes"]
    table = grounded.to_pandas()
    assert list(table.columns) == list(BOX_COLUMNS) == list(document["boxes"][0])
    assert table.to_dict("records") == document["boxes"]
    patches = grounded.to_pandas(of="patches")
    assert patches.to_dict("records") == document["patches"]
    assert list(frame([], BOX_COLUMNS).columns) == list(BOX_COLUMNS)
    without = replace(grounded, slide={"slide_id": grounded.slide["slide_id"], "mpp": 0.5})
    shown = Shown(without._repr_html_())  # as the service asks for it
    assert not shown.pictures
    for box, cells in zip(document["boxes"], shown.rows[1:], strict=True):
        assert cells[1:3] == [f"{box['x0']}, {box['y0']}", f"{box['w0']}, {box['h0']}"]
    assert len(repr(grounded)) < 300


def test_heat_is_drawn_over_the_slide(grounded: GroundingResult) -> None:
    thumbnail = np.full((300, 400, 3), 230, np.uint8)
    row = {"thumbnail": cv2.imencode(".jpg", thumbnail)[1].tobytes(), "thumbnail_mpp": 2.0}
    known = replace(grounded, slide=grounded.slide | row, text=HOSTILE)
    ((name, seen),) = Shown(known._repr_html_()).pictures
    assert HOSTILE in name or "onerror" in name  # as text
    assert gap(seen, known.picture()) < 4
    box = known.boxes[0]
    x, y = (round((at + side / 2) * 0.5 / 2.0) for at, side in ((box.x0, box.w0), (box.y0, box.h0)))
    assert np.abs(seen[y, x].astype(int) - 230).max() > 60  # hot
    assert np.abs(seen[-5, -5].astype(int) - 230).max() < 6  # nothing there
    large = replace(known, slide=known.slide | {
        "thumbnail": cv2.imencode(".jpg", np.full((3000, 4000, 3), 230, np.uint8))[1].tobytes(),
        "thumbnail_mpp": 0.2,
    })  # fmt: skip
    ((_, small),) = Shown(large._repr_html_()).pictures
    assert small.shape == (480, 640, 3)


# -- viewer ----------------------------------------------------------------------------------------


def test_a_frame_is_of_its_address_alone() -> None:
    viewer = Viewer(url=f"http://127.0.0.1:9/#/slide/{HOSTILE}", height=300)
    found: list[tuple[str, dict[str, str | None]]] = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            found.append((tag, dict(attrs)))

    Tags().feed(viewer._repr_html_())
    assert [tag for tag, _ in found] == ["iframe", "p", "a"]
    assert found[0][1]["src"] == found[2][1]["href"] == viewer.url


def test_pandas_is_not_imported_unless_asked() -> None:
    code = (
        "import sys, pathflip.search, pathflip.display, pathflip.viewer, pathflip.slides.slide\n"
        "import pathflip.evaluation.ground_slide\n"
        "print('pandas' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
