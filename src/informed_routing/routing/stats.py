"""The one place where sparsity is counted: what was executed, and what that saved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .costs import UnitCost
from .counts import ALL, NONE, OUTCOMES, ROUNDED_UP, count, visible, windows_of
from .state import RoutingState


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
    """[units]: tokens whose keys and values were neither computed nor kept (kv='drop', static layers)."""
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
        """Counts of nothing yet."""
        with torch.inference_mode(False):  # counts may begin in one mode and go on in another
            zeros = torch.zeros(len(costs), dtype=torch.float64)
            calls = torch.zeros(len(costs), len(OUTCOMES), dtype=torch.float64)
            return cls(costs, kinds, zeros.clone(), zeros.clone(), 0.0, zeros.clone(), calls, zeros.clone())

    def add(self, state: RoutingState, contexts: Tensor, *, rounded_up: bool = False) -> None:
        """Count one forward. `contexts` [B, N]: keys visible to each token, 0 for padding.

        `rounded_up`: no unit decided, because skipping does not pay.
        """
        flat = contexts.reshape(-1).long()
        windows = windows_of(self.costs, flat.device)
        tokens, keys = int((flat > 0).sum()), visible(flat, windows).sum(1).cpu()
        self.tokens += tokens
        self.keys += keys
        if rounded_up:  # of models without static layers
            self.executed += tokens
            self.executed_keys += keys
            self.calls[:, ROUNDED_UP] += 1
            return
        static = self.column("static") * (not state.original)
        self.evicted += tokens * static
        if state.dense:
            self.executed += tokens * (1 - static)
            self.executed_keys += keys * (1 - static)
            self.calls[:, ALL] += 1 - static
            self.calls[:, NONE] += static
            return
        self.routed = True
        gates = torch.stack([state.forward.gates[i].detach().reshape(-1) for i in range(len(self.costs))]) > 0.5
        rounded = torch.tensor([index in state.forward.rounded_up for index in range(len(self.costs))])
        found = count(gates, flat, windows, rounded.to(gates.device) if state.forward.rounded_up else None)
        executed, read = found.executed.cpu(), found.keys.cpu()
        if state.kv == "drop":
            self.evicted += tokens - executed
            for index, number in state.forward.keys_read.items():
                read[index] = int(number)
        self.executed += executed
        self.executed_keys += read
        self.calls += found.calls.cpu()

    def add_tokens(
        self, length: int, past: int, start: Tensor, valid: Tensor | None, *, routed: bool, original: bool
    ) -> None:
        """Count the tokens of a forward whose executed ones the native engine has counted already.

        `start` [B]: first visible key; `valid` [B, N]: which of the `length` tokens after `past` are real, or None.
        """
        self.routed = self.routed or routed
        windows = {c.window for c in self.costs}
        tokens = len(start) * length if valid is None else float(valid.sum())
        self.tokens += tokens
        if not original and any(c.static for c in self.costs):
            self.evicted += tokens * self.column("static")
        if windows == {None} and valid is None:
            rows = len(start)
            self.keys += rows * (length * past + length * (length + 1) / 2) - length * int(start.sum())
            return
        places = torch.arange(past + 1, past + 1 + length, dtype=torch.float64)
        seen = places - start.double()[:, None]
        seen = seen if valid is None else seen * valid
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

    def shares_by_unit(self) -> tuple[float, ...]:
        """Share of the counted tokens that each unit approximated."""
        if not self.tokens:
            return (0.0,) * len(self.costs)
        return tuple(round(1.0 - float(executed) / self.tokens, 5) for executed in self.executed)

    def unit_macs(self, *, dense: bool) -> Tensor:
        """[units] float64: MACs of the counted tokens, or what they had been had all of them been executed."""
        always, execute, per_key = (self.column(name) for name in ("always", "execute", "per_key"))
        if dense:
            return self.tokens * (always + execute) + self.keys * (per_key + self.column("always_per_key"))
        found = (self.tokens - self.evicted) * always + self.executed * execute + self.executed_keys * per_key
        found = found + self.keys * self.column("always_per_key")
        decided = self.tokens * self.column("router") if self.routed else 0.0
        return found + decided + (self.tokens - self.executed) * self.column("forecaster")

    def column(self, name: str) -> Tensor:
        """[units] float64: one field of all costs."""
        return torch.tensor([getattr(cost, name) for cost in self.costs], dtype=torch.float64)

    def macs(self) -> tuple[float, float]:
        """(dense, routed) MACs of the decoder body."""
        return float(self.unit_macs(dense=True).sum()), float(self.unit_macs(dense=False).sum())

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
                "rounded_up": float(self.calls[i, ROUNDED_UP] / self.calls[i].sum().clamp(min=1)),
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
