"""The next state of an archive has in memory what searches need when it is first asked."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pathflip.archive import Archive, schema, vectors
from pathflip.archive.commit import Committer
from serve.schemas import SearchRequest
from serve.search import Search
from tests.archives import filled
from tests.unit.serve.service_fixture import World


def places(found: Any) -> list[tuple[str, str | None]]:
    return [(row["slide_id"], row["region_id"]) for row in found["results"]]


def test_searches_of_late_find_the_next_state_in_memory(
    world: World, tmp_path: Path, together: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import lance

    uri = shutil.copytree(world.archive, tmp_path / "archive")
    model, fingerprint = world.loaded.name, world.loaded.fingerprint
    part = Search(str(uri), model=model, fingerprint=fingerprint)
    rows = Archive(uri).embeddings(model=model)
    asked = {"model": model, "fingerprint": fingerprint, "vectors": vectors(rows["vector"])[:1]}
    requests = [
        SearchRequest(text="mucin", level="region", k=3).model_dump(),
        SearchRequest(text="mucin", level="slide", k=3).model_dump(),
        SearchRequest(
            text="mucin", level="region",
            filters=[{"field": "label.grade", "op": "=", "value": "2"}],
        ).model_dump(),
    ]  # fmt: skip
    before = [together(part.search(request, asked)) for request in requests]
    together(part.search(SearchRequest(slide_id="slide001").model_dump(), None))
    assert all(found["results"] for found in before)
    # Vectors and slides change, so that nothing is kept of either.
    with Committer(uri) as committer:
        table = committer.archive.models()[model]["embeddings_table"]
        own = committer.archive.embeddings(model=model)
        own = own.filter(np.array(own["slide_id"].to_pylist()) == "slide001")
        committer.replace_rows(table, own.drop_columns(["checksum"]))
    following = part.snapshot.archive.successor()
    part._warm(following)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a client waits for the disk")

    with monkeypatch.context() as cold:
        for name in ("to_table", "to_batches", "scanner", "count_rows"):
            cold.setattr(lance.LanceDataset, name, refuse)
        found = [part._search(following, request, asked) for request in requests]
    assert [places(one) for one in found] == [places(one) for one in before]


def test_a_slide_that_is_gone_keeps_no_state_from_being_warmed(
    world: World, tmp_path: Path, together: Callable[[Any], Any]
) -> None:
    uri = shutil.copytree(world.archive, tmp_path / "archive")
    part = Search(str(uri), model=world.loaded.name, fingerprint=world.loaded.fingerprint)
    together(part.search(SearchRequest(slide_id="slide001").model_dump(), None))
    with Committer(uri) as committer:
        (row,) = (row for row in committer.archive.slides().to_pylist()
                  if row["slide_id"] == "slide001")  # fmt: skip
        gone = [row | {"status": "quarantined", "fingerprint": "gone"}]
        committer.commit(slides=filled(schema.slides_schema(), gone))
    following = part.snapshot.archive.successor()
    part._warm(following)
    assert "slide001" not in following.ready_ids()
