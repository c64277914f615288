"""Checkpoints: whole or not there, whoever dies and whatever breaks meanwhile."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pathflip import checkpoints
from pathflip.checkpoints import (
    COMPLETE,
    best_checkpoint,
    latest_checkpoint,
    load_run,
    model_name,
    read_note,
    save_checkpoint,
    verify_whole,
    write_whole,
)
from pathflip.errors import CheckpointError


def save(folder: Path, step: int, *, metric: float | None = None, keep: int = 3) -> Path:
    """A checkpoint whose every value says which step it is of."""
    return save_checkpoint(
        folder,
        step=step,
        tensors={
            "model": {"w": torch.full((40, 50), float(step)), "b": torch.arange(3)},
            "optimizer": {"exp_avg/w": torch.full((40, 50), -float(step))},
        },
        state={"step": step, "recent": [0.1, step / 7]},
        metric=metric,
        keep=keep,
    )


def check(folder: Path, step: int) -> None:
    found = latest_checkpoint(folder)
    assert found is not None
    assert found.step == step
    assert found.state() == {"step": step, "recent": [0.1, step / 7]}
    assert torch.equal(found.tensors("model")["w"], torch.full((40, 50), float(step)))
    assert torch.equal(found.tensors("optimizer")["exp_avg/w"], torch.full((40, 50), -float(step)))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_latest_best_and_what_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    assert latest_checkpoint(folder) is None
    assert best_checkpoint(folder) is None
    for step, metric in [(5, 0.2), (10, 0.9), (15, None), (20, 0.9), (25, 0.1), (30, None)]:
        save(folder, step, metric=metric)
    check(folder, 30)
    best = best_checkpoint(folder)
    assert best is not None
    assert (best.step, best.metric) == (20, 0.9)  # the newest among equals
    assert names(folder) == ["step-00000020", "step-00000025", "step-00000030"]
    for step in (35, 40, 45):
        save(folder, step)
    assert names(folder) == [f"step-{step:08d}" for step in (20, 35, 40, 45)]


def test_best_is_the_newest_where_nothing_was_validated(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    best = best_checkpoint(tmp_path)
    assert best is not None
    assert best.step == 2


def test_a_step_written_again_replaces(tmp_path: Path) -> None:
    save(tmp_path, 5)
    (tmp_path / "step-00000005" / "extra").write_text("of another run")
    save(tmp_path, 5)
    assert names(tmp_path / "step-00000005") == [
        COMPLETE, "model.safetensors", "optimizer.safetensors", "state.json",
    ]  # fmt: skip
    check(tmp_path, 5)


# -- killed while writing -------------------------------------------------------------------------

OFFSETS = 10


def counted(monkeypatch: pytest.MonkeyPatch, at: Callable[[], None]) -> None:
    """Call ``at`` before and after every system call a checkpoint is made of, and within files."""
    for owner, name in (
        (os, "fsync"), (Path, "mkdir"), (Path, "rename"), (Path, "replace"), (shutil, "rmtree"),
    ):  # fmt: skip
        real = getattr(owner, name)

        def wrapped(*args: Any, _real: Any = real, **kwargs: Any) -> Any:
            at()
            result = _real(*args, **kwargs)
            at()
            return result

        monkeypatch.setattr(owner, name, wrapped)
    import safetensors.torch

    whole = safetensors.torch.save_file

    def halved(tensors: dict[str, torch.Tensor], filename: Path) -> None:
        whole(tensors, filename)
        content = Path(filename).read_bytes()
        Path(filename).write_bytes(content[: len(content) // 2])
        at()
        Path(filename).write_bytes(content)

    monkeypatch.setattr(safetensors.torch, "save_file", halved)


@pytest.mark.filterwarnings("ignore:lance is not fork-safe")
def test_killed_inside_the_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At ten places of the write, SIGKILL; what loads is whole: the one before or the new."""
    base = tmp_path / "base"
    for step in (5, 10, 15):
        save(base, step)
    events = [0]
    with monkeypatch.context() as patch:
        counted(patch, lambda: events.__setitem__(0, events[0] + 1))
        shutil.copytree(base, tmp_path / "count")
        events[0] = 0
        save(tmp_path / "count", 20)
    total = events[0]
    assert total > 2 * OFFSETS
    seen = set()
    for n in range(OFFSETS):
        kill_at = 1 + round(n * (total - 1) / (OFFSETS - 1))
        folder = tmp_path / f"kill{n}"
        shutil.copytree(base, folder)
        child = os.fork()
        if child == 0:
            left = [kill_at]

            def at(left: list[int] = left) -> None:
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

            try:
                counted(monkeypatch, at)
                save(folder, 20)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"offset {kill_at} of {total} was never reached"
        found = latest_checkpoint(folder)
        assert found is not None
        assert not found.refused
        check(folder, found.step)
        seen.add(found.step)
        save(folder, 25)  # the next writer clears up
        left = {20} & {found.step}
        assert names(folder) == [f"step-{step:08d}" for step in ([10, 15, 25], [15, 20, 25])[
            bool(left)
        ]]  # fmt: skip
        check(folder, 25)
    assert seen == {15, 20}


