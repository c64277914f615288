"""Stores of SpatialData in Zarr: as AnnData and LazySlide write and read them, and hostile ones."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
import zarr

from pathflip.archive import Archive
from pathflip.errors import SlideError
from pathflip.interop.features import spatialdata
from pathflip.interop.features.exporting import DONE, export_features
from pathflip.interop.features.find import find_features, read_file
from pathflip.interop.features.importing import import_features
from tests.unit.interop.features.test_exchange import scaled
from tests.unit.interop.features.test_files import COORDS, FEATURES, only, trident

ORDER = [4, 0, 6, 2, 1, 3, 5]
"""Rows of the table, by the numbers of their tiles."""
SPEC = {
    "height": 256, "width": 256, "stride_height": 256, "stride_width": 256, "mpp": 0.5,
    "ops_level": 1, "ops_downsample": 1.0, "base_level": 0, "base_downsample": 2.0,
    "tissue_name": "tissues",
}  # fmt: skip


def store(path: Path, *, zarr_format: int = 3, encoder: str = "uni2", **about: Any) -> Path:
    """A store as wsidata lays it out, its table by AnnData, in another order than its tiles."""
    shape = {"shape": [3000, 4000], "mpp": 0.25}
    attributes = {"slide_properties": shape, "tile_spec": {"tiles": SPEC}, **about}
    root = zarr.open_group(str(path), mode="a", zarr_format=zarr_format)  # type: ignore[arg-type]
    root.attrs.update(attributes)
    squares(path, COORDS, sides=(512, 512))
    table(path, encoder, FEATURES[ORDER], tiles=ORDER, zarr_format=zarr_format)
    return path


def squares(path: Path, corners: Any, *, sides: tuple[int, int], name: str = "tiles") -> None:
    """Tiles of a store, from their lower right corner on as shapely's ``box`` has them."""
    w, h = sides
    shapes = [
        struct.pack("<BIII10d", 1, 3, 1, 5, x + w, y, x + w, y + h, x, y + h, x, y, x + w, y)
        for x, y in corners
    ]
    folder = path / "shapes" / name
    folder.mkdir(parents=True, exist_ok=True)
    ids = np.arange(len(shapes))
    pq.write_table(pa.table({"tile_id": ids, "geometry": shapes}), folder / "shapes.parquet")


def table(
    path: Path, model: str, values: Any, *, tiles: Any, name: str = "tiles", zarr_format: int = 3
) -> None:
    """A table of features of a store, as wsidata's ``add_features`` makes it."""
    folder = path / "tables" / f"{model}_{name}"
    # AnnData writes no strings of the kind that pandas 3 makes.
    with (
        pd.option_context("future.infer_string", False),
        anndata.settings.override(zarr_write_format=zarr_format),
    ):
        index = pd.Index([str(one) for one in tiles], dtype=object)
        obs = pd.DataFrame({"tile_id": np.asarray(tiles)}, index=index)
        anndata.AnnData(np.asarray(values), obs=obs).write_zarr(folder)
    zarr.open_group(str(folder), mode="a").attrs.update(
        {"region": name, "region_key": "library_id", "instance_key": "tile_id"}
    )


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_features_follow_their_tiles(tmp_path: Path, zarr_format: int) -> None:
    store(tmp_path / "cohort" / "s1.zarr", zarr_format=zarr_format)
    record = only(tmp_path)
    assert (record.format, record.slide, record.encoder) == ("spatialdata", "cohort/s1", "uni2")
    assert (record.size, record.size_um, record.pixel_um) == (512, 128, 0.5)
    assert (record.mpp, record.extent) == (0.25, (4000, 3000))
    assert (record.read(0, 7) == FEATURES[ORDER]).all()
    assert (record.read(2, 5) == FEATURES[ORDER][2:5]).all()
    assert (record.coordinates() == COORDS[ORDER]).all()
    result = import_features(str(tmp_path / "archive"), tmp_path / "cohort")
    assert (result.slides["imported"], result.patches, result.aligned) == (1, 7, 1.0)
    assert result.encoder["name"] == "uni2"


