"""An archive on a store whose answers are late, lost, cut off or refusals."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from pathflip.archive import Archive, lease
from pathflip.archive.commit import Committer
from pathflip.archive.create import create_archive
from pathflip.archive.storage import digest_file
from pathflip.archive.verify import verify
from pathflip.errors import ArchiveError
from tests import proxy, s3
from tests.unit.archive import cohort
from tests.unit.archive.test_commit import assert_whole


@pytest.fixture
def between(store: s3.Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[proxy.Proxy]:
    """A proxy through which this process sees the store, with little patience."""
    monkeypatch.setattr(lease, "EXPIRES_S", 1.5)
    with proxy.between(store.port) as between:
        short = {"AWS_TIMEOUT": "4s", "OBJECT_STORE_CLIENT_MAX_RETRIES": "2"}
        for name, value in {**s3.environment(between.port), **short}.items():
            monkeypatch.setenv(name, value)
        yield between


@pytest.mark.parametrize(
    ("fault", "every"), [(proxy.BUSY, 9), (proxy.DROP, 9), (proxy.DEAF, 9), (proxy.STALL, 60)]
)
def test_single_faults_are_not_noticed(
    bucket: str, between: proxy.Proxy, fault: str, every: int
) -> None:
    """Each request may fail once; whatever of a commit arrived twice counts once."""
    cohort.build(f"{bucket}/a", 0)
    requests = []

    def sometimes(method: str, path: str) -> str | None:
        requests.append(path)
        return fault if len(requests) % every == every // 2 else None

    between.fault = sometimes
    with Committer(f"{bucket}/a") as committer:
        cohort.commit(committer, 1)
    between.fault = proxy.no_fault
    assert len(requests) > every
    assert_whole(f"{bucket}/a", range(2))


def test_commits_whose_answers_are_lost_count_once(bucket: str, between: proxy.Proxy) -> None:
    """The manifest is there, but the writer does not hear of it, at every commit."""
    cohort.build(f"{bucket}/a", 0)
    lost = []

    def manifests(method: str, path: str) -> str | None:
        if method == "PUT" and "/_versions/" in path and path not in lost:
            lost.append(path)
            return proxy.DEAF
        return None

    between.fault = manifests
    with Committer(f"{bucket}/a") as committer:
        cohort.commit(committer, 1)
    between.fault = proxy.no_fault
    assert len(lost) > 6
    assert_whole(f"{bucket}/a", range(2))


def test_an_outage_ends_in_one_sentence_and_the_same_again_goes_on(
    bucket: str, between: proxy.Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store goes away at three moments of a commit; nothing of it can be seen afterwards."""
    monkeypatch.setenv("OBJECT_STORE_CLIENT_MAX_RETRIES", "0")  # Lance tries again six times
    moments = (1, 4, 5)
    cohort.build(f"{bucket}/whole", 0)
    between.traffic = proxy.Traffic()
    with Committer(f"{bucket}/whole") as committer:
        cohort.commit(committer, 1)
        total = len(between.traffic.requests)

    def out_after(share: int) -> None:
        uri = f"{bucket}/{share}"
        cohort.build(uri, 0)
        seen: list[str] = []
        outages[f"{bucket.removeprefix('s3:/')}/{share}/"] = (seen, share * total // 6)
        with (
            pytest.raises(ArchiveError, match="does not answer as it should") as error,
            Committer(uri) as committer,
        ):
            cohort.commit(committer, 1)
        assert error.value.code == "unreachable"
        assert "the same command again" in error.value.hint

    outages: dict[str, tuple[list[str], int]] = {}

    def gone(method: str, path: str) -> str | None:
        decoded = path.replace("?list-type=2&prefix=", "/").replace("%2F", "/")
        for prefix, (seen, most) in outages.items():
            if decoded.startswith(prefix):
                seen.append(path)
                return proxy.BUSY if len(seen) > most else None
        return None

    between.fault = gone
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(out_after, moments))
    between.fault = proxy.no_fault
    for share in moments:
        uri = f"{bucket}/{share}"
        assert sorted(Archive(uri).ready_ids()) == ["slide000"]
        assert verify(uri).damaged == []
        with Committer(uri) as committer:
            cohort.commit(committer, 1)
        assert_whole(uri, range(2))


def test_a_digest_is_never_that_of_half_an_answer(bucket: str, between: proxy.Proxy) -> None:
    cohort.build(f"{bucket}/a", 0)
    path = next(iter(Archive(f"{bucket}/a").dataset("files").to_table()["path"].to_pylist()))
    right = digest_file(f"{bucket}/a", path)
    asked: list[str] = []

    def once(method: str, path: str) -> str | None:
        asked.append(method)
        return proxy.CUT if len(asked) == 1 else None

    between.fault = once
    assert digest_file(f"{bucket}/a", path) == right
    assert asked[0] == "HEAD", "Arrow takes half of this answer for an empty file"


def test_refusals_of_the_store_say_what_to_check(bucket: str, between: proxy.Proxy) -> None:
    cohort.build(f"{bucket}/a")
    between.fault = lambda method, path: proxy.FORBIDDEN
    with pytest.raises(ArchiveError, match=r"does not permit it \(403 Forbidden\)") as error:
        Archive(f"{bucket}/a")
    assert error.value.code == "not_permitted"
    assert "AWS_ACCESS_KEY_ID" in error.value.hint
    between.fault = proxy.no_fault
    with pytest.raises(ArchiveError, match="the bucket of s3://no-such/a does not exist") as error:
        create_archive("s3://no-such/a", tiling=cohort.TILING)
    assert error.value.code == "missing_bucket"
