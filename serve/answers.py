"""Answers for which several parts are asked, alike for routes and for the tools of agents."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from serve.limits import Limits, read_image
from serve.schemas import Image, SearchRequest

if TYPE_CHECKING:
    from serve.routing import Parts


async def found(
    parts: Parts, asked: SearchRequest, *, limits: Limits, audit: dict[str, Any]
) -> dict[str, Any]:
    """Embed a query and search by it.

    Args:
        parts: The parts.
        asked: The query.
        limits: Limits of its picture.
        audit: Entry of the audit log, to which the slides asked for and shown are added.

    Returns:
        The document of :class:`serve.schemas.SearchResponse`.
    """
    made = None
    if asked.image is not None:
        made = await embedded(parts, asked.image, limits, patches=asked.level == "patch")
    elif asked.text is not None and asked.level == "patch":
        made = await parts.need("embedder").patch_text(asked.text)
    elif asked.text is not None and asked.mode != "text":
        made = await parts.need("embedder").texts([asked.text])
    if asked.slide_id is not None:
        audit["asked"] = asked.slide_id
    document: dict[str, Any] = await parts.search.search(asked.model_dump(exclude={"image"}), made)
    audit["slides"] = list(dict.fromkeys(row["slide_id"] for row in document["results"]))
    return document


async def embedded(parts: Parts, image: Image, limits: Limits, *, patches: bool = False) -> Any:
    """Embed a client's picture, by the patch model where patches are searched."""
    pixels = await asyncio.to_thread(read_image, image.data, pixels=limits.image_pixels)
    embedder = parts.need("embedder")
    embed = embedder.patch_image if patches else embedder.image
    return await embed(pixels, mpp=image.mpp)


async def whole(
    first: Mapping[str, Any], stream: AsyncGenerator[Mapping[str, Any], None]
) -> tuple[str, Mapping[str, Any]]:
    """Collect the answer of a chat engine.

    Args:
        first: Item of the stream that was taken already.
        stream: The rest of it.

    Returns:
        The text, and the last item, which says how it ended.
    """
    text, last = first["text"], first
    async with aclosing(stream):
        async for last in stream:
            text += last["text"]
    return text, last
