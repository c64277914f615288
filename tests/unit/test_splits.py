import pyarrow as pa
import pyarrow.compute as pc
import pytest

from pathflip.archive.filters import Filter
from pathflip.splits import SPLITS, canonical_split, requested_split, spellings


@pytest.mark.parametrize(
    ("written", "split"),
    [
        ("train", "train"), ("Training", "train"), ("TRAIN ", "train"), ("val", "val"),
        ("Valid", "val"), ("validation", "val"), ("\u00a0dev", "val"), ("test", "test"),
        ("testing", "test"), ("fold 3", "fold 3"), (" A ", "A"), ("", None), ("nan", None),
        ("N/A", None), ("-", None), (None, None),
    ],
)  # fmt: skip
def test_every_spelling_means_its_split(written, split):
    assert canonical_split(written) == split


def test_a_request_is_never_for_slides_without_a_split():
    assert requested_split("Validation") == "val"
    assert requested_split("none") == "none"
    assert requested_split("all") == "all"


def test_spellings_are_of_one_split_each():
    every = [name for split in SPLITS for name in spellings(split)]
    assert len(every) == len(set(every))
    assert all(canonical_split(name) == split for split in SPLITS for name in spellings(split))
    assert spellings("fold 3") == ("fold 3",)


@pytest.mark.parametrize("asked", ["val", "validation", "Dev"])
def test_a_filter_meets_a_split_under_all_of_its_names(asked):
    stored = ["val", "Validation ", "dev", "train", "evaluation", None]
    rows = pa.table({"split": pa.array(stored, pa.string()), "n": range(6)})
    met = rows.filter(Filter.parse(f"split={asked}").expression())
    assert met["n"].to_pylist() == [0, 1, 2]
    others = rows.filter(Filter.parse(f"split!={asked}").expression())
    assert others["n"].to_pylist() == [3, 4, 5]
    fold = rows.set_column(0, "split", pc.replace_substring(rows["split"], "train", "Fold 1"))
    assert fold.filter(Filter.parse("split=fold 1").expression())["n"].to_pylist() == [3]
