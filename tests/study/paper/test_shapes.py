"""Costs on the paper's models against tables made by another script, to one decimal."""

from __future__ import annotations

import pytest

from informed_routing.study.paper.shapes import SHAPES, STATIC, _static_row, routed_costs
from informed_routing.study.tables import Row

LLAMA = SHAPES["Llama-3.1-8B"]


@pytest.mark.parametrize(
    ("method", "sparsity", "attention", "ffn", "gross", "net", "net_long"),
    [
        ("informed", 0.25, 35.7, 14.3, 17.7, 14.6, 22.1),
        ("skipgpt", 0.25, 29.0, 21.0, 21.7, 18.0, 21.9),
        ("skipgpt-linear", 0.25, 29.0, 21.0, 21.7, 21.7, 24.3),
        ("informed-low-rank", 0.25, 35.7, 14.3, 17.7, 17.5, 24.0),
        ("informed", 0.40, 53.8, 26.2, 30.4, 27.1, 36.6),
        ("skipgpt", 0.40, 46.2, 33.8, 34.8, 31.1, 36.5),
        ("informed", 0.70, 92.7, 47.3, 54.0, 50.5, 65.6),
    ],
)
def test_routed_methods_on_llama_8b(
    method: str, sparsity: float, attention: float, ffn: float, gross: float, net: float, net_long: float
) -> None:
    found = routed_costs(LLAMA, method, sparsity)
    assert found["attention"] == pytest.approx(attention, abs=0.051)
    assert found["ffn"] == pytest.approx(ffn, abs=0.051)
    assert found["gross_2048"] == pytest.approx(gross, abs=0.051)
    assert found["net_2048"] == pytest.approx(net, abs=0.051)
    assert found["net_32768"] == pytest.approx(net_long, abs=0.051)


@pytest.mark.parametrize(("method", "millions"), [("informed", 268.54), ("skipgpt", 268.56), ("skipgpt-linear", 0.524)])
def test_added_weights_are_those_that_the_paper_counts(method: str, millions: float) -> None:
    """Which rounds SkipGPT's 268.567 down."""
    assert routed_costs(LLAMA, method, 0.25)["added"] / 1e6 == pytest.approx(millions, abs=0.01)


def test_evicted_keys_cost_no_projections() -> None:
    """D-LLM saves what depth pruning does, but for its routers."""
    found = routed_costs(LLAMA, "d-llm", 0.25)
    assert found["gross_2048"] == pytest.approx(25.0, abs=0.01)
    assert found["net_2048"] == pytest.approx(25.0 - 100 * (4096 * 512 + 1024) / 226_492_416, abs=0.05)


def cells(row: Row) -> dict[str, float]:
    return {key: content.value for key, content in row.cells.items() if not isinstance(content, (str, type(None)))}


def test_static_methods_on_both_shapes() -> None:
    depth = cells(_static_row(LLAMA, "shortgpt", 0.25))
    assert depth["net_2048"] == depth["net_32768"] == depth["kv"] == 25.0
    assert depth["parameters"] == pytest.approx(21.7, abs=0.051)
    for shape, sparsity, total, body in (
        ("Llama-3.1-8B", 0.25, 15.6, 16.1),
        ("Llama-3.1-8B", 0.40, 32.3, 34.1),
        ("Llama-3.2-3B", 0.25, 3.2, 14.2),
        ("Llama-3.2-3B", 0.40, 21.6, 32.9),
    ):
        sliced = cells(_static_row(SHAPES[shape], "slicegpt", sparsity))
        assert sliced["parameters"] == pytest.approx(total, abs=0.051)
        assert sliced["body_parameters"] == pytest.approx(body, abs=0.051)
        assert sliced["kv"] == 0.0


def test_a_share_of_the_body_is_what_it_says() -> None:
    found = cells(_static_row(LLAMA, "slicegpt-body", 0.25))
    assert 25.0 <= found["body_parameters"] < 25.3
    assert set(STATIC) == {"shortgpt", "llm-drop-attention", "slicegpt", "slicegpt-body"}
