"""vLLM against transformers on the same prompts, a language model that decomposes captions, and one
that sees and describes the nodes of patch trees.

One process of its own holds vLLM for the whole module: its import is what takes long.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tifffile
import torch
from PIL import Image

from pathflip import Slide
from pathflip.archive import Archive
from pathflip.archive.captions import Caption, write_captions
from pathflip.archive.commit import Committer
from pathflip.calibration import Calibration
from pathflip.captioner import why_no_caption
from pathflip.geometry import TreeSpec, patch_tree
from pathflip.keywords import extract, extractor_version
from pathflip.slide_qa import SlideQA
from pathflip.slides.sources import stat_source
from pathflip.text import split_sentences
from tests.archives import make_archive
from tests.serving import Tuned
from tests.trees import make_bare_trees
from tests.vlm import make_blip2, said_by_transformers

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

QUESTIONS = (
    "Is there necrosis?",
    "Which tissue is shown?\nA. colon\nB. breast\nC. lung\nD. muscle",
    "What is seen? " + "Say where it lies and how much of it there is. " * 6,
    "Sections show colon. There is mucin. " * 20 + "Is that right?",
)
TOKENS = 24
Call = Callable[..., Any]


class Host:
    """A process in which vLLM was not imported before its settings."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def call(self, work: Callable[..., Any], *given: Any) -> Any:
        return work(self._made, *given)


@pytest.fixture(scope="module")
def host(cluster: str) -> Iterator[Call]:
    """``host(work, *given)``: runs ``work(kept, *given)`` there."""
    import ray

    actor = ray.remote(Host).options(num_cpus=1).remote()
    yield lambda *given: ray.get(actor.call.remote(*given))
    ray.kill(actor)


def start(kept: dict[str, Any], run: str) -> None:
    from jobs.batch_vllm import AnswerConfig, BatchSlideQA

    kept["qa"] = BatchSlideQA(run, AnswerConfig(max_new_tokens=TOKENS, permute=3))


def greedy(kept: dict[str, Any], prompts: list[np.ndarray[Any, Any]], batched: bool) -> list[Any]:
    """Token ids that vLLM says to prompt embeddings, all together or each by itself."""
    from vllm import SamplingParams

    engine, ends = kept["qa"].engine, kept["qa"].front.eos_ids
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS, stop_token_ids=ends)
    inputs = [{"prompt_embeds": torch.from_numpy(prompt)} for prompt in prompts]
    parts = [inputs] if batched else [[one] for one in inputs]
    outputs = [out for part in parts for out in engine.generate(part, params, use_tqdm=False)]
    return [list(out.outputs[0].token_ids) for out in outputs]


def lines(kept: dict[str, Any], archive: str, asked: dict[str, Any]) -> dict[str, Any]:
    return kept["qa"].lines(Archive(archive), asked)


@pytest.fixture(scope="module")
def engine(host: Call, tuned: Tuned) -> Call:
    host(start, str(tuned.run))
    return host


@pytest.fixture(scope="module")
def answerer(tuned: Tuned) -> SlideQA:
    return SlideQA.from_run(tuned.run, llm=tuned.base)


def test_tokens_are_those_of_transformers(engine: Call, answerer: SlideQA, tuned: Tuned) -> None:
    """Merged weights in vLLM, batched and one by one, against peft's adapter in transformers."""
    archive = Archive(tuned.archive)
    model = answerer.model
    assert "lora" in type(model.llm.peft_config["default"]).__name__.lower()
    prompts = []
    for n in range(8):
        _, prefix = answerer.visual_prefix(archive, f"slide{n:03d}")
        prompts += [model.embed_prompt(prefix, question) for question in QUESTIONS]
    assert len(prompts) == 32
    assert len({len(prompt) for prompt in prompts}) > 8
    expected = model.generate_ids(prompts, max_new_tokens=TOKENS)
    assert len({tuple(ids) for ids in expected}) > 8, "what stands in a prompt must matter"
    given = [prompt.detach().numpy() for prompt in prompts]
    assert engine(greedy, given, True) == expected
    assert engine(greedy, given, False) == expected


