"""``python -m jobs.ingest`` is ``pathflip ingest``."""

import sys

from pathflip.cli import main

main(["ingest", *sys.argv[1:]])
