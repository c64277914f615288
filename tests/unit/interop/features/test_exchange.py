"""Features from an archive to other tools' files and back; files of other tools into archives."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import tifffile
import torch

from jobs import ingest as jobs_ingest
from jobs.ingest.config import IngestConfig
from pathflip.archive import Archive
from pathflip.archive.captions import Caption, write_captions
from pathflip.archive.commit import Committer
from pathflip.archive.create import create_archive
from pathflip.archive.verify import verify
from pathflip.cli import main
from pathflip.errors import ArchiveError, ConfigError
from pathflip.geometry import Tiling, patch_rects
from pathflip.interop.features import importing, writing
from pathflip.interop.features.exporting import export_features
from pathflip.interop.features.importing import FeatureImport, import_features
from pathflip.training import run_dir
from pathflip.training.config import resolve
from pathflip.training.contrastive import Contrastive
from pathflip.training.trainer import train
from tests.archives import TINY
from tests.in_threads import in_threads
from tests.unit.interop.features.test_files import COORDS, FEATURES, clam, trident

GRID = Tiling(region_um=512, patch_um=64)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with two slides, and the archive that an ingest made of them."""
    folder = tmp_path_factory.mktemp("own")
    for name, mpp, seed in (("a.tif", 0.5, 1), ("b.tif", 0.2738, 2)):
        rng = np.random.default_rng(seed)
        pixels = np.full((1280, 1536, 3), 244, np.uint8)
        pixels[64:1200, 100:1300] = rng.integers(0, 90, (1136, 1200, 1)) + np.array([160, 70, 130])
        (folder / "slides").mkdir(exist_ok=True)
        tifffile.imwrite(
            folder / "slides" / name, pixels, tile=(256, 256), photometric="rgb",
            resolution=(1e4 / mpp, 1e4 / mpp), resolutionunit="CENTIMETER",
        )  # fmt: skip
    with in_threads():
        result = jobs_ingest.ingest(
            [str(folder / "slides")],
            str(folder / "archive"),
            IngestConfig(tiling=GRID, device="cpu"),
        )
    assert result.slides["ready"] == 2
    return folder


def tables(archive: Path | str, encoder: str = "texture") -> dict[str, list[dict[str, Any]]]:
    """All rows of regions, features and embeddings, with their checksums."""
    opened = Archive(archive)
    _, entry = opened.encoder(encoder)
    names = {"regions": "region_id", entry["features_table"]: "region_id"}
    names[entry["embeddings_table"]] = "id"
    return {
        name: opened.dataset(name).to_table().sort_by(key).to_pylist()
        for name, key in names.items()
    }


@pytest.mark.parametrize("to", ["trident", "spatialdata"])
def test_a_round_trip_is_the_same_to_the_bit(own: Path, tmp_path: Path, to: str) -> None:
    out = tmp_path / "job"
    document = export_features(Archive(own / "archive"), to, out)
    assert document["slides"] == 2
    assert document["patches"] > 100

    result = import_features(str(tmp_path / "copy"), out)

    assert result.slides == {"imported": 2, "extended": 0, "skipped": 0, "refused": 0}
    assert result.aligned == 1.0
    assert not any(result.left_out.values())
    assert result.patches == document["patches"]
    assert tables(tmp_path / "copy") == tables(own / "archive")
    columns = [
        "slide_id", "sha256", "mpp", "mpp_source", "width", "height", "tissue_mm2", "n_regions",
        "n_patches", "encoders", "status",
    ]  # fmt: skip
    copy, original = Archive(tmp_path / "copy"), Archive(own / "archive")
    assert copy.slides(columns=columns) == original.slides(columns=columns)
    assert copy.encoders() == original.encoders()
    assert copy.tiling() == original.tiling()
    assert not verify(tmp_path / "copy").damaged


