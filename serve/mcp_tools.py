"""Tools for agents: what a language model is told of each, what it may ask, what it gets.

Those here need no trained run: list_slides, describe_slide, view, measure. The others are in
:mod:`serve.mcp_model_tools`.

A tool checks its arguments, asks the parts that routes ask, and answers with a document and, where
there is something to see, pictures. Nothing here knows the protocol, which is :mod:`serve.mcp`'s.

Every picture says where it lies: pixel (u, v) of it is at level-0 ``x = x0 + u * px0``,
``y = y0 + v * px0``.

Read in this order: :class:`Tool`, :data:`TOOLS` at the end, then the functions it names.
"""

from __future__ import annotations

import io
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from pathflip import measure
from serve.limits import Limits, RequestError
from serve.schemas import MAX_ID
from serve.slide_routes import SlideInfo

if TYPE_CHECKING:
    from serve.metrics import Metrics
    from serve.routing import Parts

MAX_LISTED = 100
MAX_PX = 1024
MIN_PX = 64
LEAST_SIDE0 = 16
"""Smallest side of a view, level-0 px: less is no picture of anything."""
MAX_POINTS = 500
BIG = 2**31


# -- what every tool is made of -------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a tool.

    Attributes:
        parts: The parts.
        limits: Limits of an answer.
        client: Name of the client.
        scopes: Its scopes.
        audit: Entry of the audit log, to which ids are added.
        metrics: Counts the tokens of answers; None counts none.
    """

    parts: Parts
    limits: Limits
    client: str
    scopes: frozenset[str]
    audit: dict[str, Any] = field(default_factory=dict)
    metrics: Metrics | None = None

    async def slide(self, slide_id: str) -> dict[str, Any]:
        """Public metadata of a slide that is asked for."""
        row: dict[str, Any] = await self.parts.search.slide(slide_id)
        self.audit["slides"] = [slide_id]
        return row

    async def placed(self, slide_id: str) -> dict[str, Any]:
        """The same of a slide on which places are asked for.

        Raises:
            RequestError: ``no_size``.
        """
        row = await self.slide(slide_id)
        if None in (row["width"], row["height"], row["mpp"]):
            raise RequestError(
                "The archive does not know the size of this slide.",
                hint="It holds features that were imported without their slide.",
                code="no_size",
            )
        return row


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture beside a document.

    Attributes:
        data: Its JPEG.
        caption: Sentence that stands before it.
    """

    data: bytes
    caption: str


@dataclass(frozen=True, kw_only=True)
class Answered:
    """Answer of a tool.

    Attributes:
        document: Its result, by the tool's schema.
        pictures: Pictures, in the order in which the document names them.
    """

    document: BaseModel
    pictures: Sequence[Picture] = ()


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A tool and all that clients are told of it.

    Attributes:
        name, title, description: Its name, and what it does in plain English.
        scope: Scope a client needs.
        parts: Names of the parts without which there is no such tool.
        arguments: Schema of its arguments.
        result: Schema of its document.
        run: Answers a call with such arguments.
    """

    name: str
    title: str
    description: str
    scope: str
    parts: tuple[str, ...]
    arguments: type[BaseModel]
    result: type[BaseModel]
    run: Callable[[Any, Call], Awaitable[Answered]]


class Arguments(BaseModel):
    """Arguments of a tool: nothing but its fields, of the very types."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class Result(BaseModel):
    """Document of a tool."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


SlideId = Annotated[
    str, Field(min_length=1, max_length=MAX_ID, description="Id of the slide, as list_slides says.")
]
_Pixels = Annotated[float, Field(ge=-BIG, le=BIG, allow_inf_nan=False)]
SizeUm = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]


class Place(Result):
    """Place of a picture on its slide: pixel (u, v) is at x0 + u * px0, y0 + v * px0."""

    x0: int = Field(description="Left edge of the picture, level-0 px.")
    y0: int = Field(description="Upper edge of the picture, level-0 px.")
    width: int = Field(description="Width of the picture in its own pixels.")
    height: int
    px0: float = Field(description="Level-0 px per pixel of the picture.")
    mpp: float = Field(description="µm per pixel of the picture.")

    def says(self) -> str:
        """The same as a sentence for a model that reads no structured results."""
        return (
            f"Pixel (u, v) of this picture is at level-0 x = {self.x0} + u * {self.px0:g}, "
            f"y = {self.y0} + v * {self.px0:g}; a pixel is {self.mpp:g} µm."
        )


def place_of(data: bytes, x0: int, y0: int, w0: int, mpp: float) -> Place:
    """Place of a JPEG that shows the slide from (x0, y0) on, ``w0`` level-0 px wide."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        width, height = image.size
    px0 = w0 / width
    return Place(
        x0=x0, y0=y0, width=width, height=height, px0=round(px0, 6), mpp=round(px0 * mpp, 6)
    )


