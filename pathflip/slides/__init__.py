"""Whole-slide images: open, scale, read (isolated and direct), tissue mask and quality scores.

Read in this order: ``scale`` (µm per pixel), ``slide`` (one open slide), ``tiff`` (the direct
path), ``tissue`` (where the tissue is), ``reader`` (the same in a process of its own), ``sources``
(which files are slides).
"""
