"""Tools for agents that ask a trained run: search, ground, classify, ask.

They are made of the same parts as those of :mod:`serve.mcp_tools`, which is read first.
"""

from __future__ import annotations

import asyncio
import io
from typing import Annotated, Literal

from pydantic import Field

from pathflip.errors import ConfigError, PathFLIPError
from pathflip.text import LETTERS
from serve import answers
from serve.limits import RequestError
from serve.mcp_tools import (
    BIG,
    MAX_PX,
    Answered,
    Arguments,
    Call,
    Picture,
    Place,
    Result,
    SizeUm,
    SlideId,
    Tool,
    place_of,
    square_of,
)
from serve.schemas import (
    MAX_ID,
    MAX_TEXTS,
    Box,
    ChatRequest,
    Classes,
    Classified,
    ClassifyRequest,
    Found,
    GroundRequest,
    SearchRequest,
    Text,
)

MAX_FOUND = 50
MAX_PICTURES = 8
"""Pictures of one search."""
FOUND_PX = 256
"""Side of the picture of a region that was found."""
MAX_BOXES = 50
_JPEG_QUALITY = 85

# -- search, ground, classify ---------------------------------------------------------------------


class Search(Arguments):
    """Arguments of search."""

    text: Text | None = Field(None, description="What is looked for, in words.")
    slide: Annotated[str, Field(min_length=1, max_length=MAX_ID)] | None = Field(
        None, description="Find what is like this slide."
    )
    region: Annotated[str, Field(min_length=1, max_length=MAX_ID)] | None = Field(
        None, description="Find what is like this region, by the region_id of a result."
    )
    level: Literal["region", "slide"] = Field("region", description="What is found.")
    k: int = Field(10, ge=1, le=MAX_FOUND, description="Most results.")
    encoder: Annotated[str, Field(min_length=1, max_length=MAX_ID)] | None = Field(
        None,
        description="With slide, and level 'slide': compare by the imported vectors of this slide "
        "encoder, as 'titan'. Another name is answered with those there are.",
    )
    filters: list[Annotated[str, Field(min_length=3, max_length=2 * MAX_ID)]] = Field(
        [], max_length=16,
        description="Conditions that all hold, as 'split=test', 'slide_id=…', 'label.organ=colon'.",
    )  # fmt: skip
    exclude_same_slide: bool = Field(
        False, description="Leave out the slide that is asked about, or that the region is of."
    )
    pictures: int = Field(
        0, ge=0, le=MAX_PICTURES, description="Show pictures of so many of the first results."
    )


class FoundPicture(Place):
    """Place of the picture of a result."""

    rank: int


class SearchResults(Result):
    """Results, best first."""

    model: str
    results: list[Found]
    pictures: list[FoundPicture]


async def _search(asked: Search, call: Call) -> Answered:
    from pathflip.archive.filters import Filter

    conditions = [Filter.parse(text) for text in asked.filters]
    filters = [{"field": one.field, "op": one.op, "value": one.value} for one in conditions]
    request = SearchRequest.model_validate(
        asked.model_dump(include={"text", "level", "k", "encoder", "exclude_same_slide"})
        | {"slide_id": asked.slide, "region_id": asked.region, "filters": filters}
    )
    if asked.pictures and "read" not in call.scopes:
        raise RequestError("Pictures of results need the scope read.", code="scope")
    found = await answers.found(call.parts, request, limits=call.limits, audit=call.audit)
    rows = [Found(**row) for row in found["results"]]
    shown = await asyncio.gather(*(_picture_of(row, call) for row in rows[: asked.pictures]))
    document = SearchResults(
        model=found["model"], results=rows, pictures=[place for place, _ in shown if place]
    )
    return Answered(document=document, pictures=[one for _, made in shown for one in made])


