"""DICOM annotations of slides, bulk (ANN) and in structured reports (SR), as GeoJSON features.

Bulk annotations are read by PS3.3 C.37.1: groups of points, polylines, polygons, ellipses or
rectangles, with a label, which becomes the class, and the meaning of a code, which becomes the
name. Reports are read by :mod:`pathflip.interop.annotation_dicom_sr`. Coordinates are of an image
(2D) or of the slide in mm (3D). Neither says by itself where on a slide in an archive something
lies, so the slide has to be at hand, as DICOM, and the annotations have to refer to it:

* 2D: to one of its images by UID. Those of a coarser image are scaled by the images' pixel spacing.
* 3D: by its frame of reference. Origin, directions and spacing of the finest image place them; the
  origin is the middle of its first pixel, and (0, 0) in level-0 px is that pixel's corner.

Whatever else is refused with a reason: other slides, coordinates of one of many frames, images
whose size and spacing contradict each other. A report may be about several slides: regions of the
others are counted, and it is refused where none is of this one. Needs pydicom
(``pathflip[dicom]``).
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathflip.errors import ConfigError
from pathflip.interop.annotation_dicom_sr import report_regions
from pathflip.interop.annotation_xml import NotAnnotations, ellipse_ring
from pathflip.slides.objects import is_remote
from pathflip.slides.sources import dicom_files, is_dicom

MAX_DICOM_BYTES = 512 << 20
"""Largest file read."""
MAX_ANNOTATIONS = 500_000
"""Annotations of one file."""

_BULK_ANNOTATIONS = "1.2.840.10008.5.1.4.1.1.91.1"
_SLIDE_IMAGE = "1.2.840.10008.5.1.4.1.1.77.1.6"
_REPORTS = "1.2.840.10008.5.1.4.1.1.88."
_DEFLATED = "1.2.840.10008.1.2.1.99"
_LITTLE_ENDIAN = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1")
_MAX_IMAGES = 1000
_NO_AREA = "areas with fewer than three points"
_SIZES = {"POINT": 1, "RECTANGLE": 4, "ELLIPSE": 4}
"""{kind: points of each annotation} of the kinds that have as many each."""
_AT_LEAST = {"POLYLINE": 2, "POLYGON": 3}

Matrix = NDArray[np.float64]
Transform = Callable[[Matrix], Matrix]
"""A function of points [k, 2 or 3] that gives level-0 px [k, 2]."""


@dataclass(frozen=True, kw_only=True)
class SlideFile:
    """The file of a slide, or its folder, and the size that the archive knows.

    Attributes:
        path: The file or folder.
        width, height: Level-0 px.
    """

    path: Path
    width: int
    height: int

    @classmethod
    def of(cls, uri: str | None, width: int | None, height: int | None) -> SlideFile | None:
        """Return the file of a slide of an archive; None if it is in a store or of unknown size."""
        if not uri or is_remote(uri) or not width or not height:
            return None
        return cls(path=Path(uri), width=width, height=height)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Image:
    """An image of a slide.

    Attributes:
        width, height: Size of its whole matrix, px.
        spacing: mm between its columns and between its rows.
        frame: UID of its frame of reference.
        origin: Middle of its first pixel (x, y), mm; None where it says none.
        along: Directions (x, y) of its rows and of its columns [2, 2]; None likewise.
        one_frame: Whether it is a single frame, so that pixels of that are its own.
    """

    width: int
    height: int
    spacing: tuple[float, float]
    frame: str
    origin: Matrix | None
    along: Matrix | None
    one_frame: bool


class _OtherSlide(NotAnnotations):
    """Annotations that refer to another slide."""


def read_dicom(
    path: Path, *, slide: SlideFile | None
) -> tuple[str, list[dict[str, Any]], Counter[str]]:
    """Read the objects of a file of annotations.

    Args:
        path: The file.
        slide: The slide that they are to be placed on.

    Returns:
        Name of the format, GeoJSON features in level-0 px, and how many objects were left out, by
        reason.

    Raises:
        NotAnnotations: It is no such file, or cannot be placed on the slide.
        ConfigError: pydicom is not installed (``missing_package``).
    """
    try:
        import pydicom
    except ImportError as error:
        raise ConfigError(
            "DICOM annotations are read by pydicom, which is not installed.",
            hint="Run: pip install 'pathflip[dicom]'",
            code="missing_package",
        ) from error
    try:
        return _read(path, slide)
    except NotAnnotations:
        raise
    except (
        pydicom.errors.InvalidDicomError, pydicom.errors.BytesLengthException, struct.error,
        EOFError, ValueError, TypeError, LookupError, AttributeError, OverflowError,
        RecursionError, NotImplementedError,
    ) as error:  # fmt: skip
        # pydicom converts a value when it is asked for, and says in many ways that it is none.
        raise NotAnnotations(f"it is damaged DICOM ({str(error)[:120]})") from error


def _read(path: Path, slide: SlideFile | None) -> tuple[str, list[dict[str, Any]], Counter[str]]:
    dataset = _open(path)
    kind = str(dataset.get("SOPClassUID", ""))
    if kind == _BULK_ANNOTATIONS:
        return "DICOM ANN", *_bulk(dataset, slide)
    if kind.startswith(_REPORTS):
        return "DICOM SR", *_report(dataset, slide)
    raise NotAnnotations(
        "it is DICOM, but neither bulk microscopy annotations (ANN) nor a structured report (SR)"
    )


def _bulk(dataset: Any, slide: SlideFile | None) -> tuple[list[dict[str, Any]], Counter[str]]:
    groups = dataset.get("AnnotationGroupSequence") or []
    if sum(int(group.get("NumberOfAnnotations") or 0) for group in groups) > MAX_ANNOTATIONS:
        raise NotAnnotations(f"it has more than {MAX_ANNOTATIONS:,} annotations")
    place, kind = _Place(slide), str(dataset.get("AnnotationCoordinateType", ""))
    if kind == "2D":
        images = tuple(
            str(item.get("ReferencedSOPInstanceUID", ""))
            for item in dataset.get("ReferencedImageSequence") or ()
        )
        origin = str(dataset.get("PixelOriginInterpretation", "VOLUME"))
        to_px = place.of_images(images, origin=origin)
    elif kind == "3D":
        to_px = place.of_frame(str(dataset.get("FrameOfReferenceUID", "")))
    else:
        raise NotAnnotations(f"its coordinates are of the unknown type {kind[:20]!r}")
    features, left_out = list[dict[str, Any]](), Counter[str]()
    for group in groups:
        codes = group.get("AnnotationPropertyTypeCodeSequence") or []
        meaning = str(codes[0].get("CodeMeaning", "")) if codes else ""
        label = str(group.get("AnnotationGroupLabel", "")) or meaning
        for points in _annotations(group, dimensions=2 if kind == "2D" else 3):
            shape = _shape(str(group.get("GraphicType", "")), to_px(points))
            if shape is None:
                left_out[_NO_AREA] += 1
                continue
            features.append(_feature(shape, name=meaning, classification=label))
            if len(features) > MAX_ANNOTATIONS:
                raise NotAnnotations(f"it has more than {MAX_ANNOTATIONS:,} annotations")
    return features, left_out


def _report(dataset: Any, slide: SlideFile | None) -> tuple[list[dict[str, Any]], Counter[str]]:
    regions, left_out = report_regions(dataset, most=MAX_ANNOTATIONS)
    place = _Place(slide)
    features = list[dict[str, Any]]()
    elsewhere: _OtherSlide | None = None
    for region in regions:
        try:
            if region.points.shape[1] == 3:
                to_px = place.of_frame(region.frame)
            else:
                to_px = place.of_images(region.images, origin=region.origin)
        except _OtherSlide as error:
            elsewhere = error
            left_out["regions of other slides"] += 1
            continue
        shape = _shape(region.kind, to_px(region.points))
        if shape is None:
            left_out[_NO_AREA] += 1
            continue
        features.append(_feature(shape, name=region.name, classification=region.classification))
    if elsewhere is not None and not features:
        raise elsewhere
    return features, left_out


def _open(path: Path, **options: Any) -> Any:
    """Open a DICOM file, whose values are read when they are asked for."""
    import pydicom

    if path.stat().st_size > MAX_DICOM_BYTES and not options:
        raise NotAnnotations(f"it is larger than {MAX_DICOM_BYTES >> 20} MiB")
    syntax = str(pydicom.filereader.read_file_meta_info(path).get("TransferSyntaxUID", ""))
    if syntax == _DEFLATED:
        raise NotAnnotations("it is deflated; store it uncompressed")
    if syntax not in _LITTLE_ENDIAN and not options:
        raise NotAnnotations("its numbers are stored in an order of bytes that is not read")
    return pydicom.dcmread(path, **options)


def _images(slide: SlideFile) -> dict[str, _Image]:
    """Return {UID: image} of the images of a slide's series; none if it is not DICOM."""
    folder = slide.path if slide.path.is_dir() else slide.path.parent
    if not folder.is_dir() or (slide.path.is_file() and not is_dicom(slide.path)):
        return {}
    found: dict[str, _Image] = {}
    for file in dicom_files(folder)[:_MAX_IMAGES]:
        dataset = _open(file, stop_before_pixels=True)
        if str(dataset.get("SOPClassUID", "")) == _SLIDE_IMAGE:
            image = _image(dataset)
            if image is not None:
                found[str(dataset.get("SOPInstanceUID", ""))] = image
    return found


