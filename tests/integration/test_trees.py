"""The trees job over the session's archive: read as told, once, whatever happens meanwhile."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

from jobs.worker import from_ipc
from pathflip import Slide
from pathflip.archive import Archive, vectors
from pathflip.archive.commit import Committer
from pathflip.archive.schema import tree_text_id, tree_texts_schema
from pathflip.archive.trees import (
    append_trees,
    ensure_tree_texts,
    read_trees,
    take_features,
    tree_encoders,
    tree_settings,
)
from pathflip.archive.verify import verify
from pathflip.encoders import load_encoder
from pathflip.errors import ArchiveError, ConfigError
from pathflip.geometry import TREE_OFFSETS, TreeSpec, choose_parents, patch_tree
from pathflip.report.trees import write_tree_page
from pathflip.slides.tissue import TissueMask
from tests import faults
from tests.archives import filled
from tests.conftest import listing
from tests.failing_reader import failed, failing
from tests.in_threads import in_threads

if TYPE_CHECKING:
    from tests.conftest import Clean

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

SPEC = TreeSpec(parent_um=256, node_px=128)
SMALL = ("parent_um=256", "node_px=128", "actors=1")
Trees = Callable[..., Any]


@pytest.fixture(scope="module")
def make(cluster: str) -> Trees:
    """``make(archive, *settings, **options)``: the job in this process."""
    from jobs.trees import TreesConfig, trees
    from pathflip.config import load_config

    def run(archive: Path, *settings: str, **options: Any) -> Any:
        return trees(str(archive), load_config(TreesConfig, overrides=settings), **options)

    return run


@pytest.fixture(scope="module")
def second_encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Spec of a small encoder: the mean of each channel, and of the left half of each."""

    class Means(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x.mean((2, 3)), x[..., :112].mean((2, 3))], 1)

    file = tmp_path_factory.mktemp("second") / "means.pt"
    torch.jit.trace(Means(), torch.zeros(1, 3, 224, 224)).save(str(file))
    return f"torchscript:{file}"


def expected_roots(archive: Archive, count: int) -> dict[str, set[tuple[int, int]]]:
    """Choose the roots of every slide, from what the archive says of it."""
    found = {}
    for name in archive.slides("ready", columns=["slide_id"])["slide_id"].to_pylist():
        row = archive.slide(name)
        mask = TissueMask.from_png(row["tissue_png"], mpp=row["tissue_mpp"], slide_mpp=row["mpp"])
        chosen = choose_parents(
            mask, width=row["width"], height=row["height"], mpp=row["mpp"], spec=SPEC,
            count=count, seed=0, slide_id=name, min_tissue=0.5,
        )  # fmt: skip
        found[name] = {(x, y) for x, y in chosen.tolist()}
    return found


def stored_roots(archive: Archive, encoder: str | None = None) -> dict[str, set[tuple[int, int]]]:
    found: dict[str, set[tuple[int, int]]] = {}
    rows = read_trees(archive, columns=["slide_id", "tx", "ty"], encoder=encoder)
    for row in rows.to_pylist():
        assert (row["tx"], row["ty"]) not in found.setdefault(row["slide_id"], set())
        found[row["slide_id"]].add((row["tx"], row["ty"]))
    return found


