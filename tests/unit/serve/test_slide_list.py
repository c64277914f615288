"""The list of slides: filtered as a plain loop over the rows would, cut into pages, redacted."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import pytest

from serve.slide_list import SlideList
from tests.unit.serve.service_fixture import SECRETS, SLIDES, slide_id

STATUSES = ("ready", "ready", "ready", "quarantined", "empty")
SPLITS = ("train", "Validation", "test", None)


def made(n: int) -> dict[str, Any]:
    rng = random.Random(n)
    status = rng.choice(STATUSES)
    return {
        "slide_id": f"{rng.choice(('Liver', 'colon', 'LUNG'))}_{n:05d}-{rng.randrange(16**8):08x}",
        "status": status,
        "reason": None if status == "ready" else "unreadable",
        "message": None if status == "ready" else f"/data/JANE DOE {n}.svs: cannot be read.",
        "uri": f"/data/JANE DOE {n}.svs",
        "aliases": [f"/copies/{n} DOE.svs"],
        "labels": json.dumps({"grade": str(n % 3), "site": rng.choice("ab")}),
        "split": rng.choice(SPLITS),
        "width": n,
    }


ROWS = [made(n) for n in range(700)]
LISTED = SlideList(random.Random(0).sample(ROWS, len(ROWS)))


def expected(q: str, label: str, split: str, status: str) -> list[str]:
    """The ids by one plain loop."""
    name, _, value = label.partition("=")
    return sorted(
        row["slide_id"]
        for row in ROWS
        if q.lower() in row["slide_id"].lower()
        and (not label or json.loads(row["labels"]).get(name) == value)
        and (not split or (row["split"] or "").lower()[:3] == split.lower()[:3])
        and status in ("all", row["status"])
    )


@pytest.mark.parametrize(
    ("q", "label", "split", "status"),
    itertools.product(
        ("", "lung", "LIVER_000", "zzz"),
        ("", "grade=2", "site=a", "grade=9", "none=1"),
        ("", "val", "train", "fold9"),
        ("ready", "quarantined", "empty", "all"),
    ),
)
def test_filters(q: str, label: str, split: str, status: str) -> None:
    whole = expected(q, label, split, status)
    asked = {"q": q, "label": label, "split": split, "status": status}
    page = LISTED.page(limit=1000, **asked)
    assert [row["slide_id"] for row in page.rows] == whole
    assert (page.total, page.following) == (len(whole), None)


def test_pages_by_id_and_by_number() -> None:
    whole = expected("lung", "", "", "ready")
    seen, after = [], ""
    while True:
        page = LISTED.page(limit=7, after=after, q="lung")
        seen += [row["slide_id"] for row in page.rows]
        assert page.total == len(whole)
        if page.following is None:
            break
        after = page.following
    assert seen == whole
    for offset in (0, 5, len(whole) - 1, len(whole), 10_000):
        rows = LISTED.page(limit=7, offset=offset, q="lung").rows
        assert [row["slide_id"] for row in rows] == whole[offset : offset + 7]
    rows = LISTED.page(limit=3, after=whole[4], offset=2, q="lung").rows
    assert [row["slide_id"] for row in rows] == whole[7:10]


def test_what_is_shown_of_a_slide_that_is_not_ready() -> None:
    for row in LISTED.page(limit=1000, status="all").rows:
        assert not {"uri", "aliases", "labels"} & set(row)
        if row["status"] == "ready":
            assert not {"reason", "message"} & set(row)
        else:
            assert row["reason"] == "unreadable"
            assert row["message"] == "the slide: cannot be read."


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("/d/J DOE.svs: no levels", "the slide: no levels"),
        ("J DOE.svs has no levels, J DOE.svs", "the slide has no levels, the slide"),
        ("/d/J DOE.svs/a/DOE.dcm is cut short", "the slide is cut short"),
        ("the same as /c/other DOE.svs.", "the same as the slide"),
        ("Can't open /d/e f/J.mrxs/a.dat: gone", "Can't open the slide: gone"),
        (None, None),
    ],
)
def test_names_of_files_are_taken_out(message: str | None, shown: str | None) -> None:
    row = made(0) | {
        "uri": "/d/J DOE.svs",
        "aliases": ["/c/other DOE.svs", "/d/e f/J.mrxs"],
        "status": "empty",
    }
    (listed,) = SlideList([row | {"message": message}]).rows.values()
    assert listed["message"] == shown


# -- by HTTP --------------------------------------------------------------------------------------


def test_the_route_filters_and_redacts(ask) -> None:
    def asked(**params: Any) -> dict[str, Any]:
        answer = ask("GET", "/v1/slides", params=params)
        assert answer.status_code == 200
        for secret in (*SECRETS, "JANE", "4711"):
            assert secret not in answer.text
        return answer.json()

    ready = [slide_id(n) for n in range(SLIDES)]
    found = asked()
    assert ([row["slide_id"] for row in found["data"]], found["total"]) == (ready, SLIDES)
    assert {row["status"] for row in found["data"]} == {"ready"}
    assert [row["slide_id"] for row in asked(q="DE00", offset=1, limit=2)["data"]] == ready[1:3]
    odd = ready[1::2]
    assert [row["slide_id"] for row in asked(split="testing")["data"]] == odd
    assert [row["slide_id"] for row in asked(label="grade=2")["data"]] == odd
    assert asked(label="grade=7") == {"data": [], "next": None, "total": 0}
    (broken,) = asked(status="quarantined")["data"]
    assert broken["slide_id"] == "broken"
    assert (broken["reason"], broken["message"]) == ("unreadable", "the slide cannot be read")
    assert asked(status="all")["total"] == SLIDES + 1
    for params in ({"status": "lost"}, {"offset": -1}, {"label": "grade"}, {"limit": 0}):
        assert ask("GET", "/v1/slides", params=params).status_code == 422
    assert ask("GET", "/v1/slides/broken").status_code == 404
