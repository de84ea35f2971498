"""Speed of routed models on this machine, section by section; each writes docs/data/speed/SECTION.json.

    python benchmarks/quality.py units-start units-100 macs-100   # the routed models, if they are not there yet
    python benchmarks/dial.py
    python benchmarks/speed.py --list
    python benchmarks/speed.py prefill decode                     # on an otherwise idle machine
    python benchmarks/speed_page.py                               # docs/benchmarks.md from what was measured

Engines run in turns on the same held-out text. `units` is the routed model with a unit budget at 25 and 40 %, `macs`
the one with a MAC budget at 35 % of the body's MACs.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from informed_routing.assets import load_model, load_texts, load_tokenizer, pack
from informed_routing.cli.loading import prompt_text
from informed_routing.cli.progress import make_progress
from informed_routing.evaluation.engines import CompiledEngine, Engine, RoutedEngine
from informed_routing.evaluation.environment import environment
from informed_routing.evaluation.perplexity import token_perplexity
from informed_routing.evaluation.speed import benchmark_rows, measure, prefill_callable
from informed_routing.files import write_json
from informed_routing.routed_model import RoutedModelForCausalLM
from informed_routing.routing.decision import AlwaysExecute, Threshold

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "data" / "speed"
UNITS, MACS = ROOT / "out/quality/dial", ROOT / "out/quality/macs-100"
BASE = "demo:smollm2-135m"
TEXTS = ("demo:wiki", "demo:c4")
FORMATS = ("float32", "bfloat16", "int8", "int4")
PROGRESS = make_progress(quiet=False)


def routed(folder: Path = UNITS) -> Any:
    return RoutedModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def text() -> Tensor:
    return prompt_text(list(TEXTS), load_tokenizer(BASE), 20_000)


def natives(model: Any, formats: Sequence[str]) -> list[Engine]:
    return [RoutedEngine(model, one) for one in formats]


def both_budgets(
    formats: Sequence[str], others: Callable[[Any], list[Engine]], **settings: Any
) -> list[dict[str, Any]]:
    """Rows of the unit budget beside other engines, and of the MAC budget."""
    model, found = routed(), []
    macs = routed(MACS)
    runs: list[tuple[str, tuple[float, ...], list[Engine]]] = [
        ("units", (0.25, 0.4), [*natives(model, formats), *others(model)]),
        ("macs", (0.35,), natives(macs, formats)),
    ]
    for budget, targets, engines in runs:
        rows = benchmark_rows(engines, text(), sparsities=targets, budget=budget, progress=PROGRESS, **settings)
        found += [{"budget": budget, **row} for row in rows]
    return found


def prefill() -> Any:
    """Prompts of 512 and 2,048 tokens."""

    def others(model: Any) -> list[Engine]:
        dense = load_model(BASE, dtype=torch.float32)[0]
        return [RoutedEngine(model), Engine(dense), CompiledEngine(dense)]

    return both_budgets(
        ("float32", "bfloat16"), others, prompt_tokens=(512, 2048), phases=("prefill",), repeats=7, profile=True
    )


def decode() -> Any:
    """Batch 1: 32 tokens after a prompt of 256."""

    def others(model: Any) -> list[Engine]:
        dense, half = (load_model(BASE, dtype=kind)[0] for kind in (torch.float32, torch.bfloat16))
        return [Engine(dense), CompiledEngine(dense), Engine(half, "transformers bfloat16")]

    return both_budgets(
        FORMATS, others, prompt_tokens=(256,), new_tokens=(32,), phases=("decode",), repeats=7, profile=True
    )


def batches() -> Any:
    """Decode of 8 and 32 sequences."""
    settings: dict[str, Any] = {"new_tokens": (16,), "phases": ("decode",), "repeats": 7}
    few = both_budgets(FORMATS, lambda _: [], prompt_tokens=(64,), batches=(8,), **settings)
    return few + both_budgets(FORMATS, lambda _: [], prompt_tokens=(32,), batches=(32,), **settings)


def perplexity(model: Any, limit: int = 16) -> dict[str, float]:
    """Perplexity and realised shares on the first held-out sequences of 512 tokens of each text."""
    tokenizer, found = load_tokenizer(BASE), {}
    for name in TEXTS:
        rows = pack(load_texts(name, "heldout"), tokenizer, 512)[:limit]
        model.reset_routing_stats()
        result = token_perplexity(model, rows, 1, PROGRESS)
        found[name.removeprefix("demo:")] = result.token_perplexity
        found[f"{name.removeprefix('demo:')} units"] = model.routing_stats()["units"]
        found[f"{name.removeprefix('demo:')} macs"] = model.routing_stats()["macs"]
    return found


def formats() -> Any:
    """Weights of each format, dense and routed: perplexity beside the speed of `prefill` and `decode`."""
    model, rows = routed(), []
    for one in FORMATS:
        engine = RoutedEngine(model, one)
        for target in (0.0, 0.25, 0.4):
            engine.use(target, "units")
            PROGRESS.stage(f"{one} {target}", 0)
            rows.append(
                {
                    "weights": one,
                    "target": target,
                    "megabytes": engine.holder.of(model).bytes / 1e6,
                    "perplexity": perplexity(model),
                }
            )
    return rows


def torchao() -> Any:
    """torchao's int8 weight-only under the torch back end: speed and perplexity of the four combinations."""
    from torchao import __version__ as version
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    def units_only(module: torch.nn.Module, name: str) -> bool:
        return isinstance(module, torch.nn.Linear) and (".self_attn." in name or ".mlp." in name)

    plain, quantised = routed(), routed()
    quantize_(quantised, Int8WeightOnlyConfig(), filter_fn=units_only)
    engines: list[Engine] = []
    for name, model in (("torch float32", plain), ("torch int8 (torchao)", quantised)):
        own = RoutedEngine(model)
        own.name = own.weights = name  # each is compared with its own dense
        engines.append(own)
    settings: dict[str, Any] = {"sparsities": (0.25,), "budget": "units", "repeats": 5, "progress": PROGRESS}
    found = benchmark_rows(engines, text(), prompt_tokens=(256,), new_tokens=(16,), **settings)
    scores = []
    for engine in engines:
        for target in (0.0, 0.25):
            engine.use(target, "units")
            scores.append({"engine": engine.name, "target": target, "perplexity": perplexity(engine.model, 8)})
    return {"torchao": version, "rows": found, "scores": scores}


