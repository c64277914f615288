"""Evaluation of models: retrieval, zero-shot classification, grounding, answers, captions.

Read :mod:`~pathflip.evaluation.encode` first: one pass over the slides feeds every suite. Then
:mod:`~pathflip.evaluation.retrieval`, :mod:`~pathflip.evaluation.zeroshot` (its prompts are those
of :mod:`~pathflip.evaluation.prompts`) and :mod:`~pathflip.evaluation.grounding`; intervals are
those of :mod:`~pathflip.evaluation.bootstrap`.

Models of patches and texts are measured apart: :mod:`~pathflip.evaluation.patch_text` first (levels
and how they are pooled), then :mod:`~pathflip.evaluation.tiles`.
"""
