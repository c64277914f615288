"""Captions of patch trees' nodes as captioners write them: lines of JSON.

A line is ``{"Image": name, "prompt": …, "Answer": caption, "model_id": model}``, as the captioning
script of MR-PLIP writes it. ``Image`` is the name that ``pathflip trees export`` gives a node's
picture: ``<slide>__t<tx>_<ty>__n<node>.png``. The slide is found as in every other table of names.

Files are read twice, a line at a time: first all lines are checked and only their places kept.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np

from pathflip.archive import Archive
from pathflip.archive.archive import vectors
from pathflip.archive.commit import Committer
from pathflip.archive.schema import tree_id
from pathflip.archive.tree_texts import NodeCaptions, planned_tree_texts, write_tree_texts
from pathflip.archive.trees import read_trees, tree_spec
from pathflip.errors import ConfigError
from pathflip.geometry import TREE_NODES
from pathflip.interop.tables import bad_line, clean, is_missing
from pathflip.keywords import Lexicon

PROMPT = "Can you describe the main features visible in this histopathology image?"
"""Instruction of the captioning script of MR-PLIP, word for word."""

_NAME = re.compile(r"(?P<slide>.+)__t(?P<tx>\d{1,9})_(?P<ty>\d{1,9})__n(?P<node>\d{1,9})(?:\.\w+)?")
_EXAMPLES = 5


@dataclass(frozen=True, kw_only=True)
class TreeImage:
    """Node of a patch tree, as the name of its picture says it.

    Attributes:
        slide: Name of the slide.
        tx: Grid column of the root.
        ty: Grid row of the root.
        node: Number of the node, 0 to 84.
    """

    slide: str
    tx: int
    ty: int
    node: int


def tree_image_name(slide: str, tx: int, ty: int, node: int) -> str:
    """Return the file name of a node's picture."""
    return f"{slide}__t{tx}_{ty}__n{node}.png"


def parse_tree_image(name: str) -> TreeImage | None:
    """Return the node a picture's name means; None if it is no such name.

    Folders before it, and the ending whatever its case, do not count.
    """
    found = _NAME.fullmatch(PurePosixPath(clean(name).replace("\\", "/")).name)
    if found is None or int(found["node"]) >= TREE_NODES:
        return None
    return TreeImage(
        slide=found["slide"], tx=int(found["tx"]), ty=int(found["ty"]), node=int(found["node"])
    )


class TreeCaptions(Mapping[str, NodeCaptions]):
    """Captions in files, by tree; made by :func:`read_tree_captions`.

    Attributes:
        model: Model that wrote the captions; None if no line says it.
        counts: Lines of the files, and of those: ``nodes`` captions that trees of the archive get,
            ``empty`` ones without a caption, ``duplicates`` of another line, ``masked`` ones about
            nodes the archive holds no features of, ``quarantined`` ones about quarantined trees.
        unmatched: {"lines", "examples"} of lines whose name fits no tree.
        ambiguous: The same of lines whose slide could be several.
    """

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self.model: str | None = None
        counted = ("lines", "nodes", "empty", "duplicates", "masked", "quarantined")
        self.counts = dict.fromkeys(counted, 0)
        self.unmatched: dict[str, Any] = {"lines": 0, "examples": []}
        self.ambiguous: dict[str, Any] = {"lines": 0, "examples": []}
        self._open: dict[int, IO[bytes]] = {}
        self._slides: dict[str, str] = {}
        self._places: dict[str, np.ndarray[Any, np.dtype[np.int64]]] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, tree: str) -> NodeCaptions:
        """Return a tree's captions, read from the files again."""
        return NodeCaptions(
            slide_id=self._slides[tree],
            tree_id=tree,
            model=self.model,
            captions=[None if at < 0 else self._caption(at) for at in self._places[tree].tolist()],
        )

    def close(self) -> None:
        """Close the files."""
        for file in self._open.values():
            file.close()
        self._open.clear()

    def take(self, slide: str, tree: str, node: int, place: int, caption: str) -> bool:
        """Note where a node's caption stands; return False if another one stands elsewhere."""
        places = self._places.get(tree)
        if places is None:
            self._slides[tree] = slide
            places = self._places[tree] = np.full(TREE_NODES, -1, np.int64)
        if places[node] < 0:
            places[node] = place
            self.counts["nodes"] += 1
            return True
        self.counts["duplicates"] += 1
        return self._caption(int(places[node])) == caption

    def _caption(self, place: int) -> str:
        number, offset = divmod(place, 1 << 48)
        file = self._open.get(number)
        if file is None:
            self.close()  # one at a time: a folder may hold thousands
            file = self._open[number] = self.files[number].open("rb")
        file.seek(offset)
        return clean(json.loads(file.readline())["Answer"])


