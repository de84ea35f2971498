"""Costs in multiply-accumulates, and the one place where sparsity is counted.

MACs are those of the decoder body (projections, scores, FFN), without embeddings, norms and the LM head. K and V
of approximated tokens, every router, and the forecasts that were used are charged against the saving.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..config import Budget, LatencyGains
from ..errors import InputError
from .routed_unit import KeyValues, RoutedUnit, RoutingState


@dataclass(frozen=True)
class UnitCost:
    """MACs of one unit for one token."""

    always: float
    """Paid for every token: K and V projections."""
    execute: float
    """Paid by executed tokens: Q and O projections, or the FFN."""
    per_key: float
    """Paid by executed tokens for each key they attend to: scores and weighted values."""
    router: float
    forecaster: float
    window: int | None = None
    """Keys attended to at most (sliding window)."""
    kv: float = 0
    """Elements of the KV cache read for each key attended to."""
    stream: float = 0
    """Activations read and written for each token: residual stream and normed input, elements."""

    def keys(self, context: float) -> float:
        return min(context, self.window) if self.window else context

    def dense(self, context: float) -> float:
        """MACs of the base model's unit for a token that attends to `context` keys."""
        return self.always + self.execute + self.per_key * self.keys(context)


def _weights(module: nn.Module) -> int:
    return sum(p.numel() for name, p in module.named_parameters() if name.endswith("weight") and p.dim() == 2)


