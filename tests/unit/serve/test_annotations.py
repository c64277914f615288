"""Annotations over HTTP: GeoJSON in and out, authors apart, hostile bodies, silent logs."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import uuid

import pytest

import serve.annotations
from pathflip.archive import annotation_room
from pathflip.archive.annotation_room import Room
from pathflip.archive.commit import Committer
from pathflip.interop.annotation_files import read_objects
from pathflip.interop.annotations import MAX_FEATURES, MAX_POINTS
from serve.annotations import Annotations
from serve.audit import AuditLog
from tests.unit.serve.service_fixture import PX, REGIONS, SIDE, slide_id

WIDTH, HEIGHT = REGIONS * SIDE * PX, SIDE * PX
SECRET = "Patient Doe, seen again"
SLIDE = slide_id(1)
RING = [[10, 10], [90, 10], [90, 90], [10, 90], [10, 10]]
HOLE = [[20, 20], [20, 40], [40, 40], [40, 20], [20, 20]]


def feature(**properties):
    known = {
        "objectType": "annotation",
        "name": SECRET,
        "classification": {"name": "Tumor", "color": [200, 0, 0]},
    }
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [RING, HOLE]},
        "properties": known | properties,
    }


def place(slide=SLIDE, key=None):
    return f"/v1/slides/{slide}/annotations" + (f"/{key}" if key else "")


def new(ask, who="ann", slide=SLIDE, **properties):
    key = str(uuid.uuid4())
    answer = ask("PUT", place(slide, key), who=who, json=feature(**properties))
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.fixture
def clean(ask):
    """No annotation on the slide, before and after."""

    def empty():
        for one in ask("GET", place()).json()["features"]:
            assert ask("DELETE", place(key=one["id"])).status_code == 204

    empty()
    yield
    empty()


def listed(ask, who):
    answer = ask("GET", place(), who=who)
    assert answer.status_code == 200
    found = answer.json()
    assert found["type"] == "FeatureCollection"
    assert found["outdated"] == 0
    return {one["id"]: one for one in found["features"]}


@pytest.mark.usefixtures("clean")
class TestOneSlide:
    def test_what_is_saved_is_listed_as_it_was_and_reads_as_qupath(self, ask, tmp_path):
        saved = new(ask)
        assert saved["geometry"] == feature()["geometry"]
        assert saved["properties"]["author"] == "ann"
        assert saved["properties"]["revision"] == 1
        assert saved["properties"].items() >= feature()["properties"].items()
        assert list(listed(ask, "ann").values()) == [saved]
        file = tmp_path / "a.geojson"
        file.write_text(ask("GET", place(), who="ann").text)
        [read] = read_objects(file)  # an independent reader of the same files
        [(outer, [hole])] = read.polygons
        assert (outer.tolist(), hole.tolist()) == (RING[:-1], HOLE[:-1])
        assert (read.name, read.classification) == (SECRET, "Tumor")

    def test_the_author_is_the_token_whatever_the_body_says(self, ask):
        saved = new(ask, who="ann", author="bob")
        assert saved["properties"]["author"] == "ann"

    def test_a_save_over_another_revision_is_stale(self, ask):
        saved = new(ask)
        path = place(key=saved["id"])
        changed = feature(revision=1, name="b")
        assert ask("PUT", path, who="ann", json=changed).json()["properties"]["revision"] == 2
        again = ask("PUT", path, who="ann", json=changed)  # its answer was lost
        assert (again.status_code, again.json()["properties"]["revision"]) == (200, 2)
        answer = ask("PUT", path, who="ann", json=feature(revision=1, name="c"))
        assert (answer.status_code, answer.json()["code"]) == (409, "stale")
        assert SECRET not in answer.text

    def test_clients_see_and_change_their_own_alone_but_for_admins(self, ask):
        own, other = new(ask, "ann"), new(ask, "bob")
        assert set(listed(ask, "ann")) == {own["id"]}
        assert set(listed(ask, "reader")) == set()
        assert set(listed(ask, "all")) == {own["id"], other["id"]}
        for revision in (0, 1):
            answer = ask("PUT", place(key=own["id"]), who="bob", json=feature(revision=revision))
            assert (answer.status_code, answer.json()["code"]) == (404, "unknown_annotation")
        gone = ask("DELETE", place(key=own["id"]), who="bob")
        never = ask("DELETE", place(key=uuid.uuid4()), who="bob")
        assert gone.status_code == never.status_code == 404
        assert gone.json()["message"] == never.json()["message"]
        checked = ask("PUT", place(key=own["id"]), who="all", json=feature(revision=1, name="x"))
        assert checked.json()["properties"]["author"] == "ann"
        assert ask("DELETE", place(key=own["id"]), who="all").status_code == 204
        assert set(listed(ask, "all")) == {other["id"]}

    def test_a_collection_is_imported_whole_or_not_at_all(self, ask):
        good = [feature(name=f"number {n}") | {"id": str(uuid.uuid4())} for n in range(5)]
        path = place(key="import")
        for who, new_ones in (("ann", 5), ("ann", 0), ("bob", 5), ("bob", 0)):
            answer = ask(
                "POST", path, who=who, json={"type": "FeatureCollection", "features": good}
            )
            assert answer.json() == {
                "imported": 5, "new": new_ones, "changed": 0, "unchanged": 5 - new_ones,
            }  # fmt: skip
        assert set(listed(ask, "ann")) == {one["id"] for one in good}
        assert len(listed(ask, "all")) == 10
        bad = [*good, feature() | {"geometry": {"type": "Polygon", "coordinates": []}}]
        answer = ask("POST", path, who="reader", json={"features": bad})
        assert answer.status_code == 403
        answer = ask("POST", path, who="ann", json={"type": "FeatureCollection", "features": bad})
        assert (answer.status_code, answer.json()["code"]) == (422, "geojson")
        assert "Feature 6" in answer.json()["message"]
        assert len(listed(ask, "all")) == 10

    def test_saving_works_while_an_ingest_holds_the_archive(self, ask, world):
        with Committer(world.archive) as committer:
            saved = new(ask)
            committer.tidy()
            assert set(listed(ask, "ann")) == {saved["id"]}

    def test_large_ones_are_taken(self, ask):
        line = {"type": "LineString", "coordinates": [[n % 300, n % 100] for n in range(50_000)]}
        key = str(uuid.uuid4())
        body = feature() | {"geometry": line}
        answer = ask("PUT", place(key=key), who="ann", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["geometry"] == line

    def test_logs_and_audit_lines_have_ids_and_no_text(self, serving, tmp_path, caplog):
        folder = tmp_path / "audit"
        audit = AuditLog(folder)
        ask = serving(audit=audit)
        caplog.set_level(logging.CRITICAL, logger="httpx")  # the client's, of this process
        with caplog.at_level(logging.DEBUG):
            saved = new(ask)
            ask("GET", place(), who="ann")
            ask("PUT", place(key=saved["id"]), who="bob", json=feature())
            ask("PUT", place(key=f"{SECRET}"), who="ann", json=feature())
            ask("DELETE", place(key=saved["id"]), who="ann")
            ask("POST", place(key="import"), who="ann",
                json={"type": "FeatureCollection", "features": [feature()]})  # fmt: skip
        audit.close()
        lines = [json.loads(line) for line in next(folder.glob("*.jsonl")).open()][1:]
        assert [(line["who"], line["outcome"]) for line in lines] == [
            ("ann", 200), ("ann", 200), ("bob", 404), ("ann", 422), ("ann", 204), ("ann", 200),
        ]  # fmt: skip
        assert [line.get("annotations") for line in lines] == [
            [saved["id"]], [saved["id"]], [saved["id"]], None, [saved["id"]], None,
        ]  # fmt: skip
        assert lines[-1]["imported"] == 1
        assert all(line.get("slides", [SLIDE]) == [SLIDE] for line in lines)
        said = caplog.text + json.dumps(lines)
        assert "Doe" not in said
        assert "Tumor" not in said


def test_an_unknown_slide_has_none(ask):
    for slide in ("none", "broken"):  # quarantined ones are not told from others
        for method, path, body in (
            ("GET", place(slide), None),
            ("PUT", place(slide, uuid.uuid4()), feature()),
            ("DELETE", place(slide, uuid.uuid4()), None),
            ("POST", place(slide, "import"), {"type": "FeatureCollection", "features": []}),
        ):
            answer = ask(method, path, **({} if body is None else {"json": body}))
            assert (answer.status_code, answer.json()["code"]) == (404, "unknown_slide")


HOSTILE = {
    "no object": [1, 2],
    "no feature": {"type": "FeatureCollection"},
    "no geometry": feature() | {"geometry": None},
    "a geometry of text": feature() | {"geometry": "Polygon"},
    "a collection of shapes": feature()
    | {"geometry": {"type": "GeometryCollection", "geometries": [feature()["geometry"]]}},
    "an unknown type": feature() | {"geometry": {"type": "Circle", "coordinates": [1, 2]}},
    "a type that is a list": feature() | {"geometry": {"type": ["Polygon"], "coordinates": []}},
    "nested too deeply": feature()
    | {"geometry": {"type": "Polygon", "coordinates": [[[[1, 2]], [[3, 4]]]]}},
    "not nested": feature() | {"geometry": {"type": "Polygon", "coordinates": RING}},
    "text for numbers": feature()
    | {"geometry": {"type": "Point", "coordinates": ["1", "2"]}},
    "booleans for numbers": feature()
    | {"geometry": {"type": "Point", "coordinates": [True, False]}},
    "nulls for numbers": feature() | {"geometry": {"type": "Point", "coordinates": [None, 1]}},
    "a huge number": feature()
    | {"geometry": {"type": "Point", "coordinates": [10**400, 1]}},
    "beyond the slide": feature()
    | {"geometry": {"type": "Point", "coordinates": [WIDTH + 100_000, 1]}},
    "far left of the slide": feature() | {"geometry": {"type": "Point", "coordinates": [-1e6, 1]}},
    "two points a ring": feature()
    | {"geometry": {"type": "Polygon", "coordinates": [[[1, 1], [2, 2], [1, 1]]]}},
    "too many points": feature()
    | {"geometry": {"type": "MultiPoint", "coordinates": [[1, 1]] * (MAX_POINTS + 1)}},
    "a long name": feature(name="x" * 501),
    "a name that is a list": feature(name=["x"]),
    "a name with an escape": feature(name="a\x1b[2Jb"),
    "half a letter": feature(name="\ud800"),
    "a long class": feature(classification={"name": "x" * 201}),
    "a class of numbers": feature(classification={"names": [1]}),
    "a colour of text": feature(classification={"name": "x", "color": "javascript:alert(1)"}),
    "a colour too bright": feature(color=[0, 0, 256]),
    "properties of a list": feature() | {"properties": [1]},
    "a revision of text": feature(revision="1"),
    "a revision too large": feature(revision=2**60),
    "a revision below zero": feature(revision=-1),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_feature_is_refused_in_a_sentence(ask, case):
    body = json.dumps(HOSTILE[case]).encode()
    headers = {"Content-Type": "application/json"}
    answer = ask("PUT", place(key=uuid.uuid4()), who="ann", content=body, headers=headers)
    assert answer.status_code in (400, 422), answer.text
    assert answer.json()["detail"].endswith(".")
    assert len(answer.text) < 1000
    assert "javascript" not in answer.text
    whole = json.dumps({"type": "FeatureCollection", "features": [HOSTILE[case]]}).encode()
    answer = ask("POST", place(key="import"), who="ann", content=whole, headers=headers)
    assert answer.status_code in (400, 422), answer.text


@pytest.mark.parametrize("key", ["1", "x" * 36, "..%2f..%2fslide002", "0" * 64, "import%00"])
def test_an_id_that_is_no_uuid_is_refused(ask, key):
    for method, options in (("PUT", {"json": feature()}), ("DELETE", {})):
        answer = ask(method, place(key=key), who="ann", **options)
        assert answer.status_code in (404, 422)


def test_too_many_features_and_names_are_refused(ask):
    many = {"type": "FeatureCollection", "features": [feature()] * (MAX_FEATURES + 1)}
    answer = ask("POST", place(key="import"), who="ann", json=many)
    assert (answer.status_code, answer.json()["code"]) == (422, "geojson")
    names = b'{"type":"Feature","x":[' + b",".join([b"0"] * 500_000) + b"]}"
    headers = {"Content-Type": "application/json"}
    answer = ask("PUT", place(key=uuid.uuid4()), who="ann", content=names, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (413, "too_large")
    deep = b'{"type":"Feature","geometry":{"type":"Polygon","coordinates":' + b"[" * 100_000
    answer = ask("PUT", place(key=uuid.uuid4()), who="ann", content=deep, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (400, "bad_json")


def test_a_web_page_of_another_site_cannot_save(ask):
    answer = ask(
        "PUT", place(key=uuid.uuid4()), who="ann", content=json.dumps(feature()),
        headers={"Content-Type": "text/plain"},
    )  # fmt: skip
    assert (answer.status_code, answer.json()["code"]) == (415, "media_type")


def test_a_full_archive_is_said_so(ask, monkeypatch):
    monkeypatch.setattr(annotation_room, "ARCHIVE", Room(count=0, points=0))
    answer = ask("PUT", place(key=str(uuid.uuid4())), who="ann", json=feature())
    assert (answer.status_code, answer.json()["code"]) == (422, "too_many_annotations")
    assert "Remove some of them" in answer.json()["message"]


@pytest.mark.usefixtures("clean")
def test_who_saves_all_the_time_is_slowed_down_alone(ask, parts, monkeypatch):
    """Old versions stay on disk for a day, so bounds of what is there are not enough."""
    monkeypatch.setattr(parts.annotations, "_written", {})
    monkeypatch.setattr(serve.annotations, "BYTES_AN_HOUR", 40 << 10)
    key, saved = str(uuid.uuid4()), []
    for revision in range(6):
        answer = ask("PUT", place(key=key), who="ann", json=feature(revision=revision))
        saved.append(answer.status_code)
    assert saved == [200, 200, 200, 429, 429, 429]
    assert int(answer.headers["Retry-After"]) >= 1
    assert "within the last hour" in answer.json()["message"]
    refused = [
        ask("DELETE", place(key=key), who="ann").status_code,
        ask("POST", place(key="import"), who="ann", json=[feature()]).status_code,
    ]
    assert refused == [429, 429]
    assert set(listed(ask, "ann")) == {key}
    other = new(ask, "bob")
    monkeypatch.setattr(serve.annotations, "BYTES_AN_HOUR", 1 << 50)  # in this hour it has ebbed
    assert ask("DELETE", place(key=key), who="ann").status_code == 204
    assert ask("DELETE", place(key=other["id"]), who="bob").status_code == 204


def test_one_client_has_two_threads_at_a_time(world, loop, monkeypatch):
    part, go, began = Annotations(world.archive), threading.Event(), []
    on_slide = part._store.on_slide

    def slow(ground, *, author):
        began.append(author)
        assert go.wait(60)
        return on_slide(ground, author=author)

    monkeypatch.setattr(part._store, "on_slide", slow)

    async def ask():
        asked = [
            asyncio.create_task(part.features(SLIDE, author=author, client=author))
            for author in ["greedy"] * 6 + ["modest"]
        ]
        async with asyncio.timeout(60):
            while len(began) < 3:
                await asyncio.sleep(0.01)
        assert sorted(began) == ["greedy", "greedy", "modest"]
        go.set()
        await asyncio.gather(*asked)

    loop.run_until_complete(ask())
    assert len(began) == 7
