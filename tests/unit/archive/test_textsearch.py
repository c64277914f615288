"""Search by a model's vectors, by words, and by both."""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pathflip.archive import Archive
from pathflip.archive.captions import Caption, write_captions
from pathflip.archive.commit import Committer
from pathflip.archive.filters import Filter
from pathflip.archive.search import search, search_many, stored_vector
from pathflip.archive.textsearch import RRF, search_hybrid, search_text
from pathflip.errors import ArchiveError, ConfigError
from tests.unit.archive import cohort, models

SLIDES = range(12)
ALL = [f"slide{n:03d}" for n in SLIDES]


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    uri = tmp_path_factory.mktemp("words") / "a"
    cohort.build(uri)
    with Committer(uri) as committer:
        cohort.commit(committer, *SLIDES)
        models.add(committer, *SLIDES)
        models.tell(committer, *SLIDES)
        # Captions of a slide that is not ready must never be found.
        hidden = Caption(slide_id="slide099", text=models.caption(3) + " necrosis" * 9)
        write_captions(committer, [hidden], source="report")
    return Archive(uri)


def ids(table, column="slide_id"):
    return table[column].to_pylist()


def having(*words):
    return {f"slide{n:03d}" for n in SLIDES if any(word in models.caption(n) for word in words)}


@pytest.mark.parametrize("level", ["slide", "region"])
def test_a_model_s_vectors_equal_the_slow_reference(archive, level):
    query = np.random.default_rng(3).standard_normal(models.DIM)
    rows = [r for r in models.rows(*SLIDES).to_pylist() if r["kind"] == level]
    scores = {r["id"]: float(np.dot(r["vector"], query) / np.linalg.norm(query)) for r in rows}
    truth = sorted(scores, key=lambda key: (-scores[key], key))[:7]
    found = search(archive, query, model=models.MODEL, fingerprint="f" * 64, level=level, k=7)
    assert ids(found, "region_id" if level == "region" else "slide_id") == truth
    assert found["score"].to_pylist() == pytest.approx([scores[key] for key in truth], abs=1e-6)
    own = stored_vector(archive, truth[0], model=models.MODEL)
    assert np.dot(own, query) / np.linalg.norm(query) == pytest.approx(scores[truth[0]], abs=1e-6)
    many = search_many(archive, np.stack([query, -query]), model=models.MODEL, level=level, k=7)
    assert many[0].equals(found)
    assert many[1]["score"][0].as_py() == pytest.approx(-min(scores.values()), abs=1e-6)


def test_a_query_of_another_model_is_refused(archive):
    """By fingerprint, by size, by name; never results."""
    query = np.ones(models.DIM)
    with pytest.raises(ArchiveError) as error:
        search(archive, query, model=models.MODEL, fingerprint="a" * 64)
    assert error.value.code == "wrong_model"
    assert "a" * 12 in error.value.message
    assert "f" * 12 in error.value.message
    for wrong in (np.ones(models.DIM + 1), np.ones(cohort.DIM)):
        with pytest.raises(ArchiveError) as error:
            search(archive, wrong, model=models.MODEL)
        assert error.value.code == "wrong_model"
        assert f"has {models.DIM}" in error.value.message
    with pytest.raises(ArchiveError) as error:
        search(archive, query, model="mini_ffffffff")
    assert error.value.code == "not_indexed"
    assert "pathflip index" in error.value.hint
    with pytest.raises(ArchiveError) as error:
        search_hybrid(archive, "necrosis", query, model=models.MODEL, fingerprint="a" * 64)
    assert error.value.code == "wrong_model"
    with pytest.raises(ArchiveError) as error:
        stored_vector(archive, "slide001", model="mini_ffffffff")
    assert error.value.code == "not_indexed"


def test_words_find_the_slides_that_have_them(archive):
    found = search_text(archive, "keratin", k=100)
    assert set(ids(found)) == having("keratin")
    assert found["score"].to_pylist() == sorted(found["score"].to_pylist(), reverse=True)
    assert found["region_id"].null_count == found.num_rows
    both = search_text(archive, "keratin necrosis", k=100)
    assert set(ids(both)) == having("keratin", "necrosis")
    first = [slide for slide in ALL if slide in having("keratin") & having("necrosis")]
    assert set(ids(both)[: len(first)]) == set(first)
    assert ids(search_text(archive, "NECROSIS", k=2)) == ids(search_text(archive, "necrosis", k=2))
    assert search_text(archive, "unheard-of").num_rows == 0
    assert search_text(archive, "the").num_rows == 0


