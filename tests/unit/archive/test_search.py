import json

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pathflip.archive import Archive, indexes, schema, transactions
from pathflip.archive.commit import Committer
from pathflip.archive.create import create_archive
from pathflip.archive.filters import FIELDS, Filter
from pathflip.archive.fragments import write_fragment
from pathflip.archive.maintain import maintain
from pathflip.archive.search import search, stored_vector
from pathflip.errors import ArchiveError, ConfigError
from tests.unit.archive import cohort

SLIDES = range(8)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    uri = tmp_path_factory.mktemp("search") / "a"
    cohort.build(uri)
    with Committer(uri) as committer:
        cohort.commit(committer, *SLIDES)
        # Rows of a slide that is not ready must never be found.
        shard = committer._shard("embeddings_tex", cohort.embedding_rows(99), ["slide099"])
        transactions.append(committer.lock, shard)
    return Archive(uri)


def truth(query, *, kind="region", keep=lambda row: True):
    """The slow way: every row, plain Python order."""
    rows = [r for n in SLIDES for r in cohort.embedding_rows(n).to_pylist()]
    slides = [row for n in SLIDES for row in cohort.slide_rows(n).to_pylist()]
    people = {row["slide_id"]: row["patient_id"] for row in slides}
    rows = [r | {"patient_id": people[r["slide_id"]]} for r in rows if r["kind"] == kind]
    rows = [r for r in rows if keep(r)]
    query = np.asarray(query, float)
    scored = []
    for row in rows:
        v = np.array(row["vector"], float)
        scored.append((-v @ query / np.linalg.norm(v) / np.linalg.norm(query), row["id"]))
    return [(row_id, pytest.approx(-score)) for score, row_id in sorted(scored)]


def found(result, column="region_id"):
    return list(zip(result[column].to_pylist(), result["score"].to_pylist(), strict=True))


def test_regions_equal_the_slow_reference(archive):
    query = np.random.default_rng(0).standard_normal(cohort.DIM) * 7
    result = search(archive, query, k=11)
    assert found(result) == truth(query)[:11]
    assert result["rank"].to_pylist() == list(range(1, 12))
    assert result.column_names == [
        "rank", "score", "slide_id", "region_id", "x0", "y0", "size0", "mpp",
    ]  # fmt: skip
    first = result.to_pylist()[0]
    region = archive.regions(first["slide_id"]).to_pylist()
    region = next(r for r in region if r["region_id"] == first["region_id"])
    assert {key: first[key] for key in ("x0", "y0", "size0", "mpp")} == {
        key: region[key] for key in ("x0", "y0", "size0", "mpp")
    }
    assert search(archive, query, k=10_000).num_rows == len(SLIDES) * cohort.REGIONS


def test_slides_and_stored_vectors(archive):
    query = stored_vector(archive, "slide003")
    result = search(archive, query, level="slide", k=3)
    assert found(result, "slide_id") == truth(query, kind="slide")[:3]
    assert result["region_id"].null_count == 3
    assert result["score"][0].as_py() == pytest.approx(1)
    assert np.array_equal(query, stored_vector(archive, "it's 3"))
    own = search(archive, stored_vector(archive, "slide005/2_5"), k=1)
    assert own["region_id"].to_pylist() == ["slide005/2_5"]
    for name in ("slide099/0_99", "slide005/9_9", "nobody"):
        with pytest.raises(ArchiveError):
            stored_vector(archive, name)


def test_exclusions_keep_slides_without_a_patient(archive):
    query = stored_vector(archive, "slide002")
    result = search(archive, query, k=100, exclude_slide="slide002")
    assert "slide002" not in result["slide_id"].to_pylist()
    result = search(archive, query, level="slide", k=100, exclude_patient="P1")
    assert set(result["slide_id"].to_pylist()) == {f"slide{n:03d}" for n in SLIDES if n != 2}


