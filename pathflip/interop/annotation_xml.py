"""Annotations in XML: files of ASAP, of Aperio ImageScope and of HALO, as GeoJSON features.

All three count level-0 pixels from the corner of the slide, not from that of its bounds.

* ASAP (root ``ASAP_Annotations``): annotations in groups, which may be nested. A group is a class.
  A spline is the polygon through its points, as it is for ASAP's own masks.
* ImageScope and HALO (root ``Annotations``): layers of regions. A layer is a class; one without a
  name goes by its description, or each region by its text. ``Type`` is a number in ImageScope's
  files (0 polygon, 1 rectangle, 2 ellipse, 3 arrow, 4 ruler) and a word in HALO's. Rectangles and
  ellipses are two opposite corners, or all of them. ``LineColor`` is blue, green, red from the
  highest byte. Regions with ``NegativeROA="1"`` are holes of their layer's other regions.

The files are of unknown origin: they are read as a stream, a document type (and with it every
entity) is refused, and depth, bytes, points and the length of a number are bounded.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO
from xml.parsers import expat

import numpy as np
from numpy.typing import NDArray

from pathflip.slides.outlines import OVERLAP_WORK, inside, overlaps

MAX_XML_BYTES = 256 << 20
"""Largest XML file read."""
MAX_XML_DEPTH = 32
MAX_XML_HOLES = 1_000_000
"""Holes of all areas of one XML file; one negative region may be a hole of several."""
MAX_XML_POINTS = 5_000_000
"""Points of one XML file."""
MAX_XML_OBJECTS = 100_000
"""Annotations, regions and groups of one XML file."""

_NUMBER = 40  # characters of a number
_MAX_TESTS, _MAX_TEST_WORK = 50_000, 1 << 32
"""Pairs of an area and a negative region that are compared in a file, and pairs of their points."""
_SAGITTA_PX = 0.25  # distance of an ellipse from the polygon that is made of it
_NO_AREA = "areas with fewer than three points"
_TOO_NEAR = "too many of its negative regions lie near too many areas"
_NO_HOLE = "negative regions outside the others of their layer"

Points = list[list[float]]
Start = Callable[[str, Mapping[str, str]], None]
End = Callable[[str], None]


class NotAnnotations(ValueError):
    """A file that is no annotations in a form known, with the reason."""


def read_xml(file: BinaryIO) -> tuple[str, list[dict[str, Any]], Counter[str]]:
    """Read the objects of an XML file.

    Args:
        file: The file, at its beginning.

    Returns:
        Name of the format, GeoJSON features in level-0 px, and how many objects were left out, by
        reason.

    Raises:
        NotAnnotations: It is none of the formats, is malformed, or is larger than the bounds.
    """
    reader = _Reader()
    _parse(file, reader)
    return reader.result()


def root_is_known(name: str) -> bool:
    """Return whether a root element is that of a format read here."""
    return name in ("ASAP_Annotations", "Annotations")


class _Reader:
    """Dispatches elements to the reader that the root element asks for."""

    def __init__(self) -> None:
        self._of: _Asap | _Layers | None = None

    def start(self, name: str, attributes: Mapping[str, str]) -> None:
        if self._of is None:
            if not root_is_known(name):
                raise NotAnnotations(
                    f"its root element is {name[:60]!r}, not ASAP_Annotations or Annotations"
                )
            self._of = _Asap() if name == "ASAP_Annotations" else _Layers()
        else:
            self._of.start(name, attributes)

    def end(self, name: str) -> None:
        if self._of is not None:
            self._of.end(name)

    def result(self) -> tuple[str, list[dict[str, Any]], Counter[str]]:
        assert self._of is not None
        return self._of.result()


def _parse(file: BinaryIO, reader: _Reader) -> None:
    """Feed a file to a reader, piece by piece; nothing outside the file is ever opened."""
    parser = expat.ParserCreate()
    depth = 0

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > MAX_XML_DEPTH:
            raise NotAnnotations(f"its elements are nested more than {MAX_XML_DEPTH} deep")
        reader.start(name, attributes)

    def end(name: str) -> None:
        nonlocal depth
        depth -= 1
        reader.end(name)

    def doctype(*_: Any) -> None:
        raise NotAnnotations("it declares a document type, which files of annotations do not have")

    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.StartDoctypeDeclHandler = doctype
    parser.buffer_text = True
    read = 0
    try:
        while piece := file.read(1 << 20):
            read += len(piece)
            if read > MAX_XML_BYTES:
                raise NotAnnotations(f"it is larger than {MAX_XML_BYTES >> 20} MiB")
            parser.Parse(piece, False)
        parser.Parse(b"", True)
    except expat.ExpatError as error:
        raise NotAnnotations(f"it is no well-formed XML ({error})") from error


@dataclass(kw_only=True)
class _Budget:
    """Counts points and objects of a file against its bounds."""

    points: int = 0
    objects: int = 0
    holes: int = 0
    tests: int = 0
    work: int = 0

    def point(self, attributes: Mapping[str, str]) -> list[float]:
        self.points += 1
        if self.points > MAX_XML_POINTS:
            raise NotAnnotations(f"it has more than {MAX_XML_POINTS:,} points")
        return [_number(attributes, "X"), _number(attributes, "Y")]

    def one_more(self) -> None:
        self.objects += 1
        if self.objects > MAX_XML_OBJECTS:
            raise NotAnnotations(f"it has more than {MAX_XML_OBJECTS:,} annotations")

    def one_more_test(self, points: int, others: int) -> None:
        self.tests += 1
        if self.tests > _MAX_TESTS:
            raise NotAnnotations(_TOO_NEAR)
        if points * others <= OVERLAP_WORK:  # else they are not compared
            self.spend(points * others)

    def spend(self, pairs: int) -> None:
        self.work += pairs
        if self.work > _MAX_TEST_WORK:
            raise NotAnnotations(_TOO_NEAR)

    def one_more_hole(self) -> None:
        self.holes += 1
        if self.holes > MAX_XML_HOLES:
            raise NotAnnotations(f"its areas have more than {MAX_XML_HOLES:,} holes")


# -- ASAP -----------------------------------------------------------------------------------------

_ASAP_AREAS = ("Polygon", "Spline", "Rectangle")


@dataclass(kw_only=True)
class _AsapItem:
    name: str
    kind: str
    group: str
    colour: str
    points: list[tuple[float, list[float]]] = field(default_factory=list)


class _Asap:
    """Reader of ASAP's elements."""

    def __init__(self) -> None:
        self._budget = _Budget()
        self._items: list[_AsapItem] = []
        self._groups: dict[str, tuple[str, str]] = {}
        self._open = False

    def start(self, name: str, attributes: Mapping[str, str]) -> None:
        if name == "Annotation":
            self._budget.one_more()
            self._open = True
            self._items.append(
                _AsapItem(
                    name=attributes.get("Name", ""),
                    kind=attributes.get("Type", "Polygon"),
                    group=attributes.get("PartOfGroup", "None"),
                    colour=attributes.get("Color", ""),
                )
            )
        elif name == "Coordinate":
            if not self._open:
                raise NotAnnotations("a Coordinate of it is in no Annotation")
            points = self._items[-1].points
            at = self._budget.point(attributes)
            order = _number(attributes, "Order") if "Order" in attributes else float(len(points))
            points.append((order, at))
        elif name == "Group":
            self._budget.one_more()
            self._groups[attributes.get("Name", "")] = (
                attributes.get("PartOfGroup", "None"),
                attributes.get("Color", ""),
            )

    def end(self, name: str) -> None:
        if name == "Annotation":
            self._open = False

    def result(self) -> tuple[str, list[dict[str, Any]], Counter[str]]:
        features, left_out = list[dict[str, Any]](), Counter[str]()
        for item in self._items:
            geometry = self._geometry(item)
            if geometry is None:
                left_out[_NO_AREA] += 1
                continue
            own = self._groups.get(item.group, ("", ""))[1]
            features.append(
                _feature(
                    geometry,
                    name=item.name,
                    classification=self._class(item.group),
                    colour=_hex(own) or _hex(item.colour),
                )
            )
        return "ASAP XML", features, left_out

    def _geometry(self, item: _AsapItem) -> dict[str, Any] | None:
        points = [at for _, at in sorted(item.points, key=lambda one: one[0])]
        if item.kind in _ASAP_AREAS:
            ring = _ring(points)
            return None if ring is None else {"type": "Polygon", "coordinates": [ring]}
        if item.kind in ("Dot", "PointSet", "Measurement") and not points:
            return None
        if item.kind == "Dot":
            return {"type": "Point", "coordinates": points[0]}
        if item.kind == "PointSet":
            return {"type": "MultiPoint", "coordinates": points}
        if item.kind == "Measurement":
            return None if len(points) < 2 else {"type": "LineString", "coordinates": points}
        raise NotAnnotations(f"an annotation of it has the unknown type {item.kind[:60]!r}")

    def _class(self, group: str) -> str:
        """Return the names of a group and of those around it, the outermost first."""
        names: list[str] = []
        while group not in ("", "None"):
            if group in names or len(names) > MAX_XML_DEPTH:
                raise NotAnnotations(f"its group {group[:60]!r} is part of itself")
            names.append(group)
            group = self._groups.get(group, ("None", ""))[0]
        return ": ".join(reversed(names))


