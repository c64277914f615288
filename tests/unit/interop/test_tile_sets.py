"""Readers of tile sets, on files made by hand in each set's layout."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np
import pytest

from pathflip.errors import ConfigError, SlideError
from pathflip.interop import tile_sets
from pathflip.interop.tile_sets import Tile, read_tile, read_tiles


def picture(path: Path, *, rgb: tuple[int, int, int] = (200, 100, 50), side: int = 32) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = cv2.imencode(path.suffix, np.full((side, side, 3), rgb[::-1], np.uint8))[1]
    path.write_bytes(data.tobytes())
    return path


def test_a_transparent_tile_is_on_white(tmp_path: Path) -> None:
    pixels = np.full((32, 32, 4), (50, 100, 200, 255), np.uint8)  # blue first
    pixels[:, :16] = 0
    (tmp_path / "a.png").write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
    found = read_tile(Tile(path=tmp_path / "a.png", name="a.png", label="x"))
    assert (found[:, :16] == 255).all()
    assert (found[:, 16:] == (200, 100, 50)).all()


def brief(tiles: list[Tile]) -> list[tuple[str, str, str | None]]:
    return [(tile.name, tile.label, tile.split) for tile in tiles]


def workbook(path: Path, rows: list[list[str | int]], *, inline: bool = False) -> None:
    """An .xlsx as Excel writes it: strings shared (or inline), empty cells left out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    strings = list(dict.fromkeys(cell for row in rows for cell in row if isinstance(cell, str)))
    space = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
    lines = []
    for number, row in enumerate(rows, start=1):
        cells = []
        for column, cell in enumerate(row):
            at = f'r="{"ABCDEFGH"[column]}{number}"'
            if isinstance(cell, int):
                cells.append(f"<c {at}><v>{cell}</v></c>")
            elif cell and inline:
                cells.append(f'<c {at} t="inlineStr"><is><t>{cell}</t></is></c>')
            elif cell:
                cells.append(f'<c {at} t="s"><v>{strings.index(cell)}</v></c>')
        lines.append(f'<row r="{number}">{"".join(cells)}</row>')
    with zipfile.ZipFile(path, "w") as book:
        body = f"<worksheet {space}><sheetData>{''.join(lines)}</sheetData></worksheet>"
        book.writestr("xl/worksheets/sheet1.xml", body)
        book.writestr("xl/worksheets/sheet2.xml", f"<worksheet {space}/>")
        if not inline:
            items = "".join(f"<si><t>{text}</t></si>" for text in strings)
            book.writestr("xl/sharedStrings.xml", f"<sst {space}>{items}</sst>")


def test_folders_are_classes_with_and_without_splits(tmp_path: Path) -> None:
    for name in ("a/x.png", "a/deep/y.JPG", "b/z.tif", "b/notes.txt", "b/.hidden.png"):
        picture(tmp_path / "plain" / name) if not name.endswith("txt") else (
            tmp_path / "plain" / name
        ).write_text("no picture")
    assert brief(read_tiles(tmp_path / "plain")) == [
        ("a/deep/y.JPG", "a", None), ("a/x.png", "a", None), ("b/z.tif", "b", None),
    ]  # fmt: skip
    for name in ("train/a/1.png", "Validation/a/2.png", "test/b/3.png"):
        picture(tmp_path / "split" / name)
    assert brief(read_tiles(tmp_path / "split")) == [
        ("Validation/a/2.png", "a", "val"), ("test/b/3.png", "b", "test"),
        ("train/a/1.png", "a", "train"),
    ]  # fmt: skip


def test_a_table_names_pictures_labels_scales_splits_and_patients(tmp_path: Path) -> None:
    picture(tmp_path / "p/one.png", rgb=(10, 20, 30))
    table = tmp_path / "tiles.csv"
    table.write_text("image,label,mpp,split,patient\np/one.png,x,0.25,valid,P1\ntwo.png,y,,,\n")
    one, two = read_tiles(table)
    assert (one.label, one.mpp, one.split, one.group) == ("x", 0.25, "val", "P1")
    assert (two.mpp, two.split, two.group) == (None, None, None)
    assert (read_tile(one) == (10, 20, 30)).all()  # RGB, not BGR
    with pytest.raises(SlideError) as missing:
        read_tile(two)
    assert missing.value.code == "not_a_file"
    for row, says in (("a.png,x,0", "mpp"), (",x,0.5", "no image"), ("a.png,x,fine", "mpp")):
        table.write_text(f"image,label,mpp\n{row}\n")
        with pytest.raises(ConfigError, match=f"line 2: {says}"):
            read_tiles(table)


