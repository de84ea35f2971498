"""Logits are the base model's, with the scaling of its family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.tiny import FAMILIES, make_tiny, random_ids

from informed_routing.evaluation import perplexity
from informed_routing.models.families import FAMILIES as TABLE
from informed_routing.models.head import PLAIN, LogitScaling, base_logits, lm_head, logit_scaling

EVERY = (*FAMILIES, "olmo3", "granite")
_CAPPED = {"final_logit_softcapping": 3.0}
SCALED: dict[str, dict[str, Any]] = {"gemma2": _CAPPED, "gemma3_text": _CAPPED, "granite": {"logits_scaling": 4.0}}


@pytest.mark.parametrize("name", EVERY)
def test_heads_give_the_models_own_logits(name: str) -> None:
    model = make_tiny(name, **SCALED.get(name, {}))
    with torch.no_grad():
        hidden = model.model(random_ids(1, 6)).last_hidden_state[0]
        wanted = model(random_ids(1, 6)).logits[0]
        torch.testing.assert_close(lm_head(model)(hidden), wanted)
        torch.testing.assert_close(base_logits(model, hidden), wanted)
    assert (logit_scaling(TABLE[name], model.config) == PLAIN) == (name not in SCALED)


def test_losses_are_made_in_float32_and_logits_in_the_models_dtype() -> None:
    model = make_tiny("gemma2", final_logit_softcapping=3.0).bfloat16()
    hidden = torch.randn(2, 64).bfloat16()
    assert lm_head(model)(hidden).dtype == torch.float32
    assert base_logits(model, hidden).dtype == torch.bfloat16


def test_division_comes_before_the_cap() -> None:
    logits = torch.tensor([-8.0, 0.0, 8.0])
    torch.testing.assert_close(LogitScaling(2.0, 3.0)(logits), 3 * torch.tanh(logits / 6))
    assert torch.equal(PLAIN(logits), logits)


def test_a_family_that_is_not_in_the_table_has_the_head_that_its_code_says() -> None:
    model = make_tiny("llama")
    model.config.model_type = "bloom"
    assert lm_head(model).scaling == PLAIN  # its code is that of a family in the table
    hidden = torch.randn(2, 64)
    assert torch.equal(base_logits(model, hidden), model.lm_head(hidden))


@pytest.mark.parametrize("name", ["gemma2", "granite"])
def test_perplexity_uses_the_scaled_head(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known families never need all logits at once."""
    model = make_tiny(name, **SCALED[name])
    rows, linear = [], model.lm_head.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        rows.append(x.shape[-2])
        return linear(x)

    monkeypatch.setattr(model.lm_head, "forward", forward)
    monkeypatch.setattr(perplexity, "HEAD_ROWS", 7)
    perplexity.token_perplexity(model, random_ids(2, 20), batch_size=2)
    assert max(rows) <= 7