def unit_costs(layers: Sequence[nn.Module], units: Sequence[RoutedUnit]) -> list[UnitCost]:
    """Costs of all routed units from the modules that are really there (attached adapters are not counted)."""
    costs = []
    for routed in units:
        layer = layers[routed.index // 2]
        module = cast(Any, routed.unit.module(layer))
        router = 0 if routed.router is None else _weights(routed.router)
        forecaster = 0 if routed.forecaster is None else _weights(routed.forecaster)
        hidden_size = routed.hidden_size
        if routed.kind == "ffn":
            costs.append(UnitCost(0, _base_weights(module), 0, router, forecaster, stream=4 * hidden_size))
            continue
        config = module.config
        width, d = config.num_attention_heads * module.head_dim, config.hidden_size
        kv = 2 * d * config.num_key_value_heads * module.head_dim
        window = None
        kinds = getattr(config, "layer_types", None)
        if getattr(config, "sliding_window", None) and (kinds is None or "sliding" in kinds[routed.index // 2]):
            window = int(config.sliding_window)
        heads = 2 * config.num_key_value_heads * module.head_dim
        costs.append(UnitCost(kv, 2 * d * width, 2 * width, router, forecaster, window, heads, 4 * d))
    return costs


def capacity_for(units: Sequence[RoutedUnit], sparsity: float) -> float:
    """The share of tokens that each routed unit executes when `sparsity` of all (token, unit) pairs is approximated.

    Raises InputError when the routed units are too few for that.
    """
    routed = sum(unit.is_routed for unit in units) / len(units)
    if sparsity >= routed:
        raise InputError(
            f"sparsity {sparsity} cannot be reached: only {routed:.2f} of the units are routed", "Choose a lower one"
        )
    return 1 - sparsity / routed


def _base_weights(module: nn.Module) -> int:
    return sum(
        p.numel()
        for name, p in module.named_parameters()
        if name.endswith("weight") and p.dim() == 2 and "lora_" not in name
    )


OUTCOMES = ("all", "some", "none", "rounded up")


@dataclass
class RoutingStats:
    """Counts since the last reset: executed tokens and keys read by them, per unit, pads excluded."""

    costs: list[UnitCost]
    kinds: list[str]
    executed: Tensor
    executed_keys: Tensor
    tokens: float = 0.0
    keys: Tensor = field(default_factory=lambda: torch.zeros(0))
    calls: Tensor = field(default_factory=lambda: torch.zeros(0))
    """[units, 4]: forwards in which a unit executed all tokens, some, none, or all because skipping costs more."""
    evicted: Tensor = field(default_factory=lambda: torch.zeros(0))
    """[units]: tokens whose keys and values were neither computed nor kept (kv='drop')."""
    routed: bool = False
    elsewhere: Callable[[RoutingStats], None] | None = None
    """Adds what an engine has counted on its device since it was last called."""

    def settle(self) -> None:
        """Take in what was counted on a device; waits for it."""
        if self.elsewhere is not None:
            self.elsewhere(self)

    def __getstate__(self) -> dict[str, Any]:
        self.settle()
        return {**vars(self), "elsewhere": None}  # a copy counts for itself

    @classmethod
    def empty(cls, costs: list[UnitCost], kinds: list[str]) -> RoutingStats:
        zeros = torch.zeros(len(costs), dtype=torch.float64)
        calls = torch.zeros(len(costs), len(OUTCOMES), dtype=torch.float64)
        return cls(costs, kinds, zeros.clone(), zeros.clone(), 0.0, zeros.clone(), calls, zeros.clone())

    def add(self, state: RoutingState, contexts: Tensor) -> None:
        """Count one forward. `contexts` [B, N]: keys visible to each token, 0 for padding."""
        flat = contexts.reshape(-1).double()
        real = (flat > 0).double()
        windows = torch.tensor([c.window or torch.inf for c in self.costs], dtype=torch.float64)
        tokens = float(real.sum())
        self.tokens += tokens
        whole = flat.sum().cpu()
        limited = {
            w: torch.minimum(flat, torch.tensor(w, dtype=torch.float64, device=flat.device))
            for w in set(windows.tolist())
            if w != torch.inf
        }
        keys = torch.stack([whole if w == torch.inf else limited[w].sum().cpu() for w in windows.tolist()])
        self.keys += keys
        if state.dense:
            self.executed += tokens
            self.executed_keys += keys
            self.calls[:, 0] += 1
            return
        self.routed = True
        gates = torch.stack([state.gates[i].detach().reshape(-1) for i in range(len(self.costs))]).double()
        executed = (gates @ real).cpu()
        self.executed += executed
        outcome = torch.where(executed >= tokens, 0, torch.where(executed > 0, 1, 2))
        self.calls += torch.nn.functional.one_hot(outcome, len(OUTCOMES))
        counts = (gates @ flat).cpu()
        for window, column in limited.items():
            counts = torch.where(windows == window, (gates @ column).cpu(), counts)
        if state.kv == "drop":
            self.evicted += tokens - executed
            for index, read in state.keys_read.items():
                counts[index] = float(read)
        self.executed_keys += counts

    def add_tokens(self, length: int, past: int, start: Tensor, valid: Tensor | None, *, routed: bool) -> None:
        """Count the tokens of a forward whose executed ones the native engine has counted already.

        `start` [B]: first visible key; `valid` [B, N]: which of the `length` tokens after `past` are real, or None.
        """
        self.routed = self.routed or routed
        windows = {c.window for c in self.costs}
        if windows == {None} and valid is None:
            rows = len(start)
            self.tokens += rows * length
            self.keys += rows * (length * past + length * (length + 1) / 2) - length * int(start.sum())
            return
        places = torch.arange(past + 1, past + 1 + length, dtype=torch.float64)
        seen = places - start.double()[:, None]
        seen = seen if valid is None else seen * valid
        self.tokens += seen.numel() if valid is None else float(valid.sum())
        whole = float(seen.sum())
        if windows == {None}:
            self.keys += whole
        else:
            sums = {w: whole if w is None else float(seen.clamp(max=w).sum()) for w in windows}
            self.keys += torch.tensor([sums[c.window] for c in self.costs], dtype=torch.float64)

    def shares(self, kind: str | None = None) -> float:
        """Share of (token, unit) pairs approximated, of one kind or of all (the paper's sparsity)."""
        picked = torch.tensor([kind is None or k == kind for k in self.kinds])
        if not self.tokens or not picked.any():
            return 0.0
        return 1.0 - float(self.executed[picked].sum()) / (self.tokens * int(picked.sum()))

    def macs(self) -> tuple[float, float]:
        """(dense, routed) MACs of the decoder body."""
        dense = routed = 0.0
        for i, cost in enumerate(self.costs):
            executed, tokens = float(self.executed[i]), self.tokens
            dense += tokens * (cost.always + cost.execute) + float(self.keys[i]) * cost.per_key
            routed += (tokens - float(self.evicted[i])) * cost.always + executed * cost.execute
            routed += float(self.executed_keys[i]) * cost.per_key
            if self.routed:
                routed += tokens * cost.router + (tokens - executed) * cost.forecaster
        return dense, routed

    def saved(self) -> float:
        """Share of the body's MACs really saved; negative when routers cost more than they save."""
        dense, routed = self.macs()
        return 1.0 - routed / dense if dense else 0.0

    def kv_saved(self) -> float:
        """Share of the KV cache's rows that evicted tokens left empty."""
        attention = torch.tensor([kind == "attention" for kind in self.kinds])
        rows = self.tokens * int(attention.sum())
        return float(self.evicted[attention].sum()) / rows if rows else 0.0

    def limit_speedup(self, head_macs: float = 0.0) -> float:
        """Dense over routed MACs: the speed-up if time were proportional to arithmetic. `head_macs` is in both."""
        dense, routed = self.macs()
        return (dense + head_macs) / (routed + head_macs) if dense else 1.0

    def as_dict(self, target: float | None) -> dict[str, Any]:
        """The sparsity object of the JSON results."""
        layers = len(self.costs) // 2
        per_unit = [
            {
                "layer": i // 2 if layers else 0,
                "kind": self.kinds[i],
                "executed": float(self.executed[i]) / self.tokens if self.tokens else 1.0,
                "rounded_up": float(self.calls[i, 3] / self.calls[i].sum().clamp(min=1)),
            }
            for i in range(len(self.costs))
        ]
        return {
            "target": target,
            "units": self.shares(),
            "attention": self.shares("attention"),
            "ffn": self.shares("ffn"),
            "macs": self.saved(),
            "kv": self.kv_saved(),
            "tokens": int(self.tokens),
            "per_unit": per_unit,
        }


class BudgetMeter:
    """The differentiable share that training holds to its target (paper Eq. 5 and 8; `macs`, `latency` are ours).

    `gains` is the measured table that a latency budget needs. With `kv` = drop, MACs of keys and values count as saved,
    and those of scores as if evicted keys were still attended to: less than what is really saved.
    """

    def __init__(
        self,
        costs: list[UnitCost],
        kinds: Sequence[str],
        budget: Budget,
        context: float,
        gains: LatencyGains | None = None,
        kv: KeyValues = "keep",
    ) -> None:
        self.kinds, self.budget = kinds, budget
        dense = torch.tensor([c.dense(context) for c in costs], dtype=torch.float32)
        if budget == "units":
            self.weights = torch.full((len(costs),), 1.0 / len(costs))
            self.overhead = 0.0
        elif budget == "macs":
            kept = 1.0 if kv == "keep" else 0.0
            gain = torch.tensor([c.dense(context) - kept * c.always - c.forecaster for c in costs], dtype=torch.float32)
            self.weights = gain / dense.sum()
            self.overhead = float(sum(c.router for c in costs) / dense.sum())
        elif budget == "latency":
            if gains is None:
                raise InputError("a latency budget needs a measured table", "Use `fit --budget latency`")
            count = {kind: sum(k == kind for k in kinds) for kind in kinds}
            self.weights = torch.tensor([getattr(gains, kind) / count[kind] for kind in kinds])
            self.overhead = gains.overhead
        else:
            raise InputError(f"budget {budget!r} is not known", "Choose units, macs or latency")

    def saved(self, approximated: Tensor) -> Tensor:
        """Budget share saved by approximated shares [U] of the units."""
        return (approximated * self.weights.to(approximated.device)).sum() - self.overhead

    def attainable(self, eligible: Tensor | None = None) -> float:
        """The share saved if everything were approximated: no target may lie above it.

        `eligible` [U]: the share of its tokens that each unit may approximate; default all.
        """
        return float((self.weights if eligible is None else self.weights * eligible).sum()) - self.overhead

    def deviation(self, approximated: Tensor, target: float, balanced: bool) -> Tensor:
        """|saved - target|, or its sum over the two kinds of unit, each held to the target on its own."""
        if not balanced:
            return (self.saved(approximated) - target).abs()
        total = approximated.new_zeros(())
        for kind in ("attention", "ffn"):
            picked = torch.tensor([k == kind for k in self.kinds], device=approximated.device)
            total = total + (approximated[picked].mean() - target).abs()
        return total
