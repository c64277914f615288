"""Annotations: objects that people draw on slides, read from and written as QuPath's GeoJSON.

Everything here is of one feature or a list of them, in memory; where annotations are kept is
:mod:`pathflip.archive.annotations`. What is read came from a client or a file of unknown origin, so
all of it is checked and bounded: the type of the geometry, the number of its points, that every
coordinate is a finite number on the slide or near it, and the length of every text.

Coordinates are level-0 pixels. Files that QuPath writes count from the corner of the slide's bounds
instead, where it has some (:mod:`pathflip.interop.qupath`); ``offset`` is that corner.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, NoReturn

from pathflip.errors import ConfigError

MAX_POINTS = 100_000
"""Points of one annotation, and of all that are read at once."""
MAX_FEATURES = 2_000
"""Annotations that are read at once."""
MAX_NAME, MAX_CLASS = 500, 200
"""Characters of an annotation's name, and of its class."""
FILE_ENDINGS = (
    ".geojson", ".json", ".zip", ".xml", ".annotations", ".parquet", ".geoparquet", ".dcm",
)  # fmt: skip
"""Endings of the names of files that :mod:`pathflip.interop.annotation_files` reads."""
OBJECT_TYPES = ("annotation", "detection", "tile", "cell", "tmaCore")
NO_OFFSET = (0.0, 0.0)

_PLACES = 2  # a hundredth of a level-0 pixel, as in pathflip.interop.qupath
_MARGIN_PX, _MARGIN = 1000.0, 0.1
"""Reach of an object beyond the slide, level-0 px or share of its longer side."""
_IDS = uuid.UUID("0d3f1c0e-6e0f-5d5c-9d0a-4c3a2f7e8b11")
_COLOUR = re.compile(r"#[0-9a-f]{6}")

