"""Weights in one folder, by the hub's own client from a stand-in of the hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.hub import Hub, Repository, serving

ROOT = Path(__file__).resolve().parents[3]
BIG = bytes(range(256)) * 4096


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    config = {"config.json": b'{"model_type": "dinov2"}'}
    repositories = {
        "owkin/phikon-v2": Repository(
            files=config | {"model.safetensors": BIG, "pytorch_model.bin": b"a pickle"}
        ),
        "q/llm": Repository(
            files=config | {"tokenizer.json": b"{}", "model.safetensors": b"small", "run.py": b"1"},
            licence="mit",
        ),
        "q/sentences": Repository(
            files=config
            | {
                "model.safetensors": b"weights",
                "1_Pooling/config.json": b'{"a": 1}',
                "onnx/config.json": b"{}",
                "README.md": b"about",
            }
        ),
        "q/large": Repository(files=config | {"model.safetensors": BIG * 12}),
        "q/gated": Repository(files=config | {"model.safetensors": b"x"}, gated=True),
        "q/pickles": Repository(files=config | {"pytorch_model.bin": b"a pickle"}),
    }
    with serving(repositories) as made:
        yield made


class Models:
    """``pathflip models`` on a folder, in processes that know the stand-in of the hub."""

    def __init__(self, hub: Hub, folder: Path) -> None:
        self.folder = folder
        self._environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"} | {
            "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT),
        }  # fmt: skip

    def __call__(self, *arguments: str) -> tuple[int, dict[str, Any]]:
        process = self.start(*arguments)
        said, _ = process.communicate()
        return process.returncode, json.loads(said)

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start a command that nobody waits for yet."""
        command = [sys.executable, "-m", "pathflip.cli", "models", *arguments]
        command += ["--folder", str(self.folder), "--json"]
        return subprocess.Popen(
            command, env=self._environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )


@pytest.fixture
def models(hub: Hub, tmp_path: Path) -> Models:
    hub.sent.clear()
    return Models(hub, tmp_path / "weights")


def test_weights_come_with_their_licences_and_are_found_without_the_hub(
    hub: Hub, models: Models
) -> None:
    both = ("phikon_v2", "q/llm")
    code, plan = models("pull", *both, "--dry-run")
    assert (code, models.folder.exists(), hub.sent) == (0, False, [])
    assert [one["bytes"] for one in plan["models"]] == [len(BIG) + 24, 31]
    code, refused = models("pull", *both)
    assert (code, refused["error"]["code"], models.folder.exists()) == (2, "licence", False)
    assert "phikon_v2 (Owkin non-commercial licence)" in refused["error"]["message"]
    code, _ = models("pull", *both, "--accept-licences")
    # No pickle and no code comes; of equal files one is enough.
    assert (code, {name.rpartition("/")[2] for name in hub.sent}) == (
        0, {"config.json", "model.safetensors", "tokenizer.json"},
    )  # fmt: skip
    assert [one["fetched"] for one in models("pull", *both, "--accept-licences")[1]["models"]] == [
        0,
        0,
    ]
    held = models("list")[1]["held"]
    commits = [hub.repositories[name].commit for name in ("owkin/phikon-v2", "q/llm")]
    assert [(one["name"], one["revision"]) for one in held] == list(zip(both, commits, strict=True))
    assert models("verify") == (0, {"folder": str(models.folder), "faults": []})

    code = "from pathflip.encoders import encoder_info; print(encoder_info('phikon_v2').revision)"
    offline = {"HF_HUB_CACHE": str(models.folder), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | offline, capture_output=True, check=True
    )
    assert done.stdout.decode().strip() == f"{commits[0]}-u8"

    snapshot = models.folder / "models--q--llm" / "snapshots" / commits[1]
    (snapshot / "tokenizer.json").unlink()
    damaged = (snapshot / "model.safetensors").resolve()
    damaged.chmod(0o644)
    damaged.write_bytes(b"smalm")
    code, found = models("verify", "q/llm")
    assert code == 1
    assert {(fault["file"], fault["code"]) for fault in found["faults"]} == {
        ("tokenizer.json", "missing"), ("model.safetensors", "damaged"),
    }  # fmt: skip
    assert models("verify", "phikon_v2")[0] == 0

    hub.sent.clear()  # pulled again they are whole, and nothing else is fetched
    assert models("pull", "q/llm", "phikon_v2", "--accept-licences")[0] == 0
    assert hub.sent == ["q/llm/model.safetensors"]
    assert models("verify")[0] == 0


