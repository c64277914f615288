"""A synthetic cohort with planted truth, and large synthetic slides.

``make_cohort`` writes slides that OpenSlide opens together with reports, labels, questions and
lesion outlines, all true of the pixels; ``make_slide`` writes one slide of any size fast. Tissue is
drawn in optical density from periodic textures (``atlas``), placed by a sampled scene (``scene``)
and described in words (``text``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathflip.synth.cohort import Cohort, make_cohort
    from pathflip.synth.large import make_slide

__all__ = ["Cohort", "make_cohort", "make_slide"]


def __getattr__(name: str) -> Any:
    """Import on first use: drawing needs OpenCV, which `import pathflip.synth` must not."""
    if name in ("Cohort", "make_cohort"):
        from pathflip.synth import cohort

        return getattr(cohort, name)
    if name == "make_slide":
        from pathflip.synth.large import make_slide

        return make_slide
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