async def _picture_of(row: Found, call: Call) -> tuple[FoundPicture | None, list[Picture]]:
    """Picture of a result; a slide that cannot be read costs its own alone."""
    try:
        info = await call.parts.search.slide(row.slide_id)
        if row.x0 is None or row.y0 is None or row.size0 is None:
            data = await call.parts.search.thumbnail(row.slide_id)
            place = place_of(data, 0, 0, info["width"], info["mpp"])
        else:
            data = await square_of(call, row.slide_id, row.x0, row.y0, row.size0, FOUND_PX)
            place = place_of(data, row.x0, row.y0, row.size0, info["mpp"])
    except PathFLIPError:
        return None, []
    caption = f"Result {row.rank}: {row.region_id or row.slide_id}. {place.says()}"
    return FoundPicture(**place.model_dump(), rank=row.rank), [Picture(data=data, caption=caption)]


class Ground(Arguments):
    """Arguments of ground."""

    slide: SlideId
    text: Text = Field(description="A sentence about what is looked for, as 'areas of necrosis'.")
    contrast: Annotated[Text, Field(pattern=r"\S")] | None = Field(
        None, description="Neutral sentence whose heat is subtracted, as 'normal tissue'."
    )
    picture: bool = Field(True, description="Show the heat over the whole slide.")


class Grounded(Result):
    """Places where a sentence is true, hottest first."""

    model: str
    slide_id: str
    text: str
    score: float = Field(description="How well the sentence fits anywhere on the slide, -1 to 1.")
    mpp: float = Field(description="µm per level-0 px.")
    boxes: list[Box]
    boxes_left_out: int
    picture: Place | None


async def _ground(asked: Ground, call: Call) -> Answered:
    call.audit["slides"] = [asked.slide]
    grounding = call.parts.need("grounding")
    request = GroundRequest.model_validate(
        {"slide_id": asked.slide, "text": asked.text, "contrast": asked.contrast}
    )
    found = await grounding.ground(request.model_dump())
    boxes = sorted((Box(**box) for box in found["boxes"]), key=lambda box: -box.score)
    pictures, place = [], None
    if asked.picture:
        row = await call.parts.search.slide(asked.slide)
        try:
            png = await grounding.ground(request.model_dump() | {"format": "png"})
        except ConfigError as error:
            if error.code != "no_thumbnail":
                raise
        else:
            data = await asyncio.to_thread(_as_jpeg, png)
            place = place_of(data, 0, 0, row["width"], row["mpp"])
            caption = f"Heat of the sentence over the whole slide, red is hottest. {place.says()}"
            pictures = [Picture(data=data, caption=caption)]
    document = Grounded(
        model=found["model"],
        slide_id=asked.slide,
        text=asked.text,
        score=found["score"],
        mpp=found["mpp"],
        boxes=boxes[:MAX_BOXES],
        boxes_left_out=max(0, len(boxes) - MAX_BOXES),
        picture=place,
    )
    return Answered(document=document, pictures=pictures)


def _as_jpeg(png: bytes) -> bytes:
    from PIL import Image

    with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
        small = image.convert("RGB")
    small.thumbnail((MAX_PX, MAX_PX))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=_JPEG_QUALITY)
    return out.getvalue()


class Classify(Arguments):
    """Arguments of classify."""

    slides: list[SlideId] = Field(min_length=1, max_length=MAX_TEXTS)
    classes: Classes = Field(
        description="Two or more classes, each with one or more wordings: "
        '{"colon": ["colonic mucosa"], "lung": ["lung parenchyma"]}.'
    )


class Classification(Result):
    """Scores of slides."""

    model: str
    results: list[Classified]


async def _classify(asked: Classify, call: Call) -> Answered:
    call.audit["slides"] = asked.slides
    request = ClassifyRequest.model_validate({"slide_ids": asked.slides, "classes": asked.classes})
    found = await call.parts.need("grounding").classify(request.model_dump())
    return Answered(document=Classification(**found))


# -- ask ------------------------------------------------------------------------------------------


