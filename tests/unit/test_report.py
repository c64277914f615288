"""The HTML pages: what they show, where they draw it, and that nothing in them can act."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
import subprocess
from dataclasses import asdict
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import cv2
import numpy as np
import pyarrow as pa
import pytest

from pathflip.archive import Archive
from pathflip.archive.commit import Committer
from pathflip.archive.create import create_archive
from pathflip.archive.fragments import write_fragment
from pathflip.archive.schema import slides_schema
from pathflip.geometry import Tiling
from pathflip.report import SampleSearch, write_report, write_results
from pathflip.slides.reader import SlideReader
from pathflip.slides.sources import stat_source
from pathflip.slides.tissue import TissueMask
from pathflip.synth import make_slide

TILING = Tiling(region_um=512.0, patch_um=256.0, mpp=0.5)
SLOTS, DIM = 4, 3
HOSTILE = "/in/<script>alert(1)</script>\"'onload=alert(2) x='&lt;.svs"
VOID = {"meta", "link", "img", "input", "br"}


class Page(HTMLParser):
    """Elements in order, each (name, attributes, text inside); fails on badly nested tags."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str], list[str]]] = []
        self._open: list[tuple[str, dict[str, str], list[str]]] = []
        self.feed(self.source)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = (tag, {name: value or "" for name, value in attrs}, [""])
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}, [""]))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        for element in self._open:
            element[2][0] += data

    def all(self, tag: str, css: str = "") -> list[tuple[dict[str, str], str]]:
        """(attributes, text) of the elements of a tag and class."""
        return [
            (attributes, " ".join(text[0].split()))
            for name, attributes, text in self.elements
            if name == tag and (not css or css in attributes.get("class", "").split())
        ]


