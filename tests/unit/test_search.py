"""Every kind of query against a slow reference: all rows, plain NumPy, Python's order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pathflip.archive import Archive
from pathflip.archive.commit import Committer
from pathflip.archive.filters import Filter
from pathflip.errors import ArchiveError, ConfigError
from pathflip.search import NoPatientError, Query, find, run_query
from tests.unit.archive import cohort, models

SLIDES = range(8)
Keep = Callable[[dict[str, Any]], bool]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    uri = tmp_path_factory.mktemp("search") / "a"
    cohort.build(uri)
    with Committer(uri) as committer:
        cohort.commit(committer, *SLIDES)
        models.add(committer, *SLIDES)
        models.tell(committer, *SLIDES)
    return Archive(uri)


def vectors(model: bool) -> dict[str, dict[str, Any]]:
    """Rows of embeddings by id, as the fixtures write them."""
    table = [models.rows(*SLIDES)] if model else map(cohort.embedding_rows, SLIDES)
    people = {
        row["slide_id"]: row["patient_id"]
        for n in SLIDES
        for row in cohort.slide_rows(n).to_pylist()
    }
    return {
        row["id"]: row | {"patient_id": people[row["slide_id"]]}
        for part in table
        for row in part.to_pylist()
    }


def ranked(
    query: NDArray[Any] | str, *, model: bool, level: str, keep: Keep = lambda row: True
) -> list[tuple[str, float]]:
    """(id, cosine), best first, ties by id; a query by a row's id takes its vector."""
    rows = vectors(model)
    vector = np.asarray(rows[query]["vector"] if isinstance(query, str) else query, np.float64)
    scores = {}
    for key, row in rows.items():
        if row["kind"] == level and keep(row):
            own = np.asarray(row["vector"], np.float64)
            scores[key] = float(own @ vector / np.linalg.norm(own) / np.linalg.norm(vector))
    return sorted(scores.items(), key=lambda item: (-item[1], item[0]))


def assert_found(table: Any, truth: list[tuple[str, float]]) -> None:
    rows = table.to_pylist()
    assert [row["region_id"] or row["slide_id"] for row in rows] == [key for key, _ in truth]
    assert [row["score"] for row in rows] == pytest.approx([score for _, score in truth], abs=1e-6)
    assert [row["rank"] for row in rows] == list(range(1, len(rows) + 1))


def other_patient(row: dict[str, Any]) -> bool:
    return row["patient_id"] != "P1"  # a slide without a patient stays


@pytest.mark.parametrize("level", ["region", "slide"])
@pytest.mark.parametrize("model", [False, True])
@pytest.mark.parametrize(
    ("asked", "keep"),
    [
        ({}, lambda row: True),
        ({"exclude_same_slide": True}, lambda row: row["slide_id"] != "slide002"),
        ({"exclude_same_patient": True}, other_patient),
        ({"exclude_patient": "P1"}, other_patient),
        (
            {"filters": ["split=test", "mpp<=0.3"]},
            lambda row: int(row["slide_id"][-1]) in (1, 3, 5),
        ),
        ({"k": 3}, lambda row: True),
    ],
)
def test_by_a_slide_or_a_region(
    archive: Archive, model: bool, level: Any, asked: dict[str, Any], keep: Keep
) -> None:
    asked = {"k": 1000} | asked
    asked["filters"] = [Filter.parse(text) for text in asked.get("filters", ())]
    space = {"model": models.MODEL, "fingerprint": "f" * 64} if model else {"encoder": "tex"}
    for part, name, key in (
        ("slide", "slide002", "slide002"),
        ("slide", "it's 2", "slide002"),
        ("region", "slide002/3_2", "slide002/3_2"),
    ):
        found = run_query(archive, Query(**{part: name}, level=level, **asked, **space))
        assert_found(found, ranked(key, model=model, level=level, keep=keep)[: asked["k"]])


@pytest.mark.parametrize("level", ["region", "slide"])
def test_by_a_vector_of_a_picture_or_a_text(archive: Archive, level: Any) -> None:
    rng = np.random.default_rng(0)
    picture, text = rng.standard_normal(cohort.DIM), rng.standard_normal(models.DIM)
    assert_found(
        run_query(archive, Query(vector=picture, level=level, k=7)),  # its only encoder
        ranked(picture, model=False, level=level)[:7],
    )
    query = Query(text="necrosis", vector=text, level=level, k=7, model=models.MODEL)
    assert_found(run_query(archive, query), ranked(text, model=True, level=level)[:7])


def test_by_words(archive: Archive) -> None:
    having = {f"slide{n:03d}" for n in SLIDES if "keratin" in models.caption(n)}
    for model in (None, models.MODEL, "other_01234567"):  # whose rows of slides are asked is one
        asked: dict[str, Any] = {"text": "keratin", "mode": "text", "level": "slide", "k": 100}
        found = run_query(archive, Query(**asked, model=model))
        assert set(found["slide_id"].to_pylist()) == having
        assert found["score"].to_pylist() == sorted(found["score"].to_pylist(), reverse=True)
        filters = [Filter.parse("split=train")]
        found = run_query(
            archive, Query(**asked, model=model, filters=filters, exclude_patient="P1")
        )
        train = {slide for slide in having if int(slide[-1]) % 2 == 0}
        assert set(found["slide_id"].to_pylist()) == train - {"slide002"}


