"""Tokens a second of vLLM as this package starts it, and bare: part of ``tests.bench.gpu``.

Both answer the same prompts of a random language model, each in a process of its own: ours is given
embeddings, as the answers about slides are made, bare vLLM the tokens that they stand for, with its
own settings but for those that bound memory. Decoding is greedy and never ends early.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.bench.card import Bench, Report
from tests.bench.gpu_beside_cpu import random_llm

CONTEXT = 1024


def vllm(bench: Bench) -> Report:
    """Time both engines; a note says so where vLLM is not installed."""
    if find_spec("vllm") is None:
        return {"note": "not installed: vllm"}
    llm, tokenizer = random_llm(bench)
    folder = bench.folder / "llm"
    llm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del llm
    if bench.device == "cuda":
        import torch

        torch.cuda.empty_cache()
    given = {"folder": str(folder), "prompts": 8, "length": 64, "tokens": 16}
    if not bench.quick:
        given |= {"prompts": 512, "length": 448, "tokens": 128}
    report: Report = {name: given[name] for name in ("prompts", "length", "tokens")}
    both = ["ours", "bare"]
    for sides in [both] if bench.quick else [[side] for side in both]:  # a card holds one
        made = subprocess.run(
            [sys.executable, "-m", __name__, json.dumps([given | {"side": one} for one in sides])],
            stdout=subprocess.PIPE, text=True, check=True, timeout=max(1.0, bench.left),
        )  # fmt: skip
        report |= zip(sides, json.loads(made.stdout.splitlines()[-1]), strict=True)
    report["over_bare"] = report["ours"]["tokens_per_s"] / report["bare"]["tokens_per_s"]
    return report


def work(folder: str, side: str, prompts: int, length: int, tokens: int) -> Report:
    """Start an engine, warm it, and time the prompts."""
    import torch
    from safetensors.torch import load_file

    from pathflip.vllm_engine import EngineConfig, import_vllm, offline, set_environment

    cuda = torch.cuda.is_available()
    words = load_file(Path(folder) / "model.safetensors")["model.embed_tokens.weight"]
    draws = torch.Generator().manual_seed(0)
    rows = torch.randint(200, (prompts + 4, length), generator=draws)
    config = EngineConfig(max_model_len=CONTEXT)
    asked: list[Any]
    if side == "ours":
        engine = offline(folder, config)
        own = torch.bfloat16 if cuda else torch.float32
        asked = [{"prompt_embeds": words[row].to(own)} for row in rows]
    else:
        if not cuda:  # a shared CPU cannot do without
            set_environment(config)
        alike = {"max_model_len": CONTEXT, "gpu_memory_utilization": config.gpu_memory_utilization}
        here = {"dtype": "bfloat16"} if cuda else {"dtype": "float32", "enforce_eager": True}
        engine = import_vllm().LLM(folder, **alike, **here)
        asked = [{"prompt_token_ids": row.tolist()} for row in rows]
    from vllm import SamplingParams

    settings = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    engine.generate(asked[:4], settings, use_tqdm=False)
    began = time.perf_counter()
    made = engine.generate(asked[4:], settings, use_tqdm=False)
    seconds = time.perf_counter() - began
    count = sum(len(one.outputs[0].token_ids) for one in made)
    return {"tokens_per_s": count / seconds, "tokens": count, "used_gib": _used() if cuda else None}


def _used() -> float:
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", "0"]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / 1024


if __name__ == "__main__":
    out = os.dup(1)
    os.dup2(2, 1)  # whatever an engine prints
    found = [work(**one) for one in json.loads(sys.argv[1])]
    os.write(out, (json.dumps(found) + "\n").encode())
