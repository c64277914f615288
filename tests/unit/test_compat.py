"""Compatibility of models, encoders and archives, the same in every command."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pathflip.archive import Archive
from pathflip.archive.commit import Committer
from pathflip.checkpoints import Run
from pathflip.cli import main
from pathflip.compat import check_fits, check_indexed, check_weights, resolve_encoder
from pathflip.errors import ArchiveError, ConfigError, PathFLIPError
from tests.unit.archive import cohort, models


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> Path:
    uri = tmp_path_factory.mktemp("compat") / "archive"
    cohort.build(uri)
    with Committer(uri) as committer:
        cohort.commit(committer, *range(3))
        models.tell(committer, *range(3))
    return uri


def run_of(
    path: Path, *, encoder: dict[str, Any] | None = None, tiling: dict[str, Any] | None = None
) -> Any:
    """A run that says these things of its encoder and tiling; None takes a field away."""
    told = cohort.TILING | (tiling or {})
    return Run(
        name="m_12345678", model=None, fingerprint="f" * 64, config={}, path=path,  # type: ignore[arg-type]
        encoder=models.ENCODER | (encoder or {}),
        tiling={key: value for key, value in told.items() if value is not None},
    )  # fmt: skip


TABLE: list[tuple[dict[str, Any], dict[str, Any], str | None]] = [
    ({}, {}, None),
    ({"name": "uni"}, {}, "other_encoder"),
    ({"revision": "2"}, {}, "other_encoder"),
    ({"dim": 13}, {}, "other_encoder"),
    ({}, {"mpp": 0.25}, "other_tiling"),
    ({}, {"region_um": 1024.0}, "other_tiling"),
    ({}, {"patch_um": 64.0}, "other_tiling"),
    ({}, {"mpp": None}, "other_tiling"),
    # Which patches and regions are kept is a matter of the cohort, not of the model.
    ({}, {"min_patch_tissue": 0.25}, None),
    ({}, {"min_region_patches": 0.0, "min_patch_tissue": None}, None),
]
"""Changes of a run's encoder and tiling against the archive's, and the error's code, if any."""


@pytest.mark.parametrize(("encoder", "tiling", "code"), TABLE)
def test_a_model_fits_the_archive_or_is_refused(
    uri: Path, tmp_path: Path, encoder: Any, tiling: Any, code: str | None
) -> None:
    run = run_of(tmp_path, encoder=encoder, tiling=tiling)
    if code is None:
        assert check_fits(Archive(uri), run) == "tex"
        return
    with pytest.raises(ArchiveError) as error:
        check_fits(Archive(uri), run)
    assert error.value.code == code
    changed = {**encoder, **tiling}
    assert str(next(iter(changed.values()))) in error.value.message
    assert error.value.hint


def test_a_run_that_is_not_indexed_is_told_how(uri: Path, tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="it has those of none") as error:
        check_indexed(Archive(uri), run_of(tmp_path), folder="runs/m")
    assert error.value.code == "not_indexed"
    assert error.value.hint.endswith(f"index --archive {uri} --run runs/m")
    with pytest.raises(ArchiveError) as error:  # indexing it would be refused as well
        check_indexed(Archive(uri), run_of(tmp_path, tiling={"mpp": 1.0}), folder="runs/m")
    assert error.value.code == "other_tiling"


