"""Describe: a vision-language model writes a caption for every node of an archive's patch trees.

Trees are spread over Ray Data actors, each with a vLLM engine and a reader of slides: pixels are
read again, which costs little beside 85 generations. The driver commits whole trees; those this
model has described are left out, so the same command goes on where one was stopped. At the end the
keywords of all of the model's captions are made.

Equal pixels are described once by an actor. An answer that is no caption (nothing, one word over
and over, no text) is stored as none and counted.

    python -m jobs.describe --archive URI --vlm DIR       (the same as: pathflip trees caption …)
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from jobs import cluster
from jobs.batch_vllm import check_settings, map_engines
from jobs.stages import ended, wrong_model
from pathflip import tracing
from pathflip.archive import Archive, vectors
from pathflip.archive.commit import Committer
from pathflip.archive.schema import CHECKSUM
from pathflip.archive.storage import guarded, is_local
from pathflip.archive.tree_texts import NodeCaptions, put_captions, redo_keywords
from pathflip.archive.trees import TREE_TEXTS, read_trees, tree_spec
from pathflip.captioner import Captioner, check_torchvision, model_type, why_no_caption
from pathflip.config import check_positive
from pathflip.errors import ConfigError, SlideError
from pathflip.geometry import TREE_NODES
from pathflip.progress import Progress, Report
from pathflip.vllm_engine import EngineConfig

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NODES_A_SECOND = 25.0
"""Captions of 150 tokens a second by a model of 7 B parameters on one H100: a guess for dry runs,
nothing of it was measured."""
_COMMIT_S = 30.0
_KNOWN = 1 << 18


@dataclass(frozen=True, kw_only=True)
class DescribeConfig:
    """Settings of the job.

    Raises:
        ConfigError: A number is out of its range.
    """

    engine: EngineConfig = field(default_factory=EngineConfig)
    actors: int | None = None
    """Engines; None means one per GPU, or one where there is none."""
    trees_at_once: int = 4
    """Trees an engine is given together; what is lost when a machine fails."""
    max_new_tokens: int = 1024
    """Tokens of a caption at most, as in MR-PLIP's captioning script."""
    nodes_a_second: float = NODES_A_SECOND
    """Captions an engine makes in a second, from which a dry run estimates the time."""

    def __post_init__(self) -> None:
        check_positive(self, "actors", "trees_at_once", "max_new_tokens")
        if not self.nodes_a_second > 0:
            raise ConfigError(
                f"nodes_a_second is {self.nodes_a_second}.", hint="It must be above 0."
            )


@dataclass(frozen=True, kw_only=True)
class DescribeResult:
    """Result of the job, or with ``dry_run`` what it would be.

    Attributes:
        model: Name of the model, and the source of the captions in the archive.
        trees: Trees done by this run.
        skipped: Trees this model has done before.
        nodes: Nodes of the trees with pixels.
        captions: Captions written.
        no_caption: {reason: nodes} of answers that are none; see
            :func:`pathflip.captioner.why_no_caption`.
        failed: {slide: "code: message"} of slides that could not be read; their trees are tried
            again by the next run.
        without_keywords: Trees of the model without a keyword.
        nodes_a_second: Rate that a dry run assumes for one engine.
        estimated_hours: Hours at that rate with the actors asked for.
        seconds: Wall time.
    """

    model: str
    trees: int
    skipped: int
    nodes: int
    captions: int = 0
    no_caption: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    without_keywords: int = 0
    nodes_a_second: float | None = None
    estimated_hours: float | None = None
    seconds: float

    @property
    def exit_code(self) -> int:
        """0 all good, 3 some slides could not be read."""
        return 3 if self.failed else 0

    def as_json(self) -> dict[str, Any]:
        """The document ``pathflip trees caption --json`` prints."""
        document = asdict(self) | {"seconds": round(self.seconds, 3)}
        return {key: value for key, value in document.items() if value is not None}


