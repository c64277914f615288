"""Room for annotations: of an author on a slide, a slide, an author, an archive."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pathflip.archive import annotation_room
from pathflip.archive.annotation_room import Room
from pathflip.archive.annotations import AnnotationStore
from pathflip.errors import ArchiveError
from tests.unit.archive.annotation_writer import GROUND, drawn

OTHER = replace(GROUND, slide_id="slide001", sha256="b" * 64)


def test_an_author_has_so_many_on_a_slide(uri, monkeypatch):
    monkeypatch.setattr(annotation_room, "AUTHOR_ON_SLIDE", Room(count=3, points=99))
    store = AnnotationStore(uri)
    store.put_all([drawn(), drawn()], ground=GROUND, by="ann")
    last = store.put(drawn(), ground=GROUND, by="ann")
    with pytest.raises(ArchiveError) as error:
        store.put(drawn(), ground=GROUND, by="ann")
    assert error.value.code == "too_many_annotations"
    store.put(replace(last, name="changed"), ground=GROUND, by="ann")  # one it has already
    store.put(drawn(author="bob"), ground=GROUND, by="bob")
    monkeypatch.setattr(annotation_room, "AUTHOR_ON_SLIDE", Room(count=3, points=7))
    with pytest.raises(ArchiveError):
        store.put_all([drawn(author="bob")], ground=GROUND, by="bob")


@pytest.mark.parametrize("what", ["count", "points"])
@pytest.mark.parametrize(
    ("room", "who", "other", "said"),
    [
        ("SLIDE", "bob", GROUND, "A slide holds at most {} of all authors"),
        ("AUTHOR", "ann", OTHER, "An archive holds at most {} of one author"),
        ("ARCHIVE", "bob", OTHER, "An archive holds at most {} of all authors"),
    ],
)
def test_a_slide_an_author_and_an_archive_have_so_many(
    uri, monkeypatch, room, who, other, said, what
):
    """Three squares fill each; the fourth is refused, and there is room again where one goes."""
    each = drawn().shape.points
    bound = Room(count=3, points=10**9) if what == "count" else Room(count=99, points=3 * each)
    monkeypatch.setattr(annotation_room, room, bound)
    store = AnnotationStore(uri)
    store.put_all([drawn(), drawn()], ground=GROUND, by="ann")
    last = store.put(drawn(), ground=GROUND, by="ann")
    more = replace(drawn(author=who), slide_id=other.slide_id)
    for save in (
        lambda: store.put(more, ground=other, by=who),
        lambda: store.put_all([more], ground=other, by=who),
    ):
        with pytest.raises(ArchiveError) as error:
            save()
        assert error.value.code == "too_many_annotations"
        assert error.value.message.startswith(said.format(f"{bound.count} annotations"))
    again = store.put(replace(last, name="changed"), ground=GROUND, by="ann")
    # Whoever is not full may draw where it is not full, and when something is removed.
    if room != "ARCHIVE":
        store.put(drawn(author="eve"), ground=OTHER if room == "SLIDE" else GROUND, by="eve")
        store.delete(again.annotation_id, ground=GROUND, by="ann")
        store.put(more, ground=other, by=who)