@pytest.mark.parametrize(
    ("texts", "keep"),
    [
        (["mpp<=0.28"], lambda r: r["mpp"] <= 0.28),
        (["tissue_fraction > 0.2"], lambda r: r["tissue_fraction"] > 0.2),
        (["x0!=2048", "size0=1024"], lambda r: r["x0"] not in (None, 2048)),
        (["patient_id=P0"], lambda r: r["patient_id"] == "P0"),
        (["patient_id!=P0"], lambda r: r["patient_id"] != "P0"),
        (["n_patches=15"], lambda r: r["n_patches"] == 15),
        (["split=test"], lambda r: int(r["slide_id"][-1]) % 2 == 1),
        (["split=test", "y0>=3072"], lambda r: int(r["slide_id"][-1]) % 2 and r["y0"] >= 3072),
        (["vendor=aperio"], lambda r: False),
    ],
)  # fmt: skip
def test_filters(archive, texts, keep):
    query = np.ones(cohort.DIM)
    result = search(archive, query, k=100, filters=[Filter.parse(text) for text in texts])
    assert found(result) == truth(query, keep=keep)


def test_slides_are_found_by_their_labels(archive):
    held = {SLIDES[0]: {"grade": "2", "Tumour site": "left"}, SLIDES[1]: {"grade": "10"}}
    with Committer(archive.uri) as committer:
        committer.update_slides(
            {f"slide{n:03d}": {"labels": json.dumps(labels)} for n, labels in held.items()}
        )
    labelled = Archive(archive.uri)

    def ids(*texts):
        filters = [Filter.parse(text) for text in texts]
        rows = search(labelled, np.ones(cohort.DIM), level="slide", k=100, filters=filters)
        return {int(slide[-3:]) for slide in rows["slide_id"].to_pylist()}

    assert ids("label.grade=2") == ids("label.Tumour site = left") == {SLIDES[0]}
    assert ids("label.grade=10", "split!=none") == {SLIDES[1]}
    assert ids("label.grade!=2") == ids() - {SLIDES[0]}
    assert ids("label.grade=2", "label.Tumour site=right") == set()
    with pytest.raises(ConfigError, match=r"No slide of .* has the label 'stage'") as error:
        ids("label.stage=II")
    assert error.value.hint == "Its labels are: Tumour site, grade."
    for wrong in ("label.=2", "label.grade<2", "labels.grade=2", "label=2"):
        with pytest.raises(ConfigError):
            Filter.parse(wrong)


def test_ties_are_in_the_order_of_ids(tmp_path):
    cohort.build(tmp_path / "a")
    rows = cohort.embedding_rows(0).to_pylist()
    for row in rows:
        row["vector"] = [1.0] * cohort.DIM
    with Committer(tmp_path / "a") as committer:
        shard = write_fragment(tmp_path / "a", "features_tex", cohort.feature_rows(0))
        committer.commit(
            slides=cohort.slide_rows(0),
            regions=cohort.region_rows(0),
            embeddings={"tex": cohort.filled(schema.embeddings_schema(cohort.DIM), rows[::-1])},
            fragments={"tex": [shard]},
        )  # fmt: skip
    result = search(Archive(tmp_path / "a"), np.ones(cohort.DIM), k=3)
    assert result["region_id"].to_pylist() == ["slide000/0_0", "slide000/1_0", "slide000/2_0"]


def test_query_of_another_encoder_is_refused(archive):
    """Both sides are named, nothing is found."""
    with pytest.raises(ArchiveError, match=r"13 values; encoder tex \(1\).* has 12") as error:
        search(archive, np.ones(13))
    assert error.value.code == "wrong_encoder"
    with pytest.raises(ArchiveError, match="uni"):
        search(archive, np.ones(12), encoder="uni")
    for query in (np.zeros(12), np.full(12, np.nan), np.full(12, np.inf)):
        with pytest.raises(ConfigError):
            search(archive, query)
    for wrong in ({"k": 0}, {"k": 10_001}, {"level": "patch"}):
        with pytest.raises(ConfigError):
            search(archive, np.ones(12), **wrong)