def jpeg(width: int, height: int) -> bytes:
    bgr = np.full((height, width, 3), 240, np.uint8)
    bgr[height // 4 : height // 2, width // 4 : width // 2] = (190, 70, 120)
    return bytes(cv2.imencode(".jpg", bgr)[1].tobytes())


def slide_row(name: str, **values: Any) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(slides_schema().names[:-1])
    mask = np.zeros((100, 120), np.bool_)
    mask[10:40, 20:70] = True
    row |= {
        "slide_id": name,
        "uri": f"/in/{name}.svs",
        "aliases": [],
        "status": "ready",
        "bytes": 12_300_000,
        "mtime_ns": 1,
        "vendor": "aperio",
        "width": 3000,
        "height": 2500,
        "levels": 3,
        "mpp": 0.3,
        "mpp_source": "metadata",
        "bounds_x0": 0,
        "bounds_y0": 0,
        "reader": "direct",
        "reader_note": "",
        "n_regions": 0,
        "n_patches": 0,
        "tiles_ok": 0,
        "tiles_bad": 0,
        "attempts": 1,
        "fingerprint": name,
        "encoders": [],
        "tissue_png": TissueMask(mask, 8.0, 0.3).to_png(),
        "tissue_mpp": 8.0,
        "tissue_mm2": 0.096,
        "thumbnail": jpeg(300, 250),
        "thumbnail_mpp": 3.0,
        "seconds": 2.0,
        "ingested_at": datetime(2026, 5, 4, tzinfo=UTC),
    }
    return row | values


def commit(uri: str, rows: list[dict[str, Any]], grid: list[tuple[int, int]]) -> None:
    """Every ready row gets the regions of ``grid``, each with 3 of its 4 patches."""
    create_archive(uri, tiling=asdict(TILING))
    regions: list[dict[str, Any]] = []
    vectors: list[dict[str, Any]] = []
    for row in rows:
        if row["status"] != "ready":
            continue
        n = len(grid)
        row |= {"n_regions": n, "n_patches": 3 * n, "tiles_ok": 3 * n, "encoders": ["toy"]}
        same = {"slide_id": row["slide_id"], "mpp": row["mpp"], "tissue_fraction": 0.7}
        size0 = round(TILING.region_um / row["mpp"])
        for rx, ry in grid:
            at = {"x0": rx * size0, "y0": ry * size0, "size0": size0, "n_patches": 3} | same
            key = f"{row['slide_id']}/{rx}_{ry}"
            scores = {
                "patch_mask": [1, 1, 0, 1],
                "patch_tissue": [0.6, 1.0, 0.0, 0.9],
                "patch_blur": [0.1, 0.3, 0.0, 0.2],
                "patch_pen": [0.0, 0.0, 0.0, 0.3],
            }
            regions.append({"region_id": key, "rx": rx, "ry": ry, "n_bad": 0} | scores | at)
            vectors.append({"id": key, "kind": "region"} | at)
        where = {"x0": 0, "y0": 0, "size0": row["width"], "n_patches": 3 * n} | same
        vectors.append({"id": row["slide_id"], "kind": "slide"} | where)
    for vector in vectors:
        vector |= {"patient_id": None, "vector": [1.0, 0.0, 0.0]}
    with Committer(uri) as committer:
        table = committer.ensure_encoder_table(
            "toy", revision="1", dim=DIM, mpp=None, licence="none"
        )
        features = [
            {
                "region_id": r["region_id"],
                "slide_id": r["slide_id"],
                "features": [0.0] * (SLOTS * DIM),
            }
            for r in regions
        ]
        names = [name for name in slides_schema().names if name != "checksum"]
        fields = pa.schema([slides_schema().field(name) for name in names])
        committer.commit(
            slides=pa.Table.from_pylist(rows, schema=fields),
            regions=fixed(regions) if regions else None,
            embeddings={"toy": fixed(vectors)} if vectors else None,
            fragments={"toy": [write_fragment(uri, table, fixed(features))]} if regions else None,
        )


def fixed(rows: list[dict[str, Any]]) -> pa.Table:
    """Rows as a table whose lists have a fixed size."""
    columns = {}
    for name, first in rows[0].items():
        values = [row[name] for row in rows]
        kind = pa.list_(pa.float32(), len(first)) if isinstance(first, list) else None
        columns[name] = pa.array(values, kind or (pa.string() if first is None else None))
    return pa.table(columns)


def results(*rows: tuple[str, str | None, int, int, int]) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {"rank": i, "score": 1 - i / 100, "slide_id": s, "region_id": r, "x0": x, "y0": y,
             "size0": size, "mpp": 0.5}
            for i, (s, r, x, y, size) in enumerate(rows, start=1)
        ]
    )  # fmt: skip


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    """Two ready slides (one with a file and a planted label), one empty, two quarantined."""
    folder = tmp_path_factory.mktemp("report")
    file = make_slide(folder / "real.svs", width=2100, height=1100, mpp=0.5, layout="aperio")
    found = stat_source(file)
    real = slide_row(
        "real", uri=str(file), bytes=found.bytes, mtime_ns=found.mtime_ns, width=2100, height=1100,
        mpp=0.5, thumbnail=jpeg(210, 110), thumbnail_mpp=5.0,
    )  # fmt: skip
    rows = [
        slide_row("plain", reader="openslide", reader_note="JPEG 2000 tiles", tiles_bad=2),
        real,
        slide_row("glass", status="empty", uri=HOSTILE, message="No region has enough tissue."),
        slide_row("cut", status="quarantined", reason="unreadable", message="<b>torn</b>"),
        slide_row("blind", status="quarantined", reason="needs_mpp", uri=HOSTILE, mpp=None),
    ]
    uri = str(folder / "archive")
    commit(uri, rows, [(0, 0), (2, 1)])
    return Archive(uri)


def test_every_slide_is_shown_where_it_belongs(archive: Archive, tmp_path: Path) -> None:
    page = Page(write_report(archive, tmp_path / "deep" / "report.html"))
    cards = page.all("article", "card")
    assert [re.search(r"(plain|real)", text)[0] for _, text in cards] == ["plain", "real"]  # type: ignore[index]
    plain = cards[0][1]
    assert "2 regions 6 patches" in plain
    assert "OpenSlide: JPEG 2000 tiles" in plain
    assert "0.3 µm/px, from the file's metadata" in plain
    assert "3,000 × 2,500 px = 0.900 × 0.750 mm" in plain
    assert "2.0 s (3 patches/s)" in plain
    assert "median 0.20" in plain  # of 0.1, 0.3, 0.2; the masked slot's 0 does not count
    assert "10.0 % of the patches' area, 2 marked" in plain
    assert "direct JPEG tiles" in cards[1][1]
    bad = [text for attributes, text in page.all("tr", "bad")]
    assert len(bad) == 2
    assert "needs_mpp" in bad[0]
    assert "--mpp-csv" in bad[0]
    assert "<b>torn</b>" in bad[1]
    assert f"pathflip slides retry cut --archive {archive.uri}" in bad[1]
    totals = " ".join(text for _, text in page.all("dl", "totals"))
    assert "slides ready2 regions4512 µm patches12256 µm at 0.5 µm/px" in totals
    assert "2 ready 1 empty 2 quarantined" in page.all("figcaption")[0][1]


