"""Fixtures of service tests: a tiny tuned run over a small archive, an engine that runs.

The language model is drawn at random and its head never chooses an end token, so what it says is
nonsense of any wanted length, and the same every time.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pathflip.archive import Archive
from pathflip.checkpoints import write_whole
from pathflip.models.instruct import PathFLIPInstruct
from pathflip.models.pathflip import PathFLIP
from pathflip.models.prompt_encoder import InstructConfig
from tests.archives import FINDINGS, ORGANS, make_archive

CONTEXT = 1024
"""Positions of the language model."""
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
"""Qwen3's, as far as it is used here."""
SMALL = {
    "d": 32, "hidden": 32, "layers": 1, "heads": 2, "ffn": 32, "num_queries": 4, "text_hidden": 32,
    "text_layers": 1, "text_heads": 2, "text_ffn": 32, "vocab_size": 128,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """Paths of the tuned run and its inputs.

    Attributes:
        archive: 8 slides, ``slide000`` to ``slide007``, of 2 to 5 regions of 512 level-0 px; slide
            n's regions begin at (0, 512 n), (512, 512 n), ...
        run: The tuned run: ``model`` and ``llm`` below it.
        base: The language model before tuning.
    """

    archive: Path
    run: Path
    base: Path


def make_tuned(folder: Path, *, slides: int = 8, width: int = 64, layers: int = 2) -> Tuned:
    """Make archive, base and tuned run below a folder, in seconds."""
    archive = make_archive(folder / "archive", slides=slides)
    texts = Archive(archive).captions()["text"].to_pylist()
    base = make_base(folder / "base", texts, width=width, layers=layers)
    return Tuned(archive=archive, run=make_run(folder / "run", archive, base), base=base)


def indexed(tuned: Tuned, archive: Path) -> Tuned:
    """The same over a copy of the archive that ``pathflip index`` has gone over."""
    from jobs.index import index
    from tests.in_threads import in_threads

    shutil.copytree(tuned.archive, archive)
    with in_threads():
        index(str(archive), str(tuned.run))
    return replace(tuned, archive=archive)


def make_base(folder: Path, texts: Sequence[str], *, width: int = 64, layers: int = 2) -> Path:
    """A Qwen3 of random weights with a byte-level tokenizer of the texts and Qwen's chat tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=512, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(2, width // 32),
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        llm = Qwen3ForCausalLM(config)
        with torch.no_grad():
            for layer in llm.model.layers:  # so that what stands before matters
                layer.self_attn.v_proj.weight.mul_(30)
                layer.self_attn.q_proj.weight.mul_(30)
            llm.lm_head.weight.mul_(20)
            silent = [
                number
                for token, number in tokenizer.get_vocab().items()
                if token in special or not tokenizer.decode([number]).isascii()
            ]
            llm.lm_head.weight[silent] = 0  # never the largest of 500 logits
    llm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_run(
    folder: Path, archive: Path, base: Path, *, encoder: str = "tex", **config: Any
) -> Path:
    """A run as ``pathflip tune`` leaves it, untrained: vision, projector and adapter are drawn."""
    opened = Archive(archive)
    entry = opened.encoders()[encoder]
    texts = [f"Sections show {name}." for name in (*ORGANS, *FINDINGS)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vision = PathFLIP.from_preset(
            "pathflip/mini", feature_dim=entry["dim"], texts=texts, **SMALL
        )
        model = PathFLIPInstruct.from_parts(vision.eval(), base, InstructConfig(**config), seed=1)
        with torch.no_grad():
            for name, weight in model.llm.named_parameters():
                if "lora_B" in name:
                    weight.normal_(std=0.02)  # an adapter that does something
            model.projector.weight.mul_(4)
    about = {
        "kind": "instruct",
        "run": folder.name,
        "fingerprint": vision.fingerprint(),
        "instruct_fingerprint": model.fingerprint(),
        "encoder": {"name": encoder, "revision": entry["revision"], "dim": entry["dim"]},
        "tiling": opened.tiling(),
    }

    def fill(part: Path) -> None:
        model.save_pretrained(part)
        (part / "pathflip.json").write_text(json.dumps(about))

    write_whole(folder / "model", fill)
    write_whole(folder / "llm", model.save_merged)
    return folder


# -- a service that runs --------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Service:
    """A running service.

    Attributes:
        url: Base URL, without a path.
        model: Id of its language model.
        tuned: Tuned run it serves.
        hold: While this file is there, the fake engine stops after the first word of an answer.
    """

    url: str
    model: str
    tuned: Tuned
    hold: Path | None = None

    def body(self, question: str = "What is seen?", **fields: Any) -> dict[str, Any]:
        """Body of a chat request."""
        messages = [{"role": "user", "content": question}]
        return {"model": self.model, "slide_id": "slide000", "messages": messages} | fields

    @contextmanager
    def held(self) -> Iterator[Path]:
        """Answers begin and do not end, until this is left or the file is removed."""
        assert self.hold is not None
        self.hold.touch()
        try:
            yield self.hold
        finally:
            self.hold.unlink(missing_ok=True)


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


PARTS = ("ingress", "embedder", "search", "grounding", "annotations", "instructor")


class Deployed:
    """The one service there is on this process's Ray: whichever a test wants is made to be there.

    A test may break it or take it down: the next that wants it finds it whole.

    Args:
        tuned: Tuned run that is served.
        folder: Folder of the hold file.
    """

    def __init__(self, tuned: Tuned, folder: Path) -> None:
        self.tuned, self.hold, self.port = tuned, folder / "hold", free_port()
        self.kind = ""
        self.service: Service | None = None

    def want(self, kind: str) -> Service:
        """The service with the engine ``fake`` or ``vllm``."""
        from ray import serve

        from serve.app import NAME

        self.hold.unlink(missing_ok=True)
        if self.service is not None:
            app = serve.status().applications.get(NAME)
            if self.kind == kind and app is not None and app.status == "RUNNING":
                return self.service
            serve.delete(NAME)
        settings = {"limits.concurrent": 128, "limits.max_tokens": 900, "ingress.max_replicas": 1}
        settings |= {f"instructor.max_{name}": 128 for name in ("ongoing", "queued")}
        settings |= {"instructor.max_replicas": 1, "drain_s": 50}  # serve.delete waits for 60
        settings |= {"refresh_s": 2}  # a test waits for what it commits
        settings |= {"engine": {
            "backend": kind,
            "fake": {"text": FAKE_TEXT, "repeat": True, "hold": str(self.hold)},
            "engine": {"max_num_seqs": 32},
        }}  # fmt: skip
        alone = kind == "vllm"
        started = start_service(self.tuned, port=self.port, chat_alone=alone, **settings)
        self.kind, self.service = kind, replace(started, hold=self.hold)
        return self.service


FAKE_TEXT = "".join(f"word{number} " for number in range(100))
"""Text of the fake engine, repeated."""


class Embeddings:
    """Stands where the embedder does, for a service that only chats."""

    async def describe(self) -> dict[str, Any]:
        """Answer as the embedder does."""
        return {"id": "none", "fingerprint": "none", "created": 0}

    async def slide_encoders(self) -> list[dict[str, Any]]:
        """Answer as the search does."""
        return []


def start_service(
    tuned: Tuned, *, port: int = 0, chat_alone: bool = False, **settings: Any
) -> Service:
    """Serve a tuned run on the Ray this process is connected to, until Serve is shut down.

    Args:
        tuned: Tuned run to serve.
        port: Port; by default a free one, or that of a Serve already running.
        chat_alone: Whether the parts that are not asked in a chat are left out.
        settings: Settings of :class:`serve.config.ServeConfig`, nested ones with dots.
    """
    import httpx
    from ray import serve

    from serve.app import NAME, bind_ingress, bind_parts
    from serve.config import check_inputs, from_arguments

    quiet = {"enable_access_log": False, "log_level": "WARNING"}
    port = port or free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config=quiet)
    # Replicas take no CPU of Ray's: what else a test needs finds its place.
    args = {f"{part}.cpus": 0 for part in PARTS} | settings
    config = from_arguments({"archive": str(tuned.archive), "run": str(tuned.run)} | args)
    inputs = check_inputs(config)
    parts = bind_parts(config, inputs)
    if chat_alone:
        none = serve.deployment(ray_actor_options={"num_cpus": 0})(Embeddings).bind()
        parts = {name: none for name in PARTS[1:4]} | {"instructor": parts["instructor"]}
    serve.run(bind_ingress(config, inputs, parts), name=NAME)
    url = f"http://127.0.0.1:{port}"
    listed = httpx.get(f"{url}/v1/models", timeout=60).json()["data"]
    model = next(entry["id"] for entry in listed if entry["capability"] == "chat")
    return Service(url=url, model=model, tuned=tuned)


def cpu_s(pid: int) -> float:
    """CPU seconds a process has used."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def same(one: Any, other: Any) -> bool:
    """Return whether documents are equal, numbers nearly: batches and threads round otherwise."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return abs(one - other) < 1e-3 if isinstance(one, float) else bool(one == other)
