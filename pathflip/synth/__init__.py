"""A synthetic cohort with planted truth, and large synthetic slides.

``make_cohort`` writes slides that OpenSlide opens together with reports, labels, questions and
lesion outlines, all true of the pixels; ``make_slide`` writes one slide of any size fast. Tissue is
drawn in optical density from periodic textures (``atlas``), placed by a sampled scene (``scene``)
and described in words (``text``). ``make_tree_cohort`` writes slides for patch trees with a caption
of every node (``trees``, ``tree_pixels``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathflip.synth.cohort import Cohort, make_cohort
    from pathflip.synth.large import make_slide
    from pathflip.synth.trees import TreeCohort, make_tree_cohort

__all__ = ["Cohort", "TreeCohort", "make_cohort", "make_slide", "make_tree_cohort"]


def __getattr__(name: str) -> Any:
    """Import on first use: drawing needs OpenCV, which `import pathflip.synth` must not."""
    if name in ("Cohort", "make_cohort"):
        from pathflip.synth import cohort

        return getattr(cohort, name)
    if name == "make_slide":
        from pathflip.synth.large import make_slide

        return make_slide
    if name in ("TreeCohort", "make_tree_cohort"):
        from pathflip.synth import trees

        return getattr(trees, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
