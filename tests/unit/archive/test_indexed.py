"""Search with a vector index, and search while others write: results as by the scan."""

import threading
import time

import lance
import numpy as np
import pyarrow as pa
import pytest
from lance.fragment import write_fragments

from pathflip.archive import Archive, ann, indexes, places, schema, transactions
from pathflip.archive.commit import Committer
from pathflip.archive.filters import Filter
from pathflip.archive.maintain import maintain
from pathflip.archive.search import search, search_many, stored_vector
from tests.unit.archive import cohort, models

DIM, PER_SLIDE, SLIDES = 16, 250, 12
QUERIES = np.random.default_rng(8).standard_normal((10, DIM))
CONDITIONS = {
    "none": {},
    "half": {"filters": [Filter.parse("tissue_fraction<0.5")]},
    "few": {"filters": [Filter.parse("tissue_fraction<0.03")]},
    "nothing": {"filters": [Filter.parse("tissue_fraction>7")]},
    "patient": {"filters": [Filter.parse("patient_id=P2")]},
    "split": {"filters": [Filter.parse("split=test")]},
    "split and more": {"filters": [Filter.parse("split=test"), Filter.parse("x0>=1024")]},
    "not this slide": {"exclude_slide": "slide003"},
    "not this patient": {"exclude_patient": "P1", "filters": [Filter.parse("n_patches<200")]},
}


