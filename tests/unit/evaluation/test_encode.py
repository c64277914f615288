"""The shared pass: every slide as if alone, in order, and only with the run's own features."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pathflip.errors import ArchiveError, ConfigError
from pathflip.evaluation import encode as module
from pathflip.evaluation.encode import batches, encode, list_slides


def test_slides_are_encoded_as_if_alone(archive, run, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(module, "MAX_BATCH", 5)
    lines = []
    texts = ["tumour", "necrosis"]
    found = encode(archive, run, texts=texts, progress=lambda p: lines.append((p.done, p.line())))
    assert [slide.slide_id for slide in found.slides] == sorted(archive.ready_ids())
    assert lines[-1][0] == 24
    assert "24/24 slides" in lines[-1][1]
    raw = run.model.encode_text(texts, normalize=False)
    for i, slide in enumerate(found.slides):
        values, mask, _ = archive.features_array(slide.slide_id)
        seen = run.model.encode_slide(
            torch.from_numpy(values.copy()).float()[None], torch.from_numpy(mask.copy())[None]
        )
        np.testing.assert_allclose(found.slide[i], seen.slide[0], atol=1e-6)
        np.testing.assert_allclose(found.local[i], run.model.local_scores(seen, raw)[0], atol=1e-6)


def test_batches_hold_like_sizes_and_real_positions(archive, run) -> None:  # type: ignore[no-untyped-def]
    slides = list_slides(archive, run, splits=["test"])
    assert {slide.split for slide in slides} == {"test"}
    rows = []
    for batch in batches(archive, slides, encoder="tex"):
        rows += batch.rows
        for i, slide in enumerate(batch.slides):
            regions = archive.regions(slide.slide_id, columns=["region_id", "rx", "ry"]).to_pylist()
            assert batch.region_xy[i].tolist() == [[r["rx"], r["ry"]] for r in regions]
            assert not batch.patch_mask[i, len(regions) :].any()
    assert sorted(rows) == list(range(len(slides)))


def test_what_a_run_trained_on_is_never_test(archive, other_run, tmp_path) -> None:  # type: ignore[no-untyped-def]
    run = other_run()
    run.path = tmp_path
    before = {s.slide_id: s.split for s in list_slides(archive, run)}
    test = sorted(slide for slide, split in before.items() if split == "test")
    drawn = {"slide_ids": test[:2], "splits": ["train", "val"]}
    pq.write_table(pa.table(drawn), tmp_path / "data.parquet")
    after = {s.slide_id: s.split for s in list_slides(archive, run)}
    assert after == before | dict(zip(test[:2], ["train", "val"], strict=True))
    assert len(list_slides(archive, run, splits=["test"])) == len(test) - 2


def test_a_run_that_does_not_fit_is_refused(archive, run, other_run) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ArchiveError, match="reads features of conch"):
        encode(archive, other_run(name="conch"))
    with pytest.raises(ArchiveError, match="revision 2"):
        encode(archive, other_run(revision="2"))
    other = other_run()
    other.tiling["patch_um"] = 64.0
    with pytest.raises(ArchiveError, match="patch_um 64"):
        encode(archive, other)
    with pytest.raises(ConfigError, match="no ready slide of split holdout") as caught:
        encode(archive, run, splits=["holdout"])
    assert "test, train, val" in caught.value.hint