def test_regions_and_tissue_are_drawn_in_place(archive: Archive, tmp_path: Path) -> None:
    page = Page(write_report(archive, tmp_path / "report.html"))
    drawings = [attributes for attributes, _ in page.all("svg", "slide")]
    assert [d["viewbox"] for d in drawings[-3:-1]] == ["0 0 3000 2500", "0 0 2100 1100"]
    boxes = [
        tuple(int(a[key]) for key in ("x", "y", "width", "height"))
        for a, _ in page.all("rect", "region")
    ]
    # 512 µm at 0.3 µm/px: grid lines at 0, 1706.67, 3413.33, 5120; at 0.5 every 1024.
    assert boxes[:2] == [(0, 0, 1707, 1707), (3413, 1707, 1707, 1706)]
    assert boxes[2:] == [(0, 0, 1024, 1024), (2048, 1024, 1024, 1024)]
    images = [a for name, a, _ in page.elements if name == "image"]
    plain, real = images[-3:-1]  # then the empty slide's
    assert (float(plain["width"]), float(plain["height"])) == (3000, 2500)
    assert (float(real["width"]), float(real["height"])) == (2100, 1100)
    # The mask's rectangle: columns 20 to 70 and rows 10 to 40 of 8 µm, at 0.3 µm/px.
    path = page.all("path", "tissue")[0][0]["d"]
    points = {tuple(map(int, point)) for point in re.findall(r"(\d+) (\d+)", path)}
    assert points == {(533, 267), (1867, 267), (1867, 1067), (533, 1067)}


def test_a_thumbnail_that_reaches_beyond_the_slide_is_not_squeezed(tmp_path: Path) -> None:
    uri = str(tmp_path / "archive")
    commit(uri, [slide_row("odd", width=2990, thumbnail=jpeg(300, 250))], [(0, 0)])
    page = Page(write_report(uri, tmp_path / "report.html"))
    (image,) = [a for name, a, _ in page.elements if name == "image"]
    assert float(image["width"]) == 3000  # 300 px of 3 µm, though the slide ends at 2990


@pytest.fixture(scope="module")
def pages(archive: Archive, tmp_path_factory: pytest.TempPathFactory) -> list[Page]:
    folder = tmp_path_factory.mktemp("pages")
    found = results(("real", "real/0_0", 0, 0, 1024), ("plain", None, 0, 0, 3000))
    hostile = SampleSearch(title=HOSTILE, results=found, picture=jpeg(32, 32))
    return [
        Page(write_report(archive, folder / "a.html", searches=[hostile], title=HOSTILE)),
        Page(write_results(archive, found, folder / "b.html", title=HOSTILE)),
    ]


def test_hostile_names_stay_text(pages: list[Page]) -> None:
    for page in pages:
        assert "script" not in {name for name, _, _ in page.elements}
        assert HOSTILE in page.all("h1")[0][1]
        handlers = [k for _, a, _ in page.elements for k in a if k.startswith("on")]
        assert handlers == []
    assert HOSTILE.rpartition("/")[2] in " ".join(text for _, text in pages[0].all("th"))


def test_pages_need_nothing_and_allow_nothing(pages: list[Page]) -> None:
    for page in pages:
        targets = [
            a[key] for _, a, _ in page.elements for key in ("src", "href", "action") if key in a
        ]
        assert targets
        own = ("data:image/", "#", "a-files/")
        assert all(t.startswith(own) or t == "data:," for t in targets)
        assert not re.search(r"https?://|url\(|@import", page.source)
        assert not any("style" in a for _, a, _ in page.elements)  # the policy would drop it
        assert len(page.all("style")) == 1
        policy = next(a["content"] for a, _ in page.all("meta") if "http-equiv" in a)
        raw = re.search(r"<style>(.*?)</style>", page.source, re.DOTALL)[1]  # type: ignore[index]
        digest = base64.b64encode(hashlib.sha256(raw.encode()).digest()).decode()
        assert f"style-src 'sha256-{digest}'" in policy
        beside = " 'self' file:" if page is pages[0] else ""  # its thumbnails, and no host's
        assert policy.startswith(f"default-src 'none'; img-src data:{beside};")


def test_every_picture_has_words(pages: list[Page]) -> None:
    for page in pages:
        assert all(a.get("alt") for a, _ in page.all("img"))
        assert all(a.get("aria-label") for a, _ in page.all("svg") if "viewbox" in a)
        assert page.all("html")[0][0]["lang"] == "en"
        ids = [a["id"] for _, a, _ in page.elements if "id" in a]
        assert len(ids) == len(set(ids))
        links = [a["href"][1:] for a, _ in page.all("a")]
        assert set(links) <= set(ids)


def decoded(uri: str) -> Any:
    return cv2.imdecode(np.frombuffer(base64.b64decode(uri.partition(",")[2]), np.uint8), 1)


