"""Regions of DICOM structured reports (SR), as they stand in the report.

A report is a tree of content items (PS3.3 C.17.3). Its regions are the items of spatial
coordinates: ``SCOORD`` are pixels of an image, which an item below them names, ``SCOORD3D`` are mm
in a frame of reference. What a region shows is said beside it, in the containers around: in reports
of measurements (PS3.16 TID 1500, as highdicom and the Imaging Data Commons write them) a group has
a finding, which becomes the class, and a tracking identifier, which becomes the name. Other reports
are read alike; a region without a finding goes by the concept of its own item. Measurements are
passed over.

Segments of segmentations are no coordinates: they are counted, as are ellipsoids.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathflip.interop.annotation_xml import NotAnnotations

_FINDINGS = ("121071", "276214006")  # a finding, its category: DCM and SCT have no code in common
_TRACKING = "112039"
_PLAIN = ("111030", "121231", "")  # image region and volume surface, which say nothing of a class
_SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.4"
_POINTS = {"POINT": 1, "CIRCLE": 2, "ELLIPSE": 4}
_AT_LEAST = {"MULTIPOINT": 1, "POLYLINE": 2, "POLYGON": 4}


@dataclass(frozen=True, kw_only=True)
class _Context:
    """Describes the regions of a container.

    Attributes:
        name: Tracking identifier, or "".
        finding: Meaning of the finding, or "".
    """

    name: str = ""
    finding: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class ReportRegion:
    """A region of a report.

    Attributes:
        kind: ``POINT``, ``MULTIPOINT``, ``POLYLINE``, ``POLYGON`` or ``ELLIPSE`` (ends of one axis,
            then those of the other).
        points: Its coordinates [k, 2] in px of an image or [k, 3] in mm.
        images: UIDs of the images that pixels are of; empty for mm.
        origin: ``VOLUME`` for pixels of the whole image, ``FRAME`` for those of a frame of it.
        frame: UID of the frame of reference of mm; "" for pixels.
        name, classification: See the module; "" where the report has none.
    """

    kind: str
    points: NDArray[np.float64]
    images: tuple[str, ...] = ()
    origin: str = "FRAME"
    frame: str = ""
    name: str = ""
    classification: str = ""


def report_regions(dataset: Any, *, most: int) -> tuple[list[ReportRegion], Counter[str]]:
    """Return the regions of a report in its order, and how many were left out, by reason.

    Args:
        dataset: The report, as pydicom reads it.
        most: Regions at most.

    Raises:
        NotAnnotations: It has no regions, too many, or one that contradicts itself.
    """
    regions, left_out = list[ReportRegion](), Counter[str]()
    for item, context in _items(dataset, _context(dataset, _Context())):
        kind = _text(item, "ValueType")
        if kind == "IMAGE":
            references = item.get("ReferencedSOPSequence") or ()
            classes = {str(one.get("ReferencedSOPClassUID", "")) for one in references}
            left_out["areas that are segments of another file"] += _SEGMENTATION in classes
        if kind not in ("SCOORD", "SCOORD3D"):
            continue
        if _text(item, "GraphicType") == "ELLIPSOID":
            left_out["ellipsoids"] += 1
            continue
        regions.append(_region(item, context, dataset))
        if len(regions) > most:
            raise NotAnnotations(f"it has more than {most:,} regions")
    if not regions:
        only = " but segments of other files" if left_out.total() else ""
        raise NotAnnotations(f"it is a structured report that has no regions{only}")
    return regions, +left_out


def _items(parent: Any, context: _Context) -> Iterator[tuple[Any, _Context]]:
    """Yield the items below one, each with what its containers say of it."""
    for item in parent.get("ContentSequence") or ():
        inner = _context(item, context) if _text(item, "ValueType") == "CONTAINER" else context
        yield item, inner
        yield from _items(item, inner)


def _context(container: Any, around: _Context) -> _Context:
    """Return what a container says of its regions, else what is said around it."""
    found: dict[str, str] = {}
    for item in container.get("ContentSequence") or ():
        code, _ = _code(item, "ConceptNameCodeSequence")
        if code == _TRACKING:
            found.setdefault(code, _text(item, "TextValue"))
        elif code in _FINDINGS:
            found.setdefault(code, _code(item, "ConceptCodeSequence")[1])
    finding = next((found[code] for code in _FINDINGS if found.get(code)), "")
    around = replace(around, finding=finding) if finding else around
    return replace(around, name=found[_TRACKING]) if found.get(_TRACKING) else around


def _region(item: Any, context: _Context, report: Any) -> ReportRegion:
    held = 2 if _text(item, "ValueType") == "SCOORD" else 3
    kind, points = _shape(_text(item, "GraphicType"), _points(item, held))
    code, meaning = _code(item, "ConceptNameCodeSequence")
    classification = context.finding or ("" if code in _PLAIN else meaning)
    region = ReportRegion(
        kind=kind, points=points, name=context.name, classification=classification
    )
    if held == 3:
        return replace(region, frame=_text(item, "ReferencedFrameOfReferenceUID"))
    return replace(
        region,
        images=_images(item, report),
        origin=_text(item, "PixelOriginInterpretation") or "FRAME",  # PS3.3 C.18.6
    )


def _images(item: Any, report: Any) -> tuple[str, ...]:
    """Return the UIDs of the images that a region was selected from, by value or by reference."""
    found = []
    for below in item.get("ContentSequence") or ():
        place = below.get("ReferencedContentItemIdentifier")
        if place is not None:
            # Numbers from the root, which is 1, each among its parent's items.
            numbers = [int(number) for number in np.atleast_1d(place)]
            below = report
            for number in numbers[1:]:
                if number < 1:
                    raise NotAnnotations("a region of it names an item that is not there")
                below = (below.get("ContentSequence") or ())[number - 1]
        if _text(below, "ValueType") == "IMAGE":
            references = below.get("ReferencedSOPSequence") or ()
            found += [str(one.get("ReferencedSOPInstanceUID", "")) for one in references]
    return tuple(found)


def _points(item: Any, held: int) -> NDArray[np.float64]:
    data = item.get("GraphicData")
    cut_off = NotAnnotations("the coordinates of a region are cut off")
    if isinstance(data, bytes):  # of more than 64 KiB, which explicit files have as UN
        if len(data) % 4:
            raise cut_off
        data = np.frombuffer(data, "<f4")
    values = np.atleast_1d(np.array([] if data is None else data, np.float64))
    if len(values) % held or not len(values):
        raise cut_off
    if not (np.abs(values) < 1e9).all():  # nor is what is no number
        raise NotAnnotations("a region has a coordinate that is no position on a slide")
    return values.reshape(-1, held)


def _shape(kind: str, points: NDArray[np.float64]) -> tuple[str, NDArray[np.float64]]:
    """Return a region's kind and points, circles as ellipses and closed lines as polygons."""
    if kind not in _POINTS and kind not in _AT_LEAST:
        raise NotAnnotations(f"a region of it is of the unknown kind {kind[:20]!r}")
    if len(points) != _POINTS.get(kind, len(points)) or len(points) < _AT_LEAST.get(kind, 1):
        raise NotAnnotations(f"a region of kind {kind} of it has {len(points)} points")
    if kind == "CIRCLE":  # its centre and a point on it, in an image
        centre, radius = points[0], float(np.hypot(*(points[1] - points[0])))
        steps = np.array([[-1, 0], [1, 0], [0, -1], [0, 1]])
        return "ELLIPSE", centre + radius * steps
    if kind == "POLYLINE" and len(points) > 3 and (points[0] == points[-1]).all():
        return "POLYGON", points
    return kind, points


def _text(item: Any, keyword: str) -> str:
    value = item.get(keyword)
    return "" if value is None else str(value)


def _code(item: Any, keyword: str) -> tuple[str, str]:
    """Return value and meaning of an item's code."""
    codes = item.get(keyword) or ()
    if not codes:
        return "", ""
    return _text(codes[0], "CodeValue"), _text(codes[0], "CodeMeaning")
