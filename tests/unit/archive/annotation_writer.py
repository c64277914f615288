"""A writer of annotations in a process of its own.

``python -m tests.unit.archive.annotation_writer URI AUTHOR COUNT`` saves COUNT annotations of its
own, and after each adds one to the number in the name of the annotation that all writers share.
Prints the id of each save that was acknowledged.
"""

from __future__ import annotations

import sys
import uuid
from dataclasses import replace

from pathflip.archive.annotations import AnnotationStore, Ground
from pathflip.errors import ArchiveError
from pathflip.interop.annotations import Annotation, read_shape

GROUND = Ground(slide_id="slide000", sha256="a" * 64, width=4000, height=3000)
SHARED = str(uuid.UUID(int=1))


def drawn(
    annotation_id: str | None = None,
    *,
    author: str = "ann",
    name: str = "",
    x: float = 10,
    ground: Ground = GROUND,
    revision: int = 0,
) -> Annotation:
    """Return a triangle."""
    ring = [[x, 10], [x + 50, 10], [x, 60], [x, 10]]
    shape = read_shape(
        {"type": "Polygon", "coordinates": [ring]}, width=ground.width, height=ground.height
    )
    return Annotation(
        annotation_id=annotation_id or str(uuid.uuid4()), slide_id=ground.slide_id, author=author,
        name=name, classification="Tumor: invasive", colour="#2ea043", shape=shape,
        revision=revision,
    )  # fmt: skip


def add_one(store: AnnotationStore, by: str) -> None:
    """Add one to the shared number, again where another writer was first."""
    while True:
        found = {one.annotation_id: one for one in store.on_slide(GROUND).annotations}
        old = found.get(SHARED)
        new = drawn(SHARED, author=by, name=f"1 {by}")
        if old is not None:
            new = replace(old, name=f"{int(old.name.split()[0]) + 1} {by}")
        try:
            store.put(new, ground=GROUND, by=by, anyone=True)
            return
        except ArchiveError as error:
            if error.code not in ("stale", "busy"):
                raise


def save(store: AnnotationStore, by: str, name: str) -> str:
    """Save a new annotation, again where it was refused because others wrote all the time."""
    new = drawn(author=by, name=name)
    while True:
        try:
            return store.put(new, ground=GROUND, by=by).annotation_id
        except ArchiveError as error:
            if error.code != "busy":
                raise


def main() -> None:
    """Run as the module says."""
    uri, by, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
    store = AnnotationStore(uri)
    for number in range(count):
        print(save(store, by, f"{by} {number}"), flush=True)
        add_one(store, by)
        print(SHARED, flush=True)


if __name__ == "__main__":
    main()