def test_a_store_itself_may_be_named(tmp_path: Path) -> None:
    assert only(store(tmp_path / "s1.zarr")).slide == "s1"


def test_tables_of_other_things_are_left_out(tmp_path: Path) -> None:
    path = store(tmp_path / "s1.zarr")
    table(path, "cells", np.ones((3, 5)), tiles=[0, 1, 2], name="nuclei")  # of no tiles
    graph = path / "tables" / "tiles_graph"
    table(path, "graph", np.ones((7, 1)), tiles=range(7))
    (path / "tables" / "graph_tiles").rename(graph)
    shutil.rmtree(graph / "X")  # neighbours alone
    zarr.create_group(str(tmp_path / "image.zarr"))  # a slide in OME-Zarr, say
    found = find_features(tmp_path)
    assert [one.encoder for one in found.files] == ["uni2"]
    assert not found.problems
    assert found.others == 1


def test_one_model_on_two_sets_of_tiles_is_two_encoders(tmp_path: Path) -> None:
    small = SPEC | {"height": 64, "width": 64}
    path = store(tmp_path / "s1.zarr", tile_spec={"tiles": SPEC, "tiles_dense": small})
    squares(path, [(0, 0), (128, 0)], sides=(128, 128), name="tiles_dense")
    table(path, "uni2", FEATURES[:2], tiles=[0, 1], name="tiles_dense")
    found = find_features(tmp_path).files
    assert [(one.encoder, one.size) for one in found] == [("uni2", 512), ("uni2_tiles_dense", 128)]


def test_a_resolution_that_tiles_contradict_is_not_taken(tmp_path: Path) -> None:
    """LazySlide lets tiles be cut by another resolution than the slide's own."""
    store(tmp_path / "s1.zarr", slide_properties={"shape": [3000, 4000], "mpp": 0.5})
    assert only(tmp_path).mpp is None
    result = import_features(str(tmp_path / "archive"), tmp_path)
    (reason,) = result.refused.values()
    assert reason.startswith("needs_mpp")


def test_what_cannot_be_placed_is_refused(tmp_path: Path) -> None:
    store(tmp_path / "wide.zarr", tile_spec={"tiles": SPEC | {"height": 128}})
    squares(store(tmp_path / "tall.zarr"), COORDS, sides=(512, 700))
    squares(store(tmp_path / "few.zarr"), COORDS[:6], sides=(512, 512))
    points = store(tmp_path / "points.zarr") / "shapes" / "tiles" / "shapes.parquet"
    short = [struct.pack("<BIdd", 1, 1, x, y) for x, y in COORDS]
    pq.write_table(pa.table({"tile_id": np.arange(7), "geometry": short}), points)
    result = import_features(str(tmp_path / "archive"), tmp_path)
    codes = {Path(path).stem: text.partition(":")[0] for path, text in result.refused.items()}
    assert codes == {
        "wide": "unsupported", "tall": "unsupported", "few": "unreadable", "points": "unsupported",
    }  # fmt: skip


class _Touches:
    """An object whose unpickling makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("place", ["filters", "compressor"])
def test_pickles_are_refused_and_not_executed(tmp_path: Path, place: str) -> None:
    """A table whose numbers are packed by Python's pickle."""
    path = store(tmp_path / "s1.zarr", zarr_format=2)
    features = path / "tables" / "uni2_tiles" / "X"
    about = json.loads((features / ".zarray").read_text())
    codec = {"id": "pickle", "protocol": 5}
    about |= {"filters": None, "compressor": None}
    about[place] = [codec] if place == "filters" else codec
    (features / ".zarray").write_text(json.dumps(about))
    chunks = list(features.glob("[0-9]*"))
    assert chunks
    for chunk in chunks:
        chunk.write_bytes(pickle.dumps(_Touches(tmp_path / "touched")))
    (problem,) = find_features(tmp_path).problems.values()
    assert "pickle" in str(problem)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    "part",
    ["tables/uni2_tiles", "tables/uni2_tiles/X", "tables/uni2_tiles/X/c/0/0", "shapes/tiles"],
)
def test_links_to_other_files_are_refused(tmp_path: Path, part: str) -> None:
    path = store(tmp_path / "in" / "s1.zarr")
    (path / part).rename(tmp_path / "elsewhere")
    (path / part).symlink_to(tmp_path / "elsewhere")
    trident(tmp_path / "in", "s2", encoder="uni2")
    settings = scaled(tmp_path, s2=0.25)
    result = import_features(str(tmp_path / "archive"), tmp_path / "in", settings)
    assert result.slides["imported"] == 1
    (reason,) = result.refused.values()
    assert "link" in reason


