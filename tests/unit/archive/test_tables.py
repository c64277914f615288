"""One list of tables: a table added to it is written, checked, mended, kept and exported."""

import json
import shutil
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pathflip.archive import Archive, schema, tables, transactions
from pathflip.archive.commit import Committer
from pathflip.archive.create import create_archive
from pathflip.archive.export import export_parquet
from pathflip.archive.fragments import create_table
from pathflip.archive.maintain import maintain
from pathflip.archive.repair import repair
from pathflip.archive.storage import open_table
from pathflip.archive.tables import TableSpec
from pathflip.archive.verify import verify
from pathflip.errors import ArchiveError
from tests.unit.archive import cohort

SLIDES, CELLS, CORES, WIDTH = range(3), 4, 3, 6


def columns(key: str, **kinds: pa.DataType):
    """A schema as the archive makes them: key first, checksum last."""
    marked = {b"lance-schema:unenforced-primary-key": b"true"}
    fields = [pa.field(key, pa.string(), nullable=False, metadata=marked)]
    fields += [pa.field(name, kind) for name, kind in kinds.items()]
    return pa.schema([*fields, pa.field("checksum", pa.string())])


SPECS = (
    TableSpec(  # written by ingest: a row for every region
        name="stains", key="region_id", setting="stains", since=2,
        schema=lambda settings, entry, noted: columns(
            "region_id", slide_id=pa.string(), hue=pa.list_(pa.float32(), entry["width"])
        ).with_metadata(noted),
        one_per="regions", derived_from="regions",
    ),
    TableSpec(  # written later: any number a slide
        name="cores", key="core_id", setting="cores", made_by="cores", since=2,
        schema=lambda settings, entry, noted: columns(
            "core_id", slide_id=pa.string(), patient_id=pa.string(), tx=pa.int32()
        ).with_metadata(noted),
        one_per="cores", derived_from="slides",
    ),
    TableSpec(  # of an encoder: a row for every tree
        name="cores_<encoder>", key="core_id", setting="core_features", made_by="cores", since=2,
        schema=lambda settings, entry, noted: columns(
            "core_id", slide_id=pa.string(), features=pa.list_(pa.float16(), entry["dim"])
        ).with_metadata(noted),
        one_per="cores", derived_from="cores", wide=True,
    ),
    TableSpec(  # from elsewhere
        name="core_texts", key="text_id", setting="core_texts", made_by="cores caption", since=2,
        schema=lambda settings, entry, noted: columns(
            "text_id", slide_id=pa.string(), text=pa.string()
        ),
        indexes={"text": "INVERTED"},
    ),
)  # fmt: skip
TABLES = ("stains", "cores", "cores_tex", "core_texts")


def region_ids(n: int) -> list[str]:
    return cohort.region_rows(n)["region_id"].to_pylist()


def rows(table: str, n: int) -> pa.Table:
    """The rows of a slide, the same on every call."""
    rng = np.random.default_rng((sum(map(ord, table)), n))
    slide, ids = f"slide{n:03d}", [f"slide{n:03d}/{i}_0" for i in range(CORES)]
    if table == "stains":
        hue = pa.array(list(rng.random((cohort.REGIONS, WIDTH))), pa.list_(pa.float32(), WIDTH))
        key = region_ids(n)
        return pa.table({"region_id": key, "slide_id": [slide] * len(key), "hue": hue})
    owner = [slide] * CORES
    if table == "cores":
        patient = pa.array([None] * CORES, pa.string())
        tx = pa.array(range(CORES), pa.int32())
        return pa.table({"core_id": ids, "slide_id": owner, "patient_id": patient, "tx": tx})
    if table == "cores_tex":
        features = list(rng.random((CORES, WIDTH)).astype(np.float16))
        kind = pa.list_(pa.float16(), WIDTH)
        return pa.table({"core_id": ids, "slide_id": owner, "features": pa.array(features, kind)})
    texts = [f"core {i} of {slide}" for i in range(CORES)]
    return pa.table({"text_id": [f"{i}/vlm" for i in ids], "slide_id": owner, "text": texts})


def ingest(committer: Committer, n: int, **how: str):
    return cohort.commit(committer, n, others={"stains": rows("stains", n)}, **how)


def grow(committer: Committer, *numbers: int) -> None:
    for table in ("cores_tex", "cores"):
        for n in numbers:
            committer.replace_rows(table, rows(table, n))


@pytest.fixture(autouse=True)
def more_tables(monkeypatch):
    monkeypatch.setattr(tables, "TABLES", (*tables.TABLES, *SPECS))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    uri = tmp_path_factory.mktemp("tables") / "a"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "TABLES", (*tables.TABLES, *SPECS))
        create_archive(uri, tiling=cohort.TILING)
        with Committer(uri) as committer:
            cohort.encoder(committer)
            assert committer.add_tables("stains", {"width": WIDTH}) == ["stains"]
            assert committer.add_tables("cores", {"parent_um": 1024.0}) == ["cores"]
            entry = {"table": "cores_tex", "encoder": "tex", "dim": WIDTH}
            assert committer.add_tables("core_features:tex", entry) == ["cores_tex"]
            assert committer.add_tables("core_texts", {}) == ["core_texts"]
            for n in SLIDES:
                ingest(committer, n)
                grow(committer, n)
                committer.upsert("core_texts", rows("core_texts", n))
    return uri


