"""Captions of trees as the driver keeps them, whatever its actors return."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs import describe as job
from pathflip.archive import Archive
from pathflip.archive.verify import verify
from pathflip.errors import ArchiveError, CheckpointError, ConfigError
from tests.archives import make_archive
from tests.hub import put_in_cache
from tests.trees import make_bare_trees

Answer = Callable[[str, int], "str | None"]


@pytest.fixture
def vlm(tmp_path: Path) -> Path:
    """A folder that looks like a model; no engine is started from it."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    settings = {"model_type": "blip-2", "text_config": {"max_position_embeddings": 256}}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return str(make_bare_trees(tmp_path / "a", slides=2, trees=2))


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Engines elsewhere: they answer ``say(tree, node)``, and die after ``stop_after`` trees."""
    kept: dict[str, Any] = {"say": lambda tree, node: f"Nuclei {tree} {node}.", "asked": []}

    def elsewhere(rows: list[dict[str, str]], *_: Any, **__: Any) -> Iterator[pa.Table]:
        for at, row in enumerate(rows):
            if at == kept.get("stop_after"):
                raise KeyboardInterrupt
            tree = row["tree"]
            kept["asked"].append(tree)
            said = [kept["say"](tree, node) if node < 84 else None for node in range(85)]
            answer = {
                "tree_id": tree, "slide_id": tree.split("/")[0], "captions": said, "reason": "",
                "no_caption": json.dumps({"repeated": said[:84].count(None)}),
            }  # fmt: skip
            yield pa.Table.from_pylist([answer], schema=job._ANSWERS)

    monkeypatch.setattr(job, "map_engines", elsewhere)
    monkeypatch.setattr(job, "_COMMIT_S", 0.0)
    return kept


def stored(uri: str) -> dict[str, dict[str, Any]]:
    rows = Archive(uri).dataset("tree_texts").to_table().to_pylist()
    return {row["tree_id"]: row for row in rows}


def test_a_model_that_says_nonsense_leaves_no_captions(
    uri: str, vlm: Path, answers: dict[str, Any]
) -> None:
    answers["say"] = lambda tree, node: None
    result = job.describe(uri, str(vlm))
    assert (result.trees, result.captions, result.nodes) == (4, 0, 4 * 84)
    assert result.no_caption == {"repeated": 4 * 84}
    assert result.without_keywords == 4
    for row in stored(uri).values():
        assert (row["captions"], row["keywords"]) == ([None] * 85, [])
    assert job.describe(uri, str(vlm)).skipped == 4, "it would say the same again"
    assert verify(uri).damaged == []


def test_a_stopped_job_goes_on_where_it_was(uri: str, vlm: Path, answers: dict[str, Any]) -> None:
    answers["stop_after"] = 3
    with pytest.raises(KeyboardInterrupt):
        job.describe(uri, str(vlm))
    assert len(stored(uri)) == 3
    answers["stop_after"] = None
    result = job.describe(uri, str(vlm))
    assert (result.trees, result.skipped) == (1, 3)
    assert len(answers["asked"]) == len(set(answers["asked"])) == 4
    assert all(row["extractor"] for row in stored(uri).values())
    assert stored(uri)["slide001/1_0"]["captions"][3] == "Nuclei slide001/1_0 3."


def test_keywords_that_a_killed_job_left_are_made(
    uri: str, vlm: Path, answers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(job, "redo_keywords", killed)
        with pytest.raises(KeyboardInterrupt):
            job.describe(uri, str(vlm))
    assert not any(row["extractor"] for row in stored(uri).values())
    result = job.describe(uri, str(vlm))
    assert (result.trees, result.skipped) == (0, 4)
    assert all(row["extractor"] for row in stored(uri).values())


def test_captions_of_another_model_stand_beside_them(
    uri: str, vlm: Path, answers: dict[str, Any]
) -> None:
    first = job.describe(uri, str(vlm))
    (vlm / "model.safetensors").write_bytes(b"other weights")
    second = job.describe(uri, str(vlm))
    assert (first.trees, second.trees, second.skipped) == (4, 4, 0)
    assert first.model != second.model
    sources = Archive(uri).dataset("tree_texts").to_table()["source"].to_pylist()
    assert sorted(sources) == sorted([first.model, second.model] * 4)


def test_what_cannot_be_described(uri: str, vlm: Path, tmp_path: Path) -> None:
    plan = job.describe(uri, str(vlm), dry_run=True, config=job.DescribeConfig(actors=2))
    assert plan.as_json()["estimated_hours"] == round(4 * 84 / 25 / 2 / 3600, 4)
    with pytest.raises(ArchiveError) as bare:
        job.describe(str(make_archive(tmp_path / "bare", slides=1)), str(vlm), dry_run=True)
    assert bare.value.code == "no_trees"
    with pytest.raises(CheckpointError, match="no model folder"):
        job.describe(uri, str(tmp_path / "none"), dry_run=True)
    with pytest.raises(ConfigError, match="nodes_a_second"):
        job.DescribeConfig(nodes_a_second=0)
    (vlm / "config.json").write_text('{"model_type": "bert", "max_position_embeddings": 512}')
    with pytest.raises(ConfigError, match="no prompt is known"):
        job.describe(uri, str(vlm), dry_run=True)


def test_a_model_of_the_hubs_cache_goes_by_its_name(
    uri: str, vlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    put_in_cache(tmp_path / "cache", "owner/tiny", vlm)
    by_name, by_folder = (job.describe(uri, one, dry_run=True) for one in ("owner/tiny", str(vlm)))
    assert by_name.model == by_folder.model
    assert by_name.model.startswith("tiny_")
    with pytest.raises(CheckpointError, match="hub lookup failed"):
        job.describe(uri, "owner/other", dry_run=True)
