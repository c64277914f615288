"""The list of slides: all rows of a state of the archive in memory, filtered and cut into pages.

A page of 20,000 slides takes a few ms, most of it the comparison of ids with the words that are
looked for: rows are made once for each state, and labels have an index.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from pathflip.splits import canonical_split, requested_split

STATUSES = ("ready", "quarantined", "empty")
"""States of a slide; only ready ones can be opened."""
HIDDEN = ("uri", "aliases", "labels")
"""Columns that the list is made of and never shows."""


class Page(NamedTuple):
    """A page of the list.

    Attributes:
        rows: Slides, by id.
        following: Id after which the next page begins; None on the last.
        total: Number of slides on all pages.
    """

    rows: list[dict[str, Any]]
    following: str | None
    total: int


class SlideList:
    """Slides of one state, by id.

    Args:
        rows: Columns that are shown of each slide, with ``status``, ``reason`` and ``message``,
            and :data:`HIDDEN`, which are taken out.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self.rows: dict[str, dict[str, Any]] = {}
        self._folded: list[str] = []
        self._labelled: dict[str, set[str]] = {}
        self._of_split: dict[str | None, set[str]] = {}
        for row in sorted(rows, key=lambda row: str(row["slide_id"])):
            slide = str(row["slide_id"])
            shown = {name: value for name, value in row.items() if name not in HIDDEN}
            if row["status"] == "ready":
                del shown["reason"], shown["message"]
            else:
                shown["message"] = _without_names(row)
            self.rows[slide] = shown
            self._folded.append(slide.casefold())
            self._of_split.setdefault(canonical_split(row.get("split")), set()).add(slide)
            for name, value in json.loads(row.get("labels") or "{}").items():
                self._labelled.setdefault(f"{name}={value}", set()).add(slide)
        self._ids = list(self.rows)
        self._of_status: dict[str, list[str]] = {status: [] for status in STATUSES}
        for slide, row in self.rows.items():
            self._of_status[row["status"]].append(slide)
        self._of_status["all"] = self._ids

    def page(
        self,
        *,
        limit: int,
        after: str = "",
        offset: int = 0,
        q: str = "",
        label: str = "",
        split: str = "",
        status: str = "ready",
    ) -> Page:
        """Filter the slides and cut out a page.

        Args:
            limit: Most slides of the page.
            after: Id after which it begins.
            offset: Number of slides, after that, that are left out.
            q: Part of the slide's id, in any case.
            label: ``name=value``, which the slide's labels have.
            split: Its split, under any of the split's names.
            status: One of :data:`STATUSES`, or ``all``.
        """
        found = self._filtered(q.casefold(), label, split, status)
        start = bisect_right(found, after) + offset if after else offset
        page = found[start : start + limit]
        more = page[-1] if page and start + limit < len(found) else None
        return Page([self.rows[slide] for slide in page], more, len(found))

    def _filtered(self, q: str, label: str, split: str, status: str) -> Sequence[str]:
        found: Sequence[str] = self._of_status[status]
        if q:
            # Ids and folded ids are in one order.
            of = self.rows
            found = [
                slide
                for slide, folded in zip(self._ids, self._folded, strict=True)
                if q in folded and status in ("all", of[slide]["status"])
            ]
        if label:
            labelled = self._labelled.get(label, set())
            found = [slide for slide in found if slide in labelled]
        if split:
            own = self._of_split.get(requested_split(split), set())
            found = [slide for slide in found if slide in own]
        return found


def _without_names(row: Mapping[str, Any]) -> str | None:
    """Message about a slide without the names of its files, which may name people."""
    text: str | None = row.get("message")
    if not text:
        return None
    uris = [uri for uri in (row.get("uri"), *(row.get("aliases") or ())) if uri]
    names = {name for uri in uris for name in (uri, PurePosixPath(uri).name) if name}
    # Of what lies beside a slide, as MRXS has it, the folder and the name say as much.
    names |= {f"{folder}/" for uri in uris if len(folder := uri.rpartition("/")[0]) > 1}
    for name in sorted(names, key=len, reverse=True):
        text = re.sub(re.escape(name) + r"[^\s'\",;:]*", "the slide", text)
    return text