@pytest.fixture
def uri(pristine, tmp_path):
    return Path(shutil.copytree(pristine, tmp_path / "a"))


def stored(uri: Path, table: str) -> list[dict]:
    found = lance.dataset(str(uri / f"{table}.lance")).to_table()
    return found.drop_columns(["checksum"]).sort_by(found.column_names[0]).to_pylist()


def written(table: str, *numbers: int) -> list[dict]:
    return pa.concat_tables([rows(table, n) for n in numbers]).to_pylist()


def assert_whole(uri: Path, *, without: dict[str, int] | None = None) -> None:
    assert verify(uri).damaged == []
    for table in TABLES:
        left = [n for n in SLIDES if (without or {}).get(table) != n]
        assert stored(uri, table) == written(table, *left), table


def flip(uri: Path, table: str) -> str:
    """Flip a bit in the middle of the second slide's file and return its path in the archive."""
    files = sorted((uri / f"{table}.lance/data").iterdir())
    path = next(path for path in files if b"slide001" in path.read_bytes())
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)
    return str(path.relative_to(uri))


def test_they_open_with_the_archive_and_are_whole(uri):
    archive = Archive(uri)
    assert set(TABLES) < set(archive.tables())
    assert archive.encoder_of("cores_tex") == "tex"
    assert archive.encoder_of("cores") is None
    assert verify(uri).notes == []
    assert_whole(uri)
    for table in TABLES:
        assert tables.key_of(table) == rows(table, 0).column_names[0]


def test_an_archive_without_them_opens(tmp_path):
    cohort.build(tmp_path / "a", 0)
    assert not set(TABLES) & set(Archive(tmp_path / "a").tables())
    assert verify(tmp_path / "a").ok


def test_ingest_refuses_a_slide_without_its_rows(uri):
    with Committer(uri) as committer:
        with pytest.raises(ValueError, match="0 rows for stains, not 5"):
            cohort.commit(committer, 3)
        short = rows("stains", 3).slice(1)
        with pytest.raises(ValueError, match="4 rows for stains, not 5"):
            cohort.commit(committer, 3, others={"stains": short})
        assert ingest(committer, 3).written == ["slide003"]


@pytest.mark.parametrize("table", TABLES)
def test_a_flipped_byte_is_found_and_mended(uri, table):
    path = flip(uri, table)
    report = verify(uri)
    assert path in [d.id for d in report.damaged if d.kind == "file"]
    done = repair(uri)
    assert done.report.damaged == []
    with Committer(uri) as committer:  # what the commands do: whatever is not there
        for n in SLIDES:
            ingest(committer, n)
        grow(committer, *SLIDES)
        for n in SLIDES:
            committer.upsert("core_texts", rows("core_texts", n))
    assert_whole(uri)


def test_a_missing_row_is_found_in_each(uri):
    """Ingest's rows cost the slide, later ones are made again, text is not counted."""
    lost = {"stains": "slide000/2_0", "cores": "slide001/1_0", "cores_tex": "slide002/1_0"}
    for table, key in lost.items():
        column = tables.key_of(table)
        lance.dataset(str(uri / f"{table}.lance")).delete(f"{column} = '{key}'")
    report = verify(uri)
    assert {(d.kind, d.table, d.id) for d in report.damaged} == {
        ("missing", "stains", "slide000/2_0"),
        ("missing", "cores", "slide001"),
        ("missing", "cores_tex", "slide002"),
    }
    assert report.slides == ["slide000"]
    assert report.reindex == {"cores": ["slide001"], "cores_tex": ["slide002"]}
    done = repair(uri)
    assert done.redo == ["slide000"]
    assert any("Table cores: removed" in action and "cores." in action for action in done.actions)
    # What was computed from a row that is gone has gone with it; text has not.
    assert stored(uri, "cores") == written("cores", 2)
    assert stored(uri, "cores_tex") == []
    assert stored(uri, "core_texts") == written("core_texts", *SLIDES)
    assert verify(uri).notes == [
        "1 slides have no rows in table cores_tex yet; make them: pathflip cores."
    ]
    with Committer(uri) as committer:
        ingest(committer, 0)
        grow(committer, *SLIDES)
    assert_whole(uri)


