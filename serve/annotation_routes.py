"""Routes of annotations: list, save, remove, import.

Bodies are GeoJSON of people's hands, bounded by :mod:`serve.limits` and checked by
:mod:`pathflip.interop.annotations`. The author is the name of the client's token, whatever a body
says. A client without the scope ``admin`` sees, changes and removes its own alone. Texts of
annotations are in no log and no audit line: those have ids.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import JSONResponse

from pathflip.interop.annotations import MAX_FEATURES, MAX_POINTS, annotation_uuid
from serve.limits import Limits
from serve.routing import Parts, SlidePath, api_router, needs, strict_body

MAX_NAMES = 4 * MAX_POINTS
"""Names of fields and entries of lists in a body: a line of so many points has one for each."""
_AUDITED = 100  # ids in an audit line

_UUID = Annotated[str, Path(max_length=64, description="UUID of the annotation.")]
_Origin = Annotated[
    bool,
    Query(
        description="Whether coordinates count from the corner of the slide's bounds, where it has "
        "some, as in files of QuPath; else they are level-0 px."
    ),
]


def routes(parts: Parts, limits: Limits) -> APIRouter:
    """Define the routes of annotations."""
    api = api_router()

    @api.get("/v1/slides/{slide_id}/annotations", dependencies=[needs("read")])
    async def annotations(request: Request, slide_id: SlidePath, qupath: _Origin = False) -> Any:
        """A slide's annotations as a FeatureCollection that QuPath reads."""
        client = request.state.client
        found = await parts.need("annotations").features(
            slide_id, author=None if "admin" in client.scopes else client.name, qupath=qupath,
            client=client.name,
        )  # fmt: skip
        request.state.audit |= {"slides": [slide_id], "annotations": found["ids"][:_AUDITED]}
        return Response(found["json"], media_type="application/json")

    @api.put(
        "/v1/slides/{slide_id}/annotations/{annotation_id}", dependencies=[needs("annotate")],
        openapi_extra=_body("A GeoJSON feature; `properties.revision` is the revision that was "
                            "read last, 0 of a new annotation."),
    )  # fmt: skip
    async def put(request: Request, slide_id: SlidePath, annotation_id: _UUID) -> Any:
        """Save an annotation; the answer is the feature as it is stored, on disk."""
        client = request.state.client
        key = annotation_uuid(annotation_id)
        request.state.audit |= {"slides": [slide_id], "annotations": [key]}
        saved = await parts.need("annotations").put(
            slide_id, key, await strict_body(request, names=MAX_NAMES),
            author=client.name, anyone="admin" in client.scopes,
        )  # fmt: skip
        return JSONResponse(saved)

    @api.delete(
        "/v1/slides/{slide_id}/annotations/{annotation_id}", dependencies=[needs("annotate")],
        status_code=204,
    )  # fmt: skip
    async def delete(request: Request, slide_id: SlidePath, annotation_id: _UUID) -> Response:
        """Remove an annotation."""
        client = request.state.client
        key = annotation_uuid(annotation_id)
        request.state.audit |= {"slides": [slide_id], "annotations": [key]}
        await parts.need("annotations").delete(
            slide_id, key, author=client.name, anyone="admin" in client.scopes
        )
        return Response(status_code=204)

    @api.post(
        "/v1/slides/{slide_id}/annotations/import", dependencies=[needs("annotate")],
        openapi_extra=_body(f"A GeoJSON FeatureCollection of at most {MAX_FEATURES:,} features and "
                            f"{MAX_POINTS:,} points."),
    )  # fmt: skip
    async def add(request: Request, slide_id: SlidePath, qupath: _Origin = False) -> Any:
        """Save all annotations of a FeatureCollection, or none; again changes nothing."""
        request.state.audit["slides"] = [slide_id]
        counts = await parts.need("annotations").add(
            slide_id,
            await strict_body(request, names=MAX_NAMES),
            author=request.state.client.name,
            qupath=qupath,
        )
        request.state.audit["imported"] = counts["imported"]
        return JSONResponse(counts)

    return api


def _body(what: str) -> dict[str, Any]:
    """Describe a body that no model reads to OpenAPI."""
    schema = {"type": "object", "description": what}
    content = {"application/json": {"schema": schema}}
    return {"requestBody": {"required": True, "content": content}}
