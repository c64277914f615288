"""A language model that reads slides: captions and answers (Eq. 11).

Vectors of a slide and its regions go through one linear map σ and stand in the prompt as if they
were words: ``[prompt; σ([v; v_1; …; v_N]); instruction; answer]``. Read in this order:
:meth:`PathFLIPInstruct.forward`, then :mod:`pathflip.models.prompt_encoder` for what comes before
the language model and :mod:`pathflip.models.chat_template` for prompts.

Shapes: B slides, N regions, M patch slots of a region, d_in feature width, D width of the language
model, P vectors of a slide's prefix, T length of a prompt, R examples of a batch.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from pathflip.errors import CheckpointError
from pathflip.models import hub
from pathflip.models import prompt_encoder as parts
from pathflip.models.chat_template import (
    CAPTION_INSTRUCTION,
    IMAGE,
    Example,
    multiple_choice,
    question_example,
)
from pathflip.models.llm import (
    fingerprint_of,
    load_llm,
    read_adapter,
    shown_if_long,
    with_adapter,
)
from pathflip.models.pathflip import PathFLIP, Texts
from pathflip.models.prompt_encoder import InstructConfig, PromptEncoder
from pathflip.models.text_tower import evaluating

__all__ = [
    "CAPTION_INSTRUCTION",
    "IMAGE",
    "Example",
    "InstructConfig",
    "InstructOutput",
    "PathFLIPInstruct",
    "PromptEncoder",
    "fingerprint_of",
    "multiple_choice",
    "question_example",
]

ADAPTER, FULL = "adapter", "llm"
ROWS_AT_ONCE = 64
"""Prompts that go through the language model together where no gradient is wanted."""
_MUCH_LONGER = 1.5
"""A row this much longer than the shortest of its group goes into another: less padding."""


@dataclass(frozen=True, kw_only=True, eq=False)
class InstructOutput:
    """Losses of a training step.

    Attributes:
        loss: Scalar to minimise.
        loss_answer: Mean cross-entropy of the answers' tokens, each with its end token.
        loss_slide: Slide loss of the vision model; 0 where it does not train along.
        loss_region: Region loss of the vision model; 0 where it does not train along.
        answer_sum: Sum of the cross-entropy over the answers' tokens.
        tokens: Number of those tokens.
    """

    loss: Tensor
    loss_answer: Tensor
    loss_slide: Tensor
    loss_region: Tensor
    answer_sum: Tensor
    tokens: int


class PathFLIPInstruct(PromptEncoder):
    """Vision model, projector and language model. Make one with :meth:`from_parts`.

    Args:
        vision: The vision model.
        llm: A causal language model of ``transformers``, or that in a ``peft`` adapter.
        tokenizer: Its tokenizer.
        config: Settings of the model.
        base: The language model before tuning: ``name``, and ``fingerprint`` of its folder.

    Attributes:
        one_pass: Run a batch through the language model at once, not by groups of similar length:
            where its layers are cut over several processes, each must run them equally often.
    """

    def __init__(
        self,
        vision: PathFLIP,
        llm: Any,
        tokenizer: Any,
        config: InstructConfig,
        *,
        base: dict[str, str],
    ) -> None:
        super().__init__(vision, tokenizer, llm.get_input_embeddings(), config)
        self.llm = llm
        self.base = base
        self.one_pass = False

    # -- making and keeping -----------------------------------------------------------------------

    @classmethod
    def from_parts(
        cls,
        vision: PathFLIP,
        llm: str | Path,
        config: InstructConfig | None = None,
        *,
        seed: int = 0,
    ) -> PathFLIPInstruct:
        """Make an untuned model, in evaluation mode.

        Args:
            vision: A trained vision model.
            llm: Base language model (Qwen3): a folder, or ``owner/name`` on the hub.
            config: Settings of the model; None: the defaults.
            seed: Seed of the initial projector and adapter.

        Raises:
            CheckpointError: The language model cannot be had or is damaged.
            ConfigError: Parts and switches do not go together.
        """
        config = config or InstructConfig()
        folder = hub.find(llm)
        name = str(folder.absolute()) if Path(llm).is_dir() else str(llm)
        base = {"name": name, "fingerprint": fingerprint_of(folder)}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            causal = load_llm(folder)
            if config.llm_tuning == "lora":
                causal = with_adapter(causal, config)
            model = cls(vision, causal, hub.read_tokenizer(folder), config, base=base)
            with torch.no_grad():
                # As large as words are: a prefix that dwarfs them drowns what layers add to it.
                scale = float(model.embedding.weight.std())
                model.projector.weight.normal_(std=scale / model.projector.in_features**0.5)
                model.projector.bias.zero_()
        model.trainable("all")
        return model.eval()

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, llm: str | Path | None = None, device: str = "cpu"
    ) -> PathFLIPInstruct:
        """Load a tuned model, in evaluation mode.

        Args:
            folder: Folder that :meth:`save_pretrained` wrote.
            llm: Folder or hub name of the base language model, if it moved; any other is refused.
            device: Device of the model.

        Raises:
            CheckpointError: A file is missing or damaged, or the base is another one.
        """
        folder = Path(folder)
        about, config = parts.read_about(folder), parts.read_config(folder)
        base = dict(about["base"])
        source = hub.find(base["name"] if llm is None else llm)
        if fingerprint_of(source) != base["fingerprint"]:
            raise CheckpointError(
                f"{source} is not the language model that {folder} was tuned on.",
                hint=f"Give the one it began with: {base['name']}.",
                code="other_model",
            )
        causal = load_llm(folder / FULL if config.llm_tuning == "full" else source)
        if config.llm_tuning == "lora":
            causal = read_adapter(causal, folder / ADAPTER)
        vision = PathFLIP.from_pretrained(folder / parts.VISION)
        model = cls(vision, causal, hub.read_tokenizer(source), config, base=base)
        parts.read_projector(model.projector, folder)
        if model.fingerprint() != about["fingerprint"]:
            raise CheckpointError(
                f"The weights in {folder} do not match the fingerprint in its instruct.json.",
                hint="Its files are of different models; copy it again.",
                code="damaged",
            )
        model.answers_as(about)
        model.trainable("all")
        return model.to(device).eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write instruct.json, projector.safetensors, vision/ and the tuned weights of the LLM.

        A frozen or adapted base is not copied: it is named, with its fingerprint.
        """
        from safetensors.torch import save_file

        folder = Path(folder)
        self.vision.save_pretrained(folder / parts.VISION)
        state = self.projector.state_dict()
        tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
        save_file(tensors, folder / parts.PROJECTOR, metadata={"format": "pt"})
        if self.config.llm_tuning == "lora":
            self.llm.save_pretrained(str(folder / ADAPTER), save_embedding_layers=False)
            (folder / ADAPTER / "README.md").unlink(missing_ok=True)  # a form, not filled in
        elif self.config.llm_tuning == "full":
            self.llm.save_pretrained(str(folder / FULL))
        about = {
            "config": asdict(self.config),
            "base": self.base,
            "fingerprint": self.fingerprint(),
            "abstains": self.abstains,
            "calibration": None if self.calibration is None else self.calibration.as_json(),
        }
        (folder / parts.ABOUT).write_text(json.dumps(about, indent=1, sort_keys=True) + "\n")

    def save_merged(self, folder: str | Path) -> None:
        """Write the language model alone, adapter folded in, in the format of any engine."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        llm = self.llm
        if self.config.llm_tuning == "lora":
            llm = copy.deepcopy(llm).merge_and_unload()
        about = llm.generation_config
        kept = about.eos_token_id, about.pad_token_id
        about.eos_token_id, about.pad_token_id = self.eos_ids, self.pad_id
        try:
            with shown_if_long(sum(own.nbytes for own in llm.parameters())):
                llm.save_pretrained(str(folder))
        finally:
            about.eos_token_id, about.pad_token_id = kept
        self.tokenizer.save_pretrained(str(folder))
        (folder / parts.MERGED).write_text(
            json.dumps({"instruct_fingerprint": self.fingerprint()}) + "\n"
        )

    def fingerprint(self) -> str:
        """Return hex SHA-256 of settings, base and tuned weights; saving and loading keep it."""
        digest = hashlib.sha256()
        about = [asdict(self.config), self.base["fingerprint"], self.vision.fingerprint()]
        digest.update(json.dumps(about, sort_keys=True).encode())
        tensors = {f"projector.{k}": v for k, v in self.projector.state_dict().items()}
        if self.config.llm_tuning == "lora":
            from peft import get_peft_model_state_dict

            # No look at the base's config: it may be on the hub, and its words are never trained.
            tensors |= get_peft_model_state_dict(self.llm, save_embedding_layers=False)
        elif self.config.llm_tuning == "full":
            tensors |= self.llm.state_dict()
        for name, value in sorted(tensors.items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            flat = value.detach().cpu().contiguous().view(-1)
            digest.update(flat.view(torch.uint8).numpy())
        return digest.hexdigest()

    @property
    def causal(self) -> Any:
        """The language model itself, with or without an adapter in its layers."""
        return self.llm.base_model.model if self.config.llm_tuning == "lora" else self.llm

    @property
    def embedding(self) -> nn.Embedding:
        """The language model's embedding table."""
        table: nn.Embedding = self.llm.get_input_embeddings()
        return table

    @property
    def eos_ids(self) -> list[int]:
        """Tokens that end an answer: the template's, the tokenizer's, the language model's."""
        own = self.llm.generation_config.eos_token_id
        own = own if isinstance(own, list) else [own]
        return sorted({*super().eos_ids, *(int(number) for number in own if number is not None)})

    @property
    def pad_id(self) -> int:
        """Token for padding; attention masks it."""
        own = self.tokenizer.pad_token_id
        return int(self.prompter.end_id if own is None else own)

    # -- training ---------------------------------------------------------------------------------

    def trainable(self, stage: Literal["projector", "all"], *, align: bool = False) -> None:
        """Set ``requires_grad`` of every parameter for a stage.

        Args:
            stage: Stage of tuning: σ alone, or all that the settings name.
            align: Whether the vision model's own losses train along: then its text tower trains
                too; otherwise parameters that the answers do not depend on have no gradient.
        """
        self.requires_grad_(False)
        self.projector.requires_grad_(True)
        if stage == "projector":
            return
        if self.config.llm_tuning == "full":
            self.llm.requires_grad_(True)
        elif self.config.llm_tuning == "lora":
            for name, parameter in self.llm.named_parameters():
                parameter.requires_grad_("lora_" in name)
        if self.config.train_vision:
            self.vision.requires_grad_(True)
            if not align:
                for parameter in _unseen(self.vision):
                    parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> PathFLIPInstruct:
        """Set training mode, as of every module; a frozen vision model keeps its dropout off."""
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.vision.parameters()):
            self.vision.eval()
        return self

    def forward(
        self,
        features: Tensor,
        patch_mask: Tensor,
        examples: Sequence[Sequence[Example]],
        *,
        captions: Texts | None = None,
        subcaptions: Sequence[Texts] | None = None,
        negative_choice: Tensor | None = None,
        group: Any = None,
        align: float = 0.0,
    ) -> InstructOutput:
        """Compute the loss of a batch; a slide is encoded once, however many examples it has.

        Args:
            features: [B, N, M, d_in].
            patch_mask: bool [B, N, M]; a region without a patch counts as absent.
            examples: Instruction examples of each slide; at least one in all.
            captions: For the vision model's own losses: see
                :meth:`pathflip.models.PathFLIP.forward`, as for the next three.
            subcaptions: K texts a slide.
            negative_choice: int64 [B, B_all].
            group: Process group of gathered negatives.
            align: Weight of the vision model's own losses; 0: not computed.

        Raises:
            ValueError: Slides and examples are not equally many, or there is no example.
        """
        if len(examples) != len(features) or not any(examples):
            raise ValueError(f"{len(features)} slides, {sum(map(len, examples))} examples")
        vision = self.vision
        sight = vision.encode_regions(
            features, vision.training_mask(patch_mask), regions=True, queries=True
        )
        rows, answers = [], []
        for prefix, own in zip(self.project(sight), examples, strict=True):
            for example in own:
                before, after = self.prompt_ids(example.instruction, kind=example.kind)
                answer = self.prompter.answer_ids(example.answer)
                # The end token is predicted, never read.
                rows.append(self.embed_ids(prefix, before, after + answer[:-1]))
                answers.append(answer)
        summed = sum(
            (-log_probs.sum() for log_probs in self._answer_log_probs(rows, answers)),
            start=rows[0].new_zeros((), dtype=torch.float32),
        )
        tokens = sum(map(len, answers))
        loss_answer = summed / tokens
        zero = loss_answer.new_zeros(())
        loss, loss_slide, loss_region = loss_answer, zero, zero
        if align:
            if captions is None or subcaptions is None:
                raise ValueError("align needs captions and sub-captions")
            own_losses = vision.align(
                sight, captions, subcaptions, negative_choice=negative_choice, group=group
            )
            loss_slide, loss_region = own_losses.loss_slide, own_losses.loss_region
            loss = loss + align * own_losses.loss
        return InstructOutput(
            loss=loss,
            loss_answer=loss_answer,
            answer_sum=summed,
            loss_slide=loss_slide,
            loss_region=loss_region,
            tokens=tokens,
        )

    def _answer_log_probs(
        self, rows: Sequence[Tensor], answers: Sequence[list[int]]
    ) -> list[Tensor]:
        """Return the log-probability of each token of each answer, in the order of the rows.

        Args:
            rows: Prompt and answer without its last token [T, D].
            answers: Token ids of each answer.
        """
        found: list[Tensor] = [rows[0]] * len(rows)
        groups = [list(range(len(rows)))] if self.one_pass else _by_length(list(map(len, rows)))
        for members in groups:
            states = self._states([rows[i] for i in members], left=False)
            at, wanted = [], []
            for place, i in enumerate(members):
                end = len(rows[i])
                at.append(states[place, end - len(answers[i]) : end])
                wanted += answers[i]
            logits = self.causal.lm_head(torch.cat(at)).float()  # of no other positions
            target = torch.tensor(wanted, device=logits.device)
            log_probs = -F.cross_entropy(logits, target, reduction="none")
            lengths = [len(answers[i]) for i in members]
            for i, own in zip(members, torch.split(log_probs, lengths), strict=True):
                found[i] = own
        return found

    def _states(self, rows: Sequence[Tensor], *, left: bool) -> Tensor:
        """Return last states of the language model over padded rows [R, T, D]."""
        embeds, mask = _padded(rows, left=left)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        states: Tensor = self.causal.model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
        )[0]
        return states

    # -- answering --------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Tensor], *, max_new_tokens: int = 512, **sampling: Any
    ) -> list[str]:
        """Generate answers; greedy unless told otherwise.

        Args:
            prompts: Prompt embeddings from :meth:`embed_prompt` [T, D].
            max_new_tokens: Maximum length of an answer, in tokens.
            sampling: Other settings of ``transformers``' generation: ``num_beams``, ``do_sample``,
                ``temperature``, ``top_p``, ``min_new_tokens``, ``repetition_penalty``.

        Returns:
            The texts, without special tokens.
        """
        return [
            self.tokenizer.decode(ids, skip_special_tokens=True).strip()
            for ids in self.generate_ids(prompts, max_new_tokens=max_new_tokens, **sampling)
        ]

    @torch.no_grad()
    def generate_ids(
        self, prompts: Sequence[Tensor], *, max_new_tokens: int = 512, **sampling: Any
    ) -> list[list[int]]:
        """Generate token ids of answers, up to and without the end token; see :meth:`generate`."""
        found: list[list[int]] = [[]] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        settings = {"do_sample": False, "num_beams": 1} | sampling
        if not settings["do_sample"]:  # what a base's generation_config has for sampling
            settings = {"temperature": None, "top_p": None, "top_k": None} | settings
        ends = set(self.eos_ids)
        with evaluating(self):
            for start in range(0, len(order), ROWS_AT_ONCE):
                members = order[start : start + ROWS_AT_ONCE]
                embeds, mask = _padded([prompts[i] for i in members], left=True)
                out = self.causal.generate(
                    inputs_embeds=embeds, attention_mask=mask, max_new_tokens=max_new_tokens,
                    eos_token_id=self.eos_ids, pad_token_id=self.pad_id, **settings,
                )  # fmt: skip
                for i, ids in zip(members, out.tolist(), strict=True):
                    stop = next((at for at, token in enumerate(ids) if token in ends), len(ids))
                    found[i] = ids[:stop]
        return found

    @torch.no_grad()
    def continuation_log_probs(
        self, prompts: Sequence[Tensor], continuations: Sequence[Sequence[str]]
    ) -> list[list[tuple[float, int]]]:
        """Return log-probabilities of texts after a prompt, without an end token.

        Args:
            prompts: Prompt embeddings from :meth:`embed_prompt` [T, D].
            continuations: Texts for each prompt, none of them empty.

        Returns:
            (sum of log-probabilities, tokens) of each.

        Raises:
            ValueError: A text has no token.
        """
        rows, answers = [], []
        for prompt, texts in zip(prompts, continuations, strict=True):
            for text in texts:
                ids = self.prompter.text_ids(text)
                if not ids:
                    raise ValueError("a continuation is empty")
                words = self.embedding(torch.tensor(ids, device=prompt.device))
                rows.append(torch.cat([prompt, words.to(prompt.dtype)[:-1]]))
                answers.append(ids)
        scores: list[tuple[float, int]] = []
        with evaluating(self):
            for start in range(0, len(rows), ROWS_AT_ONCE):
                part = slice(start, start + ROWS_AT_ONCE)
                found = self._answer_log_probs(rows[part], answers[part])
                scores += [(float(own.sum()), len(own)) for own in found]
        out, at = [], 0
        for texts in continuations:
            out.append(scores[at : at + len(texts)])
            at += len(texts)
        return out

    @torch.no_grad()
    def letter_logits(self, prompts: Sequence[Tensor], letters: str | Sequence[str]) -> Tensor:
        """Return logits of letters as the next token [prompts, letters].

        Args:
            prompts: Prompt embeddings from :meth:`embed_prompt` [T, D].
            letters: Single letters.
        """
        ids = [self.prompter.text_ids(letter)[0] for letter in letters]
        found = torch.zeros(len(prompts), len(ids), device=self.device)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        with evaluating(self):
            for start in range(0, len(order), ROWS_AT_ONCE):
                members = order[start : start + ROWS_AT_ONCE]
                states = self._states([prompts[i] for i in members], left=True)
                found[members] = self.causal.lm_head(states[:, -1])[:, ids].float()
        return found


