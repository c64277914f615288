"""The archive of slides, regions and features: a LanceDB database at one URI.

A URI is a folder, or s3://, gs://, az:// through the same code.

:mod:`~pathflip.archive.archive` reads it, :mod:`~pathflip.archive.create` and
:mod:`~pathflip.archive.commit` write it, :mod:`~pathflip.archive.verify`,
:mod:`~pathflip.archive.repair` and :mod:`~pathflip.archive.maintain` keep it whole, and
:mod:`~pathflip.archive.search` searches it.
"""

from pathflip.archive.archive import READY, Archive, vectors
from pathflip.archive.settings import CAPTIONS

__all__ = ["CAPTIONS", "READY", "Archive", "vectors"]
