"""A text tower whose weights stay as they are: same vectors, no gradient, each text once."""

from __future__ import annotations

import pytest
import torch

from pathflip.models import text_tower
from tests.unit.models.tiny import CAPTIONS, SUBCAPTIONS, batch, tiny

TEXTS = [*CAPTIONS, *(text for own in SUBCAPTIONS for text in own)]


def counted(model) -> list[int]:
    """Return a list that grows by the number of tokens whenever the tower runs."""
    seen: list[int] = []
    words = model.text_tower.bert.get_input_embeddings()
    words.register_forward_hook(lambda _, given, __: seen.append(len(given[0])))
    return seen


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("remembered", [0, 3, 100])
def test_vectors_are_the_same_and_texts_are_read_once(
    pooling: str, remembered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_tower, "REMEMBERED", remembered)
    model = tiny(text_pooling=pooling, dropout=0.5)
    expected = model.encode_text(TEXTS, normalize=False)
    model.text_tower.freeze()
    model.train()
    assert model.training
    assert not model.text_tower.training
    seen = counted(model)
    for part in (TEXTS[:2], TEXTS, TEXTS[::-1]):
        found = model.embed(part)
        assert torch.allclose(found, model.embed(part), atol=1e-6)
        rows = torch.stack([expected[TEXTS.index(text)] for text in part])
        assert torch.allclose(found, rows, atol=1e-5)
    whole = sum(len(ids) for ids in {tuple(i) for i in model.tokenizer(TEXTS)["input_ids"]})
    assert (sum(seen) == whole) == (remembered == 100)


def test_the_rest_trains() -> None:
    model = tiny(dropout=0.5).train()
    model.text_tower.freeze()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(**batch()).loss.backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == {name for name in before if name.startswith("text_tower.")}
    assert model.text_out.weight.grad.abs().sum() > 0
