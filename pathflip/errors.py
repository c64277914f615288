"""Errors that a user can fix, with a hint.

The tree::

    PathFLIPError          anything pathflip raises on purpose
      ConfigError          a setting, flag or file the user gave is wrong (exit code 2)
      SlideError           one slide cannot be used; carries the reason code stored in the archive
      ArchiveError         the archive is missing, damaged, locked or made with other settings
      EncoderError         an encoder is unknown, gated, missing its weights or does not fit
      CheckpointError      a run, checkpoint or model folder is missing, incomplete or damaged
      TrainingError        training cannot go on: losses that are not finite, too little data

Every error has a ``code`` (short, stable, for machines), a message (what, where) and a ``hint``
(what to do about it). Programmer errors stay Python's own.

Between processes an error travels as :meth:`PathFLIPError.to_dict` and is made again by
:func:`from_dict`; rows of Ray Data, a run's ``.stopped.json`` and replicas of the service use it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class PathFLIPError(Exception):
    """Base of every error pathflip raises on purpose.

    Args:
        message: Description of the fault and its place, one sentence.
        hint: Remedy for the user, one sentence.
        code: Short stable code.
    """

    default_code = "error"

    def __init__(self, message: str, *, hint: str = "", code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code or self.default_code

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()

    def as_json(self) -> dict[str, str]:
        """Return what commands, files and the service show of the error: code, message, hint."""
        return {"code": self.code, "message": self.message, "hint": self.hint}

    def to_dict(self) -> dict[str, str]:
        """Return the error as plain text for another process; see :func:`from_dict`."""
        named = (kind.__name__ for kind in type(self).__mro__ if kind.__name__ in _KINDS)
        return {"kind": next(named), **self.as_json()}


class ConfigError(PathFLIPError):
    """A setting, flag or file the user gave is wrong. The command line exits with 2."""

    default_code = "config"


class SlideError(PathFLIPError):
    """One slide cannot be used. ``code`` is the reason code stored in the archive."""

    default_code = "unreadable"


class ArchiveError(PathFLIPError):
    """The archive is missing, damaged, locked, or made with other settings."""

    default_code = "archive"


class EncoderError(PathFLIPError):
    """An encoder is unknown, gated, missing its weights, or does not fit the tiling."""

    default_code = "encoder"


class CheckpointError(PathFLIPError):
    """A run, checkpoint or model folder is missing, incomplete or damaged."""

    default_code = "checkpoint"


class TrainingError(PathFLIPError):
    """Training cannot go on: losses that are not finite, or too little data."""

    default_code = "training"


_KINDS: dict[str, type[PathFLIPError]] = {
    kind.__name__: kind
    for kind in (
        PathFLIPError,
        ConfigError,
        SlideError,
        ArchiveError,
        EncoderError,
        CheckpointError,
        TrainingError,
    )
}


def from_dict(note: Mapping[str, Any]) -> PathFLIPError:
    """Make the error that :meth:`PathFLIPError.to_dict` described.

    Only the classes of this module are ever made, whatever the description says: one of an unknown
    kind becomes a plain :class:`PathFLIPError`.

    Args:
        note: {"kind", "message", "hint", "code"}; what is missing counts as empty.
    """
    kind = _KINDS.get(str(note.get("kind")), PathFLIPError)
    return kind(
        str(note.get("message", "")),
        hint=str(note.get("hint", "")),
        code=str(note.get("code", "")) or None,
    )


REASONS: dict[str, str] = {
    "unreadable": "OpenSlide cannot open the file or it is damaged.",
    "not_a_file": "The path is missing, a broken link, or not readable with these permissions.",
    "unsupported": "The format is not one pathflip opens.",
    "orientation": "The file asks to be turned or mirrored, which readers of tiles leave undone.",
    "not_rgb": "The file holds CMYK, Lab or other colours, not RGB.",
    "colours_conflict": "The header of the file and its frames state different colours.",
    "extra_samples": "The file has samples beyond RGB that would be taken for transparency.",
    "bit_depth": "The file stores its values in the lower bits of 16, which read as nearly black.",
    "several_images": "The file holds several images, of which one would be read.",
    "reader_limits": "The file declares a geometry beyond the reader's safety limits.",
    "reader_crash": "The reader process died on this slide three times.",
    "worker_crash": "Worker processes died on this slide three times, out of memory or killed.",
    "timeout": "Reading took longer than the deadline allows.",
    "several_series": "The folder holds more than one DICOM series.",
    "bad_outline": "The tissue outline given for the slide cannot be used.",
    "needs_mpp": "The file states no resolution and none was given for it.",
    "mpp_out_of_range": "The resolution is outside 0.1 to 10 µm per pixel.",
    "mpp_conflict": "The file states two resolutions.",
    "anisotropic_pixels": "Horizontal and vertical resolution differ by more than 5 %.",
    "mpp_too_coarse": "The slide is coarser than the requested resolution.",
    "source_changed": "The file changed between planning and reading.",
    "access_denied": "The object store denies access to the slide.",
    "store_failed": "The object store broke off, or gave no usable answer, several times.",
    "stage_failed": "There is no room for a local copy of the slide, or no folder for it.",
    "too_many_bad_tiles": "More tiles are damaged than the run allows.",
    "damaged_rows": "Its rows in the archive were damaged; the next ingest makes them again.",
    "bad_features": "The encoder returned values that are not finite.",
    "out_of_memory": "Embedding the slide ran out of memory even one patch at a time.",
}
"""Reason codes of quarantined slides and what each means."""
