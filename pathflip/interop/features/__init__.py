"""Patch features of other tools, in and out, without embedding anything again.

The one record between a tool's files and the archive is :class:`FeatureFile`: a slide's patches as
they are stored. One module for each family of files reads and writes it, and knows nothing of
archives; the rest knows no file format::

    record.py       FeatureFile, and what is said of a file that cannot be used
    hdf5.py         TRIDENT, CLAM, STAMP, AtlasPatch, and HDF5 like theirs
    tensors.py      .pt files of PyTorch, read without executing them: CLAM, slide2vec, plain
    slidechat.py    CSV tables of SlideChat
    tables.py       .h5ad files of AnnData
    spatialdata.py  .zarr stores of SpatialData and LazySlide
    find.py         a folder's files, told by their content and joined with their coordinates
    apart.py        the reading of a file in a process of its own (apart_child.py)
    place.py        patches to regions and slots of the archive's grid, pure
    encoders.py     which encoder other tools mean by a name
    importing.py    files into the archive, by its one writer
    exporting.py    slides of an archive as files
"""
