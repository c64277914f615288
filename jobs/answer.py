"""Answers: captions of many slides, or answers to a file of questions, on Ray with vLLM.

Slides are spread over Ray Data actors. Each holds the run's vision model and projector and a vLLM
engine with the tuned language model, reads a slide's features from the archive and returns lines;
the driver appends them to a file of JSON lines, whole and forced to disk. What is in the file is
not asked again, so the same command goes on where it was stopped. A slide that cannot be read has a
line with the reason, costs no other slide, and is tried again by the next run.

    {"slide_id", "model", "caption"}
    {"slide_id", "model", "question", "choices", "answer", "choice", "scores"}
    {"slide_id", "model", ["question", "choices",] "error": {"code", "message", "hint"}}
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import pyarrow as pa

from jobs.batch_vllm import (
    AnswerConfig,
    BatchSlideQA,
    Item,
    check_settings,
    key_of,
    map_engines,
)
from jobs.stages import ended, wrong_model
from pathflip import tracing
from pathflip.archive import Archive
from pathflip.archive.slide_names import NAME_COLUMNS, SlideNames, listed
from pathflip.errors import ConfigError
from pathflip.evaluation.encode import list_slides
from pathflip.files import claim
from pathflip.progress import Progress, Report
from pathflip.slide_qa import check_question, tuned_name

if TYPE_CHECKING:
    from pathflip.checkpoints import Run
    from pathflip.interop.questions import Question


@dataclass(frozen=True, kw_only=True)
class AnswerResult:
    """Result of a batch, or with ``dry_run`` what it would be.

    Attributes:
        model: Name of the tuned run.
        out: The output file.
        written: Captions or answers written by this run.
        failed: {slide_id: reason code} of slides that could not be done.
        skipped: Captions or answers that were in the file before.
        unmatched: Names in the file of questions that match no slide, or several.
        seconds: Wall time.
    """

    model: str
    out: str
    written: int
    failed: dict[str, str]
    skipped: int
    unmatched: list[str] = field(default_factory=list)
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """The document the command prints."""
        return asdict(self) | {"seconds": round(self.seconds, 3)}


@tracing.job
def caption_all(
    archive: str,
    run: str,
    out: str,
    *,
    split: str | None = None,
    config: AnswerConfig | None = None,
    address: str | None = None,
    progress: Report | None = None,
    dry_run: bool = False,
) -> AnswerResult:
    """Caption every slide, or those of a split, that has no caption in the file yet.

    Args:
        archive: Archive URI.
        run: Run of ``pathflip tune``; on a cluster every node must see it under this path.
        out: File of JSON lines; appended to.
        split: Only slides of this split.
        config: Settings.
        address: Ray cluster; see ``cluster.connect``.
        progress: Called on the driver whenever slides are done.
        dry_run: Say what would be done; write nothing, start nothing.

    Raises:
        CheckpointError: If there is no tuned model in the run.
        ConfigError: If the file holds something else.
        ArchiveError: If the archive is missing or damaged, or the run does not fit it.
    """
    loaded = _open(run)
    opened = Archive(archive)
    slides = list_slides(opened, loaded, splits=None if split is None else (split,))
    wanted: list[tuple[str, Item]] = [(slide.slide_id, {}) for slide in slides]
    return _answer(opened, loaded, wanted, out, config, address, progress, dry_run, asking=False)


@tracing.job
def ask_all(
    archive: str,
    run: str,
    questions: str,
    out: str,
    *,
    config: AnswerConfig | None = None,
    address: str | None = None,
    progress: Report | None = None,
    dry_run: bool = False,
) -> AnswerResult:
    """Answer every question of a file that has no answer in the output yet.

    Args:
        archive: Archive URI.
        run: See :func:`caption_all`, as for the rest.
        questions: A file of :func:`pathflip.interop.questions.read_questions`; its answers are not
            looked at, and a table need not have them.
        out: File of JSON lines; appended to.
        config: Settings.
        address: Ray cluster.
        progress: Called whenever slides are done.
        dry_run: Say what would be done; write nothing, start nothing.

    Raises:
        CheckpointError, ConfigError, ArchiveError: See :func:`caption_all`; also where the file of
            questions is wrong.
    """
    loaded = _open(run)
    opened = Archive(archive)
    usable = {slide.slide_id for slide in list_slides(opened, loaded)}
    rows = opened.slides(columns=NAME_COLUMNS).to_pylist()
    names = SlideNames.from_rows(row for row in rows if row["slide_id"] in usable)
    asked = read_asked(questions)
    for one in asked:
        check_question(one.question, one.choices)
    matches = names.match(asked, lambda one: (one.slide, one.is_case))
    wanted: list[tuple[str, Item]] = []
    for one, found in matches.found:
        item: Item = {"question": one.question, "choices": list(one.choices)}
        wanted += [(slide, item) for slide in found]
    done = _answer(opened, loaded, wanted, out, config, address, progress, dry_run, asking=True)
    return replace(done, unmatched=listed([*matches.unmatched, *matches.ambiguous]))


def read_asked(path: str) -> list[Question]:
    """Return the questions of a file; a table may lack the column ``answer``.

    Raises:
        ConfigError: The file holds no questions, or a line of it is wrong.
    """
    from pathflip.interop.questions import Question, filled, read_questions
    from pathflip.interop.tables import SLIDE_COLUMNS, bad_line, column, is_json, read_rows

    if is_json(path):
        return read_questions(path)
    rows = read_rows(path)
    header = rows[0][1]
    slide, question = column(path, header, SLIDE_COLUMNS), column(path, header, ("question",))
    if slide is None or question is None or column(path, header, ("answer",)) is not None:
        return read_questions(path)
    choices = column(path, header, ("choices", "options"))
    found = []
    for line, row in rows:
        for name, column_name in (("slide", slide), ("question", question)):
            if not filled(row[column_name]):
                raise bad_line(path, line, f"no {name}")
        parts = map(filled, row[choices].split("|")) if choices is not None else ()
        found.append(
            Question(
                slide=row[slide],
                question=row[question],
                answer="",
                choices=tuple(part for part in parts if part),
                line=line,
            )
        )
    return found


def _open(run: str) -> Run:
    from pathflip.checkpoints import load_run, verify_whole

    loaded = load_run(run)
    tuned_name(loaded)  # refuses one that was not tuned
    verify_whole(loaded.path / "llm")
    return loaded


def _answer(
    archive: Archive,
    run: Run,
    wanted: Sequence[tuple[str, Item]],
    out: str,
    config: AnswerConfig | None,
    address: str | None,
    progress: Report | None,
    dry_run: bool,
    *,
    asking: bool,
) -> AnswerResult:
    started = time.monotonic()
    config = config or AnswerConfig()
    check_settings(run.path / "llm", config.engine, address=address)
    path, model = Path(out).expanduser().absolute(), tuned_name(run)
    had = _read_lines(path, model, asking=asking)
    todo: dict[str, list[Item]] = {}
    seen = {key for key, line in had.items() if "error" not in line}
    skipped = 0
    for slide, item in wanted:
        if (key := key_of(slide, item)) in seen:
            skipped += 1
        else:
            seen.add(key)
            todo.setdefault(slide, []).append(item)
    written, failed = 0, {}
    if todo and not dry_run:
        done = 0
        answers = _answered(todo, archive.uri, run, config, address)
        with _appending(path) as file, ended(answers):
            for slide, lines in answers:
                new = []
                for line in lines:
                    line = {"slide_id": slide, "model": model, **line}
                    if "error" in line:
                        failed[slide] = line["error"]["code"]
                        if had.get(key_of(slide, line)) == line:
                            continue
                    else:
                        written += 1
                    new.append(json.dumps(line) + "\n")
                _append(file, "".join(new))
                done += 1
                if progress is not None:
                    seconds = time.monotonic() - started
                    progress(Progress(what="answer", done=done, total=len(todo), seconds=seconds))
        if done != len(todo):  # cannot happen while every actor returns every row it was given
            raise RuntimeError(f"{len(todo) - done} slides never came back")
    return AnswerResult(
        model=model,
        out=str(path),
        written=sum(map(len, todo.values())) if dry_run else written,
        failed=failed,
        skipped=skipped,
        seconds=time.monotonic() - started,
    )


# -- the file of lines ----------------------------------------------------------------------------


def _read_lines(path: Path, model: str, *, asking: bool) -> dict[tuple[Any, ...], Item]:
    """Return {request: its last line}, without a line that a killed run left half written.

    Raises:
        ConfigError: The file holds something else, lines of another model, or captions where
            answers are written (or the reverse).
    """
    if not path.exists():
        return {}
    found: dict[tuple[Any, ...], Item] = {}
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    for number, raw in enumerate(whole.splitlines(), start=1):
        try:
            line = json.loads(raw)
            slide, of = line["slide_id"], line["model"]
        except (ValueError, KeyError, TypeError) as error:
            raise _other_file(path, f"line {number} is neither a caption nor an answer") from error
        if of != model:
            raise _other_file(path, f"line {number} is of model {of}, not of {model}")
        if ("question" in line) != asking:
            raise _other_file(
                path, f"line {number} is {'an answer' if not asking else 'a caption'}"
            )
        found[key_of(slide, line)] = line
    if not whole and text.strip():
        raise _other_file(path, "it is not a file of JSON lines")
    return found


def _other_file(path: Path, what: str) -> ConfigError:
    return ConfigError(
        f"{path} cannot be added to: {what}.",
        hint="Name another file in --out.",
        code="out",
    )


@contextmanager
def _appending(path: Path) -> Iterator[BinaryIO]:
    """Yield the file, locked by this process and cut after its last whole line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if not claim(file.fileno()):
            raise ConfigError(
                f"Another process is writing {path}.",
                hint="Wait for it, or name another file in --out.",
                code="out",
            )
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        yield file