@pytest.fixture(scope="module")
def made(make: Trees, clean: Clean, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive whose trees were stopped half way, between two tables too, and made again."""
    uri = tmp_path_factory.mktemp("trees") / "a"
    shutil.copytree(clean.archive, uri)
    before = listing(uri)
    plan = make(uri, *SMALL, "per_slide=3", dry_run=True)
    assert listing(uri) == before
    expected = expected_roots(Archive(uri), 3)
    assert plan.trees == sum(map(len, expected.values())) == 3 * 7
    assert plan.slides == {"done": 7, "skipped": 0, "none": 0, "failed": 0}
    assert plan.estimated_hours > 0
    assert plan.problems == {}
    lines = []

    def stop(progress: Any) -> None:
        lines.append(progress.line())
        if progress.done >= 9:
            raise KeyboardInterrupt

    with in_threads(), pytest.raises(KeyboardInterrupt):
        make(uri, *SMALL, "per_slide=3", "commit_s=0", progress=stop)
    assert " left" in lines[1]
    assert "/21 trees" in lines[1]
    archive = Archive(uri)
    done = stored_roots(archive)
    assert len(done) == 3
    assert all(done[slide] == expected[slide] for slide in done)
    # As if it had been killed between the two tables.
    rows = archive.dataset("trees_texture").to_table().slice(0, 2).drop_columns(["checksum"])
    other = sorted(set(expected) - set(done))[0]
    stray = rows.set_column(0, rows.schema.field(0), pa.array([f"{other}/0_0", f"{other}/1_0"]))
    stray = stray.set_column(1, rows.schema.field(1), pa.array([other, other]))
    with Committer(uri) as committer:
        nothing = archive.dataset("trees").schema.empty_table().drop_columns(["checksum"])
        append_trees(committer, nothing, {"trees_texture": stray})
    result = make(uri, "per_slide=3", "actors=1")  # the sizes are the archive's now
    assert (result.trees, result.slides["done"], result.slides["skipped"]) == (12, 4, 3)
    assert result.exit_code == 0
    assert plan.nodes == int((vectors(read_trees(Archive(uri))["node_mask"]) != 0).sum())
    assert result.levels == {"3": 12} or result.levels == {"3": 9, "4": 3}
    return uri


def test_the_chosen_trees_are_there_once(made: Path) -> None:
    archive = Archive(made)
    assert stored_roots(archive) == expected_roots(archive, 3)
    assert stored_roots(archive, "texture") == stored_roots(archive)
    assert archive.dataset("trees_texture").count_rows() == 21
    assert tree_settings(archive) == {
        "parent_um": 256.0, "node_px": 128, "seed": 0, "per_slide": 3, "min_tissue": 0.5,
    }  # fmt: skip
    report = verify(made)
    assert (report.damaged, report.notes) == ([], [])


@pytest.mark.chaos
def test_driver_killed_between_the_tables_then_run_twice_at_once(
    clean: Clean, made: Path, cluster: str, tmp_path: Path
) -> None:
    """One of two runs works and the other says who holds the archive; or both come to the end."""
    uri = Path(shutil.copytree(clean.archive, tmp_path / "a"))
    settings = [word for each in (*SMALL, "per_slide=3", "commit_s=0") for word in ("-o", each)]
    words = ("trees", "--archive", str(uri), "--json", "--address", cluster, *settings)
    run = faults.waiting(*words, table="trees", commits=1)
    try:
        assert run.stdout is not None
        assert run.stdout.readline() == "waiting\n"
    finally:
        run.kill()
        run.communicate()
    archive = Archive(uri)
    assert read_trees(archive).num_rows == 3
    assert archive.dataset("trees_texture").count_rows() == 6, "those of the second slide too"
    assert len(stored_roots(archive, "texture")) == 1

    runs = [faults.pathflip(*words) for _ in range(2)]
    ended = [(*each.communicate(timeout=250), each) for each in runs]
    codes = sorted(each.returncode for _, _, each in ended)
    assert codes in ([0, 2], [0, 0]), [err for _, err, _ in ended]
    for out, err, each in ended:
        if each.returncode == 2:
            (other,) = (one.pid for one in runs if one is not each)
            error = json.loads(out)["error"]
            assert error["code"] == "locked"
            assert str(other) in error["message"]
            assert "Traceback" not in err
    archive, whole = Archive(uri), Archive(made)
    assert read_trees(archive).equals(read_trees(whole))
    rows = [read_trees(one, encoder="texture")["row"].to_numpy() for one in (archive, whole)]
    np.testing.assert_array_equal(take_features(archive, rows[0]), take_features(whole, rows[1]))
    assert archive.dataset("trees_texture").count_rows() == 21
    report = verify(uri)
    assert (report.damaged, report.notes) == ([], [])


def test_every_node_is_what_the_slide_shows_there(made: Path) -> None:
    """A tree of each slide: each node read by itself at its place and level, and embedded."""
    archive = Archive(made)
    encoder = load_encoder("texture")
    rows = read_trees(archive, encoder="texture")
    features = take_features(archive, rows["row"].to_numpy(), encoder="texture")
    levels = set()
    seen: set[str] = set()
    for at, row in enumerate(rows.to_pylist()):
        if row["slide_id"] in seen:
            continue
        seen.add(row["slide_id"])
        slide_row = archive.slide(row["slide_id"])
        tree = patch_tree(row["tx"], row["ty"], mpp=row["mpp"], spec=SPEC)
        mask = np.array(row["node_mask"]) != 0
        levels.add((row["levels"], Path(slide_row["uri"]).name))
        share = tissue_shares(slide_row, tree.rects[0])
        np.testing.assert_allclose(row["node_tissue"], share, atol=0.05)
        there = np.array(row["node_tissue"]) >= 0.05
        there[0], there[(*TREE_OFFSETS, 85)[row["levels"]] :] = True, False
        assert (mask == there).all()
        assert not features[at][~mask].any()
        with Slide(slide_row["uri"], mpp=None) as slide:
            for node in np.flatnonzero(mask)[::7]:
                out = np.zeros((1, SPEC.node_px, SPEC.node_px, 3), np.uint8)
                level = float(tree.mpp[node])
                assert slide.read_patches(tree.rects[0, [node]], mpp=level, out=out).all()
                np.testing.assert_allclose(
                    features[at, node], encoder(out)[0], rtol=2e-3, atol=2e-3
                )
    assert {name for count, name in levels if count == 4} == {"b.tif"}
    assert len(levels) == 7


def tissue_shares(row: dict[str, Any], rects: Any) -> Any:
    """Share of tissue in each rectangle, by counting eighths of the mask's pixels."""
    mask = TissueMask.from_png(row["tissue_png"], mpp=row["tissue_mpp"], slide_mpp=row["mpp"]).mask
    step = row["mpp"] / row["tissue_mpp"]
    fine = np.kron(mask, np.ones((8, 8)))
    shares = []
    for x, y, w, h in (rects * step * 8).round().astype(int).tolist():
        shares.append(fine[y : y + h, x : x + w].mean())
    return np.array(shares)


def test_nothing_is_left_to_do(made: Path, make: Trees) -> None:
    before = listing(made)
    again = make(made, "per_slide=3")
    assert (again.trees, again.slides["skipped"], again.exit_code) == (0, 7, 0)
    assert make(made, "per_slide=2").trees == 0
    assert listing(made) == before
    with pytest.raises(ArchiveError, match="min_tissue") as error:
        make(made, "per_slide=4", "min_tissue=0.4")
    assert error.value.code == "settings"


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "a")


