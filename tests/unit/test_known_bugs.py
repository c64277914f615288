"""Open faults of pinned versions that would touch us: each is out of reach, or tested for.

docs/reference/reliability.md names them.
"""

from __future__ import annotations

import ast
from pathlib import Path

import lance
import pyarrow.compute as pc
import pytest

from pathflip.archive import Archive, indexes
from pathflip.archive.commit import Committer
from pathflip.archive.maintain import maintain
from pathflip.archive.schema import pictures_schema, slides_schema
from pathflip.archive.tables import TABLES
from pathflip.vllm_engine import EngineConfig, engine_arguments
from tests.serving import Tuned, make_tuned

ROOT = Path(__file__).parents[2]
SOURCES = [path for name in ("pathflip", "jobs", "serve") for path in (ROOT / name).rglob("*.py")]


def words(path: Path) -> set[str]:
    """Names, attributes, keyword arguments and text constants that a file uses."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.keyword(arg=str(name)):
                found.add(name)
            case ast.Constant(value=str(text)):
                found.add(text)
    return found


@pytest.mark.parametrize(
    "word",
    [
        "enable_lora",  # vllm#51122: prompt embeddings beside adapters overrun memory
        "lora_request",
        "prompt_is_token_ids",  # vllm#56655: mixed prompts share a prefix cache key
        "defer_index_remap",  # lance#9270: segments merged after that find nothing
    ],
)
def test_what_a_fault_needs_is_not_used(word: str) -> None:
    assert [path for path in SOURCES if word in words(path)] == []


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    return make_tuned(tmp_path_factory.mktemp("tuned"), slides=4)


def test_adapters_are_merged_before_vllm_sees_them(tuned: Tuned) -> None:
    """vllm#51122. What the engine is given has weights of its own and no adapter."""
    given = engine_arguments(tuned.run / "llm", EngineConfig(device="cpu"))
    assert given["enable_prompt_embeds"] is True
    assert not [name for name in given if "lora" in name]
    files = {path.name for path in (tuned.run / "llm").iterdir()}
    assert "model.safetensors" in files
    assert not [name for name in files if "adapter" in name]


def test_a_key_that_is_indexed_and_merged_by_comes_first() -> None:
    """lancedb#3177, lance#7596: a merge by an indexed key that is no leading column is lost."""
    indexed = [
        spec for spec in TABLES if spec.per_slide and spec.key in (*indexes._SCALAR, *spec.indexes)
    ]
    schemas = {"slides": slides_schema(), "pictures": pictures_schema()}
    assert {spec.name for spec in indexed} == set(schemas)
    assert all(schemas[spec.name].names[0] == spec.key for spec in indexed)


def test_rows_are_found_and_changed_with_indexes_after_compaction(
    tuned: Tuned, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lance#9270, lancedb#3177. By scan as by index, made before compaction and after."""
    monkeypatch.setattr(indexes, "SCALAR_INDEX_ROWS", 1)
    changed: dict[str, str] = {}
    for turn in range(3):
        maintain(tuned.archive)
        archive = Archive(tuned.archive)
        for table, columns in (("slides", ["slide_id"]), ("embeddings_tex", ["slide_id", "kind"])):
            dataset = archive.dataset(table)
            assert set(columns) <= indexes.indexed_columns(dataset)
            everything = dataset.to_table()
            for column in columns:
                for value in set(everything[column].to_pylist()):
                    wanted = pc.sum(pc.equal(everything[column], value)).as_py()
                    assert dataset.count_rows(f"{column} = '{value}'") == wanted
        slide = sorted(archive.ready_ids())[turn]
        changed[slide] = f"split{turn}"
        with Committer(tuned.archive) as committer:  # merges fragments that the next turn compacts
            committer.update_slides({slide: {"split": changed[slide], "patient_id": f"P{turn}"}})
        after = Archive(tuned.archive)
        assert after.dataset("slides").count_rows() == 4
        for one, split in changed.items():
            assert after.slide(one)["split"] == split
        found = after.slide_embeddings(slide, "tex")
        assert set(found["patient_id"].to_pylist()) == {f"P{turn}"}


def test_versions_are_those_the_faults_were_looked_up_for() -> None:
    """A newer one may have mended them, or made them reachable: look again."""
    import importlib.metadata

    assert lance.__version__.startswith("14.0.")
    assert importlib.metadata.version("lancedb") == "0.40.0"
