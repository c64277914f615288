"""Request and response schemas of every route, validated strictly.

Requests forbid unknown fields. A field of the OpenAI API that is not here (``functions``,
``prompt_embeds``, ``chat_template`` and so on) is an error, never passed on; some that clients send
unasked (``tools``, ``logprobs``, ``response_format`` and so on) may have the value that changes
nothing. Numbers are finite; sizes are bounded here, the body as a whole in :mod:`serve.limits`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from pathflip.search import query_faults
from pathflip.text import LETTERS

MAX_ID = 400
"""Characters of a slide's or region's id."""
MAX_TEXT = 2000
"""Characters of a text to search, ground or embed."""
MAX_RESULTS = 1000
MAX_TEXTS = 64
"""Texts embedded, slides classified, and names of classes in one request."""
MAX_CONTENT = 20_000
"""Characters of one chat message."""
MAX_MESSAGES = 64
MAX_STOPS = 4
_BIG = 2**63 - 1
_IMAGE = 14 << 20  # base64 characters; the body's limit is below

Id = Annotated[str, Field(min_length=1, max_length=MAX_ID)]
Text = Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]
Pixel = Annotated[int, Field(ge=0, le=2**40)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Nothing = Annotated[list[None], Field(max_length=0)]
Zero = Annotated[float, Field(ge=0, le=0)]
Variant = Literal["attn", "region_only", "cosine", "product"]


class In(BaseModel):
    """A request, or a part of one: nothing but its fields, of the very types."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class Out(BaseModel):
    """An answer, or a part of one."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


# -- errors ---------------------------------------------------------------------------------------


class Fault(Out):
    """One thing wrong with a request."""

    where: str = Field(examples=["body.k"])
    what: str = Field(examples=["Input should be less than or equal to 1000"])


class Problem(Out):
    """An error (RFC 9457), as application/problem+json."""

    type: Literal["about:blank"] = "about:blank"
    title: str = Field(examples=["Not Found"])
    status: int = Field(examples=[404])
    detail: str = Field(examples=["There is no such slide."])
    message: str = Field(
        description="Detail, hint and first error in one; OpenAI's clients show it.",
        examples=["There is no such slide."],
    )
    hint: str | None = Field(None, description="What to do about it.")
    code: str = Field(description="Short and stable, for machines.", examples=["unknown_slide"])
    request_id: str = Field(examples=["0b5e7c1c9f1e4b0f8c9a3f0e8f6f2a11"])
    errors: list[Fault] | None = None


# -- search ---------------------------------------------------------------------------------------


class Image(In):
    """A picture of tissue: its bytes and its scale. Never a path or an address."""

    data: str = Field(
        min_length=1, max_length=_IMAGE, description="A PNG or JPEG file in base64.",
        examples=["iVBORw0KGgo…"],
    )  # fmt: skip
    mpp: float = Field(
        ge=0.05, le=10, allow_inf_nan=False, description="µm per pixel.", examples=[0.5]
    )


class Condition(In):
    """A filter: a column, an operator, a value."""

    field: (
        Literal[
            "slide_id", "patient_id", "x0", "y0", "size0", "mpp", "tissue_fraction", "n_patches",
            "split", "vendor",
        ]
        | Annotated[
            str,
            Field(
                pattern=r"^label\.[^=!<>]{0,198}[^=!<>\s]$",
                description="`label.` and the name of a label of slides.",
                examples=["label.grade"],
            ),
        ]
    )  # fmt: skip
    op: Literal["=", "!=", "<", "<=", ">", ">="] = "="
    value: (
        Annotated[str, Field(max_length=MAX_ID)] | Annotated[int, Field(ge=-_BIG, le=_BIG)] | Finite
    )


_QUERY_FAULTS = {
    "not_one": "give exactly one of text, slide_id, region_id, image",
    "needs_text": "modes text and hybrid search for a text",
    "needs_slides": "captions are of slides: mode text needs level slide",
    "nothing_stored": "only a slide or a region of the archive has a slide or patient",
    "only_features": "level patch takes a text or a picture, in mode vector",
}


class SearchRequest(In):
    """Finds slides, regions or patches like a text, a slide, a region or a picture.

    Give exactly one. Patches are found by a text or a picture.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"text": "dense lymphocytes", "level": "region", "k": 5}],
        }
    )

    text: Text | None = None
    slide_id: Id | None = None
    region_id: Id | None = None
    image: Image | None = None
    mode: Literal["vector", "text", "hybrid"] = Field(
        "vector",
        description="How a text is searched: by meaning, by the words of captions, or both.",
    )
    level: Literal["region", "slide", "patch"] = Field(
        "region", description="patch: by the patch model, where the service has one."
    )
    k: int = Field(10, ge=1, le=MAX_RESULTS)
    encoder: Id | None = Field(
        None,
        description="Slide encoder whose imported vectors are compared, as /v1/models names it; "
        "with slide_id and level slide.",
    )
    filters: list[Condition] = Field([], max_length=16)
    exclude_same_slide: bool = False
    exclude_same_patient: bool = False

    @model_validator(mode="after")
    def _one_query(self) -> SearchRequest:
        given = {
            "text": self.text,
            "slide": self.slide_id,
            "region": self.region_id,
            "image": self.image,
        }
        found = query_faults(
            [name for name, value in given.items() if value is not None],
            mode=self.mode,
            level=self.level,
            exclude_same=self.exclude_same_slide or self.exclude_same_patient,
        )
        for fault, message in _QUERY_FAULTS.items():
            if fault in found:
                raise ValueError(message)
        if self.encoder is not None and self.slide_id is None:
            raise ValueError(
                "nothing here embeds texts or pictures by a slide encoder, which has no regions "
                "either: encoder goes with slide_id"
            )
        if self.encoder is not None and self.level != "slide":
            raise ValueError("the vectors of a slide encoder are of slides: give level slide")
        return self