def test_a_further_encoder_slides_left_out_and_more_trees(
    copy: Path, make: Trees, second_encoder: str, tmp_path: Path
) -> None:
    """A slide is gone, one is another file, and one makes each of its readers die."""
    before = read_trees(Archive(copy))
    roots = stored_roots(Archive(copy))
    names = {row["slide_id"]: Path(row["uri"]).name for row in Archive(copy).slides().to_pylist()}
    gone, other, deadly = sorted(roots)[:3]
    row = Archive(copy).slide(other)
    back = {gone: Archive(copy).slide(gone)["uri"], other: row["mtime_ns"]}
    with Committer(copy) as committer:
        committer.update_slides(
            {gone: {"uri": str(copy / "gone.tif")}, other: {"mtime_ns": row["mtime_ns"] + 1}}
        )
    struck = tmp_path / "failing"
    with in_threads(), failing(struck, {names[deadly]: ("read", "abort")}):
        result = make(copy, f"encoder={second_encoder}")
    assert [len(pids) for pids in failed(struck).values()] == [3]
    assert result.exit_code == 3
    assert result.slides == {"done": 4, "skipped": 0, "none": 0, "failed": 3}
    assert {slide: text.split(":")[0] for slide, text in result.problems.items()} == {
        gone: "not_a_file", other: "source_changed", deadly: "reader_crash",
    }  # fmt: skip
    archive = Archive(copy)
    name = next(name for name in tree_encoders(archive) if name != "texture")
    assert read_trees(archive).equals(before)
    assert set(stored_roots(archive, name)) == set(roots) - {gone, other, deadly}
    assert verify(copy).damaged == []
    with pytest.raises(ConfigError, match=name) as error:
        make(copy, "encoder=texture", "per_slide=4", dry_run=True)
    assert error.value.code == "encoders"

    with Committer(copy) as committer:
        committer.update_slides({gone: {"uri": back[gone]}, other: {"mtime_ns": back[other]}})
    with in_threads():
        more = make(copy, f"encoder=texture,{second_encoder}", "per_slide=4")
    assert (more.exit_code, more.trees) == (0, 7 + 3 * 3)
    archive = Archive(copy)
    assert stored_roots(archive) == expected_roots(archive, 4)
    assert stored_roots(archive, name) == stored_roots(archive, "texture") == stored_roots(archive)
    report = verify(copy)
    assert (report.damaged, report.notes) == ([], [])
    rows = read_trees(archive, encoder=name)
    features = take_features(archive, rows["row"].to_numpy(), encoder=name)
    kept = vectors(rows["node_mask"]) != 0
    assert np.isfinite(features).all()
    assert features[kept].any(axis=1).all()
    assert not features[~kept].any()


