"""QuPath GeoJSON: the schema, the frame, the forms read and the errors named."""

from __future__ import annotations

import json
import uuid
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pathflip.errors import ConfigError
from pathflip.geometry import Tiling, patch_rects, plan_regions
from pathflip.interop.annotation_files import read_objects, read_tissue
from pathflip.interop.qupath import export_archive, export_slide
from pathflip.slides.tissue import TissueMask

MPP = 0.2738
SQUARE = [[[0, 0], [100, 0], [100, 80], [0, 80], [0, 0]]]
HOLE = [[20, 20], [40, 20], [40, 40], [20, 40], [20, 20]]
POLYGON = {"type": "Polygon", "coordinates": [*SQUARE, HOLE]}
FEATURE = {"type": "Feature", "geometry": POLYGON, "properties": {}}


def planted() -> tuple[TissueMask, list[dict[str, Any]]]:
    mask = np.zeros((300, 280), np.bool_)
    mask[10:270, 5:200] = True
    mask[60:90, 60:90] = False
    mask[100:140, 220:270] = True
    tissue = TissueMask(mask, 8.0, MPP)
    tiling = Tiling(min_region_patches=0)
    plan = plan_regions(tiling, width=8180, height=8760, mpp=MPP, tissue=tissue)
    assert len(plan) > 1
    return tissue, [
        {
            "region_id": f"s/{rx}_{ry}",
            "rx": rx,
            "ry": ry,
            "x0": 1,
            "tissue_fraction": fraction,
            "n_patches": n,
        }
        for rx, ry, fraction, n in zip(
            plan.rx, plan.ry, plan.tissue_fraction, plan.n_patches, strict=True
        )
    ]


def write(tmp_path: Path, document: Any) -> Path:
    path = tmp_path / "objects.geojson"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


@pytest.mark.parametrize("bounds", [(0, 0), (1000, 352)])
def test_export_has_the_schema_and_the_frame_of_qupath(
    tmp_path: Path, bounds: tuple[int, int]
) -> None:
    tissue, rows = planted()
    path = tmp_path / "s.geojson"
    n = export_slide(
        path,
        slide_id="s",
        mpp=MPP,
        tiling=Tiling(),
        tissue=tissue,
        regions=rows,
        bounds_x0=bounds[0],
        bounds_y0=bounds[1],
    )
    document = json.loads(path.read_text())
    assert set(document) == {"type", "features"}  # no crs
    assert document["type"] == "FeatureCollection"
    features = document["features"]
    assert len(features) == n == 2 + len(rows)
    assert len({feature["id"] for feature in features}) == n
    for feature in features:
        assert set(feature) == {"type", "id", "geometry", "properties"}
        assert feature["type"] == "Feature"
        assert str(uuid.UUID(feature["id"])) == feature["id"]
        assert feature["geometry"]["type"] == "Polygon"
        for ring in feature["geometry"]["coordinates"]:
            assert ring[0] == ring[-1]
            assert len(ring) >= 5
        properties = feature["properties"]
        assert properties["objectType"] in ("annotation", "tile")
        assert properties["isLocked"] is True
        assert isinstance(properties["name"], str)
        assert isinstance(properties["classification"]["name"], str)
        assert all(0 <= c <= 255 for c in properties["classification"]["color"])
        assert all(isinstance(v, float) for v in properties["measurements"].values())
        assert all(isinstance(v, str) for v in properties["metadata"].values())

    annotations = [f for f in features if f["properties"]["objectType"] == "annotation"]
    assert [len(f["geometry"]["coordinates"]) for f in annotations] == [2, 1]
    areas = [f["properties"]["measurements"]["area_mm2"] for f in annotations]
    assert areas == pytest.approx([(260 * 195 - 900) * 64e-6, 2000 * 64e-6])

    tiles = [f for f in features if f["properties"]["objectType"] == "tile"]
    for tile, row in zip(tiles, rows, strict=True):
        rects = patch_rects(Tiling(), rx=int(row["rx"]), ry=int(row["ry"]), mpp=MPP)
        ring = np.array(tile["geometry"]["coordinates"][0]) + bounds
        assert ring.min(axis=0).tolist() == rects[0, :2].tolist()
        assert ring.max(axis=0).tolist() == (rects[-1, :2] + rects[-1, 2:]).tolist()
        assert tile["properties"]["measurements"] == {
            "tissue_fraction": pytest.approx(float(row["tissue_fraction"])),
            "n_patches": float(row["n_patches"]),
        }
        assert tile["properties"]["metadata"]["region_id"] == row["region_id"]


