"""The native engine that a model holds, and when it does a forward that is else left to the torch back ends."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..errors import InputError
from ..models import calls
from ..models.calls import Call
from ..routing.state import RoutingState
from .changes import identity
from .choose import make_engine
from .engine import NativeEngine, Policy
from .formats import Weights
from .history import history_of, keep_history
from .kv_layers import accepts, is_packed, use_plain
from .rows import Rows


class NativeExecution:
    """The engine of a model as its routing state holds it: made on first use, and again when the model has changed.

    The model's device decides which engine. `weights` None is the model's own format.
    """

    def __init__(self, weights: Weights | None = None, threads: int | None = None, policy: Policy = "exact") -> None:
        self.weights, self.threads = weights, threads
        self.engine: NativeEngine | None = None
        self._policy: Policy = policy
        self._refused: int | None = None
        self._fixed, self._compared = 0, False

    def __deepcopy__(self, memo: dict[int, Any]) -> NativeExecution:
        return NativeExecution(self.weights, self.threads, self.policy)  # a copied model packs its own weights

    def __reduce__(self) -> Any:
        return NativeExecution, (self.weights, self.threads, self.policy)  # so does one in another process

    @property
    def policy(self) -> Policy:
        """Of the engine, made already or not; setting it packs nothing again."""
        return self._policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        self._policy = policy
        if self.engine is not None:
            self.engine.policy = policy

    @contextmanager
    def exactly(self) -> Iterator[None]:
        """Do what the routers say, and no more, within."""
        before = self.policy
        self.policy = "exact"
        try:
            yield
        finally:
            self.policy = before

    def of(self, model: Any) -> NativeEngine:
        """The engine of `model` as it is now. Raises InputError when there is none that can run it."""
        return self._made(model, identity(model), sample=False)

    def ready(self, model: Any, *, further: bool) -> NativeEngine | None:
        """The engine for a call; None, after a warning, where it can no longer run the model (an adapter, a hook).

        All weights are compared before a text begins; for `further` tokens of one only a sample of them, and within
        `fixed` once.
        """
        if self._fixed and self._compared and self.engine is not None:
            return self.engine
        seen = identity(model)
        if self._refused == seen:
            return None
        try:
            engine = self._made(model, seen, sample=further)
        except InputError as error:
            self._refused = seen
            warnings.warn(f"{error.what}: PyTorch computes, with the same results", RuntimeWarning, stacklevel=2)
            return None
        self._compared = True
        return engine

    def _made(self, model: Any, seen: int, *, sample: bool) -> NativeEngine:
        if self.engine is None or self.engine.identity != seen or not self.engine.is_of(model, sample=sample):
            self.engine = None  # first free the old copy
            self.engine = make_engine(model, self.weights, self.threads, self.policy)
        return self.engine

    @contextmanager
    def fixed(self) -> Iterator[None]:
        """Compare the weights once for all calls within: nobody may change the model there."""
        if not self._fixed:
            self._compared = False
        self._fixed += 1
        try:
            yield
        finally:
            self._fixed -= 1


@torch.compiler.disable  # an engine is compiled already; tracing into it can only fail
def causal_lm(model: Any, call: Call) -> CausalLMOutputWithPast | None:
    """The forward of a routed causal LM by the engine, or None when a torch back end must do it."""
    wanted = call.options.get("logits_to_keep", 0)
    if call.options.keys() - {"logits_to_keep"} or type(wanted) is not int or wanted < 0 or not may_run(model):
        return None
    if call.given.get("return_dict") is False or getattr(model.config, "return_dict", True) is False:
        return None
    asked = plan(model, call)
    if asked is None:
        return None
    length = asked.embeddings.shape[1]
    logits = asked.run(model, keep=min(wanted, length) or length)
    return calls.causal_lm_output(logits.to(model.dtype), asked.cache)


@torch.compiler.disable
def hidden_states(model: Any, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """Normed last hidden states [B, N, d] by the engine, or None."""
    if not may_run(model):
        return None
    asked = plan(model, Call({}, tokens=input_ids, mask=attention_mask, use_cache=False))
    return None if asked is None else asked.run(model).to(model.dtype)


def give_back(cache: Any) -> None:
    """Turn a packed cache into transformers' own before a torch back end reads it."""
    if is_packed(cache):
        use_plain(cache)


def may_run(model: Any) -> bool:
    """Inference with hard decisions and nobody watching."""
    state: RoutingState = model.routing_state
    if state.execution != "native" or model.training or torch.is_grad_enabled():
        return False
    if state.observer is not None or state.record_margins or state.kv != "keep":
        return False
    return state.decision.by_margin or (state.decision.held and state.decision.holding is not None)


