"""The store that the tests of object storage run on keeps what S3 promises."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor

import lance
import pyarrow as pa
from pyarrow import fs

from tests.s3 import Store


def test_of_many_writers_one_makes_an_object(store: Store, bucket: str) -> None:
    """``If-None-Match: *`` and ``If-Match`` let exactly one of the writers through."""
    name = bucket.removeprefix("s3:/")

    def one_of(writers: range, path: str, condition: dict[str, str]) -> bytes:
        bodies = [f"{who}".encode() * 1000 for who in writers]
        answers = list(
            pool.map(lambda body: store.request("PUT", f"{name}/{path}", body, condition), bodies)
        )
        assert sorted(status for status, _ in answers) == [200] + [412] * 15
        written = bodies[[status for status, _ in answers].index(200)]
        assert store.request("GET", f"{name}/{path}")[1] == written
        return written

    with ThreadPoolExecutor(16) as pool:
        for number in range(10):
            made = one_of(range(16), f"k{number}", {"If-None-Match": "*"})
            etag = f'"{hashlib.md5(made).hexdigest()}"'
            one_of(range(16, 32), f"k{number}", {"If-Match": etag})


def test_lance_and_arrow_see_one_store(bucket: str) -> None:
    """A table of 12 MB, which goes up in parts, and commits by several writers at once."""
    rows = pa.table({"x": pa.array([b"%d" % i * 2_000 for i in range(2_000)])})
    written = lance.write_dataset(rows, f"{bucket}/t.lance")
    assert written.to_table() == rows

    def add(number: int) -> None:
        lance.write_dataset(pa.table({"x": [b"%d" % number]}), f"{bucket}/t.lance", mode="append")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(8)))
    assert lance.dataset(f"{bucket}/t.lance").count_rows() == 2_008
    system, root = fs.FileSystem.from_uri(bucket)
    found = system.get_file_info(fs.FileSelector(f"{root}/t.lance/_versions", recursive=True))
    assert len([info for info in found if info.path.endswith(".manifest")]) == 9
