"""Routes of pixels: geometry of a slide's tiles, tiles, rectangles, outlines, Deep Zoom's XML."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from serve.limits import Limits, RequestError
from serve.routing import JPEG, Parts, SlidePath, api_router, known_tags, needs
from serve.tiles import MAX_VIEW_PX, MIN_VIEW_PX

MAX_PX = 2**36
"""Most level-0 px of a place or size."""
_MAX_LEVEL = 36
_MAX_TILES = 2**31
CACHED = "private, max-age=3600"
"""Cache-Control of a tile: browsers may keep it for an hour, shared caches may not."""
_XML: dict[str, Any] = {"content": {"application/xml": {"schema": {"type": "string"}}}}


class _Out(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TileLevel(_Out):
    """One level of a slide's tiles."""

    level: int
    width: int = Field(description="Size in pixels of the level.")
    height: int
    scale0: int = Field(description="Level-0 px per pixel, a power of two.")


class TileInfo(_Out):
    """Geometry of a slide's tiles, numbered as in Deep Zoom; tiles do not overlap."""

    slide_id: str
    width: int = Field(description="Level-0 px.")
    height: int
    mpp: float | None = Field(description="µm per level-0 px; null if nothing says it.")
    power: float | None = Field(description="10 / mpp: the objective of level 0.")
    tile_w: int = Field(description="Size of a tile, px; less at the right and lower edge.")
    tile_h: int
    min_level: int = Field(description="The largest level that is one tile.")
    max_level: int = Field(description="The level that is the slide in full.")
    levels: list[TileLevel]
    format: Literal["jpg"]
    version: str = Field(description="Another where the slide or the making of tiles is another.")


class MultiPolygon(_Out):
    """Outlines as GeoJSON, in level-0 px."""

    type: Literal["MultiPolygon"]
    coordinates: list[list[list[list[float]]]]


class RegionSquare(_Out):
    """Square of a region, level-0 px."""

    region_id: str
    x0: int
    y0: int
    size0: int


class SlideOutlines(_Out):
    """Outlines of what was ingested of a slide."""

    tissue: MultiPolygon | None
    regions: list[RegionSquare]


_Level = Annotated[int, Path(ge=0, le=_MAX_LEVEL)]
_Place = Annotated[int, Path(ge=0, le=_MAX_TILES)]
_Corner = Annotated[int, Query(ge=-MAX_PX, le=MAX_PX, description="Level-0 px.")]
_Side = Annotated[int, Query(ge=1, le=MAX_PX, description="Level-0 px.")]


def routes(parts: Parts, limits: Limits) -> APIRouter:
    """Define the routes of pixels."""
    api = api_router()
    read = [needs("read")]

    @api.get("/v1/slides/{slide_id}/tiles", dependencies=read, response_model=TileInfo)
    async def tiles(request: Request, slide_id: SlidePath) -> Any:
        """Geometry of a slide's tiles."""
        found = await parts.need("tiles").info(slide_id, client=request.state.client.name)
        request.state.audit["slides"] = [slide_id]
        return JSONResponse(found)

    @api.get("/v1/slides/{slide_id}/tiles.dzi", dependencies=read, response_class=Response,
             responses={200: _XML})  # fmt: skip
    async def dzi(request: Request, slide_id: SlidePath) -> Response:
        """Geometry of a slide's tiles as Deep Zoom's XML, for viewers that read that."""
        found = await parts.need("tiles").info(slide_id, client=request.state.client.name)
        if found["tile_w"] != found["tile_h"]:
            raise RequestError("Deep Zoom has no tiles that are not square.", code="no_dzi")
        request.state.audit["slides"] = [slide_id]
        return Response(
            '<?xml version="1.0" encoding="UTF-8"?>\n'
            '<Image xmlns="http://schemas.microsoft.com/deepzoom/2008" Format="jpg" Overlap="0" '
            f'TileSize="{found["tile_w"]}"><Size Width="{found["width"]}" '
            f'Height="{found["height"]}"/></Image>\n',
            media_type="application/xml",
        )

    @api.get(
        "/v1/slides/{slide_id}/tiles/{level}/{x}_{y}.jpg",
        dependencies=read,
        response_class=Response,
        responses={200: JPEG, 304: {"description": "Not modified"}},
    )
    @api.get("/v1/slides/{slide_id}/tiles_files/{level}/{x}_{y}.jpg", dependencies=read,
             response_class=Response, include_in_schema=False)  # fmt: skip
    async def tile(
        request: Request, slide_id: SlidePath, level: _Level, x: _Place, y: _Place
    ) -> Response:
        """One tile; a client that has it gets 304."""
        known = known_tags(request)
        tag, data = await parts.need("tiles").tile(
            slide_id, level, x, y, known=known, client=request.state.client.name
        )
        request.state.audit["slides"] = [slide_id]
        headers = {"ETag": tag, "Cache-Control": CACHED}
        if data is None:
            return Response(status_code=304, headers=headers)
        return Response(data, media_type="image/jpeg", headers=headers)

    @api.get("/v1/slides/{slide_id}/view", dependencies=read, response_class=Response,
             responses={200: JPEG})  # fmt: skip
    async def view(
        request: Request,
        slide_id: SlidePath,
        x0: _Corner,
        y0: _Corner,
        w0: _Side,
        h0: _Side,
        px: Annotated[int, Query(ge=MIN_VIEW_PX, le=MAX_VIEW_PX)] = 512,
    ) -> Response:
        """A picture of any rectangle, its longer side of so many pixels; white off the slide."""
        data = await parts.need("tiles").view(
            slide_id, x0=x0, y0=y0, w0=w0, h0=h0, px=px, client=request.state.client.name
        )
        request.state.audit["slides"] = [slide_id]
        return Response(data, media_type="image/jpeg")

    @api.get("/v1/slides/{slide_id}/outlines", dependencies=read, response_model=SlideOutlines)
    async def outlines(request: Request, slide_id: SlidePath) -> Any:
        """Outlines of a slide's tissue, and the squares of its regions."""
        found = await parts.need("tiles").outlines(slide_id, client=request.state.client.name)
        request.state.audit["slides"] = [slide_id]
        return Response(found, media_type="application/json")

    return api