def test_words_with_conditions(archive):
    every = having("necrosis")
    test = search_text(archive, "necrosis", k=50, filters=[Filter.parse("split=test")])
    assert set(ids(test)) == {slide for slide in every if int(slide[5:]) % 2}
    one = search_text(archive, "necrosis", k=50, filters=[Filter.parse("patient_id=P1")])
    assert set(ids(one)) == {"slide002"} & every
    without = search_text(archive, "necrosis", k=50, exclude_patient="P0", exclude_slide="slide004")
    assert set(ids(without)) == every - {"slide000", "slide001", "slide004"}


def test_a_slide_with_several_captions_is_there_once(tmp_path):
    uri = tmp_path / "a"
    cohort.build(uri, 0, 1)
    with Committer(uri) as committer:
        models.tell(committer, 0, 1)
        models.tell(committer, 0, source="second")
    assert sorted(ids(search_text(Archive(uri), "sections"))) == ["slide000", "slide001"]


def test_hybrid_is_reciprocal_rank_fusion(archive):
    query = np.random.default_rng(4).standard_normal(models.DIM)
    vector = {s: r for r, s in enumerate(ids(
        search(archive, query, model=models.MODEL, level="slide", k=100)), start=1)}  # fmt: skip
    words = {s: r for r, s in enumerate(ids(search_text(archive, "mucin", k=100)), start=1)}
    truth = {s: 1 / (RRF + vector[s]) + (1 / (RRF + words[s]) if s in words else 0) for s in vector}
    found = search_hybrid(archive, "mucin", query, model=models.MODEL, level="slide", k=100)
    assert dict(zip(ids(found), found["score"].to_pylist(), strict=True)) == pytest.approx(truth)
    assert ids(found) == sorted(truth, key=lambda s: (-truth[s], s))
    regions = search_hybrid(archive, "mucin", query, model=models.MODEL, level="region", k=9)
    assert regions.num_rows == 9
    assert regions["score"].to_pylist() == sorted(regions["score"].to_pylist(), reverse=True)
    best = regions.to_pylist()[0]
    assert best["slide_id"] in words or math.isclose(best["score"], 1 / (RRF + 1))
    none = search_hybrid(archive, "unheard-of", query, model=models.MODEL, level="region", k=5)
    near = search(archive, query, model=models.MODEL, level="region", k=5)
    assert ids(none, "region_id") == ids(near, "region_id")


@settings(max_examples=120, deadline=None)
@given(text=st.text(max_size=80))
@example(text="keratin AND NOT necrosis")
@example(text='"necrosis" OR 1=1 --')
@example(text="slide_id:slide003")
@example(text="necrosis* +mucin -keratin")
@example(text="(((")
@example(text="necrosis^1000 fibrosis~2")
@example(text="'; DROP TABLE captions; --")
@example(text="\0")
def test_no_text_means_more_than_its_words(archive, text):
    """Nothing in a text widens a condition or reaches a slide that is not ready."""
    try:
        found = search_text(archive, text, k=100, filters=[Filter.parse("patient_id=P0")])
        free = search_text(archive, text, k=100)
    except ConfigError:
        assert not text.strip() or "\0" in text
        return
    assert set(ids(found)) <= {"slide000", "slide001"}
    assert set(ids(free)) <= set(ALL)


def test_operators_are_words_like_others(archive):
    plain = search_text(archive, "keratin necrosis", k=50)
    for text in ("keratin AND NOT necrosis", "+keratin -necrosis", 'keratin "necrosis"',
                 "text:keratin necrosis"):  # fmt: skip
        assert set(ids(search_text(archive, text, k=50))) == set(ids(plain))


def test_what_cannot_be_searched_for_words(archive, tmp_path):
    for text in ("", "  ", "x" * 10_001, "\ud800"):
        with pytest.raises(ConfigError):
            search_text(archive, text)
    with pytest.raises(ConfigError):
        search_text(archive, "necrosis", k=0)
    uri = tmp_path / "a"
    cohort.build(uri, 0)
    with pytest.raises(ArchiveError) as error:
        search_text(Archive(uri), "necrosis")
    assert (error.value.code, "--captions" in error.value.hint) == ("no_captions", True)
    with Committer(uri) as committer:
        write_captions(committer, [Caption(slide_id="slide000", text="necrosis")], source="s")
    with pytest.raises(ArchiveError) as error:
        search_text(Archive(uri), "necrosis")
    assert (error.value.code, "maintain" in error.value.hint) == ("not_indexed", True)
