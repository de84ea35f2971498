"""Logits and text of every path against the masked reference, on the real model with random selections.

    python benchmarks/agreement.py agreement     # writes docs/data/speed/agreement.json

The reference computes both branches in float32, with the weights that a packed format stands for. Formats below float32
keep their keys and values in bfloat16, unless told otherwise: both are shown.
"""

from __future__ import annotations

import ctypes
import statistics
from typing import Any

import torch
from shared import FORMATS, PROGRESS, routed, run_sections, text
from torch import Tensor

from informed_routing.execution.cpu.engine import CpuEngine
from informed_routing.execution.rows import Rows
from informed_routing.routing.decision import Threshold

TRIALS, TEXTS, LENGTH, NEW = 200, 8, 48, 32


class Replay:
    """Gates of a whole forward [units, B, N], given out unit by unit."""

    def __init__(self, gates: Tensor) -> None:
        self.gates = iter(gates)

    def __call__(self, logits: Tensor) -> Tensor:
        return next(self.gates)


def standing_for(engine: Any) -> Any:
    """The routed model with float32 matrices that hold what the engine's packed format stands for."""
    model, at = routed(), ctypes.c_void_p

    def unpack(packed: Any) -> Tensor:
        out = torch.empty(packed.n, packed.k)
        engine.library.ir_unpack(packed.type, at(packed.data), packed.n, packed.k, at(out.data_ptr()))
        return out

    def put(linear: Any, weight: Tensor) -> None:
        linear.weight = torch.nn.Parameter(weight[: linear.out_features, : linear.in_features].contiguous())

    half = engine.packer.panel // 2
    for layer, packed in zip(model.decoder.layers, engine.layers, strict=True):
        keys, values = unpack(packed.kv).chunk(2)
        gate, up = unpack(packed.gate_up).unflatten(0, (-1, 2, half)).unbind(1)
        attention, ffn = layer.self_attn, layer.mlp
        put(attention.q_proj, unpack(packed.q))
        put(attention.k_proj, keys)
        put(attention.v_proj, values)
        put(attention.o_proj, unpack(packed.o))
        put(ffn.gate_proj, gate.flatten(0, 1))
        put(ffn.up_proj, up.flatten(0, 1))
        put(ffn.down_proj, unpack(packed.down))
        for unit, part in ((layer.attention_routing, packed.attention), (layer.ffn_routing, packed.ffn)):
            put(unit.forecaster.inner, unpack(part.forecast_in))
            put(unit.forecaster.outer, unpack(part.forecast_out))
    put(model.get_output_embeddings(), unpack(engine.model.head))
    return model.eval()


def forced(model: Any, engine: CpuEngine | None, ids: Tensor, gates: Tensor) -> Tensor:
    """Logits [1, N, vocabulary] with given gates [units, 1, N]; without an engine, by the torch back end."""
    if engine is None:
        model.set_decision(Replay(gates))
        return model(input_ids=ids, use_cache=False).logits
    model.set_decision(Threshold(0.0))
    embeddings = model.decoder.embed_tokens(ids)
    rope = model.decoder.rotary_emb(embeddings, position_ids=torch.arange(ids.shape[1])[None])
    rows = Rows(torch.zeros(1, dtype=torch.int32), None)
    state, stats = model.routing_state, model.stats
    return engine.forward(embeddings, rope, rows, None, state, stats, keep=ids.shape[1], forced=gates)


def compare(path: str, model: Any, engine: CpuEngine | None, reference: Any) -> dict[str, Any]:
    """One row of the table: errors over all trials, and how many greedy texts are the same."""
    prompts = text()[: TEXTS * LENGTH].view(TEXTS, LENGTH)
    generator = torch.Generator().manual_seed(17)
    errors = []
    PROGRESS.stage(path, TRIALS)
    for trial in range(TRIALS):
        ids = prompts[trial % TEXTS][None]
        share = torch.rand((), generator=generator)
        gates = torch.rand(len(model.units), 1, LENGTH, generator=generator) < share
        expected = forced(reference, None, ids, gates)
        errors.append(float((forced(model, engine, ids, gates) - expected).abs().max()))
        PROGRESS.advance(trial + 1)
    equal = 0
    for prompt in prompts:
        made = []
        for one in (model, reference):
            one.set_sparsity(0.25, "units")
            made.append(one.generate(input_ids=prompt[None], max_new_tokens=NEW, do_sample=False))
        equal += int(torch.equal(made[0], made[1]))
    return {
        "path": path,
        "largest": max(errors),
        "median": statistics.median(errors),
        "trials": TRIALS,
        "texts_equal": equal,
        "texts": TEXTS,
        "new_tokens": NEW,
    }


def agreement() -> Any:
    """Every path: the torch back end, and the engine with each format of weights and of the cache."""
    reference = routed()
    reference.set_execution("masked")
    rows = [compare("torch sparse", routed(), None, reference)]
    for weights in FORMATS:
        model = routed()
        model.set_execution("native", weights=weights, policy="exact")
        engine = model.routing_state.native.of(model)
        reference = standing_for(engine)
        reference.set_execution("masked")
        caches = (torch.float32,) if weights == "float32" else (torch.float32, torch.bfloat16)
        for cache in caches:
            engine.keep_cache_in(cache)
            name = str(cache).removeprefix("torch.")
            rows.append(compare(f"native {weights}, {name} cache", model, engine, reference))
    return rows


if __name__ == "__main__":
    run_sections(__doc__, (agreement,))