@pytest.mark.parametrize("bounds", [(0, 0), (1000, 352)])
def test_the_export_read_back_is_the_same_tissue(tmp_path: Path, bounds: tuple[int, int]) -> None:
    tissue, rows = planted()
    path = tmp_path / "s.geojson"
    frame = {"bounds_x0": bounds[0], "bounds_y0": bounds[1]}
    export_slide(path, slide_id="s", mpp=MPP, tiling=Tiling(), tissue=tissue, regions=rows, **frame)
    back = read_tissue(path, width=8180, height=8760, slide_mpp=MPP, **frame)
    assert np.array_equal(back.mask, tissue.mask)  # the tiles are not taken for tissue


def test_regions_end_where_the_slide_does(tmp_path: Path) -> None:
    """QuPath drew longer ones beyond the image, and an import refused the file."""
    path = tmp_path / "s.geojson"
    side = round(Tiling().side * Tiling().patch_um / MPP)
    export_slide(
        path, slide_id="s", mpp=MPP, tiling=Tiling(), tissue=None,
        regions=[{"rx": 0, "ry": 0}, {"rx": 1, "ry": 0}], extent=(side + 100, side - 50),
    )  # fmt: skip
    rings = [
        np.array(one["geometry"]["coordinates"][0])
        for one in json.loads(path.read_text())["features"]
    ]
    assert [ring.min(axis=0).tolist() for ring in rings] == [[0, 0], [side, 0]]
    assert [ring.max(axis=0).tolist() for ring in rings] == [
        [side, side - 50], [side + 100, side - 50],
    ]  # fmt: skip


def test_export_is_deterministic_and_replaces_the_file_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tissue, rows = planted()
    path = tmp_path / "s.geojson"
    args: dict[str, Any] = {"mpp": MPP, "tiling": Tiling(), "tissue": tissue}
    export_slide(path, slide_id="s", regions=rows, **args)
    first = path.read_bytes()
    export_slide(path, slide_id="s", regions=rows, **args)
    assert path.read_bytes() == first
    assert [p.name for p in tmp_path.iterdir()] == ["s.geojson"]

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathflip.interop.qupath.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        export_slide(path, slide_id="other", regions=rows, **args)
    assert path.read_bytes() == first
    assert [p.name for p in tmp_path.iterdir()] == ["s.geojson"]


class StubArchive:
    """The five questions an export asks."""

    def __init__(self) -> None:
        self.tissue, self.rows = planted()

    def tiling(self) -> dict[str, float]:
        return {"region_um": 2048.0, "patch_um": 128.0, "mpp": 0.5}

    def ready_ids(self) -> set[str]:
        return {"b", "a"}

    def resolve(self, name: str) -> str:
        return name.removesuffix(".svs")

    def slide(self, slide_id: str) -> dict[str, Any]:
        bounds = {"bounds_x0": 96, "bounds_y0": 32} if slide_id == "b" else {}
        return {
            "mpp": MPP,
            "tissue_mpp": 8.0,
            "tissue_png": self.tissue.to_png(),
            "width": 8180,
            "height": 8760,
            "bounds_x0": None,
            "bounds_y0": None,
        } | bounds

    def regions(self, slide_id: str, columns: list[str]) -> pa.Table:
        rows = [{name: row.get(name, 0) for name in columns} for row in self.rows]
        return pa.Table.from_pylist(rows)


def test_an_archive_is_exported_slide_by_slide(tmp_path: Path) -> None:
    archive: Any = StubArchive()
    folder = tmp_path / "new" / "folder"
    written = export_archive(archive, folder)
    assert written == [folder / "a.geojson", folder / "b.geojson"]
    assert export_archive(archive, tmp_path, slides=["b.svs", "b"]) == [tmp_path / "b.geojson"]
    assert (tmp_path / "b.geojson").read_bytes() == written[1].read_bytes()

    frame = {"width": 8180, "height": 8760, "slide_mpp": MPP}
    for path, bounds in zip(written, ({}, {"bounds_x0": 96, "bounds_y0": 32}), strict=True):
        back = read_tissue(path, **frame, **bounds)
        assert np.array_equal(back.mask, archive.tissue.mask)
        tiles = [one for one in read_objects(path) if one.object_type == "tile"]
        assert len(tiles) == len(archive.rows)
        assert set(tiles[0].measurements) == {"tissue_fraction", "n_patches", "n_bad"}

    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        export_archive(archive, tmp_path / "file")


def test_rows_of_an_empty_slide_and_odd_values(tmp_path: Path) -> None:
    path = tmp_path / "s.geojson"
    empty = TissueMask(np.zeros((3, 3), np.bool_), 8.0, 0.5)
    args: dict[str, Any] = {"slide_id": "s", "mpp": 0.5, "tiling": Tiling()}
    assert export_slide(path, tissue=empty, regions=[], **args) == 0
    assert json.loads(path.read_text()) == {"type": "FeatureCollection", "features": []}
    row = {"rx": 1, "ry": 0, "blur": float("nan"), "note": "x", "flag": True, "pen": None, "n": 2}
    assert export_slide(path, tissue=None, regions=[row], **args) == 1
    (tile,) = read_objects(path)
    assert tile.measurements == {"n": 2.0}
    assert tile.polygons[0][0].tolist() == [[4096, 0], [8192, 0], [8192, 4096], [4096, 4096]]