def test_a_hit_shows_its_own_pixels(archive: Archive, tmp_path: Path) -> None:
    found = results(("real", "real/2_1", 512, 256, 512), ("plain", None, 0, 0, 3000))
    path = write_results(archive, found, tmp_path / "r.html", query_picture=jpeg(20, 20), title="?")
    page = Page(path)
    pictures = page.all("img")
    assert [a["alt"] for a, _ in pictures] == [
        "The query image",
        "Result 1: region of real at 512, 256",
        "One patch of result 1",
    ]
    file = archive.slide("real")["uri"]
    with SlideReader(patches=1, px=16) as reader:
        truth = reader.view(file, x0=512, y0=256, size0=512, px=320)
        # Slot 1 has 1.0 - 0.3, slot 3 has 0.9 - 0.2: the first of equals; at column 1, row 0.
        patch = reader.view(file, x0=2048 + 512, y0=1024, size0=512, px=128)
    assert np.array_equal(
        decoded(pictures[1][0]["src"]), cv2.imdecode(np.frombuffer(truth, np.uint8), 1)
    )
    assert np.array_equal(
        decoded(pictures[2][0]["src"]), cv2.imdecode(np.frombuffer(patch, np.uint8), 1)
    )
    (here,) = [a for a, _ in page.all("rect", "here")]
    assert [here[key] for key in ("x", "y", "width", "height")] == ["512", "256", "512", "512"]
    hit = page.all("li", "hit")[0][1]
    assert "512, 256 px" in hit
    assert "256, 128 µm" in hit
    assert "512 px = 256 µm" in hit
    assert "score 0.990" in hit


def test_a_missing_or_changed_slide_costs_only_its_pictures(
    archive: Archive, tmp_path: Path
) -> None:
    file = Path(archive.slide("real")["uri"])
    found = results(("plain", "plain/0_0", 0, 0, 1707), ("real", "real/0_0", 0, 0, 1024))
    status = file.stat()
    try:
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        page = Page(write_results(archive, found, tmp_path / "r.html"))
    finally:
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    hits = [text for _, text in page.all("li", "hit")]
    assert "is not at /in/plain.svs any more" in hits[0]
    assert "is not the file that was ingested any more" in hits[1]
    assert page.all("img") == []


def test_label_and_macro_never_appear(tmp_path: Path) -> None:
    """A slide whose label and macro are pure green, the colour no tissue has."""
    import tifffile

    file = tmp_path / "s.svs"
    rng = np.random.default_rng(0)
    tissue = rng.integers(90, 200, (1200, 1200, 3)).astype(np.uint8)
    tissue[..., 1] //= 2
    green = np.zeros((300, 300, 3), np.uint8)
    green[..., 1] = 255
    with tifffile.TiffWriter(file) as tiff:
        aperio = "Aperio Image Library v1.0\n1200x1200 |AppMag = 20|MPP = 0.5"
        tiff.write(tissue, tile=(256, 256), photometric="rgb", description=aperio, metadata=None)
        tiff.write(tissue[::2, ::2], photometric="rgb", description=aperio, metadata=None)
        for name, kind in (("label", 1), ("macro", 9)):
            text = f"Aperio Image Library v1.0\n{name} 300x300"
            tiff.write(green, photometric="rgb", description=text, metadata=None, subfiletype=kind)
    import openslide

    with openslide.OpenSlide(file) as slide:
        assert {"label", "macro"} <= set(slide.associated_images)
    with SlideReader(patches=1, px=16) as reader:
        plan = reader.plan(str(file), tiling=TILING, timeout_s=60)
    source = stat_source(file)
    row = slide_row("s", uri=str(file), bytes=source.bytes, mtime_ns=source.mtime_ns) | plan.info
    row |= {"thumbnail": plan.thumbnail, "tissue_png": plan.tissue_png}
    uri = str(tmp_path / "archive")
    commit(uri, [row], [(0, 0)])
    found = results(("s", "s/0_0", 0, 0, 1024), ("s", None, 0, 0, 1200))
    page = Page(
        write_report(uri, tmp_path / "r.html", searches=[SampleSearch(title="q", results=found)])
    )
    images = [a["href"] for name, a, _ in page.elements if name == "image"]
    images += [a["src"] for a, _ in page.all("img")]
    assert len(images) == 5
    for image in images:
        beside = cv2.imread(str(tmp_path / image)) if image.startswith("r-files/") else None
        pixels = decoded(image) if beside is None else beside
        blue, mid, red = (pixels[..., c].astype(int) for c in range(3))
        assert not ((mid - np.maximum(blue, red)) > 60).any()


