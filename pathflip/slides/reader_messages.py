"""Messages between a ``SlideReader`` and its process.

A message is two lengths, a JSON header, then the blobs whose sizes the header lists. The process
answers a request with one message, the result or ``{"error": {code, message, hint}}``; no request
comes before the last was answered. That it has begun to work on one it says by the last byte of the
memory it shares with its owner, since a message more would wake both once more.
"""

from __future__ import annotations

import json
import select
import socket
import struct
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from pathflip.geometry import Regions

_LENGTHS = struct.Struct(">IQ")
"""Bytes of the header, and of all blobs."""
_PART = 1 << 16


def write_message(
    connection: socket.socket, header: dict[str, Any], blobs: Sequence[bytes] = ()
) -> None:
    """Send a header, JSON, and the blobs that go with it."""
    sizes = [len(blob) for blob in blobs]
    text = json.dumps({**header, "blobs": sizes}).encode()
    connection.sendall(b"".join((_LENGTHS.pack(len(text), sum(sizes)), text, *blobs)))


def read_message(
    connection: socket.socket, *, deadline: float | None = None
) -> tuple[dict[str, Any], list[bytes]]:
    """Wait for a message: its header and blobs.

    Args:
        connection: The socket.
        deadline: ``time.monotonic()`` to wait until; None waits for ever.

    Raises:
        TimeoutError: The deadline passed.
        EOFError: The other end is gone.
    """
    data, size = bytearray(), _LENGTHS.size
    while len(data) < size:
        if deadline is not None:
            # An answer that waited for us came in time, however late we collect it.
            left = max(0.0, deadline - time.monotonic())
            if not select.select([connection], [], [], left)[0]:
                raise TimeoutError
        part = connection.recv(max(_PART, min(size - len(data), 16 * _PART)))
        if not part:
            raise EOFError
        data += part
        if size == _LENGTHS.size <= len(data):
            size += sum(_LENGTHS.unpack_from(data))
    length, _ = _LENGTHS.unpack_from(data)
    whole, at = memoryview(data), _LENGTHS.size + length
    header = json.loads(bytes(whole[_LENGTHS.size : at]))
    blobs = []
    for own in header["blobs"]:
        blobs.append(bytes(whole[at : at + own]))
        at += own
    return header, blobs


def pack_regions(regions: Regions) -> list[bytes]:
    """A slide's regions as the blobs of a message."""
    return [
        np.asarray(regions.rx, np.int32).tobytes(),
        np.asarray(regions.ry, np.int32).tobytes(),
        np.asarray(regions.x0, np.int64).tobytes(),
        np.asarray(regions.y0, np.int64).tobytes(),
        np.asarray(regions.patch_mask, np.uint8).tobytes(),
        np.asarray(regions.patch_tissue, np.float32).tobytes(),
        np.asarray(regions.tissue_fraction, np.float32).tobytes(),
    ]


def unpack_regions(blobs: Sequence[bytes], *, size0: int, slots: int) -> Regions:
    """The inverse of :func:`pack_regions`."""
    return Regions(
        rx=np.frombuffer(blobs[0], np.int32),
        ry=np.frombuffer(blobs[1], np.int32),
        x0=np.frombuffer(blobs[2], np.int64),
        y0=np.frombuffer(blobs[3], np.int64),
        size0=size0,
        patch_mask=np.frombuffer(blobs[4], np.uint8).astype(bool).reshape(-1, slots),
        patch_tissue=np.frombuffer(blobs[5], np.float32).reshape(-1, slots),
        tissue_fraction=np.frombuffer(blobs[6], np.float32),
    )
