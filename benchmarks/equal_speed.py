"""Perplexity at equal measured prefill latency: MAC against unit budget, routing against static depth pruning.

    python benchmarks/equal_speed.py budgets depth     # on an otherwise idle machine

Writes docs/data/speed/budgets.json and depth.json. Thresholds are placed by measured speed, then measured in turns
with what they are compared with. The routed models are those of benchmarks/speed.py.
"""

from __future__ import annotations

import functools
import gc
import itertools
from typing import Any

import torch
from shared import BASE, MACS, PROGRESS, TEXTS, UNITS, perplexity, routed, run_sections
from torch import Tensor

from informed_routing.assets import load_model, load_texts, load_tokenizer, pack
from informed_routing.evaluation.engines import Engine, RoutedEngine
from informed_routing.evaluation.speed import prefill_callable, prompt_text
from informed_routing.evaluation.timing import measure
from informed_routing.routed_model import RoutedModelForCausalLM
from informed_routing.routing.decision import AlwaysExecute, Threshold

MARGIN = 1.02


class AtSpeed(RoutedEngine):
    """A routed model whose `use` takes a margin threshold, so that any speed can be asked for."""

    def use(self, sparsity: float, budget: str | None) -> None:
        super().use(0.0, None)
        self.model.set_decision(Threshold(sparsity) if sparsity > -1e8 else AlwaysExecute())


def prefill_seconds(engines: dict[str, tuple[Engine, float]], ids: Tensor, repeats: int = 9) -> dict[str, float]:
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
        # a little faster than asked: routing must not win by being slower
        speedup = MARGIN * seconds["dense"] / seconds["pruned"]
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


if __name__ == "__main__":
    run_sections(__doc__, (budgets, depth))
