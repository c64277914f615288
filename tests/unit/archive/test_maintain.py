import os
from datetime import timedelta

from pathflip.archive.maintain import maintain
from pathflip.archive.verify import verify
from tests.unit.archive.harm import assert_like_clean


def test_maintain_compacts_cleans_and_keeps_all_rows(uri, monkeypatch):
    old = uri / "regions.lance/data/orphan.lance"
    old.write_bytes(b"x" * 1000)
    os.utime(old, (0, 0))
    young = uri / "regions.lance/data/young.lance"
    young.write_bytes(b"y")
    kept = len(list(uri.glob("features_tex.lance/data/*")))
    done = maintain(uri)
    assert done["bytes_removed"] == 1000
    assert young.exists()
    assert set(done["fragments"].values()) == {1}
    assert len(list(uri.glob("features_tex.lance/data/*"))) == kept + 1  # readers of 24 hours
    assert_like_clean(uri)
    monkeypatch.setattr(
        "pathflip.archive.maintain.KEEP_HOURS", timedelta(microseconds=1) / timedelta(hours=1)
    )
    maintain(uri)
    assert not young.exists()
    assert len(list(uri.glob("features_tex.lance/data/*"))) == 1
    assert_like_clean(uri)
    assert verify(uri).notes == []