@dataclass
class Plan:
    """What a call asks of the engine."""

    engine: NativeEngine
    embeddings: Tensor
    rows: Rows
    cache: Any
    places: Tensor | None

    def run(self, model: Any, keep: int = 0, forced: Tensor | None = None) -> Tensor:
        """See `NativeEngine.forward`."""
        state, stats = model.routing_state, model.decoder.routing_stats_counter
        length, device = self.embeddings.shape[1], self.embeddings.device
        past = 0 if self.cache is None else self.cache.get_seq_length()
        places = torch.arange(past, past + length, device=device)[None] if self.places is None else self.places
        rope = model.decoder.rotary_emb(self.embeddings.float(), position_ids=places)
        held = state.decision.held and forced is None
        history = history_of(self.cache, self.engine.units, len(self.embeddings)) if held else None
        output = self.engine.forward(
            self.embeddings, rope, self.rows, self.cache, state, stats, keep=keep, forced=forced, history=history
        )
        if history is not None:
            keep_history(self.cache, history, length)
        stats.add_tokens(
            length, past, self.rows.start, self.rows.valid, routed=not state.dense, original=state.original
        )
        return output


def forced_states(model: Any, engine: NativeEngine, ids: Tensor, gates: Tensor | None) -> Tensor:
    """Normed hidden states [B, N, d] of ids [B, N] by given gates, bool [units, B, N].

    No gates: as the decision rule says.
    """
    rows = Rows(torch.zeros(len(ids), dtype=torch.int32), None)
    return Plan(engine, _embedded(model, ids, None), rows, None, None).run(model, forced=gates)


def plan(model: Any, call: Call) -> Plan | None:
    """What the engine shall do; None where it does not understand all that the call says."""
    if call.rope is not None or calls.records(model, call.options):
        return None
    whole = 2 * len(model.decoder.layers[: model.config.num_hidden_layers]) == len(model.costs)
    if not whole or calls.is_watched(model.decoder):  # early exit, or a decoder that does more than its class
        return None
    mask, cache = call.mask, call.cache
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        return None
    if (call.tokens is None) == (call.embeddings is None) or not accepts(cache):
        return None
    batch, length = (call.embeddings if call.tokens is None else call.tokens).shape[:2]  # type: ignore[union-attr]
    past = 0 if cache is None else cache.get_seq_length()
    if mask is not None and tuple(mask.shape) != (batch, past + length):
        return None
    rows = _rows(mask, cache, batch, length, past)
    if rows is None or not _in_order(call.positions, rows, batch, length):
        return None
    engine = model.routing_state.native.ready(model, further=past > 0)
    if engine is None or engine.leaves_to_torch(batch * length):
        return None
    if model.routing_state.decision.held and not engine.holds:
        return None
    embeddings = _embedded(model, call.tokens, call.embeddings)
    if cache is None and (model.config.use_cache if call.use_cache is None else call.use_cache):
        cache = DynamicCache(config=model.config)
    if cache is not None:
        cache.first_keys = rows.start
    return Plan(engine, embeddings, rows, cache, call.positions)


def _embedded(model: Any, tokens: Tensor | None, embeddings: Tensor | None) -> Tensor:
    """What the first layer reads, [B, N, d], for ids or embeddings."""
    found: Tensor = model.decoder.embed_tokens(tokens) if embeddings is None else embeddings
    factor = model.units[0].unit.family.embedding_factor
    return found if factor is None else found * getattr(model.config, factor)


def _in_order(positions: Tensor | None, rows: Rows, batch: int, length: int) -> bool:
    """Whether the tokens of each row are one text: where positions start again, documents are packed in it."""
    if positions is None:
        return True
    if tuple(positions.shape) not in ((1, length), (batch, length)):
        raise InputError(f"{tuple(positions.shape)} are no positions of {batch} x {length} tokens", "Give one for each")
    if length == 1:
        return True
    real = None if rows.valid is None else rows.valid.bool().to(positions.device)
    return calls.consecutive(positions, real)


def _rows(mask: Tensor | None, cache: Any, batch: int, length: int, past: int) -> Rows | None:
    """Where the real tokens are. On a GPU the mask of a further token is not looked at: that would stop the device.

    A mask only ever grows by ones while one cache lives; what a sequence began with is noted on the cache.
    """
    start = getattr(cache, "first_keys", None)
    if past and length == 1 and mask is not None and mask.is_cuda and start is not None and len(start) == batch:
        return Rows(start, None)
    return Rows.from_mask(mask, batch, length)
