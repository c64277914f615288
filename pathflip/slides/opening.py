"""Opens slide files with OpenSlide, and says of those it does not open why, and what to do."""

from __future__ import annotations

from pathlib import Path

import openslide

from pathflip.errors import SlideError
from pathflip.slides.dicom import unread_dicom
from pathflip.slides.sources import OPENSLIDE_FLOOR, is_dicom, version_numbers
from pathflip.slides.structure import compression_name, unsupported_doubt
from pathflip.slides.tiff import TiffLayout


def open_file(source: Path, *, name: str, layout: TiffLayout | None = None) -> openslide.OpenSlide:
    """Open a file with OpenSlide.

    Args:
        source: The file; of a DICOM series one of its files.
        name: Name of the slide, for messages.
        layout: Its tags, where they are known.

    Raises:
        SlideError: ``unsupported``, ``unreadable``.
    """
    version = openslide.__library_version__
    if version_numbers(version) < OPENSLIDE_FLOOR:
        raise SlideError(
            f"{name} is not opened by OpenSlide {version}, which crafted files make "
            "write out of bounds (CVE-2026-48977, CVE-2026-54604).",
            hint="pip install openslide-bin==4.0.1.2 (distribution packages are old).",
            code="unsupported",
        )
    try:
        return openslide.OpenSlide(str(source))
    except openslide.OpenSlideUnsupportedFormatError as error:
        if layout is not None and (unsupported := unsupported_doubt(layout)):
            raise unsupported.error() from error
        raise SlideError(
            f"{name} is in no format OpenSlide knows.",
            hint="It may be truncated, or an ordinary image: convert it to a tiled pyramid.",
            code="unreadable",
        ) from error
    except openslide.OpenSlideError as error:
        if is_dicom(source) and (unread := unread_dicom(str(error))):
            raise SlideError(
                f"{name} {unread}, which OpenSlide does not read.",
                hint="Convert it to frames of baseline JPEG, one plane and one optical path.",
                code="unsupported",
            ) from error
        if layout is not None and "nsupported TIFF compression" in str(error):
            raise SlideError(
                f"{name} is compressed by {compression_name(layout)}, which "
                "OpenSlide does not read in this format.",
                hint="Convert it to JPEG or deflate, with vips tiffsave for example.",
                code="unsupported",
            ) from error
        if "TIFF tag: 258" in str(error):  # BitsPerSample, which is 1 where it is missing
            raise SlideError(
                f"{name} holds black or white, a bit a pixel.",
                hint="Convert it to a pyramid of 8-bit RGB, with vips tiffsave for example.",
                code="unsupported",
            ) from error
        raise SlideError(
            f"{name} cannot be opened: {error}.",
            hint="The file is damaged; copy it again from its source.",
            code="unreadable",
        ) from error
