"""A small Qwen3 trained from scratch, for machines that cannot download weights.

The model is ``transformers``' Qwen3 with its own byte-level BPE tokenizer, Qwen's chat tokens and a
chat template that renders as Qwen3's does. It learns to read before it is shown slides: where later
a slide's vectors will stand, there stand the sentences of a report, in one or more regions made up
for them (:func:`as_regions`). Questions about the report follow, and what it says.

A sentence is what the slide model makes of it, turned to where its words are, so that wordings of
one thing are nearly one vector, as they are in a slide; without a slide model it is the mean of its
words. To learn captioning from texts alone, in a space they share with images and with noise for
what sets the two apart, is CapDec's way (Nukrai et al. 2022). Tuning then teaches to read real
regions, and begins with a projector that turns them in the same way
(:func:`pathflip.models.data_init.start_projector`).
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from pathflip.checkpoints import read_note, verify_whole, write_whole
from pathflip.errors import ArchiveError, CheckpointError, ConfigError
from pathflip.models.chat_template import (
    CAPTION_INSTRUCTION,
    TURN_END,
    Example,
    Prompter,
    caption_example,
    question_example,
)
from pathflip.models.data_init import distinct, rotation, words_of
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
_MUCH_LONGER = 1.5
_SPREAD = 0.08
"""Standard deviation of the initial weights, about 1 / sqrt(hidden): at Qwen's 0.02 so narrow a
model learns late."""


class Asked(Protocol):
    """A question about a text: see :class:`pathflip.interop.questions.Question`."""

    @property
    def question(self) -> str:
        """The question without its options."""
        ...

    @property
    def choices(self) -> Sequence[str]:
        """Its options; empty for an open question."""
        ...

    @property
    def answer(self) -> str:
        """The text of the right answer."""
        ...


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
    lessons = [[(one.question, list(one.choices), one.answer) for one in own] for own in asked]
    read = None if vision is None else vision.fingerprint()
    everything = json.dumps([asdict(config), texts, lessons, read])
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
        losses = _train(llm, tokenizer, texts, asked, config, vision, progress, began)
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


Turned = dict[str, torch.Tensor]
"""Sentences as vectors among those of words, each [D]."""


def _train(
    llm: Any,
    tokenizer: Any,
    texts: Sequence[str],
    asked: Sequence[Sequence[Asked]],
    config: SmallLLMConfig,
    vision: PathFLIP | None,
    progress: Report | None,
    began: float,
) -> list[float]:
    prompter = Prompter(tokenizer, "qwen3")
    sentences = [split_sentences(text) for text in texts]
    every = sorted({sentence for own in sentences for sentence in own})
    kinds = distinct(every)
    seen = None if vision is None else vision.encode_text(every, normalize=False).cpu()
    per_epoch = math.ceil(len(texts) / config.batch_size)
    steps = per_epoch * config.epochs
    decayed = [own for own in llm.parameters() if own.ndim > 1]
    plain = [own for own in llm.parameters() if own.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
        lr=config.lr,
        betas=(0.9, 0.95),
    )
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / steps)),
    )
    llm.train()
    losses: list[float] = []
    for epoch in range(config.epochs):
        order = np.random.default_rng([config.seed, epoch]).permutation(len(texts))
        turned: Turned = {}
        if seen is None:
            centre = words_of(llm.get_input_embeddings().weight, prompter, kinds).mean(0).detach()
        else:
            turned, centre = turned_to_words(llm, prompter, every, seen)
        for start in range(0, len(order), config.batch_size):
            rows = []
            for i in order[start : start + config.batch_size].tolist():
                rng = np.random.default_rng([config.seed, epoch, i])
                told = [(sentences[i], lesson(sentences[i], asked[i], config.turns, rng))]
                few = min(len(sentences[i]), len(kinds))
                for _ in range(config.mixed):
                    mixed = [kinds[j] for j in rng.choice(len(kinds), few, replace=False)]
                    told.append((mixed, lesson(mixed, (), 0, rng)))
                for own, examples in told:
                    said = _said(llm, prompter, own, turned)
                    regions = as_regions(said, centre, config.noise, rng)
                    for example in examples:
                        rows.append(_row(llm, prompter, regions, example, config.max_positions))
            loss = _loss(llm, rows)
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(llm.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
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


def lesson(
    own: Sequence[str], asked: Sequence[Asked], most: int, rng: np.random.Generator
) -> list[Example]:
    """Return the training examples of a text: questions and descriptions, with answers."""
    turns = [
        question_example(asked[j].question, (), asked[j].answer)
        for j in rng.permutation(len(asked))[:most].tolist()
    ]
    return [*turns, caption_example("\n".join(own), "affirmed")]


def _said(llm: Any, prompter: Prompter, own: Sequence[str], turned: Turned) -> torch.Tensor:
    """Return sentence vectors [n, D]: rotated ones, or else the means of their words."""
    if turned:
        return torch.stack([turned[text] for text in own])
    return words_of(llm.get_input_embeddings().weight, prompter, own)


@torch.no_grad()
def turned_to_words(
    llm: Any, prompter: Prompter, every: Sequence[str], seen: torch.Tensor
) -> tuple[Turned, torch.Tensor]:
    """Return the slide model's sentence vectors, rotated onto their words, and their centre.

    Args:
        llm: The language model as it is now.
        prompter: Its prompts.
        every: Sentences.
        seen: The slide model's vectors of them [n, d].
    """
    table = llm.get_input_embeddings().weight
    place = {text: at for at, text in enumerate(every)}
    kept = distinct(every)
    words = words_of(table, prompter, kept)
    texts = seen[[place[text] for text in kept]]
    turn, centre = rotation(texts, words)
    away = (seen - texts.mean(0)).double() @ turn
    scale = (words - centre).square().mean().sqrt() / away.square().mean().sqrt().clamp(min=1e-12)
    return dict(zip(every, (centre + scale * away).float(), strict=True)), centre.float()


def as_regions(
    said: torch.Tensor, centre: torch.Tensor, noise: float, rng: np.random.Generator
) -> torch.Tensor:
    """Place sentence vectors in regions as on a slide: some in several, some together.

    Args:
        said: Vectors of sentences [n, D].
        centre: Mean of such vectors [D]: the vector of a region that shows nothing.
        noise: Maximum noise, in standard deviations of the sentences.
        rng: Generator of the placement.

    Returns:
        Vectors of regions [R, D], R between n / 2 and 3 n / 2.
    """
    n = len(said)
    regions = int(rng.integers(max(1, n // 2), 1 + n + n // 2))
    there = rng.random((regions, n)) < rng.uniform(0, 0.3)
    there[rng.integers(regions, size=n), np.arange(n)] = True
    share = there / np.sqrt(there.sum(1, keepdims=True).clip(1))
    seen = torch.from_numpy(share.astype(np.float32)) @ (said - centre)
    drawn = torch.from_numpy(rng.standard_normal(tuple(seen.shape), np.float32))
    spread = rng.uniform(0, noise) * (said - centre).detach().square().mean().sqrt()
    return centre + seen + spread * drawn


Row = tuple[torch.Tensor, list[int]]
"""Input embeddings [T, D], and the tokens to be predicted at their end."""


def _row(llm: Any, prompter: Prompter, vectors: torch.Tensor, example: Example, most: int) -> Row:
    words = llm.get_input_embeddings().weight
    before, after = prompter.prompt_ids(example.instruction, kind=example.kind)
    answer = prompter.answer_ids(example.answer)
    vectors = vectors[: max(1, most - len(before) - len(after) - 1)]
    answer = answer[: max(1, most - len(before) - len(vectors) - len(after))]
    head, tail = words[torch.tensor(before)], words[torch.tensor([*after, *answer[:-1]])]
    return torch.cat([head, vectors, tail]), answer


def _loss(llm: Any, rows: Sequence[Row]) -> torch.Tensor:
    """Compute the mean cross-entropy of the answers' tokens; captions are padded apart."""
    total = rows[0][0].new_zeros(())
    by_length = sorted(rows, key=lambda row: len(row[0]))
    shortest = len(by_length[0][0])
    short = [row for row in by_length if len(row[0]) <= _MUCH_LONGER * shortest]
    for part in (short, by_length[len(short) :]):
        if part:
            read = pad_sequence([own for own, _ in part], batch_first=True)
            states = llm.model(inputs_embeds=read, use_cache=False)[0]
            said = [
                states[place, len(own) - len(answer) : len(own)]
                for place, (own, answer) in enumerate(part)
            ]
            wanted = torch.tensor([token for _, answer in part for token in answer])
            total = total + F.cross_entropy(llm.lm_head(torch.cat(said)), wanted, reduction="sum")
    return total / sum(len(answer) for _, answer in rows)
