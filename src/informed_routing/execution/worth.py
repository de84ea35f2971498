"""Does skipping pay in torch? The profitability switch of the sparse back end (`policy="auto"`).

Routing costs time of its own: features and router for every token, selections read on the host, rows gathered and
written back. With few tokens, or small units, that is more than the skipped work. So before a unit decides, both are
timed on the call at hand, once for each kind of unit and number of tokens; what was found is kept in the cache folder
for this machine, and read for the share of tokens that a unit usually executes. Where skipping does not pay, the unit's
call is executed whole, and counted as such.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..assets.cache import cache_dir, machine, read_record, write_record
from ..errors import InputError
from ..models.calls import Call
from ..routing.routed_unit import RoutedUnit
from ..routing.state import RoutingState

REPEATS = 7
STEPS = 8
"""Shares of executed tokens are told apart in so many steps."""

SEEN = 16
"""Tokens after which a share is taken for what it was among them."""

CLEARLY = 0.97
"""Skipping pays where it takes less than this of the time."""

Skip = Callable[[RoutedUnit, RoutingState, nn.Module, Tensor, Tensor, Tensor, Tensor, Call], Tensor]
_FOUND: dict[str, dict[str, Any]] = {}


def check(state: RoutingState) -> None:
    """Raises InputError for decisions that a call executed whole would break."""
    if state.decision.held or state.ranks:
        raise InputError("policy 'auto' executes more than a held or ranking rule asks for", "Use policy='exact'")


def pays(
    skip: Skip, routed: RoutedUnit, state: RoutingState, layer: nn.Module, hidden: Tensor, x: Tensor, call: Call
) -> bool:
    """Whether a unit's call on the stream hidden [B, N, d], whose norm is x, should be routed."""
    share, known = _known(routed.index, state, hidden.shape[0], hidden.shape[1])
    if (answer := state.pays.get(known)) is not None:
        return answer
    key = _key(routed, layer, hidden)
    if key not in _FOUND:
        path = cache_dir() / "torch-prices" / f"{key}.json"
        stored = read_record(path)
        if stored is None:
            stored = _measured(skip, routed, state, layer, hidden, x, call)
            if stored is None:  # a mixer that does not run without its cache: as the router says
                state.pays[known] = True
                return True
            write_record(path, stored)
        _FOUND[key] = stored
    prices = _FOUND[key]
    low, high, part = ("none", "half", 2 * share) if share < 0.5 else ("half", "all", 2 * share - 1)
    if hidden.shape[:2].numel() == 1:  # a token is executed or not
        low, high, part = "none", "all", share
    skipping = prices[low] + part * (prices[high] - prices[low])
    state.pays[known] = skipping < CLEARLY * prices["whole"]
    return state.pays[known]


def none_pays(units: Iterable[RoutedUnit], state: RoutingState, batch: int, length: int) -> bool:
    """Whether it is known of all units that decide that skipping does not pay for so many tokens."""
    if any(unit.is_static or unit.joins for unit in units):
        return False
    decide = [unit.index for unit in units if unit.router is not None]
    return all(state.pays.get(_known(index, state, batch, length)[1], True) is False for index in decide)


def _known(index: int, state: RoutingState, batch: int, length: int) -> tuple[float, tuple[Any, ...]]:
    """The share that a unit is likely to execute, and what answers are remembered by."""
    share = round(state.shares.get(index, state.settings.share) * STEPS) / STEPS
    return share, (index, batch, length, share, torch.get_num_threads())


def saw(routed: RoutedUnit, state: RoutingState, gate: Tensor) -> None:
    """Note how many of a unit's tokens were executed: many tokens count at once, single ones little by little."""
    found, weight = float(gate.float().mean()), min(gate.numel() / SEEN, 1.0)
    before = state.shares.get(routed.index, state.settings.share)
    state.shares[routed.index] = before + weight * (found - before)


def whole(routed: RoutedUnit, state: RoutingState, layer: nn.Module, hidden: Tensor, x: Tensor, call: Call) -> Tensor:
    """The unit's call on x executed for all tokens, and noted as such."""
    valid = state.forward.valid
    everything = torch.ones(hidden.shape[:-1], dtype=torch.bool, device=hidden.device)
    state.forward.gates[routed.index] = everything if valid is None else valid
    state.forward.rounded_up.add(routed.index)
    return routed.unit.added(hidden, routed.unit.update(layer, routed.unit.run(layer, x, call)))


def _measured(
    skip: Skip, routed: RoutedUnit, state: RoutingState, layer: nn.Module, hidden: Tensor, x: Tensor, call: Call
) -> dict[str, Any] | None:
    """Median seconds, in turns and without what a cache holds: of the whole, and of none, half or all by routing.

    None where the unit does not run so.
    """
    unit, alone = routed.unit, call.alone()
    total = hidden.shape[:-1].numel()
    order = (torch.arange(total, device=hidden.device) * 7919) % total
    read = {"normed": None, "residual": hidden, "layer": state.forward.layer_input}[routed.reads]
    forward = state.forward

    def all_of_it() -> None:
        unit.added(hidden, unit.update(layer, unit.run(layer, x, alone)))

    def some_of_it(executed: int) -> Callable[[], None]:
        gate = (order < executed).view(hidden.shape[:-1])

        def run() -> None:
            features = routed.features(hidden, x)
            assert routed.router is not None
            state.decision.decide(routed.router(features if read is None else read), routed.index, forward.contexts)
            skip(routed, state, layer, hidden, x, features, gate, alone)

        return run

    work = {"whole": all_of_it}
    work |= {"none": some_of_it(0), "half": some_of_it(-(-total // 2)), "all": some_of_it(total)}
    seconds: dict[str, list[float]] = {name: [] for name in work}
    try:
        with torch.no_grad():
            for turn in range(REPEATS + 1):
                for name, run in work.items():
                    started = _now(hidden)
                    run()
                    if turn:  # the first is to warm up
                        seconds[name].append(_now(hidden) - started)
    except InputError:
        raise
    except Exception:  # whatever a base model's own code raises
        return None
    return {name: statistics.median(all_runs) for name, all_runs in seconds.items()}


def _now(like: Tensor) -> float:
    if like.is_cuda:
        torch.cuda.synchronize(like.device)
    return time.perf_counter()


def _key(routed: RoutedUnit, layer: nn.Module, hidden: Tensor) -> str:
    """A name for all that the times depend on. Many tokens are told apart by their logarithm."""
    batch, length, width = hidden.shape
    tokens = batch * length
    size = tokens if tokens <= STEPS else -(1 << (tokens - 1).bit_length())
    parts = [tuple(p.shape) for module in routed.unit.modules(layer) for p in module.parameters()]
    own = [tuple(p.shape) for p in routed.parameters()]
    what = [type(routed.unit.module(layer)).__name__, routed.kind, routed.unit.family.private, parts, own]
    where = [machine(), str(hidden.device), torch.__version__, torch.get_num_threads()]
    if hidden.is_cuda:
        where.append(torch.cuda.get_device_name(hidden.device))
    text = json.dumps([what, where, width, size, length == 1, str(hidden.dtype)])
    return hashlib.sha256(text.encode()).hexdigest()[:24]
