"""Routes of slides: the list of them, one, its thumbnail."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from serve.limits import Limits
from serve.routing import JPEG, Parts, SlidePath, api_router, needs
from serve.schemas import MAX_ID, MAX_RESULTS, SlideInfo, SlideList


def routes(parts: Parts, limits: Limits) -> APIRouter:
    """Define the routes of slides."""
    api = api_router()

    @api.get(
        "/v1/slides", dependencies=[needs("read")], response_model=SlideList,
        response_model_exclude_unset=True,
    )  # fmt: skip
    async def slides(
        request: Request,
        limit: Annotated[int, Query(ge=1, le=MAX_RESULTS)] = 100,
        after: Annotated[str, Query(max_length=MAX_ID)] = "",
    ) -> Any:
        """The slides of the archive, by id."""
        rows, following = await parts.search.slides(after=after, limit=limit)
        request.state.audit["slides"] = [row["slide_id"] for row in rows]
        return {"data": rows, "next": following}

    @api.get(
        "/v1/slides/{slide_id}", dependencies=[needs("read")], response_model=SlideInfo,
        response_model_exclude_unset=True,
    )  # fmt: skip
    async def slide(request: Request, slide_id: SlidePath) -> Any:
        """One slide."""
        row = await parts.search.slide(slide_id)
        request.state.audit["slides"] = [slide_id]
        return row

    @api.get(
        "/v1/slides/{slide_id}/thumbnail", dependencies=[needs("read")], response_class=Response,
        responses={200: JPEG},
    )  # fmt: skip
    async def thumbnail(request: Request, slide_id: SlidePath) -> Response:
        """A small picture of a slide's tissue; never of its label."""
        data = await parts.search.thumbnail(slide_id)
        request.state.audit["slides"] = [slide_id]
        return Response(data, media_type="image/jpeg")

    return api
