"""Object stores, s3://, gs:// and az://, through Arrow, and the slides they hold.

Credentials and endpoints come from the environment variables and identity files of each store,
never from an address. Of what a store answers only the name of its error is ever repeated: the rest
may hold request ids, keys or signatures.
"""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, TypeVar

from pathflip.errors import ConfigError, SlideError

T = TypeVar("T")

SCHEMES = ("s3", "gs", "az")
BACKOFF_S = (2.0, 10.0)
"""Waits between attempts at a request; Arrow itself goes on trying for 6 s in each of them."""
_DENIED = re.compile(
    r"ACCESS_DENIED|AccessDenied|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|EXPIRED_TOKEN|"
    r"INVALID_CLIENT_TOKEN|PERMISSION_DENIED|UNAUTHENTICATED|Authentication|Authorization|"
    r"HTTP status code: 40[13]|HTTP status 40[13]|Forbidden",
)
_MISSING = re.compile(
    r"NO_SUCH_BUCKET|NO_SUCH_KEY|RESOURCE_NOT_FOUND|NOT_FOUND|ContainerNotFound|BlobNotFound"
)
_SIGNED = re.compile(r"[?&](X-Amz-|X-Goog-|AWSAccessKeyId=|Signature=|sig=)", re.IGNORECASE)
"""Parameters of addresses that were signed for somebody to use for a while."""
_NAME = re.compile(r"AWS Error ([A-Z_]+)|Status\(([A-Z_]+)|(curlCode: \d+)")


@dataclass(frozen=True, kw_only=True)
class StoredObject:
    """An object of a store.

    Attributes:
        uri: Its address, as ``s3://bucket/key``; keys are written as they are, not escaped.
        bytes: Its size.
        mtime_ns: Its time of modification in whole seconds, the most that listings and single
            requests agree on.
    """

    uri: str
    bytes: int
    mtime_ns: int


def arrow_filesystem(uri: str) -> tuple[Any, str]:
    """Return the Arrow file system of an address, and its path there.

    Raises:
        ConfigError: No Azure account is named (``azure_account``).
    """
    from pyarrow import fs

    if uri.startswith("az://"):  # Arrow takes an account from addresses alone, Lance from here
        account, key = (os.environ.get(f"AZURE_STORAGE_ACCOUNT_{what}") for what in ("NAME", "KEY"))
        if not account:
            raise ConfigError(
                "No Azure account is named.",
                hint="Set AZURE_STORAGE_ACCOUNT_NAME, and AZURE_STORAGE_ACCOUNT_KEY unless the "
                "machine has an identity.",
                code="azure_account",
            )
        return fs.AzureFileSystem(account, account_key=key), uri.removeprefix("az://")
    system, root = fs.FileSystem.from_uri(uri)
    return system, root


def is_remote(uri: str) -> bool:
    """Return whether a slide's uri is an address in an object store, not a path."""
    return "://" in uri


def check_address(uri: str) -> str:
    """Return the address without a slash at its end.

    Raises:
        ConfigError: It is of no store that is known, or holds credentials (``missing_source``).
    """
    scheme, _, rest = uri.partition("://")
    bucket = rest.partition("/")[0]
    if scheme not in SCHEMES or not bucket:
        raise ConfigError(
            f"{scheme}:// is no object store that slides are read from, or no bucket is named.",
            hint="Write s3://BUCKET/PREFIX, gs://… or az://…; anything else must be mounted.",
            code="missing_source",
        )
    refuse_credentials(uri)
    return uri.rstrip("/")


def refuse_credentials(uri: str) -> None:
    """Refuse an address that would carry keys or signatures into archives and logs.

    Raises:
        ConfigError: It holds credentials (``missing_source``), which the message does not repeat.
    """
    scheme, _, rest = uri.partition("://")
    # A secret key may hold slashes, and its @ stand behind the first of them.
    if re.search(r"[@?:]", rest.partition("/")[0]) or _SIGNED.search(rest):
        raise ConfigError(
            f"An address {scheme}://… holds more than a bucket and a key.",
            hint="Credentials and endpoints come from the environment (AWS_ACCESS_KEY_ID, "
            "AWS_ENDPOINT_URL and so on), so that no archive or log keeps them.",
            code="missing_source",
        )


def find_object(uri: str) -> StoredObject | None:
    """Return the object at an address; None if there is none (a prefix may be there).

    Raises:
        SlideError: ``access_denied``, ``store_failed``.
    """
    from pyarrow import fs

    system, path = _located(uri)
    info = _patiently(uri, lambda: system.get_file_info(path))
    return _stored(uri, info) if info.type == fs.FileType.File else None


