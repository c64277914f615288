"""Limits of a request, checked before anything is made of it.

Bodies are counted while they are read, whatever their Content-Length says, and have a deadline.
JSON is parsed strictly: what two parsers may read differently (a duplicate name, NaN, a number too
large for a float) is refused, as is what has more names than any request. Pictures are measured by
their header before a pixel is decoded.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import json
import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from pathflip.errors import PathFLIPError
from pathflip.slides.resample import picture_pixels

Receive = Callable[[], Awaitable[Mapping[str, Any]]]

MAX_MARKS = 1 << 20
"""Commas and opening brackets of a body, so most values that parsing can make of it: a body of
``[],[],…`` becomes twenty times its size before any of it can be counted."""
MAX_NAMES = 10_000
"""Names of fields and entries of lists in one body; a valid one has fewer than 4,000."""
_IMAGE_MODES = {"1", "L", "LA", "P", "RGB", "RGBA"}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of one ingress replica.

    Args:
        concurrent: Most running requests; more are refused with 429.
        body_bytes: Largest body of a request.
        body_s: Seconds a client has to send its body.
        answer_s: Seconds until an answer must begin.
        stream_s: Seconds until a streamed answer must end.
        max_tokens: Most tokens of an answer, and their number where the client names none.
        image_pixels: Most pixels of a picture.
        retry_s: Seconds in the header Retry-After.
    """

    concurrent: int = 64
    body_bytes: int = 10 << 20
    body_s: float = 20.0
    answer_s: float = 60.0
    stream_s: float = 600.0
    max_tokens: int = 512
    image_pixels: int = 16 << 20
    retry_s: int = 1

    @property
    def of_client(self) -> int:
        """Most running requests of one client, where there are several: three quarters of all."""
        return self.concurrent - self.concurrent // 4


class RequestError(PathFLIPError):
    """A request that is refused; ``code`` decides the status (:mod:`serve.middleware`)."""

    default_code = "bad_request"


async def read_body(receive: Receive, headers: Mapping[str, str], limits: Limits) -> bytes | None:
    """Read the body of a request.

    Returns:
        The body; None if the client left before it was whole.

    Raises:
        RequestError: ``too_large``, as soon as that is known, or ``too_slow``.
    """
    length = headers.get("content-length", "")
    # The HTTP server refuses what is no number; a false length is found while counting.
    declared = int(length) if length.isascii() and length.isdigit() and len(length) < 4000 else 0
    if declared > limits.body_bytes:
        raise _too_large(limits)
    parts, size = [], 0
    try:
        async with asyncio.timeout(limits.body_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                part = message.get("body", b"")
                size += len(part)
                if size > limits.body_bytes:
                    raise _too_large(limits)
                parts.append(part)
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        raise RequestError(
            f"The body did not arrive within {limits.body_s:g} s.", code="too_slow"
        ) from None


def _too_large(limits: Limits) -> RequestError:
    return RequestError(
        f"A request body has at most {limits.body_bytes:,} bytes.", code="too_large"
    )


def strict_json(body: bytes, *, names: int = MAX_NAMES) -> Any:
    """Parse JSON that has one reading only.

    Args:
        body: The body of a request.
        names: Most names of fields and entries of lists that are values of these.

    Raises:
        RequestError: It is not UTF-8 or not JSON, is nested too deeply, names a field twice, or
            holds a number that is not finite or has thousands of digits, or more names and entries
            than ``names``, each of which could be an error of its own, or more values than
            :data:`MAX_MARKS`.
    """
    if sum(map(body.count, (b",", b"[", b"{"))) > MAX_MARKS:
        raise RequestError(f"The body has more than {MAX_MARKS:,} values.", code="too_large")
    left = names

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal left
        left -= len(pairs) + sum(len(value) for _, value in pairs if isinstance(value, list))
        if left < 0:
            raise RequestError(
                f"The body has more than {names:,} names and entries of lists.",
                code="too_large",
            )
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("duplicate name")
        return found

    try:
        text = body.decode("utf-8")
        return json.loads(
            text, parse_constant=_no_constant, parse_float=_float, object_pairs_hook=once
        )
    except (ValueError, RecursionError):
        raise RequestError("The body is not valid JSON.", code="bad_json") from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("not finite")
    return value


def read_image(data: str, *, pixels: int) -> NDArray[np.uint8]:
    """Decode a PNG or JPEG file given in base64.

    Args:
        data: The file in base64.
        pixels: Most pixels, by the file's header.

    Returns:
        RGB [h, w, 3], upright and on white: the pixels ``pathflip search --image`` takes.

    Raises:
        RequestError: ``bad_image``: it is neither of the two, too large, or damaged.
    """
    from PIL import Image

    def wrong(what: str) -> RequestError:
        return RequestError(f"The image {what}.", code="bad_image")

    try:
        raw = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise wrong("is not base64") from None
    try:
        with Image.open(io.BytesIO(raw), formats=("PNG", "JPEG")) as image:
            width, height = image.size
            if not 0 < width * height <= pixels:
                raise wrong(f"has {width * height:,} pixels, at most {pixels:,} are read")
            if image.mode not in _IMAGE_MODES:
                raise wrong("is not grey or RGB with 8 bits per channel")
            return picture_pixels(image)
    except RequestError:
        raise
    except Exception:  # Pillow's decoders raise anything for a damaged file
        raise wrong("cannot be read as PNG or JPEG") from None
