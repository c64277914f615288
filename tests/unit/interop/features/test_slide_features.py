"""Vectors of slides that other tools made: into an archive, searched, out again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pathflip.archive import Archive
from pathflip.archive.archive import vectors
from pathflip.archive.commit import Committer
from pathflip.archive.export import export_parquet
from pathflip.archive.filters import Filter
from pathflip.archive.maintain import maintain
from pathflip.archive.repair import repair
from pathflip.archive.search import search
from pathflip.archive.verify import verify
from pathflip.cli import main
from pathflip.errors import ArchiveError, ConfigError
from pathflip.interop.features.slide_files import read_slide_vectors
from pathflip.interop.features.slide_importing import (
    SlideFeatureImport,
    import_slide_features,
    slide_encoder_name,
)
from pathflip.search import find
from tests.unit.archive import cohort
from tests.unit.archive.harm import flip

SLIDES, DIM = range(8), 24
VECTORS = np.random.default_rng(5).normal(size=(len(SLIDES), DIM)).astype(np.float32)


def test_names() -> None:
    assert slide_encoder_name("TITAN") == "titan"
    assert slide_encoder_name("mean-uni_v2") == "mean_uni_v2"
    # GigaPath has an encoder of patches and one of slides, whose tables would have one name.
    assert slide_encoder_name("gigapath") == slide_encoder_name("prov-gigapath") == "gigapath_slide"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    uri = tmp_path_factory.mktemp("slides") / "a"
    cohort.build(uri, *SLIDES)
    return uri


@pytest.fixture
def uri(pristine: Path, tmp_path: Path) -> str:
    return str(shutil.copytree(pristine, tmp_path / "a"))


def trident(job: Path, values: np.ndarray = VECTORS, encoder: str = "titan") -> Path:
    """A job of TRIDENT: vectors of slides beside features of patches."""
    folder = job / "20x_512px_0px_overlap"
    (folder / f"slide_features_{encoder}").mkdir(parents=True)
    (folder / "features_conch_v15").mkdir(exist_ok=True)
    for n, vector in enumerate(values):
        places = np.arange(6).reshape(3, 2) * 512
        with h5py.File(folder / f"slide_features_{encoder}" / f"it's {n}.h5", "w") as file:
            file.create_dataset("features", data=vector)
            file.create_dataset("coords", data=places)
        with h5py.File(folder / "features_conch_v15" / f"it's {n}.h5", "w") as file:
            file.create_dataset("features", data=np.ones((3, 8), np.float32))
            file.create_dataset("coords", data=places)
    return job


def stored(uri: str, encoder: str = "titan") -> dict[str, np.ndarray]:
    rows = Archive(uri).embeddings(encoder)
    assert set(rows["kind"].to_pylist()) <= {"slide"}
    return dict(zip(rows["slide_id"].to_pylist(), vectors(rows["vector"]), strict=True))


def ids(*numbers: int) -> list[str]:
    return [f"slide{n:03d}" for n in numbers]


def test_trident_into_an_archive_and_again(uri: str, tmp_path: Path) -> None:
    job = trident(tmp_path / "job")
    config = SlideFeatureImport(revision="r1", licence="CC-BY-NC-ND-4.0")
    planned = import_slide_features(uri, job, config, dry_run=True)
    assert Archive(uri).slide_encoders() == {}
    done = import_slide_features(uri, job, config)
    assert planned == done
    assert done.encoder == {
        "name": "titan", "dim": DIM, "revision": "r1", "licence": "CC-BY-NC-ND-4.0",
    }  # fmt: skip
    assert done.slides == {"written": 8, "replaced": 0, "unchanged": 0, "refused": 0}
    assert (done.unmatched, done.ambiguous, done.others, done.exit_code) == ([], [], 8, 0)
    held = stored(uri)
    assert list(held) == ids(*SLIDES)
    assert np.array_equal(np.stack(list(held.values())), VECTORS)
    assert verify(uri).damaged == []
    versions = Archive(uri).dataset("embeddings_titan").version
    again = import_slide_features(uri, job)  # neither revision nor licence has to be said again
    assert again.slides == {"written": 0, "replaced": 0, "unchanged": 8, "refused": 0}
    assert again.encoder == done.encoder
    assert Archive(uri).dataset("embeddings_titan").version == versions
    assert Archive(uri).stats()["slide_encoders"] == {
        "titan": {"dim": DIM, "revision": "r1", "licence": "CC-BY-NC-ND-4.0"}
    }


def neighbours(values: np.ndarray, query: np.ndarray) -> tuple[list[int], np.ndarray]:
    """Every row by its cosine with a query, best first, by numpy alone."""
    values = values.astype(np.float64)
    cosine = values @ query / np.linalg.norm(values, axis=1) / np.linalg.norm(query)
    order = np.argsort(-cosine, kind="stable")
    return order.tolist(), cosine[order]


def test_search_among_them(uri: str, tmp_path: Path) -> None:
    import_slide_features(uri, trident(tmp_path / "job"))
    archive = Archive(uri)
    for n in (0, 5):
        order, cosine = neighbours(VECTORS, VECTORS[n].astype(np.float64))
        found = find(archive, slide=f"it's {n}", encoder="titan", level="slide", k=8).rows
        assert found["slide_id"].to_pylist() == ids(*order)
        np.testing.assert_allclose(found["score"].to_numpy(), cosine, atol=1e-6)
    query = np.random.default_rng(9).normal(size=DIM)
    order, _ = neighbours(VECTORS, query)
    train = [n for n in order if n % 2 == 0]
    space = {"encoder": "titan", "level": "slide", "filters": [Filter.parse("split=train")]}
    found = find(archive, vector=query, k=3, **space)
    assert found.rows["slide_id"].to_pylist() == ids(*train[:3])
    with pytest.raises(ConfigError, match="of slides, not of regions") as refused:
        search(archive, query, encoder="titan")
    assert "--level slide" in refused.value.hint
    with pytest.raises(ConfigError, match="of slides, not of patches"):
        find(archive, vector=query, encoder="titan", level="patch")
    with pytest.raises(ArchiveError, match="has 3 values"):
        find(archive, vector=np.ones(3), encoder="titan", level="slide")
    # The archive's own encoder is still the only one of patches, and needs no name.
    assert find(archive, slide="slide001", level="slide").rows.num_rows == 8


def shell(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, Any]:
    with pytest.raises(SystemExit) as ended:
        main([*args, "--json"])
    out = capsys.readouterr().out
    return int(ended.value.code or 0), json.loads(out) if out.strip() else None


def test_on_the_command_line(uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = str(trident(tmp_path / "job"))
    code, told = shell(capsys, "archive", "import", "--archive", uri, "--slide-features", job)
    assert (code, told["slide_features"]["slides"]["written"]) == (0, 8)
    asked = ["search", "--archive", uri, "--encoder", "titan", "--level", "slide"]
    code, rows = shell(capsys, *asked, "--slide", "slide002", "--exclude-same-slide", "-k", "2")
    order, _ = neighbours(VECTORS, VECTORS[2].astype(np.float64))
    assert [row["slide_id"] for row in rows] == ids(*order[1:3])
    code, told = shell(capsys, *asked, "tumour")
    assert code != 0
    assert "nothing here embeds words by it" in told["error"]["message"]
    code, told = shell(capsys, *asked, "--image", "x.png")
    assert code != 0
    assert "nothing here embeds a picture by it" in told["error"]["message"]


def test_what_differs_is_refused_or_replaced(uri: str, tmp_path: Path) -> None:
    import_slide_features(uri, trident(tmp_path / "one"))
    other = VECTORS.copy()
    other[3] += 1
    job = trident(tmp_path / "two", other)
    refused = import_slide_features(uri, job)
    assert refused.slides == {"written": 0, "replaced": 0, "unchanged": 7, "refused": 1}
    assert refused.exit_code == 3
    ((where, reason),) = refused.refused.items()
    assert where.endswith("it's 3.h5: it's 3")
    assert "--replace" in reason
    assert np.array_equal(stored(uri)["slide003"], VECTORS[3])
    replaced = import_slide_features(uri, job, SlideFeatureImport(replace=True))
    assert replaced.slides == {"written": 0, "replaced": 1, "unchanged": 7, "refused": 0}
    assert np.array_equal(stored(uri)["slide003"], other[3])
    assert len(stored(uri)) == 8
    assert verify(uri).damaged == []


def test_slides_are_never_made_and_names_never_guessed(tmp_path: Path) -> None:
    """Two slides of one name in two folders; one that is not there; one that is not ready."""
    uri = tmp_path / "a"
    cohort.build(uri, 0)
    with Committer(uri) as committer:
        committer.commit(slides=cohort.slide_rows(1, status="empty"))
        committer.update_slides(
            {"slide000": {"aliases": ["/siteA/x.svs"]}, "slide001": {"aliases": ["/siteB/x.svs"]}}
        )
    table = pa.table(
        {"slide": ["x", "nobody", "it's 1", "it's 0"]}
        | {f"d{n}": VECTORS[:4, n] for n in range(DIM)}
    )
    pq.write_table(table, tmp_path / "v.parquet")
    done = import_slide_features(
        str(uri), tmp_path / "v.parquet", SlideFeatureImport(encoder="prism")
    )
    assert (done.ambiguous, done.unmatched) == (["x"], ["nobody"])
    assert done.slides["written"] == 1
    assert list(stored(str(uri), "prism")) == ["slide000"]
    assert [text.split(":")[0] for text in done.refused.values()] == ["not_ready"]
    assert done.exit_code == 3


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "lists", "npz", "h5ad"])
def test_tables_of_slides(kind: str, uri: str, tmp_path: Path) -> None:
    names = [f"it's {n}.svs" for n in SLIDES]
    file = tmp_path / f"v.{'parquet' if kind == 'lists' else kind}"
    if kind in ("csv", "tsv"):
        mark = "," if kind == "csv" else "\t"
        head = mark.join(["slide", "label", *(f"feat_{n}" for n in range(DIM))])
        rows = [
            mark.join([name, "12", *(repr(float(x)) for x in row)])
            for name, row in zip(names, VECTORS, strict=True)
        ]
        file.write_text("\n".join([head, *rows]) + "\n")
    elif kind == "parquet":
        # Columns in any order: their numbers say which is which.
        columns = {str(n): VECTORS[:, n] for n in reversed(range(DIM))}
        pq.write_table(pa.table({"filename": names, **columns}), file)
    elif kind == "lists":
        pq.write_table(pa.table({"slide_id": names, "embedding": list(VECTORS)}), file)
    elif kind == "npz":
        np.savez(file, filenames=np.array(names), embeddings=VECTORS)
    else:
        with h5py.File(file, "w") as out:
            out.create_dataset("X", data=VECTORS)
            obs = out.create_group("obs")
            obs.attrs["_index"] = "_index"
            obs.create_dataset("_index", data=np.array(names, object), dtype=h5py.string_dtype())
    import_slide_features(uri, file, SlideFeatureImport(encoder="chief"))
    assert np.array_equal(np.stack(list(stored(uri, "chief").values())), VECTORS)


@pytest.mark.parametrize("kind", ["stamp", "atlaspatch", "pt", "pt dict", "npy", "half"])
def test_a_file_for_each_slide(kind: str, uri: str, tmp_path: Path) -> None:
    folder = tmp_path / "vectors"
    folder.mkdir()
    expected = VECTORS
    for n, vector in enumerate(VECTORS):
        stem = folder / f"it's {n}"
        if kind == "stamp":
            with h5py.File(stem.with_suffix(".h5"), "w") as file:
                file.attrs["feat_type"] = "slide"
                file.create_dataset("feats", data=vector[None])
        elif kind == "atlaspatch":
            with h5py.File(stem.with_suffix(".h5"), "w") as file:
                file.create_dataset("coords", data=np.zeros((3, 5), np.int32))
                file.create_dataset("features/conch", data=np.ones((3, 8)))
                file.create_dataset("slide_features/madeleine", data=vector)
        elif kind == "npy":
            np.save(stem.with_suffix(".npy"), vector)
        elif kind == "half":
            expected = VECTORS.astype(np.float16).astype(np.float32)
            torch.save(torch.from_numpy(vector).half()[None], stem.with_suffix(".pt"))
        else:
            tensor = torch.from_numpy(vector)
            torch.save({"features": tensor} if "dict" in kind else tensor, stem.with_suffix(".pt"))
    import_slide_features(uri, folder, SlideFeatureImport(encoder="madeleine"))
    assert np.array_equal(np.stack(list(stored(uri, "madeleine").values())), expected)


def test_several_encoders_in_one_job(uri: str, tmp_path: Path) -> None:
    trident(trident(tmp_path / "job"), VECTORS[:, :5], encoder="gigapath")
    with pytest.raises(ConfigError, match="2 slide encoders: gigapath_slide, titan") as refused:
        import_slide_features(uri, tmp_path / "job")
    assert "--encoder" in refused.value.hint
    config = SlideFeatureImport(encoder="gigapath")
    assert import_slide_features(uri, tmp_path / "job", config).encoder["dim"] == 5
    import_slide_features(uri, tmp_path / "job", SlideFeatureImport(encoder="titan"))
    assert set(Archive(uri).slide_encoders()) == {"gigapath_slide", "titan"}
    with pytest.raises(ConfigError, match="No file holds vectors of prism"):
        import_slide_features(uri, tmp_path / "job", SlideFeatureImport(encoder="prism"))


def test_two_revisions_stay_apart(uri: str, tmp_path: Path) -> None:
    job = trident(tmp_path / "job")
    import_slide_features(uri, job, SlideFeatureImport(revision="r1"))
    with pytest.raises(ArchiveError, match="with revision r1, not r2") as refused:
        import_slide_features(uri, job, SlideFeatureImport(revision="r2"))
    assert "--encoder NEW=titan" in refused.value.hint
    import_slide_features(uri, job, SlideFeatureImport(revision="r2", encoder="new=titan"))
    assert {k: v["revision"] for k, v in Archive(uri).slide_encoders().items()} == {
        "new": "r2", "titan": "r1",
    }  # fmt: skip
    with pytest.raises(ArchiveError, match="holds a patch encoder or a model tex"):
        import_slide_features(uri, job, SlideFeatureImport(encoder="tex=titan"))
    with Committer(uri) as committer, pytest.raises(ArchiveError, match="of a slide encoder"):
        committer.ensure_encoder_table("titan", revision="1", dim=3, mpp=None, licence="x")


def test_bad_vectors_cost_one_slide(uri: str, tmp_path: Path) -> None:
    values = VECTORS.astype(np.float64)
    values[1, 2], values[2], values[4, 0] = np.nan, 0, 1e39
    job = trident(tmp_path / "job", values)
    folder = next(job.rglob("slide_features_titan"))
    (folder / "it's 5.h5").write_bytes(b"\x89HDF\r\n\x1a\nand then nothing")
    with h5py.File(folder / "copy6.h5", "w") as file:  # another name of slide 6
        file.create_dataset("features", data=VECTORS[7])
    done = import_slide_features(uri, job)
    reasons = {Path(k.split(".h5")[0]).name: v.split(":")[0] for k, v in done.refused.items()}
    assert reasons == {
        "it's 1": "not_finite", "it's 2": "zero", "it's 4": "not_finite", "it's 5": "unreadable",
        "it's 6": "same_slide",
    }  # fmt: skip
    assert list(stored(uri)) == ids(0, 3, 7)
    assert done.exit_code == 3


def test_what_is_no_vector_of_a_slide(uri: str, tmp_path: Path) -> None:
    def refusal(path: Path, **settings: Any) -> str:
        with pytest.raises(ConfigError) as refused:
            import_slide_features(uri, path, SlideFeatureImport(encoder="x", **settings))
        assert Archive(uri).slide_encoders() == {}
        return str(refused.value.code)

    patient = tmp_path / "patient.h5"
    with h5py.File(patient, "w") as file:
        file.attrs["feat_type"] = "patient"
        file.create_dataset("feats", data=VECTORS[:1])
    assert refusal(patient) == "patient_vectors"
    table = tmp_path / "patients.csv"
    table.write_text("patient,d0,d1\nP0,1,2\n")
    assert refusal(table) == "patient_vectors"
    lengths = trident(trident(tmp_path / "job"), VECTORS[:, :5], encoder="prism")
    for file in lengths.rglob("slide_features_prism/*.h5"):
        file.rename(next(lengths.rglob("slide_features_titan")) / f"{file.stem}b.h5")
    with pytest.raises(ConfigError) as refused:
        import_slide_features(uri, lengths)
    assert refused.value.code == "other_length"
    (tmp_path / "empty").mkdir()
    assert refusal(tmp_path / "empty") == "no_features"
    assert refusal(tmp_path / "nowhere") == "config"
    pickled = tmp_path / "TCGA_TITAN_features.pt"
    torch.save({"embeddings": Path("x")}, pickled)
    assert refusal(pickled) == "no_features"


def test_one_row_beside_files_of_patches_is_not_taken_for_a_slide(tmp_path: Path) -> None:
    for n, rows in enumerate((3, 1, 5)):
        torch.save(torch.ones(rows, 8), tmp_path / f"{n}.pt")
    read = read_slide_vectors(tmp_path)
    assert (read.found, read.others) == ([], 2)
    ((file, error),) = read.problems.items()
    assert (Path(file).name, error.code) == ("1.pt", "unclear")


def test_out_to_parquet(uri: str, tmp_path: Path) -> None:
    import_slide_features(uri, trident(tmp_path / "job"))
    written = export_parquet(Archive(uri), tmp_path / "out")
    assert written["embeddings_titan"] == 8
    again = tmp_path / "again"
    cohort.build(again, *SLIDES)
    folder = tmp_path / "out" / "embeddings_titan"
    import_slide_features(str(again), folder, SlideFeatureImport(encoder="titan"))
    before, after = stored(uri), stored(str(again))
    assert list(before) == list(after)
    assert all(np.array_equal(before[slide], after[slide]) for slide in before)


def test_they_outlast_an_ingest_and_damage_is_told(uri: str, tmp_path: Path) -> None:
    job = trident(tmp_path / "job")
    import_slide_features(uri, job)
    with Committer(uri) as committer:  # slide 0 is ingested anew
        cohort.commit(committer, 0, fingerprint="g")
    maintain(uri)
    assert len(stored(uri)) == 8
    with Committer(uri) as committer:
        committer.drop_slides(["slide001"])
    assert "slide001" not in Archive(uri).dataset("embeddings_titan").to_table()["id"].to_pylist()
    data = next((Path(uri) / "embeddings_titan.lance").rglob("data/*.lance"))
    flip(data, data.stat().st_size // 3, 1)
    assert verify(uri).damaged != []
    repair(uri)
    assert verify(uri).damaged == []
    done = import_slide_features(uri, job)
    assert done.slides["written"] + done.slides["unchanged"] == 7
    assert done.unmatched == ["it's 1"]
    assert len(stored(uri)) == 7


def lazyslide(path: Path, slide_vectors: dict[str, tuple[str, np.ndarray]], version: int) -> None:
    """A store of LazySlide: {model of the tiles: (slide encoder, vector [1, d])}."""
    import anndata
    import pandas as pd
    import zarr

    index = pd.Index(["0", "1", "2"], dtype=object)  # AnnData writes no strings of pandas 3
    zarr.open_group(str(path), mode="w", zarr_format=version).create_group("tables")
    for model, (encoder, vector) in slide_vectors.items():
        made = {"encoder": encoder, "tile_key": "tiles", "features": vector}
        with (
            pd.option_context("future.infer_string", False),
            anndata.settings.override(zarr_write_format=version),
        ):
            anndata.AnnData(
                np.ones((3, 4), np.float32),
                obs=pd.DataFrame(index=index),
                uns={"agg_ops": {"agg_slide": made}},
            ).write_zarr(path / "tables" / f"{model}_tiles")


@pytest.mark.parametrize("version", [2, 3])
def test_what_lazyslide_aggregated(tmp_path: Path, version: int) -> None:
    for n in range(2):
        both = {"titan": ("titan", VECTORS[n : n + 1]), "uni2": ("mean", VECTORS[n + 2 : n + 3])}
        lazyslide(tmp_path / f"it's {n}.zarr", both, version)
    read = read_slide_vectors(tmp_path)
    assert read.problems == {}
    assert [(one.slide, one.encoder) for one in read.found] == [
        (f"it's {n}", encoder) for n in range(2) for encoder in ("titan", "mean_uni2")
    ]
    held = [one.vector for one in read.found]
    assert np.array_equal(held, VECTORS[[0, 2, 1, 3]])
    assert len(read_slide_vectors(tmp_path / "it's 1.zarr").found) == 2
    lazyslide(tmp_path / "two.zarr", {"titan": ("titan", VECTORS[:2])}, version)
    (refused,) = read_slide_vectors(tmp_path).problems.values()
    assert refused.code == "unsupported"


def test_a_word_that_is_packed_by_pickle_is_not_read(tmp_path: Path) -> None:
    lazyslide(tmp_path / "s.zarr", {"titan": ("titan", VECTORS[:1])}, 2)
    about = tmp_path / "s.zarr/tables/titan_tiles/uns/agg_ops/agg_slide/encoder/.zarray"
    packed = json.loads(about.read_text())
    about.write_text(json.dumps(packed | {"filters": [{"id": "pickle", "protocol": 5}]}))
    with pytest.raises(ConfigError, match="no vectors of slides"):
        read_slide_vectors(tmp_path)