def test_nct_crc(tmp_path: Path) -> None:
    picture(tmp_path / "NCT-CRC-HE-100K/ADI/ADI-AAAMHQMK.tif")
    picture(tmp_path / "NCT-CRC-HE-100K-NONORM/ADI/ADI-AAAMHQMK.tif")
    picture(tmp_path / "CRC-VAL-HE-7K/TUM/TUM-TCGA-YYNVDYAM.tif")
    test, train = read_tiles(tmp_path, "nct-crc")
    assert (test.label, test.split, train.label, train.split) == ("TUM", "test", "ADI", "train")
    assert "NONORM" not in train.name
    assert read_tile(train).shape == (32, 32, 3)
    assert brief(read_tiles(tmp_path / "CRC-VAL-HE-7K", "nct-crc")) == [
        ("TUM/TUM-TCGA-YYNVDYAM.tif", "TUM", "test")
    ]


def test_pcam(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(path: Path, **arrays: np.ndarray[Any, Any]) -> None:
        with h5py.File(path, "w") as file:
            for name, values in arrays.items():
                file[name] = values

    monkeypatch.setattr(tile_sets, "_h5", tile_sets._h5.__wrapped__)
    pixels = np.arange(3 * 96 * 96 * 3, dtype=np.uint8).reshape(3, 96, 96, 3)
    for split, labels in (("valid", [0, 1, 1]), ("test", [1, 0, 0])):
        stem = tmp_path / f"camelyonpatch_level_2_split_{split}"
        write(Path(f"{stem}_x.h5"), x=pixels)
        write(Path(f"{stem}_y.h5"), y=np.array(labels).reshape(3, 1, 1, 1))
    meta = tmp_path / "camelyonpatch_level_2_split_test_meta.csv"
    meta.write_text(",coord_y,coord_x,tumor_patch,center_tumor_patch,wsi\n" + "".join(
        f"{i},1,2,True,True,camelyon16_test_00{i}\n" for i in range(3)
    ))  # fmt: skip
    tiles = read_tiles(tmp_path, "pcam")
    assert [(t.label, t.split, t.group) for t in tiles] == [
        ("tumour", "test", "camelyon16_test_000"), ("normal", "test", "camelyon16_test_001"),
        ("normal", "test", "camelyon16_test_002"), ("normal", "val", None),
        ("tumour", "val", None), ("tumour", "val", None),
    ]  # fmt: skip
    assert (read_tile(tiles[2]) == pixels[2]).all()
    meta.write_text(",wsi\n0,a\n")
    with pytest.raises(ConfigError, match="1 rows for 3 tiles"):
        read_tiles(tmp_path, "pcam")


def test_lc25000(tmp_path: Path) -> None:
    for name in ("lung_image_sets/lung_aca/lungaca1", "colon_image_sets/colon_n/colonn1"):
        picture(tmp_path / "lung_colon_image_set" / f"{name}.jpeg")
    found = read_tiles(tmp_path, "lc25000")
    assert [tile.label for tile in found] == ["colon_n", "lung_aca"]
    assert found == sorted(
        read_tiles(tmp_path / "lung_colon_image_set", "lc25000"), key=lambda tile: tile.name
    )


def test_mhist(tmp_path: Path) -> None:
    picture(tmp_path / "images/MHIST_aaa.png")
    (tmp_path / "annotations.csv").write_text(
        "Image Name,Majority Vote Label,Number of Annotators who Selected SSA (Out of 7),"
        "Partition\n"
        "MHIST_aaa.png,SSA,6,train\nMHIST_aab.png,HP,0,test\n"
    )
    there, gone = read_tiles(tmp_path, "mhist")
    assert (there.label, there.split, gone.label, gone.split) == ("SSA", "train", "HP", "test")
    assert read_tile(there).shape == (32, 32, 3)
    with pytest.raises(SlideError, match="MHIST_aab"):
        read_tile(gone)


def test_digestpath_takes_no_mask_for_a_picture(tmp_path: Path) -> None:
    name = "tissue-train-pos-v1/2018_64982_1-3_2019-02-25 21_57_36-lv1-1-2-3"
    picture(tmp_path / f"{name}.jpg")
    picture(tmp_path / f"{name}_mask.jpg")
    picture(tmp_path / "tissue-train-neg/2018_70000_1-1_2019-02-25 22_00_00-lv1-4.jpg")
    neg, pos = read_tiles(tmp_path, "digestpath")
    assert (neg.label, neg.group) == ("benign", "2018_70000")
    assert (pos.label, pos.group) == ("malignant", "2018_64982")


@pytest.mark.parametrize("kind", ["xlsx", "inline", "csv"])
def test_sicap(tmp_path: Path, kind: str) -> None:
    stem = "16B0001851_Block_Region_1_0_0_xini_6803_yini_59786"
    picture(tmp_path / f"SICAPv2/images/{stem}.jpg")
    folder = tmp_path / "SICAPv2/partition/Test"
    heads: list[str | int] = ["image_name", "NC", "G3", "G4", "G5", "G4C"]
    rows: dict[str, list[list[str | int]]] = {
        "Train": [heads, [f"{stem}.jpg", 0, 0, 1, 0, 1]],
        "Test": [heads, ["17B00208_Block_Region_2", 1, 0, 0, 0, 0]],
    }
    for name, table in rows.items():
        if kind == "csv":
            folder.mkdir(parents=True, exist_ok=True)
            text = "\n".join(",".join(map(str, row)) for row in table)
            (folder / f"{name}.csv").write_text(text)
        else:
            workbook(folder / f"{name}.xlsx", table, inline=kind == "inline")
    train, test = read_tiles(tmp_path, "sicap")
    assert (train.label, train.split, train.group) == ("G4", "train", "16B0001851")
    assert (test.label, test.split, test.name) == (
        "NC",
        "test",
        "images/17B00208_Block_Region_2.jpg",
    )
    assert read_tile(train).shape == (32, 32, 3)


def test_sicap_refuses_a_row_of_two_grades_and_a_file_that_is_no_workbook(tmp_path: Path) -> None:
    file = tmp_path / "partition/Test/Test.xlsx"
    workbook(file, [["image_name", "NC", "G3", "G4", "G5"], ["a", 1, 1, 0, 0]])
    with pytest.raises(ConfigError, match="line 2: 2 of NC"):
        read_tiles(tmp_path, "sicap")
    file.write_bytes(b"PK\x03\x04 half a file")
    with pytest.raises(ConfigError, match="workbook"):
        read_tiles(tmp_path, "sicap")


def test_bach(tmp_path: Path) -> None:
    picture(tmp_path / "ICIAR2018_BACH_Challenge/Photos/InSitu/is001.tif")
    picture(tmp_path / "ICIAR2018_BACH_Challenge/Photos/Normal/n001.tif")
    assert [tile.label for tile in read_tiles(tmp_path, "bach")] == ["InSitu", "Normal"]
    photos = tmp_path / "ICIAR2018_BACH_Challenge/Photos"
    assert [tile.label for tile in read_tiles(photos, "bach")] == ["InSitu", "Normal"]


def test_a_bad_picture_costs_itself(tmp_path: Path) -> None:
    picture(tmp_path / "a/small.png", side=8)
    (tmp_path / "a/text.png").write_text("no picture")
    cut = picture(tmp_path / "a/cut.png", side=64)
    cut.write_bytes(cut.read_bytes()[:40])
    grey = np.full((32, 32), 7, np.uint8)
    (tmp_path / "a/grey.png").write_bytes(cv2.imencode(".png", grey)[1].tobytes())
    tiles = {tile.path.stem: tile for tile in read_tiles(tmp_path)}
    assert (read_tile(tiles["grey"]) == 7).all()
    for name in ("small", "text", "cut"):
        with pytest.raises(SlideError, match=f"a/{name}.png") as bad:
            read_tile(tiles[name])
        assert bad.value.code == "unreadable"


def test_what_is_no_tile_set_is_refused(tmp_path: Path) -> None:
    for source, layout, code in (
        (tmp_path / "gone", None, "tiles"), (tmp_path, "imagenet", "layout"),
        *((tmp_path, layout, "tiles") for layout in tile_sets.LAYOUTS if layout != "csv"),
    ):  # fmt: skip
        with pytest.raises(ConfigError) as refused:
            read_tiles(source, layout)
        assert refused.value.code == code
