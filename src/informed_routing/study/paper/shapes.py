"""Parameters and arithmetic of every baseline on the shapes that the paper prunes, without weights (`study shapes`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import LlamaConfig

from ...baselines.footprint import footprint
from ...baselines.shapes import SlicedShapes, empty_model
from ...baselines.static import shape_report
from ...config.parts import KINDS, ForecasterConfig, RouterConfig, SelectionConfig
from ...models.discover import family_of
from ...routing.costs import UnitCost, unit_costs
from ...routing.routed_unit import RoutedUnit
from ...routing.target import BudgetMeter
from ..results import Value
from ..tables import Block, Column, Row, Table

_COMMON: dict[str, Any] = {"vocab_size": 128_256, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5}
SHAPES: dict[str, LlamaConfig] = {
    "Llama-3.1-8B": LlamaConfig(
        hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32, **_COMMON
    ),
    "Llama-3.2-3B": LlamaConfig(
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        tie_word_embeddings=True,
        **_COMMON,
    ),
}
CONTEXTS = (2048, 32_768)


@dataclass(frozen=True)
class RoutedShape:
    """A routed method by its parts. `attention_part` is attention's among all approximated units, by sparsity."""

    label: str
    router: RouterConfig
    attention_part: dict[float, float]
    fallback: Literal["forecaster", "zero"] = "zero"
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    kv: Literal["keep", "drop"] = "keep"


_INFORMED = {0.25: 0.714, 0.40: 0.672, 0.70: 0.662}
_SKIPGPT = {0.25: 0.580, 0.40: 0.578, 0.70: 0.564}
_EQUAL = dict.fromkeys(_INFORMED, 0.5)
_MLP, _LOW_RANK, _LINEAR = (
    RouterConfig(kind="mlp"),
    RouterConfig(kind="low-rank", width=16),
    RouterConfig(kind="linear"),
)
_RANKING, _NORMED = RouterConfig(kind="ranking"), RouterConfig(kind="normed-mlp", width=512, input="layer")

ROUTED = {
    "informed": RoutedShape("Informed routing, MLP router", _MLP, _INFORMED, "forecaster"),
    "informed-low-rank": RoutedShape("Informed routing, rank-16 router", _LOW_RANK, _INFORMED, "forecaster"),
    "skipgpt": RoutedShape("SkipGPT, MLP router", _MLP, _SKIPGPT),
    "skipgpt-linear": RoutedShape("SkipGPT, linear router", _LINEAR, _SKIPGPT),
    "mod": RoutedShape("MoD by unit", _RANKING, _EQUAL, selection=SelectionConfig(decision="top-k")),
    "d-llm": RoutedShape("D-LLM", _NORMED, _EQUAL, selection=SelectionConfig(granularity="layer"), kv="drop"),
}
"""Forecasters have rank 100, MLP routers the paper's widths. Parts are those of the paper's Table 2, or equal by
construction. D-LLM's two layers without routers are left out of account."""

STATIC: dict[str, tuple[str, str, dict[str, Any]]] = {
    "shortgpt": ("ShortGPT, Shortened-LLaMA", "shortgpt", {}),
    "llm-drop-attention": ("LLM-Drop, attention only", "llm-drop-attention", {}),
    "slicegpt": ("SliceGPT, share of the width", "slicegpt", {"measure": "slice"}),
    "slicegpt-body": ("SliceGPT, share of the body's parameters", "slicegpt", {"measure": "body"}),
}


def routed_costs(config: LlamaConfig, method: str, sparsity: float) -> dict[str, float]:
    """Shares in per cent and added parameters of a routed method that approximates a share of the units.

    `gross_N` and `net_N` are MACs of the body saved at a prompt of N tokens, without and with routers and forecasts.
    Attention and FFN are approximated in the proportion that the paper reports.
    """
    shape = ROUTED[method]
    costs, weights = _unit_costs(config, shape)
    part = shape.attention_part[sparsity]
    shares = {"attention": 2 * sparsity * part, "ffn": 2 * sparsity * (1 - part)}
    approximated = torch.tensor([shares[kind] for kind in KINDS])
    found: dict[str, float] = {
        "attention": 100 * shares["attention"],
        "ffn": 100 * shares["ffn"],
        "added": float(weights * config.num_hidden_layers),
    }
    for tokens in CONTEXTS:
        context = (tokens + 1) / 2
        meter = BudgetMeter(costs, KINDS, "macs", context, kv=shape.kv)
        forecasts = sum(float(a) * cost.forecaster for a, cost in zip(approximated, costs, strict=True))
        net = float(meter.saved(approximated))
        overhead = meter.overhead + forecasts / sum(cost.dense(context) for cost in costs)
        found |= {f"net_{tokens}": 100 * net, f"gross_{tokens}": 100 * (net + overhead)}
    return found


