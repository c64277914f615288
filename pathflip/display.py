"""Results as HTML for notebooks: pictures and tables of bounded size, without script.

A notebook keeps what it shows and shows it on a page of its own: pictures are inside, styles are
attributes, no more than ``MAX_ROWS`` rows and ``MAX_TEXT`` characters of a text are shown, and what
comes from slides and users is escaped.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pathflip.archive import Archive

MAX_ROWS = 20
MAX_TEXT = 300
THUMBNAILS = 6
"""Slides of an archive that are shown."""
THUMBNAIL_PX = 120
QUALITY = 85
"""JPEG quality of pictures."""

_PAGE = """\
<div style="max-width:60em">
<p style="margin:0 0 .4em"><b>{{ title }}</b>{% if note %} · {{ note }}{% endif %}</p>
{% for one in pictures %}
<img src="{{ one.uri }}" alt="{{ one.alt }}" title="{{ one.alt }}" style="max-width:100%;margin:0 .4em .4em 0">
{% endfor %}
{% if rows %}
<table>
<thead><tr>{% for name in columns %}<th style="text-align:left">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}
<tr>{% for cell in row %}<td style="text-align:left">{% if cell.uri is defined %}<img src="{{ cell.uri }}" alt="{{ cell.alt }}">{% else %}{{ cell }}{% endif %}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
{% endif %}
{% if left %}<p style="margin:.4em 0 0">{{ left }} more</p>{% endif %}
</div>
"""  # noqa: E501


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture inside a page.

    Attributes:
        uri: Its JPEG or PNG, see :func:`data_uri`.
        alt: Description in words.
    """

    uri: str
    alt: str


def page(
    title: str,
    *,
    note: str = "",
    pictures: Sequence[Picture] = (),
    columns: Sequence[str] = (),
    rows: Iterable[Sequence[str | Picture]] = (),
    total: int | None = None,
) -> str:
    """Return pictures and a table as HTML.

    Args:
        title: Heading.
        note: Text behind it.
        pictures: Pictures above the table.
        columns: Names of the table's columns.
        rows: Cells of its rows; those beyond ``MAX_ROWS`` are left out.
        total: Number of rows there are; by default as many as were given.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    given = [[_cell(cell) for cell in row] for row in rows]
    shown = given[:MAX_ROWS]
    return environment.from_string(_PAGE).render(
        title=_cell(title),
        note=_cell(note),
        pictures=pictures,
        columns=columns,
        rows=shown,
        left=max(0, (len(given) if total is None else total) - len(shown)),
    )


def _cell(cell: str | Picture) -> str | Picture:
    if isinstance(cell, str) and len(cell) > MAX_TEXT:
        return cell[: MAX_TEXT - 1] + "…"
    return cell


def archive_page(archive: Archive) -> str:
    """Return an overview of an archive: its counts, and the thumbnails of some slides."""
    columns = ["slide_id", "status", "n_regions", "n_patches"]
    slides = archive.slides(columns=columns).to_pylist()
    ready = [row for row in slides if row["status"] == "ready"]
    by_status = [row["status"] for row in slides]
    counts = {
        **{status: by_status.count(status) for status in sorted(set(by_status))},
        "regions": sum(row["n_regions"] or 0 for row in ready),
        "patches": sum(row["n_patches"] or 0 for row in ready),
    }
    pictures = []
    for row in ready[:THUMBNAILS]:
        small = shrunk(archive.slide(row["slide_id"])["thumbnail"], THUMBNAIL_PX)
        if small:
            pictures.append(Picture(uri=data_uri(small), alt=row["slide_id"]))
    rows = [(name, f"{count:,}") for name, count in counts.items()]
    vectors = {
        "encoder": archive.encoders(),
        "model": archive.models(),
        "slide encoder": archive.slide_encoders(),
    }
    for kind, held in vectors.items():
        rows += [(kind, f"{name}, {entry['dim']} numbers") for name, entry in held.items()]
    return page(
        "Archive", note=archive.uri, pictures=pictures, columns=("of the archive", ""), rows=rows
    )


# -- pictures --------------------------------------------------------------------------------------


def data_uri(image: bytes | None) -> str:
    """Return a JPEG or PNG as a data URI, "" for none."""
    if not image:
        return ""
    kind = "png" if image.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def jpeg(picture: NDArray[np.uint8], *, px: int) -> bytes:
    """Return an RGB picture as JPEG, its longer side at most ``px`` pixels."""
    import cv2
    import simplejpeg

    height, width = picture.shape[:2]
    shrink = min(1.0, px / max(height, width))
    if shrink < 1:
        size = (max(1, round(width * shrink)), max(1, round(height * shrink)))
        picture = np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), np.uint8)
    data: bytes = simplejpeg.encode_jpeg(np.ascontiguousarray(picture), quality=QUALITY)
    return data


def shrunk(image: bytes | None, px: int) -> bytes:
    """Return a JPEG with its longer side at most ``px`` pixels; empty where it is damaged."""
    import simplejpeg

    if not image:
        return b""
    try:
        return jpeg(simplejpeg.decode_jpeg(image, fastdct=False), px=px)
    except ValueError:
        return b""


# -- data frames -----------------------------------------------------------------------------------


def frame(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> Any:
    """Return rows as a pandas DataFrame, with these columns also where there are no rows."""
    import pyarrow as pa

    return pa.table({name: [row[name] for row in rows] for name in columns}).to_pandas()
