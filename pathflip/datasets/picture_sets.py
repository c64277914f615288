"""Pictures with boxes from RefPath."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pathflip.datasets.check import entries
from pathflip.datasets.prepared import Options, Prepared, Table
from pathflip.errors import ConfigError
from pathflip.interop.tables import bad_line, clean


def refpath(root: Path, options: Options) -> Prepared:
    """Read boxes as outlines whose class is what is said of them, and a task for each sentence.

    A box with several sentences is asked for by its first. Two pictures with the same sentence
    share a task.
    """
    files = {path.stem: path for path in sorted(root.glob("*.jsonl"))}
    if options.split is not None:
        if options.split not in files:
            raise ConfigError(
                f"{root} has no {options.split}.jsonl.", hint=f"It has: {', '.join(files)}."
            )
        files = {options.split: files[options.split]}
    outlines: dict[str, list[tuple[str, list[list[tuple[float, float]]]]]] = {}
    pictures: dict[str, Path] = {}
    splits: dict[str, str] = {}
    said: dict[str, None] = {}
    passed: Counter[str] = Counter()
    for split, file in files.items():
        for number, entry in enumerate(entries(file, "image_id", "bbox", "expression"), start=1):
            text, box = _said(entry), entry.get("bbox")
            picture = root / "images" / Path(str(entry["image_id"])).name
            if not text:
                passed["boxes without words"] += 1
                continue
            if not picture.is_file():
                passed["boxes without their picture"] += 1
                continue
            if not isinstance(box, list) or len(box) != 4:
                raise bad_line(file, number, f"bbox is {box!r}")
            x0, y0, x1, y1 = (float(value) for value in box)
            if pictures.get(picture.stem, picture) != picture:
                raise bad_line(file, number, f"{picture.name} has the name of another picture")
            if not (x0 < x1 and y0 < y1):
                raise bad_line(file, number, f"bbox {box} is empty")
            ring = [(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0)]
            outlines.setdefault(picture.stem, []).append((text, [ring]))
            pictures[picture.stem] = picture
            if splits.setdefault(picture.stem, split) != split:
                raise bad_line(
                    file, number, f"{picture.name} is a picture of {splits[picture.stem]}, too",
                    hint="Leave it in one split, or take one with --split.",
                )  # fmt: skip
            said[text] = None
    rows = [
        {"slide": stem, "patient_id": stem, "split": split} for stem, split in splits.items()
    ]  # fmt: skip
    return Prepared(
        tables={"patients.csv": Table.of(rows, "slide", "patient_id", "split")},
        tasks=[
            {"name": text, "label": text, "kind": "presence", "prompts": [text],
             "templates": "CLASSNAME"}
            for text in said
        ],
        outlines=outlines,
        pictures=pictures,
        passed=passed,
    )  # fmt: skip


def _said(entry: Mapping[str, Any]) -> str:
    """Return the first sentence about a box; empty where there is none."""
    texts = entry.get("expression")
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list):
        return ""
    return next((clean(text) for text in texts if isinstance(text, str) and clean(text)), "")
