"""Writes the bytecode of the modules that commands import, by importing them in two processes.

    python requirements/bytecode.py        (Makefile calls it after requirements/install.sh)

A full compilation of the environment takes a hundred CPU seconds, and nine files of ten are never
imported. Elsewhere Python writes bytecode at the first import; where it may not
(PYTHONDONTWRITEBYTECODE), every command would compile torch and the rest again.
"""

# ruff: noqa: INP001
from __future__ import annotations

import os
import subprocess
import sys

GROUPS = (
    ("torch", "torch.optim.lr_scheduler", "torch.distributed", "torchmetrics", "transformers",
     "transformers.models.qwen3.modeling_qwen3", "transformers.models.qwen2.tokenization_qwen2",
     "transformers.generation", "peft", "sklearn", "sacrebleu", "rouge_score.rouge_scorer"),
    ("numpy", "cv2", "lance", "lancedb", "pyarrow.dataset", "scipy.sparse", "scipy.optimize",
     "openslide", "tifffile", "simplejpeg", "jinja2", "rich.progress", "typer", "ray.data",
     "ray.train.torch", "ray.serve"),
)  # fmt: skip
_IMPORT = """
import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ImportError:  # another lock leaves it out
        pass
"""


def main() -> None:
    """Import both groups at once; a module that cannot be imported is nobody's fault here."""
    plain = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    running = [
        subprocess.Popen([sys.executable, "-c", _IMPORT, *group], env=plain) for group in GROUPS
    ]
    for process in running:
        process.wait()


if __name__ == "__main__":
    main()