def test_chunks_that_would_fill_the_memory_are_refused(tmp_path: Path) -> None:
    features = store(tmp_path / "s1.zarr") / "tables" / "uni2_tiles" / "X" / "zarr.json"
    about = json.loads(features.read_text())
    about["chunk_grid"]["configuration"]["chunk_shape"] = [1 << 20, 1 << 12]
    features.write_text(json.dumps(about))
    (problem,) = find_features(tmp_path).problems.values()
    assert problem.code == "too_large"


@pytest.mark.parametrize("seed", range(24))
def test_damaged_stores_are_refused_or_read(tmp_path: Path, seed: int) -> None:
    path = store(tmp_path / "s1.zarr", zarr_format=2 + seed % 2)
    rng = np.random.default_rng(seed)
    files = sorted(one for one in path.rglob("*") if one.is_file())
    for _ in range(3):
        file = files[rng.integers(len(files))]
        content = bytearray(file.read_bytes())
        if len(content) and rng.random() < 0.7:
            content[rng.integers(len(content))] = rng.integers(256)
        else:
            del content[rng.integers(len(content) + 1) :]
        file.write_bytes(content)
    with suppress(SlideError):  # of all errors this one alone
        for record in spatialdata.read_spatialdata(path, "s1"):
            record.read(0, record.n)
            assert record.coordinates is not None
            record.coordinates()


def test_without_zarr_a_store_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store(tmp_path / "s1.zarr")
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(SlideError) as raised:
        read_file(tmp_path / "s1.zarr", "s1")
    assert raised.value.code == "missing_package"
    assert "pathflip[spatialdata]" in raised.value.hint


def test_anndata_reads_what_is_written(tmp_path: Path) -> None:
    trident(tmp_path / "job")
    import_features(str(tmp_path / "archive"), tmp_path / "job", scaled(tmp_path, s1=0.25))
    opened = Archive(tmp_path / "archive")
    export_features(opened, "spatialdata", tmp_path / "out")
    made = anndata.io.read_zarr(tmp_path / "out" / "s1.zarr" / "tables" / "uni_tiles")
    assert (FEATURES.astype(np.float16) == made.X).all()
    assert list(made.obs["tile_id"]) == list(range(7))
    assert set(made.obs["library_id"]) == {"tiles"}
    assert made.uns["spatialdata_attrs"] == {
        "region": "tiles", "region_key": "library_id", "instance_key": "tile_id",
    }  # fmt: skip
    # Killed before it noted the store: it is known by itself.
    (tmp_path / "out" / DONE).unlink()
    assert export_features(opened, "spatialdata", tmp_path / "out")["slides"] == 1
    # Another store may hold what others added: it is not replaced.
    import_features(str(tmp_path / "other"), tmp_path / "job", scaled(tmp_path, s1=0.25))
    with pytest.raises(SlideError, match="already") as error:
        export_features(Archive(tmp_path / "other"), "spatialdata", tmp_path / "out")
    assert error.value.code == "exists"


