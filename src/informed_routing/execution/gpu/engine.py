"""The GPU engine of one routed model: a forward without a wait for the host inside, dense or routed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache

from ...errors import InputError
from ...models.discover import family_of
from ...routing.history import History
from ...routing.state import GateBlock, RoutingState
from ..changes import identity, norms
from ..engine import NO_TARGET, Policy
from ..formats import Weights
from ..kernels import attention as attention_kernels
from ..kernels import matmul
from ..kernels.attention import Keys, Rotation
from ..kernels.route import Selection, route, select
from ..kernels.tiles import TileBook
from ..kv_layers import engine_layers
from ..rows import Rows
from . import weights as packed
from .availability import unsupported
from .counts import DeviceCounts
from .graph import Recorded
from .inputs import Inputs
from .kv_layer import RoomLayer
from .price_book import executed_shares, rounds_up
from .tuner import Tuned, prepare, prices_of


class GpuEngine:
    """Runs the decoder of `model` on its own weights, in the model's dtype; router margins and sums are float32.

    `weights` other than the model's dtype is refused: quantise the base model with torchao instead. Raises InputError,
    saying why, for models that it cannot run.
    """

    holds = False
    phases: tuple[str, ...] = ()  # a recorded step is one launch, of which no parts can be timed
    torch_prefill = False

    def __init__(self, model: Any, weights: Weights | None = None, policy: Policy = "exact") -> None:
        if reason := unsupported(model):
            raise InputError(f"the GPU engine cannot run this model: {reason}", "Use execution='sparse'")
        self.dtype, self.device = model.dtype, model.device
        self.weights = cast(Weights, str(self.dtype).removeprefix("torch."))
        if weights not in (None, self.weights):
            raise InputError(
                f"weights {weights!r} are not the model's ({self.dtype})",
                "Load it with that dtype, or quantise its linear layers with torchao, before set_execution",
            )
        self.policy: Policy = policy
        self.identity, self.content = identity(model), _content(model)
        decoder, config = model.decoder, model.config
        family, costs = family_of(model), model.costs
        block = decoder.layers[0].attention_routing.unit.module(decoder.layers[0])
        self.kv_shape, self.scale = (config.num_key_value_heads, block.head_dim), family.scale(block)
        self.layers = [
            (
                packed.attention(layer, family, layer.attention_routing, costs[2 * i], self.dtype),
                packed.ffn(layer, family, layer.ffn_routing, self.dtype),
            )
            for i, layer in enumerate(decoder.layers)
        ]
        self.units = 2 * len(self.layers)
        self.final_norm, self.eps = decoder.norm.weight.detach(), decoder.norm.variance_epsilon
        self.head_matrix = packed.matrix(model.get_output_embeddings())
        self.counts = DeviceCounts(costs, self.device)
        self.thresholds = model.routing_config.thresholds
        self.prices, self.tuned, self.tiles = prices_of(self), Tuned(), TileBook()
        self.records = self.device.type == "cuda"
        self._steps: dict[tuple[Any, ...], tuple[Recorded, Inputs, list[Any]]] = {}
        self._singles: dict[int, Selection] = {}
        self._constants: dict[tuple[bool, ...], Tensor] = {}

    # -- what the dispatcher asks -------------------------------------------------------------------------

    @property
    def balance(self) -> None:
        """No rates of its own: limits are made of torch's."""
        return None

    def is_of(self, model: Any, *, sample: bool = False) -> bool:
        """Whether routers and forecasters, of which there are copies, are as they were. All else is read in place."""
        return sample or _content(model) == self.content

    @contextmanager
    def checked(self, layers: int) -> Iterator[None]:
        """Run no more than some layers, and exactly as the routers say: for checks."""
        whole, policy = self.layers, self.policy
        self.layers, self.policy = whole[:layers], "exact"
        try:
            yield
        finally:
            self.layers, self.policy = whole, policy

    def leaves_to_torch(self, rows: int) -> bool:
        return False

    @contextmanager
    def profiled(self) -> Iterator[dict[str, float]]:
        """There are no `phases` to time: gives nothing."""
        yield {}

    def fresh_layers(self) -> list[RoomLayer]:
        return [RoomLayer(*self.kv_shape, self.dtype, self.device) for _ in self.layers]

    def head(self, hidden: Tensor) -> Tensor:
        """Logits float32 [rows, vocabulary] of normed hidden states [rows, d]."""
        return self.head_matrix(hidden.to(self.dtype)).float()

    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """float32 [rows]: minus the log probabilities of `targets` int64 [rows] after normed states [rows, d]."""
        return F.cross_entropy(self.head(hidden), targets, ignore_index=NO_TARGET, reduction="none")

    def forward(
        self,
        embeddings: Tensor,
        rope: tuple[Tensor, Tensor],
        rows: Rows,
        cache: Cache | None,
        state: RoutingState,
        stats: Any,
        *,
        keep: int = 0,
        forced: Tensor | None = None,
        history: History | None = None,
    ) -> Tensor:
        """Logits [B, keep, vocabulary] of the last `keep` positions, or normed hidden states [B, N, d].

        `embeddings` [B, N, d]; `rope` is (cos, sin), each [B or 1, N, head_dim]; `cache` must be accepted and gets the
        new keys. `forced` bool [units, B, N] replaces the routers' choices, which are computed all the same. Single
        tokens are replayed as a CUDA graph. Raises InputError for a cache of another batch size, and for a `history`.
        """
        if history is not None:
            raise InputError("the GPU engine has no held rules", "Use execution='sparse'")
        batch, length, d = embeddings.shape
        if len(rows.start) != batch:
            raise InputError(f"{len(rows.start)} sequences are described, {batch} given", "Give one start for each")
        past, layers = self._room(cache, batch, length)
        dense = state.decision.dense
        self.counts.belong_to(stats)
        prepare(self, batch, length)
        contexts = rows.contexts(past, length)
        limits = torch.zeros(contexts.shape) if dense else state.decision.limits(contexts)
        exact = dense or self.policy == "exact"
        given = Inputs(
            hidden=embeddings.to(self.dtype).reshape(-1, d),
            cos=rope[0].float().expand(batch, -1, -1).reshape(batch * length, -1),
            sin=rope[1].float().expand(batch, -1, -1).reshape(batch * length, -1),
            past=torch.full((1,), past, dtype=torch.int32, device=self.device),
            start=rows.start.to(self.device, torch.int32),
            valid=None if rows.valid is None else rows.valid.to(self.device).reshape(-1).to(torch.int8),
            limits=limits.to(self.device).reshape(-1),
            forced=None if forced is None else forced.to(self.device).reshape(self.units, -1),
            batch=batch,
            whole=(False, False) if exact else self.whole(batch, length, state.decision.nominal),
        )
        if length == 1 and cache is not None and rows.valid is None and self.records:
            hidden, gates = self._replayed(given, layers, dense)
        else:
            hidden, gates = self._run(given, layers, dense)
        for layer in layers:
            layer.length = past + length
        state.forward.valid = None if given.valid is None else given.valid.view(batch, length).bool()
        state.forward.gates = {} if gates is None else GateBlock(gates.view(self.units, batch, length).clone())
        hidden = hidden.view(batch, length, d)
        return self.head_matrix(hidden[:, -keep:]) if keep else hidden.clone()

    # -- one forward ----------------------------------------------------------------------------------------

    def _run(self, given: Inputs, layers: Sequence[RoomLayer], dense: bool) -> tuple[Tensor, Tensor | None]:
        """(normed hidden states [T, d], gates [units, T] or None when dense), counts taken."""
        hidden = given.hidden.clone()
        gates = None
        if not dense:
            gates = torch.ones(self.units, len(hidden), dtype=torch.bool, device=self.device)
        for i, (attention, ffn) in enumerate(self.layers):
            keys = Keys(cast(Tensor, layers[i].keys), cast(Tensor, layers[i].values), given.past, given.start)
            keys.window = attention.window
            cos, sin = (given.cos, given.sin) if attention.rope else (None, None)
            rotation = Rotation(cos, sin, attention.query_norm, attention.key_norm, attention.norm_eps)
            for j, unit in enumerate((attention, ffn)):
                index = 2 * i + j
                self.call(hidden, unit, given, rotation, keys, None if gates is None else gates[index], index)
        self._count(given, gates)
        return F.rms_norm(hidden, hidden.shape[1:], self.final_norm, self.eps), gates

    def call(
        self,
        hidden: Tensor,
        unit: packed.Unit,
        given: Inputs,
        rotation: Rotation,
        keys: Keys,
        gate: Tensor | None,
        index: int,
    ) -> None:
        """One unit's call, in place; routed, with its decisions written to `gate` [T], unless that is None."""
        if gate is not None and not given.whole[index % 2]:
            x, chosen = self._route(hidden, unit, given, gate, index)
        else:
            x, chosen = F.rms_norm(hidden, hidden.shape[1:], unit.norm, unit.eps), None
        if isinstance(unit, packed.Attention):
            self._attention(hidden, x, chosen, unit, rotation, keys)
        elif isinstance(unit, packed.Ffn):
            self._ffn(hidden, x, chosen, unit)

    def whole(self, batch: int, length: int, threshold: float) -> tuple[bool, bool]:
        """Which kinds of unit (attention, FFN) execute all rows of such a call, whatever their routers would say."""
        shares, rows = executed_shares(self.thresholds, threshold), batch * length
        attention, ffn = (
            rounds_up(self.prices.find(kind, rows, length == 1), kind, rows, shares[kind]) for kind in (0, 1)
        )
        return attention, ffn

    def _route(
        self, hidden: Tensor, unit: packed.Unit, given: Inputs, gate: Tensor, index: int
    ) -> tuple[Tensor, Selection]:
        """Normed rows and the selection, whose gate is written to `gate` [T]."""
        into = Selection.empty(given.batch, given.length, self.device)
        into.gate = gate
        x, chosen = route(hidden, unit.norm, unit.eps, unit.router, given.limits, given.valid, given.batch, into)
        if given.forced is not None:
            chosen = select(given.forced[index], given.batch, into)
        return x, chosen

    def _attention(
        self,
        hidden: Tensor,
        x: Tensor,
        chosen: Selection | None,
        unit: packed.Attention,
        rotation: Rotation,
        keys: Keys,
    ) -> None:
        if chosen is None:
            q, key, value = unit.query(x), unit.key(x), unit.value(x)
            attention_kernels.store(key, value, rotation, keys)
            everyone = self._everyone(len(keys.keys), len(x) // len(keys.keys))
            hidden += unit.out(attention_kernels.attend(q, everyone, rotation, keys, self.scale))
            return
        q, key, value, z = matmul.project(x, chosen, unit.query, unit.key, unit.value, unit.forecaster, self.tiles)
        attention_kernels.store(key, value, rotation, keys)
        out = attention_kernels.attend(q, chosen, rotation, keys, self.scale)
        matmul.finish(hidden, out, chosen, unit.out, z, unit.forecaster, self.tiles)

    def _ffn(self, hidden: Tensor, x: Tensor, chosen: Selection | None, unit: packed.Ffn) -> None:
        if chosen is None:
            gate = unit.gate(x)
            act = F.gelu(gate, approximate="tanh") if unit.gelu else F.silu(gate)
            hidden += unit.down(act * unit.up(x))
            return
        inner, z = matmul.gated(x, chosen, unit.gate, unit.up, unit.gelu, unit.forecaster, self.tiles)
        matmul.finish(hidden, inner, chosen, unit.down, z, unit.forecaster, self.tiles)

    def _everyone(self, batch: int, length: int) -> Selection:
        """All rows. Kept for good where steps are recorded: they read these addresses."""
        if length > 1:
            return Selection.all(batch, length, self.device)
        if batch not in self._singles:
            self._singles[batch] = Selection.all(batch, 1, self.device)
        return self._singles[batch]

    def _count(self, given: Inputs, gates: Tensor | None) -> None:
        places = torch.arange(given.length, dtype=torch.int32, device=self.device)[None]
        contexts = (places + given.past[:, None] + 1 - given.start[:, None]).reshape(-1)
        if given.valid is not None:
            contexts = contexts * given.valid
        up = torch.tensor([gates is not None and given.whole[i % 2] for i in range(self.units)])
        if gates is None:
            gates = torch.ones(1, 1, dtype=torch.bool, device=self.device).expand(self.units, len(contexts))
        self.counts.add(gates, contexts, self._constant(up))

    def _constant(self, values: Tensor) -> Tensor:
        """The same values on the device, copied there once: a copy from the host cannot be recorded."""
        key = tuple(values.tolist())
        if key not in self._constants:
            self._constants[key] = values.to(self.device)
        return self._constants[key]

    # -- recorded steps -------------------------------------------------------------------------------------

    def _replayed(self, given: Inputs, layers: Sequence[RoomLayer], dense: bool) -> tuple[Tensor, Tensor | None]:
        place = tuple(cast(Tensor, layer.keys).data_ptr() for layer in layers)
        key = (given.batch, dense, given.whole, given.forced is not None, layers[0].capacity, place)
        if key not in self._steps:
            # A cache that is gone frees its addresses: steps recorded on other caches are of no more use.
            self._steps = {k: v for k, v in self._steps.items() if k[-1] == place}
            counts = self.counts.state()
            copies: dict[str, Any] = {k: v.clone() for k, v in vars(given).items() if isinstance(v, Tensor)}
            own = replace(given, **copies)
            recorded = Recorded(lambda: self._run(own, layers, dense), self.device)
            self.counts.restore(counts)
            self._steps[key] = (recorded, own, [layer.keys for layer in layers])
        recorded, own, _ = self._steps[key]
        for name, value in vars(given).items():
            if isinstance(value, Tensor):
                getattr(own, name).copy_(value)
        return recorded()

    def _room(self, cache: Cache | None, batch: int, length: int) -> tuple[int, Sequence[RoomLayer]]:
        if cache is None:  # nothing is kept: one layer's room serves all
            layer = RoomLayer(*self.kv_shape, self.dtype, self.device)
            layer.reserve(batch, length)
            return 0, [layer] * len(self.layers)
        layers = engine_layers(cache, batch, lambda layer: isinstance(layer, RoomLayer), self.fresh_layers)
        past = layers[0].length
        for layer in layers:
            layer.reserve(batch, past + length + 1)
        return past, layers


def _content(model: Any) -> str:
    """Sizes of the parameters that the engine copies."""
    return repr(norms(parameter for _, parameter in model.routing_parameters()))
