"""Neural patch encoders: building from weights, and running.

Imports torch; timm and transformers are imported where a model needs them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from pathflip.encoders import musk, sources, zoo
from pathflip.encoders.base import EncoderInfo, Spec
from pathflip.encoders.torchscript import load_torchscript
from pathflip.encoders.weights import bad_weights, safetensors_of
from pathflip.errors import EncoderError

Forward = Callable[[Tensor], Tensor]
CPU_BATCH, CUDA_BATCH = 32, 256


class NeuralEncoder:
    """Network on patches: resampling, normalisation, bf16 on CUDA, smaller batches if short.

    On a GPU pixels come through page-locked memory on a stream of their own: they are copied while
    the network runs on those before (:meth:`begin`).

    Args:
        info: Description of the encoder.
        card: Preprocessing of patches.
        model: Network; moved to the device.
        forward: Function from normalised images [n, 3, px, px] to features [n, dim].
        device: Device it runs on.
        batch: Number of patches at a time; halved for good when the device runs out of memory.

    Raises:
        EncoderError: ``out_of_memory`` when the network does not fit the device.
    """

    def __init__(
        self,
        *,
        info: EncoderInfo,
        card: zoo.Card,
        model: nn.Module,
        forward: Forward,
        device: torch.device,
        batch: int | None = None,
    ) -> None:
        self.name = info.name
        self.revision = info.revision
        self.dim = info.dim
        self.input_px = info.input_px
        self.mpp = info.mpp
        self.licence = info.licence
        self.device = device
        self.batch = batch or (CUDA_BATCH if device.type == "cuda" else CPU_BATCH)
        self._card = card
        try:
            self._model = model.eval().to(device)
        except torch.OutOfMemoryError as error:
            raise EncoderError(
                f"Encoder {info.name} does not fit the free memory of {device}.",
                hint="Free memory on the device, begin fewer actors on it (ingest: -o actors=1), "
                "or use a smaller encoder.",
                code="out_of_memory",
            ) from error
        cuda: Any = torch.cuda  # its streams and events have no types
        self._copies = cuda.Stream(device) if device.type == "cuda" else None
        self._forward = forward
        self._mean = torch.tensor(card.mean, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(card.std, device=device).view(1, 3, 1, 1)
        every = torch.arange(256.0).view(1, 256, 1)
        mean, std = torch.tensor(card.mean), torch.tensor(card.std)
        self._levels = ((every / 255 - mean) / std).numpy()

    def __call__(self, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Encode RGB patches [n, px, px, 3] -> [n, dim]; values may be non-finite in bf16.

        Raises:
            As :meth:`begin`.
        """
        return self.begin(patches)()

    def begin(self, patches: NDArray[np.uint8]) -> Callable[[], NDArray[np.float32]]:
        """Begin to encode RGB patches [n, px, px, 3]; return what waits for their features.

        On a GPU the work goes on after this returns, and ``patches`` may be overwritten meanwhile;
        on a CPU it is done by then.

        Raises:
            EncoderError: ``out_of_memory`` when not even one patch fits; ``bad_weights`` when the
                network's output is not [n, dim].
            ValueError: The array is not uint8 of that shape.
        """
        if patches.dtype != np.uint8 or patches.ndim != 4 or patches.shape[3] != 3:
            raise ValueError(
                f"patches must be uint8 [n, px, px, 3], not {patches.dtype} {patches.shape}"
            )
        parts: list[Callable[[], Tensor]] = []
        done = 0
        while done < len(patches):
            part = patches[done : done + self.batch]
            try:
                parts.append(self._begin(part))
            except (torch.OutOfMemoryError, MemoryError) as error:
                self._shrink(error)
                continue
            done += len(part)

        def features() -> NDArray[np.float32]:
            out = np.empty((len(patches), self.dim), np.float32)
            at = 0
            for finish in parts:
                values = finish().numpy()
                out[at : at + len(values)] = values
                at += len(values)
            return out

        return features

    def compile(self) -> None:
        """Compile the network at its first run (``torch.compile``): features differ by rounding."""
        self._model.compile()

    def _begin(self, patches: NDArray[np.uint8]) -> Callable[[], Tensor]:
        """Begin one batch; the function returned waits for its features, float32 on the CPU."""
        with torch.inference_mode():
            images = self._prepare(self._to_device(torch.from_numpy(np.ascontiguousarray(patches))))
            with self._precision():
                features = self._forward(images).float()
            if features.shape != (len(patches), self.dim):
                raise EncoderError(
                    f"Encoder {self.name} returns {list(features.shape[1:])} per patch where "
                    f"[{self.dim}] was expected.",
                    hint="Check that these are the weights of this model.",
                    code="bad_weights",
                )
            if self._copies is None:
                found = features.cpu()
                return lambda: found
            host = torch.empty(features.shape, pin_memory=True)
            host.copy_(features, non_blocking=True)
            done = torch.cuda.current_stream(self.device).record_event()

        def wait() -> Tensor:
            done.synchronize()
            return host

        return wait

    def _to_device(self, patches: Tensor) -> Tensor:
        """Copy patches to the device; on a GPU while what was begun before still computes.

        Pinning copies them, so the caller's memory is free at once. PyTorch gives neither the
        pinned block nor the GPU's to anyone else before the copy and the network have done with
        it: the first is its host allocator's work, the second ``record_stream``'s.
        """
        if self._copies is None:
            return patches.to(self.device)
        computing = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._copies):
            images = patches.pin_memory().to(self.device, non_blocking=True)
        computing.wait_stream(self._copies)
        images.record_stream(computing)
        return images

    def _prepare(self, patches: Tensor) -> Tensor:
        """uint8 [n, px, px, 3] on the device -> normalised float32 [n, 3, input_px, input_px].

        Images are resized in whole levels, 0 to 255. A GPU has no such kernel: floats are rounded
        there, and may be a level off the CPU's.
        """
        card = self._card
        images = patches.permute(0, 3, 1, 2)
        side = min(images.shape[2:])
        resize_px = card.resize_px or max(side, card.input_px)
        if side != resize_px:
            scale = resize_px / side
            size = [round(length * scale) for length in images.shape[2:]]
            if self.device.type != "cpu":
                images = images.float()
            images = F.interpolate(images, size, mode=card.interpolation, antialias=True)
            if self.device.type != "cpu":
                images = images.clamp_(0, 255).round_()
        top, left = ((length - card.input_px) // 2 for length in images.shape[2:])
        images = images[:, :, top : top + card.input_px, left : left + card.input_px]
        return self._normalise(images)

    def _normalise(self, images: Tensor) -> Tensor:
        """Levels [n, 3, h, w] -> float32, channels last; on a CPU looked up, of the same bits."""
        if self.device.type != "cpu":
            levels = images.to(torch.float32, memory_format=torch.channels_last, copy=True)
            return levels.div_(255).sub_(self._mean).div_(self._std)
        import cv2

        out = torch.empty(images.shape, memory_format=torch.channels_last)
        pixels, into = images.permute(0, 2, 3, 1).numpy(), out.permute(0, 2, 3, 1).numpy()
        for number, picture in enumerate(pixels):
            cv2.LUT(picture, self._levels, dst=into[number])
        return out

    def _precision(self) -> AbstractContextManager[Any]:
        if self.device.type == "cuda" and torch.cuda.is_bf16_supported():
            return torch.autocast("cuda", torch.bfloat16)
        return nullcontext()

    def _shrink(self, error: BaseException) -> None:
        if self.batch == 1:
            raise EncoderError(
                f"Encoder {self.name} runs out of memory on {self.device} with one patch.",
                hint="Free memory on the device, use a smaller encoder, or --device cpu.",
                code="out_of_memory",
            ) from error
        self.batch = max(1, self.batch // 2)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def load(spec: Spec, *, device: str = "auto") -> NeuralEncoder:
    """Load the encoder of a parsed spec; see ``pathflip.encoders.load_encoder``."""
    where = pick_device(device)
    source = sources.describe(spec, download=True)
    assert source.path is not None
    model, forward = build(source.card, source.path)
    return NeuralEncoder(
        info=source.info, card=source.card, model=model, forward=forward, device=where
    )


def pick_device(device: str) -> torch.device:
    """Return the torch device of ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        EncoderError: ``no_gpu`` when a GPU was asked for that torch does not see.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise EncoderError(
            f"There is no device {device!r}.", hint="Use auto, cpu, cuda or cuda:N.", code="no_gpu"
        ) from error
    if where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count():
        raise EncoderError(
            f"Device {device} was requested, but torch sees {torch.cuda.device_count()} GPUs.",
            hint="Use --device auto or cpu, or install the CUDA build of torch.",
            code="no_gpu",
        )
    return where


def build(card: zoo.Card, path: Path) -> tuple[nn.Module, Forward]:
    """Build a network from a folder of weights (a file for TorchScript).

    Raises:
        EncoderError: ``bad_weights``, ``missing_package``, ``remote_code``.
    """
    if card.loader == "torchscript":
        model = load_torchscript(path)
        return model, lambda images: pool(model(images), "model", prefix=0)
    if card.loader in ("transformers", "dinov2_registers", "clip"):
        model = _transformers(card, path)
        return model, _transformers_forward(card, model)
    if card.loader == "timm":
        model = _timm_filled(card, _read(path, card.name))
        prefix = int(getattr(model, "num_prefix_tokens", 1))
        return model, lambda images: pool(model(images), card.pooling, prefix=prefix)
    towers = {"conch": _conch, "conch_v1_5": _conch_v1_5, "keep": _keep, "musk": _musk}
    tower = towers[card.loader](path, card.name)
    return tower, tower


def pool(output: Tensor, pooling: zoo.Pooling, *, prefix: int) -> Tensor:
    """Pool a network's output to features [n, d].

    Args:
        output: Tokens [n, prefix + patches, d], or the pooled output itself for ``model``.
        pooling: See ``zoo.Card``.
        prefix: Number of tokens before the patch tokens: the class token and any register tokens.
    """
    if pooling == "model":
        return output
    if pooling == "cls":
        return output[:, 0]
    return torch.cat([output[:, 0], output[:, prefix:].mean(1)], 1)


def _timm_filled(card: zoo.Card, state: dict[str, Tensor]) -> Any:
    """Build a timm model around its weights, drawing none and copying none.

    A ViT-L draws 300 million numbers otherwise, only to overwrite them. A model that cannot be
    built without values, or has some that are not among the weights, is built with them.
    """
    arguments = {**card.arguments, "num_classes": 0}
    try:
        with torch.device("meta"):
            model = _timm(card.architecture, arguments, card.name)
        assign = all(name in state for name, tensor in _tensors(model) if tensor.is_meta)
    except (EncoderError, NotImplementedError, RuntimeError):
        assign = False
    if not assign:
        model = _timm(card.architecture, arguments, card.name)
    classifier = f"{model.default_cfg.get('classifier', 'head')}."
    state = {k: v for k, v in state.items() if not k.startswith(classifier)}
    if assign:
        kinds = {name: tensor.dtype for name, tensor in _tensors(model)}
        state = {k: v.to(kinds.get(k, v.dtype)) for k, v in state.items()}
    _fill(model, state, card.name, assign=assign)
    return model


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _timm(architecture: str, arguments: dict[str, Any], name: str) -> Any:
    try:
        import timm
        from timm.layers.mlp import SwiGLUPacked
    except (ImportError, RuntimeError) as error:  # a torchvision that does not fit torch: Runtime
        raise EncoderError(
            f"Encoder {name} needs timm, which cannot be imported here ({error}).",
            hint="timm needs a torchvision that fits torch: install both as the GPU lock file "
            "has them, or use an hf: model.",
            code="missing_package",
        ) from error
    classes: dict[str, Any] = {"SwiGLUPacked": SwiGLUPacked, "SiLU": nn.SiLU}
    ready = {k: classes.get(v, v) if isinstance(v, str) else v for k, v in arguments.items()}
    try:
        return timm.create_model(architecture, pretrained=False, **ready)
    except (RuntimeError, TypeError, ValueError) as error:
        raise bad_weights(name, f"timm cannot build {architecture} ({error})") from error


def _transformers(card: zoo.Card, folder: Path) -> nn.Module:
    try:
        import transformers
    except ImportError as error:
        raise EncoderError(
            f"Encoder {card.name} needs transformers.",
            hint="Install it: pip install 'pathflip[encoders]'.",
            code="missing_package",
        ) from error
    from safetensors import SafetensorError

    log: Any = transformers.utils.logging
    verbosity = log.get_verbosity()
    log.set_verbosity_error()  # it reports the text tower of a CLIP as unexpected
    try:
        kind: Any = transformers.AutoModel
        if card.loader == "dinov2_registers":  # config.json names code of the hub
            kind = transformers.Dinov2WithRegistersModel
            config: Any = transformers.Dinov2WithRegistersConfig(**card.arguments)
        else:
            config = transformers.AutoConfig.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
        if card.loader == "clip":
            kind = transformers.CLIPVisionModelWithProjection
            if hasattr(config, "vision_config"):  # of a whole CLIP, which alone knows the length
                config.vision_config.projection_dim = config.projection_dim
                config = config.vision_config
        model, report = kind.from_pretrained(
            str(folder),
            config=config,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        if "trust_remote_code" in str(error):
            raise EncoderError(
                f"Encoder {card.name} needs remote code, which pathflip does not run.",
                hint="Use a model whose architecture transformers has, or export it to "
                "TorchScript (docs/reference/encoders.md).",
                code="remote_code",
            ) from error
        raise bad_weights(card.name, str(error).splitlines()[0]) from error
    finally:
        log.set_verbosity(verbosity)
    absent = [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]
    absent = sorted(key for key in absent if not key.startswith("pooler."))
    if absent:
        raise bad_weights(
            card.name, f"{len(absent)} tensors are missing or misshapen, first {absent[0]}"
        )
    if card.loader == "dinov2_registers" and report["unexpected_keys"]:
        raise bad_weights(
            card.name, f"they hold tensors of another model, as {min(report['unexpected_keys'])}"
        )
    network: nn.Module = model
    return network


def _transformers_forward(card: zoo.Card, model: nn.Module) -> Forward:
    def forward(images: Tensor) -> Tensor:
        output = model(pixel_values=images)
        if card.loader == "clip":
            embeddings: Tensor = output.image_embeds
            return embeddings
        hidden: Tensor = output.last_hidden_state
        if hidden.ndim == 4:  # a convolutional network: no class token
            return hidden.mean((2, 3))
        return pool(hidden, card.pooling, prefix=1)

    return forward


class _AttentionPool(nn.Module):
    """Attention pooling of CONCH: one learned query attends to all tokens."""

    def __init__(self, dim: int, context: int, heads: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(1, dim))
        self.attn = nn.MultiheadAttention(dim, heads, kdim=context, vdim=context, batch_first=True)
        self.ln_q, self.ln_k = nn.LayerNorm(dim), nn.LayerNorm(context)

    def forward(self, tokens: Tensor) -> Tensor:
        """[n, tokens, context] -> [n, 1, dim]."""
        keys = self.ln_k(tokens)
        queries = self.ln_q(self.query).expand(len(tokens), -1, -1)
        out: Tensor = self.attn(queries, keys, keys, need_weights=False)[0]
        return out


class _PlainAttentionPool(nn.Module):
    """Attention pooling of CONCH v1.5: projections have no bias."""

    def __init__(self, dim: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.zeros(1, dim))
        self.ln_q, self.ln_k = nn.LayerNorm(dim), nn.LayerNorm(context)
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(context, 2 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """[n, tokens, context] -> [n, 1, dim]."""
        queries = self.to_q(self.ln_q(self.query)).expand(len(tokens), -1, -1)
        keys, values = self.to_kv(self.ln_k(tokens)).chunk(2, dim=-1)
        split = [x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in (queries, keys, values)]
        mixed = F.scaled_dot_product_attention(*split)
        out: Tensor = self.to_out(mixed.transpose(1, 2).flatten(2))
        return out


class _ConchTower(nn.Module):
    """Image tower of CONCH: a ViT, attention pooling, LayerNorm; not projected, not normalised."""

    def __init__(self, trunk: Any, pooling: nn.Module, dim: int) -> None:
        super().__init__()
        self.trunk, self.attn_pool_contrast = trunk, pooling
        self.ln_contrast = nn.LayerNorm(dim)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.trunk.forward_features(images)
        out: Tensor = self.ln_contrast(self.attn_pool_contrast(tokens)[:, 0])
        return out


def _conch(folder: Path, name: str) -> nn.Module:
    trunk = _timm("vit_base_patch16_224", {"img_size": 448, "num_classes": 0}, name)
    tower = _ConchTower(trunk, _AttentionPool(512, 768, 8), 512)
    state = _read(folder, name)
    # The checkpoint holds the whole vision-language model; only this tower is wanted.
    visual = {k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")}
    unused = ("attn_pool_caption.", "ln_caption.", "proj_contrast", "head.")
    _fill(tower, {k: v for k, v in visual.items() if not k.startswith(unused)}, name)
    return tower


def _conch_v1_5(folder: Path, name: str) -> nn.Module:
    arguments = {"img_size": 448, "init_values": 1.0, "num_classes": 0}
    trunk = _timm("vit_large_patch16_224", arguments, name)
    tower = _ConchTower(trunk, _PlainAttentionPool(768, 1024, 8), 768)
    state = _read(folder, name)
    if "trunk.pos_embed" in state:
        state["trunk.pos_embed"] = stretch_positions(state["trunk.pos_embed"], grid=28)
    _fill(tower, state, name)
    return tower


class _KeepTower(nn.Module):
    """Image tower of KEEP: a ViT and two linear layers, scaled to length 1."""

    def __init__(self, visual: Any, dim: int) -> None:
        super().__init__()
        self.visual = visual
        self.visual_head = nn.Sequential(
            nn.Linear(visual.num_features, dim), nn.GELU(), nn.Linear(dim, dim)
        )

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.visual_head(self.visual(images)), dim=-1)


def _keep(folder: Path, name: str) -> nn.Module:
    arguments = {"img_size": 224, "init_values": 1e-5, "num_classes": 0, "dynamic_img_size": True}
    tower = _KeepTower(_timm("vit_large_patch16_224", arguments, name), 768)
    state = _read(folder, name)
    # The checkpoint holds a text tower as well.
    wanted = ("visual.", "visual_head.")
    _fill(tower, {k: v for k, v in state.items() if k.startswith(wanted)}, name)
    return tower


def _musk(folder: Path, name: str) -> nn.Module:
    tower = musk.MuskTower()
    _fill(tower, musk.image_tower(_read(folder, name)), name)
    return tower


def stretch_positions(positions: Tensor, *, grid: int) -> Tensor:
    """Resample position embeddings [1, 1 + n², d] to another grid, as published CONCH v1.5 does.

    It stores any grid as 14 x 14 (bilinear) and stretches that (bicubic, with DINO's 0.1 added to
    the size), which is not quite what timm would do.
    """
    stored = 14
    cls, patches = positions[:, :1], positions[:, 1:]
    side = math.isqrt(patches.shape[1])
    image = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2).float()
    if side != stored:
        image = F.interpolate(image, (stored, stored), mode="bilinear", antialias=False)
    if grid != stored:
        factor = (grid + 0.1) / stored
        image = F.interpolate(image, scale_factor=(factor, factor), mode="bicubic")
    return torch.cat([cls.float(), image.permute(0, 2, 3, 1).flatten(1, 2)], 1)


def _read(folder: Path, name: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    state: dict[str, Tensor] = {}
    for file in safetensors_of(folder):
        try:
            state |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise bad_weights(name, f"{file.name} cannot be read ({error})") from error
    return state


def _fill(model: nn.Module, state: dict[str, Tensor], name: str, *, assign: bool = False) -> None:
    """Load a state dict that must fit exactly; with ``assign`` the model takes its tensors."""
    try:
        model.load_state_dict(state, strict=True, assign=assign)
    except RuntimeError as error:
        problem = " ".join(str(error).split())[:300]
        raise bad_weights(name, f"they do not fit the architecture ({problem})") from error