def _image(dataset: Any) -> _Image | None:
    """Return what an image says of its place; None of labels, overviews and incomplete ones."""
    kinds = [str(kind) for kind in dataset.get("ImageType") or ()]
    if "LABEL" in kinds or "OVERVIEW" in kinds:
        return None
    try:
        measures = dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
        rows, columns = (float(value) for value in measures.PixelSpacing)
        width, height = int(dataset.TotalPixelMatrixColumns), int(dataset.TotalPixelMatrixRows)
    except (AttributeError, IndexError, TypeError, ValueError):
        return None
    if not (rows > 0 and columns > 0 and width > 0 and height > 0):
        return None
    origin = along = None
    try:
        at = dataset.TotalPixelMatrixOriginSequence[0]
        x, y = float(at.XOffsetInSlideCoordinateSystem), float(at.YOffsetInSlideCoordinateSystem)
        cosines = np.array([float(value) for value in dataset.ImageOrientationSlide]).reshape(2, 3)
        origin, along = np.array([x, y]), cosines[:, :2]
        flat = np.abs(cosines[:, 2]).max() < 1e-6
        if not flat or not np.allclose(along @ along.T, np.eye(2), atol=1e-4):
            origin = along = None  # no picture of the slide from above
    except (AttributeError, IndexError, TypeError, ValueError):
        pass
    return _Image(
        width=width, height=height, spacing=(columns, rows), origin=origin, along=along,
        frame=str(dataset.get("FrameOfReferenceUID", "")),
        one_frame=(dataset.get("Columns"), dataset.get("Rows")) == (width, height),
    )  # fmt: skip