@pytest.mark.parametrize("to", ["clam", "slidechat", "stamp", "h5ad"])
def test_formats_that_say_less_keep_features_and_places(own: Path, tmp_path: Path, to: str) -> None:
    export_features(Archive(own / "archive"), to, tmp_path / "out")
    (tmp_path / "mpp.csv").write_text("slide,mpp\na.tif,0.5\nb.tif,0.2738\n")
    create_archive(tmp_path / "copy", tiling=asdict(GRID))
    settings = FeatureImport(encoder="texture", mpp_csv=str(tmp_path / "mpp.csv"))
    result = import_features(str(tmp_path / "copy"), tmp_path / "out", settings)
    assert result.slides["imported"] == 2
    assert result.aligned == 1.0
    if to in ("stamp", "h5ad"):
        assert result.encoder == import_features(str(tmp_path / "copy"), tmp_path / "out").encoder
    else:
        assert result.encoder["revision"] == "unstated"
    for name in ("a.tif", "b.tif"):
        stored, mask, _ = Archive(own / "archive").features_array(name)
        found, kept, _ = Archive(tmp_path / "copy").features_array(name.removesuffix(".tif"))
        assert (stored == found).all()
        assert (mask == kept).all()
    vectors = [
        [row["vector"] for row in Archive(one).embeddings("texture").sort_by("x0").to_pylist()]
        for one in (own / "archive", tmp_path / "copy")
    ]
    assert sorted(vectors[0]) == sorted(vectors[1])


def test_slides_give_resolution_size_and_digest(own: Path, tmp_path: Path) -> None:
    export_features(Archive(own / "archive"), "clam", tmp_path / "out")
    create_archive(tmp_path / "copy", tiling=asdict(GRID))
    settings = FeatureImport(encoder="texture", slides=[str(own / "slides")])
    result = import_features(str(tmp_path / "copy"), tmp_path / "out", settings)
    assert result.slides["imported"] == 2
    columns = ["slide_id", "uri", "sha256", "mpp", "mpp_source", "width", "height", "vendor"]
    copy = Archive(tmp_path / "copy").slides(columns=columns)
    assert copy == Archive(own / "archive").slides(columns=columns)


def test_a_resolution_is_never_guessed(tmp_path: Path) -> None:
    trident(tmp_path / "job")
    result = import_features(str(tmp_path / "archive"), tmp_path / "job")
    assert result.slides["refused"] == 1
    assert result.exit_code == 3
    (reason,) = result.refused.values()
    assert reason.startswith("needs_mpp")
    assert "--mpp-csv" in reason
    (tmp_path / "mpp.csv").write_text("wsi,mpp\ns1.svs,0.25\n")
    settings = FeatureImport(mpp_csv=str(tmp_path / "mpp.csv"))
    result = import_features(str(tmp_path / "archive"), tmp_path / "job", settings)
    assert result.slides["imported"] == 1
    assert result.aligned == 1.0
    (row,) = Archive(tmp_path / "archive").slides().to_pylist()
    assert (row["mpp"], row["mpp_source"], row["width"]) == (0.25, "override", 4000)
    assert row["slide_id"].startswith("s1-")


def scaled(folder: Path, **slides: float) -> FeatureImport:
    """Settings with a table of resolutions."""
    table = folder / "mpp.csv"
    lines = [f"{name},{mpp}" for name, mpp in slides.items()]
    table.write_text("\n".join(["slide,mpp", *lines]) + "\n")
    return FeatureImport(mpp_csv=str(table))


def test_patches_off_the_grid_are_placed_by_their_centres_and_told(tmp_path: Path) -> None:
    """At 0.2738 µm/px, 512 px are 140 µm: TRIDENT's nominal 40x on a grid of 128 µm."""
    trident(tmp_path / "job")
    result = import_features(
        str(tmp_path / "archive"), tmp_path / "job", scaled(tmp_path, s1=0.2738)
    )
    assert result.tiling["patch_um"] == 128
    assert result.aligned == pytest.approx(0, abs=0.2)
    opened = Archive(tmp_path / "archive")
    features, mask, ids = opened.features_array("s1")
    regions = opened.regions("s1").to_pylist()
    tiling = Tiling(**opened.tiling())
    kept = 0
    for number, corner in enumerate(COORDS):
        x, y = corner + 256
        for at, row in enumerate(regions):
            rects = patch_rects(tiling, rx=row["rx"], ry=row["ry"], mpp=0.2738)
            inside = (rects[:, 0] <= x) & (x < rects[:, 0] + rects[:, 2])
            inside &= (rects[:, 1] <= y) & (y < rects[:, 1] + rects[:, 3])
            for slot in np.flatnonzero(inside):
                assert mask[at, slot]
                kept += (features[at, slot] == FEATURES[number].astype(np.float16)).all()
    assert kept == result.patches == int(mask.sum()) == 7 - result.left_out["doubled"]
    assert not features[~mask].any()
    assert len(ids) == len(regions)


