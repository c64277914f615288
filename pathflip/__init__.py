"""pathflip: from whole-slide images and reports to a searchable, trainable archive."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Archive", "PathFLIP", "Slide", "__version__"]

if TYPE_CHECKING:
    from pathflip.archive import Archive
    from pathflip.models import PathFLIP
    from pathflip.slides.slide import Slide


def __getattr__(name: str) -> Any:
    """Import the public classes on first use: ``import pathflip`` itself stays instant."""
    if name == "Archive":
        from pathflip.archive import Archive

        return Archive
    if name == "PathFLIP":
        from pathflip.models import PathFLIP

        return PathFLIP
    if name == "Slide":
        from pathflip.slides.slide import Slide

        return Slide
    raise AttributeError(f"module 'pathflip' has no attribute {name!r}")
