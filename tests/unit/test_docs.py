"""README and docs are true: their code runs, their commands parse, their links and paths exist.

A fence says what its block is. ``python`` is executed, block after block of a page in one
namespace; ``sh`` is read by the real command line, and commands that are cheap and need no Ray are
run; ``json`` and ``yaml`` are parsed; a fence without a word shows output or a layout. A block that
cannot run here stands under ``<!-- not run: reason -->``, and :data:`EXCEPTIONS` counts those.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import typer
import yaml

import pathflip
from jobs.ingest.config import IngestConfig
from pathflip.archive import Archive
from pathflip.checkpoints import write_whole
from pathflip.cli import app, main
from pathflip.config import load_config
from pathflip.interop.features.exporting import export_features
from pathflip.models.instruct import PathFLIPInstruct
from pathflip.models.prompt_encoder import InstructConfig
from pathflip.synth import make_slide
from tests.serving import make_base
from tests.unit.serve.service_fixture import make_world

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    page.relative_to(ROOT).as_posix()
    for page in (
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "platform").rglob("*.md"),
    )
)
EXCEPTIONS = 25
"""Blocks marked as not run; a new one needs a reason as good as theirs."""
LONGEST_WALK = 8
"""Files, README among them."""
RUN = (
    "archive export", "archive import", "archive stats", "archive verify", "ask", "caption",
    "classify", "evaluate retrieval", "evaluate vqa", "evaluate zeroshot", "ground", "search",
    "slides list", "slides show",
)  # fmt: skip
"""Commands that are run as they stand: quick, without Ray, writing into the test's folder only."""
BATCH = {"--all", "--split", "--questions"}
"""Flags that make a batch on Ray of ``ask`` and ``caption``."""
OURS = ("pathflip", "jobs", "serve", "tests", "platform", "requirements", "docs")


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block.

    Attributes:
        page: Path of its page.
        line: Number of its first line in the page, from 1.
        kind: The word after the fence; empty where there is none.
        text: Text of the block.
        excused: The reason why it is not run; empty where it is.
    """

    page: str
    line: int
    kind: str
    text: str
    excused: str


FENCE = re.compile(
    r"(?:<!-- not run: (?P<excused>[^>]+) -->\n)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


def blocks_of(page: str) -> list[Block]:
    text = (ROOT / page).read_text()
    return [
        Block(
            page=page,
            line=text.count("\n", 0, found.start("text")) + 1,
            kind=found["kind"],
            text=found["text"],
            excused=found["excused"] or "",
        )
        for found in FENCE.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def cases(kind: str, *, excused: bool = False) -> Any:
    """The blocks of a kind, named by page and line; those not run here only where wanted."""
    return pytest.mark.parametrize(
        "block",
        [
            pytest.param(block, id=f"{block.page}:{block.line}")
            for block in BLOCKS
            if block.kind == kind and (excused or not block.excused)
        ],
    )


# -- the folder that examples run in --------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that examples name: archive, runs, language model, slides and tables."""
    home = tmp_path_factory.mktemp("docs")
    made = make_world(home)
    (home / "runs").mkdir()
    made.run.rename(home / "runs" / "mini")
    texts = Archive(made.archive).captions()["text"].to_pylist()
    base = make_base(home / "llm", texts)
    _make_tuned(home / "runs" / "answers", made.loaded, base)
    (home / "slides").mkdir()
    make_slide(home / "slides" / "slide003.svs", width=2048, height=2048, mpp=0.5)
    tables = {
        "reports.csv": "slide,caption\nslide003,Sections show colon. There is necrosis.\n",
        "patients.csv": "slide,patient_id,split,grade\nslide001,P16,test,1\nslide003,P17,test,2\n",
        "questions.csv": "slide,question,choices,answer\n"
        "slide001,Which tissue is shown?,colon|breast|lung,A\n"
        "slide003,Which tissue is shown?,colon|breast|lung,A\n",
        "scale.csv": "slide,mpp\nslide003,0.5\n",
        "tasks.yaml": "tasks:\n- {name: grade, prompts: [a graded tumour], positive: ['2']}\n",
    }
    for name, text in tables.items():
        (home / name).write_text(text)
    export_features(Archive(made.archive), "trident", home / "trident_job")
    _add_slide_features(home / "trident_job", sorted(Archive(made.archive).ready_ids()))
    given = {name: str(home / f"{name}.csv") for name in ("patients", "questions")}
    arguments = ["archive", "import", "--archive", str(made.archive)]
    with pytest.raises(SystemExit, match="0"):
        main([*arguments, "--labels", given["patients"], "--questions", given["questions"]])
    return home


def _add_slide_features(job: Path, slides: Sequence[str]) -> None:
    """Vectors of slides as TRIDENT writes them, beside its features of patches."""
    folder = job / "20x_256px_0px_overlap" / "slide_features_titan"
    folder.mkdir(parents=True)
    for number, slide in enumerate(slides):
        with h5py.File(folder / f"{slide}.h5", "w") as file:
            file.create_dataset("features", data=np.sin(np.arange(1.0, 9.0) * (number + 1)))