def _unit_costs(config: LlamaConfig, shape: RoutedShape) -> tuple[list[UnitCost], int]:
    """Costs of the two units of one layer, which stand for those of all, and the weights that routing adds to them."""
    model = empty_model(config)
    layers, family = model.model.layers, family_of(model)
    forecaster = ForecasterConfig(rank=100, fallback=shape.fallback)
    with torch.device("meta"):
        units = [
            RoutedUnit(place, kind, family, layers[0], config.hidden_size, forecaster, shape.router, shape.selection)
            for place, kind in enumerate(KINDS)
        ]
    added = sum(p.numel() for unit in units for name, p in unit.named_parameters() if name.endswith("weight"))
    return unit_costs(layers, units), added


def shape_table() -> Table:
    """All methods on both shapes at 25 and 40 % (routed ones also at 70 %)."""
    columns = (
        Column("attention", "attention %", digits=1),
        Column("ffn", "FFN %", digits=1),
        Column("parameters", "parameters saved %", digits=1),
        Column("body_parameters", "body's %", digits=1),
        Column("added", "added, M", digits=2),
        *(
            Column(f"{kind}_{tokens}", f"{title} {tokens // 1024}k", digits=1)
            for tokens in CONTEXTS
            for kind, title in (("gross", "MACs saved % without routers,"), ("net", "MACs saved %,"))
        ),
        Column("kv", "KV saved %", digits=1),
    )
    blocks = []
    for name, config in SHAPES.items():
        dense = footprint(empty_model(config), 1)
        for sparsity in (0.25, 0.40, 0.70):
            rows = [_routed_row(config, method, sparsity, dense.parameters) for method in ROUTED]
            if sparsity < 0.70:
                rows += [_static_row(config, method, sparsity) for method in STATIC]
            blocks.append(Block(f"{name}, {100 * sparsity:g} %", tuple(rows), name, sparsity))
    note = (
        "Shares of attention and FFN approximated by routed methods are those of the paper's Table 2. The body is the "
        "decoder layers. Added are the weights of routers and forecasters, without biases."
    )
    return Table("shapes", "Parameters and MACs on the paper's models", columns, tuple(blocks), (note,))


def _routed_row(config: LlamaConfig, method: str, sparsity: float, parameters: int) -> Row:
    costs = routed_costs(config, method, sparsity)
    cells = {name: Value(number) for name, number in costs.items()}
    cells["added"] = Value(costs["added"] / 1e6)
    cells |= {"parameters": Value(-100 * costs["added"] / parameters), "body_parameters": Value(0.0)}
    cells["kv"] = Value(costs["attention"] if ROUTED[method].kv == "drop" else 0.0)
    return Row(ROUTED[method].label, dict(cells), method=method)


def _static_row(config: LlamaConfig, method: str, sparsity: float) -> Row:
    label, name, settings = STATIC[method]
    if settings.get("measure") == "body":  # searching for the width takes time: once is enough
        width = SlicedShapes(config, "body").width_for(sparsity, 8)
        sparsity, settings = 1 - width / config.hidden_size, {"measure": "slice"}
    cells: dict[str, Value] = {}
    for tokens in CONTEXTS:
        saved = shape_report(config, name, sparsity, context=(tokens + 1) / 2, **settings).saved()
        cells |= {f"gross_{tokens}": Value(100 * saved["macs"]), f"net_{tokens}": Value(100 * saved["macs"])}
        cells["parameters"] = Value(100 * saved["parameters"])
        cells["body_parameters"] = Value(100 * saved["body_parameters"])
        cells["kv"] = Value(100 * saved["kv_elements"])
    return Row(label, dict(cells), method=method)
