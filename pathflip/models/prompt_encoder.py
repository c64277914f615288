"""Prompt embeddings for the language model: slide model, projector, token embeddings.

:class:`PromptEncoder` turns a slide and a conversation into the prompt embeddings a language model
reads. It holds no language model, so that an engine that has one of its own (vLLM) needs no second.

Shapes: B slides, N regions, M patch slots of a region, d_in feature width, S vectors of a slide, T
of a region, d joint width, D width of the language model, P vectors of a slide's prefix.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pathflip.calibration import Calibration
from pathflip.config import load_config
from pathflip.errors import CheckpointError, ConfigError
from pathflip.models import hub
from pathflip.models.chat_template import Kind, Messages, Prompter
from pathflip.models.outputs import VisionOutput
from pathflip.models.pathflip import PathFLIP

ABOUT, PROJECTOR, VISION = "instruct.json", "projector.safetensors", "vision"
MERGED = "pathflip_llm.json"
"""Beside a merged language model: which instruction model it belongs to."""


@dataclass(frozen=True, kw_only=True)
class InstructConfig:
    """Settings of an instruction model; the defaults are the paper's, LoRA the published code's.

    Attributes:
        prefix: Vectors of a slide that the language model reads, each through σ (Eq. 11).
            ``queries``: every query vector of slide and regions, (1 + N)·Q. ``mean``: their means,
            1 + N (published code). ``joined``: σ reads the query vectors of the slide, or of a
            region, side by side, 1 + N.
        template: Layout of slide and question: see
            :class:`pathflip.models.chat_template.Prompter`.
        llm_tuning: Part of the language model that trains: an adapter, none, or all of it.
        lora_r: Rank of the adapter.
        lora_alpha: Scale of the adapter, times the rank.
        lora_dropout: Dropout of the adapter.
        train_vision: Whether the vision model trains.
        choice_answer: Form of the answer to a question with options: the letter and the text of
            one, or its text alone, as a small model trained from scratch can learn. Choices are
            scored accordingly unless another way is asked for.
        projector_start: Initialisation of σ: ``random``, or from ``text``: see
            :func:`pathflip.models.data_init.start_projector`.
    """

    prefix: Literal["queries", "mean", "joined"] = "queries"
    template: Literal["qwen3", "official_v1"] = "qwen3"
    llm_tuning: Literal["lora", "freeze", "full"] = "lora"
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    train_vision: bool = True
    choice_answer: Literal["letter", "text"] = "letter"
    projector_start: Literal["random", "text"] = "random"

    def __post_init__(self) -> None:
        for name in ("lora_r", "lora_alpha"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"instruct.{name} is {getattr(self, name)}.", hint="It must be 1 or more."
                )
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(
                f"instruct.lora_dropout is {self.lora_dropout}.",
                hint="It must be 0 or more, below 1.",
            )


class PromptEncoder(nn.Module):
    """Encoder of slides and conversations into prompt embeddings.

    Args:
        vision: The vision model.
        tokenizer: Tokenizer of the language model.
        embedding: Embedding table of the language model.
        config: Settings of the instruction model.

    Attributes:
        calibration: Temperature of its choices; None where none was fitted.
        abstains: Whether it was tuned on questions that a slide cannot answer.

    Raises:
        ConfigError: The vision model has no such prefix, or the tokenizer no such template.
    """

    vision: PathFLIP
    projector: nn.Linear

    def __init__(
        self, vision: PathFLIP, tokenizer: Any, embedding: nn.Embedding, config: InstructConfig
    ) -> None:
        super().__init__()
        self.config = config
        self.vision = vision
        self.tokenizer = tokenizer
        self.prompter = Prompter(tokenizer, config.template)
        self._embedding = [embedding]  # in a list: not a second time among the parameters
        self.width = embedding.embedding_dim
        self.projector = nn.Linear(prefix_width(vision, config), self.width)
        self.calibration: Calibration | None = None
        self.abstains = False

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, llm: str | Path) -> PromptEncoder:
        """Load the prompt encoder of an instruction model, in evaluation mode, on the CPU.

        Args:
            folder: Folder that ``PathFLIPInstruct.save_pretrained`` wrote.
            llm: Its merged language model; only tokenizer and embedding are read.

        Raises:
            CheckpointError: A file is missing or damaged, or the two do not belong together.
        """
        folder, llm = Path(folder), Path(llm)
        about = read_about(folder)
        fits = read_json(llm / MERGED).get("instruct_fingerprint")
        if fits != about["fingerprint"]:
            raise CheckpointError(
                f"The language model {llm} was not tuned with {folder}.",
                hint="Give the llm folder of the same run.",
                code="other_model",
            )
        table = _read_embedding(llm)
        embedding = nn.Embedding(*table.shape)
        embedding.weight = nn.Parameter(table, requires_grad=False)
        front = PromptEncoder(
            PathFLIP.from_pretrained(folder / VISION), hub.read_tokenizer(llm), embedding,
            read_config(folder),
        )  # fmt: skip
        front._own_embedding()
        read_projector(front.projector, folder)
        front.answers_as(read_about(folder))
        return front.eval()

    def answers_as(self, about: Mapping[str, Any]) -> None:
        """Take the temperature, and whether it abstains, from an instruct.json."""
        self.abstains = bool(about.get("abstains", False))
        if (own := about.get("calibration")) is not None:
            self.calibration = Calibration(**own)

    def _own_embedding(self) -> None:
        """Register the embedding table with this module, where no language model holds it."""
        self.embedding_table = self._embedding[0]

    @property
    def embedding(self) -> nn.Embedding:
        """The language model's embedding table."""
        return self._embedding[0]

    @property
    def eos_ids(self) -> list[int]:
        """Tokens that end an answer."""
        found = {self.prompter.end_id}
        if self.tokenizer.eos_token_id is not None:
            found.add(int(self.tokenizer.eos_token_id))
        return sorted(found)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.projector.weight.device

    def visual_prefix(self, features: Tensor, patch_mask: Tensor) -> list[Tensor]:
        """Return a slide's prefix: its own vectors, then its regions', through σ (Eq. 11).

        Args:
            features: [B, N, M, d_in].
            patch_mask: bool [B, N, M]; a region without a patch leaves no vector.

        Returns:
            [P_b, D] of each slide.
        """
        features, patch_mask = features.to(self.device), patch_mask.to(self.device)
        return self.project(
            self.vision.encode_regions(features, patch_mask, regions=True, queries=True)
        )

    def project(self, sight: VisionOutput) -> list[Tensor]:
        """Return the prefixes of encoded slides [P_b, D]."""
        slides, regions = sight.slide[:, None], sight.tokens
        if self.config.prefix != "mean":
            slides = slides if sight.queries is None else sight.queries
            if self.config.prefix == "joined":
                slides = slides.flatten(1)[:, None]
                regions = None if regions is None else regions.flatten(2)[:, :, None]
        elif regions is not None:
            regions = regions.mean(2, keepdim=True)
        slides = self.projector(slides)
        if regions is None:
            return list(slides)
        regions = self.projector(regions)
        return [
            torch.cat([own, its[there].flatten(0, 1)])
            for own, its, there in zip(slides, regions, sight.region_mask, strict=True)
        ]

    def prompt_ids(
        self, messages: Messages, *, kind: Kind = "question"
    ) -> tuple[list[int], list[int]]:
        """Return token ids before and after the slide: see
        :meth:`pathflip.models.chat_template.Prompter.prompt_ids`.
        """  # noqa: D205
        return self.prompter.prompt_ids(messages, kind=kind)

    def embed_prompt(
        self,
        prefix: Tensor,
        messages: Messages,
        *,
        kind: Kind = "question",
        answer_start: str = "",
    ) -> Tensor:
        """Return the language model's input embeddings: prompt and slide [T, D].

        Args:
            prefix: Vectors from :meth:`visual_prefix` [P, D].
            messages: See :meth:`prompt_ids`.
            kind: Template of official_v1.
            answer_start: Text that the answer is made to begin with.
        """
        before, after = self.prompt_ids(messages, kind=kind)
        return self.embed_ids(prefix, before, after + self.prompter.text_ids(answer_start))

    def embed_ids(self, prefix: Tensor, before: list[int], after: list[int]) -> Tensor:
        """Embed token ids with a slide between them [T, D]."""
        ids = torch.tensor(before + after, dtype=torch.long, device=prefix.device)
        words = self.embedding(ids)
        return torch.cat([words[: len(before)], prefix.to(words.dtype), words[len(before) :]])


