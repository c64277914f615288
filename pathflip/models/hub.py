"""Models on disk and on the hub: config.json, model.safetensors, the tokenizer, a card.

A folder is read whole or refused by name of the file that is wrong; nothing in it is run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch

from pathflip.config import load_config
from pathflip.errors import CheckpointError, ConfigError
from pathflip.models.config import PathFLIPConfig, TextConfig
from pathflip.models.mrplip_config import MRPLIPConfig
from pathflip.models.text_tower import load_text_model
from pathflip.models.tokenizer import BERTS, PLAIN, SETTINGS, TOKENIZER, TextTokenizer

if TYPE_CHECKING:
    from pathflip.models.mrplip import MRPLIP
    from pathflip.models.pathflip import PathFLIP

    Model: TypeAlias = "PathFLIP | MRPLIP"

CONFIG, WEIGHTS = "config.json", "model.safetensors"
C = TypeVar("C", bound=TextConfig)


@dataclass(frozen=True, kw_only=True)
class Family:
    """A class of models that folders hold.

    Attributes:
        name: Name of the class.
        config: Type of its configuration.
        title: Its name in prose.
        tags: Tags of its card, beside pathology.
        reads: Sentence of its card on inputs and space; {feature_dim} and {d} are filled in.
    """

    name: str
    config: type[TextConfig]
    title: str
    tags: str
    reads: str


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "pathflip": Family(
            name="PathFLIP",
            config=PathFLIPConfig,
            title="PathFLIP",
            tags="whole-slide-image, contrastive",
            reads="Slides (patch features {feature_dim} wide) and captions in one space of {d} "
            "dimensions.",
        ),
        "mrplip": Family(
            name="MRPLIP",
            config=MRPLIPConfig,
            title="MR-PLIP",
            tags="patches, multi-resolution, contrastive",
            reads="Patches of four resolutions (features {feature_dim} wide) and texts in one "
            "space of {d} dimensions.",
        ),
    }
)
"""Families by the ``model_type`` of their config.json."""


def model_type(config: TextConfig | type[TextConfig]) -> str:
    """Return the ``model_type`` of a configuration."""
    kind = config if isinstance(config, type) else type(config)
    return next(name for name, family in FAMILIES.items() if family.config is kind)


def save(model: Model, folder: Path) -> None:
    """Write a model into a folder; README.md only where there is none."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    kind = model_type(model.config)
    about: dict[str, Any] = {"model_type": kind, kind: asdict(model.config)}
    if model.text_tower is not None:
        about["text_config"] = model.text_tower.text_config()
    (folder / CONFIG).write_text(json.dumps(about, indent=1, sort_keys=True) + "\n")
    tensors = {
        name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    backend = getattr(model.tokenizer, "backend_tokenizer", None)
    if backend is not None:  # it keeps how texts were last cut, which is none of its own
        backend.no_truncation()
        backend.no_padding()
    model.tokenizer.save_pretrained(str(folder))
    if not (folder / "README.md").exists():
        (folder / "README.md").write_text(_card(model))


def find(source: str | Path) -> Path:
    """Return the local folder of a model, downloading it where it is on the hub.

    Raises:
        CheckpointError: It is in neither place.
    """
    path = Path(source)
    if path.is_dir():
        return path
    text = str(source)
    if path.is_absolute() or text.count("/") != 1 or text.startswith("."):
        raise CheckpointError(
            f"There is no model folder {source}.", hint="Give the folder that holds config.json."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = ["*.json", "*.txt", "*.jinja", "*.safetensors"]
        return Path(snapshot_download(text, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{text} is no local folder, and the hub lookup failed: {str(error).splitlines()[0]}",
            hint="Check the name, the network and hf auth login.",
        ) from error


def folder_name(folder: Path) -> str:
    """Return the name of a model's folder; of one in a cache of the hub, its repository's."""
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.rpartition("--")[2]
    return folder.name


def read_config(folder: Path, kind: type[C]) -> tuple[C, dict[str, Any] | None]:
    """Return a model's configuration and that of its text tower.

    Args:
        folder: Folder of the model.
        kind: Type of configuration it must have.

    Raises:
        CheckpointError: config.json is missing, not one of ours or of another family
            (``model_type``).
    """
    path = _present(folder, CONFIG)
    wanted = model_type(kind)
    try:
        about = json.loads(path.read_text())
        found = about.get("model_type")
        if found != wanted and found in FAMILIES:
            raise CheckpointError(
                f"{folder} holds a model of {FAMILIES[found].title}, not of "
                f"{FAMILIES[wanted].title}.",
                hint=f"Open it with pathflip.models.{FAMILIES[found].name}.",
                code="model_type",
            )
        return load_config(kind, given=about[wanted]), about.get("text_config")
    except (ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        what = error.message if isinstance(error, ConfigError) else repr(error)
        raise CheckpointError(
            f"{path} does not describe a model of this version of pathflip: {what}",
            hint="Export the model again, or install the version that wrote it.",
        ) from error


def read_tokenizer(folder: Path, *, texts: bool = False) -> Any:
    """Return a model's tokenizer.

    Args:
        folder: Folder of the model.
        texts: Whether it cuts texts and no more (:class:`~pathflip.models.tokenizer.TextTokenizer`
            where that does it); otherwise it is that of ``transformers``, with its chat template.

    Raises:
        CheckpointError: A file of it is missing or damaged.
    """
    if not (folder / "vocab.txt").exists():
        _present(folder, TOKENIZER)
    settings = _present(folder, SETTINGS)
    try:
        kind = json.loads(settings.read_text()).get("tokenizer_class", "")
        plain = kind in PLAIN
        if texts and (plain or (kind in BERTS and (folder / TOKENIZER).exists())):
            return TextTokenizer(folder)
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        loader = PreTrainedTokenizerFast if plain else AutoTokenizer
        return loader.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception on damaged files
        raise CheckpointError(
            f"The tokenizer in {folder} cannot be read: {str(error).splitlines()[0]}",
            hint=f"Copy {TOKENIZER} and {SETTINGS} again.",
        ) from error


def read_weights(model: Model, folder: Path) -> None:
    """Fill a model with the weights of a folder.

    Raises:
        CheckpointError: model.safetensors is missing, damaged or of another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = _present(folder, WEIGHTS)
    try:
        found = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged: {str(error).splitlines()[0]}", hint="Copy it again."
        ) from error
    wanted = model.state_dict()
    problems = [f"{name} is missing" for name in sorted(set(wanted) - set(found))]
    problems += [f"{name} is not of this model" for name in sorted(set(found) - set(wanted))]
    problems += [
        f"{name} is {tuple(found[name].shape)}, not {tuple(value.shape)}"
        for name, value in sorted(wanted.items())
        if name in found and found[name].shape != value.shape
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise CheckpointError(
            f"{path} does not fit {folder / CONFIG}: {problems[0]}{more}.",
            hint="Both files must be written by the same save_pretrained.",
        )
    model.load_state_dict(found)


def fingerprint(model: Model) -> str:
    """Return hex SHA-256 of a model's configuration, vocabulary and weights."""
    digest = hashlib.sha256()
    vocabulary = sorted(model.tokenizer.get_vocab().items())
    settings = asdict(model.config)
    del settings["recompute"]  # memory for time: nothing that comes out depends on it
    digest.update(json.dumps([settings, vocabulary], sort_keys=True).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        flat = value.detach().cpu().contiguous().view(-1)
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def push(model: Model, name: str, *, private: bool, token: str | None) -> str:
    """Upload a model and return its address."""
    import tempfile

    from huggingface_hub import HfApi

    api = HfApi(token=token)
    address = str(api.create_repo(name, private=private, exist_ok=True))
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder))
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload model")
    return address


@torch.no_grad()
def start_from_bert(model: PathFLIP, source: str) -> None:
    """Initialise the Q-Former from a BERT: attention, feed-forward for queries and text.

    Cross-attention stays as it was drawn, as in BLIP-2.

    Raises:
        ConfigError: The two have different sizes.
    """
    bert = getattr(model.text_tower, "bert", None) or load_text_model(source)
    about = bert.config
    if about.model_type != "bert":
        raise ConfigError(
            f"The Q-Former cannot be initialised from {source}, a {about.model_type}, not a BERT.",
            hint="Set model.qformer_from_text=false.",
        )
    config = model.config
    theirs = (about.hidden_size, about.num_attention_heads, about.intermediate_size)
    mine = (config.hidden, config.heads, config.ffn)
    if theirs != mine or about.num_hidden_layers < config.layers:
        raise ConfigError(
            f"The Q-Former cannot be initialised from {source}: hidden, heads, ffn are {theirs} in "
            f"{about.num_hidden_layers} layers, the model's {mine} in {config.layers}.",
            hint="Set model.qformer_from_text=false, or the sizes of the text model.",
        )
    qformer = model.qformer
    embed = bert.embeddings
    qformer.norm.load_state_dict(embed.LayerNorm.state_dict())
    if model.text_tower is None:
        rows = min(len(embed.word_embeddings.weight), len(qformer.words.weight))
        qformer.words.weight[:rows] = embed.word_embeddings.weight[:rows]
        places = min(len(embed.position_embeddings.weight), len(qformer.positions.weight))
        qformer.positions.weight[:places] = embed.position_embeddings.weight[:places]
    layers: Any = zip(qformer.layers, bert.encoder.layer, strict=False)
    for layer, old in layers:
        own = old.attention.self
        for name in ("query", "key", "value"):
            getattr(layer.attention, name).load_state_dict(getattr(own, name).state_dict())
        layer.attention.out.load_state_dict(old.attention.output.dense.state_dict())
        layer.attention.norm.load_state_dict(old.attention.output.LayerNorm.state_dict())
        for block in (layer.ffn_query, layer.ffn_text):
            if block is not None:
                block.up.load_state_dict(old.intermediate.dense.state_dict())
                block.down.load_state_dict(old.output.dense.state_dict())
                block.norm.load_state_dict(old.output.LayerNorm.state_dict())


def _present(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.is_file():
        inner = [str(file.parent) for file in folder.glob(f"*/{name}")]
        raise CheckpointError(
            f"{folder} lacks {name}.",
            hint=f"Did you mean {inner[0]}?" if inner else "It is not a whole model folder.",
        )
    return path


def _card(model: Model) -> str:
    config = model.config
    family = FAMILIES[model_type(config)]
    return "\n".join(
        [
            "---", "library_name: pathflip", f"tags: [pathology, {family.tags}]",
            "---", "",
            f"# {family.title}", "",
            family.reads.format(feature_dim=config.feature_dim, d=config.d), "",
            "```python", f"from pathflip.models import {family.name}",
            f'model = {family.name}.from_pretrained("<this folder>")', "```", "",
            f"Fingerprint `{model.fingerprint()}`. For research; not a medical device.", "",
        ]
    )  # fmt: skip
