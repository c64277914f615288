"""Captions of slides: the first of an archive, and statements that a model made of them."""

import json

import lance

from pathflip.archive import Archive
from pathflip.archive.captions import Caption, write_captions
from pathflip.archive.commit import Committer
from pathflip.archive.model_vectors import indexed_slides
from pathflip.archive.settings import meta_rows
from pathflip.archive.verify import verify
from tests.unit.archive import cohort, models


def test_an_archive_of_before_opens_and_becomes_new_when_written(tmp_path):
    uri = tmp_path / "a"
    cohort.build(uri, 0)
    with Committer(uri) as committer:
        committer.upsert("meta", meta_rows({"schema_version": 1}))
    archive = Archive(uri)
    assert (archive.captions().num_rows, archive.models()) == (0, {})
    assert verify(uri).ok
    with Committer(uri) as committer:
        assert indexed_slides(committer.archive, "none") == set()
        assert write_captions(committer, [], source="s") == {"new": 0, "changed": 0, "unchanged": 0}
        assert not (uri / "captions.lance").exists()
        models.tell(committer, 0)
    meta = {
        r["key"]: r["value"] for r in lance.dataset(str(uri / "meta.lance")).to_table().to_pylist()
    }
    assert json.loads(meta["schema_version"]) == 2
    archive.refresh()
    assert archive.captions().num_rows == 1


def test_statements_stay_as_long_as_the_text(uri):
    with Committer(uri) as committer:
        given = Caption(slide_id="slide001", text="One. Two.", statements=["one", "two"])
        write_captions(committer, [given], source="llm")
        plain = Caption(slide_id="slide001", text="One. Two.")
        assert write_captions(committer, [plain], source="llm")["unchanged"] == 1
        other = Caption(slide_id="slide001", text="Three.")
        assert write_captions(committer, [other], source="llm")["changed"] == 1
    (row,) = Archive(uri).captions("llm").to_pylist()
    assert (row["statements"], row["model"], row["sentences"]) == ([], None, ["Three."])