# ---------------------------------------------------------------------------------------------------------
# Agreement with the masked reference
# ---------------------------------------------------------------------------------------------------------


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


def agreement() -> Any:
    """Logits of each path against the masked reference over 200 random selections, and greedy texts."""
    from informed_routing.execution.cpu.engine import Rows

    trials, length, texts, new = 200, 48, 8, 32
    paths: dict[str, Any] = {"torch sparse": None, **{f"native {one}": one for one in FORMATS}}
    prompts = text()[: texts * length].view(texts, length)
    rows = []
    for path, weights in paths.items():
        model = routed()
        if weights:
            model.set_execution("native", weights=weights, policy="exact")
            engine = model.routing_state.native.of(model)
            reference = standing_for(engine)
        else:
            reference = routed()
        reference.set_execution("masked")
        generator = torch.Generator().manual_seed(17)
        errors = []
        PROGRESS.stage(path, trials)
        for trial in range(trials):
            ids = prompts[trial % texts][None]
            share = torch.rand((), generator=generator)
            gates = torch.rand(len(model.units), 1, length, generator=generator) < share
            reference.set_decision(Replay(gates))
            expected = reference(input_ids=ids, use_cache=False).logits
            if weights:
                model.set_decision(Threshold(0.0))
                embeddings = (
                    reference.decoder.embed_tokens(ids) if weights == "float32" else model.decoder.embed_tokens(ids)
                )
                rope = model.decoder.rotary_emb(embeddings, position_ids=torch.arange(length)[None])
                start = Rows(torch.zeros(1, dtype=torch.int32), None)
                found = engine.forward(
                    embeddings, rope, start, None, model.routing_state, model.stats, keep=length, forced=gates
                )
            else:
                model.set_decision(Replay(gates))
                found = model(input_ids=ids, use_cache=False).logits
            errors.append(float((found - expected).abs().max()))
            PROGRESS.advance(trial + 1)
        equal = 0
        for prompt in prompts:
            made = []
            for one in (model, reference):
                one.set_sparsity(0.25, "units")
                made.append(one.generate(input_ids=prompt[None], max_new_tokens=new, do_sample=False))
            equal += int(torch.equal(made[0], made[1]))
        rows.append(
            {
                "path": path,
                "largest": max(errors),
                "median": statistics.median(errors),
                "trials": trials,
                "texts_equal": equal,
                "texts": texts,
                "new_tokens": new,
            }
        )
    return rows


# ---------------------------------------------------------------------------------------------------------
# At equal measured speed
# ---------------------------------------------------------------------------------------------------------


class AtSpeed(RoutedEngine):
    """A routed model whose `use` takes a margin threshold, so that any speed can be asked for."""

    def use(self, sparsity: float, budget: str | None) -> None:
        super().use(0.0, None)
        self.model.set_decision(Threshold(sparsity) if sparsity > -1e8 else AlwaysExecute())


