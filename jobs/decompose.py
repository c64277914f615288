"""Decompose: a language model cuts captions into statements about what a slide shows.

Captions are spread over Ray Data actors, each with a vLLM engine; the driver checks what they
return and commits it to the archive: ``captions.statements``, with the model's name beside it.
Pretraining draws sub-captions from them with ``-o subcaption_source=statements``.

A statement is kept only if it names a sentence of the caption, most of its words stand in that
sentence, and both are negated or neither is. Dropped statements are counted. A caption without any
keeps its sentences instead. Equal captions are sent to the model once, and none is sent to the same
model again.

    python -m jobs.decompose --archive URI --llm DIR       (the same as: pathflip decompose …)
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from jobs.batch_vllm import check_settings, map_engines
from jobs.stages import ended
from pathflip import tracing
from pathflip.archive import CAPTIONS, Archive
from pathflip.archive.commit import Committer
from pathflip.archive.indexes import refresh_indexes
from pathflip.archive.schema import CHECKSUM, captions_schema
from pathflip.config import check_positive
from pathflip.errors import ArchiveError
from pathflip.progress import Progress, Report
from pathflip.text import denies, split_sentences
from pathflip.vllm_engine import EngineConfig, context_length, offline

INSTRUCTION = """\
Split the pathology caption into short, self-contained statements. Keep only findings that could be
seen in an H&E slide region (tissue, architecture, cells, necrosis, inflammation, invasion). Drop
specimen handling, staging codes, margin distances, clinical history and IHC results. Use the
caption's own words. Write one JSON object per line, with the number of the sentence it comes from:
{"visual_description": "...", "source_sentence": 1}"""
GROUNDED = 0.6
"""Share of a statement's content words that must stand in its sentence."""
_STOP = frozenset(
    re.findall(
        r"\w+",
        "a an and are as at be been by for from has have in into is it its no not of on or seen "
        "show shows that the there these this to was were which with without present identified "
        "noted",
    )
)


@dataclass(frozen=True, kw_only=True)
class DecomposeConfig:
    """Settings of the job.

    Raises:
        ConfigError: A number is out of its range.
    """

    engine: EngineConfig = field(default_factory=EngineConfig)
    actors: int | None = None
    """Engines; None means one per GPU, or one where there is none."""
    captions_at_once: int = 64
    """Captions an engine is given together."""
    max_new_tokens: int = 1024
    """Most tokens of a caption's statements."""
    source: str | None = None
    """Only captions of this source."""

    def __post_init__(self) -> None:
        check_positive(self, "actors", "captions_at_once", "max_new_tokens")


@dataclass(frozen=True, kw_only=True)
class DecomposeResult:
    """Result of the job, or with ``dry_run`` what it would be.

    Attributes:
        model: Name of the language model in the archive.
        captions: Captions done by this run.
        skipped: Captions this model has done before.
        statements: Statements kept, over all captions of this run.
        fell_back: Captions without a statement, which keep their sentences.
        dropped: {reason: count} of statements that were not kept: ``not_json``, ``no_source``,
            ``not_grounded``, ``denial``, ``duplicate``; and of captions longer than the model
            reads, ``too_long``.
        seconds: Wall time.
    """

    model: str
    captions: int
    skipped: int
    statements: int
    fell_back: int
    dropped: dict[str, int]
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """The document ``pathflip decompose --json`` prints."""
        return asdict(self) | {"seconds": round(self.seconds, 3)}


