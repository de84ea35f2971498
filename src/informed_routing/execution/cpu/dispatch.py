"""When the native engine does a forward, and when it leaves it to the torch back ends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from ...routing.decision import AlwaysExecute, Threshold
from ...routing.routed_unit import RoutingState
from .cache import is_packed, use_plain
from .engine import CpuEngine, Policy, Rows, versions
from .packing import Weights


class NativeExecution:
    """The engine of a model as its routing state holds it: made on first use, and again when weights changed."""

    def __init__(self, weights: Weights = "float32", threads: int | None = None, policy: Policy = "auto") -> None:
        self.weights, self.threads, self.policy = weights, threads, policy
        self.engine: CpuEngine | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> NativeExecution:
        return NativeExecution(self.weights, self.threads, self.policy)  # a copied model packs its own weights

    def of(self, model: Any) -> CpuEngine:
        """The engine of `model`. Raises InputError when the engine cannot run it."""
        if self.engine is None or self.engine.version != versions(model):
            self.engine = None  # first free the old copy
            self.engine = CpuEngine(model, self.weights, self.threads, self.policy)
        return self.engine


def causal_lm(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CausalLMOutputWithPast | None:
    """The forward of a routed causal LM by the engine, or None when a torch back end must do it."""
    wanted = kwargs.get("logits_to_keep", 0)
    if args or kwargs.get("labels") is not None or not isinstance(wanted, int) or not may_run(model):
        return None
    plan = _plan(model, kwargs)
    if plan is None:
        return None
    length = plan.embeddings.shape[1]
    logits = plan.run(model, keep=min(wanted, length) or length)
    return CausalLMOutputWithPast(logits=logits.to(model.dtype), past_key_values=plan.cache)  # type: ignore[arg-type]


def hidden_states(model: Any, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """Normed last hidden states [B, N, d] by the engine, or None."""
    if not may_run(model):
        return None
    plan = _plan(model, {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False})
    return None if plan is None else plan.run(model).to(model.dtype)


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
    return type(state.decision) in (AlwaysExecute, Threshold)


class _Plan:
    """What a call asks of the engine."""

    def __init__(self, engine: CpuEngine, embeddings: Tensor, rows: Rows, cache: Any, places: Tensor | None) -> None:
        self.engine, self.embeddings, self.rows, self.cache, self.places = engine, embeddings, rows, cache, places

    def run(self, model: Any, keep: int = 0) -> Tensor:
        state, stats, length = model.routing_state, model.stats, self.embeddings.shape[1]
        past = 0 if self.cache is None else self.cache.get_seq_length()
        places = torch.arange(past, past + length)[None] if self.places is None else self.places
        rope = model.decoder.rotary_emb(self.embeddings.float(), position_ids=places)
        output = self.engine.forward(self.embeddings, rope, self.rows, self.cache, state, stats, keep=keep)
        stats.add_tokens(length, past, self.rows.start, self.rows.valid, routed=not state.dense)
        return output


def _plan(model: Any, kwargs: dict[str, Any]) -> _Plan | None:
    config = model.config
    if any(kwargs.get(name) or getattr(config, name, False) for name in ("output_hidden_states", "output_attentions")):
        return None
    mask, cache, embeddings = (kwargs.get(name) for name in ("attention_mask", "past_key_values", "inputs_embeds"))
    if kwargs.get("return_dict") is False or (mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2)):
        return None
    if not CpuEngine.accepts(cache):
        return None
    if embeddings is None:
        embeddings = model.decoder.embed_tokens(kwargs["input_ids"])
    batch, length = embeddings.shape[:2]
    past = 0 if cache is None else cache.get_seq_length()
    if mask is not None and tuple(mask.shape) != (batch, past + length):
        return None
    rows = Rows.from_mask(mask, batch, length)
    if rows is None:
        return None
    native: NativeExecution = model.routing_state.native
    # Weights do not change between the tokens of one generation: comparing them once a prompt is enough.
    engine = native.engine if native.engine is not None and past and length == 1 else native.of(model)
    if engine.leaves_to_torch(batch * length):
        return None
    use_cache = kwargs.get("use_cache")
    if cache is None and (config.use_cache if use_cache is None else use_cache):
        cache = DynamicCache(config=config)
    return _Plan(engine, embeddings, rows, cache, kwargs.get("position_ids"))