def test_the_same_import_again_does_only_what_is_missing(tmp_path: Path) -> None:
    settings = scaled(tmp_path, s1=0.25, s2=0.25)
    trident(tmp_path / "job", "s1")
    first = import_features(str(tmp_path / "archive"), tmp_path / "job", settings)
    trident(tmp_path / "job", "s2")
    again = import_features(str(tmp_path / "archive"), tmp_path / "job", settings)
    assert first.slides["imported"] == 1
    assert (again.slides["imported"], again.slides["skipped"]) == (1, 1)
    before = tables(tmp_path / "archive", "uni")
    last = import_features(str(tmp_path / "archive"), tmp_path / "job", settings)
    assert last.slides["skipped"] == 2
    assert tables(tmp_path / "archive", "uni") == before


def test_a_second_encoder_joins_the_patches_of_the_first(tmp_path: Path) -> None:
    settings = scaled(tmp_path, s1=0.25)
    trident(tmp_path / "job")
    trident(tmp_path / "job", encoder="conch_v15")
    with pytest.raises(ConfigError, match="2 encoders"):
        import_features(str(tmp_path / "archive"), tmp_path / "job", settings)
    for name in ("uni_v1", "conch_v15"):
        one = FeatureImport(mpp_csv=settings.mpp_csv, encoder=name)
        result = import_features(str(tmp_path / "archive"), tmp_path / "job", one)
    assert result.slides["extended"] == 1
    opened = Archive(tmp_path / "archive")
    assert opened.slides(columns=["encoders"]).to_pylist() == [{"encoders": ["conch_v1_5", "uni"]}]
    both = [opened.features_array("s1", name) for name in ("uni", "conch_v1_5")]
    assert (both[0][0] == both[1][0]).all()
    assert (both[0][1] == both[1][1]).all()
    assert not verify(tmp_path / "archive").damaged


def test_features_over_an_ingested_slide_need_all_of_its_patches(own: Path, tmp_path: Path) -> None:
    shutil.copytree(own / "archive", tmp_path / "archive")
    export_features(Archive(own / "archive"), "trident", tmp_path / "job")
    (folder,) = (tmp_path / "job").glob("*/features_texture")
    for path in folder.glob("*.h5"):
        with h5py.File(path, "a") as file:
            file["features"].attrs["encoder"] = "other"
            # One patch more than the archive has of the slide, at a place of its own.
            n = len(file["features"])
            for key in ("features", "coords"):
                file[key].resize(n + 1, axis=0)
            file["coords"][n] = file["coords"][:].min(axis=0) - [200, 0]
    settings = FeatureImport(encoder="other", revision="7")
    result = import_features(str(tmp_path / "archive"), folder, settings)
    assert result.slides["extended"] == 2, result.refused
    opened = Archive(tmp_path / "archive")
    for name in ("a.tif", "b.tif"):
        assert all(
            (x == y).all()
            for x, y in zip(
                opened.features_array(name, "other")[:2],
                opened.features_array(name, "texture")[:2],
                strict=True,
            )
        )
    for path in folder.glob("*.h5"):
        with h5py.File(path, "a") as file:
            file["features"].attrs["encoder"] = "third"
            if path.stem == "a":
                if "patch_quality" in file:
                    del file["patch_quality"]
                for key in ("features", "coords"):
                    file[key].resize(20, axis=0)
    lacking = import_features(str(tmp_path / "archive"), folder, FeatureImport(encoder="third"))
    assert lacking.slides["extended"] == 1
    (reason,) = lacking.refused.values()
    assert reason.startswith("other_patches")
    assert "texture" in reason


def test_one_bad_file_costs_one_slide(tmp_path: Path) -> None:
    settings = scaled(tmp_path, good=0.25, gaps=0.25, far=0.25, coarse=1.0, cut=0.25)
    trident(tmp_path / "job", "good")
    with h5py.File(trident(tmp_path / "job", "gaps"), "a") as file:
        file["features"][:6] = np.nan
    with h5py.File(trident(tmp_path / "job", "far"), "a") as file:
        file["coords"][:] = 1 << 40
    trident(tmp_path / "job", "coarse")
    cut = trident(tmp_path / "job", "cut")
    cut.write_bytes(cut.read_bytes()[:700])
    result = import_features(str(tmp_path / "archive"), tmp_path / "job", settings)
    codes = {Path(path).stem: text.partition(":")[0] for path, text in result.refused.items()}
    assert codes == {
        "gaps": "bad_features", "far": "unreadable", "coarse": "other_scale", "cut": "unreadable",
    }  # fmt: skip
    assert result.slides["imported"] == 1
    assert [row["status"] for row in Archive(tmp_path / "archive").slides().to_pylist()] == [
        "ready"
    ]


