"""A tiny vision-language model: BLIP-2 with random weights, in transformers' format.

It is one of the families that vLLM imports without torchvision. Its head is zero at special
tokens, so that it never ends by itself: what it says is nonsense, and the same every time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pathflip.captioner import TEMPLATES
from pathflip.interop.tree_captions import PROMPT
from pathflip.text import train_tokenizer

POSITIONS = 256
"""Tokens of a prompt and its answer."""
_TEXTS = (
    PROMPT,
    "Question Answer the nuclei are small and the stroma is pink",
    "glands with mucin nests of cells in fibrous stroma",
)


def make_blip2(folder: Path, *, scale: float = 10.0) -> Path:
    """Write a model of about 170,000 weights and return its folder.

    Args:
        folder: Folder of the model; made if it does not exist.
        scale: Factor on the weights of what sees, so that images matter to what is said.
    """
    import transformers

    make: Any = transformers
    tokenizer = train_tokenizer(_TEXTS, vocab_size=300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.bos_token, tokenizer.eos_token = "[CLS]", "[SEP]"
    processor = make.Blip2Processor(
        image_processor=make.BlipImageProcessorPil(size={"height": 56, "width": 56}),
        tokenizer=tokenizer,
        num_query_tokens=4,
    )
    words = -(-len(tokenizer) // 64) * 64
    vision = make.Blip2VisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        image_size=56, patch_size=14,
    )  # fmt: skip
    former = make.Blip2QFormerConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        encoder_hidden_size=32, vocab_size=words,
    )  # fmt: skip
    text = make.OPTConfig(
        vocab_size=words, hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=2,
        word_embed_proj_dim=64, max_position_embeddings=POSITIONS, pad_token_id=0, bos_token_id=2,
        eos_token_id=3, tie_word_embeddings=False,
    )  # fmt: skip
    config = make.Blip2Config(
        vision_config=vision.to_dict(), qformer_config=former.to_dict(), text_config=text.to_dict(),
        num_query_tokens=4, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = make.Blip2ForConditionalGeneration(config).eval()
        model.get_input_embeddings().weight.mul_(20)
        head = model.get_output_embeddings().weight
        head[:5] = head[len(tokenizer) - 1 :] = 0
        for name, weight in model.named_parameters():
            if name.startswith(("vision_model", "qformer")) and weight.dim() > 1:
                weight.mul_(scale)
        model.language_projection.weight.mul_(40)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def said_by_transformers(folder: Path, images: list[Any], *, max_new_tokens: int) -> list[str]:
    """Return what transformers generates greedily, one image at a time."""
    import transformers

    make: Any = transformers
    processor = make.Blip2Processor.from_pretrained(folder)
    model = make.Blip2ForConditionalGeneration.from_pretrained(folder).eval()
    told = []
    for image in images:
        given = processor(
            images=image, text=TEMPLATES["blip-2"].format(PROMPT), return_tensors="pt"
        )
        with torch.no_grad():
            ids = model.generate(**given, do_sample=False, max_new_tokens=max_new_tokens)[0]
        new = ids[given["input_ids"].shape[1] :] if len(ids) > max_new_tokens else ids
        told.append(processor.tokenizer.decode(new, skip_special_tokens=True).strip())
    return told
