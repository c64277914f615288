"""Whole-slide images: open, scale, read (isolated and direct), tissue masks and quality scores.

Read in this order: ``slide`` (one open slide), ``scale`` (its µm per pixel), ``resample`` (area
averages), ``tiff`` and ``dicom`` (layout of files, limits), ``tiles`` (codecs), ``direct`` (tiles
into patches), ``tissue``, ``outlines`` and ``quality`` (which patches to embed), ``reader`` (the
same in a process of its own: ``reader_process``, ``reader_child``), ``sources`` (which files are
slides), and for slides of object stores ``objects``, ``stage_cache`` and ``staging`` (copies of
them as files).
"""