def read_tree_captions(archive: Archive, path: str | Path) -> TreeCaptions:
    """Check captions of nodes and find their trees.

    Args:
        archive: The archive with the trees.
        path: A file, or a folder of files that end in ``.jsonl``.

    Raises:
        ConfigError: A file cannot be read, a line is wrong, or two lines say different things about
            one node: then it names the line.
        ArchiveError: The archive has no trees (``no_trees``).
    """
    tree_spec(archive)
    root = Path(path).expanduser()
    files = sorted(root.rglob("*.jsonl")) if root.is_dir() else [root]
    if not files:
        raise ConfigError(f"{path} holds no files that end in .jsonl.", hint="Check the path.")
    rows = read_trees(archive, columns=["tree_id", "node_mask"])
    known = {tree: at for at, tree in enumerate(rows["tree_id"].to_pylist())}
    masks = vectors(rows["node_mask"]).reshape(-1, TREE_NODES) != 0
    bad = set(read_trees(archive, columns=["tree_id"], quarantined=True)["tree_id"].to_pylist())
    names, slides = archive.names(), dict[str, list[str]]()
    said: tuple[Path, int] | None = None
    captions = TreeCaptions(files)
    for number, file in enumerate(files):
        for line, offset, entry in _lines(file):
            captions.counts["lines"] += 1
            model = entry.get("model_id")
            if said is None:
                captions.model, said = model, (file, line)
            elif model != captions.model:
                raise bad_line(
                    file,
                    line,
                    f"model_id is {model}, but {captions.model} in {said[0].name}, line {said[1]}",
                    hint="Import the captions of each model from a file of their own; nothing was "
                    "written.",
                )
            image = parse_tree_image(entry["Image"])
            if image is None:
                _note(captions.unmatched, entry["Image"])
                continue
            found = slides.get(image.slide)
            if found is None:
                found = slides[image.slide] = names.find(image.slide)
            if len(found) > 1:
                _note(captions.ambiguous, entry["Image"])
                continue
            tree = tree_id(found[0], tx=image.tx, ty=image.ty) if found else ""
            if tree in bad:
                captions.counts["quarantined"] += 1
            elif tree not in known:
                _note(captions.unmatched, entry["Image"])
            elif not masks[known[tree], image.node]:
                captions.counts["masked"] += 1
            elif is_missing(entry["Answer"] or ""):
                captions.counts["empty"] += 1
            elif not captions.take(
                found[0], tree, image.node, (number << 48) + offset, clean(entry["Answer"])
            ):
                raise bad_line(file, line, f"another caption of {entry['Image']} than before it")
    if not captions.counts["lines"]:
        raise ConfigError(f"{path} holds no captions.", hint="See docs/howto/tree-texts.md.")
    return captions


def import_tree_captions(
    archive: str,
    captions: TreeCaptions,
    *,
    source: str,
    lexicon: Lexicon | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Write captions of nodes with their keywords; again, it changes nothing.

    Args:
        archive: URI of the archive.
        captions: Result of :func:`read_tree_captions`.
        source: Name of the source; captions of another source are kept beside them.
        lexicon: Terms of the keywords; default: those stored with the archive.
        dry_run: Only say what would be done.

    Returns:
        {"source", "model", "trees", the counts of :class:`TreeCaptions` and of
        :class:`~pathflip.archive.tree_texts.TextCounts`, "unmatched", "ambiguous"}.

    Raises:
        ArchiveError: If the archive is missing, damaged or being written.
    """
    try:
        if dry_run:
            counts = planned_tree_texts(Archive(archive), captions, source=source, lexicon=lexicon)
        else:
            with Committer(archive) as committer:
                counts = write_tree_texts(committer, captions, source=source, lexicon=lexicon)
    finally:
        captions.close()
    return {
        "source": source,
        "model": captions.model,
        "trees": len(captions),
        **captions.counts,
        **asdict(counts),
        "unmatched": captions.unmatched,
        "ambiguous": captions.ambiguous,
    }


def _lines(file: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Yield (line, place in bytes, entry) of a file of JSON lines.

    Raises:
        ConfigError: The file cannot be read, or a line is wrong.
    """
    try:
        with file.open("rb") as lines:
            offset = 0
            for number, content in enumerate(lines, start=1):
                start, offset = offset, offset + len(content)
                if number == 1 and content.startswith(b"\xef\xbb\xbf"):
                    start, content = start + 3, content[3:]
                if content.strip():
                    yield number, start, _entry(file, number, content)
    except OSError as error:
        raise ConfigError(
            f"{file} cannot be read: {error.strerror}.", hint="Check the path."
        ) from error


def _entry(file: Path, line: int, content: bytes) -> dict[str, Any]:
    try:
        entry = json.loads(content.decode())
    except UnicodeDecodeError as error:
        raise bad_line(file, line, "not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise bad_line(file, line, "not one JSON object") from error
    if not isinstance(entry, dict):
        raise bad_line(file, line, "not one JSON object")
    if not isinstance(entry.get("Image"), str):
        raise bad_line(file, line, "no Image, the name of the picture")
    for name in ("Answer", "model_id"):
        if not isinstance(entry.get(name), str | None):
            raise bad_line(file, line, f"{name} is no text")
    if "Answer" not in entry:
        raise bad_line(file, line, "no Answer, the caption")
    try:
        "".join(filter(None, (entry["Image"], entry["Answer"], entry.get("model_id")))).encode()
    except UnicodeEncodeError as error:  # half of a character, as \ud83d
        raise bad_line(file, line, "not UTF-8") from error
    return entry


def _note(names: dict[str, Any], name: str) -> None:
    names["lines"] += 1
    if len(names["examples"]) < _EXAMPLES and name not in names["examples"]:
        names["examples"].append(name)
