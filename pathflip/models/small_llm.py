"""A small Qwen3 trained from scratch, for machines that cannot download weights.

The model is ``transformers``' Qwen3 with its own byte-level BPE tokenizer, Qwen's chat tokens and a
chat template that renders as Qwen3's does. It learns to read before it is shown slides: where later
a slide's vectors will stand, there stand the sentences of a report, in one or more regions made up
for them (:mod:`pathflip.models.small_lessons`). Questions about it follow, and what it says.

Tuning then teaches to read real regions, and begins with a projector that turns them as sentences
were turned here (:func:`pathflip.models.data_init.start_projector`).
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from pathflip.checkpoints import read_note, verify_whole, write_whole
from pathflip.cpus import cpus_here
from pathflip.errors import ArchiveError, CheckpointError, ConfigError
from pathflip.models.chat_template import CAPTION_INSTRUCTION, TURN_END, Prompter
from pathflip.models.llm import shown_if_long
from pathflip.models.small_lessons import Asked, Lessons
from pathflip.models.small_step import Row, pack, packed_loss, product_dtype
from pathflip.progress import Progress, Report
from pathflip.splits import canonical_split
from pathflip.text import split_sentences

if TYPE_CHECKING:
    from pathflip.archive import Archive
    from pathflip.interop.questions import Question
    from pathflip.models.pathflip import PathFLIP

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{- '<|im_start|>assistant\n' -}}"
    "{%- if enable_thinking is defined and enable_thinking is false -%}"
    "{{- '<think>\n\n</think>\n\n' -}}"
    "{%- endif -%}{%- endif -%}"
)
"""Renders as Qwen3's template does, without tools and reasoning."""
_FEWEST = 4
_SPREAD = 0.08
"""Standard deviation of the initial weights, about 1 / sqrt(hidden): at Qwen's 0.02 so narrow a
model learns late."""


@dataclass(frozen=True, kw_only=True)
class SmallLLMConfig:
    """Settings of a small language model.

    Attributes:
        hidden: Width.
        layers: Number of layers.
        heads: Number of attention heads.
        kv_heads: Number of key and value heads.
        head_dim: Width of a head; vLLM wants 32, 64 or more.
        ffn: Width inside the feed-forward blocks.
        vocab_size: Maximum number of pieces of the tokenizer.
        max_positions: Maximum length of prompt and answer together, in tokens.
        epochs: Number of passes over the texts.
        batch_size: Number of texts in a step.
        turns: Maximum number of questions about a text in an epoch, besides its description.
        mixed: Number of descriptions mixed from sentences of any texts, for each text and epoch:
            they cannot be guessed, only read, and rare sentences are frequent in them.
        noise: Maximum noise added to vectors of regions, in standard deviations of sentences'.
        lr: Peak learning rate; it warms up over a tenth of the steps and falls to zero.
        seed: Seed of all draws.
    """

    hidden: int = 128
    layers: int = 3
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 32
    ffn: int = 256
    vocab_size: int = 1536
    max_positions: int = 2048
    epochs: int = 10
    batch_size: int = 4
    turns: int = 1
    mixed: int = 2
    noise: float = 1.0
    lr: float = 3e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("hidden", "layers", "heads", "kv_heads", "head_dim", "ffn", "epochs",
                     "batch_size", "turns"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}.", hint="It must be 1 or more.")
        for name in ("mixed", "noise"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)}.", hint="It must be 0 or more.")
        if self.heads % self.kv_heads:
            raise ConfigError(
                f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}.",
                hint="Make heads a multiple of kv_heads.",
            )