class Found(Out):
    """A slide, region or patch that was found."""

    rank: int
    score: float
    slide_id: str
    region_id: str | None = Field(description="Null for slides; of a patch, the region it is of.")
    x0: int | None = Field(description="Level-0 px.")
    y0: int | None
    size0: int | None
    mpp: float | None = Field(description="µm per level-0 px.")


class SearchResponse(Out):
    """Results, best first."""

    model: str
    exhaustive: bool | None = Field(
        None, description="Of patches: whether all were compared, or those of the best regions."
    )
    results: list[Found]


# -- classify, ground -----------------------------------------------------------------------------

ClassName = Annotated[str, Field(min_length=1, max_length=200)]


def _few_names(classes: dict[str, list[str]]) -> dict[str, list[str]]:
    if sum(map(len, classes.values())) > MAX_TEXTS:
        raise ValueError(f"give at most {MAX_TEXTS} names in all")
    if not all(name.strip() for names in classes.values() for name in names):
        raise ValueError("a name of a class is empty")
    return classes


Classes = Annotated[
    dict[ClassName, Annotated[list[ClassName], Field(min_length=1, max_length=8)]],
    Field(min_length=2, max_length=32, description="{class: names of it}"),
    AfterValidator(_few_names),
]


class ClassifyRequest(In):
    """Scores slides against the words of classes."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "slide_ids": ["slide_0001-1a2b3c4d"],
                    "classes": {"colon": ["colonic mucosa"], "lung": ["lung parenchyma"]},
                }
            ]
        }
    )

    slide_ids: list[Id] = Field(min_length=1, max_length=MAX_TEXTS)
    classes: Classes
    templates: Literal["single", "ensemble"] = "ensemble"
    score: Literal["global", "local", "sum"] = "global"


class Classified(Out):
    """The scores of one slide."""

    slide_id: str
    label: str = Field(description="The class whose words fit best.")
    scores: dict[str, float] = Field(description="{class: cosine}")


class ClassifyResponse(Out):
    """One row per slide, by id."""

    model: str
    results: list[Classified]


class GroundRequest(In):
    """Locates a text on a slide."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"slide_id": "slide_0001-1a2b3c4d", "text": "areas of necrosis"}]
        }
    )

    slide_id: Id
    text: Text
    variant: Variant = "attn"
    contrast: Annotated[Text, Field(pattern=r"\S")] | None = Field(
        None, description="Neutral text whose heat is subtracted."
    )
    sigma: float = Field(1.0, ge=0, le=8, allow_inf_nan=False, description="Smoothing, patches.")
    min_patches: int = Field(4, ge=1, le=10_000, description="Smallest box.")
    patches: bool = Field(False, description="Return the heat of every patch as well.")
    format: Literal["json", "geojson", "png"] = Field(
        "json",
        description="geojson: boxes as annotations, for QuPath, and patches, where asked for, as "
        "tiles; png: heat and boxes over the thumbnail.",
    )