@pytest.mark.parametrize(
    "text",
    [
        "", "=", "mpp", "mpp=", "mpp<0.3 OR 1=1", "1=1", "mpp=nan", "mpp=inf", "mpp<1e999",
        "vector=1", "kind=slide", "checksum=a", "password=x", "patient_id<P2", "x0==5x",
        "patient_id LIKE '%'", "mpp<=" + "9" * 10_000, "slide_id=" + "a" * 10_000,
        "slide_id=a\0b", "patient_id IS NULL", "(mpp)=1", "mpp=0x10", "x0=1.5",
        "n_patches<3000000000", "mpp=\ud800",
    ],
)  # fmt: skip
def test_anything_else_is_no_filter(text):
    with pytest.raises(ConfigError):
        Filter.parse(text)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(value=st.text(max_size=60))
@example(value="' OR 1=1 --")
@example(value="P1' OR 'a'='a")
@example(value='P1" OR "a"="a')
@example(value="P0\\' OR TRUE --")
@example(value="%")
@example(value="P0'; DROP TABLE slides; --")
def test_no_value_widens_a_filter(archive, value):
    """Whatever the value, the rows are those whose column equals it."""
    try:
        condition = Filter(field="patient_id", op="=", value=value)
    except ConfigError:
        return
    rows = search(archive, np.ones(cohort.DIM), level="slide", k=100, filters=[condition])
    expected = {f"slide{n:03d}" for n in SLIDES if n % 4 != 3 and f"P{n // 2}" == value}
    assert set(rows["slide_id"].to_pylist()) == expected


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=80) | st.from_regex(r"[a-z_]{1,12}(=|<|>=|!=)[^\n]{0,20}"))
def test_parse_gives_a_filter_on_a_listed_column_or_an_error(text):
    try:
        made = Filter.parse(text)
    except ConfigError:
        return
    assert made.field in FIELDS
    assert isinstance(made.value, str) == (FIELDS[made.field] is str)


@pytest.mark.parametrize("dim", [12, 16])
def test_vector_index_finds_what_the_scan_finds(tmp_path, monkeypatch, dim):
    uri = tmp_path / "a"
    create_archive(uri, tiling=cohort.TILING)
    count = 3000
    rng = np.random.default_rng(1)
    centres = rng.standard_normal((20, dim))
    rows = [
        {"id": f"slide000/{i}_0", "kind": "region", "slide_id": "slide000",
         "vector": (centres[i % 20] + rng.standard_normal(dim) / 5).astype(np.float32)}
        for i in range(count)
    ]  # fmt: skip
    with Committer(uri) as committer:
        cohort.encoder(committer, dim=dim)
        cohort.commit(committer, 0, dims={"tex": dim})
        table = cohort.filled(schema.embeddings_schema(dim), rows)
        transactions.append(committer.lock, committer._shard("embeddings_tex", table, ["slide000"]))
    queries = rng.standard_normal((10, dim))
    plain = [search(Archive(uri), q, k=10)["region_id"].to_pylist() for q in queries]
    monkeypatch.setattr(indexes, "VECTOR_INDEX_ROWS", 1000)
    assert maintain(uri)["indexed"] == ["embeddings_tex.vector"]
    near = [search(Archive(uri), q, k=10)["region_id"].to_pylist() for q in queries]
    hits = sum(len(set(a) & set(b)) for a, b in zip(plain, near, strict=True))
    assert hits >= 95
    with Committer(uri) as committer:
        cohort.commit(committer, 1, dims={"tex": dim})
    own = search(Archive(uri), stored_vector(Archive(uri), "slide001/2_1"), k=1)
    assert own["region_id"].to_pylist() == ["slide001/2_1"]
