"""Workers that died are counted by slide; those that finished are not."""

from jobs.ingest.deaths import Deaths


def test_a_chunk_that_begins_again_without_an_end_is_a_death():
    deaths = Deaths()
    assert deaths.begin("a", 0, "first") == 0
    assert deaths.begin("a", 1, "second") == 0  # two workers on one slide
    assert deaths.begin("a", 0, "third") == 1
    deaths.end("a", 0)
    assert deaths.begin("a", 0, "fourth") == 1  # done again, because a node was lost
    assert deaths.begin("a", 1, "second") == 1  # the same worker asks again
    assert deaths.begin("a", 1, "fourth") == 2
    assert deaths.begin("b", 0, "fourth") == 0