Position = list[float]
Offset = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A checked geometry.

    Attributes:
        geometry: GeoJSON geometry, level-0 px, rings closed.
        x0, y0, x1, y1: Its bounds.
        points: Number of its points.
    """

    geometry: dict[str, Any]
    x0: float
    y0: float
    x1: float
    y1: float
    points: int


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """An object drawn on a slide.

    Attributes:
        annotation_id: UUID, lower case.
        slide_id: The slide.
        author: Name of the token of the client who drew it, or the name given on import.
        name: Its name, or "".
        classification: Its class, or ""; nested classes are joined by ": ".
        colour: ``#rrggbb``, or None for the viewer's own.
        object_type: One of :data:`OBJECT_TYPES`.
        shape: Its geometry.
        revision: 0 of one that is not stored yet, then the number of times it was saved.
        created, updated: Times of its first and last save.
        sha256: Digest of the slide it was drawn on.
    """

    annotation_id: str
    slide_id: str
    author: str
    shape: Shape
    name: str = ""
    classification: str = ""
    colour: str | None = None
    object_type: str = "annotation"
    revision: int = 0
    created: datetime | None = None
    updated: datetime | None = None
    sha256: str | None = None

    def drawn_as(self, other: Annotation) -> bool:
        """Return whether two annotations show the same, whenever they were saved."""
        return self._shown() == other._shown()

    def _shown(self) -> tuple[Any, ...]:
        looks = (self.name, self.classification, self.colour, self.object_type)
        return (self.annotation_id, self.slide_id, self.sha256, *looks, self.shape)


# -- reading --------------------------------------------------------------------------------------


def read_features(document: Any, *, most: int = MAX_FEATURES) -> list[Any]:
    """Return the features of a FeatureCollection, a list of features or a single one, unread.

    Raises:
        ConfigError: It is none of these, or has too many features (``geojson``).
    """
    if isinstance(document, dict) and document.get("type") == "FeatureCollection":
        document = document.get("features")
    elif isinstance(document, dict):
        document = [document]
    if not isinstance(document, list):
        _refuse("This is no FeatureCollection and no list of features.")
    if len(document) > most:
        _refuse(f"There are {len(document):,} features; at most {most:,} are read at once.")
    return document


def read_collection(
    document: Any,
    *,
    slide_id: str,
    author: str,
    width: int | None,
    height: int | None,
    offset: Offset = NO_OFFSET,
    most_features: int = MAX_FEATURES,
) -> list[Annotation]:
    """Read the annotations of a FeatureCollection.

    A feature without an id of its own gets one that follows from what it shows, so that reading the
    same file again makes the same annotations.

    Args:
        document: See :func:`read_features`.
        slide_id: The slide they are on.
        author: Their author.
        width: Level-0 width of the slide; None where it is not known.
        height: Level-0 height.
        offset: Corner that the coordinates count from, level-0 px.
        most_features: Most features there may be.

    Raises:
        ConfigError: A feature cannot be used (``geojson``); the message names it by its number.
    """
    found: dict[str, Annotation] = {}
    seen: Counter[str] = Counter()
    left = MAX_POINTS * max(1, most_features // MAX_FEATURES)
    for number, feature in enumerate(read_features(document, most=most_features), start=1):
        try:
            one = read_feature(
                feature, slide_id=slide_id, author=author, width=width, height=height,
                offset=offset, most=min(left, MAX_POINTS),
            )  # fmt: skip
        except ConfigError as error:
            _refuse(f"Feature {number}: {error.message}", error.hint)
        left -= one.shape.points
        key = one.annotation_id
        if not key:
            looks = json.dumps([slide_id, author, *map(str, one._shown())])
            seen[looks] += 1
            key = str(uuid.uuid5(_IDS, f"{looks}/{seen[looks]}"))
            one = replace(one, annotation_id=key)
        if key in found:
            _refuse(f"Feature {number}: the id {key} is there twice.")
        found[key] = one
    return list(found.values())


def read_feature(
    feature: Any,
    *,
    slide_id: str,
    author: str,
    width: int | None,
    height: int | None,
    annotation_id: str | None = None,
    offset: Offset = NO_OFFSET,
    most: int = MAX_POINTS,
) -> Annotation:
    """Read one feature.

    What QuPath writes and is not kept (measurements, planes, a nucleus) is passed over.

    Args:
        feature: GeoJSON feature, of whatever type it may be.
        slide_id: See :func:`read_collection`.
        author: See there.
        width: See there.
        height: See there.
        annotation_id: Its id; by default that of the feature, "" if it has none that is a UUID.
        offset: See there.
        most: Most points it may have.

    Raises:
        ConfigError: It cannot be used (``geojson``).
    """
    if not isinstance(feature, dict) or feature.get("type") != "Feature":
        _refuse("It is no object of type Feature.")
    properties = feature.get("properties")
    if properties is None:
        properties = {}
    if not isinstance(properties, dict):
        _refuse("Its properties are no object.")
    kind = properties.get("objectType")
    label, colour = _class_of(properties.get("classification"))
    revision = properties.get("revision", 0)
    if isinstance(revision, bool) or not isinstance(revision, int) or not 0 <= revision < 2**53:
        _refuse("Its revision is no whole number.")
    given = _uuid_of(feature.get("id")) if annotation_id is None else annotation_id
    return Annotation(
        annotation_id=given,
        slide_id=slide_id,
        author=author,
        name=_text(properties.get("name"), what="name", most=MAX_NAME),
        classification=label,
        colour=_colour_of(properties.get("color")) or colour,
        object_type=kind if isinstance(kind, str) and kind in OBJECT_TYPES else OBJECT_TYPES[0],
        shape=read_shape(
            feature.get("geometry"), width=width, height=height, offset=offset, most=most
        ),
        revision=revision,
    )


def annotation_uuid(text: str) -> str:
    """Return the id of an annotation as it is stored.

    Raises:
        ConfigError: It is no UUID (``annotation_id``).
    """
    if not (found := _uuid_of(text)):
        raise ConfigError("The id of an annotation is a UUID.", code="annotation_id")
    return found


def read_shape(
    geometry: Any,
    *,
    width: int | None,
    height: int | None,
    offset: Offset = NO_OFFSET,
    most: int = MAX_POINTS,
) -> Shape:
    """Check a geometry; see :func:`read_feature`.

    Rings that are not closed are closed, third coordinates are dropped, and coordinates are rounded
    to a hundredth of a pixel.

    Raises:
        ConfigError: It cannot be used (``geojson``).
    """
    if not isinstance(geometry, dict):
        _refuse("It has no geometry.")
    kind, coordinates = geometry.get("type"), geometry.get("coordinates")
    if kind == "GeometryCollection":
        _refuse(
            "It is a GeometryCollection: a set of shapes of several kinds.",
            "Split it into its parts in QuPath and export them as objects of their own.",
        )
    if not isinstance(kind, str) or kind not in _DEPTHS:
        _refuse("The type of its geometry is unknown.", f"Types: {', '.join(_DEPTHS)}.")
    reader = _Reader(width=width, height=height, offset=offset, most=most)
    depth, fewest, closed = _DEPTHS[kind]
    read = reader.read(coordinates, depth=depth, fewest=fewest, closed=closed)
    if not reader.points:
        _refuse("Its geometry is empty.")
    return Shape(
        geometry={"type": kind, "coordinates": read},
        x0=reader.low[0], y0=reader.low[1], x1=reader.high[0], y1=reader.high[1],
        points=reader.points,
    )  # fmt: skip


_DEPTHS = {
    "Point": (0, 1, False),
    "MultiPoint": (1, 1, False),
    "LineString": (1, 2, False),
    "MultiLineString": (2, 2, False),
    "Polygon": (2, 4, True),
    "MultiPolygon": (3, 4, True),
}
"""{type of a geometry: (lists around a position, fewest positions of the innermost, whether that is
closed)}."""


class _Reader:
    """Reads coordinates, counting points and noting their bounds."""

    def __init__(self, *, width: int | None, height: int | None, offset: Offset, most: int) -> None:
        longest = max(width or 0, height or 0)
        margin = max(_MARGIN_PX, _MARGIN * longest)
        sides = (width, height)
        self.least = -margin
        self.limits = tuple(2.0**40 if side is None else side + margin for side in sides)
        self.sides, self.offset, self.most = sides, offset, most
        self.points = 0
        self.low, self.high = [math.inf, math.inf], [-math.inf, -math.inf]

    def read(self, value: Any, *, depth: int, fewest: int, closed: bool) -> Any:
        """Read positions that lie within so many lists."""
        if depth == 0:
            return self._position(value)
        if not isinstance(value, list):
            _refuse("Its coordinates are not nested as its type wants.")
        if depth > 1:
            if not value:
                _refuse("A part of its geometry is empty.")
            return [self.read(v, depth=depth - 1, fewest=fewest, closed=closed) for v in value]
        line = [self._position(position) for position in value]
        if closed and len(line) > 1 and line[0] != line[-1]:
            line.append(list(line[0]))
        if len(line) < fewest:
            _refuse("A line or ring of it has too few points.")
        return line

    def _position(self, value: Any) -> Position:
        if not isinstance(value, list) or not 2 <= len(value) <= 4:
            _refuse("A position of it is no pair of numbers.")
        self.points += 1
        if self.points > self.most:
            _refuse(
                f"There are more than {MAX_POINTS:,} points.",
                "Simplify the shape in QuPath: Objects > Annotations > Simplify shape.",
            )
        found = []
        for axis in (0, 1):
            number = value[axis]
            if isinstance(number, bool) or not isinstance(number, int | float):
                _refuse("A position of it is no pair of numbers.")
            try:
                at = round(float(number) + self.offset[axis], _PLACES)
            except OverflowError:
                at = math.inf
            if not self.least <= at <= self.limits[axis]:
                size = " x ".join(f"{side:,}" for side in self.sides if side is not None)
                _refuse(
                    "It lies beyond the slide" + (f" of {size} px." if size else "."),
                    "Coordinates are pixels of the slide at full resolution.",
                )
            at += 0.0  # no negative zero
            found.append(at)
            self.low[axis] = min(self.low[axis], at)
            self.high[axis] = max(self.high[axis], at)
        return found


def _class_of(value: Any) -> tuple[str, str | None]:
    """Return name and colour of a class as QuPath writes it, now or formerly."""
    if isinstance(value, str) and value.lstrip().startswith("{") and len(value) < 4 * MAX_CLASS:
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    if value is None or isinstance(value, str):
        return _text(value, what="class", most=MAX_CLASS), None
    if not isinstance(value, dict):
        _refuse("Its classification is no object.")
    name, names = value.get("name"), value.get("names")
    if not name and isinstance(names, list):
        if len(names) > MAX_CLASS or not all(isinstance(part, str) for part in names):
            _refuse("Its class has names that are no texts.")
        name = ": ".join(names)
    colour = _colour_of(value.get("color")) or _colour_of(value.get("colorRGB"))
    return _text(name, what="class", most=MAX_CLASS), colour


def _colour_of(value: Any) -> str | None:
    """Return a colour as ``#rrggbb``: a list of red, green, blue, or QuPath's packed number."""
    if value is None or isinstance(value, bool):
        return None
    if isinstance(value, int) and abs(value) < 2**32:
        return f"#{value & 0xFFFFFF:06x}"
    if isinstance(value, str) and _COLOUR.fullmatch(value.lower()):
        return value.lower()
    if isinstance(value, list) and not value:
        return None
    if not isinstance(value, list) or len(value) not in (3, 4):
        _refuse("Its colour is no list of red, green and blue.")
    parts = value[:3]
    if any(isinstance(p, bool) or not isinstance(p, int) or not 0 <= p <= 255 for p in parts):
        _refuse("Its colour is no list of red, green and blue.")
    return "#" + "".join(f"{part:02x}" for part in parts)


