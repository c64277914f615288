"""Parts shared by all reports: rendering and writing, thumbnails in SVG, numbers for people."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pathflip.display import data_uri
from pathflip.errors import ConfigError
from pathflip.files import write_file

if TYPE_CHECKING:
    from pathflip.checkpoints import Run, TreeRun


def write_page(template: str, path: Path, *, beside: bool = False, **values: Any) -> Path:
    """Render a template into a file, whole or not at all.

    Args:
        template: Template of the package.
        path: The file.
        beside: Whether the page shows pictures that lie beside it, too.
        values: Values of the template.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    import pathflip

    environment = Environment(
        loader=PackageLoader("pathflip", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": count,
        "size": size,
        "figures": figures,
        "mpp": mpp,
        "time": duration,
    }
    style = environment.get_template("style.css").render()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    page = environment.get_template(template).render(
        **values,
        style=Markup(style),  # ours, and exactly what the digest is of
        style_digest=digest,
        beside=beside,
        version=pathflip.__version__,
    )
    with reported(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, page.encode("utf-8", "replace"))
    return path


@contextmanager
def reported(path: Path) -> Iterator[None]:
    """Raise the ``ConfigError`` of a report that cannot be written."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"The report {path} cannot be written: {error.strerror}.",
            hint="Give a file in a folder you may write.",
            code="out",
        ) from error


def count(value: int | None) -> str:
    """Format a whole number."""
    return "–" if value is None else f"{value:,}"


def figures(value: float | None, digits: int = 3) -> str:
    """Format a number to so many significant digits, never in powers of ten."""
    if value is None:
        return "–"
    if not value:
        return "0"
    places = max(0, digits - 1 - int(np.floor(np.log10(abs(value)))))
    return f"{value:,.{places}f}"


def mpp(value: float | None) -> str:
    """Format a resolution, µm/px."""
    return "–" if value is None else f"{value:.4g}"


def size(value: float | None) -> str:
    """Format a number of bytes."""
    if value is None or value < 0:
        return "–"
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:,.0f} {unit}" if unit == "bytes" else f"{figures(value)} {unit}"


def duration(value: float | None) -> str:
    """Format a time in seconds."""
    if value is None:
        return "–"
    if value < 60:
        return f"{figures(value, 2)} s"
    whole = round(value)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {whole % 60:02d} s"


def about_run(run: Run | TreeRun) -> dict[str, Any]:
    """Return what every report says of a run; ``parameters`` is None of a model without any."""
    parameters = getattr(run.model, "parameters", None)
    return {
        "name": run.name,
        "fingerprint": run.fingerprint,
        "encoder": run.encoder,
        "preset": run.config.get("preset", ""),
        "parameters": None if parameters is None else sum(p.numel() for p in parameters()),
    }


def metric_row(
    name: str,
    value: float | None,
    interval: Sequence[float] | None,
    chance: float,
    note: str,
    *,
    n: int | None = None,
) -> dict[str, Any]:
    """Return a row of a table of metrics: a value with its interval beside chance."""
    return {
        "name": name,
        "value": value,
        "interval": interval,
        "chance": chance,
        "note": note,
        "n": n,
        "better": value is not None and (interval[0] if interval else value) > chance,
    }


def slide_view(row: dict[str, Any], px: int) -> dict[str, Any] | None:
    """Return a slide's thumbnail for an SVG in level-0 px: JPEG, data URI and extent there."""
    import cv2
    import simplejpeg

    if not row["thumbnail"] or not row["width"] or not row["mpp"] or not row["thumbnail_mpp"]:
        return None
    try:
        rgb = simplejpeg.decode_jpeg(row["thumbnail"], fastdct=False)
    except ValueError:
        return None
    height, width = rgb.shape[:2]
    shrink = min(1.0, px / max(height, width))
    if shrink < 1:
        smaller = (max(1, round(width * shrink)), max(1, round(height * shrink)))
        rgb = np.asarray(cv2.resize(rgb, smaller, interpolation=cv2.INTER_AREA), np.uint8)
    to_level0 = row["thumbnail_mpp"] / row["mpp"]
    jpeg: bytes = simplejpeg.encode_jpeg(np.ascontiguousarray(rgb), quality=82)
    return {
        "jpeg": jpeg,
        "uri": data_uri(jpeg),
        "width": row["width"],
        "height": row["height"],
        # The thumbnail may reach beyond the slide by part of one of its pixels.
        "image_w": round(width * to_level0, 2),
        "image_h": round(height * to_level0, 2),
    }