def list_objects(uri: str, *, recursive: bool) -> list[StoredObject]:
    """Return the objects below a prefix, sorted by key.

    Raises:
        SlideError: ``not_a_file`` where there is no such bucket, ``access_denied``,
            ``store_failed``.
    """
    from pyarrow import fs

    system, path = _located(uri)
    wanted = fs.FileSelector(path, recursive=recursive, allow_not_found=True)
    scheme = uri.partition("://")[0]
    found = [
        _stored(f"{scheme}://{info.path}", info)
        for info in _patiently(uri, lambda: system.get_file_info(wanted))
        if info.type == fs.FileType.File
    ]
    return sorted(found, key=lambda one: PurePosixPath(one.uri))


class ObjectReader:
    """An object opened for reading at any place, by any thread.

    Attributes:
        bytes: Its size when it was opened.
        version: Its ETag then, or what the store has in its place.

    Raises:
        SlideError: ``not_a_file``, ``access_denied``, ``store_failed``; of every method.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        system, path = _located(uri)
        self._file = _patiently(uri, lambda: system.open_input_file(path))
        self.bytes: int = _patiently(uri, self._file.size)
        about = {
            str(key).lower(): value
            for key, value in (_patiently(uri, self._file.metadata) or {}).items()
        }
        self.version: bytes = about.get("etag") or about.get("last-modified") or b""

    def read(self, offset: int, count: int) -> bytes:
        """Return ``count`` bytes from ``offset``; fewer only behind the end of the object."""
        count = min(count, self.bytes - offset)

        def whole() -> bytes:
            data: bytes = self._file.read_at(count, offset)
            if len(data) != count:
                raise OSError(f"{len(data)} of {count} bytes came")
            return data

        return _patiently(self._uri, whole) if count > 0 else b""


def _stored(uri: str, info: Any) -> StoredObject:
    seconds = (info.mtime_ns or 0) // 10**9
    return StoredObject(uri=uri, bytes=int(info.size), mtime_ns=seconds * 10**9)


def _located(uri: str) -> tuple[Any, str]:
    """Return the Arrow file system of an address, and its path there.

    Raises:
        SlideError: Its key has a part that Arrow, or the way to the store, leaves out
            (``unsupported``).
    """
    scheme, _, path = uri.partition("://")
    if {"", ".", ".."} & set(path.split("/")):
        raise SlideError(
            f"{PurePosixPath(uri).name} has a key with an empty part, . or .. in it ({uri}).",
            hint="Rename the object.",
            code="unsupported",
        )
    return _filesystem(f"{scheme}://{path.partition('/')[0]}"), path


@functools.cache
def _filesystem(bucket: str) -> Any:
    try:
        return _patiently(bucket, lambda: arrow_filesystem(bucket)[0])
    except ConfigError as error:
        raise SlideError(error.message, hint=error.hint, code="access_denied") from error


def _patiently(uri: str, call: Callable[[], T]) -> T:
    """Return what a request returns, trying again where the store broke off."""
    for wait_s in BACKOFF_S:
        try:
            with _explained(uri):
                return call()
        except SlideError as error:
            if error.code != "store_failed":
                raise
            time.sleep(wait_s)
    with _explained(uri):
        return call()


@contextmanager
def _explained(uri: str) -> Iterator[None]:
    """Turn what Arrow raises inside the block into a SlideError that quotes nothing of it."""
    try:
        yield
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        text = str(error)
        name = PurePosixPath(uri).name
        if isinstance(error, FileNotFoundError) or _MISSING.search(text):
            raise SlideError(
                f"{name} is not at {uri}.",
                hint="Check the bucket and the key.",
                code="not_a_file",
            ) from None
        if _DENIED.search(text):
            raise SlideError(
                f"{name} cannot be read: {uri.partition('://')[0]}:// denies access to it.",
                hint="Check the credentials of every node and their rights to list and to read.",
                code="access_denied",
            ) from None
        said = _NAME.search(text)
        why = next(filter(None, said.groups())) if said else type(error).__name__
        if isinstance(error, OSError) and text.endswith("bytes came"):
            why = text
        raise SlideError(
            f"{name} cannot be read from its object store ({why}).",
            hint="Check endpoint, region and network of every node, then run the same command "
            "again.",
            code="store_failed",
        ) from None