class _Place:
    """Finds how coordinates of annotations become level-0 px of a slide.

    Args:
        slide: The slide; None where it is not at hand.

    Raises:
        NotAnnotations: It is not at hand or is no DICOM that can be read here.
    """

    def __init__(self, slide: SlideFile | None) -> None:
        if slide is None:
            raise NotAnnotations("its coordinates are of a DICOM slide, which is not at hand here")
        self._images = _images(slide)
        size = (slide.width, slide.height)
        finest = [image for image in self._images.values() if (image.width, image.height) == size]
        if not finest:
            raise NotAnnotations(
                f"it refers to a DICOM slide, and {slide.path.name} is none that can be read here"
            )
        self._base = finest[0]

    def of_images(self, uids: tuple[str, ...], *, origin: str) -> Transform:
        """Return how pixels of the one image that UIDs name become level-0 px."""
        found = [self._images[uid] for uid in uids if uid in self._images]
        if not uids or len(found) < len(uids):
            raise _OtherSlide("it refers to an image that is none of this slide's")
        if len({(image.width, image.height) for image in found}) > 1:
            raise NotAnnotations("it refers to several images of different size")
        image = found[0]
        if origin != "VOLUME" and not image.one_frame:
            raise NotAnnotations("its coordinates are of single frames, not of the whole image")
        for axis, (own, whole) in enumerate(
            [(image.width, self._base.width), (image.height, self._base.height)]
        ):
            ratio = image.spacing[axis] / self._base.spacing[axis]
            if abs(own * ratio - whole) > max(1.0, ratio):
                raise NotAnnotations("size and pixel spacing of the image it refers to contradict")
        scale = np.array(image.spacing) / np.array(self._base.spacing)
        return lambda points: points[:, :2] * scale

    def of_frame(self, uid: str) -> Transform:
        """Return how mm of a frame of reference become level-0 px."""
        base = self._base
        if not uid or uid != base.frame:
            raise _OtherSlide("its frame of reference is that of another slide")
        if base.origin is None or base.along is None:
            raise NotAnnotations("the slide does not say where it lies in its frame of reference")
        # The directions are of length 1 and at right angles, so the inverse is the transpose.
        origin, back, spacing = base.origin, base.along.T, np.array(base.spacing)
        return lambda points: (points[:, :2] - origin) @ back / spacing + 0.5