def damage(archive: Path, name: str, folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Give a slide a file with one bad tile, in the root of its second tree.

    Returns:
        The slide's trees, and the columns of the slide's row that name its good file.
    """
    rows = read_trees(Archive(archive), encoder="texture").to_pylist()
    stored = {row["slide_id"]: row for row in Archive(archive).slides("ready").to_pylist()}
    trees = [row for row in rows if Path(stored[row["slide_id"]]["uri"]).name == name]
    good = {key: stored[trees[0]["slide_id"]][key] for key in ("uri", "bytes", "mtime_ns")}
    across, _ = faults.tile_spans(Path(good["uri"]))
    tile = trees[1]["y0"] // 256 * across + trees[1]["x0"] // 256
    faults.overwrite(Path(good["uri"]), folder / name, [tile])
    status = (folder / name).stat()
    file = {"uri": str(folder / name), "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
    with Committer(archive) as committer:
        committer.update_slides({trees[0]["slide_id"]: file})
    return trees, good


@pytest.mark.parametrize(("name", "bad"), [("b.tif", {}), ("e.tif", {"too_many_bad_tiles": 1})])
def test_damaged_nodes_are_masked_and_trees_with_many_quarantined(
    name: str, bad: dict[str, int], copy: Path, tmp_path: Path
) -> None:
    """A damaged tile of 256 px holds 4 of 85 nodes where a root is 1024 px, 4 of 21 at 0.5 mpp."""
    from jobs.tree_actor import SlideTask, TreeActor

    trees, _ = damage(copy, name, tmp_path)
    harmed, slide = trees[1], trees[1]["slide_id"]
    left, top = harmed["x0"] // 256, harmed["y0"] // 256
    encoder = load_encoder("texture")
    actor = TreeActor(str(copy), SPEC, [("texture", encoder.revision)], "cpu", 2, 3, 60.0)
    task = SlideTask(slide_id=slide, new=[[row["tx"], row["ty"]] for row in trees], lacking=[])
    try:
        table = actor([{"task": task.to_json()}])
    finally:
        actor.close()
    outcome = json.loads(table.schema.metadata[b"outcome"])
    assert (outcome["reason"], outcome["quarantined"]) == ("", bad)
    parts = {row["table"]: from_ipc(row["rows"]) for row in table.to_pylist()}
    made = {row["tree_id"]: row for row in parts["trees"].to_pylist()}
    assert len(made) == 3
    found = {tree: row for tree, row in made.items() if row["fault"] is None}
    assert len(found) == 3 - len(bad)
    assert found.keys() == set(parts["trees_texture"]["tree_id"].to_pylist())
    features = vectors(parts["trees_texture"]["features"]).reshape(len(found), 85, -1)
    before = take_features(Archive(copy), [row["row"] for row in trees], encoder="texture")
    for row, old in zip(trees, before, strict=True):
        if row["tree_id"] not in found:
            assert row is harmed
            assert not any(made[row["tree_id"]]["node_mask"])
            continue
        mask = np.array(found[row["tree_id"]]["node_mask"]) != 0
        there = np.array(row["node_mask"]) != 0
        if row is harmed:
            x0, y0, w0, h0 = patch_tree(row["tx"], row["ty"], mpp=row["mpp"], spec=SPEC).rects[0].T
            inside = (x0 < 256 * left + 256) & (x0 + w0 > 256 * left)
            inside &= (y0 < 256 * top + 256) & (y0 + h0 > 256 * top)
            there[21:] &= ~inside[21:]  # coarser levels are stored apart, and whole
        assert (mask == there).all()
        place = list(found).index(row["tree_id"])
        np.testing.assert_array_equal(features[place], np.where(mask[:, None], old, 0))


def test_a_damaged_tree_is_read_once_and_again_when_asked(
    copy: Path, make: Trees, second_encoder: str, tmp_path: Path
) -> None:
    """One run finds it and says so (3); later ones read no more of it than they are asked to."""
    whole = read_trees(Archive(copy))
    trees, good = damage(copy, "e.tif", tmp_path)
    bad, slide = trees[1]["tree_id"], trees[1]["slide_id"]
    fault = {"too_many_bad_tiles": 1}
    with Committer(copy) as committer:
        committer.drop_rows("trees", [slide])
    with in_threads():
        first = make(copy)
        assert (first.trees, first.quarantined, first.quarantined_before) == (2, fault, {})
        assert (first.exit_code, first.slides["failed"]) == (3, 0)
        before = listing(copy)
        for settings, number in (((), 0), (("retry=true",), 1)):
            plan = make(copy, *settings, dry_run=True)
            assert (plan.trees, plan.slides["skipped"]) == (number, 7 - number)
            assert sum(plan.quarantined_before.values()) == 1 - number
        again = make(copy)
        assert (again.trees, again.quarantined, again.quarantined_before) == (0, {}, fault)
        assert (again.exit_code, again.slides["skipped"]) == (0, 7)
        assert listing(copy) == before

        both = f"encoder=texture,{second_encoder}"
        further = make(copy, f"encoder={second_encoder}")
        assert (further.trees, further.exit_code, further.quarantined_before) == (20, 0, fault)
        name = next(name for name in tree_encoders(Archive(copy)) if name != "texture")
        with pytest.raises(ConfigError, match=name):
            make(copy, "encoder=texture", "retry=true")
        more = make(copy, both, "per_slide=4")
        assert (more.trees, more.exit_code, more.quarantined_before) == (7, 0, fault)
        report = verify(copy)
        assert (report.damaged, report.notes) == ([], [])

        still = make(copy, both, "retry=true")
        assert (still.trees, still.quarantined, still.quarantined_before) == (0, fault, {})
        assert (still.exit_code, still.slides["done"]) == (3, 1)
        with pytest.raises(ArchiveError, match="too_many_bad_tiles") as error:
            write_tree_page(Archive(copy), tmp_path / "page.html", tree_id=bad)
        assert error.value.code == "quarantined"
        with Committer(copy) as committer:
            committer.update_slides({slide: good})
        mended = make(copy, both, "retry=true")
        assert (mended.trees, mended.exit_code, mended.quarantined_before) == (1, 0, {})
    archive = Archive(copy)
    assert stored_roots(archive) == expected_roots(archive, 4)
    assert stored_roots(archive, name) == stored_roots(archive, "texture") == stored_roots(archive)
    now = read_trees(archive)
    assert now.filter(pc.is_in(now["tree_id"], whole["tree_id"])).equals(whole)
    report = verify(copy)
    assert (report.damaged, report.notes) == ([], [])


def test_roots_are_chosen_once_unless_another_job_was_faster(
    clean: Clean, make: Trees, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jobs import tree_plan

    chosen: list[str] = []

    def counted(*given: Any, slide_id: str, **more: Any) -> Any:
        chosen.append(slide_id)
        return choose_parents(*given, slide_id=slide_id, **more)

    monkeypatch.setattr(tree_plan, "choose_parents", counted)
    uri = Path(shutil.copytree(clean.archive, tmp_path / "a"))
    # Undone before the other patches are, else it would put one of theirs back after they ended.
    with in_threads(), monkeypatch.context() as patch:
        make(uri, *SMALL, "per_slide=1")
        assert len(chosen) == len(set(chosen)) == 7

        def faster(_: Any) -> str:
            patch.setattr("jobs.cluster.connect", lambda _: "local")
            assert make(uri, "per_slide=2").trees == 7
            return "local"

        patch.setattr("jobs.cluster.connect", faster)
        late = make(uri, "per_slide=3")
    assert late.trees == 7, "those that the other job made are not made again"
    archive = Archive(uri)
    assert stored_roots(archive) == stored_roots(archive, "texture") == expected_roots(archive, 3)
    assert verify(uri).damaged == []


def test_the_command(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from pathflip.cli import main

    with pytest.raises(SystemExit) as ended:
        main(["trees", "--archive", str(copy), "-o", "per_slide=4", "--dry-run", "--json"])
    assert ended.value.code == 0
    document = json.loads(capfd.readouterr().out)
    assert document["trees"] == 7
    assert document["dry_run"] is True
    assert document["archive_bytes"] > 7 * 85 * 2 * 64
    assert document["estimated_hours"] >= 0
    assert document["nodes"] <= 4 * 21 + 3 * 85


def test_pictures_and_a_page(copy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each node's picture has its name and is written once; pages without texts and with."""
    import cv2

    from pathflip.cli import main

    archive = Archive(copy)
    row = read_trees(archive).to_pylist()[0]
    slide, kept = row["slide_id"], np.flatnonzero(row["node_mask"])
    out = tmp_path / "nodes"
    words = ["trees", "export", str(out), "--archive", str(copy), "--slide", slide, "--json"]
    for written in (True, False):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 0
        document = json.loads(capfd.readouterr().out)
        assert document["trees"] == 3
        assert document["images" if written else "skipped"] == len(list(out.iterdir()))
    names = {f"{slide}__t{row['tx']}_{row['ty']}__n{node}.png" for node in kept}
    assert names <= {path.name for path in out.iterdir()}
    node = int(kept[-1])
    found = cv2.imread(str(out / f"{slide}__t{row['tx']}_{row['ty']}__n{node}.png"))
    tree = patch_tree(row["tx"], row["ty"], mpp=row["mpp"], spec=SPEC)
    pixels = np.zeros((1, SPEC.node_px, SPEC.node_px, 3), np.uint8)
    with Slide(archive.slide(slide)["uri"]) as opened:
        opened.read_patches(tree.rects[0, [node]], mpp=float(tree.mpp[node]), out=pixels)
    assert (found[..., ::-1] == pixels[0]).all()

    with pytest.raises(SystemExit) as ended:
        main(
            ["trees", "show", row["tree_id"], "--archive", str(copy), "--out", str(out / "t.html")]
        )
    assert ended.value.code == 0
    page = (out / "t.html").read_text()
    assert page.count("<image ") == len(kept)
    assert "No texts yet." in page

    capfd.readouterr()
    stamp = archive.slide(slide)["mtime_ns"]
    with Committer(copy) as committer:
        committer.update_slides({slide: {"mtime_ns": stamp + 1}})
    with pytest.raises(SystemExit) as ended:
        main([*words[:2], str(tmp_path / "none"), *words[3:]])
    assert ended.value.code == 3
    document = json.loads(capfd.readouterr().out)
    assert document["problems"][slide].startswith("source_changed")
    assert list((tmp_path / "none").iterdir()) == []

    told, captions = read_trees(archive).to_pylist()[-1], [None] * 84 + ["Mitoses <3."]
    with Committer(copy) as committer:
        ensure_tree_texts(committer)
        text = {
            "text_id": tree_text_id(told["tree_id"], "vlm"), "slide_id": told["slide_id"],
            "tree_id": told["tree_id"], "source": "vlm", "model": "m", "captions": captions,
            "keywords": ["mitosis"], "keyword_of": None, "extractor": "rake",
        }  # fmt: skip
        committer.upsert("tree_texts", filled(tree_texts_schema(), [text]))
    capfd.readouterr()
    with pytest.raises(SystemExit):
        main(["trees", "show", "--archive", str(copy), "--out", f"{out}/told.html", "--json"])
    assert json.loads(capfd.readouterr().out)["tree"] == told["tree_id"]
    page = (out / "told.html").read_text()
    assert "Mitoses &lt;3." in page
    assert ">mitosis<" in page
