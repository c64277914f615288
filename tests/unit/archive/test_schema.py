import hashlib
import struct

import numpy as np
import pyarrow as pa
import pytest

from pathflip.archive import schema
from pathflip.archive.tables import key_of
from tests.unit.archive import cohort


def test_every_table_has_a_declared_non_null_key_and_a_checksum():
    made = {
        "meta": schema.meta_schema(),
        "slides": schema.slides_schema(),
        "regions": schema.regions_schema(4),
        "features_x": schema.features_schema(4, 3),
        "embeddings_x": schema.embeddings_schema(3),
        "files": schema.files_schema(),
    }
    for table, fields in made.items():
        key = fields.field(key_of(table))
        assert not key.nullable
        assert key.metadata[b"lance-schema:unenforced-primary-key"] == b"true"
        assert fields.names[-1] == "checksum"
        assert [f.name for f in fields if f.metadata] == [key.name]


def test_checksum_is_the_documented_sha256():
    rows = pa.table(
        {
            "name": pa.array(["a", None]),
            "n": pa.array([7, None], pa.int32()),
            "f": pa.array([[1.0, 2.0], None], pa.list_(pa.float16(), 2)),
            "tags": pa.array([["x", None], None], pa.list_(pa.string())),
        }
    )
    one = (
        b"\1" + struct.pack("<q", 1) + b"a" + b"\1" + struct.pack("<i", 7)
        + b"\1" + np.array([1, 2], "<f2").tobytes()
        + b"\1" + struct.pack("<q", 2) + b"\1" + struct.pack("<q", 1) + b"x" + b"\0"
    )  # fmt: skip
    two = b"\0" + b"\0" + bytes(4) + b"\0" + bytes(4) + b"\0"
    expected = [hashlib.sha256(one).hexdigest(), hashlib.sha256(two).hexdigest()]
    assert schema.row_checksum(rows).to_pylist() == expected


def test_checksum_does_not_depend_on_chunks_or_offsets():
    rows = pa.concat_tables(
        [schema.conform(cohort.slide_rows(n), schema.slides_schema()) for n in range(5)]
    )
    whole = schema.row_checksum(rows.combine_chunks())
    assert schema.row_checksum(rows).equals(whole)
    assert schema.row_checksum(rows.slice(2, 2)).equals(whole.slice(2, 2))
    features = pa.concat_tables([cohort.feature_rows(n) for n in range(3)]).combine_chunks()
    whole = schema.row_checksum(features)
    assert schema.row_checksum(features.slice(4, 7)).equals(whole.slice(4, 7))
    assert len(set(whole.to_pylist())) == features.num_rows


@pytest.mark.parametrize("bits", [0x7E01, 0x7FC00001], ids=["float16", "float32"])
def test_checksum_treats_all_nans_alike_and_tells_null_from_zero(bits):
    size = 2 if bits < 1 << 16 else 4
    odd = np.array([bits], f"<u{size}").view(f"<f{size}")
    kind = pa.float16() if size == 2 else pa.float32()
    sums = [
        schema.row_checksum(pa.table({"x": pa.array(values, kind)}))[0].as_py()
        for values in (odd.dtype.type([np.nan]), odd, [None], odd.dtype.type([0.0]))
    ]
    assert sums[0] == sums[1]
    assert len({*sums[1:]}) == 3


@pytest.mark.parametrize("column", ["mpp", "n_regions", "uri", "aliases", "tissue_png", "status"])
def test_any_changed_value_breaks_the_checksum(column):
    rows = schema.conform(cohort.slide_rows(1), schema.slides_schema())
    assert schema.intact_rows(rows).tolist() == [True]
    other = {"mpp": 0.3, "n_regions": 4, "uri": "", "aliases": [], "tissue_png": b"", "status": ""}
    at = rows.schema.get_field_index(column)
    field = rows.schema.field(column)
    changed = rows.set_column(at, field, pa.array([other[column]], field.type))
    assert schema.intact_rows(changed).tolist() == [False]


def test_conform_refuses_other_columns_and_null_keys():
    rows = cohort.region_rows(0)
    with pytest.raises(ValueError, match="rx"):
        schema.conform(rows.drop_columns(["rx"]), schema.regions_schema(cohort.SLOTS))
    with pytest.raises(ValueError, match="more"):
        schema.conform(rows.append_column("more", rows["rx"]), schema.regions_schema(cohort.SLOTS))
    nulls = rows.set_column(0, "region_id", pa.nulls(rows.num_rows, pa.string()))
    with pytest.raises(ValueError, match="region_id"):
        schema.conform(nulls, schema.regions_schema(cohort.SLOTS))


def test_table_names():
    assert schema.features_table("UNI2-h") == "features_uni2_h"
    assert schema.embeddings_table("timm:org/Vit.b") == "embeddings_timm_org_vit_b"
    long = [schema.features_table("x" * 300 + end) for end in "ab"]
    assert len(long[0]) < 100
    assert long[0] != long[1]
    with pytest.raises(ValueError, match="encoder name"):
        schema.features_table("---")