@tracing.job
def decompose(
    archive: str,
    llm: str,
    *,
    config: DecomposeConfig | None = None,
    address: str | None = None,
    progress: Report | None = None,
    dry_run: bool = False,
) -> DecomposeResult:
    """Write statements for all captions that have none by this model yet.

    Args:
        archive: Archive URI.
        llm: A chat model, as vLLM reads it: a folder, or ``owner/name`` on the hub; on a cluster
            every node must see the folder, or the hub's cache.
        config: Settings.
        address: Ray cluster; see ``cluster.connect``.
        progress: Called on the driver whenever captions are done.
        dry_run: Say what would be done; write nothing, start nothing.

    Raises:
        CheckpointError: If there is no such language model.
        ArchiveError: If the archive has no captions, is missing, damaged or being written.
    """
    from pathflip.checkpoints import model_name
    from pathflip.models import hub
    from pathflip.models.instruct import fingerprint_of

    started = time.monotonic()
    config = config or DecomposeConfig()
    folder = hub.find(llm).absolute()
    check_settings(folder, config.engine, address=address)
    model = model_name(hub.folder_name(folder), fingerprint_of(folder))
    todo, known, skipped = _outstanding(Archive(archive), model, config.source)
    kept, fell_back, dropped, done = 0, 0, Counter[str](), 0
    if todo and not dry_run:
        with Committer(archive) as committer:
            todo, known, skipped = _outstanding(committer.archive, model, config.source)
            for text in [text for text in todo if text in known]:
                rows = todo.pop(text)
                _write(committer, rows, known[text], model)
                done += len(rows)
            total = done + sum(map(len, todo.values()))
            made = map_engines(
                [{"text": text} for text in todo],
                DecomposeActor,
                (str(folder), config),
                at_once=config.captions_at_once,
                actors=config.actors,
                engine=config.engine,
                address=address,
            )
            with ended(made) as tables:
                for table in tables:
                    write = []
                    for row in table.to_pylist():
                        text = row["text"]
                        sentences = split_sentences(text)
                        statements, lost = grounded(row["output"], sentences)
                        dropped += lost
                        kept += len(statements)
                        fell_back += not statements
                        write += [(own, statements or sentences) for own in todo[text]]
                        done += len(todo[text])
                    committer.upsert(CAPTIONS, _rows(write, model))
                    if progress is not None:
                        seconds = time.monotonic() - started
                        progress(
                            Progress(
                                what="decompose", done=done, total=total, seconds=seconds,
                                unit="captions",
                            )
                        )  # fmt: skip
            refresh_indexes(committer.lock, CAPTIONS)
    return DecomposeResult(
        model=model,
        captions=sum(map(len, todo.values())) if dry_run else done,
        skipped=skipped,
        statements=kept,
        fell_back=fell_back,
        dropped=dict(dropped),
        seconds=time.monotonic() - started,
    )


def grounded(output: str | None, sentences: Sequence[str]) -> tuple[list[str], Counter[str]]:
    """Return the statements in a model's output that the caption supports.

    Args:
        output: Output of the model, a JSON object a line; None for a caption longer than it reads.
        sentences: Sentences of the caption; ``source_sentence`` counts them from 1.

    Returns:
        Statements in their order, and {reason: count} of lines that were dropped.
    """
    if output is None:
        return [], Counter({"too_long": 1})
    kept: list[str] = []
    dropped: Counter[str] = Counter()
    for line in output.splitlines():
        line = line.strip()
        if not line or line.startswith("```"):
            continue
        try:
            entry = json.loads(line.rstrip(","))
            text, number = entry["visual_description"], entry["source_sentence"]
        except (ValueError, KeyError, TypeError, RecursionError):
            dropped["not_json"] += 1
            continue
        if not isinstance(text, str) or type(number) is not int:
            dropped["not_json"] += 1
        elif not 1 <= number <= len(sentences):
            dropped["no_source"] += 1
        elif (reason := _unsupported(text, sentences[number - 1])) is not None:
            dropped[reason] += 1
        elif (text := " ".join(text.split())) in kept:
            dropped["duplicate"] += 1
        else:
            kept.append(text)
    return kept, dropped


def _unsupported(statement: str, sentence: str) -> str | None:
    """Return why a sentence does not support a statement; None if it does."""
    words = _content(statement)
    if not words or len(words & _content(sentence)) < GROUNDED * len(words):
        return "not_grounded"
    # The same words without their "no" say the opposite.
    return "denial" if denies(statement) != denies(sentence) else None


