"""Location of an encoder's weights: a local folder, the hub's cache, or the hub.

Only safetensors are used: a pickle runs whatever its author put in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from pathflip.errors import EncoderError

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_WANTED = ["config.json", "preprocessor_config.json", "*.safetensors"]


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Weights of an encoder, local or still on the hub.

    Attributes:
        revision: Hub commit, or digest of a local folder's files.
        folder: Folder of the files; None while still on the hub.
    """

    revision: str
    folder: Path | None


def local_weights(folder: Path, *, name: str) -> Weights:
    """Find weights in a local folder: ``*.safetensors``, and ``config.json`` if needed.

    Raises:
        EncoderError: ``missing_weights`` or ``pickle_weights``.
    """
    if not folder.is_dir():
        raise EncoderError(
            f"Encoder {name}: there is no folder {folder}.",
            hint="Give the folder that holds model.safetensors.",
            code="missing_weights",
        )
    if not safetensors_of(folder):
        pickles = sorted(f.name for f in folder.iterdir() if f.suffix in _PICKLES)
        if pickles:
            raise pickled(name, f"the folder {folder} holds {pickles[0]}")
        raise EncoderError(
            f"Encoder {name}: the folder {folder} holds no .safetensors file.",
            hint="Give the folder that holds model.safetensors.",
            code="missing_weights",
        )
    return Weights(revision=_digest(folder), folder=folder)


def hub_weights(
    repository: str, *, name: str, revision: str | None = None, download: bool
) -> Weights:
    """Find weights of a hub repository, in the local cache if they are there.

    Args:
        repository: ``owner/name``.
        name: Name the user gave the encoder, for messages.
        revision: Commit, tag or branch; None means the cached one, else the newest.
        download: Fetch them if they are not cached; otherwise only check that this would work.

    Raises:
        EncoderError: ``missing_weights`` (not there, or no connection), ``gated_weights``,
            ``pickle_weights``.
    """
    import huggingface_hub
    from huggingface_hub import errors

    def snapshot(commit: str | None, *, offline: bool) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                repository,
                revision=commit,
                allow_patterns=_WANTED,
                ignore_patterns=["*/*"],
                local_files_only=offline,
            )
        )

    try:
        folder = snapshot(revision, offline=True)
        if safetensors_of(folder):
            return Weights(revision=folder.name, folder=folder)
    except (errors.LocalEntryNotFoundError, errors.IncompleteSnapshotError):
        pass
    with hub_errors(name, repository):
        api = huggingface_hub.HfApi()
        info = api.model_info(repository, revision=revision)
        files = [file.rfilename for file in info.siblings or ()]
        if not any(f.endswith(".safetensors") and "/" not in f for f in files):
            raise pickled(name, f"{repository} on the hub offers no .safetensors file")
        if not download:
            api.auth_check(repository)
            return Weights(revision=str(info.sha), folder=None)
        return Weights(revision=str(info.sha), folder=snapshot(info.sha, offline=False))


@contextmanager
def hub_errors(name: str, repository: str) -> Iterator[None]:
    """Say what failed when the hub was asked for a repository, and what to do.

    Raises:
        EncoderError: ``gated_weights``, ``missing_weights``.
    """
    from huggingface_hub import errors

    elsewhere = (
        f"or fetch them on a machine that may ('pathflip models pull {repository} --folder DIR') "
        "and set HF_HUB_CACHE to a copy of that folder here."
    )
    if own := _in_a_folder(name):
        elsewhere += f" Weights in a folder of their own: {own}."
    try:
        yield
    except errors.GatedRepoError as error:
        raise EncoderError(
            f"The weights of {name} ({repository}) are gated and this account has no access.",
            hint="Accept the licence on the model page and log in with 'hf auth login', "
            + elsewhere,
            code="gated_weights",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise EncoderError(
            f"The hub has no model {repository}, or it is private.",
            hint="Check the spelling, log in with 'hf auth login', " + elsewhere,
            code="missing_weights",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise EncoderError(
            f"The hub's {repository} has no such revision.",
            hint="Check what stands after the @.",
            code="missing_weights",
        ) from error
    except (errors.HfHubHTTPError, errors.OfflineModeIsEnabled, OSError) as error:
        raise _unreachable(name, repository, elsewhere) from error
    except Exception as error:
        # The hub's HTTP client has its own exceptions for a missing connection.
        if type(error).__module__.partition(".")[0] not in {"httpx", "httpx2", "httpcore2"}:
            raise
        raise _unreachable(name, repository, elsewhere) from error


def safetensors_of(folder: Path) -> list[Path]:
    """Return the weight files in a folder, sorted by name."""
    return sorted(folder.glob("*.safetensors"))


def _in_a_folder(name: str) -> str:
    """Write how an encoder is named whose weights are in a folder; empty for other models."""
    scheme, colon, _ = name.partition(":")
    if colon:
        return f"{scheme}:/path/to/folder"
    return "" if "/" in name else f"{name.partition('@')[0]}=/path/to/folder"


def _unreachable(name: str, repository: str, elsewhere: str) -> EncoderError:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    return EncoderError(
        f"The weights of {name} ({repository}) are not on this machine and the hub cannot be "
        "reached.",
        hint=f"{'Unset HF_HUB_OFFLINE' if HF_HUB_OFFLINE else 'Connect'} once, " + elsewhere,
        code="missing_weights",
    )


def pickled(name: str, what: str) -> EncoderError:
    """Return the error for weights that are there as pickles alone."""
    return EncoderError(
        f"Encoder {name}: {what}, and pathflip loads no pickles.",
        hint="Convert the weights to safetensors (docs/reference/encoders.md shows how) and name "
        f"their folder: {_in_a_folder(name)}.",
        code="pickle_weights",
    )


def _digest(folder: Path) -> str:
    files = [f for f in (folder / "config.json",) if f.exists()] + safetensors_of(folder)
    whole = hashlib.sha256()
    for file in files:
        stat = file.stat()
        whole.update(f"{file.name} {_file_digest(file, stat.st_size, stat.st_mtime_ns)}\n".encode())
    return whole.hexdigest()[:16]


@lru_cache(maxsize=64)
def _file_digest(file: Path, size: int, mtime_ns: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def bad_weights(name: str, problem: str) -> EncoderError:
    """Return the error for weights that do not fit the encoder they are named for."""
    return EncoderError(
        f"The weights of {name} cannot be used: {problem}.",
        hint="Check that the folder holds this model, complete.",
        code="bad_weights",
    )
