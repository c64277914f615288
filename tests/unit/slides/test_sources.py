"""Recognition of slide files, and their identity."""

import hashlib
import os

import pytest

from pathflip.errors import ConfigError, SlideError
from pathflip.slides.sources import (
    by_suffix,
    check_ingested,
    dicom_files,
    digest_source,
    discover,
    is_other_dicom,
    openable,
    slide_id,
    stat_source,
)


def names(found):
    return [os.path.basename(source.uri) for source in found]


def test_finds_slides_at_any_depth_once(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("b.svs", "deep/a.TIFF", "deep/er/c.ndpi", "notes.txt", ".hidden.svs"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "link.svs").symlink_to(tmp_path / "nowhere")
    found = discover([str(tmp_path), str(tmp_path / "b.svs")])
    assert names(found) == ["b.svs", "a.TIFF", "c.ndpi", "link.svs"]
    assert [source.bytes for source in found] == [1, 1, 1, -1]


def test_folders_that_are_slides(tmp_path):
    dicom = tmp_path / "series"
    dicom.mkdir()
    (dicom / "1.dcm").write_bytes(b"one")
    (dicom / "2.dcm").write_bytes(b"second")
    (dicom / "._2.dcm").write_bytes(b"Mac OS X")  # its attributes, on a disk of another system
    side = tmp_path / "m"
    side.mkdir()
    (tmp_path / "m.mrxs").write_bytes(b"m")
    (side / "Data0001.dat").write_bytes(b"12345")
    (side / "stray.tif").write_bytes(b"part of the mrxs")
    (tmp_path / "folder.svs").mkdir()
    found = {os.path.basename(s.uri): s.bytes for s in discover([str(tmp_path)])}
    assert [path.name for path in dicom_files(dicom)] == ["1.dcm", "2.dcm"]
    assert found == {"series": 9, "m.mrxs": 1 + 5 + 16, "folder.svs": found["folder.svs"]}


DICOM = b"\0" * 128 + b"DICM"


def test_dicom_files_are_their_series_whatever_they_are_called(tmp_path):
    """A slide is a series: capitals, no suffix, UIDs as names, and each file named by itself."""
    for folder, files in {
        "capitals": ("1.DCM", "2.DCM"),
        "bare": ("DCM_0", "DCM_1"),
        "uids": ("1.2.840.113619.2.1", "1.2.840.113619.2.2"),
    }.items():
        (tmp_path / folder).mkdir()
        for name in files:
            (tmp_path / folder / name).write_bytes(DICOM + name.encode())
    (tmp_path / "README").write_bytes(b"no picture, and shorter than a header")
    skipped = []
    found = discover([str(tmp_path)], skipped=skipped)
    assert names(found) == ["bare", "capitals", "uids"]
    assert [os.path.basename(path) for path in skipped] == ["README"]
    one_by_one = [str(path) for path in sorted((tmp_path / "capitals").iterdir())]
    assert discover(one_by_one) == [found[1]]
    assert discover([str(tmp_path / "bare" / "DCM_1")]) == [found[0]]
    assert [file.name for file in dicom_files(tmp_path / "bare")] == ["DCM_0", "DCM_1"]
    before = digest_source(tmp_path / "uids")
    (tmp_path / "uids" / "1.2.840.113619.2.2").write_bytes(DICOM + b"other")
    assert digest_source(tmp_path / "uids") != before


def test_what_is_skipped_is_counted_and_named(tmp_path):
    for name in ("a.svs", "b.isyntax", "c.isyntax", "labels.csv", ".hidden"):
        (tmp_path / name).write_bytes(b"x")
    skipped = []
    assert names(discover([str(tmp_path)], skipped=skipped)) == ["a.svs"]
    assert by_suffix(skipped) == {
        ".isyntax": {"files": 2, "example": str(tmp_path / "b.isyntax")},
        ".csv": {"files": 1, "example": str(tmp_path / "labels.csv")},
    }


def test_link_loops_end(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.svs").write_bytes(b"x")
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    assert names(discover([str(tmp_path)])) == ["x.svs"]


def test_refuses_what_holds_no_slides(tmp_path):
    with pytest.raises(ConfigError, match="holds no slides") as caught:
        discover([str(tmp_path)])
    assert caught.value.code == "no_slides"
    with pytest.raises(ConfigError, match="does not exist"):
        discover([str(tmp_path / "missing")])


def test_says_which_folders_cannot_be_read(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root reads every folder")
    (tmp_path / "a.svs").write_bytes(b"x")
    (tmp_path / "closed").mkdir(mode=0)
    skipped = []
    assert names(discover([str(tmp_path)], skipped=skipped)) == ["a.svs"]
    assert skipped == [str(tmp_path / "closed")]
    with pytest.raises(ConfigError, match="closed cannot be read: Permission denied"):
        discover([str(tmp_path / "closed")])


def test_digest_is_sha256_of_the_file(tmp_path):
    data = os.urandom(3_000_000)
    (tmp_path / "a.svs").write_bytes(data)
    assert digest_source(tmp_path / "a.svs") == hashlib.sha256(data).hexdigest()
    with pytest.raises(SlideError) as caught:
        digest_source(tmp_path / "gone.svs")
    assert caught.value.code == "not_a_file"


def test_digest_of_a_series_sees_every_file(tmp_path):
    (tmp_path / "1.dcm").write_bytes(b"one")
    (tmp_path / "2.dcm").write_bytes(b"two")
    before = digest_source(tmp_path)
    (tmp_path / "2.dcm").write_bytes(b"TWO")
    assert digest_source(tmp_path) != before


def test_stat_sees_a_change_of_the_side_folder(tmp_path):
    side = tmp_path / "m"
    side.mkdir()
    (tmp_path / "m.mrxs").write_bytes(b"m")
    (side / "Data0001.dat").write_bytes(b"12345")
    before = stat_source(tmp_path / "m.mrxs")
    os.utime(side / "Data0001.dat", ns=(0, before.mtime_ns + 1))
    assert stat_source(tmp_path / "m.mrxs") != before


def test_another_file_than_was_ingested_is_refused(tmp_path):
    file = tmp_path / "a.svs"
    file.write_bytes(b"as ingested")
    source = stat_source(file)
    row = {"uri": str(file), "bytes": source.bytes, "mtime_ns": source.mtime_ns}
    check_ingested(row)
    for change in (
        lambda: os.utime(file, ns=(0, source.mtime_ns + 1)),  # of the same size
        lambda: file.write_bytes(b"longer than it was"),
        file.unlink,
    ):
        change()
        with pytest.raises(SlideError, match=r"a\.svs") as error:
            check_ingested(row)
        assert error.value.code == ("source_changed" if file.exists() else "not_a_file")


def test_slide_ids():
    sha = hashlib.sha256(b"content").hexdigest()
    assert slide_id("/a/TCGA-01.svs", sha) == f"TCGA-01-{sha[:8]}"
    assert slide_id("/b/TCGA-01.svs", sha) == slide_id("/a/TCGA-01.svs", sha)
    assert slide_id("/a/x.svs", "/a/x.svs") != slide_id("/b/x.svs", "/b/x.svs")
    odd = slide_id("/a/ü b/\n'; DROP.svs", sha)
    assert "/" not in odd
    assert "\n" not in odd
    assert "'" not in odd
    assert len(slide_id("/a/" + "n" * 250 + ".svs", sha)) <= 130


def test_a_dicom_file_says_that_it_is_no_slide(tmp_path):
    def meta(kind: bytes) -> bytes:
        length = b"\x02\x00\x00\x00UL\x04\x00\x50\x00\x00\x00"
        return DICOM + length + b"\x02\x00\x02\x00UI" + bytes([len(kind), 0]) + kind

    report, slide = b"1.2.840.10008.5.1.4.1.1.88.11\0", b"1.2.840.10008.5.1.4.1.1.77.1.6"
    for data, other in (
        (meta(report), True),
        (meta(slide), False),
        (meta(report)[:-9], False),  # cut off: who knows what it was
        (DICOM, False),
        (b"", False),
    ):
        (tmp_path / "a.dcm").write_bytes(data)
        assert is_other_dicom(tmp_path / "a.dcm") is other


@pytest.mark.parametrize("slide", ["series", "series/pipe.dcm", "m.mrxs", "v.vms", "pipe.svs"])
def test_a_pipe_among_the_files_of_a_slide_is_not_waited_for(tmp_path, slide):
    """OpenSlide opens what lies beside a slide, and a pipe would be waited for until the end."""
    for name in ("series/a.dcm", "m.mrxs", "v.vms"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(128) + b"DICM" + bytes(600))
    (tmp_path / "m").mkdir()
    for name in ("series/pipe.dcm", "m/Slidedat.ini", "pipe.svs"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "m/link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(SlideError) as error:
        openable(tmp_path / slide)
    assert error.value.code == "not_a_file"
    for name in ("m/Slidedat.ini", "series/pipe.dcm"):
        (tmp_path / name).unlink()
    if slide in ("series", "m.mrxs"):
        openable(tmp_path / slide)
