"""When a native engine does a forward, which one, and when it is left to the torch back ends."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..progress import Progress
from ..routing.decision import AlwaysExecute, Threshold
from ..routing.routed_unit import RoutingState
from .call import NativeEngine, Policy, Rows, versions
from .engine_cache import accepts, is_packed, use_plain

Weights = Literal["float32", "bfloat16", "float16", "int8", "int4"]
"""Formats of an engine's weights: the CPU engine packs its own (not float16), the GPU engine takes the model's."""


def native_reason(model: Any, progress: Progress | None = None) -> str | None:
    """Why there is no native engine for a model where it is; None when there is. Compiles it if need be, saying so."""
    if model.device.type == "cpu":
        from .cpu.availability import native_reason as reason
    else:
        from .gpu.availability import native_reason as reason
    return reason(model, progress)


class NativeExecution:
    """The engine of a model as its routing state holds it: made on first use, and again when weights changed.

    The model's device decides which engine. `weights` None is the model's own format.
    """

    def __init__(self, weights: Weights | None = None, threads: int | None = None, policy: Policy = "auto") -> None:
        self.weights, self.threads, self.policy = weights, threads, policy
        self.engine: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> NativeExecution:
        return NativeExecution(self.weights, self.threads, self.policy)  # a copied model packs its own weights

    def __reduce__(self) -> Any:
        return NativeExecution, (self.weights, self.threads, self.policy)  # and so does one in another process

    def of(self, model: Any) -> Any:
        """The engine of `model`. Raises InputError when there is none that can run it."""
        if self.engine is None or self.engine.version != versions(model):
            self.engine = None  # first free the old copy
            if model.device.type == "cpu":
                from .cpu.engine import CpuEngine

                default: Weights = "bfloat16" if model.dtype == torch.bfloat16 else "float32"
                self.engine = CpuEngine(model, self.weights or default, self.threads, self.policy)  # type: ignore[arg-type]
            else:
                from .gpu.engine import GpuEngine

                self.engine = GpuEngine(model, self.weights, self.policy)
        return self.engine


@torch.compiler.disable  # an engine is compiled already; tracing into it can only fail
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


@torch.compiler.disable
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

    def __init__(self, engine: NativeEngine, embeddings: Tensor, rows: Rows, cache: Any, places: Tensor | None) -> None:
        self.engine, self.embeddings, self.rows, self.cache, self.places = engine, embeddings, rows, cache, places

    def run(self, model: Any, keep: int = 0) -> Tensor:
        state, stats = model.routing_state, model.decoder.routing_stats_counter
        length, device = self.embeddings.shape[1], self.embeddings.device
        past = 0 if self.cache is None else self.cache.get_seq_length()
        places = torch.arange(past, past + length, device=device)[None] if self.places is None else self.places
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
    if not accepts(cache):
        return None
    if embeddings is None:
        embeddings = model.decoder.embed_tokens(kwargs["input_ids"])
    batch, length = embeddings.shape[:2]
    past = 0 if cache is None else cache.get_seq_length()
    if mask is not None and tuple(mask.shape) != (batch, past + length):
        return None
    rows = _rows(mask, cache, batch, length, past)
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
    if cache is not None:
        cache.first_keys = rows.start
    return _Plan(engine, embeddings, rows, cache, kwargs.get("position_ids"))


def _rows(mask: Tensor | None, cache: Any, batch: int, length: int, past: int) -> Rows | None:
    """Where the real tokens are. On a GPU the mask of a further token is not looked at: that would stop the device.

    A mask only ever grows by ones while one cache lives; what a sequence began with is noted on the cache.
    """
    start = getattr(cache, "first_keys", None)
    if past and length == 1 and mask is not None and mask.is_cuda and start is not None and len(start) == batch:
        return Rows(start, None)
    return Rows.from_mask(mask, batch, length)
