"""Slides of an object store: found by the rules of folders, read from copies one can trust."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pathflip.archive import Archive
from pathflip.archive.lock import ArchiveLock
from pathflip.errors import ConfigError, SlideError
from pathflip.slides import objects
from pathflip.slides.sources import (
    Source,
    check_ingested,
    digest_source,
    discover,
    is_there,
    stat_slide,
    stat_source,
)
from pathflip.slides.staging import Stage, _inside, opened
from tests import proxy
from tests.s3 import Store, environment

DICOM = b"\0" * 128 + b"DICM"
TREE = {
    "b.svs": b"first",
    "deep/a.TIFF": b"second one",
    "deep/er/ä c+d %20.ndpi": b"a name of any kind",
    "notes.txt": b"x",
    "deep/README": b"no picture, and shorter than a header",
    "deep/BARE": b"no picture" * 20,
    ".hidden.svs": b"x",
    "m.mrxs": b"index",
    "m/Data0001.dat": b"12345",
    "m/more/Data0002.dat": b"678",
    "m/stray.tif": b"part of the mrxs",
    "alone.mrxs": b"without a folder",
    "series/1.dcm": b"one",
    "series/2.DCM": b"second",
    "series/notes.md": b"x",
    "bare/DCM_0": DICOM + b"zero",
    "bare/DCM_1": DICOM + b"one",
    "uids/1.2.840.113619.2.1": DICOM + b"level",
    "folder.svs/inside.txt": b"x",
    "c.isyntax": b"x",
}


def put(store: Store, bucket: str, files: dict[str, bytes]) -> None:
    from urllib.parse import quote

    for name, data in files.items():
        status, _ = store.request("PUT", f"{bucket.removeprefix('s3:/')}/{quote(name)}", data)
        assert status == 200


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """The same slides in a folder."""
    for name, data in TREE.items():
        path = tmp_path / "here" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "here"


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(str(tmp_path / "stage"), gb=1)


def copies(stage: Stage) -> list[str]:
    return sorted(path.name for path in stage.folder.glob("*.*/*/*"))


def refused(call: Callable[[], object]) -> SlideError:
    with pytest.raises(SlideError) as caught:
        call()
    return caught.value


def read(stage: Stage, source: Source, **options: str) -> bytes:
    with stage.open(source, **options) as staged:
        return staged.path.read_bytes()


def test_a_prefix_holds_what_a_folder_holds(store: Store, bucket: str, here: Path) -> None:
    put(store, bucket, {f"cohort/{name}": data for name, data in TREE.items()})
    root = f"{bucket}/cohort"
    ours: list[str] = []
    theirs: list[str] = []
    found = discover([root + "/"], skipped=ours)
    known = discover([str(here)], skipped=theirs)
    assert {one.uri.removeprefix(root): one.bytes for one in found} == {
        one.uri.removeprefix(str(here)): one.bytes for one in known
    }
    assert len(found) == 9
    strip = {uri.removeprefix(root) for uri in ours}
    assert strip == {path.removeprefix(str(here)) for path in theirs}
    assert all(stat_slide(one.uri) == one for one in found)
    # Named one by one, and by folders of any kind.
    assert discover([f"{root}/b.svs"]) == [one for one in found if one.uri.endswith("b.svs")]
    (series,) = (one for one in found if one.uri.endswith("series"))
    assert discover([f"{root}/series", f"{root}/series/2.DCM"]) == [series]
    assert [one.bytes for one in discover([f"{root}/folder.svs"])] == [-1]
    assert discover([f"{root}/deep", bucket, str(here)])[-1].uri.startswith("s3://")
    assert is_there(series.uri)
    assert not is_there(f"{root}/gone.svs")


def test_what_is_not_there_is_refused(store: Store, bucket: str) -> None:
    put(store, bucket, {"a/notes.txt": b"x"})
    for address, code in {
        f"{bucket}/a": "no_slides",
        f"{bucket}/b": "missing_source",
        f"{bucket}-no-such/a": "missing_source",
        "http://example.org/a.svs": "missing_source",
        "s3:///a.svs": "missing_source",
    }.items():
        with pytest.raises(ConfigError) as caught:
            discover([address])
        assert caught.value.code == code, address
    with pytest.raises(ConfigError, match="AZURE_STORAGE_ACCOUNT_NAME"):
        discover(["az://container/a.svs"])


def test_keys_are_taken_as_they_are_or_refused(store: Store, bucket: str, stage: Stage) -> None:
    """Nothing of a key is decoded, and none leads to another object or out of the folder."""
    odd = ["a%2Fb.svs", "a b+c.svs", "a#b?.svs", "a\\b.svs", "\u00e9.svs", "a:b.svs"]
    wrong = ["x//double.svs", "x/../up.svs", "x/./dot.svs"]
    put(store, bucket, {key: key.encode() for key in (*odd, *wrong)})
    found = {one.uri: one for one in discover([bucket])}
    assert sorted(found) == sorted(f"{bucket}/{key}" for key in (*odd, *wrong))
    for key in odd:
        with stage.open(found[f"{bucket}/{key}"]) as staged:
            assert staged.path.read_bytes() == key.encode()
            assert staged.path.is_relative_to(stage.folder)
    for key in wrong:
        with (
            pytest.raises(SlideError, match="empty part") as caught,
            stage.open(found[f"{bucket}/{key}"]),
        ):
            pass
        assert caught.value.code == "unsupported"


@pytest.mark.parametrize(
    "address",
    [
        "s3://AKIAKEY:very-secret@bucket/a.svs",
        "s3://AKIAKEY:very/secret@bucket/a.svs",
        "s3://bucket/a.svs?X-Amz-Credential=AKIAKEY&X-Amz-Signature=secret",
        "az://container/a.svs?sv=2024&sig=secret",
        "s3://bucket?access_key=AKIAKEY&secret_key=secret",
    ],
)
def test_addresses_with_credentials_are_refused_and_not_repeated(address: str) -> None:
    for use in (
        lambda: discover([address]),
        lambda: Archive(address),
        lambda: ArchiveLock(address),
    ):
        with pytest.raises(ConfigError, match="more than a bucket and a key") as caught:
            use()
        assert "secret" not in str(caught.value)
        assert "AKIA" not in str(caught.value)


def test_copies_have_content_names_and_times(
    store: Store, bucket: str, here: Path, stage: Stage
) -> None:
    """Whatever a slide is made of: the digest is that of the same slide in a folder."""
    put(store, bucket, TREE)
    checked = 0
    for source in discover([bucket]):
        if source.bytes < 0:
            assert refused(lambda one=source: read(stage, one)).code == "not_a_file"
            continue
        file = here / source.uri.removeprefix(f"{bucket}/")
        with stage.open(source) as staged:
            assert staged.sha256 == digest_source(staged.path) == digest_source(file)
            assert staged.path.name == file.name
            assert stat_source(staged.path) == replace(source, uri=str(staged.path))
            checked += 1
    assert checked == 8
    assert stage.folder.stat().st_mode & 0o777 == 0o700
    assert {"m", "m.mrxs", "series", "bare"} <= set(copies(stage))


def test_an_object_that_is_another_by_now_is_refused(
    store: Store, bucket: str, stage: Stage
) -> None:
    put(store, bucket, {"a.svs": b"as ingested", "b.svs": b"as ingested"})
    a, b = discover([bucket])
    with stage.open(a) as staged:
        row = {"uri": a.uri, "bytes": a.bytes, "mtime_ns": a.mtime_ns, "sha256": staged.sha256}
    with opened(row, stage=stage) as path:
        assert path.read_bytes() == b"as ingested"
    # What the archive knows is not what lies there, although size and time are the same.
    assert refused(lambda: read(stage, b, sha256="0" * 64)).code == "source_changed"
    put(store, bucket, {"a.svs": b"longer than it was"})
    assert refused(lambda: read(stage, a)).code == "source_changed"
    assert refused(lambda: check_ingested(row)).code == "source_changed"
    store.request("DELETE", f"{bucket.removeprefix('s3:/')}/a.svs")
    assert refused(lambda: read(stage, a)).code == "not_a_file"
    assert "any more" in str(refused(lambda: check_ingested(row)))


def test_a_file_where_it_lies_is_not_copied(here: Path, stage: Stage) -> None:
    (source,) = discover([str(here / "b.svs")])
    with stage.open(source) as staged:
        assert (staged.path, staged.sha256) == (here / "b.svs", None)
    assert not stage.folder.exists()


def test_keys_that_are_no_file_names_stay_out_of_the_folder(
    store: Store, bucket: str, stage: Stage
) -> None:
    put(
        store, bucket, {"m.mrxs": b"index", f"m/{'x' * 300}.dat": b"long", f"{'y' * 256}.svs": b"x"}
    )
    for source in discover([bucket]):
        assert refused(lambda one=source: read(stage, one)).code == "unsupported"
    assert copies(stage) == []
    one = objects.StoredObject(uri=f"{bucket}/m/../../escape.dat", bytes=1, mtime_ns=0)
    assert refused(lambda: _inside(f"{bucket}/m.mrxs", one)).code == "unsupported"


def test_the_next_slides_come_while_one_is_read(store: Store, bucket: str, stage: Stage) -> None:
    put(store, bucket, {f"{name}.svs": b"x" * 1000 for name in "abcd"})
    sources = discover([bucket])
    stage.prefetch([replace(sources[0], uri="/a/file.svs"), *sources[1:]])
    deadline = time.monotonic() + 60
    while copies(stage) != ["b.svs", "c.svs"] and time.monotonic() < deadline:
        time.sleep(0.02)
    assert copies(stage) == ["b.svs", "c.svs"]
    gone = replace(sources[0], uri=f"{bucket}/gone.svs")
    stage.prefetch([gone])  # says nothing: whoever opens it is told
    assert refused(lambda: read(stage, gone)).code == "not_a_file"


def test_settings_come_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("PATHFLIP_STAGE_DIR", str(tmp_path))
    assert Stage().folder.parent == tmp_path
    assert Stage(str(tmp_path / "given")).folder.parent == tmp_path / "given"
    for value in ("0", "-1", "much", "nan", "inf"):
        monkeypatch.setenv("PATHFLIP_STAGE_GB", value)
        with pytest.raises(ConfigError, match="stage_gb"):
            Stage()
    with pytest.raises(ConfigError, match=r"stage_gb is 0"):
        Stage(gb=0)


# -- a store that breaks --------------------------------------------------------------------------


@pytest.fixture
def between(store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[proxy.Proxy]:
    """A proxy through which this process sees the store."""
    with proxy.between(store.port) as between:
        for name, value in environment(between.port).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(objects, "BACKOFF_S", (0.0,))
        yield between


def of_body(fault: str, times: int) -> proxy.Faults:
    """Harm the first answers that bring a body."""
    left = iter(range(times))
    return lambda method, _: fault if method == "GET" and next(left, None) is not None else None


def methods(between: proxy.Proxy) -> list[str]:
    return [method for method, _ in between.traffic.requests]


def test_a_broken_connection_is_taken_up_again(
    store: Store, bucket: str, between: proxy.Proxy, stage: Stage
) -> None:
    data = os.urandom(20 << 20)  # three requests
    put(store, bucket, {"a.svs": data})
    (source,) = discover([f"{bucket}/a.svs"])
    between.traffic, between.fault = proxy.Traffic(), of_body(proxy.CUT, 2)
    assert read(stage, source) == data
    assert methods(between).count("GET") == 5
    between.traffic = proxy.Traffic()
    assert read(stage, source) == data
    assert "GET" not in methods(between)  # it is there


def test_a_body_that_never_comes_whole_costs_the_slide(
    store: Store,
    bucket: str,
    between: proxy.Proxy,
    stage: Stage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put(store, bucket, {"a.svs": os.urandom(100_000)})
    (source,) = discover([f"{bucket}/a.svs"])
    between.fault = of_body(proxy.CUT, 10**6)
    monkeypatch.setattr(objects, "BACKOFF_S", ())
    error = refused(lambda: read(stage, source))
    assert error.code == "store_failed"
    assert copies(stage) == []
    assert not list(stage.folder.glob("*.partial"))


def test_what_is_denied_is_said_without_what_the_store_said(
    store: Store, bucket: str, between: proxy.Proxy, stage: Stage
) -> None:
    put(store, bucket, {"a.svs": b"x" * 1000})
    (source,) = discover([f"{bucket}/a.svs"])
    between.fault = of_body(proxy.FORBIDDEN, 10**6)
    error = refused(lambda: read(stage, source))
    assert error.code == "access_denied"
    assert "AWS Error" not in str(error)
    between.fault = lambda *_: proxy.FORBIDDEN
    with pytest.raises(ConfigError) as caught:
        discover([bucket])
    assert caught.value.code == "access_denied"


def test_an_object_replaced_while_it_is_read_is_not_used(
    store: Store, bucket: str, between: proxy.Proxy, stage: Stage
) -> None:
    """The new object has the same size and second: only the ETag tells."""
    put(store, bucket, {"a.svs": b"a" * (20 << 20)})
    (source,) = discover([f"{bucket}/a.svs"])

    def replaced(method: str, _: str) -> None:
        if method == "GET" and methods(between).count("GET") == 2:
            put(store, bucket, {"a.svs": b"b" * (20 << 20)})

    between.traffic, between.fault = proxy.Traffic(), replaced
    assert refused(lambda: read(stage, source)).code == "source_changed"
    assert copies(stage) == []
