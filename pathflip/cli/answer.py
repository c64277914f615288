"""Commands that run a language model: caption, ask, decompose."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from typing import Annotated, Any, Literal

import typer

from pathflip.cli.options import (
    AddressOption,
    ArchiveOption,
    ConfigOption,
    JsonOption,
    LocalOption,
    OverrideOption,
    engine,
    job,
    open_slide_qa,
    print_json,
    show_result,
    show_table,
    were_set,
    working,
)
from pathflip.cli.process import open_archive
from pathflip.errors import ConfigError

app = typer.Typer()

RunOption = Annotated[str, typer.Option("--run", help="Folder that pathflip tune wrote.")]
LlmOption = Annotated[
    str | None,
    typer.Option(help="Where the base language model is, if it is not where it was tuned."),
]
RegionOption = Annotated[
    str | None,
    typer.Option(help="Only this square, level-0 pixels.", metavar="X,Y,SIZE"),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda, or auto for a GPU if there is one; default: auto.")
]
OutOption = Annotated[
    str | None,
    typer.Option(help="Batch on Ray with vLLM: a file of JSON lines that is added to."),
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Batch: count what is missing; write nothing.")
]


@app.command()
def caption(
    archive: ArchiveOption,
    run: RunOption,
    slide: Annotated[list[str] | None, typer.Argument(help="Slide ids or file names.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Batch: every slide.")] = False,
    split: Annotated[str | None, typer.Option(help="Batch: every slide of this split.")] = None,
    out: OutOption = None,
    region: RegionOption = None,
    llm: LlmOption = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest caption, tokens; default: 512.", min=1)
    ] = None,
    device: DeviceOption = None,
    address: AddressOption = None,
    local: LocalOption = None,
    config: ConfigOption = None,
    overrides: OverrideOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Describe slides in words.

    Named slides are described here and now. With --all or --split and --out it is a batch job on
    Ray with vLLM: the same command again adds what is missing, and a slide that cannot be read has
    a line that says why (exit code 3).
    """
    square = None if region is None else _region(region)
    if every or split is not None:
        if slide or out is None or square is not None or llm is not None or (every and split):
            raise ConfigError(
                "A batch of captions takes --all or --split, and --out FILE.",
                hint="Leave SLIDE, --region and --llm out; the batch uses the folder llm of --run.",
            )
        jobs_answer = job("answer")
        settings = _settings(config, overrides, device, max_new_tokens=max_new_tokens)
        with working() as progress:
            result = jobs_answer.caption_all(
                archive, run, out, split=split, config=settings, address=engine(address, local),
                progress=progress, dry_run=dry_run,
            )  # fmt: skip
        _end(result, as_json=as_json, dry_run=dry_run)
        return
    _refuse_batch_options(out, dry_run, config, overrides, address, local)
    if not slide:
        raise ConfigError(
            "Say which slide to describe.", hint="Name slides, or give --all and --out FILE."
        )
    from pathflip.slide_qa import CAPTION_TOKENS

    with redirect_stdout(sys.stderr):
        opened, qa = open_archive(archive), open_slide_qa(run, llm=llm, device=device)
        rows = []
        for name in [opened.resolve(name) for name in slide]:
            text = qa.caption(opened, name, square, max_new_tokens=max_new_tokens or CAPTION_TOKENS)
            rows.append({"slide_id": name, "caption": text})
    if as_json:
        print_json(rows[0] if len(rows) == 1 else rows)
        return
    show_table("", ("slide_id", "caption"), [list(row.values()) for row in rows])