def make(
    texts: Sequence[str],
    folder: str | Path,
    config: SmallLLMConfig | None = None,
    *,
    questions: Sequence[Sequence[Asked]] | None = None,
    vision: PathFLIP | None = None,
    progress: Report | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Train a small language model and write it as an ordinary ``transformers`` folder.

    Args:
        texts: Captions of training slides; those without a sentence are left out.
        folder: Output folder: config.json, model.safetensors, the tokenizer's files.
        config: The settings; None: the defaults.
        questions: Questions about each text; None: only those made of the texts themselves.
        vision: Slide model whose vectors it learns to read; None: any.
        progress: Called with the progress now and then.
        dry_run: Check everything and train nothing; only ``texts`` and ``questions`` are returned.

    Returns:
        ``made`` (False where the folder holds it already), ``vision`` (fingerprint of the slide
        model it reads, or None), ``texts``, ``questions``, ``steps``, ``loss`` (mean of the last
        tenth), ``vocab_size``, ``parameters``, ``seconds``.

    Raises:
        ConfigError: There are too few texts, the folder holds something else, or the slide model
            has no regions.
    """
    config = config or SmallLLMConfig()
    folder = Path(folder)
    if vision is not None and not vision.config.has_regions:
        raise ConfigError(
            "This slide model has no region vectors for the language model to read.",
            hint="Leave out --run, or take a model with regions.",
        )
    asked = [list(own) for own in questions] if questions is not None else [[] for _ in texts]
    told = [(str(t), own) for t, own in zip(texts, asked, strict=True) if split_sentences(str(t))]
    texts, asked = [text for text, _ in told], [own for _, own in told]
    if len(set(texts)) < _FEWEST:
        raise ConfigError(
            f"{len(set(texts))} different texts are too few to train a language model.",
            hint="Import captions of training slides: pathflip archive import --captions FILE.",
        )
    told_of = [[(one.question, list(one.choices), one.answer) for one in own] for own in asked]
    read = None if vision is None else vision.fingerprint()
    everything = json.dumps([asdict(config), texts, told_of, read])
    made_of = hashlib.sha256(everything.encode()).hexdigest()
    about: dict[str, Any] = {
        "texts": len(texts),
        "questions": sum(map(len, asked)),
        "made_of": made_of,
        "vision": read,
    }
    before = _made_before(folder, made_of) if folder.exists() else None
    if dry_run:
        return {key: about[key] for key in ("texts", "questions")}
    if before is not None:
        return {"made": False, **before}
    began = time.monotonic()
    corpus = list(texts) + [
        "\n".join([one.question, *one.choices, one.answer]) for own in asked for one in own
    ]
    tokenizer = train_bpe([*corpus, CAPTION_INSTRUCTION], vocab_size=config.vocab_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        llm = _build(config, tokenizer)
        lessons = Lessons(
            llm,
            Prompter(tokenizer, "qwen3"),
            texts=texts,
            asked=asked,
            vision=vision,
            turns=config.turns,
            mixed=config.mixed,
            noise=config.noise,
            longest=config.max_positions,
        )
        losses = _train(llm, lessons, len(texts), config, progress, began)
    llm.eval()
    tail = losses[-max(1, len(losses) // 10) :]
    about |= {
        "steps": len(losses),
        "loss": round(sum(tail) / len(tail), 6),
        "vocab_size": len(tokenizer),
        "parameters": sum(own.numel() for own in llm.parameters()),
    }

    def fill(part: Path) -> None:
        tokenizer.save_pretrained(str(part))
        with shown_if_long(0):
            llm.save_pretrained(str(part))

    write_whole(folder, fill, **about)
    return {"made": True, **about, "seconds": time.monotonic() - began}


def _made_before(folder: Path, made_of: str) -> dict[str, Any]:
    """Return the record of a model made before, if it is the one asked for."""
    try:
        note = verify_whole(folder)
    except CheckpointError as error:
        raise ConfigError(
            f"{folder} exists and is not a small language model: {error.message}",
            hint="Give another folder, or remove it.",
        ) from error
    if note.pop("made_of", None) != made_of:
        raise ConfigError(
            f"{folder} holds a language model made of other texts, with other settings, for "
            "another slide model, or by an older version.",
            hint="Give another folder, or remove it.",
        )
    del note["files"]
    return note


def made_to_read(folder: str | Path) -> str | None:
    """Return the fingerprint of the slide model a language model learned to read, or None."""
    try:
        return cast("str | None", read_note(folder).get("vision"))
    except CheckpointError:  # not made here
        return None


def gather(
    archive: Archive, *, source: str | None = None
) -> tuple[list[str], list[list[Question]]]:
    """Return the captions of an archive's training slides, and the questions about each.

    Slides of split ``train`` and those of no split; of several captions the first source's.

    Args:
        archive: Archive to read.
        source: Only questions of this source.

    Raises:
        ArchiveError: No training slide has a caption.
    """
    from pathflip.interop.questions import stored_questions

    slides = archive.slides("ready", columns=["slide_id", "split"]).to_pylist()
    chosen = {row["slide_id"] for row in slides if canonical_split(row["split"]) in (None, "train")}
    texts: dict[str, str] = {}
    for row in archive.captions().to_pylist():  # sorted by slide, then source
        if row["slide_id"] in chosen and (row["text"] or "").strip():
            texts.setdefault(row["slide_id"], row["text"])
    if not texts:
        raise ArchiveError(
            f"No training slide of {archive.uri} has a caption.",
            hint=f"Add them: pathflip archive import --archive {archive.uri} --captions FILE",
            code="no_captions",
        )
    asked: dict[str, list[Question]] = {slide: [] for slide in texts}
    for question in stored_questions(archive, source=source):
        if question.slide in asked:
            asked[question.slide].append(question)
    return list(texts.values()), list(asked.values())


def make_from_archive(
    archive: Archive,
    folder: str | Path,
    config: SmallLLMConfig | None = None,
    *,
    vision: PathFLIP | None = None,
    source: str | None = None,
    progress: Report | None = None,
) -> dict[str, Any]:
    """Train a small language model on an archive: :func:`make` of the data of :func:`gather`."""
    texts, questions = gather(archive, source=source)
    return make(texts, folder, config, questions=questions, vision=vision, progress=progress)


def train_bpe(texts: Sequence[str], *, vocab_size: int) -> Any:
    """Train a byte-level BPE tokenizer with Qwen's rules and chat tokens.

    Args:
        texts: Texts whose frequent words become single tokens.
        vocab_size: Maximum number of pieces; the 256 bytes are always included.

    Returns:
        A ``transformers`` Qwen2 tokenizer (Qwen3 has no class of its own).
    """
    from tokenizers import AddedToken, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    kind: Any = Qwen2Tokenizer
    plain = kind()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend = plain.backend_tokenizer
    backend.train_from_iterator(sorted(set(texts)), trainer)
    learned = json.loads(backend.to_str())["model"]
    tokenizer = kind(
        vocab=learned["vocab"],
        merges=[tuple(pair) for pair in learned["merges"]],
        eos_token=TURN_END,
        pad_token="<|endoftext|>",
        unk_token=None,
    )
    tokenizer.add_tokens([AddedToken("<|im_start|>", special=True)])
    tokenizer.add_tokens([AddedToken(name, special=False) for name in ("<think>", "</think>")])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _build(config: SmallLLMConfig, tokenizer: Any) -> Any:
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    kinds: Any = (Qwen3Config, Qwen3ForCausalLM, GenerationConfig)
    config_of, model_of, generation_of = kinds
    about = config_of(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=config.hidden,
        intermediate_size=config.ffn,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_positions,
        tie_word_embeddings=True,
        initializer_range=_SPREAD,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    llm = model_of(about)
    llm.generation_config = generation_of(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return llm


def _train(
    llm: Any,
    lessons: Lessons,
    texts: int,
    config: SmallLLMConfig,
    progress: Report | None,
    began: float,
) -> list[float]:
    """Train on ``texts`` texts; a second core takes half of every batch."""
    steps = math.ceil(texts / config.batch_size) * config.epochs
    optimizer, schedule = _optimizer(llm, config, steps)
    parameters: list[torch.Tensor] = list(llm.parameters())
    table = llm.get_input_embeddings().weight
    dtype = product_dtype()

    def gradients(rows: Sequence[Row]) -> tuple[float, tuple[torch.Tensor, ...]]:
        loss = packed_loss(llm, pack(table, rows), dtype)
        return loss.item(), torch.autograd.grad(loss, parameters)

    llm.train()
    losses: list[float] = []
    cores = min(2, cpus_here())
    with _one_thread_a_product(), ThreadPoolExecutor(cores) as pool:
        for epoch in range(config.epochs):
            order = np.random.default_rng([config.seed, epoch]).permutation(texts)
            lessons.begin()
            for start in range(0, texts, config.batch_size):
                batch = order[start : start + config.batch_size].tolist()
                drawn = [
                    lessons.rows(i, np.random.default_rng([config.seed, epoch, i])) for i in batch
                ]
                parts = [
                    [row for rows in drawn[core::cores] for row in rows]
                    for core in range(min(cores, len(batch)))
                ]
                found = list(pool.map(gradients, parts))
                predicted = sum(len(row.answer) for part in parts for row in part)
                for own, *grads in zip(parameters, *(grads for _, grads in found), strict=True):
                    own.grad = torch.stack(grads).sum(0).div_(predicted)
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                schedule.step()
                losses.append(sum(loss for loss, _ in found) / predicted)
                if progress is not None:
                    progress(
                        Progress(
                            what="make-llm",
                            done=len(losses),
                            total=steps,
                            seconds=time.monotonic() - began,
                            unit="steps",
                            note=f"loss {losses[-1]:.3f}",
                        )
                    )
    return losses


@contextmanager
def _one_thread_a_product() -> Iterator[None]:
    """Have PyTorch compute in the calling threads: these products are too small to be shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _optimizer(llm: Any, config: SmallLLMConfig, steps: int) -> tuple[Any, Any]:
    decayed = [own for own in llm.parameters() if own.ndim > 1]
    plain = [own for own in llm.parameters() if own.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
        lr=config.lr,
        betas=(0.9, 0.95),
        fused=True,
    )
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / steps)),
    )
    return optimizer, schedule
