"""Files as TRIDENT, CLAM, STAMP, AtlasPatch, slide2vec, SlideChat write them; hostile ones."""

from __future__ import annotations

import json
import pickle
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from pathflip.errors import ConfigError, SlideError
from pathflip.interop.features.find import find_features
from pathflip.interop.features.hdf5 import read_hdf5
from pathflip.interop.features.tensors import read_tensors

RNG = np.random.default_rng(5)
FEATURES = RNG.standard_normal((7, 12)).astype(np.float32)
COORDS = np.array([[512 * (at % 3), 512 * (at // 3)] for at in range(7)])


def trident(job: Path, name: str = "s1", *, encoder: str = "uni_v1", rows: int = 1) -> Path:
    """A slide as TRIDENT stores it: chunks of one row, attributes of coords."""
    folder = job / "20x_256px_0px_overlap" / f"features_{encoder}"
    folder.mkdir(parents=True, exist_ok=True)
    with h5py.File(folder / f"{name}.h5", "w") as file:
        features = file.create_dataset(
            "features", data=FEATURES, chunks=(rows, 12), maxshape=(None, 12)
        )
        features.attrs["encoder"] = encoder
        coords = file.create_dataset("coords", data=COORDS, chunks=(rows, 2), maxshape=(None, 2))
        coords.attrs.update(
            {
                "patch_size": 256, "patch_size_level0": 512, "level0_magnification": 40,
                "target_magnification": 20, "overlap": 0, "name": name, "savetodir": "None",
                "level0_width": 4000, "level0_height": 3000,
            }
        )  # fmt: skip
    return folder / f"{name}.h5"


def clam(root: Path, name: str = "s1") -> None:
    """A slide as CLAM stores it: features and places apart, and features as a tensor."""
    for folder in ("patches", "h5_files", "pt_files"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    with h5py.File(root / "patches" / f"{name}.h5", "w") as file:
        coords = file.create_dataset("coords", data=COORDS, chunks=(1, 2), maxshape=(None, 2))
        coords.attrs.update({"patch_size": 256, "patch_level": 1, "downsample": (2.0, 2.0)})
    with h5py.File(root / "h5_files" / f"{name}.h5", "w") as file:
        file.create_dataset("features", data=FEATURES, chunks=(4, 12), maxshape=(None, 12))
        file.create_dataset("coords", data=COORDS.astype(np.int32))
    torch.save(torch.from_numpy(FEATURES), root / "pt_files" / f"{name}.pt")
    (root / "process_list_autogen.csv").write_text("slide_id,process\ns1.svs,1\n")


def only(folder: Path) -> Any:
    """The one record of a folder."""
    found = find_features(folder)
    assert not found.problems
    assert len(found.files) == 1
    return found.files[0]


@pytest.mark.parametrize("rows", [1, 3, 7])
def test_trident_is_known_by_its_attributes(tmp_path: Path, rows: int) -> None:
    trident(tmp_path, rows=rows)
    record = only(tmp_path)
    assert (record.format, record.slide, record.encoder) == ("trident", "s1", "uni_v1")
    assert (record.size, record.size_um, record.pixel_um) == (512, 128, 0.5)
    assert record.mpp is None
    assert record.extent == (4000, 3000)
    assert (record.read(2, 6) == FEATURES[2:6]).all()
    assert (record.read(0, 7) == FEATURES).all()
    assert (record.coordinates() == COORDS).all()


def test_clam_has_the_size_of_patches_in_another_file(tmp_path: Path) -> None:
    clam(tmp_path)
    record = only(tmp_path)
    assert (record.format, record.slide, record.encoder) == ("clam", "s1", None)
    assert record.size == 512
    assert record.mpp is None
    assert (record.read(0, 7) == FEATURES).all()
    assert (record.coordinates() == COORDS).all()
    (tmp_path / "h5_files" / "s1.h5").unlink()
    alone = only(tmp_path)
    assert alone.format == "pt"
    assert (alone.coordinates() == COORDS).all()
    assert alone.size == 512
    assert (alone.read(1, 3) == FEATURES[1:3]).all()


def test_stamp_is_in_micrometres(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "s1.h5", "w") as file:
        file["feats"] = FEATURES.astype(np.float16)
        file["coords"] = COORDS * 0.25
        file.attrs.update(
            {"unit": "um", "tile_size_um": 128.0, "tile_size_px": 224, "extractor": "uni2"}
        )
    record = only(tmp_path)
    assert (record.format, record.unit, record.encoder) == ("stamp", "um", "uni2")
    assert record.size == 128
    assert record.pixel_um == pytest.approx(128 / 224)
    assert record.read(0, 7).dtype == np.float16
    with h5py.File(tmp_path / "s1.h5", "a") as file:
        del file.attrs["unit"]
    assert find_features(tmp_path).problems[str(tmp_path / "s1.h5")].code == "unsupported"


def test_atlaspatch_holds_several_encoders(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "s1.h5", "w") as file:
        file["coords"] = np.c_[COORDS, np.full((7, 2), 512), np.zeros(7)].astype(np.int32)
        file["features/uni_v2"] = FEATURES
        file["features/conch_v1"] = FEATURES[:, :4]
        file.attrs.update({"patch_size": 256, "patch_size_level0": 512})
    found = find_features(tmp_path).files
    assert [(one.encoder, one.dim, one.size) for one in found] == [
        ("conch_v1", 4, 512), ("uni_v2", 12, 512),
    ]  # fmt: skip
    assert (found[1].coordinates() == COORDS).all()


def test_slide2vec_has_its_facts_beside_the_tensor(tmp_path: Path) -> None:
    for folder in ("tile_embeddings", "tiles"):
        (tmp_path / folder).mkdir()
    torch.save(torch.from_numpy(FEATURES), tmp_path / "tile_embeddings" / "s1.pt")
    meta = {"encoder_name": "uni2", "tile_size_lv0": 512, "requested_spacing_um": 0.5}
    (tmp_path / "tile_embeddings" / "s1.meta.json").write_text(json.dumps(meta))
    np.savez(tmp_path / "tiles" / "s1.coordinates.npz", x=COORDS[:, 0], y=COORDS[:, 1])
    record = only(tmp_path)
    assert (record.format, record.encoder, record.size) == ("slide2vec", "uni2", 512)
    assert (record.coordinates() == COORDS).all()
    assert (record.read(0, 7) == FEATURES).all()


def test_slidechat_is_a_table_of_numbers(tmp_path: Path) -> None:
    wide = RNG.standard_normal((3, 514)).astype(np.float32)
    lines = [",".join(map(str, range(514))), *(",".join(map(repr, row.tolist())) for row in wide)]
    (tmp_path / "BLCA").mkdir()
    (tmp_path / "BLCA" / "s1.csv").write_text("\n".join(lines))  # no newline at its end
    (tmp_path / "labels.csv").write_text("slide,label\na,b\n")
    found = find_features(tmp_path)
    (record,) = found.files
    assert (record.format, record.slide, record.encoder) == ("slidechat", "BLCA/s1", "conch")
    assert (record.n, record.dim, record.coordinates) == (3, 512, None)
    assert (record.read(1, 3).astype(np.float32) == wide[1:, :512]).all()
    assert found.others == 1


def test_what_stands_behind_slidechats_numbers_may_be_text(tmp_path: Path) -> None:
    wide = RNG.standard_normal((3, 512)).astype(np.float32)
    lines = [",".join([*map(str, range(512)), "patch"])]
    lines += [",".join([*map(repr, row.tolist()), f"{at}_7.png"]) for at, row in enumerate(wide)]
    (tmp_path / "s1.csv").write_text("\n".join(lines) + "\n")
    record = only(tmp_path)
    assert (record.format, record.n, record.dim, record.encoder) == ("slidechat", 3, 512, "conch")
    assert (record.read(0, 3).astype(np.float32) == wide).all()


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        (torch.float32, (9, 5)), (torch.float16, (9, 5)), (torch.float64, (1, 9, 5)),
        (torch.bfloat16, (9, 5)), (torch.float32, (3, 3, 5)), (torch.float32, (0, 5)),
    ],
)  # fmt: skip
def test_tensors_are_read_as_torch_reads_them(tmp_path: Path, dtype, shape) -> None:
    tensor = torch.randn(shape, dtype=torch.float64).to(dtype)
    torch.save(tensor, tmp_path / "a.pt")
    torch.save(torch.cat([tensor, tensor])[len(tensor) :], tmp_path / "view.pt")
    torch.save({"coords": torch.zeros(3), "features": tensor, "n": 3}, tmp_path / "b.pt")
    expected = tensor.reshape(-1, 5).to(torch.float64).numpy()
    for name in ("a.pt", "view.pt", "b.pt"):
        (record,) = read_tensors(tmp_path / name, "a")
        assert (record.n, record.dim) == expected.shape
        assert (record.read(0, record.n).astype(np.float64) == expected).all()
        assert (record.read(record.n // 2, record.n) == expected[record.n // 2 :]).all()


class _Touches:
    """Object whose unpickling makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_what_a_tensor_file_asks_for_is_not_executed(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    torch.save(_Touches(ran), tmp_path / "evil.pt")
    torch.save({"features": torch.zeros(2, 2), "x": _Touches(ran)}, tmp_path / "both.pt")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(_Touches(ran)))
    torch.save(torch.zeros(3, 2), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save(torch.randn(4, 4).T, tmp_path / "turned.pt")
    for name in ("evil", "both", "module", "plain", "old", "turned"):
        with pytest.raises(SlideError) as error:
            read_tensors(tmp_path / f"{name}.pt", "a")
        assert error.value.code == "unsupported"
        assert error.value.hint
    assert not ran.exists()


def test_a_tensor_that_is_longer_than_its_file_is_refused(tmp_path: Path) -> None:
    torch.save(torch.zeros(4, 4), tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as source,
        zipfile.ZipFile(tmp_path / "b.pt", "w") as target,
    ):
        for info in source.infolist():
            data = source.read(info)
            target.writestr(info.filename, data[:8] if info.filename.endswith("data/0") else data)
    with pytest.raises(SlideError, match="not all there"):
        read_tensors(tmp_path / "b.pt", "a")
    whole = (tmp_path / "a.pt").read_bytes()
    for size in range(0, len(whole), 97):
        (tmp_path / "c.pt").write_bytes(whole[:size])
        with pytest.raises(SlideError):
            read_tensors(tmp_path / "c.pt", "a")


@pytest.mark.parametrize("seed", range(40))
def test_tensor_files_with_flipped_bits_are_refused_or_read(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    torch.save({"features": torch.zeros(4, 4)}, tmp_path / "a.pt")
    whole = bytearray((tmp_path / "a.pt").read_bytes())
    for at in rng.integers(0, len(whole), 3):
        whole[at] ^= 1 << int(rng.integers(8))
    (tmp_path / "a.pt").write_bytes(whole)
    with suppress(SlideError):  # nothing else
        for record in read_tensors(tmp_path / "a.pt", "a"):
            assert record.read(0, record.n).shape == (record.n, record.dim)


def test_hdf5_that_takes_numbers_from_elsewhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"s" * 800)
    inner = trident(tmp_path / "job")
    with h5py.File(tmp_path / "link.h5", "w") as file:
        file["features"] = h5py.ExternalLink(str(inner), "features")
        file["coords"] = COORDS
    with h5py.File(tmp_path / "soft.h5", "w") as file:
        file["features"] = h5py.SoftLink("/other")
        file["coords"] = COORDS
    with h5py.File(tmp_path / "raw.h5", "w") as file:
        file.create_dataset(
            "features", (7, 12), "f4", external=[(str(tmp_path / "secret"), 0, 400)]
        )
        file["coords"] = COORDS
    layout = h5py.VirtualLayout((7, 12), "f4")
    layout[:] = h5py.VirtualSource(inner, "features", (7, 12))
    with h5py.File(tmp_path / "virtual.h5", "w") as file:
        file.create_virtual_dataset("features", layout)
        file["coords"] = COORDS
    for name in ("link", "soft", "raw", "virtual"):
        with pytest.raises(SlideError, match=r"elsewhere|another file"):
            read_hdf5(tmp_path / f"{name}.h5", name)


def test_damaged_files_are_told_and_the_others_found(tmp_path: Path) -> None:
    trident(tmp_path, "good")
    cut = trident(tmp_path, "cut")
    cut.write_bytes(cut.read_bytes()[:600])
    no = trident(tmp_path, "no")
    no.write_bytes(b"nothing of the kind")
    uneven = trident(tmp_path, "uneven")
    with h5py.File(uneven, "a") as file:
        file["coords"].resize(3, axis=0)
    words = trident(tmp_path, "words")
    with h5py.File(words, "a") as file:
        del file["features"]
        file["features"] = ["a", "b"]
    vast = trident(tmp_path, "vast")
    with h5py.File(vast, "a") as file:
        # A kilobyte that would be 8 GB in memory.
        file.create_dataset("regions", (1 << 28, 4), "f8", chunks=(1024, 4), compression="gzip")
    found = find_features(tmp_path)
    assert [one.slide for one in found.files] == ["good"]
    assert set(found.problems) == {str(one) for one in (cut, no, uneven, words, vast)}


def test_a_folder_without_features_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("slide,label\na,b\n")
    with pytest.raises(ConfigError, match="no patch features"):
        find_features(tmp_path)
    with pytest.raises(ConfigError, match="no format"):
        find_features(tmp_path, only="dsmil")
    with pytest.raises(ConfigError, match="does not exist"):
        find_features(tmp_path / "none")