def _make_tuned(folder: Path, loaded: Any, base: Path) -> None:
    """A run as ``pathflip tune`` leaves it over the archive's slide model, untrained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = PathFLIPInstruct.from_parts(loaded.model, base, InstructConfig(), seed=1)
    about = {
        "kind": "instruct",
        "run": "run",
        "fingerprint": loaded.fingerprint,
        "instruct_fingerprint": model.fingerprint(),
        "encoder": loaded.encoder,
        "tiling": loaded.tiling,
    }

    def fill(part: Path) -> None:
        model.save_pretrained(part)
        (part / "pathflip.json").write_text(json.dumps(about))

    write_whole(folder / "model", fill)
    write_whole(folder / "llm", model.save_merged)


@pytest.fixture(autouse=True)
def there(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples name files as seen from that folder."""
    if "home" in request.fixturenames:
        monkeypatch.chdir(request.getfixturevalue("home"))


# -- code -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "page",
    sorted({block.page for block in BLOCKS if block.kind == "python" and not block.excused}),
)
def test_python_runs(page: str, home: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "docs"}
    for block in blocks_of(page):
        if block.kind == "python" and not block.excused:
            shifted = ast.parse("\n" * (block.line - 1) + block.text, str(ROOT / page))
            exec(compile(shifted, str(ROOT / page), "exec"), namespace)


@cases("json")
def test_json_parses(block: Block) -> None:
    for document in re.split(r"\n(?=[{\[])", block.text.strip()):
        json.loads(document)


@cases("yaml")
def test_yaml_parses(block: Block) -> None:
    assert yaml.safe_load(block.text)


# -- commands -------------------------------------------------------------------------------------


def commands(block: Block) -> list[list[str]]:
    """The commands of a block, word by word, without comments."""
    found, held = [], ""
    for line in block.text.replace("\\\n", " ").splitlines():
        held += line + "\n"
        try:
            words = shlex.split(held, comments=True)
        except ValueError:  # a quotation that goes on in the next line
            continue
        held = ""
        if words:
            found.append(words)
    assert not held, held
    return found


def parse(words: Sequence[str]) -> tuple[str, list[str]]:
    """(name, arguments) of a ``pathflip`` command that the command line accepts.

    Raises:
        Exception: There is no such command, flag or option, or something required is missing.
    """
    command: Any = typer.main.get_command(app)
    names, rest = [], list(words)
    while hasattr(command, "commands"):
        if command.invoke_without_command and rest[0].startswith("-"):
            break  # a group that is a command as well
        names.append(rest.pop(0))
        assert names[-1] in command.commands, f"there is no command {' '.join(names)}"
        command = command.commands[names[-1]]
    if rest != ["--help"]:
        command.make_context(names[-1], list(rest))
    return " ".join(names), rest


def settings_of(name: str) -> Callable[[list[str], str | None], object] | None:
    """The function that checks ``-o`` settings of a command, as the command does."""
    from jobs import batch_vllm, index, pretrain, trees, tune
    from serve.config import ServeConfig

    if name == "pretrain":
        return lambda given, preset: pretrain.resolve(preset, overrides=given)
    if name == "tune":
        files = {"run": "runs/mini", "llm": "llm"}
        return lambda given, preset: tune.resolve(preset, overrides=given, given=files)
    kinds: dict[str, type[Any]] = {
        "ingest": IngestConfig,
        "index": index.IndexConfig,
        "trees": trees.TreesConfig,
        "caption": batch_vllm.AnswerConfig,
        "ask": batch_vllm.AnswerConfig,
    }
    if name == "serve":
        given_by_flags = {"archive": "archive", "run": "runs/mini"}
        return lambda given, preset: load_config(ServeConfig, overrides=given, given=given_by_flags)
    if name in kinds:
        return lambda given, preset: load_config(kinds[name], overrides=given)
    return None


def option(arguments: Sequence[str], *names: str) -> list[str]:
    """The values of an option, as often as it is given."""
    return [b for a, b in pairwise(arguments) if a in names]


