"""The native engine of one routed model: packed weights, and a forward that takes and gives torch tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ...errors import InputError
from ...models.discover import family_of
from ...models.head import LogitScaling, logit_scaling
from ...routing.history import History, Holding
from ...routing.limits import Balance
from ...routing.rules.base import DecisionRule
from ...routing.rules.held import check_units
from ...routing.state import GateBlock, RoutingState
from ..changes import PAGE, content, copied, identity
from ..engine import Policy
from ..formats import FORMATS, PACKED, Packed, packed_of
from ..kv_layers import engine_layers
from ..rows import Rows
from .availability import unsupported
from .build import library
from .interface import PHASES, Call, Layer, Model, Prices
from .kv_layer import PackedLayer
from .packing import Packer
from .price_table import PriceTable, price_table

MANY_ROWS = 128
"""Rows from which arithmetic, not memory, decides."""

TORCH_ADVANTAGE = 2.0
"""How much faster torch's products must be before a prefill goes there: its other operations are slower."""


def _scaled(head: Any, scaling: LogitScaling) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of an output projection that makes logits as they are in the end."""
    factor = scaling.factor / scaling.divisor
    if factor == 1:
        return head.weight, head.bias
    return head.weight * factor, None if head.bias is None else head.bias * factor


class CpuEngine:
    """Runs the decoder of `model` on packed copies of its weights.

    `weights` is the format of the base model's matrices; sums, norms, router margins and the residual stream are
    float32 in every format, and forecasters stay in float32 or bfloat16. Raises InputError, saying why, for models
    that it cannot run.
    """

    phases = PHASES
    holds = True

    def __init__(
        self, model: Any, weights: Packed = "float32", threads: int | None = None, policy: Policy = "exact"
    ) -> None:
        if weights not in PACKED:
            raise InputError(f"weights {weights!r} are not known", f"Choose one of {', '.join(PACKED)}")
        if reason := unsupported(model):
            raise InputError(f"the native engine cannot run this model: {reason}", "Use execution='sparse'")
        self.library, self.weights = library(), weights
        self.threads = threads or torch.get_num_threads()
        self.packer = Packer(self.library, weights, self.threads)
        self.identity = identity(model)
        self.content = {step: content(self.library, copied(model), self.threads, step) for step in (1, PAGE)}
        decoder, config = model.decoder, model.config
        family = family_of(model)
        attention = decoder.layers[0].attention_routing.unit.module(decoder.layers[0])
        self.kv_shape = (config.num_key_value_heads, attention.head_dim, self.packer.panel)
        self.units = 2 * len(decoder.layers)
        layers = [
            self.packer.layer(layer, family, layer.attention_routing, layer.ffn_routing, model.costs[2 * i])
            for i, layer in enumerate(decoder.layers)
        ]
        self.layers = (Layer * len(layers))(*layers)
        head = model.get_output_embeddings()
        self.model = Model(
            layers=self.layers,
            final_norm=self.packer.vector(decoder.norm.weight),
            head=self.packer.linear(*_scaled(head, logit_scaling(family, config)), self.packer.head),
            n_layers=len(layers),
            d=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=attention.head_dim,
            ff=config.intermediate_size,
            threads=self.threads,
            eps=decoder.norm.variance_epsilon,
            scale=family.scale(attention),
            qk_eps=getattr(getattr(attention, "q_norm", None), "variance_epsilon", 1e-6),
        )
        self.keep_cache_in(cast(torch.dtype, FORMATS[weights].of("cache").dtype))
        self.vocabulary = head.weight.shape[0]
        self.prices = Prices()
        self.torch_prefill = False
        self.table: PriceTable | None = None
        self.policy = policy
        self._seconds: Tensor | None = None
        self._scratch = ctypes.c_void_p(self.library.ir_scratch())

    def __del__(self) -> None:
        if getattr(self, "_scratch", None):
            self.library.ir_free(self._scratch)

    def is_of(self, model: Any, *, sample: bool = False) -> bool:
        """Whether the model's weights are still those that were packed. `sample`: compare a 64th of them."""
        step = PAGE if sample else 1
        return content(self.library, copied(model), self.threads, step) == self.content[step]

    @contextmanager
    def checked(self, layers: int) -> Iterator[None]:
        """Run no more than some layers, and exactly as the routers say: for checks."""
        whole, prices = self.model.n_layers, self.prices
        self.model.n_layers, self.prices = layers, Prices()
        try:
            yield
        finally:
            self.model.n_layers, self.prices = whole, prices

    def keep_cache_in(self, dtype: torch.dtype) -> None:
        """Keep keys and values in float32 or bfloat16 from now on (bfloat16 is the default below float32 weights)."""
        self.kv_dtype = dtype
        self.model.kv_type = FORMATS[packed_of(dtype)].id

    @property
    def policy(self) -> Policy:
        """Setting it to `auto` times what is not in the cache yet (some seconds, on an idle machine)."""
        return self._policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        if policy == "auto":
            self.use_prices(self.table or price_table(self))
        else:
            self._policy: Policy = "exact"
            self.prices, self.torch_prefill = Prices(), False

    def use_prices(self, table: PriceTable) -> None:
        """The policy `auto` by this table: execute whole calls of a unit where skipping some rows would take longer."""
        self._policy, self.table = "auto", table
        faster = table.torch_macs_per_second > TORCH_ADVANTAGE * table.macs_per_second
        self.torch_prefill = faster and FORMATS[self.weights].has_dtype
        execute = [table.per_row(seconds) for seconds in (table.attention, table.ffn)]
        forecast = table.per_row(table.forecaster)
        approximate = [forecast, forecast + table.per_row(table.slice)]
        self.prices = Prices(limit=len(forecast))
        for kind in range(2):
            self.prices.execute[kind] = execute[kind].data_ptr()
            self.prices.approximate[kind] = approximate[kind].data_ptr()
        self._price_tensors = (*execute, *approximate)

    @property
    def balance(self) -> Balance:
        """The machine's rates, measured on first use: what limits are made of."""
        return (self.table or price_table(self)).balance

    @property
    def bytes(self) -> int:
        """Memory of the packed weights."""
        return sum(t.numel() * t.element_size() for t in self.packer.kept)

    @contextmanager
    def profiled(self) -> Iterator[dict[str, float]]:
        """Time the forwards within: gives a mapping that holds the seconds of each of the `phases` afterwards."""
        found: dict[str, float] = {}
        seconds = self._seconds = torch.zeros(len(self.phases), dtype=torch.float64)
        try:
            yield found
        finally:
            self._seconds = None
            found.update(zip(self.phases, seconds.tolist(), strict=True))

    def fresh_layers(self) -> list[PackedLayer]:
        return [PackedLayer(*self.kv_shape, self.kv_dtype) for _ in range(self.units // 2)]

    def leaves_to_torch(self, rows: int) -> bool:
        """Whether torch's own products would do a call of so many rows faster, having matrix instructions for it.

        Only for formats that torch has, too; the cache goes back and forth.
        """
        return self.torch_prefill and rows >= MANY_ROWS

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
        """Logits float32 [B, keep, vocabulary] of the last `keep` positions, or normed hidden states [B, N, d].

        `embeddings` [B, N, d] are read, not changed; `rope` is (cos, sin), each [B or 1, N, head_dim]. `cache` must
        be accepted (see `accepts`); it gets the new keys. `forced` bool [units, B, N] replaces the routers' choices;
        a rule that is `held` needs the `history` of the texts, to which the call's tokens are added.
        Raises InputError for a cache of another batch size and tables of another length: C++ would not notice.
        """
        batch, length, d = embeddings.shape
        hidden = embeddings.to(torch.float32, copy=True).contiguous()
        cos, sin = (part.float().expand(batch, -1, -1).contiguous() for part in rope)
        if cos.shape != (batch, length, self.model.head_dim) or len(rows.start) != batch:
            raise InputError(f"{tuple(cos.shape)} are no positions of {batch} x {length} tokens", "Give one for each")
        past, layers = self._room(cache, batch, length, state.original)
        gates = torch.empty(self.units, batch, length, dtype=torch.bool)
        output = torch.empty(batch, keep, self.vocabulary) if keep else torch.empty(batch, length, d)
        forced = None if forced is None else forced.to(torch.uint8).contiguous()
        pointers = ctypes.c_void_p * len(layers)
        # Named, so that they live as long as the call.
        keys = pointers(*[None if layer.keys is None else layer.keys.data_ptr() for layer in layers])
        values = pointers(*[None if layer.values is None else layer.values.data_ptr() for layer in layers])
        decision = state.decision
        limits = None if decision.dense else decision.limits(rows.contexts(past, length)).contiguous()
        holding, counts = self._held(decision, history, batch) if decision.held and forced is None else (None, None)
        shares = None if holding is None else torch.tensor(holding.shares, dtype=torch.float32)
        call = Call(
            hidden=hidden.data_ptr(),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            valid=None if rows.valid is None else rows.valid.data_ptr(),
            start=rows.start.data_ptr(),
            keys=ctypes.addressof(keys),
            values=ctypes.addressof(values),
            forced=None if forced is None else forced.data_ptr(),
            limits=None if limits is None else limits.data_ptr(),
            shares=None if shares is None else shares.data_ptr(),
            approximated=None if counts is None else counts.data_ptr(),
            gates=gates.data_ptr(),
            executed=stats.executed.data_ptr(),
            executed_keys=stats.executed_keys.data_ptr(),
            calls=stats.calls.data_ptr(),
            normed=output.data_ptr() if not keep else None,
            logits=output.data_ptr() if keep else None,
            seconds=None if self._seconds is None else self._seconds.data_ptr(),
            prices=self.prices,
            batch=batch,
            length=length,
            past=past,
            capacity=cast(Tensor, layers[0].values).shape[2],
            keep=keep,
            dense=2 if decision.original else int(decision.dense),
            gain=0.0 if holding is None else holding.gain,
            soft=0.0 if holding is None else holding.soft,
        )
        self.library.ir_forward(ctypes.byref(self.model), ctypes.byref(call), self._scratch)
        for layer in self._keeping(layers, state.original):
            layer.length = past + length
        state.forward.valid = None if rows.valid is None else rows.valid.bool()
        state.forward.gates = {} if state.original else GateBlock(gates)
        return output

    def _held(self, decision: DecisionRule, history: History | None, batch: int) -> tuple[Holding, Tensor]:
        """What C++ holds each text to, and the counts that it adds to.

        Raises InputError for a rule or a history that it would misread.
        """
        if (holding := decision.holding) is None:
            raise InputError(f"the CPU engine does not know how a {type(decision).__name__} holds", "Use sparse")
        if self.policy == "auto":
            raise InputError("policy='auto' executes more than a held rule asks for", "Use policy='exact'")
        if history is None:
            raise InputError("a held rule needs the history of the texts", "Call the model, which keeps it")
        check_units(holding.shares, self.units)
        counts = history.approximated
        if counts.shape != (self.units, batch) or counts.dtype != torch.int32 or not counts.is_contiguous():
            raise InputError(f"a history {tuple(counts.shape)} is none of {batch} texts", "Use History.empty")
        return holding, counts

    def head(self, hidden: Tensor) -> Tensor:
        """Logits float32 [rows, vocabulary] of normed hidden states [rows, d], by the packed head."""
        x = hidden.float().contiguous()
        out = torch.empty(len(x), self.vocabulary)
        at = ctypes.c_void_p
        self.library.ir_linear(
            ctypes.byref(self.model.head), at(x.data_ptr()), len(x), at(out.data_ptr()), self.threads
        )
        return out

    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """float32 [rows]: minus the log probabilities of `targets` int64 [rows] after normed states [rows, d].

        Logits are never stored. A target outside the vocabulary (-100) is none, and loses 0.
        """
        x, wanted = hidden.float().contiguous(), targets.contiguous()
        out = torch.empty(len(x))
        at = ctypes.c_void_p
        self.library.ir_loss(
            ctypes.byref(self.model.head),
            at(x.data_ptr()),
            len(x),
            at(wanted.data_ptr()),
            at(out.data_ptr()),
            self.threads,
        )
        return out

    def _is_own(self, layer: Any) -> bool:
        return isinstance(layer, PackedLayer) and layer.dtype == self.kv_dtype

    def _keeping(self, layers: Sequence[PackedLayer], original: bool) -> list[PackedLayer]:
        """The layers of a cache that get keys."""
        return [one for one, layer in zip(layers, self.layers, strict=True) if original or not layer.is_static]

    def _room(self, cache: Cache | None, batch: int, length: int, original: bool) -> tuple[int, Sequence[PackedLayer]]:
        if cache is None:  # nothing is kept: one layer's room serves all
            layer = PackedLayer(*self.kv_shape, self.kv_dtype)
            layer.reserve(batch, length)
            return 0, [layer] * (self.units // 2)
        layers = engine_layers(cache, batch, self._is_own, self.fresh_layers)
        past, keeping = layers[0].length, self._keeping(layers, original)
        mixed = original and any(layer.is_static for layer in self.layers)  # else all have grown together
        if mixed and any(layer.length != past for layer in keeping):
            raise InputError(
                "the cache has no keys of layers that were static: the original model cannot go on with it",
                "Use a fresh cache",
            )
        if not all(layer.has_room(past + length) for layer in (keeping if mixed else keeping[:1])):
            for layer in keeping:
                layer.reserve(batch, past + length + 1)
        if mixed and len({cast(Tensor, layer.values).shape[2] for layer in keeping}) > 1:
            raise InputError("the cache's layers have room for different lengths", "Use a fresh cache")
        return past, layers
