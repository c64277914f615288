import random

import numpy as np

from pathflip.archive import Archive
from pathflip.archive.verify import verify
from tests.unit.archive import cohort
from tests.unit.archive.harm import SLIDES, flip


def test_a_clean_archive_has_nothing_to_report(uri):
    report = verify(uri)
    assert report.ok
    assert (report.damaged, report.slides, report.notes) == ([], [], [])
    assert report.files >= 4 * 4
    assert report.rows >= len(SLIDES) * (2 * cohort.REGIONS + cohort.REGIONS + 2)
    assert report.to_json()["ok"] is True


def test_every_one_of_20_bit_flips_in_data_files_of_all_tables_is_reported(uri, monkeypatch):
    """Damage of any file, anywhere in it, one at a time; what is left is another test's."""
    monkeypatch.setattr("pathflip.archive.verify.salvage", lambda *_, **__: (None, []))
    chance = random.Random(11)
    files = sorted(uri.glob("*.lance/data/*.lance"))
    tables = sorted({path.parent.parent for path in files})
    assert len(tables) == 7
    for i in range(20):
        path = chance.choice([f for f in files if f.parent.parent == tables[i % 6]])
        byte, bit = chance.randrange(path.stat().st_size), chance.randrange(8)
        flip(path, byte, bit)
        found = verify(uri).damaged
        assert str(path.relative_to(uri)) in [d.id for d in found if d.kind == "file"], found
        flip(path, byte, bit)
    assert verify(uri).ok


def test_damaged_rows_are_named(uri):
    region = "slide002/3_2"
    features = Archive(uri).features("slide002")
    at = features["region_id"].to_pylist().index(region)
    needle = np.array(features["features"][at].as_py(), np.float16).tobytes()
    path = next(p for p in uri.glob("features_tex.lance/data/*") if needle in p.read_bytes())
    flip(path, path.read_bytes().index(needle) + 100, 3)
    report = verify(uri)
    assert {(d.kind, d.id) for d in report.damaged} == {
        ("file", str(path.relative_to(uri))),
        ("row", region),
    }
    assert report.slides == ["slide002"]


def test_flipped_values_are_found_without_any_digest(uri):
    """Row checksums alone: what a fragment rewritten from rotten bytes would show."""
    import lance
    import pyarrow as pa

    dataset = lance.dataset(str(uri / "regions.lance"))
    rows = dataset.to_table()
    x0 = rows["x0"].to_pylist()
    x0[7] ^= 4
    lance.write_dataset(
        rows.set_column(rows.schema.get_field_index("x0"), rows.schema.field("x0"), pa.array(x0)),
        str(uri / "regions.lance"),
        mode="overwrite",
    )
    named = [d for d in verify(uri).damaged if d.kind == "row"]
    assert [d.id for d in named] == [rows["region_id"][7].as_py()]