@pytest.mark.parametrize(
    "document",
    [
        {"type": "FeatureCollection", "features": [FEATURE]},
        [FEATURE],
        FEATURE,
        POLYGON,
        [POLYGON],
        {"type": "MultiPolygon", "coordinates": [[*SQUARE, HOLE]]},
        {"type": "GeometryCollection", "geometries": [POLYGON, {"type": "Point"}]},
        "\ufeff" + json.dumps(FEATURE),
    ],
)
def test_every_common_form_is_read(tmp_path: Path, document: Any) -> None:
    (one,) = read_objects(write(tmp_path, document))
    ((outer, holes),) = one.polygons
    assert outer.tolist() == SQUARE[0][:-1]
    assert [hole.tolist() for hole in holes] == [HOLE[:-1]]
    assert one.object_type == "annotation"


def test_a_zip_is_read_by_content(tmp_path: Path) -> None:
    path = tmp_path / "export.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("objects.geojson", json.dumps([FEATURE, FEATURE]))
        archive.writestr("__MACOSX/._objects.geojson", b"\x00\x05")
        archive.writestr("readme.txt", "x")
    assert len(read_objects(path)) == 2
    assert read_tissue(path, width=100, height=80, slide_mpp=8.0).mask.sum() == 7600


def test_old_and_foreign_properties_are_read(tmp_path: Path) -> None:
    old = {
        "type": "Feature",
        "id": "PathTileObject",
        "geometry": POLYGON,
        "properties": {
            "classification": {"name": "Tumor", "colorRGB": -3670016},
            "measurements": [{"name": "score", "value": 0.5}, {"name": "bad", "value": "NaN"}],
        },
    }
    foreign = {**FEATURE, "properties": {"tissue_id": 0, "classification": '{"name": "Stroma"}'}}
    nested = {**FEATURE, "properties": {"classification": {"names": ["Tumor", "Positive"]}}}
    plain = {**FEATURE, "properties": {"name": "mine", "classification": "Necrosis"}}
    first, *others = read_objects(write(tmp_path, [old, foreign, nested, plain]))
    assert (first.object_type, first.classification) == ("tile", "Tumor")
    assert first.measurements == {"score": 0.5}
    assert [one.classification for one in others] == ["Stroma", "Tumor: Positive", "Necrosis"]
    assert others[2].name == "mine"


def test_bounds_are_added_on_the_way_in(tmp_path: Path) -> None:
    (one,) = read_objects(write(tmp_path, FEATURE), bounds_x0=7, bounds_y0=11)
    assert one.polygons[0][0][0].tolist() == [7, 11]


def area(x: int, y: int, side: int, name: str | None = None, **more: Any) -> dict[str, Any]:
    ring = [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]
    named = {} if name is None else {"classification": {"name": name}}
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": {"objectType": "annotation"} | named | more,
    }


@pytest.mark.parametrize(
    ("drawn", "square_px"),
    [
        # By hand: 4000² px of tissue at (1000, 1000); what is ignored takes from it what it covers.
        ([area(1000, 1000, 4000)], 16e6),
        ([area(1000, 1000, 4000, "Tissue"), area(2000, 2000, 2000, "Ignore*")], 12e6),
        ([area(2000, 2000, 2000, "Ignore*"), area(1000, 1000, 4000, "Tissue")], 12e6),
        ([area(1000, 1000, 4000, "Tissue"), area(6000, 6000, 2000, "Ignore*")], 16e6),
        ([area(1000, 1000, 4000, "Tissue"), area(4000, 1000, 2000, "Artifact")], 14e6),
        ([area(1000, 1000, 4000, "Tumor"), area(2000, 2000, 2000, "Tumor: Ignore*")], 12e6),
        ([area(1000, 1000, 4000, "Region*"), area(2000, 2000, 2000, "necrosis")], 16e6),
        ([area(1000, 1000, 4000), area(2000, 2000, 1000, "background")], 15e6),
    ],
)
def test_areas_that_are_no_tissue_are_cut_out(
    tmp_path: Path, drawn: list[dict[str, Any]], square_px: float
) -> None:
    path = write(tmp_path, {"type": "FeatureCollection", "features": drawn})
    mask = read_tissue(path, width=8000, height=8000, slide_mpp=0.5)
    assert mask.area_mm2 == pytest.approx(square_px * 0.25e-6, rel=0.02)  # 8 µm pixels


