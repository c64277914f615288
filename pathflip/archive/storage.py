"""Paths, opening and error messages of an archive's tables.

Local paths and object stores (s3://, gs://, az://) share one code path; Lance and Arrow read
credentials and endpoints from their usual environment variables. Repair and free-space messages
exist for local paths only, see :func:`is_local`.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pathflip.errors import ArchiveError, PathFLIPError
from pathflip.slides.objects import arrow_filesystem, refuse_credentials

OBJECT_STORE_ON_DISK = "file-object-store://"
"""Lance's scheme for a folder treated as an object store; used to test remote access."""
_END = b"LANC"
"""End of every data file. Arrow takes an answer that is cut off before it says how long the file is
for that of an empty file, without an error."""
_TRIES = 3
SELF_DIGEST = "sha256:"  # prefix of config keys in ``files``: digests of its own data files


def is_local(uri: str) -> bool:
    """Return whether a normalised URI is a path on this machine."""
    return "://" not in uri


def normalise(uri: str | Path) -> str:
    """Return an absolute path for local archives, the URI without a trailing slash for others.

    Raises:
        ConfigError: The URI holds credentials.
    """
    text = str(uri)
    if text.startswith("file://"):
        text = text[len("file://") :]
    if "://" in text:
        refuse_credentials(text)
        return text.rstrip("/")
    return str(Path(text).expanduser().absolute())


def table_uri(uri: str, table: str) -> str:
    """Return the URI of one table's Lance dataset."""
    return f"{uri}/{table}.lance"


def open_table(uri: str, table: str, *, session: Any = None) -> Any:
    """Open the newest version of a table as a ``lance.LanceDataset``.

    Lance alone opens two kinds of damage without a word: a newest manifest that is gone (it falls
    back to the version before) and one overwritten with zeros (an empty version 0). Both are
    refused here.

    Args:
        uri: The archive.
        table: The table.
        session: A ``lance.Session`` whose caches are used; by default one of its own.

    Raises:
        ArchiveError: If the table is missing (``missing_table``), damaged or unreachable.
    """
    import lance

    where = table_uri(uri, table)
    if is_local(uri) and not Path(where, "_versions").is_dir():
        raise ArchiveError(
            f"The archive {uri} has no table {table}.",
            hint=_repair_hint(uri),
            code="missing_table",
        )
    # Noted before opening: another process may commit in between, and a later note would make a
    # whole table look as if it had lost its newest version.
    noted = newest_known_version(uri, table)
    with guarded(uri, f"open the table {table}", damaged=is_local(uri)):
        try:
            dataset = lance.dataset(where, session=session)
        except ValueError as error:
            # An object store has no folders to look at first.
            if is_local(uri) or "not found" not in str(error).lower():
                raise
            raise ArchiveError(
                f"The archive {uri} has no table {table}.",
                hint=f"Make one: pathflip ingest SLIDES --archive {uri}",
                code="missing_table",
            ) from error
        version = int(dataset.version)
    if version < 1 or not dataset.schema.names or version < noted:
        raise damaged_error(uri, f"the newest manifest of table {table} is lost or emptied")
    return dataset


def find_table(uri: str, table: str) -> Any:
    """Open a table as :func:`open_table` does; None if there is none."""
    try:
        return open_table(uri, table)
    except ArchiveError as error:
        if error.code != "missing_table":
            raise
        return None


