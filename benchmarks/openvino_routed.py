"""Would OpenVINO be the better CPU back end? The same routed model as an OpenVINO graph, dense and routed.

    python benchmarks/openvino_routed.py export                  # in this library's environment
    python -m venv ov && ov/bin/pip install openvino nncf
    ov/bin/python benchmarks/openvino_routed.py run              # writes docs/data/speed/openvino.json

Decode: a stateful graph of one token with an `If` on each unit's margin. Prefill: executed rows are gathered, computed
and scattered. Weights float32, or int8 / int4 (groups of 32) by NNCF with routers and forecasters left alone. Compare
with `native` in benchmarks/speed.py at the same prompt length: there the limits are stated, too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "out" / "openvino"
PROMPT, NEW, REPEATS = 128, 32, 3
TARGETS = (0.25, 0.4)


def export() -> None:
    """Weights, rotary tables, prompt and thresholds as one .npz."""
    import numpy
    import torch

    from informed_routing.assets import load_tokenizer
    from informed_routing.evaluation.speed import prompt_text
    from informed_routing.routed_model import RoutedModelForCausalLM
    from informed_routing.routing.dial import threshold_for

    model: Any = RoutedModelForCausalLM.from_pretrained(ROOT / "out/quality/dial", dtype=torch.float32)
    arrays: dict[str, Any] = {name: value.detach().numpy() for name, value in model.named_parameters()}
    places = torch.arange(PROMPT + NEW)[None]
    cos, sin = model.decoder.rotary_emb(torch.zeros(1, 1, 1), position_ids=places)
    ids = prompt_text(["demo:wiki", "demo:c4"], load_tokenizer("demo:smollm2-135m"), 20_000)[: PROMPT + NEW]
    arrays |= {"cos": cos[0].numpy(), "sin": sin[0].numpy(), "ids": ids.numpy()}
    arrays["thresholds"] = numpy.array([threshold_for(model.routing_config, t, "units") for t in TARGETS])
    with torch.inference_mode():
        arrays["dense_logits"] = model_logits(model, ids[:PROMPT], 0.0)
        arrays["routed_logits"] = model_logits(model, ids[:PROMPT], TARGETS[0])
    WORK.mkdir(parents=True, exist_ok=True)
    numpy.savez(WORK / "model.npz", **arrays)
    print(f"wrote {WORK / 'model.npz'}")


def model_logits(model: Any, ids: Any, target: float) -> Any:
    model.set_sparsity(target, "units")
    return model(input_ids=ids[None], logits_to_keep=1).logits[0, -1].numpy()


# ---------------------------------------------------------------------------------------------------------
# The graph
# ---------------------------------------------------------------------------------------------------------


class Graph:
    """A routed (or dense) Llama of the exported weights; one token with state, or a whole prompt without."""

    def __init__(self, arrays: Any, threshold: float | None, decode: bool) -> None:
        import numpy
        import openvino as ov
        from openvino import opset15 as op

        self.w, self.op, self.ov, self.np = arrays, op, ov, numpy
        self.threshold, self.decode = threshold, decode
        self.layers = 1 + max(int(n.split(".")[2]) for n in arrays.files if n.startswith("model.layers."))
        self.heads, self.head_dim = 9, 64
        self.kv = arrays["model.layers.0.self_attn.k_proj.weight"].shape[0] // self.head_dim

    def constant(self, value: Any, kind: Any = None) -> Any:
        return self.op.constant(self.np.asarray(value, dtype=kind or self.np.float32))

    def linear(self, x: Any, name: str, label: str = "") -> Any:
        weight = self.op.constant(self.w[f"{name}.weight"], name=label or name)
        y = self.op.matmul(x, weight, False, True)
        return self.op.add(y, self.constant(self.w[f"{name}.bias"])) if f"{name}.bias" in self.w.files else y

    def norm(self, x: Any, name: str) -> Any:
        op = self.op
        mean = op.reduce_mean(op.multiply(x, x), self.constant([-1], self.np.int64), True)
        return op.multiply(
            op.divide(x, op.sqrt(op.add(mean, self.constant(1e-5)))), self.constant(self.w[f"{name}.weight"])
        )

    def split_heads(self, x: Any, heads: int) -> Any:
        op, i64 = self.op, self.np.int64
        shaped = op.reshape(x, self.constant([0, 0, heads, self.head_dim], i64), True)
        return op.transpose(shaped, self.constant([0, 2, 1, 3], i64))

    def rotate(self, x: Any, cos: Any, sin: Any) -> Any:
        op, half, i64 = self.op, self.head_dim // 2, self.np.int64
        first, second = op.split(x, self.constant(-1, i64), 2).outputs()
        turned = op.concat([op.negative(second), first], -1)
        assert half
        return op.add(op.multiply(x, cos), op.multiply(turned, sin))

    def attend(self, x: Any, keys: Any, values: Any, cos: Any, sin: Any, mask: Any, layer: int) -> Any:
        """Queries of x, attention, output projection."""
        op, i64 = self.op, self.np.int64
        name = f"model.layers.{layer}.self_attn"
        q = self.rotate(self.split_heads(self.linear(x, f"{name}.q_proj"), self.heads), cos, sin)
        group = self.heads // self.kv

        def repeat(part: Any) -> Any:
            wide = op.unsqueeze(part, self.constant(2, i64))
            wide = op.broadcast(wide, self.constant([1, 1, group, 1, 1], i64), broadcast_spec="BIDIRECTIONAL")
            return op.reshape(wide, self.constant([0, self.heads, -1, self.head_dim], i64), True)

        if mask is None:
            mixed = op.scaled_dot_product_attention(q, repeat(keys), repeat(values))
        else:
            mixed = op.scaled_dot_product_attention(q, repeat(keys), repeat(values), mask)
        rows = op.transpose(mixed, self.constant([0, 2, 1, 3], i64))
        return self.linear(
            op.reshape(rows, self.constant([0, 0, self.heads * self.head_dim], i64), True), f"{name}.o_proj"
        )

    def ffn(self, x: Any, layer: int) -> Any:
        name = f"model.layers.{layer}.mlp"
        gate = self.op.swish(self.linear(x, f"{name}.gate_proj"))
        return self.linear(self.op.multiply(gate, self.linear(x, f"{name}.up_proj")), f"{name}.down_proj")

    def forecast(self, x: Any, unit: str) -> Any:
        name = f"{unit}.forecaster"
        return self.linear(self.linear(x, f"{name}.inner", f"keep/{name}.inner"), f"{name}.outer", f"keep/{name}.outer")

    def executes(self, x: Any, unit: str) -> Any:
        """[1, N] booleans."""
        op, i64 = self.op, self.np.int64
        weight, bias = self.w[f"{unit}.router.outer.weight"], self.w[f"{unit}.router.outer.bias"]
        row = op.constant((weight[1] - weight[0])[None], name=f"keep/{unit}.router")
        margin = op.add(op.matmul(x, row, False, True), self.constant(bias[1] - bias[0]))
        return op.greater(op.squeeze(margin, self.constant([-1], i64)), self.constant(self.threshold))

    def branch(self, condition: Any, then: Any, otherwise: Any, inputs: list[Any]) -> Any:
        """`If` over two functions of the same inputs (shapes kept)."""
        op, ov = self.op, self.ov
        chosen = op.if_op(op.reshape(condition, self.constant([1], self.np.int64), False).output(0))
        bodies = []
        for function in (then, otherwise):
            parameters = [op.parameter(x.get_partial_shape(), ov.Type.f32) for x in inputs]
            bodies.append((ov.Model([op.result(function(*parameters))], parameters), parameters))
        chosen.set_then_body(bodies[0][0])
        chosen.set_else_body(bodies[1][0])
        for position, x in enumerate(inputs):
            chosen.set_input(x, bodies[0][1][position], bodies[1][1][position])
        return chosen.set_output(bodies[0][0].results[0], bodies[1][0].results[0])

    def build(self) -> Any:
        op, ov, i64 = self.op, self.ov, self.np.int64
        length = 1 if self.decode else PROMPT
        ids = op.parameter([1, length], ov.Type.i64, "ids")
        cos = op.parameter([1, 1, length, self.head_dim], ov.Type.f32, "cos")
        sin = op.parameter([1, 1, length, self.head_dim], ov.Type.f32, "sin")
        hidden = op.gather(self.constant(self.w["model.embed_tokens.weight"]), ids, self.constant(0, i64)).output(0)
        mask = self.np.triu(self.np.full((PROMPT, PROMPT), -1e4, self.np.float32), 1)
        causal = op.constant(mask, name="keep/causal")  # not a weight, though NNCF would take it for one
        sinks: list[Any] = []
        for layer in range(self.layers):
            hidden = self.attention_unit(hidden, layer, cos, sin, causal, sinks)
            hidden = self.ffn_unit(hidden, layer)
        last = op.gather(self.norm(hidden, "model.norm"), self.constant([length - 1], i64), self.constant(1, i64))
        head = op.constant(self.w["model.embed_tokens.weight"], name="head")
        logits = op.result(op.matmul(last, head, False, True))
        return ov.Model([logits], sinks, [ids, cos, sin], "routed")

    def attention_unit(self, hidden: Any, layer: int, cos: Any, sin: Any, causal: Any, sinks: list[Any]) -> Any:
        op, i64 = self.op, self.np.int64
        block = f"model.layers.{layer}"
        x = self.norm(hidden, f"{block}.input_layernorm")
        keys = self.rotate(self.split_heads(self.linear(x, f"{block}.self_attn.k_proj"), self.kv), cos, sin)
        values = self.split_heads(self.linear(x, f"{block}.self_attn.v_proj"), self.kv)
        if self.decode:
            keys, values = (self.remember(part, f"{kind}{layer}", sinks) for kind, part in (("k", keys), ("v", values)))
        unit = f"{block}.attention_routing"

        def run(x: Any, h: Any, k: Any, v: Any, c: Any, s: Any) -> Any:
            return op.add(h, self.attend(x, k, v, c, s, None if self.decode else causal, layer))

        def guess(x: Any, h: Any, *_: Any) -> Any:
            return op.add(h, self.forecast(x, unit))

        if self.threshold is None:
            return run(x, hidden, keys, values, cos, sin)
        executes = self.executes(x, unit)
        outputs = [part.output(0) if hasattr(part, "output") else part for part in (x, hidden, keys, values, cos, sin)]
        if self.decode:
            return self.branch(executes, run, guess, outputs)

        def rows(part: Any, index: Any, axis: int) -> Any:
            return op.gather(part, index, self.constant(axis, i64))

        def some(index: Any) -> Any:
            mask = rows(causal, index, 0)
            return self.attend(rows(x, index, 1), keys, values, rows(cos, index, 2), rows(sin, index, 2), mask, layer)

        return self.scatter(hidden, x, executes, some, unit)

    def ffn_unit(self, hidden: Any, layer: int) -> Any:
        op, i64 = self.op, self.np.int64
        block = f"model.layers.{layer}"
        x = self.norm(hidden, f"{block}.post_attention_layernorm")
        unit = f"{block}.ffn_routing"
        if self.threshold is None:
            return op.add(hidden, self.ffn(x, layer))
        executes = self.executes(x, unit)
        if self.decode:
            outputs = [part.output(0) if hasattr(part, "output") else part for part in (x, hidden)]
            return self.branch(
                executes,
                lambda x, h: op.add(h, self.ffn(x, layer)),
                lambda x, h: op.add(h, self.forecast(x, unit)),
                outputs,
            )
        some = lambda index: self.ffn(op.gather(x, index, self.constant(1, i64)), layer)  # noqa: E731
        return self.scatter(hidden, x, executes, some, unit)

    def scatter(self, hidden: Any, x: Any, executes: Any, some: Any, unit: str) -> Any:
        """hidden + what executed rows compute and the others forecast."""
        op, i64 = self.op, self.np.int64
        flat = op.squeeze(executes, self.constant([0], i64))

        def places(flags: Any) -> Any:
            return op.squeeze(op.non_zero(op.convert(flags, "i32"), "i64"), self.constant([0], i64))

        yes, no = places(flat), places(op.logical_not(flat))
        one = self.constant(1, i64)
        guess = self.forecast(op.gather(x, no, one), unit)
        updates = op.concat([some(yes), guess], 1)
        order = op.concat([yes, no], 0)
        return op.add(hidden, op.scatter_update(hidden, order, updates, one))

    def remember(self, part: Any, name: str, sinks: list[Any]) -> Any:
        op, ov = self.op, self.ov
        shape = ov.PartialShape([1, self.kv, -1, self.head_dim])
        empty = self.constant(self.np.zeros((1, self.kv, 0, self.head_dim)))
        past = op.read_value(empty, name, ov.Type.f32, shape)
        whole = op.concat([past, part], 2)
        sinks.append(op.assign(whole, name))
        return whole


# ---------------------------------------------------------------------------------------------------------
# Timing
# ---------------------------------------------------------------------------------------------------------


def compressed(model: Any, weights: str) -> Any:
    if weights == "float32":
        return model
    import nncf

    keep = nncf.IgnoredScope(patterns=[".*keep/.*"], validate=False)
    if weights == "int8":
        return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM, ignored_scope=keep)
    mode = nncf.CompressWeightsMode.INT4_ASYM
    return nncf.compress_weights(model, mode=mode, group_size=32, ratio=1.0, ignored_scope=keep)


def run() -> None:
    import numpy
    import openvino as ov

    arrays = numpy.load(WORK / "model.npz")
    core = ov.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    ids, cos, sin = arrays["ids"], arrays["cos"][None, None], arrays["sin"][None, None]
    engines: dict[str, Any] = {}
    for weights in ("float32", "int8", "int4"):
        for label, threshold in (("dense", None), *zip(("25 %", "40 %"), arrays["thresholds"], strict=True)):
            for phase in ("prefill", "decode"):
                graph = Graph(arrays, threshold, phase == "decode").build()
                engines[f"{weights} {label} {phase}"] = core.compile_model(compressed(graph, weights), "CPU", settings)
                print(f"compiled {weights} {label} {phase}", flush=True)

    def prefill(engine: Any) -> tuple[float, Any]:
        request = engine.create_infer_request()
        feed = {0: ids[None, :PROMPT], 1: cos[:, :, :PROMPT], 2: sin[:, :, :PROMPT]}
        start = time.perf_counter()
        logits = next(iter(request.infer(feed).values()))
        return time.perf_counter() - start, logits[0, 0]

    def decode(engine: Any) -> tuple[float, Any]:
        request = engine.create_infer_request()
        start, logits = 0.0, None
        for place in range(PROMPT + NEW):
            if place == PROMPT:
                start = time.perf_counter()
            rope = (table[:, :, place : place + 1] for table in (cos, sin))
            feed = dict(enumerate((ids[None, place : place + 1], *rope)))
            logits = next(iter(request.infer(feed).values()))[0, 0]
            logits.argmax()
        return (time.perf_counter() - start) / NEW, logits

    seconds: dict[str, list[float]] = {name: [] for name in engines}
    errors = {}
    for turn in range(REPEATS + 1):
        for name, engine in engines.items():
            took, logits = prefill(engine) if name.endswith("prefill") else decode(engine)
            if turn:
                seconds[name].append(took)
            if name.endswith(("dense prefill", "25 % prefill")):  # quantised paths can be fast and wrong
                wanted = arrays["dense_logits" if "dense" in name else "routed_logits"]
                errors[name] = float(abs(logits - wanted).max())
        print(f"round {turn} of {REPEATS}", flush=True)
    rows = []
    for name, found in seconds.items():
        weights, rest = name.split(" ", 1)
        label, phase = rest.rsplit(" ", 1)
        median = statistics.median(found)
        dense = statistics.median(seconds[f"{weights} dense {phase}"])
        rows.append(
            {
                "weights": weights,
                "target": label,
                "phase": phase,
                "median": median,
                "min": min(found),
                "max": max(found),
                "tokens_per_second": (PROMPT if phase == "prefill" else 1) / median,
                "speedup_vs_dense": dense / median,
                "logit_error": errors.get(name),
            }
        )
        print(f"{name:26} {1e3 * median:8.2f} ms  {dense / median:.2f}x  {errors.get(name, '')}")
    result = {"openvino": ov.__version__, "prompt_tokens": PROMPT, "new_tokens": NEW, "rows": rows}
    target = ROOT / "docs/data/speed/openvino.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("export", "run"))
    {"export": export, "run": run}[parser.parse_args().part]()