@pytest.mark.parametrize("level", ["region", "slide"])
def test_by_both(archive: Archive, level: Any) -> None:
    vector = np.random.default_rng(1).standard_normal(models.DIM)
    words = Query(text="keratin mucin", mode="text", level="slide", k=100)
    order = run_query(archive, words)["slide_id"].to_pylist()
    near = ranked(vector, model=True, level=level)
    scores = {}
    for place, (key, _) in enumerate(near, start=1):
        slide = key.partition("/")[0]
        said = 1 / (60 + order.index(slide) + 1) if slide in order else 0
        scores[key] = 1 / (60 + place) + said
    truth = sorted(scores.items(), key=lambda item: (-item[1], item[0]))[:9]
    query = Query(
        text="keratin mucin", vector=vector, mode="hybrid", level=level, k=9, model=models.MODEL
    )
    assert_found(run_query(archive, query), truth)


def test_nobody_knows_the_patient(archive: Archive) -> None:
    with pytest.raises(NoPatientError, match="no patient of slide003"):
        run_query(archive, Query(slide="slide003", exclude_same_patient=True))
    found = run_query(archive, Query(slide="slide003", exclude_same_slide=True, k=1000))
    assert found.num_rows == (len(SLIDES) - 1) * cohort.REGIONS


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        ({"slide": "nobody"}, "unknown_slide"),
        ({"region": "slide001/9_9"}, "unknown_slide"),
        ({"region": "nobody/1_1"}, "unknown_slide"),
        ({"slide": "slide001", "model": "m_1"}, "not_indexed"),
        ({"slide": "slide001", "model": models.MODEL, "fingerprint": "0" * 64}, "wrong_model"),
        ({"slide": "slide001", "encoder": "uni"}, "unknown_encoder"),
        ({"vector": np.ones(cohort.DIM + 1)}, "wrong_encoder"),
    ],
)
def test_what_is_not_there_is_said(archive: Archive, asked: dict[str, Any], code: str) -> None:
    with pytest.raises(ArchiveError) as error:
        run_query(archive, Query(**asked))
    assert error.value.code == code


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({}, "one of a text, a picture"),
        ({"text": "a", "slide": "b"}, "one of a text, a picture"),
        ({"slide": "a", "region": "b"}, "one of a text, a picture"),
        ({"vector": [1.0], "slide": "b"}, "one of a text, a picture"),
        ({"text": "a", "vector": [1.0], "exclude_same_slide": True}, "to leave out"),
        ({"vector": [1.0], "exclude_same_patient": True}, "to leave out"),
        ({"slide": "a", "exclude_same_patient": True, "exclude_patient": "P"}, "one patient"),
        ({"slide": "a", "mode": "hybrid"}, "search for a text"),
        ({"vector": [1.0], "mode": "text", "level": "slide"}, "search for a text"),
        ({"text": "a"}, "needs a trained model"),
        ({"text": "a", "mode": "hybrid"}, "needs a trained model"),
        ({"text": "a", "mode": "text"}, "Captions are of slides"),
    ],
)
def test_parts_that_do_not_go_together(asked: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Query(**asked)


def test_the_archive_is_not_needed_to_check_a_query(tmp_path: Path) -> None:
    assert Query(text="a", mode="text", level="slide").k == 10
    assert list(tmp_path.iterdir()) == []


# -- from Python -----------------------------------------------------------------------------------

WORDS = np.random.default_rng(5).standard_normal(models.DIM)
"""Vector of every text."""


def run_of(**changes: Any) -> Any:
    """A run of the fixtures' model, as far as a search asks it."""

    def encode_text(texts: list[str]) -> torch.Tensor:
        return torch.tensor(np.tile(WORDS, (len(texts), 1)))

    known = {"name": models.MODEL, "fingerprint": "f" * 64, "encoder": models.ENCODER}
    known |= {"path": Path("runs/mini"), "tiling": cohort.TILING}
    return SimpleNamespace(model=SimpleNamespace(encode_text=encode_text), **known | changes)


@pytest.mark.parametrize("level", ["region", "slide"])
def test_words_are_embedded_by_the_run(archive: Archive, level: str) -> None:
    found = find(archive, "necrosis", run=run_of(), level=level, k=5)
    assert_found(found.rows, ranked(WORDS, model=True, level=level)[:5])
    assert len(found) == 5
    assert repr(found) == f"SearchResults(5 for 'necrosis' in {archive.uri!r})"


def test_a_slide_is_looked_for_in_the_space_that_is_named(archive: Archive) -> None:
    for run in (None, run_of()):
        found = find(archive, slide="slide003", run=run, level="slide", exclude_same_slide=True)
        model = run is not None
        truth = ranked("slide003", model=model, level="slide", keep=lambda r: r["id"] != "slide003")
        assert_found(found.rows, truth[:10])


def test_words_of_captions_need_no_model(archive: Archive) -> None:
    found = find(archive, "necrosis", mode="text", level="slide")
    assert found.rows.equals(run_query(archive, Query(text="necrosis", mode="text", level="slide")))
    assert find(archive, "necrosis", run=run_of(), mode="text", level="slide").rows.equals(
        found.rows
    )


def test_what_cannot_be_found_says_why(archive: Archive) -> None:
    for sought, code in (
        (lambda: find(archive, " ", run=run_of()), "config"),
        (lambda: find(archive, "necrosis"), "config"),
        (lambda: find(archive, "necrosis", slide="slide003", run=run_of()), "config"),
        (lambda: find(archive, "necrosis", run=run_of(name="other_1")), "not_indexed"),
        (lambda: find(archive, "necrosis", run=run_of(fingerprint="0" * 64)), "wrong_model"),
    ):  # fmt: skip
        with pytest.raises((ConfigError, ArchiveError)) as caught:
            sought()
        assert caught.value.code == code