def test_lines_of_a_batch_are_what_one_slide_at_a_time_gives(
    engine: Call, answerer: SlideQA, tuned: Tuned
) -> None:
    archive = Archive(tuned.archive)
    choice = {"question": "Which tissue is shown?", "choices": ["colon", "breast", "lung", "bone"]}
    free = {"question": "What is seen?", "choices": []}
    long = {"question": "Why? " * 2000, "choices": []}
    slides = [f"slide{n:03d}" for n in range(4)]
    found = engine(lines, str(tuned.archive), {slide: [{}, choice, free, long] for slide in slides})
    assert list(found) == slides
    for slide, (caption, chosen, said, refused) in found.items():
        assert caption == {"caption": answerer.caption(archive, slide, max_new_tokens=TOKENS)}
        answer = answerer.ask(archive, slide, choice["question"], choice["choices"], permute=3)
        assert (chosen["answer"], chosen["choice"]) == (answer.answer, answer.choice)
        assert chosen["scores"] == pytest.approx(answer.scores, abs=1e-5)
        free_answer = answerer.ask(archive, slide, free["question"], max_new_tokens=TOKENS)
        assert said["answer"] == free_answer.answer
        assert refused["error"]["code"] == "prompt_too_long"
    assert len({row[0]["caption"] for row in found.values()}) > 1


def lines_by_text(kept: dict[str, Any], archive: str, asked: dict[str, Any]) -> dict[str, Any]:
    """Answer as a run does that was tuned to answer with the text of an option."""
    front = kept["qa"].front
    before, front.config = front.config, replace(front.config, choice_answer="text")
    try:
        return lines(kept, archive, asked)
    finally:
        front.config = before


def test_options_are_scored_by_their_text_where_a_run_was_tuned_so(
    engine: Call, answerer: SlideQA, tuned: Tuned
) -> None:
    choices = ["colon", "breast tissue", "lung of a patient", "bone"]
    asked = {"question": "Which tissue is shown?", "choices": choices}
    slides = [f"slide{n:03d}" for n in range(3)]
    found = engine(lines_by_text, str(tuned.archive), {slide: [asked, {}] for slide in slides})
    for slide, (chosen, _) in found.items():
        answer = answerer.ask(
            Archive(tuned.archive), slide, asked["question"], choices, mode="option_ll"
        )
        assert (chosen["answer"], chosen["choice"]) == (answer.answer, answer.choice)
        assert chosen["scores"] == pytest.approx(answer.scores, abs=1e-5)


def lines_calibrated(
    kept: dict[str, Any], archive: str, asked: dict[str, Any], way: str, mode: str
) -> dict[str, Any]:
    """Answer as a run does that was tuned to abstain and has a temperature."""
    front = kept["qa"].front
    before, front.config = front.config, replace(front.config, choice_answer=way)
    front.abstains, front.calibration = True, calibration(mode)
    try:
        return lines(kept, archive, asked)
    finally:
        front.config, front.abstains, front.calibration = before, False, None


def calibration(mode: str) -> Calibration:
    return Calibration(
        mode=mode, temperature=2.5, questions=60, ece_before=0.2, ece=0.1, nll_before=2.0, nll=1.0,
        abstain_bias=0.7, unanswerable=20,
    )  # fmt: skip