def test_a_folder_without_models_is_not_whole(models: Models) -> None:
    code, refused = models("verify")
    assert (code, refused["error"]["code"]) == (2, "missing_weights")
    models.folder.mkdir()
    assert models("verify")[0] == 2


def test_a_file_that_comes_damaged_is_not_kept(hub: Hub, models: Models) -> None:
    """The file has the right length, which is all that the hub's client looks at."""
    hub.altered.add("q/llm/model.safetensors")
    status, document = models("pull", "q/llm")
    assert (status, document["error"]["code"]) == (2, "damaged_weights")
    assert "model.safetensors of q/llm" in document["error"]["message"]
    assert models("verify")[1]["faults"] == [
        {"hub": "q/llm", "file": "model.safetensors", "code": "missing"}
    ]
    hub.sent.clear()
    assert models("pull", "q/llm")[0] == 0
    assert hub.sent == ["q/llm/model.safetensors"]
    assert models("verify")[0] == 0


def test_a_file_that_an_older_revision_has_damaged_is_fetched_again(
    hub: Hub, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = hub.repositories["q/llm"]
    assert models("pull", "q/llm")[0] == 0
    for blob in (models.folder / "models--q--llm" / "blobs").iterdir():
        if blob.read_bytes() == b"small":
            blob.write_bytes(b"smell")
    new = replace(old, files=old.files | {"tokenizer.json": b'{"new": 1}'})
    monkeypatch.setitem(hub.repositories, "q/llm", new)
    assert new.commit != old.commit
    hub.sent.clear()
    assert models("pull", f"q/llm@{new.commit}")[0] == 0
    assert sorted(hub.sent) == ["q/llm/model.safetensors", "q/llm/tokenizer.json"]
    assert models("verify")[0] == 0


def test_a_pull_that_is_killed_at_half_is_made_whole_by_the_next(hub: Hub, models: Models) -> None:
    """The hub's client writes pieces of 10 MB, so it is killed with one of them on disk."""
    hub.stuck["q/large/model.safetensors"] = 11 << 20
    blobs = models.folder / "models--q--large" / "blobs"
    process = models.start("pull", "q/large")
    try:
        while not any(part.stat().st_size for part in blobs.glob("*.incomplete")):
            assert process.poll() is None, "the transfer was whole"
            time.sleep(0.05)
    finally:
        process.kill()
        process.communicate()
        hub.go_on.set()
    assert models("verify")[1]["faults"] == [
        {"hub": "q/large", "file": "model.safetensors", "code": "missing"}
    ]
    (left,) = blobs.glob("*.incomplete")
    hub.sent.clear()
    assert models("pull", "q/large")[0] == 0
    assert hub.sent == ["q/large/model.safetensors"], "what had come whole was not fetched again"
    assert left.exists(), "it might be that of another pull at work"
    os.utime(left, (0, 0))
    assert models("pull", "q/large")[0] == 0
    assert not left.exists()
    assert models("verify")[0] == 0


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("q/gated", "gated_weights"),
        ("q/pickles", "pickle_weights"),
        ("q/none", "missing_weights"),
        ("q/llm@other", "missing_weights"),
        ("nobody", "unknown_encoder"),
    ],
)
def test_one_that_cannot_be_had_keeps_all_out(
    hub: Hub, models: Models, name: str, code: str
) -> None:
    status, document = models("pull", "q/llm", name, "--accept-licences")
    assert (status, document["error"]["code"]) == (2, code)
    assert (hub.sent, models.folder.exists()) == ([], False)


def test_a_sentence_encoder_comes_with_how_it_pools(hub: Hub, models: Models) -> None:
    assert models("pull", "q/sentences")[0] == 0
    assert {name.partition("/resolve/")[0].rpartition("q/sentences/")[2] for name in hub.sent} == {
        "config.json", "model.safetensors", "1_Pooling/config.json",
    }  # fmt: skip
    (models.folder / "models.json").unlink()  # then the files' own names are their digests
    assert models("verify") == (0, {"folder": str(models.folder), "faults": []})
    (pooling,) = models.folder.glob("*/snapshots/*/1_Pooling/config.json")
    pooling.resolve().write_bytes(b"{}")
    (fault,) = models("verify", "q/sentences")[1]["faults"]
    assert (fault["file"], fault["code"]) == ("config.json", "damaged")


def test_a_revision_that_is_named_is_the_folders(hub: Hub, models: Models) -> None:
    commit = hub.repositories["q/llm"].commit
    assert models("pull", f"q/llm@{commit}")[0] == 0
    assert (models.folder / "models--q--llm" / "refs" / "main").read_text() == commit
    assert models("verify", "q/gated")[1]["error"]["code"] == "missing_weights"