@cases("sh", excused=True)
def test_commands_are_as_the_command_line_wants_them(block: Block, home: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in commands(block):
        if "--" in words:  # ray job submit … -- python …
            words = words[words.index("--") + 1 :]
        if words[0].endswith("python") and words[1:2] == ["-m"]:
            assert importlib.util.find_spec(words[2]), f"no such module: {words[2]}"
            if words[2] != "jobs.ingest":
                continue
            words = ["pathflip", "ingest", *words[3:]]  # the two are one
        if words[0] == "make":
            asked = [word for word in words[1:] if "=" not in word]
            assert set(asked) <= targets, f"no such target: {words}"
        elif words[0] == "pathflip":
            name, arguments = parse(words[1:])
            given = option(arguments, "-o", "--set")
            check = settings_of(name)
            if given and check is not None:
                check(given, next(iter(option(arguments, "--preset")), None))
        else:
            assert block.excused, f"{words[0]}: mark the block as not run, with a reason"


@cases("sh")
def test_cheap_commands_run(block: Block, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in commands(block):
        name = " ".join(words[1:3]) if " ".join(words[1:3]) in RUN else words[1]
        batch = name in ("ask", "caption") and BATCH & set(words)
        if words[0] != "pathflip" or name not in RUN or batch:
            continue
        with pytest.raises(SystemExit) as ended:
            main(words[1:])
        told = capsys.readouterr()
        assert ended.value.code == 0, f"{' '.join(words)}\n{told.err}"
        assert told.out.strip(), f"{' '.join(words)} said nothing"
        for file in option(words, "--out"):
            assert Path(file).exists()


def test_few_blocks_are_excused_and_commands_are_marked_as_such() -> None:
    excused = [f"{block.page}:{block.line} {block.excused}" for block in BLOCKS if block.excused]
    assert len(excused) == EXCEPTIONS, "\n".join(excused)
    for block in BLOCKS:
        if not block.kind:
            first = [line.split()[0] for line in block.text.splitlines() if line.strip()]
            assert not {"pathflip", "make", "ray", "docker", "$", "python"} & set(first), (
                f"{block.page}:{block.line} holds commands: say sh"
            )
        assert block.kind in ("", "sh", "python", "json", "yaml", "js"), (
            f"{block.page}:{block.line}"
        )


# -- links and names ------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings
    }


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link or link.startswith("mailto:"):
            continue
        path, _, anchor = link.partition("#")
        target = ROOT / page if not path else (ROOT / page).parent / path
        assert target.exists(), f"{page} links {link}"
        if anchor:
            assert anchor in anchors(target), f"{page} links {link}"


@pytest.mark.parametrize("page", PAGES)
def test_files_and_objects_that_a_page_names_exist(page: str) -> None:
    for word in re.findall(r"`([^`\n]+)`", (ROOT / page).read_text()):
        if re.fullmatch(rf"({'|'.join(OURS)})/[\w/.-]+\.\w+", word):
            beside = (ROOT / page).parent / word
            assert (ROOT / word).exists() or beside.exists(), f"{page} names {word}"
        elif re.fullmatch(r"(pathflip|jobs|serve)(\.\w+)+", word):
            assert importable(word), f"{page} names {word}"
        elif page.startswith("docs") and re.fullmatch(r"[\w-]+/[\w/-]+\.py", word):
            found = [*ROOT.glob(f"pathflip/{word}"), *ROOT.glob(word)]
            assert found, f"{page} names {word}"
        elif test := re.fullmatch(r"(tests/[\w/]+\.py)::(\w+)", word):
            assert f"def {test[2]}(" in (ROOT / test[1]).read_text(), f"{page} names {word}"


def importable(name: str) -> bool:
    """Return whether a dotted name is a module, or something in one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def test_pages_that_the_code_names_exist() -> None:
    hint = re.compile(r"\bdocs/[\w/-]+\.md\b")
    places = [path for folder in OURS[:6] for path in (ROOT / folder).rglob("*")]
    files = [*places, ROOT / "Makefile", ROOT / "cluster.yaml"]
    named = 0
    for file in files:
        if file.suffix in (".py", ".sh", ".yaml", ".md", ".html") or file.name == "Makefile":
            for page in hint.findall(file.read_text()):
                named += 1
                assert (ROOT / page).exists(), f"{file.relative_to(ROOT)} names {page}"
    assert named > 20


def test_the_index_of_the_docs_lists_every_page() -> None:
    text = (ROOT / "docs" / "README.md").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        if page.parent != ROOT / "docs":
            assert f"({page.relative_to(ROOT / 'docs').as_posix()})" in text


def test_the_citation_is_of_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == pathflip.__version__
    for reference in cited["references"]:
        arxiv = reference["url"].rpartition("/")[2]
        assert f"arXiv:{arxiv}" in (ROOT / "docs" / "reference" / "references.md").read_text()


# -- newcomers' walks -----------------------------------------------------------------------------

STEP = re.compile(r"^\d+\. \[`(?P<file>[^`]+)`\]\([^)]+\) `(?P<symbol>\w+)`", re.MULTILINE)


def walks() -> dict[str, list[tuple[str, str]]]:
    """The walks of docs/concepts/architecture.md: title -> (file, symbol) of each step."""
    text = (ROOT / "docs" / "concepts" / "architecture.md").read_text()
    part = text.partition("## Two walks through the code")[2].partition("\n## ")[0]
    found = {}
    for walk in part.split("\n### ")[1:]:
        title, _, steps = walk.partition("\n")
        found[title] = [(step["file"], step["symbol"]) for step in STEP.finditer(steps)]
    return found


def test_walks_are_short_and_each_step_leads_to_the_next() -> None:
    found = walks()
    assert len(found) == 2
    for title, steps in found.items():
        assert 4 <= len({file for file, _ in steps}) < LONGEST_WALK, title
        for file, symbol in steps:
            text = (ROOT / file).read_text()
            assert re.search(rf"^\s*(async )?(def|class) {symbol}\b", text, re.MULTILINE), (
                f"{title}: {file} defines no {symbol}"
            )
        read = ""
        for (file, _), (_, following) in pairwise(steps):
            read += (ROOT / file).read_text()
            assert re.search(rf"\b{following}\b", read), f"{title}: nothing leads to {following}"