@pytest.mark.parametrize(("way", "mode"), [("letter", "letter_logit"), ("text", "option_ll")])
def test_a_batch_abstains_and_is_calibrated_as_one_slide_is(
    engine: Call, answerer: SlideQA, tuned: Tuned, way: str, mode: str
) -> None:
    choices = ["colon", "breast tissue", "lung of a patient"]
    asked = {"question": "Which tissue is shown?", "choices": choices}
    own = {"question": "Which tissue is shown?", "choices": ["colon", "It cannot be told"]}
    slides = [f"slide{n:03d}" for n in range(2)]
    todo = {slide: [asked, own] for slide in slides}
    found = engine(lines_calibrated, str(tuned.archive), todo, way, mode)
    model = answerer.model
    model.abstains, model.calibration = True, calibration(mode)
    try:
        for slide, (chosen, its_own) in found.items():
            answer = answerer.ask(
                Archive(tuned.archive), slide, asked["question"], choices, mode=mode, permute=3
            )
            assert (chosen["answer"], chosen["choice"]) == (answer.answer, answer.choice)
            assert chosen["scores"] == pytest.approx(answer.scores, abs=1e-5)
            assert chosen["abstain"] == pytest.approx(answer.abstain, abs=1e-5)
            assert its_own["abstain"] is None
            assert sum(its_own["scores"].values()) == pytest.approx(1)
    finally:
        model.abstains, model.calibration = False, None


def decomposed(kept: dict[str, Any], llm: str, config: Any, rows: list[dict[str, str]]) -> pa.Table:
    """Return the statements of the job's actor, in the process that has vLLM."""
    from jobs.decompose import DecomposeActor

    if "decomposer" not in kept:
        kept["decomposer"] = DecomposeActor(llm, config)
    return kept["decomposer"](rows)