@app.command()
def ask(
    archive: ArchiveOption,
    run: RunOption,
    slide: Annotated[str | None, typer.Argument(help="Slide id or file name.")] = None,
    question: Annotated[str | None, typer.Argument(help="What to ask.")] = None,
    choices: Annotated[
        list[str] | None,
        typer.Option(help='An option; repeat it, or give all at once: "one|two|three".'),
    ] = None,
    mode: Annotated[
        Literal["letter_logit", "option_ll", "generate"] | None,
        typer.Option(help="How an option is chosen: next letter, its text's likelihood, writing."),
    ] = None,
    permute: Annotated[
        int | None,
        typer.Option(help="Show options in this many cyclic orders; default: 1.", min=1, max=8),
    ] = None,
    abstain: Annotated[
        bool | None,
        typer.Option(
            "--abstain/--no-abstain",
            help="Whether it may say that the slide cannot tell; default: as it was tuned.",
        ),
    ] = None,
    questions: Annotated[
        str | None, typer.Option(help="Batch: a file of questions.", metavar="FILE")
    ] = None,
    out: OutOption = None,
    region: RegionOption = None,
    llm: LlmOption = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest answer, tokens; default: 512.", min=1)
    ] = None,
    device: DeviceOption = None,
    address: AddressOption = None,
    local: LocalOption = None,
    config: ConfigOption = None,
    overrides: OverrideOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Ask a question about a slide: the answer is one of its options, or free text.

    With --questions and --out it is a batch job on Ray with vLLM: the same command again adds what
    is missing, and a slide that cannot be read has a line that says why (exit code 3).
    """
    square = None if region is None else _region(region)
    if questions is not None:
        one = (slide, question, choices, square, llm)
        if out is None or any(value is not None for value in one) or mode is not None:
            raise ConfigError(
                "A batch of questions takes --questions FILE and --out FILE.",
                hint="Leave SLIDE, QUESTION, --choices, --region, --llm and --mode out.",
            )
        jobs_answer = job("answer")
        settings = _settings(
            config, overrides, device, max_new_tokens=max_new_tokens, permute=permute,
            abstain=abstain,
        )  # fmt: skip
        with working() as progress:
            result = jobs_answer.ask_all(
                archive, run, questions, out, config=settings, address=engine(address, local),
                progress=progress, dry_run=dry_run,
            )  # fmt: skip
        _end(result, as_json=as_json, dry_run=dry_run)
        return
    _refuse_batch_options(out, dry_run, config, overrides, address, local)
    if slide is None or question is None:
        raise ConfigError(
            "Say which slide, and what to ask.", hint='pathflip ask SLIDE "Is there necrosis?" …'
        )
    from pathflip.slide_qa import CAPTION_TOKENS, check_question

    options = [part.strip() for text in choices or () for part in text.split("|")]
    check_question(question, options)
    with redirect_stdout(sys.stderr):
        opened = open_archive(archive)
        name = opened.resolve(slide)
        answer = open_slide_qa(run, llm=llm, device=device).ask(
            opened, name, question, options, mode=mode, permute=permute or 1, abstain=abstain,
            region=square, max_new_tokens=max_new_tokens or CAPTION_TOKENS,
        )  # fmt: skip
    document = {
        "slide_id": answer.slide_id,
        "answer": answer.answer,
        "choice": answer.choice,
        "scores": answer.scores,
        "abstain": answer.abstain,
    }
    if as_json:
        print_json(document)
        return
    print(answer.answer if answer.choice is None else f"{answer.choice}. {answer.answer}")
    if answer.scores:
        rows: list[list[Any]] = [
            [letter, text, score]
            for (letter, score), text in zip(answer.scores.items(), options, strict=True)
        ]
        if answer.abstain is not None:
            from pathflip.text import CANNOT_TELL

            rows.append(["", CANNOT_TELL, answer.abstain])
        show_table("", ("", "option", "probability"), rows)


@app.command()
def decompose(
    archive: ArchiveOption,
    llm: Annotated[
        str, typer.Option(help="Chat model, such as a Qwen3: a folder, or owner/name on the hub.")
    ],
    device: DeviceOption = None,
    address: AddressOption = None,
    local: LocalOption = None,
    config: ConfigOption = None,
    overrides: OverrideOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Count captions; write nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Cut captions into visual statements, each checked against its caption.

    pathflip pretrain -o subcaption_source=statements draws sub-captions from them.
    """
    from pathflip.config import load_config

    jobs_decompose = job("decompose")
    settings = load_config(
        jobs_decompose.DecomposeConfig,
        file=config,
        overrides=overrides or (),
        given=were_set(engine=_engine(device)),
    )
    with working() as progress:
        result = jobs_decompose.decompose(
            archive,
            llm,
            config=settings,
            address=engine(address, local),
            progress=progress,
            dry_run=dry_run,
        )
    show_result(result, f"statements in {archive}", as_json=as_json, dry_run=dry_run)


# -- shared ---------------------------------------------------------------------------------------


def _region(text: str) -> tuple[int, int, int]:
    try:
        x0, y0, size0 = (int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(
            f"{text!r} is not a region.", hint="Write it as X,Y,SIZE in whole level-0 pixels."
        ) from None
    return x0, y0, size0


def _engine(device: str | None) -> dict[str, Any] | None:
    return None if device is None else {"device": device}


def _settings(
    config: str | None, overrides: list[str] | None, device: str | None, **flags: int | bool | None
) -> Any:
    """Settings of a batch."""
    from pathflip.config import load_config

    return load_config(
        job("batch_vllm").AnswerConfig,
        file=config,
        overrides=overrides or (),
        given=were_set(engine=_engine(device), **flags),
    )


def _refuse_batch_options(
    out: str | None,
    dry_run: bool,
    config: str | None,
    overrides: Any,
    address: str | None,
    local: bool | None,
) -> None:
    if out is not None or dry_run or config or overrides or address or local is not None:
        raise ConfigError(
            "--out, --dry-run, --config, -o, --address and --local/--ray are options of a batch.",
            hint="For a batch give --all, --split or --questions FILE, and --out FILE.",
        )


def _end(result: Any, *, as_json: bool, dry_run: bool) -> None:
    show_result(result, f"written to {result.out}", as_json=as_json, dry_run=dry_run)
    if result.failed:
        raise typer.Exit(3)