@tracing.job
def describe(
    archive: str,
    vlm: str,
    *,
    config: DescribeConfig | None = None,
    address: str | None = None,
    progress: Report | None = None,
    dry_run: bool = False,
) -> DescribeResult:
    """Caption the nodes of all trees that have no captions by this model yet.

    Args:
        archive: Archive URI.
        vlm: A vision-language model: a folder, or ``owner/name`` on the hub; on a cluster every
            node must see the folder, or the hub's cache.
        config: Settings.
        address: Ray cluster; see ``cluster.connect``.
        progress: Called on the driver whenever trees are done.
        dry_run: Say what would be done, with hours; write nothing, start nothing.

    Raises:
        CheckpointError: There is no such model.
        ConfigError: There is no prompt for it (``unknown_captioner``), or it cannot run here
            (``no_torchvision``).
        ArchiveError: The archive has no trees, is missing, damaged or being written.
    """
    from pathflip.models import hub

    started = time.monotonic()
    config = config or DescribeConfig()
    folder = hub.find(vlm).absolute()
    model_type(folder)
    check_settings(folder, config.engine, address=address)
    if cluster.is_here(address):
        check_torchvision(folder)
    model = captioner_name(folder)
    todo, skipped, unfinished = _outstanding(Archive(archive), model)
    nodes = sum(todo.values())
    if dry_run:
        rate = config.nodes_a_second
        return DescribeResult(
            model=model, trees=len(todo), skipped=skipped, nodes=nodes, nodes_a_second=rate,
            estimated_hours=round(nodes / rate / (config.actors or 1) / 3600, 4),
            seconds=time.monotonic() - started,
        )  # fmt: skip
    total = _Total()
    if todo or unfinished:
        with Committer(archive) as committer:
            todo, skipped, _ = _outstanding(committer.archive, model)
            tables = map_engines(
                [{"tree": tree} for tree in todo],
                DescribeActor,
                (archive, str(folder), model, config),
                at_once=config.trees_at_once,
                actors=config.actors,
                engine=config.engine,
                address=address,
            )
            with ended(tables):
                for done in _committed(committer, tables, model, total):
                    if progress is not None:
                        progress(
                            Progress(
                                what="describe", done=done, total=len(todo),
                                seconds=time.monotonic() - started, unit="trees",
                                note=f"{total.captions:,} captions",
                            )
                        )  # fmt: skip
            if total.trees or unfinished:
                counts = redo_keywords(committer, source=model)[model]
                total.without_keywords = counts.without_keywords
    return DescribeResult(
        model=model,
        trees=total.trees,
        skipped=skipped,
        nodes=total.captions + sum(total.no_caption.values()),
        captions=total.captions,
        no_caption=dict(sorted(total.no_caption.items())),
        failed=total.failed,
        without_keywords=total.without_keywords,
        seconds=time.monotonic() - started,
    )


def captioner_name(folder: Path) -> str:
    """Return a model's name in the archive: its folder's, and its weights' fingerprint.

    Raises:
        CheckpointError: It has no weights in safetensors.
    """
    from pathflip.checkpoints import model_name
    from pathflip.models.hub import folder_name
    from pathflip.models.llm import fingerprint_of

    return model_name(folder_name(folder), fingerprint_of(folder))


@dataclass
class _Total:
    """Counts so far."""

    trees: int = 0
    captions: int = 0
    without_keywords: int = 0
    no_caption: Counter[str] = field(default_factory=Counter)
    failed: dict[str, str] = field(default_factory=dict)


# -- the archive ----------------------------------------------------------------------------------


def _outstanding(archive: Archive, model: str) -> tuple[dict[str, int], int, bool]:
    """Return {tree to do: its nodes}, how many are done, and whether some of those lack keywords.

    Raises:
        ArchiveError: The archive has no trees (``no_trees``).
    """
    tree_spec(archive)
    done: dict[str, str | None] = {}
    if TREE_TEXTS in archive.tables():
        import pyarrow.compute as pc

        with guarded(archive.uri, f"read the table {TREE_TEXTS}", damaged=is_local(archive.uri)):
            rows = archive.dataset(TREE_TEXTS).to_table(
                columns=["tree_id", "extractor"], filter=pc.field("source") == model
            )
        done = dict(zip(rows["tree_id"].to_pylist(), rows["extractor"].to_pylist(), strict=True))
    trees = read_trees(archive, columns=["tree_id", "node_mask"])
    nodes = (vectors(trees["node_mask"]) != 0).sum(axis=1).tolist()
    pairs = zip(trees["tree_id"].to_pylist(), nodes, strict=True)
    todo = {tree: count for tree, count in pairs if tree not in done}
    return todo, trees.num_rows - len(todo), None in done.values()