# -- ImageScope and HALO --------------------------------------------------------------------------

_KINDS = {
    "0": "polygon", "1": "rectangle", "2": "ellipse", "3": "line", "4": "line",
    "polygon": "polygon", "rectangle": "rectangle", "ellipse": "ellipse", "ruler": "line",
    "pin": "point",
}  # fmt: skip


@dataclass(kw_only=True)
class _Region:
    kind: str
    text: str
    negative: bool
    points: Points = field(default_factory=list)


@dataclass(kw_only=True)
class _Layer:
    name: str
    colour: str
    regions: list[_Region] = field(default_factory=list)


class _Layers:
    """Reader of ImageScope's and HALO's elements."""

    def __init__(self) -> None:
        self._budget = _Budget()
        self._layers: list[_Layer] = []
        self._region: _Region | None = None
        self._in_layer = False
        self._words = False

    def start(self, name: str, attributes: Mapping[str, str]) -> None:
        if name == "Annotation":
            self._budget.one_more()
            self._in_layer = True
            self._layers.append(
                _Layer(name=attributes.get("Name", ""), colour=attributes.get("LineColor", ""))
            )
        elif name == "Region":
            self._budget.one_more()
            self._start_region(attributes)
        elif name in ("V", "Vertex"):
            if self._region is None:
                raise NotAnnotations("a vertex of it is in no Region")
            self._region.points.append(self._budget.point(attributes))
        elif name == "Attribute" and self._in_layer and self._region is None:
            layer = self._layers[-1]
            if attributes.get("Name") == "Description" and not layer.name.strip():
                layer.name = attributes.get("Value", "")

    def _start_region(self, attributes: Mapping[str, str]) -> None:
        if not self._in_layer or self._region is not None:
            raise NotAnnotations("a Region of it is in no Annotation")
        kind = attributes.get("Type", "0").strip()
        self._words |= not kind.isdigit()
        if kind.lower() not in _KINDS:
            raise NotAnnotations(f"a Region of it has the unknown type {kind[:60]!r}")
        self._region = _Region(
            kind=_KINDS[kind.lower()],
            text=attributes.get("Text", ""),
            negative=attributes.get("NegativeROA", "0").strip().lower() in ("1", "true"),
        )
        self._layers[-1].regions.append(self._region)

    def end(self, name: str) -> None:
        if name == "Region":
            self._region = None
        elif name == "Annotation":
            self._in_layer = False

    def result(self) -> tuple[str, list[dict[str, Any]], Counter[str]]:
        features, left_out = list[dict[str, Any]](), Counter[str]()
        for layer in self._layers:
            kept = [(region, _shape(region)) for region in layer.regions]
            left_out[_NO_AREA] += sum(shape is None for _, shape in kept)
            holes = [
                shape["coordinates"][0]
                for region, shape in kept
                if region.negative and shape is not None and shape["type"] == "Polygon"
            ]
            negative = _Holes(holes, self._budget)
            for region, shape in kept:
                if region.negative or shape is None:
                    continue
                if shape["type"] == "Polygon":
                    negative.cut(shape["coordinates"])
                features.append(
                    _feature(
                        shape,
                        name=region.text,
                        classification=layer.name.strip() or region.text,
                        colour=_bgr(layer.colour),
                    )
                )
            left_out[_NO_HOLE] += int((~negative.used).sum())
        return "HALO XML" if self._words else "Aperio XML", features, +left_out


