"""Half-precision factors: a setting of torch for a while, and what the native engine does with bfloat16 weights."""

from __future__ import annotations

import pytest
import torch
from tests.routed import make_routed
from tests.tiny import random_ids

from informed_routing.evaluation.perplexity import token_perplexity
from informed_routing.evaluation.precision import factors_in
from informed_routing.execution.cpu import build
from informed_routing.routing.decision import Threshold


def test_the_setting_of_torch_is_put_back() -> None:
    products = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = products.fp32_precision

    def fail() -> None:
        with factors_in("bfloat16"):
            assert products.fp32_precision == "bf16"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert products.fp32_precision == before
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    with factors_in("float32"):
        exact = x @ x
    torch.testing.assert_close(exact, (x.double() @ x.double()).float(), atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")
def test_torch_and_the_native_engine_round_the_same_factors() -> None:
    model = make_routed("llama")
    model.set_decision(Threshold(0.0))
    rows = random_ids(4, 64)
    with factors_in("bfloat16"):
        by_torch = token_perplexity(model, rows).loss
        model.set_execution("native", weights="bfloat16", policy="exact")
        assert token_perplexity(model, rows).loss == pytest.approx(by_torch, rel=5e-3)
