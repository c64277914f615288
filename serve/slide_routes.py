"""Routes of slides: the list of them, one, its thumbnail."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import Field

from serve.limits import Limits
from serve.routing import JPEG, Parts, SlidePath, api_router, known_tags, needs
from serve.schemas import MAX_ID, MAX_RESULTS, Out

_MOST = 2**31  # slides of an archive
KEPT = "private, no-cache"
"""Cache-Control of a thumbnail: browsers keep it, and ask each time whether it is still the one."""


class SlideInfo(Out):
    """Public metadata of a slide; nothing else of it leaves the archive."""

    slide_id: str
    width: int | None = Field(description="Level-0 px.")
    height: int | None
    mpp: float | None = Field(description="µm per level-0 px.")
    vendor: str | None
    split: str | None
    n_regions: int | None
    n_patches: int | None
    tissue_mm2: float | None
    patient_id: str | None = Field(
        None, description="Only where the service is set to show patients."
    )
    status: Literal["ready", "quarantined", "empty"]
    reason: str | None = Field(None, description="Code of why a slide is not ready.")
    message: str | None = Field(None, description="The same as a sentence, without names of files.")


class SlideList(Out):
    """A page of slides, by id."""

    data: list[SlideInfo]
    next: str | None = Field(description="Give it as `after` for the next page.")
    total: int = Field(description="Number of slides on all pages.")


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
        offset: Annotated[int, Query(ge=0, le=_MOST)] = 0,
        q: Annotated[str, Query(max_length=MAX_ID)] = "",
        label: Annotated[str, Query(max_length=MAX_ID, pattern="^$|^[^=]+=")] = "",
        split: Annotated[str, Query(max_length=MAX_ID)] = "",
        status: Literal["ready", "quarantined", "empty", "all"] = "ready",
    ) -> Any:
        """The slides of the archive, by id; a part of them by id, label, split or status."""
        page = await parts.search.slides(
            limit=limit, after=after, offset=offset, q=q, label=label, split=split, status=status
        )
        rows = [_public(parts, row) for row in page.rows]
        request.state.audit["slides"] = [row["slide_id"] for row in rows]
        return {"data": rows, "next": page.following, "total": page.total}

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
        responses={200: JPEG, 304: {"description": "Not modified"}},
    )  # fmt: skip
    async def thumbnail(
        request: Request,
        slide_id: SlidePath,
        px: Annotated[
            int | None,
            Query(
                ge=16, le=1024, description="Longer side at most; left out, the picture as stored."
            ),
        ] = None,
    ) -> Response:
        """A small picture of a slide's tissue, never of its label; 304 to a client that has it."""
        data = await parts.search.thumbnail(slide_id, px=px)
        request.state.audit["slides"] = [slide_id]
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()[:20]}"', "Cache-Control": KEPT}
        if headers["ETag"] in known_tags(request):
            return Response(status_code=304, headers=headers)
        return Response(data, media_type="image/jpeg", headers=headers)

    return api


def _public(parts: Parts, row: dict[str, Any]) -> dict[str, Any]:
    if not row.get("message"):
        return row
    return row | {"message": parts.public(row["message"])}
