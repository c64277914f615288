"""Room for annotations: how many an archive holds, and how many points, of whom.

Whoever may draw could fill the archive's disk, and the memory of whoever lists a slide's
annotations. So they are bounded four times: those of one author on a slide, of all on a slide, of
one author in the archive, and of all in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pathflip.errors import ArchiveError
from pathflip.interop.annotations import Annotation


@dataclass(frozen=True, kw_only=True)
class Room:
    """Most that annotations may be together.

    Attributes:
        count: Annotations.
        points: Points of them; each takes 10 to 30 bytes.
    """

    count: int
    points: int


AUTHOR_ON_SLIDE = Room(count=10_000, points=1_000_000)
"""Room of one author on one slide."""
SLIDE = Room(count=50_000, points=2_000_000)
"""Room of all authors on one slide: whoever may see everybody's is sent all of them at once."""
AUTHOR = Room(count=200_000, points=10_000_000)
"""Room of one author in an archive."""
ARCHIVE = Room(count=1_000_000, points=50_000_000)
"""Room of all authors in an archive: about 1 GB."""


def check_room(
    there: pa.Table | None, *, more: Sequence[Annotation], less: Sequence[Annotation]
) -> None:
    """Refuse annotations for which there is no room.

    What takes no more room than before is not refused: else nobody could mend what is too much.

    Args:
        there: Annotations of the archive: author, slide_id, points; None for none.
        more: Those to be saved.
        less: Those that they replace.

    Raises:
        ArchiveError: ``too_many_annotations``.
    """
    slides = sorted({one.slide_id for one in more})
    authors = sorted({one.author for one in more})
    if not more:
        return
    every: list[tuple[Room, dict[str, str]]] = [(ARCHIVE, {})]
    every += [(SLIDE, {"slide_id": slide}) for slide in slides]
    for author in authors:
        every.append((AUTHOR, {"author": author}))
        every += [(AUTHOR_ON_SLIDE, {"author": author, "slide_id": slide}) for slide in slides]
    for room, of in reversed(every):
        _check(room, of, there=there, more=more, less=less)


def _check(
    room: Room,
    of: Mapping[str, str],
    *,
    there: pa.Table | None,
    more: Sequence[Annotation],
    less: Sequence[Annotation],
) -> None:
    """Refuse ``more`` in place of ``less`` if a slide's, an author's, or all have no room."""
    count = points = 0
    if there is not None:
        for name, value in of.items():
            there = there.filter(pc.equal(there[name], value))
        count, points = len(there), pc.sum(there["points"]).as_py() or 0
    added = added_points = 0
    for sign, these in ((1, more), (-1, less)):
        own = [one for one in these if all(getattr(one, k) == v for k, v in of.items())]
        added += sign * len(own)
        added_points += sign * sum(one.shape.points for one in own)
    if (added > 0 and count + added > room.count) or (
        added_points > 0 and points + added_points > room.points
    ):
        where = "A slide" if "slide_id" in of else "An archive"
        whose = "one author" if "author" in of else "all authors"
        raise ArchiveError(
            f"{where} holds at most {room.count:,} annotations of {whose}, and {room.points:,} "
            "points of them.",
            hint="Remove some of them, or simplify shapes.",
            code="too_many_annotations",
        )
