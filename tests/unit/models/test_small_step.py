"""The small language model's loss and gradients: those of transformers, row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from pathflip.models.small_step import Row, pack, packed_loss

LENGTHS = [(3, 2, 4, 5), (1, 7, 1, 1), (2, 1, 9, 30), (5, 5, 5, 17), (1, 1, 1, 2), (4, 3, 2, 12)]
"""Tokens before, regions, tokens after and answer of each row: one more than fill a group."""


@pytest.fixture(scope="module", params=[2, 4], ids=["shared keys", "a key a query"])
def llm(request: pytest.FixtureRequest) -> Any:
    """A Qwen3 with norms that are not one, as after training."""
    kinds: Any = (Qwen3Config, Qwen3ForCausalLM)
    config_of, model_of = kinds
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_of(
            config_of(
                vocab_size=64,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=request.param,
                head_dim=16,
                tie_word_embeddings=True,
                initializer_range=0.15,
                rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            )
        )
        for own in model.parameters():
            if own.ndim == 1:
                torch.nn.init.normal_(own, 1.0, 0.2)
    return model


def drawn() -> list[Row]:
    generator = torch.Generator().manual_seed(1)

    def ids(count: int) -> list[int]:
        return torch.randint(64, (count,), generator=generator).tolist()

    return [
        Row(
            before=ids(before),
            regions=torch.randn(regions, 32, generator=generator, requires_grad=True),
            after=ids(after),
            answer=ids(answer),
        )
        for before, regions, after, answer in LENGTHS
    ]


def one_by_one(llm: Any, rows: list[Row]) -> Tensor:
    """Compute the loss with transformers' own modules, each row alone."""
    table = llm.get_input_embeddings().weight
    losses = []
    for row in rows:
        tail = torch.tensor([*row.after, *row.answer[:-1]])
        read = torch.cat([table[torch.tensor(row.before)], row.regions, table[tail]])
        logits = llm(inputs_embeds=read[None]).logits[0, -len(row.answer) :]
        losses.append(F.cross_entropy(logits, torch.tensor(row.answer), reduction="sum"))
    return torch.stack(losses).sum()


def gradients(llm: Any, rows: list[Row], loss: Tensor) -> list[Tensor]:
    wanted = [*llm.parameters(), *(row.regions for row in rows)]
    return list(torch.autograd.grad(loss, wanted))


def test_loss_and_gradients_are_those_of_transformers(llm: Any) -> None:
    rows = drawn()
    packed = pack(llm.get_input_embeddings().weight, rows)
    wanted, found = one_by_one(llm, rows), packed_loss(llm, packed)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    pairs = zip(gradients(llm, rows, found), gradients(llm, rows, wanted), strict=True)
    assert max(float((ours - theirs).norm() / theirs.norm()) for ours, theirs in pairs) < 5e-6


def test_products_in_bfloat16_change_little(llm: Any) -> None:
    """Eight bits of mantissa are 0.4 %: losses move by far less, gradients by a few per cent."""
    rows = drawn()
    table = llm.get_input_embeddings().weight
    wanted = packed_loss(llm, pack(table, rows))
    found = packed_loss(llm, pack(table, rows), torch.bfloat16)
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=0)
    ours, theirs = (
        torch.cat([own.flatten() for own in gradients(llm, rows, loss)]) for loss in (found, wanted)
    )
    assert float((ours - theirs).norm() / theirs.norm()) < 0.05


def test_rows_have_few_different_shapes(llm: Any) -> None:
    """Every new shape of a product in bfloat16 costs the time of some."""
    packed = pack(llm.get_input_embeddings().weight, drawn())
    assert [rows for rows, _ in packed.groups] == [4, 2]
    assert all(length % 16 == 0 for _, length in packed.groups)
    assert len(packed.states) == sum(rows * length for rows, length in packed.groups)
    assert len(packed.places) == len(packed.wanted) == 128
    assert int((packed.wanted >= 0).sum()) == sum(answer for *_, answer in LENGTHS)