class Box(Out):
    """Box around a hot part of a slide, in level-0 px and µm."""

    x0: int
    y0: int
    w0: int
    h0: int
    x_um: float
    y_um: float
    w_um: float
    h_um: float
    score: float
    patches: int


class GroundResponse(Out):
    """Heatmap of a text on a slide."""

    model: str
    slide_id: str
    text: str
    variant: Variant
    contrast: str | None
    score: float = Field(description="How well the text fits anywhere on the slide, -1 to 1.")
    mpp: float
    patch_um: float = Field(description="Side of a patch; grid lines are its multiples.")
    boxes: list[Box]
    patches: list[dict[str, Any]] | None = None


# -- segment --------------------------------------------------------------------------------------


class SegmentRequest(In):
    """Cuts a slide into areas of classes, by its patches and the words of the classes."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "slide_id": "slide_0001-1a2b3c4d",
                    "classes": {"tumour": ["invasive carcinoma"], "stroma": ["fibrous stroma"]},
                }
            ]
        }
    )

    slide_id: Id
    classes: Classes
    templates: Literal["single", "ensemble"] = "ensemble"
    min_patches: int = Field(4, ge=1, le=10_000, description="Smallest area.")
    format: Literal["json", "geojson", "png"] = Field(
        "json", description="geojson: outlines, for QuPath; png: classes over the thumbnail."
    )


class SegmentedArea(Box):
    """Bounds of patches of one class that touch; the score is the mean of theirs."""

    label: str


class SegmentResponse(Out):
    """Areas of classes on a slide."""

    model: str
    slide_id: str
    mpp: float
    patch_um: float = Field(description="Side of a patch.")
    shares: dict[str, float] = Field(description="{class: share of the slide's patches}")
    areas: list[SegmentedArea] = Field(description="By class, then from top to bottom.")


class Outlines(Out):
    """Areas as a GeoJSON FeatureCollection, in level-0 px."""

    type: Literal["FeatureCollection"]
    features: list[dict[str, Any]]


# -- embeddings (OpenAI) --------------------------------------------------------------------------


class EmbeddingsRequest(In):
    """Vectors of texts or of a picture; the OpenAI shape, and ``image``."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"input": "areas of necrosis", "model": "demo_1a2b3c4d"}]}
    )

    input: Text | Annotated[list[Text], Field(min_length=1, max_length=MAX_TEXTS)] | None = None
    image: Image | None = None
    model: Id | None = Field(None, description="As /v1/models names it; may be left out.")
    encoding_format: Literal["float", "base64"] | None = "float"
    user: Annotated[str, Field(max_length=MAX_ID)] | None = Field(None, description="Not used.")

    @model_validator(mode="after")
    def _one_input(self) -> EmbeddingsRequest:
        if (self.input is None) == (self.image is None):
            raise ValueError("give input or image")
        return self


class Embedding(Out):
    """One vector: numbers, or little-endian float32 in base64."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Usage(Out):
    """Token counts."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int | None = None


class EmbeddingsResponse(Out):
    """Vectors in the order of the inputs."""

    object: Literal["list"] = "list"
    model: str
    data: list[Embedding]
    usage: Usage