def _annotations(group: Any, *, dimensions: int) -> Sequence[Matrix]:
    """Return the points [k, 2 or 3] of each annotation of a group."""
    kind, count = str(group.get("GraphicType", "")), int(group.get("NumberOfAnnotations") or 0)
    if kind not in _SIZES and kind not in _AT_LEAST:
        raise NotAnnotations(f"a group of it is of the unknown kind {kind[:20]!r}")
    data, dtype = group.get("PointCoordinatesData"), np.float32
    if data is None:
        data, dtype = group.get("DoublePointCoordinatesData"), np.float64  # type: ignore[assignment]
    held = dimensions
    if dimensions == 3 and group.get("CommonZCoordinateValue") is not None:
        held = 2
    try:
        values = np.frombuffer(data or b"", dtype).astype(np.float64).reshape(-1, held)
    except ValueError as error:
        raise NotAnnotations("the coordinates of a group are cut off") from error
    if not (np.abs(values) < 1e9).all():  # nor is what is no number
        raise NotAnnotations("a group has a coordinate that is no position on a slide")
    if kind in _SIZES:
        starts = np.arange(0, len(values), _SIZES[kind])
        whole = [len(values) % _SIZES[kind] == 0]
    else:
        try:
            listed = np.frombuffer(group.get("LongPrimitivePointIndexList") or b"", np.uint32)
        except ValueError as error:
            raise NotAnnotations("the list of a group's annotations is cut off") from error
        at = listed.astype(np.int64) - 1  # numbers of values, from 1
        starts = at // held
        lengths = np.diff(np.append(starts, len(values)))
        whole = [not at.any() or at[0] == 0, *(at % held == 0), *(lengths >= _AT_LEAST[kind])]
    if not all(whole) or len(starts) != count:
        raise NotAnnotations(f"a group has not the {count:,} annotations that it says")
    return np.split(values, starts[1:])[: len(starts)]


def _shape(kind: str, points: Matrix) -> dict[str, Any] | None:
    """Return a geometry of level-0 px; None for an area without any."""
    if kind == "POINT":
        return {"type": "Point", "coordinates": points[0].tolist()}
    if kind == "MULTIPOINT":
        return {"type": "MultiPoint", "coordinates": points.tolist()}
    if kind == "POLYLINE":
        return {"type": "LineString", "coordinates": points.tolist()}
    if kind == "ELLIPSE":  # the ends of its longer axis, then those of the shorter
        first, last, left, right = points
        points = ellipse_ring(points.mean(axis=0), (last - first) / 2, (right - left) / 2)
    ring = points.tolist()
    if len(ring) > 1 and ring[0] == ring[-1]:
        ring.pop()
    if len({tuple(point) for point in ring}) < 3:
        return None
    return {"type": "Polygon", "coordinates": [[*ring, list(ring[0])]]}


def _feature(shape: dict[str, Any], *, name: str, classification: str) -> dict[str, Any]:
    properties = {"objectType": "annotation", "name": name, "classification": classification}
    return {"type": "Feature", "geometry": shape, "properties": properties}