def test_an_archive_without_slides(tmp_path: Path) -> None:
    uri = create_archive(str(tmp_path / "archive"), tiling=asdict(TILING)).uri
    page = Page(write_report(uri, tmp_path / "report.html"))
    assert page.all("article") == []
    assert "No slide is ready yet" in page.source
    assert page.all("table") == []
    empty = results(("a", None, 0, 0, 1)).slice(0, 0)
    assert "Nothing was found" in write_results(uri, empty, tmp_path / "s.html").read_text()


def test_many_slides_are_bounded_and_the_newest_are_shown(tmp_path: Path) -> None:
    rows = [
        slide_row(f"s{i:03}", ingested_at=datetime(2026, 1, 1 + i % 28, 0, i // 28, tzinfo=UTC))
        for i in range(40)
    ]
    rows += [slide_row(f"q{i}", status="quarantined", reason="new_reason") for i in range(12)]
    uri = str(tmp_path / "archive")
    commit(uri, rows, [(0, 0)])
    page = Page(write_report(uri, tmp_path / "report.html", max_slides=10))
    shown = [text for _, text in page.all("h3")]
    newest = sorted(rows[:40], key=lambda row: row["ingested_at"])[-10:]
    assert shown == sorted(row["slide_id"] for row in newest)
    assert "The 10 ingested last are shown, of 40." in page.source
    assert "The 10 ingested last are shown, of 12." in page.source
    assert not list(tmp_path.glob(".*.partial"))


def test_a_page_has_a_hundred_slides_and_none_grows(tmp_path: Path) -> None:
    rows = [slide_row(f"s{i:03}") for i in range(201)]
    uri = str(tmp_path / "archive")
    commit(uri, rows, [(0, 0)])
    (tmp_path / "out").mkdir()
    first = write_report(
        uri, tmp_path / "out" / "slides.html", coming={"later #1.html": "what is <b>found</b>"}
    )
    names = ["slides.html", "slides-2.html", "slides-3.html"]
    assert sorted(p.name for p in first.parent.iterdir()) == sorted([*names, "slides-files"])
    pages = [Page(first.parent / name) for name in names]
    assert [len(page.all("article")) for page in pages] == [100, 100, 1]
    shown = [text for page in pages for _, text in page.all("h3")]
    assert shown == [row["slide_id"] for row in rows]
    for number, page in enumerate(pages):
        turns = [a["href"] for a, _ in page.all("a") if not a["href"].startswith("#")]
        others = [name for name in names if name != names[number]]
        soon = ["later%20%231.html"] if number == 0 else []
        assert turns == soon + others * (1 if number == 0 else 2)
        assert len(page.source) < 3_000_000
    assert "what is &lt;b&gt;found" in pages[0].source
    assert "file:" not in write_results(uri, results(), tmp_path / "s.html").read_text()


def test_thumbnails_lie_beside_the_page(archive: Archive, tmp_path: Path) -> None:
    page = Page(write_report(archive, tmp_path / "a report.html"))
    images = [a["href"] for name, a, _ in page.elements if name == "image"]
    beside = [unquote(href) for href in images if not href.startswith("data:")]
    assert beside == [f"a report-files/{n:04}.jpg" for n in range(1, len(beside) + 1)]
    assert len(beside) == len(page.all("article")) > 0
    for name in beside:
        picture = cv2.imread(str(tmp_path / name))
        # The square of `jpeg`, in its place.
        height, width = picture.shape[:2]
        assert (
            np.abs(picture[height * 3 // 8, width * 3 // 8].astype(int) - (190, 70, 120)).max() < 14
        )


def test_a_browser_draws_it(archive: Archive, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no chromium on this machine")
    page = write_report(archive, tmp_path / "report.html")
    picture = tmp_path / "page.png"
    flags = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--hide-scrollbars", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1000,2200",
        f"--screenshot={picture}",
    ]  # fmt: skip
    # No pipe: a process that the browser leaves behind would keep it open.
    silent = subprocess.DEVNULL
    subprocess.run(
        [browser, *flags, page.as_uri()], check=True, stdout=silent, stderr=silent, timeout=120
    )
    shot = cv2.imread(str(picture)).astype(int)
    blue, green, red = shot[..., 0], shot[..., 1], shot[..., 2]
    # The style applies (its policy lets it) and grid, outline and thumbnail are all painted.
    assert ((blue > 160) & (red < 60) & (green < 100)).sum() > 300
    assert ((green > 110) & (red < 40) & (blue < 120)).sum() > 300
    assert ((abs(red - 120) < 14) & (abs(green - 70) < 14) & (abs(blue - 190) < 14)).sum() > 500