def test_weights_are_those_of_the_archive(uri: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = Archive(uri)

    def encoder(name: str, revision: str) -> Any:
        return SimpleNamespace(name=name, revision=revision)

    check_weights(archive, "tex", encoder=encoder("tex", "1"))
    for other, told in ((("tex", "2"), "this is 2"), (("uni", "1"), "this is uni revision 1")):
        with pytest.raises(ConfigError, match=told) as error:
            check_weights(archive, "tex", encoder=encoder(*other))
        assert error.value.code == "other_encoder"
    assert resolve_encoder(archive, None) == ("tex", "tex")
    assert resolve_encoder(archive, "tex") == ("tex", "tex")
    with pytest.raises(ArchiveError) as misspelt:
        resolve_encoder(archive, "texx")
    assert misspelt.value.code == "unknown_encoder"
    assert "those of tex" in misspelt.value.hint
    known = encoder("tex", "1")
    monkeypatch.setattr("pathflip.encoders.encoder_info", lambda _, **__: known)
    assert resolve_encoder(archive, "tex=/weights") == ("tex", "tex=/weights")
    known.revision = "2"
    with pytest.raises(ConfigError, match="revision 1; this is 2"):
        resolve_encoder(archive, "tex=/weights")
    known.name = "uni"
    with pytest.raises(ArchiveError) as caught:
        resolve_encoder(archive, "uni")
    assert caught.value.code == "unknown_encoder"


def commands(archive: str, run: str, out: str) -> dict[str, list[str]]:
    """Command lines that bring a run to an archive; none starts Ray or trains."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    both = ["--archive", archive, "--run", run]
    # Where the run fits, tune and serve stop a step later: there is no language model.
    return {
        "index": ["index", *both, "--dry-run"],
        "search": ["search", "necrosis", *both],
        "classify": ["classify", *both, "--classes", "a,b"],
        "ground": ["ground", "slide001", "necrosis", *both],
        "evaluate": ["evaluate", "retrieval", *both, "--split", "all", "--shuffles", "1"],
        "tune": ["tune", *both, "--llm", f"{out}/none", "--out", out, "--dry-run"],
        "serve": ["serve", *both, "--llm", f"{out}/none", "--port", port],
    }


@pytest.mark.parametrize(
    ("encoder", "tiling", "code"),
    [
        ({}, {"min_patch_tissue": 0.25, "min_region_patches": 0.5}, None),
        ({"revision": "2"}, {}, "other_encoder"),
        ({}, {"mpp": 0.25}, "other_tiling"),
    ],
)
def test_every_command_gives_the_same_verdict(
    uri: Path, tmp_path: Path, capsys: Any, encoder: Any, tiling: Any, code: str | None
) -> None:
    models.make_run(tmp_path / "run", encoder=encoder, tiling=tiling)
    ended = {}
    for name, words in commands(str(uri), str(tmp_path / "run"), str(tmp_path / "out")).items():
        with pytest.raises(SystemExit) as done:
            main([*words, "--json"])
        said = capsys.readouterr().out
        error = json.loads(said).get("error") if done.value.code else None
        ended[name] = error and error["code"]
    if code is None:
        assert ended.pop("tune") not in ("other_encoder", "other_tiling")
        later = {"search": "not_indexed", "serve": "not_tuned"}
        assert ended == dict.fromkeys(ended) | later
    else:
        assert set(ended.values()) == {code}, ended


def test_a_batch_of_questions_is_refused_before_it_starts(
    uri: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jobs import answer

    monkeypatch.setattr(answer, "_open", lambda run: run_of(Path(run), tiling={"mpp": 0.25}))
    (tmp_path / "questions.jsonl").write_text("")
    with pytest.raises(ArchiveError) as error:
        answer.ask_all(
            str(uri), str(tmp_path), str(tmp_path / "questions.jsonl"), str(tmp_path / "out.jsonl"),
            dry_run=True,
        )  # fmt: skip
    assert error.value.code == "other_tiling"


@pytest.mark.parametrize("part", ["embedder", "grounding", "answer"])
@pytest.mark.parametrize("code", [None, "other_tiling"])
def test_parts_of_the_service_give_it_as_well(
    uri: Path, tmp_path: Path, part: str, code: str | None
) -> None:
    tiling = {"min_patch_tissue": 0.25} if code is None else {"patch_um": 64.0}
    models.make_run(tmp_path / "run", tiling=tiling)
    archive, run = str(uri), str(tmp_path / "run")

    def begin() -> None:
        if part == "embedder":
            from serve.embedder import Embedder

            Embedder(archive, run)
        elif part == "grounding":
            from serve.grounding import Grounding

            Grounding(archive, run)
        else:
            from pathflip.checkpoints import load_run
            from pathflip.slide_qa import slide_input

            slide_input(Archive(archive), load_run(run), "slide001")

    if code is None:
        begin()
        return
    with pytest.raises(PathFLIPError) as error:
        begin()
    assert error.value.code == code