def test_classes_can_be_chosen(tmp_path: Path) -> None:
    drawn = [area(0, 0, 2000, "Tumor"), area(4000, 0, 1000, "Stroma"), area(0, 0, 1000, "Ignore*")]
    path = write(tmp_path, {"type": "FeatureCollection", "features": drawn})

    def mm2(*classes: str) -> float:
        mask = read_tissue(path, width=8000, height=8000, slide_mpp=0.5, classes=classes)
        return mask.area_mm2

    assert mm2("tumor ") == pytest.approx(0.75, rel=0.02)
    assert mm2("Stroma") == pytest.approx(0.25, rel=0.02)
    assert mm2("Stroma", "Tumor") == mm2() == pytest.approx(1.0, rel=0.02)
    with pytest.raises(ConfigError, match="no polygon of tissue") as error:
        mm2("Necrosis")
    assert error.value.hint == "Its areas are of: Ignore*, Stroma, Tumor."
    only = write(tmp_path, area(0, 0, 1000, "Ignore*"))
    with pytest.raises(ConfigError, match="no polygon of tissue"):
        read_tissue(only, width=8000, height=8000, slide_mpp=0.5)


@pytest.mark.parametrize(
    "document",
    [
        {"type": "FeatureCollection", "features": []},
        [],
        {**FEATURE, "geometry": None},
        {**FEATURE, "geometry": {"type": "Point", "coordinates": [1, 2]}},
    ],
)
def test_a_file_without_a_polygon_is_no_tissue(tmp_path: Path, document: Any) -> None:
    path = write(tmp_path, document)
    assert all(not one.polygons for one in read_objects(path))
    with pytest.raises(ConfigError, match=r"objects\.geojson holds no polygon"):
        read_tissue(path, width=100, height=80, slide_mpp=0.5)


@pytest.mark.parametrize(
    "document",
    [
        "",
        "not json",
        '"text"',
        "3",
        "[3]",
        "null",
        "{}",
        '{"type": "FeatureCollection"}',
        '{"type": "FeatureCollection", "features": 5}',
        '{"type": "Polygon"}',
        '{"type": "Circle", "coordinates": []}',
        '{"type": "Polygon", "coordinates": [[[0, 0], [1, 1]]]}',
        '{"type": "Polygon", "coordinates": [[[0, 0], [1, NaN], [2, 2]]]}',
        '{"type": "Polygon", "coordinates": [[[0, 0], ["a", 1], [2, 2]]]}',
        '{"type": "Polygon", "coordinates": [[[0], [1], [2]]]}',
        '{"type": "Polygon", "coordinates": [[[0], [1], [2], [3], [4], [5]]]}',
        '{"type": "MultiPolygon", "coordinates": [[[[[0, 0], [1, 1], [2, 0]]]]]}',
        '{"type": "Polygon", "coordinates": [[[0, 0], [1e300, 1], [2, 2]]]}',
        '{"type": "Polygon", "coordinates": [[[0, 0], [1' + "0" * 400 + ", 1], [2, 2]]]}",
        '{"type": "Polygon", "coordinates": 5}',
        "[" * 100_000,
    ],
)
def test_what_is_no_geojson_is_named(tmp_path: Path, document: str) -> None:
    with pytest.raises(ConfigError, match=r"objects\.geojson") as caught:
        read_objects(write(tmp_path, document))
    assert caught.value.hint


def test_missing_binary_and_broken_zip_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent"):
        read_objects(tmp_path / "absent.geojson")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_objects(tmp_path)
    (tmp_path / "image.geojson").write_bytes(b"\xff\xd8\xff\xe0" * 9)
    with pytest.raises(ConfigError, match="image"):
        read_objects(tmp_path / "image.geojson")
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04" + b"\0" * 50)
    with pytest.raises(ConfigError, match="broken"):
        read_objects(tmp_path / "broken.zip")
    with zipfile.ZipFile(tmp_path / "damaged.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.geojson", json.dumps([FEATURE] * 50))
    data = bytearray((tmp_path / "damaged.zip").read_bytes())
    data[45:60] = b"\xff" * 15
    (tmp_path / "damaged.zip").write_bytes(data)
    with pytest.raises(ConfigError, match="damaged"):
        read_objects(tmp_path / "damaged.zip")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as archive:
        archive.writestr("a.txt", "x")
    with pytest.raises(ConfigError, match=r"no \.geojson"):
        read_objects(tmp_path / "empty.zip")


def test_a_zip_bomb_is_refused_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pathflip.interop.qupath.MAX_BYTES", 1 << 20)
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.geojson", b" " * (2 << 20))
    assert path.stat().st_size < 10_000
    with pytest.raises(ConfigError, match="unpacks to more"):
        read_objects(path)