# -- slides ---------------------------------------------------------------------------------------


class ListSlides(Arguments):
    """Arguments of list_slides."""

    limit: int = Field(20, ge=1, le=MAX_LISTED, description="Most slides to list.")
    after: str = Field(
        "", max_length=MAX_ID, description="Begin after this id: what `next` of the last call said."
    )
    contains: str = Field("", max_length=MAX_ID, description="Part of the id, in any case.")
    split: str = Field("", max_length=MAX_ID, description="Split, as train, val, test.")
    label: Annotated[str, Field(max_length=MAX_ID, pattern="=")] | None = Field(
        None, description="Label of slides and its value, as 'organ=colon'."
    )


class Slides(Result):
    """Slides by id."""

    slides: list[SlideInfo]
    next: str | None = Field(description="Give it as `after` to go on; null: these were the last.")
    total: int = Field(description="Number of slides on all pages.")


async def _list_slides(asked: ListSlides, call: Call) -> Answered:
    page = await call.parts.search.slides(
        limit=asked.limit, after=asked.after, q=asked.contains, split=asked.split,
        label=asked.label or "",
    )  # fmt: skip
    call.audit["slides"] = [row["slide_id"] for row in page.rows]
    return Answered(document=Slides(slides=page.rows, next=page.following, total=page.total))


class OneSlide(Arguments):
    """Arguments of describe_slide."""

    slide: SlideId


class SlideDetails(SlideInfo):
    """A slide, its size, and the place of its picture."""

    width_um: float | None
    height_um: float | None
    magnification: float | None = Field(
        description="Objective at which level 0 is sharp: 40 is 0.25 µm per px."
    )
    picture: Place | None = Field(description="Null where the archive has no picture.")


async def _describe_slide(asked: OneSlide, call: Call) -> Answered:
    row = await call.slide(asked.slide)
    info, mpp = SlideInfo(**row), row["mpp"]
    pictures, place = [], None
    try:
        data = await call.parts.search.thumbnail(asked.slide)
    except RequestError as error:
        if error.code != "no_thumbnail":
            raise
    else:
        place = place_of(data, 0, 0, info.width or 1, mpp)
        pictures = [Picture(data=data, caption=f"The whole slide. {place.says()}")]
    details = SlideDetails(
        **row,
        width_um=_um(info.width, mpp),
        height_um=_um(info.height, mpp),
        magnification=None if mpp is None else round(10 / mpp, 2),
        picture=place,
    )
    return Answered(document=details, pictures=pictures)


def _um(pixels: int | None, mpp: float | None) -> float | None:
    return None if pixels is None or mpp is None else round(pixels * mpp, 1)


# -- view, measure --------------------------------------------------------------------------------


class View(Arguments):
    """Arguments of view."""

    slide: SlideId
    x0: _Pixels = Field(description="Left edge of the square, level-0 px.")
    y0: _Pixels = Field(description="Upper edge of the square, level-0 px.")
    size_um: SizeUm = Field(description="Side of the square in µm.")
    px: int = Field(
        768, ge=MIN_PX, le=MAX_PX,
        description="Side of the picture in pixels; never more than the slide has there.",
    )  # fmt: skip


class Viewed(Result):
    """A square of a slide."""

    slide_id: str
    size_um: float = Field(description="Side of the square, µm.")
    size0: int = Field(description="Side of the square, level-0 px.")
    slide_mpp: float = Field(description="µm per level-0 px.")
    inside: float = Field(description="Share of the square that is on the slide; white beyond it.")
    picture: Place


async def _view(asked: View, call: Call) -> Answered:
    row = await call.placed(asked.slide)
    x0, y0, size0 = round(asked.x0), round(asked.y0), round(asked.size_um / row["mpp"])
    if size0 < LEAST_SIDE0:
        raise RequestError(
            f"A square of {asked.size_um:g} µm is {size0} px of this slide.",
            hint=f"Give size_um of at least {math.ceil(LEAST_SIDE0 * row['mpp'])}.",
            code="too_small",
        )
    across = min(x0 + size0, row["width"]) - max(x0, 0)
    down = min(y0 + size0, row["height"]) - max(y0, 0)
    if across <= 0 or down <= 0:
        raise _outside(row, "The square does not touch the slide.")
    data = await square_of(call, asked.slide, x0, y0, size0, asked.px)
    place = place_of(data, x0, y0, size0, row["mpp"])
    viewed = Viewed(
        slide_id=asked.slide,
        size_um=round(size0 * row["mpp"], 3),
        size0=size0,
        slide_mpp=row["mpp"],
        inside=round(across * down / size0**2, 4),
        picture=place,
    )
    caption = f"{asked.slide}, {viewed.size_um:g} µm a side. {place.says()}"
    return Answered(document=viewed, pictures=[Picture(data=data, caption=caption)])