def newest_known_version(uri: str, table: str) -> int:
    """Return the version Lance noted after its last commit; 0 if it noted none (or is remote)."""
    if not is_local(uri):
        return 0
    try:
        note = json.loads(
            Path(table_uri(uri, table), "_versions/latest_version_hint.json").read_text()
        )
        return int(note["version"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def has_version(uri: str, table: str) -> bool:
    """Return whether a table of a local archive has a version.

    Of a creation that was killed before the first there are folders and data files at most.
    """
    return any(Path(table_uri(uri, table), "_versions").glob("*.manifest"))


def local_tables(uri: str) -> list[str]:
    """Return the names of the table folders of a local archive, sorted."""
    return sorted(path.stem for path in Path(uri).glob("*.lance") if path.is_dir())


def data_paths(dataset: Any, table: str) -> dict[str, int]:
    """Return {path relative to the archive: fragment id} of the data files a version refers to."""
    return {
        f"{table}.lance/data/{file.path}": fragment.fragment_id
        for fragment in dataset.get_fragments()
        for file in fragment.data_files()
    }


def filesystem(uri: str) -> tuple[Any, str]:
    """Return the Arrow file system of an archive and the archive's path in it."""
    from pyarrow import fs

    if is_local(uri):
        return fs.LocalFileSystem(), uri
    if uri.startswith(OBJECT_STORE_ON_DISK):
        return fs.LocalFileSystem(), uri.removeprefix(OBJECT_STORE_ON_DISK)
    return arrow_filesystem(uri)


def digest_file(uri: str, path: str) -> tuple[str, int]:
    """Return the sha256 (hex) and the size of one data file of the archive, read as a stream.

    Raises:
        OSError: If the file is missing or cannot be read.
    """
    system, root = filesystem(uri)
    for _ in range(1 if is_local(uri) else _TRIES):
        digest, size, end = hashlib.sha256(), 0, b""
        with system.open_input_stream(f"{root}/{path}") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
                size += len(block)
                end = (end + block[-len(_END) :])[-len(_END) :]
        if is_local(uri) or end == _END:
            return digest.hexdigest(), size
    raise OSError("the store's answer ends before the file does")


def known_digests(uri: str) -> dict[str, tuple[str, int]]:
    """Return {path: (sha256, bytes)} of every data file that was digested; bytes -1 if unknown."""
    dataset = open_table(uri, "files")
    with guarded(uri, "read the table files", damaged=is_local(uri)):
        rows = dataset.to_table(columns=["path", "sha256", "bytes"]).to_pylist()
        config = dict(dataset.config())
    return own_digests(config) | {row["path"]: (row["sha256"], row["bytes"]) for row in rows}


def own_digests(config: Mapping[str, str]) -> dict[str, tuple[str, int]]:
    """Return the digests of the data files of ``files`` itself, from its configuration."""
    return {
        key.removeprefix(SELF_DIGEST): (value, -1)
        for key, value in config.items()
        if key.startswith(SELF_DIGEST)
    }


def rows_per_batch(schema: Any, *, budget: int = 32 << 20) -> int:
    """Return how many rows of a table fit a memory budget in bytes; 8192 at most."""
    import pyarrow as pa

    width = 0
    for kind in schema.types:
        if pa.types.is_fixed_size_list(kind):
            width += kind.list_size * kind.value_type.bit_width // 8
        else:
            width += 32_768 if pa.types.is_binary(kind) else 32
    return max(1, min(8192, budget // width))


def sql_in(column: str, values: Sequence[str]) -> str:
    """Return ``column IN (...)`` with every value quoted as an SQL string literal."""
    literals = ", ".join("'" + value.replace("'", "''") + "'" for value in values)
    return f"{column} IN ({literals})"


def is_failure(error: BaseException) -> bool:
    """Return whether an exception is a fault of data or storage.

    A panic in Lance's native code arrives as a ``BaseException`` that is not an ``Exception``.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


@contextmanager
def guarded(uri: str, doing: str, *, damaged: bool = False) -> Iterator[None]:
    """Turn faults of storage inside the block into an :class:`ArchiveError`.

    Args:
        uri: The archive.
        doing: The operation, as in "Cannot <doing>".
        damaged: Whether an unexplained fault means that the archive is damaged.
    """
    try:
        yield
    except PathFLIPError:
        raise
    except BaseException as error:
        if not is_failure(error):
            raise
        raise _explained(uri, doing, error, damaged=damaged) from error


def damaged_error(uri: str, what: str) -> ArchiveError:
    """Return the error for a damaged archive; its hint names the command that mends it."""
    return ArchiveError(
        f"The archive {uri} is damaged: {what}.", hint=_repair_hint(uri), code="damaged"
    )


def _repair_hint(uri: str) -> str:
    return f"Run: pathflip archive repair --archive {uri}"


def _explained(uri: str, doing: str, error: BaseException, *, damaged: bool) -> ArchiveError:
    # Lance reports every fault of the file system as text of one exception type.
    text = " ".join(str(error).split())
    low = text.lower()
    if "no space left" in low or "os error 28" in low or "quota exceeded" in low:
        free = "unknown"
        if is_local(uri):
            free = f"{shutil.disk_usage(_existing(uri)).free / 2**20:,.0f} MiB"
        return ArchiveError(
            f"Cannot {doing}: the disk of {uri} is full (free: {free}).",
            hint="Free some space and run the same command again; it continues where it stopped.",
            code="disk_full",
        )
    if "permission denied" in low or "os error 13" in low or "read-only file system" in low:
        return ArchiveError(
            f"Cannot {doing}: {uri} does not permit it.",
            hint="Check the owner and the permissions of the archive.",
            code="not_permitted",
        )
    if not is_local(uri):
        for code, (signs, what, hint) in _STORE_FAULTS.items():
            if any(sign in low for sign in signs):
                said = re.search(r"(?:status code|HTTP error): ([^:<,]+)|(AWS Error [^:.]+)", text)
                reason = f" ({said[1] or said[2]})" if said else ""
                what = f"Cannot {doing}: {what.format(uri)}{reason}."
                return ArchiveError(what, hint=hint, code=code)
    if damaged:
        return damaged_error(uri, f"cannot {doing} ({text[:200]})")
    return ArchiveError(f"Cannot {doing} in {uri}: {text[:300]}", code="io")


_STORE_FAULTS: dict[str, tuple[tuple[str, ...], str, str]] = {
    "not_permitted": (
        ("403 forbidden", "401 unauthorized", "access_denied", "access denied", "credential"),
        "the store of {} does not permit it",
        "Check the credentials in the environment (AWS_ACCESS_KEY_ID and the like) and what they "
        "permit.",
    ),
    "missing_bucket": (
        ("nosuchbucket", "no_such_bucket"),
        "the bucket of {} does not exist",
        "Make the bucket, or check its name, the region and the endpoint (AWS_ENDPOINT_URL).",
    ),
    "unreachable": (
        ("sending request", "response body", "status code: 5", "timed out", "timeout",
         "network_connection", "slow_down", "http status 5", "curlcode", "before the file does"),
        "the store of {} does not answer as it should, after many tries",
        "Run the same command again when the store is well; it continues where it stopped.",
    ),
}  # fmt: skip
"""{code: (signs in the text of an error, what is wrong, hint)}."""


def _existing(uri: str) -> Path:
    path = Path(uri)
    while not path.exists():
        path = path.parent
    return path