def prefill_seconds(engines: dict[str, tuple[Engine, float]], ids: Tensor, repeats: int = 5) -> dict[str, float]:
    """Median seconds of one prefill of `ids` [1, N] for each (engine, setting), taken in turns."""
    PROGRESS.stage("prefill in turns", repeats + 1)
    work = {
        name: prefill_callable(engine, ids, functools.partial(engine.use, setting, None))
        for name, (engine, setting) in engines.items()
    }
    return {name: timing.median for name, timing in measure(work, repeats, 1, PROGRESS).items()}


def sequence() -> Tensor:
    """A prompt of 1,024 tokens, half of each text."""
    tokenizer = load_tokenizer(BASE)
    parts = [prompt_text([name], tokenizer, 512)[:512] for name in TEXTS]
    return torch.cat(parts)[None]


def curve(model: Any, dense: tuple[Engine, float], points: int = 6) -> list[tuple[float, float]]:
    """(speed-up, threshold) of thresholds spread over the table of a routed model."""
    table = sorted(row.threshold for row in model.routing_config.thresholds)
    lowest = next(row.threshold for row in model.routing_config.thresholds if row.units > 0.015)
    thresholds = [lowest + (table[-1] - lowest) * i / (points - 1) for i in range(points)]
    engine = AtSpeed(model, "float32")
    runs = {"dense": dense, **{str(t): (engine, t) for t in thresholds}}
    seconds = prefill_seconds(runs, sequence())
    return sorted((seconds["dense"] / seconds[str(t)], t) for t in thresholds)


def threshold_at(found: list[tuple[float, float]], speedup: float) -> float:
    """The threshold for a speed-up, from a straight line through the measured (speed-up, threshold) pairs around it."""
    for (low, a), (high, b) in itertools.pairwise(found):
        if low <= speedup <= high:
            return a + (b - a) * (speedup - low) / (high - low)
    raise SystemExit(f"no threshold reaches {speedup:.3f}: {found}")


def budgets() -> Any:
    """Routers of a MAC budget and of a unit budget with thresholds of equal measured prefill speed."""
    models = {"units": routed(UNITS), "macs": routed(MACS)}
    dense: tuple[Engine, float] = (AtSpeed(models["units"], "float32"), -1e9)
    curves = {name: curve(model, dense) for name, model in models.items()}
    top = min(found[-1][0] for found in curves.values())
    rows = []
    for part in (0.4, 0.65, 0.9):
        speedup = 1 + (top - 1) * part
        chosen = {name: threshold_at(found, speedup) for name, found in curves.items()}
        engines = {name: (AtSpeed(model, "float32"), chosen[name]) for name, model in models.items()}
        seconds = prefill_seconds({"dense": dense, **engines}, sequence())
        for name, (engine, setting) in engines.items():
            engine.use(setting, None)
            rows.append(
                {
                    "budget": name,
                    "asked": speedup,
                    "measured": seconds["dense"] / seconds[name],
                    "threshold": setting,
                    "perplexity": perplexity(models[name]),
                }
            )
    models["units"].set_decision(AlwaysExecute())
    return {"rows": rows, "dense": perplexity(models["units"])}


def block_influence() -> list[float]:
    """ShortGPT's score of each layer: 1 - cosine of its input and output, mean over calibration text."""
    model = load_model(BASE, dtype=torch.float32)[0]
    rows = pack(load_texts("demo:wiki", "calibration"), load_tokenizer(BASE), 512)[:16]
    total = torch.zeros(model.config.num_hidden_layers)
    with torch.inference_mode():
        for row in rows.split(1):
            hidden = model(row, output_hidden_states=True, use_cache=False, logits_to_keep=1).hidden_states
            # the last recorded state has been normed: compare the layers' own outputs
            for i in range(len(total) - 1):
                total[i] += 1 - torch.cosine_similarity(hidden[i][0], hidden[i + 1][0], dim=-1).mean()
    total[-1] = float("inf")
    return [float(v) / len(rows) for v in total]


def pruned(scores: list[float], count: int) -> Any:
    """A dense model without its `count` least important layers, as a routed one that executes everything."""
    model = load_model(BASE, dtype=torch.float32)[0]
    gone = sorted(range(len(scores)), key=scores.__getitem__)[:count]
    kept = [layer for i, layer in enumerate(model.model.layers) if i not in gone]
    for i, layer in enumerate(kept):
        layer.self_attn.layer_idx = i
    model.model.layers = torch.nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[: len(kept)]
    return RoutedModelForCausalLM.attach(model), gone