def test_without_complete_it_is_passed_over_and_later_removed(tmp_path: Path) -> None:
    save(tmp_path, 5)
    save(tmp_path, 10)
    (tmp_path / "step-00000010" / COMPLETE).unlink()
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert (found.step, found.refused) == (5, ())
    assert (tmp_path / "step-00000010").exists()
    save(tmp_path, 15)
    assert names(tmp_path) == ["step-00000005", "step-00000015"]


# -- damaged --------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [truncate, flip, Path.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_damaged_falls_back_and_says_which(
    tmp_path: Path, harm: Callable[[Path], None], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (5, 10):
        save(tmp_path, step)
    harm(tmp_path / "step-00000010" / name)
    check(tmp_path, 5)
    found = latest_checkpoint(tmp_path)
    assert found is not None
    (sentence,) = found.refused
    assert "step-00000010" in sentence
    assert name in sentence
    assert sentence in caplog.text
    harm(tmp_path / "step-00000005" / name)
    with pytest.raises(CheckpointError, match=r"No checkpoint in .*step-00000005"):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize("harm", [truncate, flip])
def test_a_damaged_list_of_files_is_seen(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    for step in (5, 10):
        save(tmp_path, step)
    harm(tmp_path / "step-00000010" / COMPLETE)
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 5
    assert COMPLETE in found.refused[0]


def test_a_number_changed_in_the_list_is_seen(tmp_path: Path) -> None:
    path = save(tmp_path, 5, metric=0.25) / COMPLETE
    path.write_text(path.read_text().replace("0.25", "0.75"))
    with pytest.raises(CheckpointError, match="damaged"):
        read_note(path.parent)


def test_verify_names_the_file(tmp_path: Path) -> None:
    def fill(part: Path) -> None:
        (part / "inner").mkdir()
        (part / "inner" / "a.txt").write_text("hello")

    folder = write_whole(tmp_path / "model", fill, step=3)
    assert verify_whole(folder)["step"] == 3
    (folder / "inner" / "a.txt").write_text("hellO")
    with pytest.raises(CheckpointError, match=r"inner/a\.txt") as caught:
        verify_whole(folder)
    assert caught.value.code == "damaged"


def test_a_failing_write_leaves_what_was_there(tmp_path: Path) -> None:
    write_whole(tmp_path / "model", lambda part: (part / "a").write_text("old") and None)

    def fill(part: Path) -> None:
        (part / "a").write_text("new")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_whole(tmp_path / "model", fill)
    verify_whole(tmp_path / "model")
    assert (tmp_path / "model" / "a").read_text() == "old"


def test_a_full_disk_is_said_and_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 5)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match=r"step-00000010 cannot be written: .*No space"):
            save(tmp_path, 10)
    assert names(tmp_path) == ["step-00000005"]
    check(tmp_path, 5)


# -- runs -----------------------------------------------------------------------------------------


def test_load_run_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="There is no run at") as caught:
        load_run(tmp_path / "nothing")
    assert caught.value.code == "missing"
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="holds no finished model") as caught:
        load_run(tmp_path / "run")
    assert "same pathflip pretrain command" in caught.value.hint
    (tmp_path / "run" / "model").mkdir()
    (tmp_path / "run" / "model" / "pathflip.json").write_text(json.dumps({}))
    with pytest.raises(CheckpointError, match=COMPLETE):
        load_run(tmp_path / "run")


def test_model_name() -> None:
    assert model_name("My Run.2", "0123456789abcdef") == "my_run_2_01234567"
    assert model_name("…", "0123456789abcdef") == "run_01234567"
    assert checkpoints.KEEP == 3