def _text(value: Any, *, what: str, most: int) -> str:
    """Return a text in one form of its letters, without space around it."""
    if value is None:
        return ""
    if not isinstance(value, str):
        _refuse(f"Its {what} is no text.")
    if len(value) > 4 * most:
        _refuse(f"Its {what} has more than {most} characters.")
    text = unicodedata.normalize("NFC", value).strip()
    if len(text) > most:
        _refuse(f"Its {what} has more than {most} characters.")
    # Surrogates cannot be stored; others would write over a terminal that shows them.
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in text):
        _refuse(f"Its {what} has control characters.")
    return text


def _uuid_of(value: Any) -> str:
    """Return a UUID in its usual form; "" if the value is none."""
    if not isinstance(value, str) or len(value) > 64:
        return ""
    try:
        return str(uuid.UUID(value))
    except ValueError:
        return ""


def own_id(annotation_id: str, author: str, slide: str) -> str:
    """Return the id of an author's own copy of an annotation, always the same.

    Args:
        annotation_id: The annotation, which is somebody else's or of another slide.
        author: The author.
        slide: Digest or id of the slide that the copy is on.
    """
    return str(uuid.uuid5(_IDS, f"{author}/{slide}/{annotation_id}"))


def _refuse(message: str, hint: str = "") -> NoReturn:
    raise ConfigError(message, hint=hint, code="geojson")


