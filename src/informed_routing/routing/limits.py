"""The best speed-up that a selection allows on a machine: bytes moved and multiply-accumulates, by the roofline.

Decode of few sequences is as fast as memory: what counts is which weights and keys are read. Prefill is as fast as
arithmetic. `Balance` says where one becomes the other; both of its rates are measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .counts import ALL, NONE, ROUNDED_UP, SOME
from .stats import RoutingStats
from .storage import Storage


@dataclass(frozen=True)
class Balance:
    """Measured rates of a machine and engine: bytes per second from memory, MACs per second from the cache."""

    bytes_per_second: float
    macs_per_second: float


@dataclass(frozen=True)
class Work:
    """MACs and bytes of each unit [units] and of the LM head, over all counted forwards."""

    macs: Tensor
    bytes: Tensor
    head_macs: float
    head_bytes: float

    def seconds(self, balance: Balance) -> float:
        """The least time: each unit is bound by memory or by arithmetic, whichever takes longer."""
        units = torch.maximum(self.bytes / balance.bytes_per_second, self.macs / balance.macs_per_second)
        head = max(self.head_bytes / balance.bytes_per_second, self.head_macs / balance.macs_per_second)
        return float(units.sum()) + head

    def total_bytes(self) -> float:
        """Bytes moved by all units and the head."""
        return float(self.bytes.sum()) + self.head_bytes


def work_of(
    stats: RoutingStats, storage: Storage, head_weights: float, head_rows: float, *, decode: bool, dense: bool
) -> Work:
    """The work of the counted forwards as they were routed, or had they been `dense`.

    `head_rows`: positions whose logits were made. In `decode` every query reads its keys from memory; in prefill
    queries share them, and what is read is small beside the arithmetic.
    """
    always, execute, kv = (stats.column(name) for name in ("always", "execute", "kv"))
    router, forecaster, own, stream = (stats.column(name) for name in ("router", "forecaster", "slice", "stream"))
    calls = stats.calls.sum(1)
    keys = stats.keys if dense else torch.where(stats.column("always_per_key") > 0, stats.keys, stats.executed_keys)
    run = calls if dense else stats.calls[:, [ALL, SOME, ROUNDED_UP]].sum(1)
    forecast = torch.zeros_like(calls) if dense else stats.calls[:, [SOME, NONE]].sum(1)
    sliced = torch.zeros_like(calls) if dense else stats.calls[:, NONE]  # where some execute, its weights are read
    decided = 0.0 if dense or not stats.routed else 1.0
    evicted = torch.zeros_like(stats.evicted) if dense else stats.evicted
    macs = stats.unit_macs(dense=dense)
    projected = torch.where(evicted > 0, run, calls)  # keys and values of nobody need no weights
    body = projected * always + run * execute + sliced * own
    moved = body * storage.body + (keys * kv * storage.kv if decode else 0.0)
    moved = moved + forecast * (forecaster - own) * storage.forecaster + decided * calls * router * storage.router
    idle = 0.0 if dense else stats.column("static") * (kv > 0)  # a static attention touches nothing
    moved = moved + (1 - idle) * stats.tokens * stream * storage.stream
    forwards = float(calls.max()) if len(calls) else 0.0
    return Work(macs, moved, head_rows * head_weights, forwards * head_weights * storage.head)


def limit_speedup(
    stats: RoutingStats, storage: Storage, balance: Balance, head_weights: float, head_rows: float, *, decode: bool
) -> float:
    """Dense over routed least time: the speed-up of an engine that wastes nothing on the counted selections."""
    dense, routed = (
        work_of(stats, storage, head_weights, head_rows, decode=decode, dense=flag) for flag in (True, False)
    )
    return dense.seconds(balance) / routed.seconds(balance)