def _unseen(vision: PathFLIP) -> list[nn.Parameter]:
    """Return parameters that a slide's vectors do not depend on."""
    every = [parameter for parameter in vision.parameters() if parameter.requires_grad]
    device = vision.device
    features = torch.zeros(1, 1, 1, vision.config.feature_dim, device=device)
    with torch.enable_grad():
        there = torch.ones(1, 1, 1, dtype=torch.bool, device=device)
        sight = vision.encode_regions(features, there, regions=True, queries=True)
        vectors = [sight.slide, sight.tokens, sight.queries]
        total = torch.stack([part.sum() for part in vectors if part is not None]).sum()
        gradients = torch.autograd.grad(total, every, allow_unused=True)
    return [own for own, gradient in zip(every, gradients, strict=True) if gradient is None]


def _by_length(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Group rows of similar length."""
    group: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if group and lengths[i] > _MUCH_LONGER * lengths[group[0]]:
            yield group
            group = []
        group.append(i)
    yield group


def _padded(rows: Sequence[Tensor], *, left: bool) -> tuple[Tensor, Tensor]:
    """Return rows padded with zeros [R, T, D] and their attention mask, int64 [R, T]."""
    side = "left" if left else "right"
    embeds = pad_sequence(list(rows), batch_first=True, padding_side=side)
    ones = [torch.ones(len(row), dtype=torch.long, device=row.device) for row in rows]
    return embeds, pad_sequence(ones, batch_first=True, padding_side=side)
