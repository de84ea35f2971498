"""Speed of routed models on this machine, section by section; each writes docs/data/speed/SECTION.json.

    python benchmarks/quality.py units-start units-100 macs-100   # the routed models, if they are not there yet
    python benchmarks/dial.py
    python benchmarks/speed.py prefill decode                     # on an otherwise idle machine
    python benchmarks/speed.py matrix                             # on a machine with AMX, after `make demo`
    python benchmarks/equal_speed.py budgets depth
    python benchmarks/agreement.py agreement
    python benchmarks/speed_page.py                               # docs/benchmarks.md from what was measured

Engines run in turns on the same held-out text. `units` is the routed model with a unit budget at 25 and 40 %, `macs`
the one with a MAC budget at 35 % of the body's MACs.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from shared import BASE, DEMO, FORMATS, MACS, PROGRESS, natives, perplexity, routed, run_sections, text

from informed_routing.assets import load_model
from informed_routing.evaluation.engines import CompiledEngine, Engine, RoutedEngine
from informed_routing.evaluation.speed import benchmark_rows
from informed_routing.execution.cpu.engine import CpuEngine


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


def matrix() -> Any:
    """Prefill where the processor has matrix instructions (AMX), of the model that `make demo` leaves in out/demo."""
    engines = natives(routed(DEMO), FORMATS)
    for kind in (torch.float32, torch.bfloat16):
        dense = load_model(BASE, dtype=kind)[0]
        engines.append(Engine(dense, f"transformers {str(kind).removeprefix('torch.')}"))
    settings: dict[str, Any] = {"prompt_tokens": (512, 2048), "phases": ("prefill",), "repeats": 7, "profile": True}
    rows = benchmark_rows(engines, text(), sparsities=(0.25, 0.35), budget="macs", progress=PROGRESS, **settings)
    return [{"budget": "macs", **row} for row in rows]


def decode() -> Any:
    """Batch 1: 32 tokens after a prompt of 256."""

    def others(model: Any) -> list[Engine]:
        dense, half = (load_model(BASE, dtype=kind)[0] for kind in (torch.float32, torch.bfloat16))
        eager = [Engine(dense), Engine(half, "transformers bfloat16")]
        return [*eager, CompiledEngine(dense), CompiledEngine(half, "compiled bfloat16")]

    return both_budgets(
        FORMATS, others, prompt_tokens=(256,), new_tokens=(32,), phases=("decode",), repeats=7, profile=True
    )


def batch_8() -> Any:
    """Decode of 8 sequences: differences are of the size of a small machine's noise, hence the repeats."""
    return _batch(8, 31)


def batch_32() -> Any:
    """Decode of 32 sequences."""
    return _batch(32, 7)


def _batch(size: int, repeats: int) -> Any:
    return both_budgets(
        FORMATS,
        lambda _: [],
        prompt_tokens=(32,),
        new_tokens=(16,),
        batches=(size,),
        phases=("decode",),
        repeats=repeats,
    )


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
                    "megabytes": cast(CpuEngine, engine.native).bytes / 1e6,
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


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:  # one memory figure, from a process of its own
        print(json.dumps(peak(sys.argv[2], float(sys.argv[3]), int(sys.argv[4]))))
    else:
        run_sections(__doc__, (prefill, matrix, decode, batch_8, batch_32, formats, torchao, lengths))