@pytest.mark.parametrize("table", TABLES)
def test_a_table_with_no_manifest_left_is_made_anew(uri, table):
    for path in (uri / f"{table}.lance/_versions").glob("*.manifest"):
        path.write_bytes(b"")
    with pytest.raises(ArchiveError) as error:
        Archive(uri)
    assert error.value.code == "damaged"
    fields = rows(table, 0).schema
    assert repair(uri).report.damaged == []
    made = lance.dataset(str(uri / f"{table}.lance"))
    assert made.schema.names == [*fields.names, "checksum"]
    with Committer(uri) as committer:
        for n in SLIDES:
            ingest(committer, n)
        grow(committer, *SLIDES)
        for n in SLIDES:
            committer.upsert("core_texts", rows("core_texts", n))
    assert_whole(uri)


def test_settings_that_are_lost_come_back_from_the_tables(uri):
    told = "key LIKE 'core%' OR key = 'stains'"
    before = lance.dataset(str(uri / "meta.lance")).to_table(filter=told).sort_by("key")
    lance.dataset(str(uri / "meta.lance")).delete(told)
    assert repair(uri).actions
    after = lance.dataset(str(uri / "meta.lance")).to_table(filter=told).sort_by("key")
    assert [json.loads(v) for v in after["value"].to_pylist()] == [
        json.loads(v) for v in before["value"].to_pylist()
    ]
    assert_whole(uri)


def test_a_slide_ingested_anew_loses_what_was_computed_and_keeps_what_was_not(uri):
    with Committer(uri) as committer:
        ingest(committer, 1, fingerprint="other")
    assert_whole(uri, without={"cores": 1, "cores_tex": 1})
    with Committer(uri) as committer:
        grow(committer, 1)
    assert_whole(uri)


def test_dropped_slides_are_gone_from_all(uri):
    with Committer(uri) as committer:
        committer.drop_slides(["slide001"])
    assert_whole(uri, without=dict.fromkeys(TABLES, 1))


def test_a_patient_changes_wherever_the_column_is(uri):
    with Committer(uri) as committer:
        committer.update_slides({"slide002": {"patient_id": "PX"}})
    assert {r["patient_id"] for r in stored(uri, "cores") if r["slide_id"] == "slide002"} == {"PX"}
    assert verify(uri).ok


def test_rows_of_slides_that_are_gone_are_deleted_by_the_next_writer(uri):
    with Committer(uri) as committer:
        for table in TABLES:
            transactions.append(
                committer.lock, committer._shard(table, rows(table, 9), ["slide009"])
            )
    with Committer(uri) as committer:
        assert committer.recovered == {
            "stains": cohort.REGIONS, "cores": CORES, "cores_tex": CORES,
        }  # fmt: skip


def test_maintain_merges_and_indexes_them(uri):
    before = {t: len(lance.dataset(str(uri / f"{t}.lance")).get_fragments()) for t in TABLES}
    assert set(before.values()) == {len(SLIDES)}
    done = maintain(uri)
    assert {table: done["fragments"][table] for table in TABLES} == dict.fromkeys(TABLES, 1)
    assert "core_texts.text" in done["indexed"]
    assert_whole(uri)


def test_export_writes_the_visible_rows(uri, tmp_path):
    with Committer(uri) as committer:
        committer.commit(slides=cohort.slide_rows(1, status="quarantined", fingerprint="bad"))
    done = export_parquet(Archive(uri), tmp_path / "out")
    for table in TABLES:
        read = pq.read_table(tmp_path / "out" / table).drop_columns(["checksum"])
        key = tables.key_of(table)
        assert read.sort_by(key).to_pylist() == written(table, 0, 2)
        assert done[table] == read.num_rows


def test_the_list_is_sound():
    """Names that the list itself refers to are in it, and no row is of two tables at once."""
    names = [spec.name for spec in tables.TABLES]
    assert len(set(names)) == len(names)
    for spec in tables.TABLES:
        for other in (spec.one_per, spec.derived_from):
            assert other is None or other in names
        assert spec.setting is not None or not spec.family
        assert spec.since <= schema.SCHEMA_VERSION
    by_prefix = {}
    for spec in (s for s in tables.TABLES if s.family):
        same = by_prefix.setdefault(spec.prefix, spec)
        assert (same.key, same.wide, dict(same.indexes)) == (
            spec.key, spec.wide, dict(spec.indexes),
        )  # fmt: skip


def test_a_table_whose_creation_was_killed_before_its_first_version_is_made(tmp_path):
    """Lance writes the data first: a folder is there, and nothing in it is a table yet."""
    left = tmp_path / "left.lance" / "data"
    left.mkdir(parents=True)
    (left / "half.lance").write_bytes(b"half of a file")
    schema = pa.schema([pa.field("n", pa.int64())])
    create_table(str(tmp_path), "left", schema)
    assert open_table(str(tmp_path), "left").schema.equals(schema)
    create_table(str(tmp_path), "left", schema, pa.table({"n": [1]}))
    with pytest.raises(ArchiveError, match="not empty"):
        create_table(str(tmp_path), "left", schema)