class Ask(Arguments):
    """Arguments of ask."""

    slide: SlideId
    question: Text
    choices: list[Text] | None = Field(
        None, min_length=2, max_length=len(LETTERS), description="Options, one of which is chosen."
    )
    x0: Annotated[float, Field(ge=0, le=BIG, allow_inf_nan=False)] | None = Field(
        None,
        description="With y0 and size_um: only this square is looked at. Left edge, level-0 px.",
    )
    y0: Annotated[float, Field(ge=0, le=BIG, allow_inf_nan=False)] | None = None
    size_um: SizeUm | None = Field(None, description="Side of the square in µm.")


class SlideAnswer(Result):
    """Answer of the slide's language model."""

    model: str
    slide_id: str
    answer: str
    choice: str | None = Field(None, description="Letter of the option; null: none, or open.")
    scores: dict[str, float] | None = Field(None, description="{letter: probability}")
    abstain: float | None = Field(None, description="Probability that the slide cannot tell.")


async def _ask(asked: Ask, call: Call) -> Answered:
    from serve.chat import count_tokens, to_engine_request

    row = await call.slide(asked.slide)
    square = (asked.x0, asked.y0, asked.size_um)
    region = None
    if asked.x0 is not None and asked.y0 is not None and asked.size_um is not None:
        size0 = max(1, round(asked.size_um / row["mpp"]))
        region = {"x0": round(asked.x0), "y0": round(asked.y0), "size0": size0}
    elif any(value is not None for value in square):
        raise RequestError(
            "A square has x0, y0 and size_um.", hint="Give all three, or none.", code="invalid"
        )
    instructor = call.parts.need("instructor")
    about = await instructor.describe()
    request = ChatRequest.model_validate(
        {
            "model": about["id"],
            "messages": [{"role": "user", "content": asked.question}],
            "slide_id": asked.slide,
            "region": region,
            "choices": asked.choices,
        }
    )
    stream = instructor.chat(to_engine_request(request, call.limits))
    text, last = await answers.whole(await anext(stream), stream)
    if call.metrics is not None and "usage" in last:
        count_tokens(call.metrics, last["usage"])
    options = last.get("options") or {}
    answer = SlideAnswer(
        model=about["id"],
        slide_id=asked.slide,
        answer=text,
        choice=options.get("choice"),
        scores=options.get("scores") or None,
        abstain=options.get("abstain"),
    )
    return Answered(document=answer)


# -- the tools ----------------------------------------------------------------------------------

TOOLS = (
    Tool(
        name="search",
        title="Search the archive",
        description="Find regions or slides of the archive by words, or like a slide or region: "
        "give exactly one of text, slide, region. Results have a place (x0, y0, and the side "
        "size0, all level-0 pixels) and a score that only compares results of one search. Look "
        "at a region with view(slide_id, x0, y0, size_um = size0 * mpp).",
        scope="search",
        parts=("search", "embedder"),
        arguments=Search,
        result=SearchResults,
        run=_search,
    ),
    Tool(
        name="ground",
        title="Find where a sentence is true",
        description="Find where on one slide a sentence is true, such as 'areas of necrosis': "
        "boxes in level-0 pixels (x0, y0, w0, h0), hottest first, and a picture of the heat. "
        "Boxes come for any sentence, true or not: look at them with view before you believe "
        "them.",
        scope="search",
        parts=("search", "grounding"),
        arguments=Ground,
        result=Grounded,
        run=_ground,
    ),
    Tool(
        name="classify",
        title="Classify slides",
        description="Say which of several classes, each described in words, fits each slide "
        "best. The scores are cosines, not probabilities.",
        scope="search",
        parts=("search", "grounding"),
        arguments=Classify,
        result=Classification,
        run=_classify,
    ),
    Tool(
        name="ask",
        title="Ask the slide's own model",
        description="Ask a language model that was trained on slides of this archive a question "
        "about one slide, or about a square of it (x0, y0 in level-0 pixels and size_um). With "
        "choices it names one of them with probabilities, or says that the slide cannot tell. It "
        "can be wrong: look for yourself.",
        scope="chat",
        parts=("search", "instructor"),
        arguments=Ask,
        result=SlideAnswer,
        run=_ask,
    ),
)
"""Tools that need a trained run."""