OTHERS = """
import json, sys, warnings
warnings.filterwarnings("ignore")
import numpy as np, spatialdata, wsidata, lazyslide
from wsidata.io import add_features
ours, slide, theirs = sys.argv[1:]
# What pathflip wrote, by SpatialData, wsidata and LazySlide.
plain = spatialdata.read_zarr(ours)
tiles, table = spatialdata.join_spatialelement_table(
    sdata=plain, spatial_element_names="tiles", table_name="uni_tiles", how="inner")
wsi = wsidata.open_wsi(slide, store=ours)
read = wsi.fetch.features_anndata("uni")
lazyslide.tl.feature_aggregation(wsi, "uni")
lazyslide.pp.tile_graph(wsi)
wsi.write()
found = {
    "bounds": tiles["tiles"].bounds.to_numpy().tolist(), "joined": np.asarray(table.X).tolist(),
    "X": np.asarray(read.X).tolist(), "spatial": np.asarray(read.obsm["spatial"]).tolist(),
    "image": list(wsi.ds.tile_images("tiles")[0]["image"].shape),
    "mean": np.asarray(wsi.tables["uni_tiles"].varm["agg_slide"]).ravel().tolist(),
}
# What LazySlide writes: features that say where their tile is.
wsi = wsidata.open_wsi(slide, store=theirs)
lazyslide.pp.find_tissues(wsi)
lazyslide.pp.tile_tissues(wsi, 128, mpp=0.5)
corners = wsi.shapes["tiles"].bounds[["minx", "miny"]].to_numpy()
add_features(wsi, "uni2_tiles", "tiles", (corners / 64).astype(np.float32))
wsi.write()
found["corners"] = corners.tolist()
print(json.dumps(found))
"""


def test_lazyslide_and_pathflip_open_each_others_stores(tmp_path: Path) -> None:
    """The real tools, in an environment apart: they need an older pandas than the lock's."""
    python = os.environ.get("PATHFLIP_LAZYSLIDE_PYTHON")
    if not python:
        pytest.skip("PATHFLIP_LAZYSLIDE_PYTHON names no Python with lazyslide")
    trident(tmp_path / "job")
    import_features(str(tmp_path / "archive"), tmp_path / "job", scaled(tmp_path, s1=0.25))
    export_features(Archive(tmp_path / "archive"), "spatialdata", tmp_path / "out")
    pixels = np.full((3000, 4000, 3), 244, np.uint8)
    pixels[200:2600, 300:3300] = np.random.default_rng(1).integers(60, 190, (2400, 3000, 3))
    tifffile.imwrite(
        tmp_path / "s1.tif", pixels, tile=(256, 256), photometric="rgb", resolution=(4e4, 4e4),
        resolutionunit="CENTIMETER",
    )  # fmt: skip
    ours, theirs = tmp_path / "out" / "s1.zarr", tmp_path / "their" / "s1.zarr"
    theirs.parent.mkdir()
    paths = [str(one) for one in (ours, tmp_path / "s1.tif", theirs)]
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-c", OTHERS, *paths], capture_output=True, text=True, env=clean, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    half = FEATURES.astype(np.float16).astype(np.float32)
    assert (np.array(found["X"], np.float32) == half).all()
    assert (np.array(found["joined"], np.float32) == half).all()
    assert (np.array(found["spatial"]) == COORDS).all()
    assert (np.array(found["bounds"]) == np.c_[COORDS, COORDS + 512]).all()
    assert found["image"][:2] == [256, 256]
    assert np.array(found["mean"]) == pytest.approx(half.mean(axis=0), abs=1e-5)
    # Its own additions, and its store written anew, take nothing away.
    record = only(tmp_path / "out")
    assert (record.read(0, 7) == half).all()
    assert (record.mpp, record.encoder) == (0.25, "uni")
    record = only(tmp_path / "their")
    corners = np.array(found["corners"])
    assert len(corners) > 20
    assert (record.coordinates() == corners).all()
    assert (record.read(0, record.n) == (corners / 64).astype(np.float32)).all()
    assert (record.size, record.mpp, record.extent) == (256, 0.25, (4000, 3000))