def _shape(region: _Region) -> dict[str, Any] | None:
    """Return a region's geometry; None if it has too few points for its kind."""
    points = region.points
    if region.kind == "point":
        return {"type": "Point", "coordinates": points[0]} if points else None
    if region.kind == "line":
        return {"type": "LineString", "coordinates": points} if len(points) > 1 else None
    if region.kind == "rectangle" and len(points) == 2:
        (x1, y1), (x2, y2) = points
        points = [[x1, y1], [x2, y1], [x2, y2], [x1, y2]]
    elif region.kind == "ellipse" and len(points) > 1:
        points = _ellipse(points)
    ring = _ring(points)
    return None if ring is None else {"type": "Polygon", "coordinates": [ring]}


class _Holes:
    """Holes of a layer, and which of them an area had.

    Args:
        rings: The rings of the negative regions.
        budget: Bounds of the file.
    """

    def __init__(self, rings: Sequence[Points], budget: _Budget) -> None:
        self._rings = [np.array(ring, np.float64) for ring in rings]
        self._points = rings
        self._low = np.array([ring.min(axis=0) for ring in self._rings]).reshape(-1, 2)
        self._high = np.array([ring.max(axis=0) for ring in self._rings]).reshape(-1, 2)
        self._budget = budget
        self.used = np.zeros(len(rings), np.bool_)

    def cut(self, rings: list[Points]) -> None:
        """Add those that overlap a polygon to its rings."""
        outer = np.array(rings[0], np.float64)
        low, high = outer.min(axis=0), outer.max(axis=0)
        near = ((self._low < high) & (self._high > low)).all(axis=1)
        for number in np.flatnonzero(near):
            hole = self._rings[number]
            if not self._begins_in(outer, hole):
                self._budget.one_more_test(len(outer), len(hole))
                if not overlaps(outer, hole):
                    continue
            self._budget.one_more_hole()
            self.used[number] = True
            rings.append(self._points[number])

    def _begins_in(self, outer: NDArray[np.float64], hole: NDArray[np.float64]) -> bool:
        """Return whether the first point of a hole is in an area, as it mostly is."""
        self._budget.spend(len(outer))
        return bool(inside(hole[:1], [(outer, [])]).all())


