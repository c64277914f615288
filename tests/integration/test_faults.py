"""Slides that are damaged, hostile, odd or moving, and readers that die: one run among good ones.

What a run may never do: stop, lose or change a good slide, show a part of a bad one, invent pixels.
No actor raises for a slide, so these runs have theirs in this process; Ray's is the clean one.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import failing_reader, faults
from tests.conftest import Clean, content
from tests.in_threads import in_threads

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

SLOTS_PER_SIDE = 4


def by_place(archive: Path, slide: str) -> dict[tuple[int, int], np.ndarray]:
    """{(column, row) of a patch in the slide's grid: its features} of the patches kept."""
    from pathflip import Archive

    opened = Archive(archive)
    features, mask, _ = opened.features_array(slide)
    regions = opened.regions(slide)
    found = {}
    for index, region in enumerate(regions.to_pylist()):
        for slot in np.flatnonzero(mask[index]):
            row, column = divmod(int(slot), SLOTS_PER_SIDE)
            x, y = region["rx"] * SLOTS_PER_SIDE + column, region["ry"] * SLOTS_PER_SIDE + row
            found[x, y] = features[index, slot]
    return found


def row_of(archive: Path, name: str) -> dict[str, Any]:
    """The one row of the slide at a file of this name."""
    from pathflip import Archive

    rows = [row for row in Archive(archive).slides().to_pylist() if Path(row["uri"]).name == name]
    assert len(rows) == 1, f"{len(rows)} rows for {name!r}"
    return rows[0]


# -- damaged, hostile and odd files ---------------------------------------------------------------

GOOD = ("a.svs", "c.tif", "g.tif")
"""Slides of the clean run that lie among them."""
UNICODE = "Präparat 切片 №7.tif"
NEWLINE = "two\nlines.tif"
LONG = "n" * 251 + ".tif"
LATIN = b"caf\xe9.tif".decode(errors="surrogateescape")

QUARANTINED = {
    "cut-early.svs": {"unreadable"},
    "cut-middle.svs": {"unreadable"},
    "cut-late.svs": {"unreadable"},
    "cut-directory.tif": {"unreadable"},
    "cut-third.tif": {"unreadable", "too_many_bad_tiles"},
    "cut-most.tif": {"unreadable"},
    "ruined.tif": {"too_many_bad_tiles"},
    "bomb-tile.tif": {"reader_limits"},
    "bomb-tile-4gb.tif": {"reader_limits"},
    "bomb-level-70gb.tif": {"reader_limits"},
    "bomb-levels.tif": {"reader_limits"},
    "bomb-loop.tif": {"reader_limits", "unreadable"},
    "no-mpp.tif": {"needs_mpp"},
    "text.svs": {"unreadable"},
    "empty.svs": {"not_a_file"},
    "folder.svs": {"not_a_file"},
    "dangling.svs": {"not_a_file"},
    "loop-1.svs": {"not_a_file"},
    "loop-2.svs": {"not_a_file"},
    "pipe.svs": {"not_a_file"},
}
READY = ("grey.tif", "rgba.tif", "sixteen-bit.tif", UNICODE, NEWLINE, LONG)
EMPTY = ("glass.svs", "one-pixel.tif")


@pytest.fixture(scope="module")
def places(clean: Clean) -> dict[str, list[tuple[int, int]]]:
    """Return the patches the clean run kept of slides whose patches are their tiles."""
    return {
        Path(entry["row"]["uri"]).stem: sorted(by_place(clean.archive, slide))
        for slide, entry in clean.content.items()
    }


@pytest.fixture(scope="module")
def zoo(
    slides: Path, places: dict[str, list[tuple[int, int]]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder of everything that can be wrong with a slide."""
    from pathflip import Slide
    from pathflip.synth import make_slide

    folder = tmp_path_factory.mktemp("zoo")
    whole = (slides / "a.svs").read_bytes()
    for name, size in {"early": len(whole) // 10, "middle": len(whole) // 2, "late": -200}.items():
        (folder / f"cut-{name}.svs").write_bytes(whole[:size])
    first = folder.parent / "first.tif"
    faults.directory_first(slides / "e.tif", first)
    whole = first.read_bytes()
    for name, size in {"directory": 100, "third": len(whole) // 3, "most": -(10**6)}.items():
        (folder / f"cut-{name}.tif").write_bytes(whole[:size])

    tiles = [row * 16 + column for column, row in places["e"]]
    faults.overwrite(slides / "e.tif", folder / "dented.tif", tiles[10:60:20])
    faults.overwrite(slides / "e.tif", folder / "ruined.tif", tiles[20:40])
    faults.overwrite(slides / "g.tif", folder / "dented-deflate.tif", [27, 36])
    faults.inflate_tile(slides / "e.tif", folder / "jpeg-bomb.tif", tiles[33])

    for name, declared in {
        "tile": {"width": 65536, "height": 65536, "tile_px": 65536},
        "tile-4gb": {"width": 32768, "height": 32768, "tile_px": 32768},
        "level-70gb": {"width": 300_000, "height": 300_000, "tile_px": 8192},
        "levels": {"width": 8192, "height": 8192, "tile_px": 512, "pages": 200},
        "loop": {"width": 8192, "height": 8192, "tile_px": 512, "loop": True},
    }.items():
        (folder / f"bomb-{name}.tif").write_bytes(faults.bomb(**declared))

    with Slide(slides / "a.svs") as slide:
        pixels = slide.read(500, 500, 1100)
    rgb = {"photometric": "rgb"}
    alpha = np.dstack([pixels[::-1], np.full(pixels.shape[:2], 255, np.uint8)])
    faults.deflated(folder / "grey.tif", pixels[..., 1].copy(), photometric="minisblack")
    faults.deflated(folder / "rgba.tif", alpha, extrasamples=["unassalpha"], **rgb)
    faults.deflated(folder / "sixteen-bit.tif", pixels.astype(np.uint16) * 257, **rgb)
    faults.deflated(folder / "no-mpp.tif", pixels[:, ::-1].copy(), mpp=None, **rgb)
    faults.deflated(folder / "one-pixel.tif", pixels[:1, :1].copy(), **rgb)
    make_slide(folder / "glass.svs", width=1024, height=1024, mpp=0.5, layout="aperio",
               tissue="glass")  # fmt: skip

    for turn, name in enumerate((UNICODE, NEWLINE, LONG)):
        make_slide(folder / f"{turn}.tif", width=1024, height=1024, mpp=0.5, seed=50 + turn)
        os.rename(folder / f"{turn}.tif", folder / name)
    (folder / "text.svs").write_text("patient;diagnosis\n" * 100)
    (folder / "empty.svs").touch()
    (folder / "folder.svs").mkdir()
    (folder / "dangling.svs").symlink_to(folder / "nowhere.svs")
    (folder / "loop-1.svs").symlink_to(folder / "loop-2.svs")
    (folder / "loop-2.svs").symlink_to(folder / "loop-1.svs")
    (folder / "again").symlink_to(folder)
    os.mkfifo(folder / "pipe.svs")
    return folder


@pytest.fixture(scope="module")
def flipped(slides: Path, zoo: Path) -> list[tuple[int, int]]:
    """Tiles of ``flipped.svs`` that have wrong bits, as (column, row)."""
    tiles = faults.flip_bits(slides / "d.svs", zoo / "flipped.svs", bits=24, tiles=6, seed=7)
    return [(tile % 16, tile // 16) for tile in tiles]


@pytest.fixture(scope="module")
def among_good(
    slides: Path,
    zoo: Path,
    flipped: list[tuple[int, int]],
    job_here: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Any]:
    """Good slides and the zoo in one run: (archive, result)."""
    archive = tmp_path_factory.mktemp("among") / "archive"
    good = [slides / name for name in GOOD]
    return archive, job_here([*good, zoo], archive, "plan_timeout_s=20", "read_timeout_s=20")


def test_good_slides_are_as_in_a_clean_run(clean: Clean, among_good: tuple[Path, Any]) -> None:
    """Bit for bit, whatever lies beside them."""
    found = content(among_good[0])
    good = {s: e for s, e in clean.content.items() if Path(e["row"]["uri"]).name in GOOD}
    assert len(good) == len(GOOD)
    for slide, expected in good.items():
        assert found[slide] == expected


def test_exit_code_and_counts(zoo: Path, among_good: tuple[Path, Any]) -> None:
    """One row each: nothing is skipped in silence, and the run says 3."""
    from pathflip import Archive

    archive, result = among_good
    rows = Archive(archive).slides().to_pylist()
    assert result.exit_code == 3
    assert (
        len(rows)
        == sum(result.slides.values())
        == len(GOOD) + len([name for name in os.listdir(zoo) if name != "again"])
    )
    for status in ("ready", "empty", "quarantined"):
        assert sum(row["status"] == status for row in rows) == result.slides[status]


@pytest.mark.parametrize("name", QUARANTINED)
def test_bad_slide_is_quarantined_with_its_reason(name: str, among_good: tuple[Path, Any]) -> None:
    from pathflip.errors import REASONS

    row = row_of(among_good[0], name)
    assert row["status"] == "quarantined"
    assert row["reason"] in QUARANTINED[name] & set(REASONS)
    assert row["stage"] in ("hash", "plan", "read")
    assert len(row["message"]) > 20
    assert row["n_regions"] == row["n_patches"] == 0


@pytest.mark.parametrize("name", READY)
def test_odd_slide_is_ingested(name: str, among_good: tuple[Path, Any]) -> None:
    row = row_of(among_good[0], name)
    assert row["status"] == "ready", row["message"]
    values = np.stack(list(by_place(among_good[0], row["slide_id"]).values()))
    assert np.isfinite(values).all()
    assert values.any(axis=1).all()


@pytest.mark.parametrize("name", EMPTY)
def test_slide_without_tissue_is_empty(name: str, among_good: tuple[Path, Any]) -> None:
    row = row_of(among_good[0], name)
    assert row["status"] == "empty", row["message"]
    assert row["n_regions"] == 0


@pytest.mark.parametrize(
    ("name", "origin", "bad"),
    [("dented.tif", "e.tif", 3), ("dented-deflate.tif", "g.tif", 2), ("jpeg-bomb.tif", "e.tif", 1)],
)
def test_damaged_tiles_are_masked_and_the_rest_unchanged(
    name: str,
    origin: str,
    bad: int,
    clean: Clean,
    slides: Path,
    zoo: Path,
    among_good: tuple[Path, Any],
) -> None:
    """No white, grey or neighbouring pixels in place of what cannot be read."""
    row = row_of(among_good[0], name)
    assert (row["status"], row["tiles_bad"]) == ("ready", bad), row["message"]
    found = by_place(among_good[0], row["slide_id"])
    whole = by_place(clean.archive, row_of(clean.archive, origin)["slide_id"])
    across, before = faults.tile_spans(slides / origin)
    raw, ours = (slides / origin).read_bytes(), (zoo / name).read_bytes()
    differ = {
        (tile % across, tile // across)
        for tile, (at, count) in enumerate(before)
        if raw[at : at + count] != ours[at : at + count]
    }
    assert len(differ) == bad
    assert set(whole) - set(found) == differ
    assert all(np.array_equal(found[place], whole[place]) for place in found)


def test_flipped_bits_harm_only_their_own_patches(
    clean: Clean,
    flipped: list[tuple[int, int]],
    among_good: tuple[Path, Any],
) -> None:
    """A flip may decode without a word; what it did not touch stays as it was."""
    from pathflip.encoders import load_encoder

    row = row_of(among_good[0], "flipped.svs")
    whole = by_place(clean.archive, row_of(clean.archive, "d.svs")["slide_id"])
    if row["status"] == "quarantined":
        assert row["reason"] == "too_many_bad_tiles"
        return
    found = by_place(among_good[0], row["slide_id"])
    lost = set(whole) - set(found)
    assert lost <= set(flipped)
    assert row["tiles_bad"] == len(lost)
    white = load_encoder("texture", device="cpu")(np.full((1, 256, 256, 3), 255, np.uint8))[0]
    for place, values in found.items():
        if place in flipped:
            assert np.abs(values - white).max() > 0.05
        else:
            assert np.array_equal(values, whole[place])


def test_bombs_are_refused_before_any_pixel(zoo: Path) -> None:
    """The reader process that met them all still answers and stayed small."""
    from pathflip.errors import SlideError
    from pathflip.geometry import Tiling
    from pathflip.slides.reader import SlideReader

    def readers() -> set[int]:
        return {
            pid
            for pid in faults.descendants(os.getpid())
            if faults.parent(pid) == os.getpid()
            and "pathflip.slides.reader" in faults.command_line(pid)
        }

    others = readers()  # of tests before this one
    with SlideReader(patches=1, px=16) as reader:
        for bomb in sorted(zoo.glob("bomb-*.tif")):
            with pytest.raises(SlideError):
                reader.plan(str(bomb), tiling=Tiling(), mpp=0.5, timeout_s=10)
        (pid,) = readers() - others
        assert faults.resident_bytes([pid]) < 500 << 20
    assert not faults.alive(pid)


def test_file_without_permission_is_not_a_file(slides: Path, tmp_path: Path) -> None:
    from pathflip.errors import SlideError
    from pathflip.slides.reader import SlideReader

    if os.geteuid() == 0:
        pytest.skip("root may read any file")
    locked = tmp_path / "locked.svs"
    locked.write_bytes((slides / "a.svs").read_bytes())
    locked.chmod(0)
    with SlideReader(patches=1, px=16) as reader, pytest.raises(SlideError) as raised:
        reader.digest(str(locked), timeout_s=20)
    assert raised.value.code == "not_a_file"


# -- mending --------------------------------------------------------------------------------------


def test_same_run_again_tries_nothing_again(
    slides: Path, zoo: Path, job_here: Callable[..., Any], among_good: tuple[Path, Any]
) -> None:
    archive, before = among_good
    again = job_here([*(slides / name for name in GOOD), zoo], archive)
    assert again.exit_code == 0
    assert again.slides["skipped"] == sum(before.slides.values())
    assert again.regions == 0


def test_what_was_wrong_is_mended_later(
    zoo: Path,
    job_here: Callable[..., Any],
    among_good: tuple[Path, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A CSV that gives the scale, and a file copied again followed by ``slides retry``."""
    import json

    from pathflip import Archive
    from pathflip.cli import main
    from pathflip.synth import make_slide

    archive, _ = among_good
    table = zoo.parent / "mpp.csv"
    table.write_text("slide,mpp\nno-mpp,0.5\n")
    result = job_here(zoo, archive, f"mpp_csv={table}", "plan_timeout_s=20")
    assert result.slides["ready"] == 1
    row = row_of(archive, "no-mpp.tif")
    assert (row["status"], row["mpp"], row["mpp_source"]) == ("ready", 0.5, "override")

    make_slide(zoo / "cut-early.svs", width=1024, height=1024, mpp=0.5, layout="aperio", seed=70)
    before = {row["slide_id"] for row in Archive(archive).slides("quarantined").to_pylist()}
    capsys.readouterr()
    old = row_of(archive, "cut-early.svs")["slide_id"]
    with in_threads(), pytest.raises(SystemExit) as ended:
        main(["slides", "retry", old, "--archive", str(archive), "--json"])
    document = json.loads(capsys.readouterr().out)
    assert ended.value.code == 0
    assert (document["retried"], document["slides"]["ready"]) == (1, 1)
    assert row_of(archive, "cut-early.svs")["status"] == "ready"
    after = {row["slide_id"] for row in Archive(archive).slides("quarantined").to_pylist()}
    assert before - after == {old}


# -- readers that die or hang, slides that move ---------------------------------------------------

VICTIMS = {
    "abort-plan.tif": ("plan", "abort"),
    "abort-read.tif": ("read", "abort"),
    "hang-read.tif": ("read", "hang"),
    "swapped.tif": ("read", "swap"),
    "deleted.tif": ("read", "delete"),
}


@pytest.fixture(scope="module")
def storm(
    slides: Path, job_here: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, list[int]]]:
    """Three good slides and five victims in one run: (archive, {victim: readers that failed})."""
    from pathflip import Archive
    from pathflip.synth import make_slide

    folder = tmp_path_factory.mktemp("storm")
    for turn, name in enumerate([*VICTIMS, ".swapped.tif.new"]):
        make_slide(folder / name, width=1024, height=1024, mpp=0.5, seed=80 + turn)
    with suppress(OSError):  # a file system that takes only Unicode names has no such problem
        make_slide(folder / "x.tif", width=1024, height=1024, mpp=0.5, seed=60)
        os.rename(folder / "x.tif", folder / LATIN)
    latin = (folder / LATIN).exists()
    archive = folder / "archive"
    good = [slides / name for name in GOOD]
    failures = tmp_path_factory.mktemp("failures") / "of"
    with failing_reader.failing(failures, VICTIMS):
        result = job_here([*good, folder], archive, "read_timeout_s=8")
    rows = Archive(archive).slides(columns=["uri", "status", "message"]).to_pylist()
    assert result.slides == {
        "ready": 3, "quarantined": 5 + latin, "empty": 0, "skipped": 0,
    }, rows  # fmt: skip
    assert result.exit_code == 3
    return archive, failing_reader.failed(failures)


@pytest.mark.parametrize(
    ("name", "reason", "attempts"),
    [
        ("abort-plan.tif", "reader_crash", 3),
        ("abort-read.tif", "reader_crash", 3),
        ("hang-read.tif", "timeout", 3),
        ("swapped.tif", "source_changed", 1),
        ("deleted.tif", "source_changed", 1),
    ],
)
def test_victim_is_quarantined(
    name: str, reason: str, attempts: int, storm: tuple[Path, dict[str, list[int]]]
) -> None:
    """After three attempts, or at once where another attempt would mix two slides."""
    archive, failed = storm
    row = row_of(archive, name)
    assert (row["status"], row["reason"]) == ("quarantined", reason), row["message"]
    assert row["attempts"] == len(failed[name]) == attempts
    if reason == "reader_crash":
        assert signal.Signals.SIGABRT.name in row["message"]
    assert row["n_regions"] == 0


def test_name_that_is_no_unicode(storm: tuple[Path, dict[str, list[int]]]) -> None:
    """Names are bytes on Linux; such a slide is shown in the archive, not fatal."""
    if not (storm[0].parent / LATIN).exists():
        pytest.skip("this file system takes only Unicode names")
    row = row_of(storm[0], "caf\\xe9.tif")
    assert (row["status"], row["reason"]) == ("quarantined", "unsupported")


def test_others_are_unharmed_by_the_storm(
    clean: Clean, storm: tuple[Path, dict[str, list[int]]]
) -> None:
    found = content(storm[0])
    assert {Path(entry["row"]["uri"]).name for entry in found.values()} == set(GOOD)
    for slide, entry in found.items():
        assert entry == clean.content[slide]


def test_no_failed_reader_is_left_behind(storm: tuple[Path, dict[str, list[int]]]) -> None:
    ended = ("abort-plan.tif", "abort-read.tif", "hang-read.tif")
    pids = [pid for name in ended for pid in storm[1][name]]
    assert len(set(pids)) == 9
    assert not any(faults.alive(pid) for pid in pids)