def depth() -> Any:
    """Deleting the least important layers against routing, at equal measured prefill latency, nothing retrained."""
    scores = block_influence()
    model = routed(UNITS)
    macs = routed(MACS)
    dense: tuple[Engine, float] = (AtSpeed(model, "float32"), -1e9)
    curves = {"units": curve(model, dense), "macs": curve(macs, dense)}
    rows = []
    for count in (2, 4, 6):
        small, gone = pruned(scores, count)
        static: tuple[Engine, float] = (AtSpeed(small, "float32"), -1e9)
        seconds = prefill_seconds({"dense": dense, "pruned": static}, sequence())
        speedup = seconds["dense"] / seconds["pruned"]
        chosen = {name: threshold_at(found, speedup) for name, found in curves.items()}
        engines = {
            "units": (AtSpeed(model, "float32"), chosen["units"]),
            "macs": (AtSpeed(macs, "float32"), chosen["macs"]),
        }
        seconds = prefill_seconds({"dense": dense, "pruned": static, **engines}, sequence())
        static[0].use(-1e9, None)
        rows.append(
            {
                "method": "depth pruning",
                "layers": gone,
                "measured": seconds["dense"] / seconds["pruned"],
                "seconds": seconds["pruned"],
                "perplexity": perplexity(small),
            }
        )
        for name, (engine, setting) in engines.items():
            engine.use(setting, None)
            rows.append(
                {
                    "method": f"routed ({name} budget)",
                    "measured": seconds["dense"] / seconds[name],
                    "seconds": seconds[name],
                    "perplexity": perplexity(engine.model),
                }
            )
        del small, static
        gc.collect()
    return {"scores": scores, "rows": rows}


# ---------------------------------------------------------------------------------------------------------
# How cost grows
# ---------------------------------------------------------------------------------------------------------

LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)


def lengths() -> Any:
    """Prefill seconds and peak memory from 128 to 8,192 tokens; each memory figure from a process of its own."""
    model = routed()
    rows = benchmark_rows(
        [*natives(model, ("float32",)), Engine(load_model(BASE, dtype=torch.float32)[0])],
        text(),
        sparsities=(0.4,),
        budget="units",
        prompt_tokens=LENGTHS,
        phases=("prefill",),
        repeats=2,
        warmup=0,
        progress=PROGRESS,
    )
    del model
    gc.collect()
    memory = []
    for engine in ("native", "transformers"):
        for target in (0.0,) if engine == "transformers" else (0.0, 0.4):
            for length in LENGTHS[::2]:
                command = [sys.executable, __file__, "--peak", engine, str(target), str(length)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                memory.append(
                    {
                        "engine": engine,
                        "target": target,
                        "prompt_tokens": length,
                        "megabytes": json.loads(done.stdout.splitlines()[-1]),
                    }
                )
    return {"rows": rows, "memory": memory}


def peak(name: str, target: float, length: int) -> float:
    """Megabytes that one prefill adds to the resident memory of a process that has run a short one."""
    import threading

    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6

    if name == "transformers":
        engine = Engine(load_model(BASE, dtype=torch.float32)[0])
    else:
        engine = RoutedEngine(routed(), "float32" if name == "native" else None)
    ids = text()[:length][None]
    engine.use(target, "units")
    with torch.inference_mode():
        engine.step(ids[:, :32], engine.fresh_cache(1, 32))
        before, highest, done = resident(), 0.0, threading.Event()

        def watch() -> None:
            nonlocal highest
            while not done.wait(0.002):
                highest = max(highest, resident())

        watcher = threading.Thread(target=watch)
        watcher.start()
        engine.step(ids, engine.fresh_cache(1, length))
        done.set()
        watcher.join()
    return max(highest, resident()) - before


SECTIONS: dict[str, Callable[[], Any]] = {
    f.__name__: f for f in (prefill, decode, batches, formats, torchao, agreement, budgets, depth, lengths)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], metavar="SECTION")
    parser.add_argument("--list", action="store_true", help="name the sections")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        name, target, length = arguments.peak
        print(json.dumps(peak(name, float(target), int(length))))
        return
    if arguments.list or not arguments.sections:
        for name, section in SECTIONS.items():
            print(f"{name:10} {(section.__doc__ or '').splitlines()[0]}")
        return
    torch.set_grad_enabled(False)
    for name in arguments.sections:
        result = SECTIONS[name]()
        PROGRESS.done()
        write_json(RESULTS / f"{name}.json", {"environment": environment(), "result": result})
        print(f"wrote docs/data/speed/{name}.json", flush=True)


if __name__ == "__main__":
    main()