# -- chat (OpenAI) --------------------------------------------------------------------------------


class TextPart(In):
    """A part of a message; text is the only kind there is."""

    type: Literal["text"]
    text: str = Field(max_length=MAX_CONTENT)


class Message(In):
    """A turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: (
        Annotated[str, Field(max_length=MAX_CONTENT)]
        | Annotated[list[TextPart], Field(min_length=1, max_length=16)]
    )
    # An answer is sent back as a client's ``model_dump()`` writes it.
    refusal: None = None
    annotations: Nothing | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Nothing | None = None

    def text(self) -> str:
        """Join the parts into one text."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content)


class RegionBox(In):
    """A square of the slide, level-0 px: only its regions are looked at."""

    x0: Pixel
    y0: Pixel
    size0: Annotated[int, Field(ge=1, le=2**31 - 1)]


class StreamOptions(In):
    """Stream options, as in OpenAI's API."""

    include_usage: bool | None = False


class TextFormat(In):
    """Format of an answer; text is the only one there is."""

    type: Literal["text"]


Stop = Annotated[str, Field(min_length=1, max_length=100)]


class ChatRequest(In):
    """A question about a slide; the OpenAI shape, with ``slide_id`` and ``region``."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"model": "demo", "slide_id": "slide_0001-1a2b3c4d",
                 "messages": [{"role": "user", "content": "Which organ is shown?"}]}
            ]
        }
    )  # fmt: skip

    model: Id
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    slide_id: Id
    region: RegionBox | None = None
    choices: list[Text] | None = Field(None, min_length=2, max_length=len(LETTERS))
    abstain: bool | None = Field(None, description="With choices: whether it may abstain.")
    max_tokens: int | None = Field(None, ge=1, le=8192)
    max_completion_tokens: int | None = Field(None, ge=1, le=8192)
    temperature: float | None = Field(0.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(1.0, gt=0, le=1, allow_inf_nan=False)
    n: Literal[1] | None = 1
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    seed: int | None = Field(None, ge=0, le=_BIG)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=MAX_ID)] | None = Field(None, description="Not used.")
    # Of these, only what changes nothing.
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    response_format: TextFormat | None = None
    store: Literal[False] | None = None
    tools: Nothing | None = None
    tool_choice: Literal["none"] | None = None

    @model_validator(mode="after")
    def _ends_with_a_question(self) -> ChatRequest:
        if self.messages[-1].role != "user":
            raise ValueError("the last message must be the user's")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("give max_tokens or max_completion_tokens")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream")
        if len({choice.strip() for choice in self.choices or ()} - {""}) < len(self.choices or ()):
            raise ValueError("an option is empty, or two are equal")
        if self.choices and (self.stream or len(self.messages) > 1):
            raise ValueError("with choices there is one message, the question, and no stream")
        if self.abstain is not None and not self.choices:
            raise ValueError("abstain needs choices")
        return self


class Said(Out):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str


class Choice(Out):
    """The one answer there is."""

    index: Literal[0] = 0
    message: Said
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class Options(Out):
    """Choice among the options of a question, as of ``pathflip ask``; null: it abstains."""

    choice: str | None
    scores: dict[str, float]
    abstain: float | None


class ChatResponse(Out):
    """A chat completion; ``options`` where the request has choices."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    options: Options | None = None


class ModelInfo(Out):
    """A model that answers here, or a slide encoder whose imported vectors are searched."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["pathflip"] = "pathflip"
    capability: Literal["chat", "embeddings", "patches", "slides"] = Field(
        description="slides: the encoder of a search by a slide."
    )
    fingerprint: str | None = None
    revision: str | None = Field(None, description="Of a slide encoder, as it was imported.")
    max_model_len: int | None = None


class ModelList(Out):
    """The models."""

    object: Literal["list"] = "list"
    data: list[ModelInfo]


class Health(Out):
    """State of the service, and of each part."""

    status: Literal["ok", "down"]
    parts: dict[str, bool] | None = None