def _append(file: BinaryIO, text: str) -> None:
    if text:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


# -- the engines ----------------------------------------------------------------------------------


def _answered(
    todo: dict[str, list[Item]],
    archive: str,
    run: Run,
    config: AnswerConfig,
    address: str | None,
) -> Iterator[tuple[str, list[Item]]]:
    """Yield each slide with its lines."""
    tables = map_engines(
        [{"slide_id": slide, "items": json.dumps(items)} for slide, items in todo.items()],
        AnswerActor,
        (str(run.path), tuned_name(run), archive, config),
        at_once=config.slides_at_once,
        actors=config.actors,
        engine=config.engine,
        address=address,
    )
    for table in tables:
        for row in table.to_pylist():
            yield row["slide_id"], json.loads(row["lines"])


class AnswerActor:
    """Answers with a tuned run, whose language model is in an engine; one actor of the job.

    Args:
        run: The run's folder.
        model: Name of the tuned run the driver found there.
        archive: Archive URI.
        config: Settings.

    Raises:
        CheckpointError: There is no tuned model in the run, or another one (``wrong_model``).
        ConfigError: The engine cannot be started with these settings.
    """

    def __init__(self, run: str, model: str, archive: str, config: AnswerConfig) -> None:
        self._qa = BatchSlideQA(run, config)
        if tuned_name(self._qa.run) != model:
            raise wrong_model(run)
        self._archive = Archive(archive)

    def __call__(self, slides: list[dict[str, str]]) -> pa.Table:
        """Return each slide's lines."""
        asked = {row["slide_id"]: json.loads(row["items"]) for row in slides}
        lines = self._qa.lines(self._archive, asked)
        return pa.table(
            {"slide_id": list(lines), "lines": [json.dumps(one) for one in lines.values()]}
        )