# -- writing --------------------------------------------------------------------------------------


def feature_of(one: Annotation, *, offset: Offset = NO_OFFSET) -> dict[str, Any]:
    """Return an annotation as a QuPath feature, with its author, revision and times.

    Args:
        one: The annotation.
        offset: Corner that the coordinates shall count from, level-0 px.
    """
    properties: dict[str, Any] = {"objectType": one.object_type}
    if one.name:
        properties["name"] = one.name
    colour = None if one.colour is None else list(bytes.fromhex(one.colour[1:]))
    if one.classification:
        properties["classification"] = {"name": one.classification}
        if colour is not None:
            properties["classification"]["color"] = colour
    elif colour is not None:
        properties["color"] = colour
    properties |= {"author": one.author, "revision": one.revision}
    times = (("created", one.created), ("updated", one.updated))
    properties |= {key: at.isoformat(timespec="milliseconds") for key, at in times if at}
    return {
        "type": "Feature",
        "id": one.annotation_id,
        "geometry": moved(one.shape.geometry, by=(-offset[0], -offset[1])),
        "properties": properties,
    }


def collection_of(
    annotations: Iterable[Annotation], *, offset: Offset = NO_OFFSET
) -> dict[str, Any]:
    """Return annotations as a FeatureCollection."""
    features = [feature_of(one, offset=offset) for one in annotations]
    return {"type": "FeatureCollection", "features": features}


def moved(geometry: Mapping[str, Any], *, by: Offset) -> dict[str, Any]:
    """Return a checked geometry moved by (x, y) px."""
    if by == NO_OFFSET:
        return dict(geometry)

    def move(value: Sequence[Any]) -> list[Any]:
        if value and isinstance(value[0], list):
            return [move(part) for part in value]
        return [round(at + step, _PLACES) + 0.0 for at, step in zip(value, by, strict=True)]

    return {"type": geometry["type"], "coordinates": move(geometry["coordinates"])}