async def square_of(call: Call, slide_id: str, x0: int, y0: int, size0: int, px: int) -> bytes:
    """JPEG of a square of a slide; nothing finer than the slide itself."""
    tiles = call.parts.need("tiles")
    data: bytes = await tiles.view(
        slide_id, x0=x0, y0=y0, w0=size0, h0=size0, px=min(px, size0), client=call.client
    )  # fmt: skip
    return data


def _outside(row: dict[str, Any], message: str) -> RequestError:
    return RequestError(
        message,
        hint=f"The slide is {row['width']} x {row['height']} level-0 px; (0, 0) is its upper left.",
        code="outside_slide",
    )


_Point = Annotated[list[_Pixels], Field(min_length=2, max_length=2)]


class Measure(Arguments):
    """Arguments of measure."""

    slide: SlideId
    points: list[_Point] = Field(
        min_length=2, max_length=MAX_POINTS,
        description="Points [x, y] in level-0 px, in order. An area needs three or more; its "
        "outline is closed from the last to the first.",
    )  # fmt: skip
    what: Literal["length", "area"] = Field(
        "length", description="length: of the line through the points; area: within the outline."
    )


class Measured(Result):
    """A length, or an area and its outline."""

    slide_id: str
    what: Literal["length", "area"]
    mpp: float = Field(description="µm per level-0 px.")
    length_um: float = Field(description="Length of the line, or of the closed outline.")
    area_um2: float | None = None
    area_mm2: float | None = None


async def _measure(asked: Measure, call: Call) -> Answered:
    row = await call.placed(asked.slide)
    points = [(x, y) for x, y in asked.points]
    if not all(0 <= x <= row["width"] and 0 <= y <= row["height"] for x, y in points):
        raise _outside(row, "A point is not on the slide.")
    area = None
    if asked.what == "area":
        if len(points) < 3:
            raise RequestError(
                "An area needs three points.", hint="Give its corners in order.", code="outline"
            )
        if measure.crosses(points):
            raise RequestError(
                "The outline crosses itself, so what it encloses is not one area.",
                hint="Give the corners in order around the area.",
                code="outline",
            )
        area = measure.area(points) * row["mpp"] ** 2
        points.append(points[0])
    return Answered(
        document=Measured(
            slide_id=asked.slide,
            what=asked.what,
            mpp=row["mpp"],
            length_um=round(measure.length(points) * row["mpp"], 3),
            area_um2=None if area is None else round(area, 3),
            area_mm2=None if area is None else round(area / 1e6, 9),
        )
    )


# -- the tools ----------------------------------------------------------------------------------

TOOLS = (
    Tool(
        name="list_slides",
        title="List slides",
        description="List slides of the archive by id, all of them or those whose id, split or "
        "label is asked for, with their size in level-0 pixels, mpp (µm per level-0 pixel) and "
        "area of tissue. Long lists come in pages.",
        scope="read",
        parts=("search",),
        arguments=ListSlides,
        result=Slides,
        run=_list_slides,
    ),
    Tool(
        name="describe_slide",
        title="Describe a slide",
        description="Say how large a slide is and at which scale, and show a small picture of "
        "all of it. To look at a place in that picture, turn it into level-0 pixels: "
        "x = u * px0, y = v * px0, and call view.",
        scope="read",
        parts=("search",),
        arguments=OneSlide,
        result=SlideDetails,
        run=_describe_slide,
    ),
    Tool(
        name="view",
        title="Look at a square of a slide",
        description="Show a square of a slide, like a microscope. x0 and y0 are its upper left "
        "corner in level-0 pixels, size_um is its side in µm (not in pixels), px the side of the "
        "picture. To zoom in on pixel (u, v) of a picture, go to x = x0 + u * px0, "
        "y = y0 + v * px0 of that picture and take half of the new square's side, in level-0 "
        "pixels (size_um / mpp), away from both. Beyond the slide the picture is white.",
        scope="read",
        parts=("search", "tiles"),
        arguments=View,
        result=Viewed,
        run=_view,
    ),
    Tool(
        name="measure",
        title="Measure a length or an area",
        description="Compute the length of a line through points, or the area within an outline, "
        "in µm, from points [x, y] in level-0 pixels.",
        scope="read",
        parts=("search",),
        arguments=Measure,
        result=Measured,
        run=_measure,
    ),
)
"""Tools that need no trained run."""