def test_where_no_file_can_be_read_the_first_reason_is_told(tmp_path: Path) -> None:
    cut = trident(tmp_path / "job")
    cut.write_bytes(cut.read_bytes()[:700])
    with pytest.raises(ConfigError, match=r"s1\.h5 is damaged") as error:
        import_features(str(tmp_path / "archive"), tmp_path / "job")
    assert error.value.code == "no_features"


def test_patches_that_are_not_finite_are_masked(tmp_path: Path) -> None:
    with h5py.File(trident(tmp_path / "job"), "a") as file:
        file["features"][2, 3] = np.inf
        file["features"][4, 0] = 1e6  # too large for 16 bits
    result = import_features(str(tmp_path / "archive"), tmp_path / "job", scaled(tmp_path, s1=0.25))
    assert result.left_out["not_finite"] == 2
    assert result.patches == 5
    features, mask, _ = Archive(tmp_path / "archive").features_array("s1")
    assert mask.sum() == 5
    assert np.isfinite(features).all()
    (region,) = Archive(tmp_path / "archive").regions("s1").to_pylist()
    assert (region["n_patches"], region["n_bad"]) == (5, 2)


def test_small_blocks_give_the_same_rows(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_features(Archive(own / "archive"), "trident", tmp_path / "job")
    monkeypatch.setattr(writing, "BLOCK_BYTES", 10_000)
    import_features(str(tmp_path / "copy"), tmp_path / "job", FeatureImport(workers=1))
    assert tables(tmp_path / "copy") == tables(own / "archive")


def test_patches_without_places_need_leave_to_be_packed(tmp_path: Path) -> None:
    clam(tmp_path / "in")
    shutil.rmtree(tmp_path / "in" / "patches")
    shutil.rmtree(tmp_path / "in" / "h5_files")
    create_archive(tmp_path / "archive", tiling=asdict(GRID))
    settings = FeatureImport(encoder="mine")
    result = import_features(str(tmp_path / "archive"), tmp_path / "in", settings)
    (reason,) = result.refused.values()
    assert reason.startswith("no_places")
    assert "--pack-consecutive 64" in reason
    packed = FeatureImport(encoder="mine", pack_consecutive=64)
    result = import_features(str(tmp_path / "archive"), tmp_path / "in", packed)
    assert result.slides["imported"] == 1
    features, mask, _ = Archive(tmp_path / "archive").features_array("s1")
    assert mask[0, :7].all()
    assert mask.sum() == 7
    assert (features[0, :7] == FEATURES.astype(np.float16)).all()
    (row,) = Archive(tmp_path / "archive").slides().to_pylist()
    assert row["mpp_source"].startswith("none")
    with pytest.raises(ConfigError, match="not 256"):
        import_features(
            str(tmp_path / "archive"), tmp_path / "in",
            FeatureImport(encoder="mine", pack_consecutive=256),
        )  # fmt: skip


def test_two_files_of_one_slide_are_told(tmp_path: Path) -> None:
    settings = scaled(tmp_path, s1=0.25)
    for folder in ("x", "y"):
        path = trident(tmp_path / "job" / folder)
        with h5py.File(path, "a") as file:
            file["coords"].attrs["sha256"] = "a" * 64
        shutil.move(str(path), str(tmp_path / "job" / folder / "s1.h5"))
    table = tmp_path / "mpp.csv"
    table.write_text("slide,mpp\nx/s1,0.25\ny/s1,0.25\n")
    settings = FeatureImport(mpp_csv=str(table), encoder="uni")
    result = import_features(str(tmp_path / "archive"), tmp_path / "job", settings)
    assert result.slides["imported"] == 1
    assert [text.partition(":")[0] for text in result.refused.values()] == ["same_slide"]


def test_an_encoder_is_one_in_an_archive(tmp_path: Path) -> None:
    trident(tmp_path / "job")
    settings = scaled(tmp_path, s1=0.25, s2=0.25)
    stated = FeatureImport(mpp_csv=settings.mpp_csv, revision="r1", licence="MIT")
    import_features(str(tmp_path / "archive"), tmp_path / "job", stated)
    held = Archive(tmp_path / "archive").encoders()["uni"]
    assert (held["revision"], held["licence"], held["dim"]) == ("r1", "MIT", 12)
    trident(tmp_path / "job", "s2")
    with pytest.raises(ArchiveError, match="--revision r1"):
        import_features(str(tmp_path / "archive"), tmp_path / "job", settings)
    other = FeatureImport(mpp_csv=settings.mpp_csv, revision="r2")
    with pytest.raises(ArchiveError, match="r1"):
        import_features(str(tmp_path / "archive"), tmp_path / "job", other)


def test_while_another_writes_the_archive_nothing_is_imported(tmp_path: Path) -> None:
    trident(tmp_path / "job")
    settings = scaled(tmp_path, s1=0.25)
    import_features(str(tmp_path / "archive"), tmp_path / "job", settings)
    trident(tmp_path / "job", "s2")
    with Committer(tmp_path / "archive"), pytest.raises(ArchiveError) as error:
        import_features(str(tmp_path / "archive"), tmp_path / "job", settings)
    assert error.value.code == "locked"


def test_what_was_committed_stays_when_an_import_dies(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = scaled(tmp_path, **{f"s{n}": 0.25 for n in range(4)})
    for n in range(4):
        trident(tmp_path / "job", f"s{n}")
    monkeypatch.setattr(importing, "COMMIT_SLIDES", 1)
    real: Callable[..., Any] = importing.write_slide

    def dying(uri: str, table: str, plan: Any, **rest: Any) -> Any:
        if plan.record.slide == "s2":
            raise KeyboardInterrupt
        return real(uri, table, plan, **rest)

    monkeypatch.setattr(importing, "write_slide", dying)
    with pytest.raises(KeyboardInterrupt):
        import_features(str(tmp_path / "archive"), tmp_path / "job", settings)
    monkeypatch.setattr(importing, "write_slide", real)
    done = len(Archive(tmp_path / "archive").ready_ids())
    assert done == 2
    result = import_features(str(tmp_path / "archive"), tmp_path / "job", settings)
    assert (result.slides["skipped"], result.slides["imported"]) == (2, 2)
    assert not verify(tmp_path / "archive").damaged


def test_commands(own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> tuple[int, Any]:
        with pytest.raises(SystemExit) as end:
            main([*arguments, "--json"])
        return int(end.value.code or 0), json.loads(capsys.readouterr().out)

    archive, job, copy = str(own / "archive"), str(tmp_path / "job"), str(tmp_path / "copy")
    export = ("archive", "export", "--archive", archive, "--to", "trident", "--out", job)
    code, document = run(*export, "--dry-run")
    assert code == 0
    assert document["slides"] == 2
    assert not Path(job).exists()
    code, document = run(*export, "--slide", "a.tif")
    assert code == 0
    assert document["slides"] == 1
    assert run(*export, "--dry-run")[1]["skipped"] == 1  # a plan tells what is there
    plan = run(*export, "--dry-run")[1]
    assert run(*export)[1] | {"dry_run": True} == plan
    bring = ("archive", "import", "--archive", copy, "--features", job)
    code, plan = run(*bring, "--dry-run")
    assert code == 0
    assert plan["features"]["slides"]["imported"] == 2
    assert not Path(copy).exists()
    code, document = run(*bring)
    same = ("slides", "regions", "patches", "left_out", "aligned", "encoder", "tiling")
    assert code == 0
    assert [document["features"][key] for key in same] == [plan["features"][key] for key in same]
    code, document = run("archive", "import", "--archive", copy, "--slides", "x", "--labels", "y")
    assert code == 2
    assert "--features" in document["error"]["message"] + document["error"]["hint"]
    code, document = run("archive", "export", "--archive", copy, "--to", "png", "--out", job)
    assert code == 2


@pytest.mark.parametrize("to", ["trident", "clam", "stamp", "h5ad"])
def test_other_readers_find_what_they_look_for(own: Path, tmp_path: Path, to: str) -> None:
    """The keys, shapes and attributes that each tool's loader takes from a file."""
    opened = Archive(own / "archive")
    export_features(opened, to, tmp_path, slides=["a.tif"])
    features, mask, _ = opened.features_array("a.tif")
    slide = opened.slide("a.tif")
    (name,) = {
        "trident": ["20x_128px_0px_overlap/features_texture/a.h5"],
        "clam": ["h5_files/a.h5"],
        "stamp": ["texture/a.h5"],
        "h5ad": ["a.h5ad"],
    }[to]
    key = {"stamp": "feats", "h5ad": "X"}.get(to, "features")
    with h5py.File(tmp_path / name) as file:
        values = file[key][:]
        coords = (file["obsm/spatial"] if to == "h5ad" else file["coords"])[:]
        assert values.dtype == (np.float16 if to == "stamp" else np.float32)
        assert sorted(map(tuple, values.astype(np.float16))) == sorted(map(tuple, features[mask]))
        assert coords.shape == (len(values), 2)
        if to == "trident":
            about = dict(file["coords"].attrs)
            assert about["patch_size_level0"] == 128
            assert (about["target_magnification"], about["level0_magnification"]) == (20, 20)
            assert (about["level0_width"], about["level0_height"]) == (1536, 1280)
            # As TRIDENT's loader of all of a file has it: every key is a table.
            assert all(len(file[one][:]) for one in file)
        if to == "clam":
            assert not dict(file["coords"].attrs)
            assert file["coords"].dtype == np.int32
            # CLAM's training opens the tensor alone, unless it is told otherwise.
            tensor = torch.load(tmp_path / "pt_files" / "a.pt", weights_only=True)
            assert (tensor.numpy() == values).all()
            with h5py.File(tmp_path / "patches" / "a.h5") as places:
                assert places["coords"].attrs["patch_size"] == 128
        if to == "stamp":
            assert file.attrs["unit"] == "um"
            assert file.attrs["tile_size_um"] == 64
            assert coords.max() <= 1536 * slide["mpp"]


def test_anndata_opens_what_is_written(own: Path, tmp_path: Path) -> None:
    opened = Archive(own / "archive")
    export_features(opened, "h5ad", tmp_path, slides=["b.tif"])
    table = anndata.read_h5ad(tmp_path / "b.h5ad")
    features, mask, _ = opened.features_array("b.tif")
    assert table.shape == (int(mask.sum()), features.shape[-1])
    assert table.uns["pathflip"]["mpp"] == opened.slide("b.tif")["mpp"]
    assert list(table.obs.columns) == ["tile_id", "x", "y"]
    assert table.obsm["spatial"].shape == (len(table), 2)
    # And a table that AnnData wrote comes in. It writes no strings of the kind that pandas 3 makes.
    with pd.option_context("future.infer_string", False):
        anndata.read_h5ad(tmp_path / "b.h5ad").write_h5ad(tmp_path / "again.h5ad")
    (tmp_path / "b.h5ad").unlink()
    result = import_features(str(tmp_path / "copy"), tmp_path)
    assert result.slides["imported"] == 1
    assert result.aligned == 1.0


def test_training_sees_no_difference(own: Path, tmp_path: Path) -> None:
    export_features(Archive(own / "archive"), "trident", tmp_path / "job")
    import_features(str(tmp_path / "imported"), tmp_path / "job")
    shutil.copytree(own / "archive", tmp_path / "ingested")
    losses = []
    for name in ("ingested", "imported"):
        with Committer(tmp_path / name) as committer:
            texts = [
                Caption(slide_id=slide, text=f"Sections show {what}. There is {what} necrosis.")
                for slide, what in zip(sorted(committer.archive.ledger()), "ab", strict=True)
            ]
            write_captions(committer, texts, source="report")
        config = resolve(
            "pathflip/mini",
            overrides=[*TINY, "steps=3", "batch_size=2", "log_every=1", "save_every=3"],
        )
        run = tmp_path / f"run_{name}"
        objective, _ = run_dir.prepare(Contrastive(config), str(tmp_path / name), run)
        train(run, objective)
        losses.append([line["loss"] for line in run_dir.read_metrics(run) if "loss" in line])
    assert len(losses[0]) == 3
    assert np.isfinite(losses[0]).all()
    assert losses[0] == losses[1]