def _ellipse(corners: Points) -> Points:
    """Return the ellipse within the bounds of some corners, as a polygon; none if it is flat."""
    low, high = np.min(corners, axis=0), np.max(corners, axis=0)
    across, down = (high - low) / 2
    if min(across, down) <= 0:
        return []
    ring = ellipse_ring((low + high) / 2, np.array([across, 0.0]), np.array([0.0, down]))
    return ring.tolist()  # type: ignore[no-any-return]


def ellipse_ring(
    middle: NDArray[np.float64], one: NDArray[np.float64], other: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return an ellipse as a polygon that is nowhere further than a quarter of a pixel from it.

    Args:
        middle: Its middle (x, y), level-0 px.
        one: Half of an axis, as a vector.
        other: Half of the other axis.

    Returns:
        (x, y) [k, 2], 16 to 1,024 points on it.
    """
    longest = max(float(np.hypot(*one)), float(np.hypot(*other)), 1e-9)
    turn = math.acos(max(-1.0, 1 - _SAGITTA_PX / longest))
    count = min(1024, max(16, math.ceil(math.pi / turn)))
    angles = (np.arange(count) * (2 * math.pi / count))[:, None]
    return np.asarray(middle + np.cos(angles) * one + np.sin(angles) * other, np.float64)


# -- pieces ---------------------------------------------------------------------------------------


def _number(attributes: Mapping[str, str], name: str) -> float:
    text = attributes.get(name, "").strip()
    try:
        if len(text) > _NUMBER:
            raise ValueError
        number = float(text.replace(",", "."))  # a decimal comma, where the locale wrote one
    except ValueError:
        raise NotAnnotations(f"it has {name}={text[:_NUMBER]!r}, which is no number") from None
    if not math.isfinite(number):
        raise NotAnnotations(f"it has {name}={text!r}, which is no position on a slide")
    return number


def _ring(points: Points) -> Points | None:
    """Return a ring without repeated points at its end; None if it has no area to hold."""
    while len(points) > 1 and points[0] == points[-1]:
        points = points[:-1]
    if len({tuple(point) for point in points}) < 3:
        return None
    return [*points, list(points[0])]


def _feature(
    geometry: dict[str, Any], *, name: str, classification: str, colour: list[int] | None
) -> dict[str, Any]:
    properties: dict[str, Any] = {"objectType": "annotation", "name": name}
    if classification:
        properties["classification"] = {"name": classification}
    if colour is not None:
        properties["color"] = colour
    return {"type": "Feature", "geometry": geometry, "properties": properties}


def _hex(text: str) -> list[int] | None:
    """Return the red, green and blue of ``#rrggbb``; None of anything else."""
    text = text.strip()
    if len(text) != 7 or not text.startswith("#"):
        return None
    try:
        return list(bytes.fromhex(text[1:]))
    except ValueError:
        return None


def _bgr(text: str) -> list[int] | None:
    """Return the red, green and blue of a Windows colour number; None of anything else."""
    text = text.strip()
    if not text.removeprefix("-").isdecimal() or len(text) > 12:
        return None
    number = int(text)
    return [number & 0xFF, number >> 8 & 0xFF, number >> 16 & 0xFF]
