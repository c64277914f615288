"""Pictures of patch trees: nodes read from their slide, as a captioner or a page shows them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pathflip.archive import Archive
from pathflip.archive.trees import read_trees, tree_spec
from pathflip.errors import ConfigError, SlideError
from pathflip.files import write_file
from pathflip.geometry import TREE_OFFSETS, TreeSpec, patch_tree
from pathflip.interop.tree_captions import tree_image_name
from pathflip.progress import Progress, Report
from pathflip.slides.reader import SlideReader
from pathflip.slides.staging import opened

if TYPE_CHECKING:
    from numpy.typing import NDArray

READ_TIMEOUT_S = 60.0
_COLUMNS = ("tree_id", "slide_id", "tx", "ty", "mpp", "levels", "node_mask")


@dataclass(frozen=True, kw_only=True)
class TreeImages:
    """Result of :func:`export_tree_images`.

    Attributes:
        images: Pictures written.
        skipped: Pictures that were there.
        trees: Trees whose pictures are there now.
        problems: {slide: "reason: message"} of slides that could not be read.
    """

    images: int
    skipped: int
    trees: int
    problems: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        """The document ``pathflip trees export --json`` prints."""
        return asdict(self)

    @property
    def exit_code(self) -> int:
        """0 all good, 3 some slides were left out."""
        return 3 if self.problems else 0


def tree_reader(spec: TreeSpec) -> SlideReader:
    """Return a reader process for nodes, which reads them as the trees job does."""
    return SlideReader(patches=64, px=spec.node_px, halving="exact")


def read_nodes(
    reader: SlideReader,
    slide: Mapping[str, Any],
    tree: Mapping[str, Any],
    *,
    spec: TreeSpec,
    nodes: Sequence[int] | NDArray[np.int64] | None = None,
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Yield (node, uint8 [px, px, 3]) of a tree, coarsest first, as the trees job reads them.

    Args:
        reader: Reader of :func:`tree_reader`.
        slide: Row of the slide.
        tree: Row of the tree.
        spec: Sizes of the archive's trees.
        nodes: Nodes to read; by default those that have features.

    Raises:
        SlideError: The slide cannot be read: ``not_a_file``, ``source_changed`` where its file is
            another one than was ingested, ``bad_tile`` where a node is damaged.
    """
    wanted = np.flatnonzero(tree["node_mask"]) if nodes is None else np.asarray(nodes, np.int64)
    if len(wanted):
        with opened(slide) as path:
            yield from _read_opened(reader, path, slide, tree, spec=spec, wanted=wanted)


def _read_opened(
    reader: SlideReader,
    path: Path,
    slide: Mapping[str, Any],
    tree: Mapping[str, Any],
    *,
    spec: TreeSpec,
    wanted: NDArray[np.int64],
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    shape = patch_tree(tree["tx"], tree["ty"], mpp=tree["mpp"], spec=spec)
    for level in range(len(TREE_OFFSETS)):
        group = wanted[shape.level[wanted] == level]
        if not len(group):
            continue
        reader.start_read(
            str(path),
            shape.rects[0, group],
            mpp=float(shape.mpp[group[0]]),
            px=spec.node_px,
            slide_mpp=slide["mpp"] if slide["mpp_source"] == "override" else None,
            timeout_s=READ_TIMEOUT_S,
        )
        read = reader.finish_read(px=spec.node_px)
        for at, node in enumerate(group.tolist()):
            if not read.ok[at]:
                raise SlideError(
                    f"Node {node} of tree {tree['tree_id']} is damaged in its file.",
                    hint="Copy the file again from its source.",
                    code="bad_tile",
                )
            yield node, read.pixels[at].copy()


def export_tree_images(
    archive: Archive,
    folder: str | Path,
    *,
    slides: Sequence[str] = (),
    progress: Report | None = None,
) -> TreeImages:
    """Write the nodes of trees as PNG files ``<slide>__t<tx>_<ty>__n<node>.png``.

    Files that are there are kept, so the same call goes on where one was stopped.

    Args:
        archive: The archive.
        folder: Folder for the files; made if it does not exist.
        slides: Slides by any of their names; all by default.
        progress: Called after each tree.

    Raises:
        ArchiveError: There are no trees (``no_trees``), or no such slide (``unknown_slide``).
        ConfigError: The folder cannot be written (``out``).
    """
    import cv2

    spec = tree_spec(archive)
    wanted = {archive.resolve(name) for name in slides}
    trees = [
        row
        for row in read_trees(archive, columns=_COLUMNS).to_pylist()
        if not wanted or row["slide_id"] in wanted
    ]
    target, begun = Path(folder).expanduser(), time.monotonic()
    images = skipped = done = 0
    problems: dict[str, str] = {}
    slide: dict[str, Any] = {"slide_id": ""}
    with tree_reader(spec) as reader:
        for number, tree in enumerate(trees):
            name = tree["slide_id"]
            if slide["slide_id"] != name:
                slide = archive.slide(name)
            if name not in problems:
                paths = {
                    node: target / tree_image_name(name, tree["tx"], tree["ty"], node)
                    for node in np.flatnonzero(tree["node_mask"]).tolist()
                }
                missing = [node for node, path in paths.items() if not path.exists()]
                try:
                    target.mkdir(parents=True, exist_ok=True)
                    for node, pixels in read_nodes(reader, slide, tree, spec=spec, nodes=missing):
                        bgr = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
                        _, data = cv2.imencode(".png", bgr, [cv2.IMWRITE_PNG_COMPRESSION, 1])
                        write_file(paths[node], data.tobytes())
                        images += 1
                    skipped += len(paths) - len(missing)
                    done += 1
                except SlideError as error:
                    problems[name] = f"{error.code}: {error}"
                except OSError as error:
                    raise ConfigError(
                        f"{target} cannot be written: {error.strerror}.",
                        hint="Give a folder you may write.",
                        code="out",
                    ) from error
            if progress is not None:
                progress(
                    Progress(
                        what="writing", done=number + 1, total=len(trees), unit="trees",
                        seconds=time.monotonic() - begun, note=f"{images:,} pictures",
                    )
                )  # fmt: skip
    return TreeImages(images=images, skipped=skipped, trees=done, problems=problems)