def clustered(n: int) -> pa.Table:
    """Many regions of slide n, in clusters, with its own row."""
    rng = np.random.default_rng((3, n))
    centres = np.random.default_rng(2).standard_normal((20, DIM))
    own = cohort.embedding_rows(n).to_pylist()[-1]
    rows = [own | {"vector": centres.mean(0).astype(np.float32)}]
    for i in range(PER_SLIDE):
        vector = centres[rng.integers(20)] + rng.standard_normal(DIM) / 3
        rows.append(
            own | {"id": f"slide{n:03d}/{i}_0", "kind": "region", "x0": 512 * (i % 7), "y0": 0,
                   "size0": 1024, "tissue_fraction": i / PER_SLIDE, "n_patches": i,
                   "vector": (vector / np.linalg.norm(vector)).astype(np.float32)}
        )  # fmt: skip
    return cohort.filled(schema.embeddings_schema(DIM), rows)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Twelve slides of 250 regions; two archives, the second with indexes, both with one rule."""
    found = []
    for name in ("plain", "indexed"):
        uri = tmp_path_factory.mktemp("large") / name
        cohort.build(uri)
        with Committer(uri) as committer:
            cohort.encoder(committer, dim=cohort.DIM)
            cohort.commit(committer, *range(SLIDES))
            table = models.ensure_model(
                committer, "m", dim=DIM, fingerprint="m", encoder=models.ENCODER, run="m"
            )
            committer.replace_rows(table, pa.concat_tables([clustered(n) for n in range(SLIDES)]))
            # Rows of a slide that is not ready take places among the candidates.
            transactions.append(
                committer.lock, committer._shard(table, clustered(77), ["slide077"])
            )
            if name == "indexed":
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(indexes, "VECTOR_INDEX_ROWS", 1000)
                    patch.setattr(indexes, "SCALAR_INDEX_ROWS", 1000)
                    done = indexes.refresh_indexes(committer.lock, table)
                assert done.made == [f"{table}.{c}" for c in ("slide_id", "kind", "vector")]
                assert not done.refused
        found.append(uri)
    return found


def answers(archive, queries=QUERIES, **options):
    return [search(archive, query, model="m", **options) for query in queries]


@pytest.mark.parametrize("case", CONDITIONS)
@pytest.mark.parametrize("few_bytes", [0, 4 << 20], ids=["index", "one by one"])
def test_conditions_leave_the_same_regions(large, monkeypatch, case, few_bytes):
    """With and without the places in memory, one query or many, few regions left or most."""
    plain, indexed = (Archive(uri) for uri in large)
    truth = answers(plain, **CONDITIONS[case])
    monkeypatch.setattr(ann, "_SCAN_BYTES", few_bytes)
    total = sum(table.num_rows for table in truth)
    for memory in (0, 256 << 20):
        monkeypatch.setattr(places, "MEMORY_BYTES", memory)  # 0: in a file
        indexed.refresh()
        first = answers(indexed, **CONDITIONS[case])
        again = answers(indexed, **CONDITIONS[case])  # of ten, the last by places that were read
        many = search_many(indexed, QUERIES, model="m", **CONDITIONS[case])
        for found in (first, again, many):
            hits = 0
            for right, got in zip(truth, found, strict=True):
                scores = dict(
                    zip(right["region_id"].to_pylist(), right["score"].to_pylist(), strict=True)
                )
                assert got.num_rows == right.num_rows
                assert "slide077" not in got["slide_id"].to_pylist()
                for row in got.to_pylist():
                    if row["region_id"] in scores:
                        hits += 1
                        assert row["score"] == pytest.approx(scores[row["region_id"]], abs=1e-9)
            assert hits >= 0.97 * total
    if case == "few" and few_bytes:
        assert all(a.equals(b) for a, b in zip(truth, again, strict=True))


@pytest.mark.parametrize("most", [0, 10_000], ids=["listed", "picked"])
def test_conditions_that_lead_far_from_the_query(large, monkeypatch, most):
    """Rows that meet them are not among the nearest: Lance is asked again, for those rows."""
    plain, indexed = (Archive(uri) for uri in large)
    monkeypatch.setattr(ann, "_SCAN_BYTES", 0)
    monkeypatch.setattr(ann, "_QUERIES_UNTIL_READ", 0)
    monkeypatch.setattr(ann, "_MOST_CANDIDATES", most)
    near = search(plain, QUERIES[0], model="m", k=1500)["region_id"].to_pylist()
    far = [one for one in range(PER_SLIDE) if f"slide003/{one}_0" not in near]
    assert len(far) > 20
    low = min(far[i] for i in range(len(far)) if far[i] >= 100)
    only = [Filter.parse("slide_id=slide003"), Filter.parse(f"n_patches>={low}")]
    truth, found = (search(a, -QUERIES[0], model="m", filters=only) for a in (plain, indexed))
    assert len(set(found["region_id"].to_pylist()) & set(truth["region_id"].to_pylist())) >= 9
    truth, found = (search(a, QUERIES[0], model="m", filters=only) for a in (plain, indexed))
    assert len(set(found["region_id"].to_pylist()) & set(truth["region_id"].to_pylist())) >= 9


def test_places_are_those_of_the_rows(large):
    _, indexed = (Archive(uri) for uri in large)
    for _ in range(12):  # past the point where places come from memory
        table = search(indexed, QUERIES[0], model="m", k=50)
    for row in table.to_pylist():
        at = int(row["region_id"].split("/")[1].split("_")[0])
        assert (row["x0"], row["y0"], row["size0"]) == (512 * (at % 7), 0, 1024)


@pytest.mark.parametrize("budget", [0, 1 << 30], ids=["in a file", "in memory"])
def test_places_hold_what_the_table_holds(large, monkeypatch, budget):
    """Every region, in any order of row ids, nulls too; conditions as Arrow evaluates them."""
    monkeypatch.setattr(places, "MEMORY_BYTES", budget)
    dataset = Archive(large[0]).dataset("embeddings_m")
    rows = dataset.to_table(with_row_id=True)
    gaps = np.arange(rows.num_rows) % 3 == 0
    holes = {"mpp": pa.float64(), "tissue_fraction": pa.float32(), "n_patches": pa.int32()}
    for name, kind in holes.items():
        column = pa.array(rows[name].to_pylist(), kind, mask=gaps)
        rows = rows.set_column(rows.schema.get_field_index(name), name, column)
    shuffled = rows.take(np.random.default_rng(1).permutation(rows.num_rows))

    class Stored:
        count_rows = staticmethod(lambda: shuffled.num_rows)

        @staticmethod
        def to_batches(**scan):
            return shuffled.filter(scan["filter"]).combine_chunks().to_batches(100)

    held = places.Places(Stored)
    regions = rows.filter(pa.compute.field("kind") == "region").sort_by("_rowid")
    assert len(held) == regions.num_rows == SLIDES * PER_SLIDE + PER_SLIDE  # one slide not ready
    at = held.find(regions["_rowid"].to_numpy())
    assert held.rows(at).to_pylist() == regions.select(places.LOCATION).to_pylist()
    assert held.find(np.array([7 << 40], np.uint64)).tolist() == [-1]
    for text in ("mpp<=0.3", "tissue_fraction>0.4", "n_patches!=7", "x0>=1024", "size0=1024"):
        condition = Filter.parse(text)
        kept = held.meeting([condition], pa.array(["slide003", "slide077"]))
        right = regions.filter(
            condition.expression() & pa.compute.field("slide_id").isin(["slide003", "slide077"])
        )
        assert regions.filter(pa.array(kept)).equals(right)


def test_slides_are_compared_one_by_one_in_spite_of_the_index(large):
    plain, indexed = (Archive(uri) for uri in large)
    for k in (3, 100):
        both = [search(a, QUERIES[1], model="m", level="slide", k=k) for a in (plain, indexed)]
        assert both[0].equals(both[1])
        assert both[0].num_rows == min(k, SLIDES)


def test_more_results_than_there_are_regions(large):
    _, indexed = (Archive(uri) for uri in large)
    assert search(indexed, QUERIES[0], model="m", k=10_000).num_rows == SLIDES * PER_SLIDE


def test_searching_while_others_write_and_maintain(tmp_path, monkeypatch):
    """20 queries a second beside commits, compaction and cleaning: no error, no lost recall."""
    uri = tmp_path / "a"
    cohort.build(uri)
    with Committer(uri) as committer:
        cohort.commit(committer, *range(4))
        table = models.ensure_model(
            committer, "m", dim=DIM, fingerprint="m", encoder=models.ENCODER, run="m"
        )
        committer.replace_rows(table, pa.concat_tables([clustered(n) for n in range(4)]))
    for name in ("VECTOR_INDEX_ROWS", "SCALAR_INDEX_ROWS"):
        monkeypatch.setattr(indexes, name, 500)
    maintain(uri)
    known = {
        row["id"]: np.array(row["vector"], float)
        for n in range(4) for row in clustered(n).to_pylist() if row["kind"] == "region"
    }  # fmt: skip
    matrix, names = np.stack(list(known.values())), list(known)
    over, faults, recalls = threading.Event(), [], []

    def read() -> None:
        archive = Archive(uri)
        rng = np.random.default_rng(1)
        while not over.is_set():
            began = time.monotonic()
            try:
                if len(recalls) % 20 == 19:
                    archive.refresh()
                query = rng.standard_normal(DIM)
                found = search(archive, query, model="m", k=10, filters=[Filter.parse("x0>=0")])
                old = [r for r in found["region_id"].to_pylist() if r in known]
                near = np.argsort(-(matrix @ query))[: len(old)]
                hits = len(set(old) & {names[i] for i in near})
                recalls.append(hits / len(old) if old else 1.0)
                assert found.num_rows == 10
            except BaseException as error:
                faults.append(error)
            time.sleep(max(0.0, 0.05 - (time.monotonic() - began)))

    reader = threading.Thread(target=read)
    reader.start()
    end = time.monotonic() + 8
    n = 4
    while time.monotonic() < end:
        with Committer(uri) as committer:
            cohort.commit(committer, n)
            committer.replace_rows(table, clustered(n))
        maintain(uri)
        n += 1
    over.set()
    reader.join()
    assert not faults, faults[0]
    assert n > 5
    assert len(recalls) > 20
    assert np.mean(recalls) >= 0.95
    own = search(
        Archive(uri), stored_vector(Archive(uri), f"slide{n - 1:03d}/7_0", model="m"), model="m"
    )
    assert own["region_id"][0].as_py() == f"slide{n - 1:03d}/7_0"


def test_five_hundred_small_writes_become_few_fragments(tmp_path):
    """Rows and answers stay, fragments go. 40 upserts; 460 more fragments in one commit."""
    uri = tmp_path / "a"
    cohort.build(uri)
    table = f"embeddings_{models.MODEL}"
    where = str(uri / f"{table}.lance")
    with Committer(uri) as committer:
        cohort.commit(committer, *range(100), together=True)
        models.add(committer)
        dataset = lance.dataset(where)
        rows = schema.conform(models.rows(*range(100)), dataset.schema).slice(0, 500)
        for at in range(40):
            committer.upsert(table, rows.slice(at, 1).drop_columns(["checksum"]))
        dataset = lance.dataset(where)
        more = [write_fragments(rows.slice(at, 1), where)[0] for at in range(40, 500)]
        lance.LanceDataset.commit(
            dataset, lance.LanceOperation.Append(more), read_version=dataset.version
        )
        assert len(lance.dataset(where).get_fragments()) == 500
    done = maintain(uri)
    assert max(done["fragments"].values()) <= 5
    stored = lance.dataset(where).to_table()
    assert stored.sort_by("id").equals(rows.sort_by("id"))
    query = stored_vector(Archive(uri), "slide003/1_3", model=models.MODEL)
    (best,) = search(Archive(uri), query, model=models.MODEL, k=1).to_pylist()
    assert (best["region_id"], best["score"]) == ("slide003/1_3", pytest.approx(1))


# -- recall ---------------------------------------------------------------------------------------


@pytest.fixture
def grown(tmp_path, monkeypatch):
    """A table with a vector index; ``grown(n)`` adds clustered slides from n on, and refreshes."""
    uri, at = tmp_path / "a", [0]
    cohort.build(uri)
    for name in ("VECTOR_INDEX_ROWS", "SCALAR_INDEX_ROWS"):
        monkeypatch.setattr(indexes, name, 500)

    def grow(slides: int) -> indexes.Refreshed:
        new = range(at[0], at[0] + slides)
        at[0] += slides
        with Committer(uri) as committer:
            cohort.commit(committer, *new)
            table = models.ensure_model(
                committer, "m", dim=DIM, fingerprint="m", encoder=models.ENCODER, run="m"
            )
            committer.replace_rows(table, pa.concat_tables([clustered(n) for n in new]))
            return indexes.refresh_indexes(committer.lock, table)

    return uri, grow


TABLE = "embeddings_m"


def exact(uri, query):
    """The ten nearest regions by NumPy alone."""
    rows = lance.dataset(str(uri / f"{TABLE}.lance")).to_table(columns=["id", "kind", "vector"])
    rows = rows.filter(pa.compute.equal(rows["kind"], "region"))
    matrix = np.stack(rows["vector"].to_numpy())
    scores = matrix @ query / np.linalg.norm(matrix, axis=1)
    return {rows["id"][int(i)].as_py() for i in np.argsort(-scores)[:10]}


def ids(uri, query):
    return set(search(Archive(uri), query, model="m")["region_id"].to_pylist())


def coarse(dataset, rows):
    """Make an index of 8 bits a vector, as good as none."""
    dataset.create_index("vector", "IVF_PQ", metric="cosine", num_partitions=2, num_sub_vectors=2,
                         num_bits=4, replace=True)  # fmt: skip


def test_an_index_that_loses_the_nearest_rows_is_refused(grown, monkeypatch, caplog):
    uri, grow = grown
    good = indexes._index_vectors
    monkeypatch.setattr(indexes, "_index_vectors", coarse)
    done = grow(4)
    (name,), (recall,) = done.refused, done.refused.values()
    assert name == f"{TABLE}.vector"
    assert name not in done.made
    assert recall < 0.8
    assert "searches compare every row" in caplog.text
    assert "vector" not in indexes.indexed_columns(Archive(uri).dataset(TABLE))
    assert all(ids(uri, query) == exact(uri, query) for query in QUERIES)
    assert name in maintain(uri)["refused"]  # tried again until it is mended
    monkeypatch.setattr(indexes, "_index_vectors", good)
    assert name in maintain(uri)["indexed"]


def test_a_good_index_outlives_a_bad_one_that_would_replace_it(grown, monkeypatch, caplog):
    uri, grow = grown
    assert f"{TABLE}.vector" in grow(4).made
    monkeypatch.setattr(indexes, "_MAX_SEGMENTS", 1)  # rebuilt at every update
    monkeypatch.setattr(indexes, "_index_vectors", coarse)
    assert grow(1).refused[f"{TABLE}.vector"] < 0.8
    assert "the one before it is kept" in caplog.text
    held = Archive(uri).dataset(TABLE)
    (index,) = (i for i in held.describe_indices() if "vector" in i.field_names)
    assert index.index_type == "IVF_RQ"
    assert index.num_rows_indexed == held.count_rows()
    found = [len(ids(uri, query) & exact(uri, query)) for query in QUERIES]
    assert np.mean(found) >= 9.5


def test_an_index_that_has_become_bad_is_built_again(grown):
    """An archive may come with one that was never measured."""
    uri, grow = grown
    grow(4)
    with Committer(uri):
        coarse(Archive(uri).dataset(TABLE), 0)
    assert maintain(uri)["indexed"] == [f"{TABLE}.vector"]
    found = [len(ids(uri, query) & exact(uri, query)) for query in QUERIES]
    assert np.mean(found) >= 9.5


def test_recall_is_that_of_numpy_and_survives_every_update(grown):
    """Eight updates with rebuilds between; before each, rows without index and with."""
    from pathflip.archive.recall import index_recall

    uri, grow = grown
    grow(4)
    for _ in range(8):
        assert not grow(1).refused
        dataset = Archive(uri).dataset(TABLE)
        assert index_recall(dataset) >= 0.97
        assert indexes.noted_recall(dataset) == pytest.approx(index_recall(dataset), abs=1e-3)
        found = [len(ids(uri, query) & exact(uri, query)) for query in QUERIES[:4]]
        assert np.mean(found) >= 9.5


def test_an_index_that_did_not_change_is_not_measured_again(grown, monkeypatch):
    """Vectors are read for what changed: rows that were added, an index made elsewhere."""
    uri, grow = grown
    counted = []
    measure = indexes.index_recall
    monkeypatch.setattr(
        indexes, "index_recall", lambda dataset: counted.append(1) or measure(dataset)
    )
    grow(4)
    assert len(counted) == 1
    assert not indexes.indexes_due(Archive(uri).dataset(TABLE), TABLE)
    maintain(uri)  # merges fragments, which makes the index another
    again = len(counted)
    version = Archive(uri).dataset(TABLE).version
    assert maintain(uri)["indexed"] == []
    assert len(counted) == again
    assert Archive(uri).dataset(TABLE).version == version
    grow(1)
    assert len(counted) > again
    with Committer(uri):
        coarse(Archive(uri).dataset(TABLE), 0)
    assert maintain(uri)["indexed"] == [f"{TABLE}.vector"]


def test_rows_that_are_in_no_index_are_due(grown, monkeypatch):
    uri, grow = grown
    grow(4)
    with Committer(uri) as committer:
        cohort.commit(committer, 4)
        committer.replace_rows(TABLE, clustered(4))
    assert indexes.indexes_due(Archive(uri).dataset(TABLE), TABLE)
    grow(1)
    assert not indexes.indexes_due(Archive(uri).dataset(TABLE), TABLE)
    with Committer(uri):
        indexes._drop_vector_index(Archive(uri).dataset(TABLE))
    # As if it had never been measured: one that was refused is not due.
    Archive(uri).dataset(TABLE).update_config({indexes._MEASURED: None})
    assert indexes.indexes_due(Archive(uri).dataset(TABLE), TABLE)
    monkeypatch.setattr(indexes, "MIN_RECALL", 2.0)
    with Committer(uri) as committer:
        assert indexes.refresh_indexes(committer.lock, TABLE).refused
    assert not indexes.indexes_due(Archive(uri).dataset(TABLE), TABLE)