def _content(text: str) -> set[str]:
    """Return the content words of a text, plurals as singulars."""
    words = re.findall(r"[^\W_]+", text.casefold())
    return {word[:-1] if len(word) > 3 and word.endswith("s") else word for word in words} - _STOP


# -- the archive ----------------------------------------------------------------------------------


def _outstanding(
    archive: Archive, model: str, source: str | None
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, list[str]], int]:
    """Return {caption: its rows} to do, {caption: statements} of this model, and rows done."""
    rows = [row for row in archive.captions(source).to_pylist() if (row["text"] or "").strip()]
    if not rows:
        of = "" if source is None else f" of source {source}"
        raise ArchiveError(
            f"The archive {archive.uri} has no captions{of}.",
            hint=f"Add them: pathflip archive import --archive {archive.uri} --captions FILE",
            code="no_captions",
        )
    known = {row["text"]: row["statements"] for row in rows if row["model"] == model}
    todo: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["model"] != model:
            todo.setdefault(row["text"], []).append(row)
    return todo, known, sum(row["model"] == model for row in rows)


def _write(
    committer: Committer, rows: list[dict[str, Any]], statements: list[str], model: str
) -> None:
    committer.upsert(CAPTIONS, _rows([(row, statements) for row in rows], model))


def _rows(write: Sequence[tuple[dict[str, Any], list[str]]], model: str) -> pa.Table:
    schema = pa.schema([item for item in captions_schema() if item.name != CHECKSUM])
    rows = [row | {"statements": statements, "model": model} for row, statements in write]
    return pa.Table.from_pylist(rows, schema=schema)


# -- the engines ----------------------------------------------------------------------------------


class DecomposeActor:
    """Asks a language model to cut captions into statements; one actor of the job.

    Args:
        llm: Folder of the language model.
        config: Settings.

    Raises:
        CheckpointError: There is no language model in the folder.
        ConfigError: The engine cannot be started with these settings.
    """

    def __init__(self, llm: str, config: DecomposeConfig) -> None:
        self._config = config
        self._context = context_length(llm, config.engine)
        from pathflip.models.chat_template import Prompter
        from pathflip.models.hub import read_tokenizer

        self._prompter = Prompter(read_tokenizer(Path(llm)), "qwen3")
        self._engine = offline(llm, config.engine)

    def __call__(self, captions: list[dict[str, str]]) -> pa.Table:
        """Return what the model wrote about each caption; null where one does not fit it."""
        texts = [row["text"] for row in captions]
        return pa.table({"text": texts, "output": pa.array(self._ask(texts), pa.string())})

    def _ask(self, texts: Sequence[str]) -> list[str | None]:
        from vllm import SamplingParams

        prompts = [self._prompt(text) for text in texts]
        fit = [i for i, ids in enumerate(prompts) if len(ids) < self._context]
        limits = [min(self._config.max_new_tokens, self._context - len(prompts[i])) for i in fit]
        generated = self._engine.generate(
            [{"prompt_token_ids": prompts[i]} for i in fit],
            [
                SamplingParams(
                    temperature=0.0, max_tokens=limit, stop_token_ids=[self._prompter.end_id]
                )
                for limit in limits
            ],
            use_tqdm=False,
        )
        outputs: list[str | None] = [None] * len(texts)
        for i, one in zip(fit, generated, strict=True):
            outputs[i] = one.outputs[0].text
        return outputs

    def _prompt(self, text: str) -> list[int]:
        numbered = "\n".join(f"{n}. {one}" for n, one in enumerate(split_sentences(text), start=1))
        # Reports are foreign text: nothing in them may become a special token.
        before, after = self._prompter.prompt_ids(f"{INSTRUCTION}\n\n{numbered}")
        return before + after


if __name__ == "__main__":
    from pathflip.cli import main

    main(["decompose", *sys.argv[1:]])