def test_captions_are_decomposed(
    engine: Call, tuned: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job with a model that says nonsense: all of it is dropped, sentences stand in for it."""
    from jobs import decompose as job

    def in_the_host(
        rows: list[dict[str, str]], actor: type, arguments: tuple[Any, ...], *, at_once: int,
        **where: Any,
    ) -> Iterator[pa.Table]:  # fmt: skip
        assert actor is job.DecomposeActor
        for at in range(0, len(rows), at_once):
            yield engine(decomposed, *arguments, rows[at : at + at_once])

    monkeypatch.setattr(job, "map_engines", in_the_host)
    uri = make_archive(tmp_path / "archive", slides=5)
    texts = [row["text"] for row in Archive(uri).captions().to_pylist()]
    with Committer(uri) as committer:  # the same text from another source is not asked twice
        write_captions(committer, [Caption(slide_id="slide000", text=texts[0])], source="again")
    config = job.DecomposeConfig(captions_at_once=2, max_new_tokens=16)
    plan = job.decompose(str(uri), str(tuned.base), config=config, dry_run=True)
    assert (plan.captions, plan.skipped) == (6, 0)
    assert not any(row["model"] for row in Archive(uri).captions().to_pylist())
    seen = []
    result = job.decompose(
        str(uri), str(tuned.base), config=config, progress=lambda one: seen.append(one.line())
    )
    assert result.captions == 6
    assert result.fell_back == len(set(texts)) == 5
    assert result.statements == 0
    assert sum(result.dropped.values()) >= 1
    assert len(seen) == 3
    for row in Archive(uri).captions().to_pylist():
        assert row["model"] == result.model
        assert row["statements"] == split_sentences(row["text"]) == row["sentences"]
    again = job.decompose(str(uri), str(tuned.base), config=config)
    assert (again.captions, again.skipped) == (0, 6)


# -- captions of patch trees ----------------------------------------------------------------------


def described(kept: dict[str, Any], *given: Any) -> pa.Table:
    """Return the answers of the job's actor, in the process that has vLLM."""
    from jobs.describe import DescribeActor

    *arguments, rows = given
    if "describer" not in kept:
        kept["describer"] = DescribeActor(*arguments)
    return kept["describer"](rows)


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_blip2(tmp_path_factory.mktemp("vlm") / "tiny")


@pytest.fixture
def forest(tmp_path: Path) -> str:
    """Three slides of two trees: one that is there, one that has changed, one that is gone."""
    uri = make_bare_trees(tmp_path / "forest", slides=3, trees=2)
    rgb = np.full((1024, 2048, 3), 230, np.uint8)  # the first tree is all glass
    rgb[:, 1024:] = np.random.default_rng(0).integers(0, 255, (1024, 1024, 1), np.uint8)
    rgb[:512, 1024:] //= 8
    changes = {}
    for n in range(3):
        path = tmp_path / f"slide{n:03d}.tif"
        tifffile.imwrite(
            path, rgb, tile=(256, 256), photometric="rgb", resolution=(4e4, 4e4),
            resolutionunit="CENTIMETER",
        )  # fmt: skip
        source = stat_source(path)
        at = {"uri": str(path), "bytes": source.bytes, "mtime_ns": source.mtime_ns, "mpp": 0.25}
        changes[f"slide{n:03d}"] = at
    with Committer(uri) as committer:
        committer.update_slides(changes)
    os.utime(changes["slide001"]["uri"], ns=(1, 1))
    Path(changes["slide002"]["uri"]).unlink()
    return str(uri)


def test_nodes_are_described_as_transformers_describes_them(
    host: Call, vlm: Path, forest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jobs import describe as job

    asked: list[list[str]] = []

    def in_the_host(
        rows: list[dict[str, str]], actor: type, arguments: tuple[Any, ...], *, at_once: int,
        **where: Any,
    ) -> Iterator[pa.Table]:  # fmt: skip
        assert actor is job.DescribeActor
        for at in range(0, len(rows), at_once):
            asked.append([row["tree"] for row in rows[at : at + at_once]])
            yield host(described, *arguments, rows[at : at + at_once])

    monkeypatch.setattr(job, "map_engines", in_the_host)
    config = job.DescribeConfig(trees_at_once=4, max_new_tokens=12)
    plan = job.describe(forest, str(vlm), config=config, dry_run=True)
    assert (plan.trees, plan.nodes, plan.skipped) == (6, 6 * 84, 0)
    assert plan.estimated_hours == round(6 * 84 / 25 / 3600, 4)
    assert "tree_texts" not in Archive(forest).tables()

    result = job.describe(forest, str(vlm), config=config)
    assert (result.trees, result.nodes) == (2, 2 * 84)
    assert result.captions + sum(result.no_caption.values()) == result.nodes
    assert {name: told.partition(":")[0] for name, told in result.failed.items()} == {
        "slide001": "source_changed", "slide002": "not_a_file",
    }  # fmt: skip
    assert result.exit_code == 3
    rows = {
        row["tree_id"]: row for row in Archive(forest).dataset("tree_texts").to_table().to_pylist()
    }
    assert set(rows) == {"slide000/0_0", "slide000/1_0"}
    slide = Slide(Archive(forest).slide("slide000")["uri"])
    spec = TreeSpec(parent_um=256, node_px=128)
    images, told = [], []
    for tx, nodes in ((0, (0, 30)), (1, (0, 1, 4, 21, 60))):
        tree = patch_tree(tx, 0, mpp=0.25, spec=spec)
        for node in nodes:
            x0, y0 = tree.rects[0, node, :2].tolist()
            images.append(Image.fromarray(slide.read(x0, y0, 128, mpp=float(tree.mpp[node]))))
            told.append(rows[f"slide000/{tx}_0"]["captions"][node])
    expected = said_by_transformers(vlm, images, max_new_tokens=12)
    assert told == [None if why_no_caption(text) else text for text in expected]
    assert len({text for text in told if text}) > 1, "what is seen must matter"
    for row in rows.values():
        assert row["captions"][84] is None, "the node is masked"
        assert row["keywords"] == extract(row["captions"]).vocabulary
        assert (row["source"], row["model"], row["extractor"]) == (
            result.model, result.model, extractor_version(),
        )  # fmt: skip

    again = job.describe(forest, str(vlm), config=config)
    assert (again.trees, again.skipped, again.nodes) == (0, 2, 0)
    assert set(again.failed) == {"slide001", "slide002"}, "what could not be read is tried again"
    assert not {"slide000/0_0", "slide000/1_0"} & set(asked[-1])