def prefix_width(vision: PathFLIP, config: InstructConfig) -> int:
    """Return the input width of σ.

    Raises:
        ConfigError: Slide and regions have different numbers of vectors to be joined.
    """
    about = vision.config
    if config.prefix != "joined":
        return about.d
    slide = 1
    if about.slide_encoder == "qformer" and not about.slide_context_layers:
        slide = about.num_queries
    if about.has_regions and about.tokens_per_region != slide:
        raise ConfigError(
            f"instruct.prefix joined: the vision model has {slide} vectors for a slide and "
            f"{about.tokens_per_region} for a region.",
            hint="Choose queries or mean.",
        )
    return slide * about.d


# -- files ----------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        CheckpointError: It is missing or damaged.
    """
    try:
        found = json.loads(path.read_bytes())
        if isinstance(found, dict):
            return found
        what = "holds no object"
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} lacks {path.name}.", hint="It is not a whole model folder."
        ) from None
    except ValueError as error:
        what = f"is damaged: {error}"
    raise CheckpointError(f"{path} {what}.", hint="Copy it again.", code="damaged")


def read_about(folder: Path) -> dict[str, Any]:
    """Return instruct.json: ``config``, ``base`` {name, fingerprint}, ``fingerprint``.

    Raises:
        CheckpointError: It is missing, damaged, or lacks one of them.
    """
    about = read_json(folder / ABOUT)
    if missing := {"config", "base", "fingerprint"} - set(about):
        raise CheckpointError(
            f"{folder / ABOUT} has no {sorted(missing)[0]}.", hint="Write the model again."
        )
    return about


def read_config(folder: Path) -> InstructConfig:
    """Return the settings of an instruction model.

    Raises:
        CheckpointError: They are not of this version.
    """
    try:
        return load_config(InstructConfig, given=read_about(folder)["config"])
    except ConfigError as error:
        raise CheckpointError(
            f"{folder / ABOUT} does not describe a model of this version of pathflip: "
            f"{error.message}",
            hint="Write the model again, or install the version that wrote it.",
        ) from error


def read_projector(projector: nn.Linear, folder: Path) -> None:
    """Fill σ with the weights of a folder.

    Raises:
        CheckpointError: They are missing, damaged or of another size.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / PROJECTOR
    try:
        projector.load_state_dict(load_file(path))
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} cannot be used: {str(error).splitlines()[0]}",
            hint="Copy it again; it must be of the same model as instruct.json.",
            code="damaged",
        ) from error


def _read_embedding(folder: Path) -> Tensor:
    """Return the embedding table of a language model, without loading the rest of it."""
    from safetensors import SafetensorError, safe_open

    name = "model.embed_tokens.weight"
    index = folder / "model.safetensors.index.json"
    try:
        path = folder / "model.safetensors"
        if index.exists():
            path = folder / read_json(index)["weight_map"][name]
        with safe_open(path, framework="pt") as file:
            table: Tensor = file.get_tensor(name)
    except (SafetensorError, OSError, KeyError) as error:
        raise CheckpointError(
            f"The embedding table of {folder} cannot be read: {str(error).splitlines()[0]}",
            hint="Give the llm folder of a tuned run.",
            code="damaged",
        ) from error
    return table