def _committed(
    committer: Committer, tables: Iterator[pa.Table], model: str, total: _Total
) -> Iterator[int]:
    """Commit the captions that actors return, and yield the number of trees that came back."""
    waiting: list[NodeCaptions] = []
    came, last = 0, time.monotonic()

    def commit() -> None:
        nonlocal last
        if waiting:
            put_captions(committer, waiting, source=model)
            total.trees += len(waiting)
            waiting.clear()
        last = time.monotonic()

    for table in tables:
        for row in table.to_pylist():
            came += 1
            if row["reason"]:
                total.failed[row["slide_id"]] = row["reason"]
                continue
            total.no_caption.update(json.loads(row["no_caption"]))
            total.captions += sum(text is not None for text in row["captions"])
            waiting.append(
                NodeCaptions(
                    slide_id=row["slide_id"], tree_id=row["tree_id"], model=model,
                    captions=row["captions"],
                )
            )  # fmt: skip
        if time.monotonic() - last > _COMMIT_S:
            commit()
        yield came
    commit()


# -- the actors -----------------------------------------------------------------------------------


class DescribeActor:
    """Reads the nodes of trees and has a vision-language model describe them.

    Args:
        archive: Archive URI.
        vlm: Folder of the model.
        model: Name of the model on the driver.
        config: Settings.

    Raises:
        CheckpointError: There is no model in the folder, or another one than the driver's.
        ConfigError: vLLM cannot run it here.
    """

    def __init__(self, archive: str, vlm: str, model: str, config: DescribeConfig) -> None:
        from pathflip.interop.tree_images import tree_reader

        if captioner_name(Path(vlm)) != model:
            raise wrong_model(vlm)
        self._archive = Archive(archive)
        self._spec = tree_spec(self._archive)
        self._captioner = Captioner(vlm, config.engine, max_new_tokens=config.max_new_tokens)
        self._reader = tree_reader(self._spec)
        self._known: dict[bytes, str] = {}

    def close(self) -> None:
        """Stop the reader process."""
        self._reader.close()

    def __call__(self, rows: list[dict[str, str]]) -> pa.Table:
        """Return a row for each tree: its captions, or the reason why its slide cannot be read."""
        import pyarrow.compute as pc

        from pathflip.interop.tree_images import read_nodes

        wanted = pa.array([row["tree"] for row in rows], pa.string())
        uri = self._archive.uri
        with guarded(uri, "read the table trees", damaged=is_local(uri)):
            found = self._archive.dataset("trees").to_table(
                filter=pc.is_in(pc.field("tree_id"), wanted)
            )
        trees = found.drop_columns([CHECKSUM]).sort_by("tree_id").to_pylist()
        nodes: dict[str, dict[int, bytes]] = {}
        pixels: dict[bytes, NDArray[np.uint8]] = {}
        reasons: dict[str, str] = {}
        for slide_id, of_slide in groupby(trees, key=lambda tree: str(tree["slide_id"])):
            slide = self._archive.slide(slide_id)
            try:
                for tree in of_slide:
                    read = dict(read_nodes(self._reader, slide, tree, spec=self._spec))
                    keys = {
                        n: hashlib.sha256(image.tobytes()).digest() for n, image in read.items()
                    }
                    pixels |= {k: read[n] for n, k in keys.items() if k not in self._known}
                    nodes[tree["tree_id"]] = keys
            except SlideError as error:
                reasons[slide_id] = f"{error.code}: {error}"
        answers = self._captioner(list(pixels.values()))
        new = dict(zip(pixels, answers, strict=True))
        known = self._known | new
        made = [
            _answer(tree, nodes.get(tree["tree_id"]), known, reasons.get(tree["slide_id"], ""))
            for tree in trees
        ]
        self._known = known if len(known) <= _KNOWN else {}
        return pa.Table.from_pylist(made, schema=_ANSWERS)


def _answer(
    tree: Mapping[str, Any],
    nodes: Mapping[int, bytes] | None,
    known: Mapping[bytes, str],
    reason: str,
) -> dict[str, Any]:
    """Return the row of a tree.

    Args:
        tree: The tree.
        nodes: Digest of the pixels of each of its nodes; None if they could not be read.
        known: {digest: what the model said}.
        reason: Reason why trees of its slide could not be read, or empty.
    """
    captions: list[str | None] = [None] * TREE_NODES
    lost = Counter[str]()
    for node, key in (nodes or {}).items():
        if why := why_no_caption(known[key]):
            lost[why] += 1
        else:
            captions[node] = known[key]
    return {
        "tree_id": tree["tree_id"],
        "slide_id": tree["slide_id"],
        "captions": captions,
        "no_caption": json.dumps(lost),
        "reason": reason if nodes is None else "",
    }


_ANSWERS = pa.schema(
    [
        ("tree_id", pa.string()),
        ("slide_id", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("no_caption", pa.string()),
        ("reason", pa.string()),
    ]
)


if __name__ == "__main__":
    from pathflip.cli import main

    main(["trees", "caption", *sys.argv[1:]])
