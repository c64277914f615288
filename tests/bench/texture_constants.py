"""Print the constants of the texture encoder: run from the repository root, paste into the module.

``python -m tests.bench.texture_constants [CMU-1-Small-Region.svs]``

The mean and standard deviation of the unstandardised description over rendered tissue of every
kind under many stain strengths, at three resolutions, and, in equal parts, over the tissue of one
public slide, whose colours and grain no renderer has. Deviations have a floor, so that what never
varies there cannot dominate elsewhere.
"""

from __future__ import annotations

import sys

import numpy as np
from numpy.typing import NDArray

from pathflip import Slide
from pathflip.encoders import texture
from tests.unit.encoders import tissue

FLOOR = 0.1
HISTOGRAM_FLOOR = 0.3


def rendered() -> NDArray[np.uint8]:
    parts = [
        tissue.patches(name, seed=seed, n=4, mpp=mpp)
        for name in tissue.TISSUES
        for seed in range(12)
        for mpp in (0.5, 0.5, 0.35, 0.7)[seed % 4 :][:1]
    ]
    return np.concatenate(parts)


def real(path: str) -> NDArray[np.uint8]:
    parts = []
    with Slide(path) as slide:
        size0 = round(128 / slide.mpp)
        for y0 in range(0, slide.height - size0 + 1, size0 // 2):
            for x0 in range(0, slide.width - size0 + 1, size0 // 2):
                patch = slide.read(x0, y0, 256, mpp=0.5)
                if patch.std() > 12:
                    parts.append(patch)
    return np.stack(parts)


def main(paths: list[str]) -> None:
    samples = [rendered(), *(real(path) for path in paths)]
    described = [texture._describe([texture._measure(p) for p in sample]) for sample in samples]
    centre = np.mean([d.mean(0) for d in described], 0)
    scale = np.sqrt(np.mean([((d - centre) ** 2).mean(0) for d in described], 0))
    histogram = np.repeat(
        [name.startswith("histogram") for name in texture.BLOCKS], list(texture.BLOCKS.values())
    )
    scale = np.maximum(scale, np.where(histogram, HISTOGRAM_FLOOR, FLOOR))
    for name, values in (("_CENTRE", centre), ("_SCALE", scale)):
        print(f"{name} = (")
        for i in range(0, len(values), 12):
            print("    " + " ".join(f"{v:.3g}," for v in values[i : i + 12]))
        print(")")


if __name__ == "__main__":
    main(sys.argv[1:])
